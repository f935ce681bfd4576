//! From syntax to a [`Model`]: names resolved, methods expanded at their sites, every shape checked.
//!
//! The order is: definitions ([`definitions`]), the model's arguments ([`bind`]), task and recipe
//! ([`settings`]), the tune block ([`tune`]), then the backbone's statements are run ([`expand`], [`site`]):
//! numbers are computed, tensors become operations of the graph ([`eval`], [`builtins`]).

mod bind;
mod builtins;
mod checkpoint;
mod counterpart;
mod definitions;
mod eval;
mod expand;
mod finish;
mod frame;
mod mentions;
mod projection;
mod purpose;
mod rates;
mod settings;
mod site;
mod taken;
mod template;
mod tune;
mod value;

use std::collections::HashMap;

use crate::ast::*;
use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::graph::{Graph, Role, Type, Value};
use crate::model::{Applied, Model, Origin, Param, Projection};
use crate::names::{Entry, Input};
use crate::recipe::{Decays, Recipe};
use crate::source::{Sources, Span};

pub use definitions::Resolver;
use definitions::{Definitions, Files};
use frame::{Frame, Rates};
use mentions::{assigned, site_kinds};
pub(crate) use purpose::purposes;
use rates::OwnRate;
use site::Site;
use tune::Plan;
use value::Val;

/// What a backbone computes, of what it is made for; it decides what `labels` are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Generation,
    Classification,
    Regression,
    TokenClassification,
}

/// Where code runs that was called from elsewhere.
struct Call {
    /// Of the call.
    span: Span,
    /// "`lora` is applied here"; empty for the backbone, whose place goes without saying.
    label: String,
}

impl Call {
    fn applied(method: &str, span: Span) -> Self {
        Call { span, label: format!("`{method}` is applied here") }
    }
}

/// State of one check.
struct Checker<'a> {
    sources: &'a Sources,
    definitions: Definitions<'a>,
    errors: Vec<Diagnostic>,
    calls: Vec<Call>,
    graph: Graph,
    params: Vec<Param>,
    declared: HashMap<String, Declared>,
    /// Shared weights: where first declared, their shape and value.
    shared: HashMap<String, (Span, Vec<u64>, value::Val)>,
    inputs: HashMap<Input, Value>,
    outputs: HashMap<String, Span>,
    purpose: Purpose,
    /// All that the backbone is for.
    purposes: Vec<Purpose>,
    classes: u64,
    smoothing: f64,
    /// Where the recipe asks for it, as long as nothing has read it.
    smoothing_unread: Option<Span>,
    /// What weight decay applies to.
    decays: Decays,
    /// Dropouts so far: each has a random stream of its own.
    streams: u32,
    /// Expressions being computed, each inside the one before.
    depth: usize,
    /// Statements run so far.
    steps: usize,
    /// They were too many.
    exhausted: bool,
    plan: Plan<'a>,
    sites: Vec<Site<'a>>,
    /// Kinds of site that the backbone has.
    site_kinds: Vec<&'a str>,
    /// How many sites there are of each kind, in order of appearance.
    kinds: Vec<(String, u64)>,
    /// Tensors that train by name.
    globs: Vec<Glob>,
    /// What the tune block says of learning rates.
    rates: Vec<OwnRate<'a>>,
    applied: Vec<Applied>,
    projections: Vec<Projection>,
    stored: Vec<Stored>,
    /// The task's `max_tokens`.
    max_tokens: Option<Said>,
    /// The backbone's `longest`.
    longest: Option<Said>,
    /// The backbone's `positions skip`.
    skipped: Option<Said>,
}

/// A whole number, and where it is said.
#[derive(Clone, Copy)]
struct Said {
    number: u64,
    span: Span,
}

/// Where a tensor is declared, and where the spec applies the method it is of.
#[derive(Clone, Copy)]
struct Declared {
    name: Span,
    used: Option<Span>,
}

/// `train "…"` of a method.
struct Glob {
    pattern: Text,
    method: String,
    used: Option<Span>,
    rates: Rates,
}

/// `store … as "…"` of a method.
struct Stored {
    name: String,
    value: Value,
    span: Span,
    method: String,
    used: Option<Span>,
}

/// Checks a parsed spec. `sources` holds its text as file 0, and gets everything it imports.
pub(crate) fn check(
    main: Ast,
    sources: Sources,
    overrides: Vec<Diagnostic>,
    resolver: &Resolver,
) -> Result<Model, Diagnostics> {
    checked(main, sources, overrides, resolver, |checker, main| checker.spec(main))
}

/// Checks a text that has a `train` block and nothing else.
pub(crate) fn recipe(main: Ast, sources: Sources, overrides: Vec<Diagnostic>) -> Result<Recipe, Diagnostics> {
    checked(main, sources, overrides, &crate::no_imports, |checker, main| {
        let block = main.items.iter().find_map(|item| if let Item::Train(block) = item { Some(block) } else { None });
        checker.recipe(block)
    })
}

/// What `check` makes of a text and of the files that it imports, or everything that is wrong.
fn checked<T>(
    main: Ast,
    mut sources: Sources,
    overrides: Vec<Diagnostic>,
    resolver: &Resolver,
    check: impl for<'a> FnOnce(&mut Checker<'a>, &'a Ast) -> Option<T>,
) -> Result<T, Diagnostics> {
    let mut errors = overrides;
    let mut files = match Files::load(main, &mut sources, resolver) {
        Ok(files) => files,
        Err(e) => {
            errors.extend(e);
            return Err(Diagnostics::new(errors, sources));
        }
    };
    taken::take(&mut files, &sources, &mut errors);
    let definitions = Definitions::collect(&files, &sources, &mut errors);
    let mut checker = Checker::new(&sources, definitions, errors);
    let found = check(&mut checker, &files.asts[0]);
    let errors = checker.errors;
    match found {
        Some(found) if errors.is_empty() => Ok(found),
        _ => Err(Diagnostics::new(errors, sources)),
    }
}

/// The only item of its kind in a spec; the others are errors.
fn only<'a, T>(items: Vec<(&'a T, Span)>, what: &str, errors: &mut Vec<Diagnostic>) -> Option<(&'a T, Span)> {
    for (_, span) in items.iter().skip(1) {
        let error = Diagnostic::error(*span, format!("a spec has one {what}"));
        errors.push(error.related(items[0].1, "the first is here"));
    }
    items.into_iter().next()
}

impl<'a> Checker<'a> {
    fn new(sources: &'a Sources, definitions: Definitions<'a>, errors: Vec<Diagnostic>) -> Self {
        Checker {
            sources,
            definitions,
            errors,
            calls: Vec::new(),
            graph: Graph::new(Entry::Forward.name()),
            params: Vec::new(),
            declared: HashMap::new(),
            shared: HashMap::new(),
            inputs: HashMap::new(),
            outputs: HashMap::new(),
            purpose: Purpose::Generation,
            purposes: vec![],
            classes: 2,
            smoothing: 0.0,
            smoothing_unread: None,
            decays: Decays::default(),
            streams: 0,
            steps: 0,
            depth: 0,
            exhausted: false,
            plan: Plan::default(),
            sites: Vec::new(),
            site_kinds: Vec::new(),
            kinds: Vec::new(),
            globs: Vec::new(),
            rates: Vec::new(),
            applied: Vec::new(),
            projections: Vec::new(),
            stored: Vec::new(),
            max_tokens: None,
            longest: None,
            skipped: None,
        }
    }

    fn spec(&mut self, main: &'a Ast) -> Option<Model> {
        let items = &main.items;
        macro_rules! one {
            ($item:ident, $what:literal, $span:expr) => {{
                let found =
                    items.iter().filter_map(|i| if let Item::$item(x) = i { Some((x, $span(x))) } else { None });
                only(found.collect(), $what, &mut self.errors)
            }};
        }
        let model = one!(Model, "`model = …`", |m: &ModelDef| m.span);
        let tune = one!(Tune, "`tune` block", |t: &Tune| t.span);
        let task = one!(Task, "`task` block", |t: &Settings| t.name.span);
        let train = one!(Train, "`train` block", |t: &Settings| t.name.span);
        let Some((model, _)) = model else {
            let error = Diagnostic::error(Span::default(), "this file names no model: it is no spec");
            self.errors.push(error.hint("add a line such as `model = gpt2(layers: 12)`"));
            return None;
        };
        let Some(&backbone) = self.definitions.backbones.get(&*model.backbone.text) else {
            let name = &model.backbone;
            let error = Diagnostic::error(name.span, format!("there is no backbone `{}`", name.text));
            let mut known: Vec<&str> = self.definitions.backbones.keys().copied().collect();
            known.sort_unstable();
            self.errors.push(error.suggest(&name.text, known));
            return None;
        };
        self.purposes = self.purposes_of(backbone)?;
        self.purpose = self.purposes[0];
        // What is wrong with one block does not hide what is wrong with another.
        let task = self.task(task.map(|t| t.0), model);
        let recipe = self.recipe(train.map(|t| t.0));
        self.smoothing = recipe.as_ref().map_or(0.0, |r| r.label_smoothing);
        self.decays = recipe.as_ref().map_or_else(Decays::default, |r| r.decays);

        let what = format!("backbone `{}`", backbone.name.text);
        let built = || Call { span: model.span, label: String::new() };
        // A default that has no value is shown where it was left to itself.
        self.calls.push(built());
        let args = self.bind(&what, &backbone.params, &model.args, &Frame::empty(), model.span, false);
        self.calls.pop();
        self.site_kinds = site_kinds(&backbone.body);
        if let Some((tune, _)) = tune {
            let unknown = || backbone.params.iter().map(|p| (p.name.text.clone(), Val::Unknown)).collect();
            self.plan = self.plan(tune, &Frame::with(args.clone().unwrap_or_else(unknown)));
        }
        let args = args?;
        self.calls.push(built());
        self.backbone(backbone, args.clone());
        self.calls.clear();
        self.finish(backbone, model, tune.map(|t| t.1), args, (task?, recipe?))
    }

    /// Files an error with the calls that lead to it. What lies in the library is shown where it is used.
    fn report(&mut self, mut error: Diagnostic) {
        let library = |span: Span| self.sources.get(span.file).library;
        let mut calls = self.calls.iter().rev().filter(|c| !library(c.span));
        if library(error.span)
            && let Some(call) = calls.next()
        {
            let label = if error.label.is_empty() { "here".to_owned() } else { error.label };
            error.related.insert(0, (error.span, label));
            (error.span, error.label) = (call.span, "in this use".to_owned());
        }
        for call in calls.filter(|c| !c.label.is_empty()) {
            let shown = |span: &Span| call.span.covers(*span);
            if !shown(&error.span) && !error.related.iter().any(|(span, _)| shown(span)) {
                error.related.push((call.span, call.label.clone()));
            }
        }
        self.errors.push(error);
    }

    /// Files an error about a method that does not run any more.
    fn report_of(&mut self, method: &str, used: Option<Span>, error: Diagnostic) {
        let before = self.calls.len();
        self.calls.extend(used.map(|span| Call::applied(method, span)));
        self.report(error);
        self.calls.truncate(before);
    }

    fn backbone(&mut self, backbone: &'a BackboneDef, args: HashMap<String, Val>) {
        let mut frame = Frame::with(args);
        frame.owner.origin = Some(Origin::Backbone);
        let uses = std::mem::take(&mut self.plan.model);
        let uses = self.once_each(uses, "");
        self.applied.extend(uses.iter().filter(|u| !u.mixes()).map(|u| u.at("")));
        self.sites.push(Site::model(uses, assigned(&backbone.body)));
        frame.scopes.push(HashMap::new());
        self.run(&mut frame, &backbone.body);
        self.leave_site(&mut frame);
    }

    /// An input of the batch, made an argument of the graph when first read.
    fn input(&mut self, input: Input) -> Value {
        use crate::graph::Dim::*;
        let ty = match input {
            Input::Ids | Input::Types | Input::Positions => Type::i32([Tokens]),
            Input::Starts | Input::Ends => Type::i32([Sequences]),
            Input::Labels => self.purpose.labels(),
            Input::Rng => Type::i32([Const(2)]),
            _ => Type::i32([Targets]),
        };
        let graph = &mut self.graph;
        *self.inputs.entry(input).or_insert_with(|| graph.arg(input.name(), Role::Input, None, ty))
    }
}

/// A batch's inputs that equations may read.
const INPUTS: &[Input] =
    &[Input::Ids, Input::Types, Input::Positions, Input::Starts, Input::Ends, Input::Targets, Input::Labels];
