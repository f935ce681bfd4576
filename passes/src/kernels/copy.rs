//! Moving elements.

use peft_runtime::artifact::Element;

use super::span::{RowSizes, Span};
use crate::abi::arguments;
use crate::builder::{Buf, Code, Kernel, Val, define};
use crate::kernels::Scheduled;
use crate::target::Machine;

arguments! { CopyBuffers { from, to } }

/// From one view of `rank` axes to another, row by row; elements are gathered where another axis runs along the source's
/// rows. Its sizes are the axes' lengths, the steps along them in the source, those in the target, and the first element of
/// either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyView {
    pub rank: usize,
    pub gathers: bool,
}

impl Scheduled for CopyView {
    fn word(&self) -> String {
        format!("copy{}_{}", self.rank, if self.gathers { "gather" } else { "rows" })
    }

    fn emit(&self, machine: Machine) -> Code {
        let CopyView { rank, gathers } = *self;
        define(machine, &[Element::F32; 2], 3 * rank + 2, |k, buffers, sizes| {
            let CopyBuffers { from, to } = CopyBuffers::of(buffers);
            let (sizes, rest) = sizes.split_at(rank);
            let (steps, rest) = rest.split_at(rank);
            let (steps_to, first) = rest.split_at(rank);
            let (length, step) = (sizes[rank - 1], steps[rank - 1]);
            k.units(|k, row| {
                let (mut source, mut target) = (first[0], first[1]);
                let mut rest = row;
                for axis in (0..rank - 1).rev() {
                    let index = if axis == 0 { rest } else { k.rem(rest, sizes[axis]) };
                    rest = k.div(rest, sizes[axis]);
                    source = k.eval(source + index * steps[axis]);
                    target = k.eval(target + index * steps_to[axis]);
                }
                let lanes = k.lane_numbers();
                let along = k.to_i32(step);
                let along = k.splat(along);
                let along = k.mul(lanes, along);
                k.lanes(length, |k, j, mask| {
                    let x = if gathers {
                        k.gather_lanes(from, source + j * step, along, mask)
                    } else {
                        k.load_lanes(from, source + j, mask)
                    };
                    k.store_lanes(x, to, target + j, mask);
                });
            });
        })
    }
}

arguments! {
    PadSizes {
        /// Elements of a row, where it begins in the wider one, and how many that has.
        length, start, width
    }
}

/// Rows into wider ones, with zeros beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pad;

impl Scheduled for Pad {
    fn word(&self) -> String {
        "pad".into()
    }

    fn emit(&self, machine: Machine) -> Code {
        define(machine, &[Element::F32; 2], PadSizes::<Val>::COUNT, |k, buffers, sizes| {
            let CopyBuffers { from, to } = CopyBuffers::of(buffers);
            let PadSizes { length, start, width } = PadSizes::of(sizes);
            k.units(|k, row| {
                let (source, target) = (k.mul(row, length), k.mul(row, width));
                let zero = k.floats(0.0);
                k.lanes(width, |k, j, mask| {
                    k.store_lanes(zero, to, target + j, mask);
                });
                k.settle();
                let target = k.add(target, start);
                move_row(k, (from, source), (to, target), length);
            });
        })
    }
}

/// Rows along a ragged axis, of the source or of the target or of both. Its buffers are [`CopyBuffers`] and the places of
/// ragged rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyRagged {
    /// The source, and the target.
    pub ragged: [bool; 2],
    /// The whole row of the source is copied, otherwise the whole row of the target is filled.
    pub by_source: bool,
    /// What is not filled becomes zero.
    pub clear: bool,
}

arguments! {
    /// After [`RowSizes`] of the source and of the target: of a row of either the first element that counts.
    RaggedSizes { start, start_to }
}

impl Scheduled for CopyRagged {
    fn word(&self) -> String {
        let [source, target] = self.ragged.map(|ragged| if ragged { "ragged" } else { "dense" });
        let way = if self.by_source { "source" } else { "target" };
        let cleared = if self.clear { "_cleared" } else { "" };
        format!("copy_{source}_to_{target}_by_{way}{cleared}")
    }

    fn emit(&self, machine: Machine) -> Code {
        let CopyRagged { ragged, by_source, clear } = *self;
        let elements = [Element::F32, Element::F32, Element::I32];
        let count = 2 * RowSizes::<Val>::COUNT + RaggedSizes::<Val>::COUNT;
        define(machine, &elements, count, |k, buffers, sizes| {
            let (CopyBuffers { from, to }, pairs) = CopyBuffers::split(buffers);
            let (of_target, rest) = (&sizes[RowSizes::<Val>::COUNT..], &sizes[2 * RowSizes::<Val>::COUNT..]);
            let RaggedSizes { start, start_to } = RaggedSizes::of(rest);
            k.units(|k, row| {
                let Span { base, length } = Span::of(k, row, sizes, ragged[0].then_some(pairs[0]));
                let Span { base: base_to, length: length_to } =
                    Span::of(k, row, of_target, ragged[1].then_some(pairs[0]));
                if clear {
                    let zero = k.floats(0.0);
                    k.lanes(length_to, |k, j, mask| {
                        k.store_lanes(zero, to, base_to + j, mask);
                    });
                    k.settle();
                }
                let (source, target) = (k.add(base, start), k.add(base_to, start_to));
                move_row(k, (from, source), (to, target), if by_source { length } else { length_to });
            });
        })
    }
}

fn move_row(k: &mut Kernel, (from, source): (Buf, Val), (to, target): (Buf, Val), length: Val) {
    k.lanes(length, |k, j, mask| {
        let x = k.load_lanes(from, source + j, mask);
        k.store_lanes(x, to, target + j, mask);
    });
}
