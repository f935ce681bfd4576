//! `peftc new`: writes a first spec for a checkpoint.

use std::path::{Path, PathBuf};

use super::overwrite::Overwrite;
use crate::failure::Failure;
use crate::hub::checkpoint;
use crate::new;

/// The command line of `peftc new`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The checkpoint: a Hugging Face model directory, a GGUF file, or the name of a model in the Hugging Face cache
    #[arg(long)]
    weights: PathBuf,
    /// The method of the library to apply, see `peftc methods`
    #[arg(long, default_value = "lora")]
    method: String,
    /// The data to train on, in any format that `peftc train` reads. The spec's task is chosen by its columns
    #[arg(long)]
    data: Option<PathBuf>,
    /// The spec to write
    #[arg(short, long, value_name = "SPEC")]
    output: PathBuf,
    #[command(flatten)]
    overwrite: Overwrite,
}

/// Writes the spec and prints the command that trains it.
///
/// # Errors
///
/// No spec can be proposed for the checkpoint, or the file cannot be written.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let Arguments { method, data, output, overwrite, .. } = &arguments;
    overwrite.file(output, &data.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
    if arguments.weights == Path::new(checkpoint::RANDOM) {
        return Err(Failure::Usage(
            "random weights have no sizes to write a spec for; name a checkpoint with `--weights`".into(),
        ));
    }
    let weights = checkpoint::resolve(&arguments.weights)?;
    let proposal = new::propose(&weights, method, data.as_deref())?;
    super::write(output, &proposal.text)?;
    proposal.notes.iter().for_each(|line| super::say(line));
    let (spec, weights) = (output.display(), arguments.weights.display());
    let data = data.as_ref().map_or("FILE".into(), |path| path.display().to_string());
    super::print(&format!("{spec} is written; train it with\n  peftc train {spec} --weights {weights} --data {data}"));
    Ok(())
}
