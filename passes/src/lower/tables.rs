//! Rows of tables. A frozen table that products read in panels is not kept besides as it was given: what reads rows finds
//! them there.
//!
//! ```text
//! table [rows, width]                   row r at r · width
//! panels [⌈width/16⌉][rows][16]         row r in pieces, p at (p · rows + r) · 16
//! ```
//!
//! Panels in half precision hold other numbers: there the table stays.

use std::collections::BTreeMap;

use peft_grammar::graph::{Type, Value};
use peft_runtime::artifact::{BufferId, Entry, Extent, Launch};

use super::{Target, Turn, dim_extent};
use crate::kernels::embedding::{Gather, GatherBuffers, GatherSizes};
use crate::kernels::{Function, Schedule};

/// A table's numbers once more, in panels.
pub(super) struct Panels {
    pub buffer: BufferId,
    /// Columns of a panel.
    pub across: u64,
    /// The table's rows and columns.
    pub shape: [Extent; 2],
}

impl Turn<'_, '_, '_, '_> {
    pub(super) fn gather(&mut self, table: BufferId, ty: &Type, ids: BufferId, start: u64, result: Value) {
        let out = self.result(result);
        let [rows, width] = [0, 1].map(|axis| dim_extent(ty.shape[axis]));
        let units = dim_extent(self.ty(result).shape[0]);
        let sizes = GatherSizes { rows, width, start: Extent::Const(start) }.list();
        self.launch(Gather { panels: None }, GatherBuffers { table, ids, out }.list(), sizes, units);
    }
}

impl Target<'_> {
    /// Rows of a table that nothing else reads as it was given come from its panels. Known when all entries are lowered.
    pub(super) fn gather_from_panels(&mut self, entries: &mut BTreeMap<String, Entry>) {
        for (table, Panels { buffer, across, shape }) in std::mem::take(&mut self.panels) {
            let gathers = |launch: &Launch| {
                let GatherSizes { rows, width, .. } = GatherSizes::of(&launch.extents);
                [rows, width] == shape
            };
            let all = entries.values_mut().flat_map(|entry| &mut entry.launches);
            let mut reads: Vec<&mut Launch> = all.filter(|launch| launch.buffers.contains(&table)).collect();
            let whole = Schedule::from(Gather { panels: None });
            let own = |launch: &Launch| *self.schedule(launch) == whole && gathers(launch);
            if reads.iter().all(|launch| own(launch)) && !reads.is_empty() {
                let kernel = self.function(Function::of(Gather { panels: Some(across) }));
                for launch in &mut reads {
                    let buffers = GatherBuffers { table: buffer, ..GatherBuffers::of(&launch.buffers) };
                    (launch.kernel, launch.buffers) = (kernel, buffers.list());
                }
            }
        }
    }
}
