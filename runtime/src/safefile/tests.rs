use super::*;

fn stored(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x.safetensors");
    std::fs::write(&path, bytes).unwrap();
    (home, path)
}

fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn why(bytes: &[u8]) -> String {
    let (_home, path) = stored(bytes);
    SafeFile::open(&path).unwrap_err().to_string()
}

#[test]
fn written_files_read_back_and_by_others() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x.safetensors");
    let (a, b) = ([1.0, -2.0, 3.5, 0.0, 5.0, 6.0], [7.0]);
    let entries = [
        Entry { name: "a".into(), shape: vec![2, 3], data: &a },
        Entry { name: "none".into(), shape: vec![0, 3], data: &[] },
        Entry { name: "b".into(), shape: vec![], data: &b },
    ];
    let metadata = [("k".to_string(), "v".to_string())].into();
    write(&path, &entries, &metadata).unwrap();
    let file = SafeFile::open(&path).unwrap();
    let a_read = file.floats("a").unwrap();
    assert!(matches!(a_read, TensorData::Mapped(_)) && a_read.as_slice() == a);
    assert_eq!(file.floats("b").unwrap().as_slice(), b);
    assert!(file.floats("none").unwrap().as_slice().is_empty());
    assert_eq!((file.metadata("k"), file.shape("a")), (Some("v"), Some(&[2, 3][..])));
    assert!(matches!(file.floats("c"), Err(FileError::Missing { .. })));

    let bytes = std::fs::read(&path).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.tensor("a").unwrap().shape(), [2, 3]);
    // Only the file itself is there, and it is the same each time.
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
    write(&path, &entries, &metadata).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[test]
fn half_precision_and_misaligned() {
    let values = [1.5f32, -0.25];
    let halves: Vec<u8> = values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    let brains: Vec<u8> = values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
    let doubles: Vec<u8> = values.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect();
    let singles: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    for (dtype, data) in [("F16", halves), ("BF16", brains), ("F64", doubles), ("F32", singles)] {
        // With and without padding: one of the four tensors in f32 lies askew.
        for pad in 0..4 {
            let header = format!(
                "{{\"x\":{{\"dtype\":\"{dtype}\",\"shape\":[2],\"data_offsets\":[0,{}]}}}}{}",
                data.len(),
                " ".repeat(pad)
            );
            let (_home, path) = stored(&raw(&header, &data));
            assert_eq!(SafeFile::open(&path).unwrap().floats("x").unwrap().as_slice(), values, "{dtype}");
        }
    }
}

#[test]
fn lying_headers() {
    let header = |dtype: &str, shape: &str, start: u64, end: u64| {
        format!("{{\"x\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}}}")
    };
    assert!(why(b"").contains("too short"));
    assert!(why(b"\xff\xff\xff\xff\xff\xff\xff\xff").contains("does not fit"));
    assert!(why(&raw("{", b"")).contains("header"));
    assert!(why(&raw("[1]", b"")).contains("header"));
    assert!(why(&raw(&header("F99", "[1]", 0, 4), &[0; 4])).contains("header"));
    assert!(why(&raw(&header("F32", "[2]", 0, 8), &[0; 4])).contains("beyond its end"));
    for (shape, start, end) in [("[2]", 0, 4), ("[1]", 4, 0), ("[1]", 4, 8), ("[4611686018427387904, 4]", 0, 4)] {
        why(&raw(&header("F32", shape, start, end), &[0; 4]));
    }
    // Adds up to the file's length only where sums wrap around.
    let huge = u64::MAX - 100;
    why(&raw(&header("U8", &format!("[{huge}]"), 0, huge), &[0; 4]));

    let (_home, path) = stored(&raw(&header("I64", "[1]", 0, 8), &[1, 0, 0, 0, 0, 0, 0, 0]));
    let file = SafeFile::open(&path).unwrap();
    assert!(file.floats("x").unwrap_err().to_string().contains("I64"));
    assert_eq!(file.integers("x").unwrap(), [1]);
}

#[test]
fn every_truncation_is_refused() {
    let header = "{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}";
    let whole = raw(header, &[0; 8]);
    for end in 0..whole.len() {
        why(&whole[..end]);
    }
}

#[test]
fn not_finite_values_are_named() {
    let mut values = vec![0.0; 200_000];
    assert_eq!(not_finite(&values), None);
    values[150_001] = f32::NEG_INFINITY;
    values[199_999] = f32::NAN;
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x.safetensors");
    write(&path, &[Entry { name: "w".into(), shape: vec![2, 100_000], data: &values }], &BTreeMap::new()).unwrap();
    let message = SafeFile::open(&path).unwrap().floats("w").unwrap_err().to_string();
    assert!(message.contains("`w`") && message.contains("-inf at [1, 50001]"), "{message}");
}

#[test]
fn nowhere_to_write() {
    let (_home, path) = stored(b"");
    let entry = Entry { name: "w".into(), shape: vec![1], data: &[1.0] };
    let below_a_file = path.join("x.safetensors");
    let message = write(&below_a_file, std::slice::from_ref(&entry), &BTreeMap::new()).unwrap_err().to_string();
    assert!(message.contains("x.safetensors"), "{message}");

    let Ok(full) = File::options().write(true).open("/dev/full") else {
        eprintln!("skipped: no /dev/full here");
        return;
    };
    let source = encode(full, &[entry], &BTreeMap::new()).unwrap_err();
    let message = FileError::Write { path, source }.to_string();
    assert!(message.contains("free some space"), "{message}");
}
