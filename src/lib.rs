//! What stands around the compiler and the runtime: data, metrics, progress.

pub mod data;
pub mod metrics;
pub mod progress;
