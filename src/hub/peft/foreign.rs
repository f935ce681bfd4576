//! Adapters of other programs, and what else is taken for one: each is named as what it is, with a way to PEFT's form.

use std::path::Path;

use peft_runtime::RuntimeError;
use serde_json::{Map, Value};

use super::{CONFIG, MODEL};

/// Files by which a folder, or the program that wrote it, is known, and the words for it.
const FILES: &[(&str, &str)] = &[
    (
        "adapter_model.bin",
        "holds `adapter_model.bin`, which is not read here, since a pickle can run any code: let PEFT save it once more, \
         by `PeftModel.from_pretrained(base, DIR).save_pretrained(DIR)`, which writes `adapter_model.safetensors`",
    ),
    ("adapters.safetensors", MLX),
    ("adapters.npz", MLX),
    ("pytorch_adapter.bin", HUB),
    ("pytorch_model_head.bin", HUB),
    ("pytorch_lora_weights.safetensors", DIFFUSERS),
    ("pytorch_lora_weights.bin", DIFFUSERS),
];

/// Names the files of an adapter that is in several.
const INDEX: &str = "adapter_model.safetensors.index.json";

const MLX: &str = "is an adapter of mlx-lm, whose `lora_a` and `lora_b` are PEFT's transposed: fuse it into its base model \
     by `mlx_lm.fuse` and use that as `--weights`";
const HUB: &str = "is an adapter of the library `adapters` (AdapterHub), whose modules PEFT does not have: merge it into its \
     base model there, by `model.merge_adapter(name)`, and use the saved model as `--weights`";
const DIFFUSERS: &str =
    "is LoRA for an image model (kohya's or diffusers' names): it belongs to no language model that peftc has";
const WHOLE: &str = "is a whole model and no adapter: it is what `--weights` takes";

fn said(path: &Path, words: &str) -> RuntimeError {
    RuntimeError::file(path, words)
}

/// Refuses a folder whose `adapter_config.json` is another program's, or whose tensors are not there.
pub fn check_folder(dir: &Path, config: &Map<String, Value>) -> Result<(), RuntimeError> {
    let path = dir.join(CONFIG);
    if config.contains_key("fine_tune_type") || config.contains_key("lora_parameters") {
        return Err(said(dir, MLX));
    }
    let architecture = config.get("config").and_then(|c| c.as_object()).is_some();
    if !config.contains_key("peft_type") && (architecture || config.contains_key("config_id")) {
        return Err(said(dir, HUB));
    }
    if !config.contains_key("peft_type") {
        return Err(said(&path, "has no `peft_type`: it is no configuration that PEFT wrote"));
    }
    match dir.join(MODEL).is_file() {
        true => Ok(()),
        false if dir.join(INDEX).is_file() => Err(said(
            dir,
            &format!(
                "holds an adapter in several files (`{INDEX}`), which are not read here: let PEFT save it once more in \
                 one, by `save_pretrained(DIR)`"
            ),
        )),
        false => Err(by_files(dir).unwrap_or_else(|| said(dir, &format!("holds `{CONFIG}`, but no `{MODEL}`")))),
    }
}

/// What a folder is by the files in it.
fn by_files(dir: &Path) -> Option<RuntimeError> {
    let found = FILES.iter().find(|(file, _)| dir.join(file).is_file());
    found.map(|(_, words)| said(dir, words))
}

/// What a path is that is neither our own adapter nor PEFT's folder; `None` if nothing is known of it.
pub fn recognised(path: &Path) -> Option<RuntimeError> {
    if !path.exists() {
        return Some(said(path, "no such file or directory"));
    }
    if path.is_dir() {
        return Some(of_folder(path));
    }
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    match extension {
        "bin" | "pt" | "pth" | "ckpt" => Some(said(
            path,
            "is a pickle, which is not read here, since it can run any code: let PEFT save the adapter once more, by \
             `save_pretrained(DIR)`, and name the folder",
        )),
        "npz" => Some(said(path, MLX)),
        "gguf" => Some(said(path, "is of llama.cpp: name the folder of PEFT's that it was made of")),
        "json" => Some(said(path, "is a configuration: name the folder that it lies in")),
        _ => None,
    }
}

fn of_folder(dir: &Path) -> RuntimeError {
    if dir.join(MODEL).is_file() {
        return said(
            dir,
            &format!(
                "holds `{MODEL}` without `{CONFIG}`, which says how its tensors are scaled: copy that file from where \
                 the adapter was saved"
            ),
        );
    }
    if let Some(known) = by_files(dir) {
        return known;
    }
    if let Some(checkpoint) = latest_checkpoint(dir) {
        return said(dir, &format!("is a Trainer's folder: name one of its checkpoints, such as `{checkpoint}`"));
    }
    let whole =
        ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];
    if whole.iter().any(|file| dir.join(file).is_file()) {
        return said(dir, WHOLE);
    }
    let names = std::fs::read_dir(dir).into_iter().flatten().filter_map(|e| e.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names.truncate(6);
    let found = if names.is_empty() { "it is empty".to_owned() } else { format!("it holds {}", names.join(", ")) };
    said(dir, &format!("holds no adapter, neither `adapter.safetensors` nor `{CONFIG}`: {found}"))
}

/// The last of a Trainer's checkpoints in the folder.
fn latest_checkpoint(dir: &Path) -> Option<String> {
    let entries = std::fs::read_dir(dir).ok()?.filter_map(|e| e.ok()).filter(|e| e.path().join(CONFIG).is_file());
    let step = |e: std::fs::DirEntry| {
        let step: u64 = e.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok()?;
        Some((step, e.path().display().to_string()))
    };
    entries.filter_map(step).max().map(|(_, path)| path)
}

/// Refuses a file whose tensors have another program's names.
pub fn check_names<'a>(path: &Path, names: impl Iterator<Item = &'a String>) -> Result<(), RuntimeError> {
    for name in names {
        let last = name.rsplit('.').next().unwrap_or(name);
        if ["lora_unet", "lora_te", "unet.", "text_encoder."].iter().any(|p| name.starts_with(p))
            || name.contains("lora_down")
            || name.contains("lora.down")
        {
            return Err(said(path, DIFFUSERS));
        }
        if matches!(last, "lora_a" | "lora_b") {
            return Err(said(path, MLX));
        }
    }
    Ok(())
}

/// What a file of tensors is that does not say that it is ours; `frozen` are names of the backbone that do not train.
pub fn check_own(path: &Path, names: &[&String], frozen: impl Fn(&str) -> bool) -> Result<(), RuntimeError> {
    check_names(path, names.iter().copied())?;
    let of_peft = |n: &&&String| n.starts_with("base_model.") || n.contains(".lora_A.") || n.ends_with(".ia3_l");
    if names.iter().any(|n| of_peft(&n)) {
        return Err(said(path, &format!("is PEFT's: name the folder, in which `{CONFIG}` lies beside it")));
    }
    match names.iter().any(|n| frozen(n)) {
        true => Err(said(path, WHOLE)),
        false => Ok(()),
    }
}
