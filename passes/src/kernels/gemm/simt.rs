//! Matmul on a GPU: a block's threads compute a tile of the result, step by step along k.
//!
//! ```text
//! for each 16 steps of k
//!   A[64 rows, 16] and B[16, 64 columns] ─► shared memory, [16][64] both
//!   a thread: sums of 8 rows × 4 columns, in registers
//! sums ─► shared memory, row by row ─► what follows the product
//! ```
//!
//! A result of no more than 32 columns or rows has tiles of half that width. Where a weight's gradient has few tiles,
//! blocks share a tile's steps and their sums are added up afterwards. Other products of few columns and many steps are
//! [`super::skinny`]'s.
//!
//! Operands are read where they lie, by their steps along rows, columns and k: nothing is packed. Neighbouring threads
//! fetch what lies side by side.

use peft_runtime::artifact::{Element, Extent};

use super::epilogue::{Ending, Fate, Out, rows_left};
use super::{Buffers, Product};
use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, Index, Kernel, Order, Val};
use crate::cost::{Launched, SHARED, Work, cycles, way_out};
use crate::kernels::Scheduled;
use crate::kernels::epilogue::Epilogue;
use crate::target::Machine;
use crate::target::cuda::{Card, WARP, WARPS};

/// Rows or columns of a tile where the product has few.
pub const NARROW: u64 = 32;
/// Steps along k between two visits of the operands.
const DEPTH: u64 = 16;
/// Those of one turn of the loop, in which what the next ones want is fetched while others are multiplied.
const TURN: u64 = 4;
/// Columns of a tile that one thread holds.
const COLUMNS: u64 = 4;
/// From one step of k to the next in shared memory it is so much further than a tile, or threads that store along k
/// would all want the same bank.
const APART: u64 = 4;
const THREADS: u64 = WARP * WARPS;
/// Rows of a thread that are in shared memory at once, on their way out.
const PART: u64 = 4;

/// A tile's rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    pub rows: u64,
    pub columns: u64,
}

impl Tile {
    pub fn elements(self) -> u64 {
        self.rows * self.columns
    }

    /// Rows that one thread holds: fours of them.
    fn held(self) -> u64 {
        self.elements() / (THREADS * COLUMNS)
    }

    /// What a step of k takes of shared memory, in floats: threads read for their sums, and a column and a row are put
    /// there.
    pub fn moved(self) -> u64 {
        THREADS * (self.held() + COLUMNS) + self.rows + self.columns
    }

    /// Rows of threads that a warp is.
    fn lines(self) -> u64 {
        WARP * COLUMNS / self.columns
    }

    /// What a warp has of shared memory for the rows on their way out.
    fn own(self) -> u64 {
        self.lines() * PART * (self.columns + APART)
    }
}

arguments! {
    Sizes {
        m, n, depth,
        /// Tiles of a batch.
        down, across,
        batches,
        /// Steps along k of a block.
        steps,
        along_a, deep_a, area_a, first_a,
        along_b, deep_b, area_b, first_b,
        line_c,
        /// From one batch, or one block's share, to the next.
        area_c,
        first_c,
    }
}

/// One tile a unit. Where blocks share a tile's steps, each has a result of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Simt {
    pub tile: Tile,
    /// Rows of A lie side by side, columns of B do.
    pub contiguous: [bool; 2],
    pub fate: Fate,
    pub epilogue: Epilogue,
}

impl Simt {
    /// Sizes and units of a product of whose tiles so many blocks share each.
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
            along_a: &a.along,
            deep_a: &a.deep,
            area_a: &a.area,
            first_a: &a.first,
            along_b: &b.along,
            deep_b: &b.deep,
            area_b: &b.area,
            first_b: &b.first,
            line_c: &c.line,
            area_c: &if shares > 1 { product.whole() } else { c.area.clone() },
            first_c: &c.first,
        };
        (sizes.map(Extent::clone).list(), units)
    }
}

impl Scheduled for Simt {
    fn word(&self) -> String {
        let [a, b] = self.contiguous;
        let side = |contiguous| if contiguous { "columns" } else { "rows" };
        let Tile { rows, columns } = self.tile;
        format!("tiles_{rows}x{columns}_{}_{}{}", side(a), side(!b), self.fate.suffix())
    }

    fn emit(&self, machine: Machine) -> Code {
        let Simt { tile, contiguous, fate, epilogue } = self;
        let (tile, fate) = (*tile, *fate);
        let (held, (line_a, line_b)) = (tile.held(), (tile.rows + APART, tile.columns + APART));
        let own = [Element::F32; Buffers::<Val>::COUNT];
        epilogue.define(machine, &own, Sizes::<Val>::COUNT, |k, buffers, sizes, follows| {
            let Buffers { a, b, c } = Buffers::of(buffers);
            let sizes = Sizes::of(sizes);
            let Sizes { m, n, depth, down, across, batches, steps, .. } = sizes;
            let Sizes { line_c, area_c, first_c, .. } = sizes;
            let left = [sizes.along_a, sizes.deep_a, sizes.area_a, sizes.first_a];
            let right = [sizes.along_b, sizes.deep_b, sizes.area_b, sizes.first_b];
            let part_a = k.shared((DEPTH * (line_a + line_b)).max(WARPS * tile.own()));
            let part_b = k.from(part_a, DEPTH * line_a);
            let thread = k.thread();
            let wide = tile.columns / COLUMNS;
            let (column, row) = (k.eval(thread % wide), k.eval(thread / wide));
            let (column, row) = (k.eval(column * COLUMNS), k.eval(row * held));
            k.block_units(|k, unit| {
                let (rest, tile_column) = (k.div(unit, across), k.rem(unit, across));
                let (lead, tile_row) = (k.div(rest, down), k.rem(rest, down));
                let (share, batch) = (k.div(lead, batches), k.rem(lead, batches));
                let begin = k.eval(share * steps);
                let depth = k.min(begin + steps, depth);
                let (first_row, first_column) = (k.eval(tile_row * tile.rows), k.eval(tile_column * tile.columns));
                let left = Source::of(k, a, left, batch, (first_row, m), tile.rows, contiguous[0]);
                let right = Source::of(k, b, right, batch, (first_column, n), tile.columns, contiguous[1]);
                let nothing = k.float(0.0, F32);
                let base = k.eval(first_c + lead * area_c);
                let out = Out {
                    ending: Ending { fate, epilogue, buffers, sizes: follows },
                    to: c,
                    base,
                    line: line_c,
                    batch,
                    column: first_column,
                    n,
                    width: tile.columns,
                    room: part_a,
                    back: None,
                };
                let fetch = |k: &mut Kernel, block: Val| {
                    let end = k.eval(depth - block);
                    [&left, &right].map(|side| side.fetch(k, block, end))
                };
                let fetched = fetch(k, begin);
                let (count, first_b) = ((held * COLUMNS) as usize, fetched[0].len());
                let carried = [vec![nothing; count], fetched.concat()].concat();
                let carried = k.fold(begin, depth, DEPTH, &carried, |k, block, carried| {
                    let (sums, fetched) = carried.split_at(count);
                    let (x, y) = fetched.split_at(first_b);
                    // The steps before are done with what they share.
                    k.barrier();
                    left.share(k, part_a, x);
                    right.share(k, part_b, y);
                    k.barrier();
                    // On their way while these are multiplied.
                    let next = k.eval(block + DEPTH);
                    let fetched = fetch(k, next);
                    let sums = k.fold(0, DEPTH, TURN, sums, |k, step, sums| {
                        (0..TURN).fold(sums.to_vec(), |sums, ahead| {
                            let step = k.eval(step + ahead);
                            let (at_a, at_b) = (k.eval(step * line_a), k.eval(step * line_b));
                            let (at_a, at_b) = (k.eval(at_a + row), k.eval(at_b + column));
                            let fours = (0..held).step_by(4).flat_map(|ahead| k.load_four(part_a, at_a + ahead));
                            let x: Vec<Val> = fours.collect();
                            let y = k.load_four(part_b, at_b);
                            let pairs = x.iter().flat_map(|&x| y.map(|y| (x, y)));
                            pairs.zip(sums).map(|((x, y), sum)| k.fma(x, y, sum)).collect()
                        })
                    });
                    [sums, fetched.concat()].concat()
                });
                let sums = &carried[..count];
                k.barrier();
                let warp = k.eval(thread / WARP);
                let own = k.eval(warp * tile.own());
                // The warp's rows of threads, one below the other.
                let below = k.eval(k.lane_index() / wide);
                let place = k.eval(own + below * PART * line_b + column);
                let first_row = k.eval(first_row + warp * (tile.lines() * held));
                for part in (0..held).step_by(PART as usize) {
                    for (i, &sum) in sums[(part * COLUMNS) as usize..][..(PART * COLUMNS) as usize].iter().enumerate() {
                        let (r, c) = (i as u64 / COLUMNS, i as u64 % COLUMNS);
                        k.store_here(sum, part_a, place + (r * line_b + c));
                    }
                    k.settle();
                    // The first of each row of threads, from which on there are as many as one holds.
                    let first_of = |below: Index| first_row + (below * held + part);
                    let zero = k.index(0);
                    let count = (0..tile.lines()).fold(zero, |count, below| {
                        let first = k.eval(first_of(below.into()));
                        let left = rows_left(k, (first, m), PART);
                        k.eval(count + left)
                    });
                    out.write_all(k, count, |k, r| {
                        let (below, rest) = (k.eval(r / PART), k.eval(r % PART));
                        let first = k.eval(first_of(below.into()));
                        let at = k.eval(r * line_b);
                        (k.eval(first + rest), k.eval(own + at))
                    });
                    k.settle();
                }
            });
        })
    }

    fn work(&self, launched: Launched, card: &Card) -> Work {
        let Launched { sizes, units, .. } = launched;
        let Simt { tile, epilogue, .. } = self;
        let Sizes { m, n, depth, batches, steps, .. } = Sizes::of(sizes).map(|n| n as f64);
        let blocks = units.div_ceil(WARPS);
        let step = cycles(tile.elements() as f64, card, card.flops);
        let out = way_out(epilogue.sum.is_some(), tile.rows, tile.columns);
        let cycles = steps.min(depth) * step.max((tile.moved() * 4) as f64 / SHARED) + out;
        let flops = 2.0 * m * n * depth * batches;
        let reads = [m, n].map(|side| 4.0 * side * depth * batches).into();
        let fetched = blocks as f64 * steps.min(depth) * ((tile.rows + tile.columns) * 4) as f64;
        let blocks = vec![(blocks, cycles)];
        Work { flops, blocks, reads, under_way: f64::INFINITY, fetched, ..Work::default() }
    }

    fn anew(&self) -> Vec<usize> {
        self.fate.anew()
    }
}

/// A tile's rows of A or columns of B, and which of them a thread fetches.
struct Source {
    buffer: Buf,
    /// Where the tile's first one begins, and the steps to the next and along k.
    base: Val,
    along: Val,
    deep: Val,
    /// How many of the tile's there are, and how many there may be.
    count: Val,
    side: u64,
    /// The thread's first element: of the tile, and along k.
    i: Val,
    step: Val,
    /// From one of its elements to the next.
    next: (u64, u64),
}

impl Source {
    fn of(
        k: &mut Kernel,
        buffer: Buf,
        lie: [Val; 4],
        batch: Val,
        (start, end): (Val, Val),
        side: u64,
        contiguous: bool,
    ) -> Source {
        let [along, deep, area, first] = lie;
        let area = k.eval(batch * area);
        let base = k.eval(start * along + area + first);
        let width = if contiguous { side } else { DEPTH };
        let thread = k.thread();
        let (fast, slow) = (k.eval(thread % width), k.eval(thread / width));
        let ((i, step), next) = match contiguous {
            true => ((fast, slow), (0, THREADS / width)),
            false => ((slow, fast), (THREADS / width, 0)),
        };
        Source { buffer, base, along, deep, count: k.eval(end - start), side, i, step, next }
    }

    /// Place n of the thread's, in the tile and along k.
    fn place(&self, k: &mut Kernel, n: u64) -> (Val, Val) {
        (k.eval(self.i + n * self.next.0), k.eval(self.step + n * self.next.1))
    }

    /// The thread's elements of the steps from `block` on, of which there are `end`; 0 for those that do not exist.
    fn fetch(&self, k: &mut Kernel, block: Val, end: Val) -> Vec<Val> {
        let nothing = k.float(0.0, F32);
        let start = k.eval(self.base + block * self.deep);
        let element = |n| {
            let (i, step) = self.place(k, n);
            let (there, here) = (k.compare(i, Order::Lt, self.count), k.compare(step, Order::Lt, end));
            let exists = k.and(there, here);
            k.load_if(exists, self.buffer, start + (i * self.along + step * self.deep), nothing)
        };
        (0..self.side * DEPTH / THREADS).map(element).collect()
    }

    fn share(&self, k: &mut Kernel, to: Buf, elements: &[Val]) {
        for (n, &x) in elements.iter().enumerate() {
            let (i, step) = self.place(k, n as u64);
            k.store_here(x, to, step * (self.side + APART) + i);
        }
    }
}
