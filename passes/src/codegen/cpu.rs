//! CPU machine code in a shared library, by MLIR and LLVM. Kernels are independent, so each is compiled in a module of
//! its own, on all cores, and its machine code can be cached for other models.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use melior::ExecutionEngine;
use melior::utility::register_all_llvm_translations;
use peft_runtime::trust::trusted_file;

use super::{lower_module, module};
use crate::Error;
use crate::dialect::Dialect;
use crate::target::Machine;
use crate::target::cpu::Cpu;

/// The MLIR passes from loops to the `llvm` dialect.
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

/// Compiles the kernels and links them into the library `out`. `cache` is the folder of cached machine code.
///
/// # Errors
///
/// If MLIR or LLVM fails on a kernel, or if no linker links the library.
pub fn library(kernels: &[String], cpu: Cpu, cache: Option<&Path>, out: &Path) -> Result<(), Error> {
    let folder = tempfile::tempdir().map_err(|e| Error::Link(format!("no temporary directory: {e}")))?;
    let kernels: Vec<Kernel> = kernels
        .iter()
        .enumerate()
        .map(|(i, text)| {
            let module = module(std::slice::from_ref(text), Machine::Cpu(cpu));
            Kernel {
                object: folder.path().join(format!("kernel{i}.o")),
                cached: cache.map(|folder| cache_file(folder, cpu, &module)),
                module,
            }
        })
        .collect();
    let mut left: Vec<&Kernel> = kernels.iter().filter(|kernel| !kernel.load_cached()).collect();
    // The largest kernel is last, so that it is taken first.
    left.sort_by_key(|kernel| kernel.module.len());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(left.len()).min(8);
    let left = Mutex::new(left);
    std::thread::scope(|scope| {
        let jobs: Vec<_> = (0..threads).map(|_| scope.spawn(|| compile_all(&left))).collect();
        jobs.into_iter()
            .try_for_each(|job| job.join().unwrap_or_else(|_| Err(Error::Mlir("a compiler thread panicked".into()))))
    })?;
    link(&kernels.iter().map(|kernel| &kernel.object).collect::<Vec<_>>(), out)
}

/// A kernel in a module of its own.
struct Kernel {
    module: String,
    object: PathBuf,
    /// The file of its cached machine code, if there is a cache.
    cached: Option<PathBuf>,
}

impl Kernel {
    /// Takes the machine code from the cache. A file that is damaged, or that another user could have written, counts
    /// as missing.
    fn load_cached(&self) -> bool {
        let Some(cached) = &self.cached else { return false };
        let (Some(folder), Some(name)) = (cached.parent(), cached.file_name().and_then(|name| name.to_str())) else {
            return false;
        };
        let content = trusted_file(folder, name).ok().and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
        let Some((checksum, code)) = content.split_first_chunk() else { return false };
        *blake3::hash(code).as_bytes() == *checksum && std::fs::write(&self.object, code).is_ok()
    }

    /// Stores the machine code in the cache, in one atomic step. If that fails, the kernel is compiled again next time.
    fn store_cached(&self) {
        let Some(cached) = &self.cached else { return };
        let write = || -> io::Result<()> {
            let folder = cached.parent().expect("the cache is a folder");
            let code = std::fs::read(&self.object)?;
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(blake3::hash(&code).as_bytes())?;
            file.write_all(&code)?;
            file.persist(cached)?;
            Ok(())
        };
        if let Err(error) = write() {
            tracing::debug!("{}: {error}", cached.display());
        }
    }
}

/// The cache file of a kernel's machine code. Its name is a hash of the module and of all that compilation depends on.
fn cache_file(folder: &Path, cpu: Cpu, module: &str) -> PathBuf {
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
    let next = || left.lock().expect("no thread panics while it holds the lock").pop();
    while let Some(kernel) = next() {
        let made = object_file(&dialect, &kernel.module, &kernel.object);
        if made.is_err() {
            // After a failure the remaining kernels need not be compiled.
            left.lock().expect("no thread panics while it holds the lock").clear();
        }
        made?;
        kernel.store_cached();
    }
    Ok(())
}

fn object_file(dialect: &Dialect, module: &str, out: &Path) -> Result<(), Error> {
    let module = lower_module(dialect, module, PIPELINE)?;
    let path = out.to_str().ok_or_else(|| Error::Link(format!("the path `{}` is not UTF-8", out.display())))?;
    let engine = ExecutionEngine::new(&module, 3, &[], true, true);
    engine.dump_to_object_file(path);
    match std::fs::metadata(out) {
        Ok(file) if file.len() > 0 => Ok(()),
        _ => Err(dialect.error("LLVM wrote no object file")),
    }
}

/// Returns no listener for `perf`.
///
/// MLIR's execution engine registers LLVM's listener for `perf` unless this function of LLVM returns null, as it does
/// in an LLVM built without `perf`; MLIR's C interface has no option for it. LLVM's own listener writes a file for
/// every process into `.debug/jit` of the home or temporary directory, although the engine runs nothing here. This
/// definition takes precedence over the one in LLVM's archive.
// SAFETY: the name and the type are those of `static JITEventListener *JITEventListener::createPerfJITEventListener()`,
// and its callers accept null.
#[unsafe(export_name = "_ZN4llvm16JITEventListener26createPerfJITEventListenerEv")]
extern "C" fn no_perf_listener() -> *mut std::ffi::c_void {
    std::ptr::null_mut()
}

/// Links the object files into a shared library, by the first linker that succeeds.
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
    Err(Error::Link(format!("no linker could link the library of kernels; install `binutils`\n{}", said.join("\n"))))
}
