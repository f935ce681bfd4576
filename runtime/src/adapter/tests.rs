use super::*;

fn sample(x: f32) -> TensorFile {
    let tensors = [
        ("layers.0.attention.q.lora.a".to_string(), Stored::f32(vec![2, 2], vec![x, 2.0, 3.0, 4.0])),
        ("labels".to_string(), Stored { shape: vec![3], data: Data::I64(vec![-100, 0, 7]) }),
    ];
    let notes = [("step".to_string(), "12".to_string()), ("spec".to_string(), "nlg".to_string())];
    TensorFile { tensors: tensors.into(), notes: notes.into() }
}

#[test]
fn round_trip_in_place_of_an_older_file() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("out/adapter.safetensors");
    for x in [1.0, 2.0] {
        save(&path, &sample(x)).unwrap();
        assert_eq!(load(&path).unwrap(), sample(x));
    }
    // Nothing is left beside it.
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn what_diverged_is_not_loaded() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("adapter.safetensors");
    save(&path, &sample(f32::NAN)).unwrap();
    let message = load(&path).unwrap_err().to_string();
    assert!(message.contains("`layers.0.attention.q.lora.a` holds NaN at [0, 0]"), "{message}");
}

#[test]
fn a_failure_leaves_the_older_file() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("adapter.safetensors");
    save(&path, &sample(1.0)).unwrap();
    let broken = |_: &File| Err(io::ErrorKind::StorageFull.into());
    let message = replace(&path, broken).unwrap_err().to_string();
    assert!(message.contains("free some space"), "{message}");
    assert_eq!(load(&path).unwrap(), sample(1.0));
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
    // A file where a directory should be.
    assert!(save(&path.join("adapter.safetensors"), &sample(1.0)).is_err());
}

#[test]
fn a_full_disk() {
    let Ok(full) = File::options().write(true).open("/dev/full") else {
        eprintln!("skipped: no /dev/full here");
        return;
    };
    let error = safefile::encode(&full, &sample(1.0)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
}
