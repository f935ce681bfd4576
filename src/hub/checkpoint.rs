//! Checkpoints in Hugging Face's form: `config.json` beside `model.safetensors`.

use std::path::Path;

use peft_grammar::model::{Model, Origin};
use peft_runtime::{Numbers, weights};

use crate::failure::Failure;

/// Every tensor of the model: `random`, or from a Hugging Face directory.
pub fn weights(from: &Path, model: &Model) -> Result<Vec<Numbers>, Failure> {
    if from == Path::new("random") {
        return Ok(weights::random(&model.params, model.train.seed));
    }
    let appended = model.task.special().len() as u64;
    let loaded = weights::load(from, &model.backbone, &model.params, appended, model.train.seed)?;
    let heads: Vec<&str> = model
        .params
        .iter()
        .filter(|p| p.origin == Origin::Head && loaded.drawn.contains(&p.name))
        .map(|p| p.name.as_str())
        .collect();
    if !heads.is_empty() {
        crate::commands::say(&format!("new here, drawn at random: {}", heads.join(", ")));
    }
    if !loaded.left_over.is_empty() {
        crate::commands::say(&format!("in the files but not of the model: {}", loaded.left_over.join(", ")));
    }
    Ok(loaded.tensors)
}
