//! The shape of a matrix product, apart from how it is computed: its sizes, and which tensor axes are its rows,
//! columns, k and batch.

use std::ops::Range;

use peft_grammar::graph::{Graph, Node, Op, Type};
use peft_runtime::artifact::Extent;

use super::sizes::dims_product;
use super::view::{UNIT_STRIDE, View};
use crate::kernels::gemm::Operand;

/// The sizes of x @ y: `m` rows, `n` columns, `depth` steps along k, and the number of batches.
pub struct Contraction {
    pub m: Extent,
    pub n: Extent,
    pub depth: Extent,
    pub batch: Extent,
}

impl Contraction {
    /// The sizes of a `matmul` node.
    pub fn of(graph: &Graph, node: &Node) -> Contraction {
        let [x, y] = [0, 1].map(|i| graph.ty(node.operands[i]));
        let (axes_x, axes_y) = Axes::of_product(&node.op, x, y);
        let size = |ty: &Type, axes: &Range<usize>| dims_product(&ty.shape[axes.clone()]);
        let [m, depth, batch] = [&axes_x.i, &axes_x.k, &axes_x.batch].map(|axes| size(x, axes));
        Contraction { m, n: size(y, &axes_y.i), depth, batch }
    }

    /// The number of the result's columns, if it is a constant.
    pub fn columns(&self) -> Option<u64> {
        if let Extent::Const(n) = self.n { Some(n) } else { None }
    }
}

/// The ranges of an operand's axes that the product treats as one axis each: batch, i (rows of x or the result, columns
/// of y) and k.
pub struct Axes {
    pub batch: Range<usize>,
    pub i: Range<usize>,
    pub k: Range<usize>,
}

impl Axes {
    /// The axes of an operand or a result with `lead` batch axes; in a transposed one, i is the last axis.
    fn of(ty: &Type, lead: usize, transposed: bool) -> Axes {
        let (row, column) = (ty.rank() - 2..ty.rank() - 1, ty.rank() - 1..ty.rank());
        let (i, k) = if transposed { (column, row) } else { (row, column) };
        Axes { batch: 0..lead, i, k }
    }

    /// If y has no batch axes, the leading axes of x are merged into its rows.
    fn merge_leading_into_rows(self, x: &Type, y: &Type) -> Axes {
        if y.rank() < x.rank() { Axes { i: 0..self.i.end, ..self } } else { self }
    }

    /// The axes of the operands of a `matmul`.
    pub fn of_product(op: &Op, x: &Type, y: &Type) -> (Axes, Axes) {
        let Op::Matmul { transpose_x, transpose_y } = op else { unreachable!("only a `matmul` has product axes") };
        let lead = y.rank() - 2;
        (Axes::of(x, lead, *transpose_x).merge_leading_into_rows(x, y), Axes::of(y, lead, !transpose_y))
    }

    /// The axes of the result of a `matmul`.
    pub fn of_result(result: &Type, x: &Type, y: &Type) -> Axes {
        Axes::of(result, y.rank() - 2, false).merge_leading_into_rows(x, y)
    }
}

/// The strides of a view as a gemm operand; `None` if axes that the product merges have no common stride.
pub fn operand(view: &View, Axes { batch, i, k }: &Axes) -> Option<Operand> {
    let [batch_stride, row_stride, k_stride] = [batch, i, k].map(|axes| view.merged_stride(axes.clone()));
    let (batch_stride, row_stride, k_stride) = (batch_stride?, row_stride?, k_stride?);
    let contiguous = row_stride == UNIT_STRIDE && (k_stride != UNIT_STRIDE || i.start > k.start);
    let [batch_stride, row_stride, k_stride] = [batch_stride, row_stride, k_stride].map(|step| step.extent());
    Some(Operand { batch_stride, row_stride, k_stride, offset: view.offset.clone(), contiguous })
}
