//! Operations of a GPU's tensor cores (WMMA): products of 16 × 16 fragments in half precision, which the threads of a
//! warp compute together. The distribution of a fragment's elements over the threads depends on the chip and stays
//! opaque.

use super::{Buf, F32, I32, INDEX, Index, Kernel, Scalar, Ty, Val};

/// Rows and columns of a fragment.
pub const SIDE: u64 = 16;

/// A half-precision type of operands; sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Half {
    /// IEEE half precision: up to 65504, and at full precision from 6·10⁻⁵ on.
    F16,
    /// bfloat16, with the range of f32.
    BF16,
}

/// The side of a product that a fragment is.
#[derive(Clone, Copy, PartialEq)]
pub enum Operand {
    /// The left side.
    A,
    /// The right side.
    B,
}

impl Half {
    /// The type's name.
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

    /// The registers in which a thread holds its part of an operand's fragment.
    fn registers(self) -> (usize, Ty) {
        match self {
            Half::F16 => (8, Ty { scalar: Scalar::F16, lanes: Some(2) }),
            Half::BF16 => (4, I32),
        }
    }
}

/// Floats in which a thread holds its part of a fragment of sums.
pub const SUMS: usize = 8;

/// The LLVM intrinsics; the corresponding MLIR operations do not support bf16.
const WMMA: &str = "llvm.nvvm.wmma.m16n16k16";

fn types(count: usize, ty: Ty) -> String {
    vec![ty.to_string(); count].join(", ")
}

impl Kernel {
    /// Rounds two floats to a word, the first of them in its lower half.
    pub fn pack_half2(&mut self, half: Half, [x, y]: [Val; 2]) -> Val {
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

    /// Rounds a float in every lane, and stores the lanes of the mask as 16-bit elements from `at` on.
    pub fn store_rounded(&mut self, half: Half, x: Val, to: Buf, at: impl Into<Index>, mask: Val) {
        self.mark_written(to);
        let at = self.eval(at.into() + self.lane_index());
        self.when(mask, |k| {
            let ty = Ty { scalar: half.scalar(), lanes: None };
            let rounded = k.emit(ty, format_args!("arith.truncf {x} : f32 to {ty}"));
            let (place, pointer) = (k.pointer_to_type(to, at, ty), to.pointer());
            k.line(format_args!("llvm.store {rounded}, {place} : {ty}, {pointer}"));
        });
    }

    /// Loads the fragment at word `at` of shared memory, whose rows are `line` 16-bit elements apart.
    pub fn load_fragment(
        &mut self,
        half: Half,
        operand: Operand,
        from: Buf,
        at: impl Into<Index>,
        line: u64,
    ) -> Vec<Val> {
        let place = self.pointer_to(from, at);
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
        self.unpack_struct(loaded, count, ty)
    }

    /// sums + a · b
    pub fn multiply_fragments(&mut self, half: Half, a: &[Val], b: &[Val], sums: &[Val]) -> Vec<Val> {
        let (count, ty) = half.registers();
        let (types, floats) = (types(2 * count, ty), types(SUMS, F32));
        // For f16, the intrinsic's name also states the types of the sums.
        let of = if half == Half::F16 { "f32.f32" } else { "bf16" };
        let product = self.emit(
            INDEX,
            format_args!(
                "llvm.call_intrinsic \"{WMMA}.mma.row.row.{of}\"({}) : ({types}, {floats}) -> !llvm.struct<({floats})>",
                super::list(a.iter().chain(b).chain(sums)),
            ),
        );
        self.unpack_struct(product, SUMS, F32)
    }

    /// Stores a fragment of sums at float `at` of shared memory, with rows `line` floats apart.
    pub fn store_fragment(&mut self, sums: &[Val], to: Buf, at: impl Into<Index>, line: u64) {
        let place = self.pointer_to(to, at);
        let line = self.int(line as i64, I32);
        self.line(format_args!(
            "llvm.call_intrinsic \"{WMMA}.store.d.row.stride.f32\"({place}, {}, {line}) : ({}, {}, i32) -> ()",
            super::list(sums),
            to.pointer(),
            types(SUMS, F32)
        ));
    }

    fn unpack_struct(&mut self, whole: Val, count: usize, ty: Ty) -> Vec<Val> {
        let all = types(count, ty);
        let part = |i| self.emit(ty, format_args!("llvm.extractvalue {whole}[{i}] : !llvm.struct<({all})>"));
        (0..count).map(part).collect()
    }
}
