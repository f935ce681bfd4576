//! Tokenizers in every form, held against ids of transformers; files that are none; damaged ones.

use std::fs;
use std::path::Path;

use peft_grammar::model::{Task, TaskKind};
use serde_json::Value;
use tempfile::TempDir;

use crate::data::{DataError, Tokenizer};

/// What `tests/interop/tokenizer_fixtures.py` wrote.
fn fixtures() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/tokenizers.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

/// A task that asks nothing of the tokenizer.
fn task(special: &[&str]) -> Task {
    let special = special.iter().map(|t| t.to_string()).collect();
    let kind = TaskKind::Generation { special, template: vec![], target: String::new() };
    Task { name: "t".into(), max_tokens: 64, kind }
}

fn load(path: &Path) -> Result<Tokenizer, DataError> {
    Tokenizer::load(path, &task(&[]), 100_000)
}

/// Why a folder with these files is refused, without its path.
fn refusal(files: &[(&str, &str)]) -> String {
    let folder = folder(files);
    let error = load(folder.path()).err().expect("it is refused").to_string();
    error.replace(&folder.path().display().to_string(), "DIR")
}

fn ids(value: &Value) -> Vec<Vec<i32>> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn every_form_gives_the_ids_of_transformers() {
    let fixtures = fixtures();
    let texts: Vec<&str> = fixtures["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    let mut wrong = vec![];
    for (name, case) in fixtures["cases"].as_object().unwrap() {
        let files: Vec<(&str, String)> = case["files"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(file, content)| {
                let shared = content.as_str().map(|key| fixtures["contents"][key].as_str().unwrap().to_owned());
                (file.as_str(), shared.unwrap_or_else(|| content.to_string()))
            })
            .collect();
        let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (*name, text.as_str())).collect();
        let folder = folder(&files);
        let tokenizer = match load(folder.path()) {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        let mut compare = |what: &str, found: Vec<Vec<i32>>| {
            for ((text, found), expected) in texts.iter().zip(found).zip(ids(&case[what])) {
                if found != expected {
                    wrong.push(format!("{name}, {what}: {text:?} is {found:?}, in transformers {expected:?}"));
                }
            }
        };
        compare("plain", tokenizer.encode(texts.clone(), false).unwrap());
        // GPT-2's tokenizers have no marks here: a template states its own.
        if name.contains("piece") || name.contains("marked") {
            compare("marked", tokenizer.encode(texts.clone(), true).unwrap());
        }
        if tokenizer.vocabulary() as u64 != case["length"] {
            wrong.push(format!("{name}: {} tokens, in transformers {}", tokenizer.vocabulary(), case["length"]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
