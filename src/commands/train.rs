//! `peftc train`: trains a model, or continues a run.

use std::path::PathBuf;
use std::time::Duration;

use peft_grammar::names::Entry;
use peft_grammar::names::OptimizerEntry::{self, Accumulate, Accumulated, Average, Update};
use peft_runtime::{RuntimeError, Session};

use super::data_args::DataArgs;
use super::model_args::ModelArgs;
use super::overwrite::{self, Overwrite};
use crate::adapters::{self, Adapter, Base};
use crate::budget::Budget;
use crate::failure::Failure;
use crate::hub::{checkpoint, tokenizer};
use crate::train::interrupt;
use crate::train::state::{EvaluationHistory, Identity, State};
use crate::train::{self, Ending, Training};

/// The command line of `peftc train`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: ModelArgs,
    /// The data to train on: files of json, jsonl, csv, tsv, parquet or text, plain or compressed with gzip or zstd.
    /// Repeat `--data` for several files, or give a pattern in quotes such as `'train/*.jsonl'`
    #[arg(long, required = true, value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Held-out data, given as `--data`. They are evaluated at the intervals of `train.evaluate`, and the values of the
    /// best evaluation are kept in `best.safetensors`. `train.hold_out` takes rows of `--data` instead
    #[arg(long, value_name = "FILE")]
    dev: Vec<PathBuf>,
    #[command(flatten)]
    rows: DataArgs,
    /// The base model's weights: a Hugging Face model directory, a GGUF file, or `random`
    #[arg(long)]
    weights: PathBuf,
    /// The values to start from: `adapter.safetensors`, or a folder that a run, `peftc export` or PEFT wrote. The run
    /// starts at step 0 without the optimizer's moments; `--resume` continues a run instead
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// A directory or a GGUF file with the tokenizer [default: the tokenizer of `--weights`]
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// The folder to write the run to: the last values (`adapter.safetensors`), the best ones (`best.safetensors`),
    /// states and metrics [default: `runs/NAME`]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Continue the run in `--out` from its last state, with the same spec, recipe, weights and data
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    #[command(flatten)]
    overwrite: Overwrite,
    /// The seed of random weights, of the order of the examples and of dropout; the same as `--set train.seed=N`
    #[arg(long)]
    seed: Option<u64>,
    /// Print the time spent in each operation
    #[arg(long)]
    profile: bool,
}

/// Trains and prints a summary.
///
/// # Errors
///
/// The model, the weights, the adapter or the data cannot be used, the state does not fit, the loss is not finite, or a
/// signal stopped the run.
pub fn run(mut arguments: Arguments) -> Result<(), Failure> {
    if let Some(seed) = arguments.seed {
        arguments.source.set.push(("train.seed".into(), seed.to_string()));
    }
    // The output folder is checked before anything is compiled or read.
    let out = match &arguments.out {
        Some(out) => out.clone(),
        None => PathBuf::from("runs").join(arguments.source.model()?.name),
    };
    if let Some(adapter) = arguments.adapter.as_ref().filter(|adapter| overwrite::is_within(adapter, &out)) {
        return Err(Failure::Usage(format!(
            "{}: it holds {}, which the run starts from and would overwrite; name another `--out`",
            out.display(),
            adapter.display()
        )));
    }
    let state = match arguments.resume {
        true => Some(State::open(&out)?),
        false => {
            arguments.overwrite.files(
                &out,
                &train::blocking_files(&out),
                "continue the run there with `--resume`, ",
            )?;
            None
        }
    };
    arguments.weights = checkpoint::resolve(&arguments.weights)?;
    let mut ready = arguments.source.open()?;
    let model = &ready.model;
    let tokenizer = tokenizer::find(arguments.tokenizer.as_deref(), &arguments.weights, &arguments.data[0], model)?;
    super::say(&Budget::of(model, tokenizer.appended()).table());
    let read = |files: &[PathBuf]| arguments.rows.read(files, model, &tokenizer);
    let hold_out = model.train.hold_out;
    if hold_out > 0 && !arguments.dev.is_empty() {
        let why = "`train.hold_out` takes the held-out data from `--data`, and `--dev` names other data; leave \
                   `--dev` out, \
                   or use `--set train.hold_out=0`";
        return Err(Failure::Usage(why.into()));
    }
    let mut train = read(&arguments.data)?;
    let mut dev = if arguments.dev.is_empty() { None } else { Some(read(&arguments.dev)?) };
    if hold_out > 0 {
        let (rest, held) = train.hold_out(hold_out, model.train.seed)?;
        super::say(&format!(
            "{} examples to train on; {hold_out} rows are held out by the seed {}, with {} examples",
            rest.len(),
            model.train.seed,
            held.len()
        ));
        (train, dev) = (rest, Some(held));
    }
    train::check_batch_size(&model.train, &train)?;
    drop(tokenizer);
    if dev.is_none() && model.train.patience.is_some() {
        let why =
            "`train.patience` counts evaluations on held-out data; name them with `--dev`, or set `train.hold_out`";
        return Err(Failure::Usage(why.into()));
    }

    let (loaded, adapter) =
        adapters::weights(&arguments.weights, model, arguments.adapter.as_deref(), state.is_some())?;
    adapter.as_ref().map_or(Ok(()), Adapter::reject_residuals_for_training)?;
    let base = Base::of(model, &loaded);
    let total = train::total(&model.train, &train);
    let identity = Identity::of(model, &base, &train, dev.as_ref(), total).starting_from(adapter.as_ref());
    if let Some(state) = &state {
        state.fallback.iter().for_each(|note| super::say(note));
        state.check(model, &identity)?.iter().for_each(|note| super::say(note));
        let judged = state.evaluations(&identity);
        // A run that was killed after its last state may lack its last adapter or evaluation; then it is ended once
        // more.
        let whole = adapters::step_of(&out.join(adapters::ADAPTER)) == Some(state.step)
            && (dev.is_none() || judged.step == Some(state.step));
        if whole && model.train.patience.is_some_and(|patience| judged.since >= patience) {
            super::print(&format!(
                "{} is finished: {} evaluations in a row were no better than {}, and nothing was changed; \
                 `--set train.patience=N` lets the run go on",
                out.display(),
                judged.since,
                best(&judged)
            ));
            return Ok(());
        }
        if state.step >= total && whole {
            super::print(&format!(
                "{} is finished: {} of {total} steps are done, and nothing was changed; \
                 `--set train.steps=N` or `--set train.epochs=N` makes the run longer",
                out.display(),
                state.step
            ));
            return Ok(());
        }
    }
    let sums: &[OptimizerEntry] = if ready.model.train.accumulate > 1 { &[Accumulate, Accumulated] } else { &[] };
    let average = ready.model.train.average.map(|_| Average);
    let of_optimizer = [Update].iter().chain(sums).chain(&average).map(|entry| entry.name());
    let of_model = [Entry::Init, Entry::Train, Entry::Eval].map(Entry::name);
    let program = ready.program(&of_model.into_iter().chain(of_optimizer).collect::<Vec<_>>())?;
    let mut session = Session::new(program, loaded.tensors, arguments.source.threads)?;
    session.initialise()?;
    if let Some(adapter) = &adapter {
        adapters::apply(&mut session, &adapter.values)?;
    }
    if arguments.profile {
        session.profile = Some(Default::default());
    }
    let stop = interrupt::flag().map_err(|e| RuntimeError::Device(format!("signals cannot be handled: {e}")))?;
    let training = Training {
        model: &ready.model,
        session: &mut session,
        train: &train,
        dev: dev.as_ref(),
        out,
        base: &base,
        identity,
        state,
        stop: &stop,
    };
    let outcome = training.run()?;

    if let Some(profile) = &session.profile {
        super::say(&table(profile));
        let share = outcome.kernel_seconds / outcome.seconds.max(1e-9);
        super::say(&format!("steps spent {:.2}% of their time in kernels", 100.0 * share));
    }
    super::print(&format!(
        "{} steps in {:.1} s, {:.0} tokens/s, peak {:.2} GB",
        outcome.steps,
        outcome.seconds,
        outcome.tokens as f64 / outcome.seconds.max(1e-9),
        peak(&session) as f64 / 1e9
    ));
    // The first and last loss are means over a tenth of the steps, which is a single step in a short run.
    let (first, last) = (outcome.first, outcome.last);
    match outcome.steps {
        0 => {}
        1..20 => super::print(&format!("loss {first:.4} at the first step, {last:.4} at the last")),
        _ => super::print(&format!("mean loss {first:.4} over the first tenth of the steps, {last:.4} over the last")),
    }
    if let (Some(before), Some(after)) = (&outcome.before, &outcome.after) {
        super::print(&format!("held out: {} before\n          {} after", before.describe(), after.describe()));
    }
    if outcome.ending == Ending::Stopped {
        return Err(Failure::Stopped(format!(
            "stopped and saved after step {} of {total}; the run goes on with\n  {}",
            outcome.done,
            interrupt::resume_command()
        )));
    }
    if outcome.ending == Ending::OutOfPatience {
        super::print(&format!(
            "ended after step {} of {total}: {} evaluations in a row were no better than {}",
            outcome.done,
            outcome.evaluations.since,
            best(&outcome.evaluations)
        ));
    }
    if dev.is_some() && outcome.evaluations.best.is_some() {
        super::print(&format!(
            "best: {}, {}",
            outcome.adapter.with_file_name(adapters::BEST).display(),
            best(&outcome.evaluations)
        ));
    }
    let size = std::fs::metadata(&outcome.adapter).map_or(0, |m| m.len());
    super::print(&format!("adapter: {} ({:.0} KB)", outcome.adapter.display(), size as f64 / 1e3));
    Ok(())
}

fn best(judged: &EvaluationHistory) -> String {
    judged.best.map_or_else(String::new, |best| format!("the loss {:.4} at step {}", best.loss, best.step))
}

/// The peak memory of this process in bytes. On a GPU, or if the system does not report it, the session's own peak.
fn peak(session: &Session) -> u64 {
    if session.manifest().gpu().is_some() {
        return session.peak_bytes();
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kilobytes.map_or(session.peak_bytes(), |kb| kb * 1024)
}

/// The 24 operations with the longest time: share, seconds and number of launches.
fn table(profile: &peft_runtime::Profile) -> String {
    let mut rows: Vec<(&String, &(Duration, u64))> = profile.iter().collect();
    rows.sort_by_key(|(_, (time, _))| std::cmp::Reverse(*time));
    let all: f64 = rows.iter().map(|(_, (time, _))| time.as_secs_f64()).sum();
    let line = |(op, (time, count)): &(&String, &(Duration, u64))| {
        let seconds = time.as_secs_f64();
        format!("  {:>6.1}% {seconds:>9.3} s {count:>7} × {op}", 100.0 * seconds / all)
    };
    rows.iter().take(24).map(line).collect::<Vec<_>>().join("\n")
}
