//! IA³. PEFT scales a module's outputs by `ia3_l` [out,1]; of feed-forward modules the inputs, by [1,in]. A fused
//! matrix has one vector for all it computes: 1 where nothing is learnt.

use peft_grammar::model::{Applied, Model, Projection};
use peft_runtime::adapter::Stored;
use serde_json::{Value, json};

use super::{Adapter, Module, Rest, Tensors, applied, modules, numbers};

const METHOD: &str = "ia3";

/// The tensor of the method that scales what this projection computes: the projection's own, or the site's.
fn output_scale(model: &Model, projection: &Projection) -> Option<String> {
    let (site, variable) = projection.path.rsplit_once('.')?;
    let own = applied(model, &projection.path, METHOD).map(|a| format!("{}.output", a.path()));
    let tensor = match variable {
        "k" => "key",
        "v" => "value",
        _ => return own,
    };
    let of_site = applied(model, site, METHOD).map(|a| format!("{}.{tensor}", a.path()));
    own.or(of_site.filter(|name| is_tensor(model, name)))
}

/// The one that scales what it reads.
fn input_scale(model: &Model, projection: &Projection) -> Option<String> {
    let site = projection.path.strip_suffix(".out")?;
    applied(model, site, METHOD).map(|a| format!("{}.hidden", a.path())).filter(|name| is_tensor(model, name))
}

fn is_tensor(model: &Model, name: &str) -> bool {
    model.params.iter().any(|p| p.name == name)
}

fn split(model: &Model) -> (Vec<Module<'_>>, Vec<Module<'_>>) {
    let plain = modules(model, |p| output_scale(model, p).is_some());
    let feedforward = modules(model, |p| input_scale(model, p).is_some());
    (plain, feedforward)
}

/// Two scales of one output are one too many for a file that has room for one.
fn once(model: &Model) -> Result<(), String> {
    let twice = |a: &&Applied| {
        let (site, variable) = a.site.rsplit_once('.').unwrap_or_default();
        a.method == METHOD && matches!(variable, "k" | "v") && applied(model, site, METHOD).is_some()
    };
    match model.applied.iter().find(twice) {
        Some(a) => Err(format!("`ia3` scales `{}` twice: as a projection, and with its site", a.site)),
        None => Ok(()),
    }
}

pub fn export(model: &Model, values: &Tensors) -> Result<Adapter, String> {
    once(model)?;
    let (plain, feedforward) = split(model);
    let mut tensors = Tensors::new();
    for module in &plain {
        let mut scale = vec![1.0; module.outputs as usize];
        for projection in &module.projections {
            let Some(name) = output_scale(model, projection) else { continue };
            scale[module.rows(projection)].copy_from_slice(numbers(values, &name)?);
        }
        tensors.insert(module.key("ia3_l"), Stored::f32(vec![module.outputs, 1], scale));
    }
    for module in &feedforward {
        let name = input_scale(model, module.projections[0]).ok_or("a feed-forward module without a scale")?;
        tensors.insert(module.key("ia3_l"), Stored::f32(vec![1, module.inputs], numbers(values, &name)?.to_vec()));
    }
    let names = |modules: &[Module]| modules.iter().map(|m| m.name.to_string()).collect::<Vec<_>>();
    let targets = [names(&plain), names(&feedforward)].concat();
    let config = json!({
        "peft_type": "IA3",
        "target_modules": targets,
        "feedforward_modules": names(&feedforward),
        "fan_in_fan_out": plain.iter().chain(&feedforward).any(|m| m.conv),
    });
    let Value::Object(config) = config else { unreachable!("an object was written") };
    Ok(Adapter { config, tensors })
}

pub fn import(model: &Model, rest: &mut Rest) -> Result<Tensors, String> {
    if let Some(other) = model.applied.iter().find(|a| a.method != METHOD) {
        return Err(format!("the adapter is IA³, and the spec applies `{}`, too", other.method));
    }
    once(model)?;
    let (plain, feedforward) = split(model);
    let mut values = Tensors::new();
    for module in &plain {
        let scale = rest.take(&module.key("ia3_l"), &[module.outputs, 1])?;
        for projection in &module.projections {
            let own = &scale[module.rows(projection)];
            match output_scale(model, projection) {
                Some(name) => drop(values.insert(name, Stored::f32(vec![own.len() as u64], own.to_vec()))),
                None if own.iter().any(|&x| x != 1.0) => {
                    return Err(format!("the adapter scales `{}`, which `ia3` here does not", projection.path));
                }
                None => {}
            }
        }
    }
    for module in &feedforward {
        let name = input_scale(model, module.projections[0]).ok_or("a feed-forward module without a scale")?;
        let scale = rest.take(&module.key("ia3_l"), &[1, module.inputs])?;
        values.insert(name, Stored::f32(vec![module.inputs], scale.to_vec()));
    }
    Ok(values)
}
