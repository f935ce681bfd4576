//! The graph: a straight line of operations on typed tensors. All have one result, but for those that join what one
//! kernel computes.
//!
//! It is what every stage between the checker and the lowering has in its hands. The checker builds
//! it from `.peft` equations, the `peft` dialect prints it as MLIR and reads it back, the gradient and
//! the fusion passes make new ones. The meaning of every operation is the formula beside it in [`Op`];
//! the reference interpreter spells the same formulas out in loops.
//!
//! Tokens are one packed axis: there is no padding, and attention scores have a *ragged* last axis
//! ([`Dim::Keys`]): row `i` holds one entry for each token of `i`'s own sequence.

use std::collections::HashSet;
use std::fmt;

use serde::{Deserialize, Serialize};

/// One axis of a tensor. Everything but `Const` is known only when a batch arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Dim {
    Const(u64),
    /// Every token of the batch, sequences back to back.
    Tokens,
    /// Sequences in the batch.
    Sequences,
    /// Tokens that predict a labelled token.
    Targets,
    /// Ragged: `extra` leading columns, then the tokens of the row's own sequence.
    /// It is always the last axis, and the axis before it is `Tokens`.
    Keys(u64),
    /// Every trainable value in one flat vector (the optimizer's view).
    Values,
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Const(n) => write!(f, "{n}"),
            Dim::Tokens => f.write_str("tokens"),
            Dim::Sequences => f.write_str("sequences"),
            Dim::Targets => f.write_str("targets"),
            Dim::Keys(0) => f.write_str("keys"),
            Dim::Keys(extra) => write!(f, "keys+{extra}"),
            Dim::Values => f.write_str("values"),
        }
    }
}

impl std::str::FromStr for Dim {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        Ok(match s {
            "tokens" => Dim::Tokens,
            "sequences" => Dim::Sequences,
            "targets" => Dim::Targets,
            "values" => Dim::Values,
            "keys" => Dim::Keys(0),
            _ => match s.strip_prefix("keys+") {
                Some(extra) => Dim::Keys(extra.parse().map_err(|_| format!("`{s}` is no dimension"))?),
                None => Dim::Const(s.parse().map_err(|_| format!("`{s}` is no dimension"))?),
            },
        })
    }
}

impl Dim {
    pub fn constant(self) -> Option<u64> {
        if let Dim::Const(n) = self { Some(n) } else { None }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DType {
    F32,
    I32,
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::I32 => "i32",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Type {
    pub dtype: DType,
    pub shape: Vec<Dim>,
}

impl Type {
    pub fn f32(shape: impl Into<Vec<Dim>>) -> Self {
        Type { dtype: DType::F32, shape: shape.into() }
    }
    pub fn i32(shape: impl Into<Vec<Dim>>) -> Self {
        Type { dtype: DType::I32, shape: shape.into() }
    }
    pub fn rank(&self) -> usize {
        self.shape.len()
    }
    pub fn last(&self) -> Option<Dim> {
        self.shape.last().copied()
    }
    /// Has a ragged axis.
    pub fn ragged(&self) -> bool {
        matches!(self.last(), Some(Dim::Keys(_)))
    }
    /// The number of elements, when no axis waits for a batch.
    pub fn elements(&self) -> Option<u64> {
        self.shape.iter().map(|d| d.constant()).product()
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.dtype, join(&self.shape))
    }
}

pub(crate) fn join<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}

/// The most operands an operation takes whose number of operands is free.
pub const MAX_PARTS: usize = 8;

/// What the dialect says of an operation.
#[derive(Debug)]
pub struct Operation {
    /// In the dialect, without `peft.`.
    pub name: &'static str,
    pub operands: Operands,
    /// The results' names, in order.
    pub results: &'static [&'static str],
    pub attributes: &'static [&'static str],
    kind: Kind,
}

/// The element types of operands, in order.
#[derive(Clone, Copy, Debug)]
pub enum Operands {
    Fixed(&'static [DType]),
    /// One to [`MAX_PARTS`], those beyond the list floats.
    Variadic(&'static [DType]),
}

impl Operands {
    /// How many there are, if that is fixed.
    pub fn count(self) -> Option<usize> {
        match self {
            Operands::Fixed(types) => Some(types.len()),
            Operands::Variadic(_) => None,
        }
    }

    fn dtype(self, operand: usize) -> DType {
        let (Operands::Fixed(types) | Operands::Variadic(types)) = self;
        types.get(operand).copied().unwrap_or(DType::F32)
    }
}

/// How elements of a result come from elements of the operands.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Each is computed of those at its own index, after broadcasting.
    Elementwise,
    /// They are those of the operand at other indices, each once at most.
    View,
    Other,
}

/// Names of results, of the one that most operations have or of several.
macro_rules! results {
    () => {
        &["z"]
    };
    ($($result:literal),+) => {
        &[$($result),+]
    };
}

/// Makes [`Op`], [`OPERATIONS`] and the ways between an operation and its parts from one row for each operation: its
/// formula, its variant with the attributes, its name in the dialect, its operands' types, its [`Kind`], and its results
/// if there are several.
macro_rules! operations {
    ($(
        $(#[$formula:meta])*
        $variant:ident $({ $($attr:ident: $type:ty),+ })?, $name:literal, $operands:ident($($dtype:ident),*), $kind:ident
        $(-> ($($result:literal),+))?;
    )*) => {
        /// What an operation computes. `x`, `y`, … are its operands in order; row vectors, `x @ W`.
        ///
        /// Two are equal if their names and attributes are, floats by their bits.
        #[derive(Clone, Debug, Serialize, Deserialize)]
        pub enum Op {
            $($(#[$formula])* $variant $({ $($attr: $type),+ })?,)*
        }

        /// Every operation of the dialect. Its IRDL definition is made from this table.
        pub const OPERATIONS: &[Operation] = &[$(Operation {
            name: $name,
            operands: Operands::$operands(&[$(DType::$dtype),*]),
            results: results!($($($result),+)?),
            attributes: &[$($(stringify!($attr)),+)?],
            kind: Kind::$kind,
        }),*];

        impl Op {
            /// Its row in the table.
            pub fn operation(&self) -> &'static Operation {
                enum Row {
                    $($variant),*
                }
                match self {
                    $(Op::$variant { .. } => &OPERATIONS[Row::$variant as usize],)*
                }
            }

            /// Attributes in the order of the table.
            pub fn attributes(&self) -> Vec<(&'static str, Attr)> {
                match self {
                    $(Op::$variant { $($($attr),+)? } => vec![$($((stringify!($attr), $attr.to_attr())),+)?],)*
                }
            }

            /// The way back from [`Op::name`] and [`Op::attributes`].
            pub fn from_parts(name: &str, attrs: &dyn Fn(&str) -> Option<Attr>) -> Result<Op, String> {
                match name {
                    $($name => Ok(Op::$variant { $($($attr: attribute(name, stringify!($attr), attrs)?),+)? }),)*
                    _ => Err(format!("`peft.{name}` is no operation of the dialect")),
                }
            }
        }
    };
}

operations! {
    /// The same number everywhere.
    Constant { value: f64, shape: Vec<Dim> }, "constant", Fixed(), Elementwise;
    /// 0, 1, …, n − 1
    Iota { n: u64 }, "iota", Fixed(), Elementwise;

    // Element by element; binary ones broadcast as NumPy does.
    /// x + y
    Add, "add", Fixed(F32, F32), Elementwise;
    /// x − y
    Sub, "sub", Fixed(F32, F32), Elementwise;
    /// x · y
    Mul, "mul", Fixed(F32, F32), Elementwise;
    /// x / y
    Div, "div", Fixed(F32, F32), Elementwise;
    /// min(x, y)
    Min, "min", Fixed(F32, F32), Elementwise;
    /// by · x
    Scale { by: f64 }, "scale", Fixed(F32), Elementwise;
    /// x + by
    Shift { by: f64 }, "shift", Fixed(F32), Elementwise;
    /// Integers as floats.
    Float, "float", Fixed(I32), Elementwise;
    /// eˣ
    Exp, "exp", Fixed(F32), Elementwise;
    /// ln x
    Log, "log", Fixed(F32), Elementwise;
    /// √x
    Sqrt, "sqrt", Fixed(F32), Elementwise;
    /// 1/√x
    Rsqrt, "rsqrt", Fixed(F32), Elementwise;
    /// sin x
    Sin, "sin", Fixed(F32), Elementwise;
    /// cos x
    Cos, "cos", Fixed(F32), Elementwise;
    /// tanh x
    Tanh, "tanh", Fixed(F32), Elementwise;
    /// 1 / (1 + e⁻ˣ)
    Sigmoid, "sigmoid", Fixed(F32), Elementwise;
    /// max(x, 0)
    Relu, "relu", Fixed(F32), Elementwise;
    /// 1 where x > 0, else 0: relu's derivative
    Step, "step", Fixed(F32), Elementwise;
    /// x Φ(x) = x/2 · (1 + erf(x/√2))
    Gelu, "gelu", Fixed(F32), Elementwise;
    /// Φ(x) + x φ(x)
    GeluGrad, "gelu_grad", Fixed(F32), Elementwise;
    /// x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))
    GeluTanh, "gelu_tanh", Fixed(F32), Elementwise;
    /// its derivative
    GeluTanhGrad, "gelu_tanh_grad", Fixed(F32), Elementwise;

    /// x, and a constant to the gradient
    Detach, "detach", Fixed(F32), Other;

    // Shape.
    /// Row-major order stays; a ragged axis and the token axis before it stay where they are.
    Reshape { shape: Vec<Dim> }, "reshape", Fixed(F32), View;
    /// Axis i of the result is axis `axes[i]` of x.
    Permute { axes: Vec<usize> }, "permute", Fixed(F32), View;
    /// x[.., start..end, ..] along `axis`; no `end` = to the end.
    Slice { axis: usize, start: u64, end: Option<u64> }, "slice", Fixed(F32), View;
    /// The adjoint of `Slice`: zeros of width `to` with x laid in from `start` on.
    Pad { axis: usize, start: u64, to: Dim }, "pad", Fixed(F32), Other;
    /// Up to [`MAX_PARTS`] operands, end to end along `axis`.
    Concat { axis: usize }, "concat", Variadic(F32), Other;
    /// Repeats axes of size 1 (or missing in front) up to `shape`; `mean` divides by the number of copies.
    Broadcast { shape: Vec<Dim>, mean: bool }, "broadcast", Fixed(F32), Elementwise;
    /// Adds up (or averages) over `axes`, which stay as size 1 when `keep`.
    Reduce { axes: Vec<usize>, keep: bool, mean: bool }, "reduce", Fixed(F32), Other;

    // Contractions.
    /// x @ y over the last two axes, either read transposed. A rank-2 y serves every leading axis of x.
    Matmul { transpose_x: bool, transpose_y: bool }, "matmul", Fixed(F32, F32), Other;
    /// q[H,tokens,p], k[H,tokens,p] → s[H,tokens,keys]: s_ij = q_i · k_j, j in i's sequence; −∞ at j > i if causal.
    Scores { causal: bool }, "scores", Fixed(F32, F32), Other;
    /// w[H,tokens,keys], v[H,tokens,p] → Σ_j w_ij v_j; over j ≤ i if causal.
    Attend { causal: bool }, "attend", Fixed(F32, F32), Other;
    /// w[H,tokens,keys], v[H,tokens,p] → Σ_i w_ij v_i; over i ≥ j if causal. `Attend` with w transposed.
    AttendTransposed { causal: bool }, "attend_transposed", Fixed(F32, F32), Other;

    // Attention whose square exists nowhere. w_ij = softmax_j(scale · q_i · k_j) over j in i's sequence (j ≤ i if
    // causal), d_ij its dropout as [`Op::Dropout`] draws it for w[H,tokens,keys]; `rng` is there if p > 0.
    /// (q, k, v, rng) → Σ_j d_ij w_ij v_j
    Attention { causal: bool, scale: f64, p: f64, stream: u32, column: u64 },
        "attention", Variadic(F32, F32, F32, I32), Other;
    /// (q, k) → ln Σ_j e^{scale · q_i · k_j}, [H,tokens,1]
    AttentionLse { causal: bool, scale: f64 }, "attention_lse", Fixed(F32, F32), Other;
    /// (q, k, v, lse, df, r, rng), ds_ij = scale · w_ij (d_ij df_i · v_j + r_i) → the adjoint of operand `of`:
    /// 0: Σ_j ds_ij k_j;  1: Σ_i ds_ij q_i;  2: Σ_i d_ij w_ij df_i
    AttentionVjp { of: usize, causal: bool, scale: f64, p: f64, stream: u32, column: u64 },
        "attention_vjp", Variadic(F32, F32, F32, F32, F32, F32, I32), Other;
    /// `Attention` and `AttentionLse`
    AttentionAndLse { causal: bool, scale: f64, p: f64, stream: u32, column: u64 },
        "attention_and_lse", Variadic(F32, F32, F32, I32), Other -> ("f", "lse");
    /// `AttentionVjp` of 1 and of 2
    AttentionVjpSides { causal: bool, scale: f64, p: f64, stream: u32, column: u64 },
        "attention_vjp_sides", Variadic(F32, F32, F32, F32, F32, F32, I32), Other -> ("dk", "dv");
    /// `AttentionVjp` of 0, of 1 and of 2
    AttentionVjpAll { causal: bool, scale: f64, p: f64, stream: u32, column: u64 },
        "attention_vjp_all", Variadic(F32, F32, F32, F32, F32, F32, I32), Other -> ("dq", "dk", "dv");

    // A linear map of which only the softmax is asked for, x[n,d] and W[V,d]; its n × V results exist nowhere.
    /// (x, W) → ln Σ_v e^{x·W_v}, [n,1]
    LinearLse, "linear_lse", Fixed(F32, F32), Other;
    /// (x, W) → Σ_v softmax(x Wᵀ)_v W_v, [n,d]
    LinearMean, "linear_mean", Fixed(F32, F32), Other;
    /// `LinearLse` and `LinearMean`
    LinearLseAndMean, "linear_lse_and_mean", Fixed(F32, F32), Other -> ("lse", "mean");

    // Along the last axis.
    /// e^{x_j − max} / Σ
    Softmax, "softmax", Fixed(F32), Other;
    /// ln Σ e^{x_j}, one number a row: the last axis is 1 long
    LogSumExp, "log_sum_exp", Fixed(F32), Other;
    /// (y, dy) → y ⊙ (dy − Σ y ⊙ dy)
    SoftmaxVjp, "softmax_vjp", Fixed(F32, F32), Other;
    /// (x − mean) / √(var + eps), biased variance
    Normalize { eps: f64 }, "normalize", Fixed(F32), Other;
    /// (x, dy) → its adjoint, x̂ computed again
    NormalizeVjp { eps: f64 }, "normalize_vjp", Fixed(F32, F32), Other;

    // Rows.
    /// table[V,d], ids[n] → table[ids − start], a zero row where that lies outside the table
    Gather { start: u64 }, "gather", Fixed(F32, I32), Other;
    /// ids[n], y[n,d] → t[rows,d]: t[ids − start] += y; what lies outside is dropped. The adjoint of `Gather`.
    Scatter { start: u64, rows: Dim }, "scatter", Fixed(I32, F32), Other;
    /// x[tokens,d] → the mean over each sequence, [sequences,d]
    SegmentMean, "segment_mean", Fixed(F32), Other;
    /// y[sequences,d] → each token its sequence's row over the sequence's length, [tokens,d]
    SegmentMeanVjp, "segment_mean_vjp", Fixed(F32), Other;

    /// x[T,V], labels[T] → ln Σ_v exp x_v − Σ_v w_v x_v; w = (1−e)·onehot(label) + e/V, e = `smoothing`. A label beyond
    /// the classes is hot nowhere.
    CrossEntropy { smoothing: f64 }, "cross_entropy", Fixed(F32, I32), Other;
    /// (logits, labels, dy[T]) → dy ⊙ (softmax(logits) − w)
    CrossEntropyVjp { smoothing: f64 }, "cross_entropy_vjp", Fixed(F32, I32, F32), Other;

    /// (x, rng) → x/(1−p) where Philox4x32-10 says keep, else 0. rng = i32[2] (seed, step) is the key;
    /// the counter is (column / 4, row, lead, stream), the lane column % 4, kept iff the word ≥ ⌊p·2³²⌋.
    /// Column is the index on the last axis, counted from `column`, row on the one before, lead on all others flattened.
    /// (x, rng, rows[n]): row r of the n is taken for row rows_r, so that rows of a tensor are dropped as in the whole.
    Dropout { p: f64, stream: u32, column: u64 }, "dropout", Variadic(F32, I32, I32), Elementwise;
}

impl Op {
    /// The name in the dialect, without `peft.`.
    pub fn name(&self) -> &'static str {
        self.operation().name
    }

    /// Each element of the result is computed of the operands' elements at its own index, after broadcasting.
    pub fn elementwise(&self) -> bool {
        self.operation().kind == Kind::Elementwise
    }

    /// The elements of the operand, read in another way.
    pub fn view(&self) -> bool {
        self.operation().kind == Kind::View
    }

    /// The types of the results, or in what way the operands do not fit.
    pub fn infer(&self, operands: &[&Type]) -> Result<Vec<Type>, String> {
        let Operation { name, operands: wanted, .. } = self.operation();
        let arity = wanted.count();
        let fits = arity.map_or((1..=MAX_PARTS).contains(&operands.len()), |n| operands.len() == n);
        if !fits {
            let arity = arity.map_or(format!("1 to {MAX_PARTS}"), |n| n.to_string());
            return Err(format!("`{name}` takes {arity} operands, found {}", operands.len()));
        }
        for (i, ty) in operands.iter().enumerate() {
            let want = wanted.dtype(i);
            if ty.dtype != want {
                return Err(format!("`{name}` wants {want} as operand {}, found {ty}", i + 1));
            }
        }
        self.joins().iter().map(|part| infer(part, part.of_whole(operands))).collect()
    }

    /// The operations whose results it has, in order: itself, or what it joins. Each reads the first of its operands
    /// ([`Op::of_whole`]).
    pub fn joins(&self) -> Vec<Op> {
        use Op::*;
        match *self {
            AttentionAndLse { causal, scale, p, stream, column } => {
                vec![Attention { causal, scale, p, stream, column }, AttentionLse { causal, scale }]
            }
            AttentionVjpSides { causal, scale, p, stream, column } => {
                [1, 2].map(|of| AttentionVjp { of, causal, scale, p, stream, column }).into()
            }
            AttentionVjpAll { causal, scale, p, stream, column } => {
                [0, 1, 2].map(|of| AttentionVjp { of, causal, scale, p, stream, column }).into()
            }
            LinearLseAndMean => vec![LinearLse, LinearMean],
            _ => vec![self.clone()],
        }
    }

    /// What it reads of the operands of an operation of which it is a part.
    pub fn of_whole<'o, T>(&self, operands: &'o [T]) -> &'o [T] {
        &operands[..self.operation().operands.count().unwrap_or(operands.len())]
    }
}

impl PartialEq for Op {
    fn eq(&self, other: &Op) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other) && self.attributes() == other.attributes()
    }
}

impl Eq for Op {}

impl std::hash::Hash for Op {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        std::mem::discriminant(self).hash(state);
        self.attributes().hash(state);
    }
}

/// An attribute as the textual forms show it. Floats are equal if their bits are.
#[derive(Clone, Debug)]
pub enum Attr {
    Int(i64),
    Float(f64),
    Bool(bool),
    Ints(Vec<i64>),
    /// Dimensions in symbolic form, `tokens,12,64`.
    Dims(Vec<Dim>),
}

impl PartialEq for Attr {
    fn eq(&self, other: &Attr) -> bool {
        match (self, other) {
            (Attr::Int(x), Attr::Int(y)) => x == y,
            (Attr::Float(x), Attr::Float(y)) => x.to_bits() == y.to_bits(),
            (Attr::Bool(x), Attr::Bool(y)) => x == y,
            (Attr::Ints(x), Attr::Ints(y)) => x == y,
            (Attr::Dims(x), Attr::Dims(y)) => x == y,
            _ => false,
        }
    }
}

impl Eq for Attr {}

impl std::hash::Hash for Attr {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        match self {
            Attr::Int(x) => x.hash(state),
            Attr::Float(x) => x.to_bits().hash(state),
            Attr::Bool(x) => x.hash(state),
            Attr::Ints(x) => x.hash(state),
            Attr::Dims(x) => x.hash(state),
        }
    }
}

/// An attribute's type in [`Op`] and its form in [`Attr`].
trait Attribute: Sized {
    fn to_attr(&self) -> Attr;
    /// `None` if it is malformed.
    fn from_attr(attr: Attr) -> Option<Self>;
}

fn attribute<T: Attribute>(name: &str, key: &str, attrs: &dyn Fn(&str) -> Option<Attr>) -> Result<T, String> {
    let read = attrs(key).and_then(T::from_attr);
    read.ok_or_else(|| format!("`peft.{name}` lacks a well-formed attribute `{key}`"))
}

macro_rules! whole_numbers {
    ($($type:ty),*) => {
        $(impl Attribute for $type {
            fn to_attr(&self) -> Attr {
                Attr::Int(*self as i64)
            }
            fn from_attr(attr: Attr) -> Option<Self> {
                if let Attr::Int(i) = attr { i.try_into().ok() } else { None }
            }
        })*
    };
}

whole_numbers!(u64, u32, usize);

/// −1 for none.
impl Attribute for Option<u64> {
    fn to_attr(&self) -> Attr {
        self.map_or(Attr::Int(-1), |n| n.to_attr())
    }
    fn from_attr(attr: Attr) -> Option<Self> {
        if attr == Attr::Int(-1) { Some(None) } else { u64::from_attr(attr).map(Some) }
    }
}

impl Attribute for f64 {
    fn to_attr(&self) -> Attr {
        Attr::Float(*self)
    }
    fn from_attr(attr: Attr) -> Option<Self> {
        if let Attr::Float(x) = attr { Some(x) } else { None }
    }
}

impl Attribute for bool {
    fn to_attr(&self) -> Attr {
        Attr::Bool(*self)
    }
    fn from_attr(attr: Attr) -> Option<Self> {
        if let Attr::Bool(b) = attr { Some(b) } else { None }
    }
}

impl Attribute for Vec<usize> {
    fn to_attr(&self) -> Attr {
        Attr::Ints(self.iter().map(|&i| i as i64).collect())
    }
    fn from_attr(attr: Attr) -> Option<Self> {
        if let Attr::Ints(v) = attr { v.into_iter().map(|i| i.try_into().ok()).collect() } else { None }
    }
}

impl Attribute for Vec<Dim> {
    fn to_attr(&self) -> Attr {
        Attr::Dims(self.clone())
    }
    fn from_attr(attr: Attr) -> Option<Self> {
        if let Attr::Dims(dims) = attr { Some(dims) } else { None }
    }
}

impl Attribute for Dim {
    fn to_attr(&self) -> Attr {
        Attr::Dims(vec![*self])
    }
    fn from_attr(attr: Attr) -> Option<Self> {
        match Vec::from_attr(attr)?[..] {
            [dim] => Some(dim),
            _ => None,
        }
    }
}

/// NumPy's rule on symbolic axes: right-aligned, 1 or missing stretches.
pub fn broadcast(a: &[Dim], b: &[Dim]) -> Option<Vec<Dim>> {
    let rank = a.len().max(b.len());
    let at = |s: &[Dim], i: usize| (i + s.len()).checked_sub(rank).map_or(Dim::Const(1), |j| s[j]);
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Some(x),
            (Dim::Const(1), y) => Some(y),
            (x, Dim::Const(1)) => Some(x),
            _ => None,
        })
        .collect()
}

/// The type of the one result.
fn infer(op: &Op, operands: &[&Type]) -> Result<Type, String> {
    let x = operands.first().copied();
    let name = op.name();
    let same = || Ok(x.expect("arity is checked").clone());
    let axis_of = |ty: &Type, axis: usize| {
        ty.shape
            .get(axis)
            .copied()
            .ok_or_else(|| format!("`{name}` names axis {axis}, but {ty} has {} axes", ty.rank()))
    };
    match op {
        Op::Constant { shape, .. } => Ok(Type::f32(shape.clone())),
        Op::Iota { n } => Ok(Type::f32([Dim::Const(*n)])),
        Op::Float => Ok(Type::f32(operands[0].shape.clone())),
        Op::Add | Op::Sub | Op::Mul | Op::Div | Op::Min => broadcast(&operands[0].shape, &operands[1].shape)
            .map(Type::f32)
            .ok_or_else(|| format!("{} and {} do not broadcast", operands[0], operands[1])),
        Op::Scale { .. } | Op::Shift { .. } => same(),
        Op::Exp | Op::Log | Op::Sqrt | Op::Rsqrt | Op::Sin | Op::Cos | Op::Tanh | Op::Sigmoid => same(),
        Op::Relu | Op::Step | Op::Gelu | Op::GeluGrad | Op::GeluTanh | Op::GeluTanhGrad | Op::Detach => same(),
        Op::Reshape { shape } => {
            let x = operands[0];
            let split = |shape: &[Dim]| {
                let count: u64 = shape.iter().filter_map(|d| d.constant()).product();
                let symbols: Vec<Dim> = shape.iter().copied().filter(|d| d.constant().is_none()).collect();
                (count, symbols)
            };
            let tail = |s: &[Dim]| s[s.len().saturating_sub(2)..].to_vec();
            let ragged = x.ragged() || matches!(shape.last(), Some(Dim::Keys(_)));
            if split(&x.shape) != split(shape) || (ragged && tail(&x.shape) != tail(shape)) {
                return Err(format!("{x} cannot be reshaped to [{}]", join(shape)));
            }
            Ok(Type::f32(shape.clone()))
        }
        Op::Permute { axes } => {
            let x = operands[0];
            let mut sorted = axes.clone();
            sorted.sort_unstable();
            if sorted != (0..x.rank()).collect::<Vec<_>>() {
                return Err(format!("axes [{}] are no order of the {} axes of {x}", join(axes), x.rank()));
            }
            if x.ragged() {
                return Err(format!("the ragged axis of {x} cannot move"));
            }
            Ok(Type::f32(axes.iter().map(|&a| x.shape[a]).collect::<Vec<_>>()))
        }
        Op::Slice { axis, start, end } => {
            let x = operands[0];
            let out_of = |limit: u64| {
                let end = end.map_or(String::new(), |e| e.to_string());
                format!("{start}:{end} lies outside axis {axis} of {x}, which ends at {limit}")
            };
            let dim = match (axis_of(x, *axis)?, end) {
                (Dim::Const(n), end) => {
                    let end = end.unwrap_or(n);
                    if *start >= end || end > n {
                        return Err(out_of(n));
                    }
                    Dim::Const(end - start)
                }
                (Dim::Keys(extra), Some(end)) => {
                    if start >= end || *end > extra {
                        return Err(out_of(extra));
                    }
                    Dim::Const(end - start)
                }
                (Dim::Keys(extra), None) if *start <= extra => Dim::Keys(extra - start),
                (Dim::Keys(extra), None) => return Err(out_of(extra)),
                (dim, _) => {
                    return Err(format!(
                        "the {dim} axis of {x} cannot be sliced: its length is known only at run time"
                    ));
                }
            };
            let mut shape = x.shape.clone();
            shape[*axis] = dim;
            Ok(Type::f32(shape))
        }
        Op::Pad { axis, start, to } => {
            let x = operands[0];
            let fits = match (axis_of(x, *axis)?, to) {
                (Dim::Const(n), Dim::Const(to)) => start + n <= *to,
                (Dim::Const(n), Dim::Keys(extra)) => start + n <= *extra,
                (Dim::Keys(own), Dim::Keys(extra)) => start + own == *extra,
                _ => false,
            };
            if !fits {
                return Err(format!("{x} does not fit into {to} from {start} on along axis {axis}"));
            }
            let mut shape = x.shape.clone();
            shape[*axis] = *to;
            Ok(Type::f32(shape))
        }
        Op::Concat { axis } => {
            let mut total = axis_of(operands[0], *axis)?;
            for y in &operands[1..] {
                let mut expected = operands[0].shape.clone();
                let dim = axis_of(y, *axis)?;
                expected[*axis] = dim;
                if expected != y.shape {
                    return Err(format!("{} and {y} differ beside axis {axis}", operands[0]));
                }
                total = match (total, dim) {
                    (Dim::Const(a), Dim::Const(b)) => Dim::Const(a + b),
                    (Dim::Const(a), Dim::Keys(b)) => Dim::Keys(a + b),
                    (a, b) => return Err(format!("{a} and {b} cannot stand end to end: ragged columns come last")),
                };
            }
            let mut shape = operands[0].shape.clone();
            shape[*axis] = total;
            Ok(Type::f32(shape))
        }
        Op::Broadcast { shape, .. } => match broadcast(&operands[0].shape, shape) {
            Some(wide) if wide == *shape => Ok(Type::f32(shape.clone())),
            _ => Err(format!("{} does not broadcast to [{}]", operands[0], join(shape))),
        },
        Op::Reduce { axes, keep, .. } => {
            let x = operands[0];
            if let Some(&axis) = axes.iter().find(|&&a| a >= x.rank()) {
                return Err(format!("`{name}` names axis {axis}, but {x} has {} axes", x.rank()));
            }
            if x.ragged() && axes.contains(&(x.rank() - 2)) && axes.len() != x.rank() && !axes.contains(&(x.rank() - 1))
            {
                return Err(format!("the ragged axis of {x} belongs to its rows: they cannot be reduced without it"));
            }
            let shape = x.shape.iter().enumerate().filter_map(|(i, &d)| match (axes.contains(&i), keep) {
                (false, _) => Some(d),
                (true, true) => Some(Dim::Const(1)),
                (true, false) => None,
            });
            Ok(Type::f32(shape.collect::<Vec<_>>()))
        }
        Op::Matmul { transpose_x, transpose_y } => {
            let (x, y) = (operands[0], operands[1]);
            let misfit = |why: &str| format!("{x} @ {y} does not fit: {why}");
            if x.rank() < 2 || y.rank() < 2 {
                return Err(misfit("both need two axes or more"));
            }
            if x.ragged() || y.ragged() {
                return Err(misfit("a ragged axis is contracted by `attend`"));
            }
            let (lead, [mut m, mut k]) = (&x.shape[..x.rank() - 2], [x.shape[x.rank() - 2], x.shape[x.rank() - 1]]);
            let (lead_y, [mut k2, mut n]) = (&y.shape[..y.rank() - 2], [y.shape[y.rank() - 2], y.shape[y.rank() - 1]]);
            if *transpose_x {
                std::mem::swap(&mut m, &mut k);
            }
            if *transpose_y {
                std::mem::swap(&mut k2, &mut n);
            }
            if k != k2 {
                return Err(misfit(&format!("the left side has width {k}, the right side wants {k2}")));
            }
            if !(lead == lead_y || lead_y.is_empty() && !transpose_x) {
                return Err(misfit("the leading axes differ"));
            }
            let mut shape = lead.to_vec();
            shape.extend([m, n]);
            Ok(Type::f32(shape))
        }
        Op::Scores { .. } => {
            let (q, k) = (operands[0], operands[1]);
            match (&q.shape[..], &k.shape[..]) {
                ([h, Dim::Tokens, p], [h2, Dim::Tokens, p2]) if h == h2 && p == p2 => {
                    Ok(Type::f32([*h, Dim::Tokens, Dim::Keys(0)]))
                }
                _ => Err(format!("scores want two tensors f32[heads,tokens,width] alike, found {q} and {k}")),
            }
        }
        Op::Attend { .. } | Op::AttendTransposed { .. } => {
            let (w, v) = (operands[0], operands[1]);
            match (&w.shape[..], &v.shape[..]) {
                ([h, Dim::Tokens, Dim::Keys(0)], [h2, Dim::Tokens, p]) if h == h2 => {
                    Ok(Type::f32([*h, Dim::Tokens, *p]))
                }
                _ => {
                    Err(format!("`{name}` wants f32[heads,tokens,keys] and f32[heads,tokens,width], found {w} and {v}"))
                }
            }
        }
        Op::Softmax | Op::Normalize { .. } => match x.and_then(Type::last) {
            Some(_) => same(),
            None => Err(format!("`{name}` wants at least one axis")),
        },
        Op::Attention { p, .. } | Op::AttentionVjp { p, .. } => {
            let vjp = matches!(op, Op::AttentionVjp { .. });
            let wanted = if vjp { 6 } else { 3 } + usize::from(*p > 0.0);
            if operands.len() != wanted || !(0.0..1.0).contains(p) {
                return Err(format!("`{name}` takes {wanted} operands for a rate of {p}, found {}", operands.len()));
            }
            let row = |ty: &Type| ty.shape.first().map(|&h| Type::f32([h, Dim::Tokens, Dim::Const(1)]));
            let [q, k, v] = [operands[0], operands[1], operands[2]];
            let heads = |x: &Type| matches!(x.shape[..], [_, Dim::Tokens, Dim::Const(_)]);
            let beside =
                !vjp || Some(operands[3].clone()) == row(q) && operands[4] == v && Some(operands[5].clone()) == row(q);
            if !heads(q) || q != k || !heads(v) || q.shape[0] != v.shape[0] || !beside {
                return Err(format!("`{name}` wants f32[heads,tokens,width] alike, found {q}, {k} and {v}"));
            }
            Ok(match op {
                Op::AttentionVjp { of: 0 | 1, .. } => q.clone(),
                _ => v.clone(),
            })
        }
        Op::AttentionLse { .. } => match (&operands[0].shape[..], operands[0] == operands[1]) {
            ([h, Dim::Tokens, Dim::Const(_)], true) => Ok(Type::f32([*h, Dim::Tokens, Dim::Const(1)])),
            _ => Err(format!("`{name}` wants two tensors f32[heads,tokens,width] alike")),
        },
        Op::LinearLse | Op::LinearMean => match (&operands[0].shape[..], &operands[1].shape[..]) {
            ([n, d], [Dim::Const(_), d2]) if d == d2 => {
                Ok(Type::f32([*n, if *op == Op::LinearLse { Dim::Const(1) } else { *d }]))
            }
            _ => Err(format!(
                "`{name}` wants f32[n,width] and f32[rows,width], found {} and {}",
                operands[0], operands[1]
            )),
        },
        Op::AttentionAndLse { .. }
        | Op::AttentionVjpSides { .. }
        | Op::AttentionVjpAll { .. }
        | Op::LinearLseAndMean => unreachable!("asked of what it joins"),
        Op::LogSumExp => match operands[0].shape.split_last() {
            Some((_, lead)) => Ok(Type::f32([lead, &[Dim::Const(1)]].concat())),
            None => Err(format!("`{name}` wants at least one axis")),
        },
        Op::SoftmaxVjp | Op::NormalizeVjp { .. } => {
            if operands[0] == operands[1] && operands[0].rank() > 0 {
                same()
            } else {
                Err(format!("`{name}` wants two tensors alike, found {} and {}", operands[0], operands[1]))
            }
        }
        Op::Gather { .. } => match (&operands[0].shape[..], &operands[1].shape[..]) {
            ([_, d], [n]) => Ok(Type::f32([*n, *d])),
            _ => Err(format!(
                "indexing wants a table f32[rows,width] and indices i32[n], found {} and {}",
                operands[0], operands[1]
            )),
        },
        Op::Scatter { rows, .. } => match (&operands[0].shape[..], &operands[1].shape[..]) {
            ([n], [n2, d]) if n == n2 => Ok(Type::f32([*rows, *d])),
            _ => Err(format!("`{name}` wants i32[n] and f32[n,width], found {} and {}", operands[0], operands[1])),
        },
        Op::SegmentMean => match operands[0].shape[..] {
            [Dim::Tokens, d] => Ok(Type::f32([Dim::Sequences, d])),
            _ => Err(format!("the mean over a sequence wants f32[tokens,width], found {}", operands[0])),
        },
        Op::SegmentMeanVjp => match operands[0].shape[..] {
            [Dim::Sequences, d] => Ok(Type::f32([Dim::Tokens, d])),
            _ => Err(format!("`{name}` wants f32[sequences,width], found {}", operands[0])),
        },
        Op::CrossEntropy { .. } => match (&operands[0].shape[..], &operands[1].shape[..]) {
            ([t, Dim::Const(_)], [t2]) if t == t2 => Ok(Type::f32([*t])),
            _ => Err(format!(
                "cross entropy wants logits f32[n,classes] and labels i32[n], found {} and {}",
                operands[0], operands[1]
            )),
        },
        Op::CrossEntropyVjp { .. } => match (&operands[0].shape[..], &operands[1].shape[..], &operands[2].shape[..]) {
            ([t, Dim::Const(_)], [t2], [t3]) if t == t2 && t == t3 => same(),
            _ => Err(format!("`{name}` wants f32[n,classes], i32[n] and f32[n]")),
        },
        Op::Dropout { p, .. } => {
            if !(0.0..1.0).contains(p) {
                return Err(format!("dropout wants a rate of at least 0 and below 1, found {p}"));
            }
            if !matches!(operands.len(), 2 | 3) {
                return Err(format!("`{name}` takes 2 or 3 operands, found {}", operands.len()));
            }
            if operands[1].shape != [Dim::Const(2)] {
                return Err(format!("dropout wants its key as i32[2], found {}", operands[1]));
            }
            match (operands[0], operands.get(2)) {
                (x, Some(rows)) if x.ragged() || x.rank() < 2 || rows.shape != x.shape[x.rank() - 2..x.rank() - 1] => {
                    Err(format!("dropout wants a number for each row, found {x} and {rows}"))
                }
                _ => same(),
            }
        }
    }
}

/// A value of a graph: an index into its types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Value(pub u32);

/// Where a graph's argument comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Role {
    /// Of the batch: ids, labels, …
    Input,
    /// A weight that never changes.
    Frozen,
    /// A weight that trains.
    Trainable,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arg {
    /// The input's name or the tensor's canonical name.
    pub name: String,
    pub role: Role,
    /// Only these rows `start..end` of the tensor (a partly trainable embedding comes in parts).
    pub rows: Option<(u64, u64)>,
    pub value: Value,
}

impl Arg {
    /// `name`, or `name[start:end]` when it is a part.
    pub fn label(&self) -> String {
        match self.rows {
            Some((start, end)) => format!("{}[{start}:{end}]", self.name),
            None => self.name.clone(),
        }
    }
}

/// A place in a `.peft` file: for messages and for MLIR's locations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Location {
    pub file: String,
    /// From 1; 0 when unknown.
    pub line: u32,
    pub column: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    pub op: Op,
    pub operands: Vec<Value>,
    /// One for each operation that [the node's joins](Op::joins).
    #[serde(rename = "result", with = "results")]
    pub results: Vec<Value>,
    pub location: Location,
}

impl Node {
    /// The only result.
    pub fn result(&self) -> Value {
        let [result] = self.results[..] else { panic!("`peft.{}` has several results", self.op.name()) };
        result
    }
}

/// Results as they are written down: one by itself.
mod results {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Value;

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Written {
        One(Value),
        Several(Vec<Value>),
    }

    pub fn serialize<S: Serializer>(results: &[Value], to: S) -> Result<S::Ok, S::Error> {
        let written = if let [one] = *results { Written::One(one) } else { Written::Several(results.to_vec()) };
        written.serialize(to)
    }

    pub fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Vec<Value>, D::Error> {
        Ok(match Written::deserialize(from)? {
            Written::One(one) => vec![one],
            Written::Several(results) => results,
        })
    }
}

/// Operations in an order in which each may run; every operand is an argument or an earlier result.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "Stored")]
pub struct Graph {
    pub name: String,
    pub args: Vec<Arg>,
    /// To be appended by [`Graph::push`] and brought into another order by [`Graph::reorder`].
    pub nodes: Vec<Node>,
    /// Named results, `loss`, `logits`, `lambda.0`, `grad.…`.
    pub outputs: Vec<(String, Value)>,
    types: Vec<Type>,
    /// By value, which node makes it; none an argument.
    #[serde(skip)]
    defs: Vec<Option<usize>>,
}

/// [`Graph`] as it is written down.
#[derive(Deserialize)]
struct Stored {
    name: String,
    args: Vec<Arg>,
    nodes: Vec<Node>,
    outputs: Vec<(String, Value)>,
    types: Vec<Type>,
}

impl From<Stored> for Graph {
    fn from(Stored { name, args, nodes, outputs, types }: Stored) -> Self {
        let mut graph = Graph { name, args, nodes, outputs, types, defs: vec![] };
        graph.index();
        graph
    }
}

impl Graph {
    pub fn new(name: impl Into<String>) -> Self {
        Graph { name: name.into(), ..Graph::default() }
    }

    pub fn ty(&self, value: Value) -> &Type {
        &self.types[value.0 as usize]
    }

    pub fn values(&self) -> usize {
        self.types.len()
    }

    /// The node that makes `value`; `None` for an argument.
    pub fn def(&self, value: Value) -> Option<&Node> {
        self.def_at(value).map(|at| &self.nodes[at])
    }

    /// Where in `nodes` it stands.
    pub fn def_at(&self, value: Value) -> Option<usize> {
        self.defs[value.0 as usize]
    }

    fn index(&mut self) {
        self.defs = vec![None; self.types.len()];
        for (at, node) in self.nodes.iter().enumerate() {
            for result in &node.results {
                if let Some(def) = self.defs.get_mut(result.0 as usize) {
                    *def = Some(at);
                }
            }
        }
    }

    /// Brings the nodes into another order: the first is that which stands at `order[0]`.
    pub fn reorder(&mut self, order: &[usize]) {
        self.nodes = order.iter().map(|&at| self.nodes[at].clone()).collect();
        self.index();
    }

    fn fresh(&mut self, ty: Type, def: Option<usize>) -> Value {
        self.types.push(ty);
        self.defs.push(def);
        Value(self.types.len() as u32 - 1)
    }

    pub fn arg(&mut self, name: impl Into<String>, role: Role, rows: Option<(u64, u64)>, ty: Type) -> Value {
        let value = self.fresh(ty, None);
        self.args.push(Arg { name: name.into(), role, rows, value });
        value
    }

    /// Appends an operation of one result, whose type is inferred.
    pub fn push(&mut self, op: Op, operands: &[Value], location: &Location) -> Result<Value, String> {
        self.push_node(op, operands, location).map(Node::result)
    }

    /// Appends an operation; its results' types are inferred.
    pub fn push_node(&mut self, op: Op, operands: &[Value], location: &Location) -> Result<&Node, String> {
        let types: Vec<&Type> = operands.iter().map(|&v| self.ty(v)).collect();
        let (types, at) = (op.infer(&types)?, self.nodes.len());
        let results = types.into_iter().map(|ty| self.fresh(ty, Some(at))).collect();
        self.nodes.push(Node { op, operands: operands.to_vec(), results, location: location.clone() });
        Ok(&self.nodes[at])
    }

    pub fn output(&self, name: &str) -> Option<Value> {
        self.outputs.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
    }

    /// The values `seeds`, and all in which one of them has a part.
    pub fn made_of(&self, seeds: impl IntoIterator<Item = Value>) -> HashSet<Value> {
        let mut made: HashSet<Value> = seeds.into_iter().collect();
        for node in &self.nodes {
            if node.operands.iter().any(|v| made.contains(v)) {
                made.extend(&node.results);
            }
        }
        made
    }

    /// Checks what the constructors promise: order, arity, shapes, where a value is made, unique outputs.
    pub fn verify(&self) -> Result<(), String> {
        let mut known = vec![false; self.types.len()];
        for arg in &self.args {
            known[arg.value.0 as usize] = true;
        }
        for (i, node) in self.nodes.iter().enumerate() {
            let at = |e: String| {
                let Location { file, line, column } = &node.location;
                format!("`peft.{}` ({file}:{line}:{column}) in `{}`: {e}", node.op.name(), self.name)
            };
            if node.operands.iter().any(|v| !known[v.0 as usize]) {
                return Err(at("an operand is used before it is computed".into()));
            }
            let types: Vec<&Type> = node.operands.iter().map(|&v| self.ty(v)).collect();
            let types = node.op.infer(&types).map_err(at)?;
            if types.len() != node.results.len() {
                return Err(at(format!("it has {} results, but {} are written", types.len(), node.results.len())));
            }
            for (ty, &result) in types.iter().zip(&node.results) {
                if ty != self.ty(result) {
                    return Err(at(format!("the result is {ty}, but {} is written", self.ty(result))));
                }
                if self.def_at(result) != Some(i) {
                    return Err(at("it is not where the graph says that its result is made".into()));
                }
                known[result.0 as usize] = true;
            }
        }
        for (i, (name, value)) in self.outputs.iter().enumerate() {
            if !known[value.0 as usize] {
                return Err(format!("output `{name}` of `{}` is never computed", self.name));
            }
            if self.outputs[..i].iter().any(|(other, _)| other == name) {
                return Err(format!("output `{name}` of `{}` is named twice", self.name));
            }
        }
        Ok(())
    }
}
