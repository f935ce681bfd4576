//! A simulated CUDA driver with the functions that the runtime calls. A program that finds this library as `libcuda.so`
//! sees one small GPU, whose kernels the PTX interpreter executes. A kernel that faults ends the process with the
//! interpreter's message.
//!
//! Device addresses are those of the interpreter. Allocations count as written from the start, since the runtime zeroes
//! them.
//!
//! Asynchronous work is done as late as the driver permits: launches and copies stay queued in their stream until
//! something waits for them. A program that overwrites the source of a copy too early, or reads its destination too
//! early, therefore gets wrong numbers.
//!
//! The environment variable `CUDA_SIM` makes the driver fail in various ways and write a report of its calls; see
//! `Settings`.

#![allow(non_snake_case)] // the driver's names

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{LazyLock, Mutex, MutexGuard};

use ptx_sim::{Arg, Gpu, Module, Ptr};

type Status = c_uint;

const SUCCESS: Status = 0;
const INVALID_VALUE: Status = 1;
const OUT_OF_MEMORY: Status = 2;
const NO_DEVICE: Status = 100;
const INVALID_PTX: Status = 218;
const NOT_FOUND: Status = 500;
const ILLEGAL_ADDRESS: Status = 700;
const OUT_OF_RESOURCES: Status = 701;
const NOT_SUPPORTED: Status = 801;

/// The device's name.
const NAME: &[u8] = b"simulated GPU\0";
const CAPABILITY: [c_int; 2] = [9, 0];
const DRIVER_VERSION: c_int = 11_040;
const MEMORY_BYTES: usize = 1 << 28;
const MULTIPROCESSORS: c_int = 2;

/// Device attributes that the runtime queries.
const MULTIPROCESSOR_COUNT: c_uint = 16;
const CAPABILITY_MAJOR: c_uint = 75;
const CAPABILITY_MINOR: c_uint = 76;
const MEMORY_POOLS: c_uint = 115;
/// Options of the PTX compiler: the buffer for its messages, and the size of that buffer.
const ERROR_LOG: c_uint = 5;
const ERROR_LOG_SIZE: c_uint = 6;

/// Settings from `CUDA_SIM`, such as `memory=4096,fail=KERNEL`.
#[derive(Default)]
struct Settings {
    /// The CUDA version that the driver supports: `driver=11020` is 11.2.
    driver: Option<c_int>,
    /// `gpus=0`: there is no GPU.
    gpus: Option<c_int>,
    /// Bytes of device memory.
    memory: Option<usize>,
    /// The kernel of this name is refused at launch.
    refuse: Option<String>,
    /// The kernel of this name is launched, and then fails.
    fail: Option<String>,
    /// The file for the report, which counts calls and handles that were not destroyed.
    report: Option<String>,
}

static SETTINGS: LazyLock<Settings> = LazyLock::new(|| {
    let mut settings = Settings::default();
    for (key, value) in std::env::var("CUDA_SIM").unwrap_or_default().split(',').filter_map(|s| s.split_once('=')) {
        match key {
            "driver" => settings.driver = value.parse().ok(),
            "gpus" => settings.gpus = value.parse().ok(),
            "memory" => settings.memory = value.parse().ok(),
            "refuse" => settings.refuse = Some(value.into()),
            "fail" => settings.fail = Some(value.into()),
            "report" => settings.report = Some(value.into()),
            _ => panic!("CUDA_SIM knows no `{key}`"),
        }
    }
    settings
});

fn memory() -> usize {
    SETTINGS.memory.unwrap_or(MEMORY_BYTES)
}

#[derive(Default)]
struct State {
    gpu: Gpu,
    modules: Vec<Module>,
    /// By handle: the module, and the kernel's name.
    functions: Vec<(usize, String)>,
    /// Bytes of each allocation, by address.
    allocations: HashMap<u64, usize>,
    /// The first stream is the null stream.
    streams: Vec<Stream>,
    /// By handle: the stream, and the number of its tasks when the event was last recorded.
    events: Vec<(usize, u64)>,
    /// The launches of each graph in order, by handle.
    graphs: Vec<Vec<Call>>,
    /// By handle: the graph, and the index of the node in it.
    nodes: Vec<(usize, usize)>,
    /// Instantiated graphs by handle: the graph, and its launches.
    executables: Vec<(usize, Vec<Call>)>,
    pinned: HashMap<usize, Vec<u64>>,
    /// The error of a failed kernel, which every later call returns.
    failed: Option<Status>,
    /// How often each kind of call was made.
    calls_by_kind: HashMap<&'static str, u64>,
    /// How many handles of each kind were created.
    created: HashMap<&'static str, usize>,
    /// Handles that have not been destroyed.
    alive: HashSet<(&'static str, usize)>,
}

#[derive(Default)]
struct Stream {
    tasks: VecDeque<Task>,
    /// The number of tasks that were ever queued, and how many of them have ended.
    enqueued: u64,
    ended: u64,
}

enum Task {
    Launch(Call),
    Upload {
        to: u64,
        from: usize,
        bytes: usize,
    },
    Fill {
        to: u64,
        content: Vec<u8>,
    },
    /// A copy to the host.
    Download {
        to: usize,
        from: u64,
        bytes: usize,
    },
    /// Waits until another stream has ended this many tasks.
    Wait(usize, u64),
}

#[derive(Clone)]
struct Call {
    function: usize,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: usize,
    args: Vec<Arg>,
}

impl State {
    fn count(&mut self, what: &'static str) {
        *self.calls_by_kind.entry(what).or_default() += 1;
    }

    fn make(&mut self, kind: &'static str, handle: usize) {
        *self.created.entry(kind).or_default() += 1;
        self.alive.insert((kind, handle));
    }

    fn destroy(&mut self, kind: &'static str, handle: usize) -> Status {
        if self.alive.remove(&(kind, handle)) { SUCCESS } else { INVALID_VALUE }
    }

    fn report(&self) -> String {
        let mut lines: Vec<String> =
            self.calls_by_kind.iter().map(|(what, count)| format!("{what} {count}\n")).collect();
        for (kind, created) in &self.created {
            let left = self.alive.iter().filter(|(of, _)| of == kind).count();
            lines.extend([format!("{kind} made {created}\n"), format!("{kind} left {left}\n")]);
        }
        lines.sort();
        lines.concat()
    }

    fn stream(&mut self, index: usize) -> &mut Stream {
        while self.streams.len() <= index {
            self.streams.push(Stream::default());
        }
        &mut self.streams[index]
    }

    fn enqueue(&mut self, stream: usize, task: Task) {
        let stream = self.stream(stream);
        stream.tasks.push_back(task);
        stream.enqueued += 1;
    }

    /// Executes tasks until the stream has ended this many.
    fn run_until(&mut self, stream: usize, tasks: u64) {
        while self.stream(stream).ended < tasks {
            let task = self.stream(stream).tasks.pop_front().expect("as many tasks have been queued");
            if self.failed.is_none() {
                self.execute(task);
            }
            self.stream(stream).ended += 1;
        }
    }

    fn finish(&mut self, stream: usize) {
        let enqueued = self.stream(stream).enqueued;
        self.run_until(stream, enqueued);
    }

    fn finish_all(&mut self) -> Status {
        (0..self.streams.len()).for_each(|stream| self.finish(stream));
        self.failed.unwrap_or(SUCCESS)
    }

    /// True if the host memory at this address is pinned.
    fn pinned(&self, at: usize) -> bool {
        self.pinned.iter().any(|(&start, words)| (start..start + 8 * words.len()).contains(&at))
    }

    fn execute(&mut self, task: Task) {
        match task {
            Task::Launch(call) => {
                let (module, name) = &self.functions[call.function];
                if SETTINGS.fail.as_ref().is_some_and(|kernel| name == kernel) {
                    self.failed = Some(ILLEGAL_ADDRESS);
                    return;
                }
                let module = &self.modules[*module];
                if let Err(error) = self.gpu.launch(module, name, call.grid, call.block, call.shared, &call.args) {
                    eprintln!("{error}");
                    std::process::exit(134);
                }
            }
            Task::Upload { to, from, bytes } => {
                // SAFETY: the caller of the copy keeps its source until the copy has completed.
                let content = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) };
                self.gpu.write_u8(Ptr::at(to), content);
            }
            Task::Download { to, from, bytes } => {
                let content = self.gpu.read(Ptr::at(from), bytes);
                // SAFETY: the caller of the copy keeps its destination until the copy has completed.
                unsafe { (to as *mut u8).copy_from_nonoverlapping(content.as_ptr(), bytes) };
            }
            Task::Fill { to, content } => self.gpu.write_u8(Ptr::at(to), &content),
            Task::Wait(stream, tasks) => self.run_until(stream, tasks),
        }
    }

    /// Why a kernel is refused at launch: a block of another size than it requires, or the settings.
    fn refuses(&self, function: usize, block: [c_uint; 3]) -> Option<Status> {
        let (module, name) = &self.functions[function];
        if self.modules[*module].block(name).is_some_and(|own| own != block) {
            return Some(INVALID_VALUE);
        }
        SETTINGS.refuse.as_ref().is_some_and(|kernel| name == kernel).then_some(OUT_OF_RESOURCES)
    }

    /// # Safety
    /// `parameters` must point to as many arguments as the kernel has.
    unsafe fn args(&self, function: usize, parameters: *mut *mut c_void) -> Vec<Arg> {
        let (module, name) = &self.functions[function];
        let sizes = self.modules[*module].parameters(name).expect("a kernel").into_iter().enumerate();
        // SAFETY: as the function requires.
        let bytes = |(n, size)| unsafe { std::slice::from_raw_parts((*parameters.add(n)).cast::<u8>(), size).to_vec() };
        sizes.map(bytes).map(Arg::Bytes).collect()
    }

    /// # Safety
    /// The parameters of `node` must be as [`State::args`] requires.
    unsafe fn call(&self, node: &NodeParams) -> Call {
        let function = index(node.function);
        // SAFETY: as the function requires.
        let args = unsafe { self.args(function, node.parameters) };
        Call { function, grid: node.grid, block: node.block, shared: node.shared as usize, args }
    }
}

/// The first version of `CUDA_KERNEL_NODE_PARAMS`.
#[repr(C)]
pub struct NodeParams {
    function: *mut c_void,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
}

/// The index of a stream; the null stream is the first.
fn stream_of(handle: *mut c_void) -> usize {
    handle.addr()
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);

fn state() -> MutexGuard<'static, State> {
    STATE.lock().expect("no thread has failed")
}

/// Handles are indices, counted from 1.
fn handle<T>(index: usize) -> *mut T {
    std::ptr::without_provenance_mut(index + 1)
}

fn index<T>(handle: *mut T) -> usize {
    handle.addr() - 1
}

macro_rules! driver {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) $body:block)*) => {
        $(
            $(#[$doc])*
            /// # Safety
            /// The arguments must be as the documentation of the driver function requires.
            #[unsafe(no_mangle)]
            #[allow(unused_unsafe)] // some functions do not dereference their arguments
            pub unsafe extern "C" fn $name($($arg: $ty),*) -> Status {
                // SAFETY: the caller keeps to the requirements of the driver's documentation.
                unsafe { $body }
            }
        )*
    };
}

driver! {
    fn cuInit(_flags: c_uint) {
        match SETTINGS.gpus {
            Some(0) => NO_DEVICE,
            _ => SUCCESS,
        }
    }

    fn cuDriverGetVersion(version: *mut c_int) {
        *version = SETTINGS.driver.unwrap_or(DRIVER_VERSION);
        SUCCESS
    }

    fn cuGetErrorString(_error: Status, text: *mut *const c_char) {
        *text = c"the simulated driver failed".as_ptr();
        SUCCESS
    }

    fn cuDeviceGetCount(count: *mut c_int) {
        *count = 1;
        SUCCESS
    }

    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        *device = ordinal;
        SUCCESS
    }

    fn cuDeviceGetName(name: *mut c_char, length: c_int, _device: c_int) {
        let length = NAME.len().min(length as usize);
        name.copy_from_nonoverlapping(NAME.as_ptr().cast(), length);
        SUCCESS
    }

    fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) {
        *bytes = memory();
        SUCCESS
    }

    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, _device: c_int) {
        *value = match attribute {
            CAPABILITY_MAJOR => CAPABILITY[0],
            CAPABILITY_MINOR => CAPABILITY[1],
            MULTIPROCESSOR_COUNT => MULTIPROCESSORS,
            MEMORY_POOLS => 0,
            _ => return INVALID_VALUE,
        };
        SUCCESS
    }

    fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _device: c_int) {
        *context = handle(0);
        SUCCESS
    }

    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) {
        if let Some(path) = &SETTINGS.report {
            std::fs::write(path, state().report()).expect("written");
        }
        SUCCESS
    }

    fn cuCtxSetCurrent(_context: *mut c_void) { SUCCESS }

    fn cuCtxSynchronize() { state().finish_all() }

    fn cuModuleLoadDataEx(
        module: *mut *mut c_void,
        image: *const c_void,
        count: c_uint,
        options: *const c_uint,
        values: *const *mut c_void
    ) {
        let text = CStr::from_ptr(image.cast()).to_string_lossy();
        match Module::parse(&text) {
            Ok(parsed) => {
                let mut state = state();
                state.modules.push(parsed);
                *module = handle(state.modules.len() - 1);
                state.make("modules", (*module).addr());
                SUCCESS
            }
            Err(error) => {
                let option = |name| (0..count as usize).find(|&i| *options.add(i) == name).map(|i| *values.add(i));
                if let (Some(log), Some(size)) = (option(ERROR_LOG), option(ERROR_LOG_SIZE)) {
                    let message = error.to_string();
                    let length = message.len().min(size.addr().saturating_sub(1));
                    log.cast::<u8>().copy_from_nonoverlapping(message.as_ptr(), length);
                }
                INVALID_PTX
            }
        }
    }

    fn cuModuleUnload(module: *mut c_void) { state().destroy("modules", module.addr()) }

    fn cuModuleGetFunction(function: *mut *mut c_void, module: *mut c_void, name: *const c_char) {
        let name = CStr::from_ptr(name).to_string_lossy().into_owned();
        let mut state = state();
        if !state.modules[index(module)].kernels().any(|kernel| kernel == name) {
            return NOT_FOUND;
        }
        state.functions.push((index(module), name));
        *function = handle(state.functions.len() - 1);
        SUCCESS
    }

    fn cuMemGetInfo_v2(free: *mut usize, all: *mut usize) {
        *free = memory() - state().allocations.values().sum::<usize>();
        *all = memory();
        SUCCESS
    }

    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) {
        let mut state = state();
        if bytes == 0 || state.allocations.values().sum::<usize>().saturating_add(bytes) > memory() {
            return OUT_OF_MEMORY;
        }
        *address = state.gpu.alloc(vec![0; bytes]).address();
        state.allocations.insert(*address, bytes);
        state.make("allocations", *address as usize);
        state.failed.unwrap_or(SUCCESS)
    }

    fn cuMemFree_v2(address: u64) {
        let mut state = state();
        let status = state.finish_all();
        match state.allocations.remove(&address) {
            Some(_) => state.gpu.free(Ptr::at(address)),
            None => return INVALID_VALUE,
        }
        state.destroy("allocations", address as usize);
        status
    }

    fn cuMemsetD8_v2(address: u64, value: u8, count: usize) {
        state().enqueue(0, Task::Fill { to: address, content: vec![value; count] });
        SUCCESS
    }

    fn cuMemsetD32_v2(address: u64, value: c_uint, count: usize) {
        let content = std::iter::repeat_n(value.to_le_bytes(), count).flatten().collect();
        state().enqueue(0, Task::Fill { to: address, content });
        SUCCESS
    }

    fn cuMemHostAlloc(start: *mut *mut c_void, bytes: usize, _flags: c_uint) {
        let mut words = vec![0u64; bytes.div_ceil(8)];
        *start = words.as_mut_ptr().cast();
        let mut state = state();
        state.pinned.insert((*start).addr(), words);
        state.make("pinned", (*start).addr());
        SUCCESS
    }

    fn cuMemFreeHost(start: *mut c_void) {
        let mut state = state();
        let range = match state.pinned.get(&start.addr()) {
            Some(words) => start.addr()..start.addr() + 8 * words.len(),
            None => return INVALID_VALUE,
        };
        let uses = |task: &Task| match task {
            Task::Upload { from: at, .. } | Task::Download { to: at, .. } => range.contains(at),
            _ => false,
        };
        if state.streams.iter().flat_map(|stream| &stream.tasks).any(uses) {
            eprintln!("pinned memory is freed while it is being copied");
            std::process::exit(134);
        }
        state.pinned.remove(&start.addr());
        state.destroy("pinned", start.addr())
    }

    fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) {
        let mut state = state();
        state.finish(0);
        state.gpu.write_u8(Ptr::at(to), std::slice::from_raw_parts(from.cast(), bytes));
        state.failed.unwrap_or(SUCCESS)
    }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: *mut c_void) {
        let mut state = state();
        if !state.pinned(from.addr()) {
            return INVALID_VALUE;
        }
        state.count("copies");
        state.enqueue(stream_of(stream), Task::Upload { to, from: from.addr(), bytes });
        SUCCESS
    }

    fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) {
        let mut state = state();
        state.finish(0);
        to.cast::<u8>().copy_from_nonoverlapping(state.gpu.read(Ptr::at(from), bytes).as_ptr(), bytes);
        state.failed.unwrap_or(SUCCESS)
    }

    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: *mut c_void) {
        let mut state = state();
        if !state.pinned(to.addr()) {
            return INVALID_VALUE;
        }
        state.enqueue(stream_of(stream), Task::Download { to: to.addr(), from, bytes });
        SUCCESS
    }

    fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) {
        let mut state = state();
        let index = state.streams.len().max(1);
        state.stream(index);
        *stream = std::ptr::without_provenance_mut(index);
        state.make("streams", index);
        SUCCESS
    }

    fn cuStreamDestroy_v2(stream: *mut c_void) { state().destroy("streams", stream.addr()) }

    fn cuStreamWaitEvent(stream: *mut c_void, event: *mut c_void, _flags: c_uint) {
        let mut state = state();
        let (of, tasks) = state.events[index(event)];
        state.enqueue(stream_of(stream), Task::Wait(of, tasks));
        SUCCESS
    }

    fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) {
        let mut state = state();
        state.events.push((0, 0));
        *event = handle(state.events.len() - 1);
        state.make("events", (*event).addr());
        SUCCESS
    }

    fn cuEventDestroy_v2(event: *mut c_void) { state().destroy("events", event.addr()) }

    fn cuEventRecord(event: *mut c_void, stream: *mut c_void) {
        let mut state = state();
        let enqueued = state.stream(stream_of(stream)).enqueued;
        state.events[index(event)] = (stream_of(stream), enqueued);
        SUCCESS
    }

    fn cuEventSynchronize(event: *mut c_void) {
        let mut state = state();
        let (of, tasks) = state.events[index(event)];
        state.run_until(of, tasks);
        state.failed.unwrap_or(SUCCESS)
    }

    fn cuLaunchKernel(
        function: *mut c_void,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared: c_uint,
        stream: *mut c_void,
        parameters: *mut *mut c_void,
        _extra: *mut *mut c_void
    ) {
        let mut state = state();
        let function = index(function);
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        if let Some(why) = state.refuses(function, block) {
            return why;
        }
        let call = Call { function, grid, block, shared: shared as usize, args: state.args(function, parameters) };
        state.count("launches");
        state.enqueue(stream_of(stream), Task::Launch(call));
        state.failed.unwrap_or(SUCCESS)
    }

    fn cuGraphCreate(graph: *mut *mut c_void, _flags: c_uint) {
        let mut state = state();
        state.graphs.push(vec![]);
        *graph = handle(state.graphs.len() - 1);
        state.make("graphs", (*graph).addr());
        SUCCESS
    }

    /// Supports only graphs in which each node depends on the one before.
    fn cuGraphAddKernelNode(
        node: *mut *mut c_void,
        graph: *mut c_void,
        before: *const *mut c_void,
        count: usize,
        parameters: *const NodeParams
    ) {
        let mut state = state();
        let (graph, call) = (index(graph), state.call(&*parameters));
        let place = state.graphs[graph].len();
        let follows = match count {
            0 => place == 0,
            1 => place > 0 && state.nodes[index(*before)] == (graph, place - 1),
            _ => false,
        };
        if !follows {
            return NOT_SUPPORTED;
        }
        if let Some(why) = state.refuses(call.function, call.block) {
            return why;
        }
        state.graphs[graph].push(call);
        state.nodes.push((graph, place));
        *node = handle(state.nodes.len() - 1);
        SUCCESS
    }

    fn cuGraphInstantiateWithFlags(executable: *mut *mut c_void, graph: *mut c_void, _flags: u64) {
        let mut state = state();
        state.count("graphs instantiated");
        let calls = state.graphs[index(graph)].clone();
        state.executables.push((index(graph), calls));
        *executable = handle(state.executables.len() - 1);
        state.make("graph executables", (*executable).addr());
        SUCCESS
    }

    fn cuGraphExecKernelNodeSetParams(executable: *mut c_void, node: *mut c_void, parameters: *const NodeParams) {
        let mut state = state();
        let ((graph, place), call) = (state.nodes[index(node)], state.call(&*parameters));
        let (of, calls) = &mut state.executables[index(executable)];
        if *of != graph || calls[place].function != call.function {
            return INVALID_VALUE;
        }
        calls[place] = call;
        state.count("nodes updated");
        SUCCESS
    }

    fn cuGraphLaunch(executable: *mut c_void, stream: *mut c_void) {
        let mut state = state();
        state.count("graphs launched");
        if state.stream(stream_of(stream)).tasks.iter().any(|task| matches!(task, Task::Launch(_))) {
            state.count("graphs launched while others ran");
        }
        for call in state.executables[index(executable)].1.clone() {
            state.enqueue(stream_of(stream), Task::Launch(call));
        }
        state.failed.unwrap_or(SUCCESS)
    }

    fn cuGraphExecDestroy(executable: *mut c_void) { state().destroy("graph executables", executable.addr()) }

    fn cuGraphDestroy(graph: *mut c_void) { state().destroy("graphs", graph.addr()) }
}
