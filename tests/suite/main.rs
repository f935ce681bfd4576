//! Tests over the whole way. One binary: each that links MLIR is large.

mod accumulation;
mod cli;
mod fixtures;
mod fuzz;
mod gguf;
mod gpu;
mod halves;
mod interop;
mod kills;
mod layers;
mod new;
mod optimizers;
mod pack;
mod pairs;
mod paper;
mod parity;
mod ptx;
mod ptxas;
mod real;
#[cfg(target_arch = "x86_64")]
mod registers;
mod reports;
mod runs;
mod stages;
mod traces;

/// What an environment variable says; without it, that a test is skipped.
fn asked(name: &str) -> Option<std::ffi::OsString> {
    let found = std::env::var_os(name).filter(|value| !value.is_empty());
    if found.is_none() {
        println!("skipped: {name} is not set");
    }
    found
}
