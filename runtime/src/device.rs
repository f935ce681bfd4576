//! What there is to compute on: this processor, and GPUs as far as a driver is there.

use std::fmt;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute};

/// The processor kernels run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// `x86_64`.
    pub arch: &'static str,
    /// By LLVM's names, as artifacts list them.
    pub features: Vec<&'static str>,
    /// Threads that run at once, within what this process is allowed.
    pub cores: usize,
}

impl Cpu {
    pub fn describe() -> Self {
        Cpu {
            arch: std::env::consts::ARCH,
            features: features(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with {} cores ({})", self.arch, self.cores, self.features.join(" "))
    }
}

macro_rules! detected {
    ($($llvm:literal => $rust:tt),* $(,)?) => {
        /// The features of this processor that kernels may ask for, by LLVM's names.
        #[cfg(target_arch = "x86_64")]
        pub fn features() -> Vec<&'static str> {
            let mut found = vec![];
            $(if std::arch::is_x86_feature_detected!($rust) { found.push($llvm); })*
            found
        }
    };
}

detected! {
    "sse3" => "sse3", "ssse3" => "ssse3", "sse4.1" => "sse4.1", "sse4.2" => "sse4.2", "popcnt" => "popcnt",
    "avx" => "avx", "avx2" => "avx2", "fma" => "fma", "f16c" => "f16c", "bmi" => "bmi1", "bmi2" => "bmi2",
    "lzcnt" => "lzcnt", "movbe" => "movbe",
    "avx512f" => "avx512f", "avx512cd" => "avx512cd", "avx512bw" => "avx512bw", "avx512dq" => "avx512dq",
    "avx512vl" => "avx512vl", "avx512ifma" => "avx512ifma", "avx512vbmi" => "avx512vbmi",
    "avx512vbmi2" => "avx512vbmi2", "avx512vnni" => "avx512vnni", "avx512bitalg" => "avx512bitalg",
    "avx512vpopcntdq" => "avx512vpopcntdq", "avx512bf16" => "avx512bf16",
}

#[cfg(not(target_arch = "x86_64"))]
pub fn features() -> Vec<&'static str> {
    vec![]
}

/// Accepts LLVM's `+avx2`, and Rust's `bmi1` for its `bmi`. On other processors only x86's are asked for.
pub(crate) fn has_feature(name: &str) -> bool {
    let name = name.strip_prefix('+').unwrap_or(name);
    features().contains(&if name == "bmi1" { "bmi" } else { name })
}

/// A GPU the driver knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    pub name: String,
    /// Compute capability: (9, 0) is sm_90.
    pub capability: (i32, i32),
    pub bytes: u64,
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        write!(f, "{} (sm_{major}{minor}, {:.0} GiB)", self.name, self.bytes as f64 / f64::from(1 << 30))
    }
}

/// The version of CUDA that a driver must know: of what the runtime calls, the youngest is the call that makes a graph
/// ready to run, of CUDA 11.4. PTX asks for no more: that for sm_90 is of 11.8, as is the first driver for such GPUs.
pub const LEAST: i32 = 11_040;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    #[error(
        "no CUDA driver is installed: `libcuda.so.1` cannot be loaded; install NVIDIA's driver, R470 or later (the \
         toolkit is not needed), or give the container its GPUs, as by `--gpus all`"
    )]
    NoDriver,
    #[error(
        "the driver shows no GPU: `nvidia-smi -L` lists what the machine has, and `CUDA_VISIBLE_DEVICES` can hide it"
    )]
    NoDevice,
    #[error(
        "the driver knows CUDA {}.{} and 11.4 is the least: update NVIDIA's driver to R470 or later", .0 / 1000, .0 % 1000 / 10
    )]
    Old(i32),
    #[error("the CUDA driver refuses to work: {0}; `nvidia-smi` shows whether it and the kernel's module fit")]
    Driver(String),
}

/// What the driver says of a call that failed.
pub(crate) fn said(error: result::DriverError) -> String {
    match error.error_string() {
        Ok(text) => format!("{} ({:?})", text.to_string_lossy(), error.0),
        Err(_) => format!("{:?}", error.0),
    }
}

/// The GPUs of this machine, within `CUDA_VISIBLE_DEVICES`: at least one, or why none can be had.
pub fn gpus() -> Result<Vec<Gpu>, CudaError> {
    // SAFETY: loading the driver's library runs its initialisers, which is what asking for it means.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    // The library is there: what is called is missing from none that is young enough.
    let failed = |e: result::DriverError| CudaError::Driver(said(e));
    let mut version = 0;
    // SAFETY: it may be called before all else.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed)?;
    if version < LEAST {
        return Err(CudaError::Old(version));
    }
    match result::init() {
        Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Err(CudaError::NoDevice),
        other => other.map_err(failed)?,
    }
    match result::device::get_count().map_err(failed)? {
        0 => Err(CudaError::NoDevice),
        count => (0..count).map(|ordinal| gpu(ordinal).map_err(failed)).collect(),
    }
}

fn gpu(ordinal: i32) -> Result<Gpu, result::DriverError> {
    let device = result::device::get(ordinal)?;
    // SAFETY: `device` comes from the driver.
    let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) };
    let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // SAFETY: as above.
    let bytes = unsafe { result::device::total_mem(device) }? as u64;
    Ok(Gpu { name: result::device::get_name(device)?, capability: (major, minor), bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_is_there() {
        let cpu = Cpu::describe();
        assert!(cpu.cores >= 1 && cpu.to_string().contains(std::env::consts::ARCH));
        match gpus() {
            Ok(gpus) => gpus.iter().for_each(|gpu| println!("{gpu}")),
            Err(e) => assert!(e.to_string().contains("driver")),
        }
    }
}
