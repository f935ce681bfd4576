//! Test cases in folders. Specs in `tests/specs/good` check without errors. Specs in `tests/specs/bad` fail with
//! exactly the errors that comments state below the lines they occur on:
//!
//! ```text
//!   every attentoin { lora(rank: 4) on q }
//!   //~ ERROR: `gpt2` has no site `attentoin`
//!   //~ HINT: did you mean `attention`?
//! ```
//!
//! `PEFTC_BLESS=1 cargo test -p peft-grammar --test specs` updates the comments.

#![allow(clippy::disallowed_methods)] // test cases are files

use std::path::{Path, PathBuf};

use peft_grammar::{Diagnostics, check};

const MARK: &str = "//~ ";

/// All files below a folder of `tests/specs`; each must be a spec.
fn cases(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/specs").join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            assert!(path.extension().is_some_and(|e| e == "peft"), "{} is no case", path.display());
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Reads the imports of a case from its folder.
fn import(case: &Path) -> impl Fn(&str) -> Result<String, String> {
    let folder = case.parent().expect("a folder").to_owned();
    move |path| std::fs::read_to_string(folder.join(path)).map_err(|_| "no such file".to_owned())
}

/// The source with a comment for each error below the line on which it occurs.
fn annotated(source: &str, errors: &Diagnostics) -> String {
    let mut lines: Vec<String> = source.lines().map(str::to_owned).collect();
    let mut notes: Vec<(usize, String)> = Vec::new();
    for error in &errors.list {
        assert_eq!(error.span.file.0, 0, "an error lies outside of the case: {errors}");
        let (line, _) = errors.sources.get(error.span.file).position(error.span.start);
        let line = (line as usize).min(lines.len());
        let indent: String = lines[line - 1].chars().take_while(|c| *c == ' ').collect();
        notes.push((line, format!("{indent}{MARK}ERROR: {}", error.title)));
        notes.extend(error.hint.iter().map(|hint| (line, format!("{indent}{MARK}HINT: {hint}"))));
    }
    for (line, note) in notes.into_iter().rev() {
        lines.insert(line, note);
    }
    lines.join("\n") + "\n"
}

#[test]
fn good_specs_check() {
    let cases = cases("good");
    for case in &cases {
        let text = std::fs::read_to_string(case).expect("readable");
        let name = case.file_name().expect("a name").to_string_lossy().into_owned();
        let model = check(&name, &text, &import(case)).unwrap_or_else(|e| panic!("{}:\n{e}", case.display()));
        let again = peft_grammar::model::Model::from_json(&model.to_json()).expect("it reads back");
        assert!(again == model, "{} does not read back", case.display());
    }
    assert!(cases.len() >= 8, "good specs are missing");
}

#[test]
fn bad_specs_report_the_annotated_errors() {
    let bless = std::env::var_os("PEFTC_BLESS").is_some();
    let cases = cases("bad");
    let mut wrong = String::new();
    for case in &cases {
        let written = std::fs::read_to_string(case).expect("readable");
        let is_source = |line: &&str| !line.trim_start().starts_with(MARK);
        let source: String = written.lines().filter(is_source).flat_map(|line| [line, "\n"]).collect();
        let found = match check("spec.peft", &source, &import(case)) {
            Ok(_) => format!("{source}(this spec is fine)\n"),
            Err(errors) => annotated(&source, &errors),
        };
        if found != written {
            if bless {
                std::fs::write(case, &found).expect("writable");
            } else {
                wrong += &format!("{}: the checker says\n{found}\n", case.display());
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(cases.len() >= 60, "bad specs are missing");
}
