//! Weights: from a Hugging Face directory, or drawn from each tensor's initialisation.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use peft_grammar::model::{Backbone, ConfigValue, Init, Origin, Param};
use rayon::prelude::*;

use crate::adapter::Float;
use crate::error::RuntimeError;
use crate::memory::Numbers;
use crate::philox::philox4x32;
use crate::safefile::SafeFile;

/// What a directory gave.
pub struct Loaded {
    /// In the order of the parameters.
    pub tensors: Vec<Numbers>,
    /// Drawn from their initialisation, since the files do not hold them.
    pub drawn: Vec<String>,
    /// In the files, but not of the model.
    pub left_over: Vec<String>,
    /// What the files hold of each parameter, in the same order; nothing of one that was drawn.
    pub held: Vec<Option<Held>>,
}

/// What files hold of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Held {
    /// Its first rows; those behind them were drawn.
    pub rows: u64,
    /// In which type, if it is one that is written, too.
    pub dtype: Option<Float>,
}

impl Loaded {
    /// Every tensor from its initialisation.
    pub fn random(params: &[Param], seed: u64) -> Self {
        Loaded {
            tensors: random(params, seed),
            drawn: params.iter().map(|p| p.name.clone()).collect(),
            left_over: vec![],
            held: vec![None; params.len()],
        }
    }
}

/// Every tensor from its initialisation: the same numbers for the same seed, whatever the others are.
pub fn random(params: &[Param], seed: u64) -> Vec<Numbers> {
    params.iter().map(|p| draw(p, seed)).collect()
}

/// Reads `config.json` and `model.safetensors` (or its shards). `appended` rows of the token embedding
/// are the task's own special tokens: a checkpoint that lacks them gets them from the initialisation.
pub fn load(
    dir: &Path,
    backbone: &Backbone,
    params: &[Param],
    appended: u64,
    seed: u64,
) -> Result<Loaded, RuntimeError> {
    check_config(dir, backbone, appended)?;
    let files = open(dir)?;
    let stored: BTreeMap<&str, &SafeFile> = files.iter().flat_map(|f| f.names().map(move |n| (n, f))).collect();

    let (mut tensors, mut drawn, mut missing, mut misshaped) = (vec![], vec![], vec![], vec![]);
    let mut held = vec![];
    let mut used = std::collections::BTreeSet::new();
    for param in params {
        let Some(name) = spellings(&param.name, &backbone.prefix).into_iter().find(|n| stored.contains_key(&n[..]))
        else {
            // Not every pretraining leaves a pooler behind.
            if param.origin == Origin::Backbone && !param.name.contains(".pooler.") {
                missing.push(param.name.as_str());
            } else {
                drawn.push(param.name.clone());
                tensors.push(draw(param, seed));
                held.push(None);
            }
            continue;
        };
        let file = stored[&name[..]];
        let shape = file.shape(&name).unwrap_or_default().to_vec();
        let grows = shape.len() == 2
            && param.shape.len() == 2
            && shape[1] == param.shape[1]
            && param.shape[0] > shape[0]
            && param.shape[0] - shape[0] == appended;
        if shape != param.shape && !grows {
            let turned = if shape.iter().eq(param.shape.iter().rev()) { " (it looks transposed)" } else { "" };
            misshaped.push(format!("  `{name}` is {shape:?} in the file, the spec wants {:?}{turned}", param.shape));
            used.insert(name);
            continue;
        }
        let mut numbers = if grows { draw(param, seed) } else { Numbers::zeros(param.elements() as usize) };
        let count = shape.iter().product::<u64>() as usize;
        // Once something does not fit, numbers are not read any more: only the message is left to make.
        if missing.is_empty() && misshaped.is_empty() {
            file.floats(&name, &mut numbers[..count])?;
        }
        tensors.push(numbers);
        held.push(Some(Held { rows: shape.first().copied().unwrap_or(1), dtype: file.float(&name) }));
        used.insert(name);
    }
    let left_over: Vec<String> =
        stored.keys().filter(|n| !used.contains(**n) && !known_extra(n)).map(|n| n.to_string()).collect();
    if missing.is_empty() && misshaped.is_empty() {
        return Ok(Loaded { tensors, drawn, left_over, held });
    }
    let mut message = misshaped;
    message.extend(missing.iter().map(|name| {
        let near = left_over.iter().map(|n| (strsim::normalized_levenshtein(n, name), n));
        match near.filter(|(score, _)| *score > 0.8).max_by(|a, b| a.0.total_cmp(&b.0)) {
            Some((_, near)) => format!("  `{name}` is missing; the file has `{near}`"),
            None => format!("  `{name}` is missing"),
        }
    }));
    if !left_over.is_empty() {
        let first: Vec<&str> = left_over.iter().take(8).map(String::as_str).collect();
        let more = if left_over.len() > 8 { format!(" and {} more", left_over.len() - 8) } else { String::new() };
        message.push(format!("  left over: {}{more}", first.join(", ")));
    }
    message.push(format!("  is this a `{}` of the shape the spec gives?", backbone.name));
    Err(RuntimeError::weights(dir, message.join("\n")))
}

/// How checkpoints write a canonical name: in full or without the prefix, norms also in BERT's first spelling.
fn spellings(name: &str, prefix: &str) -> Vec<String> {
    let mut all = vec![name.to_string()];
    all.extend(name.strip_prefix(prefix).filter(|_| !prefix.is_empty()).map(String::from));
    for (new, old) in [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")] {
        let older: Vec<String> = all.iter().filter_map(|n| Some(format!("{}{old}", n.strip_suffix(new)?))).collect();
        all.extend(older);
    }
    all
}

/// The files of a checkpoint.
fn open(dir: &Path) -> Result<Vec<SafeFile>, RuntimeError> {
    let single = dir.join("model.safetensors");
    let index = dir.join("model.safetensors.index.json");
    let paths: Vec<PathBuf> = if single.is_file() {
        vec![single]
    } else if index.is_file() {
        let text = fs::read_to_string(&index).map_err(|e| RuntimeError::file(&index, e))?;
        let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| RuntimeError::file(&index, e))?;
        let map = json.get("weight_map").and_then(|m| m.as_object());
        let map = map.ok_or_else(|| RuntimeError::file(&index, "it has no `weight_map`"))?;
        let mut names: Vec<&str> = map.values().filter_map(|v| v.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        if let Some(name) = names.iter().find(|n| Path::new(n).file_name().is_none_or(|file| file != **n)) {
            return Err(RuntimeError::file(&index, format!("`{name}` is no plain file name; fetch it again")));
        }
        names.into_iter().map(|n| dir.join(n)).collect()
    } else {
        let hint = match dir.is_dir() {
            true if dir.join("pytorch_model.bin").is_file() => {
                "it holds `pytorch_model.bin`, which is not read here: save it once more with `safe_serialization=True`"
            }
            true => "it holds no `model.safetensors`",
            false => "no such directory; `--weights` takes a Hugging Face model directory, or `random`",
        };
        return Err(RuntimeError::file(dir, hint));
    };
    paths.iter().map(|path| SafeFile::open(path)).collect()
}

/// What checkpoints carry beside weights: masks, positions, and heads of the pretraining.
fn known_extra(name: &str) -> bool {
    name.ends_with(".attn.bias")
        || name.ends_with(".attn.masked_bias")
        || name.ends_with("position_ids")
        || name == "lm_head.weight"
        || name.starts_with("cls.")
        || name.contains("pooler.")
}

/// A key of config.json. What belongs to rotary positions may stand in an object of its own, by an older name.
fn configured<'a>(json: &'a serde_json::Value, key: &str) -> Option<&'a serde_json::Value> {
    let older = if key == "rope_type" { "type" } else { key };
    let rotary = ["rope_parameters", "rope_scaling"].iter().filter_map(|object| json.get(object));
    json.get(key).or_else(|| rotary.flat_map(|o| [o.get(key), o.get(older)]).flatten().next())
}

/// The spec's sizes against the checkpoint's own.
fn check_config(dir: &Path, backbone: &Backbone, appended: u64) -> Result<(), RuntimeError> {
    let path = dir.join("config.json");
    let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| RuntimeError::file(&path, format!("no JSON ({e}); fetch it again")))?;
    let mut wrong = vec![];
    for (key, want) in &backbone.config {
        // Rates of dropout are the recipe's business.
        if key.contains("drop") {
            continue;
        }
        let Some(found) = configured(&json, key).filter(|v| !v.is_null()) else { continue };
        let fits = match want {
            ConfigValue::Bool(b) => found.as_bool() == Some(*b),
            ConfigValue::Int(n) => {
                found.as_i64().is_some_and(|f| f == *n || (key == "vocab_size" && f + appended as i64 == *n))
            }
            ConfigValue::Float(x) => found.as_f64().is_some_and(|f| (f - x).abs() <= 1e-6 * x.abs()),
            ConfigValue::Str(s) => found.as_str() == Some(s),
        };
        if !fits {
            let want = serde_json::to_string(want).unwrap_or_default();
            wrong.push(format!("  `{key}` is {found} in config.json, the spec wants {want}"));
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(RuntimeError::weights(dir, wrong.join("\n"))) }
}

/// One tensor from its initialisation, by a generator keyed on seed and name.
fn draw(param: &Param, seed: u64) -> Numbers {
    let mut numbers = Numbers::zeros(param.elements() as usize);
    let hash = blake3::hash(param.name.as_bytes());
    let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| hash.as_bytes()[4 * i + b]));
    let key = [seed as u32 ^ word(0), (seed >> 32) as u32 ^ word(1)];
    let four = |block: usize, f: &dyn Fn([u32; 4]) -> [f64; 4]| {
        f(philox4x32([block as u32, (block as u64 >> 32) as u32, word(2), word(3)], key))
    };
    let unit = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
    // Box and Muller: two words, two normals.
    let normals = |w: [u32; 4]| {
        let pair = |a: u32, b: u32| {
            let (radius, angle) = ((-2.0 * unit(a).ln()).sqrt(), std::f64::consts::TAU * unit(b));
            [radius * angle.cos(), radius * angle.sin()]
        };
        let ([a, b], [c, d]) = (pair(w[0], w[1]), pair(w[2], w[3]));
        [a, b, c, d]
    };
    let fill = |numbers: &mut Numbers, f: &(dyn Fn([u32; 4]) -> [f64; 4] + Sync)| {
        numbers.par_chunks_mut(4).enumerate().with_min_len(4096).for_each(|(block, out)| {
            out.iter_mut().zip(four(block, &|w| f(w))).for_each(|(x, y)| *x = y as f32);
        });
    };
    match param.init {
        // What a value of other weights starts from is computed when those are there: `Session::initialise`.
        Init::Zeros | Init::Value(_) => {}
        Init::Ones => numbers.fill(1.0),
        Init::Fill { value } => numbers.fill(value as f32),
        Init::Normal { std } => fill(&mut numbers, &|w| normals(w).map(|x| x * std)),
        Init::Truncated { scale } => fill(&mut numbers, &|w| normals(w).map(|x| x % 2.0 * scale)),
        Init::Uniform { bound } => fill(&mut numbers, &|w| w.map(|w| (2.0 * unit(w) - 1.0) * bound)),
    }
    numbers
}

#[cfg(test)]
mod tests;
