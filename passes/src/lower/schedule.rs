//! How a machine computes what is asked: the choices among kernels and their sizes, by the problem's sizes and what the
//! machine is.

use peft_grammar::model::Precision;
use peft_runtime::artifact::Extent;

use super::problem::Contraction;
use super::span::Rows;
use crate::builder::mma::Half;
use crate::fuse::Limits;
use crate::kernels::Schedule;
use crate::kernels::embedding::Scatter;
use crate::kernels::epilogue::Epilogue;
use crate::kernels::gemm::epilogue::Fate;
use crate::kernels::gemm::pack::Factors;
use crate::kernels::gemm::{Product, cpu, mma, simt, skinny};
use crate::kernels::rowwise::Lie;
use crate::target::cpu::Registers;
use crate::target::cuda::{Chip, TILE, WARP, WARPS};
use crate::target::{LANES, Machine};

/// Registers that are no sums: for a line of B and a number of A; where there are many, LLVM fetches the next line early,
/// if it is of several vectors, and keeps sums in memory when there is no room for it.
const SPARE: u64 = 4;
const SPARE_OF_MANY: u64 = 8;

/// A processor's tile for m × n, of which some may be known: 12 × 32, 28 × 16 or 6 × 64 on AVX-512.
fn gemm_tile(m: &Extent, n: &Extent, packed: bool, registers: Registers) -> cpu::Tile {
    let vector = LANES / registers.floats;
    let (depth, most, steps) = if vector == 1 { (384, 112, 4) } else { (256, 48, 8) };
    let tile = |vectors| {
        let spare = if registers.count > 16 && vectors > 1 { SPARE_OF_MANY } else { SPARE };
        cpu::Tile { rows: (registers.count - spare) / (vector * vectors), vectors, depth, most, steps }
    };
    let [narrow, usual, short] = if vector == 1 { [1, 2, 4] } else { [1, 1, 2] }.map(tile);
    match (m, n) {
        (_, Extent::Const(n)) if *n <= narrow.columns() => narrow,
        // Packed panels are there for other products as well.
        (Extent::Const(m), _) if *m <= short.rows && !packed => short,
        _ => usual,
    }
}

/// How a processor computes a product: its tile, and what it multiplies.
pub fn gemm_form(
    machine: Machine,
    (m, n): (&Extent, &Extent),
    columns_a: bool,
    packed: bool,
    precision: Precision,
) -> cpu::Form {
    let Machine::Cpu(cpu) = machine else { unreachable!("asked of processors alone") };
    let factors = match precision {
        Precision::F32 => Factors::F32,
        Precision::Bf16 if cpu.multiplies_bf16() => Factors::Pairs,
        Precision::Bf16 => Factors::Widened,
    };
    cpu::Form { tile: gemm_tile(m, n, packed, cpu.registers()), columns_a, packed, factors }
}

/// In what a GPU's tensor cores multiply. Before sm_80 there is no bf16.
pub fn tensor_cores(machine: Machine, precision: Precision) -> Option<Half> {
    match (machine, precision) {
        (Machine::Cpu(_), _) | (_, Precision::F32) => None,
        (Machine::Cuda(chip), Precision::Bf16) => Some(if chip >= Chip::Sm80 { Half::BF16 } else { Half::F16 }),
    }
}

/// Their tile, of a result of `n` columns, of which so many are `many`.
fn mma_form(half: Half, n: &Extent, many: u64, fours: bool) -> mma::Form {
    let few = matches!(n, Extent::Const(n) if *n < many);
    match half {
        Half::BF16 => mma::Form { half, rows: if few { mma::FEWER } else { mma::ROWS }, fours: false },
        Half::F16 => mma::Form { half, rows: mma::ROWS, fours },
    }
}

/// A GPU's tile of a product of so many rows and columns.
fn simt_tile(m: &Extent, n: &Extent) -> simt::Tile {
    let narrow = |size: &Extent| matches!(size, Extent::Const(size) if *size <= simt::NARROW);
    let (rows, columns) = match (narrow(m), narrow(n)) {
        (_, true) => (TILE, simt::NARROW),
        (true, false) => (simt::NARROW, TILE),
        (false, false) => (TILE, TILE),
    };
    simt::Tile { rows, columns }
}

/// Blocks of a product that are worth having, and how many may share a tile for that.
const BLOCKS: u64 = 128;
const SHARES: u64 = 8;

/// Split-K: how many blocks share a tile of a weight's gradient, so that there are some for most of a chip's
/// multiprocessors.
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
            (BLOCKS / tiles.max(1)).clamp(1, SHARES)
        }
        _ => 1,
    }
}

/// The tile of a product of few columns and many steps, whose rows of A do not lie side by side.
fn skinny_tile(product: &Contraction, contiguous: bool, limits: &Limits) -> Option<skinny::Tile> {
    let Contraction { n: Extent::Const(n), depth: Extent::Const(depth), batch: Extent::Const(1), .. } = product else {
        return None;
    };
    let such = *n > 0 && *n <= skinny::WIDEST && *depth >= limits.deep && !contiguous;
    such.then(|| skinny::Tile::of(*n))
}

/// What there is of attention's square at once.
#[derive(Clone, Copy, PartialEq)]
pub enum Square {
    /// Some rows, or columns: a unit is a head of a sequence.
    Rows,
    /// A tile: a unit is a block's rows.
    Tiles,
}

/// A processor's thread has its rows in the nearest cache, a GPU's block a tile in shared memory.
pub fn square(machine: Machine) -> Square {
    match machine {
        Machine::Cpu(_) => Square::Rows,
        Machine::Cuda(_) => Square::Tiles,
    }
}

/// A kernel for a product on a GPU, with its own sizes and how many units it is launched for.
pub struct Chosen {
    pub schedule: Schedule,
    pub sizes: Vec<Extent>,
    pub units: Extent,
    /// So many results are to be added up.
    pub shares: u64,
}

/// How a GPU computes a product: by tensor cores if B is packed for them, where rows of A may be read in `fours`; else by
/// the tiles of a few columns, or by large ones.
pub fn product(
    product: &Product,
    (half, fours): (Option<Half>, bool),
    fate: Fate,
    epilogue: Epilogue,
    limits: &Limits,
) -> Chosen {
    let Product { m, n, a, b, .. } = product;
    if let Some(half) = half {
        let kernel = mma::Mma { form: mma_form(half, n, limits.many, fours), fate, epilogue };
        let (sizes, units) = kernel.arguments(product);
        return Chosen { schedule: kernel.into(), sizes, units, shares: 1 };
    }
    let sizes_of =
        Contraction { m: m.clone(), n: n.clone(), depth: product.depth.clone(), batch: product.batch.clone() };
    if let Some(tile) = skinny_tile(&sizes_of, a.contiguous, limits) {
        let kernel = skinny::Skinny { tile, contiguous: b.contiguous, fate, epilogue };
        let (sizes, units) = kernel.arguments(product);
        return Chosen { schedule: kernel.into(), sizes, units, shares: 1 };
    }
    let shares = if fate == Fate::Written && product.is_dense() { split_k(&sizes_of) } else { 1 };
    let kernel = simt::Simt { tile: simt_tile(m, n), contiguous: [a.contiguous, b.contiguous], fate, epilogue };
    let (sizes, units) = kernel.arguments(product, shares);
    Chosen { schedule: kernel.into(), sizes, units, shares }
}

/// Vectors of a row that a GPU's registers hold, at most.
const HELD: u64 = 32;

/// A GPU holds a row in registers, if it can: then all of it is on its way at once.
pub fn lie(machine: Machine, rows: &Rows) -> Lie {
    match (machine, rows) {
        (_, Rows::Ragged(_)) => Lie::Ragged,
        (Machine::Cuda(_), Rows::Dense(Extent::Const(n))) if (1..=HELD).contains(&n.div_ceil(WARP)) => {
            Lie::Held(n.div_ceil(WARP))
        }
        (_, Rows::Dense(_)) => Lie::Dense,
    }
}

/// Numbers of a row of `most` scores that a thread of a GPU's team holds.
pub fn held_scores(machine: Machine, most: u64) -> Option<u64> {
    match machine {
        Machine::Cpu(_) => None,
        Machine::Cuda(_) => Some(most.div_ceil(WARP * WARPS)),
    }
}

/// Rows of a table that are few.
const FEW: u64 = 64;
/// How many units of a GPU share a table's rows: so many that few of the tokens are a unit's own.
const PARTS: u64 = 256;

/// How rows are added into a table of so many; none if a team has each of its few rows for itself.
pub fn scatter(machine: Machine, rows: Option<u64>) -> Option<Scatter> {
    match (machine, rows) {
        (Machine::Cpu(_), _) => Some(Scatter { parts: 1 }),
        (Machine::Cuda(_), Some(0..=FEW)) => None,
        (Machine::Cuda(_), _) => Some(Scatter { parts: PARTS }),
    }
}

/// Columns of a processor's unit where columns are added up.
const COLUMNS: u64 = 64;
/// Rows that a GPU's warp reads at once.
const AHEAD: u64 = 16;

/// Columns of a unit, and rows that are read at once. A GPU wants more units, and rows on their way.
pub fn columns(machine: Machine) -> (u64, u64) {
    match machine {
        Machine::Cpu(_) => (COLUMNS, 1),
        Machine::Cuda(_) => (machine.lanes(), AHEAD),
    }
}

/// Vectors of partial sums that a member of a team reads at once.
pub fn partial_sums(machine: Machine) -> u64 {
    match machine {
        Machine::Cpu(_) => 1,
        Machine::Cuda(_) => 8,
    }
}
