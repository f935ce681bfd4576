//! Training: a step is a run of `train` and one of `update`; around it rates, batches, figures, files.

mod folder;
mod schedule;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use peft_grammar::model::{Every, Model, Recipe};
use peft_runtime::{Inputs, Promise, RuntimeError, Session, adapter};

use crate::adapters::{ADAPTER, BEST, Base, trained};
use crate::data::{Batch, Batches, Dataset, Order};
use crate::exchange::inputs;
use crate::failure::Failure;
use crate::metrics::{Mean, Metrics, correct};
use crate::progress::{Progress, Step};
use crate::state::{self, Identity, Judged, State};

pub use folder::{earlier, in_the_way};
pub use schedule::{rate, stable};

/// A batch of a step.
struct Part {
    batch: Batch,
    /// Its place among the step's batches.
    index: usize,
    /// It is the last one: the optimizer follows it.
    last: bool,
    /// Its share of the step's targets; a step's loss and gradient are means over all of them.
    share: f64,
}

fn parts(batches: Vec<Batch>) -> impl Iterator<Item = Part> {
    let targets: usize = batches.iter().map(|batch| batch.labels.len()).sum();
    let count = batches.len();
    batches.into_iter().enumerate().map(move |(index, batch)| {
        let share = batch.labels.len() as f64 / targets.max(1) as f64;
        Part { batch, index, last: index + 1 == count, share }
    })
}

/// Sends a batch of a step on its way, with all that the step is told. The one before may still run.
fn stage(session: &mut Session, recipe: &Recipe, part: &Part, step: u64, total: u64) -> Result<(), RuntimeError> {
    let share = part.share as f32;
    let (entries, shares) = match (part.index, part.last) {
        (0, true) => (&["train", "update"][..], None),
        (0, false) => (&["train", "accumulate"][..], Some([0.0, share])),
        (_, false) => (&["train", "accumulate"][..], Some([1.0, share])),
        (_, true) => (&["train", "accumulated", "update"][..], Some([share, 1.0])),
    };
    let mut floats = BTreeMap::from([("hyper".to_string(), recipe.hyper(rate(recipe, step, total), step))]);
    floats.extend(shares.map(|shares| ("shares".to_string(), shares.to_vec())));
    // Each batch draws what it drops by a number of its own.
    let draw = step * recipe.accumulate + part.index as u64;
    let inputs = Inputs { floats, ..inputs(&part.batch, [recipe.seed as i32, draw as i32]) };
    session.stage(entries, &inputs)
}

/// Starts the batch that is staged.
fn start(session: &mut Session, last: bool) -> Result<Promise, RuntimeError> {
    session.start()?;
    session.promise(if last { &["loss", "grad_norm"] } else { &["loss"] })
}

/// Waits for the end of a batch; gives its loss before the step and, of the last batch of a step, the gradient's norm
/// before clipping.
fn finish(session: &mut Session, promise: Promise, step: u64) -> Result<(f64, f64), Failure> {
    let found = session.redeem(promise)?;
    let (loss, norm) = (f64::from(found[0]), found.get(1).copied().map_or(0.0, f64::from));
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
    step_of_several(session, recipe, vec![batch.clone()], step, total)
}

/// One step on several batches, as if they were one: its loss, and the gradient's norm.
pub fn step_of_several(
    session: &mut Session,
    recipe: &Recipe,
    batches: Vec<Batch>,
    step: u64,
    total: u64,
) -> Result<(f64, f64), Failure> {
    let (mut loss, mut norm) = (0.0, 0.0);
    for part in parts(batches) {
        stage(session, recipe, &part, step, total)?;
        let promise = start(session, part.last)?;
        let found = finish(session, promise, step)?;
        loss += part.share * found.0;
        norm = found.1;
    }
    Ok((loss, norm))
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
    let found = evaluate_until(&AtomicBool::new(false), session, model, data)?;
    Ok(found.expect("nothing stops it"))
}

/// The same; gives nothing if it is stopped.
fn evaluate_until(
    stop: &AtomicBool,
    session: &mut Session,
    model: &Model,
    data: &Dataset,
) -> Result<Option<Evaluation>, Failure> {
    data.not_empty()?;
    let classifies = model.task.kind.classifies();
    let (mut mean, mut right, mut seen) = (Mean::default(), 0, 0);
    for batch in Batches::new(data, model.train.batch.max(32) as usize, Order::AsStored) {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        session.run("eval", &inputs(&batch, [0, 0]))?;
        let get = |name: &str| session.output(name).ok_or_else(|| RuntimeError::input(name, "is no output"));
        mean.add(f64::from(get("loss")?.1[0]), batch.labels.len() as f64);
        if classifies {
            right += correct(&get("logits")?.1, &batch.labels);
        }
        seen += batch.labels.len();
    }
    let accuracy = classifies.then(|| right as f64 / seen.max(1) as f64);
    Ok(Some(Evaluation { loss: mean.value(), accuracy }))
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
    /// Ends it early: the step that runs is finished and the state saved.
    pub stop: &'a AtomicBool,
}

/// Steps of a whole run.
pub fn total(recipe: &Recipe, train: &Dataset) -> u64 {
    let epoch = train.steps_per_epoch(recipe.sequences() as usize) as u64;
    recipe.steps.unwrap_or((recipe.epochs * epoch as f64).ceil() as u64)
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All steps are done.
    Whole,
    /// `train.patience` is at its end.
    Patience,
    /// [`Training::stop`] was set.
    Stopped,
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub ending: Ending,
    /// Steps taken now, and by the whole run so far.
    pub steps: u64,
    pub done: u64,
    pub judged: Judged,
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
        let epoch = self.train.steps_per_epoch(recipe.sequences() as usize) as u64;
        fs::create_dir_all(&self.out).map_err(Failure::file(&self.out))?;
        let (mut done, mut judged) = (0, Judged::default());
        let mut metrics = match &self.state {
            Some(state) => {
                state.restore(self.session)?;
                folder::remove(&earlier(&self.out), folder::unfinished)?;
                (done, judged) = (state.step, state.judged(&self.identity));
                Metrics::resume(&self.out, done)?
            }
            None => {
                folder::remove(&earlier(&self.out), |_| true)?;
                Metrics::create(&self.out)?
            }
        };
        let before = match self.dev {
            Some(dev) if done == 0 => evaluate_until(self.stop, self.session, self.model, dev)?,
            _ => None,
        };
        let mut progress = Progress::new(total, done);
        if let Some(before) = before {
            progress.line(&format!("before training: {}", before.describe()));
            record(&mut metrics, done, &before)?;
        }
        let mut after = None;
        let has_dev = self.dev.is_some();
        let judges = |at: u64| has_dev && (at == total || recipe.evaluate.due(at, epoch));
        // How the run ends after an evaluation, which may have been stopped.
        let ending_at = |at: u64, found: Option<Evaluation>, judged: &Judged| match recipe.patience {
            _ if found.is_none() => Ending::Stopped,
            Some(patience) if at < total && judged.since >= patience => Ending::Patience,
            _ => Ending::Whole,
        };
        let mut ending = Ending::Whole;
        // A run that was stopped within an evaluation makes up for it.
        if done > 0 && judges(done) && judged.step != Some(done) {
            after = self.judge(done, &mut judged, &mut metrics, &mut progress)?;
            ending = ending_at(done, after, &judged);
        }
        let mut losses = vec![];
        let (mut tokens, mut seconds, mut kernel_seconds) = (0, 0.0, 0.0);
        let mut at = done;
        let mut saved = self.state.as_ref().map(|state| (state.step, Instant::now()));
        let begin = Instant::now();
        while at < total && ending == Ending::Whole {
            let late = |saved: Option<(u64, Instant)>| match recipe.save {
                Every::Seconds(most) => saved.map_or(begin, |(_, when)| when).elapsed().as_secs() >= most,
                _ => false,
            };
            // Up to the next step at which there is something else to do.
            let next = [recipe.save.next(at, epoch), recipe.evaluate.next(at, epoch), Every::Epoch.next(at, epoch)];
            let until = next.into_iter().flatten().fold(total, u64::min);
            let order = Order::Shuffled { seed: recipe.seed, epoch: at / epoch };
            let several = recipe.accumulate as usize;
            let mut batches =
                Batches::new(self.train, recipe.batch as usize, order).skip((at % epoch) as usize * several);
            let mut begun = Instant::now();
            let (mut staged, mut running, mut queue, mut closing) = (None, VecDeque::new(), VecDeque::new(), false);
            let mut sent = at;
            let (mut loss, mut count, mut spent) = (0.0, 0, None);
            loop {
                // At a halt a step that was begun is finished, and one that is only staged is not begun.
                if closing && staged.take_if(|part: &mut Part| part.index == 0).is_some() {
                    queue.clear();
                }
                if let Some(part) = staged.take() {
                    let in_kernels = kernels(self.session);
                    let promise = start(self.session, part.last)?;
                    let in_kernels = kernels(self.session).zip(in_kernels).map(|(after, before)| after - before);
                    running.push_back((part, promise, in_kernels));
                }
                // While a GPU is at a batch, the next one is made and sent, to where the batch before the one it is at
                // had its own.
                if running.len() < 2 {
                    if queue.is_empty() && !closing && sent < until {
                        queue.extend(parts(batches.by_ref().take(several).collect()));
                        sent += 1;
                    }
                    if let Some(part) = queue.pop_front() {
                        stage(self.session, &recipe, &part, sent - 1, total)?;
                        staged = Some(part);
                    }
                }
                // And the next step waits there for the one it is at.
                if staged.is_some() && (running.is_empty() || self.session.overlaps()) {
                    continue;
                }
                let Some((part, promise, in_kernels)) = running.pop_front() else { break };
                let (part_loss, norm) = finish(self.session, promise, at)?;
                loss += part.share * part_loss;
                count += part.batch.tokens() as u64;
                spent = in_kernels.map(|in_kernels: f64| in_kernels + spent.unwrap_or(0.0));
                if !part.last {
                    continue;
                }
                // From step to step: making its batches is a part of it, and writing figures down.
                let time = begun.elapsed();
                begun += time;
                let (loss, count) = (std::mem::take(&mut loss), std::mem::take(&mut count));
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
                if let Some(in_kernels) = spent.take() {
                    figures.push(("kernel_share", in_kernels / time.as_secs_f64()));
                    kernel_seconds += in_kernels;
                }
                metrics.record(at, &figures)?;
                progress.step(Step { loss, lr, tokens: count, time });
                closing |= self.stop.load(Ordering::Relaxed) || late(saved);
            }
            // A run that is stopped at the end of its last step is whole, but for an evaluation.
            if self.stop.load(Ordering::Relaxed) && at < total {
                ending = Ending::Stopped;
            }
            if judges(at) && ending == Ending::Whole {
                after = self.judge(at, &mut judged, &mut metrics, &mut progress)?;
                ending = ending_at(at, after, &judged);
            }
            if at == total || ending != Ending::Whole || recipe.save.due(at, epoch) || late(saved) {
                self.save(at, &judged, saved.is_some_and(|(step, _)| step == at))?;
                saved = Some((at, Instant::now()));
            }
        }
        progress.finish();
        if done == at {
            self.save(at, &judged, self.state.is_some())?;
        }
        let tenth = (losses.len() / 10).max(1).min(losses.len());
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
        let (first, last) = (mean(&losses[..tenth]), mean(&losses[losses.len() - tenth..]));
        Ok(Outcome {
            ending,
            steps: at - done,
            done: at,
            judged,
            first,
            last,
            before,
            after,
            seconds,
            kernel_seconds,
            tokens,
            adapter: self.out.join(ADAPTER),
        })
    }

    /// Runs over the held-out data, if there are any; keeps the values if they are the best so far. Gives nothing if it
    /// is stopped.
    fn judge(
        &mut self,
        at: u64,
        judged: &mut Judged,
        metrics: &mut Metrics,
        progress: &mut Progress,
    ) -> Result<Option<Evaluation>, Failure> {
        let Some(dev) = self.dev else { return Ok(None) };
        let Some(figures) = evaluate_until(self.stop, self.session, self.model, dev)? else { return Ok(None) };
        progress.line(&format!("after step {at}: {}", figures.describe()));
        record(metrics, at, &figures)?;
        if judged.add(at, figures.loss) {
            adapter::save(&self.out.join(BEST), &trained(self.session, self.model, self.base, at)?)?;
        }
        Ok(Some(figures))
    }

    /// The state goes first: if the adapter cannot be written, a resumed run writes it.
    fn save(&mut self, step: u64, judged: &Judged, again: bool) -> Result<(), Failure> {
        state::save(&self.out, self.session, self.model, &self.identity, step, judged, again)?;
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
