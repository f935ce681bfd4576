//! What `--weights` names: a folder, a name of the Hugging Face hub, or something that is taken for one of them.

use std::path::{Component, Path, PathBuf};

use peft_runtime::RuntimeError;
use peft_runtime::gguf::is_gguf;

use super::RANDOM;
use crate::commands::say;
use crate::failure::Failure;

/// What makes a folder one of safetensors.
const SAFETENSORS: &[&str] = &["model.safetensors", "model.safetensors.index.json"];

/// Other forms of weights by how their names end: what they are, and the mend.
const OTHERS: &[(&str, &str)] = &[
    (
        ".bin",
        "PyTorch's pickled weights, which may run code and are not read here; transformers writes \
         `model.safetensors` where it loads the model and saves it once more by `save_pretrained`",
    ),
    (".bin.index.json", "an index of PyTorch's pickled weights, which may run code and are not read here"),
    (".pt", "PyTorch's pickled weights, which may run code and are not read here"),
    (".pth", "PyTorch's pickled weights, which may run code and are not read here"),
    (".gguf", "weights in llama.cpp's GGUF, which are read where `--weights` names the file itself"),
    (".h5", "TensorFlow's weights, which are not read here; take the checkpoint's `model.safetensors`"),
    (".msgpack", "Flax's weights, which are not read here; take the checkpoint's `model.safetensors`"),
    (".onnx", "an ONNX graph, which is not read here; take the checkpoint that it was made of"),
    (".npz", "NumPy's arrays, which are not read here; take the checkpoint's `model.safetensors`"),
];

/// The folder or the GGUF file that `--weights` means: itself, or the snapshot of a hub's name in the Hugging Face cache. `random` stays
/// what it is.
pub fn resolve(from: &Path) -> Result<PathBuf, Failure> {
    if from == Path::new(RANDOM) {
        return Ok(from.to_path_buf());
    }
    let refused = |why: String| Err(RuntimeError::file(from, why).into());
    if from.is_dir() {
        return match otherwise(from) {
            Some(why) => refused(why),
            None => Ok(from.to_path_buf()),
        };
    }
    if from.exists() {
        if is_gguf(from) {
            return Ok(from.to_path_buf());
        }
        return refused(file(from));
    }
    let Some((name, hub)) = hub_name(from).zip(cache()) else {
        return refused(
            "no such directory; `--weights` takes a Hugging Face model directory, a GGUF file, or `random`".into(),
        );
    };
    match snapshot(&hub, &name) {
        Ok(Some(folder)) => {
            if let Some(why) = otherwise(&folder) {
                return Err(RuntimeError::file(folder, why).into());
            }
            say(&format!("weights: {name} of the Hugging Face cache, {}", folder.display()));
            Ok(folder)
        }
        Ok(None) => {
            let near = near(&hub, &name);
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

/// The folder of a model's name in the Hugging Face cache, where the path is no file or folder and the cache has it.
pub fn named(path: &Path) -> Option<PathBuf> {
    if path.symlink_metadata().is_ok() {
        return None;
    }
    cached(&hub_name(path)?)
}

/// The folder of a model's name in the Hugging Face cache, where the cache has it.
pub fn cached(name: &str) -> Option<PathBuf> {
    snapshot(&cache()?, name).ok().flatten()
}

/// What a folder is that holds no weights in safetensors; `None` where it does, or where nothing is known of it.
fn otherwise(folder: &Path) -> Option<String> {
    // What is wrong with one that is there is told where it is read.
    if SAFETENSORS.iter().any(|name| folder.join(name).symlink_metadata().is_ok()) {
        return None;
    }
    let mut names: Vec<String> =
        std::fs::read_dir(folder).ok()?.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    if let Some(name) = names.iter().find(|n| n.starts_with("adapter")) {
        let path = folder.display();
        return Some(format!(
            "it holds an adapter (`{name}`), not a model: `--adapter {path}`, and the model by `--weights`"
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
    if let Some(why) = OTHERS.iter().find_map(other) {
        return Some(why);
    }
    let folders: Vec<&String> =
        names.iter().filter(|n| SAFETENSORS.iter().any(|s| folder.join(n).join(s).is_file())).collect();
    match folders.last() {
        Some(inner) => Some(format!("it holds no `model.safetensors`; `{}` does", folder.join(inner).display())),
        None => Some("it holds no `model.safetensors`".into()),
    }
}

/// What a file is that was named in place of a folder.
fn file(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = format!("`--weights` takes the folder: `--weights {}`", parent.display());
    if SAFETENSORS.contains(&&*name) || name == "config.json" {
        return format!("a file; {folder}");
    }
    match OTHERS.iter().find(|(ending, _)| name.ends_with(ending)) {
        Some((_, what)) => what.to_string(),
        None => format!("a file, where a folder with `config.json` and `model.safetensors` was expected; {folder}"),
    }
}

/// `NAME` or `ORGANISATION/NAME`, as the hub has them.
fn hub_name(path: &Path) -> Option<String> {
    let text = path.to_str()?;
    let plain = |part: Component| matches!(part, Component::Normal(_));
    let spelt = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    let parts = path.components().count();
    (path.components().all(plain) && parts <= 2 && text.chars().all(spelt) && !text.ends_with('/')).then(|| text.into())
}

/// Where downloads of the hub lie: `HF_HUB_CACHE`, `HF_HOME/hub`, `~/.cache/huggingface/hub`.
fn cache() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(hub) = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")) {
        return Some(hub);
    }
    let home = set("HF_HOME").or_else(|| Some(set("XDG_CACHE_HOME")?.join("huggingface")));
    let home = home.or_else(|| Some(set("HOME")?.join(".cache/huggingface")))?;
    Some(home.join("hub"))
}

/// The snapshot of a model that `main` stands for; `None` where the cache does not have the model. The error says what
/// is wrong with what it has.
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
            "`{name}` is not whole in the Hugging Face cache: there is no {}; `hf download {name}` fetches it again",
            folder.display()
        )),
    }
}

/// A model of the cache that has the same name with another organisation.
fn near(hub: &Path, name: &str) -> Option<String> {
    let last = name.rsplit('/').next()?;
    let entries = std::fs::read_dir(hub).ok()?;
    let names = entries
        .filter_map(|e| Some(e.ok()?.file_name().into_string().ok()?.strip_prefix("models--")?.replace("--", "/")));
    let mut same: Vec<String> = names.filter(|n| n.rsplit('/').next() == Some(last)).collect();
    same.sort();
    same.into_iter().next()
}
