//! The syntax tree of one file: every node with its place, nothing resolved.
//!
//! Its textual form is JSON; [`Ast::from_json`] reads back what [`Ast::to_json`] writes.

use serde::{Deserialize, Serialize};

use crate::source::Span;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ast {
    pub items: Vec<Item>,
}

impl Ast {
    /// It builds a model. A file that only defines things is no spec: it is there to be imported.
    pub fn is_spec(&self) -> bool {
        self.items.iter().any(|item| matches!(item, Item::Model(_)))
    }
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a tree of plain data")
    }
    pub fn from_json(text: &str) -> Result<Ast, serde_json::Error> {
        serde_json::from_str(text)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Name {
    pub text: String,
    pub span: Span,
}

/// A string as written, without its quotes; `{…}` in it is not yet filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Text {
    pub text: String,
    /// With the quotes.
    pub span: Span,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Item {
    Import(Import),
    Backbone(BackboneDef),
    Method(MethodDef),
    Function(FunctionDef),
    Model(ModelDef),
    Tune(Tune),
    Task(Settings),
    Train(Settings),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Import {
    pub what: Imported,
    pub span: Span,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Imported {
    /// `backbones.gpt2`, of the library.
    Module(String),
    /// A file, relative to the importing one.
    File(String),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackboneDef {
    pub name: Name,
    pub params: Vec<ParamDef>,
    /// `for generation`, where the whole body is for that; otherwise its `for …` blocks say.
    pub purposes: Vec<Name>,
    /// What it says of the checkpoints that it reads.
    pub checkpoint: Vec<Entry>,
    pub body: Vec<Stmt>,
}

/// A line of a `checkpoint` block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// `model_type "bert"`
    ModelType(Vec<Text>),
    /// `prefix "bert."`
    Prefix(Text),
    /// `key "hidden_act" is "gelu", "the activation is gelu"`
    Key {
        names: Vec<Text>,
        rule: EntryRule,
        note: Option<Text>,
    },
    /// `tensor "cls.*" unused`
    Tensor {
        names: Vec<Text>,
        rule: EntryRule,
        note: Option<Text>,
    },
    /// `gguf "llama" { … }`: how GGUF files write the keys and tensors of these architectures.
    Gguf {
        architectures: Vec<Text>,
        entries: Vec<Entry>,
    },
    If {
        condition: Expr,
        then: Vec<Entry>,
        otherwise: Vec<Entry>,
    },
    /// `for classification { … }`
    ForTask {
        purposes: Vec<Name>,
        entries: Vec<Entry>,
    },
}

/// What an entry says of a key of `config.json`, or of a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryRule {
    /// One of these values.
    Is(Vec<Expr>),
    /// Another name of this key or tensor.
    Same(Text),
    /// `tensor "…" rows permute([heads, n, 2], [0, 2, 1])`: another name of this tensor, whose rows are those of the
    /// file as an array of the shape `rows`, with its axes in the order `axes`.
    Permuted { tensor: Text, rows: Expr, axes: Expr },
    /// A key without influence.
    Free,
    /// A tensor that the files or the graph may lack.
    Optional,
    /// A tensor of other models.
    Unused,
    /// A tensor of which the note says what to do when the files lack it.
    Required,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodDef {
    pub name: Name,
    pub params: Vec<ParamDef>,
    /// The kind of site it fits.
    pub kind: Name,
    /// The variables of the site it reads or rebinds.
    pub variables: Vec<Name>,
    pub body: Vec<Stmt>,
    /// What Hugging Face PEFT calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counterpart: Option<CounterpartDef>,
}

/// `counterpart "LORA" { … }`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CounterpartDef {
    pub peft_type: Text,
    pub lines: Vec<CounterpartLine>,
    pub span: Span,
}

/// A line of a counterpart; `key`, where it is a text, is one of `adapter_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CounterpartLine {
    /// `key "r" is rank or null except "rank_pattern", "…"`: one of these values; `patterns` is the key of values by
    /// module, `hint` the mend of a value that is none of them.
    Is { key: Text, values: Vec<Expr>, patterns: Option<Text>, hint: Option<Text> },
    /// `key "lora_dropout" free as dropout`: any value; an export writes `written`.
    Free { key: Text, written: Option<Expr> },
    /// `when "use_rslora" is true { alpha = alpha * sqrt(rank) }`
    When { key: Text, value: Expr, set: Vec<(Name, Expr)> },
    /// `tensor "lora_B.bias" [outputs] of k is alpha / rank * c if bias elsewhere 0`
    Tensor {
        name: Text,
        axes: Vec<Expr>,
        projection: Option<Name>,
        value: Expr,
        condition: Option<Name>,
        elsewhere: Option<Expr>,
    },
    /// `table "prompt_embeddings" is past_key, past_value`: the weights of all sites side by side.
    Table { name: Text, weights: Vec<Name> },
    /// `modules "feedforward_modules"`: this key lists the method's modules, too.
    Modules(Text),
    /// What must hold for PEFT to have the method.
    Require { condition: Expr, message: Text, hint: Option<Text> },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FunctionDef {
    pub name: Name,
    pub params: Vec<ParamDef>,
    pub body: Vec<Stmt>,
    pub span: Span,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParamDef {
    pub name: Name,
    /// `int`, `float`, `bool`, `string`, `tensor`.
    pub ty: Name,
    pub default: Option<Expr>,
    /// The key of Hugging Face's `config.json`.
    pub from: Option<Text>,
    /// What it counts as where the key is absent; the default where this is.
    pub absent: Option<Expr>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stmt {
    pub kind: StmtKind,
    pub span: Span,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StmtKind {
    Weight(WeightDef),
    If {
        condition: Expr,
        then: Vec<Stmt>,
        otherwise: Vec<Stmt>,
    },
    For {
        variable: Name,
        start: Expr,
        end: Expr,
        body: Vec<Stmt>,
    },
    /// `for classification or regression { … }`: what a backbone computes where the task is one of these.
    ForTask {
        purposes: Vec<Name>,
        body: Vec<Stmt>,
    },
    Site {
        kind: Name,
        path: Text,
        body: Vec<Stmt>,
    },
    Output {
        name: Name,
        value: Option<Expr>,
    },
    Expose {
        value: Expr,
        name: Text,
    },
    /// What is kept of weights when training is over.
    Store {
        value: Expr,
        name: Text,
    },
    After {
        variable: Name,
        body: Vec<Stmt>,
    },
    Return(Expr),
    Require {
        condition: Expr,
        message: Text,
        hint: Option<Text>,
    },
    /// `longest n`: a sequence has at most n tokens.
    Longest(Expr),
    /// `positions skip id`: tokens of this id are not counted.
    Skip(Expr),
    Train(Text),
    /// A rule of a method that is a mixture of others.
    Tune(TuneRule),
    Assign {
        name: Name,
        value: Expr,
        nested: Option<Nested>,
    },
}

/// `… as projection of h`: the assigned variable is a site of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Nested {
    pub kind: Name,
    pub of: Expr,
}

/// What stands before `weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mark {
    /// Of a task head.
    Head,
    /// One tensor for every place that declares it, by its name alone.
    Shared,
    /// A method's, and yet it does not train.
    Frozen,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightDef {
    pub marks: Vec<Mark>,
    pub name: Name,
    pub path: Text,
    pub shape: Vec<Expr>,
    pub shape_span: Span,
    pub init: Name,
    pub init_args: Vec<Arg>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelDef {
    pub backbone: Name,
    pub args: Vec<Arg>,
    pub span: Span,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tune {
    pub rules: Vec<TuneRule>,
    pub span: Span,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TuneRule {
    Sites {
        kind: Name,
        select: Select,
        apply: Vec<Apply>,
        span: Span,
    },
    /// A method on the whole model.
    Model(Apply),
    Rows {
        start: Expr,
        end: Expr,
        tensor: Text,
        span: Span,
    },
    /// `head trainable`, `head frozen`.
    Head {
        what: Name,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        rates: Vec<Rate>,
    },
    /// `train "*.query.bias"`: tensors of the backbone by name.
    Train(Text),
}

impl TuneRule {
    pub fn span(&self) -> Span {
        match self {
            TuneRule::Sites { span, .. } | TuneRule::Rows { span, .. } => *span,
            TuneRule::Model(apply) => apply.span,
            TuneRule::Head { what, .. } => what.span,
            TuneRule::Train(pattern) => pattern.span,
        }
    }
}

/// Which sites of a kind, counted from 0 in the order of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Select {
    Every,
    Only(Vec<Ordinal>),
    Except(Vec<Ordinal>),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ordinal {
    pub start: Expr,
    pub end: Option<Expr>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Apply {
    pub method: Name,
    pub args: Vec<Arg>,
    /// Nested sites: `on q, v`.
    pub targets: Vec<Name>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rates: Vec<Rate>,
    pub span: Span,
}

/// A learning rate beside that of the recipe: `lr: 2e-4`, or of one weight `lr of B: 3.2e-3`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    pub weight: Option<Name>,
    pub value: Expr,
    pub span: Span,
}

/// A `task` or `train` block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The task's name, or `train`.
    pub name: Name,
    pub entries: Vec<Setting>,
    /// The definition that the block names: that of `task webnlg` without braces, or of `train chen2022_glue`. Where the
    /// block is a definition itself, its own name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<Name>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    pub key: Name,
    pub value: Expr,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arg {
    pub name: Option<Name>,
    pub value: Expr,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Expr {
    pub kind: ExprKind,
    pub span: Span,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExprKind {
    Int(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Name(String),
    List(Vec<Expr>),
    Call {
        function: Name,
        args: Vec<Arg>,
    },
    Index {
        base: Box<Expr>,
        subscripts: Vec<Subscript>,
    },
    Negate(Box<Expr>),
    Not(Box<Expr>),
    Binary {
        op: BinaryOp,
        left: Box<Expr>,
        right: Box<Expr>,
    },
    /// `4096 tokens`: the value of a setting.
    Measured {
        number: Box<Expr>,
        unit: Name,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subscript {
    Slice { start: Option<Expr>, end: Option<Expr>, span: Span },
    At(Expr),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BinaryOp {
    #[serde(rename = "or")]
    Or,
    #[serde(rename = "and")]
    And,
    #[serde(rename = "==")]
    Equal,
    #[serde(rename = "!=")]
    Unequal,
    #[serde(rename = "<=")]
    AtMost,
    #[serde(rename = ">=")]
    AtLeast,
    #[serde(rename = "<")]
    Less,
    #[serde(rename = ">")]
    Greater,
    #[serde(rename = "+")]
    Add,
    #[serde(rename = "-")]
    Sub,
    #[serde(rename = "*")]
    Mul,
    #[serde(rename = "/")]
    Div,
    #[serde(rename = "%")]
    Rem,
    #[serde(rename = "@")]
    Matmul,
}

impl BinaryOp {
    pub fn symbol(self) -> &'static str {
        match self {
            BinaryOp::Or => "or",
            BinaryOp::And => "and",
            BinaryOp::Equal => "==",
            BinaryOp::Unequal => "!=",
            BinaryOp::AtMost => "<=",
            BinaryOp::AtLeast => ">=",
            BinaryOp::Less => "<",
            BinaryOp::Greater => ">",
            BinaryOp::Add => "+",
            BinaryOp::Sub => "-",
            BinaryOp::Mul => "*",
            BinaryOp::Div => "/",
            BinaryOp::Rem => "%",
            BinaryOp::Matmul => "@",
        }
    }

    pub fn from_symbol(symbol: &str) -> Option<BinaryOp> {
        use BinaryOp::*;
        [Or, And, Equal, Unequal, AtMost, AtLeast, Less, Greater, Add, Sub, Mul, Div, Rem, Matmul]
            .into_iter()
            .find(|op| op.symbol() == symbol)
    }
}
