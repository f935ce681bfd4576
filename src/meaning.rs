//! What trained values mean: the function that they are a part of, the names of classes and of a task's tokens.
//!
//! The tensors of an adapter fit another spec if only their shapes do. What they would compute there is something else,
//! so an adapter records what it is of, and is refused by a model that means another thing.

use std::collections::HashMap;

use peft_grammar::graph::{Graph, Op, Value};
use peft_grammar::model::Model;
use serde_json::{Map, Value as Json, json};

const SHOWN: usize = 32;

/// A hash of the equations. It does not depend on the file and the lines in which they stand.
pub fn equations(model: &Model) -> String {
    if !model.equations.is_empty() {
        return model.equations.clone();
    }
    let mut graph = model.graph.clone();
    graph.name.clear();
    graph.nodes.iter_mut().for_each(|node| node.location = Default::default());
    let text = serde_json::to_vec(&(graph, &model.stored)).expect("a model is plain data");
    blake3::hash(&text).to_hex()[..SHOWN].to_string()
}

/// A hash of the function that the equations compute when nothing trains. Rates of dropout and of label smoothing do
/// not matter to it, and neither does which tensors train.
pub fn function(model: &Model) -> String {
    if !model.function.is_empty() {
        return model.function.clone();
    }
    let mut hash = blake3::Hasher::new();
    let values = hashes(&model.graph);
    let mut outputs: Vec<_> = model.graph.outputs.iter().collect();
    outputs.sort_by_key(|(name, _)| name);
    for (name, value) in outputs {
        hash.update(name.as_bytes()).update(values[value].as_bytes());
    }
    hash.finalize().to_hex()[..SHOWN].to_string()
}

/// Of every value: its operation with its operands, so that the order and the number of others do not matter.
fn hashes(graph: &Graph) -> HashMap<Value, blake3::Hash> {
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

const FUNCTION: &str = "function";
const SETTINGS: &str = "settings";
const LABELS: &str = "labels";
const SPECIAL: &str = "special";

/// What an adapter records of the model that it was trained in.
pub fn record(model: &Model) -> String {
    let mut all = Map::new();
    all.insert(FUNCTION.into(), json!(function(model)));
    all.insert(SETTINGS.into(), Json::Object(settings(model)));
    let (key, names) = names(model);
    all.insert(key.into(), json!(names));
    Json::Object(all).to_string()
}

/// The names of the task's classes or, where it has none, of its tokens.
fn names(model: &Model) -> (&'static str, &[String]) {
    match model.task.kind.labels() {
        Some(labels) => (LABELS, labels),
        None => (SPECIAL, model.task.special()),
    }
}

/// Arguments of the backbone and of the methods, by the names that messages give them.
pub fn settings(model: &Model) -> Map<String, Json> {
    let mut all = Map::new();
    for (key, value) in model.backbone.config.iter().chain(&model.backbone.beyond) {
        all.insert(format!("{}'s `{key}`", model.backbone.name), json!(value));
    }
    for applied in &model.applied {
        for (key, value) in &applied.args {
            all.insert(format!("{}'s `{key}`", applied.path()), json!(value));
        }
    }
    all
}

/// In what `model` means something else than the model that `record` is of: a line each, none if they agree. The error
/// is a record that cannot be read.
pub fn differences(record: &str, model: &Model) -> Result<Vec<String>, serde_json::Error> {
    let was: Map<String, Json> = serde_json::from_str(record)?;
    let mut lines = vec![];
    if was.get(FUNCTION).is_some_and(|hash| *hash != json!(function(model))) {
        let (before, now) = (was.get(SETTINGS).and_then(Json::as_object).cloned().unwrap_or_default(), settings(model));
        let keys = before.keys().chain(now.keys().filter(|key| !before.contains_key(*key)));
        let say = |value: Option<&Json>| value.map_or("not set".into(), Json::to_string);
        let differ = keys.filter(|key| before.get(*key) != now.get(*key));
        lines.extend(
            differ.map(|key| format!("  {key} was {}, and is {} here", say(before.get(key)), say(now.get(key)))),
        );
        if lines.is_empty() {
            lines.push("  the equations were others".into());
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
