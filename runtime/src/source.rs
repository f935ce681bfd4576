//! Files of tensors, whatever their format: [`crate::safefile`] and [`crate::gguf`] read one each.

use std::fmt::Debug;
use std::path::Path;

use rayon::prelude::*;

use crate::error::RuntimeError;
use crate::tensor::Float;

/// Tensors of one mapped file whose header has been checked: every tensor lies within the file and has the size of its
/// shape.
pub trait TensorSource: Debug + Send + Sync {
    fn path(&self) -> &Path;

    /// Names as the file has them, in order.
    fn names(&self) -> Vec<&str>;

    /// Row-major, the outermost axis first.
    fn shape(&self, name: &str) -> Option<&[u64]>;

    /// The type of a tensor's numbers, if it is one that [`crate::safefile`] writes.
    fn float(&self, name: &str) -> Option<Float>;

    /// How far a number of the tensor may be off for having been rounded to its type, relative to itself.
    fn rounding(&self, name: &str) -> f64 {
        self.float(name).map_or(0.0, Float::rounding)
    }

    /// Reads a tensor of any floating-point type, or a quantised one, into `out`, which has its size. Refuses numbers
    /// that are not finite, with their index.
    fn floats(&self, name: &str, out: &mut [f32]) -> Result<(), RuntimeError>;

    /// A tensor of any type, as numbers.
    fn numbers(&self, name: &str) -> Result<Vec<f64>, RuntimeError>;

    /// The name of a tensor's type and its bytes as they lie in the file.
    fn stored(&self, name: &str) -> Result<(String, &[u8]), RuntimeError>;
}

/// Both tensors have one shape and the same numbers.
pub fn equal(
    one: &dyn TensorSource,
    name: &str,
    other: &dyn TensorSource,
    of_other: &str,
) -> Result<bool, RuntimeError> {
    let ((a, x), (b, y)) = (one.stored(name)?, other.stored(of_other)?);
    if one.shape(name) != other.shape(of_other) {
        return Ok(false);
    }
    Ok(if a == b { x == y } else { one.numbers(name)? == other.numbers(of_other)? })
}

/// Numbers that a thread decodes at a time.
const CHUNK: usize = 1 << 16;

/// Decodes blocks of B bytes into N numbers each, in parallel, and gives the index of the first number that is not
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

/// The number at place `at` of a tensor, as a part of a message: it is not finite.
pub(crate) fn not_finite(number: f32, at: usize, shape: &[u64]) -> String {
    let (mut index, mut at) = (vec![], at as u64);
    for &d in shape.iter().rev() {
        index.push(at % d);
        at /= d;
    }
    index.reverse();
    format!("holds {number} at {index:?}; the file is spoilt or a run diverged")
}
