//! Law: the naive form is the meaning. Every rule, alone and with the others, leaves the interpreter's
//! results alone, on whole models.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use peft_grammar::graph::{Dim, Graph, Location, Op, Role, Type};

use super::samples::{arguments, language_head};
use crate::fuse::{Limits, RULES, fuse};
use crate::gradient::differentiate;
use crate::interpret::{Batch, Data, run};
use crate::partition::partition;
use crate::remat::remat;
use crate::rewrite::live;
use crate::siblings::join;

/// The training graph of a spec with its derivatives, not yet fused: with every output, and with the loss alone.
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
fn rules_change_the_work_and_not_the_meaning() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/ir");
    let mut specs: Vec<_> = std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path()).collect();
    specs.retain(|p| p.extension().is_some_and(|e| e == "peft"));
    assert!(!specs.is_empty());
    let mut fired = vec![false; RULES.len() + 1];
    for graph in specs.iter().flat_map(|path| unfused(path)) {
        for (at, (name, ..)) in RULES.iter().enumerate() {
            let alone = fuse(&graph, |rule| rule == *name, &Limits::default()).expect("fused");
            let none = fuse(&graph, |_| false, &Limits::default()).expect("rebuilt");
            fired[at] |= alone.nodes.iter().map(|n| &n.op).ne(none.nodes.iter().map(|n| &n.op));
            assert_same(name, &graph, &alone);
        }
        let all = fuse(&graph, |_| true, &Limits::default()).expect("fused");
        assert_same("all rules", &graph, &all);
        let again = remat(&all, &Limits::default()).expect("rebuilt").0;
        assert_same("all rules, remat", &graph, &again);
        assert_same("all rules, remat, siblings", &graph, &join(&again).expect("rebuilt"));
        // Models as small as these have little to make again but what attention keeps.
        let kept = fuse(&graph, |rule| rule != "attention", &Limits::default()).expect("fused");
        let again = remat(&kept, &Limits::default()).expect("rebuilt").0;
        fired[RULES.len()] |= again.nodes.len() > kept.nodes.len();
        assert_same("remat", &graph, &again);
    }
    let names = RULES.iter().map(|(name, ..)| *name).chain(["remat"]);
    let idle: Vec<&str> = names.zip(fired).filter(|(_, fired)| !fired).map(|(name, _)| name).collect();
    assert!(idle.is_empty(), "no spec shows what {idle:?} does");
}

/// Behind the last layer's attention rows that are not read are not computed, forward or backward, and a dropout of the
/// others draws what it would among all.
#[test]
fn a_last_layer_of_some_rows() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/ir/inducer.peft");
    for graph in unfused(&path) {
        let fused = fuse(&graph, |_| true, &Limits::default()).expect("fused");
        let whole = |graph: &Graph| {
            let of_all_rows = graph.nodes.iter().filter(|n| graph.ty(n.result()).shape == [Dim::Tokens, Dim::Const(8)]);
            let streams =
                of_all_rows.filter_map(|n| if let Op::Dropout { stream, .. } = n.op { Some(stream) } else { None });
            streams.collect::<BTreeSet<u32>>()
        };
        // The embeddings', and those of the two ways back into the residual stream.
        assert_eq!(whole(&graph), [0, 3, 4].into());
        assert_eq!(whole(&fused), [0].into());
        let batch = Batch::new(&[5, 1, 3], 4);
        let mut args = arguments(&graph, &batch, 3, 2);
        args.insert("targets".into(), Data::I32(vec![8, 2, 3, 6]));
        for seed in 0..8 {
            args.insert("rng".into(), Data::I32(vec![seed, 1]));
            assert_same_on("rows", &graph, &fused, &batch, &args);
        }
    }
}

/// Keys in front of the tokens' own, in one part or two, dropped or not: with both rules nothing ragged is left.
#[test]
fn columns_in_front_of_scores() {
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
        for left in ["joint", "attention", ""] {
            let fused = fuse(&graph, |rule| rule != left, &Limits::default()).expect("fused");
            assert_same(&format!("all but `{left}` of {fronts:?}"), &graph, &fused);
            let ragged = fused.nodes.iter().any(|n| fused.ty(n.result()).ragged());
            assert_eq!(ragged, !left.is_empty(), "all but `{left}` of {fronts:?}");
        }
    }
}

/// Parts of the head that are swept, frozen but narrow, and trained; labels in each of them and beyond.
#[test]
fn a_head_without_whole_logits() {
    for (parts, smoothing) in [
        (vec![(5000, Role::Frozen)], 0.0),
        (vec![(5000, Role::Frozen)], 0.1),
        (vec![(4096, Role::Frozen), (3, Role::Trainable)], 0.0),
        (vec![(7, Role::Frozen), (2, Role::Trainable), (4500, Role::Frozen)], 0.2),
    ] {
        let graph = differentiate(&language_head(&parts, 3, smoothing, 1.0)).expect("differentiable");
        let fused = fuse(&graph, |rule| rule == "head", &Limits::default()).expect("fused");
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
            // The loss of no target is no number; its gradients are.
            let (mut before, mut after) = (graph.clone(), fused.clone());
            if targets == 0 {
                [&mut before, &mut after].into_iter().for_each(|g| g.outputs.retain(|(name, _)| name != "loss"));
            }
            assert_same_on("head", &before, &after, &batch, &args);
            for edges in [[0, 6, 7, rows - 2, rows - 1], [-1, rows, i32::MIN, rows + 6, i32::MAX]] {
                args.insert("labels".into(), Data::I32(edges[..targets].to_vec()));
                assert_same_on("head, labels at edges", &before, &after, &batch, &args);
            }
        }
    }
}

/// Where the logits are asked for, where all of W trains, and where there are few classes.
#[test]
fn a_head_that_stays_as_it_is() {
    let small = language_head(&[(300, Role::Frozen)], 3, 0.1, 1.0);
    let trained = language_head(&[(5000, Role::Trainable)], 3, 0.1, 1.0);
    let mut given = language_head(&[(5000, Role::Frozen)], 3, 0.1, 1.0);
    let labels = given.args.iter().find(|a| a.name == "labels").expect("an argument").value;
    let loss = given.nodes.iter().find(|n| n.operands.get(1) == Some(&labels)).expect("a loss");
    given.outputs.push(("logits".into(), loss.operands[0]));
    for forward in [small, trained, given] {
        let graph = differentiate(&forward).expect("differentiable");
        let fused = fuse(&graph, |rule| rule == "head", &Limits::default()).expect("fused");
        let unchanged = fuse(&graph, |_| false, &Limits::default()).expect("rebuilt");
        assert_eq!(fused, unchanged);
    }
}
