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

use super::Buffers;
use super::pack::Factors;
use crate::abi::arguments;
use crate::builder::{Access, Buf, Code, Index, Kernel, LANES, Order, Val};
use crate::kernels::Scheduled;
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

impl Scheduled for Gemm {
    fn word(&self) -> String {
        let Form { tile: Tile { rows, vectors, .. }, factors, columns_a, packed } = self.form;
        let a = if columns_a { "columns" } else { "rows" };
        let b = if packed { "panels" } else { "rows" };
        format!("gemm{rows}x{}_{a}_{b}{}", vectors * LANES, factors.suffix())
    }

    fn emit(&self, machine: Machine) -> Code {
        let Gemm { form, epilogue } = self;
        let form = *form;
        let tile = form.tile;
        let element = form.factors.element();
        let own = Buffers { a: Element::F32, b: element, c: Element::F32 }.list();
        epilogue.define(machine, &own, Sizes::<Val>::COUNT, |k, buffers, sizes, follows| {
            let Buffers { a, b, c } = Buffers::of(buffers);
            let sizes = Sizes::of(sizes);
            let Sizes { m, n, depth, blocks, groups, shared, panels, line_a, area_a, first_a, .. } = sizes;
            let Sizes { line_b, area_b, first_b, panel_b, width, area_c, first_c, kept, .. } = sizes;
            let rows_of_a = k.scratch(form.room() * (tile.block() / tile.rows), form.factors.copied());
            let piece = if form.packed { b } else { k.scratch(tile.depth * tile.columns(), element) };
            let steps = k.div_up(depth, form.factors.deep());
            let tiles = k.div_up(m, tile.rows);
            k.units(|k, unit| {
                // Neighbours share their part of B: it is read from memory once.
                let row = k.rem(unit, blocks);
                let rest = k.div(unit, blocks);
                let (batch, group) = (k.div(rest, groups), k.rem(rest, groups));
                // Units of as many tiles each, or one more: a last one of few would leave a thread idle.
                let [row, end] = [row.into(), row + 1].map(|row: Index| k.eval(row * tiles / blocks * tile.rows));
                let end = k.min(end, m);
                let rows = k.sub(end, row);
                let panel = k.mul(group, shared);
                let end_panel = k.min(panel + shared, panels);
                // Where this batch's operands begin.
                let base_a = k.eval(batch * area_a + first_a);
                let base_b = k.eval(batch * area_b + first_b);
                let base_c = k.eval(batch * area_c + first_c + row * width);
                k.each(0, steps, tile.depth, |k, block| {
                    let length = k.min(steps - block, tile.depth);
                    let source = Source { buffer: a, base: base_a, line: line_a, row, rows, block, length, depth };
                    if form.columns_a {
                        copy_columns(k, form, &source, rows_of_a);
                    } else {
                        copy_rows(k, form, &source, rows_of_a);
                    }
                    let again = k.compare(block + kept, Order::Gt, 0);
                    let done = k.eval(block + length);
                    let last = k.compare(done, Order::Eq, steps);
                    // Neighbours have the same panels: after the last block comes the first one.
                    let following = k.select(last, 0, done);
                    let first_panel = panel;
                    k.each(panel, end_panel, 1, |k, panel| {
                        let start = k.eval(panel * tile.columns());
                        let left = k.eval(n - start);
                        let piece_at = |panel: Val, block: Val| base_b + panel * panel_b + block * line_b;
                        let from = k.eval(piece_at(panel, block));
                        let (from, next) = if form.packed {
                            let beside = k.eval(panel + 1);
                            let here = k.compare(beside, Order::Lt, end_panel);
                            let beside = k.select(here, beside, first_panel);
                            let block = k.select(here, block, following);
                            (from, Some(k.eval(piece_at(beside, block))))
                        } else {
                            copy_piece(k, tile, (b, from, line_b), left, length, piece);
                            (k.index(0), None)
                        };
                        let base_c = k.eval(base_c + start);
                        k.each(0, rows, tile.rows, |k, above| {
                            let at = k.eval(base_c + above * width);
                            let here = k.eval(rows - above);
                            let part = |k: &mut Kernel| {
                                let rows = (k.eval(row + above), k.min(here, tile.rows));
                                (rows, (start, k.min(start + tile.columns(), n)))
                            };
                            let target = Corner { buffer: c, at, width };
                            for place in target.places(k, tile) {
                                k.prefetch(c, place, Access::Write);
                            }
                            epilogue.prefetch(k, When::Tile { last }, (buffers, follows), (batch, n), part);
                            let sums = tile_sums(k, form, (rows_of_a, above), (piece, from, next), length);
                            let all_rows = k.compare(here, Order::Gt, tile.rows - 1);
                            let all_columns = k.compare(left, Order::Gt, tile.columns() - 1);
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
                    let start = k.eval(panel * tile.columns());
                    ((row, rows), (start, k.min(end_panel * tile.columns(), n)))
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
    let deep = form.factors.deep();
    let last = k.eval(rows - 1);
    let start = k.eval(block * deep);
    let left = k.eval(depth - start);
    let base = k.eval(base + start);
    let tiles = k.div_up(rows, form.tile.rows);
    k.each(0, tiles * form.tile.rows, 1, |k, r| {
        let from = k.min(r, last);
        let from = k.eval(base + (row + from) * line);
        // A line is too short for the processor to see where the next one begins.
        let later = k.eval(from + 2 * line);
        let target = k.eval(r * form.step());
        k.lanes(length, |k, j, mask| {
            let ahead = k.eval(j * deep);
            k.prefetch(buffer, later + ahead, Access::Read);
            let at = k.eval(from + ahead);
            let x = match form.factors {
                Factors::F32 => k.load_lanes(buffer, at, mask),
                Factors::Widened => {
                    let x = k.load_lanes(buffer, at, mask);
                    k.rounded(x)
                }
                Factors::Pairs => {
                    let mask = k.mask_of(left - ahead, 2 * LANES);
                    let x = k.load_lanes(buffer, at, mask);
                    k.pairs(true, x)
                }
            };
            k.store_vector(x, to, target + j);
        });
    });
}

/// Line by line, each in parts as wide as a tile has rows.
fn copy_columns(k: &mut Kernel, form: Form, source: &Source, to: Buf) {
    let &Source { buffer, base, line, row, rows, block, length, .. } = source;
    let base = k.eval(base + row);
    k.each(0, length, 1, |k, step| {
        let from = k.eval(base + (block + step) * line);
        let target = k.eval(step * form.step());
        k.each(0, rows, form.tile.rows, |k, r| {
            let place = k.eval(target + tile_place(form, r));
            let from = k.eval(from + r);
            let left = k.eval(rows - r);
            for lane in (0..form.tile.rows).step_by(form.lanes() as usize) {
                let mask = k.mask_of(left - lane, form.lanes());
                let x = k.load_lanes(buffer, from + lane, mask);
                k.store_vector(x, to, place + lane);
            }
        });
    });
}

/// Where the tile that begins at `row` lies in the scratch.
fn tile_place(form: Form, row: Val) -> Index {
    if form.columns_a { row / form.tile.rows * form.room() } else { row * form.step() }
}

/// `length` steps of a column panel of B, whose lines run along n.
fn copy_piece(k: &mut Kernel, tile: Tile, (b, from, line): (Buf, Val, Val), left: Val, length: Val, to: Buf) {
    let masks: Vec<Val> = (0..tile.vectors).map(|v| k.mask(left - v * LANES)).collect();
    k.each(0, length, 1, |k, step| {
        let source = k.eval(from + step * line);
        let target = k.eval(step * tile.columns());
        for (v, mask) in masks.iter().enumerate() {
            let x = k.load_lanes(b, source + v as u64 * LANES, *mask);
            k.store_vector(x, to, target + v as u64 * LANES);
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
    let place = k.eval(tile_place(form, row));
    let next = next.map(|next| k.eval(next + row / rows * length * form.share()));
    // Some steps on from `step`.
    let after = |k: &mut Kernel, step: Val, ahead: u64, sums: &[Val]| {
        let at = k.eval(from + step * form.line());
        let line: Vec<Val> = (0..vectors)
            .map(|v| {
                let words = form.factors.words(LANES);
                let x = k.load_some(b, at + (ahead * form.line() + v * words), words);
                match form.factors {
                    Factors::F32 | Factors::Pairs => x,
                    Factors::Widened => k.widened(x),
                }
            })
            .collect();
        let (step, between, ahead) = match form.columns_a {
            true => (k.eval(step * form.step()), 1, ahead * form.step()),
            false => (step, form.step(), ahead),
        };
        let at = k.eval(place + step);
        let x = |k: &mut Kernel, r: usize| k.load(a, at + (r as u64 * between + ahead));
        match form.factors {
            Factors::Pairs => k.outer(rows, x, &line, sums, Kernel::dot_pairs),
            Factors::F32 | Factors::Widened => k.outer(rows, x, &line, sums, Kernel::fma),
        }
    };
    let nothing = k.floats(0.0);
    let whole = k.eval(length / steps * steps);
    let sums = k.fold(0, whole, steps, &vec![nothing; (rows * vectors) as usize], |k, step, sums| {
        if let Some(next) = next {
            let at = k.eval(next + step * form.share());
            for line in (0..form.share() * steps).step_by(LANES as usize) {
                k.prefetch(b, at + line, Access::Read);
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
                places.push(k.eval(row + v * LANES));
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
        for (i, (at, &sum)) in self.places(k, tile).into_iter().zip(sums).enumerate() {
            let (row, vector) = (i as u64 / tile.vectors, i as u64 % tile.vectors);
            let exists = k.compare(row, Order::Lt, rows);
            let here = k.select(exists, columns - vector * LANES, 0);
            let earlier = k.select(again, here, 0);
            let (mask, earlier) = (k.mask(here), k.mask(earlier));
            let before = k.load_lanes(self.buffer, at, earlier);
            let sum = k.add(before, sum);
            k.store_lanes(sum, self.buffer, at, mask);
        }
    }
}
