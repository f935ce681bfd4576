//! Every pair of methods on both kinds of backbone. For compatible pairs, the gradient of each trained tensor is
//! compared with central differences of the loss in the interpreter (f64). Incompatible pairs are refused by the
//! checker with a reason.

use std::collections::HashMap;

use peft_grammar::check;
use peft_grammar::graph::{DType, Graph, Op, Role};
use peft_grammar::model::{Model, Trainable};
use peft_grammar::names::Output;
use peft_passes::dialect::Dialect;
use peft_passes::interpret::{Batch, Data, run};
use peft_passes::pipeline::{self, Entry, Options, Stage};
use peft_passes::rewrite::{live, rewrite};
use peft_runtime::philox::philox4x32;

/// Rules that apply each method, with a name for messages. In a pair, the method listed first comes first in the spec.
const METHODS: &[(&str, &str)] = &[
    ("prefix", "every attention { prefix(length: 2, mid: 3) }"),
    ("direct prefix", "every attention { prefix(length: 2, direct: true) }"),
    ("mam adapter", "mam_adapter(prefix: 2, bottleneck: 3, scale: 0.7)"),
    ("inducer", "every attention { inducer(key: 2, value: 3) }"),
    ("adaptive inducer", "every attention { inducer(value: 3, extended: false) }"),
    ("extension inducer", "every attention { inducer(value: 3) }"),
    ("gating inducer", "every attention { inducer(key: 2, value: 3, gating: true) }"),
    ("mam inducer", "mam_inducer(key: 2, value: 3, rank: 2, bottleneck: 3, alpha: 4, dropout: 0)"),
    ("lora on q, v", "every attention { lora(rank: 2, alpha: 4) on q, v }"),
    ("lora on k, out", "every attention { lora(rank: 2, alpha: 3) on k, out }"),
    ("lora on ffn", "every ffn { lora(rank: 2, bias: true) on up, out }"),
    ("dora", "every attention { dora(rank: 2, alpha: 3, detach: false) on q, out }"),
    ("vera", "every attention { vera(rank: 3) on k, v }"),
    ("ia3", "every attention { ia3() } every ffn { ia3() }"),
    ("adapter", "every attention { adapter(bottleneck: 3) }"),
    ("parallel adapter", "every ffn { adapter(bottleneck: 3, scale: 0.7) }"),
    ("adapter after ffn", "every ffn { adapter(bottleneck: 3, place: \"after\", norm: true) }"),
    ("block adapter", "every ffn { adapter(bottleneck: 3, place: \"block\") }"),
    ("bitfit", "bitfit()"),
    ("full", "full()"),
];

/// Groups of methods of which a model can have only one, in any order, and the checker's message.
const EXCLUSIVE: &[(&[&str], &str)] = &[
    (
        &["inducer", "adaptive inducer", "extension inducer", "gating inducer", "mam inducer"],
        "`inducer` is applied twice at `layers.0.attention`",
    ),
    (&["prefix", "direct prefix", "mam adapter"], "`prefix` is applied twice at `layers.0.attention`"),
    (
        &["parallel adapter", "adapter after ffn", "block adapter", "mam adapter", "mam inducer"],
        "`adapter` is applied twice at `layers.0.ffn`",
    ),
    (&["lora on q, v", "mam inducer"], "`lora` is applied twice at `layers.0.attention.q`"),
];

const OVERWRITTEN: &str = "`prefix` overwrites `f` without reading it, so the change by `inducer` is lost";

/// Pairs in which the first method must not precede the second, and the checker's message. The reverse order is valid.
const ORDERED: &[(&str, &str, &str)] = &[
    ("full", "bitfit", "all tensors that `bitfit` selects train already"),
    ("adaptive inducer", "prefix", OVERWRITTEN),
    ("gating inducer", "prefix", OVERWRITTEN),
    ("adaptive inducer", "direct prefix", OVERWRITTEN),
    ("gating inducer", "direct prefix", OVERWRITTEN),
    ("adaptive inducer", "mam adapter", OVERWRITTEN),
    ("gating inducer", "mam adapter", OVERWRITTEN),
];

fn rules(name: &str) -> &'static str {
    METHODS.iter().find(|(n, _)| *n == name).expect("a method of the table").1
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Gpt2,
    Roberta,
}

/// A model with both methods, or the checker's message.
fn model(kind: Kind, first: &str, second: &str) -> Result<Model, String> {
    let length = if [first, second].iter().any(|rules| rules.contains("prefix")) { 2 } else { 0 };
    spec(kind, &format!("{first}\n{second}"), length)
}

fn spec(kind: Kind, rules: &str, first_position: u64) -> Result<Model, String> {
    let (backbone, task) = match kind {
        Kind::Gpt2 => (
            format!("gpt2(embedding_dropout: 0, token_types: true, first_position: {first_position}, "),
            "kind: generation special: [\"<t>\"] template: \"<t> {text}\" target: \"<t>\"",
        ),
        Kind::Roberta => ("roberta(token_types: 2, ".to_string(), "kind: classification labels: [\"0\", \"1\", \"2\"]"),
    };
    let spec = format!(
        "model = {backbone}layers: 2, hidden: 8, heads: 2, ffn: 12, vocab: 11, context: 8, dropout: 0, \
         attention_dropout: 0)\ntune {{\n{rules}\n}}\ntask t {{ {task} }}\ntrain {{ label_smoothing: 0.1 }}\n"
    );
    check("pair.peft", &spec, &peft_grammar::no_imports).map_err(|e| format!("{e}{spec}"))
}

/// Normally distributed numbers, as a function of the seed and the tensor's index.
pub fn normal(std: f64, seed: u32, tensor: usize, n: usize) -> Vec<f64> {
    let uniform = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
    let number = |i: usize| {
        let [a, b, ..] = philox4x32([i as u32, tensor as u32, 0, 0], [seed, 0]);
        std * (-2.0 * uniform(a).ln()).sqrt() * (std::f64::consts::TAU * uniform(b)).cos()
    };
    (0..n).map(number).collect()
}

/// A batch of sequences with 3, 1 and 2 tokens, and random values for every argument. Tensors that are initialised to
/// zero get random values too.
fn arguments(graph: &Graph, kind: Kind, seed: u32) -> (Batch, HashMap<String, Data>) {
    let (targets, labels): (&[i32], &[i32]) = match kind {
        Kind::Gpt2 => (&[1, 3, 4, 5], &[7, 0, 10, 3]),
        Kind::Roberta => (&[], &[2, 0, 1]),
    };
    let batch = Batch::new(&[3, 1, 2], targets.len());
    let argument = |(i, arg): (usize, &peft_grammar::graph::Arg)| {
        let ty = graph.ty(arg.value);
        let ints: &[i32] = match &*arg.name {
            "ids" => &[4, 10, 1, 4, 0, 6],
            "types" if matches!(kind, Kind::Gpt2) => &[8, 9, 9, 8, 8, 9],
            "types" => &[0, 1, 1, 0, 0, 1],
            "positions" => &[0, 1, 2, 0, 0, 1],
            "starts" => &[0, 3, 4],
            "targets" => targets,
            _ => labels,
        };
        let data = match ty.dtype {
            DType::I32 => Data::I32(ints.to_vec()),
            DType::F32 => Data::F64(normal(0.3, seed, i, batch.elements(&ty.shape))),
        };
        (arg.label(), data)
    };
    let args = graph.args.iter().enumerate().map(argument).collect();
    (batch, args)
}

/// The part of `graph` that these outputs depend on.
fn only(graph: &Graph, outputs: impl IntoIterator<Item = (String, peft_grammar::graph::Value)>) -> Graph {
    let mut graph = graph.clone();
    graph.outputs = outputs.into_iter().collect();
    live(&graph)
}

/// A loss as a function of its arguments, at a point where it is differentiable.
struct Surface {
    loss: Graph,
    batch: Batch,
    args: HashMap<String, Data>,
}

impl Surface {
    /// Uses the first seed that keeps every input of a relu away from its kink.
    fn new(graph: &Graph, kind: Kind) -> Self {
        let loss = only(graph, graph.outputs.iter().filter(|(name, _)| name == "loss").cloned());
        let relus = graph.nodes.iter().filter(|n| n.op == Op::Relu).map(|n| (String::new(), n.operands[0]));
        let kinks = only(graph, relus);
        // Also requires a third of the inputs to be positive, because no gradient passes an inactive relu.
        let smooth = |(batch, args): &(Batch, HashMap<String, Data>)| {
            let inputs = run(&kinks, batch, args).expect("it runs");
            let alive =
                |x: &[f64]| x.iter().all(|x| x.abs() > 1e-3) && 3 * x.iter().filter(|x| **x > 0.0).count() > x.len();
            inputs.iter().all(|(_, x)| alive(x.floats()))
        };
        let (batch, args) = (0..100).map(|seed| arguments(graph, kind, seed)).find(smooth).expect("a smooth place");
        Surface { loss, batch, args }
    }

    fn outputs(&self, graph: &Graph) -> Vec<(String, Data)> {
        run(graph, &self.batch, &self.args).expect("it runs")
    }

    /// The loss with one tensor moved along a direction.
    fn moved(&self, tensor: &str, direction: &[f64], by: f64) -> f64 {
        let mut args = self.args.clone();
        let Some(Data::F64(x)) = args.get_mut(tensor) else { panic!("`{tensor}` holds floats") };
        x.iter_mut().zip(direction).for_each(|(x, d)| *x += by * d);
        run(&self.loss, &self.batch, &args).expect("it runs")[0].1.floats()[0]
    }

    /// The difference between `gradient` and the slope of the loss along a random direction, relative to the gradient's
    /// length. A random direction is orthogonal to almost no error.
    fn error(&self, tensor: &str, gradient: &[f64]) -> f64 {
        const STEP: f64 = 1e-5;
        let mut direction = normal(0.3, 1000, gradient.len(), gradient.len());
        let length = norm(&direction);
        direction.iter_mut().for_each(|d| *d /= length);
        let along: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
        let slope = (self.moved(tensor, &direction, STEP) - self.moved(tensor, &direction, -STEP)) / (2.0 * STEP);
        (along - slope).abs() / (norm(gradient) + 1e-4)
    }
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

const TOLERANCE: f64 = 1e-6;

/// Gradients by tensor, from the graph that the compiler differentiates.
fn gradients(dialect: &Dialect, model: &Model, surface: &Surface) -> Vec<(String, Vec<f64>)> {
    let options = Options { until: Stage::Grad, ..Options::default() };
    let compiled = pipeline::run(dialect, model, &[Entry::Grad], &options).unwrap_or_else(|e| panic!("{e}"));
    let outputs = surface.outputs(&compiled.graphs[0]).into_iter();
    outputs
        .filter_map(|(name, x)| Some((Output::from_name(&name).gradient()?.to_string(), x.floats().to_vec())))
        .collect()
}

/// Errors in the gradients of a model.
fn wrong(dialect: &Dialect, model: &Model, kind: Kind) -> Vec<String> {
    let surface = Surface::new(&model.graph, kind);
    let found = gradients(dialect, model, &surface);
    let mut wrong = vec![];
    let trained = model.params.iter().filter(|p| p.trainable != Trainable::No).count();
    if found.len() != trained {
        wrong.push(format!("{} gradients of {trained} tensors", found.len()));
    }
    for (tensor, gradient) in &found {
        let error = surface.error(tensor, gradient);
        if error.is_nan() || error > TOLERANCE {
            wrong.push(format!("`{tensor}` is off by {error:.1e} of its length"));
        }
        // A softmax is invariant to a shift that all of a query's keys share, so this bias has no gradient.
        let blind = tensor.ends_with("attention.self.key.bias");
        if !blind && norm(gradient) < 1e-9 {
            wrong.push(format!("`{tensor}` has no gradient: nothing is tested"));
        }
    }
    wrong
}

/// The checker's message if the two methods cannot be applied in this order.
fn refusal(first: &str, second: &str) -> Option<&'static str> {
    let both = |group: &&(&[&str], _)| group.0.contains(&first) && group.0.contains(&second);
    let order = |row: &&(&str, &str, _)| (row.0, row.1) == (first, second);
    let exclusive = EXCLUSIVE.iter().find(both).map(|(_, words)| *words);
    exclusive.or_else(|| ORDERED.iter().find(order).map(|(.., words)| *words))
}

/// Tests the pairs whose first method's index is `rest` modulo 2, so that two tests can run in parallel.
fn every_pair(kind: Kind, rest: usize) -> usize {
    let dialect = Dialect::new().expect("a dialect");
    let (mut ran, mut failures) = (0, vec![]);
    for (i, &(first, a)) in METHODS.iter().enumerate().filter(|(i, _)| i % 2 == rest) {
        for &(second, b) in &METHODS[i + 1..] {
            if refusal(first, second).is_some() {
                continue;
            }
            let label = format!("{kind:?}, {first} and {second}");
            match model(kind, a, b) {
                Ok(model) => {
                    ran += 1;
                    failures.extend(wrong(&dialect, &model, kind).into_iter().map(|w| format!("{label}: {w}")));
                }
                Err(e) => failures.push(format!("{label} should share a model:\n{e}")),
            }
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
    ran
}

#[test]
fn gpt2_pairs_with_an_even_first_method() {
    assert_eq!(every_pair(Kind::Gpt2, 0), 89);
}

#[test]
fn gpt2_pairs_with_an_odd_first_method() {
    assert_eq!(every_pair(Kind::Gpt2, 1), 77);
}

#[test]
fn roberta_pairs_with_an_even_first_method() {
    assert_eq!(every_pair(Kind::Roberta, 0), 89);
}

#[test]
fn roberta_pairs_with_an_odd_first_method() {
    assert_eq!(every_pair(Kind::Roberta, 1), 77);
}

#[test]
fn incompatible_pairs_are_refused() {
    for kind in [Kind::Gpt2, Kind::Roberta] {
        for &(first, a) in METHODS {
            for &(second, b) in METHODS {
                let twice = (first == second).then_some("is applied twice");
                let Some(words) = twice.or_else(|| refusal(first, second)) else { continue };
                let Err(error) = model(kind, a, b) else { panic!("{first} and {second} share a {kind:?}") };
                assert!(error.contains(words), "{first} and {second} on {kind:?}: it should say\n{words}\n{error}");
            }
        }
        for (first, second, _) in ORDERED {
            assert!(model(kind, rules(second), rules(first)).is_ok(), "{second} and {first} do not share a {kind:?}");
        }
    }
    // The backbone computes the positions, so GPT-2 has to know the length of the prefix.
    let Err(error) = spec(Kind::Gpt2, rules("prefix"), 0) else { panic!("its positions are wrong") };
    assert!(error.contains("write `first_position: 2` among the model's arguments"), "{error}");
}

/// With a detached norm, DoRA's gradient is that of the graph in which the norm is a constant.
#[test]
fn a_detached_norm_differentiates_as_a_constant() {
    let dialect = Dialect::new().expect("a dialect");
    for kind in [Kind::Gpt2, Kind::Roberta] {
        let dora = |detach: bool| {
            let rules = format!("every attention {{ dora(rank: 2, alpha: 3, detach: {detach}) on q, v }}");
            spec(kind, &rules, 0).unwrap_or_else(|e| panic!("{e}"))
        };
        let (detached, through) = (dora(true), dora(false));
        let mut surface = Surface::new(&detached.graph, kind);
        let found = gradients(&dialect, &detached, &surface);
        let whole = gradients(&dialect, &through, &surface);

        // Norms become arguments with their current values.
        let detaches = |n: &&peft_grammar::graph::Node| n.op == Op::Detach;
        let norms = detached.graph.nodes.iter().filter(detaches).enumerate();
        let norms = only(&detached.graph, norms.map(|(i, n)| (format!("norm {i}"), n.operands[0])));
        let norms = surface.outputs(&norms);
        let mut count = 0;
        let constant = rewrite(&surface.loss, |new, op, operands| {
            Ok((*op == Op::Detach).then(|| {
                let (name, ty) = (format!("norm {count}"), new.graph.ty(operands[0]).clone());
                count += 1;
                new.graph.arg(name, Role::Frozen, None, ty)
            }))
        });
        surface.loss = constant.expect("well-formed");
        surface.args.extend(norms);
        assert_eq!(count, 4, "two layers have a norm for q and one for v");

        for ((tensor, gradient), (same, whole)) in found.iter().zip(&whole) {
            assert_eq!(tensor, same);
            let error = surface.error(tensor, gradient);
            assert!(error < TOLERANCE, "{kind:?}: `{tensor}` is off by {error:.1e} of its length");
            // The head follows all norms, and a magnitude is not an input of its own norm, so neither is affected.
            let through_a_norm = [".dora.a", ".dora.b"].iter().any(|end| tensor.ends_with(end));
            let apart = norm(&gradient.iter().zip(whole).map(|(g, w)| g - w).collect::<Vec<_>>()) / norm(gradient);
            assert!(through_a_norm == (apart > 1e-3), "{kind:?}: `{tensor}` differs by {apart:.1e}");
        }
    }
}
