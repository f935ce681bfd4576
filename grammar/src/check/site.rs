//! Sites, and the methods applied to them.
//!
//! A site is a block of the backbone. A method's block `after V { … }` runs directly after the site's first assignment
//! to `V`, in the order in which the spec applies the methods. The block sees the variables of the site that the
//! method's header names, and the site continues with the values that the block assigns to them.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::frame::{Body, Frame, Owner, Rates};
use super::projection::NestedProjection;
use super::references::{applies_methods, assigned_variables, last_assignment};
use super::value::Val;
use super::{Call, Checker};
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::model::{AppliedMethod, Origin};
use crate::source::Span;

/// The variables of a projection y = x W + b that a method can name.
const PROJECTION_VARIABLES: &[&str] = &["x", "y", "W", "b"];

/// The application of a method by the spec, or by a mixture.
#[derive(Clone)]
pub(super) struct Application<'a> {
    pub method: &'a MethodDef,
    pub args: HashMap<String, Val>,
    pub targets: &'a [Name],
    pub span: Span,
    /// The mixture that applies the method, and the place where the spec applies the mixture.
    pub mixture: Option<(&'a str, Span)>,
    pub rates: Rates,
}

impl Application<'_> {
    /// The place in the spec that causes the application.
    pub fn spec_span(&self) -> Span {
        self.mixture.map_or(self.span, |(_, span)| span)
    }

    /// Whether the method is a mixture, which applies other methods instead of itself.
    pub fn is_mixture(&self) -> bool {
        applies_methods(&self.method.body)
    }

    pub fn at_site(&self, site: &str) -> AppliedMethod {
        let args: BTreeMap<_, _> =
            self.args.iter().filter_map(|(name, value)| Some((name.clone(), value.config()?))).collect();
        let (method, kind) = (self.method.name.text.clone(), self.method.kind.text.clone());
        AppliedMethod { method, site: site.to_owned(), args, kind, model_values: BTreeMap::new(), peft_obstacle: None }
    }
}

/// A method at one site.
pub(super) struct MethodInstance<'a> {
    pub(super) applied: Application<'a>,
    pub(super) owner: Owner,
    /// The variables that the site assigns.
    names: Vec<&'a str>,
    /// The variables of the method, including its parameters.
    pub(super) locals: HashMap<String, Val>,
    started: bool,
    /// The variables whose `after` blocks have run.
    triggered: HashSet<&'a str>,
}

/// A site that is being executed.
pub(super) struct Site<'a> {
    kind: String,
    pub(super) path: String,
    instances: Vec<MethodInstance<'a>>,
    /// The methods for projections nested in the site.
    inner: Vec<Application<'a>>,
    /// The nested projections so far.
    pub(super) nested: Vec<NestedProjection>,
    /// The variables assigned so far, with the values that the backbone computed.
    assigned: Vec<(String, Val)>,
    /// The method that last changed a variable, and the place where the spec applies it.
    last_writer: HashMap<String, (&'a str, Span)>,
}

impl<'a> Site<'a> {
    fn new(kind: &str, path: String, uses: Vec<Application<'a>>, names: Vec<&'a str>) -> Self {
        let (inner, own): (Vec<_>, Vec<_>) = uses.into_iter().partition(|u| !u.targets.is_empty());
        let instances = own.into_iter().map(|u| MethodInstance::new(u, &path, names.clone())).collect();
        let (nested, assigned, last_writer) = (vec![], vec![], HashMap::new());
        Site { kind: kind.to_owned(), path, instances, inner, nested, assigned, last_writer }
    }

    /// The value of the variable as the backbone computed it.
    pub fn backbone_value(&self, name: &str) -> Option<&Val> {
        self.assigned.iter().find(|(n, _)| n == name).map(|(_, value)| value)
    }

    /// The whole model as a site.
    pub fn model(uses: Vec<Application<'a>>, names: Vec<&'a str>) -> Self {
        Site::new("model", String::new(), uses, names)
    }
}

impl<'a> MethodInstance<'a> {
    fn new(applied: Application<'a>, site: &str, names: Vec<&'a str>) -> Self {
        let name = &applied.method.name.text;
        let path = if site.is_empty() { format!("{name}.") } else { format!("{site}.{name}.") };
        let owner = Owner {
            path,
            origin: Some(Origin::Method(name.clone())),
            used: Some(applied.spec_span()),
            rates: applied.rates.clone(),
        };
        let locals = applied.args.clone();
        MethodInstance { applied, owner, names, locals, started: false, triggered: HashSet::new() }
    }
}

impl<'a> Checker<'a> {
    pub(super) fn site(&mut self, frame: &mut Frame<'a>, kind: &Name, path: &Text, body: &'a [Stmt], span: Span) {
        if frame.body != Body::Backbone {
            self.report(Diagnostic::error(span, "only a backbone has sites"));
            return;
        }
        if self.sites.len() > 1 || matches!(&*kind.text, "model" | "projection") {
            let error = Diagnostic::error(kind.span, format!("a site `{}` is not allowed here", kind.text));
            self.report(error.hint("sites cannot be nested; inside a site, write `y = … as projection of x`"));
            return;
        }
        let Some(path) = self.interpolate(frame, path) else { return };
        let ordinal = match self.site_counts.iter_mut().find(|(k, _)| *k == kind.text) {
            Some((_, count)) => {
                *count += 1;
                *count - 1
            }
            None => {
                self.site_counts.push((kind.text.clone(), 1));
                0
            }
        };
        let uses = self.plan.at(&kind.text, ordinal);
        let uses = self.reject_duplicates(uses, &path);
        self.applied.extend(uses.iter().filter(|u| u.targets.is_empty()).map(|u| u.at_site(&path)));
        self.sites.push(Site::new(&kind.text, path, uses, assigned_variables(body)));
        frame.scopes.push(HashMap::new());
        self.run(frame, body);
        self.leave_site(frame);
        frame.scopes.pop();
    }

    /// Reports methods that are applied twice at a site. Methods for nested projections, which have targets, are
    /// checked at the projection.
    pub(super) fn reject_duplicates(&mut self, uses: Vec<Application<'a>>, site: &str) -> Vec<Application<'a>> {
        let projection = self.sites.len() > 1;
        let mut kept: Vec<Application<'a>> = Vec::new();
        for applied in uses {
            let same = |other: &&Application<'a>| {
                std::ptr::eq(other.method, applied.method) && (projection || other.targets.is_empty())
            };
            let Some(first) = kept.iter().find(same).map(|first| first.spec_span()) else {
                kept.push(applied);
                continue;
            };
            let place = if site.is_empty() { "to the model".to_owned() } else { format!("at `{site}`") };
            let title = format!("`{}` is applied twice {place}", applied.method.name.text);
            let error = Diagnostic::error(applied.spec_span(), title).hint("take it out of one of the rules");
            self.errors.push(match first == applied.spec_span() {
                true => error,
                false => error.label("the second is here").related(first, "the first is here"),
            });
        }
        kept
    }

    /// Handles an assignment of the backbone: first the nested projection, then the `after` blocks of the enclosing
    /// site.
    pub(super) fn after_assignment(&mut self, frame: &mut Frame<'a>, name: &Name, nested: Option<&'a Nested>) {
        let made = frame.get(&name.text).cloned().unwrap_or(Val::Unknown);
        if let Some(nested) = nested {
            self.nested_site(frame, name, nested);
        }
        let Some(site) = self.sites.last_mut() else { return };
        if site.backbone_value(&name.text).is_some() {
            return;
        }
        site.assigned.push((name.text.clone(), made));
        let mut instances = std::mem::take(&mut site.instances);
        for instance in &mut instances {
            self.run_after_blocks(frame, instance, &name.text, None);
        }
        if let Some(site) = self.sites.last_mut() {
            site.instances = instances;
        }
    }

    /// Handles `y = … as projection of x`.
    fn nested_site(&mut self, frame: &mut Frame<'a>, name: &Name, nested: &'a Nested) {
        let of = self.eval(frame, &nested.of);
        if nested.kind.text != "projection" {
            let error = Diagnostic::error(nested.kind.span, format!("a nested site cannot be `{}`", nested.kind.text));
            self.report(error.suggest(&nested.kind.text, ["projection"]));
            return;
        }
        let Some(site) = self.sites.last_mut().filter(|s| s.kind != "model") else {
            let error = Diagnostic::error(nested.kind.span, "a projection must be inside a site");
            self.report(error.hint("put it into `site KIND at \"…\" { … }`"));
            return;
        };
        let path = format!("{}.{}", site.path, name.text);
        let input = match &nested.of.kind {
            ExprKind::Name(name) => site.backbone_value(name).cloned(),
            _ => None,
        };
        let made = frame.get(&name.text).cloned().unwrap_or(Val::Unknown);
        let here = |u: &&Application<'a>| u.targets.iter().any(|t| t.text == name.text);
        let uses: Vec<Application<'a>> = site.inner.iter().filter(here).cloned().collect();
        let uses = self.reject_duplicates(uses, &path);
        let parts = self.match_projection(&made);
        let projecting = NestedProjection { name: name.text.clone(), input: input.unwrap_or(of.clone()), x: of, parts };
        for applied in uses {
            self.applied.push(applied.at_site(&path));
            let mut instance = MethodInstance::new(applied, &path, vec![]);
            self.run_after_blocks(frame, &mut instance, "y", Some(&projecting));
            self.finish_instance(frame, &mut instance, PROJECTION_VARIABLES);
        }
        if let Some(site) = self.sites.last_mut() {
            site.nested.push(projecting);
        }
    }

    /// Runs the method's `after` blocks for `variable`. In a projection, `x` and `y` are its input and output.
    fn run_after_blocks(
        &mut self,
        frame: &mut Frame<'a>,
        instance: &mut MethodInstance<'a>,
        variable: &str,
        projection: Option<&NestedProjection>,
    ) {
        let method = instance.applied.method;
        let waits = |s: &&'a Stmt| matches!(&s.kind, StmtKind::After { variable: v, .. } if v.text == variable);
        for statement in method.body.iter().filter(waits) {
            let StmtKind::After { variable, body } = &statement.kind else { continue };
            if !method.variables.iter().any(|v| v.text == variable.text) {
                let error =
                    Diagnostic::error(variable.span, format!("`{}` is not in the method's head", variable.text));
                let error = error.hint(format!("write `on {}({}, …)`", method.kind.text, variable.text));
                self.report_at(&instance.applied, error);
                continue;
            }
            instance.triggered.insert(&variable.text);
            self.run_method(frame, instance, Some(body), projection);
        }
    }

    /// Runs a block of a method with the site's variables in scope, and writes changed variables back to the site.
    fn run_method(
        &mut self,
        frame: &mut Frame<'a>,
        instance: &mut MethodInstance<'a>,
        body: Option<&'a [Stmt]>,
        projection: Option<&NestedProjection>,
    ) {
        let method = instance.applied.method;
        let in_site = |variable: &str| match projection {
            Some(projection) if variable == "y" => projection.name.clone(),
            _ => variable.to_owned(),
        };
        self.enter_method(&instance.applied);
        let mut seen = HashMap::new();
        for variable in &method.variables {
            let value = match (projection, &*variable.text) {
                (Some(projection), "x") => Some(projection.x.clone()),
                (Some(projection), "W" | "b") => Some(self.projection_part(projection, variable)),
                (_, text) => match frame.get(&in_site(text)) {
                    None if !instance.names.contains(&text) => {
                        Some(self.missing_variable(method, variable, &instance.names))
                    }
                    value => value.cloned(),
                },
            };
            if let Some(value) = value {
                seen.insert(variable.text.clone(), value);
            }
        }
        // The scope of the method is innermost, so its variables shadow the site's and new variables belong to it.
        let mut inner = Frame {
            scopes: vec![seen.clone(), std::mem::take(&mut instance.locals)],
            owner: instance.owner.clone(),
            body: Body::Method(method),
            returned: None,
        };
        if !instance.started {
            instance.started = true;
            for statement in method.body.iter().filter(|s| !matches!(s.kind, StmtKind::After { .. })) {
                self.run(&mut inner, std::slice::from_ref(statement));
            }
        }
        if let Some(body) = body {
            self.run(&mut inner, body);
        }
        instance.locals = inner.scopes.pop().unwrap_or_default();
        let after = inner.scopes.pop().unwrap_or_default();
        for variable in &method.variables {
            let own = method.params.iter().any(|p| p.name.text == variable.text);
            if own || instance.locals.remove(&variable.text).is_some() {
                let why = match own {
                    true => "is also a parameter of the method",
                    false => "is not assigned yet when the method assigns it",
                };
                let error = Diagnostic::error(variable.span, format!("the site's `{}` {why}", variable.text));
                self.report(error.hint("use another name"));
            }
            let (Some(old), Some(new)) = (seen.get(&variable.text), after.get(&variable.text)) else { continue };
            if old != new {
                self.write_back(frame, &in_site(&variable.text), variable, (old, new), &instance.applied);
            }
        }
        self.leave_method(&instance.applied);
    }

    /// Reports a variable that the method's header names and the site does not have.
    fn missing_variable(&mut self, method: &MethodDef, variable: &Name, known: &[&str]) -> Val {
        let known = if method.kind.text == "projection" { PROJECTION_VARIABLES } else { known };
        let title = format!("this {} has no `{}`", method.kind.text, variable.text);
        self.report(Diagnostic::error(variable.span, title).suggest(&variable.text, known.iter().copied()));
        Val::Unknown
    }

    fn report_at(&mut self, applied: &Application<'a>, error: Diagnostic) {
        self.enter_method(applied);
        self.report(error);
        self.leave_method(applied);
    }

    pub(super) fn enter_method(&mut self, applied: &Application<'a>) {
        self.calls.extend(applied.mixture.map(|(mixture, span)| Call::applied(mixture, span)));
        self.calls.push(Call::applied(&applied.method.name.text, applied.span));
    }

    pub(super) fn leave_method(&mut self, applied: &Application<'a>) {
        let calls = self.calls.len() - 1 - usize::from(applied.mixture.is_some());
        self.calls.truncate(calls);
    }

    fn write_back(
        &mut self,
        frame: &mut Frame<'a>,
        name: &str,
        variable: &Name,
        (old, new): (&Val, &Val),
        applied: &Application<'a>,
    ) {
        let method = &*applied.method.name.text;
        let given = applied.method.kind.text == "projection" && variable.text != "y";
        match (old, new) {
            (_, Val::Unknown) => frame.set(name, Val::Unknown),
            (Val::Tensor(old), Val::Tensor(new)) if !given => {
                let (was, is) = (self.graph.ty(*old), self.graph.ty(*new));
                if was != is {
                    let title = format!("the site's `{}` is {was}, the method makes it {is}", variable.text);
                    let place = last_assignment(&applied.method.body, &variable.text).unwrap_or(variable.span);
                    let error = Diagnostic::error(place, title);
                    self.report(error.hint("a method must keep the shape of the site's variables"));
                    return;
                }
                let use_here = (method, applied.spec_span());
                let site = self.sites.last_mut();
                let before = site.and_then(|site| site.last_writer.insert(name.to_owned(), use_here));
                if let Some(before) = before
                    && !self.graph.dependents_of([*old]).contains(new)
                {
                    self.report_overwrite(applied.method, name, &variable.text, before, applied.spec_span());
                }
                frame.set(name, Val::Tensor(*new));
            }
            _ => {
                let title = format!("a method cannot set `{}` of the site", variable.text);
                self.report(Diagnostic::error(variable.span, title).hint("use a variable of its own"));
            }
        }
    }

    /// Reports a method that assigns a variable without reading the value that the method before it assigned.
    fn report_overwrite(
        &mut self,
        method: &'a MethodDef,
        name: &str,
        variable: &str,
        before: (&str, Span),
        used: Span,
    ) {
        let (other, span) = before;
        let method_name = &method.name.text;
        let title =
            format!("`{method_name}` overwrites `{name}` without reading it, so the change by `{other}` is lost");
        let error = Diagnostic::error(used, title).label(format!("`{method_name}` is applied here"));
        let error = error.related(span, format!("`{other}` is applied here"));
        let own = |place: &Span| !self.sources.get(place.file).library;
        let error = match last_assignment(&method.body, variable).filter(own) {
            Some(place) => error.related(place, format!("this does not read `{variable}`")),
            None => error,
        };
        self.errors.push(error.hint(format!("apply `{method_name}` before `{other}`")));
    }

    /// Finishes a method at the end of a site: all its `after` blocks must have run.
    fn finish_instance(&mut self, frame: &mut Frame<'a>, instance: &mut MethodInstance<'a>, known: &[&str]) {
        if !instance.started {
            self.run_method(frame, instance, None, None);
        }
        self.resolve_counterpart(frame, instance);
        let method = instance.applied.method;
        for statement in &method.body {
            let StmtKind::After { variable, .. } = &statement.kind else { continue };
            let in_head = method.variables.iter().any(|v| v.text == variable.text);
            // A variable of the header that the site does not have has already been reported.
            let missing = in_head && frame.get(&variable.text).is_none();
            if missing || instance.triggered.contains(&*variable.text) {
                continue;
            }
            let title = format!("this {} never assigns `{}`", method.kind.text, variable.text);
            let error = Diagnostic::error(variable.span, title).suggest(&variable.text, known.iter().copied());
            self.report_at(&instance.applied, error);
        }
    }

    pub(super) fn leave_site(&mut self, frame: &mut Frame<'a>) {
        let Some(site) = self.sites.pop() else { return };
        self.record_projections(&site.path, &site.nested, frame);
        let known: Vec<&str> = site.assigned.iter().map(|(name, _)| &**name).collect();
        for mut instance in site.instances {
            self.finish_instance(frame, &mut instance, &known);
        }
        for applied in &site.inner {
            for target in applied.targets {
                if !site.nested.iter().any(|p| p.name == target.text) {
                    let error =
                        Diagnostic::error(target.span, format!("{} has no projection `{}`", site.kind, target.text));
                    let nested: Vec<&str> = site.nested.iter().map(|p| &*p.name).collect();
                    self.errors.push(error.suggest(&target.text, nested));
                }
            }
        }
    }
}
