//! Compares the labels of a checkpoint's head with those of the task.

use peft_grammar::model::{Model, TaskKind};
use serde_json::{Map, Value};

/// The errors, a line each, if the head in the files is for other labels than the task's, or for another kind of task.
///
/// Names are compared in the order of the classes. `LABEL_0`, `LABEL_1`, … are the default names of transformers and
/// agree with any labels.
pub fn compare(config: &Map<String, Value>, model: &Model) -> Vec<String> {
    let kind = &model.task.kind;
    if kind.generates() {
        return vec![];
    }
    let mut wrong = vec![];
    let (problem, takes) = match kind {
        TaskKind::Regression { .. } => ("regression", "a regression's head gives one number"),
        _ => ("single_label_classification", "a classification task takes the one class with the largest logit"),
    };
    if let Some(other) = config.get("problem_type").filter(|v| !v.is_null() && *v != problem) {
        wrong.push(format!("  `problem_type` is {other} in config.json, and {takes}"));
    }
    wrong.extend(other_head(config, model));
    let count = kind.labels().map_or(1, <[String]>::len);
    for key in ["num_labels", "_num_labels"] {
        if let Some(found) = config.get(key).filter(|v| !v.is_null() && v.as_u64() != Some(count as u64)) {
            wrong.push(match kind.labels() {
                Some(_) => format!("  `{key}` is {found} in config.json, the task has {count} labels"),
                None => format!("  `{key}` is {found} in config.json, and a regression has one number"),
            });
        }
    }
    let Some(labels) = kind.labels() else { return wrong };
    match config.get("id2label") {
        None | Some(Value::Null) => {}
        Some(Value::Object(names)) => wrong.extend(names_differ(names, labels)),
        Some(other) => wrong.push(format!("  `id2label` is {other} in config.json, and should be an object of names")),
    }
    match config.get("label2id") {
        None | Some(Value::Null) => {}
        Some(Value::Object(ids)) => wrong.extend(ids_differ(ids, config.get("id2label"), labels)),
        Some(other) => {
            wrong.push(format!("  `label2id` is {other} in config.json, and should be an object of numbers"))
        }
    }
    wrong
}

/// The error if `label2id` gives a name another class than `id2label` does or, if that is absent, than the task does.
fn ids_differ(ids: &Map<String, Value>, names: Option<&Value>, labels: &[String]) -> Option<String> {
    let class = |id: &Value| id.as_u64().or_else(|| id.as_str()?.parse().ok());
    let unnamed = ids.iter().all(|(name, id)| class(id).is_some_and(|id| *name == format!("LABEL_{id}")));
    for (name, id) in ids {
        let Some(class) = class(id) else {
            return Some(format!(
                "  `label2id` has {id} for \"{name}\" in config.json, which is not the number of a class"
            ));
        };
        match names {
            Some(Value::Object(names)) => match names.get(&class.to_string()) {
                Some(other) if *other != *name => {
                    return Some(format!(
                        "  \"{name}\" is class {class} by `label2id` of config.json, and `id2label` names that class \
                         {other}; make them agree"
                    ));
                }
                _ => {}
            },
            _ if unnamed => {}
            _ => match labels.get(class as usize) {
                Some(label) if label == name => {}
                Some(label) => {
                    return Some(format!(
                        "  \"{name}\" is class {class} by `label2id` of config.json, and the task's class {class} is \
                         \"{label}\"; the names and their order have to be the head's"
                    ));
                }
                None => {
                    return Some(format!(
                        "  \"{name}\" is class {class} by `label2id` of config.json, the task has {} labels",
                        labels.len()
                    ));
                }
            },
        }
    }
    None
}

/// The error if the class in `architectures` has a head for another kind of task.
pub fn other_head(config: &Map<String, Value>, model: &Model) -> Option<String> {
    let (head, of) = head(&model.task.kind)?;
    let all: Vec<&str> =
        config.get("architectures").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    (!all.is_empty() && !all.iter().any(|a| a.ends_with(head))).then(|| {
        format!(
            "  `architectures` is {} in config.json, so the head in the files is not one for {of}; \
             take the folder of the pretrained model, for which the head is drawn at random",
            all.join(", ")
        )
    })
}

/// The suffix of the transformers classes with the task's head, and what that head classifies; `None` for tasks that
/// generate.
pub fn head(kind: &TaskKind) -> Option<(&'static str, &'static str)> {
    match kind {
        TaskKind::Classification { .. } | TaskKind::Regression { .. } => {
            Some(("ForSequenceClassification", "sequences"))
        }
        TaskKind::TokenClassification { .. } => Some(("ForTokenClassification", "tokens")),
        TaskKind::Generation { .. } | TaskKind::Chat | TaskKind::Text { .. } => None,
    }
}

/// The error if the names in `id2label` are not the task's labels.
fn names_differ(names: &Map<String, Value>, labels: &[String]) -> Option<String> {
    let plain = |name: &Value| name.as_str().map_or_else(|| name.to_string(), String::from);
    let found: Option<Vec<String>> = (0..names.len()).map(|i| Some(plain(names.get(&i.to_string())?))).collect();
    let Some(found) = found else {
        let keys: Vec<&String> = names.keys().collect();
        return Some(format!("  `id2label` in config.json has the keys {keys:?}, which should be 0, 1, …"));
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn label2id_has_to_agree_with_id2label() {
        let labels = ["bad", "good"].map(String::from);
        let differ = |ids: Value, names: Option<Value>| ids_differ(ids.as_object().unwrap(), names.as_ref(), &labels);
        let names = || Some(json!({"0": "bad", "1": "good"}));
        let none = || None;
        for names in [names(), none()] {
            assert_eq!(differ(json!({"bad": 0, "good": 1}), names.clone()), None);
            assert_eq!(differ(json!({"good": "1"}), names.clone()), None);
            for wrong in [json!({"bad": 1, "good": 0}), json!({"bad": 0, "good": 0}), json!({"bad": 1.5})] {
                let line = differ(wrong, names.clone()).expect("it is refused");
                assert!(line.contains("`label2id`"), "{line}");
            }
        }
        assert_eq!(differ(json!({"LABEL_0": 0, "LABEL_1": 1}), None), None);
        assert!(differ(json!({"neutral": 2}), None).expect("a third class").contains("the task has 2 labels"));
    }
}
