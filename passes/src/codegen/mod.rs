//! From kernels in the `scf`, `vector` and `memref` dialects to machine code in a shared library, or to PTX, by MLIR
//! and LLVM.
//!
//! A program that runs at once and one that is saved to a file are compiled in the same way.

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

/// Joins the kernels to one module. Kernels for a CPU refer to its attributes as `#cpu`.
fn module(kernels: &[String], machine: Machine) -> String {
    let kernels = kernels.concat();
    match machine {
        Machine::Cpu(cpu) => format!("#cpu = {}\nmodule {{\n{kernels}}}\n", cpu.attributes()),
        Machine::Cuda(_) => format!("module {{\ngpu.module @kernels {{\n{kernels}}}\n}}\n"),
    }
}

/// The kernels as a module of loops, as MLIR prints it.
///
/// # Errors
///
/// If MLIR does not parse the kernels.
pub fn loops(dialect: &Dialect, kernels: &[String], machine: Machine) -> Result<String, Error> {
    Ok(dialect.parse(&module(kernels, machine))?.as_operation().to_string())
}

/// The kernels in the `llvm` dialect, as MLIR prints them.
///
/// # Errors
///
/// If MLIR does not parse or lower the kernels.
pub fn llvm(dialect: &Dialect, kernels: &[String], machine: Machine) -> Result<String, Error> {
    Ok(lower_module(dialect, &module(kernels, machine), &to_llvm(machine))?.as_operation().to_string())
}

/// Parses a module of kernels, of loops or in the `llvm` dialect, and prints it again.
///
/// # Errors
///
/// If MLIR does not parse the text.
pub fn reprint(dialect: &Dialect, text: &str) -> Result<String, Error> {
    Ok(dialect.parse(text)?.as_operation().to_string())
}

fn lower_module<'c>(dialect: &'c Dialect, text: &str, pipeline: &str) -> Result<Module<'c>, Error> {
    run_passes(dialect, dialect.parse(text)?, pipeline)
}

fn run_passes<'c>(dialect: &'c Dialect, mut module: Module<'c>, pipeline: &str) -> Result<Module<'c>, Error> {
    // MLIR's registry of passes belongs to the process and is not thread-safe.
    static PASSES: Once = Once::new();
    PASSES.call_once(register_all_passes);
    let manager = PassManager::new(dialect.context());
    parse_pass_pipeline(manager.as_operation_pass_manager(), pipeline).map_err(|e| Error::Mlir(e.to_string()))?;
    manager.run(&mut module).map_err(|_| dialect.error("lowering to LLVM failed"))?;
    Ok(module)
}

/// Compiles the kernels to the file `out`: a shared library for a CPU, PTX for a GPU. `cache` is the folder of cached
/// machine code of CPU kernels, which is read and extended: similar models have most kernels in common.
///
/// # Errors
///
/// If MLIR or LLVM fails, if the library cannot be linked, or if the file cannot be written.
pub fn compile(kernels: &[String], machine: Machine, cache: Option<&Path>, out: &Path) -> Result<(), Error> {
    match machine {
        Machine::Cpu(cpu) => cpu::library(kernels, cpu, cache, out),
        Machine::Cuda(_) => {
            let text = ptx(&Dialect::new()?, kernels, machine)?;
            std::fs::write(out, text).map_err(|e| Error::Link(format!("{}: {e}", out.display())))
        }
    }
}

/// The MLIR passes from loops to the `llvm` dialect.
fn to_llvm(machine: Machine) -> String {
    match machine {
        Machine::Cpu(_) => cpu::PIPELINE.into(),
        Machine::Cuda(chip) => ptx::pipeline(chip),
    }
}

/// The kernels as one PTX module.
///
/// # Errors
///
/// If MLIR or LLVM fails, or if the machine is not a GPU.
pub fn ptx(dialect: &Dialect, kernels: &[String], machine: Machine) -> Result<String, Error> {
    let Machine::Cuda(chip) = machine else { return Err(Error::Mlir(format!("there is no PTX for {machine}"))) };
    ptx::write(dialect, &module(kernels, machine), chip)
}

/// LLVM's version, which artifacts record.
pub fn llvm_version() -> &'static str {
    "22"
}
