//! Work that no one reads is not done: where only some rows of a product are read, only they are
//! computed. This is what leaves logits to the positions that have a label.
//!
//! ```text
//! gather(x @ W, i)           =  gather(x, i) @ W
//! gather(concat₁(x, y), i)   =  concat₁(gather(x, i), gather(y, i))
//! scatter(i, d) @ W          =  scatter(i, d @ W)
//! slice₁(scatter(i, d))      =  scatter(i, slice₁(d))
//! scatter(i, d)ᵀ @ x         =  dᵀ @ gather(x, i)
//! ```

use peft_grammar::graph::{Dim, Op, Value};

use super::Limits;
use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value], _: &Limits) -> Result<Option<Value>, String> {
    let source = |at: usize| operands.get(at).and_then(|&v| new.source(v));
    match op {
        Op::Gather { start: 0 } => {
            let (x, ids) = (operands[0], operands[1]);
            // Rows of a weight are not rows of the batch.
            if new.graph.ty(x).shape[0] != Dim::Tokens {
                return Ok(None);
            }
            match source(0) {
                Some((Op::Matmul { transpose_x: false, transpose_y }, product)) => {
                    let rows = new.op(Op::Gather { start: 0 }, &[product[0], ids])?;
                    new.op(Op::Matmul { transpose_x: false, transpose_y }, &[rows, product[1]]).map(Some)
                }
                Some((Op::Concat { axis: 1 }, parts)) => {
                    let rows = parts.iter().map(|&part| new.op(Op::Gather { start: 0 }, &[part, ids]));
                    let rows = rows.collect::<Result<Vec<_>, _>>()?;
                    new.op(Op::Concat { axis: 1 }, &rows).map(Some)
                }
                _ => Ok(None),
            }
        }
        Op::Matmul { transpose_x: false, transpose_y } => match source(0) {
            Some((Op::Scatter { start, rows }, scattered)) => {
                let product = Op::Matmul { transpose_x: false, transpose_y: *transpose_y };
                let product = new.op(product, &[scattered[1], operands[1]])?;
                new.op(Op::Scatter { start, rows }, &[scattered[0], product]).map(Some)
            }
            _ => Ok(None),
        },
        Op::Matmul { transpose_x: true, transpose_y: false } => match source(0) {
            Some((Op::Scatter { start, .. }, scattered)) => {
                let rows = new.op(Op::Gather { start }, &[operands[1], scattered[0]])?;
                let product = Op::Matmul { transpose_x: true, transpose_y: false };
                new.op(product, &[scattered[1], rows]).map(Some)
            }
            _ => Ok(None),
        },
        Op::Slice { axis: 1, .. } => match source(0) {
            Some((Op::Scatter { start, rows }, scattered)) => {
                let columns = new.op(op.clone(), &[scattered[1]])?;
                new.op(Op::Scatter { start, rows }, &[scattered[0], columns]).map(Some)
            }
            _ => Ok(None),
        },
        _ => Ok(None),
    }
}
