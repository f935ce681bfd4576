//! Data sets: files and a tokenizer in, examples out, batches of them packed for a graph.
//!
//! | task | file | reader |
//! | --- | --- | --- |
//! | generation | WebNLG's JSON: triples and their verbalisations | [`webnlg`] |
//! | classification | `sentence<TAB>label` lines | [`tsv`] |

mod batch;
mod error;
mod tokenizer;
mod tsv;
mod webnlg;

use std::fs;
use std::path::{Path, PathBuf};

use peft_grammar::model::{Task, TaskKind};

pub use batch::{Batch, Batches, Order};
pub use error::DataError;
pub use tokenizer::Tokenizer;

/// One sequence as the model sees it, and what it is to predict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    pub ids: Vec<i32>,
    /// The token type of every id.
    pub types: Vec<i32>,
    pub goal: Goal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Every token after position `from` is predicted by the one before it.
    Continuation { from: usize },
    /// The sequence is of this class.
    Class(i32),
}

#[derive(Clone, Debug)]
pub struct Dataset {
    pub source: PathBuf,
    pub examples: Vec<Example>,
    /// Examples longer than the task's `max_tokens`, which were cut to it.
    pub cut: usize,
    /// Examples of which the cut left nothing to predict; they are not among `examples`.
    pub dropped: usize,
}

impl Dataset {
    /// Reads a file in the form its task calls for.
    pub fn load(path: &Path, task: &Task, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let text = read_text(path)?;
        let examples = match &task.kind {
            TaskKind::Generation { template, target, .. } => {
                webnlg::read(&text, path, &webnlg::Layout::new(template, target, tokenizer)?, tokenizer)?
            }
            TaskKind::Classification { labels } => tsv::read(&text, path, labels, tokenizer)?,
        };
        Ok(Dataset::fit(path, examples, task.max_tokens as usize))
    }

    /// Cuts what is too long. A classifier's sequence keeps its last token, the closing mark.
    fn fit(path: &Path, mut examples: Vec<Example>, max_tokens: usize) -> Self {
        let (mut cut, read) = (0, examples.len());
        examples.retain_mut(|example| {
            let length = example.ids.len();
            if length <= max_tokens {
                return true;
            }
            cut += 1;
            if let Goal::Class(_) = example.goal {
                example.ids.swap(max_tokens - 1, length - 1);
            }
            example.ids.truncate(max_tokens);
            example.types.truncate(max_tokens);
            match example.goal {
                Goal::Continuation { from } => from + 1 < max_tokens,
                Goal::Class(_) => true,
            }
        });
        Dataset { source: path.to_owned(), dropped: read - examples.len(), examples, cut }
    }

    pub fn len(&self) -> usize {
        self.examples.len()
    }

    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    pub fn tokens(&self) -> usize {
        self.examples.iter().map(|e| e.ids.len()).sum()
    }

    /// Tokens of the longest example.
    pub fn longest(&self) -> usize {
        self.examples.iter().map(|e| e.ids.len()).max().unwrap_or(0)
    }

    /// Batches an epoch has; the last one may be smaller.
    pub fn steps_per_epoch(&self, batch: usize) -> usize {
        self.len().div_ceil(batch)
    }
}

/// A file as text, without a byte order mark.
fn read_text(path: &Path) -> Result<String, DataError> {
    let bytes = fs::read(path).map_err(|source| DataError::Read { path: path.to_owned(), source })?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|&&b| b == b'\n').count();
        DataError::Line { path: path.to_owned(), line, message: "not UTF-8; save the file in that encoding".into() }
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

#[cfg(test)]
mod tests;
