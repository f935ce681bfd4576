//! What a file of data holds, as far as it can be told without a task.

use std::collections::HashSet;
use std::path::Path;

use peft_grammar::model::Columns;

use super::classification::{LABEL, TEXT, is_header, listed};
use super::rows::{Cell, File, Format, Row, Rows};
use super::{DataError, classification};
use crate::hub::chat::Conversation;

/// A form of data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// Texts, or pairs of them, with the names of their classes: all that occur, in the order of numbers or of the
    /// alphabet. A column of a usual name is not said.
    Labelled { columns: Columns, labels: Vec<String> },
    /// WebNLG's records.
    Records,
    /// Conversations. Where a row has columns of text in place of a list of messages, those, what the assistant says last.
    Conversations(Vec<String>),
    /// Columns of text; what stands in the last one is to be written.
    Texts(Vec<String>),
    /// Texts as they stand.
    Plain,
}

/// More classes than these are a mistake about which column is what.
const MOST: usize = 200;

/// Columns of pairs, as the common sets call them.
const PAIRS: [[&str; 2]; 7] = [
    ["premise", "hypothesis"],
    ["sentence1", "sentence2"],
    ["text_a", "text_b"],
    ["text1", "text2"],
    ["question1", "question2"],
    ["question", "sentence"],
    ["query", "passage"],
];

/// Other names of a label's column.
const CLASS: [&str; 4] = ["gold_label", "class", "category", "sentiment"];

/// Columns whose text is to be written, what stands before it in other columns.
const WRITTEN: [&str; 9] =
    ["completion", "response", "output", "answer", "target", "summary", "chosen", "reply", "translation"];

/// The form of a file.
pub fn form(path: &Path) -> Result<Form, DataError> {
    let file = File::open(path)?;
    let at = |fault| DataError::at(path, fault);
    if file.is_plain_text() {
        return Ok(Form::Plain);
    }
    let mut rows =
        Rows::of(&file, Format::Tsv, Some(classification::IMPLIED), |names| is_header(names, &[])).map_err(at)?;
    if rows.entries {
        return Ok(Form::Records);
    }
    let Some(first) = rows.next() else {
        return Err(DataError::Empty { path: path.to_owned(), message: "it has no row".into() });
    };
    let first = first.map_err(at)?;
    let names = first.names();
    let Some((columns, label)) = columns(&names) else {
        let texts = texts(&first);
        let written = texts.iter().position(|name| WRITTEN.iter().any(|w| w.eq_ignore_ascii_case(name)));
        let conversation = Conversation::of(&first.json()).is_ok();
        let Some(written) = written else {
            if conversation {
                return Ok(Form::Conversations(vec![]));
            }
            if texts.len() == 1 && names.iter().any(|name| TEXT.contains(name)) {
                return Ok(Form::Plain);
            }
            let message = format!(
                "which of its columns is what cannot be told by their names, {}; write the task yourself: `text` and \
                 `label` of a classification, or `template` and `target` of a generation",
                listed(&names)
            );
            return Err(DataError::Empty { path: path.to_owned(), message });
        };
        let mut texts = texts;
        let last = texts.remove(written);
        texts.push(last);
        return Ok(if conversation { Form::Conversations(texts) } else { Form::Texts(texts) });
    };
    let (mut labels, mut seen) = (vec![], HashSet::new());
    let label = label.to_owned();
    for row in std::iter::once(Ok(first.clone())).chain(rows) {
        let row = row.map_err(at)?;
        // A row without a label is refused where the data are read for training, with words of its own.
        if let Some(name) = row.get(&label).and_then(Cell::text).map(str::trim)
            && seen.insert(name.to_owned())
        {
            labels.push(name.to_owned());
        }
    }
    if labels.len() > MOST {
        let message = format!("{} labels: is the column `{label}` the class?", labels.len());
        return Err(DataError::Empty { path: path.to_owned(), message });
    }
    match labels.iter().all(|label| label.parse::<u64>().is_ok()) {
        true => labels.sort_by_key(|label| label.parse::<u64>().unwrap_or(0)),
        false => labels.sort(),
    }
    Ok(Form::Labelled { columns, labels })
}

/// The columns of a classification, and the label's name.
fn columns<'n>(names: &[&'n str]) -> Option<(Columns, &'n str)> {
    let find = |usual: &[&str]| {
        let mut found = names.iter().filter(|name| usual.iter().any(|u| u.eq_ignore_ascii_case(name)));
        found.next().copied().filter(|_| found.next().is_none())
    };
    let usual = find(LABEL);
    let label = usual.or_else(|| find(&CLASS))?;
    let own = usual.is_none().then(|| label.to_owned());
    if let Some([text, pair]) = PAIRS.iter().find_map(|pair| Some([find(&pair[..1])?, find(&pair[1..])?])) {
        return Some((Columns { text: Some(text.into()), pair: Some(pair.into()), label: own }, label));
    }
    find(TEXT).map(|_| (Columns { text: None, pair: None, label: own }, label))
}

/// The columns that hold text.
fn texts(row: &Row) -> Vec<String> {
    let text = |name: &&str| row.get(name).is_some_and(|cell| cell.kind() == "text");
    row.names().into_iter().filter(text).map(str::to_owned).collect()
}
