//! Compares the ids of tokenizers in every format with transformers', and checks the errors for files that are not
//! tokenizers, are damaged, or contradict each other.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use peft_grammar::model::{Task, TaskKind};
use serde_json::Value;
use tempfile::TempDir;

use super::models;
use crate::data::{DataError, Tokenizer};

/// The fixtures that `tests/interop/tokenizer_fixtures.py` wrote.
fn fixtures() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/tokenizers.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn folder(files: &[(String, String)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

/// A task with these special tokens and no other demands on the tokenizer.
fn task(special: &[&str]) -> Task {
    let special = special.iter().map(|t| t.to_string()).collect();
    let kind = TaskKind::Generation { special, template: vec![], target: String::new(), each: vec![], pack: false };
    Task { name: "t".into(), max_tokens: 64, bidirectional: false, kind }
}

fn load(path: &Path) -> Result<Tokenizer, DataError> {
    Tokenizer::load(path, &task(&[]), 100_000)
}

/// The error for a folder with these files, with `DIR` in place of its path.
fn refusal(files: &[(&str, &str)]) -> String {
    let files: Vec<_> = files.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect();
    let folder = folder(&files);
    let error = load(folder.path()).err().expect("it is refused").to_string();
    error.replace(&folder.path().display().to_string(), "DIR")
}

/// The texts whose ids differ from those of transformers, and the number of tokens if it differs. `marked`: texts with
/// special tokens are compared, too.
fn differences(name: &str, tokenizer: &Tokenizer, texts: &[&str], expected: &Value, marked: bool) -> Vec<String> {
    let mut wrong = vec![];
    for (kind, marks) in [("plain", false), ("marked", true)] {
        // GPT-2's tokenizers add no special tokens, since a template contains them.
        if marks && !marked {
            continue;
        }
        let found = tokenizer.encode(texts.to_vec(), marks).unwrap_or_else(|e| panic!("{name}: {e}"));
        let expected: Vec<Vec<i32>> = serde_json::from_value(expected[kind].clone()).unwrap();
        for ((text, found), expected) in texts.iter().zip(found).zip(expected) {
            if found != expected {
                wrong.push(format!("{name}, {kind}: {text:?} is {found:?}, in transformers {expected:?}"));
            }
        }
    }
    if tokenizer.vocabulary() as u64 != expected["length"] {
        wrong.push(format!("{name}: {} tokens, in transformers {}", tokenizer.vocabulary(), expected["length"]));
    }
    wrong
}

fn texts(fixtures: &Value) -> Vec<&str> {
    fixtures["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect()
}

/// The files of a case.
fn files(fixtures: &Value, case: &Value) -> Vec<(String, String)> {
    let content = |content: &Value| match content.as_str() {
        Some(key) => fixtures["contents"][key].as_str().unwrap().to_owned(),
        None => content.to_string(),
    };
    case["files"].as_object().unwrap().iter().map(|(name, text)| (name.clone(), content(text))).collect()
}

#[test]
fn every_format_gives_the_ids_of_transformers() {
    let fixtures = fixtures();
    let texts = texts(&fixtures);
    let mut wrong = vec![];
    for (name, case) in fixtures["cases"].as_object().unwrap() {
        let folder = folder(&files(&fixtures, case));
        let marked = name.contains("piece") || name.contains("marked");
        match load(folder.path()) {
            Ok(tokenizer) => wrong.extend(differences(name, &tokenizer, &texts, case, marked)),
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The class of a `model_type` is the one in transformers' table.
#[test]
fn every_model_has_the_class_of_transformers() {
    let fixtures = fixtures();
    let models = fixtures["models"].as_object().unwrap();
    assert!(models.len() > 250);
    for (model, class) in models {
        assert_eq!(models::class_of(model), class.as_str(), "{model}");
        let overruled = fixtures["overruled"].as_array().unwrap().iter().any(|other| other == model);
        assert_eq!(models::overrules(model), overruled, "{model}");
    }
    assert_eq!(models::class_of("bert "), None);
    // transformers has no class for the first model, and no configuration for the second.
    assert_eq!(["llama", "realm"].map(models::class_of), [None; 2]);
}

/// A class that follows from the `model_type` is used, or reported as unknown, like one that is named.
#[test]
fn classes_follow_from_the_model() {
    let unigram = unigram();
    let with = |model: &str, keys: &str, json: &Value| {
        let config = format!(r#"{{"model_type": "{model}"}}"#);
        folder(&[
            ("tokenizer.json".into(), json.to_string()),
            ("config.json".into(), config),
            ("tokenizer_config.json".into(), keys.into()),
        ])
    };
    let said = |folder: &TempDir| load(folder.path()).map(|tokenizer| tokenizer.describe());
    for (model, class) in [("camembert", "Camembert"), ("albert", "Albert"), ("deberta-v2", "DebertaV2"), ("t5", "T5")]
    {
        let line = said(&with(model, "{}", &unigram)).unwrap();
        let wanted = format!(
            "warning: the `model_type` of `config.json` is `{model}`, whose tokenizer is `{class}Tokenizer`, which is \
             not known here"
        );
        assert!(line.contains(&wanted), "{line}");
        let named = said(&with("", &format!(r#"{{"tokenizer_class": "{class}Tokenizer"}}"#), &unigram)).unwrap();
        assert!(named.contains(&format!("`{class}Tokenizer`, which is not known here")), "{named}");
        // A Metaspace, inside a sequence or alone, has to agree with `add_prefix_space`.
        let mut alone = unigram.clone();
        alone["pre_tokenizer"] = alone["pre_tokenizer"]["pretokenizers"][1].clone();
        for json in [&unigram, &alone] {
            let message = said(&with(model, r#"{"add_prefix_space": false}"#, json)).unwrap_err().to_string();
            assert!(message.contains("`add_prefix_space` is false, and `tokenizer.json` has true for it"), "{message}");
            said(&with(model, r#"{"add_prefix_space": true}"#, json)).unwrap();
        }
    }
    // There is no warning if transformers reads the file unchanged, whatever class is named.
    for (model, keys) in
        [("mistral", "{}"), ("mistral", r#"{"tokenizer_class": "T5Tokenizer"}"#), ("no-such-model", "{}")]
    {
        let line = said(&with(model, keys, &unigram)).unwrap();
        assert!(!line.contains("warning"), "{line}");
    }
    // The class of this model takes precedence over the one in its settings.
    let message = said(&with("qwen2", r#"{"tokenizer_class": "LlamaTokenizer"}"#, &blanks())).unwrap_err().to_string();
    assert!(message.contains("`Qwen2Tokenizer`") && message.contains("whatever is named"), "{message}");
    // Vocabulary files of an unknown class are refused, whether the class is named or follows from the model.
    let config = r#"{"model_type": "mpnet"}"#;
    let message = refusal(&[("vocab.txt", WORDS), ("config.json", config)]);
    assert!(message.contains("whose tokenizer is `MPNetTokenizer`, which is not read from this file"), "{message}");
    let message = refusal(&[("vocab.txt", WORDS), ("config.json", r#"{"model_type": "esm"}"#)]);
    assert!(message.contains("implements `EsmTokenizer` only in Python"), "{message}");
}

/// The error names which of the files that belong together is damaged.
#[test]
fn truncated_merges_are_refused() {
    let fixtures = fixtures();
    let content = |name: &str| fixtures["contents"][name].as_str().unwrap();
    let (vocab, merges) = (content("gpt2_vocab"), content("gpt2_merges"));
    for end in ["the fil", "zz zz\n"] {
        let message = refusal(&[("vocab.json", vocab), ("merges.txt", &(merges.to_owned() + end))]);
        assert!(
            message.contains("`DIR/merges.txt` cannot be used as a tokenizer")
                && message.contains("`vocab.json` does not have"),
            "{message}"
        );
    }
    // A file that is cut between two lines lacks most merges of the vocabulary.
    let mut ids: serde_json::Map<String, Value> = serde_json::from_str(vocab).unwrap();
    for more in 0..300 {
        ids.insert(format!("word{more}"), (340 + more).into());
    }
    let vocab = Value::Object(ids).to_string();
    let message = refusal(&[("vocab.json", &vocab), ("merges.txt", merges)]);
    assert!(message.contains("`DIR/merges.txt`") && message.contains("it is truncated"), "{message}");
}

/// An added token after a vocabulary that skips ids would take the id of one of its tokens.
#[test]
fn added_tokens_after_skipped_ids_are_refused() {
    for vocab in ["[UNK]\n[CLS]\n[SEP]\nfilm\nfilm\n##s\n", "[UNK]\n[CLS]\n[SEP]\n##s\nfilm\n##s\n"] {
        let message = refusal(&[
            ("vocab.txt", vocab),
            ("tokenizer_config.json", r#"{"tokenizer_class": "BertTokenizer", "pad_token": "<new>"}"#),
        ]);
        let wanted = "`DIR/vocab.txt` cannot be used as a tokenizer: `<new>` (5, `pad_token` of its settings) has the \
                      id of `##s`";
        assert!(message.contains(wanted), "{message}");
        let whole = folder(&[("vocab.txt".into(), vocab.into())]);
        load(whole.path()).unwrap();
    }
}

/// A token without a row in the model's embedding is an error only when a text contains it.
#[test]
fn tokens_without_a_row_are_refused_in_texts() {
    let sound = [("vocab.txt".to_owned(), WORDS.to_owned())];
    let with = |name: &str, keys: &str| folder(&[&sound[..], &[(name.to_owned(), keys.to_owned())]].concat());
    for (name, keys, from) in [
        (
            "tokenizer_config.json",
            r#"{"tokenizer_class": "BertTokenizer", "pad_token": "<new>"}"#,
            "`pad_token` of its settings",
        ),
        (
            "special_tokens_map.json",
            r#"{"additional_special_tokens": ["<new>"]}"#,
            "`additional_special_tokens` of its settings",
        ),
        ("added_tokens.json", r#"{"<new>": 5}"#, "`added_tokens.json`"),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"5": {"content": "<new>"}}}"#, "`added_tokens_decoder`"),
    ] {
        let folder = with(name, keys);
        let load = |rows, special: &[&str]| Tokenizer::load(folder.path(), &task(special), rows);
        let tokenizer = load(5, &[]).unwrap();
        let line = tokenizer.describe();
        assert!(line.contains(&format!("the model's 5 rows have none for `<new>` (5, {from})")), "{line}");
        assert_eq!(tokenizer.encode(vec!["films"], false).unwrap(), [[3, 4]]);
        let message = tokenizer.encode(vec!["a <new> film"], false).unwrap_err().to_string();
        assert!(
            message.contains("a text holds its token `<new>`, whose id is 5, and the model has 5 rows"),
            "{message}"
        );
        assert!(!load(6, &[]).unwrap().describe().contains("have none"));
        // The task's special tokens need rows of their own.
        for (rows, special) in [(5, "<new>"), (5, "<task>"), (6, "<task>")] {
            let message = load(rows, &[special]).err().expect("it is refused").to_string();
            assert!(message.contains(&format!("`<new>` (5, {from})")), "{message}");
        }
        assert_eq!(load(7, &["<task>"]).unwrap().special("<task>"), Some(6));
        // A model with fewer rows than the vocabulary has another tokenizer.
        let message = load(4, &[]).err().expect("it is refused").to_string();
        assert!(message.contains("does not belong to this model") && !message.contains("<new>"), "{message}");
    }
}

/// GPT-2's vocabulary in both of its formats, and RoBERTa's, give the ids of transformers.
#[test]
fn the_real_vocabularies_give_the_ids_of_transformers() {
    let Some(root) = std::env::var_os("PEFTC_DATA").filter(|root| !root.is_empty()) else {
        println!("skipped: PEFTC_DATA is not set");
        return;
    };
    let fixtures = fixtures();
    let texts = texts(&fixtures);
    let real = Path::new(&root).join("data/tokenizers");
    let read = |name: &str| fs::read_to_string(real.join("gpt2").join(name)).unwrap();
    let old = folder(&[("vocab.json".into(), read("vocab.json")), ("merges.txt".into(), read("merges.txt"))]);
    for (name, path) in [("gpt2", real.join("gpt2")), ("gpt2", old.path().into()), ("roberta", real.join("roberta"))] {
        let tokenizer = load(&path).unwrap();
        let wrong = differences(name, &tokenizer, &texts, &fixtures["real"][name], name == "roberta");
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        if name == "roberta" {
            // A space at the end is a token of its own.
            assert_eq!(tokenizer.encode(vec!["film "], true).unwrap()[0][2..], [1437, 2]);
        }
    }
}

/// A small `tokenizer.json` with parts of most types.
const PARTS: &str = r###"{
    "version": "1.0", "truncation": {"max_length": 512, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    "padding": {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
    "added_tokens": [{"id": 0, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "NFKC"}, {"type": "Replace", "pattern": {"String": "``"}, "content": "\""},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}, {"type": "StripAccents"}, {"type": "Lowercase"},
        {"type": "Strip", "strip_left": true, "strip_right": false}, {"type": "Prepend", "prepend": "▁"}]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "WhitespaceSplit"}, {"type": "Digits", "individual_digits": true},
        {"type": "Split", "pattern": {"Regex": "[^\\p{L}]+"}, "behavior": "MergedWithPrevious", "invert": false},
        {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}]},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<unk>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<unk>": {"id": "<unk>", "ids": [0], "tokens": ["<unk>"]}}},
    "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "WordPiece", "prefix": "##", "cleanup": true},
        {"type": "CTC", "pad_token": "[PAD]", "word_delimiter_token": "|", "cleanup": true}]},
    "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false,
        "vocab": [["<unk>", 0.0], ["▁", -2.5], ["▁the", -3.0], ["film", -4.25], ["e", -5.0], ["s", -5.5]]}
}"###;

/// The random number generator SplitMix64 (Steele et al. 2014).
struct Draws(u64);

impl Draws {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n.max(1) as u64) as usize
    }

    /// Changes some bytes.
    fn bytes(&mut self, text: &str) -> Vec<u8> {
        const PUT: [&str; 14] = [
            "0",
            "-1",
            "1e99",
            "18446744073709551615",
            "null",
            "\"\"",
            "{}",
            "[",
            "]",
            ",",
            "\n",
            "\\u0000",
            "\\ud800",
            "\u{fffd}",
        ];
        let mut bytes = text.as_bytes().to_vec();
        for _ in 0..=self.below(3) {
            let at = self.below(bytes.len());
            let end = (at + self.below(24)).min(bytes.len());
            match self.below(4) {
                0 if at < bytes.len() => bytes[at] = self.below(256) as u8,
                1 => drop(bytes.drain(at..end)),
                2 => drop(bytes.splice(at..end.min(at + 4), PUT[self.below(PUT.len())].bytes())),
                _ => {
                    let part = bytes[at..end].to_vec();
                    bytes.splice(at..at, part);
                }
            }
        }
        bytes
    }

    /// Changes or removes a random value or key of a JSON file.
    fn json(&mut self, text: &str) -> Vec<u8> {
        let mut whole: Value = serde_json::from_str(text).unwrap();
        let mut at = &mut whole;
        loop {
            let inner = match at {
                Value::Array(items) => !items.is_empty(),
                Value::Object(items) => !items.is_empty(),
                _ => false,
            };
            if !inner || self.below(8) == 0 {
                break;
            }
            at = match at {
                Value::Array(items) => {
                    let index = self.below(items.len());
                    &mut items[index]
                }
                Value::Object(items) => {
                    let index = self.below(items.len());
                    let key = items.keys().nth(index).unwrap().clone();
                    match self.below(16) {
                        0 => drop(items.shift_remove(&key)),
                        1 => {
                            let value = items.shift_remove(&key).unwrap();
                            items.insert(format!("{key}x"), value);
                        }
                        _ => {}
                    }
                    match items.get_mut(&key) {
                        Some(value) => value,
                        None => return whole.to_string().into_bytes(),
                    }
                }
                other => other,
            };
        }
        *at = match self.below(12) {
            0 => Value::Null,
            1 => true.into(),
            2 => 0.into(),
            3 => (-1).into(),
            4 => u64::MAX.into(),
            5 => u32::MAX.into(),
            6 => 1e300.into(),
            7 => "".into(),
            8 => "(".into(),
            9 => "a".into(),
            10 => Value::Array(vec![]),
            _ => Value::Object(Default::default()),
        };
        whole.to_string().into_bytes()
    }
}

/// Damaged files are read, or refused with the path of their folder; no thread panics.
#[test]
fn damaged_files_are_contained() {
    let fixtures = fixtures();
    let mut all: Vec<Vec<(String, String)>> =
        fixtures["cases"].as_object().unwrap().values().map(|case| files(&fixtures, case)).collect();
    all.push(vec![("tokenizer.json".into(), PARTS.into())]);
    assert!(load(folder(&all[all.len() - 1]).path()).is_ok(), "before it is damaged it is read");
    let texts = texts(&fixtures);
    let mut draws = Draws(22);
    let (mut read, mut refused) = (0, 0);
    for number in 0..MUTATIONS {
        // Every other mutation is of the file with most parts.
        let sound = if number % 2 == 0 { &all[all.len() - 1] } else { &all[draws.below(all.len())] };
        let folder = folder(sound);
        let (name, text) = &sound[draws.below(sound.len())];
        let damaged = match name.ends_with(".json") && draws.below(3) > 0 {
            true => draws.json(text),
            false => draws.bytes(text),
        };
        fs::write(folder.path().join(name), &damaged).unwrap();
        let result = load(folder.path()).and_then(|tokenizer| tokenizer.encode(texts.clone(), true));
        match result {
            Ok(_) => read += 1,
            Err(error) => {
                refused += 1;
                let message = error.to_string();
                assert!(message.contains(folder.path().to_str().unwrap()), "{number}, {name}: {message}");
            }
        }
    }
    // If nearly all files were read, or refused, the mutations would test little.
    assert!(read > MUTATIONS / 10 && refused > MUTATIONS / 10, "{read} read, {refused} refused");
}

const MUTATIONS: usize = 750;

/// Files on which the library panics, when it reads them or when it encodes a text.
#[test]
fn a_panic_of_the_library_is_a_refusal() {
    let damaged = [
        ("normalizer", serde_json::json!({"type": "Precompiled", "precompiled_charsmap": "AQAAAA=="})),
        ("pre_tokenizer", serde_json::json!({"type": "FixedLength", "length": 0})),
        (
            "post_processor",
            serde_json::json!({
                "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {},
            }),
        ),
    ];
    for (part, value) in damaged {
        let mut json: Value = serde_json::from_str(PARTS).unwrap();
        json[part] = value;
        let folder = folder(&[("tokenizer.json".into(), json.to_string())]);
        let error = load(folder.path()).and_then(|tokenizer| tokenizer.encode(vec!["film"], true)).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("tokenizer.json") && message.contains("crate `tokenizers` panics on it: "),
            "{part}: {message}"
        );
    }
}

/// Deeply nested files are refused before recursion exhausts the stack.
#[test]
fn nesting_has_a_limit() {
    for depth in [14, 15, 50, 100, 5000] {
        let open = r#"{"type": "Sequence", "normalizers": ["#.repeat(depth);
        let nested = format!("{open}{}", "]}".repeat(depth));
        let mut json: Value = serde_json::from_str(PARTS).unwrap();
        json["normalizer"] = "HERE".into();
        let text = json.to_string().replace("\"HERE\"", &nested);
        let folder = folder(&[("tokenizer.json".into(), text)]);
        match load(folder.path()) {
            Ok(_) => assert!(depth <= 16, "{depth}"),
            Err(error) => assert!(depth > 16 && error.to_string().contains("tokenizer.json"), "{depth}: {error}"),
        }
    }
}

/// Patterns that are nested deeply, compile to large programs or take long to match are bounded.
#[test]
fn patterns_have_limits() {
    let begun = Instant::now();
    let patterns = [
        "(".repeat(100_000),
        "(a".repeat(5_000) + &")".repeat(5_000),
        "(?:a{1000}){1000}".into(),
        "[".into(),
        "(?:(a|a|b?)*)*\\1(?=c)".into(),
    ];
    for (pattern, fine) in patterns.iter().zip([false, false, false, false, true]) {
        let mut json: Value = serde_json::from_str(PARTS).unwrap();
        json["pre_tokenizer"] = serde_json::json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let folder = folder(&[("tokenizer.json".into(), json.to_string())]);
        let read = load(folder.path()).and_then(|tokenizer| tokenizer.encode(vec![&"ab".repeat(40)], false));
        assert_eq!(read.is_ok(), fine, "{}", &pattern[..pattern.len().min(20)]);
    }
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
}

const VOCAB: &str = r#"{"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}"#;
const MERGES: &str = "#version: 0.2\na b\n";
const WORDS: &str = "[UNK]\n[CLS]\n[SEP]\nfilm\n##s\n";

/// The error for a folder without a tokenizer names what it holds and what to do.
#[test]
fn folders_without_a_tokenizer_are_refused() {
    insta::assert_snapshot!(refusal(&[("config.json", "{}"), ("model.safetensors", "")]), @"no tokenizer in `DIR`: it \
                                                                                            holds `config.json`, \
                                                                                            `model.safetensors`, and \
                                                                                            a tokenizer is \
                                                                                            `tokenizer.json`, \
                                                                                            `vocab.json` with \
                                                                                            `merges.txt`, or \
                                                                                            `vocab.txt`; copy the \
                                                                                            model's own there, or \
                                                                                            name its folder with \
                                                                                            `--tokenizer`");
    insta::assert_snapshot!(refusal(&[("sentencepiece.bpe.model", "")]), @r#"`DIR/sentencepiece.bpe.model` cannot be used as a tokenizer: it is a sentencepiece model, which is not read here; transformers writes it as `tokenizer.json`: python -c "from transformers import AutoTokenizer as T; T.from_pretrained('DIR').save_pretrained('DIR')""#);
    insta::assert_snapshot!(refusal(&[("tiktoken.model", "")]), @r#"`DIR/tiktoken.model` cannot be used as a tokenizer: it is a tiktoken vocabulary, which is not read here; transformers writes it as `tokenizer.json`: python -c "from transformers import AutoTokenizer as T; T.from_pretrained('DIR').save_pretrained('DIR')""#);
    insta::assert_snapshot!(refusal(&[("vocab.json", VOCAB)]), @"no tokenizer in `DIR`: `vocab.json` is there, but \
                                                                 the `merges.txt` that belongs to it is not: fetch \
                                                                 it, too");
    insta::assert_snapshot!(refusal(&[("merges.txt", MERGES)]), @"no tokenizer in `DIR`: `merges.txt` is there, but \
                                                                  the `vocab.json` that belongs to it is not: fetch \
                                                                  it, too");
    insta::assert_snapshot!(refusal(&[("encoder.json", VOCAB), ("vocab.bpe", MERGES)]), @"no tokenizer in `DIR`: \
                                                                                          `encoder.json` and \
                                                                                          `vocab.bpe` are the first \
                                                                                          names of `vocab.json` and \
                                                                                          `merges.txt`: rename both");
    let other = ("tokenizer_config.json", r#"{"tokenizer_class": "MPNetTokenizer"}"#);
    insta::assert_snapshot!(refusal(&[("vocab.txt", WORDS), other]), @r#"`DIR/vocab.txt` cannot be used as a tokenizer: its `tokenizer_class` is `MPNetTokenizer`, which is not read from this file; transformers writes it as `tokenizer.json`: python -c "from transformers import AutoTokenizer as T; T.from_pretrained('DIR').save_pretrained('DIR')""#);
    // The path of the file itself is refused, too.
    let folder = folder(&[("tokenizer.model".into(), "".into()), ("vocab.txt".into(), WORDS.into())]);
    let message = load(&folder.path().join("tokenizer.model")).err().unwrap().to_string();
    assert!(message.contains("tokenizer.model") && message.contains("a sentencepiece model"), "{message}");
    assert_eq!(load(&folder.path().join("vocab.txt")).unwrap().vocabulary(), 5);
}

/// Settings that contradict a file or are not supported are refused.
#[test]
fn bad_settings_are_refused() {
    let pieces = |keys: &str| refusal(&[("vocab.txt", WORDS), ("tokenizer_config.json", keys)]);
    insta::assert_snapshot!(pieces("{"), @"`DIR/tokenizer_config.json`: no JSON (EOF while parsing an object at line \
                                           1 column 1); write or fetch it again");
    insta::assert_snapshot!(pieces(r#"{"do_lower_case": "no"}"#), @r#"`DIR/tokenizer_config.json`: `do_lower_case` is "no", and should be true or false"#);
    insta::assert_snapshot!(pieces(r#"{"sep_token": "</s>", "added_tokens_decoder": {"x": {"content": "y"}}}"#), @"`DIR/tokenizer_config.json`: \
                                                                                                                   `added_tokens_decoder` \
                                                                                                                   has \
                                                                                                                   no \
                                                                                                                   token \
                                                                                                                   at \
                                                                                                                   `x`");
    insta::assert_snapshot!(pieces(r#"{"added_tokens_decoder": {"9": {"content": "film"}}}"#), @"`DIR/vocab.txt` \
                                                                                                 cannot be used as a \
                                                                                                 tokenizer: its added \
                                                                                                 token `film` should \
                                                                                                 have the id 9, and \
                                                                                                 gets 3: added tokens \
                                                                                                 keep the \
                                                                                                 vocabulary's id, or \
                                                                                                 count on from its \
                                                                                                 end");
    insta::assert_snapshot!(pieces(r#"{"added_tokens_decoder": {"9": {"content": "<new>"}}}"#), @"`DIR/vocab.txt` \
                                                                                                  cannot be used as a \
                                                                                                  tokenizer: its \
                                                                                                  added token `<new>` \
                                                                                                  should have the id \
                                                                                                  9, and gets 5: \
                                                                                                  added tokens keep \
                                                                                                  the vocabulary's \
                                                                                                  id, or count on \
                                                                                                  from its end");
    insta::assert_snapshot!(refusal(&[("vocab.txt", "film\n[UNK]\n")]), @"`DIR/vocab.txt` cannot be used as a \
                                                                          tokenizer: it lacks the `sep_token` of \
                                                                          `BertTokenizer`, `[SEP]`");
    insta::assert_snapshot!(refusal(&[("vocab.json", VOCAB), ("merges.txt", "a b c\n")]), @"`DIR/merges.txt` cannot \
                                                                                            be used as a tokenizer: \
                                                                                            line 1, `a b c`, is not \
                                                                                            two tokens and a space");
    let file = |json: &str, keys: &str| refusal(&[("tokenizer.json", json), ("tokenizer_config.json", keys)]);
    let level = r#"{"version": "1.0", "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true},
        "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1}, "merges": []}}"#;
    insta::assert_snapshot!(file(level, r#"{"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": false}"#), @"`DIR/tokenizer_config.json`: \
                                                                                                                           `add_prefix_space` \
                                                                                                                           is \
                                                                                                                           false, \
                                                                                                                           and \
                                                                                                                           `tokenizer.json` \
                                                                                                                           has \
                                                                                                                           true \
                                                                                                                           for \
                                                                                                                           it; \
                                                                                                                           versions \
                                                                                                                           of \
                                                                                                                           transformers \
                                                                                                                           differ \
                                                                                                                           in \
                                                                                                                           which \
                                                                                                                           of \
                                                                                                                           the \
                                                                                                                           two \
                                                                                                                           counts, \
                                                                                                                           so \
                                                                                                                           make \
                                                                                                                           them \
                                                                                                                           agree");
    insta::assert_snapshot!(file(level, r#"{"tokenizer_class": "BertTokenizer"}"#), @r#"`DIR/tokenizer_config.json`: its `tokenizer_class` is `BertTokenizer`, but the model of `tokenizer.json` is not that class's; versions of transformers differ in which of the two counts. If `tokenizer.json` is right as it stands, write `"tokenizer_class": "PreTrainedTokenizerFast"`"#);
    insta::assert_snapshot!(file(level, r#"{"fix_mistral_regex": true}"#), @"`DIR/tokenizer_config.json`: \
                                                                             `fix_mistral_regex` is true: \
                                                                             transformers then splits text \
                                                                             differently from `tokenizer.json`; save \
                                                                             the tokenizer once more with \
                                                                             transformers, and remove the key");
    insta::assert_snapshot!(file(level, r#"{"added_tokens_decoder": {"5": {"content": "<s>"}}}"#), @r#"`DIR/tokenizer_config.json`: it gives "<s>" the id 5, and `tokenizer.json` 0"#);
    insta::assert_snapshot!(file(&level.replace("\"BPE\"", "\"BPE\", \"dropout\": 0.1"), "{}"), @"`DIR/tokenizer.json` \
                                                                                                  cannot be used as a \
                                                                                                  tokenizer: its \
                                                                                                  `model.dropout` is \
                                                                                                  0.1: merges would \
                                                                                                  be left out at \
                                                                                                  random, and ids \
                                                                                                  differ from run to \
                                                                                                  run; set it to \
                                                                                                  null");
}

/// Settings that are not followed are reported.
#[test]
fn ignored_settings_are_reported() {
    let keys = r#"{"model_max_length": 32, "truncation_side": "left"}"#;
    let folder = folder(&[("vocab.txt".into(), WORDS.into()), ("tokenizer_config.json".into(), keys.into())]);
    let line = Tokenizer::load(folder.path(), &task(&[]), 5).unwrap().describe();
    insta::assert_snapshot!(line.replace(&folder.path().display().to_string(), "DIR"), @r#"
    tokenizer: DIR/vocab.txt, 5 tokens
    tokenizer: `truncation_side` is left in its settings; long examples are cut on the right here
    tokenizer: its `model_max_length` is 32, less than the 64 of `task.max_tokens`
    "#);
}

/// A BPE tokenizer with all bytes, and with the merges that produce `▁film` from its letters.
fn blanks() -> Value {
    let mut vocab: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    vocab.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    vocab.extend(["▁", "f", "i", "l", "m", "a", "fi", "lm", "film", "▁film", "▁a", "▁f"].map(String::from));
    let vocab: serde_json::Map<_, _> = vocab.into_iter().zip(0..).map(|(token, id)| (token, Value::from(id))).collect();
    serde_json::json!({
        "version": "1.0", "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": [["f", "i"], ["l", "m"], ["fi", "lm"], ["▁", "film"], ["▁", "a"]]},
    })
}

fn unigram() -> Value {
    serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"}, {"type": "Metaspace", "replacement": "▁", "add_prefix_space": true}]},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": [["<s>", 0.0], ["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0],
            ["▁", -2.5], ["▁film", -3.0], ["film", -4.0], ["a", -5.0], ["▁a", -4.5], ["<mask>", 0.0]]},
    })
}

fn with_settings(json: &Value, name: &str, keys: &str) -> TempDir {
    folder(&[("tokenizer.json".into(), json.to_string()), (name.into(), keys.into())])
}

/// Classes that replace the parts of the file give the ids of transformers 5.23 on the same files.
#[test]
fn classes_build_their_own_parts() {
    let (blanks, unigram) = (blanks(), unigram());
    let mut inner = blanks.clone();
    inner["normalizer"] = serde_json::json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let cases: [(&Value, &str, [&[i32]; 3], bool); 7] = [
        (&blanks, r#""LlamaTokenizer""#, [&[268], &[268], &[269, 259, 268]], true),
        (&blanks, r#""LlamaTokenizerFast", "legacy": true"#, [&[268], &[268], &[269, 259, 268]], true),
        (&blanks, r#""LlamaTokenizer", "add_prefix_space": false"#, [&[267], &[268], &[264, 259, 268]], true),
        (&blanks, r#""PreTrainedTokenizerFast""#, [&[268], &[259, 268], &[269, 259, 268]], false),
        (&inner, r#""GemmaTokenizer", "bos_token": null"#, [&[267], &[268], &[264, 259, 268]], false),
        (&unigram, r#""XLMRobertaTokenizer""#, [&[5], &[5], &[8, 5]], false),
        (&unigram, r#""XLMRobertaTokenizer", "add_prefix_space": false"#, [&[6], &[6], &[7, 6]], true),
    ];
    for (json, class, expected, warned) in cases {
        let folder = with_settings(json, "tokenizer_config.json", &format!(r#"{{"tokenizer_class": {class}}}"#));
        let tokenizer = load(folder.path()).unwrap();
        let found = tokenizer.encode(vec!["film", " film", "a  film"], false).unwrap();
        assert_eq!(found, expected.map(<[i32]>::to_vec), "{class}");
        assert_eq!(tokenizer.describe().contains("builds its own normalizer"), warned, "{class}");
    }
    let folder = with_settings(&unigram, "config.json", r#"{"model_type": "xlm-roberta"}"#);
    assert_eq!(load(folder.path()).unwrap().encode(vec!["film"], true).unwrap(), [[0, 5, 2]]);
}

/// Parts that differ from the class's are refused, whether the class is named or follows from the model.
#[test]
fn parts_of_another_class_are_refused() {
    let change = |json: &Value, pointer: &str, value: Value| {
        let mut json = json.clone();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        json.pointer_mut(parent).unwrap()[key] = value;
        json
    };
    let nfkc = || serde_json::json!({"type": "NFKC"});
    let words: Value = serde_json::json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "BertPreTokenizer"},
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "film": 3, "[PAD]": 4, "[MASK]": 5}},
    });
    let bytes = serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
        "model": {"type": "BPE", "vocab": {"a": 0, "<|endoftext|>": 1}, "merges": []},
    });
    let sound = [
        (&words, "BertTokenizer", "bert"),
        (&bytes, "GPT2Tokenizer", "gpt2"),
        (&blanks(), "LlamaTokenizer", "idefics"),
        (&unigram(), "XLMRobertaTokenizer", "xlm-roberta"),
    ];
    for (json, class, model) in sound {
        let named = format!(r#"{{"tokenizer_class": "{class}"}}"#);
        load(with_settings(json, "tokenizer_config.json", &named).path()).unwrap();
        load(with_settings(json, "config.json", &format!(r#"{{"model_type": "{model}"}}"#)).path()).unwrap();
    }
    let cases = [
        (change(&words, "/normalizer", nfkc()), "BertTokenizer", "bert", "normalizer"),
        (
            change(&words, "/model/max_input_chars_per_word", 3.into()),
            "BertTokenizer",
            "bert",
            "max_input_chars_per_word",
        ),
        (
            change(&words, "/model/continuing_subword_prefix", "@@".into()),
            "BertTokenizer",
            "bert",
            "continuing_subword_prefix",
        ),
        (change(&bytes, "/model/end_of_word_suffix", "</w>".into()), "GPT2Tokenizer", "gpt2", "end_of_word_suffix"),
        (change(&bytes, "/model/byte_fallback", true.into()), "GPT2Tokenizer", "gpt2", "byte_fallback"),
        (change(&blanks(), "/normalizer", nfkc()), "LlamaTokenizer", "idefics", "normalizer"),
        (change(&blanks(), "/normalizer", Value::Null), "Qwen2Tokenizer", "qwen3", "byte_fallback"),
        (bytes, "Qwen2Tokenizer", "qwen3", "normalizer"),
        (change(&unigram(), "/normalizer", nfkc()), "XLMRobertaTokenizer", "xlm-roberta", "normalizer"),
        (
            change(
                &unigram(),
                "/pre_tokenizer",
                serde_json::json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}),
            ),
            "XLMRobertaTokenizer",
            "xlm-roberta",
            "pre-tokenizer",
        ),
    ];
    for (json, class, model, part) in cases {
        let named = format!(r#"{{"tokenizer_class": "{class}"}}"#);
        let by_name = with_settings(&json, "tokenizer_config.json", &named);
        let by_model = with_settings(&json, "config.json", &format!(r#"{{"model_type": "{model}"}}"#));
        for folder in [&by_name, &by_model] {
            let message = load(folder.path()).err().expect(part).to_string();
            assert!(message.contains(part) && message.contains(class), "{part}: {message}");
        }
        // The change that the error suggests works.
        let mend = r#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#;
        load(with_settings(&json, "tokenizer_config.json", mend).path()).unwrap();
    }
    let other = with_settings(&blanks(), "tokenizer_config.json", r#"{"tokenizer_class": "T5Tokenizer"}"#);
    let line = load(other.path()).unwrap().describe();
    assert!(line.contains("warning: its `tokenizer_class` is `T5Tokenizer`, which is not known here"), "{line}");
}

/// A file that exists and cannot be read is an error, and does not count as missing.
#[test]
fn unreadable_files_do_not_count_as_missing() {
    for name in ["tokenizer.json", "vocab.txt", "tokenizer_config.json"] {
        let sound = [("vocab.txt".to_owned(), WORDS.to_owned())];
        let folder = folder(&sound);
        let path = folder.path().join(name);
        fs::remove_file(&path).ok();
        std::os::unix::fs::symlink("nowhere", &path).unwrap();
        let message = load(folder.path()).err().unwrap().to_string();
        assert!(message.contains(name) && message.contains("a link to nowhere, which is not there"), "{message}");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let message = load(folder.path()).err().unwrap().to_string();
        assert!(message.contains(name) && message.contains("directory"), "{message}");
        fs::remove_dir(&path).unwrap();
        fs::write(&path, "version https://git-lfs.github.com/spec/v1\n").unwrap();
        let message = load(folder.path()).err().unwrap().to_string();
        assert!(message.contains(name) && message.contains("`git lfs pull`"), "{message}");
    }
}

/// A byte order mark before the settings, spaces after a token, and a special token that is null are accepted.
#[test]
fn harmless_differences_of_spelling() {
    let keys = "\u{feff}{\"do_lower_case\": false, \"cls_token\": null}";
    let pieces = WORDS.replace('\n', " \r\n");
    let folder = folder(&[("vocab.txt".into(), pieces), ("tokenizer_config.json".into(), keys.into())]);
    assert_eq!(
        load(folder.path()).unwrap().encode(vec!["films", "Films"], true).unwrap(),
        [vec![1, 3, 4, 2], vec![1, 0, 2]]
    );
}

/// The error for a class that cannot be converted does not suggest a conversion.
#[test]
fn classes_only_in_python_have_no_suggestion() {
    for (file, class) in [("vocab.txt", "TapasTokenizer"), ("tokenizer.model", "SiglipTokenizer")] {
        let keys = format!(r#"{{"tokenizer_class": "{class}"}}"#);
        let message = refusal(&[(file, WORDS), ("tokenizer_config.json", &keys)]);
        assert!(message.contains(&format!("implements `{class}` only in Python")), "{message}");
        assert!(!message.contains("save_pretrained"), "{message}");
    }
}
