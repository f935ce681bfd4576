//! Gemms on a processor: operand layouts, packing, and the launch ([`crate::kernels::gemm::cpu`]). The blocking follows
//! Goto and van de Geijn (2008) and BLIS: B is packed into column panels, and blocks of A's rows are packed by the
//! kernel.

use std::ops::Range;

use peft_grammar::graph::Value;
use peft_runtime::artifact::{BufferId, Extent, Storage};

use super::contraction::{Axes, operand};
use super::dispatch::Fused;
use super::entry::{BufferView, DispatchLowering};
use super::epilogue::LoweredEpilogue;
use super::module::PanelCopy;
use super::schedule::cpu_gemm_shape;
use super::sizes::dims_product;
use super::view::{UNIT_STRIDE, View};
use crate::kernels::gemm::cpu::{CpuGemmShape, Gemm, Sizes};
use crate::kernels::gemm::pack::{OperandFormat, Pack, PackBuffers, PackSizes};
use crate::kernels::gemm::{Buffers, Operand};

/// The range of columns that one unit computes. A block of A that the kernel has packed is reused for all of them, and
/// a gemm as narrow as a hidden state still has units for many threads. Wider gemms get wider units.
const UNIT_COLUMNS: Range<u64> = 384..1152;
/// The number of units that the columns of a wide gemm are divided among, within that range.
const COLUMN_UNITS: u64 = 4;
/// Column panels of a unit if one unit has all rows, so that there are enough units for all threads.
const SINGLE_BLOCK_PANELS: u64 = 2;

/// The layout of a gemm operand, whose element stride is 1 along i (rows of A, columns of B) or along k. Element
/// (batch, i, k) is at `offset + batch · batch_stride + k · leading_dimension + i` if `contiguous`, else at
/// `offset + batch · batch_stride + i · leading_dimension + k`.
#[derive(Debug)]
struct CpuOperand {
    batch: Extent,
    /// The number of rows of A, or of columns of B.
    length: Extent,
    depth: Extent,
    /// The element stride is 1 along i; otherwise along k.
    contiguous: bool,
    leading_dimension: Extent,
    batch_stride: Extent,
    offset: Extent,
}

impl CpuOperand {
    /// The layout of a view; `None` if neither stride is 1, or if axes that the gemm merges have no common stride.
    fn of(view: &View, axes: &Axes) -> Option<CpuOperand> {
        let Operand { batch_stride, row_stride, k_stride, offset, contiguous } = operand(view, axes)?;
        let (leading_dimension, unit) = if contiguous { (k_stride, row_stride) } else { (row_stride, k_stride) };
        let Axes { batch, i, k } = axes;
        let [batch, length, depth] = [batch, i, k].map(|axes| dims_product(&view.shape[axes.clone()]));
        // The stride of a single batch is not used; 0 makes equal layouts of it compare equal.
        let batch_stride = if batch == Extent::Const(1) { Extent::Const(0) } else { batch_stride };
        (unit == Extent::Const(1)).then_some(CpuOperand {
            batch,
            length,
            depth,
            contiguous,
            leading_dimension,
            batch_stride,
            offset,
        })
    }
}

/// Where a gemm stores its result, and whether it adds to what is stored there.
struct Destination {
    buffer: BufferId,
    leading_dimension: Extent,
    batch_stride: Extent,
    offset: Extent,
    accumulate: bool,
}

impl DispatchLowering<'_, '_, '_, '_> {
    /// A value as a gemm operand, with where it is stored; it is copied to row-major if its view has no stride of 1.
    fn cpu_operand(&mut self, value: Value, axes: Axes) -> (BufferView, CpuOperand) {
        if CpuOperand::of(&self.view(value), &axes).is_none() {
            self.materialize(value);
        }
        let operand =
            CpuOperand::of(&self.view(value), &axes).expect("a row-major operand has stride 1 along one axis");
        (self.buffer_view(value).clone(), operand)
    }

    /// Emits a `matmul` on a processor, with its epilogue.
    pub(super) fn cpu_gemm(&mut self, fused: &Fused) -> Result<(), String> {
        let node = &self.graph.nodes[fused.node];
        let (x, y, result) = (node.operands[0], node.operands[1], node.result());
        let (axes_x, axes_y) = Axes::of_product(&node.op, self.ty(x), self.ty(y));
        let (source_a, left) = self.cpu_operand(x, axes_x);
        let (source_b, right) = self.cpu_operand(y, axes_y);
        let n = right.length.clone();
        let packed = source_b.frozen.is_some() || !right.contiguous;
        let gemm_shape = self.gemm_shape(&left, &source_b, &n, packed);

        let width = Extent::Const(gemm_shape.tile.columns());
        let (packed_b, layout_b) = match packed {
            true => {
                let panels = Extent::CeilDiv(Box::new(n.clone()), gemm_shape.tile.columns());
                let leading_dimension = Extent::Const(gemm_shape.panel_row());
                let panel = gemm_shape.format.steps(left.depth.clone()) * leading_dimension.clone();
                let layout = [leading_dimension, panels.clone() * panel.clone(), Extent::Const(0), panel];
                (self.pack_operand(&source_b, gemm_shape, right), layout)
            }
            false => (source_b.buffer, [right.leading_dimension, right.batch_stride, right.offset, width]),
        };
        if let Some(&root) = fused.groups.first()
            && self.analysis.use_counts[result.0 as usize] == 1
        {
            // Nothing else reads the product, so it is stored where the first group's result will overwrite it.
            let (buffer, view) = self.result_destination(self.graph.nodes[root].result());
            self.set_view(result, buffer, view);
        }
        let axes = Axes::of_result(self.ty(result), self.ty(x), self.ty(y));
        let (buffer, leading_dimension, batch_stride, offset) = self.gemm_destination(result, axes);
        let to = Destination { buffer, leading_dimension, batch_stride, offset, accumulate: false };
        let own = Buffers { a: source_a.buffer, b: packed_b, c: buffer }.list();
        let lowered = self.lower_epilogue(fused, &own, false)?;
        self.label = lowered.epilogue.label(node.op.name());
        self.launch_cpu_gemm(gemm_shape, (source_a.buffer, left), (packed_b, layout_b), n, to, lowered);
        Ok(())
    }

    /// The micro-kernel's tile, the operand layouts and the number format of a gemm of `n` columns.
    fn gemm_shape(&self, left: &CpuOperand, source_b: &BufferView, n: &Extent, packed: bool) -> CpuGemmShape {
        let precision = self.gemm_precision(source_b, left.contiguous);
        cpu_gemm_shape(self.module.machine, (&left.length, n), left.contiguous, packed, precision)
    }

    /// Launches a gemm over all of its units. `layout_b` has B's leading dimension, batch stride, offset, and the
    /// stride from one column panel to the next.
    fn launch_cpu_gemm(
        &mut self,
        gemm_shape: CpuGemmShape,
        (a, left): (BufferId, CpuOperand),
        (b, layout_b): (BufferId, [Extent; 4]),
        n: Extent,
        to: Destination,
        lowered: LoweredEpilogue,
    ) {
        let CpuOperand { batch, length: m, depth, .. } = left;
        let panels = Extent::CeilDiv(Box::new(n.clone()), gemm_shape.tile.columns());
        // The number is even, so that two threads can share a gemm that is as narrow as one unit.
        let row_blocks = Extent::Const(2) * Extent::CeilDiv(Box::new(m.clone()), 2 * gemm_shape.tile.block());
        let panels_per_unit = match (&m, &n) {
            (Extent::Const(m), _) if *m <= gemm_shape.tile.block() => SINGLE_BLOCK_PANELS,
            (_, Extent::Const(n)) => {
                (n / COLUMN_UNITS).clamp(UNIT_COLUMNS.start, UNIT_COLUMNS.end) / gemm_shape.tile.columns()
            }
            _ => UNIT_COLUMNS.start / gemm_shape.tile.columns(),
        };
        let panel_groups = Extent::CeilDiv(Box::new(panels.clone()), panels_per_unit);
        let units = batch * row_blocks.clone() * panel_groups.clone();
        let [ldb, batch_stride_b, offset_b, panel_stride_b] = layout_b;
        let sizes = Sizes {
            m,
            n,
            depth,
            row_blocks,
            panel_groups,
            panels_per_unit: Extent::Const(panels_per_unit),
            panels,
            lda: left.leading_dimension,
            batch_stride_a: left.batch_stride,
            offset_a: left.offset,
            ldb,
            batch_stride_b,
            offset_b,
            panel_stride_b,
            ldc: to.leading_dimension,
            batch_stride_c: to.batch_stride,
            offset_c: to.offset,
            accumulate: Extent::Const(to.accumulate.into()),
        };
        let buffers = [Buffers { a, b, c: to.buffer }.list(), lowered.buffers].concat();
        let sizes = [sizes.list(), lowered.sizes].concat();
        self.launch(Gemm { shape: gemm_shape, epilogue: lowered.epilogue }, buffers, sizes, units);
    }

    /// `gemm_with_weight_rows` on a processor. All of y is packed, once.
    pub(super) fn cpu_gemm_with_weight_rows(
        &mut self,
        (x, m): (BufferId, Extent),
        y: Value,
        rows: Range<u64>,
        transpose_y: bool,
        (out, accumulate): (BufferId, bool),
    ) {
        let [all, width] = [0, 1].map(|axis| dims_product(&self.ty(y).shape[axis..axis + 1]));
        let some = Extent::Const(rows.end - rows.start);
        let (whole, n, depth) = match transpose_y {
            true => ((all, width.clone()), some, width.clone()),
            false => ((width.clone(), all), width.clone(), some),
        };
        let zero = Extent::Const(0);
        let matrix = |(length, depth): (Extent, Extent), contiguous, leading_dimension| {
            let (batch, batch_stride, offset) = (Extent::Const(1), zero.clone(), zero.clone());
            CpuOperand { batch, length, depth, contiguous, leading_dimension, batch_stride, offset }
        };
        let left = matrix((m, depth.clone()), false, depth);
        let right = matrix(whole, !transpose_y, width);
        let source = self.buffer_view(y).clone();
        let gemm_shape = self.gemm_shape(&left, &source, &right.length, true);
        let (columns, leading_dimension) = (gemm_shape.tile.columns(), Extent::Const(gemm_shape.panel_row()));
        let panel = gemm_shape.format.steps(right.depth.clone()) * leading_dimension.clone();
        let before = match transpose_y {
            true => Extent::Const(rows.start / columns) * panel.clone(),
            false => gemm_shape.format.steps(Extent::Const(rows.start)) * leading_dimension.clone(),
        };
        let packed = self.pack_operand(&source, gemm_shape, right);
        let layout = [leading_dimension, zero.clone(), before, panel];
        let to = Destination {
            buffer: out,
            leading_dimension: n.clone(),
            batch_stride: zero.clone(),
            offset: zero.clone(),
            accumulate,
        };
        self.launch_cpu_gemm(gemm_shape, (x, left), (packed, layout), n, to, LoweredEpilogue::default());
    }

    /// Where a gemm stores `result`: the buffer, the leading dimension, the batch stride, and the offset.
    pub(super) fn gemm_destination(
        &mut self,
        result: Value,
        Axes { batch, i, .. }: Axes,
    ) -> (BufferId, Extent, Extent, Extent) {
        let (mut out, mut view) = match &self.buffer_views[result.0 as usize] {
            Some(source) => (source.buffer, self.view(result)),
            None => self.result_destination(result),
        };
        let has_no_stride =
            |view: &View| view.merged_stride(i.clone()).is_none() || view.merged_stride(batch.clone()).is_none();
        if has_no_stride(&view) {
            // The preferred destination does not have one stride over all rows: store row-major, and let the reader
            // copy.
            (out, view) = (self.allocate_result(result), self.view(result));
        }
        let [leading_dimension, batch_stride] =
            [i, batch].map(|axes| view.merged_stride(axes).unwrap_or(UNIT_STRIDE).extent());
        (out, leading_dimension, batch_stride, view.offset)
    }

    /// Packs an operand into column panels, or returns the panels if it has been packed this way before.
    fn pack_operand(&mut self, source: &BufferView, gemm_shape: CpuGemmShape, operand_layout: CpuOperand) -> BufferId {
        let (width, format) = (gemm_shape.tile.columns(), gemm_shape.format);
        let layout = format!("{width} of {operand_layout:?}, {format:?}");
        let CpuOperand { batch, length, depth, contiguous, leading_dimension, batch_stride, offset } = operand_layout;
        let panels = Extent::CeilDiv(Box::new(length.clone()), width);
        let units = batch.clone() * panels.clone();
        let shape = vec![units.clone() * format.steps(depth.clone()) * Extent::Const(gemm_shape.panel_row())];
        let key = match &source.frozen {
            Some(expression) => format!("pack({expression}, {layout})"),
            None => format!("pack({}, {layout})", source.buffer),
        };
        let known = if source.frozen.is_some() { self.module.bound.get(&key) } else { self.packed_operands.get(&key) };
        if let Some(&panels) = known {
            return panels;
        }
        let packed = match source.frozen {
            Some(_) => {
                let packed = self.module.bind(&key, format.b_element(), shape, Storage::Prepared);
                // A whole row-major matrix in f32: `gather` may read its rows from these panels.
                if let OperandFormat::F32 = format
                    && (contiguous, &leading_dimension, &offset, &batch)
                        == (true, &length, &Extent::Const(0), &Extent::Const(1))
                {
                    let shape = [depth.clone(), length.clone()];
                    self.module.panel_copies.insert(source.buffer, PanelCopy { buffer: packed, width, shape });
                }
                packed
            }
            None => {
                let packed = self.module.buffer(format.b_element(), shape, Storage::Temporary);
                self.packed_operands.insert(key.clone(), packed);
                packed
            }
        };
        let sizes = PackSizes { length, depth, panels, leading_dimension, batch_stride, offset }.list();
        let buffers = PackBuffers { from: source.buffer, to: packed }.list();
        let frozen = source.frozen.is_some().then_some(&key[..]);
        self.for_packing(frozen).launch(Pack { width, contiguous, format }, buffers, sizes, units);
        packed
    }
}
