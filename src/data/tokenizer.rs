//! A Hugging Face tokenizer and the special tokens a task adds behind its vocabulary.

use std::path::{Path, PathBuf};

use peft_grammar::model::{Task, TaskKind};
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{PreTokenizerWrapper, Tokenizer as Library};

use super::DataError;

pub struct Tokenizer {
    library: Library,
    source: PathBuf,
    /// Ids from here on are the task's special tokens, in their order.
    own: u32,
    special: Vec<String>,
}

impl Tokenizer {
    /// From a `tokenizer.json`, or a directory that holds one (or `vocab.json` and `merges.txt`).
    /// `vocab` is the number of rows of the model's token embedding: its own tokens and the task's.
    pub fn load(path: &Path, task: &Task, vocab: u64) -> Result<Self, DataError> {
        let (mut library, source) = open(path)?;
        // Files often hold the padding and the cut of their last user; sequences here have neither.
        library.with_padding(None);
        library.with_truncation(None).map_err(|e| broken(&source, e))?;
        if let Some(PreTokenizerWrapper::ByteLevel(level)) = library.get_pre_tokenizer() {
            let raw = level.add_prefix_space(false);
            library.with_pre_tokenizer(Some(raw));
        }

        let special = match &task.kind {
            TaskKind::Generation { special, .. } => special.clone(),
            TaskKind::Classification { .. } => Vec::new(),
        };
        let own = library.get_vocab_size(true);
        if (own + special.len()) as u64 != vocab {
            let (found, special) = (own as u64, special.len() as u64);
            return Err(DataError::Vocabulary { path: source, found, special, wanted: vocab });
        }
        if let Some((token, id)) = special.iter().find_map(|t| Some((t.clone(), library.token_to_id(t)?))) {
            return Err(DataError::SpecialTaken { path: source, token, id });
        }
        let tokenizer = Tokenizer { library, source, own: own as u32, special };
        if let TaskKind::Classification { .. } = task.kind {
            tokenizer.check_marks()?;
        }
        Ok(tokenizer)
    }

    /// A classifier's sentences stand between marks such as `[CLS]` and `[SEP]`, which the tokenizer adds.
    fn check_marks(&self) -> Result<(), DataError> {
        let length = |marks| Ok(self.encode(vec!["a"], marks)?.remove(0).len());
        if length(true)? != length(false)? + 2 {
            let message = "it puts no opening and closing mark (`[CLS]`, `[SEP]`) around a sentence: \
                           its `post_processor` is missing or of another model";
            return Err(DataError::Tokenizer { path: self.source.clone(), message: message.into() });
        }
        Ok(())
    }

    /// Ids of each text, computed in parallel; `marks` adds the model's own sentence marks.
    pub fn encode(&self, texts: Vec<&str>, marks: bool) -> Result<Vec<Vec<i32>>, DataError> {
        let mut ids = Vec::with_capacity(texts.len());
        // In parts: an encoding holds far more than the ids.
        for part in texts.chunks(1024) {
            let part = self.library.encode_batch_fast(part.to_vec(), marks).map_err(|e| broken(&self.source, e))?;
            ids.extend(part.iter().map(|e| e.get_ids().iter().map(|&id| id as i32).collect()));
        }
        Ok(ids)
    }

    /// The id of one of the task's special tokens.
    pub fn special(&self, token: &str) -> Option<i32> {
        let index = self.special.iter().position(|s| s == token)?;
        Some((self.own as usize + index) as i32)
    }

    /// Tokens altogether, special ones included.
    pub fn vocabulary(&self) -> usize {
        self.own as usize + self.special.len()
    }

    pub fn source(&self) -> &Path {
        &self.source
    }
}

fn open(path: &Path) -> Result<(Library, PathBuf), DataError> {
    if !path.is_dir() {
        return Ok((from_json(path)?, path.to_owned()));
    }
    let (json, vocab, merges) = (path.join("tokenizer.json"), path.join("vocab.json"), path.join("merges.txt"));
    if json.is_file() {
        Ok((from_json(&json)?, json))
    } else if vocab.is_file() && merges.is_file() {
        let name = |path: &Path| path.to_string_lossy().into_owned();
        let bpe = BPE::from_file(&name(&vocab), &name(&merges)).build().map_err(|e| broken(&vocab, e))?;
        let mut library = Library::new(bpe);
        library.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        Ok((library, vocab))
    } else {
        Err(DataError::NoTokenizer(path.to_owned()))
    }
}

fn from_json(path: &Path) -> Result<Library, DataError> {
    let bytes = std::fs::read(path).map_err(|source| DataError::Read { path: path.to_owned(), source })?;
    Library::from_bytes(bytes).map_err(|e| broken(path, e))
}

fn broken(path: &Path, error: impl std::fmt::Display) -> DataError {
    DataError::Tokenizer { path: path.to_owned(), message: error.to_string() }
}
