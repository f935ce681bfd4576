//! Tokenizer classes of transformers. A class builds the parts of a tokenizer (normalizer, pre-tokenizer,
//! post-processor) from the vocabulary and the settings, and ignores those parts of `tokenizer.json`.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::files::malformed;
use super::models;
use super::settings::{Declared, Settings, id_of, refused};
use crate::data::DataError;

/// A class of transformers.
#[derive(Debug, PartialEq)]
pub struct Class {
    /// The name, without `Fast`.
    pub name: &'static str,
    /// The parts that the class builds.
    pub kind: TokenizerKind,
    /// The default special tokens, by their keys in `tokenizer_config.json`.
    pub tokens: &'static [(&'static str, &'static str)],
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TokenizerKind {
    /// WordPiece after BERT's normalizer; a sentence is enclosed in `cls_token` and `sep_token`.
    WordPiece,
    /// GPT-2's byte-level BPE, without special tokens around a sentence.
    ByteLevelBpe,
    /// RoBERTa's byte-level BPE; a sentence is enclosed in `cls_token` and `sep_token`.
    RobertaBpe,
    /// Qwen2's byte-level BPE after NFC and a pattern that splits digits and contractions.
    Qwen2Bpe,
    /// Llama's BPE over the whole text with spaces replaced by `▁` and one before the first word; unknown characters
    /// are bytes.
    LlamaBpe,
    /// Gemma's BPE, as [`TokenizerKind::LlamaBpe`] without `▁` before the first word.
    GemmaBpe,
    /// Unigram over words that begin with `▁`; a sentence is enclosed in `cls_token` and `sep_token`.
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

/// Generic classes, which read `tokenizer.json` unchanged.
const AS_IT_STANDS: [&str; 4] = [models::AS_IT_STANDS, "PreTrainedTokenizer", "PythonBackend", "BloomTokenizer"];

/// Names of classes that are the same as another.
const ALIASES: &[(&str, &str)] = &[
    ("LxmertTokenizer", "BertTokenizer"),
    ("MobileBertTokenizer", "BertTokenizer"),
    ("SqueezeBertTokenizer", "BertTokenizer"),
    ("BartTokenizer", "RobertaTokenizer"),
    ("LEDTokenizer", "RobertaTokenizer"),
    ("MvpTokenizer", "RobertaTokenizer"),
];

/// Classes that transformers 5 implements only in Python and that cannot write a `tokenizer.json`.
pub const PYTHON_ONLY: &[&str] = &[
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

/// Qwen2's pattern, from transformers' `tokenization_qwen2.py`.
pub const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The classes that are known.
const CLASSES: &[Class] = &[
    Class { name: "BertTokenizer", kind: TokenizerKind::WordPiece, tokens: BERT },
    Class { name: "DistilBertTokenizer", kind: TokenizerKind::WordPiece, tokens: BERT },
    Class { name: "ElectraTokenizer", kind: TokenizerKind::WordPiece, tokens: BERT },
    Class { name: "GPT2Tokenizer", kind: TokenizerKind::ByteLevelBpe, tokens: GPT2 },
    Class { name: "RobertaTokenizer", kind: TokenizerKind::RobertaBpe, tokens: ROBERTA },
    Class { name: "Qwen2Tokenizer", kind: TokenizerKind::Qwen2Bpe, tokens: QWEN2 },
    Class { name: "LlamaTokenizer", kind: TokenizerKind::LlamaBpe, tokens: LLAMA },
    Class { name: "GemmaTokenizer", kind: TokenizerKind::GemmaBpe, tokens: GEMMA },
    Class { name: "XLMRobertaTokenizer", kind: TokenizerKind::Unigram, tokens: ROBERTA },
];

impl Class {
    /// The class of this name; `None` if it is not known.
    pub fn named(name: &str) -> Option<&'static Class> {
        let name = ALIASES.iter().find(|(other, _)| *other == name).map_or(name, |(_, same)| same);
        CLASSES.iter().find(|class| class.name == name)
    }

    /// Whether the name is that of a class that is neither known nor generic.
    pub fn unknown(name: &str) -> bool {
        Class::named(name).is_none() && !AS_IT_STANDS.contains(&name)
    }

    /// The class for vocabulary files of this kind, if no class is named. Byte-level BPE is RoBERTa's if its vocabulary
    /// has `<s>` and `</s>`, and GPT-2's otherwise.
    pub fn of_files(kind: TokenizerKind, model: &Value) -> &'static Class {
        let marked = ["<s>", "</s>"].iter().all(|mark| model["vocab"].get(mark).is_some());
        let kind = if kind == TokenizerKind::ByteLevelBpe && marked { TokenizerKind::RobertaBpe } else { kind };
        CLASSES.iter().find(|class| class.kind == kind).unwrap_or(&CLASSES[0])
    }
}

/// An option of a tokenizer's part: the key in the settings, the part, the part's type, and a function that reads the
/// option from the part.
type PartOption = (&'static str, &'static str, &'static str, fn(&Value) -> Option<bool>);

const OPTIONS: [PartOption; 5] = [
    ("do_lower_case", "normalizer", "BertNormalizer", |part| part["lowercase"].as_bool()),
    ("strip_accents", "normalizer", "BertNormalizer", |part| part["strip_accents"].as_bool()),
    ("tokenize_chinese_chars", "normalizer", "BertNormalizer", |part| part["handle_chinese_chars"].as_bool()),
    ("add_prefix_space", "pre_tokenizer", "ByteLevel", |part| part["add_prefix_space"].as_bool()),
    ("add_prefix_space", "pre_tokenizer", "Metaspace", |part| Some(scheme(part) != "never")),
];

/// Changes a `tokenizer.json` to the tokenizer that transformers would build from it. A known class replaces the parts
/// around the vocabulary, by the settings or its own defaults. Any other class leaves the file unchanged. `source` is
/// the vocabulary's file. Returns notes for the user where versions of transformers may differ.
///
/// # Errors
///
/// The settings contradict the file, or a special token of the class is missing.
pub fn apply(json: &mut Map<String, Value>, settings: &Settings, source: &Path) -> Result<Vec<String>, DataError> {
    let mut notes = vec![];
    let mut class =
        settings.declared.class().filter(|class| !(class.kind == TokenizerKind::LlamaBpe && over_bytes(json)));
    if let Some(known) = class
        && let Some(part) = mismatched_part(json, known.kind)
    {
        let named = matches!(settings.declared, Declared::ByName(_));
        let mend = match &settings.declared {
            Declared::ByModel { model, .. } if models::overrules(model) => {
                "Transformers 5 uses it for this model whatever is named; save the tokenizer once more with \
                 transformers"
            }
            _ => "If `tokenizer.json` is right as it stands, write `\"tokenizer_class\": \"PreTrainedTokenizerFast\"`",
        };
        let message = format!(
            "{}, but the {part} of `tokenizer.json` is not that class's; versions of transformers differ in which of \
             the two counts. {mend}",
            settings.declared.describe()
        );
        // If the class follows from the `model_type`, another kind of model means that the file does not use that
        // class.
        if named || part != MODEL {
            return Err(refused(&settings.path, message));
        }
        notes.push(format!("warning: {message}; until then it is read unchanged"));
        class = None;
    }
    if let Some(name) = settings.declared.name().filter(|name| Class::unknown(name)) {
        notes.push(format!(
            "warning: {}, which is not known here; `tokenizer.json` is read unchanged, \
             and versions of transformers whose `{name}` builds parts of its own may give other ids",
            settings.declared.describe()
        ));
    }
    settings.add_tokens(json, class)?;
    match class {
        Some(class) => {
            let before = (flattened(json.get("normalizer")), flattened(json.get("pre_tokenizer")));
            build(json, class, settings, source)?;
            let after = (flattened(json.get("normalizer")), flattened(json.get("pre_tokenizer")));
            if matches!(class.kind, TokenizerKind::LlamaBpe | TokenizerKind::Unigram) && before != after {
                notes.push(format!(
                    "warning: `{}` of transformers 5 builds its own normalizer and pre-tokenizer, which are used; \
                     those of `tokenizer.json`, which older versions use, treat spaces differently",
                    class.name
                ));
            }
        }
        None => check_options(json, settings)?,
    }
    Ok(notes)
}

/// The part of a `tokenizer.json` with the vocabulary.
const MODEL: &str = "model";

/// Whether the pre-tokenizer is byte-level. transformers reads such a file unchanged if it names Llama's class.
fn over_bytes(json: &Map<String, Value>) -> bool {
    json.get("pre_tokenizer").is_some_and(|part| !parts(part, "ByteLevel").is_empty())
}

/// Options of the model that affect ids, with their values as JSON in classes of this kind. Null counts as an empty
/// text or false.
fn options(kind: TokenizerKind) -> &'static [(&'static str, &'static str)] {
    match kind {
        TokenizerKind::WordPiece => &[("max_input_chars_per_word", "100"), ("continuing_subword_prefix", "\"##\"")],
        TokenizerKind::Unigram => &[("unk_id", "3"), ("byte_fallback", "false")],
        TokenizerKind::LlamaBpe | TokenizerKind::GemmaBpe => &[
            ("continuing_subword_prefix", "\"\""),
            ("end_of_word_suffix", "\"\""),
            ("byte_fallback", "true"),
            ("ignore_merges", "false"),
        ],
        TokenizerKind::ByteLevelBpe | TokenizerKind::RobertaBpe | TokenizerKind::Qwen2Bpe => &[
            ("continuing_subword_prefix", "\"\""),
            ("end_of_word_suffix", "\"\""),
            ("byte_fallback", "false"),
            ("ignore_merges", "false"),
        ],
    }
}

/// The part of a `tokenizer.json` that differs from what a class of this kind builds; `None` if all agree.
fn mismatched_part(json: &Map<String, Value>, kind: TokenizerKind) -> Option<&'static str> {
    let type_of = |part: &str| json.get(part).and_then(|p| p.get("type")).and_then(Value::as_str);
    let wanted = match kind {
        TokenizerKind::WordPiece => "WordPiece",
        TokenizerKind::Unigram => "Unigram",
        _ => "BPE",
    };
    // Older files do not contain the model's type.
    if type_of("model").is_some_and(|found| found != wanted) {
        return Some(MODEL);
    }
    let other = |(key, wanted): &&(&str, &str)| {
        let found = json.get("model").and_then(|model| model.get(key)).filter(|found| !found.is_null());
        let empty = matches!(*wanted, "false" | "\"\"");
        let differs = |found| serde_json::from_str::<Value>(wanted).ok().as_ref() != Some(found);
        found.map_or(kind != TokenizerKind::WordPiece && !empty, differs)
    };
    if let Some((key, _)) = options(kind).iter().find(other) {
        return Some(match *key {
            "max_input_chars_per_word" => "model's `max_input_chars_per_word`",
            "continuing_subword_prefix" => "model's `continuing_subword_prefix`",
            "end_of_word_suffix" => "model's `end_of_word_suffix`",
            "byte_fallback" => "model's `byte_fallback`",
            "ignore_merges" => "model's `ignore_merges`",
            _ => "model's `unk_id`",
        });
    }
    let (normalizer, pre_tokenizer) = (flattened(json.get("normalizer")), flattened(json.get("pre_tokenizer")));
    let blanks = |part: &Value| *part == replace_spaces() || *part == json!({"type": "Prepend", "prepend": "▁"});
    let (fits, splits) = match kind {
        TokenizerKind::WordPiece => (type_of("normalizer") == Some("BertNormalizer"), true),
        TokenizerKind::ByteLevelBpe | TokenizerKind::RobertaBpe => {
            (normalizer.is_empty(), type_of("pre_tokenizer") == Some("ByteLevel"))
        }
        TokenizerKind::Qwen2Bpe => (normalizer == [json!({"type": "NFC"})], pre_tokenizer == qwen2_split(false)),
        TokenizerKind::LlamaBpe => {
            (normalizer.iter().all(blanks), matches!(&pre_tokenizer[..], [] | [Value::String(_)]))
        }
        TokenizerKind::GemmaBpe => {
            (normalizer == [replace_spaces()], pre_tokenizer.is_empty() || pre_tokenizer == [split_at_spaces()])
        }
        TokenizerKind::Unigram => (
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

/// The parts of a normalizer or pre-tokenizer as a flat list, without options that do not affect ids. Metaspace becomes
/// a text with its replacement, scheme and split.
fn flattened(part: Option<&Value>) -> Vec<Value> {
    let Some(part) = part.filter(|part| !part.is_null()) else { return vec![] };
    for list in ["normalizers", "pretokenizers"] {
        if let Some(parts) = part[list].as_array() {
            return parts.iter().flat_map(|part| flattened(Some(part))).collect();
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

/// The scheme by which a Metaspace prepends `▁`: `always`, `first` or `never`. Older files have the flag
/// `add_prefix_space` instead.
fn scheme(metaspace: &Value) -> &str {
    let always = metaspace["add_prefix_space"] != false;
    metaspace["prepend_scheme"].as_str().unwrap_or(if always { "always" } else { "never" })
}

/// The parts of this type in a normalizer or pre-tokenizer, also inside sequences.
fn parts<'a>(part: &'a Value, kind: &str) -> Vec<&'a Value> {
    let inner = ["normalizers", "pretokenizers"].into_iter().filter_map(|list| part[list].as_array()).flatten();
    let own = (part["type"] == kind).then_some(part);
    own.into_iter().chain(inner.flat_map(|part| parts(part, kind))).collect()
}

/// The normalizer that replaces spaces by `▁`.
fn replace_spaces() -> Value {
    json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
}

/// The pre-tokenizer that splits after spaces.
fn split_at_spaces() -> Value {
    json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false})
}

/// Qwen2's pre-tokenizer, in the form of [`flattened`]. `space`: with a space before the first word.
fn qwen2_split(space: bool) -> Vec<Value> {
    let mut bytes = json!({"type": "ByteLevel", "use_regex": false});
    if space {
        bytes["add_prefix_space"] = true.into();
    }
    let split = json!({"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": false});
    vec![split, bytes]
}

/// Replaces the parts of a `tokenizer.json` by those of the class.
fn build(json: &mut Map<String, Value>, class: &Class, settings: &Settings, source: &Path) -> Result<(), DataError> {
    let mark = |json: &Map<String, Value>, key: &str| {
        let token = settings.named(key, Some(class)).unwrap_or_default();
        match id_of(json, &token) {
            Some(id) => Ok((token, id)),
            None => Err(malformed(source, format!("it lacks the `{key}` of `{}`, `{token}`", class.name))),
        }
    };
    let flag = |key: &str, default: bool| Ok::<bool, DataError>(settings.flag(key)?.unwrap_or(default));
    match class.kind {
        TokenizerKind::WordPiece => {
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
        TokenizerKind::Qwen2Bpe => {
            let mut parts = qwen2_split(flag("add_prefix_space", false)?);
            for part in parts.iter_mut().filter(|part| part["type"] == "ByteLevel") {
                part["trim_offsets"] = true.into();
                part["add_prefix_space"] = (part["add_prefix_space"] == true).into();
            }
            json.insert("pre_tokenizer".into(), json!({"type": "Sequence", "pretokenizers": parts}));
        }
        TokenizerKind::LlamaBpe => {
            let scheme = match (flag("add_prefix_space", true)?, flag("legacy", false)?) {
                (false, _) => "never",
                (true, false) => "first",
                (true, true) => "always",
            };
            json.insert("normalizer".into(), Value::Null);
            json.insert("pre_tokenizer".into(), metaspace(scheme, false));
        }
        TokenizerKind::GemmaBpe => {
            json.insert("normalizer".into(), replace_spaces());
            json.insert("pre_tokenizer".into(), split_at_spaces());
        }
        TokenizerKind::Unigram => {
            let scheme = if flag("add_prefix_space", true)? { "always" } else { "never" };
            let parts = json!([{"type": "WhitespaceSplit"}, metaspace(scheme, true)]);
            json.insert("pre_tokenizer".into(), json!({"type": "Sequence", "pretokenizers": parts}));
            let (sep, cls) = (mark(json, "eos_token")?, mark(json, "bos_token")?);
            json.insert("post_processor".into(), json!({"type": "BertProcessing", "sep": sep, "cls": cls}));
        }
        TokenizerKind::ByteLevelBpe | TokenizerKind::RobertaBpe => {
            let space = flag("add_prefix_space", false)?;
            let level =
                json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": true});
            json.insert("pre_tokenizer".into(), level);
            if class.kind == TokenizerKind::RobertaBpe {
                let (sep, cls) = (mark(json, "sep_token")?, mark(json, "cls_token")?);
                let marks = json!({
                    "type": "RobertaProcessing", "sep": sep, "cls": cls,
                    "trim_offsets": true, "add_prefix_space": space,
                });
                json.insert("post_processor".into(), marks);
            }
        }
    }
    Ok(())
}

/// The pre-tokenizer Metaspace, which replaces spaces by `▁` and prepends one to every section of a text (`always`), to
/// its first (`first`), or to none (`never`).
fn metaspace(scheme: &str, split: bool) -> Value {
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split})
}

/// Checks that options in the settings agree with the file, if no known class decides. Some versions of transformers
/// use the ones, some the others.
fn check_options(json: &Map<String, Value>, settings: &Settings) -> Result<(), DataError> {
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
