//! The checked model: names are resolved, methods are expanded at their sites, all shapes are known, and the set of
//! trainable tensors is decided. `--emit model` prints it, and all later stages start from it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

pub use crate::counterpart::ConfigValue;
use crate::counterpart::Counterpart;
use crate::graph::{Graph, Value};

pub use crate::recipe::{BatchSize, DecayScope, Every, Hyper, Optimizer, Phase, Precision, Recipe, Schedule};

/// A checked spec.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// The file stem of the spec.
    pub name: String,
    /// The backbone with its arguments.
    pub backbone: Backbone,
    /// All tensors of the model, in order of first use.
    pub params: Vec<Param>,
    /// The forward pass in its training form, with dropout and label smoothing. Its arguments are the inputs and the
    /// params; its outputs are `loss`, `logits` and all exposed values, such as `lambda.0`.
    pub graph: Graph,
    /// All method applications, in the order of the backbone's sites.
    pub applied: Vec<AppliedMethod>,
    /// The counterparts in Hugging Face PEFT of the applied methods that have one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub counterparts: Vec<Counterpart>,
    /// All projections `y = x W + b` of the backbone.
    pub projections: Vec<Projection>,
    /// The values that are saved after training in place of some trained tensors, by name. They are values of the graph
    /// that depend on weights alone.
    pub stored: Vec<(String, Value)>,
    /// The trained tensors that the stored values replace.
    pub replaced: Vec<String>,
    /// What the model is trained for: the format of the data.
    pub task: Task,
    /// The training recipe.
    pub train: Recipe,
    /// A hash of the equations. It is set only in the model of an artifact, whose `graph` is left out.
    #[serde(rename = "equations", default, skip_serializing_if = "String::is_empty")]
    pub equations_hash: String,
    /// A hash of the function that the model computes without dropout and label smoothing, set in the same case.
    #[serde(rename = "function", default)]
    pub function_hash: String,
}

impl Model {
    /// The method application that the tensor or stored value `name` belongs to. Tensors that all sites share belong to
    /// none.
    pub fn applied_to(&self, name: &str) -> Option<&AppliedMethod> {
        self.applied.iter().find(|a| name.strip_prefix(&a.path()).is_some_and(|rest| rest.starts_with('.')))
    }
}

/// The backbone of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Backbone {
    /// The name of the backbone's definition: `gpt2`.
    pub name: String,
    /// The keys of `config.json` that parameters name with `from "…"`, with the values of this spec's arguments.
    pub config: BTreeMap<String, ConfigValue>,
    /// The checkpoint rules, with the arguments substituted.
    pub checkpoint: Checkpoint,
    /// The maximum number of tokens of a sequence. Without it, memory is the only limit.
    #[serde(rename = "longest", default)]
    pub max_sequence_tokens: Option<u64>,
    /// The token id that positions do not count, from `positions skip id`: RoBERTa's padding token.
    #[serde(rename = "skipped", default)]
    pub position_skip_id: Option<u64>,
    /// The arguments that have no key in `config.json` and differ from their defaults.
    #[serde(rename = "beyond")]
    pub extra_args: BTreeMap<String, ConfigValue>,
}

/// The rules for the checkpoints that a backbone reads, from its `checkpoint` block.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The accepted values of `model_type` in `config.json`. Empty if the backbone names none.
    pub model_types: Vec<String>,
    /// The prefix of tensor names that base-model checkpoints omit: `transformer.`, `bert.`.
    pub prefix: String,
    /// The rules for keys of `config.json`. A key of a nested object is written with a dot:
    /// `rope_parameters.rope_theta`.
    pub keys: BTreeMap<String, KeyRule>,
    /// The rules for tensors that are not plain parameters of the graph.
    pub tensors: Vec<TensorRule>,
    /// The rules for GGUF files; `None` if the backbone has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gguf: Option<Gguf>,
}

/// The rules for GGUF files, from `gguf "…" { … }` in the `checkpoint` block.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gguf {
    /// The accepted values of the metadata key `general.architecture`.
    pub architectures: Vec<String>,
    /// The rules for metadata keys. [`KeyRule::Same`] refers to a key of `config.json`. A key of `config.json` that is
    /// [`KeyRule::Free`] here has no metadata key, and may be absent.
    pub keys: BTreeMap<String, KeyRule>,
    /// The rules for tensors, by their names in the file. [`TensorKind::Same`] refers to a name of the safetensors
    /// checkpoint.
    pub tensors: Vec<TensorRule>,
    /// The tensors whose rows have another order in the file.
    pub permuted: Vec<RowPermutation>,
}

/// The row order of the tensors whose name in the file matches the pattern.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RowPermutation {
    /// A tensor name in the file; `*` matches any part of a name.
    pub pattern: String,
    /// The shape to which the row axis of the file is reshaped.
    pub rows: Vec<u64>,
    /// The permutation: axis i of the model's rows is axis `axes[i]` of the file's.
    pub axes: Vec<usize>,
}

/// The rule for a key of `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum KeyRule {
    /// The key is an argument of the backbone. Its value is in [`Backbone::config`].
    Argument {
        /// The parameter of the backbone.
        name: String,
        /// The value that an absent key stands for.
        absent: Option<ConfigValue>,
    },
    /// The key has one of these values. An absent key stands for the first.
    Is {
        /// The accepted values.
        values: Vec<serde_json::Value>,
        /// What the backbone computes, for error messages.
        note: Option<String>,
    },
    /// The key does not affect what the backbone computes.
    Free,
    /// The key is an alias of this key.
    Same(String),
}

/// The rule for the tensors whose name matches the pattern.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorRule {
    /// A full tensor name; `*` matches any part of it.
    pub pattern: String,
    /// The kind of the tensors.
    pub is: TensorKind,
    /// A description of the tensors, or advice when they are missing, for error messages.
    pub note: Option<String>,
}

/// How tensors of a checkpoint are treated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TensorKind {
    /// The file may lack the tensor, which is then initialised; the graph may leave it unread.
    Optional,
    /// The tensor belongs to other models.
    Unused,
    /// The graph reads the tensor, so the file must hold it.
    Required,
    /// The name is an alias of this tensor.
    Same(String),
    /// The tensor is a buffer.
    Buffer(Buffer),
}

/// A tensor that does not train and whose values the backbone's definition determines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Buffer {
    /// `[1,1,n,n]` or `[n,n]`: 1 where the column is at or before the row, else 0.
    CausalMask,
    /// 0, 1, 2, …
    Positions,
    /// theta^(−2j/width) for j = 0 to width/2 − 1: the angular frequencies of rotary positions.
    Frequencies {
        /// The base.
        theta: f64,
        /// The width of a head.
        width: u64,
    },
    /// Every element is one of these numbers.
    Numbers(Vec<f64>),
}

/// The application of a method at one site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AppliedMethod {
    /// The name of the method.
    pub method: String,
    /// The path of the site, `layers.0.attention.q`. It is empty for the whole model.
    pub site: String,
    /// The arguments, including defaults.
    pub args: BTreeMap<String, ConfigValue>,
    /// The kind of site that the method's definition is for.
    #[serde(default)]
    pub kind: String,
    /// Variables of the site that the method's counterpart in PEFT refers to, such as the number of layers.
    #[serde(rename = "known", default, skip_serializing_if = "BTreeMap::is_empty")]
    pub model_values: BTreeMap<String, ConfigValue>,
    /// The reason why PEFT cannot represent the method at this site.
    #[serde(rename = "unlike", default, skip_serializing_if = "Option::is_none")]
    pub peft_obstacle: Option<String>,
}

impl AppliedMethod {
    /// The prefix of the names of the method's own tensors.
    pub fn path(&self) -> String {
        if self.site.is_empty() { self.method.clone() } else { format!("{}.{}", self.site, self.method) }
    }
}

/// A projection of a site, y = x W + b, which is recognised by its form in the graph. It may be some columns of a wider
/// projection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Projection {
    /// The path of the projection: `layers.0.attention.q`.
    pub path: String,
    /// The tensor that holds W, or that W is a part of.
    pub weight: String,
    /// Whether the tensor is stored as `[out,in]` rather than `[in,out]`.
    pub transposed: bool,
    /// The tensor that holds b.
    pub bias: Option<String>,
    /// The outputs `start..end` of the stored matrix, if it serves several projections.
    pub columns: Option<(u64, u64)>,
    /// The value x before any method changes it.
    pub input: Value,
    /// The value y after all methods.
    pub output: Value,
}

/// A tensor of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Param {
    /// The canonical name: Hugging Face's for tensors of the backbone, `layers.0.attention.q.lora.a` for methods.
    pub name: String,
    /// The length of each axis.
    pub shape: Vec<u64>,
    /// The initial values.
    pub init: Init,
    /// Which of its values train.
    pub trainable: Trainable,
    /// Where the tensor is declared.
    pub origin: Origin,
    /// Whether weight decay applies, as the recipe's `decays` decides.
    pub decay: bool,
    /// The tensor's own learning rate, which replaces the recipe's `lr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
}

impl Param {
    /// The number of values.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
    /// The ratio of the tensor's own learning rate to the recipe's, which holds at every step.
    pub fn lr_factor(&self, recipe: &Recipe) -> Option<f64> {
        self.lr.map(|lr| lr / recipe.lr)
    }
    /// The range of rows that train.
    pub fn trained_rows(&self) -> Option<(u64, u64)> {
        match self.trainable {
            Trainable::No => None,
            Trainable::All => Some((0, self.shape.first().copied().unwrap_or(1))),
            Trainable::Rows(start, end) => Some((start, end)),
        }
    }
    /// The shape of the rows that train.
    pub fn trained_shape(&self) -> Option<Vec<u64>> {
        let (start, end) = self.trained_rows()?;
        let mut shape = self.shape.clone();
        shape.iter_mut().take(1).for_each(|rows| *rows = end - start);
        Some(shape)
    }
    /// The number of values that train.
    pub fn trainable_elements(&self) -> u64 {
        self.trained_shape().map_or(0, |shape| shape.iter().product())
    }
}

/// The initial values of a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Init {
    /// Zeros.
    Zeros,
    /// Ones.
    Ones,
    /// The same number in every element.
    Fill {
        /// The number.
        value: f64,
    },
    /// N(0, std).
    Normal {
        /// The standard deviation.
        std: f64,
    },
    /// fmod(N(0,1), 2) · scale, the truncated normal of inducer-tuning.
    Truncated {
        /// The factor.
        scale: f64,
    },
    /// U(−bound, bound).
    Uniform {
        /// The bound.
        bound: f64,
    },
    /// A value of the graph that depends on other weights alone.
    Value(Value),
}

/// Which values of a tensor train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Trainable {
    /// None.
    No,
    /// All.
    All,
    /// The rows `start..end`, such as those of special tokens in an embedding.
    Rows(u64, u64),
}

/// The definition that declares a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Origin {
    /// The backbone.
    Backbone,
    /// A task head. Base checkpoints lack it, so that it starts from its initial values.
    Head,
    /// The method of this name.
    Method(String),
}

/// The task: what the data is and how it becomes token sequences and labels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// The name of the task.
    pub name: String,
    /// The maximum number of tokens of an example; longer examples are truncated.
    pub max_tokens: u64,
    /// Whether attention is not causal. The tokenizer then adds its special tokens around a text; for a causal model it
    /// does not.
    #[serde(rename = "enclosed", default)]
    pub bidirectional: bool,
    /// The kind of the task.
    pub kind: TaskKind,
}

impl Task {
    /// The special tokens that the task names. At most this many rows of the vocabulary are the task's own.
    pub fn special_tokens(&self) -> &[String] {
        match &self.kind {
            TaskKind::Generation { special, .. } => special,
            TaskKind::Text { end, .. } => end.as_slice(),
            _ => &[],
        }
    }
}

impl TaskKind {
    /// The kinds as a spec writes them.
    pub const KEYWORDS: [&str; 6] =
        ["generation", "chat", "text", "classification", "regression", "token_classification"];

    /// The kind as a spec writes it.
    pub fn keyword(&self) -> &'static str {
        match self {
            TaskKind::Generation { .. } => "generation",
            TaskKind::Chat => "chat",
            TaskKind::Text { .. } => "text",
            TaskKind::Classification { .. } => "classification",
            TaskKind::Regression { .. } => "regression",
            TaskKind::TokenClassification { .. } => "token_classification",
        }
    }

    /// The names of the classes of a classification.
    pub fn labels(&self) -> Option<&[String]> {
        match self {
            TaskKind::Classification { labels, .. } | TaskKind::TokenClassification { labels, .. } => Some(labels),
            _ => None,
        }
    }

    /// Whether the task predicts tokens with the backbone's own head. The other kinds have a task head.
    pub fn generates(&self) -> bool {
        matches!(self, TaskKind::Generation { .. } | TaskKind::Chat | TaskKind::Text { .. })
    }
}

/// The kinds of tasks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TaskKind {
    /// Text generation. `template` lays out a row as ids and token types, and the loss covers what follows `target`.
    Generation {
        /// The special tokens of the template. A token that the tokenizer knows keeps its id; the others are new and
        /// get the ids after the tokenizer's own, in this order.
        special: Vec<String>,
        /// The pieces of the template.
        template: Vec<Piece>,
        /// The piece of the template after which the loss begins, as the template writes it.
        target: String,
        /// Lists of the row that are iterated in step, with one example for each item. Without them a row is one
        /// example.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        each: Vec<String>,
        /// Whether the examples of a row share sequences where that leaves the loss of every example unchanged.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        pack: bool,
    },
    /// Conversations, which the checkpoint's chat template lays out. The loss covers the assistant's turns.
    Chat,
    /// Plain text. The loss covers all tokens but the first.
    Text {
        /// The column of the text; `None` for a column of a usual name.
        text: Option<String>,
        /// The token that ends a text, if one does.
        end: Option<String>,
    },
    /// One label for each text. `labels[i]` is the name of class i.
    Classification {
        /// The names of the classes.
        labels: Vec<String>,
        /// The columns of the data.
        #[serde(default, skip_serializing_if = "Columns::are_default")]
        columns: Columns,
    },
    /// One number for each text.
    Regression {
        /// The columns of the data.
        #[serde(default, skip_serializing_if = "Columns::are_default")]
        columns: Columns,
    },
    /// One label for each word. A row holds a list of words and a list of labels.
    TokenClassification {
        /// The names of the classes.
        labels: Vec<String>,
        /// The column of the words; `None` for a column of a usual name.
        tokens: Option<String>,
        /// The column of the labels; `None` for a column of a usual name.
        tags: Option<String>,
    },
}

/// The columns that a task names for its texts and labels. A text or label column that is `None` has one of the usual
/// names. Without `pair`, an example is a single text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns {
    /// The text, or the first text of a pair.
    pub text: Option<String>,
    /// The second text of a pair.
    pub pair: Option<String>,
    /// The label, or the number of a regression.
    pub label: Option<String>,
}

impl From<[Option<String>; 3]> for Columns {
    fn from([text, pair, label]: [Option<String>; 3]) -> Self {
        Columns { text, pair, label }
    }
}

impl Columns {
    /// Whether the task names no column.
    pub fn are_default(&self) -> bool {
        *self == Columns::default()
    }
}

/// A piece of a generation template such as
/// `<bos> (<subject> {subject} <property> {property} <object> {object})* <target> {text} <eos>`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Piece {
    /// A special token.
    Special(String),
    /// Literal text that all examples contain, `'Question: '`. It is tokenised separately.
    Literal(String),
    /// The value of a column of the row or, inside a repetition, of a field of the item.
    Field(String),
    /// `( … )*`: repeats for each item of the row's only list of objects, such as the triples of a WebNLG entry.
    Repeat(Vec<Piece>),
    /// `(turns: … )*`: repeats for each item of the list of objects in this column.
    Each(String, Vec<Piece>),
    /// `<bos> as <document>`: a special token that, like the tokens after it, has the token type of another special
    /// token.
    As(String, String),
    /// `{first 400 tokens of story}` or `(last 2 of turns: … )*`: some tokens of a field, or some items of a list.
    Cut(Extent, Box<Piece>),
}

/// A number of items to take, and from which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Extent {
    /// This many from the start.
    First(u64),
    /// This many from the end.
    Last(u64),
}

/// The name that a template gives to the item of a list in `each`: the last part of the list's name.
pub fn item_name(list: &str) -> &str {
    list.rsplit('.').next().unwrap_or(list)
}

/// The name that a template gives to the list of the items before the current one.
pub const EARLIER_ITEMS: &str = "before";

impl Extent {
    /// The range of indices that is taken of `length` items.
    pub fn range(self, length: usize) -> std::ops::Range<usize> {
        let least = |count: u64| usize::try_from(count).unwrap_or(usize::MAX).min(length);
        match self {
            Extent::First(count) => 0..least(count),
            Extent::Last(count) => length - least(count)..length,
        }
    }
}

/// As a template writes it: `first 400`.
impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Extent::First(count) => write!(f, "first {count}"),
            Extent::Last(count) => write!(f, "last {count}"),
        }
    }
}

impl Piece {
    /// Whether the piece differs between rows.
    pub fn varies(&self) -> bool {
        !matches!(self, Piece::Special(_) | Piece::Literal(_) | Piece::As(..))
    }

    /// A special token or literal text as a template writes it, which is the form in which a task names its `target`.
    /// `None` for other pieces.
    pub fn literal_source(&self) -> Option<String> {
        (!self.varies()).then(|| self.to_string())
    }
}

/// As a template writes it.
impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Piece::Special(token) => f.write_str(token),
            Piece::Literal(text) => {
                let escapes = [("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\t", "\\t")];
                let text = escapes.iter().fold(text.clone(), |text, (plain, escaped)| text.replace(plain, escaped));
                write!(f, "'{text}'")
            }
            Piece::Field(name) => write!(f, "{{{name}}}"),
            Piece::Repeat(pieces) => write!(f, "({})*", template_source(pieces)),
            Piece::Each(column, pieces) => write!(f, "({column}: {})*", template_source(pieces)),
            Piece::As(token, kind) => write!(f, "{token} as {kind}"),
            Piece::Cut(extent, piece) => match &**piece {
                Piece::Field(name) => write!(f, "{{{extent} tokens of {name}}}"),
                list => write!(f, "({extent} of {}", list.to_string().trim_start_matches('(')),
            },
        }
    }
}

/// The source text of a template.
pub fn template_source(template: &[Piece]) -> String {
    template.iter().map(Piece::to_string).collect::<Vec<_>>().join(" ")
}
