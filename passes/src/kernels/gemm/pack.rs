//! Packing of a product's operand, for a processor.

use peft_runtime::artifact::{Element, Extent};

use crate::abi::arguments;
use crate::builder::{Code, F32, Kernel, LANES, Order, Val, define};
use crate::kernels::Scheduled;
use crate::target::Machine;

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Factors {
    F32,
    /// Two of bf16 that are neighbours along k, in a word, on both sides.
    Pairs,
    /// Numbers of bf16: in B two neighbours of a line in a word, in A's copy floats.
    Widened,
}

impl Factors {
    /// For names.
    pub fn suffix(self) -> &'static str {
        match self {
            Factors::F32 => "",
            Factors::Pairs => "_bf16",
            Factors::Widened => "_bf16_widened",
        }
    }

    /// Of B.
    pub fn element(self) -> Element {
        match self {
            Factors::F32 => Element::F32,
            Factors::Pairs | Factors::Widened => Element::I32,
        }
    }

    /// Of A's copy.
    pub fn copied(self) -> Element {
        match self {
            Factors::F32 | Factors::Widened => Element::F32,
            Factors::Pairs => Element::I32,
        }
    }

    /// Numbers of a step along k.
    pub fn deep(self) -> u64 {
        match self {
            Factors::F32 | Factors::Widened => 1,
            Factors::Pairs => 2,
        }
    }

    /// In which B holds so many columns of a step.
    pub fn words(self, columns: u64) -> u64 {
        match self {
            Factors::F32 | Factors::Pairs => columns,
            Factors::Widened => columns / 2,
        }
    }

    /// Of a depth.
    pub fn steps(self, depth: Extent) -> Extent {
        match self.deep() {
            1 => depth,
            deep => Extent::CeilDiv(Box::new(depth), deep),
        }
    }
}

arguments! { PackBuffers { from, to } }
arguments! {
    PackSizes {
        /// Columns of B, and steps along k.
        length, depth,
        /// Panels of a batch.
        panels,
        line, area,
        /// The first element.
        begin,
    }
}

/// One panel a unit, `width` columns wide. What completes a last pair along k is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pack {
    pub width: u64,
    /// Columns of B stand side by side; otherwise steps along k do.
    pub contiguous: bool,
    pub factors: Factors,
}

impl Scheduled for Pack {
    fn word(&self) -> String {
        let side = if self.contiguous { "columns" } else { "rows" };
        format!("pack{}_{side}{}", self.width, self.factors.suffix())
    }

    fn emit(&self, machine: Machine) -> Code {
        let Pack { width, contiguous, factors } = *self;
        let elements = PackBuffers { from: Element::F32, to: factors.element() }.list();
        define(machine, &elements, PackSizes::<Val>::COUNT, |k, buffers, sizes| {
            let PackBuffers { from, to } = PackBuffers::of(buffers);
            let PackSizes { length, depth, panels, line, area, begin: first_column } = PackSizes::of(sizes);
            k.units(|k, unit| {
                let (batch, panel) = (k.div(unit, panels), k.rem(unit, panels));
                let area = k.eval(batch * area + first_column);
                let start = k.eval(panel * width);
                let left = k.eval(length - start);
                let steps = k.div_up(depth, factors.deep());
                let words = factors.words(width);
                let out = k.eval(unit * (steps * words));
                if contiguous {
                    k.each(0, steps, 1, |k, step| {
                        let at = k.eval(step * factors.deep());
                        let row = k.eval(at * line + start + area);
                        let target = k.eval(out + step * words);
                        for lane in (0..width).step_by(LANES as usize) {
                            let here = k.eval(left - lane);
                            let mask = k.mask(here);
                            let source = k.eval(row + lane);
                            let x = k.load_lanes(from, source, mask);
                            let x = match factors {
                                Factors::F32 => x,
                                Factors::Widened => k.pairs(false, x),
                                Factors::Pairs => {
                                    let whole = k.compare(depth - at, Order::Gt, 1);
                                    let both = k.select(whole, here, 0);
                                    let mask = k.mask(both);
                                    let below = k.load_lanes(from, source + line, mask);
                                    let x = k.interleave(x, below);
                                    k.pairs(true, x)
                                }
                            };
                            k.store_vector(x, to, target + factors.words(lane));
                        }
                    });
                } else {
                    // Rows in blocks of lanes along k: one cache line of each row is read while it is warm.
                    k.each(0, steps, LANES, |k, block| {
                        let end = k.min(block + LANES, steps);
                        let each = width / words;
                        k.each(0, words, 1, |k, word| {
                            // Of each column in the word, where it begins, and whether there is one.
                            let columns = (0..each).map(|i| {
                                let i = k.eval(word * each + i);
                                let exists = k.compare(i, Order::Lt, left);
                                let row = k.select(exists, start + i, start);
                                (k.eval(row * line + area), exists)
                            });
                            let columns: Vec<(Val, Val)> = columns.collect();
                            k.each(block, end, 1, |k, step| {
                                let at = k.eval(step * factors.deep());
                                let target = k.eval(step * words + word + out);
                                let number = |k: &mut Kernel, (row, exists): (Val, Val)| {
                                    let x = k.load(from, row + at);
                                    let nothing = k.float(0.0, F32);
                                    k.select(exists, x, nothing)
                                };
                                match factors {
                                    Factors::F32 => {
                                        let x = number(k, columns[0]);
                                        k.store(x, to, target);
                                    }
                                    Factors::Widened => {
                                        let (x, y) = (number(k, columns[0]), number(k, columns[1]));
                                        let x = k.paired(x, y);
                                        k.store(x, to, target);
                                    }
                                    Factors::Pairs => {
                                        let (row, exists) = columns[0];
                                        let here = k.select(exists, depth - at, 0);
                                        let mask = k.mask_of(here, 2);
                                        let x = k.load_lanes(from, row + at, mask);
                                        let x = k.pairs(true, x);
                                        k.store_vector(x, to, target);
                                    }
                                }
                            });
                        });
                    });
                }
            });
        })
    }
}
