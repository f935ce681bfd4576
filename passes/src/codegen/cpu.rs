//! Machine code in a shared library, by MLIR and LLVM. Kernels do not know of each other, so each is compiled by itself, on
//! all cores, and its machine code can be kept for the next model.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use melior::ExecutionEngine;
use melior::utility::register_all_llvm_translations;
use peft_runtime::trust::trusted_file;

use super::{lowered, module};
use crate::Error;
use crate::dialect::Dialect;
use crate::target::Machine;
use crate::target::cpu::Cpu;

/// From loops to the `llvm` dialect.
pub const PIPELINE: &str = "builtin.module(\
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

/// The kernels as the library `out`.
pub fn library(kernels: &[String], cpu: Cpu, kept: Option<&Path>, out: &Path) -> Result<(), Error> {
    let folder = tempfile::tempdir().map_err(|e| Error::Link(format!("no temporary directory: {e}")))?;
    let kernels: Vec<Kernel> = kernels
        .iter()
        .enumerate()
        .map(|(i, text)| {
            let module = module(std::slice::from_ref(text), Machine::Cpu(cpu));
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
