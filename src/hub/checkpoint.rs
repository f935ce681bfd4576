//! Reads checkpoints in Hugging Face's format, a folder with `config.json` and `model.safetensors`, and in llama.cpp's,
//! a GGUF file.
//!
//! A checkpoint's configuration is compared with the model before its tensors are read, so that weights of a model that
//! computes something else are refused: the keys of `config.json` in [`config`], the metadata of GGUF in [`gguf`], the
//! labels in [`labels`]. [`peft_runtime::weights`] matches the tensors by the rules of the backbone's file.

pub mod config;
mod folder;
pub mod gguf;
pub mod labels;

use std::path::Path;

use peft_grammar::library;
use peft_grammar::model::{Model, Origin};
use peft_runtime::RuntimeError;
use peft_runtime::gguf::{GgufFile, is_gguf};
use peft_runtime::weights::{self, Loaded, Unread};
use serde_json::{Map, Value};

use crate::commands::say;
use crate::failure::Failure;

pub use config::Comparison;
pub use folder::{cached, resolve, resolve_cached};

/// The value of `--weights` for random weights, drawn from each tensor's initialisation.
pub const RANDOM: &str = "random";

/// The configuration of a checkpoint.
pub enum Description {
    /// The `config.json` of a folder.
    Config(Map<String, Value>),
    /// A GGUF file, for its metadata.
    Gguf(Box<GgufFile>),
}

impl Description {
    /// Reads the configuration of the checkpoint `from`; `None` for a folder without `config.json`.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn read(from: &Path) -> Result<Option<Self>, RuntimeError> {
        match is_gguf(from) {
            true => Ok(GgufFile::open_all(from)?.into_iter().next().map(|file| Description::Gguf(Box::new(file)))),
            false => Ok(config::read(from)?.map(Description::Config)),
        }
    }

    /// Compares every key with the model.
    pub fn compare(&self, model: &Model) -> Comparison {
        match self {
            Description::Config(config) => config::compare(config, model),
            Description::Gguf(file) => gguf::compare(file, model),
        }
    }

    /// The name of the checkpoint's family (`model_type`, or GGUF's architecture), and the backbone of the library that
    /// reads it.
    pub fn family(&self) -> (Option<&str>, Option<String>) {
        match self {
            Description::Config(config) => {
                let name = config.get("model_type").and_then(Value::as_str);
                (name, name.and_then(library::backbone_of))
            }
            Description::Gguf(file) => {
                let name = file.text(gguf::ARCHITECTURE);
                (name, name.and_then(library::backbone_of_gguf))
            }
        }
    }

    /// The names of its keys.
    pub fn keys(&self) -> Vec<&str> {
        match self {
            Description::Config(config) => config.keys().map(String::as_str).collect(),
            Description::Gguf(file) => file.metadata().map(|(key, _)| key).collect(),
        }
    }

    /// The id of the token that ends a text.
    pub fn eos_token_id(&self) -> Option<u64> {
        match self {
            Description::Config(config) => {
                let id = config.get("eos_token_id")?;
                id.as_array().map_or(Some(id), |all| all.first())?.as_u64()
            }
            Description::Gguf(file) => match file.value("tokenizer.ggml.eos_token_id")? {
                peft_runtime::gguf::Value::Unsigned(id) => Some(*id),
                _ => None,
            },
        }
    }
}

/// Loads all tensors of the model from the checkpoint `from`, or draws them if it is `random`. Tensors that a
/// checkpoint may lack, such as a head, are drawn. Warnings and notes are printed on standard error.
///
/// # Errors
///
/// The configuration or a tensor does not fit the model, or a file cannot be read.
pub fn weights(from: &Path, model: &Model) -> Result<Loaded, Failure> {
    if from == Path::new(RANDOM) {
        return Ok(Loaded::random(&model.params, model.train.seed));
    }
    let refused = |wrong: Vec<String>| match wrong.is_empty() {
        true => Ok(()),
        false => Err(RuntimeError::weights(from, wrong.join("\n"))),
    };
    let description = Description::read(from)?;
    let config = match &description {
        Some(Description::Config(config)) => Some(config),
        _ => None,
    };
    match description.as_ref().map(|description| description.compare(model)) {
        Some(found) => {
            refused(found.wrong)?;
            found.warnings.iter().for_each(|warning| say(&format!("warning: {warning}")));
        }
        None => say(&format!(
            "warning: {} has no `config.json`: whether the model computes what its weights are made for was not \
             checked",
            from.display()
        )),
    }
    let loaded =
        weights::load(from, &model.backbone, &model.params, model.task.special_tokens().len() as u64, model.train.seed)
            .map_err(|error| with_head_mismatch(error, config, model))?;
    let head = model.params.iter().zip(&loaded.from_files).find(|(p, _)| p.origin == Origin::Head);
    let has_head = head.is_some_and(|(_, held)| held.is_some());
    if let (Some(config), true) = (config, has_head) {
        refused(labels::compare(config, model))?;
    }
    unread_notes(&loaded.unread).iter().for_each(|note| say(note));
    Ok(loaded)
}

/// Adds to an error about the tensors of a head that the checkpoint's head is for another task, if `config.json` says
/// so.
fn with_head_mismatch(error: RuntimeError, config: Option<&Map<String, Value>>, model: &Model) -> RuntimeError {
    match (error, config.and_then(|config| labels::other_head(config, model))) {
        (RuntimeError::Weights { path, message }, Some(line)) => {
            let mut heads = model.params.iter().filter(|p| p.origin == Origin::Head);
            let told = heads.any(|p| message.contains(p.name.split('.').next().unwrap_or(&p.name)));
            RuntimeError::Weights { path, message: if told { format!("{line}\n{message}") } else { message } }
        }
        (error, _) => error,
    }
}

/// Notes about tensors in the files that the model does not read, one for all tensors with the same reason.
fn unread_notes(unread: &[Unread]) -> Vec<String> {
    let mut kinds: Vec<(&Option<String>, Vec<&str>)> = vec![];
    for tensor in unread {
        match kinds.iter_mut().find(|(note, _)| *note == &tensor.note) {
            Some((_, names)) => names.push(&tensor.name),
            None => kinds.push((&tensor.note, vec![&tensor.name])),
        }
    }
    let line = |(note, names): (&Option<String>, Vec<&str>)| {
        let what = note.as_deref().unwrap_or("they are not part of the model");
        let shown = names.iter().take(4).copied().collect::<Vec<_>>().join(", ");
        let more = if names.len() > 4 { format!(" and {} more", names.len() - 4) } else { String::new() };
        format!("note: in the files and not read: {shown}{more} ({what})")
    };
    kinds.into_iter().map(line).collect()
}
