//! Executes a training run: runs steps, and between them evaluates the model and saves it.

use std::fs;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use peft_grammar::model::{Every, Recipe};
use peft_grammar::names::Vector;
use peft_runtime::adapter::{self, Data, TensorFile};

use super::evaluation::evaluate_until;
use super::step::{StepPipeline, StepResult, diverged};
use super::{Ending, Epochs, Evaluation, Outcome, Training, earlier_files, folder, rate};
use crate::adapters::{ADAPTER, BEST, trained_values};
use crate::failure::Failure;
use crate::train::metrics::Metrics;
use crate::train::progress::{Progress, Step};
use crate::train::state::{self, EvaluationHistory};

pub(super) struct Run<'a> {
    training: Training<'a>,
    timetable: Timetable<'a>,
    metrics: Metrics,
    progress: Progress,
    /// The number of steps done when this process began, and the number done now.
    from: u64,
    at: u64,
    evaluations: EvaluationHistory,
    before: Option<Evaluation>,
    after: Option<Evaluation>,
    ending: Ending,
    /// The step of the newest state, and when it was written or read.
    saved: Option<(u64, Instant)>,
    begin: Instant,
    tally: Tally,
}

/// The name of the first trained tensor with a value that is infinite or NaN.
fn non_finite(values: &TensorFile) -> Option<&str> {
    let has_non_finite = |data: &Data| matches!(data, Data::F32(numbers) if numbers.iter().any(|x| !x.is_finite()));
    values.tensors.iter().find(|(_, stored)| has_non_finite(&stored.data)).map(|(name, _)| name.as_str())
}

impl<'a> Run<'a> {
    /// Prepares the folder and the session, either from scratch or from the state to resume.
    pub fn begin(training: Training<'a>) -> Result<Self, Failure> {
        training.train.require_examples()?;
        let timetable = Timetable::of(&training);
        let out = &training.out;
        fs::create_dir_all(out).map_err(Failure::file(out))?;
        let (mut from, mut evaluations, mut kept) = (0, EvaluationHistory::default(), None);
        let metrics = match &training.state {
            Some(state) => {
                state.restore(training.session)?;
                folder::remove(&earlier_files(out), folder::unfinished)?;
                (from, evaluations) = (state.step, state.evaluations(&training.identity));
                kept = folder::preserve_best(out, state, evaluations)?;
                Metrics::resume(out, from)?
            }
            None => {
                folder::remove(&earlier_files(out), |_| true)?;
                Metrics::create(out)?
            }
        };
        let before = match training.dev {
            Some(dev) if from == 0 => evaluate_until(training.stop, training.session, training.model, dev)?,
            _ => None,
        };
        let mut run = Run {
            progress: Progress::new(timetable.total, from),
            saved: None,
            training,
            timetable,
            metrics,
            from,
            at: from,
            evaluations,
            before,
            after: None,
            ending: Ending::Completed,
            begin: Instant::now(),
            tally: Tally::default(),
        };
        if let Some(before) = before {
            run.progress.line(&format!("before training: {}", before.describe()));
            run.metrics.record(from, &before.figures())?;
        }
        if let Some(kept) = kept {
            run.progress.line(&kept);
        }
        // A run that was stopped during an evaluation repeats it. A run whose patience was used up stays ended.
        if from < run.timetable.total && run.evaluations.step == Some(from) && run.out_of_patience() {
            run.ending = Ending::OutOfPatience;
        } else if from > 0 && run.timetable.evaluates_after(from) && run.evaluations.step != Some(from) {
            run.evaluate()?;
        }
        run.saved = run.training.state.as_ref().map(|state| (state.step, Instant::now()));
        run.begin = Instant::now();
        Ok(run)
    }

    pub fn continues(&self) -> bool {
        self.at < self.timetable.total && self.ending == Ending::Completed
    }

    /// Runs the steps up to the next evaluation, save or epoch end.
    pub fn run_steps(&mut self) -> Result<(), Failure> {
        let recipe = self.timetable.recipe.clone();
        let (epoch, steps) = self.timetable.epochs.around(self.at);
        let batches = self.timetable.epochs.batches(epoch);
        let batches = batches.starting_at(((self.at - steps.start) * recipe.accumulate) as usize);
        let steps = self.at..self.timetable.next_event(self.at);
        let mut pipeline = StepPipeline::new(batches, &recipe, steps, self.timetable.total);
        let mut begun = Instant::now();
        while let Some(done) = pipeline.step(self.training.session)? {
            // Time is measured from step to step, so it includes building batches and writing metrics.
            let time = begun.elapsed();
            begun += time;
            self.record(&done, time)?;
            if self.stopped() || self.save_overdue() {
                pipeline.close();
            }
        }
        Ok(())
    }

    /// Writes the metrics of a step.
    fn record(&mut self, done: &StepResult, time: Duration) -> Result<(), Failure> {
        let lr = rate(&self.timetable.recipe, self.at, self.timetable.total);
        self.at += 1;
        self.tally.add(done, time);
        let mut figures = vec![
            ("loss", done.loss),
            ("lr", lr),
            ("grad_norm", done.norm),
            ("tokens", done.tokens as f64),
            ("tokens_per_second", done.tokens as f64 / time.as_secs_f64()),
        ];
        figures.extend(done.in_kernels.map(|in_kernels| ("kernel_share", in_kernels / time.as_secs_f64())));
        self.metrics.record(self.at, &figures)?;
        self.progress.step(Step { loss: done.loss, lr, tokens: done.tokens, time });
        Ok(())
    }

    /// Evaluates and saves if that is due, and decides whether the run ends.
    pub fn evaluate_and_save(&mut self) -> Result<(), Failure> {
        // A run that is stopped after its last step is complete except for an evaluation.
        if self.stopped() && self.at < self.timetable.total {
            self.ending = Ending::Stopped;
        }
        if self.timetable.evaluates_after(self.at) && self.ending == Ending::Completed {
            self.evaluate()?;
        }
        if !self.continues() || self.timetable.saves_after(self.at) || self.save_overdue() {
            self.save()?;
        }
        Ok(())
    }

    fn stopped(&self) -> bool {
        self.training.stop.load(Ordering::Relaxed)
    }

    /// Whether the newest state is older than the interval of `train.save`.
    fn save_overdue(&self) -> bool {
        let since = self.saved.map_or(self.begin, |(_, when)| when);
        matches!(self.timetable.recipe.save, Every::Seconds(most) if since.elapsed().as_secs() >= most)
    }

    /// Evaluates on the held-out data, if there are any, and saves the values if their loss is the lowest so far. The
    /// evaluation may be interrupted, and it may use up the patience.
    fn evaluate(&mut self) -> Result<(), Failure> {
        let Training { dev: Some(dev), model, base, stop, .. } = self.training else { return Ok(()) };
        let at = self.at;
        let values = self.swap_in_averages()?;
        self.after = evaluate_until(stop, self.training.session, model, dev)?;
        let evaluations = trained_values(self.training.session, model, base, at)?;
        self.restore_values(values)?;
        let Some(figures) = self.after else {
            self.ending = Ending::Stopped;
            return Ok(());
        };
        if !figures.loss.is_finite() {
            return Err(diverged(self.at, &format!("the loss on held-out data is {}", figures.loss)));
        }
        self.progress.line(&format!("after step {}: {}", self.at, figures.describe()));
        self.metrics.record(self.at, &figures.figures())?;
        if self.evaluations.add(self.at, figures.loss) {
            adapter::save(&self.training.out.join(BEST), &evaluations)?;
        }
        if self.at < self.timetable.total && self.out_of_patience() {
            self.ending = Ending::OutOfPatience;
        }
        Ok(())
    }

    /// Whether the last `train.patience` evaluations found no lower loss.
    fn out_of_patience(&self) -> bool {
        self.timetable.recipe.patience.is_some_and(|patience| self.evaluations.since >= patience)
    }

    /// Saves the state and then the adapter: if writing the adapter fails, a resumed run writes it.
    fn save(&mut self) -> Result<(), Failure> {
        let Training { session, model, identity, .. } = &self.training;
        let again = self.saved.is_some_and(|(step, _)| step == self.at);
        // A state with non-finite values could not be resumed, so it is not written. The previous state is valid.
        let found = trained_values(session, self.training.model, self.training.base, self.at)?;
        if let Some(name) = non_finite(&found) {
            return Err(diverged(self.at, &format!("`{name}` holds values that are infinite or not numbers")));
        }
        state::save(&self.training.out, session, model, identity, self.at, &self.evaluations, again)?;
        let saved = match self.swap_in_averages()? {
            None => found,
            values => {
                let saved = trained_values(self.training.session, self.training.model, self.training.base, self.at)?;
                self.restore_values(values)?;
                saved
            }
        };
        adapter::save(&self.training.out.join(ADAPTER), &saved)?;
        self.saved = Some((self.at, Instant::now()));
        Ok(())
    }

    /// With `train.average`, replaces the trained values by their averages and returns the values. Before the first
    /// step there are no averages.
    fn swap_in_averages(&mut self) -> Result<Option<Vec<f32>>, Failure> {
        if self.timetable.recipe.average.is_none() || self.at == 0 {
            return Ok(None);
        }
        let session = &mut *self.training.session;
        let [values, averages] =
            [session.flat(Vector::Values)?.into_owned(), session.flat(Vector::Averages)?.into_owned()];
        session.set_flat(Vector::Values, &averages)?;
        Ok(Some(values))
    }

    /// Restores the values that [`Self::swap_in_averages`] returned.
    fn restore_values(&mut self, values: Option<Vec<f32>>) -> Result<(), Failure> {
        Ok(values.map_or(Ok(()), |values| self.training.session.set_flat(Vector::Values, &values))?)
    }

    /// Returns the result of the run. A run that took no step is saved too, because it may have been evaluated or lack
    /// its adapter.
    pub fn end(mut self) -> Result<Outcome, Failure> {
        if self.at == self.from {
            self.save()?;
        }
        self.progress.finish();
        let (first, last) = self.tally.ends();
        Ok(Outcome {
            ending: self.ending,
            steps: self.at - self.from,
            done: self.at,
            evaluations: self.evaluations,
            first,
            last,
            before: self.before,
            after: self.after,
            seconds: self.tally.seconds,
            kernel_seconds: self.tally.kernel_seconds,
            tokens: self.tally.tokens,
            adapter: self.training.out.join(ADAPTER),
        })
    }
}

/// Decides which actions are due at which step.
struct Timetable<'a> {
    recipe: Recipe,
    epochs: Epochs<'a>,
    /// The number of steps of the whole run.
    total: u64,
    has_dev: bool,
}

impl<'a> Timetable<'a> {
    fn of(training: &Training<'a>) -> Self {
        let recipe = training.model.train.clone();
        let mut epochs = Epochs::of(&recipe, training.train);
        Timetable { total: epochs.total(&recipe), recipe, epochs, has_dev: training.dev.is_some() }
    }

    /// The first step after `step` at which an action is due or an epoch ends.
    fn next_event(&mut self, step: u64) -> u64 {
        let next = [self.recipe.save, self.recipe.evaluate, Every::Epoch].map(|every| self.next(every, step));
        next.into_iter().flatten().fold(self.total, u64::min)
    }

    fn evaluates_after(&mut self, step: u64) -> bool {
        self.has_dev && (step == self.total || self.due(self.recipe.evaluate, step))
    }

    fn saves_after(&mut self, step: u64) -> bool {
        self.due(self.recipe.save, step)
    }

    /// Whether an action is due after step `step`. This depends only on the step's number.
    fn due(&mut self, every: Every, step: u64) -> bool {
        self.next(every, step.saturating_sub(1)) == Some(step)
    }

    fn next(&mut self, every: Every, step: u64) -> Option<u64> {
        every.next(step, self.epochs.around(step).1.end)
    }
}

/// Sums over the steps that were taken.
#[derive(Default)]
struct Tally {
    losses: Vec<f64>,
    tokens: u64,
    seconds: f64,
    kernel_seconds: f64,
}

impl Tally {
    fn add(&mut self, done: &StepResult, time: Duration) {
        self.losses.push(done.loss);
        self.tokens += done.tokens;
        self.seconds += time.as_secs_f64();
        self.kernel_seconds += done.in_kernels.unwrap_or(0.0);
    }

    /// The mean losses over the first and the last tenth of the steps.
    fn ends(&self) -> (f64, f64) {
        let losses = &self.losses;
        let tenth = (losses.len() / 10).max(1).min(losses.len());
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
        (mean(&losses[..tenth]), mean(&losses[losses.len() - tenth..]))
    }
}
