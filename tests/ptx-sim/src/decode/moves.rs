//! Decodes instructions that move data or convert addresses.

use super::{Decoder, spell};
use crate::arithmetic::{self, Map};
use crate::memory;
use crate::opcode::{Decoded, Opcode, unknown, wrong};
use crate::parse::Arg;
use crate::program::*;
use crate::report::Kind;
use crate::types::{Space, Type};

impl<'a> Decoder<'a, '_> {
    pub(super) fn cvta(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        let to = op.take("to");
        let window = op.needed_one_of(&[
            ("global", 0),
            ("shared", memory::SHARED_WINDOW),
            ("local", memory::LOCAL_WINDOW),
            ("const", memory::CONST_WINDOW),
            ("param", memory::PARAM_WINDOW),
        ])?;
        let ty = op.ty()?;
        let [result, operand] = args else { return wrong("expected two operands") };
        if ty.bits() != 64 {
            return unknown("a generic address of 32 bits");
        }
        let map: Map = if to {
            Box::new(move |a, _, _| a.map(|a| a.wrapping_sub(window)))
        } else {
            Box::new(move |a, _, _| a.map(|a| a.wrapping_add(window)))
        };
        let operands = vec![self.operand(operand, ty)?];
        Ok((Kind::Move, Action::Map { map, result: self.needed_result(result, 64)?, operands }))
    }

    pub(super) fn isspacep(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        let space = op.needed_one_of(&[
            ("global", Space::Global),
            ("shared", Space::Shared),
            ("shared::cta", Space::Shared),
            ("local", Space::Local),
            ("const", Space::Const),
        ])?;
        let [result, operand] = args else { return wrong("expected two operands") };
        let map: Map = Box::new(move |a, _, _| a.map(|a| u64::from(memory::space_of(a).0 == space)));
        let operands = vec![self.operand(operand, Type::Bits(64))?];
        Ok((Kind::Compare, Action::Map { map, result: self.needed_result(result, 1)?, operands }))
    }

    pub(super) fn take_space(op: &mut Opcode) -> Space {
        const SPACES: [(&str, Space); 8] = [
            ("global", Space::Global),
            ("shared", Space::Shared),
            ("shared::cta", Space::Shared),
            ("local", Space::Local),
            ("const", Space::Const),
            ("param", Space::Param),
            ("param::entry", Space::Param),
            ("param::func", Space::Param),
        ];
        op.one_of(&SPACES).unwrap_or(Space::Generic)
    }

    pub(super) fn load(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        op.drop_memory_hints();
        let space = Self::take_space(op);
        let constant = op.take("nc") || op.name == "ldu";
        let lanes = op.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]);
        let ty = op.ty()?;
        let [results, address] = args else { return wrong("expected two operands") };
        let results = self.vector(results, lanes)?;
        let results = results.iter().map(|arg| self.loose_result(arg, ty.bits())).collect::<Decoded<Vec<_>>>()?;
        let bytes = ty.bytes();
        if bytes * results.len() > 16 {
            return unknown("a load of more than 16 bytes");
        }
        let (address, space) = self.address(address, space)?;
        Ok((Kind::Load, Action::Load(Load { space, address, bytes, results, signed: ty.signed(), constant })))
    }

    pub(super) fn store(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        op.drop_memory_hints();
        let space = Self::take_space(op);
        let lanes = op.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]);
        let ty = op.ty()?;
        let [address, values] = args else { return wrong("expected two operands") };
        let values = self.vector(values, lanes)?;
        let values = values.iter().map(|arg| self.operand_of(arg, ty, true)).collect::<Decoded<Vec<_>>>()?;
        let bytes = ty.bytes();
        if bytes * values.len() > 16 {
            return unknown("a store of more than 16 bytes");
        }
        let (address, space) = self.address(address, space)?;
        Ok((Kind::Store, Action::Store { space, address, bytes, values }))
    }

    fn vector<'v>(&self, arg: &'v Arg<'a>, lanes: Option<usize>) -> Decoded<Vec<&'v Arg<'a>>> {
        match (arg, lanes) {
            (Arg::Vector(parts), Some(lanes)) if parts.len() == lanes => Ok(parts.iter().collect()),
            (Arg::Vector(parts), None) if parts.len() == 1 => Ok(parts.iter().collect()),
            (Arg::Vector(_), _) | (_, Some(_)) => wrong("the vector has another length than the opcode says"),
            _ => Ok(vec![arg]),
        }
    }

    pub(super) fn atomic(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        op.drop_memory_hints();
        let space = Self::take_space(op);
        op.take("noftz");
        let name = op.needed_word(&["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"])?;
        let ty = op.ty()?;
        let (result, rest) = match (op.name, args) {
            ("atom", [result, rest @ ..]) => (self.result(result, ty.bits())?, rest),
            ("red", rest) => (None, rest),
            _ => return wrong("expected operands"),
        };
        let count = if name == "cas" { 2 } else { 1 };
        let [address, values @ ..] = rest else { return wrong("expected an address") };
        if values.len() != count {
            return wrong(format!("{} operands where {count} are expected", values.len()));
        }
        let operands = [self.operand(&values[0], ty)?, self.operand(&values[count - 1], ty)?];
        let function: Box<dyn Fn(u64, u64, u64) -> u64 + Send + Sync> = match name {
            "exch" => Box::new(|_, b, _| b),
            "cas" => Box::new(|old, b, c| if old == b { c } else { old }),
            "inc" => Box::new(|old, b, _| if old >= b { 0 } else { old + 1 }),
            "dec" => Box::new(|old, b, _| if old == 0 || old > b { b } else { old - 1 }),
            name => {
                // The arithmetic is that of the instructions outside of atomics.
                let (typed, spelt) = match (name, ty) {
                    ("add" | "min" | "max", Type::Bits(_)) => return wrong("arithmetic on untyped bits"),
                    ("add", Type::Float(_) | Type::Pair(_)) => (ty, format!("{name}.rn.{}", spell(ty))),
                    _ => (ty, format!("{name}.{}", spell(ty))),
                };
                let mut inner = Opcode::new(&spelt);
                let Some(arithmetic) = arithmetic::decode(&mut inner) else { return unknown(format!("`.{name}`")) };
                let map = arithmetic?.map;
                debug_assert_eq!(typed.bits(), ty.bits());
                Box::new(move |old, b, _| map(&splat(old), &splat(b), &splat(0))[0])
            }
        };
        let float = matches!(ty, Type::Float(_) | Type::Pair(_)) && name == "add";
        let (address, space) = self.address(address, space)?;
        let atomic = Atomic { space, address, bytes: ty.bytes(), function, float, result, operands };
        Ok((Kind::Atomic, Action::Atomic(Box::new(atomic))))
    }

    pub(super) fn copy_async(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        if !op.take("async") {
            return unknown("`cp` other than `cp.async`");
        }
        op.needs(80);
        if op.take("commit_group") {
            return Ok((Kind::CopyAsync, Action::CommitCopies));
        }
        if op.take("wait_all") {
            return Ok((Kind::CopyAsync, Action::AwaitCopies(None)));
        }
        if op.take("wait_group") {
            let [Arg::Integer(groups)] = args else { return wrong("expected a number") };
            return Ok((Kind::CopyAsync, Action::AwaitCopies(Some(*groups as usize))));
        }
        let whole_line = op.take("cg");
        op.drop_memory_hints();
        let to_shared = op.take("shared") || op.take("shared::cta");
        if !to_shared || !op.take("global") {
            return unknown("`cp.async` other than from global to shared memory");
        }
        let (to, from, bytes, filled) = match args {
            [to, from, Arg::Integer(bytes)] => (to, from, *bytes, None),
            [to, from, Arg::Integer(bytes), filled] => {
                (to, from, *bytes, Some(self.operand(filled, Type::Unsigned(32))?))
            }
            _ => return wrong("expected two addresses and a size"),
        };
        if !matches!(bytes, 4 | 8 | 16) || whole_line && bytes != 16 {
            return wrong(format!("a copy of {bytes} bytes"));
        }
        let (to, _) = self.address(to, Space::Shared)?;
        let (from, _) = self.address(from, Space::Global)?;
        Ok((Kind::CopyAsync, Action::CopyAsync { bytes: bytes as usize, to, from, filled }))
    }
}
