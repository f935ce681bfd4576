//! Strided views of buffers. The operations that only move elements, `slice`, `reshape` and `permute`, make another
//! view of the same buffer.
//!
//! ```text
//! qkv [tokens, 3·768] ─slice─► [tokens, 768] ─reshape─► [tokens, 12, 64] ─permute─► [12, tokens, 64]
//! strides [2304, 1]            [2304, 1]                [2304, 64, 1]               [64, 2304, 1]
//! ```

use std::ops::Range;

use peft_grammar::graph::Dim;
use peft_runtime::artifact::Extent;

use super::sizes::dims_product;

/// A stride in elements: a constant factor times symbolic sizes of the batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stride {
    factor: u64,
    dims: Vec<Dim>,
}

/// The stride of neighbouring elements.
pub const UNIT_STRIDE: Stride = Stride { factor: 1, dims: vec![] };

impl Stride {
    /// The stride over a whole axis of size `dim` whose own stride is `self`.
    fn times(&self, dim: Dim) -> Stride {
        let mut whole = self.clone();
        match dim {
            Dim::Const(n) => whole.factor *= n,
            dim => {
                whole.dims.push(dim);
                whole.dims.sort_by_key(Dim::to_string);
            }
        }
        whole
    }

    /// The stride as an expression over the batch's sizes.
    pub fn extent(&self) -> Extent {
        dims_product(&self.dims) * Extent::Const(self.factor)
    }
}

/// The element with index i of a value of `shape` is at `offset + Σₐ iₐ · stridesₐ`. A ragged tail `tokens,keys+c`
/// counts as one axis, `keys+c`.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    pub shape: Vec<Dim>,
    pub strides: Vec<Stride>,
    pub offset: Extent,
}

impl View {
    /// The row-major view without gaps.
    pub fn dense(shape: &[Dim]) -> View {
        let shape = merge_ragged_tail(shape);
        let mut strides = vec![UNIT_STRIDE; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis].times(shape[axis]);
        }
        View { shape, strides, offset: Extent::Const(0) }
    }

    /// The view is row-major from the first element of its buffer on.
    pub fn is_dense(&self) -> bool {
        self.same_layout(&View::dense(&self.shape))
    }

    /// Both views have the same elements at the same addresses. The stride of an axis of one element does not matter.
    pub fn same_layout(&self, other: &View) -> bool {
        let strides = |view: &View| view.nontrivial_axes().map(|axis| view.strides[axis].clone()).collect::<Vec<_>>();
        self.shape == other.shape && self.offset == other.offset && strides(self) == strides(other)
    }

    /// The axes that have more than one element.
    pub fn nontrivial_axes(&self) -> impl DoubleEndedIterator<Item = usize> {
        (0..self.shape.len()).filter(|&axis| self.shape[axis] != Dim::Const(1))
    }

    /// The elements from `start` on, `length` of them, along `axis`.
    pub fn slice(mut self, axis: usize, start: u64, length: Dim) -> View {
        self.offset = self.offset + self.strides[axis].times(Dim::Const(start)).extent();
        self.shape[axis] = length;
        self
    }

    /// The same elements with their axes in the given order.
    pub fn permute(&self, axes: &[usize]) -> View {
        let strides = axes.iter().map(|&a| self.strides[a].clone()).collect();
        View { shape: axes.iter().map(|&a| self.shape[a]).collect(), strides, offset: self.offset.clone() }
    }

    /// The same elements in another shape; `None` if that would merge axes that have no common stride.
    pub fn reshape(&self, shape: &[Dim]) -> Option<View> {
        let shape = merge_ragged_tail(shape);
        let mut strides = vec![UNIT_STRIDE; shape.len()];
        let mut from = self.nontrivial_axes();
        let mut to = (0..shape.len()).filter(|&axis| shape[axis] != Dim::Const(1));
        // Matches runs of old axes with runs of new axes that have the same number of elements.
        while let Some(start) = from.next() {
            let (mut end, mut whole) = (start + 1, UNIT_STRIDE.times(self.shape[start]));
            let mut run = vec![to.next()?];
            let mut parts = UNIT_STRIDE.times(shape[run[0]]);
            while whole != parts {
                if (whole.dims.len(), whole.factor) < (parts.dims.len(), parts.factor) {
                    let axis = from.next()?;
                    (end, whole) = (axis + 1, whole.times(self.shape[axis]));
                } else {
                    let axis = to.next()?;
                    run.push(axis);
                    parts = parts.times(shape[axis]);
                }
            }
            let mut step = self.merged_stride(start..end)?;
            for axis in run.into_iter().rev() {
                strides[axis] = step.clone();
                step = step.times(shape[axis]);
            }
        }
        let whole = to.next().is_none();
        whole.then_some(View { shape, strides, offset: self.offset.clone() })
    }

    /// The stride of the single axis that `axes` merge into; `None` if they have no common stride.
    pub fn merged_stride(&self, axes: Range<usize>) -> Option<Stride> {
        let mut long = self.nontrivial_axes().filter(|axis| axes.contains(axis)).rev();
        let Some(mut outer) = long.next() else { return Some(UNIT_STRIDE) };
        let inner = self.strides[outer].clone();
        for axis in long {
            if self.strides[outer].times(self.shape[outer]) != self.strides[axis] {
                return None;
            }
            outer = axis;
        }
        Some(inner)
    }

    /// The last axis with more than one element has stride 1.
    pub fn has_contiguous_rows(&self) -> bool {
        self.nontrivial_axes().next_back().is_none_or(|axis| self.strides[axis] == UNIT_STRIDE)
    }
}

/// The shape with a ragged tail `tokens,keys+c` as one axis.
fn merge_ragged_tail(shape: &[Dim]) -> Vec<Dim> {
    match shape {
        [lead @ .., Dim::Tokens, keys @ Dim::Keys(_)] => [lead, &[*keys]].concat(),
        dense => dense.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Dim::{Const, Tokens};

    #[test]
    fn reshape_merges_axes_only_with_a_common_stride() {
        let wide = View::dense(&[Tokens, Const(30)]);
        let heads =
            wide.clone().slice(1, 12, Const(12)).reshape(&[Tokens, Const(3), Const(4)]).expect("one axis split");
        let heads = heads.permute(&[1, 0, 2]);
        let by = |by| Stride { factor: by, dims: vec![] };
        assert_eq!((&heads.strides[..], &heads.offset), (&[by(4), by(30), by(1)][..], &Extent::Const(12)));
        assert!(heads.has_contiguous_rows() && !heads.is_dense());
        // Heads and tokens have no common stride, and neither have tokens and a head's width, as the other heads are
        // between.
        assert_eq!(heads.merged_stride(0..2), None);
        assert_eq!(heads.reshape(&[Const(3), Const(2), Tokens, Const(2)]), None);
        let back = heads.permute(&[1, 0, 2]).reshape(&[Tokens, Const(12)]).expect("as they were");
        assert!(back.same_layout(&wide.slice(1, 12, Const(12))));
        let own = View::dense(&[Const(3), Tokens, Const(4)]);
        assert_eq!(own.permute(&[1, 0, 2]).reshape(&[Tokens, Const(12)]), None);
        assert!(own.reshape(&[Const(1), Const(3), Tokens, Const(2), Const(2)]).is_some_and(|v| v.is_dense()));
    }
}
