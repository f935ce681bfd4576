//! Residuals: adapters of PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024) are initialised with a part of a base
//! matrix, which is subtracted from the matrix.

use faer::Mat;
use peft_grammar::counterpart::Part;
use peft_grammar::model::Model;
use peft_runtime::Numbers;

/// The replacement of a base matrix W by W − factor · part(W, rank), with W in the checkpoint's layout.
#[derive(Clone, Debug, PartialEq)]
pub struct Residual {
    /// The name of the tensor W.
    pub tensor: String,
    /// The decomposition that the part is of.
    pub part: Part,
    /// The rank of the part.
    pub rank: usize,
    /// The factor of the part.
    pub factor: f64,
}

impl Residual {
    /// Subtracts the part from the tensor in `weights`, which are in the order of the model's parameters.
    ///
    /// # Errors
    ///
    /// The model has no such tensor, or the matrix has no part of that rank.
    pub fn apply(&self, model: &Model, weights: &mut [Numbers]) -> Result<(), String> {
        let at = model.params.iter().position(|p| p.name == self.tensor);
        let Some(at) = at else { return Err(format!("the model has no `{}`", self.tensor)) };
        let (rows, columns) = (model.params[at].shape[0] as usize, model.params[at].shape[1] as usize);
        let w = &mut weights[at];
        if self.rank > rows.min(columns) {
            return Err(format!("`{}` is {rows} by {columns}: no part of it has a rank of {}", self.tensor, self.rank));
        }
        // The part is computed in f64, and so differs from PEFT's in f32 only by rounding.
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

/// Subtracts all residuals from `base`, the weights in the order of the model's parameters.
///
/// # Errors
///
/// There are residuals and no `base`, or a residual cannot be applied.
pub fn subtract_residuals(model: &Model, residuals: &[Residual], base: Option<&mut [Numbers]>) -> Result<(), String> {
    match (residuals.first(), base) {
        (None, _) => Ok(()),
        (Some(_), Some(base)) => residuals.iter().try_for_each(|r| r.apply(model, base)),
        (Some(first), None) => Err(format!(
            "the adapter's initial values are subtracted from `{}` of the base model (PiSSA or OLoRA), which this \
             command does not read; `run`, `eval` and `merge` do, or convert it with PEFT's \
             `save_pretrained(…, path_initial_model_for_weight_conversion=…)`",
            first.tensor
        )),
    }
}
