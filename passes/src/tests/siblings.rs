//! Operations that one kernel computes, apart and as one node.

use peft_grammar::graph::{Dim, Graph, Location, Op, Role, Type, Value};

use super::fusion::assert_same_on;
use super::samples::arguments;
use crate::dialect::Dialect;
use crate::interpret::Batch;
use crate::rewrite::{live, rewrite};
use crate::siblings::join;

/// Every operation of several results, with what its operands are.
fn wholes() -> Vec<(Op, Vec<Type>)> {
    let heads = |n| Type::f32([Dim::Const(2), Dim::Tokens, Dim::Const(n)]);
    let mut all = vec![(Op::LinearLseAndMean, vec![rows(Dim::Tokens), rows(Dim::Const(7))])];
    for (causal, p) in [(false, 0.0), (true, 0.3)] {
        let (scale, stream, column) = (0.4, 2, 1);
        let key = (p > 0.0).then(|| Type::i32([Dim::Const(2)]));
        let with_key = |types: Vec<Type>| types.into_iter().chain(key.clone()).collect::<Vec<_>>();
        let forward = with_key(vec![heads(3), heads(3), heads(5)]);
        let backward = with_key(vec![heads(3), heads(3), heads(5), heads(1), heads(5), heads(1)]);
        all.push((Op::AttentionAndLse { causal, scale, p, stream, column }, forward));
        all.push((Op::AttentionVjpSides { causal, scale, p, stream, column }, backward.clone()));
        all.push((Op::AttentionVjpAll { causal, scale, p, stream, column }, backward));
    }
    all
}

fn rows(count: Dim) -> Type {
    Type::f32([count, Dim::Const(3)])
}

/// What `whole` joins, in this order by number, each a node whose result is an output; `change` says what a part reads.
fn apart(whole: &Op, types: &[Type], order: &[usize], change: impl Fn(&Op, &mut [Value])) -> Graph {
    let mut graph = Graph::new("apart");
    let operands: Vec<Value> =
        types.iter().enumerate().map(|(i, ty)| graph.arg(format!("x{i}"), Role::Input, None, ty.clone())).collect();
    let parts = whole.joins();
    for &i in order {
        let mut operands = parts[i].of_whole(&operands).to_vec();
        change(&parts[i], &mut operands);
        let value = graph.push(parts[i].clone(), &operands, &Location::default()).expect("fits");
        graph.outputs.push((format!("z{i}"), value));
    }
    graph
}

fn orders(parts: usize) -> Vec<Vec<usize>> {
    vec![(0..parts).collect(), (0..parts).rev().collect()]
}

#[test]
fn one_node_gives_what_its_parts_gave() {
    let dialect = Dialect::new().expect("a dialect");
    for (whole, types) in wholes() {
        for order in orders(whole.joins().len()) {
            // The values' adjoint reads neither the values nor the corrections.
            let stand_in = |part: &Op, x: &mut [Value]| {
                if let Op::AttentionVjp { of: 2, .. } = part {
                    (x[2], x[5]) = (x[4], x[3]);
                }
            };
            let apart = apart(&whole, &types, &order, stand_in);
            let joined = join(&apart).expect("rebuilt");
            assert_eq!(joined.nodes.iter().map(|node| &node.op).collect::<Vec<_>>(), [&whole], "{order:?}");
            let batch = Batch::new(&[5, 1, 3], 2);
            assert_same_on(whole.name(), &apart, &joined, &batch, &arguments(&apart, &batch, 3, 2));

            let text = dialect.print(&[&joined]).expect("valid");
            let back = dialect.read(&text).unwrap_or_else(|e| panic!("{e}\n{text}")).remove(0);
            assert_eq!(dialect.print(&[&back]).expect("valid"), text);
            assert_eq!(back.nodes[0].op, whole);
            assert!(text.contains(&format!("%0:{} = \"peft.{}\"", order.len(), whole.name())), "{text}");

            let written = serde_json::to_string(&joined).expect("plain data");
            assert_eq!(serde_json::from_str::<Graph>(&written).expect("a graph"), joined);
            assert_eq!(rewrite(&joined, |_, _, _| Ok(None)).expect("rebuilt"), joined);
            // One result that is asked for keeps the node.
            let mut one = joined.clone();
            one.outputs.truncate(1);
            assert_eq!(live(&one).nodes, joined.nodes);
        }
    }
}

/// Where a result is read before the others can be there, or might be prepared once and for all.
#[test]
fn what_stays_apart() {
    let (whole, types) = wholes().into_iter().find(|(op, _)| matches!(op, Op::AttentionVjpSides { .. })).expect("one");
    let mut graph = apart(&whole, &types, &[1], |_, _| ());
    let values = graph.nodes[0].result();
    let twice = graph.push(Op::Scale { by: 2.0 }, &[values], &Location::default()).expect("fits");
    graph.outputs.push(("twice".into(), twice));
    let operands = graph.nodes[0].operands.clone();
    let keys = graph.push(whole.joins()[0].clone(), &operands, &Location::default()).expect("fits");
    graph.outputs.push(("keys".into(), keys));
    assert_eq!(join(&graph).expect("rebuilt"), graph);

    let fixed = apart(&Op::LinearLseAndMean, &[rows(Dim::Const(4)), rows(Dim::Const(7))], &[0, 1], |_, _| ());
    assert_eq!(join(&fixed).expect("rebuilt"), fixed);
}
