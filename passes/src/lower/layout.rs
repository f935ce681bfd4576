//! Where values lie. A reader that cannot follow a [`View`] asks for a copy ([`Turn::dense`]), and a writer may lay its result
//! out for the one who wants it side by side with others ([`Turn::target`]).

use std::ops::Range;

use peft_grammar::graph::{Op, Value};
use peft_runtime::artifact::{BufferId, Extent};

use super::entry::{Place, Turn};
use super::sizes::product;
use super::view::{ONE, View};
use crate::kernels::copy::{CopyBuffers, CopyView};

impl Turn<'_, '_, '_, '_> {
    /// How `value` lies in its place's buffer.
    pub(super) fn view(&self, value: Value) -> View {
        self.place(value).view.clone().unwrap_or_else(|| View::dense(&self.ty(value).shape))
    }

    /// `value` is `view` of a buffer.
    pub(super) fn show(&mut self, value: Value, buffer: BufferId, view: View) {
        let view = Some(view).filter(|view| !view.is_dense());
        self.places[value.0 as usize] = Some(Place { buffer, frozen: None, view });
    }

    /// `result` is `view` of `x`. What is frozen is copied, once and for all.
    pub(super) fn look(&mut self, x: Value, view: View, result: Value) {
        let buffer = self.place(x).buffer;
        if self.frozen.is_none() {
            return self.show(result, buffer, view);
        }
        let copy = self.result(result);
        self.copy_view((buffer, &view), (copy, &self.view(result)));
    }

    /// A buffer in which `value` lies row-major: a copy, if it must be.
    pub(super) fn dense(&mut self, value: Value) -> BufferId {
        let place = self.place(value).clone();
        let Some(view) = place.view else { return place.buffer };
        let copy = self.result(value);
        let whole = self.view(value);
        self.labelled("copy").copy_view((place.buffer, &view), (copy, &whole));
        copy
    }

    /// A place for a result, its last axis without gaps: where its readers want it, which may be a part of what they put
    /// together.
    pub(super) fn target(&mut self, result: Value) -> (BufferId, View) {
        if self.frozen.is_some() {
            return (self.result(result), self.view(result));
        }
        let own = || (result, View::dense(&self.ty(result).shape));
        let (whole, view) = self.wish(result).filter(|(_, view)| view.runs()).unwrap_or_else(own);
        let buffer = match self.wholes.get(&whole) {
            Some(&buffer) => buffer,
            None => {
                let buffer = self.result(whole);
                self.wholes.insert(whole, buffer);
                buffer
            }
        };
        self.show(result, buffer, view.clone());
        (buffer, view)
    }

    /// `axis` is the ragged one.
    pub(super) fn along_rows(&self, axis: usize, value: Value) -> bool {
        let ty = self.ty(value);
        ty.ragged() && axis + 1 == ty.rank()
    }

    /// The later value whose buffer `value` should be written into, and how it lies there: what readers that only move
    /// elements make of it. A reshape alone asks for nothing new, but may merge axes that a permute before it swapped.
    fn wish(&self, value: Value) -> Option<(Value, View)> {
        let shape = &self.ty(value).shape;
        if self.facts.claimed.contains_key(&value) {
            return Some((value, View::dense(shape)));
        }
        let mut wishes = self.facts.readers(value).iter().filter_map(|&reader| {
            let node = &self.graph.nodes[reader];
            let whole = || (node.result(), View::dense(&self.ty(node.result()).shape));
            match &node.op {
                Op::Reshape { .. } => {
                    let (root, view) = self.wish(node.result()).unwrap_or_else(whole);
                    Some((root, view.reshape(shape)?))
                }
                Op::Permute { axes } => {
                    let (root, view) = self.wish(node.result())?;
                    let mut back = vec![0; axes.len()];
                    axes.iter().enumerate().for_each(|(to, &from)| back[from] = to);
                    Some((root, view.permute(&back)))
                }
                Op::Concat { axis } if !self.along_rows(*axis, node.result()) => {
                    let (root, view) = self.wish(node.result()).unwrap_or_else(whole);
                    let before = node.operands.iter().take_while(|&&part| part != value);
                    let start = before.map(|&part| self.ty(part).shape[*axis].constant()).sum::<Option<u64>>()?;
                    Some((root, view.slice(*axis, start, shape[*axis])))
                }
                _ => None,
            }
        });
        // Among several the first that is more than the value itself.
        let first = wishes.next()?;
        if first.1.is_dense() { Some(wishes.find(|(_, view)| !view.is_dense()).unwrap_or(first)) } else { Some(first) }
    }

    /// Moves every element from one view to another of the same shape, whose last axis has no gaps.
    pub(super) fn copy_view(&mut self, (from, source): (BufferId, &View), (to, target): (BufferId, &View)) {
        // Axes that follow each other on both sides are one; rows stay, for threads to share.
        let shape = &source.shape;
        let long: Vec<usize> = source.long().collect();
        let mut runs: Vec<Range<usize>> = vec![];
        for (at, &axis) in long.iter().enumerate() {
            let row = at + 1 == long.len() && runs.len() < 2;
            match runs.last_mut() {
                Some(run) if !row && [source, target].iter().all(|v| v.along(run.start..axis + 1).is_some()) => {
                    run.end = axis + 1;
                }
                _ => runs.push(axis..axis + 1),
            }
        }
        if runs.last().is_none_or(|run| target.along(run.clone()) != Some(ONE)) {
            runs.push(shape.len()..shape.len());
        }
        let sizes = |run: &Range<usize>| product(&shape[run.clone()]);
        let steps = |view: &View| {
            let step = |run: &Range<usize>| view.along(run.clone()).unwrap_or(ONE).extent();
            runs.iter().map(step).collect::<Vec<_>>()
        };
        let rank = runs.len();
        let gathers = runs.last().is_some_and(|run| source.along(run.clone()) != Some(ONE));
        let units = runs[..rank - 1].iter().map(sizes).fold(Extent::Const(1), |n, size| n * size);
        let mut extents: Vec<Extent> = runs.iter().map(sizes).collect();
        extents.extend([steps(source), steps(target)].concat());
        extents.extend([source.first.clone(), target.first.clone()]);
        self.launch(CopyView { rank, gathers }, CopyBuffers { from, to }.list(), extents, units);
    }
}
