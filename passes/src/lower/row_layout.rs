//! The layout of a tensor's rows along its last axis: dense, or ragged.

use peft_grammar::graph::{Dim, Type};
use peft_grammar::names::Input;
use peft_runtime::artifact::{BufferId, Extent};

use super::module::Module;
use super::sizes::{dims_product, element_count, ragged_elements};
use crate::kernels::span::RowSizes;

/// The layout of a tensor's rows.
#[derive(Clone, Debug)]
pub enum RowLayout {
    /// All rows have this length.
    Dense(Extent),
    /// The row of a token is as long as its sequence, plus this number of columns in front.
    Ragged(u64),
}

impl RowLayout {
    /// The layout of a row-major tensor of this type.
    pub fn of(ty: &Type) -> RowLayout {
        match ty.shape.last() {
            Some(Dim::Keys(extra)) => RowLayout::Ragged(*extra),
            Some(&last) => RowLayout::Dense(dims_product(&[last])),
            None => RowLayout::Dense(Extent::Const(1)),
        }
    }

    pub fn is_ragged(&self) -> bool {
        matches!(self, RowLayout::Ragged(_))
    }

    /// The number of rows.
    pub fn count(ty: &Type) -> Extent {
        match ty.shape.split_last() {
            Some((_, lead)) => dims_product(lead),
            None => element_count(ty),
        }
    }

    /// The size arguments by which a kernel finds its rows.
    pub fn sizes(&self) -> RowSizes<Extent> {
        match self {
            RowLayout::Dense(length) => {
                RowSizes { length: length.clone(), extra: Extent::Const(0), lead: Extent::Const(0) }
            }
            RowLayout::Ragged(extra) => {
                RowSizes { length: Extent::Tokens, extra: Extent::Const(*extra), lead: ragged_elements(*extra) }
            }
        }
    }

    /// The extra buffer that a kernel over ragged rows needs: the offset of each row. Dense rows need none.
    pub fn row_offsets(&self, module: &mut Module) -> Option<BufferId> {
        self.is_ragged().then(|| module.derived_input(Input::Pairs))
    }
}
