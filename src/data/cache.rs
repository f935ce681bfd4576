//! A cache of tokenised data sets in the user's cache folder. An entry's key is the content of the data files and the
//! tokenizer, and entries are memory-mapped.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use peft_grammar::model::{Task, TaskKind};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::examples::{Array, Examples, GoalKind};
use super::{DataError, Dataset, Reading, Tokenizer};
use crate::cache;
use crate::hub::chat::Chat;

/// Data sets with fewer tokens than this are not stored: reading and tokenising them takes about as long as a look-up.
const MIN_STORED_TOKENS: usize = 1 << 16;

/// Metadata keys of an entry. The first holds the data set without its arrays, and the kind of its targets; the second
/// holds the checksum of that and of the arrays.
const SUMMARY: &str = "peftc data";
const CHECKSUM: &str = "checksum";

/// The path of a data set's cache entry. Its name is a hash of everything that the examples depend on.
///
/// # Errors
///
/// A data file cannot be read, or the tokenizer's chat template cannot.
pub fn entry_path(
    folder: &Path,
    files: &[PathBuf],
    task: &Task,
    tokenizer: &Tokenizer,
    reading: &Reading,
) -> Result<PathBuf, DataError> {
    let mut hash = blake3::Hasher::new();
    let mut part = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(cache::build_id().as_bytes());
    part(tokenizer.fingerprint().as_bytes());
    part(&serde_json::to_vec(task).expect("a task is plain data"));
    part(&[u8::from(reading.skip_bad)]);
    if task.kind == TaskKind::Chat {
        part(Chat::of(tokenizer)?.date().unwrap_or_default().as_bytes());
    }
    for path in files {
        let content = || -> io::Result<blake3::Hash> {
            let mut hash = blake3::Hasher::new();
            hash.update_reader(File::open(path)?)?;
            Ok(hash.finalize())
        };
        let content = content().map_err(|source| DataError::Read { path: path.clone(), source })?;
        // A path is part of the key because messages name the files.
        part(path.as_os_str().as_encoded_bytes());
        part(content.as_bytes());
    }
    Ok(folder.join(format!("{}.data", &hash.finalize().to_hex()[..32])))
}

/// Reads an entry. Returns `None` if it is missing or damaged.
pub fn load(entry: &Path, rows: u64) -> Option<Dataset> {
    let file = File::open(entry).ok()?;
    // SAFETY: an entry is written under a temporary name, renamed, and never changed; only its owner can write to the
    // folder.
    let map = Arc::new(unsafe { Mmap::map(&file) }.ok()?);
    let read = read(&map, rows);
    if read.is_none() {
        tracing::warn!("{} is damaged, and the data are read again", entry.display());
    }
    read
}

fn read(map: &Arc<Mmap>, rows: u64) -> Option<Dataset> {
    let (_, metadata) = SafeTensors::read_metadata(map).ok()?;
    let metadata = metadata.metadata().as_ref()?;
    let summary = metadata.get(SUMMARY)?;
    let (mut data, goal_kind): (Dataset, GoalKind) = serde_json::from_str(summary).ok()?;
    let tensors = SafeTensors::deserialize(map).ok()?;
    let mut hash = blake3::Hasher::new();
    hash.update(summary.as_bytes());
    let mut range = |name: &str| -> Option<Range<usize>> {
        let bytes = tensors.tensor(name).ok()?.data();
        hash.update(bytes);
        let start = bytes.as_ptr() as usize - map.as_ptr() as usize;
        Some(start..start + bytes.len())
    };
    let ranges = ARRAY_NAMES.map(&mut range);
    let [ids, runs, ends, answers, extra_targets, lengths, rows_of] = ranges.map(Option::unwrap_or_default);
    data.examples = Examples {
        ids: Array::mapped(map, ids)?,
        runs: Array::mapped(map, runs)?,
        ends: Array::mapped(map, ends)?,
        answers: Array::mapped(map, answers)?,
        goal_kind,
        extra_targets: Array::mapped(map, extra_targets)?,
    };
    data.lengths = Array::mapped(map, lengths)?;
    data.rows = Array::mapped(map, rows_of)?;
    let in_order =
        data.rows.first().is_none_or(|&first| first == 0) && data.rows.windows(2).all(|pair| pair[0] < pair[1]);
    if !in_order || data.rows.last().is_some_and(|&last| last as usize >= data.len()) {
        return None;
    }
    (hash.finalize().to_hex().as_str() == metadata.get(CHECKSUM)? && data.examples.are_valid(rows)).then_some(data)
}

const ARRAY_NAMES: [&str; 7] = ["ids", "runs", "ends", "answers", "extra_targets", "lengths", "rows"];

/// Writes an entry to a temporary file and renames it. A failure to write is only a warning.
pub fn store(entry: &Path, data: &Dataset) {
    if data.tokens() < MIN_STORED_TOKENS {
        return;
    }
    if let Err(error) = write(entry, data) {
        tracing::warn!("the cache takes nothing: {}: {error}", entry.display());
    }
}

fn write(entry: &Path, data: &Dataset) -> io::Result<()> {
    let examples = &data.examples;
    let arrays: [(&[u8], Dtype, usize); 7] = [
        (bytemuck::cast_slice(&examples.ids), Dtype::I32, 4),
        (bytemuck::cast_slice(&examples.runs), Dtype::I32, 4),
        (bytemuck::cast_slice(&examples.ends), Dtype::U64, 8),
        (bytemuck::cast_slice(&examples.answers), Dtype::I32, 4),
        (bytemuck::cast_slice(&examples.extra_targets), Dtype::I32, 4),
        (bytemuck::cast_slice(&data.lengths), Dtype::U32, 4),
        (bytemuck::cast_slice(&data.rows), Dtype::U32, 4),
    ];
    let summary = serde_json::to_string(&(data, examples.goal_kind)).map_err(io::Error::other)?;
    let mut hash = blake3::Hasher::new();
    hash.update(summary.as_bytes());
    for (bytes, ..) in &arrays {
        hash.update(bytes);
    }
    let views = ARRAY_NAMES.into_iter().zip(arrays).map(|(name, (bytes, dtype, size))| {
        Ok((name, TensorView::new(dtype, vec![bytes.len() / size], bytes).map_err(io::Error::other)?))
    });
    let views = views.collect::<io::Result<Vec<_>>>()?;
    let checksum = hash.finalize().to_hex().to_string();
    let metadata = HashMap::from([(SUMMARY.to_owned(), summary), (CHECKSUM.to_owned(), checksum)]);
    let bytes = safetensors::tensor::serialize(views, Some(metadata)).map_err(io::Error::other)?;
    let mut file = tempfile::NamedTempFile::new_in(entry.parent().unwrap_or(Path::new(".")))?;
    file.write_all(&bytes)?;
    file.persist(entry)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::tests::{Case, classification};
    use super::*;

    /// As many rows as a data set needs to be stored in the cache.
    fn rows() -> String {
        let row = |i: usize| format!("good tea {}\t{}\n", ["bad", "Ann"][i % 2].repeat(i % 3), i % 2);
        (0..MIN_STORED_TOKENS / 4).map(row).collect()
    }

    #[test]
    fn a_cache_entry_restores_the_data_set() {
        let case = Case::named("a.tsv", rows());
        let folder = case.dir.path().join("cache");
        fs::create_dir(&folder).unwrap();
        let reading = Reading { cache: Some(folder.clone()), ..Reading::default() };
        let load = |task: &Task| case.read(&["a.tsv"], task, &reading).unwrap();
        let task = classification(64);
        let first = load(&task);
        assert!(!first.cached);
        let second = load(&task);
        assert!(second.cached);
        assert!(first.examples.iter().eq(second.examples.iter()));
        assert_eq!(
            (first.describe(), &first.lengths[..]),
            (second.describe().replace(", from the cache", ""), &second.lengths[..])
        );
        assert_eq!((first.place(1), first.name()), (second.place(1), second.name()));
        // Another token limit or other rows give another entry.
        assert!(!load(&classification(4)).cached);
        fs::write(case.dir.path().join("a.tsv"), rows() + "tea\t1\n").unwrap();
        assert!(!load(&task).cached);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 3);
        // A token takes 4 bytes; with all its metadata an example takes less than 8 per token.
        let data = Dataset { lengths: Array::default(), ..load(&task) };
        assert!(data.examples.bytes() > 4 * data.tokens(), "{}", data.examples.bytes());
    }

    #[test]
    fn a_damaged_cache_entry_is_ignored() {
        let case = Case::named("a.tsv", rows());
        let folder = case.dir.path().join("cache");
        fs::create_dir(&folder).unwrap();
        let reading = Reading { cache: Some(folder.clone()), ..Reading::default() };
        let load = || case.read(&["a.tsv"], &classification(64), &reading).unwrap();
        let whole = load();
        let entry = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
        let bytes = fs::read(&entry).unwrap();
        for at in [0, 9, 300, bytes.len() / 2, bytes.len() - 1] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x41;
            fs::write(&entry, damaged).unwrap();
            let data = load();
            assert!(!data.cached && data.examples.iter().eq(whole.examples.iter()), "byte {at}");
        }
        fs::write(&entry, &bytes[..bytes.len() - 5]).unwrap();
        assert!(!load().cached);
        assert!(load().cached);
    }
}
