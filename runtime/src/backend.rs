//! Where kernels run and the numbers they work on lie. A session says what is launched on which numbers; a backend
//! knows how.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use crate::artifact::Launch;
use crate::error::RuntimeError;
use crate::memory::Numbers;

/// A row of numbers in a backend's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block(pub usize);

/// Some neighbours in a block, each an `f32` or an `i32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub block: Block,
    pub start: usize,
    pub length: usize,
}

/// A launch with all that it waits for.
pub struct Job<'a> {
    pub launch: &'a Launch,
    /// Its buffers. None of them reaches beyond its block.
    pub places: Vec<Place>,
    pub extents: Vec<u64>,
    /// At least one.
    pub units: u64,
    /// What is to be filled with NaN before: what reads what nothing wrote then shows.
    pub poisoned: Vec<Place>,
}

/// Numbers that a backend was asked to keep.
#[derive(Debug)]
pub enum Kept {
    Here(Vec<f32>),
    /// So many, to a piece of the host's memory.
    Coming {
        slot: usize,
        length: usize,
    },
}

/// How long each operation took in all, and how often it ran.
pub type Profile = BTreeMap<String, (Duration, u64)>;

/// Memory, and what runs on it.
pub trait Backend: Send {
    /// `length` numbers, all 0.
    fn alloc(&mut self, length: usize) -> Result<Block, RuntimeError>;

    /// A block with these numbers.
    fn take(&mut self, numbers: Numbers) -> Result<Block, RuntimeError> {
        let block = self.alloc(numbers.len())?;
        self.write(block, 0, Words::Floats(&numbers))?;
        Ok(block)
    }

    fn free(&mut self, block: Block);

    /// Puts numbers into a block that reaches so far.
    fn write(&mut self, block: Block, start: usize, words: Words) -> Result<(), RuntimeError>;

    /// Puts numbers into a block that no job reads which runs now; what runs goes on. What is started later finds them.
    fn send(&mut self, block: Block, words: Words) -> Result<(), RuntimeError> {
        self.write(block, 0, words)
    }

    fn read(&self, place: Place) -> Result<Cow<'_, [f32]>, RuntimeError>;

    /// Jobs may be started before it is asked how those before them went.
    fn overlaps(&self) -> bool {
        false
    }

    /// Numbers as they are when all that was started has ended, and nothing else has; [`Backend::kept`] gives them. Of
    /// two runs, at most.
    fn keep(&mut self, places: &[Place]) -> Result<Kept, RuntimeError> {
        let mut all = vec![];
        for &place in places {
            all.extend_from_slice(&self.read(place)?);
        }
        Ok(Kept::Here(all))
    }

    /// Waits for them.
    fn kept(&mut self, kept: Kept) -> Result<Vec<f32>, RuntimeError> {
        match kept {
            Kept::Here(numbers) => Ok(numbers),
            Kept::Coming { .. } => unreachable!("another backend's"),
        }
    }

    /// Starts the jobs, which run in their order, and may return before they end. With a profile it waits for each one.
    fn run(&mut self, jobs: &[Job], profile: Option<&mut Profile>) -> Result<(), RuntimeError>;

    /// Until all that was started has ended. That it failed shows here at the latest.
    fn wait(&mut self) -> Result<(), RuntimeError> {
        Ok(())
    }

    /// Bytes of all blocks.
    fn held(&self) -> u64;
}

/// Numbers of either kind.
#[derive(Clone, Copy, Debug)]
pub enum Words<'a> {
    Floats(&'a [f32]),
    Ints(&'a [i32]),
}

impl Words<'_> {
    pub fn len(&self) -> usize {
        match self {
            Words::Floats(x) => x.len(),
            Words::Ints(x) => x.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Adds a launch's time to the profile.
pub(crate) fn record(profile: &mut Profile, job: &Job, time: Duration) {
    let entry = profile.entry(job.launch.op.clone()).or_default();
    entry.0 += time;
    entry.1 += 1;
}
