//! The model as it stands, judged by a data set.

use std::sync::atomic::{AtomicBool, Ordering};

use peft_grammar::model::{BatchSize, Model, TaskKind};
use peft_grammar::names::{Entry, LOGITS, LOSS};
use peft_runtime::{RuntimeError, Session};

use crate::data::{Batches, Dataset, Order};
use crate::exchange::inputs;
use crate::failure::Failure;
use crate::train::metrics::{Mean, correct, pearson, spearman};

/// Figures of a data set under the model as it stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    pub loss: f64,
    pub other: Figure,
}

/// What is said beside the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Figure {
    /// Of classes: the share of those that have the largest logit.
    Accuracy(f64),
    /// Of tokens that are predicted: e to the loss.
    Perplexity(f64),
    /// Of numbers: how they go with those of the model, by value and by rank. NaN where one side is constant.
    Correlation { pearson: f64, spearman: f64 },
}

impl Evaluation {
    /// As `metrics.jsonl` has them.
    pub(super) fn figures(&self) -> Vec<(&'static str, f64)> {
        let others = match self.other {
            Figure::Accuracy(accuracy) => vec![("dev/accuracy", accuracy)],
            Figure::Perplexity(perplexity) => vec![("dev/perplexity", perplexity)],
            Figure::Correlation { pearson, spearman } => vec![("dev/pearson", pearson), ("dev/spearman", spearman)],
        };
        std::iter::once(("dev/loss", self.loss)).chain(others).collect()
    }

    pub fn describe(&self) -> String {
        let other = match self.other {
            Figure::Accuracy(accuracy) => format!("accuracy {:.2}%", 100.0 * accuracy),
            Figure::Perplexity(perplexity) => format!("perplexity {perplexity:.3}"),
            Figure::Correlation { pearson, spearman } => {
                format!("correlation {pearson:.4} (Pearson), {spearman:.4} (Spearman)")
            }
        };
        format!("loss {:.4}, {other}", self.loss)
    }
}

/// Runs `eval` over a data set.
pub fn evaluate(session: &mut Session, model: &Model, data: &Dataset) -> Result<Evaluation, Failure> {
    let found = evaluate_until(&AtomicBool::new(false), session, model, data)?;
    Ok(found.expect("nothing stops it"))
}

/// The same; gives nothing if it is stopped.
pub(super) fn evaluate_until(
    stop: &AtomicBool,
    session: &mut Session,
    model: &Model,
    data: &Dataset,
) -> Result<Option<Evaluation>, Failure> {
    data.not_empty()?;
    let kind = &model.task.kind;
    let (mut mean, mut right, mut asked) = (Mean::default(), 0, 0);
    let (mut found, mut wanted) = (vec![], vec![]);
    // There are no gradients to hold: batches are no smaller than this.
    let size = match model.train.batch {
        BatchSize::Sequences(sequences) => BatchSize::Sequences(sequences.max(32)),
        tokens => tokens,
    };
    for batch in Batches::sized(data, size, Order::AsStored) {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        session.run(Entry::Eval.name(), &inputs(&batch, [0, 0]))?;
        let get = |name: &str| session.output(name).ok_or_else(|| RuntimeError::input(name, "is no output"));
        mean.add(f64::from(get(LOSS)?.1[0]), batch.asked() as f64);
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
        asked += batch.asked();
    }
    let loss = mean.value();
    let other = match kind {
        TaskKind::Classification { .. } | TaskKind::TokenClassification { .. } => {
            Figure::Accuracy(right as f64 / asked.max(1) as f64)
        }
        TaskKind::Regression { .. } => {
            Figure::Correlation { pearson: pearson(&found, &wanted), spearman: spearman(&found, &wanted) }
        }
        TaskKind::Generation { .. } | TaskKind::Chat | TaskKind::Text { .. } => Figure::Perplexity(loss.exp()),
    };
    Ok(Some(Evaluation { loss, other }))
}
