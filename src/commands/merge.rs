//! `peftc merge`: folds an adapter into the base model and writes a model directory for transformers.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use peft_runtime::adapter::Float;
use peft_runtime::gguf::is_gguf;
use peft_runtime::json;

use super::model_args::ModelArgs;
use super::overwrite::{self, Overwrite};
use crate::failure::Failure;
use crate::hub::checkpoint;
use crate::hub::model_folder::{self, CONFIG};
use crate::{adapters, merge, spec};

/// The command line of `peftc merge`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: ModelArgs,
    /// The base model's weights: a Hugging Face model directory, a GGUF file (then with `--tokenizer`), or `random`
    #[arg(long)]
    weights: PathBuf,
    /// The trained values to fold: a file `adapter.safetensors` or `best.safetensors`, or a folder that a run, `peftc
    /// export` or Hugging Face PEFT wrote
    #[arg(long)]
    adapter: PathBuf,
    /// A directory with the tokenizer, if the one of `--weights` has none
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// The type in which all tensors are written: f32, f16 or bf16 [default: the type of each tensor in `--weights`]
    #[arg(long, value_name = "TYPE", value_parser = float)]
    dtype: Option<Float>,
    /// The model directory to write: `model.safetensors` with the folded weights, `config.json`, the tokenizer with the
    /// task's special tokens added, and copies of the other files of `--weights`
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    overwrite: Overwrite,
}

/// Parses a type for `--dtype`.
fn float(text: &str) -> Result<Float, String> {
    let names = Float::ALL.map(Float::name).join(", ");
    Float::ALL.into_iter().find(|dtype| dtype.name() == text).ok_or_else(|| format!("the types are {names}"))
}

/// Whether a folder is a model directory that holds nothing but the usual files of one and those that this command
/// writes.
fn is_merged(folder: &Path, written: &BTreeSet<PathBuf>) -> bool {
    let is_model = json::object(&folder.join(CONFIG)).is_ok_and(|config| config.contains_key("model_type"));
    is_model && overwrite::files(folder).iter().all(|file| written.contains(file) || model_folder::usual(file))
}

/// Folds the adapter and writes the model directory.
///
/// # Errors
///
/// A method of the spec cannot be folded, the weights or the adapter cannot be used, or the folder cannot be written.
pub fn run(mut arguments: Arguments) -> Result<(), Failure> {
    arguments.weights = checkpoint::resolve(&arguments.weights)?;
    let Arguments { source, weights, adapter, tokenizer, dtype, output, overwrite } = &arguments;
    if source.is_artifact() {
        let path = source.path.display();
        return Err(Failure::Usage(format!(
            "{path}: an artifact holds no equations to fold; name the spec that it was compiled from"
        )));
    }
    if is_gguf(weights) && tokenizer.is_none() {
        return Err(Failure::Usage(format!(
            "{}: a merged model's folder holds a tokenizer, which is not copied from a GGUF file; name the folder of \
             the \
             model's own tokenizer with `--tokenizer`",
            weights.display()
        )));
    }
    let read = [Some(weights), Some(adapter), tokenizer.as_ref(), Some(&source.path)];
    let read: Vec<&Path> = read.into_iter().flatten().map(PathBuf::as_path).collect();
    let written = merge::files(&merge::Sources { weights, tokenizer: tokenizer.as_deref() })?;
    overwrite.folder(output, &read, |folder| is_merged(folder, &written))?;
    let model = spec::load(&source.path, &source.set, super::color())?;
    let (loaded, adapter) = adapters::weights(weights, &model, Some(adapter), false)?;
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
