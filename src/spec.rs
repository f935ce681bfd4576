//! Specs on disk: the file, the files it imports, and values set from the command line.

use std::fs;
use std::path::{Path, PathBuf};

use peft_grammar::model::Model;

use crate::failure::Failure;

/// Reads and checks a spec.
pub fn load(path: &Path, overrides: &[(String, String)], color: bool) -> Result<Model, Failure> {
    let source = read(path)?;
    let name = path.to_string_lossy();
    peft_grammar::compile_with(&name, &source, overrides, &import)
        .map_err(|diagnostics| Failure::Spec(diagnostics.render(color)))
}

pub fn read(path: &Path) -> Result<String, Failure> {
    if path.is_dir() {
        return Err(Failure::Usage(format!("{}: a directory, where a `.peft` file belongs", path.display())));
    }
    fs::read_to_string(path).map_err(Failure::file(path))
}

/// Reads an imported file. The checker has put the importing file's folder in front of the path.
fn import(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| e.to_string())
}

/// The files a spec imports, each with its path seen from the spec's folder.
pub fn imports(path: &Path) -> Result<Vec<(PathBuf, String)>, Failure> {
    let found = std::cell::RefCell::new(vec![]);
    let folder = path.parent().unwrap_or(Path::new(""));
    let resolver = |path: &str| {
        let text = import(path)?;
        let seen = Path::new(path).strip_prefix(folder).unwrap_or(Path::new(path));
        found.borrow_mut().push((seen.to_path_buf(), text.clone()));
        Ok(text)
    };
    // Only the files are of interest here.
    let _ = peft_grammar::compile_with(&path.to_string_lossy(), &read(path)?, &[], &resolver);
    Ok(found.into_inner())
}

/// `key=value` as `--set` takes it.
pub fn assignment(text: &str) -> Result<(String, String), String> {
    let (key, value) =
        text.split_once('=').ok_or_else(|| format!("`{text}` is no `key=value`, such as `train.steps=20`"))?;
    Ok((key.trim().into(), value.trim().into()))
}
