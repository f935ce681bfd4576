//! Operations that move elements: `reshape`, `permute`, `slice`, `concat`, `pad`. Most of them make views.

use peft_grammar::graph::{Type, Value};
use peft_grammar::names::Input;
use peft_runtime::artifact::{BufferId, Extent};

use super::entry::Turn;
use super::sizes::{dim_extent, extents};
use super::span::Rows;
use crate::kernels::copy::{CopyBuffers, CopyRagged, Pad, PadSizes, RaggedSizes};

impl Turn<'_, '_, '_, '_> {
    /// The same elements in the same order. A view whose axes cannot become one is copied first.
    pub(super) fn reshape(&mut self, x: Value, result: Value) {
        if let Some(view) = self.place(x).view.clone() {
            // What has a view is not frozen.
            self.frozen = None;
            if let Some(view) = view.reshape(&self.ty(result).shape) {
                return self.show(result, self.place(x).buffer, view);
            }
            self.dense(x);
        }
        let mut place = self.place(x).clone();
        place.frozen = place.frozen.map(|key| format!("{key} as {}", self.ty(result)));
        self.places[result.0 as usize] = Some(place);
    }

    pub(super) fn permute(&mut self, x: Value, axes: &[usize], result: Value) {
        self.look(x, self.view(x).permute(axes), result);
    }

    pub(super) fn slice(&mut self, x: Value, axis: usize, start: u64, result: Value) {
        let (ty, own) = (self.ty(x), self.ty(result));
        if self.along_rows(axis, x) {
            let (x, out) = (self.dense(x), self.result(result));
            return self.copy_ragged((x, ty, start), (out, own, 0), false, false);
        }
        self.look(x, self.view(x).slice(axis, start, own.shape[axis]), result);
    }

    /// Parts that were written where they belong stay there.
    pub(super) fn concat(&mut self, parts: &[Value], axis: usize, result: Value) {
        let own = self.ty(result);
        let along_rows = self.along_rows(axis, result);
        let (out, whole) = if along_rows { (self.result(result), self.view(result)) } else { self.target(result) };
        let mut start = 0;
        for &part in parts {
            let ty = self.ty(part);
            if along_rows {
                let x = self.dense(part);
                self.copy_ragged((x, ty, 0), (out, own, start), true, false);
            } else {
                let target = whole.clone().slice(axis, start, ty.shape[axis]);
                let (buffer, view) = (self.place(part).buffer, self.view(part));
                if buffer != out || !view.alike(&target) {
                    self.copy_view((buffer, &view), (out, &target));
                }
            }
            // A ragged part is the last one.
            start += ty.shape[axis].constant().unwrap_or(0);
        }
    }

    pub(super) fn pad(&mut self, x: BufferId, ty: &Type, axis: usize, start: u64, result: Value) {
        let out = self.result(result);
        let own = self.ty(result);
        if self.along_rows(axis, result) {
            return self.copy_ragged((x, ty, 0), (out, own, start), true, true);
        }
        let (rows, width, inner) = around(own, axis);
        let (_, narrow, _) = around(ty, axis);
        let (length, start) = (narrow * inner.clone(), Extent::Const(start) * inner.clone());
        let sizes = PadSizes { length, start, width: width * inner }.list();
        self.launch(Pad, CopyBuffers { from: x, to: out }.list(), sizes, rows);
    }

    /// The same along a ragged axis, of the source or of the target or of both. `by_source`: the whole
    /// row of the source is copied, otherwise the whole row of the target is filled.
    fn copy_ragged(
        &mut self,
        (from, from_ty, start): (BufferId, &Type, u64),
        (to, to_ty, start_to): (BufferId, &Type, u64),
        by_source: bool,
        clear: bool,
    ) {
        let (source, target) = (Rows::of(from_ty), Rows::of(to_ty));
        let mut buffers = CopyBuffers { from, to }.list();
        buffers.push(self.module.derived(Input::Pairs));
        let starts = RaggedSizes { start: Extent::Const(start), start_to: Extent::Const(start_to) };
        let sizes = [source.sizes().list(), target.sizes().list(), starts.list()].concat();
        let schedule = CopyRagged { ragged: [source.ragged(), target.ragged()], by_source, clear };
        self.launch(schedule, buffers, sizes, Rows::count(to_ty));
    }
}

/// Elements before, along and after an axis that is not ragged itself.
pub(super) fn around(ty: &Type, axis: usize) -> (Extent, Extent, Extent) {
    let all = extents(ty);
    let product = |part: &[Extent]| part.iter().fold(Extent::Const(1), |n, e| n * e.clone());
    (product(&all[..axis]), dim_extent(ty.shape[axis]), product(&all[axis + 1..]))
}
