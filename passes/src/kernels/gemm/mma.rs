//! Matmul with frozen weights in half precision, by a GPU's tensor cores; sums are in f32.
//!
//! ```text
//! for each 32 steps of k
//!   a warp: fragments of 16 × 16 sums, in registers, from one stage of shared memory
//!   A[128 rows, 32] and B[32, 64 columns] of a step to come ─► another stage
//! ```
//!
//! B is packed once, tile after tile [⌈n/64⌉][⌈k/32⌉][32][64], two columns a word. From sm_80 on A is rounded where it is
//! made, or by a launch of its own, and chips copy both to their stages themselves, several steps ahead; of a narrow
//! result tiles have 64 rows, so that there are enough of them. Before, both pass through registers on their way, and A
//! is rounded there.
//!
//! Chips before sm_80 have no bf16, and f16 reaches from 6·10⁻⁵ to 65504: adjoints would be nothing in it. There a
//! warp's rows of A are multiplied by a power of two that brings the largest number so far near 2¹⁰; where one comes
//! that this would bring beyond 2¹⁵, the power is a smaller one from there on, and the sums shrink with it.

use peft_runtime::artifact::{Element, Extent};

use super::epilogue::{Ending, Fate, Out, rows_left};
use super::{Buffers, Product};
use crate::abi::arguments;
use crate::builder::mma::{Half, Operand, SIDE, SUMS};
use crate::builder::{Buf, Code, F32, I32, Kernel, Order, Val, define, first};
use crate::cost::{Launched, SHARED, Work, cycles, way_out};
use crate::kernels::Scheduled;
use crate::kernels::epilogue::Epilogue;
use crate::kernels::math;
use crate::target::Machine;
use crate::target::cuda::{self, Card, WARP, WARPS};

/// Rows, columns and steps of k of a tile.
pub const ROWS: u64 = 128;
pub const COLUMNS: u64 = 64;
pub const DEPTH: u64 = 32;
/// Of a result of not so many columns tiles have fewer rows.
pub const FEWER: u64 = 64;
/// Fragments of a warp's sums across.
pub const ACROSS: u64 = COLUMNS / SIDE;
const THREADS: u64 = WARP * WARPS;
/// From row to row in shared memory, in words of two numbers: rows that a fragment reads at once lie in banks apart.
const LINE_A: u64 = DEPTH / 2 + 4;
const LINE_B: u64 = COLUMNS / 2 + 4;
/// The same for sums on their way out, in floats.
const LINE_C: u64 = COLUMNS + 4;
/// Blocks of large tiles that a multiprocessor is to hold at once: with less than 128 registers for each thread.
const RESIDENT: u64 = 4;
/// Words of shared memory that a block may have, and stages that are worth having.
const WORDS: u64 = (48 << 10) / 4;
const STAGES: u64 = 5;
/// Words of a packed tile of B.
pub const TILE: u64 = DEPTH * COLUMNS / 2;
/// What a thread fetches through registers: of A in fours along k, of B in fours of words.
const FOURS_A: u64 = ROWS * DEPTH / 4 / THREADS;
const FOURS_B: u64 = TILE / 4 / THREADS;
/// Fours of words that a row of A has in a stage.
const FOURS: u64 = DEPTH / 2 / 4;
/// Rows of A that a warp fetches at once.
const ROWS_AT_ONCE: u64 = WARP * 4 / DEPTH;
/// Exponents: what the largest number is brought to, and what it may reach.
const NEAR: i64 = 10;
const FAR: i64 = 15;
const _: () =
    assert!(COLUMNS == cuda::TILE && FOURS_A * THREADS * 4 == ROWS * DEPTH && (ROWS * LINE_A).is_multiple_of(8));

/// A tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Form {
    pub half: Half,
    pub rows: u64,
    /// Rows of A, which pass through registers, are read in fours: they begin at multiples of four, and so do they end.
    pub fours: bool,
}

impl Form {
    /// The chip copies operands to their stages by itself.
    pub fn copies(self) -> bool {
        self.half == Half::BF16
    }

    /// Fragments of a warp's sums down.
    pub fn down(self) -> u64 {
        self.rows / WARPS / SIDE
    }

    fn sums(self) -> usize {
        (self.down() * ACROSS) as usize * SUMS
    }

    /// Words of shared memory for a tile of either operand.
    fn stage(self) -> u64 {
        self.rows * LINE_A + DEPTH * LINE_B
    }

    fn stages(self) -> u64 {
        if self.copies() { (WORDS / self.stage()).min(STAGES) } else { 2 }
    }

    /// For the stages, and then for the sums of a warp's row of fragments.
    fn room(self) -> u64 {
        (self.stages() * self.stage()).max(WARPS * SIDE * LINE_C)
    }
}

arguments! { PackBuffers { from, to } }
arguments! {
    PackSizes {
        n, depth,
        /// Tiles along k.
        tiles,
        along, deep,
        /// The first element.
        start,
    }
}

/// Packs B: one tile a unit; beyond the operand there are zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pack {
    pub half: Half,
}

impl Scheduled for Pack {
    fn word(&self) -> String {
        format!("pack_{}", self.half.name())
    }

    fn emit(&self, machine: Machine) -> Code {
        let half = self.half;
        let elements = PackBuffers { from: Element::F32, to: Element::I32 }.list();
        define(machine, &elements, PackSizes::<Val>::COUNT, |k, buffers, sizes| {
            let PackBuffers { from, to } = PackBuffers::of(buffers);
            let PackSizes { n, depth, tiles, along, deep, start } = PackSizes::of(sizes);
            k.units(|k, unit| {
                let (column, step) = (k.div(unit, tiles), k.rem(unit, tiles));
                let (column, step, target) = (k.eval(column * COLUMNS), k.eval(step * DEPTH), k.eval(unit * TILE));
                let column = k.eval(column + k.lane_index() * 2);
                let next = k.eval(column + 1);
                let places = [column, next].map(|column| {
                    let there = k.compare(column, Order::Lt, n);
                    (there, k.eval(start + column * along))
                });
                k.each(0, DEPTH, 1, |k, s| {
                    let step = k.eval(step + s);
                    let exists = k.compare(step, Order::Lt, depth);
                    let offset = k.mul(step, deep);
                    let pair = places.map(|(there, place)| {
                        let here = k.and(there, exists);
                        let nothing = k.float(0.0, F32);
                        k.load_if(here, from, place + offset, nothing)
                    });
                    let word = k.word(half, pair);
                    k.store_vector(word, to, target + s * (COLUMNS / 2));
                });
            });
        })
    }
}

/// Numbers of a row that a lane rounds.
pub const EACH: u64 = 8;

arguments! {
    RoundSizes {
        depth,
        /// Of a row.
        pieces,
        /// Words from row to row of the result.
        line,
        /// From row to row of the operand, and its first element.
        along, start,
    }
}

/// Rounds A: a unit is a piece of a row; beyond the row there are zeros. Its buffers are [`PackBuffers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Round {
    pub half: Half,
    /// Rows are read in fours: they begin at multiples of four, and so do they end.
    pub fours: bool,
}

impl Scheduled for Round {
    fn word(&self) -> String {
        format!("round_{}{}", self.half.name(), if self.fours { "_fours" } else { "" })
    }

    fn emit(&self, machine: Machine) -> Code {
        let Round { half, fours } = *self;
        let elements = PackBuffers { from: Element::F32, to: Element::I32 }.list();
        define(machine, &elements, RoundSizes::<Val>::COUNT, |k, buffers, sizes| {
            let PackBuffers { from, to } = PackBuffers::of(buffers);
            let RoundSizes { depth, pieces, line, along, start } = RoundSizes::of(sizes);
            k.units(|k, unit| {
                let (row, piece) = (k.div(unit, pieces), k.rem(unit, pieces));
                let step = k.eval(piece * (EACH * WARP) + k.lane_index() * EACH);
                let begin = k.eval(start + row * along);
                let mut numbers = vec![];
                for four in (0..EACH).step_by(4) {
                    let steps = [0, 1, 2, 3].map(|i| k.eval(step + (four + i)));
                    let there = steps.map(|step| k.compare(step, Order::Lt, depth));
                    let at = steps.map(|step| k.eval(begin + step));
                    if fours {
                        numbers.extend(k.load_four_if(there[0], from, at[0]));
                    } else {
                        let nothing = k.float(0.0, F32);
                        numbers.extend(at.iter().zip(there).map(|(&at, there)| k.load_if(there, from, at, nothing)));
                    }
                }
                let words: Vec<Val> = numbers.chunks_exact(2).map(|pair| k.word(half, [pair[0], pair[1]])).collect();
                let word = k.eval(step / 2);
                let exists = k.compare(word, Order::Lt, line);
                k.when(exists, |k| {
                    k.store_four(words.try_into().expect("half as many"), to, row * line + word);
                });
            });
        })
    }
}

arguments! {
    Sizes {
        m, n, depth,
        /// Tiles beside each other.
        across,
        line_a, first_a,
        /// Words from one row of tiles along k to the next.
        line_b, first_b,
        line_c, first_c,
    }
}

/// One tile of the result a unit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mma {
    pub form: Form,
    pub fate: Fate,
    pub epilogue: Epilogue,
}

impl Mma {
    /// Sizes and units of a product whose B is packed: it steps along by words from one row of tiles to the next.
    pub fn arguments(&self, product: &Product) -> (Vec<Extent>, Extent) {
        let Product { m, n, depth, a, b, c, .. } = product;
        let (down, across) = product.tiles(self.form.rows, COLUMNS);
        let sizes = Sizes {
            m,
            n,
            depth,
            across: &across,
            line_a: &a.along,
            first_a: &a.first,
            line_b: &b.along,
            first_b: &b.first,
            line_c: &c.line,
            first_c: &c.first,
        };
        (sizes.map(Extent::clone).list(), down * across.clone() * Extent::Const(WARPS))
    }
}

impl Scheduled for Mma {
    fn word(&self) -> String {
        let fours = if self.form.fours { "_fours" } else { "" };
        format!("halves_{}_{}{fours}{}", self.form.half.name(), self.form.rows, self.fate.suffix())
    }

    fn emit(&self, machine: Machine) -> Code {
        let Mma { form, fate, epilogue } = self;
        let (form, fate) = (*form, *fate);
        let a = if form.copies() { Element::I32 } else { Element::F32 };
        let own = Buffers { a, b: Element::I32, c: Element::F32 }.list();
        epilogue.define(machine, &own, Sizes::<Val>::COUNT, |k, buffers, sizes, follows| {
            let Buffers { a, b, c } = Buffers::of(buffers);
            let sizes = Sizes::of(sizes);
            let Sizes { m, n, depth, across, line_a, first_a, line_b, first_b, line_c, first_c } = sizes;
            let room = k.shared_words(form.room());
            let threads = Threads::of(k);
            if form.rows == ROWS && form.copies() && !epilogue.draws() {
                k.hold_blocks(RESIDENT);
            }
            k.block_units(|k, unit| {
                let (tile_row, tile_column) = (k.div(unit, across), k.rem(unit, across));
                let (row, column) = (k.eval(tile_row * form.rows), k.eval(tile_column * COLUMNS));
                let right = Right { buffer: b, start: k.eval(tile_column * line_b + first_b), depth };
                let zero = k.index(0);
                let mut out = Out {
                    ending: Ending { fate, epilogue, buffers, sizes: follows },
                    to: c,
                    base: first_c,
                    line: line_c,
                    batch: zero,
                    column,
                    n,
                    width: COLUMNS,
                    room: room.floats(),
                    back: None,
                };
                // The unit before is on its way out through the same room.
                k.barrier();
                let sums = if form.copies() {
                    let left = Rounded::of(k, &threads, a, (row, m), (line_a, first_a), form.rows);
                    copied(k, form, &threads, room, (&left, &right))
                } else {
                    let left = Left::of(k, &threads, a, (row, m), (line_a, first_a), form);
                    let (sums, scale) = through_registers(k, form, &threads, room, (&left, &right));
                    let one = k.float(1.0, F32);
                    out.back = Some(k.div(one, scale));
                    sums
                };
                k.barrier();
                write(k, &out, &threads, (row, m), &sums, form.down());
            });
        })
    }

    fn work(&self, launched: Launched, card: &Card) -> Work {
        let Launched { sizes, units, .. } = launched;
        let Mma { form, epilogue, .. } = self;
        let Sizes { m, n, depth, .. } = Sizes::of(sizes).map(|n| n as f64);
        let blocks = units.div_ceil(WARPS);
        let step = cycles((form.rows * COLUMNS * DEPTH) as f64, card, card.half_flops);
        // On sm_70 two threads hold every number of an operand.
        let copies = if form.copies() { 1 } else { 2 };
        let fragments = WARPS * DEPTH / SIDE * (form.down() + ACROSS) * copies;
        let shared = (fragments * SIDE * SIDE + (form.rows + COLUMNS) * DEPTH) * 2;
        let out = way_out(epilogue.sum.is_some(), form.rows, COLUMNS);
        let steps = (depth / DEPTH as f64).ceil();
        let cycles = steps * step.max(shared as f64 / SHARED) + out;
        let number_of_a = if form.copies() { 2.0 } else { 4.0 };
        let reads = vec![number_of_a * m * depth, 2.0 * n * depth];
        let fetched = blocks as f64 * depth * (number_of_a * form.rows as f64 + 2.0 * COLUMNS as f64);
        let (flops, blocks) = (2.0 * m * n * depth, vec![(blocks, cycles)]);
        Work { flops, half: true, blocks, reads, under_way: f64::INFINITY, fetched, ..Work::default() }
    }

    fn anew(&self) -> Vec<usize> {
        self.fate.anew()
    }
}

/// A tile's sums, of operands that the chip copies, as many steps ahead as there are stages but one.
fn copied(k: &mut Kernel, form: Form, threads: &Threads, room: Buf, (left, right): (&Rounded, &Right)) -> Vec<Val> {
    let depth = right.depth;
    let ahead = form.stages() - 1;
    let copy = |k: &mut Kernel, block: Val, word: Val| {
        let stage = Stage::at(k, form, room, word);
        left.copy(k, threads, (block, depth), stage.a);
        right.copy(k, threads, block, stage.b);
        k.commit_copies();
    };
    for step in 0..ahead {
        let (block, word) = (k.index(step * DEPTH), k.index(step * form.stage()));
        copy(k, block, word);
    }
    let nothing = k.float(0.0, F32);
    let zero = k.index(0);
    let last = k.index(ahead * form.stage());
    let carried = [vec![zero, last], vec![nothing; form.sums()]].concat();
    let carried = k.fold(0, depth, DEPTH, &carried, |k, block, carried| {
        let ([here, there], sums) = (first(carried), &carried[2..]);
        k.await_copies_but(ahead - 1);
        // This stage is filled, and the step before is done with the one that is filled next.
        k.barrier();
        let next = k.eval(block + ahead * DEPTH);
        copy(k, next, there);
        let stage = Stage::at(k, form, room, here);
        let sums = multiply(k, form, threads, stage, sums);
        let after = [here, there].map(|word| {
            let after = k.eval(word + form.stage());
            let round = k.compare(after, Order::Eq, form.stages() * form.stage());
            k.select(round, zero, after)
        });
        [&after[..], &sums].concat()
    });
    k.await_copies_but(0);
    carried[2..].to_vec()
}

/// A tile's sums, of operands that pass through registers, and the scale that brings A into the reach of f16.
fn through_registers(
    k: &mut Kernel,
    form: Form,
    threads: &Threads,
    room: Buf,
    (left, right): (&Left, &Right),
) -> (Vec<Val>, Val) {
    let depth = right.depth;
    let zero = k.index(0);
    let stage = Stage::at(k, form, room, zero);
    let fetched_a = left.fetch(k, threads, zero, depth);
    let fetched_b = right.fetch(k, threads, zero);
    let most = largest(k, &fetched_a);
    let scale = power(k, most);
    left.share(k, threads, stage.a, &fetched_a, scale);
    right.share(k, threads, stage.b, &fetched_b);
    let nothing = k.float(0.0, F32);
    let carried = [vec![zero, scale], vec![nothing; form.sums()]].concat();
    let carried = k.fold(0, depth, DEPTH, &carried, |k, block, carried| {
        let ([stage, scale], sums) = (first(carried), &carried[2..]);
        // This stage is filled, and the steps before are done with the other.
        k.barrier();
        let here = Stage::at(k, form, room, stage);
        let other = k.eval(form.stage() - stage);
        let there = Stage::at(k, form, room, other);
        let next = k.eval(block + DEPTH);
        let fetched_a = left.fetch(k, threads, next, depth);
        let fetched_b = right.fetch(k, threads, next);
        let sums = multiply(k, form, threads, here, sums);
        let scaled = within_reach(k, &fetched_a, &sums, scale);
        left.share(k, threads, there.a, &fetched_a, scaled[0]);
        right.share(k, threads, there.b, &fetched_b);
        [&[other], &scaled[..]].concat()
    });
    (carried[2..].to_vec(), carried[1])
}

/// Where a thread stands.
struct Threads {
    thread: Val,
    warp: Val,
    lane: Val,
}

impl Threads {
    fn of(k: &mut Kernel) -> Threads {
        let thread = k.thread();
        Threads { thread, warp: k.eval(thread / WARP), lane: k.lane_index() }
    }
}

/// Where the operands' tiles lie of which the sums are made at a time.
#[derive(Clone, Copy)]
struct Stage {
    a: Buf,
    b: Buf,
}

impl Stage {
    fn at(k: &mut Kernel, form: Form, room: Buf, word: Val) -> Stage {
        let a = k.from(room, word);
        Stage { a, b: k.from(a, form.rows * LINE_A) }
    }
}

/// Of rows so far below `row`: where each begins, and whether it exists.
fn rows_below(
    k: &mut Kernel,
    (row, m): (Val, Val),
    (line, start): (Val, Val),
    below: impl Iterator<Item = u64>,
) -> Vec<(Val, Val)> {
    let rows = below.map(|down| {
        let row = k.eval(row + down);
        let there = k.compare(row, Order::Lt, m);
        (k.eval(start + row * line), there)
    });
    rows.collect()
}

/// A block's rows of A, rounded: of every so many'th row a thread has four words copied.
struct Rounded {
    buffer: Buf,
    /// By row of the thread: its words there, and whether it exists.
    rows: Vec<(Val, Val)>,
}

impl Rounded {
    fn of(
        k: &mut Kernel,
        threads: &Threads,
        buffer: Buf,
        (row, m): (Val, Val),
        (line, start): (Val, Val),
        rows: u64,
    ) -> Rounded {
        let (own, word) = Rounded::own(k, threads);
        let row = k.eval(row + own);
        let start = k.eval(start + word);
        let below = (0..rows).step_by((THREADS / FOURS) as usize);
        Rounded { buffer, rows: rows_below(k, (row, m), (line, start), below) }
    }

    /// The thread's first row, and its first word there.
    fn own(k: &mut Kernel, threads: &Threads) -> (Val, Val) {
        (k.eval(threads.thread / FOURS), k.eval(threads.thread % FOURS * 4))
    }

    fn copy(&self, k: &mut Kernel, threads: &Threads, (block, depth): (Val, Val), to: Buf) {
        let (row, word) = Rounded::own(k, threads);
        let place = k.eval(row * LINE_A + word);
        let (step, begin) = (k.eval(word * 2), k.eval(block / 2));
        let within = k.compare(block + step, Order::Lt, depth);
        for (n, &(row, there)) in (0..).zip(&self.rows) {
            let here = k.and(there, within);
            let place = place + n * THREADS / FOURS * LINE_A;
            k.copy_four_if(here, (self.buffer, row + begin), (to, place));
        }
    }
}

/// A warp's own rows of A: a thread fetches four numbers of every fourth row.
struct Left {
    buffer: Buf,
    /// By row that the thread fetches: where it begins, and whether it exists.
    rows: Vec<(Val, Val)>,
    form: Form,
}

impl Left {
    fn of(
        k: &mut Kernel,
        threads: &Threads,
        buffer: Buf,
        (row, m): (Val, Val),
        (line, start): (Val, Val),
        form: Form,
    ) -> Left {
        let (own, _) = Left::own(k, threads);
        let row = k.eval(row + own);
        let below = (0..FOURS_A).map(|n| n * ROWS_AT_ONCE);
        Left { buffer, rows: rows_below(k, (row, m), (line, start), below), form }
    }

    /// The thread's first row, and its first step.
    fn own(k: &mut Kernel, threads: &Threads) -> (Val, Val) {
        let (down, step) = (k.eval(threads.lane / (DEPTH / 4)), k.eval(threads.lane % (DEPTH / 4)));
        (k.eval(threads.warp * (ROWS / WARPS) + down), k.eval(step * 4))
    }

    fn fetch(&self, k: &mut Kernel, threads: &Threads, block: Val, depth: Val) -> Vec<Val> {
        let (_, step) = Left::own(k, threads);
        let step = k.eval(block + step);
        let nothing = k.float(0.0, F32);
        let mut fetched = vec![];
        let within: Vec<Val> = (0..4).map(|i| k.compare(step + i, Order::Lt, depth)).collect();
        for &(begin, there) in &self.rows {
            let at = k.eval(begin + step);
            if self.form.fours {
                let here = k.and(there, within[0]);
                fetched.extend(k.load_four_if(here, self.buffer, at));
                continue;
            }
            for (i, &within) in within.iter().enumerate() {
                let here = k.and(there, within);
                fetched.push(k.load_if(here, self.buffer, at + i as u64, nothing));
            }
        }
        fetched
    }

    fn share(&self, k: &mut Kernel, threads: &Threads, to: Buf, fetched: &[Val], scale: Val) {
        let (row, step) = Left::own(k, threads);
        let at = k.eval(row * LINE_A + step / 2);
        for (n, four) in fetched.chunks_exact(4).enumerate() {
            let at = k.eval(at + n as u64 * ROWS_AT_ONCE * LINE_A);
            for (i, pair) in four.chunks_exact(2).enumerate() {
                let pair = [pair[0], pair[1]].map(|x| k.mul(x, scale));
                let word = k.word(self.form.half, pair);
                k.store_here(word, to, at + i as u64);
            }
        }
    }
}

/// Of a warp's numbers.
fn largest(k: &mut Kernel, fetched: &[Val]) -> Val {
    let nothing = k.float(0.0, F32);
    let most = fetched.iter().fold(nothing, |most, &x| {
        let x = math::magnitude(k, x);
        k.greater(most, x)
    });
    k.max_lanes(most)
}

/// What a warp's numbers are to be multiplied by, and its sums so far as if they had been.
fn within_reach(k: &mut Kernel, fetched: &[Val], sums: &[Val], scale: Val) -> Vec<Val> {
    let most = largest(k, fetched);
    let grown = k.mul(most, scale);
    let limit = k.float((1 << FAR) as f64, F32);
    let beyond = k.compare(grown, Order::Gt, limit);
    let same = [&[scale], sums].concat();
    k.either_of(beyond, &same, |k| {
        let now = power(k, most);
        let by = k.div(now, scale);
        let mut all = vec![now];
        all.extend(sums.iter().map(|&sum| k.mul(sum, by)));
        all
    })
}

/// The power of two that brings `most` near 2^NEAR.
fn power(k: &mut Kernel, most: Val) -> Val {
    let bits = k.bits(most);
    let [place, bias, least, greatest] = [23, 127, 127 - 100, 127 + 100].map(|n| k.int(n, I32));
    let exponent = k.shift_right(bits, place);
    // So far from the ends that the power does not leave the range of `f32`.
    let exponent = k.max(exponent, least);
    let exponent = k.min(exponent, greatest);
    let away = k.sub(exponent, bias);
    let near = k.int(NEAR + 127, I32);
    let power = k.sub(near, away);
    let bits = k.shift_left(power, place);
    k.from_bits(bits)
}

/// A block's columns of B: a thread sees to every so many'th four of its words.
struct Right {
    buffer: Buf,
    start: Val,
    depth: Val,
}

impl Right {
    /// The places of the thread's fours in the tile from a step on, which exists.
    fn places(&self, k: &mut Kernel, threads: &Threads, block: Val) -> (Val, Vec<Val>) {
        let here = k.compare(block, Order::Lt, self.depth);
        let at = k.eval(self.start + (block / DEPTH * TILE + threads.thread * 4));
        let places = (0..FOURS_B).map(|n| k.eval(at + n * THREADS * 4));
        (here, places.collect())
    }

    fn fetch(&self, k: &mut Kernel, threads: &Threads, block: Val) -> Vec<Val> {
        let (here, places) = self.places(k, threads, block);
        places.into_iter().flat_map(|at| k.load_four_if(here, self.buffer, at)).collect()
    }

    fn copy(&self, k: &mut Kernel, threads: &Threads, block: Val, to: Buf) {
        let (here, places) = self.places(k, threads, block);
        for (n, at) in (0..).zip(places) {
            let place = Right::place(k, threads, n);
            k.copy_four_if(here, (self.buffer, at), (to, place));
        }
    }

    fn share(&self, k: &mut Kernel, threads: &Threads, to: Buf, fetched: &[Val]) {
        for (n, words) in fetched.chunks_exact(4).enumerate() {
            let at = Right::place(k, threads, n as u64);
            for (i, &word) in words.iter().enumerate() {
                k.store_here(word, to, at + i as u64);
            }
        }
    }

    /// Of a thread's `n`th four words in their stage.
    fn place(k: &mut Kernel, threads: &Threads, n: u64) -> Val {
        let (row, column) = (k.eval(threads.thread / (COLUMNS / 8)), k.eval(threads.thread % (COLUMNS / 8)));
        let (begin, column) = (k.eval(row * LINE_B), k.eval(column * 4));
        k.eval(begin + column + n * THREADS / (COLUMNS / 8) * LINE_B)
    }
}

/// A warp's fragments of sums with the steps of a stage.
fn multiply(k: &mut Kernel, form: Form, threads: &Threads, stage: Stage, sums: &[Val]) -> Vec<Val> {
    let Form { half, .. } = form;
    let mut sums: Vec<Vec<Val>> = sums.chunks_exact(SUMS).map(<[Val]>::to_vec).collect();
    let start = k.eval(threads.warp * (form.down() * SIDE * LINE_A));
    for step in (0..DEPTH).step_by(SIDE as usize) {
        let left: Vec<Vec<Val>> = (0..form.down())
            .map(|i| k.load_fragment(half, Operand::A, stage.a, start + (i * SIDE * LINE_A + step / 2), 2 * LINE_A))
            .collect();
        for j in 0..ACROSS {
            let right = k.load_fragment(half, Operand::B, stage.b, step * LINE_B + j * SIDE / 2, 2 * LINE_B);
            for (i, left) in left.iter().enumerate() {
                let sum = &mut sums[i * ACROSS as usize + j as usize];
                *sum = k.multiply_fragments(half, left, &right, sum);
            }
        }
    }
    sums.concat()
}

/// A row of fragments after the other, through a part of shared memory that is the warp's own.
fn write(k: &mut Kernel, out: &Out, threads: &Threads, (row, m): (Val, Val), sums: &[Val], down: u64) {
    let own = k.eval(threads.warp * (SIDE * LINE_C));
    let first = k.eval(row + threads.warp * (down * SIDE));
    for (i, fragments) in sums.chunks_exact(ACROSS as usize * SUMS).enumerate() {
        for (j, sums) in fragments.chunks_exact(SUMS).enumerate() {
            k.store_fragment(sums, out.room, own + j as u64 * SIDE, LINE_C);
        }
        k.settle();
        let first = k.eval(first + i as u64 * SIDE);
        let rows = rows_left(k, (first, m), SIDE);
        out.write_all(k, rows, |k, r| {
            let at = k.eval(r * LINE_C);
            (k.eval(first + r), k.eval(own + at))
        });
        k.settle();
    }
}
