//! Processors as compilation targets: feature sets, vector registers, and the instructions that kernels choose by.

use std::fmt;
use std::str::FromStr;

use peft_grammar::diagnostic::did_you_mean;

/// The processor that kernels are compiled for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cpu {
    /// The processor of this machine, with all of its features.
    #[default]
    Native,
    /// A fixed x86-64 feature level; the machine that compiles need not have it.
    Level(Level),
}

/// The x86-64 psABI levels that differ in vector width, and one above them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// SSE2: every x86-64.
    V1,
    /// AVX2 and FMA.
    V3,
    /// AVX-512.
    V4,
    /// AVX-512 with the bf16 dot product (AVX512-BF16): Zen 4, Sapphire Rapids and later.
    V4Bf16,
}

/// The vector register file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// The number of architectural registers.
    pub count: u64,
    /// Floats in each register.
    pub floats: u64,
}

const V3: &[&str] =
    &["sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe"];
const V4: &[&str] = &["avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"];
const BF16: &str = "avx512bf16";

impl Level {
    /// All levels with the names that `--target cpu:LEVEL` takes.
    pub const ALL: [(Level, &str); 4] =
        [(Level::V1, "x86-64"), (Level::V3, "x86-64-v3"), (Level::V4, "x86-64-v4"), (Level::V4Bf16, "x86-64-v4+bf16")];

    fn name(self) -> &'static str {
        Level::ALL.iter().find(|(level, _)| *level == self).expect("all are listed").1
    }

    /// The level's features beyond the x86-64 baseline, by LLVM's names, which the runtime checks for.
    fn features(self) -> Vec<&'static str> {
        match self {
            Level::V1 => vec![],
            Level::V3 => V3.to_vec(),
            Level::V4 => [V3, V4].concat(),
            Level::V4Bf16 => [V3, V4, &[BF16]].concat(),
        }
    }
}

impl Cpu {
    /// The features that a machine needs to run the kernels, by LLVM's names.
    pub fn features(self) -> Vec<&'static str> {
        match self {
            Cpu::Native => peft_runtime::device::features(),
            Cpu::Level(level) => level.features(),
        }
    }

    /// The vector registers that kernels are written for.
    pub fn registers(self) -> Registers {
        let features = self.features();
        let has = |name: &str| features.contains(&name);
        match () {
            _ if has("avx512f") => Registers { count: 32, floats: 16 },
            _ if has("avx2") => Registers { count: 16, floats: 8 },
            _ if cfg!(target_arch = "aarch64") => Registers { count: 32, floats: 4 },
            _ => Registers { count: 16, floats: 4 },
        }
    }

    /// Masked loads and stores are single instructions (AVX-512).
    pub fn has_masked_memory(self) -> bool {
        self.features().contains(&"avx512f")
    }

    /// `vdpbf16ps` is available: 16 lanes, each of which adds the products of two pairs of bf16 to a float.
    pub fn has_bf16_dot(self) -> bool {
        self.features().contains(&BF16)
    }

    /// The LLVM function attributes for this processor, as an MLIR array attribute.
    pub fn attributes(self) -> String {
        let width = self.registers().floats * 32;
        let level = match self {
            Cpu::Native => String::new(),
            Cpu::Level(level) => {
                let features: Vec<String> =
                    ["sse2"].into_iter().chain(level.features()).map(|f| format!("+{f}")).collect();
                let base = level.name().trim_end_matches("+bf16");
                // With Haswell's scheduling model, the default for v3, LLVM spills the accumulators of bf16 gemms.
                let tune = if level == Level::V3 { r#", ["tune-cpu", "znver3"]"# } else { "" };
                format!(r#", ["target-cpu", "{base}"]{tune}, ["target-features", "{}"]"#, features.join(","))
            }
        };
        // Two thin wrappers call each kernel; without `noinline`, LLVM would inline a copy of it into both.
        format!(r#"["noinline", ["prefer-vector-width", "{width}"]{level}]"#)
    }
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cpu::Native => f.write_str("native"),
            Cpu::Level(level) => f.write_str(level.name()),
        }
    }
}

impl FromStr for Cpu {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = names();
        if !names.contains(&text) {
            let near = did_you_mean(text, &names);
            return Err(format!("`{text}` is no processor to compile for{near}; there are {}", names.join(", ")));
        }
        let level = Level::ALL.iter().find(|(_, name)| *name == text);
        Ok(level.map_or(Cpu::Native, |(level, _)| Cpu::Level(*level)))
    }
}

/// The names that `--target cpu:NAME` accepts on this architecture.
pub fn names() -> Vec<&'static str> {
    let levels = Level::ALL.iter().filter(|_| cfg!(target_arch = "x86_64"));
    ["native"].into_iter().chain(levels.map(|(_, name)| *name)).collect()
}
