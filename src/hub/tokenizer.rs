//! Where a model's tokenizer is found.

use std::path::{Path, PathBuf};

use peft_grammar::model::Model;

use crate::data::Tokenizer;
use crate::failure::Failure;

/// The tokenizer named, or the one beside the weights, or near the data, or in Hugging Face's cache.
pub fn find(named: Option<&Path>, weights: &Path, data: &Path, model: &Model) -> Result<Tokenizer, Failure> {
    let vocab = model.params.iter().find(|p| p.shape.len() == 2).map_or(0, |p| p.shape[0]);
    if let Some(path) = named {
        return Ok(Tokenizer::load(path, &model.task, vocab)?);
    }
    let mut places = vec![];
    if weights != Path::new("random") {
        places.push(weights.to_path_buf());
    }
    let backbone = &model.backbone.name;
    let folder = data.parent().map(Path::to_path_buf).unwrap_or_default();
    places.push(folder.clone());
    places.push(folder.join("../tokenizers").join(backbone));
    places.extend(cached(backbone));
    let holds = |place: &&PathBuf| place.join("tokenizer.json").is_file() || place.join("vocab.json").is_file();
    match places.iter().find(holds) {
        Some(place) => Ok(Tokenizer::load(place, &model.task, vocab)?),
        None => {
            let places: Vec<String> = places.iter().map(|p| format!("  {}", p.display())).collect();
            Err(Failure::Usage(format!(
                "no tokenizer found; name one with `--tokenizer`. Looked in\n{}",
                places.join("\n")
            )))
        }
    }
}

/// Snapshots of a model in Hugging Face's cache.
fn cached(model: &str) -> Vec<PathBuf> {
    let home = std::env::var_os("HF_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/huggingface")));
    let Some(home) = home else { return vec![] };
    let snapshots = home.join("hub").join(format!("models--{model}")).join("snapshots");
    let Ok(entries) = std::fs::read_dir(snapshots) else { return vec![] };
    let mut found: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    found.sort();
    found
}
