//! The checked model: names resolved, methods expanded at their sites, every shape known, the
//! trainable set decided. It is what `--emit model` shows and what every later stage starts from.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

pub use crate::counterpart::ConfigValue;
use crate::counterpart::Counterpart;
use crate::graph::{Graph, Value};

pub use crate::recipe::{BatchSize, Decays, Every, Hyper, Optimizer, Phase, Precision, Recipe, Schedule};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// The spec's file stem.
    pub name: String,
    pub backbone: Backbone,
    /// Every tensor of the model, in order of first use.
    pub params: Vec<Param>,
    /// The forward pass in its training form: dropouts and label smoothing are in it, inputs and
    /// params are its arguments, `loss`, `logits` and everything exposed (`lambda.0`) its outputs.
    pub graph: Graph,
    /// Every method at every site, in the order in which the backbone has the sites.
    pub applied: Vec<Applied>,
    /// What the methods at work are in Hugging Face PEFT, those that are something there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub counterparts: Vec<Counterpart>,
    /// Every projection `y = x W + b` of the backbone.
    pub projections: Vec<Projection>,
    /// What is kept in place of some trained tensors when training is over: values of the graph that depend on
    /// weights alone, by name.
    pub stored: Vec<(String, Value)>,
    /// The tensors in whose place it is kept.
    pub replaced: Vec<String>,
    pub task: Task,
    pub train: Recipe,
    /// A hash of the equations. Only a model whose `graph` was left out has it: that of an artifact.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub equations: String,
    /// The same of the function that they compute when nothing trains: without dropout and smoothing.
    #[serde(default)]
    pub function: String,
}

impl Model {
    /// The method at work whose own tensor (or stored value) `name` is; none has what the sites share.
    pub fn applied_to(&self, name: &str) -> Option<&Applied> {
        self.applied.iter().find(|a| name.strip_prefix(&a.path()).is_some_and(|rest| rest.starts_with('.')))
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Backbone {
    pub name: String,
    /// `config.json` keys with the values this spec wants there, from `from "…"` in the backbone's file.
    pub config: BTreeMap<String, ConfigValue>,
    pub checkpoint: Checkpoint,
    /// The most tokens a sequence may have; without it, as many as memory holds.
    #[serde(default)]
    pub longest: Option<u64>,
    /// The token id that positions do not count, from `positions skip id`: RoBERTa's padding.
    #[serde(default)]
    pub skipped: Option<u64>,
    /// Arguments that `config.json` has no key for and that are not at their defaults.
    pub beyond: BTreeMap<String, ConfigValue>,
}

/// What a backbone's file says of the checkpoints that it reads, arguments filled in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Values of `model_type` in `config.json`; none where the backbone does not say.
    pub model_types: Vec<String>,
    /// What base-model checkpoints leave out in front of a tensor's name: `transformer.`, `bert.`.
    pub prefix: String,
    /// Keys of `config.json`. A key inside an object is written with a dot: `rope_parameters.rope_theta`.
    pub keys: BTreeMap<String, Key>,
    pub tensors: Vec<TensorRule>,
    /// How GGUF files write these checkpoints; `None` where the backbone does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gguf: Option<Gguf>,
}

/// How GGUF files write a backbone's checkpoints, from `gguf "…" { … }` in the `checkpoint` block.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gguf {
    /// Values of the metadata key `general.architecture`.
    pub architectures: Vec<String>,
    /// Metadata keys. [`Key::Same`] leads to a key of `config.json`. A key of `config.json` that is [`Key::Free`] here
    /// has no metadata key, and its absence says nothing.
    pub keys: BTreeMap<String, Key>,
    /// By the names in the file; [`Kind::Same`] leads to a name of the checkpoint in safetensors.
    pub tensors: Vec<TensorRule>,
    /// Tensors whose rows the file holds in another order.
    pub permuted: Vec<Permuted>,
}

/// The order in which a file holds the rows of tensors whose name in the file fits the pattern.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Permuted {
    pub pattern: String,
    /// The file's rows are an array of this shape.
    pub rows: Vec<u64>,
    /// Axis i of the model's rows is axis `axes[i]` of the file's.
    pub axes: Vec<usize>,
}

/// What a key of `config.json` has to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Key {
    /// It is an argument of the backbone, whose value is in [`Backbone::config`].
    Argument {
        name: String,
        /// What it counts as where the key is absent.
        absent: Option<ConfigValue>,
    },
    /// One of these values; the first where the key is absent.
    Is {
        values: Vec<serde_json::Value>,
        /// What the backbone computes.
        note: Option<String>,
    },
    /// Without influence on what the backbone computes.
    Free,
    /// Another name of this key.
    Same(String),
}

/// What tensors are whose name fits the pattern.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorRule {
    /// A full name, `*` for any part of it.
    pub pattern: String,
    pub is: Kind,
    /// What they are, or what to do about them.
    pub note: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Kind {
    /// The files may lack them, and then they are drawn; the graph may not read them.
    Optional,
    /// Parts of other models.
    Unused,
    /// The graph reads them.
    Required,
    /// Another name of the tensor that the pattern stands for.
    Same(String),
    Buffer(Buffer),
}

/// A tensor that does not train and whose values are known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Buffer {
    /// [1,1,n,n], or [n,n]: 1 where a column is not behind its row, else 0.
    CausalMask,
    /// 0, 1, 2, …
    Positions,
    /// theta^(−2j/width), j = 0 to width/2 − 1: the angles by which rotary positions turn.
    Frequencies { theta: f64, width: u64 },
    /// One of these numbers everywhere.
    Numbers(Vec<f64>),
}

/// A method at work at one site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Applied {
    pub method: String,
    /// The site's path, `layers.0.attention.q`; empty for the whole model.
    pub site: String,
    /// Its arguments, defaults filled in.
    pub args: BTreeMap<String, ConfigValue>,
    /// The kind of site that it is written for.
    #[serde(default)]
    pub kind: String,
    /// What else its counterpart in PEFT speaks of: numbers of the model, such as how many layers there are.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub known: BTreeMap<String, ConfigValue>,
    /// Why PEFT cannot hold it at this site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unlike: Option<String>,
}

impl Applied {
    /// What the names of its own tensors begin with.
    pub fn path(&self) -> String {
        if self.site.is_empty() { self.method.clone() } else { format!("{}.{}", self.site, self.method) }
    }
}

/// A projection of a site, found by its form in the graph: y = x W + b, perhaps some columns of a wider one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Projection {
    /// `layers.0.attention.q`
    pub path: String,
    /// The tensor W is, or lies in.
    pub weight: String,
    /// It is stored [out,in], not [in,out].
    pub transposed: bool,
    pub bias: Option<String>,
    /// Outputs `start..end` of the stored matrix, when it serves several projections.
    pub columns: Option<(u64, u64)>,
    /// x before a method touches it, and y when all methods are done.
    pub input: Value,
    pub output: Value,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Param {
    /// Canonical: Hugging Face's name for backbone tensors, `layers.0.attention.q.lora.a` for methods.
    pub name: String,
    pub shape: Vec<u64>,
    pub init: Init,
    pub trainable: Trainable,
    pub origin: Origin,
    /// Weight decay applies: the recipe's `decays` says to what.
    pub decay: bool,
    /// Its own learning rate, which stands in the place of the recipe's `lr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
}

impl Param {
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
    /// What its learning rate is of the recipe's at every step, if it has one of its own.
    pub fn lr_factor(&self, recipe: &Recipe) -> Option<f64> {
        self.lr.map(|lr| lr / recipe.lr)
    }
    /// Which of its rows train.
    pub fn trained_rows(&self) -> Option<(u64, u64)> {
        match self.trainable {
            Trainable::No => None,
            Trainable::All => Some((0, self.shape.first().copied().unwrap_or(1))),
            Trainable::Rows(start, end) => Some((start, end)),
        }
    }
    /// Its shape with no rows but those that train.
    pub fn trained_shape(&self) -> Option<Vec<u64>> {
        let (start, end) = self.trained_rows()?;
        let mut shape = self.shape.clone();
        shape.iter_mut().take(1).for_each(|rows| *rows = end - start);
        Some(shape)
    }
    /// How many of its values train.
    pub fn trainable_elements(&self) -> u64 {
        self.trained_shape().map_or(0, |shape| shape.iter().product())
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Init {
    Zeros,
    Ones,
    /// The same number everywhere.
    Fill {
        value: f64,
    },
    /// N(0, std).
    Normal {
        std: f64,
    },
    /// fmod(N(0,1), 2) · scale, the inducer's TN.
    Truncated {
        scale: f64,
    },
    /// U(−bound, bound).
    Uniform {
        bound: f64,
    },
    /// A value of the graph that depends on other weights alone.
    Value(Value),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Trainable {
    No,
    All,
    /// Rows `start..end` only: special tokens of an embedding.
    Rows(u64, u64),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Origin {
    Backbone,
    /// A task head: absent from base checkpoints, then drawn from `init`.
    Head,
    /// Written by this method.
    Method(String),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    pub name: String,
    /// Longer examples are cut to this many tokens.
    pub max_tokens: u64,
    /// The model sees a text as a whole, between the marks that the tokenizer puts around it; a causal one does without.
    #[serde(default)]
    pub enclosed: bool,
    pub kind: TaskKind,
}

impl Task {
    /// Tokens that the task uses by name; at most as many rows of a vocabulary are its own.
    pub fn special(&self) -> &[String] {
        match &self.kind {
            TaskKind::Generation { special, .. } => special,
            TaskKind::Text { end, .. } => end.as_slice(),
            _ => &[],
        }
    }
}

impl TaskKind {
    /// As a spec writes them.
    pub const WORDS: [&str; 6] = ["generation", "chat", "text", "classification", "regression", "token_classification"];

    pub fn word(&self) -> &'static str {
        match self {
            TaskKind::Generation { .. } => "generation",
            TaskKind::Chat => "chat",
            TaskKind::Text { .. } => "text",
            TaskKind::Classification { .. } => "classification",
            TaskKind::Regression { .. } => "regression",
            TaskKind::TokenClassification { .. } => "token_classification",
        }
    }

    /// The names of the classes, if it asks for some.
    pub fn labels(&self) -> Option<&[String]> {
        match self {
            TaskKind::Classification { labels, .. } | TaskKind::TokenClassification { labels, .. } => Some(labels),
            _ => None,
        }
    }

    /// It asks for the tokens of texts, which the backbone's own head gives; otherwise for what a head of the task gives.
    pub fn generates(&self) -> bool {
        matches!(self, TaskKind::Generation { .. } | TaskKind::Chat | TaskKind::Text { .. })
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TaskKind {
    /// Text from rows: `template` is laid out as ids and token types, loss on what follows `target`.
    Generation {
        /// Tokens that the template uses. One that the tokenizer has keeps its id; the others are new, and have the ids
        /// behind the tokenizer's own, in this order.
        special: Vec<String>,
        template: Vec<Piece>,
        /// The piece of the template, as it is written there, after which the loss begins.
        target: String,
        /// Lists of the row, one example for each of their items, which go in step; an example a row without one.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        each: Vec<String>,
        /// The examples of one row share sequences wherever that leaves every loss what it is.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        pack: bool,
    },
    /// Conversations, laid out by the checkpoint's own chat template; loss on what the assistant says.
    Chat,
    /// Texts as they stand, loss on every token but the first.
    Text {
        /// Its column; `None` if it has a usual name.
        text: Option<String>,
        /// The token that closes a text, if one does.
        end: Option<String>,
    },
    /// One label a text; `labels[i]` is class i.
    Classification {
        labels: Vec<String>,
        #[serde(default, skip_serializing_if = "Columns::are_usual")]
        columns: Columns,
    },
    /// One number a text.
    Regression {
        #[serde(default, skip_serializing_if = "Columns::are_usual")]
        columns: Columns,
    },
    /// One label a word: a row holds a list of words and one of labels.
    TokenClassification {
        labels: Vec<String>,
        /// The column of the words, and that of their labels; `None` if it has a usual name.
        tokens: Option<String>,
        tags: Option<String>,
    },
}

/// The columns of a text or a pair of texts, and of what is asked of them, that the task names. A text or label column that is `None` has one of the usual
/// names; without `pair` an example is one text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns {
    pub text: Option<String>,
    /// The second text of a pair.
    pub pair: Option<String>,
    pub label: Option<String>,
}

impl From<[Option<String>; 3]> for Columns {
    fn from([text, pair, label]: [Option<String>; 3]) -> Self {
        Columns { text, pair, label }
    }
}

impl Columns {
    /// The task names no column.
    pub fn are_usual(&self) -> bool {
        *self == Columns::default()
    }
}

/// A piece of a generation template such as
/// `<bos> (<subject> {subject} <property> {property} <object> {object})* <target> {text} <eos>`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Piece {
    Special(String),
    /// Text that stands in every example, `'Question: '`, tokenised by itself.
    Literal(String),
    /// The value of a column of the row, or of a field of an item inside a repetition.
    Field(String),
    /// `( … )*`: once for each item of the row's only list of objects, such as the triples of a WebNLG entry.
    Repeat(Vec<Piece>),
    /// `(turns: … )*`: once for each item of the list of objects in this column.
    Each(String, Vec<Piece>),
    /// `<bos> as <document>`: a special token that has the type of another one, as has what follows it.
    As(String, String),
    /// `{first 400 tokens of story}`, `(last 2 of turns: … )*`: of a field some tokens, of a list some items.
    Cut(Extent, Box<Piece>),
}

/// How much is taken, from which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Extent {
    First(u64),
    Last(u64),
}

/// What the item of a list is called in a template whose task has it in `each`: the last part of the list's name.
pub fn item_name(list: &str) -> &str {
    list.rsplit('.').next().unwrap_or(list)
}

/// What the items before it are called.
pub const BEFORE: &str = "before";

impl Extent {
    /// Where of `length` things those begin and end that are taken.
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
    /// It differs from row to row.
    pub fn varies(&self) -> bool {
        !matches!(self, Piece::Special(_) | Piece::Literal(_) | Piece::As(..))
    }

    /// A special token or a literal text as a template writes it: what the task's `target` names.
    pub fn written(&self) -> Option<String> {
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
            Piece::Repeat(pieces) => write!(f, "({})*", written(pieces)),
            Piece::Each(column, pieces) => write!(f, "({column}: {})*", written(pieces)),
            Piece::As(token, kind) => write!(f, "{token} as {kind}"),
            Piece::Cut(extent, piece) => match &**piece {
                Piece::Field(name) => write!(f, "{{{extent} tokens of {name}}}"),
                list => write!(f, "({extent} of {}", list.to_string().trim_start_matches('(')),
            },
        }
    }
}

/// A template as it is written.
pub fn written(template: &[Piece]) -> String {
    template.iter().map(Piece::to_string).collect::<Vec<_>>().join(" ")
}
