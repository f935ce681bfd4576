//! From kernels in `scf`, `vector` and `memref` to machine code in a shared library, or to PTX, by MLIR and LLVM.
//!
//! The same library is run at once and saved for later: there is no second way. Kernels do not know of
//! each other, so each is compiled by itself, on all cores, and its machine code can be kept for the next model.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, Once};

use melior::ExecutionEngine;
use melior::StringRef;
use melior::ir::attribute::{ArrayAttribute, AttributeLike};
use melior::ir::operation::OperationLike;
use melior::ir::{BlockLike, Module};
use melior::pass::PassManager;
use melior::utility::{parse_pass_pipeline, register_all_llvm_translations, register_all_passes};
use peft_runtime::trust::trusted_file;

use crate::Error;
use crate::dialect::Dialect;
use crate::target::Machine;
use crate::target::cpu::Cpu;
use crate::target::cuda::Chip;

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

/// Compiles the kernels to the file `out`: a library, or PTX. The machine code of each is taken from the folder `kept` if
/// it is there, and put there if it is not: models of one kind have most kernels in common.
pub fn compile(kernels: &[String], machine: Machine, kept: Option<&Path>, out: &Path) -> Result<(), Error> {
    let Machine::Cpu(cpu) = machine else {
        let text = ptx(&Dialect::new()?, kernels, machine)?;
        return std::fs::write(out, text).map_err(|e| Error::Link(format!("{}: {e}", out.display())));
    };
    let folder = tempfile::tempdir().map_err(|e| Error::Link(format!("no temporary directory: {e}")))?;
    let kernels: Vec<Kernel> = kernels
        .iter()
        .enumerate()
        .map(|(i, text)| {
            let module = module(std::slice::from_ref(text), machine);
            Kernel {
                object: folder.path().join(format!("kernel{i}.o")),
                kept: kept.map(|folder| place(folder, cpu, &module)),
                module,
            }
        })
        .collect();
    let mut left: Vec<&Kernel> = kernels.iter().filter(|kernel| !kernel.found()).collect();
    // The largest is the last, and begun first.
    left.sort_by_key(|kernel| kernel.module.len());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(left.len()).min(8);
    let left = Mutex::new(left);
    std::thread::scope(|scope| {
        let jobs: Vec<_> = (0..threads).map(|_| scope.spawn(|| compile_all(&left))).collect();
        jobs.into_iter().try_for_each(|job| {
            job.join().unwrap_or_else(|_| Err(Error::Mlir("a compiling thread ended early".into())))
        })
    })?;
    link(&kernels.iter().map(|kernel| &kernel.object).collect::<Vec<_>>(), out)
}

/// A kernel in a module of its own.
struct Kernel {
    module: String,
    object: PathBuf,
    /// Where its machine code is kept, if it is.
    kept: Option<PathBuf>,
}

impl Kernel {
    /// Takes the machine code from where it is kept: what was damaged there, or may be another user's, counts as missing.
    fn found(&self) -> bool {
        let Some(kept) = &self.kept else { return false };
        let (Some(folder), Some(name)) = (kept.parent(), kept.file_name().and_then(|name| name.to_str())) else {
            return false;
        };
        let content = trusted_file(folder, name).ok().and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
        let Some((checksum, code)) = content.split_first_chunk() else { return false };
        *blake3::hash(code).as_bytes() == *checksum && std::fs::write(&self.object, code).is_ok()
    }

    /// Puts the machine code there, as a whole or not at all. Without it, it is compiled again.
    fn keep(&self) {
        let Some(kept) = &self.kept else { return };
        let write = || -> io::Result<()> {
            let folder = kept.parent().expect("it lies in a folder");
            let code = std::fs::read(&self.object)?;
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(blake3::hash(&code).as_bytes())?;
            file.write_all(&code)?;
            file.persist(kept)?;
            Ok(())
        };
        if let Err(error) = write() {
            tracing::debug!("{}: {error}", kept.display());
        }
    }
}

/// The file of a kernel's machine code: by the module and all that it depends on from there.
fn place(folder: &Path, cpu: Cpu, module: &str) -> PathBuf {
    let mut hash = blake3::Hasher::new();
    for part in [PIPELINE, &cpu.features().join(","), module] {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    folder.join(&hash.finalize().to_hex()[..32])
}

/// Compiles kernels until none is left.
fn compile_all(left: &Mutex<Vec<&Kernel>>) -> Result<(), Error> {
    let dialect = Dialect::new()?;
    register_all_llvm_translations(dialect.context());
    let next = || left.lock().expect("no thread panics with it").pop();
    while let Some(kernel) = next() {
        let made = object_file(&dialect, &kernel.module, &kernel.object);
        if made.is_err() {
            // Nothing is gained by the others.
            left.lock().expect("no thread panics with it").clear();
        }
        made?;
        kernel.keep();
    }
    Ok(())
}

fn object_file(dialect: &Dialect, module: &str, out: &Path) -> Result<(), Error> {
    let module = lowered(dialect, module, PIPELINE)?;
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
fn link(objects: &[&PathBuf], out: &Path) -> Result<(), Error> {
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
