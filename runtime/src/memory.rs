//! Host memory for kernels, mapped straight from the operating system: zeroed, page-aligned, and backed by physical
//! memory only once it is written, so that optimizer state that no entry uses costs nothing.

use memmap2::MmapMut;

use crate::error::RuntimeError;

/// The number of `f32` in a cache line of 64 bytes.
pub const CACHE_LINE_FLOATS: usize = 16;

/// Mappings of at least this many bytes ask for huge pages, which cause fewer page faults on first use.
const MIN_HUGE_PAGE_BYTES: usize = 4 << 20;

/// A page-aligned vector of `f32`. Kernels write to it through [`Numbers::kernel_ptr`].
#[derive(Debug, Default)]
pub struct Numbers {
    /// `None` for an empty vector, since an empty mapping does not exist.
    map: Option<MmapMut>,
    length: usize,
}

impl Numbers {
    /// Zeros.
    ///
    /// # Panics
    ///
    /// Like `Vec`, it aborts the process when there is not enough memory; see [`Numbers::try_zeros`].
    pub fn zeros(length: usize) -> Self {
        let layout = || std::alloc::Layout::array::<f32>(length).unwrap_or(std::alloc::Layout::new::<f32>());
        Numbers::try_zeros(length).unwrap_or_else(|_| std::alloc::handle_alloc_error(layout()))
    }

    /// Zeros.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::Memory`] when there is not enough memory.
    pub fn try_zeros(length: usize) -> Result<Self, RuntimeError> {
        if length == 0 {
            return Ok(Numbers::default());
        }
        let bytes = length.saturating_mul(4);
        let map = MmapMut::map_anon(bytes).map_err(|e| RuntimeError::Memory {
            wanted: bytes as u64,
            free: None,
            why: e.to_string(),
            remedy: "make the batch smaller".into(),
        })?;
        #[cfg(target_os = "linux")]
        if bytes >= MIN_HUGE_PAGE_BYTES {
            // This is advice only: a system without huge pages refuses it.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Numbers { map: Some(map), length })
    }

    /// Address of the first number, for kernels. Writing through it is sound while no slice of these numbers is alive.
    pub fn kernel_ptr(&self) -> *mut f32 {
        self.map.as_ref().map_or(std::ptr::dangling_mut(), |map| map.as_ptr().cast_mut().cast())
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.map.as_ref().map_or(0, |map| map.len() as u64)
    }
}

/// Returns freed heap memory to the operating system, which the allocator would keep.
pub fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` touches only memory that is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

impl std::ops::Deref for Numbers {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: the mapping is page-aligned, holds `length` numbers and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.kernel_ptr(), self.length) }
    }
}

impl std::ops::DerefMut for Numbers {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`; in addition the mapping is writable and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.kernel_ptr(), self.length) }
    }
}

impl From<&[f32]> for Numbers {
    fn from(numbers: &[f32]) -> Self {
        let mut own = Numbers::zeros(numbers.len());
        own.copy_from_slice(numbers);
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zeroed_and_aligned() {
        let numbers = Numbers::zeros(1000);
        assert!(numbers.iter().all(|&x| x == 0.0));
        assert!((numbers.kernel_ptr() as usize).is_multiple_of(CACHE_LINE_FLOATS * 4));
        assert_eq!((numbers.len(), numbers.bytes()), (1000, 4000));
        assert!(Numbers::zeros(0).is_empty());
        let error = Numbers::try_zeros(usize::MAX / 8).unwrap_err().to_string();
        assert!(error.contains("make the batch smaller"), "{error}");
    }
}
