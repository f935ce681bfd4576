//! Products of 16 × 16 numbers in half precision, which a warp's threads compute together in a GPU's tensor cores. Which
//! of them holds what of a fragment is the chip's affair.

use super::{Buf, F32, I32, INDEX, Index, Kernel, Scalar, Ty, Val};

/// Rows and columns of a fragment.
pub const SIDE: u64 = 16;

/// Numbers of 16 bits; sums are in `f32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Half {
    /// Up to 65504, from 6·10⁻⁵ on in full precision.
    F16,
    /// As far as `f32` reaches.
    BF16,
}

/// The left or the right side of a product.
#[derive(Clone, Copy, PartialEq)]
pub enum Operand {
    A,
    B,
}

impl Half {
    pub fn name(self) -> &'static str {
        match self {
            Half::F16 => "f16",
            Half::BF16 => "bf16",
        }
    }

    fn scalar(self) -> Scalar {
        match self {
            Half::F16 => Scalar::F16,
            Half::BF16 => Scalar::BF16,
        }
    }

    /// What a thread holds of an operand: registers of two numbers.
    fn registers(self) -> (usize, Ty) {
        match self {
            Half::F16 => (8, Ty { scalar: Scalar::F16, lanes: Some(2) }),
            Half::BF16 => (4, I32),
        }
    }
}

/// What a thread holds of a sum.
pub const SUMS: usize = 8;

/// LLVM's own operations, for MLIR's know no bf16.
const WMMA: &str = "llvm.nvvm.wmma.m16n16k16";

fn types(count: usize, ty: Ty) -> String {
    vec![ty.to_string(); count].join(", ")
}

impl Kernel {
    /// Two floats rounded, as a word: the first in its lower half.
    pub fn word(&mut self, half: Half, [x, y]: [Val; 2]) -> Val {
        let scalar = half.scalar();
        let (one, two) = (Ty { scalar, lanes: None }, Ty { scalar, lanes: Some(2) });
        let mut pair = self.emit(two, format_args!("llvm.mlir.poison : {two}"));
        for (i, x) in [x, y].into_iter().enumerate() {
            let rounded = self.emit(one, format_args!("arith.truncf {x} : f32 to {one}"));
            let i = self.int(i as i64, I32);
            pair = self.emit(two, format_args!("llvm.insertelement {rounded}, {pair}[{i} : i32] : {two}"));
        }
        self.emit(I32, format_args!("llvm.bitcast {pair} : {two} to i32"))
    }

    /// A number in every lane, rounded, to the `at`th place and those after it.
    pub fn store_rounded(&mut self, half: Half, x: Val, to: Buf, at: impl Into<Index>, mask: Val) {
        self.written(to);
        let at = self.eval(at.into() + self.lane_index());
        self.when(mask, |k| {
            let ty = Ty { scalar: half.scalar(), lanes: None };
            let rounded = k.emit(ty, format_args!("arith.truncf {x} : f32 to {ty}"));
            let (place, pointer) = (k.place_of(to, at, ty), to.pointer());
            k.line(format_args!("llvm.store {rounded}, {place} : {ty}, {pointer}"));
        });
    }

    /// The fragment at word `at` of shared memory, whose rows are `line` numbers apart.
    pub fn load_fragment(
        &mut self,
        half: Half,
        operand: Operand,
        from: Buf,
        at: impl Into<Index>,
        line: u64,
    ) -> Vec<Val> {
        let place = self.place(from, at);
        let line = self.int(line as i64, I32);
        let (count, ty) = half.registers();
        let name = if operand == Operand::A { "a" } else { "b" };
        let loaded = self.emit(
            INDEX,
            format_args!(
                "llvm.call_intrinsic \"{WMMA}.load.{name}.row.stride.{}\"({place}, {line}) : ({}, i32) -> !llvm.struct<({})>",
                half.name(),
                from.pointer(),
                types(count, ty)
            ),
        );
        self.apart(loaded, count, ty)
    }

    /// sums + a · b
    pub fn multiply_fragments(&mut self, half: Half, a: &[Val], b: &[Val], sums: &[Val]) -> Vec<Val> {
        let (count, ty) = half.registers();
        let (types, floats) = (types(2 * count, ty), types(SUMS, F32));
        // Of f16 the sums have a choice.
        let of = if half == Half::F16 { "f32.f32" } else { "bf16" };
        let product = self.emit(
            INDEX,
            format_args!(
                "llvm.call_intrinsic \"{WMMA}.mma.row.row.{of}\"({}) : ({types}, {floats}) -> !llvm.struct<({floats})>",
                super::list(a.iter().chain(b).chain(sums)),
            ),
        );
        self.apart(product, SUMS, F32)
    }

    /// Puts a sum at float `at` of shared memory, its rows `line` floats apart.
    pub fn store_fragment(&mut self, sums: &[Val], to: Buf, at: impl Into<Index>, line: u64) {
        let place = self.place(to, at);
        let line = self.int(line as i64, I32);
        self.line(format_args!(
            "llvm.call_intrinsic \"{WMMA}.store.d.row.stride.f32\"({place}, {}, {line}) : ({}, {}, i32) -> ()",
            super::list(sums),
            to.pointer(),
            types(SUMS, F32)
        ));
    }

    fn apart(&mut self, whole: Val, count: usize, ty: Ty) -> Vec<Val> {
        let all = types(count, ty);
        let part = |i| self.emit(ty, format_args!("llvm.extractvalue {whole}[{i}] : !llvm.struct<({all})>"));
        (0..count).map(part).collect()
    }
}
