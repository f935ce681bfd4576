//! The user's cache: compiled programs and single kernels, and data sets as they were tokenised.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::{fs, io};

use peft_runtime::store;
use peft_runtime::trust::{TrustError, What, trusted};

use crate::failure::Failure;

/// The cache's folder, made if it is not there, for its owner alone. None when `PEFTC_CACHE` is empty, or nothing can be
/// made there. One that strangers may write to is refused.
pub fn folder() -> Result<Option<PathBuf>, Failure> {
    let path = place(|name| std::env::var_os(name)).unwrap_or_else(|| {
        tracing::warn!(
            "nothing is cached: neither XDG_CACHE_HOME nor HOME is an absolute path; name a folder in PEFTC_CACHE"
        );
        None
    });
    let Some(path) = path else { return Ok(None) };
    let made = make(&path).map_err(TrustError::from);
    match made.and_then(|()| trusted(&path, What::Cache)) {
        Ok(path) => Ok(Some(path)),
        Err(TrustError::Stranger(stranger)) => Err(store::StoreError::from(stranger).into()),
        Err(TrustError::Unreadable(error)) => {
            tracing::warn!("the cache takes nothing: {}: {error}", path.display());
            Ok(None)
        }
    }
}

/// Makes a folder for its owner alone.
fn make(path: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

/// Where the machine code of single kernels is in the cache: each build of this program has its own. None if nothing can
/// be made there.
#[cfg(feature = "compiler")]
pub fn kernels(cache: &Path) -> Option<PathBuf> {
    let folder = cache.join(format!("{}.kernels", &blake3::hash(build().as_bytes()).to_hex()[..32]));
    let made = make(&folder);
    made.inspect_err(|e| tracing::warn!("the cache takes nothing: {}: {e}", folder.display())).ok()?;
    Some(folder)
}

/// What tells one build of this program from another: what they make may differ.
pub fn build() -> String {
    let build = std::env::current_exe().and_then(|exe| exe.metadata()).and_then(|m| Ok((m.len(), m.modified()?)));
    let build = build.map(|b| format!("{b:?}")).unwrap_or_default();
    format!("peftc {} {build}", env!("CARGO_PKG_VERSION"))
}

/// Where the environment says that the cache is: `PEFTC_CACHE`, or none if that is empty; else the user's cache
/// directory. By the XDG Base Directory Specification, a variable that holds no absolute path counts as unset. Nothing
/// if all do.
fn place(variable: impl Fn(&str) -> Option<OsString>) -> Option<Option<PathBuf>> {
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
    fn relative_folders_hold_no_cache() {
        let found = |set: &[(&str, &str)]| {
            place(|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into()))
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
        // This one is named for peftc alone.
        assert_eq!(found(&[("PEFTC_CACHE", "cache"), ("HOME", "/home/a")]), at("cache"));
        assert_eq!(found(&[("PEFTC_CACHE", ""), ("HOME", "/home/a")]), Some(None));
    }
}
