//! WebNLG's JSON: sets of triples, each with texts that say them. One example for each text marked `good`.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

use peft_grammar::model::Piece;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::error::did_you_mean;
use super::{DataError, Example, Goal, LeftOut, Placed, Tokenizer};

/// An object of JSON. Serde by itself takes a list for a struct as well, its items for the fields in their order.
struct Object<T>(T);

/// What an object should be, for a message.
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
    /// Each a map of one key, the entry's number.
    entries: Vec<Numbered>,
}

/// Entries with their numbers. A number that recurs is read as often as it stands.
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

/// A place in a record's template.
enum Slot {
    Special(i32),
    /// The tokens of a text that stands in every example.
    Literal(Vec<i32>),
    Category,
    Text,
    Triples(Vec<TripleSlot>),
}

/// A place in what is repeated for each triple.
enum TripleSlot {
    Special(i32),
    Literal(Vec<i32>),
    Subject,
    Property,
    Object,
}

/// A task's template with its tokens and fields resolved.
pub struct Layout {
    before: Vec<Slot>,
    /// A special token, or a literal text: the loss is on what follows its last token.
    target: Slot,
    after: Vec<Slot>,
}

impl Layout {
    pub fn new(template: &[Piece], target: &str, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let resolve = |pieces: &[Piece]| pieces.iter().map(|p| record_slot(p, tokenizer)).collect::<Result<_, _>>();
        let Some(at) = template.iter().position(|p| p.written().as_deref() == Some(target)) else {
            return Err(DataError::Template(format!("its target `{target}` does not stand in it outside `( … )*`")));
        };
        let layout = Layout {
            before: resolve(&template[..at])?,
            target: record_slot(&template[at], tokenizer)?,
            after: resolve(&template[at + 1..])?,
        };
        if !layout.after.iter().any(|s| matches!(s, Slot::Text)) {
            return Err(DataError::Template(format!("`{{text}}` does not follow the target `{target}`")));
        }
        Ok(layout)
    }
}

fn special(token: &str, tokenizer: &Tokenizer) -> Result<i32, DataError> {
    let unknown = || DataError::Template(format!("`{token}` is not among the task's special tokens"));
    tokenizer.special(token).ok_or_else(unknown)
}

fn literal(text: &str, tokenizer: &Tokenizer) -> Result<Vec<i32>, DataError> {
    match tokenizer.encode(vec![text], false)?.pop() {
        Some(ids) if !ids.is_empty() => Ok(ids),
        _ => Err(DataError::Template(format!(
            "the tokenizer `{}` makes no token of its text {text:?}",
            tokenizer.source().display()
        ))),
    }
}

fn record_slot(piece: &Piece, tokenizer: &Tokenizer) -> Result<Slot, DataError> {
    match piece {
        Piece::Special(token) => Ok(Slot::Special(special(token, tokenizer)?)),
        Piece::Literal(text) => Ok(Slot::Literal(literal(text, tokenizer)?)),
        Piece::Field(name) => match name.as_str() {
            "category" => Ok(Slot::Category),
            "text" => Ok(Slot::Text),
            _ => Err(unknown_field("a record", name, &["category", "text"])),
        },
        Piece::Repeat(pieces) => {
            Ok(Slot::Triples(pieces.iter().map(|p| triple_slot(p, tokenizer)).collect::<Result<_, _>>()?))
        }
    }
}

fn triple_slot(piece: &Piece, tokenizer: &Tokenizer) -> Result<TripleSlot, DataError> {
    match piece {
        Piece::Special(token) => Ok(TripleSlot::Special(special(token, tokenizer)?)),
        Piece::Literal(text) => Ok(TripleSlot::Literal(literal(text, tokenizer)?)),
        Piece::Field(name) => match name.as_str() {
            "subject" => Ok(TripleSlot::Subject),
            "property" => Ok(TripleSlot::Property),
            "object" => Ok(TripleSlot::Object),
            _ => Err(unknown_field("a triple", name, &["subject", "property", "object"])),
        },
        Piece::Repeat(_) => Err(DataError::Template("a `( … )*` stands inside another".into())),
    }
}

fn unknown_field(of: &str, name: &str, known: &[&str]) -> DataError {
    let hint = did_you_mean(name, known.iter().copied());
    DataError::Template(format!("{of} has no field `{name}`{hint}; it has `{}`", known.join("`, `")))
}

pub fn read(
    text: &str,
    path: &Path,
    layout: &Layout,
    tokenizer: &Tokenizer,
) -> Result<(Vec<Placed>, LeftOut), DataError> {
    let entries = parse(text, path)?;
    let ids = Encoded::new(&entries, tokenizer)?;
    let mut examples = Vec::new();
    for (number, entry) in &entries {
        for text in good(entry) {
            let example = lay_out(layout, entry, text, &ids);
            if example.targets() == 0 {
                let message = format!("the tokenizer makes no token of the `lex` {text:?}");
                return Err(DataError::Entry { path: path.to_owned(), entry: number.clone(), message });
            }
            examples.push((format!("entry {number}"), example));
        }
    }
    if examples.is_empty() {
        let message = "no entry has a lexicalisation whose `comment` is `good`".into();
        return Err(DataError::Empty { path: path.to_owned(), message });
    }
    let all = || entries.iter().map(|(_, entry)| entry.lexicalisations.len());
    let left_out = LeftOut {
        texts: all().sum::<usize>() - examples.len(),
        entries: all().filter(|&n| n == 0).count(),
        header: false,
    };
    Ok((examples, left_out))
}

fn good(entry: &Entry) -> impl Iterator<Item = &str> {
    entry.lexicalisations.iter().map(|Object(l)| l).filter(|l| l.comment == "good").map(|l| l.lex.as_str())
}

/// Serde's message on a value of another type, in JSON's words.
fn in_words(message: &str) -> String {
    let types = message.strip_prefix("invalid type: ").and_then(|rest| rest.split_once(", expected "));
    let Some((found, expected)) = types else { return message.to_owned() };
    let word = |name: &str| match name {
        "sequence" | "a sequence" => "a list".to_owned(),
        "map" => "an object".to_owned(),
        other => other.to_owned(),
    };
    format!("{} where {} is expected", word(found), word(expected))
}

/// The entries with their numbers, none without content.
fn parse(text: &str, path: &Path) -> Result<Vec<(String, Entry)>, DataError> {
    let Object(file) = serde_json::from_str::<Object<File>>(text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        let message = error.to_string();
        let message = in_words(message.split(" at line ").next().unwrap_or_default());
        DataError::Json { path: path.to_owned(), line, column, message }
    })?;
    let entries: Vec<_> = file.entries.into_iter().flat_map(|numbered| numbered.0).collect();
    for (number, entry) in &entries {
        let fault = |message: &str| {
            Err(DataError::Entry { path: path.to_owned(), entry: number.clone(), message: message.into() })
        };
        if entry.modifiedtripleset.is_empty() {
            return fault("its `modifiedtripleset` is empty; it needs a triple");
        }
        if good(entry).any(|text| text.trim().is_empty()) {
            return fault("a lexicalisation's `lex` is empty; write its text or remove it");
        }
    }
    Ok(entries)
}

/// The tokens of every string of a file, each encoded once: properties and subjects recur.
struct Encoded<'a>(HashMap<&'a str, Vec<i32>>);

impl<'a> Encoded<'a> {
    fn new(entries: &'a [(String, Entry)], tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let mut strings: Vec<&str> = entries
            .iter()
            .flat_map(|(_, entry)| {
                let triples = entry.modifiedtripleset.iter();
                let parts = triples.flat_map(|Object(t)| [t.subject.as_str(), &t.property, &t.object]);
                parts.chain(good(entry)).chain([entry.category.as_str()])
            })
            .collect();
        strings.sort_unstable();
        strings.dedup();
        let ids = tokenizer.encode(strings.clone(), false)?;
        Ok(Encoded(strings.into_iter().zip(ids).collect()))
    }

    fn ids(&self, text: &str) -> &[i32] {
        &self.0[text]
    }
}

/// An example in the making.
#[derive(Default)]
struct Sheet {
    ids: Vec<i32>,
    types: Vec<i32>,
    /// The type of what comes next.
    kind: i32,
}

impl Sheet {
    fn write(&mut self, ids: &[i32]) {
        self.ids.extend_from_slice(ids);
        self.types.resize(self.ids.len(), self.kind);
    }

    /// A special token opens a segment of its own type.
    fn open(&mut self, token: i32) {
        self.kind = token;
        self.write(&[token]);
    }
}

/// Ids and types in template order. A token's type is the special token last seen, but the target
/// keeps its type to the end, over the closing mark too. Literal text opens no type.
fn lay_out(layout: &Layout, entry: &Entry, text: &str, encoded: &Encoded) -> Example {
    let mut sheet = Sheet::default();
    let fill = |sheet: &mut Sheet, slots: &[Slot], mark: fn(&mut Sheet, i32)| {
        for slot in slots {
            match slot {
                Slot::Special(token) => mark(sheet, *token),
                Slot::Literal(ids) => sheet.write(ids),
                Slot::Category => sheet.write(encoded.ids(&entry.category)),
                Slot::Text => sheet.write(encoded.ids(text)),
                Slot::Triples(slots) => {
                    for (Object(triple), slot) in
                        entry.modifiedtripleset.iter().flat_map(|t| slots.iter().map(move |s| (t, s)))
                    {
                        match slot {
                            TripleSlot::Special(token) => mark(sheet, *token),
                            TripleSlot::Literal(ids) => sheet.write(ids),
                            TripleSlot::Subject => sheet.write(encoded.ids(&triple.subject)),
                            TripleSlot::Property => sheet.write(encoded.ids(&triple.property)),
                            TripleSlot::Object => sheet.write(encoded.ids(&triple.object)),
                        }
                    }
                }
            }
        }
    };
    fill(&mut sheet, &layout.before, Sheet::open);
    fill(&mut sheet, std::slice::from_ref(&layout.target), Sheet::open);
    let from = sheet.ids.len() - 1;
    fill(&mut sheet, &layout.after, |sheet, token| sheet.write(&[token]));
    Example { ids: sheet.ids, types: sheet.types, goal: Goal::Continuation { from } }
}
