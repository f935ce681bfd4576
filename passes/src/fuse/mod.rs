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

/// Every rule by the name that `--no-fuse=NAME` takes, with what it does.
pub const RULES: &[(&str, &str, Rule)] = &[
    ("rows", "work on the rows that are read, not on all of them", Rule::Graph(rows::apply)),
    ("triangle", "attention to earlier tokens does not read later ones", Operation(triangle::apply)),
    ("joint", "a softmax over scores with columns in front is one of each part", Operation(joint::apply)),
    ("attention", "scores, softmax and dropout are not written down", Operation(attention::apply)),
    ("head", "logits of a large vocabulary are not written down", Operation(head::apply)),
    ("broadcast", "what operations repeat by themselves is not repeated before", Operation(broadcast::apply)),
    ("scale", "numbers multiply what is narrow", Operation(scale::apply)),
    ("columns", "gradients of slices are laid side by side instead of added up", Operation(columns::apply)),
];

/// Applies every rule that `enabled` lets through, until nothing changes.
pub fn fuse(graph: &Graph, enabled: impl Fn(&str) -> bool, limits: &Limits) -> Result<Graph, String> {
    let mut graph = graph.clone();
    let rules = || RULES.iter().filter(|(name, ..)| enabled(name)).map(|(_, _, rule)| rule);
    for _ in 0..8 {
        let mut next = graph.clone();
        for rule in rules() {
            if let Rule::Graph(rule) = rule {
                next = rule(&next)?;
            }
        }
        next = rewrite(&next, |new, op, operands| {
            for rule in rules() {
                if let Operation(rule) = rule
                    && let Some(value) = rule(new, op, operands, limits)?
                {
                    return Ok(Some(value));
                }
            }
            Ok(None)
        })?;
        if next == graph {
            break;
        }
        graph = next;
    }
    Ok(graph)
}
