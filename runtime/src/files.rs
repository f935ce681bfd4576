//! Atomic writes: files and folders are written under a temporary name next to their target and then renamed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use tempfile::TempDir;

use crate::error::RuntimeError;

/// Prefix of the names of files and folders that are being written.
pub const TEMPORARY_PREFIX: &str = ".peftc-";

/// Writes a file atomically.
///
/// # Errors
///
/// If the file cannot be written; an older file of that name is then unchanged.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), RuntimeError> {
    replace(path, |mut to| to.write_all(bytes))
}

/// Writes a file atomically through `write`. An older file of that name is replaced only when the new one is complete.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&File) -> io::Result<()>) -> Result<(), RuntimeError> {
    let failed = |e: io::Error| {
        let hint = match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space, nothing was replaced",
            _ => "",
        };
        RuntimeError::file(path, format!("cannot be written: {e}{hint}"))
    };
    // If the path is a symbolic link, its target is replaced.
    let target = &path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let folder = parent_of(target);
    fs::create_dir_all(folder).map_err(failed)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY_PREFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let temporary = builder.tempfile_in(folder).map_err(failed)?;
    write(temporary.as_file()).map_err(failed)?;
    temporary.as_file().sync_all().map_err(failed)?;
    temporary.persist(target).map_err(|e| failed(e.error))?;
    sync_directory(folder);
    Ok(())
}

/// Writes the folder `path` atomically: `fill` is given a temporary folder, which then replaces `path` and all that it
/// holds.
///
/// # Errors
///
/// If writing fails; what was at `path` before is then unchanged.
pub fn write_folder<E: From<RuntimeError>>(path: &Path, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let failed = |e: io::Error| E::from(RuntimeError::file(path, format!("cannot be written: {e}")));
    // If the path is `.` or a symbolic link, its target is replaced.
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let parent = parent_of(path);
    fs::create_dir_all(parent).map_err(failed)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY_PREFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    let fresh = builder.tempdir_in(parent).map_err(failed)?;
    fill(fresh.path())?;
    sync_directory(fresh.path());
    let aside = builder.tempdir_in(parent).map_err(failed)?;
    replace_folder(path, fresh, &aside).map_err(failed)
}

/// Renames the folder `fresh` to `path`. A folder that exists there is first moved into `aside`, and moved back if the
/// renaming of `fresh` fails.
pub(crate) fn replace_folder(path: &Path, fresh: TempDir, aside: &TempDir) -> io::Result<()> {
    let old = aside.path().join("old");
    let replaces = path.exists();
    if replaces {
        fs::rename(path, &old)?;
    }
    if let Err(error) = fs::rename(fresh.path(), path) {
        if replaces {
            fs::rename(&old, path)?;
        }
        return Err(error);
    }
    // The folder has been renamed, so dropping the handle must not remove it.
    let _ = fresh.keep();
    sync_directory(parent_of(path));
    Ok(())
}

/// The folder that contains `path`; `.` for a plain name.
pub(crate) fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Flushes a folder, so that renames in it survive a power cut where the file system supports that.
pub(crate) fn sync_directory(path: &Path) {
    if let Ok(directory) = File::open(path) {
        let _ = directory.sync_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_written_whole_or_not_at_all() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("model");
        let write =
            |name: &'static str| move |to: &Path| fs::write(to.join(name), name).map_err(|e| RuntimeError::file(to, e));
        write_folder(&path, write("old")).unwrap();
        let failed = |to: &Path| {
            write("half")(to)?;
            Err(RuntimeError::file(to, "no space"))
        };
        write_folder::<RuntimeError>(&path, failed).unwrap_err();
        assert!(path.join("old").is_file() && !path.join("half").exists());
        write_folder(&path, write("new")).unwrap();
        assert!(path.join("new").is_file() && !path.join("old").exists());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
    }
}
