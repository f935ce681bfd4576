use std::path::PathBuf;

use crate::budget::Budget;
use crate::failure::Failure;
use crate::spec;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[arg(value_name = "SPEC")]
    spec: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Set a value of the spec, such as `model.layers=2`
    #[arg(long, value_name = "KEY=VALUE", value_parser = spec::assignment)]
    set: Vec<(String, String)>,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let model = spec::load(&arguments.spec, &arguments.set, super::color())?;
    let budget = Budget::of(&model);
    if arguments.json {
        super::print(&serde_json::to_string_pretty(&budget).expect("plain data"));
    } else {
        super::print(&budget.table());
    }
    Ok(())
}
