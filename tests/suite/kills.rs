//! Runs that are killed at random moments, also while they save, and are resumed end with the bits of an uninterrupted
//! run, on a CPU and on a simulated GPU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use peft_runtime::{adapter, files};

use crate::cli::{Bench, text};
use crate::gpu::SimulatedGpu;
use crate::reports::random::{CLASSIFIER, classifier};
use crate::reports::recipe;

/// A training run that can be started repeatedly.
struct KillableRun<'a> {
    bench: &'a Bench,
    environment: Vec<(&'static str, PathBuf)>,
    /// All arguments except `--out` and those that choose between a new and a resumed run.
    args: Vec<String>,
    steps: u64,
}

impl KillableRun<'_> {
    /// The command that starts a new run, or resumes one if a state exists.
    fn command(&self, out: &Path) -> Command {
        let state = ["state.safetensors", "state.previous.safetensors"].iter().any(|name| out.join(name).is_file());
        let mut command = Command::new(env!("CARGO_BIN_EXE_peftc"));
        command
            .args(&self.args)
            .args(["--set", &format!("train.steps={}", self.steps), "--set", "train.save=1", "--out", text(out)])
            .arg(if state { "--resume" } else { "--overwrite" })
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env("PEFTC_CACHE", &self.bench.cache)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn run_to_the_end(&self, out: &Path) {
        let ran = self.command(out).output().expect("it starts");
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    }

    /// Starts the program and kills it after `time`. Returns whether it was still running.
    fn killed_after(&self, out: &Path, time: Duration) -> bool {
        let mut child = self.command(out).stderr(Stdio::null()).spawn().expect("it starts");
        std::thread::sleep(time);
        let alive = child.try_wait().expect("a status").is_none();
        child.kill().expect("killed");
        let status = child.wait().expect("it ended");
        assert!(alive || status.success(), "it failed by itself: {status}");
        alive
    }

    /// Kills the run `kills` times. After each completed run a new one is started.
    fn survives_kills(&self, kills: u64) {
        let [alone, killed] = ["alone", "killed"].map(|name| self.bench.path(name));
        self.run_to_the_end(&alone);
        let begun = Instant::now();
        self.run_to_the_end(&killed);
        let whole = begun.elapsed();
        let (mut ends, mut in_saves, mut at) = (1, 0, 0);
        for kill in 0..kills {
            if step(&killed).is_some_and(|step| step == self.steps) {
                // The run may have been killed before it wrote its last adapter.
                self.run_to_the_end(&killed);
                same(&alone, &killed);
                fs::remove_dir_all(&killed).expect("removed");
                (ends, at) = (ends + 1, 0);
            }
            // Kills are spread from before the first step to near the end. A resumed run is shorter than a whole one.
            let alive = self.killed_after(&killed, whole.mul_f64(fraction(kill)));
            let files = fs::read_dir(&killed).into_iter().flatten().flatten();
            let unfinished =
                files.filter(|file| file.file_name().to_string_lossy().starts_with(files::TEMPORARY_PREFIX));
            in_saves += u64::from(alive && unfinished.count() > 0);
            // A kill loses no saved state.
            let now = step(&killed).unwrap_or(0);
            assert!(now >= at, "kill {kill}: the state of step {at} was lost, there is that of step {now}");
            at = now;
        }
        self.run_to_the_end(&killed);
        same(&alone, &killed);
        println!("{kills} kills, {in_saves} of them while a file was written; {ends} runs came to their end");
    }
}

/// The step of the newest state in a run's folder, which must be readable.
fn step(out: &Path) -> Option<u64> {
    let path = out.join("state.safetensors");
    path.is_file().then(|| adapter::load(&path).expect("whole").notes["step"].parse().expect("a number"))
}

/// Compares all files and the evaluations.
fn same(alone: &Path, killed: &Path) {
    let there: Vec<&str> = recipe::FILES.into_iter().filter(|name| alone.join(name).is_file()).collect();
    recipe::same(alone, killed, &there);
    assert_eq!(recipe::figures(alone).1, recipe::figures(killed).1);
}

/// A pseudo-random number from 0 to 1 (SplitMix64).
fn fraction(at: u64) -> f64 {
    let mut z = (at + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z ^ (z >> 31)) as f64 / u64::MAX as f64
}

/// The number of kills: 50 in the full tests.
fn kills(otherwise: u64) -> u64 {
    if crate::env_or_skip("PEFTC_FULL").is_some() { 50 } else { otherwise }
}

#[test]
fn a_killed_run_on_a_cpu_resumes_to_the_same_bits() {
    let source = CLASSIFIER.replace("lora(rank: 2)", "lora(rank: 2, dropout: 0.5)").replace("batch: 2", "batch: 3");
    let case = classifier(&source, |_| {});
    let args = ["train", text(&case.spec), "--weights", text(&case.weights), "--data", text(&case.data)];
    let judged = ["--dev", text(&case.data), "--set", "train.evaluate=7"];
    let args = args.into_iter().chain(judged).map(String::from).collect();
    KillableRun { bench: &case.bench, environment: vec![], args, steps: 60 }.survives_kills(kills(10));
}

#[test]
fn a_killed_run_on_a_gpu_resumes_to_the_same_bits() {
    let gpu = SimulatedGpu::new();
    let (artifact, mut args) = gpu.training("cuda");
    // `training` sets the number of steps, which is replaced here.
    let set = args.iter().position(|arg| arg.starts_with("train.steps")).expect("a number of steps");
    args.drain(set - 1..=set);
    args.splice(0..0, ["train".to_owned(), text(&artifact).to_owned()]);
    args.extend(["--set", "train.batch=2"].map(String::from));
    let environment = vec![("LD_LIBRARY_PATH", gpu.path("driver")), ("CUDA_SIM", PathBuf::new())];
    KillableRun { bench: &gpu.bench, environment, args, steps: 12 }.survives_kills(kills(4));
}
