//! Sums down columns.

use peft_runtime::artifact::Element;

use super::rowwise::Share;
use crate::abi::arguments;
use crate::builder::{Code, Order, Val, define};
use crate::cost::{Launched, MANY_UNDER_WAY, Work};
use crate::kernels::Scheduled;
use crate::target::Machine;
use crate::target::cuda::Card;

arguments! { ColumnBuffers { x, out } }
arguments! {
    /// Of a mean come [`Share`]'s after them.
    ColumnSizes {
        /// Rows that are added up, and their columns.
        count, inner,
        /// Of columns.
        blocks,
        /// From row to row.
        line,
        /// The first element.
        begin,
    }
}

/// Sums, or means, of rows that lie one below the other: a unit has `across` columns. A team shares a unit's rows, and
/// each of its members reads some at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SumColumns {
    pub mean: bool,
    pub across: u64,
    /// Rows that are read at once.
    pub ahead: u64,
}

impl Scheduled for SumColumns {
    fn word(&self) -> String {
        if self.mean { "mean_columns" } else { "sum_columns" }.into()
    }

    fn emit(&self, machine: Machine) -> Code {
        let SumColumns { mean, across, ahead } = *self;
        let share = if mean { Share::<Val>::COUNT } else { 0 };
        define(machine, &[Element::F32; 2], ColumnSizes::<Val>::COUNT + share, |k, buffers, sizes| {
            let ColumnBuffers { x, out } = ColumnBuffers::of(buffers);
            let (ColumnSizes { count, inner, blocks, line, begin }, rest) = ColumnSizes::split(sizes);
            let (share, _) = Share::split_if(mean, rest);
            let room = (k.team() > 1).then(|| k.shared(k.team() * k.lane_count()));
            k.team_units(|k, unit| {
                let (area, block) = (k.div(unit, blocks), k.rem(unit, blocks));
                let start = k.eval(block * across);
                let base = k.eval(area * (count * line) + start + begin);
                let lanes = k.lane_count();
                let offsets = (0..across).step_by(lanes as usize);
                let vectors: Vec<(u64, Val)> =
                    offsets.map(|offset| (offset, k.mask(inner - (start + offset)))).collect();
                let nothing = k.floats(0.0);
                let nothings = vec![nothing; vectors.len() * ahead as usize];
                let sums = k.dealt_fold(0, count, ahead, &nothings, |k, row, sums| {
                    let mut next = vec![];
                    for (a, sums) in (0..).zip(sums.chunks_exact(vectors.len())) {
                        let row = k.eval(row + a);
                        let exists = (ahead > 1).then(|| k.compare(row, Order::Lt, count));
                        let row = k.eval(base + row * line);
                        for (&(offset, mask), &sum) in vectors.iter().zip(sums) {
                            let mask = exists.map_or(mask, |exists| k.and(mask, exists));
                            let x = k.load_lanes(x, row + offset, mask);
                            next.push(k.add(sum, x));
                        }
                    }
                    next
                });
                let (first, others) = sums.split_at(vectors.len());
                let mut sums = first.to_vec();
                for others in others.chunks_exact(vectors.len()) {
                    sums = sums.iter().zip(others).map(|(&x, &y)| k.add(x, y)).collect();
                }
                let sums: Vec<Val> = sums.into_iter().map(|sum| k.sum_team(sum, room)).collect();
                let target = k.eval(area * inner + start);
                k.first_of_team(|k| {
                    for (&(offset, mask), &sum) in vectors.iter().zip(&sums) {
                        let mut sum = sum;
                        if let Some(share) = share {
                            let share = share.number(k);
                            let share = k.splat(share);
                            sum = k.mul(sum, share);
                        }
                        k.store_lanes(sum, out, target + offset, mask);
                    }
                });
            });
        })
    }

    fn work(&self, launched: Launched, _card: &Card) -> Work {
        launched.streams(MANY_UNDER_WAY)
    }
}
