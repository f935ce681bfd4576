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
            let bare = matches!(failure, Failure::Spec(_) | Failure::Stopped(_));
            eprintln!("{}{failure}", if bare { "" } else { "error: " });
            ExitCode::from(failure.code())
        }
    }
}
