//! As much of CUDA's driver as the runtime calls: a program that finds this library as `libcuda.so` sees one small GPU,
//! whose kernels the interpreter of PTX executes. A kernel that does wrong ends the process with the interpreter's words.
//!
//! Addresses are the interpreter's. Blocks of memory count as written from the start, for the runtime zeroes them.
//!
//! What may be asynchronous is as late as the driver allows: launches and copies wait in their stream until something
//! waits for them. Who overwrites too early what a copy still reads, or reads too early what it brings, gets other
//! numbers.
//!
//! `CUDA_SIM` makes a driver that is in trouble, and lets it say what it did, see [`Settings`].

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

/// What it says of itself.
const NAME: &[u8] = b"a GPU that is none\0";
const CAPABILITY: [c_int; 2] = [9, 0];
const DRIVER: c_int = 11_040;
const MEMORY: usize = 1 << 28;
const PROCESSORS: c_int = 2;

/// Attributes of a device that someone asks for.
const PROCESSOR_COUNT: c_uint = 16;
const CAPABILITY_MAJOR: c_uint = 75;
const CAPABILITY_MINOR: c_uint = 76;
const MEMORY_POOLS: c_uint = 115;
/// Options of the compiler: where it may write what is wrong, and how much.
const ERROR_LOG: c_uint = 5;
const ERROR_LOG_SIZE: c_uint = 6;

/// From `CUDA_SIM`, such as `memory=4096,fail=matmul`.
#[derive(Default)]
struct Settings {
    /// The version of CUDA that the driver knows: `driver=11020` is 11.2.
    driver: Option<c_int>,
    /// `gpus=0`: there is none.
    gpus: Option<c_int>,
    /// Bytes.
    memory: Option<usize>,
    /// Kernels with this in their name do not start.
    refuse: Option<String>,
    /// They start, and fail.
    fail: Option<String>,
    /// The file that says at the end what was called how often, and what was not freed.
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
    SETTINGS.memory.unwrap_or(MEMORY)
}

#[derive(Default)]
struct State {
    gpu: Gpu,
    modules: Vec<Module>,
    /// By handle: the module, and the kernel's name.
    functions: Vec<(usize, String)>,
    /// Bytes of each block of memory.
    blocks: HashMap<u64, usize>,
    /// The first is the null stream.
    streams: Vec<Stream>,
    /// By handle: the stream, and how many of its tasks were there when the event was recorded last.
    events: Vec<(usize, u64)>,
    /// By handle.
    graphs: Vec<Vec<Call>>,
    /// By handle: the graph, and the place in it.
    nodes: Vec<(usize, usize)>,
    /// By handle: the graph, and its launches.
    ready: Vec<(usize, Vec<Call>)>,
    pinned: HashMap<usize, Vec<u64>>,
    /// Once a kernel has failed, every call does.
    failed: Option<Status>,
    /// How often what was done.
    done: HashMap<&'static str, u64>,
    /// How many handles of each kind were made.
    made: HashMap<&'static str, usize>,
    /// Handles that were made and not destroyed.
    alive: HashSet<(&'static str, usize)>,
}

#[derive(Default)]
struct Stream {
    tasks: VecDeque<Task>,
    /// How many tasks it was ever given, and how many of them have ended.
    given: u64,
    ended: u64,
}

enum Task {
    Launch(Call),
    Copy {
        to: u64,
        from: usize,
        bytes: usize,
    },
    Fill {
        to: u64,
        content: Vec<u8>,
    },
    /// To the host.
    Bring {
        to: usize,
        from: u64,
        bytes: usize,
    },
    /// Until another stream has ended so many tasks.
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
        *self.done.entry(what).or_default() += 1;
    }

    fn make(&mut self, kind: &'static str, handle: usize) {
        *self.made.entry(kind).or_default() += 1;
        self.alive.insert((kind, handle));
    }

    fn destroy(&mut self, kind: &'static str, handle: usize) -> Status {
        if self.alive.remove(&(kind, handle)) { SUCCESS } else { INVALID_VALUE }
    }

    fn report(&self) -> String {
        let mut lines: Vec<String> = self.done.iter().map(|(what, count)| format!("{what} {count}\n")).collect();
        for (kind, made) in &self.made {
            let left = self.alive.iter().filter(|(of, _)| of == kind).count();
            lines.extend([format!("{kind} made {made}\n"), format!("{kind} left {left}\n")]);
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

    fn give(&mut self, stream: usize, task: Task) {
        let stream = self.stream(stream);
        stream.tasks.push_back(task);
        stream.given += 1;
    }

    /// Until the stream has ended so many tasks.
    fn reach(&mut self, stream: usize, tasks: u64) {
        while self.stream(stream).ended < tasks {
            let task = self.stream(stream).tasks.pop_front().expect("it was given so many");
            if self.failed.is_none() {
                self.execute(task);
            }
            self.stream(stream).ended += 1;
        }
    }

    fn finish(&mut self, stream: usize) {
        let given = self.stream(stream).given;
        self.reach(stream, given);
    }

    fn finish_all(&mut self) -> Status {
        (0..self.streams.len()).for_each(|stream| self.finish(stream));
        self.failed.unwrap_or(SUCCESS)
    }

    /// The host's memory there cannot be moved.
    fn pinned(&self, at: usize) -> bool {
        self.pinned.iter().any(|(&start, words)| (start..start + 8 * words.len()).contains(&at))
    }

    fn execute(&mut self, task: Task) {
        match task {
            Task::Launch(call) => {
                let (module, name) = &self.functions[call.function];
                if SETTINGS.fail.as_ref().is_some_and(|part| name.contains(part)) {
                    self.failed = Some(ILLEGAL_ADDRESS);
                    return;
                }
                let module = &self.modules[*module];
                if let Err(error) = self.gpu.launch(module, name, call.grid, call.block, call.shared, &call.args) {
                    eprintln!("{error}");
                    std::process::exit(134);
                }
            }
            Task::Copy { to, from, bytes } => {
                // SAFETY: whoever copies keeps the memory until it has arrived.
                let content = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) };
                self.gpu.write_u8(Ptr::at(to), content);
            }
            Task::Bring { to, from, bytes } => {
                let content = self.gpu.read(Ptr::at(from), bytes);
                // SAFETY: whoever asked for it keeps the memory until it has arrived.
                unsafe { (to as *mut u8).copy_from_nonoverlapping(content.as_ptr(), bytes) };
            }
            Task::Fill { to, content } => self.gpu.write_u8(Ptr::at(to), &content),
            Task::Wait(stream, tasks) => self.reach(stream, tasks),
        }
    }

    /// Why the kernel does not start: blocks of another size than it is for, or the settings.
    fn refuses(&self, function: usize, block: [c_uint; 3]) -> Option<Status> {
        let (module, name) = &self.functions[function];
        if self.modules[*module].block(name).is_some_and(|own| own != block) {
            return Some(INVALID_VALUE);
        }
        SETTINGS.refuse.as_ref().is_some_and(|part| name.contains(part)).then_some(OUT_OF_RESOURCES)
    }

    /// # Safety
    /// `parameters` point to as many arguments as the kernel has.
    unsafe fn args(&self, function: usize, parameters: *mut *mut c_void) -> Vec<Arg> {
        let (module, name) = &self.functions[function];
        let sizes = self.modules[*module].parameters(name).expect("a kernel").into_iter().enumerate();
        // SAFETY: as promised.
        let bytes = |(n, size)| unsafe { std::slice::from_raw_parts((*parameters.add(n)).cast::<u8>(), size).to_vec() };
        sizes.map(bytes).map(Arg::Bytes).collect()
    }

    /// # Safety
    /// As of the node's arguments.
    unsafe fn call(&self, node: &NodeParams) -> Call {
        let function = index(node.function);
        // SAFETY: as promised.
        let args = unsafe { self.args(function, node.parameters) };
        Call { function, grid: node.grid, block: node.block, shared: node.shared as usize, args }
    }
}

/// `CUDA_KERNEL_NODE_PARAMS` in its first form.
#[repr(C)]
pub struct NodeParams {
    function: *mut c_void,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
}

/// The null stream, or another.
fn stream_of(handle: *mut c_void) -> usize {
    handle.addr()
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);

fn state() -> MutexGuard<'static, State> {
    STATE.lock().expect("no thread has failed")
}

/// Handles are numbers from 1 on.
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
            /// As the driver's documentation says.
            #[unsafe(no_mangle)]
            #[allow(unused_unsafe)] // not every one reads what it is given
            pub unsafe extern "C" fn $name($($arg: $ty),*) -> Status {
                // SAFETY: whoever calls keeps to what the driver asks.
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
        *version = SETTINGS.driver.unwrap_or(DRIVER);
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
            PROCESSOR_COUNT => PROCESSORS,
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
                    let said = error.to_string();
                    let length = said.len().min(size.addr().saturating_sub(1));
                    log.cast::<u8>().copy_from_nonoverlapping(said.as_ptr(), length);
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
        *free = memory() - state().blocks.values().sum::<usize>();
        *all = memory();
        SUCCESS
    }

    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) {
        let mut state = state();
        if bytes == 0 || state.blocks.values().sum::<usize>().saturating_add(bytes) > memory() {
            return OUT_OF_MEMORY;
        }
        *address = state.gpu.alloc(vec![0; bytes]).address();
        state.blocks.insert(*address, bytes);
        state.make("blocks", *address as usize);
        state.failed.unwrap_or(SUCCESS)
    }

    fn cuMemFree_v2(address: u64) {
        let mut state = state();
        let status = state.finish_all();
        match state.blocks.remove(&address) {
            Some(_) => state.gpu.free(Ptr::at(address)),
            None => return INVALID_VALUE,
        }
        state.destroy("blocks", address as usize);
        status
    }

    fn cuMemsetD8_v2(address: u64, value: u8, count: usize) {
        state().give(0, Task::Fill { to: address, content: vec![value; count] });
        SUCCESS
    }

    fn cuMemsetD32_v2(address: u64, value: c_uint, count: usize) {
        let content = std::iter::repeat_n(value.to_le_bytes(), count).flatten().collect();
        state().give(0, Task::Fill { to: address, content });
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
        let uses = |task: &Task| matches!(task, Task::Copy { from: at, .. } | Task::Bring { to: at, .. } if range.contains(at));
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
        state.give(stream_of(stream), Task::Copy { to, from: from.addr(), bytes });
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
        state.give(stream_of(stream), Task::Bring { to: to.addr(), from, bytes });
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
        state.give(stream_of(stream), Task::Wait(of, tasks));
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
        let given = state.stream(stream_of(stream)).given;
        state.events[index(event)] = (stream_of(stream), given);
        SUCCESS
    }

    fn cuEventSynchronize(event: *mut c_void) {
        let mut state = state();
        let (of, tasks) = state.events[index(event)];
        state.reach(of, tasks);
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
        state.give(stream_of(stream), Task::Launch(call));
        state.failed.unwrap_or(SUCCESS)
    }

    fn cuGraphCreate(graph: *mut *mut c_void, _flags: c_uint) {
        let mut state = state();
        state.graphs.push(vec![]);
        *graph = handle(state.graphs.len() - 1);
        state.make("graphs", (*graph).addr());
        SUCCESS
    }

    /// Nodes that wait for the one before alone: no other graph is asked for.
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

    fn cuGraphInstantiateWithFlags(ready: *mut *mut c_void, graph: *mut c_void, _flags: u64) {
        let mut state = state();
        state.count("graphs made ready");
        let calls = state.graphs[index(graph)].clone();
        state.ready.push((index(graph), calls));
        *ready = handle(state.ready.len() - 1);
        state.make("ready graphs", (*ready).addr());
        SUCCESS
    }

    fn cuGraphExecKernelNodeSetParams(ready: *mut c_void, node: *mut c_void, parameters: *const NodeParams) {
        let mut state = state();
        let ((graph, place), call) = (state.nodes[index(node)], state.call(&*parameters));
        let (of, calls) = &mut state.ready[index(ready)];
        if *of != graph || calls[place].function != call.function {
            return INVALID_VALUE;
        }
        calls[place] = call;
        state.count("nodes told anew");
        SUCCESS
    }

    fn cuGraphLaunch(ready: *mut c_void, stream: *mut c_void) {
        let mut state = state();
        state.count("graphs run");
        if state.stream(stream_of(stream)).tasks.iter().any(|task| matches!(task, Task::Launch(_))) {
            state.count("graphs before others ended");
        }
        for call in state.ready[index(ready)].1.clone() {
            state.give(stream_of(stream), Task::Launch(call));
        }
        state.failed.unwrap_or(SUCCESS)
    }

    fn cuGraphExecDestroy(ready: *mut c_void) { state().destroy("ready graphs", ready.addr()) }

    fn cuGraphDestroy(graph: *mut c_void) { state().destroy("graphs", graph.addr()) }
}
