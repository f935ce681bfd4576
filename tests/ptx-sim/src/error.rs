//! Errors of modules, launches and kernels. A fault of a kernel names its thread and its line.

use std::fmt;

use crate::types::Space;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Clone, Debug, PartialEq)]
pub enum Error {
    /// The text is not PTX or is inconsistent, such as an unknown name or a register of the wrong width.
    Parse { line: usize, text: String, message: String },
    /// An instruction or a modifier is not modelled.
    Unknown { line: usize, text: String, message: String },
    /// The module's `.target` lacks an instruction; `needs` is the first `sm_` version that has it.
    Target { line: usize, text: String, needs: u32 },
    /// The launch is invalid: its grid, its arguments, or too much shared memory.
    Launch { kernel: String, message: String },
    /// A thread did something wrong.
    Fault(Box<Fault>),
}

/// A fault of a thread; if several threads of a warp fault at once, of the lowest.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    pub kernel: String,
    pub block: [u32; 3],
    pub thread: [u32; 3],
    /// Line number in the PTX text, from 1, and the text of that line.
    pub line: usize,
    pub text: String,
    pub kind: FaultKind,
}

#[derive(Clone, Debug, PartialEq)]
pub enum FaultKind {
    /// An access that is not within one buffer or variable.
    OutOfBounds {
        space: Space,
        address: u64,
        bytes: usize,
    },
    Misaligned {
        space: Space,
        address: u64,
        align: u64,
    },
    /// A read of a byte that nothing has written.
    Uninitialised {
        space: Space,
        address: u64,
    },
    /// A data race: an access of another thread to the same byte is not ordered with this one; `line` is the line of
    /// that access.
    Race {
        space: Space,
        address: u64,
        line: usize,
        other: ConflictingAccess,
    },
    /// An access to the destination of a `cp.async` that has not been waited for.
    PendingCopy {
        address: u64,
    },
    /// A write to constant memory or to kernel parameters.
    ReadOnly {
        space: Space,
        address: u64,
    },
    /// An `ld.global.nc` of a byte that the same launch writes.
    NotConstant {
        address: u64,
    },
    /// Not all threads of a warp reach a barrier or an `.aligned` instruction together; `missing` is a mask of lanes.
    Divergent {
        missing: u32,
    },
    /// Warps of one block wait at different barriers.
    Deadlock,
    /// The mask of a `.sync` instruction names lanes that are not active, or lacks the executing lane.
    Membership {
        mask: u32,
        active: u32,
    },
    /// A shuffle reads a lane that does not take part in it.
    AbsentLane {
        lane: u32,
    },
    /// A `.uni` branch diverges, or an operand that must be uniform differs between lanes.
    NotUniform,
    /// The elements of a fragment are not where `wmma` put them.
    Fragment,
    /// A floating-point atomic, whose result depends on scheduling.
    FloatAtomic,
    /// The launch executed more instructions than allowed.
    Steps {
        limit: u64,
    },
    CallDepth,
    Trap,
    /// A case of a known instruction that is not modelled.
    Unmodelled(&'static str),
}

/// The earlier access of a data race.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConflictingAccess {
    ReadInBlock,
    WriteInBlock,
    ReadInAnotherBlock,
    WriteInAnotherBlock,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Parse { line, text, message } => write!(f, "line {line}: {message}\n  {text}"),
            Error::Unknown { line, text, message } => write!(f, "line {line}: not modelled: {message}\n  {text}"),
            Error::Target { line, text, needs } => write!(f, "line {line}: needs sm_{needs}\n  {text}"),
            Error::Launch { kernel, message } => write!(f, "launch of `{kernel}`: {message}"),
            Error::Fault(fault) => fault.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fault { kernel, block, thread, line, text, kind } = self;
        write!(f, "`{kernel}`, block {block:?}, thread {thread:?}, line {line}: {kind}\n  {text}")
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FaultKind::OutOfBounds { space, address, bytes } => {
                write!(f, "{bytes} bytes at {address:#x} of {space} memory are out of bounds")
            }
            FaultKind::Misaligned { space, address, align } => {
                write!(f, "{address:#x} of {space} memory is no multiple of {align}")
            }
            FaultKind::Uninitialised { space, address } => {
                write!(f, "reads {address:#x} of {space} memory, which nothing has written")
            }
            FaultKind::Race { space, address, line, other } => {
                let other = match other {
                    ConflictingAccess::ReadInBlock => "another thread's read",
                    ConflictingAccess::WriteInBlock => "another thread's write",
                    ConflictingAccess::ReadInAnotherBlock => "another block's read",
                    ConflictingAccess::WriteInAnotherBlock => "another block's write",
                };
                write!(f, "races at {address:#x} of {space} memory with {other} in line {line}")
            }
            FaultKind::PendingCopy { address } => {
                write!(f, "touches {address:#x} of shared memory, where a cp.async has not been waited for")
            }
            FaultKind::ReadOnly { space, address } => write!(f, "writes {address:#x} of {space} memory"),
            FaultKind::NotConstant { address } => {
                write!(f, "{address:#x} is read by ld.global.nc and written in the same launch")
            }
            FaultKind::Divergent { missing } => write!(f, "the warp is not together; missing lanes {missing:#010x}"),
            FaultKind::Deadlock => f.write_str("other warps of the block wait at another barrier"),
            FaultKind::Membership { mask, active } => {
                write!(f, "the mask {mask:#010x} does not fit the lanes that are here, {active:#010x}")
            }
            FaultKind::AbsentLane { lane } => write!(f, "reads lane {lane}, which takes no part"),
            FaultKind::NotUniform => f.write_str("differs from lane to lane"),
            FaultKind::Fragment => f.write_str("the fragment is not as wmma left it"),
            FaultKind::FloatAtomic => f.write_str("a floating-point atomic has no determined result"),
            FaultKind::Steps { limit } => write!(f, "more than {limit} instructions"),
            FaultKind::CallDepth => f.write_str("calls are nested too deeply"),
            FaultKind::Trap => f.write_str("trap"),
            FaultKind::Unmodelled(what) => write!(f, "not modelled: {what}"),
        }
    }
}
