//! The `checkpoint` block: arguments filled in, and every key and pattern said once.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::Checker;
use super::frame::Frame;
use super::value::Val;
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::model::{Buffer, Checkpoint, Gguf, Key, Kind, Permuted, TensorRule};
use crate::source::Span;

/// Buffers by name, and what they are made of.
const BUFFERS: &[&str] = &["causal_mask", "positions", "frequencies"];

impl<'a> Checker<'a> {
    /// What the backbone says of its checkpoints. `args` are all its arguments.
    pub(super) fn checkpoint(&mut self, backbone: &'a BackboneDef, args: &HashMap<String, Val>) -> Checkpoint {
        let frame = Frame::with(args.clone());
        let mut found = Checkpoint::default();
        let mut said: HashMap<String, Span> = HashMap::new();
        for param in &backbone.params {
            let Some(from) = &param.from else { continue };
            let absent = param.absent.as_ref().or(param.default.as_ref());
            let absent = absent.and_then(|e| self.eval(&frame, e).config());
            self.declared_once(&mut said, from);
            found.keys.insert(from.text.clone(), Key::Argument { name: param.name.text.clone(), absent });
        }
        // A key that is an argument may be declared free all the same: it says so once more.
        said.clear();
        self.checkpoint_entries(&mut found, &mut said, &frame, &backbone.checkpoint);
        self.names_lead_somewhere(&found, &said);
        found
    }

    fn checkpoint_entries(
        &mut self,
        found: &mut Checkpoint,
        said: &mut HashMap<String, Span>,
        frame: &Frame<'a>,
        entries: &'a [Entry],
    ) {
        for entry in entries {
            match entry {
                Entry::ModelType(types) => found.model_types.extend(types.iter().map(|t| t.text.clone())),
                Entry::Prefix(prefix) => found.prefix.clone_from(&prefix.text),
                Entry::If { condition, then, otherwise } => {
                    let Some(holds) = self.condition(frame, condition) else { continue };
                    self.checkpoint_entries(found, said, frame, if holds { then } else { otherwise });
                }
                Entry::ForTask { purposes, entries } => {
                    if self.asked(purposes) {
                        self.checkpoint_entries(found, said, frame, entries);
                    }
                }
                Entry::Gguf { architectures, entries } => {
                    if found.gguf.is_some() {
                        let span = architectures.first().map_or(Span::default(), |name| name.span);
                        self.report(Diagnostic::error(span, "there is a second `gguf` block"));
                        continue;
                    }
                    let architectures = architectures.iter().map(|name| name.text.clone()).collect();
                    let mut gguf = Gguf { architectures, ..Gguf::default() };
                    self.gguf_entries(&mut gguf, said, frame, entries);
                    found.gguf = Some(gguf);
                }
                Entry::Key { names, rule, note } => {
                    let note = note.as_ref().and_then(|n| self.fill(frame, n));
                    for name in names {
                        let Some(key) = self.key_rule(frame, name, rule, note.clone()) else { continue };
                        let argument = matches!(found.keys.get(&name.text), Some(Key::Argument { .. }));
                        if argument && key != Key::Free {
                            let title = format!("`{}` is the key of an argument", name.text);
                            let error = Diagnostic::error(name.span, title);
                            self.report(error.hint("leave it out here; it may only be declared `free` besides"));
                            continue;
                        }
                        if self.declared_once(said, name) {
                            found.keys.insert(name.text.clone(), key);
                        }
                    }
                }
                Entry::Tensor { names, rule, note } => {
                    let note = note.as_ref().and_then(|n| self.fill(frame, n));
                    for name in names {
                        let Some(is) = self.tensor_rule(frame, name, rule) else { continue };
                        if self.declared_once(said, name) {
                            found.tensors.push(TensorRule { pattern: name.text.clone(), is, note: note.clone() });
                        }
                    }
                }
            }
        }
    }

    /// What a `gguf` block says. Names in the file and names of `config.json` share `said`: none is declared twice.
    fn gguf_entries(
        &mut self,
        found: &mut Gguf,
        said: &mut HashMap<String, Span>,
        frame: &Frame<'a>,
        entries: &'a [Entry],
    ) {
        for entry in entries {
            match entry {
                Entry::If { condition, then, otherwise } => {
                    let Some(holds) = self.condition(frame, condition) else { continue };
                    self.gguf_entries(found, said, frame, if holds { then } else { otherwise });
                }
                Entry::ForTask { purposes, entries } => {
                    if self.asked(purposes) {
                        self.gguf_entries(found, said, frame, entries);
                    }
                }
                Entry::Key { names, rule, note } => {
                    let note = note.as_ref().and_then(|n| self.fill(frame, n));
                    for name in names {
                        let Some(key) = self.key_rule(frame, name, rule, note.clone()) else { continue };
                        // One of `config.json` that metadata lack may be declared `free` in both places.
                        if key == Key::Free || self.declared_once(said, name) {
                            found.keys.insert(name.text.clone(), key);
                        }
                    }
                }
                Entry::Tensor { names, rule, note } => {
                    let note = note.as_ref().and_then(|n| self.fill(frame, n));
                    for name in names {
                        let is = match rule {
                            EntryRule::Permuted { tensor, rows, axes } => {
                                let Some((rows, axes)) = self.permutation(frame, rows, axes) else { continue };
                                found.permuted.push(Permuted { pattern: name.text.clone(), rows, axes });
                                self.same_tensor(name, tensor)
                            }
                            _ => self.tensor_rule(frame, name, rule),
                        };
                        let Some(is) = is else { continue };
                        if self.declared_once(said, name) {
                            found.tensors.push(TensorRule { pattern: name.text.clone(), is, note: note.clone() });
                        }
                    }
                }
                Entry::ModelType(names) | Entry::Gguf { architectures: names, .. } => {
                    let span = names.first().map_or(Span::default(), |name| name.span);
                    self.report(Diagnostic::error(span, "a `gguf` block holds keys and tensors"));
                }
                Entry::Prefix(prefix) => {
                    self.report(Diagnostic::error(prefix.span, "a `gguf` block holds keys and tensors"));
                }
            }
        }
    }

    /// The shape of the rows and the order of its axes: each axis once.
    fn permutation(&mut self, frame: &Frame<'a>, rows: &'a Expr, axes: &'a Expr) -> Option<(Vec<u64>, Vec<usize>)> {
        let mut all = |list: &'a Expr| -> Option<Vec<u64>> {
            let ExprKind::List(items) = &list.kind else { return None };
            let number = |item: &'a Expr| {
                let found = self.whole(frame, item)?;
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
            let title = format!("{} axes are permuted, and each of them is named once", shape.len());
            self.report(Diagnostic::error(axes.span, title));
            return None;
        }
        Some((shape, order.into_iter().map(|axis| axis as usize).collect()))
    }

    /// Nothing was said of it before.
    fn declared_once(&mut self, said: &mut HashMap<String, Span>, name: &Text) -> bool {
        let Some(&first) = said.get(&name.text) else {
            said.insert(name.text.clone(), name.span);
            return true;
        };
        let error = Diagnostic::error(name.span, format!("`{}` is declared twice", name.text));
        self.report(error.related(first, "first here"));
        false
    }

    fn key_rule(&mut self, frame: &Frame<'a>, name: &Text, rule: &'a EntryRule, note: Option<String>) -> Option<Key> {
        match rule {
            EntryRule::Free => Some(Key::Free),
            EntryRule::Same(other) => Some(Key::Same(other.text.clone())),
            EntryRule::Is(values) => {
                let values = values.iter().map(|e| self.json(frame, e)).collect::<Option<_>>()?;
                Some(Key::Is { values, note })
            }
            EntryRule::Optional | EntryRule::Unused | EntryRule::Required | EntryRule::Permuted { .. } => {
                let error = Diagnostic::error(name.span, "a key is a value, another key, or `free`");
                self.report(error);
                None
            }
        }
    }

    fn tensor_rule(&mut self, frame: &Frame<'a>, name: &Text, rule: &'a EntryRule) -> Option<Kind> {
        Some(match rule {
            EntryRule::Optional => Kind::Optional,
            EntryRule::Unused => Kind::Unused,
            EntryRule::Required => Kind::Required,
            EntryRule::Same(other) => self.same_tensor(name, other)?,
            EntryRule::Permuted { tensor, .. } => {
                let error = Diagnostic::error(tensor.span, "rows are permuted in a `gguf` block alone");
                self.report(error.hint("safetensors hold the rows as the equations read them"));
                return None;
            }
            EntryRule::Is(values) => Kind::Buffer(self.buffer(frame, values)?),
            EntryRule::Free => {
                let error = Diagnostic::error(name.span, "a tensor is not `free`");
                self.report(error.hint("write `unused` for what other models have, `optional` for what may be absent"));
                return None;
            }
        })
    }

    /// Another name: both patterns have the same parts.
    fn same_tensor(&mut self, name: &Text, other: &Text) -> Option<Kind> {
        let stars = |text: &Text| text.text.matches('*').count();
        if stars(name) != stars(other) {
            let error = Diagnostic::error(other.span, "the two patterns have not as many `*`");
            self.report(error.hint("each `*` stands for the same part of both names"));
            return None;
        }
        Some(Kind::Same(other.text.clone()))
    }

    fn buffer(&mut self, frame: &Frame<'a>, values: &'a [Expr]) -> Option<Buffer> {
        if let [value] = values {
            match &value.kind {
                ExprKind::Name(name) if name == "causal_mask" => return Some(Buffer::CausalMask),
                ExprKind::Name(name) if name == "positions" => return Some(Buffer::Positions),
                ExprKind::Call { function, args } if function.text == "frequencies" => {
                    let [theta, width] = &args[..] else {
                        let error = Diagnostic::error(value.span, "`frequencies` wants a base and a width");
                        self.report(error.hint("write `frequencies(rope_theta, head_dim)`"));
                        return None;
                    };
                    let (theta, width) = (self.number(frame, &theta.value)?, self.whole(frame, &width.value)?);
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

    /// A value as `config.json` has it; `null` is one here.
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

    /// Another name of a key is that of one which is declared, and no other name itself.
    fn names_lead_somewhere(&mut self, found: &Checkpoint, said: &HashMap<String, Span>) {
        let gguf = found.gguf.iter().flat_map(|gguf| &gguf.keys);
        for (name, key) in found.keys.iter().chain(gguf) {
            let Key::Same(other) = key else { continue };
            let known = found.keys.iter().filter(|(_, k)| !matches!(k, Key::Same(_))).map(|(n, _)| n.as_str());
            if found.keys.get(other).is_none_or(|k| matches!(k, Key::Same(_))) {
                let span = said.get(name).copied().unwrap_or_default();
                let error = Diagnostic::error(span, format!("`{name}` is another name of `{other}`, which is no key"));
                self.report(error.suggest(other, known));
            }
        }
    }
}
