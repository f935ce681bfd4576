//! Merging: trained values become part of the backbone's weights, in a directory that transformers loads.
//!
//! What can be folded is found by [`peft_passes::fold`]; here its result is computed and put in place.

use std::path::Path;

use peft_grammar::model::{ConfigValue, Model, Origin, TaskKind};
use peft_passes::pipeline::{Entry, Options};
use peft_runtime::adapter::{self, Data, Stored, TensorFile};
use peft_runtime::{Inputs, Numbers, Program, RuntimeError, Session};
use serde_json::{Map, Value, json};

use crate::failure::Failure;
use crate::hub::peft::Tensors;
use crate::{adapters, compiler};

/// What a tokenizer is read from.
const TOKENIZER: &[&str] =
    &["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt"];

pub struct Merged {
    /// Backbone and head, in the order of the model.
    tensors: Vec<(String, Stored)>,
    /// How many matrices and biases methods have changed.
    pub folded: String,
}

/// The backbone with everything trained folded in. `weights` are all tensors of the model, as a session takes them.
pub fn merge(model: &Model, weights: Vec<Numbers>, values: &Tensors, options: &Options) -> Result<Merged, Failure> {
    let own = |origin: &Origin| matches!(origin, Origin::Backbone | Origin::Head);
    let plain = model.params.iter().zip(&weights).filter(|(p, _)| own(&p.origin));
    let mut tensors: Vec<(String, Stored)> =
        plain.map(|(p, x)| (p.name.clone(), Stored::f32(p.shape.clone(), x.to_vec()))).collect();
    // What trains of backbone and head takes its place.
    for param in model.params.iter().filter(|p| own(&p.origin)) {
        let (Some((start, _)), Some(value)) = (param.trained_rows(), values.get(&param.name)) else { continue };
        let row = param.shape.iter().skip(1).product::<u64>();
        let (to, Data::F32(from)) = (numbers(&mut tensors, &param.name)?, &value.data) else { continue };
        to[(start * row) as usize..][..from.len()].copy_from_slice(from);
    }
    let mut count = 0;
    if model.params.iter().any(|p| matches!(p.origin, Origin::Method(_))) {
        let artifact = compiler::compile_entries(model, &[Entry::Merge], options)?;
        let program = Program::new(artifact.manifest, &artifact.library)?;
        let mut session = Session::new(program, weights, 0)?;
        adapters::apply(&mut session, values)?;
        session.run("merge", &Inputs::default())?;
        for projection in &model.projections {
            if let Some((shape, folded)) = session.output(&format!("{}.weight", projection.path)) {
                let first = projection.columns.map_or(0, |(start, _)| start as usize);
                let (inputs, outputs) = (shape[0] as usize, shape[1] as usize);
                let to = numbers(&mut tensors, &projection.weight)?;
                let width = to.len() / inputs;
                for (i, row) in folded.chunks(outputs).enumerate() {
                    for (o, &x) in row.iter().enumerate() {
                        let at = if projection.transposed { (first + o) * inputs + i } else { i * width + first + o };
                        to[at] = x;
                    }
                }
                count += 1;
            }
            if let (Some((_, folded)), Some(bias)) =
                (session.output(&format!("{}.bias", projection.path)), &projection.bias)
            {
                let first = projection.columns.map_or(0, |(start, _)| start as usize);
                numbers(&mut tensors, bias)?[first..first + folded.len()].copy_from_slice(&folded);
            }
        }
    }
    let trained = model.params.iter().filter(|p| own(&p.origin) && p.trained_rows().is_some()).count();
    let folded = match (count, trained) {
        (0, trained) => format!("{trained} trained tensors"),
        (count, 0) => format!("{count} projections"),
        (count, trained) => format!("{count} projections and {trained} trained tensors"),
    };
    Ok(Merged { tensors, folded })
}

fn numbers<'a>(tensors: &'a mut [(String, Stored)], name: &str) -> Result<&'a mut Vec<f32>, RuntimeError> {
    let found = tensors.iter_mut().find(|(n, _)| n == name).map(|(_, t)| &mut t.data);
    match found {
        Some(Data::F32(x)) => Ok(x),
        _ => Err(RuntimeError::input(name, "is no tensor of the backbone")),
    }
}

/// Writes weights, `config.json` and, where `from` has one, the tokenizer.
pub fn save(model: &Model, merged: &Merged, from: &Path, out: &Path) -> Result<(), Failure> {
    let mut file = TensorFile::default();
    file.tensors.extend(merged.tensors.iter().cloned());
    file.notes.insert("format".into(), "pt".into());
    let path = from.join("config.json");
    let config = match std::fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).map_err(|e| RuntimeError::file(&path, e))?,
        // Drawn at random: there is nothing to go by but the spec.
        Err(_) => Map::from_iter([("model_type".to_string(), json!(model.backbone.name))]),
    };
    let mut text = serde_json::to_string_pretty(&configured(model, config)).expect("plain data");
    text.push('\n');
    for name in TOKENIZER {
        let source = from.join(name);
        if source.is_file() {
            let bytes = std::fs::read(&source).map_err(Failure::file(&source))?;
            adapter::write_whole(&out.join(name), &bytes)?;
        }
    }
    adapter::save(&out.join("model.safetensors"), &file)?;
    Ok(adapter::write_whole(&out.join("config.json"), text.as_bytes())?)
}

/// The checkpoint's configuration with what the spec says of the model's form.
fn configured(model: &Model, mut config: Map<String, Value>) -> Map<String, Value> {
    let new = config.len() == 1;
    for (key, value) in &model.backbone.config {
        // The vocabulary may have grown, and whether weights are tied the files decided; all else agreed when the
        // weights were read.
        if new || key == "vocab_size" || matches!(value, ConfigValue::Bool(_)) {
            let value = match value {
                ConfigValue::Bool(b) => json!(b),
                ConfigValue::Int(n) => json!(n),
                ConfigValue::Float(x) => json!(x),
                ConfigValue::Str(s) => json!(s),
            };
            config.insert(key.clone(), value);
        }
    }
    if let TaskKind::Classification { labels } = &model.task.kind {
        let names = labels.iter().enumerate().map(|(i, l)| (i.to_string(), json!(l))).collect::<Map<_, _>>();
        let ids = labels.iter().enumerate().map(|(i, l)| (l.clone(), json!(i))).collect::<Map<_, _>>();
        config.insert("id2label".into(), Value::Object(names));
        config.insert("label2id".into(), Value::Object(ids));
    }
    // Values are written in full precision, whatever the checkpoint had.
    for key in ["torch_dtype", "dtype"] {
        config.remove(key);
    }
    config
}

/// What the spec's model does that transformers' of this name does not.
pub fn notes(model: &Model) -> Vec<String> {
    let say = |(key, value): (&String, &ConfigValue)| {
        let value = serde_json::to_string(value).unwrap_or_default();
        format!("note: `{key}: {value}` has no place in config.json; transformers does not know of it")
    };
    model.backbone.beyond.iter().map(say).collect()
}
