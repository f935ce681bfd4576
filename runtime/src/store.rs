//! Artifacts on disk: a directory `NAME.peftc` of `manifest.json` and `kernels.so`, or `kernels.ptx` for a GPU.
//!
//! Writing is all or nothing: a sibling directory is filled and then renamed. Reading trusts nothing: an
//! artifact made by another version, for another processor, damaged on its way, or where a stranger may
//! have written it ([`crate::trust`]) is refused with the file and the mend in the message.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::artifact::{FORMAT, Manifest};
use crate::device;
use crate::files::{BESIDE, parent_of, swap, sync_directory};
use crate::trust::{Stranger, TrustError, What, trusted, trusted_file};
use crate::validate::validate;

pub const MANIFEST: &str = "manifest.json";

const MEND: &str = "compile it again with `peftc compile SPEC -o ARTIFACT`";

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Stranger(#[from] Stranger),
    #[error("cannot write `{path}`: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("`{path}` exists and is no artifact, so it is not replaced; give another name")]
    Occupied { path: PathBuf },
    #[error("cannot read `{path}`: {source}; {hint}")]
    Read { path: PathBuf, source: io::Error, hint: String },
    #[error("`{path}` is damaged: {why}; {MEND}")]
    Damaged { path: PathBuf, why: String },
    #[error("`{path}` has format {found}, this peftc reads format {FORMAT}; {MEND}, or use the peftc that wrote it")]
    Format { path: PathBuf, found: u64 },
    #[error("`{path}` was compiled for {found}, this machine is {here}; {MEND} on this machine")]
    Arch { path: PathBuf, found: String, here: &'static str },
    #[error("`{path}` was compiled for a processor with {missing}, which this one lacks; {MEND} on this machine")]
    Features { path: PathBuf, missing: String },
    #[error(
        "`{path}` was compiled for a GPU of {arch} or later: {why}; or compile the spec for this machine's processor, with `--target cpu`"
    )]
    Gpu { path: PathBuf, arch: String, why: String },
}

/// Writes `manifest` and the library at `library` as the artifact `path`, in place of an older one.
/// Format and hash are filled in here.
pub fn save(path: &Path, manifest: &Manifest, library: &Path) -> Result<(), StoreError> {
    if path.exists() && !path.join(MANIFEST).is_file() {
        return Err(StoreError::Occupied { path: path.to_path_buf() });
    }
    let parent = parent_of(path);
    fs::create_dir_all(parent).map_err(failed(parent))?;
    replace(path, filled(path, manifest, library)?)
}

/// Puts the artifact in `fresh` in the place of what is at `path`, if anything.
fn replace(path: &Path, fresh: TempDir) -> Result<(), StoreError> {
    let aside = sibling(parent_of(path)).map_err(failed(path))?;
    swap(path, fresh, &aside).map_err(failed(path))
}

/// A cache's entry at `path`: what `make` compiles, unless a sound one is there. Of processes that want the same entry one compiles it and the others wait for it; an entry that
/// was found to be sound is never replaced.
pub fn cached<E: From<StoreError>>(
    path: &Path,
    make: impl FnOnce() -> Result<(Manifest, PathBuf), E>,
) -> Result<(Manifest, PathBuf), E> {
    let sound = || match open(path) {
        Ok(found) => Ok(Some(found)),
        // Its mend is the user's.
        Err(error @ StoreError::Stranger(_)) => Err(E::from(error)),
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
            // Who waits for it finds the entry first.
            let _ = fs::remove_file(&lock);
            Ok(open(path)?)
        }
        Err(error) => {
            tracing::warn!("the cache takes nothing: {error}");
            Ok((manifest, library))
        }
    }
}

/// Waits for the lock, where the file system has locks; without, processes do each other's work, and no harm.
fn locked(path: &Path) -> Option<File> {
    let mut options = File::options();
    options.create(true).truncate(false).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(path).ok()?;
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        tracing::info!("another process compiles the same");
    }
    file.lock().ok()?;
    Some(file)
}

/// Puts an entry where none is, or one that is not sound. If a sound one has come there meanwhile, that stays.
fn publish(path: &Path, manifest: &Manifest, library: &Path) -> Result<(), StoreError> {
    let fresh = filled(path, manifest, library)?;
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

/// The artifact in a folder beside `path`, ready to be renamed.
fn filled(path: &Path, manifest: &Manifest, library: &Path) -> Result<TempDir, StoreError> {
    let parent = parent_of(path);
    let code = fs::read(library).map_err(|source| StoreError::Read {
        path: library.to_path_buf(),
        source,
        hint: "it is what the compiler has just linked".into(),
    })?;
    let manifest = Manifest { format: FORMAT, library: blake3::hash(&code).to_hex().to_string(), ..manifest.clone() };
    let text = serde_json::to_vec(&manifest).map_err(|e| failed(&path.join(MANIFEST))(e.into()))?;
    let text = sealed(text);

    let fresh = sibling(parent).map_err(failed(parent))?;
    for (name, bytes) in [(manifest.library_name(), &code), (MANIFEST, &text)] {
        write_synced(&fresh.path().join(name), bytes).map_err(failed(&path.join(name)))?;
    }
    Ok(fresh)
}

const SEAL: &str = ",\"checksum\":\"";

/// Adds a last key to a JSON object: the hash of all that stands before it.
fn sealed(mut text: Vec<u8>) -> Vec<u8> {
    text.pop_if(|last| *last == b'}');
    let hash = blake3::hash(&text).to_hex();
    text.extend(format!("{SEAL}{hash}\"}}").into_bytes());
    text
}

/// The text is as [`sealed`] made it. A changed digit could send a kernel beyond a buffer's end.
fn intact(text: &[u8]) -> bool {
    let Some(at) = text.windows(SEAL.len()).rposition(|w| w == SEAL.as_bytes()) else { return false };
    let hash = blake3::hash(&text[..at]).to_hex();
    text[at + SEAL.len()..].strip_prefix(hash.as_bytes()).is_some_and(|rest| rest.trim_ascii() == b"\"}")
}

/// A directory beside the artifact that goes when it is dropped. Whatever the umask, only its owner writes to it: it is
/// to become an artifact.
fn sibling(parent: &Path) -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(BESIDE);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755));
    builder.tempdir_in(parent)
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o644);
    let mut file = options.open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Reads the artifact `path` to run it on this machine: its manifest, checked, and where its library lies.
pub fn load(path: &Path) -> Result<(Manifest, PathBuf), StoreError> {
    let (manifest, library) = open(path)?;
    runs_here(path, &manifest)?;
    Ok((manifest, library))
}

/// This machine's processor has what the kernels were compiled for. `path` is for the message.
pub fn runs_here(path: &Path, manifest: &Manifest) -> Result<(), StoreError> {
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

/// Reads the artifact `path`, whichever machine it is for. The library's path is resolved and trusted.
pub fn open(path: &Path) -> Result<(Manifest, PathBuf), StoreError> {
    let unreadable = |file: &Path, source| StoreError::Read {
        path: file.to_path_buf(),
        hint: match path.is_dir() {
            true => format!("`{}` is no complete artifact, {MEND}", path.display()),
            false => "an artifact is a directory NAME.peftc that `peftc compile` writes".into(),
        },
        source,
    };
    let refused = |file: &Path, error| match error {
        TrustError::Stranger(stranger) => StoreError::Stranger(stranger),
        TrustError::Unreadable(source) => unreadable(file, source),
    };
    let file = path.join(MANIFEST);
    let folder = trusted(path, What::Artifact).map_err(|error| refused(&file, error))?;
    let read = |name: &str| {
        let file = path.join(name);
        let resolved = trusted_file(&folder, name).map_err(|error| refused(&file, error))?;
        let bytes = fs::read(&resolved).map_err(|source| unreadable(&file, source))?;
        Ok::<_, StoreError>((resolved, bytes))
    };
    let damaged = |path: &Path, why: String| StoreError::Damaged { path: path.to_path_buf(), why };

    let (_, text) = read(MANIFEST)?;
    // The version is read by itself: a newer manifest may have another form altogether.
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(|e| damaged(&file, e.to_string()))?;
    match value.get("format").and_then(serde_json::Value::as_u64) {
        Some(found) if found == u64::from(FORMAT) => {}
        Some(found) => return Err(StoreError::Format { path: file, found }),
        None => return Err(damaged(&file, "it names no format".into())),
    }
    if !intact(&text) {
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
