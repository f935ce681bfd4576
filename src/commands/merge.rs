use std::path::PathBuf;

use super::source::Source;
use crate::failure::Failure;
use crate::hub::checkpoint;
use crate::{adapters, merge, spec};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// A Hugging Face model directory, or `random`
    #[arg(long)]
    weights: PathBuf,
    /// Trained values: `adapter.safetensors`, or a folder that a run, `peftc export` or PEFT wrote
    #[arg(long)]
    adapter: PathBuf,
    /// The model directory to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let source = &arguments.source;
    if source.is_artifact() {
        let path = source.path.display();
        return Err(Failure::Usage(format!(
            "{path}: an artifact has no equations to fold; name the spec it is made of"
        )));
    }
    let model = spec::load(&source.path, &source.set, super::color())?;
    let mut weights = checkpoint::weights(&arguments.weights, &model)?;
    let values = adapters::load(&model, &arguments.adapter, Some(&mut weights))?;
    let merged = merge::merge(&model, weights, &values, &source.options()?)?;
    merge::save(&model, &merged, &arguments.weights, &arguments.output)?;
    for note in merge::notes(&model) {
        super::say(&note);
    }
    super::print(&format!("{}: {} folded into {}", arguments.output.display(), merged.folded, model.backbone.name));
    Ok(())
}
