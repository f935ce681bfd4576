//! Gradient accumulation: a step of several batches against one step on all of their sequences, and against PyTorch.

use std::path::Path;

use peft_grammar::names::Vector;
use peft_passes::dialect::Dialect;
use peft_passes::interpret::optimizer::accumulate;
use peft_passes::pipeline::{self, Entry, Options};
use peft_runtime::Session;
use peftc::data::{Batch, Example, Goal};
use peftc::{adapters, train};
use serde_json::Value;

use crate::fixtures::{self, Fixture};
use crate::parity::{fused, programs, session};

const TOLERANCE: f64 = 1e-6;

/// Sixteen sequences with one to twelve targets each. Sequences with few targets come first, so that batches differ.
fn examples() -> Vec<Example> {
    let example = |i: usize| {
        let targets = [1, 1, 2, 1, 1, 3, 2, 1, 12, 9, 1, 11, 12, 2, 10, 12][i];
        let length = targets + 2 + i % 3;
        let ids = (0..length).map(|j| ((7 * i + 5 * j + i * j) % 50) as i32).collect();
        Example { ids, types: vec![0; length], goal: Goal::after(length - 1 - targets, length) }
    };
    (0..16).map(example).collect()
}

fn fixture() -> Fixture {
    fixtures::all("gpt2_inducer_lora_strong").remove(0)
}

fn close(found: &[f32], want: &[f32], what: &str) {
    let largest = want.iter().fold(0.0_f64, |most, x| most.max(f64::from(x.abs())));
    for (i, (found, want)) in found.iter().zip(want).enumerate() {
        let gap = f64::from((found - want).abs());
        assert!(gap <= TOLERANCE * largest, "{what}: value {i} is {found}, not {want}, of at most {largest}");
    }
}

/// Inducer and LoRA without dropout: batches of 8 (two), of 4 (four) and of 5 (three and a rest of 1) against one batch
/// of 16.
#[test]
fn accumulated_batches_equal_one_batch() {
    let fixture = fixture();
    let mut model = fixture.model();
    model.train.schedule = peft_grammar::model::Schedule::Constant;
    model.train.warmup = peft_grammar::model::Phase::Steps(0);
    let examples = examples();
    let mut one = session(&fixture, &model, &fused(true));
    let mut parts: Vec<_> = [8, 4, 5].map(|size| (size, session(&fixture, &model, &fused(true)))).into();
    for step in 0..3 {
        let whole = Batch::pack(&examples);
        let (loss, norm) = train::step(&mut one, &model.train, &whole, step, 9).expect("a step");
        for (size, session) in &mut parts {
            let batches: Vec<Batch> = examples.chunks(*size).map(Batch::pack).collect();
            let counts: Vec<usize> = batches.iter().map(|batch| batch.labels.len()).collect();
            assert!(counts.iter().max() > counts.iter().min().map(|least| 2 * least).as_ref(), "{counts:?}");
            let mut recipe = model.train.clone();
            recipe.accumulate = batches.len() as u64;
            let found = train::accumulated_step(session, &recipe, batches, step, 9).expect("a step");
            let what = format!("step {step} in batches of {size}");
            assert!((found.0 - loss).abs() <= TOLERANCE * loss, "{what}: the loss is {}, not {loss}", found.0);
            assert!((found.1 - norm).abs() <= TOLERANCE * norm, "{what}: the norm is {}, not {norm}", found.1);
            let [found, want] =
                [&*session, &one].map(|session| session.flat(Vector::Gradients).expect("read").into_owned());
            close(&found, &want, &what);
            // The values are copied because Adam turns the rounding of a near-zero gradient into a step as large as the
            // learning rate.
            let values = one.flat(Vector::Values).expect("read").into_owned();
            session.set_flat(Vector::Values, &values).expect("written");
        }
    }
}

/// The CPU's sum of a step's gradients is that of the interpreter, with batches of different sizes.
#[test]
fn accumulated_gradients_match_the_interpreter() {
    let fixture = fixture();
    let model = fixture.model();
    let examples = examples();
    let batches: Vec<Batch> = examples.chunks(3).map(Batch::pack).collect();
    let mut alone = session(&fixture, &model, &fused(true));
    let mut recipe = model.train.clone();
    // A learning rate of 0 keeps the values.
    recipe.lr = 0.0;
    recipe.accumulate = 6;
    let gradients: Vec<(usize, Vec<f64>)> = batches
        .iter()
        .map(|batch| {
            train::step(&mut alone, &recipe, batch, 0, 9).expect("a step");
            let found = alone.flat(Vector::Gradients).expect("read");
            (batch.labels.len(), found.iter().map(|&x| f64::from(x)).collect())
        })
        .collect();
    train::accumulated_step(&mut alone, &recipe, batches, 0, 9).expect("a step");
    let want: Vec<f32> = accumulate(&gradients).into_iter().map(|x| x as f32).collect();
    close(&alone.flat(Vector::Gradients).expect("read"), &want, "six batches");
}

/// Ten LoRA steps against PEFT's on one batch of sixteen sequences (`tests/interop/accumulation_fixtures.py`), run in
/// batches with different numbers of targets.
#[test]
fn ten_accumulated_steps_match_pytorch() {
    let written: Value = serde_json::from_str(include_str!("../interop/accumulation.json")).expect("JSON");
    let numbers = |value: &Value| -> Vec<f64> {
        value.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect()
    };
    let recipe = written["train"].as_object().expect("settings");
    let recipe: Vec<String> = recipe.iter().map(|(key, value)| format!("{key}: {value}")).collect();
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/cases/llama_lora");
    let spec = std::fs::read_to_string(case.join("spec.peft")).expect("readable");
    let spec = format!("{spec}\ntrain {{ schedule: constant {} }}\n", recipe.join(" "));
    let model = peft_grammar::check("spec", &spec, &peft_grammar::no_imports).unwrap_or_else(|e| panic!("{e}"));
    let examples: Vec<Example> = written["ids"]
        .as_array()
        .expect("sequences")
        .iter()
        .zip(numbers(&written["targets"]))
        .map(|(ids, targets)| {
            let ids: Vec<i32> = numbers(ids).iter().map(|&id| id as i32).collect();
            let from = ids.len() - 1 - targets as usize;
            let goal = Goal::after(from, ids.len());
            Example { types: vec![0; ids.len()], ids, goal }
        })
        .collect();
    let dialect = Dialect::new().expect("a dialect");
    let compiled = pipeline::run(&dialect, &model, &[Entry::Train], &Options::default());
    let lowered = compiled.unwrap_or_else(|e| panic!("{e}")).lowered.expect("the whole way");
    let (loaded, adapter) = adapters::weights(&case.join("base"), &model, Some(&case.join("adapter")), false)
        .unwrap_or_else(|e| panic!("{e}"));
    let mut session = Session::new(programs(vec![lowered]).remove(0), loaded.tensors, 1).expect("a session");
    for size in [16, 8, 5, 4, 1] {
        adapters::apply(&mut session, &adapter.as_ref().expect("there").values).expect("written");
        let zeros = vec![0.0; session.trainable()];
        [Vector::M, Vector::V].into_iter().for_each(|moment| session.set_flat(moment, &zeros).expect("written"));
        let mut recipe = model.train.clone();
        recipe.accumulate = 16_u64.div_ceil(size);
        for (step, (loss, norm)) in (0..).zip(numbers(&written["losses"]).into_iter().zip(numbers(&written["norms"]))) {
            let batches = examples.chunks(size as usize).map(Batch::pack).collect();
            let found = train::accumulated_step(&mut session, &recipe, batches, step, 10).expect("a step");
            for (what, found, want) in [("loss", found.0, loss), ("norm", found.1, norm)] {
                let gap = (found - want).abs() / want;
                assert!(gap <= 1e-4, "batches of {size}: the {what} of step {step} is {found}, not {want}");
            }
        }
    }
}
