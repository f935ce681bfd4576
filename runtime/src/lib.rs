//! Runs artifacts: buffers, weights, backends, execution. Knows no MLIR.

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
pub use error::{BatchPlace, Beyond, RuntimeError};
pub use memory::Numbers;
pub use session::{Inputs, Program, Promise, Session};
