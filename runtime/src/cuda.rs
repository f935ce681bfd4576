//! The GPU backend: it runs PTX kernels through the CUDA driver, which compiles them for the GPU at hand. The CUDA
//! toolkit is not needed.
//!
//! Launches go to the null stream, which every synchronous driver call orders itself with. Batches are uploaded on a
//! second stream, so that the copy overlaps with the step before.
//!
//! A sequence of kernels that has run before is launched as one CUDA graph. The graph is instantiated once; where a
//! later batch differs in addresses, extents or grid sizes, the parameters of its nodes are updated, which is cheap and
//! does not affect a run in flight. One graph therefore serves batches of every size, and no graph is instantiated in
//! the middle of training.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::{CString, c_uint, c_void};
use std::time::Instant;

use cudarc::driver::result::{self, DriverError, event, graph, stream};
use cudarc::driver::sys::{self, CUdevice_attribute, CUdeviceptr, CUjit_option, CUresult};

use crate::artifact::Workgroup;
use crate::backend::{Allocation, Backend, BoundLaunch, MemoryRange, PendingRead, Profile, Words, record};
use crate::device::{self, describe};
use crate::error::RuntimeError;

/// The largest number of thread blocks of a launch, per multiprocessor: enough to fill it with small blocks and to
/// balance the load.
const BLOCKS_PER_MULTIPROCESSOR: u64 = 64;
/// Kernels count units and address elements with 32-bit integers, and may compute indices a little beyond the end of a
/// buffer.
const COUNT_LIMIT: u64 = (1 << 31) - (1 << 24);
/// Bytes reserved for the driver's compiler messages about PTX that it rejects.
const LOG_BYTES: usize = 8192;

/// The first GPU, with a loaded module of kernels.
pub struct Cuda {
    device: sys::CUdevice,
    context: sys::CUcontext,
    module: sys::CUmodule,
    kernels: Vec<Kernel>,
    multiprocessors: u64,
    allocations: Vec<Option<DeviceAllocation>>,
    /// CUDA graphs by their kernels; `None` for a sequence of kernels that has run only once.
    graphs: HashMap<Vec<usize>, Option<Graph>>,
    graph_functions: GraphFunctions,
    copy: CopyStream,
    /// Pinned memory of pending reads: the last one and the one before.
    readbacks: [PinnedBuffer; 2],
    /// Index of the last one.
    readback: usize,
}

/// A loaded kernel.
struct Kernel {
    name: String,
    function: sys::CUfunction,
}

/// Device memory of one allocation.
#[derive(Clone, Copy)]
struct DeviceAllocation {
    start: CUdeviceptr,
    /// Number of 4-byte words.
    length: usize,
}

/// A launch in the form that the driver takes.
#[derive(Clone, Debug, PartialEq)]
struct Call {
    /// Index into [`Cuda::kernels`].
    kernel: usize,
    /// Addresses, extents and the number of units.
    arguments: Vec<u64>,
    /// Thread blocks of the grid.
    blocks: c_uint,
    /// Threads of each block.
    threads: c_uint,
}

/// An instantiated CUDA graph of launches in order, and the parameters that each node has now.
struct Graph {
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
    nodes: Vec<(sys::CUgraphNode, Call)>,
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: each handle is destroyed once, and a run in flight is not affected. An error here only repeats that
        // the GPU has failed before.
        unsafe {
            if !self.executable.is_null() {
                let _ = graph::exec_destroy(self.executable);
            }
            if !self.graph.is_null() {
                let _ = graph::destroy(self.graph);
            }
        }
    }
}

/// Driver functions in their first version, which drivers have since CUDA 10.
struct GraphFunctions {
    add_node: AddNode,
    set_params: SetNodeParams,
}

type NodeParams = sys::CUDA_KERNEL_NODE_PARAMS_v1;
type AddNode = unsafe extern "C" fn(
    *mut sys::CUgraphNode,
    sys::CUgraph,
    *const sys::CUgraphNode,
    usize,
    *const NodeParams,
) -> CUresult;
type SetNodeParams = unsafe extern "C" fn(sys::CUgraphExec, sys::CUgraphNode, *const NodeParams) -> CUresult;

/// The stream that uploads batches, through two pinned buffers in turn.
struct CopyStream {
    stream: sys::CUstream,
    buffers: [PinnedBuffer; 2],
    /// Index of the buffer that was used last.
    current: usize,
}

/// A buffer in pinned host memory, which asynchronous copies need.
struct PinnedBuffer {
    start: *mut i32,
    /// Number of 4-byte words.
    length: usize,
    /// The event that is recorded after the last copy from or to this buffer.
    copied: sys::CUevent,
}

// SAFETY: any thread may use the driver's handles once the context is current, and every call makes it current. Only
// the backend uses the pinned memory.
unsafe impl Send for Cuda {}

fn failed(error: DriverError) -> RuntimeError {
    RuntimeError::Device(format!("the GPU failed: {}", describe(error)))
}

/// A kernel runs after the call that launches it, so its failure is reported by a later driver call.
fn failed_earlier(error: DriverError) -> RuntimeError {
    RuntimeError::Device(format!(
        "the GPU failed in a kernel that had been started before: {}; `peftc train --profile` waits for each kernel, and \
         then names it",
        describe(error)
    ))
}

impl Cuda {
    /// Loads the kernels `names` from PTX text onto the first GPU.
    ///
    /// # Errors
    ///
    /// If there is no usable driver or GPU, or the driver rejects the PTX or does not find a kernel in it.
    pub fn new(ptx: &str, names: &[String]) -> Result<Self, RuntimeError> {
        device::gpus().map_err(|e| RuntimeError::Device(e.to_string()))?;
        let graph_functions = GraphFunctions {
            add_node: symbol("cuGraphAddKernelNode")?,
            set_params: symbol("cuGraphExecKernelNodeSetParams")?,
        };
        let device = result::device::get(0).map_err(failed)?;
        // SAFETY: the device exists; the context that is retained here is released once, in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed)?;
        let mut cuda = Cuda {
            device,
            context,
            module: std::ptr::null_mut(),
            kernels: vec![],
            multiprocessors: 1,
            allocations: vec![],
            graphs: HashMap::new(),
            graph_functions,
            copy: CopyStream::default(),
            readbacks: Default::default(),
            readback: 0,
        };
        cuda.bind()?;
        cuda.copy.stream = stream::create(stream::StreamKind::NonBlocking).map_err(failed)?;
        for pinned in cuda.copy.buffers.iter_mut().chain(&mut cuda.readbacks) {
            pinned.copied = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed)?;
        }
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        // SAFETY: the device exists.
        cuda.multiprocessors = unsafe { result::device::get_attribute(device, count) }.map_err(failed)?.max(1) as u64;
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

    /// Makes the context current in this thread.
    fn bind(&self) -> Result<(), RuntimeError> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed)
    }

    fn memory(&self, allocation: Allocation) -> DeviceAllocation {
        self.allocations[allocation.0].expect("an allocation in use")
    }

    /// The device address of a range, checked against its allocation.
    fn address(&self, MemoryRange { allocation, start, length }: MemoryRange) -> CUdeviceptr {
        let memory = self.memory(allocation);
        assert!(start + length <= memory.length, "{length} numbers from {start} on of {}", memory.length);
        memory.start + 4 * start as u64
    }

    /// Translates a bound launch to a driver call.
    fn driver_call(&self, bound: &BoundLaunch) -> Result<Call, RuntimeError> {
        let lengths = bound.ranges.iter().map(|range| range.length as u64);
        if let Some(n) = lengths.chain(bound.extents.iter().copied()).chain([bound.units]).find(|&n| n >= COUNT_LIMIT) {
            let op = &bound.launch.op;
            return Err(RuntimeError::Device(format!(
                "`{op}` has {n} elements or units for this batch, and GPU kernels count only to {COUNT_LIMIT}: make \
                 the batches smaller"
            )));
        }
        let addresses = bound.ranges.iter().map(|&range| self.address(range));
        let arguments = addresses.chain(bound.extents.iter().copied()).chain([bound.units]).collect();
        let Workgroup { units, threads } = bound.launch.group;
        let blocks = bound.units.div_ceil(units).min(BLOCKS_PER_MULTIPROCESSOR * self.multiprocessors) as c_uint;
        Ok(Call { kernel: bound.launch.kernel, arguments, blocks, threads: threads as c_uint })
    }

    fn launch(&self, call: &Call) -> Result<(), RuntimeError> {
        let kernel = &self.kernels[call.kernel];
        let mut pointers = pointers(call);
        let (grid, block) = ((call.blocks, 1, 1), (call.threads, 1, 1));
        // SAFETY: the manifest lists the kernel's arguments in order, and the driver copies them (of a 32-bit argument
        // the lower half); every buffer is within its allocation.
        let launched =
            unsafe { result::launch_kernel(kernel.function, grid, block, 0, std::ptr::null_mut(), &mut pointers) };
        launched.map_err(|e| self.refused(call, e))
    }

    fn refused(&self, call: &Call, error: DriverError) -> RuntimeError {
        let (name, blocks) = (&self.kernels[call.kernel].name, call.blocks);
        RuntimeError::Device(format!("the GPU does not start `{name}` in {blocks} blocks: {}", describe(error)))
    }

    /// Parameters of a graph node; `pointers` point to the call's arguments.
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

    /// Builds and instantiates a graph whose nodes execute in order.
    fn build_graph(&self, calls: &[Call]) -> Result<Graph, RuntimeError> {
        let (null, executable) = (std::ptr::null_mut(), std::ptr::null_mut());
        let mut graph = Graph { graph: null, executable, nodes: vec![] };
        // SAFETY: no flags are set.
        unsafe { sys::cuGraphCreate(&mut graph.graph, 0) }.result().map_err(failed)?;
        for call in calls {
            let before = graph.nodes.last().map(|(node, _)| *node);
            let (mut node, mut pointers) = (std::ptr::null_mut(), pointers(call));
            let params = self.params(call, &mut pointers);
            // SAFETY: the same conditions as in `launch` hold; the driver copies the arguments.
            let added = unsafe {
                (self.graph_functions.add_node)(
                    &mut node,
                    graph.graph,
                    before.as_slice().as_ptr(),
                    before.iter().len(),
                    &params,
                )
            };
            added.result().map_err(|e| self.refused(call, e))?;
            graph.nodes.push((node, call.clone()));
        }
        // SAFETY: the graph is complete.
        graph.executable =
            unsafe { graph::instantiate(graph.graph, sys::CUgraphInstantiate_flags(0)) }.map_err(failed)?;
        Ok(graph)
    }

    /// Launches a graph of the same kernels with these arguments.
    fn launch_graph(&self, graph: &mut Graph, calls: Vec<Call>) -> Result<(), RuntimeError> {
        for ((node, node_call), call) in graph.nodes.iter_mut().zip(calls) {
            if *node_call != call {
                let mut pointers = pointers(&call);
                let params = self.params(&call, &mut pointers);
                // SAFETY: the same conditions as in `launch` hold; a run of the graph in flight keeps its own
                // parameters.
                let updated = unsafe { (self.graph_functions.set_params)(graph.executable, *node, &params) };
                updated.result().map_err(|e| self.refused(&call, e))?;
                *node_call = call;
            }
        }
        // SAFETY: the graph has been instantiated.
        unsafe { graph::launch(graph.executable, std::ptr::null_mut()) }.map_err(failed_earlier)
    }
}

/// Pointers to the arguments, as the driver's launch functions take them.
fn pointers(call: &Call) -> Vec<*mut c_void> {
    // The driver only reads through these pointers.
    call.arguments.iter().map(|x| (x as *const u64).cast_mut().cast()).collect()
}

/// Looks up a driver function of which `cudarc` binds only a later version.
fn symbol<T: Copy>(name: &str) -> Result<T, RuntimeError> {
    // SAFETY: the driver library has been loaded, and `T` is the type of the function.
    let found = unsafe { sys::culib().get::<T>(name.as_bytes()) };
    found.map(|call| *call).map_err(|_| RuntimeError::Device(format!("the driver lacks `{name}`: update it")))
}

impl Default for CopyStream {
    fn default() -> Self {
        CopyStream { stream: std::ptr::null_mut(), buffers: Default::default(), current: 0 }
    }
}

impl Default for PinnedBuffer {
    fn default() -> Self {
        PinnedBuffer { start: std::ptr::null_mut(), length: 0, copied: std::ptr::null_mut() }
    }
}

impl PinnedBuffer {
    /// Ensures room for `length` words, after the last copy from or to this buffer has completed.
    fn reserve(&mut self, length: usize) -> Result<(), DriverError> {
        // SAFETY: the event exists; an event that was never recorded counts as complete.
        unsafe { event::synchronize(self.copied) }?;
        if self.length < length {
            // The size is rounded up to a power of two, since the next batch may be a little larger.
            let length = length.next_power_of_two();
            // SAFETY: no copy uses the buffer, and it is freed once.
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

/// The error for an allocation of `bytes` bytes that failed.
fn out_of_memory(bytes: usize, error: DriverError) -> RuntimeError {
    if error.0 != CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        return failed_earlier(error);
    }
    let Ok((free, all)) = result::mem_get_info() else { return failed(error) };
    let gigabytes = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    RuntimeError::Memory {
        wanted: bytes as u64,
        free: Some(free as u64),
        why: format!("of the GPU's {:.2} GiB {:.2} are free", gigabytes(all), gigabytes(free)),
        remedy: "the weights alone need that; take a GPU with more memory, or end what else runs on it".into(),
    }
}

/// Compiles PTX for the GPU at hand and loads it.
fn load(ptx: &str) -> Result<sys::CUmodule, RuntimeError> {
    let text = CString::new(ptx).map_err(|_| RuntimeError::Device("the PTX is no text".into()))?;
    let mut log = vec![0u8; LOG_BYTES];
    let mut options = [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values = [log.as_mut_ptr().cast::<c_void>(), LOG_BYTES as *mut c_void];
    let mut module = std::ptr::null_mut();
    // SAFETY: the text ends with a NUL, the log has the given size, and both outlive the call.
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
    fn alloc(&mut self, length: usize) -> Result<Allocation, RuntimeError> {
        self.bind()?;
        // The driver does not allocate 0 bytes.
        let bytes = length.max(1).saturating_mul(4);
        // SAFETY: the memory is freed once, in `free` or in `drop`.
        let start = unsafe { result::malloc_sync(bytes) }.map_err(|e| out_of_memory(bytes, e))?;
        self.allocations.push(Some(DeviceAllocation { start, length }));
        // SAFETY: the allocation has `bytes` bytes.
        unsafe { result::memset_d8_sync(start, 0, bytes) }.map_err(failed)?;
        // `memset` does not block the host, and copies on the other stream must come after it.
        self.wait()?;
        Ok(Allocation(self.allocations.len() - 1))
    }

    fn free(&mut self, allocation: Allocation) {
        if let Some(memory) = self.allocations[allocation.0].take()
            && self.bind().is_ok()
        {
            // SAFETY: the memory is allocated and not freed yet; the driver first waits for launches that use it. An
            // error here only repeats that the GPU has failed before.
            let _ = unsafe { result::free_sync(memory.start) };
        }
    }

    fn write(&mut self, allocation: Allocation, start: usize, words: Words) -> Result<(), RuntimeError> {
        if words.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let to = self.address(MemoryRange { allocation, start, length: words.len() });
        // SAFETY: `address` has checked that the range is within its allocation.
        let copied = match words {
            Words::Floats(x) => unsafe { result::memcpy_htod_sync(to, x) },
            Words::Ints(x) => unsafe { result::memcpy_htod_sync(to, x) },
        };
        copied.map_err(failed_earlier)
    }

    fn write_async(&mut self, allocation: Allocation, words: Words) -> Result<(), RuntimeError> {
        if words.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let to = self.address(MemoryRange { allocation, start: 0, length: words.len() });
        self.copy.current ^= 1;
        let CopyStream { stream, buffers, current } = &mut self.copy;
        let pinned = &mut buffers[*current];
        pinned.reserve(words.len()).map_err(failed_earlier)?;
        let from = match words {
            Words::Floats(x) => x.as_ptr().cast(),
            Words::Ints(x) => x.as_ptr(),
        };
        // SAFETY: both buffers hold `words.len()` words, and the pinned one is not changed until the copy has
        // completed.
        let sent = unsafe {
            pinned.start.copy_from_nonoverlapping(from, words.len());
            let held = std::slice::from_raw_parts(pinned.start, words.len());
            result::memcpy_htod_async(to, held, *stream)
                .and_then(|()| event::record(pinned.copied, *stream))
                // Launches started from here on wait for the copy.
                .and_then(|()| {
                    let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                    stream::wait_event(std::ptr::null_mut(), pinned.copied, flags)
                })
        };
        sent.map_err(failed_earlier)
    }

    fn read(&self, range: MemoryRange) -> Result<Cow<'_, [f32]>, RuntimeError> {
        let mut numbers = vec![0.0f32; range.length];
        if range.length > 0 {
            self.bind()?;
            // SAFETY: `address` has checked that the range is within its allocation.
            unsafe { result::memcpy_dtoh_sync(&mut numbers, self.address(range)) }.map_err(failed_earlier)?;
        }
        Ok(Cow::Owned(numbers))
    }

    fn overlaps(&self) -> bool {
        true
    }

    fn begin_read(&mut self, ranges: &[MemoryRange]) -> Result<PendingRead, RuntimeError> {
        self.bind()?;
        let from: Vec<(CUdeviceptr, usize)> = ranges.iter().map(|&p| (self.address(p), p.length)).collect();
        let length = from.iter().map(|(_, length)| length).sum();
        self.readback ^= 1;
        let pinned = &mut self.readbacks[self.readback];
        pinned.reserve(length).map_err(failed_earlier)?;
        let mut at = 0;
        for (from, length) in from {
            // SAFETY: the pinned buffer has `length` words in all and is not reused before the event; ranges are within
            // allocations.
            let sent = unsafe {
                let to = std::slice::from_raw_parts_mut(pinned.start.add(at), length);
                result::memcpy_dtoh_async(to, from, std::ptr::null_mut())
            };
            sent.map_err(failed_earlier)?;
            at += length;
        }
        // SAFETY: the event exists.
        unsafe { event::record(pinned.copied, std::ptr::null_mut()) }.map_err(failed_earlier)?;
        Ok(PendingRead::InFlight { readback: self.readback, length })
    }

    fn finish_read(&mut self, read: PendingRead) -> Result<Vec<f32>, RuntimeError> {
        let PendingRead::InFlight { readback, length } = read else { unreachable!("another backend's") };
        self.bind()?;
        let pinned = &self.readbacks[readback];
        // SAFETY: the event exists, and the buffer holds `length` words.
        unsafe { event::synchronize(pinned.copied) }.map_err(failed_earlier)?;
        let words = unsafe { std::slice::from_raw_parts(pinned.start, length) };
        Ok(words.iter().map(|&word| f32::from_bits(word as u32)).collect())
    }

    fn run(&mut self, launches: &[BoundLaunch], mut profile: Option<&mut Profile>) -> Result<(), RuntimeError> {
        self.bind()?;
        let calls: Vec<Call> = launches.iter().map(|bound| self.driver_call(bound)).collect::<Result<_, _>>()?;
        if profile.is_none() && launches.len() > 1 && launches.iter().all(|bound| bound.poisoned.is_empty()) {
            let kernels: Vec<usize> = calls.iter().map(|call| call.kernel).collect();
            if let Some(known) = self.graphs.remove(&kernels) {
                let mut graph = known.map_or_else(|| self.build_graph(&calls), Ok)?;
                let ran = self.launch_graph(&mut graph, calls);
                self.graphs.insert(kernels, Some(graph));
                return ran;
            }
            // A graph pays off only for a sequence of kernels that runs again.
            self.graphs.insert(kernels, None);
        }
        for (bound, call) in launches.iter().zip(&calls) {
            for &range in bound.poisoned.iter().filter(|range| range.length > 0) {
                // SAFETY: `address` has checked that the range is within its allocation.
                let filled = unsafe { sys::cuMemsetD32_v2(self.address(range), f32::NAN.to_bits(), range.length) };
                filled.result().map_err(failed)?;
            }
            let begun = Instant::now();
            self.launch(call)?;
            if let Some(profile) = profile.as_deref_mut() {
                result::ctx::synchronize().map_err(|e| {
                    let (name, op) = (&self.kernels[call.kernel].name, &bound.launch.op);
                    RuntimeError::Device(format!("the GPU failed in `{name}`, which computes `{op}`: {}", describe(e)))
                })?;
                record(profile, bound, begun.elapsed());
            }
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<(), RuntimeError> {
        self.bind()?;
        result::ctx::synchronize().map_err(failed_earlier)
    }

    fn allocated_bytes(&self) -> u64 {
        self.allocations.iter().flatten().map(|memory| 4 * memory.length as u64).sum()
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        (0..self.allocations.len()).for_each(|index| self.free(Allocation(index)));
        // SAFETY: nothing uses the module or the context any more. An error here only repeats that the GPU has failed
        // before.
        unsafe {
            let _ = self.bind().and_then(|()| self.wait());
            self.graphs.clear();
            for pinned in self.copy.buffers.iter().chain(&self.readbacks) {
                if !pinned.start.is_null() {
                    let _ = result::free_host(pinned.start.cast());
                }
                if !pinned.copied.is_null() {
                    let _ = event::destroy(pinned.copied);
                }
            }
            if !self.copy.stream.is_null() {
                let _ = stream::destroy(self.copy.stream);
            }
            if !self.module.is_null() {
                let _ = result::module::unload(self.module);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
