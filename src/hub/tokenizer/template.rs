//! Reads the chat templates of a checkpoint from all files that may hold them, in transformers' order of precedence.

use std::path::Path;

use peft_runtime::gguf::GgufFile;
use serde_json::Value;

use super::files::{object, text, there};
use super::settings::{Settings, entries, refused};
use crate::data::DataError;

/// The chat templates of a checkpoint, and the variables for them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Templates {
    /// The place of the templates for messages, such as `` `chat_template` of `DIR/tokenizer_config.json` ``.
    pub from: String,
    /// The templates by name. A template without a name is called `default`.
    pub named: Vec<(String, String)>,
    /// The variables with special tokens, such as `bos_token` and `eos_token`, and their texts.
    pub tokens: Vec<(String, String)>,
}

/// The name of the template that is used by default.
pub const DEFAULT: &str = "default";

/// The file that holds only the template.
const FILE: &str = "chat_template.jinja";

/// The folder with further templates, in files `NAME.jinja`.
const FOLDER: &str = "additional_chat_templates";

/// The file of older multimodal processors, an object with the key `chat_template`.
const OLDER: &str = "chat_template.json";

impl Templates {
    /// The template of this name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(other, _)| other == name).map(|(_, template)| template.as_str())
    }

    /// Reads the templates of a folder: from template files, else from `tokenizer_config.json`, else from
    /// `chat_template.json`, which transformers reads only for processors. `None` if there is no template.
    ///
    /// # Errors
    ///
    /// A file cannot be read or is malformed.
    pub fn of_folder(folder: &Path, settings: &Settings) -> Result<Option<Self>, DataError> {
        let mut named = vec![];
        let file = folder.join(FILE);
        let mut from = format!("`{}`", file.display());
        if there(&file) {
            named.push((DEFAULT.to_owned(), text(&file)?));
        }
        let further = folder.join(FOLDER);
        for name in entries(&further) {
            if let Some(stem) = name.strip_suffix(".jinja") {
                named.push((stem.to_owned(), text(&further.join(&name))?));
            }
        }
        let keyed = |path: &Path, value: Option<&Value>| -> Result<_, DataError> {
            let named = of_key(value.unwrap_or(&Value::Null)).map_err(|why| refused(path, why))?;
            Ok((named, format!("`chat_template` of `{}`", path.display())))
        };
        if named.is_empty() {
            (named, from) = keyed(&settings.path, settings.value("chat_template"))?;
        }
        let older = folder.join(OLDER);
        if named.is_empty() && there(&older) {
            (named, from) = keyed(&older, object(&older)?.get("chat_template"))?;
        }
        Ok((!named.is_empty()).then_some(Templates { from, named, tokens: vec![] }))
    }

    /// Reads the templates of a GGUF file: `tokenizer.chat_template`, and further ones as
    /// `tokenizer.chat_template.NAME`. `None` if there is no template.
    pub fn of_gguf(file: &GgufFile, path: &Path, tokens: &[&str]) -> Option<Self> {
        const KEY: &str = "tokenizer.chat_template";
        let mut named: Vec<(String, String)> =
            file.text(KEY).map(|template| (DEFAULT.to_owned(), template.to_owned())).into_iter().collect();
        for name in file.texts("tokenizer.chat_templates").unwrap_or_default() {
            if let Some(template) = file.text(&format!("{KEY}.{name}")) {
                named.push((name.to_owned(), template.to_owned()));
            }
        }
        let token = |(kind, variable): &(&str, &str)| {
            let id = usize::try_from(file.integer(&format!("tokenizer.ggml.{kind}_token_id"))?).ok()?;
            Some((variable.to_string(), tokens.get(id)?.to_string()))
        };
        let tokens = IN_GGUF.iter().filter_map(token).collect();
        let from = format!("`{KEY}` of `{}`", path.display());
        (!named.is_empty()).then_some(Templates { from, named, tokens })
    }
}

/// The names of special tokens in GGUF's metadata (with GGUF's own spelling), and in a template.
const IN_GGUF: [(&str, &str); 7] = [
    ("bos", "bos_token"),
    ("eos", "eos_token"),
    ("unknown", "unk_token"),
    ("seperator", "sep_token"),
    ("padding", "pad_token"),
    ("cls", "cls_token"),
    ("mask", "mask_token"),
];

/// The templates in the value of `chat_template`: one template, or a list with names.
fn of_key(value: &Value) -> Result<Vec<(String, String)>, String> {
    let one = |entry: &Value| match (entry["name"].as_str(), entry["template"].as_str()) {
        (Some(name), Some(template)) => Ok((name.to_owned(), template.to_owned())),
        _ => Err("an entry of its `chat_template` should have a `name` and a `template`".to_owned()),
    };
    match value {
        Value::Null => Ok(vec![]),
        Value::String(template) => Ok(vec![(DEFAULT.to_owned(), template.clone())]),
        Value::Array(entries) => entries.iter().map(one).collect(),
        other => Err(format!(
            "its `chat_template` is {}, and should be a text, or a list of templates with `name` and `template`",
            match other {
                Value::Object(_) => "an object".to_owned(),
                scalar => scalar.to_string(),
            }
        )),
    }
}
