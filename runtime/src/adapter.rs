//! Trained values on disk: safetensors under canonical names, written beside and then renamed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use crate::error::RuntimeError;
use crate::safefile::{self, SafeFile};

/// A tensor as files hold it.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    F32(Vec<f32>),
    I64(Vec<i64>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub shape: Vec<u64>,
    pub data: Data,
}

impl Stored {
    pub fn f32(shape: Vec<u64>, data: Vec<f32>) -> Self {
        Stored { shape, data: Data::F32(data) }
    }
}

/// Named tensors and what is noted beside them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorFile {
    pub tensors: BTreeMap<String, Stored>,
    pub notes: BTreeMap<String, String>,
}

/// Writes `file` to `path`: all of it or nothing, and never in place of a good file before it is whole.
/// The same content gives the same bytes.
pub fn save(path: &Path, file: &TensorFile) -> Result<(), RuntimeError> {
    replace(path, |to| safefile::encode(to, file))
}

/// Writes beside `path`, then renames.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), RuntimeError> {
    replace(path, |mut to| to.write_all(bytes))
}

fn replace(path: &Path, write: impl FnOnce(&File) -> io::Result<()>) -> Result<(), RuntimeError> {
    let failed = |e: io::Error| {
        let hint = match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space, nothing was replaced",
            _ => "",
        };
        RuntimeError::file(path, format!("cannot be written: {e}{hint}"))
    };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(failed)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".peftc-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let beside = builder.tempfile_in(folder).map_err(failed)?;
    write(beside.as_file()).map_err(failed)?;
    beside.as_file().sync_all().map_err(failed)?;
    beside.persist(path).map_err(|e| failed(e.error))?;
    crate::store::sync_directory(folder);
    Ok(())
}

/// Reads a file of tensors; what is not finite is refused.
pub fn load(path: &Path) -> Result<TensorFile, RuntimeError> {
    let file = SafeFile::open(path)?;
    let mut tensors = BTreeMap::new();
    for name in file.names() {
        let shape = file.shape(name).unwrap_or_default().to_vec();
        let data = if file.integral(name) {
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
