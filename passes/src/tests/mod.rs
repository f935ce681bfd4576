//! Tests that involve several passes. They are part of the library, so that only one test binary links MLIR.

mod finite_differences;
mod fusion;
mod multi_output;
mod round_trip;
mod rules;
pub(crate) mod samples;
