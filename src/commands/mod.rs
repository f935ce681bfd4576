//! The command line. Each command is a file of this folder.

mod check;
#[cfg(feature = "compiler")]
mod compile;
mod data;
mod data_args;
mod eval;
mod export;
mod fmt;
mod import;
mod inspect;
mod library;
#[cfg(feature = "compiler")]
mod merge;
mod model_args;
mod new;
#[cfg(feature = "compiler")]
mod opt;
mod overwrite;
mod run;
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
    /// Write a first spec for a checkpoint and, if given, for a data set
    New(new::Arguments),
    /// Check specs and print their diagnostics
    Check(check::Arguments),
    /// Format specs in place
    Fmt(fmt::Arguments),
    /// Show what a spec trains and stores, and what a training step costs
    Inspect(inspect::Arguments),
    /// List the methods of the library, or show one
    Methods(library::Arguments),
    /// List the backbones of the library, or show one
    Backbones(library::Arguments),
    /// List the tasks of the library, or show one
    Tasks(library::Arguments),
    /// List the training recipes of the library, or show one
    Recipes(library::Arguments),
    /// Compile a spec to an artifact, or show one of its stages
    #[cfg(feature = "compiler")]
    Compile(compile::Arguments),
    /// Run passes on text of the `peft` dialect
    #[cfg(feature = "compiler")]
    Opt(opt::Arguments),
    /// Show examples of a data set as the model sees them, and the distribution of their lengths
    Data(data::Arguments),
    /// Run the forward pass, or the forward and backward pass, on tensors from a file
    Run(run::Arguments),
    /// Train what a spec declares trainable on a data set
    Train(train::Arguments),
    /// Evaluate an adapter, or the untrained model, on a data set
    Eval(eval::Arguments),
    /// Write trained values in Hugging Face PEFT's format if it has the method, else in peftc's own
    Export(export::Arguments),
    /// Convert an adapter that Hugging Face PEFT wrote to peftc's own format
    Import(import::Arguments),
    /// Fold trained values into the backbone's weights, for transformers to load
    ///
    /// A method folds if what it makes of a projection is still affine in the projection's input: LoRA, DoRA, VeRA, IA³
    /// and the like, and mixtures of them. Trained tensors of the backbone (`full`, `bitfit`, `train`) and the head
    /// replace those of the checkpoint. A method that computes anything else, such as an inducer, an adapter of two
    /// layers or a prefix, cannot be folded, and the command refuses it.
    #[cfg(feature = "compiler")]
    Merge(merge::Arguments),
}

/// Runs the command that the command line names.
///
/// # Errors
///
/// The failure of the command.
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
        #[cfg(feature = "compiler")]
        Command::Opt(a) => opt::run(a),
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

/// Whether diagnostics on standard error are coloured: it is a terminal, and `NO_COLOR` is unset or empty.
fn color() -> bool {
    use std::io::IsTerminal;
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Prints a result on standard output. A closed pipe is not an error.
fn print(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints a note or a warning on standard error.
pub(crate) fn say(text: &str) {
    eprintln!("{text}");
}

/// Writes a file atomically.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    Ok(peft_runtime::files::write_atomic(path, text.as_bytes())?)
}

/// Writes a text to the file that `--output` names, or prints it.
#[cfg(feature = "compiler")]
fn write_or_print(output: Option<&Path>, text: &str) -> Result<(), Failure> {
    match output {
        Some(path) => write(path, text),
        None => {
            print(text.trim_end());
            Ok(())
        }
    }
}
