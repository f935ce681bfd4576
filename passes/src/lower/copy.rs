//! Operations that move elements: `reshape`, `permute`, `slice`, `concat`, `pad`. Most of them become views and launch
//! nothing.

use peft_grammar::graph::{Type, Value};
use peft_grammar::names::Input;
use peft_runtime::artifact::{BufferId, Extent};

use super::entry::DispatchLowering;
use super::row_layout::RowLayout;
use super::sizes::{dim_extent, extents};
use crate::kernels::copy::{CopyBuffers, CopyRagged, Pad, PadSizes, RaggedSizes};

impl DispatchLowering<'_, '_, '_, '_> {
    /// The same elements in the same order. A view whose axes have no common stride is copied first.
    pub(super) fn reshape(&mut self, x: Value, result: Value) {
        if let Some(view) = self.buffer_view(x).view.clone() {
            // A frozen value is never a strided view.
            self.frozen = None;
            if let Some(view) = view.reshape(&self.ty(result).shape) {
                return self.set_view(result, self.buffer_view(x).buffer, view);
            }
            self.materialize(x);
        }
        let mut place = self.buffer_view(x).clone();
        place.frozen = place.frozen.map(|key| format!("{key} as {}", self.ty(result)));
        self.buffer_views[result.0 as usize] = Some(place);
    }

    /// The same elements with permuted axes, as a view.
    pub(super) fn permute(&mut self, x: Value, axes: &[usize], result: Value) {
        self.alias(x, self.view(x).permute(axes), result);
    }

    /// Part of an axis: a view, or a copy along the ragged axis.
    pub(super) fn slice(&mut self, x: Value, axis: usize, start: u64, result: Value) {
        let (ty, own) = (self.ty(x), self.ty(result));
        if self.is_ragged_axis(axis, x) {
            let (x, out) = (self.materialize(x), self.allocate_result(result));
            return self.copy_ragged((x, ty, start), (out, own, 0), false, false);
        }
        self.alias(x, self.view(x).slice(axis, start, own.shape[axis]), result);
    }

    /// Values side by side along an axis. A part whose kernel has stored it in its place already is not copied.
    pub(super) fn concat(&mut self, parts: &[Value], axis: usize, result: Value) {
        let own = self.ty(result);
        let is_ragged_axis = self.is_ragged_axis(axis, result);
        let (out, whole) = if is_ragged_axis {
            (self.allocate_result(result), self.view(result))
        } else {
            self.result_destination(result)
        };
        let mut start = 0;
        for &part in parts {
            let ty = self.ty(part);
            if is_ragged_axis {
                let x = self.materialize(part);
                self.copy_ragged((x, ty, 0), (out, own, start), true, false);
            } else {
                let target = whole.clone().slice(axis, start, ty.shape[axis]);
                let (buffer, view) = (self.buffer_view(part).buffer, self.view(part));
                if buffer != out || !view.same_layout(&target) {
                    self.copy_view((buffer, &view), (out, &target));
                }
            }
            // A ragged part is the last one.
            start += ty.shape[axis].constant().unwrap_or(0);
        }
    }

    /// The operand within zeros along an axis.
    pub(super) fn pad(&mut self, x: BufferId, ty: &Type, axis: usize, start: u64, result: Value) {
        let out = self.allocate_result(result);
        let own = self.ty(result);
        if self.is_ragged_axis(axis, result) {
            return self.copy_ragged((x, ty, 0), (out, own, start), true, true);
        }
        let (rows, width, inner) = around_axis(own, axis);
        let (_, narrow, _) = around_axis(ty, axis);
        let (length, start) = (narrow * inner.clone(), Extent::Const(start) * inner.clone());
        let sizes = PadSizes { length, start, width: width * inner }.list();
        self.launch(Pad, CopyBuffers { from: x, to: out }.list(), sizes, rows);
    }

    /// Copies part of each row where the source's rows, the target's rows, or both are ragged. With `by_source` it
    /// copies whole rows of the source; otherwise it fills whole rows of the target. With `clear` it sets the rest of
    /// the target to zero.
    fn copy_ragged(
        &mut self,
        (from, from_ty, start): (BufferId, &Type, u64),
        (to, to_ty, start_to): (BufferId, &Type, u64),
        by_source: bool,
        clear: bool,
    ) {
        let (source, target) = (RowLayout::of(from_ty), RowLayout::of(to_ty));
        let mut buffers = CopyBuffers { from, to }.list();
        buffers.push(self.module.derived_input(Input::Pairs));
        let starts = RaggedSizes { start: Extent::Const(start), start_to: Extent::Const(start_to) };
        let sizes = [source.sizes().list(), target.sizes().list(), starts.list()].concat();
        let schedule = CopyRagged { ragged: [source.is_ragged(), target.is_ragged()], by_source, clear };
        self.launch(schedule, buffers, sizes, RowLayout::count(to_ty));
    }
}

/// The numbers of elements before, along and after an axis that is not ragged itself.
fn around_axis(ty: &Type, axis: usize) -> (Extent, Extent, Extent) {
    let all = extents(ty);
    let product = |part: &[Extent]| part.iter().fold(Extent::Const(1), |n, e| n * e.clone());
    (product(&all[..axis]), dim_extent(ty.shape[axis]), product(&all[axis + 1..]))
}
