//! Matmul of few columns and many steps along k, on a GPU: lanes share the steps, so that few tiles keep a chip busy.
//!
//! ```text
//! for each 32 steps of k
//!   B[32, columns] ─► the next stage of shared memory
//!   a lane: its step of 5 rows of A × all columns, onto sums in registers
//! the lanes' sums ─► shared memory, added up row by row ─► what follows the product
//! ```
//!
//! A number of A is multiplied in one lane alone, so it goes there straight from memory, where neighbouring lanes fetch
//! neighbours, and is on its way for some rounds. B is in shared memory for the block's warps, each with its own rows.

use peft_runtime::artifact::{Element, Extent};

use super::epilogue::{Ending, Fate, Out};
use super::{Buffers, Product};
use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, Index, Kernel, Order, Val, first};
use crate::cost::{Launched, SHARED, Work, cycles};
use crate::kernels::Scheduled;
use crate::kernels::epilogue::Epilogue;
use crate::target::Machine;
use crate::target::cuda::Card;
use crate::target::cuda::{WARP, WARPS};

/// Rows of a warp, and of a tile.
const HELD: u64 = 5;
pub const ROWS: u64 = HELD * WARPS;
/// Columns of a tile at most: sums are in registers.
const MOST: u64 = 24;
/// And of a product: each tile reads its rows of A anew.
pub const WIDEST: u64 = 160;
/// Rounds that a lane's numbers of A are under way for, and stages of B.
const AHEAD: u64 = 3;
const THREADS: u64 = WARP * WARPS;

/// A tile's columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    pub columns: u64,
}

impl Tile {
    /// Of a product of `n` columns, split evenly.
    pub fn of(n: u64) -> Tile {
        Tile { columns: n.div_ceil(n.div_ceil(MOST)).next_multiple_of(4) }
    }

    pub fn elements(self) -> u64 {
        ROWS * self.columns
    }

    /// What a step of k takes of shared memory, in floats: each warp reads the columns that are put there, and A comes
    /// the same way.
    pub fn moved(self) -> u64 {
        (WARPS + 1) * self.columns + ROWS
    }

    /// And the adding up: each lane's sums come and go, and so does the result.
    pub fn added(self) -> u64 {
        2 * (WARP + 1) * self.elements()
    }

    /// Bytes that a warp has under way: B's are few, and near.
    pub fn under_way() -> u64 {
        4 * HELD * WARP * AHEAD
    }

    /// Steps that a product of `depth` takes.
    pub fn steps(depth: u64) -> u64 {
        depth.next_multiple_of(WARP * AHEAD)
    }

    /// Columns that threads fetch: a power of two.
    fn wide(self) -> u64 {
        self.columns.next_multiple_of(16)
    }

    /// From step to step in shared memory: an odd number of fours, so that lanes that read a four each share no bank.
    fn line(self) -> u64 {
        self.wide() + 4
    }

    /// A warp's sums of a row, of each lane, and behind them its results.
    fn own(self) -> u64 {
        WARP * self.line() + HELD * WARP
    }
}

arguments! {
    Sizes {
        m, n, depth,
        /// Tiles beside each other.
        across,
        along_a, deep_a, first_a,
        along_b, deep_b, first_b,
        line_c, first_c,
    }
}

/// One tile a unit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Skinny {
    pub tile: Tile,
    /// Columns of B lie side by side.
    pub contiguous: bool,
    pub fate: Fate,
    pub epilogue: Epilogue,
}

impl Skinny {
    /// Sizes and units.
    pub fn arguments(&self, product: &Product) -> (Vec<Extent>, Extent) {
        let Product { m, n, depth, a, b, c, .. } = product;
        let (down, across) = product.tiles(ROWS, self.tile.columns);
        let sizes = Sizes {
            m,
            n,
            depth,
            across: &across,
            along_a: &a.along,
            deep_a: &a.deep,
            first_a: &a.first,
            along_b: &b.along,
            deep_b: &b.deep,
            first_b: &b.first,
            line_c: &c.line,
            first_c: &c.first,
        };
        (sizes.map(Extent::clone).list(), down * across.clone() * Extent::Const(WARPS))
    }
}

impl Scheduled for Skinny {
    fn word(&self) -> String {
        let side = if self.contiguous { "rows" } else { "columns" };
        format!("narrow_{ROWS}x{}_{side}{}", self.tile.columns, self.fate.suffix())
    }

    fn emit(&self, machine: Machine) -> Code {
        let Skinny { tile, contiguous, fate, epilogue } = self;
        let (tile, contiguous, fate) = (*tile, *contiguous, *fate);
        let (columns, line) = (tile.columns, tile.line());
        let own = [Element::F32; Buffers::<Val>::COUNT];
        epilogue.define(machine, &own, Sizes::<Val>::COUNT, |k, buffers, sizes, follows| {
            let Buffers { a, b, c } = Buffers::of(buffers);
            let sizes = Sizes::of(sizes);
            let Sizes { m, n, depth, across, line_c, first_c, .. } = sizes;
            let stage = WARP * line;
            let room = k.shared((AHEAD * stage).max(WARPS * tile.own()));
            let stages: Vec<Buf> = (0..AHEAD).map(|at| k.from(room, at * stage)).collect();
            let thread = k.thread();
            let (warp, lane) = (k.eval(thread / WARP), k.lane_index());
            // Of a stage, the lane's step.
            let here = k.eval(lane * line);
            k.block_units(|k, unit| {
                let (tile_row, tile_column) = (k.div(unit, across), k.rem(unit, across));
                let (row, before, column) =
                    (k.eval(tile_row * ROWS), k.eval(warp * HELD), k.eval(tile_column * columns));
                let row = k.eval(row + before);
                let left = Operand::rows(k, a, [sizes.along_a, sizes.deep_a, sizes.first_a], (row, m), depth);
                let (right, place) = Operand::columns(
                    k,
                    b,
                    [sizes.along_b, sizes.deep_b, sizes.first_b],
                    (column, n),
                    depth,
                    (tile, contiguous),
                );
                let mut start = vec![k.float(0.0, F32); (HELD * columns) as usize];
                for ahead in 0..AHEAD {
                    start.extend(left.fetch(k, ahead * WARP));
                }
                let fetched = right.fetch(k, 0);
                // The unit before is on its way out through the same room.
                k.barrier();
                place.share(k, stages[0], &fetched);
                let sums = k.fold(0, depth, WARP * AHEAD, &start, |k, block, carried| {
                    let (sums, numbers) = carried.split_at((HELD * columns) as usize);
                    let (mut sums, mut next) = (sums.to_vec(), vec![]);
                    for (ahead, x) in (0..AHEAD).zip(numbers.chunks_exact(HELD as usize)) {
                        let now = k.eval(block + ahead * WARP);
                        let fetched = right.fetch(k, now + WARP);
                        // This stage is filled, and the steps before the last ones are done with the next.
                        k.barrier();
                        sums = multiply(k, x, (stages[ahead as usize], here), &sums);
                        next.extend(left.fetch(k, now + AHEAD * WARP));
                        place.share(k, stages[((ahead + 1) % AHEAD) as usize], &fetched);
                    }
                    [sums, next].concat()
                });
                k.barrier();
                let own = k.eval(warp * tile.own());
                let results = add_up(k, tile, (room, own), &sums[..(HELD * columns) as usize]);
                let out = Out {
                    ending: Ending { fate, epilogue, buffers, sizes: follows },
                    to: c,
                    base: first_c,
                    line: line_c,
                    batch: k.index(0),
                    column,
                    n,
                    width: columns,
                    room,
                    back: None,
                };
                let left = k.eval(m - row);
                let some = k.compare(row, Order::Lt, m);
                let left = k.select(some, left, 0);
                let rows = k.min(left, HELD);
                out.write_all(k, rows, |k, r| {
                    let at = k.eval(r * WARP);
                    (k.eval(row + r), k.eval(results + at))
                });
            });
        })
    }

    fn work(&self, launched: Launched, card: &Card) -> Work {
        let Launched { sizes, units, .. } = launched;
        let tile = self.tile;
        let steps = Tile::steps(Sizes::of(sizes).depth);
        let Sizes { m, n, depth, .. } = Sizes::of(sizes).map(|n| n as f64);
        let step = cycles(tile.elements() as f64, card, card.flops);
        let shared = |floats: u64| (floats * 4) as f64 / SHARED;
        let cycles = steps as f64 * step.max(shared(tile.moved())) + shared(tile.added());
        let reads = vec![4.0 * m * depth, 4.0 * n * depth];
        let under_way = (units * Tile::under_way()) as f64;
        let (flops, blocks) = (2.0 * m * n * depth, vec![(units.div_ceil(WARPS), cycles)]);
        Work { flops, blocks, reads, under_way, ..Work::default() }
    }

    fn anew(&self) -> Vec<usize> {
        self.fate.anew()
    }
}

/// What a thread fetches of an operand: how far its steps are ahead of a round's first, and of each where the lines
/// begin, rows of A or columns of B.
struct Operand {
    buffer: Buf,
    fetched: Vec<(Val, Vec<Val>)>,
    deep: Val,
    depth: Val,
}

impl Operand {
    /// The warp's rows, of which a lane has one step.
    fn rows(k: &mut Kernel, buffer: Buf, side: [Val; 3], (row, m): (Val, Val), depth: Val) -> Operand {
        let rows = (0..HELD).map(|r| Operand::line(k, side, (row, m), r)).collect();
        Operand { buffer, fetched: vec![(k.lane_index(), rows)], deep: side[1], depth }
    }

    /// The block's columns, and where they go: neighbouring threads have neighbouring columns if those are
    /// `contiguous`, else steps.
    fn columns(
        k: &mut Kernel,
        buffer: Buf,
        side: [Val; 3],
        (column, n): (Val, Val),
        depth: Val,
        (tile, contiguous): (Tile, bool),
    ) -> (Operand, Place) {
        let (thread, wide) = (k.thread(), tile.wide());
        let (fetched, step, own, next) = if contiguous {
            let at_once = THREADS / wide;
            let (step, own) = (k.eval(thread / wide), k.eval(thread % wide));
            let column = k.eval(column + own);
            let begin = Operand::line(k, side, (column, n), 0);
            let steps = (0..WARP).step_by(at_once as usize).map(|ahead| (k.eval(step + ahead), vec![begin]));
            (steps.collect(), step, own, at_once * tile.line())
        } else {
            let own = k.eval(thread / WARP * 4);
            let column = k.eval(column + own);
            let fours = (0..wide).step_by((4 * WARPS) as usize).flat_map(|more| more..more + 4);
            let lines = fours.map(|more| Operand::line(k, side, (column, n), more)).collect();
            (vec![(k.lane_index(), lines)], k.lane_index(), own, 4 * WARPS)
        };
        let place = Place { at: k.eval(step * tile.line() + own), next, fours: !contiguous };
        (Operand { buffer, fetched, deep: side[1], depth }, place)
    }

    /// Where line `i + more` begins; of those from `end` on it does not matter.
    fn line(k: &mut Kernel, side: [Val; 3], (i, end): (Val, Val), more: u64) -> Val {
        let [along, _, first] = side;
        let (i, last) = (k.eval(i + more), k.eval(end - 1));
        let i = k.min(i, last);
        k.eval(first + i * along)
    }

    /// Of the round that begins at step `begin`; 0 for steps that do not exist. Nothing branches, or LLVM would put off
    /// sums from round to round.
    fn fetch(&self, k: &mut Kernel, begin: impl Into<Index>) -> Vec<Val> {
        let begin = k.eval(begin);
        let nothing = k.float(0.0, F32);
        let last = k.eval(self.depth - 1);
        let mut numbers = vec![];
        for (ahead, lines) in &self.fetched {
            let step = k.eval(begin + *ahead);
            let there = k.compare(step, Order::Lt, self.depth);
            let step = k.min(step, last);
            let along = k.eval(step * self.deep);
            for &line in lines {
                let number = k.load_here(self.buffer, line + along);
                numbers.push(k.select(there, number, nothing));
            }
        }
        numbers
    }
}

/// Where the thread's numbers of B go in a stage: the first ones, and from one to the next, or from four to four.
struct Place {
    at: Val,
    next: u64,
    fours: bool,
}

impl Place {
    fn share(&self, k: &mut Kernel, to: Buf, fetched: &[Val]) {
        for (n, numbers) in fetched.chunks(if self.fours { 4 } else { 1 }).enumerate() {
            let at = k.eval(self.at + n as u64 * self.next);
            match *numbers {
                [x, y, z, w] => k.store_four([x, y, z, w], to, at),
                _ => k.store_here(numbers[0], to, at),
            }
        }
    }
}

/// A lane's sums with one step more: of the first four columns by rows, then of the next.
fn multiply(k: &mut Kernel, x: &[Val], (stage, step): (Buf, Val), sums: &[Val]) -> Vec<Val> {
    let mut next = vec![];
    for (four, sums) in (0..).step_by(4).zip(sums.chunks_exact(4 * x.len())) {
        let y = k.load_four(stage, step + four);
        let pairs = x.iter().flat_map(|&x| y.map(|y| (x, y)));
        next.extend(pairs.zip(sums).map(|((x, y), &sum)| k.fma(x, y, sum)));
    }
    next
}

/// Of all lanes' sums the warp's rows, which lie from the place it gives on, a warp's width apart.
fn add_up(k: &mut Kernel, tile: Tile, (room, own): (Buf, Val), sums: &[Val]) -> Val {
    let (lane, line) = (k.lane_index(), tile.line());
    let place = k.eval(own + lane * line);
    // Lanes without a column do as the last one does.
    let column = k.min(lane, tile.columns - 1);
    let column = k.eval(own + column);
    let results = k.eval(own + WARP * line);
    for r in 0..HELD {
        for (four, sums) in (0..).step_by(4).zip(sums.chunks_exact((4 * HELD) as usize)) {
            k.store_four(first(&sums[(4 * r) as usize..]), room, place + four);
        }
        k.settle();
        let nothing = k.float(0.0, F32);
        // Four at a time, which do not wait for each other.
        let [x, y, z, w] = {
            let sums = k.fold(0, WARP, 4, &[nothing; 4], |k, lane, sums| {
                let begin = k.eval(column + lane * line);
                let add = |(i, &sum): (u64, &Val)| {
                    let x = k.load_here(room, begin + i * line);
                    k.add(sum, x)
                };
                (0..).zip(sums).map(add).collect()
            });
            first(&sums)
        };
        let (x, y) = (k.add(x, y), k.add(z, w));
        let sum = k.add(x, y);
        k.store_here(sum, room, results + r * WARP + lane);
        k.settle();
    }
    results
}
