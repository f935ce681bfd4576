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

use std::ops::Range;

use peft_grammar::graph::{Node, Op, Value};
use peft_runtime::artifact::{BufferId, Extent};

use super::entry::Turn;
use super::schedule::held_scores;
use super::sizes::dim_extent;
use crate::kernels::chunked_logits::{Block, BlockBuffers, BlockSizes, End, EndSizes};

impl Turn<'_, '_, '_, '_> {
    /// The log-sum-exp and the mean, as far as they are wanted.
    pub(super) fn sweep(&mut self, Node { op, operands, results, .. }: &Node) {
        let (x, w) = (operands[0], operands[1]);
        let (lse, mean) = match (op, &results[..]) {
            (Op::LinearLse, &[lse]) => (Some(lse), None),
            (Op::LinearMean, &[mean]) => (None, Some(mean)),
            (Op::LinearLseAndMean, &[lse, mean]) => (Some(lse), Some(mean)),
            _ => unreachable!("asked of sweeps alone"),
        };
        let [lse, mean] = [lse, mean].map(|v| v.map(|v| self.result(v)));

        let rows = dim_extent(self.ty(x).shape[0]);
        let vocabulary = self.ty(w).shape[0].constant().expect("a weight's rows are known");
        let most = self.module.limits.block.min(vocabulary);
        let held = held_scores(self.module.machine, most);
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
            self.product_of_rows((x, sweep.rows.clone()), w, block.clone(), true, (sweep.scores, false));
            self.advance(&sweep, block.end - start, again);
            if let Some(mean) = mean {
                self.product_of_rows((sweep.scores, sweep.rows.clone()), w, block, false, (mean, again));
            }
        }
        self.finish(&sweep);
    }

    /// A product with some `rows` of y, from a multiple of a tile's columns on: x @ y[rows]ᵀ, or x @ y[rows]. It fills
    /// `out`, or is added to what stands there. All of them are row-major.
    fn product_of_rows(
        &mut self,
        x: (BufferId, Extent),
        y: Value,
        rows: Range<u64>,
        transpose_y: bool,
        out: (BufferId, bool),
    ) {
        match self.facts.fusion.held_columns {
            None => self.rows_on_cpu(x, y, rows, transpose_y, out),
            Some(_) => self.rows_on_gpu(x, y, rows, transpose_y, out),
        }
    }

    /// Takes a block of scores in: m, z and y grow, and exponentials take the scores' place if there is a y.
    fn advance(&mut self, sweep: &Sweep, length: u64, again: bool) {
        let (mean, held) = (sweep.mean, sweep.held);
        let mut buffers = BlockBuffers { scores: sweep.scores, state: sweep.state }.list();
        buffers.extend(mean);
        let [length, again] = [length, again.into()].map(Extent::Const);
        let sizes = BlockSizes { length, width: sweep.width.clone(), again }.list();
        let units = sweep.rows.clone() * Extent::Const(self.module.machine.team());
        self.launch(Block { mean: mean.is_some(), held }, buffers, sizes, units);
    }

    fn finish(&mut self, sweep: &Sweep) {
        let Sweep { lse, mean, .. } = *sweep;
        let buffers: Vec<BufferId> = [Some(sweep.state), lse, mean].into_iter().flatten().collect();
        let units = sweep.rows.clone() * Extent::Const(self.module.machine.team());
        let schedule = End { lse: lse.is_some(), mean: mean.is_some() };
        self.launch(schedule, buffers, EndSizes { width: sweep.width.clone() }.list(), units);
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
