//! Splits reads of partly trained tables into reads of their frozen and trainable parts.
//!
//! The checker writes a table of which only some rows train as `concat(frozen rows, trainable rows)`. Gathers and
//! products are linear in the table, so they distribute over its parts, and differentiation computes no gradient for
//! the frozen part:
//!
//! ```text
//! gather(concat₀(A, B), ids)  =  gather(A, ids) + gather(B, ids − rows(A))    0 for ids outside of a part
//! x @ concat₀(A, B)ᵀ          =  concat₁(x @ Aᵀ, x @ Bᵀ)
//! x @ permute(W, [1, 0])      =  x @ Wᵀ
//! ```

use peft_grammar::graph::{Graph, Op, Value};

use crate::rewrite::{Rewriter, rewrite};

/// Returns `graph` with every gather from and product with a partly trained table distributed over the parts of the
/// table.
///
/// # Errors
/// Operands do not fit an operation, or a part has no fixed number of rows; a verified graph excludes both.
pub fn partition(graph: &Graph) -> Result<Graph, String> {
    rewrite(graph, |new, op, operands| match op {
        Op::Gather { start: 0 } => gather_parts(new, operands[0], operands[1]),
        Op::Matmul { transpose_x, transpose_y } => {
            let (x, tx) = untransposed(new, operands[0], *transpose_x);
            let (y, ty) = untransposed(new, operands[1], *transpose_y);
            if ty
                && !tx
                && let Some(parts) = parts(new, y)
            {
                let product = Op::Matmul { transpose_x: false, transpose_y: true };
                let columns = parts.into_iter().map(|part| new.op(product.clone(), &[x, part]));
                let columns = columns.collect::<Result<Vec<_>, _>>()?;
                let axis = new.graph.ty(x).rank() - 1;
                return new.op(Op::Concat { axis }, &columns).map(Some);
            }
            new.op(Op::Matmul { transpose_x: tx, transpose_y: ty }, &[x, y]).map(Some)
        }
        _ => Ok(None),
    })
}

/// The parts of a table that is a `concat` along its rows.
fn parts(new: &Rewriter, table: Value) -> Option<Vec<Value>> {
    match new.source(table) {
        Some((Op::Concat { axis: 0 }, parts)) if new.graph.ty(table).rank() == 2 => Some(parts),
        _ => None,
    }
}

/// The sum of the gathers from the parts of `table`; `None` if it has no parts.
fn gather_parts(new: &mut Rewriter, table: Value, ids: Value) -> Result<Option<Value>, String> {
    let Some(parts) = parts(new, table) else { return Ok(None) };
    let mut start = 0;
    let mut sum = None;
    for part in parts {
        let rows = new.op(Op::Gather { start }, &[part, ids])?;
        sum = Some(match sum {
            Some(sum) => new.op(Op::Add, &[sum, rows])?,
            None => rows,
        });
        start += new.graph.ty(part).shape[0].constant().ok_or("a part of a table has a fixed number of rows")?;
    }
    Ok(sum)
}

/// Looks through a transposition of the last two axes: returns its operand, with the flag `transposed` inverted.
fn untransposed(new: &Rewriter, value: Value, transposed: bool) -> (Value, bool) {
    let rank = new.graph.ty(value).rank();
    if let Some((Op::Permute { axes }, operands)) = new.source(value) {
        let mut swapped: Vec<usize> = (0..rank).collect();
        swapped.swap(rank - 2, rank - 1);
        if axes == swapped {
            return (operands[0], !transposed);
        }
    }
    (value, transposed)
}
