//! Head and loss: logits over a large vocabulary that only their loss reads are never whole. What it wants of them is
//! their log-sum-exp and, in the backward pass, the row of the head's weight that their softmax expects; a sweep over
//! blocks of the vocabulary gives both.
//!
//! ```text
//! logits = x Wᵀ with W = [A ; B] by rows: A frozen and wide, B narrow or trained (a partly trained table), s = x Bᵀ
//! t the labels, V the rows of W, d an adjoint of the loss, w_P = (1−ε) P_t + ε/V Σ_v P_v for a part P (P_t = 0 if t
//! lies outside of it):
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
//! ΣA waits for no batch.

use peft_grammar::graph::{Dim, Op, Role, Value};

use super::Limits;
use crate::rewrite::Rewriter;

pub fn apply(new: &mut Rewriter, op: &Op, operands: &[Value], limits: &Limits) -> Result<Option<Value>, String> {
    match *op {
        Op::CrossEntropy { smoothing } => match Head::of(new, operands[0], operands[1], smoothing, limits) {
            Some(head) => head.loss(new).map(Some),
            None => Ok(None),
        },
        Op::Matmul { transpose_x: false, transpose_y: false } => {
            let Some((adjoint, columns)) = adjoint_columns(new, operands[0], limits) else { return Ok(None) };
            let own = |p: &&Part| p.swept && p.columns() == columns && p.weight == operands[1];
            match adjoint.head.parts.iter().find(own) {
                Some(part) => adjoint.times_weight(new, part).map(Some),
                None => Ok(None),
            }
        }
        Op::Slice { axis: 1, .. } => {
            let Some((adjoint, columns)) = sliced(new, op, operands[0], limits) else { return Ok(None) };
            match adjoint.head.parts.iter().find(|p| !p.swept && p.columns() == columns) {
                Some(part) => adjoint.part(new, part).map(Some),
                None => Ok(None),
            }
        }
        _ => Ok(None),
    }
}

/// Logits by what they are made of, and their labels.
struct Head {
    x: Value,
    parts: Vec<Part>,
    labels: Value,
    smoothing: f64,
}

/// Some rows of W and the logits they make.
struct Part {
    weight: Value,
    logits: Value,
    start: u64,
    rows: u64,
    swept: bool,
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
    /// `None` unless something of it can be swept and no one but the loss wants the logits.
    fn of(new: &Rewriter, logits: Value, labels: Value, smoothing: f64, limits: &Limits) -> Option<Head> {
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
            head.parts.push(Part { weight, logits, start, rows, swept: frozen && rows >= limits.wide });
        }
        head.parts.iter().any(|p| p.swept).then_some(head)
    }

    fn vocabulary(&self) -> u64 {
        self.parts.iter().map(|p| p.rows).sum()
    }

    /// ε/V
    fn spread(&self) -> f64 {
        self.smoothing / self.vocabulary() as f64
    }

    /// [n,1]
    fn lse(&self, new: &mut Rewriter) -> Result<Value, String> {
        let column = |p: &Part, new: &mut Rewriter| if p.swept { p.lse(new, self.x) } else { Ok(p.logits) };
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
        let mut wanted = self.wanted(new, &self.parts[0])?;
        for part in &self.parts[1..] {
            let more = self.wanted(new, part)?;
            wanted = new.op(Op::Add, &[wanted, more])?;
        }
        let products = new.op(Op::Mul, &[self.x, wanted])?;
        let score = new.op(Op::Reduce { axes: vec![1], keep: true, mean: false }, &[products])?;
        let lse = self.lse(new)?;
        let loss = new.op(Op::Sub, &[lse, score])?;
        let shape = vec![new.graph.ty(loss).shape[0]];
        new.op(Op::Reshape { shape }, &[loss])
    }

    /// w_P, [n,d]
    fn wanted(&self, new: &mut Rewriter, part: &Part) -> Result<Value, String> {
        let rows = new.op(Op::Gather { start: part.start }, &[part.weight, self.labels])?;
        if self.smoothing == 0.0 {
            return Ok(rows);
        }
        let rows = new.op(Op::Scale { by: 1.0 - self.smoothing }, &[rows])?;
        let sum = new.op(Op::Reduce { axes: vec![0], keep: true, mean: false }, &[part.weight])?;
        let spread = new.op(Op::Scale { by: self.spread() }, &[sum])?;
        new.op(Op::Add, &[rows, spread])
    }

    /// 1 at the label, 0 elsewhere: where ½ − (v − t)² > 0.
    fn hits(&self, new: &mut Rewriter, part: &Part) -> Result<Value, String> {
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

/// The adjoint of all logits.
struct Adjoint {
    head: Head,
    d: Value,
}

impl Adjoint {
    /// What reaches x through a part that is swept.
    fn times_weight(&self, new: &mut Rewriter, part: &Part) -> Result<Value, String> {
        let mut mean = new.op(Op::LinearMean, &[self.head.x, part.weight])?;
        if self.head.parts.len() > 1 {
            let (own, all) = (part.lse(new, self.head.x)?, self.head.lse(new)?);
            let share = new.op(Op::Sub, &[own, all])?;
            let share = new.op(Op::Exp, &[share])?;
            mean = new.op(Op::Mul, &[mean, share])?;
        }
        let wanted = self.head.wanted(new, part)?;
        let difference = new.op(Op::Sub, &[mean, wanted])?;
        self.times_d(new, difference)
    }

    /// Of the logits of a part that is not.
    fn part(&self, new: &mut Rewriter, part: &Part) -> Result<Value, String> {
        let lse = self.head.lse(new)?;
        let p = new.op(Op::Sub, &[part.logits, lse])?;
        let mut p = new.op(Op::Exp, &[p])?;
        if self.head.smoothing > 0.0 {
            p = new.op(Op::Shift { by: -self.head.spread() }, &[p])?;
        }
        let hit = self.head.hits(new, part)?;
        let hit = new.op(Op::Scale { by: 1.0 - self.head.smoothing }, &[hit])?;
        let difference = new.op(Op::Sub, &[p, hit])?;
        self.times_d(new, difference)
    }

    fn times_d(&self, new: &mut Rewriter, rows: Value) -> Result<Value, String> {
        let shape = vec![new.graph.ty(self.d).shape[0], Dim::Const(1)];
        let d = new.op(Op::Reshape { shape }, &[self.d])?;
        new.op(Op::Mul, &[rows, d])
    }
}

/// `value` as some columns of the adjoint of logits, which ones included.
fn adjoint_columns(new: &Rewriter, value: Value, limits: &Limits) -> Option<(Adjoint, (u64, u64))> {
    match new.source(value)? {
        (slice @ Op::Slice { axis: 1, .. }, x) => sliced(new, &slice, x[0], limits),
        (Op::CrossEntropyVjp { smoothing }, x) => {
            let head = Head::of(new, x[0], x[1], smoothing, limits)?;
            let all = (0, head.vocabulary());
            Some((Adjoint { head, d: x[2] }, all))
        }
        _ => None,
    }
}

fn sliced(new: &Rewriter, slice: &Op, of: Value, limits: &Limits) -> Option<(Adjoint, (u64, u64))> {
    let (Op::CrossEntropyVjp { .. }, _) = new.source(of)? else { return None };
    let (adjoint, (_, all)) = adjoint_columns(new, of, limits)?;
    let Op::Slice { start, end, .. } = *slice else { return None };
    Some((adjoint, (start, end.unwrap_or(all))))
}
