//! Finds a model's tokenizer and reads its files, in the formats of Hugging Face and in GGUF files.

mod classes;
mod files;
mod gguf;
mod models;
mod settings;
mod template;

use std::path::{Path, PathBuf};

use peft_grammar::model::{ConfigValue, Model};

use peft_runtime::gguf::is_gguf;

use crate::commands::say;
use crate::data::{DataError, Tokenizer};
use crate::failure::Failure;
use crate::hub::checkpoint;

pub use files::{AddedToken, Opened, open};
pub use template::{DEFAULT, Templates};

/// Loads the tokenizer that `named` names, or that of the weights. Random weights have none, so it is searched for near
/// the data and in the Hugging Face cache. Prints on standard error which tokenizer is used.
///
/// # Errors
///
/// There is no tokenizer, or it cannot be used with the model.
pub fn find(named: Option<&Path>, weights: &Path, data: &Path, model: &Model) -> Result<Tokenizer, Failure> {
    let place = match named {
        Some(path) => checkpoint::resolve_cached(path).unwrap_or_else(|| path.to_owned()),
        None if weights == Path::new("random") => near(data, &model.backbone.name)?,
        None if weights.is_dir() || is_gguf(weights) => weights.to_owned(),
        None => {
            let message =
                "no such directory; `--weights` takes a Hugging Face model directory, a GGUF file, or `random`";
            let source = std::io::Error::new(std::io::ErrorKind::NotFound, message);
            return Err(DataError::Read { path: weights.to_owned(), source }.into());
        }
    };
    let tokenizer = Tokenizer::load(&place, &model.task, rows(model))?;
    say(&tokenizer.describe());
    Ok(tokenizer)
}

/// The number of rows of the token embedding.
fn rows(model: &Model) -> u64 {
    match model.backbone.config.get("vocab_size") {
        Some(ConfigValue::Int(rows)) => *rows as u64,
        _ => model.params.iter().find(|p| p.shape.len() == 2).map_or(0, |p| p.shape[0]),
    }
}

/// The first folder that holds a tokenizer: the data's, the backbone's in `../tokenizers`, the backbone's in the
/// Hugging Face cache.
fn near(data: &Path, backbone: &str) -> Result<PathBuf, Failure> {
    let folder = data.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
    let mut places = vec![folder.clone(), folder.join("../tokenizers").join(backbone)];
    places.extend(checkpoint::cached(backbone));
    let holds =
        |place: &&PathBuf| ["tokenizer.json", "vocab.json", "vocab.txt"].iter().any(|f| place.join(f).is_file());
    if let Some(place) = places.iter().find(holds) {
        return Ok(place.clone());
    }
    let places: Vec<String> = places.iter().map(|p| format!("  {}", p.display())).collect();
    Err(Failure::Usage(format!(
        "random weights have no tokenizer of their own; name one with `--tokenizer`. These folders hold none:\n{}",
        places.join("\n")
    )))
}

#[cfg(test)]
mod tests;
