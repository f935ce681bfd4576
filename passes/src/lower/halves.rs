//! Matmul with frozen weights in half precision, by a GPU's tensor cores; sums are in f32.
//!
//! ```text
//! for each 32 steps of k
//!   a warp: 2 × 4 fragments of 16 × 16 sums, in registers, from one stage of shared memory
//!   the next A[128 rows, 32], rounded, and B[32, 64 columns] ─► the other stage
//! ```
//!
//! A passes through registers, and so does B before sm_80; later chips copy it to its stage themselves.
//!
//! B is packed once, tile after tile [⌈n/64⌉][⌈k/32⌉][32][64], two columns a word.
//!
//! Chips before sm_80 have no bf16, and f16 reaches from 6·10⁻⁵ to 65504: adjoints would be nothing in it. There a
//! warp's rows of A are multiplied by a power of two that brings the largest number so far near 2¹⁰; where one comes
//! that this would bring beyond 2¹⁵, the power is a smaller one from there on, and the sums shrink with it.

use peft_runtime::artifact::{BufferId, Element, Extent, Storage};

use super::epilogue::Epilogue;
use super::kernel::matrix::{Half, Operand, SIDE, SUMS};
use super::kernel::{Buf, Code, F32, I32, Kernel, Order, Val, define, first};
use super::tiles::{Fate, Out, Shape, Side, To};
use super::{Lowering, Place, math, tiles};
use crate::cuda::{Chip, WARP, WARPS};
use crate::machine::Machine;

/// Rows, columns and steps of k of a tile.
pub(super) const ROWS: u64 = 128;
pub(super) const COLUMNS: u64 = 64;
pub(super) const DEPTH: u64 = 32;
/// Fragments of a warp's sums, down and across.
pub(super) const DOWN: u64 = ROWS / WARPS / SIDE;
pub(super) const ACROSS: u64 = COLUMNS / SIDE;
const THREADS: u64 = WARP * WARPS;
/// From row to row in shared memory, in words of two numbers: rows that a fragment reads at once lie in banks apart.
const LINE_A: u64 = DEPTH / 2 + 4;
const LINE_B: u64 = COLUMNS / 2 + 4;
/// The same for sums on their way out, in floats.
const LINE_C: u64 = COLUMNS + 4;
/// Words of shared memory for a tile of either operand.
const STAGE: u64 = ROWS * LINE_A + DEPTH * LINE_B;
/// For two stages, and then for the sums of a warp's row of fragments.
const ROOM: u64 = {
    let (operands, sums) = (2 * STAGE, WARPS * SIDE * LINE_C);
    if operands > sums { operands } else { sums }
};
/// Words of a packed tile of B.
const TILE: u64 = DEPTH * COLUMNS / 2;
/// What a thread fetches: of A in fours along k, of B in fours of words.
const FOURS_A: u64 = ROWS * DEPTH / 4 / THREADS;
const FOURS_B: u64 = TILE / 4 / THREADS;
/// Rows of A that a warp fetches at once.
const ROWS_AT_ONCE: u64 = WARP * 4 / DEPTH;
/// Exponents: what the largest number is brought to, and what it may reach.
const NEAR: i64 = 10;
const FAR: i64 = 15;
const _: () =
    assert!(COLUMNS == tiles::TILE && FOURS_A * THREADS * 4 == ROWS * DEPTH && (ROWS * LINE_A).is_multiple_of(8));

/// Which kernel.
#[derive(Clone, Copy)]
struct Form {
    half: Half,
    /// Rows of A are read in fours: they begin at multiples of four, and so do they end.
    fours: bool,
    fate: Fate,
}

impl Form {
    /// f16 wants A brought into its reach.
    fn scales(self) -> bool {
        self.half == Half::F16
    }
}

impl Lowering<'_, '_, '_> {
    /// A product with a packed operand.
    pub(super) fn launch_halves(
        &mut self,
        half: Half,
        Shape { m, n, depth, .. }: Shape,
        (a, left): (BufferId, Side),
        packed: Packed,
        to: To,
    ) {
        let multiple = |extent: &Extent| matches!(extent, Extent::Const(n) if n.is_multiple_of(4));
        let whole = matches!(self.target.buffers[a].storage, Storage::Temporary | Storage::Prepared);
        let fours = whole && [&left.along, &left.first, &depth].into_iter().all(multiple);
        let form = Form { half, fours, fate: to.fate };
        let tiles = |n: &Extent, size| Extent::CeilDiv(Box::new(n.clone()), size);
        let (down, across) = (tiles(&m, ROWS), tiles(&n, COLUMNS));
        let units = down * across.clone() * Extent::Const(WARPS);
        let mut sizes = vec![m, n, depth, across, left.along, left.first, packed.line, packed.first];
        sizes.extend([to.line, to.first]);
        let epilogue = to.epilogue;
        self.label = epilogue.label(&self.label);
        let fours = if form.fours { "_fours" } else { "" };
        let name = format!("halves_{}{fours}{}{}", half.name(), form.fate.suffix(), epilogue.suffix());
        let kernel = self.target.kernel(&name, |machine| halves_kernel(machine, form, &epilogue));
        sizes.extend(epilogue.sizes);
        self.launch(kernel, [vec![a, packed.buffer, to.buffer], epilogue.buffers].concat(), sizes, units);
    }

    /// A frozen operand's tiles: the same ones if it has been packed before. `n` and `depth` are all of it.
    pub(super) fn pack_halves(
        &mut self,
        half: Half,
        place: &Place,
        side: &Side,
        (n, depth): (Extent, Extent),
    ) -> Packed {
        let source = place.frozen.as_ref().expect("only what is frozen is packed");
        let key = format!("halves({source}, {} of {side:?}, {n:?} {depth:?})", half.name());
        let tiles = |n: &Extent, size| Extent::CeilDiv(Box::new(n.clone()), size);
        let deep = tiles(&depth, DEPTH);
        let units = tiles(&n, COLUMNS) * deep.clone();
        let line = deep.clone() * Extent::Const(TILE);
        let known = self.target.bound.get(&key).copied();
        let buffer = known.unwrap_or_else(|| {
            let own = self.frozen.replace(key.clone());
            let shape = vec![units.clone() * Extent::Const(TILE)];
            let buffer = self.target.bind(&key, Element::I32, shape, Storage::Prepared);
            let name = format!("pack_{}", half.name());
            let kernel = self.target.kernel(&name, |machine| pack_kernel(machine, half));
            let label = std::mem::replace(&mut self.label, "pack".into());
            let sizes = vec![n, depth, deep, side.along.clone(), side.deep.clone(), side.first.clone()];
            self.launch(kernel, vec![place.buffer, buffer], sizes, units);
            self.label = label;
            self.frozen = own;
            buffer
        });
        Packed { buffer, line, first: Extent::Const(0) }
    }
}

/// A packed operand, of which a product may take some.
pub(super) struct Packed {
    pub buffer: BufferId,
    /// Words from one row of tiles along k to the next.
    line: Extent,
    first: Extent,
}

impl Packed {
    /// From a column, or from a step of k on: a multiple of a tile's.
    pub fn from(self, column: u64, step: u64) -> Packed {
        assert!(column.is_multiple_of(COLUMNS) && step.is_multiple_of(DEPTH));
        let first = self.line.clone() * Extent::Const(column / COLUMNS) + Extent::Const(step / DEPTH * TILE);
        Packed { first, ..self }
    }
}

/// One tile a unit; beyond the operand there are zeros.
fn pack_kernel(machine: Machine, half: Half) -> Code {
    define(machine, &[Element::F32, Element::I32], 6, |k, buffers, sizes| {
        let ([from, to], [n, depth, tiles, along, deep, start]) = (first(buffers), first(sizes));
        k.units(|k, unit| {
            let (column, step) = (k.div(unit, tiles), k.rem(unit, tiles));
            let (columns, steps, size) = (k.index(COLUMNS), k.index(DEPTH), k.index(TILE));
            let (column, step, target) = (k.mul(column, columns), k.mul(step, steps), k.mul(unit, size));
            let lane = k.lane_index();
            let (one, two) = (k.index(1), k.index(2));
            let ahead = k.mul(lane, two);
            let column = k.add(column, ahead);
            let next = k.add(column, one);
            let places = [column, next].map(|column| {
                let there = k.compare(column, Order::Lt, n);
                let place = k.mul(column, along);
                (there, k.add(start, place))
            });
            let zero = k.index(0);
            k.each(zero, steps, 1, |k, s| {
                let step = k.add(step, s);
                let exists = k.compare(step, Order::Lt, depth);
                let offset = k.mul(step, deep);
                let pair = places.map(|(there, place)| {
                    let here = k.and(there, exists);
                    let at = k.add(place, offset);
                    let nothing = k.float(0.0, F32);
                    k.load_if(here, from, at, nothing)
                });
                let word = k.word(half, pair);
                let line = k.index(COLUMNS / 2);
                let at = k.mul(s, line);
                let at = k.add(target, at);
                k.store_vector(word, to, at);
            });
        });
    })
}

/// Sizes of the kernel, without its epilogue's.
const SIZES: usize = 10;

/// One tile of the result a unit.
fn halves_kernel(machine: Machine, form: Form, epilogue: &Epilogue) -> Code {
    let elements = [&[Element::F32, Element::I32, Element::F32], &epilogue.elements[..]].concat();
    define(machine, &elements, SIZES + epilogue.sizes.len(), |k, buffers, sizes| {
        let [a, b, c] = first(buffers);
        let [m, n, depth, across, line_a, first_a, line_b, first_b] = first(sizes);
        let [line_c, first_c] = first(&sizes[8..]);
        let room = k.shared_words(ROOM);
        let copies = matches!(machine, Machine::Cuda(chip) if chip >= Chip::Sm80);
        let threads = Threads::of(k);
        k.block_units(|k, unit| {
            let (tile_row, tile_column) = (k.div(unit, across), k.rem(unit, across));
            let (rows, columns) = (k.index(ROWS), k.index(COLUMNS));
            let (row, column) = (k.mul(tile_row, rows), k.mul(tile_column, columns));
            let left = Left::of(k, &threads, a, (row, m), (line_a, first_a), form);
            let start_b = k.mul(tile_column, line_b);
            let right = Right { buffer: b, start: k.add(start_b, first_b), depth, copies };
            let zero = k.index(0);
            let stage = Stage::at(k, room, zero);
            // The unit before is on its way out through the same room.
            k.barrier();
            let fetched_a = left.fetch(k, &threads, zero, depth);
            let fetched_b = right.fetch(k, &threads, zero, stage);
            let scale = form.scales().then(|| {
                let most = largest(k, &fetched_a);
                power(k, most)
            });
            left.share(k, &threads, stage.a, &fetched_a, scale);
            right.share(k, &threads, stage.b, &fetched_b);
            let nothing = k.float(0.0, F32);
            let sums = (DOWN * ACROSS) as usize * SUMS;
            let carried: Vec<Val> = [zero].into_iter().chain(vec![nothing; sums]).chain(scale).collect();
            let carried = k.fold(zero, depth, DEPTH, &carried, |k, block, carried| {
                let (stage, (sums, scale)) = (carried[0], carried[1..].split_at(sums));
                right.arrived(k);
                // This stage is filled, and the steps before are done with the other.
                k.barrier();
                let here = Stage::at(k, room, stage);
                let (size, deep) = (k.index(STAGE), k.index(DEPTH));
                let other = k.sub(size, stage);
                let there = Stage::at(k, room, other);
                let next = k.add(block, deep);
                let fetched_a = left.fetch(k, &threads, next, depth);
                let fetched_b = right.fetch(k, &threads, next, there);
                let sums = multiply(k, form.half, &threads, here, sums);
                let scaled = match scale {
                    [scale] => within_reach(k, &fetched_a, &sums, *scale),
                    _ => sums,
                };
                let scale = form.scales().then(|| scaled[0]);
                left.share(k, &threads, there.a, &fetched_a, scale);
                right.share(k, &threads, there.b, &fetched_b);
                [&[other], &scaled[usize::from(form.scales())..], scale.as_slice()].concat()
            });
            right.arrived(k);
            k.barrier();
            let (sums, scale) = carried[1..].split_at(sums);
            let back = scale.first().map(|&scale| {
                let one = k.float(1.0, F32);
                k.div(one, scale)
            });
            let out = Out {
                fate: form.fate,
                epilogue,
                buffers,
                sizes: &sizes[SIZES..],
                to: c,
                base: first_c,
                line: line_c,
                batch: zero,
                column,
                n,
                width: COLUMNS,
                room: room.floats(),
                sum: &|k, sum| back.map_or(sum, |back| k.mul(sum, back)),
            };
            write(k, &out, &threads, (row, m), sums);
        });
    })
}

/// Where a thread stands.
struct Threads {
    thread: Val,
    warp: Val,
    lane: Val,
}

impl Threads {
    fn of(k: &mut Kernel) -> Threads {
        let (thread, width) = (k.thread(), k.index(WARP));
        Threads { thread, warp: k.div(thread, width), lane: k.lane_index() }
    }
}

/// Where the operands' tiles lie of which the sums are made at a time.
#[derive(Clone, Copy)]
struct Stage {
    a: Buf,
    b: Buf,
}

impl Stage {
    fn at(k: &mut Kernel, room: Buf, word: Val) -> Stage {
        let a = k.from(room, word);
        Stage { a, b: k.beyond(a, ROWS * LINE_A) }
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
        let rows = (0..FOURS_A).map(|n| {
            let down = k.index(n * ROWS_AT_ONCE);
            let row = k.add(row, own);
            let row = k.add(row, down);
            let there = k.compare(row, Order::Lt, m);
            let begin = k.mul(row, line);
            (k.add(start, begin), there)
        });
        Left { buffer, rows: rows.collect(), form }
    }

    /// The thread's first row, and its first step.
    fn own(k: &mut Kernel, threads: &Threads) -> (Val, Val) {
        let (fours, four, rows) = (k.index(DEPTH / 4), k.index(4), k.index(ROWS / WARPS));
        let (down, step) = (k.div(threads.lane, fours), k.rem(threads.lane, fours));
        let row = k.mul(threads.warp, rows);
        (k.add(row, down), k.mul(step, four))
    }

    fn fetch(&self, k: &mut Kernel, threads: &Threads, block: Val, depth: Val) -> Vec<Val> {
        let (_, step) = Left::own(k, threads);
        let step = k.add(block, step);
        let nothing = k.float(0.0, F32);
        let mut fetched = vec![];
        let within: Vec<Val> = (0..4)
            .map(|i| {
                let i = k.index(i);
                let step = k.add(step, i);
                k.compare(step, Order::Lt, depth)
            })
            .collect();
        for &(begin, there) in &self.rows {
            let at = k.add(begin, step);
            if self.form.fours {
                let here = k.and(there, within[0]);
                fetched.extend(k.load_four_if(here, self.buffer, at));
                continue;
            }
            for (i, &within) in within.iter().enumerate() {
                let (i, here) = (k.index(i as u64), k.and(there, within));
                let at = k.add(at, i);
                fetched.push(k.load_if(here, self.buffer, at, nothing));
            }
        }
        fetched
    }

    fn share(&self, k: &mut Kernel, threads: &Threads, to: Buf, fetched: &[Val], scale: Option<Val>) {
        let (row, step) = Left::own(k, threads);
        let (line, two) = (k.index(LINE_A), k.index(2));
        let (begin, half) = (k.mul(row, line), k.div(step, two));
        let at = k.add(begin, half);
        for (n, four) in fetched.chunks_exact(4).enumerate() {
            let down = k.index(n as u64 * ROWS_AT_ONCE * LINE_A);
            let at = k.add(at, down);
            for (i, pair) in four.chunks_exact(2).enumerate() {
                let pair = [pair[0], pair[1]].map(|x| scale.map_or(x, |scale| k.mul(x, scale)));
                let word = k.word(self.form.half, pair);
                let i = k.index(i as u64);
                let at = k.add(at, i);
                k.store_here(word, to, at);
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

/// A block's columns of B: a thread sees to every so many'th four of its words, at once or, where the chip copies, in the
/// end.
struct Right {
    buffer: Buf,
    start: Val,
    depth: Val,
    /// The chip copies it by itself.
    copies: bool,
}

impl Right {
    /// The words of the tile from a step on; none if they go to their stage by themselves.
    fn fetch(&self, k: &mut Kernel, threads: &Threads, block: Val, stage: Stage) -> Vec<Val> {
        let here = k.compare(block, Order::Lt, self.depth);
        let (step, size, four) = (k.index(DEPTH), k.index(TILE), k.index(4));
        let tile = k.div(block, step);
        let tile = k.mul(tile, size);
        let at = k.mul(threads.thread, four);
        let at = k.add(tile, at);
        let at = k.add(self.start, at);
        let mut fetched = vec![];
        for n in 0..FOURS_B {
            let ahead = k.index(n * THREADS * 4);
            let at = k.add(at, ahead);
            if self.copies {
                let to = Right::place(k, threads, n);
                k.copy_four_if(here, (self.buffer, at), (stage.b, to));
            } else {
                fetched.extend(k.load_four_if(here, self.buffer, at));
            }
        }
        fetched
    }

    fn share(&self, k: &mut Kernel, threads: &Threads, to: Buf, fetched: &[Val]) {
        for (n, words) in fetched.chunks_exact(4).enumerate() {
            let at = Right::place(k, threads, n as u64);
            for (i, &word) in words.iter().enumerate() {
                let i = k.index(i as u64);
                let at = k.add(at, i);
                k.store_here(word, to, at);
            }
        }
    }

    /// What the thread has on its way is there.
    fn arrived(&self, k: &mut Kernel) {
        if self.copies {
            k.await_copies();
        }
    }

    /// Of a thread's `n`th four words in their stage.
    fn place(k: &mut Kernel, threads: &Threads, n: u64) -> Val {
        let fours = k.index(COLUMNS / 8);
        let (row, column) = (k.div(threads.thread, fours), k.rem(threads.thread, fours));
        let (line, four) = (k.index(LINE_B), k.index(4));
        let (begin, column) = (k.mul(row, line), k.mul(column, four));
        let at = k.add(begin, column);
        let down = k.index(n * THREADS / (COLUMNS / 8) * LINE_B);
        k.add(at, down)
    }
}

/// A warp's fragments of sums with the steps of a stage.
fn multiply(k: &mut Kernel, half: Half, threads: &Threads, stage: Stage, sums: &[Val]) -> Vec<Val> {
    let mut sums: Vec<Vec<Val>> = sums.chunks_exact(SUMS).map(<[Val]>::to_vec).collect();
    let rows = k.index(DOWN * SIDE * LINE_A);
    let start = k.mul(threads.warp, rows);
    for step in (0..DEPTH).step_by(SIDE as usize) {
        let left: Vec<Vec<Val>> = (0..DOWN)
            .map(|i| {
                let at = k.index(i * SIDE * LINE_A + step / 2);
                let at = k.add(start, at);
                k.load_fragment(half, Operand::A, stage.a, at, 2 * LINE_A)
            })
            .collect();
        for j in 0..ACROSS {
            let at = k.index(step * LINE_B + j * SIDE / 2);
            let right = k.load_fragment(half, Operand::B, stage.b, at, 2 * LINE_B);
            for (i, left) in left.iter().enumerate() {
                let sum = &mut sums[i * ACROSS as usize + j as usize];
                *sum = k.multiply_fragments(half, left, &right, sum);
            }
        }
    }
    sums.concat()
}

/// A row of fragments after the other, through a part of shared memory that is the warp's own.
fn write(k: &mut Kernel, out: &Out, threads: &Threads, (row, m): (Val, Val), sums: &[Val]) {
    let size = k.index(SIDE * LINE_C);
    let own = k.mul(threads.warp, size);
    let warp_rows = k.index(DOWN * SIDE);
    let first = k.mul(threads.warp, warp_rows);
    let first = k.add(row, first);
    for (i, fragments) in sums.chunks_exact(ACROSS as usize * SUMS).enumerate() {
        for (j, sums) in fragments.chunks_exact(SUMS).enumerate() {
            let at = k.index(j as u64 * SIDE);
            let at = k.add(own, at);
            k.store_fragment(sums, out.room, at, LINE_C);
        }
        k.settle();
        let before = k.index(i as u64 * SIDE);
        let first = k.add(first, before);
        let (zero, side) = (k.index(0), k.index(SIDE));
        let left = k.sub(m, first);
        let rows = k.min(left, side);
        k.each(zero, rows, 1, |k, r| {
            let line = k.index(LINE_C);
            let at = k.mul(r, line);
            let at = k.add(own, at);
            let row = k.add(first, r);
            out.write(k, row, at);
        });
        k.settle();
    }
}
