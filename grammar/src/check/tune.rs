//! The `tune` block: which methods apply where, and what else trains.

use super::frame::{Body, Frame, Rates};
use super::references::{applies_methods, method_reads};
use super::site::Application;
use super::{Call, Checker, TrainPattern};
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::model::Trainable;
use crate::source::Span;

/// The rules of the `tune` block with evaluated arguments.
pub(super) struct Plan<'a> {
    pub rules: Vec<Sites<'a>>,
    /// The methods on the whole model.
    pub model: Vec<Application<'a>>,
    pub rows: Vec<RowRange>,
    /// Whether the task head trains.
    pub head: bool,
    pub head_rates: Rates,
}

impl Default for Plan<'_> {
    fn default() -> Self {
        Plan { rules: Vec::new(), model: Vec::new(), rows: Vec::new(), head: true, head_rates: 0..0 }
    }
}

/// The methods for sites of one kind.
pub(super) struct Sites<'a> {
    pub kind: &'a Name,
    pub only: bool,
    /// The site numbers that are selected if `only`, or excluded otherwise, with their places.
    pub ranges: Vec<(std::ops::Range<i64>, Span)>,
    pub uses: Vec<Application<'a>>,
}

pub(super) struct RowRange {
    pub tensor: Text,
    pub start: i64,
    pub end: i64,
    pub span: Span,
    pub found: bool,
}

impl<'a> Plan<'a> {
    /// The methods at a site of this kind and number, in the order of the spec.
    pub fn at(&self, kind: &str, ordinal: u64) -> Vec<Application<'a>> {
        let here = |rule: &&Sites<'a>| {
            let listed = rule.ranges.iter().any(|(range, _)| range.contains(&(ordinal as i64)));
            rule.kind.text == kind && listed == rule.only
        };
        self.rules.iter().filter(here).flat_map(|rule| rule.uses.iter().cloned()).collect()
    }

    /// Which rows of a backbone tensor train, by a rule `rows … of`.
    pub fn rows_of(&mut self, name: &str, shape: &[u64], errors: &mut Vec<Diagnostic>) -> Trainable {
        let Some(rows) = self.rows.iter_mut().find(|r| r.tensor.text == name) else { return Trainable::No };
        rows.found = true;
        let (start, end, count) = (rows.start, rows.end, shape[0]);
        if start >= end || start < 0 || end as u64 > count {
            let title = match start >= end {
                true => format!("the range {start}..{end} of rows is empty"),
                false => format!("rows {start}..{end} are outside of `{name}`, which has {count}"),
            };
            let error = Diagnostic::error(rows.span, title);
            errors.push(match start >= end {
                true => error.hint("the end is exclusive: `0..3` are rows 0, 1 and 2"),
                false => error.hint(format!("make the tensor larger, such as with `vocab: {end}`")),
            });
            return Trainable::No;
        }
        if (start, end as u64) == (0, count) { Trainable::All } else { Trainable::Rows(start as u64, end as u64) }
    }
}

impl<'a> Checker<'a> {
    pub(super) fn plan(&mut self, tune: &'a Tune, frame: &Frame<'a>) -> Plan<'a> {
        let mut plan = Plan::default();
        let mut head: Option<Span> = None;
        for rule in &tune.rules {
            match rule {
                TuneRule::Sites { .. } => plan.rules.extend(self.site_rule(frame, rule, None)),
                TuneRule::Model(apply) => {
                    let Some(applied) = self.apply(frame, apply, "model", None) else { continue };
                    let mut inside = Frame::with(applied.args.clone());
                    inside.body = Body::Method(applied.method);
                    self.calls.push(Call::applied(&apply.method.text, apply.span));
                    let others = plan.rules.len();
                    self.mixture(&mut inside, &applied.method.body, apply, &mut plan);
                    // The methods of a mixture train at the mixture's rates.
                    plan.rules[others..].iter_mut().flat_map(|rule| &mut rule.uses).for_each(|mixed| {
                        mixed.rates = applied.rates.clone();
                    });
                    self.calls.pop();
                    plan.model.push(applied);
                }
                TuneRule::Rows { start, end, tensor, span } => {
                    let (start, end) = (self.integer(frame, start), self.integer(frame, end));
                    if let Some(other) = plan.rows.iter().find(|r| r.tensor.text == tensor.text) {
                        let error = Diagnostic::error(*span, format!("rows of `{}` are chosen twice", tensor.text));
                        self.report(error.related(other.span, "first here").hint("one range of rows may train"));
                    } else if let (Some(start), Some(end)) = (start, end) {
                        plan.rows.push(RowRange { tensor: tensor.clone(), start, end, span: *span, found: false });
                    }
                }
                TuneRule::Train(pattern) => {
                    self.train_patterns.push(TrainPattern {
                        pattern: pattern.clone(),
                        method: "train".to_owned(),
                        used: None,
                        rates: 0..0,
                    });
                }
                TuneRule::Head { what, rates } => {
                    if let Some(first) = head {
                        let error = Diagnostic::error(what.span, "the `tune` block has two rules for the head");
                        self.report(error.related(first, "first here"));
                    }
                    head = Some(what.span);
                    plan.head_rates = self.rates(frame, rates, None);
                    if let Some(weight) = rates.iter().find_map(|rate| rate.weight.as_ref()) {
                        let error = Diagnostic::error(weight.span, "a head's weights have one rate");
                        self.report(error.hint("write `lr: …` without `of`"));
                    }
                    if let ("frozen", Some(rate)) = (&*what.text, rates.first()) {
                        let error = Diagnostic::error(rate.span, "a frozen head has no learning rate");
                        self.report(error.hint("leave it out, or write `head trainable`"));
                    }
                    match &*what.text {
                        "trainable" => plan.head = true,
                        "frozen" => plan.head = false,
                        other => {
                            let error = Diagnostic::error(what.span, format!("a head cannot be `{other}`"));
                            self.report(error.suggest(other, ["trainable", "frozen"]));
                        }
                    }
                }
            }
        }
        plan
    }

    /// A rule for sites of one kind. In a mixture, `mixture` is its application in the spec.
    fn site_rule(&mut self, frame: &Frame<'a>, rule: &'a TuneRule, mixture: Option<&'a Apply>) -> Option<Sites<'a>> {
        let TuneRule::Sites { kind, select, apply, span } = rule else { return None };
        let (only, ordinals) = match select {
            Select::Every => (false, &[][..]),
            Select::Only(ordinals) => (true, &ordinals[..]),
            Select::Except(ordinals) => (false, &ordinals[..]),
        };
        let ranges = ordinals.iter().filter_map(|o| self.ordinal(frame, o)).collect();
        if apply.is_empty() {
            let error = Diagnostic::error(*span, "nothing is applied here");
            self.report(error.hint("name a method: `{ lora(rank: 8, alpha: 16) on q }`"));
        }
        let uses = apply.iter().filter_map(|a| self.apply(frame, a, &kind.text, mixture)).collect();
        Some(Sites { kind, only, ranges, uses })
    }

    /// Adds the rules of a mixture, which is a method on the whole model that applies other methods.
    fn mixture(&mut self, frame: &mut Frame<'a>, body: &'a [Stmt], applied: &'a Apply, plan: &mut Plan<'a>) {
        for statement in body {
            match &statement.kind {
                StmtKind::Tune(rule) => plan.rules.extend(self.site_rule(frame, rule, Some(applied))),
                StmtKind::If { condition, then, otherwise } if applies_methods(then) || applies_methods(otherwise) => {
                    match self.condition(frame, condition) {
                        Some(true) => self.mixture(frame, then, applied, plan),
                        Some(false) => self.mixture(frame, otherwise, applied, plan),
                        None => {}
                    }
                }
                _ => {}
            }
        }
    }

    fn ordinal(&mut self, frame: &Frame<'a>, ordinal: &'a Ordinal) -> Option<(std::ops::Range<i64>, Span)> {
        let start = self.integer(frame, &ordinal.start)?;
        let Some(end) = &ordinal.end else {
            return Some((start..start.saturating_add(1), ordinal.start.span));
        };
        let (last, span) = (self.integer(frame, end)?, ordinal.start.span.to(end.span));
        if last <= start {
            let error = Diagnostic::error(span, format!("`{start}..{last}` is empty"));
            self.report(error.hint("the end is exclusive: `0..6` are the first six"));
            return None;
        }
        Some((start..last, span))
    }

    /// Whether the model can have sites of this kind.
    fn can_have_sites(&self, kind: &str) -> bool {
        matches!(kind, "model" | "projection") || self.site_kinds.contains(&kind)
    }

    /// Resolves the application of a method: the definition for this kind of site, and the arguments.
    fn apply(
        &mut self,
        frame: &Frame<'a>,
        apply: &'a Apply,
        site: &str,
        mixture: Option<&'a Apply>,
    ) -> Option<Application<'a>> {
        let name = &apply.method;
        let Some(same_name) = self.definitions.methods.get(&*name.text) else {
            let mut known: Vec<&str> = self.definitions.methods.keys().copied().collect();
            known.sort_unstable();
            let error = Diagnostic::error(name.span, format!("there is no method `{}`", name.text));
            self.report(error.suggest(&name.text, known));
            return None;
        };
        let kind = if apply.targets.is_empty() { site } else { "projection" };
        if kind == "projection" && site == "model" {
            let error =
                Diagnostic::error(name.span, format!("`{}` applies to projections, but no site is named", name.text));
            self.report(error.hint(format!("write `every attention {{ {} }}`", self.sources.slice(apply.span))));
            return None;
        }
        let own = |span: Span| !self.sources.get(span.file).library;
        let Some(&method) = same_name.iter().find(|m| m.kind.text == kind) else {
            let nowhere = |m: &&MethodDef| !self.can_have_sites(&m.kind.text);
            if let Some(lost) = same_name.iter().copied().find(nowhere).filter(|m| own(m.kind.span)) {
                let error = Diagnostic::error(lost.kind.span, format!("the backbone has no site `{}`", lost.kind.text));
                let known = self.site_kinds.iter().copied().chain(["projection", "model"]);
                let error = error.suggest(&lost.kind.text, known);
                self.report_of(&name.text, Some(apply.span), error);
                return None;
            }
            let kinds: Vec<&str> = same_name.iter().map(|m| &*m.kind.text).collect();
            let fits: Vec<String> = kinds.iter().map(|k| describe_sites(k)).collect();
            let fits = fits.join(" or ");
            let title = match kind {
                "model" => format!("`{}` does not work on the whole model: it is for {fits}", name.text),
                _ => format!("`{}` does not work on {}: it is for {fits}", name.text, describe_sites(kind)),
            };
            let error = Diagnostic::error(name.span, title);
            let error = match own(same_name[0].kind.span) {
                true => error.related(same_name[0].kind.span, "declared here"),
                false => error,
            };
            let text = self.sources.slice(apply.span).to_owned();
            self.report(match kinds[0] {
                "projection" => error.hint(format!("say which projection: `{text} on q`")),
                "model" => error.hint(format!("write `{text}` outside of `every … {{ }}`")),
                other if kind == "projection" => error.hint(format!("leave out `on …`, in `every {other} {{ }}`")),
                other => error.hint(format!("write `every {other} {{ {text} }}`")),
            });
            return None;
        };
        for (i, target) in apply.targets.iter().enumerate() {
            if let Some(first) = apply.targets[..i].iter().find(|t| t.text == target.text) {
                let error = Diagnostic::error(target.span, format!("`{}` is named twice", target.text));
                self.report(error.related(first.span, "first here"));
            }
        }
        self.calls.push(Call::applied(&name.text, apply.span));
        for param in method.params.iter().filter(|p| !method_reads(method, &p.name.text)) {
            let title = format!("`{}` never reads its parameter `{}`", name.text, param.name.text);
            self.report(Diagnostic::error(param.name.span, title).hint("use it, or leave it out"));
        }
        let what = format!("method `{}`", name.text);
        let args = self.bind(&what, &method.params, &apply.args, frame, apply.span, false);
        self.calls.pop();
        let args = args?;
        if let (Some(_), Some(rate)) = (mixture, apply.rates.first()) {
            let error = Diagnostic::error(rate.span, "a method cannot set the learning rates of another");
            self.report(error.hint("set them in the `tune` block of the spec"));
        }
        let rates = match mixture {
            Some(_) => 0..0,
            None => self.rates(frame, &apply.rates, Some(method)),
        };
        let mixture = mixture.map(|m| (&*m.method.text, m.span));
        Some(Application { method, args, targets: &apply.targets, span: apply.span, mixture, rates })
    }
}

/// A description of the sites of a kind.
fn describe_sites(kind: &str) -> String {
    match kind {
        "model" => "the whole model".to_owned(),
        "projection" => "projections".to_owned(),
        _ => format!("`{kind}` sites"),
    }
}
