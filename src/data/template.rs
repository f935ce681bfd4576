//! Generation tasks: fills a task's template with a row and gives ids and token types.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use peft_grammar::model::{Extent, Piece};

use super::error::did_you_mean;
use super::items::{Items, NO_LISTS};
use super::labelled::{known, no_column};
use super::rows::{Cell, Fault, File, FileRows, Format, Location, Row, Value, find};
use super::{DataError, Example, ExampleBuilder, Goal, LocatedExample, Tokenizer, webnlg};

/// A piece of a template with its tokens resolved.
enum Slot {
    Special(i32),
    /// The tokens of a literal text.
    Literal(Rc<[i32]>),
    /// A special token, and the special token whose type it and the following tokens have.
    As(i32, i32),
    /// A field's text, or a part of its tokens.
    Field(String, Option<Extent>),
    /// A part that is repeated for each item of a list column, or for some of its items. Without a name it is the row's
    /// only list.
    Each(Option<String>, Option<Extent>, Vec<Slot>),
}

/// A task's template with its tokens resolved.
pub struct ResolvedTemplate<'t> {
    before: Vec<Slot>,
    /// A special token or a literal text. The loss covers the tokens after it.
    target: Slot,
    after: Vec<Slot>,
    /// The template and the target as the task writes them.
    template: &'t [Piece],
    target_text: &'t str,
    /// The lists that are expanded into one example per item.
    each: &'t [String],
    tokenizer: &'t Tokenizer,
    recent_texts: RecentTexts,
}

/// A template filled with a row, with texts not tokenised yet.
pub struct Draft {
    before: Vec<Part>,
    after: Vec<Part>,
}

enum Part {
    Special(i32),
    As(i32, i32),
    Ids(Rc<[i32]>),
    Text(Rc<str>, Option<Extent>),
}

/// Recently seen long texts, which consecutive rows may share, such as the story of a conversation.
#[derive(Default)]
struct RecentTexts(RefCell<VecDeque<Rc<str>>>);

impl RecentTexts {
    /// The number of texts that are remembered, and the length in bytes from which on a text is remembered.
    const CAPACITY: usize = 4;
    const MIN_BYTES: usize = 256;

    fn text(&self, text: &str) -> Rc<str> {
        if text.len() < RecentTexts::MIN_BYTES {
            return text.into();
        }
        let mut known = self.0.borrow_mut();
        if let Some(same) = known.iter().find(|known| known.as_ref() == text) {
            return same.clone();
        }
        let text: Rc<str> = text.into();
        known.truncate(RecentTexts::CAPACITY - 1);
        known.push_front(text.clone());
        text
    }
}

impl<'t> ResolvedTemplate<'t> {
    pub fn new(
        (template, target, each): (&'t [Piece], &'t str, &'t [String]),
        tokenizer: &'t Tokenizer,
    ) -> Result<Self, DataError> {
        let Some(at) = template.iter().position(|p| p.literal_source().as_deref() == Some(target)) else {
            return Err(DataError::Template(format!("its target `{target}` does not occur in it outside `( … )*`")));
        };
        Ok(ResolvedTemplate {
            before: slots(&template[..at], tokenizer)?,
            target: slot(&template[at], tokenizer)?,
            after: slots(&template[at + 1..], tokenizer)?,
            template,
            target_text: target,
            each,
            tokenizer,
            recent_texts: RecentTexts::default(),
        })
    }

    /// Refuses a template that reads fields that an entry of WebNLG does not have.
    fn fits_webnlg(&self) -> Result<(), DataError> {
        let unknown = |of: &str, name: &str, known: &[&str]| {
            let hint = did_you_mean(name, known.iter().copied());
            DataError::Template(format!("{of} has no field `{name}`{hint}; it has `{}`", known.join("`, `")))
        };
        let record = |name: &str| match webnlg::RECORD.contains(&name) {
            true => Ok(()),
            false => Err(unknown("a record", name, webnlg::RECORD)),
        };
        if let [list, ..] = self.each {
            let message =
                format!("`each` goes over `{list}`, and an entry of WebNLG has an example for each of its texts");
            return Err(DataError::Template(message));
        }
        for piece in self.template {
            let piece = if let Piece::Cut(_, piece) = piece { piece } else { piece };
            let items = match piece {
                Piece::Special(_) | Piece::Literal(_) | Piece::As(..) | Piece::Cut(..) => continue,
                Piece::Field(name) => {
                    record(name)?;
                    continue;
                }
                Piece::Repeat(items) => items,
                Piece::Each(name, _) if name != webnlg::TRIPLES => {
                    return Err(unknown("a record", name, &[webnlg::TRIPLES]));
                }
                Piece::Each(_, items) => items,
            };
            for item in items {
                let item = if let Piece::Cut(_, item) = item { item } else { item };
                match item {
                    Piece::Field(name) if !webnlg::TRIPLE.contains(&name.as_str()) => {
                        return Err(unknown("a triple", name, webnlg::TRIPLE));
                    }
                    _ => {}
                }
            }
        }
        if !self.after.iter().any(|slot| matches!(slot, Slot::Field(name, _) if name == "text")) {
            return Err(DataError::Template(format!("`{{text}}` does not follow the target `{}`", self.target_text)));
        }
        Ok(())
    }
}

fn slots(pieces: &[Piece], tokenizer: &Tokenizer) -> Result<Vec<Slot>, DataError> {
    pieces.iter().map(|piece| slot(piece, tokenizer)).collect()
}

fn slot(piece: &Piece, tokenizer: &Tokenizer) -> Result<Slot, DataError> {
    let special = |token: &String| {
        let unknown = || DataError::Template(format!("`{token}` is not among the task's special tokens"));
        tokenizer.special(token).ok_or_else(unknown)
    };
    let (piece, extent) = match piece {
        Piece::Cut(extent, piece) => (&**piece, Some(*extent)),
        piece => (piece, None),
    };
    let inside = |pieces: &[Piece]| {
        let inside = slots(pieces, tokenizer)?;
        match inside.iter().any(|slot| matches!(slot, Slot::Each(..))) {
            true => Err(DataError::Template("a `( … )*` is nested in another".into())),
            false => Ok(inside),
        }
    };
    Ok(match piece {
        Piece::Special(token) => Slot::Special(special(token)?),
        Piece::As(token, kind) => Slot::As(special(token)?, special(kind)?),
        Piece::Literal(text) => Slot::Literal(literal(text, tokenizer)?.into()),
        Piece::Field(name) => Slot::Field(name.clone(), extent),
        Piece::Repeat(pieces) => Slot::Each(None, extent, inside(pieces)?),
        Piece::Each(name, pieces) => Slot::Each(Some(name.clone()), extent, inside(pieces)?),
        Piece::Cut(..) => return Err(DataError::Template("a cut of a cut".into())),
    })
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

/// A field's text.
fn text<'r>(name: &str, cell: Cell<'r>) -> Result<&'r str, String> {
    cell.text().ok_or_else(|| {
        let mend = match cell {
            Cell::Value(Value::Object(fields)) => match fields.first() {
                Some((first, _)) => format!("name a field of it, `{{{name}.{first}}}`"),
                None => "it must be text".into(),
            },
            Cell::Value(Value::List(_)) => {
                format!("name an item, `{{{name}.0}}`, or go over its objects by `({name}: … )*`")
            }
            _ => "write \"\" where there is no text".into(),
        };
        format!("`{name}` is {}; {mend}", cell.kind())
    })
}

/// The error for a row without a field.
fn missing(name: &str, row: &Row) -> String {
    let inside = name.split_once('.').and_then(|(first, rest)| match row.get(first) {
        Some(Cell::Value(Value::Object(fields))) => Some((first, rest, fields)),
        _ => None,
    });
    match inside {
        Some((first, rest, fields)) => {
            let names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
            let hint = did_you_mean(rest, names.iter().copied());
            format!("`{first}` has no field `{rest}`{hint}; it has `{}`", names.join("`, `"))
        }
        None => no_column(name, &row.names()),
    }
}

impl ResolvedTemplate<'_> {
    /// Appends the parts that a slot gives for a row.
    fn fill(&self, slot: &Slot, row: &Row, parts: &mut Vec<Part>) -> Result<(), String> {
        let text = |name: &str, cell: Cell| text(name, cell).map(|text| self.recent_texts.text(text));
        match slot {
            Slot::Special(token) => parts.push(Part::Special(*token)),
            Slot::As(token, kind) => parts.push(Part::As(*token, *kind)),
            Slot::Literal(ids) => parts.push(Part::Ids(ids.clone())),
            Slot::Field(name, extent) => {
                let cell = row.get(name).ok_or_else(|| missing(name, row))?;
                parts.push(Part::Text(text(name, cell)?, *extent));
            }
            Slot::Each(name, extent, slots) => {
                let (name, items) = list(name.as_deref(), row)?;
                let taken = extent.map_or(0..items.len(), |extent| extent.range(items.len()));
                for (number, item) in (1..).zip(items).skip(taken.start).take(taken.len()) {
                    let Value::Object(fields) = item else {
                        return Err(format!(
                            "item {number} of `{name}` is {}, where an object is expected",
                            item.kind()
                        ));
                    };
                    for slot in slots {
                        match slot {
                            Slot::Field(field, extent) => {
                                let value = find(fields, field).ok_or_else(|| {
                                    let names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
                                    let hint = did_you_mean(field, names.iter().copied());
                                    format!(
                                        "item {number} of `{name}` has no field `{field}`{hint}; it has `{}`",
                                        names.join("`, `")
                                    )
                                })?;
                                parts.push(Part::Text(text(field, Cell::Value(value))?, *extent));
                            }
                            other => self.fill(other, row, parts)?,
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// The list that a repeated part iterates over: that of a column, or the row's only list.
fn list<'r>(name: Option<&'r str>, row: &'r Row) -> Result<(&'r str, &'r [Value]), String> {
    if let Some(name) = name {
        return match row.get(name) {
            Some(Cell::Value(Value::List(items))) => Ok((name, items)),
            Some(cell) => Err(format!("`{name}` is {}, and `({name}: … )*` goes over a list of objects", cell.kind())),
            None => Err(no_column(name, &row.names())),
        };
    }
    let lists = row.lists();
    let some: Vec<_> = lists.iter().filter(|(_, items)| !items.is_empty()).collect();
    match (&lists[..], &some[..]) {
        ([only], _) => Ok(*only),
        (_, [only]) => Ok(**only),
        ([], _) => {
            let mend = "`( … )*` goes over one; name a column that holds a list, `(turns: … )*`, or leave the part out";
            Err(format!("no column is a list of objects, and {mend}"))
        }
        _ => {
            let (first, second) = (lists[0].0, lists[1].0);
            Err(format!("`{first}` and `{second}` are lists of objects; name the one to go over, `({first}: … )*`"))
        }
    }
}

impl ExampleBuilder for ResolvedTemplate<'_> {
    type Draft = Draft;

    fn open<'f>(&self, file: &'f File) -> Result<FileRows<'f>, DataError> {
        let rows = FileRows::of(file, Format::Json, None, |_| true).map_err(|e| DataError::at(&file.path, e))?;
        if !rows.entries {
            return Ok(match Items::new(self.each, self.template) {
                Some(items) => items.rows(rows),
                None => rows,
            });
        }
        self.fits_webnlg()?;
        let text = file.text().map_err(|fault| DataError::at(&file.path, fault))?;
        webnlg::rows(text, file.format, &file.path)
    }

    fn check(&self, names: &[&str]) -> Result<(), String> {
        if !self.each.is_empty() {
            return Err(NO_LISTS.into());
        }
        for slot in self.before.iter().chain(&self.after) {
            match slot {
                Slot::Field(name, _) => known(name, names)?,
                Slot::Each(..) => {
                    return Err(
                        "a table of texts holds no lists for the template's `( … )*`; write the rows as json".into()
                    );
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn draft(&self, row: &Row, _: bool) -> Result<Draft, String> {
        let (mut before, mut after) = (vec![], vec![]);
        self.before.iter().try_for_each(|slot| self.fill(slot, row, &mut before))?;
        self.after.iter().try_for_each(|slot| self.fill(slot, row, &mut after))?;
        // Closing special tokens alone are nothing to learn.
        if after.iter().all(|part| !matches!(part, Part::Text(text, _) if !text.trim().is_empty())) {
            let names: Vec<&str> = self
                .after
                .iter()
                .filter_map(|slot| match slot {
                    Slot::Field(name, _) => Some(name.as_str()),
                    _ => None,
                })
                .collect();
            return Err(match names[..] {
                [name] => format!("`{name}` is empty: there is nothing to learn"),
                _ => format!("what follows the target `{}` is empty: there is nothing to learn", self.target_text),
            });
        }
        Ok(Draft { before, after })
    }

    fn encode(&self, drafts: Vec<(Location, Draft)>) -> Result<Vec<Result<Vec<LocatedExample>, Fault>>, DataError> {
        // Each distinct text is tokenised once, because the properties and subjects of triples recur.
        let parts = drafts.iter().flat_map(|(_, draft)| draft.before.iter().chain(&draft.after));
        let mut texts: Vec<&str> = parts
            .filter_map(|part| match part {
                Part::Text(text, _) => Some(text.as_ref()),
                _ => None,
            })
            .collect();
        texts.sort_unstable();
        texts.dedup();
        let ids = self.tokenizer.encode(texts.clone(), false)?;
        let encoded: HashMap<&str, Vec<i32>> = texts.into_iter().zip(ids).collect();
        let one = |(at, draft): &(Location, Draft)| {
            let example = self.build_example(draft, &encoded);
            if example.goal.target_count() == 0 {
                let message = "the tokenizer makes no token of what follows the target: there is nothing to learn";
                return Err(Fault::row(at.clone(), message));
            }
            Ok(vec![LocatedExample { at: at.clone(), length: example.ids.len(), example }])
        };
        Ok(drafts.iter().map(one).collect())
    }

    fn empty(&self) -> &'static str {
        "it has no row"
    }
}

/// An example under construction.
#[derive(Default)]
struct SequenceBuilder {
    ids: Vec<i32>,
    types: Vec<i32>,
    /// The token type of the following tokens.
    kind: i32,
}

impl SequenceBuilder {
    fn write(&mut self, ids: &[i32]) {
        self.ids.extend_from_slice(ids);
        self.types.resize(self.ids.len(), self.kind);
    }

    /// Appends a special token, which begins a segment of its own type.
    fn open(&mut self, token: i32) {
        self.open_as(token, token);
    }

    fn open_as(&mut self, token: i32, kind: i32) {
        self.kind = kind;
        self.write(&[token]);
    }
}

impl ResolvedTemplate<'_> {
    /// Ids and token types in template order. A token's type is the last special token before it. After the target
    /// special tokens do not change the type, so the closing special token has the target's type too. A literal text
    /// does not change the type.
    fn build_example(&self, draft: &Draft, encoded: &HashMap<&str, Vec<i32>>) -> Example {
        let mut sequence = SequenceBuilder::default();
        let fill = |sequence: &mut SequenceBuilder, parts: &[Part], mark: fn(&mut SequenceBuilder, i32)| {
            for part in parts {
                match part {
                    Part::Special(token) => mark(sequence, *token),
                    Part::As(token, kind) => sequence.open_as(*token, *kind),
                    Part::Ids(ids) => sequence.write(ids),
                    Part::Text(text, extent) => {
                        let ids = &encoded[text.as_ref()];
                        sequence.write(&ids[extent.map_or(0..ids.len(), |extent| extent.range(ids.len()))]);
                    }
                }
            }
        };
        fill(&mut sequence, &draft.before, SequenceBuilder::open);
        match &self.target {
            Slot::Special(token) => sequence.open(*token),
            Slot::As(token, kind) => sequence.open_as(*token, *kind),
            Slot::Literal(ids) => sequence.write(ids),
            Slot::Field(..) | Slot::Each(..) => {}
        }
        let from = sequence.ids.len() - 1;
        fill(&mut sequence, &draft.after, |sequence, token| sequence.write(&[token]));
        Example { goal: Goal::after(from, sequence.ids.len()), ids: sequence.ids, types: sequence.types }
    }
}
