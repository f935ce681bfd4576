//! Tests over the whole way. One binary: each that links MLIR is large.

mod fixtures;
mod parity;
