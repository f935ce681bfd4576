//! Attention whose square exists nowhere ([`crate::kernels::attention`]): which parts are one kernel, and how their rows
//! lie.

use peft_grammar::graph::{Dim, Node, Op, Value};
use peft_runtime::artifact::{BufferId, Extent, Storage};

use super::view::{ONE, Step, View};
use super::{Lowering, dim_extent};
use crate::kernels::attention::cpu::{CpuAttention, RoomBuffers, SLACK, beside};
use crate::kernels::attention::gpu::{BlockSizes, GpuAttention, KindSizes, TILE};
use crate::kernels::attention::shape::{Form, HeadSizes, Lie, Part};
use crate::kernels::philox;
use crate::target::Machine;
use crate::target::cuda::WARPS;

impl Lowering<'_, '_, '_> {
    /// `operands` begin with the queries and the keys; what comes third is as wide as the values.
    pub(super) fn flash(
        &mut self,
        part: Part,
        operands: &[Value],
        form: Form,
        (stream, column): (u32, u64),
        result: Value,
    ) {
        let Some((part, results)) = self.with_others(part, operands, form, result) else { return };
        let [query, value] = [operands[0], *operands.get(2).unwrap_or(&operands[0])].map(|v| &self.ty(v).shape);
        let (heads, width, wide) = (dim_extent(query[0]), dim_extent(query[2]), dim_extent(value[2]));
        let floats = operands.len() - usize::from(form.drops());
        // What counts units: a processor's heads of a sequence are neighbours, as they are in memory.
        let count = match self.target.machine {
            Machine::Cpu(_) => heads.clone(),
            Machine::Cuda(_) => Extent::Sequences,
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
        for value in results {
            // The log-sum-exp is a number a row.
            let (buffer, view) = match self.ty(value).last() {
                Some(Dim::Const(1)) => (self.result(value), self.view(value)),
                _ => self.target(value),
            };
            buffers.push(buffer);
            lie(&view);
        }
        let form = Form { fours: self.in_fours(operands), ..form };
        let offsets = self.target.derived("offsets");
        if let Machine::Cuda(_) = self.target.machine {
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
        let rows = self.scratch(place(Extent::Const(beside(part, self.target.machine))));
        buffers.extend(RoomBuffers { first, second, factor, other, rows, offsets }.list());
        self.launch(CpuAttention { part, form }, buffers, sizes, heads * Extent::Sequences);
    }

    /// A GPU may read these rows in fours, as far as they are wide.
    fn in_fours(&self, operands: &[Value]) -> bool {
        let mut tensors = operands.iter().enumerate().filter(|(i, _)| matches!(i, 0 | 1 | 2 | 4)).map(|(_, &v)| v);
        matches!(self.target.machine, Machine::Cuda(_))
            && tensors.all(|value| {
                let (view, ty) = (self.view(value), self.ty(value));
                let own = matches!(self.target.buffers[self.place(value).buffer].storage, Storage::Temporary);
                let steps = view.steps[..2].iter().map(Step::extent);
                own && steps.chain([view.first.clone(), dim_extent(ty.shape[2])]).all(|extent| fours(&extent))
            })
    }

    /// The part with what is computed beside it, as it is made of the same scores, and the results of both; `None` if its
    /// own turn is another's.
    fn with_others(&mut self, part: Part, operands: &[Value], form: Form, result: Value) -> Option<(Part, Vec<Value>)> {
        let of = |at: usize| self.graph.nodes[at].result;
        if let (Part::Adjoint(_), Some(sides)) = (part, self.sides(result)) {
            let [queries, keys, _] = sides;
            if result != of(queries.min(keys)) {
                return None;
            }
            self.joined.extend(sides);
            return Some((Part::All, sides.map(of).into()));
        }
        let beside = match part {
            Part::Forward => self.lse_beside(operands, form).map(|lse| (Part::Both, lse)),
            Part::Adjoint(1) => self.other_side(result).map(|at| (Part::Sides, of(at))),
            Part::Adjoint(2) if self.other_side(result).is_some() => return None,
            _ => None,
        };
        Some(beside.map_or((part, vec![result]), |(both, value)| (both, vec![result, value])))
    }

    /// The log-sum-exp of the same scores, if the entry wants it as well: its turn is then over.
    fn lse_beside(&mut self, operands: &[Value], form: Form) -> Option<Value> {
        let wanted = Op::AttentionLse { causal: form.causal, scale: form.scale.get() };
        let alike = |node: &Node| node.op == wanted && node.operands == operands[..2];
        let at = self.graph.nodes.iter().position(alike)?;
        let lse = self.graph.nodes[at].result;
        let waits = self.places[lse.0 as usize].is_none() && self.frozen.is_none();
        waits.then(|| {
            self.joined.insert(at);
            lse
        })
    }

    /// The adjoint of operand `of` that is made of the same weights as the one at `at`.
    fn adjoint_beside(&self, at: usize, of: usize) -> Option<usize> {
        let nodes = &self.graph.nodes;
        let Op::AttentionVjp { of: own, causal, scale, p, stream, column } = nodes[at].op else { return None };
        let wanted = Op::AttentionVjp { of, causal, scale, p, stream, column };
        // Neither the values nor the corrections have a part in the values' adjoint.
        let apart = |i: usize| matches!(i, 2 | 5) && [own, of].contains(&2);
        let alike = |node: &Node| {
            let mut pairs = node.operands.iter().zip(&nodes[at].operands).enumerate();
            node.op == wanted && pairs.all(|(i, (x, y))| apart(i) || x == y)
        };
        nodes.iter().position(alike)
    }

    /// Of the adjoints of values and of keys the one beside that whose result this is: if the values' comes first, and no
    /// one reads it before the keys'.
    fn other_side(&self, result: Value) -> Option<usize> {
        let nodes = &self.graph.nodes;
        let at = nodes.iter().position(|node| node.result == result)?;
        let Op::AttentionVjp { of: own, .. } = nodes[at].op else { return None };
        let other = self.adjoint_beside(at, 3 - own).filter(|&other| self.adjoint_beside(other, own) == Some(at))?;
        let (values, keys) = if own == 2 { (at, other) } else { (other, at) };
        (values < keys && self.read_after(values, keys)).then_some(other)
    }

    /// The adjoints of queries, keys and values, one of which has this result: if no one reads the values' before the
    /// first of the others.
    fn sides(&self, result: Value) -> Option<[usize; 3]> {
        let at = self.graph.nodes.iter().position(|node| node.result == result)?;
        let beside =
            |at: usize| Some([self.adjoint_beside(at, 0)?, self.adjoint_beside(at, 1)?, self.adjoint_beside(at, 2)?]);
        let sides = beside(at).filter(|sides| sides.iter().all(|&side| beside(side) == Some(*sides)))?;
        let [queries, keys, values] = sides;
        self.read_after(values, queries.min(keys)).then_some(sides)
    }

    /// No one reads the result of node `at` before the `turn` of another.
    fn read_after(&self, at: usize, turn: usize) -> bool {
        self.readers[self.graph.nodes[at].result.0 as usize].iter().all(|&reader| reader > turn)
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
