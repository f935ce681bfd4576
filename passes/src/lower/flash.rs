//! Attention whose square exists nowhere, on a processor (a GPU's is in [`super::squares`]): a unit is one head of one
//! sequence, and of its square there are never more than [`ROWS`] rows, or the columns of one [`group`].
//!
//! ```text
//! forward     4 queries · keysᵀ               ─► weights   weights · values        ─► f
//! backward, group by group of keys:
//!             4 queries · keysᵀ, df · valuesᵀ ─► ds, w     ds · keys               ─► added to dq
//!             4 keys, when all queries are done            dsᵀ · queries, wᵀ · df  ─► dk, dv
//! ```
//!
//! Lanes run over keys; what stands on their side is transposed first, into a place of the unit's own. Backward, weights
//! are computed again from the scores and their log-sum-exp, once for all the adjoints that are wanted.
//!
//! One call of the generator decides over four neighbouring columns, and keys need not begin at a multiple of four:
//! they stand in *slots*, key j in slot `phase + j`, so that a slot's block is a call's.

use peft_grammar::graph::{Dim, Node, Op, Value};
use peft_runtime::artifact::{BufferId, Element, Extent, Storage};

use super::attention::{ROWS, Segment, VECTORS, across, vectors, zeros};
use super::rows;
use super::span::Span;
use super::view::{ONE, Step, View};
use super::{Lowering, dim_extent, squares};
use crate::builder::{Access, Buf, Kernel, LANES, Order, Val, define};
use crate::kernels::math;
use crate::kernels::philox as random;
use crate::target::Machine;
use crate::target::cuda::WARPS;

/// One call of the generator decides over a vector of each of a block's rows.
const _: () = assert!(LANES == ROWS * random::EACH);

/// Sizes of a kernel before those that say how its operands and results lie.
const SIZES: usize = 5;

/// Floats a sequence has room for beyond its length: rounded up with its phase, so that vectors need no masks.
const SLACK: u64 = VECTORS * LANES + ROWS;

/// Steps of a sum that are one turn of its loop.
const STEPS: u64 = 8;

/// Rows that memory is asked for before they are read: they are too short for the processor to see where the next begins.
const AHEAD: u64 = 8;

/// Columns of a tile. As many keys are a group, whose scores are computed and used before the next group's.
fn group(machine: Machine) -> u64 {
    across(machine) * LANES
}

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
    /// And those of queries, on a GPU by blocks of their own.
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

    /// It has the adjoint of an operand among its results.
    fn gives(self, operand: usize) -> bool {
        match self {
            Part::Forward | Part::Both | Part::Lse => false,
            Part::Adjoint(of) => of == operand,
            Part::Sides => operand > 0,
            Part::All => true,
        }
    }

    /// The scores' adjoint is needed for it.
    fn of_scores(self) -> bool {
        self.gives(0) || self.gives(1)
    }

    /// Numbers that a processor keeps for each of a sequence's tokens beside rows of the operands: forward scores of a
    /// block's rows, backward what becomes of those of a group.
    fn beside(self, machine: Machine) -> u64 {
        if self.forward() { ROWS } else { 2 * group(machine) }
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
        let factor = if part.gives(1) { self.scratch(place(width)) } else { first };
        let other = if part.gives(2) { self.scratch(place(wide)) } else { second };
        let rows = self.scratch(place(Extent::Const(part.beside(self.target.machine))));
        elements.extend([Element::F32; 5]);
        elements.push(Element::I32);
        buffers.extend([first, second, factor, other, rows, offsets]);
        let kernel = self.target.kernel(&name, |machine| {
            define(machine, &elements, sizes.len(), |k, buffers, sizes| {
                let room = Room::of(k, buffers, sizes, part);
                k.units(|k, unit| {
                    let unit = Unit::of(k, unit, &room, (buffers, sizes), (part, form), drops);
                    match part {
                        Part::Forward | Part::Both => forward(k, &unit),
                        Part::Lse => lse(k, &unit),
                        Part::Adjoint(_) | Part::Sides | Part::All => backward(k, &unit, part),
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

    /// The adjoints of queries, keys and values, one of which has this result: if no one reads the values' before the
    /// first of the others.
    fn sides(&self, result: Value) -> Option<[usize; 3]> {
        let at = self.graph.nodes.iter().position(|node| node.result == result)?;
        let beside =
            |at: usize| Some([self.adjoint_beside(at, 0)?, self.adjoint_beside(at, 1)?, self.adjoint_beside(at, 2)?]);
        let sides = beside(at).filter(|sides| sides.iter().all(|&side| beside(side) == Some(*sides)))?;
        let [queries, keys, values] = sides;
        self.read_after(values, queries.min(keys)).then_some(sides)
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
        let [width, wide, _, stream, column] = crate::builder::first(sizes);
        let count = buffers.len() - part.results();
        let (operands, results) = buffers.split_at(count);
        let (operands, rng) = operands.split_at(count - usize::from(drops));
        let mut all: Vec<Rows> = vec![];
        for (&buffer, lie) in operands.iter().chain(results).zip(sizes[SIZES..].chunks_exact(3)) {
            let [first, head, line] = crate::builder::first(lie);
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
    /// Transposed operands, and where they begin.
    first: (Buf, Val),
    second: (Buf, Val),
    /// For what the weights multiply.
    factor: (Buf, Val),
    other: (Buf, Val),
    /// Scores, or what becomes of a group's.
    rows: (Buf, Val),
}

impl Room {
    fn of(k: &mut Kernel, buffers: &[Buf], sizes: &[Val], part: Part) -> Room {
        let [first, second, factor, other, rows, offsets] = crate::builder::first(&buffers[buffers.len() - 6..]);
        let [width, wide, heads] = crate::builder::first(sizes);
        let unit = k.first_unit();
        let segment = segment(k, unit, heads, offsets);
        // Before it are all heads of earlier sequences, and some of this one.
        let earlier = k.mul(segment.start, heads);
        let beside = k.mul(segment.head, segment.length);
        let place = k.add(earlier, beside);
        let slack = k.index(SLACK);
        let slack = k.mul(unit, slack);
        let place = k.add(place, slack);
        let each = k.index(part.beside(k.machine));
        let [narrow, broad, rows_at] = [width, wide, each].map(|width| k.mul(place, width));
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
        Unit { head: Head::of(k, segment, (buffers, sizes), (part, form), drops), room }
    }

    /// How many keys query `i` sees.
    fn limit(&self, k: &mut Kernel, i: Val) -> Val {
        let one = k.index(1);
        if self.head.form.causal { k.add(i, one) } else { self.head.segment.length }
    }

    /// The keys in `count` slots from `slot` on; where there is none, the nearest.
    fn keys(&self, k: &mut Kernel, slot: Val, count: u64) -> Vec<Val> {
        let one = k.index(1);
        let last = k.sub(self.head.segment.length, one);
        let key = |r| {
            let r = k.index(r);
            let slot = k.add(slot, r);
            let slot = k.max(slot, self.head.phase);
            let key = k.sub(slot, self.head.phase);
            k.min(key, last)
        };
        (0..count).map(key).collect()
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

/// Rows of an operand, turned: lanes run over slots, and column e begins at `at + e · stride`.
struct Turned {
    buffer: Buf,
    at: Val,
    stride: Val,
}

/// The rows of `from` that stand in `count` slots from `slot` on; where there is none, the nearest.
fn transpose(k: &mut Kernel, unit: &Unit, from: &Rows, width: Val, (slot, count): (Val, Val), to: &Turned) {
    let Machine::Cpu(cpu) = k.machine else { unreachable!("a GPU turns nothing round") };
    let (zero, one) = (k.index(0), k.index(1));
    let turned = transpose_squares(k, unit, from, width, (slot, count), to, cpu.registers().floats);
    let last = k.sub(unit.head.segment.length, one);
    let [line, last] = [from.line, last].map(|x| random::lanes_of(k, x));
    let (numbers, all) = (k.lane_numbers(), k.index(LANES));
    let all = k.mask(all);
    k.each(turned, width, 1, |k, e| {
        let source = from.row(k, zero);
        let source = k.add(source, e);
        let column = k.mul(e, to.stride);
        let column = k.add(to.at, column);
        k.each(zero, count, LANES, |k, i| {
            let key = k.add(slot, i);
            let key = k.sub(key, unit.head.phase);
            let key = random::lanes_of(k, key);
            let key = k.add(key, numbers);
            let none = k.int(0, key.ty);
            let key = k.max(key, none);
            let key = k.min(key, last);
            let steps = k.mul(key, line);
            let x = k.gather_lanes(from.buffer, source, steps, all);
            let place = k.add(column, i);
            k.store_vector(x, to.buffer, place);
        });
    });
}

/// The same for as many columns as whole squares of `side` take, in registers; gives how many they are.
fn transpose_squares(
    k: &mut Kernel,
    unit: &Unit,
    from: &Rows,
    width: Val,
    (slot, count): (Val, Val),
    to: &Turned,
    side: u64,
) -> Val {
    let (zero, step) = (k.index(0), k.index(side));
    let squares = k.div(width, step);
    let whole = k.mul(squares, step);
    let ahead = k.index(AHEAD);
    let ahead = k.mul(from.line, ahead);
    k.each(zero, count, side, |k, i| {
        let slot = k.add(slot, i);
        let rows: Vec<Val> = unit.keys(k, slot, side).into_iter().map(|key| from.row(k, key)).collect();
        let first = k.add(to.at, i);
        k.each(zero, whole, side, |k, e| {
            let load = |&row: &Val| {
                let place = k.add(row, e);
                let later = k.add(place, ahead);
                k.prefetch(from.buffer, later, Access::Read);
                k.load_some(from.buffer, place, side)
            };
            let square = rows.iter().map(load).collect();
            for (c, column) in k.turned(square).into_iter().enumerate() {
                let c = k.index(c as u64);
                let e = k.add(e, c);
                let place = k.mul(e, to.stride);
                let place = k.add(first, place);
                k.store_vector(column, to.buffer, place);
            }
        });
    });
    whole
}

/// The unit's rows of `from` without what lies between them: they are read again and again, and rows that are a wide
/// tensor's width apart would want the same few lines of the cache.
fn gathered(k: &mut Kernel, unit: &Unit, from: &Rows, width: Val, (buffer, base): (Buf, Val)) -> Rows {
    let (zero, ahead) = (k.index(0), k.index(AHEAD));
    let rows = Rows { buffer, base, line: width };
    k.each(zero, unit.head.segment.length, 1, |k, i| {
        let (source, target) = (from.row(k, i), rows.row(k, i));
        let later = k.add(i, ahead);
        let later = from.row(k, later);
        k.lanes(width, |k, e, mask| {
            let [later, source, target] = [later, source, target].map(|row| k.add(row, e));
            k.prefetch(from.buffer, later, Access::Read);
            let x = k.load_lanes(from.buffer, source, mask);
            k.store_lanes(x, rows.buffer, target, mask);
        });
    });
    rows
}

/// A tile's sums: rows of `from`, which begin at `rows`, against the turned side's lanes from `j` on.
fn product(k: &mut Kernel, (from, rows): (Buf, &[Val]), width: Val, side: &Turned, j: Val) -> Vec<Val> {
    let zero = k.index(0);
    let column = k.add(side.at, j);
    let (start, vectors) = (zeros(k), across(k.machine));
    k.fold_in_turns(zero, width, STEPS, &start, |k, e, sums| {
        let place = k.mul(e, side.stride);
        let place = k.add(place, column);
        let columns: Vec<Val> = (0..vectors)
            .map(|v| {
                let offset = k.index(v * LANES);
                let place = k.add(place, offset);
                k.load_vector(side.buffer, place)
            })
            .collect();
        let x = |k: &mut Kernel, r: usize| {
            let place = k.add(rows[r], e);
            k.load(from, place)
        };
        k.outer(ROWS, x, &columns, sums, Kernel::fma)
    })
}

/// Where the weights of a tile's rows are.
struct Weights {
    buffer: Buf,
    base: Val,
    /// From one row's to the next one's, and from what multiplies a row of the factor to what multiplies the next.
    row: Val,
    step: Val,
}

/// A tile's sums: its rows' weights times rows `begin..end` of `y`, of which columns are taken.
fn weighted(k: &mut Kernel, weights: &Weights, (begin, end): (Val, Val), y: &Rows, columns: &[(Val, Val)]) -> Vec<Val> {
    let start = zeros(k);
    let lines: Vec<Val> = (0..ROWS)
        .map(|r| {
            let r = k.index(r);
            let offset = k.mul(r, weights.row);
            k.add(weights.base, offset)
        })
        .collect();
    k.fold_in_turns(begin, end, STEPS, &start, |k, j, sums| {
        let row = y.row(k, j);
        let values: Vec<Val> = columns
            .iter()
            .map(|&(at, mask)| {
                let place = k.add(row, at);
                k.load_lanes(y.buffer, place, mask)
            })
            .collect();
        let step = k.mul(j, weights.step);
        let weight = |k: &mut Kernel, r: usize| {
            let place = k.add(lines[r], step);
            k.load(weights.buffer, place)
        };
        k.outer(ROWS, weight, &values, sums, Kernel::fma)
    })
}

/// A tile's sums to rows of `out` from `i` on, as far as there are any; `more` is added to what is there.
fn put(k: &mut Kernel, unit: &Unit, i: Val, columns: &[(Val, Val)], sums: &[Val], (out, more): (&Rows, bool)) {
    for (r, sums) in sums.chunks(columns.len()).enumerate() {
        let offset = k.index(r as u64);
        let row = k.add(i, offset);
        // There is none before the first or beyond the last.
        let exists = k.below_unsigned(row, unit.head.segment.length);
        let row = out.row(k, row);
        k.when(exists, |k| {
            for (&sum, &(at, mask)) in sums.iter().zip(columns) {
                let place = k.add(row, at);
                let sum = if more {
                    let earlier = k.load_lanes(out.buffer, place, mask);
                    k.add(earlier, sum)
                } else {
                    sum
                };
                k.store_lanes(sum, out.buffer, place, mask);
            }
        });
    }
}

/// What queries make of all keys.
struct Scores {
    keys: Turned,
    /// Those of a block's row, and from one row to the next.
    base: Val,
    stride: Val,
}

impl Scores {
    fn of(k: &mut Kernel, unit: &Unit) -> Scores {
        let Head { segment, phase, width, .. } = &unit.head;
        let step = k.index(group(k.machine));
        let slots = k.add(segment.length, *phase);
        let stride = round_up(k, slots, step);
        let (buffer, at) = unit.room.first;
        let keys = Turned { buffer, at, stride };
        transpose(k, unit, &unit.head.operands[1], *width, (*phase, segment.length), &keys);
        Scores { keys, base: k.add(unit.room.rows.1, *phase), stride }
    }

    /// Computes those of a block of queries with the keys that one of them sees; gives up to where that is.
    fn block(&self, k: &mut Kernel, unit: &Unit, i: Val, block: &[Val]) -> Val {
        let Head { operands, segment, form, width, .. } = &unit.head;
        let (zero, q) = (k.index(0), &operands[0]);
        let rows: Vec<Val> = block.iter().map(|&i| q.row(k, i)).collect();
        let lines: Vec<Val> = (0..block.len()).map(|r| self.line(k, r)).collect();
        let end = if form.causal {
            let block = k.index(ROWS);
            let end = k.add(i, block);
            k.min(end, segment.length)
        } else {
            segment.length
        };
        let vectors = across(k.machine);
        k.each(zero, end, group(k.machine), |k, j| {
            let sums = product(k, (q.buffer, &rows), *width, &self.keys, j);
            let by = k.floats(form.scale);
            for (&line, sums) in lines.iter().zip(sums.chunks(vectors as usize)) {
                for (v, &sum) in sums.iter().enumerate() {
                    let sum = k.mul(sum, by);
                    let offset = k.index(v as u64 * LANES);
                    let place = k.add(line, j);
                    let place = k.add(place, offset);
                    k.store_vector(sum, unit.room.rows.0, place);
                }
            }
        });
        end
    }

    fn line(&self, k: &mut Kernel, r: usize) -> Val {
        let r = k.index(r as u64);
        let offset = k.mul(self.stride, r);
        k.add(self.base, offset)
    }
}

fn lse(k: &mut Kernel, unit: &Unit) {
    let zero = k.index(0);
    let scores = Scores::of(k, unit);
    k.each(zero, unit.head.segment.length, ROWS, |k, i| {
        let block = unit.head.segment.rows(k, i, ROWS);
        scores.block(k, unit, i, &block);
        for (r, &row) in block.iter().enumerate() {
            let (line, limit) = (scores.line(k, r), unit.limit(k, row));
            let lse = rows::logsumexp(k, unit.room.rows.0, Span { base: line, length: limit });
            let place = unit.head.results[0].row(k, row);
            k.store(lse, unit.head.results[0].buffer, place);
        }
    });
}

fn forward(k: &mut Kernel, unit: &Unit) {
    let Head { operands, results, segment, form, wide, stream, column, phase, .. } = &unit.head;
    let (zero, one, rows) = (k.index(0), k.index(1), unit.room.rows.0);
    let generator = unit.generator(k);
    let scores = Scores::of(k, unit);
    let values = gathered(k, unit, &operands[2], *wide, unit.room.other);
    k.each(zero, segment.length, ROWS, |k, i| {
        let block = segment.rows(k, i, ROWS);
        let end = scores.block(k, unit, i, &block);
        let weights = |(r, &row): (usize, &Val)| {
            let (line, limit) = (scores.line(k, r), unit.limit(k, row));
            let (most, total) = rows::exponentials(k, rows, Span { base: line, length: limit }, Some(rows));
            if let Some(out) = results.get(1) {
                let lse = rows::log_of(k, (most, total));
                let place = out.row(k, row);
                k.store(lse, out.buffer, place);
            }
            (line, limit, rows::share(k, total))
        };
        let weights: Vec<(Val, Val, Val)> = block.iter().enumerate().map(weights).collect();
        let first = generator.map_or(zero, |_| *phase);
        let token = k.add(segment.start, i);
        let drawn = [token, segment.head, *stream].map(|x| random::lanes_of(k, x));
        let slots = k.add(end, first);
        k.each(zero, slots, LANES, |k, slot| {
            let words = generator.map(|key| {
                let column = k.add(*column, slot);
                random::draw_rows(k, key, column, drawn)
            });
            let at = k.sub(slot, first);
            for (r, &(line, limit, share)) in weights.iter().enumerate() {
                let place = k.add(line, at);
                let e = k.load_vector(rows, place);
                let w = k.mul(e, share);
                let w = words.map_or(w, |words| random::dropped(k, w, words[r], form.p));
                // What stands beyond the limit may be anything.
                let left = k.sub(limit, at);
                let seen = k.mask(left);
                let nothing = k.floats(0.0);
                let w = k.select(seen, w, nothing);
                k.store_vector(w, rows, place);
            }
        });
        let weights = Weights { buffer: rows, base: scores.base, row: scores.stride, step: one };
        k.each(zero, *wide, group(k.machine), |k, e| {
            let columns = vectors(k, e, *wide);
            let sums = weighted(k, &weights, (zero, end), &values, &columns);
            put(k, unit, i, &columns, &sums, (&results[0], false));
        });
    });
}

/// Adjoints, group by group of keys, over which lanes run. What a group makes of the queries' adjoint is added to what
/// earlier ones did.
fn backward(k: &mut Kernel, unit: &Unit, part: Part) {
    let Head { operands, results, segment, form, width, wide, phase, .. } = &unit.head;
    let [q, keys, v, _, df, _] = &operands[..] else { unreachable!("six operands") };
    let (zero, one, stride) = (k.index(0), k.index(1), k.index(group(k.machine)));
    let mut results = results.iter();
    let mut result = |operand| part.gives(operand).then(|| results.next().expect("a result"));
    let (of_queries, of_keys, of_values) = (result(0), result(1), result(2));
    let queries = of_keys.map(|out| (out, gathered(k, unit, q, *width, unit.room.factor), *width, zero));
    let adjoints = of_values.map(|out| (out, gathered(k, unit, df, *wide, unit.room.other), *wide, stride));
    let [turned_keys, turned_values] =
        [unit.room.first, unit.room.second].map(|(buffer, at)| Turned { buffer, at, stride });
    let (scratch, base) = unit.room.rows;
    let line = k.index(part.beside(k.machine));
    let generator = unit.generator(k);
    let slots = k.add(segment.length, *phase);
    k.each(zero, slots, group(k.machine), |k, slot| {
        transpose(k, unit, keys, *width, (slot, stride), &turned_keys);
        let values = part.of_scores().then_some(&turned_values);
        if let Some(turned) = values {
            transpose(k, unit, v, *wide, (slot, stride), turned);
        }
        // The key in lane 0, if there is one; the group's first and where it ends.
        let lane = k.sub(slot, *phase);
        let from = k.max(lane, zero);
        let end = k.add(lane, stride);
        let end = k.min(end, segment.length);
        // Queries before the first key see none of them.
        let begin = if form.causal { from } else { zero };
        k.each(begin, segment.length, ROWS, |k, i| {
            let at = k.mul(i, line);
            let at = k.add(base, at);
            block(k, unit, (slot, lane), (i, at, line), (&turned_keys, values), part, generator);
            let Some(out) = of_queries else { return };
            let again = k.compare(slot, Order::Gt, zero);
            let weights = Weights { buffer: scratch, base: k.sub(at, lane), row: line, step: one };
            k.each(zero, *width, group(k.machine), |k, e| {
                let columns = vectors(k, e, *width);
                let sums = weighted(k, &weights, (from, end), keys, &columns);
                let write = |k: &mut Kernel, more| put(k, unit, i, &columns, &sums, (out, more));
                k.branch(again, |k| write(k, true), |k| write(k, false));
            });
        });
        for (out, factor, width, beside) in [&queries, &adjoints].into_iter().flatten() {
            k.each(zero, *width, group(k.machine), |k, e| {
                let columns = vectors(k, e, *width);
                k.each(lane, end, ROWS, |k, key| {
                    let at = k.sub(key, lane);
                    let at = k.add(at, *beside);
                    let weights = Weights { buffer: scratch, base: k.add(base, at), row: one, step: line };
                    let begin = if form.causal { k.max(key, zero) } else { zero };
                    let sums = weighted(k, &weights, (begin, segment.length), factor, &columns);
                    put(k, unit, key, &columns, &sums, (out, false));
                });
            });
        }
    });
}

/// What becomes of the scores of a block of queries from `i` on with a group's keys, to lines from `at` on: ds, and
/// behind it the weights. One is computed after the other, so that registers last.
fn block(
    k: &mut Kernel,
    unit: &Unit,
    (slot, lane): (Val, Val),
    (i, at, line): (Val, Val, Val),
    (keys, values): (&Turned, Option<&Turned>),
    part: Part,
    generator: Option<[Val; 2]>,
) {
    let Head { operands, segment, form, width, wide, stream, column, .. } = &unit.head;
    let [q, _, _, lse, df, corrections] = &operands[..] else { unreachable!("six operands") };
    let (zero, numbers, across) = (k.index(0), k.lane_numbers(), across(k.machine));
    let rows = segment.rows(k, i, ROWS);
    let [of_q, of_df] = [q, df].map(|of| rows.iter().map(|&i| of.row(k, i)).collect::<Vec<Val>>());
    let number = |k: &mut Kernel, of: &Rows, r: usize| {
        let place = of.row(k, rows[r]);
        let x = k.load(of.buffer, place);
        k.splat(x)
    };
    let token = k.add(segment.start, i);
    let drawn = [token, segment.head, *stream].map(|x| random::lanes_of(k, x));
    let offsets: Vec<Val> = (0..across).map(|v| k.index(v * LANES)).collect();
    let words: Option<Vec<[Val; 4]>> = generator.map(|key| {
        let first = k.add(*column, slot);
        let draw = |&offset: &Val| {
            let column = k.add(first, offset);
            random::draw_rows(k, key, column, drawn)
        };
        offsets.iter().map(draw).collect()
    });
    let places: Vec<(usize, usize)> = (0..rows.len()).flat_map(|r| (0..offsets.len()).map(move |v| (r, v))).collect();
    let dropped = |k: &mut Kernel, x: Val, (r, v): (usize, usize)| match &words {
        Some(words) => random::dropped(k, x, words[v][r], form.p),
        None => x,
    };
    let store = |k: &mut Kernel, x: Val, (r, v): (usize, usize), beside: Val| {
        let r = k.index(r as u64);
        let row = k.mul(r, line);
        let row = k.add(at, row);
        let place = k.add(row, offsets[v]);
        let place = k.add(place, beside);
        k.store_vector(x, unit.room.rows.0, place);
    };
    let (by, nothing) = (k.floats(form.scale), k.floats(0.0));
    let scores = product(k, (q.buffer, &of_q), *width, keys, zero);
    let weight = |(&s, &(r, v)): (&Val, &(usize, usize))| {
        let lse = number(k, lse, r);
        let s = k.mul(s, by);
        let s = k.sub(s, lse);
        let w = math::exp(k, s);
        let first = k.add(lane, offsets[v]);
        let limit = unit.limit(k, rows[r]);
        let [first, limit] = [first, limit].map(|x| random::lanes_of(k, x));
        let key = k.add(first, numbers);
        // Where there is no key before the first one, its number is below zero.
        let seen = k.below_unsigned(key, limit);
        k.select(seen, w, nothing)
    };
    let weights: Vec<Val> = scores.iter().zip(&places).map(weight).collect();
    if part.gives(2) {
        for (&w, &place) in weights.iter().zip(&places) {
            let w = dropped(k, w, place);
            store(k, w, place, keys.stride);
        }
    }
    let Some(values) = values else { return };
    let products = product(k, (df.buffer, &of_df), *wide, values, zero);
    for ((&dp, &w), &place) in products.iter().zip(&weights).zip(&places) {
        let correction = number(k, corrections, place.0);
        let dp = dropped(k, dp, place);
        let ds = k.add(dp, correction);
        let ds = k.mul(ds, w);
        let ds = k.mul(ds, by);
        store(k, ds, place, zero);
    }
}
