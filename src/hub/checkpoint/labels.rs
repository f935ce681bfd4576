//! The labels of a checkpoint's head against those of the task.

use peft_grammar::model::{Model, TaskKind};
use serde_json::{Map, Value};

/// Lines of a refusal where the head that the files hold is made for other labels than the task has, or for something
/// else than classes.
///
/// Names are compared in the order of the classes. `LABEL_0`, `LABEL_1`, … are the names that transformers gives where
/// no one has given any, and fit all.
pub fn compare(config: &Map<String, Value>, model: &Model) -> Vec<String> {
    let TaskKind::Classification { labels } = &model.task.kind else { return vec![] };
    let mut wrong = vec![];
    if let Some(kind) = config.get("problem_type").filter(|v| !v.is_null() && *v != "single_label_classification") {
        wrong.push(format!(
            "  `problem_type` is {kind} in config.json, and a classification task takes the one class with the largest logit"
        ));
    }
    let all: Vec<&str> =
        config.get("architectures").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    if !all.is_empty() && !all.iter().any(|a| a.ends_with("ForSequenceClassification")) {
        wrong.push(format!(
            "  `architectures` is {} in config.json, so the head in the files is not one for sequences; \
             take the folder of the pretrained model, and the head is drawn anew",
            all.join(", ")
        ));
    }
    for key in ["num_labels", "_num_labels"] {
        if let Some(count) = config.get(key).filter(|v| !v.is_null() && v.as_u64() != Some(labels.len() as u64)) {
            wrong.push(format!("  `{key}` is {count} in config.json, the task has {} labels", labels.len()));
        }
    }
    match config.get("id2label") {
        None | Some(Value::Null) => {}
        Some(Value::Object(names)) => wrong.extend(names_differ(names, labels)),
        Some(other) => wrong.push(format!("  `id2label` is {other} in config.json, and no object of names")),
    }
    wrong
}

fn names_differ(names: &Map<String, Value>, labels: &[String]) -> Option<String> {
    let plain = |name: &Value| name.as_str().map_or_else(|| name.to_string(), String::from);
    let found: Option<Vec<String>> = (0..names.len()).map(|i| Some(plain(names.get(&i.to_string())?))).collect();
    let Some(found) = found else {
        let keys: Vec<&String> = names.keys().collect();
        return Some(format!("  `id2label` in config.json has the keys {keys:?}, where 0, 1, … were wanted"));
    };
    let quoted =
        |all: &[String]| format!("[{}]", all.iter().map(|l| format!("\"{l}\"")).collect::<Vec<_>>().join(", "));
    let unnamed = found.iter().enumerate().all(|(i, name)| *name == format!("LABEL_{i}"));
    if found.len() != labels.len() || (!unnamed && found != labels) {
        let (found, labels) = (quoted(&found), quoted(labels));
        return Some(format!(
            "  the head's classes are {found} by `id2label` of config.json, the task has `labels: {labels}`; \
             the names and their order have to be the head's: `labels: {found}`"
        ));
    }
    None
}
