//! Decodes branches, calls and instructions that the lanes of a warp execute together.

use super::layout::Symbol;
use super::{Decoder, spell};
use crate::arithmetic;
use crate::flow;
use crate::opcode::{Decoded, Opcode, unknown, wrong};
use crate::parse::Arg;
use crate::program::*;
use crate::report::Kind;
use crate::types::Type;

impl<'a> Decoder<'a, '_> {
    pub(super) fn branch_table(&mut self, op: &mut Opcode, args: &[Arg<'a>]) -> Decoded<(Kind, Action)> {
        let uniform = op.take("uni");
        op.take("idx");
        let [index, Arg::Name(table, 0)] = args else { return wrong("expected an index and a list of labels") };
        let Some(labels) = self.tables.get(table).cloned() else { return wrong(format!("no list `{table}`")) };
        let targets = labels.iter().map(|label| self.target(&Arg::Name(label, 0))).collect::<Decoded<Vec<_>>>()?;
        let index = self.operand(index, Type::Unsigned(32))?;
        Ok((Kind::Branch, Action::BranchTable { targets: targets.into(), index, reconvergence: flow::END, uniform }))
    }

    pub(super) fn call(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        op.take("uni");
        let (results, name, arguments) = match args {
            [Arg::List(results), Arg::Name(name, 0), Arg::List(arguments)] => (&results[..], name, &arguments[..]),
            [Arg::Name(name, 0), Arg::List(arguments)] => (&[][..], name, &arguments[..]),
            [Arg::Name(name, 0)] => (&[][..], name, &[][..]),
            _ => return unknown("a call in this form"),
        };
        let Some(signature) = self.signatures.get(name).filter(|signature| !signature.entry) else {
            return unknown(format!("a call of `{name}`, which the module does not define"));
        };
        if results.len() != signature.results.len() || arguments.len() != signature.params.len() {
            return wrong(format!("`{name}` has {} parameters", signature.params.len()));
        }
        let place = |decoder: &mut Self, arg: &Arg| match arg {
            Arg::Name(name, 0) => match decoder.find(name)? {
                Symbol::FrameParam(slot) => Ok(slot),
                _ => unknown("a call with registers as arguments"),
            },
            _ => unknown("a call with numbers as arguments"),
        };
        let mut pass = |args: &[Arg], slots: &[Slot], inwards: bool| {
            args.iter()
                .zip(slots)
                .map(|(arg, slot)| {
                    let own = place(self, arg)?;
                    if own.bytes != slot.bytes {
                        return wrong(format!("an argument of {} bytes where {} are expected", own.bytes, slot.bytes));
                    }
                    let (from, to) = if inwards { (own.offset, slot.offset) } else { (slot.offset, own.offset) };
                    Ok(ParamCopy { from, to, bytes: slot.bytes })
                })
                .collect::<Decoded<Vec<_>>>()
        };
        let arguments = pass(arguments, &signature.params, true)?;
        let results = pass(results, &signature.results, false)?;
        self.callees.push(signature.index);
        Ok((Kind::Branch, Action::Call { function: signature.index, arguments, results }))
    }

    pub(super) fn barrier(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        let ty = Type::Unsigned(32);
        if op.take("warp") {
            op.take("sync");
            let [members] = args else { return wrong("expected a mask") };
            return Ok((Kind::Barrier, Action::WarpBarrier { members: self.operand(members, ty)? }));
        }
        op.take("cta");
        op.take("aligned");
        if !op.take("sync") {
            return unknown("a barrier other than `.sync`");
        }
        let (id, threads) = match args {
            [id] => (self.operand(id, ty)?, None),
            [id, threads] => (self.operand(id, ty)?, Some(self.operand(threads, ty)?)),
            _ => return wrong("expected a barrier's number"),
        };
        Ok((Kind::Barrier, Action::Barrier { id, threads }))
    }

    pub(super) fn shuffle(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        if !op.take("sync") {
            return unknown("`shfl` without `.sync`");
        }
        let mode = op.needed_one_of(&[
            ("up", ShuffleMode::Up),
            ("down", ShuffleMode::Down),
            ("bfly", ShuffleMode::Butterfly),
            ("idx", ShuffleMode::Index),
        ])?;
        let ty = op.ty()?;
        let [result, operand, lane, clamp, members] = args else { return wrong("expected five operands") };
        let (result, in_range) = match result {
            Arg::Both(d, p) => (self.result(&Arg::Name(d, 0), 32)?, self.result(&Arg::Name(p, 0), 1)?),
            _ => (self.result(result, 32)?, None),
        };
        let shuffle = Shuffle {
            mode,
            result,
            in_range,
            operand: self.operand(operand, ty)?,
            lane: self.operand(lane, Type::Unsigned(32))?,
            clamp: self.operand(clamp, Type::Unsigned(32))?,
            members: self.operand(members, Type::Unsigned(32))?,
        };
        Ok((Kind::Shuffle, Action::Shuffle(Box::new(shuffle))))
    }

    pub(super) fn vote(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        if !op.take("sync") {
            return unknown("`vote` without `.sync`");
        }
        let vote = op.needed_one_of(&[
            ("all", Vote::All),
            ("any", Vote::Any),
            ("uni", Vote::Uniform),
            ("ballot", Vote::Ballot),
        ])?;
        let ty = op.ty()?;
        let [result, operand, members] = args else { return wrong("expected three operands") };
        let result = self.needed_result(result, ty.bits())?;
        let operand = self.operand(operand, Type::Pred)?;
        let members = self.operand(members, Type::Unsigned(32))?;
        Ok((Kind::Shuffle, Action::Vote { vote, result, operand, members }))
    }

    pub(super) fn reduce(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        op.needs(80);
        if !op.take("sync") {
            return unknown("`redux` without `.sync`");
        }
        let name = op.needed_word(&["add", "min", "max", "and", "or", "xor"])?;
        let ty = op.ty()?;
        let spelt = format!("{name}.{}", spell(ty));
        let Some(arithmetic) = arithmetic::decode(&mut Opcode::new(&spelt)) else {
            return unknown(format!("`.{name}`"));
        };
        let map = arithmetic?.map;
        let function: Combine = Box::new(move |a, b| map(&splat(a), &splat(b), &splat(0))[0]);
        let [result, operand, members] = args else { return wrong("expected three operands") };
        let result = self.needed_result(result, 32)?;
        let operand = self.operand(operand, ty)?;
        let members = self.operand(members, Type::Unsigned(32))?;
        Ok((Kind::Shuffle, Action::Reduce { function, result, operand, members }))
    }
}
