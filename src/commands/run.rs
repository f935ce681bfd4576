use std::path::PathBuf;

use peft_runtime::{Session, adapter};

use super::source::Source;
use crate::exchange;
use crate::failure::Failure;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// `forward`, or `grad` for every gradient as well
    #[arg(long, default_value = "grad", value_parser = ["forward", "grad"])]
    entry: String,
    /// Tensors `weights.*` and `inputs.*`
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,
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
    let weights = exchange::weights(&file, &ready.model, &arguments.inputs)?;
    let mut session = Session::new(ready.program, weights, arguments.source.threads)?;
    let results = exchange::run(&mut session, &ready.model, &arguments.entry, &padded, [arguments.seed as i32, 0])?;
    adapter::save(&arguments.output, &results)?;
    if let Some((_, loss)) = session.output("loss") {
        super::print(&format!("loss {}, {} tensors in {}", loss[0], results.tensors.len(), arguments.output.display()));
    }
    Ok(())
}
