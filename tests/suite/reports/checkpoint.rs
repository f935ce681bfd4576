//! A checkpoint is compared with the graph: every key of `config.json`, every tensor, the label names, and the argument
//! of `--weights`.

use std::fs;
use std::path::Path;

use peft_runtime::adapter::{self, Stored, TensorFile};
use peftc::hub::checkpoint::config::compare;
use peftc::hub::checkpoint::labels;
use serde_json::{Value, json};

use super::*;
use crate::cli::{Ran, text};

/// Runs `peftc run SPEC --entry forward` with these weights.
fn forward(bench: &Bench, spec: &Path, weights: &Path) -> Ran {
    let labels: &[i64] = &[0, 1];
    let causal = fs::read_to_string(spec).expect("readable").contains("= gpt2(")
        || fs::read_to_string(spec).expect("readable").contains("= llama(");
    let batch = match causal {
        true => causal_inputs(bench),
        false => inputs(bench, "in.safetensors", &[&[2, 3, 4], &[5, 6]], labels),
    };
    let out = bench.path("out.safetensors");
    let _ = fs::remove_file(&out);
    let args = [
        "run",
        text(spec),
        "--overwrite",
        "--entry",
        "forward",
        "--weights",
        text(weights),
        "--inputs",
        text(&batch),
        "-o",
    ];
    bench.peftc(args.iter().copied().chain([text(&out)]))
}

fn causal_inputs(bench: &Bench) -> PathBuf {
    use peft_runtime::adapter::Data;
    let mut file = TensorFile::default();
    for name in ["ids", "labels"] {
        let stored = Stored { shape: vec![1, 4], data: Data::I64(vec![1, 2, 3, 4]) };
        file.tensors.insert(format!("inputs.{name}"), stored);
    }
    let path = bench.path("in.safetensors");
    adapter::save(&path, &file).expect("written");
    path
}

#[track_caller]
fn refused(bench: &Bench, spec: &Path, weights: &Path, words: &[&str]) {
    let ran = forward(bench, spec, weights);
    assert_eq!(ran.code, 3, "{}{}", ran.out, ran.err);
    for word in words {
        assert!(ran.err.contains(word), "should say `{word}`:\n{}", ran.err);
    }
}

#[track_caller]
fn runs(bench: &Bench, spec: &Path, weights: &Path) -> Ran {
    let ran = forward(bench, spec, weights);
    assert_eq!(ran.code, 0, "{}", ran.err);
    ran
}

/// The errors of a configuration in which one key is added or changed.
fn wrong(model: &Model, key: &str, value: Value) -> String {
    let mut config = config(model);
    config.insert(key.into(), value);
    compare(&config, model).wrong.join("\n")
}

fn model(bench: &Bench, text: &str) -> Model {
    spec(bench, "compared.peft", text).1
}

/// Reported cases: the refusal names each key with its value, and what the backbone computes.
#[test]
fn keys_that_change_the_function_are_refused() {
    let bench = Bench::new();
    for (name, source, key, value, words) in [
        ("bert", BERT, "hidden_act", json!("relu"), &["`hidden_act` is \"relu\"", "\"gelu\"", "error function"][..]),
        ("gpt2", GPT2, "activation_function", json!("relu"), &["`activation_function` is \"relu\"", "hyperbolic"]),
        ("llama", LLAMA, "attention_bias", json!(true), &["`attention_bias` is true", "no bias"]),
        // This key is read by the base class of transformers' configurations, not by the classes of the families.
        ("gpt2", GPT2, "is_causal", json!(false), &["`is_causal` is false", "every token sees those before it"]),
        ("llama", LLAMA, "is_causal", json!(false), &["`is_causal` is false", "every token sees those before it"]),
        ("bert", BERT, "is_causal", json!(true), &["`is_causal` is true", "every token sees all the others"]),
        ("roberta", ROBERTA, "is_causal", json!(true), &["`is_causal` is true", "every token sees all the others"]),
        ("bert", BERT, "transformers_weights", json!("other.safetensors"), &["`transformers_weights`", "another name"]),
        ("roberta", ROBERTA, "hidden_act", json!("gelu_new"), &["`hidden_act` is \"gelu_new\"", "\"gelu\""]),
    ] {
        let (path, model) = spec(&bench, &format!("{name}.peft"), source);
        let mut config = config(&model);
        config.insert(key.into(), value);
        let weights = folder(&bench, name, &config, &tensors(&model, false));
        refused(&bench, &path, &weights, words);
    }
}

#[test]
fn another_family_is_refused() {
    let bench = Bench::new();
    let (_, roberta) = spec(&bench, "roberta.peft", ROBERTA);
    let (path, _) = spec(&bench, "bert.peft", BERT);
    let weights = checkpoint(&bench, "weights", &roberta);
    refused(&bench, &path, &weights, &["`model_type` is \"roberta\"", "`bert` reads bert", "`model = roberta(…)`"]);
    let (path, llama) = spec(&bench, "llama.peft", LLAMA);
    let mut config = config(&llama);
    config.insert("model_type".into(), json!("mistral"));
    config.insert("sliding_window".into(), json!(4));
    let weights = folder(&bench, "mistral", &config, &tensors(&llama, false));
    refused(
        &bench,
        &path,
        &weights,
        &["`model_type` is \"mistral\"", "`llama` reads llama", "no backbone that reads it"],
    );
    config.insert("model_type".into(), json!("llama"));
    let weights = folder(&bench, "windowed", &config, &tensors(&llama, false));
    refused(&bench, &path, &weights, &["`sliding_window` is 4", "every token sees all tokens before it"]);
}

#[test]
fn keys_that_cannot_be_compared_are_reported() {
    let bench = Bench::new();
    let (path, bert) = spec(&bench, "bert.peft", BERT);
    let weights = checkpoint(&bench, "weights", &bert);
    assert!(!runs(&bench, &path, &weights).err.contains("warning: "));
    fs::remove_file(weights.join("config.json")).expect("removed");
    let said = runs(&bench, &path, &weights).err;
    assert!(said.contains("warning") && said.contains("no `config.json`") && said.contains("not checked"), "{said}");
    for (text, words) in [("{", "no JSON"), ("[1]", "no JSON object"), ("\u{0}", "no JSON")] {
        fs::write(weights.join("config.json"), text).expect("written");
        refused(&bench, &path, &weights, &["config.json", words, "fetch it again"]);
    }
    let mut config = config(&bert);
    config.insert("frobnication".into(), json!({ "depth": 3 }));
    config.remove("model_type");
    let said = runs(&bench, &path, &folder(&bench, "unheard", &config, &tensors(&bert, true))).err;
    assert!(said.contains("does not know") && said.contains("`frobnication`: {\"depth\":3}"), "{said}");
    assert!(said.contains("no `model_type`"), "{said}");
}

/// If a key that corresponds to an argument differs, the refusal names the `--set` that makes the spec fit, and it
/// does.
#[test]
fn suggested_arguments_make_the_spec_fit() {
    let bench = Bench::new();
    for (source, key, value, set) in [
        (BERT, "layer_norm_eps", json!(1e-5), "model.eps=1e-5"),
        (BERT, "num_attention_heads", json!(2), "model.heads=2"),
        (BERT, "type_vocab_size", json!(1), "model.token_types=1"),
        (GPT2, "n_positions", json!(1024), "model.context=1024"),
        (GPT2, "tie_word_embeddings", json!(false), "model.tied=false"),
        (LLAMA, "rope_theta", json!(500000.0), "model.rope_theta=500000.0"),
        (LLAMA, "rms_norm_eps", json!(1e-5), "model.eps=1e-5"),
        (ROBERTA, "pad_token_id", json!(0), "model.padding=0"),
    ] {
        let path = bench.write("spec.peft", source);
        let model = model(&bench, source);
        let said = wrong(&model, key, value.clone());
        let shown = format!("`{key}` is {value} in config.json");
        let (argument, number) = set.split_once('=').expect("a pair");
        let number: f64 = number.parse().unwrap_or(0.0);
        assert!(said.contains(&shown) && said.contains(&format!("--set {argument}=")), "{said}");
        let mend = said.split("`--set ").nth(1).and_then(|s| s.split('`').next()).expect("a mend");
        assert_eq!(mend.split_once('=').expect("a pair").1.parse().unwrap_or(0.0), number, "{said}");
        let set = peftc::spec::assignment(mend).expect("a pair");
        let model = peftc::spec::load(&path, &[set], false).unwrap_or_else(|e| panic!("{e}"));
        let mut config = config(&model);
        config.insert(key.into(), value);
        assert_eq!(compare(&config, &model).wrong, [""; 0]);
    }
}

/// A missing key means transformers' default, which may differ from the spec's.
#[test]
fn missing_keys_have_the_defaults_of_transformers() {
    let bench = Bench::new();
    let without = |source: &str, key: &str| {
        let model = model(&bench, source);
        let mut config = config(&model);
        config.remove(key);
        compare(&config, &model).wrong.join("\n")
    };
    let roberta = ROBERTA.replace("context: 66", "context: 66, eps: 1e-5");
    for (source, key, words) in [
        (&roberta[..], "layer_norm_eps", "absent from config.json and counts as 1e-12 there, the spec wants 0.00001"),
        (ROBERTA, "max_position_embeddings", "counts as 512"),
        (ROBERTA, "type_vocab_size", "counts as 2"),
        (BERT, "intermediate_size", "counts as 3072"),
        (BERT, "vocab_size", "counts as 30522"),
        (LLAMA, "num_key_value_heads", "counts as 4 there, the spec wants 2"),
        (GPT2, "n_inner", "counts as 128 there, the spec wants 64"),
    ] {
        let said = without(source, key);
        assert!(said.contains(&format!("`{key}` is absent")) && said.contains(words), "{said}");
    }
    for (source, key) in [
        (BERT, "layer_norm_eps"),
        (BERT, "type_vocab_size"),
        (BERT, "hidden_dropout_prob"),
        (ROBERTA, "pad_token_id"),
        (GPT2, "layer_norm_epsilon"),
        (GPT2, "tie_word_embeddings"),
        (LLAMA, "rope_theta"),
        (LLAMA, "rms_norm_eps"),
        (LLAMA, "head_dim"),
    ] {
        assert_eq!(without(source, key), "", "{key}");
    }
}

/// Nested objects of a configuration are compared key by key.
#[test]
fn rotary_positions_are_read_under_every_name() {
    let bench = Bench::new();
    let llama = model(&bench, LLAMA);
    let compared = |more: Value| {
        let mut config = config(&llama);
        config.remove("rope_theta");
        config.remove("rope_type");
        config.extend(more.as_object().expect("an object").clone());
        compare(&config, &llama).wrong.join("\n")
    };
    for fine in [
        json!({}),
        json!({ "rope_theta": 10000, "rope_scaling": null }),
        json!({ "rope_scaling": { "rope_type": "default" } }),
        json!({ "rope_parameters": { "rope_theta": 10000.0, "rope_type": "default" } }),
    ] {
        assert_eq!(compared(fine.clone()), "", "{fine}");
    }
    for (other, words) in [
        (json!({ "rope_theta": 500000.0 }), "`rope_theta` is 500000.0 in config.json, the spec wants 10000.0"),
        (json!({ "rope_parameters": { "rope_theta": 500000.0 } }), "`rope_parameters.rope_theta` is 500000.0"),
        (json!({ "rope_parameters": { "rope_type": "yarn" } }), "`rope_parameters.rope_type` is \"yarn\""),
        (json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8.0 } }), "`rope_scaling.rope_type` is \"llama3\""),
        (json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } }), "the spec wants \"default\""),
        (json!({ "rope_parameters": { "rope_type": "default", "fator": 2.0 } }), "`llama` does not know it"),
        (json!({ "rope_parameters": { "full_attention": { "rope_theta": 1.0 } } }), "`rope_parameters.full_attention`"),
        (json!({ "rope_parameters": 3 }), "`rope_parameters` is 3"),
        (json!({ "partial_rotary_factor": 0.5 }), "`partial_rotary_factor` is 0.5"),
    ] {
        let said = compared(other);
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn unsupported_features_are_refused_by_name() {
    let bench = Bench::new();
    let bert = model(&bench, BERT);
    for (key, value, words) in [
        ("quantization_config", json!({ "quant_method": "bitsandbytes", "load_in_4bit": true }), "bitsandbytes"),
        ("pruned_heads", json!({ "0": [1] }), "pruned"),
        ("auto_map", json!({ "AutoModel": "modeling_mine.Mine" }), "Python code"),
        ("per_layer_config", json!({ "1": { "intermediate_size": 8 } }), "different configurations"),
        ("text_config", json!({ "hidden_size": 32 }), "several parts"),
        ("is_encoder_decoder", json!(true), "decoder"),
        ("is_decoder", json!(true), "every token sees all the others"),
        ("position_embedding_type", json!("relative_key"), "each position has an embedding"),
        ("hidden_act", json!(null), "`hidden_act` is null"),
    ] {
        let said = wrong(&bert, key, value);
        assert!(said.contains(&format!("`{key}`")) && said.contains(words), "{said}");
    }
    for (key, value) in
        [("quantization_config", json!(null)), ("pruned_heads", json!({})), ("is_decoder", json!(false))]
    {
        assert_eq!(wrong(&bert, key, value), "");
    }
    // Dropout rates belong to the recipe and are not compared.
    assert_eq!(wrong(&bert, "hidden_dropout_prob", json!(0.5)), "");
}

/// The configurations of published checkpoints are accepted.
#[test]
fn published_configurations_fit() {
    let bench = Bench::new();
    let minilm = json!({
        "_name_or_path": "nreimers/MiniLM-L6-H384-uncased", "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": false, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": 384, "initializer_range": 0.02, "intermediate_size": 1536,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
        "num_hidden_layers": 6, "pad_token_id": 0, "position_embedding_type": "absolute",
        "transformers_version": "4.8.2", "type_vocab_size": 2, "use_cache": true, "vocab_size": 30522
    });
    let gpt2 = json!({
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "n_special": 0, "predict_special_tokens": true, "resid_pdrop": 0.1,
        "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
        "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": { "text-generation": { "do_sample": true, "max_length": 50 } }, "vocab_size": 50257
    });
    let roberta = json!({
        "architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0,
        "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 514,
        "model_type": "roberta", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
        "type_vocab_size": 1, "vocab_size": 50265
    });
    let llama = json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5632, "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "float32",
        "transformers_version": "4.35.0", "use_cache": true, "vocab_size": 32000
    });
    for (config, source) in [
        (minilm, "model = bert(layers: 6, hidden: 384, heads: 12, ffn: 1536)\n"),
        (gpt2, "model = gpt2(layers: 12)\n"),
        (roberta, "model = roberta(layers: 12)\n"),
        (llama, "model = llama(layers: 22, hidden: 2048, kv_heads: 4, ffn: 5632, eps: 1e-5)\n"),
    ] {
        let config = config.as_object().expect("an object");
        let found = compare(config, &model(&bench, source));
        assert_eq!((found.wrong, found.warnings), Default::default(), "{source}");
    }
}

/// Unused tensors of pretraining heads are a note; an unused bias inside a layer is an error.
#[test]
fn unused_tensors_outside_the_model_are_notes_and_inside_errors() {
    let bench = Bench::new();
    let (path, bert) = spec(&bench, "bert.peft", BERT);
    let one = || Stored::f32(vec![32], vec![0.5; 32]);
    let mut file = tensors(&bert, true);
    file.tensors.insert("cls.predictions.transform.dense.bias".into(), one());
    file.tensors.insert("mask_head.bias".into(), one());
    let said = runs(&bench, &path, &folder(&bench, "masked", &config(&bert), &file)).err;
    assert!(said.contains("cls.predictions.transform.dense.bias (heads of the pretraining)"), "{said}");
    assert!(said.contains("mask_head.bias (they are not part of the model)"), "{said}");
    let (path, llama) = spec(&bench, "llama.peft", LLAMA);
    for name in [
        "model.layers.0.self_attn.q_proj.bias",
        "layers.1.self_attn.q_norm.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.embed_positions.weight",
        "lm_head.bias",
    ] {
        let mut file = tensors(&llama, false);
        file.tensors.insert(name.into(), one());
        let weights = folder(&bench, "biased", &config(&llama), &file);
        refused(&bench, &path, &weights, &["inside the model", "not read by `llama`", name]);
    }
}

#[test]
fn buffers_with_a_meaning_are_checked() {
    let bench = Bench::new();
    let (path, llama) = spec(&bench, "llama.peft", LLAMA);
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    // Heads have size 8, so the frequencies are 10000^(−2j/8).
    for (base, fine) in [(1e4_f32, true), (5e5, false)] {
        let mut file = tensors(&llama, false);
        let numbers = (0..4).map(|j| base.powf(-(j as f32) / 4.0)).collect();
        file.tensors.insert(name.into(), Stored::f32(vec![4], numbers));
        let weights = folder(&bench, "turning", &config(&llama), &file);
        match fine {
            true => assert!(!runs(&bench, &path, &weights).err.contains("inv_freq")),
            false => refused(&bench, &path, &weights, &[name, "rotary positions, base 10000"]),
        }
    }
    let (path, gpt2) = spec(&bench, "gpt2.peft", GPT2);
    for (last, fine) in [(0.0, true), (1.0, false)] {
        let mut file = tensors(&gpt2, false);
        let mask = [1.0, last, 1.0, 1.0].to_vec();
        file.tensors.insert("transformer.h.0.attn.bias".into(), Stored::f32(vec![1, 1, 2, 2], mask));
        let weights = folder(&bench, "masked", &config(&gpt2), &file);
        match fine {
            true => drop(runs(&bench, &path, &weights)),
            false => refused(&bench, &path, &weights, &["transformer.h.0.attn.bias", "causal mask"]),
        }
    }
}

/// Logits with tied weights use the file's tensor if both copies agree. Otherwise the refusal names the argument that
/// unties them, and it works.
#[test]
fn tied_weights_that_differ_in_the_file_are_refused() {
    let bench = Bench::new();
    for (source, table) in [
        (GPT2.to_string(), "transformer.wte.weight"),
        (LLAMA.replace("context: 64", "context: 64, tied: true"), "model.embed_tokens.weight"),
    ] {
        let (path, model) = spec(&bench, "tied.peft", &source);
        let mut file = tensors(&model, false);
        let copy = file.tensors[table].clone();
        file.tensors.insert("lm_head.weight".into(), copy.clone());
        let said = runs(&bench, &path, &folder(&bench, "same", &config(&model), &file)).err;
        assert!(!said.contains("lm_head"), "{said}");
        let numbers: Vec<f32> = (0..copy.shape.iter().product::<u64>()).map(|i| (i as f32).sin()).collect();
        file.tensors.insert("lm_head.weight".into(), Stored::f32(copy.shape.clone(), numbers));
        let weights = folder(&bench, "other", &config(&model), &file);
        refused(&bench, &path, &weights, &["`lm_head.weight` and", table, "`--set model.tied=false`"]);
        let source = match source.contains("tied: true") {
            true => source.replace("tied: true", "tied: false"),
            false => source.replace("context: 64", "context: 64, tied: false"),
        };
        let (path, model) = spec(&bench, "untied.peft", &source);
        runs(&bench, &path, &weights);
        // The reverse case: an untied model, and a file without the matrix.
        let tied = folder(&bench, "tied", &config(&model), &{
            file.tensors.remove("lm_head.weight");
            file
        });
        refused(&bench, &path, &tied, &["`lm_head.weight` is missing", "`--set model.tied=true`"]);
    }
}

#[test]
fn an_optional_missing_part_is_initialised_with_a_note() {
    let bench = Bench::new();
    let (path, bert) = spec(&bench, "bert.peft", BERT);
    let mut file = tensors(&bert, true);
    file.tensors.retain(|name, _| !name.contains("pooler"));
    let said = runs(&bench, &path, &folder(&bench, "bare", &config(&bert), &file)).err;
    assert!(said.contains("drawn at random") && said.contains("bert.pooler.dense.weight"), "{said}");
    // If only a half of the optional part is missing, the file is refused.
    let mut half = tensors(&bert, true);
    half.tensors.remove("bert.pooler.dense.bias");
    let half = folder(&bench, "half", &config(&bert), &half);
    refused(&bench, &path, &half, &["`bert.pooler.dense.bias` is missing"]);
    // If the graph does not use the part, its tensors in the file are accepted.
    let (path, mean) = spec(&bench, "mean.peft", &BERT.replace("context: 64", "context: 64, pooling: \"mean\""));
    runs(&bench, &path, &folder(&bench, "pooled", &config(&mean), &tensors(&bert, true)));
}

const LABELLED: &str = "task t { kind: classification  labels: [\"no\", \"yes\"] }\n";

#[test]
fn labels_must_match_the_head() {
    let bench = Bench::new();
    let (path, bert) = spec(&bench, "labelled.peft", &format!("{BERT}{LABELLED}"));
    let base = config(&bert);
    let with = |more: Value| {
        let mut config = base.clone();
        config.extend(more.as_object().expect("an object").clone());
        config
    };
    for (more, words) in [
        (json!({ "id2label": { "0": "yes", "1": "no" } }), &["[\"yes\", \"no\"]", "labels: [\"no\", \"yes\"]"][..]),
        (json!({ "id2label": { "0": "negative", "1": "positive" } }), &["[\"negative\", \"positive\"]"]),
        (json!({ "id2label": { "0": "a", "1": "b", "2": "c" } }), &["[\"a\", \"b\", \"c\"]"]),
        (json!({ "id2label": { "1": "no", "2": "yes" } }), &["0, 1, …"]),
        (json!({ "num_labels": 3 }), &["`num_labels` is 3", "2 labels"]),
        (json!({ "label2id": { "no": 1, "yes": 0 } }), &["`label2id`", "\"no\" is class 1"]),
        (json!({ "problem_type": "regression" }), &["`problem_type` is \"regression\""]),
        (json!({ "problem_type": "multi_label_classification" }), &["multi_label"]),
        (json!({ "architectures": ["BertForTokenClassification"] }), &["BertForTokenClassification"]),
    ] {
        let said = labels::compare(&with(more), &bert).join("\n");
        words.iter().for_each(|word| assert!(said.contains(word), "{word}: {said}"));
    }
    for more in [
        json!({}),
        json!({ "id2label": { "0": "no", "1": "yes" }, "problem_type": "single_label_classification" }),
        json!({ "id2label": { "0": "LABEL_0", "1": "LABEL_1" }, "num_labels": 2 }),
        json!({ "id2label": null, "architectures": ["BertForSequenceClassification"] }),
    ] {
        assert_eq!(labels::compare(&with(more), &bert), [""; 0]);
    }
    // Labels are not compared if the head is initialised at random.
    let other = with(json!({ "id2label": { "0": "yes", "1": "no" }, "problem_type": "regression" }));
    let weights = folder(&bench, "headed", &other, &tensors(&bert, true));
    refused(&bench, &path, &weights, &["`id2label`", "`labels: [\"yes\", \"no\"]`", "problem_type"]);
    let said = runs(&bench, &path, &folder(&bench, "bare", &other, &tensors(&bert, false))).err;
    assert!(said.contains("drawn at random: classifier.weight, classifier.bias"), "{said}");
    // The head of another task, whose tensors have other names.
    let (robertas, roberta) = spec(&bench, "roberta.peft", &format!("{ROBERTA}{LABELLED}"));
    let mut file = tensors(&roberta, false);
    file.tensors.insert("classifier.weight".into(), Stored::f32(vec![3, 32], vec![0.0; 96]));
    let mut other = config(&roberta);
    other.insert("architectures".into(), json!(["RobertaForTokenClassification"]));
    let weights = folder(&bench, "tokens", &other, &file);
    refused(&bench, &robertas, &weights, &["`architectures` is RobertaForTokenClassification", "classifier.weight"]);
    // Another number of classes.
    let three = model(&bench, &format!("{BERT}task t {{ kind: classification  labels: [\"a\", \"b\", \"c\"] }}\n"));
    let weights = folder(&bench, "three", &base, &tensors(&three, true));
    refused(&bench, &path, &weights, &["`classifier.weight` is [3, 32]", "3 classes", "2 labels"]);
}

/// A `config.json` that exists but cannot be read is an error, not treated as missing. A byte order mark is accepted.
#[test]
fn an_unreadable_config_is_an_error() {
    let bench = Bench::new();
    let (path, bert) = spec(&bench, "bert.peft", BERT);
    let weights = checkpoint(&bench, "weights", &bert);
    let config = weights.join("config.json");
    let text = fs::read_to_string(&config).expect("readable");
    fs::write(&config, format!("\u{feff}{text}")).expect("written");
    runs(&bench, &path, &weights);
    fs::write(&config, "version https://git-lfs.github.com/spec/v1\n").expect("written");
    refused(&bench, &path, &weights, &["config.json", "`git lfs pull`"]);
    fs::remove_file(&config).expect("there");
    std::os::unix::fs::symlink("nowhere", &config).expect("a link");
    refused(&bench, &path, &weights, &["config.json", "a link to nowhere, which is not there; fetch it again"]);
    fs::remove_file(&config).expect("there");
    fs::create_dir(&config).expect("a folder");
    refused(&bench, &path, &weights, &["config.json", "cannot be read"]);
    fs::remove_dir(&config).expect("there");
    fs::write(&config, text).expect("written");
    let model = weights.join("model.safetensors");
    fs::remove_file(&model).expect("there");
    std::os::unix::fs::symlink("nowhere", &model).expect("a link");
    refused(&bench, &path, &weights, &["model.safetensors", "a link to nowhere, which is not there"]);
}

/// Unsuitable weights are refused before compilation.
#[test]
fn weights_are_refused_before_anything_is_compiled() {
    let bench = Bench::with_own_cache();
    let (path, bert) = spec(&bench, "bert.peft", BERT);
    let mut config = config(&bert);
    config.insert("hidden_act".into(), json!("relu"));
    let weights = folder(&bench, "weights", &config, &tensors(&bert, true));
    refused(&bench, &path, &weights, &["`hidden_act` is \"relu\""]);
    let cache = bench.path("cache");
    assert!(fs::read_dir(&cache).map_or(0, Iterator::count) == 0, "{} is not empty", cache.display());
}

/// The names that `--weights` accepts, and how each is interpreted.
#[test]
fn weights_accepts_folders_and_cached_names() {
    let bench = Bench::new();
    let (path, bert) = spec(&bench, "bert.peft", BERT);
    let weights = checkpoint(&bench, "hub/models--google--tiny/snapshots/abc123", &bert);
    let hub = bench.path("hub");
    bench.write("hub/models--google--tiny/refs/main", "abc123");
    bench.write("hub/models--broken/refs/main", "../../elsewhere");
    fs::create_dir_all(bench.path("hub/models--bare")).expect("a folder");
    let batch = inputs(&bench, "in.safetensors", &[&[2, 3, 4], &[5, 6]], &[0, 1]);
    let out = bench.path("out.safetensors");
    let run = |environment: &[(&str, &str)], name: &str| {
        let args = [
            "run",
            text(&path),
            "--overwrite",
            "--entry",
            "forward",
            "--inputs",
            text(&batch),
            "-o",
            text(&out),
            "--weights",
        ];
        bench.with(environment, args.iter().copied().chain([name]))
    };
    let in_cache = [("HF_HUB_CACHE", text(&hub))];
    let ran = run(&in_cache, "google/tiny");
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.err.contains("google/tiny of the Hugging Face cache") && ran.err.contains("abc123"), "{}", ran.err);
    let home = bench.path("home");
    fs::create_dir_all(&home).expect("a folder");
    fs::rename(&hub, home.join("hub")).expect("moved");
    let weights = home.join("hub").join(weights.strip_prefix(&hub).expect("below it"));
    let in_home = [("HF_HOME", text(&home)), ("HF_HUB_CACHE", "")];
    assert_eq!(run(&in_home, "google/tiny").code, 0);
    for (name, words) in [
        ("bert-base-uncased", &["bert-base-uncased", "no such directory", "Hugging Face cache"][..]),
        ("tiny", &["no such directory", "the cache has `google/tiny`"]),
        ("broken", &["no such directory", "`broken` is incomplete"]),
        ("bare", &["no such directory", "without a `main`"]),
        ("./tiny/x/y", &["no such directory; `--weights` takes"]),
    ] {
        let ran = run(&in_home, name);
        assert_eq!(ran.code, 3, "{}", ran.err);
        words.iter().for_each(|word| assert!(ran.err.contains(word), "{word}: {}", ran.err));
    }
    // A file where a folder is expected.
    let file = weights.join("model.safetensors");
    for (name, words) in [
        (file.clone(), vec!["a file".to_string(), format!("`--weights {}`", weights.display())]),
        (bench.write("m.gguf", "GGUF"), vec!["GGUF".into()]),
        (bench.write("pytorch_model.bin", ""), vec!["pickled".into()]),
        (bench.write("notes.txt", ""), vec!["it is a file, where a folder".into()]),
    ] {
        let ran = run(&[], text(&name));
        assert_eq!(ran.code, 3, "{}", ran.err);
        words.iter().for_each(|word| assert!(ran.err.contains(word), "{word}: {}", ran.err));
    }
    // Folders with other content.
    for (name, words) in [
        ("pytorch_model.bin", "pickled"),
        ("model-q4.gguf", "GGUF"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("adapter_model.safetensors", "`--adapter "),
        ("weights.safetensors", "`weights.safetensors`"),
        ("model-00001-of-00002.safetensors", "without `model.safetensors.index.json`"),
        ("adapter.safetensors", "`--adapter "),
        ("checkpoint-3/model.safetensors", "checkpoint-3` does"),
        ("config.json", "holds no `model.safetensors`"),
    ] {
        let held = bench.write(&format!("held-{}/{name}", name.replace('/', "-")), "x");
        let folder = match name.contains('/') {
            true => held.parent().and_then(Path::parent).expect("a folder").to_path_buf(),
            false => held.parent().expect("a folder").to_path_buf(),
        };
        let ran = run(&[], text(&folder));
        assert_eq!(ran.code, 3, "{}", ran.err);
        assert!(ran.err.contains(words) && ran.err.contains(text(&folder)), "{words}: {}", ran.err);
    }
}
