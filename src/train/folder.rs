//! What lies in a run's folder.

use std::fs;
use std::path::{Path, PathBuf};

use peft_runtime::files;

use crate::adapters::{ADAPTER, BEST};
use crate::failure::Failure;
use crate::hub::peft;
use crate::train::metrics;
use crate::train::state::{Judged, PREVIOUS, STATE, State};

/// The files of an earlier run in `out`, and of an adapter in PEFT's format, which would be taken for a run's own.
pub fn earlier(out: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(out).into_iter().flatten().filter_map(|entry| entry.ok());
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    files.retain(|path| KEPT.contains(&name(path)) || metrics::is_file(name(path)) || unfinished(path));
    // What makes a folder a run goes first: a folder that was cleared in part is not taken for one.
    files.sort_by_key(|path| (KEPT.iter().position(|kept| *kept == name(path)).unwrap_or(KEPT.len()), path.clone()));
    files
}

/// What a run keeps, and PEFT of an adapter.
const KEPT: [&str; 6] = [PREVIOUS, STATE, ADAPTER, BEST, peft::CONFIG, peft::MODEL];

/// Those of [`earlier`] that hold something: trained values, a state or figures.
pub fn in_the_way(out: &Path) -> Vec<PathBuf> {
    let figures = |path: &Path| name(path) == metrics::LINES && path.metadata().is_ok_and(|found| found.len() > 0);
    let mut files = earlier(out);
    // The state before the newest is no news beside it.
    let state = files.iter().any(|path| name(path) == STATE);
    files.retain(|path| KEPT.contains(&name(path)) && !(state && name(path) == PREVIOUS) || figures(path));
    files
}

/// It was being written when a run was killed.
pub(super) fn unfinished(path: &Path) -> bool {
    name(path).starts_with(files::BESIDE)
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

pub(super) fn remove(files: &[PathBuf], which: impl Fn(&Path) -> bool) -> Result<(), Failure> {
    files.iter().filter(|path| which(path)).try_for_each(|path| fs::remove_file(path).map_err(Failure::file(path)))
}

/// Where the held-out data are others than those on which the best values were found, they are kept under a name of their
/// own, which a line says; the next best ones would take their place.
pub(super) fn keep_best(out: &Path, state: &State, now: Judged) -> Result<Option<String>, Failure> {
    let best = out.join(BEST);
    let Some(found) = state.found().filter(|_| now.best.is_none() && best.is_file()) else { return Ok(None) };
    let kept = out.join(format!("best.step-{}.safetensors", found.step));
    fs::rename(&best, &kept).map_err(Failure::file(&best))?;
    Ok(Some(format!("note: the best values on the held-out data of before are kept in {}", kept.display())))
}
