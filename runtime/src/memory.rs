//! Memory for kernels, straight from the operating system: zeroed, at the start of a page, and without
//! cost until it is written, so that an optimizer state no entry uses takes none.

use memmap2::MmapMut;

use crate::error::RuntimeError;

/// Numbers on one cache line.
pub const LINE: usize = 16;

/// From this many bytes on large pages are asked for: fewer faults when a buffer is written first.
const LARGE: usize = 4 << 20;

/// A vector of numbers that begins on a cache line. Kernels write into it through [`Numbers::cells`].
#[derive(Debug, Default)]
pub struct Numbers {
    /// `None` when there is nothing to hold: an empty mapping does not exist.
    map: Option<MmapMut>,
    length: usize,
}

impl Numbers {
    /// Ends the process when there is no memory, as `Vec` does; see [`Numbers::try_zeros`].
    pub fn zeros(length: usize) -> Self {
        let layout = || std::alloc::Layout::array::<f32>(length).unwrap_or(std::alloc::Layout::new::<f32>());
        Numbers::try_zeros(length).unwrap_or_else(|_| std::alloc::handle_alloc_error(layout()))
    }

    pub fn try_zeros(length: usize) -> Result<Self, RuntimeError> {
        if length == 0 {
            return Ok(Numbers::default());
        }
        let bytes = length.saturating_mul(4);
        let map = MmapMut::map_anon(bytes).map_err(|e| RuntimeError::Memory {
            wanted: bytes as u64,
            free: None,
            why: e.to_string(),
            mend: "make the batch smaller".into(),
        })?;
        #[cfg(target_os = "linux")]
        if bytes >= LARGE {
            // A wish only: systems without large pages refuse it.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Numbers { map: Some(map), length })
    }

    /// For kernels. Writing through it is sound while no slice of these numbers is alive.
    pub fn cells(&self) -> *mut f32 {
        self.map.as_ref().map_or(std::ptr::dangling_mut(), |map| map.as_ptr().cast_mut().cast())
    }

    pub fn bytes(&self) -> u64 {
        self.map.as_ref().map_or(0, |map| map.len() as u64)
    }
}

/// What has been freed goes back to the operating system: an allocator would keep it.
pub fn release() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it touches only what is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

impl std::ops::Deref for Numbers {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: the mapping begins at a page, holds `length` numbers and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.cells(), self.length) }
    }
}

impl std::ops::DerefMut for Numbers {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, the mapping may be written, and `self` is ours alone.
        unsafe { std::slice::from_raw_parts_mut(self.cells(), self.length) }
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
    fn zeroed_and_aligned() {
        let numbers = Numbers::zeros(1000);
        assert!(numbers.iter().all(|&x| x == 0.0));
        assert!((numbers.cells() as usize).is_multiple_of(LINE * 4));
        assert_eq!((numbers.len(), numbers.bytes()), (1000, 4000));
        assert!(Numbers::zeros(0).is_empty());
        let error = Numbers::try_zeros(usize::MAX / 8).unwrap_err().to_string();
        assert!(error.contains("make the batch smaller"), "{error}");
    }
}
