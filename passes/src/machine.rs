//! What kernels are compiled for.

use std::fmt;
use std::str::FromStr;

use peft_grammar::diagnostic::did_you_mean;

use crate::cpu::{self, Cpu};
use crate::cuda::Chip;

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
                // `cpu` is nearer by its letters alone.
                let near = if text.starts_with("gpu") { "cuda" } else { text };
                Err(format!("`{text}` is no target{}; there are {}", did_you_mean(near, &names), names.join(", ")))
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
