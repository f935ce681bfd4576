//! What a batch's integers may be: each table that an input indexes has so many rows.

use crate::graph::{Dim, Graph, Node, Op, Role, Value};

/// An input whose values lie in `0..rows`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    pub input: String,
    pub rows: Dim,
    /// What it indexes, to follow a number: ``rows of `transformer.wpe.weight`, which begin at row 10``.
    pub table: String,
}

impl Graph {
    /// The bounds that this graph's operations set to its inputs, each once, in the order of the operations.
    pub fn bounds(&self) -> Vec<Bound> {
        let mut bounds: Vec<Bound> = vec![];
        for node in &self.nodes {
            let Some((rows, table)) = self.indexed(node) else { continue };
            let indices = self.args.iter().find(|a| a.value == node.operands[1] && a.role == Role::Input);
            let Some(indices) = indices else { continue };
            let bound = Bound { input: indices.name.clone(), rows, table };
            if !bounds.contains(&bound) {
                bounds.push(bound);
            }
        }
        bounds
    }

    /// How many rows the node's second operand indexes, and what they are called.
    fn indexed(&self, node: &Node) -> Option<(Dim, String)> {
        use Op::*;
        match node.op {
            Gather { .. } => Some((self.ty(node.operands[0]).shape[0], self.rows_of(node.operands[0]))),
            CrossEntropy { .. } => Some((self.ty(node.operands[0]).shape[1], "classes of the loss".into())),
            // Derivatives index as what they are derivatives of.
            Scatter { .. } | CrossEntropyVjp { .. } => None,
            // Their integers are keys of random numbers, and rows that compilation itself asks for.
            Dropout { .. } | Attention { .. } | AttentionAndLse { .. } => None,
            AttentionVjp { .. } | AttentionVjpSides { .. } | AttentionVjpAll { .. } => None,
            Constant { .. } | Iota { .. } | Add | Sub | Mul | Div | Min | Scale { .. } | Shift { .. } | Float => None,
            Exp | Log | Sqrt | Rsqrt | Sin | Cos | Tanh | Sigmoid | Relu | Step => None,
            Gelu | GeluGrad | GeluTanh | GeluTanhGrad | Detach => None,
            Reshape { .. } | Permute { .. } | Slice { .. } | Pad { .. } | Concat { .. } => None,
            Broadcast { .. } | Reduce { .. } | Matmul { .. } => None,
            Scores { .. } | Attend { .. } | AttendTransposed { .. } | AttentionLse { .. } => None,
            LinearLse | LinearMean | LinearLseAndMean | Softmax | LogSumExp | SoftmaxVjp => None,
            Normalize { .. } | NormalizeVjp { .. } => None,
            SegmentMean | SegmentMeanVjp => None,
        }
    }

    /// What the rows of a table are called.
    fn rows_of(&self, mut table: Value) -> String {
        let mut first = 0;
        loop {
            if let Some(arg) = self.args.iter().find(|a| a.value == table) {
                return match first + arg.rows.map_or(0, |(start, _)| start) {
                    0 => format!("rows of `{}`", arg.name),
                    first => format!("rows of `{}` from row {first} on", arg.name),
                };
            }
            let made = self.def(table).expect("an argument or a result");
            match made.op {
                Op::Slice { axis: 0, start, .. } => first += start,
                // A tensor of which some rows train, in parts.
                Op::Slice { .. } | Op::Concat { axis: 0 } | Op::Detach => {}
                _ if self.ty(table).shape[0] == Dim::Tokens => return "tokens of the batch".into(),
                _ => return "rows of what the model computes".into(),
            }
            table = made.operands[0];
        }
    }
}
