//! Executes statements: runs the body of a definition and adds its tensors to the graph.

use std::collections::HashMap;

use super::frame::{Body, Frame};
use super::value::Val;
use super::{Call, Checker, Declared, Located, StoredValue, TrainPattern};
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::graph::{Dim, Role, Type};
use crate::model::{Init, Origin, Param, Trainable};
use crate::source::Span;

/// The maximum number of statements that a spec executes. It stops loops with excessive bounds.
const MAX_STATEMENTS: usize = 50_000;
/// The number of errors after which the check stops.
const MAX_ERRORS: usize = 200;
/// The maximum depth of function calls.
const MAX_CALL_DEPTH: usize = 24;
/// The maximum number of values of a weight. 2⁴⁰ values take 4 TiB in f32, which can only be a mistake.
const MAX_WEIGHT_ELEMENTS: u64 = 1 << 40;

impl<'a> Checker<'a> {
    pub(super) fn run(&mut self, frame: &mut Frame<'a>, body: &'a [Stmt]) {
        for statement in body {
            if self.errors.len() > MAX_ERRORS {
                return;
            }
            self.statements_run += 1;
            if self.statements_run > MAX_STATEMENTS {
                if !std::mem::replace(&mut self.out_of_steps, true) {
                    let error = Diagnostic::error(statement.span, "this spec executes too many statements");
                    let hint = "look at the bounds of its loops: a model has thousands of equations, not millions";
                    self.report(error.hint(hint));
                }
                return;
            }
            self.statement(frame, statement);
            if frame.returned.is_some() {
                return;
            }
        }
    }

    fn statement(&mut self, frame: &mut Frame<'a>, statement: &'a Stmt) {
        let span = statement.span;
        match &statement.kind {
            StmtKind::Weight(weight) => self.weight(frame, weight, span),
            StmtKind::If { condition, then, otherwise } => match self.condition(frame, condition) {
                Some(true) => self.run(frame, then),
                Some(false) => self.run(frame, otherwise),
                None => {}
            },
            StmtKind::For { variable, start, end, body } => {
                let (start, end) = (self.integer(frame, start), self.integer(frame, end));
                let (Some(start), Some(end)) = (start, end) else { return };
                for i in start..end {
                    frame.scopes.push(HashMap::from([(variable.text.clone(), Val::Int(i))]));
                    self.run(frame, body);
                    frame.scopes.pop();
                    if frame.returned.is_some()
                        || self.statements_run > MAX_STATEMENTS
                        || self.errors.len() > MAX_ERRORS
                    {
                        return;
                    }
                    self.statements_run += 1;
                }
            }
            StmtKind::ForTask { purposes, body } => {
                if frame.body != Body::Backbone {
                    let error = Diagnostic::error(span, "only a backbone can have `for` blocks for kinds of tasks");
                    self.report(error);
                } else if self.task_is_one_of(purposes) {
                    self.run(frame, body);
                }
            }
            StmtKind::Site { kind, path, body } => self.site(frame, kind, path, body, span),
            StmtKind::Output { name, value } => {
                let value = match value {
                    Some(value) => self.tensor(frame, value),
                    None => {
                        let value = self.variable(frame, &name.text, name.span);
                        self.as_tensor(value, name.span)
                    }
                };
                if let Some(value) = value {
                    self.output(name.text.clone(), value, name.span);
                }
            }
            StmtKind::Expose { value, name } => {
                let (value, text) = (self.tensor(frame, value), self.interpolate(frame, name));
                if let (Some(value), Some(text)) = (value, text) {
                    self.output(text, value, name.span);
                }
            }
            StmtKind::Store { value, name } => self.store(frame, value, name),
            StmtKind::Tune(rule) => match frame.body {
                // The `tune` block has already collected the rules of a mixture.
                Body::Method(method) if method.kind.text == "model" => {}
                _ => {
                    let error = Diagnostic::error(rule.span(), "only a mixture applies methods");
                    self.report(error.hint("a method `on model` can, and a spec's `tune` block"));
                }
            },
            StmtKind::After { .. } => {
                let error = Diagnostic::error(span, "`after` is allowed only at the top level of a method's body");
                self.report(error.hint("put the `if` or `for` inside it"));
            }
            StmtKind::Return(value) => {
                let value = self.eval(frame, value);
                if frame.body != Body::Function {
                    self.report(Diagnostic::error(span, "only a function can return a value"));
                }
                frame.returned = Some(value);
            }
            StmtKind::Require { condition, message, hint } => {
                if self.condition(frame, condition) == Some(false) {
                    self.report_requirement(frame, condition.span, message, hint.as_ref());
                }
            }
            StmtKind::Longest(value) => {
                let said = self.set_once(frame, value, 1, "the maximum length of a sequence", self.max_sequence);
                self.max_sequence = said.or(self.max_sequence);
            }
            StmtKind::Skip(value) => {
                let said = self.set_once(frame, value, 0, "the token id that positions skip", self.position_skip);
                self.position_skip = said.or(self.position_skip);
            }
            StmtKind::Train(pattern) => match frame.body {
                Body::Method(method) if method.kind.text == "model" => {
                    let (pattern, method) = (pattern.clone(), method.name.text.clone());
                    self.train_patterns.push(TrainPattern {
                        pattern,
                        method,
                        used: frame.owner.used,
                        rates: frame.owner.rates.clone(),
                    });
                }
                _ => {
                    let error = Diagnostic::error(span, "`train` names tensors of the whole model");
                    self.report(error.hint("only a method `on model` can use it"));
                }
            },
            StmtKind::Assign { name, value, nested } => {
                let at = value.span;
                let value = self.eval(frame, value);
                let known = frame.get(&name.text);
                if let (Some(Val::Tensor(_)), false) = (known, matches!(value, Val::Tensor(_) | Val::Unknown)) {
                    let title = format!("`{}` is a tensor, and {} is not", name.text, value.describe(&self.graph));
                    self.report(Diagnostic::error(at, title).hint("use another name"));
                    return;
                }
                if let (Val::Tensor(tensor), Body::Backbone | Body::Method(_)) = (&value, frame.body) {
                    self.graph.name_value(*tensor, &name.text);
                }
                frame.set(&name.text, value);
                match (frame.body, nested) {
                    (Body::Backbone, nested) => self.after_assignment(frame, name, nested.as_ref()),
                    (_, Some(nested)) => {
                        let error = Diagnostic::error(nested.kind.span, "only a backbone has sites");
                        self.report(error.hint("leave out `as … of …`"));
                    }
                    (_, None) => {}
                }
            }
        }
    }

    /// An integer of at least `least` that a backbone may set only once.
    fn set_once(
        &mut self,
        frame: &Frame<'a>,
        value: &'a Expr,
        least: i64,
        what: &str,
        first: Option<Located>,
    ) -> Option<Located> {
        let number = self.integer(frame, value)?;
        let error = match first {
            _ if frame.body != Body::Backbone => {
                Diagnostic::error(value.span, format!("only a backbone can set {what}"))
            }
            Some(first) => Diagnostic::error(value.span, format!("the backbone sets {what} twice"))
                .related(first.span, "the first is here"),
            None if number < least => {
                Diagnostic::error(value.span, format!("{what} is at least {least}, found {number}"))
            }
            None => return Some(Located { number: number as u64, span: value.span }),
        };
        self.report(error);
        None
    }

    /// Reports a `require` that does not hold. The caller has to fix it, so the error points to the call.
    fn report_requirement(&mut self, frame: &Frame<'a>, span: Span, message: &Text, hint: Option<&Text>) {
        let Some(title) = self.interpolate(frame, message) else { return };
        let hint = hint.and_then(|h| self.interpolate(frame, h));
        let mut error = Diagnostic::error(span, title);
        error.hint = hint;
        let library = |span: Span| self.sources.get(span.file).library;
        if !library(span)
            && let Some(call) = self.calls.iter().rev().find(|c| !library(c.span))
        {
            error = Diagnostic { span: call.span, label: "in this use".to_owned(), ..error };
            error = error.related(span, "required here");
        } else {
            error = error.label("required here");
        }
        self.report(error);
    }

    /// Executes `store`: a value that replaces weights of the method after training.
    fn store(&mut self, frame: &Frame<'a>, value: &'a Expr, name: &Text) {
        let span = value.span;
        let (value, text) = (self.tensor(frame, value), self.interpolate(frame, name));
        let (Some(value), Some(text)) = (value, text) else { return };
        let Some(Origin::Method(method)) = &frame.owner.origin else {
            let error = Diagnostic::error(name.span, "only a method can store values in place of its weights");
            self.report(error);
            return;
        };
        if self.graph.ty(value).elements().is_none() {
            let title = format!("a stored value must depend on weights alone, but this is {}", self.graph.ty(value));
            self.report(Diagnostic::error(span, title));
        } else {
            let name = format!("{}{text}", frame.owner.path);
            self.stored.push(StoredValue { name, value, span, method: method.clone(), used: frame.owner.used });
        }
    }

    fn output(&mut self, name: String, value: crate::graph::Value, span: Span) {
        if let Some(first) = self.outputs.insert(name.clone(), span) {
            let error = Diagnostic::error(span, format!("there is an output `{name}` already"));
            let error = if first == span { error } else { error.related(first, "the first is here") };
            self.report(error.hint("put a variable into its name, such as `{layer}`"));
            return;
        }
        self.graph.outputs.push((name, value));
    }

    fn weight(&mut self, frame: &mut Frame<'a>, weight: &'a WeightDef, span: Span) {
        let path = self.interpolate(frame, &weight.path);
        let shape: Vec<Option<u64>> = weight.shape.iter().map(|e| self.axis_length(frame, e)).collect();
        let shape: Option<Vec<u64>> = shape.into_iter().collect();
        let init = self.init(frame, weight, shape.as_deref());
        frame.set(&weight.name.text, Val::Unknown);
        let (Some(path), Some(shape), Some(init)) = (path, shape, init) else { return };
        let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|&n| n <= MAX_WEIGHT_ELEMENTS);
        if elements.is_none() || shape.is_empty() {
            let shape: Vec<Dim> = shape.into_iter().map(Dim::Const).collect();
            let title = format!("a weight cannot have the shape {}", Type::f32(shape));
            self.report(Diagnostic::error(weight.shape_span, title));
            return;
        }
        let shared = weight.marks.contains(&WeightMark::Shared);
        let name = if shared { path } else { format!("{}{path}", frame.owner.path) };
        if shared && let Some((first, known, value)) = self.shared.get(&name).cloned() {
            if known != shape {
                let title = format!("`{name}` is shared, so it has one shape: {known:?} and {shape:?} differ");
                self.report(Diagnostic::error(weight.shape_span, title).related(first, "declared here"));
            }
            frame.set(&weight.name.text, value);
            self.check_shared_rate(&name, &frame.owner.rates, weight);
            return;
        }
        if let Some(&Declared { name: first, .. }) = self.declared.get(&name) {
            let error = Diagnostic::error(weight.path.span, format!("a tensor `{name}` is there already"));
            let error = error.hint("put a variable into its name, such as `{layer}`");
            self.report(if first == weight.path.span { error } else { error.related(first, "declared here") });
            return;
        }
        self.declared.insert(name.clone(), Declared { name: weight.path.span, used: frame.owner.used });
        let origin = match (&frame.owner.origin, weight.marks.contains(&WeightMark::Head)) {
            (Some(origin @ Origin::Method(_)), _) => origin.clone(),
            (_, true) => Origin::Head,
            _ => Origin::Backbone,
        };
        let trainable = match &origin {
            Origin::Method(_) if weight.marks.contains(&WeightMark::Frozen) => Trainable::No,
            Origin::Method(_) => Trainable::All,
            Origin::Head if self.plan.head => Trainable::All,
            _ => self.plan.rows_of(&name, &shape, &mut self.errors),
        };
        let decay = self.decays.applies(&name, shape.len());
        let location = self.sources.location(span);
        let value = self.add_weight_args(&name, &shape, &trainable, &location);
        if shared {
            self.shared.insert(name.clone(), (weight.shape_span, shape.clone(), Val::Tensor(value)));
        }
        let lr = match &origin {
            _ if trainable == Trainable::No => None,
            Origin::Head => self.rate_of(&self.plan.head_rates.clone(), None),
            _ => self.rate_of(&frame.owner.rates, Some(&weight.name.text)),
        };
        self.params.push(Param { name, shape, init, trainable, origin, decay, lr });
        frame.set(&weight.name.text, Val::Tensor(value));
    }

    /// Adds a tensor to the graph's arguments. If only some rows train, the tensor is a concatenation of several
    /// arguments.
    fn add_weight_args(
        &mut self,
        name: &str,
        shape: &[u64],
        trainable: &Trainable,
        location: &crate::graph::Location,
    ) -> crate::graph::Value {
        let dims: Vec<Dim> = shape.iter().map(|&n| Dim::Const(n)).collect();
        match *trainable {
            Trainable::No => self.graph.arg(name, Role::Frozen, None, Type::f32(dims)),
            Trainable::All => self.graph.arg(name, Role::Trainable, None, Type::f32(dims)),
            Trainable::Rows(start, end) => {
                let parts = [(0, start, Role::Frozen), (start, end, Role::Trainable), (end, shape[0], Role::Frozen)];
                let mut part = |(start, end, role): (u64, u64, Role)| {
                    let mut dims = dims.clone();
                    dims[0] = Dim::Const(end - start);
                    self.graph.arg(name, role, Some((start, end)), Type::f32(dims))
                };
                let parts: Vec<_> = parts.into_iter().filter(|p| p.0 < p.1).map(&mut part).collect();
                let joined = self.graph.push(crate::graph::Op::Concat { axis: 0 }, &parts, location);
                joined.expect("parts of one tensor fit")
            }
        }
    }

    /// The initial values of a weight with this shape.
    fn init(&mut self, frame: &Frame<'a>, weight: &'a WeightDef, shape: Option<&[u64]>) -> Option<Init> {
        let name = &weight.init;
        let wanted = match &*name.text {
            "zeros" | "ones" => 0,
            "fill" | "normal" | "truncated" | "uniform" | "value" => 1,
            _ => {
                let error = Diagnostic::error(name.span, format!("there is no initialisation `{}`", name.text));
                self.report(
                    error.suggest(&name.text, ["zeros", "ones", "fill", "normal", "truncated", "uniform", "value"]),
                );
                return None;
            }
        };
        if weight.init_args.len() != wanted {
            let title = match wanted {
                0 => format!("`{}` takes no argument", name.text),
                _ => format!("`{}` takes one number", name.text),
            };
            self.report(Diagnostic::error(name.span, title).hint("`zeros`, `ones`, `normal(0.02)`, `uniform(0.1)`"));
            return None;
        }
        if name.text == "value" {
            let arg = &weight.init_args[0].value;
            let value = self.tensor(frame, arg)?;
            let wanted: Vec<Dim> = shape?.iter().copied().map(Dim::Const).collect();
            if wanted != self.graph.ty(value).shape {
                let title = format!("the weight starts from {}, which is of another shape", self.graph.ty(value));
                self.report(Diagnostic::error(arg.span, title));
                return None;
            }
            return Some(Init::Value(value));
        }
        let number = match weight.init_args.first() {
            Some(arg) => self.number(frame, &arg.value)?,
            None => 0.0,
        };
        if name.text == "fill" {
            return Some(Init::Fill { value: number });
        }
        if !(0.0..=1e6).contains(&number) {
            let title = format!("`{}` expects a spread of 0 or more, found {number}", name.text);
            self.report(Diagnostic::error(weight.init_args[0].value.span, title));
            return None;
        }
        Some(match &*name.text {
            "zeros" => Init::Zeros,
            "ones" => Init::Ones,
            "normal" => Init::Normal { std: number },
            "truncated" => Init::Truncated { scale: number },
            _ => Init::Uniform { bound: number },
        })
    }

    /// Calls a function that is defined in the language.
    pub(super) fn call(&mut self, caller: &Frame<'a>, function: &'a FunctionDef, args: &'a [Arg], span: Span) -> Val {
        let what = format!("`{}`", function.name.text);
        if self.calls.len() >= MAX_CALL_DEPTH {
            let error = Diagnostic::error(span, format!("{what} calls itself without end"));
            self.report(error.hint("functions are for equations that repeat: use `for`"));
            return Val::Unknown;
        }
        let Some(scope) = self.bind(&what, &function.params, args, caller, span, true) else { return Val::Unknown };
        let mut frame = Frame::with(scope);
        frame.owner = caller.owner.clone();
        frame.body = Body::Function;
        self.calls.push(Call { span, label: format!("{what} is called here") });
        self.run(&mut frame, &function.body);
        self.calls.pop();
        match frame.returned {
            Some(value) => value,
            None if self.errors.is_empty() => {
                let error = Diagnostic::error(function.name.span, format!("{what} returns nothing"));
                self.report(error.hint("end it with `return …`"));
                Val::Unknown
            }
            None => Val::Unknown,
        }
    }
}
