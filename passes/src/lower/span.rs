//! Rows along the last axis, dense or ragged.

use peft_grammar::graph::{Dim, Type};
use peft_grammar::names::Input;
use peft_runtime::artifact::{BufferId, Extent};

use super::module::Module;
use super::sizes::{extent, lead_size, product};
use crate::kernels::span::RowSizes;

/// How the rows of a tensor lie.
#[derive(Clone, Debug)]
pub enum Rows {
    Dense(Extent),
    Ragged(u64),
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

    /// How many rows there are.
    pub fn count(ty: &Type) -> Extent {
        match ty.shape.split_last() {
            Some((_, lead)) => product(lead),
            None => extent(ty),
        }
    }

    pub fn sizes(&self) -> RowSizes<Extent> {
        match self {
            Rows::Dense(length) => RowSizes { length: length.clone(), extra: Extent::Const(0), lead: Extent::Const(0) },
            Rows::Ragged(extra) => {
                RowSizes { length: Extent::Tokens, extra: Extent::Const(*extra), lead: lead_size(*extra) }
            }
        }
    }

    /// The buffer it wants beside: the rows' places, when they are ragged.
    pub fn places(&self, module: &mut Module) -> Option<BufferId> {
        self.ragged().then(|| module.derived(Input::Pairs))
    }
}
