use super::*;
use crate::artifact::{Buffer, Element, Entry, Extent, Launch, Output, Storage, Tensor, Workgroup};

fn manifest() -> Manifest {
    let buffer = |storage| Buffer { element: Element::F32, shape: vec![Extent::Const(2)], storage };
    let launch = |buffers| Launch {
        kernel: 0,
        buffers,
        extents: vec![],
        units: Extent::Const(1),
        group: Workgroup::ONE,
        op: "copy".into(),
    };
    Manifest {
        arch: std::env::consts::ARCH.into(),
        kernels: vec!["copy".into()],
        tensors: vec![
            Tensor { name: "a".into(), shape: vec![2], trainable: None, decay: false, lr_factor: None },
            Tensor { name: "b".into(), shape: vec![2, 1], trainable: Some((0, 2)), decay: true, lr_factor: None },
        ],
        buffers: vec![
            buffer(Storage::Tensor { index: 0, rows: None }),
            buffer(Storage::Prepared),
            buffer(Storage::Gradient { index: 1 }),
            buffer(Storage::Temporary),
        ],
        prepare: vec![launch(vec![0, 1])],
        entries: [(
            "forward".to_string(),
            Entry {
                launches: vec![launch(vec![1, 3]), launch(vec![1, 2])],
                outputs: vec![Output { name: "logits".into(), buffer: 3, shape: vec![Extent::Const(2)] }],
            },
        )]
        .into(),
        ..Manifest::default()
    }
}

/// An artifact of `manifest` in a temporary directory.
fn stored(manifest: &Manifest) -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let library = home.path().join("built.so");
    fs::write(&library, b"code").unwrap();
    let path = home.path().join("x.peftc");
    save(&path, manifest, &library).unwrap();
    (home, path)
}

fn edit(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let file = path.join(MANIFEST_FILE);
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    value.as_object_mut().unwrap().shift_remove("checksum");
    change(&mut value);
    fs::write(file, with_checksum(value.to_string().into_bytes())).unwrap();
}

fn refusal(path: &Path) -> String {
    let message = load(path).unwrap_err().to_string();
    assert!(message.contains("peftc"), "{message}");
    message
}

#[test]
fn round_trip_and_replacement() {
    let (home, path) = stored(&manifest());
    let (loaded, library) = load(&path).unwrap();
    assert_eq!(fs::read(library).unwrap(), b"code");
    assert_eq!(Manifest { format: 0, library: String::new(), ..loaded }, manifest());

    let library = home.path().join("built.so");
    fs::write(&library, b"newer code").unwrap();
    save(&path, &Manifest { compiler: "newer".into(), ..manifest() }, &library).unwrap();
    assert_eq!(load(&path).unwrap().0.compiler, "newer");
    // No temporary folder is left next to it.
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 2);
}

#[test]
fn a_folder_that_is_no_artifact_is_not_replaced() {
    let (home, _) = stored(&manifest());
    let mine = home.path().join("mine");
    fs::create_dir(&mine).unwrap();
    let error = save(&mine, &manifest(), &home.path().join("built.so")).unwrap_err();
    assert!(matches!(error, StoreError::Occupied { .. }), "{error}");
    assert!(matches!(load(&mine), Err(StoreError::Read { .. })));
    assert!(matches!(load(&home.path().join("nowhere.peftc")), Err(StoreError::Read { .. })));
}

#[test]
fn artifacts_of_other_formats_and_machines_are_refused() {
    let (_home, path) = stored(&manifest());
    edit(&path, |m| m["format"] = 99.into());
    assert!(refusal(&path).contains("format 99"));
    edit(&path, |m| (m["format"], m["arch"]) = (FORMAT.into(), "vax".into()));
    assert!(refusal(&path).contains("vax"));
    let features = vec![serde_json::Value::from("warp-drive")];
    edit(&path, |m| (m["arch"], m["features"]) = (std::env::consts::ARCH.into(), features.into()));
    assert!(refusal(&path).contains("warp-drive"));
    let storage = serde_json::json!({ "flat": "w" });
    edit(&path, |m| (m["features"], m["buffers"][2]["storage"]) = (vec![serde_json::Value::Null; 0].into(), storage));
    assert!(refusal(&path).contains("unknown variant `w`, expected one of `values`, `gradients`"));
}

#[test]
fn damaged_artifacts_are_refused() {
    let (_home, path) = stored(&manifest());
    fs::write(path.join("kernels.so"), b"cod").unwrap();
    assert!(refusal(&path).contains("kernels.so"));
    fs::remove_file(path.join("kernels.so")).unwrap();
    assert!(refusal(&path).contains("kernels.so"));
    fs::write(path.join("kernels.so"), b"code").unwrap();
    load(&path).unwrap();

    let text = fs::read(path.join(MANIFEST_FILE)).unwrap();
    for end in (0..text.len()).step_by(7) {
        fs::write(path.join(MANIFEST_FILE), &text[..end]).unwrap();
        refusal(&path);
    }
    for at in (0..text.len()).step_by(7) {
        let mut flipped = text.clone();
        flipped[at] ^= 1;
        fs::write(path.join(MANIFEST_FILE), flipped).unwrap();
        refusal(&path);
    }
}

/// Every index that is out of bounds and every size that does not fit is found.
#[test]
fn inconsistent_manifests_are_refused() {
    type Change = fn(&mut Manifest);
    let cases: [(&str, Change); 13] = [
        ("kernel 7", |m| m.prepare[0].kernel = 7),
        ("buffer 9", |m| m.entries.get_mut("forward").unwrap().launches[0].buffers[0] = 9),
        ("output `logits`", |m| m.entries.get_mut("forward").unwrap().outputs[0].buffer = 9),
        ("tensor 5", |m| m.buffers[0].storage = Storage::Tensor { index: 5, rows: None }),
        ("rows 0..3", |m| m.buffers[0].storage = Storage::Tensor { index: 0, rows: Some((0, 3)) }),
        ("has 2 values", |m| m.tensors[0].shape = vec![3]),
        ("rows 0..9", |m| m.tensors[1].trainable = Some((0, 9))),
        ("is frozen", |m| m.buffers[2].storage = Storage::Gradient { index: 0 }),
        ("more elements than 64 bits can count", |m| m.tensors[0].shape = vec![u64::MAX, 3]),
        ("workgroups of 0 threads", |m| m.prepare[0].group.threads = 0),
        ("take 0 units", |m| m.prepare[0].group.units = 0),
        ("depends on a batch", |m| m.prepare[0].units = Extent::CeilDiv(Box::new(Extent::Tokens), 4)),
        ("not f32", |m| m.buffers[0].element = Element::I32),
    ];
    for (expected, change) in cases {
        let mut broken = manifest();
        change(&mut broken);
        let (_home, path) = stored(&broken);
        let message = refusal(&path);
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

/// Threads that need the same cache entry at once: one compiles it, whatever was there, and none sees a partial one.
#[test]
fn one_of_many_threads_compiles_a_cache_entry() {
    use std::sync::atomic::{AtomicUsize, Ordering};

    let home = tempfile::tempdir().unwrap();
    let entry = home.path().join("key.peftc");
    let race = || {
        let made = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let folder = tempfile::tempdir().unwrap();
                    let (found, library) = open_or_compile(&entry, || {
                        made.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(std::time::Duration::from_millis(30));
                        let library = folder.path().join("built.so");
                        fs::write(&library, b"code").unwrap();
                        Ok::<_, StoreError>((manifest(), library))
                    })
                    .unwrap();
                    assert_eq!((found.kernels, fs::read(library).unwrap()), (manifest().kernels, b"code".to_vec()));
                });
            }
        });
        // Only the entry is left.
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
        made.into_inner()
    };
    let damages: [&dyn Fn(); 5] = [
        &|| {},
        &|| fs::write(entry.join("kernels.so"), b"cod").unwrap(),
        &|| fs::write(entry.join(MANIFEST_FILE), b"{").unwrap(),
        &|| fs::remove_file(entry.join(MANIFEST_FILE)).unwrap(),
        &|| edit(&entry, |m| m["format"] = 2.into()),
    ];
    for damage in damages {
        damage();
        assert_eq!((race(), race()), (1, 0));
    }
    // Without a lock each thread may compile the entry; an intact one that was stored first is not replaced.
    let library = home.path().join("built.so");
    fs::write(&library, b"other code").unwrap();
    publish(&entry, &manifest(), &library).unwrap();
    assert_eq!(fs::read(open(&entry).unwrap().1).unwrap(), b"code");
}
