//! Reads the tokenizer in a GGUF file, which is converted to the form of `tokenizer.json`.

use std::collections::HashMap;
use std::path::Path;

use peft_runtime::RuntimeError;
use peft_runtime::gguf::{GgufFile, Value as Stored};
use serde_json::{Map, Value, json};

use super::classes::QWEN2_SPLIT;
use super::files::malformed;
use super::template::Templates;
use crate::data::DataError;
use crate::hub::checkpoint::gguf::TOKENS;

// Keys of the metadata.
const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// The value of [`MODEL`] for byte-level BPE, the only kind of tokenizer that is read.
const BYTES: &str = "gpt2";

/// Other values of [`MODEL`], and what they are.
const KINDS: &[(&str, &str)] = &[
    ("llama", "a sentencepiece model, merged by scores"),
    ("t5", "a sentencepiece model, unigram"),
    ("bert", "WordPiece"),
    ("rwkv", "RWKV's vocabulary"),
    ("plamo2", "PLaMo's vocabulary"),
    ("none", "no tokenizer"),
    ("no_vocab", "no tokenizer"),
];

/// The types of tokens, with llama.cpp's numbers.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;
const BYTE: i64 = 6;

/// The processing of a text before the merges, selected by the file's `tokenizer.ggml.pre`.
struct PreTokenizer {
    /// The values of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    /// Whether the text is first normalised to Unicode's NFC.
    nfc: bool,
    /// How the text is split into words.
    split: Split,
    /// Whether a word of the vocabulary is one token regardless of the merges (`ignore_merges`).
    ignore_merges: bool,
    /// Whether the token `bos` begins a text if the file does not say.
    add_bos: bool,
}

/// How a text is split into words.
enum Split {
    /// By GPT-2's pattern.
    Words,
    /// Each digit is a word, and the rest is split by GPT-2's pattern.
    Digits,
    /// By this regular expression.
    Pattern(&'static str),
}

/// Llama 3's pattern.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PRE_TOKENIZERS: &[PreTokenizer] = &[
    PreTokenizer { names: &["gpt-2"], nfc: false, split: Split::Words, ignore_merges: false, add_bos: false },
    PreTokenizer {
        names: &["smollm", "starcoder"],
        nfc: false,
        split: Split::Digits,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        nfc: false,
        split: Split::Pattern(LLAMA3_SPLIT),
        ignore_merges: true,
        add_bos: true,
    },
    PreTokenizer {
        names: &["qwen2"],
        nfc: true,
        split: Split::Pattern(QWEN2_SPLIT),
        ignore_merges: false,
        add_bos: false,
    },
];

/// The tokenizer in a GGUF file.
pub struct Contained {
    /// The tokenizer in the form of `tokenizer.json`.
    pub json: Map<String, Value>,
    /// The chat templates, if the file holds any.
    pub templates: Option<Templates>,
}

/// Reads the tokenizer of the GGUF file at `path`, which must be byte-level BPE with a known pre-tokenizer.
///
/// # Errors
///
/// The file cannot be read, or holds no tokenizer or one of another kind.
pub fn read(path: &Path) -> Result<Contained, DataError> {
    let file = GgufFile::open(path).map_err(|error| match error {
        RuntimeError::File { path, message } => malformed(&path, message),
        other => malformed(path, other),
    })?;
    let json = describe(&file).map_err(|why| malformed(path, why))?;
    let templates = Templates::of_gguf(&file, path, &file.texts(TOKENS).unwrap_or_default());
    Ok(Contained { json, templates })
}

/// The suggestion for a file whose tokenizer is not read.
const MEND: &str = "name the folder of the model's own tokenizer with `--tokenizer`";

/// Converts the metadata to a `tokenizer.json`.
fn describe(file: &GgufFile) -> Result<Map<String, Value>, String> {
    let pre = match file.text(MODEL) {
        Some(BYTES) => pre(file)?,
        Some(other) => {
            let what =
                KINDS.iter().find(|(kind, _)| *kind == other).map_or(String::new(), |(_, what)| format!(" ({what})"));
            return Err(format!(
                "its `{MODEL}` is `{other}`{what}, and only byte-level BPE, `{BYTES}`, is read; {MEND}"
            ));
        }
        None => return Err(format!("it holds no tokenizer (`{MODEL}`); {MEND}")),
    };
    let tokens = file.texts(TOKENS).ok_or_else(|| format!("it has no list of texts `{TOKENS}`; {MEND}"))?;
    let (vocab, added) = vocabulary(file, &tokens)?;
    let merges = file.texts(MERGES).ok_or_else(|| format!("it has no list of texts `{MERGES}`; {MEND}"))?;
    let pair = |(number, merge): (usize, &&str)| {
        // The first character is skipped, since a token may begin with a space, which is also the separator.
        let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let (first, second) = at.map(|at| (&merge[..at], &merge[at + 1..])).unwrap_or_default();
        match first.is_empty() || second.is_empty() || second.contains(' ') {
            true => {
                Err(format!("merge {number} of `{MERGES}`, `{}`, is not two tokens and a space", merge.escape_debug()))
            }
            false => Ok(json!([first, second])),
        }
    };
    let merges: Result<Vec<Value>, String> = merges.iter().enumerate().map(pair).collect();
    let space = flag(file, "tokenizer.ggml.add_space_prefix")?.unwrap_or(false);
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": false, "byte_fallback": false, "ignore_merges": pre.ignore_merges,
        "vocab": vocab, "merges": merges?,
    });
    let parts = [
        ("version", json!("1.0")),
        ("added_tokens", added),
        ("normalizer", if pre.nfc { json!({"type": "NFC"}) } else { Value::Null }),
        ("pre_tokenizer", split(&pre.split, space)),
        ("post_processor", marks(file, &tokens, pre.add_bos)?),
        ("decoder", json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true})),
        ("model", model),
    ];
    Ok(parts.map(|(key, part)| (key.to_owned(), part)).into_iter().collect())
}

/// The pre-tokenizer that the file names.
fn pre(file: &GgufFile) -> Result<&'static PreTokenizer, String> {
    let known = || PRE_TOKENIZERS.iter().flat_map(|pre| pre.names).copied().collect::<Vec<_>>().join(", ");
    let Some(name) = file.text(PRE) else {
        return Err(format!("it does not say how its tokenizer splits text (`{PRE}`); {MEND}"));
    };
    let found = PRE_TOKENIZERS.iter().find(|pre| pre.names.contains(&name));
    found.ok_or_else(|| format!("its `{PRE}` is `{name}`, and the known ones are {}; {MEND}", known()))
}

/// The vocabulary as ids by token, and `added_tokens`, which are found in a text before it is split. Unused tokens are
/// in neither.
fn vocabulary(file: &GgufFile, tokens: &[&str]) -> Result<(Value, Value), String> {
    let types = match file.value(TYPES) {
        None => vec![NORMAL; tokens.len()],
        Some(Stored::List(list)) => {
            let number = |value: Stored| match value {
                Stored::Signed(n) => n,
                Stored::Unsigned(n) => i64::try_from(n).unwrap_or(0),
                _ => 0,
            };
            file.elements(list).into_iter().map(number).collect()
        }
        Some(_) => return Err(format!("its `{TYPES}` is not a list")),
    };
    if types.len() != tokens.len() {
        return Err(format!("it has {} tokens in `{TOKENS}` and {} numbers in `{TYPES}`", tokens.len(), types.len()));
    }
    let (mut vocab, mut added, mut ids) = (Map::new(), vec![], HashMap::new());
    for (id, (token, kind)) in tokens.iter().zip(types).enumerate() {
        if !(NORMAL..=BYTE).contains(&kind) {
            return Err(format!("token {id} of `{TYPES}` is of type {kind}, and types are {NORMAL} to {BYTE}"));
        }
        if kind == UNUSED {
            continue;
        }
        let id = u32::try_from(id).map_err(|_| format!("it has {} tokens", tokens.len()))?;
        if let Some(first) = ids.insert(*token, id) {
            return Err(format!("its tokens {first} and {id} are both `{}`", token.escape_debug()));
        }
        vocab.insert((*token).to_owned(), id.into());
        if matches!(kind, UNKNOWN | CONTROL | USER_DEFINED) {
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": kind != USER_DEFINED,
            }));
        }
    }
    Ok((Value::Object(vocab), Value::Array(added)))
}

/// The pre-tokenizer in the form of `tokenizer.json`.
fn split(split: &Split, space: bool) -> Value {
    let bytes = |pattern: bool| json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": pattern});
    let both = |first: Value, bytes: Value| json!({"type": "Sequence", "pretokenizers": [first, bytes]});
    match split {
        Split::Words => bytes(true),
        Split::Digits => both(json!({"type": "Digits", "individual_digits": true}), bytes(true)),
        Split::Pattern(pattern) => both(
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}),
            bytes(false),
        ),
    }
}

/// The post-processor, which adds the tokens of `add_bos_token` and `add_eos_token` around a text.
fn marks(file: &GgufFile, tokens: &[&str], add_bos: bool) -> Result<Value, String> {
    let mark = |name: &str, default: bool| -> Result<Option<(String, i64)>, String> {
        if !flag(file, &format!("tokenizer.ggml.add_{name}_token"))?.unwrap_or(default) {
            return Ok(None);
        }
        let key = format!("tokenizer.ggml.{name}_token_id");
        let id = file.integer(&key);
        let token = id.and_then(|id| tokens.get(usize::try_from(id).ok()?));
        match (id, token) {
            (Some(id), Some(token)) => Ok(Some((token.to_string(), id))),
            (Some(id), None) => Err(format!("its `{key}` is {id}, and it has {} tokens", tokens.len())),
            (None, _) => Err(format!("its `add_{name}_token` is true, and it has no `{key}`")),
        }
    };
    let (first, last) = (mark("bos", add_bos)?, mark("eos", false)?);
    if first.is_none() && last.is_none() {
        return Ok(Value::Null);
    }
    let special = |mark: &Option<(String, i64)>, kind: u32| {
        mark.as_ref().map(|(token, _)| json!({"SpecialToken": {"id": token, "type_id": kind}}))
    };
    let around = |sequence: &str, kind: u32| {
        let text = json!({"Sequence": {"id": sequence, "type_id": kind}});
        [special(&first, kind), Some(text), special(&last, kind)].into_iter().flatten().collect::<Vec<Value>>()
    };
    let entry = |(token, id): &(String, i64)| (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
    let pair = [around("A", 0), around("B", 1)].concat();
    Ok(json!({
        "type": "TemplateProcessing", "single": around("A", 0), "pair": pair,
        "special_tokens": first.iter().chain(&last).map(entry).collect::<Map<String, Value>>(),
    }))
}

/// The value of a flag; `None` if it is absent.
fn flag(file: &GgufFile, key: &str) -> Result<Option<bool>, String> {
    match (file.value(key), file.bool(key)) {
        (None, _) => Ok(None),
        (_, Some(flag)) => Ok(Some(flag)),
        (Some(other), None) => Err(format!("its `{key}` is {other:?}, and should be true or false")),
    }
}
