//! Parameter counts of the specs that ship, against the table of the paper.

#![allow(clippy::disallowed_methods)] // cases are files

use peft_grammar::model::{Model, Origin, Trainable};
use peft_grammar::{check, no_imports};

fn model(path: &str) -> Model {
    let full = format!("{}/../models/{path}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&full).unwrap_or_else(|e| panic!("{full}: {e}"));
    check(path, &text, &no_imports).unwrap_or_else(|e| panic!("{e}"))
}

/// Values of methods that train, and values of the backbone and its head that do.
fn counts(model: &Model) -> (u64, u64) {
    let of = |method: bool| {
        let chosen = model.params.iter().filter(|p| matches!(p.origin, Origin::Method(_)) == method);
        chosen.map(|p| p.trainable_elements()).sum()
    };
    (of(true), of(false))
}

/// Parameters of a backbone without methods.
fn backbone(call: &str) -> u64 {
    let model = check("spec.peft", &format!("model = {call}"), &no_imports).unwrap_or_else(|e| panic!("{e}"));
    assert!(model.params.iter().all(|p| p.origin == Origin::Backbone));
    model.params.iter().map(|p| p.elements()).sum()
}

#[test]
fn nlg_rows_train_what_the_paper_says() {
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
        let model = model(&format!("paper/nlg/{spec}.peft"));
        assert_eq!(counts(&model), (method, SPECIAL), "{spec}");
        let backbone: u64 = model.params.iter().filter(|p| p.origin == Origin::Backbone).map(|p| p.elements()).sum();
        assert_eq!(backbone, GPT2 + SPECIAL, "{spec}");
        let wte = model.params.iter().find(|p| p.name == "transformer.wte.weight").expect("an embedding");
        assert_eq!(wte.trainable, Trainable::Rows(50257, 50273));
    }
    assert_eq!(counts(&model("paper/nlg/finetune.peft")), (0, GPT2 + SPECIAL));
}

#[test]
fn nlu_rows_train_what_the_paper_says() {
    // The paper's 124,645,632 hold RobertaModel's pooler, too, which its classifier does not read.
    const ROBERTA: u64 = 124_645_632 - (768 * 768 + 768);
    for (spec, method, backbone) in [
        ("inducer", 609_696, 0),
        ("inducer_lora", 609_120, 0),
        ("mam_inducer", 599_760, 0),
        ("lora", 589_824, 0),
        ("mam_adapter", 599_232, 0),
        ("bitfit", 0, 102_144),
        ("finetune", 0, ROBERTA),
    ] {
        let model = model(&format!("paper/nlu/{spec}.peft"));
        let all = model.params.iter().filter(|p| p.origin == Origin::Backbone).map(|p| p.elements());
        assert_eq!((counts(&model), all.sum()), ((method, backbone), ROBERTA), "{spec}");
    }
}

/// TinyLlama-1.1B, and Llama-2-7B by the defaults.
#[test]
fn llamas_have_the_parameters_of_their_checkpoints() {
    let tiny = "layers: 22, hidden: 2048, heads: 32, kv_heads: 4, ffn: 5632, vocab: 32000";
    assert_eq!(backbone(&format!("llama({tiny})")), 1_100_048_384);
    assert_eq!(backbone("llama()"), 6_738_415_616);
}

#[test]
fn tied_logits_have_no_matrix_of_their_own() {
    for (name, matrix) in [("gpt2", 50257 * 768), ("llama", 32000 * 4096)] {
        let [tied, untied] = [true, false].map(|tied| backbone(&format!("{name}(tied: {tied})")));
        assert_eq!(untied - tied, matrix, "{name}");
    }
}

/// VeRA's random projections are there once, and do not train.
#[test]
fn what_is_shared_counts_once() {
    let text = include_str!("../../tests/specs/good/vera_and_ia3.peft");
    let model = check("spec.peft", text, &no_imports).unwrap_or_else(|e| panic!("{e}"));
    let shared: Vec<_> = model.params.iter().filter(|p| p.name.starts_with("vera.")).collect();
    assert_eq!(shared.len(), 2);
    assert!(shared.iter().all(|p| p.trainable == Trainable::No));
    let vectors = model.params.iter().filter(|p| p.name.contains(".vera.") && p.trainable == Trainable::All);
    assert_eq!(vectors.map(|p| p.elements()).sum::<u64>(), 2 * 2 * (8 + 32));
}

#[test]
fn demos_train_a_few_hundred_thousand_values() {
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
