//! End-to-end tests. They are one binary, because each binary that links MLIR is large.

mod accumulation;
mod adamw_trace;
mod cli;
mod documents;
mod fixtures;
mod full_size;
mod fuzz;
mod gguf;
mod gpu;
mod half_precision;
mod interop;
mod kills;
mod layers;
#[cfg(target_arch = "x86_64")]
mod machine_code;
mod method_pairs;
mod new;
mod opt;
mod optimizers;
mod pack;
mod paper;
mod parity;
mod ptx;
mod ptxas;
mod reports;
mod runs;
mod stages;

/// The value of an environment variable. Without it, prints that the test is skipped.
fn env_or_skip(name: &str) -> Option<std::ffi::OsString> {
    let found = std::env::var_os(name).filter(|value| !value.is_empty());
    if found.is_none() {
        println!("skipped: {name} is not set");
    }
    found
}
