//! WebNLG's entries: sets of triples, each with texts that verbalise them. Each text marked `good` is a row. This
//! module reads JSON, and [`xml`] reads XML.

mod xml;

use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::rows::{FileRows, Format, Location, Row, Value, describe_error};
use super::{DataError, LeftOut};

/// A JSON object. Serde alone would also accept a list for a struct, with one item for each field.
struct Object<T>(T);

/// The description of an expected object, for a message.
trait Expected {
    const WHAT: &str;
}

impl<'de, T: Deserialize<'de> + Expected> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct One<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de> + Expected> Visitor<'de> for One<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str(T::WHAT)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        from.deserialize_map(One(PhantomData))
    }
}

impl Expected for File {
    const WHAT: &str = "an object with `entries`";
}

impl Expected for Entry {
    const WHAT: &str = "an object with `lexicalisations` and `modifiedtripleset`";
}

impl Expected for Lexicalisation {
    const WHAT: &str = "an object with `comment` and `lex`";
}

impl Expected for Triple {
    const WHAT: &str = "an object with `subject`, `property` and `object`";
}

#[derive(Deserialize)]
struct File {
    /// Each item is an object with a single key, which is the entry's number.
    entries: Vec<Numbered>,
}

/// Entries with their numbers. If a number recurs, each of its entries is read.
struct Numbered(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Numbered {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Numbered;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of an entry by its number")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Numbered, A::Error> {
                let mut all = vec![];
                while let Some((number, Object(entry))) = map.next_entry()? {
                    all.push((number, entry));
                }
                Ok(Numbered(all))
            }
        }
        from.deserialize_map(All)
    }
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    category: String,
    lexicalisations: Vec<Object<Lexicalisation>>,
    modifiedtripleset: Vec<Object<Triple>>,
}

#[derive(Deserialize)]
struct Lexicalisation {
    comment: String,
    lex: String,
}

#[derive(Deserialize)]
struct Triple {
    subject: String,
    property: String,
    object: String,
}

/// The fields of an entry and of a triple, as a template names them.
pub const RECORD: &[&str] = &["category", "text"];
pub const TRIPLE: &[&str] = &["subject", "property", "object"];
/// The column that holds the triples.
pub const TRIPLES: &str = "modifiedtripleset";

/// The rows of a document, one for each text marked `good`.
pub fn rows<'f>(text: &str, format: Format, path: &Path) -> Result<FileRows<'f>, DataError> {
    let entries = match format {
        Format::Xml => xml::parse(text).map_err(|fault| DataError::at(path, fault))?,
        _ => parse(text, path)?,
    };
    check(&entries, path)?;
    let mut rows = vec![];
    for (at, entry) in &entries {
        let triples = Value::List(entry.modifiedtripleset.iter().map(|Object(triple)| triple.value()).collect());
        for text in good(entry) {
            let fields = vec![
                ("category".into(), Value::Text(entry.category.clone())),
                ("text".into(), Value::Text(text.into())),
                (TRIPLES.into(), triples.clone()),
            ];
            rows.push(Row::of(at.clone(), fields));
        }
    }
    if rows.is_empty() {
        let message = "no entry has a lexicalisation whose `comment` is `good`".into();
        return Err(DataError::Empty { path: path.to_owned(), message });
    }
    let all = || entries.iter().map(|(_, entry)| entry.lexicalisations.len());
    let left_out =
        LeftOut { texts: all().sum::<usize>() - rows.len(), entries: all().filter(|&n| n == 0).count(), header: false };
    let mut rows = FileRows::new(rows.into_iter().map(Ok));
    rows.left_out = left_out;
    Ok(rows)
}

impl Triple {
    fn value(&self) -> Value {
        let fields = [("subject", &self.subject), ("property", &self.property), ("object", &self.object)];
        Value::Object(fields.map(|(name, text)| (name.to_owned(), Value::Text(text.clone()))).to_vec())
    }
}

fn good(entry: &Entry) -> impl Iterator<Item = &str> {
    entry.lexicalisations.iter().map(|Object(l)| l).filter(|l| l.comment == "good").map(|l| l.lex.as_str())
}

/// The entries with their numbers.
fn parse(text: &str, path: &Path) -> Result<Vec<(Location, Entry)>, DataError> {
    let Object(file) = serde_json::from_str::<Object<File>>(text).map_err(|error| {
        let at = Location::Column { line: error.line(), column: error.column() };
        DataError::Webnlg { path: path.to_owned(), at, message: describe_error(&error) }
    })?;
    let entries = file.entries.into_iter().flat_map(|numbered| numbered.0);
    Ok(entries.map(|(number, entry)| (Location::Entry(number.into()), entry)).collect())
}

/// Refuses entries without triples or with an empty text.
fn check(entries: &[(Location, Entry)], path: &Path) -> Result<(), DataError> {
    for (at, entry) in entries {
        let fault = |message: &str| {
            let at = at.clone();
            Err(DataError::Place { path: path.to_owned(), at, message: message.into(), skippable: false })
        };
        if entry.modifiedtripleset.is_empty() {
            return fault("its `modifiedtripleset` is empty; it needs a triple");
        }
        if good(entry).any(|text| text.trim().is_empty()) {
            return fault("a lexicalisation's `lex` is empty; write its text or remove it");
        }
    }
    Ok(())
}
