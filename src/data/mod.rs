//! Data sets: files and a tokenizer in, examples out, batches of them packed for a graph.
//!
//! [`rows`] reads people's files; a [`Maker`] makes examples of their rows:
//!
//! | task | rows | maker |
//! | --- | --- | --- |
//! | generation | any columns, which the template names | [`template`] |
//! | | WebNLG's JSON or XML: triples and their verbalisations | [`webnlg`] |
//! | chat | conversations, in the usual forms | [`chat`] |
//! | text | a text | [`text`] |
//! | classification, regression | a text or a pair of them, and a label | [`labelled`] |
//! | token classification | words with a label each | [`tags`] |
//!
//! What a task packs, [`pack`] puts into fewer sequences.

mod batch;
mod cache;
mod chat;
mod error;
mod examples;
mod form;
mod items;
mod labelled;
mod pack;
mod rows;
mod tags;
mod template;
mod text;
mod tokenizer;
mod webnlg;

use std::path::{Path, PathBuf};

use peft_grammar::model::{Task, TaskKind};
use serde::{Deserialize, Serialize};

use examples::Array;
use labelled::{Asked, Labelled};
use rows::{At, Fault, File, Row, Rows};
use tags::Tagged;

pub use batch::{Batch, Batches, Order};
pub use error::DataError;
pub(crate) use error::did_you_mean;
pub use examples::{Aside, Example, Examples, Goal, NO_TAG};
pub use form::{Form, form};
pub use tokenizer::{Marks, Spanned, Tokenizer};

/// An example with its place in the file.
struct Placed {
    at: At,
    example: Example,
    /// Its tokens before any cut.
    length: usize,
}

/// Makes examples of rows.
trait Maker {
    /// What is made of a row before its texts are tokenised, many rows at once.
    type Draft;

    fn open<'f>(&self, file: &'f File) -> Result<Rows<'f>, DataError>;

    /// Refuses names of columns among which one is missing.
    fn check(&self, names: &[&str]) -> Result<(), String>;

    /// `at_top` says that the row is a file's first line, which might have been a header.
    fn draft(&self, row: &Row, at_top: bool) -> Result<Self::Draft, String>;

    /// The examples of each row.
    fn encode(&self, drafts: Vec<(At, Self::Draft)>) -> Result<Vec<Result<Vec<Placed>, Fault>>, DataError>;

    /// What a file without a row lacks.
    fn empty(&self) -> &'static str;

    /// What to know about the examples that it made, a line each.
    fn notes(&self) -> Vec<String> {
        vec![]
    }
}

/// As many rows are tokenised at once, and as many bytes of their texts.
const TOGETHER: (usize, usize) = (1 << 14, 1 << 23);

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Dataset {
    /// The files, in the order in which they were read.
    pub sources: Vec<Source>,
    #[serde(skip)]
    pub examples: Examples,
    /// Tokens of every example before any cut, those of dropped ones too.
    #[serde(skip)]
    lengths: Array<u32>,
    /// The first example of each row.
    #[serde(skip)]
    rows: Array<u32>,
    /// What shares the examples where the task packs; otherwise 0.
    pub turns: usize,
    /// Of these, or of the examples, those longer than the task's `max_tokens`, which were cut to it.
    pub cut: usize,
    /// Those of which the cut left nothing to predict; they are not among `examples`.
    pub dropped: usize,
    pub left_out: LeftOut,
    /// Rows that could not be used and were left out, as [`Reading::skip_bad`] asks.
    pub skipped: usize,
    /// The first of them, and what is wrong with it.
    pub first_skipped: Option<String>,
    /// Where the first examples are, at most [`PLACES`].
    places: Vec<String>,
    /// What to know about the examples, a line each.
    notes: Vec<String>,
    /// It was tokenised before.
    #[serde(skip)]
    pub cached: bool,
}

/// A file, and how many examples it gave.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Source {
    pub path: PathBuf,
    pub examples: usize,
}

/// The places of as many examples are kept.
const PLACES: usize = 1000;

/// What of a file makes no example.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Texts whose `comment` is not `good`.
    pub texts: usize,
    /// Entries without a text.
    pub entries: usize,
    /// Its first line, which names the columns.
    pub header: bool,
}

/// How files are read.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// Leaves out rows that cannot be used and counts them; otherwise the first one is an error.
    pub skip_bad: bool,
    /// A folder for sets that were tokenised before.
    pub cache: Option<PathBuf>,
}

impl Dataset {
    /// Reads one file, all of whose rows have to be good.
    pub fn load(path: &Path, task: &Task, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        Dataset::read(&[path.to_owned()], task, tokenizer, &Reading::default())
    }

    /// Reads files, named by paths or by patterns such as `data/*.jsonl`, one after the other.
    pub fn read(named: &[PathBuf], task: &Task, tokenizer: &Tokenizer, reading: &Reading) -> Result<Self, DataError> {
        let files = rows::expand(named)?;
        // A pipe is read once.
        let again = files.iter().all(|file| file.is_file());
        let Some(folder) = reading.cache.as_ref().filter(|_| again) else {
            return Dataset::tokenise(&files, task, tokenizer, reading);
        };
        let place = cache::place(folder, &files, task, tokenizer, reading)?;
        if let Some(data) = cache::find(&place, tokenizer.rows()) {
            return Ok(Dataset { cached: true, ..data });
        }
        let data = Dataset::tokenise(&files, task, tokenizer, reading)?;
        // What was read may have changed meanwhile.
        if cache::place(folder, &files, task, tokenizer, reading)? == place {
            cache::keep(&place, &data);
        }
        Ok(data)
    }

    fn tokenise(files: &[PathBuf], task: &Task, tokenizer: &Tokenizer, reading: &Reading) -> Result<Self, DataError> {
        let max_tokens = task.max_tokens as usize;
        let data = Dataset::default();
        let (skip_bad, marks) = (reading.skip_bad, tokenizer.marks());
        let packer = matches!(task.kind, TaskKind::Generation { pack: true, .. }).then(pack::Packer::default);
        let mut reader = Reader { data, skip_bad, max_tokens, marks, packer, row: None, first_dropped: None };
        match &task.kind {
            TaskKind::Generation { template, target, each, .. } => {
                reader.files(files, &template::Layout::new((template, target, each), tokenizer)?)?;
            }
            TaskKind::Chat => reader.files(files, &chat::Conversations::new(tokenizer)?)?,
            TaskKind::Text { text, end } => {
                let end = end.as_ref().and_then(|token| tokenizer.special(token));
                reader.files(files, &text::Texts { column: text.as_deref(), end, max_tokens, tokenizer })?;
            }
            TaskKind::Classification { labels, columns } => {
                reader.files(files, &Labelled { asked: Asked::Class(labels), columns, max_tokens, tokenizer })?;
            }
            TaskKind::Regression { columns } => {
                reader.files(files, &Labelled { asked: Asked::Number, columns, max_tokens, tokenizer })?;
            }
            TaskKind::TokenClassification { labels, tokens, tags } => {
                reader.files(files, &Tagged::new(labels, [tokens.as_deref(), tags.as_deref()], tokenizer))?;
            }
        }
        reader.finish()
    }

    /// Takes rows out, which the seed chooses, with all their examples: the others, and those.
    pub fn hold_out(self, count: u64, seed: u64) -> Result<(Self, Self), DataError> {
        let rows = self.rows.len();
        let Some(count) = usize::try_from(count).ok().filter(|&count| count < rows) else {
            let message = format!(
                "`train.hold_out` takes {count} of its {rows} rows, which leaves none to train on; set it to less, or to 0"
            );
            return Err(DataError::Named { path: self.name().into(), message });
        };
        let mut held = vec![false; rows];
        let order = Order::Shuffled { seed, epoch: u64::MAX }.indices(rows);
        order[..count].iter().for_each(|&row| held[row] = true);
        let part = |wanted: bool| {
            let mut part = Dataset { sources: self.sources.clone(), cached: self.cached, ..Dataset::default() };
            for row in (0..rows).filter(|&row| held[row] == wanted) {
                let end = self.rows.get(row + 1).map_or(self.len(), |&next| next as usize);
                part.rows.push(part.len() as u32);
                for index in self.rows[row] as usize..end {
                    let example = self.examples.get(index);
                    part.lengths.push(example.ids.len() as u32);
                    part.places.extend(self.places.get(index).cloned());
                    part.examples.push(&example);
                }
            }
            part.examples.shrink();
            part
        };
        Ok((part(false), part(true)))
    }

    /// The file, or the first one and how many others.
    pub fn name(&self) -> String {
        match &self.sources[..] {
            [] => "no file".into(),
            [only] => only.path.display().to_string(),
            [first, second] => format!("{}, {}", first.path.display(), second.path.display()),
            [first, others @ ..] => format!("{} and {} other files", first.path.display(), others.len()),
        }
    }

    /// One line on what was read: `FILE: 104 examples, 2,000 tokens, the longest 40, 28 cut`.
    pub fn describe(&self) -> String {
        let cut = match (self.cut, self.dropped) {
            (0, _) => String::new(),
            (cut, 0) => format!(", {cut} cut"),
            (cut, dropped) => format!(", {cut} cut, {dropped} of them dropped: no target is left"),
        };
        let (examples, tokens, longest) = (self.len(), self.tokens(), self.longest());
        let turns = if self.turns > 0 { format!(" of {} turns", self.turns) } else { String::new() };
        let mut line =
            format!("{}: {examples} examples{turns}, {tokens} tokens, the longest {longest}{cut}", self.name());
        if self.left_out.texts > 0 {
            line += &format!(", {} texts left out: their `comment` is not `good`", self.left_out.texts);
        }
        if self.left_out.entries > 0 {
            line += &format!(", {} entries left out: they have no text", self.left_out.entries);
        }
        if let Some(first) = &self.first_skipped {
            line += &format!(", {} bad rows left out; the first: {first}", self.skipped);
        }
        if self.left_out.header {
            line += ", its first line is a header";
        }
        if self.cached {
            line += ", from the cache";
        }
        self.notes.iter().for_each(|note| line += &format!("\nnote: {note}"));
        line
    }

    /// Where an example is, if it is one of the first.
    pub fn place(&self, index: usize) -> Option<&str> {
        self.places.get(index).map(String::as_str)
    }

    pub fn len(&self) -> usize {
        self.examples.len()
    }

    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// A mean over nothing is no number: what computes one asks for an example.
    pub fn not_empty(&self) -> Result<(), DataError> {
        match self.is_empty() {
            true => Err(DataError::Empty { path: self.name().into(), message: "there is nothing to run on".into() }),
            false => Ok(()),
        }
    }

    pub fn tokens(&self) -> usize {
        self.examples.tokens()
    }

    /// Tokens of the longest example.
    pub fn longest(&self) -> usize {
        (0..self.len()).map(|index| self.examples.ids(index).len()).max().unwrap_or(0)
    }

    /// Tokens of every example before any cut, those of dropped ones too.
    pub fn lengths(&self) -> &[u32] {
        &self.lengths
    }
}

/// A data set in the making.
struct Reader {
    data: Dataset,
    skip_bad: bool,
    max_tokens: usize,
    marks: Marks,
    /// Of a task that packs.
    packer: Option<pack::Packer>,
    /// The row of the last example.
    row: Option<At>,
    /// Place and length of the first example that was dropped, and its first target.
    first_dropped: Option<(String, usize, Option<usize>)>,
}

impl Reader {
    fn files<M: Maker>(&mut self, files: &[PathBuf], maker: &M) -> Result<(), DataError> {
        for path in files {
            let before = self.data.len();
            self.data.sources.push(Source { path: path.clone(), examples: 0 });
            self.row = None;
            self.file(&File::open(path)?, maker, files.len() > 1)?;
            let examples = self.data.len() - before;
            self.data.sources.last_mut().expect("it was pushed above").examples = examples;
        }
        self.data.notes = maker.notes();
        if let Some(packer) = &self.packer {
            self.data.turns = packer.turns;
            self.data.notes.extend(packer.note());
        }
        Ok(())
    }

    /// `several` says that a place needs the file's name.
    fn file<M: Maker>(&mut self, file: &File, maker: &M, several: bool) -> Result<(), DataError> {
        let path = &file.path;
        let rows = maker.open(file)?;
        if let Some((line, names)) = &rows.header {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let refuse = |message| DataError::at(path, Fault::fatal(At::Line(*line), message));
            maker.check(&names).map_err(refuse)?;
            let again = (1..names.len()).find(|&at| !names[at].is_empty() && names[..at].contains(&names[at]));
            if let Some(at) = again {
                return Err(refuse(format!("two columns are called `{}`; rename one", rows::shortened(names[at]))));
            }
        }
        let left_out = &mut self.data.left_out;
        left_out.texts += rows.left_out.texts;
        left_out.entries += rows.left_out.entries;
        left_out.header |= rows.left_out.header;
        let (mut drafts, mut bytes, mut at_top, mut any) = (vec![], 0, rows.implied, false);
        for row in rows {
            any = true;
            let top = std::mem::take(&mut at_top);
            let draft = row.and_then(|row| {
                bytes += row.size();
                let draft = maker.draft(&row, top).map_err(|message| Fault::row(row.at.clone(), message))?;
                Ok((row.at, draft))
            });
            match draft {
                Ok(draft) => drafts.push(draft),
                Err(fault) => self.bad(path, fault)?,
            }
            if drafts.len() == TOGETHER.0 || bytes >= TOGETHER.1 {
                self.encode(path, maker, std::mem::take(&mut drafts), several)?;
                bytes = 0;
            }
        }
        if !any {
            return Err(DataError::Empty { path: path.clone(), message: maker.empty().into() });
        }
        self.encode(path, maker, drafts, several)?;
        if let Some(last) = self.packer.as_mut().and_then(pack::Packer::close) {
            self.push(path, last, several);
        }
        Ok(())
    }

    fn encode<M: Maker>(
        &mut self,
        path: &Path,
        maker: &M,
        drafts: Vec<(At, M::Draft)>,
        several: bool,
    ) -> Result<(), DataError> {
        for placed in maker.encode(drafts)? {
            match placed {
                Ok(placed) => placed.into_iter().for_each(|placed| self.fit(path, placed, several)),
                Err(fault) => self.bad(path, fault)?,
            }
        }
        Ok(())
    }

    /// Leaves a row out, or gives it as the error that it is.
    fn bad(&mut self, path: &Path, fault: Fault) -> Result<(), DataError> {
        let fatal = fault.fatal;
        let error = DataError::at(path, fault);
        if fatal || !self.skip_bad {
            return Err(error);
        }
        self.data.skipped += 1;
        self.data.first_skipped.get_or_insert_with(|| error.to_string());
        Ok(())
    }

    /// Cuts what is too long. A sequence between marks keeps the closing one. What the cut leaves nothing to learn from is
    /// dropped, a continuation without a token to predict or marks without a sentence.
    fn fit(&mut self, path: &Path, Placed { at, mut example, length }: Placed, several: bool) {
        let (data, limit) = (&mut self.data, self.max_tokens);
        if length > limit {
            data.cut += 1;
            let first_target = match &example.goal {
                Goal::Tokens(ranges) | Goal::Turns(ranges, _) => ranges.first().map(|range| range.start),
                _ => None,
            };
            // A pair comes here cut already.
            if example.ids.len() > limit {
                let closing = match example.goal {
                    Goal::Tokens(_) | Goal::Turns(..) => 0,
                    _ => self.marks.closing.min(limit),
                };
                let marks = example.ids.split_off(example.ids.len() - closing);
                example.truncate(limit - closing);
                example.close(&marks);
            }
            let left = match example.goal {
                Goal::Tokens(_) | Goal::Turns(..) | Goal::Tags(_) => example.goal.targets() > 0,
                Goal::Class(_) | Goal::Number(_) => example.ids.len() > self.marks.count(),
            };
            if !left {
                data.dropped += 1;
                data.lengths.push(as_length(length));
                self.first_dropped.get_or_insert_with(|| (place(path, &at, several), length, first_target));
                return;
            }
        }
        let placed = Placed { at, example, length };
        let complete = match &mut self.packer {
            Some(packer) => packer.add(placed),
            None => Some(placed),
        };
        if let Some(placed) = complete {
            self.push(path, placed, several);
        }
    }

    fn push(&mut self, path: &Path, Placed { at, example, length }: Placed, several: bool) {
        let data = &mut self.data;
        data.lengths.push(as_length(length));
        if data.places.len() < PLACES {
            data.places.push(place(path, &at, several));
        }
        if self.row.as_ref() != Some(at.row()) {
            data.rows.push(data.examples.len() as u32);
            self.row = Some(at.row().clone());
        }
        data.examples.push(&example);
    }

    /// The data set; an error if nothing is left of it.
    fn finish(self) -> Result<Dataset, DataError> {
        let mut data = self.data;
        data.examples.shrink();
        match (self.first_dropped, &data.first_skipped) {
            _ if !data.is_empty() => Ok(data),
            (Some((place, length, first)), _) => {
                let (left, from) = match first {
                    Some(first) => ("no target", format!(", its first target is number {}", first + 1)),
                    None => ("no sentence", String::new()),
                };
                let (path, count, limit) = (data.name().into(), data.dropped, self.max_tokens);
                Err(DataError::TooLong { path, count, limit, left, place, length, from })
            }
            (None, Some(first)) => Err(DataError::AllBad { count: data.skipped, first: first.clone() }),
            (None, None) => Ok(data),
        }
    }
}

/// A place, with its file's name if there are several.
fn place(path: &Path, at: &At, several: bool) -> String {
    if several { format!("{}, {at}", path.display()) } else { at.to_string() }
}

fn as_length(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tasks;
#[cfg(test)]
mod tests;
