//! The value of an expression at compile time. Numbers and strings are known; a tensor is a value of the graph.

use crate::graph::{Dim, Graph, Value};
use crate::model::ConfigValue;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Val {
    Int(i64),
    Float(f64),
    Bool(bool),
    Str(String),
    /// The symbolic length of an axis, such as `tokens`.
    Dim(Dim),
    List(Vec<Val>),
    Tensor(Value),
    /// The result of an error that has been reported. Uses of it report nothing.
    Unknown,
}

impl Val {
    /// The value of an integer or a float.
    pub fn number(&self) -> Option<f64> {
        match self {
            Val::Int(n) => Some(*n as f64),
            Val::Float(x) => Some(*x),
            _ => None,
        }
    }

    /// The value as the model stores it.
    pub fn config(&self) -> Option<ConfigValue> {
        match self {
            Val::Int(n) => Some(ConfigValue::Int(*n)),
            Val::Float(x) => Some(ConfigValue::Float(*x)),
            Val::Bool(b) => Some(ConfigValue::Bool(*b)),
            Val::Str(s) => Some(ConfigValue::Str(s.clone())),
            _ => None,
        }
    }

    /// A description for messages: `12 (an int)`.
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

    /// The text that replaces `{name}` in a string.
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
