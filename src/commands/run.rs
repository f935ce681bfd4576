use std::path::PathBuf;

use peft_runtime::{Session, adapter};

use super::source::Source;
use crate::failure::Failure;
use crate::hub::checkpoint;
use crate::{adapters, exchange};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// `forward`, or `grad` for every gradient as well
    #[arg(long, default_value = "grad", value_parser = ["forward", "grad"])]
    entry: String,
    /// Tensors `inputs.*`, and `weights.*` unless `--weights` is given
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,
    /// A Hugging Face model directory, or `random`
    #[arg(long)]
    weights: Option<PathBuf>,
    /// Trained values: `adapter.safetensors`, or a folder that a run, `peftc export` or PEFT wrote
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Where `loss`, `logits`, `lambda.*` and `grad.*` go
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Of dropout
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let ready = arguments.source.open()?;
    let file = adapter::load(&arguments.inputs)?;
    let padded = exchange::batch(&file, "inputs.", &arguments.inputs)?;
    let mut weights = match &arguments.weights {
        Some(from) => checkpoint::weights(from, &ready.model)?,
        None => exchange::weights(&file, &ready.model, &arguments.inputs)?,
    };
    let adapter = arguments.adapter.as_ref();
    let adapter = adapter.map(|path| adapters::load(&ready.model, path, Some(&mut weights))).transpose()?;
    let program = ready.program.only(&["init", &arguments.entry]);
    let mut session = Session::new(program, weights, arguments.source.threads)?;
    if arguments.weights.is_some() {
        session.initialise()?;
    }
    if let Some(values) = &adapter {
        adapters::apply(&mut session, values)?;
    }
    let results = exchange::run(&mut session, &ready.model, &arguments.entry, &padded, [arguments.seed as i32, 0])?;
    adapter::save(&arguments.output, &results)?;
    if let Some((_, loss)) = session.output("loss") {
        super::print(&format!("loss {}, {} tensors in {}", loss[0], results.tensors.len(), arguments.output.display()));
    }
    Ok(())
}
