//! The compiler's middle and back end: the `peft` dialect, the passes over it, and the lowering to kernels for
//! processors and GPUs. No other crate uses MLIR.

#![deny(missing_docs)]

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
pub mod multi_output;
pub mod partition;
pub mod pipeline;
pub mod remat;
pub mod rewrite;
pub mod target;

/// An error of the compiler behind the checker. Users can cause only two of them: [`Error::Mlir`] by a malformed module
/// as input, and [`Error::Refused`] by an entry that the model cannot have.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// MLIR rejected a module; the text is its diagnostic.
    #[error("{0}")]
    Mlir(String),
    /// The kernels could not be written or linked into a library.
    #[error("linking failed: {0}")]
    Link(String),
    /// The model cannot have a requested entry.
    #[error("{message}")]
    Refused {
        /// The name of the entry.
        entry: &'static str,
        /// Why the model cannot have it.
        message: String,
    },
    /// A pass failed, or the verifier rejected its result. This is a fault of the compiler.
    #[error("the result of stage `{stage}` is not well-formed: {message}\n(a fault of the compiler)")]
    Invalid {
        /// The pass that failed.
        stage: String,
        /// The message of the pass or of the verifier.
        message: String,
    },
}

#[cfg(test)]
pub(crate) mod tests;
