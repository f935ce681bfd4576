//! Matmul: a micro-kernel holds a tile of the result in registers and runs along k, a block of k at a time.
//!
//! ```text
//! unit: some rows of C × some column panels
//!   for each block of k       A's rows ─► local scratch, as they lie: it stays in the second-level cache
//!     for each column panel   B[block, panel]: a piece that the unit's rows share
//!       for each tile of rows C[tile, panel] += A[tile, block] · B[block, panel]
//! ```
//!
//! B is read from panels [⌈n/32⌉][k][32], which frozen weights are packed into once, when they arrive. While the
//! tiles of one piece are computed, the next is fetched, a bit at each step: no tile waits for memory. B whose rows run
//! along n needs no packing: its pieces are copied to scratch as well.
//!
//! In bf16, A's rows are rounded on their way to the scratch, frozen weights when they are packed. Where the processor
//! multiplies pairs of bf16, both copies hold pairs, neighbours along k. Elsewhere B's hold neighbours of a line, which is
//! widened for all of a tile's rows, and A's copy floats.

use std::ops::Range;

use peft_grammar::graph::{Type, Value};
use peft_grammar::model::Precision;
use peft_runtime::artifact::{BufferId, Element, Extent, Storage};

use super::epilogue::{Epilogue, Taken, When};
use super::tables::Panels;
use super::view::{ONE, View};
use super::{Lowering, Place, product};
use crate::builder::{Access, Buf, Code, F32, Kernel, LANES, Order, Val, define, first};
use crate::target::Machine;
use crate::target::cpu::{Cpu, Registers};

/// Rows of the result, and vectors along each, that the micro-kernel holds.
#[derive(Clone, Copy)]
struct Tile {
    rows: u64,
    vectors: u64,
    /// Steps along k between two visits of the result: of a column panel 48 KiB, or 16 where the first-level cache is
    /// to hold them with as many of the tile's rows.
    depth: u64,
    /// Rows of a unit, at most: what is read of B serves all of them. What it copies of A and what it computes are to stay
    /// in half of a second-level cache, which may be shared: of 512 KiB, and of 1 MiB and more where there is AVX-512.
    /// And where others take a thread's time, small units leave less to wait for at the end.
    most: u64,
    /// Steps along k of one turn of the loop, about a hundred multiplications of vectors: they share what a turn costs
    /// besides. Where two threads share a core, its decoders have room for little more.
    steps: u64,
}

/// Registers that are no sums: for a line of B and a number of A; where there are many, LLVM fetches the next line early,
/// if it is of several vectors, and keeps sums in memory when there is no room for it.
const SPARE: u64 = 4;
const SPARE_OF_MANY: u64 = 8;

/// Columns of a unit: what is copied of A serves all of them, and a product as narrow as a hidden state still has units
/// for many threads. Wider ones have more, as there are enough units.
const COLUMNS: Range<u64> = 384..1152;
/// Units beside each other in a wide product.
const GROUPS: u64 = 4;
/// Column panels of a unit where all rows are one unit's, so that there are units to share.
const PANELS_OF_FEW_ROWS: u64 = 2;

impl Tile {
    fn columns(self) -> u64 {
        self.vectors * LANES
    }
    /// Rows of a unit, at most: whole tiles.
    fn block(self) -> u64 {
        self.most / self.rows * self.rows
    }
    /// The tile for m × n, of which some may be known: 12 × 32, 28 × 16 or 6 × 64 on AVX-512.
    fn of(m: &Extent, n: &Extent, packed: bool, registers: Registers) -> Tile {
        let vector = LANES / registers.floats;
        let (depth, most, steps) = if vector == 1 { (384, 112, 4) } else { (256, 48, 8) };
        let tile = |vectors| {
            let spare = if registers.count > 16 && vectors > 1 { SPARE_OF_MANY } else { SPARE };
            Tile { rows: (registers.count - spare) / (vector * vectors), vectors, depth, most, steps }
        };
        let [narrow, usual, short] = if vector == 1 { [1, 2, 4] } else { [1, 1, 2] }.map(tile);
        match (m, n) {
            (_, Extent::Const(n)) if *n <= narrow.columns() => narrow,
            // Packed panels are there for other products as well.
            (Extent::Const(m), _) if *m <= short.rows && !packed => short,
            _ => usual,
        }
    }
}

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

/// Axes of an operand that are one of the product's.
pub(super) struct Axes {
    pub batch: Range<usize>,
    pub i: Range<usize>,
    pub k: Range<usize>,
}

impl Axes {
    /// Of an operand or a result with `lead` axes of batches.
    pub fn of(ty: &Type, lead: usize, turned: bool) -> Axes {
        let (row, column) = (ty.rank() - 2..ty.rank() - 1, ty.rank() - 1..ty.rank());
        let (i, k) = if turned { (column, row) } else { (row, column) };
        Axes { batch: 0..lead, i, k }
    }
}

impl Side {
    /// `None` where the view has gaps along both axes, or axes that should be one are not.
    fn of(view: &View, axes: &Axes) -> Option<Side> {
        let Axes { batch, i, k } = axes;
        let [area, step_i, step_k] = [batch, i, k].map(|axes| view.along(axes.clone()));
        let (area, step_i, step_k) = (area?, step_i?, step_k?);
        let contiguous = match (step_i == ONE, step_k == ONE) {
            (true, true) => i.start > k.start,
            (false, false) => return None,
            (contiguous, _) => contiguous,
        };
        let [batch, length, depth] = [batch, i, k].map(|axes| product(&view.shape[axes.clone()]));
        let line = if contiguous { step_k } else { step_i }.extent();
        // One batch takes no steps: it is packed alike whatever axes it has.
        let area = if batch == Extent::Const(1) { Extent::Const(0) } else { area.extent() };
        Some(Side { batch, length, depth, contiguous, line, area, first: view.first.clone() })
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

impl Lowering<'_, '_, '_> {
    fn side(&mut self, value: Value, axes: Axes) -> (Place, Side) {
        if Side::of(&self.view(value), &axes).is_none() {
            self.dense(value);
        }
        let side = Side::of(&self.view(value), &axes).expect("without gaps along one axis");
        (self.place(value).clone(), side)
    }

    pub(super) fn matmul(&mut self, at: usize, transpose_x: bool, transpose_y: bool) -> Result<(), String> {
        let node = &self.graph.nodes[at];
        let (x, y, result) = (node.operands[0], node.operands[1], node.result);
        let (ty_x, ty_y, ty) = (self.ty(x), self.ty(y), self.ty(result));
        // One weight for all leading axes: they are more rows.
        let lead = ty_y.rank() - 2;
        let all_rows = |axes: Axes| if lead + 2 < ty_x.rank() { Axes { i: 0..axes.i.end, ..axes } } else { axes };
        let (place_a, left) = self.side(x, all_rows(Axes::of(ty_x, lead, transpose_x)));
        let (place_b, right) = self.side(y, Axes::of(ty_y, lead, !transpose_y));
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
        let followers = self.followers(at, at);
        if let Some(&root) = followers.first()
            && self.uses[result.0 as usize] == 1
        {
            // Nothing else reads the product: it lies where what is made of it will.
            let (buffer, view) = self.target(self.graph.nodes[root].result);
            self.show(result, buffer, view);
        }
        let (buffer, line, area, first) = self.product_place(result, all_rows(Axes::of(ty, lead, false)));
        let to = Destination { buffer, line, area, first, kept: false };
        let epilogue = self.epilogue(&Taken::groups(at, at, followers), &[place_a.buffer, from_b, buffer], false)?;
        self.label = epilogue.label(node.op.name());
        self.multiply(form, (place_a.buffer, left), (from_b, lines_b), n, to, epilogue);
        Ok(())
    }

    fn form(&self, left: &Side, place_b: &Place, n: &Extent, packed: bool) -> Form {
        let rounds = self.target.precision == Precision::Bf16 && self.frozen.is_none();
        let factors = match place_b.frozen {
            Some(_) if rounds && !left.contiguous => Factors::of_bf16(self.target.cpu()),
            _ => Factors::F32,
        };
        let tile = Tile::of(&left.length, n, packed, self.target.cpu().registers());
        Form { tile, columns_a: left.contiguous, packed, factors }
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
        epilogue: Epilogue,
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
        let mut sizes = vec![m, n, depth, blocks, groups, Extent::Const(shared), panels];
        sizes.extend([left.line, left.area, left.first]);
        sizes.extend(lines_b);
        sizes.extend([to.line, to.area, to.first, Extent::Const(to.kept.into())]);
        let name = format!("{}{}", form.name(), epilogue.suffix());
        let kernel = self.target.kernel(&name, |machine| gemm(machine, form, &epilogue));
        let buffers = [vec![a, b, to.buffer], epilogue.buffers].concat();
        sizes.extend(epilogue.sizes);
        self.launch(kernel, buffers, sizes, units);
    }

    /// A product with some `rows` of y, from a multiple of a tile's columns on: x @ y[rows]ᵀ, or x @ y[rows]; y is
    /// packed whole. It fills `out`, or is added to what stands there. All of them are row-major.
    pub(super) fn multiply_rows(
        &mut self,
        (x, m): (BufferId, Extent),
        y: Value,
        rows: Range<u64>,
        transpose_y: bool,
        (out, kept): (BufferId, bool),
    ) {
        if let Machine::Cuda(_) = self.target.machine {
            return self.tiled_rows((x, m), y, rows, transpose_y, (out, kept));
        }
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
        self.multiply(form, (x, left), (packed, lines), n, to, Epilogue::default());
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
        let layout = format!("{width} of {side:?}, {}", factors.suffix());
        let Side { batch, length, depth, contiguous, line, area, first } = side;
        let panels = Extent::CeilDiv(Box::new(length.clone()), width);
        let units = batch.clone() * panels.clone();
        let shape = vec![units.clone() * factors.steps(depth.clone()) * Extent::Const(form.line())];
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
            Some(_) => {
                let packed = self.target.bind(&key, factors.element(), shape, Storage::Prepared);
                // The whole of a matrix, row by row.
                if let Factors::F32 = factors
                    && (contiguous, &line, &first, &batch) == (true, &length, &Extent::Const(0), &Extent::Const(1))
                {
                    let shape = [depth.clone(), length.clone()];
                    self.target.panels.insert(place.buffer, Panels { buffer: packed, across: width, shape });
                }
                packed
            }
            None => {
                let packed = self.target.buffer(factors.element(), shape, Storage::Temporary);
                self.packs.insert(key, packed);
                packed
            }
        };
        let name = format!("pack{width}_{}{}", if contiguous { "columns" } else { "rows" }, factors.suffix());
        let kernel = self.target.kernel(&name, |machine| pack_kernel(machine, width, contiguous, factors));
        let label = std::mem::replace(&mut self.label, "pack".into());
        let sizes = vec![length, depth, panels, line, area, first];
        self.launch(kernel, vec![place.buffer, packed], sizes, units);
        self.label = label;
        self.frozen = own;
        packed
    }
}

/// One panel a unit. What completes a last pair along k is zero.
fn pack_kernel(machine: Machine, width: u64, contiguous: bool, factors: Factors) -> Code {
    define(machine, &[Element::F32, factors.element()], 6, |k, buffers, sizes| {
        let ([from, to], [length, depth, panels, line, area, first_column]) = (first(buffers), first(sizes));
        k.units(|k, unit| {
            let (batch, panel) = (k.div(unit, panels), k.rem(unit, panels));
            let area = k.mul(batch, area);
            let area = k.add(area, first_column);
            let across = k.index(width);
            let start = k.mul(panel, across);
            let left = k.sub(length, start);
            let steps = factors.steps_in(k, depth);
            let words = k.index(factors.words(width));
            let size = k.mul(steps, words);
            let out = k.mul(unit, size);
            let zero = k.index(0);
            if contiguous {
                k.each(zero, steps, 1, |k, step| {
                    let at = factors.depth_at(k, step);
                    let row = k.mul(at, line);
                    let row = k.add(row, start);
                    let row = k.add(row, area);
                    let target = k.mul(step, words);
                    let target = k.add(out, target);
                    for lane in (0..width).step_by(LANES as usize) {
                        let offset = k.index(lane);
                        let here = k.sub(left, offset);
                        let mask = k.mask(here);
                        let source = k.add(row, offset);
                        let x = k.load_lanes(from, source, mask);
                        let x = match factors {
                            Factors::F32 => x,
                            Factors::Widened => k.pairs(false, x),
                            Factors::Pairs => {
                                let one = k.index(1);
                                let rest = k.sub(depth, at);
                                let whole = k.compare(rest, Order::Gt, one);
                                let both = k.select(whole, here, zero);
                                let mask = k.mask(both);
                                let below = k.add(source, line);
                                let below = k.load_lanes(from, below, mask);
                                let x = k.interleave(x, below);
                                k.pairs(true, x)
                            }
                        };
                        let offset = k.index(factors.words(lane));
                        let target = k.add(target, offset);
                        k.store_vector(x, to, target);
                    }
                });
            } else {
                // Rows in blocks of lanes along k: one cache line of each row is read while it is warm.
                k.each(zero, steps, LANES, |k, block| {
                    let end = k.index(LANES);
                    let end = k.add(block, end);
                    let end = k.min(end, steps);
                    let each = width / factors.words(width);
                    k.each(zero, words, 1, |k, word| {
                        // Of each column in the word, where it begins, and whether there is one.
                        let columns = (0..each).map(|i| {
                            let (i, each) = (k.index(i), k.index(each));
                            let before = k.mul(word, each);
                            let i = k.add(before, i);
                            let exists = k.compare(i, Order::Lt, left);
                            let row = k.add(start, i);
                            let row = k.select(exists, row, start);
                            let row = k.mul(row, line);
                            (k.add(row, area), exists)
                        });
                        let columns: Vec<(Val, Val)> = columns.collect();
                        k.each(block, end, 1, |k, step| {
                            let at = factors.depth_at(k, step);
                            let target = k.mul(step, words);
                            let target = k.add(target, word);
                            let target = k.add(target, out);
                            let number = |k: &mut Kernel, (row, exists): (Val, Val)| {
                                let source = k.add(row, at);
                                let x = k.load(from, source);
                                let nothing = k.float(0.0, F32);
                                k.select(exists, x, nothing)
                            };
                            match (factors, &columns[..]) {
                                (Factors::Widened, &[one, other]) => {
                                    let (x, y) = (number(k, one), number(k, other));
                                    let x = k.paired(x, y);
                                    k.store(x, to, target);
                                }
                                (Factors::Pairs, &[(row, exists)]) => {
                                    let rest = k.sub(depth, at);
                                    let here = k.select(exists, rest, zero);
                                    let mask = k.mask_of(here, 2);
                                    let source = k.add(row, at);
                                    let x = k.load_lanes(from, source, mask);
                                    let x = k.pairs(true, x);
                                    k.store_vector(x, to, target);
                                }
                                (_, columns) => {
                                    let x = number(k, columns[0]);
                                    k.store(x, to, target);
                                }
                            }
                        });
                    });
                });
            }
        });
    })
}

/// Sizes of a product's kernel, without its epilogue's.
const SIZES: usize = 18;

/// What is multiplied.
#[derive(Clone, Copy, PartialEq)]
enum Factors {
    F32,
    /// Two of bf16 that are neighbours along k, in a word, on both sides.
    Pairs,
    /// Numbers of bf16: in B two neighbours of a line in a word, in A's copy floats.
    Widened,
}

impl Factors {
    fn of_bf16(cpu: Cpu) -> Factors {
        if cpu.multiplies_bf16() { Factors::Pairs } else { Factors::Widened }
    }

    /// Of B.
    fn element(self) -> Element {
        if self == Factors::F32 { Element::F32 } else { Element::I32 }
    }

    /// Of A's copy.
    fn copied(self) -> Element {
        if self == Factors::Pairs { Element::I32 } else { Element::F32 }
    }

    /// Numbers of a step along k.
    fn deep(self) -> u64 {
        if self == Factors::Pairs { 2 } else { 1 }
    }

    /// In which B holds so many columns of a step.
    fn words(self, columns: u64) -> u64 {
        if self == Factors::Widened { columns / 2 } else { columns }
    }

    /// Of a depth.
    fn steps(self, depth: Extent) -> Extent {
        match self.deep() {
            1 => depth,
            deep => Extent::CeilDiv(Box::new(depth), deep),
        }
    }

    /// The same in a kernel.
    fn steps_in(self, k: &mut Kernel, depth: Val) -> Val {
        let deep = k.index(self.deep());
        k.div_up(depth, deep)
    }

    /// Where a step begins along k.
    fn depth_at(self, k: &mut Kernel, step: Val) -> Val {
        let deep = k.index(self.deep());
        k.mul(step, deep)
    }

    fn suffix(self) -> &'static str {
        match self {
            Factors::F32 => "",
            Factors::Pairs => "_bf16",
            Factors::Widened => "_bf16_widened",
        }
    }
}

/// What one of the matmul's kernels is made for.
#[derive(Clone, Copy)]
struct Form {
    tile: Tile,
    factors: Factors,
    /// A's lines run along its rows' axis, one for each k: x of xᵀ y.
    columns_a: bool,
    /// B is packed; otherwise its lines run along n.
    packed: bool,
}

impl Form {
    fn name(self) -> String {
        let Tile { rows, vectors, .. } = self.tile;
        let a = if self.columns_a { "columns" } else { "rows" };
        let b = if self.packed { "panels" } else { "rows" };
        format!("gemm{rows}x{}_{a}_{b}{}", vectors * LANES, self.factors.suffix())
    }

    /// Elements of a panel of B at each step along k.
    fn line(self) -> u64 {
        self.factors.words(self.tile.columns())
    }

    /// Elements of B's next piece that are fetched at each step along k: all of it while a unit's rows pass.
    fn share(self) -> u64 {
        (self.tile.rows * self.line()).div_ceil(self.tile.block())
    }

    /// Elements between a tile's neighbours in the scratch: its rows, or its steps along k. Rows whose
    /// distance is a power of two would all want the same few lines of the cache.
    fn step(self) -> u64 {
        if self.columns_a { self.tile.rows.next_multiple_of(self.lanes()) } else { self.tile.depth + LANES }
    }

    /// Rows that are copied at once if A's lines run along them.
    fn lanes(self) -> u64 {
        self.tile.rows.next_power_of_two().min(LANES)
    }

    /// Elements of a tile of rows in the scratch.
    fn room(self) -> u64 {
        self.step() * if self.columns_a { self.tile.depth } else { self.tile.rows }
    }
}

/// Some rows against some column panels a unit.
fn gemm(machine: Machine, form: Form, epilogue: &Epilogue) -> Code {
    let tile = form.tile;
    let element = form.factors.element();
    let elements = [&[Element::F32, element, Element::F32], &epilogue.elements[..]].concat();
    define(machine, &elements, SIZES + epilogue.sizes.len(), |k, buffers, sizes| {
        let [a, b, c] = first(buffers);
        let [m, n, depth, blocks, groups, shared, panels] = first(sizes);
        let [line_a, area_a, first_a, line_b, area_b, first_b, panel_b] = first(&sizes[7..]);
        let [width, area_c, first_c, kept] = first(&sizes[14..]);
        let rows_of_a = k.scratch(form.room() * (tile.block() / tile.rows), form.factors.copied());
        let piece = if form.packed { b } else { k.scratch(tile.depth * tile.columns(), element) };
        let steps = form.factors.steps_in(k, depth);
        let tile_rows = k.index(tile.rows);
        let tiles = k.div_up(m, tile_rows);
        k.units(|k, unit| {
            // Neighbours share their part of B: it is read from memory once.
            let row = k.rem(unit, blocks);
            let rest = k.div(unit, blocks);
            let (batch, group) = (k.div(rest, groups), k.rem(rest, groups));
            let (zero, one) = (k.index(0), k.index(1));
            // Units of as many tiles each, or one more: a last one of few would leave a thread idle.
            let after = k.add(row, one);
            let [row, end] = [row, after].map(|row| {
                let before = k.mul(row, tiles);
                let before = k.div(before, blocks);
                k.mul(before, tile_rows)
            });
            let end = k.min(end, m);
            let rows = k.sub(end, row);
            let panel = k.mul(group, shared);
            let end_panel = k.add(panel, shared);
            let end_panel = k.min(end_panel, panels);
            // Where this batch's operands begin.
            let base_a = k.mul(batch, area_a);
            let base_a = k.add(base_a, first_a);
            let base_b = k.mul(batch, area_b);
            let base_b = k.add(base_b, first_b);
            let base_c = k.mul(batch, area_c);
            let base_c = k.add(base_c, first_c);
            let above = k.mul(row, width);
            let base_c = k.add(base_c, above);
            k.each(zero, steps, tile.depth, |k, block| {
                let length = k.sub(steps, block);
                let most = k.index(tile.depth);
                let length = k.min(length, most);
                let source = Source { buffer: a, base: base_a, line: line_a, row, rows, block, length, depth };
                if form.columns_a {
                    copy_columns(k, form, &source, rows_of_a);
                } else {
                    copy_rows(k, form, &source, rows_of_a);
                }
                let again = k.add(block, kept);
                let again = k.compare(again, Order::Gt, zero);
                let done = k.add(block, length);
                let last = k.compare(done, Order::Eq, steps);
                // Neighbours have the same panels: after the last block comes the first one.
                let following = k.select(last, zero, done);
                let first_panel = panel;
                k.each(panel, end_panel, 1, |k, panel| {
                    let columns = k.index(tile.columns());
                    let start = k.mul(panel, columns);
                    let left = k.sub(n, start);
                    let piece_at = |k: &mut Kernel, panel, block| {
                        let from = k.mul(panel, panel_b);
                        let from = k.add(base_b, from);
                        let skipped = k.mul(block, line_b);
                        k.add(from, skipped)
                    };
                    let from = piece_at(k, panel, block);
                    let (from, next) = if form.packed {
                        let beside = k.add(panel, one);
                        let here = k.compare(beside, Order::Lt, end_panel);
                        let beside = k.select(here, beside, first_panel);
                        let block = k.select(here, block, following);
                        (from, Some(piece_at(k, beside, block)))
                    } else {
                        copy_piece(k, tile, (b, from, line_b), left, length, piece);
                        (zero, None)
                    };
                    let base_c = k.add(base_c, start);
                    k.each(zero, rows, tile.rows, |k, above| {
                        let at = k.mul(above, width);
                        let at = k.add(base_c, at);
                        let here = k.sub(rows, above);
                        let part = |k: &mut Kernel| {
                            let (first, most) = (k.add(row, above), k.index(tile.rows));
                            let (rows, end) = (k.min(here, most), k.add(start, columns));
                            ((first, rows), (start, k.min(end, n)))
                        };
                        let target = Corner { buffer: c, at, width };
                        for place in target.places(k, tile) {
                            k.prefetch(c, place, Access::Write);
                        }
                        epilogue.prefetch(k, When::Tile { last }, (buffers, &sizes[SIZES..]), (batch, n), part);
                        let sums = tile_sums(k, form, (rows_of_a, above), (piece, from, next), length);
                        let all_rows = k.index(tile.rows - 1);
                        let all_rows = k.compare(here, Order::Gt, all_rows);
                        let all_columns = k.sub(columns, one);
                        let all_columns = k.compare(left, Order::Gt, all_columns);
                        let all = k.and(all_rows, all_columns);
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
                        epilogue.write(k, When::Tile { last }, (buffers, &sizes[SIZES..]), (batch, n), part);
                    });
                });
            });
            epilogue.write(k, When::Unit, (buffers, &sizes[SIZES..]), (batch, n), |k| {
                let columns = k.index(tile.columns());
                let (start, end) = (k.mul(panel, columns), k.mul(end_panel, columns));
                ((row, rows), (start, k.min(end, n)))
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
    /// Steps along k: the first of them, and how many.
    block: Val,
    length: Val,
    /// All of k.
    depth: Val,
}

/// Row by row. Those that fill the last tile are the last row again: what comes of them is not written.
fn copy_rows(k: &mut Kernel, form: Form, source: &Source, to: Buf) {
    let &Source { buffer, base, line, row, rows, block, length, depth } = source;
    let (zero, one) = (k.index(0), k.index(1));
    let last = k.sub(rows, one);
    let start = form.factors.depth_at(k, block);
    let left = k.sub(depth, start);
    let base = k.add(base, start);
    let tile = k.index(form.tile.rows);
    let tiles = k.div_up(rows, tile);
    let filled = k.mul(tiles, tile);
    let two = k.index(2);
    k.each(zero, filled, 1, |k, r| {
        let from = k.min(r, last);
        let from = k.add(row, from);
        let from = k.mul(from, line);
        let from = k.add(base, from);
        // A line is too short for the processor to see where the next one begins.
        let later = k.mul(two, line);
        let later = k.add(from, later);
        let step = k.index(form.step());
        let target = k.mul(r, step);
        k.lanes(length, |k, j, mask| {
            let ahead = form.factors.depth_at(k, j);
            let at = k.add(later, ahead);
            k.prefetch(buffer, at, Access::Read);
            let at = k.add(from, ahead);
            let x = match form.factors {
                Factors::F32 => k.load_lanes(buffer, at, mask),
                Factors::Widened => {
                    let x = k.load_lanes(buffer, at, mask);
                    k.rounded(x)
                }
                Factors::Pairs => {
                    let here = k.sub(left, ahead);
                    let mask = k.mask_of(here, 2 * LANES);
                    let x = k.load_lanes(buffer, at, mask);
                    k.pairs(true, x)
                }
            };
            let at = k.add(target, j);
            k.store_vector(x, to, at);
        });
    });
}

/// Line by line, each in parts as wide as a tile has rows.
fn copy_columns(k: &mut Kernel, form: Form, source: &Source, to: Buf) {
    let &Source { buffer, base, line, row, rows, block, length, .. } = source;
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
            for lane in (0..form.tile.rows).step_by(form.lanes() as usize) {
                let offset = k.index(lane);
                let here = k.sub(left, offset);
                let mask = k.mask_of(here, form.lanes());
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
            k.mask(here)
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

/// The micro-kernel: the tile's sums over a block of k, row by row. Where B's piece begins, and the one to fetch.
fn tile_sums(
    k: &mut Kernel,
    form: Form,
    (a, row): (Buf, Val),
    (b, from, next): (Buf, Val, Option<Val>),
    length: Val,
) -> Vec<Val> {
    let Tile { rows, vectors, steps, .. } = form.tile;
    let place = tile_place(k, form, row);
    let share = k.index(form.share());
    let next = next.map(|next| {
        let tile = k.index(rows);
        let before = k.div(row, tile);
        let before = k.mul(before, length);
        let before = k.mul(before, share);
        k.add(next, before)
    });
    let line = k.index(form.line());
    // Some steps on from `step`.
    let after = |k: &mut Kernel, step: Val, ahead: u64, sums: &[Val]| {
        let at = k.mul(step, line);
        let at = k.add(from, at);
        let line: Vec<Val> = (0..vectors)
            .map(|v| {
                let words = form.factors.words(LANES);
                let offset = k.index(ahead * form.line() + v * words);
                let at = k.add(at, offset);
                let x = k.load_some(b, at, words);
                if form.factors == Factors::Widened { k.widened(x) } else { x }
            })
            .collect();
        let distance = k.index(form.step());
        let (step, between, ahead) = match form.columns_a {
            true => (k.mul(step, distance), 1, ahead * form.step()),
            false => (step, form.step(), ahead),
        };
        let at = k.add(place, step);
        let x = |k: &mut Kernel, r: usize| {
            let offset = k.index(r as u64 * between + ahead);
            let at = k.add(at, offset);
            k.load(a, at)
        };
        match form.factors {
            Factors::Pairs => k.outer(rows, x, &line, sums, Kernel::dot_pairs),
            Factors::F32 | Factors::Widened => k.outer(rows, x, &line, sums, Kernel::fma),
        }
    };
    let nothing = k.floats(0.0);
    let (zero, many) = (k.index(0), k.index(steps));
    let whole = k.div(length, many);
    let whole = k.mul(whole, many);
    let sums = k.fold(zero, whole, steps, &vec![nothing; (rows * vectors) as usize], |k, step, sums| {
        if let Some(next) = next {
            let at = k.mul(step, share);
            let at = k.add(next, at);
            for line in (0..form.share() * steps).step_by(LANES as usize) {
                let offset = k.index(line);
                let at = k.add(at, offset);
                k.prefetch(b, at, Access::Read);
            }
        }
        (0..steps).fold(sums.to_vec(), |sums, ahead| after(k, step, ahead, &sums))
    });
    k.fold(whole, length, 1, &sums, |k, step, sums| after(k, step, 0, sums))
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
                    let earlier = k.load_vector(self.buffer, at);
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
            let (mask, earlier) = (k.mask(here), k.mask(earlier));
            let before = k.load_lanes(self.buffer, at, earlier);
            let sum = k.add(before, sum);
            k.store_lanes(sum, self.buffer, at, mask);
        }
    }
}
