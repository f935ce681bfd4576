//! Inputs modelled on public bug reports. Each is either handled correctly, or refused with a message that names the
//! place and the remedy.
//!
//! Each file covers one class of errors. The tests create their inputs themselves; nothing is downloaded.

mod adapters;
mod bounds;
mod checkpoint;
mod config_keys;
mod labels;
mod merge;
pub mod random;
pub mod recipe;
mod resume;
mod tokenizer;
mod trust;

use std::fs;
use std::path::PathBuf;

use peft_grammar::model::{ConfigValue, Model, Origin};
use peft_runtime::adapter::{self, Stored, TensorFile};
use peft_runtime::weights;
use serde_json::{Map, Value, json};

use crate::cli::Bench;

/// Tiny models with hidden size 32, 2 layers, 4 heads, a context of 64 tokens, and 50 tokens.
pub const GPT2: &str = "model = gpt2(layers: 2, hidden: 32, heads: 4, ffn: 64, vocab: 50, context: 64)\n";
pub const LLAMA: &str =
    "model = llama(layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 50, context: 64)\n";
pub const BERT: &str = "model = bert(layers: 2, hidden: 32, heads: 4, ffn: 64, vocab: 50, context: 64)\n";
pub const ROBERTA: &str = "model = roberta(layers: 2, hidden: 32, heads: 4, ffn: 64, vocab: 50, context: 66)\n";

/// Writes a spec and checks it.
pub fn spec(bench: &Bench, name: &str, text: &str) -> (PathBuf, Model) {
    let path = bench.write(name, text);
    let model = peftc::spec::load(&path, &[], false).unwrap_or_else(|e| panic!("{e}"));
    (path, model)
}

/// The model's `config.json` as transformers writes it: the keys that the backbone reads, and `model_type`.
pub fn config(model: &Model) -> Map<String, Value> {
    let value = |v: &ConfigValue| match v {
        ConfigValue::Bool(b) => json!(b),
        ConfigValue::Int(n) => json!(n),
        ConfigValue::Float(x) => json!(x),
        ConfigValue::Str(s) => json!(s),
    };
    let mut config: Map<String, Value> = model.backbone.config.iter().map(|(k, v)| (k.clone(), value(v))).collect();
    config.insert("model_type".into(), json!(model.backbone.name));
    config
}

/// The tensors of a checkpoint. Matrices are scaled by eight, so that differences between models become visible.
pub fn tensors(model: &Model, head: bool) -> TensorFile {
    let mut file = TensorFile::default();
    file.notes.insert("format".into(), "pt".into());
    for (param, numbers) in model.params.iter().zip(weights::random(&model.params, 7)) {
        let own = param.origin == Origin::Backbone || (head && param.origin == Origin::Head);
        if !own {
            continue;
        }
        let scale = if param.shape.len() == 2 { 8.0 } else { 1.0 };
        let numbers = numbers.iter().map(|x| x * scale).collect();
        file.tensors.insert(param.name.clone(), Stored::f32(param.shape.clone(), numbers));
    }
    file
}

/// Writes a folder in Hugging Face's layout.
pub fn folder(bench: &Bench, name: &str, config: &Map<String, Value>, tensors: &TensorFile) -> PathBuf {
    let folder = bench.path(name);
    fs::create_dir_all(&folder).expect("a folder");
    let text = serde_json::to_string_pretty(config).expect("plain data");
    fs::write(folder.join("config.json"), text).expect("written");
    adapter::save(&folder.join("model.safetensors"), tensors).expect("written");
    folder
}

/// A folder with a checkpoint that fits the model.
pub fn checkpoint(bench: &Bench, name: &str, model: &Model) -> PathBuf {
    folder(bench, name, &config(model), &tensors(model, true))
}

/// A padded batch for `peftc run --inputs`.
pub fn inputs(bench: &Bench, name: &str, ids: &[&[i64]], labels: &[i64]) -> PathBuf {
    use peft_runtime::adapter::Data;
    let width = ids.iter().map(|row| row.len()).max().unwrap_or(0);
    let shape = vec![ids.len() as u64, width as u64];
    let padded = |row: &&[i64]| row.iter().copied().chain(std::iter::repeat(0)).take(width).collect::<Vec<_>>();
    let mask = |row: &&[i64]| (0..width).map(|i| i64::from(i < row.len())).collect::<Vec<_>>();
    let mut file = TensorFile::default();
    let mut put = |name: &str, shape: Vec<u64>, data: Vec<i64>| {
        file.tensors.insert(format!("inputs.{name}"), Stored { shape, data: Data::I64(data) });
    };
    put("ids", shape.clone(), ids.iter().flat_map(padded).collect());
    put("mask", shape, ids.iter().flat_map(mask).collect());
    put("labels", vec![ids.len() as u64], labels.to_vec());
    let path = bench.path(name);
    adapter::save(&path, &file).expect("written");
    path
}

#[test]
fn a_fitting_checkpoint_runs() {
    let bench = Bench::new();
    let (path, model) = spec(&bench, "bert.peft", BERT);
    let weights = checkpoint(&bench, "weights", &model);
    let batch = inputs(&bench, "in.safetensors", &[&[1, 2, 3], &[4, 5]], &[0, 1]);
    let out = bench.path("out.safetensors");
    let ran = bench.peftc([
        "run".as_ref(),
        path.as_os_str(),
        "--entry".as_ref(),
        "forward".as_ref(),
        "--weights".as_ref(),
        weights.as_os_str(),
        "--inputs".as_ref(),
        batch.as_os_str(),
        "-o".as_ref(),
        out.as_os_str(),
    ]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_eq!(adapter::load(&out).expect("sound").tensors["logits"].shape, [2, 2]);
}
