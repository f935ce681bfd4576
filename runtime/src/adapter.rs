//! Trained values on disk: safetensors under canonical names, written beside and then renamed.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::RuntimeError;

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
pub fn save(path: &Path, file: &TensorFile) -> Result<(), RuntimeError> {
    let failed = |e: &dyn std::fmt::Display| RuntimeError::file(path, format!("cannot be written: {e}"));
    let bytes: BTreeMap<&String, Vec<u8>> = file
        .tensors
        .iter()
        .map(|(name, stored)| {
            let bytes = match &stored.data {
                Data::F32(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
                Data::I64(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            };
            (name, bytes)
        })
        .collect();
    let mut views = vec![];
    for (name, stored) in &file.tensors {
        let dtype = if let Data::F32(_) = stored.data { Dtype::F32 } else { Dtype::I64 };
        let shape = stored.shape.iter().map(|&n| n as usize).collect();
        views.push((name.as_str(), TensorView::new(dtype, shape, &bytes[name]).map_err(|e| failed(&e))?));
    }
    let notes: HashMap<String, String> = file.notes.clone().into_iter().collect();
    let text = safetensors::serialize(views, Some(notes)).map_err(|e| failed(&e))?;
    write_whole(path, &text)
}

/// Writes beside `path`, then renames.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), RuntimeError> {
    let failed = |e: std::io::Error| RuntimeError::file(path, format!("cannot be written: {e}"));
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(failed)?;
    let mut beside = tempfile::Builder::new().prefix(".peftc-").tempfile_in(folder).map_err(failed)?;
    beside.write_all(bytes).map_err(failed)?;
    beside.as_file().sync_all().map_err(failed)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let readable = fs::Permissions::from_mode(0o644);
        beside.as_file().set_permissions(readable).map_err(failed)?;
    }
    beside.persist(path).map_err(|e| failed(e.error))?;
    crate::store::sync_directory(folder);
    Ok(())
}

/// Reads a file of f32 and integer tensors; what is not finite is refused.
pub fn load(path: &Path) -> Result<TensorFile, RuntimeError> {
    let bytes = fs::read(path).map_err(|e| RuntimeError::file(path, e))?;
    let broken = |e: safetensors::SafeTensorError| {
        RuntimeError::file(path, format!("no sound safetensors file ({e}); write or fetch it again"))
    };
    let file = SafeTensors::deserialize(&bytes).map_err(broken)?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
    let notes = metadata.metadata().clone().unwrap_or_default().into_iter().collect();
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let bytes = view.data();
        let data = match view.dtype() {
            Dtype::F32 => {
                Data::F32(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
            }
            Dtype::I32 => {
                Data::I64(bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]).into()).collect())
            }
            Dtype::I64 => {
                let number = |b: &[u8]| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
                Data::I64(bytes.chunks_exact(8).map(number).collect())
            }
            other => {
                return Err(RuntimeError::file(
                    path,
                    format!("tensor `{name}` holds {other:?}; f32 or i64 belong here"),
                ));
            }
        };
        if let Data::F32(x) = &data
            && let Some(at) = x.iter().position(|x| !x.is_finite())
        {
            return Err(RuntimeError::file(path, format!("tensor `{name}` holds {} at index {at}", x[at])));
        }
        let shape = view.shape().iter().map(|&n| n as u64).collect();
        tensors.insert(name.to_string(), Stored { shape, data });
    }
    Ok(TensorFile { tensors, notes })
}
