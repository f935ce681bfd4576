//! What a launch asks of a GPU, and how long it takes there by a model, which knows nothing of what a block waits for.
//!
//! ```text
//! time    = START + max(memory, cache, arithmetic)
//! memory  = bytes / min(the card's bandwidth, what the warps have on their way / LATENCY)
//! cache   = bytes that a product's blocks fetch for their tiles / the bandwidth of the second-level cache
//! arithmetic = Σ waves of so many blocks as there are multiprocessors, cycles of the longest block / clock
//! cycles  = max(multiplications / those of a cycle, bytes of shared memory / 128)    of a tile's steps, and its way out
//! ```

use peft_runtime::artifact::Sizes;

use super::epilogue::ROW;
use super::narrow::Narrow;
use super::tiles::{Fate, Tile};
use super::{TIMES, halves, optimizer, squares};
use crate::builder::mma::SIDE;
use crate::target::cuda::{Card, WARP, WARPS};

/// From the end of one launch to the first loads of the next in a graph of launches, in seconds.
const START: f64 = 1.5e-6;
/// Of memory, in seconds.
const LATENCY: f64 = 0.5e-6;
/// Bytes that a warp has on their way: two vectors of floats, or where it reads many lines at once.
const UNDER_WAY: f64 = 256.0;
const MANY_UNDER_WAY: f64 = 1024.0;
/// Bytes that shared memory gives in a cycle.
const SHARED: f64 = 128.0;
/// Instructions that make a weight of a score, and that decide whether it is dropped.
const EXPONENTIAL: f64 = 30.0;
const DRAW: f64 = 30.0;

/// A launch's arithmetic.
#[derive(Clone, Debug, Default)]
pub struct Work {
    /// Multiplications and additions of the product asked for.
    pub flops: f64,
    /// Tensor cores compute it.
    pub half: bool,
    /// How many blocks, and of how many cycles each, in their order.
    blocks: Vec<(u64, f64)>,
    /// Bytes of the first buffers that it reads at most.
    pub reads: Vec<f64>,
    /// By buffer, how often its bytes move: twice if they are read and written anew.
    pub passes: Vec<f64>,
    /// Bytes on their way.
    under_way: f64,
    /// Bytes that blocks fetch, each for itself.
    fetched: f64,
}

impl Work {
    /// In seconds, at best.
    pub fn arithmetic(&self, card: &Card) -> f64 {
        self.flops / if self.half { card.half_flops } else { card.flops }
    }

    /// In seconds, as modelled, with `bytes` of memory.
    pub fn time(&self, card: &Card, bytes: f64) -> f64 {
        let memory = bytes / card.bandwidth.min(self.under_way / LATENCY);
        let blocks = self.blocks.iter().flat_map(|&(blocks, cycles)| std::iter::repeat_n(cycles, blocks as usize));
        let blocks: Vec<f64> = blocks.collect();
        let waves = blocks.chunks(card.multiprocessors as usize);
        let cycles: f64 = waves.map(|wave| wave.iter().copied().fold(0.0, f64::max)).sum();
        START + memory.max(self.fetched / card.cache).max(cycles / card.clock)
    }

    /// Both in one launch.
    fn beside(mut self, other: Work) -> Work {
        self.flops += other.flops;
        self.blocks.extend(other.blocks);
        self.reads.extend(other.reads);
        self.passes.extend(other.passes);
        self.under_way += other.under_way;
        self.fetched += other.fetched;
        self
    }
}

/// Of a launch of `kernel` for a batch: kernels are known by their names, and products have their sizes in front.
pub fn work(kernel: &str, buffers: usize, extents: &[u64], units: u64, sizes: &Sizes, card: &Card) -> Work {
    let times = |(kernel, launches): (&str, &str)| Some((kernel.to_string(), launches.parse::<usize>().ok()?));
    let Some((kernel, launches)) = kernel.rsplit_once(TIMES).and_then(times) else {
        return of_one(kernel, buffers, extents, units, sizes, card);
    };
    let buffers = buffers / launches;
    let each = extents.chunks_exact(extents.len() / launches).map(|extents| {
        let (&units, extents) = extents.split_last().expect("a launch has units");
        let mut work = of_one(&kernel, buffers, extents, units, sizes, card);
        work.reads.resize(buffers, f64::INFINITY);
        work
    });
    each.reduce(Work::beside).expect("some launches")
}

/// Cycles that a tile of a product takes on its way out, through shared memory. Lanes that add up a row change places, as
/// many at a time as that gives.
fn way_out(kernel: &str, rows: u64, columns: u64) -> f64 {
    let changed = if kernel.contains(ROW) { WARP * u64::from(WARP.ilog2()) } else { 0 };
    (rows * (2 * columns + changed) * 4) as f64 / SHARED
}

fn of_one(kernel: &str, buffers: usize, extents: &[u64], units: u64, sizes: &Sizes, card: &Card) -> Work {
    let anew: &[usize] = match optimizer::anew(kernel) {
        Some(swept) => swept,
        _ if kernel.starts_with("linear_mean_block") => &[0],
        _ if kernel.contains(Fate::Added.suffix()) => &[2],
        _ => &[],
    };
    let passes = (0..buffers).map(|buffer| if anew.contains(&buffer) { 2.0 } else { 1.0 }).collect();
    Work { passes, ..counted(kernel, buffers, extents, units, sizes, card) }
}

fn counted(kernel: &str, buffers: usize, extents: &[u64], units: u64, sizes: &Sizes, card: &Card) -> Work {
    let number = |i: usize| extents[i] as f64;
    let blocks = units.div_ceil(WARPS);
    let a_cycle = |flops: f64| flops / 2.0 / card.multiprocessors as f64 / card.clock;
    if let Some(tile) = Tile::named(kernel) {
        let [m, n, depth, batches, steps] = [0, 1, 2, 5, 6].map(number);
        let step = tile.elements() as f64 / a_cycle(card.flops);
        let out = way_out(kernel, tile.rows, tile.columns);
        let cycles = steps.min(depth) * step.max((tile.moved() * 4) as f64 / SHARED) + out;
        let flops = 2.0 * m * n * depth * batches;
        let reads = [m, n].map(|side| 4.0 * side * depth * batches).into();
        let fetched = blocks as f64 * steps.min(depth) * ((tile.rows + tile.columns) * 4) as f64;
        let blocks = vec![(blocks, cycles)];
        return Work { flops, blocks, reads, under_way: f64::INFINITY, fetched, ..Work::default() };
    }
    if let Some(narrow) = Narrow::named(kernel) {
        let [m, n, depth] = [0, 1, 2].map(number);
        let step = narrow.elements() as f64 / a_cycle(card.flops);
        let shared = |floats: u64| (floats * 4) as f64 / SHARED;
        let cycles = Narrow::steps(extents[2]) as f64 * step.max(shared(narrow.moved())) + shared(narrow.added());
        let reads = vec![4.0 * m * depth, 4.0 * n * depth];
        let under_way = (units * Narrow::under_way()) as f64;
        let (flops, blocks) = (2.0 * m * n * depth, vec![(blocks, cycles)]);
        return Work { flops, blocks, reads, under_way, ..Work::default() };
    }
    if let Some(form) = halves::Form::named(kernel) {
        let [m, n, depth] = [0, 1, 2].map(number);
        let step = (form.rows * halves::COLUMNS * halves::DEPTH) as f64 / a_cycle(card.half_flops);
        // On sm_70 two threads hold every number of an operand.
        let copies = if form.copies() { 1 } else { 2 };
        let fragments = WARPS * halves::DEPTH / SIDE * (form.down() + halves::ACROSS) * copies;
        let shared = (fragments * SIDE * SIDE + (form.rows + halves::COLUMNS) * halves::DEPTH) * 2;
        let out = way_out(kernel, form.rows, halves::COLUMNS);
        let steps = (depth / halves::DEPTH as f64).ceil();
        let cycles = steps * step.max(shared as f64 / SHARED) + out;
        let number_of_a = if form.copies() { 2.0 } else { 4.0 };
        let reads = vec![number_of_a * m * depth, 2.0 * n * depth];
        let fetched = blocks as f64 * depth * (number_of_a * form.rows as f64 + 2.0 * halves::COLUMNS as f64);
        let (flops, blocks) = (2.0 * m * n * depth, vec![(blocks, cycles)]);
        return Work { flops, half: true, blocks, reads, under_way: f64::INFINITY, fetched, ..Work::default() };
    }
    if kernel.starts_with("attention") {
        let [width, wide, sequences] = [0, 1, 2].map(number);
        let [blocks_each, panels] = [2, 1].map(|i| number(extents.len() - i));
        let causal = kernel.contains("_causal");
        // Numbers of a pair of a query and a key that are asked for; by kind of block how long the products are that make
        // its weight, and how wide those with it; and how wide the results are.
        let queries = (vec![width, wide], vec![width]);
        let (asked, kinds, results) = match kernel {
            _ if kernel.starts_with("attention_vjp012") => {
                let keys = (vec![width, wide], vec![width, wide]);
                (2.0 * (width + wide), vec![keys, queries], vec![width, width, wide])
            }
            _ if kernel.starts_with("attention_vjp0") => (width + wide, vec![queries], vec![width]),
            _ if kernel.starts_with("attention_vjp12") => {
                (width + wide, vec![(vec![width, wide], vec![width, wide])], vec![width, wide])
            }
            _ if kernel.starts_with("attention_vjp1") => (width, vec![(vec![width, wide], vec![width])], vec![width]),
            _ if kernel.starts_with("attention_vjp2") => (wide, vec![(vec![width], vec![wide])], vec![wide]),
            _ if kernel.starts_with("attention_lse") => (0.0, vec![(vec![width], vec![])], vec![1.0]),
            _ if kernel.starts_with("attention_and") => {
                (width + wide, vec![(vec![width], vec![wide])], vec![wide, 1.0])
            }
            _ => (width + wide, vec![(vec![width], vec![wide])], vec![wide]),
        };
        let blocks = blocks / kinds.len() as u64;
        let heads = blocks as f64 / blocks_each / panels;
        // Of a sequence: tiles, and the warps' parts of them.
        let [tiles, parts] = [squares::TILE, squares::PART].map(|side| {
            let along = (sizes.tokens as f64 / sequences.max(1.0) / side as f64).ceil();
            if causal { along * (along + 1.0) / 2.0 } else { along * along }
        });
        let whole = |widths: &[f64], of: u64| widths.iter().map(|n| (n / of as f64).ceil() * of as f64).sum::<f64>();
        let draws = !kernel.ends_with("_0");
        let weights = panels * (EXPONENTIAL + if draws { DRAW } else { 0.0 });
        let cycles = |(scored, weighted): (Vec<f64>, Vec<f64>)| {
            let scored = panels * whole(&scored, squares::DEPTH);
            let (columns, products) = (whole(&weighted, squares::PART), weighted.len() as f64);
            let multiplied = parts * (scored + columns + weights) * (squares::PART * squares::PART) as f64;
            // What threads read of it for their sums, and what is put there.
            let read = parts * (scored + columns) * (WARP * (squares::ROWS + squares::COLUMNS) * 4) as f64;
            let put = tiles * (2.0 * scored + columns) * (squares::TILE * 4) as f64;
            // Weights pass through it as well, and an adjoint's scores.
            let passed = if kernel.starts_with("attention_vjp") { 2.0 + products } else { products };
            let put = put + panels * passed * parts * (squares::PART * squares::PART * 4) as f64;
            let cycles = (multiplied / a_cycle(card.flops)).max((read + put) / SHARED);
            (blocks, cycles * sequences / blocks_each / panels)
        };
        let mut reads = vec![f64::INFINITY; buffers - 1 - results.len()];
        reads.extend(results.iter().map(|columns| 4.0 * heads * sizes.tokens as f64 * columns));
        let half = if causal { 0.5 } else { 1.0 };
        let flops = 2.0 * asked * sizes.pairs as f64 * half * heads;
        let (blocks, under_way) = (kinds.into_iter().map(cycles).collect(), units as f64 * MANY_UNDER_WAY);
        return Work { flops, blocks, reads, under_way, ..Work::default() };
    }
    let (reads, each) = match kernel {
        // A table is not read whole.
        "gather" => (vec![4.0 * number(1) * units as f64], UNDER_WAY),
        "sum_columns" | "mean_columns" | "root_of_sum" => (vec![], MANY_UNDER_WAY),
        // A whole row of each operand.
        _ if kernel.contains("_held") => (vec![], MANY_UNDER_WAY),
        // Of the tokens' rows those that train.
        "scatter_to_few" => (vec![4.0 * number(0), 4.0 * number(1) * (units / WARPS) as f64], MANY_UNDER_WAY),
        "scatter" => (vec![4.0 * number(0), 4.0 * number(1) * number(2)], UNDER_WAY),
        _ => (vec![], UNDER_WAY),
    };
    Work { reads, under_way: units as f64 * each, ..Work::default() }
}
