//! Learning rates in the `tune` block, which replace the recipe's `lr` for some of the weights.

use super::Checker;
use super::frame::{Frame, Rates};
use super::references::declared_weights;
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::model::{Param, Trainable};
use crate::source::Span;

/// A learning rate of one application of a method, or of the head.
pub(super) struct OwnRate<'a> {
    /// The weight that the rate is for. Without one, the rate is for all weights that have no rate of their own.
    weight: Option<&'a Name>,
    lr: f64,
    span: Span,
    /// The applied method; `None` for the head.
    method: Option<&'a MethodDef>,
    /// Whether a trained weight uses the rate.
    used: bool,
}

impl<'a> Checker<'a> {
    /// Records the rates of one application. Their expressions may read the variables of `frame`.
    pub(super) fn rates(&mut self, frame: &Frame<'a>, rates: &'a [Rate], method: Option<&'a MethodDef>) -> Rates {
        let begin = self.own_rates.len();
        for Rate { weight, value, span } in rates {
            let weight = weight.as_ref();
            let same = |other: &&OwnRate| other.weight.map(|w| &w.text) == weight.map(|w| &w.text);
            if let Some(first) = self.own_rates[begin..].iter().find(same).map(|first| first.span) {
                let what = weight.map_or_else(|| "`lr`".into(), |w| format!("`lr of {}`", w.text));
                let error = Diagnostic::error(*span, format!("{what} is given twice"));
                self.report(error.related(first, "first here"));
                continue;
            }
            let Some(lr) = self.number(frame, value) else { continue };
            if !(lr > 0.0 && lr <= 10.0) {
                let title = format!("`lr` is above 0 and at most 10, found {lr}");
                self.report(Diagnostic::error(value.span, title));
                continue;
            }
            self.own_rates.push(OwnRate { weight, lr, span: *span, method, used: false });
        }
        begin..self.own_rates.len()
    }

    /// The rate of the weight `name`: the weight's own rate, else the rate of the whole application.
    pub(super) fn rate_of(&mut self, rates: &Rates, name: Option<&str>) -> Option<f64> {
        let rates = &mut self.own_rates[rates.clone()];
        let named = rates.iter().position(|r| r.weight.is_some() && r.weight.map(|w| &*w.text) == name);
        let at = named.or_else(|| rates.iter().position(|r| r.weight.is_none()))?;
        rates[at].used = true;
        Some(rates[at].lr)
    }

    /// Checks that a shared tensor has the same rate at every declaration.
    pub(super) fn check_shared_rate(&mut self, name: &str, rates: &Rates, weight: &WeightDef) {
        let trained = |p: &&Param| p.name == name && p.trainable != Trainable::No;
        let Some(known) = self.params.iter().find(trained).map(|p| p.lr) else { return };
        let lr = self.rate_of(rates, Some(&weight.name.text));
        if known != lr {
            let error = conflicting_rates(weight.path.span, name, known, lr);
            self.report(error.hint("it is shared by every place that declares it: give each the same `lr`"));
        }
    }

    /// Reports rates that no trained weight uses.
    pub(super) fn check_rates_are_used(&mut self) {
        let unused: Vec<Diagnostic> =
            self.own_rates.iter().filter(|rate| !rate.used).map(OwnRate::unused_error).collect();
        unused.into_iter().for_each(|error| self.report(error));
    }
}

/// The error for a tensor with two different rates.
pub(super) fn conflicting_rates(span: Span, name: &str, first: Option<f64>, second: Option<f64>) -> Diagnostic {
    let said = |lr: Option<f64>| lr.map_or_else(|| "that of the recipe".into(), |lr| format!("{lr}"));
    Diagnostic::error(span, format!("`{name}` has two learning rates: {} and {}", said(first), said(second)))
}

impl OwnRate<'_> {
    fn unused_error(&self) -> Diagnostic {
        let OwnRate { weight, method, span, .. } = self;
        let Some(method) = method else {
            return Diagnostic::error(*span, "the backbone has no head of its own").hint("leave the rate out");
        };
        let by = &method.name.text;
        let Some(weight) = weight else {
            let title = format!("every weight that `{by}` trains has a rate of its own, so this rate has no effect");
            return Diagnostic::error(*span, title).hint("leave it out");
        };
        let declared = declared_weights(&method.body);
        let name = &weight.text;
        if declared.contains(&&**name) {
            let title = format!("`{by}` does not train its weight `{name}` here");
            return Diagnostic::error(weight.span, title).hint("its arguments leave it out, or it is frozen");
        }
        Diagnostic::error(weight.span, format!("`{by}` has no weight `{name}`")).suggest(name, declared)
    }
}
