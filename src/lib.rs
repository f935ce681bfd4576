//! The application around the compiler (`peft_passes`) and the runtime (`peft_runtime`): it reads specs, data and
//! checkpoints, trains, exchanges adapters and checkpoints with other programs, and offers all of that as commands.
//!
//! Without the feature `compiler` it contains no compiler and runs artifacts alone.

pub mod adapters;
pub mod budget;
pub mod cache;
pub mod commands;
#[cfg(feature = "compiler")]
pub mod compiler;
mod contained;
#[cfg(feature = "compiler")]
pub mod costs;
pub mod data;
pub mod exchange;
pub mod failure;
pub mod hub;
pub mod meaning;
#[cfg(feature = "compiler")]
pub mod merge;
pub mod new;
pub mod spec;
pub mod train;
