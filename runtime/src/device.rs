//! The devices to compute on: this machine's processor, and its GPUs if there is a CUDA driver.

use std::fmt;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute};

/// The processor that CPU kernels run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Architecture: `x86_64`.
    pub arch: &'static str,
    /// Features by LLVM's names, as artifacts list them.
    pub features: Vec<&'static str>,
    /// Threads that this process may run at once.
    pub cores: usize,
}

impl Cpu {
    /// The processor of this machine.
    pub fn detect() -> Self {
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
        /// The features of this processor that kernels may use, by LLVM's names.
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

/// The features of this processor that kernels may use: none are known for this architecture.
#[cfg(not(target_arch = "x86_64"))]
pub fn features() -> Vec<&'static str> {
    vec![]
}

/// True if this processor has a feature; `+avx2` and Rust's name `bmi1` for LLVM's `bmi` are accepted too. Only
/// features of x86 are known.
pub(crate) fn has_feature(name: &str) -> bool {
    let name = name.strip_prefix('+').unwrap_or(name);
    features().contains(&if name == "bmi1" { "bmi" } else { name })
}

/// A GPU that the CUDA driver knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// The driver's name for it.
    pub name: String,
    /// Compute capability, (major, minor): (9, 0) is sm_90.
    pub capability: (i32, i32),
    /// Bytes of device memory.
    pub bytes: u64,
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        write!(f, "{} (sm_{major}{minor}, {:.0} GiB)", self.name, self.bytes as f64 / f64::from(1 << 30))
    }
}

/// The least CUDA version that a driver must support, as the driver encodes it (11040 is 11.4). Of the functions that
/// the runtime calls, the newest, which instantiates a graph, came with CUDA 11.4. The PTX needs nothing newer: PTX for
/// sm_90 came with CUDA 11.8, and so did the first driver for such GPUs.
pub const MIN_CUDA_VERSION: i32 = 11_040;

/// Why there is no GPU to run on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// The driver's library cannot be loaded.
    #[error(
        "no CUDA driver is installed: `libcuda.so.1` cannot be loaded; install NVIDIA's driver, R470 or later (the \
         toolkit is not needed), or give the container its GPUs, as by `--gpus all`"
    )]
    NoDriver,
    /// The driver reports no device.
    #[error(
        "the driver shows no GPU: `nvidia-smi -L` lists what the machine has, and `CUDA_VISIBLE_DEVICES` can hide it"
    )]
    NoDevice,
    /// The driver supports only this older CUDA version, as the driver encodes it.
    #[error(
        "the driver knows CUDA {}.{} and 11.4 is the least: update NVIDIA's driver to R470 or later", .0 / 1000, .0 % 1000 / 10
    )]
    OldDriver(i32),
    /// A driver call failed; the text is the driver's.
    #[error("the CUDA driver refuses to work: {0}; `nvidia-smi` shows whether the driver and its kernel module match")]
    Driver(String),
}

/// The driver's description of an error.
pub(crate) fn describe(error: result::DriverError) -> String {
    match error.error_string() {
        Ok(text) => format!("{} ({:?})", text.to_string_lossy(), error.0),
        Err(_) => format!("{:?}", error.0),
    }
}

/// The GPUs of this machine, restricted by `CUDA_VISIBLE_DEVICES`: at least one.
///
/// # Errors
///
/// If there is no driver, no GPU, or the driver is too old.
pub fn gpus() -> Result<Vec<Gpu>, CudaError> {
    // SAFETY: loading the driver's library runs its initialisers, as intended.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    // The library has been loaded, and every recent enough one has the functions called here.
    let failed = |e: result::DriverError| CudaError::Driver(describe(e));
    let mut version = 0;
    // SAFETY: this function may be called before any other.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed)?;
    if version < MIN_CUDA_VERSION {
        return Err(CudaError::OldDriver(version));
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
    // SAFETY: `device` comes from the driver.
    let bytes = unsafe { result::device::total_mem(device) }? as u64;
    Ok(Gpu { name: result::device::get_name(device)?, capability: (major, minor), bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn describes_the_devices_of_this_machine() {
        let cpu = Cpu::detect();
        assert!(cpu.cores >= 1 && cpu.to_string().contains(std::env::consts::ARCH));
        match gpus() {
            Ok(gpus) => gpus.iter().for_each(|gpu| println!("{gpu}")),
            Err(e) => assert!(e.to_string().contains("driver")),
        }
    }
}
