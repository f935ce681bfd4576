//! Packing of a CPU product's operand B into column panels, the layout that the micro-kernel of [`super::cpu`] reads
//! contiguously (Goto & van de Geijn 2008). A panel is `[steps][width]`. Frozen weights are packed once, when they are
//! loaded.

use peft_runtime::artifact::{Element, Extent};

use crate::abi::arguments;
use crate::builder::{Code, F32, Kernel, LANES, Order, Val, define};
use crate::kernels::Scheduled;
use crate::target::Machine;

/// The element format of a product's operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperandFormat {
    /// Both operands are f32.
    F32,
    /// Both operands are words of two bf16 that are neighbours along k, as the dot-product instruction of AVX512-BF16
    /// multiplies them.
    Bf16Pairs,
    /// Both operands are rounded to bf16 and multiplied as f32. B stores two neighbouring columns in a word; the
    /// scratch copy of A stores floats.
    Bf16Widened,
}

impl OperandFormat {
    /// The suffix of a kernel's name.
    pub fn suffix(self) -> &'static str {
        match self {
            OperandFormat::F32 => "",
            OperandFormat::Bf16Pairs => "_bf16",
            OperandFormat::Bf16Widened => "_bf16_widened",
        }
    }

    /// The element type of packed B.
    pub fn b_element(self) -> Element {
        match self {
            OperandFormat::F32 => Element::F32,
            OperandFormat::Bf16Pairs | OperandFormat::Bf16Widened => Element::I32,
        }
    }

    /// The element type of the scratch copy of A.
    pub fn a_element(self) -> Element {
        match self {
            OperandFormat::F32 | OperandFormat::Bf16Widened => Element::F32,
            OperandFormat::Bf16Pairs => Element::I32,
        }
    }

    /// The number of values along k that one step multiplies.
    pub fn k_per_step(self) -> u64 {
        match self {
            OperandFormat::F32 | OperandFormat::Bf16Widened => 1,
            OperandFormat::Bf16Pairs => 2,
        }
    }

    /// The number of words that hold `columns` columns of one step of packed B.
    pub fn words(self, columns: u64) -> u64 {
        match self {
            OperandFormat::F32 | OperandFormat::Bf16Pairs => columns,
            OperandFormat::Bf16Widened => columns / 2,
        }
    }

    /// The number of steps that a product of the given depth takes.
    pub fn steps(self, depth: Extent) -> Extent {
        match self.k_per_step() {
            1 => depth,
            k_per_step => Extent::CeilDiv(Box::new(depth), k_per_step),
        }
    }
}

arguments! {
    /// The operand as it is given, and the packed operand.
    PackBuffers { from, to }
}
arguments! {
    /// Sizes of the packing kernel.
    PackSizes {
        /// The number of columns of B, and its depth along k.
        length, depth,
        /// The number of panels of one batch.
        panels,
        leading_dimension, batch_stride,
        /// The index of the operand's first element.
        offset,
    }
}

/// Packs one panel of `width` columns for each unit. If the depth is odd, the last pair along k is completed by zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pack {
    /// Columns of a panel.
    pub width: u64,
    /// Whether neighbouring elements of B in memory are neighbouring columns; otherwise they are neighbouring steps
    /// along k.
    pub contiguous: bool,
    /// The format of the packed operand.
    pub format: OperandFormat,
}

impl Scheduled for Pack {
    fn name_stem(&self) -> String {
        let side = if self.contiguous { "columns" } else { "rows" };
        format!("pack{}_{side}{}", self.width, self.format.suffix())
    }

    fn emit(&self, machine: Machine) -> Code {
        let Pack { width, contiguous, format } = *self;
        let elements = PackBuffers { from: Element::F32, to: format.b_element() }.list();
        define(machine, &elements, PackSizes::<Val>::COUNT, |k, buffers, sizes| {
            let PackBuffers { from, to } = PackBuffers::of(buffers);
            let PackSizes { length, depth, panels, leading_dimension, batch_stride, offset } = PackSizes::of(sizes);
            k.units(|k, unit| {
                let (batch, panel) = (k.div(unit, panels), k.rem(unit, panels));
                let origin = k.eval(batch * batch_stride + offset);
                let start = k.eval(panel * width);
                let left = k.eval(length - start);
                let steps = k.div_up(depth, format.k_per_step());
                let words = format.words(width);
                let out = k.eval(unit * (steps * words));
                if contiguous {
                    k.each(0, steps, 1, |k, step| {
                        let at = k.eval(step * format.k_per_step());
                        let row = k.eval(at * leading_dimension + start + origin);
                        let target = k.eval(out + step * words);
                        for lane in (0..width).step_by(LANES as usize) {
                            let here = k.eval(left - lane);
                            let mask = k.mask(here);
                            let source = k.eval(row + lane);
                            let x = k.load_lanes(from, source, mask);
                            let x = match format {
                                OperandFormat::F32 => x,
                                OperandFormat::Bf16Widened => k.to_bf16_pairs(false, x),
                                OperandFormat::Bf16Pairs => {
                                    let whole = k.compare(depth - at, Order::Gt, 1);
                                    let both = k.select(whole, here, 0);
                                    let mask = k.mask(both);
                                    let below = k.load_lanes(from, source + leading_dimension, mask);
                                    let x = k.interleave(x, below);
                                    k.to_bf16_pairs(true, x)
                                }
                            };
                            k.store_vector(x, to, target + format.words(lane));
                        }
                    });
                } else {
                    // A column is read in blocks of [`LANES`] steps along k, so that its cache line is still in the
                    // cache when the next step reads it.
                    k.each(0, steps, LANES, |k, block| {
                        let end = k.min(block + LANES, steps);
                        let each = width / words;
                        k.each(0, words, 1, |k, word| {
                            // For each column in the word: the index of its first element, and whether the column
                            // exists.
                            let columns = (0..each).map(|i| {
                                let i = k.eval(word * each + i);
                                let exists = k.compare(i, Order::Lt, left);
                                let row = k.select(exists, start + i, start);
                                (k.eval(row * leading_dimension + origin), exists)
                            });
                            let columns: Vec<(Val, Val)> = columns.collect();
                            k.each(block, end, 1, |k, step| {
                                let at = k.eval(step * format.k_per_step());
                                let target = k.eval(step * words + word + out);
                                let number = |k: &mut Kernel, (row, exists): (Val, Val)| {
                                    let x = k.load(from, row + at);
                                    let zero_f32 = k.float(0.0, F32);
                                    k.select(exists, x, zero_f32)
                                };
                                match format {
                                    OperandFormat::F32 => {
                                        let x = number(k, columns[0]);
                                        k.store(x, to, target);
                                    }
                                    OperandFormat::Bf16Widened => {
                                        let (x, y) = (number(k, columns[0]), number(k, columns[1]));
                                        let x = k.pack_bf16(x, y);
                                        k.store(x, to, target);
                                    }
                                    OperandFormat::Bf16Pairs => {
                                        let (row, exists) = columns[0];
                                        let here = k.select(exists, depth - at, 0);
                                        let mask = k.mask_of(here, 2);
                                        let x = k.load_lanes(from, row + at, mask);
                                        let x = k.to_bf16_pairs(true, x);
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
