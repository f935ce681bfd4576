//! The files in a run's folder.

use std::fs;
use std::path::{Path, PathBuf};

use peft_runtime::files;

use crate::adapters::{ADAPTER, BEST};
use crate::failure::Failure;
use crate::hub::peft;
use crate::train::metrics;
use crate::train::state::{EvaluationHistory, PREVIOUS, STATE, State};

/// The files of an earlier run in `out`, and those of an adapter in PEFT's format, which would be mistaken for the
/// run's.
pub fn earlier_files(out: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(out).into_iter().flatten().filter_map(|entry| entry.ok());
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    files.retain(|path| KEPT.contains(&name(path)) || metrics::is_file(name(path)) || unfinished(path));
    // The files that identify a run are first in the list, so that a folder that was cleared only in part is not one.
    files.sort_by_key(|path| (KEPT.iter().position(|kept| *kept == name(path)).unwrap_or(KEPT.len()), path.clone()));
    files
}

/// The files that a run keeps, and those of an adapter in PEFT's format.
const KEPT: [&str; 6] = [PREVIOUS, STATE, ADAPTER, BEST, peft::CONFIG, peft::MODEL];

/// The files of [`earlier_files`] that have content: trained values, a state, or metrics.
pub fn blocking_files(out: &Path) -> Vec<PathBuf> {
    let figures = |path: &Path| name(path) == metrics::LINES && path.metadata().is_ok_and(|found| found.len() > 0);
    let mut files = earlier_files(out);
    // The previous state adds nothing if the newest state exists.
    let state = files.iter().any(|path| name(path) == STATE);
    files.retain(|path| KEPT.contains(&name(path)) && !(state && name(path) == PREVIOUS) || figures(path));
    files
}

/// Whether the file is a temporary one, left by a run that was killed while it wrote it.
pub(super) fn unfinished(path: &Path) -> bool {
    name(path).starts_with(files::TEMPORARY_PREFIX)
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

pub(super) fn remove(files: &[PathBuf], which: impl Fn(&Path) -> bool) -> Result<(), Failure> {
    files.iter().filter(|path| which(path)).try_for_each(|path| fs::remove_file(path).map_err(Failure::file(path)))
}

/// Renames the best values if the held-out data have changed since they were found, because the next best values would
/// overwrite them. Returns a line for the user.
pub(super) fn preserve_best(out: &Path, state: &State, now: EvaluationHistory) -> Result<Option<String>, Failure> {
    let best = out.join(BEST);
    let Some(found) = state.best().filter(|_| now.best.is_none() && best.is_file()) else { return Ok(None) };
    let kept = out.join(format!("best.step-{}.safetensors", found.step));
    fs::rename(&best, &kept).map_err(Failure::file(&best))?;
    Ok(Some(format!("note: the best values on the previous held-out data are kept in {}", kept.display())))
}
