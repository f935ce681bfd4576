//! Why a command ended early, and the exit code that says so.

use peft_runtime::RuntimeError;

use crate::data::DataError;
use crate::train::metrics::MetricsError;

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The spec is wrong; the text is already rendered.
    #[error("{0}")]
    Spec(String),
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Store(#[from] peft_runtime::store::StoreError),
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Compiler(#[from] peft_passes::Error),
    #[error("{0}")]
    Diverged(String),
    /// A signal ended a run, whose state was saved.
    #[error("{0}")]
    Stopped(String),
    #[error("{path}: {source}")]
    File { path: std::path::PathBuf, source: std::io::Error },
}

impl Failure {
    pub fn file(path: impl Into<std::path::PathBuf>) -> impl FnOnce(std::io::Error) -> Failure {
        let path = path.into();
        move |source| Failure::File { path, source }
    }

    /// 1 a wrong spec, or one that has not what is asked of it, 2 wrong usage, 3 files (data, weights, artifacts), 4 the
    /// run itself, 5 a fault of the compiler, 6 a run that was stopped and can go on.
    pub fn code(&self) -> u8 {
        match self {
            Failure::Spec(_) => 1,
            #[cfg(feature = "compiler")]
            Failure::Compiler(peft_passes::Error::Refused { .. }) => 1,
            Failure::Usage(_) => 2,
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
