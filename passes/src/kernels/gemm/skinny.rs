//! Matrix product in f32 of few columns and many steps along k (a skinny gemm), on a GPU. The lanes of a warp divide
//! the steps along k, so that a few tiles keep the chip busy.
//!
//! ```text
//! for each 32 steps of k
//!   B[32, columns] ─► the next stage of shared memory
//!   a lane: its one step of 5 rows of A × all columns, added to sums in registers
//! the lanes' sums ─► shared memory, added up row by row ─► result and epilogue
//! ```
//!
//! Each element of A is multiplied in one lane only, so it is loaded from memory straight into that lane's registers,
//! some rounds ahead; neighbouring lanes load neighbouring elements. B is in shared memory for all warps of the block,
//! each of which has its own rows.

use peft_runtime::artifact::{Element, Extent};

use super::epilogue::{ResultMode, TileEpilogue, TileWriter};
use super::{Buffers, Product};
use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, Index, Kernel, Order, Val, first};
use crate::cost::{LaunchCost, LaunchSizes, SHARED_BYTES_PER_CYCLE, fma_cycles};
use crate::kernels::Scheduled;
use crate::kernels::epilogue::Epilogue;
use crate::target::Machine;
use crate::target::cuda::Card;
use crate::target::cuda::{WARP, WARPS};

/// Rows of the result that a warp computes.
const ROWS_PER_WARP: u64 = 5;
/// Rows of a tile.
pub const ROWS: u64 = ROWS_PER_WARP * WARPS;
/// The greatest number of columns of a tile: each lane keeps the sums of all of them in registers.
const MAX_TILE_COLUMNS: u64 = 24;
/// The greatest number of columns of a product. Every tile across reads its rows of A again, so wide products are left
/// to [`super::simt`].
pub const MAX_COLUMNS: u64 = 160;
/// Stages of B in shared memory, and the rounds that a lane's loads of A are in flight.
const STAGES: u64 = 3;
/// Threads of a block.
const THREADS: u64 = WARP * WARPS;

/// The tile that a thread block computes: [`ROWS`] × `columns`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Columns of the tile, a multiple of four.
    pub columns: u64,
}

impl Tile {
    /// The tile of a product of `n` columns, which are divided evenly.
    pub fn of(n: u64) -> Tile {
        Tile { columns: n.div_ceil(n.div_ceil(MAX_TILE_COLUMNS)).next_multiple_of(4) }
    }

    /// Elements of the tile.
    pub fn elements(self) -> u64 {
        ROWS * self.columns
    }

    /// Floats that pass through shared memory at each step along k: each warp reads the columns once they are stored.
    /// A's elements count as well, because they pass through the same unit.
    pub fn shared_floats_per_step(self) -> u64 {
        (WARPS + 1) * self.columns + ROWS
    }

    /// Floats that pass through shared memory when the lanes' sums are added up: each lane's sums and the result are
    /// both written and read.
    pub fn reduction_floats(self) -> u64 {
        2 * (WARP + 1) * self.elements()
    }

    /// Bytes of A that a warp has in flight. B's are few and come from the cache.
    pub fn warp_bytes_in_flight() -> u64 {
        4 * ROWS_PER_WARP * WARP * STAGES
    }

    /// Steps along k that a product of `depth` takes: whole iterations of the loop.
    pub fn padded_depth(depth: u64) -> u64 {
        depth.next_multiple_of(WARP * STAGES)
    }

    /// Columns that the threads load, a multiple of 16.
    fn fetched_columns(self) -> u64 {
        self.columns.next_multiple_of(16)
    }

    /// The stride from step to step in shared memory, in floats: an odd multiple of four, so that lanes that each read
    /// 16 bytes of their own step use different banks.
    fn shared_stride(self) -> u64 {
        self.fetched_columns() + 4
    }

    /// Floats of shared memory in which a warp adds up a row: one row of sums for each lane, and the results behind
    /// them.
    fn warp_floats(self) -> u64 {
        WARP * self.shared_stride() + ROWS_PER_WARP * WARP
    }
}

arguments! {
    /// Sizes of the product, in elements.
    Sizes {
        m, n, depth,
        /// The number of tiles across the result.
        across,
        row_stride_a, k_stride_a, offset_a,
        row_stride_b, k_stride_b, offset_b,
        row_stride_c, offset_c,
    }
}

/// The skinny product. A unit computes one tile of the result.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Skinny {
    /// The tile.
    pub tile: Tile,
    /// Whether neighbouring elements of B in memory are neighbouring columns.
    pub contiguous: bool,
    /// What happens to the product itself.
    pub mode: ResultMode,
    /// The operations that follow in the same kernel.
    pub epilogue: Epilogue,
}

impl Skinny {
    /// The sizes and the units of a product.
    pub fn arguments(&self, product: &Product) -> (Vec<Extent>, Extent) {
        let Product { m, n, depth, a, b, c, .. } = product;
        let (down, across) = product.tiles(ROWS, self.tile.columns);
        let sizes = Sizes {
            m,
            n,
            depth,
            across: &across,
            row_stride_a: &a.row_stride,
            k_stride_a: &a.k_stride,
            offset_a: &a.offset,
            row_stride_b: &b.row_stride,
            k_stride_b: &b.k_stride,
            offset_b: &b.offset,
            row_stride_c: &c.row_stride,
            offset_c: &c.offset,
        };
        (sizes.map(Extent::clone).list(), down * across.clone() * Extent::Const(WARPS))
    }
}

impl Scheduled for Skinny {
    fn name_stem(&self) -> String {
        let side = if self.contiguous { "rows" } else { "columns" };
        format!("skinny_{ROWS}x{}_{side}{}", self.tile.columns, self.mode.suffix())
    }

    fn emit(&self, machine: Machine) -> Code {
        let Skinny { tile, contiguous, mode, epilogue } = self;
        let (tile, contiguous, mode) = (*tile, *contiguous, *mode);
        let (columns, stride) = (tile.columns, tile.shared_stride());
        let own = [Element::F32; Buffers::<Val>::COUNT];
        epilogue.define(machine, &own, Sizes::<Val>::COUNT, |k, buffers, sizes, follows| {
            let Buffers { a, b, c } = Buffers::of(buffers);
            let sizes = Sizes::of(sizes);
            let Sizes { m, n, depth, across, row_stride_c, offset_c, .. } = sizes;
            let stage = WARP * stride;
            let shared = k.shared((STAGES * stage).max(WARPS * tile.warp_floats()));
            let stages: Vec<Buf> = (0..STAGES).map(|at| k.subbuffer(shared, at * stage)).collect();
            let thread = k.thread();
            let (warp, lane) = (k.eval(thread / WARP), k.lane_index());
            // The lane's step in a stage.
            let here = k.eval(lane * stride);
            k.block_units(|k, unit| {
                let (tile_row, tile_column) = (k.div(unit, across), k.rem(unit, across));
                let (row, before, column) =
                    (k.eval(tile_row * ROWS), k.eval(warp * ROWS_PER_WARP), k.eval(tile_column * columns));
                let row = k.eval(row + before);
                let left =
                    LaneFetch::rows(k, a, [sizes.row_stride_a, sizes.k_stride_a, sizes.offset_a], (row, m), depth);
                let (right, slot) = LaneFetch::columns(
                    k,
                    b,
                    [sizes.row_stride_b, sizes.k_stride_b, sizes.offset_b],
                    (column, n),
                    depth,
                    (tile, contiguous),
                );
                let mut start = vec![k.float(0.0, F32); (ROWS_PER_WARP * columns) as usize];
                for ahead in 0..STAGES {
                    start.extend(left.fetch(k, ahead * WARP));
                }
                let fetched = right.fetch(k, 0);
                // The previous unit still stores its sums through the same shared memory.
                k.barrier();
                slot.store_shared(k, stages[0], &fetched);
                let sums = k.fold(0, depth, WARP * STAGES, &start, |k, block, carried| {
                    let (sums, numbers) = carried.split_at((ROWS_PER_WARP * columns) as usize);
                    let (mut sums, mut next) = (sums.to_vec(), vec![]);
                    for (ahead, x) in (0..STAGES).zip(numbers.chunks_exact(ROWS_PER_WARP as usize)) {
                        let now = k.eval(block + ahead * WARP);
                        let fetched = right.fetch(k, now + WARP);
                        // After the barrier this stage is filled, and all warps are done with the next stage.
                        k.barrier();
                        sums = multiply(k, x, (stages[ahead as usize], here), &sums);
                        next.extend(left.fetch(k, now + STAGES * WARP));
                        slot.store_shared(k, stages[((ahead + 1) % STAGES) as usize], &fetched);
                    }
                    [sums, next].concat()
                });
                k.barrier();
                let own = k.eval(warp * tile.warp_floats());
                let results = reduce_lanes(k, tile, (shared, own), &sums[..(ROWS_PER_WARP * columns) as usize]);
                let out = TileWriter {
                    tile_epilogue: TileEpilogue { mode, epilogue, buffers, sizes: follows },
                    result: c,
                    offset: offset_c,
                    row_stride: row_stride_c,
                    batch: k.index(0),
                    column,
                    n,
                    width: columns,
                    shared,
                    unscale: None,
                };
                let left = k.eval(m - row);
                let some = k.compare(row, Order::Lt, m);
                let left = k.select(some, left, 0);
                let rows = k.min(left, ROWS_PER_WARP);
                out.write_all(k, rows, |k, r| {
                    let at = k.eval(r * WARP);
                    (k.eval(row + r), k.eval(results + at))
                });
            });
        })
    }

    fn cost(&self, launched: LaunchSizes, card: &Card) -> LaunchCost {
        let LaunchSizes { sizes, units, .. } = launched;
        let tile = self.tile;
        let steps = Tile::padded_depth(Sizes::of(sizes).depth);
        let Sizes { m, n, depth, .. } = Sizes::of(sizes).map(|n| n as f64);
        let step = fma_cycles(tile.elements() as f64, card, card.flops);
        let shared = |floats: u64| (floats * 4) as f64 / SHARED_BYTES_PER_CYCLE;
        let cycles = steps as f64 * step.max(shared(tile.shared_floats_per_step())) + shared(tile.reduction_floats());
        let max_read_bytes = vec![4.0 * m * depth, 4.0 * n * depth];
        let bytes_in_flight = (units * Tile::warp_bytes_in_flight()) as f64;
        let (flops, blocks) = (2.0 * m * n * depth, vec![(units.div_ceil(WARPS), cycles)]);
        LaunchCost { flops, blocks, max_read_bytes, bytes_in_flight, ..LaunchCost::default() }
    }

    fn read_write(&self) -> Vec<usize> {
        self.mode.read_write()
    }
}

/// The elements that a thread loads of an operand in each round: for each of its steps, the distance from the round's
/// first step, and the offsets of the rows of A or columns of B.
struct LaneFetch {
    buffer: Buf,
    fetched: Vec<(Val, Vec<Val>)>,
    k_stride: Val,
    depth: Val,
}

impl LaneFetch {
    /// The warp's rows of A, of which each lane loads one step.
    fn rows(k: &mut Kernel, buffer: Buf, side: [Val; 3], (row, m): (Val, Val), depth: Val) -> LaneFetch {
        let rows = (0..ROWS_PER_WARP).map(|r| LaneFetch::row_offset(k, side, (row, m), r)).collect();
        LaneFetch { buffer, fetched: vec![(k.lane_index(), rows)], k_stride: side[1], depth }
    }

    /// The block's columns of B, and the place of the loaded elements in a stage. Neighbouring threads load
    /// neighbouring columns if B is `contiguous`, else neighbouring steps.
    fn columns(
        k: &mut Kernel,
        buffer: Buf,
        side: [Val; 3],
        (column, n): (Val, Val),
        depth: Val,
        (tile, contiguous): (Tile, bool),
    ) -> (LaneFetch, StageSlot) {
        let (thread, fetched_columns) = (k.thread(), tile.fetched_columns());
        let (fetched, step, own, next) = if contiguous {
            let at_once = THREADS / fetched_columns;
            let (step, own) = (k.eval(thread / fetched_columns), k.eval(thread % fetched_columns));
            let column = k.eval(column + own);
            let begin = LaneFetch::row_offset(k, side, (column, n), 0);
            let steps = (0..WARP).step_by(at_once as usize).map(|ahead| (k.eval(step + ahead), vec![begin]));
            (steps.collect(), step, own, at_once * tile.shared_stride())
        } else {
            let own = k.eval(thread / WARP * 4);
            let column = k.eval(column + own);
            let vec4 = (0..fetched_columns).step_by((4 * WARPS) as usize).flat_map(|more| more..more + 4);
            let offsets = vec4.map(|more| LaneFetch::row_offset(k, side, (column, n), more)).collect();
            (vec![(k.lane_index(), offsets)], k.lane_index(), own, 4 * WARPS)
        };
        let slot = StageSlot { at: k.eval(step * tile.shared_stride() + own), next, vec4: !contiguous };
        (LaneFetch { buffer, fetched, k_stride: side[1], depth }, slot)
    }

    /// The offset of row (or column) `i + more`. Rows beyond `end` take the offset of the last one, because their
    /// results are not stored.
    fn row_offset(k: &mut Kernel, side: [Val; 3], (i, end): (Val, Val), more: u64) -> Val {
        let [row_stride, _, first] = side;
        let (i, last) = (k.eval(i + more), k.eval(end - 1));
        let i = k.min(i, last);
        k.eval(first + i * row_stride)
    }

    /// Loads the elements of the round that begins at step `begin`; those of steps that do not exist are 0. The loads
    /// do not branch: with branches, LLVM would delay the sums from round to round.
    fn fetch(&self, k: &mut Kernel, begin: impl Into<Index>) -> Vec<Val> {
        let begin = k.eval(begin);
        let zero_f32 = k.float(0.0, F32);
        let last = k.eval(self.depth - 1);
        let mut numbers = vec![];
        for (ahead, offsets) in &self.fetched {
            let step = k.eval(begin + *ahead);
            let there = k.compare(step, Order::Lt, self.depth);
            let step = k.min(step, last);
            let k_offset = k.eval(step * self.k_stride);
            for &offset in offsets {
                let number = k.load_scalar(self.buffer, offset + k_offset);
                numbers.push(k.select(there, number, zero_f32));
            }
        }
        numbers
    }
}

/// The place of a thread's elements of B in a stage: the index of the first, and the distance to the next element, or
/// to the next group of four.
struct StageSlot {
    at: Val,
    next: u64,
    vec4: bool,
}

impl StageSlot {
    fn store_shared(&self, k: &mut Kernel, to: Buf, fetched: &[Val]) {
        for (n, numbers) in fetched.chunks(if self.vec4 { 4 } else { 1 }).enumerate() {
            let at = k.eval(self.at + n as u64 * self.next);
            match *numbers {
                [x, y, z, w] => k.store_vec4([x, y, z, w], to, at),
                _ => k.store_scalar(numbers[0], to, at),
            }
        }
    }
}

/// Adds one step's products to a lane's sums, which are ordered by groups of four columns, then by rows.
fn multiply(k: &mut Kernel, x: &[Val], (stage, step): (Buf, Val), sums: &[Val]) -> Vec<Val> {
    let mut next = vec![];
    for (four, sums) in (0..).step_by(4).zip(sums.chunks_exact(4 * x.len())) {
        let y = k.load_vec4(stage, step + four);
        let pairs = x.iter().flat_map(|&x| y.map(|y| (x, y)));
        next.extend(pairs.zip(sums).map(|((x, y), &sum)| k.fma(x, y, sum)));
    }
    next
}

/// Adds up the sums of all lanes. Returns the shared-memory index of the warp's first row; rows are a warp's width
/// apart.
fn reduce_lanes(k: &mut Kernel, tile: Tile, (shared, own): (Buf, Val), sums: &[Val]) -> Val {
    let (lane, stride) = (k.lane_index(), tile.shared_stride());
    let place = k.eval(own + lane * stride);
    // Lanes without a column repeat the last column.
    let column = k.min(lane, tile.columns - 1);
    let column = k.eval(own + column);
    let results = k.eval(own + WARP * stride);
    for r in 0..ROWS_PER_WARP {
        for (four, sums) in (0..).step_by(4).zip(sums.chunks_exact((4 * ROWS_PER_WARP) as usize)) {
            k.store_vec4(first(&sums[(4 * r) as usize..]), shared, place + four);
        }
        k.sync_lanes();
        let zero_f32 = k.float(0.0, F32);
        // Four independent sums hide the latency of the additions.
        let [x, y, z, w] = {
            let sums = k.fold(0, WARP, 4, &[zero_f32; 4], |k, lane, sums| {
                let begin = k.eval(column + lane * stride);
                let add = |(i, &sum): (u64, &Val)| {
                    let x = k.load_scalar(shared, begin + i * stride);
                    k.add(sum, x)
                };
                (0..).zip(sums).map(add).collect()
            });
            first(&sums)
        };
        let (x, y) = (k.add(x, y), k.add(z, w));
        let sum = k.add(x, y);
        k.store_scalar(sum, shared, results + r * WARP + lane);
        k.sync_lanes();
    }
    results
}
