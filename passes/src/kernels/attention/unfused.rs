//! Attention over packed sequences, operation by operation: scores, weighted sums of values, and the transposes of
//! both. The score matrix is materialised. A unit is one head of one sequence, whose limits are read from the batch.

use peft_runtime::artifact::Element;

use super::shape::{ACCUMULATOR_ROWS, Segment, vectors, zeros};
use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, I32, Kernel, Order, Val, define};
use crate::kernels::Scheduled;
use crate::target::Machine;

arguments! {
    /// Buffers of both kernels.
    Buffers {
        /// Queries, or weights.
        left,
        /// Keys, transposed so that lanes run along j, or values.
        right,
        out,
        offsets, pairs,
    }
}
arguments! {
    /// Sizes of both kernels.
    Sizes {
        tokens,
        /// The number of (query, key) pairs of one head, over all sequences.
        pairs,
        width,
        sequences,
    }
}

const ELEMENTS: Buffers<Element> =
    Buffers { left: Element::F32, right: Element::F32, out: Element::F32, offsets: Element::I32, pairs: Element::I32 };

/// The scores s_ij = q_i · k_j of all pairs within a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scores {
    /// Whether scores of keys after the query are −∞.
    pub causal: bool,
}

impl Scheduled for Scores {
    fn name_stem(&self) -> String {
        if self.causal { "scores_causal" } else { "scores" }.into()
    }

    fn emit(&self, machine: Machine) -> Code {
        define(machine, &ELEMENTS.list(), Sizes::<Val>::COUNT, |k, buffers, sizes| {
            let Buffers { left: q, right: keys, out, offsets, pairs } = Buffers::of(buffers);
            let Sizes { tokens, pairs: all_pairs, width, sequences } = Sizes::of(sizes);
            k.units(|k, unit| {
                let head = Head::of(k, unit, tokens, all_pairs, sequences, offsets, pairs);
                scores(k, [q, keys, out], &head, tokens, width, self.causal);
            });
        })
    }
}

/// The weighted sums f_i = Σ_j w_ij v_j or, transposed, f_j = Σ_i w_ij v_i.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attend {
    /// Whether weights of keys after the query are skipped.
    pub causal: bool,
    /// Whether the sum is over queries instead of keys.
    pub transposed: bool,
}

impl Scheduled for Attend {
    fn name_stem(&self) -> String {
        let transposed = if self.transposed { "_transposed" } else { "" };
        format!("attend{transposed}{}", if self.causal { "_causal" } else { "" })
    }

    fn emit(&self, machine: Machine) -> Code {
        define(machine, &ELEMENTS.list(), Sizes::<Val>::COUNT, |k, buffers, sizes| {
            let Buffers { left: w, right: v, out, offsets, pairs } = Buffers::of(buffers);
            let Sizes { tokens, pairs: all_pairs, width, sequences } = Sizes::of(sizes);
            k.units(|k, unit| {
                let head = Head::of(k, unit, tokens, all_pairs, sequences, offsets, pairs);
                attend(k, [w, v, out], &head, width, self.causal, self.transposed);
            });
        })
    }
}

/// One head of one sequence, with its part of the score matrix.
struct Head {
    segment: Segment,
    /// The index of the head's first row in `[heads, tokens, ·]`.
    row: Val,
    /// The index of its first score in `[heads, tokens, keys]`; there are `length` rows of `length` scores.
    scores: Val,
}

impl Head {
    fn of(k: &mut Kernel, unit: Val, tokens: Val, all_pairs: Val, sequences: Val, offsets: Buf, pairs: Buf) -> Head {
        let (head, sequence) = (k.div(unit, sequences), k.rem(unit, sequences));
        let segment = Segment::of(k, (head, sequence), offsets);
        let row = k.eval(head * tokens + segment.start);
        let before = k.load_index(pairs, segment.start);
        let scores = k.eval(head * all_pairs + before);
        Head { segment, row, scores }
    }
}

fn scores(k: &mut Kernel, [q, keys, out]: [Buf; 3], head: &Head, tokens: Val, width: Val, causal: bool) {
    let segment = &head.segment;
    k.each(0, segment.length, ACCUMULATOR_ROWS, |k, i| {
        let rows = segment.rows(k, i, ACCUMULATOR_ROWS);
        let queries: Vec<Val> = rows.iter().map(|&row| k.eval((head.row + row) * width)).collect();
        k.each(0, segment.length, k.machine.accumulator_vectors() * k.lane_count(), |k, j| {
            let vectors = vectors(k, j, segment.length);
            let start = zeros(k);
            let sums = k.fold(0, width, 1, &start, |k, e, sums| {
                let row_start = k.eval((segment.head * width + e) * tokens + segment.start);
                let columns: Vec<Val> =
                    vectors.iter().map(|&(at, mask)| k.load_lanes(keys, row_start + at, mask)).collect();
                let x = |k: &mut Kernel, r: usize| k.load(q, queries[r] + e);
                k.outer_product(ACCUMULATOR_ROWS, x, &columns, sums, Kernel::fma)
            });
            for (r, &row) in rows.iter().enumerate() {
                let base = k.eval(head.scores + row * segment.length);
                for (v, &(at, mask)) in vectors.iter().enumerate() {
                    let mut score = sums[r * vectors.len() + v];
                    if causal {
                        score = unless_later(k, score, at, row);
                    }
                    k.store_lanes(score, out, base + at, mask);
                }
            }
        });
    });
}

/// Replaces the scores of keys after `row` by −∞.
fn unless_later(k: &mut Kernel, score: Val, at: Val, row: Val) -> Val {
    let numbers = k.lane_numbers();
    let (at, row) = (k.to_i32(at), k.to_i32(row));
    let (at, row) = (k.splat(at), k.splat(row));
    let key = k.add(numbers, at);
    let later = k.compare(key, Order::Gt, row);
    let lowest = k.float(f64::NEG_INFINITY, score.ty);
    debug_assert_eq!(key.ty, k.vector(I32));
    k.select(later, lowest, score)
}

fn attend(k: &mut Kernel, [w, v, out]: [Buf; 3], head: &Head, width: Val, causal: bool, transposed: bool) {
    let (zero, segment) = (k.index(0), &head.segment);
    k.each(0, segment.length, ACCUMULATOR_ROWS, |k, i| {
        let rows = segment.rows(k, i, ACCUMULATOR_ROWS);
        // The range of rows of v that have a weight in this block of results.
        let (from, to) = match (causal, transposed) {
            (false, _) => (zero, segment.length),
            (true, false) => (zero, k.min(i + ACCUMULATOR_ROWS, segment.length)),
            (true, true) => (i, segment.length),
        };
        k.each(0, width, k.machine.accumulator_vectors() * k.lane_count(), |k, e| {
            let vectors = vectors(k, e, width);
            let start = zeros(k);
            let sums = k.fold(from, to, 1, &start, |k, j, sums| {
                let row_start = k.eval((head.row + j) * width);
                let values: Vec<Val> =
                    vectors.iter().map(|&(at, mask)| k.load_lanes(v, row_start + at, mask)).collect();
                let weight = |k: &mut Kernel, r: usize| {
                    let (query, key) = if transposed { (j, rows[r]) } else { (rows[r], j) };
                    let weight = k.load(w, query * segment.length + key + head.scores);
                    if !causal {
                        return weight;
                    }
                    let later = k.compare(key, Order::Gt, query);
                    let zero_f32 = k.float(0.0, F32);
                    k.select(later, zero_f32, weight)
                };
                k.outer_product(ACCUMULATOR_ROWS, weight, &values, sums, Kernel::fma)
            });
            for (r, &row) in rows.iter().enumerate() {
                let row_start = k.eval((head.row + row) * width);
                for (c, &(at, mask)) in vectors.iter().enumerate() {
                    k.store_lanes(sums[r * vectors.len() + c], out, row_start + at, mask);
                }
            }
        });
    });
}
