//! `peftc fmt`: formats specs.

use std::path::PathBuf;

use crate::failure::Failure;
use crate::spec;

/// The command line of `peftc fmt`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The specs to format
    #[arg(required = true, value_name = "SPEC")]
    specs: Vec<PathBuf>,
    /// Change no file, and fail if one is not formatted
    #[arg(long)]
    check: bool,
}

/// Formats all specs, or reports with `--check` which are not formatted.
///
/// # Errors
///
/// A spec does not parse or cannot be written, or `--check` found one that is not formatted.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let mut others = vec![];
    for path in &arguments.specs {
        let source = spec::read(path)?;
        let name = path.to_string_lossy();
        let formatted = peft_grammar::format(&name, &source).map_err(|d| Failure::Spec(d.render(super::color())))?;
        if formatted == source {
            continue;
        }
        if arguments.check {
            others.push(format!("{name}: not formatted; `peftc fmt {name}` formats it"));
        } else {
            super::write(path, &formatted)?;
            super::say(&format!("{name}: formatted"));
        }
    }
    if others.is_empty() { Ok(()) } else { Err(Failure::Spec(others.join("\n"))) }
}
