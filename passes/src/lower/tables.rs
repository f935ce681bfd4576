//! Rows of tables. A frozen table that products read in panels is not kept besides as it was given: what reads rows finds
//! them there.
//!
//! ```text
//! table [rows, width]                   row r at r · width
//! panels [⌈width/16⌉][rows][16]         row r in pieces, p at (p · rows + r) · 16
//! ```
//!
//! Panels in half precision hold other numbers: there the table stays.

use peft_grammar::graph::{Type, Value};
use peft_runtime::artifact::{BufferId, Extent};

use super::entry::Turn;
use super::sizes::dim_extent;
use crate::kernels::embedding::{Gather, GatherBuffers, GatherSizes};

impl Turn<'_, '_, '_, '_> {
    pub(super) fn gather(&mut self, table: BufferId, ty: &Type, ids: BufferId, start: u64, result: Value) {
        let out = self.result(result);
        let [rows, width] = [0, 1].map(|axis| dim_extent(ty.shape[axis]));
        let units = dim_extent(self.ty(result).shape[0]);
        let sizes = GatherSizes { rows, width, start: Extent::Const(start) }.list();
        self.launch(Gather { panels: None }, GatherBuffers { table, ids, out }.list(), sizes, units);
    }
}
