//! Reads specs from disk: the file, the files that it imports, and the values that `--set` changes.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use peft_grammar::model::Model;

use crate::failure::Failure;

/// Reads and checks the spec at `path` with the values `overrides` set. `color`: diagnostics are rendered with colour.
///
/// # Errors
///
/// [`Failure::Spec`] if the spec does not check, [`Failure::File`] or [`Failure::Usage`] if it cannot be read.
pub fn load(path: &Path, overrides: &[(String, String)], color: bool) -> Result<Model, Failure> {
    let source = read(path)?;
    let name = path.to_string_lossy();
    peft_grammar::compile_with(&name, &source, overrides, &import)
        .map_err(|diagnostics| Failure::Spec(diagnostics.render(color)))
}

/// Reads the text of the spec at `path`.
///
/// # Errors
///
/// The path is a folder, the file cannot be read, or it is longer than `MAX_SPEC_BYTES`.
pub fn read(path: &Path) -> Result<String, Failure> {
    if path.is_dir() {
        return Err(Failure::Usage(format!("{}: a directory, where a `.peft` file belongs", path.display())));
    }
    read_limited(fs::File::open(path)).map_err(Failure::file(path))
}

/// Reads an imported file. The checker has put the importing file's folder in front of the path. The path comes from
/// the spec, so only a plain file is opened: opening a pipe or a device may block or have an effect.
fn import(path: &str) -> Result<String, String> {
    match fs::metadata(path) {
        Ok(found) if !found.is_file() => Err("it is not a plain file".into()),
        _ => read_limited(fs::File::open(path)).map_err(|e| e.to_string()),
    }
}

/// The largest spec that is read, in bytes (4 MiB), so that a wrong path does not fill the memory.
const MAX_SPEC_BYTES: u64 = 4 << 20;

/// The text of `file`, refused if it is longer than [`MAX_SPEC_BYTES`].
fn read_limited(file: io::Result<fs::File>) -> io::Result<String> {
    let mut text = String::new();
    if file?.take(MAX_SPEC_BYTES + 1).read_to_string(&mut text)? as u64 > MAX_SPEC_BYTES {
        return Err(io::Error::other(format!("it is longer than {MAX_SPEC_BYTES} bytes, the limit for a spec")));
    }
    Ok(text)
}

/// The files that the spec at `path` imports: each with its path relative to the spec's folder, and its text.
///
/// # Errors
///
/// The spec itself cannot be read.
pub fn imports(path: &Path) -> Result<Vec<(PathBuf, String)>, Failure> {
    let found = std::cell::RefCell::new(vec![]);
    let folder = path.parent().unwrap_or(Path::new(""));
    let resolver = |path: &str| {
        let text = import(path)?;
        let seen = Path::new(path).strip_prefix(folder).unwrap_or(Path::new(path));
        found.borrow_mut().push((seen.to_path_buf(), text.clone()));
        Ok(text)
    };
    // The check runs only for the imports that it resolves; its diagnostics are reported elsewhere.
    let _ = peft_grammar::compile_with(&path.to_string_lossy(), &read(path)?, &[], &resolver);
    Ok(found.into_inner())
}

/// Splits the `key=value` of a `--set` option into its two parts.
///
/// # Errors
///
/// The text has no `=`.
pub fn assignment(text: &str) -> Result<(String, String), String> {
    let (key, value) = text
        .split_once('=')
        .ok_or_else(|| format!("`{text}` is not of the form `key=value`, such as `train.steps=20`"))?;
    Ok((key.trim().into(), value.trim().into()))
}
