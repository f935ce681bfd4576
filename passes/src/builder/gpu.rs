//! What the threads of a block do together, on a GPU: they share memory, and wait for each other. A *team* is a block's
//! warps, or a processor's thread alone.

use std::fmt::Write;

use peft_runtime::artifact::Element;

use super::lanes::Form;
use super::{Buf, INDEX, Index, Kernel, NAME, Order, Val};
use crate::target::cuda::{WARP, WARPS};

impl Kernel {
    /// The units asked for, a block's threads together on [`WARPS`] of them: who launches kernels counts in warps.
    pub fn block_units(&mut self, body: impl FnOnce(&mut Kernel, Val)) {
        let Form::Warps { units, block, blocks, .. } = self.form else { unreachable!("a processor has no blocks") };
        self.fold_by(block, units / WARPS, blocks, &[], |k, unit, _| {
            body(k, unit);
            vec![]
        });
    }

    /// The same for units of two kinds, `each` of them: those of the second when a block has no more of the first. Nothing
    /// of the one is in registers while it works on the other.
    pub fn block_units_of_two(
        &mut self,
        each: Val,
        first: impl FnOnce(&mut Kernel, Val),
        second: impl FnOnce(&mut Kernel, Val),
    ) {
        let Form::Warps { block, blocks, .. } = self.form else { unreachable!("a processor has no blocks") };
        self.fold_by(block, each, blocks, &[], |k, unit, _| {
            first(k, unit);
            vec![]
        });
        let left = self.max(each - block, 0);
        let rounds = (left + (blocks - 1)) / blocks;
        self.fold_by(block + rounds * blocks - each, each, blocks, &[], |k, unit, _| {
            second(k, unit);
            vec![]
        });
    }

    /// A multiprocessor is to have registers for so many of the kernel's blocks, at least.
    pub fn hold_blocks(&mut self, count: u64) {
        let Form::Warps { resident, .. } = &mut self.form else { unreachable!("a processor has no blocks") };
        *resident = count;
    }

    /// Members of a team.
    pub fn team(&self) -> u64 {
        self.machine.team()
    }

    /// The units asked for, each a team's; launched units are members.
    pub fn team_units(&mut self, body: impl FnOnce(&mut Kernel, Val)) {
        match self.form {
            Form::Vectors { .. } => self.units(body),
            Form::Warps { .. } => self.block_units(body),
        }
    }

    /// For `from`, `from + step`, … below `to`, dealt out to the team, with values that each member carries.
    pub fn dealt_fold(
        &mut self,
        from: impl Into<Index>,
        to: impl Into<Index>,
        step: u64,
        start: &[Val],
        body: impl FnOnce(&mut Kernel, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let from = match self.form {
            Form::Vectors { .. } => from.into(),
            Form::Warps { warp, .. } => from.into() + warp * step,
        };
        self.fold(from, to, step * self.team(), start, body)
    }

    /// Sums of every member's lanes, which each of them gets: `room` is a vector for each member, shared.
    pub fn sum_team(&mut self, x: Val, room: Option<Buf>) -> Val {
        self.join_team(x, room, Kernel::add)
    }

    /// The same of another operation, which joins two.
    pub fn join_team(&mut self, x: Val, room: Option<Buf>, mut join: impl FnMut(&mut Kernel, Val, Val) -> Val) -> Val {
        let (Form::Warps { warp, lane, .. }, Some(room)) = (&self.form, room) else { return x };
        let (warp, lane) = (*warp, *lane);
        self.store_here(x, room, warp * WARP + lane);
        self.barrier();
        let mut all = self.load_here(room, lane);
        for member in 1..WARPS {
            let other = self.load_here(room, member * WARP + lane);
            all = join(self, all, other);
        }
        // Before the room is used again.
        self.barrier();
        all
    }

    /// What only the team's first member does.
    pub fn first_of_team(&mut self, body: impl FnOnce(&mut Kernel)) {
        match self.form {
            Form::Vectors { .. } => body(self),
            Form::Warps { warp, .. } => {
                let first = self.compare(warp, Order::Eq, 0);
                self.when(first, body);
            }
        }
    }

    /// The thread's number in its block.
    pub fn thread(&self) -> Val {
        match self.form {
            Form::Warps { thread, .. } => thread,
            Form::Vectors { .. } => unreachable!("a processor has no blocks"),
        }
    }

    /// `n` floats that the block's threads share.
    pub fn shared(&mut self, n: u64) -> Buf {
        self.shared_words(n).floats()
    }

    /// The same as words.
    pub fn shared_words(&mut self, n: u64) -> Buf {
        let name = format!("{NAME}_shared{}", self.globals.lines().count());
        let _ = writeln!(
            self.globals,
            "  llvm.mlir.global internal @{name}() {{addr_space = 3 : i32, alignment = 32 : i64}} : !llvm.array<{n} x i32>"
        );
        let pointer = self.fresh(INDEX);
        self.line(format_args!("{pointer} = llvm.mlir.addressof @{name} : !llvm.ptr<3>"));
        Buf { id: pointer.id, element: Element::I32, shared: true }
    }

    /// The same memory from `at` on.
    pub fn from(&mut self, of: Buf, at: impl Into<Index>) -> Buf {
        Buf { id: self.place(of, at).id, ..of }
    }

    /// What the block's threads have written, others of them may read from here on.
    pub fn barrier(&mut self) {
        self.line(format_args!("gpu.barrier"));
    }

    /// Four neighbours, from a multiple of four on.
    pub fn load_four(&mut self, from: Buf, at: impl Into<Index>) -> [Val; 4] {
        let four = self.four(from, at);
        self.apart_four(four)
    }

    /// The same if the condition holds, else zeros.
    pub fn load_four_if(&mut self, condition: Val, from: Buf, at: impl Into<Index>) -> [Val; 4] {
        let at = self.eval(at);
        let ty = from.scalar().times(4);
        let nothing = if ty.float() { self.float(0.0, ty) } else { self.int(0, ty) };
        let four = self.either(condition, nothing, |k| k.four(from, at));
        self.apart_four(four)
    }

    /// Four neighbouring words go to shared memory by themselves, to a multiple of four; zeros unless the condition holds.
    /// They are there when [`Kernel::await_copies_but`] is past; for other threads, after a barrier. From sm_80 on.
    pub fn copy_four_if(
        &mut self,
        condition: Val,
        (from, at): (Buf, impl Into<Index>),
        (to, place): (Buf, impl Into<Index>),
    ) {
        let (source, target) = (self.place(from, at), self.place(to, place));
        let (all, none) = (self.int(16, super::I32), self.int(0, super::I32));
        let bytes = self.select(condition, all, none);
        self.line(format_args!(
            "llvm.call_intrinsic \"llvm.nvvm.cp.async.cg.shared.global.16.s\"({target}, {source}, {bytes}) : ({}, {}, i32) -> ()",
            to.pointer(),
            from.pointer()
        ));
    }

    /// The thread's copies since the last time are a group.
    pub fn commit_copies(&mut self) {
        self.line(format_args!("llvm.call_intrinsic \"llvm.nvvm.cp.async.commit.group\"() : () -> ()"));
    }

    /// Until all of the thread's groups but the last few are there.
    pub fn await_copies_but(&mut self, groups: u64) {
        let groups = self.int(groups as i64, super::I32);
        self.line(format_args!("llvm.call_intrinsic \"llvm.nvvm.cp.async.wait.group\"({groups}) : (i32) -> ()"));
    }

    /// The other way.
    pub fn store_four(&mut self, four: [Val; 4], to: Buf, at: impl Into<Index>) {
        self.written(to);
        let place = self.place(to, at);
        let ty = four[0].ty.times(4);
        let mut vector = self.emit(ty, format_args!("llvm.mlir.poison : {ty}"));
        for (i, x) in four.into_iter().enumerate() {
            let i = self.int(i as i64, super::I32);
            vector = self.emit(ty, format_args!("llvm.insertelement {x}, {vector}[{i} : i32] : {ty}"));
        }
        self.line(format_args!("llvm.store {vector}, {place} {{alignment = 16 : i64}} : {ty}, {}", to.pointer()));
    }

    fn four(&mut self, from: Buf, at: impl Into<Index>) -> Val {
        let place = self.place(from, at);
        let ty = from.scalar().times(4);
        self.emit(ty, format_args!("llvm.load {place} {{alignment = 16 : i64}} : {} -> {ty}", from.pointer()))
    }

    fn apart_four(&mut self, four: Val) -> [Val; 4] {
        let (ty, scalar) = (four.ty, super::Ty { lanes: None, ..four.ty });
        [0, 1, 2, 3].map(|i| {
            let i = self.int(i, super::I32);
            self.emit(scalar, format_args!("llvm.extractelement {four}[{i} : i32] : {ty}"))
        })
    }
}
