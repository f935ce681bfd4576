//! Parses JSON documents: a list of objects, an object that holds one, an object of objects, or one object per line.

use std::ops::Range;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::delimited::line;
use super::value::Object;
use super::{Fault, Location, Row};

/// Serde's message in JSON's terms, without the position.
pub fn describe_error(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or_default();
    let types = message.strip_prefix("invalid type: ").and_then(|rest| rest.split_once(", expected "));
    let Some((found, expected)) = types else { return cut(message) };
    // Serde quotes a string in full, which may be arbitrarily long.
    let found = if found.starts_with("string ") { "a text" } else { found };
    let word = |name: &str| match name {
        "sequence" | "a sequence" => "a list".to_owned(),
        "map" => "an object".to_owned(),
        other => other.to_owned(),
    };
    format!("{} where {} is expected", word(found), word(expected))
}

/// The first 200 characters of a message, which may quote the user's file.
fn cut(message: &str) -> String {
    match message.char_indices().nth(200) {
        Some((at, _)) => format!("{}…", &message[..at]),
        None => message.to_owned(),
    }
}

/// A position in a document.
#[derive(Clone, Copy)]
struct Cursor<'f> {
    text: &'f str,
    at: usize,
    /// The line number at offset `counted`, so that each line is counted only once.
    line: usize,
    counted: usize,
}

impl<'f> Cursor<'f> {
    fn new(text: &'f str, at: usize) -> Self {
        Cursor { text, at, line: 1, counted: 0 }
    }

    /// The offset of the first character that is not whitespace.
    fn first(mut self) -> usize {
        self.peek();
        self.at
    }

    /// The next character that is not whitespace.
    fn peek(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.at..];
        self.at += rest.iter().position(|b| !b.is_ascii_whitespace()).unwrap_or(rest.len());
        self.text.as_bytes().get(self.at).copied()
    }

    fn line(&mut self) -> usize {
        self.line += self.text.as_bytes()[self.counted..self.at].iter().filter(|&&b| b == b'\n').count();
        self.counted = self.at;
        self.line
    }

    fn here(&mut self) -> Location {
        let column = self.text[..self.at].rfind('\n').map_or(self.at, |end| self.at - end - 1) + 1;
        Location::Column { line: self.line(), column }
    }

    /// Parses a value and moves behind it.
    fn value<T: Deserialize<'f>>(&mut self) -> Result<T, Fault> {
        self.peek();
        let mut values = serde_json::Deserializer::from_str(&self.text[self.at..]).into_iter::<T>();
        match values.next() {
            Some(Ok(value)) => {
                self.at += values.byte_offset();
                Ok(value)
            }
            Some(Err(error)) => {
                let Location::Column { line, column } = self.here() else { unreachable!("a place in a document") };
                let column = if error.line() == 1 { column - 1 } else { 0 } + error.column();
                let at = Location::Column { line: line + error.line().saturating_sub(1), column };
                let whole = if error.is_eof() { "; is the file complete?" } else { "" };
                Err(Fault::fatal(at, describe_error(&error) + whole))
            }
            None => Err(Fault::fatal(self.here(), "the file ends where a value is expected; is it complete?")),
        }
    }

    /// Consumes `,` (true) or the end of the list or object (false).
    fn more(&mut self, end: u8) -> Result<bool, Fault> {
        let next = self.peek();
        if next != Some(b',') && next != Some(end) {
            let found = next.map_or("the file ends".into(), |_| {
                format!("`{}` stands", self.text[self.at..].chars().next().unwrap_or_default())
            });
            let message = format!("{found} where `,` or `{}` is expected", end as char);
            return Err(Fault::fatal(self.here(), message));
        }
        self.at += 1;
        Ok(next == Some(b','))
    }
}

/// The rows of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The objects of the list that begins at this offset.
    List(usize),
    /// The values of an object, which are all objects, with their keys and byte ranges.
    Objects(Vec<(String, Range<usize>)>),
    /// The document is one object, which is the only row.
    Single,
    /// The document is an object followed by further objects.
    Lines,
    /// The document is an object with `entries`, as WebNLG's files are.
    Entries,
}

impl Layout {
    /// Determines the rows of a document.
    pub fn of(text: &str) -> Result<Self, Fault> {
        let mut cursor = Cursor::new(text, 0);
        match cursor.peek() {
            None => return Ok(Layout::List(text.len())),
            Some(b'[') => return Ok(Layout::List(cursor.at)),
            Some(b'{') => {}
            Some(_) => {
                let message = "not JSON: it begins with neither `[` nor `{`";
                return Err(Fault::fatal(cursor.here(), message));
            }
        }
        cursor.at += 1;
        let mut fields: Vec<(String, Range<usize>)> = vec![];
        let mut go_on = cursor.peek() != Some(b'}');
        if !go_on {
            cursor.at += 1;
        }
        while go_on {
            let name: String = cursor.value()?;
            if name == "entries" {
                return Ok(Layout::Entries);
            }
            if cursor.peek() != Some(b':') {
                return Err(Fault::fatal(cursor.here(), format!("no `:` follows the key `{name}`")));
            }
            cursor.at += 1;
            cursor.peek();
            let start = cursor.at;
            cursor.value::<IgnoredAny>()?;
            fields.push((name, start..cursor.at));
            go_on = cursor.more(b'}')?;
        }
        if cursor.peek() == Some(b'{') {
            return Ok(Layout::Lines);
        }
        if cursor.peek().is_some() {
            return Err(Fault::fatal(cursor.here(), "something follows the end of the document"));
        }
        let begins = |range: &Range<usize>, with: &str| text[range.clone()].starts_with(with);
        if !fields.is_empty() && fields.iter().all(|(_, range)| begins(range, "{")) {
            return Ok(Layout::Objects(fields));
        }
        let of_objects = |range: &&Range<usize>| {
            begins(range, "[") && text[range.start + 1..range.end].trim_start().starts_with('{')
        };
        let lists: Vec<&(String, Range<usize>)> = fields.iter().filter(|(_, range)| of_objects(&range)).collect();
        match lists[..] {
            [] => Ok(Layout::Single),
            [(_, range)] => Ok(Layout::List(range.start)),
            _ => match lists.iter().find(|(name, _)| name == "data") {
                Some((_, range)) => Ok(Layout::List(range.start)),
                None => {
                    let names: Vec<&str> = lists.iter().map(|(name, _)| name.as_str()).collect();
                    let message = format!(
                        "an object with several lists of objects, `{}`; write the one to read as a file of its own",
                        names.join("`, `")
                    );
                    Err(Fault::fatal(Location::Line(1), message))
                }
            },
        }
    }
}

/// Iterates over the objects of a list.
pub struct List<'f> {
    cursor: Cursor<'f>,
    number: usize,
    go_on: bool,
    /// The list is the whole document, and its end has not been checked yet.
    document: bool,
}

impl<'f> List<'f> {
    /// Iterates over the list that begins at `start`.
    pub fn new(text: &'f str, start: usize) -> Self {
        let first = Cursor::new(text, 0).first();
        let mut cursor = Cursor::new(text, start);
        let some = cursor.peek().is_some();
        cursor.at += usize::from(some);
        let go_on = some && cursor.peek() != Some(b']');
        cursor.at += usize::from(some && !go_on);
        List { cursor, number: 0, go_on, document: start == first }
    }

    fn row(&mut self) -> Result<Row<'f>, Fault> {
        self.cursor.peek();
        self.number += 1;
        let at = Location::Item { number: self.number, line: self.cursor.line() };
        if self.cursor.peek() != Some(b'{') {
            // A value that is not an object is a single invalid row.
            let found: super::Value = self.cursor.value()?;
            self.go_on = self.cursor.more(b']')?;
            return Err(Fault::row(at, format!("{} where an object of columns is expected", found.kind())));
        }
        let Object(fields) = self.cursor.value()?;
        self.go_on = self.cursor.more(b']')?;
        Ok(Row::of(at, fields))
    }

    /// Checks that nothing follows a list that is the whole document.
    fn end(&mut self) -> Option<Fault> {
        let last = std::mem::take(&mut self.document);
        if !last || self.cursor.peek().is_none() {
            return None;
        }
        let message = "something follows the list's end; write one list, or one object per line";
        Some(Fault::fatal(self.cursor.here(), message))
    }
}

impl<'f> Iterator for List<'f> {
    type Item = Result<Row<'f>, Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        if !self.go_on {
            return self.end().map(Err);
        }
        let row = self.row();
        let fatal = matches!(&row, Err(fault) if fault.fatal);
        self.go_on &= !fatal;
        self.document &= !fatal;
        Some(row)
    }
}

/// Parses the row in a byte range of a document.
pub fn object<'f>(text: &'f str, at: Location, range: Range<usize>) -> Result<Row<'f>, Fault> {
    match serde_json::from_str::<Object>(&text[range]) {
        Ok(Object(fields)) => Ok(Row::of(at, fields)),
        Err(error) => Err(Fault::row(at, describe_error(&error))),
    }
}

/// Iterates over the lines of a file with one object per line.
pub struct Lines<'f> {
    bytes: &'f [u8],
    at: usize,
    line: usize,
}

impl<'f> Lines<'f> {
    pub fn new(bytes: &'f [u8]) -> Self {
        Lines { bytes, at: 0, line: 0 }
    }
}

impl<'f> Iterator for Lines<'f> {
    type Item = Result<Row<'f>, Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let rest = &self.bytes[self.at..];
            if rest.is_empty() {
                return None;
            }
            let (text, next) = line(rest);
            self.at += next;
            self.line += 1;
            if text.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let at = Location::Line(self.line);
            let Ok(text) = std::str::from_utf8(text) else {
                return Some(Err(Fault::row(at, "not UTF-8; save the file in that encoding")));
            };
            return Some(match serde_json::from_str::<Object>(text) {
                Ok(Object(fields)) => Ok(Row::of(at, fields)),
                Err(error) if error.is_data() => Err(Fault::row(at, describe_error(&error))),
                Err(error) => {
                    let message = format!(
                        "not JSON, {} at column {}; write one object per line",
                        describe_error(&error),
                        error.column()
                    );
                    Err(Fault::row(at, message))
                }
            });
        }
    }
}
