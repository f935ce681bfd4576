//! Copies: between strided views, into wider rows, and along ragged axes.

use peft_runtime::artifact::Element;

use super::span::{RowSizes, Span};
use crate::abi::arguments;
use crate::builder::{Buf, Code, Kernel, Val, define};
use crate::kernels::Scheduled;
use crate::target::Machine;

arguments! {
    /// The source, and the target.
    CopyBuffers { from, to }
}

/// Copies one view of `rank` axes to another, row by row. Its sizes are the lengths of the axes, the source's strides,
/// the target's strides, and the indices of the first elements of source and target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyView {
    /// The number of axes.
    pub rank: usize,
    /// Whether a row of the source is strided, so that its elements are gathered.
    pub gathers: bool,
}

impl Scheduled for CopyView {
    fn name_stem(&self) -> String {
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
                let lane_offsets = k.to_i32(step);
                let lane_offsets = k.splat(lane_offsets);
                let lane_offsets = k.mul(lanes, lane_offsets);
                k.lanes(length, |k, j, mask| {
                    let x = if gathers {
                        k.gather_lanes(from, source + j * step, lane_offsets, mask)
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
    /// Sizes of a padding copy.
    PadSizes {
        /// The length of a row, its first column in the wider row, and the length of the wider row.
        length, start, width
    }
}

/// Copies rows into wider rows, and fills the rest with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pad;

impl Scheduled for Pad {
    fn name_stem(&self) -> String {
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
                k.sync_lanes();
                let target = k.add(target, start);
                move_row(k, (from, source), (to, target), length);
            });
        })
    }
}

/// Copies rows along a ragged axis of the source, of the target, or of both. Its buffers are [`CopyBuffers`] and the
/// offsets of the ragged rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyRagged {
    /// Whether the source is ragged, and whether the target is.
    pub ragged: [bool; 2],
    /// Whether the length of a copy is that of the source's row; otherwise it is that of the target's row.
    pub by_source: bool,
    /// Whether the rest of the target's row is filled with zeros.
    pub clear: bool,
}

arguments! {
    /// The first column that is copied from in a row of the source, and the first that is copied to in a row of the
    /// target. They come after [`RowSizes`] of the source and of the target.
    RaggedSizes { start, start_to }
}

impl Scheduled for CopyRagged {
    fn name_stem(&self) -> String {
        let [source, target] = self.ragged.map(|ragged| if ragged { "ragged" } else { "dense" });
        let side = if self.by_source { "source" } else { "target" };
        let cleared = if self.clear { "_cleared" } else { "" };
        format!("copy_{source}_to_{target}_by_{side}{cleared}")
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
                    k.sync_lanes();
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
