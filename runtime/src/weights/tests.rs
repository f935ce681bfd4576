use std::fs;

use peft_grammar::model::{Buffer, Checkpoint, TensorKind, TensorRule, Trainable};

use super::*;
use crate::adapter::{self, Stored, TensorFile};

fn param(name: &str, shape: &[u64], origin: Origin) -> Param {
    let init = Init::Normal { std: 1.0 };
    Param { name: name.into(), shape: shape.to_vec(), init, trainable: Trainable::No, origin, decay: false, lr: None }
}

fn params() -> Vec<Param> {
    vec![
        param("t.wte.weight", &[3, 2], Origin::Backbone),
        param("t.h.0.LayerNorm.weight", &[2], Origin::Backbone),
        param("t.pooler.dense.bias", &[2], Origin::Backbone),
        param("classifier.weight", &[2, 2], Origin::Head),
        param("layers.0.attention.q.lora.a", &[1, 2], Origin::Method("lora".into())),
    ]
}

fn backbone() -> Backbone {
    let rule = |pattern: &str, is: TensorKind, note: Option<&str>| TensorRule {
        pattern: pattern.into(),
        is,
        note: note.map(String::from),
    };
    let tensors = vec![
        rule("*.LayerNorm.gamma", TensorKind::Same("*.LayerNorm.weight".into()), None),
        rule("lm_head.weight", TensorKind::Same("t.wte.weight".into()), Some("untie them")),
        rule("t.pooler.*", TensorKind::Optional, None),
        rule("cls.*", TensorKind::Unused, Some("a head of the pretraining")),
        rule("*.attn.bias", TensorKind::Buffer(Buffer::CausalMask), None),
        rule("t.position_ids", TensorKind::Buffer(Buffer::Positions), None),
        rule("*.inv_freq", TensorKind::Buffer(Buffer::Frequencies { theta: 100.0, width: 4 }), Some("turns")),
        rule("*.masked_bias", TensorKind::Buffer(Buffer::Numbers(vec![-1e4, -1e9])), None),
    ];
    let checkpoint = Checkpoint { prefix: "t.".into(), tensors, ..Checkpoint::default() };
    Backbone { name: "tiny".into(), config: BTreeMap::new(), checkpoint, ..Backbone::default() }
}

/// A directory with a checkpoint that fits the model, and these additional tensors.
fn with(more: &[(&str, &[u64], &[f32])]) -> tempfile::TempDir {
    let home = checkpoint(&FITTING);
    let path = home.path().join("model.safetensors");
    let mut file = adapter::load(&path).unwrap();
    let stored = |(name, shape, numbers): &(&str, &[u64], &[f32])| {
        (name.to_string(), Stored::f32(shape.to_vec(), numbers.to_vec()))
    };
    file.tensors.extend(more.iter().map(stored));
    adapter::save(&path, &file).unwrap();
    home
}

fn write_model(path: &Path, tensors: &[(&str, &[u64])]) {
    let stored = |shape: &[u64]| {
        let elements = shape.iter().product::<u64>();
        Stored::f32(shape.to_vec(), (1..=elements).map(|i| i as f32).collect())
    };
    let tensors = tensors.iter().map(|(name, shape)| (name.to_string(), stored(shape))).collect();
    adapter::save(path, &TensorFile { tensors, ..TensorFile::default() }).unwrap();
}

/// A directory whose `model.safetensors` holds these tensors, each filled with 1, 2, 3, …
fn checkpoint(tensors: &[(&str, &[u64])]) -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    write_model(&home.path().join("model.safetensors"), tensors);
    home
}

const FITTING: [(&str, &[u64]); 3] =
    [("t.wte.weight", &[3, 2]), ("t.h.0.LayerNorm.weight", &[2]), ("t.pooler.dense.bias", &[2])];

fn read(home: &Path, appended: u64) -> Result<Loaded, String> {
    load(home, &backbone(), &params(), appended, 7).map_err(|e| e.to_string())
}

fn refusal(tensors: &[(&str, &[u64])]) -> String {
    read(checkpoint(tensors).path(), 0).err().unwrap()
}

#[test]
fn names_with_and_without_prefix_and_alternative_names_are_read() {
    for names in [
        ["t.wte.weight", "t.h.0.LayerNorm.weight", "t.pooler.dense.bias"],
        ["wte.weight", "h.0.LayerNorm.weight", "pooler.dense.bias"],
        ["t.wte.weight", "t.h.0.LayerNorm.gamma", "pooler.dense.bias"],
        ["wte.weight", "h.0.LayerNorm.gamma", "pooler.dense.bias"],
    ] {
        let [a, b, c] = names;
        let home = checkpoint(&[(a, &[3, 2]), (b, &[2]), (c, &[2]), ("cls.bias", &[4]), ("extra", &[1])]);
        let loaded = read(home.path(), 0).unwrap();
        assert_eq!(loaded.tensors[0][..], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(loaded.tensors[1][..], [1.0, 2.0]);
        assert_eq!(loaded.drawn, ["classifier.weight", "layers.0.attention.q.lora.a"]);
        let unread: Vec<_> = loaded.unread.iter().map(|u| (u.name.as_str(), u.note.as_deref())).collect();
        assert_eq!(unread, [("cls.bias", Some("a head of the pretraining")), ("extra", None)]);
    }
}

#[test]
fn a_pooler_may_be_missing() {
    let loaded = read(checkpoint(&FITTING[..2]).path(), 0).unwrap();
    assert_eq!(loaded.drawn[..2], ["t.pooler.dense.bias", "classifier.weight"]);
    assert_eq!(loaded.tensors.len(), 5);
}

#[test]
fn shards_are_read_and_bad_indices_refused() {
    let home = tempfile::tempdir().unwrap();
    write_model(&home.path().join("1.safetensors"), &FITTING[..1]);
    write_model(&home.path().join("2.safetensors"), &FITTING[1..]);
    let index = home.path().join("model.safetensors.index.json");
    let (one, other) = (FITTING[0].0, FITTING[1].0);
    let map = |files: [&str; 2]| serde_json::json!({ "weight_map": { one: files[0], other: files[1] } }).to_string();
    fs::write(&index, map(["1.safetensors", "2.safetensors"])).unwrap();
    read(home.path(), 0).unwrap();
    let lost = serde_json::json!({ "weight_map": { "lost.weight": "1.safetensors" } }).to_string();
    let number = serde_json::json!({ "weight_map": { one: 7 } }).to_string();
    for (text, expected) in [
        (lost, "it holds no `lost.weight`, and"),
        (number, "is in 7, which is no file's name"),
        (map(["1.safetensors", "pytorch_model.bin"]), "weights are read from safetensors alone"),
        (r#"{"weight_map": {}}"#.into(), "missing or empty"),
        ("version https://git-lfs.github.com/spec/v1\n".into(), "`git lfs pull`"),
        ("".into(), "no JSON"),
        (map(["1.safetensors", "../2.safetensors"]), "no plain file name"),
        (map(["1.safetensors", "3.safetensors"]), "3.safetensors"),
        ("{".into(), "index.json"),
        ("{}".into(), "weight_map"),
    ] {
        fs::write(&index, text).unwrap();
        let message = read(home.path(), 0).err().unwrap();
        assert!(message.contains(expected), "{message}");
    }
    let nothing = tempfile::tempdir().unwrap();
    assert!(read(nothing.path(), 0).err().unwrap().contains("no `model.safetensors`"));
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let message = refusal(&[("t.wte.weight", &[2, 3]), ("t.h.0.LayerNorm.weigth", &[2])]);
    assert!(
        message.contains("`t.h.0.LayerNorm.weight` is missing; the file has `t.h.0.LayerNorm.weigth`"),
        "{message}"
    );
    assert!(message.contains("`t.wte.weight` is [2, 3] in the file, the spec wants [3, 2] (it looks transposed)"));
    let message = refusal(&[("_orig_mod.t.wte.weight", &[3, 2]), FITTING[1]]);
    assert!(message.contains("`t.wte.weight` is missing; the file has `_orig_mod.t.wte.weight`"), "{message}");
    let message = refusal(&[FITTING[0], FITTING[1], ("classifier.weight", &[3, 2])]);
    assert!(message.contains("`classifier.weight` is [3, 2]") && !message.contains("left over"), "{message}");
    assert!(refusal(&[("t.wte.weight", &[]), FITTING[1]]).contains("is [] in the file"));
}

#[test]
fn appended_rows_are_drawn() {
    let home = checkpoint(&[("t.wte.weight", &[2, 2]), FITTING[1]]);
    let wte = &read(home.path(), 1).unwrap().tensors[0];
    assert_eq!(wte[..4], [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(wte[4..], random(&params(), 7)[0][4..]);
    assert!(read(home.path(), 0).err().unwrap().contains("`t.wte.weight` is [2, 2]"));
    // Some of a task's special tokens may be in the checkpoint already.
    assert_eq!(read(home.path(), 2).unwrap().tensors[0][..], wte[..]);
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    let home = checkpoint(&FITTING);
    let path = home.path().join("model.safetensors");
    let mut file = adapter::load(&path).unwrap();
    file.tensors.insert("t.wte.weight".into(), Stored::f32(vec![3, 2], vec![0.0, 0.0, 0.0, f32::NAN, 0.0, 0.0]));
    adapter::save(&path, &file).unwrap();
    let message = read(home.path(), 0).err().unwrap();
    assert!(message.contains("`t.wte.weight` holds NaN at [1, 1]"), "{message}");
}

#[test]
fn drawn_weights_depend_on_seed_and_name_alone() {
    let forward = random(&params(), 3);
    let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let backward = single.install(|| random(&params().into_iter().rev().collect::<Vec<_>>(), 3));
    for (a, b) in forward.iter().zip(backward.iter().rev()) {
        assert_eq!(a[..], b[..]);
    }
    assert_ne!(forward[0][..], random(&params(), 4)[0][..]);
    assert_ne!(forward[1][..], forward[2][..]);
}

#[test]
fn drawn_weights_have_the_moments_of_their_distributions() {
    let drawn = |init| draw(&Param { init, ..param("a", &[200_000], Origin::Head) }, 7);
    let mean = |x: &[f32]| x.iter().map(|&x| f64::from(x)).sum::<f64>() / x.len() as f64;
    let std = |x: &[f32]| (x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64).sqrt();
    let normal = drawn(Init::Normal { std: 0.02 });
    assert!(mean(&normal).abs() < 2e-4 && (std(&normal) - 0.02).abs() < 2e-4);
    let truncated = drawn(Init::Truncated { scale: 0.01 });
    assert!(truncated.iter().all(|x| x.abs() < 0.02) && (std(&truncated) - 0.00877).abs() < 2e-4);
    let uniform = drawn(Init::Uniform { bound: 0.5 });
    assert!(uniform.iter().all(|x| x.abs() < 0.5) && (std(&uniform) - 0.5 / 3f64.sqrt()).abs() < 2e-3);
}

/// Tensors inside the model that nothing reads are refused, since they would change its result; others are only
/// reported.
#[test]
fn unread_tensors_inside_the_model_are_refused() {
    for inside in ["t.h.0.mlp.bias", "h.1.LayerNorm.weight", "wte.bias", "classifier.dense.weight", "t.odd"] {
        let message = read(with(&[(inside, &[1], &[0.0])]).path(), 0).err().unwrap();
        assert!(message.contains(&format!("not read by `tiny`: {inside}")), "{message}");
    }
    let unread = read(with(&[("score.weight", &[1], &[0.0])]).path(), 0).unwrap().unread;
    assert_eq!(unread, [Unread { name: "score.weight".into(), note: None }]);
    // A pooler that the graph does not read.
    let without: Vec<Param> = params().into_iter().filter(|p| !p.name.contains("pooler")).collect();
    assert_eq!(load(with(&[]).path(), &backbone(), &without, 0, 7).unwrap().unread.len(), 1);
}

#[test]
fn buffers_must_hold_the_values_that_the_equations_imply() {
    let mask = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0];
    // 100^(−2j/4) is 1 and 0.1.
    let fine: [(&str, &[u64], &[f32]); 6] = [
        ("h.0.attn.bias", &[1, 1, 3, 3], &mask),
        ("t.h.1.attn.bias", &[3, 3], &mask),
        ("position_ids", &[1, 3], &[0.0, 1.0, 2.0]),
        ("t.h.0.inv_freq", &[2], &[1.0, 0.1]),
        ("h.0.masked_bias", &[], &[-1e9]),
        ("h.1.masked_bias", &[], &[-1e4]),
    ];
    let loaded = read(with(&fine).path(), 0).unwrap();
    assert!(loaded.unread.is_empty());
    let other: [(&str, &[u64], &[f32], &str); 7] = [
        ("h.0.attn.bias", &[3, 3], &[1.0; 9], "is 1 at [0, 1], 0 in a causal mask"),
        ("h.0.attn.bias", &[9], &mask, "is [9], not a causal mask"),
        ("position_ids", &[1, 3], &[0.0, 2.0, 1.0], "is 2 at [0, 1], 1 in a row of positions"),
        ("h.0.inv_freq", &[2], &[1.0, 0.2], "base 100: turns"),
        ("h.0.inv_freq", &[3], &[1.0, 0.1, 0.01], "is [3], not a list of 2"),
        ("h.0.masked_bias", &[], &[-1.0], "is -1 at [0], -10000 in"),
        ("h.0.masked_bias", &[], &[f32::NAN], "is NaN"),
    ];
    for (name, shape, numbers, words) in other {
        let message = read(with(&[(name, shape, numbers)]).path(), 0).err().unwrap();
        assert!(message.contains(words) && message.contains(name), "{message}");
    }
}

#[test]
fn two_tensors_for_one_parameter_must_agree() {
    let table = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let other = [1.0, 2.0, 3.0, 4.0, 5.0, 7.0];
    for (name, note) in [("wte.weight", "differ"), ("lm_head.weight", "differ: untie them")] {
        read(with(&[(name, &[3, 2], &table)]).path(), 0).unwrap();
        let message = read(with(&[(name, &[3, 2], &other)]).path(), 0).err().unwrap();
        assert!(message.contains(&format!("`{name}` and `t.wte.weight`")) && message.contains(note), "{message}");
    }
    // One of them is enough.
    let home = checkpoint(&[("lm_head.weight", &[3, 2]), FITTING[1]]);
    assert_eq!(read(home.path(), 0).unwrap().tensors[0][..], table);
}

/// A head is either read as a whole or drawn as a whole.
#[test]
fn an_incomplete_head_is_refused() {
    let mut params = params();
    params.push(param("classifier.bias", &[2], Origin::Head));
    let load = |home: &Path| load(home, &backbone(), &params, 0, 7).map_err(|e| e.to_string());
    assert_eq!(load(with(&[]).path()).unwrap().drawn.len(), 3);
    let home = with(&[("classifier.weight", &[2, 2], &[0.0; 4])]);
    assert!(load(home.path()).err().unwrap().contains("`classifier.bias` is missing"));
    let home = with(&[("classifier.weight", &[3, 2], &[0.0; 6]), ("classifier.bias", &[3], &[0.0; 3])]);
    assert!(load(home.path()).err().unwrap().contains("a head for 3 classes, and the task has 2 labels"));
}

/// A model with untied logits has its own output matrix; with tied ones a copy in the checkpoint must equal the
/// embedding.
#[test]
fn an_output_matrix_is_read_when_the_model_has_one() {
    let home = checkpoint(&[("t.wte.weight", &[3, 2]), ("lm_head.weight", &[3, 2])]);
    let mut params = vec![param("t.wte.weight", &[3, 2], Origin::Backbone)];
    let tied = load(home.path(), &backbone(), &params, 0, 7).unwrap();
    assert!(tied.unread.is_empty() && tied.tensors.len() == 1);
    params.push(param("lm_head.weight", &[3, 2], Origin::Backbone));
    let mut backbone = backbone();
    for rule in backbone.checkpoint.tensors.iter_mut().filter(|rule| rule.pattern == "lm_head.weight") {
        (rule.is, rule.note) = (TensorKind::Required, Some("tie them".into()));
    }
    let untied = load(home.path(), &backbone, &params, 0, 7).unwrap();
    assert_eq!(untied.tensors[1][..], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let bare = checkpoint(&FITTING[..1]);
    let message = load(bare.path(), &backbone, &params, 0, 7).err().unwrap().to_string();
    assert!(message.contains("`lm_head.weight` is missing; tie them"), "{message}");
}

/// A tensor may be in two shards only if both hold the same numbers.
#[test]
fn a_tensor_in_two_shards_must_agree() {
    let home = tempfile::tempdir().unwrap();
    let map = serde_json::json!({ "weight_map": { FITTING[0].0: "1.safetensors", FITTING[1].0: "2.safetensors" } });
    fs::write(home.path().join("model.safetensors.index.json"), map.to_string()).unwrap();
    write_model(&home.path().join("1.safetensors"), &FITTING[..2]);
    write_model(&home.path().join("2.safetensors"), &FITTING[1..]);
    read(home.path(), 0).unwrap();
    let other = Stored::f32(vec![2], vec![9.0, 2.0]);
    let mut file = adapter::load(&home.path().join("2.safetensors")).unwrap();
    file.tensors.insert(FITTING[1].0.into(), other);
    adapter::save(&home.path().join("2.safetensors"), &file).unwrap();
    let message = read(home.path(), 0).err().unwrap();
    assert!(message.contains("`t.h.0.LayerNorm.weight` is in") && message.contains("and differs"), "{message}");
}

/// A bias next to an alternative name of the model's matrix would change the model's result.
#[test]
fn unread_tensors_next_to_alternative_names_are_refused() {
    let message = read(with(&[("lm_head.bias", &[3], &[0.5; 3])]).path(), 0).err().unwrap();
    assert!(message.contains("inside the model") && message.contains("lm_head.bias"), "{message}");
}

#[test]
fn dangling_links_and_lfs_pointers_are_named() {
    let home = checkpoint(&FITTING);
    let path = home.path().join("model.safetensors");
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("nowhere", &path).unwrap();
    let message = read(home.path(), 0).err().unwrap();
    assert!(message.contains("a link to nowhere, which is not there; fetch it again"), "{message}");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let message = read(home.path(), 0).err().unwrap();
    assert!(message.contains("is a directory"), "{message}");
    fs::remove_dir(&path).unwrap();
    fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n").unwrap();
    let message = read(home.path(), 0).err().unwrap();
    assert!(message.contains("`git lfs pull`") && !message.contains("write or fetch"), "{message}");
}
