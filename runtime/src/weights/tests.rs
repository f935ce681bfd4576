use super::*;
use crate::safefile::{Entry, write};

fn source(name: &str, shape: &[u64], origin: Origin) -> TensorSource {
    let init = Init::Normal { std: 1.0 };
    TensorSource { name: name.into(), shape: shape.to_vec(), init, origin, trainable: Rows::No }
}

fn wanted() -> Vec<TensorSource> {
    vec![
        source("t.wte.weight", &[3, 2], Origin::Backbone),
        source("t.h.0.LayerNorm.weight", &[2], Origin::Backbone),
        source("t.pooler.dense.bias", &[2], Origin::Backbone),
        source("classifier.weight", &[2, 2], Origin::Head),
        source("layers.0.attention.q.lora.a", &[1, 2], Origin::Method("lora".into())),
    ]
}

fn write_model(path: &Path, tensors: &[(&str, &[u64])]) {
    let data: Vec<f32> = (1..=64).map(|i| i as f32).collect();
    let entry = |&(name, shape): &(&str, &[u64])| {
        let elements = shape.iter().product::<u64>() as usize;
        Entry { name: name.into(), shape: shape.to_vec(), data: &data[..elements] }
    };
    write(path, &tensors.iter().map(entry).collect::<Vec<_>>(), &BTreeMap::new()).unwrap();
}

/// A directory whose `model.safetensors` holds these tensors, filled with 1, 2, 3, …
fn checkpoint(tensors: &[(&str, &[u64])]) -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    write_model(&home.path().join("model.safetensors"), tensors);
    home
}

const FITTING: [(&str, &[u64]); 3] =
    [("t.wte.weight", &[3, 2]), ("t.h.0.LayerNorm.weight", &[2]), ("t.pooler.dense.bias", &[2])];

fn misfit(tensors: &[(&str, &[u64])]) -> String {
    load(checkpoint(tensors).path(), &wanted(), "t.", 0).unwrap_err().to_string()
}

#[test]
fn names_with_and_without_prefix_and_in_old_spelling() {
    for names in [
        ["t.wte.weight", "t.h.0.LayerNorm.weight", "t.pooler.dense.bias"],
        ["wte.weight", "h.0.LayerNorm.weight", "pooler.dense.bias"],
        ["t.wte.weight", "t.h.0.LayerNorm.gamma", "pooler.dense.bias"],
    ] {
        let [a, b, c] = names;
        let home = checkpoint(&[(a, &[3, 2]), (b, &[2]), (c, &[2]), ("h.0.attn.bias", &[4]), ("extra", &[1])]);
        let loaded = load(home.path(), &wanted(), "t.", 0).unwrap();
        assert_eq!(loaded.weights.get("t.wte.weight").unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(loaded.weights.get("t.h.0.LayerNorm.weight").unwrap(), [1.0, 2.0]);
        assert_eq!(loaded.drawn, ["classifier.weight"]);
        assert_eq!(loaded.left_over, ["extra"]);
        assert!(loaded.weights.get("layers.0.attention.q.lora.a").is_some());
    }
}

#[test]
fn a_pooler_may_be_missing() {
    let loaded = load(checkpoint(&FITTING[..2]).path(), &wanted(), "t.", 0).unwrap();
    assert_eq!(loaded.drawn, ["t.pooler.dense.bias", "classifier.weight"]);
}

#[test]
fn shards_and_single_files() {
    let home = tempfile::tempdir().unwrap();
    write_model(&home.path().join("1.safetensors"), &FITTING[..1]);
    write_model(&home.path().join("2.safetensors"), &FITTING[1..]);
    let index = home.path().join("model.safetensors.index.json");
    let map = |files: [&str; 2]| serde_json::json!({ "weight_map": { "a": files[0], "b": files[1] } }).to_string();
    std::fs::write(&index, map(["1.safetensors", "2.safetensors"])).unwrap();
    load(home.path(), &wanted(), "t.", 0).unwrap();
    for (text, expected) in [
        (map(["1.safetensors", "../2.safetensors"]), "no plain file name"),
        (map(["1.safetensors", "3.safetensors"]), "3.safetensors"),
        ("{".into(), "damaged"),
    ] {
        std::fs::write(&index, text).unwrap();
        let message = load(home.path(), &wanted(), "t.", 0).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    let single = checkpoint(&FITTING);
    load(&single.path().join("model.safetensors"), &wanted(), "t.", 0).unwrap();
    let nothing = tempfile::tempdir().unwrap();
    assert!(load(nothing.path(), &wanted(), "t.", 0).unwrap_err().to_string().contains("no `model.safetensors`"));
}

#[test]
fn what_does_not_fit() {
    let message = misfit(&[("t.wte.weight", &[2, 3]), ("t.h.0.LayerNorm.weigth", &[2])]);
    assert!(message.contains("`t.h.0.LayerNorm.weight` (is `t.h.0.LayerNorm.weigth` meant?)"), "{message}");
    assert!(message.contains("`t.wte.weight` is [2, 3] there, [3, 2] in the spec (transposed)"), "{message}");
    let message = misfit(&[("t.wte.weight", &[4, 2]), FITTING[1]]);
    assert!(message.contains("[4, 2] there"), "{message}");
    let message = misfit(&[FITTING[0], FITTING[1], ("classifier.weight", &[3, 2])]);
    assert!(message.contains("`classifier.weight` is [3, 2] there"), "{message}");
}

#[test]
fn new_rows_of_an_embedding_are_drawn() {
    let home = checkpoint(&[("t.wte.weight", &[2, 2]), FITTING[1]]);
    let loaded = load(home.path(), &wanted(), "t.", 7).unwrap();
    assert_eq!(loaded.grown, [("t.wte.weight".to_string(), 2, 3)]);
    let random = Weights::random(&wanted(), 7).unwrap();
    let wte = loaded.weights.get("t.wte.weight").unwrap();
    assert_eq!(wte[..4], [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(wte[4..], random.get("t.wte.weight").unwrap()[4..]);

    // Another tensor grows only where its new rows train.
    let home = checkpoint(&[("table", &[2, 2])]);
    let mut table = source("table", &[3, 2], Origin::Backbone);
    let message = load(home.path(), &[table.clone()], "t.", 0).unwrap_err().to_string();
    assert!(message.contains("rows 2..3 of \"table\""), "{message}");
    table.trainable = Rows::Rows(2, 3);
    load(home.path(), &[table], "t.", 0).unwrap();
}

#[test]
fn drawn_weights_do_not_depend_on_order() {
    let forward = Weights::random(&wanted(), 3).unwrap();
    let backward = Weights::random(&wanted().into_iter().rev().collect::<Vec<_>>(), 3).unwrap();
    for source in wanted() {
        assert_eq!(forward.get(&source.name), backward.get(&source.name));
    }
}

#[test]
fn sources_read_from_a_checked_model() {
    let params = serde_json::json!([
        {"name": "a", "shape": [2], "init": "Zeros", "trainable": "All", "origin": {"Method": "lora"}, "decay": false},
        {"name": "b", "shape": [2], "init": {"Normal": {"std": 0.02}}, "trainable": {"Rows": [0, 1]},
         "origin": "Backbone", "decay": true}
    ]);
    let sources: Vec<TensorSource> = serde_json::from_value(params).unwrap();
    assert_eq!(sources[1].trainable, Rows::Rows(0, 1));
}

#[test]
fn configurations() {
    let home = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "n_layer": 24, "n_embd": 768, "n_inner": null, "vocab_size": 50257, "attn_pdrop": 0.1, "eps": 1e-5
    });
    std::fs::write(home.path().join("config.json"), config.to_string()).unwrap();
    let check = |expected: Value| check_config(home.path(), &serde_json::from_value(expected).unwrap());
    check(serde_json::json!({
        "n_layer": 24, "n_inner": 3072, "vocab_size": 50273, "attn_pdrop": 0.0, "eps": 0.00001, "unheard": 1
    }))
    .unwrap();
    let message =
        check(serde_json::json!({ "n_layer": 12, "n_embd": 768, "vocab_size": 100 })).unwrap_err().to_string();
    assert!(message.contains("`n_layer` is 24 there, 12 in the spec"), "{message}");
    assert!(message.contains("`vocab_size` is 50257 there, 100 in the spec") && !message.contains("n_embd"));
}
