//! The stages as text: each one reads back, and those of small specs (`tests/ir`) are on record.

use std::path::Path;

use peft_grammar::graph::{Op, Role};
use peft_grammar::model::Model;
use peft_passes::codegen;
use peft_passes::dialect::Dialect;
use peft_passes::pipeline::{self, Entry, Options, Stage};
use peft_runtime::artifact::{Buffer, Sizes};

fn model(path: &Path) -> Model {
    peftc::spec::load(path, &[], false).unwrap_or_else(|e| panic!("{e}"))
}

fn emitted(dialect: &Dialect, model: &Model, stage: Stage) -> String {
    let options = Options { until: stage, ..Options::default() };
    let compiled = pipeline::run(dialect, model, &[Entry::Train], &options).unwrap_or_else(|e| panic!("{e}"));
    pipeline::emit(dialect, &compiled, stage, false).unwrap_or_else(|e| panic!("{e}"))
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
fn every_stage_reads_back() {
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
            assert_eq!(codegen::read(&dialect, &text).expect("a module"), text);
        }
    }
}

/// Law: gradients only where something trains. With widths that no two tensors share, a frozen weight's
/// gradient would be the only value of its shape.
#[test]
fn nothing_is_computed_for_frozen_weights() {
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
    // Below the lowest trainable value nothing is differentiated: the lower layer has no backward pass.
    let backward = |layer: &str| {
        let first = frozen.iter().filter(|a| a.name.contains(layer)).map(|a| a.value).collect::<Vec<_>>();
        graph.nodes.iter().filter(|n| n.operands.iter().any(|v| first.contains(v))).count()
    };
    assert!(backward(".h.0.") < backward(".h.1."), "{} and {}", backward(".h.0."), backward(".h.1."));
}

/// Buffers of the training step whose size hangs on pairs of tokens.
fn squares(dialect: &Dialect, path: &Path, without: &[&str]) -> usize {
    let without = without.iter().map(|name| name.to_string()).collect();
    let options = Options { until: Stage::Loops, without, ..Options::default() };
    let compiled = pipeline::run(dialect, &model(path), &[Entry::Train], &options);
    let lowered = compiled.unwrap_or_else(|e| panic!("{}: {e}", path.display())).lowered.expect("loops");
    let sizes = |pairs| Sizes { tokens: 4, sequences: 2, targets: 1, pairs, values: 1 };
    let grows = |buffer: &&Buffer| buffer.elements(&sizes(8)) != buffer.elements(&sizes(9));
    lowered.manifest.buffers.iter().filter(grows).count()
}

/// What is made again in the backward pass is not kept for it: the more, the more weights train.
#[test]
fn making_values_again_takes_less_memory() {
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

/// Law: attention costs memory that grows with the tokens, never with their pairs, whatever a method adds to it.
#[test]
fn no_buffer_grows_with_pairs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dialect = Dialect::new().expect("a dialect");
    let mut specs = 0;
    for folder in ["models/paper/webnlg", "models/paper/sst2", "tests/ir", "tests/specs/good"] {
        let entries = std::fs::read_dir(root.join(folder)).expect("a folder").map(|e| e.expect("an entry").path());
        for path in entries.filter(|p| p.extension().is_some_and(|e| e == "peft")) {
            assert_eq!(squares(&dialect, &path, &[]), 0, "{}", path.display());
            specs += 1;
        }
    }
    assert!(specs > 30, "{specs} specs");
    // It is the rules that see to it.
    for rule in ["joint", "attention"] {
        assert!(squares(&dialect, &root.join("tests/ir/prefix.peft"), &[rule]) > 0, "without {rule}");
    }
}
