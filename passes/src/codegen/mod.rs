//! From kernels in `scf`, `vector` and `memref` to machine code in a shared library, or to PTX, by MLIR and LLVM.
//!
//! What is run at once is what is saved for later: there is no second way.

mod cpu;
mod ptx;

use std::path::Path;
use std::sync::Once;

use melior::ir::Module;
use melior::pass::PassManager;
use melior::utility::{parse_pass_pipeline, register_all_passes};

use crate::Error;
use crate::dialect::Dialect;
use crate::target::Machine;

/// Kernels as one module. Those for a processor name its attributes `#cpu`.
fn module(kernels: &[String], machine: Machine) -> String {
    let kernels = kernels.concat();
    match machine {
        Machine::Cpu(cpu) => format!("#cpu = {}\nmodule {{\n{kernels}}}\n", cpu.attributes()),
        Machine::Cuda(_) => format!("module {{\ngpu.module @kernels {{\n{kernels}}}\n}}\n"),
    }
}

/// The kernels as MLIR prints them.
pub fn loops(dialect: &Dialect, kernels: &[String], machine: Machine) -> Result<String, Error> {
    Ok(dialect.parse(&module(kernels, machine))?.as_operation().to_string())
}

/// The kernels in the `llvm` dialect.
pub fn llvm(dialect: &Dialect, kernels: &[String], machine: Machine) -> Result<String, Error> {
    Ok(lowered(dialect, &module(kernels, machine), &to_llvm(machine))?.as_operation().to_string())
}

/// Reads a module of kernels back, from either form, and prints it again.
pub fn read(dialect: &Dialect, text: &str) -> Result<String, Error> {
    Ok(dialect.parse(text)?.as_operation().to_string())
}

fn lowered<'c>(dialect: &'c Dialect, text: &str, pipeline: &str) -> Result<Module<'c>, Error> {
    through(dialect, dialect.parse(text)?, pipeline)
}

fn through<'c>(dialect: &'c Dialect, mut module: Module<'c>, pipeline: &str) -> Result<Module<'c>, Error> {
    // The registry is the process's, and knows no locks.
    static PASSES: Once = Once::new();
    PASSES.call_once(register_all_passes);
    let manager = PassManager::new(dialect.context());
    parse_pass_pipeline(manager.as_operation_pass_manager(), pipeline).map_err(|e| Error::Mlir(e.to_string()))?;
    manager.run(&mut module).map_err(|_| dialect.error("lowering to LLVM failed"))?;
    Ok(module)
}

/// Compiles the kernels to the file `out`: a library, or PTX. The machine code of each for a processor is taken from the
/// folder `kept` if it is there, and put there if it is not: models of one kind have most kernels in common.
pub fn compile(kernels: &[String], machine: Machine, kept: Option<&Path>, out: &Path) -> Result<(), Error> {
    match machine {
        Machine::Cpu(cpu) => cpu::library(kernels, cpu, kept, out),
        Machine::Cuda(_) => {
            let text = ptx(&Dialect::new()?, kernels, machine)?;
            std::fs::write(out, text).map_err(|e| Error::Link(format!("{}: {e}", out.display())))
        }
    }
}

/// From loops to the `llvm` dialect, for the machine.
fn to_llvm(machine: Machine) -> String {
    match machine {
        Machine::Cpu(_) => cpu::PIPELINE.into(),
        Machine::Cuda(chip) => ptx::pipeline(chip),
    }
}

/// The kernels as one module of PTX.
pub fn ptx(dialect: &Dialect, kernels: &[String], machine: Machine) -> Result<String, Error> {
    let Machine::Cuda(chip) = machine else { return Err(Error::Mlir(format!("there is no PTX for {machine}"))) };
    ptx::write(dialect, &module(kernels, machine), chip)
}

/// LLVM's version, as the artifact records it.
pub fn llvm_version() -> &'static str {
    "22"
}
