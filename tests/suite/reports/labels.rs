//! Labels by name and by index, and data of which truncation leaves no target.

use super::{BERT, GPT2};
use crate::cli::{Bench, text};

/// A tiny BERT with a word tokenizer next to the data.
fn classifier(labels: &str) -> Bench {
    let bench = Bench::new();
    let task = format!("task t {{ kind: classification max_tokens: 16 labels: [{labels}] }}\n");
    bench.write("spec.peft", format!("{BERT}tune {{ every attention {{ lora(rank: 2) on q }} }}\n{task}"));
    bench.write("vocab.txt", "[UNK]\n[CLS]\n[SEP]\nbad\ngood\nfilm\n");
    bench
}

#[test]
fn numeric_class_names_have_no_index() {
    let bench = classifier(r#""1", "2", "3", "4", "5""#);
    let [spec, data] = ["spec.peft", "data.tsv"].map(|name| bench.path(name));
    let eval = ["eval", text(&spec), "--weights", "random", "--data", text(&data)];
    bench.write("data.tsv", "good film\t5\nbad\t0\n");
    bench.refuses(&eval, 3, &["data.tsv`, line 2: no label `0`", "the task's labels are `1`, `2`, `3`, `4`, `5`\n"]);
    bench.write("data.tsv", "good film\t5\nbad\t1\n");
    let ran = bench.peftc(eval);
    assert!(ran.code == 0 && ran.out.contains("2 examples"), "{}", ran.err);
    // `train` parses labels like `eval`, also those of the held-out data.
    let good = bench.write("good.tsv", "bad\t1\n");
    bench.write("data.tsv", "bad\t6\n");
    let out = bench.path("run");
    let train =
        ["train", text(&spec), "--weights", "random", "--data", text(&good), "--dev", text(&data), "--out", text(&out)];
    bench.refuses(&train, 3, &["data.tsv`, line 1: no label `6`"]);
}

#[test]
fn sentences_truncated_to_special_tokens_are_refused() {
    let bench = classifier(r#""bad", "good""#);
    let [spec, out] = ["spec.peft", "run"].map(|name| bench.path(name));
    let data = bench.write("data.tsv", "good film\t1\nbad\t0\n");
    let train = ["train", text(&spec), "--weights", "random", "--data", text(&data), "--out", text(&out)];
    for limit in ["task.max_tokens=1", "task.max_tokens=2"] {
        let words = [
            "no example is left",
            "no sentence in any of the 2 examples",
            "line 1, has 4 tokens",
            "raise `task.max_tokens` to 4",
        ];
        bench.refuses(&[&train[..], &["--set", limit]].concat(), 3, &words);
    }
    let ran = bench.peftc([&train[..], &["--set", "task.max_tokens=3", "--set", "train.steps=1"]].concat());
    assert!(ran.code == 0 && ran.err.contains("2 examples, 6 tokens, the longest 3, 1 cut\n"), "{}", ran.err);
}

/// The data set `data/triples` with its tokenizer.
#[test]
fn records_truncated_before_the_target_are_refused() {
    let bench = Bench::new();
    let task = "task t {\n  kind: generation\n  special: [\"<bos>\", \"<eos>\", \"<target>\"]\n  \
                template: \"<bos> ({subject} {property} {object})* <target> {text} <eos>\"\n  target: \"<target>\"\n}\n";
    let spec =
        bench.write("spec.peft", format!("{}tune {{ full() }}\n{task}", GPT2.replace("vocab: 50", "vocab: 1539")));
    let triple = r#"{"subject": "Brackwell", "property": "country", "object": "Norland"}"#;
    let long = format!(
        r#"{{"entries": [{{"17": {{"lexicalisations": [{{"comment": "good", "lex": "Much."}}],
            "modifiedtripleset": [{}]}}}}]}}"#,
        vec![triple; 40].join(", ")
    );
    let (data, out) = (bench.write("long.json", long), bench.path("run"));
    let given = ["--weights", "random", "--tokenizer", "data/triples"];
    let limit = ["--set", "task.max_tokens=60"];
    let words = [
        "long.json`: no example is left",
        "`task.max_tokens` is 60",
        "no target in any of the 1 examples",
        "entry 17, has ",
        "its first target is number ",
        "raise `task.max_tokens` to ",
    ];
    let train = ["train", text(&spec), "--data", text(&data), "--out", text(&out)];
    for more in [&["--set", "train.steps=2"][..], &[]] {
        bench.refuses(&[&train[..], &given, &limit, more].concat(), 3, &words);
        assert!(!out.exists(), "no adapter is left of it");
    }
    bench.refuses(&[&["eval", text(&spec), "--data", text(&data)], &given[..], &limit].concat(), 3, &words);
    // A held-out data set without targets is refused too.
    let dev = ["train", text(&spec), "--data", "data/triples/dev.json", "--dev", text(&data), "--out", text(&out)];
    bench.refuses(&[&dev[..], &given, &limit].concat(), 3, &words);

    // Truncation to 12 tokens drops 26 of the 28 examples of the shipped data set, and the summary says so.
    let eval = ["eval", text(&spec), "--data", "data/triples/dev.json", "--set", "task.max_tokens=12"];
    let ran = bench.peftc([&eval[..], &given].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    let line =
        "data/triples/dev.json: 2 examples, 24 tokens, the longest 12, 28 cut, 26 of them dropped: no target is left\n";
    assert!(ran.err.contains(line), "{}", ran.err);
    assert!(ran.out.contains("2 examples, loss ") && !ran.out.contains("NaN"), "{}", ran.out);
}
