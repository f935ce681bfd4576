//! The interface of tensor files, which [`crate::safefile`] and [`crate::gguf`] implement.

use std::fmt::Debug;
use std::path::Path;

use rayon::prelude::*;

use crate::error::RuntimeError;
use crate::tensor::Float;

/// The tensors of a memory-mapped file whose header has been checked: every tensor is within the file and has the size
/// of its shape.
pub trait TensorSource: Debug + Send + Sync {
    /// The file's path.
    fn path(&self) -> &Path;

    /// Names of the tensors as in the file, sorted.
    fn names(&self) -> Vec<&str>;

    /// Shape of a tensor, outermost dimension first; `None` if the file has no such tensor.
    fn shape(&self, name: &str) -> Option<&[u64]>;

    /// The element type, if it is one that [`crate::safefile`] writes.
    fn float(&self, name: &str) -> Option<Float>;

    /// The largest relative error from rounding a number to the tensor's element type.
    fn rounding(&self, name: &str) -> f64 {
        self.float(name).map_or(0.0, Float::rounding)
    }

    /// Reads a tensor of a floating-point or quantised type into `out`.
    ///
    /// # Errors
    ///
    /// If the file has no such tensor, if it has another type or another size than `out`, or if a number is not finite.
    fn floats(&self, name: &str, out: &mut [f32]) -> Result<(), RuntimeError>;

    /// Reads a tensor of any numeric type.
    ///
    /// # Errors
    ///
    /// If the file has no such tensor or its type is not readable.
    fn numbers(&self, name: &str) -> Result<Vec<f64>, RuntimeError>;

    /// The name of a tensor's type and its bytes in the file.
    ///
    /// # Errors
    ///
    /// If the file has no such tensor.
    fn raw(&self, name: &str) -> Result<(String, &[u8]), RuntimeError>;
}

/// True if both tensors have the same shape and the same numbers.
///
/// # Errors
///
/// If a tensor is missing or cannot be read.
pub fn equal(
    one: &dyn TensorSource,
    name: &str,
    other: &dyn TensorSource,
    of_other: &str,
) -> Result<bool, RuntimeError> {
    let ((a, x), (b, y)) = (one.raw(name)?, other.raw(of_other)?);
    if one.shape(name) != other.shape(of_other) {
        return Ok(false);
    }
    Ok(if a == b { x == y } else { one.numbers(name)? == other.numbers(of_other)? })
}

/// Numbers that one task decodes; tasks run in parallel.
const CHUNK: usize = 1 << 16;

/// Decodes blocks of B bytes into N numbers each, in parallel, and returns the index of the first number that is not
/// finite. `out` has N numbers for each block of `bytes`.
pub(crate) fn decode<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    read: impl Fn(&[u8; B], &mut [f32; N]) + Sync,
) -> Option<usize> {
    let (blocks, _) = bytes.as_chunks::<B>();
    let (numbers, _) = out.as_chunks_mut::<N>();
    let each = CHUNK / N;
    let parts = numbers.par_chunks_mut(each).zip(blocks.par_chunks(each)).enumerate();
    let bad = parts.filter_map(|(at, (to, from))| {
        let mut finite = true;
        for (to, from) in to.iter_mut().zip(from) {
            read(from, to);
            finite &= to.iter().all(|x| x.is_finite());
        }
        if finite {
            return None;
        }
        to.as_flattened().iter().position(|x| !x.is_finite()).map(|i| at * each * N + i)
    });
    bad.min()
}

/// The part of a message that says which number of a tensor is not finite.
pub(crate) fn not_finite(number: f32, at: usize, shape: &[u64]) -> String {
    let (mut index, mut at) = (vec![], at as u64);
    for &d in shape.iter().rev() {
        index.push(at % d);
        at /= d;
    }
    index.reverse();
    format!("holds {number} at {index:?}; the file is damaged or a run diverged")
}
