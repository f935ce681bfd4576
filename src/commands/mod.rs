//! The command line: one file a command.

mod check;
#[cfg(feature = "compiler")]
mod compile;
mod data;
mod eval;
mod export;
mod fmt;
mod import;
mod inspect;
mod library;
#[cfg(feature = "compiler")]
mod merge;
mod new;
mod overwrite;
mod rows;
mod run;
mod source;
mod train;

use std::path::Path;

use clap::{Parser, Subcommand};

use crate::failure::Failure;

/// A declarative graph compiler for parameter-efficient fine-tuning.
#[derive(Debug, Parser)]
#[command(name = "peftc", version, max_term_width = 100)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a first spec for a checkpoint and data
    New(new::Arguments),
    /// Check specs: diagnostics only
    Check(check::Arguments),
    /// Bring specs into the canonical form
    Fmt(fmt::Arguments),
    /// Show what a spec trains and stores, and what it costs
    Inspect(inspect::Arguments),
    /// What methods the library has
    Methods(library::Arguments),
    /// What backbones the library has
    Backbones(library::Arguments),
    /// What tasks the library has
    Tasks(library::Arguments),
    /// What training recipes the library has
    Recipes(library::Arguments),
    /// Compile a spec to an artifact, or show one of its stages
    #[cfg(feature = "compiler")]
    Compile(compile::Arguments),
    /// Show examples of a data set as the model sees them, and how long they are
    Data(data::Arguments),
    /// Run an entry point on tensors from a file
    Run(run::Arguments),
    /// Train
    Train(train::Arguments),
    /// Loss and accuracy of an adapter on a data set
    Eval(eval::Arguments),
    /// Write trained values in Hugging Face PEFT's format where it has the method, else in ours
    Export(export::Arguments),
    /// Read an adapter that Hugging Face PEFT wrote
    Import(import::Arguments),
    /// Fold trained values into the backbone's weights, for transformers to load
    #[cfg(feature = "compiler")]
    Merge(merge::Arguments),
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    match arguments.command {
        Command::New(a) => new::run(a),
        Command::Check(a) => check::run(a),
        Command::Fmt(a) => fmt::run(a),
        Command::Inspect(a) => inspect::run(a),
        Command::Methods(a) => library::run(a, "method", peft_grammar::library::methods()),
        Command::Backbones(a) => library::run(a, "backbone", peft_grammar::library::backbones()),
        Command::Tasks(a) => library::run(a, "task", peft_grammar::library::tasks()),
        Command::Recipes(a) => library::run(a, "recipe", peft_grammar::library::recipes()),
        #[cfg(feature = "compiler")]
        Command::Compile(a) => compile::run(a),
        Command::Data(a) => data::run(a),
        Command::Run(a) => run::run(a),
        Command::Train(a) => train::run(a),
        Command::Eval(a) => eval::run(a),
        Command::Export(a) => export::run(a),
        Command::Import(a) => import::run(a),
        #[cfg(feature = "compiler")]
        Command::Merge(a) => merge::run(a),
    }
}

/// Whether messages may carry color.
fn color() -> bool {
    use std::io::IsTerminal;
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// What is printed on standard output; a closed pipe is no failure.
fn print(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{text}");
}

pub(crate) fn say(text: &str) {
    eprintln!("{text}");
}

/// Writes a result, all of it or nothing.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    Ok(peft_runtime::files::write_whole(path, text.as_bytes())?)
}
