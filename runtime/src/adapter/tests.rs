use std::fs::{self, File};
use std::io;

use super::*;
use crate::safefile::SafeFile;

fn sample(x: f32) -> TensorFile {
    let tensors = [
        ("layers.0.attention.q.lora.a".to_string(), Stored::f32(vec![2, 2], vec![x, 2.0, 3.0, 4.0])),
        ("labels".to_string(), Stored { shape: vec![3], data: Data::I64(vec![-100, 0, 7]) }),
    ];
    let notes = [("step".to_string(), "12".to_string()), ("spec".to_string(), "nlg".to_string())];
    TensorFile { tensors: tensors.into(), notes: notes.into() }
}

#[test]
fn a_file_that_replaces_an_older_one_is_read_back() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("out/adapter.safetensors");
    for x in [1.0, 2.0] {
        save(&path, &sample(x)).unwrap();
        assert_eq!(load(&path).unwrap(), sample(x));
    }
    // No temporary file is left next to it.
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn numbers_that_are_not_finite_are_not_loaded() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("adapter.safetensors");
    save(&path, &sample(f32::NAN)).unwrap();
    let message = load(&path).unwrap_err().to_string();
    assert!(message.contains("`layers.0.attention.q.lora.a` holds NaN at [0, 0]"), "{message}");
}

#[test]
fn a_failed_write_leaves_the_older_file() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("adapter.safetensors");
    save(&path, &sample(1.0)).unwrap();
    let broken = |_: &File| Err(io::ErrorKind::StorageFull.into());
    let message = files::replace(&path, broken).unwrap_err().to_string();
    assert!(message.contains("free some space"), "{message}");
    assert_eq!(load(&path).unwrap(), sample(1.0));
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
    // A file is where a directory should be.
    assert!(save(&path.join("adapter.safetensors"), &sample(1.0)).is_err());
}

#[test]
fn a_full_disk_is_reported() {
    let Ok(full) = File::options().write(true).open("/dev/full") else {
        eprintln!("skipped: no /dev/full here");
        return;
    };
    let error = safefile::encode(&full, &sample(1.0)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
}

/// 1 + 2⁻⁸ and 1 + 3·2⁻⁸ are halfway between two bf16 numbers; ties round to even.
#[test]
fn numbers_are_rounded_to_the_nearest_even() {
    let eighth = 2f32.powi(-8);
    let given = vec![1.0 + eighth, 1.0 + 3.0 * eighth, -(1.0 + 1.01 * eighth), 65519.0];
    let want = [1.0, 1.0 + 4.0 * eighth, -(1.0 + 2.0 * eighth), 65536.0];
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x.safetensors");
    let mut file = TensorFile::default();
    file.tensors.insert("x".into(), Stored::rounded(vec![4], given.clone(), Float::BF16).unwrap());
    save(&path, &file).unwrap();
    assert_eq!(load(&path).unwrap().tensors["x"].data, Data::F32(want.to_vec()));
    assert_eq!(SafeFile::open(&path).unwrap().float("x"), Some(Float::BF16));
    // The largest f16 is 65504; numbers from 65520 on round to infinity.
    let Data::F16(halves) = Stored::rounded(vec![4], given, Float::F16).unwrap().data else { panic!("f16") };
    assert_eq!(halves[3].to_f32(), 65504.0);
    assert_eq!(Stored::rounded(vec![1], vec![65520.0], Float::F16), Err(65520.0));
}
