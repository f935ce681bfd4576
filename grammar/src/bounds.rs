//! Bounds on the integers of a batch: each table that an input indexes has a number of rows.

use crate::graph::{Dim, Graph, Node, Op, Role, Value};

/// The requirement that the values of an input are in `0..rows`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputBound {
    /// The name of the input.
    pub input: String,
    /// The exclusive upper bound.
    pub rows: Dim,
    /// The indexed table as text that follows a number: ``rows of `transformer.wpe.weight` from row 10 on``.
    pub table: String,
}

impl Graph {
    /// The bounds on the graph's inputs, without duplicates, in the order of the operations.
    pub fn bounds(&self) -> Vec<InputBound> {
        let mut bounds: Vec<InputBound> = vec![];
        for node in &self.nodes {
            let Some((rows, table)) = self.indexed_table(node) else { continue };
            let indices = self.args.iter().find(|a| a.value == node.operands[1] && a.role == Role::Input);
            let Some(indices) = indices else { continue };
            let bound = InputBound { input: indices.name.clone(), rows, table };
            if !bounds.contains(&bound) {
                bounds.push(bound);
            }
        }
        bounds
    }

    /// The number of rows that the node's second operand indexes, and the description of the table.
    fn indexed_table(&self, node: &Node) -> Option<(Dim, String)> {
        use Op::*;
        match node.op {
            Gather { .. } => Some((self.ty(node.operands[0]).shape[0], self.describe_rows(node.operands[0]))),
            CrossEntropy { .. } => Some((self.ty(node.operands[0]).shape[1], "classes of the loss".into())),
            // An adjoint indexes the same rows as the operation that it belongs to.
            Scatter { .. } | CrossEntropyVjp { .. } => None,
            // The integers of these operations are keys of random numbers and row numbers that the compiler generates.
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

    /// A description of the rows of a table.
    fn describe_rows(&self, mut table: Value) -> String {
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
                // A tensor of which some rows train is a concatenation of parts.
                Op::Slice { .. } | Op::Concat { axis: 0 } | Op::Detach => {}
                _ if self.ty(table).shape[0] == Dim::Tokens => return "tokens of the batch".into(),
                _ => return "rows of what the model computes".into(),
            }
            table = made.operands[0];
        }
    }
}
