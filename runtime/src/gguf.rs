//! GGUF, the file format of llama.cpp (specified in `docs/gguf.md` of ggml): metadata and tensors of one model,
//! possibly quantised.
//!
//! The reader takes versions 2 and 3 in little-endian byte order. It trusts no byte: counts, lengths and offsets are
//! compared with the file's size before anything is allocated for them.

mod blocks;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::RuntimeError;
use crate::json::{LFS_POINTER_ADVICE, LFS_POINTER_PREFIX};
use crate::source::{TensorSource, not_finite};
use crate::tensor::Float;
use blocks::{TYPES, Type};

/// The first bytes of a GGUF file.
const MAGIC: &[u8; 4] = b"GGUF";

/// The first bytes of formats older than GGUF.
const OLDER_FORMATS: [(&[u8; 4], &str); 3] = [(b"lmgg", "GGML"), (b"tjgg", "GGJT"), (b"algg", "GGLA")];

/// The largest number of dimensions of a tensor.
const MAX_DIMENSIONS: u32 = 4;

/// The default of `general.alignment`, in bytes.
const ALIGNMENT: u64 = 32;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// An unsigned integer of any width.
    Unsigned(u64),
    /// A signed integer of any width.
    Signed(i64),
    /// The shortest decimal number that rounds to the number in the file: 1e-5 for the f32 nearest to it.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A string.
    Text(String),
    /// A list, whose elements are read on demand.
    List(List),
}

/// The type, length and byte range of a metadata list.
#[derive(Clone, Debug, PartialEq)]
pub struct List {
    kind: ValueType,
    /// Number of elements.
    pub count: u64,
    start: usize,
    end: usize,
}

/// The type of a metadata value, in the order of GGUF's type numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    List,
    U64,
    I64,
    F64,
}

impl ValueType {
    /// The type with a GGUF type number.
    fn of(id: u32) -> Result<Self, String> {
        use ValueType::*;
        let all = [U8, I8, U16, I16, U32, I32, F32, Bool, Text, List, U64, I64, F64];
        all.get(id as usize).copied().ok_or_else(|| format!("is of type {id}, and GGUF has the types 0 to 12"))
    }

    /// The size of a value in bytes; for texts and lists the least size.
    fn bytes(self) -> u64 {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::Text => 8,
            ValueType::List => 12,
        }
    }
}

/// Type, shape and byte range of a tensor in its file.
#[derive(Clone, Debug)]
struct TensorEntry {
    ty: &'static Type,
    /// Row-major: the file's dimensions in reverse order.
    shape: Vec<u64>,
    /// First byte, counted from the start of the file.
    start: usize,
    end: usize,
}

/// A memory-mapped GGUF file whose metadata and tensor entries have been checked.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorEntry>,
}

/// True if the path is a GGUF file: its name ends in `.gguf`, or it is a regular file that starts with GGUF's magic
/// bytes.
pub fn is_gguf(path: &Path) -> bool {
    let begins = || {
        let mut first = [0; 4];
        File::open(path).and_then(|mut file| file.read_exact(&mut first)).is_ok_and(|()| first == *MAGIC)
    };
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => false,
        Ok(found) if found.is_file() && begins() => true,
        _ => path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf")),
    }
}

impl GgufFile {
    /// Maps the file at `path` and checks its header.
    ///
    /// # Errors
    ///
    /// If the file is of another format, of version 1 or big-endian, if it is cut short, or if a count, text, type,
    /// offset or dimension in it is not possible.
    pub fn open(path: &Path) -> Result<Self, RuntimeError> {
        let failed = |e: io::Error| RuntimeError::file(path, format!("cannot be read: {e}"));
        // Only regular files are opened, since opening a pipe would block.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(RuntimeError::file(path, "is no plain file, a GGUF file was expected"));
        }
        let file = File::open(path).map_err(failed)?;
        // SAFETY: the mapping is only read. If another process truncates the file meanwhile, its pages vanish, as for
        // every program that maps weights.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        let (metadata, tensors) =
            header(&map).map_err(|why| RuntimeError::file(path, format!("no GGUF file that is read: {why}")))?;
        Ok(GgufFile { path: path.to_path_buf(), map, metadata, tensors })
    }

    /// Opens the file at `path`; if it is the first part of a split model, it opens the other parts too.
    ///
    /// # Errors
    ///
    /// As [`GgufFile::open`], and if the parts do not belong together.
    pub fn open_all(path: &Path) -> Result<Vec<Self>, RuntimeError> {
        let first = Self::open(path)?;
        let refused = |why: String| Err(RuntimeError::file(path, why));
        let Some(count) = first.unsigned("split.count").filter(|&count| count > 1) else { return Ok(vec![first]) };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let end = |number: u64| format!("-{number:05}-of-{count:05}.gguf");
        if first.unsigned("split.no") != Some(0) {
            return refused(format!("a later part of a split model: name its first file, which ends in `{}`", end(1)));
        }
        let Some(stem) = name.strip_suffix(&end(1)) else {
            return refused(format!(
                "the first of {count} parts of a split model, whose name should end in `{}`: give the parts the names \
                 that they were made with",
                end(1)
            ));
        };
        let stem = stem.to_owned();
        let mut all = vec![first];
        for number in 2..=count {
            let part = Self::open(&path.with_file_name(format!("{stem}{}", end(number))))?;
            if (part.unsigned("split.no"), part.unsigned("split.count")) != (Some(number - 1), Some(count)) {
                let message = format!("is not part {number} of {count} of {}; fetch it again", path.display());
                return Err(RuntimeError::file(part.path, message));
            }
            all.push(part);
        }
        let found: usize = all.iter().map(|part| part.tensors.len()).sum();
        match all[0].integer("split.tensors.count") {
            Some(said) if said != found as i64 => {
                refused(format!("its {count} parts should hold {said} tensors, and hold {found}; fetch them again"))
            }
            _ => Ok(all),
        }
    }

    /// Metadata keys and values, sorted by key.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A metadata value.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A metadata string; `None` if the key is absent or has another type.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.value(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A metadata boolean; `None` if the key is absent or has another type.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.value(key)? {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    /// A metadata integer of any width; `None` if the key is absent or has another type.
    pub fn integer(&self, key: &str) -> Option<i64> {
        match self.value(key)? {
            Value::Unsigned(n) => i64::try_from(*n).ok(),
            Value::Signed(n) => Some(*n),
            _ => None,
        }
    }

    fn unsigned(&self, key: &str) -> Option<u64> {
        self.integer(key).and_then(|n| u64::try_from(n).ok())
    }

    /// The elements of a list of numbers or booleans; empty for other lists.
    pub fn elements(&self, list: &List) -> Vec<Value> {
        let mut cursor = Cursor { bytes: &self.map[..list.end], at: list.start };
        let mut next = || match list.kind {
            ValueType::Text | ValueType::List => None,
            kind => value(&mut cursor, kind).ok(),
        };
        (0..list.count).map_while(|_| next()).collect()
    }

    /// The strings of a list; `None` if the key is absent or has another type.
    pub fn texts(&self, key: &str) -> Option<Vec<&str>> {
        match self.value(key)? {
            Value::List(list) if list.kind == ValueType::Text => {
                let mut cursor = Cursor { bytes: &self.map[..list.end], at: list.start };
                // The strings were checked when the file was opened.
                Some((0..list.count).map_while(|_| cursor.text().ok()).collect())
            }
            _ => None,
        }
    }

    fn entry(&self, name: &str) -> Result<(&TensorEntry, &[u8]), RuntimeError> {
        let entry = self.tensors.get(name);
        let entry = entry.ok_or_else(|| RuntimeError::file(&self.path, format!("it holds no tensor `{name}`")))?;
        Ok((entry, &self.map[entry.start..entry.end]))
    }
}

impl TensorSource for GgufFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn shape(&self, name: &str) -> Option<&[u64]> {
        self.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    fn float(&self, name: &str) -> Option<Float> {
        let name = self.tensors.get(name)?.ty.name;
        Float::ALL.into_iter().find(|float| float.name().eq_ignore_ascii_case(name))
    }

    fn floats(&self, name: &str, out: &mut [f32]) -> Result<(), RuntimeError> {
        let (TensorEntry { ty, shape, .. }, bytes) = self.entry(name)?;
        let wrong = |message: String| RuntimeError::file(&self.path, format!("tensor `{name}` {message}"));
        if shape.iter().product::<u64>() != out.len() as u64 {
            return Err(wrong(format!("is {shape:?}, but {} numbers are wanted", out.len())));
        }
        let Some(dequantize) = ty.dequantize else {
            return Err(wrong(format!("is of type {}; read are {}", ty.name, blocks::readable())));
        };
        match dequantize(bytes, out) {
            Some(at) => Err(wrong(not_finite(out[at], at, shape))),
            None => Ok(()),
        }
    }

    fn numbers(&self, name: &str) -> Result<Vec<f64>, RuntimeError> {
        let (entry, _) = self.entry(name)?;
        let mut out = vec![0.0; entry.shape.iter().product::<u64>() as usize];
        self.floats(name, &mut out)?;
        Ok(out.into_iter().map(f64::from).collect())
    }

    fn raw(&self, name: &str) -> Result<(String, &[u8]), RuntimeError> {
        let (entry, bytes) = self.entry(name)?;
        Ok((entry.ty.name.to_owned(), bytes))
    }
}

/// A reader of consecutive bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], String> {
        if count > self.left() {
            return Err(format!(
                "has {count} bytes at byte {}, and the file ends at byte {}; it may be cut short",
                self.at,
                self.bytes.len()
            ));
        }
        let end = self.at + count as usize;
        let bytes = &self.bytes[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    /// A string: its length, then as many bytes of UTF-8.
    fn text(&mut self) -> Result<&'a str, String> {
        let length = self.u64()?;
        let at = self.at;
        std::str::from_utf8(self.take(length)?).map_err(|_| format!("holds a text at byte {at} that is not UTF-8"))
    }
}

type Header = (BTreeMap<String, Value>, BTreeMap<String, TensorEntry>);

fn header(file: &[u8]) -> Result<Header, String> {
    if file.starts_with(LFS_POINTER_PREFIX) {
        return Err(LFS_POINTER_ADVICE.into());
    }
    let mut cursor = Cursor { bytes: file, at: 0 };
    let magic: [u8; 4] = cursor.array().map_err(|_| format!("it has {} bytes", file.len()))?;
    if let Some((_, name)) = OLDER_FORMATS.iter().find(|(before, _)| **before == magic) {
        return Err(format!(
            "it is in {name}, a format before GGUF; convert the model again with a llama.cpp of today"
        ));
    }
    if magic != *MAGIC {
        return Err(format!("it begins with `{}`, and not with `GGUF`", magic.escape_ascii()));
    }
    let about = |what: &'static str| move |why: String| format!("its {what} {why}");
    match cursor.u32().map_err(about("version"))? {
        2 | 3 => {}
        1 => {
            let remedy = "versions 2 and 3 are; convert the model again with a llama.cpp of today";
            return Err(format!("it is of version 1, which is not read; {remedy}"));
        }
        other if other & 0xffff == 0 && other != 0 => {
            return Err(format!(
                "it is in big-endian byte order (version {}), which is not read; convert the model again in \
                 little-endian order",
                other.swap_bytes()
            ));
        }
        other => return Err(format!("it is of version {other}; read are versions 2 and 3")),
    }
    let tensors = cursor.u64().map_err(about("count of tensors"))?;
    let keys = cursor.u64().map_err(about("count of keys"))?;
    // The least number of bytes that a key or a tensor entry takes.
    for (count, least, what) in [(keys, 13, "keys"), (tensors, 24, "tensors")] {
        if count > cursor.left() / least {
            return Err(format!("it counts {count} {what}, more than its {} bytes can hold", file.len()));
        }
    }
    let metadata = metadata(&mut cursor, keys)?;
    let tensors = tensor_entries(&mut cursor, tensors, alignment(&metadata)?)?;
    Ok((metadata, tensors))
}

fn metadata(cursor: &mut Cursor, count: u64) -> Result<BTreeMap<String, Value>, String> {
    let mut all = BTreeMap::new();
    for number in 0..count {
        let key = cursor.text().map_err(|why| format!("the name of key {number} {why}"))?;
        let about = |why: String| format!("key `{}` {why}", shown(key));
        let kind = cursor.u32().and_then(ValueType::of).map_err(about)?;
        let value = value(cursor, kind).map_err(about)?;
        if all.insert(key.to_owned(), value).is_some() {
            return Err(about("is there twice".into()));
        }
    }
    Ok(all)
}

fn value(cursor: &mut Cursor, kind: ValueType) -> Result<Value, String> {
    Ok(match kind {
        ValueType::U8 => Value::Unsigned(cursor.array().map(u8::from_le_bytes)?.into()),
        ValueType::I8 => Value::Signed(cursor.array().map(i8::from_le_bytes)?.into()),
        ValueType::U16 => Value::Unsigned(cursor.array().map(u16::from_le_bytes)?.into()),
        ValueType::I16 => Value::Signed(cursor.array().map(i16::from_le_bytes)?.into()),
        ValueType::U32 => Value::Unsigned(cursor.u32()?.into()),
        ValueType::I32 => Value::Signed(cursor.array().map(i32::from_le_bytes)?.into()),
        ValueType::F32 => {
            let number = cursor.array().map(f32::from_le_bytes)?;
            Value::Float(number.to_string().parse().unwrap_or_else(|_| number.into()))
        }
        ValueType::Bool => match cursor.array::<1>()? {
            [flag @ (0 | 1)] => Value::Bool(flag == 1),
            [other] => return Err(format!("is {other}, and true is 1, false 0")),
        },
        ValueType::Text => Value::Text(cursor.text()?.to_owned()),
        ValueType::U64 => Value::Unsigned(cursor.u64()?),
        ValueType::I64 => Value::Signed(cursor.array().map(i64::from_le_bytes)?),
        ValueType::F64 => Value::Float(cursor.array().map(f64::from_le_bytes)?),
        ValueType::List => {
            let kind = cursor.u32().and_then(ValueType::of)?;
            let count = cursor.u64()?;
            if kind == ValueType::List {
                return Err("is a list of lists, which no key has".into());
            }
            if count > cursor.left() / kind.bytes() {
                return Err(format!(
                    "is a list of {count} at byte {}, and the file ends at byte {}; it may be cut short",
                    cursor.at,
                    cursor.bytes.len()
                ));
            }
            let start = cursor.at;
            match kind {
                ValueType::Text => (0..count).try_for_each(|_| cursor.text().map(drop))?,
                _ => drop(cursor.take(count * kind.bytes())?),
            }
            Value::List(List { kind, count, start, end: cursor.at })
        }
    })
}

/// The number of bytes that the offsets of tensors are multiples of.
fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, String> {
    match metadata.get("general.alignment") {
        None => Ok(ALIGNMENT),
        Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => Ok(*n),
        Some(other) => Err(format!("`general.alignment` is {other:?}, and should be a power of two")),
    }
}

/// Reads the tensor entries and checks that names are unique, types readable, and byte ranges within the file and
/// disjoint.
fn tensor_entries(cursor: &mut Cursor, count: u64, alignment: u64) -> Result<BTreeMap<String, TensorEntry>, String> {
    let mut infos = vec![];
    for number in 0..count {
        let name = cursor.text().map_err(|why| format!("the name of tensor {number} {why}"))?;
        let about = |why: String| format!("tensor `{}` {why}", shown(name));
        let axes = cursor.u32().map_err(about)?;
        if axes > MAX_DIMENSIONS {
            return Err(about(format!("has {axes} dimensions, and at most {MAX_DIMENSIONS} are possible")));
        }
        let dimensions: Result<Vec<u64>, String> = (0..axes).map(|_| cursor.u64()).collect();
        let dimensions = dimensions.map_err(about)?;
        let ty = cursor.u32().map_err(about)?;
        infos.push((name, dimensions, ty, cursor.u64().map_err(about)?));
    }
    let file = cursor.bytes.len() as u64;
    let data = (cursor.at as u64).next_multiple_of(alignment);
    let mut all = BTreeMap::new();
    for (name, dimensions, ty, offset) in infos {
        let about = |why: String| format!("tensor `{}` {why}", shown(name));
        let Some(ty) = TYPES.iter().find(|known| known.id == ty) else {
            return Err(about(format!("is of type {ty}, which is not known here; read are {}", blocks::readable())));
        };
        if ty.dequantize.is_none() {
            return Err(about(format!("is of type {}, which is not read; read are {}", ty.name, blocks::readable())));
        }
        let elements = dimensions.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let row = dimensions.first().copied().unwrap_or(1);
        if row % ty.numbers != 0 {
            return Err(about(format!("has rows of {row}, and {} has blocks of {}", ty.name, ty.numbers)));
        }
        let bytes = elements.and_then(|n| (n / ty.numbers).checked_mul(ty.bytes));
        let Some(bytes) = bytes else {
            return Err(about(format!("has the dimensions {dimensions:?}, whose product is too large")));
        };
        if offset % alignment != 0 {
            return Err(about(format!("begins at {offset}, which is no multiple of the alignment, {alignment}")));
        }
        let start = data.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(bytes)).filter(|&end| end <= file);
        let (Some(start), Some(end)) = (start, end) else {
            return Err(about(format!(
                "has {bytes} bytes from {offset} on behind byte {data}, and the file ends at byte {file}; it may be cut \
                 short"
            )));
        };
        let shape = dimensions.into_iter().rev().collect();
        if all.insert(name.to_owned(), TensorEntry { ty, shape, start: start as usize, end: end as usize }).is_some() {
            return Err(about("is there twice".into()));
        }
    }
    let mut order: Vec<(&String, &TensorEntry)> = all.iter().filter(|(_, entry)| entry.start < entry.end).collect();
    order.sort_by_key(|(_, entry)| entry.start);
    if let Some(pair) = order.windows(2).find(|pair| pair[0].1.end > pair[1].1.start) {
        return Err(format!("tensors `{}` and `{}` share bytes", shown(pair[0].0), shown(pair[1].0)));
    }
    Ok(all)
}

/// A name as messages show it: long names are shortened.
fn shown(name: &str) -> String {
    const LONGEST: usize = 80;
    match name.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", name[..at].escape_debug()),
        None => name.escape_debug().to_string(),
    }
}

#[cfg(test)]
mod tests;
