//! Every key of transformers' configuration classes with other values. `tests/interop/config_fixtures.py` recorded the
//! effect of each on a tiny model. If a key changes the model, it is refused by name; if the key corresponds to an
//! argument of the backbone, the spec with that argument computes the same logits.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use peft_grammar::model::KeyRule;
use peft_runtime::adapter::{self, Data, Stored, TensorFile};
use peftc::hub::checkpoint::config::{IGNORED_KEYS, LABELS, compare};
use serde_json::{Map, Value};

use super::spec;
use crate::cli::{Bench, text};

struct Fixture {
    family: &'static str,
    json: Map<String, Value>,
}

impl Fixture {
    fn read(family: &'static str) -> Self {
        let path = folder().join(format!("{family}.json"));
        let json = fs::read_to_string(path).expect("the fixtures are part of the repository");
        Fixture { family, json: serde_json::from_str(&json).expect("JSON") }
    }
    fn base(&self) -> &Map<String, Value> {
        self.json["base"].as_object().expect("an object")
    }
    /// The keys of the family's own class.
    fn keys(&self) -> Vec<&str> {
        self.json["keys"].as_array().expect("a list").iter().map(|k| k.as_str().expect("a name")).collect()
    }
    fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        self.json["entries"].as_array().expect("a list").iter().map(|e| Entry(e.as_object().expect("an object")))
    }
    /// The base configuration with the entry's change.
    fn config(&self, entry: &Entry) -> Map<String, Value> {
        let mut config = self.base().clone();
        match entry.0.get("value") {
            Some(value) => _ = config.insert(entry.key().into(), value.clone()),
            None => _ = config.remove(entry.key()),
        }
        if let Some(without) = entry.0.get("without") {
            config.remove(without.as_str().expect("a name"));
        }
        config
    }
}

struct Entry<'a>(&'a Map<String, Value>);

impl Entry<'_> {
    fn key(&self) -> &str {
        self.0["key"].as_str().expect("a name")
    }
    /// Whether the value changes the model, or `None` if transformers refuses it.
    fn changes(&self) -> Option<bool> {
        self.0.get("changes").map(|c| c.as_bool().expect("a bool"))
    }
}

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/config")
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect()
}

/// The batch of a fixture, in which every token has a label.
fn inputs(bench: &Bench, fixture: &Fixture, causal: bool) -> std::path::PathBuf {
    let rows = fixture.json["ids"].as_array().expect("rows");
    let ids: Vec<i64> = rows.iter().flat_map(numbers).map(|x| x as i64).collect();
    let shape = vec![rows.len() as u64, (ids.len() / rows.len()) as u64];
    let labels = match causal {
        true => Stored { shape: shape.clone(), data: Data::I64(ids.clone()) },
        false => Stored { shape: vec![rows.len() as u64], data: Data::I64(vec![0; rows.len()]) },
    };
    let mut file = TensorFile::default();
    file.tensors.insert("inputs.ids".into(), Stored { shape: shape.clone(), data: Data::I64(ids.clone()) });
    file.tensors.insert("inputs.mask".into(), Stored { shape, data: Data::I64(vec![1; ids.len()]) });
    file.tensors.insert("inputs.labels".into(), labels);
    let path = bench.path("in.safetensors");
    adapter::save(&path, &file).expect("written");
    path
}

/// The logits of a checkpoint with this configuration, or the message of the refusal.
fn logits(
    bench: &Bench,
    fixture: &Fixture,
    config: &Map<String, Value>,
    spec: &Path,
    set: Option<&str>,
) -> Result<Vec<f64>, String> {
    let weights = bench.path("weights");
    fs::create_dir_all(&weights).expect("a folder");
    fs::write(weights.join("config.json"), serde_json::to_string(config).expect("plain data")).expect("written");
    let tensors = folder().join(format!("{}.safetensors", fixture.family));
    fs::copy(tensors, weights.join("model.safetensors")).expect("copied");
    let causal = fixture.family == "gpt2" || fixture.family == "llama";
    let (batch, out) = (inputs(bench, fixture, causal), bench.path("out.safetensors"));
    let args = [
        "run",
        text(spec),
        "--entry",
        "forward",
        "--weights",
        text(&weights),
        "--inputs",
        text(&batch),
        "--overwrite",
        "-o",
    ];
    let set = set.map(|set| ["--set", set]);
    let ran = bench.peftc(args.iter().copied().chain([text(&out)]).chain(set.into_iter().flatten()));
    match ran.code {
        0 => match &adapter::load(&out).expect("sound").tensors["logits"].data {
            Data::F32(x) => Ok(x.iter().map(|&x| f64::from(x)).collect()),
            _ => panic!("logits are floats"),
        },
        3 => Err(ran.err),
        code => panic!("exit code {code}: {}", ran.err),
    }
}

#[track_caller]
fn equal(found: &[f64], wanted: &Value, what: &str) {
    let wanted = numbers(wanted);
    assert_eq!(found.len(), wanted.len(), "{what}");
    let largest = wanted.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let gap = found.iter().zip(&wanted).map(|(f, w)| (f - w).abs()).fold(0.0, f64::max);
    assert!(gap <= 1e-5 * largest, "{what}: off by {gap} of {largest}");
}

fn every_key(family: &'static str, source: &str) {
    let bench = Bench::new();
    let fixture = Fixture::read(family);
    let (path, model) = spec(&bench, "spec.peft", source);
    let rules = &model.backbone.checkpoint.keys;
    let found = compare(fixture.base(), &model);
    assert_eq!((found.wrong, found.warnings), Default::default());
    equal(
        &logits(&bench, &fixture, fixture.base(), &path, None).expect("it fits"),
        &fixture.json["logits"],
        "the base",
    );

    // Another `model_type` is accepted only if transformers computes the same for it.
    for other in model.backbone.checkpoint.model_types.iter().filter(|t| *t != family) {
        let mut same = fixture.entries().filter(|e| e.key() == "model_type" && e.0["value"] == **other);
        assert_eq!(same.next().and_then(|e| e.changes()), Some(false), "{other}");
    }
    let own = fixture.keys();
    let (mut honoured, mut tried) = (0, BTreeSet::new());
    for entry in fixture.entries() {
        let (key, config) = (entry.key(), fixture.config(&entry));
        let what = format!("{family}: {}", serde_json::to_string(&entry.0).expect("plain data"));
        let found = compare(&config, &model);
        if own.contains(&key) {
            assert!(found.warnings.is_empty(), "{what}\n{:?}", found.warnings);
        }
        let free = matches!(rules.get(key), Some(KeyRule::Free)) || IGNORED_KEYS.contains(&key);
        if free || LABELS.contains(&key) {
            assert_ne!(entry.changes(), Some(true), "{what}: it is declared to be without influence");
            assert_eq!(found.wrong, [""; 0], "{what}");
        }
        if entry.changes() != Some(true) {
            continue;
        }
        let named = |said: &str| said.contains(&format!("`{key}`")) || said.contains(&format!("`{key}."));
        assert!(found.wrong.iter().any(|line| named(line)), "{what} is not refused by name: {:?}", found.wrong);
        // If the refusal names an argument to set, setting it gives the same logits, or another refusal.
        let line = found.wrong.iter().find(|line| named(line)).expect("it is named");
        let Some(set) = line.split("`--set ").nth(1).and_then(|rest| rest.split('`').next()) else { continue };
        // One value of each key is enough, because each compiles a model.
        if !tried.insert(key.to_owned()) {
            continue;
        }
        match logits(&bench, &fixture, &config, &path, Some(set)) {
            Ok(found) => {
                honoured += 1;
                equal(&found, &entry.0["logits"], &what);
            }
            Err(said) => assert!(said.contains("do not fit the model"), "{what}: {said}"),
        }
    }
    assert!(honoured >= 2, "{family}: only {honoured} values of keys were honoured");
}

#[test]
fn every_key_of_bert() {
    every_key("bert", "model = bert(layers: 2, hidden: 16, heads: 2, ffn: 24, vocab: 13, context: 12)\n");
}

#[test]
fn every_key_of_roberta() {
    every_key(
        "roberta",
        "model = roberta(layers: 2, hidden: 16, heads: 2, ffn: 24, vocab: 13, context: 14, eps: 1e-5)\n",
    );
}

#[test]
fn every_key_of_gpt2() {
    every_key("gpt2", "model = gpt2(layers: 2, hidden: 16, heads: 2, ffn: 24, vocab: 13, context: 12)\n");
}

#[test]
fn every_key_of_llama() {
    every_key(
        "llama",
        "model = llama(layers: 2, hidden: 16, heads: 4, kv_heads: 2, ffn: 24, vocab: 13, context: 12)\n",
    );
}

/// The keys in `IGNORED_KEYS` were tried, and never changed a model.
#[test]
fn ignored_keys_were_tried() {
    let fixtures = ["bert", "roberta", "gpt2", "llama"].map(Fixture::read);
    for key in IGNORED_KEYS.iter().filter(|key| **key != "model_type") {
        let entries = || fixtures.iter().flat_map(Fixture::entries).filter(|e| e.key() == *key);
        assert!(entries().any(|e| e.changes() == Some(false)), "`{key}` was never tried");
        assert!(entries().all(|e| e.changes() != Some(true)), "`{key}` changes a model");
    }
    let mut sorted = IGNORED_KEYS.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), IGNORED_KEYS.len(), "a key is listed twice");
}
