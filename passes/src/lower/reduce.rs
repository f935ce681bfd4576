//! Sums over axes: one axis at a time, the last one along rows, any other one down columns.

use peft_grammar::graph::{Dim, Type, Value};
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::kernel::{F32, Kernel, Val, define, first};
use super::span::{Rows, Span};
use super::view::View;
use super::{Lowering, dim_extent, extent, extents};

/// Columns of a unit.
const COLUMNS: u64 = 64;

impl Lowering<'_, '_, '_> {
    pub(super) fn reduce(
        &mut self,
        x: BufferId,
        ty: &Type,
        axes: &[usize],
        mean: bool,
        result: Value,
    ) -> Result<(), String> {
        // Neighbouring axes that share a fate are one.
        let mut runs: Vec<(Extent, bool)> = vec![];
        let ragged_last = ty.ragged() && axes.contains(&(ty.rank() - 1));
        let sizes: Vec<(Extent, bool)> = if ty.ragged() && !ragged_last {
            // Rows of a ragged tensor stay together.
            extents(ty).into_iter().enumerate().map(|(axis, size)| (size, axes.contains(&axis))).collect()
        } else {
            let dense = &ty.shape[..ty.rank() - usize::from(ragged_last)];
            dense.iter().enumerate().map(|(axis, &d)| (dim_extent(d), axes.contains(&axis))).collect()
        };
        for (size, reduced) in sizes {
            match runs.last_mut() {
                _ if size == Extent::Const(1) => {}
                Some((last, fate)) if *fate == reduced => *last = last.clone() * size,
                _ => runs.push((size, reduced)),
            }
        }
        let ratio = mean.then(|| (extent(ty), extent(self.ty(result))));
        let steps = runs.iter().filter(|(_, reduced)| *reduced).count() + usize::from(ragged_last);
        if steps == 0 {
            // Only axes of one element go.
            let out = self.result(result);
            let whole = View::dense(&ty.shape);
            self.copy_view((x, &whole), (out, &whole));
            return Ok(());
        }

        let product = |runs: &[(Extent, bool)]| runs.iter().fold(Extent::Const(1), |n, (size, _)| n * size.clone());
        let mut from = x;
        let mut left = steps;
        if ragged_last {
            left -= 1;
            let rows = Rows::of(ty);
            from = self.sum_rows(
                from,
                &rows,
                Rows::count(ty),
                ratio.clone().filter(|_| left == 0),
                (left == 0).then_some(result),
            );
        }
        while let Some(at) = runs.iter().rposition(|(_, reduced)| *reduced) {
            left -= 1;
            let ratio = ratio.clone().filter(|_| left == 0);
            let target = (left == 0).then_some(result);
            let (size, _) = runs.remove(at);
            let (outer, inner) = (product(&runs[..at]), product(&runs[at..]));
            from = if inner == Extent::Const(1) {
                self.sum_rows(from, &Rows::Dense(size), outer, ratio, target)
            } else {
                self.sum_columns(from, outer, size, inner, ratio, target)
            };
        }
        debug_assert!(!matches!(self.ty(result).shape.last(), Some(Dim::Values)));
        Ok(())
    }

    fn target_of(&mut self, shape: Extent, target: Option<Value>) -> BufferId {
        match target {
            Some(result) => self.result(result),
            None => self.scratch(vec![shape]),
        }
    }

    fn sum_rows(
        &mut self,
        x: BufferId,
        rows: &Rows,
        count: Extent,
        ratio: Option<(Extent, Extent)>,
        target: Option<Value>,
    ) -> BufferId {
        let out = self.target_of(count.clone(), target);
        let name = format!("{}_rows_{}", if ratio.is_some() { "mean" } else { "sum" }, rows.kind());
        let mut buffers = vec![x, out];
        buffers.extend(rows.places(self.target));
        let elements: Vec<Element> = [Element::F32; 2].into_iter().chain(rows.elements()).collect();
        let mut sizes: Vec<Extent> = rows.sizes().into();
        let averages = ratio.is_some();
        sizes.extend(ratio.into_iter().flat_map(|(all, kept)| [all, kept]));
        let kernel = self.target.kernel(&name, |title| {
            define(title, &elements, sizes.len(), |k, buffers, sizes| {
                let [x, out] = first(buffers);
                k.units(|k, row| {
                    let Span { base, length } = Rows::span(k, row, sizes, buffers.get(2).copied());
                    let zero = k.floats(0.0);
                    let sums = k.fold_lanes(length, &[zero], |k, j, mask, sums| {
                        let place = k.add(base, j);
                        let x = k.load_lanes(x, place, mask);
                        vec![k.add(sums[0], x)]
                    });
                    let mut sum = k.sum_lanes(sums[0]);
                    if averages {
                        let share = share(k, &sizes[3..]);
                        sum = k.mul(sum, share);
                    }
                    k.store(sum, out, row);
                });
            })
        });
        self.launch(kernel, buffers, sizes, count);
        out
    }

    fn sum_columns(
        &mut self,
        x: BufferId,
        outer: Extent,
        count: Extent,
        inner: Extent,
        ratio: Option<(Extent, Extent)>,
        target: Option<Value>,
    ) -> BufferId {
        let out = self.target_of(outer.clone() * inner.clone(), target);
        let averages = ratio.is_some();
        let name = if averages { "mean_columns" } else { "sum_columns" };
        let blocks = Extent::CeilDiv(Box::new(inner.clone()), COLUMNS);
        let mut sizes = vec![count, inner, blocks.clone()];
        sizes.extend(ratio.into_iter().flat_map(|(all, kept)| [all, kept]));
        let kernel = self.target.kernel(name, |title| {
            define(title, &[Element::F32; 2], sizes.len(), |k, buffers, sizes| {
                let ([x, out], [count, inner, blocks]) = (first(buffers), first(sizes));
                k.units(|k, unit| {
                    let (area, block) = (k.div(unit, blocks), k.rem(unit, blocks));
                    let width = k.index(COLUMNS);
                    let start = k.mul(block, width);
                    let size = k.mul(count, inner);
                    let base = k.mul(area, size);
                    let base = k.add(base, start);
                    let zero = k.index(0);
                    let lanes = k.lane_count();
                    let vectors: Vec<(Val, Val)> = (0..COLUMNS / lanes)
                        .map(|v| {
                            let offset = k.index(v * lanes);
                            let column = k.add(start, offset);
                            let left = k.sub(inner, column);
                            (offset, k.mask(left))
                        })
                        .collect();
                    let nothing = k.floats(0.0);
                    let sums = k.fold(zero, count, 1, &vec![nothing; vectors.len()], |k, row, sums| {
                        let row = k.mul(row, inner);
                        let row = k.add(base, row);
                        let mut next = vec![];
                        for (&(offset, mask), &sum) in vectors.iter().zip(sums) {
                            let place = k.add(row, offset);
                            let x = k.load_lanes(x, place, mask);
                            next.push(k.add(sum, x));
                        }
                        next
                    });
                    let target = k.mul(area, inner);
                    let target = k.add(target, start);
                    for (&(offset, mask), &sum) in vectors.iter().zip(&sums) {
                        let mut sum = sum;
                        if averages {
                            let share = share(k, &sizes[3..]);
                            let share = k.splat(share);
                            sum = k.mul(sum, share);
                        }
                        let place = k.add(target, offset);
                        k.store_lanes(sum, out, place, mask);
                    }
                });
            })
        });
        self.launch(kernel, vec![x, out], sizes, outer * blocks);
        out
    }
}

/// 1 / how many elements went into one.
fn share(k: &mut Kernel, sizes: &[Val]) -> Val {
    let (all, kept) = (k.to_float(sizes[0]), k.to_float(sizes[1]));
    debug_assert_eq!(all.ty, F32);
    k.div(kept, all)
}
