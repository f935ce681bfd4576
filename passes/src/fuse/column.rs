//! The inducer's column: a softmax over one column and the scores, of which only the column's weight is read, needs no
//! second square. It is a sigmoid of the column against what the scores add up to, and its gradient reaches the scores
//! through their own softmax.
//!
//! ```text
//! s = softmax([a ; S]),  λ = s₀,  w = softmax(S),  d an adjoint of λ:
//! slice(s, 0..1)                           =  λ  =  σ(a − ln Σ eˢ)
//! slice(softmax_vjp(s, pad(d, 0)), 0..1)   =  λ (1 − λ) d
//! slice(softmax_vjp(s, pad(d, 0)), 1..)    =  −λ (1 − λ) d ⊙ w
//! ```

use peft_grammar::graph::{Dim, Op, Value};

use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value]) -> Result<Option<Value>, String> {
    let Op::Slice { axis, start, end } = *op else { return Ok(None) };
    if axis + 1 != new.graph.ty(operands[0]).rank() {
        return Ok(None);
    }
    let column = (start, end) == (0, Some(1));
    match new.source(operands[0]) {
        Some((Op::Softmax, x)) if column => match joined(new, x[0]) {
            Some((a, scores)) => weight(new, a, scores).map(Some),
            None => Ok(None),
        },
        Some((Op::SoftmaxVjp, x)) if column || (start, end) == (1, None) => {
            let Some((Op::Softmax, joint)) = new.source(x[0]) else { return Ok(None) };
            let (Some((a, scores)), Some(d)) = (joined(new, joint[0]), padded(new, x[1])) else { return Ok(None) };
            let lambda = weight(new, a, scores)?;
            let negative = new.op(Op::Scale { by: -1.0 }, &[lambda])?;
            let rest = new.op(Op::Shift { by: 1.0 }, &[negative])?;
            let slope = new.op(Op::Mul, &[lambda, rest])?;
            let da = new.op(Op::Mul, &[slope, d])?;
            if column {
                return Ok(Some(da));
            }
            let w = new.op(Op::Softmax, &[scores])?;
            let negative = new.op(Op::Scale { by: -1.0 }, &[da])?;
            new.op(Op::Mul, &[negative, w]).map(Some)
        }
        _ => Ok(None),
    }
}

/// λ = σ(a − lse)
fn weight(new: &mut Rewriter, a: Value, scores: Value) -> Result<Value, String> {
    let lse = new.op(Op::LogSumExp, &[scores])?;
    let difference = new.op(Op::Sub, &[a, lse])?;
    new.op(Op::Sigmoid, &[difference])
}

/// `[a ; S]`: one column in front of scores.
fn joined(new: &Rewriter, value: Value) -> Option<(Value, Value)> {
    let (Op::Concat { axis }, parts) = new.source(value)? else { return None };
    let [a, scores] = parts[..] else { return None };
    let (narrow, wide) = (new.graph.ty(a), new.graph.ty(scores));
    let fits = axis + 1 == narrow.rank() && narrow.last() == Some(Dim::Const(1)) && wide.ragged();
    fits.then_some((a, scores))
}

/// What stands in the first column of zeros.
fn padded(new: &Rewriter, value: Value) -> Option<Value> {
    match new.source(value)? {
        (Op::Pad { start: 0, axis, .. }, x) if new.graph.ty(x[0]).shape[axis] == Dim::Const(1) => Some(x[0]),
        _ => None,
    }
}
