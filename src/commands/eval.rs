use std::path::PathBuf;

use peft_grammar::names::Entry;
use peft_runtime::Session;

use super::rows::Rows;
use super::source::Source;
use crate::failure::Failure;
use crate::hub::{checkpoint, tokenizer};
use crate::{adapters, train};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// json, jsonl, csv, tsv, parquet or text, plain or compressed by gzip or zstd; several files by repeating `--data`,
    /// or by a pattern in quotes such as `'test/*.jsonl'`
    #[arg(long, required = true, value_name = "FILE")]
    data: Vec<PathBuf>,
    #[command(flatten)]
    rows: Rows,
    /// A Hugging Face model directory, a GGUF file, or `random`
    #[arg(long)]
    weights: PathBuf,
    /// Trained values: `adapter.safetensors`, or a folder that a run, `peftc export` or PEFT wrote; the untrained model
    /// without it
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// A directory or a GGUF file with a tokenizer; the weights' own if not given
    #[arg(long)]
    tokenizer: Option<PathBuf>,
}

pub fn run(mut arguments: Arguments) -> Result<(), Failure> {
    arguments.weights = checkpoint::resolve(&arguments.weights)?;
    let mut ready = arguments.source.open()?;
    let model = &ready.model;
    let tokenizer = tokenizer::find(arguments.tokenizer.as_deref(), &arguments.weights, &arguments.data[0], model)?;
    let data = arguments.rows.read(&arguments.data, model, &tokenizer)?;
    let (loaded, adapter) = adapters::weights(&arguments.weights, model, arguments.adapter.as_deref())?;
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
