//! Trained values in the format of Hugging Face's PEFT, and back: `adapter_config.json` beside
//! `adapter_model.safetensors`. One file for each of PEFT's methods that we share.
//!
//! Names come from the model, not from its backbone's name: a projection knows the tensor its matrix lies in, and
//! PEFT's modules are those tensors' names without `.weight`.

mod ia3;
mod lora;
mod prefix;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use peft_grammar::model::{Applied, ConfigValue, Model, Origin, Projection, TaskKind, Trainable};
use peft_runtime::RuntimeError;
use peft_runtime::adapter::{self, Data, Stored, TensorFile};
use serde_json::{Map, Value, json};

/// Tensors under canonical names.
pub type Tensors = BTreeMap<String, Stored>;

pub const CONFIG: &str = "adapter_config.json";
pub const MODEL: &str = "adapter_model.safetensors";

/// What stands before the base model's own names, and before a head beside a prefix.
const BASE: &str = "base_model.model.";
const BASE_OF_PREFIX: &str = "base_model.";

/// An adapter as PEFT has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    pub config: Map<String, Value>,
    pub tensors: Tensors,
}

impl Adapter {
    pub fn load(dir: &Path) -> Result<Self, RuntimeError> {
        let path = dir.join(CONFIG);
        let text = std::fs::read_to_string(&path).map_err(|e| RuntimeError::file(&path, e))?;
        let config = serde_json::from_str(&text)
            .map_err(|e| RuntimeError::file(&path, format!("is no adapter's configuration: {e}")))?;
        Ok(Adapter { config, tensors: adapter::load(&dir.join(MODEL))?.tensors })
    }

    pub fn save(&self, dir: &Path) -> Result<(), RuntimeError> {
        let mut text = serde_json::to_string_pretty(&self.config).expect("plain data");
        text.push('\n');
        // Other readers want to know which framework wrote a file; its numbers are laid out as PyTorch's.
        let notes = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        adapter::save(&dir.join(MODEL), &TensorFile { tensors: self.tensors.clone(), notes })?;
        adapter::write_whole(&dir.join(CONFIG), text.as_bytes())
    }
}

/// The model's trained values in PEFT's format. `values` are what is kept (with [`Model::stored`] in place of what
/// it replaces) and the head. The error says why PEFT cannot hold them.
pub fn export(model: &Model, values: &Tensors) -> Result<Adapter, String> {
    let methods: BTreeSet<&str> = model.applied.iter().map(|a| a.method.as_str()).collect();
    if let Some(param) = model.params.iter().find(|p| p.origin == Origin::Backbone && p.trainable != Trainable::No) {
        return Err(match param.trainable {
            Trainable::Rows(start, end) => format!(
                "rows {start}..{end} of `{}` train, and PEFT's adapters keep embeddings whole or not at all",
                param.name
            ),
            _ => format!("`{}` of the backbone trains, and PEFT's adapters hold no backbone tensors", param.name),
        });
    }
    let methods: Vec<&str> = methods.into_iter().collect();
    let mut adapter = match methods[..] {
        ["lora"] => lora::export(model, values, false)?,
        ["dora"] => lora::export(model, values, true)?,
        ["ia3"] => ia3::export(model, values)?,
        ["prefix"] => prefix::export(model, values)?,
        [] => return Err("the spec applies no method".into()),
        [one] => return Err(format!("PEFT has no `{one}` as this project defines it")),
        _ => return Err(format!("PEFT holds one method in an adapter, and the spec mixes {}", list(&methods))),
    };
    let before = if methods == ["prefix"] { BASE_OF_PREFIX } else { BASE };
    save_head(model, values, before, &mut adapter)?;
    let task = match model.task.kind {
        TaskKind::Generation { .. } => "CAUSAL_LM",
        TaskKind::Classification { .. } => "SEQ_CLS",
    };
    adapter.config.insert("task_type".into(), json!(task));
    adapter.config.insert("inference_mode".into(), json!(true));
    adapter.config.insert("base_model_name_or_path".into(), Value::Null);
    Ok(adapter)
}

/// The values of the model's own tensors in an adapter that PEFT (or [`export`]) wrote. The error says what does not
/// fit.
pub fn import(model: &Model, adapter: &Adapter) -> Result<Tensors, String> {
    let kind = adapter.config.get("peft_type").and_then(Value::as_str).unwrap_or("none");
    let flag = |key: &str| adapter.config.get(key).and_then(Value::as_bool).unwrap_or(false);
    let mut rest = Rest { tensors: adapter.tensors.iter().map(|(n, t)| (n.as_str(), t)).collect() };
    let mut values = match kind {
        "LORA" => lora::import(model, &adapter.config, &mut rest, flag("use_dora"))?,
        "IA3" => ia3::import(model, &mut rest)?,
        "PREFIX_TUNING" => prefix::import(model, &mut rest)?,
        other => {
            return Err(format!("adapters of PEFT's type {other} are not read here; LORA, IA3 and PREFIX_TUNING are"));
        }
    };
    let before = if kind == "PREFIX_TUNING" { BASE_OF_PREFIX } else { BASE };
    for param in model.params.iter().filter(|p| p.origin == Origin::Head && p.trainable != Trainable::No) {
        values.insert(param.name.clone(), rest.shaped(&format!("{before}{}", param.name), &param.shape)?);
    }
    let left: Vec<&str> = rest.tensors.keys().copied().collect();
    if !left.is_empty() {
        return Err(format!("the adapter holds what the spec does not train: {}", list(&left)));
    }
    let missing = model.params.iter().filter(|p| p.trainable != Trainable::No && !values.contains_key(&p.name));
    let missing: Vec<&str> = missing.map(|p| p.name.as_str()).collect();
    if !missing.is_empty() {
        return Err(format!("the spec trains what the adapter does not hold: {}", list(&missing)));
    }
    Ok(values)
}

/// The head goes with the adapter, under its own names.
fn save_head(model: &Model, values: &Tensors, before: &str, adapter: &mut Adapter) -> Result<(), String> {
    let heads = model.params.iter().filter(|p| p.origin == Origin::Head);
    let mut modules = BTreeSet::new();
    for param in heads {
        let value = values.get(&param.name).ok_or_else(|| {
            format!("the head `{}` does not train, so the trained values do not hold it; name `--weights`", param.name)
        })?;
        adapter.tensors.insert(format!("{before}{}", param.name), value.clone());
        modules.insert(param.name.split('.').next().unwrap_or(&param.name).to_string());
    }
    let modules: Vec<String> = modules.into_iter().collect();
    adapter.config.insert("modules_to_save".into(), if modules.is_empty() { Value::Null } else { json!(modules) });
    Ok(())
}

/// A matrix of the backbone with the projections that read it: GPT-2's `c_attn` serves three.
struct Module<'a> {
    name: &'a str,
    /// Stored [in,out].
    conv: bool,
    inputs: u64,
    outputs: u64,
    projections: Vec<&'a Projection>,
}

impl Module<'_> {
    /// The rows of PEFT's [out,…] tensors that are this projection's.
    fn rows(&self, projection: &Projection) -> std::ops::Range<usize> {
        let (start, end) = projection.columns.unwrap_or((0, self.outputs));
        start as usize..end as usize
    }

    fn fused(&self) -> bool {
        self.projections.iter().any(|p| p.columns.is_some())
    }

    fn key(&self, tensor: &str) -> String {
        format!("{BASE}{}.{tensor}", self.name)
    }
}

/// The modules, in the order of the model, of which `chosen` projections are part.
fn modules<'a>(model: &'a Model, chosen: impl Fn(&Projection) -> bool) -> Vec<Module<'a>> {
    let mut modules: Vec<Module> = vec![];
    for projection in &model.projections {
        let name = projection.weight.strip_suffix(".weight").unwrap_or(&projection.weight);
        if let Some(module) = modules.iter_mut().find(|m| m.name == name) {
            module.projections.push(projection);
            continue;
        }
        let Some(param) = model.params.iter().find(|p| p.name == projection.weight) else { continue };
        let (inputs, outputs) = match projection.transposed {
            true => (param.shape[1], param.shape[0]),
            false => (param.shape[0], param.shape[1]),
        };
        let conv = !projection.transposed;
        modules.push(Module { name, conv, inputs, outputs, projections: vec![projection] });
    }
    modules.retain(|m| m.projections.iter().any(|p| chosen(p)));
    modules
}

/// What `method` is given at `site`.
fn applied<'a>(model: &'a Model, site: &str, method: &str) -> Option<&'a Applied> {
    model.applied.iter().find(|a| a.site == site && a.method == method)
}

fn int(applied: &Applied, key: &str) -> usize {
    if let Some(ConfigValue::Int(n)) = applied.args.get(key) { *n as usize } else { 0 }
}

fn float(applied: &Applied, key: &str) -> f64 {
    if let Some(ConfigValue::Float(x)) = applied.args.get(key) { *x } else { 0.0 }
}

/// The numbers of a tensor that must be there.
fn numbers<'a>(values: &'a Tensors, name: &str) -> Result<&'a [f32], String> {
    match values.get(name).map(|t| &t.data) {
        Some(Data::F32(x)) => Ok(x),
        _ => Err(format!("the trained values lack `{name}`")),
    }
}

/// What of an adapter has not been read yet.
struct Rest<'a> {
    tensors: BTreeMap<&'a str, &'a Stored>,
}

impl<'a> Rest<'a> {
    fn take(&mut self, name: &str, shape: &[u64]) -> Result<&'a [f32], String> {
        let stored = self.tensors.remove(name).ok_or_else(|| format!("the adapter lacks `{name}`"))?;
        match &stored.data {
            Data::F32(x) if stored.shape == shape => Ok(x),
            _ => Err(format!("`{name}` is {:?} in the adapter, the spec wants {shape:?}", stored.shape)),
        }
    }

    fn shaped(&mut self, name: &str, shape: &[u64]) -> Result<Stored, String> {
        Ok(Stored::f32(shape.to_vec(), self.take(name, shape)?.to_vec()))
    }

    fn shape(&self, name: &str) -> Option<&[u64]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }
}

fn list(names: &[&str]) -> String {
    let shown: Vec<String> = names.iter().take(6).map(|n| format!("`{n}`")).collect();
    let more = if names.len() > 6 { format!(" and {} more", names.len() - 6) } else { String::new() };
    shown.join(", ") + &more
}
