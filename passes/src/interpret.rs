//! The reference interpreter: defines the meaning of every operation, in f64 and in plain loops.
//!
//! Compiled kernels are tested against it. It is written for clarity alone: each operation defines the element at an
//! index, and one loop (`Evaluation::build`) visits the indices.

pub mod optimizer;

use std::collections::HashMap;

use peft_grammar::graph::{DType, Dim, Graph, Op, Type, Value};

use peft_runtime::philox::{dropout_threshold, dropout_word};

/// The elements of a tensor in row-major order. In a ragged tensor, rows of different lengths follow one another.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// The elements of an f32 tensor, in f64.
    F64(Vec<f64>),
    /// The elements of an i32 tensor.
    I32(Vec<i32>),
}

impl Data {
    /// The elements of a float tensor.
    ///
    /// # Panics
    /// The tensor holds integers.
    pub fn floats(&self) -> &[f64] {
        match self {
            Data::F64(x) => x,
            Data::I32(_) => panic!("the verifier keeps integers out of arithmetic"),
        }
    }
    fn ints(&self) -> &[i32] {
        match self {
            Data::I32(x) => x,
            Data::F64(_) => panic!("the verifier keeps floats out of indices"),
        }
    }
    fn len(&self) -> usize {
        match self {
            Data::F64(x) => x.len(),
            Data::I32(x) => x.len(),
        }
    }
}

/// The sizes that a batch determines, and the layout of ragged tensors.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The number of tokens of each sequence.
    pub lengths: Vec<usize>,
    /// The length of axes of [`Dim::Targets`].
    pub targets: usize,
    /// The length of axes of [`Dim::Values`].
    pub values: usize,
    /// The first token of each sequence, followed by the number of tokens.
    offsets: Vec<usize>,
    /// The sequence of each token.
    segments: Vec<usize>,
    /// For each token, the number of (token, key) pairs in the rows before its own; then the number of all pairs.
    pairs: Vec<usize>,
}

impl Batch {
    /// A batch of sequences of these lengths, with `targets` targets and no values.
    pub fn new(lengths: &[usize], targets: usize) -> Self {
        let mut batch =
            Batch { lengths: lengths.to_vec(), targets, values: 0, offsets: vec![0], segments: vec![], pairs: vec![0] };
        for (s, &n) in lengths.iter().enumerate() {
            batch.offsets.push(batch.offsets[s] + n);
            for _ in 0..n {
                batch.segments.push(s);
                batch.pairs.push(batch.pairs.last().expect("starts with 0") + n);
            }
        }
        batch
    }

    /// The number of tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.segments.len()
    }

    /// The keys of token `i`: all tokens of its sequence.
    fn keys(&self, i: usize) -> std::ops::Range<usize> {
        let s = self.segments[i];
        self.offsets[s]..self.offsets[s + 1]
    }

    fn dim(&self, dim: Dim) -> usize {
        match dim {
            Dim::Const(n) => n as usize,
            Dim::Tokens => self.tokens(),
            Dim::Sequences => self.lengths.len(),
            Dim::Targets => self.targets,
            Dim::Values => self.values,
            Dim::Keys(_) => unreachable!("a ragged axis has no single length"),
        }
    }

    /// The lengths of all axes but the last.
    fn leading(&self, shape: &[Dim]) -> Vec<usize> {
        shape[..shape.len().saturating_sub(1)].iter().map(|&d| self.dim(d)).collect()
    }

    /// The offset and the length of row `row`, counted over all axes but the last.
    fn row(&self, shape: &[Dim], row: usize) -> (usize, usize) {
        match shape.last() {
            None => (0, 1),
            Some(Dim::Keys(extra)) => {
                let (extra, n) = (*extra as usize, self.tokens());
                let (lead, i) = (row / n, row % n);
                let lead_size = self.pairs[n] + extra * n;
                (lead * lead_size + self.pairs[i] + extra * i, extra + self.keys(i).len())
            }
            Some(&last) => (row * self.dim(last), self.dim(last)),
        }
    }

    /// The number of elements of a tensor of this shape.
    pub fn elements(&self, shape: &[Dim]) -> usize {
        let rows: usize = self.leading(shape).iter().product();
        (0..rows).map(|r| self.row(shape, r).1).sum()
    }
}

/// Evaluates `graph` on arguments by their [`label`](peft_grammar::graph::Arg::label), and returns its outputs in
/// order.
///
/// # Errors
/// An argument is missing or does not fit its type.
pub fn run(graph: &Graph, batch: &Batch, args: &HashMap<String, Data>) -> Result<Vec<(String, Data)>, String> {
    let mut values: Vec<Option<Data>> = vec![None; graph.value_count()];
    for arg in &graph.args {
        let label = arg.label();
        let data = args.get(&label).ok_or_else(|| format!("`{}` needs an argument `{label}`", graph.name))?;
        let ty = graph.ty(arg.value);
        let fits = matches!((data, ty.dtype), (Data::F64(_), DType::F32) | (Data::I32(_), DType::I32));
        if !fits || data.len() != batch.elements(&ty.shape) {
            return Err(format!("`{label}` should be {ty}, found {} values", data.len()));
        }
        values[arg.value.0 as usize] = Some(data.clone());
    }
    let mut last_use = vec![usize::MAX; graph.value_count()];
    for (at, node) in graph.nodes.iter().enumerate() {
        node.operands.iter().for_each(|v| last_use[v.0 as usize] = at);
    }
    graph.outputs.iter().for_each(|(_, v)| last_use[v.0 as usize] = usize::MAX);
    for (at, node) in graph.nodes.iter().enumerate() {
        let results = node.results.iter().zip(node.op.components()).map(|(&result, op)| {
            let operands = op.component_operands(&node.operands);
            Data::F64(Evaluation { graph, batch, values: &values, op: &op, operands, result }.evaluate())
        });
        let results: Vec<Data> = results.collect();
        node.results.iter().zip(results).for_each(|(v, data)| values[v.0 as usize] = Some(data));
        for v in &node.operands {
            if last_use[v.0 as usize] == at {
                values[v.0 as usize] = None;
            }
        }
    }
    let output = |(name, v): &(String, Value)| (name.clone(), values[v.0 as usize].clone().expect("verified"));
    Ok(graph.outputs.iter().map(output).collect())
}

/// The evaluation of one operation of one result.
struct Evaluation<'a> {
    graph: &'a Graph,
    batch: &'a Batch,
    values: &'a [Option<Data>],
    op: &'a Op,
    operands: &'a [Value],
    result: Value,
}

/// A float operand: its elements and its shape.
#[derive(Clone, Copy)]
struct Operand<'a> {
    data: &'a [f64],
    shape: &'a [Dim],
    batch: &'a Batch,
}

impl<'a> Operand<'a> {
    fn row(self, row: usize) -> &'a [f64] {
        let (start, len) = self.batch.row(self.shape, row);
        &self.data[start..start + len]
    }

    /// The element at a full index.
    fn at(self, index: &[usize]) -> f64 {
        let Some((&last, lead)) = index.split_last() else { return self.data[0] };
        let sizes = self.batch.leading(self.shape);
        let row = lead.iter().zip(&sizes).fold(0, |row, (i, n)| row * n + i);
        self.row(row)[last]
    }

    /// The element that broadcasting repeats at `index` of a tensor of the result's shape.
    fn broadcast(self, index: &[usize]) -> f64 {
        let own = &index[index.len() - self.shape.len()..];
        let squeezed: Vec<usize> =
            own.iter().zip(self.shape).map(|(&i, &d)| if d == Dim::Const(1) { 0 } else { i }).collect();
        self.at(&squeezed)
    }
}

/// The weights of attention. Each is computed when it is read.
#[derive(Clone, Copy)]
struct AttentionWeights<'a> {
    batch: &'a Batch,
    q: Operand<'a>,
    k: Operand<'a>,
    causal: bool,
    scale: f64,
}

impl AttentionWeights<'_> {
    /// The scaled and masked score of query `i` and key `j` of head `h`.
    fn score(&self, h: usize, i: usize, j: usize) -> f64 {
        let n = self.batch.tokens();
        let score = self.scale * dot(self.q.row(h * n + i), self.k.row(h * n + j));
        if self.causal && j > i { f64::NEG_INFINITY } else { score }
    }
    /// The logsumexp of the scores of query `i`.
    fn lse(&self, h: usize, i: usize) -> f64 {
        let scores: Vec<f64> = self.batch.keys(i).map(|j| self.score(h, i, j)).collect();
        log_sum_exp(&scores)
    }
    /// The softmax of the scores of query `i`, at key `j`.
    fn weight(&self, h: usize, i: usize, j: usize, lse: f64) -> f64 {
        (self.score(h, i, j) - lse).exp()
    }
}

/// The mask of a dropout, drawn by Philox (Salmon et al., 2011).
#[derive(Clone, Copy)]
struct DropoutMask {
    /// The key of the generator; `None` keeps every element.
    key: Option<[u32; 2]>,
    p: f64,
    stream: u32,
    /// The number that the mask gives to the first column.
    column: u64,
}

impl DropoutMask {
    /// The factor of an element: 0 if it is dropped, else 1/(1−p).
    fn factor(&self, lead: usize, row: usize, column: usize) -> f64 {
        let Some(key) = self.key else { return 1.0 };
        let column = (column as u64 + self.column) as u32;
        let word = dropout_word(key, self.stream, lead as u32, row as u32, column);
        if word >= dropout_threshold(self.p) { 1.0 / (1.0 - self.p) } else { 0.0 }
    }
}

fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
}

impl<'a> Evaluation<'a> {
    /// The type of an operand.
    fn ty(&self, operand: usize) -> &'a Type {
        self.graph.ty(self.operands[operand])
    }
    fn data(&self, operand: usize) -> &'a Data {
        self.values[self.operands[operand].0 as usize].as_ref().expect("computed before")
    }
    /// A float operand.
    fn f(&self, operand: usize) -> Operand<'a> {
        Operand { data: self.data(operand).floats(), shape: &self.ty(operand).shape, batch: self.batch }
    }
    /// An integer operand.
    fn ids(&self, operand: usize) -> &'a [i32] {
        self.data(operand).ints()
    }

    /// The mask of a dropout whose key is `operand`.
    fn drop(&self, p: f64, stream: u32, column: u64, operand: usize) -> DropoutMask {
        let key = (p > 0.0).then(|| self.ids(operand)).map(|key| [key[0] as u32, key[1] as u32]);
        DropoutMask { key, p, stream, column }
    }

    /// The result, from the element at each index.
    fn build(&self, element: impl Fn(&[usize]) -> f64) -> Vec<f64> {
        let mut out = vec![];
        self.walk(&self.graph.ty(self.result).shape, |index| out.push(element(index)));
        out
    }

    /// Visits the indices of a tensor of this shape in row-major order.
    fn walk(&self, shape: &[Dim], mut visit: impl FnMut(&[usize])) {
        let sizes = self.batch.leading(shape);
        for row in 0..sizes.iter().product() {
            let mut index = vec![0; shape.len()];
            let mut rest = row;
            for axis in (0..sizes.len()).rev() {
                index[axis] = rest % sizes[axis];
                rest /= sizes[axis];
            }
            for j in 0..self.batch.row(shape, row).1 {
                if let Some(last) = index.last_mut() {
                    *last = j;
                }
                visit(&index);
            }
        }
    }

    /// The result, from its rows along the last axis.
    fn rows(&self, row: impl Fn(usize) -> Vec<f64>) -> Vec<f64> {
        let shape = &self.graph.ty(self.result).shape;
        (0..self.batch.leading(shape).iter().product()).flat_map(row).collect()
    }

    /// The result of an elementwise function of one operand.
    fn unary(&self, f: impl Fn(f64) -> f64) -> Vec<f64> {
        self.f(0).data.iter().map(|&x| f(x)).collect()
    }

    /// The result of an elementwise function of two operands, with broadcasting.
    fn binary(&self, f: impl Fn(f64, f64) -> f64) -> Vec<f64> {
        let (x, y) = (self.f(0), self.f(1));
        self.build(|i| f(x.broadcast(i), y.broadcast(i)))
    }

    /// The result of the operation.
    fn evaluate(&self) -> Vec<f64> {
        let batch = self.batch;
        match self.op {
            Op::Constant { value, .. } => self.build(|_| *value),
            Op::Iota { .. } => self.build(|i| i[0] as f64),
            Op::Add => self.binary(|x, y| x + y),
            Op::Sub => self.binary(|x, y| x - y),
            Op::Mul => self.binary(|x, y| x * y),
            Op::Div => self.binary(|x, y| x / y),
            Op::Min => self.binary(f64::min),
            Op::Scale { by } => self.unary(|x| x * by),
            Op::Shift { by } => self.unary(|x| x + by),
            Op::Float => self.ids(0).iter().map(|&x| f64::from(x)).collect(),
            Op::Exp => self.unary(f64::exp),
            Op::Log => self.unary(f64::ln),
            Op::Sqrt => self.unary(f64::sqrt),
            Op::Rsqrt => self.unary(|x| 1.0 / x.sqrt()),
            Op::Sin => self.unary(f64::sin),
            Op::Cos => self.unary(f64::cos),
            Op::Tanh => self.unary(f64::tanh),
            Op::Sigmoid => self.unary(|x| 1.0 / (1.0 + (-x).exp())),
            Op::Detach => self.unary(|x| x),
            Op::Relu => self.unary(|x| x.max(0.0)),
            Op::Step => self.unary(|x| if x > 0.0 { 1.0 } else { 0.0 }),
            Op::Gelu => self.unary(|x| x * normal_cdf(x)),
            Op::GeluGrad => self.unary(|x| normal_cdf(x) + x * normal_density(x)),
            Op::GeluTanh => self.unary(|x| 0.5 * x * (1.0 + gelu_inner(x).tanh())),
            Op::GeluTanhGrad => self.unary(|x| {
                let t = gelu_inner(x).tanh();
                let slope = (2.0 / std::f64::consts::PI).sqrt() * (1.0 + 3.0 * GELU_CUBIC * x * x);
                0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope
            }),

            Op::Reshape { .. } => self.f(0).data.to_vec(),
            Op::Permute { axes } => {
                let x = self.f(0);
                self.build(|i| {
                    let mut source = vec![0; i.len()];
                    axes.iter().zip(i).for_each(|(&axis, &at)| source[axis] = at);
                    x.at(&source)
                })
            }
            Op::Slice { axis, start, .. } => {
                let x = self.f(0);
                self.build(|i| x.at(&with_axis(i, *axis, |at| at + *start as usize)))
            }
            Op::Pad { axis, start, .. } => {
                let (x, start) = (self.f(0), *start as usize);
                self.build(|i| {
                    let inside = i[*axis] >= start && i[*axis] < start + self.width(0, *axis, i);
                    if inside { x.at(&with_axis(i, *axis, |at| at - start)) } else { 0.0 }
                })
            }
            Op::Concat { axis } => self.build(|i| {
                let mut at = i[*axis];
                let mut part = 0;
                while at >= self.width(part, *axis, i) {
                    at -= self.width(part, *axis, i);
                    part += 1;
                }
                self.f(part).at(&with_axis(i, *axis, |_| at))
            }),
            Op::Broadcast { mean, .. } => {
                let x = self.f(0);
                let out = self.build(|i| x.broadcast(i));
                let copies = if *mean { out.len() as f64 / x.data.len() as f64 } else { 1.0 };
                out.into_iter().map(|y| y / copies).collect()
            }
            Op::Reduce { axes, keep, mean } => self.reduce(axes, *keep, *mean),

            Op::Matmul { transpose_x, transpose_y } => {
                let (x, y) = (self.f(0), self.f(1));
                let axis = x.shape.len() - if *transpose_x { 2 } else { 1 };
                let inner = batch.dim(x.shape[axis]);
                self.build(|i| {
                    let (lead, m, n) = (&i[..i.len() - 2], i[i.len() - 2], i[i.len() - 1]);
                    let entry = |t: Operand, r: usize, c: usize, transposed: bool| {
                        let mut at = if t.shape.len() == 2 { vec![] } else { lead.to_vec() };
                        at.extend(if transposed { [c, r] } else { [r, c] });
                        t.at(&at)
                    };
                    (0..inner).map(|k| entry(x, m, k, *transpose_x) * entry(y, k, n, *transpose_y)).sum()
                })
            }
            Op::Scores { causal } => {
                let (q, k) = (self.f(0), self.f(1));
                let n = batch.tokens();
                self.build(|i| {
                    let (h, row, key) = (i[0], i[1], batch.keys(i[1]).start + i[2]);
                    if *causal && key > row { f64::NEG_INFINITY } else { dot(q.row(h * n + row), k.row(h * n + key)) }
                })
            }
            Op::Attend { causal } => {
                let (w, v) = (self.f(0), self.f(1));
                let n = batch.tokens();
                self.build(|i| {
                    let (h, row, e) = (i[0], i[1], i[2]);
                    let seen = batch.keys(row).filter(|&key| !causal || key <= row);
                    seen.map(|key| w.row(h * n + row)[key - batch.keys(row).start] * v.row(h * n + key)[e]).sum()
                })
            }
            Op::Attention { causal, scale, p, stream, column } => {
                let weights = AttentionWeights { batch, q: self.f(0), k: self.f(1), causal: *causal, scale: *scale };
                let drop = self.drop(*p, *stream, *column, 3);
                let (v, n) = (self.f(2), batch.tokens());
                self.build(|at| {
                    let (h, i, e) = (at[0], at[1], at[2]);
                    let lse = weights.lse(h, i);
                    let first = batch.keys(i).start;
                    let d = |j: usize| drop.factor(h, i, j - first);
                    batch.keys(i).map(|j| d(j) * weights.weight(h, i, j, lse) * v.row(h * n + j)[e]).sum()
                })
            }
            Op::AttentionLse { causal, scale } => {
                let weights = AttentionWeights { batch, q: self.f(0), k: self.f(1), causal: *causal, scale: *scale };
                self.build(|at| weights.lse(at[0], at[1]))
            }
            Op::AttentionVjp { of, causal, scale, p, stream, column } => {
                let weights = AttentionWeights { batch, q: self.f(0), k: self.f(1), causal: *causal, scale: *scale };
                let drop = self.drop(*p, *stream, *column, 6);
                let (v, lse, df, r, n) = (self.f(2), self.f(3), self.f(4), self.f(5), batch.tokens());
                let w = |h: usize, i: usize, j: usize| weights.weight(h, i, j, lse.row(h * n + i)[0]);
                let d = |h: usize, i: usize, j: usize| drop.factor(h, i, j - batch.keys(i).start);
                let ds = |h: usize, i: usize, j: usize| {
                    let dw = d(h, i, j) * dot(df.row(h * n + i), v.row(h * n + j));
                    scale * w(h, i, j) * (dw + r.row(h * n + i)[0])
                };
                self.build(|at| {
                    let (h, row, e) = (at[0], at[1], at[2]);
                    let term = |other: usize| match of {
                        0 => ds(h, row, other) * weights.k.row(h * n + other)[e],
                        1 => ds(h, other, row) * weights.q.row(h * n + other)[e],
                        _ => d(h, other, row) * w(h, other, row) * df.row(h * n + other)[e],
                    };
                    batch.keys(row).map(term).sum()
                })
            }
            Op::AttendTransposed { causal } => {
                let (w, v) = (self.f(0), self.f(1));
                let n = batch.tokens();
                self.build(|i| {
                    let (h, key, e) = (i[0], i[1], i[2]);
                    let seen = batch.keys(key).filter(|&row| !causal || key <= row);
                    seen.map(|row| w.row(h * n + row)[key - batch.keys(key).start] * v.row(h * n + row)[e]).sum()
                })
            }

            Op::LinearLse => self.rows(|r| vec![log_sum_exp(&self.linear(r))]),
            Op::LinearMean => self.rows(|r| {
                let (p, w) = (softmax(&self.linear(r)), self.f(1));
                let entry = |e: usize| p.iter().enumerate().map(|(v, p)| p * w.row(v)[e]).sum();
                (0..batch.dim(w.shape[1])).map(entry).collect()
            }),

            Op::AttentionAndLse { .. }
            | Op::AttentionVjpSides { .. }
            | Op::AttentionVjpAll { .. }
            | Op::LinearLseAndMean => unreachable!("evaluated by its components"),

            Op::Softmax => self.rows(|r| softmax(self.f(0).row(r))),
            Op::LogSumExp => {
                (0..batch.leading(self.f(0).shape).iter().product()).map(|r| log_sum_exp(self.f(0).row(r))).collect()
            }
            Op::SoftmaxVjp => self.rows(|r| {
                let (y, dy) = (self.f(0).row(r), self.f(1).row(r));
                let inner = dot(y, dy);
                y.iter().zip(dy).map(|(y, dy)| y * (dy - inner)).collect()
            }),
            Op::Normalize { eps } => self.rows(|r| normalize(self.f(0).row(r), *eps).0),
            Op::NormalizeVjp { eps } => self.rows(|r| {
                // dx = (dy − mean(dy) − x̂ mean(dy ⊙ x̂)) / σ
                let (hat, deviation) = normalize(self.f(0).row(r), *eps);
                let dy = self.f(1).row(r);
                let n = dy.len() as f64;
                let (mean, along) = (dy.iter().sum::<f64>() / n, dot(dy, &hat) / n);
                hat.iter().zip(dy).map(|(h, dy)| (dy - mean - h * along) / deviation).collect()
            }),

            Op::Gather { start } => {
                let (table, ids) = (self.f(0), self.ids(1));
                let rows = batch.dim(table.shape[0]) as i64;
                self.build(|i| {
                    let row = i64::from(ids[i[0]]) - *start as i64;
                    if (0..rows).contains(&row) { table.at(&[row as usize, i[1]]) } else { 0.0 }
                })
            }
            Op::Scatter { start, rows } => {
                let (ids, y) = (self.ids(0), self.f(1));
                let (rows, width) = (batch.dim(*rows) as i64, batch.row(y.shape, 0).1);
                let mut out = vec![0.0; rows as usize * width];
                for (n, &id) in ids.iter().enumerate() {
                    let row = i64::from(id) - *start as i64;
                    if (0..rows).contains(&row) {
                        let target = &mut out[row as usize * width..][..width];
                        target.iter_mut().zip(y.row(n)).for_each(|(t, y)| *t += y);
                    }
                }
                out
            }
            Op::SegmentMean => {
                let x = self.f(0);
                self.build(|i| {
                    let tokens = batch.offsets[i[0]]..batch.offsets[i[0] + 1];
                    tokens.map(|t| x.at(&[t, i[1]])).sum::<f64>() / batch.lengths[i[0]] as f64
                })
            }
            Op::SegmentMeanVjp => {
                let y = self.f(0);
                self.build(|i| {
                    let s = batch.segments[i[0]];
                    y.at(&[s, i[1]]) / batch.lengths[s] as f64
                })
            }

            Op::CrossEntropy { smoothing } => {
                let (logits, labels) = (self.f(0), self.ids(1));
                self.build(|i| {
                    let row = logits.row(i[0]);
                    let weight = |v| label_weight(*smoothing, labels[i[0]], v, row.len());
                    log_sum_exp(row) - (0..row.len()).map(|v| weight(v) * row[v]).sum::<f64>()
                })
            }
            Op::CrossEntropyVjp { smoothing } => {
                let (logits, labels, dy) = (self.f(0), self.ids(1), self.f(2));
                self.rows(|r| {
                    let p = softmax(logits.row(r));
                    let weight = |v| label_weight(*smoothing, labels[r], v, p.len());
                    (0..p.len()).map(|v| dy.data[r] * (p[v] - weight(v))).collect()
                })
            }

            Op::Dropout { p, stream, column } => {
                let (x, drop) = (self.f(0), self.drop(*p, *stream, *column, 1));
                let n = x.shape.len();
                let rows = if n < 2 { 1 } else { batch.dim(x.shape[n - 2]) };
                let numbers = (self.operands.len() > 2).then(|| self.ids(2));
                self.rows(|r| {
                    let row = numbers.map_or(r % rows, |numbers| numbers[r % rows] as usize);
                    let scaled = |(c, x): (usize, &f64)| x * drop.factor(r / rows, row, c);
                    x.row(r).iter().enumerate().map(scaled).collect()
                })
            }
        }
    }

    /// Row `r` of x Wᵀ.
    fn linear(&self, r: usize) -> Vec<f64> {
        let (x, w) = (self.f(0), self.f(1));
        (0..self.batch.dim(w.shape[0])).map(|v| dot(x.row(r), w.row(v))).collect()
    }

    /// The length of operand `part` along `axis`, in the row at `index`.
    fn width(&self, part: usize, axis: usize, index: &[usize]) -> usize {
        match self.ty(part).shape[axis] {
            Dim::Keys(extra) => extra as usize + self.batch.keys(index[index.len() - 2]).len(),
            dim => self.batch.dim(dim),
        }
    }

    /// The sum or the mean over `axes`.
    fn reduce(&self, axes: &[usize], keep: bool, mean: bool) -> Vec<f64> {
        let x = self.f(0);
        let out = &self.graph.ty(self.result).shape;
        let mut sums = vec![0.0; self.batch.elements(out)];
        let sizes = self.batch.leading(out);
        self.walk(x.shape, |index| {
            let kept = |(axis, &i): (usize, &usize)| match (axes.contains(&axis), keep) {
                (false, _) => Some(i),
                (true, true) => Some(0),
                (true, false) => None,
            };
            let target: Vec<usize> = index.iter().enumerate().filter_map(kept).collect();
            let at = target.split_last().map_or(0, |(last, lead)| {
                let row = lead.iter().zip(&sizes).fold(0, |row, (i, n)| row * n + i);
                self.batch.row(out, row).0 + last
            });
            sums[at] += x.at(index);
        });
        if mean {
            let copies = x.data.len() as f64 / sums.len() as f64;
            sums.iter_mut().for_each(|s| *s /= copies);
        }
        sums
    }
}

/// The coefficient of the cubic term in the tanh approximation of GELU (Hendrycks & Gimpel, 2016).
const GELU_CUBIC: f64 = 0.044715;

/// The argument of tanh in the approximation of GELU, √(2/π) (x + 0.044715 x³).
fn gelu_inner(x: f64) -> f64 {
    (2.0 / std::f64::consts::PI).sqrt() * (x + GELU_CUBIC * x * x * x)
}

/// `index` with its entry at `axis` mapped by `to`.
fn with_axis(index: &[usize], axis: usize, to: impl Fn(usize) -> usize) -> Vec<usize> {
    let mut index = index.to_vec();
    index[axis] = to(index[axis]);
    index
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.into_iter().map(|e| e / sum).collect()
}

/// The normalized row x̂ and the standard deviation √(var + eps).
fn normalize(x: &[f64], eps: f64) -> (Vec<f64>, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let deviation = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + eps).sqrt();
    (x.iter().map(|x| (x - mean) / deviation).collect(), deviation)
}

/// The smoothed label of a class, ε/V + (1 − ε) [class = label].
fn label_weight(smoothing: f64, label: i32, class: usize, classes: usize) -> f64 {
    smoothing / classes as f64 + if label == class as i32 { 1.0 - smoothing } else { 0.0 }
}

/// φ(x), the density of the standard normal distribution.
pub(crate) fn normal_density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// Φ(x), the distribution function of the standard normal distribution, to about 1e-15: by its Taylor series for |x| <
/// 3, and by the continued fraction of the tail elsewhere.
pub(crate) fn normal_cdf(x: f64) -> f64 {
    let a = x.abs();
    if a < 3.0 {
        // Φ(x) = ½ + φ(x) Σ x^{2k+1} / (1·3·5…(2k+1))
        let (mut term, mut sum, mut k) = (x, x, 1.0);
        while term.abs() > 1e-18 * sum.abs() {
            k += 2.0;
            term *= x * x / k;
            sum += term;
        }
        0.5 + normal_density(x) * sum
    } else {
        let fraction = (1..=120).rev().fold(a, |f, k| a + f64::from(k) / f);
        let tail = normal_density(a) / fraction;
        if x > 0.0 { 1.0 - tail } else { tail }
    }
}
