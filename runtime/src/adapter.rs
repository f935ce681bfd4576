//! Files of trained values: safetensors under canonical names, written atomically.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::RuntimeError;
use crate::files;
use crate::safefile::{self, SafeFile};
pub use crate::tensor::{Data, Float, Stored, TensorFile};

/// Writes `file` to `path` atomically. Equal content gives equal bytes.
///
/// # Errors
///
/// If the file cannot be written.
pub fn save(path: &Path, file: &TensorFile) -> Result<(), RuntimeError> {
    files::replace(path, |to| safefile::encode(to, file))
}

/// Reads a file of tensors.
///
/// # Errors
///
/// If the file cannot be read, or a number is not finite.
pub fn load(path: &Path) -> Result<TensorFile, RuntimeError> {
    let file = SafeFile::open(path)?;
    let mut tensors = BTreeMap::new();
    for name in file.names() {
        let shape = file.shape(name).unwrap_or_default().to_vec();
        let data = if file.is_integer(name) {
            Data::I64(file.integers(name)?)
        } else {
            let mut numbers = vec![0.0; shape.iter().product::<u64>() as usize];
            file.floats(name, &mut numbers)?;
            Data::F32(numbers)
        };
        tensors.insert(name.to_string(), Stored { shape, data });
    }
    Ok(TensorFile { tensors, notes: file.notes })
}

#[cfg(test)]
mod tests;
