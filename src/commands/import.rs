use std::path::PathBuf;

use peft_runtime::adapter::{self, TensorFile};

use super::overwrite::Overwrite;
use super::source::Source;
use crate::adapters;
use crate::failure::Failure;
use crate::hub::peft::{CONFIG, MODEL};

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
    #[command(flatten)]
    overwrite: Overwrite,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let [config, tensors] = [CONFIG, MODEL].map(|name| arguments.folder.join(name));
    arguments.overwrite.file(&arguments.output, &[&config, &tensors, &arguments.source.path])?;
    let model = arguments.source.model()?;
    let adapter = adapters::load(&model, &arguments.folder)?;
    adapter.stands_alone(&model)?;
    let (base, tensors) = (adapter.base(), adapter.values);
    let file = adapters::signed(TensorFile { tensors, ..TensorFile::default() }, &model, &base);
    adapter::save(&arguments.output, &file)?;
    super::print(&format!("{}: {} tensors", arguments.output.display(), file.tensors.len()));
    Ok(())
}
