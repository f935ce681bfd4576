//! Reads the files of a tokenizer, all of which are converted to the form of `tokenizer.json`.

use std::collections::HashSet;
use std::fmt::Display;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use peft_runtime::gguf::is_gguf;
use peft_runtime::{RuntimeError, json as outside};
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer as Library;

use super::classes::{self, Class, TokenizerKind};
use super::gguf::{self, Contained};
use super::settings::{Declared, Settings, entries, refused, strip_fast};
use super::template::Templates;
use crate::contained::contained;
use crate::data::DataError;

/// The largest depth of nested arrays and objects in a file. The library reads them by recursion, so deeper files could
/// exhaust the stack.
const MAX_DEPTH: usize = 32;

/// A tokenizer that was read, with the settings beside it.
pub struct Opened {
    /// The tokenizer of the library `tokenizers`.
    pub library: Library,
    /// The file of its vocabulary.
    pub source: PathBuf,
    /// The setting `model_max_length`, in tokens.
    pub max_length: Option<u64>,
    /// The chat templates, if there are any.
    pub templates: Option<Templates>,
    /// Notes for the user, about settings that are not followed.
    pub notes: Vec<String>,
    /// The added tokens that the vocabulary does not hold, in the order of their ids.
    pub behind: Vec<AddedToken>,
}

/// A token that was added behind a vocabulary.
pub struct AddedToken {
    /// The token with its id, in the form of `added_tokens` in a `tokenizer.json`.
    pub token: Value,
    /// The key and file that it is from, for messages.
    pub from: String,
}

impl AddedToken {
    /// The token's text.
    pub fn content(&self) -> &str {
        self.token["content"].as_str().unwrap_or_default()
    }

    /// The token's id.
    pub fn id(&self) -> u64 {
        self.token["id"].as_u64().unwrap_or(0)
    }

    /// The token for messages, such as `` `[PAD]` (50257, `pad_token` of its settings) ``.
    pub fn describe(&self) -> String {
        format!("`{}` ({}, {})", self.content(), self.id(), self.from)
    }
}

/// Files of formats that are not read, and what they are.
const FOREIGN: [(&str, &str); 6] = [
    ("tokenizer.model", "a sentencepiece model"),
    ("spiece.model", "a sentencepiece model"),
    ("sentencepiece.bpe.model", "a sentencepiece model"),
    ("spm.model", "a sentencepiece model"),
    ("tiktoken.model", "a tiktoken vocabulary"),
    ("tekken.json", "Mistral's tekken vocabulary"),
];

/// Reads the tokenizer at `path`: a `tokenizer.json`, a GGUF file, or a folder as transformers reads it. A folder holds
/// `tokenizer.json`, else `vocab.json` with `merges.txt`, else `vocab.txt`, each with `tokenizer_config.json` and other
/// settings.
///
/// # Errors
///
/// There is no tokenizer, its format is not supported, or a file is damaged.
pub fn open(path: &Path) -> Result<Opened, DataError> {
    if is_gguf(path) {
        let Contained { json, templates } = gguf::read(path)?;
        let opened = build((json, path.to_owned(), Settings::none(path)))?;
        return Ok(Opened { templates, ..opened });
    }
    build(describe(path)?)
}

/// Builds the tokenizer from its description.
fn build((mut json, source, settings): Description) -> Result<Opened, DataError> {
    // Files often hold padding and truncation settings of an earlier use, which do not apply here.
    json.retain(|key, _| key != "padding" && key != "truncation");
    let mut notes = classes::apply(&mut json, &settings, &source)?;
    check_limits(&json).map_err(|message| malformed(&source, message))?;
    notes.extend(setting_notes(&settings)?);
    let split = settings.flag("split_special_tokens")?.unwrap_or(false);
    let added = json.get("added_tokens").cloned().unwrap_or_default();
    let library = contained("tokenizers", || {
        let mut library: Library = serde_json::from_value(Value::Object(json)).map_err(|e| e.to_string())?;
        library.set_encode_special_tokens(split);
        Ok(library)
    });
    let library = library.and_then(|loaded| loaded).map_err(|message| malformed(&source, message))?;
    check_added_ids(&added, &library).map_err(|message| malformed(&source, message))?;
    let words = library.get_vocab(false);
    let new =
        |token: &&Value| token["content"].as_str().is_some_and(|token| !token.is_empty() && !words.contains_key(token));
    let described = |token: &Value| {
        let from = settings.origin(token["content"].as_str().unwrap_or_default());
        AddedToken { token: token.clone(), from }
    };
    let behind: Vec<AddedToken> = added.as_array().into_iter().flatten().filter(new).map(described).collect();
    // If a vocabulary skips ids, its length is the id of one of its tokens, which an added token would take.
    let both = behind.iter().find_map(|b| Some((b, words.iter().find(|(_, id)| u64::from(**id) == b.id())?.0)));
    if let Some((b, word)) = both {
        let message = format!(
            "{} has the id of `{word}`: the vocabulary skips ids or has a token twice, and added tokens count \
             on from its length; fetch it again",
            b.describe()
        );
        return Err(malformed(&source, message));
    }
    let templates = match &settings.folder {
        Some(folder) => Templates::of_folder(folder, &settings)?,
        None => None,
    };
    let templates = templates.map(|found| Templates { tokens: settings.variables(), ..found });
    Ok(Opened { library, source, max_length: settings.max_length(), templates, notes, behind })
}

/// A tokenizer in the form of `tokenizer.json`, the file of its vocabulary, and its settings.
type Description = (Map<String, Value>, PathBuf, Settings);

/// Reads the description of the tokenizer at a path other than a GGUF file.
fn describe(path: &Path) -> Result<Description, DataError> {
    if path.is_dir() {
        return describe_folder(path);
    }
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if let Some((_, what)) = FOREIGN.iter().find(|(foreign, _)| *foreign == name) {
        return Err(foreign(path, what));
    }
    // The path of one of a tokenizer's files means its folder.
    let part = ["tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"].contains(&&*name) && path.is_file();
    match path.parent() {
        Some(folder) if part && folder.as_os_str().is_empty() => describe_folder(Path::new(".")),
        Some(folder) if part => describe_folder(folder),
        _ => Ok((object(path)?, path.to_owned(), Settings::none(path))),
    }
}

/// Reads the description of the tokenizer in a folder.
fn describe_folder(folder: &Path) -> Result<Description, DataError> {
    let [json, vocabulary, merges, pieces] =
        ["tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"].map(|name| folder.join(name));
    if there(&json) {
        return Ok((object(&json)?, json, Settings::read(folder)?));
    }
    // The class replaces the parts around the model later; these are placeholders of the right type.
    let (source, kind, normalizer, pre_tokenizer, model) = if there(&vocabulary) && there(&merges) {
        let model = read_bpe(&vocabulary, &merges)?;
        (vocabulary, TokenizerKind::ByteLevelBpe, Value::Null, json!({"type": "ByteLevel"}), model)
    } else if there(&pieces) {
        let model = read_word_pieces(&pieces)?;
        (
            pieces,
            TokenizerKind::WordPiece,
            json!({"type": "BertNormalizer"}),
            json!({"type": "BertPreTokenizer"}),
            model,
        )
    } else {
        return Err(no_tokenizer(folder));
    };
    let mut settings = Settings::read(folder)?;
    let fits = |class: &Class| match class.kind {
        TokenizerKind::WordPiece | TokenizerKind::ByteLevelBpe => class.kind == kind,
        TokenizerKind::RobertaBpe => kind == TokenizerKind::ByteLevelBpe,
        _ => false,
    };
    // A named class takes precedence over the `model_type`, since these files do not describe a whole tokenizer.
    if let Some(name) = &settings.named {
        settings.declared = Declared::ByName(strip_fast(name).to_owned());
    }
    match (&settings.declared, settings.declared.class()) {
        (_, Some(class)) if fits(class) => {}
        (Declared::ByName(_), _) => return Err(unread(&source, &settings.declared)),
        (Declared::ByModel { class, .. }, None) if Class::unknown(class) => {
            return Err(unread(&source, &settings.declared));
        }
        // The kind of the files is more specific than a `model_type`.
        _ => settings.declared = Declared::ByFiles(Class::of_files(kind, &model)),
    }
    let parts = [
        ("version", "1.0".into()),
        ("normalizer", normalizer),
        ("pre_tokenizer", pre_tokenizer),
        ("post_processor", Value::Null),
        ("decoder", Value::Null),
        ("model", model),
    ];
    Ok((parts.map(|(key, part)| (key.to_owned(), part)).into_iter().collect(), source, settings))
}

/// Reads a byte-level BPE model from `vocab.json`, an object of ids by token, and `merges.txt`, two tokens on each
/// line.
fn read_bpe(vocabulary: &Path, merges: &Path) -> Result<Value, DataError> {
    let vocab = object(vocabulary)?;
    let text = text(merges)?;
    let mut pairs = vec![];
    let mut made = HashSet::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.is_empty() || line.starts_with("#version") {
            continue;
        }
        let fault = |why: String| malformed(merges, format!("line {number}, `{line}`, {why}"));
        let Some((first, second)) = line
            .split_once(' ')
            .filter(|(first, second)| !first.is_empty() && !second.is_empty() && !second.contains(' '))
        else {
            return Err(fault("is not two tokens and a space".into()));
        };
        let whole = format!("{first}{second}");
        if let Some(lacking) = [first, second, &whole].into_iter().find(|token| !vocab.contains_key(*token)) {
            return Err(fault(format!(
                "uses `{lacking}`, which `vocab.json` does not have: either file is truncated or another model's; \
                 fetch both again"
            )));
        }
        pairs.push(json!([first, second]));
        made.insert(whole);
    }
    // No merge produces special tokens and words that a user added, but these are a small part of a vocabulary.
    let longer = |token: &&String| token.chars().nth(1).is_some();
    let words = vocab.keys().filter(longer).count();
    if words - made.len() > words / 2 && words - made.len() > MAX_UNMERGED {
        return Err(malformed(
            merges,
            format!(
                "it produces {} of the {words} tokens of `vocab.json` that are longer than a character: it is \
                 truncated, or another model's; fetch it again",
                made.len()
            ),
        ));
    }
    Ok(json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": pairs,
    }))
}

/// The number of tokens that a vocabulary of any size may have without a merge that produces them.
const MAX_UNMERGED: usize = 256;

/// Reads a WordPiece model from `vocab.txt`, with a token on each line. The number of the line, from 0, is the token's
/// id.
fn read_word_pieces(path: &Path) -> Result<Value, DataError> {
    let text = text(path)?;
    // Whitespace at the end of a line is not part of the token.
    let ids = text.lines().zip(0u32..).map(|(token, id)| (token.trim_end().to_owned(), id.into()));
    let ids: Map<String, Value> = ids.collect();
    Ok(json!({
        "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": ids,
    }))
}

/// Checks for nesting that the library cannot read, and for BPE dropout, which would make ids random.
fn check_limits(json: &Map<String, Value>) -> Result<(), String> {
    fn depth(value: &Value) -> usize {
        match value {
            Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
            Value::Object(items) => 1 + items.values().map(depth).max().unwrap_or(0),
            _ => 0,
        }
    }
    if let Some((key, _)) = json.iter().find(|(_, value)| depth(value) > MAX_DEPTH) {
        return Err(format!("`{key}` holds lists and objects nested deeper than {MAX_DEPTH}"));
    }
    match json.get("model").and_then(|model| model.get("dropout")) {
        Some(Value::Number(dropout)) if dropout.as_f64() != Some(0.0) => Err(format!(
            "its `model.dropout` is {dropout}: merges would be left out at random, and ids differ from run to run; \
             set it to null"
        )),
        _ => Ok(()),
    }
}

/// Checks that every added token has the id in the file. The library ignores these ids and numbers the tokens itself.
fn check_added_ids(added: &Value, library: &Library) -> Result<(), String> {
    for token in added.as_array().into_iter().flatten() {
        let content = token["content"].as_str().unwrap_or_default();
        let (said, found) = (token["id"].as_u64(), library.token_to_id(content).map(u64::from));
        if said != found && !content.is_empty() {
            let shown = |id: Option<u64>| id.map_or("none".into(), |id| id.to_string());
            return Err(format!(
                "its added token `{content}` should have the id {}, and gets {}: added tokens keep the vocabulary's \
                 id, or count on from its end",
                shown(said),
                shown(found)
            ));
        }
    }
    Ok(())
}

/// Notes about settings that transformers follows and peftc does not.
fn setting_notes(settings: &Settings) -> Result<Vec<String>, DataError> {
    let mut notes = vec![];
    if settings.flag("fix_mistral_regex")? == Some(true) {
        let message = "`fix_mistral_regex` is true: transformers then splits text differently from `tokenizer.json`; \
                       save the tokenizer once more with transformers, and remove the key";
        return Err(refused(&settings.path, message));
    }
    if settings.text("truncation_side") == Some("left") {
        notes.push("`truncation_side` is left in its settings; long examples are cut on the right here".into());
    }
    Ok(notes)
}

/// The error for a folder without a tokenizer, with what it holds instead.
fn no_tokenizer(folder: &Path) -> DataError {
    let names = entries(folder);
    let has = |name: &str| names.iter().any(|n| n == name);
    if let Some((name, what)) = FOREIGN.iter().find(|(name, _)| has(name)) {
        return foreign(&folder.join(name), what);
    }
    let incomplete = |message: &str| DataError::NoTokenizer { path: folder.to_owned(), message: message.into() };
    if has("encoder.json") && has("vocab.bpe") {
        return incomplete(
            "`encoder.json` and `vocab.bpe` are the first names of `vocab.json` and `merges.txt`: rename both",
        );
    }
    if has("vocab.json") {
        return incomplete("`vocab.json` is there, but the `merges.txt` that belongs to it is not: fetch it, too");
    }
    if has("merges.txt") {
        return incomplete("`merges.txt` is there, but the `vocab.json` that belongs to it is not: fetch it, too");
    }
    let shown: Vec<String> = names.iter().take(8).map(|name| format!("`{name}`")).collect();
    let held = match &shown[..] {
        [] => "nothing".to_owned(),
        _ => shown.join(", ") + if names.len() > shown.len() { ", …" } else { "" },
    };
    DataError::NoTokenizer {
        path: folder.to_owned(),
        message: format!(
            "it holds {held}, and a tokenizer is `tokenizer.json`, `vocab.json` with `merges.txt`, or `vocab.txt`; \
             copy the model's own there, or name its folder with `--tokenizer`"
        ),
    }
}

/// The error for a file of a format that is not read.
fn foreign(path: &Path, what: &str) -> DataError {
    malformed(path, format!("it is {what}, which is not read here; {}", resave(path)))
}

/// The error for vocabulary files of a class that is not known.
fn unread(source: &Path, declared: &Declared) -> DataError {
    let message = format!("{}, which is not read from this file", declared.describe());
    malformed(source, format!("{message}; {}", resave(source)))
}

/// The suggestion for converting a tokenizer to a `tokenizer.json` with transformers, if its class can be converted.
fn resave(file: &Path) -> String {
    let folder = file.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let Ok(settings) = Settings::read(folder)
        && let Some(class) = settings.declared.name()
        && classes::PYTHON_ONLY.contains(&class)
    {
        return format!(
            "transformers implements `{class}` only in Python, so it cannot be written as `tokenizer.json` either"
        );
    }
    let folder = folder.display();
    format!(
        "transformers writes it as `tokenizer.json`: python -c \"from transformers import AutoTokenizer as T; \
         T.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )
}

/// Whether the path exists, also as a dangling link, about which reading it then reports an error.
pub fn there(path: &Path) -> bool {
    match path.symlink_metadata() {
        Ok(_) => true,
        Err(error) => error.kind() != ErrorKind::NotFound,
    }
}

/// The text of a file, without a byte order mark.
///
/// # Errors
///
/// The file cannot be read.
pub fn text(path: &Path) -> Result<String, DataError> {
    outside::text(path).map_err(|error| unusable(path, error))
}

/// The JSON object in a file.
///
/// # Errors
///
/// The file cannot be read or does not hold an object.
pub fn object(path: &Path) -> Result<Map<String, Value>, DataError> {
    outside::object(path).map_err(|error| unusable(path, error))
}

/// An error of the runtime as one about a tokenizer's file.
fn unusable(path: &Path, error: RuntimeError) -> DataError {
    match error {
        RuntimeError::File { message, .. } => malformed(path, message),
        other => malformed(path, other),
    }
}

/// An error about a tokenizer's file.
pub fn malformed(path: &Path, message: impl Display) -> DataError {
    DataError::Tokenizer { path: path.to_owned(), message: message.to_string() }
}
