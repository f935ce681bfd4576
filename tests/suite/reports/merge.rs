//! `merge` writes a complete folder: weights in their types, the tokenizer with the new tokens, and all other files of
//! the base.

use std::fs;
use std::path::Path;
use std::process::Command;

use peft_runtime::adapter::{self, Data, Float, Stored, TensorFile};
use peft_runtime::safefile::SafeFile;
use peftc::hub::model_folder::add_tokens;
use serde_json::{Value, json};

use super::random::{CLASSIFIER, Case, classifier, generator, generator_of};
use crate::cli::{Bench, Ran, text};

/// A case with an adapter that was trained for one step.
fn trained(case: Case) -> Case {
    let ran = case.with("train", &["--set", "train.steps=1", "--out", text(&case.path("run"))]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    case
}

fn merge(case: &Case, out: &Path, more: &[&str]) -> Ran {
    let run = case.path("run");
    let given = ["merge", text(&case.spec), "--weights", text(&case.weights), "--adapter", text(&run), "-o", text(out)];
    case.bench.peftc(given.iter().chain(more))
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).expect("readable")).expect("JSON")
}

/// Rewrites the weights with the type that `of` gives for each tensor.
fn retyped(case: &Case, of: impl Fn(&str) -> Float) {
    let path = case.weights.join("model.safetensors");
    let mut file = adapter::load(&path).expect("sound");
    for (name, stored) in &mut file.tensors {
        let Data::F32(numbers) = stored.data.clone() else { panic!("f32") };
        *stored = Stored::rounded(stored.shape.clone(), numbers, of(name)).expect("in range");
    }
    adapter::save(&path, &file).expect("written");
}

const VALUE: &str = "bert.encoder.layer.0.attention.self.value.weight";
const QUERY: &str = "bert.encoder.layer.0.attention.self.query.weight";

#[test]
fn merged_types_are_kept_or_chosen() {
    let case = trained(classifier(CLASSIFIER, |_| {}));
    let out = case.path("merged");
    let types = |name: &str| SafeFile::open(&out.join("model.safetensors")).expect("sound").float(name);
    let configured = |key: &str| json(&out.join("config.json"))[key].clone();
    let ran = merge(&case, &out, &[]);
    assert!(ran.code == 0 && ran.out.contains("written in f32, as in the files"), "{}{}", ran.out, ran.err);
    assert_eq!(configured("torch_dtype"), "float32");

    for dtype in [Float::BF16, Float::F16] {
        retyped(&case, |_| dtype);
        let ran = merge(&case, &out, &["--overwrite"]);
        let said = format!("written in {}, as in the files", dtype.name());
        assert!(ran.code == 0 && ran.out.contains(&said), "{}{}", ran.out, ran.err);
        // Unchanged tensors keep the bits of the file. The new head has the type of the other tensors.
        assert_eq!([VALUE, QUERY, "classifier.weight"].map(types), [Some(dtype); 3]);
        let read = |folder: &Path| adapter::load(&folder.join("model.safetensors")).expect("sound").tensors;
        assert_eq!(read(&out)[VALUE], read(&case.weights)[VALUE]);
        assert_eq!(configured("torch_dtype"), dtype.torch());
    }
    // Norms in f32 and matrices in bf16.
    let norm = |name: &str| name.contains("LayerNorm");
    retyped(&case, |name| if norm(name) { Float::F32 } else { Float::BF16 });
    let mut config = json(&case.weights.join("config.json"));
    config["dtype"] = json!("bfloat16");
    fs::write(case.weights.join("config.json"), config.to_string()).expect("written");
    let ran = merge(&case, &out, &["--overwrite"]);
    assert!(ran.out.contains("written in f32 and bf16, as in the files"), "{}{}", ran.out, ran.err);
    let file = SafeFile::open(&out.join("model.safetensors")).expect("sound");
    for name in file.names() {
        assert_eq!(file.float(name), Some(if norm(name) { Float::F32 } else { Float::BF16 }), "{name}");
    }
    assert_eq!((configured("dtype"), configured("torch_dtype")), (json!("bfloat16"), Value::Null));

    let ran = merge(&case, &out, &["--overwrite", "--dtype", "f16"]);
    assert!(ran.out.contains("written in f16, as asked for"), "{}{}", ran.out, ran.err);
    let file = SafeFile::open(&out.join("model.safetensors")).expect("sound");
    assert!(file.names().all(|name| file.float(name) == Some(Float::F16)));
    assert_eq!(configured("dtype"), "float16");
    let ran = merge(&case, &out, &["--dtype", "int8"]);
    assert!(ran.code == 2 && ran.err.contains("f32, f16, bf16"), "{}", ran.err);

    // A value that overflows the type is refused, and the existing output is kept.
    retyped(&case, |_| Float::F32);
    let path = case.weights.join("model.safetensors");
    let mut file = adapter::load(&path).expect("sound");
    let Data::F32(numbers) = &mut file.tensors.get_mut(VALUE).expect("there").data else { panic!("f32") };
    numbers[5] = 1e5;
    adapter::save(&path, &file).expect("written");
    let before = fs::read(out.join("model.safetensors")).expect("there");
    let ran = merge(&case, &out, &["--overwrite", "--dtype", "f16"]);
    assert!(
        ran.code == 2 && ran.err.contains(VALUE) && ran.err.contains("1e5, which is out of range for f16"),
        "{}",
        ran.err
    );
    assert_eq!(fs::read(out.join("model.safetensors")).expect("there"), before);
    assert_eq!(merge(&case, &out, &["--overwrite", "--dtype", "bf16"]).code, 0);
}

#[test]
fn other_files_of_the_base_are_copied() {
    let case = trained(classifier(CLASSIFIER, |_| {}));
    let write = |name: &str| drop(case.bench.write(&format!("weights/{name}"), name));
    let copied = [
        "tokenizer.model",
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
        "README.md",
        "LICENSE",
        "1_Pooling/config.json",
        "spiece.vocab",
    ];
    let left = [
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.gguf",
        ".cache/huggingface/x",
        ".gitattributes",
        "adapter_config.json",
        "onnx/model.onnx",
        "onnx/config.json",
        // Files that a run wrote into the folder of its weights.
        "metrics.jsonl",
        "events.out.tfevents.1764489600.host.peftc.0",
    ];
    copied.iter().chain(&left).for_each(|name| write(name));
    let out = case.path("merged");
    let ran = merge(&case, &out, &[]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.err.contains("these folders hold weights and were not copied: onnx"), "{}", ran.err);
    for name in copied {
        assert_eq!(fs::read_to_string(out.join(name)).unwrap_or_else(|e| panic!("{name}: {e}")), name);
    }
    for name in left {
        assert!(!out.join(name).exists(), "{name}");
    }
    assert_eq!(
        fs::read(out.join("tokenizer.json")).expect("there"),
        fs::read(case.weights.join("tokenizer.json")).expect("there")
    );
    assert_eq!(
        fs::metadata(&out).expect("there").permissions(),
        fs::metadata(&case.weights).expect("there").permissions()
    );
}

#[test]
fn a_base_is_never_written_over_and_a_model_only_when_asked() {
    let case = trained(classifier(CLASSIFIER, |_| {}));
    let out = case.path("merged");
    let before = fs::read(case.weights.join("model.safetensors")).expect("there");
    for more in [&[][..], &["--overwrite"]] {
        let ran = merge(&case, &case.weights, more);
        assert!(ran.code == 2 && ran.err.contains("which this command reads"), "{}", ran.err);
        // By another path, and by a folder that contains it.
        let ran = merge(&case, &case.weights.join("../weights"), more);
        assert!(ran.code == 2 && ran.err.contains("which this command reads"), "{}", ran.err);
        let ran = merge(&case, case.weights.parent().expect("a parent"), more);
        assert!(ran.code == 2 && ran.err.contains("which this command reads"), "{}", ran.err);
    }
    assert_eq!(fs::read(case.weights.join("model.safetensors")).expect("there"), before);
    assert_eq!(merge(&case, &out, &[]).code, 0);
    let ran = merge(&case, &out, &[]);
    assert!(ran.code == 2 && ran.err.contains("it exists; replace it with `--overwrite`"), "{}", ran.err);
    // Replacing a merged model removes all files next to it.
    fs::write(out.join("model-00001-of-00002.safetensors"), "old").expect("written");
    fs::write(out.join("chat_template.jinja"), "old").expect("written");
    assert_eq!(merge(&case, &out, &["--overwrite"]).code, 0);
    assert!(!out.join("model-00001-of-00002.safetensors").exists() && !out.join("chat_template.jinja").exists());
    // A folder that holds no model, or a repository, is not replaced.
    let notes = case.bench.write("notes/todo.txt", "mine");
    let ran = merge(&case, notes.parent().expect("a folder"), &["--overwrite"]);
    assert!(ran.code == 2 && ran.err.contains("other things than this command writes"), "{}", ran.err);
    let project = case.bench.write("project/config.json", "{}");
    let ran = merge(&case, project.parent().expect("a folder"), &["--overwrite"]);
    assert!(ran.code == 2 && ran.err.contains("other things than this command writes"), "{}", ran.err);
    let mine = case.bench.write("merged/src/main.js", "mine");
    let ran = merge(&case, &out, &["--overwrite"]);
    assert!(
        ran.code == 2 && ran.err.contains("other things than this command writes") && mine.is_file(),
        "{}",
        ran.err
    );
    fs::remove_dir_all(out.join("src")).expect("there");
    case.bench.write("merged/.git/HEAD", "ref");
    let ran = merge(&case, &out, &["--overwrite"]);
    assert!(ran.code == 2 && out.join(".git/HEAD").is_file(), "{}", ran.err);
    // An empty folder is treated as a missing one. No temporary files are left.
    let empty = case.path("empty");
    fs::create_dir(&empty).expect("a folder");
    assert_eq!(merge(&case, &empty, &[]).code, 0);
    let beside = fs::read_dir(case.path("")).expect("a folder").map(|e| e.expect("an entry").file_name());
    assert!(!beside.into_iter().any(|name| name.to_string_lossy().starts_with(".peftc-")));
}

/// What transformers reads from a folder, or `None` if it is not installed.
fn asked(folder: &Path, tokens: &[&str]) -> Option<Value> {
    ask(&[&[text(folder)], tokens].concat())
}

fn ask(arguments: &[&str]) -> Option<Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let venv = root.join("target/interop-venv");
    if !venv.join("ready").is_file() {
        println!("skipped: no virtual environment with transformers; `make interop` makes one");
        return None;
    }
    let mut ask = Command::new(venv.join("bin/python"));
    let said = ask.arg(root.join("tests/interop/merged.py")).args(arguments).output().expect("it starts");
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    Some(serde_json::from_slice(&said.stdout).expect("JSON"))
}

const TOKENS: [&str; 6] = ["<bos>", "<eos>", "<subject>", "<property>", "<object>", "<target>"];

#[test]
fn new_tokens_are_added_to_the_tokenizer() {
    let case = trained(generator(""));
    let first = json(&case.weights.join("tokenizer.json"));
    let whole = |folder: &Path| {
        let found = json(&folder.join("tokenizer.json"));
        let added: Vec<(&str, i64)> = found["added_tokens"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|token| (token["content"].as_str().expect("a text"), token["id"].as_i64().expect("an id")))
            .collect();
        assert_eq!(added, TOKENS.into_iter().zip(1536..).collect::<Vec<_>>());
        assert_eq!((&found["model"], &found["pre_tokenizer"]), (&first["model"], &first["pre_tokenizer"]));
        assert_eq!(json(&folder.join("config.json"))["vocab_size"], 1542);
    };
    let transformers = |folder: &Path| {
        if let Some(found) = asked(folder, &TOKENS) {
            let ids: Vec<i64> = (1536..1542).collect();
            assert_eq!(found["ids"], json!(ids), "{found}");
            for (id, split) in ids.iter().zip(found["in_text"].as_array().expect("a list")) {
                assert_eq!(split.as_array().map(|ids| (ids.len(), &ids[1])), Some((3, &json!(id))), "{found}");
            }
            let rest = ["rows", "vocab_size", "finite", "complaints"].map(|key| found[key].clone());
            assert_eq!(rest, [json!(1542), json!(1542), json!(true), json!([])], "{found}");
        }
    };
    let out = case.path("merged");
    assert_eq!(merge(&case, &out, &[]).code, 0);
    whole(&out);
    transformers(&out);
    // The new tokens are also added to a tokenizer configuration that lists added tokens.
    let types = json!({"added_tokens_decoder": {}, "tokenizer_class": "PreTrainedTokenizerFast"});
    fs::write(case.weights.join("tokenizer_config.json"), types.to_string()).expect("written");
    assert_eq!(merge(&case, &out, &["--overwrite"]).code, 0);
    whole(&out);
    let decoder = json(&out.join("tokenizer_config.json"))["added_tokens_decoder"].clone();
    assert_eq!(decoder["1541"]["content"], "<target>");
    assert_eq!(decoder["1536"]["special"], true);

    // Without a tokenizer the new tokens cannot be written, and a note says so. `--tokenizer` may name one elsewhere.
    let elsewhere = case.path("elsewhere");
    fs::create_dir(&elsewhere).expect("a folder");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::rename(case.weights.join(name), elsewhere.join(name)).expect("moved");
    }
    let ran = merge(&case, &out, &["--overwrite"]);
    assert!(
        ran.code == 0 && ran.err.contains("holds no tokenizer to write the task's tokens into"),
        "{}{}",
        ran.out,
        ran.err
    );
    assert_eq!(merge(&case, &out, &["--overwrite", "--tokenizer", text(&elsewhere)]).code, 0);
    whole(&out);
}

/// If the base's added tokens appear only in its tokenizer settings, the task's tokens follow them in the merged folder
/// as in training.
#[test]
fn new_tokens_follow_added_tokens_of_the_settings() {
    let case = trained_with_padding();
    let sound = json(&case.weights.join("tokenizer.json"));
    let model = &sound["model"];
    let merges = model["merges"].as_array().expect("a list").iter().map(|pair| match pair.as_array() {
        Some(pair) => format!("{} {}\n", pair[0].as_str().expect("a text"), pair[1].as_str().expect("a text")),
        None => format!("{}\n", pair.as_str().expect("a text")),
    });
    let merges: String = merges.collect();
    let [gpt2, fast] = ["GPT2Tokenizer", "PreTrainedTokenizerFast"];
    let pad = json!({"1536": {"content": "<pad>", "special": true}});
    let file = |name: &str, value: Value| (name.to_owned(), value.to_string());
    let settings = |value: Value| file("tokenizer_config.json", value);
    let whole = || file("tokenizer.json", sound.clone());
    let parts = || [file("vocab.json", model["vocab"].clone()), ("merges.txt".to_owned(), merges.clone())];
    let listed = || file("added_tokens.json", json!({"<pad>": 1536}));
    let cases: Vec<(&str, Vec<(String, String)>)> = vec![
        ("key, GPT-2's class", vec![whole(), settings(json!({"tokenizer_class": gpt2, "pad_token": "<pad>"}))]),
        ("key, no class", vec![whole(), settings(json!({"tokenizer_class": fast, "pad_token": "<pad>"}))]),
        (
            "key of the older file",
            vec![
                whole(),
                settings(json!({"tokenizer_class": fast})),
                file("special_tokens_map.json", json!({"pad_token": "<pad>"})),
            ],
        ),
        ("a model's own key", vec![whole(), settings(json!({"tokenizer_class": fast, "image_token": "<pad>"}))]),
        ("list", vec![whole(), settings(json!({"tokenizer_class": fast, "extra_special_tokens": ["<pad>"]}))]),
        (
            "decoder, GPT-2's class",
            vec![whole(), settings(json!({"tokenizer_class": gpt2, "added_tokens_decoder": pad}))],
        ),
        (
            "decoder, no class",
            vec![
                whole(),
                settings(json!({"tokenizer_class": fast, "pad_token": "<pad>", "added_tokens_decoder": pad})),
            ],
        ),
        (
            "key beside a decoder without it",
            vec![whole(), settings(json!({"tokenizer_class": gpt2, "pad_token": "<pad>", "added_tokens_decoder": {}}))],
        ),
        ("list of ids", vec![whole(), settings(json!({"tokenizer_class": gpt2})), listed()]),
        ("key, parts", [&parts()[..], &[settings(json!({"tokenizer_class": gpt2, "pad_token": "<pad>"}))]].concat()),
        ("list of ids, parts", [&parts()[..], &[settings(json!({"tokenizer_class": gpt2})), listed()]].concat()),
        (
            "decoder, parts",
            [&parts()[..], &[settings(json!({"tokenizer_class": gpt2, "added_tokens_decoder": pad}))]].concat(),
        ),
    ];
    let wanted: Vec<(&str, u64)> = [("<pad>", 1536)].into_iter().chain(TOKENS.into_iter().zip(1537..)).collect();
    let mut folders = vec![];
    for (at, (name, files)) in cases.iter().enumerate() {
        for old in fs::read_dir(&case.weights).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            if !["config.json", "model.safetensors"].iter().any(|kept| old.ends_with(kept)) {
                fs::remove_file(old).expect("removed");
            }
        }
        for (file, content) in files {
            fs::write(case.weights.join(file), content).expect("written");
        }
        let out = case.path(&format!("merged{at}"));
        let ran = merge(&case, &out, &[]);
        assert_eq!(ran.code, 0, "{name}: {}", ran.err);
        let tokenizer = peftc::data::Tokenizer::load(&out, &case.model.task, 1543);
        let tokenizer = tokenizer.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(tokenizer.vocabulary(), 1543, "{name}");
        for (token, id) in &wanted {
            assert_eq!(tokenizer.ids()[*token], *id, "{name}: {token}");
        }
        folders.push(out);
    }
    let tokens = json!(wanted.iter().map(|(token, _)| token).collect::<Vec<_>>()).to_string();
    let folders: Vec<&str> = folders.iter().map(|folder| text(folder)).collect();
    if let Some(found) = ask(&[&["--ids", &tokens], &folders[..]].concat()) {
        for ((name, _), ids) in cases.iter().zip(found.as_array().expect("a list")) {
            assert_eq!(*ids, json!((1536..1543).collect::<Vec<_>>()), "{name}");
        }
    }
}

/// A generator whose base has a padding token with a row of its own, trained for one step.
fn trained_with_padding() -> Case {
    let case = generator_of("", 1537);
    let settings = json!({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"});
    fs::write(case.weights.join("tokenizer_config.json"), settings.to_string()).expect("written");
    trained(case)
}

/// The merged configuration describes the merged model: its head, its classes, and its kind of task.
#[test]
fn the_merged_configuration_describes_the_task() {
    let case = trained(classifier(CLASSIFIER, |_| {}));
    let path = case.weights.join("config.json");
    let sound = json(&path);
    let out = case.path("merged");
    let merged = |keys: Value| {
        let mut config = sound.clone();
        keys.as_object().expect("an object").iter().for_each(|(key, value)| config[key] = value.clone());
        fs::write(&path, config.to_string()).expect("written");
        let ran = merge(&case, &out, &["--overwrite"]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let config = json(&out.join("config.json"));
        let eval = case.bench.peftc(["eval", text(&case.spec), "--weights", text(&out), "--data", text(&case.data)]);
        assert_eq!(eval.code, 0, "peftc reads what it wrote: {}", eval.err);
        config
    };
    for (base, wanted) in [
        ("BertModel", json!(["BertForSequenceClassification"])),
        ("BertForMaskedLM", json!(["BertForSequenceClassification"])),
        ("BertLMHeadModel", json!(["BertForSequenceClassification"])),
        ("XLMWithLMHeadModel", json!(["XLMForSequenceClassification"])),
        ("Unheard", Value::Null),
        ("Model", Value::Null),
    ] {
        assert_eq!(merged(json!({"architectures": [base]}))["architectures"], wanted, "{base}");
    }
    // Keys of the base's own task are removed.
    for keys in [
        json!({"problem_type": "regression", "num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}),
        json!({"problem_type": "multi_label_classification", "_num_labels": 3}),
        json!({}),
    ] {
        let config = merged(keys);
        assert_eq!(config["problem_type"], "single_label_classification");
        assert_eq!((&config["num_labels"], &config["_num_labels"]), (&Value::Null, &Value::Null));
        assert_eq!(
            (&config["id2label"], &config["label2id"]),
            (&json!({"0": "0", "1": "1"}), &json!({"0": 0, "1": 1}))
        );
    }

    let case = trained(generator(""));
    let path = case.weights.join("config.json");
    let sound = json(&path);
    let out = case.path("merged");
    for (base, wanted) in [
        (json!(["GPT2LMHeadModel"]), json!(["GPT2LMHeadModel"])),
        (json!(["LlamaForCausalLM"]), json!(["LlamaForCausalLM"])),
        (json!(["GPT2Model"]), Value::Null),
        (json!(["GPT2DoubleHeadsModel"]), Value::Null),
        (json!(["GPT2ForSequenceClassification"]), Value::Null),
        (json!([]), json!([])),
    ] {
        let mut config = sound.clone();
        config["architectures"] = base;
        fs::write(&path, config.to_string()).expect("written");
        let ran = merge(&case, &out, &["--overwrite"]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let config = json(&out.join("config.json"));
        assert_eq!(config["architectures"], wanted);
        let eval = case.bench.peftc(["eval", text(&case.spec), "--weights", text(&out), "--data", text(&case.data)]);
        assert_eq!(eval.code, 0, "peftc reads what it wrote: {}", eval.err);
    }
    if let Some(found) = asked(&out, &["<bos>"]) {
        assert_eq!((&found["finite"], &found["complaints"]), (&json!(true), &json!([])), "{found}");
    }
}

/// A sharded base becomes one file without an index.
#[test]
fn a_base_in_shards_is_merged_into_one_file() {
    let case = trained(generator(""));
    let path = case.weights.join("model.safetensors");
    let whole = adapter::load(&path).expect("sound");
    fs::remove_file(&path).expect("removed");
    let mut map = serde_json::Map::new();
    let mut shards = [TensorFile::default(), TensorFile::default()];
    for (at, (name, stored)) in whole.tensors.into_iter().enumerate() {
        let shard = at % 2;
        map.insert(name.clone(), json!(format!("model-0000{}-of-00002.safetensors", shard + 1)));
        shards[shard].tensors.insert(name, stored);
    }
    for (at, shard) in shards.iter().enumerate() {
        adapter::save(&case.weights.join(format!("model-0000{}-of-00002.safetensors", at + 1)), shard)
            .expect("written");
    }
    fs::write(case.weights.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string())
        .expect("written");
    let out = case.path("merged");
    let ran = merge(&case, &out, &["--dtype", "bf16"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let weights: Vec<String> = fs::read_dir(&out)
        .expect("a folder")
        .map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("model"))
        .collect();
    assert_eq!(weights, ["model.safetensors"]);
    if let Some(found) = asked(&out, &["<bos>"]) {
        assert_eq!((&found["dtype"], &found["complaints"]), (&json!("bfloat16"), &json!([])), "{found}");
    }
}

/// For a tokenizer of `vocab.json` and `merges.txt`, new tokens are written to `added_tokens.json`. Existing tokens are
/// not repeated.
#[test]
fn new_tokens_of_vocab_json_go_to_added_tokens_json() {
    let bench = Bench::new();
    bench.write("vocab.json", r#"{"a":0,"<eos>":1}"#);
    let folder = bench.path("");
    let tokens = |all: &[(&str, u32)]| {
        let token = |(content, id): &(&str, u32)| json!({"id": id, "content": content, "special": true});
        all.iter().map(token).collect::<Vec<_>>()
    };
    add_tokens(&folder, &tokens(&[("<eos>", 1), ("<bos>", 2)])).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(json(&folder.join("added_tokens.json")), json!({"<bos>": 2}));
    assert_eq!(fs::read_dir(&folder).expect("a folder").count(), 2);
    add_tokens(&folder, &tokens(&[("<eos>", 1), ("<sep>", 3)])).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(json(&folder.join("added_tokens.json")), json!({"<bos>": 2, "<sep>": 3}));
    // In `tokenizer.json` a token of the vocabulary is not listed again.
    bench.write("tokenizer.json", r#"{"added_tokens":[{"id":1,"content":"<eos>"}],"model":{"vocab":{"a":0}}}"#);
    add_tokens(&folder, &tokens(&[("<eos>", 1), ("a", 0), ("<new>", 4)])).unwrap_or_else(|e| panic!("{e}"));
    let added = json(&folder.join("tokenizer.json"))["added_tokens"].clone();
    assert_eq!(
        (added[0].clone(), &added[1]["content"], added.as_array().map(Vec::len)),
        (json!({"id":1,"content":"<eos>"}), &json!("<new>"), Some(2))
    );
    bench.write("tokenizer.json", "[]");
    let error = add_tokens(&folder, &tokens(&[("<x>", 5)])).expect_err("refused").to_string();
    assert!(error.contains("tokenizer.json") && error.contains("no JSON object"), "{error}");
}
