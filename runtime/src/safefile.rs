//! The safetensors format. The reader trusts no byte of a file; the writer is deterministic.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::error::RuntimeError;
use crate::json::{LFS_POINTER_ADVICE, LFS_POINTER_PREFIX};
use crate::source::{self, TensorSource, not_finite};
use crate::tensor::{Data, Float, TensorFile};

/// Bytes of the number at the start of a file that gives the header's length.
const LENGTH_BYTES: usize = 8;

/// The writer aligns the data to this many bytes.
const ALIGNMENT: usize = 64;

/// Type, shape and byte range of a tensor in its file.
#[derive(Clone, Debug)]
struct TensorEntry {
    dtype: Dtype,
    shape: Vec<u64>,
    /// First byte, counted from the start of the file.
    start: usize,
    end: usize,
}

/// A memory-mapped safetensors file whose header has been checked.
#[derive(Debug)]
pub struct SafeFile {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, TensorEntry>,
    /// The header's `__metadata__`.
    pub notes: BTreeMap<String, String>,
}

impl SafeFile {
    /// Maps the file at `path` and checks its header.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or its header is malformed or refers to bytes beyond the file's end.
    pub fn open(path: &Path) -> Result<Self, RuntimeError> {
        let failed = |e: io::Error| RuntimeError::file(path, format!("cannot be read: {e}"));
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.is_dir() {
            return Err(RuntimeError::file(path, "is a directory, a safetensors file was expected"));
        }
        // SAFETY: the mapping is only read. If another process truncates the file meanwhile, its pages vanish, as for
        // every program that maps weights.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        let (tensors, notes) = header(&map).map_err(|why| {
            let remedy = if why == LFS_POINTER_ADVICE { "" } else { "; write or fetch it again" };
            RuntimeError::file(path, format!("not a valid safetensors file: {why}{remedy}"))
        })?;
        Ok(SafeFile { path: path.to_path_buf(), map, tensors, notes })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of a tensor, outermost dimension first; `None` if there is no such tensor.
    pub fn shape(&self, name: &str) -> Option<&[u64]> {
        self.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    /// True if the tensor holds integers or booleans, which [`SafeFile::integers`] reads.
    pub fn is_integer(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|entry| {
            matches!(
                entry.dtype,
                Dtype::BOOL
                    | Dtype::U8
                    | Dtype::I8
                    | Dtype::I16
                    | Dtype::U16
                    | Dtype::I32
                    | Dtype::U32
                    | Dtype::I64
                    | Dtype::U64
            )
        })
    }

    /// The element type, if it is one that [`encode`] writes.
    pub fn float(&self, name: &str) -> Option<Float> {
        match self.tensors.get(name)?.dtype {
            Dtype::F32 => Some(Float::F32),
            Dtype::F16 => Some(Float::F16),
            Dtype::BF16 => Some(Float::BF16),
            _ => None,
        }
    }

    fn entry(&self, name: &str) -> Result<(&TensorEntry, &[u8]), RuntimeError> {
        let entry = self.tensors.get(name);
        let entry = entry.ok_or_else(|| RuntimeError::file(&self.path, format!("it holds no tensor `{name}`")))?;
        Ok((entry, &self.map[entry.start..entry.end]))
    }

    /// Reads a tensor of a floating-point type into `out`.
    ///
    /// # Errors
    ///
    /// If there is no such tensor, if it has another type or another size than `out`, or if a number is not finite.
    pub fn floats(&self, name: &str, out: &mut [f32]) -> Result<(), RuntimeError> {
        let (TensorEntry { dtype, shape, .. }, bytes) = self.entry(name)?;
        let wrong = |message: String| RuntimeError::file(&self.path, format!("tensor `{name}` {message}"));
        if shape.iter().product::<u64>() != out.len() as u64 {
            return Err(wrong(format!("is {shape:?}, but {} numbers are wanted", out.len())));
        }
        let bad = match dtype {
            Dtype::F32 => decode(bytes, out, f32::from_le_bytes),
            Dtype::F64 => decode(bytes, out, |b| f64::from_le_bytes(b) as f32),
            Dtype::F16 => decode(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => decode(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            other => return Err(wrong(format!("holds {other:?}; numbers are read from f32, f16, bf16 or f64"))),
        };
        match bad {
            Some(at) => Err(wrong(not_finite(out[at], at, shape))),
            None => Ok(()),
        }
    }

    /// Reads a tensor of integers or booleans. A `u64` that does not fit becomes `i64::MAX`.
    ///
    /// # Errors
    ///
    /// If there is no such tensor, or it holds floating-point numbers.
    pub fn integers(&self, name: &str) -> Result<Vec<i64>, RuntimeError> {
        fn all<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> i64) -> Vec<i64> {
            bytes.as_chunks::<N>().0.iter().map(|&b| read(b)).collect()
        }
        let (entry, bytes) = self.entry(name)?;
        Ok(match entry.dtype {
            Dtype::BOOL | Dtype::U8 => all(bytes, |[b]| b.into()),
            Dtype::I8 => all(bytes, |b| i8::from_le_bytes(b).into()),
            Dtype::I16 => all(bytes, |b| i16::from_le_bytes(b).into()),
            Dtype::U16 => all(bytes, |b| u16::from_le_bytes(b).into()),
            Dtype::I32 => all(bytes, |b| i32::from_le_bytes(b).into()),
            Dtype::U32 => all(bytes, |b| u32::from_le_bytes(b).into()),
            Dtype::I64 => all(bytes, i64::from_le_bytes),
            // No count or index in a file exceeds an i64, so clamping loses nothing.
            Dtype::U64 => all(bytes, |b| i64::try_from(u64::from_le_bytes(b)).unwrap_or(i64::MAX)),
            other => {
                let message = format!(
                    "tensor `{name}` holds {other:?}; integers are read from i8, i16, i32, i64, u8, u16, u32, u64 or bool"
                );
                return Err(RuntimeError::file(&self.path, message));
            }
        })
    }

    /// Reads a tensor of any type as f64; booleans become 0 and 1.
    ///
    /// # Errors
    ///
    /// If there is no such tensor, or its type is not numeric.
    pub fn numbers(&self, name: &str) -> Result<Vec<f64>, RuntimeError> {
        fn all<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f64) -> Vec<f64> {
            bytes.as_chunks::<N>().0.iter().map(|&b| read(b)).collect()
        }
        let (entry, bytes) = self.entry(name)?;
        Ok(match entry.dtype {
            Dtype::BOOL | Dtype::U8 => all(bytes, |[b]| f64::from(b)),
            Dtype::I8 => all(bytes, |b| f64::from(i8::from_le_bytes(b))),
            Dtype::I16 => all(bytes, |b| f64::from(i16::from_le_bytes(b))),
            Dtype::U16 => all(bytes, |b| f64::from(u16::from_le_bytes(b))),
            Dtype::I32 => all(bytes, |b| f64::from(i32::from_le_bytes(b))),
            Dtype::U32 => all(bytes, |b| f64::from(u32::from_le_bytes(b))),
            Dtype::I64 => all(bytes, |b| i64::from_le_bytes(b) as f64),
            Dtype::U64 => all(bytes, |b| u64::from_le_bytes(b) as f64),
            Dtype::F16 => all(bytes, |b| f16::from_le_bytes(b).to_f64()),
            Dtype::BF16 => all(bytes, |b| bf16::from_le_bytes(b).to_f64()),
            Dtype::F32 => all(bytes, |b| f32::from_le_bytes(b).into()),
            Dtype::F64 => all(bytes, f64::from_le_bytes),
            other => {
                return Err(RuntimeError::file(&self.path, format!("tensor `{name}` holds {other:?}, no numbers")));
            }
        })
    }
}

impl TensorSource for SafeFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn shape(&self, name: &str) -> Option<&[u64]> {
        self.shape(name)
    }

    fn float(&self, name: &str) -> Option<Float> {
        self.float(name)
    }

    fn floats(&self, name: &str, out: &mut [f32]) -> Result<(), RuntimeError> {
        self.floats(name, out)
    }

    fn numbers(&self, name: &str) -> Result<Vec<f64>, RuntimeError> {
        self.numbers(name)
    }

    fn raw(&self, name: &str) -> Result<(String, &[u8]), RuntimeError> {
        let (entry, bytes) = self.entry(name)?;
        Ok((format!("{:?}", entry.dtype), bytes))
    }
}

type Header = (BTreeMap<String, TensorEntry>, BTreeMap<String, String>);

/// Reads the header and checks that every tensor is within the file and has the size of its shape.
fn header(file: &[u8]) -> Result<Header, String> {
    if file.starts_with(LFS_POINTER_PREFIX) {
        return Err(LFS_POINTER_ADVICE.into());
    }
    let length = file.first_chunk::<LENGTH_BYTES>().ok_or("it is too short for a header")?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|e| e.to_string())?;
    let base = length.checked_add(LENGTH_BYTES).filter(|&end| end <= file.len());
    let base = base.ok_or_else(|| format!("its header of {length} bytes does not fit into {} bytes", file.len()))?;
    let metadata: Metadata =
        serde_json::from_slice(&file[LENGTH_BYTES..base]).map_err(|e| format!("its header: {e}"))?;
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let entry = |offset: usize| base.checked_add(offset).filter(|&at| at <= file.len());
        let elements = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let bits = elements.and_then(|n| n.checked_mul(info.dtype.bitsize()));
        match (entry(info.data_offsets.0), entry(info.data_offsets.1), bits) {
            (Some(start), Some(end), Some(bits)) if start <= end && (end - start).checked_mul(8) == Some(bits) => {
                let shape = info.shape.iter().map(|&d| d as u64).collect();
                tensors.insert(name, TensorEntry { dtype: info.dtype, shape, start, end });
            }
            (Some(_), Some(_), _) => {
                return Err(format!("`{name}` does not have the size of its shape {:?}", info.shape));
            }
            _ => return Err(format!("`{name}` lies beyond its end; it may be cut short")),
        }
    }
    Ok((tensors, metadata.metadata().clone().unwrap_or_default().into_iter().collect()))
}

/// Decodes each B bytes into a number, and returns the index of the first that is not finite.
fn decode<const B: usize>(bytes: &[u8], out: &mut [f32], read: impl Fn([u8; B]) -> f32 + Sync) -> Option<usize> {
    source::decode(bytes, out, |b, x: &mut [f32; 1]| x[0] = read(*b))
}

/// Writes tensors and metadata as safetensors, each sorted by name.
///
/// # Errors
///
/// If writing fails, or a tensor has not as many numbers as its shape.
pub fn encode(to: impl Write, file: &TensorFile) -> io::Result<()> {
    let mut header = serde_json::Map::new();
    if !file.notes.is_empty() {
        header.insert("__metadata__".into(), serde_json::to_value(&file.notes)?);
    }
    let mut offset = 0;
    for (name, stored) in &file.tensors {
        let (dtype, width, length) = match &stored.data {
            Data::F32(x) => ("F32", 4, x.len()),
            Data::F16(x) => ("F16", 2, x.len()),
            Data::BF16(x) => ("BF16", 2, x.len()),
            Data::I64(x) => ("I64", 8, x.len()),
        };
        if stored.shape.iter().product::<u64>() != length as u64 {
            let message = format!("tensor `{name}` has {length} numbers for its shape {:?}", stored.shape);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let end = offset + width * length;
        let info = serde_json::json!({ "dtype": dtype, "shape": stored.shape, "data_offsets": [offset, end] });
        header.insert(name.clone(), info);
        offset = end;
    }
    let mut text = serde_json::to_vec(&header)?;
    text.resize((text.len() + LENGTH_BYTES).next_multiple_of(ALIGNMENT) - LENGTH_BYTES, b' ');
    let mut to = BufWriter::with_capacity(1 << 20, to);
    to.write_all(&(text.len() as u64).to_le_bytes())?;
    to.write_all(&text)?;
    for stored in file.tensors.values() {
        match &stored.data {
            Data::F32(x) => x.iter().try_for_each(|x| to.write_all(&x.to_le_bytes()))?,
            Data::F16(x) => x.iter().try_for_each(|x| to.write_all(&x.to_le_bytes()))?,
            Data::BF16(x) => x.iter().try_for_each(|x| to.write_all(&x.to_le_bytes()))?,
            Data::I64(x) => x.iter().try_for_each(|x| to.write_all(&x.to_le_bytes()))?,
        }
    }
    to.flush()
}

#[cfg(test)]
mod tests;
