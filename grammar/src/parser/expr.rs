//! Parses expressions.

use super::{Builder, Children, MAX_OPERATORS, Node, Rule};
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::source::Span;

/// The maximum number of index brackets after one operand.
const MAX_INDICES: usize = 8;

impl Builder {
    pub(super) fn expr(&mut self, pair: Node) -> Expr {
        let expr = self.operand(pair);
        if depth(&expr) > MAX_OPERATORS {
            let error = Diagnostic::error(expr.span, "this expression has too many operators");
            self.errors.push(error.hint("give parts of it names: `part = …`"));
            return Expr { kind: ExprKind::Int(0), span: expr.span };
        }
        expr
    }

    /// An expression of any precedence level.
    fn operand(&mut self, pair: Node) -> Expr {
        let span = self.span(&pair);
        match pair.as_rule() {
            Rule::expr | Rule::conjunction | Rule::comparison | Rule::sum | Rule::product => self.chain(pair),
            Rule::negation | Rule::unary => {
                let mut c: Vec<Node> = pair.into_inner().collect();
                let inner = c.pop().map(|p| self.operand(p)).expect("an operand");
                if c.len() > MAX_OPERATORS {
                    self.errors.push(Diagnostic::error(span, "too many signs in a row"));
                    return inner;
                }
                c.into_iter().rev().fold(inner, |inner, sign| {
                    let span = self.span(&sign).to(inner.span);
                    match (sign.as_rule(), &inner.kind) {
                        (Rule::minus, ExprKind::Int(n)) => Expr { kind: ExprKind::Int(-n), span },
                        (Rule::minus, ExprKind::Float(x)) => Expr { kind: ExprKind::Float(-x), span },
                        (Rule::minus, _) => Expr { kind: ExprKind::Negate(Box::new(inner)), span },
                        _ => Expr { kind: ExprKind::Not(Box::new(inner)), span },
                    }
                })
            }
            Rule::postfix => {
                let mut c = pair.into_inner();
                let mut base = c.next().map(|p| self.operand(p)).expect("an operand");
                for (at, index) in c.enumerate() {
                    if at == MAX_INDICES {
                        let error = Diagnostic::error(self.span(&index), "too many indices in a row");
                        self.errors.push(error.hint("give parts of it names: `part = …`"));
                        break;
                    }
                    let span = base.span.to(self.span(&index));
                    let subscripts = index.into_inner().map(|p| self.subscript(p)).collect();
                    base = Expr { kind: ExprKind::Index { base: Box::new(base), subscripts }, span };
                }
                base
            }
            Rule::group => {
                let inner = pair.into_inner().next().map(|p| self.expr(p)).expect("an operand");
                Expr { span, ..inner }
            }
            Rule::list => Expr { kind: ExprKind::List(pair.into_inner().map(|p| self.expr(p)).collect()), span },
            Rule::call => {
                let mut c = Children::of(pair);
                let (function, args) = (self.name(c.next()), self.args(c.next()));
                Expr { kind: ExprKind::Call { function, args }, span }
            }
            Rule::number => Expr { kind: self.number(pair.as_str(), span), span },
            Rule::string => Expr { kind: ExprKind::String(self.text(pair).text), span },
            Rule::boolean => Expr { kind: ExprKind::Bool(pair.as_str() == "true"), span },
            _ => Expr { kind: ExprKind::Name(pair.as_str().to_owned()), span },
        }
    }

    /// A chain of binary operators of one precedence level, which associate to the left.
    fn chain(&mut self, pair: Node) -> Expr {
        let mut c = pair.into_inner();
        let mut left = c.next().map(|p| self.operand(p)).expect("an operand");
        let mut operands = 1;
        while let (Some(sign), Some(right)) = (c.next(), c.next()) {
            let op = BinaryOp::from_symbol(sign.as_str()).expect("an operator of the grammar");
            operands += 1;
            if operands > MAX_OPERATORS {
                let error = Diagnostic::error(left.span, "this expression has too many operators");
                self.errors.push(error.hint("give parts of it names: `part = …`"));
                return left;
            }
            let right = self.operand(right);
            let span = left.span.to(right.span);
            left = Expr { kind: ExprKind::Binary { op, left: Box::new(left), right: Box::new(right) }, span };
        }
        left
    }

    fn number(&mut self, text: &str, span: Span) -> ExprKind {
        let digits = text.replace('_', "");
        if let Ok(n) = digits.parse() {
            return ExprKind::Int(n);
        }
        match digits.parse::<f64>() {
            Ok(x) if x.is_finite() && digits.contains(['.', 'e', 'E']) => ExprKind::Float(x),
            _ => {
                self.errors.push(Diagnostic::error(span, format!("`{text}` is too large a number")));
                ExprKind::Int(0)
            }
        }
    }

    pub(super) fn args(&mut self, pair: Node) -> Vec<Arg> {
        let arg = |b: &mut Builder, pair: Node| {
            let mut c = Children::of(pair);
            let name = c.next_if(Rule::arg_name).map(|p| b.name(p));
            Arg { name, value: b.expr(c.next()) }
        };
        pair.into_inner().map(|p| arg(self, p)).collect()
    }

    fn subscript(&mut self, pair: Node) -> Subscript {
        let inner = pair.into_inner().next().expect("a slice or an expression");
        if inner.as_rule() != Rule::slice {
            return Subscript::At(self.expr(inner));
        }
        let span = self.span(&inner);
        let mut c = Children::of(inner);
        let mut bound = |rule| c.next_if(rule).and_then(|p| p.into_inner().next()).map(|p| self.expr(p));
        let (start, end) = (bound(Rule::slice_start), bound(Rule::slice_end));
        Subscript::Slice { start, end, span }
    }
}

/// The height of an expression's tree. The recursion is bounded, since the parser limits brackets and chains first.
fn depth(expr: &Expr) -> usize {
    let deepest = |inner: &mut dyn Iterator<Item = &Expr>| inner.map(depth).max().unwrap_or(0);
    1 + match &expr.kind {
        ExprKind::List(items) => deepest(&mut items.iter()),
        ExprKind::Call { args, .. } => deepest(&mut args.iter().map(|a| &a.value)),
        ExprKind::Index { base, subscripts } => {
            let inside = subscripts.iter().flat_map(|s| match s {
                Subscript::At(at) => vec![at],
                Subscript::Slice { start, end, .. } => start.iter().chain(end).collect(),
            });
            deepest(&mut inside.chain([&**base]))
        }
        ExprKind::Negate(x) | ExprKind::Not(x) => depth(x),
        ExprKind::Binary { left, right, .. } => depth(left).max(depth(right)),
        _ => 0,
    }
}
