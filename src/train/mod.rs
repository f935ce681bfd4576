//! Training: a step is a run of `train` and one of `update`; around it rates, batches, figures, files.

mod epochs;
mod evaluation;
mod folder;
pub mod interrupt;
pub mod metrics;
pub mod progress;
mod run;
mod schedule;
pub mod state;
mod step;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use peft_grammar::model::{BatchSize, Model, Recipe};
use peft_runtime::Session;

use crate::adapters::Base;
use crate::data::Dataset;
use crate::failure::Failure;
use crate::train::state::{Identity, Judged, State};

use epochs::Epochs;

pub use evaluation::{Evaluation, evaluate};
pub use folder::{earlier, in_the_way};
pub use schedule::{rate, stable};
pub use step::{step, step_of_several};

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
    Epochs::of(recipe, train).total(recipe)
}

/// Refuses data of which an example alone has more tokens than a batch may.
pub fn fits(recipe: &Recipe, train: &Dataset) -> Result<(), Failure> {
    let longest = train.longest() as u64;
    match recipe.batch {
        BatchSize::Tokens { tokens } if longest > tokens => Err(Failure::Usage(format!(
            "`train.batch` is {tokens} tokens, and the longest example of {} has {longest}; make it `{longest} tokens` or \
             more, or let `task.max_tokens` cut examples to {tokens}",
            train.name()
        ))),
        _ => Ok(()),
    }
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
    pub fn run(self) -> Result<Outcome, Failure> {
        let mut run = run::Run::begin(self)?;
        while run.goes_on() {
            run.stretch()?;
            run.halt()?;
        }
        run.end()
    }
}
