//! Tests the table of derivatives against central differences of the interpreter, in f64.

use proptest::prelude::*;

use super::samples::{arguments, cases, single};
use crate::gradient::differentiate;
use crate::interpret::{Batch, Data, run};
use peft_grammar::graph::{Dim, Graph, Location, Op, Role, Type};

/// Compares every gradient of `graph` with (f(x + h) − f(x − h)) / 2h.
fn check(graph: &Graph, batch: &Batch, seed: u64) {
    let gradient = differentiate(graph).expect("differentiable");
    gradient.verify().expect("well-formed");
    let args = arguments(graph, batch, seed, 3);
    let outputs = run(&gradient, batch, &args).expect("runs");
    let loss = |args: &_| run(graph, batch, args).expect("runs")[0].1.floats()[0];
    for arg in graph.args.iter().filter(|a| a.role == Role::Trainable) {
        let label = arg.label();
        let (_, found) = outputs.iter().find(|(n, _)| *n == format!("grad.{label}")).expect("a gradient each");
        for (i, found) in found.floats().iter().enumerate() {
            let shifted = |by: f64| {
                let mut args = args.clone();
                let Some(Data::F64(x)) = args.get_mut(&label) else { unreachable!("floats train") };
                x[i] += by;
                loss(&args)
            };
            let h = 1e-5;
            let expected = (shifted(h) - shifted(-h)) / (2.0 * h);
            let error = (found - expected).abs();
            let op = &graph.nodes[0].op;
            assert!(error < 1e-6 * (1.0 + expected.abs()), "{op:?} {label}[{i}]: {found} against {expected}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn gradients_of_every_operation_match_differences(
        lengths in prop::collection::vec(1usize..4, 1..4),
        (h, p, r) in (1u64..3, 1u64..4, 1u64..4),
        targets in 1usize..4,
        seed in any::<u32>(),
    ) {
        let batch = Batch::new(&lengths, targets);
        for (op, types) in cases(h, p, r) {
            check(&single(op, &types), &batch, u64::from(seed));
        }
    }
}

/// √x, 1/√x, ln x and division are tested on positive operands, where they are differentiable.
#[test]
fn gradients_of_operations_on_positive_numbers_match_differences() {
    let mut graph = Graph::new("positive");
    let at = Location::default();
    let x = graph.arg("x", Role::Trainable, None, Type::f32([Dim::Const(5)]));
    let y = graph.arg("y", Role::Trainable, None, Type::f32([Dim::Const(5)]));
    let mut sum = None;
    for op in [Op::Sqrt, Op::Rsqrt, Op::Log] {
        let positive = graph.push(Op::Exp, &[x], &at).expect("fits");
        let value = graph.push(op, &[positive], &at).expect("fits");
        let ratio = graph.push(Op::Div, &[y, positive], &at).expect("fits");
        let value = graph.push(Op::Mul, &[value, ratio], &at).expect("fits");
        sum = Some(sum.map_or(value, |s| graph.push(Op::Add, &[s, value], &at).expect("fits")));
    }
    let all = Op::Reduce { axes: vec![0], keep: false, mean: false };
    let loss = graph.push(all, &[sum.expect("three")], &at).expect("fits");
    graph.outputs.push(("loss".into(), loss));
    check(&graph, &Batch::new(&[1], 1), 5);
}

/// The masked scores of causal attention are −∞ and must not reach any gradient.
#[test]
fn gradients_of_causal_attention_match_differences() {
    for lengths in [&[1][..], &[3, 1, 2]] {
        let mut graph = Graph::new("attention");
        let at = Location::default();
        let ty = Type::f32([Dim::Const(2), Dim::Tokens, Dim::Const(3)]);
        let [q, k, v] = ["q", "k", "v"].map(|n| graph.arg(n, Role::Trainable, None, ty.clone()));
        let s = graph.push(Op::Scores { causal: true }, &[q, k], &at).expect("fits");
        let s = graph.push(Op::Scale { by: 0.6 }, &[s], &at).expect("fits");
        let w = graph.push(Op::Softmax, &[s], &at).expect("fits");
        let f = graph.push(Op::Attend { causal: false }, &[w, v], &at).expect("fits");
        let f = graph.push(Op::Mul, &[f, f], &at).expect("fits");
        let all = Op::Reduce { axes: vec![0, 1, 2], keep: false, mean: false };
        let loss = graph.push(all, &[f], &at).expect("fits");
        graph.outputs.push(("loss".into(), loss));
        check(&graph, &Batch::new(lengths, 1), 11);
    }
}
