//! Embedding tables: gathering rows, and the adjoint, which adds rows into the table (scatter-add).

use peft_runtime::artifact::Element;

use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, I32, Index, Kernel, Order, Val, define};
use crate::cost::{BATCHED_WARP_BYTES_IN_FLIGHT, LaunchCost, LaunchSizes, WARP_BYTES_IN_FLIGHT};
use crate::kernels::Scheduled;
use crate::target::Machine;
use crate::target::cuda::{Card, WARPS};

/// Columns of a unit, where units divide the columns.
pub const COLUMNS: u64 = 64;
/// Ids that a warp loads at once where a table has few rows.
const AT_ONCE: u64 = 8;

arguments! {
    /// The table, the ids of the rows, and the result.
    GatherBuffers { table, ids, out }
}
arguments! {
    /// The number of the table's rows, their width, and the id of its first row.
    GatherSizes { rows, width, start }
}

/// Gathers rows of a table; ids that are not in the table give zeros. A unit gathers one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gather {
    /// The width of the column panels that the table is packed into, if it is.
    pub panel_width: Option<u64>,
}

impl Scheduled for Gather {
    fn name_stem(&self) -> String {
        self.panel_width.map_or("gather".into(), |width| format!("gather_panels{width}"))
    }

    fn emit(&self, machine: Machine) -> Code {
        let elements = GatherBuffers { table: Element::F32, ids: Element::I32, out: Element::F32 }.list();
        define(machine, &elements, GatherSizes::<Val>::COUNT, |k, buffers, sizes| {
            let GatherBuffers { table, ids, out } = GatherBuffers::of(buffers);
            let GatherSizes { rows, width, start } = GatherSizes::of(sizes);
            let across = self.panel_width;
            k.units(|k, i| {
                let (row, inside) = table_row(k, ids, i, start, rows);
                let row = k.select(inside, row, 0);
                let target = k.mul(i, width);
                let copy = |k: &mut Kernel, from: Val, to: Val, length: Val| {
                    k.lanes(length, |k, j, mask| {
                        let read = k.select(inside, length - j, 0);
                        let read = k.mask(read);
                        let x = k.load_lanes(table, from + j, read);
                        k.store_lanes(x, out, to + j, mask);
                    });
                };
                let Some(across) = across else {
                    let from = k.mul(row, width);
                    return copy(k, from, target, width);
                };
                k.each(0, width, across, |k, column| {
                    let from = k.eval(column * rows + row * across);
                    let to = k.eval(target + column);
                    let length = k.min(width - column, across);
                    copy(k, from, to, length);
                });
            });
        })
    }

    /// Only the gathered rows of the table are read.
    fn cost(&self, launched: LaunchSizes, _card: &Card) -> LaunchCost {
        let width = GatherSizes::of(launched.sizes).width as f64;
        let max_read_bytes =
            if self.panel_width.is_none() { vec![4.0 * width * launched.units as f64] } else { vec![] };
        LaunchCost { max_read_bytes, ..launched.streaming(WARP_BYTES_IN_FLIGHT) }
    }
}

arguments! {
    /// The ids of the rows, the rows to add, and the result.
    ScatterBuffers { ids, y, out }
}
arguments! {
    /// The number of ids, the number of the table's rows, their width, and the id of its first row.
    ScatterSizes { count, rows, width, start }
}

/// Adds rows into a table. A unit has a block of [`COLUMNS`] columns, and one of `parts` parts of the table's rows; it
/// adds the rows in the order of the ids, so that results do not depend on scheduling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scatter {
    /// The number of parts of the table's rows.
    pub parts: u64,
}

impl Scheduled for Scatter {
    fn name_stem(&self) -> String {
        "scatter".into()
    }

    fn emit(&self, machine: Machine) -> Code {
        let parts = self.parts;
        let elements = ScatterBuffers { ids: Element::I32, y: Element::F32, out: Element::F32 }.list();
        define(machine, &elements, ScatterSizes::<Val>::COUNT, |k, buffers, sizes| {
            let ScatterBuffers { ids, y, out } = ScatterBuffers::of(buffers);
            let ScatterSizes { count, rows, width, start } = ScatterSizes::of(sizes);
            k.units(|k, unit| {
                let (unit, part) = match parts {
                    1 => (unit, None),
                    _ => (k.eval(unit / parts), Some(k.eval(unit % parts))),
                };
                let first = part.unwrap_or_else(|| k.index(0));
                let zero_f32 = k.floats(0.0);
                k.each(first, rows, parts, |k, row| {
                    let base = k.mul(row, width);
                    columns(k, unit, width, |k, column, mask| {
                        k.store_lanes(zero_f32, out, base + column, mask);
                    });
                });
                k.each(0, count, k.lane_count(), |k, block| {
                    let left = k.eval(count - block);
                    let some = some_inside(k, ids, (block, left), (start, rows), part.map(|part| (part, parts)));
                    // If few rows of a large table train, most blocks of tokens have none of them.
                    k.when(some, |k| {
                        let end = k.min(block + k.lane_count(), count);
                        k.each(block, end, 1, |k, i| {
                            let (row, inside) = table_row(k, ids, i, start, rows);
                            let own = part.map_or(inside, |part| {
                                let own = k.compare(row % parts, Order::Eq, part);
                                k.and(own, inside)
                            });
                            k.when(own, |k| {
                                let base = k.mul(row, width);
                                let source = k.mul(i, width);
                                columns(k, unit, width, |k, column, mask| {
                                    let x = k.load_lanes(y, source + column, mask);
                                    let place = k.eval(base + column);
                                    let sum = k.load_lanes(out, place, mask);
                                    let sum = k.add(sum, x);
                                    k.store_lanes(sum, out, place, mask);
                                });
                            });
                        });
                    });
                });
            });
        })
    }

    /// Only rows whose ids are in the table are read; their number is bounded by that of the table's rows.
    fn cost(&self, launched: LaunchSizes, _card: &Card) -> LaunchCost {
        let ScatterSizes { count, rows, width, .. } = ScatterSizes::of(launched.sizes).map(|n| n as f64);
        LaunchCost { max_read_bytes: vec![4.0 * count, 4.0 * rows * width], ..launched.streaming(WARP_BYTES_IN_FLIGHT) }
    }
}

arguments! {
    /// Sizes of the kernel for few rows.
    ScatterFewSizes {
        count,
        width,
        /// The number of units that divide the columns.
        blocks,
        start,
    }
}

/// Adds rows into a table that has few rows, each of which may receive many. For one row and one vector of columns, a
/// team goes through all ids, several at a time. Its buffers are [`ScatterBuffers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScatterFewRows;

impl Scheduled for ScatterFewRows {
    fn name_stem(&self) -> String {
        "scatter_few_rows".into()
    }

    fn emit(&self, machine: Machine) -> Code {
        let elements = ScatterBuffers { ids: Element::I32, y: Element::F32, out: Element::F32 }.list();
        define(machine, &elements, ScatterFewSizes::<Val>::COUNT, |k, buffers, sizes| {
            let ScatterBuffers { ids, y, out } = ScatterBuffers::of(buffers);
            let ScatterFewSizes { count, width, blocks, start } = ScatterFewSizes::of(sizes);
            let shared = k.shared(k.team() * k.lane_count());
            k.team_units(|k, unit| {
                let (row, block) = (k.div(unit, blocks), k.rem(unit, blocks));
                let column = k.eval(block * k.lane_count());
                let mask = k.mask(width - column);
                let id = k.to_i32(start + row);
                let (zero_f32, nobody) = (k.float(0.0, F32), k.int(-1, I32));
                let sums = k.team_fold(0, count, AT_ONCE, &[zero_f32; AT_ONCE as usize], |k, token, sums| {
                    let tokens = (0..AT_ONCE).map(|n| {
                        let token = k.eval(token + n);
                        let exists = k.compare(token, Order::Lt, count);
                        (token, k.load_if(exists, ids, token, nobody))
                    });
                    let tokens: Vec<(Val, Val)> = tokens.collect();
                    let added = tokens.into_iter().zip(sums).map(|((token, its), &sum)| {
                        let own = k.compare(its, Order::Eq, id);
                        let here = k.and(own, mask);
                        let x = k.load_lanes(y, token * width + column, here);
                        k.add(sum, x)
                    });
                    added.collect()
                });
                let sum = sums.into_iter().reduce(|sum, x| k.add(sum, x)).expect("some sums");
                let sum = k.sum_team(sum, Some(shared));
                k.first_of_team(|k| {
                    k.store_lanes(sum, out, row * width + column, mask);
                });
            });
        })
    }

    /// Only rows whose ids are in the table are read.
    fn cost(&self, launched: LaunchSizes, _card: &Card) -> LaunchCost {
        let ScatterFewSizes { count, width, .. } = ScatterFewSizes::of(launched.sizes).map(|n| n as f64);
        let rows = (launched.units / WARPS) as f64;
        LaunchCost {
            max_read_bytes: vec![4.0 * count, 4.0 * width * rows],
            ..launched.streaming(BATCHED_WARP_BYTES_IN_FLIGHT)
        }
    }
}

/// The row `ids[i] − start` of a table, and whether it exists.
pub fn table_row(k: &mut Kernel, ids: Buf, i: Val, start: impl Into<Index>, rows: Val) -> (Val, Val) {
    let id = k.load_index(ids, i);
    let row = k.eval(id - start.into());
    // A negative row wraps around to a large unsigned number.
    let outside = k.at_least_unsigned(row, rows);
    let flag = k.select(outside, 0, 1);
    let inside = k.compare(flag, Order::Gt, 0);
    (row, inside)
}

/// Whether any of the ids from `block` on, of which `left` are left, is a row of the table, and of the unit's part of
/// it if there are parts.
fn some_inside(
    k: &mut Kernel,
    ids: Buf,
    (block, left): (Val, Val),
    (start, rows): (Val, Val),
    part: Option<(Val, u64)>,
) -> Val {
    let mask = k.mask(left);
    let ids = k.load_lanes(ids, block, mask);
    let [start, rows] = [start, rows].map(|x| {
        let x = k.to_i32(x);
        k.splat(x)
    });
    let row = k.sub(ids, start);
    let outside = k.at_least_unsigned(row, rows);
    let [none, one] = [0.0, 1.0].map(|x| k.floats(x));
    let inside = k.select(outside, none, one);
    let mut inside = k.select(mask, inside, none);
    if let Some((part, parts)) = part {
        let (part, parts) = (k.to_i32(part), k.to_i32(parts));
        let of = k.rem(row, parts);
        let own = k.compare(of, Order::Eq, part);
        inside = k.select(own, inside, none);
    }
    let any_inside = k.max_lanes(inside);
    let none = k.float(0.0, F32);
    k.compare(any_inside, Order::Gt, none)
}

/// Calls `body` for the vectors of block `unit` of the columns.
pub fn columns(k: &mut Kernel, unit: Val, width: Val, mut body: impl FnMut(&mut Kernel, Val, Val)) {
    let start = k.eval(unit * COLUMNS);
    for lane in (0..COLUMNS).step_by(k.lane_count() as usize) {
        let column = k.eval(start + lane);
        let mask = k.mask(width - column);
        body(k, column, mask);
    }
}
