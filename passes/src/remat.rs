//! What is cheap to compute again is not kept from the forward to the backward pass.
//!
//! ```text
//! v is read, then not for `gap` operations, then again. A chain of operations can make it there from what lies in
//! memory at that place anyway:
//!
//! |v| · gap  ≥  K · (Σ cost(op) |op| + MOVE (|v| + Σ |x|)), x what the chain reads    =>    there v is made again
//! ```
//!
//! |v| is how many elements v has for a token, cost(op) how many operations one of them takes. A chain is made of work
//! element by element, normalizations and views. Dropout of a normalized input above all: its mask comes from a counter,
//! never from memory.

use std::collections::HashMap;
use std::fmt;

use peft_grammar::graph::{Dim, Graph, Node, Op, Type, Value};

use crate::fuse::Limits;
use crate::rewrite::live;

/// Operations that take as long as a float takes on its way from memory or to it.
const MOVE: f64 = 20.0;
/// Keys of a token, where it has some: about as many as sequences are long.
const KEYS: f64 = 128.0;

/// What lies in memory no longer between its reads, and what that costs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Remade {
    pub values: usize,
    /// For each token.
    pub bytes: f64,
    /// For each token.
    pub flops: f64,
}

impl fmt::Display for Remade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Remade { values, bytes, flops } = self;
        write!(f, "values made again: {values}, {bytes:.0} bytes a token less, {flops:.0} FLOP a token more")
    }
}

pub fn remat(graph: &Graph, limits: &Limits) -> Result<(Graph, Remade), String> {
    let lives = Lives::of(graph, limits.keep);
    let mut new = Graph::new(graph.name.clone());
    let mut map = vec![Value(0); graph.values()];
    for arg in &graph.args {
        map[arg.value.0 as usize] = new.arg(arg.name.clone(), arg.role, arg.rows, graph.ty(arg.value).clone());
    }
    let mut again = Again { lives: &lives, new, map, made: HashMap::new() };
    for (at, node) in graph.nodes.iter().enumerate() {
        let values = again.push(node, at)?;
        node.results.iter().zip(values).for_each(|(old, new)| again.map[old.0 as usize] = new);
    }
    let Again { mut new, map, .. } = again;
    new.outputs = graph.outputs.iter().map(|(name, v)| (name.clone(), map[v.0 as usize])).collect();
    Ok((live(&new), lives.remade))
}

/// Where values lie in memory.
struct Lives<'g> {
    graph: &'g Graph,
    /// By value, from which operation to which; from the second span on it is made again. A view has none of its own.
    spans: Vec<Vec<(usize, usize)>>,
    remade: Remade,
}

impl<'g> Lives<'g> {
    fn of(graph: &'g Graph, keep: f64) -> Self {
        let mut reads = vec![vec![]; graph.values()];
        let mut lives = Lives { graph, spans: vec![vec![]; graph.values()], remade: Remade::default() };
        let own = || graph.nodes.iter().enumerate().filter(|(_, n)| !n.op.view());
        for (at, node) in own() {
            node.operands.iter().for_each(|&v| reads[lives.root(v).0 as usize].push(at));
        }
        graph.outputs.iter().for_each(|(_, v)| reads[lives.root(*v).0 as usize].push(graph.nodes.len()));
        let results = own().flat_map(|(at, node)| node.results.iter().map(move |result| (at, result)));
        for (at, result) in results {
            let (size, mut spans) = (lives.elements(*result), vec![(at, at)]);
            for &read in &reads[result.0 as usize] {
                let last = spans.last_mut().expect("the first");
                let mut cost = Cost { flops: 0.0, moves: size, most: size * (read - last.1) as f64 / keep };
                let given = graph.outputs.iter().any(|(_, v)| lives.root(*v) == *result);
                if given || !lives.again(*result, read, &mut cost) {
                    last.1 = read;
                    continue;
                }
                if batched(graph.ty(*result)) {
                    lives.remade.flops += cost.flops;
                    lives.remade.bytes += if spans.len() == 1 { 4.0 * size } else { 0.0 };
                }
                lives.remade.values += usize::from(spans.len() == 1);
                spans.push((read, read));
            }
            lives.spans[result.0 as usize] = spans;
        }
        lives
    }

    /// What `value` is a view of.
    fn root(&self, value: Value) -> Value {
        match self.graph.def(value) {
            Some(node) if node.op.view() => self.root(node.operands[0]),
            _ => value,
        }
    }

    /// When that which lies in memory at `at` was made; an argument always lies there.
    fn made(&self, root: Value, at: usize) -> Option<usize> {
        let spans = &self.spans[root.0 as usize];
        let span = spans.iter().find(|(from, to)| (*from..=*to).contains(&at));
        span.map(|(from, _)| *from).or(self.graph.def(root).is_none().then_some(0))
    }

    /// Whether `value` can be made at `at` for no more than `cost` allows.
    fn again(&self, value: Value, at: usize, cost: &mut Cost) -> bool {
        let Some(node) = self.graph.def(value) else { return false };
        let Some(each) = each(&node.op) else { return false };
        cost.flops += each * self.elements(value);
        cost.allowed() && node.operands.iter().all(|&v| self.there(self.root(v), at, cost))
    }

    fn there(&self, root: Value, at: usize, cost: &mut Cost) -> bool {
        if self.made(root, at).is_none() {
            return self.again(root, at, cost);
        }
        cost.moves += if batched(self.graph.ty(root)) { self.elements(root) } else { 0.0 };
        cost.allowed()
    }

    fn elements(&self, value: Value) -> f64 {
        let size = |d: &Dim| match d {
            Dim::Const(n) => *n as f64,
            Dim::Keys(_) => KEYS,
            _ => 1.0,
        };
        self.graph.ty(value).shape.iter().map(size).product()
    }
}

struct Cost {
    flops: f64,
    moves: f64,
    most: f64,
}

impl Cost {
    fn allowed(&self) -> bool {
        self.flops + MOVE * self.moves <= self.most
    }
}

/// Grows with the batch. A weight's vector is in the cache.
fn batched(ty: &Type) -> bool {
    ty.elements().is_none()
}

/// Operations for each element of what may be made again.
fn each(op: &Op) -> Option<f64> {
    use Op::*;
    match op {
        Constant { .. } | Iota { .. } | Broadcast { .. } => Some(0.0),
        Add | Sub | Mul | Min | Scale { .. } | Shift { .. } | Float | Relu | Step => Some(1.0),
        Div | Sqrt | Rsqrt => Some(4.0),
        Normalize { .. } => Some(8.0),
        Exp | Sin | Cos => Some(16.0),
        Log | Tanh | Sigmoid | Dropout { .. } => Some(24.0),
        Gelu | GeluGrad | GeluTanh | GeluTanhGrad => Some(32.0),
        // Views have no memory of their own.
        Reshape { .. } | Permute { .. } | Slice { .. } => None,
        Detach | Pad { .. } | Concat { .. } | Reduce { .. } => None,
        Matmul { .. } | Scores { .. } | Attend { .. } | AttendTransposed { .. } => None,
        Attention { .. } | AttentionLse { .. } | AttentionVjp { .. } | LinearLse | LinearMean => None,
        AttentionAndLse { .. } | AttentionVjpSides { .. } | AttentionVjpAll { .. } | LinearLseAndMean => None,
        Softmax | LogSumExp | SoftmaxVjp | NormalizeVjp { .. } => None,
        Gather { .. } | Scatter { .. } | SegmentMean | SegmentMeanVjp => None,
        CrossEntropy { .. } | CrossEntropyVjp { .. } => None,
    }
}

/// The new graph under construction.
struct Again<'a> {
    lives: &'a Lives<'a>,
    new: Graph,
    /// Values as they were made first.
    map: Vec<Value>,
    /// Made again, by when.
    made: HashMap<(Value, usize), Value>,
}

impl Again<'_> {
    /// `node` on what lies in memory at `at`.
    fn push(&mut self, node: &Node, at: usize) -> Result<Vec<Value>, String> {
        let operands = node.operands.iter().map(|&v| self.read(v, at)).collect::<Result<Vec<_>, _>>()?;
        Ok(self.new.push_node(node.op.clone(), &operands, &node.location)?.results.clone())
    }

    fn read(&mut self, value: Value, at: usize) -> Result<Value, String> {
        let root = self.lives.root(value);
        let first = self.lives.graph.def_at(root).unwrap_or(0);
        let made = self.lives.made(root, at).unwrap_or(at);
        if made == first {
            return Ok(self.map[value.0 as usize]);
        }
        if let Some(&again) = self.made.get(&(value, made)) {
            return Ok(again);
        }
        let node = self.lives.graph.def(value).expect("no argument");
        let again = self.push(node, at)?[0];
        self.made.insert((value, made), again);
        Ok(again)
    }
}
