//! Data sets: files and a tokenizer in, examples out, batches of them packed for a graph.
//!
//! [`rows`] reads people's files; a [`Maker`] makes examples of their rows:
//!
//! | task | rows | maker |
//! | --- | --- | --- |
//! | generation | any columns, which the template names | [`template`] |
//! | | WebNLG's JSON or XML: triples and their verbalisations | [`webnlg`] |
//! | classification | a text or a pair of them, and a label | [`classification`] |

mod batch;
mod classification;
mod error;
mod form;
mod items;
mod rows;
mod template;
mod tokenizer;
mod webnlg;

use std::path::{Path, PathBuf};

use peft_grammar::model::{Task, TaskKind};

use rows::{At, Fault, File, Row, Rows};

pub use batch::{Batch, Batches, Order};
pub use error::DataError;
pub use form::{Form, form};
pub use tokenizer::Tokenizer;

/// One sequence as the model sees it, and what it is to predict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    pub ids: Vec<i32>,
    /// The token type of every id.
    pub types: Vec<i32>,
    pub goal: Goal,
}

impl Example {
    /// How many things it asks for.
    fn targets(&self) -> usize {
        match self.goal {
            Goal::Continuation { from } => self.ids.len() - (from + 1).min(self.ids.len()),
            Goal::Class(_) => 1,
        }
    }
}

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

    fn encode(&self, drafts: Vec<(At, Self::Draft)>) -> Result<Vec<Result<Placed, Fault>>, DataError>;

    /// What a file without a row lacks.
    fn empty(&self) -> &'static str;
}

/// As many rows are tokenised at once.
const TOGETHER: usize = 1 << 14;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Every token after position `from` is predicted by the one before it.
    Continuation { from: usize },
    /// The sequence is of this class.
    Class(i32),
}

/// Marks around a classifier's sentence.
const MARKS: usize = 2;

#[derive(Clone, Debug, Default)]
pub struct Dataset {
    /// The files, in the order in which they were read.
    pub sources: Vec<Source>,
    pub examples: Vec<Example>,
    /// Tokens of every example before any cut, those of dropped ones too.
    pub lengths: Vec<u32>,
    /// Examples longer than the task's `max_tokens`, which were cut to it.
    pub cut: usize,
    /// Examples of which the cut left nothing to predict; they are not among `examples`.
    pub dropped: usize,
    pub left_out: LeftOut,
    /// Rows that could not be used and were left out, as [`Reading::skip_bad`] asks.
    pub skipped: usize,
    /// The first of them, and what is wrong with it.
    pub first_skipped: Option<String>,
    /// Where the first examples are, at most [`PLACES`].
    places: Vec<String>,
}

/// A file, and how many examples it gave.
#[derive(Clone, Debug)]
pub struct Source {
    pub path: PathBuf,
    pub examples: usize,
}

/// The places of as many examples are kept.
const PLACES: usize = 1000;

/// What of a file makes no example.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Texts whose `comment` is not `good`.
    pub texts: usize,
    /// Entries without a text.
    pub entries: usize,
    /// Its first line, which names the columns.
    pub header: bool,
}

/// How files are read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reading {
    /// Leaves out rows that cannot be used and counts them; otherwise the first one is an error.
    pub skip_bad: bool,
}

impl Dataset {
    /// Reads one file, all of whose rows have to be good.
    pub fn load(path: &Path, task: &Task, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        Dataset::read(&[path.to_owned()], task, tokenizer, Reading::default())
    }

    /// Reads files, named by paths or by patterns such as `data/*.jsonl`, one after the other.
    pub fn read(named: &[PathBuf], task: &Task, tokenizer: &Tokenizer, reading: Reading) -> Result<Self, DataError> {
        let files = rows::expand(named)?;
        let max_tokens = task.max_tokens as usize;
        let mut reader = Reader { data: Dataset::default(), reading, max_tokens, first_dropped: None };
        match &task.kind {
            TaskKind::Generation { template, target, each, .. } => {
                reader.files(&files, &template::Layout::new((template, target, each), tokenizer)?)?;
            }
            TaskKind::Classification { labels, columns } => {
                reader.files(&files, &classification::Classification { labels, columns, max_tokens, tokenizer })?;
            }
        }
        reader.finish()
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
        let mut line = format!("{}: {examples} examples, {tokens} tokens, the longest {longest}{cut}", self.name());
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
        self.examples.iter().map(|e| e.ids.len()).sum()
    }

    /// Tokens of the longest example.
    pub fn longest(&self) -> usize {
        self.examples.iter().map(|e| e.ids.len()).max().unwrap_or(0)
    }

    /// Batches an epoch has; the last one may be smaller.
    pub fn steps_per_epoch(&self, batch: usize) -> usize {
        self.len().div_ceil(batch)
    }
}

/// A data set in the making.
struct Reader {
    data: Dataset,
    reading: Reading,
    max_tokens: usize,
    /// Place, length and goal of the first example that was dropped.
    first_dropped: Option<(String, usize, Goal)>,
}

impl Reader {
    fn files<M: Maker>(&mut self, files: &[PathBuf], maker: &M) -> Result<(), DataError> {
        for path in files {
            let before = self.data.len();
            self.data.sources.push(Source { path: path.clone(), examples: 0 });
            self.file(&File::open(path)?, maker, files.len() > 1)?;
            let examples = self.data.len() - before;
            self.data.sources.last_mut().expect("it was pushed above").examples = examples;
        }
        Ok(())
    }

    /// `several` says that a place needs the file's name.
    fn file<M: Maker>(&mut self, file: &File, maker: &M, several: bool) -> Result<(), DataError> {
        let path = &file.path;
        let rows = maker.open(file)?;
        if let Some((line, names)) = &rows.header {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            maker.check(&names).map_err(|message| DataError::at(path, Fault::fatal(At::Line(*line), message)))?;
        }
        let left_out = &mut self.data.left_out;
        left_out.texts += rows.left_out.texts;
        left_out.entries += rows.left_out.entries;
        left_out.header |= rows.left_out.header;
        let (mut drafts, mut at_top, mut any) = (vec![], rows.implied, false);
        for row in rows {
            any = true;
            let top = std::mem::take(&mut at_top);
            let draft = row.and_then(|row| {
                let draft = maker.draft(&row, top).map_err(|message| Fault::row(row.at.clone(), message))?;
                Ok((row.at, draft))
            });
            match draft {
                Ok(draft) => drafts.push(draft),
                Err(fault) => self.bad(path, fault)?,
            }
            if drafts.len() == TOGETHER {
                self.encode(path, maker, std::mem::take(&mut drafts), several)?;
            }
        }
        if !any {
            return Err(DataError::Empty { path: path.clone(), message: maker.empty().into() });
        }
        self.encode(path, maker, drafts, several)
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
                Ok(placed) => self.fit(path, placed, several),
                Err(fault) => self.bad(path, fault)?,
            }
        }
        Ok(())
    }

    /// Leaves a row out, or gives it as the error that it is.
    fn bad(&mut self, path: &Path, fault: Fault) -> Result<(), DataError> {
        let fatal = fault.fatal;
        let error = DataError::at(path, fault);
        if fatal || !self.reading.skip_bad {
            return Err(error);
        }
        self.data.skipped += 1;
        self.data.first_skipped.get_or_insert_with(|| error.to_string());
        Ok(())
    }

    /// Cuts what is too long. A classifier's sequence keeps its last token, the closing mark. What the cut leaves
    /// nothing to learn from is dropped, a continuation without a token to predict or marks without a sentence.
    fn fit(&mut self, path: &Path, Placed { at, mut example, length }: Placed, several: bool) {
        let place = || match several {
            true => format!("{}, {at}", path.display()),
            false => at.to_string(),
        };
        let (data, limit) = (&mut self.data, self.max_tokens);
        data.lengths.push(u32::try_from(length).unwrap_or(u32::MAX));
        if length > limit {
            data.cut += 1;
            // A pair comes here cut already.
            if example.ids.len() > limit {
                if let Goal::Class(_) = example.goal {
                    let last = example.ids.len() - 1;
                    example.ids.swap(limit.saturating_sub(1), last);
                }
                example.ids.truncate(limit);
                example.types.truncate(limit);
            }
            let left = match example.goal {
                Goal::Continuation { .. } => example.targets() > 0,
                Goal::Class(_) => example.ids.len() > MARKS,
            };
            if !left {
                data.dropped += 1;
                self.first_dropped.get_or_insert_with(|| (place(), length, example.goal));
                return;
            }
        }
        if data.places.len() < PLACES {
            data.places.push(place());
        }
        data.examples.push(example);
    }

    /// The data set; an error if nothing is left of it.
    fn finish(self) -> Result<Dataset, DataError> {
        let data = self.data;
        match (self.first_dropped, &data.first_skipped) {
            _ if !data.is_empty() => Ok(data),
            (Some((place, length, goal)), _) => {
                let (left, from) = match goal {
                    Goal::Continuation { from } => ("no target", format!(", its first target is number {}", from + 2)),
                    Goal::Class(_) => ("no sentence", String::new()),
                };
                let (path, count, limit) = (data.name().into(), data.dropped, self.max_tokens);
                Err(DataError::TooLong { path, count, limit, left, place, length, from })
            }
            (None, Some(first)) => Err(DataError::AllBad { count: data.skipped, first: first.clone() }),
            (None, None) => Ok(data),
        }
    }
}

#[cfg(test)]
mod tasks;
#[cfg(test)]
mod tests;
