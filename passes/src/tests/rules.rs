//! Every rule at work by itself: each function of `rules/RULE.mlir` goes through that rule alone.

use std::collections::BTreeSet;

use super::fusion::assert_same_on;
use super::samples::arguments;
use peft_grammar::graph::Graph;

use crate::dialect::Dialect;
use crate::fuse::{Limits, fuse};
use crate::interpret::Batch;
use crate::lower::tests::{compare, cuda, launches};
use crate::pipeline::rules;
use crate::remat::remat;
use crate::target::cpu::Cpu;
use crate::target::cuda::Chip;

/// Low enough for cases as small as these.
fn limits() -> Limits {
    Limits { wide: 8, keep: 0.05, ..Limits::default() }
}

const LENGTHS: [usize; 3] = [5, 1, 3];

/// `graph` without the rule and with it, which give the same.
fn forms(dialect: &Dialect, rule: &str, graph: &Graph) -> [String; 2] {
    if rule == "epilogue" {
        compare(&[(graph.clone(), LENGTHS.to_vec())], Cpu::Native, 2, 2e-6);
        cuda::compare(&[(graph.clone(), LENGTHS.to_vec())], Chip::Sm70, 2, 2e-6);
        return [false, true].map(|joined| launches(graph, joined));
    }
    // Equal parts are one and what no one reads is gone in either.
    let before = fuse(graph, |_| false, &limits()).expect("rebuilt");
    let after = match rule {
        "remat" => remat(&before, &limits()).map(|(after, _)| after),
        _ => fuse(graph, |name| name == rule, &limits()),
    };
    let (after, batch) = (after.expect("well-formed"), Batch::new(&LENGTHS, 4));
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
            let [without, with] = forms(&dialect, &rule, graph);
            assert_ne!(without, with, "`{rule}` does nothing to `{}`", graph.name);
            format!("// without `{rule}`\n{without}\n// with `{rule}`\n{with}")
        });
        insta::assert_snapshot!(shows.collect::<Vec<_>>().join("\n"));
        shown.insert(rule);
    });
    let missing: Vec<&str> = rules().into_iter().filter(|rule| !shown.contains(*rule)).collect();
    assert!(missing.is_empty(), "no case shows {missing:?}");
}
