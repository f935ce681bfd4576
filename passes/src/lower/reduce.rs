//! Sums over axes: one axis at a time, the last one along rows, any other one down columns. Sums of rows alone compute
//! what they sum up on the way, if nothing else reads it.

use peft_grammar::graph::{Dim, Op, Type, Value};
use peft_runtime::artifact::{BufferId, Extent};

use super::dispatch::Taken;
use super::entry::Turn;
use super::schedule;
use super::sizes::{dim_extent, extent, extents};
use super::span::Rows;
use super::view::View;
use crate::kernels::columns::{ColumnBuffers, ColumnSizes, SumColumns};
use crate::kernels::rowwise::{RowSums, RowSumsSizes, Share, SumRows};

impl Turn<'_, '_, '_, '_> {
    /// Sums of rows, with what is summed up computed on the way, and what follows.
    pub(super) fn row_sums(&mut self, inner: Option<usize>, taken: &Taken, mean: bool) -> Result<(), String> {
        let node = &self.graph.nodes[taken.at];
        let (x, result) = (node.operands[0], node.result());
        let ty = self.ty(x);
        let own = if inner.is_none() { vec![self.dense(x)] } else { vec![] };
        self.place_taken(taken);
        let stays = taken.stays;
        let out = if stays { self.result(result) } else { self.place(result).buffer };
        let map = inner.map(|root| self.expression(root, true, Some(out))).transpose()?;
        let mut buffers = own;
        if let Some(map) = &map {
            // The last one stands for a result that goes nowhere.
            buffers = map.buffers.clone();
        } else {
            buffers.push(out);
        }
        let following = self.epilogue(taken, &buffers, true)?;
        let [length, rows] =
            [1, 2].map(|n| ty.shape.len().checked_sub(n).map_or(Extent::Const(1), |i| dim_extent(ty.shape[i])));
        let mut sizes = RowSumsSizes { length, rows }.list();
        if mean {
            sizes.extend(Share { all: extent(ty), kept: extent(self.ty(result)) }.list());
        }
        let of = map.map(|map| {
            sizes.extend(map.sizes);
            map.expression
        });
        sizes.extend(following.sizes);
        buffers.extend(following.buffers);
        self.label = following.epilogue.label(&match &of {
            Some(of) => format!("{}+{}", of.label(), node.op.name()),
            None => node.op.name().to_string(),
        });
        let schedule = RowSums { mean, of, batched: ty.rank() == 3, stays, epilogue: following.epilogue };
        self.launch(schedule, buffers, sizes, Rows::count(ty));
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
        let schedule = SumRows { mean: ratio.is_some(), ragged: rows.ragged() };
        let mut buffers = vec![x, out];
        buffers.extend(rows.places(self.module));
        let mut sizes = rows.sizes().list();
        sizes.extend(ratio.into_iter().flat_map(|(all, kept)| Share { all, kept }.list()));
        self.launch(schedule, buffers, sizes, count);
        out
    }

    /// The sum of `count` arrays in `x`.
    pub(super) fn add_up(&mut self, x: BufferId, count: Extent, elements: Extent, out: BufferId) {
        let columns = Columns::dense(Extent::Const(1), count, elements);
        self.labelled("add_up").sum_columns((x, columns), None, out);
    }

    /// Node `at` sums up columns of rows that lie somewhere in others.
    pub(super) fn sums_columns(&self, at: usize) -> bool {
        let node = &self.graph.nodes[at];
        let Op::Reduce { axes, mean: false, .. } = &node.op else { return false };
        let view = self.place(node.operands[0]).view.as_ref();
        axes[..] == [0] && view.is_some_and(|view| view.shape.len() == 2 && view.runs())
    }

    /// What [`Turn::sums_columns`] says of it.
    pub(super) fn column_sums(&mut self, at: usize) {
        let node = &self.graph.nodes[at];
        let (x, view) = (self.place(node.operands[0]).buffer, self.view(node.operands[0]));
        let [count, inner] = [0, 1].map(|axis| dim_extent(view.shape[axis]));
        let line = view.steps[0].extent();
        let out = self.result(node.result());
        self.sum_columns((x, Columns { outer: Extent::Const(1), count, inner, line, first: view.first }), None, out);
    }

    fn sum_columns(&mut self, (x, of): (BufferId, Columns), ratio: Option<(Extent, Extent)>, out: BufferId) {
        let Columns { outer, count, inner, line, first: begin } = of;
        let machine = self.module.machine;
        let (across, ahead) = schedule::columns(machine);
        let blocks = Extent::CeilDiv(Box::new(inner.clone()), across);
        let schedule = SumColumns { mean: ratio.is_some(), across, ahead };
        let mut sizes = ColumnSizes { count, inner, blocks: blocks.clone(), line, begin }.list();
        sizes.extend(ratio.into_iter().flat_map(|(all, kept)| Share { all, kept }.list()));
        let units = outer * blocks * Extent::Const(machine.team());
        self.launch(schedule, ColumnBuffers { x, out }.list(), sizes, units);
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
