//! Sums over axes: one axis at a time, the last one along rows, any other one down columns. Sums of rows alone compute
//! what they sum up on the way, if nothing else reads it.

use peft_grammar::graph::{Dim, Op, Type, Value};
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::epilogue::Follow;
use super::span::{Rows, Span};
use super::view::View;
use super::{Lowering, dim_extent, extent, extents, map};
use crate::builder::{F32, Kernel, Order, Val, define, first};
use crate::target::Machine;

/// Columns of a unit.
const COLUMNS: u64 = 64;
/// Rows that a GPU's warp reads at once.
const AHEAD: u64 = 16;

impl Lowering<'_, '_, '_> {
    /// Node `at` sums rows up and nothing else.
    pub(super) fn sums_rows(&self, at: usize) -> bool {
        let node = &self.graph.nodes[at];
        let ty = self.ty(node.operands[0]);
        let Op::Reduce { axes, keep: true, .. } = &node.op else { return false };
        self.target.epilogues && !ty.ragged() && matches!(ty.rank(), 2 | 3) && axes[..] == [ty.rank() - 1]
    }

    /// The group of `root` goes into nothing but sums over its rows.
    pub(super) fn summed(&self, root: usize) -> bool {
        let result = self.graph.nodes[root].result;
        let once = self.uses[result.0 as usize] == 1 && self.frozen.is_none() && !self.wanted.contains_key(&result);
        let reader = self.readers[result.0 as usize].first();
        once && !self.groups.draws(self.graph, root) && reader.is_some_and(|&at| self.sums_rows(at))
    }

    /// Sums of rows, with what is summed up computed on the way, and what follows.
    pub(super) fn row_sums(&mut self, at: usize, mean: bool) -> Result<(), String> {
        let node = &self.graph.nodes[at];
        let (x, result) = (node.operands[0], node.result);
        let ty = self.ty(x);
        let inner = self.places[x.0 as usize].is_none().then(|| self.groups.maker(x).expect("no argument"));
        let own = if inner.is_none() { vec![self.dense(x)] } else { vec![] };
        let taken = self.taken(at, at, false);
        let stays = taken.stays;
        let out = if stays { self.result(result) } else { self.place(result).buffer };
        let map = inner.map(|root| self.expression(root, true, Some(out))).transpose()?;
        let (mut buffers, mut elements) = (own, vec![Element::F32; 2]);
        if let Some(map) = &map {
            // The last one stands for a result that goes nowhere.
            (buffers, elements) = (map.buffers.clone(), map.elements.clone());
        } else {
            buffers.push(out);
        }
        let epilogue = self.epilogue(&taken, &buffers, true)?;
        elements.extend(&epilogue.elements);
        let [length, rows] =
            [1, 2].map(|n| ty.shape.len().checked_sub(n).map_or(Extent::Const(1), |i| dim_extent(ty.shape[i])));
        let mut sizes = vec![length, rows];
        if mean {
            sizes.extend([extent(ty), extent(self.ty(result))]);
        }
        let (before, first_of_map) = (map.as_ref().map_or(0, |map| map.sizes.len()), sizes.len());
        sizes.extend(map.iter().flat_map(|map| map.sizes.clone()));
        let own = sizes.len();
        sizes.extend(epilogue.sizes.iter().cloned());
        let of = map.as_ref().map_or(String::new(), |map| format!("_{}", map.form.name()));
        let kind = if mean { "mean" } else { "sum" };
        let passed = if stays { "" } else { "_passed" };
        let name = format!("{kind}_of_rows{of}{passed}{}", epilogue.suffix());
        let batched = ty.rank() == 3;
        let count = buffers.len();
        let kernel = self.target.kernel(&name, |machine| {
            define(machine, &elements, sizes.len(), |k, buffers, sizes| {
                let ([length, rows], out) = (first(sizes), buffers[count - 1]);
                let map_sizes = &sizes[first_of_map..first_of_map + before];
                k.units(|k, row| {
                    let follow = Follow::of(k, &epilogue, (buffers, &sizes[own..]), stays.then_some(out), (row, rows));
                    let base = k.mul(row, length);
                    let lanes: Box<map::Lanes> = match &map {
                        Some(map) => {
                            let buffers = buffers[..count].to_vec();
                            let (form, sizes, made) = (&map.form, map_sizes, &[][..]);
                            let stage = map::Stage { form, buffers, sizes, made, stays: false, half: None };
                            let indices = if batched { vec![follow.batch, follow.row] } else { vec![row] };
                            Box::new(map::lanes_of(k, &stage, &indices, length))
                        }
                        None => Box::new(move |k: &mut Kernel, at, mask| {
                            let place = k.add(base, at);
                            k.load_lanes(buffers[0], place, mask)
                        }),
                    };
                    let zero = k.floats(0.0);
                    let sums = k.fold_lanes(length, &[zero], |k, j, mask, sums| {
                        let x = lanes(k, j, mask);
                        // Beyond the row anything may have been computed.
                        let x = if map.is_some() { k.select(mask, x, zero) } else { x };
                        vec![k.add(sums[0], x)]
                    });
                    let share = mean.then(|| share(k, &sizes[2..]));
                    follow.sum(k, row, sums[0], share);
                });
            })
        });
        self.label = epilogue.label(&match &map {
            Some(map) => format!("{}+{}", map.form.label(), node.op.name()),
            None => node.op.name().to_string(),
        });
        buffers.extend(epilogue.buffers);
        self.launch(kernel, buffers, sizes, Rows::count(ty));
        Ok(())
    }

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
                let whole = Columns::dense(outer, size, inner);
                let out = self.target_of(whole.outer.clone() * whole.inner.clone(), target);
                self.sum_columns((from, whole), ratio, out);
                out
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
        let kernel = self.target.kernel(&name, |machine| {
            define(machine, &elements, sizes.len(), |k, buffers, sizes| {
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

    /// The sum of `count` arrays in `x`.
    pub(super) fn add_up(&mut self, x: BufferId, count: Extent, elements: Extent, out: BufferId) {
        let label = std::mem::replace(&mut self.label, "add_up".into());
        self.sum_columns((x, Columns::dense(Extent::Const(1), count, elements)), None, out);
        self.label = label;
    }

    /// Node `at` sums up columns of rows that lie somewhere in others.
    pub(super) fn sums_columns(&self, at: usize) -> bool {
        let node = &self.graph.nodes[at];
        let Op::Reduce { axes, mean: false, .. } = &node.op else { return false };
        let view = self.place(node.operands[0]).view.as_ref();
        axes[..] == [0] && view.is_some_and(|view| view.shape.len() == 2 && view.runs())
    }

    /// What [`Lowering::sums_columns`] says of it.
    pub(super) fn column_sums(&mut self, at: usize) {
        let node = &self.graph.nodes[at];
        let (x, view) = (self.place(node.operands[0]).buffer, self.view(node.operands[0]));
        let [count, inner] = [0, 1].map(|axis| dim_extent(view.shape[axis]));
        let line = view.steps[0].extent();
        let out = self.result(node.result);
        self.sum_columns((x, Columns { outer: Extent::Const(1), count, inner, line, first: view.first }), None, out);
    }

    fn sum_columns(&mut self, (x, of): (BufferId, Columns), ratio: Option<(Extent, Extent)>, out: BufferId) {
        let Columns { outer, count, inner, line, first: begin } = of;
        let averages = ratio.is_some();
        let name = if averages { "mean_columns" } else { "sum_columns" };
        let machine = self.target.machine;
        // A GPU wants more units, and rows on their way: a team shares a unit's rows.
        let (across, ahead) = match machine {
            Machine::Cpu(_) => (COLUMNS, 1),
            Machine::Cuda(_) => (machine.lanes(), AHEAD),
        };
        let blocks = Extent::CeilDiv(Box::new(inner.clone()), across);
        let mut sizes = vec![count, inner, blocks.clone(), line, begin];
        sizes.extend(ratio.into_iter().flat_map(|(all, kept)| [all, kept]));
        let kernel = self.target.kernel(name, |machine| {
            define(machine, &[Element::F32; 2], sizes.len(), |k, buffers, sizes| {
                let ([x, out], [count, inner, blocks, line, begin]) = (first(buffers), first(sizes));
                let room = (k.team() > 1).then(|| k.shared(k.team() * k.lane_count()));
                k.team_units(|k, unit| {
                    let (area, block) = (k.div(unit, blocks), k.rem(unit, blocks));
                    let width = k.index(across);
                    let start = k.mul(block, width);
                    let size = k.mul(count, line);
                    let base = k.mul(area, size);
                    let base = k.add(base, start);
                    let base = k.add(base, begin);
                    let zero = k.index(0);
                    let lanes = k.lane_count();
                    let vectors: Vec<(Val, Val)> = (0..across / lanes)
                        .map(|v| {
                            let offset = k.index(v * lanes);
                            let column = k.add(start, offset);
                            let left = k.sub(inner, column);
                            (offset, k.mask(left))
                        })
                        .collect();
                    let nothing = k.floats(0.0);
                    let nothings = vec![nothing; vectors.len() * ahead as usize];
                    let sums = k.dealt_fold(zero, count, ahead, &nothings, |k, row, sums| {
                        let mut next = vec![];
                        for (a, sums) in (0..).zip(sums.chunks_exact(vectors.len())) {
                            let a = k.index(a);
                            let row = k.add(row, a);
                            let exists = (ahead > 1).then(|| k.compare(row, Order::Lt, count));
                            let row = k.mul(row, line);
                            let row = k.add(base, row);
                            for (&(offset, mask), &sum) in vectors.iter().zip(sums) {
                                let place = k.add(row, offset);
                                let mask = exists.map_or(mask, |exists| k.and(mask, exists));
                                let x = k.load_lanes(x, place, mask);
                                next.push(k.add(sum, x));
                            }
                        }
                        next
                    });
                    let (first, others) = sums.split_at(vectors.len());
                    let mut sums = first.to_vec();
                    for others in others.chunks_exact(vectors.len()) {
                        sums = sums.iter().zip(others).map(|(&x, &y)| k.add(x, y)).collect();
                    }
                    let sums: Vec<Val> = sums.into_iter().map(|sum| k.sum_team(sum, room)).collect();
                    let target = k.mul(area, inner);
                    let target = k.add(target, start);
                    k.first_of_team(|k| {
                        for (&(offset, mask), &sum) in vectors.iter().zip(&sums) {
                            let mut sum = sum;
                            if averages {
                                let share = share(k, &sizes[5..]);
                                let share = k.splat(share);
                                sum = k.mul(sum, share);
                            }
                            let place = k.add(target, offset);
                            k.store_lanes(sum, out, place, mask);
                        }
                    });
                });
            })
        });
        self.launch(kernel, vec![x, out], sizes, outer * blocks * Extent::Const(machine.team()));
    }
}

/// Areas of rows one below the other.
struct Columns {
    outer: Extent,
    count: Extent,
    inner: Extent,
    /// From row to row, and the first element.
    line: Extent,
    first: Extent,
}

impl Columns {
    fn dense(outer: Extent, count: Extent, inner: Extent) -> Columns {
        Columns { outer, count, line: inner.clone(), inner, first: Extent::Const(0) }
    }
}

/// 1 / how many elements went into one.
fn share(k: &mut Kernel, sizes: &[Val]) -> Val {
    let (all, kept) = (k.to_float(sizes[0]), k.to_float(sizes[1]));
    debug_assert_eq!(all.ty, F32);
    k.div(kept, all)
}
