//! Runs artifacts: buffers, weights, backends, execution. Knows no MLIR.
//!
//! ```text
//! store (a directory) ─► manifest + kernels ─► execute::Program ─┐
//! weights (safetensors, or drawn) ───────────────────────────────┴─► execute::Session ─► run(entry, batch)
//! ```

pub mod adapter;
pub mod arena;
pub mod artifact;
pub mod batch;
pub mod device;
pub mod execute;
pub mod init;
pub mod kernels;
mod layout;
pub mod memory;
pub mod philox;
pub mod pool;
pub mod safefile;
pub mod store;
mod validate;
pub mod weights;
