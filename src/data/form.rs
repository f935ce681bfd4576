//! What a file of data holds, as far as it can be told without a task.

use std::path::Path;

use super::{DataError, read_text, tsv};

/// A form of data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// Sentences with the names of their classes: all that occur, in the order of numbers or of the alphabet.
    Labelled(Vec<String>),
    /// WebNLG's records.
    Records,
}

/// More classes than these are a mistake about which column is what.
const MOST: usize = 200;

/// The form of a file.
pub fn form(path: &Path) -> Result<Form, DataError> {
    let text = read_text(path)?;
    if text.trim_start().starts_with('{') {
        return Ok(Form::Records);
    }
    let mut labels = tsv::labels(&text, path)?;
    if labels.len() > MOST {
        let message = format!("{} labels: is the second column the class?", labels.len());
        return Err(DataError::Empty { path: path.to_owned(), message });
    }
    let numbers: Option<Vec<u64>> = labels.iter().map(|label| label.parse().ok()).collect();
    match numbers {
        Some(_) => labels.sort_by_key(|label| label.parse::<u64>().unwrap_or(0)),
        None => labels.sort(),
    }
    Ok(Form::Labelled(labels))
}
