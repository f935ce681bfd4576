use super::*;

/// Builds GGUF files part by part.
#[derive(Default)]
struct Writer {
    keys: u64,
    metadata: Vec<u8>,
    tensors: u64,
    infos: Vec<u8>,
    data: Vec<u8>,
}

fn text(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

impl Writer {
    /// Adds a key with a value of this type.
    fn key(mut self, name: &str, kind: u32, value: &[u8]) -> Self {
        self.keys += 1;
        self.metadata.extend([&text(name.as_bytes())[..], &kind.to_le_bytes(), value].concat());
        self
    }

    /// Adds a tensor entry.
    fn info(mut self, name: &str, dimensions: &[u64], ty: u32, offset: u64) -> Self {
        self.tensors += 1;
        self.infos.extend(text(name.as_bytes()));
        self.infos.extend((dimensions.len() as u32).to_le_bytes());
        dimensions.iter().for_each(|d| self.infos.extend(d.to_le_bytes()));
        self.infos.extend(ty.to_le_bytes());
        self.infos.extend(offset.to_le_bytes());
        self
    }

    /// Adds a tensor entry and its data, after those before.
    fn tensor(self, name: &str, dimensions: &[u64], ty: u32, bytes: &[u8]) -> Self {
        let offset = self.data.len().next_multiple_of(32);
        let mut new = self.info(name, dimensions, ty, offset as u64);
        new.data.resize(offset, 0);
        new.data.extend(bytes);
        new
    }

    fn bytes(&self) -> Vec<u8> {
        let head = [b"GGUF", &3u32.to_le_bytes()[..], &self.tensors.to_le_bytes(), &self.keys.to_le_bytes()].concat();
        let mut all = [head, self.metadata.clone(), self.infos.clone()].concat();
        all.resize(all.len().next_multiple_of(32), 0);
        all.extend(&self.data);
        all
    }
}

fn sound() -> Writer {
    let pair = [1.5f32, -2.0].map(f32::to_le_bytes).concat();
    Writer::default()
        .key("general.architecture", 8, &text(b"tiny"))
        .key("tiny.eps", 6, &1e-5f32.to_le_bytes())
        .key(
            "tiny.words",
            9,
            &[&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &text(b"a"), &text("é".as_bytes())].concat(),
        )
        .key(
            "tiny.kinds",
            9,
            &[&5u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[1, 0, 0, 0, 255, 255, 255, 255]].concat(),
        )
        .tensor("a", &[2], 0, &pair)
        .tensor("b", &[2, 1], 0, &pair)
}

fn open(bytes: &[u8]) -> Result<GgufFile, String> {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("a.gguf");
    std::fs::write(&path, bytes).unwrap();
    GgufFile::open(&path).map_err(|e| e.to_string())
}

#[track_caller]
fn refused(bytes: &[u8], parts: &[&str]) {
    let error = open(bytes).expect_err("it is refused");
    for part in parts.iter().chain(&["a.gguf"]) {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

#[test]
fn metadata_and_tensors_are_read() {
    let file = open(&sound().bytes()).unwrap();
    assert_eq!(file.text("general.architecture"), Some("tiny"));
    assert_eq!(file.value("tiny.eps"), Some(&Value::Float(1e-5)));
    assert_eq!(file.texts("tiny.words"), Some(vec!["a", "é"]));
    let Some(Value::List(list)) = file.value("tiny.kinds") else { panic!("a list") };
    assert_eq!(file.elements(list), [Value::Signed(1), Value::Signed(-1)]);
    assert_eq!(file.names(), ["a", "b"]);
    assert_eq!(file.shape("b"), Some(&[1, 2][..]));
    let mut numbers = [0.0; 2];
    file.floats("a", &mut numbers).unwrap();
    assert_eq!(numbers, [1.5, -2.0]);
}

#[test]
fn other_formats_and_versions_are_named() {
    let version = |version: [u8; 4]| {
        let mut bytes = sound().bytes();
        bytes[4..8].copy_from_slice(&version);
        bytes
    };
    refused(&version([1, 0, 0, 0]), &["of version 1, which is not read", "convert the model again"]);
    assert!(open(&version([2, 0, 0, 0])).is_ok());
    refused(&version([4, 0, 0, 0]), &["of version 4", "versions 2 and 3"]);
    refused(&version([0, 0, 0, 3]), &["big-endian", "version 3"]);
    refused(&version([0, 0, 0, 0]), &["of version 0"]);
    refused(b"tjgg\x03\0\0\0", &["GGJT", "before GGUF"]);
    refused(b"PK\x03\x04 and so on", &["`PK\\x03\\x04`", "`GGUF`"]);
    refused(b"GG", &["it has 2 bytes"]);
    refused(b"", &["it has 0 bytes"]);
    refused(b"version https://git-lfs.github.com/spec/v1\n", &["large-file storage"]);
}

#[test]
fn every_truncation_is_refused() {
    let bytes = sound().bytes();
    for end in 0..bytes.len() {
        assert!(open(&bytes[..end]).is_err(), "cut at {end}");
    }
}

#[test]
fn no_changed_byte_makes_the_reader_panic() {
    let bytes = sound().bytes();
    let (mut accepted, mut refused) = (0, 0);
    for at in 0..bytes.len() {
        for byte in 0..=255 {
            let mut changed = bytes.clone();
            changed[at] = byte;
            match header(&changed) {
                Ok((_, tensors)) => {
                    assert!(tensors.values().all(|entry| entry.start <= entry.end && entry.end <= changed.len()));
                    accepted += 1;
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(accepted > 0 && refused > 0);
}

#[test]
fn counts_and_lengths_beyond_the_file_are_refused() {
    let huge = (1u64 << 60).to_le_bytes();
    let at = |at: usize, bytes: [u8; 8]| {
        let mut all = sound().bytes();
        all[at..at + 8].copy_from_slice(&bytes);
        all
    };
    refused(&at(8, huge), &["it counts 1152921504606846976 tensors", "can hold"]);
    refused(&at(16, huge), &["it counts 1152921504606846976 keys", "can hold"]);
    refused(&at(24, huge), &["the name of key 0 has 1152921504606846976 bytes at byte 32", "cut short"]);
    let key = |kind: u32, value: &[u8]| Writer::default().key("k", kind, value).bytes();
    refused(&key(8, &huge), &["key `k` has 1152921504606846976 bytes"]);
    for (kind, ends) in [(8u32, "a list of 1152921504606846976"), (0, "a list of"), (10, "a list of")] {
        refused(&key(9, &[&kind.to_le_bytes()[..], &huge].concat()), &["key `k`", ends]);
    }
    refused(&key(9, &[&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &[0; 12]].concat()), &["a list of lists"]);
    refused(&key(13, &[0; 8]), &["key `k` is of type 13"]);
    refused(&key(7, &[2]), &["key `k` is 2, and true is 1"]);
    refused(&key(8, &text(b"\xff")), &["key `k` holds a text at byte", "not UTF-8"]);
    refused(&sound().key("tiny.eps", 0, &[1]).bytes(), &["key `tiny.eps` is there twice"]);
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    let info = |dimensions: &[u64], ty: u32, offset: u64| {
        let mut writer = Writer::default().info("w", dimensions, ty, offset);
        writer.data.resize(64, 0);
        writer.bytes()
    };
    assert!(open(&info(&[16], 0, 0)).is_ok());
    refused(&info(&[17], 0, 0), &["tensor `w` has 68 bytes", "cut short"]);
    refused(&info(&[16], 0, 32), &["tensor `w` has 64 bytes from 32 on"]);
    refused(&info(&[1], 0, u64::MAX - 31), &["tensor `w` has 4 bytes", "ends at byte"]);
    refused(&info(&[8], 0, 4), &["begins at 4", "alignment, 32"]);
    refused(&info(&[1 << 40, 1 << 40], 0, 0), &["product is too large"]);
    refused(&info(&[1 << 62, 2], 0, 0), &["product is too large"]);
    refused(&info(&[1 << 60], 0, 0), &["tensor `w` has 4611686018427387904 bytes", "cut short"]);
    refused(&info(&[1; 5], 0, 0), &["has 5 dimensions"]);
    refused(&info(&[16], 8, 0), &["has rows of 16", "Q8_0 has blocks of 32"]);
    refused(&info(&[256], 17, 0), &["of type IQ2_XS, which is not read", "Q4_K"]);
    refused(&info(&[256], 4, 0), &["of type 4, which is not known here", "Q8_0"]);
    let two = |offset: u64| {
        let mut writer = Writer::default().info("v", &[9], 0, 0).info("w", &[8], 0, offset);
        writer.data.resize(128, 0);
        writer.bytes()
    };
    refused(&two(32), &["tensors `v` and `w` share bytes"]);
    assert!(open(&two(64)).is_ok());
    let twice = Writer::default().tensor("w", &[1], 0, &[0; 4]).tensor("w", &[1], 0, &[0; 4]);
    refused(&twice.bytes(), &["tensor `w` is there twice"]);
    refused(
        &sound().key("general.alignment", 4, &24u32.to_le_bytes()).bytes(),
        &["`general.alignment`", "power of two"],
    );
    refused(&sound().key("general.alignment", 4, &0u32.to_le_bytes()).bytes(), &["`general.alignment`"]);
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    let nan = Writer::default().tensor("w", &[2, 2], 0, &[0.0, 1.0, f32::NAN, 2.0].map(f32::to_le_bytes).concat());
    let file = open(&nan.bytes()).unwrap();
    let error = file.floats("w", &mut [0.0; 4]).unwrap_err().to_string();
    assert!(error.contains("tensor `w` holds NaN at [1, 0]"), "{error}");
    // A block whose scale is infinite.
    let block = [&[0x00, 0x7c][..], &[1; 32]].concat();
    let file = open(&Writer::default().tensor("w", &[32], 8, &block).bytes()).unwrap();
    assert!(file.floats("w", &mut [0.0; 32]).is_err());
}

#[test]
fn parts_of_a_split_model_belong_together() {
    let home = tempfile::tempdir().unwrap();
    let part = |no: u16, count: u16, tensor: &str| {
        Writer::default()
            .key("split.no", 2, &no.to_le_bytes())
            .key("split.count", 2, &count.to_le_bytes())
            .key("split.tensors.count", 5, &2i32.to_le_bytes())
            .tensor(tensor, &[1], 0, &[0; 4])
            .bytes()
    };
    let path = |name: &str| home.path().join(name);
    let (first, second) = (path("m-00001-of-00002.gguf"), path("m-00002-of-00002.gguf"));
    let all = |path: &Path| GgufFile::open_all(path).map(|all| all.len()).map_err(|e| e.to_string());
    std::fs::write(&first, part(0, 2, "a")).unwrap();
    let error = all(&first).unwrap_err();
    assert!(error.contains("m-00002-of-00002.gguf") && error.contains("cannot be read"), "{error}");
    std::fs::write(&second, part(1, 2, "b")).unwrap();
    assert_eq!(all(&first), Ok(2));
    let error = all(&second).unwrap_err();
    assert!(error.contains("name its first file, which ends in `-00001-of-00002.gguf`"), "{error}");
    std::fs::write(&second, part(1, 3, "b")).unwrap();
    assert!(all(&first).unwrap_err().contains("is not part 2 of 2"));
    std::fs::write(path("renamed.gguf"), part(0, 2, "a")).unwrap();
    assert!(all(&path("renamed.gguf")).unwrap_err().contains("should end in `-00001-of-00002.gguf`"));
}
