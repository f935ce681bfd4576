//! The files of a model's folder other than its weights: tokenizer, configuration, templates, model card.

use std::fs;
use std::path::{Path, PathBuf};

use peft_runtime::json::object;
use peft_runtime::{RuntimeError, files};
use serde_json::{Map, Value, json};

use crate::failure::Failure;
use crate::train::metrics;

/// The configuration of a model.
pub const CONFIG: &str = "config.json";
/// The weights of a model.
pub const MODEL: &str = "model.safetensors";

/// Suffixes of files with weights, in the formats of all frameworks.
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

/// Files that are not copied. `config.json` is written separately. An adapter's configuration, from a run in the same
/// folder, would make transformers load the adapter's base model.
const NOT_COPIED: &[&str] = &[CONFIG, "adapter_config.json"];

/// The files of a model's folder other than its weights.
#[derive(Debug, Default)]
pub struct SideFiles {
    /// Their paths relative to the folder.
    pub files: Vec<PathBuf>,
    /// Subfolders that hold weights (such as `onnx`, or a run's), whose files are not included.
    pub skipped: Vec<PathBuf>,
}

impl SideFiles {
    /// Lists the files of `folder`, without hidden ones (`.git`, `.cache`).
    ///
    /// # Errors
    ///
    /// A folder cannot be read.
    pub fn of(folder: &Path) -> Result<Self, Failure> {
        let mut found = SideFiles::default();
        found.look(folder, Path::new(""))?;
        Ok(found)
    }

    /// Lists the files of the subfolder `inside`.
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

    /// Copies the files from one folder to another.
    ///
    /// # Errors
    ///
    /// A file cannot be read or written.
    pub fn copy(&self, from: &Path, to: &Path) -> Result<(), Failure> {
        for file in &self.files {
            let (source, copy) = (from.join(file), to.join(file));
            let parent = copy.parent().unwrap_or(to);
            fs::create_dir_all(parent).map_err(Failure::file(parent))?;
            let bytes = fs::read(&source).map_err(Failure::file(&source))?;
            files::write_atomic(&copy, &bytes)?;
        }
        Ok(())
    }
}

/// The names of a folder's entries, sorted.
fn names(folder: &Path) -> Result<Vec<String>, Failure> {
    let entries = fs::read_dir(folder).map_err(Failure::file(folder))?;
    let names: Result<Vec<_>, _> = entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect();
    let mut names = names.map_err(Failure::file(folder))?;
    names.sort_unstable();
    Ok(names)
}

/// Whether a file holds weights, by its name.
fn is_weights(name: &str) -> bool {
    WEIGHTS.iter().any(|end| name.ends_with(end))
}

/// Whether a file, by its name, is a usual one of a model's folder: weights, configuration, tokenizer or template.
pub fn usual(file: &Path) -> bool {
    const ENDS: &[&str] = &[".json", ".jinja", ".model"];
    const NAMES: &[&str] = &["vocab.txt", "merges.txt"];
    let name = file.to_string_lossy();
    let at_top = file.parent() == Some(Path::new(""));
    at_top && (is_weights(&name) || NAMES.contains(&&*name) || ENDS.iter().any(|end| name.ends_with(end)))
}

/// Whether a folder or one of its subfolders holds weights.
fn holds_weights(folder: &Path) -> Result<bool, Failure> {
    for name in names(folder)? {
        let path = folder.join(&name);
        if is_weights(&name) || (path.is_dir() && holds_weights(&path)?) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Writes a JSON object, indented and atomically.
///
/// # Errors
///
/// The file cannot be written.
pub fn write_object(path: &Path, object: &Map<String, Value>) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(object).expect("plain data");
    text.push('\n');
    Ok(files::write_atomic(path, text.as_bytes())?)
}

/// The files that [`add_tokens`] may write.
pub const TOKENS: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"];

/// Adds tokens to the tokenizer's files in `folder`, so that transformers gives them their ids. Each token has the
/// format of `added_tokens` in a `tokenizer.json`.
///
/// transformers numbers added tokens consecutively in the order of their ids, so `tokens` must hold all tokens behind
/// the vocabulary, also those that only the settings name (such as `pad_token`).
///
/// The tokens are written to `added_tokens` of `tokenizer.json` and to `added_tokens_decoder` of
/// `tokenizer_config.json`, or to `added_tokens.json` for a tokenizer without these.
///
/// # Errors
///
/// A file cannot be read, is malformed, or cannot be written.
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
            return Err(RuntimeError::file(&whole, "`added_tokens` is not a list; fetch it again").into());
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

/// Whether a `tokenizer.json` holds the token, in its vocabulary or among the added tokens.
fn knows(tokenizer: &Map<String, Value>, token: &str) -> bool {
    let added = tokenizer.get("added_tokens").and_then(Value::as_array);
    in_vocabulary(tokenizer, token) || added.is_some_and(|added| added.iter().any(|old| old["content"] == token))
}

/// Whether the vocabulary of a `tokenizer.json` holds the token.
fn in_vocabulary(tokenizer: &Map<String, Value>, token: &str) -> bool {
    match tokenizer.get("model").and_then(|model| model.get("vocab")) {
        Some(Value::Object(vocab)) => vocab.contains_key(token),
        Some(Value::Array(pieces)) => pieces.iter().any(|piece| piece[0] == token),
        _ => false,
    }
}
