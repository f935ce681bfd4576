//! Operations of a GPU's thread block: shared memory, barriers, and work that its warps divide. A *team* is a thread
//! block on a GPU, and a single thread on a CPU.

use std::fmt::Write;

use peft_runtime::artifact::Element;

use super::lanes::Execution;
use super::{Buf, INDEX, Index, Kernel, NAME, Order, Val};
use crate::target::cuda::{WARP, WARPS};

impl Kernel {
    /// A loop over units that a whole block executes. Launches count units by warps, so each of these is [`WARPS`]
    /// units of the launch.
    pub fn block_units(&mut self, body: impl FnOnce(&mut Kernel, Val)) {
        let Execution::Warps { units, block, blocks, .. } = self.execution else {
            unreachable!("a CPU has no thread blocks")
        };
        self.fold_by(block, units / WARPS, blocks, &[], |k, unit, _| {
            body(k, unit);
            vec![]
        });
    }

    /// A loop over `each` units of a first kind, then `each` of a second, continuing the distribution over the blocks
    /// where the first kind ends. Values of the one kind take no registers in the code of the other.
    pub fn block_units_of_two_kinds(
        &mut self,
        each: Val,
        first: impl FnOnce(&mut Kernel, Val),
        second: impl FnOnce(&mut Kernel, Val),
    ) {
        let Execution::Warps { block, blocks, .. } = self.execution else { unreachable!("a CPU has no thread blocks") };
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

    /// Demands that a multiprocessor's registers hold at least so many blocks.
    pub fn set_resident_blocks(&mut self, count: u64) {
        let Execution::Warps { resident_blocks, .. } = &mut self.execution else {
            unreachable!("a CPU has no thread blocks")
        };
        *resident_blocks = count;
    }

    /// The number of members of a team.
    pub fn team(&self) -> u64 {
        self.machine.team_size()
    }

    /// A loop over units that a whole team executes. Units of the launch are counted by members.
    pub fn team_units(&mut self, body: impl FnOnce(&mut Kernel, Val)) {
        match self.execution {
            Execution::Vectors { .. } => self.units(body),
            Execution::Warps { .. } => self.block_units(body),
        }
    }

    /// A loop over `from`, `from + step`, … below `to`, whose steps the team's members divide. Each member carries its
    /// own values.
    pub fn team_fold(
        &mut self,
        from: impl Into<Index>,
        to: impl Into<Index>,
        step: u64,
        start: &[Val],
        body: impl FnOnce(&mut Kernel, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let from = match self.execution {
            Execution::Vectors { .. } => from.into(),
            Execution::Warps { warp, .. } => from.into() + warp * step,
        };
        self.fold(from, to, step * self.team(), start, body)
    }

    /// The sums, lane by lane, over all members of the team; each member gets them. `shared` is shared memory for one
    /// vector of each member.
    pub fn sum_team(&mut self, x: Val, shared: Option<Buf>) -> Val {
        self.reduce_team(x, shared, Kernel::add)
    }

    /// The same with another associative operation.
    pub fn reduce_team(
        &mut self,
        x: Val,
        shared: Option<Buf>,
        mut join: impl FnMut(&mut Kernel, Val, Val) -> Val,
    ) -> Val {
        let (Execution::Warps { warp, lane, .. }, Some(shared)) = (&self.execution, shared) else { return x };
        let (warp, lane) = (*warp, *lane);
        self.store_scalar(x, shared, warp * WARP + lane);
        self.barrier();
        let mut all = self.load_scalar(shared, lane);
        for member in 1..WARPS {
            let other = self.load_scalar(shared, member * WARP + lane);
            all = join(self, all, other);
        }
        // The shared memory may be used again after this barrier.
        self.barrier();
        all
    }

    /// Runs `body` in the first member only.
    pub fn first_of_team(&mut self, body: impl FnOnce(&mut Kernel)) {
        match self.execution {
            Execution::Vectors { .. } => body(self),
            Execution::Warps { warp, .. } => {
                let first = self.compare(warp, Order::Eq, 0);
                self.when(first, body);
            }
        }
    }

    /// The index of the thread in its block.
    pub fn thread(&self) -> Val {
        match self.execution {
            Execution::Warps { thread, .. } => thread,
            Execution::Vectors { .. } => unreachable!("a CPU has no thread blocks"),
        }
    }

    /// Allocates `n` floats of shared memory.
    pub fn shared(&mut self, n: u64) -> Buf {
        self.shared_words(n).floats()
    }

    /// Allocates `n` words of shared memory.
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

    /// The same memory from element `at` on.
    pub fn subbuffer(&mut self, of: Buf, at: impl Into<Index>) -> Buf {
        Buf { id: self.pointer_to(of, at).id, ..of }
    }

    /// A barrier of the block: other threads may then load what threads have stored.
    pub fn barrier(&mut self) {
        self.line(format_args!("gpu.barrier"));
    }

    /// Loads four neighbouring elements by one 16-byte load; `at` must be a multiple of four.
    pub fn load_vec4(&mut self, from: Buf, at: impl Into<Index>) -> [Val; 4] {
        let four = self.vec4(from, at);
        self.unpack_vec4(four)
    }

    /// The same if the condition holds, else zeros.
    pub fn load_vec4_if(&mut self, condition: Val, from: Buf, at: impl Into<Index>) -> [Val; 4] {
        let at = self.eval(at);
        let ty = from.scalar().times(4);
        let zeros = if ty.float() { self.float(0.0, ty) } else { self.int(0, ty) };
        let four = self.if_else_one(condition, zeros, |k| k.vec4(from, at));
        self.unpack_vec4(four)
    }

    /// Starts an asynchronous copy (`cp.async`) of four neighbouring words to shared memory, or of zeros unless the
    /// condition holds; both indices must be multiples of four. The copy is complete after
    /// [`Kernel::wait_for_copies_but`], and visible to other threads after a barrier. It exists from sm_80 on.
    pub fn copy_vec4_async_if(
        &mut self,
        condition: Val,
        (from, at): (Buf, impl Into<Index>),
        (to, place): (Buf, impl Into<Index>),
    ) {
        let (source, target) = (self.pointer_to(from, at), self.pointer_to(to, place));
        let (all, none) = (self.int(16, super::I32), self.int(0, super::I32));
        let bytes = self.select(condition, all, none);
        self.line(format_args!(
            "llvm.call_intrinsic \"llvm.nvvm.cp.async.cg.shared.global.16.s\"({target}, {source}, {bytes}) : ({}, {}, i32) -> ()",
            to.pointer(),
            from.pointer()
        ));
    }

    /// Makes the thread's copies since the last call a group.
    pub fn commit_copies(&mut self) {
        self.line(format_args!("llvm.call_intrinsic \"llvm.nvvm.cp.async.commit.group\"() : () -> ()"));
    }

    /// Waits until all of the thread's groups of copies are complete, except the last `groups`.
    pub fn wait_for_copies_but(&mut self, groups: u64) {
        let groups = self.int(groups as i64, super::I32);
        self.line(format_args!("llvm.call_intrinsic \"llvm.nvvm.cp.async.wait.group\"({groups}) : (i32) -> ()"));
    }

    /// Stores four neighbouring elements by one 16-byte store; `at` must be a multiple of four.
    pub fn store_vec4(&mut self, four: [Val; 4], to: Buf, at: impl Into<Index>) {
        self.mark_written(to);
        let place = self.pointer_to(to, at);
        let ty = four[0].ty.times(4);
        let mut vector = self.emit(ty, format_args!("llvm.mlir.poison : {ty}"));
        for (i, x) in four.into_iter().enumerate() {
            let i = self.int(i as i64, super::I32);
            vector = self.emit(ty, format_args!("llvm.insertelement {x}, {vector}[{i} : i32] : {ty}"));
        }
        self.line(format_args!("llvm.store {vector}, {place} {{alignment = 16 : i64}} : {ty}, {}", to.pointer()));
    }

    fn vec4(&mut self, from: Buf, at: impl Into<Index>) -> Val {
        let place = self.pointer_to(from, at);
        let ty = from.scalar().times(4);
        self.emit(ty, format_args!("llvm.load {place} {{alignment = 16 : i64}} : {} -> {ty}", from.pointer()))
    }

    fn unpack_vec4(&mut self, four: Val) -> [Val; 4] {
        let (ty, scalar) = (four.ty, super::Ty { lanes: None, ..four.ty });
        [0, 1, 2, 3].map(|i| {
            let i = self.int(i, super::I32);
            self.emit(scalar, format_args!("llvm.extractelement {four}[{i} : i32] : {ty}"))
        })
    }
}
