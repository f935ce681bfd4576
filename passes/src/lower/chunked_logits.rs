//! Chunked logits: the log-sum-exp of each row of x Wᵀ, and the mean of W's rows under the row's softmax, without the
//! whole matrix of logits. W's rows (the vocabulary) are processed in chunks whose logits fit in the cache, with the
//! online softmax of Milakov and Gimelshein (2018). Wijmans et al. (2024), "Cut your losses", compute cross entropy in
//! the same manner.
//!
//! ```text
//! m = −∞, z = 0, y = 0
//! for each chunk of W's rows
//!   s = x W_chunkᵀ                     [rows, chunk], the only part of the rows × V logits in memory
//!   m' = max(m, max s)
//!   p = e^{s − m'}                     overwrites s
//!   z = e^{m − m'} z + Σ p,  y = e^{m − m'} y,  m = m'
//!   y = y + p W_chunk
//! lse = m + ln z,  mean = y / z
//! ```
//!
//! On a GPU one thread block has a row, and its threads hold the row's scores in registers, so that all loads are in
//! flight at once.

use std::ops::Range;

use peft_grammar::graph::{Node, Op, Value};
use peft_runtime::artifact::{BufferId, Extent};

use super::entry::DispatchLowering;
use super::schedule::scores_per_thread;
use super::sizes::dim_extent;
use crate::kernels::chunked_logits::{ChunkBuffers, ChunkFinish, ChunkSizes, ChunkUpdate, FinishSizes};

impl DispatchLowering<'_, '_, '_, '_> {
    /// Emits `linear_lse`, `linear_mean`, or both results of one pass.
    pub(super) fn chunked_logits(&mut self, Node { op, operands, results, .. }: &Node) {
        let (x, w) = (operands[0], operands[1]);
        let (lse, mean) = match (op, &results[..]) {
            (Op::LinearLse, &[lse]) => (Some(lse), None),
            (Op::LinearMean, &[mean]) => (None, Some(mean)),
            (Op::LinearLseAndMean, &[lse, mean]) => (Some(lse), Some(mean)),
            _ => unreachable!("only the `linear_*` operations have chunked logits"),
        };
        let [lse, mean] = [lse, mean].map(|v| v.map(|v| self.allocate_result(v)));

        let rows = dim_extent(self.ty(x).shape[0]);
        let vocabulary = self.ty(w).shape[0].constant().expect("the vocabulary is a constant");
        let most = self.module.thresholds.vocab_chunk.min(vocabulary);
        let scores_in_thread = scores_per_thread(self.module.machine, most);
        let pass = ChunkedPass {
            scores: self.scratch(vec![rows.clone(), Extent::Const(most)]),
            scores_in_thread,
            state: self.scratch(vec![rows.clone(), Extent::Const(2)]),
            lse,
            mean,
            rows,
            width: dim_extent(self.ty(w).shape[1]),
        };
        let x = self.materialize(x);
        self.materialize(w);
        for start in (0..vocabulary).step_by(most as usize) {
            let (chunk, again) = (start..vocabulary.min(start + most), start > 0);
            self.gemm_with_weight_rows((x, pass.rows.clone()), w, chunk.clone(), true, (pass.scores, false));
            self.update_chunk(&pass, chunk.end - start, again);
            if let Some(mean) = mean {
                self.gemm_with_weight_rows((pass.scores, pass.rows.clone()), w, chunk, false, (mean, again));
            }
        }
        self.finish_chunks(&pass);
    }

    /// A gemm with some `rows` of the weight y, beginning at a multiple of a tile's columns: x @ y[rows]ᵀ, or x @
    /// y[rows]. With the second part of `out` set it adds to that buffer, otherwise it overwrites it. All matrices are
    /// row-major.
    fn gemm_with_weight_rows(
        &mut self,
        x: (BufferId, Extent),
        y: Value,
        rows: Range<u64>,
        transpose_y: bool,
        out: (BufferId, bool),
    ) {
        match self.analysis.fusion.register_epilogue_columns {
            None => self.cpu_gemm_with_weight_rows(x, y, rows, transpose_y, out),
            Some(_) => self.gpu_gemm_with_weight_rows(x, y, rows, transpose_y, out),
        }
    }

    /// Updates m, z and y with a chunk of scores. If there is a y, the exponentials overwrite the scores.
    fn update_chunk(&mut self, pass: &ChunkedPass, length: u64, again: bool) {
        let (mean, scores_in_thread) = (pass.mean, pass.scores_in_thread);
        let mut buffers = ChunkBuffers { scores: pass.scores, state: pass.state }.list();
        buffers.extend(mean);
        let [length, again] = [length, again.into()].map(Extent::Const);
        let sizes = ChunkSizes { length, width: pass.width.clone(), accumulate: again }.list();
        let units = pass.rows.clone() * Extent::Const(self.module.machine.team_size());
        self.launch(ChunkUpdate { mean: mean.is_some(), scores_per_thread: scores_in_thread }, buffers, sizes, units);
    }

    /// Computes the results from m, z and y.
    fn finish_chunks(&mut self, pass: &ChunkedPass) {
        let ChunkedPass { lse, mean, .. } = *pass;
        let buffers: Vec<BufferId> = [Some(pass.state), lse, mean].into_iter().flatten().collect();
        let units = pass.rows.clone() * Extent::Const(self.module.machine.team_size());
        let schedule = ChunkFinish { lse: lse.is_some(), mean: mean.is_some() };
        self.launch(schedule, buffers, FinishSizes { width: pass.width.clone() }.list(), units);
    }
}

/// The buffers and sizes of one pass over the chunks.
struct ChunkedPass {
    /// The scores of one chunk.
    scores: BufferId,
    /// On a GPU: the number of scores of a row that each thread holds.
    scores_in_thread: Option<u64>,
    /// The running maximum m and sum z of each row.
    state: BufferId,
    lse: Option<BufferId>,
    mean: Option<BufferId>,
    rows: Extent,
    width: Extent,
}
