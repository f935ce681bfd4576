//! The keys of `config.json` against the model. What each means to a family stands in its backbone's file; what is the
//! same for all families stands here.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use peft_grammar::library;
use peft_grammar::model::{ConfigValue, Key, Model};
use peft_runtime::{RuntimeError, json};
use serde_json::{Map, Value};

/// Keys that change nothing of what a model computes from its weights, whatever its family: where it comes from, with
/// what it was written, in which type, what its outputs hold besides, how text is drawn from it.
pub const WITHOUT_INFLUENCE: &[&str] = &[
    // Where from, and with what.
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
    // In which type, and by what.
    "dtype",
    "torch_dtype",
    "use_bfloat16",
    "torchscript",
    "tf_legacy_loss",
    "gradient_checkpointing",
    // Initialisation.
    "initializer_range",
    "initializer_factor",
    // Outputs.
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "return_dict",
    "tie_last_hidden_states",
    "use_cache",
    "chunk_size_feed_forward",
    "is_composition",
    // Tokens by their role.
    "bos_token_id",
    "eos_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "unk_token_id",
    "decoder_start_token_id",
    "prefix",
    // Generation.
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

/// Keys about labels; [`super::labels`] compares them where the files hold a head.
pub const LABELS: &[&str] = &["id2label", "label2id", "num_labels", "_num_labels", "problem_type"];

/// Keys that mean the same to all families and that no backbone computes: what they may be, what else they say, and
/// the mend.
const REFUSED: &[(&str, &[&str], &str)] = &[
    (
        "quantization_config",
        &["null", "{}"],
        "the weights are quantised; save them once as floating-point numbers (transformers: `model.dequantize()`, then `save_pretrained`)",
    ),
    ("pruned_heads", &["null", "{}"], "heads of its layers were taken out"),
    ("per_layer_config", &["null", "{}"], "its layers are not alike"),
    (
        "auto_map",
        &["null", "{}"],
        "it brings Python code of its own, which is not read; take the key out if transformers' own class computes the same",
    ),
    ("is_encoder_decoder", &["null", "false"], "it is an encoder with a decoder"),
    ("tie_encoder_decoder", &["null", "false"], "it is an encoder with a decoder"),
    ("cross_attention_hidden_size", &["null"], "it attends to another sequence"),
    (
        "transformers_weights",
        &["null", "\"model.safetensors\""],
        "its weights are in a file of another name; call that `model.safetensors`, and take the key out",
    ),
    ("text_config", &["null"], "it is a model of several parts; take the folder of the text model"),
    ("vision_config", &["null"], "it is a model of several parts; take the folder of the text model"),
    ("audio_config", &["null"], "it is a model of several parts; take the folder of the text model"),
    ("encoder", &["null"], "it is a model of several parts"),
    ("decoder", &["null"], "it is a model of several parts"),
];

/// The key that counts the token embedding's rows: a task's own special tokens may follow them.
pub(super) const VOCABULARY: &str = "vocab_size";

/// What a comparison found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Lines of a refusal.
    pub wrong: Vec<String>,
    pub warnings: Vec<String>,
    /// What the file says of each argument of the backbone; of one that it leaves out, what that counts as.
    pub arguments: BTreeMap<String, Value>,
}

/// `config.json` of a folder, where it has one.
pub fn read(dir: &Path) -> Result<Option<Map<String, Value>>, RuntimeError> {
    let path = dir.join("config.json");
    json::there(&path)?.then(|| json::object(&path)).transpose()
}

/// Compares every key with what the model computes. A key that is absent counts as transformers' own default, which
/// the backbone's file knows.
pub fn compare(config: &Map<String, Value>, model: &Model) -> Comparison {
    let mut found = Comparison::default();
    if let Some(wrong) = other_family(config, model, &mut found.warnings) {
        found.wrong.push(wrong);
        return found;
    }
    let rules = Rules { model, keys: &model.backbone.checkpoint.keys, place: "config.json", written: None };
    rules.compare(&leaves(config, &rules), found)
}

/// What the keys of a file are compared with.
pub(super) struct Rules<'a> {
    pub model: &'a Model,
    /// What each key has to be, [`Key::Same`] for another name of one.
    pub keys: &'a BTreeMap<String, Key>,
    /// What messages call the file: `config.json`.
    pub place: &'a str,
    /// How the file writes keys of `config.json`; `None` where it is that file.
    pub written: Option<&'a BTreeMap<String, String>>,
}

/// A key and its value.
pub(super) struct Leaf<'c> {
    /// That of a key inside an object has a dot.
    pub path: String,
    pub value: Cow<'c, Value>,
    /// It belongs to the family, which has to know it.
    pub own: bool,
}

enum Verdict {
    Fits,
    /// Why it is refused, after "`key` is value".
    Differs(String),
    Unknown,
}

impl Rules<'_> {
    /// Compares all keys of a file, which are `leaves`, and adds what is found.
    pub fn compare(&self, leaves: &[Leaf], mut found: Comparison) -> Comparison {
        let (mut present, mut unknown) = (BTreeSet::new(), vec![]);
        for leaf in leaves {
            if !leaf.value.is_null() {
                let name = self.canonical(&leaf.path);
                present.insert(name.to_owned());
                if let Some(Key::Argument { name, .. }) = self.keys.get(name) {
                    found.arguments.insert(name.clone(), leaf.value.clone().into_owned());
                }
            }
            match self.judge(leaf) {
                Verdict::Fits => {}
                Verdict::Differs(why) => found.wrong.push(format!("  `{}` is {} {why}", leaf.path, short(&leaf.value))),
                Verdict::Unknown => unknown.push(format!("`{}`: {}", leaf.path, short(&leaf.value))),
            }
        }
        for (key, rule) in self.keys.iter().filter(|(key, _)| !present.contains(*key)) {
            if let Key::Argument { name, absent: Some(absent) } = rule {
                found.arguments.entry(name.clone()).or_insert_with(|| plain(absent));
                found.wrong.extend(self.absent_key_differs(key, name, &plain(absent)));
            }
        }
        if !unknown.is_empty() {
            found.warnings.push(format!(
                "{} has keys that `{}` does not know, so whether they matter was not checked: {}",
                self.place,
                self.model.backbone.name,
                unknown.join(", ")
            ));
        }
        found
    }

    fn judge(&self, leaf: &Leaf) -> Verdict {
        let name = self.canonical(&leaf.path);
        let (backbone, place, value) = (&self.model.backbone.name, self.place, &*leaf.value);
        match self.keys.get(name) {
            // Null is what an absent key is.
            Some(Key::Argument { .. }) if value.is_null() => Verdict::Fits,
            Some(Key::Argument { name: argument, .. }) => match self.model.backbone.config.get(name) {
                Some(wants) if !fits(name, value, wants, self.model) => {
                    let mend = mend(argument, value, wants).map_or(String::new(), |mend| format!("; {mend}"));
                    Verdict::Differs(format!("in {place}, the spec wants {}{mend}", text(wants)))
                }
                _ => Verdict::Fits,
            },
            Some(Key::Is { values, .. }) if values.iter().any(|wanted| same(wanted, value)) => Verdict::Fits,
            Some(Key::Is { values, note }) => {
                let values: Vec<String> = values.iter().map(Value::to_string).collect();
                let note = note.as_ref().map_or(String::new(), |note| format!(": {note}"));
                Verdict::Differs(format!("in {place}, and `{backbone}` computes {}{note}", values.join(" or ")))
            }
            Some(Key::Free | Key::Same(_)) => Verdict::Fits,
            // Objects that the backbone knows are understood key by key.
            None if leaf.own && !value.is_null() => {
                Verdict::Differs(format!("in {place}, and `{backbone}` does not know it"))
            }
            None if inside(name, self.keys) => Verdict::Differs(format!("in {place}, where an object was expected")),
            None if WITHOUT_INFLUENCE.contains(&name) || LABELS.contains(&name) => Verdict::Fits,
            None => match REFUSED.iter().find(|(key, ..)| *key == name) {
                Some((_, fine, _)) if fine.contains(&value.to_string().as_str()) => Verdict::Fits,
                Some((.., why)) => Verdict::Differs(format!("in {place}: {why}")),
                None => Verdict::Unknown,
            },
        }
    }

    /// The key that a path is a name of.
    fn canonical<'k>(&'k self, path: &'k str) -> &'k str {
        let mut name = path;
        // A name of the file, and another name in `config.json`.
        for _ in 0..2 {
            match self.keys.get(name) {
                Some(Key::Same(other)) => name = other,
                _ => break,
            }
        }
        name
    }

    /// The line for an argument whose key the file lacks, if its default there is another than the spec's value.
    fn absent_key_differs(&self, key: &str, argument: &str, absent: &Value) -> Option<String> {
        let wants = self.model.backbone.config.get(key)?;
        let mend = mend(argument, absent, wants).map_or(String::new(), |mend| format!("; {mend}"));
        let written = self.written.and_then(|written| Some(&**written.get(key)?)).unwrap_or(key);
        let line = format!(
            "  `{written}` is absent from {} and counts as {absent} there, the spec wants {}{mend}",
            self.place,
            text(wants)
        );
        (!fits(key, absent, wants, self.model)).then_some(line)
    }
}

/// Refuses the checkpoint of another family, by the backbone that reads it.
fn other_family(config: &Map<String, Value>, model: &Model, warnings: &mut Vec<String>) -> Option<String> {
    let (types, backbone) = (&model.backbone.checkpoint.model_types, &model.backbone.name);
    match config.get("model_type") {
        _ if types.is_empty() => {
            warnings.push(format!("`{backbone}` does not say which `model_type` it reads, so it was not checked"));
            None
        }
        None | Some(Value::Null) => {
            warnings.push(format!("config.json has no `model_type`: that it is a `{backbone}` was taken for granted"));
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

/// Every key with its value; of objects of which the backbone knows a key, that of each entry.
fn leaves<'c>(config: &'c Map<String, Value>, rules: &Rules) -> Vec<Leaf<'c>> {
    let mut all = vec![];
    for (key, value) in config {
        match value {
            Value::Object(entries) if inside(key, rules.keys) => {
                let entry = |(k, value)| Leaf { path: format!("{key}.{k}"), value: Cow::Borrowed(value), own: true };
                all.extend(entries.iter().map(entry));
            }
            // There is nothing in it.
            Value::Null if inside(key, rules.keys) => {}
            _ => all.push(Leaf { path: key.clone(), value: Cow::Borrowed(value), own: false }),
        }
    }
    all
}

/// The backbone knows keys of this object.
fn inside(object: &str, keys: &BTreeMap<String, Key>) -> bool {
    keys.keys().filter_map(|key| key.strip_prefix(object)).any(|rest| rest.starts_with('.'))
}

/// What makes the spec have the file's value, if it is one of the argument's type.
fn mend(argument: &str, found: &Value, wants: &ConfigValue) -> Option<String> {
    let settable = match wants {
        ConfigValue::Bool(_) => found.is_boolean(),
        ConfigValue::Int(_) => found.is_i64(),
        ConfigValue::Float(_) => found.is_number(),
        ConfigValue::Str(_) => false,
    };
    settable.then(|| format!("`--set model.{argument}={found}` follows the file"))
}

/// The value is the spec's; of the vocabulary, but for the task's own tokens.
fn fits(key: &str, found: &Value, wants: &ConfigValue, model: &Model) -> bool {
    let rows = if key == VOCABULARY { model.task.special().len() as i64 } else { 0 };
    match wants {
        ConfigValue::Int(n) => {
            found.as_i64().is_some_and(|f| f <= *n && n.checked_sub(f).is_some_and(|more| more <= rows))
        }
        ConfigValue::Float(x) => found.as_f64().is_some_and(|f| (f - x).abs() <= 1e-6 * x.abs()),
        ConfigValue::Bool(b) => found.as_bool() == Some(*b),
        ConfigValue::Str(s) => found.as_str() == Some(s),
    }
}

/// Values are the same, numbers whether they are written with a fraction or not.
fn same(wanted: &Value, found: &Value) -> bool {
    match (wanted, found) {
        (Value::Number(_), Value::Number(_)) => wanted.as_f64() == found.as_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => wanted == found,
    }
}

fn plain(value: &ConfigValue) -> Value {
    match value {
        ConfigValue::Bool(b) => Value::from(*b),
        ConfigValue::Int(n) => Value::from(*n),
        ConfigValue::Float(x) => Value::from(*x),
        ConfigValue::Str(s) => Value::from(s.as_str()),
    }
}

fn text(value: &ConfigValue) -> String {
    plain(value).to_string()
}

/// A value for a message: not all of a long one.
fn short(value: &Value) -> String {
    const LONGEST: usize = 120;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
