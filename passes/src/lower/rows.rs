//! Operations along rows: softmax and normalization, reading and adding rows, cross entropy.

use peft_grammar::graph::{Dim, Type, Value};
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::epilogue::Follow;
use super::span::{Rows, Span};
use super::{Lowering, dim_extent, product};
use crate::builder::{Buf, F32, I32, Kernel, Order, Val, define, first};
use crate::kernels::math;
use crate::target::Machine;
use crate::target::cuda::{WARP, WARPS};

/// What a row of the result is of the rows of the operands.
#[derive(Clone, Copy)]
pub enum Kind {
    Softmax,
    SoftmaxVjp,
    LogSumExp,
}

/// Vectors of a row that a GPU's registers hold, at most.
const HELD: u64 = 32;
/// Columns a unit works on where units split the columns.
const COLUMNS: u64 = 64;
/// How many units of a GPU share a table's rows: so many that few of the tokens are a unit's own.
const PARTS: u64 = 256;
/// Rows of a table that are few, and ids that a warp then looks at together.
const FEW: u64 = 64;
const AT_ONCE: u64 = 8;

impl Lowering<'_, '_, '_> {
    pub(super) fn row_kernel(&mut self, kind: Kind, operands: &[BufferId], ty: &Type, result: Value) {
        let rows = Rows::of(ty);
        let stem = match kind {
            Kind::Softmax => "softmax".to_string(),
            Kind::SoftmaxVjp => "softmax_vjp".to_string(),
            Kind::LogSumExp => "log_sum_exp".to_string(),
        };
        let name = format!("{stem}_{}", rows.kind());
        let count = operands.len() + 1;
        let mut buffers = operands.to_vec();
        buffers.push(self.result(result));
        buffers.extend(rows.places(self.target));
        let elements: Vec<Element> = (0..count).map(|_| Element::F32).chain(rows.elements()).collect();
        let kernel = self.target.kernel(&name, |machine| {
            define(machine, &elements, 3, |k, buffers, sizes| {
                k.units(|k, row| {
                    let span = Rows::span(k, row, sizes, buffers.get(count).copied());
                    match kind {
                        Kind::Softmax => softmax(k, first(buffers), span),
                        Kind::SoftmaxVjp => softmax_vjp(k, first(buffers), span),
                        Kind::LogSumExp => {
                            let [x, out] = first(buffers);
                            let lse = logsumexp(k, x, span);
                            k.store(lse, out, row);
                        }
                    }
                });
            })
        });
        self.launch(kernel, buffers, rows.sizes().into(), Rows::count(ty));
    }

    /// A normalization, or with the adjoint of its result that of its operand, and what follows.
    pub(super) fn normalization(&mut self, at: usize, eps: f64) -> Result<(), String> {
        let node = &self.graph.nodes[at];
        let (result, ty) = (node.result, self.ty(node.result));
        let rows = Rows::of(ty);
        let mut buffers: Vec<BufferId> = node.operands.iter().map(|&v| self.dense(v)).collect();
        let operands = buffers.len();
        let taken = self.taken(at, at, false);
        let stays = taken.stays;
        let out = if stays { self.result(result) } else { self.place(result).buffer };
        buffers.push(out);
        buffers.extend(rows.places(self.target));
        let epilogue = self.epilogue(&taken, &buffers, true)?;
        let elements = (0..operands + 1).map(|_| Element::F32).chain(rows.elements());
        let elements: Vec<Element> = elements.chain(epilogue.elements.iter().copied()).collect();
        let stem = if operands == 1 { "normalize" } else { "normalize_vjp" };
        let passed = if stays { "" } else { "_passed" };
        let held = vectors(self.target.machine, &rows);
        let kind = held.map_or(rows.kind().into(), |vectors| format!("held{vectors}"));
        let name = format!("{stem}_{:x}_{kind}{passed}{}", eps.to_bits(), epilogue.suffix());
        let mut sizes: Vec<Extent> = rows.sizes().into();
        sizes.push(ty.shape.iter().rev().nth(1).map_or(Extent::Const(1), |&d| dim_extent(d)));
        let own = sizes.len();
        sizes.extend(epilogue.sizes.iter().cloned());
        let kernel = self.target.kernel(&name, |machine| {
            define(machine, &elements, sizes.len(), |k, buffers, sizes| {
                let room = held.map(|vectors| k.shared(vectors * WARP * WARPS));
                k.units(|k, row| {
                    let span = Rows::span(k, row, sizes, rows.ragged().then(|| buffers[operands + 1]));
                    let out = stays.then(|| buffers[operands]);
                    let follow = Follow::of(k, &epilogue, (buffers, &sizes[own..]), out, (row, sizes[3]));
                    let row = Row::of(k, &buffers[..operands], span, held.zip(room));
                    if operands == 1 { normalize(k, &row, &follow, eps) } else { normalize_vjp(k, &row, &follow, eps) }
                });
            })
        });
        self.label = epilogue.label(node.op.name());
        buffers.extend(epilogue.buffers);
        self.launch(kernel, buffers, sizes, Rows::count(ty));
        Ok(())
    }

    /// Units are blocks of columns, on a GPU of some of the table's rows: each adds what is theirs, in its order.
    pub(super) fn scatter(&mut self, ids: BufferId, ids_ty: &Type, y: BufferId, start: u64, result: Value) {
        let out = self.result(result);
        if matches!(self.target.machine, Machine::Cuda(_))
            && let Dim::Const(rows @ 0..=FEW) = self.ty(result).shape[0]
        {
            return self.scatter_to_few(ids, ids_ty, y, start, (out, rows), dim_extent(self.ty(result).shape[1]));
        }
        let parts = match self.target.machine {
            Machine::Cpu(_) => 1,
            Machine::Cuda(_) => PARTS,
        };
        let kernel = self.target.kernel("scatter", |machine| {
            define(machine, &[Element::I32, Element::F32, Element::F32], 4, |k, buffers, sizes| {
                let ([ids, y, out], [count, rows, width, start]) = (first(buffers), first(sizes));
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
        });
        let shape = &self.ty(result).shape;
        let width = dim_extent(shape[1]);
        let units = Extent::CeilDiv(Box::new(width.clone()), COLUMNS) * Extent::Const(parts);
        let sizes = vec![product(&ids_ty.shape), dim_extent(shape[0]), width, Extent::Const(start)];
        self.launch(kernel, vec![ids, y, out], sizes, units);
    }

    /// The same for a table of a few rows, each of which may get much: a team goes through all ids for 32 columns of one,
    /// many at a time.
    fn scatter_to_few(
        &mut self,
        ids: BufferId,
        ids_ty: &Type,
        y: BufferId,
        start: u64,
        (out, rows): (BufferId, u64),
        width: Extent,
    ) {
        let machine = self.target.machine;
        let blocks = Extent::CeilDiv(Box::new(width.clone()), machine.lanes());
        let kernel = self.target.kernel("scatter_to_few", |machine| {
            define(machine, &[Element::I32, Element::F32, Element::F32], 4, |k, buffers, sizes| {
                let ([ids, y, out], [count, width, blocks, start]) = (first(buffers), first(sizes));
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
        });
        let units = Extent::Const(rows * machine.team()) * blocks.clone();
        let sizes = vec![product(&ids_ty.shape), width, blocks, Extent::Const(start)];
        self.launch(kernel, vec![ids, y, out], sizes, units);
    }

    pub(super) fn segment_mean(&mut self, x: BufferId, result: Value) {
        let out = self.result(result);
        let kernel = self.target.kernel("segment_mean", |machine| {
            define(machine, &[Element::F32, Element::F32, Element::I32], 1, |k, buffers, sizes| {
                let ([x, out, offsets], [width]) = (first(buffers), first(sizes));
                k.units(|k, s| {
                    let one = k.index(1);
                    let next = k.add(s, one);
                    let (from, to) = (k.load_index(offsets, s), k.load_index(offsets, next));
                    let length = k.sub(to, from);
                    let length = k.to_float(length);
                    let length = k.splat(length);
                    let target = k.mul(s, width);
                    k.lanes(width, |k, j, mask| {
                        let zero = k.floats(0.0);
                        let sum = k.fold(from, to, 1, &[zero], |k, token, sum| {
                            let place = k.mul(token, width);
                            let place = k.add(place, j);
                            let x = k.load_lanes(x, place, mask);
                            vec![k.add(sum[0], x)]
                        });
                        let mean = k.div(sum[0], length);
                        let place = k.add(target, j);
                        k.store_lanes(mean, out, place, mask);
                    });
                });
            })
        });
        let offsets = self.target.derived("offsets");
        let width = dim_extent(self.ty(result).shape[1]);
        self.launch(kernel, vec![x, out, offsets], vec![width], Extent::Sequences);
    }

    pub(super) fn segment_mean_vjp(&mut self, y: BufferId, result: Value) {
        let out = self.result(result);
        let elements = [Element::F32, Element::F32, Element::I32, Element::I32];
        let kernel = self.target.kernel("segment_mean_vjp", |machine| {
            define(machine, &elements, 1, |k, buffers, sizes| {
                let ([y, out, offsets, segments], [width]) = (first(buffers), first(sizes));
                k.units(|k, token| {
                    let s = k.load_index(segments, token);
                    let one = k.index(1);
                    let next = k.add(s, one);
                    let (from, to) = (k.load_index(offsets, s), k.load_index(offsets, next));
                    let length = k.sub(to, from);
                    let length = k.to_float(length);
                    let length = k.splat(length);
                    let (source, target) = (k.mul(s, width), k.mul(token, width));
                    k.lanes(width, |k, j, mask| {
                        let place = k.add(source, j);
                        let x = k.load_lanes(y, place, mask);
                        let x = k.div(x, length);
                        let place = k.add(target, j);
                        k.store_lanes(x, out, place, mask);
                    });
                });
            })
        });
        let (offsets, segments) = (self.target.derived("offsets"), self.target.derived("segments"));
        let width = dim_extent(self.ty(result).shape[1]);
        self.launch(kernel, vec![y, out, offsets, segments], vec![width], Extent::Tokens);
    }

    /// The loss of each row; with the loss's adjoint, the adjoint of the logits.
    pub(super) fn cross_entropy(
        &mut self,
        logits: BufferId,
        ty: &Type,
        labels: BufferId,
        adjoint: Option<BufferId>,
        smoothing: f64,
        result: Value,
    ) {
        let out = self.result(result);
        let vjp = if adjoint.is_some() { "_vjp" } else { "" };
        let name = format!("cross_entropy{vjp}_{:x}", smoothing.to_bits());
        let mut buffers = vec![logits, labels, out];
        buffers.extend(adjoint);
        let elements = [Element::F32, Element::I32, Element::F32, Element::F32];
        let kernel = self.target.kernel(&name, |machine| {
            define(machine, &elements[..buffers.len()], 1, |k, buffers, sizes| {
                let ([logits, labels, out], [width]) = (first(buffers), first(sizes));
                k.units(|k, row| {
                    let span = Span { base: k.mul(row, width), length: width };
                    // A label beyond the classes has weight nowhere.
                    let zero = k.index(0);
                    let (class, inside) = table_row(k, labels, row, zero, width);
                    let class = k.select(inside, class, zero);
                    let label = k.add(span.base, class);
                    let lse = logsumexp(k, logits, span);
                    match buffers.get(3) {
                        None => {
                            let loss = cross_entropy(k, logits, span, label, inside, lse, smoothing);
                            k.store(loss, out, row);
                        }
                        Some(&adjoint) => {
                            let dy = k.load(adjoint, row);
                            cross_entropy_vjp(k, [logits, out], span, (label, inside), lse, dy, smoothing);
                        }
                    }
                });
            })
        });
        self.launch(kernel, buffers, vec![dim_extent(ty.shape[1])], dim_extent(ty.shape[0]));
    }
}

/// Row `ids[i] − start` of a table, and whether it exists.
pub(super) fn table_row(k: &mut Kernel, ids: Buf, i: Val, start: Val, rows: Val) -> (Val, Val) {
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
pub(super) fn columns(k: &mut Kernel, unit: Val, width: Val, mut body: impl FnMut(&mut Kernel, Val, Val)) {
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

pub(super) fn largest(k: &mut Kernel, x: Buf, span: Span) -> Val {
    let lowest = k.floats(f64::NEG_INFINITY);
    let largest = k.fold_lanes(span.length, &[lowest], |k, j, mask, largest| {
        let place = k.add(span.base, j);
        let x = k.load_masked(x, place, mask, lowest);
        vec![k.max(largest[0], x)]
    });
    let largest = k.max_lanes(largest[0]);
    k.splat(largest)
}

pub(super) fn sum(k: &mut Kernel, span: Span, mut term: impl FnMut(&mut Kernel, Val, Val) -> Val) -> Val {
    let zero = k.floats(0.0);
    let sum = k.fold_lanes(span.length, &[zero], |k, j, mask, sum| {
        let place = k.add(span.base, j);
        let x = term(k, place, mask);
        vec![k.add(sum[0], x)]
    });
    k.sum_lanes(sum[0])
}

/// Stores `value` along the row.
pub(super) fn fill(k: &mut Kernel, span: Span, out: Buf, mut value: impl FnMut(&mut Kernel, Val, Val) -> Val) {
    k.lanes(span.length, |k, j, mask| {
        let place = k.add(span.base, j);
        let y = value(k, place, mask);
        k.store_lanes(y, out, place, mask);
    });
}

/// `x` in the lanes of `mask`, 0 in the others.
fn only(k: &mut Kernel, x: Val, mask: Val) -> Val {
    let zero = k.floats(0.0);
    k.select(mask, x, zero)
}

fn softmax(k: &mut Kernel, [x, out]: [Buf; 2], span: Span) {
    let (_, total) = exponentials(k, x, span, Some(out));
    let share = share(k, total);
    fill(k, span, out, |k, place, mask| {
        let e = k.load_lanes(out, place, mask);
        k.mul(e, share)
    });
}

/// Σ e^{x − max} of a max in every lane; the powers themselves go to `out`, if there is one.
pub(super) fn powers(k: &mut Kernel, x: Buf, span: Span, max: Val, out: Option<Buf>) -> Val {
    let lowest = k.floats(f64::NEG_INFINITY);
    sum(k, span, |k, place, mask| {
        let x = k.load_masked(x, place, mask, lowest);
        let x = k.sub(x, max);
        let e = math::exp(k, x);
        if let Some(out) = out {
            k.store_lanes(e, out, place, mask);
        }
        e
    })
}

/// The max, in every lane, and Σ e^{x − max}; the powers themselves go to `out`, if there is one.
pub(super) fn exponentials(k: &mut Kernel, x: Buf, span: Span, out: Option<Buf>) -> (Val, Val) {
    let max = largest(k, x, span);
    (max, powers(k, x, span, max, out))
}

/// One power's share of such a sum, in every lane.
pub(super) fn share(k: &mut Kernel, total: Val) -> Val {
    let one = k.float(1.0, F32);
    let share = k.div(one, total);
    k.splat(share)
}

fn softmax_vjp(k: &mut Kernel, [y, dy, out]: [Buf; 3], span: Span) {
    let inner = sum(k, span, |k, place, mask| {
        let (y, dy) = (k.load_lanes(y, place, mask), k.load_lanes(dy, place, mask));
        k.mul(y, dy)
    });
    let inner = k.splat(inner);
    fill(k, span, out, |k, place, mask| {
        let (y, dy) = (k.load_lanes(y, place, mask), k.load_lanes(dy, place, mask));
        let rest = k.sub(dy, inner);
        k.mul(y, rest)
    });
}

/// How many vectors a row is, if a GPU holds it in registers: then all of it is on its way at once.
fn vectors(machine: Machine, rows: &Rows) -> Option<u64> {
    match (machine, rows) {
        (Machine::Cuda(_), Rows::Dense(Extent::Const(n))) => Some(n.div_ceil(WARP)).filter(|n| (1..=HELD).contains(n)),
        _ => None,
    }
}

/// A row of operands, in memory or in registers.
struct Row<'a> {
    operands: &'a [Buf],
    span: Span,
    /// By operand its vectors, and by vector which lanes exist; shared memory for one row of a warp.
    held: Option<(Vec<Vec<Val>>, Vec<Val>, Buf)>,
}

/// A vector of it, by its place or its number.
#[derive(Clone, Copy)]
enum At {
    Place(Val),
    Held(usize),
}

impl<'a> Row<'a> {
    fn of(k: &mut Kernel, operands: &'a [Buf], span: Span, held: Option<(u64, Buf)>) -> Row<'a> {
        let held = held.map(|(vectors, room)| {
            let places: Vec<(Val, Val)> = (0..vectors)
                .map(|v| {
                    let before = k.index(v * WARP);
                    let left = k.sub(span.length, before);
                    (k.add(span.base, before), k.mask(left))
                })
                .collect();
            let vector = |k: &mut Kernel, x: Buf, v: usize| match places[v] {
                // Only the last may lack some.
                (place, mask) if v + 1 == places.len() => k.load_lanes(x, place, mask),
                (place, _) => k.load_vector(x, place),
            };
            let all = operands.iter().map(|&x| (0..places.len()).map(|v| vector(k, x, v)).collect()).collect();
            let (size, width) = (k.index(vectors * WARP), k.index(WARP));
            let warp = k.div(k.thread(), width);
            let own = k.mul(warp, size);
            (all, places.iter().map(|&(_, mask)| mask).collect(), k.from(room, own))
        });
        Row { operands, span, held }
    }

    /// A vector of an operand.
    fn load(&self, k: &mut Kernel, operand: usize, at: At, mask: Val) -> Val {
        match (at, &self.held) {
            (At::Held(v), Some((vectors, ..))) => vectors[operand][v],
            (At::Place(place), _) => k.load_lanes(self.operands[operand], place, mask),
            _ => unreachable!("what is held has numbers"),
        }
    }

    /// Σ along the row.
    fn sum(&self, k: &mut Kernel, term: impl Fn(&mut Kernel, At, Val) -> Val) -> Val {
        let Some((_, masks, _)) = &self.held else {
            return sum(k, self.span, |k, place, mask| term(k, At::Place(place), mask));
        };
        let terms: Vec<Val> = masks.iter().enumerate().map(|(v, &mask)| term(k, At::Held(v), mask)).collect();
        let all = terms.into_iter().reduce(|x, y| k.add(x, y)).expect("at least one");
        k.sum_lanes(all)
    }

    /// The row of the result.
    fn fill(&self, k: &mut Kernel, follow: &Follow, value: impl Fn(&mut Kernel, At, Val) -> Val) {
        let Some((_, masks, room)) = &self.held else {
            return follow.fill(k, self.span, |k, place, mask| value(k, At::Place(place), mask));
        };
        for (v, &mask) in masks.iter().enumerate() {
            let y = value(k, At::Held(v), mask);
            let place = k.index(v as u64 * WARP);
            k.store_vector(y, *room, place);
        }
        k.settle();
        follow.fill(k, self.span, |k, place, mask| {
            let at = k.sub(place, self.span.base);
            k.load_lanes(*room, at, mask)
        });
        k.settle();
    }
}

/// The mean, and 1 / √(var + eps), in every lane.
fn moments(k: &mut Kernel, row: &Row, eps: f64) -> (Val, Val) {
    let length = k.to_float(row.span.length);
    let total = row.sum(k, |k, at, mask| row.load(k, 0, at, mask));
    let mean = k.div(total, length);
    let mean = k.splat(mean);
    let squares = row.sum(k, |k, at, mask| {
        let x = row.load(k, 0, at, mask);
        let d = k.sub(x, mean);
        let d = only(k, d, mask);
        k.mul(d, d)
    });
    let variance = k.div(squares, length);
    let eps = k.float(eps, F32);
    let variance = k.add(variance, eps);
    let deviation = k.sqrt(variance);
    let one = k.float(1.0, F32);
    let scale = k.div(one, deviation);
    (mean, k.splat(scale))
}

fn normalize(k: &mut Kernel, row: &Row, follow: &Follow, eps: f64) {
    let (mean, scale) = moments(k, row, eps);
    row.fill(k, follow, |k, at, mask| {
        let x = row.load(k, 0, at, mask);
        let d = k.sub(x, mean);
        k.mul(d, scale)
    });
}

/// dx = (dy − mean(dy) − x̂ mean(dy ⊙ x̂)) / σ
fn normalize_vjp(k: &mut Kernel, row: &Row, follow: &Follow, eps: f64) {
    let (mean, scale) = moments(k, row, eps);
    let hat = |k: &mut Kernel, at: At, mask: Val| {
        let x = row.load(k, 0, at, mask);
        let d = k.sub(x, mean);
        k.mul(d, scale)
    };
    let length = k.to_float(row.span.length);
    let total = row.sum(k, |k, at, mask| row.load(k, 1, at, mask));
    let along = row.sum(k, |k, at, mask| {
        let hat = hat(k, at, mask);
        let dy = row.load(k, 1, at, mask);
        k.mul(hat, dy)
    });
    let (total, along) = (k.div(total, length), k.div(along, length));
    let (total, along) = (k.splat(total), k.splat(along));
    row.fill(k, follow, |k, at, mask| {
        let hat = hat(k, at, mask);
        let dy = row.load(k, 1, at, mask);
        let d = k.sub(dy, total);
        let share = k.mul(hat, along);
        let d = k.sub(d, share);
        k.mul(d, scale)
    });
}

/// ln Σ eˣ of a row.
pub(super) fn logsumexp(k: &mut Kernel, x: Buf, span: Span) -> Val {
    let sum = exponentials(k, x, span, None);
    log_of(k, sum)
}

/// ln Σ eˣ of a max and Σ e^{x − max}.
pub(super) fn log_of(k: &mut Kernel, (max, total): (Val, Val)) -> Val {
    let total = math::log(k, total);
    let max = k.lane(max, 0);
    k.add(max, total)
}

/// ℓ = lse − (1−e) x_label − e/V Σ x
fn cross_entropy(k: &mut Kernel, logits: Buf, span: Span, label: Val, inside: Val, lse: Val, smoothing: f64) -> Val {
    let x = k.load(logits, label);
    let zero = k.float(0.0, F32);
    let x = k.select(inside, x, zero);
    let weight = k.float(1.0 - smoothing, F32);
    let hit = k.mul(weight, x);
    let loss = k.sub(lse, hit);
    if smoothing == 0.0 {
        return loss;
    }
    let total = sum(k, span, |k, place, mask| k.load_lanes(logits, place, mask));
    let width = k.to_float(span.length);
    let mean = k.div(total, width);
    let weight = k.float(smoothing, F32);
    let spread = k.mul(weight, mean);
    k.sub(loss, spread)
}

/// dx = dℓ (softmax(x) − w)
fn cross_entropy_vjp(
    k: &mut Kernel,
    [logits, out]: [Buf; 2],
    span: Span,
    (label, inside): (Val, Val),
    lse: Val,
    dy: Val,
    smoothing: f64,
) {
    let lse = k.splat(lse);
    let scale = k.splat(dy);
    let width = k.to_float(span.length);
    let weight = k.float(smoothing, F32);
    let spread = k.div(weight, width);
    let spread = k.splat(spread);
    fill(k, span, out, |k, place, mask| {
        let x = k.load_lanes(logits, place, mask);
        let x = k.sub(x, lse);
        let p = math::exp(k, x);
        let p = k.sub(p, spread);
        k.mul(scale, p)
    });
    k.when(inside, |k| {
        let weight = k.float(1.0 - smoothing, F32);
        let hit = k.mul(weight, dy);
        k.settle();
        let d = k.load(out, label);
        let d = k.sub(d, hit);
        k.settle();
        k.store(d, out, label);
    });
}
