//! `peftc check`: checks specs and reports how much of each model trains.

use std::path::PathBuf;

use crate::failure::Failure;
use crate::spec;

/// The command line of `peftc check`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The specs to check
    #[arg(required = true, value_name = "SPEC")]
    specs: Vec<PathBuf>,
    /// Set a value of every spec, such as `train.steps=20`
    #[arg(long, value_name = "KEY=VALUE", value_parser = spec::assignment)]
    set: Vec<(String, String)>,
}

/// Checks all specs, also after one with errors.
///
/// # Errors
///
/// [`Failure::Spec`] with the diagnostics of all specs that do not check.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let mut wrong = vec![];
    for path in &arguments.specs {
        match spec::load(path, &arguments.set, super::color()) {
            Ok(model) => {
                let rates = model.own_rates().into_iter().map(|(lr, values)| format!(", {values} of these at lr {lr}"));
                super::print(&format!(
                    "{}: ok, {} of {} values train{}",
                    path.display(),
                    model.trainable_elements(),
                    model.params.iter().map(|p| p.elements()).sum::<u64>(),
                    rates.collect::<String>()
                ));
            }
            Err(Failure::Spec(text)) => wrong.push(text),
            Err(other) => return Err(other),
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(Failure::Spec(wrong.join("\n"))) }
}
