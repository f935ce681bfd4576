//! NVIDIA's chips, as kernels see them.

use std::fmt;
use std::str::FromStr;

use peft_grammar::diagnostic::did_you_mean;

/// Threads that go in step: a kernel's units are counted in these.
pub const WARP: u64 = 32;
/// Warps of a block, for which every kernel is written.
pub const WARPS: u64 = 4;

/// Columns of a product's tile, and rows of a large one.
pub const TILE: u64 = 64;

/// What kernels are compiled for: a chip runs what is compiled for an earlier one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Chip {
    /// Volta: V100. Products of f16 by tensor cores.
    #[default]
    Sm70,
    /// Ampere: A100. Copies to shared memory that no thread waits for.
    Sm80,
    /// Hopper: H100, H200.
    Sm90,
}

impl Chip {
    pub const ALL: [(Chip, &str); 3] = [(Chip::Sm70, "sm_70"), (Chip::Sm80, "sm_80"), (Chip::Sm90, "sm_90")];

    pub fn name(self) -> &'static str {
        Chip::ALL.iter().find(|(chip, _)| *chip == self).expect("all are listed").1
    }

    /// The card that is known by it, and what that can do at most.
    pub fn card(self) -> Card {
        let (name, bandwidth, cache, flops, half_flops, multiprocessors, clock) = match self {
            Chip::Sm70 => ("V100 SXM2", 0.9e12, 2.2e12, 15.7e12, 125e12, 80, 1.53e9),
            Chip::Sm80 => ("A100 SXM 40 GB", 1.555e12, 4.5e12, 19.5e12, 312e12, 108, 1.41e9),
            Chip::Sm90 => ("H100 SXM", 3.35e12, 5.5e12, 67e12, 989e12, 132, 1.98e9),
        };
        Card { name, bandwidth, cache, flops, half_flops, multiprocessors, clock }
    }

    /// Warps that a multiprocessor holds at once, in blocks whose threads take so many registers and which take so many
    /// bytes of shared memory.
    pub fn warps_held(self, registers: u64, shared: u64) -> u64 {
        let (most, memory) = match self {
            Chip::Sm70 => (64, 96 << 10),
            Chip::Sm80 => (64, 164 << 10),
            Chip::Sm90 => (64, 228 << 10),
        };
        // Registers come in eights for each thread; a block of the later chips takes 1 KiB more.
        let by_registers = (1 << 16) / (registers.max(1).next_multiple_of(8) * WARP) / WARPS;
        let reserved = if self == Chip::Sm70 { 0 } else { 1 << 10 };
        let by_memory = memory / (shared + reserved).max(1);
        by_registers.min(by_memory).min(most / WARPS).min(32) * WARPS
    }

    /// The oldest version of PTX that knows the chip and all that kernels use, as LLVM's feature: the older it is, the
    /// older the drivers that take it.
    pub fn ptx(self) -> &'static str {
        match self {
            Chip::Sm70 => "+ptx64",
            Chip::Sm80 => "+ptx70",
            Chip::Sm90 => "+ptx78",
        }
    }
}

/// By its maker's data sheet, but for the cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Card {
    pub name: &'static str,
    /// Bytes of memory a second.
    pub bandwidth: f64,
    /// Of its second-level cache, about as much as products get of it.
    pub cache: f64,
    /// Of f32, a second.
    pub flops: f64,
    /// Of tensor cores in half precision.
    pub half_flops: f64,
    pub multiprocessors: u64,
    /// Cycles a second.
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
