//! Statistics of a launch: instructions by kind, memory traffic, bank conflicts.

use std::collections::BTreeMap;
use std::ops::AddAssign;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Move,
    Integer,
    /// Operations on f32 and f64, except fused multiply-adds.
    Float,
    /// Fused multiply-adds of f32 and f64.
    Fma,
    /// Operations on f16 and bf16, except fused multiply-adds.
    Half,
    HalfFma,
    /// Approximate functions such as `ex2.approx`.
    Approximate,
    Convert,
    Compare,
    Load,
    Store,
    Atomic,
    /// `cp.async`.
    CopyAsync,
    Shuffle,
    Barrier,
    Branch,
    /// `wmma.mma` and `mma`.
    Matrix,
    /// `wmma.load`, `wmma.store` and `ldmatrix`.
    MatrixMove,
    Other,
}

/// The number of times that instructions were executed: by warps, and by active lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub warps: u64,
    pub lanes: u64,
}

/// Traffic of global memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes that the lanes access.
    pub bytes: u64,
    /// Bytes that are accessed at least once.
    pub unique: u64,
    /// Bytes of the 32-byte sectors that each instruction of a warp touches: the traffic without caches.
    pub sectors: u64,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    pub blocks: u64,
    pub instructions: BTreeMap<Kind, Count>,
    pub read: Traffic,
    pub written: Traffic,
    /// Bytes of shared memory that lanes read and write.
    pub shared_read: u64,
    pub shared_written: u64,
    /// Shared memory of a block in bytes, declared and dynamic.
    pub shared_bytes: u64,
    /// Multiplications and additions on tensor cores.
    pub matrix_flops: u64,
    /// The worst bank conflict of each line of the PTX text: how many words of one bank are accessed at once. Lines
    /// without conflicts are absent.
    pub conflicts: BTreeMap<usize, u32>,
}

impl Report {
    pub fn count(&self, kind: Kind) -> Count {
        self.instructions.get(&kind).copied().unwrap_or_default()
    }

    /// The worst bank conflict of the launch; 1 if there is none.
    pub fn worst_conflict(&self) -> u32 {
        self.conflicts.values().copied().max().unwrap_or(1)
    }

    /// The number of instructions executed by warps.
    pub fn steps(&self) -> u64 {
        self.instructions.values().map(|count| count.warps).sum()
    }
}

/// Adds up launches of one module: `unique` is the sum over launches, `shared_bytes` the maximum.
impl AddAssign<&Report> for Report {
    fn add_assign(&mut self, other: &Report) {
        self.blocks += other.blocks;
        for (&kind, count) in &other.instructions {
            let sum = self.instructions.entry(kind).or_default();
            sum.warps += count.warps;
            sum.lanes += count.lanes;
        }
        for (sum, traffic) in [(&mut self.read, other.read), (&mut self.written, other.written)] {
            sum.bytes += traffic.bytes;
            sum.unique += traffic.unique;
            sum.sectors += traffic.sectors;
        }
        self.shared_read += other.shared_read;
        self.shared_written += other.shared_written;
        self.shared_bytes = self.shared_bytes.max(other.shared_bytes);
        self.matrix_flops += other.matrix_flops;
        for (&line, &degree) in &other.conflicts {
            let worst = self.conflicts.entry(line).or_default();
            *worst = degree.max(*worst);
        }
    }
}
