//! Fused attention on a GPU, after FlashAttention (Dao et al. 2022) with the online softmax of Milakov & Gimelshein
//! (2018): the score matrix is never materialised. A thread block owns 64 rows of queries or of keys and iterates over
//! tiles of 64 rows of the other side. Each of its warps computes a quarter of the 64 × 64 tile of scores, 32 × 32, and
//! skips a quarter without any (query, key) pair.
//!
//! ```text
//! forward    queries · keysᵀ                   ─► weights ─► · values        owns rows of queries
//! dq         queries · keysᵀ, df · valuesᵀ     ─► ds      ─► · keys          owns rows of queries
//! dk, dv     keys · queriesᵀ, values · dfᵀ     ─► ds, w   ─► · queries, df   owns rows of keys
//! ```
//!
//! Operands are read in place and stored in shared memory row by row, as they are; a product with a transposed operand
//! reads down its columns, each thread from banks of its own. The weights pass through shared memory from the first
//! product to the second. Each thread keeps the running maximum of its rows' scores, and the running sum of their
//! exponentials, in registers.
//!
//! The keys' side is indexed by slots, as in [`super::cpu`]: key j is in slot `phase + j`.

use std::ops::Range;

use peft_runtime::artifact::Element;

use super::shape::{AttentionParams, AttentionResult, Head, HeadLayout, HeadSizes, RowPointer, Segment};
use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, I32, Index, Kernel, Order, Val, define};
use crate::cost::{BATCHED_WARP_BYTES_IN_FLIGHT, LaunchCost, LaunchSizes, SHARED_BYTES_PER_CYCLE, fma_cycles};
use crate::kernels::Scheduled;
use crate::kernels::{math, philox};
use crate::target::Machine;
use crate::target::cuda::Card;
use crate::target::cuda::{WARP, WARPS};

/// Instructions that turn a score into a weight by an exponential; the cost model counts them as multiply-adds.
const EXPONENTIAL: f64 = 30.0;
/// Instructions that draw and apply the dropout of a weight, counted in the same way.
const DRAW: f64 = 30.0;

arguments! {
    /// The kernel's last sizes.
    BlockSizes {
        /// The greatest number of blocks of one head.
        blocks,
        /// The number of panels of a result's columns.
        panels,
    }
}
arguments! {
    /// The size in front of them if there are blocks of two kinds.
    KindSizes {
        /// The number of blocks of either kind.
        each
    }
}

/// The fused attention kernel. A unit is a block's rows of one head, and one panel of the results' columns. The last
/// buffer holds the offsets of the sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GpuAttention {
    /// What it computes.
    pub computes: AttentionResult,
    /// Its parameters.
    pub params: AttentionParams,
}

impl Scheduled for GpuAttention {
    fn name_stem(&self) -> String {
        self.computes.name_stem() + &self.params.suffix()
    }

    fn emit(&self, machine: Machine) -> Code {
        let GpuAttention { computes, params } = *self;
        let elements = [computes.elements(params), vec![Element::I32]].concat();
        let kinds = if computes == AttentionResult::AllAdjoints { KindSizes::<Val>::COUNT } else { 0 };
        let count = computes.sizes() + kinds + BlockSizes::<Val>::COUNT;
        define(machine, &elements, count, |k, buffers, sizes| {
            let shared = SharedTiles::of(k, computes);
            if computes != AttentionResult::AllAdjoints {
                k.block_units(|k, unit| {
                    let unit = Unit::of(k, unit, shared, (buffers, sizes), (computes, params));
                    if computes.forward() { forward(k, &unit) } else { adjoint(k, &unit) }
                });
                return;
            }
            let (rest, BlockSizes { blocks, panels }) = BlockSizes::split_last(sizes);
            let (own, KindSizes { each }) = KindSizes::split_last(rest);
            let (inputs, outs) = buffers.split_at(buffers.len() - computes.results() - 1);
            let (before, layouts) = own.split_at(own.len() - computes.results() * HeadLayout::<Val>::COUNT);
            let side = |k: &mut Kernel, unit: Val, computes: AttentionResult, results: Range<usize>| {
                let buffers = [inputs, &outs[results.clone()], &outs[3..]].concat();
                let layouts =
                    &layouts[HeadLayout::<Val>::COUNT * results.start..HeadLayout::<Val>::COUNT * results.end];
                let sizes = [before, layouts, &BlockSizes { blocks, panels }.list()].concat();
                let unit = Unit::of(k, unit, shared, (&buffers, &sizes), (computes, params));
                adjoint(k, &unit);
            };
            // Blocks that own keys take longer, so they are launched first.
            let keys = |k: &mut Kernel, unit: Val| side(k, unit, AttentionResult::KeyAndValueAdjoints, 1..3);
            k.block_units_of_two_kinds(each, keys, |k, unit| side(k, unit, AttentionResult::Adjoint(0), 0..1));
        })
    }

    fn cost(&self, launched: LaunchSizes, card: &Card) -> LaunchCost {
        let GpuAttention { computes, params } = self;
        let LaunchSizes { buffers, sizes, units, batch } = launched;
        let HeadSizes { width, value_width, count: sequences, .. } = HeadSizes::of(sizes).map(|n| n as f64);
        let (_, last) = BlockSizes::split_last(sizes);
        let BlockSizes { blocks: blocks_each, panels } = last.map(|n| n as f64);
        // `asked` counts the multiply-adds that the operation asks for, for each (query, key) pair. For each kind of
        // block, `kinds` holds the depths of the products that compute the weights and the widths of the products with
        // the weights. `results` holds the widths of the results.
        let queries = (vec![width, value_width], vec![width]);
        let keys = (vec![width, value_width], vec![width, value_width]);
        let (asked, kinds, results) = match computes {
            AttentionResult::AllAdjoints => {
                (2.0 * (width + value_width), vec![keys, queries], vec![width, width, value_width])
            }
            AttentionResult::KeyAndValueAdjoints => (width + value_width, vec![keys], vec![width, value_width]),
            AttentionResult::Adjoint(0) => (width + value_width, vec![queries], vec![width]),
            AttentionResult::Adjoint(1) => (width, vec![queries], vec![width]),
            AttentionResult::Adjoint(_) => (value_width, vec![(vec![width], vec![value_width])], vec![value_width]),
            AttentionResult::Lse => (0.0, vec![(vec![width], vec![])], vec![1.0]),
            AttentionResult::ForwardAndLse => {
                (width + value_width, vec![(vec![width], vec![value_width])], vec![value_width, 1.0])
            }
            AttentionResult::Forward => {
                (width + value_width, vec![(vec![width], vec![value_width])], vec![value_width])
            }
        };
        let blocks = units.div_ceil(WARPS) / kinds.len() as u64;
        let heads = blocks as f64 / blocks_each / panels;
        // For each sequence, the number of tiles, and of parts of tiles that warps compute.
        let [tiles, parts] = [TILE, WARP_TILE].map(|side| {
            let along = (batch.tokens as f64 / sequences.max(1.0) / side as f64).ceil();
            if params.causal { along * (along + 1.0) / 2.0 } else { along * along }
        });
        let whole = |widths: &[f64], of: u64| widths.iter().map(|n| (n / of as f64).ceil() * of as f64).sum::<f64>();
        let weights = panels * (EXPONENTIAL + if params.has_dropout() { DRAW } else { 0.0 });
        let each = |(scored, weighted): (Vec<f64>, Vec<f64>)| {
            let scored = panels * whole(&scored, DEPTH);
            let (columns, products) = (whole(&weighted, WARP_TILE), weighted.len() as f64);
            let multiplied = parts * (scored + columns + weights) * (WARP_TILE * WARP_TILE) as f64;
            // Bytes of shared memory that the threads read for their sums, and bytes that are stored for them.
            let read = parts * (scored + columns) * (WARP * (THREAD_ROWS + THREAD_COLUMNS) * 4) as f64;
            let stored = tiles * (2.0 * scored + columns) * (TILE * 4) as f64;
            // The weights also pass through shared memory, and so do the scores of an adjoint.
            let passed = if computes.forward() { products } else { 2.0 + products };
            let stored = stored + panels * passed * parts * (WARP_TILE * WARP_TILE * 4) as f64;
            let cycles = fma_cycles(multiplied, card, card.flops).max((read + stored) / SHARED_BYTES_PER_CYCLE);
            (blocks, cycles * sequences / blocks_each / panels)
        };
        let mut max_read_bytes = vec![f64::INFINITY; buffers - 1 - results.len()];
        max_read_bytes.extend(results.iter().map(|columns| 4.0 * heads * batch.tokens as f64 * columns));
        let half = if params.causal { 0.5 } else { 1.0 };
        let flops = 2.0 * asked * batch.pairs as f64 * half * heads;
        let (blocks, bytes_in_flight) =
            (kinds.into_iter().map(each).collect(), units as f64 * BATCHED_WARP_BYTES_IN_FLIGHT);
        LaunchCost { flops, blocks, max_read_bytes, bytes_in_flight, ..LaunchCost::default() }
    }
}

/// Rows and columns of a block's tile of scores.
pub const TILE: u64 = 64;
/// Rows and columns of a warp's part of the tile.
pub const WARP_TILE: u64 = 32;
/// Rows that a thread computes: two groups of four neighbours, 16 rows apart.
pub const THREAD_ROWS: u64 = 8;
/// Columns that a thread computes, which are neighbours.
pub const THREAD_COLUMNS: u64 = 4;
/// Steps along k of the dot products that shared memory holds at once.
pub const DEPTH: u64 = 16;
/// The row stride in shared memory of the operands of a dot product, in floats: [`DEPTH`] and padding, chosen so that
/// the 16-byte loads of eight rows at a time, and the two halves of rows 16 apart, fall in different banks.
const SHARED_STRIDE: u64 = 20;
/// Lanes along the columns of a warp's part.
const ACROSS: u64 = WARP_TILE / THREAD_COLUMNS;
/// Threads of a block.
const THREADS: u64 = WARP * WARPS;
/// Elements of a tile that a thread computes.
const SUMS: usize = (THREAD_ROWS * THREAD_COLUMNS) as usize;
const _: () = assert!(
    WARP_TILE * WARP_TILE == WARP * THREAD_ROWS * THREAD_COLUMNS
        && TILE * TILE == WARPS * WARP_TILE * WARP_TILE
        && THREAD_COLUMNS == philox::COLUMNS_PER_CALL
);

/// A range of rows of queries or of keys: `first` is the position of its first row, and `shift` is what must be
/// subtracted from a position to get the row.
#[derive(Clone, Copy)]
struct Side {
    first: Val,
    shift: Val,
}

/// A block's rows of one head of one sequence, and the current panel of the result's columns.
struct Unit {
    computes: AttentionResult,
    head: Head,
    own: Side,
    /// What must be subtracted from a position on the other side to get its row.
    shift: Val,
    /// The first column of the panel.
    panel: Val,
    thread: Thread,
    shared: SharedTiles,
}

/// The position of a thread in its block's tile.
struct Thread {
    /// The thread loads four values along k from `step` on, of row `row` and of the row 32 below, and stores them in
    /// shared memory at `place`.
    step: Val,
    row: Val,
    place: Val,
    /// The first row and the first column of the warp's part of the tile.
    warp_row: Val,
    warp_column: Val,
    /// The thread's first row and first column in the tile.
    first_row: Val,
    first_column: Val,
    /// Whether the thread is the first of the lanes along its row.
    is_first_in_row: Val,
}

/// The block's shared memory.
#[derive(Clone, Copy)]
struct SharedTiles {
    /// For some steps of a dot product, rows of both sides; for the product with the weights, `left` holds rows of the
    /// other side.
    left: Buf,
    right: Buf,
    /// The weights of a tile; if both ds and w are needed, the second buffer holds the other of them.
    weights: [Buf; 2],
    /// One number for each row, for each of the two columns of warps.
    numbers: Buf,
}

impl SharedTiles {
    /// Allocates the shared memory, before the loop over units.
    fn of(k: &mut Kernel, computes: AttentionResult) -> SharedTiles {
        let left = k.shared(2 * TILE * SHARED_STRIDE);
        let right = k.subbuffer(left, TILE * SHARED_STRIDE);
        let weights = if computes == AttentionResult::Lse { left } else { k.shared(TILE * TILE) };
        let others = if matches!(computes, AttentionResult::KeyAndValueAdjoints | AttentionResult::AllAdjoints) {
            k.shared(TILE * TILE)
        } else {
            weights
        };
        let numbers = if computes.forward() { k.shared(2 * TILE) } else { left };
        SharedTiles { left, right, weights: [weights, others], numbers }
    }
}

impl Thread {
    fn of(k: &mut Kernel) -> Thread {
        let (thread, lane) = (k.thread(), k.lane_index());
        let warp = k.eval(thread / WARP);
        let (warp_row, warp_column) = (k.eval(warp / 2), k.eval(warp % 2));
        let (warp_row, warp_column) = (k.eval(warp_row * WARP_TILE), k.eval(warp_column * WARP_TILE));
        let (first_row, first_column) = (k.eval(lane / ACROSS), k.eval(lane % ACROSS));
        let is_first_in_row = k.compare(first_column, Order::Eq, 0);
        let (first_row, first_column) = (k.eval(first_row * 4), k.eval(first_column * 4));
        // Four lanes load one row. Of two neighbouring groups of lanes, the second loads the row 16 below.
        let (vec4, step) = (k.eval(thread / 4), k.eval(thread % 4));
        let row = k.eval(vec4 / 2 + vec4 % 2 * 16);
        let step = k.eval(step * 4);
        Thread {
            step,
            row,
            place: k.eval(place_of(row) + step),
            warp_row,
            warp_column,
            first_row: k.eval(warp_row + first_row),
            first_column: k.eval(warp_column + first_column),
            is_first_in_row,
        }
    }
}

/// The index of a tile's row in shared memory. Within each half of 32 rows, every fourth row is a neighbour.
fn place_of(row: Val) -> Index {
    (row / WARP_TILE * WARP_TILE + row % WARP_TILE / 4 + row % 4 * (WARP_TILE / 4)) * SHARED_STRIDE
}

/// The index of the first block of sequence `s` within its head; the sequence begins at token `start`.
fn first_block(start: Val, s: Val) -> Index {
    (start + s * philox::COLUMNS_PER_CALL) / TILE + s
}

/// The sequence that a block of a head belongs to. Each lane checks some of the sequences.
fn sequence(k: &mut Kernel, block: Val, sequences: Val, offsets: Buf) -> Val {
    let zero = k.int(0, I32);
    let begun = k.fold_lanes(sequences, &[zero], |k, s, mask, begun| {
        let start = k.load_lanes(offsets, s, mask);
        let (start, s) = (k.to_index(start), k.eval(s + k.lane_index()));
        let later = k.compare(first_block(start, s), Order::Gt, block);
        let (one, zero) = (k.int(1, I32), k.int(0, I32));
        let some = k.select(later, zero, one);
        let some = k.select(mask, some, zero);
        vec![k.add(begun[0], some)]
    });
    let begun = k.sum_lanes(begun[0]);
    let one = k.int(1, I32);
    let last = k.sub(begun, one);
    k.to_index(last)
}

impl Unit {
    fn of(
        k: &mut Kernel,
        unit: Val,
        shared: SharedTiles,
        (buffers, sizes): (&[Buf], &[Val]),
        (computes, params): (AttentionResult, AttentionParams),
    ) -> Unit {
        let HeadSizes { count: sequences, .. } = HeadSizes::of(sizes);
        let (sizes, BlockSizes { blocks, panels }) = BlockSizes::split_last(sizes);
        let (&offsets, buffers) = buffers.split_last().expect("it is the last");
        let (rest, block) = (k.div(unit, blocks), k.rem(unit, blocks));
        let (head, panel) = (k.div(rest, panels), k.rem(rest, panels));
        let sequence = sequence(k, block, sequences, offsets);
        let segment = Segment::of(k, (head, sequence), offsets);
        let before = k.eval(first_block(segment.start, sequence));
        let head = Head::of(k, segment, (buffers, sizes), (computes, params));
        let first = k.eval((block - before) * TILE);
        let zero = k.index(0);
        let (own, shift) = if computes.blocks_own_keys() { (head.phase, zero) } else { (zero, head.phase) };
        Unit {
            computes,
            head,
            own: Side { first, shift: own },
            shift,
            panel: k.eval(panel * TILE),
            thread: Thread::of(k),
            shared,
        }
    }

    /// The row at a position, and whether it exists.
    fn row(&self, k: &mut Kernel, position: Val, shift: Val) -> (Val, Val) {
        let row = k.eval(position - shift);
        (row, k.below_unsigned(row, self.head.segment.length))
    }

    /// The range of positions on the other side that form a pair with any of `count` own positions from `first` on.
    fn visible(&self, k: &mut Kernel, first: Val, count: u64) -> [Val; 2] {
        let (zero, length) = (k.index(0), self.head.segment.length);
        let (from, to) = match (self.computes.blocks_own_keys(), self.head.params.causal) {
            (true, true) => {
                let key = k.max(first, self.head.phase);
                (k.eval(key - self.head.phase), length)
            }
            (false, true) => (zero, k.min(first + count, length)),
            (_, false) => (zero, length),
        };
        let to = k.eval(to + self.shift);
        let some = k.compare(first, Order::Lt, length + self.own.shift);
        [from, k.select(some, to, zero)]
    }

    /// Iterates over the other side's tiles. `body` gets a tile's first position, and the range of positions that form
    /// pairs with the warp's rows.
    fn over_tiles(
        &self,
        k: &mut Kernel,
        start: &[Val],
        body: impl FnOnce(&mut Kernel, Val, [Val; 2], &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let [from, to] = self.visible(k, self.own.first, TILE);
        let from = k.eval(from / TILE * TILE);
        let first = k.eval(self.own.first + self.thread.warp_row);
        let visible = self.visible(k, first, WARP_TILE);
        k.fold(from, to, TILE, start, |k, at, carried| body(k, at, visible, carried))
    }

    /// Whether the warp's part of the tile at `at` has any pair.
    fn active(&self, k: &mut Kernel, at: Val, [from, to]: [Val; 2]) -> Val {
        let begin = k.eval(at + self.thread.warp_column);
        let end = k.eval(begin + WARP_TILE);
        let (before, after) = (k.compare(begin, Order::Lt, to), k.compare(from, Order::Lt, end));
        k.and(before, after)
    }

    /// Loads four values of a row from column `e` on; those that do not exist are 0.
    fn load_row_vec4(
        &self,
        k: &mut Kernel,
        rows: &RowPointer,
        (position, shift): (Val, Val),
        e: Val,
        width: Val,
    ) -> [Val; 4] {
        let (row, there) = self.row(k, position, shift);
        let place = k.eval(rows.row(row) + e);
        if self.head.params.vec4 {
            let inside = k.compare(e, Order::Lt, width);
            let there = k.and(there, inside);
            return k.load_vec4_if(there, rows.buffer, place);
        }
        let zero_f32 = k.float(0.0, F32);
        [0, 1, 2, 3].map(|i| {
            let (e, place) = (k.eval(e + i), k.eval(place + i));
            let inside = k.compare(e, Order::Lt, width);
            let there = k.and(there, inside);
            k.load_if(there, rows.buffer, place, zero_f32)
        })
    }

    /// Loads the thread's values of a tile's rows, from column `e` on.
    fn fetch(&self, k: &mut Kernel, rows: &RowPointer, side: Side, e: Val, width: Val) -> [[Val; 4]; 2] {
        let e = k.eval(e + self.thread.step);
        let first = k.eval(side.first + self.thread.row);
        [0, WARP_TILE].map(|more| {
            let position = k.eval(first + more);
            self.load_row_vec4(k, rows, (position, side.shift), e, width)
        })
    }

    /// The dot products of the own rows with the other side's rows, for the thread's part of a tile.
    fn product(
        &self,
        k: &mut Kernel,
        own: &RowPointer,
        other: &RowPointer,
        width: Val,
        at: Val,
        active: Val,
    ) -> Vec<Val> {
        let end = k.select(active, DEPTH, 0);
        let zero_f32 = k.float(0.0, F32);
        let (left, right) = (k.eval(place_of(self.thread.first_row)), k.eval(place_of(self.thread.first_column)));
        k.fold(0, width, DEPTH, &[zero_f32; SUMS], |k, e, sums| {
            let x = self.fetch(k, own, self.own, e, width);
            let y = self.fetch(k, other, Side { first: at, shift: self.shift }, e, width);
            // All threads are done with the previous steps in shared memory.
            k.barrier();
            for (to, vec4) in [(self.shared.left, x), (self.shared.right, y)] {
                for (n, four) in vec4.into_iter().enumerate() {
                    k.store_vec4(four, to, self.thread.place + n as u64 * WARP_TILE * SHARED_STRIDE);
                }
            }
            k.barrier();
            k.fold(0, end, 4, sums, |k, step, sums| {
                let four = |k: &mut Kernel, from: Buf, first: Val, row: u64| {
                    k.load_vec4(from, first + row * SHARED_STRIDE + step)
                };
                // The thread owns one of each eight neighbouring rows in shared memory; its next row is eight further.
                let columns: Vec<[Val; 4]> =
                    (0..THREAD_COLUMNS).map(|c| four(k, self.shared.right, right, 8 * c)).collect();
                let mut next = vec![];
                for r in 0..THREAD_ROWS {
                    let x = four(k, self.shared.left, left, r / 4 * 4 + r % 4 * 8);
                    for (c, y) in columns.iter().enumerate() {
                        let sum = sums[(r * THREAD_COLUMNS) as usize + c];
                        next.push(x.iter().zip(y).fold(sum, |sum, (&x, &y)| k.fma(x, y, sum)));
                    }
                }
                next
            })
        })
    }

    /// Adds the product of the tile's weights with the other side's rows to the sums.
    fn weighted(
        &self,
        k: &mut Kernel,
        weights: Buf,
        other: &RowPointer,
        width: Val,
        (at, [from, to]): (Val, [Val; 2]),
        sums: &[Val],
    ) -> Vec<Val> {
        // `steps` counts the tile's columns that have rows; `from..to` are those that form pairs with the warp's rows,
        // rounded down to a multiple of four.
        let steps = k.min(self.head.segment.length + self.shift - at, TILE);
        let from = k.max(from, at);
        let from = k.eval((from - at) / 4 * 4);
        let to = k.max(to, at);
        let to = k.min(to - at, TILE);
        let wanted = k.compare(self.panel + self.thread.warp_column, Order::Lt, width);
        let to = k.select(wanted, to, 0);
        // Neighbouring threads load neighbouring values along the rows.
        let thread = k.thread();
        let row = k.eval(thread / (TILE / 4));
        let column = k.eval(self.panel + thread % (TILE / 4) * 4);
        let own = k.eval(self.thread.first_row * TILE);
        let place = k.eval(thread * 4);
        k.fold(0, steps, DEPTH, sums, |k, begin, sums| {
            let first = k.eval(at + begin + row);
            let fetched = [0, DEPTH / 2].map(|more| {
                let position = k.eval(first + more);
                self.load_row_vec4(k, other, (position, self.shift), column, width)
            });
            k.barrier();
            for (n, four) in fetched.into_iter().enumerate() {
                k.store_vec4(four, self.shared.left, place + n as u64 * THREADS * 4);
            }
            k.barrier();
            let end = k.eval(begin + DEPTH);
            let (from, to) = (k.max(from, begin), k.min(to, end));
            k.fold(from, to, 4, sums, |k, step, sums| {
                let row_start = k.eval((step - begin) * TILE + self.thread.first_column);
                let rows: Vec<[Val; 4]> = (0..4).map(|i| k.load_vec4(self.shared.left, row_start + i * TILE)).collect();
                let mut next = vec![];
                for r in 0..THREAD_ROWS {
                    let x = k.load_vec4(weights, own + row_offset(r as usize) * TILE + step);
                    for c in 0..THREAD_COLUMNS as usize {
                        let sum = sums[r as usize * THREAD_COLUMNS as usize + c];
                        next.push(x.iter().zip(&rows).fold(sum, |sum, (&x, y)| k.fma(x, y[c], sum)));
                    }
                }
                next
            })
        })
    }

    /// Stores one half of the thread's values of a tile to shared memory.
    fn store_half(&self, k: &mut Kernel, to: Buf, numbers: &[Val], half: usize) {
        let first = k.eval(self.thread.first_row * TILE + self.thread.first_column);
        for (r, row) in numbers.chunks_exact(THREAD_COLUMNS as usize).enumerate().skip(4 * half).take(4) {
            k.store_vec4([0, 1, 2, 3].map(|c| row[c]), to, first + row_offset(r) * TILE);
        }
    }

    /// Loads one half of the thread's values of a tile from shared memory.
    fn load_half(&self, k: &mut Kernel, from: Buf, half: usize) -> Vec<Val> {
        let first = k.eval(self.thread.first_row * TILE + self.thread.first_column);
        let row = |r| k.load_vec4(from, first + row_offset(r) * TILE);
        (4 * half..4 * half + 4).flat_map(row).collect()
    }

    /// Writes the panel's columns of the own rows.
    fn write(&self, k: &mut Kernel, out: &RowPointer, width: Val, sums: &[Val]) {
        let shared = self.shared.weights[0];
        // All threads are done with the weights, whose shared memory is reused.
        k.barrier();
        (0..2).for_each(|half| self.store_half(k, shared, sums, half));
        k.sync_lanes();
        let column = k.eval(self.thread.warp_column + k.lane_index());
        let there = k.eval(self.panel + column);
        let inside = k.compare(there, Order::Lt, width);
        k.each(0, WARP_TILE, 1, |k, r| {
            let r = k.eval(self.thread.warp_row + r);
            let position = k.eval(self.own.first + r);
            let (row, exists) = self.row(k, position, self.own.shift);
            let exists = k.and(exists, inside);
            k.when(exists, |k| {
                let x = k.load_scalar(shared, r * TILE + column);
                k.store_scalar(x, out.buffer, out.row(row) + there);
            });
        });
    }

    /// The positions of the thread's own rows, or of its columns in the tile at `at`.
    fn positions(&self, k: &mut Kernel, at: Option<Val>) -> Vec<Val> {
        let (first, count) = match at {
            None => (k.eval(self.own.first + self.thread.first_row), THREAD_ROWS),
            Some(at) => (k.eval(at + self.thread.first_column), THREAD_COLUMNS),
        };
        let position = |n| k.eval(first + row_offset(n));
        (0..count as usize).map(position).collect()
    }

    /// Whether the thread's `i`th element of the tile at `at` is a pair.
    fn pair(&self, k: &mut Kernel, at: Val, i: usize) -> Val {
        let (own, other) = (self.positions(k, None), self.positions(k, Some(at)));
        let own = k.eval(own[i / THREAD_COLUMNS as usize] - self.own.shift);
        let (other, there) = self.row(k, other[i % THREAD_COLUMNS as usize], self.shift);
        if !self.head.params.causal {
            return there;
        }
        let (query, key) = if self.computes.blocks_own_keys() { (other, own) } else { (own, other) };
        let earlier = k.compare(key, Order::Lt, query + 1);
        k.and(there, earlier)
    }

    /// Calls `body` for each element of one half of the thread's rows in the tile at `at`, with the random word that
    /// decides its dropout, if there is dropout. The order is the generator's: one call decides over four neighbouring
    /// keys of one query.
    fn places(&self, k: &mut Kernel, at: Val, half: usize, mut body: impl FnMut(&mut Kernel, usize, Option<Val>)) {
        let generator = self.head.rng.map(|rng| philox::key(k, rng));
        for call in 0..4 {
            let (row, column) = if self.computes.blocks_own_keys() { (4 * half, call) } else { (4 * half + call, 0) };
            let words = generator.map(|generator| {
                let (own, other) = (self.positions(k, None), self.positions(k, Some(at)));
                let (own, other) = (own[row], other[column]);
                let (slot, query) = if self.computes.blocks_own_keys() { (own, other) } else { (other, own) };
                let column = k.eval((self.head.column + slot) / philox::COLUMNS_PER_CALL);
                let token = k.eval(self.head.segment.start + query);
                let place =
                    [column, token, self.head.segment.head, self.head.stream].map(|x| philox::splat_index(k, x));
                philox::philox(k, place, generator)
            });
            for n in 0..4 {
                let (row, column) = if self.computes.blocks_own_keys() { (row + n, column) } else { (row, n) };
                body(k, row * THREAD_COLUMNS as usize + column, words.map(|words| words[n]));
            }
        }
    }

    /// Applies dropout: x / (1 − p), or 0.
    fn dropped(&self, k: &mut Kernel, x: Val, word: Option<Val>) -> Val {
        word.map_or(x, |word| philox::dropout(k, x, word, self.head.params.p.get()))
    }

    /// Loads one number for each of the thread's queries; 0 for queries that do not exist.
    fn numbers(&self, k: &mut Kernel, of: &RowPointer, at: Option<Val>) -> Vec<Val> {
        let zero_f32 = k.float(0.0, F32);
        let shift = if at.is_some() { self.shift } else { self.own.shift };
        let positions = self.positions(k, at);
        let number = |position| {
            let (row, there) = self.row(k, position, shift);
            k.load_if(there, of.buffer, of.row(row), zero_f32)
        };
        positions.into_iter().map(number).collect()
    }

    /// Reduces one number for each of the thread's rows over all lanes and both warps of the row.
    fn reduce_rows(&self, k: &mut Kernel, numbers: &[Val], join: fn(&mut Kernel, Val, Val) -> Val) -> Vec<Val> {
        let shared = self.shared.numbers;
        let before = k.eval(self.thread.warp_column / WARP_TILE * TILE);
        let here = k.eval(before + self.thread.first_row);
        let other = k.eval(TILE - before + self.thread.first_row);
        let numbers: Vec<Val> = numbers.iter().map(|&x| k.reduce_neighbours(x, ACROSS, join)).collect();
        k.when(self.thread.is_first_in_row, |k| {
            for (r, &x) in numbers.iter().enumerate() {
                k.store_scalar(x, shared, here + row_offset(r));
            }
        });
        k.barrier();
        let joined = numbers.iter().enumerate().map(|(r, &x)| {
            let other = k.load_scalar(shared, other + row_offset(r));
            join(k, x, other)
        });
        joined.collect()
    }
}

/// The distance from a thread's first row to its `n`th.
fn row_offset(n: usize) -> u64 {
    (n / 4 * 16 + n % 4) as u64
}

/// The forward pass: attention's values, the log-sum-exp of its scores, or both. The running maximum of each row
/// rescales its sums when it grows (online softmax).
fn forward(k: &mut Kernel, unit: &Unit) {
    let (q, keys) = (&unit.head.operands[0], &unit.head.operands[1]);
    let [lowest, zero_f32] = [f64::NEG_INFINITY, 0.0].map(|x| k.float(x, F32));
    let rows = THREAD_ROWS as usize;
    let mut start = vec![lowest; rows];
    start.extend(vec![zero_f32; rows]);
    if unit.computes != AttentionResult::Lse {
        start.extend([zero_f32; SUMS]);
    }
    let carried = unit.over_tiles(k, &start, |k, at, visible, carried| {
        let (maximum, rest) = carried.split_at(rows);
        let (totals, sums) = rest.split_at(rows);
        let active = unit.active(k, at, visible);
        let scores = unit.product(k, q, keys, unit.head.width, at, active);
        let scale = k.float(unit.head.params.scale.get(), F32);
        let score = |(i, s)| {
            let (s, pair) = (k.mul(s, scale), unit.pair(k, at, i));
            k.select(pair, s, lowest)
        };
        let scores: Vec<Val> = scores.into_iter().enumerate().map(score).collect();
        let of_row = |k: &mut Kernel, row: &[Val]| row.iter().copied().reduce(|x, y| k.max_number(x, y)).expect("four");
        let tops: Vec<Val> = scores.chunks_exact(THREAD_COLUMNS as usize).map(|row| of_row(k, row)).collect();
        let tops = unit.reduce_rows(k, &tops, Kernel::max_number);
        let tops: Vec<Val> = tops.into_iter().zip(maximum).map(|(top, &maximum)| k.max_number(maximum, top)).collect();
        let shrunk: Vec<Val> = maximum
            .iter()
            .zip(&tops)
            .map(|(&maximum, &top)| {
                let first_row = k.sub(maximum, top);
                math::exp(k, first_row)
            })
            .collect();
        let totals: Vec<Val> = totals.iter().zip(&shrunk).map(|(&total, &by)| k.mul(total, by)).collect();
        let totals = k.if_else(active, &totals, |k| {
            let (mut powers, mut totals) = (scores.clone(), totals.clone());
            for half in 0..2 {
                unit.places(k, at, half, |k, i, word| {
                    let row = i / THREAD_COLUMNS as usize;
                    let s = k.sub(scores[i], tops[row]);
                    let e = math::exp(k, s);
                    totals[row] = k.add(totals[row], e);
                    powers[i] = unit.dropped(k, e, word);
                });
                if unit.computes != AttentionResult::Lse {
                    unit.store_half(k, unit.shared.weights[0], &powers, half);
                }
            }
            totals
        });
        let mut next = [tops, totals].concat();
        if let [_, _, v, ..] = &unit.head.operands[..] {
            let by = shrunk.iter().flat_map(|&by| [by; THREAD_COLUMNS as usize]);
            let sums: Vec<Val> = sums.iter().zip(by).map(|(&sum, by)| k.mul(sum, by)).collect();
            next.extend(unit.weighted(k, unit.shared.weights[0], v, unit.head.value_width, (at, visible), &sums));
        }
        next
    });
    let (maximum, rest) = carried.split_at(rows);
    let (totals, sums) = rest.split_at(rows);
    // All threads are done with the numbers of the last tile, whose shared memory is reused.
    k.barrier();
    let totals = unit.reduce_rows(k, totals, Kernel::add);
    if unit.computes != AttentionResult::Lse {
        let one = k.float(1.0, F32);
        let shares: Vec<Val> = totals.iter().map(|&total| k.div(one, total)).collect();
        let by = shares.iter().flat_map(|&share| [share; THREAD_COLUMNS as usize]);
        let sums: Vec<Val> = sums.iter().zip(by).map(|(&sum, by)| k.mul(sum, by)).collect();
        unit.write(k, &unit.head.results[0], unit.head.value_width, &sums);
    }
    let logs = match unit.computes {
        AttentionResult::Forward => return,
        AttentionResult::Lse => &unit.head.results[0],
        _ => &unit.head.results[1],
    };
    // One thread of each row writes the log-sum-exp: the first one, in the first panel.
    let first = k.compare(unit.panel + unit.thread.first_column, Order::Eq, 0);
    let positions = unit.positions(k, None);
    for ((&maximum, total), position) in maximum.iter().zip(totals).zip(positions) {
        let (row, there) = unit.row(k, position, unit.own.shift);
        let there = k.and(there, first);
        k.when(there, |k| {
            let log = math::log(k, total);
            let lse = k.add(maximum, log);
            k.store_scalar(lse, logs.buffer, logs.row(row));
        });
    }
}

/// The backward pass: the adjoint of queries, of keys, of values, or of both keys and values. It recomputes the weights
/// from the scores and their log-sum-exp.
fn adjoint(k: &mut Kernel, unit: &Unit) {
    let [q, keys, v, lse, df, corrections] = &unit.head.operands[..] else { unreachable!("six operands") };
    let (of_keys, of_values) = match unit.computes {
        AttentionResult::Adjoint(of) => (of != 2, of == 2),
        _ => (true, true),
    };
    // Own rows and other rows: `scored` for the scores, `multiplied` for the products with df.
    let (scored, multiplied) =
        if unit.computes.blocks_own_keys() { ([keys, q], [v, df]) } else { ([q, keys], [df, v]) };
    let of_queries = (!unit.computes.blocks_own_keys()).then(|| [lse, corrections].map(|of| unit.numbers(k, of, None)));
    let zero_f32 = k.float(0.0, F32);
    let start = vec![zero_f32; SUMS * (usize::from(of_keys) + usize::from(of_values))];
    let [ds_shared, w_shared] = match (of_keys, of_values) {
        (true, true) => unit.shared.weights,
        _ => [unit.shared.weights[0]; 2],
    };
    let sums = unit.over_tiles(k, &start, |k, at, visible, sums| {
        let active = unit.active(k, at, visible);
        let scores = unit.product(k, scored[0], scored[1], unit.head.width, at, active);
        // The scores wait in shared memory until they are used, to save registers.
        (0..2).for_each(|half| unit.store_half(k, ds_shared, &scores, half));
        let products =
            of_keys.then(|| unit.product(k, multiplied[0], multiplied[1], unit.head.value_width, at, active));
        k.when(active, |k| {
            let columns = || [lse, corrections].map(|of| unit.numbers(k, of, Some(at)));
            let [lse, corrections] = of_queries.clone().unwrap_or_else(columns);
            let query = |i: usize| {
                if unit.computes.blocks_own_keys() { i % THREAD_COLUMNS as usize } else { i / THREAD_COLUMNS as usize }
            };
            let (scale, zero_f32) = (k.float(unit.head.params.scale.get(), F32), k.float(0.0, F32));
            let (mut ds, mut weights) = (scores.clone(), scores.clone());
            for half in 0..2 {
                let scores = unit.load_half(k, ds_shared, half);
                unit.places(k, at, half, |k, i, word| {
                    let s = k.mul(scores[i % (SUMS / 2)], scale);
                    let s = k.sub(s, lse[query(i)]);
                    let (w, pair) = (math::exp(k, s), unit.pair(k, at, i));
                    let w = k.select(pair, w, zero_f32);
                    if let Some(products) = &products {
                        let dp = unit.dropped(k, products[i], word);
                        let d = k.add(dp, corrections[query(i)]);
                        let d = k.mul(d, w);
                        ds[i] = k.mul(d, scale);
                    }
                    if of_values {
                        weights[i] = unit.dropped(k, w, word);
                    }
                });
                for (there, shared, numbers) in [(of_keys, ds_shared, &ds), (of_values, w_shared, &weights)] {
                    if there {
                        unit.store_half(k, shared, numbers, half);
                    }
                }
            }
        });
        let mut next = vec![];
        if of_keys {
            next.extend(unit.weighted(k, ds_shared, scored[1], unit.head.width, (at, visible), &sums[..SUMS]));
        }
        if of_values {
            next.extend(unit.weighted(
                k,
                w_shared,
                df,
                unit.head.value_width,
                (at, visible),
                &sums[sums.len() - SUMS..],
            ));
        }
        next
    });
    let widths = [of_keys.then_some(unit.head.width), of_values.then_some(unit.head.value_width)];
    for ((out, sums), width) in unit.head.results.iter().zip(sums.chunks_exact(SUMS)).zip(widths.into_iter().flatten())
    {
        unit.write(k, out, width, sums);
    }
}
