//! The graph: a straight line of operations on typed tensors, each of one result.
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

/// What an operation computes. `x`, `y`, … are its operands in order; row vectors, `x @ W`.
///
/// Two are equal if their names and attributes are, floats by their bits.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Op {
    /// The same number everywhere.
    Constant { value: f64, shape: Vec<Dim> },
    /// 0, 1, …, n − 1
    Iota { n: u64 },

    // Element by element; binary ones broadcast as NumPy does.
    /// x + y
    Add,
    /// x − y
    Sub,
    /// x · y
    Mul,
    /// x / y
    Div,
    /// min(x, y)
    Min,
    /// by · x
    Scale { by: f64 },
    /// x + by
    Shift { by: f64 },
    /// Integers as floats.
    Float,
    /// eˣ
    Exp,
    /// ln x
    Log,
    /// √x
    Sqrt,
    /// 1/√x
    Rsqrt,
    /// sin x
    Sin,
    /// cos x
    Cos,
    /// tanh x
    Tanh,
    /// 1 / (1 + e⁻ˣ)
    Sigmoid,
    /// max(x, 0)
    Relu,
    /// 1 where x > 0, else 0: relu's derivative
    Step,
    /// x Φ(x) = x/2 · (1 + erf(x/√2))
    Gelu,
    /// Φ(x) + x φ(x)
    GeluGrad,
    /// x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))
    GeluTanh,
    /// its derivative
    GeluTanhGrad,

    /// x, and a constant to the gradient
    Detach,

    // Shape.
    /// Row-major order stays; a ragged axis and the token axis before it stay where they are.
    Reshape { shape: Vec<Dim> },
    /// Axis i of the result is axis `axes[i]` of x.
    Permute { axes: Vec<usize> },
    /// x[.., start..end, ..] along `axis`; no `end` = to the end.
    Slice { axis: usize, start: u64, end: Option<u64> },
    /// The adjoint of `Slice`: zeros of width `to` with x laid in from `start` on.
    Pad { axis: usize, start: u64, to: Dim },
    /// Up to [`MAX_PARTS`] operands, end to end along `axis`.
    Concat { axis: usize },
    /// Repeats axes of size 1 (or missing in front) up to `shape`; `mean` divides by the number of copies.
    Broadcast { shape: Vec<Dim>, mean: bool },
    /// Adds up (or averages) over `axes`, which stay as size 1 when `keep`.
    Reduce { axes: Vec<usize>, keep: bool, mean: bool },

    // Contractions.
    /// x @ y over the last two axes, either read transposed. A rank-2 y serves every leading axis of x.
    Matmul { transpose_x: bool, transpose_y: bool },
    /// q[H,tokens,p], k[H,tokens,p] → s[H,tokens,keys]: s_ij = q_i · k_j, j in i's sequence; −∞ at j > i if causal.
    Scores { causal: bool },
    /// w[H,tokens,keys], v[H,tokens,p] → Σ_j w_ij v_j; over j ≤ i if causal.
    Attend { causal: bool },
    /// w[H,tokens,keys], v[H,tokens,p] → Σ_i w_ij v_i; over i ≥ j if causal. `Attend` with w transposed.
    AttendTransposed { causal: bool },

    // Attention whose square exists nowhere. w_ij = softmax_j(scale · q_i · k_j) over j in i's sequence (j ≤ i if
    // causal), d_ij its dropout as [`Op::Dropout`] draws it for w[H,tokens,keys]; `rng` is there if p > 0.
    /// (q, k, v, rng) → Σ_j d_ij w_ij v_j
    Attention { causal: bool, scale: f64, p: f64, stream: u32, column: u64 },
    /// (q, k) → ln Σ_j e^{scale · q_i · k_j}, [H,tokens,1]
    AttentionLse { causal: bool, scale: f64 },
    /// (q, k, v, lse, df, r, rng), ds_ij = scale · w_ij (d_ij df_i · v_j + r_i) → the adjoint of operand `of`:
    /// 0: Σ_j ds_ij k_j;  1: Σ_i ds_ij q_i;  2: Σ_i d_ij w_ij df_i
    AttentionVjp { of: usize, causal: bool, scale: f64, p: f64, stream: u32, column: u64 },

    // A linear map of which only the softmax is asked for, x[n,d] and W[V,d]; its n × V results exist nowhere.
    /// (x, W) → ln Σ_v e^{x·W_v}, [n,1]
    LinearLse,
    /// (x, W) → Σ_v softmax(x Wᵀ)_v W_v, [n,d]
    LinearMean,

    // Along the last axis.
    /// e^{x_j − max} / Σ
    Softmax,
    /// ln Σ e^{x_j}, one number a row: the last axis is 1 long
    LogSumExp,
    /// (y, dy) → y ⊙ (dy − Σ y ⊙ dy)
    SoftmaxVjp,
    /// (x − mean) / √(var + eps), biased variance
    Normalize { eps: f64 },
    /// (x, dy) → its adjoint, x̂ computed again
    NormalizeVjp { eps: f64 },

    // Rows.
    /// table[V,d], ids[n] → table[ids − start], a zero row where that lies outside the table
    Gather { start: u64 },
    /// ids[n], y[n,d] → t[rows,d]: t[ids − start] += y; what lies outside is dropped. The adjoint of `Gather`.
    Scatter { start: u64, rows: Dim },
    /// x[tokens,d] → the mean over each sequence, [sequences,d]
    SegmentMean,
    /// y[sequences,d] → each token its sequence's row over the sequence's length, [tokens,d]
    SegmentMeanVjp,

    /// x[T,V], labels[T] → ln Σ_v exp x_v − Σ_v w_v x_v; w = (1−e)·onehot(label) + e/V, e = `smoothing`. A label beyond
    /// the classes is hot nowhere.
    CrossEntropy { smoothing: f64 },
    /// (logits, labels, dy[T]) → dy ⊙ (softmax(logits) − w)
    CrossEntropyVjp { smoothing: f64 },

    /// (x, rng) → x/(1−p) where Philox4x32-10 says keep, else 0. rng = i32[2] (seed, step) is the key;
    /// the counter is (column / 4, row, lead, stream), the lane column % 4, kept iff the word ≥ ⌊p·2³²⌋.
    /// Column is the index on the last axis, counted from `column`, row on the one before, lead on all others flattened.
    /// (x, rng, rows[n]): row r of the n is taken for row rows_r, so that rows of a tensor are dropped as in the whole.
    Dropout { p: f64, stream: u32, column: u64 },
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

/// Operations without attributes.
const PLAIN: &[(Op, &str)] = &[
    (Op::Add, "add"),
    (Op::Sub, "sub"),
    (Op::Mul, "mul"),
    (Op::Div, "div"),
    (Op::Min, "min"),
    (Op::Float, "float"),
    (Op::Exp, "exp"),
    (Op::Log, "log"),
    (Op::Sqrt, "sqrt"),
    (Op::Rsqrt, "rsqrt"),
    (Op::Sin, "sin"),
    (Op::Cos, "cos"),
    (Op::Tanh, "tanh"),
    (Op::Sigmoid, "sigmoid"),
    (Op::Relu, "relu"),
    (Op::Step, "step"),
    (Op::Gelu, "gelu"),
    (Op::GeluGrad, "gelu_grad"),
    (Op::GeluTanh, "gelu_tanh"),
    (Op::GeluTanhGrad, "gelu_tanh_grad"),
    (Op::Detach, "detach"),
    (Op::LinearLse, "linear_lse"),
    (Op::LinearMean, "linear_mean"),
    (Op::Softmax, "softmax"),
    (Op::LogSumExp, "log_sum_exp"),
    (Op::SoftmaxVjp, "softmax_vjp"),
    (Op::SegmentMean, "segment_mean"),
    (Op::SegmentMeanVjp, "segment_mean_vjp"),
];

/// The most operands a `concat` takes.
pub const MAX_PARTS: usize = 8;

/// Every operation's name in the dialect, with the names of its attributes and its operand count
/// (`None`: one to [`MAX_PARTS`]). The IRDL definition of the dialect is made from this table.
pub const OPERATIONS: &[(&str, Option<usize>, &[&str])] = &[
    ("constant", Some(0), &["value", "shape"]),
    ("iota", Some(0), &["n"]),
    ("add", Some(2), &[]),
    ("sub", Some(2), &[]),
    ("mul", Some(2), &[]),
    ("div", Some(2), &[]),
    ("min", Some(2), &[]),
    ("scale", Some(1), &["by"]),
    ("shift", Some(1), &["by"]),
    ("float", Some(1), &[]),
    ("exp", Some(1), &[]),
    ("log", Some(1), &[]),
    ("sqrt", Some(1), &[]),
    ("rsqrt", Some(1), &[]),
    ("sin", Some(1), &[]),
    ("cos", Some(1), &[]),
    ("tanh", Some(1), &[]),
    ("sigmoid", Some(1), &[]),
    ("relu", Some(1), &[]),
    ("step", Some(1), &[]),
    ("gelu", Some(1), &[]),
    ("gelu_grad", Some(1), &[]),
    ("gelu_tanh", Some(1), &[]),
    ("gelu_tanh_grad", Some(1), &[]),
    ("detach", Some(1), &[]),
    ("reshape", Some(1), &["shape"]),
    ("permute", Some(1), &["axes"]),
    ("slice", Some(1), &["axis", "start", "end"]),
    ("pad", Some(1), &["axis", "start", "to"]),
    ("concat", None, &["axis"]),
    ("broadcast", Some(1), &["shape", "mean"]),
    ("reduce", Some(1), &["axes", "keep", "mean"]),
    ("matmul", Some(2), &["transpose_x", "transpose_y"]),
    ("scores", Some(2), &["causal"]),
    ("attend", Some(2), &["causal"]),
    ("attend_transposed", Some(2), &["causal"]),
    ("attention", None, &["causal", "scale", "p", "stream", "column"]),
    ("attention_lse", Some(2), &["causal", "scale"]),
    ("attention_vjp", None, &["of", "causal", "scale", "p", "stream", "column"]),
    ("linear_lse", Some(2), &[]),
    ("linear_mean", Some(2), &[]),
    ("softmax", Some(1), &[]),
    ("log_sum_exp", Some(1), &[]),
    ("softmax_vjp", Some(2), &[]),
    ("normalize", Some(1), &["eps"]),
    ("normalize_vjp", Some(2), &["eps"]),
    ("gather", Some(2), &["start"]),
    ("scatter", Some(2), &["start", "rows"]),
    ("segment_mean", Some(1), &[]),
    ("segment_mean_vjp", Some(1), &[]),
    ("cross_entropy", Some(2), &["smoothing"]),
    ("cross_entropy_vjp", Some(3), &["smoothing"]),
    ("dropout", None, &["p", "stream", "column"]),
];

impl Op {
    /// The name in the dialect, without `peft.`.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Constant { .. } => "constant",
            Op::Iota { .. } => "iota",
            Op::Scale { .. } => "scale",
            Op::Shift { .. } => "shift",
            Op::Reshape { .. } => "reshape",
            Op::Permute { .. } => "permute",
            Op::Slice { .. } => "slice",
            Op::Pad { .. } => "pad",
            Op::Concat { .. } => "concat",
            Op::Broadcast { .. } => "broadcast",
            Op::Reduce { .. } => "reduce",
            Op::Matmul { .. } => "matmul",
            Op::Scores { .. } => "scores",
            Op::Attend { .. } => "attend",
            Op::AttendTransposed { .. } => "attend_transposed",
            Op::Attention { .. } => "attention",
            Op::AttentionLse { .. } => "attention_lse",
            Op::AttentionVjp { .. } => "attention_vjp",
            Op::Normalize { .. } => "normalize",
            Op::NormalizeVjp { .. } => "normalize_vjp",
            Op::Gather { .. } => "gather",
            Op::Scatter { .. } => "scatter",
            Op::CrossEntropy { .. } => "cross_entropy",
            Op::CrossEntropyVjp { .. } => "cross_entropy_vjp",
            Op::Dropout { .. } => "dropout",
            plain => PLAIN.iter().find(|(op, _)| op == plain).expect("every other operation is plain").1,
        }
    }

    /// Attributes in the order of [`OPERATIONS`]. A slice to the end has `end` −1.
    pub fn attributes(&self) -> Vec<(&'static str, Attr)> {
        use Attr::*;
        let ints = |v: &[usize]| Ints(v.iter().map(|&i| i as i64).collect());
        match self {
            Op::Constant { value, shape } => vec![("value", Float(*value)), ("shape", Dims(shape.clone()))],
            Op::Iota { n } => vec![("n", Int(*n as i64))],
            Op::Scale { by } | Op::Shift { by } => vec![("by", Float(*by))],
            Op::Reshape { shape } => vec![("shape", Dims(shape.clone()))],
            Op::Permute { axes } => vec![("axes", ints(axes))],
            Op::Slice { axis, start, end } => {
                let end = end.map_or(-1, |end| end as i64);
                vec![("axis", Int(*axis as i64)), ("start", Int(*start as i64)), ("end", Int(end))]
            }
            Op::Pad { axis, start, to } => {
                vec![("axis", Int(*axis as i64)), ("start", Int(*start as i64)), ("to", Dims(vec![*to]))]
            }
            Op::Concat { axis } => vec![("axis", Int(*axis as i64))],
            Op::Broadcast { shape, mean } => vec![("shape", Dims(shape.clone())), ("mean", Bool(*mean))],
            Op::Reduce { axes, keep, mean } => vec![("axes", ints(axes)), ("keep", Bool(*keep)), ("mean", Bool(*mean))],
            Op::Matmul { transpose_x, transpose_y } => {
                vec![("transpose_x", Bool(*transpose_x)), ("transpose_y", Bool(*transpose_y))]
            }
            Op::Scores { causal } | Op::Attend { causal } | Op::AttendTransposed { causal } => {
                vec![("causal", Bool(*causal))]
            }
            Op::Attention { causal, scale, p, stream, column } => vec![
                ("causal", Bool(*causal)),
                ("scale", Float(*scale)),
                ("p", Float(*p)),
                ("stream", Int(*stream as i64)),
                ("column", Int(*column as i64)),
            ],
            Op::AttentionLse { causal, scale } => vec![("causal", Bool(*causal)), ("scale", Float(*scale))],
            Op::AttentionVjp { of, causal, scale, p, stream, column } => vec![
                ("of", Int(*of as i64)),
                ("causal", Bool(*causal)),
                ("scale", Float(*scale)),
                ("p", Float(*p)),
                ("stream", Int(*stream as i64)),
                ("column", Int(*column as i64)),
            ],
            Op::Normalize { eps } | Op::NormalizeVjp { eps } => vec![("eps", Float(*eps))],
            Op::Gather { start } => vec![("start", Int(*start as i64))],
            Op::Scatter { start, rows } => vec![("start", Int(*start as i64)), ("rows", Dims(vec![*rows]))],
            Op::CrossEntropy { smoothing } | Op::CrossEntropyVjp { smoothing } => {
                vec![("smoothing", Float(*smoothing))]
            }
            Op::Dropout { p, stream, column } => {
                vec![("p", Float(*p)), ("stream", Int(*stream as i64)), ("column", Int(*column as i64))]
            }
            _ => vec![],
        }
    }

    /// The way back from [`Op::name`] and [`Op::attributes`].
    pub fn from_parts(name: &str, attrs: &dyn Fn(&str) -> Option<Attr>) -> Result<Op, String> {
        if let Some((op, _)) = PLAIN.iter().find(|(_, plain)| *plain == name) {
            return Ok(op.clone());
        }
        let wrong = |key: &str| format!("`peft.{name}` lacks a well-formed attribute `{key}`");
        let int = |key: &str| match attrs(key) {
            Some(Attr::Int(i)) if i >= 0 => Ok(i as u64),
            _ => Err(wrong(key)),
        };
        let float = |key: &str| match attrs(key) {
            Some(Attr::Float(x)) => Ok(x),
            _ => Err(wrong(key)),
        };
        let flag = |key: &str| match attrs(key) {
            Some(Attr::Bool(b)) => Ok(b),
            _ => Err(wrong(key)),
        };
        let dims = |key: &str| match attrs(key) {
            Some(Attr::Dims(d)) => Ok(d),
            _ => Err(wrong(key)),
        };
        let dim = |key: &str| dims(key).and_then(|d| if let [d] = d[..] { Ok(d) } else { Err(wrong(key)) });
        let axes = |key: &str| match attrs(key) {
            Some(Attr::Ints(v)) if v.iter().all(|&i| i >= 0) => Ok(v.iter().map(|&i| i as usize).collect()),
            _ => Err(wrong(key)),
        };
        Ok(match name {
            "constant" => Op::Constant { value: float("value")?, shape: dims("shape")? },
            "iota" => Op::Iota { n: int("n")? },
            "scale" => Op::Scale { by: float("by")? },
            "shift" => Op::Shift { by: float("by")? },
            "reshape" => Op::Reshape { shape: dims("shape")? },
            "permute" => Op::Permute { axes: axes("axes")? },
            "slice" => {
                let end = if attrs("end") == Some(Attr::Int(-1)) { None } else { Some(int("end")?) };
                Op::Slice { axis: int("axis")? as usize, start: int("start")?, end }
            }
            "pad" => Op::Pad { axis: int("axis")? as usize, start: int("start")?, to: dim("to")? },
            "concat" => Op::Concat { axis: int("axis")? as usize },
            "broadcast" => Op::Broadcast { shape: dims("shape")?, mean: flag("mean")? },
            "reduce" => Op::Reduce { axes: axes("axes")?, keep: flag("keep")?, mean: flag("mean")? },
            "matmul" => Op::Matmul { transpose_x: flag("transpose_x")?, transpose_y: flag("transpose_y")? },
            "scores" => Op::Scores { causal: flag("causal")? },
            "attend" => Op::Attend { causal: flag("causal")? },
            "attend_transposed" => Op::AttendTransposed { causal: flag("causal")? },
            "attention" => Op::Attention {
                causal: flag("causal")?,
                scale: float("scale")?,
                p: float("p")?,
                stream: int("stream")? as u32,
                column: int("column")?,
            },
            "attention_lse" => Op::AttentionLse { causal: flag("causal")?, scale: float("scale")? },
            "attention_vjp" => Op::AttentionVjp {
                of: int("of")? as usize,
                causal: flag("causal")?,
                scale: float("scale")?,
                p: float("p")?,
                stream: int("stream")? as u32,
                column: int("column")?,
            },
            "normalize" => Op::Normalize { eps: float("eps")? },
            "normalize_vjp" => Op::NormalizeVjp { eps: float("eps")? },
            "gather" => Op::Gather { start: int("start")? },
            "scatter" => Op::Scatter { start: int("start")?, rows: dim("rows")? },
            "cross_entropy" => Op::CrossEntropy { smoothing: float("smoothing")? },
            "cross_entropy_vjp" => Op::CrossEntropyVjp { smoothing: float("smoothing")? },
            "dropout" => Op::Dropout { p: float("p")?, stream: int("stream")? as u32, column: int("column")? },
            _ => return Err(format!("`peft.{name}` is no operation of the dialect")),
        })
    }

    /// The type of the result, or in what way the operands do not fit.
    pub fn infer(&self, operands: &[&Type]) -> Result<Type, String> {
        let (_, arity, _) = OPERATIONS.iter().find(|(name, ..)| *name == self.name()).expect("in the table");
        let fits = arity.map_or((1..=MAX_PARTS).contains(&operands.len()), |n| operands.len() == n);
        if !fits {
            return Err(format!(
                "`{}` takes {} operands, found {}",
                self.name(),
                arity.map_or(format!("1 to {MAX_PARTS}"), |n| n.to_string()),
                operands.len()
            ));
        }
        let ids_at: &[usize] = match self {
            Op::Gather { .. } | Op::CrossEntropy { .. } | Op::CrossEntropyVjp { .. } => &[1],
            Op::Dropout { .. } => &[1, 2],
            Op::Float | Op::Scatter { .. } => &[0],
            Op::Attention { .. } => &[3],
            Op::AttentionVjp { .. } => &[6],
            _ => &[],
        };
        for (i, ty) in operands.iter().enumerate() {
            let want = if ids_at.contains(&i) { DType::I32 } else { DType::F32 };
            if ty.dtype != want {
                return Err(format!("`{}` wants {want} as operand {}, found {ty}", self.name(), i + 1));
            }
        }
        infer(self, operands)
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
    pub result: Value,
    pub location: Location,
}

/// Operations in an order in which each may run; every operand is an argument or an earlier result.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Graph {
    pub name: String,
    pub args: Vec<Arg>,
    pub nodes: Vec<Node>,
    /// Named results, `loss`, `logits`, `lambda.0`, `grad.…`.
    pub outputs: Vec<(String, Value)>,
    types: Vec<Type>,
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

    fn fresh(&mut self, ty: Type) -> Value {
        self.types.push(ty);
        Value(self.types.len() as u32 - 1)
    }

    pub fn arg(&mut self, name: impl Into<String>, role: Role, rows: Option<(u64, u64)>, ty: Type) -> Value {
        let value = self.fresh(ty);
        self.args.push(Arg { name: name.into(), role, rows, value });
        value
    }

    /// Appends an operation; its result's type is inferred.
    pub fn push(&mut self, op: Op, operands: &[Value], location: &Location) -> Result<Value, String> {
        let types: Vec<&Type> = operands.iter().map(|&v| self.ty(v)).collect();
        let ty = op.infer(&types)?;
        let result = self.fresh(ty);
        self.nodes.push(Node { op, operands: operands.to_vec(), result, location: location.clone() });
        Ok(result)
    }

    pub fn output(&self, name: &str) -> Option<Value> {
        self.outputs.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
    }

    /// The values `seeds`, and all in which one of them has a part.
    pub fn made_of(&self, seeds: impl IntoIterator<Item = Value>) -> HashSet<Value> {
        let mut made: HashSet<Value> = seeds.into_iter().collect();
        for node in &self.nodes {
            if node.operands.iter().any(|v| made.contains(v)) {
                made.insert(node.result);
            }
        }
        made
    }

    /// Checks what the constructors promise: order, arity, shapes, unique outputs.
    pub fn verify(&self) -> Result<(), String> {
        let mut known = vec![false; self.types.len()];
        for arg in &self.args {
            known[arg.value.0 as usize] = true;
        }
        for node in &self.nodes {
            let at = |e: String| {
                let Location { file, line, column } = &node.location;
                format!("`peft.{}` ({file}:{line}:{column}) in `{}`: {e}", node.op.name(), self.name)
            };
            if node.operands.iter().any(|v| !known[v.0 as usize]) {
                return Err(at("an operand is used before it is computed".into()));
            }
            let types: Vec<&Type> = node.operands.iter().map(|&v| self.ty(v)).collect();
            let ty = node.op.infer(&types).map_err(at)?;
            if ty != *self.ty(node.result) {
                return Err(at(format!("the result is {ty}, but {} is written", self.ty(node.result))));
            }
            known[node.result.0 as usize] = true;
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
