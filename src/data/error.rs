//! What can be wrong with a data set or a tokenizer. Each message names the file, the place and the mend.

use std::io;
use std::path::{Path, PathBuf};

use super::rows::{At, Fault};

#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("cannot read `{path}`: {source}")]
    Read { path: PathBuf, source: io::Error },

    #[error("`{path}` is {what}, which is not read here; {mend}")]
    Foreign { path: PathBuf, what: &'static str, mend: &'static str },

    #[error("`{path}`, compressed by {by}, cannot be unpacked: {message}")]
    Packed { path: PathBuf, by: &'static str, message: String },

    /// What `--data` names is no file that could be read.
    #[error("`{path}`: {message}")]
    Named { path: PathBuf, message: String },

    /// A row, or a place in a file.
    #[error("`{path}`, {at}: {message}")]
    Place {
        path: PathBuf,
        at: At,
        message: String,
        /// It is a single row, which can be left out.
        skippable: bool,
    },

    #[error(
        "`{path}`, {at}: {message}\n\
         a WebNLG file is {{\"entries\": [{{\"1\": {{\"lexicalisations\": [{{\"comment\", \"lex\"}}], \
         \"modifiedtripleset\": [{{\"subject\", \"property\", \"object\"}}]}}}}]}}"
    )]
    Webnlg { path: PathBuf, at: At, message: String },

    /// Every row was left out as a bad one.
    #[error("no row is left: all {count} are bad; the first: {first}")]
    AllBad { count: usize, first: String },

    #[error("`{path}` holds no example: {message}")]
    Empty { path: PathBuf, message: String },

    #[error("the task's template: {0}")]
    Template(String),

    #[error("no tokenizer in `{path}`: {message}")]
    NoTokenizer { path: PathBuf, message: String },

    /// What stands beside a tokenizer's vocabulary.
    #[error("`{path}`: {message}")]
    Settings { path: PathBuf, message: String },

    #[error("`{path}` is no tokenizer that can be used: {message}")]
    Tokenizer { path: PathBuf, message: String },

    #[error(
        "the tokenizer `{path}` does not belong to this model: its vocabulary has {found} tokens{}, \
         but the spec's `vocab` is {wanted}{}",
        if *special > 0 { format!(" ({} with the task's {special} special ones)", found + special) } else { String::new() },
        taken(behind)
    )]
    Vocabulary {
        path: PathBuf,
        found: u64,
        special: u64,
        wanted: u64,
        /// Tokens that are no part of its vocabulary, as [`crate::hub::tokenizer::Behind::describe`] shows them.
        behind: Vec<String>,
    },

    /// Every example is too long for anything to be left of it to learn from.
    #[error(
        "`{path}`: no example is left: `task.max_tokens` is {limit}, and the cut to it leaves {left} in any of the \
         {count} examples; the first, {place}, has {length} tokens{from}; raise `task.max_tokens` to {length}, or leave such examples out"
    )]
    TooLong {
        path: PathBuf,
        count: usize,
        limit: usize,
        /// What the cut leaves.
        left: &'static str,
        place: String,
        length: usize,
        /// From which token on there is something to learn.
        from: String,
    },
}

impl DataError {
    pub(super) fn at(path: &Path, fault: Fault) -> Self {
        DataError::Place { path: path.to_owned(), at: fault.at, message: fault.message, skippable: !fault.fatal }
    }
}

/// The tokens that stand between a vocabulary and the task's own tokens, and how they are taken away.
fn taken(behind: &[String]) -> String {
    match behind {
        [] => String::new(),
        _ => format!(
            "; {} stand behind its vocabulary and take rows before the task's tokens: where the model has no row for them, \
             leave them out of the tokenizer's settings, or name tokens there that the vocabulary has",
            behind.join(", ")
        ),
    }
}

/// ` (did you mean …?)` when one of the candidates is close to what was found, else nothing.
pub(crate) fn did_you_mean<'a>(found: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    // No name is longer, and comparing takes memory for each pair of letters.
    const LONGEST: usize = 100;
    candidates
        .into_iter()
        .filter(|c| found.len().max(c.len()) <= LONGEST)
        .map(|c| (strsim::damerau_levenshtein(&found.to_lowercase(), &c.to_lowercase()), c))
        .filter(|(distance, c)| *distance <= 1 + c.chars().count() / 4)
        .min()
        .map(|(_, c)| format!(" (did you mean `{c}`?)"))
        .unwrap_or_default()
}
