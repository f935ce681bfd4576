//! Weights of a model, read from a Hugging Face directory or a GGUF file, or drawn from each tensor's initialisation.

mod buffers;
mod names;
mod permuted;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use peft_grammar::model::{Backbone, Init, Origin, Param};
use peft_grammar::pattern;
use rayon::prelude::*;

use crate::error::RuntimeError;
use crate::gguf::{self, GgufFile};
use crate::json;
use crate::memory::Numbers;
use crate::philox::philox4x32;
use crate::safefile::SafeFile;
use crate::source::{TensorSource, equal};
use crate::tensor::Float;
use names::{Names, Role};

/// The weights of a model and where they came from.
pub struct Loaded {
    /// The values of each parameter, in the order of the parameters.
    pub tensors: Vec<Numbers>,
    /// Names of the parameters that were drawn from their initialisation because the files do not have them.
    pub drawn: Vec<String>,
    /// Tensors of the files that were not read, because the model's result does not depend on them.
    pub unread: Vec<Unread>,
    /// For each parameter what the files hold of it; `None` if it was drawn.
    pub from_files: Vec<Option<FromFile>>,
}

/// A tensor of a file that the model has no parameter for.
#[derive(Clone, Debug, PartialEq)]
pub struct Unread {
    /// Its name in the file.
    pub name: String,
    /// What it is, if the backbone's definition says so.
    pub note: Option<String>,
}

/// The part of a parameter that was read from a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FromFile {
    /// The number of leading rows that were read; the rest was drawn.
    pub rows: u64,
    /// The element type in the file, if it is one that can be written too.
    pub dtype: Option<Float>,
}

impl Loaded {
    /// Every tensor drawn from its initialisation.
    pub fn random(params: &[Param], seed: u64) -> Self {
        Loaded {
            tensors: random(params, seed),
            drawn: params.iter().map(|p| p.name.clone()).collect(),
            unread: vec![],
            from_files: vec![None; params.len()],
        }
    }
}

/// Draws every tensor from its initialisation. A tensor's values depend only on the seed and its name.
pub fn random(params: &[Param], seed: u64) -> Vec<Numbers> {
    params.iter().map(|p| draw(p, seed)).collect()
}

/// Reads the weights from a directory with `model.safetensors` (or its shards) or from a GGUF file, by the naming rules
/// of the backbone's `checkpoint` block. Up to `appended` last rows of the token embedding are the task's own special
/// tokens; they are drawn if the checkpoint lacks them.
///
/// # Errors
///
/// If tensors are missing or have another shape, if the files hold tensors inside the model that nothing reads, if a
/// buffer has other values than the equations imply, or if two tensors for one parameter differ.
pub fn load(
    from: &Path,
    backbone: &Backbone,
    params: &[Param],
    appended: u64,
    seed: u64,
) -> Result<Loaded, RuntimeError> {
    let files = open(from)?;
    let mut stored: BTreeMap<&str, &dyn TensorSource> = BTreeMap::new();
    for (name, file) in files.iter().flat_map(|f| f.names().into_iter().map(move |n| (n, &**f))) {
        if let Some(first) = stored.insert(name, file)
            && !equal(first, name, file, name)?
        {
            let (one, other) = (first.path().display(), file.path().display());
            let message = format!("  `{name}` is in {one} and in {other}, and differs; fetch the files again");
            return Err(RuntimeError::weights(from, message));
        }
    }
    let gguf = match (gguf::is_gguf(from), &backbone.checkpoint.gguf) {
        (false, _) => None,
        (true, Some(gguf)) => Some(gguf),
        (true, None) => {
            let message = format!(
                "  `{}` does not say how GGUF files write its tensors (`gguf \"…\" {{ … }}` in its `checkpoint` block)",
                backbone.name
            );
            return Err(RuntimeError::weights(from, message));
        }
    };
    let names = Names::new(&backbone.checkpoint, gguf, params);
    let spellings = |param: &Param| -> Vec<String> {
        let own = matches!(param.origin, Origin::Backbone | Origin::Head);
        let all = if own { names.spellings(&param.name) } else { vec![] };
        all.into_iter().filter(|n| stored.contains_key(n.as_str())).collect()
    };
    let has_head = params.iter().any(|p| p.origin == Origin::Head && !spellings(p).is_empty());

    let (mut tensors, mut drawn, mut missing, mut wrong) = (vec![], vec![], vec![], vec![]);
    let mut used = BTreeSet::new();
    let mut from_files = vec![];
    for param in params {
        let found = spellings(param);
        used.extend(found.iter().cloned());
        let Some((name, others)) = found.split_first() else {
            let may_lack = match param.origin {
                // An optional part may be absent, but only as a whole.
                Origin::Backbone => names.optional(&param.name).is_some_and(|part| {
                    let there = |p: &Param| pattern::fits(part, &p.name) && !spellings(p).is_empty();
                    !params.iter().any(there)
                }),
                Origin::Head => !has_head,
                Origin::Method(_) => true,
            };
            if may_lack {
                drawn.push(param.name.clone());
                tensors.push(draw(param, seed));
                from_files.push(None);
            } else {
                missing.push(param.name.as_str());
            }
            continue;
        };
        let file = stored[name.as_str()];
        for other in others {
            if !equal(file, name, stored[other.as_str()], other)? {
                let note = names.note(other).map_or(String::new(), |note| format!(": {note}"));
                wrong.push(format!("  `{other}` and `{name}` should be one tensor, and differ{note}"));
            }
        }
        let shape = file.shape(name).unwrap_or_default().to_vec();
        let grows = shape.len() == 2
            && param.shape.len() == 2
            && shape[1] == param.shape[1]
            && param.shape[0] > shape[0]
            && param.shape[0] - shape[0] <= appended;
        if shape != param.shape && !grows {
            wrong.push(shape_mismatch(name, &shape, param));
            continue;
        }
        let mut numbers = if grows { draw(param, seed) } else { Numbers::zeros(param.elements() as usize) };
        let count = shape.iter().product::<u64>() as usize;
        // Once there is an error, no more values are read; the remaining tensors are only checked for the message.
        if missing.is_empty() && wrong.is_empty() {
            file.floats(name, &mut numbers[..count])?;
            if let Some(order) = names.permuted(name) {
                match permuted::restore(order, &shape, &mut numbers[..count]) {
                    Ok(()) => {}
                    Err(why) => wrong.push(format!("  `{name}` {why}")),
                }
            }
        }
        tensors.push(numbers);
        from_files.push(Some(FromFile { rows: shape.first().copied().unwrap_or(1), dtype: file.float(name) }));
    }

    let (mut unread, mut unexplained) = (vec![], vec![]);
    for (name, file) in stored.iter().filter(|(name, _)| !used.contains(**name)) {
        match names.role(name) {
            Role::Buffer(buffer, note) => {
                wrong.extend(buffers::difference(buffer, name, *file)?.map(|why| match note {
                    Some(note) => format!("  {why}: {note}"),
                    None => format!("  {why}"),
                }))
            }
            Role::Unread(note) => unread.push(Unread { name: name.to_string(), note: note.map(String::from) }),
            Role::Unexplained => unexplained.push(name.to_string()),
        }
    }
    if !missing.is_empty() {
        let left_over: Vec<&String> = unexplained.iter().chain(unread.iter().map(|u| &u.name)).collect();
        let lines = missing
            .iter()
            .map(|name| missing_message(&names.shown(name), names.note(name), &names.spellings(name), &left_over));
        wrong.extend(lines.take(MAX_NAMES_SHOWN));
        if missing.len() > MAX_NAMES_SHOWN {
            wrong.push(format!("  and {} more are missing", missing.len() - MAX_NAMES_SHOWN));
        }
        if !left_over.is_empty() {
            wrong.push(format!("  left over: {}", first_names(&left_over)));
        }
        wrong.push(format!("  is this a `{}` of the shape the spec gives?", backbone.name));
    } else if !unexplained.is_empty() {
        let unexplained = first_names(&unexplained.iter().collect::<Vec<_>>());
        wrong.push(format!("  inside the model, and not read by `{}`: {unexplained}", backbone.name));
        wrong.push("  the file computes something else than the spec".into());
    }
    if wrong.is_empty() {
        return Ok(Loaded { tensors, drawn, unread, from_files });
    }
    Err(RuntimeError::weights(from, wrong.join("\n")))
}

fn shape_mismatch(name: &str, shape: &[u64], param: &Param) -> String {
    let wants = format!("`{name}` is {shape:?} in the file, the spec wants {:?}", param.shape);
    if param.origin == Origin::Head && shape.len() == param.shape.len() && shape[1..] == param.shape[1..] {
        let (found, labels) = (shape[0], param.shape[0]);
        return format!(
            "  {wants}: a head for {found} classes, and the task has {labels} labels; write {found} `labels`"
        );
    }
    let turned = if shape.iter().eq(param.shape.iter().rev()) { " (it looks transposed)" } else { "" };
    format!("  {wants}{turned}")
}

/// The message for a missing tensor. It names the tensor of the file that may be meant: one with an additional prefix,
/// or with a similar name.
fn missing_message(name: &str, note: Option<&str>, spellings: &[String], left_over: &[&String]) -> String {
    let prefixed =
        |n: &&&String| spellings.iter().any(|own| n.strip_suffix(own).is_some_and(|rest| rest.ends_with('.')));
    let alike = || {
        let scores = left_over.iter().map(|n| (strsim::normalized_levenshtein(n, name), n));
        scores.filter(|(score, _)| *score > 0.8).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, n)| n)
    };
    let near = left_over.iter().find(prefixed).or_else(alike);
    let near = near.map_or(String::new(), |near| format!("; the file has `{near}`"));
    let note = note.map_or(String::new(), |note| format!("; {note}"));
    format!("  `{name}` is missing{near}{note}")
}

/// The largest number of names in a message.
const MAX_NAMES_SHOWN: usize = 8;

/// The first names, and how many there are more.
fn first_names(names: &[&String]) -> String {
    let first: Vec<&str> = names.iter().take(MAX_NAMES_SHOWN).map(|n| n.as_str()).collect();
    let more = if names.len() > MAX_NAMES_SHOWN {
        format!(" and {} more", names.len() - MAX_NAMES_SHOWN)
    } else {
        String::new()
    };
    first.join(", ") + &more
}

/// Opens the files of a checkpoint.
fn open(from: &Path) -> Result<Vec<Box<dyn TensorSource>>, RuntimeError> {
    Ok(match gguf::is_gguf(from) {
        true => GgufFile::open_all(from)?.into_iter().map(|file| Box::new(file) as _).collect(),
        false => open_folder(from)?.into_iter().map(|file| Box::new(file) as _).collect(),
    })
}

/// Opens `model.safetensors` of a folder, or its shards.
fn open_folder(dir: &Path) -> Result<Vec<SafeFile>, RuntimeError> {
    let single = dir.join("model.safetensors");
    let index = dir.join("model.safetensors.index.json");
    if json::exists(&single)? {
        return Ok(vec![SafeFile::open(&single)?]);
    }
    if !json::exists(&index)? {
        return Err(RuntimeError::file(dir, "it holds no `model.safetensors`"));
    }
    let refused = |why: String| RuntimeError::file(&index, format!("{why}; fetch it again"));
    let content = json::object(&index)?;
    let map = content.get("weight_map").and_then(|m| m.as_object()).filter(|map| !map.is_empty());
    let map =
        map.ok_or_else(|| refused("its `weight_map`, which says where each tensor is, is missing or empty".into()))?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in map {
        let file = file
            .as_str()
            .ok_or_else(|| refused(format!("it says that `{tensor}` is in {file}, which is no file's name")))?;
        shards.entry(file).or_default().push(tensor);
    }
    let mut files = vec![];
    for (name, tensors) in shards {
        if Path::new(name).file_name().is_none_or(|file| file != name) {
            return Err(refused(format!("`{name}` is no plain file name")));
        }
        if !name.ends_with(".safetensors") {
            return Err(refused(format!("it names `{name}`, and weights are read from safetensors alone")));
        }
        let file = SafeFile::open(&dir.join(name))?;
        if let Some(lost) = tensors.into_iter().find(|tensor| file.shape(tensor).is_none()) {
            let why = format!("it holds no `{lost}`, and `{}` says that it does; fetch both again", index.display());
            return Err(RuntimeError::file(file.path(), why));
        }
        files.push(file);
    }
    Ok(files)
}

/// Draws one tensor from its initialisation with a Philox generator keyed by seed and name.
fn draw(param: &Param, seed: u64) -> Numbers {
    let mut numbers = Numbers::zeros(param.elements() as usize);
    let hash = blake3::hash(param.name.as_bytes());
    let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| hash.as_bytes()[4 * i + b]));
    let key = [seed as u32 ^ word(0), (seed >> 32) as u32 ^ word(1)];
    let four = |block: usize, f: &dyn Fn([u32; 4]) -> [f64; 4]| {
        f(philox4x32([block as u32, (block as u64 >> 32) as u32, word(2), word(3)], key))
    };
    let unit = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
    // Box–Muller transform: two uniform words give two normal numbers.
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
        // A value that depends on other weights is computed later, by `Session::initialise`.
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
