//! Indices beyond a table, sequences beyond the context, masks, and `run` without labels.

use std::path::{Path, PathBuf};

use peft_runtime::adapter::{self, Data, Stored, TensorFile};

use super::{BERT, GPT2, LLAMA, ROBERTA, checkpoint, spec};
use crate::cli::{Bench, Ran, text};

/// A classifier's two labels, or a template, with this much of a task beside them.
fn classifies(more: &str) -> String {
    format!("task t {{ kind: classification labels: [\"no\", \"yes\"] {more} }}\n")
}

fn generates(more: &str) -> String {
    format!(
        "task t {{ kind: generation special: [\"<t>\"] template: \"({{subject}})* <t> {{text}}\" target: \"<t>\" {more} }}\n"
    )
}

/// A batch's tensors by name. `classes` are labels of which each row has one.
type Tensors<'a> = [(&'a str, &'a [&'a [i64]])];

/// A batch file of tensors `inputs.NAME`.
fn batch(bench: &Bench, name: &str, tensors: &Tensors) -> PathBuf {
    let mut file = TensorFile::default();
    for (tensor, rows) in tensors {
        let (tensor, shape) = match *tensor {
            "classes" => ("labels", vec![rows[0].len() as u64]),
            tensor => (tensor, vec![rows.len() as u64, rows[0].len() as u64]),
        };
        file.tensors.insert(format!("inputs.{tensor}"), Stored { shape, data: Data::I64(rows.concat()) });
    }
    let path = bench.path(name);
    adapter::save(&path, &file).expect("written");
    path
}

/// A model that runs batches from files.
struct Runs<'a> {
    bench: &'a Bench,
    source: PathBuf,
    weights: PathBuf,
    entry: &'a str,
}

impl<'a> Runs<'a> {
    fn new(bench: &'a Bench, text: &str) -> Self {
        let (source, model) = spec(bench, "spec.peft", text);
        Runs { bench, source, weights: checkpoint(bench, "weights", &model), entry: "forward" }
    }

    fn on(&self, tensors: &Tensors) -> Ran {
        let inputs = batch(self.bench, "in.safetensors", tensors);
        let out = self.out();
        let _ = std::fs::remove_file(&out);
        self.bench.peftc([
            "run",
            text(&self.source),
            "--entry",
            self.entry,
            "--weights",
            text(&self.weights),
            "--inputs",
            text(&inputs),
            "-o",
            text(&out),
        ])
    }

    fn out(&self) -> PathBuf {
        self.bench.path("out.safetensors")
    }

    fn results(&self, tensors: &Tensors) -> (TensorFile, Ran) {
        let ran = self.on(tensors);
        assert_eq!(ran.code, 0, "{}", ran.err);
        (adapter::load(&self.out()).expect("sound"), ran)
    }

    fn refuses(&self, tensors: &Tensors, words: &[&str]) {
        let ran = self.on(tensors);
        assert_eq!(ran.code, 3, "{words:?}: {}{}", ran.out, ran.err);
        for word in words.iter().chain(&["in.safetensors"]) {
            assert!(ran.err.contains(word), "it should say `{word}`:\n{}", ran.err);
        }
        assert!(!self.out().exists());
    }
}

fn floats(stored: &Stored) -> &[f32] {
    let Data::F32(x) = &stored.data else { panic!("floats") };
    x
}

/// What a sequence may have is said by the backbone, and a task that asks for more is refused by all that read the spec.
#[test]
fn a_task_longer_than_the_context() {
    let bench = Bench::new();
    // By backbone: how many of its 64 or 66 positions a sequence has.
    let prefixed = GPT2.replace("context: 64", "context: 64, first_position: 10");
    for (name, model, task, most) in [
        ("bert", BERT, classifies as fn(&str) -> String, 64),
        ("gpt2", GPT2, generates, 64),
        ("gpt2", &prefixed, generates, 54),
        ("llama", LLAMA, generates, 64),
        ("roberta", ROBERTA, classifies, 64),
    ] {
        let path = bench.write("long.peft", format!("{model}{}", task("max_tokens: 2000")));
        let says = [
            format!("`max_tokens` is 2000, and a sequence of this `{name}` has at most {most}"),
            format!("set `max_tokens` to {most} or less"),
            "long.peft:2".into(),
        ];
        let says = says.each_ref().map(String::as_str);
        for command in [&["check"][..], &["inspect"], &["compile", "--emit", "peft"]] {
            bench.refuses(&[command, &[text(&path)]].concat(), 1, &says);
        }
        // The mend that it names works, and one more does not.
        let set = |n: u64| format!("task.max_tokens={n}");
        assert_eq!(bench.peftc(["check", text(&path), "--set", &set(most)]).code, 0, "{name}");
        bench.refuses(&["check", text(&path), "--set", &set(most + 1)], 1, &["--set", &format!("is {}", most + 1)]);
        // A task that does not say takes what there is, up to 512.
        for (context, default) in [(64, most), (2000, 512)] {
            let model = model.replace("context: 64", &format!("context: {context}"));
            let model = model.replace("context: 66", &format!("context: {}", context + 2));
            let (_, model) = spec(&bench, "short.peft", &format!("{model}{}", task("")));
            assert_eq!(model.task.max_tokens, default, "{name} of {context}");
            assert_eq!(model.backbone.longest, Some(most + context - 64), "{name} of {context}");
        }
    }
}

/// The report's row: MiniLM's context of 512 and a task of 2,000 tokens, by `--set`.
#[test]
fn a_task_of_2000_tokens_for_minilm() {
    let bench = Bench::new();
    let sentiment = "models/demo/sentiment.peft";
    let set = ["--set", "task.max_tokens=2000"];
    let words = ["2000", "at most 512", "task.max_tokens=2000", "set `max_tokens` to 512 or less"];
    bench.refuses(&[&["check", sentiment], &set[..]].concat(), 1, &words);
    let run = bench.path("run");
    let data = bench.write("long.tsv", format!("{}\t1\n", "film ".repeat(1500)));
    let train = ["train", sentiment, "--weights", "random", "--data", text(&data), "--out", text(&run)];
    bench.refuses(&[&train[..], &set].concat(), 1, &words);
    assert!(!run.exists());
}

#[test]
fn what_a_backbone_of_ones_own_says() {
    let bench = Bench::new();
    let own = |longest: &str| {
        format!(
            "backbone mine(context: int = 20) for generation {{\n  weight w \"w\": [9, 4] ~ normal(1)\n  \
             weight p \"p\": [context, 4] ~ normal(1)\n  {longest}\n  x = w[ids] + p[positions]\n  \
             logits = x[targets] @ transpose(w)\n  output logits\n  \
             output loss = mean(cross_entropy(logits, labels, smoothing))\n}}\nmodel = mine()\n{}",
            generates("max_tokens: 20")
        )
    };
    // The table of positions alone is enough.
    for (says, longest) in [("", 20), ("longest context", 20), ("longest 20", 20)] {
        let (_, model) = spec(&bench, "own.peft", &own(says));
        assert_eq!(model.backbone.longest, Some(longest));
    }
    for (says, words) in [
        ("longest 12", &["`max_tokens` is 20", "has at most 12", "the backbone says so here"][..]),
        ("longest context + 1", &["takes 21 tokens", "the 20 rows of `p`"]),
        ("longest 0", &["how many tokens a sequence may have is at least 1, found 0"]),
        ("longest 9 longest 9", &["says twice how many tokens"]),
        ("positions skip -1", &["which token positions skip is at least 0, found -1"]),
    ] {
        let path = bench.write("own.peft", own(says));
        bench.refuses(&["check", text(&path)], 1, words);
    }
}

const ZEROS: [i64; 65] = [0; 65];

/// The report's rows, on RoBERTa: ids, types, positions, labels.
#[test]
fn roberta_reads_no_row_that_is_not_there() {
    let bench = Bench::new();
    let runs = Runs::new(&bench, &format!("{ROBERTA}{}", classifies("")));
    let labels: (&str, &[&[i64]]) = ("classes", &[&[0, 1]]);
    let row = |last: i64| [4, 5, last];
    runs.results(&[("ids", &[&row(49), &row(0)]), labels]);
    let ids = |id: i64| {
        runs.refuses(
            &[("ids", &[&row(4), &row(id)]), labels],
            &[
                &format!("`inputs.ids` is {id} in row 1, column 2"),
                "the 50 rows of `roberta.embeddings.word_embeddings.weight`, so it must lie in 0..50",
            ],
        )
    };
    [50, 2_000_000_000, -1].into_iter().for_each(ids);
    runs.refuses(&[("ids", &[&row(1 << 40), &row(4)]), labels], &["`inputs.ids` holds 1099511627776: too large"]);
    // Its one token type.
    let types: (&str, &[&[i64]]) = ("types", &[&[0, 0, 0], &[0, 1, 0]]);
    let words =
        ["`inputs.types` is 1 in row 1, column 1", "the 1 rows of `roberta.embeddings.token_type_embeddings.weight`"];
    runs.refuses(&[("ids", &[&row(4), &row(5)]), types, labels], &words);
    // Two classes.
    let words = ["`inputs.labels` is 2 in row 1", "the 2 classes of the loss"];
    runs.refuses(&[("ids", &[&row(4), &row(5)]), ("classes", &[&[1, 2]])], &words);
    // A padding id that is no padding: its position would be the padding's.
    let words = ["`inputs.ids` is 1 in row 0, column 2", "padding, which the model's positions do not count"];
    runs.refuses(&[("ids", &[&row(1), &row(4)]), labels], &words);
    // 64 of 66 positions are tokens'. The mask leaves none out.
    let long = |n: usize| ZEROS[..n].iter().map(|_| 7).collect::<Vec<i64>>();
    runs.results(&[("ids", &[&long(64)]), ("classes", &[&[0]])]);
    let words = [
        "`inputs.ids` has a token of position 64 in row 0, column 64",
        "64 rows of `roberta.embeddings.position_embeddings.weight` from row 2 on",
    ];
    runs.refuses(&[("ids", &[&long(65)]), ("classes", &[&[0]])], &words);
}

/// A prefix of ten positions leaves 54; llama has no table, and the same limit.
#[test]
fn positions_behind_a_prefix_and_without_a_table() {
    let bench = Bench::new();
    let prefixed = GPT2.replace("context: 64", "context: 64, first_position: 10");
    for (model, most, what) in [
        (&prefixed[..], 54, "the 54 rows of `transformer.wpe.weight` from row 10 on"),
        (LLAMA, 64, "the 64 positions of this model's longest sequence"),
    ] {
        let runs = Runs::new(&bench, model);
        runs.results(&[("ids", &[&ZEROS[..most]])]);
        let words = [&format!("`inputs.ids` has a token of position {most} in row 0, column {most}"), what];
        runs.refuses(&[("ids", &[&ZEROS[..most + 1]])], &words);
        // Left padding counts, and it may not push a token beyond the end.
        let mut mask = [1; 65];
        mask[..65 - most + 1].fill(0);
        runs.refuses(&[("ids", &[&ZEROS]), ("mask", &[&mask])], &["has a token of position"]);
    }
}

/// What a generating model predicts are rows of its vocabulary.
#[test]
fn labels_beyond_the_vocabulary() {
    let bench = Bench::new();
    let runs = Runs::new(&bench, GPT2);
    let ids: (&str, &[&[i64]]) = ("ids", &[&[1, 2, 3]]);
    runs.results(&[ids, ("labels", &[&[-100, 49, 0]])]);
    for (labels, words) in [
        ([-100, -100, 50], "`inputs.labels` is 50 in row 0, column 2: it indexes the 50 classes of the loss"),
        ([-100, -1, 3], "`inputs.labels` is -1 in row 0, column 1; where nothing is asked it is -100"),
    ] {
        runs.refuses(&[ids, ("labels", &[&labels])], &[words]);
    }
    // It has no token types to look up.
    runs.refuses(&[ids, ("types", &[&[0, 1, 0]])], &["`inputs.types` is 1 in row 0, column 1", "has no token types"]);
}

/// Left padding, holes and odd padding ids against transformers, which `tests/interop/masks.py` asked.
#[test]
fn masks_as_transformers_has_them() {
    let bench = Bench::new();
    let sizes = "layers: 2, hidden: 16, heads: 2, ffn: 24, vocab: 20, context: 12";
    for (name, model) in [
        ("bert", format!("bert({sizes}, pooling: \"mean\")")),
        ("bert_first", format!("bert({sizes})")),
        ("roberta", format!("roberta({sizes})")),
        ("gpt2", format!("gpt2({sizes})")),
        ("llama", format!("llama({sizes}, kv_heads: 1)")),
    ] {
        let source = bench.write("masks.peft", format!("model = {model}\n"));
        let inputs = Path::new("tests/interop/masks").join(format!("{name}.safetensors"));
        let out = bench.path("out.safetensors");
        let ran = bench.peftc([
            "run",
            "--overwrite",
            text(&source),
            "--entry",
            "forward",
            "--inputs",
            text(&inputs),
            "-o",
            text(&out),
        ]);
        assert_eq!(ran.code, 0, "{name}: {}", ran.err);
        let (given, found) = (adapter::load(&inputs).expect("sound"), adapter::load(&out).expect("sound"));
        let (want, found) = (&given.tensors["expect.logits"], &found.tensors["logits"]);
        assert_eq!(want.shape, found.shape, "{name}");
        let Data::I64(mask) = &given.tensors["inputs.mask"].data else { panic!("integers") };
        // Of a row, or of a token where that is real.
        let width = *want.shape.last().expect("an axis") as usize;
        let real = |at: usize| want.shape.len() == 2 || mask[at / width] == 1;
        let largest = floats(want).iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        // Two layers of sums of 24 and fewer terms in f32, each within 24 · 2⁻²⁴ of what it sums: far below 10⁻⁴.
        for (at, (f, w)) in floats(found).iter().zip(floats(want)).enumerate().filter(|(at, _)| real(*at)) {
            assert!((f - w).abs() <= 1e-4 * largest, "{name}: {f} for {w} at {at}, the largest is {largest}");
        }
    }
}

/// A model that reads the first token of a row needs one there.
#[test]
fn a_mask_over_the_first_token() {
    let bench = Bench::new();
    let runs = Runs::new(&bench, BERT);
    let ids: (&str, &[&[i64]]) = ("ids", &[&[3, 4, 5], &[6, 7, 8]]);
    let words = ["`inputs.mask` is 0 in the first column of row 1", "pad on the right"];
    runs.refuses(&[ids, ("mask", &[&[1, 1, 0], &[0, 1, 1]])], &words);
    runs.results(&[ids, ("mask", &[&[1, 1, 0], &[1, 0, 1]])]);
}

/// `forward` needs no labels; what a loss is needed for says so.
#[test]
fn run_without_labels() {
    let bench = Bench::new();
    let no = [-100; 3];
    let ids: (&str, &[&[i64]]) = ("ids", &[&[3, 4, 5], &[6, 7, 8]]);
    for (model, given, nothing) in [
        (BERT, ("classes", &[&[0, 1][..]][..]), ("classes", &[&[-100, -100][..]][..])),
        (GPT2, ("labels", &[&[3, 4, 5][..], &[-100, 7, 8]][..]), ("labels", &[&no[..], &no][..])),
    ] {
        let mut runs = Runs::new(&bench, &format!("{model}tune {{ every attention {{ lora(rank: 2) on q }} }}\n"));
        // No token stands before a row's first.
        let first: &[&[i64]] = &[&[3, -100, -100], &no];
        let first = (model == GPT2).then_some(("labels", first));
        let (with, ran) = runs.results(&[ids, given]);
        assert!(ran.out.starts_with("loss ") && with.tensors.contains_key("loss"), "{}", ran.out);
        for (labels, why) in [
            (None, "no loss: there are no `inputs.labels`"),
            (Some(nothing), "no loss: every one of `inputs.labels` is -100: there is no target"),
            (first, "no loss: `inputs.labels` asks for nothing behind column 0"),
        ] {
            if labels.is_none() && !why.contains("there are no") {
                continue;
            }
            let tensors: Vec<_> = [ids].into_iter().chain(labels).collect();
            let (without, ran) = runs.results(&tensors);
            assert!(ran.out.contains(why) && !ran.out.contains("NaN"), "{}", ran.out);
            // All that was there before but the loss, to the bit.
            let mut expected = with.clone();
            expected.tensors.remove("loss");
            assert!(expected == without, "{why}: {:?} and {:?}", expected.tensors.keys(), without.tensors.keys());
            runs.entry = "grad";
            let why = why.trim_start_matches("no loss: ");
            runs.refuses(&tensors, &[why, "gradients are those of a loss", "`--entry forward` needs none"]);
            runs.entry = "forward";
        }
    }
}

/// Data is held to the tables as well: a tokenizer with more tokens than the model's table has rows.
#[test]
fn ids_of_a_tokenizer_with_more_tokens_than_the_table() {
    use crate::cli::tiny_bert;
    let bench = Bench::new();
    let (spec, weights) = tiny_bert(&bench, |_| {});
    let tokenizer = weights.join("tokenizer.json");
    // Id 7 for a word, of 6 rows; the number of tokens alone would fit.
    let json = std::fs::read_to_string(&tokenizer).expect("readable").replace("\"film\":5", "\"film\":7");
    std::fs::write(&tokenizer, json).expect("written");
    let data = bench.write("data.tsv", "good film\t1\nbad\t0\n");
    let out = bench.path("run");
    for (command, more) in [("train", &["--out", text(&out)][..]), ("eval", &[])] {
        let given = [command, text(&spec), "--weights", text(&weights), "--data", text(&data)];
        bench.refuses(&[&given, more].concat(), 3, &["its vocabulary has 8 tokens, but the spec's `vocab` is 6"]);
    }
}

/// A part of a batch without its prefix is not passed over.
#[test]
fn parts_of_a_batch_by_other_names() {
    let bench = Bench::new();
    let runs = Runs::new(&bench, BERT);
    let ids: (&str, &[&[i64]]) = ("ids", &[&[3, 4, 5], &[6, 7, 8]]);
    let file = batch(&bench, "in.safetensors", &[ids]);
    let sound = adapter::load(&file).expect("sound");
    for (name, known) in [
        ("mask", "mask"),
        ("attention_mask", "mask"),
        ("types", "types"),
        ("token_type_ids", "types"),
        ("Inputs.mask", "mask"),
        ("input.mask", "mask"),
        ("input_ids", "ids"),
    ] {
        let mut other = sound.clone();
        let stored = Stored { shape: vec![2, 3], data: Data::I64(vec![1, 1, 0, 1, 1, 1]) };
        other.tensors.insert(name.into(), stored);
        adapter::save(&file, &other).expect("written");
        let args = ["run", text(&runs.source), "--entry", "forward", "--weights", text(&runs.weights), "--inputs"];
        let out = runs.out();
        let args = [&args[..], &[text(&file), "-o", text(&out)]].concat();
        bench.refuses(&args, 3, &[&format!("`{name}` would be passed over; call it `inputs.{known}`")]);
    }
}
