//! Tests of fusion on whole models: the unfused graph defines the meaning, and every rule, alone and with the others,
//! keeps the results of the interpreter.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use peft_grammar::graph::{Dim, Graph, Location, Op, Role, Type};

use super::samples::{arguments, language_head};
use crate::fuse::{RULES, Thresholds, fuse};
use crate::gradient::differentiate;
use crate::interpret::{Batch, Data, run};
use crate::multi_output::merge_siblings;
use crate::partition::partition;
use crate::remat::remat;
use crate::rewrite::live;

/// The unfused training graph of a spec with its backward pass, twice: with all outputs, and with the loss as the only
/// one besides the gradients.
fn unfused(path: &Path) -> [Graph; 2] {
    let source = std::fs::read_to_string(path).expect("readable");
    let folder = path.parent().expect("a folder").to_path_buf();
    let resolver = move |import: &str| std::fs::read_to_string(folder.join(import)).map_err(|e| e.to_string());
    let model = peft_grammar::check("spec.peft", &source, &resolver).unwrap_or_else(|e| panic!("{}", e.render(false)));
    let mut loss = model.graph.clone();
    loss.outputs.retain(|(name, _)| name == "loss");
    [&model.graph, &live(&loss)].map(|graph| {
        let forward = partition(graph).expect("partitioned");
        if forward.args.iter().any(|a| a.role == Role::Trainable) {
            differentiate(&forward).expect("differentiable")
        } else {
            forward
        }
    })
}

fn assert_same(name: &str, before: &Graph, after: &Graph) {
    let batch = Batch::new(&[5, 1, 3], 2);
    assert_same_on(name, before, after, &batch, &arguments(before, &batch, 3, 2));
}

pub fn assert_same_on(name: &str, before: &Graph, after: &Graph, batch: &Batch, args: &HashMap<String, Data>) {
    after.verify().unwrap_or_else(|e| panic!("{name}: {e}"));
    let (want, found) = (run(before, batch, args).expect("run"), run(after, batch, args).expect("run"));
    for ((output, want), (other, found)) in want.iter().zip(&found) {
        assert_eq!(output, other);
        let largest = want.floats().iter().fold(1e-3_f64, |m, x| m.max(x.abs()));
        for (w, f) in want.floats().iter().zip(found.floats()) {
            assert!((w - f).abs() <= 1e-10 * largest, "{name}: `{output}` is {f}, not {w}");
        }
    }
}

#[test]
fn every_rule_applies_and_keeps_the_results() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/ir");
    let mut specs: Vec<_> = std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path()).collect();
    specs.retain(|p| p.extension().is_some_and(|e| e == "peft"));
    assert!(!specs.is_empty());
    let mut fired = vec![false; RULES.len() + 1];
    for graph in specs.iter().flat_map(|path| unfused(path)) {
        for (at, (name, ..)) in RULES.iter().enumerate() {
            let alone = fuse(&graph, |rule| rule == *name, &Thresholds::default()).expect("fused");
            let none = fuse(&graph, |_| false, &Thresholds::default()).expect("rebuilt");
            fired[at] |= alone.nodes.iter().map(|n| &n.op).ne(none.nodes.iter().map(|n| &n.op));
            assert_same(name, &graph, &alone);
        }
        let all = fuse(&graph, |_| true, &Thresholds::default()).expect("fused");
        assert_same("all rules", &graph, &all);
        let again = remat(&all, &Thresholds::default()).expect("rebuilt").0;
        assert_same("all rules, remat", &graph, &again);
        assert_same("all rules, remat, multi_output", &graph, &merge_siblings(&again).expect("rebuilt"));
        // Without fused attention, these small models keep attention weights, which remat recomputes.
        let kept = fuse(&graph, |rule| rule != "attention", &Thresholds::default()).expect("fused");
        let again = remat(&kept, &Thresholds::default()).expect("rebuilt").0;
        fired[RULES.len()] |= again.nodes.len() > kept.nodes.len();
        assert_same("remat", &graph, &again);
    }
    let names = RULES.iter().map(|(name, ..)| *name).chain(["remat"]);
    let idle: Vec<&str> = names.zip(fired).filter(|(_, fired)| !fired).map(|(name, _)| name).collect();
    assert!(idle.is_empty(), "no spec in which {idle:?} applies");
}

/// After the attention of the last layer, only rows that are read are computed, forward and backward, and dropout draws
/// the same numbers for them as for all rows.
#[test]
fn the_last_layer_computes_only_rows_that_are_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/ir/inducer.peft");
    for graph in unfused(&path) {
        let fused = fuse(&graph, |_| true, &Thresholds::default()).expect("fused");
        let full_streams = |graph: &Graph| {
            let of_all_rows = graph.nodes.iter().filter(|n| graph.ty(n.result()).shape == [Dim::Tokens, Dim::Const(8)]);
            let streams =
                of_all_rows.filter_map(|n| if let Op::Dropout { stream, .. } = n.op { Some(stream) } else { None });
            streams.collect::<BTreeSet<u32>>()
        };
        // The dropout of the embeddings, and those of the two branches that are added to the residual stream.
        assert_eq!(full_streams(&graph), [0, 3, 4].into());
        assert_eq!(full_streams(&fused), [0].into());
        let batch = Batch::new(&[5, 1, 3], 4);
        let mut args = arguments(&graph, &batch, 3, 2);
        args.insert("targets".into(), Data::I32(vec![8, 2, 3, 6]));
        for seed in 0..8 {
            args.insert("rng".into(), Data::I32(vec![seed, 1]));
            assert_same_on("gather_pushdown", &graph, &fused, &batch, &args);
        }
    }
}

/// Attention with extra keys before the keys of the tokens, in one part or two, with and without dropout: if both rules
/// apply, no ragged tensor is left.
#[test]
fn split_softmax_and_attention_leave_no_ragged_tensor() {
    for (fronts, p) in [(&[1][..], 0.0), (&[3], 0.3), (&[30], 0.3), (&[1, 3], 0.3), (&[2, 1], 0.0)] {
        let mut graph = Graph::new("joint");
        let at = Location::default();
        let heads = |n| Type::f32([Dim::Const(2), Dim::Tokens, Dim::Const(n)]);
        let [q, k, v] = ["q", "k", "v"].map(|n| graph.arg(n, Role::Trainable, None, heads(5)));
        let rng = graph.arg("rng", Role::Input, None, Type::i32([Dim::Const(2)]));
        let mut columns = vec![];
        let mut values = vec![];
        for (i, &n) in fronts.iter().enumerate() {
            columns.push(graph.arg(format!("a{i}"), Role::Trainable, None, heads(n)));
            let ty = Type::f32([Dim::Const(2), Dim::Const(n), Dim::Const(5)]);
            values.push(graph.arg(format!("v{i}"), Role::Trainable, None, ty));
        }
        let mut push = |op: Op, operands: &[_]| graph.push(op, operands, &at).expect("fits");
        let scores = push(Op::Scores { causal: true }, &[q, k]);
        let scores = push(Op::Scale { by: 0.4 }, &[scores]);
        let joint = push(Op::Concat { axis: 2 }, &[&columns[..], &[scores]].concat());
        let mut w = push(Op::Softmax, &[joint]);
        if p > 0.0 {
            w = push(Op::Dropout { p, stream: 3, column: 0 }, &[w, rng]);
        }
        let mut start = 0;
        let mut sum = None;
        for (&n, value) in fronts.iter().zip(values) {
            let own = push(Op::Slice { axis: 2, start, end: Some(start + n) }, &[w]);
            let f = push(Op::Matmul { transpose_x: false, transpose_y: false }, &[own, value]);
            sum = Some(sum.map_or(f, |sum| push(Op::Add, &[sum, f])));
            start += n;
        }
        let own = push(Op::Slice { axis: 2, start, end: None }, &[w]);
        let f = push(Op::Attend { causal: false }, &[own, v]);
        let f = push(Op::Add, &[sum.expect("a front"), f]);
        let square = push(Op::Mul, &[f, f]);
        let loss = push(Op::Reduce { axes: vec![0, 1, 2], keep: false, mean: false }, &[square]);
        graph.outputs.extend([("loss".into(), loss), ("f".into(), f)]);
        let graph = differentiate(&graph).expect("differentiable");
        for left in ["split_softmax", "attention", ""] {
            let fused = fuse(&graph, |rule| rule != left, &Thresholds::default()).expect("fused");
            assert_same(&format!("all but `{left}` of {fronts:?}"), &graph, &fused);
            let ragged = fused.nodes.iter().any(|n| fused.ty(n.result()).is_ragged());
            assert_eq!(ragged, !left.is_empty(), "all but `{left}` of {fronts:?}");
        }
    }
}

/// Output embeddings with chunked, small frozen, and trained parts; labels in each part and out of range.
#[test]
fn chunked_logits_are_not_materialised() {
    for (parts, smoothing) in [
        (vec![(5000, Role::Frozen)], 0.0),
        (vec![(5000, Role::Frozen)], 0.1),
        (vec![(4096, Role::Frozen), (3, Role::Trainable)], 0.0),
        (vec![(7, Role::Frozen), (2, Role::Trainable), (4500, Role::Frozen)], 0.2),
    ] {
        let graph = differentiate(&language_head(&parts, 3, smoothing, 1.0)).expect("differentiable");
        let fused = fuse(&graph, |rule| rule == "chunked_logits", &Thresholds::default()).expect("fused");
        let wide = |g: &Graph| {
            let long = |v| matches!(g.ty(v).shape[..], [Dim::Targets, Dim::Const(n)] if n >= 4096);
            g.nodes.iter().filter(|n| long(n.result())).count()
        };
        assert!(wide(&graph) > 0);
        assert_eq!(wide(&fused), 0, "{parts:?}");
        let rows: i32 = parts.iter().map(|(n, _)| *n as i32).sum();
        for targets in [0, 1, 5] {
            let batch = Batch::new(&[2], targets);
            let mut args = arguments(&graph, &batch, 7, rows);
            // The mean loss over no targets is NaN, but its gradients are defined.
            let (mut before, mut after) = (graph.clone(), fused.clone());
            if targets == 0 {
                [&mut before, &mut after].into_iter().for_each(|g| g.outputs.retain(|(name, _)| name != "loss"));
            }
            assert_same_on("chunked_logits", &before, &after, &batch, &args);
            for edges in [[0, 6, 7, rows - 2, rows - 1], [-1, rows, i32::MIN, rows + 6, i32::MAX]] {
                args.insert("labels".into(), Data::I32(edges[..targets].to_vec()));
                assert_same_on("chunked_logits, labels at edges", &before, &after, &batch, &args);
            }
        }
    }
}

/// `chunked_logits` does not apply if the logits are an output, if all of W trains, or if there are few classes.
#[test]
fn logits_that_are_not_chunked() {
    let small = language_head(&[(300, Role::Frozen)], 3, 0.1, 1.0);
    let trained = language_head(&[(5000, Role::Trainable)], 3, 0.1, 1.0);
    let mut given = language_head(&[(5000, Role::Frozen)], 3, 0.1, 1.0);
    let labels = given.args.iter().find(|a| a.name == "labels").expect("an argument").value;
    let loss = given.nodes.iter().find(|n| n.operands.get(1) == Some(&labels)).expect("a loss");
    given.outputs.push(("logits".into(), loss.operands[0]));
    for forward in [small, trained, given] {
        let graph = differentiate(&forward).expect("differentiable");
        let fused = fuse(&graph, |rule| rule == "chunked_logits", &Thresholds::default()).expect("fused");
        let unchanged = fuse(&graph, |_| false, &Thresholds::default()).expect("rebuilt");
        assert_eq!(fused, unchanged);
    }
}
