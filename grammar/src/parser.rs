//! The parser, from text to syntax tree. This module handles items and statements; expressions are in [`expr`].

mod checkpoint;
mod counterpart;
mod expr;
mod syntax_error;

use std::iter::{Filter, Peekable};

use pest::Parser;
use pest::iterators::{Pair, Pairs};
use pest_derive::Parser;

use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::source::{FileId, Span};

#[derive(Parser)]
#[grammar = "peft.pest"]
#[grammar = "counterpart.pest"]
struct Grammar;

type Node<'a> = Pair<'a, Rule>;

/// The maximum depth of nested brackets, and the maximum height of an expression's tree. They bound the recursion of
/// the parser and of later stages.
const MAX_BRACKET_DEPTH: usize = 64;
const MAX_OPERATORS: usize = 100;

/// Parses one file. After a syntax error it continues at the next item, so that one run reports several errors.
pub(crate) fn parse(file: FileId, text: &str) -> Result<Ast, Vec<Diagnostic>> {
    if let Some(error) = syntax_error::check_nesting(file, text, MAX_BRACKET_DEPTH) {
        return Err(vec![error]);
    }
    let mut errors = Vec::new();
    let mut rest = text.to_owned();
    loop {
        match Grammar::parse(Rule::file, &rest) {
            Ok(pairs) if errors.is_empty() => {
                let mut builder = Builder { file, errors };
                let ast = Ast { items: pairs.flat_map(Pair::into_inner).filter_map(|p| builder.item(p)).collect() };
                return if builder.errors.is_empty() { Ok(ast) } else { Err(builder.errors) };
            }
            Ok(_) => return Err(errors),
            Err(e) => {
                let (error, at) = syntax_error::explain(file, &rest, e);
                errors.push(error);
                match syntax_error::next_item(text, at) {
                    Some(next) => rest = syntax_error::blank(text, next),
                    None => return Err(errors),
                }
            }
        }
    }
}

/// Parses the value of an override, a single expression that starts at byte `skip` of the file.
pub(crate) fn parse_value(file: FileId, text: &str, skip: usize) -> Result<Expr, Vec<Diagnostic>> {
    if let Some(error) = syntax_error::check_nesting(file, text, MAX_BRACKET_DEPTH) {
        return Err(vec![error]);
    }
    let blanked = syntax_error::blank(text, skip);
    match Grammar::parse(Rule::value, &blanked) {
        Ok(mut pairs) => {
            let mut builder = Builder { file, errors: Vec::new() };
            let value = builder.with_unit(&mut Children::of(pairs.next().expect("one `value`")));
            if builder.errors.is_empty() { Ok(value) } else { Err(builder.errors) }
        }
        Err(e) => Err(vec![syntax_error::explain(file, &blanked, e).0]),
    }
}

/// Builds the syntax tree from pest's pairs. The grammar guarantees which children a pair has.
struct Builder {
    file: FileId,
    errors: Vec<Diagnostic>,
}

/// The children of a pair in grammar order, without keywords.
struct Children<'a>(Peekable<Filter<Pairs<'a, Rule>, IsContent<'a>>>);

type IsContent<'a> = fn(&Node<'a>) -> bool;

impl<'a> Children<'a> {
    fn of(pair: Node<'a>) -> Self {
        let filter: IsContent<'a> = |p| !is_keyword(p.as_rule());
        Children(pair.into_inner().filter(filter).peekable())
    }
    fn next(&mut self) -> Node<'a> {
        self.0.next().expect("the grammar guarantees this child")
    }
    fn next_if(&mut self, rule: Rule) -> Option<Node<'a>> {
        self.0.next_if(|p| p.as_rule() == rule)
    }
}

fn is_keyword(rule: Rule) -> bool {
    use Rule::*;
    matches!(
        rule,
        kw_import
            | kw_backbone
            | kw_method
            | kw_fn
            | kw_model
            | kw_tune
            | kw_task
            | kw_train
            | kw_prefix
            | kw_from
            | kw_is
            | kw_key
            | kw_tensor
            | kw_checkpoint
            | kw_gguf
            | kw_permute
            | kw_model_type
            | kw_weight
            | kw_head
            | kw_shared
            | kw_frozen
            | kw_site
            | kw_at
            | kw_if
            | kw_else
            | kw_for
            | kw_in
            | kw_output
            | kw_expose
            | kw_store
            | kw_after
            | kw_return
            | kw_require
            | kw_longest
            | kw_positions
            | kw_skip
            | kw_as
            | kw_of
            | kw_on
            | kw_every
            | kw_layers
            | kw_only
            | kw_except
            | kw_rows
            | kw_lr
            | kw_counterpart
            | kw_free
            | kw_when
            | kw_elsewhere
            | kw_table
            | kw_modules
    )
}

impl Builder {
    fn span(&self, pair: &Node) -> Span {
        let text = pair.as_str().trim_end();
        let start = pair.as_span().start();
        Span::new(self.file, start, start + text.len())
    }

    fn name(&self, pair: Node) -> Name {
        Name { text: pair.as_str().to_owned(), span: self.span(&pair) }
    }

    fn text(&self, pair: Node) -> Text {
        let quoted = pair.as_str();
        Text { text: quoted[1..quoted.len() - 1].to_owned(), span: self.span(&pair) }
    }

    fn item(&mut self, pair: Node) -> Option<Item> {
        let span = self.span(&pair);
        let rule = pair.as_rule();
        let mut c = Children::of(pair);
        Some(match rule {
            Rule::import => {
                let what = c.next();
                let what = match what.as_rule() {
                    Rule::string => Imported::File(self.text(what).text),
                    _ => Imported::Module(what.as_str().to_owned()),
                };
                Item::Import(Import { what, span })
            }
            Rule::backbone => {
                let name = self.name(c.next());
                let params = self.params(c.next());
                let purposes = c.next_if(Rule::purposes).map_or(vec![], |p| self.purposes(p));
                let mut body = Children::of(c.next());
                let checkpoint = body.next_if(Rule::checkpoint).map_or(vec![], |p| self.checkpoint(p));
                let body = body.0.map(|p| self.statement(p)).collect();
                Item::Backbone(BackboneDef { name, params, purposes, checkpoint, body })
            }
            Rule::method => {
                let name = self.name(c.next());
                let params = self.params(c.next());
                let mut on = Children::of(c.next());
                let kind = self.name(on.next());
                let variables = on.0.map(|p| self.name(p)).collect();
                let (body, counterpart) = self.method_body(c.next());
                Item::Method(MethodDef { name, params, kind, variables, body, counterpart })
            }
            Rule::function => {
                let name = self.name(c.next());
                let params = self.params(c.next());
                Item::Function(FunctionDef { name, params, body: self.block(c.next()), span })
            }
            Rule::model => Item::Model(ModelDef { backbone: self.name(c.next()), args: self.args(c.next()), span }),
            Rule::tune => Item::Tune(Tune { rules: c.0.map(|p| self.rule(p)).collect(), span }),
            Rule::task => {
                let name = self.name(c.next());
                Item::Task(match c.next_if(Rule::settings) {
                    Some(p) => Settings { name, entries: self.settings(p), of: None },
                    None => Settings { of: Some(name.clone()), name, entries: vec![] },
                })
            }
            Rule::train => {
                let name = Name { text: "train".into(), span: Span { end: span.start + 5, ..span } };
                let of = c.next_if(Rule::definition_name).map(|p| self.name(Children::of(p).next()));
                let entries = c.next_if(Rule::settings).map_or(vec![], |p| self.settings(p));
                Item::Train(Settings { name, entries, of })
            }
            _ => return None,
        })
    }

    fn params(&mut self, pair: Node) -> Vec<ParamDef> {
        let param = |b: &mut Builder, pair| {
            let mut c = Children::of(pair);
            let (name, ty) = (b.name(c.next()), b.name(c.next()));
            let default = c.next_if(Rule::expr).map(|p| b.expr(p));
            let from = c.next_if(Rule::string).map(|p| b.text(p));
            let absent = c.next_if(Rule::absent).map(|p| b.expr(Children::of(p).next()));
            ParamDef { name, ty, default, from, absent }
        };
        pair.into_inner().map(|p| param(self, p)).collect()
    }

    fn settings(&mut self, pair: Node) -> Vec<Setting> {
        let setting = |b: &mut Builder, pair| {
            let mut c = Children::of(pair);
            Setting { key: b.name(c.next()), value: b.with_unit(&mut c) }
        };
        pair.into_inner().map(|p| setting(self, p)).collect()
    }

    /// An expression with an optional unit.
    fn with_unit(&mut self, c: &mut Children) -> Expr {
        let number = self.expr(c.next());
        let Some(unit) = c.next_if(Rule::unit).map(|p| self.name(p)) else { return number };
        let span = number.span.to(unit.span);
        Expr { kind: ExprKind::Measured { number: Box::new(number), unit }, span }
    }

    fn rule(&mut self, pair: Node) -> TuneRule {
        let span = self.span(&pair);
        match pair.as_rule() {
            Rule::at_sites => {
                let mut c = Children::of(pair);
                let selector = c.next();
                let span = self.span(&selector);
                let layers = selector.as_rule() == Rule::layers;
                let mut s = Children::of(selector);
                let (kind, select) = if layers {
                    let ordinals = self.ordinals(s.next());
                    (self.name(s.next()), Select::Only(ordinals))
                } else {
                    let kind = self.name(s.next());
                    let select = match s.0.next() {
                        None => Select::Every,
                        Some(p) => {
                            let only = p.as_rule() == Rule::only;
                            let ordinals = self.ordinals(Children::of(p).next());
                            if only { Select::Only(ordinals) } else { Select::Except(ordinals) }
                        }
                    };
                    (kind, select)
                };
                TuneRule::Sites { kind, select, apply: c.0.map(|p| self.apply(p)).collect(), span }
            }
            Rule::rows => {
                let mut c = Children::of(pair);
                let (start, end) = (self.expr(c.next()), self.expr(c.next()));
                TuneRule::Rows { start, end, tensor: self.text(c.next()), span }
            }
            Rule::head => {
                let mut c = Children::of(pair);
                TuneRule::Head { what: self.name(c.next()), rates: self.rates(c.next_if(Rule::rates)) }
            }
            Rule::train_glob => TuneRule::Train(self.text(Children::of(pair).next())),
            _ => TuneRule::Model(self.apply(pair)),
        }
    }

    fn ordinals(&mut self, pair: Node) -> Vec<Ordinal> {
        let ordinal = |b: &mut Builder, pair: Node| {
            let mut c = pair.into_inner();
            let start = b.expr(c.next().expect("the grammar guarantees this child"));
            Ordinal { start, end: c.next().map(|p| b.expr(p)) }
        };
        pair.into_inner().map(|p| ordinal(self, p)).collect()
    }

    fn apply(&mut self, pair: Node) -> Apply {
        let span = self.span(&pair);
        let mut c = Children::of(pair);
        let (method, args) = (self.name(c.next()), self.args(c.next()));
        let targets = c.next_if(Rule::targets).map_or(vec![], |p| Children::of(p).0.map(|n| self.name(n)).collect());
        Apply { method, args, targets, rates: self.rates(c.next_if(Rule::rates)), span }
    }

    fn rates(&mut self, pair: Option<Node>) -> Vec<Rate> {
        let rate = |b: &mut Builder, pair| {
            let span = b.span(&pair);
            let mut c = Children::of(pair);
            Rate { weight: c.next_if(Rule::name).map(|p| b.name(p)), value: b.expr(c.next()), span }
        };
        pair.into_iter().flat_map(Pair::into_inner).map(|p| rate(self, p)).collect()
    }

    fn purposes(&mut self, pair: Node) -> Vec<Name> {
        pair.into_inner().filter(|p| p.as_rule() == Rule::name).map(|p| self.name(p)).collect()
    }

    fn block(&mut self, pair: Node) -> Vec<Stmt> {
        pair.into_inner().map(|p| self.statement(p)).collect()
    }

    fn statement(&mut self, pair: Node) -> Stmt {
        let span = self.span(&pair);
        let rule = pair.as_rule();
        match rule {
            Rule::weight => return Stmt { kind: self.weight(pair), span },
            Rule::at_sites => return Stmt { kind: StmtKind::Tune(self.rule(pair)), span },
            _ => {}
        }
        let mut c = Children::of(pair);
        let kind = match rule {
            Rule::if_stmt => {
                let (condition, then) = (self.expr(c.next()), self.block(c.next()));
                let otherwise = match c.0.next() {
                    None => vec![],
                    Some(p) if p.as_rule() == Rule::block => self.block(p),
                    Some(p) => vec![self.statement(p)],
                };
                StmtKind::If { condition, then, otherwise }
            }
            Rule::for_loop => {
                let (variable, start, end) = (self.name(c.next()), self.expr(c.next()), self.expr(c.next()));
                StmtKind::For { variable, start, end, body: self.block(c.next()) }
            }
            Rule::for_task => StmtKind::ForTask { purposes: self.purposes(c.next()), body: self.block(c.next()) },
            Rule::site => {
                let (kind, path) = (self.name(c.next()), self.text(c.next()));
                StmtKind::Site { kind, path, body: self.block(c.next()) }
            }
            Rule::output => {
                let name = self.name(c.next());
                StmtKind::Output { name, value: c.next_if(Rule::expr).map(|p| self.expr(p)) }
            }
            Rule::expose => StmtKind::Expose { value: self.expr(c.next()), name: self.text(c.next()) },
            Rule::store => StmtKind::Store { value: self.expr(c.next()), name: self.text(c.next()) },
            Rule::after => StmtKind::After { variable: self.name(c.next()), body: self.block(c.next()) },
            Rule::return_stmt => StmtKind::Return(self.expr(c.next())),
            Rule::require => {
                let (condition, message) = (self.expr(c.next()), self.text(c.next()));
                StmtKind::Require { condition, message, hint: c.next_if(Rule::string).map(|p| self.text(p)) }
            }
            Rule::longest => StmtKind::Longest(self.expr(c.next())),
            Rule::skip => StmtKind::Skip(self.expr(c.next())),
            Rule::train_glob => StmtKind::Train(self.text(c.next())),
            _ => {
                let (name, value) = (self.name(c.next()), self.expr(c.next()));
                let nested = c.next_if(Rule::nested).map(|p| {
                    let mut c = Children::of(p);
                    Nested { kind: self.name(c.next()), of: self.expr(c.next()) }
                });
                StmtKind::Assign { name, value, nested }
            }
        };
        Stmt { kind, span }
    }

    fn weight(&mut self, pair: Node) -> StmtKind {
        let mut c = Children::of(pair);
        let mut marks = vec![];
        while let Some(mark) = c.next_if(Rule::mark) {
            marks.push(match mark.as_str().trim() {
                "head" => WeightMark::Head,
                "shared" => WeightMark::Shared,
                _ => WeightMark::Frozen,
            });
        }
        let (name, path, list) = (self.name(c.next()), self.text(c.next()), c.next());
        let shape_span = self.span(&list);
        let shape = list.into_inner().map(|p| self.expr(p)).collect();
        let init = self.name(c.next());
        let init_args = c.next_if(Rule::args).map_or(vec![], |p| self.args(p));
        StmtKind::Weight(WeightDef { marks, name, path, shape, shape_span, init, init_args })
    }
}
