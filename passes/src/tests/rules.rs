//! Snapshot tests of single rules: each function of `rules/RULE.mlir` is rewritten by that rule alone.

use std::collections::BTreeSet;

use super::fusion::assert_same_on;
use super::samples::arguments;
use peft_grammar::graph::Graph;

use crate::dialect::Dialect;
use crate::fuse::Thresholds;
use crate::interpret::Batch;
use crate::lower::tests::{compare, cuda, launches};
use crate::pipeline::{self, Context, rules};
use crate::target::cpu::Cpu;
use crate::target::cuda::Chip;

/// Thresholds low enough for these small cases.
fn thresholds() -> Thresholds {
    Thresholds { min_chunked_vocab: 8, max_kept_floats_per_op: 0.05, ..Thresholds::default() }
}

const LENGTHS: [usize; 3] = [5, 1, 3];

/// The text of `graph` without and with the rule, after a check that both compute the same.
fn without_and_with(dialect: &Dialect, rule: &str, graph: &Graph) -> [String; 2] {
    if rule == "epilogue" {
        compare(&[(graph.clone(), LENGTHS.to_vec())], Cpu::Native, 2, 2e-6);
        cuda::compare(&[(graph.clone(), LENGTHS.to_vec())], Chip::Sm70, 2, 2e-6);
        return [false, true].map(|epilogues| launches(graph, epilogues));
    }
    let apply = |pass: &str| {
        let mut context = Context { without: vec![], thresholds: thresholds(), savings: vec![] };
        pipeline::apply(pass, graph, &mut context).expect("well-formed")
    };
    // Without the rule, common subexpressions are merged and dead operations are removed all the same.
    let (before, after) = (apply("canonicalize"), apply(rule));
    let batch = Batch::new(&LENGTHS, 4);
    assert_same_on(rule, &before, &after, &batch, &arguments(&before, &batch, 3, 9));
    [before, after].map(|graph| dialect.print(&[&graph]).expect("valid"))
}

#[test]
fn every_rule_by_itself() {
    let dialect = Dialect::new().expect("a dialect");
    let mut shown = BTreeSet::new();
    insta::glob!("rules", "*.mlir", |path| {
        let rule = path.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_string();
        assert!(rules().contains(&&rule[..]), "no rule is called `{rule}`");
        let graphs = dialect.read(&std::fs::read_to_string(path).expect("readable")).unwrap_or_else(|e| panic!("{e}"));
        let shows = graphs.iter().map(|graph| {
            let [without, with] = without_and_with(&dialect, &rule, graph);
            assert_ne!(without, with, "`{rule}` does not change `{}`", graph.name);
            format!("// without `{rule}`\n{without}\n// with `{rule}`\n{with}")
        });
        insta::assert_snapshot!(shows.collect::<Vec<_>>().join("\n"));
        shown.insert(rule);
    });
    let missing: Vec<&str> = rules().into_iter().filter(|rule| !shown.contains(*rule)).collect();
    assert!(missing.is_empty(), "no case in `rules/` for {missing:?}");
}
