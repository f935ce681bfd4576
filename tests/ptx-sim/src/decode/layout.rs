//! Assigns addresses to variables and parameters.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::GLOBAL_STRIDE;
use crate::parse::{self, Variable};
use crate::program::{SharedVariable, Slot};
use crate::types::Space;

/// Buffer numbers of module variables start here; those of buffers that tests allocate are smaller.
static NEXT_GLOBAL: AtomicU64 = AtomicU64::new(1 << 20);

/// Bytes of the gap between shared variables.
const GUARD: u64 = 128;

#[derive(Default)]
pub struct Layout {
    pub shared: Vec<SharedVariable>,
    /// The end of the last variable in each of the first two areas of shared memory.
    ends: [u64; 2],
    pub globals: Vec<(u64, Vec<u8>)>,
    pub constants: Vec<u8>,
    /// Alignment of the `.extern` arrays, 0 before the first.
    dynamic_align: u64,
}

/// Base addresses of the three areas of shared memory: for variables of the module and of functions; for those of a
/// kernel, reused by each kernel; for `.extern` arrays, which all start at the same address. An access beyond the end
/// of a variable therefore never hits another one, and the memory of one kernel stays compact.
const AREAS: [u64; 3] = [0, 1 << 17, 1 << 18];
pub const COMMON: usize = 0;
pub const OF_KERNEL: usize = 1;
const DYNAMIC: u64 = AREAS[2];

impl Layout {
    /// Kernels never run at the same time, so their shared variables may have the same addresses.
    pub fn begin_kernel(&mut self) {
        self.ends[OF_KERNEL] = 0;
    }

    pub fn place(&mut self, variable: &Variable, area: usize) -> std::result::Result<Symbol, &'static str> {
        let align = variable.align.max(1);
        match (variable.space, variable.bytes) {
            (Space::Shared, Some(bytes)) => {
                let address = exactly_aligned(self.ends[area].max(AREAS[area]) + GUARD, align);
                let end = address.saturating_add(bytes as u64);
                if end > AREAS[area + 1] - GUARD {
                    return Err("more shared memory than there is");
                }
                self.ends[area] = end;
                self.shared.push(SharedVariable { address, align, bytes: Some(bytes) });
                Ok(Symbol::Shared(self.shared.len() - 1, address))
            }
            (Space::Shared, None) => {
                if self.dynamic_align != 0 && self.dynamic_align != align {
                    return Err("dynamic shared arrays of different alignments are not modelled");
                }
                self.dynamic_align = align;
                let address = exactly_aligned(DYNAMIC, align);
                self.shared.push(SharedVariable { address, align, bytes: None });
                Ok(Symbol::Shared(self.shared.len() - 1, address))
            }
            (Space::Global, Some(bytes)) => {
                let number = NEXT_GLOBAL.fetch_add(1, Ordering::Relaxed);
                let mut content = variable.content.clone().unwrap_or_default();
                content.resize(bytes, 0);
                self.globals.push((number, content));
                Ok(Symbol::Constant(number * GLOBAL_STRIDE))
            }
            (Space::Const, Some(bytes)) => {
                let start = self.constants.len().next_multiple_of(align as usize);
                self.constants.resize(start, 0);
                self.constants.extend(variable.content.clone().unwrap_or_default());
                self.constants.resize(start + bytes, 0);
                Ok(Symbol::Constant(start as u64))
            }
            _ => Err("a variable in a state space that has none here"),
        }
    }
}

/// The next address from `at` on with exactly the declared alignment, so that an access that needs more is detected.
fn exactly_aligned(at: u64, align: u64) -> u64 {
    at.next_multiple_of(2 * align) + align
}

/// The number of a function and the offsets of its results and parameters.
pub struct Signature {
    pub index: usize,
    pub entry: bool,
    pub results: Vec<Slot>,
    pub params: Vec<Slot>,
    /// Bytes of results and parameters in the frame (for a kernel, of its parameters).
    pub bytes: usize,
}

impl Signature {
    pub fn new(index: usize, function: &parse::Function) -> Signature {
        let mut bytes = 0;
        let mut place = |variable: &Variable| {
            let offset = bytes_aligned(bytes, variable.align);
            let size = variable.bytes.unwrap_or(0);
            bytes = offset + size;
            Slot { offset, bytes: size }
        };
        let results = function.results.iter().map(&mut place).collect();
        let params = function.params.iter().map(&mut place).collect();
        Signature { index, entry: function.entry, results, params, bytes }
    }
}

pub fn bytes_aligned(bytes: usize, align: u64) -> usize {
    bytes.next_multiple_of(align.max(1) as usize)
}

/// What a name refers to.
#[derive(Clone, Copy, Debug)]
pub enum Symbol {
    Register {
        slot: u32,
        bits: u32,
    },
    /// Index and address of a variable.
    Shared(usize, u64),
    /// An address in the state space of the variable.
    Constant(u64),
    Local(u64),
    KernelParam(Slot),
    FrameParam(Slot),
}
