//! Fused attention, which never materialises the score matrix ([`crate::kernels::attention`]; Dao et al., 2022): the
//! layouts of its operands and results, and the launch.

use peft_grammar::graph::{Dim, Node, Op, Value};
use peft_grammar::names::Input;
use peft_runtime::artifact::{BufferId, Extent, Storage};

use super::entry::DispatchLowering;
use super::schedule::{self, AttentionTiling};
use super::sizes::dim_extent;
use super::view::{Stride, UNIT_STRIDE, View};
use crate::kernels::attention::cpu::{CpuAttention, SLACK, ScratchBuffers, scratch_floats_per_token};
use crate::kernels::attention::gpu::{BlockSizes, GpuAttention, KindSizes, TILE};
use crate::kernels::attention::shape::{AttentionParams, AttentionResult, HeadLayout, HeadSizes};
use crate::kernels::philox;
use crate::target::cuda::WARPS;

impl DispatchLowering<'_, '_, '_, '_> {
    /// Launches attention, its log-sum-exp, or its vjps. The first two operands are the queries and the keys; the third
    /// is as wide as the values.
    pub(super) fn fused_attention(&mut self, Node { op, operands, results, .. }: &Node) {
        let computes = match *op {
            Op::Attention { .. } => AttentionResult::Forward,
            Op::AttentionAndLse { .. } => AttentionResult::ForwardAndLse,
            Op::AttentionLse { .. } => AttentionResult::Lse,
            Op::AttentionVjp { of, .. } => AttentionResult::Adjoint(of),
            Op::AttentionVjpSides { .. } => AttentionResult::KeyAndValueAdjoints,
            Op::AttentionVjpAll { .. } => AttentionResult::AllAdjoints,
            _ => unreachable!("only attention has fused kernels"),
        };
        let (causal, scale, p, stream, column) = match op.components()[0] {
            Op::Attention { causal, scale, p, stream, column }
            | Op::AttentionVjp { causal, scale, p, stream, column, .. } => (causal, scale, p, stream, column),
            Op::AttentionLse { causal, scale } => (causal, scale, 0.0, 0, 0),
            _ => unreachable!("only attention has fused kernels"),
        };
        let params = AttentionParams { causal, scale: scale.into(), p: p.into(), vec4: self.rows_allow_vec4(operands) };
        let [query, value] = [operands[0], *operands.get(2).unwrap_or(&operands[0])].map(|v| &self.ty(v).shape);
        let (heads, width, value_width) = (dim_extent(query[0]), dim_extent(query[2]), dim_extent(value[2]));
        let floats = operands.len() - usize::from(params.has_dropout());
        // The size by which a kernel divides a unit's index. On a processor the heads of one sequence are neighbouring
        // units.
        let tiling = schedule::attention_tiling(self.module.machine);
        let count = match tiling {
            AttentionTiling::Rows => heads.clone(),
            AttentionTiling::Tiles => Extent::Sequences,
        };
        let [stream, column] = [u64::from(stream), column].map(Extent::Const);
        let mut sizes =
            HeadSizes { width: width.clone(), value_width: value_width.clone(), count, stream, column }.list();
        let mut add_layout = |view: &View| {
            let [head_stride, row_stride] = [0, 1].map(|axis| view.strides[axis].extent());
            sizes.extend(HeadLayout { offset: view.offset.clone(), head_stride, row_stride }.list());
        };
        for (i, &operand) in operands[..floats].iter().enumerate() {
            // Operands 3 and 5 have one number for each row and are read along the tokens; the others are read along a
            // head's columns.
            let axes = if matches!(i, 3 | 5) { 1..3 } else { 2..3 };
            if self.view(operand).merged_stride(axes) != Some(UNIT_STRIDE) {
                self.materialize(operand);
            }
            add_layout(&self.view(operand));
        }
        let mut buffers: Vec<BufferId> = operands.iter().map(|&v| self.buffer_view(v).buffer).collect();
        for &value in results {
            // The log-sum-exp has one number for each row.
            let (buffer, view) = match self.ty(value).last() {
                Some(Dim::Const(1)) => (self.allocate_result(value), self.view(value)),
                _ => self.result_destination(value),
            };
            buffers.push(buffer);
            add_layout(&view);
        }
        let offsets = self.module.derived_input(Input::Offsets);
        if tiling == AttentionTiling::Tiles {
            let [width, value_width] =
                [query[2], value[2]].map(|n| n.constant().expect("the width of a head is a constant"));
            let columns = match computes {
                AttentionResult::Lse => 1,
                AttentionResult::Adjoint(0 | 1) => width,
                AttentionResult::Forward | AttentionResult::ForwardAndLse | AttentionResult::Adjoint(_) => value_width,
                AttentionResult::KeyAndValueAdjoints | AttentionResult::AllAdjoints => width.max(value_width),
            };
            let panels = Extent::Const(columns.div_ceil(TILE));
            let units = heads * panels.clone() * max_blocks();
            if computes == AttentionResult::AllAdjoints {
                sizes.extend(KindSizes { each: units.clone() }.list());
            }
            sizes.extend(BlockSizes { blocks: max_blocks(), panels }.list());
            buffers.push(offsets);
            let kinds = if computes == AttentionResult::AllAdjoints { 2 } else { 1 };
            let units = units * Extent::Const(kinds * WARPS);
            self.launch(GpuAttention { computes, params }, buffers, sizes, units);
            return;
        }
        // Scratch rows for every sequence, with its length rounded up.
        let scratch_rows = heads.clone() * (Extent::Tokens + Extent::Const(SLACK) * Extent::Sequences);
        let scratch_shape = |width: Extent| vec![scratch_rows.clone() * width];
        let transposed_keys = self.scratch(scratch_shape(width.clone()));
        let transposed_values = self.scratch(scratch_shape(value_width.clone()));
        // The adjoints of keys and values also multiply operands that are not transposed.
        let packed_queries = if computes.has_adjoint(1) { self.scratch(scratch_shape(width)) } else { transposed_keys };
        let packed_values =
            if computes.has_adjoint(2) { self.scratch(scratch_shape(value_width)) } else { transposed_values };
        let scores =
            self.scratch(scratch_shape(Extent::Const(scratch_floats_per_token(computes, self.module.machine))));
        buffers.extend(
            ScratchBuffers { transposed_keys, transposed_values, packed_queries, packed_values, scores, offsets }
                .list(),
        );
        self.launch(CpuAttention { computes, params }, buffers, sizes, heads * Extent::Sequences);
    }

    /// A GPU may load the rows of queries, keys, values and the result's adjoint 16 bytes at a time.
    fn rows_allow_vec4(&self, operands: &[Value]) -> bool {
        let mut tensors = operands.iter().enumerate().filter(|(i, _)| matches!(i, 0 | 1 | 2 | 4)).map(|(_, &v)| v);
        schedule::attention_tiling(self.module.machine) == AttentionTiling::Tiles
            && tensors.all(|value| {
                let (view, ty) = (self.view(value), self.ty(value));
                let is_allocated =
                    matches!(self.module.buffers[self.buffer_view(value).buffer].storage, Storage::Temporary);
                let strides = view.strides[..2].iter().map(Stride::extent);
                is_allocated
                    && strides
                        .chain([view.offset.clone(), dim_extent(ty.shape[2])])
                        .all(|extent| is_multiple_of_4(&extent))
            })
    }
}

/// Whether the extent is a multiple of 4 for every batch.
fn is_multiple_of_4(extent: &Extent) -> bool {
    match extent {
        Extent::Const(n) => n.is_multiple_of(4),
        Extent::Add(x, y) => is_multiple_of_4(x) && is_multiple_of_4(y),
        Extent::Mul(x, y) => is_multiple_of_4(x) || is_multiple_of_4(y),
        _ => false,
    }
}

/// An upper bound of the blocks of one head: each sequence is padded to whole calls of the random generator.
fn max_blocks() -> Extent {
    let slots = Extent::Tokens + Extent::Const(philox::COLUMNS_PER_CALL) * Extent::Sequences;
    Extent::CeilDiv(Box::new(slots), TILE) + Extent::Sequences
}
