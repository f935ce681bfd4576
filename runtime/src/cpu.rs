//! The CPU backend: it runs the kernels of a shared library on a pool of threads.

use std::borrow::Cow;
use std::ffi::c_void;
use std::ops::Range;
use std::path::Path;

use crate::backend::{Allocation, Backend, BoundLaunch, MemoryRange, Profile, Words, record};
use crate::error::RuntimeError;
use crate::memory::Numbers;
use crate::pool::{Pool, Task};

/// A launch whose largest buffer has fewer elements than this runs on one thread: waking a second one would take
/// longer.
const MIN_PARALLEL_ELEMENTS: u64 = 4096;

/// MLIR's descriptor of a one-dimensional `memref<?xf32>` (or `i32`).
#[repr(C)]
#[derive(Clone, Copy)]
struct MemRefDescriptor {
    allocated: *mut c_void,
    aligned: *mut c_void,
    offset: i64,
    size: i64,
    stride: i64,
}

// SAFETY: a descriptor is an address and a size; kernels let threads write to disjoint elements only.
unsafe impl Send for MemRefDescriptor {}
unsafe impl Sync for MemRefDescriptor {}

/// A kernel takes an array of pointers to its arguments: for a buffer, a pointer to a pointer to its descriptor (MLIR's
/// packed form of its C interface); for an extent or a unit index, a pointer to the number.
type Kernel = unsafe extern "C" fn(*mut *mut c_void);

/// A library's kernels, in the manifest's order.
pub struct Library {
    kernels: Vec<Kernel>,
    /// The loaded library, which must outlive the function pointers.
    _library: libloading::Library,
}

impl Library {
    /// Loads the kernels `names` from the shared library at `path`.
    ///
    /// # Errors
    ///
    /// If the library cannot be loaded or lacks a kernel.
    pub fn load(path: &Path, names: &[String]) -> Result<Self, RuntimeError> {
        // SAFETY: an artifact's library holds kernels only, and loading it runs no code. The path is absolute, so the
        // loader does not search for it, and the file is trusted.
        let library = unsafe { libloading::Library::new(path) }.map_err(|e| RuntimeError::artifact(path, e))?;
        let kernel = |name: &String| {
            let symbol = format!("_mlir__mlir_ciface_{name}");
            // SAFETY: every kernel has this signature, and the manifest's checksum matches the library.
            let kernel = unsafe { library.get::<Kernel>(symbol.as_bytes()) };
            kernel.map(|k| *k).map_err(|_| RuntimeError::artifact(path, format!("it lacks the kernel `{name}`")))
        };
        let kernels = names.iter().map(kernel).collect::<Result<_, _>>()?;
        Ok(Library { kernels, _library: library })
    }
}

/// Allocations in host memory and a pool of threads that runs the kernels.
pub struct Cpu {
    library: Library,
    pool: Pool,
    allocations: Vec<Option<Numbers>>,
}

impl Cpu {
    /// A backend with `threads` threads, 0 for one per core.
    ///
    /// # Errors
    ///
    /// If the threads cannot be started.
    pub fn new(library: Library, threads: usize) -> Result<Self, RuntimeError> {
        Ok(Cpu { library, pool: Pool::new(threads)?, allocations: vec![] })
    }

    fn numbers(&self, allocation: Allocation) -> &Numbers {
        self.allocations[allocation.0].as_ref().expect("a allocation in use")
    }

    fn memory(&self, range: &MemoryRange) -> MemRefDescriptor {
        let numbers = self.numbers(range.allocation);
        assert!(range.start + range.length <= numbers.len(), "{range:?} of {} numbers", numbers.len());
        // SAFETY: the range is within the allocation, as checked above.
        let start = unsafe { numbers.kernel_ptr().add(range.start) }.cast();
        MemRefDescriptor { allocated: start, aligned: start, offset: 0, size: range.length as i64, stride: 1 }
    }

    fn task<'a>(&'a self, launch: &'a BoundLaunch) -> Task<'a> {
        let memory: Vec<MemRefDescriptor> = launch.ranges.iter().map(|range| self.memory(range)).collect();
        let kernel = self.library.kernels[launch.launch.kernel];
        let (units, elements) = (launch.units, memory.iter().map(|m| m.size as u64).max().unwrap_or(0));
        let min_units = if elements < MIN_PARALLEL_ELEMENTS { units } else { 1 };
        let work = move |range: Range<u64>| {
            let memory = &memory;
            let mut buffers: Vec<*const MemRefDescriptor> =
                memory.iter().map(|m| m as *const MemRefDescriptor).collect();
            let mut numbers: Vec<i64> = launch.extents.iter().map(|&n| n as i64).collect();
            numbers.extend([range.start as i64, range.end as i64]);
            let pointers = buffers.iter_mut().map(|b| (b as *mut *const MemRefDescriptor).cast::<c_void>());
            let mut arguments: Vec<*mut c_void> =
                pointers.chain(numbers.iter_mut().map(|n| (n as *mut i64).cast())).collect();
            // SAFETY: the manifest lists the kernel's arguments in order, every buffer has the size that the manifest
            // gives it (checked when it was bound), and different units write to disjoint elements.
            unsafe { kernel(arguments.as_mut_ptr()) };
        };
        Task { units, min_units, work: Box::new(work) }
    }

    fn poison<'a>(&'a self, range: &MemoryRange) -> Task<'a> {
        let memory = self.memory(range);
        let work = move |_: Range<u64>| {
            let memory = &memory;
            let (start, length) = (memory.aligned.cast::<f32>(), memory.size as usize);
            // SAFETY: the range is within its allocation, and no launch runs now.
            unsafe { std::slice::from_raw_parts_mut(start, length) }.fill(f32::NAN);
        };
        Task { units: 1, min_units: 1, work: Box::new(work) }
    }
}

impl Backend for Cpu {
    fn alloc(&mut self, length: usize) -> Result<Allocation, RuntimeError> {
        self.alloc_with(Numbers::try_zeros(length)?)
    }

    fn alloc_with(&mut self, numbers: Numbers) -> Result<Allocation, RuntimeError> {
        self.allocations.push(Some(numbers));
        Ok(Allocation(self.allocations.len() - 1))
    }

    fn free(&mut self, allocation: Allocation) {
        self.allocations[allocation.0] = None;
    }

    fn write(&mut self, allocation: Allocation, start: usize, words: Words) -> Result<(), RuntimeError> {
        let to = &mut self.allocations[allocation.0].as_mut().expect("a allocation in use")[start..start + words.len()];
        match words {
            Words::Floats(x) => to.copy_from_slice(x),
            Words::Ints(x) => to.iter_mut().zip(x).for_each(|(to, &x)| *to = f32::from_bits(x as u32)),
        }
        Ok(())
    }

    fn read(&self, MemoryRange { allocation, start, length }: MemoryRange) -> Result<Cow<'_, [f32]>, RuntimeError> {
        Ok(Cow::Borrowed(&self.numbers(allocation)[start..start + length]))
    }

    fn run(&mut self, launches: &[BoundLaunch], profile: Option<&mut Profile>) -> Result<(), RuntimeError> {
        let mut tasks = vec![];
        for launch in launches {
            tasks.extend(launch.poisoned.iter().map(|range| self.poison(range)));
            tasks.push(self.task(launch));
        }
        let times = self.pool.run(&tasks);
        if let Some(profile) = profile {
            let mut times = times.into_iter();
            for launch in launches {
                let time = times.nth(launch.poisoned.len()).expect("a time for each task");
                record(profile, launch, time);
            }
        }
        Ok(())
    }

    fn allocated_bytes(&self) -> u64 {
        self.allocations.iter().flatten().map(Numbers::bytes).sum()
    }
}
