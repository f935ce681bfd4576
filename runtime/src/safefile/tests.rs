use super::*;
use crate::tensor::Stored;

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

fn sample() -> TensorFile {
    let tensors = [
        ("a", Stored::f32(vec![2, 3], vec![1.0, -2.0, 3.5, 0.0, 5.0, 6.0])),
        ("b", Stored::f32(vec![], vec![7.0])),
        ("ids", Stored { shape: vec![2], data: Data::I64(vec![-1, 1 << 40]) }),
        ("none", Stored::f32(vec![0, 3], vec![])),
    ];
    let notes = ["w", "x", "y", "z"].map(|note| (note.to_string(), note.to_string()));
    TensorFile { tensors: tensors.map(|(name, t)| (name.to_string(), t)).into(), notes: notes.into() }
}

#[test]
fn writing_is_deterministic_and_readable_by_the_safetensors_crate() {
    let (mut once, mut again) = (vec![], vec![]);
    encode(&mut once, &sample()).unwrap();
    encode(&mut again, &sample()).unwrap();
    assert_eq!(once, again);
    let theirs = safetensors::SafeTensors::deserialize(&once).unwrap();
    assert_eq!(theirs.tensor("a").unwrap().shape(), [2, 3]);
    assert_eq!(theirs.tensor("ids").unwrap().data()[..8], [0xff; 8]);

    let mut odd = sample();
    odd.tensors.insert("odd".into(), Stored::f32(vec![3], vec![1.0]));
    assert!(encode(vec![], &odd).unwrap_err().to_string().contains("`odd` has 1 numbers"));
}

#[test]
fn every_float_type_is_read_at_every_alignment() {
    let values = [1.5f32, -0.25];
    let halves: Vec<u8> = values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
    let brains: Vec<u8> = values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
    let doubles: Vec<u8> = values.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect();
    let singles: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    for (dtype, data) in [("F16", halves), ("BF16", brains), ("F64", doubles), ("F32", singles)] {
        for pad in 0..4 {
            let end = data.len();
            let info = format!("{{\"x\":{{\"dtype\":\"{dtype}\",\"shape\":[2],\"data_offsets\":[0,{end}]}}}}");
            let (_home, path) = stored(&raw(&(info + &" ".repeat(pad)), &data));
            let mut read = [0.0; 2];
            SafeFile::open(&path).unwrap().floats("x", &mut read).unwrap();
            assert_eq!(read, values, "{dtype}");
        }
    }
}

#[test]
fn inconsistent_headers_are_refused() {
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
    // A sum of sizes that fits the file only because it overflows.
    let huge = u64::MAX - 100;
    why(&raw(&header("U8", &format!("[{huge}]"), 0, huge), &[0; 4]));

    let (_home, path) = stored(&raw(&header("I64", "[1]", 0, 8), &[1, 0, 0, 0, 0, 0, 0, 0]));
    let file = SafeFile::open(&path).unwrap();
    assert!(file.floats("x", &mut [0.0]).unwrap_err().to_string().contains("I64"));
    assert!(file.floats("x", &mut [0.0; 2]).unwrap_err().to_string().contains("2 numbers are wanted"));
    assert!(file.floats("y", &mut []).unwrap_err().to_string().contains("no tensor `y`"));
    assert_eq!(file.integers("x").unwrap(), [1]);
    assert!(SafeFile::open(_home.path()).unwrap_err().to_string().contains("directory"));
}

#[test]
fn every_truncation_is_refused() {
    let mut whole = vec![];
    encode(&mut whole, &sample()).unwrap();
    for end in 0..whole.len() {
        why(&whole[..end]);
    }
}

#[test]
fn not_finite_numbers_are_named() {
    let mut numbers = vec![0.0; 200_000];
    numbers[150_001] = f32::NEG_INFINITY;
    numbers[199_999] = f32::NAN;
    let tensors = [("w".to_string(), Stored::f32(vec![2, 100_000], numbers))].into();
    let mut bytes = vec![];
    encode(&mut bytes, &TensorFile { tensors, ..TensorFile::default() }).unwrap();
    let (_home, path) = stored(&bytes);
    let message = SafeFile::open(&path).unwrap().floats("w", &mut vec![0.0; 200_000]).unwrap_err().to_string();
    assert!(message.contains("`w` holds -inf at [1, 50001]"), "{message}");
}

/// Every integer type is read, booleans as 0 and 1, since ids and masks of other programs come in all of them.
#[test]
fn every_integer_type_is_read() {
    let cases: [(&str, &[u8], [i64; 2]); 9] = [
        ("BOOL", &[1, 0], [1, 0]),
        ("U8", &[255, 1], [255, 1]),
        ("I8", &[255, 1], [-1, 1]),
        ("U16", &[255, 255, 1, 0], [65_535, 1]),
        ("I16", &[255, 255, 1, 0], [-1, 1]),
        ("U32", &[255, 255, 255, 255, 1, 0, 0, 0], [4_294_967_295, 1]),
        ("I32", &[255, 255, 255, 255, 1, 0, 0, 0], [-1, 1]),
        ("U64", &[255, 255, 255, 255, 255, 255, 255, 127, 1, 0, 0, 0, 0, 0, 0, 0], [i64::MAX, 1]),
        ("I64", &[255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0, 0, 0, 0, 0, 0], [-1, 1]),
    ];
    for (dtype, bytes, wanted) in cases {
        let header = format!(r#"{{"x":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,{}]}}}}"#, bytes.len());
        let (_folder, path) = stored(&raw(&header, bytes));
        let file = SafeFile::open(&path).expect("sound");
        assert!(file.is_integer("x"), "{dtype}");
        assert_eq!(file.integers("x").expect("integers"), wanted, "{dtype}");
        assert_eq!(file.numbers("x").expect("numbers"), wanted.map(|x| x as f64), "{dtype}");
    }
}
