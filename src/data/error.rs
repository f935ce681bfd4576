//! Errors of data sets and tokenizers. Each message names the file, the place in it and the remedy.

use std::io;
use std::path::{Path, PathBuf};

use super::rows::{Fault, Location};

/// An error of a data set or of a tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("cannot read `{path}`: {source}")]
    Read { path: PathBuf, source: io::Error },

    #[error("`{path}` is {what}, which is not read here; {mend}")]
    Foreign { path: PathBuf, what: &'static str, mend: &'static str },

    #[error("`{path}`, compressed by {by}, cannot be unpacked: {message}")]
    Packed { path: PathBuf, by: &'static str, message: String },

    /// An argument of `--data` does not name a readable file.
    #[error("`{path}`: {message}")]
    Named { path: PathBuf, message: String },

    /// An error in a row, or at a location in a file.
    #[error("`{path}`, {at}: {message}")]
    Place {
        path: PathBuf,
        at: Location,
        message: String,
        /// The error concerns a single row, which can be skipped.
        skippable: bool,
    },

    #[error(
        "`{path}`, {at}: {message}\n\
         a WebNLG file is {{\"entries\": [{{\"1\": {{\"lexicalisations\": [{{\"comment\", \"lex\"}}], \
         \"modifiedtripleset\": [{{\"subject\", \"property\", \"object\"}}]}}}}]}}"
    )]
    Webnlg { path: PathBuf, at: Location, message: String },

    /// Every row was skipped as a bad one.
    #[error("no row is left: all {count} are bad; the first: {first}")]
    AllBad { count: usize, first: String },

    #[error("`{path}` holds no example: {message}")]
    Empty { path: PathBuf, message: String },

    #[error("the task's template: {0}")]
    Template(String),

    #[error("no tokenizer in `{path}`: {message}")]
    NoTokenizer { path: PathBuf, message: String },

    /// A configuration file next to the tokenizer's vocabulary is wrong.
    #[error("`{path}`: {message}")]
    Settings { path: PathBuf, message: String },

    #[error("`{path}` cannot be used as a tokenizer: {message}")]
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
        /// Added tokens that follow the vocabulary, as [`crate::hub::tokenizer::AddedToken::describe`] shows them.
        behind: Vec<String>,
    },

    /// After truncation no example has a prediction target left.
    #[error(
        "`{path}`: no example is left: `task.max_tokens` is {limit}, and the cut to it leaves {left} in any of the \
         {count} examples; the first, {place}, has {length} tokens{from}; raise `task.max_tokens` to {length}, or leave such examples out"
    )]
    TooLong {
        path: PathBuf,
        count: usize,
        limit: usize,
        /// What is missing after the truncation: a target or a sentence.
        left: &'static str,
        place: String,
        length: usize,
        /// The number of the first target, as a clause of the message.
        from: String,
    },
}

impl DataError {
    pub(super) fn at(path: &Path, fault: Fault) -> Self {
        DataError::Place { path: path.to_owned(), at: fault.at, message: fault.message, skippable: !fault.fatal }
    }
}

/// A clause that names the added tokens between the vocabulary and the task's own tokens, and how to remove them.
fn taken(behind: &[String]) -> String {
    match behind {
        [] => String::new(),
        _ => format!(
            "; {} follow its vocabulary and take rows before the task's tokens: if the model has no row for them, \
             remove them from the tokenizer's settings, or name tokens there that the vocabulary has",
            behind.join(", ")
        ),
    }
}

/// Returns ` (did you mean …?)` if a candidate is close to `found` in Damerau-Levenshtein distance, else an empty
/// string.
pub(crate) fn did_you_mean<'a>(found: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    // No valid name is longer than this, and the comparison takes memory quadratic in the length.
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
