//! Compares the metadata of a GGUF file with the model, by the rules of [`super::config`] and the names that the `gguf`
//! block of the backbone's file declares.

use std::borrow::Cow;
use std::collections::BTreeMap;

use peft_grammar::library;
use peft_grammar::model::{KeyRule, Model};
use peft_runtime::gguf::{GgufFile, Value as Stored};
use serde_json::{Value, json};

use super::config::{Comparison, ConfigEntry, ConfigRules, VOCABULARY};

/// The name of the metadata in messages.
const PLACE: &str = "the metadata";

/// The key that names the model's family.
pub const ARCHITECTURE: &str = "general.architecture";

/// Values of `general.type` other than `model`, and the message for each.
const KINDS: &[(&str, &str)] = &[
    ("adapter", "it holds an adapter of llama.cpp, not a model"),
    ("mmproj", "it holds the image or audio encoder of a model; take the file of the text model"),
    ("vocab", "it holds a tokenizer and no tensors"),
    ("imatrix", "it holds statistics for quantisation, and no model"),
];

/// Prefixes of keys that do not change what a model computes from its tensors: its origin, its tokenizer, its
/// quantisation and its splitting into files.
const IGNORED_PREFIXES: &[&str] = &["general.", "tokenizer.", "quantize.", "split.", "mradermacher."];

/// The tokenizer's list of tokens. Its length is the size of the vocabulary if no key gives it.
pub const TOKENS: &str = "tokenizer.ggml.tokens";

/// The largest number of elements of a list that is compared; a backbone's keys have fewer.
const MAX_ELEMENTS: u64 = 4096;

/// Compares every key with the model. An absent key has the default that it has in `config.json`.
pub fn compare(file: &GgufFile, model: &Model) -> Comparison {
    let mut found = Comparison::default();
    let backbone = &model.backbone.name;
    if let Some(kind) = file.text("general.type").filter(|kind| *kind != "model") {
        let what = KINDS.iter().find(|(name, _)| *name == kind).map_or("it should be `model`", |(_, what)| what);
        found.wrong.push(format!("  `general.type` is `{kind}` in {PLACE}: {what}"));
        return found;
    }
    let Some(gguf) = &model.backbone.checkpoint.gguf else {
        found.wrong.push(format!(
            "  `{backbone}` does not say how GGUF files write its keys and tensors; take the model in safetensors, or \
             write a `gguf` block in its file"
        ));
        return found;
    };
    let architecture = file.text(ARCHITECTURE).unwrap_or_default();
    if !gguf.architectures.iter().any(|known| known == architecture) {
        let mend = match library::backbone_of_gguf(architecture) {
            Some(reader) => format!("`model = {reader}(…)` reads it"),
            None => "the library has no backbone that reads it".into(),
        };
        found.wrong.push(match file.value(ARCHITECTURE) {
            None => format!("  `{ARCHITECTURE}` is absent from {PLACE}: the file does not say what model it holds"),
            Some(_) => format!(
                "  `{ARCHITECTURE}` is `{architecture}` in {PLACE}, `{backbone}` reads {}; {mend}",
                gguf.architectures.join(" or ")
            ),
        });
        return found;
    }

    let mut keys = model.backbone.checkpoint.keys.clone();
    keys.extend(gguf.keys.iter().map(|(key, rule)| (key.clone(), rule.clone())));
    let written = |(key, rule): (&String, &KeyRule)| match rule {
        KeyRule::Same(other) => Some((other.clone(), key.clone())),
        _ => None,
    };
    // The first alias of a key in alphabetical order is the one in messages.
    let written: BTreeMap<String, String> = gguf.keys.iter().rev().filter_map(written).collect();
    let own = format!("{architecture}.");
    let compared = file.metadata().filter(|(key, _)| !IGNORED_PREFIXES.iter().any(|begin| key.starts_with(begin)));
    let mut entries: Vec<ConfigEntry> = compared
        .map(|(key, value)| ConfigEntry {
            path: key.to_owned(),
            value: Cow::Owned(json_of(file, value)),
            must_be_known: key.starts_with(&own),
        })
        .collect();
    let counted = written.get(VOCABULARY).is_some_and(|key| file.value(key).is_some());
    if let (false, Some(Stored::List(tokens))) = (counted, file.value(TOKENS)) {
        keys.insert(TOKENS.into(), KeyRule::Same(VOCABULARY.into()));
        entries.push(ConfigEntry { path: TOKENS.into(), value: Cow::Owned(json!(tokens.count)), must_be_known: false });
    }
    ConfigRules { model, keys: &keys, place: PLACE, file_keys: Some(&written) }.compare(&entries, found)
}

/// A value as JSON. A float that JSON cannot represent becomes text, which agrees with no key.
fn json_of(file: &GgufFile, value: &Stored) -> Value {
    match value {
        Stored::Unsigned(n) => json!(n),
        Stored::Signed(n) => json!(n),
        Stored::Float(x) if x.is_finite() => json!(x),
        Stored::Float(x) => json!(x.to_string()),
        Stored::Bool(flag) => json!(flag),
        Stored::Text(text) => json!(text),
        Stored::List(list) if list.count > MAX_ELEMENTS => json!(format!("a list of {}", list.count)),
        Stored::List(list) => file.elements(list).iter().map(|element| json_of(file, element)).collect(),
    }
}
