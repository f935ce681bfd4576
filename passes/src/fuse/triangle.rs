//! Weights that are zero after their own token need no work there.
//!
//! ```text
//! w = softmax(−∞ where j > i), or a product with such a w, or dropout of it:
//! attend(w, v)            =  attend(w, v) over j ≤ i
//! attend_transposed(w, v) =  attend_transposed(w, v) over i ≥ j
//! ```

use peft_grammar::graph::{Op, Value};

use super::Limits;
use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value], _: &Limits) -> Result<Option<Value>, String> {
    let better = match op {
        Op::Attend { causal: false } => Op::Attend { causal: true },
        Op::AttendTransposed { causal: false } => Op::AttendTransposed { causal: true },
        _ => return Ok(None),
    };
    if zero_above(new, operands[0]) { new.op(better, operands).map(Some) } else { Ok(None) }
}

/// 0 at every j > i.
fn zero_above(new: &Rewriter, w: Value) -> bool {
    match new.source(w) {
        Some((Op::Softmax, x)) => infinite_above(new, x[0]),
        Some((Op::Dropout { .. } | Op::Scale { .. }, x)) => zero_above(new, x[0]),
        Some((Op::SoftmaxVjp, x)) => zero_above(new, x[0]),
        Some((Op::Add, x)) => x.iter().all(|&x| zero_above(new, x)),
        Some((Op::Mul, x)) => x.iter().any(|&x| zero_above(new, x)),
        // Columns in front stay in front: a ragged tail is the square itself.
        Some((Op::Slice { end: None, .. }, x)) => zero_above(new, x[0]),
        _ => false,
    }
}

/// −∞ at every j > i; columns in front of the square may hold anything.
fn infinite_above(new: &Rewriter, x: Value) -> bool {
    match new.source(x) {
        Some((Op::Scores { causal }, _)) => causal,
        Some((Op::Scale { by }, x)) => by > 0.0 && infinite_above(new, x[0]),
        Some((Op::Concat { .. }, x)) => x.last().is_some_and(|&x| infinite_above(new, x)),
        _ => false,
    }
}
