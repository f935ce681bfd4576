//! The gradient of a fused projection that was sliced into q, k, v: the slices' adjoints are zero-padded
//! and added up by the book; side by side they are one `concat`.
//!
//! ```text
//! pad(a, 0..m) + pad(b, m..n)  =  concat(a, b)
//! slice(concat(a, b), of a)    =  a
//! ```

use peft_grammar::graph::{Dim, MAX_PARTS, Op, Value};

use super::Limits;
use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value], _: &Limits) -> Result<Option<Value>, String> {
    match op {
        Op::Add if new.graph.ty(operands[0]) == new.graph.ty(operands[1]) => {
            let (Some(x), Some(y)) = (placed(new, operands[0]), placed(new, operands[1])) else { return Ok(None) };
            if x.axis != y.axis {
                return Ok(None);
            }
            let (first, second) = if x.start <= y.start { (x, y) } else { (y, x) };
            if first.end != second.start {
                return Ok(None);
            }
            let parts = [first.parts, second.parts].concat();
            if parts.len() > MAX_PARTS {
                return Ok(None);
            }
            let joined = new.op(Op::Concat { axis: first.axis }, &parts)?;
            if (first.start, second.end) == (0, first.total) {
                return Ok(Some(joined));
            }
            let pad = Op::Pad { axis: first.axis, start: first.start, to: Dim::Const(first.total) };
            new.op(pad, &[joined]).map(Some)
        }
        Op::Slice { axis, start, end: Some(end) } => {
            let Some((Op::Concat { axis: along }, parts)) = new.source(operands[0]) else { return Ok(None) };
            let mut at = 0;
            for part in parts {
                let Some(width) = new.graph.ty(part).shape[*axis].constant() else { return Ok(None) };
                if along == *axis && (at, at + width) == (*start, *end) {
                    return Ok(Some(part));
                }
                at += width;
            }
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// Parts laid end to end from `start` to `end` in zeros of width `total`.
struct Placed {
    axis: usize,
    start: u64,
    end: u64,
    total: u64,
    parts: Vec<Value>,
}

fn placed(new: &Rewriter, value: Value) -> Option<Placed> {
    let (Op::Pad { axis, start, to }, padded) = new.source(value)? else { return None };
    let total = to.constant()?;
    let width = new.graph.ty(padded[0]).shape[axis].constant()?;
    let parts = match new.source(padded[0]) {
        Some((Op::Concat { axis: along }, parts)) if along == axis => parts,
        _ => vec![padded[0]],
    };
    Some(Placed { axis, start, end: start + width, total, parts })
}
