//! Chunked cross-entropy: logits over a large vocabulary that only the loss reads are never materialised. The loss
//! needs their logsumexp, and the backward pass needs the expectation of the rows of the output embedding W under their
//! softmax. One sweep over chunks of the vocabulary computes both, as in Wijmans et al. (2024), "Cut your losses".
//!
//! ```text
//! logits = x Wᵀ,  W = [A ; B] by rows,  A frozen and large,  B small or trained (W may be partly trained),  s = x Bᵀ
//! t the labels,  V the number of rows of W,  ε the label smoothing,  d the adjoint of the loss
//! w_P = (1−ε) P_t + ε/V Σ_v P_v for a part P of W, with P_t = 0 if row t belongs to another part:
//!
//! a   = ln Σ_v e^{x·A_v}     =  linear_lse(x, A)
//! Ā   = Σ_v softmax_v A_v    =  linear_mean(x, A)
//! lse = ln(eᵃ + Σ eˢ)        =  log_sum_exp([a ; s])
//!
//! cross_entropy(logits, t)                          =  lse − x · (w_A + w_B)
//! slice(cross_entropy_vjp(logits, t, d), of A) @ A  =  d ⊙ (e^{a − lse} Ā − w_A)
//! slice(cross_entropy_vjp(logits, t, d), of B)      =  d ⊙ (e^{s − lse} − (1−ε) [v = t] − ε/V)
//! ```
//!
//! Σ_v A_v does not depend on the batch.

use peft_grammar::graph::{Dim, Op, Role, Value};

use super::Thresholds;
use crate::rewrite::Rewriter;

pub fn apply(
    new: &mut Rewriter,
    op: &Op,
    operands: &[Value],
    thresholds: &Thresholds,
) -> Result<Option<Value>, String> {
    match *op {
        Op::CrossEntropy { smoothing } => match Head::of(new, operands[0], operands[1], smoothing, thresholds) {
            Some(head) => head.loss(new).map(Some),
            None => Ok(None),
        },
        Op::Matmul { transpose_x: false, transpose_y: false } => {
            let Some((adjoint, columns)) = adjoint_columns(new, operands[0], thresholds) else { return Ok(None) };
            let own = |p: &&Part| p.chunked && p.columns() == columns && p.weight == operands[1];
            match adjoint.head.parts.iter().find(own) {
                Some(part) => adjoint.times_weight(new, part).map(Some),
                None => Ok(None),
            }
        }
        Op::Slice { axis: 1, .. } => {
            let Some((adjoint, columns)) = sliced(new, op, operands[0], thresholds) else { return Ok(None) };
            match adjoint.head.parts.iter().find(|p| !p.chunked && p.columns() == columns) {
                Some(part) => adjoint.part(new, part).map(Some),
                None => Ok(None),
            }
        }
        _ => Ok(None),
    }
}

/// Logits x Wᵀ by the parts of W, with their labels.
struct Head {
    x: Value,
    parts: Vec<Part>,
    labels: Value,
    smoothing: f64,
}

/// A part of W: `rows` consecutive rows from `start` on, and their logits.
struct Part {
    weight: Value,
    logits: Value,
    start: u64,
    rows: u64,
    /// The logits of this part are computed in chunks and not materialised.
    chunked: bool,
}

impl Part {
    fn columns(&self) -> (u64, u64) {
        (self.start, self.start + self.rows)
    }

    fn lse(&self, new: &mut Rewriter, x: Value) -> Result<Value, String> {
        new.op(Op::LinearLse, &[x, self.weight])
    }
}

impl Head {
    /// `None` unless some part can be computed in chunks and the logits are no output of the graph.
    fn of(new: &Rewriter, logits: Value, labels: Value, smoothing: f64, thresholds: &Thresholds) -> Option<Head> {
        if new.is_output(logits) {
            return None;
        }
        let pieces = match new.source(logits)? {
            (Op::Concat { axis: 1 }, pieces) => pieces,
            _ => vec![logits],
        };
        let mut head = Head { x: logits, parts: vec![], labels, smoothing };
        for logits in pieces {
            let (Op::Matmul { transpose_x: false, transpose_y: true }, product) = new.source(logits)? else {
                return None;
            };
            let (x, weight) = (product[0], product[1]);
            if !head.parts.is_empty() && x != head.x || new.graph.ty(x).rank() != 2 {
                return None;
            }
            let rows = new.graph.ty(weight).shape[0].constant()?;
            let frozen = new.graph.args.iter().any(|a| a.value == weight && a.role == Role::Frozen);
            let start = head.vocabulary();
            head.x = x;
            head.parts.push(Part {
                weight,
                logits,
                start,
                rows,
                chunked: frozen && rows >= thresholds.min_chunked_vocab,
            });
        }
        head.parts.iter().any(|p| p.chunked).then_some(head)
    }

    fn vocabulary(&self) -> u64 {
        self.parts.iter().map(|p| p.rows).sum()
    }

    /// ε/V, the weight that label smoothing gives to every class.
    fn smoothing_per_class(&self) -> f64 {
        self.smoothing / self.vocabulary() as f64
    }

    /// The logsumexp of each row of all logits, [n,1].
    fn lse(&self, new: &mut Rewriter) -> Result<Value, String> {
        let column = |p: &Part, new: &mut Rewriter| if p.chunked { p.lse(new, self.x) } else { Ok(p.logits) };
        let columns = self.parts.iter().map(|p| column(p, new)).collect::<Result<Vec<_>, _>>()?;
        match columns[..] {
            [lse] => Ok(lse),
            _ => {
                let joined = new.op(Op::Concat { axis: 1 }, &columns)?;
                new.op(Op::LogSumExp, &[joined])
            }
        }
    }

    fn loss(&self, new: &mut Rewriter) -> Result<Value, String> {
        let mut target = self.target_row(new, &self.parts[0])?;
        for part in &self.parts[1..] {
            let more = self.target_row(new, part)?;
            target = new.op(Op::Add, &[target, more])?;
        }
        let products = new.op(Op::Mul, &[self.x, target])?;
        let score = new.op(Op::Reduce { axes: vec![1], keep: true, mean: false }, &[products])?;
        let lse = self.lse(new)?;
        let loss = new.op(Op::Sub, &[lse, score])?;
        let shape = vec![new.graph.ty(loss).shape[0]];
        new.op(Op::Reshape { shape }, &[loss])
    }

    /// w_P, the sum of the rows of part P weighted by the smoothed labels, [n,d].
    fn target_row(&self, new: &mut Rewriter, part: &Part) -> Result<Value, String> {
        let rows = new.op(Op::Gather { start: part.start }, &[part.weight, self.labels])?;
        if self.smoothing == 0.0 {
            return Ok(rows);
        }
        let rows = new.op(Op::Scale { by: 1.0 - self.smoothing }, &[rows])?;
        let sum = new.op(Op::Reduce { axes: vec![0], keep: true, mean: false }, &[part.weight])?;
        let smoothed = new.op(Op::Scale { by: self.smoothing_per_class() }, &[sum])?;
        new.op(Op::Add, &[rows, smoothed])
    }

    /// The one-hot labels [n,rows of the part]: step(½ − (v − t)²), which is 1 at v = t and 0 elsewhere.
    fn one_hot(&self, new: &mut Rewriter, part: &Part) -> Result<Value, String> {
        let label = new.op(Op::Float, &[self.labels])?;
        let shape = vec![new.graph.ty(label).shape[0], Dim::Const(1)];
        let label = new.op(Op::Reshape { shape }, &[label])?;
        let numbers = new.op(Op::Iota { n: part.rows }, &[])?;
        let numbers = new.op(Op::Shift { by: part.start as f64 }, &[numbers])?;
        let distance = new.op(Op::Sub, &[numbers, label])?;
        let square = new.op(Op::Mul, &[distance, distance])?;
        let negative = new.op(Op::Scale { by: -1.0 }, &[square])?;
        let near = new.op(Op::Shift { by: 0.5 }, &[negative])?;
        new.op(Op::Step, &[near])
    }
}

/// The adjoint of all logits, from the adjoint `d` of the loss.
struct Adjoint {
    head: Head,
    d: Value,
}

impl Adjoint {
    /// The product of the adjoint of a chunked part's logits with its weight: the part's share of the adjoint of x.
    fn times_weight(&self, new: &mut Rewriter, part: &Part) -> Result<Value, String> {
        let mut mean = new.op(Op::LinearMean, &[self.head.x, part.weight])?;
        if self.head.parts.len() > 1 {
            let (own, all) = (part.lse(new, self.head.x)?, self.head.lse(new)?);
            let share = new.op(Op::Sub, &[own, all])?;
            let share = new.op(Op::Exp, &[share])?;
            mean = new.op(Op::Mul, &[mean, share])?;
        }
        let target = self.head.target_row(new, part)?;
        let difference = new.op(Op::Sub, &[mean, target])?;
        self.times_d(new, difference)
    }

    /// The adjoint of the logits of a part that is not chunked.
    fn part(&self, new: &mut Rewriter, part: &Part) -> Result<Value, String> {
        let lse = self.head.lse(new)?;
        let p = new.op(Op::Sub, &[part.logits, lse])?;
        let mut p = new.op(Op::Exp, &[p])?;
        if self.head.smoothing > 0.0 {
            p = new.op(Op::Shift { by: -self.head.smoothing_per_class() }, &[p])?;
        }
        let label = self.head.one_hot(new, part)?;
        let label = new.op(Op::Scale { by: 1.0 - self.head.smoothing }, &[label])?;
        let difference = new.op(Op::Sub, &[p, label])?;
        self.times_d(new, difference)
    }

    /// Multiplies each row by its entry of d.
    fn times_d(&self, new: &mut Rewriter, rows: Value) -> Result<Value, String> {
        let shape = vec![new.graph.ty(self.d).shape[0], Dim::Const(1)];
        let d = new.op(Op::Reshape { shape }, &[self.d])?;
        new.op(Op::Mul, &[rows, d])
    }
}

/// Reads `value` as columns `start..end` of the adjoint of logits.
fn adjoint_columns(new: &Rewriter, value: Value, thresholds: &Thresholds) -> Option<(Adjoint, (u64, u64))> {
    match new.source(value)? {
        (slice @ Op::Slice { axis: 1, .. }, x) => sliced(new, &slice, x[0], thresholds),
        (Op::CrossEntropyVjp { smoothing }, x) => {
            let head = Head::of(new, x[0], x[1], smoothing, thresholds)?;
            let all = (0, head.vocabulary());
            Some((Adjoint { head, d: x[2] }, all))
        }
        _ => None,
    }
}

fn sliced(new: &Rewriter, slice: &Op, of: Value, thresholds: &Thresholds) -> Option<(Adjoint, (u64, u64))> {
    let (Op::CrossEntropyVjp { .. }, _) = new.source(of)? else { return None };
    let (adjoint, (_, all)) = adjoint_columns(new, of, thresholds)?;
    let Op::Slice { start, end, .. } = *slice else { return None };
    Some((adjoint, (start, end.unwrap_or(all))))
}
