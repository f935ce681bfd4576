//! Matrix product on a CPU, blocked as in GotoBLAS and BLIS (Goto & van de Geijn 2008; Van Zee & van de Geijn 2015):
//! the micro-kernel keeps a tile of the result in registers and accumulates outer products along one block of k.
//!
//! ```text
//! unit: some rows of C × some column panels
//!   for each block of k       copy A's rows to scratch, in their own order: they stay in the L2 cache
//!     for each column panel   B[block, panel]: all of the unit's row tiles share it
//!       for each tile of rows C[tile, panel] += A[tile, block] · B[block, panel]     (micro-kernel)
//! ```
//!
//! B is read from packed panels `[⌈n/32⌉][k][32]` ([`super::pack`]); frozen weights are packed once, when they are
//! loaded. While the tiles of one block of a panel are computed, each step prefetches a part of the next block, so that
//! no tile waits for memory. If B's rows are contiguous along n, packing is optional: the blocks are then copied to
//! scratch instead.
//!
//! In bf16, rows of A are rounded when they are copied to scratch, and frozen weights when they are packed. Where the
//! CPU has a dot product of bf16 pairs, both copies hold pairs of neighbours along k. Elsewhere B holds pairs of
//! neighbouring columns, which are widened to f32 once for all rows of a tile, and the copy of A holds floats.

use peft_runtime::artifact::Element;

use super::Buffers;
use super::pack::OperandFormat;
use crate::abi::arguments;
use crate::builder::{Access, Buf, Code, Index, Kernel, LANES, Order, Val};
use crate::kernels::Scheduled;
use crate::kernels::epilogue::{Epilogue, EpiloguePoint};
use crate::target::Machine;

/// The blocking of the product. The micro-kernel keeps `rows` × `vectors` vectors of sums in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Rows of the result that the micro-kernel computes.
    pub rows: u64,
    /// Vectors of [`LANES`] columns that the micro-kernel computes in each row.
    pub vectors: u64,
    /// Steps along k between two updates of the result. A panel's block takes 48 KiB; it takes 16 KiB where the L1
    /// cache also has to hold the rows of A of one tile.
    pub k_block: u64,
    /// The greatest number of rows of a unit. More rows share each read of B. On the other hand the unit's copy of A
    /// and its results have to stay in half of the L2 cache, which two threads may share: the cache has 512 KiB, or 1
    /// MiB and more with AVX-512. Small units also leave less work to wait for at the end when other processes take a
    /// thread's time.
    pub max_rows: u64,
    /// Steps along k that one iteration of the inner loop computes: about a hundred vector multiplications, which
    /// amortise the loop's own instructions. Where two threads share a core, its instruction decoders have room for
    /// little more.
    pub unroll: u64,
}

impl Tile {
    /// Columns of a tile.
    pub fn columns(self) -> u64 {
        self.vectors * LANES
    }
    /// The greatest number of rows of a unit, rounded down to whole tiles.
    pub fn block(self) -> u64 {
        self.max_rows / self.rows * self.rows
    }
}

/// All that the code of a CPU's product depends on, except its epilogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CpuGemmShape {
    /// The blocking.
    pub tile: Tile,
    /// The format of the operands.
    pub format: OperandFormat,
    /// Whether A is stored column by column, one contiguous run of rows for each k, as x is in xᵀ · y.
    pub a_column_major: bool,
    /// Whether B is packed into panels; otherwise B's rows are contiguous along n.
    pub packed: bool,
}

impl CpuGemmShape {
    /// Elements of one step along k of a panel of B.
    pub fn panel_row(self) -> u64 {
        self.format.words(self.tile.columns())
    }

    /// Elements of the next block of B that each step prefetches, so that the whole block has been fetched when the
    /// unit's last row tile is done.
    fn prefetch_per_step(self) -> u64 {
        (self.tile.rows * self.panel_row()).div_ceil(self.tile.block())
    }

    /// The stride in A's scratch copy, in elements: between the rows of a tile, or between its steps along k if A is
    /// column-major. It is padded to be no power of two, because rows at such a distance would map to the same few sets
    /// of the cache.
    fn scratch_stride(self) -> u64 {
        if self.a_column_major { self.tile.rows.next_multiple_of(self.copy_lanes()) } else { self.tile.k_block + LANES }
    }

    /// Rows that one vector copies if A is column-major.
    fn copy_lanes(self) -> u64 {
        self.tile.rows.next_power_of_two().min(LANES)
    }

    /// Elements that a tile of rows takes in the scratch.
    fn scratch_elements(self) -> u64 {
        self.scratch_stride() * if self.a_column_major { self.tile.k_block } else { self.tile.rows }
    }
}

arguments! {
    /// Sizes of the kernel. Strides and offsets are in elements; `lda`, `ldb` and `ldc` are leading dimensions.
    Sizes {
        m, n, depth,
        /// The number of units that divide the rows, and the number that divide the panels.
        row_blocks, panel_groups,
        /// The number of column panels of one unit, and of the whole result.
        panels_per_unit, panels,
        lda, batch_stride_a, offset_a,
        ldb, batch_stride_b, offset_b,
        /// From one panel of B to the next.
        panel_stride_b,
        /// The row stride of the result.
        ldc,
        batch_stride_c, offset_c,
        /// 1 if the product is added to the values that the result holds, else 0.
        accumulate,
    }
}

/// The product on a CPU. A unit computes some rows of the result against some column panels.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Gemm {
    /// All that the code depends on, except the epilogue.
    pub shape: CpuGemmShape,
    /// The operations that follow in the same kernel.
    pub epilogue: Epilogue,
}

impl Scheduled for Gemm {
    fn name_stem(&self) -> String {
        let CpuGemmShape { tile: Tile { rows, vectors, .. }, format, a_column_major, packed } = self.shape;
        let a = if a_column_major { "columns" } else { "rows" };
        let b = if packed { "panels" } else { "rows" };
        format!("gemm{rows}x{}_{a}_{b}{}", vectors * LANES, format.suffix())
    }

    fn emit(&self, machine: Machine) -> Code {
        let Gemm { shape, epilogue } = self;
        let shape = *shape;
        let tile = shape.tile;
        let element = shape.format.b_element();
        let own = Buffers { a: Element::F32, b: element, c: Element::F32 }.list();
        epilogue.define(machine, &own, Sizes::<Val>::COUNT, |k, buffers, sizes, follows| {
            let Buffers { a, b, c } = Buffers::of(buffers);
            let sizes = Sizes::of(sizes);
            let Sizes {
                m,
                n,
                depth,
                row_blocks,
                panel_groups,
                panels_per_unit,
                panels,
                lda,
                batch_stride_a,
                offset_a,
                ..
            } = sizes;
            let Sizes {
                ldb, batch_stride_b, offset_b, panel_stride_b, ldc, batch_stride_c, offset_c, accumulate, ..
            } = sizes;
            let a_scratch = k.scratch(shape.scratch_elements() * (tile.block() / tile.rows), shape.format.a_element());
            let b_panel = if shape.packed { b } else { k.scratch(tile.k_block * tile.columns(), element) };
            let steps = k.div_up(depth, shape.format.k_per_step());
            let tiles = k.div_up(m, tile.rows);
            k.units(|k, unit| {
                // Consecutive units share their panels of B, so that B is read from memory once.
                let row = k.rem(unit, row_blocks);
                let rest = k.div(unit, row_blocks);
                let (batch, group) = (k.div(rest, panel_groups), k.rem(rest, panel_groups));
                // The tiles are divided evenly: the units' numbers of tiles differ by at most one. A short last unit
                // would leave a thread idle.
                let [row, end] = [row.into(), row + 1].map(|row: Index| k.eval(row * tiles / row_blocks * tile.rows));
                let end = k.min(end, m);
                let rows = k.sub(end, row);
                let panel = k.mul(group, panels_per_unit);
                let end_panel = k.min(panel + panels_per_unit, panels);
                // The offsets of this batch's operands.
                let base_a = k.eval(batch * batch_stride_a + offset_a);
                let base_b = k.eval(batch * batch_stride_b + offset_b);
                let base_c = k.eval(batch * batch_stride_c + offset_c + row * ldc);
                k.each(0, steps, tile.k_block, |k, block| {
                    let length = k.min(steps - block, tile.k_block);
                    let source = OperandRows {
                        buffer: a,
                        base: base_a,
                        leading_dimension: lda,
                        row,
                        rows,
                        block,
                        length,
                        depth,
                    };
                    if shape.a_column_major {
                        copy_columns(k, shape, &source, a_scratch);
                    } else {
                        copy_rows(k, shape, &source, a_scratch);
                    }
                    let accumulates = k.compare(block + accumulate, Order::Gt, 0);
                    let done = k.eval(block + length);
                    let last = k.compare(done, Order::Eq, steps);
                    // The next unit has the same panels: the block after the last one is the first.
                    let following = k.select(last, 0, done);
                    let first_panel = panel;
                    k.each(panel, end_panel, 1, |k, panel| {
                        let start = k.eval(panel * tile.columns());
                        let left = k.eval(n - start);
                        let b_at = |panel: Val, block: Val| base_b + panel * panel_stride_b + block * ldb;
                        let from = k.eval(b_at(panel, block));
                        let (from, next) = if shape.packed {
                            let next_panel = k.eval(panel + 1);
                            let here = k.compare(next_panel, Order::Lt, end_panel);
                            let next_panel = k.select(here, next_panel, first_panel);
                            let block = k.select(here, block, following);
                            (from, Some(k.eval(b_at(next_panel, block))))
                        } else {
                            copy_b_panel(k, tile, (b, from, ldb), left, length, b_panel);
                            (k.index(0), None)
                        };
                        let base_c = k.eval(base_c + start);
                        k.each(0, rows, tile.rows, |k, above| {
                            let at = k.eval(base_c + above * ldc);
                            let here = k.eval(rows - above);
                            let part = |k: &mut Kernel| {
                                let rows = (k.eval(row + above), k.min(here, tile.rows));
                                (rows, (start, k.min(start + tile.columns(), n)))
                            };
                            let target = ResultTile { buffer: c, at, ldc };
                            for place in target.places(k, tile) {
                                k.prefetch(c, place, Access::Write);
                            }
                            epilogue.prefetch(
                                k,
                                EpiloguePoint::AfterTile { last },
                                (buffers, follows),
                                (batch, n),
                                part,
                            );
                            let sums = micro_kernel(k, shape, (a_scratch, above), (b_panel, from, next), length);
                            let all_rows = k.compare(here, Order::Gt, tile.rows - 1);
                            let all_columns = k.compare(left, Order::Gt, tile.columns() - 1);
                            let all = k.and(all_rows, all_columns);
                            k.branch(
                                all,
                                |k| {
                                    k.branch(
                                        accumulates,
                                        |k| target.write(k, tile, &sums, true),
                                        |k| target.write(k, tile, &sums, false),
                                    )
                                },
                                |k| target.write_masked(k, tile, &sums, accumulates, (here, left)),
                            );
                            epilogue.write(k, EpiloguePoint::AfterTile { last }, (buffers, follows), (batch, n), part);
                        });
                    });
                });
                epilogue.write(k, EpiloguePoint::AfterUnit, (buffers, follows), (batch, n), |k| {
                    let start = k.eval(panel * tile.columns());
                    ((row, rows), (start, k.min(end_panel * tile.columns(), n)))
                });
            });
        })
    }
}

/// The rows of A that a unit copies to scratch for one block of k.
struct OperandRows {
    buffer: Buf,
    base: Val,
    leading_dimension: Val,
    row: Val,
    rows: Val,
    /// The first step along k, and the number of steps.
    block: Val,
    length: Val,
    /// The whole depth of the product.
    depth: Val,
}

/// Copies rows of a row-major A. The rows that complete the last tile repeat the last row; their results are never
/// written.
fn copy_rows(k: &mut Kernel, shape: CpuGemmShape, source: &OperandRows, to: Buf) {
    let &OperandRows { buffer, base, leading_dimension, row, rows, block, length, depth } = source;
    let k_per_step = shape.format.k_per_step();
    let last = k.eval(rows - 1);
    let start = k.eval(block * k_per_step);
    let left = k.eval(depth - start);
    let base = k.eval(base + start);
    let tiles = k.div_up(rows, shape.tile.rows);
    k.each(0, tiles * shape.tile.rows, 1, |k, r| {
        let from = k.min(r, last);
        let from = k.eval(base + (row + from) * leading_dimension);
        // A row is too short for the hardware prefetcher to predict the next one.
        let later = k.eval(from + 2 * leading_dimension);
        let target = k.eval(r * shape.scratch_stride());
        k.lanes(length, |k, j, mask| {
            let ahead = k.eval(j * k_per_step);
            k.prefetch(buffer, later + ahead, Access::Read);
            let at = k.eval(from + ahead);
            let x = match shape.format {
                OperandFormat::F32 => k.load_lanes(buffer, at, mask),
                OperandFormat::Bf16Widened => {
                    let x = k.load_lanes(buffer, at, mask);
                    k.round_to_bf16(x)
                }
                OperandFormat::Bf16Pairs => {
                    let mask = k.mask_of(left - ahead, 2 * LANES);
                    let x = k.load_lanes(buffer, at, mask);
                    k.to_bf16_pairs(true, x)
                }
            };
            k.store_vector(x, to, target + j);
        });
    });
}

/// Copies the rows of a column-major A, one step along k after the other, each in parts as wide as a tile has rows.
fn copy_columns(k: &mut Kernel, shape: CpuGemmShape, source: &OperandRows, to: Buf) {
    let &OperandRows { buffer, base, leading_dimension, row, rows, block, length, .. } = source;
    let base = k.eval(base + row);
    k.each(0, length, 1, |k, step| {
        let from = k.eval(base + (block + step) * leading_dimension);
        let target = k.eval(step * shape.scratch_stride());
        k.each(0, rows, shape.tile.rows, |k, r| {
            let place = k.eval(target + tile_place(shape, r));
            let from = k.eval(from + r);
            let left = k.eval(rows - r);
            for lane in (0..shape.tile.rows).step_by(shape.copy_lanes() as usize) {
                let mask = k.mask_of(left - lane, shape.copy_lanes());
                let x = k.load_lanes(buffer, from + lane, mask);
                k.store_vector(x, to, place + lane);
            }
        });
    });
}

/// The scratch index of the tile that begins at `row`.
fn tile_place(shape: CpuGemmShape, row: Val) -> Index {
    if shape.a_column_major { row / shape.tile.rows * shape.scratch_elements() } else { row * shape.scratch_stride() }
}

/// Copies `length` steps of a column panel of an unpacked B, whose rows are contiguous along n.
fn copy_b_panel(k: &mut Kernel, tile: Tile, (b, from, ldb): (Buf, Val, Val), left: Val, length: Val, to: Buf) {
    let masks: Vec<Val> = (0..tile.vectors).map(|v| k.mask(left - v * LANES)).collect();
    k.each(0, length, 1, |k, step| {
        let source = k.eval(from + step * ldb);
        let target = k.eval(step * tile.columns());
        for (v, mask) in masks.iter().enumerate() {
            let x = k.load_lanes(b, source + v as u64 * LANES, *mask);
            k.store_vector(x, to, target + v as u64 * LANES);
        }
    });
}

/// The micro-kernel: computes a tile's sums over one block of k, row by row. `from` is the index of B's block, `next`
/// that of the block to prefetch.
fn micro_kernel(
    k: &mut Kernel,
    shape: CpuGemmShape,
    (a, row): (Buf, Val),
    (b, from, next): (Buf, Val, Option<Val>),
    length: Val,
) -> Vec<Val> {
    let Tile { rows, vectors, unroll, .. } = shape.tile;
    let place = k.eval(tile_place(shape, row));
    let next = next.map(|next| k.eval(next + row / rows * length * shape.prefetch_per_step()));
    // Adds the product of step `step + ahead` to the sums.
    let after = |k: &mut Kernel, step: Val, ahead: u64, sums: &[Val]| {
        let at = k.eval(from + step * shape.panel_row());
        let b_row: Vec<Val> = (0..vectors)
            .map(|v| {
                let words = shape.format.words(LANES);
                let x = k.load_vector_of(b, at + (ahead * shape.panel_row() + v * words), words);
                match shape.format {
                    OperandFormat::F32 | OperandFormat::Bf16Pairs => x,
                    OperandFormat::Bf16Widened => k.bf16_to_f32(x),
                }
            })
            .collect();
        let (step, between, ahead) = match shape.a_column_major {
            true => (k.eval(step * shape.scratch_stride()), 1, ahead * shape.scratch_stride()),
            false => (step, shape.scratch_stride(), ahead),
        };
        let at = k.eval(place + step);
        let x = |k: &mut Kernel, r: usize| k.load(a, at + (r as u64 * between + ahead));
        match shape.format {
            OperandFormat::Bf16Pairs => k.outer_product(rows, x, &b_row, sums, Kernel::dot_pairs),
            OperandFormat::F32 | OperandFormat::Bf16Widened => k.outer_product(rows, x, &b_row, sums, Kernel::fma),
        }
    };
    let zero_f32 = k.floats(0.0);
    let whole = k.eval(length / unroll * unroll);
    let sums = k.fold(0, whole, unroll, &vec![zero_f32; (rows * vectors) as usize], |k, step, sums| {
        if let Some(next) = next {
            let at = k.eval(next + step * shape.prefetch_per_step());
            for ahead in (0..shape.prefetch_per_step() * unroll).step_by(LANES as usize) {
                k.prefetch(b, at + ahead, Access::Read);
            }
        }
        (0..unroll).fold(sums.to_vec(), |sums, ahead| after(k, step, ahead, &sums))
    });
    k.fold(whole, length, 1, &sums, |k, step, sums| after(k, step, 0, sums))
}

/// A tile of the result in memory.
struct ResultTile {
    buffer: Buf,
    at: Val,
    ldc: Val,
}

impl ResultTile {
    /// The indices of the tile's vectors.
    fn places(&self, k: &mut Kernel, tile: Tile) -> Vec<Val> {
        let mut row = self.at;
        let mut places = vec![];
        for _ in 0..tile.rows {
            for v in 0..tile.vectors {
                places.push(k.eval(row + v * LANES));
            }
            row = k.add(row, self.ldc);
        }
        places
    }

    /// Writes a tile that lies wholly within the result.
    fn write(&self, k: &mut Kernel, tile: Tile, sums: &[Val], accumulates: bool) {
        for (at, &sum) in self.places(k, tile).into_iter().zip(sums) {
            let sum = match accumulates {
                true => {
                    let earlier = k.load_vector(self.buffer, at);
                    k.add(earlier, sum)
                }
                false => sum,
            };
            k.store_vector(sum, self.buffer, at);
        }
    }

    /// Writes a tile at the edge of the result, of which only `rows` × `columns` exist.
    fn write_masked(&self, k: &mut Kernel, tile: Tile, sums: &[Val], accumulates: Val, (rows, columns): (Val, Val)) {
        for (i, (at, &sum)) in self.places(k, tile).into_iter().zip(sums).enumerate() {
            let (row, vector) = (i as u64 / tile.vectors, i as u64 % tile.vectors);
            let exists = k.compare(row, Order::Lt, rows);
            let here = k.select(exists, columns - vector * LANES, 0);
            let earlier = k.select(accumulates, here, 0);
            let (mask, earlier) = (k.mask(here), k.mask(earlier));
            let before = k.load_lanes(self.buffer, at, earlier);
            let sum = k.add(before, sum);
            k.store_lanes(sum, self.buffer, at, mask);
        }
    }
}
