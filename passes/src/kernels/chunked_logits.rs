//! Chunked cross-entropy: the logits of a large vocabulary are never materialised (compare Wijmans et al. 2024, "Cut
//! Your Losses in Large-Vocabulary Language Models"). Between the products that compute one chunk of logits after the
//! other, these kernels update the running maximum and sum of each row (online softmax, Milakov & Gimelshein 2018), and
//! finally turn them into the log-sum-exp, or into the mean under the softmax.

use peft_runtime::artifact::Element;

use super::math;
use super::rowwise;
use super::span::Span;
use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, Kernel, Order, Val, define};
use crate::cost::{BATCHED_WARP_BYTES_IN_FLIGHT, LaunchCost, LaunchSizes, WARP_BYTES_IN_FLIGHT};
use crate::kernels::Scheduled;
use crate::target::Machine;
use crate::target::cuda::Card;
use crate::target::cuda::{WARP, WARPS};

arguments! {
    /// The kernel's buffers. If there is a mean, it comes after them.
    ChunkBuffers {
        scores,
        /// For each row the largest score so far, and Σ e^{s − max}.
        state
    }
}
arguments! {
    /// Sizes of the update.
    ChunkSizes {
        /// The length of a row of the chunk, and the length of a row of the mean.
        length, width,
        /// 1 if it is not the first chunk, else 0.
        accumulate
    }
}

/// Updates the state of each row with one chunk of scores. If there is a mean, it is rescaled as well, and the
/// exponentials overwrite the scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkUpdate {
    /// Whether the mean under the softmax is computed.
    pub mean: bool,
    /// On a GPU, a team updates one row, and each thread keeps so many scores in registers, so that all of their loads
    /// are in flight at once.
    pub scores_per_thread: Option<u64>,
}

impl Scheduled for ChunkUpdate {
    fn name_stem(&self) -> String {
        let stem = if self.mean { "linear_mean_chunk" } else { "linear_lse_chunk" };
        self.scores_per_thread.map_or(stem.into(), |vectors| format!("{stem}_registers{vectors}"))
    }

    fn emit(&self, machine: Machine) -> Code {
        let ChunkUpdate { mean, scores_per_thread } = *self;
        let count = ChunkBuffers::<Val>::COUNT + usize::from(mean);
        define(machine, &vec![Element::F32; count], ChunkSizes::<Val>::COUNT, |k, buffers, sizes| {
            let (ChunkBuffers { scores, state }, rest) = ChunkBuffers::split(buffers);
            let ChunkSizes { length, width, accumulate } = ChunkSizes::of(sizes);
            let mean = rest.first().copied();
            let shared = scores_per_thread.map(|vectors| (vectors, k.shared(WARP * WARPS)));
            k.team_units(|k, row| {
                let span = Span { base: k.mul(row, length), length };
                let register_row = shared.map(|(vectors, shared)| RegisterRow::of(k, scores, span, vectors, shared));
                let accumulate = k.compare(accumulate, Order::Gt, 0);
                let [maximum, total] = state_of(k, row);
                let (zero_f32, lowest) = (k.float(0.0, F32), k.float(f64::NEG_INFINITY, F32));
                // Before the first chunk the state is undefined.
                let before = k.load_or(accumulate, state, maximum, lowest);
                let sum = k.load_or(accumulate, state, total, zero_f32);

                let block = match &register_row {
                    None => rowwise::largest(k, scores, span),
                    Some(register_row) => register_row.largest(k),
                };
                let block = k.lane(block, 0);
                let now = k.max(block, before);
                let grown = k.sub(before, now);
                let factor = math::exp(k, grown);
                let (max, out) = (k.splat(now), mean.map(|_| scores));
                let more = match &register_row {
                    None => rowwise::powers(k, scores, span, max, out),
                    Some(register_row) => register_row.powers(k, max, out),
                };
                let sum = k.mul(sum, factor);
                let sum = k.add(sum, more);
                k.first_of_team(|k| {
                    k.store(now, state, maximum);
                    k.store(sum, state, total);
                });
                if let Some(mean) = mean {
                    let one = k.float(1.0, F32);
                    let shrinks = k.compare(factor, Order::Lt, one);
                    let shrinks = k.and(shrinks, accumulate);
                    k.when(shrinks, |k| scale(k, mean, row, width, factor));
                }
            });
        })
    }

    /// If rows are in registers, a warp has all loads of its part in flight.
    fn cost(&self, launched: LaunchSizes, _card: &Card) -> LaunchCost {
        launched.streaming(if self.scores_per_thread.is_some() {
            BATCHED_WARP_BYTES_IN_FLIGHT
        } else {
            WARP_BYTES_IN_FLIGHT
        })
    }

    /// The exponentials overwrite the scores.
    fn read_write(&self) -> Vec<usize> {
        if self.mean { vec![0] } else { vec![] }
    }
}

arguments! {
    /// The length of a row of the mean.
    FinishSizes { width }
}

/// Computes the results from the final state. Its buffers are the state, then the log-sum-exp and the mean, as far as
/// they are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkFinish {
    /// Whether it stores the log-sum-exp.
    pub lse: bool,
    /// Whether it computes the mean.
    pub mean: bool,
}

impl Scheduled for ChunkFinish {
    fn name_stem(&self) -> String {
        match (self.lse, self.mean) {
            (true, true) => "linear_lse_mean",
            (true, false) => "linear_lse",
            _ => "linear_mean",
        }
        .into()
    }

    fn emit(&self, machine: Machine) -> Code {
        let count = 1 + usize::from(self.lse) + usize::from(self.mean);
        define(machine, &vec![Element::F32; count], FinishSizes::<Val>::COUNT, |k, buffers, sizes| {
            let (state, mut results) = (buffers[0], buffers[1..].iter().copied());
            let [lse, mean] = [self.lse, self.mean].map(|there| if there { results.next() } else { None });
            let FinishSizes { width } = FinishSizes::of(sizes);
            k.team_units(|k, row| {
                let [maximum, total] = state_of(k, row);
                let sum = k.load(state, total);
                if let Some(out) = lse {
                    let maximum = k.load(state, maximum);
                    let log = math::log(k, sum);
                    let log = k.add(maximum, log);
                    k.first_of_team(|k| k.store(log, out, row));
                }
                if let Some(out) = mean {
                    let one = k.float(1.0, F32);
                    let share = k.div(one, sum);
                    scale(k, out, row, width, share);
                }
            });
        })
    }
}

/// The indices of a row's state: the largest score so far, and Σ e^{s − max}.
fn state_of(k: &mut Kernel, row: Val) -> [Val; 2] {
    let maximum = k.eval(row * 2);
    [maximum, k.eval(maximum + 1)]
}

/// The part of a row of scores that one thread of a team keeps in registers: for each score its value, its index, and
/// whether it exists.
struct RegisterRow {
    numbers: Vec<(Val, Val, Val)>,
    shared: Buf,
}

impl RegisterRow {
    fn of(k: &mut Kernel, scores: Buf, span: Span, vectors: u64, shared: Buf) -> RegisterRow {
        let lowest = k.float(f64::NEG_INFINITY, F32);
        let own = k.eval(span.base + k.thread());
        let left = k.eval(span.length - k.thread());
        let numbers = (0..vectors).map(|v| v * WARP * WARPS).map(|ahead| {
            let (place, there) = (k.eval(own + ahead), k.compare(ahead, Order::Lt, left));
            (k.load_if(there, scores, place, lowest), place, there)
        });
        RegisterRow { numbers: numbers.collect(), shared }
    }

    fn largest(&self, k: &mut Kernel) -> Val {
        let largest = self.numbers.iter().map(|&(x, ..)| x).reduce(|x, y| k.max(x, y)).expect("at least one");
        let largest = k.reduce_team(largest, Some(self.shared), Kernel::max);
        k.max_lanes(largest)
    }

    /// The same as [`rowwise::powers`].
    fn powers(&self, k: &mut Kernel, max: Val, out: Option<Buf>) -> Val {
        let powers = self.numbers.iter().map(|&(x, place, there)| {
            let x = k.sub(x, max);
            let e = math::exp(k, x);
            if let Some(out) = out {
                k.when(there, |k| k.store_scalar(e, out, place));
            }
            e
        });
        let powers: Vec<Val> = powers.collect();
        let sum = powers.into_iter().reduce(|x, y| k.add(x, y)).expect("at least one");
        let sum = k.sum_team(sum, Some(self.shared));
        k.sum_lanes(sum)
    }
}

/// Multiplies row `row` of `x` by `by`; a team divides the work.
fn scale(k: &mut Kernel, x: Buf, row: Val, width: Val, by: Val) {
    let base = k.mul(row, width);
    let by = k.splat(by);
    k.team_fold(0, width, k.lane_count(), &[], |k, j, _| {
        let mask = k.mask(width - j);
        let place = k.eval(base + j);
        let y = k.load_lanes(x, place, mask);
        let y = k.mul(y, by);
        k.store_lanes(y, x, place, mask);
        vec![]
    });
}
