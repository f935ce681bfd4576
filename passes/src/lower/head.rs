//! A linear map of which only the softmax is asked for: one sweep over blocks of its columns, as many at a time as the
//! cache holds, gives the log-sum-exp of each row and the row of the weight that the softmax expects.
//!
//! ```text
//! m = −∞, z = 0, y = 0
//! for each block of W's rows
//!   s = x W_blockᵀ                     [rows, block]: all that is ever written of the n × V
//!   m' = max(m, max s)
//!   p = e^{s − m'}                     in place of s
//!   z = e^{m − m'} z + Σ p,  y = e^{m − m'} y,  m = m'
//!   y = y + p W_block
//! lse = m + ln z,  mean = y / z
//! ```
//!
//! On a GPU a team has a row, and its threads hold the row's scores in registers: all of them are on their way at once.

use peft_grammar::graph::{Node, Op};
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::span::Span;
use super::{Lowering, dim_extent, rows};
use crate::builder::{Buf, F32, Kernel, Order, Val, define, first};
use crate::kernels::math;
use crate::target::Machine;
use crate::target::cuda::{WARP, WARPS};

impl Lowering<'_, '_, '_> {
    /// The result of `node`; of the other operation on the same operands as well, if the entry has it.
    pub(super) fn sweep(&mut self, node: &Node) {
        if self.places[node.result.0 as usize].is_some() {
            return;
        }
        let (x, w) = (node.operands[0], node.operands[1]);
        let find = |op: Op| {
            let same = |n: &&Node| n.op == op && n.operands == node.operands;
            // What is prepared is bound by its own name: each for itself.
            let found = self.graph.nodes.iter().find(same).filter(|_| self.frozen.is_none());
            found.map(|n| n.result).or((op == node.op).then_some(node.result))
        };
        let (lse, mean) = (find(Op::LinearLse), find(Op::LinearMean));
        let [lse, mean] = [lse, mean].map(|v| v.map(|v| self.result(v)));

        let rows = dim_extent(self.ty(x).shape[0]);
        let vocabulary = self.ty(w).shape[0].constant().expect("a weight's rows are known");
        let most = self.target.limits.block.min(vocabulary);
        let held = match self.target.machine {
            Machine::Cpu(_) => None,
            Machine::Cuda(_) => Some(most.div_ceil(WARP * WARPS)),
        };
        let sweep = Sweep {
            scores: self.scratch(vec![rows.clone(), Extent::Const(most)]),
            held,
            state: self.scratch(vec![rows.clone(), Extent::Const(2)]),
            lse,
            mean,
            rows,
            width: dim_extent(self.ty(w).shape[1]),
        };
        let x = self.dense(x);
        self.dense(w);
        for start in (0..vocabulary).step_by(most as usize) {
            let (block, again) = (start..vocabulary.min(start + most), start > 0);
            self.multiply_rows((x, sweep.rows.clone()), w, block.clone(), true, (sweep.scores, false));
            self.advance(&sweep, block.end - start, again);
            if let Some(mean) = mean {
                self.multiply_rows((sweep.scores, sweep.rows.clone()), w, block, false, (mean, again));
            }
        }
        self.finish(&sweep);
    }

    /// Takes a block of scores in: m, z and y grow, and exponentials take the scores' place if there is a y.
    fn advance(&mut self, sweep: &Sweep, length: u64, again: bool) {
        let (mean, held) = (sweep.mean, sweep.held);
        let stem = if mean.is_some() { "linear_mean_block" } else { "linear_lse_block" };
        let name = held.map_or(stem.into(), |vectors| format!("{stem}_held{vectors}"));
        let buffers: Vec<BufferId> = [sweep.scores, sweep.state].into_iter().chain(mean).collect();
        let elements = vec![Element::F32; buffers.len()];
        let kernel = self.target.kernel(&name, |machine| {
            define(machine, &elements, 3, |k, buffers, sizes| {
                let ([scores, state], [length, width, again]) = (first(buffers), first(sizes));
                let mean = buffers.get(2).copied();
                let room = held.map(|vectors| (vectors, k.shared(WARP * WARPS)));
                k.team_units(|k, row| {
                    let span = Span { base: k.mul(row, length), length };
                    let held = room.map(|(vectors, room)| Held::of(k, scores, span, vectors, room));
                    let zero = k.index(0);
                    let again = k.compare(again, Order::Gt, zero);
                    let [most, total] = state_of(k, row);
                    let (nothing, lowest) = (k.float(0.0, F32), k.float(f64::NEG_INFINITY, F32));
                    // Before the first block nothing is there to be read.
                    let before = k.load_or(again, state, most, lowest);
                    let sum = k.load_or(again, state, total, nothing);

                    let block = match &held {
                        None => rows::largest(k, scores, span),
                        Some(held) => held.largest(k),
                    };
                    let block = k.lane(block, 0);
                    let now = k.max(block, before);
                    let grown = k.sub(before, now);
                    let factor = math::exp(k, grown);
                    let (max, out) = (k.splat(now), mean.map(|_| scores));
                    let more = match &held {
                        None => rows::powers(k, scores, span, max, out),
                        Some(held) => held.powers(k, max, out),
                    };
                    let sum = k.mul(sum, factor);
                    let sum = k.add(sum, more);
                    k.first_of_team(|k| {
                        k.store(now, state, most);
                        k.store(sum, state, total);
                    });
                    if let Some(mean) = mean {
                        let one = k.float(1.0, F32);
                        let shrinks = k.compare(factor, Order::Lt, one);
                        let shrinks = k.and(shrinks, again);
                        k.when(shrinks, |k| scale(k, mean, row, width, factor));
                    }
                });
            })
        });
        let sizes = vec![Extent::Const(length), sweep.width.clone(), Extent::Const(again.into())];
        self.launch(kernel, buffers, sizes, sweep.rows.clone() * Extent::Const(self.target.machine.team()));
    }

    fn finish(&mut self, sweep: &Sweep) {
        let Sweep { lse, mean, .. } = *sweep;
        let name = match (lse, mean) {
            (Some(_), Some(_)) => "linear_lse_mean",
            (Some(_), None) => "linear_lse",
            _ => "linear_mean",
        };
        let buffers: Vec<BufferId> = [Some(sweep.state), lse, mean].into_iter().flatten().collect();
        let elements = vec![Element::F32; buffers.len()];
        let kernel = self.target.kernel(name, |machine| {
            define(machine, &elements, 1, |k, buffers, sizes| {
                let ([state], [width]) = (first(buffers), first(sizes));
                k.team_units(|k, row| {
                    let [most, total] = state_of(k, row);
                    let sum = k.load(state, total);
                    if lse.is_some() {
                        let most = k.load(state, most);
                        let log = math::log(k, sum);
                        let log = k.add(most, log);
                        k.first_of_team(|k| k.store(log, buffers[1], row));
                    }
                    if mean.is_some() {
                        let one = k.float(1.0, F32);
                        let share = k.div(one, sum);
                        scale(k, buffers[buffers.len() - 1], row, width, share);
                    }
                });
            })
        });
        let units = sweep.rows.clone() * Extent::Const(self.target.machine.team());
        self.launch(kernel, buffers, vec![sweep.width.clone()], units);
    }
}

/// The buffers of a sweep and the sizes of its rows.
struct Sweep {
    /// A block's; on a GPU a thread holds so many of a row.
    scores: BufferId,
    held: Option<u64>,
    /// m and z of each row.
    state: BufferId,
    lse: Option<BufferId>,
    mean: Option<BufferId>,
    rows: Extent,
    width: Extent,
}

/// Where a row's state lies: the largest score so far, and Σ e^{s − max}.
fn state_of(k: &mut Kernel, row: Val) -> [Val; 2] {
    let (one, two) = (k.index(1), k.index(2));
    let most = k.mul(row, two);
    [most, k.add(most, one)]
}

/// What a thread of a GPU's team holds of a row of scores: numbers, their places, and which of them exist.
struct Held {
    numbers: Vec<(Val, Val, Val)>,
    room: Buf,
}

impl Held {
    fn of(k: &mut Kernel, scores: Buf, span: Span, vectors: u64, room: Buf) -> Held {
        let lowest = k.float(f64::NEG_INFINITY, F32);
        let own = k.add(span.base, k.thread());
        let left = k.sub(span.length, k.thread());
        let numbers = (0..vectors).map(|v| {
            let ahead = k.index(v * WARP * WARPS);
            let (place, there) = (k.add(own, ahead), k.compare(ahead, Order::Lt, left));
            (k.load_if(there, scores, place, lowest), place, there)
        });
        Held { numbers: numbers.collect(), room }
    }

    fn largest(&self, k: &mut Kernel) -> Val {
        let largest = self.numbers.iter().map(|&(x, ..)| x).reduce(|x, y| k.max(x, y)).expect("at least one");
        let largest = k.join_team(largest, Some(self.room), Kernel::max);
        k.max_lanes(largest)
    }

    /// [`rows::powers`].
    fn powers(&self, k: &mut Kernel, max: Val, out: Option<Buf>) -> Val {
        let powers = self.numbers.iter().map(|&(x, place, there)| {
            let x = k.sub(x, max);
            let e = math::exp(k, x);
            if let Some(out) = out {
                k.when(there, |k| k.store_here(e, out, place));
            }
            e
        });
        let powers: Vec<Val> = powers.collect();
        let sum = powers.into_iter().reduce(|x, y| k.add(x, y)).expect("at least one");
        let sum = k.sum_team(sum, Some(self.room));
        k.sum_lanes(sum)
    }
}

/// Row `row` of `x` times `by`, a team's work.
fn scale(k: &mut Kernel, x: Buf, row: Val, width: Val, by: Val) {
    let (base, zero) = (k.mul(row, width), k.index(0));
    let by = k.splat(by);
    k.dealt_fold(zero, width, k.lane_count(), &[], |k, j, _| {
        let left = k.sub(width, j);
        let mask = k.mask(left);
        let place = k.add(base, j);
        let y = k.load_lanes(x, place, mask);
        let y = k.mul(y, by);
        k.store_lanes(y, x, place, mask);
        vec![]
    });
}
