//! Text and JSON from outside: what a file is in place of them is said in words.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::RuntimeError;

/// How a file begins that stands for one in the large-file storage of git.
pub const POINTER: &[u8] = b"version https://git-lfs";

/// What such a file is, in words.
pub const POINTS: &str =
    "it is a pointer of git's large-file storage (LFS); `git lfs pull` in its folder fetches the file";

/// Something of this name is in the folder. A link whose target is gone is an error, for it is no file that was left
/// out, and so is all else whose being there cannot be told.
pub fn there(path: &Path) -> Result<bool, RuntimeError> {
    match fs::metadata(path) {
        Ok(_) => Ok(true),
        Err(e) => match unreadable(path, &e) {
            None => Ok(false),
            Some(why) => Err(RuntimeError::file(path, why)),
        },
    }
}

/// Why a file cannot be read; `None` if nothing of its name is there.
fn unreadable(path: &Path, error: &io::Error) -> Option<String> {
    if error.kind() != io::ErrorKind::NotFound {
        return Some(format!("cannot be read: {error}"));
    }
    let to = fs::read_link(path).ok()?;
    Some(format!("a link to {}, which is not there; fetch it again", to.display()))
}

/// A file's text, without a byte order mark.
pub fn text(path: &Path) -> Result<String, RuntimeError> {
    let refused = |why: String| RuntimeError::file(path, why);
    let bytes = fs::read(path)
        .map_err(|e| refused(unreadable(path, &e).unwrap_or_else(|| "no such file or directory".to_owned())))?;
    if bytes.starts_with(POINTER) {
        return Err(refused(POINTS.into()));
    }
    let text = String::from_utf8(bytes).map_err(|_| refused("it is not UTF-8; fetch it again".into()))?;
    // Some editors put a byte order mark before what they save.
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// The one JSON object that a file holds.
pub fn object(path: &Path) -> Result<Map<String, Value>, RuntimeError> {
    match serde_json::from_str(&text(path)?) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(RuntimeError::file(path, "no JSON object; write or fetch it again")),
        Err(e) => Err(RuntimeError::file(path, format!("no JSON ({e}); write or fetch it again"))),
    }
}
