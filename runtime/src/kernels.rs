//! The library of kernels and the convention they are called by.
//!
//! A kernel `NAME` is exported as `_mlir__mlir_ciface_NAME`: MLIR's packed form of its C interface, one
//! function `void(void **args)` where `args[i]` points to the value of argument `i`. The arguments are
//!
//! 1. for every buffer of the launch a pointer to a [`Descriptor`] (so `args[i]` is a
//!    `Descriptor **`): a memref of rank 1, however many axes the buffer has;
//! 2. for every extent of the launch an `i64`;
//! 3. `begin` and `end`, each an `i64`: the units to compute.

use std::ffi::c_void;
use std::path::{Path, PathBuf};

/// What MLIR calls the descriptor of a `memref<?xf32>`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub allocated: *mut c_void,
    pub aligned: *mut c_void,
    pub offset: i64,
    pub size: i64,
    pub stride: i64,
}

// SAFETY: a descriptor says where memory is; nothing is accessed through it but by `Call::run`, whose
// caller answers for it.
unsafe impl Send for Descriptor {}
// SAFETY: as above.
unsafe impl Sync for Descriptor {}

impl Descriptor {
    pub fn new(data: *mut c_void, elements: usize) -> Self {
        Descriptor { allocated: data, aligned: data, offset: 0, size: elements as i64, stride: 1 }
    }
}

type Kernel = unsafe extern "C" fn(*mut *mut c_void);

#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    #[error("`{path}` cannot be loaded: {source}; compile the artifact again with `peftc compile`")]
    Open { path: PathBuf, source: libloading::Error },
    #[error(
        "`{path}` has no kernel `{kernel}` although its manifest names one; compile the artifact again with `peftc compile`"
    )]
    Missing { path: PathBuf, kernel: String },
}

/// A loaded library, its kernels in the manifest's order.
#[derive(Debug)]
pub struct Kernels {
    kernels: Vec<Kernel>,
    /// Keeps the code of `kernels` mapped.
    _library: libloading::Library,
}

impl Kernels {
    pub fn load(path: &Path, names: &[String]) -> Result<Self, LibraryError> {
        // A bare name would send the loader through its search path.
        let file = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        // SAFETY: the library holds MLIR's kernels only and runs no code when it is loaded; its hash was
        // compared with the manifest's.
        let library = unsafe { libloading::Library::new(file.as_path()) }
            .map_err(|source| LibraryError::Open { path: path.to_path_buf(), source })?;
        let find = |name: &String| {
            // SAFETY: every kernel has this type, by the convention above.
            unsafe { library.get::<Kernel>(format!("_mlir__mlir_ciface_{name}")) }
                .map(|symbol| *symbol)
                .map_err(|_| LibraryError::Missing { path: path.to_path_buf(), kernel: name.clone() })
        };
        let kernels = names.iter().map(find).collect::<Result<_, _>>()?;
        Ok(Kernels { kernels, _library: library })
    }

    pub fn call(&self, kernel: usize, buffers: Vec<Descriptor>, extents: Vec<i64>) -> Call<'_> {
        Call { kernel: &self.kernels[kernel], buffers, extents }
    }
}

/// A kernel with its buffers and sizes: all but the units.
#[derive(Debug)]
pub struct Call<'a> {
    kernel: &'a Kernel,
    buffers: Vec<Descriptor>,
    extents: Vec<i64>,
}

impl Call<'_> {
    /// Elements in all buffers: a measure of the work.
    pub fn elements(&self) -> u64 {
        self.buffers.iter().map(|b| b.size as u64).sum()
    }

    /// Computes the units `begin..end`.
    ///
    /// # Safety
    ///
    /// Every descriptor describes live memory of the size the kernel was compiled for, nobody else
    /// accesses what it writes, and no other thread runs any of the same units.
    pub unsafe fn run(&self, begin: u64, end: u64) {
        let pointers: Vec<*const Descriptor> = self.buffers.iter().map(std::ptr::from_ref).collect();
        let units = [begin as i64, end as i64];
        let address = |x: &i64| std::ptr::from_ref(x).cast_mut().cast::<c_void>();
        let mut args: Vec<*mut c_void> = pointers
            .iter()
            .map(|p| std::ptr::from_ref(p).cast_mut().cast())
            .chain(self.extents.iter().chain(&units).map(address))
            .collect();
        // SAFETY: `args` is what the convention asks for, and outlives the call; kernels only read it.
        unsafe { (self.kernel)(args.as_mut_ptr()) }
    }
}
