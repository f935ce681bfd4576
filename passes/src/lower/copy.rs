//! Operations that move elements: `reshape`, `permute`, `slice`, `concat`, `pad`. Most of them make views.

use peft_grammar::graph::{Type, Value};
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::span::{Rows, Span};
use super::{Lowering, dim_extent, extents};
use crate::builder::{Buf, Kernel, Val, define, first};

impl Lowering<'_, '_, '_> {
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
        let kernel = self.target.kernel("pad", |machine| {
            define(machine, &[Element::F32; 2], 3, |k, buffers, sizes| {
                let ([from, to], [length, start, width]) = (first(buffers), first(sizes));
                k.units(|k, row| {
                    let (source, target) = (k.mul(row, length), k.mul(row, width));
                    let zero = k.floats(0.0);
                    k.lanes(width, |k, j, mask| {
                        let place = k.add(target, j);
                        k.store_lanes(zero, to, place, mask);
                    });
                    k.settle();
                    let target = k.add(target, start);
                    move_row(k, (from, source), (to, target), length);
                });
            })
        });
        let sizes = vec![narrow * inner.clone(), Extent::Const(start) * inner.clone(), width * inner];
        self.launch(kernel, vec![x, out], sizes, rows);
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
        let way = if by_source { "source" } else { "target" };
        let cleared = if clear { "_cleared" } else { "" };
        let name = format!("copy_{}_to_{}_by_{way}{cleared}", source.kind(), target.kind());
        let (ragged, ragged_to) = (source.ragged(), target.ragged());
        let elements = [Element::F32, Element::F32, Element::I32];
        let kernel = self.target.kernel(&name, |machine| {
            define(machine, &elements, 8, |k, buffers, sizes| {
                let [from, to, pairs] = first(buffers);
                k.units(|k, row| {
                    let Span { base, length } = Rows::span(k, row, &sizes[0..3], ragged.then_some(pairs));
                    let Span { base: base_to, length: length_to } =
                        Rows::span(k, row, &sizes[3..6], ragged_to.then_some(pairs));
                    if clear {
                        let zero = k.floats(0.0);
                        k.lanes(length_to, |k, j, mask| {
                            let place = k.add(base_to, j);
                            k.store_lanes(zero, to, place, mask);
                        });
                        k.settle();
                    }
                    let (source, target) = (k.add(base, sizes[6]), k.add(base_to, sizes[7]));
                    move_row(k, (from, source), (to, target), if by_source { length } else { length_to });
                });
            })
        });
        let pairs = self.target.derived("pairs");
        let mut sizes: Vec<Extent> = source.sizes().into();
        sizes.extend(target.sizes());
        sizes.extend([Extent::Const(start), Extent::Const(start_to)]);
        self.launch(kernel, vec![from, to, pairs], sizes, Rows::count(to_ty));
    }
}

/// Elements before, along and after an axis that is not ragged itself.
pub(super) fn around(ty: &Type, axis: usize) -> (Extent, Extent, Extent) {
    let all = extents(ty);
    let product = |part: &[Extent]| part.iter().fold(Extent::Const(1), |n, e| n * e.clone());
    (product(&all[..axis]), dim_extent(ty.shape[axis]), product(&all[axis + 1..]))
}

pub(super) fn move_row(k: &mut Kernel, (from, source): (Buf, Val), (to, target): (Buf, Val), length: Val) {
    k.lanes(length, |k, j, mask| {
        let place = k.add(source, j);
        let x = k.load_lanes(from, place, mask);
        let place = k.add(target, j);
        k.store_lanes(x, to, place, mask);
    });
}
