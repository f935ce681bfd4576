//! Classes of transformers that build a tokenizer of a vocabulary and options, whatever else `tokenizer.json` says.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::files::malformed;
use super::settings::{Declared, Settings, id_of, refused};
use crate::data::DataError;

#[derive(Debug, PartialEq)]
pub struct Class {
    pub name: &'static str,
    pub form: Form,
    /// Special tokens by the keys of `tokenizer_config.json`, where that is silent.
    pub tokens: &'static [(&'static str, &'static str)],
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// WordPiece behind BERT's normalizer; a sentence stands between `cls_token` and `sep_token`.
    WordPiece,
    /// BPE over bytes, without marks.
    Bytes,
    /// BPE over bytes; a sentence stands between `cls_token` and `sep_token`.
    MarkedBytes,
}

const BERT: &[(&str, &str)] = &[
    ("unk_token", "[UNK]"),
    ("sep_token", "[SEP]"),
    ("pad_token", "[PAD]"),
    ("cls_token", "[CLS]"),
    ("mask_token", "[MASK]"),
];
const GPT2: &[(&str, &str)] =
    &[("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>")];
const ROBERTA: &[(&str, &str)] = &[
    ("bos_token", "<s>"),
    ("eos_token", "</s>"),
    ("unk_token", "<unk>"),
    ("sep_token", "</s>"),
    ("pad_token", "<pad>"),
    ("cls_token", "<s>"),
    ("mask_token", "<mask>"),
];

const CLASSES: &[Class] = &[
    Class { name: "BertTokenizer", form: Form::WordPiece, tokens: BERT },
    Class { name: "DistilBertTokenizer", form: Form::WordPiece, tokens: BERT },
    Class { name: "ElectraTokenizer", form: Form::WordPiece, tokens: BERT },
    Class { name: "GPT2Tokenizer", form: Form::Bytes, tokens: GPT2 },
    Class { name: "RobertaTokenizer", form: Form::MarkedBytes, tokens: ROBERTA },
];

impl Class {
    pub fn named(name: &str) -> Option<&'static Class> {
        CLASSES.iter().find(|class| class.name == name)
    }

    /// The class that is called after a `model_type` of `config.json`.
    pub fn of_model(model: &str) -> Option<&'static Class> {
        let name = format!("{}tokenizer", model.replace(['-', '_'], ""));
        CLASSES.iter().find(|class| class.name.eq_ignore_ascii_case(&name))
    }

    /// The class whose files these are, where nothing names one. Of those over bytes RoBERTa's marks its sentences, and
    /// GPT-2's has no token for it.
    pub fn of_files(form: Form, model: &Value) -> &'static Class {
        let marked = ["<s>", "</s>"].iter().all(|mark| model["vocab"].get(mark).is_some());
        let form = if form == Form::Bytes && marked { Form::MarkedBytes } else { form };
        CLASSES.iter().find(|class| class.form == form).unwrap_or(&CLASSES[0])
    }
}

/// Options of the parts of a tokenizer: the settings' key, the part, its type, and the part's own key.
const OPTIONS: [(&str, &str, &str, &str); 4] = [
    ("do_lower_case", "normalizer", "BertNormalizer", "lowercase"),
    ("strip_accents", "normalizer", "BertNormalizer", "strip_accents"),
    ("tokenize_chinese_chars", "normalizer", "BertNormalizer", "handle_chinese_chars"),
    ("add_prefix_space", "pre_tokenizer", "ByteLevel", "add_prefix_space"),
];

/// Brings a `tokenizer.json` to what transformers would make of it. A class that is known builds the parts around the
/// vocabulary itself, by the settings and else by its own defaults. Any other leaves the file as it stands. `source` is
/// the vocabulary's file.
pub fn apply(json: &mut Map<String, Value>, settings: &Settings, source: &Path) -> Result<(), DataError> {
    let class = match settings.declared.class() {
        Some(class) => match misfit(json, class.form) {
            None => Some(class),
            Some(part) if matches!(settings.declared, Declared::ByName(_)) => {
                let message = format!(
                    "its `tokenizer_class` is `{}`, but the {part} of `tokenizer.json` is not that class's; versions of \
                     transformers differ in which of the two counts. If `tokenizer.json` is right as it stands, write \
                     `\"tokenizer_class\": \"PreTrainedTokenizerFast\"`",
                    class.name
                );
                return Err(refused(&settings.path, message));
            }
            Some(_) => None,
        },
        None => None,
    };
    settings.add_tokens(json, class)?;
    match class {
        Some(class) => build(json, class, settings, source),
        None => agree(json, settings),
    }
}

/// The part of a `tokenizer.json` that a class of this form would not have.
fn misfit(json: &Map<String, Value>, form: Form) -> Option<&'static str> {
    let kind = |part: &str| json.get(part).and_then(|p| p.get("type")).and_then(Value::as_str);
    // Older files do not name the model's type.
    let model = kind("model");
    match form {
        Form::WordPiece if model.is_some_and(|m| m != "WordPiece") => Some("model"),
        Form::WordPiece if kind("normalizer") != Some("BertNormalizer") => Some("normalizer"),
        Form::WordPiece => None,
        _ if model.is_some_and(|m| m != "BPE") => Some("model"),
        _ if json.get("normalizer").is_some_and(|n| !n.is_null()) => Some("normalizer"),
        _ if kind("pre_tokenizer") != Some("ByteLevel") => Some("pre-tokenizer"),
        _ => None,
    }
}

fn build(json: &mut Map<String, Value>, class: &Class, settings: &Settings, source: &Path) -> Result<(), DataError> {
    let mark = |json: &Map<String, Value>, key: &str| {
        let token = settings.named(key, Some(class)).unwrap_or_default();
        match id_of(json, &token) {
            Some(id) => Ok((token, id)),
            None => Err(malformed(source, format!("it lacks the `{key}` of `{}`, `{token}`", class.name))),
        }
    };
    let flag = |key: &str, default: bool| Ok::<bool, DataError>(settings.flag(key)?.unwrap_or(default));
    match class.form {
        Form::WordPiece => {
            let (unknown, _) = mark(json, "unk_token")?;
            if let Some(Value::Object(model)) = json.get_mut("model") {
                model.insert("unk_token".into(), unknown.into());
            }
            let normalizer = json!({
                "type": "BertNormalizer", "clean_text": true,
                "handle_chinese_chars": flag("tokenize_chinese_chars", true)?,
                "strip_accents": settings.flag("strip_accents")?, "lowercase": flag("do_lower_case", true)?,
            });
            json.insert("normalizer".into(), normalizer);
            json.insert("pre_tokenizer".into(), json!({"type": "BertPreTokenizer"}));
            let (sep, cls) = (mark(json, "sep_token")?, mark(json, "cls_token")?);
            json.insert("post_processor".into(), json!({"type": "BertProcessing", "sep": sep, "cls": cls}));
        }
        Form::Bytes | Form::MarkedBytes => {
            let space = flag("add_prefix_space", false)?;
            let level =
                json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": true});
            json.insert("pre_tokenizer".into(), level);
            if class.form == Form::MarkedBytes {
                let (sep, cls) = (mark(json, "sep_token")?, mark(json, "cls_token")?);
                let marks = json!({
                    "type": "RobertaProcessing", "sep": sep, "cls": cls, "trim_offsets": true, "add_prefix_space": space,
                });
                json.insert("post_processor".into(), marks);
            }
        }
    }
    Ok(())
}

/// Where no known class decides, options that differ from the file's are an error: some versions of transformers take
/// the one, some the other.
fn agree(json: &Map<String, Value>, settings: &Settings) -> Result<(), DataError> {
    for (key, part, kind, own) in OPTIONS {
        let Some(part) = json.get(part).filter(|p| p["type"] == kind) else { continue };
        match (settings.flag(key)?, part.get(own).and_then(Value::as_bool)) {
            (Some(set), Some(file)) if set != file => {
                let message = format!(
                    "`{key}` is {set}, and `tokenizer.json` has {file} for it; versions of transformers differ in \
                     which of the two counts, so make them agree"
                );
                return Err(refused(&settings.path, message));
            }
            _ => {}
        }
    }
    Ok(())
}
