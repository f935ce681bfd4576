//! Tests of multi-output fusion: sibling operations, separate and merged into one node.

use peft_grammar::graph::{Dim, Graph, Location, Op, Role, Type, Value};

use super::fusion::assert_same_on;
use super::samples::arguments;
use crate::dialect::Dialect;
use crate::interpret::Batch;
use crate::multi_output::merge_siblings;
use crate::rewrite::{live, rewrite};

/// Every operation of several results, with the types of its operands.
fn multi_output_operations() -> Vec<(Op, Vec<Type>)> {
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

/// A graph of the components of `merged` in this order, all of whose results are outputs. `change` may replace the
/// operands of a component.
fn separate(merged: &Op, types: &[Type], order: &[usize], change: impl Fn(&Op, &mut [Value])) -> Graph {
    let mut graph = Graph::new("separate");
    let operands: Vec<Value> =
        types.iter().enumerate().map(|(i, ty)| graph.arg(format!("x{i}"), Role::Input, None, ty.clone())).collect();
    let parts = merged.components();
    for &i in order {
        let mut operands = parts[i].component_operands(&operands).to_vec();
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
fn a_merged_node_computes_what_its_components_compute() {
    let dialect = Dialect::new().expect("a dialect");
    for (merged, types) in multi_output_operations() {
        for order in orders(merged.components().len()) {
            // The adjoint of the values depends neither on the values nor on the row terms, so others may stand in for
            // them.
            let stand_in = |part: &Op, x: &mut [Value]| {
                if let Op::AttentionVjp { of: 2, .. } = part {
                    (x[2], x[5]) = (x[4], x[3]);
                }
            };
            let separate = separate(&merged, &types, &order, stand_in);
            let fused = merge_siblings(&separate).expect("rebuilt");
            assert_eq!(fused.nodes.iter().map(|node| &node.op).collect::<Vec<_>>(), [&merged], "{order:?}");
            let batch = Batch::new(&[5, 1, 3], 2);
            assert_same_on(merged.name(), &separate, &fused, &batch, &arguments(&separate, &batch, 3, 2));

            let text = dialect.print(&[&fused]).expect("valid");
            let back = dialect.read(&text).unwrap_or_else(|e| panic!("{e}\n{text}")).remove(0);
            assert_eq!(dialect.print(&[&back]).expect("valid"), text);
            assert_eq!(back.nodes[0].op, merged);
            assert!(text.contains(&format!("%0:{} = \"peft.{}\"", order.len(), merged.name())), "{text}");

            let written = serde_json::to_string(&fused).expect("plain data");
            assert_eq!(serde_json::from_str::<Graph>(&written).expect("a graph"), fused);
            assert_eq!(rewrite(&fused, |_, _, _| Ok(None)).expect("rebuilt"), fused);
            // A node stays alive as long as one of its results is an output.
            let mut one = fused.clone();
            one.outputs.truncate(1);
            assert_eq!(live(&one).nodes, fused.nodes);
        }
    }
}

/// Siblings stay separate if a result is read before the others can be computed, or if no result depends on the batch.
#[test]
fn siblings_that_are_not_merged() {
    let (merged, types) =
        multi_output_operations().into_iter().find(|(op, _)| matches!(op, Op::AttentionVjpSides { .. })).expect("one");
    let mut graph = separate(&merged, &types, &[1], |_, _| ());
    let values = graph.nodes[0].result();
    let twice = graph.push(Op::Scale { by: 2.0 }, &[values], &Location::default()).expect("fits");
    graph.outputs.push(("twice".into(), twice));
    let operands = graph.nodes[0].operands.clone();
    let keys = graph.push(merged.components()[0].clone(), &operands, &Location::default()).expect("fits");
    graph.outputs.push(("keys".into(), keys));
    assert_eq!(merge_siblings(&graph).expect("rebuilt"), graph);

    let fixed = separate(&Op::LinearLseAndMean, &[rows(Dim::Const(4)), rows(Dim::Const(7))], &[0, 1], |_, _| ());
    assert_eq!(merge_siblings(&fixed).expect("rebuilt"), fixed);
}
