//! A state records the identity of its run, and no existing file is overwritten without `--overwrite`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use peft_grammar::model::Model;
use peft_runtime::adapter::{self, Data};

use super::random::{CLASSIFIER, Case, classifier, words};
use super::{config, folder, tensors};
use crate::cli::{Bench, text};

/// A run with two steps per epoch.
fn case() -> Case {
    classifier(&CLASSIFIER.replace("epochs: 20", "epochs: 2"), |_| {})
}

/// The content of every file of a folder.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    files.map(|path| (path.clone(), fs::read(path).expect("readable"))).collect()
}

/// A checkpoint that differs in one value.
fn other_weights(case: &Case, model: &Model) -> PathBuf {
    let mut file = tensors(model, false);
    let Data::F32(numbers) = &mut file.tensors.get_mut("bert.encoder.layer.0.output.dense.bias").expect("there").data
    else {
        panic!("f32")
    };
    numbers[0] += 1e-3;
    let other = folder(&case.bench, "other", &config(model), &file);
    words(&other);
    other
}

#[test]
fn a_state_of_another_run_is_refused() {
    let case = case();
    let out = case.path("run");
    let (_, _) = case.train(&out, &[]);
    let before = content(&out);
    let args = |spec: &Path, weights: &Path, data: &Path, more: &[&str]| {
        let given =
            ["train", text(spec), "--weights", text(weights), "--data", text(data), "--out", text(&out), "--resume"];
        let longer = ["--dev", text(&case.data), "--set", "train.epochs=3"];
        case.bench.peftc(given.iter().chain(&longer).chain(more))
    };
    let refuses = |spec: &Path, weights: &Path, data: &Path, more: &[&str], words: &[&str]| {
        let ran = args(spec, weights, data, more);
        assert_eq!(ran.code, 3, "{more:?}: {}{}", ran.out, ran.err);
        for word in words {
            assert!(ran.err.contains(word), "{more:?} should say `{word}`:\n{}", ran.err);
        }
        assert!(content(&out) == before, "{more:?} changed the run");
    };
    let (spec, weights, data) = (&case.spec, &case.weights, &case.data);
    // The number of trained values is the same in each of these specs.
    let source = CLASSIFIER.replace("epochs: 20", "epochs: 2");
    let of = |name: &str, from: &str, to: &str| case.bench.write(name, source.replace(from, to));
    let moved = of("moved.peft", "on q", "on k");
    refuses(
        &moved,
        weights,
        data,
        &[],
        &["belongs to another spec", "layers.0.attention.q.lora: applied in the state, none now"],
    );
    let scaled = of("scaled.peft", "rank: 2", "rank: 2, alpha: 8");
    refuses(
        &scaled,
        weights,
        data,
        &[],
        &["another spec", "layers.0.attention.q.lora's `alpha`: 2.0 in the state, 8.0 now"],
    );
    let own = "method lora(rank: int) on projection(x, y) {\n  weight A \"a\": [rank, width(x)] ~ uniform(1 / sqrt(width(x)))\n  \
               weight B \"b\": [width(y), rank] ~ zeros\n  after y { y = y + 3 * (x @ transpose(A) @ transpose(B)) }\n}\n";
    case.bench.write("own.peft", own.replace("method lora", "method mine"));
    let mine = of("mine.peft", "model =", "import \"own.peft\"\nmodel =");
    fs::write(&mine, fs::read_to_string(&mine).expect("readable").replace("lora(", "mine(")).expect("written");
    refuses(&mine, weights, data, &[], &["another spec"]);
    let labels = of("labels.peft", "[\"0\", \"1\"]", "[\"1\", \"0\"]");
    refuses(&labels, weights, data, &[], &["task.labels: [\"0\",\"1\"] in the state, [\"1\",\"0\"] now"]);
    // Differences in the recipe.
    refuses(spec, weights, data, &["--seed", "9"], &["another recipe", "train.seed: 1 in the state, 9 now"]);
    refuses(spec, weights, data, &["--set", "train.batch=4"], &["train.batch: 2 in the state, 4 now"]);
    refuses(spec, weights, data, &["--set", "train.lr=1e-3"], &["train.lr: 0.05 in the state, 0.001 now"]);
    refuses(spec, weights, data, &["--set", "train.schedule=constant"], &["train.schedule"]);
    refuses(spec, weights, data, &["--set", "train.epochs=1"], &["steps in all: 4 in the state, 2 now"]);
    // Differences in base weights and data.
    let other = other_weights(&case, &case.model);
    refuses(spec, &other, data, &[], &["belongs to other base weights", "base weights: files "]);
    let fewer = case.bench.write("fewer.tsv", "good film\t1\nbad film\t0\ngood good\t1\n");
    refuses(spec, weights, &fewer, &[], &["training data: 4 examples, ", " in the state, 3 examples, "]);
    let turned = case.bench.write("turned.tsv", "good film\t0\nbad film\t0\ngood good\t1\nbad\t0\n");
    refuses(spec, weights, &turned, &[], &["belongs to other data"]);
    // Several differences at once.
    refuses(spec, &other, &turned, &["--seed", "3"], &["it belongs to another recipe, other base weights, other data"]);

    // Comments, formatting and the file's name are not compared. More epochs and other held-out data are reported.
    let best = fs::read(out.join("best.safetensors")).expect("written");
    let step = adapter::load(&out.join("best.safetensors")).expect("whole").notes["step"].clone();
    let commented = case.bench.write("commented.peft", format!("// the same\n\n{source}"));
    let ran = case.bench.peftc([
        "train",
        text(&commented),
        "--weights",
        text(weights),
        "--data",
        text(data),
        "--out",
        text(&out),
        "--resume",
        "--set",
        "train.epochs=3",
    ]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.err.contains(
            "note: the run grows from 4 steps to 6: the rate goes on as in a run of 6 steps, with 1.67e-2 at step 5"
        ),
        "{}",
        ran.err
    );
    assert!(ran.err.contains("held-out data: other examples than before"), "{}", ran.err);
    assert!(ran.out.starts_with("2 steps"), "{}", ran.out);
    // The best values on the first held-out data are kept.
    assert!(ran.err.contains("the best values on the previous held-out data are kept in"), "{}", ran.err);
    assert_eq!(fs::read(out.join(format!("best.step-{step}.safetensors"))).expect("kept"), best);
}

#[test]
fn finished_and_missing_runs_are_reported() {
    let case = case();
    let out = case.path("run");
    let resume = |more: &[&str]| case.with("train", &[&["--out", text(&out), "--resume"], more].concat());
    let ran = resume(&[]);
    assert!(ran.code == 3 && ran.err.contains("finds no `state.safetensors`: no run was stopped there"), "{}", ran.err);
    assert!(!out.exists());
    case.bench.write("run/metrics.jsonl", "{\"step\":1,\"loss\":0.7}\n");
    let ran = resume(&[]);
    assert!(
        ran.code == 3
            && ran
                .err
                .contains("no state was saved there, as one is when an epoch ends; start over with `--overwrite`"),
        "{}",
        ran.err
    );
    let ran = case.with("train", &["--out", text(&out), "--overwrite"]);
    assert_eq!(ran.code, 0, "{}", ran.err);

    let before = content(&out);
    let ran = resume(&[]);
    assert!(
        ran.code == 0 && ran.out.contains("is finished: 4 of 4 steps are done, and nothing was changed"),
        "{}{}",
        ran.out,
        ran.err
    );
    assert!(content(&out) == before);
    // A missing adapter is written again.
    fs::remove_file(out.join("adapter.safetensors")).expect("there");
    let ran = resume(&[]);
    assert!(ran.code == 0 && ran.out.starts_with("0 steps"), "{}{}", ran.out, ran.err);
    let content_of = |all: &BTreeMap<PathBuf, Vec<u8>>| all[&out.join("adapter.safetensors")].clone();
    assert!(content_of(&content(&out)) == content_of(&before));
    // An adapter of an earlier step is replaced, as after a kill between writing the state and the adapter.
    let path = out.join("adapter.safetensors");
    let mut earlier = adapter::load(&path).expect("sound");
    earlier.notes.insert("step".into(), "3".into());
    adapter::save(&path, &earlier).expect("written");
    let ran = resume(&[]);
    assert!(ran.code == 0 && ran.out.starts_with("0 steps"), "{}{}", ran.out, ran.err);
    assert!(content_of(&content(&out)) == content_of(&before));
    // Changes of one value or one note are detected.
    let path = out.join("state.safetensors");
    let sound = adapter::load(&path).expect("sound");
    // No previous state is available as a fallback.
    fs::remove_file(out.join("state.previous.safetensors")).expect("there");
    let damaged = |damage: &dyn Fn(&mut adapter::TensorFile)| {
        let mut state = sound.clone();
        damage(&mut state);
        adapter::save(&path, &state).expect("written");
        let ran = resume(&["--set", "train.epochs=3"]);
        assert!(ran.code == 3 && ran.err.contains("it is damaged: its checksum"), "{}{}", ran.out, ran.err);
    };
    damaged(&|state| drop(state.notes.insert("step".into(), "3".into())));
    damaged(&|state| drop(state.notes.remove("checksum")));
    damaged(&|state| {
        let adapter::Data::F32(v) = &mut state.tensors.get_mut("v").expect("moments").data else { panic!("f32") };
        v[0] = -1.0;
    });
    adapter::save(&path, &sound).expect("written");
    // An artifact of the same spec can resume the run.
    let artifact = case.path("tiny.peftc");
    assert_eq!(case.bench.peftc(["compile", text(&case.spec), "-o", text(&artifact)]).code, 0);
    let artifact_entries = |more: &[&str]| {
        let given = ["train", text(&artifact), "--weights", text(&case.weights), "--data", text(&case.data)];
        case.bench.peftc(given.iter().chain(&["--out", text(&out), "--resume"]).chain(more))
    };
    let ran = artifact_entries(&[]);
    assert!(ran.code == 0 && ran.out.contains("is finished"), "{}{}", ran.out, ran.err);
    let ran = artifact_entries(&["--set", "train.epochs=3"]);
    assert!(ran.code == 0 && ran.out.starts_with("2 steps"), "{}{}", ran.out, ran.err);

    // A state of the first format does not record the identity.
    let path = out.join("state.safetensors");
    let mut state = adapter::load(&path).expect("sound");
    state.notes.remove("of");
    state.notes.insert("format".into(), "peftc state 1".into());
    adapter::save(&path, &state).expect("written");
    let ran = resume(&["--set", "train.epochs=4"]);
    assert!(ran.code == 0 && ran.err.contains("an older peftc wrote it"), "{}{}", ran.out, ran.err);
    state.notes.insert("format".into(), "peftc state 9".into());
    adapter::save(&path, &state).expect("written");
    let ran = resume(&["--set", "train.epochs=5"]);
    assert!(ran.code == 3 && ran.err.contains("its format is unknown to this peftc"), "{}", ran.err);
}

#[test]
fn nothing_is_overwritten_without_the_option() {
    let case = case();
    let out = case.path("run");
    case.train(&out, &[]);
    let before = content(&out);
    let train = ["train", text(&case.spec), "--weights", text(&case.weights), "--data", text(&case.data), "--out"];
    let onto = [&train[..], &[text(&out)]].concat();
    case.bench.refuses(
        &onto,
        2,
        &["it already holds state.safetensors, adapter.safetensors", "`--resume`", "`--overwrite`"],
    );
    assert!(content(&out) == before);
    // The check comes before weights, data and tokenizer are read.
    case.bench.refuses(
        &["train", text(&case.spec), "--weights", "none", "--data", "none", "--out", text(&out)],
        2,
        &["--overwrite"],
    );
    case.bench.refuses(&[&onto[..], &["--resume", "--overwrite"]].concat(), 2, &["cannot be used with"]);
    let file = case.bench.write("file", "mine");
    for more in [&[][..], &["--overwrite"]] {
        let onto = [&train[..], &[text(&file)], more].concat();
        case.bench.refuses(&onto, 2, &["file: it is a file, and this command writes a folder"]);
    }
    // Files of the old run are removed.
    fs::write(out.join("notes.txt"), "mine").expect("written");
    fs::write(out.join("adapter_config.json"), "{}").expect("written");
    let ran = case.bench.peftc(onto.iter().chain(&["--overwrite", "--set", "train.steps=1"]));
    assert_eq!(ran.code, 0, "{}", ran.err);
    let names: Vec<String> =
        content(&out).keys().map(|path| path.file_name().expect("a name").to_string_lossy().into_owned()).collect();
    assert_eq!(names.iter().filter(|name| name.contains("tfevents")).count(), 1, "{names:?}");
    assert_eq!(names.len(), 5, "{names:?}");
    assert!(names.contains(&"notes.txt".into()), "{names:?}");
    assert_eq!(fs::read_to_string(out.join("metrics.jsonl")).expect("there").lines().count(), 1);

    // The other commands that write files.
    let twice = |args: &[&str], out: &Path| {
        let args = [args, &["-o", text(out)]].concat();
        let ran = case.bench.peftc(&args);
        assert_eq!(ran.code, 0, "{args:?}: {}", ran.err);
        case.bench.refuses(&args, 2, &[text(out), "it exists; replace it with `--overwrite`"]);
        let ran = case.bench.peftc(args.iter().chain(&["--overwrite"]));
        assert_eq!(ran.code, 0, "{args:?}: {}", ran.err);
    };
    let (spec, adapter) = (text(&case.spec), ["--adapter", text(&out)]);
    let [artifact, stage, exported, imported, own] =
        ["a.peftc", "stage", "exported", "imported.safetensors", "own"].map(|name| case.path(name));
    twice(&["compile", spec], &artifact);
    twice(&["compile", spec, "--emit", "model"], &stage);
    twice(&[&["export", spec], &adapter[..]].concat(), &exported);
    twice(&["import", spec, text(&exported)], &imported);
    let batch = super::inputs(&case.bench, "in.safetensors", &[&[1, 3, 2]], &[0]);
    let run = ["run", spec, "--entry", "forward", "--weights", text(&case.weights), "--inputs", text(&batch)];
    twice(&run, &case.path("logits.safetensors"));
    // Files that a command reads are never overwritten.
    let over = |args: &[&str], path: &Path, words: &[&str]| {
        let before = fs::metadata(path).expect("there").modified().expect("a time");
        case.bench.refuses(&[args, &["-o", text(path), "--overwrite"]].concat(), 2, words);
        assert_eq!(fs::metadata(path).expect("there").modified().expect("a time"), before);
    };
    over(&run, &batch, &["this command reads it"]);
    over(&run, &case.weights.join("model.safetensors"), &["weights, which this command reads"]);
    let tuned = [&run[..], &adapter[..]].concat();
    over(&tuned, &out.join("adapter.safetensors"), &["run, which this command reads"]);
    over(&["compile", spec, "--emit", "model"], &case.spec, &["this command reads it"]);
    over(&["import", spec, text(&exported)], &exported.join("adapter_model.safetensors"), &["this command reads it"]);
    over(&[&["export", spec, "--format", "own"], &adapter[..]].concat(), &out, &["which this command reads"]);
    over(&["export", spec, "--adapter", text(&imported)], &out, &["other things than this command writes"]);
    over(&["compile", spec], &case.weights, &["other things than this command writes"]);
    over(&run, Path::new("/dev/null"), &["not a plain file"]);
    // A dangling link is refused. A link to a file is followed, and the target is written.
    let (link, target) = (case.path("link.safetensors"), case.path("target.safetensors"));
    std::os::unix::fs::symlink(&target, &link).expect("a link");
    let onto = [&run[..], &["-o", text(&link), "--overwrite"]].concat();
    case.bench.refuses(&onto, 2, &["a link to", "which does not exist; name another"]);
    fs::write(&target, "old").expect("written");
    assert_eq!(case.bench.peftc(&onto).code, 0);
    assert!(fs::read_link(&link).is_ok() && adapter::load(&target).is_ok());
    // Exporting in another format removes the files of the first.
    twice(&[&["export", spec, "--format", "own"], &adapter[..]].concat(), &own);
    let ran = case.bench.peftc(["export", spec, "--adapter", text(&out), "-o", text(&own), "--overwrite"]);
    assert!(ran.code == 0 && !own.join("adapter.safetensors").exists() && own.join("adapter_config.json").is_file());
}

/// A run that begins with an adapter starts with its values and its random tensors, so its first evaluation equals the
/// adapter's last one. The adapter is part of the run's identity.
#[test]
fn a_run_can_begin_with_an_adapter() {
    let source = CLASSIFIER.replace("epochs: 20", "epochs: 2\n schedule: constant");
    let case = classifier(&source, |file| file.tensors.retain(|name, _| !name.contains("pooler")));
    let [first, second, parts] = ["first", "second", "parts"].map(|name| case.path(name));
    let (_, after) = case.train(&first, &["--seed", "7"]);
    let begin = ["--adapter", text(&first)];
    let (ran, _) = case.train(&second, &begin);
    assert!(ran.err.contains(&format!("before training: {after}")), "{}", ran.err);
    let drawn = |run: &Path| adapter::load(&run.join("adapter.safetensors")).expect("whole").tensors;
    let pooler = "bert.pooler.dense.weight";
    assert!(drawn(&first)[pooler] == drawn(&second)[pooler]);
    let state = adapter::load(&second.join("state.safetensors")).expect("whole");
    assert_eq!(state.notes["step"], "4");

    // Such a run can be stopped and resumed.
    let train =
        |more: &[&str]| case.with("train", &[&["--dev", text(&case.data), "--out", text(&parts)], more].concat());
    assert_eq!(train(&[&begin[..], &["--set", "train.epochs=1"]].concat()).code, 0);
    let ran = train(&["--resume"]);
    let words = ["it belongs to another initial adapter", "the adapter it begins with: ", " in the state, none now"];
    assert!(ran.code == 3 && words.iter().all(|word| ran.err.contains(word)), "{}", ran.err);
    let ran = train(&[&begin[..], &["--resume"]].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(drawn(&second) == drawn(&parts));
    // Another adapter is refused.
    let ran = train(&["--adapter", text(&second), "--resume", "--set", "train.epochs=3"]);
    assert!(ran.code == 3 && ran.err.contains("another initial adapter"), "{}", ran.err);
    // An adapter that the run would overwrite, or of another function, is refused.
    let own = parts.join("adapter.safetensors");
    let ran = train(&["--adapter", text(&own), "--overwrite"]);
    assert!(ran.code == 2 && ran.err.contains("which the run starts from and would overwrite"), "{}", ran.err);
    assert!(own.is_file());
    let scaled = case.bench.write("scaled.peft", source.replace("rank: 2", "rank: 2, alpha: 8"));
    let given = ["train", text(&scaled), "--weights", text(&case.weights), "--data", text(&case.data)];
    let elsewhere = case.path("elsewhere");
    let given = [&given[..], &begin, &["--out", text(&elsewhere)]].concat();
    case.bench.refuses(&given, 3, &["it was trained as a part of another function", "`alpha`"]);
}

/// A killed run leaves complete files, and the resumed run is bit-identical to an uninterrupted one.
#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    let case = classifier(&CLASSIFIER.replace("epochs: 20", "epochs: 120"), |_| {});
    let args = |out: &Path| {
        let given = ["train", text(&case.spec), "--weights", text(&case.weights), "--data", text(&case.data), "--out"];
        given.iter().copied().chain([text(out)]).map(String::from).collect::<Vec<_>>()
    };
    let (alone, killed) = (case.path("alone"), case.path("killed"));
    let ran = case.bench.peftc(args(&alone));
    assert_eq!(ran.code, 0, "{}", ran.err);
    let mut child = Command::new(env!("CARGO_BIN_EXE_peftc"))
        .args(args(&killed))
        .env("PEFTC_CACHE", &case.bench.cache)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let begun = Instant::now();
    // The adapter is written after the state.
    while !killed.join("adapter.safetensors").is_file() && begun.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().expect("killed");
    child.wait().expect("it ended");
    let state = adapter::load(&killed.join("state.safetensors")).expect("whole");
    adapter::load(&killed.join("adapter.safetensors")).expect("whole");
    let step: u64 = state.notes["step"].parse().expect("a number");
    assert!((2..240).contains(&step), "it was killed at step {step}");
    let ran = case.bench.peftc(args(&killed).iter().map(String::as_str).chain(["--resume"]));
    assert_eq!(ran.code, 0, "{}", ran.err);
    for name in ["adapter.safetensors", "state.safetensors"] {
        assert!(fs::read(alone.join(name)).expect("there") == fs::read(killed.join(name)).expect("there"), "{name}");
    }
}

/// A folder of a run that failed before it saved anything can be used again without `--overwrite`.
#[test]
fn a_folder_without_saved_files_can_be_reused() {
    let bench = Bench::new();
    bench.write("run/metrics.jsonl", "");
    bench.write("run/events.out.tfevents.1.peftc.2", "");
    assert!(peftc::train::blocking_files(&bench.path("run")).is_empty());
    assert_eq!(peftc::train::earlier_files(&bench.path("run")).len(), 2);
}
