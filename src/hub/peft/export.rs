//! Exports trained values in PEFT's format.

use std::collections::{BTreeMap, BTreeSet};

use peft_grammar::counterpart::{Constant, Counterpart, Rule, Tensor};
use peft_grammar::model::{ConfigValue, Model, Origin, Param, TaskKind, Trainable};
use peft_runtime::adapter::{Data, Stored};
use serde_json::{Map, Value, json};

use super::config::{by_module, json as value, plain, settings};
use super::modules::{self, Application, Module};
use super::names::{INDICES, ROWS};
use super::tables;
use super::{Adapter, Tensors, list, tied};

/// The prefix of the base model's names in an adapter at modules, and in one with a prefix table.
const BASE: &str = "base_model.model.";
const BASE_OF_TABLES: &str = "base_model.";

/// The model's trained values in PEFT's format. `values` are the values to be stored (with [`Model::stored`] in place
/// of what it replaces). `base` holds frozen tensors of the base model that PEFT saves, too: a head, and the other
/// tensors of a module that is saved whole.
///
/// # Errors
///
/// The reason why PEFT's format cannot hold the values.
pub fn export(model: &Model, values: &Tensors, base: &Tensors) -> Result<Adapter, String> {
    let methods: BTreeSet<&str> =
        model.applied.iter().filter(|a| a.kind != "model").map(|a| a.method.as_str()).collect();
    let methods: Vec<&str> = methods.into_iter().collect();
    let method = match methods[..] {
        [] => return Err("the spec applies no method that PEFT has".into()),
        [one] => one,
        _ => return Err(format!("an adapter of PEFT holds one method, and the spec mixes {}", list(&methods))),
    };
    let at_work = model.applied.iter().filter(|a| a.kind != "model");
    let counterparts: Vec<&Counterpart> = model.counterparts.iter().filter(|c| c.method == method).collect();
    if at_work.clone().any(|a| modules::counterpart_of(model, a).is_none()) {
        return Err(format!("PEFT has no method that computes what `{method}` computes"));
    }
    if let Some(why) = at_work.clone().find_map(|a| a.peft_obstacle.as_ref()) {
        return Err(why.clone());
    }
    let mut adapter = Adapter { config: Map::new(), tensors: Tensors::new() };
    adapter.config.insert("peft_type".into(), json!(counterparts[0].peft_type));
    let mut written = BTreeSet::new();
    let modules = modules::modules(model)?;
    for module in &modules {
        let settings = settings(module)?;
        for tensor in module.tensors() {
            let active =
                |m: &Module| m.applications.iter().any(|p| p.has(&tensor.name).is_some() && p.holds(&tensor.condition));
            if modules.iter().any(active) {
                let stored = module_tensor(module, tensor, values, &settings, &mut written)?;
                adapter.tensors.insert(format!("{BASE}{}.{}", module.name, tensor.name), stored);
            }
        }
    }
    for counterpart in &counterparts {
        tables::export(model, counterpart, values, &mut adapter.tensors, &mut written)?;
    }
    let lost = |p: &&Param| {
        matches!(p.origin, Origin::Method(_)) && !written.contains(&p.name) && !model.replaced.contains(&p.name)
    };
    if let Some(param) = model.params.iter().find(lost) {
        return Err(format!("PEFT's format has no place for `{}`", param.name));
    }
    let at: Vec<&peft_grammar::model::AppliedMethod> = at_work.collect();
    write_method_keys(&counterparts, &modules, &at, &mut adapter.config)?;
    if !modules.is_empty() {
        let names: Vec<&str> = modules.iter().map(|m| m.name).collect();
        adapter.config.insert("target_modules".into(), json!(names));
        adapter.config.insert("fan_in_fan_out".into(), json!(modules.iter().any(|m| m.stored_in_out)));
    }
    let before = if modules.is_empty() { BASE_OF_TABLES } else { BASE };
    export_base_tensors(model, (values, base), &modules, before, &mut adapter)?;
    let task = match model.task.kind {
        TaskKind::Classification { .. } | TaskKind::Regression { .. } => "SEQ_CLS",
        TaskKind::TokenClassification { .. } => "TOKEN_CLS",
        TaskKind::Generation { .. } | TaskKind::Chat | TaskKind::Text { .. } => "CAUSAL_LM",
    };
    adapter.config.insert("task_type".into(), json!(task));
    adapter.config.insert("inference_mode".into(), json!(true));
    Ok(adapter)
}

/// The values of a tensor.
///
/// # Errors
///
/// There is no such tensor of floats.
pub fn numbers<'a>(values: &'a Tensors, name: &str) -> Result<&'a [f32], String> {
    match values.get(name).map(|t| &t.data) {
        Some(Data::F32(x)) => Ok(x),
        _ => Err(format!("the trained values lack `{name}`")),
    }
}

/// A tensor of a module, assembled from the tensors of its applications.
fn module_tensor(
    module: &Module,
    tensor: &Tensor,
    values: &Tensors,
    settings: &BTreeMap<String, f64>,
    written: &mut BTreeSet<String>,
) -> Result<Stored, String> {
    let names = || module.projections.iter().map(|p| Module::short(p)).collect::<Vec<_>>().join(", ");
    let peft = |application: &Application| format!("PEFT's {}", application.counterpart.peft_type);
    let shape = module.shape(tensor, |name| module.total(name));
    let untouched = module.unadapted(&tensor.name);
    if let (None, false, true) = (tensor.elsewhere, untouched.is_empty(), Module::has_output_axis(tensor)) {
        let application = &module.applications[0];
        return Err(format!(
            "{} has a `{}` for all of `{}`, and the spec applies `{}` to a part of it; apply it to {}",
            peft(application),
            tensor.name,
            module.name,
            application.applied.method,
            names()
        ));
    }
    if module.applications.len() > 1 && !Module::is_partitioned(tensor) {
        return Err(format!("PEFT has one `{}` for `{}`, which computes {}", tensor.name, module.name, names()));
    }
    let length = shape.iter().product::<u64>() as usize;
    let mut numbers_of_module = vec![tensor.elsewhere.unwrap_or(0.0) as f32; length];
    for (at, application) in module.applications.iter().enumerate() {
        let Some(own) = application.has(&tensor.name).filter(|t| application.holds(&t.condition)) else { continue };
        let name = application.weight(own);
        let from = numbers(values, &name)?;
        let block = module.block(own, at, false);
        let ratio = match &own.scale {
            None => 1.0,
            Some(scale) => {
                let no = |name: String| format!("`{}` has no number `{name}`", application.applied.method);
                let (ours, theirs) =
                    (scale.value(&application.numbers()).map_err(no)?, scale.value(settings).map_err(no)?);
                if ours == theirs { 1.0 } else { (ours / theirs) as f32 }
            }
        };
        for (to, from) in block.rows().zip(from.chunks(block.length[1])) {
            let to = &mut numbers_of_module[to..][..block.length[1]];
            to.iter_mut().zip(from).for_each(|(to, x)| *to = x * ratio);
        }
        written.insert(name);
    }
    Ok(Stored::f32(shape, numbers_of_module))
}

/// Writes the keys that the method's counterparts declare.
fn write_method_keys(
    counterparts: &[&Counterpart],
    modules: &[Module],
    at: &[&peft_grammar::model::AppliedMethod],
    config: &mut Map<String, Value>,
) -> Result<(), String> {
    let of_modules = modules.iter().map(|m| Ok((m, settings(m)?))).collect::<Result<Vec<_>, String>>()?;
    for counterpart in counterparts {
        let here = |m: &&Module| m.applications.iter().any(|p| std::ptr::eq(p.counterpart, *counterpart));
        for list in &counterpart.modules {
            let names: Vec<&str> = modules.iter().filter(here).map(|m| m.name).collect();
            config.insert(list.clone(), json!(names));
        }
        let known = |name: &str| {
            let of = at.iter().filter(|a| a.method == counterpart.method && a.kind == counterpart.kind);
            of.filter_map(|a| a.args.get(name).or(a.model_values.get(name))).collect::<Vec<&ConfigValue>>()
        };
        for key in &counterpart.keys {
            let (constant, patterns) = match &key.rule {
                Rule::Is { values, patterns, .. } => (values.first(), patterns.as_ref()),
                Rule::Free { written } => (written.as_ref(), None),
            };
            let free = matches!(key.rule, Rule::Free { .. });
            let written = match constant {
                // Keys with PEFT's default are left out.
                None | Some(Constant::Null | Constant::Value(ConfigValue::Bool(false))) => continue,
                Some(Constant::Value(constant)) => value(constant),
                Some(Constant::Name(name)) => {
                    let mut all: Vec<&ConfigValue> = known(name);
                    all.dedup();
                    let numbers = of_modules.iter().filter(|(m, _)| m.applications[0].counterpart == *counterpart);
                    let numbers = numbers.filter_map(|(m, s)| Some((m.name, plain(*s.get(name)?))));
                    let numbers: Vec<(&str, Value)> = numbers.collect();
                    match (&all[..], patterns) {
                        ([], _) => continue,
                        (_, Some(patterns)) if !numbers.is_empty() => {
                            let (most, others) = by_module(&numbers);
                            config.insert(patterns.clone(), json!(others));
                            most
                        }
                        ([first @ ConfigValue::Bool(_), ..], _) => {
                            let any = all.contains(&&ConfigValue::Bool(true));
                            if any { json!(true) } else { value(first) }
                        }
                        ([first, ..], _) if free => value(first),
                        ([one], _) => value(one),
                        ([first, second, ..], _) => {
                            return Err(format!(
                                "PEFT has one `{}` for all layers, and the spec has `{name}: {}` and `{name}: {}`",
                                key.name,
                                value(first),
                                value(second)
                            ));
                        }
                    }
                }
            };
            config.insert(key.name.clone(), written);
        }
    }
    Ok(())
}

/// Exports what an adapter holds besides the method's tensors: heads, tensors of the backbone that train, and trained
/// rows of its tables.
fn export_base_tensors(
    model: &Model,
    (values, base): (&Tensors, &Tensors),
    modules: &[Module],
    before: &str,
    adapter: &mut Adapter,
) -> Result<(), String> {
    let adapted = |module: &str| modules.iter().any(|m| m.name == module);
    let mut whole: Vec<String> = vec![];
    let (mut biases, mut rows) = (vec![], Map::new());
    for param in &model.params {
        let (module, last) = param.name.rsplit_once('.').unwrap_or(("", &param.name));
        let trains = param.trainable != Trainable::No;
        let in_part = |p: &Param| matches!(p.trainable, Trainable::Rows(..));
        match (&param.origin, &param.trainable) {
            (Origin::Method(_), _) => {}
            (Origin::Backbone, Trainable::No) if !values.contains_key(&param.name) => {}
            // PEFT trains a tied table, which embeds tokens and computes logits, only by rows.
            (Origin::Backbone, _) if in_part(param) || trains && tied(model, &param.name) => {
                let stored =
                    values.get(&param.name).ok_or_else(|| format!("the trained values lack `{}`", param.name))?;
                let (start, end) = param.trained_rows().unwrap_or_default();
                adapter.tensors.insert(format!("{before}{module}.{ROWS}"), stored.clone());
                rows.insert(module.to_owned(), json!((start..end).collect::<Vec<u64>>()));
            }
            (Origin::Backbone, _) if last == "bias" && trains && !modules.is_empty() => {
                let stored = Stored::f32(param.shape.clone(), numbers(values, &param.name)?.to_vec());
                let layer = if adapted(module) { ".base_layer" } else { "" };
                adapter.tensors.insert(format!("{before}{module}{layer}.bias"), stored);
                biases.push(module);
            }
            (Origin::Backbone, _) if adapted(module) => {
                return Err(format!(
                    "in PEFT a module with an adapter is otherwise frozen, and the spec trains all of `{}`",
                    param.name
                ));
            }
            (origin, _) => {
                let stored = values.get(&param.name).or(base.get(&param.name)).ok_or_else(|| match origin {
                    Origin::Head => format!(
                        "the head `{}` does not train, so the trained values do not hold it; name `--weights`",
                        param.name
                    ),
                    _ => format!("the trained values lack `{}`", param.name),
                })?;
                adapter.tensors.insert(format!("{before}{}", param.name), stored.clone());
                // PEFT names a head by its outermost module.
                let name =
                    if *origin == Origin::Head { param.name.split('.').next().unwrap_or(module) } else { module };
                if !whole.iter().any(|w| w == name) {
                    whole.push(name.to_owned());
                }
            }
        }
    }
    // A module is saved whole, so its frozen tensors are written, too.
    for module in &whole {
        for param in model.params.iter().filter(|p| p.origin == Origin::Backbone) {
            let key = format!("{before}{}", param.name);
            if param.name.rsplit_once('.').is_some_and(|(m, _)| m == module) && !adapter.tensors.contains_key(&key) {
                let stored = base.get(&param.name).ok_or_else(|| {
                    format!("PEFT saves `{module}` whole, and `{}` does not train; name `--weights`", param.name)
                })?;
                adapter.tensors.insert(key, stored.clone());
            }
        }
    }
    // The biases of a module that is saved whole are part of it.
    biases.retain(|b: &&str| !whole.iter().any(|w| w == b));
    let lacks = |key: &str, what: &str| {
        let kind = model.counterparts.first().map_or("", |c| &c.peft_type);
        format!("{what}, and PEFT's {kind} has no `{key}`")
    };
    if let Some(first) = biases.first() {
        let which = bias_setting(model, modules, &biases);
        let which = which.ok_or_else(|| lacks(BIAS, &format!("the bias of `{first}` trains")))?;
        adapter.config.insert(BIAS.into(), json!(which));
    }
    if let Some(first) = rows.keys().next() {
        if !model.counterparts.iter().flat_map(|c| &c.keys).any(|k| k.name == INDICES) {
            return Err(lacks(INDICES, &format!("rows of `{first}` train")));
        }
        adapter.config.insert(INDICES.into(), Value::Object(rows));
    }
    let saved = if whole.is_empty() { Value::Null } else { json!(whole) };
    adapter.config.insert("modules_to_save".into(), saved);
    Ok(())
}

/// The key for which biases of the base model train.
const BIAS: &str = "bias";

/// The value of [`BIAS`]: for the biases of adapted modules alone, or for others, too. `None` if the method has no such
/// key.
fn bias_setting<'a>(model: &'a Model, modules: &[Module], biases: &[&str]) -> Option<&'a str> {
    let own = modules.iter().filter(|m| m.projections.iter().any(|p| p.bias.is_some()));
    let own: BTreeSet<&str> = own.map(|m| m.name).collect();
    let keys = model.counterparts.iter().flat_map(|c| &c.keys).filter(|k| k.name == BIAS);
    let values = keys.filter_map(|k| if let Rule::Is { values, .. } = &k.rule { Some(values) } else { None }).flatten();
    let words = values.filter_map(|v| if let Constant::Value(ConfigValue::Str(word)) = v { Some(word) } else { None });
    let mut words = words.filter(|word| word.ends_with("_only") == (own == biases.iter().copied().collect()));
    words.find(|word| *word != "none").map(String::as_str)
}

/// Notes for the user about properties of the model that PEFT's format cannot express.
pub fn notes(model: &Model) -> Vec<String> {
    let beyond = |(key, value): (&String, &ConfigValue)| {
        let value = serde_json::to_string(value).unwrap_or_default();
        format!(
            "note: `{key}: {value}` cannot be written in PEFT's format, and PEFT computes something else without it"
        )
    };
    // A property that a counterpart requires of the model is known to PEFT.
    let known = |key: &String| model.applied.iter().any(|a| a.model_values.contains_key(key));
    let mut notes: Vec<String> = model.backbone.extra_args.iter().filter(|(key, _)| !known(key)).map(beyond).collect();
    if !model.task.special_tokens().is_empty() {
        let tokens = list(&model.task.special_tokens().iter().map(String::as_str).collect::<Vec<_>>());
        let trained = |p: &&Param| p.origin == Origin::Backbone && p.shape.len() == 2 && p.trainable != Trainable::No;
        notes.push(match model.params.iter().find(trained) {
            None => format!(
                "note: the rows of {tokens} in the token table do not train, so the adapter does not hold them: PEFT \
                 needs a base model that has them"
            ),
            Some(table) => format!(
                "note: the token table has {rows} rows here, for {tokens}, too: where the base model has fewer, PEFT's \
                 reader needs `model.resize_token_embeddings({rows})` first, and a tokenizer with these tokens",
                rows = table.shape[0]
            ),
        });
    }
    notes
}
