//! Reads a tokenizer's settings: `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, and the class
//! in `config.json`.

use std::collections::HashMap;
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::classes::Class;
use super::files::{object, there};
use super::models;
use crate::data::DataError;

/// The keys that name special tokens, in the order in which transformers adds them.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The key with further special tokens, as a list or as an object by name.
const EXTRA: &str = "extra_special_tokens";

/// The older name of [`EXTRA`], which is used if that is absent or empty.
const ADDITIONAL: &str = "additional_special_tokens";

/// The key with special tokens that are specific to a model, by name. Other keys that end in `_token` and hold a token
/// are such names, too.
const OF_MODEL: &str = "model_specific_special_tokens";

/// How the class of transformers that reads a folder is determined.
#[derive(Clone, Debug, PartialEq)]
pub enum Declared {
    /// `tokenizer_class` of `tokenizer_config.json` or of `config.json`, without `Fast`.
    ByName(String),
    /// The class for the `model_type` of `config.json`.
    ByModel {
        /// The `model_type`.
        model: String,
        /// The name of the class.
        class: &'static str,
    },
    /// The class for the vocabulary files, if nothing names one.
    ByFiles(&'static Class),
    /// No class is known.
    Nothing,
}

impl Declared {
    /// The class that transformers 5 chooses for a `tokenizer.json`, from the named class and the `model_type`.
    fn of(named: Option<&str>, model: Option<&str>) -> Self {
        let named = named.map(strip_fast);
        let registered = model.and_then(models::class_of);
        let by_model = || match (model, registered) {
            (Some(model), Some(class)) => Declared::ByModel { model: model.to_owned(), class },
            _ => Declared::Nothing,
        };
        match named {
            Some(name) if registered.is_none_or(|class| class == name) => Declared::ByName(name.to_owned()),
            // For these models transformers reads the file unchanged, whatever class is named.
            Some(_) if registered == Some(models::AS_IT_STANDS) => by_model(),
            Some(_) if model.is_some_and(models::overrules) => by_model(),
            Some(name) => Declared::ByName(name.to_owned()),
            None => by_model(),
        }
    }

    /// The name of the class, if there is one.
    pub fn name(&self) -> Option<&str> {
        match self {
            Declared::ByName(name) => Some(name),
            Declared::ByModel { class, .. } => Some(class),
            Declared::ByFiles(class) => Some(class.name),
            Declared::Nothing => None,
        }
    }

    /// The class, if it is known.
    pub fn class(&self) -> Option<&'static Class> {
        Class::named(self.name()?)
    }

    /// The origin of the class as text, for messages.
    pub fn describe(&self) -> String {
        match self {
            Declared::ByModel { model, class } => {
                format!("the `model_type` of `config.json` is `{model}`, whose tokenizer is `{class}`")
            }
            _ => format!("its `tokenizer_class` is `{}`", self.name().unwrap_or_default()),
        }
    }
}

/// The settings of a tokenizer.
pub struct Settings {
    /// The path of `tokenizer_config.json`, whether it exists or not.
    pub path: PathBuf,
    /// The tokenizer's folder; `None` for a single file.
    pub folder: Option<PathBuf>,
    /// The class.
    pub declared: Declared,
    /// The keys of `tokenizer_config.json`, and of `special_tokens_map.json` if transformers reads that.
    keys: Map<String, Value>,
    /// Tokens with ids in the settings, in the form of `added_tokens` in a `tokenizer.json`.
    added: Vec<Value>,
    /// The file or key that these are from.
    source: &'static str,
    /// The value of `tokenizer_class`.
    pub named: Option<String>,
}

impl Settings {
    /// Reads the settings of a folder. Missing files count as empty.
    ///
    /// # Errors
    ///
    /// A file cannot be read or is malformed.
    pub fn read(folder: &Path) -> Result<Self, DataError> {
        let optional = |name: &str| match folder.join(name) {
            path if there(&path) => object(&path).map_err(|error| match error {
                DataError::Tokenizer { path, message } => DataError::Settings { path, message },
                other => other,
            }),
            _ => Ok(Map::new()),
        };
        let path = folder.join("tokenizer_config.json");
        let mut keys = optional("tokenizer_config.json")?;
        let mut added = vec![];
        let mut source = "added_tokens_decoder";
        // transformers reads the two older files only if `added_tokens_decoder` is absent.
        if let Some(decoder) = keys.get("added_tokens_decoder") {
            let entries =
                decoder.as_object().ok_or_else(|| refused(&path, "`added_tokens_decoder` is not an object"))?;
            for (id, token) in entries {
                let parsed = id.parse::<u32>().ok().zip(token_of(token, false));
                let (id, token) =
                    parsed.ok_or_else(|| refused(&path, format!("`added_tokens_decoder` has no token at `{id}`")))?;
                added.push(with_id(token, id));
            }
        } else {
            source = "added_tokens.json";
            for (key, mut value) in optional("special_tokens_map.json")? {
                // Lists are concatenated; other values of this file take precedence.
                if let (EXTRA, Value::Array(more), Some(Value::Array(list))) = (&key[..], &mut value, keys.get(EXTRA)) {
                    let new: Vec<Value> = more.drain(..).filter(|token| !list.contains(token)).collect();
                    *more = list.iter().cloned().chain(new).collect();
                }
                keys.insert(key, value);
            }
            for (token, id) in optional("added_tokens.json")? {
                let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
                let file = folder.join("added_tokens.json");
                let number = number
                    .ok_or_else(|| refused(&file, format!("the id of `{token}` is {id}, and should be a number")))?;
                added.push(with_id(plain(&token, false), number));
            }
        }
        added.sort_by_key(|token| token["id"].as_u64());
        // A damaged config.json is reported when the weights are read.
        let config = object(&folder.join("config.json")).unwrap_or_default();
        let named = [&keys, &config].into_iter().find_map(|keys| keys.get("tokenizer_class")?.as_str());
        let named = named.map(str::to_owned);
        let declared = Declared::of(named.as_deref(), config.get("model_type").and_then(Value::as_str));
        Ok(Settings { path, folder: Some(folder.to_owned()), declared, keys, added, source, named })
    }

    /// The settings of a single file without a folder, which are empty.
    pub fn none(path: &Path) -> Self {
        let (path, declared) = (path.to_owned(), Declared::Nothing);
        Settings { path, folder: None, declared, keys: Map::new(), added: vec![], source: "", named: None }
    }

    /// The value of a flag; `None` if it is absent or null.
    ///
    /// # Errors
    ///
    /// The value is neither true nor false.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, DataError> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(refused(&self.path, format!("`{key}` is {other}, and should be true or false"))),
        }
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.keys.get(key)
    }

    /// The named special tokens with their texts, which are the variables of a chat template.
    pub fn variables(&self) -> Vec<(String, String)> {
        let class = self.declared.class();
        let usual = NAMED.iter().filter_map(|key| Some((key.to_string(), self.named(key, class)?)));
        let mut variables: Vec<(String, String)> = usual.collect();
        for (key, value) in self.special() {
            let Some(token) = token_of(value, true) else { continue };
            let new = key.ends_with("_token") && !variables.iter().any(|(name, _)| name == key);
            if new && let Some(text) = token["content"].as_str() {
                variables.push((key.to_owned(), text.to_owned()));
            }
        }
        variables
    }

    /// The value of a key that is text.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.keys.get(key)?.as_str()
    }

    /// The setting `model_max_length` in tokens. `None` if there is no limit, for which transformers writes 10³⁰.
    pub fn max_length(&self) -> Option<u64> {
        let length = self.keys.get("model_max_length")?.as_f64()?;
        (0.0..1e15).contains(&length).then_some(length as u64)
    }

    /// The text of the special token `key`, or the class's default if the settings do not have the key.
    pub fn named(&self, key: &str, class: Option<&Class>) -> Option<String> {
        match self.keys.get(key).filter(|value| !value.is_null()) {
            Some(value) => token_of(value, true)?["content"].as_str().map(str::to_owned),
            None => class?.tokens.iter().find(|(name, _)| *name == key).map(|(_, token)| token.to_string()),
        }
    }

    /// The special tokens with their keys, in the order in which transformers 5 adds them.
    fn special(&self) -> Vec<(&str, &Value)> {
        fn by_name(tokens: Option<&Value>) -> impl Iterator<Item = (&str, &Value)> {
            tokens.and_then(Value::as_object).into_iter().flatten().map(|(key, value)| (key.as_str(), value))
        }
        let named = NAMED.iter().filter_map(|key| Some((*key, self.keys.get(*key)?)));
        let own = |object: bool| {
            let keys = self.keys.iter().filter(|(key, _)| key.ends_with("_token") && !NAMED.contains(&key.as_str()));
            keys.filter(move |(_, value)| if object { marked(value) } else { value.is_string() })
                .map(|(key, value)| (key.as_str(), value))
        };
        // Special tokens of a model are either keys of their own, or all in one object.
        let mut of_model: Vec<_> = own(false).chain(by_name(self.keys.get(EXTRA))).collect();
        if of_model.is_empty() {
            of_model = by_name(self.keys.get(OF_MODEL)).collect();
        }
        let lists = [EXTRA, ADDITIONAL].into_iter().filter_map(|key| Some((key, self.keys.get(key)?)));
        let (key, list) =
            lists.into_iter().find(|(_, list)| !empty(list) && !list.is_object()).unwrap_or((EXTRA, &Value::Null));
        let extra = list.as_array().into_iter().flatten().map(|value| (key, value));
        named.chain(own(true)).chain(of_model).chain(extra).collect()
    }

    /// The key or file that an added token is from, for messages.
    pub fn origin(&self, token: &str) -> String {
        let holds = |value: &Value| token_of(value, true).is_some_and(|found| found["content"] == token);
        if let Some((key, _)) = self.special().into_iter().find(|(_, value)| holds(value)) {
            return format!("`{key}` of its settings");
        }
        let listed = self.added.iter().any(|added| added["content"] == token);
        format!("`{}`", if listed { self.source } else { "added_tokens" })
    }

    /// Adds all tokens of the settings to `added_tokens` of a `tokenizer.json`. A token has its id in the vocabulary,
    /// or the next free id. The class's default tokens are added only if the vocabulary has them.
    ///
    /// # Errors
    ///
    /// The settings give a token another id than the file.
    pub fn add_tokens(&self, json: &mut Map<String, Value>, class: Option<&Class>) -> Result<(), DataError> {
        let mut tokens = match json.remove("added_tokens") {
            Some(Value::Array(tokens)) => tokens,
            _ => vec![],
        };
        let vocabulary = Vocabulary(json.get("model").and_then(|model| model.get("vocab")));
        let id = |token: &Value| token["id"].as_u64();
        let content = |token: &Value| token["content"].as_str().unwrap_or_default().to_owned();
        let mut ids: HashMap<String, Option<u64>> = tokens.iter().map(|token| (content(token), id(token))).collect();
        let mut next = tokens.iter().filter_map(id).map(|id| id.saturating_add(1)).max().unwrap_or(0);
        next = next.max(vocabulary.len() as u64);
        for token in &self.added {
            match ids.insert(content(token), id(token)) {
                None => {
                    next = next.max(id(token).unwrap_or(0) + 1);
                    tokens.push(token.clone());
                }
                Some(there) if there == id(token) => {}
                Some(there) => {
                    let there = there.map_or("no id".into(), |id| id.to_string());
                    let message =
                        format!("it gives {} the id {}, and `tokenizer.json` {there}", token["content"], token["id"]);
                    return Err(refused(&self.path, message));
                }
            }
        }
        let configured = self.special().into_iter().filter_map(|(_, value)| token_of(value, true));
        let own = class.iter().flat_map(|class| class.tokens);
        let own = own.filter(|(key, token)| {
            self.keys.get(*key).is_none_or(|value| value.is_null()) && vocabulary.id(token).is_some()
        });
        for token in configured.chain(own.map(|(_, token)| plain(token, true))) {
            let content = content(&token);
            if ids.contains_key(&content) {
                continue;
            }
            let id = vocabulary.id(&content).unwrap_or(next);
            next = next.max(id.saturating_add(1));
            ids.insert(content, Some(id));
            tokens.push(with_id(token, id as u32));
        }
        tokens.sort_by_key(id);
        json.insert("added_tokens".into(), Value::Array(tokens));
        Ok(())
    }
}

/// The name of a class without the suffix `Fast` of transformers 4.
pub fn strip_fast(name: &str) -> &str {
    name.strip_suffix("Fast").unwrap_or(name)
}

/// The vocabulary of a model in a `tokenizer.json`: an object of ids, or a list of tokens and scores.
struct Vocabulary<'a>(Option<&'a Value>);

impl Vocabulary<'_> {
    /// The id of a token.
    fn id(&self, token: &str) -> Option<u64> {
        match self.0? {
            Value::Object(ids) => ids.get(token)?.as_u64(),
            Value::Array(tokens) => tokens.iter().position(|t| t[0] == token).map(|i| i as u64),
            _ => None,
        }
    }

    /// The number of tokens.
    fn len(&self) -> usize {
        match self.0 {
            Some(Value::Object(ids)) => ids.len(),
            Some(Value::Array(tokens)) => tokens.len(),
            _ => 0,
        }
    }
}

/// The id of a token in a `tokenizer.json`, among the added tokens or in the vocabulary.
pub fn id_of(json: &Map<String, Value>, token: &str) -> Option<u64> {
    let added = json.get("added_tokens").and_then(Value::as_array);
    let added = added.and_then(|tokens| tokens.iter().find(|t| t["content"] == token)?["id"].as_u64());
    added.or_else(|| Vocabulary(json.get("model")?.get("vocab")).id(token))
}

/// An error about a file of settings.
pub fn refused(path: &Path, message: impl Display) -> DataError {
    DataError::Settings { path: path.to_owned(), message: message.to_string() }
}

/// A token with default options.
fn plain(content: &str, special: bool) -> Value {
    json!({
        "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": !special, "special": special,
    })
}

/// Whether an object is a serialised token of transformers.
fn marked(value: &Value) -> bool {
    value["__type"] == "AddedToken"
}

/// Whether Python treats the value as false.
fn empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// The token in a value of the settings: a string, or an object with its content and options.
fn token_of(value: &Value, special: bool) -> Option<Value> {
    let content = value.as_str().or_else(|| value.get("content")?.as_str())?;
    if content.is_empty() {
        return None;
    }
    let mut token = plain(content, special || value.get("special").and_then(Value::as_bool).unwrap_or(false));
    for key in ["single_word", "lstrip", "rstrip", "normalized"] {
        if let Some(flag) = value.get(key).and_then(Value::as_bool) {
            token[key] = flag.into();
        }
    }
    Some(token)
}

/// The token with an id.
fn with_id(mut token: Value, id: u32) -> Value {
    token["id"] = id.into();
    token
}

/// The names of a folder's entries, sorted; empty if it cannot be read.
pub fn entries(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return vec![] };
    let mut names: Vec<String> =
        entries.filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned())).collect();
    names.sort();
    names
}
