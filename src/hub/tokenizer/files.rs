//! Files that hold a tokenizer, each brought to the form of `tokenizer.json`.

use std::collections::HashSet;
use std::fmt::Display;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use peft_runtime::gguf::is_gguf;
use peft_runtime::{RuntimeError, json as outside};
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer as Library;

use super::classes::{self, Class, Form};
use super::contained::contained;
use super::gguf::{self, Contained};
use super::settings::{Declared, Settings, entries, refused, unfast};
use super::template::Templates;
use crate::data::DataError;

/// Arrays and objects inside each other beyond which a file is refused: the library reads them by recursion.
const DEPTH: usize = 32;

/// A tokenizer, and what stands beside it.
pub struct Opened {
    pub library: Library,
    /// The file of its vocabulary.
    pub source: PathBuf,
    /// `model_max_length`
    pub max_length: Option<u64>,
    /// Jinja templates of conversations, if there are any.
    pub templates: Option<Templates>,
    /// Settings that are understood and not followed, as lines for the person.
    pub notes: Vec<String>,
    /// Tokens that the vocabulary does not have, in the order of their ids.
    pub behind: Vec<Behind>,
}

/// A token that was added behind a vocabulary.
pub struct Behind {
    /// As `added_tokens` of a `tokenizer.json` has it, with its id.
    pub token: Value,
    /// Which key of which file it is from.
    pub from: String,
}

impl Behind {
    pub fn content(&self) -> &str {
        self.token["content"].as_str().unwrap_or_default()
    }

    pub fn id(&self) -> u64 {
        self.token["id"].as_u64().unwrap_or(0)
    }

    /// `` `[PAD]` (50257, `pad_token` of its settings) ``
    pub fn describe(&self) -> String {
        format!("`{}` ({}, {})", self.content(), self.id(), self.from)
    }
}

/// Files of formats that are not read, what they are, and how they become one that is.
const FOREIGN: [(&str, &str); 6] = [
    ("tokenizer.model", "a sentencepiece model"),
    ("spiece.model", "a sentencepiece model"),
    ("sentencepiece.bpe.model", "a sentencepiece model"),
    ("spm.model", "a sentencepiece model"),
    ("tiktoken.model", "a tiktoken vocabulary"),
    ("tekken.json", "Mistral's tekken vocabulary"),
];

/// Reads a `tokenizer.json`, or the tokenizer of a folder as transformers would: `tokenizer.json`, else `vocab.json` with
/// `merges.txt`, else `vocab.txt`, each with `tokenizer_config.json` and what else stands beside it. A GGUF file has its
/// tokenizer inside.
pub fn open(path: &Path) -> Result<Opened, DataError> {
    if is_gguf(path) {
        let Contained { json, templates } = gguf::read(path)?;
        let opened = build((json, path.to_owned(), Settings::none(path)))?;
        return Ok(Opened { templates, ..opened });
    }
    build(describe(path)?)
}

fn build((mut json, source, settings): Description) -> Result<Opened, DataError> {
    // Files often hold the padding and the cut of their last user; sequences here have neither.
    json.retain(|key, _| key != "padding" && key != "truncation");
    let mut notes = classes::apply(&mut json, &settings, &source)?;
    sound(&json).map_err(|message| malformed(&source, message))?;
    notes.extend(settings_to_tell(&settings)?);
    let split = settings.flag("split_special_tokens")?.unwrap_or(false);
    let added = json.get("added_tokens").cloned().unwrap_or_default();
    let library = contained(|| {
        let mut library: Library = serde_json::from_value(Value::Object(json)).map_err(|e| e.to_string())?;
        library.set_encode_special_tokens(split);
        Ok(library)
    });
    let library = library.and_then(|loaded| loaded).map_err(|message| malformed(&source, message))?;
    added_as_said(&added, &library).map_err(|message| malformed(&source, message))?;
    let words = library.get_vocab(false);
    let new =
        |token: &&Value| token["content"].as_str().is_some_and(|token| !token.is_empty() && !words.contains_key(token));
    let described = |token: &Value| {
        let from = settings.origin(token["content"].as_str().unwrap_or_default());
        Behind { token: token.clone(), from }
    };
    let behind: Vec<Behind> = added.as_array().into_iter().flatten().filter(new).map(described).collect();
    // Where numbers of a vocabulary are left out, its length is the id of one of its tokens.
    let both = behind.iter().find_map(|b| Some((b, words.iter().find(|(_, id)| u64::from(**id) == b.id())?.0)));
    if let Some((b, word)) = both {
        let message = format!(
            "{} has the id of `{word}`: the vocabulary leaves numbers out or has a token twice, and what is added counts \
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

/// A tokenizer in the form of `tokenizer.json`, the file that it is from, and the settings beside it.
type Description = (Map<String, Value>, PathBuf, Settings);

fn describe(path: &Path) -> Result<Description, DataError> {
    if path.is_dir() {
        return describe_folder(path);
    }
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if let Some((_, what)) = FOREIGN.iter().find(|(foreign, _)| *foreign == name) {
        return Err(foreign(path, what));
    }
    // A part of a folder stands for it.
    let part = ["tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"].contains(&&*name) && path.is_file();
    match path.parent() {
        Some(folder) if part && folder.as_os_str().is_empty() => describe_folder(Path::new(".")),
        Some(folder) if part => describe_folder(folder),
        _ => Ok((object(path)?, path.to_owned(), Settings::none(path))),
    }
}

fn describe_folder(folder: &Path) -> Result<Description, DataError> {
    let [json, vocabulary, merges, pieces] =
        ["tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"].map(|name| folder.join(name));
    if there(&json) {
        return Ok((object(&json)?, json, Settings::read(folder)?));
    }
    // A class sets the parts around the model as it wants them; here they are only of its kind.
    let (source, form, normalizer, pre_tokenizer, model) = if there(&vocabulary) && there(&merges) {
        let model = bytes(&vocabulary, &merges)?;
        (vocabulary, Form::Bytes, Value::Null, json!({"type": "ByteLevel"}), model)
    } else if there(&pieces) {
        let model = word_pieces(&pieces)?;
        (pieces, Form::WordPiece, json!({"type": "BertNormalizer"}), json!({"type": "BertPreTokenizer"}), model)
    } else {
        return Err(nothing(folder));
    };
    let mut settings = Settings::read(folder)?;
    let fits = |class: &Class| match class.form {
        Form::WordPiece | Form::Bytes => class.form == form,
        Form::MarkedBytes => form == Form::Bytes,
        _ => false,
    };
    // What is named counts before the model: other than a `tokenizer.json`, these files do not stand for themselves.
    if let Some(name) = &settings.named {
        settings.declared = Declared::ByName(unfast(name).to_owned());
    }
    match (&settings.declared, settings.declared.class()) {
        (_, Some(class)) if fits(class) => {}
        (Declared::ByName(_), _) => return Err(unread(&source, &settings.declared)),
        (Declared::ByModel { class, .. }, None) if Class::unknown(class) => {
            return Err(unread(&source, &settings.declared));
        }
        // The files say more than a `model_type`.
        _ => settings.declared = Declared::ByFiles(Class::of_files(form, &model)),
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

/// BPE over bytes: `vocab.json`, `{"token": id}`, and `merges.txt`, two tokens a line.
fn bytes(vocabulary: &Path, merges: &Path) -> Result<Value, DataError> {
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
                "is of `{lacking}`, which `vocab.json` does not have: either file is cut off or another model's; \
                 fetch both again"
            )));
        }
        pairs.push(json!([first, second]));
        made.insert(whole);
    }
    // Special tokens and words of a person are made by no merge, but not most of a vocabulary.
    let longer = |token: &&String| token.chars().nth(1).is_some();
    let words = vocab.keys().filter(longer).count();
    if words - made.len() > words / 2 && words - made.len() > SPARE {
        return Err(malformed(
            merges,
            format!(
                "it makes {} of the {words} tokens of `vocab.json` that are longer than a character: it is cut off, or \
                 another model's; fetch it again",
                made.len()
            ),
        ));
    }
    Ok(json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": pairs,
    }))
}

/// Tokens that a vocabulary may have without a merge that makes them, whatever its size.
const SPARE: usize = 256;

/// WordPiece: `vocab.txt`, a token a line, its id the line's number from 0.
fn word_pieces(path: &Path) -> Result<Value, DataError> {
    let text = text(path)?;
    // Blanks at a line's end are no part of its token.
    let ids = text.lines().zip(0u32..).map(|(token, id)| (token.trim_end().to_owned(), id.into()));
    let ids: Map<String, Value> = ids.collect();
    Ok(json!({
        "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": ids,
    }))
}

/// What the library must not be given, or would read silently otherwise than people mean it.
fn sound(json: &Map<String, Value>) -> Result<(), String> {
    fn depth(value: &Value) -> usize {
        match value {
            Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
            Value::Object(items) => 1 + items.values().map(depth).max().unwrap_or(0),
            _ => 0,
        }
    }
    if let Some((key, _)) = json.iter().find(|(_, value)| depth(value) > DEPTH) {
        return Err(format!("`{key}` holds more than {DEPTH} lists and objects inside each other"));
    }
    match json.get("model").and_then(|model| model.get("dropout")) {
        Some(Value::Number(dropout)) if dropout.as_f64() != Some(0.0) => Err(format!(
            "its `model.dropout` is {dropout}: merges would be left out at random, and ids differ from run to run; \
             set it to null"
        )),
        _ => Ok(()),
    }
}

/// Every added token has the id that the file gives it. The library counts them up instead of reading it.
fn added_as_said(added: &Value, library: &Library) -> Result<(), String> {
    for token in added.as_array().into_iter().flatten() {
        let content = token["content"].as_str().unwrap_or_default();
        let (said, found) = (token["id"].as_u64(), library.token_to_id(content).map(u64::from));
        if said != found && !content.is_empty() {
            let shown = |id: Option<u64>| id.map_or("none".into(), |id| id.to_string());
            return Err(format!(
                "its added token `{content}` is said to have the id {}, and has {}: added tokens keep the vocabulary's \
                 id, or count on from its end",
                shown(said),
                shown(found)
            ));
        }
    }
    Ok(())
}

/// Settings that transformers follows and that do not apply here.
fn settings_to_tell(settings: &Settings) -> Result<Vec<String>, DataError> {
    let mut notes = vec![];
    if settings.flag("fix_mistral_regex")? == Some(true) {
        let message = "`fix_mistral_regex` is true: transformers then splits text otherwise than `tokenizer.json` says; \
                       save the tokenizer once more with transformers, and leave the key out";
        return Err(refused(&settings.path, message));
    }
    if settings.text("truncation_side") == Some("left") {
        notes.push("`truncation_side` is left in its settings; long examples are cut on the right here".into());
    }
    Ok(notes)
}

/// Why a folder holds no tokenizer: what is there instead.
fn nothing(folder: &Path) -> DataError {
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

fn foreign(path: &Path, what: &str) -> DataError {
    malformed(path, format!("it is {what}, which is not read here; {}", resave(path)))
}

fn unread(source: &Path, declared: &Declared) -> DataError {
    let message = format!("{}, which is not read from this file", declared.said());
    malformed(source, format!("{message}; {}", resave(source)))
}

/// How the tokenizer that a file is part of becomes a `tokenizer.json`, where its class can be one.
fn resave(file: &Path) -> String {
    let folder = file.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let Ok(settings) = Settings::read(folder)
        && let Some(class) = settings.declared.name()
        && classes::WITHOUT_FILE.contains(&class)
    {
        return format!(
            "transformers has `{class}` in Python alone, so it cannot be written as `tokenizer.json` either"
        );
    }
    let folder = folder.display();
    format!(
        "transformers writes it as `tokenizer.json`: python -c \"from transformers import AutoTokenizer as T; \
         T.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )
}

/// Something of this name is in the folder, if only a link to nothing: reading it says what is wrong.
pub fn there(path: &Path) -> bool {
    match path.symlink_metadata() {
        Ok(_) => true,
        Err(error) => error.kind() != ErrorKind::NotFound,
    }
}

/// A file's text, without a byte order mark.
pub fn text(path: &Path) -> Result<String, DataError> {
    outside::text(path).map_err(|error| unusable(path, error))
}

/// A file that holds one JSON object.
pub fn object(path: &Path) -> Result<Map<String, Value>, DataError> {
    outside::object(path).map_err(|error| unusable(path, error))
}

fn unusable(path: &Path, error: RuntimeError) -> DataError {
    match error {
        RuntimeError::File { message, .. } => malformed(path, message),
        other => malformed(path, other),
    }
}

pub fn malformed(path: &Path, message: impl Display) -> DataError {
    DataError::Tokenizer { path: path.to_owned(), message: message.to_string() }
}
