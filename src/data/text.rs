//! Plain texts for continued pretraining: every token but the first is predicted. A text longer than `task.max_tokens`
//! is split into several examples. Each begins with the last token of the one before, so that every token but the first
//! is a target exactly once.

use super::labelled::{known, no_column, usual_column};
use super::rows::{Fault, File, FileRows, Format, Location, Row};
use super::{DataError, Example, ExampleBuilder, Goal, LocatedExample, Tokenizer};

/// Usual names of the text column, compared without case.
const USUAL: &[&str] = &["text", "content", "document"];
/// The name of the implied column of a file that is one text.
const IMPLIED: &str = "text";

/// Builds examples of plain texts.
pub struct Texts<'t> {
    /// The column. If the task does not name it, it is the column with a usual name.
    pub column: Option<&'t str>,
    /// The token that ends a text.
    pub end: Option<i32>,
    pub max_tokens: usize,
    pub tokenizer: &'t Tokenizer,
}

/// The column with a usual name, if there is exactly one.
pub(super) fn usual<'n>(names: &[&'n str]) -> Option<&'n str> {
    usual_column(names, USUAL, "text").ok()
}

impl ExampleBuilder for Texts<'_> {
    type Draft = String;

    /// A file that is neither JSON nor a table is one text.
    fn open<'f>(&self, file: &'f File) -> Result<FileRows<'f>, DataError> {
        let at = |fault| DataError::at(&file.path, fault);
        if file.is_plain_text() {
            let text = file.text().map_err(at)?;
            let field = (IMPLIED.to_owned(), super::rows::Value::Text(text.to_owned()));
            let some = (!text.trim().is_empty()).then(|| Ok(Row::of(Location::Line(1), vec![field])));
            return Ok(FileRows::new(some.into_iter()));
        }
        let rows = FileRows::of(file, Format::Json, None, |_| true).map_err(at)?;
        let why = "its `entries` are triples and texts, as WebNLG has them, and this task takes texts alone";
        rows.without_entries(&file.path, why)
    }

    fn check(&self, names: &[&str]) -> Result<(), String> {
        match self.column {
            Some(column) => known(column, names),
            None => usual_column(names, USUAL, "text").map(drop),
        }
    }

    fn draft(&self, row: &Row, _: bool) -> Result<String, String> {
        let names = row.names();
        let name = match self.column {
            Some(column) => column,
            None => usual_column(&names, USUAL, "text")?,
        };
        let Some(cell) = row.get(name) else { return Err(no_column(name, &names)) };
        match cell.text() {
            Some(text) if text.trim().is_empty() => Err(format!("`{name}` is empty")),
            Some(text) => Ok(text.to_owned()),
            None => Err(format!("`{name}` is {}; it must be text", cell.kind())),
        }
    }

    fn encode(&self, drafts: Vec<(Location, String)>) -> Result<Vec<Result<Vec<LocatedExample>, Fault>>, DataError> {
        let texts = drafts.iter().map(|(_, text)| text.as_str()).collect();
        let encoded = self.tokenizer.encode(texts, false)?;
        let one = |(mut ids, (at, _)): (Vec<i32>, (Location, String))| {
            ids.extend(self.end);
            if ids.len() < 2 {
                return Err(Fault::row(at, "the text has a single token, and there is none to predict"));
            }
            let step = self.max_tokens.max(2) - 1;
            let examples = (0..ids.len() - 1).step_by(step).map(|start| {
                let ids = ids[start..(start + step + 1).min(ids.len())].to_vec();
                let example = Example { types: vec![0; ids.len()], goal: Goal::after(0, ids.len()), ids };
                LocatedExample { at: at.clone(), length: example.ids.len(), example }
            });
            Ok(examples.collect())
        };
        Ok(encoded.into_iter().zip(drafts).map(one).collect())
    }

    fn empty(&self) -> &'static str {
        "it has no text"
    }
}
