//! The built-in functions of the language.

use super::Checker;
use super::frame::Frame;
use super::value::Val;
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::graph::{Dim, MAX_VARIADIC_OPERANDS, Op, Value};
use crate::names::Input;
use crate::source::Span;

/// The built-in functions with their parameters. A parameter with `?` is optional.
const BUILTINS: &[(&str, &[&str])] = &[
    ("exp", &["x"]),
    ("log", &["x"]),
    ("sqrt", &["x"]),
    ("rsqrt", &["x"]),
    ("sin", &["x"]),
    ("cos", &["x"]),
    ("tanh", &["x"]),
    ("sigmoid", &["x"]),
    ("relu", &["x"]),
    ("gelu", &["x"]),
    ("gelu_tanh", &["x"]),
    ("detach", &["x"]),
    ("softmax", &["x"]),
    ("log_sum_exp", &["x"]),
    ("normalize", &["x", "eps"]),
    ("float", &["x"]),
    ("iota", &["n"]),
    ("min", &["x", "y"]),
    ("max", &["x", "y"]),
    ("sum", &["x", "?axis", "?keep"]),
    ("mean", &["x", "?axis", "?keep"]),
    ("transpose", &["x"]),
    ("reshape", &["x", "shape"]),
    ("broadcast", &["x", "shape"]),
    ("permute", &["x", "axes"]),
    ("width", &["x"]),
    ("size", &["x", "axis"]),
    ("scores", &["q", "k", "?causal"]),
    ("attend", &["w", "v"]),
    ("segment_mean", &["x"]),
    ("cross_entropy", &["logits", "labels", "?smoothing"]),
    ("dropout", &["x", "p"]),
];

/// The only variadic built-in. Its other parameter is `axis`.
const CONCAT: &str = "concat";

impl<'a> Checker<'a> {
    pub(super) fn eval_call(&mut self, frame: &Frame<'a>, name: &'a Name, args: &'a [Arg], span: Span) -> Val {
        let text = &*name.text;
        if let Some(&function) = self.definitions.functions.get(text) {
            return self.call(frame, function, args, span);
        }
        if text == CONCAT {
            return self.concat(frame, args, span);
        }
        let Some((_, params)) = BUILTINS.iter().find(|(n, _)| *n == text) else {
            let mut known: Vec<&str> = BUILTINS.iter().map(|(n, _)| *n).chain([CONCAT]).collect();
            let mut own: Vec<&str> = self.definitions.functions.keys().copied().collect();
            own.sort_unstable();
            known.extend(own);
            let error = Diagnostic::error(name.span, format!("there is no function `{text}`"));
            self.report(match self.definitions.methods.contains_key(text) {
                true => error.hint("it is a method: methods are applied in the `tune` block"),
                false => error.suggest(text, known),
            });
            return Val::Unknown;
        };
        match self.arguments(frame, text, params, args, span) {
            Some(args) => self.builtin(text, args, span),
            None => Val::Unknown,
        }
    }

    /// The arguments in parameter order.
    fn arguments(
        &mut self,
        frame: &Frame<'a>,
        function: &str,
        params: &[&'static str],
        args: &'a [Arg],
        span: Span,
    ) -> Option<Vec<Option<(Val, Span)>>> {
        let names: Vec<&str> = params.iter().map(|p| p.trim_start_matches('?')).collect();
        let mut values: Vec<Option<(Val, Span)>> = vec![None; params.len()];
        for (at, arg) in args.iter().enumerate() {
            let slot = match &arg.name {
                Some(name) => names.iter().position(|n| *n == name.text),
                None => (at < params.len()).then_some(at),
            };
            let value = self.eval(frame, &arg.value);
            match (slot, &arg.name) {
                (Some(slot), _) if values[slot].is_none() => values[slot] = Some((value, arg.value.span)),
                (Some(slot), _) => {
                    self.report(Diagnostic::error(arg.value.span, format!("`{}` is given twice", names[slot])));
                    return None;
                }
                (None, Some(name)) => {
                    let error = Diagnostic::error(name.span, format!("`{function}` has no parameter `{}`", name.text));
                    self.report(error.suggest(&name.text, names.iter().copied()));
                    return None;
                }
                (None, None) => {
                    let title = format!("`{function}` takes {} arguments, found {}", params.len(), args.len());
                    self.report(Diagnostic::error(span, title).hint(signature(function, params)));
                    return None;
                }
            }
        }
        if let Some(missing) = (0..params.len()).find(|&i| values[i].is_none() && !params[i].starts_with('?')) {
            let error = Diagnostic::error(span, format!("`{function}` requires `{}`", names[missing]));
            self.report(error.hint(signature(function, params)));
            return None;
        }
        let unknown = values.iter().flatten().any(|(v, _)| *v == Val::Unknown);
        (!unknown).then_some(values)
    }

    fn builtin(&mut self, name: &str, args: Vec<Option<(Val, Span)>>, span: Span) -> Val {
        self.try_builtin(name, args, span).unwrap_or(Val::Unknown)
    }

    fn try_builtin(&mut self, name: &str, args: Vec<Option<(Val, Span)>>, span: Span) -> Option<Val> {
        let mut args = args.into_iter();
        let mut next = || args.next().flatten();
        let first = next()?;
        if let Some(value) = fold_constant(name, &first.0) {
            return Some(value);
        }
        if let "min" | "max" = name {
            return Some(self.min_or_max(name, first, next()?, span));
        }
        let at = first.1;
        if name == "iota" {
            return match &self.dims(Val::List(vec![first.0]), at)?[..] {
                [Dim::Const(n)] => Some(self.push(Op::Iota { n: *n }, &[], span)),
                _ => {
                    self.report(Diagnostic::error(at, "`iota` expects a number that is known at compile time"));
                    None
                }
            };
        }
        let x = self.as_tensor(first.0, at)?;
        let plain = match name {
            "exp" => Some(Op::Exp),
            "log" => Some(Op::Log),
            "sqrt" => Some(Op::Sqrt),
            "rsqrt" => Some(Op::Rsqrt),
            "sin" => Some(Op::Sin),
            "cos" => Some(Op::Cos),
            "tanh" => Some(Op::Tanh),
            "sigmoid" => Some(Op::Sigmoid),
            "relu" => Some(Op::Relu),
            "gelu" => Some(Op::Gelu),
            "gelu_tanh" => Some(Op::GeluTanh),
            "detach" => Some(Op::Detach),
            "softmax" => Some(Op::Softmax),
            "log_sum_exp" => Some(Op::LogSumExp),
            "segment_mean" => Some(Op::SegmentMean),
            "float" => Some(Op::Float),
            _ => None,
        };
        if let Some(op) = plain {
            return Some(self.push(op, &[x], span));
        }
        Some(match name {
            "normalize" => {
                let (eps, at) = next()?;
                let eps = self.as_number(eps, at)?;
                self.push(Op::Normalize { eps }, &[x], span)
            }
            "sum" | "mean" => self.reduce(x, next(), next(), name == "mean", span)?,
            "transpose" => {
                let rank = self.graph.ty(x).rank();
                if rank < 2 {
                    let title = format!("{} has no two axes to swap", self.graph.ty(x));
                    self.report(Diagnostic::error(at, title));
                    return None;
                }
                let mut axes: Vec<usize> = (0..rank).collect();
                axes.swap(rank - 1, rank - 2);
                self.push(Op::Permute { axes }, &[x], span)
            }
            "reshape" => {
                let (shape, at) = next()?;
                let shape = self.dims(shape, at)?;
                self.push(Op::Reshape { shape }, &[x], span)
            }
            "broadcast" => {
                let (shape, at) = next()?;
                let shape = self.dims(shape, at)?;
                self.push(Op::Broadcast { shape, mean: false }, &[x], span)
            }
            "permute" => {
                let (axes, at) = next()?;
                let Val::List(items) = axes else {
                    self.report(Diagnostic::error(at, "the order of axes is a list").hint("such as `[1, 0, 2]`"));
                    return None;
                };
                let rank = self.graph.ty(x).rank();
                let axes = items.into_iter().map(|v| self.axis(v, rank, at)).collect::<Option<Vec<_>>>()?;
                self.push(Op::Permute { axes }, &[x], span)
            }
            "width" => self.size(x, self.graph.ty(x).rank().checked_sub(1), span)?,
            "size" => {
                let (axis, at) = next()?;
                let axis = self.axis(axis, self.graph.ty(x).rank(), at)?;
                self.size(x, Some(axis), span)?
            }
            "scores" => {
                let (k, at) = next()?;
                let k = self.as_tensor(k, at)?;
                let causal = self.as_bool(next())?;
                self.push(Op::Scores { causal }, &[x, k], span)
            }
            // Causal scores give later tokens a weight of 0 after the softmax, so the sum may include them.
            "attend" => {
                let (v, at) = next()?;
                let v = self.as_tensor(v, at)?;
                self.push(Op::Attend { causal: false }, &[x, v], span)
            }
            "cross_entropy" => {
                let (labels, at) = next()?;
                let labels = self.as_tensor(labels, at)?;
                let smoothing = match next() {
                    Some((value, at)) => self.as_number(value, at)?,
                    None => 0.0,
                };
                self.push(Op::CrossEntropy { smoothing }, &[x, labels], span)
            }
            "dropout" => {
                let (p, at) = next()?;
                let p = self.as_number(p, at)?;
                self.dropout(x, p, at, span)?
            }
            _ => return None,
        })
    }

    /// Every dropout has its own random stream, so that masks are independent. A dropout with rate 0 is the identity.
    fn dropout(&mut self, x: Value, p: f64, at: Span, span: Span) -> Option<Val> {
        if !(0.0..1.0).contains(&p) {
            let error = Diagnostic::error(at, format!("dropout expects a rate of at least 0 and below 1, found {p}"));
            self.report(if (1.0..=100.0).contains(&p) {
                error.hint(format!("a share, not percent: {} for {p}%", p / 100.0))
            } else {
                error
            });
            return None;
        }
        if p == 0.0 {
            return Some(Val::Tensor(x));
        }
        let rng = self.input(Input::Rng);
        let stream = self.dropout_streams;
        self.dropout_streams += 1;
        Some(self.push(Op::Dropout { p, stream, column: 0 }, &[x, rng], span))
    }

    fn reduce(
        &mut self,
        x: Value,
        axis: Option<(Val, Span)>,
        keep: Option<(Val, Span)>,
        mean: bool,
        span: Span,
    ) -> Option<Val> {
        let rank = self.graph.ty(x).rank();
        let axes = match axis {
            Some((axis, at)) => vec![self.axis(axis, rank, at)?],
            None => (0..rank).collect(),
        };
        let keep = self.as_bool(keep)?;
        Some(self.push(Op::Reduce { axes, keep, mean }, &[x], span))
    }

    pub(super) fn as_bool(&mut self, value: Option<(Val, Span)>) -> Option<bool> {
        match value {
            None => Some(false),
            Some((Val::Bool(b), _)) => Some(b),
            Some((other, at)) => {
                let title = format!("expected `true` or `false`, found {}", other.describe(&self.graph));
                self.report(Diagnostic::error(at, title));
                None
            }
        }
    }

    /// The index of an axis. Negative numbers count from the last axis.
    fn axis(&mut self, value: Val, rank: usize, span: Span) -> Option<usize> {
        let axis = self.as_integer(value, span)?;
        let from_front = if axis < 0 { axis.saturating_add(rank as i64) } else { axis };
        if !(0..rank as i64).contains(&from_front) {
            self.report(Diagnostic::error(span, format!("there is no axis {axis}: the tensor has {rank}")));
            return None;
        }
        Some(from_front as usize)
    }

    fn dims(&mut self, shape: Val, span: Span) -> Option<Vec<Dim>> {
        let Val::List(items) = shape else {
            self.report(Diagnostic::error(span, "a shape is a list").hint("such as `[tokens, 12, 64]`"));
            return None;
        };
        let mut dims = Vec::new();
        let mut elements = 1u64;
        for item in items {
            dims.push(match item {
                Val::Dim(dim) => dim,
                Val::Int(n) if n > 0 && elements.checked_mul(n as u64).is_some_and(|n| n <= 1 << 48) => {
                    elements *= n as u64;
                    Dim::Const(n as u64)
                }
                other => {
                    let found = other.describe(&self.graph);
                    let title = format!("the length of an axis is a whole number above 0, found {found}");
                    let error = Diagnostic::error(span, title);
                    self.report(match other {
                        Val::Float(_) => error.hint("a division with a remainder yields a float"),
                        _ => error,
                    });
                    return None;
                }
            });
        }
        Some(dims)
    }

    fn size(&mut self, x: Value, axis: Option<usize>, span: Span) -> Option<Val> {
        match axis.and_then(|a| self.graph.ty(x).shape.get(a).copied()) {
            Some(Dim::Const(n)) => Some(Val::Int(n as i64)),
            Some(dim) => Some(Val::Dim(dim)),
            None => {
                let title = format!("{} has no axes", self.graph.ty(x));
                self.report(Diagnostic::error(span, title));
                None
            }
        }
    }

    /// The minimum or maximum of two numbers, or the elementwise minimum of two tensors.
    fn min_or_max(&mut self, name: &str, x: (Val, Span), y: (Val, Span), span: Span) -> Val {
        match (name, x.0, y.0) {
            ("min", Val::Int(x), Val::Int(y)) => Val::Int(x.min(y)),
            (_, Val::Int(x), Val::Int(y)) => Val::Int(x.max(y)),
            ("min", Val::Tensor(x), Val::Tensor(y)) => self.push(Op::Min, &[x, y], span),
            (_, x, y) => match (x.number(), y.number()) {
                (Some(x), Some(y)) => Val::Float(if name == "min" { x.min(y) } else { x.max(y) }),
                _ => {
                    self.report(Diagnostic::error(span, format!("`{name}` expects two numbers")));
                    Val::Unknown
                }
            },
        }
    }

    fn concat(&mut self, frame: &Frame<'a>, args: &'a [Arg], span: Span) -> Val {
        let mut parts = Vec::new();
        let mut axis = None;
        for arg in args {
            match &arg.name {
                None => match self.tensor(frame, &arg.value) {
                    Some(part) => parts.push(part),
                    None => return Val::Unknown,
                },
                Some(name) if name.text == "axis" => axis = Some((self.eval(frame, &arg.value), arg.value.span)),
                Some(name) => {
                    let error = Diagnostic::error(name.span, format!("`concat` has no parameter `{}`", name.text));
                    self.report(error.suggest(&name.text, ["axis"]));
                    return Val::Unknown;
                }
            }
        }
        if parts.is_empty() || parts.len() > MAX_VARIADIC_OPERANDS {
            let title = format!("`concat` joins 1 to {MAX_VARIADIC_OPERANDS} tensors, found {}", parts.len());
            self.report(Diagnostic::error(span, title));
            return Val::Unknown;
        }
        let rank = self.graph.ty(parts[0]).rank();
        let (axis, at) = axis.unwrap_or((Val::Int(-1), span));
        match self.axis(axis, rank, at) {
            Some(axis) => self.push(Op::Concat { axis }, &parts, span),
            None => Val::Unknown,
        }
    }
}

/// Evaluates a function of one number at compile time.
fn fold_constant(name: &str, x: &Val) -> Option<Val> {
    let x = x.number()?;
    let result = match name {
        "exp" => x.exp(),
        "log" => x.ln(),
        "sqrt" => x.sqrt(),
        "rsqrt" => 1.0 / x.sqrt(),
        "sin" => x.sin(),
        "cos" => x.cos(),
        "float" => x,
        "tanh" => x.tanh(),
        _ => return None,
    };
    result.is_finite().then_some(Val::Float(result))
}

fn signature(function: &str, params: &[&str]) -> String {
    let one = |p: &&str| match p.strip_prefix('?') {
        Some(optional) => format!("{optional}: …"),
        None => (*p).to_owned(),
    };
    format!("it is written `{function}({})`", params.iter().map(one).collect::<Vec<_>>().join(", "))
}
