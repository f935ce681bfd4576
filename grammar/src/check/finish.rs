//! What can be said only when the whole model stands: patterns, rows and sites that met nothing, outputs,
//! and the roles of tensors.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::frame::Frame;
use super::rates::two_rates;
use super::value::Val;
use super::{Checker, Glob, Purpose, Said};
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::graph::{DType, Dim, Op, Role, Value};
use crate::model::{Backbone, ConfigValue, Model, Origin, Recipe, Task, TaskKind, Trainable};
use crate::names::{Input, LOGITS, LOSS};
use crate::pattern;
use crate::source::Span;

impl<'a> Checker<'a> {
    pub(super) fn finish(
        &mut self,
        backbone: &'a BackboneDef,
        model: &ModelDef,
        tune: Option<Span>,
        args: HashMap<String, Val>,
        (task, train): (Task, Recipe),
    ) -> Option<Model> {
        self.unmet_sites(backbone);
        if self.errors.is_empty() {
            self.unmet_rows();
            self.train_by_name();
            self.outputs_there(model);
            self.smoothing_counts();
            if matches!(task.kind, TaskKind::Generation { pack: true, .. }) {
                self.no_token_sees_later_ones(model);
            }
        }
        if self.errors.is_empty() {
            self.every_weight_counts();
            self.every_rate_counts();
            self.stored_is_known_without_a_batch();
        }
        if !self.errors.is_empty() {
            return None;
        }
        if let Some(tune) = tune
            && self.params.iter().all(|p| p.trainable == Trainable::No)
        {
            let error = Diagnostic::error(tune, "nothing trains");
            self.errors.push(error.hint("apply a method, or leave the `tune` block out to run the model as it is"));
            return None;
        }
        let trainable: HashMap<&str, &Trainable> = self.params.iter().map(|p| (&*p.name, &p.trainable)).collect();
        for arg in self.graph.args.iter_mut().filter(|a| a.role != Role::Input && a.rows.is_none()) {
            let all = trainable.get(&*arg.name) == Some(&&Trainable::All);
            arg.role = if all { Role::Trainable } else { Role::Frozen };
        }
        // `loss` and `logits` first, then what methods expose.
        let rank = |name: &str| [LOSS, LOGITS].iter().position(|n| *n == name).unwrap_or(2);
        self.graph.outputs.sort_by_key(|(name, _)| rank(name));
        let checkpoint = self.checkpoint(backbone, &args);
        if !self.errors.is_empty() {
            return None;
        }
        let config = backbone
            .params
            .iter()
            .filter_map(|param| Some((param.from.as_ref()?.text.clone(), args.get(&param.name.text)?.config()?)));
        let config: BTreeMap<String, ConfigValue> = config.collect();
        let beyond = backbone.params.iter().filter(|p| p.from.is_none()).filter_map(|param| {
            let value = args.get(&param.name.text)?;
            let default = param.default.as_ref().map(|d| self.eval(&Frame::with(args.clone()), d));
            (default.as_ref() != Some(value)).then_some((param.name.text.clone(), value.config()?))
        });
        let beyond: BTreeMap<String, ConfigValue> = beyond.collect();
        let file = &self.sources.get(model.span.file).name;
        let stem = file.rsplit('/').next().unwrap_or(file).trim_end_matches(".peft");
        if let Err(why) = self.graph.verify() {
            self.errors.push(Diagnostic::error(model.span, format!("the graph does not hold: {why}")));
            return None;
        }
        let (longest, task) = (self.longest_sequence(&backbone.name.text), task);
        let max_tokens = self.max_tokens(&backbone.name.text, longest, &task)?;
        let enclosed = self.graph.nodes.iter().any(|node| matches!(node.op, Op::Scores { causal: false }));
        let task = Task { max_tokens, enclosed, ..task };
        let replaced = self.replaced();
        let counterparts = self.counterparts();
        Some(Model {
            name: stem.to_owned(),
            backbone: Backbone {
                name: backbone.name.text.clone(),
                config,
                checkpoint,
                longest,
                skipped: self.skipped.map(|said| said.number),
                beyond,
            },
            params: std::mem::take(&mut self.params),
            graph: std::mem::take(&mut self.graph),
            applied: std::mem::take(&mut self.applied),
            counterparts,
            projections: std::mem::take(&mut self.projections),
            replaced,
            stored: std::mem::take(&mut self.stored).into_iter().map(|s| (s.name, s.value)).collect(),
            task,
            train,
            equations: String::new(),
            function: String::new(),
        })
    }

    /// How many tokens a sequence may have: what the backbone says, else the rows of the table of positions.
    fn longest_sequence(&mut self, backbone: &str) -> Option<u64> {
        let tables = self.graph.bounds().into_iter().filter(|b| b.input == Input::Positions.name());
        let table = tables.filter_map(|b| Some((b.rows.constant()?, b.table))).min();
        match (self.longest, table) {
            (Some(Said { number, span }), Some((rows, table))) if number > rows => {
                let title = format!("`{backbone}` takes {number} tokens, and its positions have the {rows} {table}");
                self.report(Diagnostic::error(span, title).hint("let `longest` be no more than that"));
                None
            }
            (Some(said), _) => Some(said.number),
            (None, table) => table.map(|(rows, _)| rows),
        }
    }

    /// The task's `max_tokens`, which fits into the backbone's longest sequence.
    fn max_tokens(&mut self, backbone: &str, longest: Option<u64>, task: &Task) -> Option<u64> {
        match (self.max_tokens, longest) {
            (Some(Said { number, span }), Some(most)) if number > most => {
                let title = format!("`max_tokens` is {number}, and a sequence of this `{backbone}` has at most {most}");
                let hint = format!("set `max_tokens` to {most} or less: longer examples are cut to it");
                let error = Diagnostic::error(span, title).hint(hint);
                let error = match self.longest.filter(|said| !self.sources.get(said.span.file).library) {
                    Some(said) => error.related(said.span, "the backbone says so here"),
                    None => error,
                };
                self.errors.push(error);
                None
            }
            (None, Some(most)) => Some(task.max_tokens.min(most)),
            _ => Some(task.max_tokens),
        }
    }

    /// Rules of the tune block whose sites do not exist.
    fn unmet_sites(&mut self, backbone: &BackboneDef) {
        let rules = std::mem::take(&mut self.plan.rules);
        let name = &backbone.name.text;
        for rule in &rules {
            let kind = &rule.kind.text;
            let Some(&(_, count)) = self.kinds.iter().find(|(k, _)| k == kind) else {
                if !self.kinds.is_empty() || self.errors.is_empty() {
                    let error = Diagnostic::error(rule.kind.span, format!("`{name}` has no site `{kind}`"));
                    let error = match kind.as_str() {
                        "projection" => error.hint("projections lie inside sites: `every attention { … on q }`"),
                        _ => error.suggest(kind, self.kinds.iter().map(|(k, _)| k.as_str())),
                    };
                    self.errors.push(error);
                }
                continue;
            };
            for (range, span) in &rule.ranges {
                if range.start < 0 || range.end as u64 > count {
                    let title = format!("`{name}` has {count} {kind} sites, numbered 0 to {}", count - 1);
                    let found = match range.end - range.start {
                        1 => format!("there is no number {}", range.start),
                        _ => format!("{}..{} goes beyond them", range.start, range.end),
                    };
                    self.errors.push(Diagnostic::error(*span, title).label(found));
                }
            }
        }
        self.plan.rules = rules;
    }

    fn unmet_rows(&mut self) {
        let known: Vec<&str> = self.params.iter().map(|p| &*p.name).collect();
        for rows in self.plan.rows.iter().filter(|r| !r.found) {
            let name = &rows.tensor.text;
            let error = Diagnostic::error(rows.tensor.span, format!("the backbone has no tensor `{name}`"));
            self.errors.push(error.suggest(name, known.iter().copied()));
        }
    }

    /// `train "…"`: backbone tensors by name.
    fn train_by_name(&mut self) {
        for Glob { pattern, method, used, rates } in std::mem::take(&mut self.globs) {
            let (mut any, mut new) = (false, false);
            let lr = self.rate_of(&rates, None);
            for param in self.params.iter_mut().filter(|p| p.origin == Origin::Backbone) {
                if pattern::fits(&pattern.text, &param.name) {
                    any = true;
                    if let Trainable::Rows(..) = param.trainable {
                        let rows = self.plan.rows.iter().find(|r| r.tensor.text == param.name);
                        let title = format!("all of `{}` trains already, by `{method}`", param.name);
                        self.errors.extend(rows.map(|r| Diagnostic::error(r.span, title).hint("leave this out")));
                    }
                    if param.trainable == Trainable::No {
                        param.lr = lr;
                    } else if param.lr != lr {
                        let error = two_rates(used.unwrap_or(pattern.span), &param.name, param.lr, lr);
                        self.errors.push(error.hint("let one rule train it, or give both the same `lr`"));
                    }
                    new |= param.trainable != Trainable::All;
                    param.trainable = Trainable::All;
                }
            }
            if any && !new {
                let title = format!("everything `{method}` would train trains already");
                let error = Diagnostic::error(used.unwrap_or(pattern.span), title);
                self.errors.push(error.hint("leave it out"));
            }
            if !any {
                let error =
                    Diagnostic::error(pattern.span, format!("no tensor of the backbone is named `{}`", pattern.text));
                self.report_of(&method, used, error.hint("`*` stands for any part of a name: `\"*.bias\"`"));
            }
        }
    }

    /// A method's weights must reach the loss, and a method without any that train is none.
    fn every_weight_counts(&mut self) {
        let read = self.reaching(&[]);
        let mut training: HashSet<Span> = HashSet::new();
        let mut unread: Vec<(String, Span, Diagnostic)> = Vec::new();
        for param in &self.params {
            let (Origin::Method(method), Some(declared)) = (&param.origin, self.declared.get(&param.name)) else {
                continue;
            };
            let Some(used) = declared.used else { continue };
            if param.trainable != Trainable::No {
                training.insert(used);
            }
            let arg = self.graph.args.iter().find(|a| a.name == param.name);
            if arg.is_some_and(|a| !read.contains(&a.value)) {
                let title = format!("`{}` is declared, and the loss does not depend on it", param.name);
                let error = Diagnostic::error(declared.name, title);
                let error = error.hint("let it change what the site computes, or leave it out");
                unread.push((method.clone(), used, error));
            }
        }
        for (method, used, error) in unread {
            self.report_of(&method, Some(used), error);
        }
        let mut idle: Vec<(Span, &MethodDef)> = Vec::new();
        for applied in self.plan.rules.iter().flat_map(|r| &r.uses) {
            if !training.contains(&applied.asked()) && !idle.iter().any(|(span, _)| *span == applied.asked()) {
                idle.push((applied.asked(), applied.method));
            }
        }
        for (used, method) in idle {
            let name = &method.name;
            if !self.applied.iter().any(|a| a.method == name.text) {
                self.errors.push(Diagnostic::error(used, format!("`{}` is applied nowhere", name.text)));
                continue;
            }
            let error = Diagnostic::error(name.span, format!("`{}` trains nothing", name.text));
            self.report_of(&name.text, Some(used), error.hint("declare a `weight` that is not frozen"));
        }
    }

    /// What is stored is a function of weights.
    fn stored_is_known_without_a_batch(&mut self) {
        let inputs = self.graph.args.iter().filter(|a| a.role == Role::Input);
        let of_batch = self.graph.made_of(inputs.map(|a| a.value));
        let stored = std::mem::take(&mut self.stored);
        for stored in stored.iter().filter(|s| of_batch.contains(&s.value)) {
            let title = format!("`{}` depends on the batch: it cannot be kept", stored.name);
            let error = Diagnostic::error(stored.span, title).hint("store what is made of weights alone");
            self.report_of(&stored.method, stored.used, error);
        }
        self.stored = stored;
    }

    /// Methods' tensors that the loss depends on through `store`d values alone.
    fn replaced(&self) -> Vec<String> {
        let given: Vec<Value> = self.stored.iter().map(|s| s.value).collect();
        let read = self.reaching(&given);
        let trained = self.params.iter().filter(|p| matches!(p.origin, Origin::Method(_)));
        let trained = trained.filter(|p| p.trainable != Trainable::No);
        let unread = |name: &str| self.graph.args.iter().all(|a| a.name != name || !read.contains(&a.value));
        trained.filter(|p| unread(&p.name)).map(|p| p.name.clone()).collect()
    }

    /// Everything the loss is made of, if the values `given` are there.
    fn reaching(&self, given: &[Value]) -> HashSet<Value> {
        let mut needed: HashSet<Value> = self.graph.output(LOSS).into_iter().collect();
        for node in self.graph.nodes.iter().rev() {
            if needed.contains(&node.result()) && !given.contains(&node.result()) {
                needed.extend(&node.operands);
            }
        }
        needed
    }

    /// A loss that has no labels to smooth is not told to.
    fn smoothing_counts(&mut self) {
        let Some(span) = self.smoothing_unread.filter(|_| self.smoothing > 0.0) else { return };
        let title = format!("the loss of a task of {} smooths no labels", self.purpose.word());
        self.report(Diagnostic::error(span, title).hint("leave `label_smoothing` out"));
    }

    /// The backbone gives a loss, and logits that suit the task.
    fn outputs_there(&mut self, model: &ModelDef) {
        let span = |checker: &Self, name| checker.outputs.get(name).copied().unwrap_or(model.span);
        for name in [LOSS, LOGITS] {
            if self.graph.output(name).is_none() {
                let error = Diagnostic::error(model.span, format!("the backbone has no output `{name}`"));
                self.report(error.hint(format!("end it with `output {name} = …`")));
            }
        }
        if let Some(loss) = self.graph.output(LOSS) {
            let ty = self.graph.ty(loss).clone();
            if ty.rank() != 0 || ty.dtype != DType::F32 {
                let error = Diagnostic::error(span(self, LOSS), format!("the loss is one number, found {ty}"));
                self.report(error.hint("take the mean: `output loss = mean(…)`"));
            }
        }
        if let Some(logits) = self.graph.output(LOGITS) {
            let ty = self.graph.ty(logits).clone();
            let (rows, what) = self.purpose.rows();
            if ty.rank() != 2 || ty.shape[0] != rows {
                let title = format!("logits are a row for {what}, f32[{rows},classes], found {ty}");
                self.report(Diagnostic::error(span(self, LOGITS), title));
            } else if self.purpose != Purpose::Generation && ty.shape[1] != Dim::Const(self.classes) {
                let title = match self.purpose {
                    Purpose::Regression => format!("the task asks for one number, the logits are {ty}"),
                    _ => format!("the task has {} labels, the logits are {ty}", self.classes),
                };
                self.report(Diagnostic::error(span(self, LOGITS), title).hint("`classes` is how many there are"));
            }
        }
    }

    /// Examples that share a sequence are what they are by themselves only if none sees what follows it.
    fn no_token_sees_later_ones(&mut self, model: &ModelDef) {
        if self.graph.nodes.iter().any(|node| sees_later_tokens(&node.op)) {
            let name = &model.backbone;
            let title = format!("`pack: true` wants a causal model, and tokens of this `{}` see later ones", name.text);
            let error = Diagnostic::error(name.span, title);
            self.report(error.hint("leave `pack` out, and each example is a sequence of its own"));
        }
    }
}

/// A token's row may be made of those of later ones; of an operation of the language.
fn sees_later_tokens(op: &Op) -> bool {
    use Op::*;
    match op {
        Scores { causal } => !causal,
        SegmentMean => true,
        // Only tokens that the scores see have weights.
        Attend { .. } => false,
        Constant { .. } | Iota { .. } | Add | Sub | Mul | Div | Min | Scale { .. } | Shift { .. } | Float => false,
        Exp | Log | Sqrt | Rsqrt | Sin | Cos | Tanh | Sigmoid | Relu | Step => false,
        Gelu | GeluGrad | GeluTanh | GeluTanhGrad | Detach => false,
        Reshape { .. } | Permute { .. } | Slice { .. } | Pad { .. } | Concat { .. } => false,
        Broadcast { .. } | Reduce { .. } | Matmul { .. } | Dropout { .. } => false,
        Softmax | LogSumExp | Normalize { .. } | Gather { .. } | Scatter { .. } | CrossEntropy { .. } => false,
        // No name in the language stands for them.
        AttendTransposed { .. } | Attention { .. } | AttentionLse { .. } | AttentionAndLse { .. } => false,
        AttentionVjp { .. } | AttentionVjpSides { .. } | AttentionVjpAll { .. } => false,
        LinearLse
        | LinearMean
        | LinearLseAndMean
        | SoftmaxVjp
        | NormalizeVjp { .. }
        | SegmentMeanVjp
        | CrossEntropyVjp { .. } => false,
    }
}
