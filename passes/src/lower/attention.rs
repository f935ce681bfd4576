//! Attention over packed sequences: scores, weighted sums of values, and their transposes.
//! A unit is one head of one sequence; sizes of sequences are read from the batch.

use peft_grammar::graph::{Type, Value};
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::view::View;
use super::{Lowering, dim_extent, extents};
use crate::builder::{Buf, F32, I32, Kernel, LANES, Order, Val, define, first};
use crate::target::Machine;

/// Rows of a block: their sums stay in registers.
pub(super) const ROWS: u64 = 4;
/// Vectors of a block's row, at most.
pub(super) const VECTORS: u64 = 2;

/// Vectors of a block's row: half of the registers hold its sums.
pub(super) fn across(machine: Machine) -> u64 {
    match machine {
        Machine::Cpu(cpu) => (cpu.registers().count * cpu.registers().floats / (2 * ROWS * LANES)).clamp(1, VECTORS),
        Machine::Cuda(_) => VECTORS,
    }
}

impl Lowering<'_, '_, '_> {
    /// s_ij = q_i · k_j. The keys are transposed first, so that lanes run along j.
    pub(super) fn scores(&mut self, q: BufferId, keys: BufferId, ty: &Type, causal: bool, result: Value) {
        let out = self.result(result);
        let flipped = self.scratch(extents(ty));
        let turned = View::dense(&ty.shape).permute(&[0, 2, 1]);
        self.copy_view((keys, &turned), (flipped, &View::dense(&turned.shape)));
        let name = if causal { "scores_causal" } else { "scores" };
        let elements = [Element::F32, Element::F32, Element::F32, Element::I32, Element::I32];
        let kernel = self.target.kernel(name, |machine| {
            define(machine, &elements, 4, |k, buffers, sizes| {
                let [q, keys, out, offsets, pairs] = first(buffers);
                let [tokens, all_pairs, width, sequences] = first(sizes);
                k.units(|k, unit| {
                    let head = Head::of(k, unit, tokens, all_pairs, sequences, offsets, pairs);
                    scores(k, [q, keys, out], &head, tokens, width, causal);
                });
            })
        });
        self.attention_launch(kernel, vec![q, flipped, out], ty);
    }

    /// f_i = Σ_j w_ij v_j; transposed: f_j = Σ_i w_ij v_i.
    pub(super) fn attend(&mut self, w: BufferId, v: BufferId, causal: bool, transposed: bool, result: Value) {
        let out = self.result(result);
        let ty = self.ty(result).clone();
        let name = match (transposed, causal) {
            (false, false) => "attend",
            (false, true) => "attend_causal",
            (true, false) => "attend_transposed",
            (true, true) => "attend_transposed_causal",
        };
        let elements = [Element::F32, Element::F32, Element::F32, Element::I32, Element::I32];
        let kernel = self.target.kernel(name, |machine| {
            define(machine, &elements, 4, |k, buffers, sizes| {
                let [w, v, out, offsets, pairs] = first(buffers);
                let [tokens, all_pairs, width, sequences] = first(sizes);
                k.units(|k, unit| {
                    let head = Head::of(k, unit, tokens, all_pairs, sequences, offsets, pairs);
                    attend(k, [w, v, out], &head, width, causal, transposed);
                });
            })
        });
        self.attention_launch(kernel, vec![w, v, out], &ty);
    }

    /// `ty` is that of the queries, `[heads, tokens, width]`.
    fn attention_launch(&mut self, kernel: usize, mut buffers: Vec<BufferId>, ty: &Type) {
        buffers.extend([self.target.derived("offsets"), self.target.derived("pairs")]);
        let sizes = vec![Extent::Tokens, Extent::Pairs, dim_extent(ty.shape[2]), Extent::Sequences];
        self.launch(kernel, buffers, sizes, dim_extent(ty.shape[0]) * Extent::Sequences);
    }
}

/// One head of one sequence.
pub(super) struct Segment {
    pub head: Val,
    /// First token of the sequence, and how many it has.
    pub start: Val,
    pub length: Val,
}

impl Segment {
    pub fn of(k: &mut Kernel, (head, sequence): (Val, Val), offsets: Buf) -> Segment {
        let one = k.index(1);
        let next = k.add(sequence, one);
        let (start, end) = (k.load_index(offsets, sequence), k.load_index(offsets, next));
        Segment { head, start, length: k.sub(end, start) }
    }

    /// `count` rows from `i` on; beyond the last row it is the last one again.
    pub fn rows(&self, k: &mut Kernel, i: Val, count: u64) -> Vec<Val> {
        let one = k.index(1);
        let last = k.sub(self.length, one);
        let row = |r| {
            let r = k.index(r);
            let row = k.add(i, r);
            k.min(row, last)
        };
        (0..count).map(row).collect()
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
        let row = k.mul(head, tokens);
        let row = k.add(row, segment.start);
        let square = k.mul(segment.head, all_pairs);
        let before = k.load_index(pairs, segment.start);
        let square = k.add(square, before);
        Head { segment, row, square }
    }
}

pub(super) fn zeros(k: &mut Kernel) -> Vec<Val> {
    let zero = k.floats(0.0);
    vec![zero; (ROWS * across(k.machine)) as usize]
}

/// Offsets and masks of the vectors at `j` of a row of `length`.
pub(super) fn vectors(k: &mut Kernel, j: Val, length: Val) -> Vec<(Val, Val)> {
    let across = across(k.machine);
    let vector = |v: u64| {
        let offset = k.index(v * k.lane_count());
        let at = k.add(j, offset);
        let left = k.sub(length, at);
        (at, k.mask(left))
    };
    (0..across).map(vector).collect()
}

fn scores(k: &mut Kernel, [q, keys, out]: [Buf; 3], head: &Head, tokens: Val, width: Val, causal: bool) {
    let (zero, segment) = (k.index(0), &head.segment);
    k.each(zero, segment.length, ROWS, |k, i| {
        let rows = segment.rows(k, i, ROWS);
        let queries: Vec<Val> = rows
            .iter()
            .map(|&row| {
                let row = k.add(head.row, row);
                k.mul(row, width)
            })
            .collect();
        k.each(zero, segment.length, across(k.machine) * k.lane_count(), |k, j| {
            let vectors = vectors(k, j, segment.length);
            let start = zeros(k);
            let sums = k.fold(zero, width, 1, &start, |k, e, sums| {
                let line = k.mul(segment.head, width);
                let line = k.add(line, e);
                let line = k.mul(line, tokens);
                let line = k.add(line, segment.start);
                let columns: Vec<Val> = vectors
                    .iter()
                    .map(|&(at, mask)| {
                        let place = k.add(line, at);
                        k.load_lanes(keys, place, mask)
                    })
                    .collect();
                let x = |k: &mut Kernel, r: usize| {
                    let place = k.add(queries[r], e);
                    k.load(q, place)
                };
                k.outer(ROWS, x, &columns, sums, Kernel::fma)
            });
            for (r, &row) in rows.iter().enumerate() {
                let base = k.mul(row, segment.length);
                let base = k.add(head.square, base);
                for (v, &(at, mask)) in vectors.iter().enumerate() {
                    let mut score = sums[r * vectors.len() + v];
                    if causal {
                        score = unless_later(k, score, at, row);
                    }
                    let place = k.add(base, at);
                    k.store_lanes(score, out, place, mask);
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
    k.each(zero, segment.length, ROWS, |k, i| {
        let rows = segment.rows(k, i, ROWS);
        // Which rows of v this block of results has a weight for.
        let (from, to) = match (causal, transposed) {
            (false, _) => (zero, segment.length),
            (true, false) => {
                let block = k.index(ROWS);
                let end = k.add(i, block);
                (zero, k.min(end, segment.length))
            }
            (true, true) => (i, segment.length),
        };
        k.each(zero, width, across(k.machine) * k.lane_count(), |k, e| {
            let vectors = vectors(k, e, width);
            let start = zeros(k);
            let sums = k.fold(from, to, 1, &start, |k, j, sums| {
                let line = k.add(head.row, j);
                let line = k.mul(line, width);
                let values: Vec<Val> = vectors
                    .iter()
                    .map(|&(at, mask)| {
                        let place = k.add(line, at);
                        k.load_lanes(v, place, mask)
                    })
                    .collect();
                let weight = |k: &mut Kernel, r: usize| {
                    let (query, key) = if transposed { (j, rows[r]) } else { (rows[r], j) };
                    let place = k.mul(query, segment.length);
                    let place = k.add(place, key);
                    let place = k.add(place, head.square);
                    let weight = k.load(w, place);
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
                let line = k.add(head.row, row);
                let line = k.mul(line, width);
                for (c, &(at, mask)) in vectors.iter().enumerate() {
                    let place = k.add(line, at);
                    k.store_lanes(sums[r * vectors.len() + c], out, place, mask);
                }
            }
        });
    });
}
