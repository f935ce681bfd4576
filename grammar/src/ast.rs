//! The syntax tree of one file. Every node carries its span; names are not resolved.
//!
//! The textual form is JSON: [`Ast::from_json`] reads what [`Ast::to_json`] writes.

use serde::{Deserialize, Serialize};

use crate::source::Span;

/// The items of one file, in source order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ast {
    /// Imports, definitions and blocks.
    pub items: Vec<Item>,
}

impl Ast {
    /// Whether the file builds a model. A file without `model = …` only defines things for other files to import.
    pub fn is_spec(&self) -> bool {
        self.items.iter().any(|item| matches!(item, Item::Model(_)))
    }
    /// The tree as indented JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a tree of plain data")
    }
    /// Reads the JSON of [`Ast::to_json`].
    ///
    /// # Errors
    ///
    /// The text is not JSON, or the JSON is not a syntax tree.
    pub fn from_json(text: &str) -> Result<Ast, serde_json::Error> {
        serde_json::from_str(text)
    }
}

/// An identifier.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Name {
    /// The identifier as it is written.
    pub text: String,
    /// Where it is written.
    pub span: Span,
}

/// A string literal without its quotes. `{name}` interpolations are not yet replaced.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Text {
    /// The characters between the quotes.
    pub text: String,
    /// The place of the literal, quotes included.
    pub span: Span,
}

/// A top-level construct of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Item {
    /// `import backbones.gpt2` or `import "own.peft"`.
    Import(Import),
    /// `backbone gpt2(…) { … }`.
    Backbone(BackboneDef),
    /// `method lora(…) on projection(x, y) { … }`.
    Method(MethodDef),
    /// `fn linear(…) { … }`.
    Function(FunctionDef),
    /// `model = gpt2(…)`.
    Model(ModelDef),
    /// `tune { … }`.
    Tune(Tune),
    /// `task webnlg { … }`, or `task webnlg` for a task that is defined elsewhere.
    Task(Settings),
    /// `train { … }`, or `train chen2022_glue { … }` for a named recipe.
    Train(Settings),
}

/// An `import` item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Import {
    /// What is imported.
    pub what: Imported,
    /// Where the item is written.
    pub span: Span,
}

/// The target of an import.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Imported {
    /// A module of the library, such as `backbones.gpt2`.
    Module(String),
    /// The path of a file, relative to the importing file.
    File(String),
}

/// A backbone: a model family with its parameters, checkpoint rules and equations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackboneDef {
    /// The name that `model = …` refers to.
    pub name: Name,
    /// The parameters, in order.
    pub params: Vec<ParamDef>,
    /// The task kinds of a header such as `for generation`. Without a header, the `for …` blocks in the body name them.
    pub purposes: Vec<Name>,
    /// The entries of the `checkpoint` block: which checkpoints the backbone reads, and how.
    pub checkpoint: Vec<CheckpointEntry>,
    /// The statements that build the graph.
    pub body: Vec<Stmt>,
}

/// An entry of a `checkpoint` block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointEntry {
    /// `model_type "bert"`: accepted values of `model_type` in `config.json`.
    ModelType(Vec<Text>),
    /// `prefix "bert."`: the prefix of tensor names that base-model checkpoints omit.
    Prefix(Text),
    /// `key "hidden_act" is "gelu", "the activation is gelu"`
    Key {
        /// Keys of `config.json`, or metadata keys inside a `gguf` block.
        names: Vec<Text>,
        /// What the keys may contain.
        rule: EntryRule,
        /// An explanation for error messages.
        note: Option<Text>,
    },
    /// `tensor "cls.*" unused`
    Tensor {
        /// Tensor names; `*` matches any part of a name.
        names: Vec<Text>,
        /// How tensors of these names are treated.
        rule: EntryRule,
        /// An explanation for error messages.
        note: Option<Text>,
    },
    /// `gguf "llama" { … }`: how GGUF files of these architectures name the keys and tensors.
    Gguf {
        /// Values of the metadata key `general.architecture`.
        architectures: Vec<Text>,
        /// The entries of the block.
        entries: Vec<CheckpointEntry>,
    },
    /// `if condition { … } else { … }`
    If {
        /// A condition on the backbone's arguments.
        condition: Expr,
        /// The entries where the condition holds.
        then: Vec<CheckpointEntry>,
        /// The entries where it does not hold.
        otherwise: Vec<CheckpointEntry>,
    },
    /// `for classification { … }`: entries for some task kinds only.
    ForTask {
        /// The task kinds.
        purposes: Vec<Name>,
        /// The entries of the block.
        entries: Vec<CheckpointEntry>,
    },
}

/// The rule of an entry for a key of `config.json` or for a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryRule {
    /// `is a or b`: the value is one of these, or the tensor is this buffer.
    Is(Vec<Expr>),
    /// `is key "…"` or `is tensor "…"`: an alias of this key or tensor.
    Same(Text),
    /// `is tensor "…" rows permute([heads, n, 2], [0, 2, 1])`: an alias of a tensor whose rows have another order in
    /// the file.
    Permuted {
        /// The name of the tensor in safetensors.
        tensor: Text,
        /// The shape to which the row axis of the file is reshaped.
        rows: Expr,
        /// The permutation: axis i of the model's rows is axis `axes[i]` of the file's.
        axes: Expr,
    },
    /// `free`: a key whose value does not affect what the backbone computes.
    Free,
    /// `optional`: a tensor that the file or the graph may lack.
    Optional,
    /// `unused`: a tensor that belongs to other models.
    Unused,
    /// `required`: a tensor that must exist; the note explains what to do when a file lacks it.
    Required,
}

/// A fine-tuning method for one kind of site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodDef {
    /// The name that the `tune` block refers to.
    pub name: Name,
    /// The parameters, in order.
    pub params: Vec<ParamDef>,
    /// The kind of site: `attention`, `ffn`, `projection` or `model`.
    pub kind: Name,
    /// The variables of the site that the method reads or rebinds.
    pub variables: Vec<Name>,
    /// The statements: weights, `after` blocks and, for a mixture, rules.
    pub body: Vec<Stmt>,
    /// The equivalent method in Hugging Face PEFT.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counterpart: Option<CounterpartDef>,
}

/// `counterpart "LORA" { … }`: how the method maps to Hugging Face PEFT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CounterpartDef {
    /// The value of `peft_type` in `adapter_config.json`.
    pub peft_type: Text,
    /// The lines of the block.
    pub lines: Vec<CounterpartLine>,
    /// Where the block is written.
    pub span: Span,
}

/// A line of a `counterpart` block. Fields named `key` are keys of `adapter_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CounterpartLine {
    /// `key "r" is rank or null except "rank_pattern", "…"`: the key has one of these values.
    Is {
        /// The key.
        key: Text,
        /// The accepted values; an export writes the first.
        values: Vec<Expr>,
        /// The key that holds other values by module.
        patterns: Option<Text>,
        /// The advice of the error for any other value.
        hint: Option<Text>,
    },
    /// `key "lora_dropout" free as dropout`: the key may have any value.
    Free {
        /// The key.
        key: Text,
        /// The value that an export writes.
        written: Option<Expr>,
    },
    /// `when "use_rslora" is true { alpha = alpha * sqrt(rank) }`: assignments that apply when the key has the value.
    When {
        /// The key.
        key: Text,
        /// The value that triggers the assignments.
        value: Expr,
        /// The assigned parameters of PEFT, or `W`, with their new values.
        set: Vec<(Name, Expr)>,
    },
    /// `tensor "lora_B.bias" [outputs] of k is alpha / rank * c if bias elsewhere 0`: a tensor of an adapter file.
    Tensor {
        /// The name after the module's: `lora_B.bias`.
        name: Text,
        /// The axes of the tensor.
        axes: Vec<Expr>,
        /// The projection of the site that the tensor belongs to.
        projection: Option<Name>,
        /// The weight, or a number times the weight.
        value: Expr,
        /// A `bool` parameter; the tensor exists only where it is true.
        condition: Option<Name>,
        /// The value at outputs of a fused matrix that no method changes.
        elsewhere: Option<Expr>,
    },
    /// `table "prompt_embeddings" is past_key, past_value`: one tensor that concatenates the weights of all sites.
    Table {
        /// The name of the tensor.
        name: Text,
        /// The weights of each site, in order.
        weights: Vec<Name>,
    },
    /// `modules "feedforward_modules"`: another key, besides `target_modules`, that lists the method's modules.
    Modules(Text),
    /// `require condition, "message", "hint"`: a condition without which PEFT cannot represent the method.
    Require {
        /// The condition.
        condition: Expr,
        /// The message of the error when it does not hold.
        message: Text,
        /// The advice of that error.
        hint: Option<Text>,
    },
}

/// A function of the language.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FunctionDef {
    /// The name that calls refer to.
    pub name: Name,
    /// The parameters, in order.
    pub params: Vec<ParamDef>,
    /// The statements, with a `return`.
    pub body: Vec<Stmt>,
    /// Where the definition is written.
    pub span: Span,
}

/// A parameter of a backbone, method or function.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParamDef {
    /// Its name.
    pub name: Name,
    /// Its type: `int`, `float`, `bool`, `string` or `tensor`.
    pub ty: Name,
    /// The value where the caller passes none.
    pub default: Option<Expr>,
    /// The key of Hugging Face's `config.json` that holds the value.
    pub from: Option<Text>,
    /// The value that an absent key stands for; without it, the default.
    pub absent: Option<Expr>,
}

/// A statement with its span.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stmt {
    /// The statement.
    pub kind: StmtKind,
    /// Where it is written.
    pub span: Span,
}

/// The kinds of statements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StmtKind {
    /// `weight A "a": [rank, n] ~ zeros`
    Weight(WeightDef),
    /// `if condition { … } else { … }`
    If {
        /// A condition that is known at compile time.
        condition: Expr,
        /// The statements where it holds.
        then: Vec<Stmt>,
        /// The statements where it does not hold.
        otherwise: Vec<Stmt>,
    },
    /// `for i in start..end { … }`: a loop that is unrolled at compile time.
    For {
        /// The loop variable.
        variable: Name,
        /// The first value.
        start: Expr,
        /// The exclusive upper bound.
        end: Expr,
        /// The statements of one iteration.
        body: Vec<Stmt>,
    },
    /// `for classification or regression { … }`: statements of a backbone for some task kinds only.
    ForTask {
        /// The task kinds.
        purposes: Vec<Name>,
        /// The statements.
        body: Vec<Stmt>,
    },
    /// `site attention at "layers.{layer}.attention" { … }`: a place where methods can be applied.
    Site {
        /// The kind of site.
        kind: Name,
        /// The path of the site, with interpolations.
        path: Text,
        /// The statements of the site.
        body: Vec<Stmt>,
    },
    /// `output loss = …`, or `output logits` for a variable of that name.
    Output {
        /// The name of the output.
        name: Name,
        /// The value; without it, the variable `name`.
        value: Option<Expr>,
    },
    /// `expose … as "lambda.{layer}"`: an additional output of the graph.
    Expose {
        /// The exposed value.
        value: Expr,
        /// The name of the output, with interpolations.
        name: Text,
    },
    /// `store … as "…"`: what a method keeps in place of its weights when training is over.
    Store {
        /// The stored value.
        value: Expr,
        /// Its name below the method's path.
        name: Text,
    },
    /// `after y { … }`: statements that run when the site has assigned the variable.
    After {
        /// The variable of the site.
        variable: Name,
        /// The statements.
        body: Vec<Stmt>,
    },
    /// `return …`
    Return(Expr),
    /// `require condition, "message", "hint"`: a compile-time check.
    Require {
        /// The condition.
        condition: Expr,
        /// The message of the error when it does not hold.
        message: Text,
        /// The advice of that error.
        hint: Option<Text>,
    },
    /// `longest n`: a sequence has at most n tokens.
    Longest(Expr),
    /// `positions skip id`: tokens with this id are not counted by positions.
    Skip(Expr),
    /// `train "*.bias"`: the tensors of the backbone that match the pattern train.
    Train(Text),
    /// A rule by which a mixture applies other methods.
    Tune(TuneRule),
    /// `y = …`, or `y = … as projection of h`.
    Assign {
        /// The assigned variable.
        name: Name,
        /// Its value.
        value: Expr,
        /// The nested site that the assignment declares.
        nested: Option<Nested>,
    },
}

/// `… as projection of h`: the assigned variable is the output of a nested site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Nested {
    /// The kind of the nested site: `projection`.
    pub kind: Name,
    /// The input of the nested site.
    pub of: Expr,
}

/// A modifier of a `weight` statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightMark {
    /// `head`: the weight belongs to a task head.
    Head,
    /// `shared`: all sites share one tensor, which is identified by its path alone.
    Shared,
    /// `frozen`: a weight of a method that does not train.
    Frozen,
}

/// A `weight` statement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightDef {
    /// The modifiers before `weight`.
    pub marks: Vec<WeightMark>,
    /// The variable that holds the weight.
    pub name: Name,
    /// The path of the tensor below its owner, with interpolations.
    pub path: Text,
    /// The length of each axis.
    pub shape: Vec<Expr>,
    /// Where the shape is written.
    pub shape_span: Span,
    /// The initialiser: `zeros`, `ones`, `fill`, `normal`, `truncated`, `uniform` or `value`.
    pub init: Name,
    /// The arguments of the initialiser.
    pub init_args: Vec<Arg>,
}

/// The item `model = gpt2(layers: 12)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelDef {
    /// The backbone.
    pub backbone: Name,
    /// Its arguments.
    pub args: Vec<Arg>,
    /// Where the item is written.
    pub span: Span,
}

/// A `tune` block: what trains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tune {
    /// The rules, in order.
    pub rules: Vec<TuneRule>,
    /// Where the block is written.
    pub span: Span,
}

/// A rule of a `tune` block or of a mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TuneRule {
    /// `every attention { … }` or `layers 0..6 ffn { … }`: methods for sites of one kind.
    Sites {
        /// The kind of site.
        kind: Name,
        /// Which sites of that kind.
        select: Select,
        /// The methods applied there.
        apply: Vec<Apply>,
        /// Where the selector is written.
        span: Span,
    },
    /// A method that applies to the whole model.
    Model(Apply),
    /// `rows 0..3 of "…"`: a range of rows of a backbone tensor trains.
    Rows {
        /// The first row.
        start: Expr,
        /// The exclusive last row.
        end: Expr,
        /// The name of the tensor.
        tensor: Text,
        /// Where the rule is written.
        span: Span,
    },
    /// `head trainable` or `head frozen`.
    Head {
        /// `trainable` or `frozen`.
        what: Name,
        /// The learning rates of the head.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        rates: Vec<Rate>,
    },
    /// `train "*.query.bias"`: the tensors of the backbone that match the pattern train.
    Train(Text),
}

impl TuneRule {
    /// Where the rule is written.
    pub fn span(&self) -> Span {
        match self {
            TuneRule::Sites { span, .. } | TuneRule::Rows { span, .. } => *span,
            TuneRule::Model(apply) => apply.span,
            TuneRule::Head { what, .. } => what.span,
            TuneRule::Train(pattern) => pattern.span,
        }
    }
}

/// A selection among the sites of one kind, which are numbered from 0 in model order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Select {
    /// All sites.
    Every,
    /// Only these sites.
    Only(Vec<Ordinal>),
    /// All sites but these.
    Except(Vec<Ordinal>),
}

/// A site number `start`, or a range `start..end`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ordinal {
    /// The number, or the first of the range.
    pub start: Expr,
    /// The exclusive end of the range.
    pub end: Option<Expr>,
}

/// The application of a method: `lora(rank: 4) on q, v { lr: 1e-3 }`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Apply {
    /// The method.
    pub method: Name,
    /// Its arguments.
    pub args: Vec<Arg>,
    /// The projections of the site that it applies to: `on q, v`. Empty for a method on the site itself.
    pub targets: Vec<Name>,
    /// The learning rates of its weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rates: Vec<Rate>,
    /// Where the application is written.
    pub span: Span,
}

/// A learning rate other than the recipe's: `lr: 2e-4` for a whole application, `lr of B: 3.2e-3` for one weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// The weight; without it, all weights of the application.
    pub weight: Option<Name>,
    /// The learning rate.
    pub value: Expr,
    /// Where the rate is written.
    pub span: Span,
}

/// A `task` or `train` block, or the definition of a task or recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The name of the task, or `train`.
    pub name: Name,
    /// The settings, in order.
    pub entries: Vec<Setting>,
    /// The definition that the block refers to, as in `task webnlg` without braces or `train chen2022_glue`. In the
    /// definition of a recipe, the recipe's own name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<Name>,
}

/// `key: value` in a `task` or `train` block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// The setting.
    pub key: Name,
    /// Its value.
    pub value: Expr,
}

/// An argument of a call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arg {
    /// The parameter; `None` for a positional argument.
    pub name: Option<Name>,
    /// The value.
    pub value: Expr,
}

/// An expression with its span.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Expr {
    /// The expression.
    pub kind: ExprKind,
    /// Where it is written.
    pub span: Span,
}

/// The kinds of expressions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExprKind {
    /// An integer literal.
    Int(i64),
    /// A floating-point literal.
    Float(f64),
    /// `true` or `false`.
    Bool(bool),
    /// A string literal without its quotes.
    String(String),
    /// A variable.
    Name(String),
    /// `[a, b]`
    List(Vec<Expr>),
    /// `function(a, name: b)`
    Call {
        /// The function.
        function: Name,
        /// Its arguments.
        args: Vec<Arg>,
    },
    /// `base[a:b, :]` or `table[ids]`
    Index {
        /// The indexed expression.
        base: Box<Expr>,
        /// The subscripts, one for each axis.
        subscripts: Vec<Subscript>,
    },
    /// `-x`
    Negate(Box<Expr>),
    /// `not x`
    Not(Box<Expr>),
    /// `left op right`
    Binary {
        /// The operator.
        op: BinaryOp,
        /// The left operand.
        left: Box<Expr>,
        /// The right operand.
        right: Box<Expr>,
    },
    /// `4096 tokens`: a number with a unit, as a setting may have.
    Measured {
        /// The number.
        number: Box<Expr>,
        /// The unit.
        unit: Name,
    },
}

/// A subscript of an index expression.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subscript {
    /// `start:end`, or `:` for the whole axis.
    Slice {
        /// The first index; without it, 0.
        start: Option<Expr>,
        /// The exclusive end; without it, the length of the axis.
        end: Option<Expr>,
        /// Where the slice is written.
        span: Span,
    },
    /// An expression: a tensor of row numbers.
    At(Expr),
}

/// The binary operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BinaryOp {
    /// Logical or.
    #[serde(rename = "or")]
    Or,
    /// Logical and.
    #[serde(rename = "and")]
    And,
    /// Equality.
    #[serde(rename = "==")]
    Equal,
    /// Inequality.
    #[serde(rename = "!=")]
    Unequal,
    /// Less than or equal.
    #[serde(rename = "<=")]
    AtMost,
    /// Greater than or equal.
    #[serde(rename = ">=")]
    AtLeast,
    /// Less than.
    #[serde(rename = "<")]
    Less,
    /// Greater than.
    #[serde(rename = ">")]
    Greater,
    /// Addition.
    #[serde(rename = "+")]
    Add,
    /// Subtraction.
    #[serde(rename = "-")]
    Sub,
    /// Elementwise multiplication.
    #[serde(rename = "*")]
    Mul,
    /// Division.
    #[serde(rename = "/")]
    Div,
    /// Remainder.
    #[serde(rename = "%")]
    Rem,
    /// Matrix multiplication.
    #[serde(rename = "@")]
    Matmul,
}

impl BinaryOp {
    /// The operator as it is written.
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

    /// The operator that is written as `symbol`.
    pub fn from_symbol(symbol: &str) -> Option<BinaryOp> {
        use BinaryOp::*;
        [Or, And, Equal, Unequal, AtMost, AtLeast, Less, Greater, Add, Sub, Mul, Div, Rem, Matmul]
            .into_iter()
            .find(|op| op.symbol() == symbol)
    }
}
