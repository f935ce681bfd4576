//! Drops explicit broadcasts before elementwise operations, which broadcast their operands implicitly.
//!
//! ```text
//! broadcast(x) ⊙ y  =  x ⊙ y    ⊙ any elementwise operation of two operands, y of the shape of the result
//! ```

use peft_grammar::graph::{Op, Value};

use super::Thresholds;
use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value], _: &Thresholds) -> Result<Option<Value>, String> {
    let (Op::Add | Op::Sub | Op::Mul | Op::Div | Op::Min, &[x, y]) = (op, operands) else { return Ok(None) };
    let broadcast_of = |new: &Rewriter, value| match new.source(value) {
        Some((Op::Broadcast { mean: false, .. }, from)) => Some(from[0]),
        _ => None,
    };
    let operands = match (broadcast_of(new, x), broadcast_of(new, y)) {
        (Some(x), None) => [x, y],
        (None, Some(y)) => [x, y],
        // One of two explicit broadcasts stays, because the result takes its shape from it.
        (Some(x), Some(_)) => [x, y],
        (None, None) => return Ok(None),
    };
    // Implicit broadcasting inserts no axis in the middle of a shape; there the types differ and the broadcast stays.
    let (original, rewritten) = (new.op(op.clone(), &[x, y])?, new.op(op.clone(), &operands));
    Ok(rewritten.ok().filter(|&value| new.graph.ty(value) == new.graph.ty(original)))
}
