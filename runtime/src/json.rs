//! Reading text and JSON files from other programs, with messages that say what a file is instead.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::RuntimeError;

/// Prefix of a file that is a pointer of Git's large-file storage (LFS).
pub const LFS_POINTER_PREFIX: &[u8] = b"version https://git-lfs";

/// The message for such a file.
pub const LFS_POINTER_ADVICE: &str =
    "it is a pointer of git's large-file storage (LFS); `git lfs pull` in its folder fetches the file";

/// True if there is something at `path`.
///
/// # Errors
///
/// If it is a symbolic link to nothing, which is not the same as an absent file, or if the file system does not say.
pub fn exists(path: &Path) -> Result<bool, RuntimeError> {
    match fs::metadata(path) {
        Ok(_) => Ok(true),
        Err(e) => match unreadable(path, &e) {
            None => Ok(false),
            Some(why) => Err(RuntimeError::file(path, why)),
        },
    }
}

/// Why a file cannot be read; `None` if there is nothing of its name.
fn unreadable(path: &Path, error: &io::Error) -> Option<String> {
    if error.kind() != io::ErrorKind::NotFound {
        return Some(format!("cannot be read: {error}"));
    }
    let to = fs::read_link(path).ok()?;
    Some(format!("a link to {}, which is not there; fetch it again", to.display()))
}

/// The text of a file, without a byte order mark.
///
/// # Errors
///
/// If the file cannot be read, is an LFS pointer or is not UTF-8.
pub fn text(path: &Path) -> Result<String, RuntimeError> {
    let refused = |why: String| RuntimeError::file(path, why);
    let bytes = fs::read(path)
        .map_err(|e| refused(unreadable(path, &e).unwrap_or_else(|| "no such file or directory".to_owned())))?;
    if bytes.starts_with(LFS_POINTER_PREFIX) {
        return Err(refused(LFS_POINTER_ADVICE.into()));
    }
    let text = String::from_utf8(bytes).map_err(|_| refused("it is not UTF-8; fetch it again".into()))?;
    // Some editors write a byte order mark.
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// The JSON object in a file.
///
/// # Errors
///
/// If the file cannot be read or holds anything else.
pub fn object(path: &Path) -> Result<Map<String, Value>, RuntimeError> {
    match serde_json::from_str(&text(path)?) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(RuntimeError::file(path, "no JSON object; write or fetch it again")),
        Err(e) => Err(RuntimeError::file(path, format!("no JSON ({e}); write or fetch it again"))),
    }
}
