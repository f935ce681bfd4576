//! Protects files from being overwritten: existing files only with `--overwrite`, a command's own inputs never.

use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::Failure;

/// The option of every command that writes.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Overwrite {
    /// Replace an existing output
    #[arg(long)]
    overwrite: bool,
}

impl Overwrite {
    /// Checks that the file `path` may be written.
    ///
    /// # Errors
    ///
    /// The file exists and `--overwrite` is not given, it is one of `inputs` or in one of them that is a folder, or it
    /// is not a plain file.
    pub fn file(self, path: &Path, inputs: &[&Path]) -> Result<(), Failure> {
        let refuse = |why: &str| Err(Failure::Usage(format!("{}: {why}", path.display())));
        refuse_dangling_link(path)?;
        let Ok(found) = fs::metadata(path) else { return Ok(()) };
        if found.is_dir() {
            return refuse("it is a folder, and this command writes a file; name a file in it");
        }
        if !found.is_file() {
            return refuse("it is not a plain file, so it cannot be replaced; name another file");
        }
        if let Some(input) = inputs.iter().find(|input| is_within(path, input)) {
            return refuse(&match input.is_dir() {
                false => "this command reads it, so it is not overwritten; name another file".into(),
                true => format!(
                    "it is in {}, which this command reads, so it is not overwritten; name another file",
                    input.display()
                ),
            });
        }
        if !self.overwrite {
            return refuse("it exists; replace it with `--overwrite`, or name another file");
        }
        Ok(())
    }

    /// Checks that the folder `path` may be replaced with all its contents. `ours` returns whether a folder was written
    /// by the same command.
    ///
    /// # Errors
    ///
    /// The folder is not empty, and it holds one of `inputs`, is not `ours`, or `--overwrite` is not given; or `path`
    /// is not a folder.
    pub fn folder(self, path: &Path, inputs: &[&Path], ours: impl Fn(&Path) -> bool) -> Result<(), Failure> {
        let refuse = |why: &str| Err(Failure::Usage(format!("{}: {why}", path.display())));
        refuse_non_folder(path)?;
        if entry_names(path).is_empty() {
            return Ok(());
        }
        if let Some(input) = inputs.iter().find(|input| is_within(input, path)) {
            return refuse(&format!(
                "it holds {}, which this command reads, so it is not overwritten; name another folder",
                input.display()
            ));
        }
        if !ours(path) {
            return refuse(
                "it holds other things than this command writes, so it is not replaced; name another folder",
            );
        }
        if !self.overwrite {
            return refuse("it exists; replace it with `--overwrite`, or name another folder");
        }
        Ok(())
    }

    /// Checks that the existing files `there` of the folder `path` may be replaced. `mend` is another remedy for the
    /// message, ending in a comma.
    ///
    /// # Errors
    ///
    /// There are such files and `--overwrite` is not given, or `path` is not a folder.
    pub fn files(self, path: &Path, there: &[PathBuf], mend: &str) -> Result<(), Failure> {
        refuse_non_folder(path)?;
        if there.is_empty() || self.overwrite {
            return Ok(());
        }
        let names: Vec<String> =
            there.iter().filter_map(|file| Some(file.file_name()?.to_string_lossy().into_owned())).collect();
        Err(Failure::Usage(format!(
            "{}: it already holds {}; {mend}replace them with `--overwrite`, or name another folder",
            path.display(),
            names.join(", ")
        )))
    }
}

/// Refuses a symbolic link to a path that does not exist. Other links are followed.
fn refuse_dangling_link(path: &Path) -> Result<(), Failure> {
    match fs::read_link(path) {
        Ok(to) if !path.exists() => Err(Failure::Usage(format!(
            "{}: it is a link to {}, which does not exist; name another path",
            path.display(),
            to.display()
        ))),
        _ => Ok(()),
    }
}

/// Refuses a path at which something other than a folder exists.
fn refuse_non_folder(path: &Path) -> Result<(), Failure> {
    refuse_dangling_link(path)?;
    match fs::metadata(path) {
        Ok(found) if !found.is_dir() => Err(Failure::Usage(format!(
            "{}: it is a file, and this command writes a folder; name another path",
            path.display()
        ))),
        _ => Ok(()),
    }
}

/// The names of a folder's entries; empty if it cannot be read.
pub fn entry_names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().filter_map(|entry| entry.ok());
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// All files of a folder and its subfolders, by their paths relative to the folder.
#[cfg(feature = "compiler")]
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all = vec![];
    for name in entry_names(folder) {
        let path = folder.join(&name);
        match path.symlink_metadata().is_ok_and(|found| found.is_dir()) {
            true => all.extend(files(&path).into_iter().map(|inner| Path::new(&name).join(inner))),
            false => all.push(name.into()),
        }
    }
    all
}

/// Whether both paths exist and `inner` is `outer` or in it.
pub fn is_within(inner: &Path, outer: &Path) -> bool {
    matches!((inner.canonicalize(), outer.canonicalize()), (Ok(inner), Ok(outer)) if inner.starts_with(&outer))
}
