//! Attention over packed sequences as its equations stand: scores, weighted sums of values, and their transposes.
//! A unit is one head of one sequence; sizes of sequences are read from the batch.

use peft_runtime::artifact::Element;

use super::shape::{ROWS, Segment, vectors, zeros};
use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, I32, Kernel, Order, Val, define};
use crate::kernels::Scheduled;
use crate::target::Machine;

arguments! {
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
    Sizes {
        tokens,
        /// All pairs of a head.
        pairs,
        width,
        sequences,
    }
}

const ELEMENTS: Buffers<Element> =
    Buffers { left: Element::F32, right: Element::F32, out: Element::F32, offsets: Element::I32, pairs: Element::I32 };

/// s_ij = q_i · k_j
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scores {
    pub causal: bool,
}

impl Scheduled for Scores {
    fn word(&self) -> String {
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

/// f_i = Σ_j w_ij v_j; transposed: f_j = Σ_i w_ij v_i.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attend {
    pub causal: bool,
    pub transposed: bool,
}

impl Scheduled for Attend {
    fn word(&self) -> String {
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

/// A segment with its square.
struct Head {
    segment: Segment,
    /// Its first row in `[heads, tokens, ·]`.
    row: Val,
    /// Its scores in `[heads, tokens, keys]`: `length` rows of `length`.
    square: Val,
}

impl Head {
    fn of(k: &mut Kernel, unit: Val, tokens: Val, all_pairs: Val, sequences: Val, offsets: Buf, pairs: Buf) -> Head {
        let (head, sequence) = (k.div(unit, sequences), k.rem(unit, sequences));
        let segment = Segment::of(k, (head, sequence), offsets);
        let row = k.eval(head * tokens + segment.start);
        let before = k.load_index(pairs, segment.start);
        let square = k.eval(head * all_pairs + before);
        Head { segment, row, square }
    }
}

fn scores(k: &mut Kernel, [q, keys, out]: [Buf; 3], head: &Head, tokens: Val, width: Val, causal: bool) {
    let segment = &head.segment;
    k.each(0, segment.length, ROWS, |k, i| {
        let rows = segment.rows(k, i, ROWS);
        let queries: Vec<Val> = rows.iter().map(|&row| k.eval((head.row + row) * width)).collect();
        k.each(0, segment.length, k.machine.vectors_across() * k.lane_count(), |k, j| {
            let vectors = vectors(k, j, segment.length);
            let start = zeros(k);
            let sums = k.fold(0, width, 1, &start, |k, e, sums| {
                let line = k.eval((segment.head * width + e) * tokens + segment.start);
                let columns: Vec<Val> = vectors.iter().map(|&(at, mask)| k.load_lanes(keys, line + at, mask)).collect();
                let x = |k: &mut Kernel, r: usize| k.load(q, queries[r] + e);
                k.outer(ROWS, x, &columns, sums, Kernel::fma)
            });
            for (r, &row) in rows.iter().enumerate() {
                let base = k.eval(head.square + row * segment.length);
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

/// −∞ in the lanes of keys after `row`.
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
    k.each(0, segment.length, ROWS, |k, i| {
        let rows = segment.rows(k, i, ROWS);
        // Which rows of v this block of results has a weight for.
        let (from, to) = match (causal, transposed) {
            (false, _) => (zero, segment.length),
            (true, false) => (zero, k.min(i + ROWS, segment.length)),
            (true, true) => (i, segment.length),
        };
        k.each(0, width, k.machine.vectors_across() * k.lane_count(), |k, e| {
            let vectors = vectors(k, e, width);
            let start = zeros(k);
            let sums = k.fold(from, to, 1, &start, |k, j, sums| {
                let line = k.eval((head.row + j) * width);
                let values: Vec<Val> = vectors.iter().map(|&(at, mask)| k.load_lanes(v, line + at, mask)).collect();
                let weight = |k: &mut Kernel, r: usize| {
                    let (query, key) = if transposed { (j, rows[r]) } else { (rows[r], j) };
                    let weight = k.load(w, query * segment.length + key + head.square);
                    if !causal {
                        return weight;
                    }
                    let later = k.compare(key, Order::Gt, query);
                    let nothing = k.float(0.0, F32);
                    k.select(later, nothing, weight)
                };
                k.outer(ROWS, weight, &values, sums, Kernel::fma)
            });
            for (r, &row) in rows.iter().enumerate() {
                let line = k.eval((head.row + row) * width);
                for (c, &(at, mask)) in vectors.iter().enumerate() {
                    k.store_lanes(sums[r * vectors.len() + c], out, line + at, mask);
                }
            }
        });
    });
}
