//! What the threads of a block do together, on a GPU: they share memory, and wait for each other.

use std::fmt::Write;

use peft_runtime::artifact::Element;

use super::lanes::Form;
use super::{Buf, INDEX, Kernel, Val};
use crate::cuda::WARPS;

impl Kernel {
    /// The units asked for, a block's threads together on [`WARPS`] of them: who launches kernels counts in warps.
    pub fn block_units(&mut self, body: impl FnOnce(&mut Kernel, Val)) {
        let Form::Warps { units, .. } = self.form else { unreachable!("a processor has no blocks") };
        let warps = self.index(WARPS);
        let units = self.div(units, warps);
        let block = self.emit(INDEX, format_args!("gpu.block_id x"));
        let blocks = self.emit(INDEX, format_args!("gpu.grid_dim x"));
        self.fold_by(block, units, blocks, &[], |k, unit, _| {
            body(k, unit);
            vec![]
        });
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
        let name = format!("{}_shared{}", self.name, self.globals.lines().count());
        let _ = writeln!(
            self.globals,
            "  llvm.mlir.global internal @{name}() {{addr_space = 3 : i32, alignment = 32 : i64}} : !llvm.array<{n} x i32>"
        );
        let pointer = self.fresh(INDEX);
        self.line(format_args!("{pointer} = llvm.mlir.addressof @{name} : !llvm.ptr<3>"));
        Buf { id: pointer.id, element: Element::I32, shared: true }
    }

    /// The same memory from `n` elements on.
    pub fn beyond(&mut self, of: Buf, n: u64) -> Buf {
        let n = self.index(n);
        Buf { id: self.place(of, n).id, ..of }
    }

    /// What the block's threads have written, others of them may read from here on.
    pub fn barrier(&mut self) {
        self.line(format_args!("gpu.barrier"));
    }

    /// Four neighbours, from a multiple of four on.
    pub fn load_four(&mut self, from: Buf, at: Val) -> [Val; 4] {
        let four = self.four(from, at);
        self.apart_four(four)
    }

    /// The same if the condition holds, else zeros.
    pub fn load_four_if(&mut self, condition: Val, from: Buf, at: Val) -> [Val; 4] {
        let ty = from.scalar().times(4);
        let nothing = if ty.float() { self.float(0.0, ty) } else { self.int(0, ty) };
        let four = self.either(condition, nothing, |k| k.four(from, at));
        self.apart_four(four)
    }

    fn four(&mut self, from: Buf, at: Val) -> Val {
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
