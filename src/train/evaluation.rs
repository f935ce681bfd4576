//! Evaluates the current model on a data set.

use std::sync::atomic::{AtomicBool, Ordering};

use peft_grammar::model::{BatchSize, Model, TaskKind};
use peft_grammar::names::{Entry, LOGITS, LOSS};
use peft_runtime::{RuntimeError, Session};

use crate::data::{Batches, Dataset, Order};
use crate::exchange::inputs;
use crate::failure::Failure;
use crate::train::metrics::{Mean, correct, pearson, spearman};

/// The loss and the task's metric on a data set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// The mean loss over all targets.
    pub loss: f64,
    /// The metric of the task.
    pub metric: TaskMetric,
}

/// The metric of a task.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TaskMetric {
    /// Classification: the share of targets whose class has the largest logit, from 0 to 1.
    Accuracy(f64),
    /// Language modelling: e to the power of the mean loss.
    Perplexity(f64),
    /// Regression: the correlation of the labels with the model's outputs, by value (Pearson) and by rank (Spearman).
    /// NaN if one side is constant.
    Correlation { pearson: f64, spearman: f64 },
}

impl Evaluation {
    /// The names and values that are written to `metrics.jsonl`.
    pub(super) fn figures(&self) -> Vec<(&'static str, f64)> {
        let others = match self.metric {
            TaskMetric::Accuracy(accuracy) => vec![("dev/accuracy", accuracy)],
            TaskMetric::Perplexity(perplexity) => vec![("dev/perplexity", perplexity)],
            TaskMetric::Correlation { pearson, spearman } => vec![("dev/pearson", pearson), ("dev/spearman", spearman)],
        };
        std::iter::once(("dev/loss", self.loss)).chain(others).collect()
    }

    /// A short text for the user.
    pub fn describe(&self) -> String {
        let metric = match self.metric {
            TaskMetric::Accuracy(accuracy) => format!("accuracy {:.2}%", 100.0 * accuracy),
            TaskMetric::Perplexity(perplexity) => format!("perplexity {perplexity:.3}"),
            TaskMetric::Correlation { pearson, spearman } => {
                format!("correlation {pearson:.4} (Pearson), {spearman:.4} (Spearman)")
            }
        };
        format!("loss {:.4}, {metric}", self.loss)
    }
}

/// Evaluates the model on a data set.
///
/// # Errors
///
/// The data set is empty, or the session fails.
pub fn evaluate(session: &mut Session, model: &Model, data: &Dataset) -> Result<Evaluation, Failure> {
    let found = evaluate_until(&AtomicBool::new(false), session, model, data)?;
    Ok(found.expect("nothing stops it"))
}

/// Evaluates like [`evaluate`], but returns `None` if `stop` is set before the end.
pub(super) fn evaluate_until(
    stop: &AtomicBool,
    session: &mut Session,
    model: &Model,
    data: &Dataset,
) -> Result<Option<Evaluation>, Failure> {
    data.require_examples()?;
    let kind = &model.task.kind;
    let (mut mean, mut right, mut asked) = (Mean::default(), 0, 0);
    let (mut found, mut wanted) = (vec![], vec![]);
    // An evaluation stores no activations for gradients, so its batches have at least 32 sequences.
    let size = match model.train.batch {
        BatchSize::Sequences(sequences) => BatchSize::Sequences(sequences.max(32)),
        tokens => tokens,
    };
    for batch in Batches::sized(data, size, Order::AsStored) {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        session.run(Entry::Eval.name(), &inputs(&batch, [0, 0]))?;
        let get = |name: &str| session.output(name).ok_or_else(|| RuntimeError::input(name, "is not an output"));
        mean.add(f64::from(get(LOSS)?.1[0]), batch.target_count() as f64);
        match kind {
            TaskKind::Classification { .. } | TaskKind::TokenClassification { .. } => {
                right += correct(&get(LOGITS)?.1, &batch.labels);
            }
            TaskKind::Regression { .. } => {
                found.extend_from_slice(&get(LOGITS)?.1);
                wanted.extend_from_slice(&batch.numbers);
            }
            TaskKind::Generation { .. } | TaskKind::Chat | TaskKind::Text { .. } => {}
        }
        asked += batch.target_count();
    }
    let loss = mean.value();
    let metric = match kind {
        TaskKind::Classification { .. } | TaskKind::TokenClassification { .. } => {
            TaskMetric::Accuracy(right as f64 / asked.max(1) as f64)
        }
        TaskKind::Regression { .. } => {
            TaskMetric::Correlation { pearson: pearson(&found, &wanted), spearman: spearman(&found, &wanted) }
        }
        TaskKind::Generation { .. } | TaskKind::Chat | TaskKind::Text { .. } => TaskMetric::Perplexity(loss.exp()),
    };
    Ok(Some(Evaluation { loss, metric }))
}
