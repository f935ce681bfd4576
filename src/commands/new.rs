use std::path::{Path, PathBuf};

use super::overwrite::Overwrite;
use crate::failure::Failure;
use crate::hub::checkpoint;
use crate::new;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// A Hugging Face model directory, a GGUF file, or the name of a model in the Hugging Face cache
    #[arg(long)]
    weights: PathBuf,
    /// A method of the library
    #[arg(long, default_value = "lora")]
    method: String,
    /// What it shall be trained on: WebNLG's JSON, or lines `sentence<TAB>label`
    #[arg(long)]
    data: Option<PathBuf>,
    /// The spec to write
    #[arg(short, long, value_name = "SPEC")]
    output: PathBuf,
    #[command(flatten)]
    overwrite: Overwrite,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let Arguments { method, data, output, overwrite, .. } = &arguments;
    overwrite.file(output, &data.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
    if arguments.weights == Path::new(checkpoint::RANDOM) {
        return Err(Failure::Usage(
            "random weights have no sizes of their own; name a checkpoint by `--weights`".into(),
        ));
    }
    let weights = checkpoint::resolve(&arguments.weights)?;
    let proposal = new::propose(&weights, method, data.as_deref())?;
    super::write(output, &proposal.text)?;
    proposal.said.iter().for_each(|line| super::say(line));
    let (spec, weights) = (output.display(), arguments.weights.display());
    let data = data.as_ref().map_or("FILE".into(), |path| path.display().to_string());
    super::print(&format!("{spec} is written; train it by\n  peftc train {spec} --weights {weights} --data {data}"));
    Ok(())
}
