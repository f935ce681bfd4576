//! A tokenizer with a task's special tokens: those that it has keep their ids, others follow behind its own.

use std::path::{Path, PathBuf};

use peft_grammar::model::{Task, TaskKind};
use rayon::prelude::*;
use tokenizers::Tokenizer as Library;

use super::DataError;
use crate::hub::tokenizer::{Opened, contained, open};

pub struct Tokenizer {
    library: Library,
    source: PathBuf,
    /// Behind the largest id of the tokenizer itself; the task's new tokens have the ids from here on.
    own: u64,
    /// Rows of the model's token embedding.
    rows: u64,
    /// The task's special tokens with their ids.
    special: Vec<(String, u64)>,
    chat_template: Option<String>,
    notes: Vec<String>,
}

impl Tokenizer {
    /// Reads a tokenizer as [`open`] does. `rows` is the number of rows of the model's token embedding, for the
    /// tokenizer's own tokens and the task's new ones; rows beyond both are padding.
    ///
    /// New tokens have ids from the tokenizer's length on, in the order of the task, as transformers' `add_tokens` gives
    /// them. They stand only where the template writes them: the same characters within a text are text.
    pub fn load(path: &Path, task: &Task, rows: u64) -> Result<Self, DataError> {
        let Opened { library, source, max_length, chat_template, mut notes } = open(path)?;
        let ids = library.get_vocab(true);
        let own = ids.values().max().map_or(0, |&id| u64::from(id) + 1);
        let mut next = own..;
        let special: Vec<(String, u64)> = task
            .special()
            .iter()
            .filter_map(|token| {
                let id = library.token_to_id(token).map(u64::from).or_else(|| next.next())?;
                Some((token.clone(), id))
            })
            .collect();
        if next.start > rows {
            return Err(DataError::Vocabulary { path: source, found: own, special: next.start - own, wanted: rows });
        }
        if let Some(limit) = max_length.filter(|&limit| limit < task.max_tokens) {
            notes.push(format!(
                "its `model_max_length` is {limit}, less than the {} of `task.max_tokens`",
                task.max_tokens
            ));
        }
        let tokenizer = Tokenizer { library, source, own, rows, special, chat_template, notes };
        if let TaskKind::Classification { .. } = task.kind {
            tokenizer.check_marks()?;
        }
        Ok(tokenizer)
    }

    /// A classifier's sentences stand between marks such as `[CLS]` and `[SEP]`, which the tokenizer adds.
    fn check_marks(&self) -> Result<(), DataError> {
        let length = |marks| Ok(self.encode(vec!["a"], marks)?.remove(0).len());
        if length(true)? != length(false)? + 2 {
            return Err(self.unusable(
                "it puts no opening and closing mark (`[CLS]`, `[SEP]`) around a sentence: \
                 its `post_processor` is missing or of another model",
            ));
        }
        Ok(())
    }

    /// Ids of each text, computed in parallel; `marks` adds the model's own sentence marks. Text is taken as it stands,
    /// blanks at its ends included. The settings `add_bos_token` and `add_eos_token` are of the marks.
    pub fn encode(&self, texts: Vec<&str>, marks: bool) -> Result<Vec<Vec<i32>>, DataError> {
        let one = |text: &&str| {
            let encoding = self.library.encode_fast(*text, marks).map_err(|e| e.to_string())?;
            match encoding.get_ids().iter().find(|&&id| u64::from(id) >= self.rows) {
                Some(id) => Err(format!("it gives the id {id}, and the model has {} tokens", self.rows)),
                None => Ok(encoding.get_ids().iter().map(|&id| id as i32).collect()),
            }
        };
        let part = |texts: &[&str]| contained(|| texts.iter().map(one).collect::<Result<Vec<_>, _>>()).and_then(|r| r);
        let parts: Result<Vec<Vec<_>>, String> = texts.par_chunks(64).map(part).collect();
        Ok(parts.map_err(|message| self.unusable(&message))?.into_iter().flatten().collect())
    }

    fn unusable(&self, message: &str) -> DataError {
        DataError::Tokenizer { path: self.source.clone(), message: message.into() }
    }

    /// The id of one of the task's special tokens.
    pub fn special(&self, token: &str) -> Option<i32> {
        self.special.iter().find(|(t, _)| t == token).map(|(_, id)| *id as i32)
    }

    /// How many of the task's special tokens the tokenizer did not have: rows that no checkpoint holds.
    pub fn appended(&self) -> u64 {
        self.special.iter().filter(|(_, id)| *id >= self.own).count() as u64
    }

    /// Tokens altogether, the task's included.
    pub fn vocabulary(&self) -> usize {
        (self.own + self.appended()) as usize
    }

    /// The model's own Jinja template of conversations, where a GGUF file holds one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The file that holds the vocabulary.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// One line for the person on the file, its size and the task's tokens, and one on each setting to know about.
    pub fn describe(&self) -> String {
        let mut line = format!("tokenizer: {}, {} tokens", self.source.display(), self.own);
        match self.appended() {
            0 => {}
            1 => line += &format!("; the task's new one has the id {}", self.own),
            new => line += &format!("; the task's {new} new ones have the ids {} to {}", self.own, self.own + new - 1),
        }
        let known = self.special.iter().filter(|(_, id)| *id < self.own);
        let known: Vec<String> = known.map(|(token, id)| format!("`{token}` ({id})")).collect();
        if !known.is_empty() {
            line += &format!("; the model's own in the task: {}", known.join(", "));
        }
        let spare = self.rows - self.vocabulary() as u64;
        if spare > 0 {
            line += &format!("; {spare} rows of the model's {} are left over", self.rows);
        }
        let notes = self.notes.iter().map(|note| format!("\ntokenizer: {note}"));
        line + &notes.collect::<String>()
    }
}
