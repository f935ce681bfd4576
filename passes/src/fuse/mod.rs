//! Fusion: rules that make a graph cheaper and leave its meaning alone. A rule is a file.

mod attention;
mod broadcast;
mod columns;
mod head;
mod joint;
mod rows;
mod scale;
mod triangle;

use peft_grammar::graph::{Graph, Op, Value};

use crate::rewrite::{Rewriter, rewrite};

/// Of an operation with its operands, perhaps a better value.
type Better = fn(&mut Rewriter, &Op, &[Value], &Limits) -> Result<Option<Value>, String>;

/// What a rule looks at.
pub enum Rule {
    Operation(Better),
    /// Where it matters who reads a value.
    Graph(fn(&Graph) -> Result<Graph, String>),
}

use Rule::Operation;

/// Sizes from which on a rule pays, or another kernel.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Rows of a weight from which on `head` sweeps it. Logits of fewer stay in the cache between what reads them, and
    /// a classifier's few columns are one launch.
    pub wide: u64,
    /// Floats kept for the length of an operation that `remat` takes one of its own for.
    pub keep: f64,
    /// Columns of a vocabulary that `head` sweeps at a time.
    pub block: u64,
    /// Steps of a product into a bottleneck from which on the lanes of a GPU's warps share them.
    pub deep: u64,
    /// Columns of a product from which on its tiles in tensor cores are large.
    pub many: u64,
    /// Launches that a GPU takes side by side in one, at most.
    pub beside: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { wide: 4096, keep: 1.0, block: 4096, deep: 512, many: 1025, beside: 16 }
    }
}

/// A rule with its name and what it does.
type Named = (&'static str, &'static str, Rule);

/// Every rule by the name that `--no-fuse=NAME` takes, with what it does.
pub const RULES: &[Named] = &[
    ("rows", "work on the rows that are read, not on all of them", Rule::Graph(rows::apply)),
    ("triangle", "attention to earlier tokens does not read later ones", Operation(triangle::apply)),
    ("joint", "a softmax over scores with columns in front is one of each part", Operation(joint::apply)),
    ("attention", "scores, softmax and dropout are not written down", Operation(attention::apply)),
    ("head", "logits of a large vocabulary are not written down", Operation(head::apply)),
    ("broadcast", "what operations repeat by themselves is not repeated before", Operation(broadcast::apply)),
    ("scale", "numbers multiply what is narrow", Operation(scale::apply)),
    ("columns", "gradients of slices are laid side by side instead of added up", Operation(columns::apply)),
];

/// Rounds after which rules that still change something are taken to do so for ever.
const MOST_ROUNDS: usize = 8;

/// Applies every rule that `enabled` lets through, until nothing changes.
pub fn fuse(graph: &Graph, enabled: impl Fn(&str) -> bool, limits: &Limits) -> Result<Graph, String> {
    let rules: Vec<&Named> = RULES.iter().filter(|(name, ..)| enabled(name)).collect();
    settled(graph, &rules, limits)
}

fn settled(graph: &Graph, rules: &[&Named], limits: &Limits) -> Result<Graph, String> {
    let mut graph = graph.clone();
    for _ in 0..MOST_ROUNDS {
        let next = round(&graph, rules, limits)?;
        if next == graph {
            return Ok(graph);
        }
        graph = next;
    }
    let rebuilt = round(&graph, &[], limits)?;
    let mut restless = vec![];
    for rule in rules {
        if round(&graph, &[rule], limits)? != rebuilt {
            restless.push(format!("`{}`", rule.0));
        }
    }
    let name = &graph.name;
    Err(match &restless[..] {
        [] => format!("fusion of `{name}` does not settle: after {MOST_ROUNDS} rounds rules still undo one another"),
        rules => {
            let rules = rules.join(", ");
            format!("fusion of `{name}` does not settle: after {MOST_ROUNDS} rounds it is still changed by {rules}")
        }
    })
}

/// Applies each of the rules once everywhere.
fn round(graph: &Graph, rules: &[&Named], limits: &Limits) -> Result<Graph, String> {
    let mut next = graph.clone();
    for (.., rule) in rules {
        if let Rule::Graph(rule) = rule {
            next = rule(&next)?;
        }
    }
    rewrite(&next, |new, op, operands| {
        for (.., rule) in rules {
            if let Operation(rule) = rule
                && let Some(value) = rule(new, op, operands, limits)?
            {
                return Ok(Some(value));
            }
        }
        Ok(None)
    })
}

#[cfg(test)]
mod tests {
    use peft_grammar::graph::{Dim, Location, Role, Type};

    use super::*;

    fn turn(new: &mut Rewriter, op: &Op, operands: &[Value], _: &Limits) -> Result<Option<Value>, String> {
        let Op::Scale { by } = op else { return Ok(None) };
        new.op(Op::Scale { by: -by }, operands).map(Some)
    }

    #[test]
    fn a_rule_without_end_is_named() {
        let mut graph = Graph::new("forward");
        let x = graph.arg("x", Role::Input, None, Type::f32([Dim::Const(3)]));
        let y = graph.push(Op::Scale { by: 2.0 }, &[x], &Location::default()).expect("it fits");
        graph.outputs.push(("y".into(), y));
        let turn: Named = ("turn", "a number and its negative, in turns", Operation(turn));
        let rules: Vec<&Named> = RULES.iter().chain([&turn]).collect();
        let error = settled(&graph, &rules, &Limits::default()).expect_err("without end");
        assert_eq!(error, "fusion of `forward` does not settle: after 8 rounds it is still changed by `turn`");
        assert!(settled(&graph, &rules[..RULES.len()], &Limits::default()).is_ok());
    }
}
