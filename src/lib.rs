//! What stands around the compiler and the runtime: specs on disk, data, training, commands.

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
