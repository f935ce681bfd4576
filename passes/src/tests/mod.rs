//! Tests over several passes. They live in the library so that only one test binary links MLIR.

mod finite_differences;
mod fusion;
mod round_trip;
mod rules;
pub(crate) mod samples;
mod siblings;
