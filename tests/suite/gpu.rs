//! The program on a simulated CUDA driver (`tests/cuda-sim`): compilation without a GPU, whole training runs by CUDA
//! graphs, and driver errors. No GPU is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use peft_runtime::adapter::{self, Data};
use peft_runtime::artifact::{Manifest, Storage};
use peft_runtime::{device, store};

use crate::cli::{Bench, Ran, text, tiny_bert};
use crate::{fixtures, full_size};

/// A bench whose program loads the simulated driver instead of CUDA's.
pub struct SimulatedGpu {
    pub bench: Bench,
}

impl SimulatedGpu {
    pub fn new() -> Self {
        let bench = Bench::new();
        let driver = std::env::current_exe().expect("a path").with_file_name("libcuda_sim.so");
        assert!(driver.is_file(), "{} is built with the tests", driver.display());
        fs::create_dir(bench.path("driver")).expect("a folder");
        // The folder is this test's own, so no other test loads the driver.
        std::os::unix::fs::symlink(&driver, bench.path("driver/libcuda.so")).expect("linked");
        SimulatedGpu { bench }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.bench.path(name)
    }

    /// Runs the program with these settings of the simulated driver.
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

    /// An artifact of a tiny BERT for this GPU, and the other arguments of its training.
    pub fn training(&self, target: &str) -> (PathBuf, Vec<String>) {
        let (spec, weights) = tiny_bert(&self.bench, |_| {});
        let artifact = self.path("tiny.peftc");
        self.succeeds("", &["compile", text(&spec), "--target", target, "-o", text(&artifact)]);
        // Texts of different lengths give batches of different sizes.
        let lines = ["good film", "bad", "good good film", "bad bad bad film", "film", "good film good film good"];
        let lines = lines.iter().map(|l| format!("{l}\t{}\n", u8::from(l.starts_with("good"))));
        let data = self.bench.write("data.tsv", lines.collect::<String>());
        let given = ["--weights", text(&weights), "--data", text(&data), "--set", "train.steps=7", "--threads", "1"];
        (artifact, given.map(String::from).to_vec())
    }
}

/// The name of the kernel that computes `op`, from the artifact's manifest.
fn kernel_of(artifact: &Path, op: &str) -> String {
    let manifest = fs::read(artifact.join(store::MANIFEST_FILE)).expect("a manifest");
    let manifest: Manifest = serde_json::from_slice(&manifest).expect("it is sound");
    let mut launches = manifest.entries.values().flat_map(|entry| &entry.launches);
    let launch = launches.find(|launch| launch.op == op).unwrap_or_else(|| panic!("no launch computes `{op}`"));
    manifest.kernels[launch.kernel].clone()
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

/// Compiles an artifact, runs it through the driver, and compares its gradients with the CPU's.
#[test]
fn gradients_through_the_driver_match_the_cpu() {
    let gpu = SimulatedGpu::new();
    let fixture = fixtures::all("gpt2_lora_qv").remove(0);
    let spec = gpu.bench.write("f.peft", fixture.spec());
    let [artifact, found, want] = ["f.peftc", "found", "want"].map(|name| gpu.path(name));
    gpu.succeeds("", &["compile", text(&spec), "--target", "cuda", "-o", text(&artifact)]);
    for (from, to) in [(&artifact, &found), (&spec, &want)] {
        gpu.succeeds("", &["run", text(from), "--inputs", text(&fixture.path), "-o", text(to)]);
    }
    same(&found, &want);
}

/// A whole step is one CUDA graph, which is updated for batches of every size. With `--profile` each kernel is launched
/// separately. Both give the same bits, and the CPU's results.
#[test]
fn training_by_graphs_matches_single_launches() {
    let gpu = SimulatedGpu::new();
    let (artifact, given) = gpu.training("cuda");
    let [graphs, plain, processor] = ["graphs", "plain", "processor"].map(|name| gpu.path(name));
    let report = gpu.path("report");
    let settings = format!("report={}", text(&report));
    let done = |what: &str| {
        let report = fs::read_to_string(&report).expect("the driver wrote it");
        report.lines().find_map(|line| line.strip_prefix(what)?.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    gpu.succeeds(&settings, &with(&["train", text(&artifact), "--out", text(&graphs)], &given));
    // The first step runs without a graph and records the kernels. Each later batch has another number of tokens.
    assert_eq!((done("graphs instantiated"), done("graphs launched"), done("copies")), (1, 6, 7));
    assert!(done("nodes updated") > 0);
    // A step waits for the previous one only if it needs larger buffers or follows the end of an epoch.
    assert!(done("graphs launched while others ran") > 0);
    gpu.succeeds(&settings, &with(&["train", text(&artifact), "--out", text(&plain), "--profile"], &given));
    assert_eq!((done("graphs instantiated"), done("graphs launched")), (0, 0));
    let spec = gpu.path("tiny.peft");
    gpu.succeeds("", &with(&["train", text(&spec), "--out", text(&processor)], &given));
    let values = |run: &Path| run.join("adapter.safetensors");
    assert_eq!(fs::read(values(&graphs)).expect("read"), fs::read(values(&plain)).expect("read"));
    same(&values(&graphs), &values(&processor));
}

/// A session frees all of the driver's resources, whether its training succeeded or failed.
#[test]
fn sessions_free_all_driver_resources() {
    let gpu = SimulatedGpu::new();
    let (artifact, given) = gpu.training("cuda");
    let report = gpu.path("report");
    let kinds = ["allocations", "events", "graphs", "modules", "pinned", "graph executables", "streams"];
    let refused = format!("refuse={},", kernel_of(&artifact, "adamw"));
    for (trouble, code, least) in [("", 0, kinds.map(|_| 1)), (&*refused, 4, [1, 1, 0, 1, 1, 0, 1])] {
        let out = gpu.path(&format!("out{code}"));
        let settings = format!("{trouble}report={}", text(&report));
        let ran = gpu.peftc(&settings, &with(&["train", text(&artifact), "--out", text(&out)], &given));
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

/// Steps of several batches use two graphs, one of which includes the optimizer. They give the bits of separate
/// launches, and the CPU's results.
#[test]
fn accumulated_steps_by_graphs_match_single_launches() {
    let gpu = SimulatedGpu::new();
    let (artifact, mut given) = gpu.training("cuda");
    given.extend(["--set", "train.batch=2", "--set", "train.accumulate=2"].map(String::from));
    let [graphs, plain, processor, report] = ["graphs", "plain", "processor", "report"].map(|name| gpu.path(name));
    let settings = format!("report={}", text(&report));
    gpu.succeeds(&settings, &with(&["train", text(&artifact), "--out", text(&graphs)], &given));
    assert!(fs::read_to_string(&report).expect("the driver wrote it").contains("graphs instantiated"));
    gpu.succeeds("", &with(&["train", text(&artifact), "--out", text(&plain), "--profile"], &given));
    let spec = gpu.path("tiny.peft");
    gpu.succeeds("", &with(&["train", text(&spec), "--out", text(&processor)], &given));
    let values = |run: &Path| run.join("adapter.safetensors");
    assert_eq!(fs::read(values(&graphs)).expect("read"), fs::read(values(&plain)).expect("read"));
    same(&values(&graphs), &values(&processor));
}

/// Artifacts for every chip can be compiled without a GPU and are complete.
#[test]
fn artifacts_compile_without_a_gpu() {
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

/// With half precision the session frees the f32 copy of each frozen matrix once it is packed, because no entry reads
/// it, except for matrices whose rows are gathered.
#[test]
fn frozen_matrices_stay_only_in_half_precision() {
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
fn driver_errors_name_cause_and_remedy() {
    let gpu = SimulatedGpu::new();
    let (artifact, given) = gpu.training("cuda");
    let out = gpu.path("out");
    let train = with(&["train", text(&artifact), "--out", text(&out)], &given);
    let spec = gpu.path("tiny.peft");
    let of_spec = with(&["train", text(&spec), "--target", "cuda", "--out", text(&out)], &given);
    for (train, code) in [(&train, 3), (&of_spec, 2)] {
        gpu.refuses("gpus=0", train, code, &["shows no GPU", "nvidia-smi -L", "CUDA_VISIBLE_DEVICES"]);
        gpu.refuses("driver=11020", train, code, &["knows CUDA 11.2", "11.4 is the least", "R470"]);
    }
    let kernel = kernel_of(&artifact, "cross_entropy");
    let words = [&*format!("does not start `{kernel}`"), "LAUNCH_OUT_OF_RESOURCES"];
    gpu.refuses(&format!("refuse={kernel}"), &train, 4, &words);
    // An asynchronous error is reported without the kernel's name. With `--profile` the failing kernel is known.
    let profiled = [&train[..], &["--profile"]].concat();
    let fails = format!("fail={kernel}");
    gpu.refuses(&fails, &train, 4, &["ILLEGAL_ADDRESS", "started before", "--profile"]);
    let words = [&*format!("failed in `{kernel}`"), "computes `", "ILLEGAL_ADDRESS"];
    gpu.refuses(&fails, &profiled, 4, &words);
    gpu.refuses("memory=2000", &train, 4, &["cannot be had: of the GPU's", "are free", "more memory"]);
    assert!(!out.join("adapter.safetensors").exists());
}

/// If a batch does not fit into memory, the message names a batch size that fits.
#[test]
fn out_of_memory_names_a_batch_that_fits() {
    let gpu = SimulatedGpu::new();
    let (artifact, given) = gpu.training("cuda");
    let lines = "good film good film good film\t1\n".repeat(64);
    gpu.bench.write("data.tsv", lines);
    let out = gpu.path("out");
    let train = |batch: &str| {
        let set = format!("train.batch={batch}");
        let first = ["train", text(&artifact), "--out", text(&out), "--set", &set];
        gpu.peftc("memory=100000", &with(&first, &given))
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

/// Tests of the tables, time limits and verdicts of `make bench-gpu`.
#[test]
fn benchmark_helpers_pass_their_tests() {
    let Ok(ran) = Command::new("python3").arg("benches/gpu_test.py").current_dir(root()).output() else {
        println!("skipped: there is no `python3` here");
        return;
    };
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}

/// Builds the folder for `make bench-gpu`, and runs its parity check on the simulated driver.
#[test]
fn benchmark_folder_passes_its_parity_check() {
    let python = root().join("target/interop-venv/bin/python");
    let Some(data) = full_size::data() else { return };
    if !data.is_dir() || !python.is_file() {
        println!("skipped: PEFTC_DATA holds no data, or `make interop` has not run");
        return;
    }
    let gpu = SimulatedGpu::new();
    let (peftc, folder) = (env!("CARGO_BIN_EXE_peftc"), gpu.path("gpu"));
    // The full program replaces the small runner, which differs only by the missing compiler.
    let small = gpu.bench.write("small", format!("#!/bin/sh\nexec {peftc} \"$@\"\n"));
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
    let (code, out, err) = run(&gpu.path("driver"));
    assert!(code == Some(0) && out.matches("near enough").count() == 6, "{out}{err}");
    if device::gpus().is_err() {
        let (code, _, err) = run(Path::new(""));
        assert!(code == Some(3) && err.contains("libcuda.so.1"), "{err}");
    }
}

/// Integers of a batch are checked against the tables that they index before any kernel is launched, as on a CPU.
#[test]
fn indices_beyond_a_table_are_refused_on_a_gpu() {
    let gpu = SimulatedGpu::new();
    let (artifact, given) = gpu.training("cuda:sm_80");
    let (inputs, out) = (gpu.path("in.safetensors"), gpu.path("out.safetensors"));
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
    gpu.refuses("", &with(&[&run[..], &["--weights", &given[1], "--threads", "1"]].concat(), &[]), 3, &words);
    assert!(!out.exists());
}
