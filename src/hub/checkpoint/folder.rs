//! Resolves `--weights`: a model folder, a GGUF file, or a name of the Hugging Face hub. Other paths are refused with
//! what they are.

use std::path::{Component, Path, PathBuf};

use peft_runtime::RuntimeError;
use peft_runtime::gguf::is_gguf;

use super::RANDOM;
use crate::commands::say;
use crate::failure::Failure;

/// Files that a folder with safetensors weights holds one of.
const SAFETENSORS: &[&str] = &["model.safetensors", "model.safetensors.index.json"];

/// Other formats of weights, by the end of the file's name: what they are, and what to use instead.
const OTHER_FORMATS: &[(&str, &str)] = &[
    (
        ".bin",
        "PyTorch's pickled weights, which may run code and are not read here; transformers writes \
         `model.safetensors` where it loads the model and saves it once more by `save_pretrained`",
    ),
    (".bin.index.json", "an index of PyTorch's pickled weights, which may run code and are not read here"),
    (".pt", "PyTorch's pickled weights, which may run code and are not read here"),
    (".pth", "PyTorch's pickled weights, which may run code and are not read here"),
    (".gguf", "weights in llama.cpp's GGUF, which are read if `--weights` names the file itself"),
    (".h5", "TensorFlow's weights, which are not read here; take the checkpoint's `model.safetensors`"),
    (".msgpack", "Flax's weights, which are not read here; take the checkpoint's `model.safetensors`"),
    (".onnx", "an ONNX graph, which is not read here; take the checkpoint that it was converted from"),
    (".npz", "NumPy's arrays, which are not read here; take the checkpoint's `model.safetensors`"),
];

/// The model folder or GGUF file that `--weights` names: the path itself, or the cached snapshot of a name of the
/// Hugging Face hub. `random` is returned unchanged.
///
/// # Errors
///
/// The path is not a checkpoint that can be read, or the cache does not hold the model.
pub fn resolve(from: &Path) -> Result<PathBuf, Failure> {
    if from == Path::new(RANDOM) {
        return Ok(from.to_path_buf());
    }
    let refused = |why: String| Err(RuntimeError::file(from, why).into());
    if from.is_dir() {
        return match why_no_safetensors(from) {
            Some(why) => refused(why),
            None => Ok(from.to_path_buf()),
        };
    }
    if from.exists() {
        if is_gguf(from) {
            return Ok(from.to_path_buf());
        }
        return refused(why_not_a_folder(from));
    }
    let Some((name, hub)) = hub_name(from).zip(hub_cache()) else {
        return refused(
            "no such directory; `--weights` takes a Hugging Face model directory, a GGUF file, or `random`".into(),
        );
    };
    match snapshot(&hub, &name) {
        Ok(Some(folder)) => {
            if let Some(why) = why_no_safetensors(&folder) {
                return Err(RuntimeError::file(folder, why).into());
            }
            say(&format!("weights: {name} of the Hugging Face cache, {}", folder.display()));
            Ok(folder)
        }
        Ok(None) => {
            let near = same_name_elsewhere(&hub, &name);
            let near = near.map_or(String::new(), |near| format!("; the cache has `{near}`"));
            refused(format!(
                "no such directory, and no model of this name in the Hugging Face cache ({}){near}; \
                 `hf download {name}` fetches one, or name a directory",
                hub.display()
            ))
        }
        Err(why) => refused(format!("no such directory, and {why}")),
    }
}

/// The cached folder of a model of the Hugging Face hub, if no file or folder has the path and the cache holds the
/// model.
pub fn resolve_cached(path: &Path) -> Option<PathBuf> {
    if path.symlink_metadata().is_ok() {
        return None;
    }
    cached(&hub_name(path)?)
}

/// The folder of a model in the Hugging Face cache; `None` if the cache does not hold it.
pub fn cached(name: &str) -> Option<PathBuf> {
    snapshot(&hub_cache()?, name).ok().flatten()
}

/// Why a folder holds no safetensors weights, and what it holds instead; `None` if it does hold them, or cannot be
/// read.
fn why_no_safetensors(folder: &Path) -> Option<String> {
    // Errors in an existing file are reported when it is read.
    if SAFETENSORS.iter().any(|name| folder.join(name).symlink_metadata().is_ok()) {
        return None;
    }
    let mut names: Vec<String> =
        std::fs::read_dir(folder).ok()?.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    if let Some(name) = names.iter().find(|n| n.starts_with("adapter")) {
        let path = folder.display();
        return Some(format!(
            "it holds an adapter (`{name}`), not a model: name it with `--adapter {path}`, and the model with \
             `--weights`"
        ));
    }
    if let Some(name) = names.iter().find(|n| n.ends_with(".safetensors")) {
        return Some(match name.contains("-of-") {
            true => format!(
                "it holds `{name}` without `model.safetensors.index.json`, which lists all files: fetch it, too"
            ),
            false => {
                format!("it holds `{name}`; weights are read from `model.safetensors`: rename it if it is the model's")
            }
        });
    }
    let other = |(ending, what): &(&str, &str)| {
        let name = names.iter().find(|n| n.ends_with(ending))?;
        Some(format!("it holds `{name}`: {what}"))
    };
    if let Some(why) = OTHER_FORMATS.iter().find_map(other) {
        return Some(why);
    }
    let folders: Vec<&String> =
        names.iter().filter(|n| SAFETENSORS.iter().any(|s| folder.join(n).join(s).is_file())).collect();
    match folders.last() {
        Some(inner) => Some(format!("it holds no `model.safetensors`; `{}` does", folder.join(inner).display())),
        None => Some("it holds no `model.safetensors`".into()),
    }
}

/// Why a file cannot be used as `--weights`.
fn why_not_a_folder(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = format!("`--weights` takes the folder: `--weights {}`", parent.display());
    if SAFETENSORS.contains(&&*name) || name == "config.json" {
        return format!("it is a file; {folder}");
    }
    match OTHER_FORMATS.iter().find(|(ending, _)| name.ends_with(ending)) {
        Some((_, what)) => what.to_string(),
        None => {
            format!("it is a file, where a folder with `config.json` and `model.safetensors` was expected; {folder}")
        }
    }
}

/// The path as a name of the hub, `NAME` or `ORGANISATION/NAME`; `None` if it is not of that form.
fn hub_name(path: &Path) -> Option<String> {
    let text = path.to_str()?;
    let plain = |part: Component| matches!(part, Component::Normal(_));
    let spelt = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    let parts = path.components().count();
    (path.components().all(plain) && parts <= 2 && text.chars().all(spelt) && !text.ends_with('/')).then(|| text.into())
}

/// The folder of the Hugging Face cache: `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub`.
fn hub_cache() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(hub) = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")) {
        return Some(hub);
    }
    let home = set("HF_HOME").or_else(|| Some(set("XDG_CACHE_HOME")?.join("huggingface")));
    let home = home.or_else(|| Some(set("HOME")?.join(".cache/huggingface")))?;
    Some(home.join("hub"))
}

/// The snapshot of a model's revision `main` in the cache; `None` if the cache does not hold the model. The error
/// describes an incomplete model.
fn snapshot(hub: &Path, name: &str) -> Result<Option<PathBuf>, String> {
    let model = hub.join(format!("models--{}", name.replace('/', "--")));
    if !model.is_dir() {
        return Ok(None);
    }
    let reference = model.join("refs/main");
    let hash = std::fs::read_to_string(&reference)
        .map_err(|e| format!("the Hugging Face cache has `{name}` without a `main` ({}: {e})", reference.display()))?;
    let hash = hash.trim();
    let folder = model.join("snapshots").join(hash);
    let plain = Path::new(hash).file_name().is_some_and(|name| name == hash);
    match plain && folder.is_dir() {
        true => Ok(Some(folder)),
        false => Err(format!(
            "`{name}` is incomplete in the Hugging Face cache: {} is missing; `hf download {name}` fetches it again",
            folder.display()
        )),
    }
}

/// A model in the cache with the same name and another organisation.
fn same_name_elsewhere(hub: &Path, name: &str) -> Option<String> {
    let last = name.rsplit('/').next()?;
    let entries = std::fs::read_dir(hub).ok()?;
    let names = entries
        .filter_map(|e| Some(e.ok()?.file_name().into_string().ok()?.strip_prefix("models--")?.replace("--", "/")));
    let mut same: Vec<String> = names.filter(|n| n.rsplit('/').next() == Some(last)).collect();
    same.sort();
    same.into_iter().next()
}
