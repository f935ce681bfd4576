//! What the compiler writes and the runtime reads: a manifest beside a library of kernels.
//!
//! An entry point is a list of kernel launches over buffers whose sizes wait for a batch. Every
//! kernel has one signature, `fn(args: *mut *mut c_void)`: its buffers as memref descriptors, then
//! the entry's sizes it asks for, then the range `begin..end` of its units to compute. Units are
//! independent of each other, so a pool may split them anyhow and the bits stay the same.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use peft_grammar::names::Vector;

/// Version of the format written here; others are refused.
pub const FORMAT: u32 = 4;

/// A size known when a batch arrives.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extent {
    Const(u64),
    Tokens,
    Sequences,
    Targets,
    /// Σ over sequences of length².
    Pairs,
    /// All trainable values.
    Values,
    Add(Box<Extent>, Box<Extent>),
    Mul(Box<Extent>, Box<Extent>),
    CeilDiv(Box<Extent>, u64),
}

/// The sizes of one batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    pub tokens: u64,
    pub sequences: u64,
    pub targets: u64,
    pub pairs: u64,
    pub values: u64,
}

impl Sizes {
    /// The larger of each.
    pub fn max(self, other: Sizes) -> Sizes {
        Sizes {
            tokens: self.tokens.max(other.tokens),
            sequences: self.sequences.max(other.sequences),
            targets: self.targets.max(other.targets),
            pairs: self.pairs.max(other.pairs),
            values: self.values.max(other.values),
        }
    }
}

impl Extent {
    /// Saturates, so that a size no memory could hold fails when it is asked for.
    pub fn eval(&self, sizes: &Sizes) -> u64 {
        match self {
            Extent::Const(n) => *n,
            Extent::Tokens => sizes.tokens,
            Extent::Sequences => sizes.sequences,
            Extent::Targets => sizes.targets,
            Extent::Pairs => sizes.pairs,
            Extent::Values => sizes.values,
            Extent::Add(a, b) => a.eval(sizes).saturating_add(b.eval(sizes)),
            Extent::Mul(a, b) => a.eval(sizes).saturating_mul(b.eval(sizes)),
            Extent::CeilDiv(a, n) => a.eval(sizes).div_ceil((*n).max(1)),
        }
    }
}

impl std::ops::Add for Extent {
    type Output = Extent;
    fn add(self, other: Extent) -> Extent {
        match (self, other) {
            (Extent::Const(a), Extent::Const(b)) => Extent::Const(a + b),
            (Extent::Const(0), x) | (x, Extent::Const(0)) => x,
            (a, b) => Extent::Add(Box::new(a), Box::new(b)),
        }
    }
}

impl std::ops::Mul for Extent {
    type Output = Extent;
    fn mul(self, other: Extent) -> Extent {
        match (self, other) {
            (Extent::Const(a), Extent::Const(b)) => Extent::Const(a * b),
            (Extent::Const(1), x) | (x, Extent::Const(1)) => x,
            (a, b) => Extent::Mul(Box::new(a), Box::new(b)),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Element {
    F32,
    I32,
}

impl Element {
    pub fn bytes(self) -> u64 {
        4
    }
}

/// Where a buffer's content comes from and how long it stays.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// Bound for every run, by its name as an [`Input`](peft_grammar::names::Input): `ids`, `labels`, `rng`; and what the
    /// runtime derives from the sequence lengths: `offsets` i32[sequences+1], `segments` i32[tokens] (which sequence a
    /// token is of), `pairs` i32[tokens+1] (exclusive prefix sum of each token's sequence length), `starts`
    /// i32[sequences].
    Input(String),
    /// Tensor of [`Manifest::tensors`], or rows of it.
    Tensor { index: usize, rows: Option<(u64, u64)> },
    /// The gradient of a trainable tensor (or of its trainable rows): a slice of one flat vector.
    Gradient { index: usize },
    /// One of the optimizer's vectors.
    Flat(Vector),
    /// Filled once by [`Manifest::prepare`] and kept: packed frozen weights.
    Prepared,
    /// Lives from the first launch of an entry that names it to the last (to the end, for outputs).
    Temporary,
}

/// A tensor in memory, row-major. Ragged ones are flat here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Buffer {
    pub element: Element,
    pub shape: Vec<Extent>,
    pub storage: Storage,
}

impl Buffer {
    pub fn elements(&self, sizes: &Sizes) -> u64 {
        self.shape.iter().map(|e| e.eval(sizes)).fold(1, u64::saturating_mul)
    }
}

pub type BufferId = usize;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// Index into [`Manifest::kernels`].
    pub kernel: usize,
    pub buffers: Vec<BufferId>,
    /// Passed as `index` after the buffers.
    pub extents: Vec<Extent>,
    /// How many units there are to split over threads.
    pub units: Extent,
    /// How they are split; a processor's launches do not say.
    #[serde(default, skip_serializing_if = "Workgroup::is_one")]
    pub group: Workgroup,
    /// The operation it computes, for profiles and messages: `peft.matmul`.
    pub op: String,
}

/// Threads that take units together, a GPU's block: a kernel is written for one size, and does not start in another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workgroup {
    /// How many units a workgroup takes at once.
    pub units: u64,
    pub threads: u64,
}

impl Workgroup {
    /// One thread, and a unit at a time: a processor's.
    pub const ONE: Workgroup = Workgroup { units: 1, threads: 1 };

    fn is_one(&self) -> bool {
        *self == Workgroup::ONE
    }
}

impl Default for Workgroup {
    fn default() -> Self {
        Workgroup::ONE
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub launches: Vec<Launch>,
    pub outputs: Vec<Output>,
}

/// A named result of an entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Output {
    pub name: String,
    pub buffer: BufferId,
    /// What the buffer holds, row-major; a ragged result is flat.
    pub shape: Vec<Extent>,
}

/// A weight the artifact wants: canonical name and shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<u64>,
    /// `None`: frozen. `Some((start, end))`: rows that train, all of them for a whole tensor.
    pub trainable: Option<(u64, u64)>,
    /// Weight decay applies.
    pub decay: bool,
    /// What its learning rate is of the step's; `None`: it is that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr_factor: Option<f64>,
}

impl Tensor {
    /// Values of one row.
    pub fn row(&self) -> u64 {
        self.shape.iter().skip(1).product()
    }
    /// Whether `rows` (`None`: all of them) train. The manifest is checked for rows that train in part.
    pub fn trains(&self, rows: Option<(u64, u64)>) -> bool {
        let (start, end) = rows.unwrap_or((0, self.shape.first().copied().unwrap_or(1)));
        self.trainable.is_some_and(|(first, last)| first <= start && end <= last)
    }
    /// How many of its values train.
    pub fn trainable_elements(&self) -> u64 {
        self.trainable.map_or(0, |(start, end)| (end - start) * self.row())
    }
}

/// What the values of an input must be for kernels to find what they index.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// `ids`, `types`, `positions`, `starts`, `targets` or `labels`.
    pub input: String,
    /// Its values lie in `0..below`.
    pub below: Extent,
    /// What it indexes, to follow a number: "rows of `transformer.wpe.weight`".
    pub of: String,
    /// A value that the input must not have, although it is below: an id that positions do not count.
    #[serde(default)]
    pub except: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this format.
    pub format: u32,
    /// `peftc 0.1.0`, and the LLVM it used.
    pub compiler: String,
    pub llvm: String,
    /// `x86_64` and the processor features the library was compiled for; or `sm_70`, a GPU's.
    pub arch: String,
    pub features: Vec<String>,
    pub kernels: Vec<String>,
    pub tensors: Vec<Tensor>,
    pub buffers: Vec<Buffer>,
    /// What batches are checked against before a kernel reads them.
    pub limits: Vec<Limit>,
    /// Run once when weights are there.
    pub prepare: Vec<Launch>,
    pub entries: BTreeMap<String, Entry>,
    /// The checked model without its graph: task, recipe, parameters.
    pub model: serde_json::Value,
    /// blake3 of the library.
    pub library: String,
}

impl Manifest {
    /// The least capability of a GPU that runs the kernels, if they are for one.
    pub fn gpu(&self) -> Option<(i32, i32)> {
        let number: i32 = self.arch.strip_prefix("sm_")?.parse().ok()?;
        Some((number / 10, number % 10))
    }

    /// What the kernels' file is called.
    pub fn library_name(&self) -> &'static str {
        if self.gpu().is_some() { "kernels.ptx" } else { "kernels.so" }
    }
}
