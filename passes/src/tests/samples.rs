//! Graphs and arguments on which passes are tested.

use std::collections::HashMap;

use peft_grammar::graph::{DType, Dim, Graph, Location, Op, Role, Type, Value};

use crate::interpret::{Batch, Data};

/// A graph of one operation on trainable operands. The loss is a weighted sum of the elements of the result, so that
/// each has a different adjoint.
pub fn single(op: Op, operands: &[Type]) -> Graph {
    let mut graph = Graph::new("single");
    let at = Location::default();
    let mut values: Vec<Value> = vec![];
    for (i, ty) in operands.iter().enumerate() {
        let role = if ty.dtype == DType::I32 { Role::Input } else { Role::Trainable };
        values.push(graph.arg(format!("x{i}"), role, None, ty.clone()));
    }
    let z = graph.push(op, &values, &at).expect("the case fits");
    let weights = graph.ty(z).clone();
    let rank = weights.rank();
    let w = graph.arg("weights", Role::Frozen, None, weights);
    let weighted = graph.push(Op::Mul, &[z, w], &at).expect("the shapes are equal");
    let axes = (0..rank).collect();
    let loss = graph.push(Op::Reduce { axes, keep: false, mean: false }, &[weighted], &at).expect("all axes");
    graph.outputs.extend([("loss".into(), loss), ("z".into(), z)]);
    graph
}

/// The mean cross-entropy of the logits scale · x Wᵀ over the targets. W consists of `parts`, given as numbers of rows
/// with their roles; `width` is the number of its columns.
pub fn language_head(parts: &[(u64, Role)], width: u64, smoothing: f64, scale: f64) -> Graph {
    let mut graph = Graph::new("head");
    let at = Location::default();
    let rows = [Dim::Targets, Dim::Const(width)];
    let x = graph.arg("x", Role::Trainable, None, Type::f32(rows));
    let labels = graph.arg("labels", Role::Input, None, Type::i32([Dim::Targets]));
    let weight = |graph: &mut Graph, i: usize, (n, role): (u64, Role)| {
        graph.arg(format!("w{i}"), role, None, Type::f32([Dim::Const(n), Dim::Const(width)]))
    };
    let weights: Vec<Value> = parts.iter().enumerate().map(|(i, &part)| weight(&mut graph, i, part)).collect();
    let mut push = |op: Op, operands: &[Value]| graph.push(op, operands, &at).expect("fits");
    let x = push(Op::Scale { by: scale }, &[x]);
    let product = Op::Matmul { transpose_x: false, transpose_y: true };
    let columns: Vec<Value> = weights.iter().map(|&w| push(product.clone(), &[x, w])).collect();
    let logits = if let [one] = columns[..] { one } else { push(Op::Concat { axis: 1 }, &columns) };
    let losses = push(Op::CrossEntropy { smoothing }, &[logits, labels]);
    let loss = push(Op::Reduce { axes: vec![0], keep: false, mean: true }, &[losses]);
    graph.outputs.push(("loss".into(), loss));
    graph
}

/// `n` pseudorandom numbers in −1.5 … 1.5 with magnitudes of at least 0.05, because relu and min have no derivative at
/// 0.
pub fn numbers(seed: u64, n: usize) -> Vec<f64> {
    let word = |i: usize| peft_runtime::philox::philox4x32([i as u32, 0, 0, 0], [seed as u32, (seed >> 32) as u32])[0];
    let number = |i| f64::from(word(i)) / f64::from(u32::MAX) * 3.0 - 1.5;
    (0..n).map(number).map(|x| if x.abs() < 0.05 { x.signum() * 0.05 } else { x }).collect()
}

/// Pseudorandom arguments of `graph`, by label; integers are below `limit`.
pub fn arguments(graph: &Graph, batch: &Batch, seed: u64, limit: i32) -> HashMap<String, Data> {
    let data = |(i, arg): (usize, &peft_grammar::graph::Arg)| {
        let ty = graph.ty(arg.value);
        let x = numbers(seed.wrapping_add(i as u64 * 7919), batch.elements(&ty.shape));
        let data = match ty.dtype {
            DType::F32 => Data::F64(x),
            DType::I32 => Data::I32(x.iter().map(|x| ((x + 1.5) / 3.0 * f64::from(limit)) as i32 % limit).collect()),
        };
        (arg.label(), data)
    };
    graph.args.iter().enumerate().map(data).collect()
}

/// Every differentiable operation with types of its operands, for `h` heads, `p` columns and sizes derived from `r`.
pub fn cases(h: u64, p: u64, r: u64) -> Vec<(Op, Vec<Type>)> {
    use Dim::*;
    let f = |shape: &[Dim]| Type::f32(shape.to_vec());
    let hidden = f(&[Tokens, Const(p)]);
    let heads = f(&[Const(h), Tokens, Const(p)]);
    let ragged = |extra| f(&[Const(h), Tokens, Keys(extra)]);
    let plain = |tx, ty| Op::Matmul { transpose_x: tx, transpose_y: ty };
    let mut all = vec![];
    for op in [Op::Add, Op::Sub, Op::Mul] {
        all.push((op.clone(), vec![hidden.clone(), hidden.clone()]));
        all.push((op.clone(), vec![hidden.clone(), f(&[Const(p)])]));
        all.push((op.clone(), vec![f(&[]), hidden.clone()]));
        all.push((op.clone(), vec![f(&[Const(h), Tokens, Const(1)]), heads.clone()]));
        all.push((op.clone(), vec![f(&[Const(h), Tokens, Const(1)]), ragged(1)]));
        all.push((op, vec![f(&[Const(h), Const(1), Const(p)]), heads.clone()]));
    }
    all.push((Op::Div, vec![hidden.clone(), f(&[Const(p)])]));
    for op in [
        Op::Scale { by: -0.7 },
        Op::Shift { by: 0.3 },
        Op::Exp,
        Op::Sin,
        Op::Cos,
        Op::Tanh,
        Op::Sigmoid,
        Op::Relu,
        Op::Gelu,
        Op::GeluTanh,
    ] {
        all.push((op.clone(), vec![hidden.clone()]));
        all.push((op, vec![ragged(0)]));
    }
    all.extend([
        (Op::Iota { n: p }, vec![]),
        (Op::Float, vec![Type::i32([Tokens])]),
        (Op::Reshape { shape: vec![Tokens, Const(p), Const(h)] }, vec![f(&[Tokens, Const(h * p)])]),
        (Op::Permute { axes: vec![1, 0, 2] }, vec![heads.clone()]),
        (Op::Permute { axes: vec![2, 0, 1] }, vec![f(&[Const(r), Const(h), Const(p)])]),
        (Op::Slice { axis: 1, start: 1, end: Some(p + 1) }, vec![f(&[Tokens, Const(p + 2)])]),
        (Op::Slice { axis: 0, start: 1, end: None }, vec![f(&[Const(r + 1), Const(p)])]),
        (Op::Slice { axis: 2, start: 0, end: Some(1) }, vec![ragged(2)]),
        (Op::Slice { axis: 2, start: 1, end: None }, vec![ragged(1)]),
        (Op::Pad { axis: 1, start: 2, to: Const(p + 3) }, vec![hidden.clone()]),
        (Op::Pad { axis: 2, start: 1, to: Keys(1) }, vec![ragged(0)]),
        (Op::Pad { axis: 2, start: 0, to: Keys(2) }, vec![f(&[Const(h), Tokens, Const(1)])]),
        (Op::Concat { axis: 1 }, vec![hidden.clone(), f(&[Tokens, Const(r)]), hidden.clone()]),
        (Op::Concat { axis: 2 }, vec![f(&[Const(h), Tokens, Const(1)]), ragged(0)]),
        (
            Op::Broadcast { shape: vec![Const(h), Tokens, Const(p)], mean: false },
            vec![f(&[Const(h), Const(1), Const(p)])],
        ),
        (
            Op::Broadcast { shape: vec![Const(h), Const(r), Tokens, Const(p)], mean: false },
            vec![f(&[Const(h), Const(1), Tokens, Const(p)])],
        ),
        (Op::Broadcast { shape: vec![Tokens, Const(p)], mean: true }, vec![f(&[Const(p)])]),
        (Op::Reduce { axes: vec![1], keep: true, mean: false }, vec![hidden.clone()]),
        (Op::Reduce { axes: vec![0], keep: false, mean: true }, vec![hidden.clone()]),
        (Op::Reduce { axes: vec![0, 2], keep: false, mean: false }, vec![heads.clone()]),
        (Op::Reduce { axes: vec![2], keep: true, mean: true }, vec![heads.clone()]),
        (Op::Reduce { axes: vec![2], keep: true, mean: false }, vec![ragged(1)]),
        (plain(false, false), vec![hidden.clone(), f(&[Const(p), Const(r)])]),
        (plain(false, true), vec![hidden.clone(), f(&[Const(r), Const(p)])]),
        (plain(true, false), vec![hidden.clone(), f(&[Tokens, Const(r)])]),
        (plain(true, true), vec![f(&[Const(p), Const(r)]), f(&[Const(h), Const(p)])]),
        (plain(false, false), vec![heads.clone(), f(&[Const(h), Const(p), Const(r)])]),
        (plain(false, true), vec![heads.clone(), f(&[Const(h), Const(r), Const(p)])]),
        (plain(false, false), vec![heads.clone(), f(&[Const(p), Const(r)])]),
        (plain(false, true), vec![heads.clone(), f(&[Const(r), Const(p)])]),
        (Op::Scores { causal: false }, vec![heads.clone(), heads.clone()]),
        (Op::Attend { causal: false }, vec![ragged(0), heads.clone()]),
        (Op::AttendTransposed { causal: false }, vec![ragged(0), heads.clone()]),
        (Op::Softmax, vec![hidden.clone()]),
        (Op::Softmax, vec![ragged(1)]),
        (Op::LogSumExp, vec![hidden.clone()]),
        (Op::LogSumExp, vec![ragged(0)]),
        (Op::Normalize { eps: 1e-2 }, vec![hidden.clone()]),
        (Op::Gather { start: 1 }, vec![f(&[Const(r + 1), Const(p)]), Type::i32([Tokens])]),
        (Op::Scatter { start: 1, rows: Const(r + 1) }, vec![Type::i32([Tokens]), hidden.clone()]),
        (Op::SegmentMean, vec![hidden.clone()]),
        (Op::SegmentMeanVjp, vec![f(&[Sequences, Const(p)])]),
        (Op::CrossEntropy { smoothing: 0.1 }, vec![f(&[Targets, Const(r + 3)]), Type::i32([Targets])]),
        (Op::CrossEntropy { smoothing: 0.0 }, vec![f(&[Targets, Const(r + 3)]), Type::i32([Targets])]),
        (Op::Dropout { p: 0.4, stream: 3, column: 8 }, vec![hidden.clone(), Type::i32([Const(2)])]),
        (Op::Dropout { p: 0.4, stream: 4, column: r }, vec![ragged(1), Type::i32([Const(2)])]),
        (Op::Dropout { p: 0.4, stream: 5, column: 6 }, vec![f(&[Const(h), Tokens, Const(1)]), Type::i32([Const(2)])]),
        (Op::Dropout { p: 0.4, stream: 6, column: 1 }, vec![f(&[Tokens, Const(1)]), Type::i32([Const(2)])]),
        (Op::Dropout { p: 0.4, stream: 7, column: 0 }, vec![hidden, Type::i32([Const(2)]), Type::i32([Tokens])]),
        (
            Op::Dropout { p: 0.4, stream: 8, column: 2 },
            vec![f(&[Tokens, Const(1)]), Type::i32([Const(2)]), Type::i32([Tokens])],
        ),
        (Op::Dropout { p: 0.4, stream: 9, column: 1 }, vec![heads, Type::i32([Const(2)]), Type::i32([Tokens])]),
    ]);
    all
}
