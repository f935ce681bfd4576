//! The program with CUDA's driver in its way, which is `tests/cuda-sim`: artifacts made where no GPU is, whole trainings
//! by graphs, and drivers that are in trouble. No GPU is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use peft_runtime::adapter::{self, Data};
use peft_runtime::artifact::Storage;
use peft_runtime::{device, store};

use crate::cli::{Bench, Ran, text, tiny_bert};
use crate::{fixtures, real};

/// A folder with the driver, under the name by which it is found.
pub struct Machine {
    pub bench: Bench,
}

impl Machine {
    pub fn new() -> Self {
        let bench = Bench::new();
        let driver = std::env::current_exe().expect("a path").with_file_name("libcuda_sim.so");
        assert!(driver.is_file(), "{} is built with the tests", driver.display());
        fs::create_dir(bench.path("driver")).expect("a folder");
        // Where no other test finds it.
        std::os::unix::fs::symlink(&driver, bench.path("driver/libcuda.so")).expect("linked");
        Machine { bench }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.bench.path(name)
    }

    /// Runs the program on a driver with these settings.
    fn peftc(&self, settings: &str, args: &[&str]) -> Ran {
        let driver = self.path("driver");
        self.bench.with(&[("LD_LIBRARY_PATH", text(&driver)), ("CUDA_SIM", settings)], args)
    }

    fn succeeds(&self, settings: &str, args: &[&str]) -> Ran {
        let ran = self.peftc(settings, args);
        assert_eq!(ran.code, 0, "{args:?}: {}{}", ran.out, ran.err);
        ran
    }

    fn refuses(&self, settings: &str, args: &[&str], code: i32, words: &[&str]) {
        let ran = self.peftc(settings, args);
        assert_eq!(ran.code, code, "{settings}, {args:?}: {}{}", ran.out, ran.err);
        for word in words {
            assert!(ran.err.contains(word), "{settings}, {args:?} should say `{word}`:\n{}", ran.err);
        }
    }

    /// An artifact of a tiny BERT for this GPU, and what training is given beside it.
    pub fn trains(&self, target: &str) -> (PathBuf, Vec<String>) {
        let (spec, weights) = tiny_bert(&self.bench, |_| {});
        let artifact = self.path("tiny.peftc");
        self.succeeds("", &["compile", text(&spec), "--target", target, "-o", text(&artifact)]);
        // Batches of many sizes.
        let lines = ["good film", "bad", "good good film", "bad bad bad film", "film", "good film good film good"];
        let lines = lines.iter().map(|l| format!("{l}\t{}\n", u8::from(l.starts_with("good"))));
        let data = self.bench.write("data.tsv", lines.collect::<String>());
        let given = ["--weights", text(&weights), "--data", text(&data), "--set", "train.steps=7", "--threads", "1"];
        (artifact, given.map(String::from).to_vec())
    }
}

fn with<'a>(first: &[&'a str], more: &'a [String]) -> Vec<&'a str> {
    first.iter().copied().chain(more.iter().map(String::as_str)).collect()
}

fn same(found: &Path, want: &Path) {
    let [found, want] = [found, want].map(|path| adapter::load(path).expect("tensors").tensors);
    assert_eq!(found.len(), want.len());
    for (name, want) in want {
        let (Data::F32(want), Data::F32(found)) = (want.data, &found[&name].data) else { panic!("`{name}` in f32") };
        let largest = want.iter().fold(1e-3_f32, |m, x| m.max(x.abs()));
        let close = |(x, y): (&f32, &f32)| (x - y).abs() <= 1e-4 * largest;
        assert!(found.len() == want.len() && found.iter().zip(&want).all(close), "`{name}`");
    }
}

/// Artifacts, the driver's calls, gradients.
#[test]
fn a_gpu_by_its_driver() {
    let machine = Machine::new();
    let fixture = fixtures::all("gpt2_lora_qv").remove(0);
    let spec = machine.bench.write("f.peft", fixture.spec());
    let [artifact, found, want] = ["f.peftc", "found", "want"].map(|name| machine.path(name));
    machine.succeeds("", &["compile", text(&spec), "--target", "cuda", "-o", text(&artifact)]);
    for (from, to) in [(&artifact, &found), (&spec, &want)] {
        machine.succeeds("", &["run", text(from), "--inputs", text(&fixture.path), "-o", text(to)]);
    }
    same(&found, &want);
}

/// The whole step is one graph, which serves batches of every size; with `--profile` there is none. Both give the same
/// bits, and what a processor gives.
#[test]
fn a_training_by_graphs() {
    let machine = Machine::new();
    let (artifact, given) = machine.trains("cuda");
    let [graphs, plain, processor] = ["graphs", "plain", "processor"].map(|name| machine.path(name));
    let report = machine.path("report");
    let settings = format!("report={}", text(&report));
    let done = |what: &str| {
        let report = fs::read_to_string(&report).expect("the driver wrote it");
        report.lines().find_map(|line| line.strip_prefix(what)?.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    machine.succeeds(&settings, &with(&["train", text(&artifact), "--out", text(&graphs)], &given));
    // The first step shows what kernels there are. Then each differs from the one before in how many tokens it has.
    assert_eq!((done("graphs made ready"), done("graphs run"), done("copies")), (1, 6, 7));
    assert!(done("nodes told anew") > 0);
    // Not those that larger batches want room for first, or that come after an epoch's end.
    assert!(done("graphs before others ended") > 0);
    machine.succeeds(&settings, &with(&["train", text(&artifact), "--out", text(&plain), "--profile"], &given));
    assert_eq!((done("graphs made ready"), done("graphs run")), (0, 0));
    let spec = machine.path("tiny.peft");
    machine.succeeds("", &with(&["train", text(&spec), "--out", text(&processor)], &given));
    let values = |run: &Path| run.join("adapter.safetensors");
    assert_eq!(fs::read(values(&graphs)).expect("read"), fs::read(values(&plain)).expect("read"));
    same(&values(&graphs), &values(&processor));
}

/// What a session takes of the driver it gives back, whether it trained to its end or failed in between.
#[test]
fn nothing_is_left_on_the_gpu() {
    let machine = Machine::new();
    let (artifact, given) = machine.trains("cuda");
    let report = machine.path("report");
    let kinds = ["blocks", "events", "graphs", "modules", "pinned", "ready graphs", "streams"];
    for (trouble, code, least) in [("", 0, kinds.map(|_| 1)), ("refuse=adamw,", 4, [1, 1, 0, 1, 1, 0, 1])] {
        let out = machine.path(&format!("out{code}"));
        let settings = format!("{trouble}report={}", text(&report));
        let ran = machine.peftc(&settings, &with(&["train", text(&artifact), "--out", text(&out)], &given));
        assert_eq!(ran.code, code, "{}{}", ran.out, ran.err);
        let report = fs::read_to_string(&report).expect("the driver wrote it");
        for (kind, least) in kinds.into_iter().zip(least) {
            let count = |what: &str| {
                let line = report.lines().find_map(|line| line.strip_prefix(&format!("{kind} {what} ")));
                line.map_or(0, |count| count.parse().expect("a number"))
            };
            let (made, left): (u64, u64) = (count("made"), count("left"));
            assert!(made >= least && left == 0, "{trouble}{kind}: {left} of {made} are left");
        }
    }
}

/// Steps of several batches are two graphs, one with the optimizer. They give the bits of launches one by one, and what a
/// processor gives.
#[test]
fn several_batches_a_step_by_graphs() {
    let machine = Machine::new();
    let (artifact, mut given) = machine.trains("cuda");
    given.extend(["--set", "train.batch=2", "--set", "train.accumulate=2"].map(String::from));
    let [graphs, plain, processor, report] = ["graphs", "plain", "processor", "report"].map(|name| machine.path(name));
    let settings = format!("report={}", text(&report));
    machine.succeeds(&settings, &with(&["train", text(&artifact), "--out", text(&graphs)], &given));
    assert!(fs::read_to_string(&report).expect("the driver wrote it").contains("graphs made ready"));
    machine.succeeds("", &with(&["train", text(&artifact), "--out", text(&plain), "--profile"], &given));
    let spec = machine.path("tiny.peft");
    machine.succeeds("", &with(&["train", text(&spec), "--out", text(&processor)], &given));
    let values = |run: &Path| run.join("adapter.safetensors");
    assert_eq!(fs::read(values(&graphs)).expect("read"), fs::read(values(&plain)).expect("read"));
    same(&values(&graphs), &values(&processor));
}

/// Written for every chip where none is, and whole.
#[test]
fn artifacts_without_a_gpu() {
    let bench = Bench::new();
    let (spec, weights) = tiny_bert(&bench, |_| {});
    let data = bench.write("data.tsv", "good film\t1\n");
    for (target, arch) in [("cuda", "sm_70"), ("cuda:sm_70", "sm_70"), ("cuda:sm_80", "sm_80"), ("cuda:sm_90", "sm_90")]
    {
        let artifact = bench.path("tiny.peftc");
        let ran = bench.peftc(["compile", text(&spec), "--target", target, "-o", text(&artifact), "--overwrite"]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let (manifest, code) = store::open(&artifact).expect("sound");
        assert_eq!((&manifest.arch[..], code.file_name().expect("a name").to_str()), (arch, Some("kernels.ptx")));
        let ptx = fs::read_to_string(code).expect("text");
        assert!(ptx.contains(&format!(".target {arch}")));
        assert!(manifest.kernels.iter().all(|kernel| ptx.contains(&format!(".entry {kernel}("))));
        assert!(["train", "update", "eval"].iter().all(|entry| manifest.entries.contains_key(*entry)));
        if device::gpus().is_err() {
            let train = ["train", text(&artifact), "--weights", text(&weights), "--data", text(&data)];
            bench.refuses(&train, 3, &["tiny.peftc", arch, "libcuda.so.1", "R470", "`--target cpu`"]);
        }
    }
}

/// In half precision no entry reads a frozen matrix as it was, but for the rows that it gathers: the session lets the
/// others go when they are packed.
#[test]
fn frozen_matrices_are_there_in_half_alone() {
    let bench = Bench::new();
    let (spec, _) = tiny_bert(&bench, |_| {});
    let artifact = bench.path("tiny.peftc");
    for target in ["cuda:sm_70", "cuda:sm_80"] {
        let half = ["--set", "train.precision=bf16", "--target", target, "-o", text(&artifact), "--overwrite"];
        assert_eq!(bench.peftc(["compile", text(&spec)].iter().chain(&half)).code, 0);
        let manifest = store::open(&artifact).expect("sound").0;
        let mut matrices = 0;
        for launch in manifest.entries.values().flat_map(|entry| &entry.launches) {
            for &buffer in &launch.buffers {
                let Storage::Tensor { index, .. } = manifest.buffers[buffer].storage else { continue };
                let tensor = &manifest.tensors[index];
                if tensor.trainable.is_none() && tensor.shape.len() == 2 {
                    assert!(launch.op == "gather" || tensor.shape[0] == 1, "`{}` reads `{}`", launch.op, tensor.name);
                    matrices += 1;
                }
            }
        }
        assert!(matrices > 0);
    }
}

#[test]
fn drivers_in_trouble() {
    let machine = Machine::new();
    let (artifact, given) = machine.trains("cuda");
    let out = machine.path("out");
    let train = with(&["train", text(&artifact), "--out", text(&out)], &given);
    let spec = machine.path("tiny.peft");
    let of_spec = with(&["train", text(&spec), "--target", "cuda", "--out", text(&out)], &given);
    for (train, code) in [(&train, 3), (&of_spec, 2)] {
        machine.refuses("gpus=0", train, code, &["shows no GPU", "nvidia-smi -L", "CUDA_VISIBLE_DEVICES"]);
        machine.refuses("driver=11020", train, code, &["knows CUDA 11.2", "11.4 is the least", "R470"]);
    }
    machine.refuses("refuse=cross_entropy", &train, 4, &["does not start `cross_entropy", "LAUNCH_OUT_OF_RESOURCES"]);
    // It is known that one failed, and which one when each is waited for.
    let profiled = [&train[..], &["--profile"]].concat();
    machine.refuses("fail=cross_entropy", &train, 4, &["ILLEGAL_ADDRESS", "started before", "--profile"]);
    machine.refuses("fail=cross_entropy", &profiled, 4, &["failed in `cross_entropy", "computes `", "ILLEGAL_ADDRESS"]);
    machine.refuses("memory=2000", &train, 4, &["cannot be had: of the GPU's", "are free", "more memory"]);
    assert!(!out.join("adapter.safetensors").exists());
}

/// A batch for which there is no room is told how much of it there is room for, and that is true.
#[test]
fn what_would_fit() {
    let machine = Machine::new();
    let (artifact, given) = machine.trains("cuda");
    let lines = "good film good film good film\t1\n".repeat(64);
    machine.bench.write("data.tsv", lines);
    let out = machine.path("out");
    let train = |batch: &str| {
        let set = format!("train.batch={batch}");
        let first = ["train", text(&artifact), "--out", text(&out), "--set", &set];
        machine.peftc("memory=100000", &with(&first, &given))
    };
    let ran = train("64");
    assert_eq!(ran.code, 4, "{}", ran.err);
    let fit =
        ran.err.split("train.batch=").nth(1).and_then(|s| s.split('`').next()).unwrap_or_else(|| panic!("{}", ran.err));
    assert!(ran.err.contains("of the batch's 64 sequences with 512 tokens"), "{}", ran.err);
    let ran = train(fit);
    assert_eq!(ran.code, 0, "{fit} of 64: {}", ran.err);
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Tables, limits of time and verdicts of `make bench-gpu`.
#[test]
fn what_the_benchmark_does_beside_running() {
    let Ok(ran) = Command::new("python3").arg("benches/gpu_test.py").current_dir(root()).output() else {
        println!("skipped: there is no `python3` here");
        return;
    };
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}

/// The folder that is carried to a GPU is made, and its parity holds on the driver that is none.
#[test]
fn the_folder_for_a_gpu() {
    let python = root().join("target/interop-venv/bin/python");
    let Some(data) = real::data() else { return };
    if !data.is_dir() || !python.is_file() {
        println!("skipped: PEFTC_DATA holds no data, or `make interop` has not run");
        return;
    }
    let machine = Machine::new();
    let (peftc, folder) = (env!("CARGO_BIN_EXE_peftc"), machine.path("gpu"));
    // For the small runner, which this is but for the compiler.
    let small = machine.bench.write("small", format!("#!/bin/sh\nexec {peftc} \"$@\"\n"));
    fs::set_permissions(&small, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("set");
    let mut make = Command::new(python);
    make.args(["benches/gpu.py", "make", "--peftc", peftc, "--small"]).arg(&small).arg("--data").arg(data);
    let made = make.arg("--out").arg(&folder).args(["--steps", "3"]).current_dir(root()).output().expect("it starts");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let run = |driver: &Path| {
        let mut run = Command::new("python3");
        run.env("LD_LIBRARY_PATH", driver).args(["gpu.py", "run", "--only", "parity"]).current_dir(&folder);
        let ran = run.output().expect("it starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (ran.status.code(), text(&ran.stdout), text(&ran.stderr))
    };
    let (code, out, err) = run(&machine.path("driver"));
    assert!(code == Some(0) && out.matches("near enough").count() == 6, "{out}{err}");
    if device::gpus().is_err() {
        let (code, _, err) = run(Path::new(""));
        assert!(code == Some(3) && err.contains("libcuda.so.1"), "{err}");
    }
}

/// A batch's integers are held to their tables before anything is started, on a GPU as on a processor.
#[test]
fn indices_beyond_a_table() {
    let machine = Machine::new();
    let (artifact, given) = machine.trains("cuda:sm_80");
    let (inputs, out) = (machine.path("in.safetensors"), machine.path("out.safetensors"));
    let mut file = adapter::TensorFile::default();
    for (name, shape, data) in
        [("ids", vec![1, 2], vec![3, 2_000_000_000]), ("types", vec![1, 2], vec![0, 0]), ("labels", vec![1], vec![1])]
    {
        file.tensors.insert(format!("inputs.{name}"), adapter::Stored { shape, data: Data::I64(data) });
    }
    adapter::save(&inputs, &file).expect("written");
    let run = ["run", text(&artifact), "--entry", "forward", "--inputs", text(&inputs), "-o", text(&out)];
    let words =
        ["`inputs.ids` is 2000000000 in row 0, column 1", "the 6 rows of `bert.embeddings.word_embeddings.weight`"];
    machine.refuses("", &with(&[&run[..], &["--weights", &given[1], "--threads", "1"]].concat(), &[]), 3, &words);
    assert!(!out.exists());
}
