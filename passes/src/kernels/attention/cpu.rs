//! Fused attention on a CPU, after FlashAttention (Dao et al. 2022): the score matrix is never materialised. A unit is
//! one head of one sequence; at any time it holds the scores of [`ACCUMULATOR_ROWS`] queries (forward), or those of one
//! group of keys (backward). A GPU's kernel is in [`super::gpu`].
//!
//! ```text
//! forward     4 queries · keysᵀ               ─► weights   weights · values        ─► f
//! backward, one group of keys after the other:
//!             4 queries · keysᵀ, df · valuesᵀ ─► ds, w     ds · keys               ─► added to dq
//!             4 keys, after all queries                    dsᵀ · queries, wᵀ · df  ─► dk, dv
//! ```
//!
//! Lanes run along keys, so keys (and values, backward) are first transposed into scratch memory of the unit. The
//! backward pass recomputes the weights from the scores and their log-sum-exp, once for all adjoints that are asked
//! for.
//!
//! One call of the random generator decides dropout for four neighbouring columns, and keys need not begin at a
//! multiple of four. Keys are therefore placed in *slots*, key j in slot `phase + j`, so that each aligned group of
//! four slots is one call.

use peft_runtime::artifact::Element;

use super::shape::{
    ACCUMULATOR_ROWS, AttentionParams, AttentionResult, Head, HeadSizes, RowPointer, Segment, vectors, zeros,
};
use crate::abi::arguments;
use crate::builder::{Access, Buf, Code, Kernel, LANES, Order, Val, define};
use crate::kernels::Scheduled;
use crate::kernels::span::Span;
use crate::kernels::{math, philox, rowwise};
use crate::target::{ACCUMULATOR_VECTORS, Machine};

/// One call of the random generator decides over a vector of each row of a block of queries.
const _: () = assert!(LANES == ACCUMULATOR_ROWS * philox::COLUMNS_PER_CALL);

/// Floats of scratch that a sequence has beyond its length: the length and its phase are rounded up to whole vectors,
/// so that vectors need no masks.
pub const SLACK: u64 = ACCUMULATOR_VECTORS * LANES + ACCUMULATOR_ROWS;

/// Steps of a dot product in one iteration of the loop.
const UNROLL: u64 = 8;

/// The distance, in rows, at which rows are prefetched: they are too short for the hardware prefetcher to predict the
/// next one.
const PREFETCH_ROWS: u64 = 8;

/// Columns of a tile. A group has as many keys; the backward pass computes and uses a group's scores before those of
/// the next group.
fn key_group(machine: Machine) -> u64 {
    machine.accumulator_vectors() * LANES
}

/// Floats of scratch for each token of a sequence, in addition to the copies of operands: the scores of one block of
/// queries in the forward pass, the scores' adjoint and the weights of one group of keys in the backward pass.
pub fn scratch_floats_per_token(computes: AttentionResult, machine: Machine) -> u64 {
    if computes.forward() { ACCUMULATOR_ROWS } else { 2 * key_group(machine) }
}

arguments! {
    /// The kernel's scratch buffers, behind its operands and results. Each has space for every sequence, its length
    /// rounded up.
    ScratchBuffers {
        /// Transposed keys, and transposed values.
        transposed_keys, transposed_values,
        /// Packed rows of queries, and packed rows of values or of their adjoint.
        packed_queries, packed_values,
        /// Scores: [`scratch_floats_per_token`] for each token.
        scores,
        offsets,
    }
}

/// The fused attention kernel. A unit is one head of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CpuAttention {
    /// What it computes.
    pub computes: AttentionResult,
    /// Its parameters.
    pub params: AttentionParams,
}

impl Scheduled for CpuAttention {
    fn name_stem(&self) -> String {
        self.computes.name_stem() + &self.params.suffix()
    }

    fn emit(&self, machine: Machine) -> Code {
        let CpuAttention { computes, params } = *self;
        let float = Element::F32;
        let scratch = ScratchBuffers {
            transposed_keys: float,
            transposed_values: float,
            packed_queries: float,
            packed_values: float,
            scores: float,
            offsets: Element::I32,
        };
        let elements = [computes.elements(params), scratch.list()].concat();
        define(machine, &elements, computes.sizes(), |k, buffers, sizes| {
            let scratch = Scratch::of(k, ScratchBuffers::split_last(buffers).1, HeadSizes::of(sizes), computes);
            k.units(|k, unit| {
                let unit = Unit::of(k, unit, &scratch, (buffers, sizes), (computes, params));
                match computes {
                    AttentionResult::Forward | AttentionResult::ForwardAndLse => forward(k, &unit),
                    AttentionResult::Lse => lse(k, &unit),
                    AttentionResult::Adjoint(_)
                    | AttentionResult::KeyAndValueAdjoints
                    | AttentionResult::AllAdjoints => backward(k, &unit, computes),
                }
            });
        })
    }
}

/// The scratch of a thread. There is scratch for every unit of the range that a thread is given, but all units of the
/// range use that of the first, so that it stays in the L1 and L2 caches.
struct Scratch {
    /// Each is a buffer, and the index where the thread's part of it begins.
    transposed_keys: (Buf, Val),
    transposed_values: (Buf, Val),
    packed_queries: (Buf, Val),
    /// Values in the forward pass, and the adjoint of the result in the backward pass.
    packed_values: (Buf, Val),
    scores: (Buf, Val),
}

impl Scratch {
    fn of(k: &mut Kernel, buffers: ScratchBuffers<Buf>, sizes: HeadSizes<Val>, computes: AttentionResult) -> Scratch {
        let ScratchBuffers { transposed_keys, transposed_values, packed_queries, packed_values, scores, offsets } =
            buffers;
        let HeadSizes { width, value_width, count: heads, .. } = sizes;
        let unit = k.first_unit();
        let segment = segment(k, unit, heads, offsets);
        // All heads of earlier sequences, and earlier heads of this one, come first.
        let place = k.eval(segment.start * heads + segment.head * segment.length + unit * SLACK);
        let (key_place, value_place) = (k.eval(place * width), k.eval(place * value_width));
        let scores_at = k.eval(place * scratch_floats_per_token(computes, k.machine));
        Scratch {
            transposed_keys: (transposed_keys, key_place),
            transposed_values: (transposed_values, value_place),
            packed_queries: (packed_queries, key_place),
            packed_values: (packed_values, value_place),
            scores: (scores, scores_at),
        }
    }
}

/// One head of one sequence, with its scratch.
struct Unit<'a> {
    head: Head,
    scratch: &'a Scratch,
}

impl<'a> Unit<'a> {
    fn of(
        k: &mut Kernel,
        unit: Val,
        scratch: &'a Scratch,
        (buffers, sizes): (&[Buf], &[Val]),
        (computes, params): (AttentionResult, AttentionParams),
    ) -> Self {
        let (buffers, ScratchBuffers { offsets, .. }) = ScratchBuffers::split_last(buffers);
        let segment = segment(k, unit, HeadSizes::of(sizes).count, offsets);
        Unit { head: Head::of(k, segment, (buffers, sizes), (computes, params)), scratch }
    }

    /// The number of keys that query `i` sees.
    fn limit(&self, k: &mut Kernel, i: Val) -> Val {
        if self.head.params.causal { k.eval(i + 1) } else { self.head.segment.length }
    }

    /// The keys in `count` slots from `slot` on; a slot without a key takes the nearest one.
    fn keys(&self, k: &mut Kernel, slot: Val, count: u64) -> Vec<Val> {
        let last = k.eval(self.head.segment.length - 1);
        let key = |r| {
            let slot = k.max(slot + r, self.head.phase);
            k.min(slot - self.head.phase, last)
        };
        (0..count).map(key).collect()
    }

    /// The random generator's key, if there is dropout.
    fn generator(&self, k: &mut Kernel) -> Option<[Val; 2]> {
        self.head.rng.map(|rng| philox::key(k, rng))
    }
}

fn segment(k: &mut Kernel, unit: Val, heads: Val, offsets: Buf) -> Segment {
    let (sequence, head) = (k.div(unit, heads), k.rem(unit, heads));
    Segment::of(k, (head, sequence), offsets)
}

/// Transposed rows of an operand: lanes run along slots, and column e begins at `at + e · stride`.
struct TransposedRows {
    buffer: Buf,
    at: Val,
    stride: Val,
}

/// Transposes the rows of `from` in `count` slots from `slot` on; a slot without a row takes the nearest one.
fn transpose(
    k: &mut Kernel,
    unit: &Unit,
    from: &RowPointer,
    width: Val,
    (slot, count): (Val, Val),
    to: &TransposedRows,
) {
    let transposed = transpose_blocks(k, unit, from, width, (slot, count), to, k.register_floats());
    let last = k.eval(unit.head.segment.length - 1);
    let [stride, last] = [from.row_stride, last].map(|x| philox::splat_index(k, x));
    let numbers = k.lane_numbers();
    let all = k.mask(LANES);
    k.each(transposed, width, 1, |k, e| {
        let source = k.eval(from.row(0) + e);
        let column = k.eval(to.at + e * to.stride);
        k.each(0, count, LANES, |k, i| {
            let key = k.eval(slot + i - unit.head.phase);
            let key = philox::splat_index(k, key);
            let key = k.add(key, numbers);
            let none = k.int(0, key.ty);
            let key = k.max(key, none);
            let key = k.min(key, last);
            let steps = k.mul(key, stride);
            let x = k.gather_lanes(from.buffer, source, steps, all);
            k.store_vector(x, to.buffer, column + i);
        });
    });
}

/// Transposes as many columns as whole `side` × `side` blocks cover, each in registers. Returns the number of these
/// columns.
fn transpose_blocks(
    k: &mut Kernel,
    unit: &Unit,
    from: &RowPointer,
    width: Val,
    (slot, count): (Val, Val),
    to: &TransposedRows,
    side: u64,
) -> Val {
    let whole = k.eval(width / side * side);
    let ahead = k.eval(from.row_stride * PREFETCH_ROWS);
    k.each(0, count, side, |k, i| {
        let slot = k.eval(slot + i);
        let rows: Vec<Val> = unit.keys(k, slot, side).into_iter().map(|key| k.eval(from.row(key))).collect();
        let first = k.eval(to.at + i);
        k.each(0, whole, side, |k, e| {
            let load = |&row: &Val| {
                let place = k.eval(row + e);
                k.prefetch(from.buffer, place + ahead, Access::Read);
                k.load_vector_of(from.buffer, place, side)
            };
            let square = rows.iter().map(load).collect();
            for (c, column) in k.transpose(square).into_iter().enumerate() {
                k.store_vector(column, to.buffer, first + (e + c as u64) * to.stride);
            }
        });
    });
    whole
}

/// Copies the unit's rows of `from` to contiguous rows. They are read many times, and rows at the stride of a wide
/// tensor would map to the same few sets of the cache.
fn packed_rows(k: &mut Kernel, unit: &Unit, from: &RowPointer, width: Val, (buffer, base): (Buf, Val)) -> RowPointer {
    let rows = RowPointer { buffer, base, row_stride: width };
    k.each(0, unit.head.segment.length, 1, |k, i| {
        let [source, target, later] = [from.row(i), rows.row(i), from.row(i + PREFETCH_ROWS)].map(|row| k.eval(row));
        k.lanes(width, |k, e, mask| {
            k.prefetch(from.buffer, later + e, Access::Read);
            let x = k.load_lanes(from.buffer, source + e, mask);
            k.store_lanes(x, rows.buffer, target + e, mask);
        });
    });
    rows
}

/// The dot products of a tile: rows of `from`, which begin at `rows`, with the transposed operand's lanes from `j` on.
fn score_tile(k: &mut Kernel, (from, rows): (Buf, &[Val]), width: Val, side: &TransposedRows, j: Val) -> Vec<Val> {
    let column = k.eval(side.at + j);
    let (start, vectors) = (zeros(k), k.machine.accumulator_vectors());
    k.fold_unrolled(0, width, UNROLL, &start, |k, e, sums| {
        let place = k.eval(e * side.stride + column);
        let columns: Vec<Val> = (0..vectors).map(|v| k.load_vector(side.buffer, place + v * LANES)).collect();
        let x = |k: &mut Kernel, r: usize| k.load(from, rows[r] + e);
        k.outer_product(ACCUMULATOR_ROWS, x, &columns, sums, Kernel::fma)
    })
}

/// The layout of the weights of a tile's rows.
struct Weights {
    buffer: Buf,
    base: Val,
    /// `row` is the stride between the tile's rows; `step` is the stride between the rows of the factor that the
    /// weights multiply.
    row: Val,
    step: Val,
}

/// A tile of a product: the weights of its rows times rows `begin..end` of `y`, in the given columns.
fn weighted_sum(
    k: &mut Kernel,
    weights: &Weights,
    (begin, end): (Val, Val),
    y: &RowPointer,
    columns: &[(Val, Val)],
) -> Vec<Val> {
    let start = zeros(k);
    let row_starts: Vec<Val> = (0..ACCUMULATOR_ROWS).map(|r| k.eval(weights.base + r * weights.row)).collect();
    k.fold_unrolled(begin, end, UNROLL, &start, |k, j, sums| {
        let row = k.eval(y.row(j));
        let values: Vec<Val> = columns.iter().map(|&(at, mask)| k.load_lanes(y.buffer, row + at, mask)).collect();
        let step = k.mul(j, weights.step);
        let weight = |k: &mut Kernel, r: usize| k.load(weights.buffer, row_starts[r] + step);
        k.outer_product(ACCUMULATOR_ROWS, weight, &values, sums, Kernel::fma)
    })
}

/// Stores a tile to the rows of `out` that exist from `i` on; with `more` it is added to their values.
fn store_tile(
    k: &mut Kernel,
    unit: &Unit,
    i: Val,
    columns: &[(Val, Val)],
    sums: &[Val],
    (out, more): (&RowPointer, bool),
) {
    for (r, sums) in sums.chunks(columns.len()).enumerate() {
        let row = k.eval(i + r as u64);
        // Rows before the first wrap around to large unsigned numbers, so one comparison excludes both ends.
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

/// The scores of a block of queries with all keys.
struct Scores {
    keys: TransposedRows,
    /// The index of the scores of the block's first row; `stride` is the stride between its rows.
    base: Val,
    stride: Val,
}

impl Scores {
    fn of(k: &mut Kernel, unit: &Unit) -> Scores {
        let Head { segment, phase, width, .. } = &unit.head;
        let step = key_group(k.machine);
        let groups = k.div_up(segment.length + *phase, step);
        let stride = k.eval(groups * step);
        let (buffer, at) = unit.scratch.transposed_keys;
        let keys = TransposedRows { buffer, at, stride };
        transpose(k, unit, &unit.head.operands[1], *width, (*phase, segment.length), &keys);
        Scores { keys, base: k.eval(unit.scratch.scores.1 + *phase), stride }
    }

    /// Computes the scores of a block of queries with the keys that any of them sees. Returns the end of these keys.
    fn block(&self, k: &mut Kernel, unit: &Unit, i: Val, block: &[Val]) -> Val {
        let Head { operands, segment, params, width, .. } = &unit.head;
        let q = &operands[0];
        let rows: Vec<Val> = block.iter().map(|&i| k.eval(q.row(i))).collect();
        let row_starts: Vec<Val> = (0..block.len()).map(|r| self.row(k, r)).collect();
        let end = if params.causal { k.min(i + ACCUMULATOR_ROWS, segment.length) } else { segment.length };
        let vectors = k.machine.accumulator_vectors();
        k.each(0, end, key_group(k.machine), |k, j| {
            let sums = score_tile(k, (q.buffer, &rows), *width, &self.keys, j);
            let by = k.floats(params.scale.get());
            for (&row_start, sums) in row_starts.iter().zip(sums.chunks(vectors as usize)) {
                for (v, &sum) in sums.iter().enumerate() {
                    let sum = k.mul(sum, by);
                    k.store_vector(sum, unit.scratch.scores.0, row_start + j + v as u64 * LANES);
                }
            }
        });
        end
    }

    fn row(&self, k: &mut Kernel, r: usize) -> Val {
        k.eval(self.base + self.stride * r as u64)
    }
}

fn lse(k: &mut Kernel, unit: &Unit) {
    let scores = Scores::of(k, unit);
    k.each(0, unit.head.segment.length, ACCUMULATOR_ROWS, |k, i| {
        let block = unit.head.segment.rows(k, i, ACCUMULATOR_ROWS);
        scores.block(k, unit, i, &block);
        for (r, &row) in block.iter().enumerate() {
            let (row_start, limit) = (scores.row(k, r), unit.limit(k, row));
            let lse = rowwise::logsumexp(k, unit.scratch.scores.0, Span { base: row_start, length: limit });
            let out = &unit.head.results[0];
            k.store(lse, out.buffer, out.row(row));
        }
    });
}

fn forward(k: &mut Kernel, unit: &Unit) {
    let Head { operands, results, segment, params, value_width, stream, column, phase, .. } = &unit.head;
    let (zero, one, rows) = (k.index(0), k.index(1), unit.scratch.scores.0);
    let generator = unit.generator(k);
    let scores = Scores::of(k, unit);
    let values = packed_rows(k, unit, &operands[2], *value_width, unit.scratch.packed_values);
    k.each(0, segment.length, ACCUMULATOR_ROWS, |k, i| {
        let block = segment.rows(k, i, ACCUMULATOR_ROWS);
        let end = scores.block(k, unit, i, &block);
        let weights = |(r, &row): (usize, &Val)| {
            let (row_start, limit) = (scores.row(k, r), unit.limit(k, row));
            let (maximum, total) = rowwise::exponentials(k, rows, Span { base: row_start, length: limit }, Some(rows));
            if let Some(out) = results.get(1) {
                let lse = rowwise::log_of(k, (maximum, total));
                k.store(lse, out.buffer, out.row(row));
            }
            (row_start, limit, rowwise::share(k, total))
        };
        let weights: Vec<(Val, Val, Val)> = block.iter().enumerate().map(weights).collect();
        let first = generator.map_or(zero, |_| *phase);
        let token = k.eval(segment.start + i);
        let drawn = [token, segment.head, *stream].map(|x| philox::splat_index(k, x));
        k.each(0, end + first, LANES, |k, slot| {
            let words = generator.map(|key| {
                let column = k.eval(*column + slot);
                philox::draw_rows(k, key, column, drawn)
            });
            let at = k.eval(slot - first);
            for (r, &(row_start, limit, share)) in weights.iter().enumerate() {
                let place = k.eval(row_start + at);
                let e = k.load_vector(rows, place);
                let w = k.mul(e, share);
                let w = words.map_or(w, |words| philox::dropout(k, w, words[r], params.p.get()));
                // Lanes beyond the limit hold undefined values.
                let seen = k.mask(limit - at);
                let zero_f32 = k.floats(0.0);
                let w = k.select(seen, w, zero_f32);
                k.store_vector(w, rows, place);
            }
        });
        let weights = Weights { buffer: rows, base: scores.base, row: scores.stride, step: one };
        k.each(0, *value_width, key_group(k.machine), |k, e| {
            let columns = vectors(k, e, *value_width);
            let sums = weighted_sum(k, &weights, (zero, end), &values, &columns);
            store_tile(k, unit, i, &columns, &sums, (&results[0], false));
        });
    });
}

/// The backward pass: one group of keys after the other, with lanes along the keys. A group's contribution to the
/// queries' adjoint is added to that of earlier groups.
fn backward(k: &mut Kernel, unit: &Unit, computes: AttentionResult) {
    let Head { operands, results, segment, params, width, value_width, phase, .. } = &unit.head;
    let [q, keys, v, _, df, _] = &operands[..] else { unreachable!("six operands") };
    let (zero, one, stride) = (k.index(0), k.index(1), k.index(key_group(k.machine)));
    let mut results = results.iter();
    let mut result = |operand| computes.has_adjoint(operand).then(|| results.next().expect("a result"));
    let (of_queries, of_keys, of_values) = (result(0), result(1), result(2));
    let queries = of_keys.map(|out| (out, packed_rows(k, unit, q, *width, unit.scratch.packed_queries), *width, zero));
    let adjoints = of_values
        .map(|out| (out, packed_rows(k, unit, df, *value_width, unit.scratch.packed_values), *value_width, stride));
    let [transposed_keys, transposed_values] = [unit.scratch.transposed_keys, unit.scratch.transposed_values]
        .map(|(buffer, at)| TransposedRows { buffer, at, stride });
    let (scores, base) = unit.scratch.scores;
    let score_stride = k.index(scratch_floats_per_token(computes, k.machine));
    let generator = unit.generator(k);
    k.each(0, segment.length + *phase, key_group(k.machine), |k, slot| {
        transpose(k, unit, keys, *width, (slot, stride), &transposed_keys);
        let values = computes.needs_score_adjoint().then_some(&transposed_values);
        if let Some(transposed) = values {
            transpose(k, unit, v, *value_width, (slot, stride), transposed);
        }
        // `lane` is the key in lane 0, which may lie before the first key; `from..end` are the group's keys.
        let lane = k.eval(slot - *phase);
        let from = k.max(lane, 0);
        let end = k.min(lane + stride, segment.length);
        // With a causal mask, queries before the group's first key see none of its keys.
        let begin = if params.causal { from } else { zero };
        k.each(begin, segment.length, ACCUMULATOR_ROWS, |k, i| {
            let at = k.eval(base + i * score_stride);
            block(k, unit, (slot, lane), (i, at, score_stride), (&transposed_keys, values), computes, generator);
            let Some(out) = of_queries else { return };
            let again = k.compare(slot, Order::Gt, 0);
            let weights = Weights { buffer: scores, base: k.eval(at - lane), row: score_stride, step: one };
            k.each(0, *width, key_group(k.machine), |k, e| {
                let columns = vectors(k, e, *width);
                let sums = weighted_sum(k, &weights, (from, end), keys, &columns);
                let write = |k: &mut Kernel, more| store_tile(k, unit, i, &columns, &sums, (out, more));
                k.branch(again, |k| write(k, true), |k| write(k, false));
            });
        });
        for (out, factor, width, distance) in [&queries, &adjoints].into_iter().flatten() {
            k.each(0, *width, key_group(k.machine), |k, e| {
                let columns = vectors(k, e, *width);
                k.each(lane, end, ACCUMULATOR_ROWS, |k, key| {
                    let base = k.eval(base + (key - lane + *distance));
                    let weights = Weights { buffer: scores, base, row: one, step: score_stride };
                    let begin = if params.causal { k.max(key, 0) } else { zero };
                    let sums = weighted_sum(k, &weights, (begin, segment.length), factor, &columns);
                    store_tile(k, unit, key, &columns, &sums, (out, false));
                });
            });
        }
    });
}

/// Computes the scores' adjoint ds of a block of queries from `i` on with a group of keys, and the weights behind it,
/// at rows of the scratch from `at` on. Both are computed one after the other to save registers.
fn block(
    k: &mut Kernel,
    unit: &Unit,
    (slot, lane): (Val, Val),
    (i, at, stride): (Val, Val, Val),
    (keys, values): (&TransposedRows, Option<&TransposedRows>),
    computes: AttentionResult,
    generator: Option<[Val; 2]>,
) {
    let Head { operands, segment, params, width, value_width, stream, column, .. } = &unit.head;
    let [q, _, _, lse, df, corrections] = &operands[..] else { unreachable!("six operands") };
    let (zero, numbers, across) = (k.index(0), k.lane_numbers(), k.machine.accumulator_vectors());
    let rows = segment.rows(k, i, ACCUMULATOR_ROWS);
    let [of_q, of_df] = [q, df].map(|of| rows.iter().map(|&i| k.eval(of.row(i))).collect::<Vec<Val>>());
    let number = |k: &mut Kernel, of: &RowPointer, r: usize| {
        let x = k.load(of.buffer, of.row(rows[r]));
        k.splat(x)
    };
    let token = k.eval(segment.start + i);
    let drawn = [token, segment.head, *stream].map(|x| philox::splat_index(k, x));
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
        Some(words) => philox::dropout(k, x, words[v][r], params.p.get()),
        None => x,
    };
    let store = |k: &mut Kernel, x: Val, (r, v): (usize, usize), distance: Val| {
        k.store_vector(x, unit.scratch.scores.0, at + r as u64 * stride + offsets[v] + distance);
    };
    let (by, zero_f32) = (k.floats(params.scale.get()), k.floats(0.0));
    let scores = score_tile(k, (q.buffer, &of_q), *width, keys, zero);
    let weight = |(&s, &(r, v)): (&Val, &(usize, usize))| {
        let lse = number(k, lse, r);
        let s = k.mul(s, by);
        let s = k.sub(s, lse);
        let w = math::exp(k, s);
        let first = k.eval(lane + offsets[v]);
        let limit = unit.limit(k, rows[r]);
        let [first, limit] = [first, limit].map(|x| philox::splat_index(k, x));
        let key = k.add(first, numbers);
        // A lane before the first key has a negative number, which wraps around to a large unsigned one.
        let seen = k.below_unsigned(key, limit);
        k.select(seen, w, zero_f32)
    };
    let weights: Vec<Val> = scores.iter().zip(&places).map(weight).collect();
    if computes.has_adjoint(2) {
        for (&w, &place) in weights.iter().zip(&places) {
            let w = dropped(k, w, place);
            store(k, w, place, keys.stride);
        }
    }
    let Some(values) = values else { return };
    let products = score_tile(k, (df.buffer, &of_df), *value_width, values, zero);
    for ((&dp, &w), &place) in products.iter().zip(&weights).zip(&places) {
        let correction = number(k, corrections, place.0);
        let dp = dropped(k, dp, place);
        let ds = k.add(dp, correction);
        let ds = k.mul(ds, w);
        let ds = k.mul(ds, by);
        store(k, ds, place, zero);
    }
}
