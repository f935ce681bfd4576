//! Target machines: the processors and GPUs that kernels are compiled for, and the properties that lowering decides by.

pub mod cpu;
pub mod cuda;

use std::fmt;
use std::str::FromStr;

use peft_grammar::diagnostic::did_you_mean;
use peft_runtime::artifact::Workgroup;

use self::cpu::Cpu;
use self::cuda::{Chip, WARP, WARPS};
use crate::builder::mma::Half;

/// The vector width of processor kernels, in floats: one register of AVX-512, two of AVX2.
pub const LANES: u64 = 16;

/// Rows of the accumulator tile that attention's processor kernels keep in registers.
pub const ACCUMULATOR_ROWS: u64 = 4;
/// Vectors in each row of that accumulator tile, at most (see [`Machine::accumulator_vectors`]).
pub const ACCUMULATOR_VECTORS: u64 = 2;

/// A processor or a GPU, as `--target` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// A processor: `cpu` or `cpu:LEVEL`.
    Cpu(Cpu),
    /// An NVIDIA GPU: `cuda` or `cuda:CHIP`.
    Cuda(Chip),
}

impl Machine {
    /// The architecture's name in an artifact's manifest.
    pub fn arch(self) -> &'static str {
        match self {
            Machine::Cpu(_) => std::env::consts::ARCH,
            Machine::Cuda(chip) => chip.name(),
        }
    }

    /// The features that a machine of this architecture needs to run the kernels, by LLVM's names.
    pub fn features(self) -> Vec<&'static str> {
        match self {
            Machine::Cpu(cpu) => cpu.features(),
            Machine::Cuda(_) => vec![],
        }
    }

    /// Elements that one step of a kernel's loop processes: a vector's on a processor, a warp's on a GPU.
    pub fn lanes(self) -> u64 {
        match self {
            Machine::Cpu(_) => LANES,
            Machine::Cuda(_) => WARP,
        }
    }

    /// Elements of one unit of a flat loop over a whole buffer. A GPU has so many warps that each gets only two
    /// elements per lane.
    pub fn flat_unit_elements(self) -> u64 {
        match self {
            Machine::Cpu(_) => 8192,
            Machine::Cuda(_) => 64,
        }
    }

    /// What this machine's kernels can fuse.
    pub fn fusion(self) -> FusionSupport {
        match self {
            Machine::Cpu(_) => FusionSupport {
                register_epilogue_columns: None,
                companions: false,
                half_precision_results: None,
                sinks_products: false,
                horizontal: false,
            },
            Machine::Cuda(chip) => FusionSupport {
                register_epilogue_columns: Some(cuda::GEMM_TILE),
                companions: true,
                half_precision_results: (chip >= Chip::Sm80).then_some(Half::BF16),
                sinks_products: true,
                horizontal: true,
            },
        }
    }

    /// Vectors in each row of an accumulator tile of [`ACCUMULATOR_ROWS`] rows, such that the tile takes at most half
    /// of the vector registers.
    pub fn accumulator_vectors(self) -> u64 {
        match self {
            Machine::Cpu(cpu) => {
                let cpu::Registers { count, floats } = cpu.registers();
                (count * floats / (2 * ACCUMULATOR_ROWS * LANES)).clamp(1, ACCUMULATOR_VECTORS)
            }
            Machine::Cuda(_) => ACCUMULATOR_VECTORS,
        }
    }

    /// How many units and threads one workgroup has: a thread block of [`WARPS`] warps, one unit each, on a GPU.
    pub fn workgroup(self) -> Workgroup {
        match self {
            Machine::Cpu(_) => Workgroup::ONE,
            Machine::Cuda(_) => Workgroup { units: WARPS, threads: WARP * WARPS },
        }
    }

    /// Units that work as one team, which shares memory and barriers: the warps of a GPU's thread block.
    pub fn team_size(self) -> u64 {
        match self {
            Machine::Cpu(_) => 1,
            Machine::Cuda(_) => WARPS,
        }
    }
}

/// Which kinds of fusion the lowering applies for a machine.
#[derive(Clone, Copy, Debug)]
pub struct FusionSupport {
    /// `Some(n)`: a gemm applies its epilogue to rows of the result in registers, and holds whole rows of a result of
    /// at most `n` columns, so that it can also sum them. `None`: the epilogue reads the stored tile from the cache.
    pub register_epilogue_columns: Option<u64>,
    /// The kernel of a row sum also computes other elementwise groups over the same rows (its companions).
    pub companions: bool,
    /// The kernel that produces an operand of a half-precision gemm also stores it rounded, in this type.
    pub half_precision_results: Option<Half>,
    /// Products are moved down to their first reader, so that more of the nodes after them fuse into their epilogue.
    pub sinks_products: bool,
    /// Independent launches of one kernel are merged into one launch (horizontal fusion).
    pub horizontal: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Machine::Cpu(Cpu::Native)
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Machine::Cpu(cpu) => write!(f, "cpu:{cpu}"),
            Machine::Cuda(chip) => write!(f, "cuda:{chip}"),
        }
    }
}

impl FromStr for Machine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':').unwrap_or((text, "")) {
            ("cpu", "") => Ok(Machine::default()),
            ("cpu", level) => level.parse().map(Machine::Cpu),
            ("cuda", "") => Ok(Machine::Cuda(Chip::default())),
            ("cuda", chip) => chip.parse().map(Machine::Cuda),
            _ => {
                let names = names();
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                // Edit distance alone would suggest `cpu` for `gpu`, and would miss a chip or level without its prefix.
                let near = match text.to_lowercase() {
                    gpu if gpu.starts_with("gpu") => "cuda".to_string(),
                    chip if chip.parse::<Chip>().is_ok() => format!("cuda:{chip}"),
                    level if level.parse::<Cpu>().is_ok() => format!("cpu:{level}"),
                    _ => text.to_string(),
                };
                Err(format!("`{text}` is no target{}; there are {}", did_you_mean(&near, &names), names.join(", ")))
            }
        }
    }
}

/// The names of all targets.
fn names() -> Vec<String> {
    let cpus = cpu::names().into_iter().map(|name| format!("cpu:{name}"));
    let chips = Chip::ALL.map(|(_, name)| format!("cuda:{name}"));
    ["cpu".to_string()].into_iter().chain(cpus).chain(["cuda".to_string()]).chain(chips).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_names_parse_and_unknown_ones_get_suggestions() {
        for (text, name) in [("cpu", "cpu:native"), ("cuda", "cuda:sm_70"), ("cuda:sm_90", "cuda:sm_90")] {
            assert_eq!(text.parse::<Machine>().map(|m| m.to_string()), Ok(name.into()));
        }
        for text in ["", "gpu", "cuda:sm_60", "cuda:70", "cpu:avx"] {
            let _ = text.parse::<Machine>().map(|m| panic!("`{text}` is {m}"));
        }
        let refusals = [
            ("gpu", "`gpu` is no target (did you mean `cuda`?); there are cpu, cpu:native, "),
            ("GPU", "`GPU` is no target (did you mean `cuda`?); there are cpu, cpu:native, "),
            ("sm_90", "`sm_90` is no target (did you mean `cuda:sm_90`?); there are cpu, "),
            ("x86-64-v3", "`x86-64-v3` is no target (did you mean `cpu:x86-64-v3`?); there are cpu, "),
            ("cdua", "`cdua` is no target (did you mean `cuda`?); there are cpu, "),
            ("tpu2:v4", "`tpu2:v4` is no target; there are cpu, "),
            ("cuda:sm70", "`sm70` is no chip to compile for (did you mean `sm_70`?); there are sm_70, sm_80, sm_90"),
            ("cpu:avx", "`avx` is no processor to compile for; there are native"),
        ];
        for (text, refusal) in refusals {
            let message = text.parse::<Machine>().expect_err("no target");
            assert!(message.starts_with(refusal), "{message}");
        }
        for name in names() {
            assert!(name.parse::<Machine>().is_ok(), "{name}");
        }
    }
}
