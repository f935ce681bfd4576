//! What is to be computed, by its sizes, apart from how.

use std::ops::Range;

use peft_grammar::graph::{Graph, Node, Op, Type};
use peft_runtime::artifact::Extent;

use super::sizes::product;
use super::view::{ONE, View};
use crate::kernels::gemm::Operand;

/// x @ y: how many rows, columns, steps along k, and batches of them.
pub struct Contraction {
    pub m: Extent,
    pub n: Extent,
    pub depth: Extent,
    pub batch: Extent,
}

impl Contraction {
    /// Of a `matmul`.
    pub fn of(graph: &Graph, node: &Node) -> Contraction {
        let [x, y] = [0, 1].map(|i| graph.ty(node.operands[i]));
        let (axes_x, axes_y) = Axes::of_product(&node.op, x, y);
        let size = |ty: &Type, axes: &Range<usize>| product(&ty.shape[axes.clone()]);
        let [m, depth, batch] = [&axes_x.i, &axes_x.k, &axes_x.batch].map(|axes| size(x, axes));
        Contraction { m, n: size(y, &axes_y.i), depth, batch }
    }

    /// Of the result, if they are known.
    pub fn columns(&self) -> Option<u64> {
        if let Extent::Const(n) = self.n { Some(n) } else { None }
    }
}

/// Axes of an operand that are one of the product's.
pub struct Axes {
    pub batch: Range<usize>,
    pub i: Range<usize>,
    pub k: Range<usize>,
}

impl Axes {
    /// Of an operand or a result with `lead` axes of batches.
    fn of(ty: &Type, lead: usize, turned: bool) -> Axes {
        let (row, column) = (ty.rank() - 2..ty.rank() - 1, ty.rank() - 1..ty.rank());
        let (i, k) = if turned { (column, row) } else { (row, column) };
        Axes { batch: 0..lead, i, k }
    }

    /// One weight for all leading axes of x: they are more rows.
    fn all_rows(self, x: &Type, y: &Type) -> Axes {
        if y.rank() < x.rank() { Axes { i: 0..self.i.end, ..self } } else { self }
    }

    /// Of the operands of a `matmul`.
    pub fn of_product(op: &Op, x: &Type, y: &Type) -> (Axes, Axes) {
        let Op::Matmul { transpose_x, transpose_y } = op else { unreachable!("asked of products alone") };
        let lead = y.rank() - 2;
        (Axes::of(x, lead, *transpose_x).all_rows(x, y), Axes::of(y, lead, !transpose_y))
    }

    /// Of its result.
    pub fn of_result(result: &Type, x: &Type, y: &Type) -> Axes {
        Axes::of(result, y.rank() - 2, false).all_rows(x, y)
    }
}

/// The operand that a view is; none where axes that should be one are not.
pub fn operand(view: &View, Axes { batch, i, k }: &Axes) -> Option<Operand> {
    let [area, along, deep] = [batch, i, k].map(|axes| view.along(axes.clone()));
    let (area, along, deep) = (area?, along?, deep?);
    let contiguous = along == ONE && (deep != ONE || i.start > k.start);
    let [area, along, deep] = [area, along, deep].map(|step| step.extent());
    Some(Operand { area, along, deep, first: view.first.clone(), contiguous })
}
