//! What an expression is worth: numbers and words are known here, tensors when the graph runs.

use crate::graph::{Dim, Graph, Value};
use crate::model::ConfigValue;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Val {
    Int(i64),
    Float(f64),
    Bool(bool),
    Str(String),
    /// An axis whose length a batch brings: `tokens`.
    Dim(Dim),
    List(Vec<Val>),
    Tensor(Value),
    /// Of something reported already; nothing more is said about it.
    Unknown,
}

impl Val {
    /// A number, whole or not.
    pub fn number(&self) -> Option<f64> {
        match self {
            Val::Int(n) => Some(*n as f64),
            Val::Float(x) => Some(*x),
            _ => None,
        }
    }

    /// As a model keeps it.
    pub fn config(&self) -> Option<ConfigValue> {
        match self {
            Val::Int(n) => Some(ConfigValue::Int(*n)),
            Val::Float(x) => Some(ConfigValue::Float(*x)),
            Val::Bool(b) => Some(ConfigValue::Bool(*b)),
            Val::Str(s) => Some(ConfigValue::Str(s.clone())),
            _ => None,
        }
    }

    /// For messages: `12 (an int)`.
    pub fn describe(&self, graph: &Graph) -> String {
        match self {
            Val::Int(n) => format!("{n} (an int)"),
            Val::Float(x) => format!("{x:?} (a float)"),
            Val::Bool(b) => format!("{b} (a bool)"),
            Val::Str(s) => format!("\"{s}\" (a string)"),
            Val::Dim(d) => format!("`{d}` (an axis)"),
            Val::List(_) => "a list".into(),
            Val::Tensor(t) => format!("a tensor {}", graph.ty(*t)),
            Val::Unknown => "something unknown".into(),
        }
    }

    /// As it reads inside a name or a message.
    pub fn plain(&self) -> Option<String> {
        match self {
            Val::Int(n) => Some(n.to_string()),
            Val::Float(x) => Some(x.to_string()),
            Val::Bool(b) => Some(b.to_string()),
            Val::Str(s) => Some(s.clone()),
            Val::Dim(d) => Some(d.to_string()),
            Val::List(_) | Val::Tensor(_) | Val::Unknown => None,
        }
    }
}
