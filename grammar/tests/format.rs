//! The formatter is idempotent and lossless, and all shipped files are formatted.

#![allow(clippy::disallowed_methods)] // test cases are files

use std::path::{Path, PathBuf};

use peft_grammar::format;

/// All `.peft` files below a folder of the repository.
fn specs(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "peft") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn squeezed(text: &str) -> String {
    text.chars().filter(|c| !c.is_whitespace()).collect()
}

#[test]
fn shipped_specs_are_formatted() {
    for path in [specs("models"), specs("tests/specs/good")].concat() {
        let text = std::fs::read_to_string(&path).expect("readable");
        let formatted = format("spec", &text).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(text, formatted, "{}", path.display());
    }
}

#[test]
fn formatting_is_idempotent_and_lossless() {
    for path in [specs("models"), specs("tests/specs")].concat() {
        let text = std::fs::read_to_string(&path).expect("readable");
        // A file with syntax errors cannot be formatted.
        let Ok(once) = format("spec", &text) else { continue };
        assert_eq!(squeezed(&once), squeezed(&text), "{}", path.display());
        assert_eq!(format("spec", &once).expect("it still parses"), once, "{}", path.display());
    }
}

#[test]
fn crowded_spec_is_formatted() {
    let crowded = "\n\nimport   backbones.gpt2 // the library's\nmodel=gpt2( layers :2,hidden: 8 *4 )\n\n\n\ntune{\n\n\
        every attention   only 0 .. 1,1{lora( rank:- 2+-x[ : ,0 : 2*n ]) on q ,v\n  }\n    // to the end\n\
        rows 0..3 of\"w\"}\n";
    insta::assert_snapshot!(format("spec", crowded).unwrap_or_else(|e| panic!("{e}")));
}
