//! The runtime: it loads compiled artifacts and weights, and runs them on a CPU or a GPU. It does not depend on MLIR.
//!
//! A compiled program on disk is an artifact ([`store`], [`artifact`]). A [`Session`] puts its weights into device
//! memory, plans the memory of temporaries ([`arena`]) and launches the kernels through a [`backend`]. Other modules
//! read and write files of tensors.

#![deny(missing_docs)]

pub mod adapter;
pub mod arena;
pub mod artifact;
pub mod backend;
mod cpu;
mod cuda;
pub mod device;
mod error;
pub mod files;
pub mod fingerprint;
pub mod gguf;
pub mod json;
mod memory;
pub mod philox;
mod pool;
pub mod safefile;
mod session;
pub mod source;
pub mod store;
mod tensor;
pub mod trust;
mod validate;
pub mod weights;

pub use backend::Profile;
pub use error::{BatchPosition, OutOfRange, RuntimeError};
pub use memory::Numbers;
pub use session::{Inputs, PendingOutputs, Program, Session};
