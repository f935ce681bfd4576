//! Gemms on a GPU: operand layouts and launches. [`super::schedule`] chooses the kernel.

use std::ops::Range;

use peft_grammar::graph::Value;
use peft_runtime::artifact::{BufferId, Extent};

use super::contraction::{Axes, Contraction, operand};
use super::dispatch::Fused;
use super::entry::{BufferView, DispatchLowering};
use super::epilogue::LoweredEpilogue;
use super::schedule::{self, ScheduledGemm, tensor_cores};
use super::sizes::dims_product;
use crate::builder::mma::Half;
use crate::kernels::gemm::epilogue::ResultMode;
use crate::kernels::gemm::{Buffers, Operand, Product, ResultLayout};

impl DispatchLowering<'_, '_, '_, '_> {
    /// Emits a `matmul` on a GPU, with its epilogue.
    pub(super) fn gpu_gemm(&mut self, fused: &Fused) -> Result<(), String> {
        let node = &self.graph.nodes[fused.node];
        let (x, y, result) = (node.operands[0], node.operands[1], node.result());
        let (axes_x, axes_y) = Axes::of_product(&node.op, self.ty(x), self.ty(y));
        let Contraction { m, n, depth, batch } = Contraction::of(self.graph, node);
        let left = self.strided_operand(x, &axes_x);
        let right = self.strided_operand(y, &axes_y);
        let weight = self.buffer_view(y).clone();
        let half = self.mma_type(&left.1, &weight).filter(|_| batch == Extent::Const(1));
        let ((a, left), (b, right)) = match half {
            Some(half) => {
                let packed = self.pack_half_precision(half, &weight, &right.1, (n.clone(), depth.clone()));
                (self.half_precision_rows(half, (&m, &depth), left, Some(x)), packed.operand())
            }
            None => {
                let half_precision_only = matches!(self.analysis.half_precision_copy(x), Some((_, true)));
                assert!(!half_precision_only, "an f32 gemm reads a value that is stored in half precision alone");
                (left, right)
            }
        };
        self.place_fused_results(fused);
        let axes = Axes::of_result(self.ty(result), self.ty(x), self.ty(y));
        let (c, row_stride, batch_stride, offset) = self.gemm_destination(result, axes);
        let lowered = match fused.is_empty() {
            true => LoweredEpilogue::default(),
            false => self.lower_epilogue(fused, &Buffers { a, b, c }.list(), true)?,
        };
        let mode = if fused.stored { ResultMode::Overwrite } else { ResultMode::EpilogueOnly };
        let product =
            Product { m, n, depth, batch, a: left, b: right, c: ResultLayout { row_stride, batch_stride, offset } };
        self.launch_gpu_gemm(product, half, Buffers { a, b, c }, mode, lowered);
        Ok(())
    }

    /// The half-precision type in which tensor cores compute the gemm, if they do.
    fn mma_type(&self, left: &Operand, weight: &BufferView) -> Option<Half> {
        tensor_cores(self.module.machine, self.gemm_precision(weight, left.contiguous))
    }

    /// `gemm_with_weight_rows` on a GPU.
    pub(super) fn gpu_gemm_with_weight_rows(
        &mut self,
        (x, m): (BufferId, Extent),
        y: Value,
        rows: Range<u64>,
        transpose_y: bool,
        (out, accumulate): (BufferId, bool),
    ) {
        let width = dims_product(&self.ty(y).shape[1..]);
        let some = Extent::Const(rows.end - rows.start);
        let (one, zero) = (Extent::Const(1), Extent::Const(0));
        let (n, depth) = if transpose_y { (some, width.clone()) } else { (width.clone(), some) };
        let matrix = |contiguous, leading: Extent, offset| {
            let (row_stride, k_stride) = if contiguous { (one.clone(), leading) } else { (leading, one.clone()) };
            Operand { batch_stride: zero.clone(), row_stride, k_stride, offset, contiguous }
        };
        let left = matrix(false, depth.clone(), zero.clone());
        let weight = self.buffer_view(y).clone();
        let half = self.mma_type(&left, &weight);
        let ((a, left), (b, right)) = match half {
            Some(half) => {
                let all = dims_product(&self.ty(y).shape[..1]);
                let whole = matrix(!transpose_y, width.clone(), zero.clone());
                let size = if transpose_y { (all, width) } else { (width, all) };
                let packed = self.pack_half_precision(half, &weight, &whole, size);
                let (column, step) = if transpose_y { (rows.start, 0) } else { (0, rows.start) };
                (self.half_precision_rows(half, (&m, &depth), (x, left), None), packed.from(column, step).operand())
            }
            None => {
                let offset = Extent::Const(rows.start) * width.clone();
                ((x, left), (weight.buffer, matrix(!transpose_y, width, offset)))
            }
        };
        let result_layout = ResultLayout { row_stride: n.clone(), batch_stride: zero.clone(), offset: zero.clone() };
        let product = Product { m, n, depth, batch: one.clone(), a: left, b: right, c: result_layout };
        let mode = if accumulate { ResultMode::Accumulate } else { ResultMode::Overwrite };
        self.launch_gpu_gemm(product, half, Buffers { a, b, c: out }, mode, LoweredEpilogue::default());
    }

    /// A value as a strided gemm operand; it is copied to row-major if its view has no such strides.
    fn strided_operand(&mut self, value: Value, axes: &Axes) -> (BufferId, Operand) {
        if operand(&self.view(value), axes).is_none() {
            self.materialize(value);
        }
        let operand = operand(&self.view(value), axes).expect("row-major");
        (self.buffer_view(value).buffer, operand)
    }

    /// Launches the gemm that the schedule chooses, and with split-K the sum of its partial results.
    fn launch_gpu_gemm(
        &mut self,
        product: Product,
        half: Option<Half>,
        Buffers { a, b, c }: Buffers<BufferId>,
        mode: ResultMode,
        LoweredEpilogue { epilogue, buffers, sizes: follows, .. }: LoweredEpilogue,
    ) {
        let vec4 = half.is_some() && self.rows_in_vec4(a, &product.a, &product.depth);
        self.label = epilogue.label(&self.label);
        let chosen = schedule::gpu_gemm(&product, (half, vec4), mode, epilogue, &self.module.thresholds);
        let ScheduledGemm { schedule, sizes, units, splits } = chosen;
        let elements = product.batch.clone() * product.batch_elements();
        let to = if splits > 1 { self.scratch(vec![Extent::Const(splits), elements.clone()]) } else { c };
        let buffers = [Buffers { a, b, c: to }.list(), buffers].concat();
        self.launch(schedule, buffers, [sizes, follows].concat(), units);
        if splits > 1 {
            self.sum_partials(to, Extent::Const(splits), elements, c);
        }
    }
}
