//! Specs on disk: the file, the files it imports, and values set from the command line.

use std::fs;
use std::io::{self, Read};
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
    text(fs::File::open(path)).map_err(Failure::file(path))
}

/// Reads an imported file. The checker has put the importing file's folder in front of the path. It is a spec's word
/// that it is read, so it may be nothing that waits or acts when it is opened.
fn import(path: &str) -> Result<String, String> {
    match fs::metadata(path) {
        Ok(found) if !found.is_file() => Err("it is no file".into()),
        _ => text(fs::File::open(path)).map_err(|e| e.to_string()),
    }
}

/// No spec is longer, in bytes.
const LONGEST: u64 = 4 << 20;

fn text(file: io::Result<fs::File>) -> io::Result<String> {
    let mut text = String::new();
    if file?.take(LONGEST + 1).read_to_string(&mut text)? as u64 > LONGEST {
        return Err(io::Error::other(format!("it is longer than {LONGEST} bytes, which no spec is")));
    }
    Ok(text)
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
