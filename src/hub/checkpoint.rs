//! Checkpoints in Hugging Face's form, `config.json` beside `model.safetensors`, and in llama.cpp's, one GGUF file.
//!
//! What a checkpoint means is compared with the model before its numbers are read: the keys of `config.json` in
//! [`config`], the metadata of GGUF in [`gguf`], the names of labels in [`labels`], tensors by the rules of the
//! backbone's file in [`peft_runtime::weights`].

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
pub use folder::{cached, named, resolve};

/// What stands for weights that are drawn from each tensor's initialisation.
pub const RANDOM: &str = "random";

/// What a checkpoint says of itself: a folder's `config.json`, or the metadata of a GGUF file.
pub enum Description {
    Config(Map<String, Value>),
    Gguf(Box<GgufFile>),
}

impl Description {
    /// Reads it; `None` of a folder without `config.json`.
    pub fn read(from: &Path) -> Result<Option<Self>, RuntimeError> {
        match is_gguf(from) {
            true => Ok(GgufFile::open_all(from)?.into_iter().next().map(|file| Description::Gguf(Box::new(file)))),
            false => Ok(config::read(from)?.map(Description::Config)),
        }
    }

    /// Compares every key with what the model computes.
    pub fn compare(&self, model: &Model) -> Comparison {
        match self {
            Description::Config(config) => config::compare(config, model),
            Description::Gguf(file) => gguf::compare(file, model),
        }
    }

    /// What it calls its family, and the backbone of the library that reads it.
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

    /// The names of the keys that it has.
    pub fn keys(&self) -> Vec<&str> {
        match self {
            Description::Config(config) => config.keys().map(String::as_str).collect(),
            Description::Gguf(file) => file.metadata().map(|(key, _)| key).collect(),
        }
    }

    /// The token that ends a text, by its id.
    pub fn end(&self) -> Option<u64> {
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

/// Every tensor of the model: `random`, or from a Hugging Face directory or a GGUF file, whose meaning is that of the
/// model.
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
            "warning: {} has no `config.json`: whether the model computes what its weights are made for was not checked",
            from.display()
        )),
    }
    let loaded =
        weights::load(from, &model.backbone, &model.params, model.task.special().len() as u64, model.train.seed)
            .map_err(|error| about_the_head(error, config, model))?;
    let head = model.params.iter().zip(&loaded.held).find(|(p, _)| p.origin == Origin::Head);
    let has_head = head.is_some_and(|(_, held)| held.is_some());
    if let (Some(config), true) = (config, has_head) {
        refused(labels::compare(config, model))?;
    }
    notes(&loaded.unread).iter().for_each(|note| say(note));
    Ok(loaded)
}

/// What is said of a head's tensors is that they are of another head, where `config.json` says so.
fn about_the_head(error: RuntimeError, config: Option<&Map<String, Value>>, model: &Model) -> RuntimeError {
    match (error, config.and_then(|config| labels::other_head(config, model))) {
        (RuntimeError::Weights { path, message }, Some(line)) => {
            let mut heads = model.params.iter().filter(|p| p.origin == Origin::Head);
            let told = heads.any(|p| message.contains(p.name.split('.').next().unwrap_or(&p.name)));
            RuntimeError::Weights { path, message: if told { format!("{line}\n{message}") } else { message } }
        }
        (error, _) => error,
    }
}

/// A line for tensors of one kind that are in the files, and that the model does without.
fn notes(unread: &[Unread]) -> Vec<String> {
    let mut kinds: Vec<(&Option<String>, Vec<&str>)> = vec![];
    for tensor in unread {
        match kinds.iter_mut().find(|(note, _)| *note == &tensor.note) {
            Some((_, names)) => names.push(&tensor.name),
            None => kinds.push((&tensor.note, vec![&tensor.name])),
        }
    }
    let line = |(note, names): (&Option<String>, Vec<&str>)| {
        let what = note.as_deref().unwrap_or("they lie outside of the model");
        let shown = names.iter().take(4).copied().collect::<Vec<_>>().join(", ");
        let more = if names.len() > 4 { format!(" and {} more", names.len() - 4) } else { String::new() };
        format!("note: in the files and not read: {shown}{more} ({what})")
    };
    kinds.into_iter().map(line).collect()
}
