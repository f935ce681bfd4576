//! Adapters in PEFT's format: configurations that change the function, files of other libraries, and the notes of an
//! export.

use std::fs;
use std::path::{Path, PathBuf};

use peft_grammar::model::{Model, Trainable};
use peft_runtime::adapter::{self, Data, Stored, TensorFile};
use peftc::adapters;
use serde_json::{Map, Value, json};

use super::{BERT, GPT2, LLAMA, checkpoint, folder, inputs, spec, tensors};
use crate::cli::{Bench, Ran, text};

const CONFIG: &str = "adapter_config.json";
const MODEL: &str = "adapter_model.safetensors";
const TASK: &str = "task t { kind: classification labels: [\"0\", \"1\"] }\n";

/// A tiny model with LoRA on q and v, its checkpoint, and an exported adapter in PEFT's format.
struct Case {
    bench: Bench,
    spec: PathBuf,
    model: Model,
    weights: PathBuf,
    inputs: PathBuf,
    peft: PathBuf,
}

/// A case whose tune block also contains `more`.
fn case(backbone: &str, more: &str) -> Case {
    let bench = Bench::new();
    let (path, model) = spec(&bench, "spec.peft", &tuned(backbone, more));
    let weights = checkpoint(&bench, "weights", &model);
    let inputs = match backbone {
        BERT => inputs(&bench, "in.safetensors", &[&[1, 2, 3, 40], &[4, 5]], &[0, 1]),
        _ => tokens(&bench, &[1, 40, 31, 3]),
    };
    let own = drawn(&model);
    let file = bench.path("own.safetensors");
    adapter::save(&file, &own).expect("written");
    let peft = bench.path("peft");
    let ran = bench.peftc(["export", text(&path), "--format", "peft", "--adapter", text(&file), "-o", text(&peft)]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    Case { bench, spec: path, model, weights, inputs, peft }
}

fn tuned(backbone: &str, more: &str) -> String {
    let task = if backbone == BERT { TASK } else { "" };
    format!("{backbone}tune {{\n  every attention {{ lora(rank: 3, alpha: 6) on q, v }}\n  {more}\n}}\n{task}")
}

/// Trained values that differ from the initial ones.
fn drawn(model: &Model) -> TensorFile {
    let mut file = TensorFile::default();
    for (at, param) in model.params.iter().enumerate() {
        let Some(shape) = param.trained_shape() else { continue };
        let count: u64 = shape.iter().product();
        let number = |i: u64| ((i * 37 + at as u64 * 11) % 23) as f32 * 0.04 - 0.4;
        file.tensors.insert(param.name.clone(), Stored::f32(shape, (0..count).map(number).collect()));
        if let Trainable::Rows(start, end) = param.trainable {
            file.notes.insert(format!("rows of {}", param.name), format!("{start}:{end}"));
        }
    }
    adapters::annotated(file, model, &adapters::Base::default())
}

impl Case {
    fn run(&self, spec: &Path, adapter: &Path) -> Ran {
        let out = self.bench.path("out.safetensors");
        let _ = fs::remove_file(&out);
        let args = ["run", text(spec), "--entry", "forward", "--inputs", text(&self.inputs), "--weights"];
        let more = [text(&self.weights), "--adapter", text(adapter), "-o", text(&out), "--overwrite"];
        self.bench.peftc(args.iter().chain(&more))
    }

    fn logits(&self, spec: &Path, adapter: &Path) -> Vec<f32> {
        let ran = self.run(spec, adapter);
        assert_eq!(ran.code, 0, "{}: {}", adapter.display(), ran.err);
        numbers(&adapter::load(&self.bench.path("out.safetensors")).expect("sound"), "logits")
    }

    /// A copy of PEFT's folder with changed files.
    fn changed(&self, name: &str, change: impl FnOnce(&mut Map<String, Value>, &mut TensorFile)) -> PathBuf {
        let to = self.bench.path(name);
        let config = fs::read_to_string(self.peft.join(CONFIG)).expect("readable");
        let mut config: Map<String, Value> = serde_json::from_str(&config).expect("JSON");
        let mut file = adapter::load(&self.peft.join(MODEL)).expect("sound");
        change(&mut config, &mut file);
        self.bench.write(&format!("{name}/{CONFIG}"), serde_json::to_string(&config).expect("plain data"));
        adapter::save(&to.join(MODEL), &file).expect("written");
        to
    }

    /// Requires `import` to refuse the adapter with these words. All commands that read an adapter refuse it alike, and
    /// `import` compiles nothing.
    fn refuses(&self, adapter: &Path, words: &[&str]) {
        self.refuses_for(&self.spec, adapter, words);
    }

    fn refuses_for(&self, spec: &Path, adapter: &Path, words: &[&str]) {
        let out = self.bench.path("imported.safetensors");
        let ran = self.bench.peftc(["import", text(spec), text(adapter), "-o", text(&out), "--overwrite"]);
        assert_eq!(ran.code, 3, "{}: {}", adapter.display(), ran.err);
        for word in words {
            assert!(ran.err.contains(word), "{} should say `{word}`:\n{}", adapter.display(), ran.err);
        }
    }
}

fn numbers(file: &TensorFile, name: &str) -> Vec<f32> {
    match &file.tensors[name].data {
        Data::F32(x) => x.clone(),
        _ => panic!("`{name}` holds integers"),
    }
}

fn gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn renamed(file: &mut TensorFile, rename: impl Fn(&str) -> String) {
    file.tensors = std::mem::take(&mut file.tensors).into_iter().map(|(n, t)| (rename(&n), t)).collect();
}

#[test]
fn tensor_name_variants_of_other_writers_are_read() {
    let case = case(LLAMA, "");
    let want = case.logits(&case.spec, &case.peft);
    let none = "base_model.model.";
    let own = "model.layers.0.self_attn.q_proj.lora_A.weight";
    type Rename = fn(&str) -> String;
    let ways: &[(&str, Rename)] = &[
        ("plain", |n| n.replacen("base_model.model.", "", 1)),
        ("headless", |n| n.replacen("base_model.model.model.", "", 1)),
        ("doubled", |n| n.replacen("base_model.model.", "base_model.model.model.", 1)),
        ("compiled", |n| n.replacen("base_model.model.", "_orig_mod.base_model.model.", 1)),
        ("inside", |n| n.replacen("self_attn.", "self_attn._orig_mod.", 1)),
        ("parallel", |n| format!("module.{n}")),
        ("named", |n| n.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")),
        ("sentences", |n| n.replacen("base_model.model.model.", "0.auto_model.", 1)),
    ];
    for (name, rename) in ways {
        assert_ne!(rename(&format!("{none}{own}")), format!("{none}{own}"), "{name} changes nothing");
        let changed = case.changed(name, |_, file| renamed(file, rename));
        assert_eq!(case.logits(&case.spec, &changed), want, "{name}");
    }
    let odd = case.changed("odd", |_, file| renamed(file, |n| n.replace("layers.1.self_attn", "layers.1.attn")));
    case.refuses(
        &odd,
        &["lacks `model.layers.1.self_attn.q_proj.lora_A.weight`", "layers.1.attn.q_proj.lora_A.weight"],
    );
    let two = case.changed("two", |_, file| {
        let copies: Vec<_> =
            file.tensors.iter().map(|(n, t)| (n.replace("lora_A.", "lora_A.other."), t.clone())).collect();
        file.tensors.extend(copies);
    });
    case.refuses(&two, &["two adapters", "selected_adapters"]);
}

/// Expressions in the configuration match names in the model that PEFT trained. Without a head, these have no prefix.
#[test]
fn expressions_match_names_of_the_trained_model() {
    let cases = [
        (LLAMA, "model.", "layers.0.self_attn.q_proj", r"layers\.\d\.self_attn\.[qv]_proj"),
        (BERT, "bert.", "encoder.layer.0.*query", r"encoder\.layer\.\d\.attention\.self\.(query|value)"),
    ];
    for (backbone, prefix, module, targets) in cases {
        let case = case(backbone, "");
        let plain = case.logits(&case.spec, &case.peft);
        let expressions = |config: &mut Map<String, Value>, prefix: &str| {
            config.insert("alpha_pattern".into(), json!({ format!("^{prefix}{module}"): 60 }));
            config.insert("target_modules".into(), json!(format!("{prefix}{targets}")));
        };
        let whole = case.changed("whole", |config, _| expressions(config, prefix));
        let headless = case.changed("headless", |config, file| {
            expressions(config, "");
            renamed(file, |n| n.replacen(&format!("base_model.model.{prefix}"), "base_model.model.", 1));
        });
        let want = case.logits(&case.spec, &whole);
        assert_ne!(want, plain, "{module}");
        assert_eq!(case.logits(&case.spec, &headless), want, "{module}");
    }
}

#[test]
fn empty_tensors_of_unsaved_ranks_are_refused() {
    let case = case(BERT, "");
    let empty = case.changed("empty", |_, file| {
        for stored in file.tensors.values_mut() {
            *stored = Stored::f32(vec![0], vec![]);
        }
    });
    case.refuses(
        &empty,
        &["is empty ([0]): it was saved from a sharded model without gathering it", "GatheredParameters"],
    );
}

#[test]
fn unknown_keys_with_values_are_refused() {
    let case = case(BERT, "");
    let with =
        |name: &str, key: &str, value: Value| case.changed(name, |config, _| drop(config.insert(key.into(), value)));
    case.refuses(
        &with("new", "lora_nudge", json!(0.5)),
        &["`lora_nudge` of adapter_config.json is 0.5", "remove the key"],
    );
    case.refuses(&with("typo", "lora_alhpa", json!(4)), &["`lora_alhpa`", "is `lora_alpha` meant?"]);
    case.refuses(
        &with("kind", "peft_type", json!("LOHA")),
        &["type LOHA are not read here", "IA3, LORA, PREFIX_TUNING"],
    );
    case.refuses(
        &with("other", "peft_type", json!("IA3")),
        &["type IA3 (`peft_type`), which is `ia3`", "applies `lora`"],
    );
    case.refuses(&with("dora", "use_dora", json!(true)), &["`use_dora` is true", "apply `dora`"]);
    // A key without a value has no effect.
    let (unset, out) = (with("unset", "lora_nudge", Value::Null), case.bench.path("imported.safetensors"));
    assert_eq!(case.bench.peftc(["import", text(&case.spec), text(&unset), "-o", text(&out)]).code, 0);
    let start = with("start", "init_lora_weights", json!("pissa_niter_16"));
    case.refuses(&start, &["`init_lora_weights` is \"pissa_niter_16\"", "path_initial_model_for_weight_conversion"]);
    case.refuses(&with("text", "lora_alpha", json!("16")), &["`lora_alpha`", "is \"16\", but should be a number"]);
    case.refuses(&with("flag", "use_rslora", json!("true")), &["`use_rslora` is \"true\"", "it is false or true"]);
    let regex = case.changed("regex", |config, _| drop(config.insert("alpha_pattern".into(), json!({ "que(": 3 }))));
    case.refuses(&regex, &["`alpha_pattern`", "cannot be matched"]);
    let rank = case.changed("rank", |config, _| drop(config.insert("r".into(), json!(4))));
    case.refuses(&rank, &["has rank 3, and `r` of adapter_config.json is 4"]);
}

/// If a trained tensor is missing from the spec, the refusal names a line that makes the spec fit.
#[test]
fn trained_base_tensors_must_train_in_the_spec() {
    let table = "\"bert.embeddings.word_embeddings.weight\"";
    let (rows, whole) = (format!("rows 3..6 of {table}"), format!("train {table}"));
    let query = "train \"bert.encoder.layer.*.attention.self.query.bias\"";
    for line in ["bitfit()", query, &rows, &whole] {
        let word = format!("write `{line}`");
        let word = &*word;
        let case = case(BERT, line);
        let want = case.logits(&case.spec, &case.bench.path("own.safetensors"));
        assert_eq!(case.logits(&case.spec, &case.peft), want, "{line}");
        let (without, _) = spec(&case.bench, "without.peft", &tuned(BERT, ""));
        case.refuses_for(&without, &case.peft, &[word]);
    }
}

/// PEFT's file also contains a frozen head, and the spec that wrote the file can read it.
#[test]
fn a_frozen_head_round_trips() {
    let case = case(BERT, "");
    let (frozen, model) = spec(&case.bench, "frozen.peft", &tuned(BERT, "head frozen"));
    let (file, peft) = (case.bench.path("frozen.safetensors"), case.bench.path("frozen"));
    adapter::save(&file, &drawn(&model)).expect("written");
    let args = ["export", text(&frozen), "--format", "peft", "--adapter", text(&file), "-o", text(&peft)];
    let ran = case.bench.peftc(args.iter().chain(&["--weights", text(&case.weights)]));
    assert_eq!(ran.code, 0, "{}", ran.err);
    let want = case.logits(&frozen, &file);
    assert_eq!(case.logits(&frozen, &peft), want);
    // A head in the adapter takes precedence.
    let mut other = adapter::load(&peft.join(MODEL)).expect("sound");
    for (_, stored) in other.tensors.iter_mut().filter(|(name, _)| name.contains("classifier")) {
        let count = stored.shape.iter().product::<u64>();
        *stored = Stored::f32(stored.shape.clone(), (0..count).map(|i| (i % 7) as f32 * 0.1).collect());
    }
    adapter::save(&peft.join(MODEL), &other).expect("written");
    assert_ne!(case.logits(&frozen, &peft), want);
    let said = case.run(&frozen, &peft).err;
    assert!(
        said.contains("the adapter holds `classifier.weight`, which replaces that of these weights")
            && !said.contains("random"),
        "{said}"
    );
}

/// A configuration that names tensors missing from the file is refused. PEFT cannot load it either.
#[test]
fn tensors_named_by_the_configuration_must_exist() {
    let case = case(BERT, "");
    let (frozen, _) = spec(&case.bench, "frozen.peft", &tuned(BERT, "head frozen"));
    let lost = |name: &str, key: &str, value: Value| {
        case.changed(name, |config, file| {
            config.insert(key.into(), value);
            file.tensors.retain(|name, _| name.contains("lora"));
        })
    };
    let refuses = |adapter: &Path, words: &[&str]| case.refuses_for(&frozen, adapter, words);
    refuses(&lost("head", "modules_to_save", json!(["classifier"])), &["`modules_to_save`", "names `classifier`"]);
    refuses(&lost("other", "modules_to_save", json!(["lm_head"])), &["`modules_to_save`", "names `lm_head`"]);
    let rows = case.changed("rows", |config, file| {
        config.insert("modules_to_save".into(), Value::Null);
        config.insert("trainable_token_indices".into(), json!([7, 8]));
        file.tensors.retain(|name, _| name.contains("lora"));
    });
    refuses(&rows, &["`trainable_token_indices`", "is set", "holds no tensor of that kind"]);
    // PEFT lists all usual head names, whether the model has them or not.
    let usual = lost("usual", "modules_to_save", json!(["score"]));
    assert_eq!(case.run(&frozen, &usual).code, 0);
    // Values of an integer type.
    let whole = case.changed("whole", |_, file| {
        for stored in file.tensors.values_mut() {
            let count = stored.shape.iter().product::<u64>() as usize;
            stored.data = Data::I64(vec![1; count]);
        }
    });
    case.refuses(&whole, &["holds integers; numbers are read from f32"]);
}

/// PEFT's `lora_bias` applies to all modules, a spec's to each module. Modules without a bias are exported with zeros.
#[test]
fn a_bias_at_some_modules_is_exported_with_zeros_elsewhere() {
    let case = case(LLAMA, "every attention { lora(rank: 3, alpha: 6, bias: true) on k }");
    let want = case.logits(&case.spec, &case.bench.path("own.safetensors"));
    assert_eq!(case.logits(&case.spec, &case.peft), want);
    let other = case.changed("other", |_, file| {
        let bias = |name: &&String| name.contains("q_proj") && name.ends_with("lora_B.bias");
        let name = file.tensors.keys().find(bias).expect("PEFT's zeros").clone();
        file.tensors.insert(name, Stored::f32(vec![32], vec![0.5; 32]));
    });
    case.refuses(&other, &["q_proj.lora_B.bias", "has `bias: false`; write `bias: true`"]);
}

/// A prefix MLP that all layers share is reported with the number of its sites.
#[test]
fn unmergeable_methods_are_named_with_their_sites() {
    let bench = Bench::new();
    let text_of = format!("{GPT2}tune {{ every attention {{ prefix(length: 3, mid: 8) }} }}\n");
    let prefixed = text_of.replace("context: 64", "context: 64, first_position: 3");
    let (path, model) = spec(&bench, "prefix.peft", &prefixed);
    let weights = checkpoint(&bench, "weights", &model);
    let file = bench.path("own.safetensors");
    adapter::save(&file, &drawn(&model)).expect("written");
    let out = bench.path("merged");
    let args = ["merge", text(&path), "--weights", text(&weights), "--adapter", text(&file), "--output", text(&out)];
    bench.refuses(&args, 1, &["`prefix` at layers.0.attention and 1 more", "not affine"]);
}

/// `feedforward_modules` scales a module's input. If no spec can express this, the message says why.
#[test]
fn feedforward_modules_without_a_site_are_refused() {
    let bench = Bench::new();
    let (path, model) = spec(&bench, "ia3.peft", &format!("{LLAMA}tune {{ every attention {{ ia3() on k, v }} }}\n"));
    let file = bench.path("own.safetensors");
    adapter::save(&file, &drawn(&model)).expect("written");
    let peft = bench.path("peft");
    let ran = bench.peftc(["export", text(&path), "--format", "peft", "--adapter", text(&file), "-o", text(&peft)]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let config = peft.join(CONFIG);
    let mut of: Map<String, Value> = serde_json::from_slice(&fs::read(&config).expect("there")).expect("JSON");
    of.insert("feedforward_modules".into(), json!(["o_proj"]));
    fs::write(&config, Value::Object(of).to_string()).expect("written");
    let out = bench.path("out.safetensors");
    bench.refuses(
        &["import", text(&path), text(&peft), "-o", text(&out)],
        3,
        &["`feedforward_modules` of adapter_config.json is [\"o_proj\"]", "`ia3` is applied at every ffn site"],
    );
}

#[test]
fn token_indices_must_be_one_range() {
    let case = case(BERT, "rows 3..6 of \"bert.embeddings.word_embeddings.weight\"");
    let config = fs::read_to_string(case.peft.join(CONFIG)).expect("readable");
    let config: Value = serde_json::from_str(&config).expect("JSON");
    assert_eq!(config["trainable_token_indices"], json!({ "bert.embeddings.word_embeddings": [3, 4, 5] }));
    let want = case.logits(&case.spec, &case.peft);
    // The order of the rows is that of the list.
    let turned = case.changed("turned", |config, file| {
        config.insert("trainable_token_indices".into(), json!([5, 3, 4]));
        let name = "base_model.model.bert.embeddings.word_embeddings.token_adapter.trainable_tokens_delta";
        let rows = numbers(file, name);
        let row = |at: usize| rows[at * 32..][..32].to_vec();
        let turned = [row(2), row(0), row(1)].concat();
        file.tensors.insert(name.into(), Stored::f32(vec![3, 32], turned));
    });
    assert_eq!(case.logits(&case.spec, &turned), want);
    let gaps =
        case.changed("gaps", |config, _| drop(config.insert("trainable_token_indices".into(), json!([3, 5, 9]))));
    case.refuses(&gaps, &["are 3, 5, 9, and the spec trains rows 3..6", "one range of rows", "merge_and_unload()"]);
    let other =
        case.changed("other", |config, _| drop(config.insert("trainable_token_indices".into(), json!([7, 8, 9]))));
    case.refuses(&other, &["are 7..10", "write `rows 7..10 of"]);
}

#[test]
fn lora_on_modules_without_a_site_is_refused() {
    let case = case(LLAMA, "");
    let with = |name: &str, tensors: &[(&str, [u64; 2])]| {
        case.changed(name, |_, file| {
            for (name, shape) in tensors {
                let stored = Stored::f32(shape.to_vec(), vec![0.1; (shape[0] * shape[1]) as usize]);
                file.tensors.insert(format!("base_model.model.{name}"), stored);
            }
        })
    };
    let head = with("head", &[("lm_head.lora_A.weight", [3, 32]), ("lm_head.lora_B.weight", [50, 3])]);
    case.refuses(&head, &["`llama` has no site at `lm_head`", "merge_and_unload()"]);
    let table = with(
        "table",
        &[("model.embed_tokens.lora_embedding_A", [3, 50]), ("model.embed_tokens.lora_embedding_B", [32, 3])],
    );
    case.refuses(&table, &["`llama` has no site at `embed_tokens`", "merge_and_unload()"]);
    let far = with(
        "far",
        &[
            ("model.layers.7.self_attn.q_proj.lora_A.weight", [3, 32]),
            ("model.layers.7.self_attn.q_proj.lora_B.weight", [32, 3]),
        ],
    );
    case.refuses(&far, &["the spec's model has 2 layers"]);
    let key = with(
        "key",
        &[
            ("model.layers.0.self_attn.o_proj.lora_A.weight", [3, 32]),
            ("model.layers.0.self_attn.o_proj.lora_B.weight", [32, 3]),
        ],
    );
    case.refuses(&key, &["write `on …, out` for `layers.0.attention.out`"]);
}

/// The base model has 50 tokens, and the adapter's tables have 52.
#[test]
fn grown_tables_are_exported_whole() {
    let bench = Bench::new();
    let (_, small) = spec(&bench, "small.peft", LLAMA);
    let weights = checkpoint(&bench, "weights", &small);
    let grown = LLAMA.replace("vocab: 50", "vocab: 52");
    let task = "task t { kind: generation special: [\"<a>\", \"<b>\"] template: \"<a> <b> {text}\" target: \"<b>\" }\n";
    let lines = "train \"model.embed_tokens.weight\"\n  train \"lm_head.weight\"";
    let (path, model) = spec(&bench, "grown.peft", &(tuned(&grown, lines) + task));
    let inputs = tokens(&bench, &[1, 50, 51, 3]);
    let file = bench.path("own.safetensors");
    adapter::save(&file, &drawn(&model)).expect("written");
    let peft = bench.path("peft");
    let export =
        ["export", text(&path), "--format", "peft", "--adapter", text(&file), "-o", text(&peft), "--overwrite"];
    let ran = bench.peftc(export);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let config = fs::read_to_string(peft.join(CONFIG)).expect("readable");
    assert!(config.contains("\"model.embed_tokens\"") && config.contains("\"lm_head\""), "{config}");
    let case = Case { bench, spec: path, model, weights, inputs, peft };
    let want = case.logits(&case.spec, &case.bench.path("own.safetensors"));
    assert_eq!(case.logits(&case.spec, &case.peft), want);
    assert_eq!(want.len() % 52, 0);
}

/// A batch with one sequence, in which each token is predicted from those before it.
fn tokens(bench: &Bench, ids: &[i64]) -> PathBuf {
    let mut file = TensorFile::default();
    for name in ["inputs.ids", "inputs.labels"] {
        let stored = Stored { shape: vec![1, ids.len() as u64], data: Data::I64(ids.to_vec()) };
        file.tensors.insert(name.into(), stored);
    }
    let path = bench.path("tokens.safetensors");
    adapter::save(&path, &file).expect("written");
    path
}

#[test]
fn folders_of_other_libraries_are_refused_by_name() {
    let case = case(BERT, "");
    let bench = &case.bench;
    let config = fs::read(case.peft.join(CONFIG)).expect("readable");
    bench.write("bin/adapter_config.json", &config);
    bench.write("bin/adapter_model.bin", "pickle");
    bench.write("bare/adapter_model.bin", "pickle");
    bench.write("nothing/adapter_config.json", &config);
    fs::create_dir_all(bench.path("unsaid")).expect("a folder");
    fs::copy(case.peft.join(MODEL), bench.path("unsaid").join(MODEL)).expect("copied");
    bench.write("mlx/adapter_config.json", r#"{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}"#);
    bench.write("mlx/adapters.safetensors", "x");
    bench.write("npz/adapters.npz", "x");
    bench.write("hub/adapter_config.json", r#"{"config": {"architecture": "lora", "r": 8}, "hidden_size": 32}"#);
    bench.write("hub/pytorch_adapter.bin", "x");
    bench.write("run/trainer_state.json", "{}");
    bench.write("run/checkpoint-20/adapter_config.json", &config);
    bench.write("run/checkpoint-100/adapter_config.json", &config);
    bench.write("empty/readme.txt", "");
    bench.write("weights.bin", "x");
    bench.write("pointer/adapter_config.json", &config);
    bench.write(
        "pointer/adapter_model.safetensors",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    );
    bench.write("points/adapter_config.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n");
    bench.write("points/adapter_model.safetensors", "x");
    bench.write("shards/adapter_config.json", &config);
    bench.write("shards/adapter_model.safetensors.index.json", "{}");
    bench.write("typeless/adapter_config.json", r#"{"r": 8}"#);
    let cases: &[(&str, &[&str])] = &[
        ("bin", &["`adapter_model.bin`", "pickle", "save_pretrained"]),
        ("bare", &["`adapter_model.bin`", "save_pretrained"]),
        ("nothing", &["no `adapter_model.safetensors`"]),
        ("unsaid", &["without `adapter_config.json`"]),
        ("mlx", &["mlx-lm", "mlx_lm.fuse"]),
        ("npz", &["mlx-lm"]),
        ("hub", &["AdapterHub", "merge_adapter"]),
        ("run", &["Trainer", "checkpoint-100"]),
        ("weights", &["a whole model", "`--weights`"]),
        ("empty", &["holds no adapter", "readme.txt"]),
        ("weights.bin", &["pickle"]),
        ("pointer", &["large-file storage", "`git lfs pull`"]),
        ("points", &["adapter_config.json", "large-file storage", "`git lfs pull`"]),
        ("shards", &["in several files", "save_pretrained"]),
        ("typeless", &["no `peft_type`"]),
        ("no/such/folder", &["no such file or directory"]),
    ];
    for (name, words) in cases {
        case.refuses(&bench.path(name), words);
    }
    // Files that are recognised by the names of their tensors.
    let named = |name: &str, tensor: &str| {
        let mut file = TensorFile::default();
        file.tensors.insert(tensor.into(), Stored::f32(vec![2, 2], vec![0.0; 4]));
        let path = bench.path(name);
        adapter::save(&path, &file).expect("written");
        path
    };
    let kohya = named("kohya.safetensors", "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight");
    case.refuses(&kohya, &["image model"]);
    case.refuses(&named("mlx.safetensors", "model.layers.0.self_attn.q_proj.lora_a"), &["mlx-lm"]);
    case.refuses(&case.peft.join(MODEL), &["name its folder"]);
    case.refuses(&case.weights.join("model.safetensors"), &["a whole model"]);
}

#[test]
fn an_export_names_its_base() {
    let case = case(BERT, "");
    let base = |more: &[&str]| {
        let (file, out) = (case.bench.path("own.safetensors"), case.bench.path("again"));
        let args =
            ["export", text(&case.spec), "--format", "peft", "--adapter", text(&file), "-o", text(&out), "--overwrite"];
        let ran = case.bench.peftc(args.iter().chain(more));
        assert_eq!(ran.code, 0, "{}", ran.err);
        let config = fs::read_to_string(out.join(CONFIG)).expect("readable");
        let config: Value = serde_json::from_str(&config).expect("JSON");
        (config["base_model_name_or_path"].clone(), ran.err)
    };
    let (none, said) = base(&[]);
    assert!(none.is_null() && said.contains("`--base`"), "{said}");
    assert_eq!(base(&["--base", "google/bert"]).0, json!("google/bert"));
    assert_eq!(base(&["--weights", text(&case.weights)]).0, json!(text(&case.weights)));
    let mut config = super::config(&case.model);
    config.insert("_name_or_path".into(), json!("some/bert"));
    let named = folder(&case.bench, "named", &config, &tensors(&case.model, true));
    assert_eq!(base(&["--weights", text(&named)]).0, json!("some/bert"));
}

#[test]
fn an_export_notes_what_the_format_cannot_hold() {
    let bench = Bench::new();
    let mean = BERT.replace("context: 64", "context: 64, pooling: \"mean\"");
    let text_of = format!("{mean}tune {{ every attention {{ lora(rank: 3) on q }} }}\n{TASK}");
    let (path, model) = spec(&bench, "mean.peft", &text_of);
    let file = bench.path("own.safetensors");
    adapter::save(&file, &drawn(&model)).expect("written");
    let out = bench.path("out");
    let ran = bench.peftc(["export", text(&path), "--adapter", text(&file), "-o", text(&out), "--overwrite"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.err.contains("`pooling: \"mean\"` cannot be written in PEFT's format"), "{}", ran.err);

    let task = "task t { kind: generation special: [\"<a>\"] template: \"<a> {text}\" target: \"<a>\" }\n";
    let (path, model) = spec(&bench, "special.peft", &(tuned(LLAMA, "") + task));
    adapter::save(&file, &drawn(&model)).expect("written");
    let ran = bench.peftc(["export", text(&path), "--adapter", text(&file), "-o", text(&out), "--overwrite"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.err.contains("rows of `<a>`"), "{}", ran.err);

    // The file contains the trained rows, and the base model needs a row for each of them.
    let (path, model) =
        spec(&bench, "rows.peft", &(tuned(LLAMA, "rows 48..50 of \"model.embed_tokens.weight\"") + task));
    adapter::save(&file, &drawn(&model)).expect("written");
    let ran = bench.peftc(["export", text(&path), "--adapter", text(&file), "-o", text(&out), "--overwrite"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.err.contains("`model.resize_token_embeddings(50)`"), "{}", ran.err);

    // A requirement of the equivalent model in transformers is met by PEFT's reader.
    let prefix = GPT2.replace("context: 64", "context: 64, first_position: 3");
    let text_of = format!("{prefix}tune {{ every attention {{ prefix(length: 3, direct: true) }} }}\n");
    let (path, model) = spec(&bench, "prefix.peft", &text_of);
    adapter::save(&file, &drawn(&model)).expect("written");
    let ran = bench.peftc(["export", text(&path), "--adapter", text(&file), "-o", text(&out), "--overwrite"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.err.is_empty() || !ran.err.contains("first_position"), "{}", ran.err);
}

/// Every key of PEFT's configurations. `tests/interop/peft_fixtures.py` recorded whether the key changes PEFT's
/// results. peftc either computes the same results, or refuses the adapter and names the key.
mod keys {
    use super::*;

    fn every_key(name: &str) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop");
        let case = root.join("cases").join(name);
        let entries = fs::read_to_string(root.join(format!("keys/{name}.json"))).expect("readable");
        let entries: Vec<Map<String, Value>> = serde_json::from_str(&entries).expect("JSON");
        let variants = adapter::load(&root.join(format!("keys/{name}.safetensors"))).unwrap_or_default();
        let given = fs::read_to_string(case.join("adapter").join(CONFIG)).expect("readable");
        let given: Map<String, Value> = serde_json::from_str(&given).expect("JSON");
        let tensors = adapter::load(&case.join("adapter").join(MODEL)).expect("sound");
        let bench = Bench::new();
        let (mut equal, mut refused) = (0, 0);
        for entry in entries {
            let key = entry["key"].as_str().expect("a key");
            let what = format!("{name}: `{key}` = {}", entry["value"]);
            let mut config = given.clone();
            config.extend(entry["config"].as_object().expect("an object").clone());
            config.insert(key.into(), entry["value"].clone());
            let mut file = tensors.clone();
            let variant = entry.get("variant").and_then(Value::as_str);
            for (name, stored) in &variants.tensors {
                if let Some(name) = variant.and_then(|v| name.strip_prefix(v)?.strip_prefix(':')) {
                    file.tensors.insert(name.into(), stored.clone());
                }
            }
            let adapter = bench.path("adapter");
            bench.write(&format!("adapter/{CONFIG}"), serde_json::to_string(&config).expect("plain data"));
            adapter::save(&adapter.join(MODEL), &file).expect("written");
            let text_of = fs::read_to_string(case.join("spec.peft")).expect("readable");
            let text_of = match entry["spec"].as_str() {
                Some(tune) => {
                    let (start, end) = (text_of.find("tune").expect("a block"), text_of.find("task").expect("a block"));
                    format!("{}tune {{ {tune} }}\n{}", &text_of[..start], &text_of[end..])
                }
                None => text_of,
            };
            let spec = bench.write("spec.peft", text_of);
            let (inputs, base, out) = (case.join("case.safetensors"), case.join("base"), bench.path("out.safetensors"));
            let args = ["run", text(&spec), "--entry", "forward", "--inputs", text(&inputs), "--weights", text(&base)];
            let ran = bench.peftc(args.iter().chain(&["--adapter", text(&adapter), "-o", text(&out), "--overwrite"]));
            assert!(!ran.err.contains("this key is not known"), "{what} is unknown:\n{}", ran.err);
            let logits = entry.get("logits").and_then(Value::as_array);
            match (ran.code, logits) {
                (0, Some(logits)) => {
                    let want: Vec<f32> = logits.iter().map(|x| x.as_f64().expect("a number") as f32).collect();
                    let found = numbers(&adapter::load(&out).expect("sound"), "logits");
                    let gap = gap(&found, &want);
                    assert!(gap <= 1e-5, "{what} is off by {gap}");
                    equal += 1;
                }
                // PEFT itself refuses this configuration.
                (0, None) => {}
                (3, _) => {
                    assert!(ran.err.contains(&format!("`{key}`")), "{what} is refused without its name:\n{}", ran.err);
                    refused += 1;
                }
                (code, _) => panic!("{what}: exit code {code}\n{}", ran.err),
            }
            // A configuration with a spec of its own must not be refused.
            assert!(entry["spec"].is_null() || ran.code == 0, "{what}:\n{}", ran.err);
        }
        println!("{name}: {equal} equal, {refused} refused");
        assert!(equal > 0 && refused > 0);
    }

    #[test]
    fn of_lora() {
        every_key("bert_lora_qv");
    }

    #[test]
    fn of_dora() {
        every_key("roberta_dora_qv");
    }

    #[test]
    fn of_ia3() {
        every_key("roberta_ia3");
    }

    #[test]
    fn of_prefix_tuning() {
        every_key("roberta_prefix");
    }
}
