//! Data sets as they were tokenised, in the user's cache: found by the content of files and tokenizer, and mapped into
//! memory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use peft_grammar::model::{Task, TaskKind};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::examples::{Array, Asks, Examples};
use super::{DataError, Dataset, Reading, Tokenizer};
use crate::cache;
use crate::hub::chat::Chat;

/// A smaller set is read as fast as it is found.
const WORTH: usize = 1 << 16;

/// Keys of an entry's metadata: the data set without its arrays with what its examples ask for, and the checksum of that
/// and of the arrays.
const FACTS: &str = "peftc data";
const CHECKSUM: &str = "checksum";

/// Where a data set is in the cache: by all that its examples depend on.
pub fn place(
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
    part(cache::build().as_bytes());
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
        // Messages name the files.
        part(path.as_os_str().as_encoded_bytes());
        part(content.as_bytes());
    }
    Ok(folder.join(format!("{}.data", &hash.finalize().to_hex()[..32])))
}

/// Reads an entry. One that is damaged, or is not there, is none.
pub fn find(place: &Path, rows: u64) -> Option<Dataset> {
    let file = File::open(place).ok()?;
    // SAFETY: entries are written whole, under another name, and never changed; the folder is its owner's alone.
    let map = Arc::new(unsafe { Mmap::map(&file) }.ok()?);
    let read = read(&map, rows);
    if read.is_none() {
        tracing::warn!("{} is damaged, and the data are read again", place.display());
    }
    read
}

fn read(map: &Arc<Mmap>, rows: u64) -> Option<Dataset> {
    let (_, metadata) = SafeTensors::read_metadata(map).ok()?;
    let metadata = metadata.metadata().as_ref()?;
    let facts = metadata.get(FACTS)?;
    let (mut data, asks): (Dataset, Asks) = serde_json::from_str(facts).ok()?;
    let tensors = SafeTensors::deserialize(map).ok()?;
    let mut hash = blake3::Hasher::new();
    hash.update(facts.as_bytes());
    let mut range = |name: &str| -> Option<Range<usize>> {
        let bytes = tensors.tensor(name).ok()?.data();
        hash.update(bytes);
        let start = bytes.as_ptr() as usize - map.as_ptr() as usize;
        Some(start..start + bytes.len())
    };
    let ranges = NAMES.map(&mut range);
    let [ids, runs, ends, answers, asides, lengths, rows_of] = ranges.map(Option::unwrap_or_default);
    data.examples = Examples {
        ids: Array::mapped(map, ids)?,
        runs: Array::mapped(map, runs)?,
        ends: Array::mapped(map, ends)?,
        answers: Array::mapped(map, answers)?,
        asks,
        asides: Array::mapped(map, asides)?,
    };
    data.lengths = Array::mapped(map, lengths)?;
    data.rows = Array::mapped(map, rows_of)?;
    let in_order =
        data.rows.first().is_none_or(|&first| first == 0) && data.rows.windows(2).all(|pair| pair[0] < pair[1]);
    if !in_order || data.rows.last().is_some_and(|&last| last as usize >= data.len()) {
        return None;
    }
    (hash.finalize().to_hex().as_str() == metadata.get(CHECKSUM)? && data.examples.are_whole(rows)).then_some(data)
}

const NAMES: [&str; 7] = ["ids", "runs", "ends", "answers", "asides", "lengths", "rows"];

/// Writes an entry, beside its place and then renamed. That there is no room for it is a warning.
pub fn keep(place: &Path, data: &Dataset) {
    if data.tokens() < WORTH {
        return;
    }
    if let Err(error) = write(place, data) {
        tracing::warn!("the cache takes nothing: {}: {error}", place.display());
    }
}

fn write(place: &Path, data: &Dataset) -> io::Result<()> {
    let examples = &data.examples;
    let arrays: [(&[u8], Dtype, usize); 7] = [
        (bytemuck::cast_slice(&examples.ids), Dtype::I32, 4),
        (bytemuck::cast_slice(&examples.runs), Dtype::I32, 4),
        (bytemuck::cast_slice(&examples.ends), Dtype::U64, 8),
        (bytemuck::cast_slice(&examples.answers), Dtype::I32, 4),
        (bytemuck::cast_slice(&examples.asides), Dtype::I32, 4),
        (bytemuck::cast_slice(&data.lengths), Dtype::U32, 4),
        (bytemuck::cast_slice(&data.rows), Dtype::U32, 4),
    ];
    let facts = serde_json::to_string(&(data, examples.asks)).map_err(io::Error::other)?;
    let mut hash = blake3::Hasher::new();
    hash.update(facts.as_bytes());
    for (bytes, ..) in &arrays {
        hash.update(bytes);
    }
    let views = NAMES.into_iter().zip(arrays).map(|(name, (bytes, dtype, size))| {
        Ok((name, TensorView::new(dtype, vec![bytes.len() / size], bytes).map_err(io::Error::other)?))
    });
    let views = views.collect::<io::Result<Vec<_>>>()?;
    let checksum = hash.finalize().to_hex().to_string();
    let metadata = HashMap::from([(FACTS.to_owned(), facts), (CHECKSUM.to_owned(), checksum)]);
    let bytes = safetensors::tensor::serialize(views, Some(metadata)).map_err(io::Error::other)?;
    let mut file = tempfile::NamedTempFile::new_in(place.parent().unwrap_or(Path::new(".")))?;
    file.write_all(&bytes)?;
    file.persist(place)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::tests::{Case, classification};
    use super::*;

    /// Enough rows to be worth an entry.
    fn rows() -> String {
        let row = |i: usize| format!("good tea {}\t{}\n", ["bad", "Ann"][i % 2].repeat(i % 3), i % 2);
        (0..WORTH / 4).map(row).collect()
    }

    #[test]
    fn an_entry_is_what_was_read() {
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
        // Another limit, other rows: another entry.
        assert!(!load(&classification(4)).cached);
        fs::write(case.dir.path().join("a.tsv"), rows() + "tea\t1\n").unwrap();
        assert!(!load(&task).cached);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 3);
        // A token takes 4 bytes, and with all that is beside it less than 8.
        let data = Dataset { lengths: Array::default(), ..load(&task) };
        assert!(data.examples.bytes() > 4 * data.tokens(), "{}", data.examples.bytes());
    }

    #[test]
    fn a_damaged_entry_is_none() {
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
