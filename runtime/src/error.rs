//! What can go wrong while an artifact runs. Messages name the place and the mend.

use std::fmt;
use std::path::PathBuf;

use crate::artifact::Limit;
use crate::trust::Stranger;

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
    #[error(transparent)]
    Stranger(#[from] Stranger),
    #[error(transparent)]
    Beyond(#[from] Box<Beyond>),
    #[error("{0}")]
    Device(String),
    /// `free`: bytes that could be had, if that is known.
    #[error("{:.2} GiB of memory cannot be had: {why}; {mend}", *wanted as f64 / f64::from(1 << 30))]
    Memory { wanted: u64, free: Option<u64>, why: String, mend: String },
}

/// A value of a batch that indexes what is not there.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("input `{}`: value {at} is {value} ({place}): {}", limit.input, self.why())]
pub struct Beyond {
    /// Which of the input's values.
    pub at: usize,
    pub value: i32,
    pub place: BatchPlace,
    /// How many there are.
    pub below: u64,
    pub limit: Limit,
}

impl Beyond {
    /// What the value should have been, to follow it.
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

impl From<Beyond> for RuntimeError {
    fn from(beyond: Beyond) -> Self {
        RuntimeError::Beyond(Box::new(beyond))
    }
}

/// A place in a packed batch, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchPlace {
    pub sequence: usize,
    /// Within the sequence; `None` where a sequence has one value.
    pub token: Option<usize>,
}

impl fmt::Display for BatchPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.token {
            Some(token) => write!(f, "token {token} of sequence {}", self.sequence),
            None => write!(f, "sequence {}", self.sequence),
        }
    }
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
