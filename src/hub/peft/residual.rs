//! What an adapter takes out of the base model's matrices: PiSSA's and OLoRA's beginnings.

use faer::Mat;
use peft_grammar::counterpart::Part;
use peft_grammar::model::Model;
use peft_runtime::Numbers;

/// W becomes W − factor · part(W, rank), W as the checkpoint stores it.
#[derive(Clone, Debug, PartialEq)]
pub struct Residual {
    /// The name of the tensor W.
    pub tensor: String,
    pub part: Part,
    pub rank: usize,
    pub factor: f64,
}

impl Residual {
    /// Changes the tensor in `weights`, which are in the order of the model's parameters. The error is a matrix that
    /// has no such part.
    pub fn apply(&self, model: &Model, weights: &mut [Numbers]) -> Result<(), String> {
        let at = model.params.iter().position(|p| p.name == self.tensor);
        let Some(at) = at else { return Err(format!("the model has no `{}`", self.tensor)) };
        let (rows, columns) = (model.params[at].shape[0] as usize, model.params[at].shape[1] as usize);
        let w = &mut weights[at];
        if self.rank > rows.min(columns) {
            return Err(format!("`{}` is {rows} by {columns}: no part of it has a rank of {}", self.tensor, self.rank));
        }
        // In f64: what PEFT computes in f32 it is, but for rounding.
        let matrix = Mat::from_fn(rows, columns, |i, j| f64::from(w[i * columns + j]));
        let (left, right) = match self.part {
            Part::Svd => {
                let svd = matrix.thin_svd().map_err(|e| format!("`{}` has no singular values: {e:?}", self.tensor))?;
                let s = svd.S().column_vector();
                let left = Mat::from_fn(rows, self.rank, |i, k| svd.U()[(i, k)] * s[k]);
                (left, Mat::from_fn(self.rank, columns, |k, j| svd.V()[(j, k)]))
            }
            Part::Qr => {
                let qr = matrix.qr();
                let q = qr.compute_thin_Q();
                let r = qr.thin_R();
                let left = Mat::from_fn(rows, self.rank, |i, k| q[(i, k)]);
                (left, Mat::from_fn(self.rank, columns, |k, j| r[(k, j)]))
            }
        };
        let part = left * right;
        for i in 0..rows {
            for j in 0..columns {
                w[i * columns + j] -= (self.factor * part[(i, j)]) as f32;
            }
        }
        Ok(())
    }
}

/// Takes all residuals out of `base`, the weights in the order of the model's parameters. The error says what to do
/// where there are none.
pub fn take_out(model: &Model, residuals: &[Residual], base: Option<&mut [Numbers]>) -> Result<(), String> {
    match (residuals.first(), base) {
        (None, _) => Ok(()),
        (Some(_), Some(base)) => residuals.iter().try_for_each(|r| r.apply(model, base)),
        (Some(first), None) => Err(format!(
            "the adapter takes its beginning out of `{}` of the base model, which this command does not read; `run`, \
             `eval` and `merge` do, or let PEFT save it once more by \
             `save_pretrained(…, path_initial_model_for_weight_conversion=…)`",
            first.tensor
        )),
    }
}
