//! Work that no one reads is not done: where only some rows of the batch are read, or only some are not zero, only they
//! are computed. This is what leaves logits, and the last layer after its attention, to the tokens that have a label.
//!
//! ```text
//! gather(f(x, w), i)      =  f(gather(x, i), w)                   f by rows, and nothing reads the others
//! f(scatter(i, d), y, w)  =  scatter(i, f(d, gather(y, i), w))    f by rows, and linear in what is scattered
//! scatter(i, d)ᵀ @ y      =  dᵀ @ gather(y, i)
//! Σ_r scatter(i, d)_r     =  Σ_r d_r
//! ```
//!
//! By rows: row r of the result is made of rows r of x and y, and of w, which is the same for all of them. A dropout is
//! told i, so that it draws for a row what it would in its old place. A gather goes down to what is read whole; the
//! adjoint that comes back keeps to the rows until it is added to one that does not.

use std::collections::HashMap;

use peft_grammar::graph::{Dim, Graph, Node, Op, Value};
use peft_grammar::names::Input;

use crate::rewrite::{Rewriter, rewrite};

/// Inputs that name rows of the batch and nothing beside it.
const NAMES: [Input; 3] = [Input::Targets, Input::Starts, Input::Ends];

pub fn apply(graph: &Graph) -> Result<Graph, String> {
    let mut rows = Rows { plan: Plan::of(graph), scattered: HashMap::new(), gathered: HashMap::new() };
    let mut nodes = graph.nodes.iter();
    rewrite(graph, |new, _, whole| rows.rebuild(new, nodes.next().expect("each in its turn"), whole))
}

/// What is read of a value.
#[derive(Clone, Copy, PartialEq)]
enum Read {
    Nothing,
    Rows(Value),
    Whole,
}

/// How a value is held.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// What was added into some rows of zeros.
    Scattered,
    /// Some rows.
    Gathered,
    /// All of it; of what has no rows, too.
    Whole,
}

/// A node on the rows that `ids` name: how it takes its operands, and how its result comes.
struct Narrow {
    ids: Value,
    operands: Vec<Form>,
    result: Form,
}

struct Plan<'g> {
    graph: &'g Graph,
    /// By value, the rows beside which it is zero.
    only: Vec<Option<Value>>,
    /// By value.
    read: Vec<Read>,
}

impl<'g> Plan<'g> {
    fn of(graph: &'g Graph) -> Self {
        let count = graph.values();
        let mut plan = Plan { graph, only: vec![None; count], read: vec![Read::Nothing; count] };
        for node in &graph.nodes {
            plan.only[node.result().0 as usize] = match (&node.op, &node.operands[..]) {
                (Op::Scatter { start: 0, .. }, &[ids, _]) => Some(ids).filter(|_| plan.named(ids, node.result())),
                _ => plan.narrow(node).filter(|n| n.result == Form::Scattered).map(|n| n.ids),
            };
        }
        graph.outputs.iter().for_each(|(_, v)| plan.read[v.0 as usize] = Read::Whole);
        for node in graph.nodes.iter().rev() {
            if plan.read[node.result().0 as usize] == Read::Nothing {
                continue;
            }
            let narrow = plan.narrow(node);
            for (k, operand) in node.operands.iter().enumerate() {
                let read = match &narrow {
                    Some(Narrow { ids, operands, .. }) if operands[k] != Form::Whole => Read::Rows(*ids),
                    _ => Read::Whole,
                };
                let known = &mut plan.read[operand.0 as usize];
                *known = if [Read::Nothing, read].contains(known) { read } else { Read::Whole };
            }
        }
        plan
    }

    /// Which rows of the node are enough, if not all are wanted.
    fn narrow(&self, node: &Node) -> Option<Narrow> {
        if let (Op::Gather { start: 0 }, &[x, ids]) = (&node.op, &node.operands[..]) {
            let operands = vec![Form::Gathered, Form::Whole];
            return self.named(ids, x).then_some(Narrow { ids, operands, result: Form::Whole });
        }
        let by_rows = self.by_rows(node);
        if !by_rows && !self.adds_rows(node) {
            return None;
        }
        let scattered = self.scattered(node);
        let (ids, result) = match (scattered.first(), self.read[node.result().0 as usize]) {
            (Some(&k), _) => (self.only(node, k)?, if by_rows { Form::Scattered } else { Form::Whole }),
            (None, Read::Rows(ids)) if by_rows => (ids, Form::Gathered),
            _ => return None,
        };
        let form = |(k, &v): (usize, &Value)| match scattered.contains(&k) {
            true => Form::Scattered,
            false if self.runs(v) => Form::Gathered,
            false => Form::Whole,
        };
        Some(Narrow { ids, operands: node.operands.iter().enumerate().map(form).collect(), result })
    }

    /// The operands in which the node is linear, if they are zero beside the same rows.
    fn scattered(&self, node: &Node) -> Vec<usize> {
        use Op::*;
        let all = 0..node.operands.len();
        let linear: Vec<usize> = match &node.op {
            Add | Sub | Concat { .. } => all.collect(),
            Mul | Matmul { transpose_x: true, .. } => {
                all.clone().find(|&k| self.only(node, k).is_some()).into_iter().collect()
            }
            Div | Scale { .. } | Matmul { .. } | Dropout { .. } => vec![0],
            Slice { .. } | Pad { .. } | Broadcast { .. } | Reduce { .. } => vec![0],
            SoftmaxVjp | NormalizeVjp { .. } => vec![1],
            Constant { .. } | Min | Shift { .. } => vec![],
            Exp | Log | Sqrt | Rsqrt | Sin | Cos | Tanh | Sigmoid | Relu | Step => vec![],
            Gelu | GeluGrad | GeluTanh | GeluTanhGrad => vec![],
            Softmax | LogSumExp | Normalize { .. } => vec![],
            // Neither by rows nor sums of them: whether they are linear is not asked.
            Iota { .. } | Float | Detach | Reshape { .. } | Permute { .. } => vec![],
            Scores { .. } | Attend { .. } | AttendTransposed { .. } => vec![],
            Attention { .. } | AttentionLse { .. } | AttentionVjp { .. } | LinearLse | LinearMean => vec![],
            AttentionAndLse { .. } | AttentionVjpSides { .. } | AttentionVjpAll { .. } | LinearLseAndMean => vec![],
            Gather { .. } | Scatter { .. } | SegmentMean | SegmentMeanVjp => vec![],
            CrossEntropy { .. } | CrossEntropyVjp { .. } => vec![],
        };
        let rows = linear.first().and_then(|&k| self.only(node, k));
        let alike = rows.is_some() && linear.iter().all(|&k| self.only(node, k) == rows);
        if alike { linear } else { vec![] }
    }

    fn only(&self, node: &Node, operand: usize) -> Option<Value> {
        self.only[node.operands[operand].0 as usize]
    }

    /// `ids` name rows of `value`.
    fn named(&self, ids: Value, value: Value) -> bool {
        self.runs(value)
            && self.graph.args.iter().any(|a| a.value == ids && NAMES.iter().any(|input| input.name() == a.name))
    }

    /// It has a row for each token.
    fn runs(&self, value: Value) -> bool {
        matches!(self.graph.ty(value).shape[..], [Dim::Tokens, Dim::Const(_)])
    }

    fn by_rows(&self, node: &Node) -> bool {
        use Op::*;
        let alone = match &node.op {
            Constant { .. } | Add | Sub | Mul | Div | Min | Scale { .. } | Shift { .. } => true,
            Exp | Log | Sqrt | Rsqrt | Sin | Cos | Tanh | Sigmoid | Relu | Step => true,
            Gelu | GeluGrad | GeluTanh | GeluTanhGrad => true,
            Softmax | LogSumExp | SoftmaxVjp | Normalize { .. } | NormalizeVjp { .. } => true,
            Slice { axis: 1, .. } | Pad { axis: 1, .. } | Concat { axis: 1 } => true,
            Matmul { transpose_x, .. } => !transpose_x,
            Reduce { axes, .. } => axes[..] == [1],
            // How many copies there are of what has no rows is up to all of them.
            Broadcast { mean, .. } => !mean || self.runs(node.operands[0]),
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
        alone && self.runs(node.result()) && node.operands.iter().all(|&v| self.runs(v) || fixed(v))
    }

    fn adds_rows(&self, node: &Node) -> bool {
        use Op::*;
        let adds = match &node.op {
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
        adds && node.operands.iter().all(|&v| self.runs(v))
    }
}

/// The graph on its way; by value of the old one, what of it is held in the new one.
struct Rows<'g> {
    plan: Plan<'g>,
    scattered: HashMap<Value, Value>,
    gathered: HashMap<Value, Value>,
}

impl Rows<'_> {
    /// Where some rows are enough, whatever else is built is not read.
    fn rebuild(&mut self, new: &mut Rewriter, node: &Node, whole: &[Value]) -> Result<Option<Value>, String> {
        let Some(Narrow { ids, operands, result }) = self.plan.narrow(node) else {
            if let Op::Scatter { .. } = node.op {
                self.scattered.insert(node.result(), whole[1]);
            }
            return Ok(None);
        };
        let at = self.plan.graph.args.iter().position(|a| a.value == ids).expect("an input");
        let ids = new.graph.args[at].value;
        let mut narrow = vec![];
        for ((form, old), &whole) in operands.iter().zip(&node.operands).zip(whole) {
            narrow.push(match (form, self.gathered.get(old)) {
                (Form::Whole, _) => whole,
                (Form::Scattered, _) => self.scattered[old],
                (Form::Gathered, Some(&rows)) => rows,
                (Form::Gathered, None) => new.op(Op::Gather { start: 0 }, &[whole, ids])?,
            });
        }
        let mut op = node.op.clone();
        match &mut op {
            Op::Gather { .. } => return Ok(Some(narrow[0])),
            Op::Constant { shape, .. } | Op::Broadcast { shape, .. } => shape[0] = new.graph.ty(ids).shape[0],
            Op::Dropout { .. } => narrow.push(ids),
            // What else works by rows or adds them up says nothing of how many there are.
            _ => {}
        }
        let value = new.op(op, &narrow)?;
        match result {
            Form::Whole => Ok(Some(value)),
            Form::Gathered => {
                self.gathered.insert(node.result(), value);
                Ok(None)
            }
            Form::Scattered => {
                self.scattered.insert(node.result(), value);
                new.op(Op::Scatter { start: 0, rows: Dim::Tokens }, &[ids, value]).map(Some)
            }
        }
    }
}
