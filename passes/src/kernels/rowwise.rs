//! Rowwise kernels: softmax, log-sum-exp, normalisation with an epilogue, sums of rows, cross-entropy, and means over
//! sequences. Every sum has one fixed order.

use peft_runtime::artifact::Element;

use super::elementwise::{self, Expression, Stage};
use super::epilogue::{Epilogue, RowSink};
use super::math;
use super::span::{RowSizes, Span, bounds};
use super::{FloatBits, embedding::table_row};
use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, Kernel, Val, define, first};
use crate::cost::{BATCHED_WARP_BYTES_IN_FLIGHT, LaunchCost, LaunchSizes, WARP_BYTES_IN_FLIGHT};
use crate::kernels::Scheduled;
use crate::target::Machine;
use crate::target::cuda::Card;
use crate::target::cuda::{WARP, WARPS};

/// An operation on rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowOp {
    /// softmax(x).
    Softmax,
    /// The adjoint of softmax's operand, from the result y and its adjoint dy: y ⊙ (dy − Σ y ⊙ dy).
    SoftmaxVjp,
    /// ln Σ eˣ, one number for each row.
    LogSumExp,
}

/// Computes one row, or one number, for each row of the operands. Its buffers are the operands, the result and, if rows
/// are ragged, their offsets; its sizes are [`RowSizes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowOperation {
    /// The operation.
    pub kind: RowOp,
    /// Whether rows are ragged.
    pub ragged: bool,
}

impl Scheduled for RowOperation {
    fn name_stem(&self) -> String {
        let kind = match self.kind {
            RowOp::Softmax => "softmax",
            RowOp::SoftmaxVjp => "softmax_vjp",
            RowOp::LogSumExp => "log_sum_exp",
        };
        format!("{kind}_{}", dense_or(self.ragged))
    }

    fn emit(&self, machine: Machine) -> Code {
        let operands = if self.kind == RowOp::SoftmaxVjp { 2 } else { 1 };
        let elements = [vec![Element::F32; operands + 1], places(self.ragged)].concat();
        define(machine, &elements, RowSizes::<Val>::COUNT, |k, buffers, sizes| {
            k.units(|k, row| {
                let span = Span::of(k, row, sizes, buffers.get(operands + 1).copied());
                match self.kind {
                    RowOp::Softmax => softmax(k, first(buffers), span),
                    RowOp::SoftmaxVjp => softmax_vjp(k, first(buffers), span),
                    RowOp::LogSumExp => {
                        let [x, out] = first(buffers);
                        let lse = logsumexp(k, x, span);
                        k.store(lse, out, row);
                    }
                }
            });
        })
    }
}

fn dense_or(ragged: bool) -> &'static str {
    if ragged { "ragged" } else { "dense" }
}

/// The elements of the buffer of offsets that ragged rows need.
fn places(ragged: bool) -> Vec<Element> {
    if ragged { vec![Element::I32] } else { vec![] }
}

/// Where a kernel keeps the rows of its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowStorage {
    /// In memory, all rows of one length.
    Dense,
    /// In memory, ragged.
    Ragged,
    /// In a GPU's registers, as so many vectors of a warp. All loads of a row are then in flight at once.
    InRegisters(u64),
}

/// Normalises rows to mean 0 and variance 1, or computes the adjoint of the operand, followed by an epilogue. Its
/// buffers are the operands, the result and, if rows are ragged, their offsets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Normalize {
    /// Whether it computes the adjoint of the operand, from the operand and the adjoint of the result.
    pub vjp: bool,
    /// The number that is added to the variance.
    pub eps: FloatBits,
    /// Where the rows are kept.
    pub storage: RowStorage,
    /// Whether the result is stored.
    pub stored: bool,
    /// The operations on the result.
    pub epilogue: Epilogue,
}

arguments! {
    /// The size after [`RowSizes`], which come first.
    NormalizeSizes {
        /// The number of rows of one batch.
        rows,
    }
}

impl Scheduled for Normalize {
    fn name_stem(&self) -> String {
        let vjp = if self.vjp { "_vjp" } else { "" };
        let lie = match self.storage {
            RowStorage::Dense => "dense".into(),
            RowStorage::Ragged => "ragged".into(),
            RowStorage::InRegisters(vectors) => format!("registers{vectors}"),
        };
        format!("normalize{vjp}_{lie}")
    }

    fn emit(&self, machine: Machine) -> Code {
        let Normalize { vjp, eps, storage, stored, epilogue } = self;
        let operands = if *vjp { 2 } else { 1 };
        let ragged = *storage == RowStorage::Ragged;
        let own = [vec![Element::F32; operands + 1], places(ragged)].concat();
        let sizes = RowSizes::<Val>::COUNT + NormalizeSizes::<Val>::COUNT;
        epilogue.define(machine, &own, sizes, |k, buffers, sizes, follows| {
            let registers = if let RowStorage::InRegisters(vectors) = *storage { Some(vectors) } else { None };
            let shared = registers.map(|vectors| k.shared(vectors * WARP * WARPS));
            let NormalizeSizes { rows } = NormalizeSizes::of(RowSizes::split(sizes).1);
            k.units(|k, row| {
                let span = Span::of(k, row, sizes, ragged.then(|| buffers[operands + 1]));
                let out = stored.then(|| buffers[operands]);
                let follow = RowSink::of(k, epilogue, (buffers, follows), out, (row, rows));
                let row = Row::of(k, &buffers[..operands], span, registers.zip(shared));
                match vjp {
                    false => normalize(k, &row, &follow, eps.get()),
                    true => normalize_vjp(k, &row, &follow, eps.get()),
                }
            });
        })
    }

    /// If rows are in registers, a warp has all loads of a row in flight.
    fn cost(&self, launched: LaunchSizes, _card: &Card) -> LaunchCost {
        launched.streaming(if let RowStorage::InRegisters(_) = self.storage {
            BATCHED_WARP_BYTES_IN_FLIGHT
        } else {
            WARP_BYTES_IN_FLIGHT
        })
    }
}

/// Sums or means of rows, where the rows are computed by a fused expression, and an epilogue follows. Its buffers are
/// those of the expression, whose last one, which would be the expression's result, is that of the sums; or the operand
/// and the result.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FusedRowSums {
    /// Whether it computes means.
    pub mean: bool,
    /// The expression that computes the rows; without one, rows are read from the operand.
    pub of: Option<Expression>,
    /// Whether there is an axis of batches.
    pub batched: bool,
    /// Whether the sums are stored.
    pub stored: bool,
    /// The operations on the sums.
    pub epilogue: Epilogue,
}

arguments! {
    /// The length of a row, and the number of rows of one batch. For a mean, the sizes of [`Share`] come next, then
    /// those of the expression.
    RowSumsSizes { length, rows }
}

arguments! {
    /// The number of elements that a mean divides by, as two sizes.
    Share {
        /// The elements of the operand, and those of the result.
        all, kept
    }
}

impl Share<Val> {
    /// 1 / the number of elements in one mean.
    pub fn number(self, k: &mut Kernel) -> Val {
        let (all, kept) = (k.to_float(self.all), k.to_float(self.kept));
        k.div(kept, all)
    }

    /// Splits off these sizes if it is a mean. Also returns the remaining sizes.
    pub fn split_if(mean: bool, sizes: &[Val]) -> (Option<Share<Val>>, &[Val]) {
        match mean {
            false => (None, sizes),
            true => {
                let (share, rest) = Share::split(sizes);
                (Some(share), rest)
            }
        }
    }
}

impl Scheduled for FusedRowSums {
    fn name_stem(&self) -> String {
        if self.mean { "mean_of_rows" } else { "sum_of_rows" }.into()
    }

    fn emit(&self, machine: Machine) -> Code {
        let FusedRowSums { mean, of, batched, stored, epilogue } = self;
        let own = of.as_ref().map_or(vec![Element::F32; 2], Expression::elements);
        let count = own.len();
        let share = if *mean { Share::<Val>::COUNT } else { 0 };
        let of_expression = of.as_ref().map_or(0, |of| of.sizes);
        let sizes = RowSumsSizes::<Val>::COUNT + share + of_expression;
        epilogue.define(machine, &own, sizes, |k, buffers, sizes, follows| {
            let (RowSumsSizes { length, rows }, rest) = RowSumsSizes::split(sizes);
            let (share, of_expression) = Share::split_if(*mean, rest);
            let out = buffers[count - 1];
            k.units(|k, row| {
                let follow = RowSink::of(k, epilogue, (buffers, follows), stored.then_some(out), (row, rows));
                let base = k.mul(row, length);
                let lanes: Box<elementwise::Lanes> = match of {
                    Some(form) => {
                        let buffers = buffers[..count].to_vec();
                        let (sizes, producers) = (of_expression, &[][..]);
                        let stage = Stage { expression: form, buffers, sizes, producers, stored: false, half: None };
                        let indices = if *batched { vec![follow.batch, follow.row] } else { vec![row] };
                        Box::new(elementwise::row_lanes(k, &stage, &indices, length))
                    }
                    None => Box::new(move |k: &mut Kernel, at, mask| k.load_lanes(buffers[0], base + at, mask)),
                };
                let zero = k.floats(0.0);
                let sums = k.fold_lanes(length, &[zero], |k, j, mask, sums| {
                    let x = lanes(k, j, mask);
                    // Lanes beyond the row hold undefined values.
                    let x = if of.is_some() { k.select(mask, x, zero) } else { x };
                    vec![k.add(sums[0], x)]
                });
                let share = share.map(|share| share.number(k));
                follow.sum(k, row, sums[0], share);
            });
        })
    }
}

/// Sums or means of rows in memory, dense or ragged, with nothing fused. Its buffers are the operand, the result and,
/// if rows are ragged, their offsets. For a mean, the sizes of [`Share`] come after [`RowSizes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PlainRowSums {
    /// Whether it computes means.
    pub mean: bool,
    /// Whether rows are ragged.
    pub ragged: bool,
}

impl Scheduled for PlainRowSums {
    fn name_stem(&self) -> String {
        format!("{}_rows_{}", if self.mean { "mean" } else { "sum" }, dense_or(self.ragged))
    }

    fn emit(&self, machine: Machine) -> Code {
        let elements = [vec![Element::F32; 2], places(self.ragged)].concat();
        let share = if self.mean { Share::<Val>::COUNT } else { 0 };
        define(machine, &elements, RowSizes::<Val>::COUNT + share, |k, buffers, sizes| {
            let [x, out] = first(buffers);
            let (share, _) = Share::split_if(self.mean, RowSizes::split(sizes).1);
            k.units(|k, row| {
                let Span { base, length } = Span::of(k, row, sizes, buffers.get(2).copied());
                let zero = k.floats(0.0);
                let sums = k.fold_lanes(length, &[zero], |k, j, mask, sums| {
                    let x = k.load_lanes(x, base + j, mask);
                    vec![k.add(sums[0], x)]
                });
                let mut sum = k.sum_lanes(sums[0]);
                if let Some(share) = share {
                    let share = share.number(k);
                    sum = k.mul(sum, share);
                }
                k.store(sum, out, row);
            });
        })
    }
}

/// The cross-entropy loss of each row, with label smoothing (Szegedy et al. 2016), or the adjoint of the logits from
/// that of the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CrossEntropy {
    /// Whether it computes the adjoint of the logits.
    pub vjp: bool,
    /// The weight of the uniform distribution in the target distribution.
    pub smoothing: FloatBits,
}

arguments! {
    /// The kernel's buffers. For the adjoint, that of the loss comes after them.
    CrossEntropyBuffers { logits, labels, out }
}
arguments! {
    /// The number of classes, which is the length of a row.
    CrossEntropySizes { classes }
}

impl Scheduled for CrossEntropy {
    fn name_stem(&self) -> String {
        let vjp = if self.vjp { "_vjp" } else { "" };
        format!("cross_entropy{vjp}{}", self.smoothing.zero_suffix())
    }

    fn emit(&self, machine: Machine) -> Code {
        let CrossEntropy { vjp, smoothing } = *self;
        let smoothing = smoothing.get();
        let mut elements = CrossEntropyBuffers { logits: Element::F32, labels: Element::I32, out: Element::F32 }.list();
        elements.extend(vjp.then_some(Element::F32));
        define(machine, &elements, CrossEntropySizes::<Val>::COUNT, |k, buffers, sizes| {
            let (CrossEntropyBuffers { logits, labels, out }, adjoint) = CrossEntropyBuffers::split(buffers);
            let CrossEntropySizes { classes: width } = CrossEntropySizes::of(sizes);
            k.units(|k, row| {
                let span = Span { base: k.mul(row, width), length: width };
                // A label that is not one of the classes has weight 0.
                let (class, inside) = table_row(k, labels, row, 0, width);
                let class = k.select(inside, class, 0);
                let label = k.eval(span.base + class);
                let lse = logsumexp(k, logits, span);
                match adjoint.first() {
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
    }
}

/// The mean of the tokens of each sequence, or the adjoint of the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SegmentMean {
    /// Whether it computes the adjoint of the tokens.
    pub vjp: bool,
}

arguments! {
    /// The kernel's buffers. For the adjoint, the index of each token's sequence comes after them.
    SegmentBuffers { x, out, offsets }
}
arguments! {
    /// The width of a token's row.
    SegmentSizes { width }
}

impl Scheduled for SegmentMean {
    fn name_stem(&self) -> String {
        if self.vjp { "segment_mean_vjp" } else { "segment_mean" }.into()
    }

    fn emit(&self, machine: Machine) -> Code {
        let mut elements = SegmentBuffers { x: Element::F32, out: Element::F32, offsets: Element::I32 }.list();
        elements.extend(self.vjp.then_some(Element::I32));
        define(machine, &elements, SegmentSizes::<Val>::COUNT, |k, buffers, sizes| {
            let (own, segments) = SegmentBuffers::split(buffers);
            let SegmentSizes { width } = SegmentSizes::of(sizes);
            k.units(|k, unit| match segments.first() {
                None => segment_mean(k, own, width, unit),
                Some(&segments) => segment_mean_vjp(k, own, segments, width, unit),
            });
        })
    }
}

/// The unit of one sequence.
fn segment_mean(k: &mut Kernel, SegmentBuffers { x, out, offsets }: SegmentBuffers<Buf>, width: Val, s: Val) {
    let (from, to, length) = bounds(k, offsets, s);
    let length = k.to_float(length);
    let length = k.splat(length);
    let target = k.mul(s, width);
    k.lanes(width, |k, j, mask| {
        let zero = k.floats(0.0);
        let sum = k.fold(from, to, 1, &[zero], |k, token, sum| {
            let x = k.load_lanes(x, token * width + j, mask);
            vec![k.add(sum[0], x)]
        });
        let mean = k.div(sum[0], length);
        k.store_lanes(mean, out, target + j, mask);
    });
}

/// The unit of one token.
fn segment_mean_vjp(
    k: &mut Kernel,
    SegmentBuffers { x: y, out, offsets }: SegmentBuffers<Buf>,
    segments: Buf,
    width: Val,
    token: Val,
) {
    let s = k.load_index(segments, token);
    let (.., length) = bounds(k, offsets, s);
    let length = k.to_float(length);
    let length = k.splat(length);
    let (source, target) = (k.mul(s, width), k.mul(token, width));
    k.lanes(width, |k, j, mask| {
        let x = k.load_lanes(y, source + j, mask);
        let x = k.div(x, length);
        k.store_lanes(x, out, target + j, mask);
    });
}

/// The largest element of the row, in every lane.
pub fn largest(k: &mut Kernel, x: Buf, span: Span) -> Val {
    let lowest = k.floats(f64::NEG_INFINITY);
    let largest = k.fold_lanes(span.length, &[lowest], |k, j, mask, largest| {
        let x = k.load_masked(x, span.base + j, mask, lowest);
        vec![k.max(largest[0], x)]
    });
    let largest = k.max_lanes(largest[0]);
    k.splat(largest)
}

/// The sum of `term` along the row.
pub fn sum(k: &mut Kernel, span: Span, mut term: impl FnMut(&mut Kernel, Val, Val) -> Val) -> Val {
    let zero = k.floats(0.0);
    let sum = k.fold_lanes(span.length, &[zero], |k, j, mask, sum| {
        let place = k.eval(span.base + j);
        let x = term(k, place, mask);
        vec![k.add(sum[0], x)]
    });
    k.sum_lanes(sum[0])
}

/// Stores `value` along the row.
pub fn fill(k: &mut Kernel, span: Span, out: Buf, mut value: impl FnMut(&mut Kernel, Val, Val) -> Val) {
    k.lanes(span.length, |k, j, mask| {
        let place = k.eval(span.base + j);
        let y = value(k, place, mask);
        k.store_lanes(y, out, place, mask);
    });
}

/// `x` in the lanes of `mask`, and 0 in the others.
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

/// Σ e^{x − max}, for a maximum in every lane. The exponentials are stored to `out`, if there is one.
pub fn powers(k: &mut Kernel, x: Buf, span: Span, max: Val, out: Option<Buf>) -> Val {
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

/// The maximum, in every lane, and Σ e^{x − max}. The exponentials are stored to `out`, if there is one.
pub fn exponentials(k: &mut Kernel, x: Buf, span: Span, out: Option<Buf>) -> (Val, Val) {
    let max = largest(k, x, span);
    (max, powers(k, x, span, max, out))
}

/// The factor 1 / total of each exponential in a softmax, in every lane.
pub fn share(k: &mut Kernel, total: Val) -> Val {
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

/// A row of the operands, in memory or in registers.
struct Row<'a> {
    operands: &'a [Buf],
    span: Span,
    /// If the row is in registers: the vectors of each operand, the mask of each vector, and shared memory for one row
    /// of the warp.
    registers: Option<(Vec<Vec<Val>>, Vec<Val>, Buf)>,
}

/// A vector of the row: the index of its first element in memory, or its number in registers.
#[derive(Clone, Copy)]
enum VectorIndex {
    Memory(Val),
    Register(usize),
}

impl<'a> Row<'a> {
    fn of(k: &mut Kernel, operands: &'a [Buf], span: Span, registers: Option<(u64, Buf)>) -> Row<'a> {
        let registers = registers.map(|(vectors, shared)| {
            let places: Vec<(Val, Val)> = (0..vectors)
                .map(|v| {
                    let left = k.eval(span.length - v * WARP);
                    (k.eval(span.base + v * WARP), k.mask(left))
                })
                .collect();
            let vector = |k: &mut Kernel, x: Buf, v: usize| match places[v] {
                // Only the last vector may be partial.
                (place, mask) if v + 1 == places.len() => k.load_lanes(x, place, mask),
                (place, _) => k.load_vector(x, place),
            };
            let all = operands.iter().map(|&x| (0..places.len()).map(|v| vector(k, x, v)).collect()).collect();
            (
                all,
                places.iter().map(|&(_, mask)| mask).collect(),
                k.subbuffer(shared, k.thread() / WARP * (vectors * WARP)),
            )
        });
        Row { operands, span, registers }
    }

    /// Loads a vector of an operand.
    fn load(&self, k: &mut Kernel, operand: usize, at: VectorIndex, mask: Val) -> Val {
        match (at, &self.registers) {
            (VectorIndex::Register(v), Some((vectors, ..))) => vectors[operand][v],
            (VectorIndex::Memory(place), _) => k.load_lanes(self.operands[operand], place, mask),
            _ => unreachable!("a row in registers is read by the number of its vector"),
        }
    }

    /// The sum of `term` along the row.
    fn sum(&self, k: &mut Kernel, term: impl Fn(&mut Kernel, VectorIndex, Val) -> Val) -> Val {
        let Some((_, masks, _)) = &self.registers else {
            return sum(k, self.span, |k, place, mask| term(k, VectorIndex::Memory(place), mask));
        };
        let terms: Vec<Val> =
            masks.iter().enumerate().map(|(v, &mask)| term(k, VectorIndex::Register(v), mask)).collect();
        let all = terms.into_iter().reduce(|x, y| k.add(x, y)).expect("at least one");
        k.sum_lanes(all)
    }

    /// Computes the row of the result, and hands it to the epilogue.
    fn fill(&self, k: &mut Kernel, follow: &RowSink, value: impl Fn(&mut Kernel, VectorIndex, Val) -> Val) {
        let Some((_, masks, shared)) = &self.registers else {
            return follow.fill(k, self.span, |k, place, mask| value(k, VectorIndex::Memory(place), mask));
        };
        for (v, &mask) in masks.iter().enumerate() {
            let y = value(k, VectorIndex::Register(v), mask);
            k.store_vector(y, *shared, v as u64 * WARP);
        }
        k.sync_lanes();
        follow.fill(k, self.span, |k, place, mask| k.load_lanes(*shared, place - self.span.base, mask));
        k.sync_lanes();
    }
}

/// The mean, and 1 / √(variance + eps), both in every lane.
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

fn normalize(k: &mut Kernel, row: &Row, follow: &RowSink, eps: f64) {
    let (mean, scale) = moments(k, row, eps);
    row.fill(k, follow, |k, at, mask| {
        let x = row.load(k, 0, at, mask);
        let d = k.sub(x, mean);
        k.mul(d, scale)
    });
}

/// dx = (dy − mean(dy) − x̂ mean(dy ⊙ x̂)) / σ
fn normalize_vjp(k: &mut Kernel, row: &Row, follow: &RowSink, eps: f64) {
    let (mean, scale) = moments(k, row, eps);
    let hat = |k: &mut Kernel, at: VectorIndex, mask: Val| {
        let x = row.load(k, 0, at, mask);
        let d = k.sub(x, mean);
        k.mul(d, scale)
    };
    let length = k.to_float(row.span.length);
    let total = row.sum(k, |k, at, mask| row.load(k, 1, at, mask));
    let projection = row.sum(k, |k, at, mask| {
        let hat = hat(k, at, mask);
        let dy = row.load(k, 1, at, mask);
        k.mul(hat, dy)
    });
    let (total, projection) = (k.div(total, length), k.div(projection, length));
    let (total, projection) = (k.splat(total), k.splat(projection));
    row.fill(k, follow, |k, at, mask| {
        let hat = hat(k, at, mask);
        let dy = row.load(k, 1, at, mask);
        let d = k.sub(dy, total);
        let share = k.mul(hat, projection);
        let d = k.sub(d, share);
        k.mul(d, scale)
    });
}

/// ln Σ eˣ of the row.
pub fn logsumexp(k: &mut Kernel, x: Buf, span: Span) -> Val {
    let sum = exponentials(k, x, span, None);
    log_of(k, sum)
}

/// ln Σ eˣ, from the maximum and Σ e^{x − max}.
pub fn log_of(k: &mut Kernel, (max, total): (Val, Val)) -> Val {
    let total = math::log(k, total);
    let max = k.lane(max, 0);
    k.add(max, total)
}

/// ℓ = lse − (1 − ε) x_label − ε / V Σ x, for the smoothing ε and V classes.
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

/// dx = dℓ (softmax(x) − w), for the target distribution w.
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
        k.sync_lanes();
        let d = k.load(out, label);
        let d = k.sub(d, hit);
        k.sync_lanes();
        k.store(d, out, label);
    });
}
