//! Kernels: what each is made for, the names of its arguments, and its code in the builder's terms.

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
use crate::cost::{Launched, UNDER_WAY, Work};
use crate::target::Machine;
use crate::target::cuda::Card;

/// All that a kernel's code depends on. What is not equal does not print alike, as names are made of that.
pub trait Scheduled {
    /// What people call it.
    fn word(&self) -> String;

    /// Its code.
    fn emit(&self, machine: Machine) -> Code;

    /// What a launch asks of a GPU.
    fn work(&self, launched: Launched, _card: &Card) -> Work {
        launched.streams(UNDER_WAY)
    }

    /// Which of its buffers it reads and writes anew.
    fn anew(&self) -> Vec<usize> {
        vec![]
    }
}

/// A float that schedules are told apart by: bit by bit.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Number(u64);

impl Number {
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }

    /// For names: they say that it is 0, and not what else it is.
    pub fn or_zero(self) -> &'static str {
        if self.get() == 0.0 { "_0" } else { "" }
    }
}

impl From<f64> for Number {
    fn from(number: f64) -> Number {
        Number(number.to_bits())
    }
}

impl fmt::Debug for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// Makes one of many.
macro_rules! schedules {
    ($($(#[$doc:meta])* $variant:ident($schedule:ty)),+ $(,)?) => {
        /// What a kernel is, for a machine: equal ones are one kernel, and nothing else is known of it.
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
    Elementwise(elementwise::Expression),
    Along(rowwise::Along),
    Normalize(rowwise::Normalize),
    RowSums(rowwise::RowSums),
    SumRows(rowwise::SumRows),
    SumColumns(columns::SumColumns),
    CrossEntropy(rowwise::CrossEntropy),
    SegmentMean(rowwise::SegmentMean),
    Gather(embedding::Gather),
    Scatter(embedding::Scatter),
    ScatterToFew(embedding::ScatterToFew),
    CopyView(copy::CopyView),
    CopyRagged(copy::CopyRagged),
    Pad(copy::Pad),
    /// A product on a processor, and the packing of its operand.
    Gemm(gemm::cpu::Gemm),
    Pack(gemm::pack::Pack),
    /// A product on a GPU: in `f32`, of few columns, and by tensor cores, with their packing and rounding.
    Simt(gemm::simt::Simt),
    Skinny(gemm::skinny::Skinny),
    Mma(gemm::mma::Mma),
    PackHalves(gemm::mma::Pack),
    Round(gemm::mma::Round),
    Scores(attention::unfused::Scores),
    Attend(attention::unfused::Attend),
    CpuAttention(attention::cpu::CpuAttention),
    GpuAttention(attention::gpu::GpuAttention),
    LogitsBlock(chunked_logits::Block),
    LogitsEnd(chunked_logits::End),
    SumOfSquares(optimizer::SumOfSquares),
    RootOfSum(optimizer::RootOfSum),
    Sweep(optimizer::Sweep),
    AddWeighted(optimizer::AddWeighted),
}

impl Schedule {
    pub fn emit(&self, machine: Machine) -> Code {
        self.scheduled().emit(machine)
    }
}

/// A kernel as it is launched: on a GPU one may do the work of several launches side by side.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Function {
    pub schedule: Schedule,
    pub launches: usize,
}

impl Function {
    pub fn of(schedule: impl Into<Schedule>) -> Function {
        Function { schedule: schedule.into(), launches: 1 }
    }

    /// What people call it, as other kernels may be called, too.
    pub fn word(&self) -> String {
        let times = if self.launches > 1 { format!("_times{}", self.launches) } else { String::new() };
        self.schedule.scheduled().word() + &times
    }

    /// What a launch of it asks of a GPU.
    pub fn work(&self, launched: Launched, card: &Card) -> Work {
        let one = |launched: Launched| {
            let anew = self.schedule.scheduled().anew();
            let passes = (0..launched.buffers).map(|buffer| if anew.contains(&buffer) { 2.0 } else { 1.0 });
            Work { passes: passes.collect(), ..self.schedule.scheduled().work(launched, card) }
        };
        if self.launches == 1 {
            return one(launched);
        }
        let buffers = launched.buffers / self.launches;
        let each = launched.sizes.chunks_exact(launched.sizes.len() / self.launches).map(|sizes| {
            let (&units, sizes) = sizes.split_last().expect("a launch has units");
            let mut work = one(Launched { buffers, sizes, units, ..launched });
            work.reads.resize(buffers, f64::INFINITY);
            work
        });
        each.reduce(Work::beside).expect("some launches")
    }
}

/// A name for each of them: no two are alike, and in other company each has the same, so that what is compiled of it may be
/// kept by it. Nothing is to be read off a name.
pub fn names(functions: &[Function]) -> Vec<String> {
    let mut names: Vec<String> = vec![];
    for function in functions {
        let hash = blake3::hash(format!("{function:?}").as_bytes()).to_hex();
        let hash = (8..=hash.len()).map(|digits| &hash[..digits]);
        let mut free = hash.map(|hash| format!("{}_{hash}", function.word())).filter(|name| !names.contains(name));
        names.push(free.next().expect("of other functions there are other hashes"));
    }
    names
}
