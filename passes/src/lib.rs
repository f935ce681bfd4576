//! From the checked model to code: the `peft` dialect, its passes, and lowering to the targets.
//! The only crate that touches MLIR.

pub mod fuse;
pub mod gradient;
pub mod interpret;
pub mod partition;
pub mod philox;
pub mod rewrite;
