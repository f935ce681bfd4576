//! Unfused attention: the operations of its definition, which materialise the scores
//! ([`crate::kernels::attention::unfused`]).

use peft_grammar::graph::{Type, Value};
use peft_grammar::names::Input;
use peft_runtime::artifact::{BufferId, Extent};

use super::entry::DispatchLowering;
use super::sizes::{dim_extent, extents};
use super::view::View;
use crate::kernels::Schedule;
use crate::kernels::attention::unfused::{Attend, Buffers, Scores, Sizes};

impl DispatchLowering<'_, '_, '_, '_> {
    /// The scores q kᵀ of each head. The kernel reads the keys transposed, so they are copied first.
    pub(super) fn scores(&mut self, q: BufferId, keys: BufferId, ty: &Type, causal: bool, result: Value) {
        let out = self.allocate_result(result);
        let transposed_keys = self.scratch(extents(ty));
        let transposed = View::dense(&ty.shape).permute(&[0, 2, 1]);
        self.copy_view((keys, &transposed), (transposed_keys, &View::dense(&transposed.shape)));
        self.attention_launch(Scores { causal }, [q, transposed_keys, out], ty);
    }

    /// The products of attention weights with the values.
    pub(super) fn attend(&mut self, w: BufferId, v: BufferId, causal: bool, transposed: bool, result: Value) {
        let out = self.allocate_result(result);
        let ty = self.ty(result).clone();
        self.attention_launch(Attend { causal, transposed }, [w, v, out], &ty);
    }

    /// `ty` is that of the queries, `[heads, tokens, width]`.
    fn attention_launch(&mut self, schedule: impl Into<Schedule>, [left, right, out]: [BufferId; 3], ty: &Type) {
        let [offsets, pairs] = [Input::Offsets, Input::Pairs].map(|input| self.module.derived_input(input));
        let width = dim_extent(ty.shape[2]);
        let sizes = Sizes { tokens: Extent::Tokens, pairs: Extent::Pairs, width, sequences: Extent::Sequences };
        let units = dim_extent(ty.shape[0]) * Extent::Sequences;
        self.launch(schedule, Buffers { left, right, out, offsets, pairs }.list(), sizes.list(), units);
    }
}
