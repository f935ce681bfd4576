//! A module ready to execute: names are resolved to places, opcodes to actions.

use std::sync::Arc;

use crate::approx::Function as Approximate;
use crate::arithmetic::{Compare, Lanes, Map};
use crate::matrix::{Fragment, Shape};
use crate::report::Kind;
use crate::types::{Float, Space};

/// Parsed PTX. Parsing is where an instruction that is not modelled is refused, executed or not.
pub struct Module {
    pub(crate) lines: Vec<String>,
    pub(crate) target: u32,
    pub(crate) functions: Vec<Function>,
    /// Shared variables, with room between them, so that no overrun falls into the next.
    pub(crate) shared: Vec<SharedVariable>,
    /// `.global` variables: the number of their buffer, which no other module's has, and their content.
    pub(crate) globals: Vec<(u64, Vec<u8>)>,
    pub(crate) constants: Vec<u8>,
}

pub(crate) struct Function {
    pub name: String,
    pub entry: bool,
    pub code: Vec<Step>,
    /// The width of each register of a thread.
    pub registers: Vec<u32>,
    /// Where each parameter of a kernel lies.
    pub params: Vec<Slot>,
    pub param_bytes: usize,
    /// Parameters of calls, and of a function itself: private to each thread.
    pub frame_bytes: usize,
    pub local_bytes: usize,
    /// Which shared variables it and its callees name.
    pub shared: Vec<usize>,
    pub callees: Vec<usize>,
    pub most_threads: Option<u32>,
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
    /// `None`: as large as the launch says.
    pub bytes: Option<usize>,
}

pub(crate) struct Step {
    /// A predicate, and whether it must be false.
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
    /// Lanes below, at or above one's own: `%lanemask_lt`, `_le`, `_eq`, `_ge`, `_gt`.
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

/// What a memory instruction reaches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Place {
    Space(Space),
    /// Parameters of calls.
    Frame,
}

pub(crate) enum Action {
    Map {
        map: Map,
        result: u32,
        operands: Vec<Operand>,
    },
    Approximate {
        function: Approximate,
        float: Float,
        pair: bool,
        flush: bool,
        result: u32,
        operands: [Operand; 2],
    },
    Pack {
        result: u32,
        parts: Vec<Operand>,
        bits: u32,
    },
    Unpack {
        results: Vec<Option<u32>>,
        whole: Operand,
        bits: u32,
    },
    Compare(Box<Comparing>),
    Load(Load),
    Store {
        place: Place,
        address: Address,
        bytes: usize,
        values: Vec<Operand>,
    },
    Atomic(Box<Atomic>),
    CopyAsync {
        bytes: usize,
        to: Address,
        from: Address,
        filled: Option<Operand>,
    },
    CommitCopies,
    /// All but so many groups; `None`: everything, committed or not.
    AwaitCopies(Option<usize>),
    Branch {
        target: u32,
        meet: u32,
        uniform: bool,
    },
    BranchTable {
        targets: Arc<[u32]>,
        index: Operand,
        meet: u32,
        uniform: bool,
    },
    Call {
        function: usize,
        arguments: Vec<Pass>,
        results: Vec<Pass>,
    },
    Return,
    Exit,
    Trap,
    Barrier {
        id: Operand,
        threads: Option<Operand>,
    },
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
    /// `ldmatrix`: 8×8 matrices of 16 bits, a row's address in each lane.
    LoadTiles {
        results: Vec<u32>,
        address: Address,
        transposed: bool,
    },
    Nothing,
}

pub(crate) struct Comparing {
    pub compare: Compare,
    /// Of two halves, the second has the second result.
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
    pub place: Place,
    pub address: Address,
    /// Of one element.
    pub bytes: usize,
    /// Each with its width.
    pub results: Vec<Option<(u32, u32)>>,
    pub signed: bool,
    /// `.nc`: nothing writes there while the kernel runs.
    pub constant: bool,
}

pub(crate) type Combine = Box<dyn Fn(u64, u64) -> u64 + Send + Sync>;

pub(crate) struct Atomic {
    pub place: Place,
    pub address: Address,
    pub bytes: usize,
    /// Old value and operands to the new value.
    pub function: Box<dyn Fn(u64, u64, u64) -> u64 + Send + Sync>,
    pub float: bool,
    pub result: Option<u32>,
    pub operands: [Operand; 2],
}

/// One argument or result of a call: from a place in one frame to one in the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass {
    pub from: usize,
    pub to: usize,
    pub bytes: usize,
}

pub(crate) struct Shuffle {
    pub mode: ShuffleMode,
    pub result: Option<u32>,
    /// Whether the source lane was in range.
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
    /// From row to row (or column to column), in elements.
    pub stride: Option<Operand>,
    pub registers: Vec<Operand>,
}

pub(crate) struct Multiply {
    pub shape: Shape,
    /// Of `wmma`, opaque; of `mma`, as documented.
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

    /// Bytes of shared memory that a kernel declares, without what a launch adds.
    pub fn shared_bytes(&self, kernel: &str) -> Option<usize> {
        let kernel = self.functions.iter().find(|function| function.entry && function.name == kernel)?;
        Some(self.declared_shared(kernel))
    }

    /// Threads of a block along each axis, if the kernel is for one size of block alone.
    pub fn block(&self, kernel: &str) -> Option<[u32; 3]> {
        self.functions.iter().find(|function| function.entry && function.name == kernel)?.block
    }

    /// Bytes of each of a kernel's parameters.
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

/// All lanes the same.
pub(crate) fn splat(value: u64) -> Lanes {
    [value; 32]
}
