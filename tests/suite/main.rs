//! Tests over the whole way. One binary: each that links MLIR is large.

mod cli;
mod fixtures;
mod gpu;
mod halves;
mod interop;
mod pairs;
mod paper;
mod parity;
mod ptx;
mod ptxas;
mod real;
mod registers;
mod runs;
mod stages;
mod traces;
