//! Attention on a GPU: a block has 64 rows of one side for its own, and goes over those of the other, 64 at a time. Of
//! this tile of the square a warp computes a quarter, 32 × 32, or nothing where the quarter has no pair.
//!
//! ```text
//! forward    queries · keysᵀ                   ─► weights ─► · values        own rows are queries
//! dq         queries · keysᵀ, df · valuesᵀ     ─► ds      ─► · keys
//! dk, dv     keys · queriesᵀ, values · dfᵀ     ─► ds, w   ─► · queries, df   own rows are keys
//! ```
//!
//! Operands are read where they lie and pass through shared memory as they are, row by row: what a product wants
//! turned round, its threads read down the columns, each from banks of its own. Weights pass through it on their way
//! from the one product to the other. The largest score so far and the sum of powers are a thread's own.
//!
//! Places on the keys' side are slots ([`super::cpu`]): key j at `phase + j`.

use std::ops::Range;

use peft_runtime::artifact::Element;

use super::shape::{Form, Head, HeadSizes, Lie, Part, Rows, Segment};
use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, I32, Index, Kernel, Order, Val, define};
use crate::cost::{Launched, MANY_UNDER_WAY, SHARED, Work, cycles};
use crate::kernels::Scheduled;
use crate::kernels::{math, philox};
use crate::target::Machine;
use crate::target::cuda::Card;
use crate::target::cuda::{WARP, WARPS};

/// Instructions that make a weight of a score, and that decide whether it is dropped.
const EXPONENTIAL: f64 = 30.0;
const DRAW: f64 = 30.0;

arguments! {
    /// The last sizes.
    BlockSizes {
        /// Blocks of a head, at most.
        blocks,
        /// Of a result's columns.
        panels,
    }
}
arguments! {
    /// Before them, where blocks are of two kinds.
    KindSizes {
        /// Units of either kind.
        each
    }
}

/// A unit is a block's rows of one head and some columns of the results. Its last buffer are the sequences' offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GpuAttention {
    pub part: Part,
    pub form: Form,
}

impl Scheduled for GpuAttention {
    fn word(&self) -> String {
        self.part.word() + &self.form.suffix()
    }

    fn emit(&self, machine: Machine) -> Code {
        let GpuAttention { part, form } = *self;
        let elements = [part.elements(form), vec![Element::I32]].concat();
        let kinds = if part == Part::All { KindSizes::<Val>::COUNT } else { 0 };
        let count = part.sizes() + kinds + BlockSizes::<Val>::COUNT;
        define(machine, &elements, count, |k, buffers, sizes| {
            let room = Room::of(k, part);
            if part != Part::All {
                k.block_units(|k, unit| {
                    let unit = Unit::of(k, unit, room, (buffers, sizes), (part, form));
                    if part.forward() { forward(k, &unit) } else { adjoint(k, &unit) }
                });
                return;
            }
            let (rest, BlockSizes { blocks, panels }) = BlockSizes::split_last(sizes);
            let (own, KindSizes { each }) = KindSizes::split_last(rest);
            let (inputs, outs) = buffers.split_at(buffers.len() - part.results() - 1);
            let (before, lies) = own.split_at(own.len() - part.results() * Lie::<Val>::COUNT);
            let side = |k: &mut Kernel, unit: Val, part: Part, results: Range<usize>| {
                let buffers = [inputs, &outs[results.clone()], &outs[3..]].concat();
                let lies = &lies[Lie::<Val>::COUNT * results.start..Lie::<Val>::COUNT * results.end];
                let sizes = [before, lies, &BlockSizes { blocks, panels }.list()].concat();
                let unit = Unit::of(k, unit, room, (&buffers, &sizes), (part, form));
                adjoint(k, &unit);
            };
            // Those of keys take longer and begin first.
            let keys = |k: &mut Kernel, unit: Val| side(k, unit, Part::Sides, 1..3);
            k.block_units_of_two(each, keys, |k, unit| side(k, unit, Part::Adjoint(0), 0..1));
        })
    }

    fn work(&self, launched: Launched, card: &Card) -> Work {
        let GpuAttention { part, form } = self;
        let Launched { buffers, sizes, units, batch } = launched;
        let HeadSizes { width, wide, count: sequences, .. } = HeadSizes::of(sizes).map(|n| n as f64);
        let (_, last) = BlockSizes::split_last(sizes);
        let BlockSizes { blocks: blocks_each, panels } = last.map(|n| n as f64);
        // Numbers of a pair of a query and a key that are asked for; by kind of block how long the products are that make
        // its weight, and how wide those with it; and how wide the results are.
        let queries = (vec![width, wide], vec![width]);
        let keys = (vec![width, wide], vec![width, wide]);
        let (asked, kinds, results) = match part {
            Part::All => (2.0 * (width + wide), vec![keys, queries], vec![width, width, wide]),
            Part::Sides => (width + wide, vec![keys], vec![width, wide]),
            Part::Adjoint(0) => (width + wide, vec![queries], vec![width]),
            Part::Adjoint(1) => (width, vec![queries], vec![width]),
            Part::Adjoint(_) => (wide, vec![(vec![width], vec![wide])], vec![wide]),
            Part::Lse => (0.0, vec![(vec![width], vec![])], vec![1.0]),
            Part::Both => (width + wide, vec![(vec![width], vec![wide])], vec![wide, 1.0]),
            Part::Forward => (width + wide, vec![(vec![width], vec![wide])], vec![wide]),
        };
        let blocks = units.div_ceil(WARPS) / kinds.len() as u64;
        let heads = blocks as f64 / blocks_each / panels;
        // Of a sequence: tiles, and the warps' parts of them.
        let [tiles, parts] = [TILE, PART].map(|side| {
            let along = (batch.tokens as f64 / sequences.max(1.0) / side as f64).ceil();
            if form.causal { along * (along + 1.0) / 2.0 } else { along * along }
        });
        let whole = |widths: &[f64], of: u64| widths.iter().map(|n| (n / of as f64).ceil() * of as f64).sum::<f64>();
        let weights = panels * (EXPONENTIAL + if form.drops() { DRAW } else { 0.0 });
        let each = |(scored, weighted): (Vec<f64>, Vec<f64>)| {
            let scored = panels * whole(&scored, DEPTH);
            let (columns, products) = (whole(&weighted, PART), weighted.len() as f64);
            let multiplied = parts * (scored + columns + weights) * (PART * PART) as f64;
            // What threads read of it for their sums, and what is put there.
            let read = parts * (scored + columns) * (WARP * (ROWS + COLUMNS) * 4) as f64;
            let put = tiles * (2.0 * scored + columns) * (TILE * 4) as f64;
            // Weights pass through it as well, and an adjoint's scores.
            let passed = if part.forward() { products } else { 2.0 + products };
            let put = put + panels * passed * parts * (PART * PART * 4) as f64;
            let cycles = cycles(multiplied, card, card.flops).max((read + put) / SHARED);
            (blocks, cycles * sequences / blocks_each / panels)
        };
        let mut reads = vec![f64::INFINITY; buffers - 1 - results.len()];
        reads.extend(results.iter().map(|columns| 4.0 * heads * batch.tokens as f64 * columns));
        let half = if form.causal { 0.5 } else { 1.0 };
        let flops = 2.0 * asked * batch.pairs as f64 * half * heads;
        let (blocks, under_way) = (kinds.into_iter().map(each).collect(), units as f64 * MANY_UNDER_WAY);
        Work { flops, blocks, reads, under_way, ..Work::default() }
    }
}

/// Rows and columns of a tile.
pub const TILE: u64 = 64;
/// Of a warp's part of it.
pub const PART: u64 = 32;
/// And of what a thread holds: its rows are two times four neighbours, its columns are neighbours.
pub const ROWS: u64 = 8;
pub const COLUMNS: u64 = 4;
/// Steps of a product between two visits of the operands.
pub const DEPTH: u64 = 16;
/// From row to row of what a product's first kind has in shared memory, in floats: fours of eight rows at a time, and
/// the halves of two rows 16 apart, lie in banks of their own.
const LINE: u64 = 20;
/// Lanes along a warp's columns.
const ACROSS: u64 = PART / COLUMNS;
const THREADS: u64 = WARP * WARPS;
const SUMS: usize = (ROWS * COLUMNS) as usize;
const _: () =
    assert!(PART * PART == WARP * ROWS * COLUMNS && TILE * TILE == WARPS * PART * PART && COLUMNS == philox::EACH);

/// Rows of one side of the square: the position of the first, and by how much positions are beyond rows' numbers.
#[derive(Clone, Copy)]
struct Side {
    first: Val,
    shift: Val,
}

/// A block's rows of one head of one sequence, and the columns of a result that are at hand.
struct Unit {
    part: Part,
    head: Head,
    own: Side,
    /// By how much the other side's positions are beyond its rows' numbers.
    shift: Val,
    /// First column of the result.
    panel: Val,
    thread: Thread,
    room: Room,
}

/// Where a thread stands.
struct Thread {
    /// What it fetches along a product's steps: four from this one on, of this row and the one 32 below, which come to
    /// this place.
    step: Val,
    row: Val,
    place: Val,
    /// First row and column of the warp's part of a tile.
    below: Val,
    beside: Val,
    /// The thread's own first ones: of the tile.
    down: Val,
    across: Val,
    /// Among the lanes along a row it is the first.
    leads: Val,
}

/// Shared memory.
#[derive(Clone, Copy)]
struct Room {
    /// For some steps of a product: rows of either side, or those that weights multiply.
    left: Buf,
    right: Buf,
    /// Weights of a tile, and where there are two kinds the others.
    weights: [Buf; 2],
    /// A number for each row, of either column of warps.
    numbers: Buf,
}

impl Room {
    /// What a kernel wants, before its units.
    fn of(k: &mut Kernel, part: Part) -> Room {
        let left = k.shared(2 * TILE * LINE);
        let right = k.from(left, TILE * LINE);
        let weights = if part == Part::Lse { left } else { k.shared(TILE * TILE) };
        let others = if matches!(part, Part::Sides | Part::All) { k.shared(TILE * TILE) } else { weights };
        let numbers = if part.forward() { k.shared(2 * TILE) } else { left };
        Room { left, right, weights: [weights, others], numbers }
    }
}

impl Thread {
    fn of(k: &mut Kernel) -> Thread {
        let (thread, lane) = (k.thread(), k.lane_index());
        let warp = k.eval(thread / WARP);
        let (below, beside) = (k.eval(warp / 2), k.eval(warp % 2));
        let (below, beside) = (k.eval(below * PART), k.eval(beside * PART));
        let (down, across) = (k.eval(lane / ACROSS), k.eval(lane % ACROSS));
        let leads = k.compare(across, Order::Eq, 0);
        let (down, across) = (k.eval(down * 4), k.eval(across * 4));
        // Lanes by fours have a row each, of two neighbours the second one 16 below.
        let (fours, step) = (k.eval(thread / 4), k.eval(thread % 4));
        let row = k.eval(fours / 2 + fours % 2 * 16);
        let step = k.eval(step * 4);
        Thread {
            step,
            row,
            place: k.eval(place_of(row) + step),
            below,
            beside,
            down: k.eval(below + down),
            across: k.eval(beside + across),
            leads,
        }
    }
}

/// Where a row of a tile begins in shared memory: of 32 rows every fourth one stands side by side.
fn place_of(row: Val) -> Index {
    (row / PART * PART + row % PART / 4 + row % 4 * (PART / 4)) * LINE
}

/// The one among them that is the first of sequence `s`, which begins at token `start`.
fn first_block(start: Val, s: Val) -> Index {
    (start + s * philox::EACH) / TILE + s
}

/// The sequence that a block of a head is of: every lane looks at some.
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
        room: Room,
        (buffers, sizes): (&[Buf], &[Val]),
        (part, form): (Part, Form),
    ) -> Unit {
        let HeadSizes { count: sequences, .. } = HeadSizes::of(sizes);
        let (sizes, BlockSizes { blocks, panels }) = BlockSizes::split_last(sizes);
        let (&offsets, buffers) = buffers.split_last().expect("it is the last");
        let (rest, block) = (k.div(unit, blocks), k.rem(unit, blocks));
        let (head, panel) = (k.div(rest, panels), k.rem(rest, panels));
        let sequence = sequence(k, block, sequences, offsets);
        let segment = Segment::of(k, (head, sequence), offsets);
        let before = k.eval(first_block(segment.start, sequence));
        let head = Head::of(k, segment, (buffers, sizes), (part, form));
        let first = k.eval((block - before) * TILE);
        let zero = k.index(0);
        let (own, shift) = if part.keys() { (head.phase, zero) } else { (zero, head.phase) };
        Unit {
            part,
            head,
            own: Side { first, shift: own },
            shift,
            panel: k.eval(panel * TILE),
            thread: Thread::of(k),
            room,
        }
    }

    /// The row at a position, and whether there is one.
    fn row(&self, k: &mut Kernel, position: Val, shift: Val) -> (Val, Val) {
        let row = k.eval(position - shift);
        (row, k.below_unsigned(row, self.head.segment.length))
    }

    /// The positions on the other side that some of `count` own ones from `first` on have a pair with.
    fn seen(&self, k: &mut Kernel, first: Val, count: u64) -> [Val; 2] {
        let (zero, length) = (k.index(0), self.head.segment.length);
        let (from, to) = match (self.part.keys(), self.head.form.causal) {
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

    /// Goes over the other side's tiles: `body` gets a tile's first position and what the warp's rows have pairs with.
    fn over(
        &self,
        k: &mut Kernel,
        start: &[Val],
        body: impl FnOnce(&mut Kernel, Val, [Val; 2], &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let [from, to] = self.seen(k, self.own.first, TILE);
        let from = k.eval(from / TILE * TILE);
        let first = k.eval(self.own.first + self.thread.below);
        let seen = self.seen(k, first, PART);
        k.fold(from, to, TILE, start, |k, at, carried| body(k, at, seen, carried))
    }

    /// Whether the warp's part of the tile at `at` has a pair.
    fn active(&self, k: &mut Kernel, at: Val, [from, to]: [Val; 2]) -> Val {
        let begin = k.eval(at + self.thread.beside);
        let end = k.eval(begin + PART);
        let (before, after) = (k.compare(begin, Order::Lt, to), k.compare(from, Order::Lt, end));
        k.and(before, after)
    }

    /// Fours of a row from column `e` on, 0 for those that do not exist.
    fn four(&self, k: &mut Kernel, rows: &Rows, (position, shift): (Val, Val), e: Val, width: Val) -> [Val; 4] {
        let (row, there) = self.row(k, position, shift);
        let place = k.eval(rows.row(row) + e);
        if self.head.form.fours {
            let inside = k.compare(e, Order::Lt, width);
            let there = k.and(there, inside);
            return k.load_four_if(there, rows.buffer, place);
        }
        let nothing = k.float(0.0, F32);
        [0, 1, 2, 3].map(|i| {
            let (e, place) = (k.eval(e + i), k.eval(place + i));
            let inside = k.compare(e, Order::Lt, width);
            let there = k.and(there, inside);
            k.load_if(there, rows.buffer, place, nothing)
        })
    }

    /// A thread's numbers of a tile's rows, of columns from `e` on.
    fn fetch(&self, k: &mut Kernel, rows: &Rows, side: Side, e: Val, width: Val) -> [[Val; 4]; 2] {
        let e = k.eval(e + self.thread.step);
        let first = k.eval(side.first + self.thread.row);
        [0, PART].map(|more| {
            let position = k.eval(first + more);
            self.four(k, rows, (position, side.shift), e, width)
        })
    }

    /// Rows of the own side against those of the other, of the thread's part of a tile.
    fn product(&self, k: &mut Kernel, own: &Rows, other: &Rows, width: Val, at: Val, active: Val) -> Vec<Val> {
        let end = k.select(active, DEPTH, 0);
        let nothing = k.float(0.0, F32);
        let (left, right) = (k.eval(place_of(self.thread.down)), k.eval(place_of(self.thread.across)));
        k.fold(0, width, DEPTH, &[nothing; SUMS], |k, e, sums| {
            let x = self.fetch(k, own, self.own, e, width);
            let y = self.fetch(k, other, Side { first: at, shift: self.shift }, e, width);
            // The steps before are done with what they share.
            k.barrier();
            for (to, fours) in [(self.room.left, x), (self.room.right, y)] {
                for (n, four) in fours.into_iter().enumerate() {
                    k.store_four(four, to, self.thread.place + n as u64 * PART * LINE);
                }
            }
            k.barrier();
            k.fold(0, end, 4, sums, |k, step, sums| {
                let four =
                    |k: &mut Kernel, from: Buf, first: Val, row: u64| k.load_four(from, first + row * LINE + step);
                // Of eight rows side by side the thread's is one: its neighbours stand eight further.
                let columns: Vec<[Val; 4]> = (0..COLUMNS).map(|c| four(k, self.room.right, right, 8 * c)).collect();
                let mut next = vec![];
                for r in 0..ROWS {
                    let x = four(k, self.room.left, left, r / 4 * 4 + r % 4 * 8);
                    for (c, y) in columns.iter().enumerate() {
                        let sum = sums[(r * COLUMNS) as usize + c];
                        next.push(x.iter().zip(y).fold(sum, |sum, (&x, &y)| k.fma(x, y, sum)));
                    }
                }
                next
            })
        })
    }

    /// sums + the tile's weights times the other side's rows.
    fn weighted(
        &self,
        k: &mut Kernel,
        weights: Buf,
        other: &Rows,
        width: Val,
        (at, [from, to]): (Val, [Val; 2]),
        sums: &[Val],
    ) -> Vec<Val> {
        // Of the tile's columns those that have rows at all, and those that the warp's have pairs with, by fours.
        let steps = k.min(self.head.segment.length + self.shift - at, TILE);
        let from = k.max(from, at);
        let from = k.eval((from - at) / 4 * 4);
        let to = k.max(to, at);
        let to = k.min(to - at, TILE);
        let wanted = k.compare(self.panel + self.thread.beside, Order::Lt, width);
        let to = k.select(wanted, to, 0);
        // Fetched along the rows.
        let thread = k.thread();
        let row = k.eval(thread / (TILE / 4));
        let column = k.eval(self.panel + thread % (TILE / 4) * 4);
        let own = k.eval(self.thread.down * TILE);
        let place = k.eval(thread * 4);
        k.fold(0, steps, DEPTH, sums, |k, begin, sums| {
            let first = k.eval(at + begin + row);
            let fetched = [0, DEPTH / 2].map(|more| {
                let position = k.eval(first + more);
                self.four(k, other, (position, self.shift), column, width)
            });
            k.barrier();
            for (n, four) in fetched.into_iter().enumerate() {
                k.store_four(four, self.room.left, place + n as u64 * THREADS * 4);
            }
            k.barrier();
            let end = k.eval(begin + DEPTH);
            let (from, to) = (k.max(from, begin), k.min(to, end));
            k.fold(from, to, 4, sums, |k, step, sums| {
                let line = k.eval((step - begin) * TILE + self.thread.across);
                let rows: Vec<[Val; 4]> = (0..4).map(|i| k.load_four(self.room.left, line + i * TILE)).collect();
                let mut next = vec![];
                for r in 0..ROWS {
                    let x = k.load_four(weights, own + further(r as usize) * TILE + step);
                    for c in 0..COLUMNS as usize {
                        let sum = sums[r as usize * COLUMNS as usize + c];
                        next.push(x.iter().zip(&rows).fold(sum, |sum, (&x, y)| k.fma(x, y[c], sum)));
                    }
                }
                next
            })
        })
    }

    /// Puts one half of what the thread has of a tile into shared memory.
    fn share(&self, k: &mut Kernel, to: Buf, numbers: &[Val], half: usize) {
        let first = k.eval(self.thread.down * TILE + self.thread.across);
        for (r, row) in numbers.chunks_exact(COLUMNS as usize).enumerate().skip(4 * half).take(4) {
            k.store_four([0, 1, 2, 3].map(|c| row[c]), to, first + further(r) * TILE);
        }
    }

    /// The other way.
    fn shared(&self, k: &mut Kernel, from: Buf, half: usize) -> Vec<Val> {
        let first = k.eval(self.thread.down * TILE + self.thread.across);
        let row = |r| k.load_four(from, first + further(r) * TILE);
        (4 * half..4 * half + 4).flat_map(row).collect()
    }

    /// The panel's columns of the own rows.
    fn write(&self, k: &mut Kernel, out: &Rows, width: Val, sums: &[Val]) {
        let room = self.room.weights[0];
        // All are done with the weights.
        k.barrier();
        (0..2).for_each(|half| self.share(k, room, sums, half));
        k.settle();
        let column = k.eval(self.thread.beside + k.lane_index());
        let there = k.eval(self.panel + column);
        let inside = k.compare(there, Order::Lt, width);
        k.each(0, PART, 1, |k, r| {
            let r = k.eval(self.thread.below + r);
            let position = k.eval(self.own.first + r);
            let (row, exists) = self.row(k, position, self.own.shift);
            let exists = k.and(exists, inside);
            k.when(exists, |k| {
                let x = k.load_here(room, r * TILE + column);
                k.store_here(x, out.buffer, out.row(row) + there);
            });
        });
    }

    /// Positions of the thread's own rows, or of its columns in the tile at `at`.
    fn positions(&self, k: &mut Kernel, at: Option<Val>) -> Vec<Val> {
        let (first, count) = match at {
            None => (k.eval(self.own.first + self.thread.down), ROWS),
            Some(at) => (k.eval(at + self.thread.across), COLUMNS),
        };
        let position = |n| k.eval(first + further(n));
        (0..count as usize).map(position).collect()
    }

    /// Whether the thread's `i`th place in the tile at `at` is a pair.
    fn pair(&self, k: &mut Kernel, at: Val, i: usize) -> Val {
        let (own, other) = (self.positions(k, None), self.positions(k, Some(at)));
        let own = k.eval(own[i / COLUMNS as usize] - self.own.shift);
        let (other, there) = self.row(k, other[i % COLUMNS as usize], self.shift);
        if !self.head.form.causal {
            return there;
        }
        let (query, key) = if self.part.keys() { (other, own) } else { (own, other) };
        let earlier = k.compare(key, Order::Lt, query + 1);
        k.and(there, earlier)
    }

    /// The places of one half of the thread's rows in the tile at `at`, each with what decides whether it is dropped, if
    /// anything is: in the generator's order, a call of which decides over four neighbouring keys of a query.
    fn places(&self, k: &mut Kernel, at: Val, half: usize, mut body: impl FnMut(&mut Kernel, usize, Option<Val>)) {
        let generator = self.head.rng.map(|rng| philox::key(k, rng));
        for call in 0..4 {
            let (row, column) = if self.part.keys() { (4 * half, call) } else { (4 * half + call, 0) };
            let words = generator.map(|generator| {
                let (own, other) = (self.positions(k, None), self.positions(k, Some(at)));
                let (own, other) = (own[row], other[column]);
                let (slot, query) = if self.part.keys() { (own, other) } else { (other, own) };
                let column = k.eval((self.head.column + slot) / philox::EACH);
                let token = k.eval(self.head.segment.start + query);
                let place = [column, token, self.head.segment.head, self.head.stream].map(|x| philox::lanes_of(k, x));
                philox::philox(k, place, generator)
            });
            for n in 0..4 {
                let (row, column) = if self.part.keys() { (row + n, column) } else { (row, n) };
                body(k, row * COLUMNS as usize + column, words.map(|words| words[n]));
            }
        }
    }

    /// x / (1 − p) or nothing.
    fn dropped(&self, k: &mut Kernel, x: Val, word: Option<Val>) -> Val {
        word.map_or(x, |word| philox::dropped(k, x, word, self.head.form.p.get()))
    }

    /// A number for each of the thread's queries, 0 where there is none.
    fn numbers(&self, k: &mut Kernel, of: &Rows, at: Option<Val>) -> Vec<Val> {
        let nothing = k.float(0.0, F32);
        let shift = if at.is_some() { self.shift } else { self.own.shift };
        let positions = self.positions(k, at);
        let number = |position| {
            let (row, there) = self.row(k, position, shift);
            k.load_if(there, of.buffer, of.row(row), nothing)
        };
        positions.into_iter().map(number).collect()
    }

    /// Numbers of the thread's rows, joined with those of the same rows in the lanes and the warp beside it.
    fn joined(&self, k: &mut Kernel, numbers: &[Val], join: fn(&mut Kernel, Val, Val) -> Val) -> Vec<Val> {
        let room = self.room.numbers;
        let before = k.eval(self.thread.beside / PART * TILE);
        let here = k.eval(before + self.thread.down);
        let other = k.eval(TILE - before + self.thread.down);
        let numbers: Vec<Val> = numbers.iter().map(|&x| k.join_neighbours(x, ACROSS, join)).collect();
        k.when(self.thread.leads, |k| {
            for (r, &x) in numbers.iter().enumerate() {
                k.store_here(x, room, here + further(r));
            }
        });
        k.barrier();
        let joined = numbers.iter().enumerate().map(|(r, &x)| {
            let other = k.load_here(room, other + further(r));
            join(k, x, other)
        });
        joined.collect()
    }
}

/// Rows from a thread's first to its `n`th.
fn further(n: usize) -> u64 {
    (n / 4 * 16 + n % 4) as u64
}

/// Attention's values, the log-sum-exp of its scores, or both.
fn forward(k: &mut Kernel, unit: &Unit) {
    let (q, keys) = (&unit.head.operands[0], &unit.head.operands[1]);
    let [lowest, nothing] = [f64::NEG_INFINITY, 0.0].map(|x| k.float(x, F32));
    let rows = ROWS as usize;
    let mut start = vec![lowest; rows];
    start.extend(vec![nothing; rows]);
    if unit.part != Part::Lse {
        start.extend([nothing; SUMS]);
    }
    let carried = unit.over(k, &start, |k, at, seen, carried| {
        let (most, rest) = carried.split_at(rows);
        let (totals, sums) = rest.split_at(rows);
        let active = unit.active(k, at, seen);
        let scores = unit.product(k, q, keys, unit.head.width, at, active);
        let scale = k.float(unit.head.form.scale.get(), F32);
        let score = |(i, s)| {
            let (s, pair) = (k.mul(s, scale), unit.pair(k, at, i));
            k.select(pair, s, lowest)
        };
        let scores: Vec<Val> = scores.into_iter().enumerate().map(score).collect();
        let of_row = |k: &mut Kernel, row: &[Val]| row.iter().copied().reduce(|x, y| k.greater(x, y)).expect("four");
        let tops: Vec<Val> = scores.chunks_exact(COLUMNS as usize).map(|row| of_row(k, row)).collect();
        let tops = unit.joined(k, &tops, Kernel::greater);
        let tops: Vec<Val> = tops.into_iter().zip(most).map(|(top, &most)| k.greater(most, top)).collect();
        let shrunk: Vec<Val> = most
            .iter()
            .zip(&tops)
            .map(|(&most, &top)| {
                let down = k.sub(most, top);
                math::exp(k, down)
            })
            .collect();
        let totals: Vec<Val> = totals.iter().zip(&shrunk).map(|(&total, &by)| k.mul(total, by)).collect();
        let totals = k.either_of(active, &totals, |k| {
            let (mut powers, mut totals) = (scores.clone(), totals.clone());
            for half in 0..2 {
                unit.places(k, at, half, |k, i, word| {
                    let row = i / COLUMNS as usize;
                    let s = k.sub(scores[i], tops[row]);
                    let e = math::exp(k, s);
                    totals[row] = k.add(totals[row], e);
                    powers[i] = unit.dropped(k, e, word);
                });
                if unit.part != Part::Lse {
                    unit.share(k, unit.room.weights[0], &powers, half);
                }
            }
            totals
        });
        let mut next = [tops, totals].concat();
        if let [_, _, v, ..] = &unit.head.operands[..] {
            let by = shrunk.iter().flat_map(|&by| [by; COLUMNS as usize]);
            let sums: Vec<Val> = sums.iter().zip(by).map(|(&sum, by)| k.mul(sum, by)).collect();
            next.extend(unit.weighted(k, unit.room.weights[0], v, unit.head.wide, (at, seen), &sums));
        }
        next
    });
    let (most, rest) = carried.split_at(rows);
    let (totals, sums) = rest.split_at(rows);
    // Before what the last tile's numbers are in is used again.
    k.barrier();
    let totals = unit.joined(k, totals, Kernel::add);
    if unit.part != Part::Lse {
        let one = k.float(1.0, F32);
        let shares: Vec<Val> = totals.iter().map(|&total| k.div(one, total)).collect();
        let by = shares.iter().flat_map(|&share| [share; COLUMNS as usize]);
        let sums: Vec<Val> = sums.iter().zip(by).map(|(&sum, by)| k.mul(sum, by)).collect();
        unit.write(k, &unit.head.results[0], unit.head.wide, &sums);
    }
    let logs = match unit.part {
        Part::Forward => return,
        Part::Lse => &unit.head.results[0],
        _ => &unit.head.results[1],
    };
    // One thread of a row, where the first columns are.
    let first = k.compare(unit.panel + unit.thread.across, Order::Eq, 0);
    let positions = unit.positions(k, None);
    for ((&most, total), position) in most.iter().zip(totals).zip(positions) {
        let (row, there) = unit.row(k, position, unit.own.shift);
        let there = k.and(there, first);
        k.when(there, |k| {
            let log = math::log(k, total);
            let lse = k.add(most, log);
            k.store_here(lse, logs.buffer, logs.row(row));
        });
    }
}

/// The adjoint of queries, of keys, of values, or of the latter two together.
fn adjoint(k: &mut Kernel, unit: &Unit) {
    let [q, keys, v, lse, df, corrections] = &unit.head.operands[..] else { unreachable!("six operands") };
    let (of_keys, of_values) = match unit.part {
        Part::Adjoint(of) => (of != 2, of == 2),
        _ => (true, true),
    };
    // Own rows and others: of the scores, and of the products with df.
    let (scored, multiplied) = if unit.part.keys() { ([keys, q], [v, df]) } else { ([q, keys], [df, v]) };
    let of_queries = (!unit.part.keys()).then(|| [lse, corrections].map(|of| unit.numbers(k, of, None)));
    let nothing = k.float(0.0, F32);
    let start = vec![nothing; SUMS * (usize::from(of_keys) + usize::from(of_values))];
    let [ds_room, w_room] = match (of_keys, of_values) {
        (true, true) => unit.room.weights,
        _ => [unit.room.weights[0]; 2],
    };
    let sums = unit.over(k, &start, |k, at, seen, sums| {
        let active = unit.active(k, at, seen);
        let scores = unit.product(k, scored[0], scored[1], unit.head.width, at, active);
        // Until they are used they wait in memory: registers are few.
        (0..2).for_each(|half| unit.share(k, ds_room, &scores, half));
        let products = of_keys.then(|| unit.product(k, multiplied[0], multiplied[1], unit.head.wide, at, active));
        k.when(active, |k| {
            let columns = || [lse, corrections].map(|of| unit.numbers(k, of, Some(at)));
            let [lse, corrections] = of_queries.clone().unwrap_or_else(columns);
            let query = |i: usize| if unit.part.keys() { i % COLUMNS as usize } else { i / COLUMNS as usize };
            let (scale, nothing) = (k.float(unit.head.form.scale.get(), F32), k.float(0.0, F32));
            let (mut ds, mut weights) = (scores.clone(), scores.clone());
            for half in 0..2 {
                let scores = unit.shared(k, ds_room, half);
                unit.places(k, at, half, |k, i, word| {
                    let s = k.mul(scores[i % (SUMS / 2)], scale);
                    let s = k.sub(s, lse[query(i)]);
                    let (w, pair) = (math::exp(k, s), unit.pair(k, at, i));
                    let w = k.select(pair, w, nothing);
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
                for (there, room, numbers) in [(of_keys, ds_room, &ds), (of_values, w_room, &weights)] {
                    if there {
                        unit.share(k, room, numbers, half);
                    }
                }
            }
        });
        let mut next = vec![];
        if of_keys {
            next.extend(unit.weighted(k, ds_room, scored[1], unit.head.width, (at, seen), &sums[..SUMS]));
        }
        if of_values {
            next.extend(unit.weighted(k, w_room, df, unit.head.wide, (at, seen), &sums[sums.len() - SUMS..]));
        }
        next
    });
    let widths = [of_keys.then_some(unit.head.width), of_values.then_some(unit.head.wide)];
    for ((out, sums), width) in unit.head.results.iter().zip(sums.chunks_exact(SUMS)).zip(widths.into_iter().flatten())
    {
        unit.write(k, out, width, sums);
    }
}
