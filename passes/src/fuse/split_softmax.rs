//! Splits a softmax over extra columns a, such as the keys of an inducer (Chen et al., 2022) or of a prefix, followed
//! by attention scores S. The result is a softmax of each part and the weight λ between the two, so that no matrix of
//! the concatenated scores is materialised. Both parts combine as in online softmax (Milakov & Gimelshein, 2018).
//!
//! ```text
//! u = softmax(a),  w = softmax(S),  λ = σ(ln Σ eᵃ − ln Σ eˢ):
//! p = softmax([a ; S])              =  [λ u ; (1 − λ) w]
//! softmax_vjp(p, [da ; dS])         =  [softmax_vjp(u, λ da) + g ⊙ u ; softmax_vjp(w, (1 − λ) dS) − g ⊙ w]
//!                                      g = λ (1 − λ) (Σ u ⊙ da − Σ w ⊙ dS)
//! dropout([x ; y])                  =  [dropout(x) ; dropout(y)]    the columns of y numbered after those of x
//! ```
//!
//! The rule rewrites slices: the consumers of a tensor over all columns read one part of it at a time. For a single
//! extra column, u = 1 and ln Σ eᵃ = a.

use peft_grammar::graph::{Dim, Op, Type, Value};

use super::Thresholds;
use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value], _: &Thresholds) -> Result<Option<Value>, String> {
    let Op::Slice { axis, start, end } = *op else { return Ok(None) };
    let ty = new.graph.ty(operands[0]);
    let Some(Dim::Keys(columns)) = ty.last() else { return Ok(None) };
    if axis + 1 != ty.rank() || columns == 0 {
        return Ok(None);
    }
    let front = match end {
        Some(_) => part(new, operands[0], Part::Front)?,
        None if start == columns => return part(new, operands[0], Part::Scores),
        None => None,
    };
    match front {
        Some(front) if (start, end) == (0, Some(columns)) => Ok(Some(front)),
        Some(front) => new.op(op.clone(), &[front]).map(Some),
        None => Ok(None),
    }
}

/// A part of a tensor over all columns.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    /// The extra columns.
    Front,
    /// The columns of the score matrix.
    Scores,
}

impl Part {
    fn other(self) -> Part {
        if self == Part::Front { Part::Scores } else { Part::Front }
    }
}

/// A part of `value`, computed from the parts of its operands where the algebra above allows it; `None` if the part is
/// all zeros.
fn part(new: &mut Rewriter, value: Value, of: Part) -> Result<Option<Value>, String> {
    let ty = new.graph.ty(value).clone();
    let last = ty.rank() - 1;
    let Some(Dim::Keys(columns)) = ty.last() else { return Err(format!("{ty} has no columns before its scores")) };
    match new.source(value) {
        Some((Op::Softmax, x)) => {
            if let Some(scores) = ConcatScores::of(new, x[0])? {
                let weight = scores.weight(new, of)?;
                return match scores.softmax(new, of)? {
                    Some(own) => new.op(Op::Mul, &[weight, own]).map(Some),
                    None => Ok(Some(weight)),
                };
            }
        }
        Some((Op::SoftmaxVjp, x)) => {
            if let Some((Op::Softmax, softmax)) = new.source(x[0])
                && let Some(scores) = ConcatScores::of(new, softmax[0])?
            {
                return scores.vjp(new, x[1], of);
            }
        }
        Some((Op::Dropout { p, stream, column }, x)) => {
            let column = column + if of == Part::Scores { columns } else { 0 };
            return match part(new, x[0], of)? {
                Some(own) => new.op(Op::Dropout { p, stream, column }, &[own, x[1]]).map(Some),
                None => Ok(None),
            };
        }
        Some((Op::Add, x)) if x.iter().all(|&x| *new.graph.ty(x) == ty) => {
            return match (part(new, x[0], of)?, part(new, x[1], of)?) {
                (Some(x), Some(y)) => new.op(Op::Add, &[x, y]).map(Some),
                (one, None) | (None, one) => Ok(one),
            };
        }
        Some((Op::Pad { axis, start, .. }, x)) if axis == last => {
            let own = match new.graph.ty(x[0]).last() {
                Some(Dim::Keys(0)) => Part::Scores,
                Some(Dim::Const(_)) => Part::Front,
                _ => return slice(new, value, columns, of).map(Some),
            };
            return match (own == of, of) {
                (false, _) => Ok(None),
                (true, Part::Scores) => Ok(Some(x[0])),
                (true, Part::Front) if new.graph.ty(x[0]).last() == Some(Dim::Const(columns)) => Ok(Some(x[0])),
                (true, Part::Front) => new.op(Op::Pad { axis, start, to: Dim::Const(columns) }, &x).map(Some),
            };
        }
        _ => {}
    }
    slice(new, value, columns, of).map(Some)
}

fn slice(new: &mut Rewriter, value: Value, columns: u64, of: Part) -> Result<Value, String> {
    let axis = new.graph.ty(value).rank() - 1;
    let (start, end) = if of == Part::Front { (0, Some(columns)) } else { (columns, None) };
    new.op(Op::Slice { axis, start, end }, &[value])
}

/// The concatenation `[a ; S]` of extra columns and scores.
struct ConcatScores {
    front: Value,
    scores: Value,
}

impl ConcatScores {
    fn of(new: &mut Rewriter, value: Value) -> Result<Option<ConcatScores>, String> {
        let Some((Op::Concat { axis }, parts)) = new.source(value) else { return Ok(None) };
        let Some((&scores, front)) = parts.split_last() else { return Ok(None) };
        let ty = new.graph.ty(scores);
        if front.is_empty() || axis + 1 != ty.rank() || ty.last() != Some(Dim::Keys(0)) {
            return Ok(None);
        }
        let front = match front {
            &[one] => one,
            several => new.op(Op::Concat { axis }, several)?,
        };
        Ok(Some(ConcatScores { front, scores }))
    }

    fn values(&self, of: Part) -> Value {
        if of == Part::Front { self.front } else { self.scores }
    }

    /// λ for the extra columns, 1 − λ for the scores.
    fn weight(&self, new: &mut Rewriter, of: Part) -> Result<Value, String> {
        let front = match single_column(new.graph.ty(self.front)) {
            true => self.front,
            false => new.op(Op::LogSumExp, &[self.front])?,
        };
        let scores = new.op(Op::LogSumExp, &[self.scores])?;
        let difference = new.op(Op::Sub, &[front, scores])?;
        let lambda = new.op(Op::Sigmoid, &[difference])?;
        if of == Part::Front {
            return Ok(lambda);
        }
        let negative = new.op(Op::Scale { by: -1.0 }, &[lambda])?;
        new.op(Op::Shift { by: 1.0 }, &[negative])
    }

    /// u for the extra columns, w for the scores; `None` if it is 1.
    fn softmax(&self, new: &mut Rewriter, of: Part) -> Result<Option<Value>, String> {
        let own = self.values(of);
        if single_column(new.graph.ty(own)) { Ok(None) } else { new.op(Op::Softmax, &[own]).map(Some) }
    }

    /// A part of softmax_vjp(softmax([a ; S]), dy); `None` if it is all zeros.
    fn vjp(&self, new: &mut Rewriter, dy: Value, of: Part) -> Result<Option<Value>, String> {
        // The difference of the two inner products in g, negated for the scores.
        let difference = match (self.inner(new, dy, of)?, self.inner(new, dy, of.other())?) {
            (Some(own), Some(other)) => new.op(Op::Sub, &[own, other])?,
            (Some(own), None) => own,
            (None, Some(other)) => new.op(Op::Scale { by: -1.0 }, &[other])?,
            (None, None) => return Ok(None),
        };
        let weights = [self.weight(new, Part::Front)?, self.weight(new, Part::Scores)?];
        let slope = new.op(Op::Mul, &weights)?;
        let between = new.op(Op::Mul, &[slope, difference])?;
        let Some(softmax) = self.softmax(new, of)? else { return Ok(Some(between)) };
        let between = new.op(Op::Mul, &[between, softmax])?;
        let Some(dy) = part(new, dy, of)? else { return Ok(Some(between)) };
        let dy = new.op(Op::Mul, &[weights[of as usize], dy])?;
        let within = new.op(Op::SoftmaxVjp, &[softmax, dy])?;
        new.op(Op::Add, &[within, between]).map(Some)
    }

    /// The inner product Σ u ⊙ da of the extra columns, or Σ w ⊙ dS of the scores; `None` if it is 0.
    fn inner(&self, new: &mut Rewriter, dy: Value, of: Part) -> Result<Option<Value>, String> {
        let Some(dy) = part(new, dy, of)? else { return Ok(None) };
        let Some(softmax) = self.softmax(new, of)? else { return Ok(Some(dy)) };
        let product = new.op(Op::Mul, &[softmax, dy])?;
        let axes = vec![new.graph.ty(product).rank() - 1];
        new.op(Op::Reduce { axes, keep: true, mean: false }, &[product]).map(Some)
    }
}

fn single_column(ty: &Type) -> bool {
    ty.last() == Some(Dim::Const(1))
}
