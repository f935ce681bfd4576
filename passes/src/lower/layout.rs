//! Data layout: where values are stored. A reader whose kernel cannot read a strided [`View`] asks for a row-major copy
//! ([`DispatchLowering::materialize`]). A kernel may store its result directly in the layout of a later value that only
//! moves its elements, such as a concatenation ([`DispatchLowering::result_destination`]).

use std::ops::Range;

use peft_grammar::graph::{Op, Value};
use peft_runtime::artifact::{BufferId, Extent};

use super::entry::{BufferView, DispatchLowering};
use super::sizes::dims_product;
use super::view::{UNIT_STRIDE, View};
use crate::kernels::copy::{CopyBuffers, CopyView};

impl DispatchLowering<'_, '_, '_, '_> {
    /// The view of its buffer in which `value` is stored.
    pub(super) fn view(&self, value: Value) -> View {
        self.buffer_view(value).view.clone().unwrap_or_else(|| View::dense(&self.ty(value).shape))
    }

    /// Records that `value` is stored as `view` of `buffer`.
    pub(super) fn set_view(&mut self, value: Value, buffer: BufferId, view: View) {
        let view = Some(view).filter(|view| !view.is_dense());
        self.buffer_views[value.0 as usize] = Some(BufferView { buffer, frozen: None, view });
    }

    /// Makes `result` the given view of `x`'s buffer. A frozen value is copied instead, once.
    pub(super) fn alias(&mut self, x: Value, view: View, result: Value) {
        let buffer = self.buffer_view(x).buffer;
        if self.frozen.is_none() {
            return self.set_view(result, buffer, view);
        }
        let copy = self.allocate_result(result);
        self.copy_view((buffer, &view), (copy, &self.view(result)));
    }

    /// A buffer in which `value` is stored row-major: a copy, unless it already is.
    pub(super) fn materialize(&mut self, value: Value) -> BufferId {
        let place = self.buffer_view(value).clone();
        let Some(view) = place.view else { return place.buffer };
        let copy = self.allocate_result(value);
        let whole = self.view(value);
        self.helper("copy").copy_view((place.buffer, &view), (copy, &whole));
        copy
    }

    /// Chooses the buffer and view in which a kernel stores `result`, contiguous along the last axis: the layout that
    /// its readers prefer, which may be part of a larger value, or else a row-major buffer.
    pub(super) fn result_destination(&mut self, result: Value) -> (BufferId, View) {
        if self.frozen.is_some() {
            return (self.allocate_result(result), self.view(result));
        }
        let own = || (result, View::dense(&self.ty(result).shape));
        let (whole, view) =
            self.preferred_destination(result).filter(|(_, view)| view.has_contiguous_rows()).unwrap_or_else(own);
        let buffer = match self.preallocated.get(&whole) {
            Some(&buffer) => buffer,
            None => {
                let buffer = self.allocate_result(whole);
                self.preallocated.insert(whole, buffer);
                buffer
            }
        };
        self.set_view(result, buffer, view.clone());
        (buffer, view)
    }

    /// `axis` is the ragged axis of `value`.
    pub(super) fn is_ragged_axis(&self, axis: usize, value: Value) -> bool {
        let ty = self.ty(value);
        ty.is_ragged() && axis + 1 == ty.rank()
    }

    /// The later value in whose buffer `value` should be stored, and the view of it: follows readers that only move
    /// elements. A reshape alone gives no preference, but it may merge axes that an earlier permute has swapped.
    fn preferred_destination(&self, value: Value) -> Option<(Value, View)> {
        let shape = &self.ty(value).shape;
        if self.analysis.fixed_storage.contains_key(&value) {
            return Some((value, View::dense(shape)));
        }
        let mut preferences = self.analysis.readers(value).iter().filter_map(|&reader| {
            let node = &self.graph.nodes[reader];
            let whole = || (node.result(), View::dense(&self.ty(node.result()).shape));
            match &node.op {
                Op::Reshape { .. } => {
                    let (root, view) = self.preferred_destination(node.result()).unwrap_or_else(whole);
                    Some((root, view.reshape(shape)?))
                }
                Op::Permute { axes } => {
                    let (root, view) = self.preferred_destination(node.result())?;
                    let mut back = vec![0; axes.len()];
                    axes.iter().enumerate().for_each(|(to, &from)| back[from] = to);
                    Some((root, view.permute(&back)))
                }
                Op::Concat { axis } if !self.is_ragged_axis(*axis, node.result()) => {
                    let (root, view) = self.preferred_destination(node.result()).unwrap_or_else(whole);
                    let before = node.operands.iter().take_while(|&&part| part != value);
                    let start = before.map(|&part| self.ty(part).shape[*axis].constant()).sum::<Option<u64>>()?;
                    Some((root, view.slice(*axis, start, shape[*axis])))
                }
                _ => None,
            }
        });
        // The first preference for a strided view wins over a row-major one.
        let first = preferences.next()?;
        if first.1.is_dense() {
            Some(preferences.find(|(_, view)| !view.is_dense()).unwrap_or(first))
        } else {
            Some(first)
        }
    }

    /// Copies every element from one view to another of the same shape, which is contiguous along its last axis.
    pub(super) fn copy_view(&mut self, (from, source): (BufferId, &View), (to, target): (BufferId, &View)) {
        // Axes with a common stride in both views are merged. The last axis is kept apart from the others, so that
        // there are rows to distribute over threads.
        let shape = &source.shape;
        let long: Vec<usize> = source.nontrivial_axes().collect();
        let mut runs: Vec<Range<usize>> = vec![];
        for (at, &axis) in long.iter().enumerate() {
            let row = at + 1 == long.len() && runs.len() < 2;
            match runs.last_mut() {
                Some(run)
                    if !row && [source, target].iter().all(|v| v.merged_stride(run.start..axis + 1).is_some()) =>
                {
                    run.end = axis + 1;
                }
                _ => runs.push(axis..axis + 1),
            }
        }
        if runs.last().is_none_or(|run| target.merged_stride(run.clone()) != Some(UNIT_STRIDE)) {
            runs.push(shape.len()..shape.len());
        }
        let sizes = |run: &Range<usize>| dims_product(&shape[run.clone()]);
        let steps = |view: &View| {
            let step = |run: &Range<usize>| view.merged_stride(run.clone()).unwrap_or(UNIT_STRIDE).extent();
            runs.iter().map(step).collect::<Vec<_>>()
        };
        let rank = runs.len();
        let gathers = runs.last().is_some_and(|run| source.merged_stride(run.clone()) != Some(UNIT_STRIDE));
        let units = runs[..rank - 1].iter().map(sizes).fold(Extent::Const(1), |n, size| n * size);
        let mut extents: Vec<Extent> = runs.iter().map(sizes).collect();
        extents.extend([steps(source), steps(target)].concat());
        extents.extend([source.offset.clone(), target.offset.clone()]);
        self.launch(CopyView { rank, gathers }, CopyBuffers { from, to }.list(), extents, units);
    }
}
