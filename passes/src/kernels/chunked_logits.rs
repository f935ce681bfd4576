//! What a sweep over blocks of logits does between their products: the state of each row takes a block in, and at last
//! becomes the log-sum-exp, or what the softmax expects.

use peft_runtime::artifact::Element;

use super::math;
use super::rowwise as rows;
use super::span::Span;
use crate::abi::arguments;
use crate::builder::{Buf, Code, F32, Kernel, Order, Val, define};
use crate::cost::{Launched, MANY_UNDER_WAY, UNDER_WAY, Work};
use crate::kernels::Scheduled;
use crate::target::Machine;
use crate::target::cuda::Card;
use crate::target::cuda::{WARP, WARPS};

arguments! {
    /// If there is a mean, its rows come after them.
    BlockBuffers {
        scores,
        /// The largest score so far of each row, and Σ e^{s − max}.
        state
    }
}
arguments! {
    BlockSizes {
        /// Of a block's rows, and of the mean's.
        length, width,
        /// 1 if it is not the first block.
        again
    }
}

/// Takes a block of scores in: the state and the mean grow, and exponentials take the scores' place if there is a mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Block {
    pub mean: bool,
    /// On a GPU a team has a row, and its threads hold so many numbers each in registers: all of them are on their way at
    /// once.
    pub held: Option<u64>,
}

impl Scheduled for Block {
    fn word(&self) -> String {
        let stem = if self.mean { "linear_mean_block" } else { "linear_lse_block" };
        self.held.map_or(stem.into(), |vectors| format!("{stem}_held{vectors}"))
    }

    fn emit(&self, machine: Machine) -> Code {
        let Block { mean, held } = *self;
        let count = BlockBuffers::<Val>::COUNT + usize::from(mean);
        define(machine, &vec![Element::F32; count], BlockSizes::<Val>::COUNT, |k, buffers, sizes| {
            let (BlockBuffers { scores, state }, rest) = BlockBuffers::split(buffers);
            let BlockSizes { length, width, again } = BlockSizes::of(sizes);
            let mean = rest.first().copied();
            let room = held.map(|vectors| (vectors, k.shared(WARP * WARPS)));
            k.team_units(|k, row| {
                let span = Span { base: k.mul(row, length), length };
                let held = room.map(|(vectors, room)| Held::of(k, scores, span, vectors, room));
                let again = k.compare(again, Order::Gt, 0);
                let [most, total] = state_of(k, row);
                let (nothing, lowest) = (k.float(0.0, F32), k.float(f64::NEG_INFINITY, F32));
                // Before the first block nothing is there to be read.
                let before = k.load_or(again, state, most, lowest);
                let sum = k.load_or(again, state, total, nothing);

                let block = match &held {
                    None => rows::largest(k, scores, span),
                    Some(held) => held.largest(k),
                };
                let block = k.lane(block, 0);
                let now = k.max(block, before);
                let grown = k.sub(before, now);
                let factor = math::exp(k, grown);
                let (max, out) = (k.splat(now), mean.map(|_| scores));
                let more = match &held {
                    None => rows::powers(k, scores, span, max, out),
                    Some(held) => held.powers(k, max, out),
                };
                let sum = k.mul(sum, factor);
                let sum = k.add(sum, more);
                k.first_of_team(|k| {
                    k.store(now, state, most);
                    k.store(sum, state, total);
                });
                if let Some(mean) = mean {
                    let one = k.float(1.0, F32);
                    let shrinks = k.compare(factor, Order::Lt, one);
                    let shrinks = k.and(shrinks, again);
                    k.when(shrinks, |k| scale(k, mean, row, width, factor));
                }
            });
        })
    }

    /// A whole row at once, if it is held.
    fn work(&self, launched: Launched, _card: &Card) -> Work {
        launched.streams(if self.held.is_some() { MANY_UNDER_WAY } else { UNDER_WAY })
    }

    /// The scores, whose place the exponentials take.
    fn anew(&self) -> Vec<usize> {
        if self.mean { vec![0] } else { vec![] }
    }
}

arguments! { EndSizes { width } }

/// What comes of the state: its buffers are that, the log-sum-exp and the mean, as far as they are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct End {
    pub lse: bool,
    pub mean: bool,
}

impl Scheduled for End {
    fn word(&self) -> String {
        match (self.lse, self.mean) {
            (true, true) => "linear_lse_mean",
            (true, false) => "linear_lse",
            _ => "linear_mean",
        }
        .into()
    }

    fn emit(&self, machine: Machine) -> Code {
        let count = 1 + usize::from(self.lse) + usize::from(self.mean);
        define(machine, &vec![Element::F32; count], EndSizes::<Val>::COUNT, |k, buffers, sizes| {
            let (state, mut results) = (buffers[0], buffers[1..].iter().copied());
            let [lse, mean] = [self.lse, self.mean].map(|there| if there { results.next() } else { None });
            let EndSizes { width } = EndSizes::of(sizes);
            k.team_units(|k, row| {
                let [most, total] = state_of(k, row);
                let sum = k.load(state, total);
                if let Some(out) = lse {
                    let most = k.load(state, most);
                    let log = math::log(k, sum);
                    let log = k.add(most, log);
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

/// Where a row's state lies: the largest score so far, and Σ e^{s − max}.
fn state_of(k: &mut Kernel, row: Val) -> [Val; 2] {
    let most = k.eval(row * 2);
    [most, k.eval(most + 1)]
}

/// What a thread of a GPU's team holds of a row of scores: numbers, their places, and which of them exist.
struct Held {
    numbers: Vec<(Val, Val, Val)>,
    room: Buf,
}

impl Held {
    fn of(k: &mut Kernel, scores: Buf, span: Span, vectors: u64, room: Buf) -> Held {
        let lowest = k.float(f64::NEG_INFINITY, F32);
        let own = k.eval(span.base + k.thread());
        let left = k.eval(span.length - k.thread());
        let numbers = (0..vectors).map(|v| v * WARP * WARPS).map(|ahead| {
            let (place, there) = (k.eval(own + ahead), k.compare(ahead, Order::Lt, left));
            (k.load_if(there, scores, place, lowest), place, there)
        });
        Held { numbers: numbers.collect(), room }
    }

    fn largest(&self, k: &mut Kernel) -> Val {
        let largest = self.numbers.iter().map(|&(x, ..)| x).reduce(|x, y| k.max(x, y)).expect("at least one");
        let largest = k.join_team(largest, Some(self.room), Kernel::max);
        k.max_lanes(largest)
    }

    /// [`rows::powers`].
    fn powers(&self, k: &mut Kernel, max: Val, out: Option<Buf>) -> Val {
        let powers = self.numbers.iter().map(|&(x, place, there)| {
            let x = k.sub(x, max);
            let e = math::exp(k, x);
            if let Some(out) = out {
                k.when(there, |k| k.store_here(e, out, place));
            }
            e
        });
        let powers: Vec<Val> = powers.collect();
        let sum = powers.into_iter().reduce(|x, y| k.add(x, y)).expect("at least one");
        let sum = k.sum_team(sum, Some(self.room));
        k.sum_lanes(sum)
    }
}

/// Row `row` of `x` times `by`, a team's work.
fn scale(k: &mut Kernel, x: Buf, row: Val, width: Val, by: Val) {
    let base = k.mul(row, width);
    let by = k.splat(by);
    k.dealt_fold(0, width, k.lane_count(), &[], |k, j, _| {
        let mask = k.mask(width - j);
        let place = k.eval(base + j);
        let y = k.load_lanes(x, place, mask);
        let y = k.mul(y, by);
        k.store_lanes(y, x, place, mask);
        vec![]
    });
}
