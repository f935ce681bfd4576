//! What can be wrong with a module, a launch or a kernel. A fault of a kernel names its place.

use std::fmt;

use crate::types::Space;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Clone, Debug, PartialEq)]
pub enum Error {
    /// The text is not PTX, or not consistent: an unknown name, a register of the wrong width.
    Parse { line: usize, text: String, message: String },
    /// An instruction or modifier that is not modelled.
    Unknown { line: usize, text: String, message: String },
    /// An instruction that the module's `.target` does not have; `needs` is the first `sm_` that does.
    Target { line: usize, text: String, needs: u32 },
    /// The launch itself is wrong: the grid, the arguments, too much shared memory.
    Launch { kernel: String, message: String },
    /// A thread did what it must not.
    Fault(Box<Fault>),
}

/// A wrong step of one thread, the lowest of those that took it.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    pub kernel: String,
    pub block: [u32; 3],
    pub thread: [u32; 3],
    /// Line of the PTX text, from 1, and what stands there.
    pub line: usize,
    pub text: String,
    pub kind: FaultKind,
}

#[derive(Clone, Debug, PartialEq)]
pub enum FaultKind {
    /// The access is not within one buffer or variable.
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
    /// Another thread touches the byte with nothing to order the two; `line` is where it does.
    Race {
        space: Space,
        address: u64,
        line: usize,
        other: Other,
    },
    /// Touches the target of a `cp.async` that has not been waited for.
    PendingCopy {
        address: u64,
    },
    /// A write to constant memory or to parameters of the kernel.
    ReadOnly {
        space: Space,
        address: u64,
    },
    /// `ld.global.nc` of a byte that the same launch writes.
    NotConstant {
        address: u64,
    },
    /// Not all threads of a warp come to a barrier or `.aligned` instruction together; `missing` is a mask of lanes.
    Divergent {
        missing: u32,
    },
    /// Some warps wait at one barrier, others at another.
    Deadlock,
    /// The mask of a `.sync` instruction names lanes that are not there, or lacks the lane itself.
    Membership {
        mask: u32,
        active: u32,
    },
    /// A shuffle reads a lane that takes no part in it.
    AbsentLane {
        lane: u32,
    },
    /// `bra.uni` and the like, with lanes that go different ways, or an operand that must be one for the warp.
    NotUniform,
    /// A fragment whose elements are not as `wmma` put them.
    Fragment,
    /// A floating-point atomic: its order, so its result, is not determined.
    FloatAtomic,
    /// The launch took more instructions than allowed.
    Steps {
        limit: u64,
    },
    CallDepth,
    Trap,
    /// A case of a known instruction that is not modelled.
    Unmodelled(&'static str),
}

/// The other side of a race.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Other {
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
                    Other::ReadInBlock => "another thread's read",
                    Other::WriteInBlock => "another thread's write",
                    Other::ReadInAnotherBlock => "another block's read",
                    Other::WriteInAnotherBlock => "another block's write",
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
