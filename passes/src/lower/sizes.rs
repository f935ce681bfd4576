//! Types and shapes as elements and extents.

use peft_grammar::graph::{DType, Dim, Type};
use peft_runtime::artifact::{Element, Extent};

pub fn element(ty: &Type) -> Element {
    match ty.dtype {
        DType::F32 => Element::F32,
        DType::I32 => Element::I32,
    }
}

pub fn dim_extent(dim: Dim) -> Extent {
    match dim {
        Dim::Const(n) => Extent::Const(n),
        Dim::Tokens => Extent::Tokens,
        Dim::Sequences => Extent::Sequences,
        Dim::Targets => Extent::Targets,
        Dim::Values => Extent::Values,
        // With the tokens before it.
        Dim::Keys(extra) => lead_size(extra),
    }
}

pub fn product(dims: &[Dim]) -> Extent {
    dims.iter().fold(Extent::Const(1), |product, &d| product * dim_extent(d))
}

/// All elements of a type.
pub fn extent(ty: &Type) -> Extent {
    extents(ty).into_iter().fold(Extent::Const(1), |product, e| product * e)
}

/// Axis by axis; a ragged tail `tokens,keys+c` counts as one axis.
pub fn extents(ty: &Type) -> Vec<Extent> {
    match ty.shape.last() {
        Some(Dim::Keys(extra)) => {
            let lead = &ty.shape[..ty.shape.len() - 2];
            lead.iter().map(|&d| dim_extent(d)).chain([lead_size(*extra)]).collect()
        }
        _ => ty.shape.iter().map(|&d| dim_extent(d)).collect(),
    }
}

/// Elements of one `[tokens, keys+extra]`.
pub fn lead_size(extra: u64) -> Extent {
    match extra {
        0 => Extent::Pairs,
        _ => Extent::Pairs + Extent::Const(extra) * Extent::Tokens,
    }
}
