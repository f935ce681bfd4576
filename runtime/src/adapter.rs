//! What training makes: an adapter (the trainable values) and a state to resume from (the optimizer's
//! moments too). Both are safetensors files under canonical names.
//!
//! Of a tensor that trains in part the file holds the trained rows alone; its metadata says which, under
//! `rows`: `{"transformer.wte.weight":[50257,50273]}`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::artifact::Tensor;
use crate::execute::Flat;
use crate::safefile::{self, Entry, FileError, SafeFile};

/// What `format` in the metadata says.
const ADAPTER: &str = "peftc adapter 1";
const STATE: &str = "peftc state 1";

/// What a file says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// The spec that was trained.
    pub spec: String,
    /// Optimizer steps done.
    pub step: u64,
    /// Whatever else the training loop has to remember.
    pub extra: BTreeMap<String, String>,
}

#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("`{path}` is no {wanted} file of peftc; it says {found}")]
    Format { path: PathBuf, wanted: &'static str, found: String },
    #[error("`{path}` is damaged: its metadata `{key}` cannot be read")]
    Metadata { path: PathBuf, key: &'static str },
    #[error("`{path}` was trained with another spec: {}", .differences.join("; "))]
    Misfit { path: PathBuf, differences: Vec<String> },
}

/// Saves the trainable `values`, in the order of `tensors`.
pub fn save(path: &Path, tensors: &[Tensor], values: &[f32], info: &Info) -> Result<(), AdapterError> {
    let entries = entries(tensors, "", values);
    Ok(safefile::write(path, &entries, &metadata(ADAPTER, tensors, info))?)
}

/// Loads an adapter into `values`, which stay as they are if anything is wrong.
pub fn load(path: &Path, tensors: &[Tensor], values: &mut [f32]) -> Result<Info, AdapterError> {
    let file = SafeFile::open(path)?;
    let info = read_info(&file, ADAPTER)?;
    read(&file, tensors, &mut [("", values)])?;
    Ok(info)
}

/// Saves all that resuming needs: values and the optimizer's moments.
pub fn save_state(path: &Path, tensors: &[Tensor], flat: &Flat, info: &Info) -> Result<(), AdapterError> {
    let parts = [("", &flat.values), ("m/", &flat.m), ("v/", &flat.v)];
    let entries: Vec<Entry> = parts.iter().flat_map(|(prefix, data)| entries(tensors, prefix, data)).collect();
    Ok(safefile::write(path, &entries, &metadata(STATE, tensors, info))?)
}

/// Loads what [`save_state`] wrote; `flat` stays as it is if anything is wrong.
pub fn load_state(path: &Path, tensors: &[Tensor], flat: &mut Flat) -> Result<Info, AdapterError> {
    let file = SafeFile::open(path)?;
    let info = read_info(&file, STATE)?;
    read(&file, tensors, &mut [("", &mut flat.values), ("m/", &mut flat.m), ("v/", &mut flat.v)])?;
    Ok(info)
}

/// The trainable tensors with where they lie in a flat vector and the shape of what trains.
fn trainable(tensors: &[Tensor]) -> impl Iterator<Item = (&Tensor, usize, Vec<u64>)> {
    let trained = tensors.iter().filter_map(|tensor| Some((tensor, tensor.trainable?)));
    trained.scan(0, |next, (tensor, (start, end))| {
        let mut shape = tensor.shape.clone();
        if let Some(rows) = shape.first_mut() {
            *rows = end - start;
        }
        let at = *next;
        *next += tensor.trainable_elements() as usize;
        Some((tensor, at, shape))
    })
}

fn entries<'a>(tensors: &[Tensor], prefix: &str, values: &'a [f32]) -> Vec<Entry<'a>> {
    let entry = |(tensor, at, shape): (&Tensor, usize, Vec<u64>)| {
        let data = &values[at..at + tensor.trainable_elements() as usize];
        Entry { name: format!("{prefix}{}", tensor.name), shape, data }
    };
    trainable(tensors).map(entry).collect()
}

/// The tensors of which only some rows train.
fn partial(tensors: &[Tensor]) -> BTreeMap<String, (u64, u64)> {
    let part = |t: &Tensor| t.trainable.filter(|&rows| t.shape.first().is_some_and(|&all| rows != (0, all)));
    tensors.iter().filter_map(|t| Some((t.name.clone(), part(t)?))).collect()
}

fn metadata(format: &str, tensors: &[Tensor], info: &Info) -> BTreeMap<String, String> {
    let mut metadata = info.extra.clone();
    metadata.insert("format".into(), format.into());
    metadata.insert("spec".into(), info.spec.clone());
    metadata.insert("step".into(), info.step.to_string());
    let rows = partial(tensors);
    if !rows.is_empty() {
        metadata.insert("rows".into(), serde_json::json!(rows).to_string());
    }
    metadata
}

fn read_info(file: &SafeFile, format: &'static str) -> Result<Info, AdapterError> {
    let path = file.path().to_path_buf();
    match file.metadata("format") {
        Some(found) if found == format => {}
        found => {
            let found = found.map_or("nothing of its format".into(), |f| format!("`{f}`"));
            let wanted = if format == STATE { "state" } else { "adapter" };
            return Err(AdapterError::Format { path, wanted, found });
        }
    }
    let step = file.metadata("step").and_then(|step| step.parse().ok());
    let own = ["format", "spec", "step", "rows"];
    let extra = file.all_metadata().iter().filter(|(key, _)| !own.contains(&key.as_str()));
    Ok(Info {
        spec: file.metadata("spec").unwrap_or_default().into(),
        step: step.ok_or(AdapterError::Metadata { path, key: "step" })?,
        extra: extra.map(|(k, v)| (k.clone(), v.clone())).collect(),
    })
}

/// Fills each vector from the tensors whose names begin with its prefix, after all of them were checked.
fn read(file: &SafeFile, tensors: &[Tensor], vectors: &mut [(&str, &mut [f32])]) -> Result<(), AdapterError> {
    let path = || file.path().to_path_buf();
    let rows: BTreeMap<String, (u64, u64)> = match file.metadata("rows") {
        Some(text) => serde_json::from_str(text).map_err(|_| AdapterError::Metadata { path: path(), key: "rows" })?,
        None => BTreeMap::new(),
    };
    let mut differences = vec![];
    let mut known = std::collections::BTreeSet::new();
    let mut found = vec![];
    for (vector, (prefix, _)) in vectors.iter().enumerate() {
        for (tensor, at, shape) in trainable(tensors) {
            let name = format!("{prefix}{}", tensor.name);
            let stored = file.shape(&name).map(|s| s.iter().map(|&d| d as u64).collect::<Vec<_>>());
            match stored {
                None => differences.push(format!("`{name}` is missing")),
                Some(stored) if stored != shape => {
                    differences.push(format!("`{name}` is {stored:?} there, {shape:?} in the spec"));
                }
                Some(_) => found.push((vector, at, file.floats(&name)?)),
            }
            known.insert(name);
        }
    }
    let unknown = file.names().filter(|&name| !known.contains(name));
    differences.extend(unknown.map(|name| format!("`{name}` does not train in the spec")));
    let expected = partial(tensors);
    if rows != expected {
        differences.push(format!("rows {rows:?} train there, {expected:?} in the spec"));
    }
    if !differences.is_empty() {
        const SHOWN: usize = 6;
        if differences.len() > SHOWN {
            let more = differences.len() - SHOWN;
            differences.truncate(SHOWN);
            differences.push(format!("and {more} more"));
        }
        return Err(AdapterError::Misfit { path: path(), differences });
    }
    for (vector, at, data) in found {
        let data = data.as_slice();
        vectors[vector].1[at..at + data.len()].copy_from_slice(data);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
