//! Runs artifacts: buffers, weights, backends, execution. Knows no MLIR.
//!
//! ```text
//! store (a directory) ─► manifest + kernels ─► execute::Program ─┐
//! weights (safetensors, or drawn) ───────────────────────────────┴─► execute::Session ─► run(entry, batch)
//! ```

pub mod arena;
pub mod artifact;
pub mod batch;
pub mod execute;
pub mod kernels;
mod layout;
pub mod memory;
pub mod philox;
pub mod pool;
pub mod store;
mod validate;
pub mod weights;
