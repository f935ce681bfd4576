//! Where a checkpoint keeps its Jinja template of conversations, in transformers' order of precedence.

use std::path::Path;

use peft_runtime::gguf::GgufFile;
use serde_json::Value;

use super::files::{object, text, there};
use super::settings::{Settings, entries, refused};
use crate::data::DataError;

/// The templates of a checkpoint and the variables that they are given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Templates {
    /// Where they were found, `` `chat_template` of `DIR/tokenizer_config.json` ``.
    pub from: String,
    /// Templates by name; one that has no name is `default`.
    pub named: Vec<(String, String)>,
    /// `bos_token`, `eos_token` and the like with their texts.
    pub tokens: Vec<(String, String)>,
}

/// The name of the template that is used unless another is called for.
pub const DEFAULT: &str = "default";

/// A file that holds the template, and nothing else.
const FILE: &str = "chat_template.jinja";

/// A folder of further templates, `NAME.jinja` each.
const FOLDER: &str = "additional_chat_templates";

/// An older file of processors: an object with the key `chat_template`.
const OLDER: &str = "chat_template.json";

impl Templates {
    pub fn get(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(other, _)| other == name).map(|(_, template)| template.as_str())
    }

    /// Reads the templates of a folder: the files of their own, else the key of `tokenizer_config.json`, else
    /// `chat_template.json`, which transformers reads for processors alone.
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

    /// The template of a GGUF file, whose further ones are `tokenizer.chat_template.NAME`.
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

/// Special tokens as GGUF names them, and their names in a template.
const IN_GGUF: [(&str, &str); 7] = [
    ("bos", "bos_token"),
    ("eos", "eos_token"),
    ("unknown", "unk_token"),
    ("seperator", "sep_token"),
    ("padding", "pad_token"),
    ("cls", "cls_token"),
    ("mask", "mask_token"),
];

/// A key's value: a template, or a list of templates with names.
fn of_key(value: &Value) -> Result<Vec<(String, String)>, String> {
    let one = |entry: &Value| match (entry["name"].as_str(), entry["template"].as_str()) {
        (Some(name), Some(template)) => Ok((name.to_owned(), template.to_owned())),
        _ => Err("an entry of its `chat_template` has not both a `name` and a `template`".to_owned()),
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
