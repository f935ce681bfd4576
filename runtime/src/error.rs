//! The errors of loading and running an artifact. Each message names the place and how to fix it.

use std::fmt;
use std::path::PathBuf;

use crate::artifact::Limit;
use crate::trust::Untrusted;

/// Why an artifact, a file or a run was refused, or failed.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// A file cannot be read, written or understood.
    #[error("{}: {message}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, to follow the path.
        message: String,
    },
    /// An artifact is inconsistent or cannot be loaded.
    #[error("{} is no artifact this peftc can run: {message}\ncompile it again with `peftc compile`", path.display())]
    Artifact {
        /// The artifact or a file of it.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A checkpoint has other tensors than the model.
    #[error("the weights in {} do not fit the model:\n{message}", path.display())]
    Weights {
        /// The checkpoint.
        path: PathBuf,
        /// The differences, one per line.
        message: String,
    },
    /// The artifact has no such entry point.
    #[error("`{entry}` is no entry of this artifact; it has {known}")]
    Entry {
        /// The entry that was asked for.
        entry: String,
        /// The entries that the artifact has.
        known: String,
    },
    /// An input of a run is missing or has a wrong size.
    #[error("input `{name}`: {message}")]
    Input {
        /// Name of the input.
        name: String,
        /// What is wrong with it.
        message: String,
    },
    /// The artifact's code may have been written by another user.
    #[error(transparent)]
    Untrusted(#[from] Untrusted),
    /// A value of an input is out of its range.
    #[error(transparent)]
    OutOfRange(#[from] Box<OutOfRange>),
    /// The device, its driver or a kernel failed.
    #[error("{0}")]
    Device(String),
    /// An allocation failed.
    #[error("{:.2} GiB of memory cannot be had: {why}; {remedy}", *wanted as f64 / f64::from(1 << 30))]
    Memory {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes available, if that is known.
        free: Option<u64>,
        /// Why the allocation failed.
        why: String,
        /// How to use less memory.
        remedy: String,
    },
}

/// A value of an input that kernels would use as an index beyond the end of what it indexes.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("input `{}`: value {index} is {value} ({position}): {}", limit.input, self.why())]
pub struct OutOfRange {
    /// Index of the value in the input.
    pub index: usize,
    /// The value.
    pub value: i32,
    /// The token or sequence that the value belongs to.
    pub position: BatchPosition,
    /// The number of things that can be indexed.
    pub below: u64,
    /// The limit that the value violates.
    pub limit: Limit,
}

impl OutOfRange {
    /// What the value should have been, as the end of a message.
    pub fn why(&self) -> String {
        let Limit { of, except, .. } = &self.limit;
        match except {
            Some(id) if i64::from(self.value) == *id as i64 => {
                "tokens of this id are padding, which the model's positions do not count; leave them out".into()
            }
            _ => format!("it indexes the {0} {of}, so it must lie in 0..{0}", self.below),
        }
    }
}

impl From<OutOfRange> for RuntimeError {
    fn from(error: OutOfRange) -> Self {
        RuntimeError::OutOfRange(Box::new(error))
    }
}

/// A token or sequence of a packed batch, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchPosition {
    /// Index of the sequence.
    pub sequence: usize,
    /// Index of the token in its sequence; `None` for an input with one value per sequence.
    pub token: Option<usize>,
}

impl fmt::Display for BatchPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.token {
            Some(token) => write!(f, "token {token} of sequence {}", self.sequence),
            None => write!(f, "sequence {}", self.sequence),
        }
    }
}

impl RuntimeError {
    /// A [`RuntimeError::File`].
    pub fn file(path: impl Into<PathBuf>, message: impl ToString) -> Self {
        RuntimeError::File { path: path.into(), message: message.to_string() }
    }
    /// A [`RuntimeError::Artifact`].
    pub fn artifact(path: impl Into<PathBuf>, message: impl ToString) -> Self {
        RuntimeError::Artifact { path: path.into(), message: message.to_string() }
    }
    /// A [`RuntimeError::Weights`].
    pub fn weights(path: impl Into<PathBuf>, message: impl ToString) -> Self {
        RuntimeError::Weights { path: path.into(), message: message.to_string() }
    }
    /// A [`RuntimeError::Input`].
    pub fn input(name: impl Into<String>, message: impl ToString) -> Self {
        RuntimeError::Input { name: name.into(), message: message.to_string() }
    }
}
