//! Scheduling: chooses the kernel for an operation, and its tile sizes, by the operation's sizes and the target
//! machine. This is the one file of the lowering that matches on the machine.

use peft_grammar::model::Precision;
use peft_runtime::artifact::Extent;

use super::contraction::Contraction;
use super::row_layout::RowLayout;
use crate::builder::mma::Half;
use crate::fuse::Thresholds;
use crate::kernels::Schedule;
use crate::kernels::embedding::Scatter;
use crate::kernels::epilogue::Epilogue;
use crate::kernels::gemm::epilogue::ResultMode;
use crate::kernels::gemm::pack::OperandFormat;
use crate::kernels::gemm::{Product, cpu, mma, simt, skinny};
use crate::kernels::rowwise::RowStorage;
use crate::target::cpu::Registers;
use crate::target::cuda::{Chip, GEMM_TILE, WARP, WARPS};
use crate::target::{LANES, Machine};

/// Vector registers of the micro-kernel that hold no accumulators: they hold a row of B and a broadcast element of A.
/// With 32 registers LLVM also prefetches the next row of B if that has several vectors, and it spills accumulators
/// without registers for that.
const SPARE_REGISTERS: u64 = 4;
const SPARE_REGISTERS_WITH_PREFETCH: u64 = 8;

/// The micro-kernel's tile for an m × n result, either of which may be constant: 12 × 32, 28 × 16 or 6 × 64 on AVX-512.
fn gemm_tile(m: &Extent, n: &Extent, packed: bool, registers: Registers) -> cpu::Tile {
    let vector = LANES / registers.floats;
    let (depth, most, steps) = if vector == 1 { (384, 112, 4) } else { (256, 48, 8) };
    let tile = |vectors| {
        let spare = if registers.count > 16 && vectors > 1 { SPARE_REGISTERS_WITH_PREFETCH } else { SPARE_REGISTERS };
        cpu::Tile {
            rows: (registers.count - spare) / (vector * vectors),
            vectors,
            k_block: depth,
            max_rows: most,
            unroll: steps,
        }
    };
    let [narrow, usual, short] = if vector == 1 { [1, 2, 4] } else { [1, 1, 2] }.map(tile);
    match (m, n) {
        (_, Extent::Const(n)) if *n <= narrow.columns() => narrow,
        // Panels that are packed once serve gemms of any m, so their width must not depend on m.
        (Extent::Const(m), _) if *m <= short.rows && !packed => short,
        _ => usual,
    }
}

/// How a processor computes a gemm: the micro-kernel's tile, the operand layouts, and the number format.
pub fn cpu_gemm_shape(
    machine: Machine,
    (m, n): (&Extent, &Extent),
    a_column_major: bool,
    packed: bool,
    precision: Precision,
) -> cpu::CpuGemmShape {
    let Machine::Cpu(cpu) = machine else { unreachable!("only a processor has CPU gemms") };
    let format = match precision {
        Precision::F32 => OperandFormat::F32,
        Precision::Bf16 if cpu.has_bf16_dot() => OperandFormat::Bf16Pairs,
        Precision::Bf16 => OperandFormat::Bf16Widened,
    };
    cpu::CpuGemmShape { tile: gemm_tile(m, n, packed, cpu.registers()), a_column_major, packed, format }
}

/// The type in which a GPU's tensor cores multiply, if they are used: before sm_80 they have no bf16, so it is f16.
pub fn tensor_cores(machine: Machine, precision: Precision) -> Option<Half> {
    match (machine, precision) {
        (Machine::Cpu(_), _) | (_, Precision::F32) => None,
        (Machine::Cuda(chip), Precision::Bf16) => Some(if chip >= Chip::Sm80 { Half::BF16 } else { Half::F16 }),
    }
}

/// The tensor cores' tile for a result of `n` columns. A result of at least `large_columns` gets the tile of more rows.
fn mma_tile(half: Half, n: &Extent, large_columns: u64, vec4: bool) -> mma::MmaTile {
    let is_narrow = matches!(n, Extent::Const(n) if *n < large_columns);
    match half {
        Half::BF16 => mma::MmaTile { half, rows: if is_narrow { mma::FEWER_ROWS } else { mma::ROWS }, vec4: false },
        Half::F16 => mma::MmaTile { half, rows: mma::ROWS, vec4 },
    }
}

/// The SIMT gemm's tile for a result of m × n.
fn simt_tile(m: &Extent, n: &Extent) -> simt::Tile {
    let narrow = |size: &Extent| matches!(size, Extent::Const(size) if *size <= simt::NARROW_SIDE);
    let (rows, columns) = match (narrow(m), narrow(n)) {
        (_, true) => (GEMM_TILE, simt::NARROW_SIDE),
        (true, false) => (simt::NARROW_SIDE, GEMM_TILE),
        (false, false) => (GEMM_TILE, GEMM_TILE),
    };
    simt::Tile { rows, columns }
}

/// The number of thread blocks that split-K aims at: about one for each multiprocessor.
const SPLIT_K_BLOCKS: u64 = 128;
/// The most blocks that split the k axis of one tile.
const MAX_SPLIT_K: u64 = 8;

/// Split-K: the number of blocks among which the k axis of each tile is divided, so that most multiprocessors have
/// work. It applies to gradients of weights, whose k axis is the tokens; everything else gives 1.
pub fn split_k(product: &Contraction) -> u64 {
    match *product {
        Contraction {
            m: Extent::Const(m),
            n: Extent::Const(n),
            depth: Extent::Tokens,
            batch: Extent::Const(batch),
        } => {
            let tile = simt_tile(&product.m, &product.n);
            let tiles = batch * m.div_ceil(tile.rows) * n.div_ceil(tile.columns);
            (SPLIT_K_BLOCKS / tiles.max(1)).clamp(1, MAX_SPLIT_K)
        }
        _ => 1,
    }
}

/// The tile of the skinny gemm, for a product of few columns and a long k axis in which A's element stride along i is
/// not 1; `None` for every other product.
fn skinny_tile(product: &Contraction, contiguous: bool, thresholds: &Thresholds) -> Option<skinny::Tile> {
    let Contraction { n: Extent::Const(n), depth: Extent::Const(depth), batch: Extent::Const(1), .. } = product else {
        return None;
    };
    let is_skinny = *n > 0 && *n <= skinny::MAX_COLUMNS && *depth >= thresholds.min_split_k_depth && !contiguous;
    is_skinny.then(|| skinny::Tile::of(*n))
}

/// How much of the score matrix fused attention holds at once; the whole matrix is never materialised.
#[derive(Clone, Copy, PartialEq)]
pub enum AttentionTiling {
    /// A few rows or columns. A unit is one head of one sequence.
    Rows,
    /// A square tile. A unit is one warp of a thread block, which has the rows of one tile.
    Tiles,
}

/// On a processor the rows stay in a thread's L1 cache, on a GPU the tile is in a block's shared memory.
pub fn attention_tiling(machine: Machine) -> AttentionTiling {
    match machine {
        Machine::Cpu(_) => AttentionTiling::Rows,
        Machine::Cuda(_) => AttentionTiling::Tiles,
    }
}

/// The kernel chosen for a gemm on a GPU, with its arguments.
pub struct ScheduledGemm {
    /// The kernel.
    pub schedule: Schedule,
    /// The kernel's sizes, before those of its epilogue.
    pub sizes: Vec<Extent>,
    /// The number of units, one for each warp.
    pub units: Extent,
    /// The split-K factor: if it exceeds 1, the launch stores this many partial results, which are still to be summed.
    pub splits: u64,
}

/// How a GPU computes a gemm: on tensor cores if B is packed in half precision (with `vec4`, A's rows allow 16-byte
/// loads); otherwise by the skinny gemm or the SIMT gemm.
pub fn gpu_gemm(
    product: &Product,
    (half, vec4): (Option<Half>, bool),
    mode: ResultMode,
    epilogue: Epilogue,
    thresholds: &Thresholds,
) -> ScheduledGemm {
    let Product { m, n, a, b, .. } = product;
    if let Some(half) = half {
        let kernel = mma::Mma { tile: mma_tile(half, n, thresholds.min_large_tile_columns, vec4), mode, epilogue };
        let (sizes, units) = kernel.arguments(product);
        return ScheduledGemm { schedule: kernel.into(), sizes, units, splits: 1 };
    }
    let contraction =
        Contraction { m: m.clone(), n: n.clone(), depth: product.depth.clone(), batch: product.batch.clone() };
    if let Some(tile) = skinny_tile(&contraction, a.contiguous, thresholds) {
        let kernel = skinny::Skinny { tile, contiguous: b.contiguous, mode, epilogue };
        let (sizes, units) = kernel.arguments(product);
        return ScheduledGemm { schedule: kernel.into(), sizes, units, splits: 1 };
    }
    let splits = if mode == ResultMode::Overwrite && product.is_dense() { split_k(&contraction) } else { 1 };
    let kernel = simt::Simt { tile: simt_tile(m, n), contiguous: [a.contiguous, b.contiguous], mode, epilogue };
    let (sizes, units) = kernel.arguments(product, splits);
    ScheduledGemm { schedule: kernel.into(), sizes, units, splits }
}

/// The longest row that a warp holds in registers, in elements for each lane.
const MAX_ELEMENTS_PER_LANE: u64 = 32;

/// Where normalization keeps a row. A GPU holds it in registers if it fits, so that all of its loads are in flight at
/// once.
pub fn row_storage(machine: Machine, rows: &RowLayout) -> RowStorage {
    match (machine, rows) {
        (_, RowLayout::Ragged(_)) => RowStorage::Ragged,
        (Machine::Cuda(_), RowLayout::Dense(Extent::Const(n)))
            if (1..=MAX_ELEMENTS_PER_LANE).contains(&n.div_ceil(WARP)) =>
        {
            RowStorage::InRegisters(n.div_ceil(WARP))
        }
        (_, RowLayout::Dense(_)) => RowStorage::Dense,
    }
}

/// The number of scores that each thread of a GPU's block holds of a row of `most`; a processor holds none.
pub fn scores_per_thread(machine: Machine, most: u64) -> Option<u64> {
    match machine {
        Machine::Cpu(_) => None,
        Machine::Cuda(_) => Some(most.div_ceil(WARP * WARPS)),
    }
}

/// The most rows of a table for which each block owns one row.
const SMALL_TABLE_ROWS: u64 = 64;
/// The number of parts among which a GPU divides a table's rows: so many that each part gets few of the tokens.
const SCATTER_PARTS: u64 = 256;

/// How `scatter` adds rows into a table with this number of rows; `None` for a small table on a GPU, where each block
/// owns one row.
pub fn scatter(machine: Machine, rows: Option<u64>) -> Option<Scatter> {
    match (machine, rows) {
        (Machine::Cpu(_), _) => Some(Scatter { parts: 1 }),
        (Machine::Cuda(_), Some(0..=SMALL_TABLE_ROWS)) => None,
        (Machine::Cuda(_), _) => Some(Scatter { parts: SCATTER_PARTS }),
    }
}

/// Columns of one unit of a column sum on a processor.
const CPU_SUM_COLUMNS: u64 = 64;
/// Rows of a column sum that a GPU's warp has in flight at once.
const GPU_SUM_ROWS: u64 = 16;

/// For a column sum: the columns of one unit, and the rows whose loads are in flight at once. A GPU needs narrower
/// units, to have more of them, and several rows in flight.
pub fn column_sum_shape(machine: Machine) -> (u64, u64) {
    match machine {
        Machine::Cpu(_) => (CPU_SUM_COLUMNS, 1),
        Machine::Cuda(_) => (machine.lanes(), GPU_SUM_ROWS),
    }
}

/// Vectors of partial sums that each unit of a team loads at once.
pub fn partial_sum_vectors(machine: Machine) -> u64 {
    match machine {
        Machine::Cpu(_) => 1,
        Machine::Cuda(_) => 8,
    }
}
