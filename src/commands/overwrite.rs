//! Nothing that exists is overwritten unasked, and nothing that a command reads is overwritten at all.

use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::Failure;

/// The flag of every command that writes.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Overwrite {
    /// Replace what is there already
    #[arg(long)]
    overwrite: bool,
}

impl Overwrite {
    /// The file `path` may be written: it does not exist or is to be replaced, and neither is one of `inputs` nor lies
    /// in one that is a folder.
    pub fn file(self, path: &Path, inputs: &[&Path]) -> Result<(), Failure> {
        let refuse = |why: &str| Err(Failure::Usage(format!("{}: {why}", path.display())));
        no_link_to_nothing(path)?;
        let Ok(found) = fs::metadata(path) else { return Ok(()) };
        if found.is_dir() {
            return refuse("a folder, and a file is to be written; name one inside it");
        }
        if !found.is_file() {
            return refuse("no plain file, so it cannot be replaced; name another");
        }
        if let Some(input) = inputs.iter().find(|input| within(path, input)) {
            return refuse(&match input.is_dir() {
                false => "it is read by this command, so it is not written over; name another file".into(),
                true => format!(
                    "it lies in {}, which this command reads, so it is not written over; name another file",
                    input.display()
                ),
            });
        }
        if !self.overwrite {
            return refuse("it exists; replace it with `--overwrite`, or name another file");
        }
        Ok(())
    }

    /// The folder `path` may be replaced with all that it holds: it is not there, or empty, or is to be replaced, and
    /// none of `inputs` lies in it. `ours` tells a folder that such a command wrote; another one is not replaced.
    pub fn folder(self, path: &Path, inputs: &[&Path], ours: impl Fn(&Path) -> bool) -> Result<(), Failure> {
        let refuse = |why: &str| Err(Failure::Usage(format!("{}: {why}", path.display())));
        no_file(path)?;
        if names(path).is_empty() {
            return Ok(());
        }
        if let Some(input) = inputs.iter().find(|input| within(input, path)) {
            return refuse(&format!(
                "it holds {}, which this command reads, so it is not written over; name another folder",
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

    /// The files `there`, which are in the way in the folder `path`, may be replaced. `mend` is another way out.
    pub fn files(self, path: &Path, there: &[PathBuf], mend: &str) -> Result<(), Failure> {
        no_file(path)?;
        if there.is_empty() || self.overwrite {
            return Ok(());
        }
        let names: Vec<String> =
            there.iter().filter_map(|file| Some(file.file_name()?.to_string_lossy().into_owned())).collect();
        Err(Failure::Usage(format!(
            "{}: it holds {} already; {mend}replace them with `--overwrite`, or name another folder",
            path.display(),
            names.join(", ")
        )))
    }
}

/// A link is followed to what it leads to; one to nothing leads nowhere that could be written.
fn no_link_to_nothing(path: &Path) -> Result<(), Failure> {
    match fs::read_link(path) {
        Ok(to) if !path.exists() => Err(Failure::Usage(format!(
            "{}: a link to {}, which is not there; name another",
            path.display(),
            to.display()
        ))),
        _ => Ok(()),
    }
}

/// A folder can be at `path`: nothing else is there.
fn no_file(path: &Path) -> Result<(), Failure> {
    no_link_to_nothing(path)?;
    match fs::metadata(path) {
        Ok(found) if !found.is_dir() => {
            Err(Failure::Usage(format!("{}: a file, and a folder is to be written; name another", path.display())))
        }
        _ => Ok(()),
    }
}

/// The names of what a folder holds.
pub fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().filter_map(|entry| entry.ok());
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Every file in a folder and in those inside it, by its path from the folder.
#[cfg(feature = "compiler")]
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all = vec![];
    for name in names(folder) {
        let path = folder.join(&name);
        match path.symlink_metadata().is_ok_and(|found| found.is_dir()) {
            true => all.extend(files(&path).into_iter().map(|inner| Path::new(&name).join(inner))),
            false => all.push(name.into()),
        }
    }
    all
}

/// `inner` is `outer`, or lies in it.
pub fn within(inner: &Path, outer: &Path) -> bool {
    matches!((inner.canonicalize(), outer.canonicalize()), (Ok(inner), Ok(outer)) if inner.starts_with(&outer))
}
