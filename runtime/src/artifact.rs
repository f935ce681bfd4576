//! The artifact's manifest, which the compiler writes next to a library of kernels and the runtime reads.
//!
//! An entry point is a list of kernel launches over buffers whose sizes depend on the batch. Every kernel has one
//! signature, `fn(args: *mut *mut c_void)`: its buffers as memref descriptors, then the extents it takes, then the
//! range `begin..end` of the units of work to compute. Units are independent of each other, so the result does not
//! depend on how threads share them, not even in the last bit.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use peft_grammar::names::Vector;

/// Version of the manifest's format. The runtime refuses any other version.
pub const FORMAT: u32 = 4;

/// A size that is an expression in the extents of a batch.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extent {
    /// A constant.
    Const(u64),
    /// The number of tokens of the batch.
    Tokens,
    /// The number of sequences of the batch.
    Sequences,
    /// The number of target tokens: those whose loss counts.
    Targets,
    /// The number of query-key pairs, Σ over sequences of length².
    Pairs,
    /// The number of trainable values of the model.
    Values,
    /// A sum.
    Add(Box<Extent>, Box<Extent>),
    /// A product.
    Mul(Box<Extent>, Box<Extent>),
    /// A quotient, rounded up.
    CeilDiv(Box<Extent>, u64),
}

/// The extents of one batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// The number of tokens.
    pub tokens: u64,
    /// The number of sequences.
    pub sequences: u64,
    /// The number of target tokens.
    pub targets: u64,
    /// The number of query-key pairs, Σ over sequences of length².
    pub pairs: u64,
    /// The number of trainable values of the model.
    pub values: u64,
}

impl Sizes {
    /// The larger of the two, extent by extent.
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
    /// The value for a batch. It saturates, so that a size that no memory could hold fails when it is allocated.
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

/// The element type of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Element {
    /// 32-bit floating point.
    F32,
    /// 32-bit signed integer.
    I32,
}

impl Element {
    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        4
    }
}

/// Where a buffer's content comes from and how long it lives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// Uploaded for every run, by its name as an [`Input`](peft_grammar::names::Input). Given by the caller: `ids`,
    /// `labels`, `rng`, … Derived from the sequence lengths: `offsets` `i32[sequences+1]`, `segments` `i32[tokens]`
    /// (the sequence of each token), `pairs` `i32[tokens+1]` (exclusive prefix sum of each token's sequence length),
    /// `starts` `i32[sequences]`.
    Input(String),
    /// A tensor of [`Manifest::tensors`], or some of its rows.
    Tensor {
        /// Index into [`Manifest::tensors`].
        index: usize,
        /// Rows `start..end`; `None` for all.
        rows: Option<(u64, u64)>,
    },
    /// The gradient of a trainable tensor (or of its trainable rows): a slice of the flat vector of gradients.
    Gradient {
        /// Index into [`Manifest::tensors`].
        index: usize,
    },
    /// One of the flat vectors: values, gradients, or state of the optimizer.
    Flat(Vector),
    /// Written once by [`Manifest::prepare`] and kept: packed frozen weights.
    Prepared,
    /// Live from the first launch of a run that uses it to the last; an output is live to the end of the run.
    Temporary,
}

/// A tensor in memory, row-major. A ragged tensor is one-dimensional here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Buffer {
    /// Element type.
    pub element: Element,
    /// Sizes of the dimensions.
    pub shape: Vec<Extent>,
    /// Where the content comes from.
    pub storage: Storage,
}

impl Buffer {
    /// The number of elements for a batch.
    pub fn elements(&self, sizes: &Sizes) -> u64 {
        self.shape.iter().map(|e| e.eval(sizes)).fold(1, u64::saturating_mul)
    }
}

/// Index into [`Manifest::buffers`].
pub type BufferId = usize;

/// One kernel launch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// Index into [`Manifest::kernels`].
    pub kernel: usize,
    /// The kernel's buffer arguments, in order.
    pub buffers: Vec<BufferId>,
    /// The kernel's `index` arguments, which follow the buffers.
    pub extents: Vec<Extent>,
    /// The number of independent units of work, which threads or workgroups share.
    pub units: Extent,
    /// The workgroup of a GPU launch; [`Workgroup::ONE`] on a CPU.
    #[serde(default, skip_serializing_if = "Workgroup::is_one")]
    pub group: Workgroup,
    /// The operation that the kernel computes, for profiles and messages, such as `peft.matmul`.
    pub op: String,
}

/// A GPU's thread block. A kernel is compiled for one workgroup and cannot be launched with another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workgroup {
    /// Units that a workgroup computes at a time.
    pub units: u64,
    /// Threads of the workgroup.
    pub threads: u64,
}

impl Workgroup {
    /// One thread that computes one unit at a time, as on a CPU.
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

/// An entry point: launches that execute in order, and their named results.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The launches, in order.
    pub launches: Vec<Launch>,
    /// The results.
    pub outputs: Vec<Output>,
}

/// A named result of an entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Output {
    /// Name of the output.
    pub name: String,
    /// The buffer that holds it.
    pub buffer: BufferId,
    /// The shape of the result, row-major; a ragged result is one-dimensional.
    pub shape: Vec<Extent>,
}

/// A weight that the artifact reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tensor {
    /// Canonical name.
    pub name: String,
    /// Shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// `None` if the tensor is frozen, otherwise the rows `start..end` that train: all rows of a tensor that trains as
    /// a whole.
    pub trainable: Option<(u64, u64)>,
    /// True if weight decay applies.
    pub decay: bool,
    /// Factor of the learning rate; `None` for 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr_factor: Option<f64>,
}

impl Tensor {
    /// The number of values of one row.
    pub fn row(&self) -> u64 {
        self.shape.iter().skip(1).product()
    }
    /// True if all of `rows` (`None`: the whole tensor) train. Validation has ruled out ranges of which only a part
    /// trains.
    pub fn trains(&self, rows: Option<(u64, u64)>) -> bool {
        let (start, end) = rows.unwrap_or((0, self.shape.first().copied().unwrap_or(1)));
        self.trainable.is_some_and(|(first, last)| first <= start && end <= last)
    }
    /// The number of trainable values.
    pub fn trainable_elements(&self) -> u64 {
        self.trainable.map_or(0, |(start, end)| (end - start) * self.row())
    }
}

/// The range of an integer input that kernels use as an index.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// The input: `ids`, `types`, `positions`, `starts`, `targets` or `labels`.
    pub input: String,
    /// Values must be in `0..below`.
    pub below: Extent,
    /// What the input indexes, as a message says it after a number: "rows of `transformer.wpe.weight`".
    pub of: String,
    /// A value in the range that is refused nevertheless: the id of padding tokens, which positions do not count.
    #[serde(default)]
    pub except: Option<u64>,
}

/// Everything about an artifact but its machine code.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this format.
    pub format: u32,
    /// The compiler: `peftc 0.1.0`.
    pub compiler: String,
    /// The LLVM version that compiled the kernels.
    pub llvm: String,
    /// The target: `x86_64`, or for a GPU its least compute capability, `sm_70`.
    pub arch: String,
    /// Features of the processor that the kernels use, by LLVM's names.
    pub features: Vec<String>,
    /// Names of the kernels.
    pub kernels: Vec<String>,
    /// Weights, in the order in which [`crate::Session::new`] takes them.
    pub tensors: Vec<Tensor>,
    /// Buffers of all entries.
    pub buffers: Vec<Buffer>,
    /// Ranges that integer inputs are checked against before a kernel reads them.
    pub limits: Vec<Limit>,
    /// Launches that run once after the weights have been loaded, and pack them.
    pub prepare: Vec<Launch>,
    /// Entry points by name.
    pub entries: BTreeMap<String, Entry>,
    /// The checked model without its graph: task, recipe, parameters.
    pub model: serde_json::Value,
    /// BLAKE3 hash of the library, in hexadecimal.
    pub library: String,
}

impl Manifest {
    /// The least compute capability (major, minor) that runs the kernels, or `None` if they are for a CPU.
    pub fn gpu(&self) -> Option<(i32, i32)> {
        let number: i32 = self.arch.strip_prefix("sm_")?.parse().ok()?;
        Some((number / 10, number % 10))
    }

    /// The file name of the kernels.
    pub fn library_name(&self) -> &'static str {
        if self.gpu().is_some() { "kernels.ptx" } else { "kernels.so" }
    }
}
