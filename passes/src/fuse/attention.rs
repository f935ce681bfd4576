//! Attention without its square: scores, their softmax and its dropout are never written down, and are computed again
//! where the backward pass wants them.
//!
//! ```text
//! s = scale · scores(q, k),  w = softmax(s),  d = dropout:
//! attend(d(w), v)                                   =  attention(q, k, v)
//! ln Σ eˢ                                           =  attention_lse(q, k)
//!
//! df an adjoint of f = attend(d(w), v), and c a term of each row (an inducer's column has one):
//! ds = scale · (softmax_vjp(w, d(scores(df, v))) + c ⊙ w)  =  scale · w ⊙ (d(df vᵀ) + r),  r = c − Σ df ⊙ f
//! attend(ds, k)                                     =  attention_vjp 0
//! attend_transposed(ds, q)                          =  attention_vjp 1
//! attend_transposed(d(w), df)                       =  attention_vjp 2
//! ```
//!
//! The row's sum Σ_j w_ij d(df vᵀ)_ij of the softmax's own derivative is df_i · f_i.

use peft_grammar::graph::{Op, Value};

use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value]) -> Result<Option<Value>, String> {
    match op {
        Op::Attend { .. } => {
            if let Some((weights, drop)) = dropped_weights(new, operands[0]) {
                return weights.attention(new, operands[1], drop).map(Some);
            }
            match adjoint(new, operands[0])? {
                Some(ds) if ds.weights.k == operands[1] => ds.vjp(new, 0).map(Some),
                _ => Ok(None),
            }
        }
        Op::AttendTransposed { .. } => {
            if let Some((weights, drop)) = dropped_weights(new, operands[0]) {
                return values_adjoint(new, weights, drop, operands[1]).map(Some);
            }
            match adjoint(new, operands[0])? {
                Some(ds) if ds.weights.q == operands[1] => ds.vjp(new, 1).map(Some),
                _ => Ok(None),
            }
        }
        Op::LogSumExp => match scores(new, operands[0]) {
            Some(weights) => weights.lse(new).map(Some),
            None => Ok(None),
        },
        _ => Ok(None),
    }
}

/// softmax(scale · scores(q, k)), not computed.
#[derive(Clone, Copy, PartialEq)]
struct Weights {
    q: Value,
    k: Value,
    causal: bool,
    scale: f64,
}

/// What drops some of them.
#[derive(Clone, Copy, PartialEq)]
struct Drop {
    p: f64,
    stream: u32,
    rng: Option<Value>,
}

const KEPT: Drop = Drop { p: 0.0, stream: 0, rng: None };

impl Weights {
    fn attention(self, new: &mut Rewriter, v: Value, drop: Drop) -> Result<Value, String> {
        let op = Op::Attention { causal: self.causal, scale: self.scale, p: drop.p, stream: drop.stream };
        let operands: Vec<Value> = [self.q, self.k, v].into_iter().chain(drop.rng).collect();
        new.op(op, &operands)
    }

    fn lse(self, new: &mut Rewriter) -> Result<Value, String> {
        new.op(Op::AttentionLse { causal: self.causal, scale: self.scale }, &[self.q, self.k])
    }
}

fn scores(new: &Rewriter, value: Value) -> Option<Weights> {
    let (value, scale) = match new.source(value)? {
        (Op::Scale { by }, x) => (x[0], by),
        _ => (value, 1.0),
    };
    match new.source(value)? {
        (Op::Scores { causal }, x) => Some(Weights { q: x[0], k: x[1], causal, scale }),
        _ => None,
    }
}

fn softmax(new: &Rewriter, value: Value) -> Option<Weights> {
    match new.source(value)? {
        (Op::Softmax, x) => scores(new, x[0]),
        _ => None,
    }
}

fn undropped(new: &Rewriter, value: Value) -> (Value, Drop) {
    match new.source(value) {
        Some((Op::Dropout { p, stream }, x)) => (x[0], Drop { p, stream, rng: Some(x[1]) }),
        _ => (value, KEPT),
    }
}

fn dropped_weights(new: &Rewriter, value: Value) -> Option<(Weights, Drop)> {
    let (value, drop) = undropped(new, value);
    Some((softmax(new, value)?, drop))
}

/// The adjoint of scaled scores, by what it is made of.
struct Adjoint {
    weights: Weights,
    drop: Drop,
    df: Value,
    v: Value,
    /// r
    row: Value,
}

impl Adjoint {
    fn vjp(self, new: &mut Rewriter, of: usize) -> Result<Value, String> {
        let Weights { q, k, causal, scale } = self.weights;
        let op = Op::AttentionVjp { of, causal, scale, p: self.drop.p, stream: self.drop.stream };
        let lse = self.weights.lse(new)?;
        let operands: Vec<Value> = [q, k, self.v, lse, self.df, self.row].into_iter().chain(self.drop.rng).collect();
        new.op(op, &operands)
    }
}

/// `value` as ds: the adjoint of the scores themselves, scale included.
fn adjoint(new: &mut Rewriter, value: Value) -> Result<Option<Adjoint>, String> {
    let (value, by) = match new.source(value) {
        Some((Op::Scale { by }, x)) => (x[0], by),
        _ => (value, 1.0),
    };
    let (vjp, column) = match new.source(value) {
        Some((Op::Add, x)) => match (new.source(x[0]), new.source(x[1])) {
            (Some((Op::SoftmaxVjp, _)), _) => (x[0], Some(x[1])),
            (_, Some((Op::SoftmaxVjp, _))) => (x[1], Some(x[0])),
            _ => return Ok(None),
        },
        _ => (value, None),
    };
    let Some((Op::SoftmaxVjp, x)) = new.source(vjp) else { return Ok(None) };
    let Some(weights) = softmax(new, x[0]).filter(|w| w.scale == by) else { return Ok(None) };
    let (dw, drop) = undropped(new, x[1]);
    let Some((Op::Scores { causal: false }, product)) = new.source(dw) else { return Ok(None) };
    let (df, v) = (product[0], product[1]);
    let f = weights.attention(new, v, drop)?;
    let inner = new.op(Op::Mul, &[df, f])?;
    let inner = new.op(Op::Reduce { axes: vec![2], keep: true, mean: false }, &[inner])?;
    let row = match column {
        None => new.op(Op::Scale { by: -1.0 }, &[inner])?,
        Some(column) => {
            // c ⊙ w, in either order.
            let Some((Op::Mul, factors)) = new.source(column) else { return Ok(None) };
            let own = |i: usize| softmax(new, factors[i]) == Some(weights);
            let c = match (own(0), own(1)) {
                (false, true) => factors[0],
                (true, false) => factors[1],
                _ => return Ok(None),
            };
            if new.graph.ty(c) != new.graph.ty(inner) {
                return Ok(None);
            }
            new.op(Op::Sub, &[c, inner])?
        }
    };
    Ok(Some(Adjoint { weights, drop, df, v, row }))
}

/// attend_transposed(d(w), df): neither v nor r have a part in it, so df and lse stand in for them.
fn values_adjoint(new: &mut Rewriter, weights: Weights, drop: Drop, df: Value) -> Result<Value, String> {
    let row = weights.lse(new)?;
    Adjoint { weights, drop, df, v: df, row }.vjp(new, 2)
}
