//! LoRA and DoRA. PEFT's scale is alpha / r for each module, its B and magnitudes span a fused matrix whole:
//!
//! ```text
//! ours    q += s_q B_q A_q x        v += s_v B_v A_v x
//! PEFT's  c_attn += s B A x,        A = [A_q ; A_v],  B = [B_q 0 ; 0 0 ; 0 s_v/s B_v],  s = s_q
//! ```

use std::collections::BTreeMap;

use peft_grammar::model::{Model, Projection};
use peft_runtime::adapter::Stored;
use serde_json::{Map, Value, json};

use super::{Adapter, Module, Rest, Tensors, applied, float, int, modules, numbers};

/// The update of one projection.
struct Update<'a> {
    path: String,
    rows: std::ops::Range<usize>,
    rank: usize,
    scale: f64,
    projection: &'a Projection,
}

fn updates<'a>(model: &Model, module: &Module<'a>, method: &str) -> Vec<Update<'a>> {
    let update = |projection: &&'a Projection| {
        let applied = applied(model, &projection.path, method)?;
        let rank = int(applied, "rank");
        let scale = float(applied, "alpha") / rank.max(1) as f64;
        let rows = module.rows(projection);
        Some(Update { path: applied.path(), rows, rank, scale, projection })
    };
    let mut all: Vec<Update> = module.projections.iter().filter_map(update).collect();
    all.sort_by_key(|u| u.rows.start);
    all
}

pub fn export(model: &Model, values: &Tensors, dora: bool) -> Result<Adapter, String> {
    let method = if dora { "dora" } else { "lora" };
    let modules = modules(model, |p| applied(model, &p.path, method).is_some());
    let biased = values.keys().any(|n| n.ends_with(".lora.bias"));
    let mut tensors = Tensors::new();
    // By module: rank and alpha.
    let mut settings: Vec<(&str, usize, f64)> = vec![];
    for module in &modules {
        let updates = updates(model, module, method);
        let rank: usize = updates.iter().map(|u| u.rank).sum();
        let scale = updates[0].scale;
        let (inputs, outputs) = (module.inputs as usize, module.outputs as usize);
        let (mut a, mut b) = (Vec::with_capacity(rank * inputs), vec![0.0; outputs * rank]);
        let (mut bias, mut magnitude) = (vec![0.0; outputs], vec![]);
        let mut first = 0;
        for update in &updates {
            a.extend_from_slice(numbers(values, &format!("{}.a", update.path))?);
            let own = numbers(values, &format!("{}.b", update.path))?;
            let ratio = (update.scale / scale) as f32;
            for (row, numbers) in update.rows.clone().zip(own.chunks(update.rank)) {
                let to = &mut b[row * rank + first..][..update.rank];
                to.iter_mut().zip(numbers).for_each(|(to, x)| *to = x * ratio);
            }
            if let Ok(own) = numbers(values, &format!("{}.bias", update.path)) {
                bias[update.rows.clone()].iter_mut().zip(own).for_each(|(to, x)| *to = x * ratio);
            }
            if dora {
                magnitude.extend_from_slice(numbers(values, &format!("{}.magnitude", update.path))?);
            }
            first += update.rank;
        }
        if dora && magnitude.len() != outputs {
            return Err(format!(
                "PEFT's DoRA scales all of `{}`, and the spec applies `dora` to a part of it; apply it to {}",
                module.name,
                module
                    .projections
                    .iter()
                    .map(|p| p.path.rsplit('.').next().unwrap_or(""))
                    .collect::<Vec<_>>()
                    .join(", ")
            ));
        }
        tensors.insert(module.key("lora_A.weight"), Stored::f32(vec![rank as u64, module.inputs], a));
        tensors.insert(module.key("lora_B.weight"), Stored::f32(vec![module.outputs, rank as u64], b));
        if biased {
            tensors.insert(module.key("lora_B.bias"), Stored::f32(vec![module.outputs], bias));
        }
        if dora {
            tensors.insert(module.key("lora_magnitude_vector"), Stored::f32(vec![module.outputs], magnitude));
        }
        settings.push((module.name, rank, scale * rank as f64));
    }
    let (r, alpha) = most_common(&settings);
    let other_ranks = settings.iter().filter(|(_, rank, _)| *rank != r);
    let rank_pattern: BTreeMap<&str, usize> = other_ranks.map(|(name, rank, _)| (*name, *rank)).collect();
    let other_alphas = settings.iter().filter(|(.., a)| *a != alpha);
    let alpha_pattern: BTreeMap<&str, Value> = other_alphas.map(|(name, _, a)| (*name, number(*a))).collect();
    let dropout = model.applied.iter().find(|a| a.method == method).map_or(0.0, |a| float(a, "dropout"));
    let config = json!({
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": number(alpha),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": dropout,
        "target_modules": modules.iter().map(|m| m.name).collect::<Vec<_>>(),
        "fan_in_fan_out": modules.iter().any(|m| m.conv),
        "bias": "none",
        "lora_bias": biased,
        "use_dora": dora,
        "use_rslora": false,
    });
    let Value::Object(config) = config else { unreachable!("an object was written") };
    Ok(Adapter { config, tensors })
}

fn most_common(settings: &[(&str, usize, f64)]) -> (usize, f64) {
    let count = |&(_, rank, alpha): &(&str, usize, f64)| {
        let alike = settings.iter().filter(|(_, r, a)| (*r, *a) == (rank, alpha)).count();
        (alike, (rank, alpha))
    };
    let mut best = (0, (1, 1.0));
    for found in settings.iter().map(count) {
        if found.0 > best.0 {
            best = found;
        }
    }
    best.1
}

/// 32, not 32.0: PEFT writes whole numbers so.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

/// PEFT's settings of LoRA.
struct Config<'a> {
    config: &'a Map<String, Value>,
}

impl Config<'_> {
    /// What a pattern says of the module, else the value for all.
    fn of(&self, pattern: &str, all: &str, module: &str) -> Result<f64, String> {
        let patterns = self.config.get(pattern).and_then(Value::as_object);
        for (key, value) in patterns.into_iter().flatten() {
            if key.chars().any(|c| "^$*+?()[]{}|\\".contains(c)) {
                return Err(format!(
                    "`{pattern}` of {} holds the pattern `{key}`; only plain names are read",
                    super::CONFIG
                ));
            }
            if module == key || module.ends_with(&format!(".{key}")) {
                return value.as_f64().ok_or_else(|| format!("`{pattern}` gives `{key}` no number"));
            }
        }
        self.config.get(all).and_then(Value::as_f64).ok_or_else(|| format!("{} has no `{all}`", super::CONFIG))
    }

    fn flag(&self, key: &str) -> bool {
        self.config.get(key).and_then(Value::as_bool).unwrap_or(false)
    }
}

pub fn import(model: &Model, config: &Map<String, Value>, rest: &mut Rest, dora: bool) -> Result<Tensors, String> {
    let config = Config { config };
    let method = if dora { "dora" } else { "lora" };
    if let Some(other) = model.applied.iter().find(|a| a.method != method) {
        return Err(format!("the adapter is {}, and the spec applies `{}`, too", method, other.method));
    }
    let biased = config.flag("lora_bias");
    let mut values = Tensors::new();
    for module in modules(model, |p| applied(model, &p.path, method).is_some()) {
        let updates = updates(model, &module, method);
        let (a_key, b_key) = (module.key("lora_A.weight"), module.key("lora_B.weight"));
        let Some(&[found, _]) = rest.shape(&a_key) else { return Err(format!("the adapter lacks `{a_key}`")) };
        let r = found as usize;
        let inputs = module.inputs as usize;
        let a = rest.take(&a_key, &[found, module.inputs])?;
        let b = rest.take(&b_key, &[module.outputs, found])?;
        let bias = if biased { Some(rest.take(&module.key("lora_B.bias"), &[module.outputs])?) } else { None };
        let magnitude =
            if dora { Some(rest.take(&module.key("lora_magnitude_vector"), &[module.outputs])?) } else { None };
        let declared = config.of("rank_pattern", "r", module.name)?;
        if declared != r as f64 {
            return Err(format!("`{a_key}` has rank {r}, {} says {declared}", super::CONFIG));
        }
        let alpha = config.of("alpha_pattern", "lora_alpha", module.name)?;
        let scale = if config.flag("use_rslora") { alpha / (r as f64).sqrt() } else { alpha / r as f64 };
        nothing_elsewhere(&module, &updates, b, r, dora)?;
        for (at, update) in updates.iter().enumerate() {
            let columns = columns(&module, &updates, at, b, r)?;
            let ratio = (scale / update.scale) as f32;
            let width = update.rows.len();
            let own_a: Vec<f32> = columns.iter().flat_map(|&c| &a[c * inputs..][..inputs]).copied().collect();
            let own_b = update.rows.clone().flat_map(|row| columns.iter().map(move |&c| b[row * r + c] * ratio));
            let own_b: Vec<f32> = own_b.collect();
            let name = |tensor: &str| format!("{}.{tensor}", update.path);
            values.insert(name("a"), Stored::f32(vec![update.rank as u64, inputs as u64], own_a));
            values.insert(name("b"), Stored::f32(vec![width as u64, update.rank as u64], own_b));
            if let Some(bias) = bias {
                let own = bias[update.rows.clone()].iter().map(|x| x * ratio).collect();
                values.insert(name("bias"), Stored::f32(vec![width as u64], own));
            }
            if let Some(magnitude) = magnitude {
                let own = magnitude[update.rows.clone()].to_vec();
                values.insert(name("magnitude"), Stored::f32(vec![width as u64], own));
            }
        }
    }
    let wants_bias = model.params.iter().find(|p| p.name.ends_with(".lora.bias"));
    if let (false, Some(param)) = (biased, wants_bias) {
        return Err(format!("the adapter has no bias, the spec trains `{}`; write `bias: false`", param.name));
    }
    if let (true, None) = (biased, wants_bias) {
        return Err("the adapter's LoRA has biases (`lora_bias`); write `bias: true` in the spec".into());
    }
    Ok(values)
}

/// Outputs of a fused matrix that the spec leaves alone must be left alone by the adapter.
fn nothing_elsewhere(module: &Module, updates: &[Update], b: &[f32], r: usize, dora: bool) -> Result<(), String> {
    for projection in &module.projections {
        if updates.iter().any(|u| std::ptr::eq(u.projection, *projection)) {
            continue;
        }
        let rows = module.rows(projection);
        if dora || b[rows.start * r..rows.end * r].iter().any(|&x| x != 0.0) {
            let short = projection.path.rsplit('.').next().unwrap_or(&projection.path);
            return Err(format!(
                "the adapter changes `{}`, and the spec does not; write `on …, {short}`",
                projection.path
            ));
        }
    }
    Ok(())
}

/// Which of the adapter's r columns of B are those of update `at`.
fn columns(module: &Module, updates: &[Update], at: usize, b: &[f32], r: usize) -> Result<Vec<usize>, String> {
    let update = &updates[at];
    if module.fused() {
        let total: usize = updates.iter().map(|u| u.rank).sum();
        let first: usize = updates[..at].iter().map(|u| u.rank).sum();
        let own = first..first + update.rank;
        let outside = |row: usize| (0..r).any(|c| !own.contains(&c) && b[row * r + c] != 0.0);
        // As `export` lays them: side by side, each with columns of its own.
        if total == r && !update.rows.clone().any(outside) {
            return Ok(own.collect());
        }
    }
    if update.rank != r {
        let path = &update.projection.path;
        return Err(format!("the adapter's rank at `{path}` is {r}, the spec's {}; write `rank: {r}`", update.rank));
    }
    Ok((0..r).collect())
}
