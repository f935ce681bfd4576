//! Rows along the last axis, dense or ragged: where row `r` begins and how long it is.

use peft_grammar::graph::{Dim, Type};
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::{Target, extent, lead_size, product};
use crate::builder::{Buf, Kernel, Val};

/// How the rows of a tensor lie.
#[derive(Clone, Debug)]
pub enum Rows {
    Dense(Extent),
    Ragged(u64),
}

/// One row: its first element, and how many there are.
#[derive(Clone, Copy)]
pub struct Span {
    pub base: Val,
    pub length: Val,
}

impl Rows {
    pub fn of(ty: &Type) -> Rows {
        match ty.shape.last() {
            Some(Dim::Keys(extra)) => Rows::Ragged(*extra),
            Some(&last) => Rows::Dense(product(&[last])),
            None => Rows::Dense(Extent::Const(1)),
        }
    }

    pub fn ragged(&self) -> bool {
        matches!(self, Rows::Ragged(_))
    }

    /// For kernels' names.
    pub fn kind(&self) -> &'static str {
        if self.ragged() { "ragged" } else { "dense" }
    }

    /// How many rows there are.
    pub fn count(ty: &Type) -> Extent {
        match ty.shape.split_last() {
            Some((_, lead)) => product(lead),
            None => extent(ty),
        }
    }

    /// The sizes [`Rows::span`] wants: always three.
    pub fn sizes(&self) -> [Extent; 3] {
        match self {
            Rows::Dense(length) => [length.clone(), Extent::Const(0), Extent::Const(0)],
            Rows::Ragged(extra) => [Extent::Tokens, Extent::Const(*extra), lead_size(*extra)],
        }
    }

    /// The buffer it wants beside: the rows' places, when they are ragged.
    pub fn places(&self, target: &mut Target) -> Option<BufferId> {
        self.ragged().then(|| target.derived("pairs"))
    }

    pub fn elements(&self) -> Option<Element> {
        self.ragged().then_some(Element::I32)
    }

    pub fn span(k: &mut Kernel, row: Val, sizes: &[Val], pairs: Option<Buf>) -> Span {
        let Some(pairs) = pairs else {
            return Span { base: k.mul(row, sizes[0]), length: sizes[0] };
        };
        let [tokens, extra, lead_size] = [sizes[0], sizes[1], sizes[2]];
        let (lead, i) = (k.div(row, tokens), k.rem(row, tokens));
        let one = k.index(1);
        let next = k.add(i, one);
        let (from, to) = (k.load_index(pairs, i), k.load_index(pairs, next));
        let lead = k.mul(lead, lead_size);
        let extras = k.mul(extra, i);
        let base = k.add(lead, from);
        let base = k.add(base, extras);
        let keys = k.sub(to, from);
        Span { base, length: k.add(keys, extra) }
    }
}
