//! The way out of a GPU's tile: rows of its sums, from shared memory to the result and to what follows the product.

use crate::builder::{Buf, Kernel, Val};
use crate::kernels::elementwise::Given;
use crate::kernels::epilogue::{Epilogue, HeldRow};
use crate::target::cuda::WARP;

/// Rows that are written together, for all that follows the product there.
const TOGETHER: u64 = 4;

/// What happens to the product itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    Written,
    /// Added to what stands there.
    Added,
    /// Only what follows reads it.
    Passed,
}

impl Fate {
    /// Of a product's buffers, those that it reads and writes anew.
    pub fn anew(self) -> Vec<usize> {
        if self == Fate::Added { vec![2] } else { vec![] }
    }

    /// For names.
    pub fn suffix(self) -> &'static str {
        if self == Fate::Added { "_more" } else { "" }
    }
}

/// What becomes of a product in its kernel.
#[derive(Clone, Copy)]
pub struct Ending<'a> {
    pub fate: Fate,
    pub epilogue: &'a Epilogue,
    /// The kernel's, and the epilogue's sizes.
    pub buffers: &'a [Buf],
    pub sizes: &'a [Val],
}

/// Rows of a tile's sums on their way out, which lie in shared memory, a warp's own.
pub struct Out<'a> {
    pub ending: Ending<'a>,
    /// Where the product goes, its batch's first element there, and from row to row.
    pub to: Buf,
    pub base: Val,
    pub line: Val,
    pub batch: Val,
    /// The tile's columns, as many as `n` leaves of them, and how many it has at most; those in the room
    /// are as many as a warp's lanes take.
    pub column: Val,
    pub n: Val,
    pub width: u64,
    pub room: Buf,
    /// What sums there are multiplied by to be the product's.
    pub back: Option<Val>,
}

impl Out<'_> {
    /// Rows of the product, each with the place in shared memory where its sums begin.
    pub fn write(&self, k: &mut Kernel, rows: &[(Val, Val)]) {
        let columns = (self.column, k.min(self.column + self.width, self.n));
        let lines: Vec<Val> = rows.iter().map(|&(row, _)| k.eval(self.base + row * self.line)).collect();
        let lanes = rows.iter().zip(&lines).map(|(&(_, at), &line)| {
            move |k: &mut Kernel, column: Val, mask: Val| {
                let sum = k.load_here(self.room, at + (column - self.column) + k.lane_index());
                let sum = self.back.map_or(sum, |back| k.mul(sum, back));
                if self.ending.fate != Fate::Added {
                    return sum;
                }
                let before = k.load_lanes(self.to, line + column, mask);
                k.add(before, sum)
            }
        });
        let lanes: Vec<_> = lanes.collect();
        let held = rows.iter().zip(&lines).zip(&lanes).map(|((&(row, _), &line), lanes)| {
            let to = (self.ending.fate != Fate::Passed).then_some((self.to, line));
            let lanes = Given { lanes, to, columns: Some(self.width.next_multiple_of(WARP)) };
            HeldRow { batch: self.batch, row, columns, lanes }
        });
        self.ending.epilogue.write_rows(k, (self.ending.buffers, self.ending.sizes), self.n, held.collect());
    }

    /// Rows 0 to `count` of some in shared memory, several at a time: `place` says for each which one of the product it
    /// is and where its sums begin, the later row of the product for the later one.
    pub fn write_all(&self, k: &mut Kernel, count: Val, place: impl Fn(&mut Kernel, Val) -> (Val, Val)) {
        let whole = k.eval(count / TOGETHER * TOGETHER);
        k.each(0, whole, TOGETHER, |k, first| {
            let rows: Vec<(Val, Val)> = (0..TOGETHER)
                .map(|n| {
                    let at = k.eval(first + n);
                    place(k, at)
                })
                .collect();
            self.write(k, &rows);
        });
        k.each(whole, count, 1, |k, at| {
            let row = place(k, at);
            self.write(k, &[row]);
        });
    }
}

/// How many rows there are from `row` on, of `most` at most.
pub fn rows_left(k: &mut Kernel, (row, m): (Val, Val), most: u64) -> Val {
    let left = k.max(m - row, 0);
    k.min(left, most)
}
