//! Processors, as kernels see them: how much their registers hold, and what they multiply.

use std::fmt;
use std::str::FromStr;

use peft_grammar::diagnostic::did_you_mean;

/// What kernels are compiled for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cpu {
    /// This machine's own, with all it has.
    #[default]
    Native,
    /// A level that x86-64 processors share, whichever compiles for it.
    Level(Level),
}

/// The levels of x86-64's psABI that differ in vectors, and one above them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// SSE2: every x86-64.
    V1,
    /// AVX2 and FMA.
    V3,
    /// AVX-512.
    V4,
    /// That and products of bf16: Zen 4, Sapphire Rapids and later.
    V4Bf16,
}

/// Vector registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    pub count: u64,
    /// Floats in each.
    pub floats: u64,
}

const V3: &[&str] =
    &["sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe"];
const V4: &[&str] = &["avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"];
const BF16: &str = "avx512bf16";

impl Level {
    pub const ALL: [(Level, &str); 4] =
        [(Level::V1, "x86-64"), (Level::V3, "x86-64-v3"), (Level::V4, "x86-64-v4"), (Level::V4Bf16, "x86-64-v4+bf16")];

    fn name(self) -> &'static str {
        Level::ALL.iter().find(|(level, _)| *level == self).expect("all are listed").1
    }

    /// By LLVM's names, as the runtime asks for them.
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
    /// Features a machine must have to run the kernels, by LLVM's names.
    pub fn features(self) -> Vec<&'static str> {
        match self {
            Cpu::Native => peft_runtime::device::features(),
            Cpu::Level(level) => level.features(),
        }
    }

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

    /// Loads and stores of some lanes are instructions like any other.
    pub fn masks(self) -> bool {
        self.features().contains(&"avx512f")
    }

    /// One instruction adds both products of two pairs of bf16 to a float, 16 times.
    pub fn multiplies_bf16(self) -> bool {
        self.features().contains(&BF16)
    }

    /// What LLVM is told about a function, as an MLIR attribute.
    pub fn attributes(self) -> String {
        let width = self.registers().floats * 32;
        let level = match self {
            Cpu::Native => String::new(),
            Cpu::Level(level) => {
                let features: Vec<String> =
                    ["sse2"].into_iter().chain(level.features()).map(|f| format!("+{f}")).collect();
                let base = level.name().trim_end_matches("+bf16");
                // By Haswell's schedule, v3's own, sums in bf16 are moved to memory and back.
                let tune = if level == Level::V3 { r#", ["tune-cpu", "znver3"]"# } else { "" };
                format!(r#", ["target-cpu", "{base}"]{tune}, ["target-features", "{}"]"#, features.join(","))
            }
        };
        // A kernel is called through two thin wrappers: without `noinline` each would hold a copy.
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

/// All that can be compiled for here.
pub fn names() -> Vec<&'static str> {
    let levels = Level::ALL.iter().filter(|_| cfg!(target_arch = "x86_64"));
    ["native"].into_iter().chain(levels.map(|(_, name)| *name)).collect()
}
