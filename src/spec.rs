//! Specs on disk: the file, the files it imports, and values set from the command line.

use std::fs;
use std::path::Path;

use peft_grammar::model::Model;

use crate::failure::Failure;

/// Reads and checks a spec.
pub fn load(path: &Path, overrides: &[(String, String)], color: bool) -> Result<Model, Failure> {
    let source = read(path)?;
    let name = path.to_string_lossy();
    let resolver = resolver(path);
    peft_grammar::compile_with(&name, &source, overrides, &resolver)
        .map_err(|diagnostics| Failure::Spec(diagnostics.render(color)))
}

pub fn read(path: &Path) -> Result<String, Failure> {
    if path.is_dir() {
        return Err(Failure::Usage(format!("{}: a directory, where a `.peft` file belongs", path.display())));
    }
    fs::read_to_string(path).map_err(Failure::file(path))
}

/// Imports stand beside the spec.
pub fn resolver(path: &Path) -> impl Fn(&str) -> Result<String, String> + use<> {
    let folder = path.parent().map(Path::to_path_buf).unwrap_or_default();
    move |import| {
        let file = folder.join(import);
        fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))
    }
}

/// The files a spec imports, with their paths seen from it.
pub fn imports(path: &Path) -> Result<Vec<(String, String)>, Failure> {
    let found = std::cell::RefCell::new(vec![]);
    let read = resolver(path);
    let resolver = |import: &str| {
        let text = read(import)?;
        found.borrow_mut().push((import.to_owned(), text.clone()));
        Ok(text)
    };
    // Only the files are of interest here.
    let _ = peft_grammar::compile_with("", &self::read(path)?, &[], &resolver);
    Ok(found.into_inner())
}

/// `key=value` as `--set` takes it.
pub fn assignment(text: &str) -> Result<(String, String), String> {
    let (key, value) =
        text.split_once('=').ok_or_else(|| format!("`{text}` is no `key=value`, such as `train.steps=20`"))?;
    Ok((key.trim().into(), value.trim().into()))
}
