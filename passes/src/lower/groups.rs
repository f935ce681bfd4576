//! Elementwise fusion. A *group* is a tree of elementwise operations over one shape in which every inner result is read
//! once. One kernel loads the group's leaves, evaluates the whole expression, and stores the result of its root.

use std::collections::HashSet;
use std::fmt::Write;

use peft_grammar::graph::{Dim, Graph, Op, Value};

/// The most operations in one group.
const MAX_GROUP_OPS: usize = 24;

/// The groups of a graph's elementwise nodes.
pub struct Groups<'g> {
    graph: &'g Graph,
    /// By node: the node that reads its result, if that node's kernel evaluates both.
    inlined_into: Vec<Option<usize>>,
}

/// Forms the groups of `graph`; `uses` has the number of readers of each value.
pub fn form_groups<'g>(graph: &'g Graph, uses: &[usize]) -> Groups<'g> {
    let mut inlined_into = vec![None; graph.nodes.len()];
    let mut sizes = vec![1; graph.nodes.len()];
    for (at, node) in graph.nodes.iter().enumerate().filter(|(_, n)| n.op.is_elementwise()) {
        for &operand in &node.operands {
            let Some(source) = graph.def_at(operand) else { continue };
            let op = &graph.nodes[source].op;
            let (own, wide) = (&graph.ty(operand).shape, &graph.ty(node.result()).shape);
            let alike = own == wide || is_column_of(own, wide) || matches!(op, Op::Constant { .. });
            let once = uses[operand.0 as usize] == 1;
            if op.is_elementwise() && alike && once && sizes[at] + sizes[source] <= MAX_GROUP_OPS {
                inlined_into[source] = Some(at);
                sizes[at] += sizes[source];
            }
        }
    }
    Groups { graph, inlined_into }
}

/// `own` has the same rows as `wide`, but a single column. Its expression is then evaluated again for every column of
/// `wide`, which costs less than to store it and load it.
pub fn is_column_of(own: &[Dim], wide: &[Dim]) -> bool {
    match (own, wide) {
        ([lead @ .., Dim::Const(1)], [rows @ .., Dim::Const(_)]) => lead == rows && !rows.is_empty(),
        _ => false,
    }
}

impl Groups<'_> {
    /// The kernel of a later node evaluates node `at`.
    pub fn is_inlined(&self, at: usize) -> bool {
        self.inlined_into[at].is_some()
    }

    /// The root of the group that contains `at`: the node whose kernel evaluates it.
    pub fn root(&self, at: usize) -> usize {
        self.inlined_into[at].map_or(at, |reader| self.root(reader))
    }

    /// The producer of `value`, if it belongs to the group of its reader.
    fn inlined_producer(&self, value: Value) -> Option<usize> {
        self.graph.def_at(value).filter(|&at| self.is_inlined(at))
    }

    /// The values that the group of `root` loads from buffers, without duplicates.
    pub fn leaves(&self, root: usize) -> Vec<Value> {
        let mut leaves = vec![];
        for &operand in &self.graph.nodes[root].operands {
            match self.inlined_producer(operand) {
                Some(at) => leaves.extend(self.leaves(at)),
                None => leaves.push(operand),
            }
        }
        let mut seen = HashSet::new();
        leaves.retain(|v| seen.insert(*v));
        leaves
    }

    /// The group of `root` applies dropout.
    pub fn has_dropout(&self, root: usize) -> bool {
        self.members(root).iter().any(|&at| matches!(self.graph.nodes[at].op, Op::Dropout { .. }))
    }

    /// A canonical text of what the group computes, with its leaves numbered. Equal texts over equal leaves compute
    /// equal values, so it is a key for values that are prepared once.
    pub fn signature(&self, root: usize) -> String {
        let leaves = if self.graph.nodes[root].op.is_elementwise() { self.leaves(root) } else { vec![] };
        let mut text = format!("{}=", self.graph.ty(self.graph.nodes[root].result()));
        self.write_signature(root, &leaves, &mut text);
        text
    }

    fn write_signature(&self, at: usize, leaves: &[Value], text: &mut String) {
        let node = &self.graph.nodes[at];
        let _ = write!(text, "{:?}(", node.op);
        for &operand in &node.operands {
            match self.inlined_producer(operand) {
                Some(inner) => self.write_signature(inner, leaves, text),
                None => {
                    let _ = write!(text, "{:?}", leaves.iter().position(|&l| l == operand));
                }
            }
            text.push(',');
        }
        text.push(')');
    }

    /// The group's nodes in topological order, the root last.
    pub fn members(&self, root: usize) -> Vec<usize> {
        let mut members = vec![];
        for &operand in &self.graph.nodes[root].operands {
            if let Some(at) = self.inlined_producer(operand) {
                members.extend(self.members(at));
            }
        }
        members.push(root);
        members
    }
}
