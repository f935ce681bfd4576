//! The metadata of a GGUF file against the model: the comparison of [`super::config`], with the names that the backbone's
//! `gguf` block declares.

use std::borrow::Cow;
use std::collections::BTreeMap;

use peft_grammar::library;
use peft_grammar::model::{Key, Model};
use peft_runtime::gguf::{GgufFile, Value as Stored};
use serde_json::{Value, json};

use super::config::{Comparison, Leaf, Rules, VOCABULARY};

/// What messages call the metadata.
const PLACE: &str = "the metadata";

pub const ARCHITECTURE: &str = "general.architecture";

/// What files are whose `general.type` is not `model`.
const KINDS: &[(&str, &str)] = &[
    ("adapter", "it holds an adapter of llama.cpp, not a model"),
    ("mmproj", "it holds the part of a model that reads images or sound; take the file of the text model"),
    ("vocab", "it holds a tokenizer, and no tensors"),
    ("imatrix", "it holds statistics for quantisation, and no model"),
];

/// Beginnings of keys that change nothing of what a model computes from its tensors: where it comes from, its tokenizer,
/// how it was quantised and cut.
const WITHOUT_INFLUENCE: &[&str] = &["general.", "tokenizer.", "quantize.", "split.", "mradermacher."];

/// The tokenizer's list of tokens. Its length is the size of the vocabulary where no key says it.
pub const TOKENS: &str = "tokenizer.ggml.tokens";

/// Elements of a list that is compared; no key of a model's form has more.
const LONGEST: u64 = 4096;

/// Compares every key with what the model computes. One that is absent counts as `config.json`'s would.
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
    let written = |(key, rule): (&String, &Key)| match rule {
        Key::Same(other) => Some((other.clone(), key.clone())),
        _ => None,
    };
    // Of several names of one key the first that the block has in order.
    let written: BTreeMap<String, String> = gguf.keys.iter().rev().filter_map(written).collect();
    let own = format!("{architecture}.");
    let compared = file.metadata().filter(|(key, _)| !WITHOUT_INFLUENCE.iter().any(|begin| key.starts_with(begin)));
    let mut leaves: Vec<Leaf> = compared
        .map(|(key, value)| Leaf {
            path: key.to_owned(),
            value: Cow::Owned(json_of(file, value)),
            own: key.starts_with(&own),
        })
        .collect();
    let counted = written.get(VOCABULARY).is_some_and(|key| file.value(key).is_some());
    if let (false, Some(Stored::List(tokens))) = (counted, file.value(TOKENS)) {
        keys.insert(TOKENS.into(), Key::Same(VOCABULARY.into()));
        leaves.push(Leaf { path: TOKENS.into(), value: Cow::Owned(json!(tokens.count)), own: false });
    }
    Rules { model, keys: &keys, place: PLACE, written: Some(&written) }.compare(&leaves, found)
}

/// A value as `config.json` would have it. A number that JSON lacks is its text, and no key is that.
fn json_of(file: &GgufFile, value: &Stored) -> Value {
    match value {
        Stored::Unsigned(n) => json!(n),
        Stored::Signed(n) => json!(n),
        Stored::Float(x) if x.is_finite() => json!(x),
        Stored::Float(x) => json!(x.to_string()),
        Stored::Bool(flag) => json!(flag),
        Stored::Text(text) => json!(text),
        Stored::List(list) if list.count > LONGEST => json!(format!("a list of {}", list.count)),
        Stored::List(list) => file.elements(list).iter().map(|element| json_of(file, element)).collect(),
    }
}
