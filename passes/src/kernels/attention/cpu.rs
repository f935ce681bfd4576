//! Attention whose square exists nowhere, on a processor (a GPU's is in [`super::gpu`]): a unit is one head of one
//! sequence, and of its square there are never more than [`ROWS`] rows, or the columns of one [`group`].
//!
//! ```text
//! forward     4 queries · keysᵀ               ─► weights   weights · values        ─► f
//! backward, group by group of keys:
//!             4 queries · keysᵀ, df · valuesᵀ ─► ds, w     ds · keys               ─► added to dq
//!             4 keys, when all queries are done            dsᵀ · queries, wᵀ · df  ─► dk, dv
//! ```
//!
//! Lanes run over keys; what stands on their side is transposed first, into a place of the unit's own. Backward, weights
//! are computed again from the scores and their log-sum-exp, once for all the adjoints that are wanted.
//!
//! One call of the generator decides over four neighbouring columns, and keys need not begin at a multiple of four:
//! they stand in *slots*, key j in slot `phase + j`, so that a slot's block is a call's.

use peft_runtime::artifact::Element;

use super::shape::{Form, Head, HeadSizes, Part, ROWS, Rows, Segment, vectors, zeros};
use crate::abi::arguments;
use crate::builder::{Access, Buf, Code, Kernel, LANES, Order, Val, define};
use crate::kernels::Scheduled;
use crate::kernels::span::Span;
use crate::kernels::{math, philox, rowwise};
use crate::target::{Machine, VECTORS};

/// One call of the generator decides over a vector of each of a block's rows.
const _: () = assert!(LANES == ROWS * philox::EACH);

/// Floats a sequence has room for beyond its length: rounded up with its phase, so that vectors need no masks.
pub const SLACK: u64 = VECTORS * LANES + ROWS;

/// Steps of a sum that are one turn of its loop.
const STEPS: u64 = 8;

/// Rows that memory is asked for before they are read: they are too short for the processor to see where the next begins.
const AHEAD: u64 = 8;

/// Columns of a tile. As many keys are a group, whose scores are computed and used before the next group's.
fn group(machine: Machine) -> u64 {
    machine.vectors_across() * LANES
}

/// Numbers that are kept for each of a sequence's tokens beside rows of the operands: forward scores of a block's rows,
/// backward what becomes of those of a group.
pub fn beside(part: Part, machine: Machine) -> u64 {
    if part.forward() { ROWS } else { 2 * group(machine) }
}

arguments! {
    /// What a kernel has beside its operands and results: room for every sequence, its length rounded up.
    RoomBuffers {
        /// For transposed operands.
        first, second,
        /// For what the weights multiply.
        factor, other,
        /// For [`beside`].
        rows,
        offsets,
    }
}

/// A unit is one head of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CpuAttention {
    pub part: Part,
    pub form: Form,
}

impl Scheduled for CpuAttention {
    fn word(&self) -> String {
        self.part.word() + &self.form.suffix()
    }

    fn emit(&self, machine: Machine) -> Code {
        let CpuAttention { part, form } = *self;
        let float = Element::F32;
        let (first, second, factor, other, rows) = (float, float, float, float, float);
        let room = RoomBuffers { first, second, factor, other, rows, offsets: Element::I32 };
        let elements = [part.elements(form), room.list()].concat();
        define(machine, &elements, part.sizes(), |k, buffers, sizes| {
            let room = Room::of(k, RoomBuffers::split_last(buffers).1, HeadSizes::of(sizes), part);
            k.units(|k, unit| {
                let unit = Unit::of(k, unit, &room, (buffers, sizes), (part, form));
                match part {
                    Part::Forward | Part::Both => forward(k, &unit),
                    Part::Lse => lse(k, &unit),
                    Part::Adjoint(_) | Part::Sides | Part::All => backward(k, &unit, part),
                }
            });
        })
    }
}

/// Room for what is computed on the way. Of all units that a thread takes in one go there is room for each, side by
/// side; all of them use the place of the first, so that it stays in the nearest caches.
struct Room {
    /// Transposed operands, and where they begin.
    first: (Buf, Val),
    second: (Buf, Val),
    /// For what the weights multiply.
    factor: (Buf, Val),
    other: (Buf, Val),
    /// Scores, or what becomes of a group's.
    rows: (Buf, Val),
}

impl Room {
    fn of(k: &mut Kernel, buffers: RoomBuffers<Buf>, sizes: HeadSizes<Val>, part: Part) -> Room {
        let RoomBuffers { first, second, factor, other, rows, offsets } = buffers;
        let HeadSizes { width, wide, count: heads, .. } = sizes;
        let unit = k.first_unit();
        let segment = segment(k, unit, heads, offsets);
        // Before it are all heads of earlier sequences, and some of this one.
        let place = k.eval(segment.start * heads + segment.head * segment.length + unit * SLACK);
        let (narrow, broad) = (k.eval(place * width), k.eval(place * wide));
        let rows_at = k.eval(place * beside(part, k.machine));
        Room {
            first: (first, narrow),
            second: (second, broad),
            factor: (factor, narrow),
            other: (other, broad),
            rows: (rows, rows_at),
        }
    }
}

/// One head of one sequence, with its room.
struct Unit<'a> {
    head: Head,
    room: &'a Room,
}

impl<'a> Unit<'a> {
    fn of(
        k: &mut Kernel,
        unit: Val,
        room: &'a Room,
        (buffers, sizes): (&[Buf], &[Val]),
        (part, form): (Part, Form),
    ) -> Self {
        let (buffers, RoomBuffers { offsets, .. }) = RoomBuffers::split_last(buffers);
        let segment = segment(k, unit, HeadSizes::of(sizes).count, offsets);
        Unit { head: Head::of(k, segment, (buffers, sizes), (part, form)), room }
    }

    /// How many keys query `i` sees.
    fn limit(&self, k: &mut Kernel, i: Val) -> Val {
        if self.head.form.causal { k.eval(i + 1) } else { self.head.segment.length }
    }

    /// The keys in `count` slots from `slot` on; where there is none, the nearest.
    fn keys(&self, k: &mut Kernel, slot: Val, count: u64) -> Vec<Val> {
        let last = k.eval(self.head.segment.length - 1);
        let key = |r| {
            let slot = k.max(slot + r, self.head.phase);
            k.min(slot - self.head.phase, last)
        };
        (0..count).map(key).collect()
    }

    /// The generator's key, if anything is dropped.
    fn generator(&self, k: &mut Kernel) -> Option<[Val; 2]> {
        self.head.rng.map(|rng| philox::key(k, rng))
    }
}

fn segment(k: &mut Kernel, unit: Val, heads: Val, offsets: Buf) -> Segment {
    let (sequence, head) = (k.div(unit, heads), k.rem(unit, heads));
    Segment::of(k, (head, sequence), offsets)
}

/// Rows of an operand, turned: lanes run over slots, and column e begins at `at + e · stride`.
struct Turned {
    buffer: Buf,
    at: Val,
    stride: Val,
}

/// The rows of `from` that stand in `count` slots from `slot` on; where there is none, the nearest.
fn transpose(k: &mut Kernel, unit: &Unit, from: &Rows, width: Val, (slot, count): (Val, Val), to: &Turned) {
    let turned = transpose_squares(k, unit, from, width, (slot, count), to, k.register());
    let last = k.eval(unit.head.segment.length - 1);
    let [line, last] = [from.line, last].map(|x| philox::lanes_of(k, x));
    let numbers = k.lane_numbers();
    let all = k.mask(LANES);
    k.each(turned, width, 1, |k, e| {
        let source = k.eval(from.row(0) + e);
        let column = k.eval(to.at + e * to.stride);
        k.each(0, count, LANES, |k, i| {
            let key = k.eval(slot + i - unit.head.phase);
            let key = philox::lanes_of(k, key);
            let key = k.add(key, numbers);
            let none = k.int(0, key.ty);
            let key = k.max(key, none);
            let key = k.min(key, last);
            let steps = k.mul(key, line);
            let x = k.gather_lanes(from.buffer, source, steps, all);
            k.store_vector(x, to.buffer, column + i);
        });
    });
}

/// The same for as many columns as whole squares of `side` take, in registers; gives how many they are.
fn transpose_squares(
    k: &mut Kernel,
    unit: &Unit,
    from: &Rows,
    width: Val,
    (slot, count): (Val, Val),
    to: &Turned,
    side: u64,
) -> Val {
    let whole = k.eval(width / side * side);
    let ahead = k.eval(from.line * AHEAD);
    k.each(0, count, side, |k, i| {
        let slot = k.eval(slot + i);
        let rows: Vec<Val> = unit.keys(k, slot, side).into_iter().map(|key| k.eval(from.row(key))).collect();
        let first = k.eval(to.at + i);
        k.each(0, whole, side, |k, e| {
            let load = |&row: &Val| {
                let place = k.eval(row + e);
                k.prefetch(from.buffer, place + ahead, Access::Read);
                k.load_some(from.buffer, place, side)
            };
            let square = rows.iter().map(load).collect();
            for (c, column) in k.turned(square).into_iter().enumerate() {
                k.store_vector(column, to.buffer, first + (e + c as u64) * to.stride);
            }
        });
    });
    whole
}

/// The unit's rows of `from` without what lies between them: they are read again and again, and rows that are a wide
/// tensor's width apart would want the same few lines of the cache.
fn gathered(k: &mut Kernel, unit: &Unit, from: &Rows, width: Val, (buffer, base): (Buf, Val)) -> Rows {
    let rows = Rows { buffer, base, line: width };
    k.each(0, unit.head.segment.length, 1, |k, i| {
        let [source, target, later] = [from.row(i), rows.row(i), from.row(i + AHEAD)].map(|row| k.eval(row));
        k.lanes(width, |k, e, mask| {
            k.prefetch(from.buffer, later + e, Access::Read);
            let x = k.load_lanes(from.buffer, source + e, mask);
            k.store_lanes(x, rows.buffer, target + e, mask);
        });
    });
    rows
}

/// A tile's sums: rows of `from`, which begin at `rows`, against the turned side's lanes from `j` on.
fn product(k: &mut Kernel, (from, rows): (Buf, &[Val]), width: Val, side: &Turned, j: Val) -> Vec<Val> {
    let column = k.eval(side.at + j);
    let (start, vectors) = (zeros(k), k.machine.vectors_across());
    k.fold_in_turns(0, width, STEPS, &start, |k, e, sums| {
        let place = k.eval(e * side.stride + column);
        let columns: Vec<Val> = (0..vectors).map(|v| k.load_vector(side.buffer, place + v * LANES)).collect();
        let x = |k: &mut Kernel, r: usize| k.load(from, rows[r] + e);
        k.outer(ROWS, x, &columns, sums, Kernel::fma)
    })
}

/// Where the weights of a tile's rows are.
struct Weights {
    buffer: Buf,
    base: Val,
    /// From one row's to the next one's, and from what multiplies a row of the factor to what multiplies the next.
    row: Val,
    step: Val,
}

/// A tile's sums: its rows' weights times rows `begin..end` of `y`, of which columns are taken.
fn weighted(k: &mut Kernel, weights: &Weights, (begin, end): (Val, Val), y: &Rows, columns: &[(Val, Val)]) -> Vec<Val> {
    let start = zeros(k);
    let lines: Vec<Val> = (0..ROWS).map(|r| k.eval(weights.base + r * weights.row)).collect();
    k.fold_in_turns(begin, end, STEPS, &start, |k, j, sums| {
        let row = k.eval(y.row(j));
        let values: Vec<Val> = columns.iter().map(|&(at, mask)| k.load_lanes(y.buffer, row + at, mask)).collect();
        let step = k.mul(j, weights.step);
        let weight = |k: &mut Kernel, r: usize| k.load(weights.buffer, lines[r] + step);
        k.outer(ROWS, weight, &values, sums, Kernel::fma)
    })
}

/// A tile's sums to rows of `out` from `i` on, as far as there are any; `more` is added to what is there.
fn put(k: &mut Kernel, unit: &Unit, i: Val, columns: &[(Val, Val)], sums: &[Val], (out, more): (&Rows, bool)) {
    for (r, sums) in sums.chunks(columns.len()).enumerate() {
        let row = k.eval(i + r as u64);
        // There is none before the first or beyond the last.
        let exists = k.below_unsigned(row, unit.head.segment.length);
        let row = k.eval(out.row(row));
        k.when(exists, |k| {
            for (&sum, &(at, mask)) in sums.iter().zip(columns) {
                let place = k.eval(row + at);
                let sum = if more {
                    let earlier = k.load_lanes(out.buffer, place, mask);
                    k.add(earlier, sum)
                } else {
                    sum
                };
                k.store_lanes(sum, out.buffer, place, mask);
            }
        });
    }
}

/// What queries make of all keys.
struct Scores {
    keys: Turned,
    /// Those of a block's row, and from one row to the next.
    base: Val,
    stride: Val,
}

impl Scores {
    fn of(k: &mut Kernel, unit: &Unit) -> Scores {
        let Head { segment, phase, width, .. } = &unit.head;
        let step = group(k.machine);
        let groups = k.div_up(segment.length + *phase, step);
        let stride = k.eval(groups * step);
        let (buffer, at) = unit.room.first;
        let keys = Turned { buffer, at, stride };
        transpose(k, unit, &unit.head.operands[1], *width, (*phase, segment.length), &keys);
        Scores { keys, base: k.eval(unit.room.rows.1 + *phase), stride }
    }

    /// Computes those of a block of queries with the keys that one of them sees; gives up to where that is.
    fn block(&self, k: &mut Kernel, unit: &Unit, i: Val, block: &[Val]) -> Val {
        let Head { operands, segment, form, width, .. } = &unit.head;
        let q = &operands[0];
        let rows: Vec<Val> = block.iter().map(|&i| k.eval(q.row(i))).collect();
        let lines: Vec<Val> = (0..block.len()).map(|r| self.line(k, r)).collect();
        let end = if form.causal { k.min(i + ROWS, segment.length) } else { segment.length };
        let vectors = k.machine.vectors_across();
        k.each(0, end, group(k.machine), |k, j| {
            let sums = product(k, (q.buffer, &rows), *width, &self.keys, j);
            let by = k.floats(form.scale.get());
            for (&line, sums) in lines.iter().zip(sums.chunks(vectors as usize)) {
                for (v, &sum) in sums.iter().enumerate() {
                    let sum = k.mul(sum, by);
                    k.store_vector(sum, unit.room.rows.0, line + j + v as u64 * LANES);
                }
            }
        });
        end
    }

    fn line(&self, k: &mut Kernel, r: usize) -> Val {
        k.eval(self.base + self.stride * r as u64)
    }
}

fn lse(k: &mut Kernel, unit: &Unit) {
    let scores = Scores::of(k, unit);
    k.each(0, unit.head.segment.length, ROWS, |k, i| {
        let block = unit.head.segment.rows(k, i, ROWS);
        scores.block(k, unit, i, &block);
        for (r, &row) in block.iter().enumerate() {
            let (line, limit) = (scores.line(k, r), unit.limit(k, row));
            let lse = rowwise::logsumexp(k, unit.room.rows.0, Span { base: line, length: limit });
            let out = &unit.head.results[0];
            k.store(lse, out.buffer, out.row(row));
        }
    });
}

fn forward(k: &mut Kernel, unit: &Unit) {
    let Head { operands, results, segment, form, wide, stream, column, phase, .. } = &unit.head;
    let (zero, one, rows) = (k.index(0), k.index(1), unit.room.rows.0);
    let generator = unit.generator(k);
    let scores = Scores::of(k, unit);
    let values = gathered(k, unit, &operands[2], *wide, unit.room.other);
    k.each(0, segment.length, ROWS, |k, i| {
        let block = segment.rows(k, i, ROWS);
        let end = scores.block(k, unit, i, &block);
        let weights = |(r, &row): (usize, &Val)| {
            let (line, limit) = (scores.line(k, r), unit.limit(k, row));
            let (most, total) = rowwise::exponentials(k, rows, Span { base: line, length: limit }, Some(rows));
            if let Some(out) = results.get(1) {
                let lse = rowwise::log_of(k, (most, total));
                k.store(lse, out.buffer, out.row(row));
            }
            (line, limit, rowwise::share(k, total))
        };
        let weights: Vec<(Val, Val, Val)> = block.iter().enumerate().map(weights).collect();
        let first = generator.map_or(zero, |_| *phase);
        let token = k.eval(segment.start + i);
        let drawn = [token, segment.head, *stream].map(|x| philox::lanes_of(k, x));
        k.each(0, end + first, LANES, |k, slot| {
            let words = generator.map(|key| {
                let column = k.eval(*column + slot);
                philox::draw_rows(k, key, column, drawn)
            });
            let at = k.eval(slot - first);
            for (r, &(line, limit, share)) in weights.iter().enumerate() {
                let place = k.eval(line + at);
                let e = k.load_vector(rows, place);
                let w = k.mul(e, share);
                let w = words.map_or(w, |words| philox::dropped(k, w, words[r], form.p.get()));
                // What stands beyond the limit may be anything.
                let seen = k.mask(limit - at);
                let nothing = k.floats(0.0);
                let w = k.select(seen, w, nothing);
                k.store_vector(w, rows, place);
            }
        });
        let weights = Weights { buffer: rows, base: scores.base, row: scores.stride, step: one };
        k.each(0, *wide, group(k.machine), |k, e| {
            let columns = vectors(k, e, *wide);
            let sums = weighted(k, &weights, (zero, end), &values, &columns);
            put(k, unit, i, &columns, &sums, (&results[0], false));
        });
    });
}

/// Adjoints, group by group of keys, over which lanes run. What a group makes of the queries' adjoint is added to what
/// earlier ones did.
fn backward(k: &mut Kernel, unit: &Unit, part: Part) {
    let Head { operands, results, segment, form, width, wide, phase, .. } = &unit.head;
    let [q, keys, v, _, df, _] = &operands[..] else { unreachable!("six operands") };
    let (zero, one, stride) = (k.index(0), k.index(1), k.index(group(k.machine)));
    let mut results = results.iter();
    let mut result = |operand| part.gives(operand).then(|| results.next().expect("a result"));
    let (of_queries, of_keys, of_values) = (result(0), result(1), result(2));
    let queries = of_keys.map(|out| (out, gathered(k, unit, q, *width, unit.room.factor), *width, zero));
    let adjoints = of_values.map(|out| (out, gathered(k, unit, df, *wide, unit.room.other), *wide, stride));
    let [turned_keys, turned_values] =
        [unit.room.first, unit.room.second].map(|(buffer, at)| Turned { buffer, at, stride });
    let (scratch, base) = unit.room.rows;
    let line = k.index(beside(part, k.machine));
    let generator = unit.generator(k);
    k.each(0, segment.length + *phase, group(k.machine), |k, slot| {
        transpose(k, unit, keys, *width, (slot, stride), &turned_keys);
        let values = part.of_scores().then_some(&turned_values);
        if let Some(turned) = values {
            transpose(k, unit, v, *wide, (slot, stride), turned);
        }
        // The key in lane 0, if there is one; the group's first and where it ends.
        let lane = k.eval(slot - *phase);
        let from = k.max(lane, 0);
        let end = k.min(lane + stride, segment.length);
        // Queries before the first key see none of them.
        let begin = if form.causal { from } else { zero };
        k.each(begin, segment.length, ROWS, |k, i| {
            let at = k.eval(base + i * line);
            block(k, unit, (slot, lane), (i, at, line), (&turned_keys, values), part, generator);
            let Some(out) = of_queries else { return };
            let again = k.compare(slot, Order::Gt, 0);
            let weights = Weights { buffer: scratch, base: k.eval(at - lane), row: line, step: one };
            k.each(0, *width, group(k.machine), |k, e| {
                let columns = vectors(k, e, *width);
                let sums = weighted(k, &weights, (from, end), keys, &columns);
                let write = |k: &mut Kernel, more| put(k, unit, i, &columns, &sums, (out, more));
                k.branch(again, |k| write(k, true), |k| write(k, false));
            });
        });
        for (out, factor, width, beside) in [&queries, &adjoints].into_iter().flatten() {
            k.each(0, *width, group(k.machine), |k, e| {
                let columns = vectors(k, e, *width);
                k.each(lane, end, ROWS, |k, key| {
                    let base = k.eval(base + (key - lane + *beside));
                    let weights = Weights { buffer: scratch, base, row: one, step: line };
                    let begin = if form.causal { k.max(key, 0) } else { zero };
                    let sums = weighted(k, &weights, (begin, segment.length), factor, &columns);
                    put(k, unit, key, &columns, &sums, (out, false));
                });
            });
        }
    });
}

/// What becomes of the scores of a block of queries from `i` on with a group's keys, to lines from `at` on: ds, and
/// behind it the weights. One is computed after the other, so that registers last.
fn block(
    k: &mut Kernel,
    unit: &Unit,
    (slot, lane): (Val, Val),
    (i, at, line): (Val, Val, Val),
    (keys, values): (&Turned, Option<&Turned>),
    part: Part,
    generator: Option<[Val; 2]>,
) {
    let Head { operands, segment, form, width, wide, stream, column, .. } = &unit.head;
    let [q, _, _, lse, df, corrections] = &operands[..] else { unreachable!("six operands") };
    let (zero, numbers, across) = (k.index(0), k.lane_numbers(), k.machine.vectors_across());
    let rows = segment.rows(k, i, ROWS);
    let [of_q, of_df] = [q, df].map(|of| rows.iter().map(|&i| k.eval(of.row(i))).collect::<Vec<Val>>());
    let number = |k: &mut Kernel, of: &Rows, r: usize| {
        let x = k.load(of.buffer, of.row(rows[r]));
        k.splat(x)
    };
    let token = k.eval(segment.start + i);
    let drawn = [token, segment.head, *stream].map(|x| philox::lanes_of(k, x));
    let offsets: Vec<u64> = (0..across).map(|v| v * LANES).collect();
    let words: Option<Vec<[Val; 4]>> = generator.map(|key| {
        let first = k.eval(*column + slot);
        let draw = |&offset: &u64| {
            let column = k.eval(first + offset);
            philox::draw_rows(k, key, column, drawn)
        };
        offsets.iter().map(draw).collect()
    });
    let places: Vec<(usize, usize)> = (0..rows.len()).flat_map(|r| (0..offsets.len()).map(move |v| (r, v))).collect();
    let dropped = |k: &mut Kernel, x: Val, (r, v): (usize, usize)| match &words {
        Some(words) => philox::dropped(k, x, words[v][r], form.p.get()),
        None => x,
    };
    let store = |k: &mut Kernel, x: Val, (r, v): (usize, usize), beside: Val| {
        k.store_vector(x, unit.room.rows.0, at + r as u64 * line + offsets[v] + beside);
    };
    let (by, nothing) = (k.floats(form.scale.get()), k.floats(0.0));
    let scores = product(k, (q.buffer, &of_q), *width, keys, zero);
    let weight = |(&s, &(r, v)): (&Val, &(usize, usize))| {
        let lse = number(k, lse, r);
        let s = k.mul(s, by);
        let s = k.sub(s, lse);
        let w = math::exp(k, s);
        let first = k.eval(lane + offsets[v]);
        let limit = unit.limit(k, rows[r]);
        let [first, limit] = [first, limit].map(|x| philox::lanes_of(k, x));
        let key = k.add(first, numbers);
        // Where there is no key before the first one, its number is below zero.
        let seen = k.below_unsigned(key, limit);
        k.select(seen, w, nothing)
    };
    let weights: Vec<Val> = scores.iter().zip(&places).map(weight).collect();
    if part.gives(2) {
        for (&w, &place) in weights.iter().zip(&places) {
            let w = dropped(k, w, place);
            store(k, w, place, keys.stride);
        }
    }
    let Some(values) = values else { return };
    let products = product(k, (df.buffer, &of_df), *wide, values, zero);
    for ((&dp, &w), &place) in products.iter().zip(&weights).zip(&places) {
        let correction = number(k, corrections, place.0);
        let dp = dropped(k, dp, place);
        let ds = k.add(dp, correction);
        let ds = k.mul(ds, w);
        let ds = k.mul(ds, by);
        store(k, ds, place, zero);
    }
}
