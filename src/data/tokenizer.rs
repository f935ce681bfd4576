//! A tokenizer extended by a task's special tokens: existing tokens keep their ids, new ones follow the tokenizer's
//! own.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use peft_grammar::model::{Task, TaskKind};
use rayon::prelude::*;
use serde_json::{Value, json};
use tokenizers::{PostProcessor, Tokenizer as Library, TruncationDirection};

use super::DataError;
use crate::contained::contained;
use crate::hub::tokenizer::{AddedToken, DEFAULT, Opened, Templates, open};

/// A tokenizer and the task's special tokens.
pub struct Tokenizer {
    library: Library,
    source: PathBuf,
    /// One more than the tokenizer's largest id. The task's new tokens have the ids from here on.
    own: u64,
    /// The number of rows of the model's token embedding.
    rows: u64,
    /// The task's special tokens with their ids.
    special: Vec<(String, u64)>,
    templates: Option<Templates>,
    /// Added tokens of the tokenizer, which are not in its vocabulary.
    behind: Vec<AddedToken>,
    notes: Vec<String>,
    marks: Marks,
    /// Whether the tokenizer tokenises a word differently after a blank, so that blanks have to be added in front of
    /// words.
    blank_sensitive: bool,
}

/// A text's ids, and the token ranges that correspond to the requested byte ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncodedSpans {
    pub ids: Vec<i32>,
    /// The ranges are in order, disjoint, and not empty.
    pub spans: Vec<Range<usize>>,
}

/// The number of special tokens such as `[CLS]` and `[SEP]` that the tokenizer adds before and after a text.
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

/// A list of words, tokenised one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncodedWords {
    pub ids: Vec<i32>,
    /// The index of the word of each token, or `None` for a special token.
    pub words: Vec<Option<usize>>,
}

/// A tokenised pair of texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pair {
    /// The ids. They are empty if truncation leaves nothing of one of the texts.
    pub ids: Vec<i32>,
    pub types: Vec<i32>,
    /// The number of tokens before truncation.
    pub untruncated: usize,
    /// The key of a text for which the tokenizer gave no token.
    pub empty_text: Option<&'static str>,
}

/// The lengths to which texts of `a` and `b` tokens, more than `limit` together, are truncated: first the longer text
/// to the length of the shorter one, then both alike.
fn longest_first(a: usize, b: usize, limit: usize) -> (usize, usize) {
    let shorter = a.min(b);
    if 2 * shorter <= limit {
        return if a <= b { (a, limit - a) } else { (limit - b, b) };
    }
    // If `limit` is odd, the remaining token goes to the longer text, or to the second one if both are equally long.
    let half = limit / 2;
    if a <= b { (half, limit - half) } else { (limit - half, half) }
}

impl Tokenizer {
    /// Reads a tokenizer as [`open`] does. `rows` is the number of rows of the model's token embedding, which holds the
    /// tokenizer's own tokens and the task's new ones. Further rows are padding.
    ///
    /// New tokens have ids from the tokenizer's length on, in the order of the task, as transformers' `add_tokens`
    /// assigns them. They occur only where the template writes them; the same characters inside a text are ordinary
    /// text.
    ///
    /// Every token of the vocabulary and of the task needs a row. An added token that follows the vocabulary, such as a
    /// padding token, may have none unless a text contains it.
    ///
    /// # Errors
    ///
    /// The tokenizer cannot be read, has more tokens than the model has rows, or adds no special tokens where the model
    /// expects them.
    pub fn load(path: &Path, task: &Task, rows: u64) -> Result<Self, DataError> {
        let Opened { library, source, max_length, templates, mut notes, behind } = open(path)?;
        let length = |ids: &HashMap<String, u32>| ids.values().max().map_or(0, |&id| u64::from(id) + 1);
        let (words, own) = (length(&library.get_vocab(false)), length(&library.get_vocab(true)));
        let mut next = own..;
        let special: Vec<(String, u64)> = task
            .special_tokens()
            .iter()
            .filter_map(|token| {
                let id = library.token_to_id(token).map(u64::from).or_else(|| next.next())?;
                Some((token.clone(), id))
            })
            .collect();
        let rowless: Vec<String> = behind.iter().filter(|b| b.id() >= rows).map(AddedToken::describe).collect();
        if words > rows || special.iter().any(|(_, id)| *id >= rows) {
            let special = next.start - own;
            // Without the added tokens the task's tokens would have rows.
            let behind = if words <= rows { behind.iter().map(AddedToken::describe).collect() } else { vec![] };
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
        let (marks, blank_sensitive) = (Marks::default(), false);
        let mut tokenizer =
            Tokenizer { library, source, own, rows, special, templates, behind, notes, marks, blank_sensitive };
        if task.kind.generates() {
            return Ok(tokenizer);
        }
        tokenizer.marks = tokenizer.count_marks()?;
        if task.bidirectional {
            tokenizer.check_marks()?;
        }
        match &task.kind {
            TaskKind::Classification { columns, .. } | TaskKind::Regression { columns }
                if columns.pair.is_some() && task.bidirectional =>
            {
                tokenizer.check_pair_marks()?;
            }
            TaskKind::TokenClassification { .. } => tokenizer.blank_sensitive = tokenizer.is_blank_sensitive()?,
            _ => {}
        }
        Ok(tokenizer)
    }

    fn count_marks(&self) -> Result<Marks, DataError> {
        let [bare, marked] = [false, true].map(|marks| Ok(self.encode(vec!["a"], marks)?.remove(0)));
        let (bare, marked): (Vec<i32>, Vec<i32>) = (bare?, marked?);
        let opening = marked.windows(bare.len().max(1)).position(|part| part == bare).unwrap_or(0);
        Ok(Marks { opening, closing: marked.len().saturating_sub(bare.len() + opening) })
    }

    /// Whether a word after another word has other tokens than the word by itself, because its tokens include the
    /// blank.
    fn is_blank_sensitive(&self) -> Result<bool, DataError> {
        let text = self.encode(vec!["a a"], false)?.remove(0);
        let mut words = self.encode_words(&[vec!["a", "a"]])?.remove(0).ids;
        words.truncate(words.len().saturating_sub(self.marks.closing));
        Ok(!words.ends_with(&text[text.len().saturating_sub(1)..]))
    }

    /// Requires the tokenizer to put special tokens such as `[CLS]` and `[SEP]` around a text, as encoders expect.
    fn check_marks(&self) -> Result<(), DataError> {
        if self.marks.count() != 2 {
            return Err(self.unusable(
                "it puts no opening and closing mark (`[CLS]`, `[SEP]`) around a sentence: \
                 its `post_processor` is missing or of another model",
            ));
        }
        Ok(())
    }

    /// Requires the tokenizer to put special tokens around and between the two texts of a pair.
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

    /// Encodes pairs of texts with the model's special tokens and types. A pair is truncated token by token to
    /// `max_tokens` in all, the longer text first, as transformers does with `truncation=True`.
    ///
    /// # Errors
    ///
    /// The tokenizer fails, or gives an id for which the model has no row.
    pub fn encode_pairs(&self, pairs: Vec<(&str, &str)>, max_tokens: usize) -> Result<Vec<Pair>, DataError> {
        let one = |pair: &(&str, &str)| self.encode_pair(*pair, max_tokens);
        self.in_parallel(&pairs, 64, one)
    }

    fn encode_pair(&self, (first, second): (&str, &str), max_tokens: usize) -> Result<Pair, String> {
        let text = |text: &str| self.library.encode_fast(text, false).map_err(|e| e.to_string());
        let (mut first, mut second) = (text(first)?, text(second)?);
        let marks = self.library.get_post_processor().map_or(0, |processor| processor.added_tokens(true));
        let (a, b) = (first.len(), second.len());
        let mut pair = Pair { untruncated: a + b + marks, ..Pair::default() };
        pair.empty_text = [(a, "text"), (b, "pair")].into_iter().find(|(length, _)| *length == 0).map(|(_, key)| key);
        if pair.empty_text.is_some() || (pair.untruncated > max_tokens && max_tokens < marks + 2) {
            return Ok(pair);
        }
        if pair.untruncated > max_tokens {
            let (a, b) = longest_first(a, b, max_tokens - marks);
            for (encoding, length) in [(&mut first, a), (&mut second, b)] {
                encoding.truncate(length, 0, TruncationDirection::Right);
                encoding.take_overflowing();
            }
        }
        second.set_type_ids(vec![1; second.len()]);
        let encoding = self.library.post_process(first, Some(second), true).map_err(|e| e.to_string())?;
        pair.ids = self.check_ids(encoding.get_ids())?;
        pair.types = encoding.get_type_ids().iter().map(|&kind| kind as i32).collect();
        Ok(pair)
    }

    /// Checks that the model has a row for each id.
    fn check_ids(&self, ids: &[u32]) -> Result<Vec<i32>, String> {
        match ids.iter().find(|&&id| u64::from(id) >= self.rows) {
            Some(&id) => {
                let token = self.library.id_to_token(id).unwrap_or_default();
                Err(format!("a text holds its token `{token}`, whose id is {id}, and the model has {} rows", self.rows))
            }
            None => Ok(ids.iter().map(|&id| id as i32).collect()),
        }
    }

    /// A token as text: a task's token by its name, others as the tokenizer writes them, such as `##ing` or with a
    /// leading blank.
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

    /// Encodes texts in parallel. `marks` adds the model's special tokens around each text, to which the settings
    /// `add_bos_token` and `add_eos_token` belong. Texts are not trimmed.
    ///
    /// # Errors
    ///
    /// The tokenizer fails, or gives an id for which the model has no row.
    pub fn encode(&self, texts: Vec<&str>, marks: bool) -> Result<Vec<Vec<i32>>, DataError> {
        let one = |text: &&str| {
            let encoding = self.library.encode_fast(*text, marks).map_err(|e| e.to_string())?;
            self.check_ids(encoding.get_ids())
        };
        self.in_parallel(&texts, 64, one)
    }

    /// Encodes lists of words with the model's special tokens, and gives each token's word. Words are tokenised
    /// separately, as transformers does with `is_split_into_words=True`, and if a leading blank changes a word's
    /// tokens, as it does with `add_prefix_space=True`.
    ///
    /// # Errors
    ///
    /// The tokenizer fails, or gives an id for which the model has no row.
    pub fn encode_words(&self, lists: &[Vec<&str>]) -> Result<Vec<EncodedWords>, DataError> {
        let one = |words: &Vec<&str>| {
            let bare = |word: &str| !self.blank_sensitive || word.is_empty() || word.starts_with(' ');
            let spaced = |word: &&str| if bare(word) { word.to_string() } else { format!(" {word}") };
            let words: Vec<String> = words.iter().map(spaced).collect();
            let encoding = self.library.encode(words, true).map_err(|e| e.to_string())?;
            let words = encoding.get_word_ids().iter().map(|word| word.map(|word| word as usize));
            Ok(EncodedWords { ids: self.check_ids(encoding.get_ids())?, words: words.collect() })
        };
        self.in_parallel(lists, 64, one)
    }

    /// Encodes texts without special tokens, in parallel, and maps byte ranges of each text to token ranges. Ranges are
    /// in order. A token belongs to a range if the two overlap, as in transformers' `return_assistant_tokens_mask`. If
    /// a character is several tokens, all of them belong to the range, whereas transformers omits all but the first if
    /// the character is the last of a range. A blank that the tokenizer leaves out of a token's offsets belongs to the
    /// token.
    ///
    /// # Errors
    ///
    /// The tokenizer fails, or gives an id for which the model has no row.
    pub fn encode_spans(&self, texts: &[(&str, &[Range<usize>])]) -> Result<Vec<EncodedSpans>, DataError> {
        let one = |(text, ranges): &(&str, &[Range<usize>])| {
            let encoding = self.library.encode(*text, false).map_err(|e| e.to_string())?;
            let ids = self.check_ids(encoding.get_ids())?;
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
            Ok(EncodedSpans { ids, spans })
        };
        self.in_parallel(texts, 16, one)
    }

    /// Maps `one` over the items in parallel, in chunks of `size`. A panic of the library becomes an error.
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

    /// The number of the task's special tokens that the tokenizer did not have. No checkpoint has rows for them.
    pub fn appended(&self) -> u64 {
        self.special.iter().filter(|(_, id)| *id >= self.own).count() as u64
    }

    /// The number of all tokens, including the task's.
    pub fn vocabulary(&self) -> usize {
        (self.own + self.appended()) as usize
    }

    /// The model's default Jinja chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.templates.as_ref()?.get(DEFAULT)
    }

    /// The model's Jinja chat templates, if it has any.
    pub fn templates(&self) -> Option<&Templates> {
        self.templates.as_ref()
    }

    /// The texts of added tokens, special or not, which the tokenizer matches before it splits a text.
    pub fn added(&self) -> Vec<String> {
        self.library.get_added_tokens_decoder().into_values().map(|token| token.content).collect()
    }

    /// Every token with its id, including the task's.
    pub fn ids(&self) -> BTreeMap<String, u64> {
        let own = self.library.get_vocab(true).into_iter().map(|(token, id)| (token, id.into()));
        own.chain(self.special.iter().cloned()).collect()
    }

    /// The tokens that are not in the vocabulary, including the task's, in the order of their ids and in the layout of
    /// `added_tokens` in `tokenizer.json`.
    pub fn behind(&self) -> Vec<Value> {
        let new = self.special.iter().filter(|(_, id)| *id >= self.own).map(|(token, id)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        });
        self.behind.iter().map(|behind| behind.token.clone()).chain(new).collect()
    }

    /// The number of special tokens around a text. It is zero if the task generates.
    pub fn marks(&self) -> Marks {
        self.marks
    }

    /// The number of rows of the model's token embedding.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// A hash of everything that the ids of a text depend on.
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

    /// A summary for the user: one line on the file, its size and the task's tokens, and one line for each note.
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
