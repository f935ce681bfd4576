//! Matrix products C = A · B: on a CPU ([`cpu`]), and on a GPU in f32 on SIMT cores ([`simt`]), for few columns
//! ([`skinny`]), and in half precision on tensor cores ([`mma`]).

pub mod cpu;
pub mod epilogue;
pub mod mma;
pub mod pack;
pub mod simt;
pub mod skinny;

use peft_runtime::artifact::Extent;

use crate::abi::arguments;

arguments! {
    /// The buffers of every product, in front of those of its epilogue.
    Buffers { a, b, c }
}

/// A strided operand in memory: element (batch, i, k) is at `offset + batch · batch_stride + i · row_stride + k ·
/// k_stride`, where i counts rows of A or columns of B. All strides and offsets are in elements.
#[derive(Debug)]
pub struct Operand {
    /// From one batch to the next.
    pub batch_stride: Extent,
    /// From one row of A, or one column of B, to the next.
    pub row_stride: Extent,
    /// From one step along k to the next.
    pub k_stride: Extent,
    /// The index of the first element.
    pub offset: Extent,
    /// Whether neighbouring elements in memory differ in i; otherwise they differ in k.
    pub contiguous: bool,
}

/// The layout of the result C. Strides and offsets are in elements.
pub struct ResultLayout {
    /// From one row to the next; elements of a row are contiguous.
    pub row_stride: Extent,
    /// From one batch to the next.
    pub batch_stride: Extent,
    /// The index of the first element.
    pub offset: Extent,
}

/// The problem that a GPU's kernel solves: C[m, n] = A[m, depth] · B[depth, n], for each of `batch` batches.
pub struct Product {
    /// Rows of A and of C.
    pub m: Extent,
    /// Columns of B and of C.
    pub n: Extent,
    /// Steps along k.
    pub depth: Extent,
    /// The number of batches.
    pub batch: Extent,
    /// The left operand.
    pub a: Operand,
    /// The right operand.
    pub b: Operand,
    /// The result.
    pub c: ResultLayout,
}

impl Product {
    /// The number of tiles down and across the result, for tiles of `rows` × `columns`.
    fn tiles(&self, rows: u64, columns: u64) -> (Extent, Extent) {
        let tiles = |n: &Extent, side| Extent::CeilDiv(Box::new(n.clone()), side);
        (tiles(&self.m, rows), tiles(&self.n, columns))
    }

    /// Elements of one batch of the result.
    pub fn batch_elements(&self) -> Extent {
        self.m.clone() * self.n.clone()
    }

    /// Whether the result is contiguous from its buffer's first element on.
    pub fn is_dense(&self) -> bool {
        let apart = self.batch != Extent::Const(1) && self.c.batch_stride != self.batch_elements();
        self.c.row_stride == self.n && self.c.offset == Extent::Const(0) && !apart
    }
}
