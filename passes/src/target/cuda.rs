//! NVIDIA GPUs as compilation targets: chips (compute capabilities), and the cards whose peak rates the cost model
//! uses.

use std::fmt;
use std::str::FromStr;

use peft_grammar::diagnostic::did_you_mean;

/// Threads of a warp. One unit of a kernel's work is one warp's.
pub const WARP: u64 = 32;
/// Warps of a thread block; every kernel is written for this number.
pub const WARPS: u64 = 4;

/// Columns of a gemm's thread-block tile, and rows of a large tile.
pub const GEMM_TILE: u64 = 64;

/// The compute capability that kernels are compiled for. A chip also runs PTX compiled for an earlier one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Chip {
    /// Volta: V100. Its tensor cores multiply f16.
    #[default]
    Sm70,
    /// Ampere: A100. It adds bf16 tensor cores and asynchronous copies to shared memory (`cp.async`).
    Sm80,
    /// Hopper: H100, H200.
    Sm90,
}

impl Chip {
    /// All chips with their names.
    pub const ALL: [(Chip, &str); 3] = [(Chip::Sm70, "sm_70"), (Chip::Sm80, "sm_80"), (Chip::Sm90, "sm_90")];

    /// The chip's name for `--target cuda:CHIP` and for LLVM: `sm_70` and so on.
    pub fn name(self) -> &'static str {
        Chip::ALL.iter().find(|(chip, _)| *chip == self).expect("all are listed").1
    }

    /// The best-known card with this chip, and its peak rates.
    pub fn card(self) -> Card {
        let (name, bandwidth, l2_bandwidth, flops, tensor_core_flops, multiprocessors, clock) = match self {
            Chip::Sm70 => ("V100 SXM2", 0.9e12, 2.2e12, 15.7e12, 125e12, 80, 1.53e9),
            Chip::Sm80 => ("A100 SXM 40 GB", 1.555e12, 4.5e12, 19.5e12, 312e12, 108, 1.41e9),
            Chip::Sm90 => ("H100 SXM", 3.35e12, 5.5e12, 67e12, 989e12, 132, 1.98e9),
        };
        Card { name, bandwidth, l2_bandwidth, flops, tensor_core_flops, multiprocessors, clock }
    }

    /// Occupancy: the warps that are resident on one multiprocessor at once, for blocks of [`WARPS`] warps whose
    /// threads use `registers` registers each and which use `shared` bytes of shared memory.
    pub fn resident_warps(self, registers: u64, shared: u64) -> u64 {
        let (most, memory) = match self {
            Chip::Sm70 => (64, 96 << 10),
            Chip::Sm80 => (64, 164 << 10),
            Chip::Sm90 => (64, 228 << 10),
        };
        // Registers are allocated in groups of 8 per thread. From sm_80 on each block reserves 1 KiB of shared memory.
        let by_registers = (1 << 16) / (registers.max(1).next_multiple_of(8) * WARP) / WARPS;
        let reserved = if self == Chip::Sm70 { 0 } else { 1 << 10 };
        let by_memory = memory / (shared + reserved).max(1);
        by_registers.min(by_memory).min(most / WARPS).min(32) * WARPS
    }

    /// The oldest PTX version that has the chip and every instruction that kernels use, as an LLVM feature. Older PTX
    /// runs on older drivers.
    pub fn ptx_feature(self) -> &'static str {
        match self {
            Chip::Sm70 => "+ptx64",
            Chip::Sm80 => "+ptx70",
            Chip::Sm90 => "+ptx78",
        }
    }
}

/// A card's peak rates, from NVIDIA's data sheets, except for the L2 bandwidth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Card {
    /// The product name.
    pub name: &'static str,
    /// Device memory bandwidth, in bytes per second.
    pub bandwidth: f64,
    /// L2 cache bandwidth, in bytes per second: about what gemms reach, as the data sheets do not give it.
    pub l2_bandwidth: f64,
    /// f32 operations per second outside the tensor cores.
    pub flops: f64,
    /// Half-precision operations per second of the tensor cores.
    pub tensor_core_flops: f64,
    /// The number of streaming multiprocessors.
    pub multiprocessors: u64,
    /// Boost clock, in cycles per second.
    pub clock: f64,
}

impl fmt::Display for Chip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Chip {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Chip::ALL.iter().find(|(_, name)| *name == text);
        found.map(|(chip, _)| *chip).ok_or_else(|| {
            let names = Chip::ALL.map(|(_, name)| name);
            format!("`{text}` is no chip to compile for{}; there are {}", did_you_mean(text, &names), names.join(", "))
        })
    }
}
