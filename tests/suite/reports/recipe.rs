//! Recipes: the effects of the settings in the `train` block, in the spec and on the command line.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use peft_runtime::adapter;

use super::random::{CLASSIFIER, Case, classifier};
use crate::cli::text;

/// An artifact accepts every recipe setting that its kernels do not depend on, with the same checks as a spec.
#[test]
fn an_artifact_accepts_recipe_settings() {
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

/// A tensor's own learning rate does not change with `train.lr`: in a spec, in the cache of compiled models, and in an
/// artifact.
#[test]
fn own_learning_rates_do_not_follow_the_recipe() {
    let source = CLASSIFIER.replace("on q", "on q { lr of B: 0.05 }").replace("epochs: 20", "steps: 3");
    let case = classifier(&source, |_| {});
    let artifact = case.path("tiny.peftc");
    assert_eq!(case.bench.peftc(["compile", text(&case.spec), "-o", text(&artifact)]).code, 0);
    let moved = |spec: &Path, lr: &str| {
        let out = case.path("run");
        let given = ["train", text(spec), "--weights", text(&case.weights), "--data", text(&case.data), "--out"];
        let more = [text(&out), "--overwrite", "--set", lr, "--set", "train.schedule=constant"];
        let ran = case.bench.peftc(given.iter().chain(&more));
        assert_eq!(ran.code, 0, "{}", ran.err);
        let values = adapter::load(&out.join("adapter.safetensors")).expect("whole");
        ["a", "b"].map(|name| {
            let tensor = &values.tensors[&format!("layers.0.attention.q.lora.{name}")];
            let adapter::Data::F32(numbers) = &tensor.data else { panic!("f32") };
            numbers.clone()
        })
    };
    let [slow_a, slow_b] = moved(&case.spec, "train.lr=1e-9");
    let [fast_a, fast_b] = moved(&case.spec, "train.lr=0.05");
    assert!(slow_a != fast_a, "A does not follow the recipe");
    // B is initialised to zero, and Adam's first steps are as large as the learning rate.
    let largest = |numbers: &[f32]| numbers.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    assert!((0.05..0.2).contains(&largest(&slow_b)) && (0.05..0.2).contains(&largest(&fast_b)));
    for (lr, values) in [("train.lr=1e-9", [slow_a, slow_b]), ("train.lr=0.05", [fast_a, fast_b])] {
        assert!(moved(&artifact, lr) == values, "an artifact with {lr}");
    }
    let ran = case.bench.peftc(["check", text(&case.spec)]);
    assert!(ran.out.contains(" of these at lr 0.05\n"), "{}", ran.out);
}

/// A resumed run with more steps says when its learning rate begins to decay.
#[test]
fn a_longer_resumed_run_says_when_its_rate_decays() {
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

/// A state holds the vectors of its optimizer, and a resumed run is bit-identical to an uninterrupted one.
#[test]
fn each_optimizer_resumes_to_the_same_bits() {
    for (recipe, kept) in [
        ("optimizer: sgd", &["values"][..]),
        ("optimizer: sgd\n momentum: 0.9", &["m", "values"]),
        ("optimizer: lion", &["m", "values"]),
        ("optimizer: adam\n weight_decay: 0.1", &["m", "v", "values"]),
    ] {
        let source = CLASSIFIER.replace("epochs: 20", &format!("epochs: 2\n schedule: constant\n {recipe}"));
        let case = classifier(&source, |_| {});
        let (whole, parts) = (case.path("whole"), case.path("parts"));
        let train = |out: &Path, more: &[&str]| {
            let ran = case.with("train", &[&["--out", text(out)], more].concat());
            assert_eq!(ran.code, 0, "{recipe}: {}", ran.err);
        };
        train(&whole, &[]);
        train(&parts, &["--set", "train.epochs=1"]);
        let state = |out: &Path| adapter::load(&out.join("state.safetensors")).expect("whole");
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

/// The steps in a run's metrics, and the steps and losses of its evaluations.
pub fn figures(out: &Path) -> (Vec<u64>, Vec<(u64, f64)>) {
    let lines = fs::read_to_string(out.join("metrics.jsonl")).expect("figures");
    let (mut steps, mut judged) = (vec![], vec![]);
    for line in lines.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let step = line["step"].as_u64().expect("a step");
        match line["dev/loss"].as_f64() {
            Some(loss) => judged.push((step, loss)),
            None => steps.push(step),
        }
    }
    (steps, judged)
}

fn notes(path: &Path) -> std::collections::BTreeMap<String, String> {
    adapter::load(path).unwrap_or_else(|e| panic!("{e}")).notes
}

/// Evaluations and states within an epoch. The last two states are kept, and the best values.
#[test]
fn saves_and_evaluations_follow_their_intervals() {
    let case = classifier(&CLASSIFIER.replace("epochs: 20", "steps: 9\n save: 2\n evaluate: 3\n lr_end: 0.01"), |_| {});
    let (out, epochs) = (case.path("run"), case.path("epochs"));
    let (ran, _) = case.train(&out, &[]);
    let (steps, judged) = figures(&out);
    assert_eq!(steps, (1..=9).collect::<Vec<_>>());
    assert_eq!(judged.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 3, 6, 9]);
    let step = |name: &str| notes(&out.join(name))["step"].clone();
    assert_eq!([step("state.safetensors"), step("state.previous.safetensors")], ["9", "8"]);
    let (best, loss) = judged[1..].iter().copied().reduce(|a, b| if b.1 < a.1 { b } else { a }).expect("three");
    assert_eq!(step("best.safetensors"), best.to_string());
    assert!(ran.out.contains(&format!("best.safetensors, the loss {loss:.4} at step {best}")), "{}", ran.out);
    // The best values can be read like an adapter.
    let (figures_of_best, _) = case.eval(&out.join("best.safetensors"), &[]);
    assert!(figures_of_best.starts_with(&format!("loss {loss:.4}")), "{figures_of_best}");
    // The intervals of saves and evaluations do not change the trained values.
    case.train(&epochs, &["--set", "train.save=1min", "--set", "train.evaluate=epoch"]);
    let values = |out: &Path| adapter::load(&out.join("adapter.safetensors")).expect("whole").tensors;
    assert!(values(&out) == values(&epochs));
    assert!(!epochs.join("state.previous.safetensors").exists());
    for (set, word) in [
        ("train.save=10mins", "train.save"),
        ("train.save=\"10 min\"", "`save` is a number of steps, a time or `epoch`"),
        ("train.save=0", "`save` is a number of steps, a time or `epoch`"),
        ("train.evaluate=5min", "`evaluate` is a number of steps or `epoch`"),
        ("train.patience=0", "`patience` is at least 1"),
    ] {
        let ran = case.with("train", &["--out", text(&case.path("none")), "--set", set]);
        assert!(ran.code == 1 && ran.err.contains(word), "{set}: {}", ran.err);
    }
}

/// A damaged or missing state is replaced by the previous one, and the results are bit-identical to those of an
/// undisturbed run.
#[test]
fn a_damaged_state_falls_back_to_the_previous_one() {
    let case = classifier(&CLASSIFIER.replace("epochs: 20", "steps: 9\n save: 2\n evaluate: 3"), |_| {});
    let (alone, out) = (case.path("alone"), case.path("run"));
    case.train(&alone, &[]);
    type Spoiled = (&'static str, fn(&Path));
    let spoiled: [Spoiled; 3] = [
        ("it is damaged: its checksum does not match its content", |path| {
            let mut bytes = fs::read(path).expect("there");
            *bytes.last_mut().expect("not empty") ^= 1;
            fs::write(path, bytes).expect("written");
        }),
        ("it is missing", |path| fs::remove_file(path).expect("there")),
        ("", |path| fs::write(path, "{").expect("written")),
    ];
    for (why, spoil) in spoiled {
        let ran = case.with("train", &["--dev", text(&case.data), "--out", text(&out), "--overwrite"]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        spoil(&out.join("state.safetensors"));
        let resume = ["--dev", text(&case.data), "--out", text(&out), "--resume"];
        fs::remove_file(out.join("adapter.safetensors")).expect("there");
        let ran = case.with("train", &resume);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let said = "the run goes on from the state before it, of step 8";
        assert!(ran.err.contains(why) && ran.err.contains(said), "{}", ran.err);
        same(
            &alone,
            &out,
            &["state.safetensors", "state.previous.safetensors", "adapter.safetensors", "best.safetensors"],
        );
    }
    // Both states are damaged.
    for name in ["state.safetensors", "state.previous.safetensors"] {
        spoiled[0].1(&out.join(name));
    }
    let ran = case.with("train", &["--out", text(&out), "--resume"]);
    assert!(ran.code == 3 && ran.err.contains("start over with `--overwrite`"), "{}", ran.err);
}

pub fn same(alone: &Path, out: &Path, names: &[&str]) {
    for name in names {
        assert!(
            fs::read(alone.join(name)).expect("there") == fs::read(out.join(name)).expect("there"),
            "{name} differs"
        );
    }
}

/// A run ends after `train.patience` evaluations without improvement, and continues with more patience.
#[test]
fn patience_ends_a_run_and_more_patience_continues_it() {
    let rate = "steps: 40\n evaluate: 1\n patience: 2\n lr: 1\n schedule: constant";
    let case = classifier(&CLASSIFIER.replace("lr: 5e-2", "").replace("epochs: 20", rate), |_| {});
    let out = case.path("run");
    let ran = case.with("train", &["--out", text(&out)]);
    assert!(ran.code == 2 && ran.err.contains("name them with `--dev`"), "{}", ran.err);
    let judge = case.bench.write("dev.tsv", "good film\t0\nbad film\t1\n");
    let given = ["--dev", text(&judge), "--out", text(&out)];
    let ran = case.with("train", &given);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let (steps, judged) = figures(&out);
    let last = *steps.last().expect("some");
    let losses: Vec<f64> = judged.iter().skip(1).map(|(_, loss)| *loss).collect();
    let best = (0..losses.len()).reduce(|a, b| if losses[b] < losses[a] { b } else { a }).expect("some") + 1;
    assert!(last < 40 && last == best as u64 + 2, "{losses:?}");
    assert!(ran.out.contains(&format!("ended after step {last} of 40: 2 evaluations in a row")), "{}", ran.out);
    let again = [&given[..], &["--resume"]].concat();
    // If it was killed before the adapter was written, the resumed run ends at the same step.
    let adapter = fs::read(out.join("adapter.safetensors")).expect("written");
    fs::remove_file(out.join("adapter.safetensors")).expect("removed");
    let ran = case.with("train", &again);
    assert!(ran.code == 0 && figures(&out).0.last() == Some(&last), "{}", ran.out);
    assert_eq!(fs::read(out.join("adapter.safetensors")).expect("written"), adapter);
    let ran = case.with("train", &again);
    assert!(ran.code == 0 && ran.out.contains("is finished: 2 evaluations in a row"), "{}", ran.out);
    let ran = case.with("train", &[&again[..], &["--set", "train.patience=3", "--set", "train.evaluate=2"]].concat());
    assert!(ran.code == 0 && !ran.out.contains("is finished"), "{}", ran.out);
    assert!(figures(&out).0.len() as u64 > last);
}

/// `train.hold_out` evaluates on rows of the training data.
#[test]
fn held_out_rows_evaluate_the_run() {
    let case = classifier(CLASSIFIER, |_| {});
    let out = case.path("run");
    let hold = ["--set", "train.hold_out=1", "--set", "train.epochs=2", "--out", text(&out)];
    let ran = case.with("train", &[&hold[..], &["--dev", text(&case.data)]].concat());
    assert!(ran.code == 2 && ran.err.contains("leave `--dev` out, or use `--set train.hold_out=0`"), "{}", ran.err);
    let ran = case.with("train", &hold);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.err.contains("examples to train on; 1 rows are held out by the seed 1, with 1 examples"),
        "{}",
        ran.err
    );
    assert!(ran.out.contains("held out: ") && out.join("best.safetensors").is_file(), "{}", ran.out);
    let ran = case.with("train", &["--set", "train.hold_out=1000", "--out", text(&case.path("all"))]);
    assert!(ran.code == 3 && ran.err.contains("which leaves none to train on"), "{}", ran.err);
}

/// Starts `train` in another process, evaluated on its training data.
fn begin(case: &Case, out: &Path, more: &[&str]) -> Child {
    let given = ["train", text(&case.spec), "--weights", text(&case.weights), "--data", text(&case.data)];
    Command::new(env!("CARGO_BIN_EXE_peftc"))
        .args(given)
        .args(["--dev", text(&case.data), "--out", text(out)])
        .args(more)
        .env("PEFTC_CACHE", &case.bench.cache)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts")
}

/// Waits until the run has written metrics of a step after `step`.
fn at_work(out: &Path, child: &mut Child, step: u64) -> bool {
    let begun = Instant::now();
    let last = || {
        let lines = fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
        let steps =
            lines.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_u64());
        steps.max().unwrap_or(0)
    };
    while begun.elapsed() < Duration::from_secs(120) && child.try_wait().expect("asked").is_none() {
        if last() > step {
            return true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    false
}

pub const FILES: [&str; 4] =
    ["state.safetensors", "state.previous.safetensors", "adapter.safetensors", "best.safetensors"];

/// The first signal ends a run after its current step, saves the state, and prints the command that resumes it.
#[cfg(unix)]
#[test]
fn an_interrupted_run_resumes_to_the_same_bits() {
    let case = classifier(&CLASSIFIER.replace("epochs: 20", "steps: 4000\n save: 1000\n evaluate: 500"), |_| {});
    let (alone, out) = (case.path("alone"), case.path("a run"));
    case.train(&alone, &[]);
    let mut more: &[&str] = &["--overwrite"];
    for signal in ["INT", "TERM"] {
        let mut child = begin(&case, &out, more);
        let before = out
            .join("state.safetensors")
            .is_file()
            .then(|| notes(&out.join("state.safetensors"))["step"].parse().expect("a step"));
        assert!(at_work(&out, &mut child, before.unwrap_or(0) + 3));
        let sent = Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status().expect("sent");
        assert!(sent.success());
        let ended = child.wait_with_output().expect("it ended");
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(6), "{said}");
        let step = &notes(&out.join("state.safetensors"))["step"];
        assert!(
            said.contains(&format!("stopped and saved after step {step} of 4000; the run goes on with\n")),
            "{said}"
        );
        let command = said.lines().last().expect("a command");
        assert!(command.ends_with("--resume") && !command.contains("--overwrite"), "{command}");
        assert!(command.contains("a run'") && command.contains("train"), "{command}");
        assert_eq!(figures(&out).0.last().expect("steps").to_string(), *step);
        more = &["--resume"];
    }
    let ran = case.with("train", &["--dev", text(&case.data), "--out", text(&out), "--resume"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    same(&alone, &out, &FILES);
    assert_eq!(figures(&alone).1, figures(&out).1);
}

/// Gradient accumulation with dropout: the last step of an epoch may have fewer batches, a resumed run is
/// bit-identical, and an artifact compiled without accumulation works too.
#[test]
fn accumulated_steps_resume_to_the_same_bits() {
    let source = CLASSIFIER.replace("lora(rank: 2)", "lora(rank: 2, dropout: 0.5)");
    let case = classifier(&source.replace("batch: 2\n epochs: 20", "batch: 1\n epochs: 3\n accumulate: 3"), |_| {});
    let [alone, parts, plain] = ["alone", "parts", "plain"].map(|name| case.path(name));
    case.train(&alone, &[]);
    // Four examples give steps of three batches and of one.
    assert_eq!(figures(&alone).0, (1..=6).collect::<Vec<_>>());
    case.train(&parts, &["--set", "train.save=1"]);
    fs::remove_file(parts.join("state.safetensors")).expect("there");
    let ran = case.with("train", &["--dev", text(&case.data), "--out", text(&parts), "--resume"]);
    assert!(ran.code == 0 && ran.err.contains("of step 5"), "{}", ran.err);
    same(&alone, &parts, &["state.safetensors", "adapter.safetensors", "best.safetensors"]);

    let artifact = case.path("tiny.peftc");
    let ran = case.bench.peftc(["compile", text(&case.spec), "--set", "train.accumulate=1", "-o", text(&artifact)]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let given = ["train", text(&artifact), "--weights", text(&case.weights), "--data", text(&case.data)];
    let ran = case.bench.peftc(given.iter().chain(&["--out", text(&plain), "--set", "train.accumulate=3"]));
    assert_eq!(ran.code, 0, "{}", ran.err);
    let values = |out: &Path| adapter::load(&out.join("adapter.safetensors")).expect("whole").tensors;
    assert!(values(&plain) == values(&alone));
}

/// Batches with a maximum number of tokens: epochs end with their own batches, a run resumed within an epoch is
/// bit-identical, and an example that exceeds a batch is refused.
#[test]
fn token_batches_end_with_epochs_and_resume() {
    let source = CLASSIFIER.replace("lora(rank: 2)", "lora(rank: 2, dropout: 0.5)");
    let recipe = "batch: 9 tokens\n epochs: 4\n accumulate: 2\n evaluate: epoch";
    let mut case = classifier(&source.replace("batch: 2\n epochs: 20", recipe), |_| {});
    // Including two special tokens each, the texts have 24 tokens together, so a batch holds one to three of them.
    let texts = ["good film", "bad", "good good film good", "bad bad bad film bad bad", "film"];
    let lines = texts.iter().map(|line| format!("{line}\t{}\n", u8::from(line.starts_with("good"))));
    case.data = case.bench.write("data.tsv", lines.collect::<String>());
    let [alone, parts] = ["alone", "parts"].map(|name| case.path(name));
    case.train(&alone, &[]);
    let ends: Vec<u64> = figures(&alone).1.iter().map(|(step, _)| *step).collect();
    let lines = fs::read_to_string(alone.join("metrics.jsonl")).expect("figures");
    let steps = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
    let tokens: Vec<u64> = steps.filter_map(|line| line["tokens"].as_f64()).map(|tokens| tokens as u64).collect();
    assert_eq!(tokens.len() as u64, *ends.last().expect("an end"));
    assert!(tokens.iter().all(|&tokens| tokens <= 18), "{tokens:?}");
    for epoch in ends.windows(2) {
        let of_epoch = &tokens[epoch[0] as usize..epoch[1] as usize];
        assert_eq!(of_epoch.iter().sum::<u64>(), 24, "{ends:?}, {tokens:?}");
    }
    case.train(&parts, &["--set", "train.save=1"]);
    fs::remove_file(parts.join("state.safetensors")).expect("there");
    let ran = case.with("train", &["--dev", text(&case.data), "--out", text(&parts), "--resume"]);
    assert!(ran.code == 0 && ran.out.starts_with("1 steps"), "{}{}", ran.out, ran.err);
    same(&alone, &parts, &["state.safetensors", "adapter.safetensors", "best.safetensors"]);

    let ran = case.with("train", &["--out", text(&case.path("small")), "--set", "train.batch=7tokens"]);
    let why = ["`train.batch` is 7 tokens, and the longest example of", "has 8; make it `8 tokens` or more"];
    assert!(ran.code == 2 && why.iter().all(|word| ran.err.contains(word)), "{}", ran.err);
}

/// Averages are evaluated and saved in place of the values, and a resumed run continues with both, bit-identically.
#[test]
fn averages_are_evaluated_and_saved() {
    let source = CLASSIFIER.replace("epochs: 20", "epochs: 3\n schedule: constant\n average: 0.75");
    let case = classifier(&source, |_| {});
    let [alone, parts, plain] = ["alone", "parts", "plain"].map(|name| case.path(name));
    let (_, after) = case.train(&alone, &[]);
    assert_eq!(case.eval(&alone, &[]).0, after);
    let flat = |out: &Path, name: &str| {
        let state = adapter::load(&out.join("state.safetensors")).expect("whole");
        let adapter::Data::F32(numbers) = &state.tensors[name].data else { panic!("f32") };
        numbers.clone()
    };
    let saved = |out: &Path| -> Vec<f32> {
        let tensors = adapter::load(&out.join("adapter.safetensors")).expect("whole").tensors;
        let trained = case.model.params.iter().filter(|p| p.trainable_elements() > 0);
        trained
            .flat_map(|p| match &tensors[&p.name].data {
                adapter::Data::F32(numbers) => numbers.clone(),
                _ => panic!("f32"),
            })
            .collect()
    };
    assert_eq!(saved(&alone), flat(&alone, "averages"));
    assert_ne!(saved(&alone), flat(&alone, "values"));
    // The values are those of a run without averages.
    let mut mean: Vec<f32> = vec![];
    for steps in 1..=6 {
        let out = case.path(&format!("plain{steps}"));
        let spec = case.bench.write("plain.peft", source.replace("average: 0.75", ""));
        let given = ["train", text(&spec), "--weights", text(&case.weights), "--data", text(&case.data), "--out"];
        let steps = format!("train.steps={steps}");
        let ran = case.bench.peftc(given.iter().chain(&[text(&out), "--set", &steps]));
        assert_eq!(ran.code, 0, "{}", ran.err);
        let values = flat(&out, "values");
        mean = match mean.is_empty() {
            true => values,
            false => mean.iter().zip(&values).map(|(a, p)| 0.75 * a + 0.25 * p).collect(),
        };
    }
    assert_eq!(flat(&case.path("plain6"), "values"), flat(&alone, "values"));
    let largest = mean.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    assert!(mean.iter().zip(saved(&alone)).all(|(want, found)| (want - found).abs() <= 1e-6 * largest));

    case.train(&parts, &["--set", "train.save=1"]);
    fs::remove_file(parts.join("state.safetensors")).expect("there");
    let ran = case.with("train", &["--dev", text(&case.data), "--out", text(&parts), "--resume"]);
    assert!(ran.code == 0 && ran.err.contains("of step 5"), "{}", ran.err);
    same(&alone, &parts, &["state.safetensors", "adapter.safetensors", "best.safetensors"]);
    case.train(&plain, &["--set", "train.steps=3"]);
    let ran = case.with("train", &["--out", text(&plain), "--resume", "--set", "train.average=0.5"]);
    assert!(ran.code == 3 && ran.err.contains("train.average: 0.75 in the state, 0.5 now"), "{}", ran.err);
}
