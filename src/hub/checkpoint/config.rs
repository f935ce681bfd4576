//! Compares the keys of `config.json` with the model. The backbone's file declares what each key means for its family;
//! this module knows the keys that mean the same for all families.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use peft_grammar::library;
use peft_grammar::model::{ConfigValue, KeyRule, Model};
use peft_runtime::{RuntimeError, json};
use serde_json::{Map, Value};

/// Keys that do not change what a model of any family computes from its weights: they describe the model's origin, the
/// program that wrote it, the type of its weights, additional outputs, and the sampling of text.
pub const IGNORED_KEYS: &[&str] = &[
    // Origin and program.
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "_from_model_config",
    "transformers_version",
    "model_type",
    "architectures",
    "finetuning_task",
    "tokenizer_class",
    "task_specific_params",
    "language",
    "license",
    "custom_pipelines",
    "transformers.js_config",
    "unsloth_version",
    "unsloth_fixed",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
    "_experts_implementation",
    "experts_implementation",
    // Type of the weights and implementation.
    "dtype",
    "torch_dtype",
    "use_bfloat16",
    "torchscript",
    "tf_legacy_loss",
    "gradient_checkpointing",
    // Initialisation.
    "initializer_range",
    "initializer_factor",
    // Additional outputs.
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "return_dict",
    "tie_last_hidden_states",
    "use_cache",
    "chunk_size_feed_forward",
    "is_composition",
    // Special tokens.
    "bos_token_id",
    "eos_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "unk_token_id",
    "decoder_start_token_id",
    "prefix",
    // Generation and sampling.
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "bad_words_ids",
    "begin_suppress_tokens",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "constraints",
    "continuous_batching_config",
    "disable_compile",
    "diversity_penalty",
    "do_sample",
    "dola_layers",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_decoder_ids",
    "forced_eos_token_id",
    "generation_kwargs",
    "guidance_scale",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_cache_len",
    "max_length",
    "max_matching_ngram_size",
    "max_new_tokens",
    "max_time",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_logits",
    "output_scores",
    "penalty_alpha",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "return_dict_in_generate",
    "sequence_bias",
    "speculation_type",
    "stop_strings",
    "suppress_tokens",
    "target_lookbehind",
    "temperature",
    "token_healing",
    "top_h",
    "top_k",
    "top_p",
    "typical_p",
    "use_mtp",
    "watermarking_config",
];

/// Keys about labels. [`super::labels`] compares them if the files hold a head.
pub const LABELS: &[&str] = &["id2label", "label2id", "num_labels", "_num_labels", "problem_type"];

/// Keys for features of any family that no backbone computes: the values that turn the feature off, and the message for
/// any other value.
const REFUSED: &[(&str, &[&str], &str)] = &[
    (
        "quantization_config",
        &["null", "{}"],
        "the weights are quantised; save them once as floating-point numbers (transformers: `model.dequantize()`, \
         then `save_pretrained`)",
    ),
    ("pruned_heads", &["null", "{}"], "heads of its layers were pruned"),
    ("per_layer_config", &["null", "{}"], "its layers have different configurations"),
    (
        "auto_map",
        &["null", "{}"],
        "it comes with Python code of its own, which is not read; remove the key if transformers' own class computes \
         the same",
    ),
    ("is_encoder_decoder", &["null", "false"], "it is an encoder with a decoder"),
    ("tie_encoder_decoder", &["null", "false"], "it is an encoder with a decoder"),
    ("cross_attention_hidden_size", &["null"], "it attends to another sequence"),
    (
        "transformers_weights",
        &["null", "\"model.safetensors\""],
        "its weights are in a file of another name; rename it to `model.safetensors`, and remove the key",
    ),
    ("text_config", &["null"], "it is a model of several parts; take the folder of the text model"),
    ("vision_config", &["null"], "it is a model of several parts; take the folder of the text model"),
    ("audio_config", &["null"], "it is a model of several parts; take the folder of the text model"),
    ("encoder", &["null"], "it is a model of several parts"),
    ("decoder", &["null"], "it is a model of several parts"),
];

/// The key for the number of rows of the token embedding, which a task's special tokens may extend.
pub(super) const VOCABULARY: &str = "vocab_size";

/// The result of a comparison.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Errors, a line each; empty if the checkpoint fits.
    pub wrong: Vec<String>,
    /// Warnings, a line each.
    pub warnings: Vec<String>,
    /// The value of each argument of the backbone by the file, or its default if the key is absent.
    pub arguments: BTreeMap<String, Value>,
}

/// Reads the `config.json` of a folder; `None` if it has none.
///
/// # Errors
///
/// The file cannot be read or is not a JSON object.
pub fn read(dir: &Path) -> Result<Option<Map<String, Value>>, RuntimeError> {
    let path = dir.join("config.json");
    json::exists(&path)?.then(|| json::object(&path)).transpose()
}

/// Compares every key with the model. An absent key has the default of transformers, which the backbone's file
/// declares.
pub fn compare(config: &Map<String, Value>, model: &Model) -> Comparison {
    let mut found = Comparison::default();
    if let Some(wrong) = other_family(config, model, &mut found.warnings) {
        found.wrong.push(wrong);
        return found;
    }
    let rules = ConfigRules { model, keys: &model.backbone.checkpoint.keys, place: "config.json", file_keys: None };
    rules.compare(&entries(config, &rules), found)
}

/// The rules by which the keys of a file are compared with a model.
pub(super) struct ConfigRules<'a> {
    /// The model.
    pub model: &'a Model,
    /// The rule for each key; [`KeyRule::Same`] for an alias.
    pub keys: &'a BTreeMap<String, KeyRule>,
    /// The name of the file in messages, such as `config.json`.
    pub place: &'a str,
    /// The file's own name for each key of `config.json`; `None` if it is that file.
    pub file_keys: Option<&'a BTreeMap<String, String>>,
}

/// A key of the file and its value.
pub(super) struct ConfigEntry<'c> {
    /// The key; `OBJECT.KEY` for a key inside an object.
    pub path: String,
    /// The value.
    pub value: Cow<'c, Value>,
    /// Whether the key belongs to the family, so that it is an error if the backbone does not know it.
    pub must_be_known: bool,
}

/// The judgement on a key.
enum Verdict {
    /// The value agrees with the model, or the key does not matter.
    Fits,
    /// The value disagrees. The text follows "`key` is value" in the message.
    Differs(String),
    /// Nothing knows the key.
    Unknown,
}

impl ConfigRules<'_> {
    /// Compares all keys of a file, and adds the result to `found`.
    pub fn compare(&self, entries: &[ConfigEntry], mut found: Comparison) -> Comparison {
        let (mut present, mut unknown) = (BTreeSet::new(), vec![]);
        for entry in entries {
            if !entry.value.is_null() {
                let name = self.canonical(&entry.path);
                present.insert(name.to_owned());
                if let Some(KeyRule::Argument { name, .. }) = self.keys.get(name) {
                    found.arguments.insert(name.clone(), entry.value.clone().into_owned());
                }
            }
            match self.judge(entry) {
                Verdict::Fits => {}
                Verdict::Differs(why) => {
                    found.wrong.push(format!("  `{}` is {} {why}", entry.path, abbreviated(&entry.value)))
                }
                Verdict::Unknown => unknown.push(format!("`{}`: {}", entry.path, abbreviated(&entry.value))),
            }
        }
        for (key, rule) in self.keys.iter().filter(|(key, _)| !present.contains(*key)) {
            if let KeyRule::Argument { name, absent: Some(absent) } = rule {
                found.arguments.entry(name.clone()).or_insert_with(|| to_json(absent));
                found.wrong.extend(self.absent_key_differs(key, name, &to_json(absent)));
            }
        }
        if !unknown.is_empty() {
            found.warnings.push(format!(
                "{} has keys that `{}` does not know, so it was not checked whether they matter: {}",
                self.place,
                self.model.backbone.name,
                unknown.join(", ")
            ));
        }
        found
    }

    /// Judges one key.
    fn judge(&self, entry: &ConfigEntry) -> Verdict {
        let name = self.canonical(&entry.path);
        let (backbone, place, value) = (&self.model.backbone.name, self.place, &*entry.value);
        match self.keys.get(name) {
            // A key that is null counts as absent.
            Some(KeyRule::Argument { .. }) if value.is_null() => Verdict::Fits,
            Some(KeyRule::Argument { name: argument, .. }) => match self.model.backbone.config.get(name) {
                Some(wants) if !fits(name, value, wants, self.model) => {
                    let mend = suggestion(argument, value, wants).map_or(String::new(), |mend| format!("; {mend}"));
                    Verdict::Differs(format!("in {place}, the spec wants {}{mend}", to_text(wants)))
                }
                _ => Verdict::Fits,
            },
            Some(KeyRule::Is { values, .. }) if values.iter().any(|wanted| same(wanted, value)) => Verdict::Fits,
            Some(KeyRule::Is { values, note }) => {
                let values: Vec<String> = values.iter().map(Value::to_string).collect();
                let note = note.as_ref().map_or(String::new(), |note| format!(": {note}"));
                Verdict::Differs(format!("in {place}, and `{backbone}` computes {}{note}", values.join(" or ")))
            }
            Some(KeyRule::Free | KeyRule::Same(_)) => Verdict::Fits,
            // The backbone knows other keys of this object, so an unknown key may matter.
            None if entry.must_be_known && !value.is_null() => {
                Verdict::Differs(format!("in {place}, and `{backbone}` does not know it"))
            }
            None if has_nested_keys(name, self.keys) => {
                Verdict::Differs(format!("in {place}, where an object was expected"))
            }
            None if IGNORED_KEYS.contains(&name) || LABELS.contains(&name) => Verdict::Fits,
            None => match REFUSED.iter().find(|(key, ..)| *key == name) {
                Some((_, fine, _)) if fine.contains(&value.to_string().as_str()) => Verdict::Fits,
                Some((.., why)) => Verdict::Differs(format!("in {place}: {why}")),
                None => Verdict::Unknown,
            },
        }
    }

    /// The canonical key for a path that may be an alias.
    fn canonical<'k>(&'k self, path: &'k str) -> &'k str {
        let mut name = path;
        // A GGUF key may be an alias of a key of `config.json`, which may itself be an alias.
        for _ in 0..2 {
            match self.keys.get(name) {
                Some(KeyRule::Same(other)) => name = other,
                _ => break,
            }
        }
        name
    }

    /// The error for an absent key whose default differs from the spec's value; `None` if they agree.
    fn absent_key_differs(&self, key: &str, argument: &str, absent: &Value) -> Option<String> {
        let wants = self.model.backbone.config.get(key)?;
        let mend = suggestion(argument, absent, wants).map_or(String::new(), |mend| format!("; {mend}"));
        let written = self.file_keys.and_then(|file_keys| Some(&**file_keys.get(key)?)).unwrap_or(key);
        let line = format!(
            "  `{written}` is absent from {} and counts as {absent} there, the spec wants {}{mend}",
            self.place,
            to_text(wants)
        );
        (!fits(key, absent, wants, self.model)).then_some(line)
    }
}

/// The error for a checkpoint of another family, with the backbone that reads it.
fn other_family(config: &Map<String, Value>, model: &Model, warnings: &mut Vec<String>) -> Option<String> {
    let (types, backbone) = (&model.backbone.checkpoint.model_types, &model.backbone.name);
    match config.get("model_type") {
        _ if types.is_empty() => {
            warnings.push(format!("`{backbone}` does not say which `model_type` it reads, so it was not checked"));
            None
        }
        None | Some(Value::Null) => {
            warnings.push(format!("config.json has no `model_type`, so it is assumed to be a `{backbone}`"));
            None
        }
        Some(Value::String(found)) if types.contains(found) => None,
        Some(found) => {
            let reader = found.as_str().and_then(library::backbone_of);
            let mend = match reader {
                Some(reader) => format!("`model = {reader}(…)` reads it"),
                None => "the library has no backbone that reads it".into(),
            };
            let types = types.join(" or ");
            Some(format!("  `model_type` is {found} in config.json, `{backbone}` reads {types}; {mend}"))
        }
    }
}

/// All keys with their values. Objects of which the backbone knows a key are flattened.
fn entries<'c>(config: &'c Map<String, Value>, rules: &ConfigRules) -> Vec<ConfigEntry<'c>> {
    let mut all = vec![];
    for (key, value) in config {
        match value {
            Value::Object(inner) if has_nested_keys(key, rules.keys) => {
                let entry = |(k, value)| ConfigEntry {
                    path: format!("{key}.{k}"),
                    value: Cow::Borrowed(value),
                    must_be_known: true,
                };
                all.extend(inner.iter().map(entry));
            }
            // A null object has no keys to compare.
            Value::Null if has_nested_keys(key, rules.keys) => {}
            _ => all.push(ConfigEntry { path: key.clone(), value: Cow::Borrowed(value), must_be_known: false }),
        }
    }
    all
}

/// Whether the backbone knows a key of this object.
fn has_nested_keys(object: &str, keys: &BTreeMap<String, KeyRule>) -> bool {
    keys.keys().filter_map(|key| key.strip_prefix(object)).any(|rest| rest.starts_with('.'))
}

/// The `--set` option that gives the spec the file's value; `None` if the value does not have the argument's type.
fn suggestion(argument: &str, found: &Value, wants: &ConfigValue) -> Option<String> {
    let settable = match wants {
        ConfigValue::Bool(_) => found.is_boolean(),
        ConfigValue::Int(_) => found.is_i64(),
        ConfigValue::Float(_) => found.is_number(),
        ConfigValue::Str(_) => false,
    };
    settable.then(|| format!("`--set model.{argument}={found}` follows the file"))
}

/// Whether the file's value agrees with the spec's. The vocabulary may differ by the task's special tokens.
fn fits(key: &str, found: &Value, wants: &ConfigValue, model: &Model) -> bool {
    let rows = if key == VOCABULARY { model.task.special_tokens().len() as i64 } else { 0 };
    match wants {
        ConfigValue::Int(n) => {
            found.as_i64().is_some_and(|f| f <= *n && n.checked_sub(f).is_some_and(|more| more <= rows))
        }
        ConfigValue::Float(x) => found.as_f64().is_some_and(|f| (f - x).abs() <= 1e-6 * x.abs()),
        ConfigValue::Bool(b) => found.as_bool() == Some(*b),
        ConfigValue::Str(s) => found.as_str() == Some(s),
    }
}

/// Whether two values are equal, where `1` equals `1.0`.
fn same(wanted: &Value, found: &Value) -> bool {
    match (wanted, found) {
        (Value::Number(_), Value::Number(_)) => wanted.as_f64() == found.as_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => wanted == found,
    }
}

/// An argument's value as JSON.
fn to_json(value: &ConfigValue) -> Value {
    match value {
        ConfigValue::Bool(b) => Value::from(*b),
        ConfigValue::Int(n) => Value::from(*n),
        ConfigValue::Float(x) => Value::from(*x),
        ConfigValue::Str(s) => Value::from(s.as_str()),
    }
}

/// An argument's value as JSON text.
fn to_text(value: &ConfigValue) -> String {
    to_json(value).to_string()
}

/// A value for a message, cut after 120 characters.
fn abbreviated(value: &Value) -> String {
    const MAX_CHARACTERS: usize = 120;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARACTERS) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
