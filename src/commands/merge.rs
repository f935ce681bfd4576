use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use peft_runtime::adapter::Float;
use peft_runtime::gguf::is_gguf;
use peft_runtime::json;

use super::overwrite::{self, Overwrite};
use super::source::Source;
use crate::failure::Failure;
use crate::hub::checkpoint;
use crate::hub::model_folder::{self, CONFIG};
use crate::{adapters, merge, spec};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// A Hugging Face model directory, a GGUF file, or `random`
    #[arg(long)]
    weights: PathBuf,
    /// Trained values: `adapter.safetensors`, or a folder that a run, `peftc export` or PEFT wrote
    #[arg(long)]
    adapter: PathBuf,
    /// A directory with the tokenizer, if the weights' own has none
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// f32, f16 or bf16; that of the weights if not given
    #[arg(long, value_name = "TYPE", value_parser = float)]
    dtype: Option<Float>,
    /// The model directory to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    overwrite: Overwrite,
}

fn float(text: &str) -> Result<Float, String> {
    let names = Float::ALL.map(Float::name).join(", ");
    Float::ALL.into_iter().find(|dtype| dtype.name() == text).ok_or_else(|| format!("the types are {names}"))
}

/// A model's folder that holds nothing but what such folders do, and what this command writes.
fn is_merged(folder: &Path, written: &BTreeSet<PathBuf>) -> bool {
    let is_model = json::object(&folder.join(CONFIG)).is_ok_and(|config| config.contains_key("model_type"));
    is_model && overwrite::files(folder).iter().all(|file| written.contains(file) || model_folder::usual(file))
}

pub fn run(mut arguments: Arguments) -> Result<(), Failure> {
    arguments.weights = checkpoint::resolve(&arguments.weights)?;
    let Arguments { source, weights, adapter, tokenizer, dtype, output, overwrite } = &arguments;
    if source.is_artifact() {
        let path = source.path.display();
        return Err(Failure::Usage(format!(
            "{path}: an artifact has no equations to fold; name the spec it is made of"
        )));
    }
    if is_gguf(weights) && tokenizer.is_none() {
        return Err(Failure::Usage(format!(
            "{}: a merged model has its tokenizer beside it, as a folder does and a GGUF file does not; name the folder of \
             the model's own with `--tokenizer`",
            weights.display()
        )));
    }
    let read = [Some(weights), Some(adapter), tokenizer.as_ref(), Some(&source.path)];
    let read: Vec<&Path> = read.into_iter().flatten().map(PathBuf::as_path).collect();
    let written = merge::files(&merge::Sources { weights, tokenizer: tokenizer.as_deref() })?;
    overwrite.folder(output, &read, |folder| is_merged(folder, &written))?;
    let model = spec::load(&source.path, &source.set, super::color())?;
    let (loaded, adapter) = adapters::weights(weights, &model, Some(adapter))?;
    let values = adapter.unwrap_or_default().values;
    let merged = merge::merge(&model, loaded, &values, *dtype, &source.options()?)?;
    let said = format!("{} folded into {}, {}", merged.folded, model.backbone.name, merged.types);
    let notes = merge::save(&model, merged, &merge::Sources { weights, tokenizer: tokenizer.as_deref() }, output)?;
    for note in merge::notes(&model).iter().chain(&notes) {
        super::say(note);
    }
    super::print(&format!("{}: {said}", output.display()));
    Ok(())
}
