//! Recipes: what a setting of the `train` block changes, from the command line as well.

use std::fs;

use peft_runtime::adapter;

use super::random::{CLASSIFIER, classifier};
use crate::cli::text;

/// An artifact takes every setting that its kernels do not depend on, by the checks of a spec.
#[test]
fn the_recipe_of_an_artifact() {
    let case = classifier(&CLASSIFIER.replace("epochs: 20", "epochs: 2"), |_| {});
    let artifact = case.path("tiny.peftc");
    assert_eq!(case.bench.peftc(["compile", text(&case.spec), "-o", text(&artifact)]).code, 0);
    let out = case.path("run");
    let train = |more: &[&str]| {
        let given = ["train", text(&artifact), "--weights", text(&case.weights), "--data", text(&case.data), "--out"];
        case.bench.peftc(given.iter().chain(&[text(&out), "--overwrite"]).chain(more))
    };
    let ran = train(&["--set", "train.lr_decay=1", "--set", "train.schedule=wsd", "--set", "train.steps=3"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let lines = fs::read_to_string(out.join("metrics.jsonl")).expect("figures");
    let rates = lines
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["lr"].as_f64().expect("a rate"));
    assert_eq!(rates.collect::<Vec<_>>(), [0.05, 0.05, 0.05]);
    for (set, code, words) in [
        ("train.lr=-1", 1, &["`lr` is above 0 and at most 10"][..]),
        ("train.schedule=cosin", 1, &["there is no schedule `cosin`", "did you mean `cosine`?"]),
        ("train.lr_end=1", 1, &["`lr_end` is at most `lr`"]),
        ("train.optimizer=lion", 2, &["`train.optimizer` is compiled into the artifact"]),
        ("train.optimizer=lino", 1, &["there is no optimizer `lino`"]),
        ("train.precision=bf16", 2, &["`train.precision` is compiled into the artifact"]),
        ("lora.rank=4", 2, &["`lora.rank` is compiled into the artifact"]),
    ] {
        let ran = train(&["--set", set]);
        assert_eq!(ran.code, code, "{set}: {}", ran.err);
        words.iter().for_each(|word| assert!(ran.err.contains(word), "{set}: {}", ran.err));
    }
}

/// A run that grows says from where on its rate falls.
#[test]
fn a_stable_phase_goes_on() {
    let text_of = |recipe: &str| CLASSIFIER.replace("epochs: 20", recipe);
    let case = classifier(&text_of("steps: 4\n schedule: wsd\n lr_decay: 2"), |_| {});
    let out = case.path("run");
    case.train(&out, &[]);
    let ran = case.with("train", &["--out", text(&out), "--resume", "--set", "train.steps=8"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let note =
        "from 4 steps to 8: the rate goes on as in a run of 8 steps, with 5.00e-2 at step 5, and decays from step 7 on";
    assert!(ran.err.contains(note), "{}", ran.err);
}

/// A state has the vectors of its optimizer, and a run that goes on has the bits of one that was not stopped.
#[test]
fn a_state_of_each_optimizer() {
    for (recipe, kept) in [
        ("optimizer: sgd", &["values"][..]),
        ("optimizer: sgd\n momentum: 0.9", &["m", "values"]),
        ("optimizer: lion", &["m", "values"]),
        ("optimizer: adam\n weight_decay: 0.1", &["m", "v", "values"]),
    ] {
        let source = CLASSIFIER.replace("epochs: 20", &format!("epochs: 2\n schedule: constant\n {recipe}"));
        let case = classifier(&source, |_| {});
        let (whole, parts) = (case.path("whole"), case.path("parts"));
        let train = |out: &std::path::Path, more: &[&str]| {
            let ran = case.with("train", &[&["--out", text(out)], more].concat());
            assert_eq!(ran.code, 0, "{recipe}: {}", ran.err);
        };
        train(&whole, &[]);
        train(&parts, &["--set", "train.epochs=1"]);
        let state = |out: &std::path::Path| adapter::load(&out.join("state.safetensors")).expect("whole");
        let first = state(&parts);
        assert_eq!(first.tensors.keys().collect::<Vec<_>>(), kept, "{recipe}");
        if recipe == "optimizer: lion" {
            let ran = case.with("train", &["--out", text(&parts), "--resume", "--set", "train.optimizer=adamw"]);
            let why = "train.optimizer: Lion in the state, its default now";
            assert!(ran.code == 3 && ran.err.contains(why), "{}", ran.err);
        }
        train(&parts, &["--resume"]);
        assert!(state(&whole) == state(&parts) && state(&whole).tensors != first.tensors, "{recipe}");
    }
}
