//! Runs artifacts: buffers, weights, backends, execution. Knows no MLIR.

pub mod adapter;
mod arena;
pub mod artifact;
mod error;
mod memory;
pub mod philox;
mod session;
pub mod store;
mod validate;
pub mod weights;

pub use error::RuntimeError;
pub use memory::Numbers;
pub use session::{Inputs, Profile, Program, Session};
