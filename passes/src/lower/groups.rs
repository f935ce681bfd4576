//! Runs of operations element by element in which each result is read once, over one shape: a *group* is one kernel that
//! loads the leaves, evaluates the whole expression and stores once.

use std::collections::HashSet;
use std::fmt::Write;

use peft_grammar::graph::{Dim, Graph, Op, Value};

/// Operations of one kernel, at most.
const LARGEST_GROUP: usize = 24;

/// Works element by element.
pub fn maps(op: &Op) -> bool {
    op.elementwise()
}

/// Which nodes are evaluated inside the kernel of a later one.
pub struct Groups<'g> {
    graph: &'g Graph,
    /// By node: the reader in whose group it is.
    into: Vec<Option<usize>>,
}

pub fn group<'g>(graph: &'g Graph, uses: &[usize]) -> Groups<'g> {
    let mut into = vec![None; graph.nodes.len()];
    let mut sizes = vec![1; graph.nodes.len()];
    for (at, node) in graph.nodes.iter().enumerate().filter(|(_, n)| maps(&n.op)) {
        for &operand in &node.operands {
            let Some(source) = graph.def_at(operand) else { continue };
            let op = &graph.nodes[source].op;
            let (own, wide) = (&graph.ty(operand).shape, &graph.ty(node.result()).shape);
            let alike = own == wide || one_column(own, wide) || matches!(op, Op::Constant { .. });
            let once = uses[operand.0 as usize] == 1;
            if maps(op) && alike && once && sizes[at] + sizes[source] <= LARGEST_GROUP {
                into[source] = Some(at);
                sizes[at] += sizes[source];
            }
        }
    }
    Groups { graph, into }
}

/// The same rows of one column each: what is computed of them is computed for every column, which costs less than to
/// write it down.
pub fn one_column(own: &[Dim], wide: &[Dim]) -> bool {
    match (own, wide) {
        ([lead @ .., Dim::Const(1)], [rows @ .., Dim::Const(_)]) => lead == rows && !rows.is_empty(),
        _ => false,
    }
}

impl Groups<'_> {
    /// It has no kernel of its own.
    pub fn inner(&self, at: usize) -> bool {
        self.into[at].is_some()
    }

    /// The node whose kernel evaluates `at`.
    pub fn root(&self, at: usize) -> usize {
        self.into[at].map_or(at, |reader| self.root(reader))
    }

    /// The node inside the group of its reader that makes `value`.
    fn inside(&self, value: Value) -> Option<usize> {
        self.graph.def_at(value).filter(|&at| self.inner(at))
    }

    /// What the group of `root` reads from buffers, each once.
    pub fn leaves(&self, root: usize) -> Vec<Value> {
        let mut leaves = vec![];
        for &operand in &self.graph.nodes[root].operands {
            match self.inside(operand) {
                Some(at) => leaves.extend(self.leaves(at)),
                None => leaves.push(operand),
            }
        }
        let mut seen = HashSet::new();
        leaves.retain(|v| seen.insert(*v));
        leaves
    }

    /// The group drops something.
    pub fn draws(&self, root: usize) -> bool {
        self.members(root).iter().any(|&at| matches!(self.graph.nodes[at].op, Op::Dropout { .. }))
    }

    /// What the group computes, as text, with its leaves numbered.
    pub fn expression(&self, root: usize) -> String {
        let leaves = if maps(&self.graph.nodes[root].op) { self.leaves(root) } else { vec![] };
        let mut text = format!("{}=", self.graph.ty(self.graph.nodes[root].result()));
        self.write(root, &leaves, &mut text);
        text
    }

    fn write(&self, at: usize, leaves: &[Value], text: &mut String) {
        let node = &self.graph.nodes[at];
        let _ = write!(text, "{:?}(", node.op);
        for &operand in &node.operands {
            match self.inside(operand) {
                Some(inner) => self.write(inner, leaves, text),
                None => {
                    let _ = write!(text, "{:?}", leaves.iter().position(|&l| l == operand));
                }
            }
            text.push(',');
        }
        text.push(')');
    }

    /// The group's nodes, operands before readers.
    pub fn members(&self, root: usize) -> Vec<usize> {
        let mut members = vec![];
        for &operand in &self.graph.nodes[root].operands {
            if let Some(at) = self.inside(operand) {
                members.extend(self.members(at));
            }
        }
        members.push(root);
        members
    }
}
