//! Projections, y = x W + b, are recognised by their form in the graph. Methods can then read `W` and `b`, and later
//! stages know where the matrix is stored.

use super::Checker;
use super::frame::Frame;
use super::value::Val;
use crate::ast::Name;
use crate::diagnostic::Diagnostic;
use crate::graph::{Dim, Node, Op, Value};
use crate::model::Projection;

/// A projection of the site that is being executed.
pub(super) struct NestedProjection {
    /// The variable that holds y.
    pub name: String,
    /// The value x before any method changes it.
    pub input: Val,
    pub x: Val,
    pub parts: Option<ProjectionParts>,
}

/// The tensors of a projection.
#[derive(Clone, Copy)]
pub(super) struct ProjectionParts {
    weight: Value,
    transposed: bool,
    bias: Option<Value>,
    columns: Option<(u64, u64)>,
}

impl<'a> Checker<'a> {
    /// Matches y against `x @ W + b`, or against some columns of it.
    pub(super) fn match_projection(&self, y: &Val) -> Option<ProjectionParts> {
        let &Val::Tensor(mut y) = y else { return None };
        let is_weight = |value: Value| self.graph.args.iter().any(|a| a.value == value && a.rows.is_none());
        let mut columns = None;
        let node = self.graph.def(y)?;
        if let Op::Slice { axis, start, end } = node.op
            && axis + 1 == self.graph.ty(y).rank()
        {
            y = node.operands[0];
            let end = end.or(self.graph.ty(y).last()?.constant())?;
            columns = Some((start, end));
        }
        let mut node = self.graph.def(y)?;
        let mut bias = None;
        if let Op::Add = node.op {
            let flat = |v: &&Value| self.graph.ty(**v).rank() == 1 && is_weight(**v);
            bias = Some(*node.operands.iter().find(flat)?);
            node = self.graph.def(*node.operands.iter().find(|v| Some(**v) != bias)?)?;
        }
        let Op::Matmul { transpose_x: false, transpose_y: mut transposed } = node.op else { return None };
        let mut weight = node.operands[1];
        if let Some(Node { op: Op::Permute { axes }, operands, .. }) = self.graph.def(weight)
            && axes[..] == [1, 0]
        {
            (weight, transposed) = (operands[0], !transposed);
        }
        is_weight(weight).then_some(ProjectionParts { weight, transposed, bias, columns })
    }

    /// `W[in,out]` or `b[out]` of a projection. Without a bias, b is a constant 0.
    pub(super) fn projection_part(&mut self, projection: &NestedProjection, variable: &Name) -> Val {
        let Some(parts) = projection.parts else {
            let (name, part) = (&projection.name, &variable.text);
            let title = format!("`{name}` is not of the form `x @ W + b`, so it has no `{part}`");
            self.report(Diagnostic::error(variable.span, title));
            return Val::Unknown;
        };
        let span = variable.span;
        let cut = |checker: &mut Self, value: Val, axis: usize| match (parts.columns, value) {
            (Some((start, end)), Val::Tensor(x)) => checker.push(Op::Slice { axis, start, end: Some(end) }, &[x], span),
            (_, value) => value,
        };
        if variable.text == "W" {
            let matrix = match parts.transposed {
                true => self.push(Op::Permute { axes: vec![1, 0] }, &[parts.weight], span),
                false => Val::Tensor(parts.weight),
            };
            return cut(self, matrix, 1);
        }
        match parts.bias {
            Some(bias) => cut(self, Val::Tensor(bias), 0),
            None => {
                let shape = self.graph.ty(parts.weight).shape.clone();
                let all = if parts.transposed { shape[0] } else { shape[1] };
                let width = parts.columns.map_or(all, |(start, end)| Dim::Const(end - start));
                self.push(Op::Constant { value: 0.0, shape: vec![width] }, &[], span)
            }
        }
    }

    /// Records the projections of a site after the site has been executed, when their outputs are final.
    pub(super) fn record_projections(&mut self, site: &str, nested: &[NestedProjection], frame: &Frame<'a>) {
        let name = |value: Value| self.graph.args.iter().find(|a| a.value == value).map(|a| a.name.clone());
        for projecting in nested {
            let (Some(parts), &Val::Tensor(input)) = (projecting.parts, &projecting.input) else { continue };
            let Some(&Val::Tensor(output)) = frame.get(&projecting.name) else { continue };
            let Some(weight) = name(parts.weight) else { continue };
            self.projections.push(Projection {
                path: format!("{site}.{}", projecting.name),
                weight,
                transposed: parts.transposed,
                bias: parts.bias.and_then(name),
                columns: parts.columns,
                input,
                output,
            });
        }
    }
}
