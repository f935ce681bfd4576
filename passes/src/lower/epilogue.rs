//! The lowering of epilogues ([`crate::kernels::epilogue`]): builds a kernel's epilogue together with its arguments.

use peft_grammar::graph::{Node, Op, Value};
use peft_runtime::artifact::{BufferId, Extent};

use super::dispatch::Fused;
use super::entry::DispatchLowering;
use super::sizes::dim_extent;
use super::view::View;
use crate::kernels::epilogue::{Epilogue, Group, RowSum};

/// An epilogue under construction, with its arguments.
#[derive(Default)]
pub(super) struct LoweredEpilogue {
    pub epilogue: Epilogue,
    /// The results of its groups.
    results: Vec<Value>,
    /// The buffers that follow the kernel's own.
    pub buffers: Vec<BufferId>,
    /// The sizes that follow the kernel's own.
    pub sizes: Vec<Extent>,
}

impl LoweredEpilogue {
    /// The index of `buffer` among the kernel's buffers, which begin with its `own`; it is added if it is missing.
    fn buffer_index(&mut self, own: &[BufferId], buffer: BufferId) -> usize {
        let known = own.iter().chain(&self.buffers).position(|&b| b == buffer);
        known.unwrap_or_else(|| {
            self.buffers.push(buffer);
            own.len() + self.buffers.len() - 1
        })
    }

    fn buffer_indices(&mut self, own: &[BufferId], buffers: &[BufferId]) -> Vec<usize> {
        buffers.iter().map(|&buffer| self.buffer_index(own, buffer)).collect()
    }
}

impl DispatchLowering<'_, '_, '_, '_> {
    /// Allocates the results of a kernel that applies its epilogue in registers. A result that is not stored is given
    /// the buffer of a value computed from it, since a kernel has an argument for it in any case.
    pub(super) fn place_fused_results(&mut self, fused: &Fused) {
        let result = self.graph.nodes[fused.node].result();
        if let Some(sum) = &fused.row_sum {
            self.place_fused_results(sum);
            if sum.stored {
                self.allocate_result(self.graph.nodes[sum.node].result());
            }
        }
        if !fused.stored {
            let written = fused.groups.iter().find(|&&root| self.analysis.is_stored(root, fused));
            let (buffer, view) = match (written, &fused.row_sum) {
                (Some(&root), _) => self.result_destination(self.graph.nodes[root].result()),
                (None, Some(sum)) => {
                    (self.buffer_view(self.graph.nodes[sum.node].result()).buffer, View::dense(&self.ty(result).shape))
                }
                (None, None) => unreachable!("a result that is not stored has a reader in the epilogue"),
            };
            self.set_view(result, buffer, view);
        }
    }

    /// Lowers the epilogue of a kernel whose own buffers are `own`. With `registers` the kernel holds its result in
    /// registers, and the groups do not load it.
    pub(super) fn lower_epilogue(
        &mut self,
        fused: &Fused,
        own: &[BufferId],
        registers: bool,
    ) -> Result<LoweredEpilogue, String> {
        let product = self.graph.nodes[fused.node].result();
        let batched = self.ty(product).rank() == 3 && (registers || !fused.groups.is_empty());
        let mut lowered =
            LoweredEpilogue { epilogue: Epilogue { batched, ..Epilogue::default() }, ..LoweredEpilogue::default() };
        for &root in &fused.groups {
            let result = self.graph.nodes[root].result();
            let half_precision = self.analysis.half_precision_copy(result).filter(|_| registers);
            let stored = self.analysis.is_stored(root, fused) && !matches!(half_precision, Some((_, true)));
            let unstored = (!stored).then(|| self.buffer_view(product).buffer);
            if let Some(buffer) = unstored {
                self.set_view(result, buffer, View::dense(&self.ty(result).shape));
            }
            let map = self.lower_expression(root, true, unstored)?;
            let groups = &lowered.epilogue.groups;
            let early = groups.iter().take_while(|g| !g.expression.draws).count();
            let turn = match registers {
                false if groups.len() > early || map.expression.draws => early,
                _ => 0,
            };
            let producer_of = |v: &Value| {
                let results = lowered.results[turn..].iter().copied();
                registers.then_some(product).into_iter().chain(results).position(|computed| computed == *v)
            };
            let producers = map.arrays.iter().map(producer_of).collect();
            let buffers = lowered.buffer_indices(own, &map.buffers);
            let half =
                half_precision.filter(|_| self.buffer_view(result).view.is_none() || !stored).map(|(half, _)| {
                    let copy = self.half_precision_result(result);
                    (half, lowered.buffer_index(own, copy))
                });
            lowered.epilogue.groups.push(Group { expression: map.expression, buffers, producers, stored, half });
            lowered.results.push(result);
            lowered.sizes.extend(map.sizes);
        }
        if let Some(sum) = &fused.row_sum {
            let graph = self.graph;
            let Node { op, operands, .. } = &graph.nodes[sum.node];
            let result = graph.nodes[sum.node].result();
            let computed = [product].into_iter().chain(lowered.results.iter().copied());
            let input =
                computed.into_iter().position(|computed| computed == operands[0]).expect("the operand of the sum");
            let out = sum.stored.then(|| lowered.buffer_index(own, self.buffer_view(result).buffer));
            let then = self.lower_epilogue(sum, &[own, &lowered.buffers].concat(), true)?;
            lowered.buffers.extend(then.buffers);
            let rows = self.ty(result).shape.iter().rev().nth(1);
            lowered.sizes.push(dim_extent(*rows.expect("the sum keeps the row axis")));
            lowered.sizes.extend(then.sizes);
            let mean = matches!(op, Op::Reduce { mean: true, .. });
            lowered.epilogue.sum = Some(Box::new(RowSum { input, mean, out, epilogue: then.epilogue }));
        }
        for &root in &fused.companions {
            let result = self.graph.nodes[root].result();
            let map = self.lower_expression(root, true, None)?;
            let buffers = lowered.buffer_indices(own, &map.buffers);
            let group = Group { expression: map.expression, buffers, producers: vec![], stored: true, half: None };
            lowered.epilogue.companions.push(group);
            lowered.sizes.push(dim_extent(*self.ty(result).shape.last().expect("the result has columns")));
            lowered.sizes.extend(map.sizes);
        }
        Ok(lowered)
    }
}
