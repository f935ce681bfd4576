//! A backend owns memory and runs kernels on it. A [`crate::Session`] decides what is launched on which memory; a
//! backend decides how.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use crate::artifact::Launch;
use crate::error::RuntimeError;
use crate::memory::Numbers;

/// Handle of one allocation in a backend's memory: a row of 4-byte words, each an `f32` or an `i32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Allocation(pub usize);

/// A contiguous part of an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// The allocation that the range is in.
    pub allocation: Allocation,
    /// First word.
    pub start: usize,
    /// Number of words.
    pub length: usize,
}

/// A kernel launch whose buffers have memory and whose extents are known numbers.
pub struct BoundLaunch<'a> {
    /// The kernel, the workgroup and the operation's name.
    pub launch: &'a Launch,
    /// Memory of the launch's buffers, in order. Each range is within its allocation.
    pub ranges: Vec<MemoryRange>,
    /// Values of the launch's extents, in order.
    pub extents: Vec<u64>,
    /// The number of independent units of work, at least 1.
    pub units: u64,
    /// Temporaries that this launch is the first to use and that are filled with NaN before it: see
    /// [`crate::Session::poison`].
    pub poisoned: Vec<MemoryRange>,
}

/// A read that a backend has started.
#[derive(Debug)]
pub enum PendingRead {
    /// The numbers have been read already.
    Ready(Vec<f32>),
    /// An asynchronous copy into pinned host memory is in flight.
    InFlight {
        /// Index of the pinned buffer.
        readback: usize,
        /// Number of words.
        length: usize,
    },
}

/// Total time and number of launches for each operation, by the operation's name.
pub type Profile = BTreeMap<String, (Duration, u64)>;

/// Device memory and the means to launch kernels on it.
pub trait Backend: Send {
    /// Allocates `length` words, all zero.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::Memory`] if there is not enough memory.
    fn alloc(&mut self, length: usize) -> Result<Allocation, RuntimeError>;

    /// Allocates memory with the given content.
    ///
    /// # Errors
    ///
    /// As [`Backend::alloc`].
    fn alloc_with(&mut self, numbers: Numbers) -> Result<Allocation, RuntimeError> {
        let allocation = self.alloc(numbers.len())?;
        self.write(allocation, 0, Words::Floats(&numbers))?;
        Ok(allocation)
    }

    /// Frees an allocation. Launches in flight that use it are completed first.
    fn free(&mut self, allocation: Allocation);

    /// Copies `words` to an allocation, from word `start` on. The range must be within the allocation.
    ///
    /// # Errors
    ///
    /// If the device fails.
    fn write(&mut self, allocation: Allocation, start: usize, words: Words) -> Result<(), RuntimeError>;

    /// Copies `words` to the start of an allocation that no launch in flight reads, without waiting for those launches.
    /// Launches that are started later see the new content.
    ///
    /// # Errors
    ///
    /// If the device fails.
    fn write_async(&mut self, allocation: Allocation, words: Words) -> Result<(), RuntimeError> {
        self.write(allocation, 0, words)
    }

    /// Waits for the launches in flight and reads a range as `f32`.
    ///
    /// # Errors
    ///
    /// If the device or a launch failed.
    fn read(&self, range: MemoryRange) -> Result<Cow<'_, [f32]>, RuntimeError>;

    /// True if launches may be started before those in flight have ended.
    fn overlaps(&self) -> bool {
        false
    }

    /// Starts reading ranges as they are after the launches started so far; [`Backend::finish_read`] waits for the
    /// numbers. At most two reads may be pending.
    ///
    /// # Errors
    ///
    /// If the device fails.
    fn begin_read(&mut self, ranges: &[MemoryRange]) -> Result<PendingRead, RuntimeError> {
        let mut all = vec![];
        for &range in ranges {
            all.extend_from_slice(&self.read(range)?);
        }
        Ok(PendingRead::Ready(all))
    }

    /// Waits for a pending read and returns its numbers, all ranges concatenated.
    ///
    /// # Errors
    ///
    /// If the device or a launch failed.
    fn finish_read(&mut self, read: PendingRead) -> Result<Vec<f32>, RuntimeError> {
        match read {
            PendingRead::Ready(numbers) => Ok(numbers),
            PendingRead::InFlight { .. } => unreachable!("another backend's"),
        }
    }

    /// Starts the launches, which execute in order; it may return before they have ended. With a profile it waits for
    /// each launch and adds its time.
    ///
    /// # Errors
    ///
    /// If a launch is refused, or fails while it is being waited for.
    fn run(&mut self, launches: &[BoundLaunch], profile: Option<&mut Profile>) -> Result<(), RuntimeError>;

    /// Waits for all launches in flight.
    ///
    /// # Errors
    ///
    /// If one of them failed.
    fn wait(&mut self) -> Result<(), RuntimeError> {
        Ok(())
    }

    /// Bytes of all allocations.
    fn allocated_bytes(&self) -> u64;
}

/// Borrowed 4-byte words to upload.
#[derive(Clone, Copy, Debug)]
pub enum Words<'a> {
    /// Floating-point numbers.
    Floats(&'a [f32]),
    /// Integers.
    Ints(&'a [i32]),
}

impl Words<'_> {
    /// The number of words.
    pub fn len(&self) -> usize {
        match self {
            Words::Floats(x) => x.len(),
            Words::Ints(x) => x.len(),
        }
    }

    /// True if there are no words.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Adds the time of one launch to the profile.
pub(crate) fn record(profile: &mut Profile, launch: &BoundLaunch, time: Duration) {
    let entry = profile.entry(launch.launch.op.clone()).or_default();
    entry.0 += time;
    entry.1 += 1;
}
