//! What lies in a model's folder beside its weights: tokenizer, configurations, templates, cards.

use std::fs;
use std::path::{Path, PathBuf};

use peft_runtime::json::object;
use peft_runtime::{RuntimeError, files};
use serde_json::{Map, Value, json};

use crate::failure::Failure;
use crate::train::metrics;

pub const CONFIG: &str = "config.json";
pub const MODEL: &str = "model.safetensors";

/// What the names of files with weights end with, in any framework's format.
const WEIGHTS: &[&str] = &[
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".ckpt.index",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".tflite",
    ".ot",
    ".mlmodel",
];

/// Written anew, or of a run in the same folder: an adapter's configuration makes transformers look for its base model
/// there.
const NOT_COPIED: &[&str] = &[CONFIG, "adapter_config.json"];

/// The files beside a folder's weights.
#[derive(Debug, Default)]
pub struct SideFiles {
    /// By their paths from the folder.
    pub files: Vec<PathBuf>,
    /// Folders inside that hold weights of their own (`onnx`, a run's), of which nothing is among the files.
    pub skipped: Vec<PathBuf>,
}

impl SideFiles {
    /// Those of `folder`. Hidden ones (`.git`, `.cache`) do not count.
    pub fn of(folder: &Path) -> Result<Self, Failure> {
        let mut found = SideFiles::default();
        found.look(folder, Path::new(""))?;
        Ok(found)
    }

    fn look(&mut self, folder: &Path, inside: &Path) -> Result<(), Failure> {
        for name in names(&folder.join(inside))? {
            let path = inside.join(&name);
            let at_top = inside == Path::new("");
            if name.starts_with('.')
                || (at_top && (NOT_COPIED.contains(&&name[..]) || metrics::is_file(&name)))
                || is_weights(&name)
            {
                continue;
            }
            if !folder.join(&path).is_dir() {
                self.files.push(path);
            } else if holds_weights(&folder.join(&path))? {
                self.skipped.push(path);
            } else {
                self.look(folder, &path)?;
            }
        }
        Ok(())
    }

    /// Copies them from one folder into another.
    pub fn copy(&self, from: &Path, to: &Path) -> Result<(), Failure> {
        for file in &self.files {
            let (source, copy) = (from.join(file), to.join(file));
            let parent = copy.parent().unwrap_or(to);
            fs::create_dir_all(parent).map_err(Failure::file(parent))?;
            let bytes = fs::read(&source).map_err(Failure::file(&source))?;
            files::write_whole(&copy, &bytes)?;
        }
        Ok(())
    }
}

/// The names in a folder, in order.
fn names(folder: &Path) -> Result<Vec<String>, Failure> {
    let entries = fs::read_dir(folder).map_err(Failure::file(folder))?;
    let names: Result<Vec<_>, _> = entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect();
    let mut names = names.map_err(Failure::file(folder))?;
    names.sort_unstable();
    Ok(names)
}

fn is_weights(name: &str) -> bool {
    WEIGHTS.iter().any(|end| name.ends_with(end))
}

/// A file by the name of those that lie in models' folders: weights, configurations, tokenizers, templates.
pub fn usual(file: &Path) -> bool {
    const ENDS: &[&str] = &[".json", ".jinja", ".model"];
    const NAMES: &[&str] = &["vocab.txt", "merges.txt"];
    let name = file.to_string_lossy();
    let at_top = file.parent() == Some(Path::new(""));
    at_top && (is_weights(&name) || NAMES.contains(&&*name) || ENDS.iter().any(|end| name.ends_with(end)))
}

fn holds_weights(folder: &Path) -> Result<bool, Failure> {
    for name in names(folder)? {
        let path = folder.join(&name);
        if is_weights(&name) || (path.is_dir() && holds_weights(&path)?) {
            return Ok(true);
        }
    }
    Ok(false)
}

pub fn write_object(path: &Path, object: &Map<String, Value>) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(object).expect("plain data");
    text.push('\n');
    Ok(files::write_whole(path, text.as_bytes())?)
}

/// Where [`add_tokens`] writes.
pub const TOKENS: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"];

/// Writes tokens, each as `added_tokens` of a `tokenizer.json` has it, into the tokenizer's files in `folder`, so that
/// transformers gives them their ids. It counts tokens up in the order of their ids, so all that stand behind the
/// vocabulary have to be among them, those that only settings name (`pad_token`) included.
///
/// `tokenizer.json` has them in `added_tokens`, `tokenizer_config.json` in `added_tokens_decoder`. A tokenizer without
/// either reads them from `added_tokens.json`.
pub fn add_tokens(folder: &Path, tokens: &[Value]) -> Result<(), Failure> {
    let [whole, config, list] = TOKENS.map(|name| folder.join(name));
    let vocab = folder.join("vocab.json");
    let mut tokenizer = if whole.is_file() { object(&whole)? } else { Map::new() };
    let plain = if vocab.is_file() { object(&vocab)? } else { Map::new() };
    let (id, content) =
        (|token: &Value| token["id"].as_u64(), |token: &Value| token["content"].as_str().map(str::to_owned));
    let new = |token: &&Value| content(token).is_some_and(|token| !plain.contains_key(&token));
    let tokens: Vec<&Value> = tokens.iter().filter(new).collect();
    let lacking: Vec<Value> = tokens
        .iter()
        .filter(|token| !content(token).is_some_and(|token| knows(&tokenizer, &token)))
        .copied()
        .cloned()
        .collect();
    if whole.is_file() && !lacking.is_empty() {
        let added = tokenizer.entry("added_tokens").or_insert_with(|| json!([]));
        let Value::Array(added) = added else {
            return Err(RuntimeError::file(&whole, "`added_tokens` is no list; fetch it again").into());
        };
        added.extend(lacking);
        added.sort_by_key(id);
        write_object(&whole, &tokenizer)?;
    }
    let in_model = |token: &&&Value| !content(token).is_some_and(|token| in_vocabulary(&tokenizer, &token));
    let tokens: Vec<&Value> = tokens.iter().filter(in_model).copied().collect();
    if tokens.is_empty() {
        return Ok(());
    }
    let mut settings = if config.is_file() { object(&config)? } else { Map::new() };
    if let Some(Value::Object(decoder)) = settings.get_mut("added_tokens_decoder") {
        for token in &tokens {
            let (Some(id), Some(token)) = (id(token), token.as_object()) else { continue };
            let described =
                token.iter().filter(|(key, _)| *key != "id").map(|(key, value)| (key.clone(), value.clone()));
            decoder.entry(id.to_string()).or_insert_with(|| Value::Object(described.collect()));
        }
        write_object(&config, &settings)?;
    }
    if list.is_file() || !whole.is_file() {
        let mut all = if list.is_file() { object(&list)? } else { Map::new() };
        all.extend(tokens.iter().filter_map(|token| Some((content(token)?, json!(id(token)?)))));
        write_object(&list, &all)?;
    }
    Ok(())
}

/// A `tokenizer.json` has the token, among those of its model or those that were added.
fn knows(tokenizer: &Map<String, Value>, token: &str) -> bool {
    let added = tokenizer.get("added_tokens").and_then(Value::as_array);
    in_vocabulary(tokenizer, token) || added.is_some_and(|added| added.iter().any(|old| old["content"] == token))
}

fn in_vocabulary(tokenizer: &Map<String, Value>, token: &str) -> bool {
    match tokenizer.get("model").and_then(|model| model.get("vocab")) {
        Some(Value::Object(vocab)) => vocab.contains_key(token),
        Some(Value::Array(pieces)) => pieces.iter().any(|piece| piece[0] == token),
        _ => false,
    }
}
