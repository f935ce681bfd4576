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

use peft_runtime::artifact::Element;

use super::pack::Factors;
use crate::abi::arguments;
use crate::builder::{Access, Buf, Code, Kernel, LANES, Order, Val, define};
use crate::kernels::epilogue::{Epilogue, When};
use crate::target::Machine;

/// Rows of the result, and vectors along each, that the micro-kernel holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    pub rows: u64,
    pub vectors: u64,
    /// Steps along k between two visits of the result: of a column panel 48 KiB, or 16 where the first-level cache is
    /// to hold them with as many of the tile's rows.
    pub depth: u64,
    /// Rows of a unit, at most: what is read of B serves all of them. What it copies of A and what it computes are to stay
    /// in half of a second-level cache, which may be shared: of 512 KiB, and of 1 MiB and more where there is AVX-512.
    /// And where others take a thread's time, small units leave less to wait for at the end.
    pub most: u64,
    /// Steps along k of one turn of the loop, about a hundred multiplications of vectors: they share what a turn costs
    /// besides. Where two threads share a core, its decoders have room for little more.
    pub steps: u64,
}

impl Tile {
    pub fn columns(self) -> u64 {
        self.vectors * LANES
    }
    /// Rows of a unit, at most: whole tiles.
    pub fn block(self) -> u64 {
        self.most / self.rows * self.rows
    }
}

/// What one of the matmul's kernels is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Form {
    pub tile: Tile,
    pub factors: Factors,
    /// A's lines run along its rows' axis, one for each k: x of xᵀ y.
    pub columns_a: bool,
    /// B is packed; otherwise its lines run along n.
    pub packed: bool,
}

impl Form {
    /// Elements of a panel of B at each step along k.
    pub fn line(self) -> u64 {
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

arguments! { Buffers { a, b, c } }
arguments! {
    Sizes {
        m, n, depth,
        /// Units that share a column of blocks, and that share a row of them.
        blocks, groups,
        /// Column panels of a unit, and all of them.
        shared, panels,
        line_a, area_a, first_a,
        line_b, area_b, first_b,
        /// From one panel of B to the next.
        panel_b,
        /// From row to row of the result.
        width,
        area_c, first_c,
        /// 1 if what stands there stays in the sum.
        kept,
    }
}

/// Some rows against some column panels a unit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Gemm {
    pub form: Form,
    pub epilogue: Epilogue,
}

impl Gemm {
    pub fn word(&self) -> String {
        let Form { tile: Tile { rows, vectors, .. }, factors, columns_a, packed } = self.form;
        let a = if columns_a { "columns" } else { "rows" };
        let b = if packed { "panels" } else { "rows" };
        format!("gemm{rows}x{}_{a}_{b}{}", vectors * LANES, factors.suffix())
    }

    pub fn emit(&self, machine: Machine) -> Code {
        let Gemm { form, epilogue } = self;
        let form = *form;
        let tile = form.tile;
        let element = form.factors.element();
        let own = Buffers { a: Element::F32, b: element, c: Element::F32 }.list();
        let elements = [&own[..], &epilogue.elements(own.len())].concat();
        define(machine, &elements, Sizes::<Val>::COUNT + epilogue.sizes(), |k, buffers, sizes| {
            let Buffers { a, b, c } = Buffers::of(buffers);
            let (sizes, follows) = Sizes::split(sizes);
            let Sizes { m, n, depth, blocks, groups, shared, panels, line_a, area_a, first_a, .. } = sizes;
            let Sizes { line_b, area_b, first_b, panel_b, width, area_c, first_c, kept, .. } = sizes;
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
                            epilogue.prefetch(k, When::Tile { last }, (buffers, follows), (batch, n), part);
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
                            epilogue.write(k, When::Tile { last }, (buffers, follows), (batch, n), part);
                        });
                    });
                });
                epilogue.write(k, When::Unit, (buffers, follows), (batch, n), |k| {
                    let columns = k.index(tile.columns());
                    let (start, end) = (k.mul(panel, columns), k.mul(end_panel, columns));
                    ((row, rows), (start, k.min(end, n)))
                });
            });
        })
    }
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
