//! The graph IR: a list of operations on typed tensors, in execution order. Most operations have one result;
//! multi-output operations have several results that one kernel computes.
//!
//! All stages between the checker and the lowering work on this IR. The checker builds it from `.peft` equations, the
//! `peft` dialect prints it as MLIR and reads it back, and the gradient and the fusion passes rewrite it. The formula
//! above each variant of [`Op`] defines the operation; the reference interpreter implements the same formulas as loops.
//!
//! Tokens form one packed axis without padding. Attention scores have a *ragged* last axis ([`Dim::Keys`]): row `i`
//! holds one entry for each token of the sequence that token `i` belongs to.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The length of one axis of a tensor. All but `Const` are symbolic: a batch determines them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Dim {
    /// A length that is known at compile time.
    Const(u64),
    /// The number of tokens of the batch. Sequences are packed back to back.
    Tokens,
    /// The number of sequences of the batch.
    Sequences,
    /// The number of positions that have a label.
    Targets,
    /// A ragged axis: this many leading columns, then one column for each token of the row's own sequence. It is always
    /// the last axis, and the axis before it is `Tokens`.
    Keys(u64),
    /// The number of trainable values, the length of the optimizer's flat vectors.
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
                Some(extra) => Dim::Keys(extra.parse().map_err(|_| format!("`{s}` is not a dimension"))?),
                None => Dim::Const(s.parse().map_err(|_| format!("`{s}` is not a dimension"))?),
            },
        })
    }
}

impl Dim {
    /// The length, if it is known at compile time.
    pub fn constant(self) -> Option<u64> {
        if let Dim::Const(n) = self { Some(n) } else { None }
    }
}

/// The element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DType {
    /// 32-bit IEEE floating point.
    F32,
    /// 32-bit signed integer: token ids, positions, labels, random keys.
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

/// The type of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Type {
    /// The element type.
    pub dtype: DType,
    /// The length of each axis, outermost first.
    pub shape: Vec<Dim>,
}

impl Type {
    /// A tensor of floats.
    pub fn f32(shape: impl Into<Vec<Dim>>) -> Self {
        Type { dtype: DType::F32, shape: shape.into() }
    }
    /// A tensor of integers.
    pub fn i32(shape: impl Into<Vec<Dim>>) -> Self {
        Type { dtype: DType::I32, shape: shape.into() }
    }
    /// The number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }
    /// The innermost axis; `None` for a scalar.
    pub fn last(&self) -> Option<Dim> {
        self.shape.last().copied()
    }
    /// Whether the last axis is ragged.
    pub fn is_ragged(&self) -> bool {
        matches!(self.last(), Some(Dim::Keys(_)))
    }
    /// The number of elements, if all axes are known at compile time.
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

/// The maximum number of operands of a variadic operation.
pub const MAX_VARIADIC_OPERANDS: usize = 8;

/// The definition of an operation in the `peft` dialect.
#[derive(Debug)]
pub struct Operation {
    /// The name without the prefix `peft.`.
    pub name: &'static str,
    /// The number and element types of the operands.
    pub operands: Operands,
    /// The names of the results, in order.
    pub results: &'static [&'static str],
    /// The names of the attributes, in order.
    pub attributes: &'static [&'static str],
    kind: Kind,
}

/// The number and element types of an operation's operands, in order.
#[derive(Clone, Copy, Debug)]
pub enum Operands {
    /// One operand for each of these types.
    Fixed(&'static [DType]),
    /// One to [`MAX_VARIADIC_OPERANDS`] operands. Operands beyond the list are floats.
    Variadic(&'static [DType]),
}

impl Operands {
    /// The number of operands, if it is fixed.
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

/// How elements of the result depend on elements of the operands.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Each element depends on the operands' elements at its own index, after broadcasting.
    Elementwise,
    /// The elements are elements of the operand under other indices, each at most once.
    View,
    /// Neither of these.
    Other,
}

/// The result names: the given ones, or `z` for an operation with one result.
macro_rules! results {
    () => {
        &["z"]
    };
    ($($result:literal),+) => {
        &[$($result),+]
    };
}

/// Defines [`Op`], [`OPERATIONS`], and the conversions between an operation and its name and attributes from one table.
/// A row holds the formula, the variant with its attributes, the name in the dialect, the operand types, the [`Kind`],
/// and the names of the results where there are several.
macro_rules! operations {
    ($(
        $(#[$formula:meta])*
        $variant:ident $({ $($attr:ident: $type:ty),+ })?,
        $name:literal, $operands:ident($($dtype:ident),*), $kind:ident $(-> ($($result:literal),+))?;
    )*) => {
        /// An operation. `x`, `y`, … are its operands in order; a vector is a row, so a linear map is `x @ W`.
        ///
        /// Attributes that several operations share: `causal` restricts attention to keys at or before the query;
        /// `scale` multiplies the scores before the softmax; `p` is a dropout rate, and `stream` and `column` select
        /// its random numbers (see [`Op::Dropout`]); `mean` divides a sum by the number of summands.
        ///
        /// Two operations are equal if their names and attributes are equal; floats compare by their bits.
        #[derive(Clone, Debug, Serialize, Deserialize)]
        pub enum Op {
            $(
                $(#[$formula])*
                $variant $({
                    $(#[doc = concat!("The attribute `", stringify!($attr), "` of the formula above.")] $attr: $type),+
                })?,
            )*
        }

        /// All operations of the dialect. The IRDL definition of the dialect is generated from this table.
        pub const OPERATIONS: &[Operation] = &[$(Operation {
            name: $name,
            operands: Operands::$operands(&[$(DType::$dtype),*]),
            results: results!($($($result),+)?),
            attributes: &[$($(stringify!($attr)),+)?],
            kind: Kind::$kind,
        }),*];

        impl Op {
            /// The row of this operation in [`OPERATIONS`].
            pub fn operation(&self) -> &'static Operation {
                enum Row {
                    $($variant),*
                }
                match self {
                    $(Op::$variant { .. } => &OPERATIONS[Row::$variant as usize],)*
                }
            }

            /// The attributes with their values, in the order of the table.
            pub fn attributes(&self) -> Vec<(&'static str, Attr)> {
                match self {
                    $(Op::$variant { $($($attr),+)? } => vec![$($((stringify!($attr), $attr.to_attr())),+)?],)*
                }
            }

            /// Builds the operation from its name and attributes, the inverse of [`Op::name`] and [`Op::attributes`].
            ///
            /// # Errors
            ///
            /// No operation has this name, or an attribute is missing or has the wrong type.
            pub fn from_parts(name: &str, attrs: &dyn Fn(&str) -> Option<Attr>) -> Result<Op, String> {
                match name {
                    $($name => Ok(Op::$variant { $($($attr: attribute(name, stringify!($attr), attrs)?),+)? }),)*
                    _ => Err(format!("`peft.{name}` is not an operation of the dialect")),
                }
            }
        }
    };
}

operations! {
    /// The same number in every element.
    Constant { value: f64, shape: Vec<Dim> }, "constant", Fixed(), Elementwise;
    /// 0, 1, …, n − 1
    Iota { n: u64 }, "iota", Fixed(), Elementwise;

    // Elementwise operations. Binary ones broadcast as NumPy does.
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
    /// Converts integers to floats.
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
    /// 1 where x > 0, else 0: the derivative of `Relu`.
    Step, "step", Fixed(F32), Elementwise;
    /// x Φ(x) = x/2 · (1 + erf(x/√2))
    Gelu, "gelu", Fixed(F32), Elementwise;
    /// Φ(x) + x φ(x), the derivative of `Gelu`.
    GeluGrad, "gelu_grad", Fixed(F32), Elementwise;
    /// x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))
    GeluTanh, "gelu_tanh", Fixed(F32), Elementwise;
    /// The derivative of `GeluTanh`.
    GeluTanhGrad, "gelu_tanh_grad", Fixed(F32), Elementwise;

    /// The identity. The gradient treats the result as a constant.
    Detach, "detach", Fixed(F32), Other;

    // Shape operations.
    /// Changes the shape and keeps the row-major order. A ragged axis and the token axis before it stay the last two
    /// axes.
    Reshape { shape: Vec<Dim> }, "reshape", Fixed(F32), View;
    /// Axis i of the result is axis `axes[i]` of x.
    Permute { axes: Vec<usize> }, "permute", Fixed(F32), View;
    /// x[.., start..end, ..] along `axis`. Without `end`, the slice extends to the end of the axis.
    Slice { axis: usize, start: u64, end: Option<u64> }, "slice", Fixed(F32), View;
    /// The adjoint of `Slice`: zeros of length `to` along `axis`, with x at offset `start`.
    Pad { axis: usize, start: u64, to: Dim }, "pad", Fixed(F32), Other;
    /// Concatenates up to [`MAX_VARIADIC_OPERANDS`] operands along `axis`.
    Concat { axis: usize }, "concat", Variadic(F32), Other;
    /// Repeats axes of length 1, or missing leading axes, up to `shape`. `mean` divides by the number of copies.
    Broadcast { shape: Vec<Dim>, mean: bool }, "broadcast", Fixed(F32), Elementwise;
    /// The sum (or, with `mean`, the mean) over `axes`. With `keep`, the reduced axes remain with length 1.
    Reduce { axes: Vec<usize>, keep: bool, mean: bool }, "reduce", Fixed(F32), Other;

    // Contractions.
    /// x @ y over the last two axes, each operand optionally transposed. A rank-2 y is shared by all leading axes of x.
    Matmul { transpose_x: bool, transpose_y: bool }, "matmul", Fixed(F32, F32), Other;
    /// `q[H,tokens,p]`, `k[H,tokens,p]` → `s[H,tokens,keys]`: s_ij = q_i · k_j for j in the sequence of i; −∞ at j > i
    /// if causal.
    Scores { causal: bool }, "scores", Fixed(F32, F32), Other;
    /// `w[H,tokens,keys]`, `v[H,tokens,p]` → Σ_j w_ij v_j, over j ≤ i if causal.
    Attend { causal: bool }, "attend", Fixed(F32, F32), Other;
    /// `w[H,tokens,keys]`, `v[H,tokens,p]` → Σ_i w_ij v_i, over i ≥ j if causal: `Attend` with w transposed.
    AttendTransposed { causal: bool }, "attend_transposed", Fixed(F32, F32), Other;

    // Fused attention.
    /// `q[H,tokens,p]`, `k[H,tokens,p]`, `v[H,tokens,d]`, rng → Σ_j d_ij w_ij v_j, `[H,tokens,d]`, without
    /// materialising the score matrix (FlashAttention, Dao et al., 2022). w_ij = softmax_j(scale · q_i · k_j) over j in
    /// the sequence of i (j ≤ i if causal), and d_ij is the factor by which [`Op::Dropout`] multiplies element ij of
    /// `w[H,tokens,keys]`. The operand `rng` exists only if p > 0.
    Attention { causal: bool, scale: f64, p: f64, stream: u32, column: u64 },
        "attention", Variadic(F32, F32, F32, I32), Other;
    /// (q, k) → the logsumexp of each row of scores, ln Σ_j e^{scale · q_i · k_j}, `[H,tokens,1]`
    AttentionLse { causal: bool, scale: f64 }, "attention_lse", Fixed(F32, F32), Other;
    /// (q, k, v, lse, df, r, rng) → the adjoint of operand `of` of `Attention`, given its logsumexp `lse` and the
    /// adjoint `df` of its result. The row term `r`, `[H,tokens,1]`, is −Σ_j d_ij w_ij df_i · v_j plus the adjoint of
    /// other uses of the softmax's rows. With ds_ij = scale · w_ij (d_ij df_i · v_j + r_i), the adjoint of operand
    /// 0 is Σ_j ds_ij k_j, that of 1 is Σ_i ds_ij q_i, and that of 2 is Σ_i d_ij w_ij df_i.
    AttentionVjp { of: usize, causal: bool, scale: f64, p: f64, stream: u32, column: u64 },
        "attention_vjp", Variadic(F32, F32, F32, F32, F32, F32, I32), Other;
    /// The results of `Attention` and `AttentionLse`.
    AttentionAndLse { causal: bool, scale: f64, p: f64, stream: u32, column: u64 },
        "attention_and_lse", Variadic(F32, F32, F32, I32), Other -> ("f", "lse");
    /// The results of `AttentionVjp` for operands 1 and 2, the adjoints of the keys and the values.
    AttentionVjpSides { causal: bool, scale: f64, p: f64, stream: u32, column: u64 },
        "attention_vjp_sides", Variadic(F32, F32, F32, F32, F32, F32, I32), Other -> ("dk", "dv");
    /// The results of `AttentionVjp` for operands 0, 1 and 2.
    AttentionVjpAll { causal: bool, scale: f64, p: f64, stream: u32, column: u64 },
        "attention_vjp_all", Variadic(F32, F32, F32, F32, F32, F32, I32), Other -> ("dq", "dk", "dv");

    // Chunked logits.
    /// `x[n,d]`, `W[V,d]` → the logsumexp of each row of the logits x Wᵀ, ln Σ_v e^{x·W_v}, `[n,1]`. The n × V logits
    /// are computed in chunks of the vocabulary and never materialised (Wijmans et al., 2024, "Cut your losses").
    LinearLse, "linear_lse", Fixed(F32, F32), Other;
    /// `x[n,d]`, `W[V,d]` → the softmax-weighted mean of the rows of W, Σ_v softmax(x Wᵀ)_v W_v, `[n,d]`, also in
    /// chunks.
    LinearMean, "linear_mean", Fixed(F32, F32), Other;
    /// The results of `LinearLse` and `LinearMean`.
    LinearLseAndMean, "linear_lse_and_mean", Fixed(F32, F32), Other -> ("lse", "mean");

    // Reductions along the last axis.
    /// e^{x_j − max} / Σ_k e^{x_k − max}
    Softmax, "softmax", Fixed(F32), Other;
    /// The logsumexp ln Σ_j e^{x_j} of each row; the last axis becomes 1.
    LogSumExp, "log_sum_exp", Fixed(F32), Other;
    /// (y, dy) → y ⊙ (dy − Σ y ⊙ dy)
    SoftmaxVjp, "softmax_vjp", Fixed(F32, F32), Other;
    /// (x − mean) / √(var + eps), with the biased variance.
    Normalize { eps: f64 }, "normalize", Fixed(F32), Other;
    /// (x, dy) → the adjoint of `Normalize`; the normalised x̂ is recomputed.
    NormalizeVjp { eps: f64 }, "normalize_vjp", Fixed(F32, F32), Other;

    // Row indexing and segments.
    /// `table[V,d]`, `ids[n]` → row ids − start of the table for each id, or a zero row where ids − start is outside
    /// the table.
    Gather { start: u64 }, "gather", Fixed(F32, I32), Other;
    /// `ids[n]`, `y[n,d]` → `t[rows,d]` with t[ids − start] += y; ids outside the table are ignored. The adjoint of
    /// `Gather`.
    Scatter { start: u64, rows: Dim }, "scatter", Fixed(I32, F32), Other;
    /// `x[tokens,d]` → the mean over the tokens of each sequence, `[sequences,d]`
    SegmentMean, "segment_mean", Fixed(F32), Other;
    /// `y[sequences,d]` → for each token, the row of its sequence divided by the sequence's length, `[tokens,d]`: the
    /// adjoint of `SegmentMean`.
    SegmentMeanVjp, "segment_mean_vjp", Fixed(F32), Other;

    /// `x[T,V]`, `labels[T]` → ln Σ_v exp x_v − Σ_v w_v x_v, `[T]`, with w = (1−e)·onehot(label) + e/V and e =
    /// `smoothing`. The one-hot vector of a label outside 0..V is zero.
    CrossEntropy { smoothing: f64 }, "cross_entropy", Fixed(F32, I32), Other;
    /// (logits, labels, `dy[T]`) → dy ⊙ (softmax(logits) − w)
    CrossEntropyVjp { smoothing: f64 }, "cross_entropy_vjp", Fixed(F32, I32, F32), Other;

    /// (x, rng) → x/(1−p) where the element is kept, else 0. The random words come from Philox4x32-10 (Salmon et al.,
    /// 2011): the key is rng = `i32[2]` (seed, step), the counter is (column / 4, row, lead, stream), and word column %
    /// 4 of the output belongs to the element, which is kept iff the word is at least ⌊p·2³²⌋. The column is the index
    /// on the last axis plus `column`, the row is the index on the axis before it, and lead is the flattened index of
    /// all other axes.
    ///
    /// (x, rng, `rows[n]`) → the same, with row r replaced by rows_r in the counter, so that a gathered subset of rows
    /// gets the mask of the whole tensor.
    Dropout { p: f64, stream: u32, column: u64 }, "dropout", Variadic(F32, I32, I32), Elementwise;
}

impl Op {
    /// The name in the dialect, without the prefix `peft.`.
    pub fn name(&self) -> &'static str {
        self.operation().name
    }

    /// Whether each element of the result depends on the operands' elements at its own index only, after broadcasting.
    pub fn is_elementwise(&self) -> bool {
        self.operation().kind == Kind::Elementwise
    }

    /// Whether the result holds elements of the operand under another index.
    pub fn is_view(&self) -> bool {
        self.operation().kind == Kind::View
    }

    /// Infers the types of the results.
    ///
    /// # Errors
    ///
    /// The number, element types or shapes of the operands do not fit the operation; the text says which.
    pub fn infer(&self, operands: &[&Type]) -> Result<Vec<Type>, String> {
        let Operation { name, operands: wanted, .. } = self.operation();
        let arity = wanted.count();
        let fits = arity.map_or((1..=MAX_VARIADIC_OPERANDS).contains(&operands.len()), |n| operands.len() == n);
        if !fits {
            let arity = arity.map_or(format!("1 to {MAX_VARIADIC_OPERANDS}"), |n| n.to_string());
            return Err(format!("`{name}` takes {arity} operands, found {}", operands.len()));
        }
        for (i, ty) in operands.iter().enumerate() {
            let want = wanted.dtype(i);
            if ty.dtype != want {
                return Err(format!("`{name}` expects {want} as operand {}, found {ty}", i + 1));
            }
        }
        self.components().iter().map(|part| infer(part, part.component_operands(operands))).collect()
    }

    /// The operations with one result that a multi-output operation consists of, in result order; otherwise the
    /// operation itself. Each component reads a prefix of the operands ([`Op::component_operands`]).
    pub fn components(&self) -> Vec<Op> {
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

    /// The operands that this component reads, given all operands of its multi-output operation.
    pub fn component_operands<'o, T>(&self, operands: &'o [T]) -> &'o [T] {
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

/// The value of an attribute. Floats are equal if their bits are equal.
#[derive(Clone, Debug)]
pub enum Attr {
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A list of integers.
    Ints(Vec<i64>),
    /// Symbolic dimensions, such as `tokens,12,64`.
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

/// Converts an attribute between its type in [`Op`] and [`Attr`].
trait Attribute: Sized {
    fn to_attr(&self) -> Attr;
    /// `None` if `attr` has another type or is out of range.
    fn from_attr(attr: Attr) -> Option<Self>;
}

fn attribute<T: Attribute>(name: &str, key: &str, attrs: &dyn Fn(&str) -> Option<Attr>) -> Result<T, String> {
    let read = attrs(key).and_then(T::from_attr);
    read.ok_or_else(|| format!("`peft.{name}` lacks a well-formed attribute `{key}`"))
}

macro_rules! integer_attributes {
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

integer_attributes!(u64, u32, usize);

/// `None` is represented by −1.
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

/// NumPy's broadcasting rule on symbolic axes: shapes are aligned at the last axis, and axes that are 1 or missing
/// repeat. `None` if the shapes are incompatible.
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

/// The type of the result of an operation with one result.
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
            let ragged = x.is_ragged() || matches!(shape.last(), Some(Dim::Keys(_)));
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
                return Err(format!("axes [{}] are not a permutation of the {} axes of {x}", join(axes), x.rank()));
            }
            if x.is_ragged() {
                return Err(format!("the ragged axis of {x} cannot move"));
            }
            Ok(Type::f32(axes.iter().map(|&a| x.shape[a]).collect::<Vec<_>>()))
        }
        Op::Slice { axis, start, end } => {
            let x = operands[0];
            let out_of = |limit: u64| {
                let end = end.map_or(String::new(), |e| e.to_string());
                format!("{start}:{end} is outside axis {axis} of {x}, which ends at {limit}")
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
                    return Err(format!("{} and {y} differ in an axis other than {axis}", operands[0]));
                }
                total = match (total, dim) {
                    (Dim::Const(a), Dim::Const(b)) => Dim::Const(a + b),
                    (Dim::Const(a), Dim::Keys(b)) => Dim::Keys(a + b),
                    (a, b) => return Err(format!("{a} and {b} cannot be concatenated: a ragged axis must come last")),
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
            if x.is_ragged()
                && axes.contains(&(x.rank() - 2))
                && axes.len() != x.rank()
                && !axes.contains(&(x.rank() - 1))
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
            if x.is_ragged() || y.is_ragged() {
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
                return Err(misfit(&format!("the left side has width {k}, the right side expects {k2}")));
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
                _ => Err(format!("scores expect two f32[heads,tokens,width] of the same type, found {q} and {k}")),
            }
        }
        Op::Attend { .. } | Op::AttendTransposed { .. } => {
            let (w, v) = (operands[0], operands[1]);
            match (&w.shape[..], &v.shape[..]) {
                ([h, Dim::Tokens, Dim::Keys(0)], [h2, Dim::Tokens, p]) if h == h2 => {
                    Ok(Type::f32([*h, Dim::Tokens, *p]))
                }
                _ => {
                    let expected = "f32[heads,tokens,keys] and f32[heads,tokens,width]";
                    Err(format!("`{name}` expects {expected}, found {w} and {v}"))
                }
            }
        }
        Op::Softmax | Op::Normalize { .. } => match x.and_then(Type::last) {
            Some(_) => same(),
            None => Err(format!("`{name}` expects at least one axis")),
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
                return Err(format!("`{name}` expects matching f32[heads,tokens,width], found {q}, {k} and {v}"));
            }
            Ok(match op {
                Op::AttentionVjp { of: 0 | 1, .. } => q.clone(),
                _ => v.clone(),
            })
        }
        Op::AttentionLse { .. } => match (&operands[0].shape[..], operands[0] == operands[1]) {
            ([h, Dim::Tokens, Dim::Const(_)], true) => Ok(Type::f32([*h, Dim::Tokens, Dim::Const(1)])),
            _ => Err(format!("`{name}` expects two f32[heads,tokens,width] of the same type")),
        },
        Op::LinearLse | Op::LinearMean => match (&operands[0].shape[..], &operands[1].shape[..]) {
            ([n, d], [Dim::Const(_), d2]) if d == d2 => {
                Ok(Type::f32([*n, if *op == Op::LinearLse { Dim::Const(1) } else { *d }]))
            }
            _ => Err(format!(
                "`{name}` expects f32[n,width] and f32[rows,width], found {} and {}",
                operands[0], operands[1]
            )),
        },
        Op::AttentionAndLse { .. }
        | Op::AttentionVjpSides { .. }
        | Op::AttentionVjpAll { .. }
        | Op::LinearLseAndMean => unreachable!("the components of a multi-output operation are inferred"),
        Op::LogSumExp => match operands[0].shape.split_last() {
            Some((_, lead)) => Ok(Type::f32([lead, &[Dim::Const(1)]].concat())),
            None => Err(format!("`{name}` expects at least one axis")),
        },
        Op::SoftmaxVjp | Op::NormalizeVjp { .. } => {
            if operands[0] == operands[1] && operands[0].rank() > 0 {
                same()
            } else {
                Err(format!("`{name}` expects two tensors of the same type, found {} and {}", operands[0], operands[1]))
            }
        }
        Op::Gather { .. } => match (&operands[0].shape[..], &operands[1].shape[..]) {
            ([_, d], [n]) => Ok(Type::f32([*n, *d])),
            _ => Err(format!(
                "indexing expects a table f32[rows,width] and indices i32[n], found {} and {}",
                operands[0], operands[1]
            )),
        },
        Op::Scatter { rows, .. } => match (&operands[0].shape[..], &operands[1].shape[..]) {
            ([n], [n2, d]) if n == n2 => Ok(Type::f32([*rows, *d])),
            _ => Err(format!("`{name}` expects i32[n] and f32[n,width], found {} and {}", operands[0], operands[1])),
        },
        Op::SegmentMean => match operands[0].shape[..] {
            [Dim::Tokens, d] => Ok(Type::f32([Dim::Sequences, d])),
            _ => Err(format!("the mean over a sequence expects f32[tokens,width], found {}", operands[0])),
        },
        Op::SegmentMeanVjp => match operands[0].shape[..] {
            [Dim::Sequences, d] => Ok(Type::f32([Dim::Tokens, d])),
            _ => Err(format!("`{name}` expects f32[sequences,width], found {}", operands[0])),
        },
        Op::CrossEntropy { .. } => match (&operands[0].shape[..], &operands[1].shape[..]) {
            ([t, Dim::Const(_)], [t2]) if t == t2 => Ok(Type::f32([*t])),
            _ => Err(format!(
                "cross entropy expects logits f32[n,classes] and labels i32[n], found {} and {}",
                operands[0], operands[1]
            )),
        },
        Op::CrossEntropyVjp { .. } => match (&operands[0].shape[..], &operands[1].shape[..], &operands[2].shape[..]) {
            ([t, Dim::Const(_)], [t2], [t3]) if t == t2 && t == t3 => same(),
            _ => Err(format!("`{name}` expects f32[n,classes], i32[n] and f32[n]")),
        },
        Op::Dropout { p, .. } => {
            if !(0.0..1.0).contains(p) {
                return Err(format!("dropout expects a rate of at least 0 and below 1, found {p}"));
            }
            if !matches!(operands.len(), 2 | 3) {
                return Err(format!("`{name}` takes 2 or 3 operands, found {}", operands.len()));
            }
            if operands[1].shape != [Dim::Const(2)] {
                return Err(format!("dropout expects its key as i32[2], found {}", operands[1]));
            }
            match (operands[0], operands.get(2)) {
                (x, Some(rows))
                    if x.is_ragged() || x.rank() < 2 || rows.shape != x.shape[x.rank() - 2..x.rank() - 1] =>
                {
                    Err(format!("dropout expects a number for each row, found {x} and {rows}"))
                }
                _ => same(),
            }
        }
    }
}

/// A value of a graph: an argument or the result of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Value(pub u32);

/// The kind of a graph's argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Role {
    /// A tensor of the batch: ids, labels, …
    Input,
    /// A frozen weight.
    Frozen,
    /// A trainable weight.
    Trainable,
}

/// An argument of a graph.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arg {
    /// The input's name or the tensor's canonical name.
    pub name: String,
    /// Whether it is an input or a weight.
    pub role: Role,
    /// The rows `start..end` of the tensor that this argument holds; `None` for all. A partly trainable embedding is
    /// split into several arguments.
    pub rows: Option<(u64, u64)>,
    /// The value of the argument.
    pub value: Value,
}

impl Arg {
    /// `name`, or `name[start:end]` if the argument holds a part of the rows.
    pub fn label(&self) -> String {
        match self.rows {
            Some((start, end)) => format!("{}[{start}:{end}]", self.name),
            None => self.name.clone(),
        }
    }
}

/// Where an operation comes from: its place in a `.peft` file, for messages and for MLIR's locations; the site it
/// belongs to; the variable its result is assigned to; and the rewrite rule that introduced it. The texts are empty
/// when unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Location {
    /// The file's path as it was given, or its name in the library.
    pub file: Arc<str>,
    /// Counted from 1; 0 when unknown.
    pub line: u32,
    /// Counted from 1; 0 when unknown.
    pub column: u32,
    /// The path of the site, such as `layers.0.attention`. The adjoint of an operation belongs to the operation's site.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub site: Arc<str>,
    /// The variable, such as `lambda`.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub name: Arc<str>,
    /// The rule by the name that `--no-fuse` takes.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub rule: Arc<str>,
}

impl Location {
    /// The same place without the variable's name, for an operation that computes an intermediate value.
    pub fn unnamed(&self) -> Location {
        Location { name: Arc::default(), ..self.clone() }
    }

    /// The operation belongs to `site` or to a site inside it.
    pub fn within(&self, site: &str) -> bool {
        self.site.strip_prefix(site).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }
}

/// An operation with its operands and results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// The operation.
    pub op: Op,
    /// The operands, in order.
    pub operands: Vec<Value>,
    /// The results, one for each [component](Op::components) of the operation.
    #[serde(rename = "result", with = "results")]
    pub results: Vec<Value>,
    /// Where the operation comes from.
    pub location: Location,
}

impl Node {
    /// The result of an operation with one result.
    ///
    /// # Panics
    ///
    /// The operation has several results.
    pub fn result(&self) -> Value {
        let [result] = self.results[..] else { panic!("`peft.{}` has several results", self.op.name()) };
        result
    }
}

/// Serialises a single result as a number and several as a list.
mod results {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Value;

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(Value),
        Many(Vec<Value>),
    }

    pub fn serialize<S: Serializer>(results: &[Value], to: S) -> Result<S::Ok, S::Error> {
        let written = if let [one] = *results { OneOrMany::One(one) } else { OneOrMany::Many(results.to_vec()) };
        written.serialize(to)
    }

    pub fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Vec<Value>, D::Error> {
        Ok(match OneOrMany::deserialize(from)? {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(results) => results,
        })
    }
}

/// A straight-line program. Every operand is an argument or the result of an earlier node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "SerializedGraph")]
pub struct Graph {
    /// The name of the graph, which is the name of the entry point it computes.
    pub name: String,
    /// The inputs and weights.
    pub args: Vec<Arg>,
    /// The operations, in execution order. [`Graph::push`] appends to them and [`Graph::reorder`] permutes them.
    pub nodes: Vec<Node>,
    /// The named results: `loss`, `logits`, `lambda.0`, `grad.…`.
    pub outputs: Vec<(String, Value)>,
    types: Vec<Type>,
    /// For each value, the index of the node that defines it; `None` for an argument.
    #[serde(skip)]
    defs: Vec<Option<usize>>,
}

/// The serialised form of [`Graph`].
#[derive(Deserialize)]
struct SerializedGraph {
    name: String,
    args: Vec<Arg>,
    nodes: Vec<Node>,
    outputs: Vec<(String, Value)>,
    types: Vec<Type>,
}

impl From<SerializedGraph> for Graph {
    fn from(SerializedGraph { name, args, nodes, outputs, types }: SerializedGraph) -> Self {
        let mut graph = Graph { name, args, nodes, outputs, types, defs: vec![] };
        graph.index();
        graph
    }
}

impl Graph {
    /// An empty graph.
    pub fn new(name: impl Into<String>) -> Self {
        Graph { name: name.into(), ..Graph::default() }
    }

    /// The type of a value.
    pub fn ty(&self, value: Value) -> &Type {
        &self.types[value.0 as usize]
    }

    /// The number of values.
    pub fn value_count(&self) -> usize {
        self.types.len()
    }

    /// The node that defines `value`; `None` for an argument.
    pub fn def(&self, value: Value) -> Option<&Node> {
        self.def_at(value).map(|at| &self.nodes[at])
    }

    /// The index in `nodes` of the node that defines `value`; `None` for an argument.
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

    /// Permutes the nodes: the new node `i` is the old node `order[i]`. The order must remain topological.
    pub fn reorder(&mut self, order: &[usize]) {
        self.nodes = order.iter().map(|&at| self.nodes[at].clone()).collect();
        self.index();
    }

    fn new_value(&mut self, ty: Type, def: Option<usize>) -> Value {
        self.types.push(ty);
        self.defs.push(def);
        Value(self.types.len() as u32 - 1)
    }

    /// Appends an argument.
    pub fn arg(&mut self, name: impl Into<String>, role: Role, rows: Option<(u64, u64)>, ty: Type) -> Value {
        let value = self.new_value(ty, None);
        self.args.push(Arg { name: name.into(), role, rows, value });
        value
    }

    /// Appends an operation with one result and infers its type.
    ///
    /// # Errors
    ///
    /// The operands do not fit the operation, as [`Op::infer`] decides.
    pub fn push(&mut self, op: Op, operands: &[Value], location: &Location) -> Result<Value, String> {
        self.push_node(op, operands, location).map(Node::result)
    }

    /// Appends an operation and infers the types of its results.
    ///
    /// # Errors
    ///
    /// The operands do not fit the operation, as [`Op::infer`] decides.
    pub fn push_node(&mut self, op: Op, operands: &[Value], location: &Location) -> Result<&Node, String> {
        let types: Vec<&Type> = operands.iter().map(|&v| self.ty(v)).collect();
        let (types, at) = (op.infer(&types)?, self.nodes.len());
        let results = types.into_iter().map(|ty| self.new_value(ty, Some(at))).collect();
        self.nodes.push(Node { op, operands: operands.to_vec(), results, location: location.clone() });
        Ok(&self.nodes[at])
    }

    /// Gives the result of the operation that computes `value` a name, unless it has one. An argument keeps its own.
    pub fn name_value(&mut self, value: Value, name: &str) {
        if let Some(at) = self.def_at(value)
            && self.nodes[at].location.name.is_empty()
        {
            self.nodes[at].location.name = name.into();
        }
    }

    /// The operations of one site as a graph of its own: what they read from elsewhere are its inputs, what is read of
    /// them elsewhere its outputs.
    pub fn at_site(&self, site: &str) -> Graph {
        let inside = |node: &&Node| node.location.within(site);
        let mut part = Graph::new(self.name.clone());
        let mut map: HashMap<Value, Value> = HashMap::new();
        for arg in &self.args {
            if self.nodes.iter().filter(inside).any(|node| node.operands.contains(&arg.value)) {
                let value = part.arg(arg.name.clone(), arg.role, arg.rows, self.ty(arg.value).clone());
                map.insert(arg.value, value);
            }
        }
        for node in self.nodes.iter().filter(inside) {
            for operand in node.operands.iter().filter(|v| self.def(**v).is_some_and(|def| !def.location.within(site)))
            {
                if !map.contains_key(operand) {
                    let value = part.arg(self.label(*operand), Role::Input, None, self.ty(*operand).clone());
                    map.insert(*operand, value);
                }
            }
        }
        for node in self.nodes.iter().filter(inside) {
            let operands: Vec<Value> = node.operands.iter().map(|v| map[v]).collect();
            let made = part.push_node(node.op.clone(), &operands, &node.location).expect("it was well-formed");
            map.extend(node.results.iter().copied().zip(made.results.iter().copied()));
        }
        let outside: HashSet<Value> =
            self.nodes.iter().filter(|node| !inside(node)).flat_map(|node| node.operands.iter().copied()).collect();
        for node in self.nodes.iter().filter(inside) {
            for result in &node.results {
                let name = self.outputs.iter().find(|(_, v)| v == result).map(|(name, _)| name.clone());
                let name = name.or_else(|| outside.contains(result).then(|| self.label(*result)));
                part.outputs.extend(name.map(|name| (name, map[result])));
            }
        }
        part
    }

    /// A name for `value` that no other value has: the variable's with its site, or its number.
    fn label(&self, value: Value) -> String {
        match self.def(value).map(|node| &node.location) {
            Some(Location { site, name, .. }) if !name.is_empty() && !site.is_empty() => {
                format!("{site}.{name}.{}", value.0)
            }
            Some(Location { name, .. }) if !name.is_empty() => format!("{name}.{}", value.0),
            _ => format!("value.{}", value.0),
        }
    }

    /// The output of this name.
    pub fn output(&self, name: &str) -> Option<Value> {
        self.outputs.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
    }

    /// The transitive dependents of `seeds`: these values and all values computed from them.
    pub fn dependents_of(&self, seeds: impl IntoIterator<Item = Value>) -> HashSet<Value> {
        let mut made: HashSet<Value> = seeds.into_iter().collect();
        for node in &self.nodes {
            if node.operands.iter().any(|v| made.contains(v)) {
                made.extend(&node.results);
            }
        }
        made
    }

    /// Checks the invariants of the graph: operands precede their uses, arities and types are those that [`Op::infer`]
    /// gives, the index of definitions is correct, and output names are unique.
    ///
    /// # Errors
    ///
    /// The first violation, with the operation and its location.
    pub fn verify(&self) -> Result<(), String> {
        let mut known = vec![false; self.types.len()];
        for arg in &self.args {
            known[arg.value.0 as usize] = true;
        }
        for (i, node) in self.nodes.iter().enumerate() {
            let at = |e: String| {
                let Location { file, line, column, .. } = &node.location;
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
                    return Err(at("the index of definitions does not point to it".into()));
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
