//! The GPU cost model: what one launch asks of a card, and how long the launch takes. It is a roofline with whole waves
//! of thread blocks; it does not model the time that a block spends waiting at barriers or for its loads.
//!
//! ```text
//! time       = LAUNCH_OVERHEAD + max(memory, L2, arithmetic)
//! memory     = bytes / min(memory bandwidth, bytes in flight / MEMORY_LATENCY)      (Little's law)
//! L2         = bytes that the blocks of a gemm fetch for their tiles / L2 bandwidth
//! arithmetic = Σ over waves (one block per multiprocessor) of the cycles of the wave's longest block / clock
//! cycles     = max(FMAs / FMAs per cycle, bytes of shared memory / 128) over a tile's k steps, plus the tile's store
//! ```
//!
//! Each kernel's schedule computes its [`LaunchCost`] (`Scheduled::cost`), in the file that holds the kernel's code.

use peft_runtime::artifact::Sizes;

use crate::target::cuda::{Card, WARP};

/// Seconds from the end of one launch to the first loads of the next, within one CUDA graph.
const LAUNCH_OVERHEAD_SECONDS: f64 = 1.5e-6;
/// Latency of device memory, in seconds.
const MEMORY_LATENCY_SECONDS: f64 = 0.5e-6;
/// Bytes that one warp has in flight when it loads two vectors of floats at a time.
pub const WARP_BYTES_IN_FLIGHT: f64 = 256.0;
/// Bytes that one warp has in flight when it issues the loads of many rows before it uses the first.
pub const BATCHED_WARP_BYTES_IN_FLIGHT: f64 = 1024.0;
/// Bytes per cycle of one multiprocessor's shared memory: 32 banks of 4 bytes.
pub const SHARED_BYTES_PER_CYCLE: f64 = 128.0;

/// What one launch asks of a card.
#[derive(Clone, Debug, Default)]
pub struct LaunchCost {
    /// Floating-point operations of the matrix product, two for each multiply-add.
    pub flops: f64,
    /// The product runs on tensor cores.
    pub tensor_cores: bool,
    /// Runs of thread blocks in launch order: the number of blocks, and the cycles of each.
    pub blocks: Vec<(u64, f64)>,
    /// Upper bounds of the bytes read of the launch's first buffers, in the order of the buffers. A buffer without a
    /// bound counts whole.
    pub max_read_bytes: Vec<f64>,
    /// How often the bytes of each buffer cross the memory bus: 2 for a buffer that is read and then overwritten, else
    /// 1.
    pub transfers: Vec<f64>,
    /// Bytes that all warps of the launch have in flight at once.
    pub bytes_in_flight: f64,
    /// Bytes that the blocks fetch through the L2 cache; a tile that several blocks load counts once for each block.
    pub l2_bytes: f64,
}

impl LaunchCost {
    /// Seconds of the product's arithmetic at the card's peak rate.
    pub fn arithmetic_seconds(&self, card: &Card) -> f64 {
        self.flops / if self.tensor_cores { card.tensor_core_flops } else { card.flops }
    }

    /// Seconds that the model predicts for the launch, when it moves `bytes` of device memory.
    pub fn modelled_seconds(&self, card: &Card, bytes: f64) -> f64 {
        let memory = bytes / card.bandwidth.min(self.bytes_in_flight / MEMORY_LATENCY_SECONDS);
        let blocks = self.blocks.iter().flat_map(|&(blocks, cycles)| std::iter::repeat_n(cycles, blocks as usize));
        let blocks: Vec<f64> = blocks.collect();
        let waves = blocks.chunks(card.multiprocessors as usize);
        let cycles: f64 = waves.map(|wave| wave.iter().copied().fold(0.0, f64::max)).sum();
        LAUNCH_OVERHEAD_SECONDS + memory.max(self.l2_bytes / card.l2_bandwidth).max(cycles / card.clock)
    }

    /// The cost of both launches merged into one.
    pub fn merge(mut self, other: LaunchCost) -> LaunchCost {
        self.flops += other.flops;
        self.blocks.extend(other.blocks);
        self.max_read_bytes.extend(other.max_read_bytes);
        self.transfers.extend(other.transfers);
        self.bytes_in_flight += other.bytes_in_flight;
        self.l2_bytes += other.l2_bytes;
        self
    }
}

/// The arguments of one launch, evaluated for one batch.
#[derive(Clone, Copy)]
pub struct LaunchSizes<'a> {
    /// The number of buffers that the launch is given.
    pub buffers: usize,
    /// The values of the kernel's size arguments, in the kernel's order.
    pub sizes: &'a [u64],
    /// The number of units: independent pieces of work, one for each warp.
    pub units: u64,
    /// The batch's numbers of tokens, sequences, targets and pairs.
    pub batch: &'a Sizes,
}

impl LaunchSizes<'_> {
    /// The cost of a kernel that only moves memory, where each unit has `unit_bytes_in_flight` bytes in flight.
    pub fn streaming(&self, unit_bytes_in_flight: f64) -> LaunchCost {
        LaunchCost { bytes_in_flight: self.units as f64 * unit_bytes_in_flight, ..LaunchCost::default() }
    }
}

/// Cycles to store one gemm tile through shared memory. With `row_sums` the lanes of a warp also add up each row by
/// shuffles, which move as many bytes per cycle as shared memory.
pub fn tile_store_cycles(row_sums: bool, rows: u64, columns: u64) -> f64 {
    let shuffled = if row_sums { WARP * u64::from(WARP.ilog2()) } else { 0 };
    (rows * (2 * columns + shuffled) * 4) as f64 / SHARED_BYTES_PER_CYCLE
}

/// Cycles that one multiprocessor takes for `multiplications` multiply-adds, on a card that does `flops` operations per
/// second in all.
pub fn fma_cycles(multiplications: f64, card: &Card, flops: f64) -> f64 {
    multiplications / (flops / 2.0 / card.multiprocessors as f64 / card.clock)
}
