//! Concatenates the adjoints of slices. The table of derivatives zero-pads the adjoint of each slice and adds the
//! results; where the slices are adjacent, as q, k and v of a fused projection are, one `concat` gives the same.
//!
//! ```text
//! pad(a, 0..m) + pad(b, m..n)  =  concat(a, b)
//! slice(concat(a, b), 0..m)    =  a               a of m columns
//! ```

use peft_grammar::graph::{Dim, MAX_VARIADIC_OPERANDS, Op, Value};

use super::Thresholds;
use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value], _: &Thresholds) -> Result<Option<Value>, String> {
    match op {
        Op::Add if new.graph.ty(operands[0]) == new.graph.ty(operands[1]) => {
            let (Some(x), Some(y)) = (padded(new, operands[0]), padded(new, operands[1])) else { return Ok(None) };
            if x.axis != y.axis {
                return Ok(None);
            }
            let (first, second) = if x.start <= y.start { (x, y) } else { (y, x) };
            if first.end != second.start {
                return Ok(None);
            }
            let parts = [first.parts, second.parts].concat();
            if parts.len() > MAX_VARIADIC_OPERANDS {
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
            let Some((Op::Concat { axis: concat_axis }, parts)) = new.source(operands[0]) else { return Ok(None) };
            let mut at = 0;
            for part in parts {
                let Some(width) = new.graph.ty(part).shape[*axis].constant() else { return Ok(None) };
                if concat_axis == *axis && (at, at + width) == (*start, *end) {
                    return Ok(Some(part));
                }
                at += width;
            }
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// Adjacent parts that fill `start..end` of an axis of length `total`; the rest of the axis is zero.
struct Padded {
    axis: usize,
    start: u64,
    end: u64,
    total: u64,
    parts: Vec<Value>,
}

/// Reads `value` as zero-padded adjacent parts.
fn padded(new: &Rewriter, value: Value) -> Option<Padded> {
    let (Op::Pad { axis, start, to }, inner) = new.source(value)? else { return None };
    let total = to.constant()?;
    let width = new.graph.ty(inner[0]).shape[axis].constant()?;
    let parts = match new.source(inner[0]) {
        Some((Op::Concat { axis: concat_axis }, parts)) if concat_axis == axis => parts,
        _ => vec![inner[0]],
    };
    Some(Padded { axis, start, end: start + width, total, parts })
}
