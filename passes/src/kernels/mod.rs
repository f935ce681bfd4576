//! The kernels: the schedule of each, the names of its arguments, its code as written through the builder, and its cost
//! on a GPU.

pub mod attention;
pub mod chunked_logits;
pub mod columns;
pub mod copy;
pub mod elementwise;
pub mod embedding;
pub mod epilogue;
pub mod gemm;
pub mod math;
pub mod optimizer;
pub mod philox;
pub mod rowwise;
pub mod span;

use std::fmt;

use crate::builder::Code;
use crate::cost::{LaunchCost, LaunchSizes, WARP_BYTES_IN_FLIGHT};
use crate::target::Machine;
use crate::target::cuda::Card;

/// A schedule: all that a kernel's code depends on. Schedules that differ also differ in their `Debug` text, because
/// [`names`] hashes it.
pub trait Scheduled {
    /// The readable part of the kernel's name. Different schedules may share it.
    fn name_stem(&self) -> String;

    /// Writes the kernel's code for the machine.
    fn emit(&self, machine: Machine) -> Code;

    /// The cost of one launch on a GPU. The default is that of a kernel that streams memory.
    fn cost(&self, launched: LaunchSizes, _card: &Card) -> LaunchCost {
        launched.streaming(WARP_BYTES_IN_FLIGHT)
    }

    /// The indices of the buffers that the kernel reads and then overwrites; their bytes cross the memory bus twice.
    fn read_write(&self) -> Vec<usize> {
        vec![]
    }
}

/// A float that is compared and hashed by its bits, so that schedules that hold one can be compared and hashed.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FloatBits(u64);

impl FloatBits {
    /// The float itself.
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }

    /// For names: `_0` if the float is zero, else nothing.
    pub fn zero_suffix(self) -> &'static str {
        if self.get() == 0.0 { "_0" } else { "" }
    }
}

impl From<f64> for FloatBits {
    fn from(number: f64) -> FloatBits {
        FloatBits(number.to_bits())
    }
}

impl fmt::Debug for FloatBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// Declares [`Schedule`], which has one variant for each type that implements [`Scheduled`].
macro_rules! schedules {
    ($($(#[$doc:meta])* $variant:ident($schedule:ty)),+ $(,)?) => {
        /// The schedule of any kernel. Kernels of equal schedules are one kernel; nothing else about a kernel is known
        /// outside its own module.
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        pub enum Schedule {
            $($(#[$doc])* $variant($schedule)),+
        }

        impl Schedule {
            fn scheduled(&self) -> &dyn Scheduled {
                match self { $(Schedule::$variant(schedule) => schedule),+ }
            }
        }

        $(impl From<$schedule> for Schedule {
            fn from(schedule: $schedule) -> Schedule {
                Schedule::$variant(schedule)
            }
        })+
    };
}

schedules! {
    /// A fused elementwise expression.
    Elementwise(elementwise::Expression),
    /// Softmax, its adjoint, or log-sum-exp.
    RowOperation(rowwise::RowOperation),
    /// Normalisation of rows, or its adjoint, with an epilogue.
    Normalize(rowwise::Normalize),
    /// Sums of rows, with a fused producer and an epilogue.
    FusedRowSums(rowwise::FusedRowSums),
    /// Sums of rows in memory, dense or ragged.
    PlainRowSums(rowwise::PlainRowSums),
    /// Sums of columns.
    ColumnSums(columns::ColumnSums),
    /// Cross-entropy, or its adjoint.
    CrossEntropy(rowwise::CrossEntropy),
    /// Means over sequences, or their adjoint.
    SegmentMean(rowwise::SegmentMean),
    /// Gathers rows of a table.
    Gather(embedding::Gather),
    /// Adds rows into a table.
    Scatter(embedding::Scatter),
    /// Adds rows into a table that has few rows.
    ScatterFewRows(embedding::ScatterFewRows),
    /// A copy between strided views.
    CopyView(copy::CopyView),
    /// A copy of ragged rows.
    CopyRagged(copy::CopyRagged),
    /// A copy into wider rows, filled with zeros.
    Pad(copy::Pad),
    /// A matrix product on a CPU.
    Gemm(gemm::cpu::Gemm),
    /// The packing of operand B for a CPU.
    Pack(gemm::pack::Pack),
    /// A matrix product in f32 on a GPU's SIMT cores.
    Simt(gemm::simt::Simt),
    /// A matrix product in f32 of few columns, on a GPU.
    Skinny(gemm::skinny::Skinny),
    /// A matrix product in half precision on a GPU's tensor cores.
    Mma(gemm::mma::Mma),
    /// The packing of operand B for tensor cores.
    PackMma(gemm::mma::Pack),
    /// The rounding of operand A for tensor cores.
    Round(gemm::mma::Round),
    /// The scores of unfused attention.
    Scores(attention::unfused::Scores),
    /// The weighted sums of unfused attention.
    Attend(attention::unfused::Attend),
    /// Fused attention on a CPU.
    CpuAttention(attention::cpu::CpuAttention),
    /// Fused attention on a GPU.
    GpuAttention(attention::gpu::GpuAttention),
    /// The online softmax of one chunk of logits.
    LogitsChunk(chunked_logits::ChunkUpdate),
    /// The results of chunked logits.
    LogitsFinish(chunked_logits::ChunkFinish),
    /// Partial sums of a gradient's squared norm.
    SumOfSquares(optimizer::SumOfSquares),
    /// The root of the sum of the partial sums.
    RootOfSum(optimizer::RootOfSum),
    /// One step of an optimizer.
    OptimizerStep(optimizer::OptimizerStep),
    /// A weighted sum of two vectors.
    AddWeighted(optimizer::AddWeighted),
}

impl Schedule {
    /// Writes the kernel's code for the machine.
    pub fn emit(&self, machine: Machine) -> Code {
        self.scheduled().emit(machine)
    }
}

/// A kernel as it is launched. On a GPU, horizontal fusion lets one launch do the work of several.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Function {
    /// The schedule that each of the merged launches has.
    pub schedule: Schedule,
    /// The number of launches that are merged into one; 1 if none are.
    pub launches: usize,
}

impl Function {
    /// A function that does the work of one launch.
    pub fn of(schedule: impl Into<Schedule>) -> Function {
        Function { schedule: schedule.into(), launches: 1 }
    }

    /// The readable part of the name. Different functions may share it.
    pub fn name_stem(&self) -> String {
        let times = if self.launches > 1 { format!("_times{}", self.launches) } else { String::new() };
        self.schedule.scheduled().name_stem() + &times
    }

    /// The cost of one launch on a GPU.
    pub fn cost(&self, launched: LaunchSizes, card: &Card) -> LaunchCost {
        let one = |launched: LaunchSizes| {
            let read_write = self.schedule.scheduled().read_write();
            let passes = (0..launched.buffers).map(|buffer| if read_write.contains(&buffer) { 2.0 } else { 1.0 });
            LaunchCost { transfers: passes.collect(), ..self.schedule.scheduled().cost(launched, card) }
        };
        if self.launches == 1 {
            return one(launched);
        }
        let buffers = launched.buffers / self.launches;
        let each = launched.sizes.chunks_exact(launched.sizes.len() / self.launches).map(|sizes| {
            let (&units, sizes) = sizes.split_last().expect("a launch has units");
            let mut work = one(LaunchSizes { buffers, sizes, units, ..launched });
            work.max_read_bytes.resize(buffers, f64::INFINITY);
            work
        });
        each.reduce(LaunchCost::merge).expect("some launches")
    }
}

/// Names the functions. No two names are equal, and a function has the same name whatever other functions there are, so
/// that its machine code can be cached by name. Nothing may be parsed from a name: its first part is for people, the
/// rest is a hash of the function.
pub fn names(functions: &[Function]) -> Vec<String> {
    let mut names: Vec<String> = vec![];
    for function in functions {
        let hash = blake3::hash(format!("{function:?}").as_bytes()).to_hex();
        let hash = (8..=hash.len()).map(|digits| &hash[..digits]);
        let mut free = hash.map(|hash| format!("{}_{hash}", function.name_stem())).filter(|name| !names.contains(name));
        names.push(free.next().expect("functions that differ have different hashes"));
    }
    names
}
