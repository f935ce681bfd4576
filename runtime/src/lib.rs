//! Runs artifacts: buffers, weights, backends, execution. Knows no MLIR.

pub mod artifact;
pub mod philox;
