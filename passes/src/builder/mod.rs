//! Writes one kernel as MLIR text.
//!
//! A kernel is explicit about its vectors: loops over the last axis take a vector's elements a step
//! under a mask, so nothing hangs on the vectoriser's mood and every sum has one fixed order.
//! Buffers are flat; kernels compute their own addresses, which they state as formulas: `index.rs`. What a vector is, on a
//! processor and on a GPU: `lanes.rs`.

mod gpu;
mod index;
mod lanes;
pub mod mma;

use std::collections::HashMap;
use std::fmt::Write;

use peft_runtime::artifact::Element;

use crate::target::Machine;
pub use index::{Index, IntoVal};
use lanes::Form;

/// Bytes of a scratch: threads have stacks of 2 MiB, and nothing would tell when one ends.
const SCRATCH: u64 = 1 << 18;

pub use crate::target::LANES;

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

/// A scalar, or a vector of `lanes` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ty {
    scalar: Scalar,
    lanes: Option<u64>,
}

pub const INDEX: Ty = Ty { scalar: Scalar::Index, lanes: None };
pub const I32: Ty = Ty { scalar: Scalar::I32, lanes: None };
pub const I64: Ty = Ty { scalar: Scalar::I64, lanes: None };
pub const F32: Ty = Ty { scalar: Scalar::F32, lanes: None };

impl Ty {
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
    /// By a block's threads.
    shared: bool,
}

impl Buf {
    fn scalar(self) -> Ty {
        match self.element {
            Element::F32 => F32,
            Element::I32 => I32,
        }
    }

    /// The same words as floats.
    pub fn floats(self) -> Buf {
        Buf { element: Element::F32, ..self }
    }

    /// Its type on a GPU.
    fn pointer(self) -> &'static str {
        if self.shared { "!llvm.ptr<3>" } else { "!llvm.ptr<1>" }
    }
}

impl std::fmt::Display for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "memref<?x{}>", self.scalar())
    }
}

/// A kernel that is written, but for its head.
#[derive(Clone, Debug, PartialEq)]
pub struct Code {
    buffers: Vec<Buf>,
    sizes: Vec<Val>,
    form: Form,
    /// What stands before the function, whose name has a place in it.
    globals: String,
    body: String,
    /// By buffer, whether it is written, if that is a GPU's.
    pub writes: Vec<bool>,
}

/// Where memory that a kernel's blocks have for themselves bears its name.
const NAME: &str = "<kernel>";

impl Code {
    /// The kernel as a function. On a GPU it may do the work of several `launches` side by side.
    pub fn function(&self, name: &str, launches: usize) -> String {
        let function = self.form.function(name, (&self.buffers, &self.sizes), &self.body, launches);
        (self.globals.clone() + &function).replace(NAME, name)
    }
}

/// The function under construction.
pub struct Kernel {
    pub machine: Machine,
    /// By mask: how many lanes it has, if they are the first ones.
    counts: HashMap<u32, Val>,
    /// What stands before the function.
    globals: String,
    body: String,
    depth: usize,
    next: u32,
    form: Form,
    /// By buffer, whether it is written.
    writes: Vec<bool>,
}

/// The text of a kernel: `body` gets its buffers and its sizes.
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
    let (form, next) = match machine {
        Machine::Cpu(_) => Form::vectors(next),
        Machine::Cuda(_) => Form::warps(next),
    };
    let writes = vec![false; buffers.len()];
    let (counts, globals, text) = (HashMap::new(), String::new(), String::new());
    let mut kernel = Kernel { machine, counts, globals, body: text, depth: 2, next, form, writes };
    body(&mut kernel, &buffers, &sizes);
    let Kernel { form, globals, body, writes, .. } = kernel;
    Code { buffers, sizes, form, globals, body, writes }
}

/// The first `N` of a kernel's buffers or sizes.
pub fn first<const N: usize, T: Copy>(all: &[T]) -> [T; N] {
    std::array::from_fn(|i| all[i])
}

/// What memory is fetched for.
#[derive(Clone, Copy)]
pub enum Access {
    Read,
    Write,
}

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
        assert_eq!(x.ty, y.ty, "operands of one type");
        let name = if x.ty.float() { float } else { int };
        self.emit(x.ty, format_args!("{name} {x}, {y} : {}", x.ty))
    }

    /// Of what counts or points there is never too much for its type: what is constant in a place then needs no register.
    fn without_overflow(&mut self, float: &str, int: &str, x: Val, y: Val) -> Val {
        match self.form {
            Form::Warps { .. } if x.ty == INDEX => {
                assert_eq!(y.ty, INDEX, "operands of one type");
                self.emit(INDEX, format_args!("{int} {x}, {y} overflow<nsw> : index"))
            }
            _ => self.binary(float, int, x, y),
        }
    }

    // Constants.

    pub fn index(&mut self, n: u64) -> Val {
        self.emit(INDEX, format_args!("arith.constant {n} : index"))
    }

    /// A float of type `ty`, the same in every lane.
    pub fn float(&mut self, x: f64, ty: Ty) -> Val {
        let x = x as f32;
        let literal = if x.is_finite() {
            let text = format!("{x:e}");
            // MLIR wants a point in every float.
            if text.contains('.') { text } else { text.replacen('e', ".0e", 1) }
        } else {
            format!("0x{:08X}", x.to_bits())
        };
        self.literal(&literal, ty)
    }

    /// A float in every lane.
    pub fn floats(&mut self, x: f64) -> Val {
        self.float(x, self.vector(F32))
    }

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

    pub fn add(&mut self, x: Val, y: Val) -> Val {
        self.without_overflow("arith.addf", "arith.addi", x, y)
    }
    pub fn sub(&mut self, x: Val, y: Val) -> Val {
        self.without_overflow("arith.subf", "arith.subi", x, y)
    }
    pub fn mul(&mut self, x: Val, y: Val) -> Val {
        self.without_overflow("arith.mulf", "arith.muli", x, y)
    }
    /// Of integers: of non-negative ones.
    pub fn div(&mut self, x: Val, y: Val) -> Val {
        self.binary("arith.divf", "arith.divui", x, y)
    }
    /// ⌈x / y⌉ of integers.
    pub fn div_up(&mut self, x: impl Into<Index>, y: impl Into<Index>) -> Val {
        let (x, y) = (self.eval(x), self.eval(y));
        self.eval((x + y - 1) / y)
    }
    pub fn rem(&mut self, x: Val, y: Val) -> Val {
        self.binary("arith.remf", "arith.remui", x, y)
    }
    pub fn xor(&mut self, x: Val, y: Val) -> Val {
        self.binary("", "arith.xori", x, y)
    }
    pub fn and(&mut self, x: Val, y: Val) -> Val {
        self.binary("", "arith.andi", x, y)
    }
    pub fn or(&mut self, x: Val, y: Val) -> Val {
        self.binary("", "arith.ori", x, y)
    }
    pub fn shift_left(&mut self, x: Val, y: Val) -> Val {
        self.binary("", "arith.shli", x, y)
    }
    /// Zeros come in.
    pub fn shift_right(&mut self, x: Val, y: Val) -> Val {
        self.binary("", "arith.shrui", x, y)
    }
    /// x · y + z, rounded once where the processor can do that at no cost.
    pub fn fma(&mut self, x: Val, y: Val, z: Val) -> Val {
        let ty = x.ty;
        self.emit(ty, format_args!("llvm.intr.fmuladd({x}, {y}, {z}) : ({ty}, {ty}, {ty}) -> {ty}"))
    }
    /// sum + x · y of pairs of bf16, both products of each, where the processor has an instruction for it.
    pub fn dot_pairs(&mut self, x: Val, y: Val, sum: Val) -> Val {
        let [x, y] = [x, y].map(|pairs| self.halves(pairs));
        let (ty, pairs) = (sum.ty, x.ty);
        self.emit(
            ty,
            format_args!(
                "llvm.call_intrinsic \"llvm.x86.avx512bf16.dpbf16ps.512\"({sum}, {x}, {y}) : \
                 ({ty}, {pairs}, {pairs}) -> {ty}"
            ),
        )
    }
    /// A step of an outer product: row by row, `multiply(x, y, sum)` for every vector y; `x` gives a row's number.
    pub fn outer(
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
    pub fn sqrt(&mut self, x: Val) -> Val {
        match self.form {
            Form::Vectors { .. } => self.emit(x.ty, format_args!("math.sqrt {x} : {}", x.ty)),
            // `math.sqrt` would be a call to a library that comes with CUDA's toolkit.
            Form::Warps { .. } => {
                self.emit(F32, format_args!("llvm.call_intrinsic \"llvm.nvvm.sqrt.rn.f\"({x}) : (f32) -> f32"))
            }
        }
    }

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
    /// x ≥ y as unsigned numbers.
    pub fn at_least_unsigned(&mut self, x: impl IntoVal, y: impl IntoVal) -> Val {
        let (x, y) = (x.into_val(self), y.into_val(self));
        self.emit(x.ty.of(Scalar::I1), format_args!("arith.cmpi uge, {x}, {y} : {}", x.ty))
    }
    /// x < y as unsigned numbers.
    pub fn below_unsigned(&mut self, x: impl IntoVal, y: impl IntoVal) -> Val {
        let (x, y) = (x.into_val(self), y.into_val(self));
        self.emit(x.ty.of(Scalar::I1), format_args!("arith.cmpi ult, {x}, {y} : {}", x.ty))
    }
    pub fn select(&mut self, condition: Val, yes: impl IntoVal, no: impl IntoVal) -> Val {
        let (yes, no) = (yes.into_val(self), no.into_val(self));
        let ty = yes.ty;
        self.emit(ty, format_args!("arith.select {condition}, {yes}, {no} : {}, {ty}", condition.ty))
    }
    pub fn max(&mut self, x: impl IntoVal, y: impl IntoVal) -> Val {
        let (x, y) = (x.into_val(self), y.into_val(self));
        let first = self.compare(x, Order::Gt, y);
        self.select(first, x, y)
    }
    pub fn min(&mut self, x: impl IntoVal, y: impl IntoVal) -> Val {
        let (x, y) = (x.into_val(self), y.into_val(self));
        let first = self.compare(x, Order::Lt, y);
        self.select(first, x, y)
    }

    // Conversions.

    /// The same bits read as another type.
    fn bitcast(&mut self, x: Val, scalar: Scalar) -> Val {
        let ty = x.ty.of(scalar);
        self.emit(ty, format_args!("arith.bitcast {x} : {} to {ty}", x.ty))
    }
    pub fn bits(&mut self, x: Val) -> Val {
        self.bitcast(x, Scalar::I32)
    }
    pub fn from_bits(&mut self, x: Val) -> Val {
        self.bitcast(x, Scalar::F32)
    }
    pub fn widen(&mut self, x: Val) -> Val {
        let ty = x.ty.of(Scalar::I64);
        self.emit(ty, format_args!("arith.extui {x} : {} to {ty}", x.ty))
    }
    pub fn narrow(&mut self, x: Val) -> Val {
        let ty = x.ty.of(Scalar::I32);
        self.emit(ty, format_args!("arith.trunci {x} : {} to {ty}", x.ty))
    }
    pub fn to_index(&mut self, x: Val) -> Val {
        self.emit(INDEX, format_args!("arith.index_cast {x} : {} to index", x.ty))
    }
    pub fn to_i32(&mut self, x: impl Into<Index>) -> Val {
        let x = self.eval(x);
        self.emit(I32, format_args!("arith.index_cast {x} : index to i32"))
    }
    /// A whole number as a float.
    pub fn to_float(&mut self, x: impl IntoVal) -> Val {
        let x = x.into_val(self);
        let x = match (x.ty.scalar, &self.form) {
            (Scalar::Index, Form::Vectors { .. }) => {
                self.emit(I64, format_args!("arith.index_cast {x} : index to i64"))
            }
            (Scalar::Index, Form::Warps { .. }) => self.to_i32(x),
            _ => x,
        };
        let ty = x.ty.of(Scalar::F32);
        self.emit(ty, format_args!("arith.sitofp {x} : {} to {ty}", x.ty))
    }
    /// Neighbours among floats, rounded to bf16, as words: the first in the lower half. `native`: the processor rounds.
    pub fn pairs(&mut self, native: bool, x: Val) -> Val {
        let ty = x.ty.of(Scalar::BF16);
        let words = Ty { scalar: Scalar::I32, lanes: ty.lanes.map(|n| n / 2) };
        if native {
            let rounded = self.emit(ty, format_args!("arith.truncf {x} : {} to {ty}", x.ty));
            return self.emit(words, format_args!("vector.bitcast {rounded} : {ty} to {words}"));
        }
        let (first, second) = (self.fresh(words.of(Scalar::F32)), self.fresh(words.of(Scalar::F32)));
        self.line(format_args!("{first}, {second} = vector.deinterleave {x} : {} -> {}", x.ty, first.ty));
        self.paired(first, second)
    }
    /// The same of floats that are not neighbours.
    pub fn paired(&mut self, first: Val, second: Val) -> Val {
        let (first, second) = (self.rounded_bits(first), self.rounded_bits(second));
        let (upper, half) = (self.int(-1 << 16, first.ty), self.int(16, first.ty));
        let (first, second) = (self.shift_right(first, half), self.and(second, upper));
        self.or(first, second)
    }
    /// Floats from words of two bf16 each.
    pub fn widened(&mut self, words: Val) -> Val {
        let halves = self.halves(words);
        let ty = halves.ty.of(Scalar::F32);
        self.emit(ty, format_args!("arith.extf {halves} : {} to {ty}", halves.ty))
    }
    /// The nearest bf16, as a float.
    pub fn rounded(&mut self, x: Val) -> Val {
        let bits = self.rounded_bits(x);
        let upper = self.int(-1 << 16, bits.ty);
        let bits = self.and(bits, upper);
        self.from_bits(bits)
    }
    /// Bits of a float whose upper half is the nearest bf16, of two as near the even one.
    fn rounded_bits(&mut self, x: Val) -> Val {
        let bits = self.bits(x);
        let [half, one, below, quiet] = [16, 1, 0x7fff, 0x40_0000].map(|n| self.int(n, bits.ty));
        let last = self.shift_right(bits, half);
        let last = self.and(last, one);
        let more = self.add(below, last);
        let rounded = self.add(bits, more);
        // Carried too far, NaN would be a number.
        let nan = self.or(bits, quiet);
        let number = self.compare(x, Order::Eq, x);
        self.select(number, rounded, nan)
    }
    /// The other way, to bf16.
    fn halves(&mut self, words: Val) -> Val {
        let ty = Ty { scalar: Scalar::BF16, lanes: words.ty.lanes.map(|n| 2 * n) };
        self.emit(ty, format_args!("vector.bitcast {words} : {} to {ty}", words.ty))
    }
    /// x₀, y₀, x₁, y₁, …
    pub fn interleave(&mut self, x: Val, y: Val) -> Val {
        let ty = Ty { scalar: x.ty.scalar, lanes: x.ty.lanes.map(|n| 2 * n) };
        self.emit(ty, format_args!("vector.interleave {x}, {y} : {} -> {ty}", x.ty))
    }

    /// `n` lanes of `x` from `at` on.
    pub fn part(&mut self, x: Val, at: u64, n: u64) -> Val {
        let ty = Ty { lanes: Some(n), ..x.ty };
        let slice = format!("offsets = [{at}], sizes = [{n}], strides = [1]");
        self.emit(ty, format_args!("vector.extract_strided_slice {x} {{{slice}}} : {} to {ty}", x.ty))
    }

    /// Of a processor's two vectors the lanes that `which` names, those of `y` after those of `x`.
    pub fn picked(&mut self, x: Val, y: Val, which: impl Fn(u64) -> u64) -> Val {
        let lanes = x.ty.lanes.expect("a vector");
        let places = list((0..lanes).map(which));
        self.emit(x.ty, format_args!("vector.shuffle {x}, {y} [{places}] : {}, {}", x.ty, x.ty))
    }

    /// The columns of a square whose rows are vectors, or of each of several squares beside each other.
    pub fn turned(&mut self, mut square: Vec<Val>) -> Vec<Val> {
        let side = square.len();
        // Bit by bit, the row's number and the lane's change theirs. Lanes that are near come first: they are the cheap
        // ones, and what is left to do in halves of a register is what a processor has instructions for.
        for bit in (0..side.ilog2()).map(|n| 1 << n) {
            for r in (0..side).filter(|r| r & bit == 0) {
                let (x, y, bit) = (square[r], square[r + bit], bit as u64);
                let lanes = x.ty.lanes.expect("a vector");
                let without = |lane: u64| lane & bit == 0;
                let upper = self.picked(x, y, |lane| if without(lane) { lane } else { lanes + lane - bit });
                let lower = self.picked(x, y, |lane| if without(lane) { lane + bit } else { lanes + lane });
                (square[r], square[r + bit as usize]) = (upper, lower);
            }
        }
        square
    }

    // Memory.

    /// `n` elements, all of which must exist, in a processor's vector of their own.
    pub fn load_some(&mut self, from: Buf, at: impl Into<Index>, n: u64) -> Val {
        let at = self.eval(at);
        let ty = from.scalar().times(n);
        self.emit(ty, format_args!("vector.load %{}[{at}] : {from}, {ty}", from.id))
    }

    /// `n` elements of the kernel's own, on its stack: to be asked for outside of loops.
    pub fn scratch(&mut self, n: u64, element: Element) -> Buf {
        assert!(n * element.bytes() <= SCRATCH, "{n} elements are too many for a thread's stack");
        let (room, flat) = (self.fresh(INDEX), self.fresh(INDEX));
        let buffer = Buf { id: flat.id, element, shared: false };
        let ty = format!("memref<{n}x{}>", buffer.scalar());
        self.line(format_args!("{room} = memref.alloca() {{alignment = 64 : i64}} : {ty}"));
        self.line(format_args!("{flat} = memref.cast {room} : {ty} to {buffer}"));
        buffer
    }

    /// An `i32` element as an index.
    pub fn load_index(&mut self, from: Buf, at: impl Into<Index>) -> Val {
        let x = self.load(from, at);
        self.to_index(x)
    }
    /// Asks for the line of memory that holds the element at `at`, which need not exist.
    pub fn prefetch(&mut self, of: Buf, at: impl Into<Index>, access: Access) {
        let at = self.eval(at);
        if let Form::Warps { .. } = self.form {
            return;
        }
        let access = match access {
            Access::Read => "read, locality<2>",
            Access::Write => "write, locality<3>",
        };
        self.line(format_args!("memref.prefetch %{}[{at}], {access}, data : {of}", of.id));
    }
    /// The lanes of `mask` from memory, 0 elsewhere.
    pub fn load_lanes(&mut self, from: Buf, at: impl Into<Index>, mask: Val) -> Val {
        let at = self.eval(at);
        let ty = Ty { lanes: mask.ty.lanes, ..from.scalar() };
        let zero = if ty.float() { self.float(0.0, ty) } else { self.int(0, ty) };
        self.load_masked(from, at, mask, zero)
    }
    /// The first `n` of `lanes` lanes, of a processor's vector.
    pub fn mask_of(&mut self, n: impl Into<Index>, lanes: u64) -> Val {
        let n = self.eval(n);
        let ty = Ty { scalar: Scalar::I1, lanes: Some(lanes) };
        let mask = self.emit(ty, format_args!("vector.create_mask {n} : {ty}"));
        self.counts.insert(mask.id, n);
        mask
    }

    // Control.

    /// For `from`, `from + step`, … below `to`.
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

    /// The same with values carried from round to round; gives the last ones.
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

    /// The same with `many` steps a turn, and one by one what is left of them: what a loop does beside its steps costs.
    pub fn fold_in_turns(
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

    pub fn when(&mut self, condition: Val, body: impl FnOnce(&mut Kernel)) {
        self.branch(condition, body, |_| {});
    }

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

    /// A vector a step over `length` elements: the offset and the mask of those that exist.
    pub fn lanes(&mut self, length: impl Into<Index>, body: impl FnOnce(&mut Kernel, Val, Val)) {
        self.fold_lanes(length, &[], |k, j, mask, _| {
            body(k, j, mask);
            vec![]
        });
    }

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
