//! Optimizer steps on one or several batches, and a pipeline of overlapping steps.

use std::collections::VecDeque;
use std::time::Instant;

use peft_grammar::model::Recipe;
use peft_grammar::names::OptimizerEntry::{Accumulate, Accumulated, Average, Update};
use peft_grammar::names::{Entry, GRAD_NORM, Input, LOSS, OptimizerEntry};
use peft_runtime::{PendingOutputs, RuntimeError, Session};

use super::rate;
use crate::data::{Batch, Batches};
use crate::exchange::inputs;
use crate::failure::Failure;

/// One of the batches whose gradients a step accumulates.
struct MicroBatch {
    batch: Batch,
    /// The batch's index within the step.
    index: usize,
    /// Whether the batch is the step's last one, after which the optimizer runs.
    last: bool,
    /// The batch's share of the step's targets, because a step's loss and gradient are means over all of them.
    share: f64,
}

fn micro_batches(batches: Vec<Batch>) -> impl Iterator<Item = MicroBatch> {
    let targets: usize = batches.iter().map(Batch::target_count).sum();
    let count = batches.len();
    batches.into_iter().enumerate().map(move |(index, batch)| {
        let share = batch.target_count() as f64 / targets.max(1) as f64;
        MicroBatch { batch, index, last: index + 1 == count, share }
    })
}

/// Packs and uploads the inputs of a batch. The previous batch may still be running.
fn stage(session: &mut Session, recipe: &Recipe, part: &MicroBatch, step: u64, total: u64) -> Result<(), RuntimeError> {
    let share = part.share as f32;
    let (behind, shares) = match (part.index, part.last) {
        (0, true) => (&[Update][..], None),
        (0, false) => (&[Accumulate][..], Some([0.0, share])),
        (_, false) => (&[Accumulate][..], Some([1.0, share])),
        (_, true) => (&[Accumulated, Update][..], Some([share, 1.0])),
    };
    let average = recipe.average_weights(step).filter(|_| part.last);
    let told = [
        (Input::Hyper, Some(recipe.hyper(rate(recipe, step, total), step))),
        (Input::Shares, shares.map(|shares| shares.to_vec())),
        (Input::AverageShares, average.map(|shares| shares.map(|share| share as f32).to_vec())),
    ];
    let floats = told.into_iter().filter_map(|(input, numbers)| Some((input.name().to_string(), numbers?)));
    let behind = behind.iter().copied().chain(average.map(|_| Average));
    let entries: Vec<&str> = [Entry::Train.name()].into_iter().chain(behind.map(OptimizerEntry::name)).collect();
    // Each batch has its own counter for the random numbers of dropout.
    let draw = step * recipe.accumulate + part.index as u64;
    let mut inputs = inputs(&part.batch, [recipe.seed as i32, draw as i32]);
    inputs.floats.extend(floats);
    session.stage(&entries, &inputs)
}

/// Launches the staged batch.
fn start(session: &mut Session, last: bool) -> Result<PendingOutputs, RuntimeError> {
    session.start()?;
    session.begin_read(if last { &[LOSS, GRAD_NORM] } else { &[LOSS] })
}

/// Waits for a batch. Returns its loss before the step and, for the last batch of a step, the gradient's norm before
/// clipping.
fn finish(session: &mut Session, pending: PendingOutputs, step: u64) -> Result<(f64, f64), Failure> {
    let found = session.finish_read(pending)?;
    let (loss, norm) = (f64::from(found[0]), found.get(1).copied().map_or(0.0, f64::from));
    if !loss.is_finite() || !norm.is_finite() {
        return Err(diverged(step + 1, &format!("the loss is {loss} and the gradient's norm {norm}")));
    }
    Ok((loss, norm))
}

/// The error of a step (counted from 1) with non-finite numbers, and the remedies.
pub(super) fn diverged(step: u64, what: &str) -> Failure {
    Failure::Diverged(format!("step {step}: {what}; lower `train.lr`, lengthen `train.warmup` or set `train.clip`"))
}

/// Runs one step on one batch. Returns its loss and the gradient's norm before clipping.
///
/// # Errors
///
/// The session fails, or the loss or the norm is not finite.
pub fn step(
    session: &mut Session,
    recipe: &Recipe,
    batch: &Batch,
    step: u64,
    total: u64,
) -> Result<(f64, f64), Failure> {
    accumulated_step(session, recipe, vec![batch.clone()], step, total)
}

/// Runs one step that accumulates the gradients of several batches as if they were one. Returns its loss and the
/// gradient's norm before clipping.
///
/// # Errors
///
/// The session fails, or the loss or the norm is not finite.
pub fn accumulated_step(
    session: &mut Session,
    recipe: &Recipe,
    batches: Vec<Batch>,
    step: u64,
    total: u64,
) -> Result<(f64, f64), Failure> {
    let (mut loss, mut norm) = (0.0, 0.0);
    for part in micro_batches(batches) {
        stage(session, recipe, &part, step, total)?;
        let pending = start(session, part.last)?;
        let found = finish(session, pending, step)?;
        loss += part.share * found.0;
        norm = found.1;
    }
    Ok((loss, norm))
}

/// The result of a step.
pub(super) struct StepResult {
    pub loss: f64,
    /// The gradient's norm before clipping.
    pub norm: f64,
    pub tokens: u64,
    /// The seconds spent in kernels, if the session takes a profile.
    pub in_kernels: Option<f64>,
}

/// A batch in flight.
struct InFlight {
    part: MicroBatch,
    pending: PendingOutputs,
    in_kernels: Option<f64>,
}

/// Runs consecutive steps as a pipeline. While a batch runs, the next one is packed and uploaded. On a GPU it is
/// launched too, and waits there for the one before it.
pub(super) struct StepPipeline<'a> {
    batches: Batches<'a>,
    recipe: &'a Recipe,
    /// The number of steps of the whole run.
    total: u64,
    /// The first step of which nothing is staged yet, and the step at which the pipeline ends.
    next: u64,
    end: u64,
    /// The step that finishes next.
    at: u64,
    queue: VecDeque<MicroBatch>,
    staged: Option<MicroBatch>,
    running: VecDeque<InFlight>,
    closing: bool,
}

impl<'a> StepPipeline<'a> {
    /// A pipeline for the steps `steps` of a run of `total` steps. `batches` starts with the batches of the first one.
    pub fn new(batches: Batches<'a>, recipe: &'a Recipe, steps: std::ops::Range<u64>, total: u64) -> Self {
        StepPipeline {
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

    /// Begins no further step. A step that was begun is finished.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// Finishes the next step. Returns `None` after the last one.
    pub fn step(&mut self, session: &mut Session) -> Result<Option<StepResult>, Failure> {
        let mut done = StepResult { loss: 0.0, norm: 0.0, tokens: 0, in_kernels: None };
        while let Some(InFlight { part, pending, in_kernels }) = self.next_in_flight(session)? {
            let (loss, norm) = finish(session, pending, self.at)?;
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

    /// The earliest batch in flight, after the following one has been staged.
    fn next_in_flight(&mut self, session: &mut Session) -> Result<Option<InFlight>, Failure> {
        loop {
            // A step of which nothing but its first batch is staged is not begun.
            if self.closing && self.staged.take_if(|part| part.index == 0).is_some() {
                self.queue.clear();
            }
            if let Some(part) = self.staged.take() {
                let before = seconds_in_kernels(session);
                let pending = start(session, part.last)?;
                let in_kernels = seconds_in_kernels(session).zip(before).map(|(after, before)| after - before);
                self.running.push_back(InFlight { part, pending, in_kernels });
            }
            // The inputs of the next batch overwrite those of the batch before the running one.
            if self.running.len() < 2 {
                self.stage_next(session)?;
            }
            if self.staged.is_none() || !(self.running.is_empty() || session.overlaps()) {
                return Ok(self.running.pop_front());
            }
        }
    }

    /// Packs and uploads the next batch, if there is one.
    fn stage_next(&mut self, session: &mut Session) -> Result<(), RuntimeError> {
        if self.queue.is_empty() && !self.closing && self.next < self.end {
            let begun = Instant::now();
            let several = self.recipe.accumulate as usize;
            self.queue.extend(micro_batches(self.batches.by_ref().take(several).collect()));
            self.next += 1;
            profile_host_work(session, "reading and packing batches", begun);
        }
        if let Some(part) = self.queue.pop_front() {
            let begun = Instant::now();
            stage(session, self.recipe, &part, self.next - 1, self.total)?;
            self.staged = Some(part);
            profile_host_work(session, "sending batches", begun);
        }
        Ok(())
    }
}

/// Adds time spent outside the kernels to the profile, if the session takes one.
fn profile_host_work(session: &mut Session, what: &str, begun: Instant) {
    if let Some(profile) = &mut session.profile {
        let (time, count) = profile.entry(what.into()).or_default();
        *time += begun.elapsed();
        *count += 1;
    }
}

/// The seconds spent in kernels so far, if the session takes a profile.
fn seconds_in_kernels(session: &Session) -> Option<f64> {
    session.profile.as_ref().map(|profile| profile.values().map(|(time, _)| time.as_secs_f64()).sum())
}
