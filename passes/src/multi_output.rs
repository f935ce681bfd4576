//! Multi-output fusion: merges sibling operations, which compute several results from the same operands in one kernel,
//! into one operation of several results. It is the last pass over the graph, so all other passes see only operations
//! of one result.
//!
//! ```text
//! attention(q, k, v, rng), attention_lse(q, k)         =>  attention_and_lse(q, k, v, rng)
//! attention_vjp 1 and 2 of (q, k, v, lse, df, r, rng)  =>  attention_vjp_sides(q, k, v, lse, df, r, rng)
//! attention_vjp 0, 1 and 2 of these operands           =>  attention_vjp_all(q, k, v, lse, df, r, rng)
//! linear_lse(x, W), linear_mean(x, W)                  =>  linear_lse_and_mean(x, W)
//! ```
//!
//! The merged node takes the position of the first of its components that reads all of its operands. No operation
//! before that position may read the result of another component.

use std::collections::{HashMap, HashSet};

use peft_grammar::graph::{Graph, Node, Op, Value};

/// Returns `graph` with sibling operations merged.
///
/// # Errors
/// Operands do not fit an operation, which a verified graph excludes.
pub fn merge_siblings(graph: &Graph) -> Result<Graph, String> {
    let merges = find_merges(graph);
    let merged: HashSet<usize> = merges.values().flat_map(|merge| merge.components.iter().copied()).collect();
    let mut new = Graph::new(graph.name.clone());
    let mut map = vec![Value(0); graph.value_count()];
    for arg in &graph.args {
        map[arg.value.0 as usize] = new.arg(arg.name.clone(), arg.role, arg.rows, graph.ty(arg.value).clone());
    }
    for (at, node) in graph.nodes.iter().enumerate() {
        let (op, results) = match merges.get(&at) {
            Some(Merge { op, components }) => (op, components.iter().map(|&at| graph.nodes[at].result()).collect()),
            None if merged.contains(&at) => continue,
            None => (&node.op, node.results.clone()),
        };
        let operands: Vec<Value> = node.operands.iter().map(|v| map[v.0 as usize]).collect();
        let made = new.push_node(op.clone(), &operands, &node.location)?;
        results.iter().zip(&made.results).for_each(|(old, new)| map[old.0 as usize] = *new);
    }
    new.outputs = graph.outputs.iter().map(|(name, v)| (name.clone(), map[v.0 as usize])).collect();
    Ok(new)
}

/// Sibling nodes that are merged into one node of the operation `op`.
struct Merge {
    op: Op,
    /// The positions of the sibling nodes, in the order of the results of `op`.
    components: Vec<usize>,
}

/// All merges, by the position that the merged node takes.
fn find_merges(graph: &Graph) -> HashMap<usize, Merge> {
    let mut first_read = vec![graph.nodes.len(); graph.value_count()];
    for (at, node) in graph.nodes.iter().enumerate().rev() {
        node.operands.iter().for_each(|v| first_read[v.0 as usize] = at);
    }
    let (mut merges, mut taken) = (HashMap::new(), HashSet::new());
    for (at, node) in graph.nodes.iter().enumerate() {
        for op in candidates(&node.op) {
            let Some(components) = find_components(graph, at, &op) else { continue };
            // Results that do not depend on the batch may be computed once from frozen weights, each under its own
            // name, so they stay separate.
            let free = |&at: &usize| !taken.contains(&at) && graph.ty(graph.nodes[at].result()).elements().is_none();
            let read_later = |&other: &usize| first_read[graph.nodes[other].result().0 as usize] > at;
            if components.iter().all(|component| free(component) && read_later(component)) {
                taken.extend(components.iter().copied());
                merges.insert(at, Merge { op, components });
            }
        }
    }
    merges
}

/// The operations of several results of which `op`, reading all of their operands, may be a component; those with most
/// results first.
fn candidates(op: &Op) -> Vec<Op> {
    match *op {
        Op::Attention { causal, scale, p, stream, column } => {
            vec![Op::AttentionAndLse { causal, scale, p, stream, column }]
        }
        Op::AttentionVjp { of: 0, causal, scale, p, stream, column } => {
            vec![Op::AttentionVjpAll { causal, scale, p, stream, column }]
        }
        Op::AttentionVjp { of: 1, causal, scale, p, stream, column } => vec![
            Op::AttentionVjpAll { causal, scale, p, stream, column },
            Op::AttentionVjpSides { causal, scale, p, stream, column },
        ],
        Op::LinearLse | Op::LinearMean => vec![Op::LinearLseAndMean],
        _ => vec![],
    }
}

/// The nodes that compute the components of `merged` on the operands of the node at `at`, if the graph has all of them
/// and the node at `at` is among them.
fn find_components(graph: &Graph, at: usize, merged: &Op) -> Option<Vec<usize>> {
    let operands = &graph.nodes[at].operands;
    let find = |component: &Op| graph.nodes.iter().position(|node| node.op == *component && reads(node, operands));
    let found = merged.components().iter().map(find).collect::<Option<Vec<usize>>>();
    found.filter(|components| components.contains(&at))
}

/// Whether the node reads the operands that its component of a merged node on `operands` reads.
fn reads(node: &Node, operands: &[Value]) -> bool {
    // The adjoint of the values depends neither on the values (2) nor on the row terms (5).
    let unused = |i: usize| matches!(node.op, Op::AttentionVjp { of: 2, .. }) && matches!(i, 2 | 5);
    let own = node.op.component_operands(operands);
    own.len() == node.operands.len() && (0..own.len()).all(|i| unused(i) || own[i] == node.operands[i])
}
