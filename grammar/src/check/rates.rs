//! Learning rates that the `tune` block gives to what trains, beside the recipe's `lr`.

use super::Checker;
use super::frame::{Frame, Rates};
use super::mentions::weights;
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::model::{Param, Trainable};
use crate::source::Span;

/// A rate of one application of a method, or of the head.
pub(super) struct OwnRate<'a> {
    /// The weight that it is for; without one, for all that have no rate by name.
    weight: Option<&'a Name>,
    lr: f64,
    span: Span,
    /// `None`: the head's.
    method: Option<&'a MethodDef>,
    /// Something trains by it.
    met: bool,
}

impl<'a> Checker<'a> {
    /// Takes down what one application says. Expressions may read what `frame` has.
    pub(super) fn rates(&mut self, frame: &Frame<'a>, rates: &'a [Rate], method: Option<&'a MethodDef>) -> Rates {
        let begin = self.rates.len();
        for Rate { weight, value, span } in rates {
            let weight = weight.as_ref();
            let same = |other: &&OwnRate| other.weight.map(|w| &w.text) == weight.map(|w| &w.text);
            if let Some(first) = self.rates[begin..].iter().find(same).map(|first| first.span) {
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
            self.rates.push(OwnRate { weight, lr, span: *span, method, met: false });
        }
        begin..self.rates.len()
    }

    /// The rate of what trains under this name: its own, else that of the whole application.
    pub(super) fn rate_of(&mut self, rates: &Rates, name: Option<&str>) -> Option<f64> {
        let rates = &mut self.rates[rates.clone()];
        let named = rates.iter().position(|r| r.weight.is_some() && r.weight.map(|w| &*w.text) == name);
        let at = named.or_else(|| rates.iter().position(|r| r.weight.is_none()))?;
        rates[at].met = true;
        Some(rates[at].lr)
    }

    /// A tensor that several applications share has one rate.
    pub(super) fn shared_rate(&mut self, name: &str, rates: &Rates, weight: &WeightDef) {
        let trained = |p: &&Param| p.name == name && p.trainable != Trainable::No;
        let Some(known) = self.params.iter().find(trained).map(|p| p.lr) else { return };
        let lr = self.rate_of(rates, Some(&weight.name.text));
        if known != lr {
            let error = two_rates(weight.path.span, name, known, lr);
            self.report(error.hint("it is shared by every place that declares it: give each the same `lr`"));
        }
    }

    /// A rate by which nothing trains has no effect.
    pub(super) fn every_rate_counts(&mut self) {
        let unmet: Vec<Diagnostic> = self.rates.iter().filter(|rate| !rate.met).map(OwnRate::unmet).collect();
        unmet.into_iter().for_each(|error| self.report(error));
    }
}

/// What the error says of a tensor that is to have two rates.
pub(super) fn two_rates(span: Span, name: &str, first: Option<f64>, second: Option<f64>) -> Diagnostic {
    let said = |lr: Option<f64>| lr.map_or_else(|| "that of the recipe".into(), |lr| format!("{lr}"));
    Diagnostic::error(span, format!("`{name}` has two learning rates: {} and {}", said(first), said(second)))
}

impl OwnRate<'_> {
    fn unmet(&self) -> Diagnostic {
        let OwnRate { weight, method, span, .. } = self;
        let Some(method) = method else {
            return Diagnostic::error(*span, "the backbone has no head of its own").hint("leave the rate out");
        };
        let by = &method.name.text;
        let Some(weight) = weight else {
            let title = format!("every weight that `{by}` trains has a rate by name: this one is for none");
            return Diagnostic::error(*span, title).hint("leave it out");
        };
        let declared = weights(&method.body);
        let name = &weight.text;
        if declared.contains(&&**name) {
            let title = format!("`{by}` does not train its weight `{name}` here");
            return Diagnostic::error(weight.span, title).hint("its arguments leave it out, or it is frozen");
        }
        Diagnostic::error(weight.span, format!("`{by}` has no weight `{name}`")).suggest(name, declared)
    }
}
