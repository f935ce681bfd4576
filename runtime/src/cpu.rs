//! Kernels of a shared library on a pool of threads.

use std::borrow::Cow;
use std::ffi::c_void;
use std::path::Path;
use std::time::Instant;

use rayon::prelude::*;

use crate::backend::{Backend, Block, Job, Place, Profile, Words, record};
use crate::error::RuntimeError;
use crate::memory::Numbers;

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
        // A bare name would send the loader through its search path.
        let file = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        // SAFETY: an artifact's library holds kernels alone: loading it runs no code.
        let library =
            unsafe { libloading::Library::new(file.as_path()) }.map_err(|e| RuntimeError::artifact(path, e))?;
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
    pool: rayon::ThreadPool,
    blocks: Vec<Option<Numbers>>,
}

impl Cpu {
    /// `threads` 0: as many as there are cores.
    pub fn new(library: Library, threads: usize) -> Result<Self, RuntimeError> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("kernels {i}"));
        let pool = pool.build().map_err(|e| RuntimeError::Device(format!("no threads to run on: {e}")))?;
        Ok(Cpu { library, pool, blocks: vec![] })
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

    fn launch(&self, job: &Job) {
        let memory: Vec<Memory> = job.places.iter().map(|place| self.memory(place)).collect();
        let buffers: Vec<usize> = memory.iter().map(|m| m as *const Memory as usize).collect();
        let kernel = self.library.kernels[job.launch.kernel];
        let units = job.units as i64;
        let run = |begin: i64, end: i64| {
            let mut buffers = buffers.clone();
            let mut numbers: Vec<i64> = job.extents.iter().map(|&n| n as i64).collect();
            numbers.extend([begin, end]);
            let pointers = buffers.iter_mut().map(|b| (b as *mut usize).cast::<c_void>());
            let mut arguments: Vec<*mut c_void> =
                pointers.chain(numbers.iter_mut().map(|n| (n as *mut i64).cast())).collect();
            // SAFETY: the manifest names the kernel's arguments in order, every buffer has the size the
            // manifest gives it (checked when it was bound), and ranges of units write apart.
            unsafe { kernel(arguments.as_mut_ptr()) };
        };
        let work: i64 = memory.iter().map(|m| m.size).max().unwrap_or(0);
        let parts = (4 * self.pool.current_num_threads() as i64).min(units);
        if parts == 1 || work < 4096 {
            run(0, units);
        } else {
            (0..parts).into_par_iter().for_each(|part| run(units * part / parts, units * (part + 1) / parts));
        }
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

    fn run(&mut self, jobs: &[Job], mut profile: Option<&mut Profile>) -> Result<(), RuntimeError> {
        let own = &*self;
        own.pool.install(|| {
            for job in jobs {
                for place in &job.poisoned {
                    let start = own.memory(place).aligned.cast::<f32>();
                    // SAFETY: within its block, and no launch runs now.
                    unsafe { std::slice::from_raw_parts_mut(start, place.length) }.fill(f32::NAN);
                }
                let begun = profile.as_ref().map(|_| Instant::now());
                own.launch(job);
                if let (Some(profile), Some(begun)) = (profile.as_deref_mut(), begun) {
                    record(profile, job, begun.elapsed());
                }
            }
        });
        Ok(())
    }

    fn held(&self) -> u64 {
        self.blocks.iter().flatten().map(Numbers::bytes).sum()
    }
}
