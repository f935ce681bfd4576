//! Checks the `checkpoint` block: substitutes the arguments and rejects keys and patterns that are declared twice.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::Checker;
use super::frame::Frame;
use super::value::Val;
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::model::{Buffer, Checkpoint, Gguf, KeyRule, RowPermutation, TensorKind, TensorRule};
use crate::source::Span;

/// The names of the buffers.
const BUFFERS: &[&str] = &["causal_mask", "positions", "frequencies"];

impl<'a> Checker<'a> {
    /// The checkpoint rules of a backbone, given all its arguments.
    pub(super) fn checkpoint(&mut self, backbone: &'a BackboneDef, args: &HashMap<String, Val>) -> Checkpoint {
        let frame = Frame::with(args.clone());
        let mut found = Checkpoint::default();
        let mut declared_at: HashMap<String, Span> = HashMap::new();
        for param in &backbone.params {
            let Some(from) = &param.from else { continue };
            let absent = param.absent.as_ref().or(param.default.as_ref());
            let absent = absent.and_then(|e| self.eval(&frame, e).config());
            self.declared_once(&mut declared_at, from);
            found.keys.insert(from.text.clone(), KeyRule::Argument { name: param.name.text.clone(), absent });
        }
        // The key of an argument may also be declared `free`, so the keys seen so far are forgotten.
        declared_at.clear();
        self.checkpoint_entries(&mut found, &mut declared_at, &frame, &backbone.checkpoint);
        self.check_key_aliases(&found, &declared_at);
        found
    }

    fn checkpoint_entries(
        &mut self,
        found: &mut Checkpoint,
        declared_at: &mut HashMap<String, Span>,
        frame: &Frame<'a>,
        entries: &'a [CheckpointEntry],
    ) {
        for entry in entries {
            match entry {
                CheckpointEntry::ModelType(types) => found.model_types.extend(types.iter().map(|t| t.text.clone())),
                CheckpointEntry::Prefix(prefix) => found.prefix.clone_from(&prefix.text),
                CheckpointEntry::If { condition, then, otherwise } => {
                    let Some(holds) = self.condition(frame, condition) else { continue };
                    self.checkpoint_entries(found, declared_at, frame, if holds { then } else { otherwise });
                }
                CheckpointEntry::ForTask { purposes, entries } => {
                    if self.task_is_one_of(purposes) {
                        self.checkpoint_entries(found, declared_at, frame, entries);
                    }
                }
                CheckpointEntry::Gguf { architectures, entries } => {
                    if found.gguf.is_some() {
                        let span = architectures.first().map_or(Span::default(), |name| name.span);
                        self.report(Diagnostic::error(span, "a `checkpoint` block has only one `gguf` block"));
                        continue;
                    }
                    let architectures = architectures.iter().map(|name| name.text.clone()).collect();
                    let mut gguf = Gguf { architectures, ..Gguf::default() };
                    self.gguf_entries(&mut gguf, declared_at, frame, entries);
                    found.gguf = Some(gguf);
                }
                CheckpointEntry::Key { names, rule, note } => {
                    let note = note.as_ref().and_then(|n| self.interpolate(frame, n));
                    for name in names {
                        let Some(key) = self.key_rule(frame, name, rule, note.clone()) else { continue };
                        let argument = matches!(found.keys.get(&name.text), Some(KeyRule::Argument { .. }));
                        if argument && key != KeyRule::Free {
                            let title = format!("`{}` is the key of an argument", name.text);
                            let error = Diagnostic::error(name.span, title);
                            self.report(error.hint("leave it out here; it may only be declared `free` in addition"));
                            continue;
                        }
                        if self.declared_once(declared_at, name) {
                            found.keys.insert(name.text.clone(), key);
                        }
                    }
                }
                CheckpointEntry::Tensor { names, rule, note } => {
                    let note = note.as_ref().and_then(|n| self.interpolate(frame, n));
                    for name in names {
                        let Some(is) = self.tensor_rule(frame, name, rule) else { continue };
                        if self.declared_once(declared_at, name) {
                            found.tensors.push(TensorRule { pattern: name.text.clone(), is, note: note.clone() });
                        }
                    }
                }
            }
        }
    }

    /// Adds the entries of a `gguf` block. Keys and tensors of the file and of `config.json` share `declared_at`, so
    /// that no name is declared twice.
    fn gguf_entries(
        &mut self,
        found: &mut Gguf,
        declared_at: &mut HashMap<String, Span>,
        frame: &Frame<'a>,
        entries: &'a [CheckpointEntry],
    ) {
        for entry in entries {
            match entry {
                CheckpointEntry::If { condition, then, otherwise } => {
                    let Some(holds) = self.condition(frame, condition) else { continue };
                    self.gguf_entries(found, declared_at, frame, if holds { then } else { otherwise });
                }
                CheckpointEntry::ForTask { purposes, entries } => {
                    if self.task_is_one_of(purposes) {
                        self.gguf_entries(found, declared_at, frame, entries);
                    }
                }
                CheckpointEntry::Key { names, rule, note } => {
                    let note = note.as_ref().and_then(|n| self.interpolate(frame, n));
                    for name in names {
                        let Some(key) = self.key_rule(frame, name, rule, note.clone()) else { continue };
                        // A key of `config.json` without a metadata key may be declared `free` in both places.
                        if key == KeyRule::Free || self.declared_once(declared_at, name) {
                            found.keys.insert(name.text.clone(), key);
                        }
                    }
                }
                CheckpointEntry::Tensor { names, rule, note } => {
                    let note = note.as_ref().and_then(|n| self.interpolate(frame, n));
                    for name in names {
                        let is = match rule {
                            EntryRule::Permuted { tensor, rows, axes } => {
                                let Some((rows, axes)) = self.permutation(frame, rows, axes) else { continue };
                                found.permuted.push(RowPermutation { pattern: name.text.clone(), rows, axes });
                                self.same_tensor(name, tensor)
                            }
                            _ => self.tensor_rule(frame, name, rule),
                        };
                        let Some(is) = is else { continue };
                        if self.declared_once(declared_at, name) {
                            found.tensors.push(TensorRule { pattern: name.text.clone(), is, note: note.clone() });
                        }
                    }
                }
                CheckpointEntry::ModelType(names) | CheckpointEntry::Gguf { architectures: names, .. } => {
                    let span = names.first().map_or(Span::default(), |name| name.span);
                    self.report(Diagnostic::error(span, "a `gguf` block holds keys and tensors"));
                }
                CheckpointEntry::Prefix(prefix) => {
                    self.report(Diagnostic::error(prefix.span, "a `gguf` block holds keys and tensors"));
                }
            }
        }
    }

    /// The shape and the permutation of `permute(…)`, in which every axis occurs once.
    fn permutation(&mut self, frame: &Frame<'a>, rows: &'a Expr, axes: &'a Expr) -> Option<(Vec<u64>, Vec<usize>)> {
        let mut all = |list: &'a Expr| -> Option<Vec<u64>> {
            let ExprKind::List(items) = &list.kind else { return None };
            let number = |item: &'a Expr| {
                let found = self.integer(frame, item)?;
                let number = u64::try_from(found).ok();
                if number.is_none() {
                    let title = format!("sizes and axes are whole numbers from 0 on, found {found}");
                    self.report(Diagnostic::error(item.span, title));
                }
                number
            };
            items.iter().map(number).collect()
        };
        let (shape, order) = (all(rows)?, all(axes)?);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        if shape.len() != order.len() || !sorted.into_iter().eq(0..order.len() as u64) {
            let title = format!("the permutation must name each of the {} axes once", shape.len());
            self.report(Diagnostic::error(axes.span, title));
            return None;
        }
        Some((shape, order.into_iter().map(|axis| axis as usize).collect()))
    }

    /// Records the declaration of a name, or reports that the name is already declared.
    fn declared_once(&mut self, declared_at: &mut HashMap<String, Span>, name: &Text) -> bool {
        let Some(&first) = declared_at.get(&name.text) else {
            declared_at.insert(name.text.clone(), name.span);
            return true;
        };
        let error = Diagnostic::error(name.span, format!("`{}` is declared twice", name.text));
        self.report(error.related(first, "first here"));
        false
    }

    fn key_rule(
        &mut self,
        frame: &Frame<'a>,
        name: &Text,
        rule: &'a EntryRule,
        note: Option<String>,
    ) -> Option<KeyRule> {
        match rule {
            EntryRule::Free => Some(KeyRule::Free),
            EntryRule::Same(other) => Some(KeyRule::Same(other.text.clone())),
            EntryRule::Is(values) => {
                let values = values.iter().map(|e| self.json(frame, e)).collect::<Option<_>>()?;
                Some(KeyRule::Is { values, note })
            }
            EntryRule::Optional | EntryRule::Unused | EntryRule::Required | EntryRule::Permuted { .. } => {
                let error = Diagnostic::error(name.span, "the rule of a key is a value, another key, or `free`");
                self.report(error);
                None
            }
        }
    }

    fn tensor_rule(&mut self, frame: &Frame<'a>, name: &Text, rule: &'a EntryRule) -> Option<TensorKind> {
        Some(match rule {
            EntryRule::Optional => TensorKind::Optional,
            EntryRule::Unused => TensorKind::Unused,
            EntryRule::Required => TensorKind::Required,
            EntryRule::Same(other) => self.same_tensor(name, other)?,
            EntryRule::Permuted { tensor, .. } => {
                let error = Diagnostic::error(tensor.span, "rows can be permuted only in a `gguf` block");
                self.report(error.hint("safetensors hold the rows as the equations read them"));
                return None;
            }
            EntryRule::Is(values) => TensorKind::Buffer(self.buffer(frame, values)?),
            EntryRule::Free => {
                let error = Diagnostic::error(name.span, "a tensor is not `free`");
                self.report(error.hint("write `unused` for what other models have, `optional` for what may be absent"));
                return None;
            }
        })
    }

    /// An alias of a tensor. Both patterns must have the same number of `*`.
    fn same_tensor(&mut self, name: &Text, other: &Text) -> Option<TensorKind> {
        let stars = |text: &Text| text.text.matches('*').count();
        if stars(name) != stars(other) {
            let error = Diagnostic::error(other.span, "the two patterns differ in their number of `*`");
            self.report(error.hint("each `*` matches the same part of both names"));
            return None;
        }
        Some(TensorKind::Same(other.text.clone()))
    }

    fn buffer(&mut self, frame: &Frame<'a>, values: &'a [Expr]) -> Option<Buffer> {
        if let [value] = values {
            match &value.kind {
                ExprKind::Name(name) if name == "causal_mask" => return Some(Buffer::CausalMask),
                ExprKind::Name(name) if name == "positions" => return Some(Buffer::Positions),
                ExprKind::Call { function, args } if function.text == "frequencies" => {
                    let [theta, width] = &args[..] else {
                        let error = Diagnostic::error(value.span, "`frequencies` expects a base and a width");
                        self.report(error.hint("write `frequencies(rope_theta, head_dim)`"));
                        return None;
                    };
                    let (theta, width) = (self.number(frame, &theta.value)?, self.integer(frame, &width.value)?);
                    return Some(Buffer::Frequencies { theta, width: u64::try_from(width).unwrap_or(0) });
                }
                ExprKind::Name(name) if frame.get(name).is_none() => {
                    let error = Diagnostic::error(value.span, format!("there is no buffer `{name}`"));
                    self.report(error.suggest(name, BUFFERS.iter().copied()));
                    return None;
                }
                _ => {}
            }
        }
        let numbers = values.iter().map(|e| self.number(frame, e)).collect::<Option<_>>()?;
        Some(Buffer::Numbers(numbers))
    }

    /// The JSON value of an expression. In this context `null` is a value.
    fn json(&mut self, frame: &Frame<'a>, expr: &'a Expr) -> Option<Value> {
        match &expr.kind {
            ExprKind::Name(name) if name == "null" => return Some(Value::Null),
            ExprKind::List(items) => {
                let items = items.iter().map(|e| self.json(frame, e)).collect::<Option<_>>()?;
                return Some(Value::Array(items));
            }
            _ => {}
        }
        match self.eval(frame, expr) {
            Val::Int(n) => Some(json!(n)),
            Val::Float(x) => Some(json!(x)),
            Val::Bool(b) => Some(json!(b)),
            Val::Str(s) => Some(json!(s)),
            Val::Unknown => None,
            other => {
                let found = other.describe(&self.graph);
                let title = format!("a key is a number, a word, `true`, `false`, `null` or a list, found {found}");
                self.report(Diagnostic::error(expr.span, title));
                None
            }
        }
    }

    /// Checks that an alias of a key refers to a declared key that is no alias itself.
    fn check_key_aliases(&mut self, found: &Checkpoint, declared_at: &HashMap<String, Span>) {
        let gguf = found.gguf.iter().flat_map(|gguf| &gguf.keys);
        for (name, key) in found.keys.iter().chain(gguf) {
            let KeyRule::Same(other) = key else { continue };
            let known = found.keys.iter().filter(|(_, k)| !matches!(k, KeyRule::Same(_))).map(|(n, _)| n.as_str());
            if found.keys.get(other).is_none_or(|k| matches!(k, KeyRule::Same(_))) {
                let span = declared_at.get(name).copied().unwrap_or_default();
                let title = format!("`{name}` is an alias of `{other}`, which is not a declared key");
                let error = Diagnostic::error(span, title);
                self.report(error.suggest(other, known));
            }
        }
    }
}
