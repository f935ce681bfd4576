//! Matmul: a micro-kernel holds a tile of the result in registers and runs along k, a block of k at a time.
//!
//! ```text
//! unit: some rows of C × some column panels
//!   for each block of k       A's rows ─► local scratch, as they lie: it stays in the second-level cache
//!     for each column panel   B[block, panel]: a piece that stays in the first-level cache
//!       for each tile of rows C[tile, panel] += A[tile, block] · B[block, panel]
//! ```
//!
//! B is read from panels [⌈n/32⌉][k][32], which frozen weights are packed into once, when they arrive. One
//! whose rows run along n needs no packing: its pieces are copied to scratch as well.

use peft_grammar::graph::{Dim, Value};
use peft_runtime::artifact::{BufferId, Element, Extent, Storage};

use super::kernel::{Buf, F32, Kernel, LANES, Order, VECTOR, Val, define, first};
use super::{Lowering, Place, product};

/// Rows of the result, and vectors along each, that the micro-kernel holds: 28 of 32 registers are sums.
#[derive(Clone, Copy)]
struct Tile {
    rows: u64,
    vectors: u64,
}

const TILE: Tile = Tile { rows: 14, vectors: 2 };
/// For a result of at most one vector's columns.
const NARROW: Tile = Tile { rows: 28, vectors: 1 };
/// For a result of at most seven rows.
const SHORT: Tile = Tile { rows: 7, vectors: 4 };

/// Rows of a unit: what is read of B serves all of them.
const ROWS: u64 = 112;
/// Steps along k between two visits of the result: 256 rows of a column panel are 32 KiB.
const DEPTH: u64 = 256;
/// Column panels of a unit: what is read of A serves all of them.
const PANELS: u64 = 4;
/// The same where all rows are one unit's, so that there are units to share.
const PANELS_OF_FEW_ROWS: u64 = 2;

impl Tile {
    fn columns(self) -> u64 {
        self.vectors * LANES
    }
    /// The tile for m × n of which some may be known.
    fn of(m: &Extent, n: &Extent, packed: bool) -> Tile {
        match (m, n) {
            (_, Extent::Const(n)) if *n <= NARROW.columns() => NARROW,
            // Packed panels are there for other products as well.
            (Extent::Const(m), _) if *m <= SHORT.rows && !packed => SHORT,
            _ => TILE,
        }
    }
}

/// An operand in memory: element (batch, i, k) at `batch · area + i · along + k · step`.
struct Side {
    batch: Extent,
    /// Rows of A, columns of B.
    length: Extent,
    depth: Extent,
    /// i is the axis without gaps; otherwise k is.
    contiguous: bool,
}

/// Where a [`Side`] lies: elements from one line to the next, from one batch to the next, and before all.
struct Lines {
    line: Extent,
    area: Extent,
    first: Extent,
}

impl Side {
    /// Lines as they lie in memory: of the axis that runs along them, or of a wider tensor.
    fn lines(&self, place: &Place) -> Lines {
        let (length, lines) = match self.contiguous {
            true => (&self.length, &self.depth),
            false => (&self.depth, &self.length),
        };
        let (line, start) = match &place.columns {
            Some((width, start)) => (width, *start),
            None => (length, 0),
        };
        Lines { line: line.clone(), area: lines.clone() * line.clone(), first: Extent::Const(start) }
    }
}

/// Where a product goes: a buffer, the width of its rows, the first column, and whether what stands there stays in
/// the sum.
struct Destination {
    buffer: BufferId,
    width: Extent,
    start: u64,
    kept: bool,
}

impl Lowering<'_, '_, '_> {
    pub(super) fn matmul(&mut self, x: Value, y: Value, transpose_x: bool, transpose_y: bool, result: Value) {
        let (shape_x, shape_y) = (&self.ty(x).shape, &self.ty(y).shape);
        let (lead, [a, b]) = split(shape_x);
        let (lead_y, [c, d]) = split(shape_y);
        let (mut m, depth) = if transpose_x { (product(&[b]), product(&[a])) } else { (product(&[a]), product(&[b])) };
        let n = if transpose_y { product(&[c]) } else { product(&[d]) };
        let mut batch = product(lead);
        if lead_y.is_empty() {
            // One weight for all leading axes: they are more rows.
            m = batch * m;
            batch = Extent::Const(1);
        }
        let left = Side { batch: batch.clone(), length: m.clone(), depth: depth.clone(), contiguous: transpose_x };
        let right = Side { batch: batch.clone(), length: n.clone(), depth: depth.clone(), contiguous: !transpose_y };
        let (place_a, place_b) = (self.place(x).clone(), self.place(y).clone());
        let packed = place_b.frozen.is_some() || transpose_y;
        let tile = Tile::of(&m, &n, packed);
        let form = Form { tile, columns_a: transpose_x, packed };

        let lines_a = left.lines(&place_a);
        let across = Extent::Const(tile.columns());
        let panels = Extent::CeilDiv(Box::new(n.clone()), tile.columns());
        let (from_b, lines_b, panel_b) = match packed {
            true => {
                let panel = depth.clone() * across.clone();
                let lines = Lines { line: across, area: panels.clone() * panel.clone(), first: Extent::Const(0) };
                (self.pack(y, tile.columns(), right), lines, panel)
            }
            false => (place_b.buffer, right.lines(&place_b), across),
        };
        let (out, width, start) = self.product_place(result);
        let to = Destination { buffer: out, width, start, kept: false };
        self.multiply(form, (place_a.buffer, lines_a), (from_b, lines_b, panel_b), [batch, m, n, depth], to);
    }

    /// One launch over all of a product's units. `panel_b`: elements from one column panel of B to the next.
    fn multiply(
        &mut self,
        form: Form,
        (a, lines_a): (BufferId, Lines),
        (b, lines_b, panel_b): (BufferId, Lines, Extent),
        [batch, m, n, depth]: [Extent; 4],
        to: Destination,
    ) {
        let panels = Extent::CeilDiv(Box::new(n.clone()), form.tile.columns());
        let blocks = Extent::CeilDiv(Box::new(m.clone()), ROWS);
        let shared = match &m {
            Extent::Const(m) if *m <= ROWS => PANELS_OF_FEW_ROWS,
            _ => PANELS,
        };
        let groups = Extent::CeilDiv(Box::new(panels.clone()), shared);
        let units = batch * blocks.clone() * groups.clone();
        let mut sizes = vec![m, n, depth, blocks, groups, Extent::Const(shared), panels];
        sizes.extend([lines_a.line, lines_a.area, lines_a.first]);
        sizes.extend([lines_b.line, lines_b.area, lines_b.first, panel_b]);
        sizes.extend([to.width, Extent::Const(to.start), Extent::Const(to.kept.into())]);
        let kernel = self.target.kernel(&form.name(), |name| gemm(name, form));
        self.launch(kernel, vec![a, b, to.buffer], sizes, units);
    }

    /// A product with some `rows` of y, from a multiple of a tile's columns on: x @ y[rows]ᵀ, or x @ y[rows]; y is packed whole.
    /// It fills `out`, or is added to what stands there.
    pub(super) fn multiply_rows(
        &mut self,
        (x, m): (BufferId, Extent),
        y: Value,
        rows: std::ops::Range<u64>,
        transpose_y: bool,
        (out, kept): (BufferId, bool),
    ) {
        let [all, across] = [0, 1].map(|axis| product(&self.ty(y).shape[axis..axis + 1]));
        let some = Extent::Const(rows.end - rows.start);
        let (n, whole_depth) = if transpose_y { (all, across.clone()) } else { (across.clone(), all) };
        let tile = Tile::of(&m, &n, true);
        let columns = Extent::Const(tile.columns());
        let one = Extent::Const(1);
        let right = Side { batch: one.clone(), length: n, depth: whole_depth.clone(), contiguous: !transpose_y };
        let packed = self.pack(y, tile.columns(), right);
        let panel = whole_depth * columns.clone();
        let (n, depth, before) = match transpose_y {
            true => (some, across, Extent::Const(rows.start / tile.columns()) * panel.clone()),
            false => (across, some, Extent::Const(rows.start) * columns.clone()),
        };
        let zero = Extent::Const(0);
        let lines_a = Lines { line: depth.clone(), area: zero.clone(), first: zero.clone() };
        let lines_b = Lines { line: columns, area: zero, first: before };
        let to = Destination { buffer: out, width: n.clone(), start: 0, kept };
        let form = Form { tile, columns_a: false, packed: true };
        self.multiply(form, (x, lines_a), (packed, lines_b, panel), [one, m, n, depth], to);
    }

    /// The panels of an operand; the same ones if it has been packed this way before.
    fn pack(&mut self, value: Value, width: u64, side: Side) -> BufferId {
        let place = self.place(value).clone();
        let Lines { line, area, first } = side.lines(&place);
        let Side { batch, length, depth, contiguous } = side;
        let layout = format!("{width} of {batch:?} × {length:?} × {depth:?}, {contiguous}, {line:?} from {first:?}");
        let panels = Extent::CeilDiv(Box::new(length.clone()), width);
        let units = batch * panels.clone();
        let shape = vec![units.clone() * depth.clone() * Extent::Const(width)];
        let key = match &place.frozen {
            Some(source) => format!("pack({source}, {layout})"),
            None => format!("pack({}, {layout})", place.buffer),
        };
        let known = if place.frozen.is_some() { self.target.bound.get(&key) } else { self.packs.get(&key) };
        if let Some(&panels) = known {
            return panels;
        }
        let own = std::mem::replace(&mut self.frozen, place.frozen.as_ref().map(|_| key.clone()));
        let packed = match place.frozen {
            Some(_) => self.target.bind(&key, Element::F32, shape, Storage::Prepared),
            None => {
                let packed = self.target.buffer(Element::F32, shape, Storage::Temporary);
                self.packs.insert(key, packed);
                packed
            }
        };
        let name = format!("pack{width}_{}", if contiguous { "columns" } else { "rows" });
        let kernel = self.target.kernel(&name, |name| pack_kernel(name, width, contiguous));
        let label = std::mem::replace(&mut self.label, "pack".into());
        let sizes = vec![length, depth, panels, line, area, first];
        self.launch(kernel, vec![place.buffer, packed], sizes, units);
        self.label = label;
        self.frozen = own;
        packed
    }
}

fn split(shape: &[Dim]) -> (&[Dim], [Dim; 2]) {
    let (lead, last) = shape.split_at(shape.len() - 2);
    (lead, [last[0], last[1]])
}

/// One panel a unit.
fn pack_kernel(name: &str, width: u64, contiguous: bool) -> String {
    define(name, &[Element::F32; 2], 6, |k, buffers, sizes| {
        let ([from, to], [length, depth, panels, line, area, first_column]) = (first(buffers), first(sizes));
        k.units(|k, unit| {
            let (batch, panel) = (k.div(unit, panels), k.rem(unit, panels));
            let area = k.mul(batch, area);
            let area = k.add(area, first_column);
            let across = k.index(width);
            let start = k.mul(panel, across);
            let left = k.sub(length, start);
            let size = k.mul(depth, across);
            let out = k.mul(unit, size);
            let zero = k.index(0);
            if contiguous {
                k.each(zero, depth, 1, |k, at| {
                    let row = k.mul(at, line);
                    let row = k.add(row, start);
                    let row = k.add(row, area);
                    let step = k.mul(at, across);
                    let step = k.add(out, step);
                    for lane in (0..width).step_by(LANES as usize) {
                        let lanes = (width - lane).min(LANES);
                        let offset = k.index(lane);
                        let here = k.sub(left, offset);
                        let mask = k.mask(here, lanes);
                        let source = k.add(row, offset);
                        let x = k.load_lanes(from, source, mask);
                        let target = k.add(step, offset);
                        k.store_vector(x, to, target);
                    }
                });
            } else {
                // Rows in blocks of lanes along k: one cache line of each row is read while it is warm.
                k.each(zero, depth, LANES, |k, block| {
                    let end = k.index(LANES);
                    let end = k.add(block, end);
                    let end = k.min(end, depth);
                    k.each(zero, across, 1, |k, i| {
                        let exists = k.compare(i, Order::Lt, left);
                        let row = k.add(start, i);
                        let row = k.select(exists, row, start);
                        let row = k.mul(row, line);
                        let row = k.add(row, area);
                        let nothing = k.float(0.0, F32);
                        k.each(block, end, 1, |k, at| {
                            let source = k.add(row, at);
                            let x = k.load(from, source);
                            let x = k.select(exists, x, nothing);
                            let target = k.mul(at, across);
                            let target = k.add(target, i);
                            let target = k.add(target, out);
                            k.store(x, to, target);
                        });
                    });
                });
            }
        });
    })
}

/// What one of the matmul's kernels is made for.
#[derive(Clone, Copy)]
struct Form {
    tile: Tile,
    /// A's lines run along its rows' axis, one for each k: x of xᵀ y.
    columns_a: bool,
    /// B is packed; otherwise its lines run along n.
    packed: bool,
}

impl Form {
    fn name(self) -> String {
        let Tile { rows, vectors } = self.tile;
        let a = if self.columns_a { "columns" } else { "rows" };
        let b = if self.packed { "panels" } else { "rows" };
        format!("gemm{rows}x{}_{a}_{b}", vectors * LANES)
    }

    /// Floats between a tile's neighbours in the scratch: its rows, or its steps along k. Rows whose
    /// distance is a power of two would all want the same few lines of the cache.
    fn step(self) -> u64 {
        if self.columns_a { self.tile.rows.next_multiple_of(LANES) } else { DEPTH + LANES }
    }

    /// Floats of a tile of rows in the scratch.
    fn room(self) -> u64 {
        self.step() * if self.columns_a { DEPTH } else { self.tile.rows }
    }
}

/// Some rows against some column panels a unit.
fn gemm(name: &str, form: Form) -> String {
    let tile = form.tile;
    define(name, &[Element::F32; 3], 17, |k, buffers, sizes| {
        let [a, b, c] = first(buffers);
        let [m, n, depth, blocks, groups, shared, panels] = first(sizes);
        let [line_a, area_a, first_a, line_b, area_b, first_b, panel_b, width, first_column] = first(&sizes[7..]);
        let kept = sizes[16];
        let rows_of_a = k.scratch(form.room() * (ROWS / tile.rows));
        let piece = if form.packed { b } else { k.scratch(DEPTH * tile.columns()) };
        k.units(|k, unit| {
            // Neighbours share their part of B: it is read from memory once.
            let row = k.rem(unit, blocks);
            let rest = k.div(unit, blocks);
            let (batch, group) = (k.div(rest, groups), k.rem(rest, groups));
            let (zero, one, size) = (k.index(0), k.index(1), k.index(ROWS));
            let row = k.mul(row, size);
            let rows = k.sub(m, row);
            let rows = k.min(rows, size);
            let panel = k.mul(group, shared);
            let end_panel = k.add(panel, shared);
            let end_panel = k.min(end_panel, panels);
            // Where this batch's operands begin.
            let base_a = k.mul(batch, area_a);
            let base_a = k.add(base_a, first_a);
            let base_b = k.mul(batch, area_b);
            let base_b = k.add(base_b, first_b);
            let base_c = k.mul(batch, m);
            let base_c = k.add(base_c, row);
            let base_c = k.mul(base_c, width);
            let base_c = k.add(base_c, first_column);
            k.each(zero, depth, DEPTH, |k, block| {
                let length = k.sub(depth, block);
                let most = k.index(DEPTH);
                let length = k.min(length, most);
                let source = Source { buffer: a, base: base_a, line: line_a, row, rows, block, length };
                if form.columns_a {
                    copy_columns(k, form, &source, rows_of_a);
                } else {
                    copy_rows(k, form, &source, rows_of_a);
                }
                let again = k.add(block, kept);
                let again = k.compare(again, Order::Gt, zero);
                k.each(panel, end_panel, 1, |k, panel| {
                    let columns = k.index(tile.columns());
                    let start = k.mul(panel, columns);
                    let left = k.sub(n, start);
                    let from = k.mul(panel, panel_b);
                    let from = k.add(base_b, from);
                    let skipped = k.mul(block, line_b);
                    let from = k.add(from, skipped);
                    let from = match form.packed {
                        true => from,
                        false => {
                            copy_piece(k, tile, (b, from, line_b), left, length, piece);
                            zero
                        }
                    };
                    let base_c = k.add(base_c, start);
                    k.each(zero, rows, tile.rows, |k, row| {
                        let sums = tile_sums(k, form, (rows_of_a, row), (piece, from), length);
                        let at = k.mul(row, width);
                        let at = k.add(base_c, at);
                        let here = k.sub(rows, row);
                        let all_rows = k.index(tile.rows - 1);
                        let all_rows = k.compare(here, Order::Gt, all_rows);
                        let all_columns = k.sub(columns, one);
                        let all_columns = k.compare(left, Order::Gt, all_columns);
                        let all = k.and(all_rows, all_columns);
                        let target = Corner { buffer: c, at, width };
                        k.branch(
                            all,
                            |k| {
                                k.branch(
                                    again,
                                    |k| target.write(k, tile, &sums, true),
                                    |k| target.write(k, tile, &sums, false),
                                )
                            },
                            |k| target.write_some(k, tile, &sums, again, (here, left)),
                        );
                    });
                });
            });
        });
    })
}

/// Rows of A that a unit copies: those of a block along k.
struct Source {
    buffer: Buf,
    base: Val,
    line: Val,
    row: Val,
    rows: Val,
    block: Val,
    length: Val,
}

/// Row by row. Those that fill the last tile are the last row again: what comes of them is not written.
fn copy_rows(k: &mut Kernel, form: Form, source: &Source, to: Buf) {
    let &Source { buffer, base, line, row, rows, block, length } = source;
    let (zero, one) = (k.index(0), k.index(1));
    let last = k.sub(rows, one);
    let base = k.add(base, block);
    let tile = k.index(form.tile.rows);
    let most = k.add(rows, tile);
    let most = k.sub(most, one);
    let tiles = k.div(most, tile);
    let filled = k.mul(tiles, tile);
    k.each(zero, filled, 1, |k, r| {
        let from = k.min(r, last);
        let from = k.add(row, from);
        let from = k.mul(from, line);
        let from = k.add(base, from);
        let step = k.index(form.step());
        let target = k.mul(r, step);
        k.lanes(length, |k, j, mask| {
            let at = k.add(from, j);
            let x = k.load_lanes(buffer, at, mask);
            let at = k.add(target, j);
            k.store_vector(x, to, at);
        });
    });
}

/// Line by line, each in parts as wide as a tile has rows.
fn copy_columns(k: &mut Kernel, form: Form, source: &Source, to: Buf) {
    let &Source { buffer, base, line, row, rows, block, length } = source;
    let zero = k.index(0);
    let base = k.add(base, row);
    k.each(zero, length, 1, |k, step| {
        let from = k.add(block, step);
        let from = k.mul(from, line);
        let from = k.add(base, from);
        let distance = k.index(form.step());
        let target = k.mul(step, distance);
        k.each(zero, rows, form.tile.rows, |k, r| {
            let place = tile_place(k, form, r);
            let place = k.add(target, place);
            let from = k.add(from, r);
            let left = k.sub(rows, r);
            for lane in (0..form.tile.rows).step_by(LANES as usize) {
                let offset = k.index(lane);
                let here = k.sub(left, offset);
                let mask = k.mask(here, LANES);
                let at = k.add(from, offset);
                let x = k.load_lanes(buffer, at, mask);
                let at = k.add(place, offset);
                k.store_vector(x, to, at);
            }
        });
    });
}

/// Where the tile that begins at `row` lies in the scratch.
fn tile_place(k: &mut Kernel, form: Form, row: Val) -> Val {
    if form.columns_a {
        let (rows, room) = (k.index(form.tile.rows), k.index(form.room()));
        let tile = k.div(row, rows);
        k.mul(tile, room)
    } else {
        let step = k.index(form.step());
        k.mul(row, step)
    }
}

/// `length` steps of a column panel of B, whose lines run along n.
fn copy_piece(k: &mut Kernel, tile: Tile, (b, from, line): (Buf, Val, Val), left: Val, length: Val, to: Buf) {
    let masks: Vec<Val> = (0..tile.vectors)
        .map(|v| {
            let offset = k.index(v * LANES);
            let here = k.sub(left, offset);
            k.mask(here, LANES)
        })
        .collect();
    let zero = k.index(0);
    k.each(zero, length, 1, |k, step| {
        let source = k.mul(step, line);
        let source = k.add(from, source);
        let columns = k.index(tile.columns());
        let target = k.mul(step, columns);
        for (v, mask) in masks.iter().enumerate() {
            let offset = k.index(v as u64 * LANES);
            let at = k.add(source, offset);
            let x = k.load_lanes(b, at, *mask);
            let at = k.add(target, offset);
            k.store_vector(x, to, at);
        }
    });
}

/// The micro-kernel: the tile's sums over a block of k, row by row.
fn tile_sums(k: &mut Kernel, form: Form, (a, row): (Buf, Val), (b, from): (Buf, Val), length: Val) -> Vec<Val> {
    let Tile { rows, vectors } = form.tile;
    let place = tile_place(k, form, row);
    let nothing = k.float(0.0, VECTOR);
    let zero = k.index(0);
    k.fold(zero, length, 1, &vec![nothing; (rows * vectors) as usize], |k, step, sums| {
        let columns = k.index(form.tile.columns());
        let at = k.mul(step, columns);
        let at = k.add(from, at);
        let line: Vec<Val> = (0..vectors)
            .map(|v| {
                let offset = k.index(v * LANES);
                let at = k.add(at, offset);
                k.load_vector(b, at, LANES)
            })
            .collect();
        let distance = k.index(form.step());
        let (step, between) = if form.columns_a { (k.mul(step, distance), 1) } else { (step, form.step()) };
        let at = k.add(place, step);
        let x = |k: &mut Kernel, r: usize| {
            let offset = k.index(r as u64 * between);
            let at = k.add(at, offset);
            k.load(a, at)
        };
        k.outer(rows, x, &line, sums)
    })
}

/// A tile of the result.
struct Corner {
    buffer: Buf,
    at: Val,
    width: Val,
}

impl Corner {
    /// Where each of the tile's vectors begins.
    fn places(&self, k: &mut Kernel, tile: Tile) -> Vec<Val> {
        let mut row = self.at;
        let mut places = vec![];
        for _ in 0..tile.rows {
            for v in 0..tile.vectors {
                let offset = k.index(v * LANES);
                places.push(k.add(row, offset));
            }
            row = k.add(row, self.width);
        }
        places
    }

    /// A tile that lies within the result.
    fn write(&self, k: &mut Kernel, tile: Tile, sums: &[Val], again: bool) {
        for (at, &sum) in self.places(k, tile).into_iter().zip(sums) {
            let sum = match again {
                true => {
                    let earlier = k.load_vector(self.buffer, at, LANES);
                    k.add(earlier, sum)
                }
                false => sum,
            };
            k.store_vector(sum, self.buffer, at);
        }
    }

    /// A tile of which `rows` and `columns` exist.
    fn write_some(&self, k: &mut Kernel, tile: Tile, sums: &[Val], again: Val, (rows, columns): (Val, Val)) {
        let zero = k.index(0);
        for (i, (at, &sum)) in self.places(k, tile).into_iter().zip(sums).enumerate() {
            let (row, vector) = (i as u64 / tile.vectors, i as u64 % tile.vectors);
            let (row, offset) = (k.index(row), k.index(vector * LANES));
            let exists = k.compare(row, Order::Lt, rows);
            let here = k.sub(columns, offset);
            let here = k.select(exists, here, zero);
            let earlier = k.select(again, here, zero);
            let (mask, earlier) = (k.mask(here, LANES), k.mask(earlier, LANES));
            let before = k.load_lanes(self.buffer, at, earlier);
            let sum = k.add(before, sum);
            k.store_lanes(sum, self.buffer, at, mask);
        }
    }
}
