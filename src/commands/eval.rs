//! `peftc eval`: the loss and the metrics of a model on a data set.

use std::path::PathBuf;

use peft_grammar::names::Entry;
use peft_runtime::Session;

use super::data_args::DataArgs;
use super::model_args::ModelArgs;
use crate::failure::Failure;
use crate::hub::{checkpoint, tokenizer};
use crate::{adapters, train};

/// The command line of `peftc eval`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: ModelArgs,
    /// The data to evaluate on: files of json, jsonl, csv, tsv, parquet or text, plain or compressed with gzip or zstd.
    /// Repeat `--data` for several files, or give a pattern in quotes such as `'test/*.jsonl'`
    #[arg(long, required = true, value_name = "FILE")]
    data: Vec<PathBuf>,
    #[command(flatten)]
    rows: DataArgs,
    /// The base model's weights: a Hugging Face model directory, a GGUF file, or `random`
    #[arg(long)]
    weights: PathBuf,
    /// The trained values: `adapter.safetensors`, or a folder that a run, `peftc export` or PEFT wrote. Without it the
    /// untrained model is evaluated
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// A directory or a GGUF file with the tokenizer [default: the tokenizer of `--weights`]
    #[arg(long)]
    tokenizer: Option<PathBuf>,
}

/// Evaluates and prints the metrics.
///
/// # Errors
///
/// The model, the weights, the adapter or the data cannot be used, or the session fails.
pub fn run(mut arguments: Arguments) -> Result<(), Failure> {
    arguments.weights = checkpoint::resolve(&arguments.weights)?;
    let mut ready = arguments.source.open()?;
    let model = &ready.model;
    let tokenizer = tokenizer::find(arguments.tokenizer.as_deref(), &arguments.weights, &arguments.data[0], model)?;
    let data = arguments.rows.read(&arguments.data, model, &tokenizer)?;
    let (loaded, adapter) = adapters::weights(&arguments.weights, model, arguments.adapter.as_deref(), false)?;
    let program = ready.program(&[Entry::Init, Entry::Eval].map(Entry::name))?;
    let mut session = Session::new(program, loaded.tensors, arguments.source.threads)?;
    session.initialise()?;
    if let Some(adapter) = &adapter {
        adapters::apply(&mut session, &adapter.values)?;
    }
    let figures = train::evaluate(&mut session, &ready.model, &data)?;
    super::print(&format!("{}: {} examples, {}", data.name(), data.len(), figures.describe()));
    Ok(())
}
