//! The checker, from syntax tree to [`Model`]: it resolves names, expands methods at their sites and checks all shapes.
//!
//! The order is: definitions ([`definitions`]), the model's arguments ([`bind`]), task and recipe ([`settings`]), and
//! the `tune` block ([`tune`]). Then the checker executes the backbone's statements ([`expand`], [`site`]): it computes
//! numbers and turns tensor expressions into operations of the graph ([`eval`], [`builtins`]).

mod bind;
mod builtins;
mod checkpoint;
mod counterpart;
mod definitions;
mod eval;
mod expand;
mod finish;
mod frame;
mod learning_rates;
mod named_blocks;
mod projection;
mod purpose;
mod references;
mod settings;
mod site;
mod template;
mod tune;
mod value;

use std::collections::HashMap;

use crate::ast::*;
use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::graph::{Graph, Role, Type, Value};
use crate::model::{AppliedMethod, Model, Origin, Param, Projection};
use crate::names::{Entry, Input};
use crate::recipe::{DecayScope, Recipe};
use crate::source::{Sources, Span};

pub use definitions::Resolver;
use definitions::{Definitions, Files};
use frame::{Frame, Rates};
use learning_rates::OwnRate;
pub(crate) use purpose::purposes;
use references::{assigned_variables, site_kinds};
use site::Site;
use tune::Plan;
use value::Val;

/// The kind of task that the backbone is built for. It determines the types of `labels` and `logits`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Generation,
    Classification,
    Regression,
    TokenClassification,
}

/// A caller of the code that is being executed.
struct Call {
    /// The place of the call.
    span: Span,
    /// A label such as "`lora` is applied here". It is empty for the backbone, whose call needs no mention.
    label: String,
}

impl Call {
    fn applied(method: &str, span: Span) -> Self {
        Call { span, label: format!("`{method}` is applied here") }
    }
}

/// The state of one check.
struct Checker<'a> {
    sources: &'a Sources,
    definitions: Definitions<'a>,
    errors: Vec<Diagnostic>,
    calls: Vec<Call>,
    graph: Graph,
    params: Vec<Param>,
    declared: HashMap<String, Declared>,
    /// The shared weights, with the place of the first declaration, the shape and the value.
    shared: HashMap<String, (Span, Vec<u64>, value::Val)>,
    inputs: HashMap<Input, Value>,
    outputs: HashMap<String, Span>,
    purpose: Purpose,
    /// All purposes of the backbone.
    purposes: Vec<Purpose>,
    classes: u64,
    smoothing: f64,
    /// The place of `label_smoothing` in the recipe, until an equation reads `smoothing`.
    unused_smoothing: Option<Span>,
    /// The tensors that weight decay applies to.
    decays: DecayScope,
    /// The number of dropouts so far. Each has its own random stream.
    dropout_streams: u32,
    /// The nesting depth of the expression that is being evaluated.
    depth: usize,
    /// The number of statements executed so far.
    statements_run: usize,
    /// Whether [`expand`] has stopped because of too many statements.
    out_of_steps: bool,
    plan: Plan<'a>,
    sites: Vec<Site<'a>>,
    /// The kinds of sites that the backbone has.
    site_kinds: Vec<&'a str>,
    /// The number of sites of each kind so far, in order of appearance.
    site_counts: Vec<(String, u64)>,
    /// The patterns of tensors that train by name.
    train_patterns: Vec<TrainPattern>,
    /// The learning rates of the `tune` block.
    own_rates: Vec<OwnRate<'a>>,
    applied: Vec<AppliedMethod>,
    projections: Vec<Projection>,
    stored: Vec<StoredValue>,
    /// The `max_tokens` of the task.
    max_tokens: Option<Located>,
    /// The `longest` of the backbone.
    max_sequence: Option<Located>,
    /// The `positions skip` of the backbone.
    position_skip: Option<Located>,
}

/// An integer and the place where it is written.
#[derive(Clone, Copy)]
struct Located {
    number: u64,
    span: Span,
}

/// The place where a tensor is declared, and the place where the spec applies its method.
#[derive(Clone, Copy)]
struct Declared {
    name: Span,
    used: Option<Span>,
}

/// A `train "…"` statement of a method or a `tune` block.
struct TrainPattern {
    pattern: Text,
    method: String,
    used: Option<Span>,
    rates: Rates,
}

/// A `store … as "…"` statement of a method.
struct StoredValue {
    name: String,
    value: Value,
    span: Span,
    method: String,
    used: Option<Span>,
}

/// Checks a parsed spec. `sources` holds its text as file 0 and receives the files that it imports.
pub(crate) fn check(
    main: Ast,
    sources: Sources,
    overrides: Vec<Diagnostic>,
    resolver: &Resolver,
) -> Result<Model, Diagnostics> {
    with_checker(main, sources, overrides, resolver, |checker, main| checker.spec(main))
}

/// Checks a text that consists of a `train` block.
pub(crate) fn recipe(main: Ast, sources: Sources, overrides: Vec<Diagnostic>) -> Result<Recipe, Diagnostics> {
    with_checker(main, sources, overrides, &crate::no_imports, |checker, main| {
        let block = main.items.iter().find_map(|item| if let Item::Train(block) = item { Some(block) } else { None });
        checker.recipe(block)
    })
}

/// Loads the imports of a text and applies `check` to it.
///
/// # Errors
///
/// All errors in the text and its imports.
fn with_checker<T>(
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
    named_blocks::resolve(&mut files, &sources, &mut errors);
    let definitions = Definitions::collect(&files, &sources, &mut errors);
    let mut checker = Checker::new(&sources, definitions, errors);
    let found = check(&mut checker, &files.asts[0]);
    let errors = checker.errors;
    match found {
        Some(found) if errors.is_empty() => Ok(found),
        _ => Err(Diagnostics::new(errors, sources)),
    }
}

/// The first item of its kind. Further ones are errors.
fn single_item<'a, T>(items: Vec<(&'a T, Span)>, what: &str, errors: &mut Vec<Diagnostic>) -> Option<(&'a T, Span)> {
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
            unused_smoothing: None,
            decays: DecayScope::default(),
            dropout_streams: 0,
            statements_run: 0,
            depth: 0,
            out_of_steps: false,
            plan: Plan::default(),
            sites: Vec::new(),
            site_kinds: Vec::new(),
            site_counts: Vec::new(),
            train_patterns: Vec::new(),
            own_rates: Vec::new(),
            applied: Vec::new(),
            projections: Vec::new(),
            stored: Vec::new(),
            max_tokens: None,
            max_sequence: None,
            position_skip: None,
        }
    }

    fn spec(&mut self, main: &'a Ast) -> Option<Model> {
        let items = &main.items;
        macro_rules! one {
            ($item:ident, $what:literal, $span:expr) => {{
                let found =
                    items.iter().filter_map(|i| if let Item::$item(x) = i { Some((x, $span(x))) } else { None });
                single_item(found.collect(), $what, &mut self.errors)
            }};
        }
        let model = one!(Model, "`model = …`", |m: &ModelDef| m.span);
        let tune = one!(Tune, "`tune` block", |t: &Tune| t.span);
        let task = one!(Task, "`task` block", |t: &Settings| t.name.span);
        let train = one!(Train, "`train` block", |t: &Settings| t.name.span);
        let Some((model, _)) = model else {
            let error = Diagnostic::error(Span::default(), "this file has no `model = …`, so it is not a spec");
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
        // The blocks are checked independently, so that one run reports the errors of all of them.
        let task = self.task(task.map(|t| t.0), model);
        let recipe = self.recipe(train.map(|t| t.0));
        self.smoothing = recipe.as_ref().map_or(0.0, |r| r.label_smoothing);
        self.decays = recipe.as_ref().map_or_else(DecayScope::default, |r| r.decays);

        let what = format!("backbone `{}`", backbone.name.text);
        let built = || Call { span: model.span, label: String::new() };
        // A default that cannot be evaluated is reported at the call that omits the argument.
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

    /// Reports an error together with the calls that lead to it. An error inside the library is reported at its use.
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

    /// Reports an error in a method after the method has been executed.
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
        let uses = self.reject_duplicates(uses, "");
        self.applied.extend(uses.iter().filter(|u| !u.is_mixture()).map(|u| u.at_site("")));
        self.sites.push(Site::model(uses, assigned_variables(&backbone.body)));
        frame.scopes.push(HashMap::new());
        self.run(&mut frame, &backbone.body);
        self.leave_site(&mut frame);
    }

    /// An input of the batch. The first read adds it to the graph's arguments.
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

/// The inputs of the batch that equations may read.
const INPUTS: &[Input] =
    &[Input::Ids, Input::Types, Input::Positions, Input::Starts, Input::Ends, Input::Targets, Input::Labels];
