//! The tensors of a model by canonical name: from a Hugging Face directory, or drawn.
//!
//! Checkpoints differ in what they write in front of a name (`h.0.…` or `transformer.h.0.…`), in old
//! spellings (`LayerNorm.gamma`), in precision, and in what else they hold. All that is mapped here; what does not
//! fit is said in one message.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::init::{Init, draw};
use crate::memory::{Floats, TensorData};
use crate::safefile::{FileError, SafeFile};

/// A tensor the model wants. It reads from the `params` of a checked model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorSource {
    pub name: String,
    pub shape: Vec<u64>,
    pub init: Init,
    pub origin: Origin,
    #[serde(default)]
    pub trainable: Rows,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Origin {
    /// A checkpoint must hold it (but for a pooler, which not every pre-training leaves behind).
    Backbone,
    /// A checkpoint may hold it.
    Head,
    /// Of this method: always drawn.
    Method(String),
}

/// Which rows train.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Rows {
    #[default]
    No,
    All,
    Rows(u64, u64),
}

/// Embeddings of tokens by the ends of their names: special tokens add rows that a checkpoint lacks.
const TOKEN_EMBEDDINGS: [&str; 3] = ["wte.weight", "word_embeddings.weight", "embed_tokens.weight"];

impl TensorSource {
    /// A file may lack the rows from `row` on: special tokens that are new.
    fn grows_from(&self, row: u64) -> bool {
        let trained = matches!(self.trainable, Rows::Rows(start, end) if start <= row && end == self.shape[0]);
        trained || TOKEN_EMBEDDINGS.iter().any(|end| self.name.ends_with(end))
    }

    fn drawn(&self, seed: u64) -> Result<TensorData, WeightsError> {
        let elements = self.shape.iter().product::<u64>() as usize;
        let mut floats = self.memory(Floats::zeroed(elements))?;
        draw(&mut floats, 0, &self.init, seed, &self.name);
        Ok(TensorData::Owned(floats))
    }

    fn memory(&self, floats: std::io::Result<Floats>) -> Result<Floats, WeightsError> {
        floats.map_err(|source| FileError::Memory { name: self.name.clone(), source }.into())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("`{directory}` holds no `model.safetensors`{hint}")]
    NoModel { directory: PathBuf, hint: &'static str },
    #[error("`{path}` is damaged: {why}; fetch it again")]
    Index { path: PathBuf, why: String },
    #[error("{0}")]
    Misfit(Box<Misfit>),
    #[error("`{path}` is not the configuration the spec describes: {}; change the spec or take other weights", .differences.join(", "))]
    Config { path: PathBuf, differences: Vec<String> },
}

/// Tensors by name, handed over to a session.
#[derive(Debug, Default)]
pub struct Weights {
    tensors: HashMap<String, TensorData>,
}

impl Weights {
    /// Every tensor drawn from its initial distribution.
    pub fn random(wanted: &[TensorSource], seed: u64) -> Result<Self, WeightsError> {
        let draw = |source: &TensorSource| Ok((source.name.clone(), source.drawn(seed)?));
        Ok(Weights { tensors: wanted.iter().map(draw).collect::<Result<_, WeightsError>>()? })
    }

    pub fn insert(&mut self, name: impl Into<String>, data: TensorData) {
        self.tensors.insert(name.into(), data);
    }

    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.tensors.get(name).map(TensorData::as_slice)
    }

    pub fn take(&mut self, name: &str) -> Option<TensorData> {
        self.tensors.remove(name)
    }
}

/// Weights from a checkpoint, and what is worth telling about them.
#[derive(Debug)]
pub struct Loaded {
    pub weights: Weights,
    /// Tensors of a head or pooler the checkpoint lacks: drawn.
    pub drawn: Vec<String>,
    /// Embeddings with fewer rows there than here: name, rows there, rows here.
    pub grown: Vec<(String, u64, u64)>,
    /// What the checkpoint holds beside.
    pub left_over: Vec<String>,
}

/// Reads what `wanted` names from `path`, a Hugging Face directory or a single safetensors file. `prefix` is what
/// base models leave out in front of a name. What is not there and need not be is drawn with `seed`.
pub fn load(path: &Path, wanted: &[TensorSource], prefix: &str, seed: u64) -> Result<Loaded, WeightsError> {
    let checkpoint = Checkpoint::open(path)?;
    let mut loaded = Loaded { weights: Weights::default(), drawn: vec![], grown: vec![], left_over: vec![] };
    let mut misfit = Misfit { path: path.to_path_buf(), ..Misfit::default() };
    let mut used = BTreeSet::new();
    let mut plan = vec![];
    for source in wanted {
        if matches!(source.origin, Origin::Method(_)) {
            continue;
        }
        let Some((file, name)) = checkpoint.find(&source.name, prefix) else {
            match source.origin {
                Origin::Backbone if !source.name.contains(".pooler.") => misfit.missing.push(source.name.clone()),
                _ => loaded.drawn.push(source.name.clone()),
            }
            continue;
        };
        used.insert(name.clone());
        let found: Vec<u64> = file.shape(&name).unwrap_or_default().iter().map(|&d| d as u64).collect();
        let grows = match (&found[..], &source.shape[..]) {
            ([rows, width], [wanted, width2]) => width == width2 && rows < wanted && source.grows_from(*rows),
            _ => false,
        };
        if grows {
            loaded.grown.push((source.name.clone(), found[0], source.shape[0]));
        } else if found != source.shape {
            misfit.shapes.push((source.name.clone(), found, source.shape.clone()));
            continue;
        }
        plan.push((source, file, name, grows));
    }
    let left_over = checkpoint.names().filter(|name| !used.contains(*name) && !derived(name));
    loaded.left_over = left_over.map(String::from).collect();
    if !misfit.missing.is_empty() || !misfit.shapes.is_empty() {
        misfit.left_over = loaded.left_over;
        return Err(WeightsError::Misfit(misfit.into()));
    }
    for (source, file, name, grows) in plan {
        let mut data = file.floats(&name)?;
        if grows {
            let known = data.as_slice();
            let mut all = source.memory(Floats::zeroed(source.shape.iter().product::<u64>() as usize))?;
            all[..known.len()].copy_from_slice(known);
            draw(&mut all[known.len()..], known.len() as u64, &source.init, seed, &source.name);
            data = TensorData::Owned(all);
        }
        loaded.weights.insert(&source.name, data);
    }
    for source in wanted {
        if loaded.weights.get(&source.name).is_none() {
            loaded.weights.insert(&source.name, source.drawn(seed)?);
        }
    }
    Ok(loaded)
}

/// Buffers and tied copies that say nothing new.
fn derived(name: &str) -> bool {
    [".attn.bias", ".attn.masked_bias", "embeddings.position_ids", "lm_head.weight"].iter().any(|e| name.ends_with(e))
}

/// The files of a checkpoint.
struct Checkpoint {
    files: Vec<SafeFile>,
    /// Which file holds a tensor.
    index: BTreeMap<String, usize>,
}

impl Checkpoint {
    fn open(path: &Path) -> Result<Self, WeightsError> {
        let (single, sharded) = (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
        let mut files = vec![];
        if path.is_file() {
            files.push(SafeFile::open(path)?);
        } else if single.is_file() {
            files.push(SafeFile::open(&single)?);
        } else if sharded.is_file() {
            for name in shards(&sharded)? {
                files.push(SafeFile::open(&path.join(name))?);
            }
        } else {
            let hint = if path.join("pytorch_model.bin").is_file() {
                ", only `pytorch_model.bin`: save the model as safetensors first (`save_pretrained` does)"
            } else {
                "; give a directory that Hugging Face's `save_pretrained` wrote"
            };
            return Err(WeightsError::NoModel { directory: path.to_path_buf(), hint });
        }
        let names = files.iter().enumerate().flat_map(|(at, f)| f.names().map(move |n| (n.to_string(), at)));
        Ok(Checkpoint { index: names.collect(), files })
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// The file that holds the canonical `name`, and its name there.
    fn find(&self, name: &str, prefix: &str) -> Option<(&SafeFile, String)> {
        let bare = if prefix.is_empty() { None } else { name.strip_prefix(prefix) };
        let spellings = [Some(name), bare].into_iter().flatten().flat_map(|name| {
            let old = [(".weight", ".gamma"), (".bias", ".beta")].into_iter().filter_map(|(new, old)| {
                let stem = name.strip_suffix(new).filter(|stem| stem.ends_with("LayerNorm"))?;
                Some(format!("{stem}{old}"))
            });
            [name.to_string()].into_iter().chain(old)
        });
        spellings.into_iter().find_map(|name| Some((&self.files[*self.index.get(&name)?], name)))
    }
}

/// The names of the files a sharded checkpoint consists of.
fn shards(path: &Path) -> Result<BTreeSet<String>, WeightsError> {
    let damaged = |why: String| WeightsError::Index { path: path.to_path_buf(), why };
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read(path).map_err(|source| FileError::Read { path: path.to_path_buf(), source })?;
    let index: Index = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    match names.iter().find(|name| Path::new(name).file_name().is_none_or(|file| file != name.as_str())) {
        Some(name) => Err(damaged(format!("`{name}` is no plain file name"))),
        None => Ok(names),
    }
}

/// How a checkpoint differs from what the spec wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Misfit {
    pub path: PathBuf,
    pub missing: Vec<String>,
    /// Name, shape there, shape wanted.
    pub shapes: Vec<(String, Vec<u64>, Vec<u64>)>,
    pub left_over: Vec<String>,
}

/// Names of each kind that a message shows.
const SHOWN: usize = 6;

impl std::fmt::Display for Misfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the weights in `{}` do not fit the spec's backbone", self.path.display())?;
        let list = |f: &mut std::fmt::Formatter<'_>, title: &str, lines: Vec<String>| {
            if lines.is_empty() {
                return Ok(());
            }
            write!(f, "\n  {title} ({}):", lines.len())?;
            lines.iter().take(SHOWN).try_for_each(|line| write!(f, "\n    {line}"))?;
            if lines.len() > SHOWN { write!(f, "\n    … and {} more", lines.len() - SHOWN) } else { Ok(()) }
        };
        let missing = self.missing.iter().map(|name| {
            let near = self.left_over.iter().map(|other| (strsim::jaro_winkler(name, other), other));
            match near.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(likeness, _)| *likeness > 0.9) {
                Some((_, other)) => format!("`{name}` (is `{other}` meant?)"),
                None => format!("`{name}`"),
            }
        });
        list(f, "missing", missing.collect())?;
        let shapes = self.shapes.iter().map(|(name, found, wanted)| {
            let mut line = format!("`{name}` is {found:?} there, {wanted:?} in the spec");
            if found.iter().eq(wanted.iter().rev()) {
                let _ = write!(line, " (transposed)");
            } else if let ([rows, width], [more, width2]) = (&found[..], &wanted[..])
                && (width == width2 && rows < more)
            {
                let _ = write!(line, " (new rows are drawn where they train: `rows {rows}..{more} of \"{name}\"`)");
            }
            line
        });
        list(f, "of another shape", shapes.collect())?;
        list(f, "left over", self.left_over.iter().map(|name| format!("`{name}`")).collect())?;
        write!(f, "\ncheck the backbone's name and sizes against the `config.json` beside the weights")
    }
}

/// Compares what the spec wants of `config.json` in `directory` with what stands there. Dropout is a matter of
/// training, not of weights; special tokens may make the spec's vocabulary larger; a value left out says nothing.
pub fn check_config(directory: &Path, expected: &BTreeMap<String, Value>) -> Result<(), WeightsError> {
    let path = directory.join("config.json");
    let text = std::fs::read(&path).map_err(|source| FileError::Read { path: path.clone(), source })?;
    let damaged = |e: serde_json::Error| WeightsError::Index { path: path.clone(), why: e.to_string() };
    let config: BTreeMap<String, Value> = serde_json::from_slice(&text).map_err(damaged)?;
    let fits = |key: &str, want: &Value, found: &Value| match (want.as_f64(), found.as_f64()) {
        (Some(want), Some(found)) if key == "vocab_size" => want >= found,
        (Some(want), Some(found)) => want == found,
        _ => want == found,
    };
    let differences: Vec<String> = expected
        .iter()
        .filter(|(key, _)| !key.contains("drop"))
        .filter_map(|(key, want)| {
            let found = config.get(key).filter(|found| !found.is_null() && !fits(key, want, found))?;
            Some(format!("`{key}` is {found} there, {want} in the spec"))
        })
        .collect();
    if differences.is_empty() { Ok(()) } else { Err(WeightsError::Config { path, differences }) }
}

#[cfg(test)]
mod tests;
