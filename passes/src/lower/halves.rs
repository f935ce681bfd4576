//! Products with frozen weights in half precision, by a GPU's tensor cores ([`crate::kernels::gemm::mma`]): who packs them,
//! and who rounds what they multiply.

use peft_grammar::graph::Value;
use peft_runtime::artifact::{BufferId, Element, Extent, Storage};

use super::entry::{Place, Turn};
use super::sizes::extents;
use crate::builder::mma::Half;
use crate::kernels::gemm::Operand;
use crate::kernels::gemm::mma::{COLUMNS, DEPTH, EACH, Pack, PackBuffers, PackSizes, Round, RoundSizes, TILE};
use crate::target::cuda::WARP;

impl Turn<'_, '_, '_, '_> {
    /// The rows of A may be read in fours: they begin at multiples of four, and so do they end.
    pub(super) fn rows_in_fours(&self, a: BufferId, left: &Operand, depth: &Extent) -> bool {
        let multiple = |extent: &Extent| matches!(extent, Extent::Const(n) if n.is_multiple_of(4));
        let whole = matches!(self.module.buffers[a].storage, Storage::Temporary | Storage::Prepared);
        whole && [&left.along, &left.first, depth].into_iter().all(multiple)
    }

    /// Room for rows in half precision, two numbers a word, and from row to row: rows are at multiples of four words.
    fn room_for_halves(&mut self, m: &Extent, depth: &Extent) -> (BufferId, Extent) {
        let line = Extent::CeilDiv(Box::new(depth.clone()), 8) * Extent::Const(4);
        (self.module.buffer(Element::I32, vec![m.clone(), line.clone()], Storage::Temporary), line)
    }

    /// Room for a value of [`super::dispatch::Facts::rounds`].
    pub(super) fn room_rounded(&mut self, value: Value) -> BufferId {
        let shape = extents(self.ty(value));
        let (buffer, line) = self.room_for_halves(&shape[0], &shape[1]);
        self.rounded.insert(value, (buffer, line));
        buffer
    }

    /// A as products read it: from sm_80 on rounded, which is there if what made `x` has rounded it.
    pub(super) fn rounded(
        &mut self,
        half: Half,
        (m, depth): (&Extent, &Extent),
        (a, left): (BufferId, Operand),
        x: Option<Value>,
    ) -> (BufferId, Operand) {
        if half == Half::F16 {
            return (a, left);
        }
        let known = x.and_then(|x| self.rounded.get(&x)).cloned();
        let (buffer, line) = known.unwrap_or_else(|| {
            let (to, line) = self.room_for_halves(m, depth);
            let fours = self.rows_in_fours(a, &left, depth);
            let pieces = Extent::CeilDiv(Box::new(depth.clone()), EACH * WARP);
            let units = m.clone() * pieces.clone();
            let (along, start) = (left.along.clone(), left.first.clone());
            let sizes = RoundSizes { depth: depth.clone(), pieces, line: line.clone(), along, start }.list();
            let buffers = PackBuffers { from: a, to }.list();
            self.labelled("round").launch(Round { half, fours }, buffers, sizes, units);
            (to, line)
        });
        (buffer, Operand { along: line, first: Extent::Const(0), ..left })
    }

    /// A frozen operand's tiles: the same ones if it has been packed before. `n` and `depth` are all of it.
    pub(super) fn pack_halves(
        &mut self,
        half: Half,
        place: &Place,
        side: &Operand,
        (n, depth): (Extent, Extent),
    ) -> Packed {
        let source = place.frozen.as_ref().expect("only what is frozen is packed");
        let key = format!("halves({source}, {} of {side:?}, {n:?} {depth:?})", half.name());
        let tiles = |n: &Extent, size| Extent::CeilDiv(Box::new(n.clone()), size);
        let deep = tiles(&depth, DEPTH);
        let units = tiles(&n, COLUMNS) * deep.clone();
        let line = deep.clone() * Extent::Const(TILE);
        let known = self.module.bound.get(&key).copied();
        let buffer = known.unwrap_or_else(|| {
            let shape = vec![units.clone() * Extent::Const(TILE)];
            let buffer = self.module.bind(&key, Element::I32, shape, Storage::Prepared);
            let (along, start) = (side.along.clone(), side.first.clone());
            let sizes = PackSizes { n, depth, tiles: deep, along, deep: side.deep.clone(), start }.list();
            let buffers = PackBuffers { from: place.buffer, to: buffer }.list();
            self.packing(Some(&key)).launch(Pack { half }, buffers, sizes, units);
            buffer
        });
        Packed { buffer, line, first: Extent::Const(0) }
    }
}

/// A packed operand, of which a product may take some.
pub(super) struct Packed {
    buffer: BufferId,
    /// Words from one row of tiles along k to the next.
    line: Extent,
    first: Extent,
}

impl Packed {
    /// From a column, or from a step of k on: a multiple of a tile's.
    pub fn from(self, column: u64, step: u64) -> Packed {
        assert!(column.is_multiple_of(COLUMNS) && step.is_multiple_of(DEPTH));
        let first = self.line.clone() * Extent::Const(column / COLUMNS) + Extent::Const(step / DEPTH * TILE);
        Packed { first, ..self }
    }

    /// As a product has it, tile by tile.
    pub fn operand(self) -> (BufferId, Operand) {
        let Packed { buffer, line, first } = self;
        let (area, deep) = (Extent::Const(0), Extent::Const(TILE));
        (buffer, Operand { area, along: line, deep, first, contiguous: true })
    }
}
