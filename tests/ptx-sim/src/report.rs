//! What a launch did: instructions by kind, bytes moved, conflicts.

use std::collections::BTreeMap;
use std::ops::AddAssign;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Move,
    Integer,
    /// f32 and f64, but for fused multiply-adds.
    Float,
    /// Fused multiply-adds of f32 and f64.
    Fma,
    /// f16 and bf16, but for fused multiply-adds.
    Half,
    HalfFma,
    /// `ex2.approx` and the like.
    Approximate,
    Convert,
    Compare,
    Load,
    Store,
    Atomic,
    /// `cp.async`
    CopyAsync,
    Shuffle,
    Barrier,
    Branch,
    /// `wmma.mma` and `mma`
    Matrix,
    /// `wmma.load`, `wmma.store` and `ldmatrix`
    MatrixMove,
    Other,
}

/// Executions of instructions: by warps, and by each active lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub warps: u64,
    pub lanes: u64,
}

/// Bytes of global memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// As lanes asked for them.
    pub bytes: u64,
    /// Counted once, however often touched.
    pub unique: u64,
    /// In whole sectors of 32 bytes, each once for an instruction of a warp: what goes over the bus without caches.
    pub sectors: u64,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    pub blocks: u64,
    pub instructions: BTreeMap<Kind, Count>,
    pub read: Traffic,
    pub written: Traffic,
    /// Bytes of shared memory read and written, as lanes asked for them.
    pub shared_read: u64,
    pub shared_written: u64,
    /// Shared memory of a block: what the kernel declares and what the launch adds.
    pub shared_bytes: u64,
    /// Multiplications and additions on tensor cores.
    pub matrix_flops: u64,
    /// By line of the PTX text, where accesses to shared memory conflict: how many words of one bank the worst wants.
    pub conflicts: BTreeMap<usize, u32>,
}

impl Report {
    pub fn count(&self, kind: Kind) -> Count {
        self.instructions.get(&kind).copied().unwrap_or_default()
    }

    /// 1 where no access to shared memory conflicts.
    pub fn worst_conflict(&self) -> u32 {
        self.conflicts.values().copied().max().unwrap_or(1)
    }

    /// Instructions of warps.
    pub fn steps(&self) -> u64 {
        self.instructions.values().map(|count| count.warps).sum()
    }
}

/// Adds up launches; `unique` stays a sum over them, `shared_bytes` is the largest. Lines are those of one module.
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
