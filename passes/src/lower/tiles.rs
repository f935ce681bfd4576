//! Products on a GPU: how their operands lie, and which kernel computes them: tiles ([`crate::kernels::gemm::simt`]), a few
//! columns ([`super::narrow`]) or tensor cores ([`super::halves`]).

use std::ops::Range;

use peft_grammar::graph::Value;
use peft_grammar::model::Precision;
use peft_runtime::artifact::{BufferId, Extent};

use super::dispatch::Taken;
use super::entry::{Place, Turn};
use super::epilogue::Following;
use super::problem::{Axes, Contraction};
use super::schedule::{simt_tile, skinny_tile, split_k, tensor_cores};
use super::sizes::product;
use super::view::{ONE, View};
use crate::builder::mma::Half;
use crate::kernels::gemm::epilogue::Fate;
use crate::kernels::gemm::simt::{Buffers, DEPTH, Simt, Sizes};
use crate::target::cuda::WARPS;

/// An operand in memory: element (batch, i, k) at `first + batch · area + i · along + k · deep`.
#[derive(Debug)]
pub(super) struct Side {
    pub area: Extent,
    pub along: Extent,
    pub deep: Extent,
    pub first: Extent,
    /// Elements side by side differ in i.
    pub contiguous: bool,
}

impl Side {
    /// `None` where axes that should be one are not.
    fn of(view: &View, Axes { batch, i, k }: &Axes) -> Option<Side> {
        let [area, along, deep] = [batch, i, k].map(|axes| view.along(axes.clone()));
        let (area, along, deep) = (area?, along?, deep?);
        let contiguous = along == ONE && (deep != ONE || i.start > k.start);
        let [area, along, deep] = [area, along, deep].map(|step| step.extent());
        Some(Side { area, along, deep, first: view.first.clone(), contiguous })
    }
}

impl Turn<'_, '_, '_, '_> {
    /// A product on a GPU.
    pub(super) fn tiled(&mut self, taken: &Taken) -> Result<(), String> {
        let node = &self.graph.nodes[taken.at];
        let (x, y, result) = (node.operands[0], node.operands[1], node.result());
        let (axes_x, axes_y) = Axes::of_product(&node.op, self.ty(x), self.ty(y));
        let shape = Contraction::of(self.graph, node);
        let (a, left) = self.strided(x, &axes_x);
        let (b, right) = self.strided(y, &axes_y);
        let place = self.place(y).clone();
        let half = self.half(&left, &place).filter(|_| shape.batch == Extent::Const(1));
        let (packed, (a, left)) = match half {
            Some(half) => {
                let packed = self.pack_halves(half, &place, &right, (shape.n.clone(), shape.depth.clone()));
                (Some((half, packed)), self.rounded(half, &shape, (a, left), Some(x)))
            }
            None => {
                let alone = matches!(self.facts.rounds(x), Some((_, true)));
                assert!(!alone, "what only such products read is there for them alone");
                (None, (a, left))
            }
        };
        self.place_taken(taken);
        let axes = Axes::of_result(self.ty(result), self.ty(x), self.ty(y));
        let (c, line, area, first) = self.product_place(result, axes);
        let from = packed.as_ref().map_or(b, |(_, packed)| packed.buffer);
        let following = match taken.is_empty() {
            true => Following::default(),
            false => self.epilogue(taken, &Buffers { a, b: from, c }.list(), true)?,
        };
        let fate = if taken.stays { Fate::Written } else { Fate::Passed };
        let to = To { buffer: c, line, area, first, fate, following };
        match packed {
            Some((half, packed)) => self.launch_halves(half, shape, (a, left), packed, to),
            None => self.launch_tiles(shape, (a, left), (b, right), to),
        }
        Ok(())
    }

    /// In what tensor cores compute the product, if they do.
    fn half(&self, left: &Side, place_b: &Place) -> Option<Half> {
        let asked = self.module.precision == Precision::Bf16 && self.frozen.is_none();
        tensor_cores(self.module.machine).filter(|_| asked && place_b.frozen.is_some() && !left.contiguous)
    }

    /// [`Turn::product_of_rows`].
    pub(super) fn tiled_rows(
        &mut self,
        (x, m): (BufferId, Extent),
        y: Value,
        rows: Range<u64>,
        transpose_y: bool,
        (out, kept): (BufferId, bool),
    ) {
        let width = product(&self.ty(y).shape[1..]);
        let some = Extent::Const(rows.end - rows.start);
        let (one, zero) = (Extent::Const(1), Extent::Const(0));
        let (n, depth) = if transpose_y { (some, width.clone()) } else { (width.clone(), some) };
        let side = |contiguous, line: Extent, first| {
            let (along, deep) = if contiguous { (one.clone(), line) } else { (line, one.clone()) };
            Side { area: zero.clone(), along, deep, first, contiguous }
        };
        let left = side(false, depth.clone(), zero.clone());
        let to = To {
            buffer: out,
            line: n.clone(),
            area: zero.clone(),
            first: zero.clone(),
            fate: if kept { Fate::Added } else { Fate::Written },
            following: Following::default(),
        };
        let shape = Contraction { m, n, depth, batch: one.clone() };
        let place = self.place(y).clone();
        match self.half(&left, &place) {
            Some(half) => {
                let all = product(&self.ty(y).shape[..1]);
                let whole = side(!transpose_y, width.clone(), zero.clone());
                let size = if transpose_y { (all, width) } else { (width, all) };
                let packed = self.pack_halves(half, &place, &whole, size);
                let (column, step) = if transpose_y { (rows.start, 0) } else { (0, rows.start) };
                let (a, left) = self.rounded(half, &shape, (x, left), None);
                self.launch_halves(half, shape, (a, left), packed.from(column, step), to);
            }
            None => {
                let right = side(!transpose_y, width.clone(), Extent::Const(rows.start) * width);
                self.launch_tiles(shape, (x, left), (place.buffer, right), to);
            }
        }
    }

    fn strided(&mut self, value: Value, axes: &Axes) -> (BufferId, Side) {
        if Side::of(&self.view(value), axes).is_none() {
            self.dense(value);
        }
        let side = Side::of(&self.view(value), axes).expect("row-major");
        (self.place(value).buffer, side)
    }

    fn launch_tiles(&mut self, shape: Contraction, (a, left): (BufferId, Side), (b, right): (BufferId, Side), to: To) {
        if let Some(narrow) = skinny_tile(&shape, left.contiguous, &self.module.limits) {
            return self.launch_narrow(narrow, shape, (a, left), (b, right), to);
        }
        let whole = shape.m.clone() * shape.n.clone();
        let apart = shape.batch != Extent::Const(1) && to.area != whole;
        let dense = to.line == shape.n && to.first == Extent::Const(0) && !apart;
        let shares = if to.fate == Fate::Written && dense { split_k(&shape) } else { 1 };
        let Contraction { m, n, depth, batch } = shape;
        let tile = simt_tile(&m, &n);
        let tiles = |n: &Extent, side| Extent::CeilDiv(Box::new(n.clone()), side);
        let (down, across) = (tiles(&m, tile.rows), tiles(&n, tile.columns));
        let units = Extent::Const(shares) * batch.clone() * down.clone() * across.clone() * Extent::Const(WARPS);
        let steps = Extent::CeilDiv(Box::new(depth.clone()), DEPTH * shares) * Extent::Const(DEPTH);
        let elements = batch.clone() * whole.clone();
        let c = if shares > 1 { self.scratch(vec![Extent::Const(shares), elements.clone()]) } else { to.buffer };
        let area_c = if shares > 1 { whole } else { to.area };
        let sizes = Sizes {
            m,
            n,
            depth,
            down,
            across,
            batches: batch,
            steps,
            along_a: left.along,
            deep_a: left.deep,
            area_a: left.area,
            first_a: left.first,
            along_b: right.along,
            deep_b: right.deep,
            area_b: right.area,
            first_b: right.first,
            line_c: to.line,
            area_c,
            first_c: to.first,
        };
        let Following { epilogue, buffers, sizes: follows, .. } = to.following;
        self.label = epilogue.label(&self.label);
        let contiguous = [left.contiguous, right.contiguous];
        let buffers = [Buffers { a, b, c }.list(), buffers].concat();
        let sizes = [sizes.list(), follows].concat();
        self.launch(Simt { tile, contiguous, fate: to.fate, epilogue }, buffers, sizes, units);
        if shares > 1 {
            self.add_up(c, Extent::Const(shares), elements, to.buffer);
        }
    }
}

/// Where a product goes, and what else becomes of it.
pub(super) struct To {
    pub buffer: BufferId,
    /// Steps from row to row and from batch to batch, and the first element.
    pub line: Extent,
    pub area: Extent,
    pub first: Extent,
    pub fate: Fate,
    pub following: Following,
}
