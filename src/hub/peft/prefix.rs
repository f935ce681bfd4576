//! Prefix-tuning. PEFT keeps `prompt_embeddings` [l, L·2·d]: for each layer the key, then the value, of each
//! position; the MLP they came from is gone.

use peft_grammar::model::{Applied, ConfigValue, Model};
use peft_runtime::adapter::Stored;
use serde_json::{Value, json};

use super::{Adapter, Rest, Tensors, int, numbers};

const METHOD: &str = "prefix";
const EMBEDDINGS: &str = "prompt_embeddings";

/// Every layer's prefix, all of one length.
struct Prefixes<'a> {
    layers: Vec<&'a Applied>,
    length: usize,
    heads: i64,
}

fn prefixes(model: &Model) -> Result<Prefixes<'_>, String> {
    let layers: Vec<&Applied> = model.applied.iter().filter(|a| a.method == METHOD).collect();
    let length = layers.first().map_or(0, |a| int(a, "length"));
    if layers.iter().any(|a| int(a, "length") != length) {
        return Err("PEFT's prefixes are of one length in all layers".into());
    }
    let whole = |keys: &[&str]| keys.iter().find_map(|k| integer(model.backbone.config.get(*k)?));
    let count = whole(&["num_hidden_layers", "n_layer"]).unwrap_or(layers.len() as i64);
    if layers.len() as i64 != count {
        return Err(format!("PEFT puts a prefix into every layer, and the spec into {} of {count}", layers.len()));
    }
    let heads = whole(&["num_attention_heads", "n_head"]).unwrap_or(1);
    if whole(&["num_key_value_heads"]).is_some_and(|shared| shared != heads) {
        return Err("PEFT's prefix has a key for each key head, this one for each query head".into());
    }
    // transformers counts the tokens' positions on from the keys before them, in every backbone.
    let first = integer_of(model, "first_position");
    if first != length as i64 {
        return Err(format!(
            "transformers counts positions on from a prefix: they begin at {length} there, at {first} in this spec; \
             train with `first_position: {length}` among the model's arguments"
        ));
    }
    Ok(Prefixes { layers, length, heads })
}

fn integer(value: &ConfigValue) -> Option<i64> {
    if let ConfigValue::Int(n) = value { Some(*n) } else { None }
}

fn integer_of(model: &Model, key: &str) -> i64 {
    model.backbone.beyond.get(key).and_then(integer).unwrap_or(0)
}

pub fn export(model: &Model, values: &Tensors) -> Result<Adapter, String> {
    let Prefixes { layers, length, heads } = prefixes(model)?;
    let mut parts = vec![];
    for applied in &layers {
        for tensor in ["key", "value"] {
            parts.push(numbers(values, &format!("{}.{tensor}", applied.path()))?);
        }
    }
    let hidden = parts.first().map_or(0, |p| p.len() / length.max(1));
    let table: Vec<f32> =
        (0..length).flat_map(|t| parts.iter().flat_map(move |p| &p[t * hidden..][..hidden])).copied().collect();
    let width = (parts.len() * hidden) as u64;
    let config = json!({
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": length,
        "num_layers": layers.len(),
        "num_attention_heads": heads,
        "token_dim": hidden,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": hidden,
        // What is kept is what an MLP would have made.
        "prefix_projection": false,
    });
    let Value::Object(config) = config else { unreachable!("an object was written") };
    let tensors = Tensors::from([(EMBEDDINGS.to_string(), Stored::f32(vec![length as u64, width], table))]);
    Ok(Adapter { config, tensors })
}

pub fn import(model: &Model, rest: &mut Rest) -> Result<Tensors, String> {
    if let Some(other) = model.applied.iter().find(|a| a.method != METHOD) {
        return Err(format!("the adapter is a prefix, and the spec applies `{}`, too", other.method));
    }
    if !model.replaced.is_empty() {
        return Err("an adapter holds the prefix itself, not the MLP it came from; set `prefix.direct=true`".into());
    }
    let Prefixes { layers, length, .. } = prefixes(model)?;
    let found = rest.shape(EMBEDDINGS).unwrap_or_default().to_vec();
    let names: Vec<String> =
        layers.iter().flat_map(|a| ["key", "value"].map(|t| format!("{}.{t}", a.path()))).collect();
    let param = model.params.iter().find(|p| Some(&p.name) == names.first()).ok_or("the spec has no prefix")?;
    let hidden = param.shape[1] as usize;
    let width = names.len() * hidden;
    if found != [length as u64, width as u64] {
        return Err(format!("the adapter's prefix is {found:?}, the spec's [{length}, {width}]"));
    }
    let table = rest.take(EMBEDDINGS, &found)?;
    let part = |(at, name): (usize, String)| {
        let own = (0..length).flat_map(|t| &table[t * width + at * hidden..][..hidden]).copied().collect();
        (name, Stored::f32(vec![length as u64, hidden as u64], own))
    };
    Ok(names.into_iter().enumerate().map(part).collect())
}
