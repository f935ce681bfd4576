//! A PTX interpreter, so that GPU kernels can be tested on machines without a GPU.
//!
//! [`Module::parse`] reads PTX text as LLVM's NVPTX back end writes it for sm_70 to sm_90. [`Gpu::launch`] executes a
//! kernel and returns a [`Report`] of what it did, or the [`Fault`] of the first thread that did something wrong.
//!
//! **Execution.** Thread blocks run one after the other, the warps of a block from barrier to barrier, the 32 lanes of
//! a warp in lockstep. Lanes that diverge at a branch reconverge at its immediate post-dominator. The module, the
//! arguments and [`Options::seed`] determine every result.
//!
//! **Checks** beyond those of hardware:
//! - every access against its buffer or variable, not only against its state space (local memory is checked against the
//!   declarations of the functions on the call stack), and its alignment. A shared variable is placed at an address
//!   with exactly the alignment that it declares;
//! - reads of memory that nothing has written. A register that nothing has written holds garbage;
//! - data races: within a block in shared and global memory, and between the blocks of a launch in global memory
//!   (`race.rs`);
//! - `.sync` and `.aligned` instructions that not all their lanes reach together, barriers that not all warps reach,
//!   and `.uni` branches that diverge. All lanes of a warp must reach a barrier at once, also where `.aligned` is
//!   missing;
//! - `cp.async` data that is accessed before it is waited for, and `ld.global.nc` of data that the launch writes;
//! - floating-point atomics, which are refused because the last bit of their sums depends on scheduling;
//! - instructions that the module's target lacks, and registers of the wrong width, as `ptxas` checks them.
//!
//! **Random choices.** Where PTX leaves a choice the seed decides, so that no test can rely on one outcome: the errors
//! of approximate functions and tensor cores within the documented bounds (`approx.rs`), and the layout of `wmma`
//! fragments in registers (`matrix.rs`).
//!
//! **Not modelled**: time; caches; the reordering of memory accesses that fences forbid (the race check covers it);
//! independent progress of diverged lanes, so that a spin lock within a warp never ends and runs into
//! [`Options::steps`]; barriers of some of the warps; clusters, `mbarrier`, TMA, `wgmma`; textures; indirect calls and
//! functions of other modules; rounding modes other than to nearest for division and square root. Bank conflicts of
//! `wmma` accesses are estimated, since it is unspecified which lane loads what. What is not modelled is refused when
//! the module is parsed, with line and name; nothing is skipped silently.

mod approx;
mod arithmetic;
mod decode;
mod error;
mod flow;
mod launch;
mod lex;
mod matrix;
mod memory;
mod number;
mod opcode;
mod parse;
mod program;
mod race;
mod report;
mod tensor;
mod types;
mod warp;

pub use error::{ConflictingAccess, Error, Fault, FaultKind, Result};
pub use launch::{Arg, Extent, Gpu, Options, Ptr};
pub use program::Module;
pub use report::{Count, Kind, Report, Traffic};
pub use types::Space;
