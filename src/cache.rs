//! The user's cache folder: compiled artifacts, machine code of single kernels, and tokenised data sets.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::{fs, io};

use peft_runtime::store;
use peft_runtime::trust::{TrustError, TrustSubject, trusted};

use crate::failure::Failure;

/// The cache folder. It is created if it is missing, with access for its owner alone. `None` if `PEFTC_CACHE` is empty,
/// or if the folder cannot be created.
///
/// # Errors
///
/// Other users may write to the folder. They could put machine code there that this program would run.
pub fn folder() -> Result<Option<PathBuf>, Failure> {
    let path = configured_folder(|name| std::env::var_os(name)).unwrap_or_else(|| {
        tracing::warn!(
            "nothing is cached: neither XDG_CACHE_HOME nor HOME is an absolute path; name a folder in PEFTC_CACHE"
        );
        None
    });
    let Some(path) = path else { return Ok(None) };
    let made = create_private_folder(&path).map_err(TrustError::from);
    match made.and_then(|()| trusted(&path, TrustSubject::Cache)) {
        Ok(path) => Ok(Some(path)),
        Err(TrustError::Untrusted(untrusted)) => Err(store::StoreError::from(untrusted).into()),
        Err(TrustError::Unreadable(error)) => {
            tracing::warn!("nothing is cached, because the cache folder cannot be used: {}: {error}", path.display());
            Ok(None)
        }
    }
}

/// Creates a folder and its parents with access for their owner alone.
fn create_private_folder(path: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

/// The folder in `cache` for the machine code of single kernels. Each build of this program has its own. `None` if it
/// cannot be created.
#[cfg(feature = "compiler")]
pub fn kernel_folder(cache: &Path) -> Option<PathBuf> {
    let folder = cache.join(format!("{}.kernels", &blake3::hash(build_id().as_bytes()).to_hex()[..32]));
    let made = create_private_folder(&folder);
    made.inspect_err(|e| {
        tracing::warn!("nothing is cached, because the cache folder cannot be used: {}: {e}", folder.display())
    })
    .ok()?;
    Some(folder)
}

/// A text that identifies this build of the program: its version, and the size and modification time of its file. Cache
/// keys contain it, because two builds may produce different results.
pub fn build_id() -> String {
    let build = std::env::current_exe().and_then(|exe| exe.metadata()).and_then(|m| Ok((m.len(), m.modified()?)));
    let build = build.map(|b| format!("{b:?}")).unwrap_or_default();
    format!("peftc {} {build}", env!("CARGO_PKG_VERSION"))
}

/// The cache folder that the environment configures, read by `variable`: `PEFTC_CACHE` if it is set, else `peftc` in
/// the user's cache directory. By the XDG Base Directory Specification, a variable that does not hold an absolute path
/// counts as unset.
///
/// `Some(None)` if `PEFTC_CACHE` is empty, which turns the cache off; `None` if no variable is set.
fn configured_folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<Option<PathBuf>> {
    if let Some(set) = variable("PEFTC_CACHE") {
        return Some((!set.is_empty()).then(|| set.into()));
    }
    let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
    Some(Some(base.join("peftc")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_folder_follows_the_environment() {
        let found = |set: &[(&str, &str)]| {
            configured_folder(|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into()))
        };
        let at = |path: &str| Some(Some(PathBuf::from(path)));
        assert_eq!(found(&[("HOME", "/home/a")]), at("/home/a/.cache/peftc"));
        assert_eq!(found(&[("HOME", "/home/a"), ("XDG_CACHE_HOME", "/c")]), at("/c/peftc"));
        for relative in ["", ".", "cache", "../cache"] {
            assert_eq!(found(&[("HOME", "/home/a"), ("XDG_CACHE_HOME", relative)]), at("/home/a/.cache/peftc"));
            assert_eq!(found(&[("HOME", relative), ("XDG_CACHE_HOME", relative)]), None);
            assert_eq!(found(&[("HOME", relative)]), None);
        }
        assert_eq!(found(&[]), None);
        // `PEFTC_CACHE` may be relative, since the user sets it for peftc alone.
        assert_eq!(found(&[("PEFTC_CACHE", "cache"), ("HOME", "/home/a")]), at("cache"));
        assert_eq!(found(&[("PEFTC_CACHE", ""), ("HOME", "/home/a")]), Some(None));
    }
}
