//! Opens data files: expands file name patterns, decompresses, and detects the format.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use memmap2::Mmap;

use super::compressed::{Compression, Fault};
use super::{delimited::line, parquet};
use crate::data::DataError;

/// The format of a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    JsonLines,
    Csv,
    Tsv,
    Parquet,
    Xml,
    /// Neither the first bytes nor the name determine the format.
    Unknown,
}

/// A file's content, decompressed and without a byte order mark.
pub struct File {
    pub path: PathBuf,
    pub bytes: Bytes,
    pub format: Format,
    /// The extension of the file's name in lower case, without the extension of the compression.
    ending: String,
}

/// Formats that are not supported: magic bytes, a description, and the remedy.
const FOREIGN: [(&[u8], &str, &str); 7] = [
    (b"BZh", "compressed by bzip2", "unpack it with `bzip2 -d`"),
    (b"\xfd7zXZ\x00", "compressed by xz", "unpack it with `xz -d`"),
    (b"PK\x03\x04", "a zip archive, or a spreadsheet in one", "unpack it, or save it as text with tabs"),
    (b"ARROW1", "a table of Arrow", "write it as jsonl, csv or tsv"),
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
    (b"ustar", "a tar archive", "unpack it with `tar -xf`"),
];

/// The offset of a tar archive's magic bytes.
const TAR: usize = 257;

impl File {
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let bytes = content(path).map_err(|source| DataError::Read { path: path.to_owned(), source })?;
        let Some(compression) = Compression::of(&bytes) else { return File::plain(path, bytes, ending(path)) };
        let unpacked = compression.unpack(&bytes).map_err(|fault| DataError::Packed {
            path: path.to_owned(),
            by: compression.name(),
            message: match fault {
                Fault::Damaged(message) => format!("it is damaged or cut short ({message}); fetch or write it again"),
                Fault::Large(limit) => format!(
                    "its {} bytes unpack to more than {} MB, which is implausible for text; unpack it yourself if the size is right",
                    bytes.len(),
                    limit >> 20
                ),
            },
        })?;
        drop(bytes);
        let name = ending(path);
        let inner = match compression.endings().contains(&name.as_str()) {
            true => ending(&path.with_extension("")),
            false => name,
        };
        File::plain(path, unpacked.into(), inner)
    }

    /// `ending` is the extension without that of the compression.
    fn plain(path: &Path, mut bytes: Bytes, ending: String) -> Result<Self, DataError> {
        let foreign = FOREIGN.iter().find(|(start, ..)| match *start {
            b"ustar" => bytes.get(TAR..).is_some_and(|rest| rest.starts_with(start)),
            start => bytes.starts_with(start),
        });
        if let Some((_, what, mend)) = foreign {
            return Err(DataError::Foreign { path: path.to_owned(), what, mend });
        }
        if Compression::of(&bytes).is_some() {
            let (what, mend) = ("compressed twice", "unpack it once");
            return Err(DataError::Foreign { path: path.to_owned(), what, mend });
        }
        if bytes.starts_with(b"\xef\xbb\xbf") {
            bytes = bytes.slice(3..);
        }
        let format = format(&bytes, &ending);
        Ok(File { path: path.to_owned(), bytes, format, ending })
    }

    /// Whether the file is plain text without rows: its extension is `txt`, or its format is unknown.
    pub fn is_plain_text(&self) -> bool {
        self.format == Format::Unknown || self.ending == "txt"
    }

    /// The content as text.
    pub fn text(&self) -> Result<&str, super::Fault> {
        std::str::from_utf8(&self.bytes).map_err(|error| {
            let line = 1 + self.bytes[..error.valid_up_to()].iter().filter(|&&b| b == b'\n').count();
            super::Fault::fatal(super::Location::Line(line), "not UTF-8; save the file in that encoding")
        })
    }
}

/// Files of at least this many bytes are memory-mapped.
const LARGE: u64 = 1 << 26;

/// Reads a file. A large file is memory-mapped, so that only the pages in use are resident.
fn content(path: &Path) -> io::Result<Bytes> {
    let about = fs::metadata(path)?;
    if !about.is_file() || about.len() < LARGE {
        return Ok(fs::read(path)?.into());
    }
    // SAFETY: as for weight files, no other process may write to the file while it is mapped.
    Ok(Bytes::from_owner(unsafe { Mmap::map(&fs::File::open(path)?) }?))
}

/// The extension of a file's name in lower case, or an empty string.
fn ending(path: &Path) -> String {
    path.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// The format of a file. The extension decides between text formats, unless the content rules its format out.
fn format(bytes: &[u8], ending: &str) -> Format {
    let start = bytes.iter().position(|b| !b.is_ascii_whitespace()).unwrap_or(bytes.len());
    let (first, _) = line(&bytes[start..]);
    let tabs = first.contains(&b'\t');
    if bytes.starts_with(parquet::MAGIC) {
        return Format::Parquet;
    }
    match (ending, bytes.get(start)) {
        ("jsonl" | "ndjson", Some(b'[')) | ("json", _) => Format::Json,
        ("jsonl" | "ndjson", _) => Format::JsonLines,
        ("csv", _) if tabs && !first.contains(&b',') => Format::Tsv,
        ("csv", _) => Format::Csv,
        ("tsv" | "tab", _) => Format::Tsv,
        ("xml", _) => Format::Xml,
        (_, Some(b'<')) if [&b"<?xml"[..], b"<benchmark"].iter().any(|begin| bytes[start..].starts_with(begin)) => {
            Format::Xml
        }
        (_, Some(b'[' | b'{')) if !tabs => Format::Json,
        (_, _) if tabs => Format::Tsv,
        _ => Format::Unknown,
    }
}

/// The files that paths and patterns name. The files of one pattern are sorted by name.
///
/// # Errors
///
/// A path is a folder, or a pattern is invalid or matches no file.
pub fn expand(named: &[PathBuf]) -> Result<Vec<PathBuf>, DataError> {
    let mut files = vec![];
    for path in named {
        let refuse = |message: String| DataError::Named { path: path.clone(), message };
        let text = path.to_string_lossy();
        if path.is_dir() {
            let message =
                format!("a folder; name its files, such as `{}/*.jsonl` in quotes", text.trim_end_matches('/'));
            return Err(refuse(message));
        }
        // An existing file takes precedence over a pattern of the same text.
        if path.exists() || !text.contains(['*', '?', '[']) {
            files.push(path.clone());
            continue;
        }
        let found =
            glob::glob(&text).map_err(|error| refuse(format!("not a valid pattern of files: {}", error.msg)))?;
        let before = files.len();
        for entry in found {
            let entry =
                entry.map_err(|error| DataError::Read { path: error.path().to_owned(), source: error.into() })?;
            if entry.is_file() {
                files.push(entry);
            }
        }
        if files.len() == before {
            return Err(refuse("no file matches this pattern".into()));
        }
    }
    Ok(files)
}
