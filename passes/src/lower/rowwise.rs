//! Rowwise operations: softmax, normalization, segment means and cross entropy.

use peft_grammar::graph::{Type, Value};
use peft_grammar::names::Input;
use peft_runtime::artifact::{BufferId, Extent};

use super::dispatch::Fused;
use super::entry::DispatchLowering;
use super::row_layout::RowLayout;
use super::schedule;
use super::sizes::dim_extent;
use crate::kernels::rowwise::{
    CrossEntropy, CrossEntropyBuffers, CrossEntropySizes, Normalize, NormalizeSizes, RowOp, RowOperation,
    SegmentBuffers, SegmentMean, SegmentSizes,
};

impl DispatchLowering<'_, '_, '_, '_> {
    /// An operation with one result row, or one number, for each row of operands of type `ty`.
    pub(super) fn row_kernel(&mut self, kind: RowOp, operands: &[BufferId], ty: &Type, result: Value) {
        let rows = RowLayout::of(ty);
        let mut buffers = operands.to_vec();
        buffers.push(self.allocate_result(result));
        buffers.extend(rows.row_offsets(self.module));
        self.launch(
            RowOperation { kind, ragged: rows.is_ragged() },
            buffers,
            rows.sizes().list(),
            RowLayout::count(ty),
        );
    }

    /// A normalization, or its vjp if the adjoint of its result is the second operand, with an epilogue.
    pub(super) fn normalization(&mut self, fused: &Fused, eps: f64) -> Result<(), String> {
        let node = &self.graph.nodes[fused.node];
        let (result, ty) = (node.result(), self.ty(node.result()));
        let rows = RowLayout::of(ty);
        let mut buffers: Vec<BufferId> = node.operands.iter().map(|&v| self.materialize(v)).collect();
        self.place_fused_results(fused);
        let stays = fused.stored;
        let out = if stays { self.allocate_result(result) } else { self.buffer_view(result).buffer };
        buffers.push(out);
        buffers.extend(rows.row_offsets(self.module));
        let lowered = self.lower_epilogue(fused, &buffers, true)?;
        let rows_of_batch = ty.shape.iter().rev().nth(1).map_or(Extent::Const(1), |&d| dim_extent(d));
        let mut sizes = rows.sizes().list();
        sizes.extend(NormalizeSizes { rows: rows_of_batch }.list());
        sizes.extend(lowered.sizes);
        buffers.extend(lowered.buffers);
        self.label = lowered.epilogue.label(node.op.name());
        let storage = schedule::row_storage(self.module.machine, &rows);
        let (vjp, epilogue) = (node.operands.len() > 1, lowered.epilogue);
        self.launch(
            Normalize { vjp, eps: eps.into(), storage, stored: stays, epilogue },
            buffers,
            sizes,
            RowLayout::count(ty),
        );
        Ok(())
    }

    /// The mean of each sequence's rows.
    pub(super) fn segment_mean(&mut self, x: BufferId, result: Value) {
        let (out, offsets) = (self.allocate_result(result), self.module.derived_input(Input::Offsets));
        let sizes = SegmentSizes { width: dim_extent(self.ty(result).shape[1]) }.list();
        let buffers = SegmentBuffers { x, out, offsets }.list();
        self.launch(SegmentMean { vjp: false }, buffers, sizes, Extent::Sequences);
    }

    /// The vjp of the mean of each sequence's rows.
    pub(super) fn segment_mean_vjp(&mut self, y: BufferId, result: Value) {
        let (out, offsets) = (self.allocate_result(result), self.module.derived_input(Input::Offsets));
        let sizes = SegmentSizes { width: dim_extent(self.ty(result).shape[1]) }.list();
        let mut buffers = SegmentBuffers { x: y, out, offsets }.list();
        buffers.push(self.module.derived_input(Input::Segments));
        self.launch(SegmentMean { vjp: true }, buffers, sizes, Extent::Tokens);
    }

    /// The cross-entropy loss of each row of logits; with `adjoint`, the adjoint of the loss, the adjoint of the logits
    /// instead.
    pub(super) fn cross_entropy(
        &mut self,
        logits: BufferId,
        ty: &Type,
        labels: BufferId,
        adjoint: Option<BufferId>,
        smoothing: f64,
        result: Value,
    ) {
        let out = self.allocate_result(result);
        let mut buffers = CrossEntropyBuffers { logits, labels, out }.list();
        buffers.extend(adjoint);
        let sizes = CrossEntropySizes { classes: dim_extent(ty.shape[1]) }.list();
        let schedule = CrossEntropy { vjp: adjoint.is_some(), smoothing: smoothing.into() };
        self.launch(schedule, buffers, sizes, dim_extent(ty.shape[0]));
    }
}
