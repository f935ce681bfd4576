//! Gather push-down: pushes gathers of rows above the operations that produce them, and scatters below the operations
//! that consume them. Operations then compute only the rows that are gathered, or only the rows that are not zero. With
//! it, the logits and the part of the last layer after its attention are computed only for tokens that have a label.
//!
//! ```text
//! gather(f(x, w), i)      =  f(gather(x, i), w)                   f rowwise, and f(x, w) has no other consumer
//! f(scatter(i, d), y, w)  =  scatter(i, f(d, gather(y, i), w))    f rowwise, and linear in its first operand
//! scatter(i, d)ᵀ @ y      =  dᵀ @ gather(y, i)
//! Σ_r scatter(i, d)_r     =  Σ_r d_r
//! ```
//!
//! f is rowwise if row r of its result depends on row r of x and y, and on w, which all rows share. A dropout receives
//! i as an operand, so that it draws the same numbers for a row as without the rule. A gather is pushed up to the first
//! value that other consumers need in full. In the backward pass an adjoint stays in gathered rows until it is added to
//! an adjoint of all rows.

use std::collections::HashMap;

use peft_grammar::graph::{Dim, Graph, Node, Op, Value};
use peft_grammar::names::Input;

use crate::rewrite::{Rewriter, rewrite};

/// The inputs whose values are row indices of token tensors and never lie outside of them.
const ROW_INDICES: [Input; 3] = [Input::Targets, Input::Starts, Input::Ends];

pub fn apply(graph: &Graph) -> Result<Graph, String> {
    let mut pushdown = Pushdown { plan: Plan::of(graph), scattered: HashMap::new(), gathered: HashMap::new() };
    let mut nodes = graph.nodes.iter();
    rewrite(graph, |new, _, full| {
        new.set_rule("gather_pushdown");
        pushdown.rebuild(new, nodes.next().expect("one call per node"), full)
    })
}

/// The rows of a value that its consumers read.
#[derive(Clone, Copy, PartialEq)]
enum Demand {
    Nothing,
    /// The rows whose indices this value holds.
    Rows(Value),
    All,
}

/// How the new graph represents a value.
#[derive(Clone, Copy, PartialEq)]
enum Representation {
    /// By its nonzero rows, which a scatter would add into zeros.
    Scattered,
    /// By the rows that its consumers read.
    Gathered,
    /// In full. This includes values without token rows, such as weights.
    Full,
}

/// How to compute a node on a subset of its rows: the indices of the rows, and the representation of each operand and
/// of the result.
struct RowSubset {
    ids: Value,
    operands: Vec<Representation>,
    result: Representation,
}

/// The analysis of the old graph on which the rewrite is based.
struct Plan<'g> {
    graph: &'g Graph,
    /// For each value, the indices of the rows outside of which it is known to be zero.
    nonzero_rows: Vec<Option<Value>>,
    /// For each value, the rows that its consumers read.
    demand: Vec<Demand>,
}

impl<'g> Plan<'g> {
    fn of(graph: &'g Graph) -> Self {
        let count = graph.value_count();
        let mut plan = Plan { graph, nonzero_rows: vec![None; count], demand: vec![Demand::Nothing; count] };
        for node in &graph.nodes {
            plan.nonzero_rows[node.result().0 as usize] = match (&node.op, &node.operands[..]) {
                (Op::Scatter { start: 0, .. }, &[ids, _]) => {
                    Some(ids).filter(|_| plan.indexes_rows(ids, node.result()))
                }
                _ => plan.row_subset(node).filter(|n| n.result == Representation::Scattered).map(|n| n.ids),
            };
        }
        graph.outputs.iter().for_each(|(_, v)| plan.demand[v.0 as usize] = Demand::All);
        for node in graph.nodes.iter().rev() {
            if plan.demand[node.result().0 as usize] == Demand::Nothing {
                continue;
            }
            let subset = plan.row_subset(node);
            for (k, operand) in node.operands.iter().enumerate() {
                let read = match &subset {
                    Some(RowSubset { ids, operands, .. }) if operands[k] != Representation::Full => Demand::Rows(*ids),
                    _ => Demand::All,
                };
                let known = &mut plan.demand[operand.0 as usize];
                *known = if [Demand::Nothing, read].contains(known) { read } else { Demand::All };
            }
        }
        plan
    }

    /// The rows on which it is enough to compute the node; `None` if it has to be computed on all rows.
    fn row_subset(&self, node: &Node) -> Option<RowSubset> {
        if let (Op::Gather { start: 0 }, &[x, ids]) = (&node.op, &node.operands[..]) {
            let operands = vec![Representation::Gathered, Representation::Full];
            return self.indexes_rows(ids, x).then_some(RowSubset { ids, operands, result: Representation::Full });
        }
        let rowwise = self.rowwise(node);
        if !rowwise && !self.sums_over_rows(node) {
            return None;
        }
        let scattered = self.scattered_operands(node);
        let (ids, result) = match (scattered.first(), self.demand[node.result().0 as usize]) {
            (Some(&k), _) => {
                (self.nonzero_rows_of(node, k)?, if rowwise { Representation::Scattered } else { Representation::Full })
            }
            (None, Demand::Rows(ids)) if rowwise => (ids, Representation::Gathered),
            _ => return None,
        };
        let representation = |(k, &v): (usize, &Value)| match scattered.contains(&k) {
            true => Representation::Scattered,
            false if self.has_token_rows(v) => Representation::Gathered,
            false => Representation::Full,
        };
        Some(RowSubset { ids, operands: node.operands.iter().enumerate().map(representation).collect(), result })
    }

    /// The operands in which the node is linear, if all of them are zero outside the same rows; empty otherwise.
    fn scattered_operands(&self, node: &Node) -> Vec<usize> {
        use Op::*;
        let all = 0..node.operands.len();
        let linear: Vec<usize> = match &node.op {
            Add | Sub | Concat { .. } => all.collect(),
            Mul | Matmul { transpose_x: true, .. } => {
                all.clone().find(|&k| self.nonzero_rows_of(node, k).is_some()).into_iter().collect()
            }
            Div | Scale { .. } | Matmul { .. } | Dropout { .. } => vec![0],
            Slice { .. } | Pad { .. } | Broadcast { .. } | Reduce { .. } => vec![0],
            SoftmaxVjp | NormalizeVjp { .. } => vec![1],
            Constant { .. } | Min | Shift { .. } => vec![],
            Exp | Log | Sqrt | Rsqrt | Sin | Cos | Tanh | Sigmoid | Relu | Step => vec![],
            Gelu | GeluGrad | GeluTanh | GeluTanhGrad => vec![],
            Softmax | LogSumExp | Normalize { .. } => vec![],
            // These are neither rowwise nor sums over rows, so `row_subset` does not ask whether they are linear.
            Iota { .. } | Float | Detach | Reshape { .. } | Permute { .. } => vec![],
            Scores { .. } | Attend { .. } | AttendTransposed { .. } => vec![],
            Attention { .. } | AttentionLse { .. } | AttentionVjp { .. } | LinearLse | LinearMean => vec![],
            AttentionAndLse { .. } | AttentionVjpSides { .. } | AttentionVjpAll { .. } | LinearLseAndMean => vec![],
            Gather { .. } | Scatter { .. } | SegmentMean | SegmentMeanVjp => vec![],
            CrossEntropy { .. } | CrossEntropyVjp { .. } => vec![],
        };
        let rows = linear.first().and_then(|&k| self.nonzero_rows_of(node, k));
        let same_rows = rows.is_some() && linear.iter().all(|&k| self.nonzero_rows_of(node, k) == rows);
        if same_rows { linear } else { vec![] }
    }

    fn nonzero_rows_of(&self, node: &Node, operand: usize) -> Option<Value> {
        self.nonzero_rows[node.operands[operand].0 as usize]
    }

    /// Whether `ids` holds row indices of `value`.
    fn indexes_rows(&self, ids: Value, value: Value) -> bool {
        self.has_token_rows(value)
            && self.graph.args.iter().any(|a| a.value == ids && ROW_INDICES.iter().any(|input| input.name() == a.name))
    }

    /// Whether `value` is a matrix with one row per token.
    fn has_token_rows(&self, value: Value) -> bool {
        matches!(self.graph.ty(value).shape[..], [Dim::Tokens, Dim::Const(_)])
    }

    /// Whether row r of the result depends only on row r of the operands that have token rows.
    fn rowwise(&self, node: &Node) -> bool {
        use Op::*;
        let rowwise = match &node.op {
            Constant { .. } | Add | Sub | Mul | Div | Min | Scale { .. } | Shift { .. } => true,
            Exp | Log | Sqrt | Rsqrt | Sin | Cos | Tanh | Sigmoid | Relu | Step => true,
            Gelu | GeluGrad | GeluTanh | GeluTanhGrad => true,
            Softmax | LogSumExp | SoftmaxVjp | Normalize { .. } | NormalizeVjp { .. } => true,
            Slice { axis: 1, .. } | Pad { axis: 1, .. } | Concat { axis: 1 } => true,
            Matmul { transpose_x, .. } => !transpose_x,
            Reduce { axes, .. } => axes[..] == [1],
            // A mean divides by the number of copies; of an operand without token rows that is the number of tokens.
            Broadcast { mean, .. } => !mean || self.has_token_rows(node.operands[0]),
            Dropout { .. } => node.operands.len() == 2,
            Iota { .. } | Float | Detach | Reshape { .. } | Permute { .. } => false,
            Slice { .. } | Pad { .. } | Concat { .. } => false,
            Scores { .. } | Attend { .. } | AttendTransposed { .. } => false,
            Attention { .. } | AttentionLse { .. } | AttentionVjp { .. } | LinearLse | LinearMean => false,
            AttentionAndLse { .. } | AttentionVjpSides { .. } | AttentionVjpAll { .. } | LinearLseAndMean => false,
            Gather { .. } | Scatter { .. } | SegmentMean | SegmentMeanVjp => false,
            CrossEntropy { .. } | CrossEntropyVjp { .. } => false,
        };
        let fixed = |v: Value| self.graph.ty(v).elements().is_some();
        rowwise
            && self.has_token_rows(node.result())
            && node.operands.iter().all(|&v| self.has_token_rows(v) || fixed(v))
    }

    /// Whether the node sums its operands over the token axis.
    fn sums_over_rows(&self, node: &Node) -> bool {
        use Op::*;
        let sums = match &node.op {
            Matmul { transpose_x, transpose_y } => *transpose_x && !transpose_y,
            Reduce { axes, mean, .. } => axes.contains(&0) && !mean,
            Constant { .. } | Iota { .. } | Add | Sub | Mul | Div | Min | Scale { .. } | Shift { .. } => false,
            Float | Exp | Log | Sqrt | Rsqrt | Sin | Cos | Tanh | Sigmoid | Relu | Step => false,
            Gelu | GeluGrad | GeluTanh | GeluTanhGrad | Detach => false,
            Reshape { .. } | Permute { .. } | Slice { .. } | Pad { .. } | Concat { .. } | Broadcast { .. } => false,
            Scores { .. } | Attend { .. } | AttendTransposed { .. } => false,
            Attention { .. } | AttentionLse { .. } | AttentionVjp { .. } | LinearLse | LinearMean => false,
            AttentionAndLse { .. } | AttentionVjpSides { .. } | AttentionVjpAll { .. } | LinearLseAndMean => false,
            Softmax | LogSumExp | SoftmaxVjp | Normalize { .. } | NormalizeVjp { .. } => false,
            Gather { .. } | Scatter { .. } | SegmentMean | SegmentMeanVjp => false,
            CrossEntropy { .. } | CrossEntropyVjp { .. } | Dropout { .. } => false,
        };
        sums && node.operands.iter().all(|&v| self.has_token_rows(v))
    }
}

/// The state of the rewrite: for values of the old graph, their partial representations in the new graph.
struct Pushdown<'g> {
    plan: Plan<'g>,
    scattered: HashMap<Value, Value>,
    gathered: HashMap<Value, Value>,
}

impl Pushdown<'_> {
    /// Computes a node on a subset of its rows where the plan allows it. `None` rebuilds the node on all rows; where
    /// its consumers read only a partial representation, that node is dead and is dropped.
    fn rebuild(&mut self, new: &mut Rewriter, node: &Node, full: &[Value]) -> Result<Option<Value>, String> {
        let Some(RowSubset { ids, operands, result }) = self.plan.row_subset(node) else {
            if let Op::Scatter { .. } = node.op {
                self.scattered.insert(node.result(), full[1]);
            }
            return Ok(None);
        };
        let at = self.plan.graph.args.iter().position(|a| a.value == ids).expect("row indices are an input");
        let ids = new.graph.args[at].value;
        let mut partial = vec![];
        for ((representation, old), &full) in operands.iter().zip(&node.operands).zip(full) {
            partial.push(match (representation, self.gathered.get(old)) {
                (Representation::Full, _) => full,
                (Representation::Scattered, _) => self.scattered[old],
                (Representation::Gathered, Some(&rows)) => rows,
                (Representation::Gathered, None) => new.op(Op::Gather { start: 0 }, &[full, ids])?,
            });
        }
        let mut op = node.op.clone();
        match &mut op {
            Op::Gather { .. } => return Ok(Some(partial[0])),
            Op::Constant { shape, .. } | Op::Broadcast { shape, .. } => shape[0] = new.graph.ty(ids).shape[0],
            Op::Dropout { .. } => partial.push(ids),
            // The attributes of all other rowwise operations and sums do not depend on the number of rows.
            _ => {}
        }
        let value = new.op(op, &partial)?;
        match result {
            Representation::Full => Ok(Some(value)),
            Representation::Gathered => {
                self.gathered.insert(node.result(), value);
                Ok(None)
            }
            Representation::Scattered => {
                self.scattered.insert(node.result(), value);
                new.op(Op::Scatter { start: 0, rows: Dim::Tokens }, &[ids, value]).map(Some)
            }
        }
    }
}
