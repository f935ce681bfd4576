//! Matrix product with frozen weights in half precision on a GPU's tensor cores (WMMA); sums are f32.
//!
//! ```text
//! for each 32 steps of k
//!   a warp: multiply 16 × 16 fragments from one stage of shared memory, accumulate in registers
//!   A[128 rows, 32] and B[32, 64 columns] of a later step ─► another stage of shared memory
//! ```
//!
//! B is packed once into tiles `[⌈n/64⌉][⌈k/32⌉][32][64]`, two columns in a word. From sm_80 on, A is rounded by the
//! kernel that computes it or by [`Round`], and both operands are copied to shared memory by asynchronous copies
//! (`cp.async`), several steps ahead; results of few columns have tiles of 64 rows, so that there are enough tiles.
//! Before sm_80, both operands pass through registers on the way to shared memory, and A is rounded there.
//!
//! Chips before sm_80 have no bf16, and the range of f16 is 6·10⁻⁵ to 65504, in which adjoints would underflow to zero.
//! There each warp scales its rows of A by a power of two that brings the largest value so far near 2¹⁰. When a later
//! value would exceed 2¹⁵ after scaling, the warp lowers the power and rescales its sums.

use peft_runtime::artifact::{Element, Extent};

use super::epilogue::{ResultMode, TileEpilogue, TileWriter, rows_left};
use super::{Buffers, Product};
use crate::abi::arguments;
use crate::builder::mma::{Half, Operand, SIDE, SUMS};
use crate::builder::{Buf, Code, F32, I32, Kernel, Order, Val, define, first};
use crate::cost::{LaunchCost, LaunchSizes, SHARED_BYTES_PER_CYCLE, fma_cycles, tile_store_cycles};
use crate::kernels::Scheduled;
use crate::kernels::epilogue::Epilogue;
use crate::kernels::math;
use crate::target::Machine;
use crate::target::cuda::{self, Card, WARP, WARPS};

/// Rows of a tile of the result.
pub const ROWS: u64 = 128;
/// Columns of a tile of the result.
pub const COLUMNS: u64 = 64;
/// Steps along k that one stage of shared memory holds.
pub const DEPTH: u64 = 32;
/// Rows of a tile where the result has few columns (`fuse::Thresholds::min_large_tile_columns`): smaller tiles give
/// more blocks.
pub const FEWER_ROWS: u64 = 64;
/// Fragments across a warp's part of a tile.
pub const FRAGMENTS_ACROSS: u64 = COLUMNS / SIDE;
/// Threads of a block.
const THREADS: u64 = WARP * WARPS;
/// The row stride of a stage in shared memory, in words of two values. It is padded so that the rows that a fragment
/// load reads at once fall in different banks.
const STRIDE_A: u64 = DEPTH / 2 + 4;
/// The row stride of B in a stage, in words, padded like [`STRIDE_A`].
const STRIDE_B: u64 = COLUMNS / 2 + 4;
/// The row stride of the sums in shared memory when a tile is stored, in floats, padded like [`STRIDE_A`].
const STRIDE_C: u64 = COLUMNS + 4;
/// Blocks of large tiles that should reside on a multiprocessor at once; the compiler then keeps each thread below 128
/// registers.
const RESIDENT_BLOCKS: u64 = 4;
/// Words of static shared memory that a block may have (48 KiB).
const SHARED_WORDS: u64 = (48 << 10) / 4;
/// The greatest number of stages; more of them gain nothing.
const MAX_STAGES: u64 = 5;
/// Words of a packed tile of B.
pub const TILE_WORDS: u64 = DEPTH * COLUMNS / 2;
/// 16-byte loads by which a thread fetches its part of a stage of A through registers.
const VEC4_A: u64 = ROWS * DEPTH / 4 / THREADS;
/// The same for packed B.
const VEC4_B: u64 = TILE_WORDS / 4 / THREADS;
/// 16-byte copies that a row of A takes in a stage.
const VEC4_PER_ROW: u64 = DEPTH / 2 / 4;
/// Rows of A that a warp fetches at once.
const ROWS_PER_FETCH: u64 = WARP * 4 / DEPTH;
/// The binary exponent to which the largest value of A is scaled for f16.
const TARGET_EXPONENT: i64 = 10;
/// The binary exponent that a scaled value of A may reach; the range of f16 ends at 2¹⁶.
const MAX_EXPONENT: i64 = 15;
const _: () =
    assert!(COLUMNS == cuda::GEMM_TILE && VEC4_A * THREADS * 4 == ROWS * DEPTH && (ROWS * STRIDE_A).is_multiple_of(8));

/// The tile that a thread block computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MmaTile {
    /// The type of the operands.
    pub half: Half,
    /// Rows of the tile.
    pub rows: u64,
    /// Whether rows of A that pass through registers are read by 16-byte loads. It requires rows that begin and end at
    /// multiples of four floats.
    pub vec4: bool,
}

impl MmaTile {
    /// Whether operands reach shared memory by asynchronous copies, which exist from sm_80 on.
    pub fn async_copies(self) -> bool {
        self.half == Half::BF16
    }

    /// Fragments down a warp's part of the tile.
    pub fn fragments_down(self) -> u64 {
        self.rows / WARPS / SIDE
    }

    fn sums(self) -> usize {
        (self.fragments_down() * FRAGMENTS_ACROSS) as usize * SUMS
    }

    /// Words of shared memory that one stage of both operands takes.
    fn stage(self) -> u64 {
        self.rows * STRIDE_A + DEPTH * STRIDE_B
    }

    fn stages(self) -> u64 {
        if self.async_copies() { (SHARED_WORDS / self.stage()).min(MAX_STAGES) } else { 2 }
    }

    /// Words of shared memory for the stages, which are later reused for the sums of one row of fragments of each warp.
    fn shared_words(self) -> u64 {
        (self.stages() * self.stage()).max(WARPS * SIDE * STRIDE_C)
    }
}

arguments! {
    /// The buffer that is read, and the half-precision buffer that is written, two values in a word.
    PackBuffers { from, to }
}
arguments! {
    /// Sizes of the packing kernel, in elements.
    PackSizes {
        n, depth,
        /// The number of tiles along k.
        tiles,
        column_stride, k_stride,
        /// The index of the operand's first element.
        offset,
    }
}

/// Packs B. A unit packs one tile; elements beyond the operand become zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pack {
    /// The type of the packed operand.
    pub half: Half,
}

impl Scheduled for Pack {
    fn name_stem(&self) -> String {
        format!("pack_{}", self.half.name())
    }

    fn emit(&self, machine: Machine) -> Code {
        let half = self.half;
        let elements = PackBuffers { from: Element::F32, to: Element::I32 }.list();
        define(machine, &elements, PackSizes::<Val>::COUNT, |k, buffers, sizes| {
            let PackBuffers { from, to } = PackBuffers::of(buffers);
            let PackSizes { n, depth, tiles, column_stride, k_stride, offset } = PackSizes::of(sizes);
            k.units(|k, unit| {
                let (column, step) = (k.div(unit, tiles), k.rem(unit, tiles));
                let (column, step, target) =
                    (k.eval(column * COLUMNS), k.eval(step * DEPTH), k.eval(unit * TILE_WORDS));
                let column = k.eval(column + k.lane_index() * 2);
                let next = k.eval(column + 1);
                let places = [column, next].map(|column| {
                    let there = k.compare(column, Order::Lt, n);
                    (there, k.eval(offset + column * column_stride))
                });
                k.each(0, DEPTH, 1, |k, s| {
                    let step = k.eval(step + s);
                    let exists = k.compare(step, Order::Lt, depth);
                    let step_offset = k.mul(step, k_stride);
                    let pair = places.map(|(there, place)| {
                        let here = k.and(there, exists);
                        let zero_f32 = k.float(0.0, F32);
                        k.load_if(here, from, place + step_offset, zero_f32)
                    });
                    let word = k.pack_half2(half, pair);
                    k.store_vector(word, to, target + s * (COLUMNS / 2));
                });
            });
        })
    }
}

/// Values of a row that one lane rounds.
pub const ROUNDED_PER_LANE: u64 = 8;

arguments! {
    /// Sizes of the rounding kernel.
    RoundSizes {
        depth,
        /// Pieces, and so units, of a row.
        pieces,
        /// The row stride of the result, in words.
        rounded_stride,
        /// The row stride of the operand, and the index of its first element.
        row_stride, offset,
    }
}

/// Rounds A to half precision. A unit rounds one piece of a row; elements beyond the row become zero. Its buffers are
/// [`PackBuffers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Round {
    /// The type of the result.
    pub half: Half,
    /// Whether rows are read by 16-byte loads. It requires rows that begin and end at multiples of four floats.
    pub vec4: bool,
}

impl Scheduled for Round {
    fn name_stem(&self) -> String {
        format!("round_{}{}", self.half.name(), if self.vec4 { "_vec4" } else { "" })
    }

    fn emit(&self, machine: Machine) -> Code {
        let Round { half, vec4 } = *self;
        let elements = PackBuffers { from: Element::F32, to: Element::I32 }.list();
        define(machine, &elements, RoundSizes::<Val>::COUNT, |k, buffers, sizes| {
            let PackBuffers { from, to } = PackBuffers::of(buffers);
            let RoundSizes { depth, pieces, rounded_stride, row_stride, offset } = RoundSizes::of(sizes);
            k.units(|k, unit| {
                let (row, piece) = (k.div(unit, pieces), k.rem(unit, pieces));
                let step = k.eval(piece * (ROUNDED_PER_LANE * WARP) + k.lane_index() * ROUNDED_PER_LANE);
                let begin = k.eval(offset + row * row_stride);
                let mut numbers = vec![];
                for four in (0..ROUNDED_PER_LANE).step_by(4) {
                    let steps = [0, 1, 2, 3].map(|i| k.eval(step + (four + i)));
                    let there = steps.map(|step| k.compare(step, Order::Lt, depth));
                    let at = steps.map(|step| k.eval(begin + step));
                    if vec4 {
                        numbers.extend(k.load_vec4_if(there[0], from, at[0]));
                    } else {
                        let zero_f32 = k.float(0.0, F32);
                        numbers.extend(at.iter().zip(there).map(|(&at, there)| k.load_if(there, from, at, zero_f32)));
                    }
                }
                let words: Vec<Val> =
                    numbers.chunks_exact(2).map(|pair| k.pack_half2(half, [pair[0], pair[1]])).collect();
                let word = k.eval(step / 2);
                let exists = k.compare(word, Order::Lt, rounded_stride);
                k.when(exists, |k| {
                    k.store_vec4(words.try_into().expect("half as many"), to, row * rounded_stride + word);
                });
            });
        })
    }
}

arguments! {
    /// Sizes of the product.
    Sizes {
        m, n, depth,
        /// The number of tiles across the result.
        across,
        row_stride_a, offset_a,
        /// Words from one column of packed tiles to the next, and the index of the first.
        panel_stride_b, offset_b,
        row_stride_c, offset_c,
    }
}

/// The product on tensor cores. A unit computes one tile of the result.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mma {
    /// The tile.
    pub tile: MmaTile,
    /// What happens to the product itself.
    pub mode: ResultMode,
    /// The operations that follow in the same kernel.
    pub epilogue: Epilogue,
}

impl Mma {
    /// The sizes and the units of a product whose B is packed: B's `row_stride` counts words from one column of packed
    /// tiles to the next.
    pub fn arguments(&self, product: &Product) -> (Vec<Extent>, Extent) {
        let Product { m, n, depth, a, b, c, .. } = product;
        let (down, across) = product.tiles(self.tile.rows, COLUMNS);
        let sizes = Sizes {
            m,
            n,
            depth,
            across: &across,
            row_stride_a: &a.row_stride,
            offset_a: &a.offset,
            panel_stride_b: &b.row_stride,
            offset_b: &b.offset,
            row_stride_c: &c.row_stride,
            offset_c: &c.offset,
        };
        (sizes.map(Extent::clone).list(), down * across.clone() * Extent::Const(WARPS))
    }
}

impl Scheduled for Mma {
    fn name_stem(&self) -> String {
        let vec4 = if self.tile.vec4 { "_vec4" } else { "" };
        format!("mma_{}_{}{vec4}{}", self.tile.half.name(), self.tile.rows, self.mode.suffix())
    }

    fn emit(&self, machine: Machine) -> Code {
        let Mma { tile, mode, epilogue } = self;
        let (tile, mode) = (*tile, *mode);
        let a = if tile.async_copies() { Element::I32 } else { Element::F32 };
        let own = Buffers { a, b: Element::I32, c: Element::F32 }.list();
        epilogue.define(machine, &own, Sizes::<Val>::COUNT, |k, buffers, sizes, follows| {
            let Buffers { a, b, c } = Buffers::of(buffers);
            let sizes = Sizes::of(sizes);
            let Sizes { m, n, depth, across, row_stride_a, offset_a, .. } = sizes;
            let Sizes { panel_stride_b, offset_b, row_stride_c, offset_c, .. } = sizes;
            let shared = k.shared_words(tile.shared_words());
            let threads = ThreadPosition::of(k);
            if tile.rows == ROWS && tile.async_copies() && !epilogue.draws() {
                k.set_resident_blocks(RESIDENT_BLOCKS);
            }
            k.block_units(|k, unit| {
                let (tile_row, tile_column) = (k.div(unit, across), k.rem(unit, across));
                let (row, column) = (k.eval(tile_row * tile.rows), k.eval(tile_column * COLUMNS));
                let right = PackedColumns { buffer: b, start: k.eval(tile_column * panel_stride_b + offset_b), depth };
                let zero = k.index(0);
                let mut out = TileWriter {
                    tile_epilogue: TileEpilogue { mode, epilogue, buffers, sizes: follows },
                    result: c,
                    offset: offset_c,
                    row_stride: row_stride_c,
                    batch: zero,
                    column,
                    n,
                    width: COLUMNS,
                    shared: shared.floats(),
                    unscale: None,
                };
                // The previous unit still stores its sums through the same shared memory.
                k.barrier();
                let sums = if tile.async_copies() {
                    let left = AsyncRows::of(k, &threads, a, (row, m), (row_stride_a, offset_a), tile.rows);
                    pipelined_sums(k, tile, &threads, shared, (&left, &right))
                } else {
                    let left = RegisterRows::of(k, &threads, a, (row, m), (row_stride_a, offset_a), tile);
                    let (sums, scale) = through_registers(k, tile, &threads, shared, (&left, &right));
                    let one = k.float(1.0, F32);
                    out.unscale = Some(k.div(one, scale));
                    sums
                };
                k.barrier();
                write(k, &out, &threads, (row, m), &sums, tile.fragments_down());
            });
        })
    }

    fn cost(&self, launched: LaunchSizes, card: &Card) -> LaunchCost {
        let LaunchSizes { sizes, units, .. } = launched;
        let Mma { tile, epilogue, .. } = self;
        let Sizes { m, n, depth, .. } = Sizes::of(sizes).map(|n| n as f64);
        let blocks = units.div_ceil(WARPS);
        let step = fma_cycles((tile.rows * COLUMNS * DEPTH) as f64, card, card.tensor_core_flops);
        // On sm_70 two threads hold each element of an operand's fragment.
        let copies = if tile.async_copies() { 1 } else { 2 };
        let fragments = WARPS * DEPTH / SIDE * (tile.fragments_down() + FRAGMENTS_ACROSS) * copies;
        let shared_bytes = (fragments * SIDE * SIDE + (tile.rows + COLUMNS) * DEPTH) * 2;
        let out = tile_store_cycles(epilogue.sum.is_some(), tile.rows, COLUMNS);
        let steps = (depth / DEPTH as f64).ceil();
        let cycles = steps * step.max(shared_bytes as f64 / SHARED_BYTES_PER_CYCLE) + out;
        let number_of_a = if tile.async_copies() { 2.0 } else { 4.0 };
        let max_read_bytes = vec![number_of_a * m * depth, 2.0 * n * depth];
        let l2_bytes = blocks as f64 * depth * (number_of_a * tile.rows as f64 + 2.0 * COLUMNS as f64);
        let (flops, blocks) = (2.0 * m * n * depth, vec![(blocks, cycles)]);
        LaunchCost {
            flops,
            tensor_cores: true,
            blocks,
            max_read_bytes,
            bytes_in_flight: f64::INFINITY,
            l2_bytes,
            ..LaunchCost::default()
        }
    }

    fn read_write(&self) -> Vec<usize> {
        self.mode.read_write()
    }
}

/// The sums of a tile whose operands reach shared memory by asynchronous copies, one fewer step ahead than there are
/// stages.
fn pipelined_sums(
    k: &mut Kernel,
    tile: MmaTile,
    threads: &ThreadPosition,
    shared: Buf,
    (left, right): (&AsyncRows, &PackedColumns),
) -> Vec<Val> {
    let depth = right.depth;
    let ahead = tile.stages() - 1;
    let copy = |k: &mut Kernel, block: Val, word: Val| {
        let stage = Stage::at(k, tile, shared, word);
        left.copy(k, threads, (block, depth), stage.a);
        right.copy(k, threads, block, stage.b);
        k.commit_copies();
    };
    for step in 0..ahead {
        let (block, word) = (k.index(step * DEPTH), k.index(step * tile.stage()));
        copy(k, block, word);
    }
    let zero_f32 = k.float(0.0, F32);
    let zero = k.index(0);
    let last = k.index(ahead * tile.stage());
    let carried = [vec![zero, last], vec![zero_f32; tile.sums()]].concat();
    let carried = k.fold(0, depth, DEPTH, &carried, |k, block, carried| {
        let ([here, there], sums) = (first(carried), &carried[2..]);
        k.wait_for_copies_but(ahead - 1);
        // After the barrier this stage is filled, and all warps are done with the stage that is filled next.
        k.barrier();
        let next = k.eval(block + ahead * DEPTH);
        copy(k, next, there);
        let stage = Stage::at(k, tile, shared, here);
        let sums = multiply(k, tile, threads, stage, sums);
        let after = [here, there].map(|word| {
            let after = k.eval(word + tile.stage());
            let round = k.compare(after, Order::Eq, tile.stages() * tile.stage());
            k.select(round, zero, after)
        });
        [&after[..], &sums].concat()
    });
    k.wait_for_copies_but(0);
    carried[2..].to_vec()
}

/// The sums of a tile whose operands pass through registers into two alternating stages, and the scale that brings A
/// into the range of f16.
fn through_registers(
    k: &mut Kernel,
    tile: MmaTile,
    threads: &ThreadPosition,
    shared: Buf,
    (left, right): (&RegisterRows, &PackedColumns),
) -> (Vec<Val>, Val) {
    let depth = right.depth;
    let zero = k.index(0);
    let stage = Stage::at(k, tile, shared, zero);
    let fetched_a = left.fetch(k, threads, zero, depth);
    let fetched_b = right.fetch(k, threads, zero);
    let maximum = largest(k, &fetched_a);
    let scale = scale_for(k, maximum);
    left.store_shared(k, threads, stage.a, &fetched_a, scale);
    right.store_shared(k, threads, stage.b, &fetched_b);
    let zero_f32 = k.float(0.0, F32);
    let carried = [vec![zero, scale], vec![zero_f32; tile.sums()]].concat();
    let carried = k.fold(0, depth, DEPTH, &carried, |k, block, carried| {
        let ([stage, scale], sums) = (first(carried), &carried[2..]);
        // After the barrier this stage is filled, and all warps are done with the other one.
        k.barrier();
        let here = Stage::at(k, tile, shared, stage);
        let other = k.eval(tile.stage() - stage);
        let there = Stage::at(k, tile, shared, other);
        let next = k.eval(block + DEPTH);
        let fetched_a = left.fetch(k, threads, next, depth);
        let fetched_b = right.fetch(k, threads, next);
        let sums = multiply(k, tile, threads, here, sums);
        let scaled = rescale(k, &fetched_a, &sums, scale);
        left.store_shared(k, threads, there.a, &fetched_a, scaled[0]);
        right.store_shared(k, threads, there.b, &fetched_b);
        [&[other], &scaled[..]].concat()
    });
    (carried[2..].to_vec(), carried[1])
}

/// The position of a thread in its block.
struct ThreadPosition {
    thread: Val,
    warp: Val,
    lane: Val,
}

impl ThreadPosition {
    fn of(k: &mut Kernel) -> ThreadPosition {
        let thread = k.thread();
        ThreadPosition { thread, warp: k.eval(thread / WARP), lane: k.lane_index() }
    }
}

/// The shared memory of one step's operands.
#[derive(Clone, Copy)]
struct Stage {
    a: Buf,
    b: Buf,
}

impl Stage {
    fn at(k: &mut Kernel, tile: MmaTile, shared: Buf, word: Val) -> Stage {
        let a = k.subbuffer(shared, word);
        Stage { a, b: k.subbuffer(a, tile.rows * STRIDE_A) }
    }
}

/// For each distance in `below`: the index of the row that is so far below `row`, and whether the row exists.
fn row_offsets(
    k: &mut Kernel,
    (row, m): (Val, Val),
    (row_stride, start): (Val, Val),
    below: impl Iterator<Item = u64>,
) -> Vec<(Val, Val)> {
    let rows = below.map(|down| {
        let row = k.eval(row + down);
        let there = k.compare(row, Order::Lt, m);
        (k.eval(start + row * row_stride), there)
    });
    rows.collect()
}

/// A block's rows of A, already rounded. Each thread copies 16 bytes of every row at a fixed distance.
struct AsyncRows {
    buffer: Buf,
    /// For each of the thread's rows: the index of its words, and whether the row exists.
    rows: Vec<(Val, Val)>,
}

impl AsyncRows {
    fn of(
        k: &mut Kernel,
        threads: &ThreadPosition,
        buffer: Buf,
        (row, m): (Val, Val),
        (row_stride, start): (Val, Val),
        rows: u64,
    ) -> AsyncRows {
        let (own, word) = AsyncRows::own(k, threads);
        let row = k.eval(row + own);
        let start = k.eval(start + word);
        let below = (0..rows).step_by((THREADS / VEC4_PER_ROW) as usize);
        AsyncRows { buffer, rows: row_offsets(k, (row, m), (row_stride, start), below) }
    }

    /// The thread's first row, and its first word in it.
    fn own(k: &mut Kernel, threads: &ThreadPosition) -> (Val, Val) {
        (k.eval(threads.thread / VEC4_PER_ROW), k.eval(threads.thread % VEC4_PER_ROW * 4))
    }

    fn copy(&self, k: &mut Kernel, threads: &ThreadPosition, (block, depth): (Val, Val), to: Buf) {
        let (row, word) = AsyncRows::own(k, threads);
        let place = k.eval(row * STRIDE_A + word);
        let (step, begin) = (k.eval(word * 2), k.eval(block / 2));
        let within = k.compare(block + step, Order::Lt, depth);
        for (n, &(row, there)) in (0..).zip(&self.rows) {
            let here = k.and(there, within);
            let place = place + n * THREADS / VEC4_PER_ROW * STRIDE_A;
            k.copy_vec4_async_if(here, (self.buffer, row + begin), (to, place));
        }
    }
}

/// A warp's rows of A in f32. Each thread fetches four values of every row at a distance of [`ROWS_PER_FETCH`].
struct RegisterRows {
    buffer: Buf,
    /// For each row that the thread fetches: the index of its first element, and whether the row exists.
    rows: Vec<(Val, Val)>,
    tile: MmaTile,
}

impl RegisterRows {
    fn of(
        k: &mut Kernel,
        threads: &ThreadPosition,
        buffer: Buf,
        (row, m): (Val, Val),
        (row_stride, start): (Val, Val),
        tile: MmaTile,
    ) -> RegisterRows {
        let (own, _) = RegisterRows::own(k, threads);
        let row = k.eval(row + own);
        let below = (0..VEC4_A).map(|n| n * ROWS_PER_FETCH);
        RegisterRows { buffer, rows: row_offsets(k, (row, m), (row_stride, start), below), tile }
    }

    /// The thread's first row, and its first step along k.
    fn own(k: &mut Kernel, threads: &ThreadPosition) -> (Val, Val) {
        let (down, step) = (k.eval(threads.lane / (DEPTH / 4)), k.eval(threads.lane % (DEPTH / 4)));
        (k.eval(threads.warp * (ROWS / WARPS) + down), k.eval(step * 4))
    }

    fn fetch(&self, k: &mut Kernel, threads: &ThreadPosition, block: Val, depth: Val) -> Vec<Val> {
        let (_, step) = RegisterRows::own(k, threads);
        let step = k.eval(block + step);
        let zero_f32 = k.float(0.0, F32);
        let mut fetched = vec![];
        let within: Vec<Val> = (0..4).map(|i| k.compare(step + i, Order::Lt, depth)).collect();
        for &(begin, there) in &self.rows {
            let at = k.eval(begin + step);
            if self.tile.vec4 {
                let here = k.and(there, within[0]);
                fetched.extend(k.load_vec4_if(here, self.buffer, at));
                continue;
            }
            for (i, &within) in within.iter().enumerate() {
                let here = k.and(there, within);
                fetched.push(k.load_if(here, self.buffer, at + i as u64, zero_f32));
            }
        }
        fetched
    }

    fn store_shared(&self, k: &mut Kernel, threads: &ThreadPosition, to: Buf, fetched: &[Val], scale: Val) {
        let (row, step) = RegisterRows::own(k, threads);
        let at = k.eval(row * STRIDE_A + step / 2);
        for (n, four) in fetched.chunks_exact(4).enumerate() {
            let at = k.eval(at + n as u64 * ROWS_PER_FETCH * STRIDE_A);
            for (i, pair) in four.chunks_exact(2).enumerate() {
                let pair = [pair[0], pair[1]].map(|x| k.mul(x, scale));
                let word = k.pack_half2(self.tile.half, pair);
                k.store_scalar(word, to, at + i as u64);
            }
        }
    }
}

/// The largest magnitude among the values that a warp has fetched.
fn largest(k: &mut Kernel, fetched: &[Val]) -> Val {
    let zero_f32 = k.float(0.0, F32);
    let maximum = fetched.iter().fold(zero_f32, |maximum, &x| {
        let x = math::magnitude(k, x);
        k.max_number(maximum, x)
    });
    k.max_lanes(maximum)
}

/// Returns the scale for the warp's values, followed by its sums at that scale: both are unchanged unless a fetched
/// value would exceed 2^[`MAX_EXPONENT`] at the old scale.
fn rescale(k: &mut Kernel, fetched: &[Val], sums: &[Val], scale: Val) -> Vec<Val> {
    let maximum = largest(k, fetched);
    let grown = k.mul(maximum, scale);
    let limit = k.float((1 << MAX_EXPONENT) as f64, F32);
    let beyond = k.compare(grown, Order::Gt, limit);
    let same = [&[scale], sums].concat();
    k.if_else(beyond, &same, |k| {
        let now = scale_for(k, maximum);
        let by = k.div(now, scale);
        let mut all = vec![now];
        all.extend(sums.iter().map(|&sum| k.mul(sum, by)));
        all
    })
}

/// The power of two that brings `maximum` near 2^[`TARGET_EXPONENT`].
fn scale_for(k: &mut Kernel, maximum: Val) -> Val {
    let bits = k.bits(maximum);
    let [place, bias, least, greatest] = [23, 127, 127 - 100, 127 + 100].map(|n| k.int(n, I32));
    let exponent = k.shift_right(bits, place);
    // The exponent is clamped so far from its limits that the power stays in the range of f32.
    let exponent = k.max(exponent, least);
    let exponent = k.min(exponent, greatest);
    let away = k.sub(exponent, bias);
    let near = k.int(TARGET_EXPONENT + 127, I32);
    let power = k.sub(near, away);
    let bits = k.shift_left(power, place);
    k.from_bits(bits)
}

/// A block's columns of packed B. Each thread moves every 16-byte piece at a distance of a block's threads.
struct PackedColumns {
    buffer: Buf,
    start: Val,
    depth: Val,
}

impl PackedColumns {
    /// Whether the step exists, and the indices of the thread's 16-byte pieces in its packed tile.
    fn places(&self, k: &mut Kernel, threads: &ThreadPosition, block: Val) -> (Val, Vec<Val>) {
        let here = k.compare(block, Order::Lt, self.depth);
        let at = k.eval(self.start + (block / DEPTH * TILE_WORDS + threads.thread * 4));
        let places = (0..VEC4_B).map(|n| k.eval(at + n * THREADS * 4));
        (here, places.collect())
    }

    fn fetch(&self, k: &mut Kernel, threads: &ThreadPosition, block: Val) -> Vec<Val> {
        let (here, places) = self.places(k, threads, block);
        places.into_iter().flat_map(|at| k.load_vec4_if(here, self.buffer, at)).collect()
    }

    fn copy(&self, k: &mut Kernel, threads: &ThreadPosition, block: Val, to: Buf) {
        let (here, places) = self.places(k, threads, block);
        for (n, at) in (0..).zip(places) {
            let place = PackedColumns::place(k, threads, n);
            k.copy_vec4_async_if(here, (self.buffer, at), (to, place));
        }
    }

    fn store_shared(&self, k: &mut Kernel, threads: &ThreadPosition, to: Buf, fetched: &[Val]) {
        for (n, words) in fetched.chunks_exact(4).enumerate() {
            let at = PackedColumns::place(k, threads, n as u64);
            for (i, &word) in words.iter().enumerate() {
                k.store_scalar(word, to, at + i as u64);
            }
        }
    }

    /// The shared-memory index of the thread's `n`th 16-byte piece.
    fn place(k: &mut Kernel, threads: &ThreadPosition, n: u64) -> Val {
        let (row, column) = (k.eval(threads.thread / (COLUMNS / 8)), k.eval(threads.thread % (COLUMNS / 8)));
        let (begin, column) = (k.eval(row * STRIDE_B), k.eval(column * 4));
        k.eval(begin + column + n * THREADS / (COLUMNS / 8) * STRIDE_B)
    }
}

/// Multiplies one stage and adds the products to a warp's fragments of sums.
fn multiply(k: &mut Kernel, tile: MmaTile, threads: &ThreadPosition, stage: Stage, sums: &[Val]) -> Vec<Val> {
    let MmaTile { half, .. } = tile;
    let mut sums: Vec<Vec<Val>> = sums.chunks_exact(SUMS).map(<[Val]>::to_vec).collect();
    let start = k.eval(threads.warp * (tile.fragments_down() * SIDE * STRIDE_A));
    for step in (0..DEPTH).step_by(SIDE as usize) {
        let left: Vec<Vec<Val>> = (0..tile.fragments_down())
            .map(|i| k.load_fragment(half, Operand::A, stage.a, start + (i * SIDE * STRIDE_A + step / 2), 2 * STRIDE_A))
            .collect();
        for j in 0..FRAGMENTS_ACROSS {
            let right = k.load_fragment(half, Operand::B, stage.b, step * STRIDE_B + j * SIDE / 2, 2 * STRIDE_B);
            for (i, left) in left.iter().enumerate() {
                let sum = &mut sums[i * FRAGMENTS_ACROSS as usize + j as usize];
                *sum = k.multiply_fragments(half, left, &right, sum);
            }
        }
    }
    sums.concat()
}

/// Stores a warp's fragments, one row of them after the other, through the warp's own part of shared memory.
fn write(k: &mut Kernel, out: &TileWriter, threads: &ThreadPosition, (row, m): (Val, Val), sums: &[Val], down: u64) {
    let own = k.eval(threads.warp * (SIDE * STRIDE_C));
    let first = k.eval(row + threads.warp * (down * SIDE));
    for (i, fragments) in sums.chunks_exact(FRAGMENTS_ACROSS as usize * SUMS).enumerate() {
        for (j, sums) in fragments.chunks_exact(SUMS).enumerate() {
            k.store_fragment(sums, out.shared, own + j as u64 * SIDE, STRIDE_C);
        }
        k.sync_lanes();
        let first = k.eval(first + i as u64 * SIDE);
        let rows = rows_left(k, (first, m), SIDE);
        out.write_all(k, rows, |k, r| {
            let at = k.eval(r * STRIDE_C);
            (k.eval(first + r), k.eval(own + at))
        });
        k.sync_lanes();
    }
}
