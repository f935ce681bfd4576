//! Kernels in PTX on a GPU, by the driver alone: it compiles them for the GPU at hand, and no toolkit is asked for.

use std::borrow::Cow;
use std::ffi::{CString, c_uint, c_void};
use std::time::Instant;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute, CUdeviceptr, CUfunction_attribute_enum, CUjit_option};

use crate::backend::{Backend, Block, Job, Place, Profile, Words, record};
use crate::device;
use crate::error::RuntimeError;

/// Threads that go in step: units are counted in these.
const WARP: u64 = 32;
/// Blocks of a launch for each processor of the GPU: enough to fill it with small ones, and then some to share.
const BLOCKS: u64 = 64;
/// Room for what the driver says of PTX that it does not take.
const LOG: usize = 8192;

/// The first GPU, with a module of kernels.
pub struct Cuda {
    device: sys::CUdevice,
    context: sys::CUcontext,
    module: sys::CUmodule,
    kernels: Vec<Kernel>,
    processors: u64,
    blocks: Vec<Option<Memory>>,
}

struct Kernel {
    function: sys::CUfunction,
    /// Of a block.
    threads: u64,
}

#[derive(Clone, Copy)]
struct Memory {
    start: CUdeviceptr,
    length: usize,
}

// SAFETY: handles of the driver, which any thread may use once the context is its own; every call sees to that.
unsafe impl Send for Cuda {}

fn failed(error: DriverError) -> RuntimeError {
    let name = error.error_string().map(|text| text.to_string_lossy().into_owned());
    RuntimeError::Device(format!("the GPU failed: {}", name.unwrap_or_else(|_| format!("{:?}", error.0))))
}

impl Cuda {
    pub fn new(ptx: &str, names: &[String]) -> Result<Self, RuntimeError> {
        let gpus = device::gpus().map_err(|e| RuntimeError::Device(e.to_string()))?;
        if gpus.is_empty() {
            return Err(RuntimeError::Device("there is no GPU here, or `CUDA_VISIBLE_DEVICES` hides it".into()));
        }
        let device = result::device::get(0).map_err(failed)?;
        // SAFETY: the device is there; what is retained here is released once, in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed)?;
        let module = std::ptr::null_mut();
        let mut cuda = Cuda { device, context, module, kernels: vec![], processors: 1, blocks: vec![] };
        cuda.bind()?;
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        // SAFETY: as above.
        cuda.processors = unsafe { result::device::get_attribute(device, count) }.map_err(failed)?.max(1) as u64;
        cuda.module = load(ptx)?;
        let kernel = |name: &String| {
            let symbol = CString::new(name.as_str()).map_err(|_| RuntimeError::Device(format!("kernel `{name}`")))?;
            // SAFETY: the module has been loaded.
            let function = unsafe { result::module::get_function(cuda.module, symbol) };
            let function = function.map_err(|_| RuntimeError::Device(format!("the PTX lacks the kernel `{name}`")))?;
            let most = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
            // SAFETY: the function is of that module. Kernels name the one size of block that they are written for.
            let threads = unsafe { result::function::get_function_attribute(function, most) }.map_err(failed)?;
            Ok(Kernel { function, threads: threads as u64 })
        };
        cuda.kernels = names.iter().map(kernel).collect::<Result<_, RuntimeError>>()?;
        Ok(cuda)
    }

    /// Makes the context this thread's.
    fn bind(&self) -> Result<(), RuntimeError> {
        // SAFETY: it is retained as long as `self` lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed)
    }

    fn memory(&self, block: Block) -> Memory {
        self.blocks[block.0].expect("a block in use")
    }

    fn address(&self, Place { block, start, length }: Place) -> CUdeviceptr {
        let memory = self.memory(block);
        assert!(start + length <= memory.length, "{length} numbers from {start} on of {}", memory.length);
        memory.start + 4 * start as u64
    }

    fn launch(&self, job: &Job) -> Result<(), RuntimeError> {
        let kernel = &self.kernels[job.launch.kernel];
        let addresses = job.places.iter().map(|&place| self.address(place));
        let mut arguments: Vec<u64> = addresses.chain(job.extents.iter().copied()).chain([job.units]).collect();
        let mut pointers: Vec<*mut c_void> = arguments.iter_mut().map(|x| (x as *mut u64).cast()).collect();
        let blocks = job.units.div_ceil(kernel.threads / WARP).min(BLOCKS * self.processors);
        let (grid, block) = ((blocks as c_uint, 1, 1), (kernel.threads as c_uint, 1, 1));
        // SAFETY: the manifest names the kernel's arguments in order, all of 64 bits, and the driver copies them;
        // every buffer lies within its block.
        let launched =
            unsafe { result::launch_kernel(kernel.function, grid, block, 0, std::ptr::null_mut(), &mut pointers) };
        launched.map_err(failed)
    }

    fn wait(&self) -> Result<(), RuntimeError> {
        result::ctx::synchronize().map_err(failed)
    }
}

/// Compiles PTX for the GPU at hand.
fn load(ptx: &str) -> Result<sys::CUmodule, RuntimeError> {
    let text = CString::new(ptx).map_err(|_| RuntimeError::Device("the PTX is no text".into()))?;
    let mut log = vec![0u8; LOG];
    let mut options = [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values = [log.as_mut_ptr().cast::<c_void>(), LOG as *mut c_void];
    let mut module = std::ptr::null_mut();
    // SAFETY: the text ends with a zero, the log has the size that is said, and both outlive the call.
    let loaded = unsafe {
        sys::cuModuleLoadDataEx(&mut module, text.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr())
    };
    loaded.result().map_err(|e| {
        let said = String::from_utf8_lossy(&log).trim_end_matches('\0').to_string();
        RuntimeError::Device(format!("the driver does not take the kernels: {:?}\n{said}", e.0))
    })?;
    Ok(module)
}

impl Backend for Cuda {
    fn alloc(&mut self, length: usize) -> Result<Block, RuntimeError> {
        self.bind()?;
        // The driver has no memory of no bytes.
        let bytes = 4 * length.max(1);
        let gigabytes = bytes as f64 / f64::from(1 << 30);
        let none = |_| {
            RuntimeError::Device(format!(
                "{gigabytes:.1} GiB of the GPU's memory cannot be had; make the batch smaller"
            ))
        };
        // SAFETY: it is freed once, in `free` or in `drop`, and is as long as what is written.
        let start = unsafe { result::malloc_sync(bytes) }.map_err(none)?;
        self.blocks.push(Some(Memory { start, length }));
        // SAFETY: as above.
        unsafe { result::memset_d8_sync(start, 0, bytes) }.map_err(failed)?;
        Ok(Block(self.blocks.len() - 1))
    }

    fn free(&mut self, block: Block) {
        if let Some(memory) = self.blocks[block.0].take()
            && self.bind().is_ok()
        {
            // SAFETY: it has been allocated and not been freed; the driver waits for launches that use it. That it may
            // fail says only that the GPU has failed before.
            let _ = unsafe { result::free_sync(memory.start) };
        }
    }

    fn write(&mut self, block: Block, start: usize, words: Words) -> Result<(), RuntimeError> {
        if words.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let to = self.address(Place { block, start, length: words.len() });
        // SAFETY: the block reaches so far.
        let copied = match words {
            Words::Floats(x) => unsafe { result::memcpy_htod_sync(to, x) },
            Words::Ints(x) => unsafe { result::memcpy_htod_sync(to, x) },
        };
        copied.map_err(failed)
    }

    fn read(&self, place: Place) -> Result<Cow<'_, [f32]>, RuntimeError> {
        let mut numbers = vec![0.0f32; place.length];
        if place.length > 0 {
            self.bind()?;
            // SAFETY: the block reaches so far.
            unsafe { result::memcpy_dtoh_sync(&mut numbers, self.address(place)) }.map_err(failed)?;
        }
        Ok(Cow::Owned(numbers))
    }

    fn run(&mut self, jobs: &[Job], mut profile: Option<&mut Profile>) -> Result<(), RuntimeError> {
        self.bind()?;
        for job in jobs {
            for &place in job.poisoned.iter().filter(|place| place.length > 0) {
                // SAFETY: within its block.
                let filled = unsafe { sys::cuMemsetD32_v2(self.address(place), f32::NAN.to_bits(), place.length) };
                filled.result().map_err(failed)?;
            }
            let begun = Instant::now();
            self.launch(job)?;
            if let Some(profile) = profile.as_deref_mut() {
                self.wait()?;
                record(profile, job, begun.elapsed());
            }
        }
        self.wait()
    }

    fn held(&self) -> u64 {
        self.blocks.iter().flatten().map(|memory| 4 * memory.length as u64).sum()
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        (0..self.blocks.len()).for_each(|block| self.free(Block(block)));
        // SAFETY: nothing uses module or context any more. Failing says only that the GPU has failed before.
        unsafe {
            if !self.module.is_null() {
                let _ = result::module::unload(self.module);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
