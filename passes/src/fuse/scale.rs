//! Moves a constant factor s to the tensor with the fewest columns.
//!
//! ```text
//! (s x) @ y   =  s (x @ y)     if the product has fewer columns than x
//! (s x)ᵀ @ y  =  xᵀ @ (s y)    if y has fewer columns than x, and likewise with x and y exchanged
//! Σ s x       =  s Σ x         for a sum over any axes but the last
//! ```
//!
//! The backward pass of LoRA contains such factors: the adjoint of a layer's output has as many columns as the layer,
//! and its product with a LoRA matrix has as many columns as the rank.

use peft_grammar::graph::{Dim, Op, Value};

use super::Thresholds;
use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value], _: &Thresholds) -> Result<Option<Value>, String> {
    let scaled = |new: &Rewriter, value: Value| match new.source(value) {
        Some((Op::Scale { by }, x)) => Some((x[0], by)),
        _ => None,
    };
    let width = |new: &Rewriter, value: Value| new.graph.ty(value).last().and_then(|d: Dim| d.constant());
    match (op, operands) {
        (Op::Matmul { transpose_x: false, .. }, &[x, y]) => {
            let Some((inner, by)) = scaled(new, x) else { return Ok(None) };
            let product = new.op(op.clone(), &[inner, y])?;
            match (width(new, product), width(new, x)) {
                (Some(n), Some(k)) if n < k => new.op(Op::Scale { by }, &[product]).map(Some),
                _ => Ok(None),
            }
        }
        (Op::Matmul { transpose_x: true, transpose_y: false }, &[x, y]) => {
            let (Some(m), Some(n)) = (width(new, x), width(new, y)) else { return Ok(None) };
            let operands = match (scaled(new, x), scaled(new, y)) {
                (Some((x, by)), _) if n < m => [x, new.op(Op::Scale { by }, &[y])?],
                (_, Some((y, by))) if m < n => [new.op(Op::Scale { by }, &[x])?, y],
                _ => return Ok(None),
            };
            new.op(op.clone(), &operands).map(Some)
        }
        (Op::Reduce { axes, .. }, &[x]) if !axes.contains(&(new.graph.ty(x).rank() - 1)) => {
            let Some((x, by)) = scaled(new, x) else { return Ok(None) };
            let sum = new.op(op.clone(), &[x])?;
            new.op(Op::Scale { by }, &[sum]).map(Some)
        }
        _ => Ok(None),
    }
}
