//! Rematerialisation: recomputes values that are cheap to compute in the backward pass instead of keeping them in
//! memory from the forward pass on.
//!
//! ```text
//! v is read, then not read for `gap` operations, then read again. A chain of operations recomputes v for the later
//! read from values x that are in memory at that point anyway:
//!
//! |v| · gap  ≥  K · (Σ cost(op) |op| + FLOPS_PER_TRANSFER (|v| + Σ |x|))    =>    v is recomputed
//! ```
//!
//! |v| is the number of elements of v per token, |op| that of the result of an operation of the chain, cost(op) the
//! number of arithmetic operations per element, and K is [`Thresholds::max_kept_floats_per_op`]. A chain consists of
//! elementwise operations, normalizations and views. The most frequent case is dropout of a normalized input: its mask
//! is a function of a Philox counter and occupies no memory.

use std::collections::HashMap;
use std::fmt;

use peft_grammar::graph::{Dim, Graph, Node, Op, Type, Value};

use crate::fuse::Thresholds;
use crate::rewrite::live;

/// The number of arithmetic operations that take as long as reading one float from memory, or writing it.
const FLOPS_PER_TRANSFER: f64 = 20.0;
/// The assumed number of keys per token in a ragged tensor: a typical sequence length.
const KEYS: f64 = 128.0;

/// The memory that rematerialisation frees between the reads of values, and the arithmetic that it adds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RematSavings {
    /// The number of values that are recomputed at least once.
    pub values: usize,
    /// The bytes per token that these values no longer occupy.
    pub bytes: f64,
    /// The floating-point operations per token that recomputing them adds.
    pub flops: f64,
}

impl fmt::Display for RematSavings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RematSavings { values, bytes, flops } = self;
        write!(f, "recomputed values: {values}, {bytes:.0} bytes per token saved, {flops:.0} FLOP per token added")
    }
}

/// Returns `graph` with cheap values recomputed before distant reads, and what that saves.
///
/// # Errors
/// Operands do not fit an operation, which a verified graph excludes.
pub fn remat(graph: &Graph, thresholds: &Thresholds) -> Result<(Graph, RematSavings), String> {
    let ranges = LiveRanges::of(graph, thresholds.max_kept_floats_per_op);
    let mut new = Graph::new(graph.name.clone());
    let mut map = vec![Value(0); graph.value_count()];
    for arg in &graph.args {
        map[arg.value.0 as usize] = new.arg(arg.name.clone(), arg.role, arg.rows, graph.ty(arg.value).clone());
    }
    let mut builder = Builder { ranges: &ranges, new, map, recomputed: HashMap::new() };
    for (at, node) in graph.nodes.iter().enumerate() {
        let values = builder.push(node, at)?;
        node.results.iter().zip(values).for_each(|(old, new)| builder.map[old.0 as usize] = new);
    }
    let Builder { mut new, map, .. } = builder;
    new.outputs = graph.outputs.iter().map(|(name, v)| (name.clone(), map[v.0 as usize])).collect();
    Ok((live(&new), ranges.savings))
}

/// The live ranges of values.
struct LiveRanges<'g> {
    graph: &'g Graph,
    /// For each value, its live ranges as positions of the first and the last operation. The value is recomputed at the
    /// start of each range after the first. A view has no range; it extends those of the value that it views.
    spans: Vec<Vec<(usize, usize)>>,
    savings: RematSavings,
}

impl<'g> LiveRanges<'g> {
    fn of(graph: &'g Graph, max_kept: f64) -> Self {
        let mut reads = vec![vec![]; graph.value_count()];
        let mut ranges =
            LiveRanges { graph, spans: vec![vec![]; graph.value_count()], savings: RematSavings::default() };
        let computing = || graph.nodes.iter().enumerate().filter(|(_, n)| !n.op.is_view());
        for (at, node) in computing() {
            node.operands.iter().for_each(|&v| reads[ranges.root(v).0 as usize].push(at));
        }
        graph.outputs.iter().for_each(|(_, v)| reads[ranges.root(*v).0 as usize].push(graph.nodes.len()));
        let results = computing().flat_map(|(at, node)| node.results.iter().map(move |result| (at, result)));
        for (at, result) in results {
            let (size, mut spans) = (ranges.elements(*result), vec![(at, at)]);
            for &read in &reads[result.0 as usize] {
                let last = spans.last_mut().expect("the first");
                let mut cost = Cost { flops: 0.0, transfers: size, max: size * (read - last.1) as f64 / max_kept };
                let is_output = graph.outputs.iter().any(|(_, v)| ranges.root(*v) == *result);
                if is_output || !ranges.recomputable(*result, read, &mut cost) {
                    last.1 = read;
                    continue;
                }
                if batched(graph.ty(*result)) {
                    ranges.savings.flops += cost.flops;
                    ranges.savings.bytes += if spans.len() == 1 { 4.0 * size } else { 0.0 };
                }
                ranges.savings.values += usize::from(spans.len() == 1);
                spans.push((read, read));
            }
            ranges.spans[result.0 as usize] = spans;
        }
        ranges
    }

    /// The value that `value` is a view of, or `value` itself.
    fn root(&self, value: Value) -> Value {
        match self.graph.def(value) {
            Some(node) if node.op.is_view() => self.root(node.operands[0]),
            _ => value,
        }
    }

    /// The operation that computed the copy of `root` that is in memory at `at`; 0 for arguments, which always are.
    fn computed_at(&self, root: Value, at: usize) -> Option<usize> {
        let spans = &self.spans[root.0 as usize];
        let span = spans.iter().find(|(from, to)| (*from..=*to).contains(&at));
        span.map(|(from, _)| *from).or(self.graph.def(root).is_none().then_some(0))
    }

    /// Whether `value` can be recomputed at `at` within the bound of `cost`, to which it adds.
    fn recomputable(&self, value: Value, at: usize, cost: &mut Cost) -> bool {
        let Some(node) = self.graph.def(value) else { return false };
        let Some(flops) = flops_per_element(&node.op) else { return false };
        cost.flops += flops * self.elements(value);
        cost.allowed() && node.operands.iter().all(|&v| self.available(self.root(v), at, cost))
    }

    /// Whether `root` is in memory at `at` or can be recomputed there, within the bound of `cost`.
    fn available(&self, root: Value, at: usize, cost: &mut Cost) -> bool {
        if self.computed_at(root, at).is_none() {
            return self.recomputable(root, at, cost);
        }
        cost.transfers += if batched(self.graph.ty(root)) { self.elements(root) } else { 0.0 };
        cost.allowed()
    }

    /// The number of elements of `value` per token.
    fn elements(&self, value: Value) -> f64 {
        let size = |d: &Dim| match d {
            Dim::Const(n) => *n as f64,
            Dim::Keys(_) => KEYS,
            _ => 1.0,
        };
        self.graph.ty(value).shape.iter().map(size).product()
    }
}

/// The cost of a recomputation per token.
struct Cost {
    flops: f64,
    /// Floats that are read or written.
    transfers: f64,
    /// The upper bound, in arithmetic operations.
    max: f64,
}

impl Cost {
    fn allowed(&self) -> bool {
        self.flops + FLOPS_PER_TRANSFER * self.transfers <= self.max
    }
}

/// Whether the size of the type grows with the batch. Reads of other values, such as the vectors of a normalization,
/// are free, because they stay in the cache.
fn batched(ty: &Type) -> bool {
    ty.elements().is_none()
}

/// Arithmetic operations per element of the result; `None` for operations that are never recomputed.
fn flops_per_element(op: &Op) -> Option<f64> {
    use Op::*;
    match op {
        Constant { .. } | Iota { .. } | Broadcast { .. } => Some(0.0),
        Add | Sub | Mul | Min | Scale { .. } | Shift { .. } | Float | Relu | Step => Some(1.0),
        Div | Sqrt | Rsqrt => Some(4.0),
        Normalize { .. } => Some(8.0),
        Exp | Sin | Cos => Some(16.0),
        Log | Tanh | Sigmoid | Dropout { .. } => Some(24.0),
        Gelu | GeluGrad | GeluTanh | GeluTanhGrad => Some(32.0),
        // Views occupy no memory.
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
struct Builder<'a> {
    ranges: &'a LiveRanges<'a>,
    new: Graph,
    /// For each old value, its first computation in the new graph.
    map: Vec<Value>,
    /// Recomputed values, by old value and the start of the live range.
    recomputed: HashMap<(Value, usize), Value>,
}

impl Builder<'_> {
    /// Appends `node` on the copies of its operands that are in memory at `at`.
    fn push(&mut self, node: &Node, at: usize) -> Result<Vec<Value>, String> {
        let operands = node.operands.iter().map(|&v| self.read(v, at)).collect::<Result<Vec<_>, _>>()?;
        Ok(self.new.push_node(node.op.clone(), &operands, &node.location)?.results.clone())
    }

    /// The copy of `value` that is in memory at `at`, which is recomputed at the start of its live range.
    fn read(&mut self, value: Value, at: usize) -> Result<Value, String> {
        let root = self.ranges.root(value);
        let first = self.ranges.graph.def_at(root).unwrap_or(0);
        let start = self.ranges.computed_at(root, at).unwrap_or(at);
        if start == first {
            return Ok(self.map[value.0 as usize]);
        }
        if let Some(&copy) = self.recomputed.get(&(value, start)) {
            return Ok(copy);
        }
        let mut node = self.ranges.graph.def(value).expect("arguments are never recomputed").clone();
        node.location.rule = "remat".into();
        let copy = self.push(&node, at)?[0];
        self.recomputed.insert((value, start), copy);
        Ok(copy)
    }
}
