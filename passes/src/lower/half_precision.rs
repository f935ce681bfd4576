//! Half-precision operands of a GPU's tensor-core gemms with frozen weights ([`crate::kernels::gemm::mma`]): packs the
//! weights once, and rounds the rows that they are multiplied by.

use peft_grammar::graph::Value;
use peft_runtime::artifact::{BufferId, Element, Extent, Storage};

use super::entry::{BufferView, DispatchLowering};
use super::sizes::extents;
use crate::builder::mma::Half;
use crate::kernels::gemm::Operand;
use crate::kernels::gemm::mma::{
    COLUMNS, DEPTH, Pack, PackBuffers, PackSizes, ROUNDED_PER_LANE, Round, RoundSizes, TILE_WORDS,
};
use crate::target::cuda::WARP;

impl DispatchLowering<'_, '_, '_, '_> {
    /// The rows of A allow 16-byte loads: their length, offset and stride are multiples of 4 floats.
    pub(super) fn rows_in_vec4(&self, a: BufferId, left: &Operand, depth: &Extent) -> bool {
        let multiple = |extent: &Extent| matches!(extent, Extent::Const(n) if n.is_multiple_of(4));
        let whole = matches!(self.module.buffers[a].storage, Storage::Temporary | Storage::Prepared);
        whole && [&left.row_stride, &left.offset, depth].into_iter().all(multiple)
    }

    /// A buffer for rows in half precision, with two numbers in each 4-byte word, and its row stride in words. Rows are
    /// padded to multiples of 4 words, for 16-byte loads.
    fn half_precision_buffer(&mut self, m: &Extent, depth: &Extent) -> (BufferId, Extent) {
        let row_stride = Extent::CeilDiv(Box::new(depth.clone()), 8) * Extent::Const(4);
        (self.module.buffer(Element::I32, vec![m.clone(), row_stride.clone()], Storage::Temporary), row_stride)
    }

    /// A buffer for the half-precision copy that the kernel of `value` stores
    /// ([`super::dispatch::Analysis::half_precision_copy`]).
    pub(super) fn half_precision_result(&mut self, value: Value) -> BufferId {
        let shape = extents(self.ty(value));
        let (buffer, row_stride) = self.half_precision_buffer(&shape[0], &shape[1]);
        self.half_precision_copies.insert(value, (buffer, row_stride));
        buffer
    }

    /// Operand A as a tensor-core gemm reads it. Before sm_80 the gemm itself rounds f32 to f16. From sm_80 on A is
    /// rounded to bf16 in memory, by the kernel that produced `x` or else by a launch of its own.
    pub(super) fn half_precision_rows(
        &mut self,
        half: Half,
        (m, depth): (&Extent, &Extent),
        (a, left): (BufferId, Operand),
        x: Option<Value>,
    ) -> (BufferId, Operand) {
        if half == Half::F16 {
            return (a, left);
        }
        let known = x.and_then(|x| self.half_precision_copies.get(&x)).cloned();
        let (buffer, row_stride) = known.unwrap_or_else(|| {
            let (to, row_stride) = self.half_precision_buffer(m, depth);
            let vec4 = self.rows_in_vec4(a, &left, depth);
            let pieces = Extent::CeilDiv(Box::new(depth.clone()), ROUNDED_PER_LANE * WARP);
            let units = m.clone() * pieces.clone();
            let (source_stride, offset) = (left.row_stride.clone(), left.offset.clone());
            let sizes = RoundSizes {
                depth: depth.clone(),
                pieces,
                rounded_stride: row_stride.clone(),
                row_stride: source_stride,
                offset,
            }
            .list();
            let buffers = PackBuffers { from: a, to }.list();
            self.helper("round").launch(Round { half, vec4 }, buffers, sizes, units);
            (to, row_stride)
        });
        (buffer, Operand { row_stride, offset: Extent::Const(0), ..left })
    }

    /// Packs a frozen operand B of `n` columns and `depth` rows into half-precision tiles, or returns the tiles if it
    /// has been packed before.
    pub(super) fn pack_half_precision(
        &mut self,
        half: Half,
        weight: &BufferView,
        layout: &Operand,
        (n, depth): (Extent, Extent),
    ) -> PackedOperand {
        let expression = weight.frozen.as_ref().expect("only frozen operands are packed in half precision");
        let key = format!("half_precision({expression}, {} of {layout:?}, {n:?} {depth:?})", half.name());
        let tiles = |n: &Extent, size| Extent::CeilDiv(Box::new(n.clone()), size);
        let k_tiles = tiles(&depth, DEPTH);
        let units = tiles(&n, COLUMNS) * k_tiles.clone();
        let tile_column_stride = k_tiles.clone() * Extent::Const(TILE_WORDS);
        let known = self.module.bound.get(&key).copied();
        let buffer = known.unwrap_or_else(|| {
            let shape = vec![units.clone() * Extent::Const(TILE_WORDS)];
            let buffer = self.module.bind(&key, Element::I32, shape, Storage::Prepared);
            let (source_stride, offset) = (layout.row_stride.clone(), layout.offset.clone());
            let sizes = PackSizes {
                n,
                depth,
                tiles: k_tiles,
                column_stride: source_stride,
                k_stride: layout.k_stride.clone(),
                offset,
            }
            .list();
            let buffers = PackBuffers { from: weight.buffer, to: buffer }.list();
            self.for_packing(Some(&key)).launch(Pack { half }, buffers, sizes, units);
            buffer
        });
        PackedOperand { buffer, tile_column_stride, offset: Extent::Const(0) }
    }
}

/// A packed operand B, of which a gemm may use a part.
pub(super) struct PackedOperand {
    buffer: BufferId,
    /// Words from one column of tiles to the next; the tiles of a column follow each other along k.
    tile_column_stride: Extent,
    offset: Extent,
}

impl PackedOperand {
    /// The part from a column and a step of k on, both of which are multiples of a tile's.
    pub fn from(self, column: u64, step: u64) -> PackedOperand {
        assert!(column.is_multiple_of(COLUMNS) && step.is_multiple_of(DEPTH));
        let offset = self.tile_column_stride.clone() * Extent::Const(column / COLUMNS)
            + Extent::Const(step / DEPTH * TILE_WORDS);
        PackedOperand { offset, ..self }
    }

    /// The operand as a gemm addresses it, in strides from tile to tile.
    pub fn operand(self) -> (BufferId, Operand) {
        let PackedOperand { buffer, tile_column_stride, offset } = self;
        let (batch_stride, k_stride) = (Extent::Const(0), Extent::Const(TILE_WORDS));
        (buffer, Operand { batch_stride, row_stride: tile_column_stride, k_stride, offset, contiguous: true })
    }
}
