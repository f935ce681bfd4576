//! A run under way: stretches of steps, and between them halts, at which it is judged and saved.

use std::fs;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use peft_grammar::model::{Every, Recipe};
use peft_grammar::names::Vector;
use peft_runtime::adapter::{self, Data, TensorFile};

use super::evaluation::evaluate_until;
use super::step::{Done, Stretch, diverged};
use super::{Ending, Epochs, Evaluation, Outcome, Training, earlier, folder, rate};
use crate::adapters::{ADAPTER, BEST, trained};
use crate::failure::Failure;
use crate::train::metrics::Metrics;
use crate::train::progress::{Progress, Step};
use crate::train::state::{self, Judged};

pub(super) struct Run<'a> {
    training: Training<'a>,
    calendar: Calendar<'a>,
    metrics: Metrics,
    progress: Progress,
    /// Steps that were done when it began, and that are done now.
    from: u64,
    at: u64,
    judged: Judged,
    before: Option<Evaluation>,
    after: Option<Evaluation>,
    ending: Ending,
    /// The step of the newest state, and when it was written or read.
    saved: Option<(u64, Instant)>,
    begin: Instant,
    tally: Tally,
}

/// The first trained tensor of which a value is infinite or no number.
fn odd(values: &TensorFile) -> Option<&str> {
    let odd = |data: &Data| matches!(data, Data::F32(numbers) if numbers.iter().any(|x| !x.is_finite()));
    values.tensors.iter().find(|(_, stored)| odd(&stored.data)).map(|(name, _)| name.as_str())
}

impl<'a> Run<'a> {
    /// The folder and the session as the run begins, or as its state has them.
    pub fn begin(training: Training<'a>) -> Result<Self, Failure> {
        training.train.not_empty()?;
        let calendar = Calendar::of(&training);
        let out = &training.out;
        fs::create_dir_all(out).map_err(Failure::file(out))?;
        let (mut from, mut judged, mut kept) = (0, Judged::default(), None);
        let metrics = match &training.state {
            Some(state) => {
                state.restore(training.session)?;
                folder::remove(&earlier(out), folder::unfinished)?;
                (from, judged) = (state.step, state.judged(&training.identity));
                kept = folder::keep_best(out, state, judged)?;
                Metrics::resume(out, from)?
            }
            None => {
                folder::remove(&earlier(out), |_| true)?;
                Metrics::create(out)?
            }
        };
        let before = match training.dev {
            Some(dev) if from == 0 => evaluate_until(training.stop, training.session, training.model, dev)?,
            _ => None,
        };
        let mut run = Run {
            progress: Progress::new(calendar.total, from),
            saved: None,
            training,
            calendar,
            metrics,
            from,
            at: from,
            judged,
            before,
            after: None,
            ending: Ending::Whole,
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
        // A run that was stopped within an evaluation makes up for it; one that was at the end of its patience still is.
        if from < run.calendar.total && run.judged.step == Some(from) && run.impatient() {
            run.ending = Ending::Patience;
        } else if from > 0 && run.calendar.judges(from) && run.judged.step != Some(from) {
            run.judge()?;
        }
        run.saved = run.training.state.as_ref().map(|state| (state.step, Instant::now()));
        run.begin = Instant::now();
        Ok(run)
    }

    pub fn goes_on(&self) -> bool {
        self.at < self.calendar.total && self.ending == Ending::Whole
    }

    /// Steps up to the next one after which there is something else to do.
    pub fn stretch(&mut self) -> Result<(), Failure> {
        let recipe = self.calendar.recipe.clone();
        let (epoch, steps) = self.calendar.epochs.around(self.at);
        let batches = self.calendar.epochs.batches(epoch);
        let batches = batches.starting_at(((self.at - steps.start) * recipe.accumulate) as usize);
        let steps = self.at..self.calendar.stretch_end(self.at);
        let mut stretch = Stretch::new(batches, &recipe, steps, self.calendar.total);
        let mut begun = Instant::now();
        while let Some(done) = stretch.step(self.training.session)? {
            // From step to step: making its batches is a part of it, and writing figures down.
            let time = begun.elapsed();
            begun += time;
            self.note(&done, time)?;
            if self.stopped() || self.late() {
                stretch.close();
            }
        }
        Ok(())
    }

    /// Writes down what a step came to.
    fn note(&mut self, done: &Done, time: Duration) -> Result<(), Failure> {
        let lr = rate(&self.calendar.recipe, self.at, self.calendar.total);
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

    /// What is due after a stretch: the run is judged and saved, or ends.
    pub fn halt(&mut self) -> Result<(), Failure> {
        // A run that is stopped at the end of its last step is whole, but for an evaluation.
        if self.stopped() && self.at < self.calendar.total {
            self.ending = Ending::Stopped;
        }
        if self.calendar.judges(self.at) && self.ending == Ending::Whole {
            self.judge()?;
        }
        if !self.goes_on() || self.calendar.saves(self.at) || self.late() {
            self.save()?;
        }
        Ok(())
    }

    fn stopped(&self) -> bool {
        self.training.stop.load(Ordering::Relaxed)
    }

    /// So much time has gone by since the newest state that another one is due.
    fn late(&self) -> bool {
        let since = self.saved.map_or(self.begin, |(_, when)| when);
        matches!(self.calendar.recipe.save, Every::Seconds(most) if since.elapsed().as_secs() >= most)
    }

    /// Runs over the held-out data, if there are any; keeps the values if they are the best so far. It may be stopped, or
    /// be the last one for which there is patience.
    fn judge(&mut self) -> Result<(), Failure> {
        let Training { dev: Some(dev), model, base, stop, .. } = self.training else { return Ok(()) };
        let at = self.at;
        let values = self.averaged()?;
        self.after = evaluate_until(stop, self.training.session, model, dev)?;
        let judged = trained(self.training.session, model, base, at)?;
        self.restored(values)?;
        let Some(figures) = self.after else {
            self.ending = Ending::Stopped;
            return Ok(());
        };
        if !figures.loss.is_finite() {
            return Err(diverged(self.at, &format!("the loss on held-out data is {}", figures.loss)));
        }
        self.progress.line(&format!("after step {}: {}", self.at, figures.describe()));
        self.metrics.record(self.at, &figures.figures())?;
        if self.judged.add(self.at, figures.loss) {
            adapter::save(&self.training.out.join(BEST), &judged)?;
        }
        if self.at < self.calendar.total && self.impatient() {
            self.ending = Ending::Patience;
        }
        Ok(())
    }

    /// No evaluation for which there was patience found a best one.
    fn impatient(&self) -> bool {
        self.calendar.recipe.patience.is_some_and(|patience| self.judged.since >= patience)
    }

    /// The state goes first: if the adapter cannot be written, a resumed run writes it.
    fn save(&mut self) -> Result<(), Failure> {
        let Training { session, model, identity, .. } = &self.training;
        let again = self.saved.is_some_and(|(step, _)| step == self.at);
        // Nothing could go on from these, and what was saved before is whole.
        let found = trained(session, self.training.model, self.training.base, self.at)?;
        if let Some(name) = odd(&found) {
            return Err(diverged(self.at, &format!("`{name}` holds values that are no numbers or infinite")));
        }
        state::save(&self.training.out, session, model, identity, self.at, &self.judged, again)?;
        let saved = match self.averaged()? {
            None => found,
            values => {
                let saved = trained(self.training.session, self.training.model, self.training.base, self.at)?;
                self.restored(values)?;
                saved
            }
        };
        adapter::save(&self.training.out.join(ADAPTER), &saved)?;
        self.saved = Some((self.at, Instant::now()));
        Ok(())
    }

    /// With `train.average`, puts the averages in the place of the values, and gives these. Before the first step there are
    /// none.
    fn averaged(&mut self) -> Result<Option<Vec<f32>>, Failure> {
        if self.calendar.recipe.average.is_none() || self.at == 0 {
            return Ok(None);
        }
        let session = &mut *self.training.session;
        let [values, averages] =
            [session.flat(Vector::Values)?.into_owned(), session.flat(Vector::Averages)?.into_owned()];
        session.set_flat(Vector::Values, &averages)?;
        Ok(Some(values))
    }

    /// Puts the values back that [`Self::averaged`] gave.
    fn restored(&mut self, values: Option<Vec<f32>>) -> Result<(), Failure> {
        Ok(values.map_or(Ok(()), |values| self.training.session.set_flat(Vector::Values, &values))?)
    }

    /// What the run came to. One that took no step is saved all the same: it may have been judged, or lack its adapter.
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
            judged: self.judged,
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

/// What is due at which step.
struct Calendar<'a> {
    recipe: Recipe,
    epochs: Epochs<'a>,
    /// Steps of the whole run.
    total: u64,
    has_dev: bool,
}

impl<'a> Calendar<'a> {
    fn of(training: &Training<'a>) -> Self {
        let recipe = training.model.train.clone();
        let mut epochs = Epochs::of(&recipe, training.train);
        Calendar { total: epochs.total(&recipe), recipe, epochs, has_dev: training.dev.is_some() }
    }

    /// The first step after `step` at which there is something else to do.
    fn stretch_end(&mut self, step: u64) -> u64 {
        let next = [self.recipe.save, self.recipe.evaluate, Every::Epoch].map(|every| self.next(every, step));
        next.into_iter().flatten().fold(self.total, u64::min)
    }

    fn judges(&mut self, step: u64) -> bool {
        self.has_dev && (step == self.total || self.due(self.recipe.evaluate, step))
    }

    fn saves(&mut self, step: u64) -> bool {
        self.due(self.recipe.save, step)
    }

    /// It is done after step `step`, by the step's number alone.
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
    fn add(&mut self, done: &Done, time: Duration) {
        self.losses.push(done.loss);
        self.tokens += done.tokens;
        self.seconds += time.as_secs_f64();
        self.kernel_seconds += done.in_kernels.unwrap_or(0.0);
    }

    /// Mean losses of the first and the last tenth.
    fn ends(&self) -> (f64, f64) {
        let losses = &self.losses;
        let tenth = (losses.len() / 10).max(1).min(losses.len());
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
        (mean(&losses[..tenth]), mean(&losses[losses.len() - tenth..]))
    }
}
