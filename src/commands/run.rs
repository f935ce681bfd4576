//! `peftc run`: runs an entry of a model on the tensors of a file.

use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use peft_grammar::names::{Entry, LOSS};
use peft_runtime::{Session, adapter};

use super::model_args::ModelArgs;
use super::overwrite::Overwrite;
use crate::failure::Failure;
use crate::hub::checkpoint;
use crate::{adapters, exchange};

/// The command line of `peftc run`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: ModelArgs,
    /// The entry to run: `forward` for the logits, or `grad` for all gradients as well
    #[arg(long, default_value = Entry::Grad.name(), value_parser = entry())]
    entry: Entry,
    /// A safetensors file with the batch as tensors `inputs.*`, and with the weights as `weights.*` unless `--weights`
    /// is given
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,
    /// The base model's weights: a Hugging Face model directory, a GGUF file, or `random`
    #[arg(long)]
    weights: Option<PathBuf>,
    /// The trained values: `adapter.safetensors`, or a folder that a run, `peftc export` or PEFT wrote
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// The safetensors file to write, with the tensors `loss`, `logits`, `lambda.*` and `grad.*`
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    overwrite: Overwrite,
    /// The seed of dropout
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// The parser of `--entry`.
fn entry() -> impl TypedValueParser<Value = Entry> {
    let names = [Entry::Forward, Entry::Grad].map(Entry::name);
    PossibleValuesParser::new(names).map(|name| Entry::from_name(&name).expect("one of them"))
}

/// Runs the entry and writes its results.
///
/// # Errors
///
/// The model, the batch, the weights or the adapter cannot be used, or the session fails.
pub fn run(mut arguments: Arguments) -> Result<(), Failure> {
    arguments.weights = arguments.weights.as_deref().map(checkpoint::resolve).transpose()?;
    let read =
        [Some(&arguments.inputs), Some(&arguments.source.path), arguments.weights.as_ref(), arguments.adapter.as_ref()];
    let read: Vec<&Path> = read.into_iter().flatten().map(PathBuf::as_path).collect();
    arguments.overwrite.file(&arguments.output, &read)?;
    let mut ready = arguments.source.open()?;
    let file = adapter::load(&arguments.inputs)?;
    let padded = exchange::batch(&file, "inputs.", &arguments.inputs, &ready.model)?;
    let path = arguments.adapter.as_deref();
    let (weights, adapter) = match &arguments.weights {
        Some(from) => {
            let (loaded, adapter) = adapters::weights(from, &ready.model, path, false)?;
            (loaded.tensors, adapter)
        }
        None => {
            let mut given = exchange::weights(&file, &ready.model, &arguments.inputs)?;
            let adapter = path.map(|path| adapters::load(&ready.model, path)).transpose()?;
            if let Some(adapter) = &adapter {
                adapter.apply_to_base(&ready.model, &mut given)?;
            }
            (given, adapter)
        }
    };
    let program = ready.program(&[Entry::Init, arguments.entry].map(Entry::name))?;
    let mut session = Session::new(program, weights, arguments.source.threads)?;
    if arguments.weights.is_some() {
        session.initialise()?;
    }
    if let Some(adapter) = &adapter {
        adapters::apply(&mut session, &adapter.values)?;
    }
    let results = exchange::run(&mut session, &ready.model, arguments.entry, &padded, [arguments.seed as i32, 0])?;
    adapter::save(&arguments.output, &results)?;
    let written = format!("{} tensors in {}", results.tensors.len(), arguments.output.display());
    match (padded.without_loss(), session.output(LOSS)) {
        (Some(why), _) => super::print(&format!("{written}; no loss: {why}")),
        (None, Some((_, loss))) => super::print(&format!("loss {}, {written}", loss[0])),
        (None, None) => super::print(&written),
    }
    Ok(())
}
