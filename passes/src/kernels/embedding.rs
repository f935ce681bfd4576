//! Rows of tables: reading them, and adding into them.

use peft_runtime::artifact::Element;

use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, I32, Kernel, Order, Val, define};
use crate::target::Machine;

/// Columns a unit works on where units split the columns.
pub const COLUMNS: u64 = 64;
/// Ids that a warp looks at together where a table has few rows.
const AT_ONCE: u64 = 8;

arguments! { GatherBuffers { table, ids, out } }
arguments! { GatherSizes { rows, width, start } }

/// Rows of a table, zeros where it has none: a row a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gather {
    /// The table lies in panels of so many columns.
    pub panels: Option<u64>,
}

impl Gather {
    pub fn word(&self) -> String {
        self.panels.map_or("gather".into(), |across| format!("gather_panels{across}"))
    }

    pub fn emit(&self, machine: Machine) -> Code {
        let elements = GatherBuffers { table: Element::F32, ids: Element::I32, out: Element::F32 }.list();
        define(machine, &elements, GatherSizes::<Val>::COUNT, |k, buffers, sizes| {
            let GatherBuffers { table, ids, out } = GatherBuffers::of(buffers);
            let GatherSizes { rows, width, start } = GatherSizes::of(sizes);
            let across = self.panels;
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
}

arguments! { ScatterBuffers { ids, y, out } }
arguments! { ScatterSizes { count, rows, width, start } }

/// Units are blocks of [`COLUMNS`], and of these one of `parts` of the table's rows: each adds what is theirs, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scatter {
    pub parts: u64,
}

impl Scatter {
    pub fn word(&self) -> String {
        "scatter".into()
    }

    pub fn emit(&self, machine: Machine) -> Code {
        let parts = self.parts;
        let elements = ScatterBuffers { ids: Element::I32, y: Element::F32, out: Element::F32 }.list();
        define(machine, &elements, ScatterSizes::<Val>::COUNT, |k, buffers, sizes| {
            let ScatterBuffers { ids, y, out } = ScatterBuffers::of(buffers);
            let ScatterSizes { count, rows, width, start } = ScatterSizes::of(sizes);
            k.units(|k, unit| {
                let zero = k.index(0);
                let (unit, part) = match parts {
                    1 => (unit, None),
                    _ => {
                        let parts = k.index(parts);
                        (k.div(unit, parts), Some((k.rem(unit, parts), parts)))
                    }
                };
                let nothing = k.floats(0.0);
                k.each(part.map_or(zero, |(part, _)| part), rows, parts, |k, row| {
                    let base = k.mul(row, width);
                    columns(k, unit, width, |k, column, mask| {
                        let place = k.add(base, column);
                        k.store_lanes(nothing, out, place, mask);
                    });
                });
                k.each(zero, count, k.lane_count(), |k, block| {
                    let left = k.sub(count, block);
                    let some = some_inside(k, ids, (block, left), (start, rows), part);
                    // Of a large table's few rows that train, most tokens have none.
                    k.when(some, |k| {
                        let end = k.index(k.lane_count());
                        let end = k.add(block, end);
                        let end = k.min(end, count);
                        k.each(block, end, 1, |k, i| {
                            let (row, inside) = table_row(k, ids, i, start, rows);
                            let own = part.map_or(inside, |(part, parts)| {
                                let of = k.rem(row, parts);
                                let own = k.compare(of, Order::Eq, part);
                                k.and(own, inside)
                            });
                            k.when(own, |k| {
                                let base = k.mul(row, width);
                                let source = k.mul(i, width);
                                columns(k, unit, width, |k, column, mask| {
                                    let place = k.add(source, column);
                                    let x = k.load_lanes(y, place, mask);
                                    let place = k.add(base, column);
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
}

arguments! {
    FewSizes {
        count,
        width,
        /// Of columns.
        blocks,
        start,
    }
}

/// The same for a table of a few rows, each of which may get much: a team goes through all ids for a vector of columns of
/// one, many at a time. Its buffers are [`ScatterBuffers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScatterToFew;

impl ScatterToFew {
    pub fn word(&self) -> String {
        "scatter_to_few".into()
    }

    pub fn emit(&self, machine: Machine) -> Code {
        let elements = ScatterBuffers { ids: Element::I32, y: Element::F32, out: Element::F32 }.list();
        define(machine, &elements, FewSizes::<Val>::COUNT, |k, buffers, sizes| {
            let ScatterBuffers { ids, y, out } = ScatterBuffers::of(buffers);
            let FewSizes { count, width, blocks, start } = FewSizes::of(sizes);
            let room = k.shared(k.team() * k.lane_count());
            k.team_units(|k, unit| {
                let (row, block) = (k.div(unit, blocks), k.rem(unit, blocks));
                let lanes = k.index(k.lane_count());
                let column = k.mul(block, lanes);
                let left = k.sub(width, column);
                let mask = k.mask(left);
                let id = k.add(start, row);
                let id = k.to_i32(id);
                let (zero, nothing, nobody) = (k.index(0), k.float(0.0, F32), k.int(-1, I32));
                let sums = k.dealt_fold(zero, count, AT_ONCE, &[nothing; AT_ONCE as usize], |k, token, sums| {
                    let tokens = (0..AT_ONCE).map(|n| {
                        let n = k.index(n);
                        let token = k.add(token, n);
                        let exists = k.compare(token, Order::Lt, count);
                        (token, k.load_if(exists, ids, token, nobody))
                    });
                    let tokens: Vec<(Val, Val)> = tokens.collect();
                    let added = tokens.into_iter().zip(sums).map(|((token, its), &sum)| {
                        let own = k.compare(its, Order::Eq, id);
                        let here = k.and(own, mask);
                        let place = k.mul(token, width);
                        let place = k.add(place, column);
                        let x = k.load_lanes(y, place, here);
                        k.add(sum, x)
                    });
                    added.collect()
                });
                let sum = sums.into_iter().reduce(|sum, x| k.add(sum, x)).expect("some sums");
                let sum = k.sum_team(sum, Some(room));
                k.first_of_team(|k| {
                    let place = k.mul(row, width);
                    let place = k.add(place, column);
                    k.store_lanes(sum, out, place, mask);
                });
            });
        })
    }
}

/// Row `ids[i] − start` of a table, and whether it exists.
pub fn table_row(k: &mut Kernel, ids: Buf, i: Val, start: Val, rows: Val) -> (Val, Val) {
    let id = k.load_index(ids, i);
    let row = k.sub(id, start);
    // A negative row is a huge unsigned one.
    let outside = k.at_least_unsigned(row, rows);
    let (zero, one) = (k.index(0), k.index(1));
    let flag = k.select(outside, zero, one);
    let inside = k.compare(flag, Order::Gt, zero);
    (row, inside)
}

/// Some of the ids from `block` on, of which there are `left`, are rows of the table, and of the unit's part of it.
fn some_inside(
    k: &mut Kernel,
    ids: Buf,
    (block, left): (Val, Val),
    (start, rows): (Val, Val),
    part: Option<(Val, Val)>,
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
        let [part, parts] = [part, parts].map(|x| k.to_i32(x));
        let of = k.rem(row, parts);
        let own = k.compare(of, Order::Eq, part);
        inside = k.select(own, inside, none);
    }
    let most = k.max_lanes(inside);
    let none = k.float(0.0, F32);
    k.compare(most, Order::Gt, none)
}

/// The lanes of block `unit` of the columns.
pub fn columns(k: &mut Kernel, unit: Val, width: Val, mut body: impl FnMut(&mut Kernel, Val, Val)) {
    let block = k.index(COLUMNS);
    let start = k.mul(unit, block);
    for lane in (0..COLUMNS).step_by(k.lane_count() as usize) {
        let offset = k.index(lane);
        let column = k.add(start, offset);
        let left = k.sub(width, column);
        let mask = k.mask(left);
        body(k, column, mask);
    }
}
