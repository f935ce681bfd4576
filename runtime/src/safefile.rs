//! The safetensors format, read without trusting a byte and written so that the same tensors give the same
//! bytes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::error::RuntimeError;
use crate::json::{POINTER, POINTS};
use crate::source::{self, TensorSource, not_finite};
use crate::tensor::{Data, Float, TensorFile};

/// Bytes of the header's length.
const PREFIX: usize = 8;

/// Data begins at a multiple of this many bytes.
const ALIGNMENT: usize = 64;

/// Where a tensor lies in its file.
#[derive(Clone, Debug)]
struct Place {
    dtype: Dtype,
    shape: Vec<u64>,
    /// In bytes, within the file.
    start: usize,
    end: usize,
}

/// A mapped file whose header has been checked.
#[derive(Debug)]
pub struct SafeFile {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, Place>,
    pub notes: BTreeMap<String, String>,
}

impl SafeFile {
    pub fn open(path: &Path) -> Result<Self, RuntimeError> {
        let failed = |e: io::Error| RuntimeError::file(path, format!("cannot be read: {e}"));
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.is_dir() {
            return Err(RuntimeError::file(path, "is a directory, a safetensors file was expected"));
        }
        // SAFETY: the mapping is only read. Whoever shortens the file meanwhile takes its pages away, as from every
        // program that maps its weights.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        let (tensors, notes) = header(&map).map_err(|why| {
            let mend = if why == POINTS { "" } else { "; write or fetch it again" };
            RuntimeError::file(path, format!("no sound safetensors file: {why}{mend}"))
        })?;
        Ok(SafeFile { path: path.to_path_buf(), map, tensors, notes })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn shape(&self, name: &str) -> Option<&[u64]> {
        self.tensors.get(name).map(|place| place.shape.as_slice())
    }

    /// Holds integers, so that [`SafeFile::integers`] reads it.
    pub fn integral(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|place| {
            matches!(
                place.dtype,
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

    /// The type of a tensor's numbers, if it is one that is written here.
    pub fn float(&self, name: &str) -> Option<Float> {
        match self.tensors.get(name)?.dtype {
            Dtype::F32 => Some(Float::F32),
            Dtype::F16 => Some(Float::F16),
            Dtype::BF16 => Some(Float::BF16),
            _ => None,
        }
    }

    fn place(&self, name: &str) -> Result<(&Place, &[u8]), RuntimeError> {
        let place = self.tensors.get(name);
        let place = place.ok_or_else(|| RuntimeError::file(&self.path, format!("it holds no tensor `{name}`")))?;
        Ok((place, &self.map[place.start..place.end]))
    }

    /// Reads a tensor in any floating-point type into `out`, which has its size. All of it is finite.
    pub fn floats(&self, name: &str, out: &mut [f32]) -> Result<(), RuntimeError> {
        let (Place { dtype, shape, .. }, bytes) = self.place(name)?;
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

    pub fn integers(&self, name: &str) -> Result<Vec<i64>, RuntimeError> {
        fn all<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> i64) -> Vec<i64> {
            bytes.as_chunks::<N>().0.iter().map(|&b| read(b)).collect()
        }
        let (place, bytes) = self.place(name)?;
        Ok(match place.dtype {
            Dtype::BOOL | Dtype::U8 => all(bytes, |[b]| b.into()),
            Dtype::I8 => all(bytes, |b| i8::from_le_bytes(b).into()),
            Dtype::I16 => all(bytes, |b| i16::from_le_bytes(b).into()),
            Dtype::U16 => all(bytes, |b| u16::from_le_bytes(b).into()),
            Dtype::I32 => all(bytes, |b| i32::from_le_bytes(b).into()),
            Dtype::U32 => all(bytes, |b| u32::from_le_bytes(b).into()),
            Dtype::I64 => all(bytes, i64::from_le_bytes),
            // What is beyond an i64 is beyond whatever is counted.
            Dtype::U64 => all(bytes, |b| i64::try_from(u64::from_le_bytes(b)).unwrap_or(i64::MAX)),
            other => {
                let message = format!(
                    "tensor `{name}` holds {other:?}; integers are read from i8, i16, i32, i64, u8, u16, u32, u64 or bool"
                );
                return Err(RuntimeError::file(&self.path, message));
            }
        })
    }

    /// A tensor of any type, as numbers; booleans are 0 and 1.
    pub fn numbers(&self, name: &str) -> Result<Vec<f64>, RuntimeError> {
        fn all<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f64) -> Vec<f64> {
            bytes.as_chunks::<N>().0.iter().map(|&b| read(b)).collect()
        }
        let (place, bytes) = self.place(name)?;
        Ok(match place.dtype {
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

    fn stored(&self, name: &str) -> Result<(String, &[u8]), RuntimeError> {
        let (place, bytes) = self.place(name)?;
        Ok((format!("{:?}", place.dtype), bytes))
    }
}

type Header = (BTreeMap<String, Place>, BTreeMap<String, String>);

/// Reads the header and checks that every tensor lies within the file and has the size of its shape.
fn header(file: &[u8]) -> Result<Header, String> {
    if file.starts_with(POINTER) {
        return Err(POINTS.into());
    }
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
                let shape = info.shape.iter().map(|&d| d as u64).collect();
                tensors.insert(name, Place { dtype: info.dtype, shape, start, end });
            }
            (Some(_), Some(_), _) => return Err(format!("`{name}` has not the size of its shape {:?}", info.shape)),
            _ => return Err(format!("`{name}` lies beyond its end; it may be cut short")),
        }
    }
    Ok((tensors, metadata.metadata().clone().unwrap_or_default().into_iter().collect()))
}

/// Decodes number by number, and gives the index of the first that is not finite.
fn decode<const B: usize>(bytes: &[u8], out: &mut [f32], read: impl Fn([u8; B]) -> f32 + Sync) -> Option<usize> {
    source::decode(bytes, out, |b, x: &mut [f32; 1]| x[0] = read(*b))
}

/// Writes the file as a stream, header and notes in order of names.
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
    text.resize((text.len() + PREFIX).next_multiple_of(ALIGNMENT) - PREFIX, b' ');
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
