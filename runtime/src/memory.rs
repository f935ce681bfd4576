//! Memory that starts on a cache line, for vectors of any width.

use std::cell::UnsafeCell;

/// Numbers on one line.
pub const LINE: usize = 16;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

/// A vector of numbers on cache lines. Kernels write into it through pointers made from `&self`,
/// hence the cells.
#[derive(Default)]
pub struct Numbers {
    lines: Vec<UnsafeCell<Line>>,
    length: usize,
}

// SAFETY: safe code writes through `&mut` alone; kernels that share it write apart (see `Session`).
unsafe impl Sync for Numbers {}

impl Numbers {
    pub fn zeros(length: usize) -> Self {
        Numbers { lines: blank(length), length }
    }

    /// Makes room for `length` numbers; what was there need not stay.
    pub fn ensure(&mut self, length: usize) {
        if length > self.lines.len() * LINE {
            // Never both the old and the new one at once.
            self.lines = vec![];
            self.lines = blank(length);
        }
        self.length = length;
    }

    /// For kernels. Writing through it is sound while no slice of these numbers is alive.
    pub fn cells(&self) -> *mut f32 {
        UnsafeCell::raw_get(self.lines.as_ptr()).cast()
    }

    pub fn bytes(&self) -> u64 {
        (self.lines.len() * LINE * 4) as u64
    }
}

fn blank(length: usize) -> Vec<UnsafeCell<Line>> {
    (0..length.div_ceil(LINE)).map(|_| UnsafeCell::new(Line([0.0; LINE]))).collect()
}

impl std::ops::Deref for Numbers {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: lines are plain numbers without gaps, and `length` is within them.
        unsafe { std::slice::from_raw_parts(self.cells(), self.length) }
    }
}

impl std::ops::DerefMut for Numbers {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and `self` is ours alone.
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
