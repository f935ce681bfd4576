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
            features: crate::store::features(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with {} cores ({})", self.arch, self.cores, self.features.join(" "))
    }
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

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    #[error("no CUDA driver is installed: `libcuda` cannot be loaded")]
    NoDriver,
    #[error("the CUDA driver refuses to work: {0}")]
    Driver(String),
}

/// The GPUs of this machine, within `CUDA_VISIBLE_DEVICES`. None, or why none can be seen.
pub fn gpus() -> Result<Vec<Gpu>, CudaError> {
    // SAFETY: loading the driver's library runs its initialisers, which is what asking for it means.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    // Beyond this point the library is there, so no call below panics for want of it.
    let failed = |e: result::DriverError| CudaError::Driver(format!("{:?}", e.0));
    match result::init() {
        Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Ok(vec![]),
        other => other.map_err(failed)?,
    }
    (0..result::device::get_count().map_err(failed)?).map(|ordinal| gpu(ordinal).map_err(failed)).collect()
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
            Err(e) => assert!(e.to_string().contains("CUDA driver")),
        }
    }
}
