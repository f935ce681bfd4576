//! Memory that kernels read and write: zeroed, page-aligned, and touched only when used.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use memmap2::{Mmap, MmapMut};

/// Bytes every block of [`Floats`] and of the arena is aligned to: a cache line, a register of AVX-512.
pub const ALIGNMENT: usize = 64;

/// From this size on large pages are asked for: fewer faults when a buffer is touched first.
const LARGE: usize = 4 << 20;

/// A zeroed vector of fixed length, straight from the operating system: pages cost nothing until they
/// are written, so an optimizer state that no entry uses takes no memory.
#[derive(Debug, Default)]
pub struct Floats {
    /// `None` when empty: an empty mapping does not exist.
    map: Option<MmapMut>,
    len: usize,
}

impl Floats {
    pub fn zeroed(len: usize) -> io::Result<Self> {
        let bytes = len.checked_mul(4).ok_or(io::ErrorKind::OutOfMemory)?;
        if bytes == 0 {
            return Ok(Floats::default());
        }
        let map = MmapMut::map_anon(bytes)?;
        #[cfg(target_os = "linux")]
        if bytes >= LARGE {
            // A wish only: kernels built without large pages refuse it.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Floats { map: Some(map), len })
    }

    pub fn copied(source: &[f32]) -> io::Result<Self> {
        let mut floats = Floats::zeroed(source.len())?;
        floats.copy_from_slice(source);
        Ok(floats)
    }

    pub fn bytes(&self) -> u64 {
        self.len as u64 * 4
    }

    /// For kernels. It comes from the mapping itself, so references made later do not end it.
    pub(crate) fn pointer(&self) -> *mut f32 {
        self.map.as_ref().map_or(std::ptr::dangling_mut(), |map| map.as_ptr().cast_mut().cast())
    }
}

impl Deref for Floats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &self.map {
            // SAFETY: the mapping holds `len` floats, begins at a page and lives as long as `self`;
            // every bit pattern is a float.
            Some(map) => unsafe { std::slice::from_raw_parts(map.as_ptr().cast(), self.len) },
            None => &[],
        }
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.map {
            // SAFETY: as for `deref`, and `&mut self` makes the access the only one.
            Some(map) => unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().cast(), self.len) },
            None => &mut [],
        }
    }
}

/// The values of one tensor: where its file lies in memory, or a copy.
#[derive(Debug)]
pub enum TensorData {
    Owned(Floats),
    Mapped(MappedFloats),
}

impl TensorData {
    pub fn as_slice(&self) -> &[f32] {
        match self {
            TensorData::Owned(floats) => floats,
            TensorData::Mapped(mapped) => mapped.as_slice(),
        }
    }
}

/// Floats inside a mapped file.
#[derive(Debug)]
pub struct MappedFloats {
    map: Arc<Mmap>,
    /// Where they begin, in bytes.
    start: usize,
    len: usize,
}

impl MappedFloats {
    /// `None` if they cannot be read in place: misaligned, outside the file, or stored in another byte order.
    pub fn new(map: Arc<Mmap>, start: usize, len: usize) -> Option<Self> {
        let end = start.checked_add(len.checked_mul(4)?)?;
        let aligned = (map.as_ptr() as usize + start).is_multiple_of(align_of::<f32>());
        (end <= map.len() && aligned && cfg!(target_endian = "little")).then_some(MappedFloats { map, start, len })
    }

    pub fn as_slice(&self) -> &[f32] {
        // SAFETY: `new` checked bounds and alignment; the mapping is private, read-only and held by `self`.
        // Whoever shortens the file under a running process takes its pages away: that is documented
        // for users, as for every program that maps its weights.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(self.start).cast(), self.len) }
    }
}

impl Drop for MappedFloats {
    /// Others may keep the file mapped; at least the pages of this tensor go.
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        if self.len * 4 >= LARGE {
            // SAFETY: the mapping is read-only and has no changes to lose: pages that a neighbour still
            // reads come back from the file.
            let _ = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, self.start, self.len * 4)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroed_aligned_and_empty() {
        let floats = Floats::zeroed(1000).unwrap();
        assert!(floats.iter().all(|&x| x == 0.0));
        assert!((floats.as_ptr() as usize).is_multiple_of(ALIGNMENT));
        assert!(Floats::zeroed(0).unwrap().is_empty());
        assert!(Floats::zeroed(usize::MAX / 2).is_err());
    }
}
