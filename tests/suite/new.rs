//! `peftc new`: the proposed spec is valid, fits the checkpoint, and trains unchanged.

use std::fs;
use std::path::{Path, PathBuf};

use peft_grammar::library;
use peftc::hub::checkpoint;
use peftc::{new, spec};
use serde_json::json;

use crate::cli::{Bench, text};
use crate::reports::{
    self,
    random::{TOKENIZER, words},
};

/// Models whose sizes are not the defaults.
const FAMILIES: &[(&str, &str)] = &[
    ("bert", "bert(layers: 2, hidden: 32, heads: 4, ffn: 48, vocab: 50, context: 40, token_types: 3, eps: 1e-6)"),
    ("roberta", "roberta(layers: 2, hidden: 32, heads: 2, ffn: 64, vocab: 50, context: 66)"),
    ("gpt2", "gpt2(layers: 2, hidden: 32, heads: 4, ffn: 96, vocab: 50, context: 64, tied: false)"),
    (
        "llama",
        "llama(layers: 3, hidden: 32, heads: 4, kv_heads: 2, head_dim: 16, ffn: 48, vocab: 50, context: 64, rope_theta: 500000.0)",
    ),
];

fn folder(bench: &Bench, name: &str, call: &str) -> PathBuf {
    let (_, model) = reports::spec(bench, &format!("{name}.peft"), &format!("model = {call}\n"));
    reports::checkpoint(bench, name, &model)
}

/// The proposed spec of every method for every family is valid and in canonical form, and the checkpoint fits it.
#[test]
fn every_method_gets_a_valid_spec_on_every_family() {
    let bench = Bench::new();
    let mut names: Vec<String> = library::methods().into_iter().map(|m| m.name).collect();
    names.dedup();
    for (family, call) in FAMILIES {
        let weights = folder(&bench, family, call);
        for method in &names {
            // Llama has no biases to train, and the error says so.
            if (*family, method.as_str()) == ("llama", "bitfit") {
                let error = new::propose(&weights, method, None).err().expect("refused").to_string();
                assert!(error.contains("no tensor of the backbone is named `*.bias`"), "{error}");
                continue;
            }
            let proposal = new::propose(&weights, method, None).unwrap_or_else(|e| panic!("{family}, {method}: {e}"));
            let path = bench.write("new.peft", &proposal.text);
            let model = spec::load(&path, &[], false).unwrap_or_else(|e| panic!("{family}, {method}: {e}"));
            assert!(model.params.iter().any(|p| p.trained_rows().is_some()), "{family}, {method}");
            assert_eq!(peft_grammar::format("new.peft", &proposal.text).expect("it parses"), proposal.text);
            checkpoint::weights(&weights, &model).unwrap_or_else(|e| panic!("{family}, {method}: {e}"));
        }
    }
}

#[test]
fn a_gguf_file_gets_a_valid_spec() {
    let bench = Bench::new();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/gguf/tied.gguf");
    let proposal = new::propose(&file, "lora", None).unwrap_or_else(|e| panic!("{e}"));
    let path = bench.write("new.peft", &proposal.text);
    let model = spec::load(&path, &[], false).unwrap_or_else(|e| panic!("{e}"));
    checkpoint::weights(&file, &model).unwrap_or_else(|e| panic!("{e}"));
}

/// The proposed spec learns the labels of the rows without changes.
#[test]
fn a_proposed_classifier_learns_sixty_four_rows() {
    let bench = Bench::new();
    let weights = folder(&bench, "roberta", FAMILIES[1].1);
    // RoBERTa's padding token has the id 1.
    let tokenizer = TOKENIZER
        .replace("\"[UNK]\":0,\"[CLS]\":1,", "\"[CLS]\":0,\"[UNK]\":6,")
        .replace("[\"[CLS]\",1]", "[\"[CLS]\",0]");
    words(&weights);
    fs::write(weights.join("tokenizer.json"), tokenizer).expect("written");
    let vocabulary = ["good", "bad", "film"];
    let row = |i: usize| {
        let word = |k: u32| vocabulary[i / 3_usize.pow(k) % 3];
        let label = ["no", "yes"][usize::from(i.is_multiple_of(3))];
        format!("{} {} {} {}\t{label}\n", word(0), word(1), word(2), word(3))
    };
    let data = bench.write("rows.tsv", (0..64).map(row).collect::<String>());
    let (path, out) = (bench.path("my.peft"), bench.path("run"));
    let ran = bench.peftc(["new", "--weights", text(&weights), "--data", text(&data), "-o", text(&path)]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.contains("peftc train"), "{}", ran.out);
    let written = fs::read_to_string(&path).expect("written");
    assert!(written.contains("labels: [\"no\", \"yes\"]"), "{written}");
    let ran =
        bench.peftc(["train", text(&path), "--weights", text(&weights), "--data", text(&data), "--out", text(&out)]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let last =
        ran.out.split("loss ").nth(1).and_then(|rest| rest.split(", ").nth(1)?.split(' ').next()?.parse::<f64>().ok());
    assert!(last.is_some_and(|loss| loss < 0.1), "{}", ran.out);
    let ran = bench.peftc(["new", "--weights", text(&weights), "--data", text(&data), "-o", text(&path)]);
    assert!(ran.code == 2 && ran.err.contains("it exists; replace it with `--overwrite`"), "{}", ran.err);
}

/// A decoder learns conversations with the chat template in its folder.
#[test]
fn a_proposed_chat_spec_learns_conversations() {
    let bench = Bench::new();
    let rows = |i: usize| {
        let asked: Vec<&str> = (0..4).map(|k| ["good", "bad", "film"][i / 3_usize.pow(k) % 3]).collect();
        let said = |role: &str, content: &str| json!({"role": role, "content": content});
        json!({"messages": [said("user", &asked.join(" ")), said("assistant", asked[0])]}).to_string() + "\n"
    };
    let data = bench.write("chat.jsonl", (0..64).map(rows).collect::<String>());
    for (family, call) in &FAMILIES[2..] {
        // The hidden size is large enough that frozen logits can express near-certainty.
        let call = call.replace("hidden: 32", "hidden: 64");
        let weights = folder(&bench, family, &call);
        words(&weights);
        let tokenizer = TOKENIZER.replace("\"film\":5", "\"film\":5,\"says\":6,\"stop\":7");
        fs::write(weights.join("tokenizer.json"), tokenizer).expect("written");
        let template = "{% for m in messages %}{{ ' says' if m.role == 'assistant' else '' }} {{ m.content }}{{ ' stop' if m.role == 'assistant' else '' }}{% endfor %}\
                        {% if add_generation_prompt %}{{ ' says' }}{% endif %}";
        let settings = json!({"chat_template": template}).to_string();
        fs::write(weights.join("tokenizer_config.json"), settings).expect("written");
        let (path, out) = (bench.path(&format!("{family}-new.peft")), bench.path(family));
        let ran = bench.peftc(["new", "--weights", text(&weights), "--data", text(&data), "-o", text(&path)]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let written = fs::read_to_string(&path).expect("written");
        assert!(written.contains("kind: chat"), "{written}");
        let ran = bench.peftc([
            "train",
            text(&path),
            "--weights",
            text(&weights),
            "--data",
            text(&data),
            "--out",
            text(&out),
        ]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let last = ran
            .out
            .split(" over the first tenth of the steps, ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
        assert!(last.is_some_and(|loss| loss < 0.5), "{family}: {}", ran.out);
    }
}

/// Without changes, a decoder learns classes, an encoder learns tags, and a decoder learns a regression. The spec
/// contains `what`, and the last loss is below the bound.
#[test]
fn proposed_heads_learn_their_tasks() {
    let bench = Bench::new();
    let words_of = |i: usize| (0..4).map(move |k| ["good", "bad", "film"][i / 3_usize.pow(k) % 3]).collect::<Vec<_>>();
    let classes = |i: usize| {
        let label = ["no", "yes"][usize::from(words_of(i)[0] == "good")];
        format!("{}\t{label}\n", words_of(i).join(" "))
    };
    let tags = |i: usize| {
        let tags: Vec<&str> = words_of(i).iter().map(|w| if *w == "film" { "B-WORK" } else { "O" }).collect();
        json!({"tokens": words_of(i), "ner_tags": tags}).to_string() + "\n"
    };
    let numbers = |i: usize| {
        let good = words_of(i).iter().filter(|w| **w == "good").count();
        format!("{},{}\n", words_of(i).join(" "), good as f64 / 2.0 - 1.0)
    };
    let all = |row: &dyn Fn(usize) -> String| (0..64).map(row).collect::<String>();
    let classes = bench.write("classes.tsv", all(&classes));
    let tags = bench.write("tags.jsonl", all(&tags));
    let numbers = bench.write("numbers.csv", format!("text,score\n{}", all(&numbers)));
    let cases = [
        (FAMILIES[2], &classes, "kind: classification", "accuracy 100.00%", 0.1),
        (FAMILIES[0], &tags, "kind: token_classification", "accuracy 100.00%", 0.1),
        (FAMILIES[3], &numbers, "kind: regression", "correlation 0.9", 0.05),
    ];
    for ((family, call), data, what, judged, bound) in cases {
        let weights = folder(&bench, family, &call.replace("hidden: 32", "hidden: 64"));
        words(&weights);
        fs::write(weights.join("tokenizer.json"), TOKENIZER).expect("written");
        let (path, out) = (bench.path(&format!("{family}-new.peft")), bench.path(family));
        let run = |args: &[&str]| {
            let ran = bench.peftc(args);
            assert_eq!(ran.code, 0, "{family}: {}", ran.err);
            ran.out
        };
        run(&["new", "--weights", text(&weights), "--data", text(data), "-o", text(&path)]);
        let written = fs::read_to_string(&path).expect("written");
        assert!(written.contains(what) && written.contains("head trainable"), "{written}");
        let common = [text(&path), "--weights", text(&weights), "--data", text(data)];
        let said = run(&[&["train"], &common[..], &["--out", text(&out)]].concat());
        let last = said
            .split(" over the first tenth of the steps, ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
        assert!(last.is_some_and(|loss| loss < bound), "{family}: {said}");
        let adapter = out.join("adapter.safetensors");
        let said = run(&[&["eval"], &common[..], &["--adapter", text(&adapter)]].concat());
        assert!(said.contains(judged), "{family}: {said}");
    }
}

/// If no backbone supports a checkpoint, the error names the nearest one and what it lacks.
#[test]
fn unsupported_families_are_refused_naming_the_nearest() {
    let bench = Bench::new();
    let (_, llama) = reports::spec(&bench, "llama.peft", reports::LLAMA);
    let mut config = reports::config(&llama);
    config.insert("model_type".into(), json!("mistral"));
    config.insert("sliding_window".into(), json!(4));
    let weights = reports::folder(&bench, "mistral", &config, &reports::tensors(&llama, false));
    let out = bench.path("my.peft");
    let refused = |weights: &Path, more: &[&str], code: i32, words: &[&str]| {
        let args = [&["new", "--weights", text(weights), "-o", text(&out)], more].concat();
        bench.refuses(&args, code, words);
    };
    refused(&weights, &[], 3, &["no backbone that reads `mistral`", "the nearest is `llama`", "`sliding_window` is 4"]);
    config.insert("model_type".into(), json!("llama"));
    let weights = reports::folder(&bench, "windowed", &config, &reports::tensors(&llama, false));
    refused(&weights, &[], 3, &["`sliding_window` is 4 in config.json", "every token sees all tokens before it"]);
    refused(&weights, &["--method", "lroa"], 2, &["no method `lroa`", "lora"]);
    refused(Path::new("random"), &[], 2, &["random weights have no sizes"]);
    let bert = folder(&bench, "bert", FAMILIES[0].1);
    let records = bench.write("records.json", "{\"entries\": []}");
    refused(&bert, &["--data", text(&records)], 2, &["texts to be generated, and `bert` classifies"]);
    let empty = bench.write("rows.tsv", "no tab here\n");
    refused(&bert, &["--data", text(&empty)], 3, &["rows.tsv", "line 1", "no tab"]);
}
