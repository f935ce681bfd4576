//! A decoded module, ready to execute: names are resolved to addresses and registers, opcodes to actions.

use std::sync::Arc;

use crate::approx::Function as Approximate;
use crate::arithmetic::{Compare, Lanes, Map};
use crate::matrix::{Fragment, Shape};
use crate::report::Kind;
use crate::types::{Float, Space};

/// A parsed PTX module. Parsing refuses instructions that are not modelled, whether they are executed or not.
pub struct Module {
    pub(crate) lines: Vec<String>,
    pub(crate) target: u32,
    pub(crate) functions: Vec<Function>,
    /// Shared variables, with gaps between them, so that an access beyond the end of one is out of bounds.
    pub(crate) shared: Vec<SharedVariable>,
    /// `.global` variables: a buffer number that is unique among all modules, and the initial content.
    pub(crate) globals: Vec<(u64, Vec<u8>)>,
    pub(crate) constants: Vec<u8>,
}

pub(crate) struct Function {
    pub name: String,
    pub entry: bool,
    pub code: Vec<Instruction>,
    /// Width in bits of each register of a thread.
    pub registers: Vec<u32>,
    /// Offset and size of each parameter of a kernel.
    pub params: Vec<Slot>,
    pub param_bytes: usize,
    /// Bytes of call parameters, including the function's own: private to each thread.
    pub frame_bytes: usize,
    pub local_bytes: usize,
    /// Indices of the shared variables that this function and its callees name.
    pub shared: Vec<usize>,
    pub callees: Vec<usize>,
    pub max_threads: Option<u32>,
    pub block: Option<[u32; 3]>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub offset: usize,
    pub bytes: usize,
}

pub(crate) struct SharedVariable {
    pub address: u64,
    pub align: u64,
    /// `None` if the launch determines the size.
    pub bytes: Option<usize>,
}

pub(crate) struct Instruction {
    /// A predicate register, and whether it must be false.
    pub guard: Option<(u32, bool)>,
    pub line: u32,
    pub kind: Kind,
    pub action: Action,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Operand {
    Register(u32),
    /// A negated predicate.
    Not(u32),
    Constant(u64),
    Special(Special),
    /// The address of a variable in the frame's part of local memory.
    Local(u64),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Special {
    Thread(usize),
    BlockSize(usize),
    Block(usize),
    GridSize(usize),
    Lane,
    Warp,
    Warps,
    /// Masks of the lanes below, up to, at, from or above one's own: `%lanemask_lt`, `_le`, `_eq`, `_ge`, `_gt`.
    LanesBelow,
    LanesUpTo,
    LaneBit,
    LanesFrom,
    LanesAbove,
    Clock,
    SharedSize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub base: Operand,
    pub offset: i64,
}

/// The memory that an instruction accesses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum AddressSpace {
    Space(Space),
    /// Call parameters.
    Frame,
}

pub(crate) enum Action {
    /// A register computed from up to three operands.
    Map {
        map: Map,
        result: u32,
        operands: Vec<Operand>,
    },
    /// An approximate function; `flush` replaces subnormal numbers by zero.
    Approximate {
        function: Approximate,
        float: Float,
        pair: bool,
        flush: bool,
        result: u32,
        operands: [Operand; 2],
    },
    /// Packs parts of `bits` bits into one register.
    Pack {
        result: u32,
        parts: Vec<Operand>,
        bits: u32,
    },
    /// Splits a register into parts of `bits` bits.
    Unpack {
        results: Vec<Option<u32>>,
        whole: Operand,
        bits: u32,
    },
    Compare(Box<Comparing>),
    Load(Load),
    Store {
        space: AddressSpace,
        address: Address,
        bytes: usize,
        values: Vec<Operand>,
    },
    Atomic(Box<Atomic>),
    /// `cp.async`: reads `filled` bytes (all, if `None`) and fills the rest with zeros.
    CopyAsync {
        bytes: usize,
        to: Address,
        from: Address,
        filled: Option<Operand>,
    },
    CommitCopies,
    /// Waits until at most this many groups are pending; `None`: for all copies, committed or not.
    AwaitCopies(Option<usize>),
    /// A branch; `uniform` forbids divergence.
    Branch {
        target: u32,
        reconvergence: u32,
        uniform: bool,
    },
    /// A branch to one of several targets (`brx.idx`).
    BranchTable {
        targets: Arc<[u32]>,
        index: Operand,
        reconvergence: u32,
        uniform: bool,
    },
    Call {
        function: usize,
        arguments: Vec<ParamCopy>,
        results: Vec<ParamCopy>,
    },
    Return,
    Exit,
    Trap,
    /// A barrier of the thread block.
    Barrier {
        id: Operand,
        threads: Option<Operand>,
    },
    /// `bar.warp.sync`.
    WarpBarrier {
        members: Operand,
    },
    Shuffle(Box<Shuffle>),
    Vote {
        vote: Vote,
        result: u32,
        operand: Operand,
        members: Operand,
    },
    /// `redux.sync`.
    Reduce {
        function: Combine,
        result: u32,
        operand: Operand,
        members: Operand,
    },
    ActiveMask {
        result: u32,
    },
    LoadMatrix(Box<MatrixAccess>),
    StoreMatrix(Box<MatrixAccess>),
    Multiply(Box<Multiply>),
    /// `ldmatrix`: loads 8×8 matrices of 16-bit elements; each lane holds the address of a row.
    LoadTiles {
        results: Vec<u32>,
        address: Address,
        transposed: bool,
    },
    Nothing,
}

pub(crate) struct Comparing {
    pub compare: Compare,
    /// For packed pairs: the second result is that of the second elements.
    pub pair: bool,
    pub combine: Option<(Logic, Operand)>,
    pub results: [Option<u32>; 2],
    pub operands: [Operand; 2],
}

#[derive(Clone, Copy)]
pub(crate) enum Logic {
    And,
    Or,
    Xor,
}

pub(crate) struct Load {
    pub space: AddressSpace,
    pub address: Address,
    /// Bytes of one element.
    pub bytes: usize,
    /// Result registers with their widths in bits.
    pub results: Vec<Option<(u32, u32)>>,
    pub signed: bool,
    /// `.nc`: the kernel must not write this memory.
    pub constant: bool,
}

pub(crate) type Combine = Box<dyn Fn(u64, u64) -> u64 + Send + Sync>;

pub(crate) struct Atomic {
    pub space: AddressSpace,
    pub address: Address,
    pub bytes: usize,
    /// Maps the old value and the operands to the new value.
    pub function: Box<dyn Fn(u64, u64, u64) -> u64 + Send + Sync>,
    pub float: bool,
    pub result: Option<u32>,
    pub operands: [Operand; 2],
}

/// The copy of one argument or result of a call, from an offset in one frame to an offset in another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ParamCopy {
    pub from: usize,
    pub to: usize,
    pub bytes: usize,
}

pub(crate) struct Shuffle {
    pub mode: ShuffleMode,
    pub result: Option<u32>,
    /// Receives whether the source lane was in range.
    pub in_range: Option<u32>,
    pub operand: Operand,
    pub lane: Operand,
    pub clamp: Operand,
    pub members: Operand,
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Clone, Copy)]
pub(crate) enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

/// `wmma.load` and `wmma.store`.
pub(crate) struct MatrixAccess {
    pub fragment: Fragment,
    pub column_major: bool,
    pub space: Space,
    pub address: Address,
    /// Distance between rows (or columns), in elements.
    pub stride: Option<Operand>,
    pub registers: Vec<Operand>,
}

pub(crate) struct Multiply {
    pub shape: Shape,
    /// Fragments of `wmma` are opaque, those of `mma` have the documented layout.
    pub a: (Fragment, Vec<Operand>),
    pub b: (Fragment, Vec<Operand>),
    pub c: (Fragment, Vec<Operand>),
    pub d: (Fragment, Vec<u32>),
}

impl Module {
    /// Names of the kernels, in the order of the text.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.functions.iter().filter(|function| function.entry).map(|function| function.name.as_str())
    }

    /// The number in `.target sm_70`.
    pub fn target(&self) -> u32 {
        self.target
    }

    /// Bytes of shared memory that a kernel declares, without the dynamic part.
    pub fn shared_bytes(&self, kernel: &str) -> Option<usize> {
        let kernel = self.functions.iter().find(|function| function.entry && function.name == kernel)?;
        Some(self.declared_shared(kernel))
    }

    /// Threads of a block along each axis, if the kernel requires one size (`.reqntid`).
    pub fn block(&self, kernel: &str) -> Option<[u32; 3]> {
        self.functions.iter().find(|function| function.entry && function.name == kernel)?.block
    }

    /// Bytes of each parameter of a kernel.
    pub fn parameters(&self, kernel: &str) -> Option<Vec<usize>> {
        let kernel = self.functions.iter().find(|function| function.entry && function.name == kernel)?;
        Some(kernel.params.iter().map(|slot| slot.bytes).collect())
    }

    pub(crate) fn declared_shared(&self, function: &Function) -> usize {
        function.shared.iter().fold(0, |end, &v| {
            let variable = &self.shared[v];
            end.next_multiple_of(variable.align as usize) + variable.bytes.unwrap_or(0)
        })
    }

    pub(crate) fn text(&self, line: usize) -> String {
        self.lines.get(line.wrapping_sub(1)).cloned().unwrap_or_default()
    }
}

/// The same value in all lanes.
pub(crate) fn splat(value: u64) -> Lanes {
    [value; 32]
}
