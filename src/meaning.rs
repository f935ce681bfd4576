//! Identifies the function that trained values belong to, and the names of the task's classes and special tokens.
//!
//! The tensors of an adapter fit every spec in which their shapes agree, but compute something else in most of them. An
//! adapter therefore records the model that it was trained in, and a model that computes another function refuses it.

use std::collections::HashMap;

use peft_grammar::graph::{Graph, Op, Value};
use peft_grammar::model::Model;
use serde_json::{Map, Value as Json, json};

/// Hexadecimal digits of a hash that are kept.
const HASH_DIGITS: usize = 32;

/// A hash of the equations, independent of the file and the lines in which they are written.
pub fn equations_hash(model: &Model) -> String {
    if !model.equations_hash.is_empty() {
        return model.equations_hash.clone();
    }
    let mut graph = model.graph.clone();
    graph.name.clear();
    graph.nodes.iter_mut().for_each(|node| node.location = Default::default());
    let text = serde_json::to_vec(&(graph, &model.stored)).expect("a model is plain data");
    blake3::hash(&text).to_hex()[..HASH_DIGITS].to_string()
}

/// A hash of the function that the equations compute at inference. It is independent of the rates of dropout and label
/// smoothing, and of which tensors train.
pub fn function_hash(model: &Model) -> String {
    if !model.function_hash.is_empty() {
        return model.function_hash.clone();
    }
    let mut hash = blake3::Hasher::new();
    let values = value_hashes(&model.graph);
    let mut outputs: Vec<_> = model.graph.outputs.iter().collect();
    outputs.sort_by_key(|(name, _)| name);
    for (name, value) in outputs {
        hash.update(name.as_bytes()).update(values[value].as_bytes());
    }
    hash.finalize().to_hex()[..HASH_DIGITS].to_string()
}

/// A hash of every value: of its operation and the hashes of its operands. It is independent of the order of the nodes
/// and of unrelated nodes. Dropout counts as the identity.
fn value_hashes(graph: &Graph) -> HashMap<Value, blake3::Hash> {
    let mut hashes = HashMap::new();
    for arg in &graph.args {
        hashes.insert(arg.value, blake3::hash(arg.label().as_bytes()));
    }
    for node in &graph.nodes {
        let op = match &node.op {
            Op::Dropout { .. } => {
                hashes.insert(node.result(), hashes[&node.operands[0]]);
                continue;
            }
            Op::CrossEntropy { .. } => Op::CrossEntropy { smoothing: 0.0 },
            other => other.clone(),
        };
        let mut hash = blake3::Hasher::new();
        hash.update(&serde_json::to_vec(&(op, graph.ty(node.result()))).expect("plain data"));
        for operand in &node.operands {
            hash.update(hashes[operand].as_bytes());
        }
        hashes.insert(node.result(), hash.finalize());
    }
    hashes
}

// Keys of the record in an adapter.
const FUNCTION: &str = "function";
const SETTINGS: &str = "settings";
const LABELS: &str = "labels";
const SPECIAL: &str = "special";

/// The record of `model` that an adapter trained in it carries: a JSON object with the hash of its function, its
/// settings, and the names of its classes or special tokens.
pub fn record(model: &Model) -> String {
    let mut all = Map::new();
    all.insert(FUNCTION.into(), json!(function_hash(model)));
    all.insert(SETTINGS.into(), Json::Object(settings(model)));
    let (key, names) = names(model);
    all.insert(key.into(), json!(names));
    Json::Object(all).to_string()
}

/// The names of the task's classes or, if it has none, of its special tokens; with the record's key for them.
fn names(model: &Model) -> (&'static str, &[String]) {
    match model.task.kind.labels() {
        Some(labels) => (LABELS, labels),
        None => (SPECIAL, model.task.special_tokens()),
    }
}

/// The arguments of the backbone and of the methods, each under the name that messages use for it.
pub fn settings(model: &Model) -> Map<String, Json> {
    let mut all = Map::new();
    for (key, value) in model.backbone.config.iter().chain(&model.backbone.extra_args) {
        all.insert(format!("{}'s `{key}`", model.backbone.name), json!(value));
    }
    for applied in &model.applied {
        for (key, value) in &applied.args {
            all.insert(format!("{}'s `{key}`", applied.path()), json!(value));
        }
    }
    all
}

/// The differences between `model` and the model described by `record`, one line each; empty if they compute the same
/// function.
///
/// # Errors
///
/// `record` is not a JSON object.
pub fn differences(record: &str, model: &Model) -> Result<Vec<String>, serde_json::Error> {
    let was: Map<String, Json> = serde_json::from_str(record)?;
    let mut lines = vec![];
    if was.get(FUNCTION).is_some_and(|hash| *hash != json!(function_hash(model))) {
        let (before, now) = (was.get(SETTINGS).and_then(Json::as_object).cloned().unwrap_or_default(), settings(model));
        let keys = before.keys().chain(now.keys().filter(|key| !before.contains_key(*key)));
        let say = |value: Option<&Json>| value.map_or("not set".into(), Json::to_string);
        let differ = keys.filter(|key| before.get(*key) != now.get(*key));
        lines.extend(
            differ.map(|key| format!("  {key} was {}, and is {} here", say(before.get(key)), say(now.get(key)))),
        );
        if lines.is_empty() {
            lines.push("  the equations were different".into());
        }
    }
    let (key, names) = names(model);
    if let Some(before) = was.get(key)
        && *before != json!(names)
    {
        lines.push(format!("  `{key}` was {before}, and is {} here", json!(names)));
    }
    Ok(lines)
}
