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
use peft_runtime::artifact::{BufferId, Element, Entry, Extent, Launch};

use super::rows::table_row;
use super::{Lowering, Target, dim_extent};
use crate::builder::{Code, Kernel, Val, define, first};
use crate::target::Machine;

/// A table's numbers once more, in panels.
pub(super) struct Panels {
    pub buffer: BufferId,
    /// Columns of a panel.
    pub across: u64,
    /// The table's rows and columns.
    pub shape: [Extent; 2],
}

const GATHER: &str = "gather";

impl Lowering<'_, '_, '_> {
    pub(super) fn gather(&mut self, table: BufferId, ty: &Type, ids: BufferId, start: u64, result: Value) {
        let out = self.result(result);
        let kernel = self.target.kernel(GATHER, |machine| gather_kernel(machine, None));
        let sizes = vec![dim_extent(ty.shape[0]), dim_extent(ty.shape[1]), Extent::Const(start)];
        let units = dim_extent(self.ty(result).shape[0]);
        self.launch(kernel, vec![table, ids, out], sizes, units);
    }
}

impl Target<'_> {
    /// Rows of a table that nothing else reads as it was given come from its panels. Known when all entries are lowered.
    pub(super) fn gather_from_panels(&mut self, entries: &mut BTreeMap<String, Entry>) {
        let gather = self.codes.get(GATHER).map(|(index, _)| *index);
        for (table, Panels { buffer, across, shape }) in std::mem::take(&mut self.panels) {
            let gathers = |launch: &Launch| Some(launch.kernel) == gather && launch.extents.starts_with(&shape);
            let all = entries.values_mut().flat_map(|entry| &mut entry.launches);
            let mut reads: Vec<&mut Launch> = all.filter(|launch| launch.buffers.contains(&table)).collect();
            if reads.iter().all(|launch| gathers(launch)) && !reads.is_empty() {
                let name = format!("{GATHER}_panels{across}");
                let kernel = self.kernel(&name, |machine| gather_kernel(machine, Some(across)));
                for launch in &mut reads {
                    (launch.kernel, launch.buffers[0]) = (kernel, buffer);
                }
            }
        }
    }
}

/// A row a unit; zeros where the table has none.
fn gather_kernel(machine: Machine, across: Option<u64>) -> Code {
    define(machine, &[Element::F32, Element::I32, Element::F32], 3, |k, buffers, sizes| {
        let ([table, ids, out], [rows, width, start]) = (first(buffers), first(sizes));
        k.units(|k, i| {
            let (row, inside) = table_row(k, ids, i, start, rows);
            let zero = k.index(0);
            let row = k.select(inside, row, zero);
            let target = k.mul(i, width);
            let copy = |k: &mut Kernel, from: Val, to: Val, length: Val| {
                k.lanes(length, |k, j, mask| {
                    let left = k.sub(length, j);
                    let read = k.select(inside, left, zero);
                    let read = k.mask(read);
                    let place = k.add(from, j);
                    let x = k.load_lanes(table, place, read);
                    let place = k.add(to, j);
                    k.store_lanes(x, out, place, mask);
                });
            };
            let Some(across) = across else {
                let from = k.mul(row, width);
                return copy(k, from, target, width);
            };
            k.each(zero, width, across, |k, column| {
                let (before, piece) = (k.mul(column, rows), k.index(across));
                let from = k.mul(row, piece);
                let from = k.add(before, from);
                let to = k.add(target, column);
                let left = k.sub(width, column);
                let length = k.min(left, piece);
                copy(k, from, to, length);
            });
        });
    })
}
