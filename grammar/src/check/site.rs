//! Sites, and the methods at work in them.
//!
//! A site is a block of the backbone. A method's `after V { … }` runs right after the site's own first
//! assignment to `V`, in the order in which the spec applies methods. It sees the site's variables that
//! its head names, and what it assigns to them the site goes on with.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::frame::{Body, Frame, Owner, Rates};
use super::mentions::{any_rule, assigned, assignment};
use super::projection::Projecting;
use super::value::Val;
use super::{Call, Checker};
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::model::{Applied, Origin};
use crate::source::Span;

/// What a method of a projection y = x W + b reads of it.
const SIDES: &[&str] = &["x", "y", "W", "b"];

/// A method as the spec applies it.
#[derive(Clone)]
pub(super) struct Use<'a> {
    pub method: &'a MethodDef,
    pub args: HashMap<String, Val>,
    pub targets: &'a [Name],
    pub span: Span,
    /// The mixture that applies it, and where the spec applies that.
    pub mixture: Option<(&'a str, Span)>,
    pub rates: Rates,
}

impl Use<'_> {
    /// The place in the spec that asks for it.
    pub fn asked(&self) -> Span {
        self.mixture.map_or(self.span, |(_, span)| span)
    }

    /// It is a mixture: others work in its place.
    pub fn mixes(&self) -> bool {
        any_rule(&self.method.body)
    }

    pub fn at(&self, site: &str) -> Applied {
        let args: BTreeMap<_, _> =
            self.args.iter().filter_map(|(name, value)| Some((name.clone(), value.config()?))).collect();
        let (method, kind) = (self.method.name.text.clone(), self.method.kind.text.clone());
        Applied { method, site: site.to_owned(), args, kind, known: BTreeMap::new(), unlike: None }
    }
}

/// A method at one site.
pub(super) struct Instance<'a> {
    pub(super) applied: Use<'a>,
    pub(super) owner: Owner,
    /// What the site's statements set.
    names: Vec<&'a str>,
    /// Its own variables, parameters among them.
    pub(super) locals: HashMap<String, Val>,
    begun: bool,
    /// Which variables' `after` blocks have run.
    fired: HashSet<&'a str>,
}

/// A site that is being run.
pub(super) struct Site<'a> {
    kind: String,
    pub(super) path: String,
    instances: Vec<Instance<'a>>,
    /// Methods for the sites nested in it.
    inner: Vec<Use<'a>>,
    /// Nested sites met so far.
    pub(super) nested: Vec<Projecting>,
    /// Every variable assigned, with the value that the backbone gave it.
    assigned: Vec<(String, Val)>,
    /// Which method last changed a variable, and where the spec applies it.
    changed: HashMap<String, (&'a str, Span)>,
}

impl<'a> Site<'a> {
    fn new(kind: &str, path: String, uses: Vec<Use<'a>>, names: Vec<&'a str>) -> Self {
        let (inner, own): (Vec<_>, Vec<_>) = uses.into_iter().partition(|u| !u.targets.is_empty());
        let instances = own.into_iter().map(|u| Instance::new(u, &path, names.clone())).collect();
        let (nested, assigned, changed) = (vec![], vec![], HashMap::new());
        Site { kind: kind.to_owned(), path, instances, inner, nested, assigned, changed }
    }

    /// The variable as the backbone made it.
    pub fn original(&self, name: &str) -> Option<&Val> {
        self.assigned.iter().find(|(n, _)| n == name).map(|(_, value)| value)
    }

    /// The whole model as a site.
    pub fn model(uses: Vec<Use<'a>>, names: Vec<&'a str>) -> Self {
        Site::new("model", String::new(), uses, names)
    }
}

impl<'a> Instance<'a> {
    fn new(applied: Use<'a>, site: &str, names: Vec<&'a str>) -> Self {
        let name = &applied.method.name.text;
        let path = if site.is_empty() { format!("{name}.") } else { format!("{site}.{name}.") };
        let owner = Owner {
            path,
            origin: Some(Origin::Method(name.clone())),
            used: Some(applied.asked()),
            rates: applied.rates.clone(),
        };
        let locals = applied.args.clone();
        Instance { applied, owner, names, locals, begun: false, fired: HashSet::new() }
    }
}

impl<'a> Checker<'a> {
    pub(super) fn site(&mut self, frame: &mut Frame<'a>, kind: &Name, path: &Text, body: &'a [Stmt], span: Span) {
        if frame.body != Body::Backbone {
            self.report(Diagnostic::error(span, "only a backbone has sites"));
            return;
        }
        if self.sites.len() > 1 || matches!(&*kind.text, "model" | "projection") {
            let error = Diagnostic::error(kind.span, format!("a site `{}` cannot stand here", kind.text));
            self.report(error.hint("sites stand side by side; inside one, write `y = … as projection of x`"));
            return;
        }
        let Some(path) = self.fill(frame, path) else { return };
        let ordinal = match self.kinds.iter_mut().find(|(k, _)| *k == kind.text) {
            Some((_, count)) => {
                *count += 1;
                *count - 1
            }
            None => {
                self.kinds.push((kind.text.clone(), 1));
                0
            }
        };
        let uses = self.plan.at(&kind.text, ordinal);
        let uses = self.once_each(uses, &path);
        self.applied.extend(uses.iter().filter(|u| u.targets.is_empty()).map(|u| u.at(&path)));
        self.sites.push(Site::new(&kind.text, path, uses, assigned(body)));
        frame.scopes.push(HashMap::new());
        self.run(frame, body);
        self.leave_site(frame);
        frame.scopes.pop();
    }

    /// A method has one place at a site. Those for projections in it (which have targets) are looked at there.
    pub(super) fn once_each(&mut self, uses: Vec<Use<'a>>, site: &str) -> Vec<Use<'a>> {
        let projection = self.sites.len() > 1;
        let mut kept: Vec<Use<'a>> = Vec::new();
        for applied in uses {
            let same = |other: &&Use<'a>| {
                std::ptr::eq(other.method, applied.method) && (projection || other.targets.is_empty())
            };
            let Some(first) = kept.iter().find(same).map(|first| first.asked()) else {
                kept.push(applied);
                continue;
            };
            let place = if site.is_empty() { "to the model".to_owned() } else { format!("at `{site}`") };
            let title = format!("`{}` is applied twice {place}", applied.method.name.text);
            let error = Diagnostic::error(applied.asked(), title).hint("take it out of one of the rules");
            self.errors.push(match first == applied.asked() {
                true => error,
                false => error.label("the second is here").related(first, "the first is here"),
            });
        }
        kept
    }

    /// The backbone has assigned a variable: nested site first, then what the enclosing site waits for.
    pub(super) fn assigned(&mut self, frame: &mut Frame<'a>, name: &Name, nested: Option<&'a Nested>) {
        let made = frame.get(&name.text).cloned().unwrap_or(Val::Unknown);
        if let Some(nested) = nested {
            self.nested_site(frame, name, nested);
        }
        let Some(site) = self.sites.last_mut() else { return };
        if site.original(&name.text).is_some() {
            return;
        }
        site.assigned.push((name.text.clone(), made));
        let mut instances = std::mem::take(&mut site.instances);
        for instance in &mut instances {
            self.fire(frame, instance, &name.text, None);
        }
        if let Some(site) = self.sites.last_mut() {
            site.instances = instances;
        }
    }

    /// `y = … as projection of x`
    fn nested_site(&mut self, frame: &mut Frame<'a>, name: &Name, nested: &'a Nested) {
        let of = self.eval(frame, &nested.of);
        if nested.kind.text != "projection" {
            let error = Diagnostic::error(nested.kind.span, format!("a nested site is no `{}`", nested.kind.text));
            self.report(error.suggest(&nested.kind.text, ["projection"]));
            return;
        }
        let Some(site) = self.sites.last_mut().filter(|s| s.kind != "model") else {
            let error = Diagnostic::error(nested.kind.span, "a projection stands inside a site");
            self.report(error.hint("put it into `site KIND at \"…\" { … }`"));
            return;
        };
        let path = format!("{}.{}", site.path, name.text);
        let input = match &nested.of.kind {
            ExprKind::Name(name) => site.original(name).cloned(),
            _ => None,
        };
        let made = frame.get(&name.text).cloned().unwrap_or(Val::Unknown);
        let here = |u: &&Use<'a>| u.targets.iter().any(|t| t.text == name.text);
        let uses: Vec<Use<'a>> = site.inner.iter().filter(here).cloned().collect();
        let uses = self.once_each(uses, &path);
        let parts = self.take_apart(&made);
        let projecting = Projecting { name: name.text.clone(), input: input.unwrap_or(of.clone()), x: of, parts };
        for applied in uses {
            self.applied.push(applied.at(&path));
            let mut instance = Instance::new(applied, &path, vec![]);
            self.fire(frame, &mut instance, "y", Some(&projecting));
            self.complete(frame, &mut instance, SIDES);
        }
        if let Some(site) = self.sites.last_mut() {
            site.nested.push(projecting);
        }
    }

    /// Runs the method's blocks that wait for `variable`. In a projection, `x` and `y` stand for its two sides.
    fn fire(
        &mut self,
        frame: &mut Frame<'a>,
        instance: &mut Instance<'a>,
        variable: &str,
        projection: Option<&Projecting>,
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
            instance.fired.insert(&variable.text);
            self.run_method(frame, instance, Some(body), projection);
        }
    }

    /// Runs a block of a method with the site's variables in sight, and hands its changes back.
    fn run_method(
        &mut self,
        frame: &mut Frame<'a>,
        instance: &mut Instance<'a>,
        body: Option<&'a [Stmt]>,
        projection: Option<&Projecting>,
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
                (Some(projection), "W" | "b") => Some(self.part(projection, variable)),
                (_, text) => match frame.get(&in_site(text)) {
                    None if !instance.names.contains(&text) => Some(self.never(method, variable, &instance.names)),
                    value => value.cloned(),
                },
            };
            if let Some(value) = value {
                seen.insert(variable.text.clone(), value);
            }
        }
        // The method's own variables come last: they shadow the site's, and new ones belong to it.
        let mut inner = Frame {
            scopes: vec![seen.clone(), std::mem::take(&mut instance.locals)],
            owner: instance.owner.clone(),
            body: Body::Method(method),
            returned: None,
        };
        if !instance.begun {
            instance.begun = true;
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
                let why =
                    if own { "is a parameter of the method, too" } else { "is not there yet when the method sets it" };
                let error = Diagnostic::error(variable.span, format!("the site's `{}` {why}", variable.text));
                self.report(error.hint("use another name"));
            }
            let (Some(old), Some(new)) = (seen.get(&variable.text), after.get(&variable.text)) else { continue };
            if old != new {
                self.hand_back(frame, &in_site(&variable.text), variable, (old, new), &instance.applied);
            }
        }
        self.leave_method(&instance.applied);
    }

    /// A variable that the method's head names and the site never has.
    fn never(&mut self, method: &MethodDef, variable: &Name, known: &[&str]) -> Val {
        let known = if method.kind.text == "projection" { SIDES } else { known };
        let title = format!("this {} has no `{}`", method.kind.text, variable.text);
        self.report(Diagnostic::error(variable.span, title).suggest(&variable.text, known.iter().copied()));
        Val::Unknown
    }

    fn report_at(&mut self, applied: &Use<'a>, error: Diagnostic) {
        self.enter_method(applied);
        self.report(error);
        self.leave_method(applied);
    }

    pub(super) fn enter_method(&mut self, applied: &Use<'a>) {
        self.calls.extend(applied.mixture.map(|(mixture, span)| Call::applied(mixture, span)));
        self.calls.push(Call::applied(&applied.method.name.text, applied.span));
    }

    pub(super) fn leave_method(&mut self, applied: &Use<'a>) {
        let calls = self.calls.len() - 1 - usize::from(applied.mixture.is_some());
        self.calls.truncate(calls);
    }

    fn hand_back(
        &mut self,
        frame: &mut Frame<'a>,
        name: &str,
        variable: &Name,
        (old, new): (&Val, &Val),
        applied: &Use<'a>,
    ) {
        let method = &*applied.method.name.text;
        let given = applied.method.kind.text == "projection" && variable.text != "y";
        match (old, new) {
            (_, Val::Unknown) => frame.set(name, Val::Unknown),
            (Val::Tensor(old), Val::Tensor(new)) if !given => {
                let (was, is) = (self.graph.ty(*old), self.graph.ty(*new));
                if was != is {
                    let title = format!("the site's `{}` is {was}, the method makes it {is}", variable.text);
                    let place = assignment(&applied.method.body, &variable.text).unwrap_or(variable.span);
                    let error = Diagnostic::error(place, title);
                    self.report(error.hint("what the site goes on with keeps its shape"));
                    return;
                }
                let use_here = (method, applied.asked());
                let site = self.sites.last_mut();
                let before = site.and_then(|site| site.changed.insert(name.to_owned(), use_here));
                if let Some(before) = before
                    && !self.graph.made_of([*old]).contains(new)
                {
                    self.lost(applied.method, name, &variable.text, before, applied.asked());
                }
                frame.set(name, Val::Tensor(*new));
            }
            _ => {
                let title = format!("a method cannot set `{}` of the site", variable.text);
                self.report(Diagnostic::error(variable.span, title).hint("use a variable of its own"));
            }
        }
    }

    /// A method has set a variable without a look at what the one before it made of it.
    fn lost(&mut self, method: &'a MethodDef, name: &str, variable: &str, before: (&str, Span), used: Span) {
        let (other, span) = before;
        let method_name = &method.name.text;
        let title = format!("`{method_name}` computes `{name}` anew: what `{other}` has made of it is lost");
        let error = Diagnostic::error(used, title).label(format!("`{method_name}` is applied here"));
        let error = error.related(span, format!("`{other}` is applied here"));
        let own = |place: &Span| !self.sources.get(place.file).library;
        let error = match assignment(&method.body, variable).filter(own) {
            Some(place) => error.related(place, format!("this does not read `{variable}`")),
            None => error,
        };
        self.errors.push(error.hint(format!("apply `{method_name}` before `{other}`")));
    }

    /// At the end of a site: every block of every method must have found its place.
    fn complete(&mut self, frame: &mut Frame<'a>, instance: &mut Instance<'a>, known: &[&str]) {
        if !instance.begun {
            self.run_method(frame, instance, None, None);
        }
        self.in_peft(frame, instance);
        let method = instance.applied.method;
        for statement in &method.body {
            let StmtKind::After { variable, .. } = &statement.kind else { continue };
            let in_head = method.variables.iter().any(|v| v.text == variable.text);
            // What the head names and the site never has is reported there.
            let missing = in_head && frame.get(&variable.text).is_none();
            if missing || instance.fired.contains(&*variable.text) {
                continue;
            }
            let title = format!("this {} computes no `{}`", method.kind.text, variable.text);
            let error = Diagnostic::error(variable.span, title).suggest(&variable.text, known.iter().copied());
            self.report_at(&instance.applied, error);
        }
    }

    pub(super) fn leave_site(&mut self, frame: &mut Frame<'a>) {
        let Some(site) = self.sites.pop() else { return };
        self.projections_of(&site.path, &site.nested, frame);
        let known: Vec<&str> = site.assigned.iter().map(|(name, _)| &**name).collect();
        for mut instance in site.instances {
            self.complete(frame, &mut instance, &known);
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
