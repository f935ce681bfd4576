//! The parameter counts of the shipped specs, compared with the tables of the paper.

#![allow(clippy::disallowed_methods)] // test cases are files

use peft_grammar::model::{BatchSize, Init, Model, Origin, Phase, Recipe, Schedule, Trainable};
use peft_grammar::{check, no_imports};

fn model(path: &str) -> Model {
    let full = format!("{}/../models/{path}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&full).unwrap_or_else(|e| panic!("{full}: {e}"));
    check(path, &text, &no_imports).unwrap_or_else(|e| panic!("{e}"))
}

/// The number of trainable values of methods, and that of the backbone and its head.
fn counts(model: &Model) -> (u64, u64) {
    let of = |method: bool| {
        let chosen = model.params.iter().filter(|p| matches!(p.origin, Origin::Method(_)) == method);
        chosen.map(|p| p.trainable_elements()).sum()
    };
    (of(true), of(false))
}

/// The number of parameters of a backbone without methods.
fn backbone(call: &str) -> u64 {
    let model = check("spec.peft", &format!("model = {call}"), &no_imports).unwrap_or_else(|e| panic!("{e}"));
    assert!(model.params.iter().all(|p| p.origin == Origin::Backbone));
    model.params.iter().map(|p| p.elements()).sum()
}

#[test]
fn nlg_parameter_counts_match_the_paper() {
    const GPT2: u64 = 124_439_808;
    const SPECIAL: u64 = 16 * 768;
    for (spec, method) in [
        ("inducer_lora", 2_002_320),
        ("inducer", 2_003_472),
        ("lora", 2_009_088),
        ("extension", 1_928_448),
        ("gating", 2_003_472),
        ("adaptive", 2_015_424),
        ("adapter", 2_019_600),
        ("mam_inducer", 2_001_816),
        ("prefix", 9_932_288),
        ("mam_adapter", 2_001_096),
    ] {
        for (model, spec) in both(["webnlg", "coqa"], spec) {
            assert_eq!(counts(&model), (method, SPECIAL), "{spec}");
            let backbone = model.params.iter().filter(|p| p.origin == Origin::Backbone).map(|p| p.elements());
            assert_eq!(backbone.sum::<u64>(), GPT2 + SPECIAL, "{spec}");
            let wte = model.params.iter().find(|p| p.name == "transformer.wte.weight").expect("an embedding");
            assert_eq!(wte.trainable, Trainable::Rows(50257, 50273));
        }
    }
    for (model, spec) in both(["webnlg", "coqa"], "finetune") {
        assert_eq!(counts(&model), (0, GPT2 + SPECIAL), "{spec}");
    }
}

#[test]
fn nlu_parameter_counts_match_the_paper() {
    // The paper's 124,645,632 include the pooler of RobertaModel, which the classifier does not read.
    const ROBERTA: u64 = 124_645_632 - (768 * 768 + 768);
    for (spec, method, backbone) in [
        ("inducer", 609_696, 0),
        ("inducer_lora", 609_120, 0),
        ("mam_inducer", 599_760, 0),
        ("lora", 589_824, 0),
        ("mam_adapter", 599_232, 0),
        ("bitfit", 0, 102_144),
        ("adapter", 599_424, 0),
        ("prefix", 589_824, 0),
        ("finetune", 0, ROBERTA),
    ] {
        for (model, spec) in both(["sst2", "mnli"], spec) {
            let all = model.params.iter().filter(|p| p.origin == Origin::Backbone).map(|p| p.elements());
            assert_eq!((counts(&model), all.sum()), ((method, backbone), ROBERTA), "{spec}");
        }
    }
}

/// The specs of a table row, one for each of its tasks, with their names.
fn both(tasks: [&str; 2], row: &str) -> [(Model, String); 2] {
    tasks.map(|task| (model(&format!("paper/{task}/{row}.peft")), format!("{task}/{row}")))
}

/// The learning rates and batch sizes that the paper states for its own methods.
#[test]
fn hyperparameters_match_the_paper() {
    for row in ["adaptive", "extension", "gating", "inducer", "inducer_lora", "mam_inducer"] {
        for ((model, spec), (lr, epochs, max_tokens)) in
            both(["webnlg", "coqa"], row).into_iter().zip([(1.25e-3, 10.0, 512), (1e-3, 5.0, 896)])
        {
            let Recipe { batch, warmup, label_smoothing, eps, clip, .. } = model.train;
            assert_eq!(
                (model.train.lr, model.train.epochs, batch, model.task.max_tokens),
                (lr, epochs, BatchSize::Sequences(16), max_tokens)
            );
            assert_eq!((warmup, label_smoothing, eps, clip), (Phase::Steps(500), 0.1, 1e-6, 1.0), "{spec}");
            assert_eq!((model.train.schedule, model.train.betas), (Schedule::Linear, (0.9, 0.999)), "{spec}");
        }
    }
    for (row, batches) in [("inducer", [16, 32]), ("inducer_lora", [16, 32]), ("mam_inducer", [64, 16])] {
        for ((model, spec), batch) in both(["sst2", "mnli"], row).into_iter().zip(batches) {
            let Recipe { lr, lr_end, epochs, warmup, weight_decay, betas, schedule, .. } = model.train;
            assert_eq!(
                (lr, lr_end, epochs, model.train.batch),
                (2e-4, 1e-7, 10.0, BatchSize::Sequences(batch)),
                "{spec}"
            );
            assert_eq!((warmup, weight_decay, betas), (Phase::Share(0.06), 0.1, (0.9, 0.98)), "{spec}");
            assert_eq!(schedule, Schedule::Polynomial { power: 1.0 }, "{spec}");
        }
    }
    // The baselines have other learning rates.
    for row in ["finetune", "adapter", "lora", "prefix", "mam_adapter"] {
        let all = both(["webnlg", "coqa"], row).into_iter().chain(both(["sst2", "mnli"], row));
        all.for_each(|(model, spec)| assert!(model.train.lr <= 5e-4, "{spec}"));
    }
}

/// The authors' code initialises some down-projections with kaiming(√5) rather than with N(0, 0.02).
#[test]
fn adapter_initialisation_matches_the_authors_code() {
    let starts = |path: &str| {
        let model = model(&format!("paper/{path}.peft"));
        let init = |end: &str| model.params.iter().find(|p| p.name.ends_with(end)).expect("an adapter").init.clone();
        (init(".adapter.down.weight"), init(".adapter.up.weight"))
    };
    let kaiming = Init::Uniform { bound: 1.0 / 768f64.sqrt() };
    for path in ["sst2/adapter", "mnli/mam_adapter", "mnli/mam_inducer"] {
        assert_eq!(starts(path), (kaiming.clone(), Init::Normal { std: 0.0 }), "{path}");
    }
    let normal = Init::Normal { std: 0.02 };
    assert_eq!(starts("webnlg/mam_inducer"), (normal.clone(), normal));
}

/// Each table row has a spec for each of its tasks.
#[test]
fn every_table_row_has_a_spec_per_task() {
    let there = |task: &str| {
        let folder = format!("{}/../models/paper/{task}", env!("CARGO_MANIFEST_DIR"));
        let names = std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").file_name());
        let mut names: Vec<_> = names.map(|name| name.to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    let counts = ["webnlg", "coqa", "sst2", "mnli"].map(|task| there(task).len());
    assert_eq!(counts, [11, 11, 9, 9]);
    assert_eq!((there("webnlg"), there("sst2")), (there("coqa"), there("mnli")));
}

/// TinyLlama-1.1B, and Llama-2-7B with the default arguments.
#[test]
fn llama_parameter_counts() {
    let tiny = "layers: 22, hidden: 2048, heads: 32, kv_heads: 4, ffn: 5632, vocab: 32000";
    assert_eq!(backbone(&format!("llama({tiny})")), 1_100_048_384);
    assert_eq!(backbone("llama()"), 6_738_415_616);
}

#[test]
fn tied_embeddings_add_no_parameters() {
    for (name, matrix) in [("gpt2", 50257 * 768), ("llama", 32000 * 4096)] {
        let [tied, untied] = [true, false].map(|tied| backbone(&format!("{name}(tied: {tied})")));
        assert_eq!(untied - tied, matrix, "{name}");
    }
}

/// VeRA's random projections exist once and do not train.
#[test]
fn shared_weights_count_once() {
    let text = include_str!("../../tests/specs/good/vera_and_ia3.peft");
    let model = check("spec.peft", text, &no_imports).unwrap_or_else(|e| panic!("{e}"));
    let shared: Vec<_> = model.params.iter().filter(|p| p.name.starts_with("vera.")).collect();
    assert_eq!(shared.len(), 2);
    assert!(shared.iter().all(|p| p.trainable == Trainable::No));
    let vectors = model.params.iter().filter(|p| p.name.contains(".vera.") && p.trainable == Trainable::All);
    assert_eq!(vectors.map(|p| p.elements()).sum::<u64>(), 2 * 2 * (8 + 32));
}

#[test]
fn demo_parameter_counts() {
    let inducer = |key: u64, value: u64| {
        let (heads, p, d) = (12, 32, 384);
        heads * (p * key + key + key * p + p) + heads * (p * value + value + value * d) + d
    };
    let lora = |rank: u64| 2 * 384 * rank;
    let head = 2 * 384 + 2;
    for (spec, per_layer) in
        [("sentiment", inducer(2, 4) + lora(4)), ("sst2_lora", 2 * lora(8)), ("sst2_inducer", inducer(6, 4))]
    {
        let (method, rest) = counts(&model(&format!("demo/{spec}.peft")));
        assert_eq!((method, rest), (6 * per_layer, head), "{spec}");
    }
}
