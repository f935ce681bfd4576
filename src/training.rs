//! Training: a step is a run of `train` and one of `update`; around it rates, batches, figures, files.

mod schedule;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use peft_grammar::model::{Model, Recipe, TaskKind};
use peft_runtime::{Inputs, Promise, RuntimeError, Session, adapter};

use crate::adapters::{ADAPTER, Base, trained};
use crate::data::{Batch, Batches, Dataset, Order};
use crate::exchange::inputs;
use crate::failure::Failure;
use crate::hub::peft;
use crate::metrics::{self, Mean, Metrics, correct};
use crate::progress::{Progress, Step};
use crate::state::{self, Identity, STATE, State};

pub use schedule::{rate, stable};

/// Sends the batch of a step on its way, with all that the step is told. The one before may still run.
fn stage(session: &mut Session, recipe: &Recipe, batch: &Batch, step: u64, total: u64) -> Result<(), RuntimeError> {
    let floats = BTreeMap::from([("hyper".to_string(), recipe.hyper(rate(recipe, step, total), step))]);
    let inputs = Inputs { floats, ..inputs(batch, [recipe.seed as i32, step as i32]) };
    session.stage(&["train", "update"], &inputs)
}

/// Starts the step that is staged.
fn start(session: &mut Session) -> Result<Promise, RuntimeError> {
    session.start()?;
    session.promise(&["loss", "grad_norm"])
}

/// Waits for the end of a step; gives the loss before it and the gradient's norm before clipping.
fn finish(session: &mut Session, promise: Promise, step: u64) -> Result<(f64, f64), Failure> {
    let found = session.redeem(promise)?;
    let (loss, norm) = (f64::from(found[0]), f64::from(found[1]));
    if !loss.is_finite() || !norm.is_finite() {
        return Err(Failure::Diverged(format!(
            "step {step}: the loss is {loss} and the gradient's norm {norm}; \
             lower `train.lr`, lengthen `train.warmup` or set `train.clip`"
        )));
    }
    Ok((loss, norm))
}

/// One step on one batch.
pub fn step(
    session: &mut Session,
    recipe: &Recipe,
    batch: &Batch,
    step: u64,
    total: u64,
) -> Result<(f64, f64), Failure> {
    stage(session, recipe, batch, step, total)?;
    let promise = start(session)?;
    finish(session, promise, step)
}

/// Figures of a data set under the model as it stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    pub loss: f64,
    /// Of classifiers.
    pub accuracy: Option<f64>,
}

impl Evaluation {
    pub fn describe(&self) -> String {
        match self.accuracy {
            Some(accuracy) => format!("loss {:.4}, accuracy {:.2}%", self.loss, 100.0 * accuracy),
            None => format!("loss {:.4}, perplexity {:.3}", self.loss, self.loss.exp()),
        }
    }
}

/// Runs `eval` over a data set.
pub fn evaluate(session: &mut Session, model: &Model, data: &Dataset) -> Result<Evaluation, Failure> {
    data.not_empty()?;
    let classifies = matches!(model.task.kind, TaskKind::Classification { .. });
    let (mut mean, mut right, mut seen) = (Mean::default(), 0, 0);
    for batch in Batches::new(data, model.train.batch.max(32) as usize, Order::AsStored) {
        session.run("eval", &inputs(&batch, [0, 0]))?;
        let get = |name: &str| session.output(name).ok_or_else(|| RuntimeError::input(name, "is no output"));
        mean.add(f64::from(get("loss")?.1[0]), batch.labels.len() as f64);
        if classifies {
            right += correct(&get("logits")?.1, &batch.labels);
        }
        seen += batch.labels.len();
    }
    let accuracy = classifies.then(|| right as f64 / seen.max(1) as f64);
    Ok(Evaluation { loss: mean.value(), accuracy })
}

/// A training run.
pub struct Training<'a> {
    pub model: &'a Model,
    pub session: &'a mut Session,
    pub train: &'a Dataset,
    pub dev: Option<&'a Dataset>,
    pub out: PathBuf,
    /// What it trains on.
    pub base: &'a Base,
    pub identity: Identity,
    /// Where it goes on.
    pub state: Option<State>,
}

/// The files of an earlier run in `out`, and of an adapter in PEFT's format, which would be taken for a run's own.
pub fn earlier(out: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(out).into_iter().flatten().filter_map(|entry| entry.ok());
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    files.retain(|path| KEPT.contains(&name(path)) || metrics::is_file(name(path)) || unfinished(path));
    // What makes a folder a run goes first: a folder that was cleared in part is not taken for one.
    files.sort_by_key(|path| (KEPT.iter().position(|kept| *kept == name(path)).unwrap_or(KEPT.len()), path.clone()));
    files
}

/// What a run keeps, and PEFT of an adapter.
const KEPT: [&str; 4] = [STATE, ADAPTER, peft::CONFIG, peft::MODEL];

/// Those of [`earlier`] that hold something: trained values, a state or figures.
pub fn in_the_way(out: &Path) -> Vec<PathBuf> {
    let figures = |path: &Path| name(path) == metrics::LINES && path.metadata().is_ok_and(|found| found.len() > 0);
    let mut files = earlier(out);
    files.retain(|path| KEPT.contains(&name(path)) || figures(path));
    files
}

/// It was being written when a run was killed.
fn unfinished(path: &Path) -> bool {
    name(path).starts_with(adapter::BESIDE)
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn remove(files: &[PathBuf], which: impl Fn(&Path) -> bool) -> Result<(), Failure> {
    files.iter().filter(|path| which(path)).try_for_each(|path| fs::remove_file(path).map_err(Failure::file(path)))
}

/// Steps of a whole run.
pub fn total(recipe: &Recipe, train: &Dataset) -> u64 {
    let epoch = train.steps_per_epoch(recipe.batch as usize) as u64;
    recipe.steps.unwrap_or((recipe.epochs * epoch as f64).ceil() as u64)
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub steps: u64,
    /// Mean losses of the first and the last tenth of the run.
    pub first: f64,
    pub last: f64,
    pub before: Option<Evaluation>,
    pub after: Option<Evaluation>,
    pub seconds: f64,
    /// Of them in kernels, if the session takes a profile.
    pub kernel_seconds: f64,
    /// Real tokens.
    pub tokens: u64,
    pub adapter: PathBuf,
}

impl Training<'_> {
    /// Trains to the end. A new run's folder is rid of what an earlier one left there.
    pub fn run(mut self) -> Result<Outcome, Failure> {
        self.train.not_empty()?;
        let recipe = self.model.train.clone();
        let total = total(&recipe, self.train);
        let epoch = self.train.steps_per_epoch(recipe.batch as usize) as u64;
        fs::create_dir_all(&self.out).map_err(Failure::file(&self.out))?;
        let mut done = 0;
        let mut metrics = match &self.state {
            Some(state) => {
                state.restore(self.session)?;
                remove(&earlier(&self.out), unfinished)?;
                done = state.step;
                Metrics::resume(&self.out, done)?
            }
            None => {
                remove(&earlier(&self.out), |_| true)?;
                Metrics::create(&self.out)?
            }
        };
        let before = match self.dev {
            Some(dev) if done == 0 => Some(evaluate(self.session, self.model, dev)?),
            _ => None,
        };
        let mut progress = Progress::new(total, done);
        if let Some(before) = before {
            progress.line(&format!("before training: {}", before.describe()));
            record(&mut metrics, done, &before)?;
        }
        let mut after = None;
        let mut losses = vec![];
        let (mut tokens, mut seconds, mut kernel_seconds) = (0, 0.0, 0.0);
        let mut at = done;
        while at < total {
            let order = Order::Shuffled { seed: recipe.seed, epoch: at / epoch };
            let batches = Batches::new(self.train, recipe.batch as usize, order).skip((at % epoch) as usize);
            let mut batches = batches.take((total - at) as usize);
            let mut begun = Instant::now();
            let (mut staged, mut running, mut sent) = (None, VecDeque::new(), at);
            loop {
                if let Some(batch) = staged.take() {
                    let in_kernels = kernels(self.session);
                    let promise = start(self.session)?;
                    let in_kernels = kernels(self.session).zip(in_kernels).map(|(after, before)| after - before);
                    running.push_back((batch, promise, in_kernels));
                }
                // While a GPU is at a step, the next batch is made and sent, to where the step before the one it is at
                // had its own.
                if running.len() < 2
                    && let Some(batch) = batches.next()
                {
                    stage(self.session, &recipe, &batch, sent, total)?;
                    sent += 1;
                    staged = Some(batch);
                }
                // And the next step waits there for the one it is at.
                if staged.is_some() && (running.is_empty() || self.session.overlaps()) {
                    continue;
                }
                let Some((batch, promise, in_kernels)) = running.pop_front() else { break };
                let (loss, norm) = finish(self.session, promise, at)?;
                // From batch to batch: making one is a part of it, and writing figures down.
                let time = begun.elapsed();
                begun += time;
                let count = batch.tokens() as u64;
                let lr = rate(&recipe, at, total);
                at += 1;
                losses.push(loss);
                tokens += count;
                seconds += time.as_secs_f64();
                let speed = count as f64 / time.as_secs_f64();
                let mut figures = vec![
                    ("loss", loss),
                    ("lr", lr),
                    ("grad_norm", norm),
                    ("tokens", count as f64),
                    ("tokens_per_second", speed),
                ];
                if let Some(in_kernels) = in_kernels {
                    figures.push(("kernel_share", in_kernels / time.as_secs_f64()));
                    kernel_seconds += in_kernels;
                }
                metrics.record(at, &figures)?;
                progress.step(Step { loss, lr, tokens: count, time });
            }
            self.save(at)?;
            if let Some(dev) = self.dev {
                let figures = evaluate(self.session, self.model, dev)?;
                progress.line(&format!("after step {at}: {}", figures.describe()));
                record(&mut metrics, at, &figures)?;
                after = Some(figures);
            }
        }
        progress.finish();
        if done == at {
            self.save(at)?;
        }
        let tenth = (losses.len() / 10).max(1).min(losses.len());
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
        let (first, last) = (mean(&losses[..tenth]), mean(&losses[losses.len() - tenth..]));
        let adapter = self.out.join(ADAPTER);
        Ok(Outcome { steps: at - done, first, last, before, after, seconds, kernel_seconds, tokens, adapter })
    }

    /// The state goes first: if the adapter cannot be written, a resumed run writes it.
    fn save(&mut self, step: u64) -> Result<(), Failure> {
        state::save(&self.out, self.session, self.model, &self.identity, step)?;
        Ok(adapter::save(&self.out.join(ADAPTER), &trained(self.session, self.model, self.base, step)?)?)
    }
}

/// Seconds in kernels so far, if the session takes a profile.
fn kernels(session: &Session) -> Option<f64> {
    session.profile.as_ref().map(|profile| profile.values().map(|(time, _)| time.as_secs_f64()).sum())
}

fn record(metrics: &mut Metrics, step: u64, figures: &Evaluation) -> Result<(), Failure> {
    let mut all = vec![("dev/loss", figures.loss)];
    match figures.accuracy {
        Some(accuracy) => all.push(("dev/accuracy", accuracy)),
        None => all.push(("dev/perplexity", figures.loss.exp())),
    }
    Ok(metrics.record(step, &all)?)
}
