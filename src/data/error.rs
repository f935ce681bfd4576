//! What can be wrong with a data set or a tokenizer. Each message names the file, the place and the mend.

use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("cannot read `{path}`: {source}")]
    Read { path: PathBuf, source: io::Error },

    #[error("`{path}`, line {line}: {message}")]
    Line { path: PathBuf, line: usize, message: String },

    #[error(
        "`{path}`, line {line}, column {column}: {message}\n\
         a WebNLG file is {{\"entries\": [{{\"1\": {{\"lexicalisations\": [{{\"comment\", \"lex\"}}], \
         \"modifiedtripleset\": [{{\"subject\", \"property\", \"object\"}}]}}}}]}}"
    )]
    Json { path: PathBuf, line: usize, column: usize, message: String },

    /// A record of a JSON file: well-formed, but of no use.
    #[error("`{path}`, entry {entry}: {message}")]
    Entry { path: PathBuf, entry: String, message: String },

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
         but the spec's `vocab` is {wanted}",
        if *special > 0 { format!(" ({} with the task's {special} special ones)", found + special) } else { String::new() }
    )]
    Vocabulary { path: PathBuf, found: u64, special: u64, wanted: u64 },

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

/// ` (did you mean …?)` when one of the candidates is close to what was found, else nothing.
pub(super) fn did_you_mean<'a>(found: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    candidates
        .into_iter()
        .map(|c| (strsim::damerau_levenshtein(&found.to_lowercase(), &c.to_lowercase()), c))
        .filter(|(distance, c)| *distance <= 1 + c.chars().count() / 4)
        .min()
        .map(|(_, c)| format!(" (did you mean `{c}`?)"))
        .unwrap_or_default()
}
