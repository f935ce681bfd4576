//! Syntactic queries on a body before it is executed: the names it reads, the variables it assigns, its sites, and the
//! rules of a mixture.

use crate::ast::*;
use crate::source::Span;

/// Whether the method reads `name` in its body or in a default of its parameters.
pub(super) fn method_reads(method: &MethodDef, name: &str) -> bool {
    let defaults = method.params.iter().filter_map(|p| p.default.as_ref());
    defaults.into_iter().any(|e| expr_reads(e, name)) || block_reads(&method.body, name)
}

/// The variables that a body assigns, except inside its sites, whose variables are local.
pub(super) fn assigned_variables(body: &[Stmt]) -> Vec<&str> {
    let mut names = Vec::new();
    walk(body, &mut |s| {
        if let StmtKind::Assign { name, .. } = &s.kind
            && !names.contains(&&*name.text)
        {
            names.push(&name.text);
        }
    });
    names
}

/// The place where a body last assigns a variable.
pub(super) fn last_assignment(body: &[Stmt], variable: &str) -> Option<Span> {
    let mut last = None;
    walk(body, &mut |s| {
        if let StmtKind::Assign { name, .. } = &s.kind
            && name.text == variable
        {
            last = Some(s.span);
        }
    });
    last
}

/// The path of the weight that a body declares as `name`, or the name under which it stores that variable.
pub(super) fn weight_path<'a>(body: &'a [Stmt], name: &str) -> Option<&'a str> {
    let mut found = None;
    walk(body, &mut |s| match &s.kind {
        StmtKind::Weight(weight) if weight.name.text == name => found = Some(&*weight.path.text),
        StmtKind::Store { value, name: path } if matches!(&value.kind, ExprKind::Name(n) if n == name) => {
            found = Some(&*path.text);
        }
        _ => {}
    });
    found
}

/// Whether the body applies other methods, as a mixture does.
pub(super) fn applies_methods(body: &[Stmt]) -> bool {
    body.iter().any(|s| match &s.kind {
        StmtKind::Tune(_) => true,
        StmtKind::If { then, otherwise, .. } => applies_methods(then) || applies_methods(otherwise),
        _ => false,
    })
}

/// The variables of the weights that a body declares.
pub(super) fn declared_weights(body: &[Stmt]) -> Vec<&str> {
    let mut found = Vec::new();
    walk(body, &mut |s| {
        if let StmtKind::Weight(weight) = &s.kind
            && !found.contains(&&*weight.name.text)
        {
            found.push(&*weight.name.text);
        }
    });
    found
}

/// The purposes of the `for …` blocks in a backbone's body.
pub(super) fn nested_purposes(body: &[Stmt]) -> Vec<&Name> {
    let mut found = Vec::new();
    walk(body, &mut |s| {
        if let StmtKind::ForTask { purposes, .. } = &s.kind {
            found.extend(purposes);
        }
    });
    found
}

/// The kinds of the sites in a backbone's body.
pub(super) fn site_kinds(body: &[Stmt]) -> Vec<&str> {
    let mut kinds = Vec::new();
    walk(body, &mut |s| {
        if let StmtKind::Site { kind, .. } = &s.kind
            && !kinds.contains(&&*kind.text)
        {
            kinds.push(&kind.text);
        }
    });
    kinds
}

/// Visits all statements of a body except those inside its sites.
fn walk<'a>(body: &'a [Stmt], visit: &mut impl FnMut(&'a Stmt)) {
    for statement in body {
        visit(statement);
        match &statement.kind {
            StmtKind::If { then, otherwise, .. } => {
                walk(then, visit);
                walk(otherwise, visit);
            }
            StmtKind::For { body, .. } | StmtKind::ForTask { body, .. } | StmtKind::After { body, .. } => {
                walk(body, visit);
            }
            _ => {}
        }
    }
}

fn block_reads(body: &[Stmt], name: &str) -> bool {
    body.iter().any(|s| statement_reads(&s.kind, name))
}

fn statement_reads(kind: &StmtKind, name: &str) -> bool {
    let e = |x: &Expr| expr_reads(x, name);
    let t = |x: &Text| text_reads(&x.text, name);
    match kind {
        StmtKind::Weight(w) => t(&w.path) || w.shape.iter().any(e) || args_read(&w.init_args, name),
        StmtKind::If { condition, then, otherwise } => {
            e(condition) || block_reads(then, name) || block_reads(otherwise, name)
        }
        StmtKind::For { start, end, body, .. } => e(start) || e(end) || block_reads(body, name),
        StmtKind::ForTask { body, .. } => block_reads(body, name),
        StmtKind::Site { path, body, .. } => t(path) || block_reads(body, name),
        StmtKind::Output { value, name: output } => value.as_ref().map_or(output.text == name, e),
        StmtKind::Expose { value, name: path } | StmtKind::Store { value, name: path } => e(value) || t(path),
        StmtKind::After { variable, body } => variable.text == name || block_reads(body, name),
        StmtKind::Return(value) | StmtKind::Longest(value) | StmtKind::Skip(value) => e(value),
        StmtKind::Require { condition, message, hint } => e(condition) || t(message) || hint.as_ref().is_some_and(t),
        StmtKind::Train(pattern) => t(pattern),
        StmtKind::Tune(TuneRule::Sites { select, apply, .. }) => {
            let ordinals = match select {
                Select::Every => &[][..],
                Select::Only(ordinals) | Select::Except(ordinals) => ordinals,
            };
            ordinals.iter().any(|o| e(&o.start) || o.end.as_ref().is_some_and(e))
                || apply.iter().any(|a| args_read(&a.args, name))
        }
        StmtKind::Tune(TuneRule::Rows { start, end, tensor, .. }) => e(start) || e(end) || t(tensor),
        StmtKind::Tune(TuneRule::Model(apply)) => args_read(&apply.args, name),
        StmtKind::Tune(TuneRule::Head { .. }) => false,
        StmtKind::Tune(TuneRule::Train(pattern)) => t(pattern),
        StmtKind::Assign { value, nested, .. } => e(value) || nested.as_ref().is_some_and(|n| e(&n.of)),
    }
}

fn args_read(all: &[Arg], name: &str) -> bool {
    all.iter().any(|a| expr_reads(&a.value, name))
}

/// Whether the expression reads `name`.
pub(super) fn expr_reads(of: &Expr, name: &str) -> bool {
    let e = |x: &Expr| expr_reads(x, name);
    match &of.kind {
        ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Bool(_) => false,
        ExprKind::String(s) => text_reads(s, name),
        ExprKind::Name(n) => n == name,
        ExprKind::List(items) => items.iter().any(e),
        ExprKind::Call { args: all, .. } => args_read(all, name),
        ExprKind::Index { base, subscripts } => {
            let subscript = |s: &Subscript| match s {
                Subscript::Slice { start, end, .. } => [start, end].into_iter().flatten().any(e),
                Subscript::At(at) => e(at),
            };
            e(base) || subscripts.iter().any(subscript)
        }
        ExprKind::Negate(x) | ExprKind::Not(x) => e(x),
        ExprKind::Measured { number, .. } => e(number),
        ExprKind::Binary { left, right, .. } => e(left) || e(right),
    }
}

/// Whether the string interpolates `{name}`.
fn text_reads(of: &str, name: &str) -> bool {
    let inside = |part: &str| part.split_once('}').is_some_and(|(inside, _)| inside.trim() == name);
    of.split('{').skip(1).any(inside)
}
