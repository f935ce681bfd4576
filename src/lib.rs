//! What stands around the compiler and the runtime: specs on disk, data, training, commands.

pub mod adapters;
pub mod budget;
pub mod cache;
pub mod commands;
#[cfg(feature = "compiler")]
pub mod compiler;
#[cfg(feature = "compiler")]
pub mod costs;
pub mod data;
pub mod exchange;
pub mod failure;
pub mod hub;
mod interrupt;
pub mod meaning;
#[cfg(feature = "compiler")]
pub mod merge;
pub mod metrics;
pub mod new;
pub mod progress;
pub mod spec;
pub mod state;
pub mod training;
