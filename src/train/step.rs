//! One step of the optimizer, on one batch or on several, and a stretch of steps that overlap.

use std::collections::VecDeque;
use std::time::Instant;

use peft_grammar::model::Recipe;
use peft_grammar::names::OptimizerEntry::{Accumulate, Accumulated, Average, Update};
use peft_grammar::names::{Entry, GRAD_NORM, Input, LOSS, OptimizerEntry};
use peft_runtime::{Promise, RuntimeError, Session};

use super::rate;
use crate::data::{Batch, Batches};
use crate::exchange::inputs;
use crate::failure::Failure;

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
    let targets: usize = batches.iter().map(Batch::asked).sum();
    let count = batches.len();
    batches.into_iter().enumerate().map(move |(index, batch)| {
        let share = batch.asked() as f64 / targets.max(1) as f64;
        Part { batch, index, last: index + 1 == count, share }
    })
}

/// Sends a batch of a step on its way, with all that the step is told. The one before may still run.
fn stage(session: &mut Session, recipe: &Recipe, part: &Part, step: u64, total: u64) -> Result<(), RuntimeError> {
    let share = part.share as f32;
    let (behind, shares) = match (part.index, part.last) {
        (0, true) => (&[Update][..], None),
        (0, false) => (&[Accumulate][..], Some([0.0, share])),
        (_, false) => (&[Accumulate][..], Some([1.0, share])),
        (_, true) => (&[Accumulated, Update][..], Some([share, 1.0])),
    };
    let average = recipe.average_shares(step).filter(|_| part.last);
    let told = [
        (Input::Hyper, Some(recipe.hyper(rate(recipe, step, total), step))),
        (Input::Shares, shares.map(|shares| shares.to_vec())),
        (Input::AverageShares, average.map(|shares| shares.map(|share| share as f32).to_vec())),
    ];
    let floats = told.into_iter().filter_map(|(input, numbers)| Some((input.name().to_string(), numbers?)));
    let behind = behind.iter().copied().chain(average.map(|_| Average));
    let entries: Vec<&str> = [Entry::Train.name()].into_iter().chain(behind.map(OptimizerEntry::name)).collect();
    // Each batch draws what it drops by a number of its own.
    let draw = step * recipe.accumulate + part.index as u64;
    let mut inputs = inputs(&part.batch, [recipe.seed as i32, draw as i32]);
    inputs.floats.extend(floats);
    session.stage(&entries, &inputs)
}

/// Starts the batch that is staged.
fn start(session: &mut Session, last: bool) -> Result<Promise, RuntimeError> {
    session.start()?;
    session.promise(if last { &[LOSS, GRAD_NORM] } else { &[LOSS] })
}

/// Waits for the end of a batch; gives its loss before the step and, of the last batch of a step, the gradient's norm
/// before clipping.
fn finish(session: &mut Session, promise: Promise, step: u64) -> Result<(f64, f64), Failure> {
    let found = session.redeem(promise)?;
    let (loss, norm) = (f64::from(found[0]), found.get(1).copied().map_or(0.0, f64::from));
    if !loss.is_finite() || !norm.is_finite() {
        return Err(diverged(step + 1, &format!("the loss is {loss} and the gradient's norm {norm}")));
    }
    Ok((loss, norm))
}

/// What is wrong at a step, counted from 1, and what may mend it.
pub(super) fn diverged(step: u64, what: &str) -> Failure {
    Failure::Diverged(format!("step {step}: {what}; lower `train.lr`, lengthen `train.warmup` or set `train.clip`"))
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

/// What a step came to.
pub(super) struct Done {
    pub loss: f64,
    /// The gradient's norm before clipping.
    pub norm: f64,
    pub tokens: u64,
    /// Seconds in kernels, if the session takes a profile.
    pub in_kernels: Option<f64>,
}

/// A batch that has been started.
struct Running {
    part: Part,
    promise: Promise,
    in_kernels: Option<f64>,
}

/// Steps one after the other. While a batch runs, the next one is packed and sent, and on a GPU it is started too: it
/// waits there for the one before it.
pub(super) struct Stretch<'a> {
    batches: Batches<'a>,
    recipe: &'a Recipe,
    /// Steps of the whole run.
    total: u64,
    /// The first step of which nothing is sent yet, and the one at which the stretch ends.
    next: u64,
    end: u64,
    /// The step whose end comes next.
    at: u64,
    queue: VecDeque<Part>,
    staged: Option<Part>,
    running: VecDeque<Running>,
    closing: bool,
}

impl<'a> Stretch<'a> {
    /// Steps `steps` of a run of `total`; `batches` begin with those of the first one.
    pub fn new(batches: Batches<'a>, recipe: &'a Recipe, steps: std::ops::Range<u64>, total: u64) -> Self {
        Stretch {
            batches,
            recipe,
            total,
            next: steps.start,
            end: steps.end,
            at: steps.start,
            queue: VecDeque::new(),
            staged: None,
            running: VecDeque::new(),
            closing: false,
        }
    }

    /// No step is begun any more; one that was begun is finished.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// Finishes the next step; `None` at the end.
    pub fn step(&mut self, session: &mut Session) -> Result<Option<Done>, Failure> {
        let mut done = Done { loss: 0.0, norm: 0.0, tokens: 0, in_kernels: None };
        while let Some(Running { part, promise, in_kernels }) = self.next_running(session)? {
            let (loss, norm) = finish(session, promise, self.at)?;
            done.loss += part.share * loss;
            done.norm = norm;
            done.tokens += part.batch.tokens() as u64;
            done.in_kernels = in_kernels.map(|seconds| seconds + done.in_kernels.unwrap_or(0.0));
            if part.last {
                self.at += 1;
                return Ok(Some(done));
            }
        }
        Ok(None)
    }

    /// The earliest batch that runs, once the one behind it is sent.
    fn next_running(&mut self, session: &mut Session) -> Result<Option<Running>, Failure> {
        loop {
            // A step that is only staged is not begun.
            if self.closing && self.staged.take_if(|part| part.index == 0).is_some() {
                self.queue.clear();
            }
            if let Some(part) = self.staged.take() {
                let before = seconds_in_kernels(session);
                let promise = start(session, part.last)?;
                let in_kernels = seconds_in_kernels(session).zip(before).map(|(after, before)| after - before);
                self.running.push_back(Running { part, promise, in_kernels });
            }
            // The next batch is made and sent to where the batch before the one that runs had its own.
            if self.running.len() < 2 {
                self.stage_next(session)?;
            }
            if self.staged.is_none() || !(self.running.is_empty() || session.overlaps()) {
                return Ok(self.running.pop_front());
            }
        }
    }

    /// Packs and sends the next batch, if there is one.
    fn stage_next(&mut self, session: &mut Session) -> Result<(), RuntimeError> {
        if self.queue.is_empty() && !self.closing && self.next < self.end {
            let begun = Instant::now();
            let several = self.recipe.accumulate as usize;
            self.queue.extend(parts(self.batches.by_ref().take(several).collect()));
            self.next += 1;
            took(session, "reading and packing batches", begun);
        }
        if let Some(part) = self.queue.pop_front() {
            let begun = Instant::now();
            stage(session, self.recipe, &part, self.next - 1, self.total)?;
            self.staged = Some(part);
            took(session, "sending batches", begun);
        }
        Ok(())
    }
}

/// Adds to the profile, if the session takes one, what was done beside the kernels.
fn took(session: &mut Session, what: &str, begun: Instant) {
    if let Some(profile) = &mut session.profile {
        let (time, count) = profile.entry(what.into()).or_default();
        *time += begun.elapsed();
        *count += 1;
    }
}

/// Seconds in kernels so far, if the session takes a profile.
fn seconds_in_kernels(session: &Session) -> Option<f64> {
    session.profile.as_ref().map(|profile| profile.values().map(|(time, _)| time.as_secs_f64()).sum())
}
