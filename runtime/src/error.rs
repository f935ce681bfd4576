//! What can go wrong while an artifact runs. Messages name the place and the mend.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("{}: {message}", path.display())]
    File { path: PathBuf, message: String },
    #[error("{} is no artifact this peftc can run: {message}\ncompile it again with `peftc compile`", path.display())]
    Artifact { path: PathBuf, message: String },
    #[error("the weights in {} do not fit the model:\n{message}", path.display())]
    Weights { path: PathBuf, message: String },
    #[error("`{entry}` is no entry of this artifact; it has {known}")]
    Entry { entry: String, known: String },
    #[error("input `{name}`: {message}")]
    Input { name: String, message: String },
    #[error("{0}")]
    Device(String),
    /// `free`: bytes that could be had, if that is known.
    #[error("{:.2} GiB of memory cannot be had: {why}; {mend}", *wanted as f64 / f64::from(1 << 30))]
    Memory { wanted: u64, free: Option<u64>, why: String, mend: String },
}

impl RuntimeError {
    pub fn file(path: impl Into<PathBuf>, message: impl ToString) -> Self {
        RuntimeError::File { path: path.into(), message: message.to_string() }
    }
    pub fn artifact(path: impl Into<PathBuf>, message: impl ToString) -> Self {
        RuntimeError::Artifact { path: path.into(), message: message.to_string() }
    }
    pub fn weights(path: impl Into<PathBuf>, message: impl ToString) -> Self {
        RuntimeError::Weights { path: path.into(), message: message.to_string() }
    }
    pub fn input(name: impl Into<String>, message: impl ToString) -> Self {
        RuntimeError::Input { name: name.into(), message: message.to_string() }
    }
}
