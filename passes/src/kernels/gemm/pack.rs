//! Packing of a product's operand, for a processor.

use peft_runtime::artifact::{Element, Extent};

use crate::abi::arguments;
use crate::builder::{Code, F32, Kernel, LANES, Order, Val, define};
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
        if self == Factors::F32 { Element::F32 } else { Element::I32 }
    }

    /// Of A's copy.
    pub fn copied(self) -> Element {
        if self == Factors::Pairs { Element::I32 } else { Element::F32 }
    }

    /// Numbers of a step along k.
    pub fn deep(self) -> u64 {
        if self == Factors::Pairs { 2 } else { 1 }
    }

    /// In which B holds so many columns of a step.
    pub fn words(self, columns: u64) -> u64 {
        if self == Factors::Widened { columns / 2 } else { columns }
    }

    /// Of a depth.
    pub fn steps(self, depth: Extent) -> Extent {
        match self.deep() {
            1 => depth,
            deep => Extent::CeilDiv(Box::new(depth), deep),
        }
    }

    /// The same in a kernel.
    pub fn steps_in(self, k: &mut Kernel, depth: Val) -> Val {
        let deep = k.index(self.deep());
        k.div_up(depth, deep)
    }

    /// Where a step begins along k.
    pub fn depth_at(self, k: &mut Kernel, step: Val) -> Val {
        let deep = k.index(self.deep());
        k.mul(step, deep)
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

impl Pack {
    pub fn word(&self) -> String {
        let side = if self.contiguous { "columns" } else { "rows" };
        format!("pack{}_{side}{}", self.width, self.factors.suffix())
    }

    pub fn emit(&self, machine: Machine) -> Code {
        let Pack { width, contiguous, factors } = *self;
        let elements = PackBuffers { from: Element::F32, to: factors.element() }.list();
        define(machine, &elements, PackSizes::<Val>::COUNT, |k, buffers, sizes| {
            let PackBuffers { from, to } = PackBuffers::of(buffers);
            let PackSizes { length, depth, panels, line, area, begin: first_column } = PackSizes::of(sizes);
            k.units(|k, unit| {
                let (batch, panel) = (k.div(unit, panels), k.rem(unit, panels));
                let area = k.mul(batch, area);
                let area = k.add(area, first_column);
                let across = k.index(width);
                let start = k.mul(panel, across);
                let left = k.sub(length, start);
                let steps = factors.steps_in(k, depth);
                let words = k.index(factors.words(width));
                let size = k.mul(steps, words);
                let out = k.mul(unit, size);
                let zero = k.index(0);
                if contiguous {
                    k.each(zero, steps, 1, |k, step| {
                        let at = factors.depth_at(k, step);
                        let row = k.mul(at, line);
                        let row = k.add(row, start);
                        let row = k.add(row, area);
                        let target = k.mul(step, words);
                        let target = k.add(out, target);
                        for lane in (0..width).step_by(LANES as usize) {
                            let offset = k.index(lane);
                            let here = k.sub(left, offset);
                            let mask = k.mask(here);
                            let source = k.add(row, offset);
                            let x = k.load_lanes(from, source, mask);
                            let x = match factors {
                                Factors::F32 => x,
                                Factors::Widened => k.pairs(false, x),
                                Factors::Pairs => {
                                    let one = k.index(1);
                                    let rest = k.sub(depth, at);
                                    let whole = k.compare(rest, Order::Gt, one);
                                    let both = k.select(whole, here, zero);
                                    let mask = k.mask(both);
                                    let below = k.add(source, line);
                                    let below = k.load_lanes(from, below, mask);
                                    let x = k.interleave(x, below);
                                    k.pairs(true, x)
                                }
                            };
                            let offset = k.index(factors.words(lane));
                            let target = k.add(target, offset);
                            k.store_vector(x, to, target);
                        }
                    });
                } else {
                    // Rows in blocks of lanes along k: one cache line of each row is read while it is warm.
                    k.each(zero, steps, LANES, |k, block| {
                        let end = k.index(LANES);
                        let end = k.add(block, end);
                        let end = k.min(end, steps);
                        let each = width / factors.words(width);
                        k.each(zero, words, 1, |k, word| {
                            // Of each column in the word, where it begins, and whether there is one.
                            let columns = (0..each).map(|i| {
                                let (i, each) = (k.index(i), k.index(each));
                                let before = k.mul(word, each);
                                let i = k.add(before, i);
                                let exists = k.compare(i, Order::Lt, left);
                                let row = k.add(start, i);
                                let row = k.select(exists, row, start);
                                let row = k.mul(row, line);
                                (k.add(row, area), exists)
                            });
                            let columns: Vec<(Val, Val)> = columns.collect();
                            k.each(block, end, 1, |k, step| {
                                let at = factors.depth_at(k, step);
                                let target = k.mul(step, words);
                                let target = k.add(target, word);
                                let target = k.add(target, out);
                                let number = |k: &mut Kernel, (row, exists): (Val, Val)| {
                                    let source = k.add(row, at);
                                    let x = k.load(from, source);
                                    let nothing = k.float(0.0, F32);
                                    k.select(exists, x, nothing)
                                };
                                match (factors, &columns[..]) {
                                    (Factors::Widened, &[one, other]) => {
                                        let (x, y) = (number(k, one), number(k, other));
                                        let x = k.paired(x, y);
                                        k.store(x, to, target);
                                    }
                                    (Factors::Pairs, &[(row, exists)]) => {
                                        let rest = k.sub(depth, at);
                                        let here = k.select(exists, rest, zero);
                                        let mask = k.mask_of(here, 2);
                                        let source = k.add(row, at);
                                        let x = k.load_lanes(from, source, mask);
                                        let x = k.pairs(true, x);
                                        k.store_vector(x, to, target);
                                    }
                                    (_, columns) => {
                                        let x = number(k, columns[0]);
                                        k.store(x, to, target);
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
