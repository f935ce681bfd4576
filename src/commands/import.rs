use std::path::PathBuf;

use peft_runtime::adapter::{self, TensorFile};

use super::source::Source;
use crate::adapters;
use crate::failure::Failure;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// A folder that PEFT wrote
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// The adapter to write, such as `adapter.safetensors`
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let model = arguments.source.model()?;
    let tensors = adapters::load(&model, &arguments.folder, None)?;
    let count = tensors.len();
    let file = adapters::signed(TensorFile { tensors, ..TensorFile::default() }, &model);
    adapter::save(&arguments.output, &file)?;
    super::print(&format!("{}: {count} tensors", arguments.output.display()));
    Ok(())
}
