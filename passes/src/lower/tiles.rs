//! Matmul on a GPU: a block's threads compute a tile of the result, step by step along k.
//!
//! ```text
//! for each 16 steps of k
//!   A[64 rows, 16] and B[16, 64 columns] ─► shared memory, [16][64] both
//!   a thread: sums of 8 rows × 4 columns, in registers
//! sums ─► shared memory, row by row ─► what follows the product
//! ```
//!
//! A result of no more than 32 columns or rows has tiles of half that width. Where a weight's gradient has few tiles,
//! blocks share a tile's steps and their sums are added up afterwards. Other products of few columns and many steps are
//! [`super::narrow`]'s.
//!
//! Operands are read where they lie, by their steps along rows, columns and k: nothing is packed. Neighbouring threads
//! fetch what lies side by side.

use std::ops::Range;

use peft_grammar::graph::{Type, Value};
use peft_grammar::model::Precision;
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::epilogue::{Epilogue, HeldRow, Taken};
use super::gemm::Axes;
use super::map::Given;
use super::view::{ONE, View};
use super::{Lowering, Place, product};
use crate::builder::mma::Half;
use crate::builder::{Buf, Code, F32, Kernel, Order, Val, define, first};
use crate::target::Machine;
use crate::target::cuda::{Chip, WARP, WARPS};

/// Rows and columns of a tile, and where the product has few.
pub(super) const TILE: u64 = 64;
const NARROW: u64 = 32;
/// Steps along k between two visits of the operands.
const DEPTH: u64 = 16;
/// Those of one turn of the loop, in which what the next ones want is fetched while others are multiplied.
const TURN: u64 = 4;
/// Columns of a tile that one thread holds.
const COLUMNS: u64 = 4;
/// From one step of k to the next in shared memory it is so much further than a tile, or threads that store along k
/// would all want the same bank.
const APART: u64 = 4;
const THREADS: u64 = WARP * WARPS;
/// Rows of a thread that are in shared memory at once, on their way out.
const PART: u64 = 4;
/// Rows that are written together, for all that follows the product there.
const TOGETHER: u64 = 4;

/// A tile's rows and columns.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub rows: u64,
    pub columns: u64,
}

impl Tile {
    /// Of a product of so many rows and columns.
    fn of(m: &Extent, n: &Extent) -> Tile {
        let narrow = |size: &Extent| matches!(size, Extent::Const(size) if *size <= NARROW);
        let (rows, columns) = match (narrow(m), narrow(n)) {
            (_, true) => (TILE, NARROW),
            (true, false) => (NARROW, TILE),
            (false, false) => (TILE, TILE),
        };
        Tile { rows, columns }
    }

    fn name(self) -> String {
        format!("tiles_{}x{}", self.rows, self.columns)
    }

    /// That of a kernel so called.
    pub fn named(kernel: &str) -> Option<Tile> {
        let (rows, columns) = kernel.strip_prefix("tiles_")?.split('_').next()?.split_once('x')?;
        Some(Tile { rows: rows.parse().ok()?, columns: columns.parse().ok()? })
    }

    pub fn elements(self) -> u64 {
        self.rows * self.columns
    }

    /// Rows that one thread holds: fours of them.
    fn held(self) -> u64 {
        self.elements() / (THREADS * COLUMNS)
    }

    /// What a step of k takes of shared memory, in floats: threads read for their sums, and a column and a row are put
    /// there.
    pub fn moved(self) -> u64 {
        THREADS * (self.held() + COLUMNS) + self.rows + self.columns
    }

    /// Rows of threads that a warp is.
    fn lines(self) -> u64 {
        WARP * COLUMNS / self.columns
    }

    /// What a warp has of shared memory for the rows on their way out.
    fn own(self) -> u64 {
        self.lines() * PART * (self.columns + APART)
    }
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

    fn sizes(self) -> [Extent; 4] {
        [self.along, self.deep, self.area, self.first]
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
        let epilogue = match taken.is_empty() {
            true => Epilogue::default(),
            false => self.epilogue(&taken, &[a, from, c], true)?,
        };
        let fate = if taken.stays { Fate::Written } else { Fate::Passed };
        let to = To { buffer: c, line, area, first, fate, epilogue };
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
            epilogue: Epilogue::default(),
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
        let tile = Tile::of(&m, &n);
        let tiles = |n: &Extent, side| Extent::CeilDiv(Box::new(n.clone()), side);
        let (down, across) = (tiles(&m, tile.rows), tiles(&n, tile.columns));
        let units = Extent::Const(shares) * batch.clone() * down.clone() * across.clone() * Extent::Const(WARPS);
        let steps = Extent::CeilDiv(Box::new(depth.clone()), DEPTH * shares) * Extent::Const(DEPTH);
        let [rows_a, rows_b] = [left.contiguous, right.contiguous];
        let elements = batch.clone() * whole.clone();
        let c = if shares > 1 { self.scratch(vec![Extent::Const(shares), elements.clone()]) } else { to.buffer };
        let area = if shares > 1 { whole } else { to.area };
        let mut sizes = vec![m, n, depth, down, across, batch, steps];
        sizes.extend(left.sizes());
        sizes.extend(right.sizes());
        sizes.extend([to.line, area, to.first]);
        let side = |contiguous| if contiguous { "columns" } else { "rows" };
        let (fate, epilogue) = (to.fate, to.epilogue);
        self.label = epilogue.label(&self.label);
        let (x, y) = (side(rows_a), side(!rows_b));
        let name = format!("{}_{x}_{y}{}{}", tile.name(), fate.suffix(), epilogue.suffix());
        let code = |machine| tiles_kernel(machine, tile, [rows_a, rows_b], fate, &epilogue);
        let kernel = self.target.kernel(&name, code);
        sizes.extend(epilogue.sizes);
        self.launch(kernel, [vec![a, b, c], epilogue.buffers].concat(), sizes, units);
        if shares > 1 {
            self.add_up(c, Extent::Const(shares), elements, to.buffer);
        }
    }
}

/// How many blocks share a tile of a weight's gradient, so that there are some for most of a chip's multiprocessors.
fn shares(shape: &Shape) -> u64 {
    match *shape {
        Shape { m: Extent::Const(m), n: Extent::Const(n), depth: Extent::Tokens, batch: Extent::Const(batch) } => {
            let tile = Tile::of(&shape.m, &shape.n);
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
    pub epilogue: Epilogue,
}

/// What happens to the product itself.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Fate {
    Written,
    /// Added to what stands there.
    Added,
    /// Only what follows reads it.
    Passed,
}

impl Fate {
    pub fn suffix(self) -> &'static str {
        match self {
            Fate::Written => "",
            Fate::Added => "_more",
            Fate::Passed => "_passed",
        }
    }
}

/// Rows of a tile's sums on their way out, which lie in shared memory, a warp's own.
pub(super) struct Out<'a> {
    pub fate: Fate,
    pub epilogue: &'a Epilogue,
    /// The kernel's, and the epilogue's sizes.
    pub buffers: &'a [Buf],
    pub sizes: &'a [Val],
    /// Where the product goes, its batch's first element there, and from row to row.
    pub to: Buf,
    pub base: Val,
    pub line: Val,
    pub batch: Val,
    /// The tile's columns, as many as `n` leaves of them, and how many it has at most; those in the room
    /// are as many as a warp's lanes take.
    pub column: Val,
    pub n: Val,
    pub width: u64,
    pub room: Buf,
    /// What sums there are multiplied by to be the product's.
    pub back: Option<Val>,
}

impl Out<'_> {
    /// Rows of the product, each with the place in shared memory where its sums begin.
    pub fn write(&self, k: &mut Kernel, rows: &[(Val, Val)]) {
        let end = k.index(self.width);
        let end = k.add(self.column, end);
        let columns = (self.column, k.min(end, self.n));
        let lines: Vec<Val> = rows
            .iter()
            .map(|&(row, _)| {
                let begin = k.mul(row, self.line);
                k.add(self.base, begin)
            })
            .collect();
        let lanes = rows.iter().zip(&lines).map(|(&(_, at), &line)| {
            move |k: &mut Kernel, column: Val, mask: Val| {
                let inside = k.sub(column, self.column);
                let source = k.add(at, inside);
                let source = k.add(source, k.lane_index());
                let sum = k.load_here(self.room, source);
                let sum = self.back.map_or(sum, |back| k.mul(sum, back));
                if self.fate != Fate::Added {
                    return sum;
                }
                let place = k.add(line, column);
                let before = k.load_lanes(self.to, place, mask);
                k.add(before, sum)
            }
        });
        let lanes: Vec<_> = lanes.collect();
        let held = rows.iter().zip(&lines).zip(&lanes).map(|((&(row, _), &line), lanes)| {
            let to = (self.fate != Fate::Passed).then_some((self.to, line));
            let lanes = Given { lanes, to, columns: Some(self.width.next_multiple_of(WARP)) };
            HeldRow { batch: self.batch, row, columns, lanes }
        });
        self.epilogue.write_rows(k, (self.buffers, self.sizes), self.n, held.collect());
    }

    /// Rows 0 to `count` of some in shared memory, several at a time: `place` says for each which one of the product it
    /// is and where its sums begin, the later row of the product for the later one.
    pub fn write_all(&self, k: &mut Kernel, count: Val, place: impl Fn(&mut Kernel, Val) -> (Val, Val)) {
        let zero = k.index(0);
        let some = k.index(TOGETHER);
        let groups = k.div(count, some);
        let whole = k.mul(groups, some);
        k.each(zero, whole, TOGETHER, |k, first| {
            let rows: Vec<(Val, Val)> = (0..TOGETHER)
                .map(|n| {
                    let n = k.index(n);
                    let at = k.add(first, n);
                    place(k, at)
                })
                .collect();
            self.write(k, &rows);
        });
        k.each(whole, count, 1, |k, at| {
            let row = place(k, at);
            self.write(k, &[row]);
        });
    }
}

/// How many rows there are from `row` on, of `most` at most.
pub(super) fn rows_left(k: &mut Kernel, (row, m): (Val, Val), most: Val) -> Val {
    let (left, zero) = (k.sub(m, row), k.index(0));
    let left = k.max(left, zero);
    k.min(left, most)
}

/// Sizes of the kernel, without its epilogue's.
const SIZES: usize = 18;

/// One tile a unit.
fn tiles_kernel(machine: Machine, tile: Tile, contiguous: [bool; 2], fate: Fate, epilogue: &Epilogue) -> Code {
    let (held, (line_a, line_b)) = (tile.held(), (tile.rows + APART, tile.columns + APART));
    let elements = [&[Element::F32; 3], &epilogue.elements[..]].concat();
    define(machine, &elements, SIZES + epilogue.sizes.len(), |k, buffers, sizes| {
        let [a, b, c] = first(buffers);
        let [m, n, depth, down, across, batches, steps] = first(sizes);
        let (left, right, to) = (&sizes[7..11], &sizes[11..15], &sizes[15..SIZES]);
        let part_a = k.shared((DEPTH * (line_a + line_b)).max(WARPS * tile.own()));
        let part_b = k.beyond(part_a, DEPTH * line_a);
        let thread = k.thread();
        let wide = k.index(tile.columns / COLUMNS);
        let (columns, rows) = (k.index(COLUMNS), k.index(held));
        let (column, row) = (k.rem(thread, wide), k.div(thread, wide));
        let (column, row) = (k.mul(column, columns), k.mul(row, rows));
        k.block_units(|k, unit| {
            let (rest, tile_column) = (k.div(unit, across), k.rem(unit, across));
            let (lead, tile_row) = (k.div(rest, down), k.rem(rest, down));
            let (share, batch) = (k.div(lead, batches), k.rem(lead, batches));
            let begin = k.mul(share, steps);
            let depth = {
                let end = k.add(begin, steps);
                k.min(end, depth)
            };
            let (down, across) = (k.index(tile.rows), k.index(tile.columns));
            let (first_row, first_column) = (k.mul(tile_row, down), k.mul(tile_column, across));
            let left = Source::of(k, a, left, batch, (first_row, m), tile.rows, contiguous[0]);
            let right = Source::of(k, b, right, batch, (first_column, n), tile.columns, contiguous[1]);
            let nothing = k.float(0.0, F32);
            let zero = k.index(0);
            let [line, area, first] = first(to);
            let area = k.mul(lead, area);
            let base = k.add(first, area);
            let out = Out {
                fate,
                epilogue,
                buffers,
                sizes: &sizes[SIZES..],
                to: c,
                base,
                line,
                batch,
                column: first_column,
                n,
                width: tile.columns,
                room: part_a,
                back: None,
            };
            let fetch = |k: &mut Kernel, block: Val| {
                let end = k.sub(depth, block);
                [&left, &right].map(|side| side.fetch(k, block, end))
            };
            let fetched = fetch(k, begin);
            let (count, first_b) = ((held * COLUMNS) as usize, fetched[0].len());
            let carried = [vec![nothing; count], fetched.concat()].concat();
            let carried = k.fold(begin, depth, DEPTH, &carried, |k, block, carried| {
                let (sums, fetched) = carried.split_at(count);
                let (x, y) = fetched.split_at(first_b);
                // The steps before are done with what they share.
                k.barrier();
                left.share(k, part_a, x);
                right.share(k, part_b, y);
                k.barrier();
                let steps = k.index(DEPTH);
                // On their way while these are multiplied.
                let next = k.add(block, steps);
                let fetched = fetch(k, next);
                let sums = k.fold(zero, steps, TURN, sums, |k, step, sums| {
                    (0..TURN).fold(sums.to_vec(), |sums, ahead| {
                        let ahead = k.index(ahead);
                        let step = k.add(step, ahead);
                        let (line_a, line_b) = (k.index(line_a), k.index(line_b));
                        let (at_a, at_b) = (k.mul(step, line_a), k.mul(step, line_b));
                        let (at_a, at_b) = (k.add(at_a, row), k.add(at_b, column));
                        let fours = (0..held).step_by(4).flat_map(|ahead| {
                            let ahead = k.index(ahead);
                            let at = k.add(at_a, ahead);
                            k.load_four(part_a, at)
                        });
                        let x: Vec<Val> = fours.collect();
                        let y = k.load_four(part_b, at_b);
                        let pairs = x.iter().flat_map(|&x| y.map(|y| (x, y)));
                        pairs.zip(sums).map(|((x, y), sum)| k.fma(x, y, sum)).collect()
                    })
                });
                [sums, fetched.concat()].concat()
            });
            let sums = &carried[..count];
            k.barrier();
            let (lanes, size) = (k.index(WARP), k.index(tile.own()));
            let warp = k.div(thread, lanes);
            let own = k.mul(warp, size);
            // The warp's rows of threads, one below the other.
            let below = k.div(k.lane_index(), wide);
            let (line, some) = (k.index(line_b), k.index(PART));
            let place = k.mul(below, some);
            let place = k.mul(place, line);
            let place = k.add(own, place);
            let place = k.add(place, column);
            let warp_rows = k.index(tile.lines() * held);
            let first_row = {
                let before = k.mul(warp, warp_rows);
                k.add(first_row, before)
            };
            for part in (0..held).step_by(PART as usize) {
                for (i, &sum) in sums[(part * COLUMNS) as usize..][..(PART * COLUMNS) as usize].iter().enumerate() {
                    let (r, c) = (i as u64 / COLUMNS, i as u64 % COLUMNS);
                    let at = k.index(r * line_b + c);
                    let at = k.add(place, at);
                    k.store_here(sum, part_a, at);
                }
                k.settle();
                // The first of each row of threads, from which on there are as many as one holds.
                let first_of = |k: &mut Kernel, below: Val| {
                    let row = k.mul(below, rows);
                    let before = k.index(part);
                    let row = k.add(row, before);
                    k.add(first_row, row)
                };
                let zero = k.index(0);
                let count = (0..tile.lines()).fold(zero, |count, below| {
                    let below = k.index(below);
                    let first = first_of(k, below);
                    let left = rows_left(k, (first, m), some);
                    k.add(count, left)
                });
                out.write_all(k, count, |k, r| {
                    let (below, rest) = (k.div(r, some), k.rem(r, some));
                    let first = first_of(k, below);
                    let at = k.mul(r, line);
                    (k.add(first, rest), k.add(own, at))
                });
                k.settle();
            }
        });
    })
}

/// A tile's rows of A or columns of B, and which of them a thread fetches.
struct Source {
    buffer: Buf,
    /// Where the tile's first one begins, and the steps to the next and along k.
    base: Val,
    along: Val,
    deep: Val,
    /// How many of the tile's there are, and how many there may be.
    count: Val,
    side: u64,
    /// The thread's first element: of the tile, and along k.
    i: Val,
    step: Val,
    /// From one of its elements to the next.
    next: (u64, u64),
}

impl Source {
    fn of(
        k: &mut Kernel,
        buffer: Buf,
        sizes: &[Val],
        batch: Val,
        (start, end): (Val, Val),
        side: u64,
        contiguous: bool,
    ) -> Source {
        let [along, deep, area, first] = crate::builder::first(sizes);
        let area = k.mul(batch, area);
        let base = k.mul(start, along);
        let base = k.add(base, area);
        let base = k.add(base, first);
        let width = if contiguous { side } else { DEPTH };
        let (thread, across) = (k.thread(), k.index(width));
        let (fast, slow) = (k.rem(thread, across), k.div(thread, across));
        let ((i, step), next) = match contiguous {
            true => ((fast, slow), (0, THREADS / width)),
            false => ((slow, fast), (THREADS / width, 0)),
        };
        Source { buffer, base, along, deep, count: k.sub(end, start), side, i, step, next }
    }

    /// Place n of the thread's, in the tile and along k.
    fn place(&self, k: &mut Kernel, n: u64) -> (Val, Val) {
        let (i, step) = (k.index(n * self.next.0), k.index(n * self.next.1));
        (k.add(self.i, i), k.add(self.step, step))
    }

    /// The thread's elements of the steps from `block` on, of which there are `end`; 0 for those that do not exist.
    fn fetch(&self, k: &mut Kernel, block: Val, end: Val) -> Vec<Val> {
        let nothing = k.float(0.0, F32);
        let start = k.mul(block, self.deep);
        let start = k.add(self.base, start);
        let element = |n| {
            let (i, step) = self.place(k, n);
            let (there, here) = (k.compare(i, Order::Lt, self.count), k.compare(step, Order::Lt, end));
            let exists = k.and(there, here);
            let (along, deep) = (k.mul(i, self.along), k.mul(step, self.deep));
            let at = k.add(along, deep);
            let at = k.add(start, at);
            k.load_if(exists, self.buffer, at, nothing)
        };
        (0..self.side * DEPTH / THREADS).map(element).collect()
    }

    fn share(&self, k: &mut Kernel, to: Buf, elements: &[Val]) {
        for (n, &x) in elements.iter().enumerate() {
            let (i, step) = self.place(k, n as u64);
            let line = k.index(self.side + APART);
            let at = k.mul(step, line);
            let at = k.add(at, i);
            k.store_here(x, to, at);
        }
    }
}
