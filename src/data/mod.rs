//! Data sets: reads files, tokenises them into examples and packs batches of examples for a graph.
//!
//! `rows` parses data files into rows, and a `ExampleBuilder` builds examples of the rows:
//!
//! | task | rows | maker |
//! | --- | --- | --- |
//! | generation | any columns, which the template names | `template` |
//! | | WebNLG's JSON or XML: triples and their verbalisations | `webnlg` |
//! | chat | conversations, in the usual forms | `chat` |
//! | text | a text | `text` |
//! | chat | conversations, in the usual layouts | `chat` |
//! | text | a plain text | `text` |
//!
//! If a task sets `pack`, `pack` merges examples into fewer sequences.

mod batch;
mod cache;
mod chat;
mod error;
mod examples;
mod items;
mod labelled;
mod pack;
mod rows;
mod schema;
mod tags;
mod template;
mod text;
mod tokenizer;
mod webnlg;

use std::path::{Path, PathBuf};

use peft_grammar::model::{Task, TaskKind};
use serde::{Deserialize, Serialize};

use examples::Array;
use labelled::{LabelKind, Labelled};
use rows::{Fault, File, FileRows, Location, Row};
use tags::Tagged;

pub use batch::{Batch, Batches, Order};
pub use error::DataError;
pub(crate) use error::did_you_mean;
pub use examples::{Example, Examples, ExtraTarget, Goal, NO_TAG};
pub use schema::{Schema, infer_schema};
pub use tokenizer::{EncodedSpans, Marks, Tokenizer};

/// An example with its location in the file.
struct LocatedExample {
    at: Location,
    example: Example,
    /// The number of tokens before truncation.
    length: usize,
}

/// Builds the examples of one kind of task.
trait ExampleBuilder {
    /// The intermediate form of a row, before its texts are tokenised together with those of many other rows.
    type Draft;

    /// Opens the rows of a file.
    fn open<'f>(&self, file: &'f File) -> Result<FileRows<'f>, DataError>;

    /// Refuses a header that lacks a column.
    fn check(&self, names: &[&str]) -> Result<(), String>;

    /// Extracts a row's texts and targets. `maybe_header` tells that the row is the file's first line, which might be a
    /// header.
    fn draft(&self, row: &Row, maybe_header: bool) -> Result<Self::Draft, String>;

    /// Tokenises drafts into the examples of each row.
    fn encode(
        &self,
        drafts: Vec<(Location, Self::Draft)>,
    ) -> Result<Vec<Result<Vec<LocatedExample>, Fault>>, DataError>;

    /// A hint for a file without rows.
    fn empty(&self) -> &'static str;

    /// Notes for the user on the examples built, one line each.
    fn notes(&self) -> Vec<String> {
        vec![]
    }
}

/// The largest chunk that is tokenised at once: a number of rows, and a number of bytes of their texts.
const MAX_CHUNK: (usize, usize) = (1 << 14, 1 << 23);

/// The examples of one or more files, with statistics for the user.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Dataset {
    /// The files, in the order in which they were read.
    pub sources: Vec<FileSummary>,
    /// The examples, truncated and packed.
    #[serde(skip)]
    pub examples: Examples,
    /// The number of tokens of every example before truncation, dropped examples included.
    #[serde(skip)]
    lengths: Array<u32>,
    /// The index of the first example of each row.
    #[serde(skip)]
    rows: Array<u32>,
    /// The number of examples before packing. It is 0 if the task does not pack.
    pub turns: usize,
    /// The number of examples (before packing) that were longer than the task's `max_tokens` and were truncated.
    pub cut: usize,
    /// The number of truncated examples without a target left. They are not among `examples`.
    pub dropped: usize,
    /// The parts of the files that give no example by design.
    pub left_out: LeftOut,
    /// The number of invalid rows that were skipped because of [`Reading::skip_bad`].
    pub skipped: usize,
    /// The first skipped row and its error.
    pub first_skipped: Option<String>,
    /// The locations of the first examples, at most [`MAX_PLACES`].
    places: Vec<String>,
    /// Notes for the user, one line each.
    notes: Vec<String>,
    /// Whether the data set came from the cache.
    #[serde(skip)]
    pub cached: bool,
}

/// A data file and the number of examples that it gave.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileSummary {
    /// The file's path.
    pub path: PathBuf,
    /// The number of examples.
    pub examples: usize,
}

/// The number of examples whose locations are kept.
const MAX_PLACES: usize = 1000;

/// The parts of a file that give no example by design.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// The number of texts whose `comment` is not `good`.
    pub texts: usize,
    /// The number of entries without a text.
    pub entries: usize,
    /// Whether the first line was a header, which names the columns.
    pub header: bool,
}

/// Options for reading data files.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// Skips and counts invalid rows. Otherwise the first one is an error.
    pub skip_bad: bool,
    /// The folder of the cache of tokenised data sets.
    pub cache: Option<PathBuf>,
}

impl Dataset {
    /// Reads one file and requires every row to be valid.
    ///
    /// # Errors
    ///
    /// See [`Dataset::read`].
    pub fn load(path: &Path, task: &Task, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        Dataset::read(&[path.to_owned()], task, tokenizer, &Reading::default())
    }

    /// Reads the files that paths or patterns such as `data/*.jsonl` name, in order.
    ///
    /// # Errors
    ///
    /// A file cannot be read or parsed, a row is invalid, or no example has a target left after truncation.
    pub fn read(named: &[PathBuf], task: &Task, tokenizer: &Tokenizer, reading: &Reading) -> Result<Self, DataError> {
        let files = rows::expand(named)?;
        // A pipe can be read only once, so its content cannot be hashed first.
        let again = files.iter().all(|file| file.is_file());
        let Some(folder) = reading.cache.as_ref().filter(|_| again) else {
            return Dataset::tokenise(&files, task, tokenizer, reading);
        };
        let entry = cache::entry_path(folder, &files, task, tokenizer, reading)?;
        if let Some(data) = cache::load(&entry, tokenizer.rows()) {
            return Ok(Dataset { cached: true, ..data });
        }
        let data = Dataset::tokenise(&files, task, tokenizer, reading)?;
        // The files may have changed while they were read. The entry is stored only if the key is still the same.
        if cache::entry_path(folder, &files, task, tokenizer, reading)? == entry {
            cache::store(&entry, &data);
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
                reader.files(files, &template::ResolvedTemplate::new((template, target, each), tokenizer)?)?;
            }
            TaskKind::Chat => reader.files(files, &chat::Conversations::new(tokenizer)?)?,
            TaskKind::Text { text, end } => {
                let end = end.as_ref().and_then(|token| tokenizer.special(token));
                reader.files(files, &text::Texts { column: text.as_deref(), end, max_tokens, tokenizer })?;
            }
            TaskKind::Classification { labels, columns } => {
                reader
                    .files(files, &Labelled { label_kind: LabelKind::Class(labels), columns, max_tokens, tokenizer })?;
            }
            TaskKind::Regression { columns } => {
                reader.files(files, &Labelled { label_kind: LabelKind::Number, columns, max_tokens, tokenizer })?;
            }
            TaskKind::TokenClassification { labels, tokens, tags } => {
                reader.files(files, &Tagged::new(labels, [tokens.as_deref(), tags.as_deref()], tokenizer))?;
            }
        }
        reader.finish()
    }

    /// Splits off `count` rows with all their examples, chosen by the seed. Returns the remaining and the held-out
    /// part.
    ///
    /// # Errors
    ///
    /// `count` is not less than the number of rows.
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

    /// The path of the only file, or a short list.
    pub fn name(&self) -> String {
        match &self.sources[..] {
            [] => "no file".into(),
            [only] => only.path.display().to_string(),
            [first, second] => format!("{}, {}", first.path.display(), second.path.display()),
            [first, others @ ..] => format!("{} and {} other files", first.path.display(), others.len()),
        }
    }

    /// One line that summarises what was read: `FILE: 104 examples, 2,000 tokens, the longest 40, 28 cut`.
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

    /// The location of an example, if it is one of the first `MAX_PLACES`.
    pub fn place(&self, index: usize) -> Option<&str> {
        self.places.get(index).map(String::as_str)
    }

    /// The number of examples.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// Whether there are no examples.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// Requires at least one example, because a mean over no examples is not a number.
    ///
    /// # Errors
    ///
    /// There are no examples.
    pub fn require_examples(&self) -> Result<(), DataError> {
        match self.is_empty() {
            true => Err(DataError::Empty { path: self.name().into(), message: "there is nothing to run on".into() }),
            false => Ok(()),
        }
    }

    /// The number of tokens of all examples.
    pub fn tokens(&self) -> usize {
        self.examples.tokens()
    }

    /// The number of tokens of the longest example.
    pub fn longest(&self) -> usize {
        (0..self.len()).map(|index| self.examples.ids(index).len()).max().unwrap_or(0)
    }

    /// The number of tokens of every example before truncation, dropped examples included.
    pub fn lengths(&self) -> &[u32] {
        &self.lengths
    }
}

/// A data set under construction.
struct Reader {
    data: Dataset,
    skip_bad: bool,
    max_tokens: usize,
    marks: Marks,
    /// The packer, if the task packs.
    packer: Option<pack::Packer>,
    /// The row of the last example.
    row: Option<Location>,
    /// The location and length of the first dropped example, and the number of its first target.
    first_dropped: Option<(String, usize, Option<usize>)>,
}

impl Reader {
    fn files<M: ExampleBuilder>(&mut self, files: &[PathBuf], maker: &M) -> Result<(), DataError> {
        for path in files {
            let before = self.data.len();
            self.data.sources.push(FileSummary { path: path.clone(), examples: 0 });
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

    /// Reads one file. `several` tells that a location needs the file's name.
    fn file<M: ExampleBuilder>(&mut self, file: &File, maker: &M, several: bool) -> Result<(), DataError> {
        let path = &file.path;
        let rows = maker.open(file)?;
        if let Some((line, names)) = &rows.header {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let refuse = |message| DataError::at(path, Fault::fatal(Location::Line(*line), message));
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
        let (mut drafts, mut bytes, mut maybe_header, mut any) = (vec![], 0, rows.implied, false);
        for row in rows {
            any = true;
            let top = std::mem::take(&mut maybe_header);
            let draft = row.and_then(|row| {
                bytes += row.size();
                let draft = maker.draft(&row, top).map_err(|message| Fault::row(row.at.clone(), message))?;
                Ok((row.at, draft))
            });
            match draft {
                Ok(draft) => drafts.push(draft),
                Err(fault) => self.reject(path, fault)?,
            }
            if drafts.len() == MAX_CHUNK.0 || bytes >= MAX_CHUNK.1 {
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

    fn encode<M: ExampleBuilder>(
        &mut self,
        path: &Path,
        maker: &M,
        drafts: Vec<(Location, M::Draft)>,
        several: bool,
    ) -> Result<(), DataError> {
        for placed in maker.encode(drafts)? {
            match placed {
                Ok(placed) => placed.into_iter().for_each(|placed| self.truncate(path, placed, several)),
                Err(fault) => self.reject(path, fault)?,
            }
        }
        Ok(())
    }

    /// Skips an invalid row, or returns its error.
    fn reject(&mut self, path: &Path, fault: Fault) -> Result<(), DataError> {
        let fatal = fault.fatal;
        let error = DataError::at(path, fault);
        if fatal || !self.skip_bad {
            return Err(error);
        }
        self.data.skipped += 1;
        self.data.first_skipped.get_or_insert_with(|| error.to_string());
        Ok(())
    }

    /// Truncates an example that is too long. A sequence between special tokens keeps the closing one. An example is
    /// dropped if the truncation leaves nothing to learn: no predicted token, or no token of the sentence.
    fn truncate(&mut self, path: &Path, LocatedExample { at, mut example, length }: LocatedExample, several: bool) {
        let (data, limit) = (&mut self.data, self.max_tokens);
        if length > limit {
            data.cut += 1;
            let first_target = match &example.goal {
                Goal::Tokens(ranges) | Goal::Turns(ranges, _) => ranges.first().map(|range| range.start),
                _ => None,
            };
            // A pair of texts is truncated by the tokenizer.
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
                Goal::Tokens(_) | Goal::Turns(..) | Goal::Tags(_) => example.goal.target_count() > 0,
                Goal::Class(_) | Goal::Number(_) => example.ids.len() > self.marks.count(),
            };
            if !left {
                data.dropped += 1;
                data.lengths.push(as_length(length));
                self.first_dropped.get_or_insert_with(|| (place(path, &at, several), length, first_target));
                return;
            }
        }
        let placed = LocatedExample { at, example, length };
        let complete = match &mut self.packer {
            Some(packer) => packer.add(placed),
            None => Some(placed),
        };
        if let Some(placed) = complete {
            self.push(path, placed, several);
        }
    }

    fn push(&mut self, path: &Path, LocatedExample { at, example, length }: LocatedExample, several: bool) {
        let data = &mut self.data;
        data.lengths.push(as_length(length));
        if data.places.len() < MAX_PLACES {
            data.places.push(place(path, &at, several));
        }
        if self.row.as_ref() != Some(at.row()) {
            data.rows.push(data.examples.len() as u32);
            self.row = Some(at.row().clone());
        }
        data.examples.push(&example);
    }

    /// Returns the data set, or an error if it has no example left.
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

/// A location, with the file's name if there are several files.
fn place(path: &Path, at: &Location, several: bool) -> String {
    if several { format!("{}, {at}", path.display()) } else { at.to_string() }
}

fn as_length(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tasks;
#[cfg(test)]
mod tests;
