use peft_grammar::model::Trainable;

use super::*;
use crate::adapter::{self, Stored, TensorFile};

fn param(name: &str, shape: &[u64], origin: Origin) -> Param {
    let init = Init::Normal { std: 1.0 };
    Param { name: name.into(), shape: shape.to_vec(), init, trainable: Trainable::No, origin, decay: false }
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
    Backbone { name: "tiny".into(), config: BTreeMap::new(), prefix: "t.".into(), beyond: BTreeMap::new() }
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
fn names_with_and_without_prefix_and_in_old_spelling() {
    for names in [
        ["t.wte.weight", "t.h.0.LayerNorm.weight", "t.pooler.dense.bias"],
        ["wte.weight", "h.0.LayerNorm.weight", "pooler.dense.bias"],
        ["t.wte.weight", "t.h.0.LayerNorm.gamma", "pooler.dense.bias"],
        ["wte.weight", "h.0.LayerNorm.gamma", "pooler.dense.bias"],
    ] {
        let [a, b, c] = names;
        let home = checkpoint(&[(a, &[3, 2]), (b, &[2]), (c, &[2]), ("h.0.attn.bias", &[4]), ("extra", &[1])]);
        let loaded = read(home.path(), 0).unwrap();
        assert_eq!(loaded.tensors[0][..], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(loaded.tensors[1][..], [1.0, 2.0]);
        assert_eq!(loaded.drawn, ["classifier.weight", "layers.0.attention.q.lora.a"]);
        assert_eq!(loaded.left_over, ["extra"]);
    }
}

#[test]
fn a_pooler_may_be_missing() {
    let loaded = read(checkpoint(&FITTING[..2]).path(), 0).unwrap();
    assert_eq!(loaded.drawn[..2], ["t.pooler.dense.bias", "classifier.weight"]);
    assert_eq!(loaded.tensors.len(), 5);
}

#[test]
fn shards() {
    let home = tempfile::tempdir().unwrap();
    write_model(&home.path().join("1.safetensors"), &FITTING[..1]);
    write_model(&home.path().join("2.safetensors"), &FITTING[1..]);
    let index = home.path().join("model.safetensors.index.json");
    let map = |files: [&str; 2]| serde_json::json!({ "weight_map": { "a": files[0], "b": files[1] } }).to_string();
    fs::write(&index, map(["1.safetensors", "2.safetensors"])).unwrap();
    read(home.path(), 0).unwrap();
    for (text, expected) in [
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
fn what_does_not_fit() {
    let message = refusal(&[("t.wte.weight", &[2, 3]), ("t.h.0.LayerNorm.weigth", &[2])]);
    assert!(
        message.contains("`t.h.0.LayerNorm.weight` is missing; the file has `t.h.0.LayerNorm.weigth`"),
        "{message}"
    );
    assert!(message.contains("`t.wte.weight` is [2, 3] in the file, the spec wants [3, 2] (it looks transposed)"));
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
    // Of two tokens one may be the checkpoint's own.
    assert_eq!(read(home.path(), 2).unwrap().tensors[0][..], wte[..]);
}

#[test]
fn numbers_that_are_not_finite() {
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
fn moments() {
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

#[test]
fn configurations() {
    let home = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "n_layer": 24, "n_embd": 768, "n_inner": null, "vocab_size": 50257, "attn_pdrop": 0.1, "eps": 1e-5
    });
    fs::write(home.path().join("config.json"), config.to_string()).unwrap();
    let check = |config: serde_json::Value, appended| {
        let backbone = Backbone { config: serde_json::from_value(config).unwrap(), ..backbone() };
        check_config(home.path(), &backbone, appended).map_err(|e| e.to_string())
    };
    let fitting = serde_json::json!({
        "n_layer": 24, "n_inner": 3072, "vocab_size": 50273, "attn_pdrop": 0.0, "eps": 0.00001, "unheard": 1
    });
    check(fitting.clone(), 16).unwrap();
    assert!(check(fitting, 0).unwrap_err().contains("`vocab_size` is 50257"));
    check(serde_json::json!({ "tie_word_embeddings": false }), 0).unwrap();
    let message = check(serde_json::json!({ "n_layer": 12, "n_embd": 768 }), 0).unwrap_err();
    assert!(message.contains("`n_layer` is 24 in config.json, the spec wants 12") && !message.contains("n_embd"));
}

#[test]
fn configurations_of_rotary_positions() {
    let home = tempfile::tempdir().unwrap();
    let wanted = serde_json::json!({ "rope_theta": 10000.0, "rope_type": "default" });
    let backbone = Backbone { config: serde_json::from_value(wanted).unwrap(), ..backbone() };
    let check = |config: serde_json::Value| {
        fs::write(home.path().join("config.json"), config.to_string()).unwrap();
        check_config(home.path(), &backbone, 0).map_err(|e| e.to_string())
    };
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    for fitting in [
        "{}",
        r#"{ "rope_theta": 10000, "rope_scaling": null }"#,
        r#"{ "rope_scaling": { "rope_type": "default" } }"#,
        r#"{ "rope_parameters": { "rope_theta": 10000.0, "rope_type": "default" } }"#,
    ] {
        check(json(fitting)).unwrap();
    }
    for (other, message) in [
        (r#"{ "rope_theta": 500000.0 }"#, "`rope_theta` is 500000.0 in config.json, the spec wants 10000.0"),
        (r#"{ "rope_parameters": { "rope_theta": 500000.0 } }"#, "`rope_theta` is 500000.0"),
        (r#"{ "rope_parameters": { "rope_type": "yarn", "factor": 2.0 } }"#, "`rope_type` is \"yarn\" in config.json"),
        (r#"{ "rope_scaling": { "rope_type": "llama3", "factor": 8.0 } }"#, "`rope_type` is \"llama3\" in config.json"),
        (r#"{ "rope_scaling": { "type": "linear", "factor": 2.0 } }"#, "the spec wants \"default\""),
    ] {
        let found = check(json(other)).unwrap_err();
        assert!(found.contains(message), "{found}");
    }
}

/// Untied logits have a matrix of their own; tied ones leave a checkpoint's copy alone.
#[test]
fn an_output_matrix_is_read_when_the_model_has_one() {
    let home = checkpoint(&[("t.wte.weight", &[3, 2]), ("lm_head.weight", &[3, 2])]);
    let mut params = vec![param("t.wte.weight", &[3, 2], Origin::Backbone)];
    let tied = load(home.path(), &backbone(), &params, 0, 7).unwrap();
    assert!(tied.left_over.is_empty() && tied.tensors.len() == 1);
    params.push(param("lm_head.weight", &[3, 2], Origin::Backbone));
    let untied = load(home.path(), &backbone(), &params, 0, 7).unwrap();
    assert_eq!(untied.tensors[1][..], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let bare = checkpoint(&FITTING[..1]);
    let message = load(bare.path(), &backbone(), &params, 0, 7).err().unwrap().to_string();
    assert!(message.contains("`lm_head.weight` is missing"), "{message}");
}
