//! The store of a GPU's result tile: rows of sums are read from shared memory, written to the result, and handed to the
//! product's epilogue in registers.

use crate::builder::{Buf, Kernel, Val};
use crate::kernels::elementwise::RegisterInput;
use crate::kernels::epilogue::{Epilogue, RowInRegisters};
use crate::target::cuda::WARP;

/// Rows that a warp writes at once. Their loads for the epilogue are in flight together.
const ROWS_WRITTEN_AT_ONCE: u64 = 4;

/// What a product's kernel does with the product itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResultMode {
    /// It overwrites the result.
    Overwrite,
    /// It adds the product to the values that the result already holds.
    Accumulate,
    /// It does not store the product; only the epilogue reads it, in registers.
    EpilogueOnly,
}

impl ResultMode {
    /// The indices of the product's [`Buffers`](super::Buffers) that are read and then overwritten.
    pub fn read_write(self) -> Vec<usize> {
        if self == ResultMode::Accumulate { vec![2] } else { vec![] }
    }

    /// The suffix of a kernel's name.
    pub fn suffix(self) -> &'static str {
        if self == ResultMode::Accumulate { "_accumulate" } else { "" }
    }
}

/// What happens to a finished tile: the result's mode, and the epilogue with its arguments.
#[derive(Clone, Copy)]
pub struct TileEpilogue<'a> {
    /// What happens to the product itself.
    pub mode: ResultMode,
    /// The operations that follow in the same kernel.
    pub epilogue: &'a Epilogue,
    /// All of the kernel's buffers.
    pub buffers: &'a [Buf],
    /// The sizes of the epilogue.
    pub sizes: &'a [Val],
}

/// Writes rows of a tile whose sums are in shared memory, in a part that belongs to one warp.
pub struct TileWriter<'a> {
    /// What happens to the rows.
    pub tile_epilogue: TileEpilogue<'a>,
    /// The buffer of the result.
    pub result: Buf,
    /// The index of the batch's first element there.
    pub offset: Val,
    /// The row stride of the result, in elements.
    pub row_stride: Val,
    /// The index of the batch.
    pub batch: Val,
    /// The tile's first column.
    pub column: Val,
    /// The number of columns of the result; the tile's last columns may lie beyond it.
    pub n: Val,
    /// The number of columns of a tile. Rows in shared memory are padded to a multiple of a warp's lanes.
    pub width: u64,
    /// The shared memory.
    pub shared: Buf,
    /// The factor that turns the stored sums into those of the product, if they are scaled.
    pub unscale: Option<Val>,
}

impl TileWriter<'_> {
    /// Writes rows, each given by its index in the product and the place of its sums in shared memory.
    pub fn write(&self, k: &mut Kernel, rows: &[(Val, Val)]) {
        let columns = (self.column, k.min(self.column + self.width, self.n));
        let row_starts: Vec<Val> = rows.iter().map(|&(row, _)| k.eval(self.offset + row * self.row_stride)).collect();
        let lanes = rows.iter().zip(&row_starts).map(|(&(_, at), &row_start)| {
            move |k: &mut Kernel, column: Val, mask: Val| {
                let sum = k.load_scalar(self.shared, at + (column - self.column) + k.lane_index());
                let sum = self.unscale.map_or(sum, |back| k.mul(sum, back));
                if self.tile_epilogue.mode != ResultMode::Accumulate {
                    return sum;
                }
                let before = k.load_lanes(self.result, row_start + column, mask);
                k.add(before, sum)
            }
        });
        let lanes: Vec<_> = lanes.collect();
        let rows_in_registers = rows.iter().zip(&row_starts).zip(&lanes).map(|((&(row, _), &row_start), lanes)| {
            let to = (self.tile_epilogue.mode != ResultMode::EpilogueOnly).then_some((self.result, row_start));
            let lanes = RegisterInput { lanes, to, columns: Some(self.width.next_multiple_of(WARP)) };
            RowInRegisters { batch: self.batch, row, columns, lanes }
        });
        self.tile_epilogue.epilogue.write_rows(
            k,
            (self.tile_epilogue.buffers, self.tile_epilogue.sizes),
            self.n,
            rows_in_registers.collect(),
        );
    }

    /// Writes rows 0 to `count`, several at a time. `place` maps each of them to its index in the
    /// product and the place of its sums in shared memory, and is increasing in the index.
    pub fn write_all(&self, k: &mut Kernel, count: Val, place: impl Fn(&mut Kernel, Val) -> (Val, Val)) {
        let whole = k.eval(count / ROWS_WRITTEN_AT_ONCE * ROWS_WRITTEN_AT_ONCE);
        k.each(0, whole, ROWS_WRITTEN_AT_ONCE, |k, first| {
            let rows: Vec<(Val, Val)> = (0..ROWS_WRITTEN_AT_ONCE)
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

/// The number of rows that exist from `row` on, at most `most`.
pub fn rows_left(k: &mut Kernel, (row, m): (Val, Val), most: u64) -> Val {
    let left = k.max(m - row, 0);
    k.min(left, most)
}
