//! Operations along rows: softmax and normalization, adding into rows, means over sequences, cross entropy.

use peft_grammar::graph::{Type, Value};
use peft_grammar::names::Input;
use peft_runtime::artifact::{BufferId, Extent};

use super::dispatch::Taken;
use super::entry::Turn;
use super::schedule;
use super::sizes::{dim_extent, product};
use super::span::Rows;
use crate::kernels::embedding::{self, FewSizes, ScatterBuffers, ScatterSizes, ScatterToFew};
use crate::kernels::rowwise::{
    Along, CrossEntropy, CrossEntropyBuffers, CrossEntropySizes, Kind, Normalize, NormalizeSizes, SegmentBuffers,
    SegmentMean, SegmentSizes,
};

impl Turn<'_, '_, '_, '_> {
    pub(super) fn row_kernel(&mut self, kind: Kind, operands: &[BufferId], ty: &Type, result: Value) {
        let rows = Rows::of(ty);
        let mut buffers = operands.to_vec();
        buffers.push(self.result(result));
        buffers.extend(rows.places(self.module));
        self.launch(Along { kind, ragged: rows.ragged() }, buffers, rows.sizes().list(), Rows::count(ty));
    }

    /// A normalization, or with the adjoint of its result that of its operand, and what follows.
    pub(super) fn normalization(&mut self, taken: &Taken, eps: f64) -> Result<(), String> {
        let node = &self.graph.nodes[taken.at];
        let (result, ty) = (node.result(), self.ty(node.result()));
        let rows = Rows::of(ty);
        let mut buffers: Vec<BufferId> = node.operands.iter().map(|&v| self.dense(v)).collect();
        self.place_taken(taken);
        let stays = taken.stays;
        let out = if stays { self.result(result) } else { self.place(result).buffer };
        buffers.push(out);
        buffers.extend(rows.places(self.module));
        let following = self.epilogue(taken, &buffers, true)?;
        let rows_of_batch = ty.shape.iter().rev().nth(1).map_or(Extent::Const(1), |&d| dim_extent(d));
        let mut sizes = rows.sizes().list();
        sizes.extend(NormalizeSizes { rows: rows_of_batch }.list());
        sizes.extend(following.sizes);
        buffers.extend(following.buffers);
        self.label = following.epilogue.label(node.op.name());
        let lie = schedule::lie(self.module.machine, &rows);
        let (vjp, epilogue) = (node.operands.len() > 1, following.epilogue);
        self.launch(Normalize { vjp, eps: eps.into(), lie, stays, epilogue }, buffers, sizes, Rows::count(ty));
        Ok(())
    }

    pub(super) fn scatter(&mut self, ids: BufferId, ids_ty: &Type, y: BufferId, start: u64, result: Value) {
        let out = self.result(result);
        let shape = &self.ty(result).shape;
        let (count, width, start) = (product(&ids_ty.shape), dim_extent(shape[1]), Extent::Const(start));
        let buffers = ScatterBuffers { ids, y, out }.list();
        let (machine, rows) = (self.module.machine, dim_extent(shape[0]));
        match schedule::scatter(machine, shape[0].constant()) {
            None => {
                let blocks = Extent::CeilDiv(Box::new(width.clone()), machine.lanes());
                let units = rows * Extent::Const(machine.team()) * blocks.clone();
                let sizes = FewSizes { count, width, blocks, start }.list();
                self.launch(ScatterToFew, buffers, sizes, units);
            }
            Some(scatter) => {
                let blocks = Extent::CeilDiv(Box::new(width.clone()), embedding::COLUMNS);
                let sizes = ScatterSizes { count, rows, width, start }.list();
                self.launch(scatter, buffers, sizes, blocks * Extent::Const(scatter.parts));
            }
        }
    }

    pub(super) fn segment_mean(&mut self, x: BufferId, result: Value) {
        let (out, offsets) = (self.result(result), self.module.derived(Input::Offsets));
        let sizes = SegmentSizes { width: dim_extent(self.ty(result).shape[1]) }.list();
        let buffers = SegmentBuffers { x, out, offsets }.list();
        self.launch(SegmentMean { vjp: false }, buffers, sizes, Extent::Sequences);
    }

    pub(super) fn segment_mean_vjp(&mut self, y: BufferId, result: Value) {
        let (out, offsets) = (self.result(result), self.module.derived(Input::Offsets));
        let sizes = SegmentSizes { width: dim_extent(self.ty(result).shape[1]) }.list();
        let mut buffers = SegmentBuffers { x: y, out, offsets }.list();
        buffers.push(self.module.derived(Input::Segments));
        self.launch(SegmentMean { vjp: true }, buffers, sizes, Extent::Tokens);
    }

    /// The loss of each row; with the loss's adjoint, the adjoint of the logits.
    pub(super) fn cross_entropy(
        &mut self,
        logits: BufferId,
        ty: &Type,
        labels: BufferId,
        adjoint: Option<BufferId>,
        smoothing: f64,
        result: Value,
    ) {
        let out = self.result(result);
        let mut buffers = CrossEntropyBuffers { logits, labels, out }.list();
        buffers.extend(adjoint);
        let sizes = CrossEntropySizes { classes: dim_extent(ty.shape[1]) }.list();
        let schedule = CrossEntropy { vjp: adjoint.is_some(), smoothing: smoothing.into() };
        self.launch(schedule, buffers, sizes, dim_extent(ty.shape[0]));
    }
}
