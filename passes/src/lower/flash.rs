//! Attention whose square exists nowhere, on a processor (a GPU's is in [`super::squares`]): a unit is one head of one
//! sequence, and of its square there are never more than [`ROWS`] rows.
//!
//! ```text
//! forward     4 queries  · keysᵀ     ─► weights ─► · values
//! dq          4 queries  · keysᵀ     ─► ds      ─► · keys       lanes run over keys
//! dk, dv      4 keys     · queriesᵀ  ─► ds, w   ─► · queries, df    lanes run over queries
//! ```
//!
//! What stands on the lanes' side is transposed first, into a place of the unit's own. Weights are computed again from
//! the scores and their log-sum-exp.
//!
//! One call of the generator decides over four neighbouring columns, and keys need not begin at a multiple of four:
//! they stand in *slots*, key j in slot `phase + j`, so that a slot's block is a call's.

use peft_grammar::graph::{Dim, Node, Op, Value};
use peft_runtime::artifact::{BufferId, Element, Extent, Storage};

use super::attention::{ROWS, Segment, VECTORS, across, vectors, zeros};
use super::kernel::{Buf, I32, Kernel, LANES, Order, Val, define};
use super::random;
use super::rows;
use super::span::Span;
use super::view::{ONE, Step, View};
use super::{Lowering, copy, dim_extent, math, squares};
use crate::cuda::WARPS;
use crate::machine::Machine;

/// One call of the generator decides over a vector of each of a block's rows.
const _: () = assert!(LANES == ROWS * random::EACH);

/// Sizes of a kernel before those that say how its operands and results lie.
const SIZES: usize = 5;

/// Floats a sequence has room for beyond its length: rounded up with its phase, so that vectors need no masks.
const SLACK: u64 = VECTORS * LANES + ROWS;

/// What a kernel computes.
#[derive(Clone, Copy, PartialEq)]
pub enum Part {
    Forward,
    /// With the log-sum-exp of the scores.
    Both,
    Lse,
    /// The adjoint of operand 0, 1 or 2.
    Adjoint(usize),
    /// Those of keys and values.
    Sides,
    /// And those of queries, by blocks of their own.
    All,
}

impl Part {
    pub fn forward(self) -> bool {
        matches!(self, Part::Forward | Part::Both | Part::Lse)
    }

    /// A block of it has keys for its own.
    pub fn keys(self) -> bool {
        matches!(self, Part::Adjoint(1 | 2) | Part::Sides)
    }

    fn results(self) -> usize {
        match self {
            Part::Forward | Part::Lse | Part::Adjoint(_) => 1,
            Part::Both | Part::Sides => 2,
            Part::All => 3,
        }
    }
}

/// What is the same for all of a kernel's units.
#[derive(Clone, Copy)]
pub struct Form {
    pub causal: bool,
    pub scale: f64,
    /// Of dropout.
    pub p: f64,
    /// Rows are read in fours: they begin at multiples of four, and so do they end.
    pub fours: bool,
}

impl Lowering<'_, '_, '_> {
    /// `operands` begin with the queries and the keys; what comes third is as wide as the values.
    pub(super) fn flash(
        &mut self,
        part: Part,
        operands: &[Value],
        form: Form,
        (stream, column): (u32, u64),
        result: Value,
    ) {
        let Some((part, results)) = self.with_others(part, operands, form, result) else { return };
        let [query, value] = [operands[0], *operands.get(2).unwrap_or(&operands[0])].map(|v| &self.ty(v).shape);
        let (heads, width, wide) = (dim_extent(query[0]), dim_extent(query[2]), dim_extent(value[2]));
        let stem = match part {
            Part::Forward => "attention".to_string(),
            Part::Both => "attention_and_lse".to_string(),
            Part::Lse => "attention_lse".to_string(),
            Part::Adjoint(of) => format!("attention_vjp{of}"),
            Part::Sides => "attention_vjp12".to_string(),
            Part::All => "attention_vjp012".to_string(),
        };
        let drops = form.p > 0.0 && part != Part::Lse;
        let floats = operands.len() - usize::from(drops);
        // What counts units: a processor's heads of a sequence are neighbours, as they are in memory.
        let count = match self.target.machine {
            Machine::Cpu(_) => heads.clone(),
            Machine::Cuda(_) => Extent::Sequences,
        };
        let mut sizes =
            vec![width.clone(), wide.clone(), count, Extent::Const(u64::from(stream)), Extent::Const(column)];
        let mut lie = |view: &View| {
            sizes.push(view.first.clone());
            sizes.extend(view.steps[..2].iter().map(Step::extent));
        };
        for (i, &operand) in operands[..floats].iter().enumerate() {
            // A number a row is read along the tokens, anything else along a head.
            let along = if matches!(i, 3 | 5) { 1..3 } else { 2..3 };
            if self.view(operand).along(along) != Some(ONE) {
                self.dense(operand);
            }
            lie(&self.view(operand));
        }
        let mut buffers: Vec<BufferId> = operands.iter().map(|&v| self.place(v).buffer).collect();
        for value in results {
            // The log-sum-exp is a number a row.
            let (buffer, view) = match self.ty(value).last() {
                Some(Dim::Const(1)) => (self.result(value), self.view(value)),
                _ => self.target(value),
            };
            buffers.push(buffer);
            lie(&view);
        }
        let form = Form { fours: self.in_fours(operands), ..form };
        let causal = if form.causal { "_causal" } else { "" };
        let fours = if form.fours { "_fours" } else { "" };
        let name = format!("{stem}{causal}{fours}_{:x}_{:x}", form.scale.to_bits(), form.p.to_bits());
        let mut elements = vec![Element::F32; floats];
        elements.extend(drops.then_some(Element::I32));
        elements.extend(vec![Element::F32; part.results()]);
        let offsets = self.target.derived("offsets");
        if let Machine::Cuda(_) = self.target.machine {
            let [width, wide] = [query[2], value[2]].map(|n| n.constant().expect("of a head"));
            let columns = match part {
                Part::Lse => 1,
                Part::Adjoint(0 | 1) => width,
                Part::Forward | Part::Both | Part::Adjoint(_) => wide,
                Part::Sides | Part::All => width.max(wide),
            };
            let panels = Extent::Const(columns.div_ceil(squares::TILE));
            let units = heads * panels.clone() * squares::blocks();
            sizes.extend((part == Part::All).then(|| units.clone()));
            sizes.extend([squares::blocks(), panels]);
            elements.push(Element::I32);
            buffers.push(offsets);
            let kernel = self.target.kernel(&name, |machine| {
                define(machine, &elements, sizes.len(), |k, buffers, sizes| {
                    squares::write(k, (buffers, sizes), (part, form), drops);
                })
            });
            let sides = if part == Part::All { 2 } else { 1 };
            self.launch(kernel, buffers, sizes, units * Extent::Const(sides * WARPS));
            return;
        }
        // Room for every sequence, its length rounded up.
        let places = heads.clone() * (Extent::Tokens + Extent::Const(SLACK) * Extent::Sequences);
        let place = |width: Extent| vec![places.clone() * width];
        let first = self.scratch(place(width.clone()));
        let second = self.scratch(place(wide.clone()));
        // What the weights multiply: a side that is transposed as well, or one that is not.
        let factor =
            if matches!(part, Part::Adjoint(0 | 1) | Part::Sides) { self.scratch(place(width)) } else { first };
        let other = if part == Part::Sides { self.scratch(place(wide)) } else { second };
        let rows = self.scratch(place(Extent::Const(2 * ROWS)));
        elements.extend([Element::F32; 5]);
        elements.push(Element::I32);
        buffers.extend([first, second, factor, other, rows, offsets]);
        let kernel = self.target.kernel(&name, |machine| {
            define(machine, &elements, sizes.len(), |k, buffers, sizes| {
                let room = Room::of(k, buffers, sizes);
                k.units(|k, unit| {
                    let unit = Unit::of(k, unit, &room, (buffers, sizes), (part, form), drops);
                    match part {
                        Part::Forward | Part::Both => forward(k, &unit),
                        Part::Lse => lse(k, &unit),
                        Part::Adjoint(0) => over_keys(k, &unit),
                        Part::Adjoint(_) | Part::Sides => over_queries(k, &unit, part),
                        Part::All => unreachable!("a GPU's alone"),
                    }
                });
            })
        });
        self.launch(kernel, buffers, sizes, heads * Extent::Sequences);
    }

    /// A GPU may read these rows in fours, as far as they are wide.
    fn in_fours(&self, operands: &[Value]) -> bool {
        let mut tensors = operands.iter().enumerate().filter(|(i, _)| matches!(i, 0 | 1 | 2 | 4)).map(|(_, &v)| v);
        matches!(self.target.machine, Machine::Cuda(_))
            && tensors.all(|value| {
                let (view, ty) = (self.view(value), self.ty(value));
                let own = matches!(self.target.buffers[self.place(value).buffer].storage, Storage::Temporary);
                let steps = view.steps[..2].iter().map(Step::extent);
                own && steps.chain([view.first.clone(), dim_extent(ty.shape[2])]).all(|extent| fours(&extent))
            })
    }

    /// The part with what is computed beside it, as it is made of the same scores, and the results of both; `None` if its
    /// own turn is another's.
    fn with_others(&mut self, part: Part, operands: &[Value], form: Form, result: Value) -> Option<(Part, Vec<Value>)> {
        let of = |at: usize| self.graph.nodes[at].result;
        if let (Part::Adjoint(_), Some(sides)) = (part, self.sides(result)) {
            let [queries, keys, _] = sides;
            if result != of(queries.min(keys)) {
                return None;
            }
            self.joined.extend(sides);
            return Some((Part::All, sides.map(of).into()));
        }
        let beside = match part {
            Part::Forward => self.lse_beside(operands, form).map(|lse| (Part::Both, lse)),
            Part::Adjoint(1) => self.other_side(result).map(|at| (Part::Sides, of(at))),
            Part::Adjoint(2) if self.other_side(result).is_some() => return None,
            _ => None,
        };
        Some(beside.map_or((part, vec![result]), |(both, value)| (both, vec![result, value])))
    }

    /// The log-sum-exp of the same scores, if the entry wants it as well: its turn is then over.
    fn lse_beside(&mut self, operands: &[Value], form: Form) -> Option<Value> {
        let wanted = Op::AttentionLse { causal: form.causal, scale: form.scale };
        let alike = |node: &Node| node.op == wanted && node.operands == operands[..2];
        let at = self.graph.nodes.iter().position(alike)?;
        let lse = self.graph.nodes[at].result;
        let waits = self.places[lse.0 as usize].is_none() && self.frozen.is_none();
        waits.then(|| {
            self.joined.insert(at);
            lse
        })
    }

    /// The adjoint of operand `of` that is made of the same weights as the one at `at`.
    fn adjoint_beside(&self, at: usize, of: usize) -> Option<usize> {
        let nodes = &self.graph.nodes;
        let Op::AttentionVjp { of: own, causal, scale, p, stream, column } = nodes[at].op else { return None };
        let wanted = Op::AttentionVjp { of, causal, scale, p, stream, column };
        // Neither the values nor the corrections have a part in the values' adjoint.
        let apart = |i: usize| matches!(i, 2 | 5) && [own, of].contains(&2);
        let alike = |node: &Node| {
            let mut pairs = node.operands.iter().zip(&nodes[at].operands).enumerate();
            node.op == wanted && pairs.all(|(i, (x, y))| apart(i) || x == y)
        };
        nodes.iter().position(alike)
    }

    /// Of the adjoints of values and of keys the one beside that whose result this is: if the values' comes first, and no
    /// one reads it before the keys'.
    fn other_side(&self, result: Value) -> Option<usize> {
        let nodes = &self.graph.nodes;
        let at = nodes.iter().position(|node| node.result == result)?;
        let Op::AttentionVjp { of: own, .. } = nodes[at].op else { return None };
        let other = self.adjoint_beside(at, 3 - own).filter(|&other| self.adjoint_beside(other, own) == Some(at))?;
        let (values, keys) = if own == 2 { (at, other) } else { (other, at) };
        (values < keys && self.read_after(values, keys)).then_some(other)
    }

    /// On a GPU the adjoints of queries, keys and values, one of which has this result: if no one reads the values' before
    /// the first of the others.
    fn sides(&self, result: Value) -> Option<[usize; 3]> {
        let at = self.graph.nodes.iter().position(|node| node.result == result)?;
        let beside =
            |at: usize| Some([self.adjoint_beside(at, 0)?, self.adjoint_beside(at, 1)?, self.adjoint_beside(at, 2)?]);
        let sides = beside(at).filter(|sides| sides.iter().all(|&side| beside(side) == Some(*sides)))?;
        let [queries, keys, values] = sides;
        let gpu = matches!(self.target.machine, Machine::Cuda(_));
        (gpu && self.read_after(values, queries.min(keys))).then_some(sides)
    }

    /// No one reads the result of node `at` before the `turn` of another.
    fn read_after(&self, at: usize, turn: usize) -> bool {
        self.readers[self.graph.nodes[at].result.0 as usize].iter().all(|&reader| reader > turn)
    }
}

/// Whether it is a multiple of four, whatever the batch.
fn fours(extent: &Extent) -> bool {
    match extent {
        Extent::Const(n) => n.is_multiple_of(4),
        Extent::Add(x, y) => fours(x) && fours(y),
        Extent::Mul(x, y) => fours(x) || fours(y),
        _ => false,
    }
}

/// A unit's rows of an operand or of the result.
pub struct Rows {
    pub buffer: Buf,
    base: Val,
    line: Val,
}

impl Rows {
    pub fn row(&self, k: &mut Kernel, i: Val) -> Val {
        let row = k.mul(i, self.line);
        k.add(self.base, row)
    }
}

/// One head of one sequence, on either machine: what a unit reads and writes of it, and how its places are counted.
pub struct Head {
    pub operands: Vec<Rows>,
    pub results: Vec<Rows>,
    pub rng: Option<Buf>,
    pub segment: Segment,
    /// Of queries and keys, and of values.
    pub width: Val,
    pub wide: Val,
    pub stream: Val,
    /// The generator's column of slot 0.
    pub column: Val,
    /// The slot of key 0.
    pub phase: Val,
    pub form: Form,
}

impl Head {
    /// Of the kernel's buffers the first ones; of its sizes too, three of which say how each of them lies.
    pub fn of(
        k: &mut Kernel,
        segment: Segment,
        (buffers, sizes): (&[Buf], &[Val]),
        (part, form): (Part, Form),
        drops: bool,
    ) -> Head {
        let [width, wide, _, stream, column] = super::kernel::first(sizes);
        let count = buffers.len() - part.results();
        let (operands, results) = buffers.split_at(count);
        let (operands, rng) = operands.split_at(count - usize::from(drops));
        let mut all: Vec<Rows> = vec![];
        for (&buffer, lie) in operands.iter().chain(results).zip(sizes[SIZES..].chunks_exact(3)) {
            let [first, head, line] = super::kernel::first(lie);
            let head = k.mul(segment.head, head);
            let start = k.mul(segment.start, line);
            let base = k.add(first, head);
            all.push(Rows { buffer, base: k.add(base, start), line });
        }
        let results = all.split_off(operands.len());
        let four = k.index(random::EACH);
        let phase = k.rem(column, four);
        let column = k.sub(column, phase);
        let rng = rng.first().copied();
        Head { operands: all, results, rng, segment, width, wide, stream, column, phase, form }
    }
}

/// Room for what is computed on the way. Of all units that a thread takes in one go there is room for each, side by
/// side; all of them use the place of the first, so that it stays in the nearest caches.
struct Room {
    /// Transposed operands, `[width][stride]`, and where they begin.
    first: (Buf, Val),
    second: (Buf, Val),
    /// For what the weights multiply.
    factor: (Buf, Val),
    other: (Buf, Val),
    /// Scores, and as many rows behind them for products with df.
    rows: (Buf, Val),
}

impl Room {
    fn of(k: &mut Kernel, buffers: &[Buf], sizes: &[Val]) -> Room {
        let [first, second, factor, other, rows, offsets] = super::kernel::first(&buffers[buffers.len() - 6..]);
        let [width, wide, heads] = super::kernel::first(sizes);
        let unit = k.first_unit();
        let segment = segment(k, unit, heads, offsets);
        // Before it are all heads of earlier sequences, and some of this one.
        let earlier = k.mul(segment.start, heads);
        let beside = k.mul(segment.head, segment.length);
        let place = k.add(earlier, beside);
        let slack = k.index(SLACK);
        let slack = k.mul(unit, slack);
        let place = k.add(place, slack);
        let double = k.index(2 * ROWS);
        let [narrow, broad, rows_at] = [width, wide, double].map(|width| k.mul(place, width));
        Room {
            first: (first, narrow),
            second: (second, broad),
            factor: (factor, narrow),
            other: (other, broad),
            rows: (rows, rows_at),
        }
    }
}

/// One head of one sequence, with its room.
struct Unit<'a> {
    head: Head,
    room: &'a Room,
    scores: Val,
    products: Val,
    /// Of a transposed operand and of a row: the length, rounded up.
    stride: Val,
}

impl<'a> Unit<'a> {
    fn of(
        k: &mut Kernel,
        unit: Val,
        room: &'a Room,
        (buffers, sizes): (&[Buf], &[Val]),
        (part, form): (Part, Form),
        drops: bool,
    ) -> Self {
        let (buffers, rest) = buffers.split_at(buffers.len() - 6);
        let segment = segment(k, unit, sizes[2], rest[rest.len() - 1]);
        let head = Head::of(k, segment, (buffers, sizes), (part, form), drops);
        let step = k.index(across(k) * LANES);
        let slots = k.add(head.segment.length, head.phase);
        let stride = round_up(k, slots, step);
        let scores = k.add(room.rows.1, head.phase);
        let rows_of_block = k.index(ROWS);
        let block = k.mul(stride, rows_of_block);
        let products = k.add(scores, block);
        Unit { head, room, scores, products, stride }
    }

    /// Places of row `r` of the block among the scores or products.
    fn line(&self, k: &mut Kernel, base: Val, r: u64) -> Val {
        let r = k.index(r);
        let offset = k.mul(self.stride, r);
        k.add(base, offset)
    }

    /// Up to where a block of queries from `i` on sees keys.
    fn seen(&self, k: &mut Kernel, i: Val) -> Val {
        if !self.head.form.causal {
            return self.head.segment.length;
        }
        let block = k.index(ROWS);
        let end = k.add(i, block);
        k.min(end, self.head.segment.length)
    }

    /// How many keys query `i` sees.
    fn limit(&self, k: &mut Kernel, i: Val) -> Val {
        let one = k.index(1);
        if self.head.form.causal { k.add(i, one) } else { self.head.segment.length }
    }

    /// The keys in the block of slots from `slot` on; where there is none, the nearest.
    fn keys(&self, k: &mut Kernel, slot: Val) -> Vec<Val> {
        let one = k.index(1);
        let last = k.sub(self.head.segment.length, one);
        let key = |r| {
            let r = k.index(r);
            let slot = k.add(slot, r);
            let slot = k.max(slot, self.head.phase);
            let key = k.sub(slot, self.head.phase);
            k.min(key, last)
        };
        (0..ROWS).map(key).collect()
    }

    /// The generator's key, if anything is dropped.
    fn generator(&self, k: &mut Kernel) -> Option<[Val; 2]> {
        self.head.rng.map(|rng| random::key(k, rng))
    }
}

fn segment(k: &mut Kernel, unit: Val, heads: Val, offsets: Buf) -> Segment {
    let (sequence, head) = (k.div(unit, heads), k.rem(unit, heads));
    Segment::of(k, (head, sequence), offsets)
}

fn round_up(k: &mut Kernel, n: Val, step: Val) -> Val {
    let one = k.index(1);
    let more = k.add(n, step);
    let more = k.sub(more, one);
    let steps = k.div(more, step);
    k.mul(steps, step)
}

/// The unit's rows of `from`, turned: element (i, e) goes to `e · stride + i`.
fn transpose(k: &mut Kernel, unit: &Unit, from: &Rows, width: Val, (to, at): (Buf, Val)) {
    let zero = k.index(0);
    let Machine::Cpu(cpu) = k.machine else { unreachable!("a GPU turns nothing round") };
    let turned = transpose_squares(k, unit, from, width, (to, at), cpu.registers().floats);
    let numbers = k.lane_numbers();
    let line = k.to_i32(from.line);
    let line = k.splat(line);
    let steps = k.mul(numbers, line);
    k.each(turned, width, 1, |k, e| {
        let column = k.mul(e, unit.stride);
        let column = k.add(at, column);
        k.each(zero, unit.head.segment.length, k.lane_count(), |k, i| {
            let left = k.sub(unit.head.segment.length, i);
            let mask = k.mask(left);
            let row = from.row(k, i);
            let source = k.add(row, e);
            let x = k.gather_lanes(from.buffer, source, steps, mask);
            let place = k.add(column, i);
            k.store_vector(x, to, place);
        });
    });
}

/// The same for as many columns as whole squares of `side` take, in registers; gives how many they are.
fn transpose_squares(k: &mut Kernel, unit: &Unit, from: &Rows, width: Val, (to, at): (Buf, Val), side: u64) -> Val {
    let (zero, step) = (k.index(0), k.index(side));
    let squares = k.div(width, step);
    let whole = k.mul(squares, step);
    k.each(zero, unit.head.segment.length, side, |k, i| {
        let rows = unit.head.segment.rows(k, i, side);
        let rows: Vec<Val> = rows.into_iter().map(|row| from.row(k, row)).collect();
        let first = k.add(at, i);
        k.each(zero, whole, side, |k, e| {
            let load = |&row: &Val| {
                let place = k.add(row, e);
                k.load_some(from.buffer, place, side)
            };
            let square = rows.iter().map(load).collect();
            for (c, column) in k.turned(square).into_iter().enumerate() {
                let c = k.index(c as u64);
                let e = k.add(e, c);
                let place = k.mul(e, unit.stride);
                let place = k.add(first, place);
                k.store_vector(column, to, place);
            }
        });
    });
    whole
}

/// The unit's rows of `from` without what lies between them: every block reads them again, and rows that are a wide
/// tensor's width apart would want the same few lines of the cache.
fn gathered(k: &mut Kernel, unit: &Unit, from: &Rows, width: Val, (buffer, base): (Buf, Val)) -> Rows {
    let zero = k.index(0);
    let rows = Rows { buffer, base, line: width };
    k.each(zero, unit.head.segment.length, 1, |k, i| {
        let (source, target) = (from.row(k, i), rows.row(k, i));
        copy::move_row(k, (from.buffer, source), (rows.buffer, target), width);
    });
    rows
}

/// Rows `i..` of `x` against the transposed side, `begin..end` of its lanes, into rows from `base` on.
#[allow(clippy::too_many_arguments)] // both sides of a product and its place
fn product(
    k: &mut Kernel,
    unit: &Unit,
    from: &Rows,
    block: &[Val],
    width: Val,
    (side, at): (Buf, Val),
    (begin, end): (Val, Val),
    (base, scale): (Val, f64),
) {
    let zero = k.index(0);
    let rows: Vec<Val> = block.iter().map(|&i| from.row(k, i)).collect();
    let lines: Vec<Val> = (0..ROWS).map(|r| unit.line(k, base, r)).collect();
    let vectors = across(k);
    k.each(begin, end, vectors * k.lane_count(), |k, j| {
        let start = zeros(k);
        let column = k.add(at, j);
        let sums = k.fold(zero, width, 1, &start, |k, e, sums| {
            let place = k.mul(e, unit.stride);
            let place = k.add(place, column);
            let columns: Vec<Val> = (0..vectors)
                .map(|v| {
                    let offset = k.index(v * k.lane_count());
                    let place = k.add(place, offset);
                    k.load_vector(side, place)
                })
                .collect();
            let x = |k: &mut Kernel, r: usize| {
                let place = k.add(rows[r], e);
                k.load(from.buffer, place)
            };
            k.outer(ROWS, x, &columns, sums, Kernel::fma)
        });
        let by = k.floats(scale);
        for (r, &line) in lines.iter().enumerate() {
            for v in 0..vectors {
                let sum = sums[r * vectors as usize + v as usize];
                let sum = if scale == 1.0 { sum } else { k.mul(sum, by) };
                let offset = k.index(v * k.lane_count());
                let place = k.add(line, j);
                let place = k.add(place, offset);
                k.store_vector(sum, unit.room.rows.0, place);
            }
        }
    });
}

/// Row `i + r` of `out`: the weights in row r from `base` on, `begin..end`, times rows of `y`.
#[allow(clippy::too_many_arguments)] // both sides of a product and its place
fn weighted(
    k: &mut Kernel,
    unit: &Unit,
    i: Val,
    (base, begin, end): (Val, Val, Val),
    y: &Rows,
    width: Val,
    out: &Rows,
) {
    let zero = k.index(0);
    let lines: Vec<Val> = (0..ROWS).map(|r| unit.line(k, base, r)).collect();
    let across = across(k);
    k.each(zero, width, across * k.lane_count(), |k, e| {
        let vectors = vectors(k, e, width);
        let start = zeros(k);
        let sums = k.fold(begin, end, 1, &start, |k, j, sums| {
            let row = y.row(k, j);
            let values: Vec<Val> = vectors
                .iter()
                .map(|&(at, mask)| {
                    let place = k.add(row, at);
                    k.load_lanes(y.buffer, place, mask)
                })
                .collect();
            let weight = |k: &mut Kernel, r: usize| {
                let place = k.add(lines[r], j);
                k.load(unit.room.rows.0, place)
            };
            k.outer(ROWS, weight, &values, sums, Kernel::fma)
        });
        for r in 0..ROWS {
            let offset = k.index(r);
            let row = k.add(i, offset);
            // There is none before the first or beyond the last.
            let missing = k.at_least_unsigned(row, unit.head.segment.length);
            let row = out.row(k, row);
            k.branch(
                missing,
                |_| {},
                |k| {
                    for (v, &(at, mask)) in vectors.iter().enumerate() {
                        let place = k.add(row, at);
                        k.store_lanes(sums[(r * across) as usize + v], out.buffer, place, mask);
                    }
                },
            );
        }
    });
}

fn lse(k: &mut Kernel, unit: &Unit) {
    let zero = k.index(0);
    let [q, keys] = &unit.head.operands[..] else { unreachable!("two operands") };
    transpose(k, unit, keys, unit.head.width, unit.room.first);
    k.each(zero, unit.head.segment.length, ROWS, |k, i| {
        let block = unit.head.segment.rows(k, i, ROWS);
        let end = unit.seen(k, i);
        product(k, unit, q, &block, unit.head.width, unit.room.first, (zero, end), (unit.scores, unit.head.form.scale));
        for (r, &row) in block.iter().enumerate() {
            let (line, limit) = (unit.line(k, unit.scores, r as u64), unit.limit(k, row));
            let lse = rows::logsumexp(k, unit.room.rows.0, Span { base: line, length: limit });
            let place = unit.head.results[0].row(k, row);
            k.store(lse, unit.head.results[0].buffer, place);
        }
    });
}

fn forward(k: &mut Kernel, unit: &Unit) {
    let zero = k.index(0);
    let [q, keys, v] = &unit.head.operands[..] else { unreachable!("three operands") };
    let generator = unit.generator(k);
    transpose(k, unit, keys, unit.head.width, unit.room.first);
    let values = gathered(k, unit, v, unit.head.wide, unit.room.other);
    k.each(zero, unit.head.segment.length, ROWS, |k, i| {
        let block = unit.head.segment.rows(k, i, ROWS);
        let end = unit.seen(k, i);
        product(k, unit, q, &block, unit.head.width, unit.room.first, (zero, end), (unit.scores, unit.head.form.scale));
        let weights = |(r, &row): (usize, &Val)| {
            let (line, limit) = (unit.line(k, unit.scores, r as u64), unit.limit(k, row));
            let span = Span { base: line, length: limit };
            let (most, total) = rows::exponentials(k, unit.room.rows.0, span, Some(unit.room.rows.0));
            if let Some(out) = unit.head.results.get(1) {
                let lse = rows::log_of(k, (most, total));
                let place = out.row(k, row);
                k.store(lse, out.buffer, place);
            }
            (limit, rows::share(k, total))
        };
        let weights: Vec<(Val, Val)> = block.iter().enumerate().map(weights).collect();
        along(k, unit, (i, end), generator, |k, r, place, at, dropped| {
            let (limit, share) = weights[r];
            let e = k.load_vector(unit.room.rows.0, place);
            let w = k.mul(e, share);
            let w = dropped(k, w);
            only_below(k, w, at, limit)
        });
        weighted(k, unit, i, (unit.scores, zero, end), &values, unit.head.wide, &unit.head.results[0]);
    });
}

/// The adjoint of the queries: lanes run over keys.
fn over_keys(k: &mut Kernel, unit: &Unit) {
    let zero = k.index(0);
    let [q, keys, v, lse, df, corrections] = &unit.head.operands[..] else { unreachable!("six operands") };
    let generator = unit.generator(k);
    transpose(k, unit, keys, unit.head.width, unit.room.first);
    transpose(k, unit, v, unit.head.wide, unit.room.second);
    let rows = gathered(k, unit, keys, unit.head.width, unit.room.factor);
    k.each(zero, unit.head.segment.length, ROWS, |k, i| {
        let block = unit.head.segment.rows(k, i, ROWS);
        let end = unit.seen(k, i);
        product(k, unit, q, &block, unit.head.width, unit.room.first, (zero, end), (unit.scores, unit.head.form.scale));
        product(k, unit, df, &block, unit.head.wide, unit.room.second, (zero, end), (unit.products, 1.0));
        let read = |(r, &row): (usize, &Val)| {
            let (place, place_r) = (lse.row(k, row), corrections.row(k, row));
            let (lse, correction) = (k.load(lse.buffer, place), k.load(corrections.buffer, place_r));
            (unit.line(k, unit.products, r as u64), unit.limit(k, row), k.splat(lse), k.splat(correction))
        };
        let read: Vec<(Val, Val, Val, Val)> = block.iter().enumerate().map(read).collect();
        let by = k.floats(unit.head.form.scale);
        along(k, unit, (i, end), generator, |k, r, place, at, dropped| {
            let (beside, limit, lse, correction) = read[r];
            let s = k.load_vector(unit.room.rows.0, place);
            let s = k.sub(s, lse);
            let w = math::exp(k, s);
            let offset = k.add(beside, at);
            let dp = k.load_vector(unit.room.rows.0, offset);
            let dp = dropped(k, dp);
            let ds = k.add(dp, correction);
            let ds = k.mul(ds, w);
            let ds = k.mul(ds, by);
            only_below(k, ds, at, limit)
        });
        weighted(k, unit, i, (unit.scores, zero, end), &rows, unit.head.width, &unit.head.results[0]);
    });
}

/// Computes what takes the place of each vector of the scores of queries from `i` on; `value` gets the row's number in
/// the block, the vector's place, its first key, and a way to drop what is dropped there.
fn along(
    k: &mut Kernel,
    unit: &Unit,
    (i, end): (Val, Val),
    generator: Option<[Val; 2]>,
    mut value: impl FnMut(&mut Kernel, usize, Val, Val, &dyn Fn(&mut Kernel, Val) -> Val) -> Val,
) {
    let zero = k.index(0);
    let lines: Vec<Val> = (0..ROWS).map(|r| unit.line(k, unit.scores, r)).collect();
    let first = generator.map_or(zero, |_| unit.head.phase);
    let token = k.add(unit.head.segment.start, i);
    let drawn = [token, unit.head.segment.head, unit.head.stream].map(|x| random::lanes_of(k, x));
    let slots = k.add(end, first);
    k.each(zero, slots, LANES, |k, slot| {
        let words = generator.map(|key| {
            let column = k.add(unit.head.column, slot);
            random::draw_rows(k, key, column, drawn)
        });
        let at = k.sub(slot, first);
        for (r, &line) in lines.iter().enumerate() {
            let place = k.add(line, at);
            let dropped =
                |k: &mut Kernel, x: Val| words.map_or(x, |words| random::dropped(k, x, words[r], unit.head.form.p));
            let y = value(k, r, place, at, &dropped);
            k.store_vector(y, unit.room.rows.0, place);
        }
    });
}

/// 0 in lanes from `limit` on; what stands there may be anything.
fn only_below(k: &mut Kernel, x: Val, at: Val, limit: Val) -> Val {
    let left = k.sub(limit, at);
    let mask = k.mask(left);
    let zero = k.floats(0.0);
    k.select(mask, x, zero)
}

/// The adjoint of keys, of values, or of both: lanes run over queries.
fn over_queries(k: &mut Kernel, unit: &Unit, part: Part) {
    let zero = k.index(0);
    let [q, keys, v, lse, df, corrections] = &unit.head.operands[..] else { unreachable!("six operands") };
    let generator = unit.generator(k);
    transpose(k, unit, q, unit.head.width, unit.room.first);
    let (of_keys, of_values) = (part != Part::Adjoint(2), part != Part::Adjoint(1));
    if of_keys {
        transpose(k, unit, df, unit.head.wide, unit.room.second);
    }
    let queries = of_keys.then(|| gathered(k, unit, q, unit.head.width, unit.room.factor));
    let adjoints = of_values.then(|| gathered(k, unit, df, unit.head.wide, unit.room.other));
    let slots = k.add(unit.head.segment.length, unit.head.phase);
    k.each(zero, slots, ROWS, |k, slot| {
        let block = unit.keys(k, slot);
        let j = block[0];
        // Queries before the first key do not see it; vectors begin where products do.
        let begin = if unit.head.form.causal {
            let step = k.index(across(k) * k.lane_count());
            let steps = k.div(j, step);
            k.mul(steps, step)
        } else {
            zero
        };
        product(
            k,
            unit,
            keys,
            &block,
            unit.head.width,
            unit.room.first,
            (begin, unit.head.segment.length),
            (unit.scores, unit.head.form.scale),
        );
        if of_keys {
            product(
                k,
                unit,
                v,
                &block,
                unit.head.wide,
                unit.room.second,
                (begin, unit.head.segment.length),
                (unit.products, 1.0),
            );
        }
        let lines: Vec<[Val; 2]> =
            (0..ROWS).map(|r| [unit.line(k, unit.scores, r), unit.line(k, unit.products, r)]).collect();
        k.each(begin, unit.head.segment.length, k.lane_count(), |k, i| {
            let left = k.sub(unit.head.segment.length, i);
            let mask = k.mask(left);
            let (place, place_r) = (lse.row(k, i), corrections.row(k, i));
            let lse = k.load_lanes(lse.buffer, place, mask);
            let correction = k.load_lanes(corrections.buffer, place_r, mask);
            let numbers = k.lane_numbers();
            let words = generator.map(|generator| {
                // One call for a query decides over the block's four keys.
                let column = k.add(unit.head.column, slot);
                let four = k.index(4);
                let column = k.div(column, four);
                let token = k.add(unit.head.segment.start, i);
                let place = [column, token, unit.head.segment.head, unit.head.stream];
                let [column, token, head, stream] = place.map(|x| random::lanes_of(k, x));
                let token = k.add(token, numbers);
                random::philox(k, [column, token, head, stream], generator)
            });
            let by = k.floats(unit.head.form.scale);
            let nothing = k.floats(0.0);
            for (r, &[line, beside]) in lines.iter().enumerate() {
                let place = k.add(line, i);
                let s = k.load_vector(unit.room.rows.0, place);
                let s = k.sub(s, lse);
                let w = math::exp(k, s);
                let dropped = |k: &mut Kernel, x: Val| match words {
                    Some(words) => random::dropped(k, x, words[r], unit.head.form.p),
                    None => x,
                };
                // Query i + lane sees key j + r from i + lane = j + r on.
                let earlier = unit.head.form.causal.then(|| {
                    let (first, key) = (k.to_i32(i), k.to_i32(block[r]));
                    let (first, key) = (k.splat(first), k.splat(key));
                    let query = k.add(numbers, first);
                    debug_assert_eq!(query.ty, k.vector(I32));
                    k.compare(query, Order::Lt, key)
                });
                let store = |k: &mut Kernel, y: Val, place: Val| {
                    let y = k.select(mask, y, nothing);
                    let y = earlier.map_or(y, |earlier| k.select(earlier, nothing, y));
                    k.store_vector(y, unit.room.rows.0, place);
                };
                let beside = k.add(beside, i);
                if of_keys {
                    let dp = k.load_vector(unit.room.rows.0, beside);
                    let dp = dropped(k, dp);
                    let ds = k.add(dp, correction);
                    let ds = k.mul(ds, w);
                    let ds = k.mul(ds, by);
                    store(k, ds, place);
                }
                if of_values {
                    let w = dropped(k, w);
                    // With both, in the place of what the keys' adjoint has used.
                    store(k, w, if of_keys { beside } else { place });
                }
            }
        });
        let from = if unit.head.form.causal { j } else { zero };
        let first = k.sub(slot, unit.head.phase);
        let mut out = &unit.head.results[0];
        if let Some(queries) = &queries {
            weighted(k, unit, first, (unit.scores, from, unit.head.segment.length), queries, unit.head.width, out);
            out = unit.head.results.get(1).unwrap_or(out);
        }
        if let Some(adjoints) = &adjoints {
            let base = if of_keys { unit.products } else { unit.scores };
            weighted(k, unit, first, (base, from, unit.head.segment.length), adjoints, unit.head.wide, out);
        }
    });
}
