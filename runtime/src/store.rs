//! Artifacts on disk: a directory `NAME.peftc` with `manifest.json` and `kernels.so`, or `kernels.ptx` for a GPU.
//!
//! Writing is atomic: a temporary sibling directory is filled and then renamed. Reading trusts nothing: an artifact
//! from another version, for another processor, damaged, or writable by another user ([`crate::trust`]) is refused with
//! a message that names the file and how to fix it.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::artifact::{FORMAT, Manifest};
use crate::device;
use crate::files::{TEMPORARY_PREFIX, parent_of, replace_folder, sync_directory};
use crate::trust::{TrustError, TrustSubject, Untrusted, trusted, trusted_file};
use crate::validate::validate;

/// File name of the manifest in an artifact.
pub const MANIFEST_FILE: &str = "manifest.json";

const RECOMPILE: &str = "compile it again with `peftc compile SPEC -o ARTIFACT`";

/// Why an artifact cannot be written, read or run.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another user may have written the artifact.
    #[error(transparent)]
    Untrusted(#[from] Untrusted),
    /// The artifact cannot be written.
    #[error("cannot write `{path}`: {source}")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// Something else is at the path.
    #[error("`{path}` exists and is no artifact, so it is not replaced; give another name")]
    Occupied {
        /// The path of the artifact to write.
        path: PathBuf,
    },
    /// The artifact cannot be read.
    #[error("cannot read `{path}`: {source}; {hint}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
        /// How to fix it.
        hint: String,
    },
    /// The artifact is not as it was written.
    #[error("`{path}` is damaged: {why}; {RECOMPILE}")]
    Damaged {
        /// The damaged file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The artifact has another format than [`FORMAT`].
    #[error(
        "`{path}` has format {found}, this peftc reads format {FORMAT}; {RECOMPILE}, or use the peftc that wrote it"
    )]
    Format {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// The artifact is for a processor of another architecture.
    #[error("`{path}` was compiled for {found}, this machine is {here}; {RECOMPILE} on this machine")]
    Arch {
        /// The artifact.
        path: PathBuf,
        /// Its architecture.
        found: String,
        /// This machine's architecture.
        here: &'static str,
    },
    /// The artifact uses processor features that this machine lacks.
    #[error("`{path}` was compiled for a processor with {missing}, which this one lacks; {RECOMPILE} on this machine")]
    Features {
        /// The artifact.
        path: PathBuf,
        /// The features that are missing.
        missing: String,
    },
    /// The artifact is for a GPU, and there is none that can run it.
    #[error(
        "`{path}` was compiled for a GPU of {arch} or later: {why}; or compile the spec for this machine's processor, with `--target cpu`"
    )]
    Gpu {
        /// The artifact.
        path: PathBuf,
        /// Its least compute capability.
        arch: String,
        /// Why it cannot run here.
        why: String,
    },
}

/// Writes `manifest` and the kernels in the file `library` as the artifact `path`, and replaces an older artifact
/// there. The manifest's format and hash are filled in.
///
/// # Errors
///
/// If `path` is something other than an artifact, or cannot be written.
pub fn save(path: &Path, manifest: &Manifest, library: &Path) -> Result<(), StoreError> {
    if path.exists() && !path.join(MANIFEST_FILE).is_file() {
        return Err(StoreError::Occupied { path: path.to_path_buf() });
    }
    let parent = parent_of(path);
    fs::create_dir_all(parent).map_err(failed(parent))?;
    replace(path, write_sibling(path, manifest, library)?)
}

/// Renames the artifact in `fresh` to `path`, and removes an artifact that is there.
fn replace(path: &Path, fresh: TempDir) -> Result<(), StoreError> {
    let aside = sibling_directory(parent_of(path)).map_err(failed(path))?;
    replace_folder(path, fresh, &aside).map_err(failed(path))
}

/// Opens the cache entry at `path`; unless it is intact, compiles it with `make` and stores it. If several processes
/// need the same entry, one compiles it and the others wait. An intact entry is never replaced.
///
/// # Errors
///
/// If the entry is not trusted, or compiling fails. If the entry cannot be stored, the compiled program is used
/// directly.
pub fn open_or_compile<E: From<StoreError>>(
    path: &Path,
    make: impl FnOnce() -> Result<(Manifest, PathBuf), E>,
) -> Result<(Manifest, PathBuf), E> {
    let sound = || match open(path) {
        Ok(found) => Ok(Some(found)),
        // Only the user can fix this.
        Err(error @ StoreError::Untrusted(_)) => Err(E::from(error)),
        Err(_) => Ok(None),
    };
    if let Some(found) = sound()? {
        return Ok(found);
    }
    let lock = path.with_extension("lock");
    let _locked = locked(&lock);
    if let Some(found) = sound()? {
        return Ok(found);
    }
    let (manifest, library) = make()?;
    match publish(path, &manifest, &library) {
        Ok(()) => {
            // Processes that wait for the lock look for the entry first, so the lock file may go now.
            let _ = fs::remove_file(&lock);
            Ok(open(path)?)
        }
        Err(error) => {
            tracing::warn!("the compiled program cannot be cached: {error}");
            Ok((manifest, library))
        }
    }
}

/// Waits for the lock file. On a file system without locks several processes may compile the same entry, which is
/// harmless.
fn locked(path: &Path) -> Option<File> {
    let mut options = File::options();
    options.create(true).truncate(false).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(path).ok()?;
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        tracing::info!("another process compiles the same program; waiting for it");
    }
    file.lock().ok()?;
    Some(file)
}

/// Stores a cache entry, unless another process has stored an intact one meanwhile.
fn publish(path: &Path, manifest: &Manifest, library: &Path) -> Result<(), StoreError> {
    let fresh = write_sibling(path, manifest, library)?;
    if fs::rename(fresh.path(), path).is_ok() {
        let _ = fresh.keep();
        sync_directory(parent_of(path));
        return Ok(());
    }
    match open(path) {
        Ok(_) => Ok(()),
        Err(_) => replace(path, fresh),
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
    let path = path.to_path_buf();
    move |source| StoreError::Write { path, source }
}

/// Writes the artifact to a temporary folder next to `path`, ready to be renamed.
fn write_sibling(path: &Path, manifest: &Manifest, library: &Path) -> Result<TempDir, StoreError> {
    let parent = parent_of(path);
    let code = fs::read(library).map_err(|source| StoreError::Read {
        path: library.to_path_buf(),
        source,
        hint: "it is what the compiler has just linked".into(),
    })?;
    let manifest = Manifest { format: FORMAT, library: blake3::hash(&code).to_hex().to_string(), ..manifest.clone() };
    let text = serde_json::to_vec(&manifest).map_err(|e| failed(&path.join(MANIFEST_FILE))(e.into()))?;
    let text = with_checksum(text);

    let fresh = sibling_directory(parent).map_err(failed(parent))?;
    for (name, bytes) in [(manifest.library_name(), &code), (MANIFEST_FILE, &text)] {
        write_synced(&fresh.path().join(name), bytes).map_err(failed(&path.join(name)))?;
    }
    Ok(fresh)
}

/// The last key of a manifest, whose value is the hash of everything before it.
const CHECKSUM_KEY: &str = ",\"checksum\":\"";

/// Appends the checksum to a JSON object, as its last key.
fn with_checksum(mut text: Vec<u8>) -> Vec<u8> {
    text.pop_if(|last| *last == b'}');
    let hash = blake3::hash(&text).to_hex();
    text.extend(format!("{CHECKSUM_KEY}{hash}\"}}").into_bytes());
    text
}

/// True if the checksum that [`with_checksum`] appended is right. An undetected change of a digit could let a kernel
/// access memory beyond a buffer's end.
fn checksum_matches(text: &[u8]) -> bool {
    let Some(at) = text.windows(CHECKSUM_KEY.len()).rposition(|w| w == CHECKSUM_KEY.as_bytes()) else { return false };
    let hash = blake3::hash(&text[..at]).to_hex();
    text[at + CHECKSUM_KEY.len()..].strip_prefix(hash.as_bytes()).is_some_and(|rest| rest.trim_ascii() == b"\"}")
}

/// A temporary folder next to the artifact, removed when it is dropped. It is going to be an artifact, so only its
/// owner may write to it, whatever the umask is.
fn sibling_directory(parent: &Path) -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY_PREFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755));
    builder.tempdir_in(parent)
}

/// Writes a new file and flushes it to disk.
fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o644);
    let mut file = options.open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Opens the artifact `path` to run it on this machine. Returns the checked manifest and the path of the kernels.
///
/// # Errors
///
/// As [`open`] and [`check_machine`].
pub fn load(path: &Path) -> Result<(Manifest, PathBuf), StoreError> {
    let (manifest, library) = open(path)?;
    check_machine(path, &manifest)?;
    Ok((manifest, library))
}

/// Checks that this machine has the processor features, or the GPU, that the kernels were compiled for. `path` is for
/// the message.
///
/// # Errors
///
/// [`StoreError::Arch`], [`StoreError::Features`] or [`StoreError::Gpu`].
pub fn check_machine(path: &Path, manifest: &Manifest) -> Result<(), StoreError> {
    if let Some(least) = manifest.gpu() {
        let why = match device::gpus() {
            Ok(gpus) if gpus[0].capability >= least => return Ok(()),
            Ok(gpus) => format!("here is {}", gpus[0]),
            Err(error) => error.to_string(),
        };
        return Err(StoreError::Gpu { path: path.to_path_buf(), arch: manifest.arch.clone(), why });
    }
    let here = std::env::consts::ARCH;
    if manifest.arch != here {
        return Err(StoreError::Arch { path: path.to_path_buf(), found: manifest.arch.clone(), here });
    }
    let missing: Vec<&str> = manifest.features.iter().map(String::as_str).filter(|f| !device::has_feature(f)).collect();
    match missing.is_empty() {
        true => Ok(()),
        false => Err(StoreError::Features { path: path.to_path_buf(), missing: missing.join(", ") }),
    }
}

/// Opens the artifact `path`, whichever machine it is for. Returns the checked manifest and the resolved, trusted path
/// of the kernels.
///
/// # Errors
///
/// If the artifact cannot be read, is not trusted, is damaged, or has another format.
pub fn open(path: &Path) -> Result<(Manifest, PathBuf), StoreError> {
    let unreadable = |file: &Path, source| StoreError::Read {
        path: file.to_path_buf(),
        hint: match path.is_dir() {
            true => format!("`{}` is no complete artifact, {RECOMPILE}", path.display()),
            false => "an artifact is a directory NAME.peftc that `peftc compile` writes".into(),
        },
        source,
    };
    let refused = |file: &Path, error| match error {
        TrustError::Untrusted(untrusted) => StoreError::Untrusted(untrusted),
        TrustError::Unreadable(source) => unreadable(file, source),
    };
    let file = path.join(MANIFEST_FILE);
    let folder = trusted(path, TrustSubject::Artifact).map_err(|error| refused(&file, error))?;
    let read = |name: &str| {
        let file = path.join(name);
        let resolved = trusted_file(&folder, name).map_err(|error| refused(&file, error))?;
        let bytes = fs::read(&resolved).map_err(|source| unreadable(&file, source))?;
        Ok::<_, StoreError>((resolved, bytes))
    };
    let damaged = |path: &Path, why: String| StoreError::Damaged { path: path.to_path_buf(), why };

    let (_, text) = read(MANIFEST_FILE)?;
    // The format is read first, since a manifest of another format may have other fields.
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(|e| damaged(&file, e.to_string()))?;
    match value.get("format").and_then(serde_json::Value::as_u64) {
        Some(found) if found == u64::from(FORMAT) => {}
        Some(found) => return Err(StoreError::Format { path: file, found }),
        None => return Err(damaged(&file, "it names no format".into())),
    }
    if !checksum_matches(&text) {
        return Err(damaged(&file, "its checksum does not agree".into()));
    }
    let manifest: Manifest = serde_json::from_value(value).map_err(|e| damaged(&file, e.to_string()))?;
    validate(&manifest).map_err(|why| damaged(&file, why))?;

    let (library, code) = read(manifest.library_name())?;
    if blake3::hash(&code).to_hex().as_str() != manifest.library {
        let library = path.join(manifest.library_name());
        return Err(damaged(&library, "it is not the library its manifest was written with".into()));
    }
    Ok((manifest, library))
}

#[cfg(test)]
mod tests;
