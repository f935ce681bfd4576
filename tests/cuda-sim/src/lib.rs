//! As much of CUDA's driver as the runtime calls: a program that finds this library as `libcuda.so` sees one small GPU,
//! whose kernels the interpreter of PTX executes. A kernel that does wrong ends the process with the interpreter's words.
//!
//! Addresses are the interpreter's. Blocks of memory count as written from the start, for the runtime zeroes them.

#![allow(non_snake_case)] // the driver's names

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{LazyLock, Mutex, MutexGuard};

use ptx_sim::{Arg, Gpu, Module, Ptr};

type Status = c_uint;

const SUCCESS: Status = 0;
const INVALID_VALUE: Status = 1;
const OUT_OF_MEMORY: Status = 2;
const INVALID_PTX: Status = 218;
const NOT_FOUND: Status = 500;

/// What it says of itself.
const NAME: &[u8] = b"a GPU that is none\0";
const CAPABILITY: [c_int; 2] = [9, 0];
const MEMORY: usize = 1 << 28;
const PROCESSORS: c_int = 2;
const MOST_THREADS: c_int = 1024;

/// Attributes of a device and of a function that someone asks for.
const PROCESSOR_COUNT: c_uint = 16;
const CAPABILITY_MAJOR: c_uint = 75;
const CAPABILITY_MINOR: c_uint = 76;
const MEMORY_POOLS: c_uint = 115;
const THREADS_PER_BLOCK: c_uint = 0;
/// Options of the compiler: where it may write what is wrong, and how much.
const ERROR_LOG: c_uint = 5;
const ERROR_LOG_SIZE: c_uint = 6;

#[derive(Default)]
struct State {
    gpu: Gpu,
    modules: Vec<Module>,
    /// By handle: the module, and the kernel's name.
    functions: Vec<(usize, String)>,
    /// Bytes of each block of memory.
    blocks: HashMap<u64, usize>,
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
    fn cuInit(_flags: c_uint) { SUCCESS }

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
        *bytes = MEMORY;
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

    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) { SUCCESS }

    fn cuCtxSetCurrent(_context: *mut c_void) { SUCCESS }

    fn cuCtxSynchronize() { SUCCESS }

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

    fn cuModuleUnload(_module: *mut c_void) { SUCCESS }

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

    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_uint, function: *mut c_void) {
        let state = state();
        let (module, name) = &state.functions[index(function)];
        *value = match (attribute, state.modules[*module].block(name)) {
            (THREADS_PER_BLOCK, Some(block)) => block.iter().product::<u32>() as c_int,
            (THREADS_PER_BLOCK, None) => MOST_THREADS,
            _ => return INVALID_VALUE,
        };
        SUCCESS
    }

    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) {
        let mut state = state();
        if bytes == 0 || state.blocks.values().sum::<usize>() + bytes > MEMORY {
            return OUT_OF_MEMORY;
        }
        *address = state.gpu.alloc(vec![0; bytes]).address();
        state.blocks.insert(*address, bytes);
        SUCCESS
    }

    fn cuMemFree_v2(address: u64) {
        let mut state = state();
        match state.blocks.remove(&address) {
            Some(_) => state.gpu.free(Ptr::at(address)),
            None => return INVALID_VALUE,
        }
        SUCCESS
    }

    fn cuMemsetD8_v2(address: u64, value: u8, count: usize) {
        state().gpu.write_u8(Ptr::at(address), &vec![value; count]);
        SUCCESS
    }

    fn cuMemsetD32_v2(address: u64, value: c_uint, count: usize) {
        state().gpu.write_u32(Ptr::at(address), &vec![value; count]);
        SUCCESS
    }

    fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) {
        state().gpu.write_u8(Ptr::at(to), std::slice::from_raw_parts(from.cast(), bytes));
        SUCCESS
    }

    fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) {
        let state = state();
        to.cast::<u8>().copy_from_nonoverlapping(state.gpu.read(Ptr::at(from), bytes).as_ptr(), bytes);
        SUCCESS
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
        _stream: *mut c_void,
        parameters: *mut *mut c_void,
        _extra: *mut *mut c_void
    ) {
        let State { gpu, modules, functions, .. } = &mut *state();
        let (module, name) = &functions[index(function)];
        let module = &modules[*module];
        let sizes = module.parameters(name).expect("a kernel").into_iter().enumerate();
        let bytes = |(n, size)| std::slice::from_raw_parts((*parameters.add(n)).cast::<u8>(), size).to_vec();
        let args: Vec<Arg> = sizes.map(bytes).map(Arg::Bytes).collect();
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        if let Err(error) = gpu.launch(module, name, grid, block, shared as usize, &args) {
            eprintln!("{error}");
            std::process::exit(134);
        }
        SUCCESS
    }
}
