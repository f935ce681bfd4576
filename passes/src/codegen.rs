//! From kernels in `scf`, `vector` and `memref` to machine code in a shared library, or to PTX, by MLIR and LLVM.
//!
//! The same library is run at once and saved for later: there is no second way. Kernels do not know of
//! each other, so they are compiled in as many parts as there are cores.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use melior::ExecutionEngine;
use melior::StringRef;
use melior::ir::attribute::{ArrayAttribute, AttributeLike};
use melior::ir::operation::OperationLike;
use melior::ir::{BlockLike, Module};
use melior::pass::PassManager;
use melior::utility::{parse_pass_pipeline, register_all_llvm_translations, register_all_passes};

use crate::Error;
use crate::cpu::Cpu;
use crate::cuda::Chip;
use crate::dialect::Dialect;
use crate::machine::Machine;

/// From loops to the `llvm` dialect.
const PIPELINE: &str = "builtin.module(\
    func.func(canonicalize,cse),\
    convert-vector-to-scf,\
    convert-scf-to-cf,\
    convert-vector-to-llvm,\
    expand-strided-metadata,\
    lower-affine,\
    convert-math-to-llvm,\
    finalize-memref-to-llvm,\
    convert-index-to-llvm,\
    convert-arith-to-llvm,\
    convert-cf-to-llvm,\
    convert-func-to-llvm,\
    reconcile-unrealized-casts,\
    canonicalize,cse)";

/// The same for a GPU, whose numbers have 32 bits, and places among a buffer's elements with them: what has 64 is two
/// registers there, and a division of it is a call. The target goes with the module, and comes with it to what writes PTX.
fn pipeline_to_nvvm(chip: Chip) -> String {
    format!(
        "builtin.module(\
         nvvm-attach-target{{chip={chip} O=3 features={}}},\
         gpu.module(canonicalize,cse,convert-scf-to-cf,convert-gpu-to-nvvm{{index-bitwidth=32}}),\
         convert-cf-to-llvm{{index-bitwidth=32}},\
         reconcile-unrealized-casts,\
         canonicalize,cse)",
        chip.ptx()
    )
}

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
    let pipeline = match machine {
        Machine::Cpu(_) => PIPELINE.into(),
        Machine::Cuda(chip) => pipeline_to_nvvm(chip),
    };
    Ok(lowered(dialect, &module(kernels, machine), &pipeline)?.as_operation().to_string())
}

/// The kernels as one module of PTX.
pub fn ptx(dialect: &Dialect, kernels: &[String], machine: Machine) -> Result<String, Error> {
    let Machine::Cuda(chip) = machine else { return Err(Error::Mlir(format!("there is no PTX for {machine}"))) };
    register_all_llvm_translations(dialect.context());
    let module = lowered(dialect, &module(kernels, machine), &pipeline_to_nvvm(chip))?;
    let module = through(dialect, module, "builtin.module(gpu-module-to-binary{format=isa})")?;
    let none = || dialect.error("LLVM wrote no PTX");
    let binary = module.body().first_operation().ok_or_else(none)?;
    let objects = ArrayAttribute::try_from(binary.attribute("objects").map_err(|_| none())?).map_err(|_| none())?;
    let object = objects.element(0).map_err(|_| none())?;
    // SAFETY: what a `gpu.binary` holds are objects, whose text lives as long as the context.
    let text = unsafe { StringRef::from_raw(mlir_sys::mlirGPUObjectAttrGetObject(object.to_raw())) };
    text.as_str().map(|text| text.trim_end_matches('\0').to_string()).map_err(|_| none())
}

/// Reads a module of kernels back, from either form, and prints it again.
pub fn read(dialect: &Dialect, text: &str) -> Result<String, Error> {
    Ok(dialect.parse(text)?.as_operation().to_string())
}

/// Compiles the kernels to the file `out`: a library, or PTX.
pub fn compile(kernels: &[String], machine: Machine, out: &Path) -> Result<(), Error> {
    let Machine::Cpu(cpu) = machine else {
        let text = ptx(&Dialect::new()?, kernels, machine)?;
        return std::fs::write(out, text).map_err(|e| Error::Link(format!("{}: {e}", out.display())));
    };
    let folder = tempfile::tempdir().map_err(|e| Error::Link(format!("no temporary directory: {e}")))?;
    // None without a kernel: LLVM makes no engine of an empty module.
    let parts = std::thread::available_parallelism().map_or(1, |n| n.get()).min(kernels.len()).clamp(1, 8);
    let mut shards = vec![vec![]; parts];
    // The largest first, each to where there is least.
    let mut order: Vec<&String> = kernels.iter().collect();
    order.sort_by_key(|text| std::cmp::Reverse(text.len()));
    for text in order {
        let least = shards.iter_mut().min_by_key(|s| s.iter().map(|t: &String| t.len()).sum::<usize>());
        least.expect("at least one").push(text.clone());
    }
    let objects: Vec<PathBuf> = (0..parts).map(|i| folder.path().join(format!("kernels{i}.o"))).collect();
    std::thread::scope(|scope| {
        let compile = |(shard, object): (&Vec<String>, &PathBuf)| {
            let (shard, object) = (shard.clone(), object.clone());
            scope.spawn(move || object_file(&shard, cpu, &object))
        };
        let jobs: Vec<_> = shards.iter().zip(&objects).map(compile).collect();
        jobs.into_iter().try_for_each(|job| {
            job.join().unwrap_or_else(|_| Err(Error::Mlir("a compiling thread ended early".into())))
        })
    })?;
    link(&objects, out)
}

fn object_file(kernels: &[String], cpu: Cpu, out: &Path) -> Result<(), Error> {
    let dialect = Dialect::new()?;
    register_all_llvm_translations(dialect.context());
    let module = lowered(&dialect, &module(kernels, Machine::Cpu(cpu)), PIPELINE)?;
    let path = out.to_str().ok_or_else(|| Error::Link(format!("`{}` is no UTF-8", out.display())))?;
    let engine = ExecutionEngine::new(&module, 3, &[], true, true);
    engine.dump_to_object_file(path);
    match std::fs::metadata(out) {
        Ok(file) if file.len() > 0 => Ok(()),
        _ => Err(dialect.error("LLVM wrote no object file")),
    }
}

/// LLVM's listener for `perf`, of which there is none here.
///
/// MLIR's execution engine registers one unless this function of LLVM returns null, as it does in an LLVM that is built
/// without `perf`; its C interface has no option for it. LLVM's own listener writes a file for every process into
/// `.debug/jit` of the home or temporary directory, although nothing is run by the engine. A definition here takes the
/// place of the one in LLVM's archive.
// SAFETY: the name and the type are those of `static JITEventListener *JITEventListener::createPerfJITEventListener()`,
// and its callers take null.
#[unsafe(export_name = "_ZN4llvm16JITEventListener26createPerfJITEventListenerEv")]
extern "C" fn no_perf_listener() -> *mut std::ffi::c_void {
    std::ptr::null_mut()
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

/// A shared library of the object files, by whichever linker there is.
fn link(objects: &[PathBuf], out: &Path) -> Result<(), Error> {
    let mut said = vec![];
    for linker in ["cc", "clang-22", "ld"] {
        let run = Command::new(linker).arg("-shared").arg("-o").arg(out).args(objects).output();
        match run {
            Ok(run) if run.status.success() => return Ok(()),
            Ok(run) => said.push(format!("{linker}: {}", String::from_utf8_lossy(&run.stderr).trim())),
            Err(e) => said.push(format!("{linker}: {e}")),
        }
    }
    Err(Error::Link(format!("no linker made a library of the kernels; install `binutils`\n{}", said.join("\n"))))
}

/// LLVM's version, as the artifact records it.
pub fn llvm_version() -> &'static str {
    "22"
}
