//! Products: on a processor, and on a GPU in `f32`, of few columns, and by tensor cores.

pub mod cpu;
pub mod epilogue;
pub mod mma;
pub mod pack;
pub mod simt;
pub mod skinny;

use peft_runtime::artifact::Extent;

use crate::abi::arguments;

arguments! {
    /// Of every product: its operands and its result, before what follows.
    Buffers { a, b, c }
}

/// An operand of a GPU's product in memory: element (batch, i, k) at `first + batch · area + i · along + k · deep`.
#[derive(Debug)]
pub struct Operand {
    pub area: Extent,
    pub along: Extent,
    pub deep: Extent,
    pub first: Extent,
    /// Elements side by side differ in i.
    pub contiguous: bool,
}

/// Its result: steps from row to row and from batch to batch, and the first element.
pub struct Placed {
    pub line: Extent,
    pub area: Extent,
    pub first: Extent,
}

/// A product on a GPU, as every kernel for one is asked for it.
pub struct Product {
    pub m: Extent,
    pub n: Extent,
    pub depth: Extent,
    pub batch: Extent,
    pub a: Operand,
    pub b: Operand,
    pub c: Placed,
}

impl Product {
    /// How many tiles of so many columns there are beside each other, and of so many rows below each other.
    fn tiles(&self, rows: u64, columns: u64) -> (Extent, Extent) {
        let tiles = |n: &Extent, side| Extent::CeilDiv(Box::new(n.clone()), side);
        (tiles(&self.m, rows), tiles(&self.n, columns))
    }

    /// Elements of one batch of the result.
    pub fn whole(&self) -> Extent {
        self.m.clone() * self.n.clone()
    }

    /// The result's elements stand side by side, without gaps.
    pub fn is_dense(&self) -> bool {
        let apart = self.batch != Extent::Const(1) && self.c.area != self.whole();
        self.c.line == self.n && self.c.first == Extent::Const(0) && !apart
    }
}
