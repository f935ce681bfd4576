//! Files of tensors in the safetensors format: read in place, written beside and renamed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::memory::{Floats, MappedFloats, TensorData};
use crate::store::sync_directory;

/// Bytes of the header's length.
const PREFIX: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("cannot read `{path}`: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write `{path}`: {source}{}", full(source))]
    Write { path: PathBuf, source: io::Error },
    #[error("`{path}` is damaged or no safetensors file: {why}; fetch or write it again")]
    Damaged { path: PathBuf, why: String },
    #[error("`{path}` holds no tensor `{name}`")]
    Missing { path: PathBuf, name: String },
    #[error("`{name}` in `{path}` has type {found}; f32, f16, bf16 and f64 can be read as weights")]
    Dtype { path: PathBuf, name: String, found: String },
    #[error("`{name}` in `{path}` is {value} at {index:?}: a run that diverged wrote it, or the file is damaged")]
    NotFinite { path: PathBuf, name: String, index: Vec<usize>, value: f32 },
    #[error("no memory for `{name}`: {source}")]
    Memory { name: String, source: io::Error },
}

fn full(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space or give another directory, nothing was replaced"
        }
        _ => "",
    }
}

/// Where a tensor lies in its file.
#[derive(Clone, Debug)]
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    /// In bytes, in the file; within it.
    start: usize,
    end: usize,
}

/// A mapped file whose header has been checked.
#[derive(Debug)]
pub struct SafeFile {
    path: PathBuf,
    map: Arc<Mmap>,
    tensors: BTreeMap<String, Stored>,
    metadata: BTreeMap<String, String>,
}

impl SafeFile {
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let read = |source| FileError::Read { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(read)?;
        if file.metadata().map_err(read)?.is_dir() {
            return Err(read(io::ErrorKind::IsADirectory.into()));
        }
        // SAFETY: the mapping is private and only read. A file that another process shortens meanwhile
        // takes its pages away, as for every program that maps its weights.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let (tensors, metadata) = header(&map).map_err(|why| FileError::Damaged { path: path.to_path_buf(), why })?;
        Ok(SafeFile { path: path.to_path_buf(), map: Arc::new(map), tensors, metadata })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    pub fn all_metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    /// A tensor's values, in place where they are stored as aligned f32. All of them are finite.
    pub fn floats(&self, name: &str) -> Result<TensorData, FileError> {
        let missing = || FileError::Missing { path: self.path.clone(), name: name.into() };
        let Stored { dtype, shape, start, end } = self.tensors.get(name).ok_or_else(missing)?;
        let bytes = &self.map[*start..*end];
        let len: usize = shape.iter().product();
        let memory = |source| FileError::Memory { name: name.into(), source };
        let mapped = match dtype {
            Dtype::F32 => MappedFloats::new(self.map.clone(), *start, len),
            _ => None,
        };
        let data = match (mapped, dtype) {
            (Some(mapped), _) => TensorData::Mapped(mapped),
            (None, Dtype::F32) => convert::<4>(bytes, f32::from_le_bytes).map_err(memory)?,
            (None, Dtype::F16) => convert(bytes, |b| half::f16::from_le_bytes(b).to_f32()).map_err(memory)?,
            (None, Dtype::BF16) => convert(bytes, |b| half::bf16::from_le_bytes(b).to_f32()).map_err(memory)?,
            (None, Dtype::F64) => convert(bytes, |b| f64::from_le_bytes(b) as f32).map_err(memory)?,
            (None, other) => {
                let (path, found) = (self.path.clone(), format!("{other:?}"));
                return Err(FileError::Dtype { path, name: name.into(), found });
            }
        };
        match not_finite(data.as_slice()) {
            Some(at) => {
                let (path, value) = (self.path.clone(), data.as_slice()[at]);
                Err(FileError::NotFinite { path, name: name.into(), index: unravel(at, shape), value })
            }
            None => Ok(data),
        }
    }

    /// A tensor of integers (i64 or i32): what fixtures and inputs hold.
    pub fn integers(&self, name: &str) -> Result<Vec<i64>, FileError> {
        let missing = || FileError::Missing { path: self.path.clone(), name: name.into() };
        let Stored { dtype, start, end, .. } = self.tensors.get(name).ok_or_else(missing)?;
        let bytes = &self.map[*start..*end];
        match dtype {
            Dtype::I64 => Ok(bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect()),
            Dtype::I32 => Ok(bytes.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b).into()).collect()),
            other => {
                let why = format!("`{name}` has type {other:?}, but integers were expected");
                Err(FileError::Damaged { path: self.path.clone(), why })
            }
        }
    }
}

type Header = (BTreeMap<String, Stored>, BTreeMap<String, String>);

/// Reads the header and checks that every tensor lies within the file and has the size of its shape.
fn header(file: &[u8]) -> Result<Header, String> {
    let length = file.first_chunk::<PREFIX>().ok_or("it is too short for a header")?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|e| e.to_string())?;
    let base = length.checked_add(PREFIX).filter(|&end| end <= file.len());
    let base = base.ok_or_else(|| format!("its header of {length} bytes does not fit into {} bytes", file.len()))?;
    let metadata: Metadata = serde_json::from_slice(&file[PREFIX..base]).map_err(|e| format!("its header: {e}"))?;
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let place = |offset: usize| base.checked_add(offset).filter(|&at| at <= file.len());
        let elements = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let bits = elements.and_then(|n| n.checked_mul(info.dtype.bitsize()));
        match (place(info.data_offsets.0), place(info.data_offsets.1), bits) {
            (Some(start), Some(end), Some(bits)) if start <= end && (end - start).checked_mul(8) == Some(bits) => {
                tensors.insert(name, Stored { dtype: info.dtype, shape: info.shape.clone(), start, end });
            }
            (Some(_), Some(_), _) => return Err(format!("`{name}` has not the size of its shape {:?}", info.shape)),
            _ => return Err(format!("`{name}` lies beyond its end; it may be cut short")),
        }
    }
    Ok((tensors, metadata.metadata().clone().unwrap_or_default().into_iter().collect()))
}

/// Elements a thread takes at a time.
const CHUNK: usize = 1 << 16;

fn convert<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32 + Sync) -> io::Result<TensorData> {
    let (source, _) = bytes.as_chunks::<N>();
    let mut floats = Floats::zeroed(source.len())?;
    floats.par_chunks_mut(CHUNK).zip(source.par_chunks(CHUNK)).for_each(|(to, from)| {
        to.iter_mut().zip(from).for_each(|(to, &from)| *to = read(from));
    });
    Ok(TensorData::Owned(floats))
}

/// The first value that is NaN or infinite.
pub fn not_finite(values: &[f32]) -> Option<usize> {
    // Without a branch inside, so that it runs at the speed of memory.
    let bad = |chunk: &&[f32]| chunk.iter().fold(false, |bad, x| bad | !x.is_finite());
    let chunk = values.par_chunks(CHUNK).enumerate().find_first(|(_, chunk)| bad(chunk));
    chunk.and_then(|(at, chunk)| chunk.iter().position(|x| !x.is_finite()).map(|i| at * CHUNK + i))
}

fn unravel(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = shape.iter().rev().map(|&d| (at % d, at /= d).0).collect();
    index.reverse();
    index
}

/// A tensor to write.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    pub name: String,
    pub shape: Vec<u64>,
    pub data: &'a [f32],
}

/// Writes tensors as f32 to `path`: into a file beside it that takes its place when it is complete. The same
/// tensors give the same bytes.
pub fn write(path: &Path, tensors: &[Entry], metadata: &BTreeMap<String, String>) -> Result<(), FileError> {
    let failed = |source| FileError::Write { path: path.to_path_buf(), source };
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(failed)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".peftc-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let file = builder.tempfile_in(parent).map_err(failed)?;
    encode(file.as_file(), tensors, metadata).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error))?;
    sync_directory(parent);
    Ok(())
}

fn encode(to: impl Write, tensors: &[Entry], metadata: &BTreeMap<String, String>) -> io::Result<()> {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), serde_json::to_value(metadata)?);
    }
    let mut offset = 0;
    for Entry { name, shape, data } in tensors {
        let end = offset + data.len() * 4;
        let info = serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": [offset, end] });
        header.insert(name.clone(), info);
        offset = end;
    }
    let mut text = serde_json::to_vec(&header)?;
    // Data begins at a cache line, so that it can be read in place.
    text.resize((text.len() + PREFIX).next_multiple_of(crate::memory::ALIGNMENT) - PREFIX, b' ');
    let mut to = BufWriter::with_capacity(1 << 20, to);
    to.write_all(&(text.len() as u64).to_le_bytes())?;
    to.write_all(&text)?;
    for x in tensors.iter().flat_map(|t| t.data) {
        to.write_all(&x.to_le_bytes())?;
    }
    to.flush()
}

#[cfg(test)]
mod tests;
