//! Operations that move elements: `permute`, `slice`, `pad`, `concat`.

use peft_grammar::graph::{Type, Value};
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::kernel::{Buf, Kernel, LANES, VECTOR, Val, define, first};
use super::span::{Rows, Span};
use super::{Lowering, dim_extent, extents};

/// A copy row by row: from an offset in each row of the source to one in each row of the target.
struct Copy {
    rows: Extent,
    length: Extent,
    /// Width of a row, and where the copy begins in it.
    source: (Extent, Extent),
    target: (Extent, Extent),
    /// The rest of the target's row becomes 0.
    clear: bool,
}

impl Lowering<'_, '_, '_> {
    pub(super) fn copy_all(&mut self, from: BufferId, to: BufferId, elements: Extent) {
        let zero = Extent::Const(0);
        self.copy(
            from,
            to,
            Copy {
                rows: Extent::Const(1),
                length: elements.clone(),
                source: (elements.clone(), zero.clone()),
                target: (elements, zero),
                clear: false,
            },
        );
    }

    pub(super) fn slice(&mut self, x: BufferId, ty: &Type, axis: usize, start: u64, result: Value) {
        let out = self.result(result);
        let own = self.ty(result).clone();
        if ty.ragged() && axis + 1 == ty.rank() {
            return self.copy_ragged((x, ty, start), (out, &own, 0), false, false);
        }
        let (rows, width, inner) = around(ty, axis);
        let (_, narrow, _) = around(&own, axis);
        let length = narrow * inner.clone();
        let source = (width * inner.clone(), Extent::Const(start) * inner.clone());
        let target = (length.clone(), Extent::Const(0));
        self.copy(x, out, Copy { rows, length, source, target, clear: false }.split(inner));
    }

    pub(super) fn pad(&mut self, x: BufferId, ty: &Type, axis: usize, start: u64, result: Value) {
        let out = self.result(result);
        let own = self.ty(result).clone();
        if own.ragged() && axis + 1 == own.rank() {
            return self.copy_ragged((x, ty, 0), (out, &own, start), true, true);
        }
        let (rows, width, inner) = around(&own, axis);
        let (_, narrow, _) = around(ty, axis);
        let length = narrow * inner.clone();
        let source = (length.clone(), Extent::Const(0));
        let target = (width * inner.clone(), Extent::Const(start) * inner);
        self.copy(x, out, Copy { rows, length, source, target, clear: true });
    }

    pub(super) fn concat(&mut self, parts: &[Value], axis: usize, result: Value) {
        let out = self.result(result);
        let own = self.ty(result).clone();
        let mut start = 0;
        for &part in parts {
            let (x, ty) = (self.place(part).buffer, self.ty(part).clone());
            if own.ragged() && axis + 1 == own.rank() {
                self.copy_ragged((x, &ty, 0), (out, &own, start), true, false);
            } else {
                let (rows, width, inner) = around(&own, axis);
                let (_, narrow, _) = around(&ty, axis);
                let length = narrow * inner.clone();
                let source = (length.clone(), Extent::Const(0));
                let target = (width * inner.clone(), Extent::Const(start) * inner.clone());
                self.copy(x, out, Copy { rows, length, source, target, clear: false }.split(inner));
            }
            // A ragged part is the last one.
            start += ty.shape[axis].constant().unwrap_or(0);
        }
    }

    fn copy(&mut self, from: BufferId, to: BufferId, copy: Copy) {
        let Copy { rows, length, source, target, clear } = copy;
        let name = if clear { "copy_cleared" } else { "copy" };
        let kernel = self.target.kernel(name, |name| {
            define(name, &[Element::F32; 2], 5, |k, buffers, sizes| {
                let ([from, to], [length, width, start, width_to, start_to]) = (first(buffers), first(sizes));
                k.units(|k, row| {
                    let source = k.mul(row, width);
                    let source = k.add(source, start);
                    let target = k.mul(row, width_to);
                    if clear {
                        let zero = k.float(0.0, VECTOR);
                        k.lanes(width_to, |k, j, mask| {
                            let place = k.add(target, j);
                            k.store_lanes(zero, to, place, mask);
                        });
                    }
                    let target = k.add(target, start_to);
                    move_row(k, (from, source), (to, target), length);
                });
            })
        });
        self.launch(kernel, vec![from, to], vec![length, source.0, source.1, target.0, target.1], rows);
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
        let kernel = self.target.kernel(&name, |name| {
            define(name, &elements, 8, |k, buffers, sizes| {
                let [from, to, pairs] = first(buffers);
                k.units(|k, row| {
                    let Span { base, length } = Rows::span(k, row, &sizes[0..3], ragged.then_some(pairs));
                    let Span { base: base_to, length: length_to } =
                        Rows::span(k, row, &sizes[3..6], ragged_to.then_some(pairs));
                    if clear {
                        let zero = k.float(0.0, VECTOR);
                        k.lanes(length_to, |k, j, mask| {
                            let place = k.add(base_to, j);
                            k.store_lanes(zero, to, place, mask);
                        });
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

    /// Row by row of the result; elements are gathered where the last axis moved.
    pub(super) fn permute(&mut self, x: BufferId, ty: &Type, axes: &[usize], result: Value) {
        let out = self.result(result);
        self.permute_into(x, &extents(ty), axes, out);
    }

    pub(super) fn permute_into(&mut self, x: BufferId, shape: &[Extent], axes: &[usize], out: BufferId) {
        // Axes that stay neighbours are one.
        let mut runs: Vec<std::ops::Range<usize>> = vec![];
        for &axis in axes {
            match runs.last_mut() {
                Some(run) if run.end == axis => run.end += 1,
                _ => runs.push(axis..axis + 1),
            }
        }
        let product = |range: std::ops::Range<usize>| shape[range].iter().fold(Extent::Const(1), |n, e| n * e.clone());
        let sizes: Vec<Extent> = runs.iter().map(|run| product(run.clone())).collect();
        let strides = runs.iter().map(|run| product(run.end..shape.len()));
        let gathers = runs.last().is_some_and(|run| run.end != shape.len());
        let rank = runs.len();
        let name = format!("permute{rank}_{}", if gathers { "gather" } else { "rows" });
        let kernel = self.target.kernel(&name, |name| permute_kernel(name, rank, gathers));
        let units = sizes[..rank.saturating_sub(1)].iter().fold(Extent::Const(1), |n, e| n * e.clone());
        let sizes = sizes.iter().cloned().chain(strides).collect();
        self.launch(kernel, vec![x, out], sizes, units);
    }
}

impl Copy {
    /// One long row becomes many short ones, which threads can share.
    fn split(self, inner: Extent) -> Copy {
        let one = Extent::Const(1);
        if self.rows != one || inner == one {
            return self;
        }
        match self.length {
            Extent::Mul(count, row) if *row == inner => {
                let (source, target) = ((inner.clone(), self.source.1), (inner.clone(), self.target.1));
                Copy { rows: *count, length: inner, source, target, clear: self.clear }
            }
            Extent::Const(n) => match inner {
                Extent::Const(row) => {
                    let (source, target) = ((inner.clone(), self.source.1), (inner.clone(), self.target.1));
                    Copy { rows: Extent::Const(n / row), length: inner, source, target, clear: self.clear }
                }
                _ => self,
            },
            _ => self,
        }
    }
}

/// Elements before, along and after an axis that is not ragged itself.
pub(super) fn around(ty: &Type, axis: usize) -> (Extent, Extent, Extent) {
    let all = extents(ty);
    let product = |part: &[Extent]| part.iter().fold(Extent::Const(1), |n, e| n * e.clone());
    (product(&all[..axis]), dim_extent(ty.shape[axis]), product(&all[axis + 1..]))
}

fn move_row(k: &mut Kernel, (from, source): (Buf, Val), (to, target): (Buf, Val), length: Val) {
    k.lanes(length, |k, j, mask| {
        let place = k.add(source, j);
        let x = k.load_lanes(from, place, mask);
        let place = k.add(target, j);
        k.store_lanes(x, to, place, mask);
    });
}

fn permute_kernel(name: &str, rank: usize, gathers: bool) -> String {
    define(name, &[Element::F32; 2], 2 * rank, |k, buffers, sizes| {
        let [from, to] = first(buffers);
        let (sizes, strides) = sizes.split_at(rank);
        let (length, stride) = (sizes[rank - 1], strides[rank - 1]);
        k.units(|k, row| {
            let mut source = k.index(0);
            let mut rest = row;
            for axis in (0..rank - 1).rev() {
                let index = if axis == 0 { rest } else { k.rem(rest, sizes[axis]) };
                rest = k.div(rest, sizes[axis]);
                let offset = k.mul(index, strides[axis]);
                source = k.add(source, offset);
            }
            let target = k.mul(row, length);
            if !gathers {
                return move_row(k, (from, source), (to, target), length);
            }
            let lanes = k.lane_numbers();
            let steps = k.to_i32(stride);
            let steps = k.splat(steps, LANES);
            let steps = k.mul(lanes, steps);
            k.lanes(length, |k, j, mask| {
                let offset = k.mul(j, stride);
                let place = k.add(source, offset);
                let x = k.gather_lanes(from, place, steps, mask);
                let place = k.add(target, j);
                k.store_lanes(x, to, place, mask);
            });
        });
    })
}
