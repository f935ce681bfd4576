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

use crate::builder::mma::SIDE;
use crate::kernels::attention::gpu as attention;
use crate::kernels::attention::shape::{HeadSizes, Part};
use crate::kernels::chunked_logits::Block;
use crate::kernels::embedding::{FewSizes, Gather, GatherSizes, ScatterSizes};
use crate::kernels::epilogue::Epilogue;
use crate::kernels::gemm::epilogue::Fate;
use crate::kernels::gemm::{mma, simt, skinny};
use crate::kernels::rowwise::{Lie, Normalize};
use crate::kernels::{Function, Schedule};
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

/// A launch for a batch, by the values of its arguments.
#[derive(Clone, Copy)]
pub struct Launched<'a> {
    /// How many there are.
    pub buffers: usize,
    pub sizes: &'a [u64],
    pub units: u64,
    pub batch: &'a Sizes,
}

/// Of a launch of `function`.
pub fn cost(function: &Function, launched: Launched, card: &Card) -> Work {
    let Function { schedule, launches } = function;
    if *launches == 1 {
        return of_one(schedule, launched, card);
    }
    let buffers = launched.buffers / launches;
    let each = launched.sizes.chunks_exact(launched.sizes.len() / launches).map(|sizes| {
        let (&units, sizes) = sizes.split_last().expect("a launch has units");
        let mut work = of_one(schedule, Launched { buffers, sizes, units, ..launched }, card);
        work.reads.resize(buffers, f64::INFINITY);
        work
    });
    each.reduce(Work::beside).expect("some launches")
}

/// Which of the buffers are read and written anew.
fn anew(schedule: &Schedule) -> Vec<usize> {
    let added = |fate: Fate| if fate == Fate::Added { vec![2] } else { vec![] };
    match schedule {
        Schedule::Sweep(sweep) => sweep.anew(),
        Schedule::AddWeighted(_) | Schedule::LogitsBlock(Block { mean: true, .. }) => vec![0],
        Schedule::Simt(product) => added(product.fate),
        Schedule::Skinny(product) => added(product.fate),
        Schedule::Mma(product) => added(product.fate),
        _ => vec![],
    }
}

fn of_one(schedule: &Schedule, launched: Launched, card: &Card) -> Work {
    let anew = anew(schedule);
    let passes = (0..launched.buffers).map(|buffer| if anew.contains(&buffer) { 2.0 } else { 1.0 }).collect();
    Work { passes, ..counted(schedule, launched, card) }
}

/// Cycles that a tile of a product takes on its way out, through shared memory. Lanes that add up a row change places, as
/// many at a time as that gives.
fn way_out(epilogue: &Epilogue, rows: u64, columns: u64) -> f64 {
    let changed = if epilogue.sum.is_some() { WARP * u64::from(WARP.ilog2()) } else { 0 };
    (rows * (2 * columns + changed) * 4) as f64 / SHARED
}

/// Cycles of so many operations in `f32` on one multiprocessor, or in half precision.
fn cycles(flops: f64, card: &Card, of_card: f64) -> f64 {
    flops / (of_card / 2.0 / card.multiprocessors as f64 / card.clock)
}

fn counted(schedule: &Schedule, launched: Launched, card: &Card) -> Work {
    let Launched { sizes, units, .. } = launched;
    let float = |n: u64| n as f64;
    let waiting = |under_way: f64| Work { under_way: units as f64 * under_way, ..Work::default() };
    match schedule {
        Schedule::Simt(product) => simt(product, launched, card),
        Schedule::Skinny(product) => skinny(product, launched, card),
        Schedule::Mma(product) => mma(product, launched, card),
        Schedule::GpuAttention(attention) => attend(attention, launched, card),
        // A table is not read whole.
        Schedule::Gather(Gather { panels: None }) => {
            let GatherSizes { width, .. } = GatherSizes::of(sizes).map(float);
            Work { reads: vec![4.0 * width * units as f64], ..waiting(UNDER_WAY) }
        }
        // Of the tokens' rows those that train.
        Schedule::ScatterToFew(_) => {
            let FewSizes { count, width, .. } = FewSizes::of(sizes).map(float);
            Work { reads: vec![4.0 * count, 4.0 * width * (units / WARPS) as f64], ..waiting(MANY_UNDER_WAY) }
        }
        Schedule::Scatter(_) => {
            let ScatterSizes { count, rows, width, .. } = ScatterSizes::of(sizes).map(float);
            Work { reads: vec![4.0 * count, 4.0 * rows * width], ..waiting(UNDER_WAY) }
        }
        // Many rows at once, or a whole row of each operand.
        Schedule::SumColumns(_)
        | Schedule::RootOfSum(_)
        | Schedule::Normalize(Normalize { lie: Lie::Held(_), .. })
        | Schedule::LogitsBlock(Block { held: Some(_), .. }) => waiting(MANY_UNDER_WAY),
        Schedule::Elementwise(_)
        | Schedule::Along(_)
        | Schedule::Normalize(_)
        | Schedule::RowSums(_)
        | Schedule::SumRows(_)
        | Schedule::CrossEntropy(_)
        | Schedule::SegmentMean(_)
        | Schedule::Gather(_)
        | Schedule::CopyView(_)
        | Schedule::CopyRagged(_)
        | Schedule::Pad(_)
        | Schedule::Gemm(_)
        | Schedule::Pack(_)
        | Schedule::PackHalves(_)
        | Schedule::Round(_)
        | Schedule::Scores(_)
        | Schedule::Attend(_)
        | Schedule::CpuAttention(_)
        | Schedule::LogitsBlock(_)
        | Schedule::LogitsEnd(_)
        | Schedule::SumOfSquares(_)
        | Schedule::Sweep(_)
        | Schedule::AddWeighted(_) => waiting(UNDER_WAY),
    }
}

fn simt(product: &simt::Simt, Launched { sizes, units, .. }: Launched, card: &Card) -> Work {
    let simt::Simt { tile, epilogue, .. } = product;
    let simt::Sizes { m, n, depth, batches, steps, .. } = simt::Sizes::of(sizes).map(|n| n as f64);
    let blocks = units.div_ceil(WARPS);
    let step = cycles(tile.elements() as f64, card, card.flops);
    let out = way_out(epilogue, tile.rows, tile.columns);
    let cycles = steps.min(depth) * step.max((tile.moved() * 4) as f64 / SHARED) + out;
    let flops = 2.0 * m * n * depth * batches;
    let reads = [m, n].map(|side| 4.0 * side * depth * batches).into();
    let fetched = blocks as f64 * steps.min(depth) * ((tile.rows + tile.columns) * 4) as f64;
    let blocks = vec![(blocks, cycles)];
    Work { flops, blocks, reads, under_way: f64::INFINITY, fetched, ..Work::default() }
}

fn skinny(product: &skinny::Skinny, Launched { sizes, units, .. }: Launched, card: &Card) -> Work {
    let tile = product.tile;
    let steps = skinny::Tile::steps(skinny::Sizes::of(sizes).depth);
    let skinny::Sizes { m, n, depth, .. } = skinny::Sizes::of(sizes).map(|n| n as f64);
    let step = cycles(tile.elements() as f64, card, card.flops);
    let shared = |floats: u64| (floats * 4) as f64 / SHARED;
    let cycles = steps as f64 * step.max(shared(tile.moved())) + shared(tile.added());
    let reads = vec![4.0 * m * depth, 4.0 * n * depth];
    let under_way = (units * skinny::Tile::under_way()) as f64;
    let (flops, blocks) = (2.0 * m * n * depth, vec![(units.div_ceil(WARPS), cycles)]);
    Work { flops, blocks, reads, under_way, ..Work::default() }
}

fn mma(product: &mma::Mma, Launched { sizes, units, .. }: Launched, card: &Card) -> Work {
    let mma::Mma { form, epilogue, .. } = product;
    let mma::Sizes { m, n, depth, .. } = mma::Sizes::of(sizes).map(|n| n as f64);
    let blocks = units.div_ceil(WARPS);
    let step = cycles((form.rows * mma::COLUMNS * mma::DEPTH) as f64, card, card.half_flops);
    // On sm_70 two threads hold every number of an operand.
    let copies = if form.copies() { 1 } else { 2 };
    let fragments = WARPS * mma::DEPTH / SIDE * (form.down() + mma::ACROSS) * copies;
    let shared = (fragments * SIDE * SIDE + (form.rows + mma::COLUMNS) * mma::DEPTH) * 2;
    let out = way_out(epilogue, form.rows, mma::COLUMNS);
    let steps = (depth / mma::DEPTH as f64).ceil();
    let cycles = steps * step.max(shared as f64 / SHARED) + out;
    let number_of_a = if form.copies() { 2.0 } else { 4.0 };
    let reads = vec![number_of_a * m * depth, 2.0 * n * depth];
    let fetched = blocks as f64 * depth * (number_of_a * form.rows as f64 + 2.0 * mma::COLUMNS as f64);
    let (flops, blocks) = (2.0 * m * n * depth, vec![(blocks, cycles)]);
    Work { flops, half: true, blocks, reads, under_way: f64::INFINITY, fetched, ..Work::default() }
}

fn attend(kernel: &attention::GpuAttention, launched: Launched, card: &Card) -> Work {
    let attention::GpuAttention { part, form } = kernel;
    let Launched { buffers, sizes, units, batch } = launched;
    let HeadSizes { width, wide, count: sequences, .. } = HeadSizes::of(sizes).map(|n| n as f64);
    let (_, last) = attention::BlockSizes::split_last(sizes);
    let attention::BlockSizes { blocks: blocks_each, panels } = last.map(|n| n as f64);
    // Numbers of a pair of a query and a key that are asked for; by kind of block how long the products are that make
    // its weight, and how wide those with it; and how wide the results are.
    let queries = (vec![width, wide], vec![width]);
    let keys = (vec![width, wide], vec![width, wide]);
    let (asked, kinds, results) = match part {
        Part::All => (2.0 * (width + wide), vec![keys, queries], vec![width, width, wide]),
        Part::Sides => (width + wide, vec![keys], vec![width, wide]),
        Part::Adjoint(0) => (width + wide, vec![queries], vec![width]),
        Part::Adjoint(1) => (width, vec![queries], vec![width]),
        Part::Adjoint(_) => (wide, vec![(vec![width], vec![wide])], vec![wide]),
        Part::Lse => (0.0, vec![(vec![width], vec![])], vec![1.0]),
        Part::Both => (width + wide, vec![(vec![width], vec![wide])], vec![wide, 1.0]),
        Part::Forward => (width + wide, vec![(vec![width], vec![wide])], vec![wide]),
    };
    let blocks = units.div_ceil(WARPS) / kinds.len() as u64;
    let heads = blocks as f64 / blocks_each / panels;
    // Of a sequence: tiles, and the warps' parts of them.
    let [tiles, parts] = [attention::TILE, attention::PART].map(|side| {
        let along = (batch.tokens as f64 / sequences.max(1.0) / side as f64).ceil();
        if form.causal { along * (along + 1.0) / 2.0 } else { along * along }
    });
    let whole = |widths: &[f64], of: u64| widths.iter().map(|n| (n / of as f64).ceil() * of as f64).sum::<f64>();
    let weights = panels * (EXPONENTIAL + if form.drops() { DRAW } else { 0.0 });
    let each = |(scored, weighted): (Vec<f64>, Vec<f64>)| {
        let scored = panels * whole(&scored, attention::DEPTH);
        let (columns, products) = (whole(&weighted, attention::PART), weighted.len() as f64);
        let multiplied = parts * (scored + columns + weights) * (attention::PART * attention::PART) as f64;
        // What threads read of it for their sums, and what is put there.
        let read = parts * (scored + columns) * (WARP * (attention::ROWS + attention::COLUMNS) * 4) as f64;
        let put = tiles * (2.0 * scored + columns) * (attention::TILE * 4) as f64;
        // Weights pass through it as well, and an adjoint's scores.
        let passed = if part.forward() { products } else { 2.0 + products };
        let put = put + panels * passed * parts * (attention::PART * attention::PART * 4) as f64;
        let cycles = cycles(multiplied, card, card.flops).max((read + put) / SHARED);
        (blocks, cycles * sequences / blocks_each / panels)
    };
    let mut reads = vec![f64::INFINITY; buffers - 1 - results.len()];
    reads.extend(results.iter().map(|columns| 4.0 * heads * batch.tokens as f64 * columns));
    let half = if form.causal { 0.5 } else { 1.0 };
    let flops = 2.0 * asked * batch.pairs as f64 * half * heads;
    let (blocks, under_way) = (kinds.into_iter().map(each).collect(), units as f64 * MANY_UNDER_WAY);
    Work { flops, blocks, reads, under_way, ..Work::default() }
}
