//! Fused attention: the score matrix, its softmax and its dropout are never materialised, and the backward pass
//! recomputes them from the logsumexp of each row (FlashAttention, Dao et al., 2022).
//!
//! ```text
//! s = scale · scores(q, k),  w = softmax(s),  d = dropout,  ρ one factor for each row:
//! attend(ρ ⊙ d(w), v)                               =  ρ ⊙ attention(q, k, v)
//! ln Σ eˢ                                           =  attention_lse(q, k)
//!
//! df the adjoint of f = attend(d(w), v),  c one term for each row (`split_softmax` makes such terms):
//! Σ_j w ⊙ d(scores(df, v))                          =  Σ df ⊙ f
//! ds = scale · (softmax_vjp(w, ρ ⊙ d(scores(df, v))) + c ⊙ w)
//!    = scale · w ⊙ (d(ρ ⊙ df vᵀ) + r),  r = c − ρ Σ df ⊙ f
//! dq = attend(ds, k)                                =  attention_vjp 0 of ρ ⊙ df
//! dk = attend_transposed(ds, q)                     =  attention_vjp 1 of ρ ⊙ df
//! dv = attend_transposed(ρ ⊙ d(w), df)              =  attention_vjp 2 of ρ ⊙ df
//! ```

use peft_grammar::graph::{Dim, Op, Value};

use super::Thresholds;
use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value], _: &Thresholds) -> Result<Option<Value>, String> {
    match op {
        Op::Attend { .. } => match dropped_weights(new, operands[0]) {
            Some((weights, drop, rows)) => {
                let f = weights.attention(new, operands[1], drop)?;
                times_row_factors(new, f, &rows).map(Some)
            }
            None => vjp(new, operands[0], 0, operands[1]),
        },
        Op::AttendTransposed { .. } => match dropped_weights(new, operands[0]) {
            Some((weights, drop, rows)) => {
                let df = times_row_factors(new, operands[1], &rows)?;
                values_adjoint(new, weights, drop, df).map(Some)
            }
            None => vjp(new, operands[0], 1, operands[1]),
        },
        Op::LogSumExp => match scores(new, operands[0]) {
            Some(weights) => weights.lse(new).map(Some),
            None => Ok(None),
        },
        Op::Reduce { axes, keep: true, mean: false } if axes[..] == [2] => {
            let Some((Op::Mul, x)) = new.source(operands[0]) else { return Ok(None) };
            for (w, dw) in [(x[0], x[1]), (x[1], x[0])] {
                if let (Some(weights), Some(dw)) = (softmax(new, w), WeightsAdjoint::of(new, dw)) {
                    return dw.inner(new, weights).map(Some);
                }
            }
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// The attention weights w = softmax(scale · scores(q, k)), described by their operands.
#[derive(Clone, Copy, PartialEq)]
struct Weights {
    q: Value,
    k: Value,
    causal: bool,
    scale: f64,
}

/// The dropout d of attention weights.
#[derive(Clone, Copy, PartialEq)]
struct Dropout {
    p: f64,
    stream: u32,
    column: u64,
    rng: Option<Value>,
}

/// A dropout that keeps every element.
const NO_DROPOUT: Dropout = Dropout { p: 0.0, stream: 0, column: 0, rng: None };

impl Weights {
    /// attention(q, k, v) with these weights and this dropout.
    fn attention(self, new: &mut Rewriter, v: Value, drop: Dropout) -> Result<Value, String> {
        let (Weights { q, k, causal, scale }, Dropout { p, stream, column, rng }) = (self, drop);
        let operands: Vec<Value> = [q, k, v].into_iter().chain(rng).collect();
        new.op(Op::Attention { causal, scale, p, stream, column }, &operands)
    }

    /// The logsumexp of each row of the scaled scores.
    fn lse(self, new: &mut Rewriter) -> Result<Value, String> {
        new.op(Op::AttentionLse { causal: self.causal, scale: self.scale }, &[self.q, self.k])
    }
}

/// Reads `value` as x · by.
fn unscaled(new: &Rewriter, value: Value) -> (Value, f64) {
    match new.source(value) {
        Some((Op::Scale { by }, x)) => (x[0], by),
        _ => (value, 1.0),
    }
}

/// Reads `value` as scaled scores.
fn scores(new: &Rewriter, value: Value) -> Option<Weights> {
    let (value, scale) = unscaled(new, value);
    match new.source(value)? {
        (Op::Scores { causal }, x) => Some(Weights { q: x[0], k: x[1], causal, scale }),
        _ => None,
    }
}

/// Reads `value` as the softmax of scaled scores.
fn softmax(new: &Rewriter, value: Value) -> Option<Weights> {
    match new.source(value)? {
        (Op::Softmax, x) => scores(new, x[0]),
        _ => None,
    }
}

/// Reads `value` as ρ ⊙ x; returns x and the factors of ρ.
fn without_row_factors(new: &Rewriter, mut value: Value) -> (Value, Vec<Value>) {
    let mut rows = vec![];
    while let Some((Op::Mul, x)) = new.source(value) {
        let row = |v: Value| new.graph.ty(v).last() == Some(Dim::Const(1));
        (value, rows) = match (row(x[0]), row(x[1])) {
            (false, true) => (x[0], [rows, vec![x[1]]].concat()),
            (true, false) => (x[1], [rows, vec![x[0]]].concat()),
            _ => break,
        };
    }
    (value, rows)
}

/// ρ ⊙ x, given the factors of ρ.
fn times_row_factors(new: &mut Rewriter, x: Value, rows: &[Value]) -> Result<Value, String> {
    rows.iter().try_fold(x, |x, &row| new.op(Op::Mul, &[x, row]))
}

/// Reads `value` as ρ ⊙ d(x); returns x, d and the factors of ρ. Row factors commute with dropout, so they may occur on
/// either side of it.
fn without_dropout(new: &Rewriter, value: Value) -> (Value, Dropout, Vec<Value>) {
    let (value, rows) = without_row_factors(new, value);
    match new.source(value) {
        Some((Op::Dropout { p, stream, column }, x)) => {
            let (value, more) = without_row_factors(new, x[0]);
            (value, Dropout { p, stream, column, rng: Some(x[1]) }, [rows, more].concat())
        }
        _ => (value, NO_DROPOUT, rows),
    }
}

/// Reads `value` as ρ ⊙ d(w).
fn dropped_weights(new: &Rewriter, value: Value) -> Option<(Weights, Dropout, Vec<Value>)> {
    let (value, drop, rows) = without_dropout(new, value);
    Some((softmax(new, value)?, drop, rows))
}

/// The adjoint of w, ρ ⊙ d(scores(df, v)), described by its operands.
struct WeightsAdjoint {
    df: Value,
    v: Value,
    drop: Dropout,
    rows: Vec<Value>,
}

impl WeightsAdjoint {
    fn of(new: &Rewriter, value: Value) -> Option<WeightsAdjoint> {
        let (value, drop, rows) = without_dropout(new, value);
        match new.source(value)? {
            (Op::Scores { causal: false }, x) => Some(WeightsAdjoint { df: x[0], v: x[1], drop, rows }),
            _ => None,
        }
    }

    /// The inner product ρ Σ df ⊙ f of each row.
    fn inner(&self, new: &mut Rewriter, weights: Weights) -> Result<Value, String> {
        let f = weights.attention(new, self.v, self.drop)?;
        let inner = new.op(Op::Mul, &[self.df, f])?;
        let inner = new.op(Op::Reduce { axes: vec![2], keep: true, mean: false }, &[inner])?;
        times_row_factors(new, inner, &self.rows)
    }
}

/// The adjoint ds of the scores, described by its operands.
struct ScoresAdjoint {
    weights: Weights,
    /// One adjoint of the weights for each use of them.
    products: Vec<WeightsAdjoint>,
    /// The terms of c.
    row_terms: Vec<Value>,
}

impl ScoresAdjoint {
    /// Reads `value` as ds, including the factor `scale`.
    fn of(new: &Rewriter, value: Value) -> Option<ScoresAdjoint> {
        let (value, by) = unscaled(new, value);
        let terms = terms(new, value);
        let weights = terms.iter().find_map(|&term| match new.source(term) {
            Some((Op::SoftmaxVjp, x)) => softmax(new, x[0]),
            _ => None,
        })?;
        let mut adjoint = ScoresAdjoint { weights, products: vec![], row_terms: vec![] };
        for term in terms {
            match new.source(term)? {
                (Op::SoftmaxVjp, x) if softmax(new, x[0]) == Some(weights) => {
                    adjoint.products.push(WeightsAdjoint::of(new, x[1])?);
                }
                (Op::Mul, _) => {
                    let (w, rows) = without_row_factors(new, term);
                    let [c] = rows[..] else { return None };
                    let row = [&new.graph.ty(w).shape[..2], &[Dim::Const(1)]].concat();
                    if softmax(new, w) != Some(weights) || new.graph.ty(c).shape != row {
                        return None;
                    }
                    adjoint.row_terms.push(c);
                }
                _ => return None,
            }
        }
        (weights.scale == by).then_some(adjoint)
    }
}

/// The terms of the sum that `value` is.
fn terms(new: &Rewriter, value: Value) -> Vec<Value> {
    match new.source(value) {
        Some((Op::Add, x)) => x.iter().flat_map(|&x| terms(new, x)).collect(),
        _ => vec![value],
    }
}

/// The adjoint of q, attend(ds, k), for `of` = 0, and that of k, attend_transposed(ds, q), for `of` = 1.
fn vjp(new: &mut Rewriter, ds: Value, of: usize, other: Value) -> Result<Option<Value>, String> {
    let Some(ScoresAdjoint { weights, products, row_terms }) = ScoresAdjoint::of(new, ds) else { return Ok(None) };
    if other != [weights.k, weights.q][of] {
        return Ok(None);
    }
    let mut row_terms = row_terms.into_iter();
    let mut c = row_terms.next();
    for more in row_terms {
        c = c.map(|c| new.op(Op::Add, &[c, more])).transpose()?;
    }
    let mut sum = None;
    for product in products {
        let inner = product.inner(new, weights)?;
        let row = match c.take() {
            Some(c) => new.op(Op::Sub, &[c, inner])?,
            None => new.op(Op::Scale { by: -1.0 }, &[inner])?,
        };
        let df = times_row_factors(new, product.df, &product.rows)?;
        let term = attention_vjp(new, of, weights, product.drop, [product.v, df, row])?;
        sum = Some(match sum {
            Some(sum) => new.op(Op::Add, &[sum, term])?,
            None => term,
        });
    }
    Ok(sum)
}

/// The adjoint of v, attend_transposed(d(w), df). It does not depend on v or r, so df and lse are passed for them.
fn values_adjoint(new: &mut Rewriter, weights: Weights, drop: Dropout, df: Value) -> Result<Value, String> {
    let row = weights.lse(new)?;
    attention_vjp(new, 2, weights, drop, [df, df, row])
}

/// The adjoint of q, k or v, for `of` = 0, 1 or 2; `row` is r.
fn attention_vjp(
    new: &mut Rewriter,
    of: usize,
    weights: Weights,
    drop: Dropout,
    [v, df, row]: [Value; 3],
) -> Result<Value, String> {
    let (Weights { q, k, causal, scale }, Dropout { p, stream, column, rng }) = (weights, drop);
    let lse = weights.lse(new)?;
    let operands: Vec<Value> = [q, k, v, lse, df, row].into_iter().chain(rng).collect();
    new.op(Op::AttentionVjp { of, causal, scale, p, stream, column }, &operands)
}
