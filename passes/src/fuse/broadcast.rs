//! What an operation repeats by itself need not be repeated before.
//!
//! ```text
//! repeat(x) ⊙ y  =  x ⊙ y    of any operation element by element, where y has the whole shape
//! ```

use peft_grammar::graph::{Op, Value};

use super::Limits;
use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value], _: &Limits) -> Result<Option<Value>, String> {
    let (Op::Add | Op::Sub | Op::Mul | Op::Div | Op::Min, &[x, y]) = (op, operands) else { return Ok(None) };
    let repeated = |new: &Rewriter, value| match new.source(value) {
        Some((Op::Broadcast { mean: false, .. }, from)) => Some(from[0]),
        _ => None,
    };
    let operands = match (repeated(new, x), repeated(new, y)) {
        (Some(x), None) => [x, y],
        (None, Some(y)) => [x, y],
        // One of two has to be repeated; then the other need not be.
        (Some(x), Some(_)) => [x, y],
        (None, None) => return Ok(None),
    };
    // Axes that are missing in the middle are not repeated by the operation itself.
    let (whole, ty) = (new.op(op.clone(), &[x, y])?, new.op(op.clone(), &operands));
    Ok(ty.ok().filter(|&value| new.graph.ty(value) == new.graph.ty(whole)))
}
