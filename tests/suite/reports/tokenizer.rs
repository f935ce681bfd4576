//! The tokenizer is the checkpoint's own, read as transformers reads it, or refused by name.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{BERT, GPT2, LLAMA, ROBERTA, checkpoint, spec};
use crate::cli::{Bench, Ran, text};

/// A WordPiece vocabulary of 45 tokens, fewer than the 50 rows of the models' embeddings.
fn word_pieces() -> String {
    let letters = ('a'..='t').flat_map(|c| [c.to_string(), format!("##{c}")]);
    let tokens = ["[UNK]", "[CLS]", "[SEP]", "film", "##s"].map(str::to_owned).into_iter().chain(letters);
    tokens.map(|token| token + "\n").collect()
}

/// Another model's tokenizer with the same number of tokens.
fn stranger() -> String {
    let mut vocab = serde_json::Map::new();
    for (id, token) in
        ["[UNK]", "[CLS]", "[SEP]"].iter().map(|t| t.to_string()).chain((3..45).map(|i| format!("w{i}"))).enumerate()
    {
        vocab.insert(token, id.into());
    }
    serde_json::json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    })
    .to_string()
}

/// A file that transformers wrote for byte-level BPE with 340 tokens, such as `gpt2_vocab`.
fn content(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/tokenizers.json");
    let all: Value = serde_json::from_str(&fs::read_to_string(path).expect("readable")).expect("JSON");
    all["contents"][name].as_str().expect("there").to_owned()
}

/// A bench with a checkpoint of the spec, without a tokenizer.
fn model(source: &str) -> (Bench, PathBuf, PathBuf) {
    let bench = Bench::new();
    let (path, model) = spec(&bench, "spec.peft", source);
    let weights = checkpoint(&bench, "weights", &model);
    (bench, path, weights)
}

fn eval(bench: &Bench, spec: &Path, weights: &Path, data: &Path, more: &[&str]) -> Ran {
    let all = ["eval", text(spec), "--weights", text(weights), "--data", text(data)];
    bench.peftc(all.iter().chain(more))
}

/// The output of `eval` without the name of the data.
fn figures(ran: &Ran) -> &str {
    assert_eq!(ran.code, 0, "{}", ran.err);
    ran.out.split_once(": ").expect("a name and figures").1
}

#[test]
fn only_the_checkpoints_own_tokenizer_is_used() {
    let (bench, spec, weights) = model(BERT);
    let beside = bench.write("set/data.tsv", "films\t1\na film\t0\n");
    bench.write("set/tokenizer.json", stranger());
    let apart = bench.write("apart/data.tsv", "films\t1\na film\t0\n");

    // Without a tokenizer in the weights' folder, the one next to the data is not used.
    let lacking = eval(&bench, &spec, &weights, &beside, &[]);
    assert_eq!(lacking.code, 3, "{}", lacking.err);
    for word in
        ["no tokenizer in", text(&weights), "`config.json`, `model.safetensors`", "copy the model's own", "--tokenizer"]
    {
        assert!(lacking.err.contains(word), "{word}: {}", lacking.err);
    }
    // Both suggested remedies work.
    let named = eval(&bench, &spec, &weights, &beside, &["--tokenizer", text(&bench.path("set"))]);
    assert!(named.err.contains("tokenizer: ") && named.err.contains("set/tokenizer.json, 45 tokens"), "{}", named.err);
    bench.write("weights/vocab.txt", word_pieces());
    let own = eval(&bench, &spec, &weights, &beside, &[]);
    assert!(own.err.contains("weights/vocab.txt, 45 tokens; 5 rows of the model's 50 are left over"), "{}", own.err);
    assert_ne!(figures(&own), figures(&named), "the two give other ids");
    assert_eq!(figures(&own), figures(&eval(&bench, &spec, &weights, &apart, &[])));

    // `--tokenizer` accepts a name in Hugging Face's cache, as `--weights` does.
    bench.write("hub/models--google--tiny/refs/main", "abc");
    bench.write("hub/models--google--tiny/snapshots/abc/tokenizer.json", stranger());
    let hub = bench.path("hub");
    let args = ["eval", text(&spec), "--weights", text(&weights), "--data", text(&apart), "--tokenizer", "google/tiny"];
    let cached = bench.with(&[("HF_HUB_CACHE", text(&hub))], args);
    assert!(cached.err.contains("snapshots/abc/tokenizer.json, 45 tokens"), "{}", cached.err);
    assert_eq!(figures(&cached), figures(&named));

    // Random weights have no tokenizer, so the one next to the data is used, and a message says so.
    let random = Path::new("random");
    let drawn = eval(&bench, &spec, random, &beside, &[]);
    assert!(drawn.code == 0 && drawn.err.contains("set/tokenizer.json"), "{}", drawn.err);
    let drawn = eval(&bench, &spec, random, &apart, &[]);
    assert!(drawn.code == 2 && drawn.err.contains("no tokenizer of their own"), "{}", drawn.err);

    // Settings of the folder apply: if the tokenizer is cased, `Films` is unknown.
    let cased = bench.write("cased.tsv", "Films\t1\na film\t0\n");
    assert_eq!(figures(&eval(&bench, &spec, &weights, &cased, &[])), figures(&own));
    bench.write("weights/tokenizer_config.json", r#"{"do_lower_case": false, "model_max_length": 32}"#);
    let cased = eval(&bench, &spec, &weights, &cased, &[]);
    assert_ne!(figures(&cased), figures(&own));
    assert!(cased.err.contains("its `model_max_length` is 32, less than the 64 of `task.max_tokens`"), "{}", cased.err);
}

/// Rows beyond the tokens are padding. A tokenizer with more tokens than rows is refused.
#[test]
fn tokens_must_fit_the_rows() {
    let (bench, spec, weights) = model(BERT);
    let data = bench.write("data.tsv", "films\t1\n");
    for (tokens, fits) in [(50, true), (51, false)] {
        let more: String = (45..tokens).map(|i| format!("word{i}\n")).collect();
        bench.write("weights/vocab.txt", word_pieces() + &more);
        let ran = eval(&bench, &spec, &weights, &data, &[]);
        assert_eq!(ran.code, if fits { 0 } else { 3 }, "{}", ran.err);
        assert!(fits || ran.err.contains("its vocabulary has 51 tokens, but the spec's `vocab` is 50"), "{}", ran.err);
        assert!(!ran.err.contains("left over"), "{}", ran.err);
    }
    // A padding token that only the settings name has no row. A text that contains it is refused.
    let more: String = (44..50).map(|i| format!("word{i}\n")).collect();
    bench.write("weights/vocab.txt", word_pieces().replacen("##s\n", "", 1) + &more);
    let plain = eval(&bench, &spec, &weights, &data, &[]);
    bench.write("weights/tokenizer_config.json", r#"{"tokenizer_class": "BertTokenizer", "pad_token": "<pad>"}"#);
    let padded = eval(&bench, &spec, &weights, &data, &[]);
    assert_eq!(figures(&padded), figures(&plain));
    assert!(padded.err.contains("50 rows have none for `<pad>` (50, `pad_token` of its settings)"), "{}", padded.err);
    let ran = eval(&bench, &spec, &weights, &bench.write("data.tsv", "a <pad> film\t1\n"), &[]);
    assert!(ran.code == 3 && ran.err.contains("a text holds its token `<pad>`, whose id is 50"), "{}", ran.err);
}

#[test]
fn unreadable_tokenizers_are_refused_by_name() {
    let (bench, spec, weights) = model(BERT);
    let data = bench.write("data.tsv", "films\t1\n");
    let refused = |words: &[&str]| {
        let ran = eval(&bench, &spec, &weights, &data, &[]);
        assert_eq!(ran.code, 3, "{}", ran.err);
        for word in words {
            assert!(ran.err.contains(word), "{word}: {}", ran.err);
        }
    };
    let sentencepiece = bench.write("weights/tokenizer.model", "\n\u{e}\n");
    refused(&["weights/tokenizer.model", "a sentencepiece model", "AutoTokenizer", "save_pretrained"]);
    fs::remove_file(sentencepiece).expect("there");
    // Damaged decoders: a number out of range, a key that is not a string, and input on which the library panics.
    let sound = stranger();
    let damaged = |decoder: &str| format!(r#"{{"decoder": {decoder}, {}"#, &sound[1..]);
    for decoder in [
        r#"{"type": "Strip", "content": " ", "start": 1e999, "stop": 0}"#,
        r#"{"type": "Fuse", 1: 2}"#,
        "7",
        r#"{"type": 3}"#,
    ] {
        bench.write("weights/tokenizer.json", damaged(decoder));
        refused(&["weights/tokenizer.json", "cannot be used as a tokenizer"]);
    }
    bench.write("weights/tokenizer.json", sound.replace("Whitespace\"", "FixedLength\", \"length\": 0"));
    refused(&["weights/tokenizer.json", "crate `tokenizers` panics on it"]);
    // A folder that does not exist.
    let ran = eval(&bench, &spec, Path::new("no-such-model"), &data, &[]);
    assert!(ran.code == 3 && ran.err.contains("no-such-model"), "{}", ran.err);
    assert!(!ran.err.contains("no tokenizer"), "{}", ran.err);
}

/// `vocab.json` and `merges.txt` are read as RoBERTa's or GPT-2's. A blank before the tab is a token.
#[test]
fn byte_level_bpe_keeps_blanks_and_special_tokens() {
    let (bench, spec, weights) = model(&ROBERTA.replace("vocab: 50", "vocab: 340"));
    bench.write("weights/vocab.json", content("roberta_vocab"));
    bench.write("weights/merges.txt", content("roberta_merges"));
    let figures = |row: &str| {
        let ran = eval(&bench, &spec, &weights, &bench.write("data.tsv", row), &[]);
        assert!(ran.err.contains("weights/vocab.json, 340 tokens\n"), "{}", ran.err);
        (figures(&ran).to_owned(), ran.err.contains("1 examples, 4 tokens"))
    };
    let (plain, four) = figures("the film\t0\n");
    assert!(four, "two words between two marks");
    for row in ["the film \t0\n", " the film\t0\n", "the  film\t0\n"] {
        assert_ne!(figures(row).0, plain, "{row:?}");
    }
    assert_eq!(figures("the film\t 0 \r\n").0, plain, "the line's end and blanks around a label are no text");
    assert_eq!(eval(&bench, &spec, &weights, &bench.write("data.tsv", " \u{a0} \t0\n"), &[]).code, 3);
    // `tokenizer.json` takes precedence over the older files.
    bench.write("weights/tokenizer.json", content("roberta.json"));
    let ran = eval(&bench, &spec, &weights, &bench.write("data.tsv", "the film\t0\n"), &[]);
    assert!(ran.err.contains("weights/tokenizer.json"), "{}", ran.err);
    assert_eq!(self::figures(&ran), plain);
    // GPT-2's tokenizer adds no special tokens, which a classifier requires.
    fs::remove_file(bench.path("weights/tokenizer.json")).expect("there");
    bench.write("weights/tokenizer_config.json", r#"{"tokenizer_class": "GPT2Tokenizer"}"#);
    let ran = eval(&bench, &spec, &weights, &bench.write("data.tsv", "the film\t0\n"), &[]);
    assert!(ran.code == 3 && ran.err.contains("no opening and closing mark"), "{}", ran.err);
}

/// If no tokenizer class belongs to the `model_type`, the vocabulary's special tokens determine the class.
#[test]
fn the_vocabulary_determines_an_unnamed_class() {
    let bench = Bench::new();
    let (_, model) = spec(&bench, "spec.peft", &LLAMA.replace("vocab: 50", "vocab: 340"));
    let weights = checkpoint(&bench, "weights", &model);
    for (files, marks) in [("gpt2", 0), ("roberta", 2)] {
        for (name, kind) in [("vocab.json", "vocab"), ("merges.txt", "merges")] {
            bench.write(&format!("weights/{name}"), content(&format!("{files}_{kind}")));
        }
        let found = peftc::hub::tokenizer::find(None, &weights, Path::new("data.json"), &model);
        let tokenizer = found.unwrap_or_else(|e| panic!("{e}"));
        let length = |marked| tokenizer.encode(vec!["the film"], marked).expect("ids")[0].len();
        assert_eq!((tokenizer.vocabulary(), length(true) - length(false)), (340, marks), "{files}");
    }
}

/// A template may contain special tokens of the model, new special tokens, and literal text.
#[test]
fn templates_mix_own_tokens_new_tokens_and_text() {
    let (bench, _, weights) = model(&GPT2.replace("vocab: 50", "vocab: 340"));
    bench.write("weights/vocab.json", content("gpt2_vocab"));
    bench.write("weights/merges.txt", content("gpt2_merges"));
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/triples/dev.json");
    let task = |vocabulary: u64, special: &str, template: &str, target: &str| {
        let text = format!(
            "{}tune {{ full() }}\ntask t {{ kind: generation max_tokens: 64 special: [{special}] template: \"{template}\" target: \"{target}\" }}\n",
            GPT2.replace("vocab: 50", &format!("vocab: {vocabulary}"))
        );
        bench.write("task.peft", text)
    };
    // The model's own end token, and literal texts before the fields and as the target, add no row.
    let spec = task(
        340,
        "\"<|endoftext|>\"",
        "'Facts:' ({subject} ' / ' {object} '\\n')* 'Text:' {text} <|endoftext|>",
        "'Text:'",
    );
    let own = eval(&bench, &spec, &weights, &data, &[]);
    assert!(
        own.code == 0 && own.err.contains("vocab.json, 340 tokens; the model's own in the task: `<|endoftext|>` (0)\n"),
        "{}",
        own.err
    );
    // The spec lists two special tokens, but only the new one adds a row.
    let spec = task(341, "\"<|endoftext|>\", \"<t>\"", "'Facts:' ({subject})* <t> {text} <|endoftext|>", "<t>");
    let out = bench.path("run");
    let train = [
        "train",
        text(&spec),
        "--weights",
        text(&weights),
        "--data",
        text(&data),
        "--out",
        text(&out),
        "--set",
        "train.steps=2",
    ];
    let ran = bench.peftc(train);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let said = "340 tokens; the task's new one has the id 340; the model's own in the task: `<|endoftext|>` (0)\n";
    // Special tokens: the 32 values of one row.
    assert!(ran.err.contains(said) && ran.err.contains("+ 32 special tokens"), "{}", ran.err);
    // Two new tokens do not fit into 341 rows.
    let spec = task(341, "\"<a>\", \"<t>\"", "<a> ({subject})* <t> {text}", "<t>");
    let ran = eval(&bench, &spec, &weights, &data, &[]);
    assert!(
        ran.code == 3
            && ran.err.contains("340 tokens (342 with the task's 2 special ones), but the spec's `vocab` is 341"),
        "{}",
        ran.err
    );
    // An undeclared token is an error of the spec, and the message says how to declare it.
    let spec = task(341, "\"<t>\"", "<|endoftext|> <t> {text}", "<t>");
    let ran = bench.peftc(["check", text(&spec)]);
    assert_eq!(ran.code, 1, "{}", ran.err);
    for word in
        ["`<|endoftext|>` is not among the task's special tokens", "special: [\"<|endoftext|>\"]", "single quotes"]
    {
        assert!(ran.err.contains(word), "{word}: {}", ran.err);
    }
}
