//! The checks that need the complete model: patterns, rows and sites that do not exist, the outputs, and the roles of
//! tensors.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::frame::Frame;
use super::learning_rates::conflicting_rates;
use super::value::Val;
use super::{Checker, Located, Purpose, TrainPattern};
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
        self.check_sites_exist(backbone);
        if self.errors.is_empty() {
            self.check_rows_exist();
            self.apply_train_patterns();
            self.check_outputs(model);
            self.check_smoothing_is_used();
            if matches!(task.kind, TaskKind::Generation { pack: true, .. }) {
                self.check_causal(model);
            }
        }
        if self.errors.is_empty() {
            self.check_weights_reach_loss();
            self.check_rates_are_used();
            self.check_stored_without_batch();
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
        // Outputs are sorted: `loss`, `logits`, then exposed values.
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
            self.errors.push(Diagnostic::error(model.span, format!("the graph is invalid: {why}")));
            return None;
        }
        let (longest, task) = (self.max_sequence_tokens(&backbone.name.text), task);
        let max_tokens = self.max_tokens(&backbone.name.text, longest, &task)?;
        let bidirectional = self.graph.nodes.iter().any(|node| matches!(node.op, Op::Scores { causal: false }));
        let task = Task { max_tokens, bidirectional, ..task };
        let replaced = self.replaced();
        let counterparts = self.counterparts();
        Some(Model {
            name: stem.to_owned(),
            backbone: Backbone {
                name: backbone.name.text.clone(),
                config,
                checkpoint,
                max_sequence_tokens: longest,
                position_skip_id: self.position_skip.map(|said| said.number),
                extra_args: beyond,
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
            equations_hash: String::new(),
            function_hash: String::new(),
        })
    }

    /// The maximum number of tokens of a sequence: the backbone's `longest`, else the number of rows of the position
    /// table.
    fn max_sequence_tokens(&mut self, backbone: &str) -> Option<u64> {
        let tables = self.graph.bounds().into_iter().filter(|b| b.input == Input::Positions.name());
        let table = tables.filter_map(|b| Some((b.rows.constant()?, b.table))).min();
        match (self.max_sequence, table) {
            (Some(Located { number, span }), Some((rows, table))) if number > rows => {
                let title =
                    format!("`{backbone}` takes {number} tokens, but its positions index only the {rows} {table}");
                self.report(Diagnostic::error(span, title).hint("reduce `longest` to at most that number"));
                None
            }
            (Some(said), _) => Some(said.number),
            (None, table) => table.map(|(rows, _)| rows),
        }
    }

    /// The task's `max_tokens`, which must not exceed the maximum of the backbone.
    fn max_tokens(&mut self, backbone: &str, longest: Option<u64>, task: &Task) -> Option<u64> {
        match (self.max_tokens, longest) {
            (Some(Located { number, span }), Some(most)) if number > most => {
                let title = format!("`max_tokens` is {number}, and a sequence of this `{backbone}` has at most {most}");
                let hint = format!("set `max_tokens` to {most} or less: longer examples are cut to it");
                let error = Diagnostic::error(span, title).hint(hint);
                let error = match self.max_sequence.filter(|said| !self.sources.get(said.span.file).library) {
                    Some(said) => error.related(said.span, "the backbone sets the limit here"),
                    None => error,
                };
                self.errors.push(error);
                None
            }
            (None, Some(most)) => Some(task.max_tokens.min(most)),
            _ => Some(task.max_tokens),
        }
    }

    /// Reports rules of the `tune` block whose sites do not exist.
    fn check_sites_exist(&mut self, backbone: &BackboneDef) {
        let rules = std::mem::take(&mut self.plan.rules);
        let name = &backbone.name.text;
        for rule in &rules {
            let kind = &rule.kind.text;
            let Some(&(_, count)) = self.site_counts.iter().find(|(k, _)| k == kind) else {
                if !self.site_counts.is_empty() || self.errors.is_empty() {
                    let error = Diagnostic::error(rule.kind.span, format!("`{name}` has no site `{kind}`"));
                    let error = match kind.as_str() {
                        "projection" => error.hint("projections are nested in sites: `every attention { … on q }`"),
                        _ => error.suggest(kind, self.site_counts.iter().map(|(k, _)| k.as_str())),
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

    fn check_rows_exist(&mut self) {
        let known: Vec<&str> = self.params.iter().map(|p| &*p.name).collect();
        for rows in self.plan.rows.iter().filter(|r| !r.found) {
            let name = &rows.tensor.text;
            let error = Diagnostic::error(rows.tensor.span, format!("the backbone has no tensor `{name}`"));
            self.errors.push(error.suggest(name, known.iter().copied()));
        }
    }

    /// Marks the backbone tensors that match a `train "…"` pattern as trainable.
    fn apply_train_patterns(&mut self) {
        for TrainPattern { pattern, method, used, rates } in std::mem::take(&mut self.train_patterns) {
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
                        let error = conflicting_rates(used.unwrap_or(pattern.span), &param.name, param.lr, lr);
                        self.errors.push(error.hint("let one rule train it, or give both the same `lr`"));
                    }
                    new |= param.trainable != Trainable::All;
                    param.trainable = Trainable::All;
                }
            }
            if any && !new {
                let title = format!("all tensors that `{method}` selects train already");
                let error = Diagnostic::error(used.unwrap_or(pattern.span), title);
                self.errors.push(error.hint("leave it out"));
            }
            if !any {
                let error =
                    Diagnostic::error(pattern.span, format!("no tensor of the backbone is named `{}`", pattern.text));
                self.report_of(&method, used, error.hint("`*` matches any part of a name: `\"*.bias\"`"));
            }
        }
    }

    /// Checks that the loss depends on every weight of a method, and that every applied method trains something.
    fn check_weights_reach_loss(&mut self) {
        let read = self.loss_dependencies(&[]);
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
                let error = error.hint("use it in the equations of the site, or remove it");
                unread.push((method.clone(), used, error));
            }
        }
        for (method, used, error) in unread {
            self.report_of(&method, Some(used), error);
        }
        let mut idle: Vec<(Span, &MethodDef)> = Vec::new();
        for applied in self.plan.rules.iter().flat_map(|r| &r.uses) {
            if !training.contains(&applied.spec_span()) && !idle.iter().any(|(span, _)| *span == applied.spec_span()) {
                idle.push((applied.spec_span(), applied.method));
            }
        }
        for (used, method) in idle {
            let name = &method.name;
            if !self.applied.iter().any(|a| a.method == name.text) {
                self.errors.push(Diagnostic::error(used, format!("`{}` is applied at no site", name.text)));
                continue;
            }
            let error = Diagnostic::error(name.span, format!("`{}` trains nothing", name.text));
            self.report_of(&name.text, Some(used), error.hint("declare a `weight` that is not frozen"));
        }
    }

    /// Checks that stored values depend on weights alone.
    fn check_stored_without_batch(&mut self) {
        let inputs = self.graph.args.iter().filter(|a| a.role == Role::Input);
        let of_batch = self.graph.dependents_of(inputs.map(|a| a.value));
        let stored = std::mem::take(&mut self.stored);
        for stored in stored.iter().filter(|s| of_batch.contains(&s.value)) {
            let title = format!("`{}` depends on the batch, so it cannot be stored", stored.name);
            let error = Diagnostic::error(stored.span, title).hint("store a value that depends on weights alone");
            self.report_of(&stored.method, stored.used, error);
        }
        self.stored = stored;
    }

    /// The trained tensors of methods on which the loss depends only through stored values.
    fn replaced(&self) -> Vec<String> {
        let given: Vec<Value> = self.stored.iter().map(|s| s.value).collect();
        let read = self.loss_dependencies(&given);
        let trained = self.params.iter().filter(|p| matches!(p.origin, Origin::Method(_)));
        let trained = trained.filter(|p| p.trainable != Trainable::No);
        let unread = |name: &str| self.graph.args.iter().all(|a| a.name != name || !read.contains(&a.value));
        trained.filter(|p| unread(&p.name)).map(|p| p.name.clone()).collect()
    }

    /// The values that the loss depends on, not followed through the values `given`.
    fn loss_dependencies(&self, given: &[Value]) -> HashSet<Value> {
        let mut needed: HashSet<Value> = self.graph.output(LOSS).into_iter().collect();
        for node in self.graph.nodes.iter().rev() {
            if needed.contains(&node.result()) && !given.contains(&node.result()) {
                needed.extend(&node.operands);
            }
        }
        needed
    }

    /// Rejects `label_smoothing` if the loss does not read it.
    fn check_smoothing_is_used(&mut self) {
        let Some(span) = self.unused_smoothing.filter(|_| self.smoothing > 0.0) else { return };
        let title = format!("the loss of a task of {} does not use label smoothing", self.purpose.keyword());
        self.report(Diagnostic::error(span, title).hint("leave `label_smoothing` out"));
    }

    /// Checks that the backbone outputs a loss, and logits that fit the task.
    fn check_outputs(&mut self, model: &ModelDef) {
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
            let (rows, what) = self.purpose.logits_rows();
            if ty.rank() != 2 || ty.shape[0] != rows {
                let title = format!("the logits must have a row for {what}, f32[{rows},classes], found {ty}");
                self.report(Diagnostic::error(span(self, LOGITS), title));
            } else if self.purpose != Purpose::Generation && ty.shape[1] != Dim::Const(self.classes) {
                let title = match self.purpose {
                    Purpose::Regression => format!("the task asks for one number, the logits are {ty}"),
                    _ => format!("the task has {} labels, the logits are {ty}", self.classes),
                };
                self.report(Diagnostic::error(span(self, LOGITS), title).hint("`classes` is the number of labels"));
            }
        }
    }

    /// Checks that the model is causal, which `pack: true` requires: a packed example must not see the examples after
    /// it.
    fn check_causal(&mut self, model: &ModelDef) {
        if self.graph.nodes.iter().any(|node| sees_later_tokens(&node.op)) {
            let name = &model.backbone;
            let title = format!(
                "`pack: true` requires a causal model, but in this `{}` tokens attend to later ones",
                name.text
            );
            let error = Diagnostic::error(name.span, title);
            self.report(error.hint("leave `pack` out, and each example is a sequence of its own"));
        }
    }
}

/// Whether the result row of a token may depend on later tokens, for an operation that the language can produce.
fn sees_later_tokens(op: &Op) -> bool {
    use Op::*;
    match op {
        Scores { causal } => !causal,
        SegmentMean => true,
        // Attention weights exist only for tokens that the scores cover.
        Attend { .. } => false,
        Constant { .. } | Iota { .. } | Add | Sub | Mul | Div | Min | Scale { .. } | Shift { .. } | Float => false,
        Exp | Log | Sqrt | Rsqrt | Sin | Cos | Tanh | Sigmoid | Relu | Step => false,
        Gelu | GeluGrad | GeluTanh | GeluTanhGrad | Detach => false,
        Reshape { .. } | Permute { .. } | Slice { .. } | Pad { .. } | Concat { .. } => false,
        Broadcast { .. } | Reduce { .. } | Matmul { .. } | Dropout { .. } => false,
        Softmax | LogSumExp | Normalize { .. } | Gather { .. } | Scatter { .. } | CrossEntropy { .. } => false,
        // The language has no function for these operations.
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
