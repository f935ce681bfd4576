//! Names of an adapter's tensors, as different writers leave them.

use std::collections::BTreeMap;

use peft_grammar::counterpart::Counterpart;
use peft_grammar::model::Model;
use peft_runtime::adapter::{Data, Stored};

use super::Tensors;

/// Parts of a name that wrappers put in front of the model's own: PEFT, compilation, sharding, sentence-transformers.
const WRAPPERS: &[&str] = &["base_model", "model", "module", "auto_model", "_orig_mod", "_forward_module", "0"];
/// Those that may stand anywhere in it.
const INSIDE: &[&str] = &["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"];
/// The key that names rows of a table that train, and what their tensor is called.
pub const INDICES: &str = "trainable_token_indices";
pub const ROWS: &str = "token_adapter.trainable_tokens_delta";

/// A tensor as its file calls it.
struct Entry<'a> {
    written: &'a str,
    stored: &'a Stored,
}

/// What of an adapter has not been read yet, under names without prefixes.
pub struct Rest<'a> {
    entries: BTreeMap<String, Entry<'a>>,
    prefix: String,
}

/// A tensor in the words of a message, with its shape.
fn wrong(name: &str, found: &[u64], wanted: &[u64]) -> String {
    match found.contains(&0) {
        true => format!(
            "`{name}` is empty ({found:?}): it was gathered from no rank; save it once more inside \
             `deepspeed.zero.GatheredParameters`, or by a Trainer with `stage3_gather_16bit_weights_on_model_save`"
        ),
        false => format!("`{name}` is {found:?} in the adapter, the spec wants {wanted:?}"),
    }
}

impl<'a> Rest<'a> {
    /// Reads names; nothing is taken yet. The error is two tensors of one name, such as those of two adapters.
    pub fn new(model: &Model, counterparts: &[&Counterpart], tensors: &'a Tensors) -> Result<Self, String> {
        let mut known: Vec<&str> = counterparts.iter().flat_map(|c| &c.tensors).map(|t| t.name.as_str()).collect();
        known.push(ROWS);
        let mut rest = Rest { entries: BTreeMap::new(), prefix: model.backbone.checkpoint.prefix.clone() };
        let own: Vec<String> = model.params.iter().map(|p| rest.plain(&p.name)).collect();
        for (written, stored) in tensors {
            // PEFT's copy of what is there in its trained form, too.
            if written.split('.').any(|part| part == "original_module") {
                continue;
            }
            let name = rest.plain(&without_adapter(written, &known));
            let (name, copy) = saved(&name, &own);
            if let Some(first) = rest.entries.get(&name) {
                let of_one = copy || first.written.contains(".modules_to_save.");
                match (of_one, stored == first.stored) {
                    (true, true) => continue,
                    (true, false) => {
                        return Err(format!("`{}` and `{written}` are one tensor, and differ", first.written));
                    }
                    (false, _) => {
                        return Err(format!(
                            "`{}` and `{written}` are one tensor of two adapters; save one of them by itself: PEFT's \
                             `save_pretrained(…, selected_adapters=[…])`",
                            first.written
                        ));
                    }
                }
            }
            rest.entries.insert(name, Entry { written, stored });
        }
        Ok(rest)
    }

    /// A name without what wrappers and heads put in front of the backbone's own.
    pub fn plain(&self, name: &str) -> String {
        let mut parts: Vec<&str> = name.split('.').filter(|p| !INSIDE.contains(p)).collect();
        let prefix: Vec<&str> = self.prefix.split('.').filter(|p| !p.is_empty()).collect();
        loop {
            if !prefix.is_empty() && parts.starts_with(&prefix) && parts.len() > prefix.len() {
                parts.drain(..prefix.len());
            } else if parts.len() > 1 && WRAPPERS.contains(&parts[0]) {
                parts.remove(0);
            } else {
                return parts.join(".");
            }
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(&self.plain(name))
    }

    /// The shape of a tensor that must be there. The error names the nearest that is.
    pub fn shape(&self, name: &str) -> Result<&'a [u64], String> {
        match self.entries.get(&self.plain(name)) {
            Some(entry) if entry.stored.shape.contains(&0) => Err(wrong(entry.written, &entry.stored.shape, &[])),
            Some(entry) => Ok(&entry.stored.shape),
            None => Err(self.lacks(name)),
        }
    }

    fn lacks(&self, name: &str) -> String {
        let plain = self.plain(name);
        let near = self.entries.iter().map(|(n, e)| (strsim::normalized_levenshtein(n, &plain), e.written));
        match near.max_by(|a, b| a.0.total_cmp(&b.0)) {
            Some((_, near)) => format!("the adapter lacks `{name}`; the nearest that it holds is `{near}`"),
            None => format!("the adapter lacks `{name}`, and holds nothing that has not been read"),
        }
    }

    /// The name of a module in the model that PEFT trained, whose expressions are of such names: `layers.0.…` for
    /// `model.layers.0.…` where that model had no head. None if the file does not hold the tensor, or not under PEFT's
    /// own name.
    pub fn trained_as(&self, module: &str, tensor: &str) -> Option<String> {
        let written = self.entries.get(&self.plain(&format!("{module}.{tensor}")))?.written;
        let (_, name) = written.split_once("base_model.model.")?;
        let first = tensor.split('.').next().unwrap_or(tensor);
        let (name, _) = name.rsplit_once(&format!(".{first}"))?;
        let parts: Vec<&str> = name.split('.').filter(|p| !INSIDE.contains(p)).collect();
        Some(parts.join("."))
    }

    /// Takes a tensor of this shape.
    pub fn take(&mut self, name: &str, shape: &[u64]) -> Result<&'a [f32], String> {
        let Some(entry) = self.entries.remove(&self.plain(name)) else { return Err(self.lacks(name)) };
        match &entry.stored.data {
            Data::F32(x) if entry.stored.shape == shape => Ok(x),
            _ if entry.stored.shape == shape => Err(format!(
                "`{}` holds integers; numbers are read from f32, f16, bf16 or f64, so save the adapter in one of these",
                entry.written
            )),
            _ => Err(wrong(entry.written, &entry.stored.shape, shape)),
        }
    }

    /// Drops tensors that say nothing beyond what has been read, and counts them.
    pub fn drop(&mut self, said: impl Fn(&Stored) -> bool) -> usize {
        let before = self.entries.len();
        self.entries.retain(|_, entry| !said(entry.stored));
        before - self.entries.len()
    }

    /// What is left: names without prefixes, as written, and shapes.
    pub fn left(&self) -> Vec<(&str, &'a str, &'a [u64])> {
        self.entries.iter().map(|(name, e)| (name.as_str(), e.written, &*e.stored.shape)).collect()
    }
}

/// `q.lora_A.default.weight` as `q.lora_A.weight`: PEFT's state dict names the adapter in it.
fn without_adapter(name: &str, known: &[&str]) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    for tensor in known {
        let own: Vec<&str> = tensor.split('.').collect();
        let Some(at) = parts.iter().rposition(|p| *p == own[0]) else { continue };
        let mut tail = &parts[at..];
        if own.last() != Some(&"weight") && tail.last() == Some(&"weight") && tail.len() > own.len() {
            tail = &tail[..tail.len() - 1];
        }
        let skipping =
            |skip: usize| tail.iter().enumerate().filter(|(i, _)| *i != skip).map(|(_, p)| *p).eq(own.iter().copied());
        if tail == own || (tail.len() == own.len() + 1 && (1..tail.len()).any(skipping)) {
            return [&parts[..at], &own[..]].concat().join(".");
        }
    }
    name.to_owned()
}

/// `classifier.modules_to_save.default.bias` as `classifier.bias`, and whether it was written so.
fn saved(name: &str, own: &[String]) -> (String, bool) {
    let Some((module, rest)) = name.split_once(".modules_to_save.") else { return (name.to_owned(), false) };
    let named = rest.split_once('.').map(|(_, rest)| format!("{module}.{rest}"));
    let plain = format!("{module}.{rest}");
    match named {
        Some(named) if own.contains(&named) || !own.contains(&plain) => (named, true),
        _ => (plain, true),
    }
}
