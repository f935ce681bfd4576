//! Products of few columns and many steps on a GPU, into a bottleneck above all ([`crate::kernels::gemm::skinny`]).

use peft_runtime::artifact::{BufferId, Extent};

use super::entry::Turn;
use super::epilogue::Following;
use super::problem::Contraction;
use super::tiles::{Side, To};
use crate::kernels::gemm::skinny::{Buffers, ROWS, Sizes, Skinny, Tile};
use crate::target::cuda::WARPS;

impl Turn<'_, '_, '_, '_> {
    pub(super) fn launch_narrow(
        &mut self,
        tile: Tile,
        Contraction { m, n, depth, .. }: Contraction,
        (a, left): (BufferId, Side),
        (b, right): (BufferId, Side),
        to: To,
    ) {
        let tiles = |n: &Extent, side| Extent::CeilDiv(Box::new(n.clone()), side);
        let across = tiles(&n, tile.columns);
        let units = tiles(&m, ROWS) * across.clone() * Extent::Const(WARPS);
        let sizes = Sizes {
            m,
            n,
            depth,
            across,
            along_a: left.along,
            deep_a: left.deep,
            first_a: left.first,
            along_b: right.along,
            deep_b: right.deep,
            first_b: right.first,
            line_c: to.line,
            first_c: to.first,
        };
        let Following { epilogue, buffers, sizes: follows, .. } = to.following;
        self.label = epilogue.label(&self.label);
        let buffers = [Buffers { a, b, c: to.buffer }.list(), buffers].concat();
        let sizes = [sizes.list(), follows].concat();
        self.launch(Skinny { tile, contiguous: right.contiguous, fate: to.fate, epilogue }, buffers, sizes, units);
    }
}
