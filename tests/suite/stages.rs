//! The compiler's stages as text: each can be parsed back, and those of small specs (`tests/ir`) are snapshots.

use std::path::Path;

use peft_grammar::graph::{Op, Role};
use peft_grammar::model::Model;
use peft_passes::codegen;
use peft_passes::dialect::Dialect;
use peft_passes::pipeline::{self, Entry, Options, Stage};
use peft_runtime::artifact::{Buffer, Sizes};

use super::cli::Bench;

fn model(path: &Path) -> Model {
    peftc::spec::load(path, &[], false).unwrap_or_else(|e| panic!("{e}"))
}

fn emitted(dialect: &Dialect, model: &Model, stage: Stage) -> String {
    let options = Options { until: stage, ..Options::default() };
    let compiled = pipeline::run(dialect, model, &[Entry::Train], &options).unwrap_or_else(|e| panic!("{e}"));
    pipeline::emit(dialect, &compiled, stage, None, false).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn small_specs() {
    let dialect = Dialect::new().expect("a dialect");
    insta::glob!("../ir", "*.peft", |path| {
        let source = std::fs::read_to_string(path).expect("readable");
        let model = model(path);
        let stages = [("grad", Stage::Grad), ("fused", Stage::Fused)];
        let text = stages.map(|(name, stage)| format!("// {name}\n{}", emitted(&dialect, &model, stage))).join("\n");
        insta::assert_snapshot!(format!("{source}\n{text}"));
    });
}

#[test]
fn every_stage_round_trips_through_text() {
    let dialect = Dialect::new().expect("a dialect");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ir");
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|e| e != "peft") {
            assert!(path.is_dir() || path.extension().is_some_and(|e| e == "snap"), "{} is no case", path.display());
            continue;
        }
        let model = model(&path);
        assert_eq!(Model::from_json(&model.to_json()).expect("a model"), model);
        for stage in [Stage::Peft, Stage::Grad, Stage::Fused] {
            let text = emitted(&dialect, &model, stage);
            let graphs = dialect.read(&text).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(dialect.print(&graphs.iter().collect::<Vec<_>>()).expect("valid"), text);
        }
        for stage in [Stage::Loops, Stage::Llvm] {
            let text = emitted(&dialect, &model, stage);
            assert_eq!(codegen::reprint(&dialect, &text).expect("a module"), text);
        }
    }
}

/// Gradients are computed only for trainable tensors. No two tensors of the spec have the same widths, so a frozen
/// weight's gradient would be the only value of its shape.
#[test]
fn frozen_weights_get_no_gradient() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ir/lora_on_the_upper_layer.peft");
    let model = model(&path);
    let dialect = Dialect::new().expect("a dialect");
    let options = Options { until: Stage::Grad, ..Options::default() };
    let graph = pipeline::run(&dialect, &model, &[Entry::Train], &options).expect("compiled").graphs.remove(0);
    let frozen: Vec<_> = graph.args.iter().filter(|a| a.role == Role::Frozen).collect();
    assert!(frozen.len() > 20);
    for node in graph.nodes.iter().filter(|n| matches!(n.op, Op::Matmul { transpose_x: true, .. })) {
        let made = graph.ty(node.result());
        let of = frozen.iter().find(|a| graph.ty(a.value).rank() == 2 && graph.ty(a.value) == made);
        assert!(of.is_none(), "the gradient of `{}` is computed", of.expect("some").name);
    }
    // Nothing below the lowest trainable value is differentiated, so the lower layer has no backward pass.
    let backward = |layer: &str| {
        let first = frozen.iter().filter(|a| a.name.contains(layer)).map(|a| a.value).collect::<Vec<_>>();
        graph.nodes.iter().filter(|n| n.operands.iter().any(|v| first.contains(v))).count()
    };
    assert!(backward(".h.0.") < backward(".h.1."), "{} and {}", backward(".h.0."), backward(".h.1."));
}

/// The number of buffers of the training step whose size depends on the number of token pairs.
fn pair_buffers(dialect: &Dialect, path: &Path, without: &[&str]) -> usize {
    let without = without.iter().map(|name| name.to_string()).collect();
    let options = Options { until: Stage::Loops, without, ..Options::default() };
    let compiled = pipeline::run(dialect, &model(path), &[Entry::Train], &options);
    let lowered = compiled.unwrap_or_else(|e| panic!("{}: {e}", path.display())).lowered.expect("loops");
    let sizes = |pairs| Sizes { tokens: 4, sequences: 2, targets: 1, pairs, values: 1 };
    let grows = |buffer: &&Buffer| buffer.elements(&sizes(8)) != buffer.elements(&sizes(9));
    lowered.manifest.buffers.iter().filter(grows).count()
}

/// Rematerialised values are not kept for the backward pass. The more weights train, the more memory this saves.
#[test]
fn rematerialisation_reduces_activation_memory() {
    for (spec, share) in
        [("webnlg/finetune", 0.85), ("webnlg/lora", 0.9), ("webnlg/inducer_lora", 0.93), ("sst2/bitfit", 1.0)]
    {
        let model = model(&Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("models/paper/{spec}.peft")));
        let bytes = |without: &[&str]| {
            let without = without.iter().map(|name| name.to_string()).collect();
            let costs = peftc::costs::costs(&model, &Options { without, ..Options::default() }, None);
            costs.unwrap_or_else(|e| panic!("{spec}: {e}")).activation_bytes_per_token
        };
        let (made_again, kept) = (bytes(&[]), bytes(&["remat"]));
        assert!(made_again <= share * kept, "{spec}: {made_again:.0} bytes a token, {kept:.0} when all is kept");
    }
}

/// The memory of attention grows with the number of tokens, not with the number of token pairs, for every method.
#[test]
fn no_buffer_grows_with_token_pairs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dialect = Dialect::new().expect("a dialect");
    let mut specs = 0;
    for folder in ["models/paper/webnlg", "models/paper/sst2", "tests/ir", "tests/specs/good"] {
        let entries = std::fs::read_dir(root.join(folder)).expect("a folder").map(|e| e.expect("an entry").path());
        for path in entries.filter(|p| p.extension().is_some_and(|e| e == "peft")) {
            assert_eq!(pair_buffers(&dialect, &path, &[]), 0, "{}", path.display());
            specs += 1;
        }
    }
    assert!(specs > 30, "{specs} specs");
    // Without these fusion rules a buffer does grow.
    for rule in ["split_softmax", "attention"] {
        assert!(pair_buffers(&dialect, &root.join("tests/ir/prefix.peft"), &[rule]) > 0, "without {rule}");
    }
}

/// The README shows the inducer's site before and after fusion, and the launches that compute it. Each block names its
/// command in the first line, and its lines stand in that command's output, in this order.
#[test]
fn readme_shows_the_fusion_of_the_inducer() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).expect("readable");
    let bench = Bench::new();
    let mut outputs = std::collections::HashMap::new();
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    for block in readme.split("```").skip(1).step_by(2) {
        let mut lines = block.lines().skip(1);
        let Some(command) = lines.next().and_then(|first| first.strip_prefix("// peftc ")) else { continue };
        let stage = command.split_whitespace().skip_while(|word| *word != "--emit").nth(1).expect("a stage");
        let ran = bench.peftc(command.split_whitespace());
        assert_eq!(ran.code, 0, "{}", ran.err);
        let printed: Vec<String> = ran.out.lines().map(words).collect();
        let mut rest = &printed[..];
        for line in lines {
            let at = rest.iter().position(|printed| printed.starts_with(&words(line)));
            let at = at.unwrap_or_else(|| panic!("`peftc {command}` does not print `{line}` there:\n{}", ran.out));
            rest = &rest[at + 1..];
        }
        outputs.insert(stage.to_string(), ran.out);
    }
    let count = |stage: &str, op: &str| outputs[stage].matches(&format!("\"peft.{op}\"")).count();
    // Before: the backbone's softmax and the inducer's, over scores that are there.
    assert_eq!((count("peft", "softmax"), count("peft", "scores"), count("peft", "concat")), (2, 1, 1));
    // After: none of them.
    for op in ["softmax", "scores", "concat", "attend"] {
        assert_eq!(count("fused", op), 0, "peft.{op}");
    }
    assert_eq!(count("fused", "attention_and_lse"), 1);
    // No launch is left for the residual `x` alone: the one that computes it also computes a product.
    let launches = outputs["kernels"].split("\n").collect::<Vec<_>>();
    let is_operation = |line: &&str| line.starts_with("       ");
    let launches: Vec<&[&str]> = launches.split(|line| !is_operation(line)).collect();
    let computes = |launch: &&&[&str], what: &str| launch.iter().any(|line| line.trim_start().starts_with(what));
    let residual = launches.iter().find(|launch| computes(launch, "x = add ")).expect("a residual");
    assert!(computes(&residual, "matmul "), "{residual:?}");
}
