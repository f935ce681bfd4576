use super::*;
use crate::memory::Floats;

fn tensors() -> Vec<Tensor> {
    let tensor = |name: &str, shape: &[u64], trainable| Tensor {
        name: name.into(),
        shape: shape.to_vec(),
        trainable,
        decay: true,
    };
    vec![tensor("wte", &[5, 2], Some((3, 5))), tensor("frozen", &[9], None), tensor("lora.a", &[3], Some((0, 3)))]
}

fn info() -> Info {
    Info { spec: "nlg".into(), step: 12, extra: [("epoch".to_string(), "3".to_string())].into() }
}

const VALUES: [f32; 7] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];

fn place() -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("out/adapter.safetensors");
    (home, path)
}

#[test]
fn adapter_round_trip() {
    let (_home, path) = place();
    save(&path, &tensors(), &VALUES, &info()).unwrap();
    let file = SafeFile::open(&path).unwrap();
    assert_eq!(file.shape("wte"), Some(&[2, 2][..]));
    assert_eq!(file.metadata("rows"), Some(r#"{"wte":[3,5]}"#));
    let mut values = [0.0; 7];
    assert_eq!(load(&path, &tensors(), &mut values).unwrap(), info());
    assert_eq!(values, VALUES);
}

#[test]
fn state_round_trip() {
    let (_home, path) = place();
    let flat = |by: f32| {
        let copy = |shift: f32| Floats::copied(&VALUES.map(|x| by * (x + shift))).unwrap();
        Flat { values: copy(0.0), m: copy(10.0), v: copy(20.0), ..Flat::default() }
    };
    save_state(&path, &tensors(), &flat(1.0), &info()).unwrap();
    let mut read = flat(0.0);
    assert_eq!(load_state(&path, &tensors(), &mut read).unwrap(), info());
    let whole = |flat: &Flat| [&flat.values[..], &flat.m, &flat.v].concat();
    assert_eq!(whole(&read), whole(&flat(1.0)));
    // One kind of file is not taken for the other.
    let error = load(&path, &tensors(), &mut [0.0; 7]).unwrap_err().to_string();
    assert!(error.contains("no adapter file") && error.contains("peftc state 1"), "{error}");
}

#[test]
fn another_spec() {
    let (_home, path) = place();
    save(&path, &tensors(), &VALUES, &info()).unwrap();
    let refuse = |change: fn(&mut Vec<Tensor>), expected: &str| {
        let mut tensors = tensors();
        change(&mut tensors);
        let mut values = [0.5; 16];
        let message = load(&path, &tensors, &mut values).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert_eq!(values, [0.5; 16]);
    };
    refuse(|t| t[2].name = "lora.b".into(), "`lora.b` is missing; `lora.a` does not train");
    refuse(|t| (t[2].shape, t[2].trainable) = (vec![4], Some((0, 4))), "`lora.a` is [3] there, [4]");
    refuse(|t| t[0].trainable = Some((2, 4)), "rows");
    refuse(|t| t[0].trainable = None, "`wte` does not train");
}

#[test]
fn diverged_values_are_not_loaded() {
    let (_home, path) = place();
    let mut values = VALUES;
    values[5] = f32::NAN;
    save(&path, &tensors(), &values, &info()).unwrap();
    let message = load(&path, &tensors(), &mut [0.0; 7]).unwrap_err().to_string();
    assert!(message.contains("`lora.a`") && message.contains("NaN at [1]"), "{message}");
}

#[test]
fn an_older_file_survives_a_failure() {
    let (_home, path) = place();
    save(&path, &tensors(), &VALUES, &info()).unwrap();
    let below = path.join("adapter.safetensors");
    assert!(save(&below, &tensors(), &VALUES, &info()).is_err());
    load(&path, &tensors(), &mut [0.0; 7]).unwrap();
}
