//! Classes of transformers that build a tokenizer of a vocabulary and options, whatever else `tokenizer.json` says.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::files::malformed;
use super::models;
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
    /// BPE over bytes behind NFC and a pattern that splits digits and contractions.
    SplitBytes,
    /// BPE over a whole text whose blanks are `▁`, with one before its first word; unknown characters as bytes.
    Blanks,
    /// As [`Form::Blanks`], without a blank before the first word.
    InnerBlanks,
    /// Unigram over words that begin with `▁`; a sentence stands between `cls_token` and `sep_token`.
    Unigram,
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

const QWEN2: &[(&str, &str)] =
    &[("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")];
const LLAMA: &[(&str, &str)] = &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")];
const GEMMA: &[(&str, &str)] = &[
    ("bos_token", "<bos>"),
    ("eos_token", "<eos>"),
    ("unk_token", "<unk>"),
    ("pad_token", "<pad>"),
    ("mask_token", "<mask>"),
];

/// Names that stand for no class of their own: `tokenizer.json` counts as it stands.
const AS_IT_STANDS: [&str; 4] = [models::AS_IT_STANDS, "PreTrainedTokenizer", "PythonBackend", "BloomTokenizer"];

/// Other names of a class.
const SAME: &[(&str, &str)] = &[
    ("LxmertTokenizer", "BertTokenizer"),
    ("MobileBertTokenizer", "BertTokenizer"),
    ("SqueezeBertTokenizer", "BertTokenizer"),
    ("BartTokenizer", "RobertaTokenizer"),
    ("LEDTokenizer", "RobertaTokenizer"),
    ("MvpTokenizer", "RobertaTokenizer"),
];

/// Classes that transformers 5 has in Python alone: none of them writes a `tokenizer.json`.
pub const WITHOUT_FILE: &[&str] = &[
    "BartphoTokenizer",
    "BertGenerationTokenizer",
    "BertJapaneseTokenizer",
    "BertweetTokenizer",
    "BioGptTokenizer",
    "BlenderbotSmallTokenizer",
    "ByT5Tokenizer",
    "CTRLTokenizer",
    "CanineTokenizer",
    "ClvpTokenizer",
    "CpmAntTokenizer",
    "CpmTokenizer",
    "DiaTokenizer",
    "EsmTokenizer",
    "FSMTTokenizer",
    "FastSpeech2ConformerTokenizer",
    "FlaubertTokenizer",
    "GPTNeoXJapaneseTokenizer",
    "GPTSw3Tokenizer",
    "M2M100Tokenizer",
    "MarianTokenizer",
    "MgpstrTokenizer",
    "MyT5Tokenizer",
    "PLBartTokenizer",
    "PerceiverTokenizer",
    "PhobertTokenizer",
    "Pop2PianoTokenizer",
    "ProphetNetTokenizer",
    "RoCBertTokenizer",
    "SiglipTokenizer",
    "Speech2TextTokenizer",
    "SpeechT5Tokenizer",
    "TapasTokenizer",
    "VitsTokenizer",
    "Wav2Vec2CTCTokenizer",
    "Wav2Vec2PhonemeCTCTokenizer",
    "XLMTokenizer",
];

/// Qwen2's pattern, of transformers' `tokenization_qwen2.py`.
pub const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const CLASSES: &[Class] = &[
    Class { name: "BertTokenizer", form: Form::WordPiece, tokens: BERT },
    Class { name: "DistilBertTokenizer", form: Form::WordPiece, tokens: BERT },
    Class { name: "ElectraTokenizer", form: Form::WordPiece, tokens: BERT },
    Class { name: "GPT2Tokenizer", form: Form::Bytes, tokens: GPT2 },
    Class { name: "RobertaTokenizer", form: Form::MarkedBytes, tokens: ROBERTA },
    Class { name: "Qwen2Tokenizer", form: Form::SplitBytes, tokens: QWEN2 },
    Class { name: "LlamaTokenizer", form: Form::Blanks, tokens: LLAMA },
    Class { name: "GemmaTokenizer", form: Form::InnerBlanks, tokens: GEMMA },
    Class { name: "XLMRobertaTokenizer", form: Form::Unigram, tokens: ROBERTA },
];

impl Class {
    pub fn named(name: &str) -> Option<&'static Class> {
        let name = SAME.iter().find(|(other, _)| *other == name).map_or(name, |(_, same)| same);
        CLASSES.iter().find(|class| class.name == name)
    }

    /// A name of a class of its own whose parts are not known here.
    pub fn unknown(name: &str) -> bool {
        Class::named(name).is_none() && !AS_IT_STANDS.contains(&name)
    }

    /// The class whose files these are, where nothing names one. Of those over bytes RoBERTa's marks its sentences, and
    /// GPT-2's has no token for it.
    pub fn of_files(form: Form, model: &Value) -> &'static Class {
        let marked = ["<s>", "</s>"].iter().all(|mark| model["vocab"].get(mark).is_some());
        let form = if form == Form::Bytes && marked { Form::MarkedBytes } else { form };
        CLASSES.iter().find(|class| class.form == form).unwrap_or(&CLASSES[0])
    }
}

/// Options of the parts of a tokenizer: the settings' key, the part, its type, and what the part says.
type PartOption = (&'static str, &'static str, &'static str, fn(&Value) -> Option<bool>);

const OPTIONS: [PartOption; 5] = [
    ("do_lower_case", "normalizer", "BertNormalizer", |part| part["lowercase"].as_bool()),
    ("strip_accents", "normalizer", "BertNormalizer", |part| part["strip_accents"].as_bool()),
    ("tokenize_chinese_chars", "normalizer", "BertNormalizer", |part| part["handle_chinese_chars"].as_bool()),
    ("add_prefix_space", "pre_tokenizer", "ByteLevel", |part| part["add_prefix_space"].as_bool()),
    ("add_prefix_space", "pre_tokenizer", "Metaspace", |part| Some(scheme(part) != "never")),
];

/// Brings a `tokenizer.json` to what transformers would make of it. A class that is known builds the parts around the
/// vocabulary itself, by the settings and else by its own defaults. Any other leaves the file as it stands. `source` is
/// the vocabulary's file. Lines for the person tell where versions of transformers may differ.
pub fn apply(json: &mut Map<String, Value>, settings: &Settings, source: &Path) -> Result<Vec<String>, DataError> {
    let mut notes = vec![];
    let mut class = settings.declared.class().filter(|class| !(class.form == Form::Blanks && over_bytes(json)));
    if let Some(known) = class
        && let Some(part) = misfit(json, known.form)
    {
        let named = matches!(settings.declared, Declared::ByName(_));
        let mend = match &settings.declared {
            Declared::ByModel { model, .. } if models::overrules(model) => {
                "Transformers 5 takes it for this model whatever is named; save the tokenizer once more with transformers"
            }
            _ => "If `tokenizer.json` is right as it stands, write `\"tokenizer_class\": \"PreTrainedTokenizerFast\"`",
        };
        let message = format!(
            "{}, but the {part} of `tokenizer.json` is not that class's; versions of transformers differ in which of \
             the two counts. {mend}",
            settings.declared.said()
        );
        // A model of another kind is no slip of a class that nobody named.
        if named || part != MODEL {
            return Err(refused(&settings.path, message));
        }
        notes.push(format!("warning: {message}; until then it is read as it stands"));
        class = None;
    }
    if let Some(name) = settings.declared.name().filter(|name| Class::unknown(name)) {
        notes.push(format!(
            "warning: {}, which is not known here; `tokenizer.json` is read as it stands, \
             and versions of transformers whose `{name}` builds parts of its own may give other ids",
            settings.declared.said()
        ));
    }
    settings.add_tokens(json, class)?;
    match class {
        Some(class) => {
            let before = (plain(json.get("normalizer")), plain(json.get("pre_tokenizer")));
            build(json, class, settings, source)?;
            let after = (plain(json.get("normalizer")), plain(json.get("pre_tokenizer")));
            if matches!(class.form, Form::Blanks | Form::Unigram) && before != after {
                notes.push(format!(
                    "warning: `{}` of transformers 5 builds its own normalizer and pre-tokenizer, and they are followed; \
                     those of `tokenizer.json`, which older versions follow, differ from them in blanks",
                    class.name
                ));
            }
        }
        None => agree(json, settings)?,
    }
    Ok(notes)
}

const MODEL: &str = "model";

/// Transformers takes a file over bytes as it stands where it names Llama's class.
fn over_bytes(json: &Map<String, Value>) -> bool {
    json.get("pre_tokenizer").is_some_and(|part| !parts(part, "ByteLevel").is_empty())
}

/// Options of a model that change ids, with what the classes of a form have. Null is an option's empty text, or false.
fn options(form: Form) -> &'static [(&'static str, &'static str)] {
    match form {
        Form::WordPiece => &[("max_input_chars_per_word", "100"), ("continuing_subword_prefix", "\"##\"")],
        Form::Unigram => &[("unk_id", "3"), ("byte_fallback", "false")],
        Form::Blanks | Form::InnerBlanks => &[
            ("continuing_subword_prefix", "\"\""),
            ("end_of_word_suffix", "\"\""),
            ("byte_fallback", "true"),
            ("ignore_merges", "false"),
        ],
        Form::Bytes | Form::MarkedBytes | Form::SplitBytes => &[
            ("continuing_subword_prefix", "\"\""),
            ("end_of_word_suffix", "\"\""),
            ("byte_fallback", "false"),
            ("ignore_merges", "false"),
        ],
    }
}

/// The part of a `tokenizer.json` that a class of this form would not have.
fn misfit(json: &Map<String, Value>, form: Form) -> Option<&'static str> {
    let kind = |part: &str| json.get(part).and_then(|p| p.get("type")).and_then(Value::as_str);
    let wanted = match form {
        Form::WordPiece => "WordPiece",
        Form::Unigram => "Unigram",
        _ => "BPE",
    };
    // Older files do not name the model's type.
    if kind("model").is_some_and(|found| found != wanted) {
        return Some(MODEL);
    }
    let other = |(key, wanted): &&(&str, &str)| {
        let found = json.get("model").and_then(|model| model.get(key)).filter(|found| !found.is_null());
        let empty = matches!(*wanted, "false" | "\"\"");
        let differs = |found| serde_json::from_str::<Value>(wanted).ok().as_ref() != Some(found);
        found.map_or(form != Form::WordPiece && !empty, differs)
    };
    if let Some((key, _)) = options(form).iter().find(other) {
        return Some(match *key {
            "max_input_chars_per_word" => "model's `max_input_chars_per_word`",
            "continuing_subword_prefix" => "model's `continuing_subword_prefix`",
            "end_of_word_suffix" => "model's `end_of_word_suffix`",
            "byte_fallback" => "model's `byte_fallback`",
            "ignore_merges" => "model's `ignore_merges`",
            _ => "model's `unk_id`",
        });
    }
    let (normalizer, pre_tokenizer) = (plain(json.get("normalizer")), plain(json.get("pre_tokenizer")));
    let blanks = |part: &Value| *part == replaced() || *part == json!({"type": "Prepend", "prepend": "▁"});
    let (fits, splits) = match form {
        Form::WordPiece => (kind("normalizer") == Some("BertNormalizer"), true),
        Form::Bytes | Form::MarkedBytes => (normalizer.is_empty(), kind("pre_tokenizer") == Some("ByteLevel")),
        Form::SplitBytes => (normalizer == [json!({"type": "NFC"})], pre_tokenizer == split_bytes(false)),
        Form::Blanks => (normalizer.iter().all(blanks), matches!(&pre_tokenizer[..], [] | [Value::String(_)])),
        Form::InnerBlanks => {
            (normalizer == [replaced()], pre_tokenizer.is_empty() || pre_tokenizer == [split_blanks()])
        }
        Form::Unigram => (
            normalizer.iter().all(|part| part["type"] == "Precompiled") && normalizer.len() <= 1,
            matches!(&pre_tokenizer[..], [words @ Value::Object(_), Value::String(_)] if words["type"] == "WhitespaceSplit"),
        ),
    };
    match (fits, splits) {
        (false, _) => Some("normalizer"),
        (_, false) => Some("pre-tokenizer"),
        _ => None,
    }
}

/// The parts that a normalizer or pre-tokenizer consists of, without what changes no ids; Metaspace by its scheme.
fn plain(part: Option<&Value>) -> Vec<Value> {
    let Some(part) = part.filter(|part| !part.is_null()) else { return vec![] };
    for list in ["normalizers", "pretokenizers"] {
        if let Some(parts) = part[list].as_array() {
            return parts.iter().flat_map(|part| plain(Some(part))).collect();
        }
    }
    let mut part = part.clone();
    match part["type"].as_str() {
        Some("Metaspace") => {
            let scheme = scheme(&part);
            let split = if part["split"] == false { "whole" } else { "words" };
            vec![format!("{} {scheme} {split}", part["replacement"].as_str().unwrap_or("▁")).into()]
        }
        Some("ByteLevel") => {
            if let Some(part) = part.as_object_mut() {
                part.retain(|key, _| key != "trim_offsets" && key != "add_prefix_space");
            }
            vec![part]
        }
        _ => vec![part],
    }
}

/// Where a Metaspace puts a blank. Older files have a flag in the scheme's place.
fn scheme(metaspace: &Value) -> &str {
    let always = metaspace["add_prefix_space"] != false;
    metaspace["prepend_scheme"].as_str().unwrap_or(if always { "always" } else { "never" })
}

/// The parts of this type in a normalizer or pre-tokenizer, those of a sequence included.
fn parts<'a>(part: &'a Value, kind: &str) -> Vec<&'a Value> {
    let inner = ["normalizers", "pretokenizers"].into_iter().filter_map(|list| part[list].as_array()).flatten();
    let own = (part["type"] == kind).then_some(part);
    own.into_iter().chain(inner.flat_map(|part| parts(part, kind))).collect()
}

fn replaced() -> Value {
    json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
}

fn split_blanks() -> Value {
    json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false})
}

/// What Qwen2 splits text with, as [`plain`] gives it, or with its blank before the first word.
fn split_bytes(space: bool) -> Vec<Value> {
    let mut bytes = json!({"type": "ByteLevel", "use_regex": false});
    if space {
        bytes["add_prefix_space"] = true.into();
    }
    let split = json!({"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": false});
    vec![split, bytes]
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
        Form::SplitBytes => {
            let mut parts = split_bytes(flag("add_prefix_space", false)?);
            for part in parts.iter_mut().filter(|part| part["type"] == "ByteLevel") {
                part["trim_offsets"] = true.into();
                part["add_prefix_space"] = (part["add_prefix_space"] == true).into();
            }
            json.insert("pre_tokenizer".into(), json!({"type": "Sequence", "pretokenizers": parts}));
        }
        Form::Blanks => {
            let scheme = match (flag("add_prefix_space", true)?, flag("legacy", false)?) {
                (false, _) => "never",
                (true, false) => "first",
                (true, true) => "always",
            };
            json.insert("normalizer".into(), Value::Null);
            json.insert("pre_tokenizer".into(), metaspace(scheme, false));
        }
        Form::InnerBlanks => {
            json.insert("normalizer".into(), replaced());
            json.insert("pre_tokenizer".into(), split_blanks());
        }
        Form::Unigram => {
            let scheme = if flag("add_prefix_space", true)? { "always" } else { "never" };
            let parts = json!([{"type": "WhitespaceSplit"}, metaspace(scheme, true)]);
            json.insert("pre_tokenizer".into(), json!({"type": "Sequence", "pretokenizers": parts}));
            let (sep, cls) = (mark(json, "eos_token")?, mark(json, "bos_token")?);
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

/// Blanks as `▁`, and one before the first word of all texts (`always`), of a text's own beginning (`first`) or none.
fn metaspace(scheme: &str, split: bool) -> Value {
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split})
}

/// Where no known class decides, options that differ from the file's are an error: some versions of transformers take
/// the one, some the other.
fn agree(json: &Map<String, Value>, settings: &Settings) -> Result<(), DataError> {
    for (key, part, kind, own) in OPTIONS {
        let Some(set) = settings.flag(key)? else { continue };
        let found = json.get(part).map_or(vec![], |part| parts(part, kind));
        if let Some(file) = found.into_iter().filter_map(own).find(|file| *file != set) {
            let message = format!(
                "`{key}` is {set}, and `tokenizer.json` has {file} for it; versions of transformers differ in \
                 which of the two counts, so make them agree"
            );
            return Err(refused(&settings.path, message));
        }
    }
    Ok(())
}
