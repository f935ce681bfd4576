//! `peftc import`: converts an adapter of PEFT to peftc's own format.

use std::path::PathBuf;

use peft_runtime::adapter::{self, TensorFile};

use super::model_args::ModelArgs;
use super::overwrite::Overwrite;
use crate::adapters;
use crate::failure::Failure;
use crate::hub::peft::{CONFIG, MODEL};

/// The command line of `peftc import`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: ModelArgs,
    /// The folder that PEFT wrote, with `adapter_config.json` and `adapter_model.safetensors`
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// The file to write, such as `adapter.safetensors`
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    overwrite: Overwrite,
}

/// Reads the folder for the spec's model and writes the adapter.
///
/// # Errors
///
/// The adapter does not fit the model, or the file cannot be written.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let [config, tensors] = [CONFIG, MODEL].map(|name| arguments.folder.join(name));
    arguments.overwrite.file(&arguments.output, &[&config, &tensors, &arguments.source.path])?;
    let model = arguments.source.model()?;
    let adapter = adapters::load(&model, &arguments.folder)?;
    adapter.reject_residuals(&model)?;
    let (base, tensors) = (adapter.base(), adapter.values);
    let file = adapters::annotated(TensorFile { tensors, ..TensorFile::default() }, &model, &base);
    adapter::save(&arguments.output, &file)?;
    super::print(&format!("{}: {} tensors", arguments.output.display(), file.tensors.len()));
    Ok(())
}
