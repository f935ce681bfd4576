//! Training on the data sets of the repository: the loss falls, and one seed gives the same bits for any number of
//! threads, across save and resume, and from a saved artifact.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use peft_grammar::model::Model;
use peft_passes::codegen;
use peft_passes::dialect::Dialect;
use peft_passes::pipeline::{self, Options};
use peft_runtime::artifact::Manifest;
use peft_runtime::weights::{self, Loaded};
use peft_runtime::{Program, Session, adapter, store};
use peftc::adapters::{ADAPTER, Base};
use peftc::data::{Dataset, Tokenizer};
use peftc::train::state::{Identity, State};
use peftc::train::{self, Outcome, Training};

use crate::cli::kernel_cache;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn model(overrides: &[(&str, &str)]) -> Model {
    let overrides: Vec<(String, String)> = overrides.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    peftc::spec::load(&root().join("models/demo/triples.peft"), &overrides, false).unwrap_or_else(|e| panic!("{e}"))
}

/// Compiles the model into an artifact in `folder`.
fn artifact(model: &Model, folder: &Path) -> std::path::PathBuf {
    let dialect = Dialect::new().expect("a dialect");
    let entries = pipeline::artifact_entries(model);
    let compiled = pipeline::run(&dialect, model, &entries, &Options::default()).expect("compiled");
    let lowered = compiled.lowered.expect("the whole way");
    let library = folder.join("fresh.so");
    codegen::compile(&lowered.kernels(), lowered.machine, kernel_cache().as_deref(), &library).expect("code");
    let manifest = Manifest { arch: std::env::consts::ARCH.into(), ..lowered.manifest };
    let path = folder.join("triples.peftc");
    store::save(&path, &manifest, &library).expect("saved");
    path
}

fn train(model: &Model, artifact: &Path, out: &Path, threads: usize, resume: bool) -> Outcome {
    let (manifest, library) = store::load(artifact).expect("sound");
    let program = Program::new(manifest, &library).expect("a program");
    let mut session =
        Session::new(program, weights::random(&model.params, model.train.seed), threads).expect("a session");
    session.poison = true;
    let tokenizer = Tokenizer::load(&root().join("data/triples"), &model.task, 1542).expect("a tokenizer");
    let read =
        |name: &str| Dataset::load(&root().join("data/triples").join(name), &model.task, &tokenizer).expect("data");
    let (train, dev) = (read("train.json"), read("dev.json"));
    let base = Base::of(model, &Loaded::random(&model.params, model.train.seed));
    let identity = Identity::of(model, &base, &train, Some(&dev), train::total(&model.train, &train));
    let state = resume.then(|| State::open(out).expect("a state"));
    if let Some(state) = &state {
        state.check(model, &identity).unwrap_or_else(|e| panic!("{e}"));
    }
    let (session, dev, out) = (&mut session, Some(&dev), out.to_path_buf());
    let stop = &AtomicBool::new(false);
    let training = Training { model, session, train: &train, dev, out, base: &base, identity, state, stop };
    training.run().unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    let folder = tempfile::tempdir().expect("a directory");
    let at = |name: &str| folder.path().join(name);
    let whole = model(&[("train.epochs", "2")]);
    let artifact = artifact(&whole, folder.path());

    let outcome = train(&whole, &artifact, &at("two"), 2, false);
    assert!(outcome.last < outcome.first - 0.5, "{} to {}", outcome.first, outcome.last);
    let (before, after) = (outcome.before.expect("judged"), outcome.after.expect("judged"));
    assert!(after.loss < before.loss - 0.5, "held out: {} to {}", before.loss, after.loss);

    train(&whole, &artifact, &at("one"), 1, false);
    let values = |name: &str| adapter::load(&at(name).join(ADAPTER)).expect("an adapter").tensors;
    assert!(values("two") == values("one"), "one thread and two differ");

    // Stopped at the end of the first epoch and resumed, against a run without interruption.
    let first = model(&[("train.epochs", "2"), ("train.steps", "26")]);
    assert_eq!(first.train.steps, Some(26));
    let mut part = first.clone();
    part.train.steps = Some(13);
    // A constant rate, because the schedule depends on the number of steps.
    part.train.schedule = peft_grammar::model::Schedule::Constant;
    let mut rest = first.clone();
    rest.train.schedule = peft_grammar::model::Schedule::Constant;
    part.train.warmup = peft_grammar::model::Phase::Steps(3);
    rest.train.warmup = peft_grammar::model::Phase::Steps(3);
    train(&part, &artifact, &at("resumed"), 2, false);
    train(&rest, &artifact, &at("resumed"), 2, true);
    train(&rest, &artifact, &at("at once"), 2, false);
    assert!(values("resumed") == values("at once"), "a resumed run differs");
    let lines = std::fs::read_to_string(at("resumed").join("metrics.jsonl")).expect("metrics");
    assert_eq!(lines.lines().filter(|l| l.contains("\"loss\"")).count(), 26);
}
