//! The failures of commands and their exit codes.

use peft_runtime::RuntimeError;

use crate::data::DataError;
use crate::train::metrics::MetricsError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A spec does not check. The text is the rendered diagnostics.
    #[error("{0}")]
    Spec(String),
    /// The command line asks for something that the command cannot do.
    #[error("{0}")]
    Usage(String),
    /// A data set or a tokenizer cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The metrics file of a run cannot be read or written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A text of the dialect, or a pass on it, is wrong. The message names the place.
    #[cfg(feature = "compiler")]
    #[error("{0}")]
    Dialect(String),
    /// The runtime refuses weights, a file or an artifact, or fails while it runs.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// An artifact on disk or in the cache cannot be used.
    #[error(transparent)]
    Store(#[from] peft_runtime::store::StoreError),
    /// The compiler refuses a model or fails.
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Compiler(#[from] peft_passes::Error),
    /// Training produced a loss that is not finite.
    #[error("{0}")]
    Diverged(String),
    /// A signal stopped a run after its state was saved.
    #[error("{0}")]
    Stopped(String),
    /// A file or a folder cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file or folder.
        path: std::path::PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
}

impl Failure {
    /// Returns a function that adds `path` to an I/O error, for `map_err`.
    pub fn file(path: impl Into<std::path::PathBuf>) -> impl FnOnce(std::io::Error) -> Failure {
        let path = path.into();
        move |source| Failure::File { path, source }
    }

    /// The exit code of the program.
    ///
    /// | code | failure |
    /// | --- | --- |
    /// | 1 | the spec is wrong, or the compiler refuses what is asked of it |
    /// | 2 | the command line is wrong |
    /// | 3 | a file is wrong: data, weights, an adapter, an artifact |
    /// | 4 | the run failed: device, memory, a loss that is not finite |
    /// | 5 | the compiler has a fault |
    /// | 6 | a signal stopped the run, which `--resume` continues |
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Spec(_) => 1,
            #[cfg(feature = "compiler")]
            Failure::Compiler(peft_passes::Error::Refused { .. }) => 1,
            Failure::Usage(_) => 2,
            #[cfg(feature = "compiler")]
            Failure::Dialect(_) => 3,
            Failure::Data(_) | Failure::Metrics(_) | Failure::Store(_) | Failure::File { .. } => 3,
            Failure::Runtime(RuntimeError::Device(_) | RuntimeError::Memory { .. } | RuntimeError::Entry { .. })
            | Failure::Diverged(_) => 4,
            Failure::Runtime(_) => 3,
            Failure::Stopped(_) => 6,
            #[cfg(feature = "compiler")]
            Failure::Compiler(_) => 5,
        }
    }
}
