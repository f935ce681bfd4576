//! Kernels of a shared library on a pool of threads.

use std::borrow::Cow;
use std::ffi::c_void;
use std::ops::Range;
use std::path::Path;

use crate::backend::{Backend, Block, Job, Place, Profile, Words, record};
use crate::error::RuntimeError;
use crate::memory::Numbers;
use crate::pool::{Pool, Task};

/// Elements that one thread has read or written before another is at hand.
const FEW: u64 = 4096;

/// MLIR's descriptor of a `memref<?xf32>` (or `i32`).
#[repr(C)]
#[derive(Clone, Copy)]
struct Memory {
    allocated: *mut c_void,
    aligned: *mut c_void,
    offset: i64,
    size: i64,
    stride: i64,
}

// SAFETY: a descriptor is a place and its size; who uses it sees to it that threads write apart.
unsafe impl Send for Memory {}
unsafe impl Sync for Memory {}

/// A kernel takes an array of pointers to its arguments: of a buffer, a pointer to a pointer to its
/// descriptor (MLIR's packed form of its C interface); of a size or a unit, a pointer to the number.
type Kernel = unsafe extern "C" fn(*mut *mut c_void);

/// A library's kernels, in the manifest's order.
pub struct Library {
    kernels: Vec<Kernel>,
    /// They live in it.
    _library: libloading::Library,
}

impl Library {
    pub fn load(path: &Path, names: &[String]) -> Result<Self, RuntimeError> {
        // SAFETY: an artifact's library holds kernels alone: loading it runs no code. The path is whole, so the loader
        // searches for nothing, and trusted.
        let library = unsafe { libloading::Library::new(path) }.map_err(|e| RuntimeError::artifact(path, e))?;
        let kernel = |name: &String| {
            let symbol = format!("_mlir__mlir_ciface_{name}");
            // SAFETY: every kernel has this one signature; the manifest's checksum says it is ours.
            let kernel = unsafe { library.get::<Kernel>(symbol.as_bytes()) };
            kernel.map(|k| *k).map_err(|_| RuntimeError::artifact(path, format!("it lacks the kernel `{name}`")))
        };
        let kernels = names.iter().map(kernel).collect::<Result<_, _>>()?;
        Ok(Library { kernels, _library: library })
    }
}

pub struct Cpu {
    library: Library,
    pool: Pool,
    blocks: Vec<Option<Numbers>>,
}

impl Cpu {
    /// `threads` 0: as many as there are cores.
    pub fn new(library: Library, threads: usize) -> Result<Self, RuntimeError> {
        Ok(Cpu { library, pool: Pool::new(threads)?, blocks: vec![] })
    }

    fn numbers(&self, block: Block) -> &Numbers {
        self.blocks[block.0].as_ref().expect("a block in use")
    }

    fn memory(&self, place: &Place) -> Memory {
        let numbers = self.numbers(place.block);
        assert!(place.start + place.length <= numbers.len(), "{place:?} of {} numbers", numbers.len());
        // SAFETY: within the block, as just checked.
        let start = unsafe { numbers.cells().add(place.start) }.cast();
        Memory { allocated: start, aligned: start, offset: 0, size: place.length as i64, stride: 1 }
    }

    fn task<'a>(&'a self, job: &'a Job) -> Task<'a> {
        let memory: Vec<Memory> = job.places.iter().map(|place| self.memory(place)).collect();
        let kernel = self.library.kernels[job.launch.kernel];
        let (units, elements) = (job.units, memory.iter().map(|m| m.size as u64).max().unwrap_or(0));
        let least = if elements < FEW { units } else { 1 };
        let work = move |range: Range<u64>| {
            let memory = &memory;
            let mut buffers: Vec<*const Memory> = memory.iter().map(|m| m as *const Memory).collect();
            let mut numbers: Vec<i64> = job.extents.iter().map(|&n| n as i64).collect();
            numbers.extend([range.start as i64, range.end as i64]);
            let pointers = buffers.iter_mut().map(|b| (b as *mut *const Memory).cast::<c_void>());
            let mut arguments: Vec<*mut c_void> =
                pointers.chain(numbers.iter_mut().map(|n| (n as *mut i64).cast())).collect();
            // SAFETY: the manifest names the kernel's arguments in order, every buffer has the size the
            // manifest gives it (checked when it was bound), and ranges of units write apart.
            unsafe { kernel(arguments.as_mut_ptr()) };
        };
        Task { units, least, work: Box::new(work) }
    }

    fn poison<'a>(&'a self, place: &Place) -> Task<'a> {
        let memory = self.memory(place);
        let work = move |_: Range<u64>| {
            let memory = &memory;
            let (start, length) = (memory.aligned.cast::<f32>(), memory.size as usize);
            // SAFETY: within its block, and no launch runs now.
            unsafe { std::slice::from_raw_parts_mut(start, length) }.fill(f32::NAN);
        };
        Task { units: 1, least: 1, work: Box::new(work) }
    }
}

impl Backend for Cpu {
    fn alloc(&mut self, length: usize) -> Result<Block, RuntimeError> {
        self.take(Numbers::try_zeros(length)?)
    }

    fn take(&mut self, numbers: Numbers) -> Result<Block, RuntimeError> {
        self.blocks.push(Some(numbers));
        Ok(Block(self.blocks.len() - 1))
    }

    fn free(&mut self, block: Block) {
        self.blocks[block.0] = None;
    }

    fn write(&mut self, block: Block, start: usize, words: Words) -> Result<(), RuntimeError> {
        let to = &mut self.blocks[block.0].as_mut().expect("a block in use")[start..start + words.len()];
        match words {
            Words::Floats(x) => to.copy_from_slice(x),
            Words::Ints(x) => to.iter_mut().zip(x).for_each(|(to, &x)| *to = f32::from_bits(x as u32)),
        }
        Ok(())
    }

    fn read(&self, Place { block, start, length }: Place) -> Result<Cow<'_, [f32]>, RuntimeError> {
        Ok(Cow::Borrowed(&self.numbers(block)[start..start + length]))
    }

    fn run(&mut self, jobs: &[Job], profile: Option<&mut Profile>) -> Result<(), RuntimeError> {
        let mut tasks = vec![];
        for job in jobs {
            tasks.extend(job.poisoned.iter().map(|place| self.poison(place)));
            tasks.push(self.task(job));
        }
        let times = self.pool.run(&tasks);
        if let Some(profile) = profile {
            let mut times = times.into_iter();
            for job in jobs {
                let time = times.nth(job.poisoned.len()).expect("a time for each task");
                record(profile, job, time);
            }
        }
        Ok(())
    }

    fn held(&self) -> u64 {
        self.blocks.iter().flatten().map(Numbers::bytes).sum()
    }
}
