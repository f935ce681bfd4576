//! Embedding tables: `gather` and `scatter`. A frozen table that gemms read in packed panels is not also kept as it was
//! given: `gather` then reads its rows from the panels ([`super::module::Module::finish`]).
//!
//! ```text
//! table [rows, width]                   row r is at r · width
//! panels [⌈width/16⌉][rows][16]         row r is in pieces, piece p at (p · rows + r) · 16
//! ```
//!
//! Panels in half precision hold rounded numbers, so that the table is kept as well.

use peft_grammar::graph::{Type, Value};
use peft_runtime::artifact::{BufferId, Extent};

use super::entry::DispatchLowering;
use super::schedule;
use super::sizes::{dim_extent, dims_product};
use crate::kernels::embedding::{
    self, Gather, GatherBuffers, GatherSizes, ScatterBuffers, ScatterFewRows, ScatterFewSizes, ScatterSizes,
};

impl DispatchLowering<'_, '_, '_, '_> {
    /// Rows of a table by their ids.
    pub(super) fn gather(&mut self, table: BufferId, ty: &Type, ids: BufferId, start: u64, result: Value) {
        let out = self.allocate_result(result);
        let [rows, width] = [0, 1].map(|axis| dim_extent(ty.shape[axis]));
        let units = dim_extent(self.ty(result).shape[0]);
        let sizes = GatherSizes { rows, width, start: Extent::Const(start) }.list();
        self.launch(Gather { panel_width: None }, GatherBuffers { table, ids, out }.list(), sizes, units);
    }

    /// Adds rows into a table by their ids: the vjp of `gather`.
    pub(super) fn scatter(&mut self, ids: BufferId, ids_ty: &Type, y: BufferId, start: u64, result: Value) {
        let out = self.allocate_result(result);
        let shape = &self.ty(result).shape;
        let (count, width, start) = (dims_product(&ids_ty.shape), dim_extent(shape[1]), Extent::Const(start));
        let buffers = ScatterBuffers { ids, y, out }.list();
        let (machine, rows) = (self.module.machine, dim_extent(shape[0]));
        match schedule::scatter(machine, shape[0].constant()) {
            None => {
                let blocks = Extent::CeilDiv(Box::new(width.clone()), machine.lanes());
                let units = rows * Extent::Const(machine.team_size()) * blocks.clone();
                let sizes = ScatterFewSizes { count, width, blocks, start }.list();
                self.launch(ScatterFewRows, buffers, sizes, units);
            }
            Some(scatter) => {
                let blocks = Extent::CeilDiv(Box::new(width.clone()), embedding::COLUMNS);
                let sizes = ScatterSizes { count, rows, width, start }.list();
                self.launch(scatter, buffers, sizes, blocks * Extent::Const(scatter.parts));
            }
        }
    }
}
