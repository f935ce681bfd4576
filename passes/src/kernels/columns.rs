//! Sums of columns.

use peft_runtime::artifact::Element;

use super::rowwise::Share;
use crate::abi::arguments;
use crate::builder::{Code, Order, Val, define};
use crate::cost::{BATCHED_WARP_BYTES_IN_FLIGHT, LaunchCost, LaunchSizes};
use crate::kernels::Scheduled;
use crate::target::Machine;
use crate::target::cuda::Card;

arguments! {
    /// The operand, and the result.
    ColumnBuffers { x, out }
}
arguments! {
    /// Sizes of the kernel. For a mean, those of [`Share`] come after them.
    ColumnSizes {
        /// The number of rows that are added up, and the number of their columns.
        count, inner,
        /// The number of units that divide the columns.
        blocks,
        /// The stride from row to row, in elements.
        row_stride,
        /// The index of the first element.
        offset,
    }
}

/// Sums or means of columns. A unit computes `columns` columns. The members of a team divide the rows of a unit, and
/// each member has the loads of several rows in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ColumnSums {
    /// Whether it computes means.
    pub mean: bool,
    /// Columns of a unit.
    pub columns: u64,
    /// Rows that a member loads at once.
    pub rows_at_once: u64,
}

impl Scheduled for ColumnSums {
    fn name_stem(&self) -> String {
        if self.mean { "mean_columns" } else { "sum_columns" }.into()
    }

    fn emit(&self, machine: Machine) -> Code {
        let ColumnSums { mean, columns, rows_at_once } = *self;
        let share = if mean { Share::<Val>::COUNT } else { 0 };
        define(machine, &[Element::F32; 2], ColumnSizes::<Val>::COUNT + share, |k, buffers, sizes| {
            let ColumnBuffers { x, out } = ColumnBuffers::of(buffers);
            let (ColumnSizes { count, inner, blocks, row_stride, offset }, rest) = ColumnSizes::split(sizes);
            let (share, _) = Share::split_if(mean, rest);
            let shared = (k.team() > 1).then(|| k.shared(k.team() * k.lane_count()));
            k.team_units(|k, unit| {
                let (area, block) = (k.div(unit, blocks), k.rem(unit, blocks));
                let start = k.eval(block * columns);
                let base = k.eval(area * (count * row_stride) + start + offset);
                let lanes = k.lane_count();
                let offsets = (0..columns).step_by(lanes as usize);
                let vectors: Vec<(u64, Val)> =
                    offsets.map(|offset| (offset, k.mask(inner - (start + offset)))).collect();
                let zero_f32 = k.floats(0.0);
                let zeros = vec![zero_f32; vectors.len() * rows_at_once as usize];
                let sums = k.team_fold(0, count, rows_at_once, &zeros, |k, row, sums| {
                    let mut next = vec![];
                    for (a, sums) in (0..).zip(sums.chunks_exact(vectors.len())) {
                        let row = k.eval(row + a);
                        let exists = (rows_at_once > 1).then(|| k.compare(row, Order::Lt, count));
                        let row = k.eval(base + row * row_stride);
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
                let sums: Vec<Val> = sums.into_iter().map(|sum| k.sum_team(sum, shared)).collect();
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

    fn cost(&self, launched: LaunchSizes, _card: &Card) -> LaunchCost {
        launched.streaming(BATCHED_WARP_BYTES_IN_FLIGHT)
    }
}
