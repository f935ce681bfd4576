//! An adapter that PEFT wrote, as the model's own tensors.

use peft_grammar::counterpart::{Axis, Counterpart, Tensor};
use peft_grammar::model::{Applied, Model, Origin, Param, Trainable};
use peft_runtime::adapter::{Data, Stored};
use serde_json::Value;

use super::config::{self, Config, SAVED};
use super::modules::{self, Module};
use super::names::{INDICES, ROWS, Rest};
use super::residual::Residual;
use super::{Adapter, CONFIG, Tensors, list, tables, tied};

/// An adapter read for a model.
#[derive(Debug, Default)]
pub struct Imported {
    /// The values of the tensors that the model trains.
    pub values: Tensors,
    /// What it takes out of the base model's matrices.
    pub residuals: Vec<Residual>,
    /// Heads that do not train in the spec, and that the adapter brings.
    pub drawn: Tensors,
}

/// The values of the model's own tensors in an adapter that PEFT (or [`super::export`]) wrote. The error says what
/// does not fit.
pub fn import(model: &Model, adapter: &Adapter) -> Result<Imported, String> {
    let config = Config { map: &adapter.config };
    let counterparts = counterparts(model, &config)?;
    config.check_keys(&counterparts)?;
    for applied in &model.applied {
        let Some(counterpart) = modules::of(model, applied) else { continue };
        config.check_values(counterpart, applied, &model.applied)?;
    }
    if let Some(why) = model.applied.iter().find_map(|a| a.unlike.as_ref()) {
        return Err(why.clone());
    }
    let mut rest = Rest::new(model, &counterparts, &adapter.tensors)?;
    let mut imported = Imported::default();
    for module in modules::modules(model)? {
        of_module(&module, &config, &mut rest, &mut imported)?;
    }
    for counterpart in &counterparts {
        tables::import(model, counterpart, &mut rest, &mut imported.values)?;
    }
    promised(model, &config, &rest)?;
    carried(model, &config, &mut rest, &mut imported)?;
    nothing_left(model, &counterparts, &config, &rest)?;
    let values = &imported.values;
    let missing = model.params.iter().filter(|p| p.trainable != Trainable::No && !values.contains_key(&p.name));
    let missing: Vec<&str> = missing.map(|p| p.name.as_str()).collect();
    if !missing.is_empty() {
        return Err(format!("the spec trains what the adapter does not hold: {}", list(&missing)));
    }
    Ok(imported)
}

/// The counterparts at work, which must be of the adapter's type.
fn counterparts<'a>(model: &'a Model, config: &Config) -> Result<Vec<&'a Counterpart>, String> {
    let kind = match config.get("peft_type") {
        Some(Value::String(kind)) => kind.as_str(),
        Some(other) => return Err(format!("`peft_type` of {CONFIG} is {other}, a string was expected")),
        None => return Err(format!("{CONFIG} has no `peft_type`: it is no adapter of PEFT's")),
    };
    let library = peft_grammar::library::counterparts();
    let of_kind: Vec<&str> = library.iter().filter(|(_, t)| t == kind).map(|(m, _)| m.as_str()).collect();
    let at_work = model.applied.iter().filter(|a| a.kind != "model");
    let mut applied: Vec<&str> = at_work.clone().map(|a| a.method.as_str()).collect();
    applied.sort_unstable();
    applied.dedup();
    let own: Vec<&Counterpart> = model.counterparts.iter().filter(|c| c.peft_type == kind).collect();
    let other = |a: &&Applied| !own.iter().any(|c| c.method == a.method);
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

/// What a module's tensors hold for each of its pieces.
fn of_module(module: &Module, config: &Config, rest: &mut Rest, imported: &mut Imported) -> Result<(), String> {
    let counterpart = module.pieces[0].counterpart;
    // Expressions are of names in the model that PEFT trained.
    let held = module.tensors().into_iter().find_map(|t| rest.trained_as(module.name, &t.name));
    let trained_as = held.as_deref().unwrap_or(module.name);
    if let Some(key) = config.leaves_out(trained_as)? {
        return Err(format!(
            "the spec applies `{}` to `{}`, which `{key}` of {CONFIG} leaves out",
            counterpart.method, trained_as
        ));
    }
    let theirs = config.numbers(counterpart, trained_as)?;
    let present = |t: &Tensor| module.pieces.iter().any(|p| p.has(&t.name).is_some() && p.holds(&t.condition));
    let tensors: Vec<&Tensor> = module.tensors().into_iter().filter(|t| present(t)).collect();
    let key = |tensor: &Tensor| format!("{}.{}", module.name, tensor.name);
    // Lengths that only the file knows, and whether they are as its settings say.
    let lengths = lengths(&tensors, rest, &key)?;
    for (name, found, at) in &lengths {
        if let Some(declared) = theirs.get(name).filter(|d| **d != *found as f64) {
            let key = config.key_of(counterpart, name, trained_as)?;
            return Err(format!("`{at}` has {name} {found}, {CONFIG} says {declared} (`{key}`)"));
        }
    }
    let length = |name: &str| lengths.iter().find(|(n, ..)| n == name).map_or(0, |(_, found, _)| *found as usize);
    let mut read = vec![];
    for tensor in &tensors {
        read.push((*tensor, rest.take(&key(tensor), &module.shape(tensor, length))?));
    }
    for (tensor, numbers) in &read {
        nothing_elsewhere(module, tensor, numbers)?;
    }
    // What is on at other modules alone has no effect at this one.
    let off = |t: &&Tensor| !present(t) && t.elsewhere.is_some() && rest.has(&key(t));
    for tensor in module.tensors().into_iter().filter(off).collect::<Vec<_>>() {
        let numbers = rest.take(&key(tensor), &module.shape(tensor, length))?;
        if numbers.iter().any(|x| Some(f64::from(*x)) != tensor.elsewhere) {
            let condition = tensor.condition.as_deref().unwrap_or_default();
            return Err(format!(
                "the adapter has `{}`, and `{}` at `{}` has `{condition}: false`; write `{condition}: true`",
                key(tensor),
                counterpart.method,
                module.pieces[0].projection.path
            ));
        }
    }
    let shared = !side_by_side(module, &read, length);
    if shared {
        for (name, found, _) in &lengths {
            if let Some(piece) = module.pieces.iter().find(|p| p.length(name) as u64 != *found) {
                let (path, own) = (&piece.projection.path, piece.length(name));
                return Err(format!(
                    "the adapter's {name} at `{path}` is {found}, the spec's {own}; write `{name}: {found}`"
                ));
            }
        }
        if let (true, Some((tensor, _))) = (module.pieces.len() > 1, read.iter().find(|(t, _)| !Module::apart(t))) {
            return Err(format!("PEFT has one `{}` for `{}`", tensor.name, module.name));
        }
    }
    for (at, piece) in module.pieces.iter().enumerate() {
        for (tensor, numbers) in &read {
            let Some(own) = piece.has(&tensor.name).filter(|t| piece.holds(&t.condition)) else { continue };
            let ratio = match &own.scale {
                None => 1.0,
                Some(scale) => {
                    let no = |name: String| format!("`{}` has no number `{name}`", piece.applied.method);
                    let (ours, theirs) =
                        (scale.value(&piece.numbers()).map_err(no)?, scale.value(&theirs).map_err(no)?);
                    if ours == 0.0 && theirs != 0.0 {
                        return Err(format!(
                            "`{}` scales its update at `{}` by 0",
                            piece.applied.method, piece.projection.path
                        ));
                    }
                    if ours == theirs { 1.0 } else { (theirs / ours) as f32 }
                }
            };
            let block = module.block(own, at, shared);
            let of_rows = block.rows().flat_map(|first| &numbers[first..][..block.length[1]]).map(|x| x * ratio);
            let length = |axis: &Axis| match axis {
                Axis::Inputs => Some(module.inputs as u64),
                Axis::Outputs => Some(piece.rows.len() as u64),
                Axis::Param(name) => Some(piece.length(name) as u64),
                Axis::One => None,
            };
            let shape = own.axes.iter().filter_map(length).collect();
            imported.values.insert(piece.weight(own), Stored::f32(shape, of_rows.collect()));
        }
    }
    if let Some((part, rank, factor)) = config.residual(counterpart, trained_as)? {
        let tensor = module.pieces[0].projection.weight.clone();
        imported.residuals.push(Residual { tensor, part, rank, factor });
    }
    Ok(())
}

/// The lengths of axes that a parameter gives, as the first tensor with such an axis has them.
fn lengths(
    tensors: &[&Tensor],
    rest: &Rest,
    key: &impl Fn(&Tensor) -> String,
) -> Result<Vec<(String, u64, String)>, String> {
    let mut lengths: Vec<(String, u64, String)> = vec![];
    for tensor in tensors {
        let name = key(tensor);
        let shape = rest.shape(&name)?;
        for (axis, length) in tensor.axes.iter().zip(shape) {
            let Axis::Param(param) = axis else { continue };
            if shape.len() == tensor.axes.len() && !lengths.iter().any(|(n, ..)| n == param) {
                lengths.push((param.clone(), *length, name.clone()));
            }
        }
    }
    Ok(lengths)
}

/// Outputs of a fused matrix that the spec leaves alone are left alone by the adapter.
fn nothing_elsewhere(module: &Module, tensor: &Tensor, numbers: &[f32]) -> Result<(), String> {
    if !Module::spans(tensor) {
        return Ok(());
    }
    for (projection, rows) in module.untouched(&tensor.name) {
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

/// Pieces lie side by side, as an export lays them: each has its own part of what parameters give, and nothing is
/// where the parts of two meet.
fn side_by_side(module: &Module, read: &[(&Tensor, &[f32])], length: impl Fn(&str) -> usize) -> bool {
    let params = |t: &Tensor| {
        t.axes.iter().filter_map(|a| if let Axis::Param(n) = a { Some(n.clone()) } else { None }).collect::<Vec<_>>()
    };
    let whole = read.iter().flat_map(|(t, _)| params(t)).all(|name| module.total(&name) == length(&name));
    module.fused()
        && whole
        && read.iter().all(|(tensor, numbers)| {
            if !Module::spans(tensor) || params(tensor).is_empty() {
                return true;
            }
            (0..module.pieces.len()).all(|at| {
                let block = module.block(tensor, at, false);
                let row = |first: usize| &numbers[first - block.first[1]..][..block.whole[1]];
                let own = block.first[1]..block.first[1] + block.length[1];
                block.rows().all(|first| row(first).iter().enumerate().all(|(c, x)| own.contains(&c) || *x == 0.0))
            })
        })
}

/// Heads that PEFT lists in `modules_to_save` of any classifier, whether the model has them or not.
const USUAL_HEADS: &[&str] = &["classifier", "score", "qa_outputs"];

/// What the configuration says is in the file is there.
fn promised(model: &Model, config: &Config, rest: &Rest) -> Result<(), String> {
    let lacks = |what: String| {
        Err(format!("{what}, and the file holds no tensor of that kind; save it once more by PEFT's `save_pretrained`"))
    };
    for name in config.strings(SAVED)? {
        let plain = rest.plain(name);
        let saved = |tensor: &str| Ok::<_, String>(config::saves(name, tensor)? || config::saves(&plain, tensor)?);
        let mut held = false;
        for (tensor, ..) in rest.left() {
            held |= saved(tensor)?;
        }
        let mut own = !USUAL_HEADS.contains(&name);
        for param in &model.params {
            own |= saved(&rest.plain(&param.name))?;
        }
        if own && !held {
            return lacks(format!("`{SAVED}` of {CONFIG} names `{name}`"));
        }
    }
    match config.get(INDICES) {
        Some(_) if !rest.left().iter().any(|(name, ..)| name.ends_with(ROWS)) => {
            lacks(format!("`{INDICES}` of {CONFIG} is set"))
        }
        _ => Ok(()),
    }
}

/// Heads, tensors of the backbone that train, and rows of its tables.
fn carried(model: &Model, config: &Config, rest: &mut Rest, imported: &mut Imported) -> Result<(), String> {
    let Imported { values, drawn, .. } = imported;
    for param in model.params.iter().filter(|p| !matches!(p.origin, Origin::Method(_))) {
        let module = param.name.strip_suffix(".weight").unwrap_or(&param.name);
        match param.trainable {
            Trainable::No if param.origin == Origin::Head && rest.has(&param.name) => {
                let numbers = rest.take(&param.name, &param.shape)?.to_vec();
                drawn.insert(param.name.clone(), Stored::f32(param.shape.clone(), numbers));
            }
            Trainable::No => {}
            Trainable::Rows(start, end) => {
                let rows = rows_of(config, param, (start, end), rest)?;
                values.insert(param.name.clone(), rows);
            }
            Trainable::All if rest.has(&format!("{module}.{ROWS}")) => {
                let rows = rows_of(config, param, (0, param.shape[0]), rest)?;
                values.insert(param.name.clone(), rows);
            }
            Trainable::All if !rest.has(&param.name) && param.origin == Origin::Backbone => {}
            Trainable::All => {
                let numbers = rest.take(&param.name, &param.shape)?.to_vec();
                if tied(model, &param.name) {
                    // What the logits go through, if it is in the file, must be the same.
                    let copies = rest.drop(|s| s.shape == param.shape && s.data == Data::F32(numbers.clone()));
                    let ties = config.flag("ensure_weight_tying")? && TABLES.iter().any(|t| module.ends_with(t));
                    if copies == 0 && !ties {
                        return Err(format!(
                            "PEFT changes `{}` where tokens are looked up, and not where logits are computed from it: \
                             `ensure_weight_tying` of {CONFIG} is not true, or of no meaning for a table of this name; \
                             train it by `{INDICES}`, which are tied, or untie the model",
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

/// Tables that PEFT's `ensure_weight_tying` knows.
const TABLES: &[&str] = &["embed_tokens", "lm_head"];

/// The rows `start..end` of a table, wherever the file has each.
fn rows_of(config: &Config, table: &Param, (start, end): (u64, u64), rest: &mut Rest) -> Result<Stored, String> {
    let name = &table.name;
    let order = indices(config, table)?;
    let mut sorted = order.clone();
    sorted.sort_unstable();
    if !sorted.iter().copied().eq(start..end) {
        return Err(format!(
            "`{INDICES}` of {CONFIG} are {}, the spec trains rows {start}..{end} of `{name}`; {}",
            ranges(&sorted),
            rows_to_write(&sorted, name)
        ));
    }
    let mut shape = table.shape.clone();
    shape[0] = end - start;
    let rows = rest.take(&format!("{}.{ROWS}", name.strip_suffix(".weight").unwrap_or(name)), &shape)?;
    let width = shape[1..].iter().product::<u64>() as usize;
    let mut own = vec![0.0; rows.len()];
    for (row, index) in rows.chunks(width).zip(&order) {
        own[(index - start) as usize * width..][..width].copy_from_slice(row);
    }
    Ok(Stored::f32(shape, own))
}

/// The rows of a table that PEFT trains, in the order of the file.
fn indices(config: &Config, table: &Param) -> Result<Vec<u64>, String> {
    let module = table.name.strip_suffix(".weight").unwrap_or(&table.name);
    let wrong = || format!("`{INDICES}` of {CONFIG} is no list of indices");
    let found = match config.get(INDICES) {
        None => {
            return Err(format!("the spec trains rows of `{}`, and {CONFIG} has no `{INDICES}`", table.name));
        }
        // Of the table that tokens are looked up in.
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

/// 3, 4, 5, 9 as `3..6, 9`.
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

fn rows_to_write(sorted: &[u64], name: &str) -> String {
    match (sorted.first(), sorted.last()) {
        (Some(first), Some(last)) if last - first + 1 == sorted.len() as u64 => {
            format!("write `rows {first}..{} of \"{name}\"`", last + 1)
        }
        _ => format!("a spec trains one range of rows: {MERGED}"),
    }
}

/// Refuses tensors that nothing has taken, with what a spec would have to say.
fn nothing_left(model: &Model, counterparts: &[&Counterpart], config: &Config, rest: &Rest) -> Result<(), String> {
    let left = rest.left();
    let Some((name, written, shape)) = left.first().copied() else { return Ok(()) };
    let all: Vec<&str> = left.iter().map(|(_, written, _)| *written).collect();
    let head = format!("the adapter holds what the spec does not train: {}", list(&all));
    if shape.contains(&0) {
        return Err(format!("{head}; `{written}` is empty: it was gathered from no rank"));
    }
    // Tensors of the backbone, in one pattern for all layers.
    let base = |name: &str| {
        model.params.iter().find(|p| !matches!(p.origin, Origin::Method(_)) && rest.plain(&p.name) == name)
    };
    if let Some(param) = base(name) {
        let mend = match param.origin {
            Origin::Head => "write `head trainable`".to_owned(),
            _ if every_bias(model, rest) => {
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
        let table = model.params.iter().find(|p| rest.plain(&p.name).strip_suffix(".weight") == Some(module));
        if let Some(table) = table {
            let mut sorted = indices(config, table)?;
            sorted.sort_unstable();
            return Err(format!("{head}; {}", rows_to_write(&sorted, &table.name)));
        }
    }
    // The method's own, at a module that the spec leaves alone.
    for tensor in counterparts.iter().flat_map(|c| &c.tensors) {
        let Some(module) = name.strip_suffix(&format!(".{}", tensor.name)) else { continue };
        let of = |p: &&peft_grammar::model::Projection| rest.plain(&p.weight).strip_suffix(".weight") == Some(module);
        return Err(match model.projections.iter().find(of) {
            Some(projection) => {
                format!("{head}; write `on …, {}` for `{}`", Module::short(projection), projection.path)
            }
            None => format!("{head}; {}", no_site(model, rest, module)),
        });
    }
    // A table that has an adapter of its own form, and one that the spec's model does without.
    if let Some((module, _)) = name.split_once("_embedding_").and_then(|(start, _)| start.rsplit_once('.')) {
        return Err(format!("{head}; {}", no_site(model, rest, module)));
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

/// All biases of the backbone are left, and nothing else of it.
fn every_bias(model: &Model, rest: &Rest) -> bool {
    let frozen = model.params.iter().filter(|p| p.origin == Origin::Backbone && p.trainable == Trainable::No);
    let mut biases: Vec<String> = frozen.filter(|p| p.name.ends_with(".bias")).map(|p| rest.plain(&p.name)).collect();
    biases.sort();
    !biases.is_empty() && rest.left().iter().map(|(name, ..)| *name).eq(biases.iter().map(String::as_str))
}

/// What may be done about a module at which a backbone lets no method work.
fn no_site(model: &Model, rest: &Rest, module: &str) -> String {
    let backbone = &model.backbone.name;
    let name = |p: &peft_grammar::model::Projection| {
        let plain = rest.plain(&p.weight);
        plain.strip_suffix(".weight").unwrap_or(&plain).to_owned()
    };
    let mut alike: Vec<String> = model.projections.iter().map(name).filter(|n| pattern(n) == pattern(module)).collect();
    alike.sort();
    alike.dedup();
    if !alike.is_empty() {
        return format!("the spec's model has {} layers, none of which is that of `{module}`", alike.len());
    }
    format!("`{backbone}` has no site at `{module}`: {MERGED}")
}

/// What may be done with any adapter.
const MERGED: &str = "merge the adapter into its base model by PEFT's `merge_and_unload()` and use that as `--weights`";

/// A name with `*` for the numbers of layers.
fn pattern(name: &str) -> String {
    let part = |p: &str| if p.parse::<u64>().is_ok() { "*".to_owned() } else { p.to_owned() };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}
