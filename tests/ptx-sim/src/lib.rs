//! An interpreter of PTX, so that kernels can be tested where there is no GPU.
//!
//! [`Module::parse`] takes PTX text as LLVM's NVPTX back end writes it for sm_70 to sm_90; [`Gpu::launch`] executes a
//! kernel and gives a [`Report`] of what it did, or the [`Fault`] of the first thread that did wrong.
//!
//! **Execution.** Blocks run one after the other, the warps of a block from barrier to barrier, the 32 lanes of a warp
//! in lockstep. Lanes that branch apart come together at the branch's immediate post-dominator. Everything is
//! determined by the module, the arguments and [`Options::seed`].
//!
//! **Checked**, beyond what hardware does:
//! - every access against its buffer or variable, not merely the space (of local memory, against what the functions at
//!   hand declare), and its alignment. A shared variable lies at an address with just the alignment it declares;
//! - reads of what nothing has written. A register that nothing has written holds garbage;
//! - races: within a block, in shared and global memory; across the blocks of a launch, in global memory (`race.rs`);
//! - `.sync` and `.aligned` instructions that not all their lanes reach together, barriers that not all warps reach,
//!   `.uni` branches that part. Barriers must be reached by all lanes of a warp at once, also where `.aligned` is
//!   missing;
//! - `cp.async` data touched before it is waited for; `ld.global.nc` of what the launch writes;
//! - floating-point atomics, which are refused: their sums have no determined last bit;
//! - instructions that the module's target lacks, and register widths that do not fit, as `ptxas` would.
//!
//! **Chosen freely where PTX leaves it open**, by the seed, so that no test can lean on it: the errors of approximate
//! functions and tensor cores within what is documented (`approx.rs`), and how `wmma` fragments lie in registers
//! (`matrix.rs`).
//!
//! **Not modelled**: time, caches, and the reordering of memory accesses that fences forbid (the race check stands in
//! for it); independent progress of lanes that have parted, so a spin lock within a warp never ends and runs into
//! [`Options::steps`]; barriers of some of the warps; clusters, `mbarrier`, TMA, `wgmma`; textures; indirect calls and
//! functions of other modules; rounding modes other than to nearest for division and square root. Bank conflicts of
//! `wmma` accesses are an estimate, since who loads what is not known. What is not modelled is refused when the module
//! is parsed, by line and name; nothing is skipped.

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

pub use error::{Error, Fault, FaultKind, Other, Result};
pub use launch::{Arg, Extent, Gpu, Options, Ptr};
pub use program::Module;
pub use report::{Count, Kind, Report, Traffic};
pub use types::Space;
