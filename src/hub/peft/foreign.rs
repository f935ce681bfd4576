//! Recognises adapters of other programs, and other files that are mistaken for adapters. The errors name what they
//! are, and how to get an adapter in PEFT's format.

use std::path::Path;

use peft_runtime::RuntimeError;
use serde_json::{Map, Value};

use super::{CONFIG, MODEL};

/// Files that identify a folder or the program that wrote it, and the message for it.
const FILES: &[(&str, &str)] = &[
    (
        "adapter_model.bin",
        "holds `adapter_model.bin`, which is not read here, since a pickle can run any code: let PEFT save it once \
         more, by `PeftModel.from_pretrained(base, DIR).save_pretrained(DIR)`, which writes \
         `adapter_model.safetensors`",
    ),
    ("adapters.safetensors", MLX),
    ("adapters.npz", MLX),
    ("pytorch_adapter.bin", ADAPTER_HUB),
    ("pytorch_model_head.bin", ADAPTER_HUB),
    ("pytorch_lora_weights.safetensors", DIFFUSERS),
    ("pytorch_lora_weights.bin", DIFFUSERS),
];

/// The index of an adapter that is split into several files.
const INDEX: &str = "adapter_model.safetensors.index.json";

const MLX: &str = "is an adapter of mlx-lm, whose `lora_a` and `lora_b` are PEFT's transposed: fuse it into its base \
                   model by `mlx_lm.fuse` and use that as `--weights`";
const ADAPTER_HUB: &str = "is an adapter of the library `adapters` (AdapterHub), whose modules PEFT does not have: \
                           merge it into its base model there, by `model.merge_adapter(name)`, and use the saved \
                           model as `--weights`";
const DIFFUSERS: &str =
    "is LoRA for an image model (kohya's or diffusers' names): it belongs to no language model that peftc has";
const WHOLE_MODEL: &str = "is a whole model and not an adapter: name it with `--weights`";

/// An error about a path.
fn refusal(path: &Path, words: &str) -> RuntimeError {
    RuntimeError::file(path, words)
}

/// Checks that PEFT wrote the folder's `adapter_config.json`, and that the tensors are in one file.
///
/// # Errors
///
/// What the folder is instead.
pub fn check_folder(dir: &Path, config: &Map<String, Value>) -> Result<(), RuntimeError> {
    let path = dir.join(CONFIG);
    if config.contains_key("fine_tune_type") || config.contains_key("lora_parameters") {
        return Err(refusal(dir, MLX));
    }
    let architecture = config.get("config").and_then(|c| c.as_object()).is_some();
    if !config.contains_key("peft_type") && (architecture || config.contains_key("config_id")) {
        return Err(refusal(dir, ADAPTER_HUB));
    }
    if !config.contains_key("peft_type") {
        return Err(refusal(&path, "has no `peft_type`: PEFT did not write this configuration"));
    }
    match dir.join(MODEL).is_file() {
        true => Ok(()),
        false if dir.join(INDEX).is_file() => Err(refusal(
            dir,
            &format!(
                "holds an adapter in several files (`{INDEX}`), which are not read here: let PEFT save it once more in \
                 one, by `save_pretrained(DIR)`"
            ),
        )),
        false => {
            Err(identify_by_files(dir).unwrap_or_else(|| refusal(dir, &format!("holds `{CONFIG}`, but no `{MODEL}`"))))
        }
    }
}

/// The message for a folder that holds one of [`FILES`].
fn identify_by_files(dir: &Path) -> Option<RuntimeError> {
    let found = FILES.iter().find(|(file, _)| dir.join(file).is_file());
    found.map(|(_, words)| refusal(dir, words))
}

/// What a path is that is neither an adapter of peftc nor a folder of PEFT; `None` if it is not recognised.
pub fn identify(path: &Path) -> Option<RuntimeError> {
    if !path.exists() {
        return Some(refusal(path, "no such file or directory"));
    }
    if path.is_dir() {
        return Some(identify_folder(path));
    }
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    match extension {
        "bin" | "pt" | "pth" | "ckpt" => Some(refusal(
            path,
            "is a pickle, which is not read here, since it can run any code: let PEFT save the adapter once more, by \
             `save_pretrained(DIR)`, and name the folder",
        )),
        "npz" => Some(refusal(path, MLX)),
        "gguf" => Some(refusal(path, "is an adapter of llama.cpp: name PEFT's folder that it was converted from")),
        "json" => Some(refusal(path, "is a configuration: name its folder")),
        _ => None,
    }
}

/// What a folder is that holds neither an adapter of peftc nor one of PEFT.
fn identify_folder(dir: &Path) -> RuntimeError {
    if dir.join(MODEL).is_file() {
        return refusal(
            dir,
            &format!(
                "holds `{MODEL}` without `{CONFIG}`, which says how its tensors are scaled: copy that file from where \
                 the adapter was saved"
            ),
        );
    }
    if let Some(known) = identify_by_files(dir) {
        return known;
    }
    if let Some(checkpoint) = latest_checkpoint(dir) {
        return refusal(dir, &format!("is a Trainer's folder: name one of its checkpoints, such as `{checkpoint}`"));
    }
    let whole =
        ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];
    if whole.iter().any(|file| dir.join(file).is_file()) {
        return refusal(dir, WHOLE_MODEL);
    }
    let names = std::fs::read_dir(dir).into_iter().flatten().filter_map(|e| e.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names.truncate(6);
    let found = if names.is_empty() { "it is empty".to_owned() } else { format!("it holds {}", names.join(", ")) };
    refusal(dir, &format!("holds no adapter, neither `adapter.safetensors` nor `{CONFIG}`: {found}"))
}

/// The last checkpoint of transformers' Trainer in the folder.
fn latest_checkpoint(dir: &Path) -> Option<String> {
    let entries = std::fs::read_dir(dir).ok()?.filter_map(|e| e.ok()).filter(|e| e.path().join(CONFIG).is_file());
    let step = |e: std::fs::DirEntry| {
        let step: u64 = e.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok()?;
        Some((step, e.path().display().to_string()))
    };
    entries.filter_map(step).max().map(|(_, path)| path)
}

/// Checks that the names of the tensors are not another program's.
///
/// # Errors
///
/// Which program's they are.
pub fn check_names<'a>(path: &Path, names: impl Iterator<Item = &'a String>) -> Result<(), RuntimeError> {
    for name in names {
        let last = name.rsplit('.').next().unwrap_or(name);
        if ["lora_unet", "lora_te", "unet.", "text_encoder."].iter().any(|p| name.starts_with(p))
            || name.contains("lora_down")
            || name.contains("lora.down")
        {
            return Err(refusal(path, DIFFUSERS));
        }
        if matches!(last, "lora_a" | "lora_b") {
            return Err(refusal(path, MLX));
        }
    }
    Ok(())
}

/// Checks a file of tensors that is not marked as peftc's own. `frozen` returns whether a name is a frozen tensor of
/// the backbone.
///
/// # Errors
///
/// What the file is instead: another program's or PEFT's adapter, or a whole model.
pub fn check_own(path: &Path, names: &[&String], frozen: impl Fn(&str) -> bool) -> Result<(), RuntimeError> {
    check_names(path, names.iter().copied())?;
    let of_peft = |n: &&&String| n.starts_with("base_model.") || n.contains(".lora_A.") || n.ends_with(".ia3_l");
    if names.iter().any(|n| of_peft(&n)) {
        return Err(refusal(path, &format!("is PEFT's: name its folder, which also holds `{CONFIG}`")));
    }
    match names.iter().any(|n| frozen(n)) {
        true => Err(refusal(path, WHOLE_MODEL)),
        false => Ok(()),
    }
}
