//! Matmul: both operands are packed into panels, then a micro-kernel of 14 × 32 accumulators runs
//! over them. Panels of frozen weights are packed once, when the weights arrive.
//!
//! ```text
//! A[m,k] ─► panels [⌈m/14⌉][k][14]      B[k,n] ─► panels [⌈n/32⌉][k][32]      zeros fill the last ones
//! ```

use peft_grammar::graph::{Dim, Value};
use peft_runtime::artifact::{BufferId, Element, Extent, Storage};

use super::kernel::{F32, Kernel, LANES, Order, Val, define, first};
use super::{Lowering, product};

/// Rows of the micro-kernel: with two vectors each, 28 of the 32 registers are sums.
const TILE_ROWS: u64 = 14;
const TILE_VECTORS: u64 = 2;
const TILE_COLUMNS: u64 = TILE_VECTORS * LANES;
/// Row panels that one unit runs a column panel over: with [`DEPTH`] they stay in the second-level cache.
const GROUP: u64 = 9;
/// Steps along k between two visits of the result.
const DEPTH: u64 = 1024;

/// An operand as the packing reads it: element (batch, i, k) at `batch · area + i · along + k · step`.
struct Side {
    batch: Extent,
    /// Rows of A, columns of B.
    length: Extent,
    depth: Extent,
    /// i is the axis without gaps; otherwise k is.
    contiguous: bool,
}

impl Lowering<'_, '_, '_> {
    pub(super) fn matmul(&mut self, x: Value, y: Value, transpose_x: bool, transpose_y: bool, result: Value) {
        let (shape_x, shape_y) = (&self.ty(x).shape, &self.ty(y).shape);
        let (lead, [a, b]) = split(shape_x);
        let (lead_y, [c, d]) = split(shape_y);
        let (mut m, depth) = if transpose_x { (product(&[b]), product(&[a])) } else { (product(&[a]), product(&[b])) };
        let n = if transpose_y { product(&[c]) } else { product(&[d]) };
        let mut batch = product(lead);
        if lead_y.is_empty() {
            // One weight for all leading axes: they are more rows.
            m = batch * m;
            batch = Extent::Const(1);
        }
        let left = Side { batch: batch.clone(), length: m.clone(), depth: depth.clone(), contiguous: transpose_x };
        let right = Side { batch: batch.clone(), length: n.clone(), depth: depth.clone(), contiguous: !transpose_y };
        let panels_a = self.pack(x, TILE_ROWS, left);
        let panels_b = self.pack(y, TILE_COLUMNS, right);
        let out = self.result(result);
        let kernel = self.target.kernel("gemm", gemm);
        let row_panels = Extent::CeilDiv(Box::new(m.clone()), TILE_ROWS);
        let column_panels = Extent::CeilDiv(Box::new(n.clone()), TILE_COLUMNS);
        let groups = Extent::CeilDiv(Box::new(row_panels.clone()), GROUP);
        let units = batch * groups.clone() * column_panels.clone();
        self.launch(kernel, vec![panels_a, panels_b, out], vec![m, n, depth, row_panels, column_panels, groups], units);
    }

    /// The panels of an operand; the same ones if it has been packed this way before.
    fn pack(&mut self, value: Value, width: u64, side: Side) -> BufferId {
        let place = self.place(value).clone();
        let Side { batch, length, depth, contiguous } = side;
        let layout = format!("{width} of {batch:?} × {length:?} × {depth:?}, {contiguous}");
        let panels = Extent::CeilDiv(Box::new(length.clone()), width);
        let units = batch * panels.clone();
        let shape = vec![units.clone() * depth.clone() * Extent::Const(width)];
        let key = match &place.frozen {
            Some(source) => format!("pack({source}, {layout})"),
            None => format!("pack({}, {layout})", place.buffer),
        };
        let known = if place.frozen.is_some() { self.target.bound.get(&key) } else { self.packs.get(&key) };
        if let Some(&panels) = known {
            return panels;
        }
        let own = std::mem::replace(&mut self.frozen, place.frozen.as_ref().map(|_| key.clone()));
        let packed = match place.frozen {
            Some(_) => self.target.bind(&key, Element::F32, shape, Storage::Prepared),
            None => {
                let packed = self.target.buffer(Element::F32, shape, Storage::Temporary);
                self.packs.insert(key, packed);
                packed
            }
        };
        let name = format!("pack{width}_{}", if contiguous { "columns" } else { "rows" });
        let kernel = self.target.kernel(&name, |name| pack_kernel(name, width, contiguous));
        let label = std::mem::replace(&mut self.label, "pack".into());
        self.launch(kernel, vec![place.buffer, packed], vec![length, depth, panels], units);
        self.label = label;
        self.frozen = own;
        packed
    }
}

fn split(shape: &[Dim]) -> (&[Dim], [Dim; 2]) {
    let (lead, last) = shape.split_at(shape.len() - 2);
    (lead, [last[0], last[1]])
}

/// One panel a unit.
fn pack_kernel(name: &str, width: u64, contiguous: bool) -> String {
    define(name, &[Element::F32; 2], 3, |k, buffers, sizes| {
        let ([from, to], [length, depth, panels]) = (first(buffers), first(sizes));
        k.units(|k, unit| {
            let (batch, panel) = (k.div(unit, panels), k.rem(unit, panels));
            let area = k.mul(length, depth);
            let area = k.mul(batch, area);
            let across = k.index(width);
            let start = k.mul(panel, across);
            let left = k.sub(length, start);
            let size = k.mul(depth, across);
            let out = k.mul(unit, size);
            let zero = k.index(0);
            if contiguous {
                k.each(zero, depth, 1, |k, at| {
                    let row = k.mul(at, length);
                    let row = k.add(row, start);
                    let row = k.add(row, area);
                    let step = k.mul(at, across);
                    let step = k.add(out, step);
                    for lane in (0..width).step_by(LANES as usize) {
                        let lanes = (width - lane).min(LANES);
                        let offset = k.index(lane);
                        let here = k.sub(left, offset);
                        let mask = k.mask(here, lanes);
                        let source = k.add(row, offset);
                        let x = k.load_lanes(from, source, mask);
                        let target = k.add(step, offset);
                        k.store_vector(x, to, target);
                    }
                });
            } else {
                // Rows in blocks of lanes along k: one cache line of each row is read while it is warm.
                k.each(zero, depth, LANES, |k, block| {
                    let end = k.index(LANES);
                    let end = k.add(block, end);
                    let end = k.min(end, depth);
                    k.each(zero, across, 1, |k, i| {
                        let exists = k.compare(i, Order::Lt, left);
                        let row = k.add(start, i);
                        let row = k.select(exists, row, start);
                        let row = k.mul(row, depth);
                        let row = k.add(row, area);
                        let nothing = k.float(0.0, F32);
                        k.each(block, end, 1, |k, at| {
                            let source = k.add(row, at);
                            let x = k.load(from, source);
                            let x = k.select(exists, x, nothing);
                            let target = k.mul(at, across);
                            let target = k.add(target, i);
                            let target = k.add(target, out);
                            k.store(x, to, target);
                        });
                    });
                });
            }
        });
    })
}

/// A column panel against a group of row panels a unit.
fn gemm(name: &str) -> String {
    define(name, &[Element::F32; 3], 6, |k, buffers, sizes| {
        let [a, b, c] = first(buffers);
        let [m, n, depth, row_panels, column_panels, groups] = first(sizes);
        k.units(|k, unit| {
            let column = k.rem(unit, column_panels);
            let rest = k.div(unit, column_panels);
            let (batch, group) = (k.div(rest, groups), k.rem(rest, groups));
            let (rows, columns) = (k.index(TILE_ROWS), k.index(TILE_COLUMNS));
            // Where this batch's operands begin.
            let panel_a = k.mul(depth, rows);
            let panel_b = k.mul(depth, columns);
            let base_a = k.mul(batch, row_panels);
            let base_b = k.mul(batch, column_panels);
            let base_b = k.add(base_b, column);
            let base_b = k.mul(base_b, panel_b);
            let base_c = k.mul(batch, m);
            let (size, one) = (k.index(GROUP), k.index(1));
            let from = k.mul(group, size);
            let next = k.add(group, one);
            let to = k.mul(next, size);
            let to = k.min(to, row_panels);
            let start = k.mul(column, columns);
            let left = k.sub(n, start);
            let zero = k.index(0);
            k.each(zero, depth, DEPTH, |k, block| {
                let end = k.index(DEPTH);
                let end = k.add(block, end);
                let end = k.min(end, depth);
                let again = k.compare(block, Order::Gt, zero);
                k.each(from, to, 1, |k, panel| {
                    let place = k.add(base_a, panel);
                    let place = k.mul(place, panel_a);
                    let row = k.mul(panel, rows);
                    // Rows beyond the last have no lanes.
                    let tile: Vec<(Val, Vec<Val>, Vec<Val>)> = (0..TILE_ROWS)
                        .map(|r| {
                            let r = k.index(r);
                            let row = k.add(row, r);
                            let exists = k.compare(row, Order::Lt, m);
                            let width = k.select(exists, left, zero);
                            let at = k.add(base_c, row);
                            let at = k.mul(at, n);
                            let at = k.add(at, start);
                            let earlier = k.select(again, width, zero);
                            let masks = |k: &mut Kernel, width: Val| {
                                let mask = |v: u64| {
                                    let offset = k.index(v * LANES);
                                    let here = k.sub(width, offset);
                                    k.mask(here, LANES)
                                };
                                (0..TILE_VECTORS).map(mask).collect::<Vec<_>>()
                            };
                            (at, masks(k, width), masks(k, earlier))
                        })
                        .collect();
                    let mut sums = vec![];
                    for (at, _, earlier) in &tile {
                        for (v, mask) in earlier.iter().enumerate() {
                            let offset = k.index(v as u64 * LANES);
                            let place = k.add(*at, offset);
                            sums.push(k.load_lanes(c, place, *mask));
                        }
                    }
                    let sums = k.fold(block, end, 1, &sums, |k, step, sums| {
                        let at = k.mul(step, columns);
                        let at = k.add(base_b, at);
                        let row_b: Vec<Val> = (0..TILE_VECTORS)
                            .map(|v| {
                                let offset = k.index(v * LANES);
                                let at = k.add(at, offset);
                                k.load_vector(b, at, LANES)
                            })
                            .collect();
                        let at = k.mul(step, rows);
                        let at = k.add(place, at);
                        let mut next = vec![];
                        for r in 0..TILE_ROWS {
                            let offset = k.index(r);
                            let at = k.add(at, offset);
                            let x = k.load(a, at);
                            let x = k.splat(x, LANES);
                            for v in 0..TILE_VECTORS {
                                let sum = sums[(r * TILE_VECTORS + v) as usize];
                                next.push(k.fma(x, row_b[v as usize], sum));
                            }
                        }
                        next
                    });
                    for (r, (at, masks, _)) in tile.iter().enumerate() {
                        for (v, mask) in masks.iter().enumerate() {
                            let offset = k.index(v as u64 * LANES);
                            let place = k.add(*at, offset);
                            k.store_lanes(sums[r * TILE_VECTORS as usize + v], c, place, *mask);
                        }
                    }
                });
            });
        });
    })
}
