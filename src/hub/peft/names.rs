//! Normalises the names of an adapter's tensors, which depend on the program that wrote them.

use std::collections::BTreeMap;

use peft_grammar::counterpart::Counterpart;
use peft_grammar::model::Model;
use peft_runtime::adapter::{Data, Stored};

use super::Tensors;

/// Parts that wrappers of the model put in front of its names: PEFT, compilation, sharding, sentence-transformers.
const WRAPPERS: &[&str] = &["base_model", "model", "module", "auto_model", "_orig_mod", "_forward_module", "0"];
/// Parts of wrappers that may occur anywhere in a name.
const INNER_WRAPPERS: &[&str] = &["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"];
/// The key with the rows of a table that train.
pub const INDICES: &str = "trainable_token_indices";
/// The name of the tensor with these rows.
pub const ROWS: &str = "token_adapter.trainable_tokens_delta";

/// A tensor, with its name in the file.
struct Entry<'a> {
    written: &'a str,
    stored: &'a Stored,
}

/// The tensors of an adapter that have not been read yet, by their names without wrappers.
pub struct UnreadTensors<'a> {
    entries: BTreeMap<String, Entry<'a>>,
    prefix: String,
}

/// The error for a tensor of another shape.
fn shape_mismatch(name: &str, found: &[u64], wanted: &[u64]) -> String {
    match found.contains(&0) {
        true => format!(
            "`{name}` is empty ({found:?}): it was saved from a sharded model without gathering it; save it again \
             inside `deepspeed.zero.GatheredParameters`, or by a Trainer with \
             `stage3_gather_16bit_weights_on_model_save`"
        ),
        false => format!("`{name}` is {found:?} in the adapter, and should be {wanted:?} for this spec"),
    }
}

impl<'a> UnreadTensors<'a> {
    /// Normalises the names of all tensors.
    ///
    /// # Errors
    ///
    /// Two tensors have the same normalised name, such as those of two adapters.
    pub fn new(model: &Model, counterparts: &[&Counterpart], tensors: &'a Tensors) -> Result<Self, String> {
        let mut known: Vec<&str> = counterparts.iter().flat_map(|c| &c.tensors).map(|t| t.name.as_str()).collect();
        known.push(ROWS);
        let mut unread = UnreadTensors { entries: BTreeMap::new(), prefix: model.backbone.checkpoint.prefix.clone() };
        let own: Vec<String> = model.params.iter().map(|p| unread.plain(&p.name)).collect();
        for (written, stored) in tensors {
            // PEFT's `original_module` is the untrained copy of a module that is saved in its trained form, too.
            if written.split('.').any(|part| part == "original_module") {
                continue;
            }
            let name = unread.plain(&without_adapter(written, &known));
            let (name, copy) = without_modules_to_save(&name, &own);
            if let Some(first) = unread.entries.get(&name) {
                let of_one = copy || first.written.contains(".modules_to_save.");
                match (of_one, stored == first.stored) {
                    (true, true) => continue,
                    (true, false) => {
                        return Err(format!(
                            "`{}` and `{written}` are the same tensor, and their values differ",
                            first.written
                        ));
                    }
                    (false, _) => {
                        return Err(format!(
                            "`{}` and `{written}` are the same tensor of two adapters; save one adapter by itself \
                             with PEFT's `save_pretrained(…, selected_adapters=[…])`",
                            first.written
                        ));
                    }
                }
            }
            unread.entries.insert(name, Entry { written, stored });
        }
        Ok(unread)
    }

    /// A name without the parts of wrappers and without the backbone's prefix.
    pub fn plain(&self, name: &str) -> String {
        let mut parts: Vec<&str> = name.split('.').filter(|p| !INNER_WRAPPERS.contains(p)).collect();
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

    /// Whether a tensor of this name has not been read yet.
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(&self.plain(name))
    }

    /// The shape of a tensor.
    ///
    /// # Errors
    ///
    /// There is no such tensor; the error names the one with the most similar name. Or the tensor is empty.
    pub fn shape(&self, name: &str) -> Result<&'a [u64], String> {
        match self.entries.get(&self.plain(name)) {
            Some(entry) if entry.stored.shape.contains(&0) => {
                Err(shape_mismatch(entry.written, &entry.stored.shape, &[]))
            }
            Some(entry) => Ok(&entry.stored.shape),
            None => Err(self.missing_message(name)),
        }
    }

    /// The error for a missing tensor.
    fn missing_message(&self, name: &str) -> String {
        let plain = self.plain(name);
        let near = self.entries.iter().map(|(n, e)| (strsim::normalized_levenshtein(n, &plain), e.written));
        match near.max_by(|a, b| a.0.total_cmp(&b.0)) {
            Some((_, near)) => format!("the adapter lacks `{name}`; the most similar name in it is `{near}`"),
            None => format!("the adapter lacks `{name}`, and all its tensors have been read"),
        }
    }

    /// The name of a module in the model that PEFT trained, which the expressions in the configuration refer to:
    /// `layers.0.…` for `model.layers.0.…` if that model had no head. `None` if the file does not hold the tensor under
    /// PEFT's own name.
    pub fn trained_as(&self, module: &str, tensor: &str) -> Option<String> {
        let written = self.entries.get(&self.plain(&format!("{module}.{tensor}")))?.written;
        let (_, name) = written.split_once("base_model.model.")?;
        let first = tensor.split('.').next().unwrap_or(tensor);
        let (name, _) = name.rsplit_once(&format!(".{first}"))?;
        let parts: Vec<&str> = name.split('.').filter(|p| !INNER_WRAPPERS.contains(p)).collect();
        Some(parts.join("."))
    }

    /// Reads a tensor of this shape and removes it.
    ///
    /// # Errors
    ///
    /// There is no such tensor, or it has another shape, or it holds integers.
    pub fn take(&mut self, name: &str, shape: &[u64]) -> Result<&'a [f32], String> {
        let Some(entry) = self.entries.remove(&self.plain(name)) else { return Err(self.missing_message(name)) };
        match &entry.stored.data {
            Data::F32(x) if entry.stored.shape == shape => Ok(x),
            _ if entry.stored.shape == shape => Err(format!(
                "`{}` holds integers; numbers are read from f32, f16, bf16 or f64, so save the adapter in one of these",
                entry.written
            )),
            _ => Err(shape_mismatch(entry.written, &entry.stored.shape, shape)),
        }
    }

    /// Removes tensors for which `redundant` holds, and returns their number.
    pub fn drop(&mut self, redundant: impl Fn(&Stored) -> bool) -> usize {
        let before = self.entries.len();
        self.entries.retain(|_, entry| !redundant(entry.stored));
        before - self.entries.len()
    }

    /// The tensors that have not been read: names without wrappers, names in the file, and shapes.
    pub fn remaining(&self) -> Vec<(&str, &'a str, &'a [u64])> {
        self.entries.iter().map(|(name, e)| (name.as_str(), e.written, &*e.stored.shape)).collect()
    }
}

/// A name without the name of the adapter, which PEFT's state dict contains: `q.lora_A.default.weight` becomes
/// `q.lora_A.weight`.
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

/// A name without PEFT's `modules_to_save`, and whether it had one: `classifier.modules_to_save.default.bias` becomes
/// `classifier.bias`.
fn without_modules_to_save(name: &str, own: &[String]) -> (String, bool) {
    let Some((module, rest)) = name.split_once(".modules_to_save.") else { return (name.to_owned(), false) };
    let named = rest.split_once('.').map(|(_, rest)| format!("{module}.{rest}"));
    let plain = format!("{module}.{rest}");
    match named {
        Some(named) if own.contains(&named) || !own.contains(&plain) => (named, true),
        _ => (plain, true),
    }
}
