//! Trained values on disk: safetensors under canonical names, written beside and then renamed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use half::{bf16, f16};

use crate::error::RuntimeError;
use crate::safefile::{self, SafeFile};
use crate::store;

/// A tensor as files hold it.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    I64(Vec<i64>),
}

/// A floating-point type that tensors are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Float {
    F32,
    F16,
    BF16,
}

impl Float {
    pub const ALL: [Float; 3] = [Float::F32, Float::F16, Float::BF16];

    /// As the command line and messages write it.
    pub fn name(self) -> &'static str {
        match self {
            Float::F32 => "f32",
            Float::F16 => "f16",
            Float::BF16 => "bf16",
        }
    }

    /// How far a number may be off for having been rounded to this type, relative to itself.
    pub fn rounding(self) -> f64 {
        match self {
            Float::F32 => f64::powi(2.0, -24),
            Float::F16 => f64::powi(2.0, -11),
            Float::BF16 => f64::powi(2.0, -8),
        }
    }

    /// As PyTorch and `config.json` write it.
    pub fn torch(self) -> &'static str {
        match self {
            Float::F32 => "float32",
            Float::F16 => "float16",
            Float::BF16 => "bfloat16",
        }
    }
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

    /// The numbers rounded to the nearest that `dtype` has, ties to even. `Err` holds a finite number that becomes
    /// infinite there.
    pub fn rounded(shape: Vec<u64>, data: Vec<f32>, dtype: Float) -> Result<Self, f32> {
        let data = match dtype {
            Float::F32 => Data::F32(data),
            Float::F16 => Data::F16(narrowed(&data, f16::from_f32, f16::is_finite)?),
            Float::BF16 => Data::BF16(narrowed(&data, bf16::from_f32, bf16::is_finite)?),
        };
        Ok(Stored { shape, data })
    }
}

fn narrowed<T>(data: &[f32], round: fn(f32) -> T, finite: fn(T) -> bool) -> Result<Vec<T>, f32>
where
    T: Copy,
{
    let one = |&x: &f32| {
        let narrow = round(x);
        if finite(narrow) || !x.is_finite() { Ok(narrow) } else { Err(x) }
    };
    data.iter().map(one).collect()
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

/// What the names of files begin with that are being written.
pub const BESIDE: &str = ".peftc-";

fn replace(path: &Path, write: impl FnOnce(&File) -> io::Result<()>) -> Result<(), RuntimeError> {
    let failed = |e: io::Error| {
        let hint = match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space, nothing was replaced",
            _ => "",
        };
        RuntimeError::file(path, format!("cannot be written: {e}{hint}"))
    };
    // A file that is given by a link is replaced where it lies.
    let place = &path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let folder = store::parent_of(place);
    fs::create_dir_all(folder).map_err(failed)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(BESIDE);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let beside = builder.tempfile_in(folder).map_err(failed)?;
    write(beside.as_file()).map_err(failed)?;
    beside.as_file().sync_all().map_err(failed)?;
    beside.persist(place).map_err(|e| failed(e.error))?;
    store::sync_directory(folder);
    Ok(())
}

/// Writes the folder `path`: `fill` is given a folder beside it, which then takes its place, and an older one's with all
/// that it holds. When writing fails or is interrupted, what was there before stands.
pub fn write_folder<E: From<RuntimeError>>(path: &Path, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let failed = |e: io::Error| E::from(RuntimeError::file(path, format!("cannot be written: {e}")));
    // A folder given as `.` or by a link is replaced where it lies.
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let parent = store::parent_of(path);
    fs::create_dir_all(parent).map_err(failed)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(BESIDE);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    let fresh = builder.tempdir_in(parent).map_err(failed)?;
    fill(fresh.path())?;
    store::sync_directory(fresh.path());
    let aside = builder.tempdir_in(parent).map_err(failed)?;
    store::swap(path, fresh, &aside).map_err(failed)
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
