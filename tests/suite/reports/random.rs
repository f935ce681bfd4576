//! Frozen tensors that a run initialised at random are saved with the adapter, or determined by the seed.

use std::fs;
use std::path::{Path, PathBuf};

use peft_grammar::model::Model;
use peft_runtime::adapter::{self, Data, Float, Stored, TensorFile};

use super::{config, folder, spec, tensors};
use crate::cli::{Bench, Ran, text};

/// A spec with a checkpoint's folder and data.
pub struct Case {
    pub bench: Bench,
    pub spec: PathBuf,
    pub model: Model,
    pub weights: PathBuf,
    pub data: PathBuf,
}

/// A tokenizer with six tokens, which adds a special token at both ends of a sentence.
pub const TOKENIZER: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
    "pre_tokenizer":{"type":"Whitespace"},
    "post_processor":{"type":"BertProcessing","sep":["[SEP]",2],"cls":["[CLS]",1]},"decoder":null,
    "model":{"type":"WordLevel","vocab":{"[UNK]":0,"[CLS]":1,"[SEP]":2,"good":3,"bad":4,"film":5},"unk_token":"[UNK]"}}"#;

pub const CLASSIFIER: &str = "model = bert(layers: 1, hidden: 8, heads: 2, ffn: 12, vocab: 6, context: 16)\n\
    tune { every attention { lora(rank: 2) on q } }\n\
    task t { kind: classification\n max_tokens: 16\n labels: [\"0\", \"1\"] }\n\
    train { lr: 5e-2\n batch: 2\n epochs: 20 }\n";

/// A classifier with a checkpoint of its backbone. `spoil` may remove tensors from the checkpoint.
pub fn classifier(text: &str, spoil: impl FnOnce(&mut TensorFile)) -> Case {
    let bench = Bench::new();
    let (spec, model) = spec(&bench, "tiny.peft", text);
    let mut file = tensors(&model, false);
    spoil(&mut file);
    let mut config = config(&model);
    config.insert("architectures".into(), vec!["BertModel"].into());
    let weights = folder(&bench, "weights", &config, &file);
    words(&weights);
    let data = bench.write("data.tsv", "good film\t1\nbad film\t0\ngood good\t1\nbad\t0\n");
    Case { bench, spec, model, weights, data }
}

/// Writes the tokenizer with six tokens into a folder.
pub fn words(folder: &Path) {
    fs::write(folder.join("tokenizer.json"), TOKENIZER).expect("written");
    let class = r#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#;
    fs::write(folder.join("tokenizer_config.json"), class).expect("written");
}

fn without_pooler(file: &mut TensorFile) {
    file.tensors.retain(|name, _| !name.contains("pooler"));
}

/// A GPT-2 for `data/triples` whose checkpoint lacks the task's six special tokens. `rows` is a rule for the tune
/// block.
pub fn generator(rows: &str) -> Case {
    generator_of(rows, 1536)
}

/// A [`generator`] whose checkpoint has another number of tokens.
pub fn generator_of(rows: &str, tokens: usize) -> Case {
    let bench = Bench::new();
    let demo = fs::read_to_string("models/demo/triples.peft").expect("readable");
    let (start, end) = (demo.find("task").expect("a task"), demo.find("train {").expect("a recipe"));
    let text = format!(
        "model = gpt2(layers: 1, hidden: 8, heads: 2, ffn: 16, vocab: {}, context: 128)\n\
         tune {{ every attention {{ lora(rank: 2) on q, v }} {rows} }}\n{}\
         train {{ lr: 5e-2\n batch: 8\n steps: 6 }}\n",
        tokens + 6,
        &demo[start..end]
    );
    let (spec, model) = spec(&bench, "tiny.peft", &text);
    let mut file = tensors(&model, false);
    let table = file.tensors.get_mut("transformer.wte.weight").expect("a table");
    let Data::F32(numbers) = &table.data else { panic!("f32") };
    *table = Stored::f32(vec![tokens as u64, 8], numbers[..tokens * 8].to_vec());
    let mut config = config(&model);
    config.insert("vocab_size".into(), tokens.into());
    let weights = folder(&bench, "weights", &config, &file);
    fs::copy("data/triples/tokenizer.json", weights.join("tokenizer.json")).expect("copied");
    Case { bench, spec, model, weights, data: PathBuf::from("data/triples/dev.json") }
}

impl Case {
    pub fn path(&self, name: &str) -> PathBuf {
        self.bench.path(name)
    }

    /// Runs a command on the case's spec, weights and data.
    pub fn with(&self, command: &str, more: &[&str]) -> Ran {
        let given = [command, text(&self.spec), "--weights", text(&self.weights), "--data", text(&self.data)];
        self.bench.peftc(given.iter().chain(more))
    }

    /// Trains into `out`. Returns the metrics on the training data after the last step.
    pub fn train(&self, out: &Path, more: &[&str]) -> (Ran, String) {
        let ran = self.with("train", &[&["--dev", text(&self.data), "--out", text(out)], more].concat());
        assert_eq!(ran.code, 0, "{}", ran.err);
        let after = ran.out.lines().find_map(|line| line.trim().strip_suffix(" after")).expect("judged").to_string();
        (ran, after)
    }

    /// The metrics that `eval` prints, and its messages.
    pub fn eval(&self, adapter: &Path, more: &[&str]) -> (String, String) {
        let ran = self.with("eval", &[&["--adapter", text(adapter)], more].concat());
        assert_eq!(ran.code, 0, "{}", ran.err);
        (ran.out.trim().split_once("examples, ").expect("figures").1.to_string(), ran.err)
    }
}

/// Copies an adapter without its random tensors, as older versions wrote it.
fn forgetful(run: &Path, to: &Path) {
    let mut file = adapter::load(&run.join("adapter.safetensors")).expect("sound");
    let keys: Vec<String> = serde_json::from_str(&file.notes["drawn"]).expect("a list");
    assert!(!keys.is_empty() && keys.iter().all(|key| file.tensors.remove(key).is_some()));
    for note in ["drawn", "base", "seed", "of"] {
        file.notes.remove(note);
    }
    adapter::save(to, &file).expect("written");
}

#[test]
fn a_random_pooler_is_saved_with_the_adapter() {
    let case = classifier(CLASSIFIER, without_pooler);
    let run = case.path("run");
    let (ran, after) = case.train(&run, &["--seed", "7"]);
    let new = "not in the weights, so drawn at random: bert.pooler.dense.weight, bert.pooler.dense.bias, classifier.weight, classifier.bias";
    assert!(ran.err.contains(new), "{}", ran.err);
    let (figures, said) = case.eval(&run, &[]);
    assert_eq!(figures, after);
    assert!(!said.contains("drawn at random") && !said.contains("warning"), "{said}");
    // New random values give another model, and a message says so.
    let forgot = case.path("forgot.safetensors");
    forgetful(&run, &forgot);
    let (figures, said) = case.eval(&forgot, &[]);
    assert!(figures != after && said.contains("drawn at random: bert.pooler.dense.weight"), "{figures} {said}");

    // If the checkpoint has the tensors too, the adapter's are used, and a message says so.
    let mut whole = tensors(&case.model, false);
    let other = folder(&case.bench, "other", &config(&case.model), &whole);
    words(&other);
    let elsewhere = |weights: &Path| {
        let args = ["eval", text(&case.spec), "--weights", text(weights), "--data", text(&case.data), "--adapter"];
        let ran = case.bench.peftc(args.iter().copied().chain([text(&run)]));
        assert_eq!(ran.code, 0, "{}", ran.err);
        (ran.out.trim().split_once("examples, ").expect("figures").1.to_string(), ran.err)
    };
    let (figures, said) = elsewhere(&other);
    assert_eq!(figures, after);
    assert!(said.contains("these weights hold `bert.pooler.dense.weight`") && !said.contains("warning"), "{said}");

    // Other values of the base are reported.
    let Data::F32(numbers) = &mut whole.tensors.get_mut("bert.encoder.layer.0.output.dense.bias").expect("there").data
    else {
        panic!("f32")
    };
    numbers[3] += 0.5;
    let other = folder(&case.bench, "moved", &config(&case.model), &whole);
    words(&other);
    assert!(elsewhere(&other).1.contains("was trained on other base weights than these"));

    // Export and merge include the random tensors.
    let own = case.path("own");
    let export = ["export", text(&case.spec), "--adapter", text(&run), "-o", text(&own)];
    case.bench.refuses(
        &[&export[..], &["--format", "peft"]].concat(),
        2,
        &["`bert.pooler.dense.bias` was drawn at random"],
    );
    let ran = case.bench.peftc(export);
    assert!(ran.code == 0 && ran.err.contains("`bert.pooler.dense.bias` was drawn at random"), "{}", ran.err);
    assert_eq!(case.eval(&own, &[]).0, after);
    let merged = case.path("merged");
    let merge =
        ["merge", text(&case.spec), "--weights", text(&case.weights), "--adapter", text(&run), "-o", text(&merged)];
    let ran = case.bench.peftc(merge);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let plain = CLASSIFIER.replace("tune { every attention { lora(rank: 2) on q } }\n", "");
    let plain = case.bench.write("plain.peft", plain);
    let args = ["eval", text(&plain), "--weights", text(&merged), "--data", text(&case.data)];
    let ran = case.bench.peftc(args);
    assert!(ran.out.contains(&after), "{}{}", ran.out, ran.err);
}

/// A head whose values come from an adapter or from a resumed state is not reported as drawn at random.
#[test]
fn only_random_tensors_are_reported_as_random() {
    let case = classifier(CLASSIFIER, without_pooler);
    let run = case.path("run");
    let (ran, _) = case.train(&run, &["--seed", "7"]);
    assert!(ran.err.contains("drawn at random") && ran.err.contains("classifier.weight"), "{}", ran.err);
    let (ran, _) = case.train(&case.path("next"), &["--seed", "7", "--adapter", text(&run)]);
    assert!(!ran.err.contains("drawn at random"), "{}", ran.err);
    // A resumed run evaluates nothing before its first step, so it prints no figures of before and after.
    let more = ["--dev", text(&case.data), "--out", text(&run), "--seed", "7", "--set", "train.epochs=21", "--resume"];
    let ran = case.with("train", &more);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let pooler = "drawn at random: bert.pooler.dense.weight, bert.pooler.dense.bias\n";
    assert!(ran.err.contains(pooler) && !ran.err.contains("classifier.weight"), "{}", ran.err);
}

/// A random frozen head is saved with the adapter. A base in bf16 with the same values is the same base.
#[test]
fn a_frozen_random_head_is_saved_with_the_adapter() {
    let text_of = CLASSIFIER.replace("on q }", "on q } head frozen");
    let rounded = |file: &mut TensorFile| {
        for stored in file.tensors.values_mut() {
            let Data::F32(numbers) = &mut stored.data else { panic!("f32") };
            // bf16 keeps the upper half of an f32.
            numbers.iter_mut().for_each(|x| *x = f32::from_bits(x.to_bits() & 0xFFFF_0000));
        }
    };
    let case = classifier(&text_of, rounded);
    let run = case.path("run");
    let (ran, after) = case.train(&run, &["--seed", "5"]);
    assert!(ran.err.contains("drawn at random: classifier.weight, classifier.bias\n"), "{}", ran.err);
    assert_eq!(case.eval(&run, &[]).0, after);
    let mut file = adapter::load(&case.weights.join("model.safetensors")).expect("sound");
    for stored in file.tensors.values_mut() {
        let Data::F32(numbers) = stored.data.clone() else { panic!("f32") };
        *stored = Stored::rounded(stored.shape.clone(), numbers, Float::BF16).expect("in range");
    }
    adapter::save(&case.weights.join("model.safetensors"), &file).expect("written");
    let (figures, said) = case.eval(&run, &[]);
    assert_eq!(figures, after);
    assert!(!said.contains("warning"), "{said}");
    // A spec in which the head trains is a different one.
    let trains = case.bench.write("trains.peft", CLASSIFIER);
    let eval =
        ["eval", text(&trains), "--weights", text(&case.weights), "--data", text(&case.data), "--adapter", text(&run)];
    case.bench.refuses(
        &eval,
        3,
        &["`classifier.weight` was drawn at random and did not train", "but in the spec it trains"],
    );
}

#[test]
fn rows_of_new_tokens_are_saved_with_the_adapter() {
    for rows in ["", "rows 1536..1538 of \"transformer.wte.weight\""] {
        let case = generator(rows);
        let run = case.path("run");
        let (ran, after) = case.train(&run, &["--seed", "7"]);
        assert!(ran.err.contains("drawn at random: transformer.wte.weight[1536:1542]"), "{}", ran.err);
        // The recipe has six steps, so a tenth of them is one step.
        assert!(ran.out.contains(" at the first step, "), "{}", ran.out);
        let (figures, said) = case.eval(&run, &[]);
        assert_eq!(figures, after);
        assert!(!said.contains("drawn at random") && !said.contains("warning"), "{said}");
        let file = adapter::load(&run.join("adapter.safetensors")).expect("sound");
        assert_eq!(file.tensors["transformer.wte.weight[1536:1542]"].shape, [6, 8]);
        let forgot = case.path("forgot.safetensors");
        forgetful(&run, &forgot);
        let (figures, said) = case.eval(&forgot, &[]);
        assert!(figures != after && said.contains("drawn at random"), "{figures} {said}");
        let own = case.path("own");
        let ran = case.bench.peftc(["export", text(&case.spec), "--adapter", text(&run), "-o", text(&own)]);
        assert!(ran.code == 0 && ran.out.contains("peftc's own format"), "{}{}", ran.out, ran.err);
        assert_eq!(case.eval(&own, &[]).0, after);
    }
}

/// Random base weights are determined by the seed, which is required to use the adapter.
#[test]
fn random_base_weights_require_their_seed() {
    let case = classifier(CLASSIFIER, |_| {});
    let run = case.path("run");
    let tokenizer = ["--tokenizer", text(&case.weights)];
    let on = |command: &str, weights: &str, more: &[&str]| {
        let given = [command, text(&case.spec), "--weights", weights, "--data", text(&case.data)];
        case.bench.peftc(given.iter().chain(&tokenizer).chain(more))
    };
    let ran = on("train", "random", &["--seed", "7", "--dev", text(&case.data), "--out", text(&run)]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(!ran.err.contains("drawn at random"), "{}", ran.err);
    let after = ran.out.lines().find_map(|line| line.trim().strip_suffix(" after")).expect("judged");
    let adapter = ["--adapter", text(&run)];
    let ran = on("eval", "random", &adapter);
    assert!(ran.code == 3 && ran.err.contains("use `--set train.seed=7`"), "{}{}", ran.out, ran.err);
    let ran = on("eval", "random", &["--adapter", text(&run), "--set", "train.seed=7"]);
    assert!(ran.code == 0 && ran.out.contains(after), "{}{}", ran.out, ran.err);
    let ran = on("eval", text(&case.weights), &adapter);
    assert!(ran.code == 3 && ran.err.contains("use `--weights random --set train.seed=7`"), "{}{}", ran.out, ran.err);
    // With full fine-tuning nothing of the base remains, so its seed is not required.
    let all = case.bench.write("full.peft", CLASSIFIER.replace("every attention { lora(rank: 2) on q }", "full()"));
    let given = [text(&all), "--weights", "random", "--data", text(&case.data), "--tokenizer", text(&case.weights)];
    let full = case.path("full");
    let train = ["train", "--seed", "7", "--dev", text(&case.data), "--out", text(&full)];
    let ran = case.bench.peftc(train.iter().chain(&given));
    assert_eq!(ran.code, 0, "{}", ran.err);
    let after = ran.out.lines().find_map(|line| line.trim().strip_suffix(" after")).expect("judged");
    let ran = case.bench.peftc(["eval", "--adapter", text(&full)].iter().chain(&given));
    assert!(ran.code == 0 && ran.out.contains(after), "{}{}", ran.out, ran.err);
    // An export keeps the seed of its run.
    let own = case.path("own");
    let ran =
        case.bench.peftc(["export", text(&case.spec), "--format", "own", "--adapter", text(&run), "-o", text(&own)]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let ran = on("eval", "random", &["--adapter", text(&own)]);
    assert!(ran.code == 3 && ran.err.contains("use `--set train.seed=7`"), "{}{}", ran.out, ran.err);
}

/// An adapter is refused by a spec with another function, even if the shapes of all tensors match.
#[test]
fn an_adapter_of_another_function_is_refused() {
    let case = classifier(CLASSIFIER, |_| {});
    let run = case.path("run");
    let (_, after) = case.train(&run, &[]);
    // Settings that affect only training may differ.
    assert_eq!(case.eval(&run, &["--set", "lora.dropout=0.3", "--set", "train.label_smoothing=0.1"]).0, after);
    let refused = |spec: &str, more: &[&str], words: &[&str]| {
        let given = ["--weights", text(&case.weights), "--data", text(&case.data), "--adapter", text(&run)];
        case.bench.refuses(&[&["eval", spec], &given[..], more].concat(), 3, words);
    };
    let written = |name: &str, from: &str, to: &str| {
        assert!(CLASSIFIER.contains(from));
        case.bench.write(name, CLASSIFIER.replace(from, to))
    };
    refused(
        text(&case.spec),
        &["--set", "lora.alpha=20"],
        &["part of another function", "`alpha` was 2", "is 20.0 here"],
    );
    let mean = written("mean.peft", "context: 16", "context: 16, pooling: \"mean\"");
    refused(text(&mean), &[], &["bert's `pooling` was not set, and is \"mean\" here"]);
    let swapped = written("swapped.peft", "[\"0\", \"1\"]", "[\"1\", \"0\"]");
    refused(text(&swapped), &[], &["`labels` was [\"0\",\"1\"], and is [\"1\",\"0\"] here"]);
    let out = case.path("merged");
    let merge = ["merge", text(&swapped), "--weights", text(&case.weights), "--adapter", text(&run), "-o", text(&out)];
    case.bench.refuses(&merge, 3, &["`labels` was"]);
    let export = ["export", text(&swapped), "--adapter", text(&run), "-o", text(&out)];
    case.bench.refuses(&export, 3, &["`labels` was"]);
    // The notes in the file are checked.
    let mut file = adapter::load(&run.join("adapter.safetensors")).expect("sound");
    for (note, value, words) in [
        ("format", "peftc adapter 9", "use the peftc that wrote it"),
        ("backbone", "gpt2", "trained on the backbone `gpt2`"),
    ] {
        let before = file.notes.insert(note.into(), value.into()).expect("it is there");
        let other = case.path("other.safetensors");
        adapter::save(&other, &file).expect("written");
        let given = ["eval", text(&case.spec), "--weights", text(&case.weights), "--data", text(&case.data)];
        case.bench.refuses(&[&given[..], &["--adapter", text(&other)]].concat(), 3, &[words]);
        file.notes.insert(note.into(), before);
    }

    // Special tokens are identified by the numbers of their rows, which depend on the order in the list.
    let case = generator("rows 1536..1542 of \"transformer.wte.weight\"");
    let run = case.path("run");
    case.train(&run, &[]);
    let text_of = fs::read_to_string(&case.spec).expect("readable");
    let swapped = text_of.replacen("\"<bos>\", \"<eos>\"", "\"<eos>\", \"<bos>\"", 1);
    assert!(swapped != text_of);
    let swapped = case.bench.write("swapped.peft", swapped);
    let given = ["--weights", text(&case.weights), "--data", text(&case.data), "--adapter", text(&run)];
    case.bench.refuses(&[&["eval", text(&swapped)], &given[..]].concat(), 3, &["`special` was [\"<bos>\",\"<eos>\""]);
}

/// An adapter in PEFT's format lacks random tensors of the base, so a base without them is refused.
#[test]
fn an_adapter_in_pefts_format_lacks_random_tensors() {
    let case = classifier(CLASSIFIER, |_| {});
    let (run, peft) = (case.path("run"), case.path("peft"));
    case.train(&run, &[]);
    let ran = case.bench.peftc(["export", text(&case.spec), "--adapter", text(&run), "-o", text(&peft)]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let mut file = tensors(&case.model, false);
    without_pooler(&mut file);
    let bare = folder(&case.bench, "bare", &config(&case.model), &file);
    words(&bare);
    let given = ["eval", text(&case.spec), "--weights", text(&bare), "--data", text(&case.data), "--adapter"];
    let words =
        ["neither the weights nor the adapter hold bert.pooler.dense.weight", "the weights that it was trained on"];
    case.bench.refuses(&[&given[..], &[text(&peft)]].concat(), 3, &words);
}
