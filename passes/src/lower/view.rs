//! Where the elements of a value lie in its buffer: an affine view of it. What only moves elements, `slice`, `reshape`,
//! `permute`, makes another view of the same buffer.
//!
//! ```text
//! qkv [tokens, 3·768] ─slice─► [tokens, 768] ─reshape─► [tokens, 12, 64] ─permute─► [12, tokens, 64]
//! strides [2304, 1]            [2304, 1]                [2304, 64, 1]               [64, 2304, 1]
//! ```

use std::ops::Range;

use peft_grammar::graph::Dim;
use peft_runtime::artifact::Extent;

use super::sizes::product;

/// A distance in elements: a number times sizes of the batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    by: u64,
    of: Vec<Dim>,
}

pub const ONE: Step = Step { by: 1, of: vec![] };

impl Step {
    /// Over a whole axis, from one element to the next by `self`.
    fn over(&self, dim: Dim) -> Step {
        let mut whole = self.clone();
        match dim {
            Dim::Const(n) => whole.by *= n,
            dim => {
                whole.of.push(dim);
                whole.of.sort_by_key(Dim::to_string);
            }
        }
        whole
    }

    pub fn extent(&self) -> Extent {
        product(&self.of) * Extent::Const(self.by)
    }
}

/// Element i of a value of `shape` lies at `first + Σ iₐ · stepsₐ`. A ragged tail `tokens,keys+c` is one axis, `keys+c`.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    pub shape: Vec<Dim>,
    pub steps: Vec<Step>,
    pub first: Extent,
}

impl View {
    /// Row-major, without gaps.
    pub fn dense(shape: &[Dim]) -> View {
        let shape = flat(shape);
        let mut steps = vec![ONE; shape.len()];
        for axis in (1..shape.len()).rev() {
            steps[axis - 1] = steps[axis].over(shape[axis]);
        }
        View { shape, steps, first: Extent::Const(0) }
    }

    pub fn is_dense(&self) -> bool {
        self.alike(&View::dense(&self.shape))
    }

    /// The same elements in the same places; along an axis of one element there is no step.
    pub fn alike(&self, other: &View) -> bool {
        let steps = |view: &View| view.long().map(|axis| view.steps[axis].clone()).collect::<Vec<_>>();
        self.shape == other.shape && self.first == other.first && steps(self) == steps(other)
    }

    /// Axes of more than one element.
    pub fn long(&self) -> impl DoubleEndedIterator<Item = usize> {
        (0..self.shape.len()).filter(|&axis| self.shape[axis] != Dim::Const(1))
    }

    pub fn slice(mut self, axis: usize, start: u64, length: Dim) -> View {
        self.first = self.first + self.steps[axis].over(Dim::Const(start)).extent();
        self.shape[axis] = length;
        self
    }

    pub fn permute(&self, axes: &[usize]) -> View {
        let steps = axes.iter().map(|&a| self.steps[a].clone()).collect();
        View { shape: axes.iter().map(|&a| self.shape[a]).collect(), steps, first: self.first.clone() }
    }

    /// `None` where axes would become one that do not follow each other in memory.
    pub fn reshape(&self, shape: &[Dim]) -> Option<View> {
        let shape = flat(shape);
        let mut steps = vec![ONE; shape.len()];
        let mut from = self.long();
        let mut to = (0..shape.len()).filter(|&axis| shape[axis] != Dim::Const(1));
        // Runs of axes that hold the same elements on both sides.
        while let Some(start) = from.next() {
            let (mut end, mut whole) = (start + 1, ONE.over(self.shape[start]));
            let mut run = vec![to.next()?];
            let mut parts = ONE.over(shape[run[0]]);
            while whole != parts {
                if (whole.of.len(), whole.by) < (parts.of.len(), parts.by) {
                    let axis = from.next()?;
                    (end, whole) = (axis + 1, whole.over(self.shape[axis]));
                } else {
                    let axis = to.next()?;
                    run.push(axis);
                    parts = parts.over(shape[axis]);
                }
            }
            let mut step = self.along(start..end)?;
            for axis in run.into_iter().rev() {
                steps[axis] = step.clone();
                step = step.over(shape[axis]);
            }
        }
        let whole = to.next().is_none();
        whole.then_some(View { shape, steps, first: self.first.clone() })
    }

    /// The step of the one axis that these are together; `None` where they do not follow each other in memory.
    pub fn along(&self, axes: Range<usize>) -> Option<Step> {
        let mut long = self.long().filter(|axis| axes.contains(axis)).rev();
        let Some(mut outer) = long.next() else { return Some(ONE) };
        let inner = self.steps[outer].clone();
        for axis in long {
            if self.steps[outer].over(self.shape[outer]) != self.steps[axis] {
                return None;
            }
            outer = axis;
        }
        Some(inner)
    }

    /// Elements of the last axis that has more than one stand side by side.
    pub fn runs(&self) -> bool {
        self.long().next_back().is_none_or(|axis| self.steps[axis] == ONE)
    }
}

fn flat(shape: &[Dim]) -> Vec<Dim> {
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
    fn a_view_follows_until_axes_part() {
        let wide = View::dense(&[Tokens, Const(30)]);
        let heads =
            wide.clone().slice(1, 12, Const(12)).reshape(&[Tokens, Const(3), Const(4)]).expect("one axis split");
        let heads = heads.permute(&[1, 0, 2]);
        let by = |by| Step { by, of: vec![] };
        assert_eq!((&heads.steps[..], &heads.first), (&[by(4), by(30), by(1)][..], &Extent::Const(12)));
        assert!(heads.runs() && !heads.is_dense());
        // Heads and tokens are no one axis; tokens and a head's width neither, for the other heads stand between.
        assert_eq!(heads.along(0..2), None);
        assert_eq!(heads.reshape(&[Const(3), Const(2), Tokens, Const(2)]), None);
        let back = heads.permute(&[1, 0, 2]).reshape(&[Tokens, Const(12)]).expect("as they were");
        assert!(back.alike(&wide.slice(1, 12, Const(12))));
        let own = View::dense(&[Const(3), Tokens, Const(4)]);
        assert_eq!(own.permute(&[1, 0, 2]).reshape(&[Tokens, Const(12)]), None);
        assert!(own.reshape(&[Const(1), Const(3), Tokens, Const(2), Const(2)]).is_some_and(|v| v.is_dense()));
    }
}
