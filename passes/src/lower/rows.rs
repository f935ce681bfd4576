//! Operations along rows: softmax and normalization, adding into rows, means over sequences, cross entropy.

use peft_grammar::graph::{Dim, Type, Value};
use peft_runtime::artifact::{BufferId, Extent};

use super::span::Rows;
use super::{Lowering, dim_extent, product};
use crate::kernels::embedding::{self, FewSizes, Scatter, ScatterBuffers, ScatterSizes, ScatterToFew};
use crate::kernels::rowwise::{
    Along, CrossEntropy, CrossEntropyBuffers, CrossEntropySizes, Kind, Lie, Normalize, NormalizeSizes, SegmentBuffers,
    SegmentMean, SegmentSizes,
};
use crate::target::Machine;
use crate::target::cuda::WARP;

/// Vectors of a row that a GPU's registers hold, at most.
const HELD: u64 = 32;
/// How many units of a GPU share a table's rows: so many that few of the tokens are a unit's own.
const PARTS: u64 = 256;
/// Rows of a table that are few.
const FEW: u64 = 64;

impl Lowering<'_, '_, '_> {
    pub(super) fn row_kernel(&mut self, kind: Kind, operands: &[BufferId], ty: &Type, result: Value) {
        let rows = Rows::of(ty);
        let mut buffers = operands.to_vec();
        buffers.push(self.result(result));
        buffers.extend(rows.places(self.target));
        self.launch(Along { kind, ragged: rows.ragged() }, buffers, rows.sizes().list(), Rows::count(ty));
    }

    /// A normalization, or with the adjoint of its result that of its operand, and what follows.
    pub(super) fn normalization(&mut self, at: usize, eps: f64) -> Result<(), String> {
        let node = &self.graph.nodes[at];
        let (result, ty) = (node.result, self.ty(node.result));
        let rows = Rows::of(ty);
        let mut buffers: Vec<BufferId> = node.operands.iter().map(|&v| self.dense(v)).collect();
        let taken = self.taken(at, at, false);
        let stays = taken.stays;
        let out = if stays { self.result(result) } else { self.place(result).buffer };
        buffers.push(out);
        buffers.extend(rows.places(self.target));
        let following = self.epilogue(&taken, &buffers, true)?;
        let rows_of_batch = ty.shape.iter().rev().nth(1).map_or(Extent::Const(1), |&d| dim_extent(d));
        let mut sizes = rows.sizes().list();
        sizes.extend(NormalizeSizes { rows: rows_of_batch }.list());
        sizes.extend(following.sizes);
        buffers.extend(following.buffers);
        self.label = following.epilogue.label(node.op.name());
        let lie = self.lie(&rows);
        let (vjp, epilogue) = (node.operands.len() > 1, following.epilogue);
        self.launch(Normalize { vjp, eps: eps.into(), lie, stays, epilogue }, buffers, sizes, Rows::count(ty));
        Ok(())
    }

    /// A GPU holds a row in registers, if it can: then all of it is on its way at once.
    fn lie(&self, rows: &Rows) -> Lie {
        match (self.target.machine, rows) {
            (_, Rows::Ragged(_)) => Lie::Ragged,
            (Machine::Cuda(_), Rows::Dense(Extent::Const(n))) if (1..=HELD).contains(&n.div_ceil(WARP)) => {
                Lie::Held(n.div_ceil(WARP))
            }
            (_, Rows::Dense(_)) => Lie::Dense,
        }
    }

    pub(super) fn scatter(&mut self, ids: BufferId, ids_ty: &Type, y: BufferId, start: u64, result: Value) {
        let out = self.result(result);
        let shape = &self.ty(result).shape;
        let (count, width, start) = (product(&ids_ty.shape), dim_extent(shape[1]), Extent::Const(start));
        let buffers = ScatterBuffers { ids, y, out }.list();
        let parts = match self.target.machine {
            Machine::Cpu(_) => 1,
            Machine::Cuda(_) => PARTS,
        };
        if let (Machine::Cuda(_), Dim::Const(rows @ 0..=FEW)) = (self.target.machine, shape[0]) {
            let machine = self.target.machine;
            let blocks = Extent::CeilDiv(Box::new(width.clone()), machine.lanes());
            let units = Extent::Const(rows * machine.team()) * blocks.clone();
            let sizes = FewSizes { count, width, blocks, start }.list();
            return self.launch(ScatterToFew, buffers, sizes, units);
        }
        let units = Extent::CeilDiv(Box::new(width.clone()), embedding::COLUMNS) * Extent::Const(parts);
        let sizes = ScatterSizes { count, rows: dim_extent(shape[0]), width, start }.list();
        self.launch(Scatter { parts }, buffers, sizes, units);
    }

    pub(super) fn segment_mean(&mut self, x: BufferId, result: Value) {
        let (out, offsets) = (self.result(result), self.target.derived("offsets"));
        let sizes = SegmentSizes { width: dim_extent(self.ty(result).shape[1]) }.list();
        let buffers = SegmentBuffers { x, out, offsets }.list();
        self.launch(SegmentMean { vjp: false }, buffers, sizes, Extent::Sequences);
    }

    pub(super) fn segment_mean_vjp(&mut self, y: BufferId, result: Value) {
        let (out, offsets) = (self.result(result), self.target.derived("offsets"));
        let sizes = SegmentSizes { width: dim_extent(self.ty(result).shape[1]) }.list();
        let mut buffers = SegmentBuffers { x: y, out, offsets }.list();
        buffers.push(self.target.derived("segments"));
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
