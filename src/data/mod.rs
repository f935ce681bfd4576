//! Data sets: files and a tokenizer in, examples out, batches of them packed for a graph.
//!
//! | task | file | reader |
//! | --- | --- | --- |
//! | generation | WebNLG's JSON: triples and their verbalisations | [`webnlg`] |
//! | classification | `sentence<TAB>label` lines | [`tsv`] |

mod batch;
mod error;
mod form;
mod tokenizer;
mod tsv;
mod webnlg;

use std::fs;
use std::path::{Path, PathBuf};

use peft_grammar::model::{Task, TaskKind};

pub use batch::{Batch, Batches, Order};
pub use error::DataError;
pub(crate) use error::did_you_mean;
pub use form::{Form, form};
pub use tokenizer::{Spanned, Tokenizer};

/// One sequence as the model sees it, and what it is to predict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    pub ids: Vec<i32>,
    /// The token type of every id.
    pub types: Vec<i32>,
    pub goal: Goal,
}

impl Example {
    /// How many things it asks for.
    fn targets(&self) -> usize {
        match self.goal {
            Goal::Continuation { from } => self.ids.len() - (from + 1).min(self.ids.len()),
            Goal::Class(_) => 1,
        }
    }
}

/// An example with its place in the file, `line 3`.
type Placed = (String, Example);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Every token after position `from` is predicted by the one before it.
    Continuation { from: usize },
    /// The sequence is of this class.
    Class(i32),
}

/// Marks around a classifier's sentence.
const MARKS: usize = 2;

#[derive(Clone, Debug)]
pub struct Dataset {
    pub source: PathBuf,
    pub examples: Vec<Example>,
    /// Examples longer than the task's `max_tokens`, which were cut to it.
    pub cut: usize,
    /// Examples of which the cut left nothing to predict; they are not among `examples`.
    pub dropped: usize,
    pub left_out: LeftOut,
}

/// What of a file makes no example.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Texts whose `comment` is not `good`.
    pub texts: usize,
    /// Entries without a text.
    pub entries: usize,
    /// Its first line, which names the columns.
    pub header: bool,
}

impl Dataset {
    /// Reads a file in the form its task calls for.
    pub fn load(path: &Path, task: &Task, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let text = read_text(path)?;
        let (examples, left_out) = match &task.kind {
            TaskKind::Generation { template, target, .. } => {
                webnlg::read(&text, path, &webnlg::Layout::new(template, target, tokenizer)?, tokenizer)?
            }
            TaskKind::Classification { labels } => tsv::read(&text, path, labels, tokenizer)?,
        };
        Ok(Dataset { left_out, ..Dataset::fit(path, examples, task.max_tokens as usize)? })
    }

    /// Cuts what is too long. A classifier's sequence keeps its last token, the closing mark. What the cut leaves
    /// nothing to learn from is dropped, a continuation without a token to predict or marks without a sentence; if that
    /// is everything, it is an error.
    fn fit(path: &Path, read: Vec<Placed>, max_tokens: usize) -> Result<Self, DataError> {
        let examples = Vec::with_capacity(read.len());
        let mut data = Dataset { source: path.to_owned(), examples, cut: 0, dropped: 0, left_out: LeftOut::default() };
        let mut first = None;
        for (place, mut example) in read {
            let length = example.ids.len();
            if length > max_tokens {
                data.cut += 1;
                if let Goal::Class(_) = example.goal {
                    example.ids.swap(max_tokens.saturating_sub(1), length - 1);
                }
                example.ids.truncate(max_tokens);
                example.types.truncate(max_tokens);
                let left = match example.goal {
                    Goal::Continuation { .. } => example.targets() > 0,
                    Goal::Class(_) => max_tokens > MARKS,
                };
                if !left {
                    data.dropped += 1;
                    first.get_or_insert((place, length, example.goal));
                    continue;
                }
            }
            data.examples.push(example);
        }
        match first {
            Some((place, length, goal)) if data.examples.is_empty() => {
                let (left, from) = match goal {
                    Goal::Continuation { from } => ("no target", format!(", its first target is number {}", from + 2)),
                    Goal::Class(_) => ("no sentence", String::new()),
                };
                let (count, limit) = (data.dropped, max_tokens);
                Err(DataError::TooLong { path: data.source, count, limit, left, place, length, from })
            }
            _ => Ok(data),
        }
    }

    /// One line on what was read: `FILE: 104 examples, 2,000 tokens, the longest 40, 28 cut`.
    pub fn describe(&self) -> String {
        let cut = match (self.cut, self.dropped) {
            (0, _) => String::new(),
            (cut, 0) => format!(", {cut} cut"),
            (cut, dropped) => format!(", {cut} cut, {dropped} of them dropped: no target is left"),
        };
        let (examples, tokens, longest) = (self.len(), self.tokens(), self.longest());
        let mut line =
            format!("{}: {examples} examples, {tokens} tokens, the longest {longest}{cut}", self.source.display());
        if self.left_out.texts > 0 {
            line += &format!(", {} texts left out: their `comment` is not `good`", self.left_out.texts);
        }
        if self.left_out.entries > 0 {
            line += &format!(", {} entries left out: they have no text", self.left_out.entries);
        }
        if self.left_out.header {
            line += ", its first line is a header";
        }
        line
    }

    pub fn len(&self) -> usize {
        self.examples.len()
    }

    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// A mean over nothing is no number: what computes one asks for an example.
    pub fn not_empty(&self) -> Result<(), DataError> {
        match self.is_empty() {
            true => Err(DataError::Empty { path: self.source.clone(), message: "there is nothing to run on".into() }),
            false => Ok(()),
        }
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

/// Formats by their first bytes, and how a file becomes text.
const FOREIGN: [(&[u8], &str, &str); 9] = [
    (b"\x1f\x8b", "compressed by gzip", "unpack it with `gzip -d`"),
    (b"BZh", "compressed by bzip2", "unpack it with `bzip2 -d`"),
    (b"\xfd7zXZ\x00", "compressed by xz", "unpack it with `xz -d`"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with `zstd -d`"),
    (b"PK\x03\x04", "a zip archive, or a spreadsheet in one", "unpack it, or save it as text with tabs"),
    (b"PAR1", "a table of Parquet", "write it as text"),
    (b"ARROW1", "a table of Arrow", "write it as text"),
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
];

/// A file as text, without a byte order mark.
fn read_text(path: &Path) -> Result<String, DataError> {
    let bytes = fs::read(path).map_err(|source| DataError::Read { path: path.to_owned(), source })?;
    if let Some((_, what, mend)) = FOREIGN.iter().find(|(start, ..)| bytes.starts_with(start)) {
        return Err(DataError::Foreign { path: path.to_owned(), what, mend });
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|&&b| b == b'\n').count();
        DataError::Line { path: path.to_owned(), line, message: "not UTF-8; save the file in that encoding".into() }
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

#[cfg(test)]
mod tests;
