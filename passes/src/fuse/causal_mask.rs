//! Marks products with causal attention weights as causal, so that their kernels skip the masked half of the score
//! matrix.
//!
//! ```text
//! w_ij = 0 for j > i, that is, w = softmax(causally masked scores), or dropout or an elementwise product of such a w:
//! attend(w, v)_i            =  Σ_j w_ij v_j  =  Σ_{j ≤ i} w_ij v_j
//! attend_transposed(w, v)_j =  Σ_i w_ij v_i  =  Σ_{i ≥ j} w_ij v_i
//! ```

use peft_grammar::graph::{Op, Value};

use super::Thresholds;
use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value], _: &Thresholds) -> Result<Option<Value>, String> {
    let causal = match op {
        Op::Attend { causal: false } => Op::Attend { causal: true },
        Op::AttendTransposed { causal: false } => Op::AttendTransposed { causal: true },
        _ => return Ok(None),
    };
    if zero_above_diagonal(new, operands[0]) { new.op(causal, operands).map(Some) } else { Ok(None) }
}

/// Whether `w` is known to be 0 wherever j > i.
fn zero_above_diagonal(new: &Rewriter, w: Value) -> bool {
    match new.source(w) {
        Some((Op::Softmax, x)) => masked_above_diagonal(new, x[0]),
        Some((Op::Dropout { .. } | Op::Scale { .. }, x)) => zero_above_diagonal(new, x[0]),
        Some((Op::SoftmaxVjp, x)) => zero_above_diagonal(new, x[0]),
        Some((Op::Add, x)) => x.iter().all(|&x| zero_above_diagonal(new, x)),
        Some((Op::Mul, x)) => x.iter().any(|&x| zero_above_diagonal(new, x)),
        // Columns before the scores are cut off: the ragged tail of a slice is the score matrix itself.
        Some((Op::Slice { end: None, .. }, x)) => zero_above_diagonal(new, x[0]),
        _ => false,
    }
}

/// Whether `x` is known to be −∞ wherever j > i. Columns before the score matrix may hold anything.
fn masked_above_diagonal(new: &Rewriter, x: Value) -> bool {
    match new.source(x) {
        Some((Op::Scores { causal }, _)) => causal,
        Some((Op::Scale { by }, x)) => by > 0.0 && masked_above_diagonal(new, x[0]),
        Some((Op::Concat { .. }, x)) => x.last().is_some_and(|&x| masked_above_diagonal(new, x)),
        _ => false,
    }
}
