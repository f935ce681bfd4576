//! Rows of people's own files: columns by name, with the place of each row.
//!
//! | file | rows | place |
//! | --- | --- | --- |
//! | json | the objects of a list, of an object's only list, or of an object that holds nothing but objects | [`At::Item`], [`At::Entry`] |
//! | jsonl | an object a line | [`At::Line`] |
//! | csv, tsv | records below a header | [`At::Line`] |
//! | parquet | rows | [`At::Row`] |
//! | xml | none: only WebNLG's entries are read from it |
//!
//! Each may be compressed by gzip or zstd. What a file is follows from its first bytes and its name's ending.

mod compressed;
mod delimited;
mod file;
mod json;
mod parquet;
mod value;

use std::borrow::Cow;
use std::fmt;
use std::path::Path;
use std::rc::Rc;

use super::{DataError, LeftOut};
use delimited::Delimited;
pub(super) use delimited::shortened;
pub use file::{File, Format, expand};
pub use json::in_words;
use json::{Layout, Lines, List};
pub use value::{Value, find};

/// Where a row is in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    Line(usize),
    /// An object of a JSON list, counted from 1, and the line on which it begins.
    Item {
        number: usize,
        line: usize,
    },
    /// A row of a file without lines, counted from 1.
    Row(usize),
    /// An object of JSON by its key.
    Entry(Box<str>),
    /// A place inside a JSON document.
    Column {
        line: usize,
        column: usize,
    },
    /// Items of a row's list, counted from 1.
    Part {
        of: Box<At>,
        first: usize,
        last: usize,
    },
}

impl At {
    /// The row that a part is of, or itself.
    pub fn row(&self) -> &At {
        match self {
            At::Part { of, .. } => of,
            row => row,
        }
    }

    /// From this item of a row to that one.
    pub fn through(&self, that: &At) -> At {
        match (self, that) {
            (At::Part { of, first, .. }, At::Part { last, .. }) => {
                At::Part { of: of.clone(), first: *first, last: *last }
            }
            _ => self.clone(),
        }
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            At::Line(line) => write!(f, "line {line}"),
            At::Item { number, line } => write!(f, "line {line}, row {number}"),
            At::Row(number) => write!(f, "row {number}"),
            At::Entry(key) => write!(f, "entry {key}"),
            At::Column { line, column } => write!(f, "line {line}, column {column}"),
            At::Part { of, first, last } if first == last => write!(f, "{of}, item {first}"),
            At::Part { of, first, last } => write!(f, "{of}, items {first} to {last}"),
        }
    }
}

/// What is wrong at a place of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub at: At,
    pub message: String,
    /// Nothing can be read behind it, or it is wrong with every row: it is no single row that could be left out.
    pub fatal: bool,
}

impl Fault {
    pub fn row(at: At, message: impl Into<String>) -> Self {
        Fault { at, message: message.into(), fatal: false }
    }

    pub fn fatal(at: At, message: impl Into<String>) -> Self {
        Fault { at, message: message.into(), fatal: true }
    }
}

/// A row: columns in the order of the file.
#[derive(Clone, Debug)]
pub struct Row<'f> {
    pub at: At,
    cells: Cells<'f>,
}

#[derive(Clone, Debug)]
enum Cells<'f> {
    /// Of a file with a header: its names, and one text each.
    Texts(Rc<[String]>, Vec<Cow<'f, str>>),
    Fields(Vec<(String, Value)>),
}

/// The value of a cell.
#[derive(Clone, Copy, Debug)]
pub enum Cell<'r> {
    Text(&'r str),
    Value(&'r Value),
}

impl<'r> Cell<'r> {
    /// It as text, if it is a scalar other than null.
    pub fn text(self) -> Option<&'r str> {
        match self {
            Cell::Text(text) => Some(text),
            Cell::Value(value) => value.text(),
        }
    }

    pub fn json(self) -> serde_json::Value {
        match self {
            Cell::Text(text) => text.into(),
            Cell::Value(value) => value.json(),
        }
    }

    /// What it is, for a message.
    pub fn kind(self) -> &'static str {
        match self {
            Cell::Text(_) => "text",
            Cell::Value(value) => value.kind(),
        }
    }
}

impl Row<'_> {
    pub fn of(at: At, fields: Vec<(String, Value)>) -> Self {
        Row { at, cells: Cells::Fields(fields) }
    }

    /// Its columns and their values, of a row of JSON.
    pub fn fields(&self) -> Option<&[(String, Value)]> {
        match &self.cells {
            Cells::Texts(..) => None,
            Cells::Fields(fields) => Some(fields),
        }
    }

    /// Bytes of its texts.
    pub fn size(&self) -> usize {
        match &self.cells {
            Cells::Texts(_, texts) => texts.iter().map(|text| text.len()).sum(),
            Cells::Fields(fields) => fields.iter().map(|(_, value)| value.size()).sum(),
        }
    }

    /// The names of its columns.
    pub fn names(&self) -> Vec<&str> {
        match &self.cells {
            Cells::Texts(names, _) => names.iter().map(String::as_str).collect(),
            Cells::Fields(fields) => fields.iter().map(|(name, _)| name.as_str()).collect(),
        }
    }

    /// The cell of a column. In JSON a dotted path leads into objects and lists: `answers.text.0`.
    pub fn get(&self, name: &str) -> Option<Cell<'_>> {
        match &self.cells {
            Cells::Texts(names, texts) => names.iter().position(|n| n == name).map(|i| Cell::Text(&texts[i])),
            Cells::Fields(fields) => find(fields, name).map(Cell::Value),
        }
    }

    /// Its columns as an object.
    pub fn json(&self) -> serde_json::Map<String, serde_json::Value> {
        let cell = |name: &&str| (name.to_string(), self.get(name).map_or(serde_json::Value::Null, Cell::json));
        self.names().iter().map(cell).collect()
    }

    /// Its columns that hold a list of nothing but objects.
    pub fn lists(&self) -> Vec<(&str, &[Value])> {
        let Cells::Fields(fields) = &self.cells else { return vec![] };
        let lists = fields.iter().filter_map(|(name, value)| match value {
            Value::List(items) => Some((name.as_str(), items.as_slice())),
            _ => None,
        });
        lists.filter(|(_, items)| items.iter().all(|item| matches!(item, Value::Object(_)))).collect()
    }
}

/// The rows of a file, good and bad.
pub struct Rows<'f> {
    rows: Box<dyn Iterator<Item = Result<Row<'f>, Fault>> + 'f>,
    /// The columns' names and the line where they stand, of a file that says them once.
    pub header: Option<(usize, Vec<String>)>,
    /// It is JSON with `entries`, as WebNLG's files are, or XML; it has no rows then.
    pub entries: bool,
    /// Its columns have the names that a file without a header has.
    pub implied: bool,
    /// What of the file makes no row.
    pub left_out: LeftOut,
}

impl<'f> Rows<'f> {
    /// Refuses a file of `entries`, which some tasks do not take: `why` says what they are.
    pub fn without_entries(self, path: &Path, why: &str) -> Result<Self, DataError> {
        if self.entries { Err(DataError::Empty { path: path.to_owned(), message: why.to_owned() }) } else { Ok(self) }
    }

    pub fn new(rows: impl Iterator<Item = Result<Row<'f>, Fault>> + 'f) -> Self {
        Rows { rows: Box::new(rows), header: None, entries: false, implied: false, left_out: LeftOut::default() }
    }

    /// The rows of a file; `unknown` is the format of one that does not tell. `implied` names the columns of a tsv without
    /// a header, and `is_header` says whether its first record is one.
    pub fn of(
        file: &'f File,
        unknown: Format,
        implied: Option<&[&str]>,
        is_header: impl FnOnce(&[&str]) -> bool,
    ) -> Result<Self, Fault> {
        let format = if file.format == Format::Unknown { unknown } else { file.format };
        match format {
            Format::JsonLines => Ok(Rows::new(Lines::new(&file.bytes))),
            Format::Json => Rows::json(file),
            Format::Parquet => Ok(Rows::new(parquet::rows(&file.bytes)?)),
            Format::Xml => Ok(Rows { entries: true, ..Rows::new(std::iter::empty()) }),
            Format::Csv => Ok(Rows::delimited(Delimited::new(&file.bytes, true, None, is_header)?, false)),
            Format::Tsv | Format::Unknown => {
                Ok(Rows::delimited(Delimited::new(&file.bytes, false, implied, is_header)?, implied.is_some()))
            }
        }
    }

    /// `guessed` says that the file might have had no header.
    fn delimited(file: Delimited<'f>, guessed: bool) -> Self {
        let header = file.header.map(|line| (line, file.names().into_iter().map(str::to_owned).collect()));
        let left_out = LeftOut { header: guessed && header.is_some(), ..LeftOut::default() };
        let implied = guessed && header.is_none();
        Rows { header, left_out, implied, ..Rows::new(file) }
    }

    fn json(file: &'f File) -> Result<Self, Fault> {
        // In lines a bad one leaves the others as they are.
        let text = file.text()?;
        Ok(match Layout::of(text)? {
            Layout::List(start) => Rows::new(List::new(text, start)),
            Layout::Lines => Rows::new(Lines::new(&file.bytes)),
            Layout::Single => Rows::new(std::iter::once(json::object(text, At::Line(1), 0..text.len()))),
            Layout::Objects(objects) => {
                Rows::new(objects.into_iter().map(move |(key, range)| json::object(text, At::Entry(key.into()), range)))
            }
            Layout::Entries => Rows { entries: true, ..Rows::new(std::iter::empty()) },
        })
    }
}

impl<'f> Iterator for Rows<'f> {
    type Item = Result<Row<'f>, Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        self.rows.next()
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // an example may well have one range of targets
mod tests;
