//! Parses data files into rows: named columns, with the location of each row.
//!
//! | file | rows | location |
//! | --- | --- | --- |
//! | json | the objects of a list, of an object's only list, or of an object that holds nothing but objects | [`Location::Item`], [`Location::Entry`] |
//! | jsonl | an object a line | [`Location::Line`] |
//! | csv, tsv | records below a header | [`Location::Line`] |
//! | parquet | rows | [`Location::Row`] |
//! | xml | no rows: only WebNLG entries are read from XML |
//!
//! Each file may be compressed by gzip or zstd. The format follows from the first bytes and the file name's extension.

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
pub use json::describe_error;
use json::{Layout, Lines, List};
pub use value::{Value, find};

/// The location of a row in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    Line(usize),
    /// An object of a JSON list: its number, counted from 1, and the line on which it begins.
    Item {
        number: usize,
        line: usize,
    },
    /// A row of a file without lines, counted from 1.
    Row(usize),
    /// The value of a key of a JSON object.
    Entry(Box<str>),
    /// A position inside a JSON document.
    Column {
        line: usize,
        column: usize,
    },
    /// A range of items of a row's list, counted from 1.
    Part {
        of: Box<Location>,
        first: usize,
        last: usize,
    },
}

impl Location {
    /// The row that a range of items belongs to, or the location itself.
    pub fn row(&self) -> &Location {
        match self {
            Location::Part { of, .. } => of,
            row => row,
        }
    }

    /// The range from this item of a row to `that` item.
    pub fn through(&self, that: &Location) -> Location {
        match (self, that) {
            (Location::Part { of, first, .. }, Location::Part { last, .. }) => {
                Location::Part { of: of.clone(), first: *first, last: *last }
            }
            _ => self.clone(),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Location::Line(line) => write!(f, "line {line}"),
            Location::Item { number, line } => write!(f, "line {line}, row {number}"),
            Location::Row(number) => write!(f, "row {number}"),
            Location::Entry(key) => write!(f, "entry {key}"),
            Location::Column { line, column } => write!(f, "line {line}, column {column}"),
            Location::Part { of, first, last } if first == last => write!(f, "{of}, item {first}"),
            Location::Part { of, first, last } => write!(f, "{of}, items {first} to {last}"),
        }
    }
}

/// An error at a location of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub at: Location,
    pub message: String,
    /// The error is not limited to one row that could be skipped: nothing can be parsed after it, or it concerns every
    /// row.
    pub fatal: bool,
}

impl Fault {
    pub fn row(at: Location, message: impl Into<String>) -> Self {
        Fault { at, message: message.into(), fatal: false }
    }

    pub fn fatal(at: Location, message: impl Into<String>) -> Self {
        Fault { at, message: message.into(), fatal: true }
    }
}

/// A row: columns in the order of the file.
#[derive(Clone, Debug)]
pub struct Row<'f> {
    pub at: Location,
    cells: Cells<'f>,
}

#[derive(Clone, Debug)]
enum Cells<'f> {
    /// A row of a file with a header: the column names, and one text for each.
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
    /// The cell as text, if it is a scalar other than null.
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

    /// The kind of value, for a message.
    pub fn kind(self) -> &'static str {
        match self {
            Cell::Text(_) => "text",
            Cell::Value(value) => value.kind(),
        }
    }
}

impl Row<'_> {
    pub fn of(at: Location, fields: Vec<(String, Value)>) -> Self {
        Row { at, cells: Cells::Fields(fields) }
    }

    /// The columns and their values, if the row is a JSON object.
    pub fn fields(&self) -> Option<&[(String, Value)]> {
        match &self.cells {
            Cells::Texts(..) => None,
            Cells::Fields(fields) => Some(fields),
        }
    }

    /// The number of bytes of the row's texts.
    pub fn size(&self) -> usize {
        match &self.cells {
            Cells::Texts(_, texts) => texts.iter().map(|text| text.len()).sum(),
            Cells::Fields(fields) => fields.iter().map(|(_, value)| value.size()).sum(),
        }
    }

    /// The names of the columns.
    pub fn names(&self) -> Vec<&str> {
        match &self.cells {
            Cells::Texts(names, _) => names.iter().map(String::as_str).collect(),
            Cells::Fields(fields) => fields.iter().map(|(name, _)| name.as_str()).collect(),
        }
    }

    /// The cell of a column. In JSON a dotted path addresses nested objects and lists: `answers.text.0`.
    pub fn get(&self, name: &str) -> Option<Cell<'_>> {
        match &self.cells {
            Cells::Texts(names, texts) => names.iter().position(|n| n == name).map(|i| Cell::Text(&texts[i])),
            Cells::Fields(fields) => find(fields, name).map(Cell::Value),
        }
    }

    /// The columns as a JSON object.
    pub fn json(&self) -> serde_json::Map<String, serde_json::Value> {
        let cell = |name: &&str| (name.to_string(), self.get(name).map_or(serde_json::Value::Null, Cell::json));
        self.names().iter().map(cell).collect()
    }

    /// The columns that hold a list of objects.
    pub fn lists(&self) -> Vec<(&str, &[Value])> {
        let Cells::Fields(fields) = &self.cells else { return vec![] };
        let lists = fields.iter().filter_map(|(name, value)| match value {
            Value::List(items) => Some((name.as_str(), items.as_slice())),
            _ => None,
        });
        lists.filter(|(_, items)| items.iter().all(|item| matches!(item, Value::Object(_)))).collect()
    }
}

/// The rows of a file, valid and invalid ones.
pub struct FileRows<'f> {
    rows: Box<dyn Iterator<Item = Result<Row<'f>, Fault>> + 'f>,
    /// The line of the header and the column names, if the file has a header.
    pub header: Option<(usize, Vec<String>)>,
    /// The file is XML, or JSON with `entries` as WebNLG's files are. It has no rows then.
    pub entries: bool,
    /// The columns have the default names of a file without a header.
    pub implied: bool,
    /// The parts of the file that give no row by design.
    pub left_out: LeftOut,
}

impl<'f> FileRows<'f> {
    /// Refuses a file with `entries`. `why` is the message.
    pub fn without_entries(self, path: &Path, why: &str) -> Result<Self, DataError> {
        if self.entries { Err(DataError::Empty { path: path.to_owned(), message: why.to_owned() }) } else { Ok(self) }
    }

    pub fn new(rows: impl Iterator<Item = Result<Row<'f>, Fault>> + 'f) -> Self {
        FileRows { rows: Box::new(rows), header: None, entries: false, implied: false, left_out: LeftOut::default() }
    }

    /// The rows of a file. `unknown` is the format to assume if neither content nor name determine it. `implied` names
    /// the columns of a tsv file without a header, and `is_header` decides whether the first record is a header.
    pub fn of(
        file: &'f File,
        unknown: Format,
        implied: Option<&[&str]>,
        is_header: impl FnOnce(&[&str]) -> bool,
    ) -> Result<Self, Fault> {
        let format = if file.format == Format::Unknown { unknown } else { file.format };
        match format {
            Format::JsonLines => Ok(FileRows::new(Lines::new(&file.bytes))),
            Format::Json => FileRows::json(file),
            Format::Parquet => Ok(FileRows::new(parquet::rows(&file.bytes)?)),
            Format::Xml => Ok(FileRows { entries: true, ..FileRows::new(std::iter::empty()) }),
            Format::Csv => Ok(FileRows::delimited(Delimited::new(&file.bytes, true, None, is_header)?, false)),
            Format::Tsv | Format::Unknown => {
                Ok(FileRows::delimited(Delimited::new(&file.bytes, false, implied, is_header)?, implied.is_some()))
            }
        }
    }

    /// `guessed` tells that the file might have no header.
    fn delimited(file: Delimited<'f>, guessed: bool) -> Self {
        let header = file.header.map(|line| (line, file.names().into_iter().map(str::to_owned).collect()));
        let left_out = LeftOut { header: guessed && header.is_some(), ..LeftOut::default() };
        let implied = guessed && header.is_none();
        FileRows { header, left_out, implied, ..FileRows::new(file) }
    }

    fn json(file: &'f File) -> Result<Self, Fault> {
        // In JSON lines one invalid line does not affect the others, so the text is parsed as a whole only here.
        let text = file.text()?;
        Ok(match Layout::of(text)? {
            Layout::List(start) => FileRows::new(List::new(text, start)),
            Layout::Lines => FileRows::new(Lines::new(&file.bytes)),
            Layout::Single => FileRows::new(std::iter::once(json::object(text, Location::Line(1), 0..text.len()))),
            Layout::Objects(objects) => FileRows::new(
                objects.into_iter().map(move |(key, range)| json::object(text, Location::Entry(key.into()), range)),
            ),
            Layout::Entries => FileRows { entries: true, ..FileRows::new(std::iter::empty()) },
        })
    }
}

impl<'f> Iterator for FileRows<'f> {
    type Item = Result<Row<'f>, Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        self.rows.next()
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // an example may well have one range of targets
mod tests;
