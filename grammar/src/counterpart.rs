//! A method's counterpart in Hugging Face PEFT, as the method's file declares it: which keys of
//! `adapter_config.json` mean which parameters, and which tensors of `adapter_model.safetensors` are which weights.
//!
//! It travels in the [`Model`](crate::model::Model), so that a program without the front end reads and writes PEFT's
//! format, too.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ast::BinaryOp;

/// A value of a configuration's key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ConfigValue {
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
}

/// What one definition of a method, for one kind of site, is in PEFT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Counterpart {
    pub method: String,
    /// The kind of site it is for.
    pub kind: String,
    /// How many sites of this kind the backbone has; 0 for projections, which lie in other sites.
    pub sites: u64,
    /// The value of `peft_type`.
    pub peft_type: String,
    pub keys: Vec<Key>,
    pub conditions: Vec<Condition>,
    pub tensors: Vec<Tensor>,
    /// Tensors that hold the weights of all sites.
    pub tables: Vec<Table>,
    /// Keys that list the modules of this definition, besides `target_modules`.
    pub modules: Vec<String>,
}

impl Counterpart {
    /// The method applies `weight` times a factor; this is the parameters' part of the tensors that are scaled.
    pub fn scale(&self) -> Option<&Scalar> {
        self.tensors.iter().find_map(|t| t.scale.as_ref())
    }
}

/// What a key of `adapter_config.json` may be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Key {
    pub name: String,
    pub rule: Rule,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// One of these; the first is written. `patterns` names the key that holds other values by module; `hint` is the
    /// mend of a value that is none of them.
    Is { values: Vec<Constant>, patterns: Option<String>, hint: Option<String> },
    /// Any value: the adapter computes the same. `written` is what an export writes.
    Free { written: Option<Constant> },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Constant {
    /// `null`, or an empty object or list.
    Null,
    Value(ConfigValue),
    /// A parameter of the method, or a variable it knows.
    Name(String),
}

/// What follows when a key has a value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Condition {
    pub key: String,
    pub value: ConfigValue,
    pub then: Consequence,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Consequence {
    /// A parameter of PEFT's has this value in place of what its key says.
    Set { name: String, value: Scalar },
    /// The matrix of the base model, as it is stored, becomes W − scale · part(W, rank).
    Residual { scale: Scalar, part: Part, rank: Scalar },
}

/// A part of a matrix W of this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Of W = U S Vᵀ the largest singular values' U_r S_r V_rᵀ.
    Svd,
    /// Of W = Q R the first columns of Q times the first rows of R.
    Qr,
}

/// A tensor that belongs to one module of PEFT's: `MODULE.NAME`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tensor {
    /// What follows the module's name: `lora_A.weight`.
    pub name: String,
    pub axes: Vec<Axis>,
    /// The projection of the site that it is for; none if the method is one of projections.
    pub projection: Option<String>,
    /// The name of the weight below the method's path: `a` of `layers.0.attention.q.lora.a`.
    pub weight: String,
    /// What stands before the weight in the method's equations: `alpha / rank`.
    pub scale: Option<Scalar>,
    /// The parameter, a `bool`, without which there is no such tensor.
    pub condition: Option<String>,
    /// Its numbers at outputs of a fused matrix that no method changes; none if there may be no such outputs.
    pub elsewhere: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// The module's inputs, and its outputs.
    Inputs,
    Outputs,
    /// As long as this parameter says: methods at parts of a fused matrix lie side by side.
    Param(String),
    /// An axis of length 1, which the weight lacks.
    One,
}

/// A tensor [n, sites · weights · d] of the whole model: the weights [n, d] of the first site, then of the next.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    pub name: String,
    /// Names below the method's path.
    pub weights: Vec<String>,
}

/// An expression over numbers that parameters have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scalar {
    Number(f64),
    Name(String),
    Sqrt(Box<Scalar>),
    Binary(BinaryOp, Box<Scalar>, Box<Scalar>),
}

impl Scalar {
    /// Its value where names have the values `known`. The error is a name that has none, or an operator that is none
    /// of numbers.
    pub fn value(&self, known: &BTreeMap<String, f64>) -> Result<f64, String> {
        Ok(match self {
            Scalar::Number(x) => *x,
            Scalar::Name(name) => *known.get(name).ok_or_else(|| name.clone())?,
            Scalar::Sqrt(x) => x.value(known)?.sqrt(),
            Scalar::Binary(op, left, right) => {
                let (left, right) = (left.value(known)?, right.value(known)?);
                match op {
                    BinaryOp::Add => left + right,
                    BinaryOp::Sub => left - right,
                    BinaryOp::Mul => left * right,
                    BinaryOp::Div => left / right,
                    other => return Err(other.symbol().to_owned()),
                }
            }
        })
    }

    /// The names that it reads.
    pub fn names(&self) -> Vec<&str> {
        match self {
            Scalar::Number(_) => vec![],
            Scalar::Name(name) => vec![name],
            Scalar::Sqrt(x) => x.names(),
            Scalar::Binary(_, left, right) => [left.names(), right.names()].concat(),
        }
    }
}
