//! Kernels in PTX on a GPU, by the driver alone: it compiles them for the GPU at hand, and no toolkit is asked for.
//!
//! Jobs go to the null stream, with which every call that is not named asynchronous keeps in order. A batch is copied
//! on a stream of its own, while the null stream is still at the step before.
//!
//! Jobs whose kernels have run in this order before go out as a graph, in one call. The graph is made ready once; where
//! a batch differs, in addresses, extents or the number of blocks, its nodes are told so, which is cheap and leaves a
//! run that has begun alone. So one graph serves batches of every size, and nothing is made ready in the middle of a
//! training.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::{CString, c_uint, c_void};
use std::time::Instant;

use cudarc::driver::result::{self, DriverError, event, graph, stream};
use cudarc::driver::sys::{self, CUdevice_attribute, CUdeviceptr, CUjit_option, CUresult};

use crate::artifact::Workgroup;
use crate::backend::{Backend, Block, Job, Kept, Place, Profile, Words, record};
use crate::device::{self, said};
use crate::error::RuntimeError;

/// Blocks of a launch for each processor of the GPU: enough to fill it with small ones, and then some to share.
const BLOCKS: u64 = 64;
/// Kernels count, and find their way in a buffer, in 32 bits, and now and then a little beyond the end.
const MOST: u64 = (1 << 31) - (1 << 24);
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
    /// By their kernels; none yet of what has run once.
    graphs: HashMap<Vec<usize>, Option<Graph>>,
    nodes: Nodes,
    lane: Lane,
    /// What runs are asked for, one and the one before.
    results: [Slot; 2],
    result: usize,
}

struct Kernel {
    name: String,
    function: sys::CUfunction,
}

#[derive(Clone, Copy)]
struct Memory {
    start: CUdeviceptr,
    length: usize,
}

/// A launch as the driver gets it.
#[derive(Clone, Debug, PartialEq)]
struct Call {
    kernel: usize,
    arguments: Vec<u64>,
    blocks: c_uint,
    /// Of a block.
    threads: c_uint,
}

/// Launches that are ready to run one after the other, and what each was last told.
struct Graph {
    graph: sys::CUgraph,
    ready: sys::CUgraphExec,
    nodes: Vec<(sys::CUgraphNode, Call)>,
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: each is freed once; a run that has begun goes on. Failing says only that the GPU has failed before.
        unsafe {
            if !self.ready.is_null() {
                let _ = graph::exec_destroy(self.ready);
            }
            if !self.graph.is_null() {
                let _ = graph::destroy(self.graph);
            }
        }
    }
}

/// Calls by their first form, which drivers from CUDA 10 on have.
struct Nodes {
    add: AddNode,
    set: SetNode,
}

type NodeParams = sys::CUDA_KERNEL_NODE_PARAMS_v1;
type AddNode = unsafe extern "C" fn(
    *mut sys::CUgraphNode,
    sys::CUgraph,
    *const sys::CUgraphNode,
    usize,
    *const NodeParams,
) -> CUresult;
type SetNode = unsafe extern "C" fn(sys::CUgraphExec, sys::CUgraphNode, *const NodeParams) -> CUresult;

/// Where batches are copied, each by the other of two pieces of pinned memory than the one before.
struct Lane {
    stream: sys::CUstream,
    slots: [Slot; 2],
    turn: usize,
}

struct Slot {
    start: *mut i32,
    length: usize,
    /// What it held has arrived.
    arrived: sys::CUevent,
}

// SAFETY: handles of the driver, which any thread may use once the context is its own; every call sees to that. Pinned
// memory is the backend's alone.
unsafe impl Send for Cuda {}

fn failed(error: DriverError) -> RuntimeError {
    RuntimeError::Device(format!("the GPU failed: {}", said(error)))
}

/// Kernels run after the call that starts them: what goes wrong in one shows when the driver is asked next.
fn late(error: DriverError) -> RuntimeError {
    RuntimeError::Device(format!(
        "the GPU failed in a kernel that had been started before: {}; `peftc train --profile` waits for each kernel, and \
         then names it",
        said(error)
    ))
}

impl Cuda {
    pub fn new(ptx: &str, names: &[String]) -> Result<Self, RuntimeError> {
        device::gpus().map_err(|e| RuntimeError::Device(e.to_string()))?;
        let nodes = Nodes { add: symbol("cuGraphAddKernelNode")?, set: symbol("cuGraphExecKernelNodeSetParams")? };
        let device = result::device::get(0).map_err(failed)?;
        // SAFETY: the device is there; what is retained here is released once, in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed)?;
        let mut cuda = Cuda {
            device,
            context,
            module: std::ptr::null_mut(),
            kernels: vec![],
            processors: 1,
            blocks: vec![],
            graphs: HashMap::new(),
            nodes,
            lane: Lane::default(),
            results: Default::default(),
            result: 0,
        };
        cuda.bind()?;
        cuda.lane.stream = stream::create(stream::StreamKind::NonBlocking).map_err(failed)?;
        for slot in cuda.lane.slots.iter_mut().chain(&mut cuda.results) {
            slot.arrived = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed)?;
        }
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        // SAFETY: as above.
        cuda.processors = unsafe { result::device::get_attribute(device, count) }.map_err(failed)?.max(1) as u64;
        cuda.module = load(ptx)?;
        let kernel = |name: &String| {
            let symbol = CString::new(name.as_str()).map_err(|_| RuntimeError::Device(format!("kernel `{name}`")))?;
            // SAFETY: the module has been loaded.
            let function = unsafe { result::module::get_function(cuda.module, symbol) };
            let function = function.map_err(|_| RuntimeError::Device(format!("the PTX lacks the kernel `{name}`")))?;
            Ok(Kernel { name: name.clone(), function })
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

    fn call(&self, job: &Job) -> Result<Call, RuntimeError> {
        let lengths = job.places.iter().map(|place| place.length as u64);
        if let Some(n) = lengths.chain(job.extents.iter().copied()).chain([job.units]).find(|&n| n >= MOST) {
            let op = &job.launch.op;
            return Err(RuntimeError::Device(format!(
                "`{op}` counts to {n} for this batch, and kernels on a GPU to {MOST}: take smaller batches"
            )));
        }
        let addresses = job.places.iter().map(|&place| self.address(place));
        let arguments = addresses.chain(job.extents.iter().copied()).chain([job.units]).collect();
        let Workgroup { units, threads } = job.launch.group;
        let blocks = job.units.div_ceil(units).min(BLOCKS * self.processors) as c_uint;
        Ok(Call { kernel: job.launch.kernel, arguments, blocks, threads: threads as c_uint })
    }

    fn launch(&self, call: &Call) -> Result<(), RuntimeError> {
        let kernel = &self.kernels[call.kernel];
        let mut pointers = pointers(call);
        let (grid, block) = ((call.blocks, 1, 1), (call.threads, 1, 1));
        // SAFETY: the manifest names the kernel's arguments in order, and the driver copies them, of a number the lower
        // half; every buffer lies within its block.
        let launched =
            unsafe { result::launch_kernel(kernel.function, grid, block, 0, std::ptr::null_mut(), &mut pointers) };
        launched.map_err(|e| self.refused(call, e))
    }

    fn refused(&self, call: &Call, error: DriverError) -> RuntimeError {
        let (name, blocks) = (&self.kernels[call.kernel].name, call.blocks);
        RuntimeError::Device(format!("the GPU does not start `{name}` in {blocks} blocks: {}", said(error)))
    }

    /// What a node of a graph is told; `pointers` are to the call's arguments.
    fn params(&self, call: &Call, pointers: &mut [*mut c_void]) -> NodeParams {
        let kernel = &self.kernels[call.kernel];
        NodeParams {
            func: kernel.function,
            gridDimX: call.blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: call.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            kernelParams: pointers.as_mut_ptr(),
            extra: std::ptr::null_mut(),
        }
    }

    /// Calls, ready to run one after the other.
    fn graph(&self, calls: &[Call]) -> Result<Graph, RuntimeError> {
        let (null, ready) = (std::ptr::null_mut(), std::ptr::null_mut());
        let mut graph = Graph { graph: null, ready, nodes: vec![] };
        // SAFETY: no flags.
        unsafe { sys::cuGraphCreate(&mut graph.graph, 0) }.result().map_err(failed)?;
        for call in calls {
            let before = graph.nodes.last().map(|(node, _)| *node);
            let (mut node, mut pointers) = (std::ptr::null_mut(), pointers(call));
            let params = self.params(call, &mut pointers);
            // SAFETY: as a launch's; the driver copies the arguments.
            let added = unsafe {
                (self.nodes.add)(&mut node, graph.graph, before.as_slice().as_ptr(), before.iter().len(), &params)
            };
            added.result().map_err(|e| self.refused(call, e))?;
            graph.nodes.push((node, call.clone()));
        }
        // SAFETY: the graph is whole.
        graph.ready = unsafe { graph::instantiate(graph.graph, sys::CUgraphInstantiate_flags(0)) }.map_err(failed)?;
        Ok(graph)
    }

    /// Runs a graph of such kernels with these arguments.
    fn replay(&self, graph: &mut Graph, calls: Vec<Call>) -> Result<(), RuntimeError> {
        for ((node, known), call) in graph.nodes.iter_mut().zip(calls) {
            if *known != call {
                let mut pointers = pointers(&call);
                let params = self.params(&call, &mut pointers);
                // SAFETY: as a launch's; a run of the graph that has begun keeps what it was told.
                let told = unsafe { (self.nodes.set)(graph.ready, *node, &params) };
                told.result().map_err(|e| self.refused(&call, e))?;
                *known = call;
            }
        }
        // SAFETY: it is ready.
        unsafe { graph::launch(graph.ready, std::ptr::null_mut()) }.map_err(late)
    }
}

/// To each argument.
fn pointers(call: &Call) -> Vec<*mut c_void> {
    // The driver reads through them alone.
    call.arguments.iter().map(|x| (x as *const u64).cast_mut().cast()).collect()
}

/// A call of the driver that `cudarc` knows in a later form alone.
fn symbol<T: Copy>(name: &str) -> Result<T, RuntimeError> {
    // SAFETY: the library has been loaded, and `T` is the call's type.
    let found = unsafe { sys::culib().get::<T>(name.as_bytes()) };
    found.map(|call| *call).map_err(|_| RuntimeError::Device(format!("the driver lacks `{name}`: update it")))
}

impl Default for Lane {
    fn default() -> Self {
        Lane { stream: std::ptr::null_mut(), slots: Default::default(), turn: 0 }
    }
}

impl Default for Slot {
    fn default() -> Self {
        Slot { start: std::ptr::null_mut(), length: 0, arrived: std::ptr::null_mut() }
    }
}

impl Slot {
    /// Room for so many words, once what it held has arrived.
    fn reserve(&mut self, length: usize) -> Result<(), DriverError> {
        // SAFETY: the event is there; an event that nothing waits for has happened.
        unsafe { event::synchronize(self.arrived) }?;
        if self.length < length {
            // A little more than what is asked for: the next batch may be a little larger.
            let length = length.next_power_of_two();
            // SAFETY: nothing is being copied from it, and it is freed once.
            unsafe {
                if !self.start.is_null() {
                    let old = std::mem::replace(&mut self.start, std::ptr::null_mut());
                    self.length = 0;
                    result::free_host(old.cast())?;
                }
                self.start = result::malloc_host(4 * length, 0)?.cast();
            }
            self.length = length;
        }
        Ok(())
    }
}

/// Why there are not so many bytes.
fn none(bytes: usize, error: DriverError) -> RuntimeError {
    if error.0 != CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        return late(error);
    }
    let Ok((free, all)) = result::mem_get_info() else { return failed(error) };
    let gigabytes = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    RuntimeError::Memory {
        wanted: bytes as u64,
        free: Some(free as u64),
        why: format!("of the GPU's {:.2} GiB {:.2} are free", gigabytes(all), gigabytes(free)),
        mend: "the weights alone need that; take a GPU with more memory, or end what else runs on it".into(),
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
        let bytes = length.max(1).saturating_mul(4);
        // SAFETY: it is freed once, in `free` or in `drop`, and is as long as what is written.
        let start = unsafe { result::malloc_sync(bytes) }.map_err(|e| none(bytes, e))?;
        self.blocks.push(Some(Memory { start, length }));
        // SAFETY: as above.
        unsafe { result::memset_d8_sync(start, 0, bytes) }.map_err(failed)?;
        // The host does not wait for zeros; a copy on another stream must.
        self.wait()?;
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
        copied.map_err(late)
    }

    fn send(&mut self, block: Block, words: Words) -> Result<(), RuntimeError> {
        if words.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let to = self.address(Place { block, start: 0, length: words.len() });
        self.lane.turn ^= 1;
        let Lane { stream, slots, turn } = &mut self.lane;
        let slot = &mut slots[*turn];
        slot.reserve(words.len()).map_err(late)?;
        let from = match words {
            Words::Floats(x) => x.as_ptr().cast(),
            Words::Ints(x) => x.as_ptr(),
        };
        // SAFETY: both are so long, and what the slot holds stays until it has arrived.
        let sent = unsafe {
            slot.start.copy_from_nonoverlapping(from, words.len());
            let held = std::slice::from_raw_parts(slot.start, words.len());
            result::memcpy_htod_async(to, held, *stream)
                .and_then(|()| event::record(slot.arrived, *stream))
                // What is started from here on waits for it.
                .and_then(|()| {
                    let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                    stream::wait_event(std::ptr::null_mut(), slot.arrived, flags)
                })
        };
        sent.map_err(late)
    }

    fn read(&self, place: Place) -> Result<Cow<'_, [f32]>, RuntimeError> {
        let mut numbers = vec![0.0f32; place.length];
        if place.length > 0 {
            self.bind()?;
            // SAFETY: the block reaches so far.
            unsafe { result::memcpy_dtoh_sync(&mut numbers, self.address(place)) }.map_err(late)?;
        }
        Ok(Cow::Owned(numbers))
    }

    fn overlaps(&self) -> bool {
        true
    }

    fn keep(&mut self, places: &[Place]) -> Result<Kept, RuntimeError> {
        self.bind()?;
        let from: Vec<(CUdeviceptr, usize)> = places.iter().map(|&p| (self.address(p), p.length)).collect();
        let length = from.iter().map(|(_, length)| length).sum();
        self.result ^= 1;
        let slot = &mut self.results[self.result];
        slot.reserve(length).map_err(late)?;
        let mut at = 0;
        for (from, length) in from {
            // SAFETY: the slot is so long, and what is copied there stays until the event has happened; blocks reach so far.
            let sent = unsafe {
                let to = std::slice::from_raw_parts_mut(slot.start.add(at), length);
                result::memcpy_dtoh_async(to, from, std::ptr::null_mut())
            };
            sent.map_err(late)?;
            at += length;
        }
        // SAFETY: the event is there.
        unsafe { event::record(slot.arrived, std::ptr::null_mut()) }.map_err(late)?;
        Ok(Kept::Coming { slot: self.result, length })
    }

    fn kept(&mut self, kept: Kept) -> Result<Vec<f32>, RuntimeError> {
        let Kept::Coming { slot, length } = kept else { unreachable!("another backend's") };
        self.bind()?;
        let slot = &self.results[slot];
        // SAFETY: the event is there, and the slot is so long.
        unsafe { event::synchronize(slot.arrived) }.map_err(late)?;
        let words = unsafe { std::slice::from_raw_parts(slot.start, length) };
        Ok(words.iter().map(|&word| f32::from_bits(word as u32)).collect())
    }

    fn run(&mut self, jobs: &[Job], mut profile: Option<&mut Profile>) -> Result<(), RuntimeError> {
        self.bind()?;
        let calls: Vec<Call> = jobs.iter().map(|job| self.call(job)).collect::<Result<_, _>>()?;
        if profile.is_none() && jobs.len() > 1 && jobs.iter().all(|job| job.poisoned.is_empty()) {
            let kernels: Vec<usize> = calls.iter().map(|call| call.kernel).collect();
            if let Some(known) = self.graphs.remove(&kernels) {
                let mut graph = known.map_or_else(|| self.graph(&calls), Ok)?;
                let ran = self.replay(&mut graph, calls);
                self.graphs.insert(kernels, Some(graph));
                return ran;
            }
            // What runs only once is not worth a graph.
            self.graphs.insert(kernels, None);
        }
        for (job, call) in jobs.iter().zip(&calls) {
            for &place in job.poisoned.iter().filter(|place| place.length > 0) {
                // SAFETY: within its block.
                let filled = unsafe { sys::cuMemsetD32_v2(self.address(place), f32::NAN.to_bits(), place.length) };
                filled.result().map_err(failed)?;
            }
            let begun = Instant::now();
            self.launch(call)?;
            if let Some(profile) = profile.as_deref_mut() {
                result::ctx::synchronize().map_err(|e| {
                    let (name, op) = (&self.kernels[call.kernel].name, &job.launch.op);
                    RuntimeError::Device(format!("the GPU failed in `{name}`, which computes `{op}`: {}", said(e)))
                })?;
                record(profile, job, begun.elapsed());
            }
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<(), RuntimeError> {
        self.bind()?;
        result::ctx::synchronize().map_err(late)
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
            let _ = self.bind().and_then(|()| self.wait());
            self.graphs.clear();
            for slot in self.lane.slots.iter().chain(&self.results) {
                if !slot.start.is_null() {
                    let _ = result::free_host(slot.start.cast());
                }
                if !slot.arrived.is_null() {
                    let _ = event::destroy(slot.arrived);
                }
            }
            if !self.lane.stream.is_null() {
                let _ = stream::destroy(self.lane.stream);
            }
            if !self.module.is_null() {
                let _ = result::module::unload(self.module);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
