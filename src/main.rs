//! The program `peftc`: parses the command line, runs the command, and turns its failure into an exit code.

use std::process::ExitCode;

use clap::Parser;
use peftc::commands::{self, Arguments};
use peftc::failure::Failure;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    match commands::run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // These two kinds carry a complete message of their own.
            let bare = matches!(failure, Failure::Spec(_) | Failure::Stopped(_));
            eprintln!("{}{failure}", if bare { "" } else { "error: " });
            ExitCode::from(failure.exit_code())
        }
    }
}
