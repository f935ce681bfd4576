//! `peftc opt`: passes over the dialect's text.

use std::fs;
use std::path::{Path, PathBuf};

use peft_passes::dialect::Dialect;
use peft_passes::pipeline::{self, Entry, Options, Stage};

use super::cli::{Bench, text};

/// The specs in a folder and its folders.
fn specs(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            specs(&path, found);
        } else if path.extension().is_some_and(|e| e == "peft") {
            found.push(path);
        }
    }
}

/// The text of each stage is what the dialect prints of the graphs that it reads from that text. The specs have two of
/// their layers: the others are alike.
#[test]
fn every_stage_of_every_spec_is_read_and_printed_unchanged() {
    let dialect = Dialect::new().expect("a dialect");
    let mut paths = vec![];
    for folder in ["models/paper", "models/demo"] {
        specs(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &mut paths);
    }
    assert!(paths.len() > 30, "{} specs", paths.len());
    for path in paths {
        let set = [("model.layers".to_string(), "2".to_string())];
        let model = peftc::spec::load(&path, &set, false).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        for stage in [Stage::Peft, Stage::Grad, Stage::Fused] {
            let options = Options { until: stage, ..Options::default() };
            let compiled = pipeline::run(&dialect, &model, &[Entry::Train, Entry::Forward], &options);
            let compiled = compiled.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            for locations in [false, true] {
                let print = |graphs: &[_]| {
                    let graphs: Vec<_> = graphs.iter().collect();
                    let text = if locations { dialect.print_with_locations(&graphs) } else { dialect.print(&graphs) };
                    text.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
                };
                let text = print(&compiled.graphs);
                let read = dialect.read(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                assert_eq!(print(&read), text, "{}", path.display());
                for (read, graph) in read.iter().zip(&compiled.graphs).filter(|_| locations) {
                    // With locations nothing is lost but the site of an operation without one, and equal names get
                    // numbers.
                    let of = |graph: &peft_grammar::graph::Graph| {
                        let parts = graph.nodes.iter().map(|node| (node.op.clone(), node.location.clone()));
                        parts.map(|(op, at)| (op, at.file, at.line, at.column, at.site, at.rule)).collect::<Vec<_>>()
                    };
                    assert!(of(read) == of(graph), "{}", path.display());
                }
            }
        }
    }
}

/// The program does to the text of a stage what the pipeline does between the stages. With locations the text also holds
/// the sites of unnamed values, from which adjoints take theirs.
#[test]
fn passes_by_name_lead_from_stage_to_stage() {
    let bench = Bench::new();
    let spec = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ir/inducer.peft");
    let emit = |stage: &str| {
        let out = bench.path(&format!("{stage}.mlir"));
        let ran =
            bench.peftc(["compile", text(&spec), "--emit", stage, "--locations", "-o", text(&out), "--overwrite"]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        out
    };
    let (peft, grad, fused) = (emit("peft"), emit("grad"), emit("fused"));
    for (from, passes, to) in [(&peft, "partition,grad", &grad), (&grad, "fuse,remat,multi_output", &fused)] {
        let ran = bench.peftc(["opt", text(from), "--passes", passes, "--timings", "--locations"]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        assert_eq!(ran.out.trim_end(), fs::read_to_string(to).expect("written").trim_end());
        for pass in passes.split(',') {
            assert!(ran.err.lines().any(|line| line.starts_with(pass) && line.ends_with(" ms")), "{}", ran.err);
        }
    }
}

#[test]
fn passes_are_listed_and_damaged_text_is_refused_with_its_place() {
    let bench = Bench::new();
    let ran = bench.peftc(["opt", "--list"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    for (name, description) in pipeline::pass_names() {
        assert!(ran.out.lines().any(|line| line.starts_with(name) && line.ends_with(description)), "{}", ran.out);
    }
    let sum = "module {\n  func.func @f(%x: tensor<3xf32> {peft.name = \"x\", peft.role = \"input\"}) -> \
               (tensor<3xf32> {peft.name = \"y\"}) {\n    %y = \"peft.add\"(%x, %x) : (tensor<3xf32>, tensor<3xf32>) -> \
               tensor<3xf32>\n    return %y : tensor<3xf32>\n  }\n}\n";
    let good = bench.write("good.mlir", sum);
    let ran = bench.peftc(["opt", text(&good), "--verify"]);
    assert_eq!((ran.code, &*ran.out), (0, ""), "{}", ran.err);
    let ran = bench.peftc(["opt", text(&good), "--passes", "canonicalize"]);
    assert_eq!((ran.code, ran.out.trim_end()), (0, sum.trim_end()), "{}", ran.err);
    let damaged: [(&str, &str, &str, &[&str]); 5] = [
        ("cut.mlir", sum, &sum[..150], &["cut.mlir", ":3:"]),
        ("operand.mlir", "(%x, %x)", "(%x, %z)", &["operand.mlir", ":3:", "undeclared SSA value"]),
        ("name.mlir", "peft.add", "peft.plus", &["name.mlir", ":3:", "peft.plus"]),
        (
            "type.mlir",
            "-> tensor<3xf32>\n    return %y : tensor<3xf32>",
            "-> tensor<4xf32>\n    return %y : tensor<4xf32>",
            &["type.mlir", ":4:", "tensor<4xf32>"],
        ),
        ("role.mlir", "\"input\"", "\"guest\"", &["role.mlir", "peft.role"]),
    ];
    for (name, from, to, words) in damaged {
        let path = bench.write(name, sum.replace(from, to));
        bench.refuses(&["opt", text(&path), "--verify"], 3, words);
    }
    bench.refuses(&["opt", text(&good), "--passes", "fuze"], 2, &["`fuse`"]);
    bench.refuses(&["opt", text(&good), "--threshold", "min_chunked_vocab=0"], 2, &["min_chunked_vocab"]);
    bench.refuses(&["opt", "nowhere.mlir"], 3, &["nowhere.mlir"]);
    bench.refuses(&["opt"], 2, &["FILE"]);
}
