//! Decodes `wmma`, `mma` and `ldmatrix`.

use super::Decoder;
use crate::matrix::{Fragment, Role, Shape};
use crate::opcode::{Decoded, Opcode, unknown, wrong};
use crate::parse::Arg;
use crate::program::*;
use crate::report::Kind;
use crate::types::{Float, Space, Type};

impl<'a> Decoder<'a, '_> {
    fn registers(&mut self, arg: &Arg, count: usize) -> Decoded<Vec<u32>> {
        fragment_of(arg, count)?.iter().map(|part| self.needed_result(part, 32)).collect()
    }

    fn operands(&mut self, arg: &Arg, count: usize) -> Decoded<Vec<Operand>> {
        fragment_of(arg, count)?.iter().map(|part| self.operand(part, Type::Bits(32))).collect()
    }

    pub(super) fn wmma(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        #[derive(Clone, Copy, PartialEq)]
        enum Verb {
            Load,
            Store,
            Multiply,
        }
        let verb = op.needed_one_of(&[("load", Verb::Load), ("store", Verb::Store), ("mma", Verb::Multiply)])?;
        if !op.take("sync") || !op.take("aligned") {
            return wrong("`wmma` is `.sync.aligned`");
        }
        op.needs(70);
        let role = op.one_of(&[("a", Role::A), ("b", Role::B), ("c", Role::Accumulator), ("d", Role::Accumulator)]);
        const LAYOUTS: [(&str, bool); 2] = [("row", false), ("col", true)];
        let column_major = op.needed_one_of(&LAYOUTS)?;
        let other_column_major = if verb == Verb::Multiply { op.needed_one_of(&LAYOUTS)? } else { false };
        let shape = op.needed_one_of(&[
            ("m16n16k16", Shape { m: 16, n: 16, k: 16 }),
            ("m32n8k16", Shape { m: 32, n: 8, k: 16 }),
            ("m8n32k16", Shape { m: 8, n: 32, k: 16 }),
        ])?;
        let space = Self::take_space(op);
        let fragment = |op: &mut Opcode, role: Role, ty: Type, column_major: bool| match (role, ty) {
            (Role::A | Role::B, Type::Float(float @ (Float::F16 | Float::BF16)))
            | (Role::Accumulator, Type::Float(float @ (Float::F16 | Float::F32))) => {
                if float == Float::BF16 {
                    op.needs(80);
                }
                let column_major = column_major && role != Role::Accumulator;
                Ok(Fragment { role, shape, float, column_major, opaque: true })
            }
            _ => unknown("`wmma` of this type"),
        };
        if verb == Verb::Multiply {
            let first = op.ty()?;
            let second = op.ty()?;
            // For factors in f16 the opcode names only the types of the accumulators.
            let (d, ab, c) = match op.ty() {
                Err(_) => (first, Type::Float(Float::F16), second),
                Ok(b) if b == second => (first, b, op.ty()?),
                Ok(_) => return unknown("`wmma` of factors of two types"),
            };
            let d = fragment(op, Role::Accumulator, d, false)?;
            let a = fragment(op, Role::A, ab, column_major)?;
            let b = fragment(op, Role::B, ab, other_column_major)?;
            let c = fragment(op, Role::Accumulator, c, false)?;
            return self.multiply(shape, [d, a, b, c], args);
        }
        let Some(role) = role else { return wrong("which matrix is moved?") };
        let ty = op.ty()?;
        let fragment = fragment(op, role, ty, column_major)?;
        let (place, registers, stride) = match (verb, args) {
            (Verb::Load, [registers, address, stride @ ..]) => (address, registers, stride),
            (_, [address, registers, stride @ ..]) => (address, registers, stride),
            _ => return wrong("expected a fragment and an address"),
        };
        let stride = match stride {
            [] => None,
            [stride] => Some(self.operand(stride, Type::Unsigned(32))?),
            _ => return wrong("too many operands"),
        };
        let (address, _) = self.address(place, space)?;
        let registers = if verb == Verb::Load {
            self.registers(registers, fragment.registers())?.into_iter().map(Operand::Register).collect()
        } else {
            self.operands(registers, fragment.registers())?
        };
        let access = Box::new(MatrixAccess { fragment, column_major, space, address, stride, registers });
        let action = if verb == Verb::Load { Action::LoadMatrix(access) } else { Action::StoreMatrix(access) };
        Ok((Kind::MatrixMove, action))
    }

    pub(super) fn mma(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        if !op.take("sync") || !op.take("aligned") {
            return wrong("`mma` is `.sync.aligned`");
        }
        let shape =
            op.needed_one_of(&[("m16n8k16", Shape { m: 16, n: 8, k: 16 }), ("m16n8k8", Shape { m: 16, n: 8, k: 8 })])?;
        if !op.take("row") || !op.take("col") {
            return wrong("`mma` takes a by rows and b by columns");
        }
        let types = [op.ty()?, op.ty()?, op.ty()?, op.ty()?];
        let [Type::Float(d), Type::Float(a), Type::Float(b), Type::Float(c)] = types else {
            return unknown("`mma` of integers");
        };
        let factors = a == b && matches!(a, Float::F16 | Float::BF16);
        let sums = [c, d].iter().all(|sum| *sum == Float::F32 || *sum == Float::F16 && a == Float::F16);
        if !factors || !sums {
            return unknown("`mma` of these types");
        }
        op.needs(if shape.k == 8 && a == Float::F16 { 75 } else { 80 });
        let fragment = |role, float| Fragment { role, shape, float, column_major: role == Role::B, opaque: false };
        let fragments = [
            fragment(Role::Accumulator, d),
            fragment(Role::A, a),
            fragment(Role::B, b),
            fragment(Role::Accumulator, c),
        ];
        self.multiply(shape, fragments, args)
    }

    fn multiply(&mut self, shape: Shape, fragments: [Fragment; 4], args: &[Arg]) -> Decoded<(Kind, Action)> {
        let [d, a, b, c] = args else { return wrong("expected four fragments") };
        let [fd, fa, fb, fc] = fragments;
        let multiply = Multiply {
            shape,
            a: (fa, self.operands(a, fa.registers())?),
            b: (fb, self.operands(b, fb.registers())?),
            c: (fc, self.operands(c, fc.registers())?),
            d: (fd, self.registers(d, fd.registers())?),
        };
        Ok((Kind::Matrix, Action::Multiply(Box::new(multiply))))
    }

    pub(super) fn load_tiles(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        op.needs(75);
        if !op.take("sync") || !op.take("aligned") || !op.take("m8n8") {
            return unknown("`ldmatrix` in this form");
        }
        let count = op.needed_one_of(&[("x1", 1), ("x2", 2), ("x4", 4)])?;
        let transposed = op.take("trans");
        if Self::take_space(op) != Space::Shared || op.ty()? != Type::Bits(16) {
            return unknown("`ldmatrix` other than of 16 bits in shared memory");
        }
        let [results, address] = args else { return wrong("expected two operands") };
        let results = self.registers(results, count)?;
        let (address, _) = self.address(address, Space::Shared)?;
        Ok((Kind::MatrixMove, Action::LoadTiles { results, address, transposed }))
    }
}

fn fragment_of<'v, 'a>(arg: &'v Arg<'a>, count: usize) -> Decoded<&'v [Arg<'a>]> {
    match arg {
        Arg::Vector(parts) if parts.len() == count => Ok(parts),
        Arg::Vector(parts) => wrong(format!("a fragment of {} registers where {count} are expected", parts.len())),
        _ => wrong("expected a fragment in braces"),
    }
}
