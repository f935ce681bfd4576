//! Reductions: one axis at a time, the last axis as row sums, any other axis as column sums. A row sum may have a
//! prologue that computes the summed values, if nothing else reads them, and an epilogue.

use peft_grammar::graph::{Dim, Op, Type, Value};
use peft_runtime::artifact::{BufferId, Extent};

use super::dispatch::Fused;
use super::entry::DispatchLowering;
use super::row_layout::RowLayout;
use super::schedule;
use super::sizes::{dim_extent, element_count, extents};
use super::view::View;
use crate::kernels::columns::{ColumnBuffers, ColumnSizes, ColumnSums};
use crate::kernels::rowwise::{FusedRowSums, PlainRowSums, RowSumsSizes, Share};

impl DispatchLowering<'_, '_, '_, '_> {
    /// Sums of rows, with an optional prologue (the root of the group that computes them) and an epilogue.
    pub(super) fn row_sums(&mut self, prologue: Option<usize>, fused: &Fused, mean: bool) -> Result<(), String> {
        let node = &self.graph.nodes[fused.node];
        let (x, result) = (node.operands[0], node.result());
        let ty = self.ty(x);
        let own = if prologue.is_none() { vec![self.materialize(x)] } else { vec![] };
        self.place_fused_results(fused);
        let stays = fused.stored;
        let out = if stays { self.allocate_result(result) } else { self.buffer_view(result).buffer };
        let map = prologue.map(|root| self.lower_expression(root, true, Some(out))).transpose()?;
        let mut buffers = own;
        if let Some(map) = &map {
            // The expression's last buffer is the argument for its result, which is not stored.
            buffers = map.buffers.clone();
        } else {
            buffers.push(out);
        }
        let lowered = self.lower_epilogue(fused, &buffers, true)?;
        let [length, rows] =
            [1, 2].map(|n| ty.shape.len().checked_sub(n).map_or(Extent::Const(1), |i| dim_extent(ty.shape[i])));
        let mut sizes = RowSumsSizes { length, rows }.list();
        if mean {
            sizes.extend(Share { all: element_count(ty), kept: element_count(self.ty(result)) }.list());
        }
        let of = map.map(|map| {
            sizes.extend(map.sizes);
            map.expression
        });
        sizes.extend(lowered.sizes);
        buffers.extend(lowered.buffers);
        self.label = lowered.epilogue.label(&match &of {
            Some(of) => format!("{}+{}", of.label(), node.op.name()),
            None => node.op.name().to_string(),
        });
        let schedule = FusedRowSums { mean, of, batched: ty.rank() == 3, stored: stays, epilogue: lowered.epilogue };
        self.launch(schedule, buffers, sizes, RowLayout::count(ty));
        Ok(())
    }

    /// Sums, or means, over any axes.
    pub(super) fn reduce(
        &mut self,
        x: BufferId,
        ty: &Type,
        axes: &[usize],
        mean: bool,
        result: Value,
    ) -> Result<(), String> {
        // Neighbouring axes that are all reduced, or all kept, are merged.
        let mut runs: Vec<(Extent, bool)> = vec![];
        let ragged_last = ty.is_ragged() && axes.contains(&(ty.rank() - 1));
        let sizes: Vec<(Extent, bool)> = if ty.is_ragged() && !ragged_last {
            // The rows of a ragged tensor stay whole.
            extents(ty).into_iter().enumerate().map(|(axis, size)| (size, axes.contains(&axis))).collect()
        } else {
            let dense = &ty.shape[..ty.rank() - usize::from(ragged_last)];
            dense.iter().enumerate().map(|(axis, &d)| (dim_extent(d), axes.contains(&axis))).collect()
        };
        for (size, reduced) in sizes {
            match runs.last_mut() {
                _ if size == Extent::Const(1) => {}
                Some((last, last_reduced)) if *last_reduced == reduced => *last = last.clone() * size,
                _ => runs.push((size, reduced)),
            }
        }
        let ratio = mean.then(|| (element_count(ty), element_count(self.ty(result))));
        let steps = runs.iter().filter(|(_, reduced)| *reduced).count() + usize::from(ragged_last);
        if steps == 0 {
            // Only axes of one element are reduced.
            let out = self.allocate_result(result);
            let layout = View::dense(&ty.shape);
            self.copy_view((x, &layout), (out, &layout));
            return Ok(());
        }

        let product = |runs: &[(Extent, bool)]| runs.iter().fold(Extent::Const(1), |n, (size, _)| n * size.clone());
        let mut from = x;
        let mut left = steps;
        if ragged_last {
            left -= 1;
            let rows = RowLayout::of(ty);
            from = self.sum_rows(
                from,
                &rows,
                RowLayout::count(ty),
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
                self.sum_rows(from, &RowLayout::Dense(size), outer, ratio, target)
            } else {
                let layout = ColumnLayout::dense(outer, size, inner);
                let out = self.result_or_scratch(layout.outer.clone() * layout.inner.clone(), target);
                self.sum_columns((from, layout), ratio, out);
                out
            };
        }
        debug_assert!(!matches!(self.ty(result).shape.last(), Some(Dim::Values)));
        Ok(())
    }

    /// The buffer of `target`, or a scratch buffer for an intermediate sum.
    fn result_or_scratch(&mut self, shape: Extent, target: Option<Value>) -> BufferId {
        match target {
            Some(result) => self.allocate_result(result),
            None => self.scratch(vec![shape]),
        }
    }

    /// Launches row sums; with `ratio` the sums are scaled to means.
    fn sum_rows(
        &mut self,
        x: BufferId,
        rows: &RowLayout,
        count: Extent,
        ratio: Option<(Extent, Extent)>,
        target: Option<Value>,
    ) -> BufferId {
        let out = self.result_or_scratch(count.clone(), target);
        let schedule = PlainRowSums { mean: ratio.is_some(), ragged: rows.is_ragged() };
        let mut buffers = vec![x, out];
        buffers.extend(rows.row_offsets(self.module));
        let mut sizes = rows.sizes().list();
        sizes.extend(ratio.into_iter().flat_map(|(all, kept)| Share { all, kept }.list()));
        self.launch(schedule, buffers, sizes, count);
        out
    }

    /// The sum of the `count` partial results in `x`, each of `elements` elements.
    pub(super) fn sum_partials(&mut self, x: BufferId, count: Extent, elements: Extent, out: BufferId) {
        let columns = ColumnLayout::dense(Extent::Const(1), count, elements);
        self.helper("add_up").sum_columns((x, columns), None, out);
    }

    /// Node `at` sums the columns of a strided matrix, which the column-sum kernel can read in place.
    pub(super) fn is_strided_column_sum(&self, at: usize) -> bool {
        let node = &self.graph.nodes[at];
        let Op::Reduce { axes, mean: false, .. } = &node.op else { return false };
        let view = self.buffer_view(node.operands[0]).view.as_ref();
        axes[..] == [0] && view.is_some_and(|view| view.shape.len() == 2 && view.has_contiguous_rows())
    }

    /// The column sums of a strided matrix; see [`DispatchLowering::is_strided_column_sum`].
    pub(super) fn column_sums(&mut self, at: usize) {
        let node = &self.graph.nodes[at];
        let (x, view) = (self.buffer_view(node.operands[0]).buffer, self.view(node.operands[0]));
        let [count, inner] = [0, 1].map(|axis| dim_extent(view.shape[axis]));
        let row_stride = view.strides[0].extent();
        let out = self.allocate_result(node.result());
        self.sum_columns(
            (x, ColumnLayout { outer: Extent::Const(1), count, inner, row_stride, offset: view.offset }),
            None,
            out,
        );
    }

    /// Launches column sums; with `ratio` the sums are scaled to means.
    fn sum_columns(&mut self, (x, of): (BufferId, ColumnLayout), ratio: Option<(Extent, Extent)>, out: BufferId) {
        let ColumnLayout { outer, count, inner, row_stride, offset: begin } = of;
        let machine = self.module.machine;
        let (across, ahead) = schedule::column_sum_shape(machine);
        let blocks = Extent::CeilDiv(Box::new(inner.clone()), across);
        let schedule = ColumnSums { mean: ratio.is_some(), columns: across, rows_at_once: ahead };
        let mut sizes = ColumnSizes { count, inner, blocks: blocks.clone(), row_stride, offset: begin }.list();
        sizes.extend(ratio.into_iter().flat_map(|(all, kept)| Share { all, kept }.list()));
        let units = outer * blocks * Extent::Const(machine.team_size());
        self.launch(schedule, ColumnBuffers { x, out }.list(), sizes, units);
    }
}

/// A stack of `outer` dense matrices of `count` rows and `inner` columns, or a single strided matrix.
struct ColumnLayout {
    outer: Extent,
    count: Extent,
    inner: Extent,
    /// The distance from one row to the next, in elements.
    row_stride: Extent,
    offset: Extent,
}

impl ColumnLayout {
    fn dense(outer: Extent, count: Extent, inner: Extent) -> ColumnLayout {
        ColumnLayout { outer, count, row_stride: inner.clone(), inner, offset: Extent::Const(0) }
    }
}
