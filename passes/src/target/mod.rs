//! What kernels are compiled for.

pub mod cpu;
pub mod cuda;

use std::fmt;
use std::str::FromStr;

use peft_grammar::diagnostic::did_you_mean;
use peft_runtime::artifact::Workgroup;

use self::cpu::Cpu;
use self::cuda::{Chip, WARP, WARPS};
use crate::builder::mma::Half;

/// Elements of a processor's vector: a register of AVX-512, two of AVX2.
pub const LANES: u64 = 16;

/// Rows whose sums are in registers at once, and vectors of each, at most, where both are a kernel's own choice.
pub const ROWS: u64 = 4;
pub const VECTORS: u64 = 2;

/// A processor or a GPU, as `--target` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    Cpu(Cpu),
    Cuda(Chip),
}

impl Machine {
    /// As an artifact names it.
    pub fn arch(self) -> &'static str {
        match self {
            Machine::Cpu(_) => std::env::consts::ARCH,
            Machine::Cuda(chip) => chip.name(),
        }
    }

    /// Features a machine of this architecture must have to run the kernels, by LLVM's names.
    pub fn features(self) -> Vec<&'static str> {
        match self {
            Machine::Cpu(cpu) => cpu.features(),
            Machine::Cuda(_) => vec![],
        }
    }

    /// Elements that a kernel has in hand at once.
    pub fn lanes(self) -> u64 {
        match self {
            Machine::Cpu(_) => LANES,
            Machine::Cuda(_) => WARP,
        }
    }

    /// Elements of a unit where all stand in a row: a GPU has warps enough for few each.
    pub fn stretch(self) -> u64 {
        match self {
            Machine::Cpu(_) => 8192,
            Machine::Cuda(_) => 64,
        }
    }

    /// What a kernel does besides its own node's work, and which order of launches that wants.
    pub fn fusion(self) -> Fusion {
        match self {
            Machine::Cpu(_) => Fusion {
                held_columns: None,
                companions: false,
                rounds_ahead: None,
                puts_off: false,
                side_by_side: false,
            },
            Machine::Cuda(chip) => Fusion {
                held_columns: Some(cuda::TILE),
                companions: true,
                rounds_ahead: (chip >= Chip::Sm80).then_some(Half::BF16),
                puts_off: true,
                side_by_side: true,
            },
        }
    }

    /// Vectors beside each other, of four rows whose sums are in registers: half of those hold them.
    pub fn vectors_across(self) -> u64 {
        match self {
            Machine::Cpu(cpu) => {
                let cpu::Registers { count, floats } = cpu.registers();
                (count * floats / (2 * ROWS * LANES)).clamp(1, VECTORS)
            }
            Machine::Cuda(_) => VECTORS,
        }
    }

    /// How a launch's units are split over threads.
    pub fn workgroup(self) -> Workgroup {
        match self {
            Machine::Cpu(_) => Workgroup::ONE,
            Machine::Cuda(_) => Workgroup { units: WARPS, threads: WARP * WARPS },
        }
    }

    /// Members of a team: units that a kernel counts as one.
    pub fn team(self) -> u64 {
        match self {
            Machine::Cpu(_) => 1,
            Machine::Cuda(_) => WARPS,
        }
    }
}

/// What a kernel does besides its own node's work.
#[derive(Clone, Copy, Debug)]
pub struct Fusion {
    /// Products have rows of their results in registers when they write them, and of results of so many columns at most
    /// whole rows; otherwise what follows reads them from the cache.
    pub held_columns: Option<u64>,
    /// A sum of rows does beside what else is done with these rows.
    pub companions: bool,
    /// What products read in half precision is rounded by the kernel that makes it.
    pub rounds_ahead: Option<Half>,
    /// Products wait for what follows them.
    pub puts_off: bool,
    /// Launches of one kernel that do not wait for each other are one.
    pub side_by_side: bool,
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
                // `cpu` is nearer by its letters alone, and a chip or a level may stand by itself.
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

/// All that are targets.
fn names() -> Vec<String> {
    let cpus = cpu::names().into_iter().map(|name| format!("cpu:{name}"));
    let chips = Chip::ALL.map(|(_, name)| format!("cuda:{name}"));
    ["cpu".to_string()].into_iter().chain(cpus).chain(["cuda".to_string()]).chain(chips).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_by_name() {
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
