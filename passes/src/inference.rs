//! Turns the equations of training into those of inference: removes dropout and `detach`, and sets the label smoothing
//! of the loss to 0.

use peft_grammar::graph::{Graph, Op};

use crate::rewrite::rewrite;

/// Returns `graph` without dropout, `detach` and label smoothing.
///
/// # Errors
/// Operands do not fit an operation, which a verified graph excludes.
pub fn inference(graph: &Graph) -> Result<Graph, String> {
    rewrite(graph, |new, op, operands| match op {
        Op::Dropout { .. } | Op::Detach => Ok(Some(operands[0])),
        Op::CrossEntropy { .. } => new.op(Op::CrossEntropy { smoothing: 0.0 }, operands).map(Some),
        _ => Ok(None),
    })
}
