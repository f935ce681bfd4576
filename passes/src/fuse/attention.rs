//! Attention without its square: scores, their softmax and its dropout are never written down, and are computed again
//! where the backward pass wants them.
//!
//! ```text
//! s = scale · scores(q, k),  w = softmax(s),  d = dropout,  ρ one number a row:
//! attend(ρ ⊙ d(w), v)                               =  ρ ⊙ attention(q, k, v)
//! ln Σ eˢ                                           =  attention_lse(q, k)
//!
//! df an adjoint of f = attend(d(w), v), and c a term of each row (columns in front have one):
//! Σ_j w ⊙ d(scores(df, v))                          =  Σ df ⊙ f
//! ds = scale · (softmax_vjp(w, ρ ⊙ d(scores(df, v))) + c ⊙ w)
//!    = scale · w ⊙ (d(ρ ⊙ df vᵀ) + r),  r = c − ρ Σ df ⊙ f
//! attend(ds, k)                                     =  attention_vjp 0 of ρ ⊙ df
//! attend_transposed(ds, q)                          =  attention_vjp 1 of ρ ⊙ df
//! attend_transposed(ρ ⊙ d(w), df)                   =  attention_vjp 2 of ρ ⊙ df
//! ```

use peft_grammar::graph::{Dim, Op, Value};

use super::Limits;
use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value], _: &Limits) -> Result<Option<Value>, String> {
    match op {
        Op::Attend { .. } => match dropped_weights(new, operands[0]) {
            Some((weights, drop, rows)) => {
                let f = weights.attention(new, operands[1], drop)?;
                scaled(new, f, &rows).map(Some)
            }
            None => vjp(new, operands[0], 0, operands[1]),
        },
        Op::AttendTransposed { .. } => match dropped_weights(new, operands[0]) {
            Some((weights, drop, rows)) => {
                let df = scaled(new, operands[1], &rows)?;
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
                if let (Some(weights), Some(dw)) = (softmax(new, w), Product::of(new, dw)) {
                    return dw.inner(new, weights).map(Some);
                }
            }
            Ok(None)
        }
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
    column: u64,
    rng: Option<Value>,
}

const KEPT: Drop = Drop { p: 0.0, stream: 0, column: 0, rng: None };

impl Weights {
    fn attention(self, new: &mut Rewriter, v: Value, drop: Drop) -> Result<Value, String> {
        let (Weights { q, k, causal, scale }, Drop { p, stream, column, rng }) = (self, drop);
        let operands: Vec<Value> = [q, k, v].into_iter().chain(rng).collect();
        new.op(Op::Attention { causal, scale, p, stream, column }, &operands)
    }

    fn lse(self, new: &mut Rewriter) -> Result<Value, String> {
        new.op(Op::AttentionLse { causal: self.causal, scale: self.scale }, &[self.q, self.k])
    }
}

fn unscaled(new: &Rewriter, value: Value) -> (Value, f64) {
    match new.source(value) {
        Some((Op::Scale { by }, x)) => (x[0], by),
        _ => (value, 1.0),
    }
}

fn scores(new: &Rewriter, value: Value) -> Option<Weights> {
    let (value, scale) = unscaled(new, value);
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

/// `value` as ρ ⊙ x: x, and the factors of ρ.
fn by_row(new: &Rewriter, mut value: Value) -> (Value, Vec<Value>) {
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

/// ρ ⊙ x
fn scaled(new: &mut Rewriter, x: Value, rows: &[Value]) -> Result<Value, String> {
    rows.iter().try_fold(x, |x, &row| new.op(Op::Mul, &[x, row]))
}

/// `value` as ρ ⊙ d(x). What is dropped is the same wherever the rows' factors stand.
fn undropped(new: &Rewriter, value: Value) -> (Value, Drop, Vec<Value>) {
    let (value, rows) = by_row(new, value);
    match new.source(value) {
        Some((Op::Dropout { p, stream, column }, x)) => {
            let (value, more) = by_row(new, x[0]);
            (value, Drop { p, stream, column, rng: Some(x[1]) }, [rows, more].concat())
        }
        _ => (value, KEPT, rows),
    }
}

fn dropped_weights(new: &Rewriter, value: Value) -> Option<(Weights, Drop, Vec<Value>)> {
    let (value, drop, rows) = undropped(new, value);
    Some((softmax(new, value)?, drop, rows))
}

/// ρ ⊙ d(scores(df, v)), the adjoint of w by what it is made of.
struct Product {
    df: Value,
    v: Value,
    drop: Drop,
    rows: Vec<Value>,
}

impl Product {
    fn of(new: &Rewriter, value: Value) -> Option<Product> {
        let (value, drop, rows) = undropped(new, value);
        match new.source(value)? {
            (Op::Scores { causal: false }, x) => Some(Product { df: x[0], v: x[1], drop, rows }),
            _ => None,
        }
    }

    /// ρ Σ df ⊙ f
    fn inner(&self, new: &mut Rewriter, weights: Weights) -> Result<Value, String> {
        let f = weights.attention(new, self.v, self.drop)?;
        let inner = new.op(Op::Mul, &[self.df, f])?;
        let inner = new.op(Op::Reduce { axes: vec![2], keep: true, mean: false }, &[inner])?;
        scaled(new, inner, &self.rows)
    }
}

/// The adjoint of scaled scores, scale included, by what it is made of: one product each time the weights are used.
struct Adjoint {
    weights: Weights,
    products: Vec<Product>,
    /// c
    columns: Vec<Value>,
}

impl Adjoint {
    fn of(new: &Rewriter, value: Value) -> Option<Adjoint> {
        let (value, by) = unscaled(new, value);
        let terms = terms(new, value);
        let weights = terms.iter().find_map(|&term| match new.source(term) {
            Some((Op::SoftmaxVjp, x)) => softmax(new, x[0]),
            _ => None,
        })?;
        let mut adjoint = Adjoint { weights, products: vec![], columns: vec![] };
        for term in terms {
            match new.source(term)? {
                (Op::SoftmaxVjp, x) if softmax(new, x[0]) == Some(weights) => {
                    adjoint.products.push(Product::of(new, x[1])?);
                }
                (Op::Mul, _) => {
                    let (w, rows) = by_row(new, term);
                    let [c] = rows[..] else { return None };
                    let row = [&new.graph.ty(w).shape[..2], &[Dim::Const(1)]].concat();
                    if softmax(new, w) != Some(weights) || new.graph.ty(c).shape != row {
                        return None;
                    }
                    adjoint.columns.push(c);
                }
                _ => return None,
            }
        }
        (weights.scale == by).then_some(adjoint)
    }
}

/// What is added up to `value`.
fn terms(new: &Rewriter, value: Value) -> Vec<Value> {
    match new.source(value) {
        Some((Op::Add, x)) => x.iter().flat_map(|&x| terms(new, x)).collect(),
        _ => vec![value],
    }
}

/// attend(ds, k) or attend_transposed(ds, q).
fn vjp(new: &mut Rewriter, ds: Value, of: usize, other: Value) -> Result<Option<Value>, String> {
    let Some(Adjoint { weights, products, columns }) = Adjoint::of(new, ds) else { return Ok(None) };
    if other != [weights.k, weights.q][of] {
        return Ok(None);
    }
    let mut columns = columns.into_iter();
    let mut c = columns.next();
    for more in columns {
        c = c.map(|c| new.op(Op::Add, &[c, more])).transpose()?;
    }
    let mut sum = None;
    for product in products {
        let inner = product.inner(new, weights)?;
        let row = match c.take() {
            Some(c) => new.op(Op::Sub, &[c, inner])?,
            None => new.op(Op::Scale { by: -1.0 }, &[inner])?,
        };
        let df = scaled(new, product.df, &product.rows)?;
        let term = attention_vjp(new, of, weights, product.drop, [product.v, df, row])?;
        sum = Some(match sum {
            Some(sum) => new.op(Op::Add, &[sum, term])?,
            None => term,
        });
    }
    Ok(sum)
}

/// attend_transposed(d(w), df): neither v nor r have a part in it, so df and lse stand in for them.
fn values_adjoint(new: &mut Rewriter, weights: Weights, drop: Drop, df: Value) -> Result<Value, String> {
    let row = weights.lse(new)?;
    attention_vjp(new, 2, weights, drop, [df, df, row])
}

fn attention_vjp(
    new: &mut Rewriter,
    of: usize,
    weights: Weights,
    drop: Drop,
    [v, df, row]: [Value; 3],
) -> Result<Value, String> {
    let (Weights { q, k, causal, scale }, Drop { p, stream, column, rng }) = (weights, drop);
    let lse = weights.lse(new)?;
    let operands: Vec<Value> = [q, k, v, lse, df, row].into_iter().chain(rng).collect();
    new.op(Op::AttentionVjp { of, causal, scale, p, stream, column }, &operands)
}
