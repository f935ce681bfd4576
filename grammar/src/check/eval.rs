//! Evaluates expressions: computes numbers, and adds operations to the graph for tensors.

use super::frame::{Body, Frame};
use super::value::Val;
use super::{Checker, INPUTS};
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::graph::{DType, Dim, Location, Op, Type, Value};
use crate::source::Span;

/// The maximum nesting depth of expressions, including those of called functions. It bounds the use of the stack.
const MAX_EXPR_DEPTH: usize = 160;
/// The maximum length of an axis that a spec may declare, in elements.
const MAX_AXIS_LENGTH: i64 = 1 << 31;
/// The maximum length of an interpolated string in bytes. A string that contains itself twice doubles with each
/// statement.
const MAX_STRING_BYTES: usize = 4096;

impl<'a> Checker<'a> {
    pub(super) fn eval(&mut self, frame: &Frame<'a>, expr: &'a Expr) -> Val {
        self.depth += 1;
        let value = if self.depth > MAX_EXPR_DEPTH {
            let error = Diagnostic::error(expr.span, "calls and expressions are nested too deep");
            self.report(error.hint("does a function call itself? For equations that repeat there is `for`"));
            Val::Unknown
        } else {
            self.eval_kind(frame, expr)
        };
        self.depth -= 1;
        value
    }

    fn eval_kind(&mut self, frame: &Frame<'a>, expr: &'a Expr) -> Val {
        match &expr.kind {
            ExprKind::Int(n) => Val::Int(*n),
            ExprKind::Float(x) => Val::Float(*x),
            ExprKind::Bool(b) => Val::Bool(*b),
            ExprKind::String(text) => {
                let text = Text { text: text.clone(), span: expr.span };
                self.interpolate(frame, &text).map_or(Val::Unknown, Val::Str)
            }
            ExprKind::Name(name) => self.variable(frame, name, expr.span),
            ExprKind::List(items) => {
                let mut values = vec![];
                for item in items {
                    values.push(match self.eval(frame, item) {
                        // A list that contains itself twice would double with each statement.
                        list @ Val::List(_) => self.type_error(list, "a list cannot contain lists", item.span),
                        value => value,
                    });
                }
                Val::List(values)
            }
            ExprKind::Call { function, args } => self.eval_call(frame, function, args, expr.span),
            ExprKind::Index { base, subscripts } => self.index(frame, base, subscripts, expr.span),
            ExprKind::Negate(inner) => match self.eval(frame, inner) {
                Val::Int(n) => n.checked_neg().map_or(Val::Unknown, Val::Int),
                Val::Float(x) => Val::Float(-x),
                Val::Tensor(x) => self.push(Op::Scale { by: -1.0 }, &[x], expr.span),
                other => self.type_error(other, "only a number or a tensor can be negated", inner.span),
            },
            ExprKind::Not(inner) => match self.eval(frame, inner) {
                Val::Bool(b) => Val::Bool(!b),
                other => self.type_error(other, "`not` expects `true` or `false`", inner.span),
            },
            ExprKind::Binary { op, left, right } => self.binary(frame, *op, left, right, expr.span),
            ExprKind::Measured { unit, .. } => {
                let error = Diagnostic::error(unit.span, format!("a number of {} is not allowed here", unit.text));
                self.report(error.hint("only the size of a batch has a unit: `batch: 4096 tokens`"));
                Val::Unknown
            }
        }
    }

    fn type_error(&mut self, found: Val, title: &str, span: Span) -> Val {
        if found != Val::Unknown {
            let title = format!("{title}, found {}", found.describe(&self.graph));
            self.report(Diagnostic::error(span, title));
        }
        Val::Unknown
    }

    pub(super) fn variable(&mut self, frame: &Frame<'a>, name: &str, span: Span) -> Val {
        if let Some(value) = frame.get(name) {
            return value.clone();
        }
        if let Some(input) = INPUTS.iter().find(|i| i.name() == name) {
            return Val::Tensor(self.input(*input));
        }
        match name {
            "tokens" => return Val::Dim(Dim::Tokens),
            "sequences" => return Val::Dim(Dim::Sequences),
            "classes" => return Val::Int(self.classes as i64),
            "smoothing" => {
                self.unused_smoothing = None;
                return Val::Float(self.smoothing);
            }
            _ => {}
        }
        if let Body::Method(method) = frame.body
            && method.variables.iter().any(|v| v.text == name)
        {
            let title = format!("the site has no `{name}` yet where `{}` runs", method.name.text);
            self.report(
                Diagnostic::error(span, title).hint(format!("use it in `after {name} {{ … }}`, or check its name")),
            );
            return Val::Unknown;
        }
        let mut known: Vec<&str> = frame.scopes.iter().rev().flat_map(|s| s.keys().map(String::as_str)).collect();
        known.sort_unstable();
        let near = crate::diagnostic::nearest(name, known.iter().copied().chain(INPUTS.iter().map(|i| i.name())));
        let error = Diagnostic::error(span, format!("there is no variable `{name}` here"));
        self.report(match (near, frame.body) {
            (Some(near), _) => error.hint(format!("did you mean `{near}`?")),
            (None, Body::Method(method)) if !method.variables.is_empty() => {
                error.hint(format!("a variable of the site is named in the head: `on {}({name}, …)`", method.kind.text))
            }
            _ => error.suggest(name, known),
        });
        Val::Unknown
    }

    /// Replaces each `{name}` in a string by the variable's value.
    pub(super) fn interpolate(&mut self, frame: &Frame<'a>, text: &Text) -> Option<String> {
        let mut out = String::new();
        let mut at = 0;
        while let Some(open) = text.text[at..].find('{') {
            let open = at + open;
            let inside = |from: usize, to: usize| {
                let start = text.span.start as usize + 1;
                Span::new(text.span.file, start + from, start + to)
            };
            let Some(length) = text.text[open..].find('}') else {
                let error = Diagnostic::error(inside(open, open + 1), "this `{` is not closed");
                self.report(error.hint("write `{name}` to interpolate a variable"));
                return None;
            };
            let (name, span) = (&text.text[open + 1..open + length], inside(open + 1, open + length));
            out.push_str(&text.text[at..open]);
            let value = self.variable(frame, name.trim(), span);
            match value.plain() {
                Some(plain) => out.push_str(&plain),
                None => {
                    self.type_error(value, "only a number or a string can be interpolated", span);
                    return None;
                }
            }
            at = open + length + 1;
            if out.len() > MAX_STRING_BYTES {
                let title = format!("this string exceeds {MAX_STRING_BYTES} bytes after interpolation");
                self.report(Diagnostic::error(text.span, title));
                return None;
            }
        }
        out.push_str(&text.text[at..]);
        Some(out)
    }

    pub(super) fn condition(&mut self, frame: &Frame<'a>, expr: &'a Expr) -> Option<bool> {
        match self.eval(frame, expr) {
            Val::Bool(b) => Some(b),
            other => {
                self.type_error(other, "a condition must be `true` or `false` at compile time", expr.span);
                None
            }
        }
    }

    pub(super) fn integer(&mut self, frame: &Frame<'a>, expr: &'a Expr) -> Option<i64> {
        let value = self.eval(frame, expr);
        self.as_integer(value, expr.span)
    }

    pub(super) fn as_integer(&mut self, value: Val, span: Span) -> Option<i64> {
        match value {
            Val::Int(n) => Some(n),
            other => {
                self.type_error(other, "expected a whole number", span);
                None
            }
        }
    }

    /// The length of an axis.
    pub(super) fn axis_length(&mut self, frame: &Frame<'a>, expr: &'a Expr) -> Option<u64> {
        let n = match self.eval(frame, expr) {
            Val::Float(x) => {
                let text = self.sources.slice(expr.span);
                let error = Diagnostic::error(expr.span, format!("the length of an axis is a whole number, found {x}"));
                let error = if text.contains('/') { error.hint(format!("`{text}` leaves a remainder")) } else { error };
                self.report(error);
                return None;
            }
            value => self.as_integer(value, expr.span)?,
        };
        if !(1..=MAX_AXIS_LENGTH).contains(&n) {
            self.report(Diagnostic::error(expr.span, format!("an axis cannot have length {n}")));
            return None;
        }
        Some(n as u64)
    }

    pub(super) fn number(&mut self, frame: &Frame<'a>, expr: &'a Expr) -> Option<f64> {
        let value = self.eval(frame, expr);
        self.as_number(value, expr.span)
    }

    pub(super) fn as_number(&mut self, value: Val, span: Span) -> Option<f64> {
        let number = value.number();
        if number.is_none() {
            self.type_error(value, "expected a number that is known at compile time", span);
        }
        number
    }

    pub(super) fn tensor(&mut self, frame: &Frame<'a>, expr: &'a Expr) -> Option<Value> {
        let value = self.eval(frame, expr);
        self.as_tensor(value, expr.span)
    }

    pub(super) fn as_tensor(&mut self, value: Val, span: Span) -> Option<Value> {
        match value {
            Val::Tensor(x) => Some(x),
            other => {
                self.type_error(other, "expected a tensor", span);
                None
            }
        }
    }

    /// Appends an operation to the graph. If the operands do not fit, it reports the error of [`Op::infer`].
    pub(super) fn push(&mut self, op: Op, operands: &[Value], span: Span) -> Val {
        self.push_with(op, operands, span, |error| error)
    }

    pub(super) fn push_with(
        &mut self,
        op: Op,
        operands: &[Value],
        span: Span,
        explain: impl FnOnce(Diagnostic) -> Diagnostic,
    ) -> Val {
        let site = self.sites.last().map(|site| site.path.as_str().into()).unwrap_or_default();
        let location = Location { site, ..self.sources.location(span) };
        match self.graph.push(op, operands, &location) {
            Ok(value) => Val::Tensor(value),
            Err(why) => {
                self.report(explain(Diagnostic::error(span, why)));
                Val::Unknown
            }
        }
    }

    /// An operand of a binary operator. For a matmul, `transpose(x)` becomes an attribute of the operation rather than
    /// a permutation.
    fn matmul_operand(&mut self, frame: &Frame<'a>, expr: &'a Expr, op: BinaryOp) -> (Val, bool) {
        if let (BinaryOp::Matmul, ExprKind::Call { function, args }) = (op, &expr.kind)
            && let ("transpose", [Arg { name: None, value }]) = (&*function.text, &args[..])
        {
            return (self.eval(frame, value), true);
        }
        (self.eval(frame, expr), false)
    }

    /// The type of an operand as it is written, transposition included.
    fn written_type(&self, x: Value, transposed: bool) -> Type {
        let mut ty = self.graph.ty(x).clone();
        if let (true, rank @ 2..) = (transposed, ty.rank()) {
            ty.shape.swap(rank - 1, rank - 2);
        }
        ty
    }

    fn binary(&mut self, frame: &Frame<'a>, op: BinaryOp, left: &'a Expr, right: &'a Expr, span: Span) -> Val {
        if let BinaryOp::And | BinaryOp::Or = op {
            let Some(first) = self.condition(frame, left) else { return Val::Unknown };
            if first == (op == BinaryOp::Or) {
                return Val::Bool(first);
            }
            return self.condition(frame, right).map_or(Val::Unknown, Val::Bool);
        }
        let (x, transpose_x) = self.matmul_operand(frame, left, op);
        let (y, transpose_y) = self.matmul_operand(frame, right, op);
        let symbol = op.symbol();
        match (x, y) {
            (Val::Unknown, _) | (_, Val::Unknown) => Val::Unknown,
            (Val::Tensor(x), Val::Tensor(y)) => {
                let operation = match op {
                    BinaryOp::Add => Op::Add,
                    BinaryOp::Sub => Op::Sub,
                    BinaryOp::Mul => Op::Mul,
                    BinaryOp::Div => Op::Div,
                    BinaryOp::Matmul => Op::Matmul { transpose_x, transpose_y },
                    _ => {
                        let error = Diagnostic::error(span, format!("`{symbol}` compares numbers, not tensors"));
                        self.report(error.hint("the graph has no branches: a condition must be known at compile time"));
                        return Val::Unknown;
                    }
                };
                let (tx, ty) = (self.written_type(x, transpose_x), self.written_type(y, transpose_y));
                let (left, right) =
                    (self.sources.slice(left.span).to_owned(), self.sources.slice(right.span).to_owned());
                let matrices = matches!(operation, Op::Matmul { .. });
                self.push_with(operation, &[x, y], span, |mut error| {
                    let both = format!("`{left} {symbol} {right}` does not fit");
                    match (matrices, tx.last(), ty.last()) {
                        _ if tx.dtype != ty.dtype => {}
                        (true, Some(wide), Some(_)) if ty.rank() > 1 => {
                            let rows = ty.shape[ty.rank() - 2];
                            if wide != rows {
                                error.title = format!("{both}: `{left}` is {wide} wide, `{right}` has {rows} rows");
                            }
                        }
                        (false, Some(wide), Some(other)) if wide != other => {
                            error.title = format!("{both}: `{left}` is {wide} wide, `{right}` {other}");
                        }
                        (false, ..) => error.title = format!("{both}: {tx} and {ty} differ in their leading axes"),
                        _ => {}
                    }
                    let error = error.note(format!("`{left}` is {tx}, `{right}` is {ty}"));
                    if tx.dtype == DType::I32 || ty.dtype == DType::I32 {
                        error.hint("row numbers can only index a table: `table[ids]`")
                    } else if op == BinaryOp::Mul && tx.rank() == 2 && ty.rank() == 2 {
                        error.hint("`*` is elementwise; the matrix product is `@`")
                    } else if op == BinaryOp::Matmul && tx.last() == ty.last() {
                        error.hint(match right.strip_prefix("transpose(") {
                            Some(inner) => {
                                format!("write `@ {}` for a matrix stored [in, out]", inner.trim_end_matches(')'))
                            }
                            None => format!("write `@ transpose({right})` for a matrix stored [out, in]"),
                        })
                    } else {
                        error
                    }
                })
            }
            (Val::Tensor(x), y) if y.number().is_some() => self.with_number(op, x, y.number().unwrap_or(0.0), span),
            (x, Val::Tensor(y)) if x.number().is_some() => self.number_with(op, x.number().unwrap_or(0.0), y, span),
            (Val::Int(x), Val::Int(y)) => self.integer_arithmetic(op, x, y, span),
            (x, y) => match (op, x.number(), y.number()) {
                (BinaryOp::Equal, ..) => Val::Bool(x == y),
                (BinaryOp::Unequal, ..) => Val::Bool(x != y),
                (_, Some(x), Some(y)) => self.arithmetic(op, x, y, span),
                _ => {
                    let (x, y) = (x.describe(&self.graph), y.describe(&self.graph));
                    self.report(Diagnostic::error(span, format!("`{symbol}` is not defined for {x} and {y}")));
                    Val::Unknown
                }
            },
        }
    }

    /// x ∘ c
    fn with_number(&mut self, op: BinaryOp, x: Value, c: f64, span: Span) -> Val {
        match op {
            BinaryOp::Add if c == 0.0 => Val::Tensor(x),
            BinaryOp::Sub if c == 0.0 => Val::Tensor(x),
            BinaryOp::Mul | BinaryOp::Div if c == 1.0 => Val::Tensor(x),
            BinaryOp::Add => self.push(Op::Shift { by: c }, &[x], span),
            BinaryOp::Sub => self.push(Op::Shift { by: -c }, &[x], span),
            BinaryOp::Mul => self.push(Op::Scale { by: c }, &[x], span),
            BinaryOp::Div if c == 0.0 => self.by_zero(span),
            BinaryOp::Div => self.push(Op::Scale { by: 1.0 / c }, &[x], span),
            _ => self.no_mixture(op, span),
        }
    }

    /// c ∘ x
    fn number_with(&mut self, op: BinaryOp, c: f64, x: Value, span: Span) -> Val {
        match op {
            BinaryOp::Add | BinaryOp::Mul => self.with_number(op, x, c, span),
            BinaryOp::Sub => match self.push(Op::Scale { by: -1.0 }, &[x], span) {
                Val::Tensor(negative) => self.with_number(BinaryOp::Add, negative, c, span),
                other => other,
            },
            BinaryOp::Div => match self.push(Op::Constant { value: c, shape: vec![] }, &[], span) {
                Val::Tensor(constant) => self.push(Op::Div, &[constant, x], span),
                other => other,
            },
            _ => self.no_mixture(op, span),
        }
    }

    fn no_mixture(&mut self, op: BinaryOp, span: Span) -> Val {
        let title = format!("`{}` is not defined for a tensor and a number", op.symbol());
        self.report(Diagnostic::error(span, title));
        Val::Unknown
    }

    fn by_zero(&mut self, span: Span) -> Val {
        self.report(Diagnostic::error(span, "this divides by zero"));
        Val::Unknown
    }

    fn integer_arithmetic(&mut self, op: BinaryOp, x: i64, y: i64, span: Span) -> Val {
        let result = match op {
            BinaryOp::Add => x.checked_add(y),
            BinaryOp::Sub => x.checked_sub(y),
            BinaryOp::Mul => x.checked_mul(y),
            BinaryOp::Div | BinaryOp::Rem if y == 0 => return self.by_zero(span),
            BinaryOp::Div if x.checked_rem(y) == Some(0) => x.checked_div(y),
            BinaryOp::Rem => x.checked_rem(y),
            _ => return self.arithmetic(op, x as f64, y as f64, span),
        };
        match result {
            Some(n) => Val::Int(n),
            None => {
                self.report(Diagnostic::error(span, "this number is too large"));
                Val::Unknown
            }
        }
    }

    fn arithmetic(&mut self, op: BinaryOp, x: f64, y: f64, span: Span) -> Val {
        let result = match op {
            BinaryOp::Add => x + y,
            BinaryOp::Sub => x - y,
            BinaryOp::Mul => x * y,
            BinaryOp::Div if y == 0.0 => return self.by_zero(span),
            BinaryOp::Div => x / y,
            BinaryOp::Equal => return Val::Bool(x == y),
            BinaryOp::Unequal => return Val::Bool(x != y),
            BinaryOp::Less => return Val::Bool(x < y),
            BinaryOp::Greater => return Val::Bool(x > y),
            BinaryOp::AtMost => return Val::Bool(x <= y),
            BinaryOp::AtLeast => return Val::Bool(x >= y),
            _ => {
                let title = format!("`{}` is not defined for {x} and {y}", op.symbol());
                self.report(Diagnostic::error(span, title));
                return Val::Unknown;
            }
        };
        if result.is_finite() { Val::Float(result) } else { self.by_zero(span) }
    }

    /// Evaluates `x[:, 0:n]` or `table[ids]`.
    fn index(&mut self, frame: &Frame<'a>, base: &'a Expr, subscripts: &'a [Subscript], span: Span) -> Val {
        let base_value = self.eval(frame, base);
        let Some(mut x) = self.as_tensor(base_value, base.span) else { return Val::Unknown };
        if let [Subscript::At(rows)] = subscripts {
            let Some(ids) = self.tensor(frame, rows) else { return Val::Unknown };
            let what = self.sources.slice(base.span).to_owned();
            let ty = self.graph.ty(x).clone();
            return self.push_with(Op::Gather { start: 0 }, &[x, ids], span, |e| e.note(format!("`{what}` is {ty}")));
        }
        let rank = self.graph.ty(x).rank();
        if subscripts.len() > rank {
            let title = format!("{} subscripts for the {rank} axes of {}", subscripts.len(), self.graph.ty(x));
            self.report(Diagnostic::error(span, title));
            return Val::Unknown;
        }
        for (axis, subscript) in subscripts.iter().enumerate() {
            let (start, end, at) = match subscript {
                Subscript::Slice { start: None, end: None, .. } => continue,
                Subscript::Slice { start, end, span } => (start, end, *span),
                Subscript::At(at) => {
                    let error = Diagnostic::error(at.span, "an axis is indexed by a slice");
                    let slice = match &at.kind {
                        ExprKind::Int(n) => format!("{n}:{}", n.saturating_add(1)),
                        _ => format!("{0}:{0} + 1", self.sources.slice(at.span)),
                    };
                    self.report(error.hint(format!("write `{slice}`, or `:` for the whole axis")));
                    return Val::Unknown;
                }
            };
            let mut bound = |e: &'a Option<Expr>| match e {
                None => Some(None),
                Some(e) => self.integer(frame, e).map(|n| Some((n, e.span))),
            };
            let (Some(start), Some(end)) = (bound(start), bound(end)) else { return Val::Unknown };
            if let Some((n, span)) = [start, end].into_iter().flatten().find(|(n, _)| *n < 0) {
                self.report(Diagnostic::error(span, format!("the bounds of a slice cannot be negative, found {n}")));
                return Val::Unknown;
            }
            let start = start.map_or(0, |(n, _)| n as u64);
            let end = end.map(|(n, _)| n as u64);
            match self.push(Op::Slice { axis, start, end }, &[x], at) {
                Val::Tensor(part) => x = part,
                other => return other,
            }
        }
        Val::Tensor(x)
    }
}
