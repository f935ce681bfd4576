//! Parses csv and tsv. Fields of csv may be quoted as in RFC 4180. In tsv, as in GLUE's files, a quote is an ordinary
//! character.

use std::borrow::Cow;
use std::rc::Rc;

use super::{Cells, Fault, Location, Row};

/// The number of a record's first line, and its fields.
type Record<'f> = (usize, Vec<Cow<'f, str>>);

/// Parses a file record by record.
pub struct Delimited<'f> {
    bytes: &'f [u8],
    at: usize,
    /// The number of the line that begins at `at`.
    line: usize,
    comma: bool,
    names: Rc<[String]>,
    /// The line of the header, if the file has one.
    pub header: Option<usize>,
    /// A record that was parsed ahead to decide whether it is a header.
    ahead: Option<Record<'f>>,
    over: bool,
}

impl<'f> Delimited<'f> {
    /// `implied` names the columns of a file without a header, and `is_header` decides whether the first record is a
    /// header. If `implied` is `None` it always is.
    pub fn new(
        bytes: &'f [u8],
        comma: bool,
        implied: Option<&[&str]>,
        is_header: impl FnOnce(&[&str]) -> bool,
    ) -> Result<Self, Fault> {
        let names = implied.unwrap_or_default().iter().map(|name| name.to_string()).collect();
        let mut file = Delimited { bytes, at: 0, line: 1, comma, names, header: None, ahead: None, over: false };
        let first: Record = match file.record() {
            None => return Ok(file),
            Some(Err(fault)) if implied.is_some() && !fault.fatal => {
                // An invalid record is not a header, so it is parsed again as a row.
                (file.at, file.line) = (0, 1);
                return Ok(file);
            }
            Some(record) => record.map_err(|fault| Fault { fatal: true, ..fault })?,
        };
        let texts: Vec<&str> = first.1.iter().map(|text| text.trim()).collect();
        if implied.is_some() && !is_header(&texts) {
            file.ahead = Some(first);
            return Ok(file);
        }
        if let ([only], true) = (&texts[..], comma)
            && let Some(other) = [';', '\t', '|'].iter().find(|&&other| only.contains(other))
        {
            let message = format!(
                "one column, `{}`, that holds {other:?}: in a `.csv` columns are separated by commas; write it so, or as \
                 `.tsv` with tabs",
                shortened(only)
            );
            return Err(Fault::fatal(Location::Line(first.0), message));
        }
        file.names = texts.iter().map(|name| name.to_string()).collect();
        file.header = Some(first.0);
        Ok(file)
    }

    /// The column names.
    pub fn names(&self) -> Vec<&str> {
        self.names.iter().map(String::as_str).collect()
    }

    /// The next record that is not a blank line.
    fn record(&mut self) -> Option<Result<Record<'f>, Fault>> {
        if let Some(record) = self.ahead.take() {
            return Some(Ok(record));
        }
        loop {
            let rest = &self.bytes[self.at..];
            if rest.is_empty() {
                return None;
            }
            let (line, next) = line(rest);
            if !line.is_empty() {
                break;
            }
            self.at += next;
            self.line += 1;
        }
        let first = self.line;
        let record = match self.comma {
            true => self.quoted(),
            false => {
                let (line, next) = line(&self.bytes[self.at..]);
                self.at += next;
                self.line += 1;
                Ok(line.split(|&b| b == b'\t').map(Cow::Borrowed).collect())
            }
        };
        Some(record.and_then(|fields| {
            let texts: Option<Vec<_>> = fields.into_iter().map(text).collect();
            let not_utf8 = || Fault::row(Location::Line(first), "not UTF-8; save the file in that encoding");
            texts.map(|texts| (first, texts)).ok_or_else(not_utf8)
        }))
    }

    /// Parses a csv record, which may span several lines.
    fn quoted(&mut self) -> Result<Vec<Cow<'f, [u8]>>, Fault> {
        let mut fields = vec![];
        loop {
            let rest = &self.bytes[self.at..];
            if rest.first() != Some(&b'"') {
                let end = rest.iter().position(|b| matches!(b, b',' | b'\n')).unwrap_or(rest.len());
                let mut field = &rest[..end];
                if rest.get(end) == Some(&b'\n') || end == rest.len() {
                    field = field.strip_suffix(b"\r").unwrap_or(field);
                }
                fields.push(Cow::Borrowed(field));
                self.at += end;
            } else {
                fields.push(self.quotation()?);
            }
            let rest = &self.bytes[self.at..];
            match rest {
                [b',', ..] => self.at += 1,
                [b'\n', ..] | [b'\r', b'\n', ..] => {
                    self.at += if rest[0] == b'\n' { 1 } else { 2 };
                    self.line += 1;
                    return Ok(fields);
                }
                [] | [b'\r'] => {
                    self.at = self.bytes.len();
                    return Ok(fields);
                }
                _ => {
                    let message =
                        "text follows a closing quote; a quote inside a quoted field is written twice, `\"\"`";
                    return Err(Fault::fatal(Location::Line(self.line), message));
                }
            }
        }
    }

    /// Parses a quoted field, in which `""` stands for a quote.
    fn quotation(&mut self) -> Result<Cow<'f, [u8]>, Fault> {
        let opened = self.line;
        self.at += 1;
        let mut parts = vec![];
        loop {
            let rest = &self.bytes[self.at..];
            let Some(end) = rest.iter().position(|&b| b == b'"') else {
                let message =
                    "the quote that opens here is never closed; close it, or write it twice, `\"\"`, inside quotes";
                return Err(Fault::fatal(Location::Line(opened), message));
            };
            self.line += rest[..end].iter().filter(|&&b| b == b'\n').count();
            let doubled = rest.get(end + 1) == Some(&b'"');
            self.at += end + 1 + usize::from(doubled);
            parts.push(&rest[..end + usize::from(doubled)]);
            if !doubled {
                break;
            }
        }
        Ok(match parts[..] {
            [only] => Cow::Borrowed(only),
            _ => Cow::Owned(parts.concat()),
        })
    }

    /// The error for a record whose number of fields is not the number of columns.
    fn ragged(&self, texts: &[Cow<str>]) -> String {
        let count = texts.len();
        match (self.header.is_some(), texts) {
            (true, _) => {
                let names = self.names.len();
                let quotes = match self.comma && count > names {
                    true => "; a field that holds a comma is written in double quotes",
                    false => "",
                };
                format!("{}, {}, where the header has {names}{quotes}", columns(count), shown(texts))
            }
            (false, [_]) => format!("no tab; write `{}`", self.names.join("<TAB>")),
            (false, _) => {
                format!("{count} columns, {}; write `{}` with one tab", shown(texts), self.names.join("<TAB>"))
            }
        }
    }
}

impl<'f> Iterator for Delimited<'f> {
    type Item = Result<Row<'f>, Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let row = self.record()?.and_then(|(line, texts)| {
            let at = Location::Line(line);
            match texts.len() == self.names.len() {
                true => Ok(Row { at, cells: Cells::Texts(self.names.clone(), texts) }),
                false => Err(Fault::row(at, self.ragged(&texts))),
            }
        });
        self.over = matches!(&row, Err(fault) if fault.fatal);
        Some(row)
    }
}

/// The first line without its line ending, and the offset of the next line.
pub(super) fn line(bytes: &[u8]) -> (&[u8], usize) {
    match bytes.iter().position(|&b| b == b'\n') {
        Some(end) => (bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]), end + 1),
        None => (bytes, bytes.len()),
    }
}

fn text(bytes: Cow<[u8]>) -> Option<Cow<str>> {
    match bytes {
        Cow::Borrowed(bytes) => std::str::from_utf8(bytes).ok().map(Cow::Borrowed),
        Cow::Owned(bytes) => String::from_utf8(bytes).ok().map(Cow::Owned),
    }
}

/// The first 20 characters of a text, for a message.
pub(crate) fn shortened(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(20) {
        Some((at, _)) => Cow::Owned(format!("{}…", &text[..at])),
        None => Cow::Borrowed(text),
    }
}

fn columns(count: usize) -> String {
    if count == 1 { "1 column".into() } else { format!("{count} columns") }
}

/// The first four fields for a message, each shortened.
fn shown(columns: &[Cow<str>]) -> String {
    let more = if columns.len() > 4 { ", …" } else { "" };
    let shown: Vec<String> = columns.iter().take(4).map(|column| format!("`{}`", shortened(column))).collect();
    shown.join(", ") + more
}
