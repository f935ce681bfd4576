//! Reverse-mode differentiation: extends a graph by its backward pass, with an output `grad.NAME` for every trainable
//! tensor.
//!
//! The adjoint of an operand is computed only if the operand depends on a trainable tensor. Frozen weights have no
//! gradient, and the backward pass ends at the lowest trainable value.

use peft_grammar::graph::{Dim, Graph, Location, Op, Role, Value};
use peft_grammar::names::{LOSS, Output};

use crate::rewrite::rewrite;

/// Returns `forward` with the gradient of its output `loss` with respect to every trainable argument. A trainable
/// argument that the loss does not depend on has a gradient of zeros.
///
/// # Errors
/// The graph has no output `loss`, or a trainable tensor reaches the loss through an operation without a derivative.
pub fn differentiate(forward: &Graph) -> Result<Graph, String> {
    let loss = forward.output(LOSS).ok_or("a graph without an output `loss` has no gradient")?;
    let mut tape = Tape { graph: forward.clone(), location: Location::default() };

    let mut trained = vec![false; forward.value_count()];
    for arg in &forward.args {
        trained[arg.value.0 as usize] = arg.role == Role::Trainable;
    }
    for node in &forward.nodes {
        let detached = node.op == Op::Detach;
        trained[node.result().0 as usize] = !detached && node.operands.iter().any(|v| trained[v.0 as usize]);
    }

    let mut adjoints: Vec<Option<Value>> = vec![None; forward.value_count()];
    adjoints[loss.0 as usize] = Some(tape.op(Op::Constant { value: 1.0, shape: forward.ty(loss).shape.clone() }, &[])?);
    for node in forward.nodes.iter().rev() {
        let Some(dz) = adjoints[node.result().0 as usize] else { continue };
        if !node.location.name.is_empty() {
            tape.graph.name_value(dz, &format!("d_{}", node.location.name));
        }
        tape.location = node.location.unnamed();
        for (i, &operand) in node.operands.iter().enumerate() {
            if trained[operand.0 as usize] {
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
    drop_detach(&graph)
}

/// Replaces every `detach` by its operand. Only differentiation tells the two apart.
///
/// # Errors
/// Operands do not fit an operation, which a verified graph excludes.
pub fn drop_detach(graph: &Graph) -> Result<Graph, String> {
    rewrite(graph, |_, op, operands| Ok((*op == Op::Detach).then(|| operands[0])))
}

/// The table of derivatives: for z = op(x, y, …) and the adjoint dz of z, returns the adjoint of operand `i`.
fn adjoint(t: &mut Tape, op: &Op, operands: &[Value], z: Value, dz: Value, i: usize) -> Result<Value, String> {
    let x = operands[0];
    let y = operands.get(1).copied().unwrap_or(x);
    let own = t.graph.ty(operands[i]).shape.clone();
    let none = || Err(format!("`{}` has no derivative for operand {}", op.name(), i + 1));
    match (op, i) {
        // z = x + y:  dx = dz,  dy = dz;  here and below summed over the axes along which the operand was broadcast
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
        // z = s x:  dx = s dz
        (Op::Scale { by }, _) => t.op(Op::Scale { by: *by }, &[dz]),
        // z = x + s:  dx = dz
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
        // z = f(x):  dx = dz f'(x),  f' an operation of its own
        (Op::Relu, _) => t.times(dz, Op::Step, x),
        (Op::Gelu, _) => t.times(dz, Op::GeluGrad, x),
        (Op::GeluTanh, _) => t.times(dz, Op::GeluTanhGrad, x),

        // z = reshape(x):  dx = reshape(dz) to the shape of x
        (Op::Reshape { .. }, _) => t.op(Op::Reshape { shape: own }, &[dz]),
        // z = permute(x, π):  dx = permute(dz, π⁻¹)
        (Op::Permute { axes }, _) => {
            let mut inverse = vec![0; axes.len()];
            axes.iter().enumerate().for_each(|(to, &from)| inverse[from] = to);
            t.op(Op::Permute { axes: inverse }, &[dz])
        }
        // z = x[start..end]:  dx = dz, padded with zeros to the shape of x
        (Op::Slice { axis, start, .. }, _) => t.op(Op::Pad { axis: *axis, start: *start, to: own[*axis] }, &[dz]),
        // z = pad(x):  dx = dz[start..end], the range that x fills
        (Op::Pad { axis, start, .. }, _) => t.slice_like(dz, *axis, *start, own[*axis]),
        // z = [x ; y ; …]:  dx, dy, … = the slices of dz that they fill
        (Op::Concat { axis }, _) => {
            let before = operands[..i].iter().map(|&v| t.graph.ty(v).shape[*axis].constant());
            let start = before.sum::<Option<u64>>().ok_or("only the last part of a `concat` may be ragged")?;
            t.slice_like(dz, *axis, start, own[*axis])
        }
        // z = broadcast(x):  dx = Σ dz over the copies;  a broadcast divided by the number of copies:  dx = mean dz
        (Op::Broadcast { mean, .. }, _) => t.reduce_to(dz, own, *mean),
        // z = Σ x:  dx = broadcast(dz);  z = mean x:  dx = broadcast(dz), divided by the number of copies
        (Op::Reduce { axes, keep, mean }, _) => {
            let mut kept = dz;
            if !keep {
                let shape = own.iter().enumerate().map(|(a, &d)| if axes.contains(&a) { Dim::Const(1) } else { d });
                kept = t.op(Op::Reshape { shape: shape.collect() }, &[dz])?;
            }
            t.op(Op::Broadcast { shape: own, mean: *mean }, &[kept])
        }

        // z = x @ y:  dx = dz @ yᵀ,  dy = xᵀ @ dz;  for transposed operands accordingly
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
        // s = q kᵀ within each sequence:  dq = ds k,  dk = dsᵀ q
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
        // z_r = x[ids_r]:  dx[ids_r] += dz_r
        (Op::Gather { start }, 0) => t.op(Op::Scatter { start: *start, rows: own[0] }, &[y, dz]),
        // z[ids_r] += y_r:  dy_r = dz[ids_r]
        (Op::Scatter { start, .. }, 1) => t.op(Op::Gather { start: *start }, &[dz, x]),
        // z_s = mean of x_t over the tokens t of sequence s of length n:  dx_t = dz_s / n;  and its adjoint
        (Op::SegmentMean, _) => t.op(Op::SegmentMeanVjp, &[dz]),
        (Op::SegmentMeanVjp, _) => t.op(Op::SegmentMean, &[dz]),
        // ℓ = −Σ w ln softmax(x), w the smoothed labels:  dx = dℓ (softmax(x) − w)
        (Op::CrossEntropy { smoothing }, 0) => t.op(Op::CrossEntropyVjp { smoothing: *smoothing }, &[x, y, dz]),
        // z = m ⊙ x / (1 − p):  dx = m ⊙ dz / (1 − p),  the mask m drawn again from the same Philox counters
        (Op::Dropout { .. }, 0) => t.op(op.clone(), &[&[dz], &operands[1..]].concat()),

        // Operands and results that are integers, or that only integers determine, have no derivative.
        (Op::Gather { .. } | Op::Scatter { .. } | Op::CrossEntropy { .. } | Op::Dropout { .. } | Op::Float, _) => {
            none()
        }
        // The derivative of a constant is zero; so is that of `detach` by definition, and that of `step` almost
        // everywhere.
        (Op::Constant { .. } | Op::Iota { .. } | Op::Detach | Op::Step, _) => none(),
        // `min` is used to bound values that do not train, so it has no derivative yet.
        (Op::Min, _) => none(),
        // There are no second derivatives.
        (Op::GeluGrad | Op::GeluTanhGrad | Op::SoftmaxVjp | Op::NormalizeVjp { .. }, _) => none(),
        (Op::CrossEntropyVjp { .. } | Op::AttentionVjp { .. }, _) => none(),
        // Differentiation precedes fusion, so operations that only fusion makes need no derivative.
        (Op::Attend { .. } | Op::AttendTransposed { .. }, _) => none(),
        (Op::Attention { .. } | Op::AttentionLse { .. } | Op::LinearLse | Op::LinearMean, _) => none(),
        (Op::AttentionAndLse { .. } | Op::AttentionVjpSides { .. } | Op::AttentionVjpAll { .. }, _) => none(),
        (Op::LinearLseAndMean, _) => none(),
    }
}

/// The graph under construction, and the source location of the operations that are appended to it.
struct Tape {
    graph: Graph,
    location: Location,
}

impl Tape {
    fn op(&mut self, op: Op, operands: &[Value]) -> Result<Value, String> {
        self.graph.push(op, operands, &self.location)
    }

    /// dz · slope(x)
    fn times(&mut self, dz: Value, slope: Op, x: Value) -> Result<Value, String> {
        let slope = self.op(slope, &[x])?;
        self.op(Op::Mul, &[dz, slope])
    }

    fn one_minus(&mut self, x: Value) -> Result<Value, String> {
        let negative = self.op(Op::Scale { by: -1.0 }, &[x])?;
        self.op(Op::Shift { by: 1.0 }, &[negative])
    }

    /// The slice of `dz` of length `width` from `start` on.
    fn slice_like(&mut self, dz: Value, axis: usize, start: u64, width: Dim) -> Result<Value, String> {
        self.op(Op::Slice { axis, start, end: width.constant().map(|n| start + n) }, &[dz])
    }

    /// Sums `dz` over the axes along which `shape` was broadcast.
    fn unbroadcast(&mut self, dz: Value, shape: Vec<Dim>) -> Result<Value, String> {
        self.reduce_to(dz, shape, false)
    }

    /// Reduces `dz` to `shape` by a sum or a mean over the axes along which `shape` is broadcast to that of `dz`.
    fn reduce_to(&mut self, dz: Value, shape: Vec<Dim>, mean: bool) -> Result<Value, String> {
        let from = self.graph.ty(dz).shape.clone();
        if from == shape {
            return Ok(dz);
        }
        let leading = from.len() - shape.len();
        let broadcast = |&a: &usize| a < leading || shape[a - leading] != from[a];
        let axes: Vec<usize> = (0..from.len()).filter(broadcast).collect();
        let reduced = self.op(Op::Reduce { axes, keep: true, mean }, &[dz])?;
        if leading == 0 { Ok(reduced) } else { self.op(Op::Reshape { shape }, &[reduced]) }
    }

    /// The gradient of a matrix W that all batches of x share: the sum of xᵀ dz over the leading axes.
    fn shared_weight_gradient(&mut self, x: Value, dz: Value, flip: bool, own: Vec<Dim>) -> Result<Value, String> {
        let (left, right) = if flip { (dz, x) } else { (x, dz) };
        let each = self.op(Op::Matmul { transpose_x: true, transpose_y: false }, &[left, right])?;
        let axes = (0..self.graph.ty(each).rank() - own.len()).collect();
        self.op(Op::Reduce { axes, keep: false, mean: false }, &[each])
    }
}
