//! Checkpoints in Hugging Face's form: `config.json` beside `model.safetensors`.

use std::path::Path;

use peft_grammar::model::{Model, TaskKind};
use peft_runtime::weights::{self, Loaded};

use crate::failure::Failure;

/// Every tensor of the model: `random`, or from a Hugging Face directory.
pub fn weights(from: &Path, model: &Model) -> Result<Loaded, Failure> {
    if from == Path::new("random") {
        return Ok(Loaded::random(&model.params, model.train.seed));
    }
    let appended = match &model.task.kind {
        TaskKind::Generation { special, .. } => special.len() as u64,
        TaskKind::Classification { .. } => 0,
    };
    let loaded = weights::load(from, &model.backbone, &model.params, appended, model.train.seed)?;
    if !loaded.left_over.is_empty() {
        crate::commands::say(&format!("in the files but not of the model: {}", loaded.left_over.join(", ")));
    }
    Ok(loaded)
}
