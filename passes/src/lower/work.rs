//! What a launch asks of a GPU, and how long it takes there by a model: no profiler has seen it.
//!
//! ```text
//! time    = START + max(memory, arithmetic)
//! memory  = bytes / min(the card's bandwidth, what the warps have on their way / LATENCY)
//! arithmetic = ⌈blocks / multiprocessors⌉ · a block's cycles / clock
//! cycles  = max(multiplications / those of a cycle, bytes of shared memory / 128)    of a tile's steps, and its way out
//! ```

use peft_runtime::artifact::Sizes;

use super::kernel::matrix::SIDE;
use super::{halves, tiles};
use crate::cuda::{Card, WARP, WARPS};

/// From the end of one launch to the first loads of the next in a graph of launches, in seconds.
const START: f64 = 1.5e-6;
/// Of memory, in seconds.
const LATENCY: f64 = 0.5e-6;
/// Bytes that a warp has on their way: two vectors of floats, or where it reads many lines at once.
const UNDER_WAY: f64 = 256.0;
const MANY_UNDER_WAY: f64 = 1024.0;
/// Bytes that shared memory gives in a cycle.
const SHARED: f64 = 128.0;
/// Cycles of a warp's multiplication whose factors come from the cache.
const CACHED: f64 = 5.0;

/// A launch's arithmetic.
#[derive(Clone, Debug, Default)]
pub struct Work {
    /// Multiplications and additions of the product asked for.
    pub flops: f64,
    /// Tensor cores compute it.
    pub half: bool,
    blocks: u64,
    /// Of a block.
    cycles: f64,
    /// Bytes of the first buffers that it reads at most.
    pub reads: Vec<f64>,
    /// Bytes on their way.
    under_way: f64,
}

impl Work {
    /// In seconds, at best.
    pub fn arithmetic(&self, card: &Card) -> f64 {
        self.flops / if self.half { card.half_flops } else { card.flops }
    }

    /// In seconds, as modelled, with `bytes` of memory.
    pub fn time(&self, card: &Card, bytes: f64) -> f64 {
        let memory = bytes / card.bandwidth.min(self.under_way / LATENCY);
        let waves = self.blocks.div_ceil(card.multiprocessors);
        START + memory.max(waves as f64 * self.cycles / card.clock)
    }
}

/// Of a launch of `kernel` for a batch: kernels are known by their names, and products have their sizes in front.
pub fn work(kernel: &str, buffers: usize, extents: &[u64], units: u64, sizes: &Sizes, card: &Card) -> Work {
    let number = |i: usize| extents[i] as f64;
    let blocks = units.div_ceil(WARPS);
    let a_cycle = |flops: f64| flops / 2.0 / card.multiprocessors as f64 / card.clock;
    if kernel.starts_with("tiles_") {
        let [m, n, depth, batches, steps] = [0, 1, 2, 5, 6].map(number);
        let step = (tiles::TILE * tiles::TILE) as f64 / a_cycle(card.flops);
        // What threads read of it for their sums, and what is put there.
        let shared = (WARP * WARPS * (tiles::ROWS + tiles::COLUMNS) + 2 * tiles::TILE) * 4;
        let out = 2.0 * (tiles::TILE * tiles::TILE * 4) as f64 / SHARED;
        let cycles = steps.min(depth) * step.max(shared as f64 / SHARED) + out;
        let flops = 2.0 * m * n * depth * batches;
        let reads = [m, n].map(|side| 4.0 * side * depth * batches).into();
        return Work { flops, half: false, blocks, cycles, reads, under_way: f64::INFINITY };
    }
    if kernel.starts_with("halves_") {
        let [m, n, depth] = [0, 1, 2].map(number);
        let step = (halves::ROWS * halves::COLUMNS * halves::DEPTH) as f64 / a_cycle(card.half_flops);
        // On sm_70 two threads hold every number of an operand.
        let copies = if kernel.starts_with("halves_f16") { 2 } else { 1 };
        let fragments = WARPS * halves::DEPTH / SIDE * (halves::DOWN + halves::ACROSS) * copies;
        let shared = (fragments * SIDE * SIDE + (halves::ROWS + halves::COLUMNS) * halves::DEPTH) * 2;
        let out = 2.0 * (halves::ROWS * halves::COLUMNS * 4) as f64 / SHARED;
        let steps = (depth / halves::DEPTH as f64).ceil();
        let cycles = steps * step.max(shared as f64 / SHARED) + out;
        let reads = vec![4.0 * m * depth, 2.0 * n * depth];
        return Work { flops: 2.0 * m * n * depth, half: true, blocks, cycles, reads, under_way: f64::INFINITY };
    }
    if kernel.starts_with("attention") {
        let [width, wide, sequences] = [1, 2, 3].map(number);
        let half = if kernel.contains("_causal") { 0.5 } else { 1.0 };
        // Numbers of a pair of a query and a key that are asked for, and that are multiplied for it.
        let (asked, done) = match kernel {
            _ if kernel.starts_with("attention_vjp0") => (width + wide, 2.0 * width + wide),
            _ if kernel.starts_with("attention_vjp1") => (width, 2.0 * width + wide),
            _ if kernel.starts_with("attention_vjp2") => (wide, width + wide),
            _ if kernel.starts_with("attention_lse") => (0.0, width),
            _ => (width + wide, width + wide),
        };
        let pairs = sizes.pairs as f64 * half;
        let each = pairs / sequences.max(1.0) * done / (WARP * WARPS) as f64;
        let heads = blocks as f64 / sequences.max(1.0);
        let under_way = units as f64 * MANY_UNDER_WAY;
        // Places of its own, as far as the batch's lengths take them.
        let place = |width: f64| 4.0 * heads * sizes.tokens as f64 * width;
        let rows = 4.0 * 2.0 * 4.0 * units as f64 * sizes.tokens as f64 / sequences.max(1.0);
        let mut reads = vec![f64::INFINITY; buffers - 5];
        reads.extend([place(width), place(wide), place(width.max(wide)), rows]);
        let flops = 2.0 * asked * pairs * heads;
        return Work { flops, blocks, cycles: each * CACHED, reads, under_way, ..Work::default() };
    }
    let (reads, each) = match kernel {
        // A table is not read whole.
        "gather" => (vec![4.0 * number(1) * units as f64], UNDER_WAY),
        "sum_columns" | "mean_columns" => (vec![], MANY_UNDER_WAY),
        // Of the tokens' rows those that train.
        "scatter" => (vec![4.0 * number(0), 4.0 * number(1) * number(2)], UNDER_WAY),
        _ => (vec![], UNDER_WAY),
    };
    Work { reads, under_way: units as f64 * each, ..Work::default() }
}
