//! What one kernel computes is one node: operations that make several things of the same numbers are joined. This is
//! the last of the passes, so that all others have operations of one result before them.
//!
//! ```text
//! attention(q, k, v, rng), attention_lse(q, k)         =>  attention_and_lse(q, k, v, rng)
//! attention_vjp 1 and 2 of (q, k, v, lse, df, r, rng)  =>  attention_vjp_sides(q, k, v, lse, df, r, rng)
//! attention_vjp 0, 1 and 2 of the same                 =>  attention_vjp_all(q, k, v, lse, df, r, rng)
//! linear_lse(x, W), linear_mean(x, W)                  =>  linear_lse_and_mean(x, W)
//! ```
//!
//! The joined node stands where the first of its parts stood that reads all of its operands. No one may read what
//! another gives before that.

use std::collections::{HashMap, HashSet};

use peft_grammar::graph::{Graph, Node, Op, Value};

pub fn join(graph: &Graph) -> Result<Graph, String> {
    let families = families(graph);
    let elsewhere: HashSet<usize> = families.values().flat_map(|family| family.members.iter().copied()).collect();
    let mut new = Graph::new(graph.name.clone());
    let mut map = vec![Value(0); graph.values()];
    for arg in &graph.args {
        map[arg.value.0 as usize] = new.arg(arg.name.clone(), arg.role, arg.rows, graph.ty(arg.value).clone());
    }
    for (at, node) in graph.nodes.iter().enumerate() {
        let (op, results) = match families.get(&at) {
            Some(Family { whole, members }) => (whole, members.iter().map(|&at| graph.nodes[at].result()).collect()),
            None if elsewhere.contains(&at) => continue,
            None => (&node.op, node.results.clone()),
        };
        let operands: Vec<Value> = node.operands.iter().map(|v| map[v.0 as usize]).collect();
        let made = new.push_node(op.clone(), &operands, &node.location)?;
        results.iter().zip(&made.results).for_each(|(old, new)| map[old.0 as usize] = *new);
    }
    new.outputs = graph.outputs.iter().map(|(name, v)| (name.clone(), map[v.0 as usize])).collect();
    Ok(new)
}

/// Nodes that are one.
struct Family {
    whole: Op,
    /// In the order of its results.
    members: Vec<usize>,
}

/// All of them, by where they stand.
fn families(graph: &Graph) -> HashMap<usize, Family> {
    let mut first_read = vec![graph.nodes.len(); graph.values()];
    for (at, node) in graph.nodes.iter().enumerate().rev() {
        node.operands.iter().for_each(|v| first_read[v.0 as usize] = at);
    }
    let (mut families, mut taken) = (HashMap::new(), HashSet::new());
    for (at, node) in graph.nodes.iter().enumerate() {
        for whole in wholes(&node.op) {
            let Some(members) = members(graph, at, &whole) else { continue };
            // What waits for no batch may be prepared of frozen weights, each by its own name.
            let free = |&at: &usize| !taken.contains(&at) && graph.ty(graph.nodes[at].result()).elements().is_none();
            let there = |&other: &usize| first_read[graph.nodes[other].result().0 as usize] > at;
            if members.iter().all(|member| free(member) && there(member)) {
                taken.extend(members.iter().copied());
                families.insert(at, Family { whole, members });
            }
        }
    }
    families
}

/// Operations of several results of which one that reads all operands may be a part, the largest first.
fn wholes(op: &Op) -> Vec<Op> {
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

/// The nodes that are the parts of `whole` on the operands of the one at `at`, if all are there.
fn members(graph: &Graph, at: usize, whole: &Op) -> Option<Vec<usize>> {
    let operands = &graph.nodes[at].operands;
    let find = |part: &Op| graph.nodes.iter().position(|node| node.op == *part && reads(node, operands));
    whole.joins().iter().map(find).collect::<Option<Vec<usize>>>().filter(|members| members.contains(&at))
}

/// Whether the node has its part of these operands.
fn reads(node: &Node, operands: &[Value]) -> bool {
    // Neither the values nor the corrections have a part in the values' adjoint.
    let apart = |i: usize| matches!(node.op, Op::AttentionVjp { of: 2, .. }) && matches!(i, 2 | 5);
    let own = node.op.of_whole(operands);
    own.len() == node.operands.len() && (0..own.len()).all(|i| apart(i) || own[i] == node.operands[i])
}
