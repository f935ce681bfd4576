//! Graph fusion: rewrite rules that make a graph cheaper and keep its results. Each rule has a file, which begins with
//! the algebra that the rule applies.

mod attention;
mod broadcast;
mod causal_mask;
mod chunked_logits;
mod concat_gradients;
mod gather_pushdown;
mod scale;
mod split_softmax;

use peft_grammar::graph::{Graph, Op, Value};

use crate::rewrite::{Rewriter, rewrite};

/// A rewrite of one operation: receives the operation and its operands in the new graph, and returns a cheaper value
/// for its result, or `None` where the rule does not apply.
type OperationRule = fn(&mut Rewriter, &Op, &[Value], &Thresholds) -> Result<Option<Value>, String>;

/// A fusion rule, by the part of the graph that it examines.
pub enum Rule {
    /// A rule that examines one operation and the producers of its operands.
    Operation(OperationRule),
    /// A rule that examines the whole graph, because it depends on the consumers of a value.
    Graph(fn(&Graph) -> Result<Graph, String>),
}

use Rule::Operation;

/// Sizes from which a rewrite or a kernel variant pays off. Tests lower them so that small models take the same paths.
#[derive(Clone, Copy, Debug)]
pub struct Thresholds {
    /// Rows of a frozen output embedding from which `chunked_logits` applies. Fewer logits stay in the cache between
    /// their producer and their consumers, and the few columns of a classifier are computed in one launch.
    pub min_chunked_vocab: u64,
    /// How much memory `remat` keeps occupied to save one arithmetic operation, in floats times operations of the graph
    /// over which they stay alive. A value that occupies more than this per operation of its recomputation is
    /// recomputed.
    pub max_kept_floats_per_op: f64,
    /// Rows of the vocabulary per chunk of logits in `chunked_logits`.
    pub vocab_chunk: u64,
    /// Length of the reduction axis (k) from which a GPU's skinny gemm splits k over the lanes of each warp. The result
    /// of such a product has few columns, as the down-projection of an adapter does.
    pub min_split_k_depth: u64,
    /// Columns of a bf16 product from which its tensor-core tiles are the taller ones.
    pub min_large_tile_columns: u64,
    /// Number of independent launches that horizontal fusion merges into one GPU launch, at most.
    pub max_merged_launches: usize,
}

impl Default for Thresholds {
    fn default() -> Self {
        Thresholds {
            min_chunked_vocab: 4096,
            max_kept_floats_per_op: 1.0,
            vocab_chunk: 4096,
            min_split_k_depth: 512,
            min_large_tile_columns: 1025,
            max_merged_launches: 16,
        }
    }
}

impl Thresholds {
    /// The thresholds of rules that rewrite graphs, as [`Thresholds::set`] names them. The others are the lowering's.
    pub const NAMES: [&str; 3] = ["min_chunked_vocab", "max_kept_floats_per_op", "vocab_chunk"];

    /// Sets a threshold by its name.
    ///
    /// # Errors
    /// A name that [`Thresholds::NAMES`] lacks, and a value that is no number of the threshold's kind.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let rows = || match value.parse() {
            Ok(0) | Err(_) => Err(format!("`{name}` is a whole number of at least 1, found `{value}`")),
            Ok(rows) => Ok(rows),
        };
        match name {
            "min_chunked_vocab" => self.min_chunked_vocab = rows()?,
            "vocab_chunk" => self.vocab_chunk = rows()?,
            "max_kept_floats_per_op" => {
                let floats = value.parse().ok().filter(|floats: &f64| floats.is_finite() && *floats > 0.0);
                let wrong = || format!("`{name}` is a number above 0, found `{value}`");
                self.max_kept_floats_per_op = floats.ok_or_else(wrong)?;
            }
            _ => return Err(format!("no threshold is called `{name}`; there are {}", Thresholds::NAMES.join(", "))),
        }
        Ok(())
    }
}

/// A rule with its name and its description.
type NamedRule = (&'static str, &'static str, Rule);

/// Every fusion rule: the name that `--no-fuse=NAME` takes, a description, and the rule. An operation is rewritten by
/// the first rule in this order that applies.
pub const RULES: &[NamedRule] = &[
    (
        "gather_pushdown",
        "push gathers of rows above the operations that produce them",
        Rule::Graph(gather_pushdown::apply),
    ),
    (
        "causal_mask",
        "skip the masked half of the score matrix in products with causal attention weights",
        Operation(causal_mask::apply),
    ),
    (
        "split_softmax",
        "split a softmax over concatenated scores into one softmax for each part and the weight between them",
        Operation(split_softmax::apply),
    ),
    (
        "attention",
        "fuse scores, softmax, dropout and the product with the values, so that no score matrix is materialised",
        Operation(attention::apply),
    ),
    (
        "chunked_logits",
        "compute the cross-entropy of a large vocabulary chunk by chunk, without materialising the logits",
        Operation(chunked_logits::apply),
    ),
    (
        "broadcast",
        "drop explicit broadcasts before elementwise operations that broadcast implicitly",
        Operation(broadcast::apply),
    ),
    (
        "scale",
        "move constant factors from an operand of a product or a sum to the smaller tensor",
        Operation(scale::apply),
    ),
    (
        "concat_gradients",
        "concatenate the gradients of slices instead of adding zero-padded tensors",
        Operation(concat_gradients::apply),
    ),
];

/// Rounds within which the rules have to reach a fixed point. Rules that still change the graph afterwards are taken to
/// never terminate.
const MAX_ROUNDS: usize = 8;

/// Applies every rule whose name `enabled` accepts until the graph no longer changes.
///
/// # Errors
/// A rule builds an operation that does not fit its operands, or the rules reach no fixed point. Both are faults of the
/// compiler; the second error names the rules.
pub fn fuse(graph: &Graph, enabled: impl Fn(&str) -> bool, thresholds: &Thresholds) -> Result<Graph, String> {
    let rules: Vec<&NamedRule> = RULES.iter().filter(|(name, ..)| enabled(name)).collect();
    to_fixed_point(graph, &rules, thresholds)
}

fn to_fixed_point(graph: &Graph, rules: &[&NamedRule], thresholds: &Thresholds) -> Result<Graph, String> {
    let mut graph = graph.clone();
    for _ in 0..MAX_ROUNDS {
        let next = round(&graph, rules, thresholds)?;
        if next == graph {
            return Ok(graph);
        }
        graph = next;
    }
    let rebuilt = round(&graph, &[], thresholds)?;
    let mut unstable = vec![];
    for rule in rules {
        if round(&graph, &[rule], thresholds)? != rebuilt {
            unstable.push(format!("`{}`", rule.0));
        }
    }
    let name = &graph.name;
    let cause = match &unstable[..] {
        [] => "the rules undo one another".to_string(),
        rules => format!("the graph is still changed by {}", rules.join(", ")),
    };
    Err(format!("fusion of `{name}` reaches no fixed point: after {MAX_ROUNDS} rounds {cause}"))
}

/// Applies each rule once to every operation.
fn round(graph: &Graph, rules: &[&NamedRule], thresholds: &Thresholds) -> Result<Graph, String> {
    let mut next = graph.clone();
    for (.., rule) in rules {
        if let Rule::Graph(rule) = rule {
            next = rule(&next)?;
        }
    }
    rewrite(&next, |new, op, operands| {
        for (name, _, rule) in rules {
            if let Operation(rule) = rule {
                new.set_rule(name);
                if let Some(value) = rule(new, op, operands, thresholds)? {
                    return Ok(Some(value));
                }
            }
        }
        Ok(None)
    })
}

#[cfg(test)]
mod tests {
    use peft_grammar::graph::{Dim, Location, Role, Type};

    use super::*;

    fn flip_sign(new: &mut Rewriter, op: &Op, operands: &[Value], _: &Thresholds) -> Result<Option<Value>, String> {
        let Op::Scale { by } = op else { return Ok(None) };
        new.op(Op::Scale { by: -by }, operands).map(Some)
    }

    #[test]
    fn an_error_names_the_rule_that_never_terminates() {
        let mut graph = Graph::new("forward");
        let x = graph.arg("x", Role::Input, None, Type::f32([Dim::Const(3)]));
        let y = graph.push(Op::Scale { by: 2.0 }, &[x], &Location::default()).expect("it fits");
        graph.outputs.push(("y".into(), y));
        let flip_sign: NamedRule = ("flip_sign", "negate a factor in every round", Operation(flip_sign));
        let rules: Vec<&NamedRule> = RULES.iter().chain([&flip_sign]).collect();
        let error = to_fixed_point(&graph, &rules, &Thresholds::default()).expect_err("never terminates");
        assert_eq!(
            error,
            "fusion of `forward` reaches no fixed point: after 8 rounds the graph is still changed by `flip_sign`"
        );
        assert!(to_fixed_point(&graph, &rules[..RULES.len()], &Thresholds::default()).is_ok());
    }
}
