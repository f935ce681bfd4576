//! From the checked model to code: the `peft` dialect, its passes, and lowering to the targets.
//! The only crate that touches MLIR.

mod abi;
mod builder;
pub mod codegen;
pub mod cost;
pub mod dialect;
pub mod fold;
pub mod fuse;
pub mod gradient;
pub mod inference;
pub mod interpret;
pub mod kernels;
pub mod lower;
pub mod partition;
pub mod pipeline;
pub mod remat;
pub mod rewrite;
pub mod siblings;
pub mod target;

/// What can go wrong behind the checker. None of it is the user's fault but a malformed module given as input, and
/// an entry asked for that the model cannot have.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// MLIR's own words.
    #[error("{0}")]
    Mlir(String),
    #[error("linking failed: {0}")]
    Link(String),
    #[error("{message}")]
    Refused { entry: &'static str, message: String },
    #[error("the result of stage `{stage}` is not well-formed: {message}\n(a fault of the compiler)")]
    Invalid { stage: String, message: String },
}

#[cfg(test)]
pub(crate) mod tests;
