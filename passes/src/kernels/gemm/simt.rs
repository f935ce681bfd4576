//! Matrix product in f32 on a GPU's SIMT cores, with two-level tiling: a thread block computes a tile of the result
//! from tiles of A and B in shared memory, and each thread a sub-tile of it in registers.
//!
//! ```text
//! for each 16 steps of k
//!   A[64 rows, 16] and B[16, 64 columns] ─► shared memory, both as [16][64]
//!   a thread: outer products of 8 rows × 4 columns, accumulated in registers
//! sums ─► shared memory, row by row ─► result and epilogue
//! ```
//!
//! A result of at most 32 columns or rows has tiles of half that width. Where a weight's gradient has few tiles, the
//! product is split along k (split-K): several blocks share a tile's steps, and another kernel adds up their results in
//! the order of the blocks, so that results do not depend on scheduling. Other products of few columns and many steps
//! use [`super::skinny`].
//!
//! Operands are read in place by their strides; nothing is packed. Neighbouring threads load neighbouring elements, so
//! that loads are coalesced.

use peft_runtime::artifact::{Element, Extent};

use super::epilogue::{ResultMode, TileEpilogue, TileWriter, rows_left};
use super::{Buffers, Product};
use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, Index, Kernel, Order, Val};
use crate::cost::{LaunchCost, LaunchSizes, SHARED_BYTES_PER_CYCLE, fma_cycles, tile_store_cycles};
use crate::kernels::Scheduled;
use crate::kernels::epilogue::Epilogue;
use crate::target::Machine;
use crate::target::cuda::{Card, WARP, WARPS};

/// Rows or columns of a tile where the result has at most so many of them.
pub const NARROW_SIDE: u64 = 32;
/// Steps along k that one tile in shared memory holds.
const DEPTH: u64 = 16;
/// Steps along k that one iteration of the inner loop computes: their loads from shared memory overlap with
/// multiplications.
const UNROLL: u64 = 4;
/// Columns of a tile that one thread computes.
const THREAD_COLUMNS: u64 = 4;
/// Floats of padding between two steps of k in shared memory. Without it, threads that store along k would all access
/// the same bank.
const PADDING: u64 = 4;
/// Threads of a block.
const THREADS: u64 = WARP * WARPS;
/// Rows of each thread that are in shared memory at once when a tile is stored.
const ROWS_WRITTEN: u64 = 4;

/// The tile that a thread block computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Rows of the tile.
    pub rows: u64,
    /// Columns of the tile.
    pub columns: u64,
}

impl Tile {
    /// Elements of the tile.
    pub fn elements(self) -> u64 {
        self.rows * self.columns
    }

    /// Rows that one thread computes, a multiple of four.
    fn thread_rows(self) -> u64 {
        self.elements() / (THREADS * THREAD_COLUMNS)
    }

    /// Floats that pass through shared memory at each step along k: each thread reads its rows and columns, and one
    /// column of A and one row of B are stored.
    pub fn shared_floats_per_step(self) -> u64 {
        THREADS * (self.thread_rows() + THREAD_COLUMNS) + self.rows + self.columns
    }

    /// Rows of threads in a warp.
    fn thread_rows_per_warp(self) -> u64 {
        WARP * THREAD_COLUMNS / self.columns
    }

    /// Floats of shared memory that a warp needs to store its rows.
    fn warp_floats(self) -> u64 {
        self.thread_rows_per_warp() * ROWS_WRITTEN * (self.columns + PADDING)
    }
}

arguments! {
    /// Sizes of the product, in elements.
    Sizes {
        m, n, depth,
        /// The number of tiles down and across one batch of the result.
        down, across,
        batches,
        /// Steps along k of one block.
        steps,
        row_stride_a, k_stride_a, batch_stride_a, offset_a,
        row_stride_b, k_stride_b, batch_stride_b, offset_b,
        row_stride_c,
        /// From one batch of the result to the next; with split-K, from one block's share to the next.
        batch_stride_c,
        offset_c,
    }
}

/// The product on SIMT cores. A unit computes one tile; with split-K each block that shares a tile writes a result of
/// its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Simt {
    /// The tile.
    pub tile: Tile,
    /// For A and for B: whether neighbouring elements in memory are neighbouring rows of A, or columns of B; otherwise
    /// they are neighbours along k.
    pub contiguous: [bool; 2],
    /// What happens to the product itself.
    pub mode: ResultMode,
    /// The operations that follow in the same kernel.
    pub epilogue: Epilogue,
}

impl Simt {
    /// The sizes and the units of a product of which `shares` blocks share each tile (split-K).
    pub fn arguments(&self, product: &Product, shares: u64) -> (Vec<Extent>, Extent) {
        let Product { m, n, depth, batch, a, b, c } = product;
        let (down, across) = product.tiles(self.tile.rows, self.tile.columns);
        let units = Extent::Const(shares) * batch.clone() * down.clone() * across.clone() * Extent::Const(WARPS);
        let sizes = Sizes {
            m,
            n,
            depth,
            down: &down,
            across: &across,
            batches: batch,
            steps: &(Extent::CeilDiv(Box::new(depth.clone()), DEPTH * shares) * Extent::Const(DEPTH)),
            row_stride_a: &a.row_stride,
            k_stride_a: &a.k_stride,
            batch_stride_a: &a.batch_stride,
            offset_a: &a.offset,
            row_stride_b: &b.row_stride,
            k_stride_b: &b.k_stride,
            batch_stride_b: &b.batch_stride,
            offset_b: &b.offset,
            row_stride_c: &c.row_stride,
            batch_stride_c: &if shares > 1 { product.batch_elements() } else { c.batch_stride.clone() },
            offset_c: &c.offset,
        };
        (sizes.map(Extent::clone).list(), units)
    }
}

impl Scheduled for Simt {
    fn name_stem(&self) -> String {
        let [a, b] = self.contiguous;
        let side = |contiguous| if contiguous { "columns" } else { "rows" };
        let Tile { rows, columns } = self.tile;
        format!("simt_{rows}x{columns}_{}_{}{}", side(a), side(!b), self.mode.suffix())
    }

    fn emit(&self, machine: Machine) -> Code {
        let Simt { tile, contiguous, mode, epilogue } = self;
        let (tile, mode) = (*tile, *mode);
        let (thread_rows, (shared_stride_a, shared_stride_b)) =
            (tile.thread_rows(), (tile.rows + PADDING, tile.columns + PADDING));
        let own = [Element::F32; Buffers::<Val>::COUNT];
        epilogue.define(machine, &own, Sizes::<Val>::COUNT, |k, buffers, sizes, follows| {
            let Buffers { a, b, c } = Buffers::of(buffers);
            let sizes = Sizes::of(sizes);
            let Sizes { m, n, depth, down, across, batches, steps, .. } = sizes;
            let Sizes { row_stride_c, batch_stride_c, offset_c, .. } = sizes;
            let left = [sizes.row_stride_a, sizes.k_stride_a, sizes.batch_stride_a, sizes.offset_a];
            let right = [sizes.row_stride_b, sizes.k_stride_b, sizes.batch_stride_b, sizes.offset_b];
            let shared_a = k.shared((DEPTH * (shared_stride_a + shared_stride_b)).max(WARPS * tile.warp_floats()));
            let shared_b = k.subbuffer(shared_a, DEPTH * shared_stride_a);
            let thread = k.thread();
            let threads_across = tile.columns / THREAD_COLUMNS;
            let (column, row) = (k.eval(thread % threads_across), k.eval(thread / threads_across));
            let (column, row) = (k.eval(column * THREAD_COLUMNS), k.eval(row * thread_rows));
            k.block_units(|k, unit| {
                let (rest, tile_column) = (k.div(unit, across), k.rem(unit, across));
                let (lead, tile_row) = (k.div(rest, down), k.rem(rest, down));
                let (share, batch) = (k.div(lead, batches), k.rem(lead, batches));
                let begin = k.eval(share * steps);
                let depth = k.min(begin + steps, depth);
                let (first_row, first_column) = (k.eval(tile_row * tile.rows), k.eval(tile_column * tile.columns));
                let left = TileFetch::of(k, a, left, batch, (first_row, m), tile.rows, contiguous[0]);
                let right = TileFetch::of(k, b, right, batch, (first_column, n), tile.columns, contiguous[1]);
                let zero_f32 = k.float(0.0, F32);
                let base = k.eval(offset_c + lead * batch_stride_c);
                let out = TileWriter {
                    tile_epilogue: TileEpilogue { mode, epilogue, buffers, sizes: follows },
                    result: c,
                    offset: base,
                    row_stride: row_stride_c,
                    batch,
                    column: first_column,
                    n,
                    width: tile.columns,
                    shared: shared_a,
                    unscale: None,
                };
                let fetch = |k: &mut Kernel, block: Val| {
                    let end = k.eval(depth - block);
                    [&left, &right].map(|side| side.fetch(k, block, end))
                };
                let fetched = fetch(k, begin);
                let (count, first_b) = ((thread_rows * THREAD_COLUMNS) as usize, fetched[0].len());
                let carried = [vec![zero_f32; count], fetched.concat()].concat();
                let carried = k.fold(begin, depth, DEPTH, &carried, |k, block, carried| {
                    let (sums, fetched) = carried.split_at(count);
                    let (x, y) = fetched.split_at(first_b);
                    // All threads are done with the previous steps in shared memory.
                    k.barrier();
                    left.store_shared(k, shared_a, x);
                    right.store_shared(k, shared_b, y);
                    k.barrier();
                    // The next tiles are loaded while these are multiplied.
                    let next = k.eval(block + DEPTH);
                    let fetched = fetch(k, next);
                    let sums = k.fold(0, DEPTH, UNROLL, sums, |k, step, sums| {
                        (0..UNROLL).fold(sums.to_vec(), |sums, ahead| {
                            let step = k.eval(step + ahead);
                            let (at_a, at_b) = (k.eval(step * shared_stride_a), k.eval(step * shared_stride_b));
                            let (at_a, at_b) = (k.eval(at_a + row), k.eval(at_b + column));
                            let vec4 =
                                (0..thread_rows).step_by(4).flat_map(|ahead| k.load_vec4(shared_a, at_a + ahead));
                            let x: Vec<Val> = vec4.collect();
                            let y = k.load_vec4(shared_b, at_b);
                            let pairs = x.iter().flat_map(|&x| y.map(|y| (x, y)));
                            pairs.zip(sums).map(|((x, y), sum)| k.fma(x, y, sum)).collect()
                        })
                    });
                    [sums, fetched.concat()].concat()
                });
                let sums = &carried[..count];
                k.barrier();
                let warp = k.eval(thread / WARP);
                let own = k.eval(warp * tile.warp_floats());
                // The row of threads within the warp.
                let below = k.eval(k.lane_index() / threads_across);
                let place = k.eval(own + below * ROWS_WRITTEN * shared_stride_b + column);
                let first_row = k.eval(first_row + warp * (tile.thread_rows_per_warp() * thread_rows));
                for part in (0..thread_rows).step_by(ROWS_WRITTEN as usize) {
                    for (i, &sum) in sums[(part * THREAD_COLUMNS) as usize..]
                        [..(ROWS_WRITTEN * THREAD_COLUMNS) as usize]
                        .iter()
                        .enumerate()
                    {
                        let (r, c) = (i as u64 / THREAD_COLUMNS, i as u64 % THREAD_COLUMNS);
                        k.store_scalar(sum, shared_a, place + (r * shared_stride_b + c));
                    }
                    k.sync_lanes();
                    // The first of the rows that a row of threads computes.
                    let first_of = |below: Index| first_row + (below * thread_rows + part);
                    let zero = k.index(0);
                    let count = (0..tile.thread_rows_per_warp()).fold(zero, |count, below| {
                        let first = k.eval(first_of(below.into()));
                        let left = rows_left(k, (first, m), ROWS_WRITTEN);
                        k.eval(count + left)
                    });
                    out.write_all(k, count, |k, r| {
                        let (below, rest) = (k.eval(r / ROWS_WRITTEN), k.eval(r % ROWS_WRITTEN));
                        let first = k.eval(first_of(below.into()));
                        let at = k.eval(r * shared_stride_b);
                        (k.eval(first + rest), k.eval(own + at))
                    });
                    k.sync_lanes();
                }
            });
        })
    }

    fn cost(&self, launched: LaunchSizes, card: &Card) -> LaunchCost {
        let LaunchSizes { sizes, units, .. } = launched;
        let Simt { tile, epilogue, .. } = self;
        let Sizes { m, n, depth, batches, steps, .. } = Sizes::of(sizes).map(|n| n as f64);
        let blocks = units.div_ceil(WARPS);
        let step = fma_cycles(tile.elements() as f64, card, card.flops);
        let out = tile_store_cycles(epilogue.sum.is_some(), tile.rows, tile.columns);
        let cycles =
            steps.min(depth) * step.max((tile.shared_floats_per_step() * 4) as f64 / SHARED_BYTES_PER_CYCLE) + out;
        let flops = 2.0 * m * n * depth * batches;
        let max_read_bytes = [m, n].map(|side| 4.0 * side * depth * batches).into();
        let l2_bytes = blocks as f64 * steps.min(depth) * ((tile.rows + tile.columns) * 4) as f64;
        let blocks = vec![(blocks, cycles)];
        LaunchCost { flops, blocks, max_read_bytes, bytes_in_flight: f64::INFINITY, l2_bytes, ..LaunchCost::default() }
    }

    fn read_write(&self) -> Vec<usize> {
        self.mode.read_write()
    }
}

/// A tile's rows of A, or columns of B, and the elements that one thread loads of it.
struct TileFetch {
    buffer: Buf,
    /// The index of the tile's first element, and the strides to the next row (or column) and along k.
    base: Val,
    row_stride: Val,
    k_stride: Val,
    /// The number of rows (or columns) that exist from the tile's first on, and the tile's own number.
    count: Val,
    side: u64,
    /// The thread's first element: its row (or column) in the tile, and its step along k.
    i: Val,
    step: Val,
    /// The distance between the thread's elements: in rows (or columns), and in steps along k.
    next: (u64, u64),
}

impl TileFetch {
    fn of(
        k: &mut Kernel,
        buffer: Buf,
        lie: [Val; 4],
        batch: Val,
        (start, end): (Val, Val),
        side: u64,
        contiguous: bool,
    ) -> TileFetch {
        let [row_stride, k_stride, batch_stride, offset] = lie;
        let area = k.eval(batch * batch_stride);
        let base = k.eval(start * row_stride + area + offset);
        let width = if contiguous { side } else { DEPTH };
        let thread = k.thread();
        let (fast, slow) = (k.eval(thread % width), k.eval(thread / width));
        let ((i, step), next) = match contiguous {
            true => ((fast, slow), (0, THREADS / width)),
            false => ((slow, fast), (THREADS / width, 0)),
        };
        TileFetch { buffer, base, row_stride, k_stride, count: k.eval(end - start), side, i, step, next }
    }

    /// The row (or column) and the step along k of the thread's `n`th element.
    fn place(&self, k: &mut Kernel, n: u64) -> (Val, Val) {
        (k.eval(self.i + n * self.next.0), k.eval(self.step + n * self.next.1))
    }

    /// Loads the thread's elements for the steps from `block` on, of which `end` exist; elements that do not exist are
    /// 0.
    fn fetch(&self, k: &mut Kernel, block: Val, end: Val) -> Vec<Val> {
        let zero_f32 = k.float(0.0, F32);
        let start = k.eval(self.base + block * self.k_stride);
        let element = |n| {
            let (i, step) = self.place(k, n);
            let (there, here) = (k.compare(i, Order::Lt, self.count), k.compare(step, Order::Lt, end));
            let exists = k.and(there, here);
            k.load_if(exists, self.buffer, start + (i * self.row_stride + step * self.k_stride), zero_f32)
        };
        (0..self.side * DEPTH / THREADS).map(element).collect()
    }

    fn store_shared(&self, k: &mut Kernel, to: Buf, elements: &[Val]) {
        for (n, &x) in elements.iter().enumerate() {
            let (i, step) = self.place(k, n as u64);
            k.store_scalar(x, to, step * (self.side + PADDING) + i);
        }
    }
}
