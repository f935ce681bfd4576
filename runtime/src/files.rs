//! Files and folders that are written beside their place and then renamed: all of it or nothing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use tempfile::TempDir;

use crate::error::RuntimeError;

/// What the names of files begin with that are being written.
pub const BESIDE: &str = ".peftc-";

/// Writes beside `path`, then renames.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), RuntimeError> {
    replace(path, |mut to| to.write_all(bytes))
}

pub(crate) fn replace(path: &Path, write: impl FnOnce(&File) -> io::Result<()>) -> Result<(), RuntimeError> {
    let failed = |e: io::Error| {
        let hint = match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space, nothing was replaced",
            _ => "",
        };
        RuntimeError::file(path, format!("cannot be written: {e}{hint}"))
    };
    // A file that is given by a link is replaced where it lies.
    let place = &path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let folder = parent_of(place);
    fs::create_dir_all(folder).map_err(failed)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(BESIDE);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let beside = builder.tempfile_in(folder).map_err(failed)?;
    write(beside.as_file()).map_err(failed)?;
    beside.as_file().sync_all().map_err(failed)?;
    beside.persist(place).map_err(|e| failed(e.error))?;
    sync_directory(folder);
    Ok(())
}

/// Writes the folder `path`: `fill` is given a folder beside it, which then takes its place, and an older one's with all
/// that it holds. When writing fails or is interrupted, what was there before stands.
pub fn write_folder<E: From<RuntimeError>>(path: &Path, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let failed = |e: io::Error| E::from(RuntimeError::file(path, format!("cannot be written: {e}")));
    // A folder given as `.` or by a link is replaced where it lies.
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let parent = parent_of(path);
    fs::create_dir_all(parent).map_err(failed)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(BESIDE);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    let fresh = builder.tempdir_in(parent).map_err(failed)?;
    fill(fresh.path())?;
    sync_directory(fresh.path());
    let aside = builder.tempdir_in(parent).map_err(failed)?;
    swap(path, fresh, &aside).map_err(failed)
}

/// Renames the folder `fresh` to `path`. What is there already is first renamed into `aside`, a folder beside it, and
/// comes back if the renaming of `fresh` fails.
pub(crate) fn swap(path: &Path, fresh: TempDir, aside: &TempDir) -> io::Result<()> {
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
    // It has moved: there is nothing left to remove.
    let _ = fresh.keep();
    sync_directory(parent_of(path));
    Ok(())
}

pub(crate) fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes renames last through a power cut, where the system can.
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
