//! Weights: from a Hugging Face directory, or drawn from each tensor's initialisation.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use peft_grammar::model::{Backbone, ConfigValue, Init, Origin, Param};
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};

use crate::error::RuntimeError;
use crate::memory::Numbers;
use crate::philox::philox4x32;

/// What a directory gave.
pub struct Loaded {
    /// In the order of the parameters.
    pub tensors: Vec<Numbers>,
    /// Drawn from their initialisation, since the files do not hold them.
    pub drawn: Vec<String>,
    /// In the files, but not of the model.
    pub left_over: Vec<String>,
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
    let maps = open(dir)?;
    let mut files = vec![];
    for (path, map) in &maps {
        files.push(SafeTensors::deserialize(map).map_err(|e| {
            RuntimeError::file(path, format!("no sound safetensors file ({e}); fetch or export it again"))
        })?);
    }
    let mut stored = BTreeMap::new();
    for (file, (path, _)) in files.iter().zip(&maps) {
        for (name, view) in file.iter() {
            stored.insert(name.to_string(), (view, path));
        }
    }

    let (mut tensors, mut drawn, mut missing, mut misshaped) = (vec![], vec![], vec![], vec![]);
    let mut used = std::collections::BTreeSet::new();
    for param in params {
        let short = param.name.strip_prefix(&backbone.prefix).unwrap_or(&param.name);
        let found = [param.name.as_str(), short].into_iter().find(|n| stored.contains_key(*n));
        let Some(name) = found else {
            if param.origin == Origin::Backbone {
                missing.push(param.name.as_str());
            } else {
                drawn.push(param.name.clone());
                tensors.push(draw(param, seed));
            }
            continue;
        };
        used.insert(name.to_string());
        let (view, path) = &stored[name];
        let shape: Vec<u64> = view.shape().iter().map(|&n| n as u64).collect();
        let grows = shape.len() == 2
            && shape[1..] == param.shape[1..]
            && param.shape[0] > shape[0]
            && param.shape[0] - shape[0] == appended;
        if shape != param.shape && !grows {
            misshaped.push(format!("  `{name}` is {shape:?} in the file, the spec wants {:?}", param.shape));
            continue;
        }
        let mut numbers = if grows { draw(param, seed) } else { Numbers::zeros(param.elements() as usize) };
        let count = shape.iter().product::<u64>() as usize;
        decode(view.dtype(), view.data(), &mut numbers[..count])
            .map_err(|message| RuntimeError::file(*path, format!("tensor `{name}` {message}")))?;
        tensors.push(numbers);
    }
    let left_over: Vec<String> = stored.keys().filter(|n| !used.contains(*n) && !known_extra(n)).cloned().collect();
    if missing.is_empty() && misshaped.is_empty() {
        return Ok(Loaded { tensors, drawn, left_over });
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

/// The files' memory maps.
fn open(dir: &Path) -> Result<Vec<(PathBuf, Mmap)>, RuntimeError> {
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
    let map = |path: PathBuf| {
        let file = File::open(&path).map_err(|e| RuntimeError::file(&path, e))?;
        // SAFETY: the file is only read; a writer beside us would spoil the numbers, not the memory.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| RuntimeError::file(&path, e))?;
        Ok((path, map))
    };
    paths.into_iter().map(map).collect()
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

fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Result<(), String> {
    let width = match dtype {
        Dtype::F32 => 4,
        Dtype::F64 => 8,
        Dtype::F16 | Dtype::BF16 => 2,
        other => return Err(format!("holds {other:?}; weights are f32, f16, bf16 or f64")),
    };
    if bytes.len() != width * out.len() {
        return Err(format!("has {} bytes for {} numbers of {width}", bytes.len(), out.len()));
    }
    const CHUNK: usize = 1 << 16;
    let bad =
        out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * width)).enumerate().filter_map(|(at, (out, bytes))| {
            for (x, b) in out.iter_mut().zip(bytes.chunks_exact(width)) {
                *x = match dtype {
                    Dtype::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
                    Dtype::F64 => f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32,
                    Dtype::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
                    _ => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
                };
            }
            out.iter().position(|x| !x.is_finite()).map(|i| (at * CHUNK + i, out[i]))
        });
    match bad.min_by_key(|(at, _)| *at) {
        Some((at, value)) => Err(format!("holds {value} at index {at}; the file is spoilt or a run diverged")),
        None => Ok(()),
    }
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
        let Some(found) = json.get(key).filter(|v| !v.is_null()) else { continue };
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
        Init::Zeros => {}
        Init::Ones => numbers.fill(1.0),
        Init::Normal { std } => fill(&mut numbers, &|w| normals(w).map(|x| x * std)),
        Init::Truncated { scale } => fill(&mut numbers, &|w| normals(w).map(|x| x % 2.0 * scale)),
        Init::Uniform { bound } => fill(&mut numbers, &|w| w.map(|w| (2.0 * unit(w) - 1.0) * bound)),
    }
    numbers
}
