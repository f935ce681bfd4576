//! Checks `counterpart` blocks and lowers them to [`Counterpart`].

use std::collections::HashMap;

use super::Checker;
use super::frame::{Body, Frame};
use super::references::{expr_reads, weight_path};
use super::site::MethodInstance;
use crate::ast::*;
use crate::counterpart::*;
use crate::diagnostic::Diagnostic;
use crate::model::ConfigValue;
use crate::source::Span;

/// The result of lowering a line, or the error in it.
type Lowered<T> = Result<T, Box<Diagnostic>>;

/// An error in a line.
fn line_error<T>(span: Span, title: impl Into<String>, hint: &str) -> Lowered<T> {
    let error = Diagnostic::error(span, title.into());
    Err(Box::new(if hint.is_empty() { error } else { error.hint(hint) }))
}

impl<'a> Checker<'a> {
    /// Evaluates the method's counterpart at a site: the variables of the site that it refers to, and its requirements.
    pub(super) fn resolve_counterpart(&mut self, frame: &Frame<'a>, instance: &MethodInstance<'a>) {
        let method = instance.applied.method;
        let Some(counterpart) = &method.counterpart else { return };
        if !self.errors.is_empty() {
            return;
        }
        let seen = |v: &Name| Some((v.text.clone(), frame.get(&v.text)?.clone()));
        let seen: HashMap<_, _> = method.variables.iter().filter_map(seen).collect();
        let mut inside = Frame::with(seen);
        inside.scopes.push(instance.locals.clone());
        inside.body = Body::Method(method);
        self.enter_method(&instance.applied);
        let mut known = vec![];
        let mut peft_obstacle = None;
        for line in &counterpart.lines {
            let values = match line {
                CounterpartLine::Is { values, .. } => &values[..],
                CounterpartLine::Free { written, .. } => written.as_slice(),
                CounterpartLine::Require { condition, message, hint } => {
                    let read = method.variables.iter().filter(|v| expr_reads(condition, &v.text));
                    known.extend(read.filter_map(|v| Some((v.text.clone(), frame.get(&v.text)?.config()?))));
                    if peft_obstacle.is_none() && self.condition(&inside, condition) == Some(false) {
                        let hint = hint.as_ref().and_then(|h| self.interpolate(&inside, h));
                        let title = self.interpolate(&inside, message).unwrap_or_default();
                        peft_obstacle = Some(title + &hint.map(|h| format!("; {h}")).unwrap_or_default());
                    }
                    continue;
                }
                _ => continue,
            };
            for value in values {
                let ExprKind::Name(name) = &value.kind else { continue };
                if name != NULL && !method.params.iter().any(|p| p.name.text == *name) {
                    let found = self.variable(&inside, name, value.span).config();
                    known.extend(found.map(|value| (name.clone(), value)));
                }
            }
        }
        self.leave_method(&instance.applied);
        let site = instance.owner.path.trim_end_matches('.');
        if let Some(applied) = self.applied.iter_mut().rev().find(|a| a.path() == site) {
            applied.model_values = known.into_iter().collect();
            applied.peft_obstacle = peft_obstacle;
        }
    }

    /// The counterparts of all applied methods.
    pub(super) fn counterparts(&mut self) -> Vec<Counterpart> {
        let mut methods: Vec<&'a MethodDef> = vec![];
        for applied in self.plan.rules.iter().flat_map(|r| &r.uses) {
            if !methods.iter().any(|m| std::ptr::eq(*m, applied.method)) {
                methods.push(applied.method);
            }
        }
        let mut all = vec![];
        for method in methods {
            let Some((mut counterpart, errors)) = lower_counterpart(method) else { continue };
            for error in errors {
                self.report_of(&method.name.text, None, error);
            }
            counterpart.sites =
                self.site_counts.iter().find(|(k, _)| *k == counterpart.kind).map_or(0, |(_, count)| *count);
            let others = self.definitions.methods.values().flatten().filter(|m| !std::ptr::eq(**m, method));
            let mut others: Vec<Counterpart> = others.filter_map(|m| Some(lower_counterpart(m)?.0)).collect();
            others.sort_by(|a, b| (&a.method, &a.kind).cmp(&(&b.method, &b.kind)));
            let kind = counterpart.peft_type.clone();
            inherit(method, &mut counterpart, others.iter().filter(|o| o.peft_type == kind));
            all.push(counterpart);
        }
        all
    }
}

/// Lowers the counterpart of a method and collects the errors in it.
fn lower_counterpart(method: &MethodDef) -> Option<(Counterpart, Vec<Diagnostic>)> {
    let def = method.counterpart.as_ref()?;
    let mut counterpart = Counterpart {
        method: method.name.text.clone(),
        kind: method.kind.text.clone(),
        sites: 0,
        peft_type: def.peft_type.text.clone(),
        keys: vec![],
        conditions: vec![],
        tensors: vec![],
        tables: vec![],
        modules: vec![],
    };
    let errors = def.lines.iter().filter_map(|line| Some(*lower_line(method, line, &mut counterpart).err()?)).collect();
    Some((counterpart, errors))
}

/// Adds the keys that other methods of the same `peft_type` declare, so that keys need to be declared once for each
/// type. A method inherits a key that it does not declare itself if it has the parameters that the key's rule names.
/// Where the other methods disagree, the key is inherited only with a rule under which it is off.
fn inherit<'c>(method: &MethodDef, to: &mut Counterpart, others: impl Iterator<Item = &'c Counterpart> + Clone) {
    let has = |name: &str| method.params.iter().any(|p| p.name.text == name);
    let own: Vec<String> = to.keys.iter().map(|k| k.name.clone()).collect();
    let conditions =
        |c: &'c Counterpart, key: &str| c.conditions.iter().filter(|c| c.key == key).collect::<Vec<&Condition>>();
    let mut inherited: Vec<Key> = vec![];
    for (other, key) in others.clone().flat_map(|o| o.keys.iter().map(move |k| (o, k))) {
        let fits = match &key.rule {
            Rule::Is { values, .. } => values.iter().all(|v| !matches!(v, Constant::Name(n) if !has(n))),
            Rule::Free { written } => !matches!(written, Some(Constant::Name(n)) if !has(n)),
        };
        let known = own.contains(&key.name) || inherited.iter().any(|k| k.name == key.name);
        let alike = |o: &'c Counterpart| match o.keys.iter().find(|k| k.name == key.name) {
            Some(found) => found == key && conditions(o, &key.name) == conditions(other, &key.name),
            None => true,
        };
        let off = match &key.rule {
            Rule::Is { values, .. } => {
                matches!(values.first(), Some(Constant::Null | Constant::Value(ConfigValue::Bool(false))))
            }
            Rule::Free { .. } => false,
        };
        if fits && !known && (off || others.clone().all(alike)) {
            inherited.push(key.clone());
            to.conditions.extend(conditions(other, &key.name).into_iter().cloned());
        }
    }
    // The map of definitions has no order, so keys are sorted by name.
    inherited.sort_by(|a, b| a.name.cmp(&b.name));
    to.keys.extend(inherited);
    to.conditions.sort_by(|a, b| a.key.cmp(&b.key));
}

const NULL: &str = "null";

fn lower_line(method: &MethodDef, line: &CounterpartLine, to: &mut Counterpart) -> Lowered<()> {
    match line {
        CounterpartLine::Is { key, values, patterns, hint } => {
            let values = values.iter().map(constant).collect::<Lowered<_>>()?;
            let patterns = patterns.as_ref().map(|p| p.text.clone());
            let hint = hint.as_ref().map(|h| h.text.clone());
            to.keys.push(Key { name: key.text.clone(), rule: Rule::Is { values, patterns, hint } });
        }
        CounterpartLine::Free { key, written } => {
            let written = written.as_ref().map(constant).transpose()?;
            to.keys.push(Key { name: key.text.clone(), rule: Rule::Free { written } });
        }
        CounterpartLine::When { key, value, set } => {
            let Constant::Value(value) = constant(value)? else {
                return line_error(value.span, "the value of a condition is a number, a string, `true` or `false`", "");
            };
            for (name, expr) in set {
                let then = match &*name.text {
                    "W" => residual(expr)?,
                    _ => Consequence::Set { name: parameter(method, name)?, value: scalar(expr)? },
                };
                to.conditions.push(Condition { key: key.text.clone(), value: value.clone(), then });
            }
        }
        CounterpartLine::Tensor { name, axes, projection, value, condition, elsewhere } => {
            if axes.iter().filter(|a| a.kind != ExprKind::Int(1)).count() > 2 {
                let title = "a tensor in PEFT has two axes at most, not counting axes of length 1";
                return line_error(name.span, title, "");
            }
            let (scale, weight) = match &value.kind {
                ExprKind::Binary { op: BinaryOp::Mul, left, right } => (Some(scalar(left)?), &**right),
                _ => (None, value),
            };
            to.tensors.push(Tensor {
                name: name.text.clone(),
                axes: axes.iter().map(|a| axis(method, a)).collect::<Lowered<_>>()?,
                projection: projection.as_ref().map(|p| p.text.clone()),
                weight: weight_of(method, weight)?,
                scale,
                condition: condition.as_ref().map(|c| parameter(method, c)).transpose()?,
                elsewhere: elsewhere.as_ref().map(number).transpose()?,
            });
        }
        CounterpartLine::Table { name, weights } => {
            let named = |w: &Name| {
                let found = weight_path(&method.body, &w.text).filter(|text| !text.contains('{'));
                found.map_or_else(|| no_weight(method, &w.text, w.span), |path| Ok(path.to_owned()))
            };
            let weights = weights.iter().map(named).collect::<Lowered<_>>()?;
            to.tables.push(Table { name: name.text.clone(), weights });
        }
        CounterpartLine::Modules(key) => to.modules.push(key.text.clone()),
        CounterpartLine::Require { .. } => {}
    }
    Ok(())
}

fn constant(expr: &Expr) -> Lowered<Constant> {
    Ok(match &expr.kind {
        ExprKind::Int(n) => Constant::Value(ConfigValue::Int(*n)),
        ExprKind::Float(x) => Constant::Value(ConfigValue::Float(*x)),
        ExprKind::Bool(b) => Constant::Value(ConfigValue::Bool(*b)),
        ExprKind::String(s) => Constant::Value(ConfigValue::Str(s.clone())),
        ExprKind::Name(name) if name == NULL => Constant::Null,
        ExprKind::Name(name) => Constant::Name(name.clone()),
        _ => {
            let title = "a key's value is a number, a string, `true`, `false`, `null` or a name";
            return line_error(expr.span, title, "");
        }
    })
}

fn number(expr: &Expr) -> Lowered<f64> {
    match constant(expr)? {
        Constant::Value(ConfigValue::Int(n)) => Ok(n as f64),
        Constant::Value(ConfigValue::Float(x)) => Ok(x),
        _ => line_error(expr.span, "expected a number", ""),
    }
}

fn scalar(expr: &Expr) -> Lowered<Scalar> {
    Ok(match &expr.kind {
        ExprKind::Int(n) => Scalar::Number(*n as f64),
        ExprKind::Float(x) => Scalar::Number(*x),
        ExprKind::Name(name) => Scalar::Name(name.clone()),
        ExprKind::Call { function, args } if function.text == "sqrt" && args.len() == 1 => {
            Scalar::Sqrt(Box::new(scalar(&args[0].value)?))
        }
        ExprKind::Binary { op, left, right }
            if matches!(op, BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul | BinaryOp::Div) =>
        {
            Scalar::Binary(*op, Box::new(scalar(left)?), Box::new(scalar(right)?))
        }
        _ => {
            let hint = "numbers, names of parameters, `+ - * /` and `sqrt(…)` are allowed here";
            return line_error(expr.span, "this is not an expression over numeric parameters", hint);
        }
    })
}

/// Lowers `W - scale * svd(W, rank)`.
fn residual(expr: &Expr) -> Lowered<Consequence> {
    let none = || {
        let hint = "write `W - svd(W, rank)` or `W - alpha / rank * qr(W, rank)`";
        line_error(expr.span, "this is not a residual of `W`", hint)
    };
    let is_matrix = |e: &Expr| matches!(&e.kind, ExprKind::Name(name) if name == "W");
    let ExprKind::Binary { op: BinaryOp::Sub, left, right } = &expr.kind else { return none() };
    let (scale, call) = match &right.kind {
        ExprKind::Binary { op: BinaryOp::Mul, left, right } => (scalar(left)?, right),
        _ => (Scalar::Number(1.0), right),
    };
    let ExprKind::Call { function, args } = &call.kind else { return none() };
    let part = match &*function.text {
        "svd" => Part::Svd,
        "qr" => Part::Qr,
        _ => return none(),
    };
    match &args[..] {
        [matrix, rank] if is_matrix(left) && is_matrix(&matrix.value) => {
            Ok(Consequence::Residual { scale, part, rank: scalar(&rank.value)? })
        }
        _ => none(),
    }
}

fn axis(method: &MethodDef, expr: &Expr) -> Lowered<Axis> {
    match &expr.kind {
        ExprKind::Int(1) => Ok(Axis::One),
        ExprKind::Name(name) if name == "inputs" => Ok(Axis::Inputs),
        ExprKind::Name(name) if name == "outputs" => Ok(Axis::Outputs),
        ExprKind::Name(text) => Ok(Axis::Param(parameter(method, &Name { text: text.clone(), span: expr.span })?)),
        _ => {
            let hint = "an axis is `inputs`, `outputs`, a parameter of the method, or 1";
            line_error(expr.span, "this is not an axis of a tensor in PEFT", hint)
        }
    }
}

fn parameter(method: &MethodDef, name: &Name) -> Lowered<String> {
    match method.params.iter().any(|p| p.name.text == name.text) {
        true => Ok(name.text.clone()),
        false => {
            let title = format!("`{}` has no parameter `{}`", method.name.text, name.text);
            let known = method.params.iter().map(|p| &*p.name.text);
            Err(Box::new(Diagnostic::error(name.span, title).suggest(&name.text, known)))
        }
    }
}

/// The path of a weight of the method.
fn weight_of(method: &MethodDef, expr: &Expr) -> Lowered<String> {
    let ExprKind::Name(name) = &expr.kind else {
        return line_error(expr.span, "a tensor is a weight, or a weight times a number", "such as `alpha / rank * B`");
    };
    let found = weight_path(&method.body, name).filter(|text| !text.contains('{'));
    found.map_or_else(|| no_weight(method, name, expr.span), |path| Ok(path.to_owned()))
}

fn no_weight<T>(method: &MethodDef, name: &str, span: Span) -> Lowered<T> {
    let title = format!("`{}` declares no weight `{name}` under a fixed name", method.name.text);
    line_error(span, title, "name a `weight`, or what the method stores")
}
