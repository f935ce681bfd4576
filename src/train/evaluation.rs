//! The model as it stands, judged by a data set.

use std::sync::atomic::{AtomicBool, Ordering};

use peft_grammar::model::{BatchSize, Model};
use peft_runtime::{RuntimeError, Session};

use crate::data::{Batches, Dataset, Order};
use crate::exchange::inputs;
use crate::failure::Failure;
use crate::train::metrics::{Mean, correct};

/// Figures of a data set under the model as it stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    pub loss: f64,
    /// Of classifiers.
    pub accuracy: Option<f64>,
}

impl Evaluation {
    /// As `metrics.jsonl` has them.
    pub(super) fn figures(&self) -> [(&'static str, f64); 2] {
        let other = match self.accuracy {
            Some(accuracy) => ("dev/accuracy", accuracy),
            None => ("dev/perplexity", self.loss.exp()),
        };
        [("dev/loss", self.loss), other]
    }

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
pub(super) fn evaluate_until(
    stop: &AtomicBool,
    session: &mut Session,
    model: &Model,
    data: &Dataset,
) -> Result<Option<Evaluation>, Failure> {
    data.not_empty()?;
    let classifies = model.task.kind.classifies();
    let (mut mean, mut right, mut seen) = (Mean::default(), 0, 0);
    // There are no gradients to hold: batches are no smaller than this.
    let size = match model.train.batch {
        BatchSize::Sequences(sequences) => BatchSize::Sequences(sequences.max(32)),
        tokens => tokens,
    };
    for batch in Batches::sized(data, size, Order::AsStored) {
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
