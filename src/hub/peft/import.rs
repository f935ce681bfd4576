//! Imports an adapter that PEFT wrote as the model's own tensors.

use peft_grammar::counterpart::{Axis, Counterpart, Tensor};
use peft_grammar::model::{AppliedMethod, Model, Origin, Param, Trainable};
use peft_runtime::adapter::{Data, Stored};
use serde_json::Value;

use super::config::{self, Config, SAVED};
use super::modules::{self, Module};
use super::names::{INDICES, ROWS, UnreadTensors};
use super::residual::Residual;
use super::{Adapter, CONFIG, Tensors, list, tables, tied};

/// An adapter that was read for a model.
#[derive(Debug, Default)]
pub struct Imported {
    /// The values of the tensors that the model trains.
    pub values: Tensors,
    /// The residuals that it subtracts from the base model's matrices.
    pub residuals: Vec<Residual>,
    /// Heads that do not train in the spec and that the adapter holds.
    pub drawn: Tensors,
}

/// Reads the values of the model's own tensors from an adapter that PEFT or [`super::export`] wrote.
///
/// # Errors
///
/// What in the adapter does not fit the model, and how to change the spec.
pub fn import(model: &Model, adapter: &Adapter) -> Result<Imported, String> {
    let config = Config { map: &adapter.config };
    let counterparts = counterparts(model, &config)?;
    config.check_keys(&counterparts)?;
    for applied in &model.applied {
        let Some(counterpart) = modules::counterpart_of(model, applied) else { continue };
        config.check_values(counterpart, applied, &model.applied)?;
    }
    if let Some(why) = model.applied.iter().find_map(|a| a.peft_obstacle.as_ref()) {
        return Err(why.clone());
    }
    let mut unread = UnreadTensors::new(model, &counterparts, &adapter.tensors)?;
    let mut imported = Imported::default();
    for module in modules::modules(model)? {
        import_module(&module, &config, &mut unread, &mut imported)?;
    }
    for counterpart in &counterparts {
        tables::import(model, counterpart, &mut unread, &mut imported.values)?;
    }
    check_declared(model, &config, &unread)?;
    import_base_tensors(model, &config, &mut unread, &mut imported)?;
    check_all_read(model, &counterparts, &config, &unread)?;
    let values = &imported.values;
    let missing = model.params.iter().filter(|p| p.trainable != Trainable::No && !values.contains_key(&p.name));
    let missing: Vec<&str> = missing.map(|p| p.name.as_str()).collect();
    if !missing.is_empty() {
        return Err(format!("the spec trains what the adapter does not hold: {}", list(&missing)));
    }
    Ok(imported)
}

/// The counterparts of the methods that the spec applies, which must be of the adapter's type.
fn counterparts<'a>(model: &'a Model, config: &Config) -> Result<Vec<&'a Counterpart>, String> {
    let kind = match config.get("peft_type") {
        Some(Value::String(kind)) => kind.as_str(),
        Some(other) => return Err(format!("`peft_type` of {CONFIG} is {other}, but should be a string")),
        None => return Err(format!("{CONFIG} has no `peft_type`: PEFT did not write this adapter")),
    };
    let library = peft_grammar::library::counterparts();
    let of_kind: Vec<&str> = library.iter().filter(|(_, t)| t == kind).map(|(m, _)| m.as_str()).collect();
    let at_work = model.applied.iter().filter(|a| a.kind != "model");
    let mut applied: Vec<&str> = at_work.clone().map(|a| a.method.as_str()).collect();
    applied.sort_unstable();
    applied.dedup();
    let own: Vec<&Counterpart> = model.counterparts.iter().filter(|c| c.peft_type == kind).collect();
    let other = |a: &&AppliedMethod| !own.iter().any(|c| c.method == a.method);
    match (own.is_empty(), of_kind.is_empty(), at_work.clone().find(other)) {
        (true, true, _) => {
            let mut known: Vec<&str> = library.iter().map(|(_, t)| t.as_str()).collect();
            known.sort_unstable();
            known.dedup();
            Err(format!("adapters of PEFT's type {kind} are not read here; {} are", known.join(", ")))
        }
        (true, false, _) if applied.is_empty() => Err(format!(
            "the adapter is of PEFT's type {kind}, and the spec applies no method; apply {}",
            list(&of_kind)
        )),
        (true, false, _) => Err(format!(
            "the adapter is of PEFT's type {kind} (`peft_type`), which is {}; the spec applies {}",
            list(&of_kind),
            list(&applied)
        )),
        (false, _, Some(other)) => {
            Err(format!("the adapter is of PEFT's type {kind}, and the spec applies `{}`, too", other.method))
        }
        (false, _, None) => Ok(own),
    }
}

/// Reads a module's tensors and splits them among its applications.
fn import_module(
    module: &Module,
    config: &Config,
    unread: &mut UnreadTensors,
    imported: &mut Imported,
) -> Result<(), String> {
    let counterpart = module.applications[0].counterpart;
    // Expressions in the configuration refer to names in the model that PEFT trained.
    let held = module.tensors().into_iter().find_map(|t| unread.trained_as(module.name, &t.name));
    let trained_as = held.as_deref().unwrap_or(module.name);
    if let Some(key) = config.key_excluding(trained_as)? {
        return Err(format!(
            "the spec applies `{}` to `{}`, which `{key}` of {CONFIG} leaves out",
            counterpart.method, trained_as
        ));
    }
    let theirs = config.numbers(counterpart, trained_as)?;
    let present = |t: &Tensor| module.applications.iter().any(|p| p.has(&t.name).is_some() && p.holds(&t.condition));
    let tensors: Vec<&Tensor> = module.tensors().into_iter().filter(|t| present(t)).collect();
    let key = |tensor: &Tensor| format!("{}.{}", module.name, tensor.name);
    // Lengths that the tensors' shapes determine have to agree with the settings.
    let lengths = lengths(&tensors, unread, &key)?;
    for (name, found, at) in &lengths {
        if let Some(declared) = theirs.get(name).filter(|d| **d != *found as f64) {
            let key = config.key_of(counterpart, name, trained_as)?;
            return Err(format!("`{at}` has {name} {found}, and `{key}` of {CONFIG} is {declared}"));
        }
    }
    let length = |name: &str| lengths.iter().find(|(n, ..)| n == name).map_or(0, |(_, found, _)| *found as usize);
    let mut read = vec![];
    for tensor in &tensors {
        read.push((*tensor, unread.take(&key(tensor), &module.shape(tensor, length))?));
    }
    for (tensor, numbers) in &read {
        check_unadapted(module, tensor, numbers)?;
    }
    // A tensor that this module's applications do not have must hold the values without effect.
    let off = |t: &&Tensor| !present(t) && t.elsewhere.is_some() && unread.has(&key(t));
    for tensor in module.tensors().into_iter().filter(off).collect::<Vec<_>>() {
        let numbers = unread.take(&key(tensor), &module.shape(tensor, length))?;
        if numbers.iter().any(|x| Some(f64::from(*x)) != tensor.elsewhere) {
            let condition = tensor.condition.as_deref().unwrap_or_default();
            return Err(format!(
                "the adapter has `{}`, and `{}` at `{}` has `{condition}: false`; write `{condition}: true`",
                key(tensor),
                counterpart.method,
                module.applications[0].projection.path
            ));
        }
    }
    let shared = !is_block_diagonal(module, &read, length);
    if shared {
        for (name, found, _) in &lengths {
            if let Some(application) = module.applications.iter().find(|p| p.length(name) as u64 != *found) {
                let (path, own) = (&application.projection.path, application.length(name));
                return Err(format!(
                    "the adapter's {name} at `{path}` is {found}, the spec's {own}; write `{name}: {found}`"
                ));
            }
        }
        if let (true, Some((tensor, _))) =
            (module.applications.len() > 1, read.iter().find(|(t, _)| !Module::is_partitioned(t)))
        {
            return Err(format!("PEFT has one `{}` for `{}`", tensor.name, module.name));
        }
    }
    for (at, application) in module.applications.iter().enumerate() {
        for (tensor, numbers) in &read {
            let Some(own) = application.has(&tensor.name).filter(|t| application.holds(&t.condition)) else { continue };
            let ratio = match &own.scale {
                None => 1.0,
                Some(scale) => {
                    let no = |name: String| format!("`{}` has no number `{name}`", application.applied.method);
                    let (ours, theirs) =
                        (scale.value(&application.numbers()).map_err(no)?, scale.value(&theirs).map_err(no)?);
                    if ours == 0.0 && theirs != 0.0 {
                        return Err(format!(
                            "`{}` scales its update at `{}` by 0",
                            application.applied.method, application.projection.path
                        ));
                    }
                    if ours == theirs { 1.0 } else { (theirs / ours) as f32 }
                }
            };
            let block = module.block(own, at, shared);
            let of_rows = block.rows().flat_map(|first| &numbers[first..][..block.length[1]]).map(|x| x * ratio);
            let length = |axis: &Axis| match axis {
                Axis::Inputs => Some(module.inputs as u64),
                Axis::Outputs => Some(application.rows.len() as u64),
                Axis::Param(name) => Some(application.length(name) as u64),
                Axis::One => None,
            };
            let shape = own.axes.iter().filter_map(length).collect();
            imported.values.insert(application.weight(own), Stored::f32(shape, of_rows.collect()));
        }
    }
    if let Some((part, rank, factor)) = config.residual(counterpart, trained_as)? {
        let tensor = module.applications[0].projection.weight.clone();
        imported.residuals.push(Residual { tensor, part, rank, factor });
    }
    Ok(())
}

/// The lengths of the axes that parameters determine, from the first tensor with each: parameter, length, name of the
/// tensor.
fn lengths(
    tensors: &[&Tensor],
    unread: &UnreadTensors,
    key: &impl Fn(&Tensor) -> String,
) -> Result<Vec<(String, u64, String)>, String> {
    let mut lengths: Vec<(String, u64, String)> = vec![];
    for tensor in tensors {
        let name = key(tensor);
        let shape = unread.shape(&name)?;
        for (axis, length) in tensor.axes.iter().zip(shape) {
            let Axis::Param(param) = axis else { continue };
            if shape.len() == tensor.axes.len() && !lengths.iter().any(|(n, ..)| n == param) {
                lengths.push((param.clone(), *length, name.clone()));
            }
        }
    }
    Ok(lengths)
}

/// Checks that the adapter does not change the outputs of a fused matrix that the spec does not adapt.
fn check_unadapted(module: &Module, tensor: &Tensor, numbers: &[f32]) -> Result<(), String> {
    if !Module::has_output_axis(tensor) {
        return Ok(());
    }
    for (projection, rows) in module.unadapted(&tensor.name) {
        let width = numbers.len() / module.outputs;
        let own = &numbers[rows.start * width..rows.end * width];
        let alone = tensor.elsewhere.is_some_and(|e| own.iter().all(|x| *x == e as f32));
        if !alone {
            return Err(format!(
                "the adapter changes `{}`, and the spec does not; write `on …, {}`",
                projection.path,
                Module::short(projection)
            ));
        }
    }
    Ok(())
}

/// Whether the tensors have the layout of an export: each application has its own part of the axes of parameters, and
/// tensors with an output axis are block diagonal.
fn is_block_diagonal(module: &Module, read: &[(&Tensor, &[f32])], length: impl Fn(&str) -> usize) -> bool {
    let params = |t: &Tensor| {
        t.axes.iter().filter_map(|a| if let Axis::Param(n) = a { Some(n.clone()) } else { None }).collect::<Vec<_>>()
    };
    let whole = read.iter().flat_map(|(t, _)| params(t)).all(|name| module.total(&name) == length(&name));
    module.fused()
        && whole
        && read.iter().all(|(tensor, numbers)| {
            if !Module::has_output_axis(tensor) || params(tensor).is_empty() {
                return true;
            }
            (0..module.applications.len()).all(|at| {
                let block = module.block(tensor, at, false);
                let row = |first: usize| &numbers[first - block.first[1]..][..block.whole[1]];
                let own = block.first[1]..block.first[1] + block.length[1];
                block.rows().all(|first| row(first).iter().enumerate().all(|(c, x)| own.contains(&c) || *x == 0.0))
            })
        })
}

/// Heads that PEFT lists in `modules_to_save` for every classifier, also for models without them.
const COMMON_HEADS: &[&str] = &["classifier", "score", "qa_outputs"];

/// Checks that the file holds the saved modules and the trained rows that the configuration declares.
fn check_declared(model: &Model, config: &Config, unread: &UnreadTensors) -> Result<(), String> {
    let lacks = |what: String| {
        Err(format!("{what}, and the file holds no tensor of that kind; save it once more by PEFT's `save_pretrained`"))
    };
    for name in config.strings(SAVED)? {
        let plain = unread.plain(name);
        let saved = |tensor: &str| Ok::<_, String>(config::covers(name, tensor)? || config::covers(&plain, tensor)?);
        let mut held = false;
        for (tensor, ..) in unread.remaining() {
            held |= saved(tensor)?;
        }
        let mut own = !COMMON_HEADS.contains(&name);
        for param in &model.params {
            own |= saved(&unread.plain(&param.name))?;
        }
        if own && !held {
            return lacks(format!("`{SAVED}` of {CONFIG} names `{name}`"));
        }
    }
    match config.get(INDICES) {
        Some(_) if !unread.remaining().iter().any(|(name, ..)| name.ends_with(ROWS)) => {
            lacks(format!("`{INDICES}` of {CONFIG} is set"))
        }
        _ => Ok(()),
    }
}

/// Reads heads, tensors of the backbone that train, and trained rows of its tables.
fn import_base_tensors(
    model: &Model,
    config: &Config,
    unread: &mut UnreadTensors,
    imported: &mut Imported,
) -> Result<(), String> {
    let Imported { values, drawn, .. } = imported;
    for param in model.params.iter().filter(|p| !matches!(p.origin, Origin::Method(_))) {
        let module = param.name.strip_suffix(".weight").unwrap_or(&param.name);
        match param.trainable {
            Trainable::No if param.origin == Origin::Head && unread.has(&param.name) => {
                let numbers = unread.take(&param.name, &param.shape)?.to_vec();
                drawn.insert(param.name.clone(), Stored::f32(param.shape.clone(), numbers));
            }
            Trainable::No => {}
            Trainable::Rows(start, end) => {
                let rows = import_rows(config, param, (start, end), unread)?;
                values.insert(param.name.clone(), rows);
            }
            Trainable::All if unread.has(&format!("{module}.{ROWS}")) => {
                let rows = import_rows(config, param, (0, param.shape[0]), unread)?;
                values.insert(param.name.clone(), rows);
            }
            Trainable::All if !unread.has(&param.name) && param.origin == Origin::Backbone => {}
            Trainable::All => {
                let numbers = unread.take(&param.name, &param.shape)?.to_vec();
                if tied(model, &param.name) {
                    // A copy of the tied table for the logits, if the file holds one, must be equal.
                    let copies = unread.drop(|s| s.shape == param.shape && s.data == Data::F32(numbers.clone()));
                    let ties = config.flag("ensure_weight_tying")? && TABLES.iter().any(|t| module.ends_with(t));
                    if copies == 0 && !ties {
                        return Err(format!(
                            "PEFT changes `{}` where tokens are embedded, and not where logits are computed from it: \
                             `ensure_weight_tying` of {CONFIG} is not true, or has no effect on a table of this name; \
                             train it with `{INDICES}`, which are tied, or untie the model",
                            param.name
                        ));
                    }
                }
                values.insert(param.name.clone(), Stored::f32(param.shape.clone(), numbers));
            }
        }
    }
    Ok(())
}

/// Tables on which PEFT's `ensure_weight_tying` has an effect.
const TABLES: &[&str] = &["embed_tokens", "lm_head"];

/// The rows `start..end` of a table, brought to ascending order.
fn import_rows(
    config: &Config,
    table: &Param,
    (start, end): (u64, u64),
    unread: &mut UnreadTensors,
) -> Result<Stored, String> {
    let name = &table.name;
    let order = indices(config, table)?;
    let mut sorted = order.clone();
    sorted.sort_unstable();
    if !sorted.iter().copied().eq(start..end) {
        return Err(format!(
            "`{INDICES}` of {CONFIG} are {}, and the spec trains rows {start}..{end} of `{name}`; {}",
            ranges(&sorted),
            rows_to_write(&sorted, name)
        ));
    }
    let mut shape = table.shape.clone();
    shape[0] = end - start;
    let rows = unread.take(&format!("{}.{ROWS}", name.strip_suffix(".weight").unwrap_or(name)), &shape)?;
    let width = shape[1..].iter().product::<u64>() as usize;
    let mut own = vec![0.0; rows.len()];
    for (row, index) in rows.chunks(width).zip(&order) {
        own[(index - start) as usize * width..][..width].copy_from_slice(row);
    }
    Ok(Stored::f32(shape, own))
}

/// The indices of the rows of a table that PEFT trains, in the order of the file.
fn indices(config: &Config, table: &Param) -> Result<Vec<u64>, String> {
    let module = table.name.strip_suffix(".weight").unwrap_or(&table.name);
    let wrong = || format!("`{INDICES}` of {CONFIG} is not a list of indices");
    let found = match config.get(INDICES) {
        None => {
            return Err(format!("the spec trains rows of `{}`, and {CONFIG} has no `{INDICES}`", table.name));
        }
        // A list is for the token embedding.
        Some(list @ Value::Array(_)) => list,
        Some(Value::Object(of)) => match of.iter().find(|(name, _)| module.ends_with(name.as_str())) {
            Some((_, list)) => list,
            None => {
                let names: Vec<&str> = of.keys().map(String::as_str).collect();
                return Err(format!("`{INDICES}` of {CONFIG} are of {}, not of `{module}`", list(&names)));
            }
        },
        Some(_) => return Err(wrong()),
    };
    let list = found.as_array().ok_or_else(wrong)?;
    list.iter().map(|v| v.as_u64().ok_or_else(wrong)).collect()
}

/// Sorted indices as ranges: 3, 4, 5, 9 as `3..6, 9`.
fn ranges(sorted: &[u64]) -> String {
    let mut runs: Vec<(u64, u64)> = vec![];
    for &index in sorted {
        match runs.last_mut() {
            Some((_, end)) if *end == index => *end += 1,
            _ => runs.push((index, index + 1)),
        }
    }
    let text: Vec<String> =
        runs.iter().map(|&(s, e)| if e == s + 1 { s.to_string() } else { format!("{s}..{e}") }).collect();
    text.join(", ")
}

/// The rule of a spec that trains these rows, if they are one range.
fn rows_to_write(sorted: &[u64], name: &str) -> String {
    match (sorted.first(), sorted.last()) {
        (Some(first), Some(last)) if last - first + 1 == sorted.len() as u64 => {
            format!("write `rows {first}..{} of \"{name}\"`", last + 1)
        }
        _ => format!("a spec trains one range of rows: {MERGE_FIRST}"),
    }
}

/// Checks that all tensors have been read. The error for others names what the spec would have to declare.
fn check_all_read(
    model: &Model,
    counterparts: &[&Counterpart],
    config: &Config,
    unread: &UnreadTensors,
) -> Result<(), String> {
    let left = unread.remaining();
    let Some((name, written, shape)) = left.first().copied() else { return Ok(()) };
    let all: Vec<&str> = left.iter().map(|(_, written, _)| *written).collect();
    let head = format!("the adapter holds what the spec does not train: {}", list(&all));
    if shape.contains(&0) {
        return Err(format!("{head}; `{written}` is empty: it was saved from a sharded model without gathering it"));
    }
    // Tensors of the backbone are suggested as patterns over all layers.
    let base = |name: &str| {
        model.params.iter().find(|p| !matches!(p.origin, Origin::Method(_)) && unread.plain(&p.name) == name)
    };
    if let Some(param) = base(name) {
        let mend = match param.origin {
            Origin::Head => "write `head trainable`".to_owned(),
            _ if only_biases_remain(model, unread) => {
                "these are all biases of its base model: write `bitfit()` beside the method".to_owned()
            }
            _ => {
                let mut patterns: Vec<String> =
                    left.iter().filter_map(|(n, ..)| Some(pattern(&base(n)?.name))).collect();
                patterns.sort();
                patterns.dedup();
                let lines: Vec<String> = patterns.iter().take(6).map(|p| format!("`train \"{p}\"`")).collect();
                format!("write {} in the `tune` block", lines.join(", "))
            }
        };
        return Err(format!("{head}; {mend}"));
    }
    if let Some(module) = name.strip_suffix(&format!(".{ROWS}")) {
        let table = model.params.iter().find(|p| unread.plain(&p.name).strip_suffix(".weight") == Some(module));
        if let Some(table) = table {
            let mut sorted = indices(config, table)?;
            sorted.sort_unstable();
            return Err(format!("{head}; {}", rows_to_write(&sorted, &table.name)));
        }
    }
    // A tensor of the method at a module that the spec does not adapt.
    for tensor in counterparts.iter().flat_map(|c| &c.tensors) {
        let Some(module) = name.strip_suffix(&format!(".{}", tensor.name)) else { continue };
        let of = |p: &&peft_grammar::model::Projection| unread.plain(&p.weight).strip_suffix(".weight") == Some(module);
        return Err(match model.projections.iter().find(of) {
            Some(projection) => {
                format!("{head}; write `on …, {}` for `{}`", Module::short(projection), projection.path)
            }
            None => format!("{head}; {}", no_site_message(model, unread, module)),
        });
    }
    // An adapter of an embedding table has tensors of its own names.
    if let Some((module, _)) = name.split_once("_embedding_").and_then(|(start, _)| start.rsplit_once('.')) {
        return Err(format!("{head}; {}", no_site_message(model, unread, module)));
    }
    let table = model.params.iter().find(|p| p.shape == shape && tied(model, &p.name));
    Err(match table {
        Some(table) => {
            let name = &table.name;
            format!(
                "{head}; logits go through `{name}` in this spec: merge the adapter into its base model by PEFT's \
                 `merge_and_unload()`, save that with `tie_word_embeddings` false, and use it as `--weights`, with \
                 `tied: false` among the model's arguments"
            )
        }
        None => head,
    })
}

/// Whether exactly the frozen biases of the backbone remain.
fn only_biases_remain(model: &Model, unread: &UnreadTensors) -> bool {
    let frozen = model.params.iter().filter(|p| p.origin == Origin::Backbone && p.trainable == Trainable::No);
    let mut biases: Vec<String> = frozen.filter(|p| p.name.ends_with(".bias")).map(|p| unread.plain(&p.name)).collect();
    biases.sort();
    !biases.is_empty() && unread.remaining().iter().map(|(name, ..)| *name).eq(biases.iter().map(String::as_str))
}

/// The suggestion for a tensor at a module that has no site in the backbone.
fn no_site_message(model: &Model, unread: &UnreadTensors, module: &str) -> String {
    let backbone = &model.backbone.name;
    let name = |p: &peft_grammar::model::Projection| {
        let plain = unread.plain(&p.weight);
        plain.strip_suffix(".weight").unwrap_or(&plain).to_owned()
    };
    let mut alike: Vec<String> = model.projections.iter().map(name).filter(|n| pattern(n) == pattern(module)).collect();
    alike.sort();
    alike.dedup();
    if !alike.is_empty() {
        return format!("the spec's model has {} layers, none of which is that of `{module}`", alike.len());
    }
    format!("`{backbone}` has no site at `{module}`: {MERGE_FIRST}")
}

/// The suggestion that works for every adapter.
const MERGE_FIRST: &str =
    "merge the adapter into its base model by PEFT's `merge_and_unload()` and use that as `--weights`";

/// A name with `*` in place of the numbers of layers.
fn pattern(name: &str) -> String {
    let part = |p: &str| if p.parse::<u64>().is_ok() { "*".to_owned() } else { p.to_owned() };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}
