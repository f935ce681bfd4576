//! Reverse-mode differentiation: one graph in, one graph out with `grad.NAME` for every trainable tensor.
//!
//! Nothing is computed for a frozen weight or below the lowest trainable value: an operand's adjoint is
//! asked for only if something trainable reaches it.

use peft_grammar::graph::{Dim, Graph, Location, Op, Role, Value};
use peft_grammar::names::{LOSS, Output};

use crate::rewrite::rewrite;

/// The derivative of output `loss` with respect to every trainable argument.
pub fn differentiate(forward: &Graph) -> Result<Graph, String> {
    let loss = forward.output(LOSS).ok_or("a graph without an output `loss` has no gradient")?;
    let mut tape = Tape { graph: forward.clone(), location: Location::default() };

    let mut reached = vec![false; forward.values()];
    for arg in &forward.args {
        reached[arg.value.0 as usize] = arg.role == Role::Trainable;
    }
    for node in &forward.nodes {
        let detached = node.op == Op::Detach;
        reached[node.result().0 as usize] = !detached && node.operands.iter().any(|v| reached[v.0 as usize]);
    }

    let mut adjoints: Vec<Option<Value>> = vec![None; forward.values()];
    adjoints[loss.0 as usize] = Some(tape.op(Op::Constant { value: 1.0, shape: forward.ty(loss).shape.clone() }, &[])?);
    for node in forward.nodes.iter().rev() {
        let Some(dz) = adjoints[node.result().0 as usize] else { continue };
        tape.location = node.location.clone();
        for (i, &operand) in node.operands.iter().enumerate() {
            if reached[operand.0 as usize] {
                let term = adjoint(&mut tape, &node.op, &node.operands, node.result(), dz, i)?;
                let slot = &mut adjoints[operand.0 as usize];
                *slot = Some(match *slot {
                    Some(sum) => tape.op(Op::Add, &[sum, term])?,
                    None => term,
                });
            }
        }
    }

    let mut graph = tape.graph;
    for arg in forward.args.iter().filter(|a| a.role == Role::Trainable) {
        let gradient = match adjoints[arg.value.0 as usize] {
            Some(value) => value,
            None => {
                let zeros = Op::Constant { value: 0.0, shape: forward.ty(arg.value).shape.clone() };
                graph.push(zeros, &[], &Location::default())?
            }
        };
        graph.outputs.push((Output::Gradient(&arg.label()).to_string(), gradient));
    }
    settle(&graph)
}

/// Once no derivative is asked for any more, `detach` has nothing to say.
pub fn settle(graph: &Graph) -> Result<Graph, String> {
    rewrite(graph, |_, op, operands| Ok((*op == Op::Detach).then(|| operands[0])))
}

/// The table of derivatives. For z = op(x, y, …) and its adjoint dz, the adjoint of operand `i`.
fn adjoint(t: &mut Tape, op: &Op, operands: &[Value], z: Value, dz: Value, i: usize) -> Result<Value, String> {
    let x = operands[0];
    let y = operands.get(1).copied().unwrap_or(x);
    let own = t.graph.ty(operands[i]).shape.clone();
    let none = || Err(format!("`{}` has no derivative for operand {}", op.name(), i + 1));
    match (op, i) {
        // z = x + y:  dx = dz,  dy = dz  (summed over what was broadcast)
        (Op::Add, _) => t.unbroadcast(dz, own),
        // z = x − y:  dx = dz,  dy = −dz
        (Op::Sub, 0) => t.unbroadcast(dz, own),
        (Op::Sub, _) => t.op(Op::Scale { by: -1.0 }, &[dz]).and_then(|d| t.unbroadcast(d, own)),
        // z = x y:  dx = dz y,  dy = dz x
        (Op::Mul, _) => t.op(Op::Mul, &[dz, operands[1 - i]]).and_then(|d| t.unbroadcast(d, own)),
        // z = x / y:  dx = dz / y,  dy = −dz z / y
        (Op::Div, 0) => t.op(Op::Div, &[dz, y]).and_then(|d| t.unbroadcast(d, own)),
        (Op::Div, _) => {
            let dz_z = t.op(Op::Mul, &[dz, z])?;
            let over_y = t.op(Op::Div, &[dz_z, y])?;
            let negative = t.op(Op::Scale { by: -1.0 }, &[over_y])?;
            t.unbroadcast(negative, own)
        }
        // z = by x;  z = x + by
        (Op::Scale { by }, _) => t.op(Op::Scale { by: *by }, &[dz]),
        (Op::Shift { .. }, _) => Ok(dz),
        // z = eˣ:  dx = dz z
        (Op::Exp, _) => t.op(Op::Mul, &[dz, z]),
        // z = ln x:  dx = dz / x
        (Op::Log, _) => t.op(Op::Div, &[dz, x]),
        // z = √x:  dx = dz / 2z
        (Op::Sqrt, _) => {
            let half = t.op(Op::Scale { by: 0.5 }, &[dz])?;
            t.op(Op::Div, &[half, z])
        }
        // z = 1/√x:  dx = −½ dz z / x
        (Op::Rsqrt, _) => {
            let half = t.op(Op::Scale { by: -0.5 }, &[dz])?;
            let half_z = t.op(Op::Mul, &[half, z])?;
            t.op(Op::Div, &[half_z, x])
        }
        // z = sin x:  dx = dz cos x
        (Op::Sin, _) => t.times(dz, Op::Cos, x),
        // z = cos x:  dx = −dz sin x
        (Op::Cos, _) => {
            let minus = t.op(Op::Scale { by: -1.0 }, &[dz])?;
            t.times(minus, Op::Sin, x)
        }
        // z = tanh x:  dx = dz (1 − z²)
        (Op::Tanh, _) => {
            let square = t.op(Op::Mul, &[z, z])?;
            let slope = t.one_minus(square)?;
            t.op(Op::Mul, &[dz, slope])
        }
        // z = σ(x):  dx = dz z (1 − z)
        (Op::Sigmoid, _) => {
            let rest = t.one_minus(z)?;
            let slope = t.op(Op::Mul, &[z, rest])?;
            t.op(Op::Mul, &[dz, slope])
        }
        // z = f(x):  dx = dz f'(x)
        (Op::Relu, _) => t.times(dz, Op::Step, x),
        (Op::Gelu, _) => t.times(dz, Op::GeluGrad, x),
        (Op::GeluTanh, _) => t.times(dz, Op::GeluTanhGrad, x),

        // What moves elements moves their adjoints back.
        (Op::Reshape { .. }, _) => t.op(Op::Reshape { shape: own }, &[dz]),
        (Op::Permute { axes }, _) => {
            let mut inverse = vec![0; axes.len()];
            axes.iter().enumerate().for_each(|(to, &from)| inverse[from] = to);
            t.op(Op::Permute { axes: inverse }, &[dz])
        }
        (Op::Slice { axis, start, .. }, _) => t.op(Op::Pad { axis: *axis, start: *start, to: own[*axis] }, &[dz]),
        (Op::Pad { axis, start, .. }, _) => t.slice_like(dz, *axis, *start, own[*axis]),
        (Op::Concat { axis }, _) => {
            let before = operands[..i].iter().map(|&v| t.graph.ty(v).shape[*axis].constant());
            let start = before.sum::<Option<u64>>().ok_or("only the last part of a `concat` may be ragged")?;
            t.slice_like(dz, *axis, start, own[*axis])
        }
        // Repeating and adding up are each other's adjoints; so are repeating-and-dividing and averaging.
        (Op::Broadcast { mean, .. }, _) => t.reduce_to(dz, own, *mean),
        (Op::Reduce { axes, keep, mean }, _) => {
            let mut kept = dz;
            if !keep {
                let shape = own.iter().enumerate().map(|(a, &d)| if axes.contains(&a) { Dim::Const(1) } else { d });
                kept = t.op(Op::Reshape { shape: shape.collect() }, &[dz])?;
            }
            t.op(Op::Broadcast { shape: own, mean: *mean }, &[kept])
        }

        // z = x y:  dx = dz yᵀ,  dy = xᵀ dz;  transposed operands likewise.
        (Op::Matmul { transpose_x, transpose_y }, _) => {
            let (left, right, tl, tr) = match (i, transpose_x, transpose_y) {
                (0, false, ty) => (dz, y, false, !ty),
                (0, true, ty) => (y, dz, *ty, true),
                (_, tx, false) => (x, dz, !tx, false),
                (_, tx, true) => (dz, x, true, *tx),
            };
            if i == 1 && own.len() == 2 && t.graph.ty(x).rank() > 2 {
                return t.shared_weight_gradient(x, dz, *transpose_y, own);
            }
            t.op(Op::Matmul { transpose_x: tl, transpose_y: tr }, &[left, right])
        }
        // s = q kᵀ within sequences:  dq = ds k,  dk = dsᵀ q
        (Op::Scores { causal }, 0) => t.op(Op::Attend { causal: *causal }, &[dz, y]),
        (Op::Scores { causal }, _) => t.op(Op::AttendTransposed { causal: *causal }, &[dz, x]),
        // f = w v:  dw = df vᵀ,  dv = wᵀ df
        (Op::Attend { causal: false }, 0) => t.op(Op::Scores { causal: false }, &[dz, y]),
        (Op::Attend { causal }, 1) => t.op(Op::AttendTransposed { causal: *causal }, &[x, dz]),
        // f = wᵀ v:  dw = v dfᵀ,  dv = w df
        (Op::AttendTransposed { causal: false }, 0) => t.op(Op::Scores { causal: false }, &[y, dz]),
        (Op::AttendTransposed { causal }, 1) => t.op(Op::Attend { causal: *causal }, &[x, dz]),

        // y = softmax(x):  dx = y ⊙ (dy − Σ y ⊙ dy)
        (Op::Softmax, _) => t.op(Op::SoftmaxVjp, &[z, dz]),
        // z = ln Σ eˣ:  dx = dz softmax(x)
        (Op::LogSumExp, _) => t.times(dz, Op::Softmax, x),
        // x̂ = (x − μ)/σ:  dx = (dx̂ − mean(dx̂) − x̂ mean(dx̂ ⊙ x̂)) / σ
        (Op::Normalize { eps }, _) => t.op(Op::NormalizeVjp { eps: *eps }, &[x, dz]),
        // Reading rows and adding into rows are each other's adjoints.
        (Op::Gather { start }, 0) => t.op(Op::Scatter { start: *start, rows: own[0] }, &[y, dz]),
        (Op::Scatter { start, .. }, 1) => t.op(Op::Gather { start: *start }, &[dz, x]),
        (Op::SegmentMean, _) => t.op(Op::SegmentMeanVjp, &[dz]),
        (Op::SegmentMeanVjp, _) => t.op(Op::SegmentMean, &[dz]),
        // ℓ = −Σ w ln softmax(x):  dx = dℓ (softmax(x) − w)
        (Op::CrossEntropy { smoothing }, 0) => t.op(Op::CrossEntropyVjp { smoothing: *smoothing }, &[x, y, dz]),
        // The same elements are kept, by the same counter.
        (Op::Dropout { .. }, 0) => t.op(op.clone(), &[&[dz], &operands[1..]].concat()),

        // Integers.
        (Op::Gather { .. } | Op::Scatter { .. } | Op::CrossEntropy { .. } | Op::Dropout { .. } | Op::Float, _) => {
            none()
        }
        // Constants, and what is one to the gradient.
        (Op::Constant { .. } | Op::Iota { .. } | Op::Detach | Op::Step, _) => none(),
        // So far it bounds what does not train.
        (Op::Min, _) => none(),
        // Derivatives themselves.
        (Op::GeluGrad | Op::GeluTanhGrad | Op::SoftmaxVjp | Op::NormalizeVjp { .. }, _) => none(),
        (Op::CrossEntropyVjp { .. } | Op::AttentionVjp { .. }, _) => none(),
        // What only fusion makes.
        (Op::Attend { .. } | Op::AttendTransposed { .. }, _) => none(),
        (Op::Attention { .. } | Op::AttentionLse { .. } | Op::LinearLse | Op::LinearMean, _) => none(),
        (Op::AttentionAndLse { .. } | Op::AttentionVjpSides { .. } | Op::AttentionVjpAll { .. }, _) => none(),
        (Op::LinearLseAndMean, _) => none(),
    }
}

/// The growing graph, and where what is added belongs.
struct Tape {
    graph: Graph,
    location: Location,
}

impl Tape {
    fn op(&mut self, op: Op, operands: &[Value]) -> Result<Value, String> {
        self.graph.push(op, operands, &self.location)
    }

    fn times(&mut self, dz: Value, slope: Op, x: Value) -> Result<Value, String> {
        let slope = self.op(slope, &[x])?;
        self.op(Op::Mul, &[dz, slope])
    }

    fn one_minus(&mut self, x: Value) -> Result<Value, String> {
        let negative = self.op(Op::Scale { by: -1.0 }, &[x])?;
        self.op(Op::Shift { by: 1.0 }, &[negative])
    }

    fn slice_like(&mut self, dz: Value, axis: usize, start: u64, width: Dim) -> Result<Value, String> {
        self.op(Op::Slice { axis, start, end: width.constant().map(|n| start + n) }, &[dz])
    }

    /// Sums `dz` over the axes along which `shape` was broadcast.
    fn unbroadcast(&mut self, dz: Value, shape: Vec<Dim>) -> Result<Value, String> {
        self.reduce_to(dz, shape, false)
    }

    fn reduce_to(&mut self, dz: Value, shape: Vec<Dim>, mean: bool) -> Result<Value, String> {
        let wide = self.graph.ty(dz).shape.clone();
        if wide == shape {
            return Ok(dz);
        }
        let front = wide.len() - shape.len();
        let stretched = |&a: &usize| a < front || shape[a - front] != wide[a];
        let axes: Vec<usize> = (0..wide.len()).filter(stretched).collect();
        let reduced = self.op(Op::Reduce { axes, keep: true, mean }, &[dz])?;
        if front == 0 { Ok(reduced) } else { self.op(Op::Reshape { shape }, &[reduced]) }
    }

    /// dW of a rank-2 W that serves every leading axis of x: the sum of each one's xᵀ dz.
    fn shared_weight_gradient(&mut self, x: Value, dz: Value, flip: bool, own: Vec<Dim>) -> Result<Value, String> {
        let (left, right) = if flip { (dz, x) } else { (x, dz) };
        let each = self.op(Op::Matmul { transpose_x: true, transpose_y: false }, &[left, right])?;
        let axes = (0..self.graph.ty(each).rank() - own.len()).collect();
        self.op(Op::Reduce { axes, keep: false, mean: false }, &[each])
    }
}
