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

use peft_grammar::graph::{Node, Op};
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::kernel::{Buf, F32, Kernel, Order, Val, define, first};
use super::span::Span;
use super::{Lowering, dim_extent, math, rows};

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
        let most = self.target.limits.block;
        let sweep = Sweep {
            scores: self.scratch(vec![rows.clone(), Extent::Const(vocabulary.min(most))]),
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
        let mean = sweep.mean;
        let name = if mean.is_some() { "linear_mean_block" } else { "linear_lse_block" };
        let buffers: Vec<BufferId> = [sweep.scores, sweep.state].into_iter().chain(mean).collect();
        let elements = vec![Element::F32; buffers.len()];
        let kernel = self.target.kernel(name, |machine| {
            define(machine, &elements, 3, |k, buffers, sizes| {
                let ([scores, state], [length, width, again]) = (first(buffers), first(sizes));
                let mean = buffers.get(2).copied();
                k.units(|k, row| {
                    let span = Span { base: k.mul(row, length), length };
                    let zero = k.index(0);
                    let again = k.compare(again, Order::Gt, zero);
                    let [most, total] = state_of(k, row);
                    let (nothing, lowest) = (k.float(0.0, F32), k.float(f64::NEG_INFINITY, F32));
                    // Before the first block nothing is there to be read.
                    let before = k.load_or(again, state, most, lowest);
                    let sum = k.load_or(again, state, total, nothing);

                    let block = rows::largest(k, scores, span);
                    let block = k.lane(block, 0);
                    let now = k.max(block, before);
                    let grown = k.sub(before, now);
                    let factor = math::exp(k, grown);
                    let max = k.splat(now);
                    let more = rows::powers(k, scores, span, max, mean.map(|_| scores));
                    let sum = k.mul(sum, factor);
                    let sum = k.add(sum, more);
                    k.settle();
                    k.store(now, state, most);
                    k.store(sum, state, total);
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
        self.launch(kernel, buffers, sizes, sweep.rows.clone());
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
                k.units(|k, row| {
                    let [most, total] = state_of(k, row);
                    let sum = k.load(state, total);
                    if lse.is_some() {
                        let most = k.load(state, most);
                        let log = math::log(k, sum);
                        let log = k.add(most, log);
                        k.store(log, buffers[1], row);
                    }
                    if mean.is_some() {
                        let one = k.float(1.0, F32);
                        let share = k.div(one, sum);
                        scale(k, buffers[buffers.len() - 1], row, width, share);
                    }
                });
            })
        });
        self.launch(kernel, buffers, vec![sweep.width.clone()], sweep.rows.clone());
    }
}

/// The buffers of a sweep and the sizes of its rows.
struct Sweep {
    /// A block's.
    scores: BufferId,
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

/// Row `row` of `x` times `by`.
fn scale(k: &mut Kernel, x: Buf, row: Val, width: Val, by: Val) {
    let span = Span { base: k.mul(row, width), length: width };
    let by = k.splat(by);
    rows::fill(k, span, x, |k, place, mask| {
        let x = k.load_lanes(x, place, mask);
        k.mul(x, by)
    });
}
