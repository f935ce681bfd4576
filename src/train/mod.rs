//! The training loop. A step runs the compiled functions `train` and `update`; this module supplies learning rates and
//! batches, and writes metrics, states and adapters.

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
use crate::train::state::{EvaluationHistory, Identity, State};

use epochs::Epochs;

pub use evaluation::{Evaluation, evaluate};
pub use folder::{blocking_files, earlier_files};
pub use schedule::{decay_start, rate};
pub use step::{accumulated_step, step};

/// A training run.
pub struct Training<'a> {
    /// The model to train.
    pub model: &'a Model,
    /// The session that runs it.
    pub session: &'a mut Session,
    /// The training data.
    pub train: &'a Dataset,
    /// The held-out data.
    pub dev: Option<&'a Dataset>,
    /// The run's folder.
    pub out: PathBuf,
    /// The base weights.
    pub base: &'a Base,
    /// Everything that the run's values depend on.
    pub identity: Identity,
    /// The state to resume from.
    pub state: Option<State>,
    /// Stops the run early: the current step is finished and the state is saved.
    pub stop: &'a AtomicBool,
}

/// The number of steps of the whole run.
pub fn total(recipe: &Recipe, train: &Dataset) -> u64 {
    Epochs::of(recipe, train).total(recipe)
}

/// Checks that every example fits into a batch.
///
/// # Errors
///
/// `train.batch` is a number of tokens, and an example has more tokens.
pub fn check_batch_size(recipe: &Recipe, train: &Dataset) -> Result<(), Failure> {
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

/// The reason why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All steps are done.
    Completed,
    /// The last `train.patience` evaluations found no lower loss.
    OutOfPatience,
    /// [`Training::stop`] was set.
    Stopped,
}

/// The result of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Why the run ended.
    pub ending: Ending,
    /// The number of steps taken by this process.
    pub steps: u64,
    /// The number of steps of the whole run so far.
    pub done: u64,
    /// The results of the evaluations so far.
    pub evaluations: EvaluationHistory,
    /// The mean loss over the first tenth of this process's steps.
    pub first: f64,
    /// The mean loss over the last tenth of this process's steps.
    pub last: f64,
    /// The evaluation before the first step.
    pub before: Option<Evaluation>,
    /// The last evaluation.
    pub after: Option<Evaluation>,
    /// The duration of all steps in seconds.
    pub seconds: f64,
    /// The part of `seconds` spent in kernels, if the session takes a profile.
    pub kernel_seconds: f64,
    /// The number of tokens trained on. Batches have no padding.
    pub tokens: u64,
    /// The path of the trained adapter.
    pub adapter: PathBuf,
}

impl Training<'_> {
    /// Trains to the end. A new run first removes the files of an earlier run from its folder.
    ///
    /// # Errors
    ///
    /// A file cannot be written, the session fails, or the loss is not finite.
    pub fn run(self) -> Result<Outcome, Failure> {
        let mut run = run::Run::begin(self)?;
        while run.continues() {
            run.run_steps()?;
            run.evaluate_and_save()?;
        }
        run.end()
    }
}
