//! The front end: `.peft` text to a checked model. Pure: no I/O, no MLIR.

pub mod graph;
pub mod model;
