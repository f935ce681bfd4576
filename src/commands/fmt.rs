use std::path::PathBuf;

use crate::failure::Failure;
use crate::spec;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[arg(required = true, value_name = "SPEC")]
    specs: Vec<PathBuf>,
    /// Change nothing; fail if a file is not in the canonical form
    #[arg(long)]
    check: bool,
}

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
            others.push(format!("{name}: not in the canonical form; `peftc fmt {name}` brings it there"));
        } else {
            super::write(path, &formatted)?;
            super::say(&format!("{name}: formatted"));
        }
    }
    if others.is_empty() { Ok(()) } else { Err(Failure::Spec(others.join("\n"))) }
}
