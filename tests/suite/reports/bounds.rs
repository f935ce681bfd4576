//! Bounds checks: indices beyond a table, sequences beyond the context, masks, and `run` without labels.

use std::path::{Path, PathBuf};

use peft_runtime::adapter::{self, Data, Stored, TensorFile};

use super::{BERT, GPT2, LLAMA, ROBERTA, checkpoint, spec};
use crate::cli::{Bench, Ran, text};

/// A classification task with two labels, with `more` added to its block.
fn classifies(more: &str) -> String {
    format!("task t {{ kind: classification labels: [\"no\", \"yes\"] {more} }}\n")
}

fn generates(more: &str) -> String {
    format!(
        "task t {{ kind: generation special: [\"<t>\"] template: \"({{subject}})* <t> {{text}}\" target: \"<t>\" {more} }}\n"
    )
}

/// A batch's tensors by name. `classes` stands for `labels` with one value per row.
type Tensors<'a> = [(&'a str, &'a [&'a [i64]])];

/// Writes a batch file of tensors `inputs.NAME`.
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

/// The backbone declares the longest sequence, and every command that reads the spec refuses a task with a longer one.
#[test]
fn a_task_longer_than_the_context_is_refused() {
    let bench = Bench::new();
    // For each backbone, the number of positions available to a sequence.
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
        // The limit in the message is accepted, and one more is not.
        let set = |n: u64| format!("task.max_tokens={n}");
        assert_eq!(bench.peftc(["check", text(&path), "--set", &set(most)]).code, 0, "{name}");
        bench.refuses(&["check", text(&path), "--set", &set(most + 1)], 1, &["--set", &format!("is {}", most + 1)]);
        // The default is the longest sequence, but at most 512.
        for (context, default) in [(64, most), (2000, 512)] {
            let model = model.replace("context: 64", &format!("context: {context}"));
            let model = model.replace("context: 66", &format!("context: {}", context + 2));
            let (_, model) = spec(&bench, "short.peft", &format!("{model}{}", task("")));
            assert_eq!(model.task.max_tokens, default, "{name} of {context}");
            assert_eq!(model.backbone.max_sequence_tokens, Some(most + context - 64), "{name} of {context}");
        }
    }
}

/// A reported case: MiniLM's context of 512 with a task of 2,000 tokens, set by `--set`.
#[test]
fn a_task_of_2000_tokens_is_refused_for_minilm() {
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
fn a_custom_backbone_declares_its_longest_sequence() {
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
    // The size of the position table implies the limit.
    for (says, longest) in [("", 20), ("longest context", 20), ("longest 20", 20)] {
        let (_, model) = spec(&bench, "own.peft", &own(says));
        assert_eq!(model.backbone.max_sequence_tokens, Some(longest));
    }
    for (says, words) in [
        ("longest 12", &["`max_tokens` is 20", "has at most 12", "the backbone sets the limit here"][..]),
        ("longest context + 1", &["takes 21 tokens", "the 20 rows of `p`"]),
        ("longest 0", &["the maximum length of a sequence is at least 1, found 0"]),
        ("longest 9 longest 9", &["sets the maximum length of a sequence twice"]),
        ("positions skip -1", &["the token id that positions skip is at least 0, found -1"]),
    ] {
        let path = bench.write("own.peft", own(says));
        bench.refuses(&["check", text(&path)], 1, words);
    }
}

const ZEROS: [i64; 65] = [0; 65];

/// Reported cases on RoBERTa: ids, types, positions and labels out of range.
#[test]
fn roberta_refuses_indices_out_of_range() {
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
    // The model has one token type.
    let types: (&str, &[&[i64]]) = ("types", &[&[0, 0, 0], &[0, 1, 0]]);
    let words =
        ["`inputs.types` is 1 in row 1, column 1", "the 1 rows of `roberta.embeddings.token_type_embeddings.weight`"];
    runs.refuses(&[("ids", &[&row(4), &row(5)]), types, labels], &words);
    // The task has two classes.
    let words = ["`inputs.labels` is 2 in row 1", "the 2 classes of the loss"];
    runs.refuses(&[("ids", &[&row(4), &row(5)]), ("classes", &[&[1, 2]])], &words);
    // The padding id at a token that is not masked would get the padding's position.
    let words = ["`inputs.ids` is 1 in row 0, column 2", "padding, which the model's positions do not count"];
    runs.refuses(&[("ids", &[&row(1), &row(4)]), labels], &words);
    // 64 of the 66 positions are available to tokens. The mask excludes none.
    let long = |n: usize| ZEROS[..n].iter().map(|_| 7).collect::<Vec<i64>>();
    runs.results(&[("ids", &[&long(64)]), ("classes", &[&[0]])]);
    let words = [
        "`inputs.ids` has a token of position 64 in row 0, column 64",
        "64 rows of `roberta.embeddings.position_embeddings.weight` from row 2 on",
    ];
    runs.refuses(&[("ids", &[&long(65)]), ("classes", &[&[0]])], &words);
}

/// A prefix of ten positions leaves 54. Llama has no position table, but the same limit.
#[test]
fn positions_after_a_prefix_and_without_a_table_are_limited() {
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
        // Left padding counts towards the positions, and must not push a token beyond the limit.
        let mut mask = [1; 65];
        mask[..65 - most + 1].fill(0);
        runs.refuses(&[("ids", &[&ZEROS]), ("mask", &[&mask])], &["has a token of position"]);
    }
}

/// The labels of a generation model index its vocabulary.
#[test]
fn labels_beyond_the_vocabulary_are_refused() {
    let bench = Bench::new();
    let runs = Runs::new(&bench, GPT2);
    let ids: (&str, &[&[i64]]) = ("ids", &[&[1, 2, 3]]);
    runs.results(&[ids, ("labels", &[&[-100, 49, 0]])]);
    for (labels, words) in [
        ([-100, -100, 50], "`inputs.labels` is 50 in row 0, column 2: it indexes the 50 classes of the loss"),
        ([-100, -1, 3], "`inputs.labels` is -1 in row 0, column 1; an ignored label is -100"),
    ] {
        runs.refuses(&[ids, ("labels", &[&labels])], &[words]);
    }
    // The model has no table of token types.
    runs.refuses(&[ids, ("types", &[&[0, 1, 0]])], &["`inputs.types` is 1 in row 0, column 1", "has no token types"]);
}

/// Left padding, masks with holes and unusual padding ids, against transformers (`tests/interop/masks.py`).
#[test]
fn masked_logits_match_transformers() {
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
        // Logits of a row, or of a token that is not masked.
        let width = *want.shape.last().expect("an axis") as usize;
        let real = |at: usize| want.shape.len() == 2 || mask[at / width] == 1;
        let largest = floats(want).iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        // Two layers of sums of at most 24 terms in f32, each with a relative error of at most 24 · 2⁻²⁴, which is far
        // below 10⁻⁴.
        for (at, (f, w)) in floats(found).iter().zip(floats(want)).enumerate().filter(|(at, _)| real(*at)) {
            assert!((f - w).abs() <= 1e-4 * largest, "{name}: {f} for {w} at {at}, the largest is {largest}");
        }
    }
}

/// A model that reads the first token of a row refuses a mask that excludes it.
#[test]
fn a_mask_that_excludes_the_first_token_is_refused() {
    let bench = Bench::new();
    let runs = Runs::new(&bench, BERT);
    let ids: (&str, &[&[i64]]) = ("ids", &[&[3, 4, 5], &[6, 7, 8]]);
    let words = ["`inputs.mask` is 0 in the first column of row 1", "pad on the right"];
    runs.refuses(&[ids, ("mask", &[&[1, 1, 0], &[0, 1, 1]])], &words);
    runs.results(&[ids, ("mask", &[&[1, 1, 0], &[1, 0, 1]])]);
}

/// `forward` needs no labels. Entries that need a loss refuse their absence.
#[test]
fn forward_runs_without_labels() {
    let bench = Bench::new();
    let no = [-100; 3];
    let ids: (&str, &[&[i64]]) = ("ids", &[&[3, 4, 5], &[6, 7, 8]]);
    for (model, given, nothing) in [
        (BERT, ("classes", &[&[0, 1][..]][..]), ("classes", &[&[-100, -100][..]][..])),
        (GPT2, ("labels", &[&[3, 4, 5][..], &[-100, 7, 8]][..]), ("labels", &[&no[..], &no][..])),
    ] {
        let mut runs = Runs::new(&bench, &format!("{model}tune {{ every attention {{ lora(rank: 2) on q }} }}\n"));
        // A label at the first token is no target, because no token precedes it.
        let first: &[&[i64]] = &[&[3, -100, -100], &no];
        let first = (model == GPT2).then_some(("labels", first));
        let (with, ran) = runs.results(&[ids, given]);
        assert!(ran.out.starts_with("loss ") && with.tensors.contains_key("loss"), "{}", ran.out);
        for (labels, why) in [
            (None, "no loss: there are no `inputs.labels`"),
            (Some(nothing), "no loss: every one of `inputs.labels` is -100: there is no target"),
            (first, "no loss: `inputs.labels` has labels in column 0 alone"),
        ] {
            if labels.is_none() && !why.contains("there are no") {
                continue;
            }
            let tensors: Vec<_> = [ids].into_iter().chain(labels).collect();
            let (without, ran) = runs.results(&tensors);
            assert!(ran.out.contains(why) && !ran.out.contains("NaN"), "{}", ran.out);
            // All results except the loss are bit-identical.
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

/// Ids in the data are checked too: a tokenizer with more tokens than the model's table has rows is refused.
#[test]
fn a_tokenizer_with_more_tokens_than_the_table_is_refused() {
    use crate::cli::tiny_bert;
    let bench = Bench::new();
    let (spec, weights) = tiny_bert(&bench, |_| {});
    let tokenizer = weights.join("tokenizer.json");
    // The word has the id 7, and the table has 6 rows. The number of tokens alone would fit.
    let json = std::fs::read_to_string(&tokenizer).expect("readable").replace("\"film\":5", "\"film\":7");
    std::fs::write(&tokenizer, json).expect("written");
    let data = bench.write("data.tsv", "good film\t1\nbad\t0\n");
    let out = bench.path("run");
    for (command, more) in [("train", &["--out", text(&out)][..]), ("eval", &[])] {
        let given = [command, text(&spec), "--weights", text(&weights), "--data", text(&data)];
        bench.refuses(&[&given, more].concat(), 3, &["its vocabulary has 8 tokens, but the spec's `vocab` is 6"]);
    }
}

/// A tensor of a batch whose name lacks the prefix is refused instead of ignored.
#[test]
fn misnamed_batch_tensors_are_refused() {
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
        bench.refuses(&args, 3, &[&format!("`{name}` would be ignored; call it `inputs.{known}`")]);
    }
}
