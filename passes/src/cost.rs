//! What a launch asks of a GPU, and how long it takes there by a model, which knows nothing of what a block waits for.
//!
//! ```text
//! time    = START + max(memory, cache, arithmetic)
//! memory  = bytes / min(the card's bandwidth, what the warps have on their way / LATENCY)
//! cache   = bytes that a product's blocks fetch for their tiles / the bandwidth of the second-level cache
//! arithmetic = Σ waves of so many blocks as there are multiprocessors, cycles of the longest block / clock
//! cycles  = max(multiplications / those of a cycle, bytes of shared memory / 128)    of a tile's steps, and its way out
//! ```
//!
//! What a kernel asks for is said by its schedule (`Scheduled::work`), beside its code.

use peft_runtime::artifact::Sizes;

use crate::target::cuda::{Card, WARP};

/// From the end of one launch to the first loads of the next in a graph of launches, in seconds.
const START: f64 = 1.5e-6;
/// Of memory, in seconds.
const LATENCY: f64 = 0.5e-6;
/// Bytes that a warp has on their way: two vectors of floats, or where it reads many lines at once.
pub const UNDER_WAY: f64 = 256.0;
pub const MANY_UNDER_WAY: f64 = 1024.0;
/// Bytes that shared memory gives in a cycle.
pub const SHARED: f64 = 128.0;

/// A launch's arithmetic.
#[derive(Clone, Debug, Default)]
pub struct Work {
    /// Multiplications and additions of the product asked for.
    pub flops: f64,
    /// Tensor cores compute it.
    pub half: bool,
    /// How many blocks, and of how many cycles each, in their order.
    pub blocks: Vec<(u64, f64)>,
    /// Bytes of the first buffers that it reads at most.
    pub reads: Vec<f64>,
    /// By buffer, how often its bytes move: twice if they are read and written anew.
    pub passes: Vec<f64>,
    /// Bytes on their way.
    pub under_way: f64,
    /// Bytes that blocks fetch, each for itself.
    pub fetched: f64,
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
    pub fn beside(mut self, other: Work) -> Work {
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

impl Launched<'_> {
    /// Nothing but memory, of which each unit has so many bytes on their way.
    pub fn streams(&self, under_way: f64) -> Work {
        Work { under_way: self.units as f64 * under_way, ..Work::default() }
    }
}

/// Cycles that a tile of a product takes on its way out, through shared memory. Lanes that add up a row change places, as
/// many at a time as that gives.
pub fn way_out(sums: bool, rows: u64, columns: u64) -> f64 {
    let changed = if sums { WARP * u64::from(WARP.ilog2()) } else { 0 };
    (rows * (2 * columns + changed) * 4) as f64 / SHARED
}

/// Cycles of so many multiplications on one multiprocessor of a card that does `flops` in a second.
pub fn cycles(multiplications: f64, card: &Card, flops: f64) -> f64 {
    multiplications / (flops / 2.0 / card.multiprocessors as f64 / card.clock)
}
