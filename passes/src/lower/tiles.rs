//! Products on a GPU: how their operands lie, and which kernel computes them: tiles ([`crate::kernels::gemm::simt`]), a few
//! columns ([`super::narrow`]) or tensor cores ([`super::halves`]).

use std::ops::Range;

use peft_grammar::graph::{Type, Value};
use peft_grammar::model::Precision;
use peft_runtime::artifact::{BufferId, Extent};

use super::epilogue::{Following, Taken};
use super::gemm::Axes;
use super::view::{ONE, View};
use super::{Lowering, Place, product};
use crate::builder::mma::Half;
use crate::kernels::gemm::epilogue::Fate;
use crate::kernels::gemm::simt::{Buffers, DEPTH, NARROW, Simt, Sizes, TILE, Tile};
use crate::target::Machine;
use crate::target::cuda::{Chip, WARPS};

/// The tile of a product of so many rows and columns.
fn tile(m: &Extent, n: &Extent) -> Tile {
    let narrow = |size: &Extent| matches!(size, Extent::Const(size) if *size <= NARROW);
    let (rows, columns) = match (narrow(m), narrow(n)) {
        (_, true) => (TILE, NARROW),
        (true, false) => (NARROW, TILE),
        (false, false) => (TILE, TILE),
    };
    Tile { rows, columns }
}

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

/// Blocks of a product that are worth having, and how many may share a tile for that.
const BLOCKS: u64 = 128;
const SHARES: u64 = 8;

/// How many rows, columns, steps along k and batches.
pub(super) struct Shape {
    pub m: Extent,
    pub n: Extent,
    pub depth: Extent,
    pub batch: Extent,
}

impl Lowering<'_, '_, '_> {
    /// A product on a GPU.
    pub(super) fn tiled(&mut self, at: usize, transpose_x: bool, transpose_y: bool) -> Result<(), String> {
        let node = &self.graph.nodes[at];
        let (x, y, result) = (node.operands[0], node.operands[1], node.result);
        let (ty_x, ty_y, ty) = (self.ty(x), self.ty(y), self.ty(result));
        // One weight for all leading axes: they are more rows.
        let lead = ty_y.rank() - 2;
        let all_rows = |axes: Axes| if lead + 2 < ty_x.rank() { Axes { i: 0..axes.i.end, ..axes } } else { axes };
        let axes_x = all_rows(Axes::of(ty_x, lead, transpose_x));
        let axes_y = Axes::of(ty_y, lead, !transpose_y);
        let size = |ty: &Type, axes: &Range<usize>| product(&ty.shape[axes.clone()]);
        let [m, depth, batch] = [&axes_x.i, &axes_x.k, &axes_x.batch].map(|axes| size(ty_x, axes));
        let shape = Shape { m, n: size(ty_y, &axes_y.i), depth, batch };
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
                let alone = matches!(self.rounds(x), Some((_, true)));
                assert!(!alone, "what only such products read is there for them alone");
                (None, (a, left))
            }
        };
        // What follows a sum of shares has a launch of its own.
        let alone = packed.is_none() && shares(&shape) > 1;
        let whole = matches!(shape.n, Extent::Const(n) if n <= TILE);
        let taken = if alone { Taken::groups(at, at, vec![]) } else { self.taken(at, at, whole) };
        let (c, line, area, first) = self.product_place(result, all_rows(Axes::of(ty, lead, false)));
        let from = packed.as_ref().map_or(b, |(_, packed)| packed.buffer);
        let following = match taken.is_empty() {
            true => Following::default(),
            false => self.epilogue(&taken, &Buffers { a, b: from, c }.list(), true)?,
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
        let Machine::Cuda(chip) = self.target.machine else { return None };
        let asked = self.target.precision == Precision::Bf16 && self.frozen.is_none();
        let half = if chip >= Chip::Sm80 { Half::BF16 } else { Half::F16 };
        (asked && place_b.frozen.is_some() && !left.contiguous).then_some(half)
    }

    /// x @ y[rows]ᵀ, or x @ y[rows]. It fills `out`, or is added to what stands there. All of them are row-major.
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
        let shape = Shape { m, n, depth, batch: one.clone() };
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

    fn launch_tiles(&mut self, shape: Shape, (a, left): (BufferId, Side), (b, right): (BufferId, Side), to: To) {
        if let Some(narrow) = self.narrow(&shape, &left) {
            return self.launch_narrow(narrow, shape, (a, left), (b, right), to);
        }
        let whole = shape.m.clone() * shape.n.clone();
        let apart = shape.batch != Extent::Const(1) && to.area != whole;
        let dense = to.line == shape.n && to.first == Extent::Const(0) && !apart;
        let shares = if to.fate == Fate::Written && dense { shares(&shape) } else { 1 };
        let Shape { m, n, depth, batch } = shape;
        let tile = tile(&m, &n);
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

/// How many blocks share a tile of a weight's gradient, so that there are some for most of a chip's multiprocessors.
fn shares(shape: &Shape) -> u64 {
    match *shape {
        Shape { m: Extent::Const(m), n: Extent::Const(n), depth: Extent::Tokens, batch: Extent::Const(batch) } => {
            let tile = tile(&shape.m, &shape.n);
            let tiles = batch * m.div_ceil(tile.rows) * n.div_ceil(tile.columns);
            (BLOCKS / tiles.max(1)).clamp(1, SHARES)
        }
        _ => 1,
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
