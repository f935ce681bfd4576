//! Binds arguments to parameters.

use std::collections::HashMap;

use super::Checker;
use super::frame::Frame;
use super::value::Val;
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::source::Span;

const TYPES: &[&str] = &["int", "float", "bool", "string", "tensor"];

impl<'a> Checker<'a> {
    /// The values of `params`. Only functions take positional arguments; methods and backbones take named ones. `None`
    /// after an error, which has been reported.
    pub(super) fn bind(
        &mut self,
        what: &str,
        params: &'a [ParamDef],
        args: &'a [Arg],
        caller: &Frame<'a>,
        call: Span,
        positional: bool,
    ) -> Option<HashMap<String, Val>> {
        let before = self.errors.len();
        let mut given: HashMap<&str, (&'a Arg, Val)> = HashMap::new();
        for (at, arg) in args.iter().enumerate() {
            let value = self.eval(caller, &arg.value);
            let param = match &arg.name {
                Some(name) => match params.iter().find(|p| p.name.text == name.text) {
                    Some(param) => param,
                    None => {
                        let error = Diagnostic::error(name.span, format!("{what} has no parameter `{}`", name.text));
                        self.report(error.suggest(&name.text, params.iter().map(|p| &*p.name.text)));
                        continue;
                    }
                },
                None if positional && at < params.len() => &params[at],
                None if positional => {
                    let title = format!("{what} takes {} arguments, this is number {}", params.len(), at + 1);
                    self.report(Diagnostic::error(arg.value.span, title));
                    continue;
                }
                None => {
                    let error = Diagnostic::error(arg.value.span, "this argument has no name");
                    let example = params.get(at).or(params.first()).map_or("name", |p| &p.name.text);
                    self.report(error.hint(format!("write `{example}: {}`", self.sources.slice(arg.value.span))));
                    continue;
                }
            };
            if let Some((first, _)) = given.get(&*param.name.text) {
                let title = format!("`{}` is given twice", param.name.text);
                let error = Diagnostic::error(arg.value.span, title).related(first.value.span, "first here");
                self.report(error);
                continue;
            }
            given.insert(&param.name.text, (arg, value));
        }
        let mut frame = Frame::empty();
        for param in params {
            let (value, span) = match (given.remove(&*param.name.text), &param.default) {
                (Some((arg, value)), _) => (value, arg.value.span),
                (None, Some(default)) => (self.eval(&frame, default), default.span),
                (None, None) => {
                    if self.errors.len() == before {
                        let title = format!("{what} requires `{}`", param.name.text);
                        let error =
                            Diagnostic::error(call, title).related(param.name.span, "declared without a default");
                        self.report(error.hint(format!("add `{}: …`", param.name.text)));
                    }
                    (Val::Unknown, call)
                }
            };
            let value = self.convert(value, param, span);
            frame.scopes[0].insert(param.name.text.clone(), value);
        }
        (self.errors.len() == before).then(|| frame.scopes.swap_remove(0))
    }

    /// Converts `value` to the parameter's type.
    fn convert(&mut self, value: Val, param: &ParamDef, span: Span) -> Val {
        let ty = &*param.ty.text;
        match (ty, value) {
            (_, Val::Unknown) => Val::Unknown,
            ("float", Val::Int(n)) => Val::Float(n as f64),
            ("int", v @ Val::Int(_))
            | ("float", v @ Val::Float(_))
            | ("bool", v @ Val::Bool(_))
            | ("string", v @ Val::Str(_))
            | ("tensor", v @ Val::Tensor(_)) => v,
            (_, value) if TYPES.contains(&ty) => {
                let article = if ty == "int" { "an" } else { "a" };
                let found = value.describe(&self.graph);
                let title = format!("`{}` expects {article} {ty}, found {found}", param.name.text);
                let error = Diagnostic::error(span, title).related(param.ty.span, "declared here");
                let text = self.sources.slice(span);
                self.report(match (ty, &value) {
                    ("int", Val::Float(_)) if text.contains('/') => error.hint(format!("`{text}` leaves a remainder")),
                    ("int", Val::Float(x)) => error.hint(format!("write a whole number, such as {}", x.round())),
                    ("bool", _) => error.hint("write `true` or `false`"),
                    ("string", _) => error.hint("write it in double quotes"),
                    _ => error,
                });
                Val::Unknown
            }
            _ => {
                let error = Diagnostic::error(param.ty.span, format!("there is no type `{ty}`"));
                self.report(error.suggest(ty, TYPES.iter().copied()));
                Val::Unknown
            }
        }
    }
}
