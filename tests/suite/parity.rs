//! Loss, logits, λ and every gradient against PyTorch, in the interpreter and compiled.

use std::collections::HashMap;

use peft_grammar::graph::{DType, Graph, Role};
use peft_grammar::model::{Init, Model, Origin, Param, Precision};
use peft_grammar::names::{Input, LOGITS, Output};
use peft_passes::codegen;
use peft_passes::dialect::Dialect;
use peft_passes::fuse::Thresholds;
use peft_passes::interpret::{self, Batch, Data};
use peft_passes::lower::{Lowered, link};
use peft_passes::pipeline::{self, Entry, Options, Stage};
use peft_runtime::adapter::{Stored, TensorFile};
use peft_runtime::{Inputs, Program, Session, weights};
use peftc::exchange::{self, Padded};

use crate::cli::kernel_cache;
use crate::fixtures::{self, Fixture};

/// Bounds for the differences. Those of the loss and of gradients are relative to their largest value.
struct Bounds {
    loss: f64,
    gradient: f64,
    /// Bound for gradients behind a relu, where a rounding can change whether the relu is active.
    gated: f64,
    /// An absolute bound for gradients, for tensors whose values are all small.
    least: f64,
    /// An absolute bound for logits, which are up to about 5, and for λ.
    other: f64,
}

fn bounds(precision: Precision) -> Bounds {
    match precision {
        Precision::F32 => Bounds { loss: 1e-5, gradient: 1e-4, gated: 1e-4, least: 0.0, other: 1e-4 },
        Precision::Bf16 => Bounds { loss: 5e-3, gradient: 6e-2, gated: 1.0, least: 1e-5, other: 5e-2 },
    }
}

fn floats(stored: &Stored) -> &[f32] {
    match &stored.data {
        peft_runtime::adapter::Data::F32(x) => x,
        _ => panic!("integers"),
    }
}

/// A message for each difference beyond its bound.
fn differences(fixture: &Fixture, precision: Precision, padded: &Padded, found: &TensorFile) -> Vec<String> {
    let mut wrong = vec![];
    let bounds = bounds(precision);
    for (name, want) in fixture.file.tensors.iter().filter_map(|(n, t)| Some((n.strip_prefix("expect.")?, t))) {
        if name.starts_with("hidden.") {
            continue;
        }
        let Some(stored) = found.tensors.get(name) else {
            wrong.push(format!("`{name}` is missing"));
            continue;
        };
        if stored.shape != want.shape {
            wrong.push(format!("`{name}` is {:?}, not {:?}", stored.shape, want.shape));
            continue;
        }
        let (found, want) = (floats(stored), floats(want));
        let largest = want.iter().fold(0.0_f64, |m, x| m.max(f64::from(x.abs())));
        let nearly_zero = fixture.json["float32_torch_vs_float64"]["grad_tensors_exactly_or_nearly_zero"]
            .as_array()
            .is_some_and(|l| l.iter().any(|n| n.as_str() == Output::from_name(name).gradient()));
        let tolerance = match Output::from_name(name) {
            Output::Loss => bounds.loss * largest,
            Output::Gradient(_) if nearly_zero => bounds.other,
            Output::Gradient(tensor) if tensor.contains(".adapter.down.") => bounds.least.max(bounds.gated * largest),
            Output::Gradient(_) => bounds.least.max(bounds.gradient * largest),
            _ => bounds.other,
        };
        let gap = found.iter().zip(want).map(|(f, w)| f64::from((f - w).abs())).fold(0.0, f64::max);
        if gap > tolerance || gap.is_nan() {
            wrong.push(format!("`{name}` differs by {gap:.3e} of at most {tolerance:.3e}"));
        }
    }
    for name in found.tensors.keys().filter(|n| Output::from_name(n).gradient().is_some()) {
        if !fixture.file.tensors.contains_key(&format!("expect.{name}")) {
            wrong.push(format!("`{name}` is no gradient PyTorch has"));
        }
    }
    assert!(padded.batch.tokens() > 0);
    wrong
}

/// The interpreter's arguments: a batch and the fixture's weights.
pub fn arguments(graph: &Graph, fixture: &Fixture, model: &Model, inputs: &Inputs) -> HashMap<String, Data> {
    let argument = |arg: &peft_grammar::graph::Arg| {
        let data = if graph.ty(arg.value).dtype == DType::I32 {
            Data::I32(inputs.ints[&arg.name].clone())
        } else if let Some(floats) = inputs.floats.get(&arg.name) {
            Data::F64(floats.iter().map(|&x| f64::from(x)).collect())
        } else {
            let all = fixture.floats(&format!("weights.{}", arg.name));
            let row =
                all.len() / model.params.iter().find(|p| p.name == arg.name).expect("a parameter").shape[0] as usize;
            let rows = arg.rows.map_or(0..all.len(), |(a, b)| a as usize * row..b as usize * row);
            Data::F64(all[rows].iter().map(|&x| f64::from(x)).collect())
        };
        (arg.label(), data)
    };
    graph.args.iter().map(argument).collect()
}

/// The interpreter's results in the layout of the session's.
fn interpreted(graph: &Graph, fixture: &Fixture, model: &Model, padded: &Padded) -> TensorFile {
    let run = |inputs: &Inputs| {
        let lengths: Vec<usize> = inputs.lengths.iter().map(|&n| n as usize).collect();
        let batch = Batch::new(&lengths, inputs.ints[Input::Targets.name()].len());
        let args = arguments(graph, fixture, model, inputs);
        interpret::run(graph, &batch, &args).expect("interpreted")
    };
    let f32s = |data: &Data| data.floats().iter().map(|&x| x as f32).collect::<Vec<f32>>();
    let mut out = TensorFile::default();
    let of_tokens = fixture.of_tokens();
    if of_tokens {
        let all = run(&padded.inputs_with_all_targets([0, 0]));
        let logits = f32s(&all.iter().find(|(n, _)| n == LOGITS).expect("an output").1);
        out.tensors.insert(LOGITS.into(), padded.pad_tokens(&logits, logits.len() / padded.batch.tokens()));
    }
    for (name, data) in run(&padded.inputs([0, 0])) {
        let x = f32s(&data);
        let (name, stored) = match Output::from_name(&name) {
            Output::Logits if of_tokens => continue,
            Output::Lambda(_) => (name, padded.pad_heads(&x)),
            Output::Gradient(label) => {
                let arg =
                    graph.args.iter().find(|a| a.role == Role::Trainable && a.label() == label).expect("an argument");
                let param = model.params.iter().find(|p| p.name == arg.name).expect("a parameter");
                let mut full = vec![0.0; param.elements() as usize];
                let row = full.len() / param.shape[0] as usize;
                let from = arg.rows.map_or(0, |(start, _)| start as usize * row);
                full[from..from + x.len()].copy_from_slice(&x);
                (Output::Gradient(&arg.name).to_string(), Stored::f32(param.shape.clone(), full))
            }
            Output::Loss => (name, Stored::f32(vec![1], x)),
            _ => {
                let shape = vec![padded.sequences as u64, (x.len() / padded.sequences) as u64];
                (name, Stored::f32(shape, x))
            }
        };
        out.tensors.insert(name, stored);
    }
    out
}

/// Options with all fusion rules, or with none.
pub fn fused(all: bool) -> Options {
    Options { without: if all { vec![] } else { vec!["all".into()] }, ..Options::default() }
}

pub fn lowered(fixture: &Fixture, model: &Model, options: &Options) -> Lowered {
    let dialect = Dialect::new().expect("a dialect");
    let compiled = pipeline::run(&dialect, model, &[Entry::Grad, Entry::Train], options);
    compiled.unwrap_or_else(|e| panic!("{}: {e}", fixture.name)).lowered.expect("the whole way")
}

/// Compiles programs into one library, so that shared kernels are compiled once.
pub fn programs(mut all: Vec<Lowered>) -> Vec<Program> {
    let kernels = link(&mut all);
    let folder = tempfile::tempdir().expect("a directory");
    let library = folder.path().join("kernels.so");
    codegen::compile(&kernels, all[0].machine, kernel_cache().as_deref(), &library).unwrap_or_else(|e| panic!("{e}"));
    all.into_iter().map(|lowered| Program::new(lowered.manifest, &library).expect("a program")).collect()
}

/// A session with the fixture's weights.
pub fn session(fixture: &Fixture, model: &Model, options: &Options) -> Session {
    start(fixture, model, programs(vec![lowered(fixture, model, options)]).remove(0))
}

fn start(fixture: &Fixture, model: &Model, program: Program) -> Session {
    let weights = exchange::weights(&fixture.file, model, &fixture.path).expect("weights");
    let mut session = Session::new(program, weights, 2).expect("a session");
    session.poison = true;
    session
}

/// Fixtures with their models.
pub fn models(prefix: &str, precision: Precision) -> Vec<(Fixture, Model)> {
    let model = |fixture: Fixture| {
        let mut model = fixture.model();
        model.train.precision = precision;
        (fixture, model)
    };
    fixtures::all(prefix).into_iter().map(model).collect()
}

pub fn check(models: &[(Fixture, Model)], mut results: impl FnMut(&Fixture, &Model, &Padded) -> TensorFile) {
    let faults = |(fixture, model): &(Fixture, Model)| faults(fixture, model, |padded| results(fixture, model, padded));
    let wrong: Vec<String> = models.iter().flat_map(faults).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The errors in the results for a fixture's batch.
fn faults(fixture: &Fixture, model: &Model, results: impl FnOnce(&Padded) -> TensorFile) -> Vec<String> {
    let padded = exchange::batch(&fixture.file, "inputs.", &fixture.path, model).expect("a batch");
    let found = differences(fixture, model.train.precision, &padded, &results(&padded));
    found.into_iter().map(|d| format!("{}: {d}", fixture.name)).collect()
}

fn in_the_interpreter(prefix: &str) {
    check(&models(prefix, Precision::F32), |fixture, model, padded| {
        let dialect = Dialect::new().expect("a dialect");
        // The graph without fusion defines the semantics.
        let options = Options { until: Stage::Grad, ..Options::default() };
        let compiled = pipeline::run(&dialect, model, &[Entry::Grad], &options);
        let graph = compiled.unwrap_or_else(|e| panic!("{}: {e}", fixture.name)).graphs.remove(0);
        interpreted(&graph, fixture, model, padded)
    });
}

fn compiled(prefix: &str, options: &Options, precision: Precision) {
    let models = models(prefix, precision);
    let all = models.iter().map(|(fixture, model)| lowered(fixture, model, options)).collect();
    let mut programs = programs(all).into_iter();
    check(&models, |fixture, model, padded| {
        let mut session = start(fixture, model, programs.next().expect("one for each fixture"));
        exchange::run(&mut session, model, Entry::Grad, padded, [0, 0]).expect("a run")
    });
}

/// Groups of fixtures by the prefix of their names, with three tests each, so that the tests run in parallel.
macro_rules! families {
    ($($(#[$doc:meta])* $family:ident = $prefix:literal,)*) => {
        $($(#[$doc])*
        mod $family {
            use super::{Precision, fused};

            #[test]
            fn in_the_interpreter() {
                super::in_the_interpreter($prefix);
            }

            #[test]
            fn compiled() {
                super::compiled($prefix, &fused(true), Precision::F32);
            }

            #[test]
            fn compiled_without_fusion() {
                super::compiled($prefix, &fused(false), Precision::F32);
            }
        })*
    };
}

families! {
    gpt2 = "gpt2_",
    bert = "bert_",
    roberta = "roberta_",
    llama = "llama_",
    /// Heads for other tasks than the backbone's first.
    heads = "head_",
}

/// Fixtures in which, taken together, every fusion rule applies.
const RULED: [&str; 4] = ["gpt2_lora_qv", "gpt2_mam_inducer_smoothing", "llama_tied_lora", "roberta_mam_adapter"];

/// Options without one rule, if given, and with thresholds low enough for small models.
fn small(without: Option<&str>) -> Options {
    let without = without.into_iter().map(String::from).collect();
    Options {
        without,
        thresholds: Thresholds { min_chunked_vocab: 32, max_kept_floats_per_op: 0.1, ..Thresholds::default() },
        ..Options::default()
    }
}

/// The fixture's model. For plain GPT-2 the equations are less optimised than the library's: logits are computed at
/// every token, and attention weights are scaled twice. The fusion rules have to improve them.
fn naively(fixture: &Fixture) -> Model {
    if fixture.name != "gpt2_lora_qv" {
        return fixture.model();
    }
    let gpt2 = peft_grammar::library::backbones().into_iter().find(|b| b.name == "gpt2").expect("a backbone");
    let changes = [
        ("backbone gpt2(", "backbone naive("),
        ("f = attend(dropout(softmax(S), attention_dropout), V)", "f = 2 * attend(0.5 * softmax(S), V)"),
        ("logits = y[targets] @ transpose(unembedding)", "all = y @ transpose(unembedding)\nlogits = all[targets]"),
    ];
    let naive = changes.iter().fold(gpt2.source.to_string(), |source, (library, own)| {
        assert!(source.contains(library), "{library}");
        source.replace(library, own)
    });
    let spec = format!("{naive}\n{}", fixture.spec().replace("gpt2(", "naive("));
    peft_grammar::check("spec.peft", &spec, &peft_grammar::no_imports).unwrap_or_else(|e| panic!("{e}"))
}

/// The rules whose omission changes the code of a fixture.
fn at_work(fixture: &Fixture, model: &Model) -> Vec<&'static str> {
    let all = lowered(fixture, model, &small(None)).manifest;
    let changes = |rule: &&str| lowered(fixture, model, &small(Some(rule))).manifest != all;
    pipeline::rules().into_iter().filter(changes).collect()
}

#[test]
fn each_fusion_rule_changes_some_fixture() {
    let found: Vec<&str> = RULED.map(fixtures::one).iter().flat_map(|f| at_work(f, &naively(f))).collect();
    let idle: Vec<&str> = pipeline::rules().into_iter().filter(|rule| !found.contains(rule)).collect();
    assert!(idle.is_empty(), "leaving out {idle:?} changes nothing");
}

/// No rule depends on another: results stay correct if any single rule is left out.
#[test]
fn results_hold_without_any_single_rule() {
    let fixtures = RULED.map(fixtures::one);
    let models = fixtures.each_ref().map(naively);
    let mut cases = vec![];
    for (fixture, model) in fixtures.iter().zip(&models) {
        let rules = at_work(fixture, model).into_iter().map(Some);
        cases.extend(std::iter::once(None).chain(rules).map(|rule| (fixture, model, rule)));
    }
    let all = cases.iter().map(|(fixture, model, rule)| lowered(fixture, model, &small(*rule))).collect();
    let mut wrong = vec![];
    for ((fixture, model, rule), program) in cases.into_iter().zip(programs(all)) {
        let mut session = start(fixture, model, program);
        let results = |padded: &Padded| exchange::run(&mut session, model, Entry::Grad, padded, [0, 0]).expect("a run");
        wrong.extend(faults(fixture, model, results).into_iter().map(|fault| format!("without {rule:?}, {fault}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Gemms with frozen weights in bf16, everything else in f32.
#[test]
fn bf16_gemms_are_close_to_pytorch() {
    for backbone in ["gpt2_", "bert_", "roberta_", "llama_"] {
        compiled(backbone, &fused(true), Precision::Bf16);
    }
}

/// Methods that act on every head, on a model whose heads share keys and values. No PyTorch fixture covers them, so the
/// interpreter is the reference.
#[test]
fn methods_on_grouped_heads_match_the_interpreter() {
    for attention in ["inducer(key: 2, value: 3) ia3() lora(rank: 2) on k, out", "prefix(length: 3, mid: 5)"] {
        let mut fixture = fixtures::all("llama_finetune").remove(0);
        let tune = format!("every attention {{ {attention} }} every ffn {{ ia3() lora(rank: 2) on gate, up, out }}");
        let spec = fixture.spec().replace("full()", &tune);
        let model =
            peft_grammar::check("spec.peft", &spec, &peft_grammar::no_imports).unwrap_or_else(|e| panic!("{e}"));
        let of_methods = model.params.iter().filter(|p| matches!(p.origin, Origin::Method(_)));
        let spread: Vec<Param> = of_methods.map(|p| Param { init: Init::Normal { std: 0.2 }, ..p.clone() }).collect();
        for (param, numbers) in spread.iter().zip(weights::random(&spread, 5)) {
            let stored = Stored::f32(param.shape.clone(), numbers.to_vec());
            fixture.file.tensors.insert(format!("weights.{}", param.name), stored);
        }
        let padded = exchange::batch(&fixture.file, "inputs.", &fixture.path, &model).expect("a batch");
        let dialect = Dialect::new().expect("a dialect");
        let options = Options { until: Stage::Grad, ..Options::default() };
        let graph = pipeline::run(&dialect, &model, &[Entry::Grad], &options).expect("compiled").graphs.remove(0);
        let expected = interpreted(&graph, &fixture, &model, &padded);
        assert!(expected.tensors.len() > model.graph.outputs.len());
        fixture.file.tensors.retain(|name, _| !name.starts_with("expect."));
        let expected = expected.tensors.into_iter().map(|(name, stored)| (format!("expect.{name}"), stored));
        fixture.file.tensors.extend(expected);
        for all in [true, false] {
            let mut session = session(&fixture, &model, &fused(all));
            let found = exchange::run(&mut session, &model, Entry::Grad, &padded, [0, 0]).expect("a run");
            assert_eq!(
                differences(&fixture, model.train.precision, &padded, &found),
                Vec::<String>::new(),
                "{attention}"
            );
        }
    }
}
