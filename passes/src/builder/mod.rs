//! Builds the text of one kernel in MLIR.
//!
//! A kernel is explicit about its vectors: loops over the last axis process one vector per step under a mask. Nothing
//! depends on LLVM's vectoriser, and every sum has one fixed order. Buffers are flat; kernels compute their own indices
//! as formulas (`index.rs`). `lanes.rs` defines what a vector is on a CPU and on a GPU.

mod gpu;
mod index;
mod lanes;
pub mod mma;

use std::collections::HashMap;
use std::fmt::Write;

use peft_runtime::artifact::Element;

use crate::target::Machine;
pub use index::{Index, IntoVal};
use lanes::Execution;

/// The greatest number of bytes of a scratch buffer. It is far below a thread's stack of 2 MiB, because an overflow
/// would not be detected.
const SCRATCH: u64 = 1 << 18;

pub use crate::target::LANES;

/// The type of a scalar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scalar {
    Index,
    I1,
    I32,
    I64,
    F16,
    BF16,
    F32,
}

/// The type of a value: a scalar, or a vector of `lanes` scalars.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ty {
    scalar: Scalar,
    lanes: Option<u64>,
}

/// The type of indices.
pub const INDEX: Ty = Ty { scalar: Scalar::Index, lanes: None };
/// A 32-bit integer.
pub const I32: Ty = Ty { scalar: Scalar::I32, lanes: None };
/// A 64-bit integer.
pub const I64: Ty = Ty { scalar: Scalar::I64, lanes: None };
/// A 32-bit float.
pub const F32: Ty = Ty { scalar: Scalar::F32, lanes: None };

impl Ty {
    /// A vector of so many lanes.
    pub const fn times(self, lanes: u64) -> Ty {
        Ty { scalar: self.scalar, lanes: Some(lanes) }
    }
    const fn of(self, scalar: Scalar) -> Ty {
        Ty { scalar, lanes: self.lanes }
    }
    fn float(self) -> bool {
        self.scalar == Scalar::F32
    }
}

impl std::fmt::Display for Ty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self.scalar {
            Scalar::Index => "index",
            Scalar::I1 => "i1",
            Scalar::I32 => "i32",
            Scalar::I64 => "i64",
            Scalar::F16 => "f16",
            Scalar::BF16 => "bf16",
            Scalar::F32 => "f32",
        };
        match self.lanes {
            None => f.write_str(name),
            Some(lanes) => write!(f, "vector<{lanes}x{name}>"),
        }
    }
}

/// An SSA value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Val {
    id: u32,
    /// The value's type.
    pub ty: Ty,
}

impl std::fmt::Display for Val {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "%{}", self.id)
    }
}

/// A buffer argument, or memory of the kernel's own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Buf {
    id: u32,
    element: Element,
    /// Whether it is in a thread block's shared memory.
    shared: bool,
}

impl Buf {
    fn scalar(self) -> Ty {
        match self.element {
            Element::F32 => F32,
            Element::I32 => I32,
        }
    }

    /// The same memory as floats.
    pub fn floats(self) -> Buf {
        Buf { element: Element::F32, ..self }
    }

    /// Its pointer type on a GPU.
    fn pointer(self) -> &'static str {
        if self.shared { "!llvm.ptr<3>" } else { "!llvm.ptr<1>" }
    }
}

impl std::fmt::Display for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "memref<?x{}>", self.scalar())
    }
}

/// A kernel without its name: the body and the signature of the function.
#[derive(Clone, Debug, PartialEq)]
pub struct Code {
    buffers: Vec<Buf>,
    sizes: Vec<Val>,
    execution: Execution,
    /// Declarations in front of the function. [`NAME`] stands for its name.
    globals: String,
    body: String,
    /// On a GPU: for each buffer, whether the kernel writes it.
    pub writes: Vec<bool>,
}

/// The placeholder for the kernel's name in the names of its shared memory.
const NAME: &str = "<kernel>";

impl Code {
    /// The kernel as a function. On a GPU, one launch of it may do the work of `launches` launches (horizontal fusion).
    pub fn function(&self, name: &str, launches: usize) -> String {
        let function = self.execution.function(name, (&self.buffers, &self.sizes), &self.body, launches);
        (self.globals.clone() + &function).replace(NAME, name)
    }
}

/// The kernel under construction. Its methods append operations to the body.
pub struct Kernel {
    /// The machine that the kernel is for.
    pub machine: Machine,
    /// For a mask of the first lanes: the number of these lanes.
    counts: HashMap<u32, Val>,
    /// Declarations in front of the function.
    globals: String,
    body: String,
    depth: usize,
    next: u32,
    execution: Execution,
    /// For each buffer, whether the kernel writes it.
    writes: Vec<bool>,
}

/// Builds a kernel. `body` gets its buffers and its sizes.
pub fn define(
    machine: Machine,
    elements: &[Element],
    sizes: usize,
    body: impl FnOnce(&mut Kernel, &[Buf], &[Val]),
) -> Code {
    let buffer = |(i, &element): (usize, &Element)| Buf { id: i as u32, element, shared: false };
    let buffers: Vec<Buf> = elements.iter().enumerate().map(buffer).collect();
    let first = buffers.len() as u32;
    let sizes: Vec<Val> = (first..first + sizes as u32).map(|id| Val { id, ty: INDEX }).collect();
    let next = first + sizes.len() as u32;
    let (execution, next) = match machine {
        Machine::Cpu(_) => Execution::vectors(next),
        Machine::Cuda(_) => Execution::warps(next),
    };
    let writes = vec![false; buffers.len()];
    let (counts, globals, text) = (HashMap::new(), String::new(), String::new());
    let mut kernel = Kernel { machine, counts, globals, body: text, depth: 2, next, execution, writes };
    body(&mut kernel, &buffers, &sizes);
    let Kernel { execution, globals, body, writes, .. } = kernel;
    Code { buffers, sizes, execution, globals, body, writes }
}

/// The first `N` of a kernel's buffers or sizes.
pub fn first<const N: usize, T: Copy>(all: &[T]) -> [T; N] {
    std::array::from_fn(|i| all[i])
}

/// The access that memory is prefetched for.
#[derive(Clone, Copy)]
pub enum Access {
    /// A load.
    Read,
    /// A store.
    Write,
}

/// A comparison: less, greater, or equal.
#[derive(Clone, Copy)]
pub enum Order {
    Lt,
    Gt,
    Eq,
}

#[allow(clippy::wrong_self_convention)] // `from_bits`, `to_index` … convert the value, not the kernel.
impl Kernel {
    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.body, "{:indent$}{text}", "", indent = 2 * self.depth);
    }

    fn fresh(&mut self, ty: Ty) -> Val {
        self.next += 1;
        Val { id: self.next - 1, ty }
    }

    fn emit(&mut self, ty: Ty, text: std::fmt::Arguments<'_>) -> Val {
        let result = self.fresh(ty);
        self.line(format_args!("{result} = {text}"));
        result
    }

    fn binary(&mut self, float: &str, int: &str, x: Val, y: Val) -> Val {
        assert_eq!(x.ty, y.ty, "the operands have one type");
        let name = if x.ty.float() { float } else { int };
        self.emit(x.ty, format_args!("{name} {x}, {y} : {}", x.ty))
    }

    /// On a GPU, indices never overflow, and are marked so. LLVM can then fold the constant part of an address into a
    /// load, which saves a register.
    fn without_overflow(&mut self, float: &str, int: &str, x: Val, y: Val) -> Val {
        match self.execution {
            Execution::Warps { .. } if x.ty == INDEX => {
                assert_eq!(y.ty, INDEX, "the operands have one type");
                self.emit(INDEX, format_args!("{int} {x}, {y} overflow<nsw> : index"))
            }
            _ => self.binary(float, int, x, y),
        }
    }

    // Constants.

    /// A constant index.
    pub fn index(&mut self, n: u64) -> Val {
        self.emit(INDEX, format_args!("arith.constant {n} : index"))
    }

    /// A constant float of type `ty`, the same in every lane.
    pub fn float(&mut self, x: f64, ty: Ty) -> Val {
        let x = x as f32;
        let literal = if x.is_finite() {
            let text = format!("{x:e}");
            // MLIR's syntax requires a decimal point in every float.
            if text.contains('.') { text } else { text.replacen('e', ".0e", 1) }
        } else {
            format!("0x{:08X}", x.to_bits())
        };
        self.literal(&literal, ty)
    }

    /// A constant float in every lane.
    pub fn floats(&mut self, x: f64) -> Val {
        self.float(x, self.vector(F32))
    }

    /// A constant integer of type `ty`, the same in every lane.
    pub fn int(&mut self, x: i64, ty: Ty) -> Val {
        self.literal(&x.to_string(), ty)
    }

    fn literal(&mut self, literal: &str, ty: Ty) -> Val {
        match ty.lanes {
            None => self.emit(ty, format_args!("arith.constant {literal} : {ty}")),
            Some(_) => self.emit(ty, format_args!("arith.constant dense<{literal}> : {ty}")),
        }
    }

    // Arithmetic.

    /// x + y
    pub fn add(&mut self, x: Val, y: Val) -> Val {
        self.without_overflow("arith.addf", "arith.addi", x, y)
    }
    /// x − y
    pub fn sub(&mut self, x: Val, y: Val) -> Val {
        self.without_overflow("arith.subf", "arith.subi", x, y)
    }
    /// x · y
    pub fn mul(&mut self, x: Val, y: Val) -> Val {
        self.without_overflow("arith.mulf", "arith.muli", x, y)
    }
    /// x / y. Integers must not be negative.
    pub fn div(&mut self, x: Val, y: Val) -> Val {
        self.binary("arith.divf", "arith.divui", x, y)
    }
    /// ⌈x / y⌉ of integers.
    pub fn div_up(&mut self, x: impl Into<Index>, y: impl Into<Index>) -> Val {
        let (x, y) = (self.eval(x), self.eval(y));
        self.eval((x + y - 1) / y)
    }
    /// The remainder of x / y. Integers must not be negative.
    pub fn rem(&mut self, x: Val, y: Val) -> Val {
        self.binary("arith.remf", "arith.remui", x, y)
    }
    /// Bitwise exclusive or.
    pub fn xor(&mut self, x: Val, y: Val) -> Val {
        self.binary("", "arith.xori", x, y)
    }
    /// Bitwise and.
    pub fn and(&mut self, x: Val, y: Val) -> Val {
        self.binary("", "arith.andi", x, y)
    }
    /// Bitwise or.
    pub fn or(&mut self, x: Val, y: Val) -> Val {
        self.binary("", "arith.ori", x, y)
    }
    /// Shifts x left by y bits.
    pub fn shift_left(&mut self, x: Val, y: Val) -> Val {
        self.binary("", "arith.shli", x, y)
    }
    /// Shifts x right by y bits; zeros come in.
    pub fn shift_right(&mut self, x: Val, y: Val) -> Val {
        self.binary("", "arith.shrui", x, y)
    }
    /// x · y + z, rounded once if the machine has a fused multiply-add.
    pub fn fma(&mut self, x: Val, y: Val, z: Val) -> Val {
        let ty = x.ty;
        self.emit(ty, format_args!("llvm.intr.fmuladd({x}, {y}, {z}) : ({ty}, {ty}, {ty}) -> {ty}"))
    }
    /// sum + x · y of pairs of bf16, adding both products of each pair. It requires AVX512-BF16.
    pub fn dot_pairs(&mut self, x: Val, y: Val, sum: Val) -> Val {
        let [x, y] = [x, y].map(|pairs| self.as_bf16(pairs));
        let (ty, pairs) = (sum.ty, x.ty);
        self.emit(
            ty,
            format_args!(
                "llvm.call_intrinsic \"llvm.x86.avx512bf16.dpbf16ps.512\"({sum}, {x}, {y}) : \
                 ({ty}, {pairs}, {pairs}) -> {ty}"
            ),
        )
    }
    /// Adds an outer product to `sums`, row by row: `multiply(x, y, sum)` for every vector y. `x` gives the scalar of a
    /// row.
    pub fn outer_product(
        &mut self,
        rows: u64,
        mut x: impl FnMut(&mut Kernel, usize) -> Val,
        vectors: &[Val],
        sums: &[Val],
        multiply: impl Fn(&mut Kernel, Val, Val, Val) -> Val,
    ) -> Vec<Val> {
        let mut next = vec![];
        for r in 0..rows as usize {
            let x = x(self, r);
            let x = self.splat(x);
            for (v, &y) in vectors.iter().enumerate() {
                next.push(multiply(self, x, y, sums[r * vectors.len() + v]));
            }
        }
        next
    }
    /// The square root.
    pub fn sqrt(&mut self, x: Val) -> Val {
        match self.execution {
            Execution::Vectors { .. } => self.emit(x.ty, format_args!("math.sqrt {x} : {}", x.ty)),
            // `math.sqrt` would call libdevice, a library of the CUDA toolkit.
            Execution::Warps { .. } => {
                self.emit(F32, format_args!("llvm.call_intrinsic \"llvm.nvvm.sqrt.rn.f\"({x}) : (f32) -> f32"))
            }
        }
    }

    /// Compares floats (ordered) or signed integers.
    pub fn compare(&mut self, x: impl IntoVal, order: Order, y: impl IntoVal) -> Val {
        let (x, y) = (x.into_val(self), y.into_val(self));
        let name = match order {
            Order::Lt => "lt",
            Order::Gt => "gt",
            Order::Eq => "eq",
        };
        let (op, prefix) = match (x.ty.float(), order) {
            (true, _) => ("cmpf", "o"),
            (false, Order::Eq) => ("cmpi", ""),
            (false, _) => ("cmpi", "s"),
        };
        self.emit(x.ty.of(Scalar::I1), format_args!("arith.{op} {prefix}{name}, {x}, {y} : {}", x.ty))
    }
    /// x ≥ y as unsigned integers.
    pub fn at_least_unsigned(&mut self, x: impl IntoVal, y: impl IntoVal) -> Val {
        let (x, y) = (x.into_val(self), y.into_val(self));
        self.emit(x.ty.of(Scalar::I1), format_args!("arith.cmpi uge, {x}, {y} : {}", x.ty))
    }
    /// x < y as unsigned integers.
    pub fn below_unsigned(&mut self, x: impl IntoVal, y: impl IntoVal) -> Val {
        let (x, y) = (x.into_val(self), y.into_val(self));
        self.emit(x.ty.of(Scalar::I1), format_args!("arith.cmpi ult, {x}, {y} : {}", x.ty))
    }
    /// `yes` in the lanes where the condition holds, else `no`.
    pub fn select(&mut self, condition: Val, yes: impl IntoVal, no: impl IntoVal) -> Val {
        let (yes, no) = (yes.into_val(self), no.into_val(self));
        let ty = yes.ty;
        self.emit(ty, format_args!("arith.select {condition}, {yes}, {no} : {}, {ty}", condition.ty))
    }
    /// x if x > y, else y.
    pub fn max(&mut self, x: impl IntoVal, y: impl IntoVal) -> Val {
        let (x, y) = (x.into_val(self), y.into_val(self));
        let first = self.compare(x, Order::Gt, y);
        self.select(first, x, y)
    }
    /// x if x < y, else y.
    pub fn min(&mut self, x: impl IntoVal, y: impl IntoVal) -> Val {
        let (x, y) = (x.into_val(self), y.into_val(self));
        let first = self.compare(x, Order::Lt, y);
        self.select(first, x, y)
    }

    // Conversions.

    /// The same bits as another type.
    fn bitcast(&mut self, x: Val, scalar: Scalar) -> Val {
        let ty = x.ty.of(scalar);
        self.emit(ty, format_args!("arith.bitcast {x} : {} to {ty}", x.ty))
    }
    /// The bits of a float as an i32.
    pub fn bits(&mut self, x: Val) -> Val {
        self.bitcast(x, Scalar::I32)
    }
    /// The float with the bits of an i32.
    pub fn from_bits(&mut self, x: Val) -> Val {
        self.bitcast(x, Scalar::F32)
    }
    /// An i32 as an i64, extended by zeros.
    pub fn extend_i64(&mut self, x: Val) -> Val {
        let ty = x.ty.of(Scalar::I64);
        self.emit(ty, format_args!("arith.extui {x} : {} to {ty}", x.ty))
    }
    /// The lower 32 bits of an i64.
    pub fn truncate_i32(&mut self, x: Val) -> Val {
        let ty = x.ty.of(Scalar::I32);
        self.emit(ty, format_args!("arith.trunci {x} : {} to {ty}", x.ty))
    }
    /// An integer as an index.
    pub fn to_index(&mut self, x: Val) -> Val {
        self.emit(INDEX, format_args!("arith.index_cast {x} : {} to index", x.ty))
    }
    /// An index as an i32.
    pub fn to_i32(&mut self, x: impl Into<Index>) -> Val {
        let x = self.eval(x);
        self.emit(I32, format_args!("arith.index_cast {x} : index to i32"))
    }
    /// An integer as a float.
    pub fn to_float(&mut self, x: impl IntoVal) -> Val {
        let x = x.into_val(self);
        let x = match (x.ty.scalar, &self.execution) {
            (Scalar::Index, Execution::Vectors { .. }) => {
                self.emit(I64, format_args!("arith.index_cast {x} : index to i64"))
            }
            (Scalar::Index, Execution::Warps { .. }) => self.to_i32(x),
            _ => x,
        };
        let ty = x.ty.of(Scalar::F32);
        self.emit(ty, format_args!("arith.sitofp {x} : {} to {ty}", x.ty))
    }
    /// Rounds floats to bf16 and packs neighbours into words, the first in the lower half. `native` uses the CPU's own
    /// rounding instruction.
    pub fn to_bf16_pairs(&mut self, native: bool, x: Val) -> Val {
        let ty = x.ty.of(Scalar::BF16);
        let words = Ty { scalar: Scalar::I32, lanes: ty.lanes.map(|n| n / 2) };
        if native {
            let rounded = self.emit(ty, format_args!("arith.truncf {x} : {} to {ty}", x.ty));
            return self.emit(words, format_args!("vector.bitcast {rounded} : {ty} to {words}"));
        }
        let (first, second) = (self.fresh(words.of(Scalar::F32)), self.fresh(words.of(Scalar::F32)));
        self.line(format_args!("{first}, {second} = vector.deinterleave {x} : {} -> {}", x.ty, first.ty));
        self.pack_bf16(first, second)
    }
    /// Rounds two vectors of floats to bf16 and packs them lane by lane, the first in the lower half of each word.
    pub fn pack_bf16(&mut self, first: Val, second: Val) -> Val {
        let (first, second) = (self.bf16_bits(first), self.bf16_bits(second));
        let (upper, half) = (self.int(-1 << 16, first.ty), self.int(16, first.ty));
        let (first, second) = (self.shift_right(first, half), self.and(second, upper));
        self.or(first, second)
    }
    /// Unpacks words of two bf16 to floats.
    pub fn bf16_to_f32(&mut self, words: Val) -> Val {
        let bf16 = self.as_bf16(words);
        let ty = bf16.ty.of(Scalar::F32);
        self.emit(ty, format_args!("arith.extf {bf16} : {} to {ty}", bf16.ty))
    }
    /// Rounds to the nearest bf16, as a float.
    pub fn round_to_bf16(&mut self, x: Val) -> Val {
        let bits = self.bf16_bits(x);
        let upper = self.int(-1 << 16, bits.ty);
        let bits = self.and(bits, upper);
        self.from_bits(bits)
    }
    /// The bits of a float whose upper half is the nearest bf16; ties go to the even one.
    fn bf16_bits(&mut self, x: Val) -> Val {
        let bits = self.bits(x);
        let [half, one, below, quiet] = [16, 1, 0x7fff, 0x40_0000].map(|n| self.int(n, bits.ty));
        let last = self.shift_right(bits, half);
        let last = self.and(last, one);
        let more = self.add(below, last);
        let rounded = self.add(bits, more);
        // The carry of the rounding could turn a NaN into a number, so NaN is handled separately.
        let nan = self.or(bits, quiet);
        let number = self.compare(x, Order::Eq, x);
        self.select(number, rounded, nan)
    }
    /// The words as a vector of bf16.
    fn as_bf16(&mut self, words: Val) -> Val {
        let ty = Ty { scalar: Scalar::BF16, lanes: words.ty.lanes.map(|n| 2 * n) };
        self.emit(ty, format_args!("vector.bitcast {words} : {} to {ty}", words.ty))
    }
    /// x₀, y₀, x₁, y₁, …
    pub fn interleave(&mut self, x: Val, y: Val) -> Val {
        let ty = Ty { scalar: x.ty.scalar, lanes: x.ty.lanes.map(|n| 2 * n) };
        self.emit(ty, format_args!("vector.interleave {x}, {y} : {} -> {ty}", x.ty))
    }

    /// `n` lanes of `x` from lane `at` on.
    pub fn slice_lanes(&mut self, x: Val, at: u64, n: u64) -> Val {
        let ty = Ty { lanes: Some(n), ..x.ty };
        let slice = format!("offsets = [{at}], sizes = [{n}], strides = [1]");
        self.emit(ty, format_args!("vector.extract_strided_slice {x} {{{slice}}} : {} to {ty}", x.ty))
    }

    /// On a CPU, the lanes of two vectors that `which` names; lanes of `y` are counted after those of `x`.
    pub fn shuffle_lanes(&mut self, x: Val, y: Val, which: impl Fn(u64) -> u64) -> Val {
        let lanes = x.ty.lanes.expect("a vector");
        let places = list((0..lanes).map(which));
        self.emit(x.ty, format_args!("vector.shuffle {x}, {y} [{places}] : {}, {}", x.ty, x.ty))
    }

    /// Transposes a square whose rows are vectors, or several squares side by side.
    pub fn transpose(&mut self, mut square: Vec<Val>) -> Vec<Val> {
        let side = square.len();
        // Each step exchanges one bit of the row's index with the same bit of the lane's index. Small distances come
        // first, because shuffles within a 128-bit lane are cheap; for the remaining exchanges of half-registers CPUs
        // have instructions.
        for bit in (0..side.ilog2()).map(|n| 1 << n) {
            for r in (0..side).filter(|r| r & bit == 0) {
                let (x, y, bit) = (square[r], square[r + bit], bit as u64);
                let lanes = x.ty.lanes.expect("a vector");
                let without = |lane: u64| lane & bit == 0;
                let upper = self.shuffle_lanes(x, y, |lane| if without(lane) { lane } else { lanes + lane - bit });
                let lower = self.shuffle_lanes(x, y, |lane| if without(lane) { lane + bit } else { lanes + lane });
                (square[r], square[r + bit as usize]) = (upper, lower);
            }
        }
        square
    }

    // Memory.

    /// Loads a vector of `n` elements on a CPU; all of them must exist.
    pub fn load_vector_of(&mut self, from: Buf, at: impl Into<Index>, n: u64) -> Val {
        let at = self.eval(at);
        let ty = from.scalar().times(n);
        self.emit(ty, format_args!("vector.load %{}[{at}] : {from}, {ty}", from.id))
    }

    /// Allocates `n` elements on the kernel's stack. It must be called outside of loops.
    pub fn scratch(&mut self, n: u64, element: Element) -> Buf {
        assert!(n * element.bytes() <= SCRATCH, "{n} elements are too many for a thread's stack");
        let (stack, flat) = (self.fresh(INDEX), self.fresh(INDEX));
        let buffer = Buf { id: flat.id, element, shared: false };
        let ty = format!("memref<{n}x{}>", buffer.scalar());
        self.line(format_args!("{stack} = memref.alloca() {{alignment = 64 : i64}} : {ty}"));
        self.line(format_args!("{flat} = memref.cast {stack} : {ty} to {buffer}"));
        buffer
    }

    /// Loads an i32 element as an index.
    pub fn load_index(&mut self, from: Buf, at: impl Into<Index>) -> Val {
        let x = self.load(from, at);
        self.to_index(x)
    }
    /// Prefetches the cache line of the element at `at`, which need not exist. It does nothing on a GPU.
    pub fn prefetch(&mut self, of: Buf, at: impl Into<Index>, access: Access) {
        let at = self.eval(at);
        if let Execution::Warps { .. } = self.execution {
            return;
        }
        let access = match access {
            Access::Read => "read, locality<2>",
            Access::Write => "write, locality<3>",
        };
        self.line(format_args!("memref.prefetch %{}[{at}], {access}, data : {of}", of.id));
    }
    /// Loads the lanes of `mask`; the others are 0.
    pub fn load_lanes(&mut self, from: Buf, at: impl Into<Index>, mask: Val) -> Val {
        let at = self.eval(at);
        let ty = Ty { lanes: mask.ty.lanes, ..from.scalar() };
        let zero = if ty.float() { self.float(0.0, ty) } else { self.int(0, ty) };
        self.load_masked(from, at, mask, zero)
    }
    /// The mask of the first `n` of `lanes` lanes, on a CPU.
    pub fn mask_of(&mut self, n: impl Into<Index>, lanes: u64) -> Val {
        let n = self.eval(n);
        let ty = Ty { scalar: Scalar::I1, lanes: Some(lanes) };
        let mask = self.emit(ty, format_args!("vector.create_mask {n} : {ty}"));
        self.counts.insert(mask.id, n);
        mask
    }

    // Control.

    /// A loop over `from`, `from + step`, … below `to`.
    pub fn each(
        &mut self,
        from: impl Into<Index>,
        to: impl Into<Index>,
        step: u64,
        body: impl FnOnce(&mut Kernel, Val),
    ) {
        self.fold(from, to, step, &[], |k, i, _| {
            body(k, i);
            vec![]
        });
    }

    /// A loop that carries values from iteration to iteration; returns the last ones.
    pub fn fold(
        &mut self,
        from: impl Into<Index>,
        to: impl Into<Index>,
        step: u64,
        start: &[Val],
        body: impl FnOnce(&mut Kernel, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let (from, to) = (self.eval(from), self.eval(to));
        self.fold_by(from, to, step, start, body)
    }

    /// A loop that carries values, unrolled by `many`; remaining steps run one by one. Unrolling amortises the loop's
    /// own instructions.
    pub fn fold_unrolled(
        &mut self,
        from: impl Into<Index>,
        to: impl Into<Index>,
        many: u64,
        start: &[Val],
        body: impl Fn(&mut Kernel, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let (from, to) = (self.eval(from), self.eval(to));
        let whole = self.eval(from + (to - from) / many * many);
        let sums = self.fold(from, whole, many, start, |k, at, sums| {
            (0..many).fold(sums.to_vec(), |sums, ahead| {
                let at = k.eval(at + ahead);
                body(k, at, &sums)
            })
        });
        self.fold(whole, to, 1, &sums, body)
    }

    fn fold_by(
        &mut self,
        from: impl Into<Index>,
        to: impl Into<Index>,
        step: impl Into<Index>,
        start: &[Val],
        body: impl FnOnce(&mut Kernel, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let (from, to, step) = (self.eval(from), self.eval(to), self.eval(step));
        let at = self.fresh(INDEX);
        let carried: Vec<Val> = start.iter().map(|v| self.fresh(v.ty)).collect();
        let results: Vec<Val> = start.iter().map(|v| self.fresh(v.ty)).collect();
        let head = format!("scf.for {at} = {from} to {to} step {step}");
        let types = list(start.iter().map(|v| v.ty));
        if start.is_empty() {
            self.line(format_args!("{head} {{"));
        } else {
            let pairs = list(carried.iter().zip(start).map(|(c, s)| format!("{c} = {s}")));
            self.line(format_args!("{} = {head} iter_args({pairs}) -> ({types}) {{", list(&results)));
        }
        self.depth += 1;
        let next = body(self, at, &carried);
        if !next.is_empty() {
            self.line(format_args!("scf.yield {} : {types}", list(&next)));
        }
        self.depth -= 1;
        self.line(format_args!("}}"));
        results
    }

    /// Runs `body` if the condition holds.
    pub fn when(&mut self, condition: Val, body: impl FnOnce(&mut Kernel)) {
        self.branch(condition, body, |_| {});
    }

    /// Runs `yes` if the condition holds, else `no`.
    pub fn branch(&mut self, condition: Val, yes: impl FnOnce(&mut Kernel), no: impl FnOnce(&mut Kernel)) {
        self.line(format_args!("scf.if {condition} {{"));
        self.depth += 1;
        yes(self);
        self.depth -= 1;
        self.line(format_args!("}} else {{"));
        self.depth += 1;
        no(self);
        self.depth -= 1;
        self.line(format_args!("}}"));
    }

    /// A loop over `length` elements, one vector per step. `body` gets the index of the first lane, and the mask of the
    /// elements that exist.
    pub fn lanes(&mut self, length: impl Into<Index>, body: impl FnOnce(&mut Kernel, Val, Val)) {
        self.fold_lanes(length, &[], |k, j, mask, _| {
            body(k, j, mask);
            vec![]
        });
    }

    /// The same with values carried from step to step; returns the last ones.
    pub fn fold_lanes(
        &mut self,
        length: impl Into<Index>,
        start: &[Val],
        body: impl FnOnce(&mut Kernel, Val, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let length = self.eval(length);
        self.fold(0, length, self.lane_count(), start, |k, j, carried| {
            let mask = k.mask(length - j);
            body(k, j, mask, carried)
        })
    }
}

fn list<T: std::fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|x| x.to_string()).collect::<Vec<_>>().join(", ")
}
