//! Attention whose square exists nowhere ([`crate::kernels::attention`]): how its operands and results lie.

use peft_grammar::graph::{Dim, Node, Op, Value};
use peft_grammar::names::Input;
use peft_runtime::artifact::{BufferId, Extent, Storage};

use super::entry::Turn;
use super::schedule::{self, Square};
use super::sizes::dim_extent;
use super::view::{ONE, Step, View};
use crate::kernels::attention::cpu::{CpuAttention, RoomBuffers, SLACK, beside};
use crate::kernels::attention::gpu::{BlockSizes, GpuAttention, KindSizes, TILE};
use crate::kernels::attention::shape::{Form, HeadSizes, Lie, Part};
use crate::kernels::philox;
use crate::target::cuda::WARPS;

impl Turn<'_, '_, '_, '_> {
    /// Operands begin with the queries and the keys; what comes third is as wide as the values.
    pub(super) fn flash(&mut self, Node { op, operands, results, .. }: &Node) {
        let part = match *op {
            Op::Attention { .. } => Part::Forward,
            Op::AttentionAndLse { .. } => Part::Both,
            Op::AttentionLse { .. } => Part::Lse,
            Op::AttentionVjp { of, .. } => Part::Adjoint(of),
            Op::AttentionVjpSides { .. } => Part::Sides,
            Op::AttentionVjpAll { .. } => Part::All,
            _ => unreachable!("asked of attention alone"),
        };
        let (causal, scale, p, stream, column) = match op.joins()[0] {
            Op::Attention { causal, scale, p, stream, column }
            | Op::AttentionVjp { causal, scale, p, stream, column, .. } => (causal, scale, p, stream, column),
            Op::AttentionLse { causal, scale } => (causal, scale, 0.0, 0, 0),
            _ => unreachable!("asked of attention alone"),
        };
        let form = Form { causal, scale: scale.into(), p: p.into(), fours: self.in_fours(operands) };
        let [query, value] = [operands[0], *operands.get(2).unwrap_or(&operands[0])].map(|v| &self.ty(v).shape);
        let (heads, width, wide) = (dim_extent(query[0]), dim_extent(query[2]), dim_extent(value[2]));
        let floats = operands.len() - usize::from(form.drops());
        // What counts units: a processor's heads of a sequence are neighbours, as they are in memory.
        let square = schedule::square(self.module.machine);
        let count = match square {
            Square::Rows => heads.clone(),
            Square::Tiles => Extent::Sequences,
        };
        let [stream, column] = [u64::from(stream), column].map(Extent::Const);
        let mut sizes = HeadSizes { width: width.clone(), wide: wide.clone(), count, stream, column }.list();
        let mut lie = |view: &View| {
            let [head, line] = [0, 1].map(|axis| view.steps[axis].extent());
            sizes.extend(Lie { first: view.first.clone(), head, line }.list());
        };
        for (i, &operand) in operands[..floats].iter().enumerate() {
            // A number a row is read along the tokens, anything else along a head.
            let along = if matches!(i, 3 | 5) { 1..3 } else { 2..3 };
            if self.view(operand).along(along) != Some(ONE) {
                self.dense(operand);
            }
            lie(&self.view(operand));
        }
        let mut buffers: Vec<BufferId> = operands.iter().map(|&v| self.place(v).buffer).collect();
        for &value in results {
            // The log-sum-exp is a number a row.
            let (buffer, view) = match self.ty(value).last() {
                Some(Dim::Const(1)) => (self.result(value), self.view(value)),
                _ => self.target(value),
            };
            buffers.push(buffer);
            lie(&view);
        }
        let offsets = self.module.derived(Input::Offsets);
        if square == Square::Tiles {
            let [width, wide] = [query[2], value[2]].map(|n| n.constant().expect("of a head"));
            let columns = match part {
                Part::Lse => 1,
                Part::Adjoint(0 | 1) => width,
                Part::Forward | Part::Both | Part::Adjoint(_) => wide,
                Part::Sides | Part::All => width.max(wide),
            };
            let panels = Extent::Const(columns.div_ceil(TILE));
            let units = heads * panels.clone() * blocks();
            if part == Part::All {
                sizes.extend(KindSizes { each: units.clone() }.list());
            }
            sizes.extend(BlockSizes { blocks: blocks(), panels }.list());
            buffers.push(offsets);
            let sides = if part == Part::All { 2 } else { 1 };
            let units = units * Extent::Const(sides * WARPS);
            self.launch(GpuAttention { part, form }, buffers, sizes, units);
            return;
        }
        // Room for every sequence, its length rounded up.
        let places = heads.clone() * (Extent::Tokens + Extent::Const(SLACK) * Extent::Sequences);
        let place = |width: Extent| vec![places.clone() * width];
        let first = self.scratch(place(width.clone()));
        let second = self.scratch(place(wide.clone()));
        // What the weights multiply: a side that is transposed as well, or one that is not.
        let factor = if part.gives(1) { self.scratch(place(width)) } else { first };
        let other = if part.gives(2) { self.scratch(place(wide)) } else { second };
        let rows = self.scratch(place(Extent::Const(beside(part, self.module.machine))));
        buffers.extend(RoomBuffers { first, second, factor, other, rows, offsets }.list());
        self.launch(CpuAttention { part, form }, buffers, sizes, heads * Extent::Sequences);
    }

    /// A GPU may read these rows in fours, as far as they are wide.
    fn in_fours(&self, operands: &[Value]) -> bool {
        let mut tensors = operands.iter().enumerate().filter(|(i, _)| matches!(i, 0 | 1 | 2 | 4)).map(|(_, &v)| v);
        schedule::square(self.module.machine) == Square::Tiles
            && tensors.all(|value| {
                let (view, ty) = (self.view(value), self.ty(value));
                let own = matches!(self.module.buffers[self.place(value).buffer].storage, Storage::Temporary);
                let steps = view.steps[..2].iter().map(Step::extent);
                own && steps.chain([view.first.clone(), dim_extent(ty.shape[2])]).all(|extent| fours(&extent))
            })
    }
}

/// Whether it is a multiple of four, whatever the batch.
fn fours(extent: &Extent) -> bool {
    match extent {
        Extent::Const(n) => n.is_multiple_of(4),
        Extent::Add(x, y) => fours(x) && fours(y),
        Extent::Mul(x, y) => fours(x) || fours(y),
        _ => false,
    }
}

/// Blocks of a head, at most: a sequence has room for its slots.
fn blocks() -> Extent {
    let slots = Extent::Tokens + Extent::Const(philox::EACH) * Extent::Sequences;
    Extent::CeilDiv(Box::new(slots), TILE) + Extent::Sequences
}
