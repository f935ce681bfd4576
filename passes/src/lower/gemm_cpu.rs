//! Products on a processor: how their operands lie, which are packed, and the tile for it ([`crate::kernels::gemm::cpu`]).

use std::ops::Range;

use peft_grammar::graph::Value;
use peft_runtime::artifact::{BufferId, Extent, Storage};

use super::dispatch::Taken;
use super::entry::{Place, Turn};
use super::epilogue::Following;
use super::module::Panels;
use super::problem::{Axes, operand};
use super::schedule::gemm_form;
use super::sizes::product;
use super::view::{ONE, View};
use crate::kernels::gemm::cpu::{Form, Gemm, Sizes};
use crate::kernels::gemm::pack::{Factors, Pack, PackBuffers, PackSizes};
use crate::kernels::gemm::{Buffers, Operand};

/// Columns of a unit: what is copied of A serves all of them, and a product as narrow as a hidden state still has units
/// for many threads. Wider ones have more, as there are enough units.
const COLUMNS: Range<u64> = 384..1152;
/// Units beside each other in a wide product.
const GROUPS: u64 = 4;
/// Column panels of a unit where all rows are one unit's, so that there are units to share.
const PANELS_OF_FEW_ROWS: u64 = 2;

/// An operand in memory: element (batch, i, k) at `first + batch · area + line · (one of i and k) + the other`.
#[derive(Debug)]
struct Side {
    batch: Extent,
    /// Rows of A, columns of B.
    length: Extent,
    depth: Extent,
    /// i is the axis without gaps; otherwise k is.
    contiguous: bool,
    line: Extent,
    area: Extent,
    first: Extent,
}

impl Side {
    /// `None` where the view has gaps along both axes, or axes that should be one are not.
    fn of(view: &View, axes: &Axes) -> Option<Side> {
        let Operand { area, along, deep, first, contiguous } = operand(view, axes)?;
        let (line, without) = if contiguous { (deep, along) } else { (along, deep) };
        let Axes { batch, i, k } = axes;
        let [batch, length, depth] = [batch, i, k].map(|axes| product(&view.shape[axes.clone()]));
        // One batch takes no steps: it is packed alike whatever axes it has.
        let area = if batch == Extent::Const(1) { Extent::Const(0) } else { area };
        (without == Extent::Const(1)).then_some(Side { batch, length, depth, contiguous, line, area, first })
    }
}

/// Where a product goes: a buffer, steps from row to row and from batch to batch, the first element, and whether what
/// stands there stays in the sum.
struct Destination {
    buffer: BufferId,
    line: Extent,
    area: Extent,
    first: Extent,
    kept: bool,
}

impl Turn<'_, '_, '_, '_> {
    fn side(&mut self, value: Value, axes: Axes) -> (Place, Side) {
        if Side::of(&self.view(value), &axes).is_none() {
            self.dense(value);
        }
        let side = Side::of(&self.view(value), &axes).expect("without gaps along one axis");
        (self.place(value).clone(), side)
    }

    pub(super) fn product_on_cpu(&mut self, taken: &Taken) -> Result<(), String> {
        let node = &self.graph.nodes[taken.at];
        let (x, y, result) = (node.operands[0], node.operands[1], node.result());
        let (axes_x, axes_y) = Axes::of_product(&node.op, self.ty(x), self.ty(y));
        let (place_a, left) = self.side(x, axes_x);
        let (place_b, right) = self.side(y, axes_y);
        let n = right.length.clone();
        let packed = place_b.frozen.is_some() || !right.contiguous;
        let form = self.form(&left, &place_b, &n, packed);

        let across = Extent::Const(form.tile.columns());
        let (from_b, lines_b) = match packed {
            true => {
                let panels = Extent::CeilDiv(Box::new(n.clone()), form.tile.columns());
                let line = Extent::Const(form.line());
                let panel = form.factors.steps(left.depth.clone()) * line.clone();
                let lines = [line, panels.clone() * panel.clone(), Extent::Const(0), panel];
                (self.pack(&place_b, form, right), lines)
            }
            false => (place_b.buffer, [right.line, right.area, right.first, across]),
        };
        if let Some(&root) = taken.followers.first()
            && self.facts.uses[result.0 as usize] == 1
        {
            // Nothing else reads the product: it lies where what is made of it will.
            let (buffer, view) = self.target(self.graph.nodes[root].result());
            self.show(result, buffer, view);
        }
        let axes = Axes::of_result(self.ty(result), self.ty(x), self.ty(y));
        let (buffer, line, area, first) = self.product_place(result, axes);
        let to = Destination { buffer, line, area, first, kept: false };
        let own = Buffers { a: place_a.buffer, b: from_b, c: buffer }.list();
        let following = self.epilogue(taken, &own, false)?;
        self.label = following.epilogue.label(node.op.name());
        self.multiply(form, (place_a.buffer, left), (from_b, lines_b), n, to, following);
        Ok(())
    }

    fn form(&self, left: &Side, place_b: &Place, n: &Extent, packed: bool) -> Form {
        let precision = self.precision(place_b, left.contiguous);
        gemm_form(self.module.machine, (&left.length, n), left.contiguous, packed, precision)
    }

    /// One launch over all of a product's units. B's line, area, first element, and elements from one column panel to
    /// the next.
    fn multiply(
        &mut self,
        form: Form,
        (a, left): (BufferId, Side),
        (b, lines_b): (BufferId, [Extent; 4]),
        n: Extent,
        to: Destination,
        following: Following,
    ) {
        let Side { batch, length: m, depth, .. } = left;
        let panels = Extent::CeilDiv(Box::new(n.clone()), form.tile.columns());
        // An even number: a product as narrow as a unit is shared by two threads.
        let blocks = Extent::Const(2) * Extent::CeilDiv(Box::new(m.clone()), 2 * form.tile.block());
        let shared = match (&m, &n) {
            (Extent::Const(m), _) if *m <= form.tile.block() => PANELS_OF_FEW_ROWS,
            (_, Extent::Const(n)) => (n / GROUPS).clamp(COLUMNS.start, COLUMNS.end) / form.tile.columns(),
            _ => COLUMNS.start / form.tile.columns(),
        };
        let groups = Extent::CeilDiv(Box::new(panels.clone()), shared);
        let units = batch * blocks.clone() * groups.clone();
        let [line_b, area_b, first_b, panel_b] = lines_b;
        let sizes = Sizes {
            m,
            n,
            depth,
            blocks,
            groups,
            shared: Extent::Const(shared),
            panels,
            line_a: left.line,
            area_a: left.area,
            first_a: left.first,
            line_b,
            area_b,
            first_b,
            panel_b,
            width: to.line,
            area_c: to.area,
            first_c: to.first,
            kept: Extent::Const(to.kept.into()),
        };
        let buffers = [Buffers { a, b, c: to.buffer }.list(), following.buffers].concat();
        let sizes = [sizes.list(), following.sizes].concat();
        self.launch(Gemm { form, epilogue: following.epilogue }, buffers, sizes, units);
    }

    /// [`Turn::product_of_rows`]; y is packed whole.
    pub(super) fn rows_on_cpu(
        &mut self,
        (x, m): (BufferId, Extent),
        y: Value,
        rows: Range<u64>,
        transpose_y: bool,
        (out, kept): (BufferId, bool),
    ) {
        let [all, across] = [0, 1].map(|axis| product(&self.ty(y).shape[axis..axis + 1]));
        let some = Extent::Const(rows.end - rows.start);
        let (whole, n, depth) = match transpose_y {
            true => ((all, across.clone()), some, across.clone()),
            false => ((across.clone(), all), across.clone(), some),
        };
        let zero = Extent::Const(0);
        let side = |(length, depth): (Extent, Extent), contiguous, line| {
            let (batch, area, first) = (Extent::Const(1), zero.clone(), zero.clone());
            Side { batch, length, depth, contiguous, line, area, first }
        };
        let left = side((m, depth.clone()), false, depth);
        let right = side(whole, !transpose_y, across);
        let place = self.place(y).clone();
        let form = self.form(&left, &place, &right.length, true);
        let (columns, line) = (form.tile.columns(), Extent::Const(form.line()));
        let panel = form.factors.steps(right.depth.clone()) * line.clone();
        let before = match transpose_y {
            true => Extent::Const(rows.start / columns) * panel.clone(),
            false => form.factors.steps(Extent::Const(rows.start)) * line.clone(),
        };
        let packed = self.pack(&place, form, right);
        let lines = [line, zero.clone(), before, panel];
        let to = Destination { buffer: out, line: n.clone(), area: zero.clone(), first: zero.clone(), kept };
        self.multiply(form, (x, left), (packed, lines), n, to, Following::default());
    }

    /// Where a product goes: buffer, steps from row to row and from batch to batch, and its first element.
    pub(super) fn product_place(
        &mut self,
        result: Value,
        Axes { batch, i, .. }: Axes,
    ) -> (BufferId, Extent, Extent, Extent) {
        let (mut out, mut view) = match &self.places[result.0 as usize] {
            Some(place) => (place.buffer, self.view(result)),
            None => self.target(result),
        };
        let apart = |view: &View| view.along(i.clone()).is_none() || view.along(batch.clone()).is_none();
        if apart(&view) {
            // Rows that are apart where they are wanted are copied there.
            (out, view) = (self.result(result), self.view(result));
        }
        let [line, area] = [i, batch].map(|axes| view.along(axes).unwrap_or(ONE).extent());
        (out, line, area, view.first)
    }

    /// The panels of an operand; the same ones if it has been packed this way before.
    fn pack(&mut self, place: &Place, form: Form, side: Side) -> BufferId {
        let (width, factors) = (form.tile.columns(), form.factors);
        let layout = format!("{width} of {side:?}, {factors:?}");
        let Side { batch, length, depth, contiguous, line, area, first } = side;
        let panels = Extent::CeilDiv(Box::new(length.clone()), width);
        let units = batch.clone() * panels.clone();
        let shape = vec![units.clone() * factors.steps(depth.clone()) * Extent::Const(form.line())];
        let key = match &place.frozen {
            Some(source) => format!("pack({source}, {layout})"),
            None => format!("pack({}, {layout})", place.buffer),
        };
        let known = if place.frozen.is_some() { self.module.bound.get(&key) } else { self.packs.get(&key) };
        if let Some(&panels) = known {
            return panels;
        }
        let packed = match place.frozen {
            Some(_) => {
                let packed = self.module.bind(&key, factors.element(), shape, Storage::Prepared);
                // The whole of a matrix, row by row.
                if let Factors::F32 = factors
                    && (contiguous, &line, &first, &batch) == (true, &length, &Extent::Const(0), &Extent::Const(1))
                {
                    let shape = [depth.clone(), length.clone()];
                    self.module.panels.insert(place.buffer, Panels { buffer: packed, across: width, shape });
                }
                packed
            }
            None => {
                let packed = self.module.buffer(factors.element(), shape, Storage::Temporary);
                self.packs.insert(key.clone(), packed);
                packed
            }
        };
        let sizes = PackSizes { length, depth, panels, line, area, begin: first }.list();
        let buffers = PackBuffers { from: place.buffer, to: packed }.list();
        let frozen = place.frozen.is_some().then_some(&key[..]);
        self.packing(frozen).launch(Pack { width, contiguous, factors }, buffers, sizes, units);
        packed
    }
}
