//! A tokenizer with a task's special tokens: those that it has keep their ids, others follow behind its own.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use peft_grammar::model::{Task, TaskKind};
use rayon::prelude::*;
use serde_json::{Value, json};
use tokenizers::{PostProcessor, Tokenizer as Library, TruncationDirection};

use super::DataError;
use crate::contained::contained;
use crate::hub::tokenizer::{Behind, DEFAULT, Opened, Templates, open};

pub struct Tokenizer {
    library: Library,
    source: PathBuf,
    /// Behind the largest id of the tokenizer itself; the task's new tokens have the ids from here on.
    own: u64,
    /// Rows of the model's token embedding.
    rows: u64,
    /// The task's special tokens with their ids.
    special: Vec<(String, u64)>,
    templates: Option<Templates>,
    /// Tokens of the tokenizer itself that its vocabulary does not have.
    behind: Vec<Behind>,
    notes: Vec<String>,
    marks: Marks,
    /// Words by themselves are not what they are behind a blank.
    blanks: bool,
}

/// A text's ids, and the ranges of them that were asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spanned {
    pub ids: Vec<i32>,
    /// In order, apart from each other, none empty.
    pub spans: Vec<Range<usize>>,
}

/// How many marks such as `[CLS]` and `[SEP]` the tokenizer puts in front of a text and behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    pub opening: usize,
    pub closing: usize,
}

impl Marks {
    pub fn count(self) -> usize {
        self.opening + self.closing
    }
}

/// A text's words, tokenised one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Worded {
    pub ids: Vec<i32>,
    /// The word that each token is of; `None` of a mark.
    pub words: Vec<Option<usize>>,
}

/// A pair of texts as the model sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pair {
    /// Empty if the cut leaves nothing of one of the texts.
    pub ids: Vec<i32>,
    pub types: Vec<i32>,
    /// How many tokens it has uncut.
    pub whole: usize,
    /// The key of a text of which there is no token.
    pub nothing: Option<&'static str>,
}

/// To what lengths texts of `a` and `b` tokens, more than `limit` together, are cut: the longer one to the shorter one's,
/// and from there both.
fn longest_first(a: usize, b: usize, limit: usize) -> (usize, usize) {
    let shorter = a.min(b);
    if 2 * shorter <= limit {
        return if a <= b { (a, limit - a) } else { (limit - b, b) };
    }
    // The odd token is the longer text's, the second's where both are as long.
    let half = limit / 2;
    if a <= b { (half, limit - half) } else { (limit - half, half) }
}

impl Tokenizer {
    /// Reads a tokenizer as [`open`] does. `rows` is the number of rows of the model's token embedding, for the
    /// tokenizer's own tokens and the task's new ones; rows beyond both are padding.
    ///
    /// New tokens have ids from the tokenizer's length on, in the order of the task, as transformers' `add_tokens` gives
    /// them. They stand only where the template writes them: the same characters within a text are text.
    ///
    /// Every token of the vocabulary and of the task has a row. One that was added behind the vocabulary, such as a
    /// padding token, may have none as long as no text holds it.
    pub fn load(path: &Path, task: &Task, rows: u64) -> Result<Self, DataError> {
        let Opened { library, source, max_length, templates, mut notes, behind } = open(path)?;
        let length = |ids: &HashMap<String, u32>| ids.values().max().map_or(0, |&id| u64::from(id) + 1);
        let (words, own) = (length(&library.get_vocab(false)), length(&library.get_vocab(true)));
        let mut next = own..;
        let special: Vec<(String, u64)> = task
            .special()
            .iter()
            .filter_map(|token| {
                let id = library.token_to_id(token).map(u64::from).or_else(|| next.next())?;
                Some((token.clone(), id))
            })
            .collect();
        let rowless: Vec<String> = behind.iter().filter(|b| b.id() >= rows).map(Behind::describe).collect();
        if words > rows || special.iter().any(|(_, id)| *id >= rows) {
            let special = next.start - own;
            // Without these the task's tokens would have rows.
            let behind = if words <= rows { behind.iter().map(Behind::describe).collect() } else { vec![] };
            return Err(DataError::Vocabulary { path: source, found: own, special, wanted: rows, behind });
        }
        if !rowless.is_empty() {
            notes.push(format!(
                "the model's {rows} rows have none for {}; a text that holds such a token is refused",
                rowless.join(", ")
            ));
        }
        if let Some(limit) = max_length.filter(|&limit| limit < task.max_tokens) {
            notes.push(format!(
                "its `model_max_length` is {limit}, less than the {} of `task.max_tokens`",
                task.max_tokens
            ));
        }
        let (marks, blanks) = (Marks::default(), false);
        let mut tokenizer = Tokenizer { library, source, own, rows, special, templates, behind, notes, marks, blanks };
        if task.kind.generates() {
            return Ok(tokenizer);
        }
        tokenizer.marks = tokenizer.marks_around()?;
        if task.enclosed {
            tokenizer.check_marks()?;
        }
        match &task.kind {
            TaskKind::Classification { columns, .. } | TaskKind::Regression { columns }
                if columns.pair.is_some() && task.enclosed =>
            {
                tokenizer.check_pair_marks()?;
            }
            TaskKind::TokenClassification { .. } => tokenizer.blanks = tokenizer.blanks_count()?,
            _ => {}
        }
        Ok(tokenizer)
    }

    fn marks_around(&self) -> Result<Marks, DataError> {
        let [bare, marked] = [false, true].map(|marks| Ok(self.encode(vec!["a"], marks)?.remove(0)));
        let (bare, marked): (Vec<i32>, Vec<i32>) = (bare?, marked?);
        let opening = marked.windows(bare.len().max(1)).position(|part| part == bare).unwrap_or(0);
        Ok(Marks { opening, closing: marked.len().saturating_sub(bare.len() + opening) })
    }

    /// A word behind another one has other tokens than one by itself: the blank in front of it is a part of them.
    fn blanks_count(&self) -> Result<bool, DataError> {
        let text = self.encode(vec!["a a"], false)?.remove(0);
        let mut words = self.encode_words(&[vec!["a", "a"]])?.remove(0).ids;
        words.truncate(words.len().saturating_sub(self.marks.closing));
        Ok(!words.ends_with(&text[text.len().saturating_sub(1)..]))
    }

    /// An encoder's texts stand between marks such as `[CLS]` and `[SEP]`, which the tokenizer adds.
    fn check_marks(&self) -> Result<(), DataError> {
        if self.marks.count() != 2 {
            return Err(self.unusable(
                "it puts no opening and closing mark (`[CLS]`, `[SEP]`) around a sentence: \
                 its `post_processor` is missing or of another model",
            ));
        }
        Ok(())
    }

    /// The two texts of a pair stand behind one another, with marks around and between them.
    fn check_pair_marks(&self) -> Result<(), DataError> {
        let pair = &self.encode_pairs(vec![("a", "a")], usize::MAX)?[0];
        let texts = 2 * self.encode(vec!["a"], false)?.remove(0).len();
        if pair.ids.len() <= texts + self.marks.count() {
            return Err(self.unusable(
                "it puts no marks around and between the texts of a pair (`[CLS] a [SEP] b [SEP]`): its `post_processor` \
                 knows no pairs; leave `pair` out, or take the model's own tokenizer",
            ));
        }
        Ok(())
    }

    /// Pairs of texts with the model's own marks and types, the longer text of each cut token by token to `max_tokens` in
    /// all, as transformers does with `truncation=True`.
    pub fn encode_pairs(&self, pairs: Vec<(&str, &str)>, max_tokens: usize) -> Result<Vec<Pair>, DataError> {
        let one = |pair: &(&str, &str)| self.encode_pair(*pair, max_tokens);
        self.in_parallel(&pairs, 64, one)
    }

    fn encode_pair(&self, (first, second): (&str, &str), max_tokens: usize) -> Result<Pair, String> {
        let text = |text: &str| self.library.encode_fast(text, false).map_err(|e| e.to_string());
        let (mut first, mut second) = (text(first)?, text(second)?);
        let marks = self.library.get_post_processor().map_or(0, |processor| processor.added_tokens(true));
        let (a, b) = (first.len(), second.len());
        let mut pair = Pair { whole: a + b + marks, ..Pair::default() };
        pair.nothing = [(a, "text"), (b, "pair")].into_iter().find(|(length, _)| *length == 0).map(|(_, key)| key);
        if pair.nothing.is_some() || (pair.whole > max_tokens && max_tokens < marks + 2) {
            return Ok(pair);
        }
        if pair.whole > max_tokens {
            let (a, b) = longest_first(a, b, max_tokens - marks);
            for (encoding, length) in [(&mut first, a), (&mut second, b)] {
                encoding.truncate(length, 0, TruncationDirection::Right);
                encoding.take_overflowing();
            }
        }
        second.set_type_ids(vec![1; second.len()]);
        let encoding = self.library.post_process(first, Some(second), true).map_err(|e| e.to_string())?;
        pair.ids = self.known(encoding.get_ids())?;
        pair.types = encoding.get_type_ids().iter().map(|&kind| kind as i32).collect();
        Ok(pair)
    }

    /// Ids for which the model has rows.
    fn known(&self, ids: &[u32]) -> Result<Vec<i32>, String> {
        match ids.iter().find(|&&id| u64::from(id) >= self.rows) {
            Some(&id) => {
                let token = self.library.id_to_token(id).unwrap_or_default();
                Err(format!("a text holds its token `{token}`, whose id is {id}, and the model has {} rows", self.rows))
            }
            None => Ok(ids.iter().map(|&id| id as i32).collect()),
        }
    }

    /// A token as text: the task's own by name, others as they are written, `##ing` or with the blank in front.
    pub fn show(&self, id: i32) -> String {
        let id = id as u32;
        if let Some((token, _)) = self.special.iter().find(|(_, special)| *special == u64::from(id)) {
            return token.clone();
        }
        let token = self.library.id_to_token(id).unwrap_or_else(|| format!("#{id}"));
        match contained("tokenizers", || self.library.decode(&[id], false)) {
            Ok(Ok(text)) if !text.is_empty() && !text.contains('\u{fffd}') => text,
            _ => token,
        }
    }

    /// Ids of each text, computed in parallel; `marks` adds the model's own sentence marks. Text is taken as it stands,
    /// blanks at its ends included. The settings `add_bos_token` and `add_eos_token` are of the marks.
    pub fn encode(&self, texts: Vec<&str>, marks: bool) -> Result<Vec<Vec<i32>>, DataError> {
        let one = |text: &&str| {
            let encoding = self.library.encode_fast(*text, marks).map_err(|e| e.to_string())?;
            self.known(encoding.get_ids())
        };
        self.in_parallel(&texts, 64, one)
    }

    /// Ids of each list of words with the model's own marks, and the word that each is of. Words are tokenised by
    /// themselves, as transformers does with `is_split_into_words=True`, and where blanks count as it does with
    /// `add_prefix_space=True`.
    pub fn encode_words(&self, lists: &[Vec<&str>]) -> Result<Vec<Worded>, DataError> {
        let one = |words: &Vec<&str>| {
            let bare = |word: &str| !self.blanks || word.is_empty() || word.starts_with(' ');
            let spaced = |word: &&str| if bare(word) { word.to_string() } else { format!(" {word}") };
            let words: Vec<String> = words.iter().map(spaced).collect();
            let encoding = self.library.encode(words, true).map_err(|e| e.to_string())?;
            let words = encoding.get_word_ids().iter().map(|word| word.map(|word| word as usize));
            Ok(Worded { ids: self.known(encoding.get_ids())?, words: words.collect() })
        };
        self.in_parallel(lists, 64, one)
    }

    /// Ids of each text without marks, and which tokens the byte ranges of it are, computed in parallel. Ranges are in
    /// order. A token belongs to a range if a part of it does, as transformers has it for `return_assistant_tokens_mask`;
    /// of a character that is several tokens all belong, where transformers leaves out those behind the first if it is a
    /// range's last. Blanks that the tokenizer leaves out of a token's offsets belong to the token.
    pub fn encode_spans(&self, texts: &[(&str, &[Range<usize>])]) -> Result<Vec<Spanned>, DataError> {
        let one = |(text, ranges): &(&str, &[Range<usize>])| {
            let encoding = self.library.encode(*text, false).map_err(|e| e.to_string())?;
            let ids = self.known(encoding.get_ids())?;
            let mut spans: Vec<Range<usize>> = vec![];
            let mut reached = 0;
            let bounds: Vec<Range<usize>> = encoding
                .get_offsets()
                .iter()
                .map(|&(start, end)| {
                    let start = start.min(reached);
                    reached = reached.max(end);
                    start..end.max(start)
                })
                .collect();
            for range in ranges.iter().filter(|range| !range.is_empty()) {
                let inside = |token: &Range<usize>| token.start < range.end && range.start < token.end;
                let Some(first) = bounds.iter().position(inside) else { continue };
                let end = bounds.iter().rposition(inside).map_or(first, |last| last + 1);
                match spans.last_mut() {
                    Some(before) if before.end >= first => before.end = before.end.max(end),
                    _ => spans.push(first..end),
                }
            }
            Ok(Spanned { ids, spans })
        };
        self.in_parallel(texts, 16, one)
    }

    /// What `one` makes of each item, `size` of them at a time on a thread. A panic of the library is an error.
    fn in_parallel<I: Sync, O: Send>(
        &self,
        items: &[I],
        size: usize,
        one: impl Fn(&I) -> Result<O, String> + Sync,
    ) -> Result<Vec<O>, DataError> {
        let part = |items: &[I]| {
            contained("tokenizers", || items.iter().map(&one).collect::<Result<Vec<_>, _>>()).and_then(|r| r)
        };
        let parts: Result<Vec<Vec<O>>, String> = items.par_chunks(size).map(part).collect();
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

    /// The model's own Jinja template of conversations.
    pub fn chat_template(&self) -> Option<&str> {
        self.templates.as_ref()?.get(DEFAULT)
    }

    /// The model's Jinja templates of conversations, where it has any.
    pub fn templates(&self) -> Option<&Templates> {
        self.templates.as_ref()
    }

    /// The texts of the tokens that are found in a text before it is split: special ones, and others that were added.
    pub fn added(&self) -> Vec<String> {
        self.library.get_added_tokens_decoder().into_values().map(|token| token.content).collect()
    }

    /// Every token with its id, the task's included.
    pub fn ids(&self) -> BTreeMap<String, u64> {
        let own = self.library.get_vocab(true).into_iter().map(|(token, id)| (token, id.into()));
        own.chain(self.special.iter().cloned()).collect()
    }

    /// The tokens that the vocabulary does not have, the task's included, in the order of their ids and as `added_tokens`
    /// of a `tokenizer.json` has them.
    pub fn behind(&self) -> Vec<Value> {
        let new = self.special.iter().filter(|(_, id)| *id >= self.own).map(|(token, id)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        });
        self.behind.iter().map(|behind| behind.token.clone()).chain(new).collect()
    }

    /// The marks around a text; none where the task generates.
    pub fn marks(&self) -> Marks {
        self.marks
    }

    /// How many rows the model's token embedding has.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// A hash of all that the ids of a text depend on.
    pub fn fingerprint(&self) -> String {
        let mut hash = blake3::Hasher::new();
        let own = self.library.to_string(false).expect("what was read can be written");
        hash.update(own.as_bytes());
        hash.update(
            format!(
                "{:?}",
                (self.library.get_encode_special_tokens(), self.own, self.rows, &self.special, &self.templates)
            )
            .as_bytes(),
        );
        hash.finalize().to_hex().to_string()
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
        let spare = self.rows.saturating_sub(self.vocabulary() as u64);
        if spare > 0 {
            line += &format!("; {spare} rows of the model's {} are left over", self.rows);
        }
        let notes = self.notes.iter().map(|note| format!("\ntokenizer: {note}"));
        line + &notes.collect::<String>()
    }
}
