//! Element types, and shapes as extents: expressions over the batch's sizes.

use peft_grammar::graph::{DType, Dim, Type};
use peft_runtime::artifact::{Element, Extent};

/// The element type of a buffer for values of this type.
pub fn element(ty: &Type) -> Element {
    match ty.dtype {
        DType::F32 => Element::F32,
        DType::I32 => Element::I32,
    }
}

/// The size of one axis. A ragged axis `keys+c` gives the elements of `[tokens, keys+c]`.
pub fn dim_extent(dim: Dim) -> Extent {
    match dim {
        Dim::Const(n) => Extent::Const(n),
        Dim::Tokens => Extent::Tokens,
        Dim::Sequences => Extent::Sequences,
        Dim::Targets => Extent::Targets,
        Dim::Values => Extent::Values,
        // It includes the tokens axis before it.
        Dim::Keys(extra) => ragged_elements(extra),
    }
}

/// The product of the sizes of some axes.
pub fn dims_product(dims: &[Dim]) -> Extent {
    dims.iter().fold(Extent::Const(1), |product, &d| product * dim_extent(d))
}

/// The number of elements of a value of this type.
pub fn element_count(ty: &Type) -> Extent {
    extents(ty).into_iter().fold(Extent::Const(1), |product, e| product * e)
}

/// The sizes of all axes; a ragged tail `tokens,keys+c` counts as one axis.
pub fn extents(ty: &Type) -> Vec<Extent> {
    match ty.shape.last() {
        Some(Dim::Keys(extra)) => {
            let lead = &ty.shape[..ty.shape.len() - 2];
            lead.iter().map(|&d| dim_extent(d)).chain([ragged_elements(*extra)]).collect()
        }
        _ => ty.shape.iter().map(|&d| dim_extent(d)).collect(),
    }
}

/// The number of elements of one ragged matrix `[tokens, keys+extra]`.
pub fn ragged_elements(extra: u64) -> Extent {
    match extra {
        0 => Extent::Pairs,
        _ => Extent::Pairs + Extent::Const(extra) * Extent::Tokens,
    }
}
