//! The counterpart of a method in Hugging Face PEFT, as the method's file declares it: which keys of
//! `adapter_config.json` correspond to which parameters, and which tensors of `adapter_model.safetensors` to which
//! weights.
//!
//! Counterparts are part of the [`Model`](crate::model::Model), so that a program without the front end can read and
//! write PEFT's format.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ast::BinaryOp;

/// The value of a configuration key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ConfigValue {
    /// A boolean.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// A string.
    Str(String),
}

/// The counterpart of one definition of a method, for one kind of site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Counterpart {
    /// The name of the method.
    pub method: String,
    /// The kind of site of the definition.
    pub kind: String,
    /// The number of sites of this kind in the backbone. It is 0 for projections, which are nested in other sites.
    pub sites: u64,
    /// The value of `peft_type`.
    pub peft_type: String,
    /// The rules for keys of `adapter_config.json`.
    pub keys: Vec<Key>,
    /// Effects of keys that have a certain value.
    pub conditions: Vec<Condition>,
    /// The tensors of each module.
    pub tensors: Vec<Tensor>,
    /// The tensors that hold the weights of all sites.
    pub tables: Vec<Table>,
    /// Keys that list the modules of this definition, in addition to `target_modules`.
    pub modules: Vec<String>,
}

impl Counterpart {
    /// The factor with which the method multiplies a weight, as an expression over the method's parameters; `None` if
    /// no tensor is scaled.
    pub fn scale(&self) -> Option<&Scalar> {
        self.tensors.iter().find_map(|t| t.scale.as_ref())
    }
}

/// The rule for a key of `adapter_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Key {
    /// The key.
    pub name: String,
    /// Its rule.
    pub rule: Rule,
}

/// The values that a key may have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// The key has one of these values.
    Is {
        /// The accepted values. An export writes the first.
        values: Vec<Constant>,
        /// The key that holds other values by module.
        patterns: Option<String>,
        /// The advice of the error for any other value.
        hint: Option<String>,
    },
    /// The key may have any value, since the adapter's function does not depend on it.
    Free {
        /// The value that an export writes.
        written: Option<Constant>,
    },
}

/// A value in a rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Constant {
    /// `null`, an empty object or an empty list.
    Null,
    /// A literal.
    Value(ConfigValue),
    /// A parameter of the method, or a variable of the site.
    Name(String),
}

/// The effect of a key that has a certain value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Condition {
    /// The key.
    pub key: String,
    /// The value that triggers the effect.
    pub value: ConfigValue,
    /// The effect.
    pub then: Consequence,
}

/// The effect of a key's value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Consequence {
    /// A parameter in PEFT has this value instead of the one that its key holds.
    Set {
        /// The parameter.
        name: String,
        /// Its value.
        value: Scalar,
    },
    /// The stored matrix W of the base model is replaced by W − scale · part(W, rank).
    Residual {
        /// The factor.
        scale: Scalar,
        /// The part that is subtracted.
        part: Part,
        /// The rank of the part.
        rank: Scalar,
    },
}

/// A low-rank part of a matrix W.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// U_r S_r V_rᵀ, the part of the r largest singular values of W = U S Vᵀ.
    Svd,
    /// The product of the first r columns of Q and the first r rows of R, where W = Q R.
    Qr,
}

/// A tensor of one module, which PEFT names `MODULE.NAME`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tensor {
    /// The name after the module's: `lora_A.weight`.
    pub name: String,
    /// The axes of the tensor in PEFT.
    pub axes: Vec<Axis>,
    /// The projection of the site that the tensor belongs to; `None` if the method applies to projections.
    pub projection: Option<String>,
    /// The name of the weight below the method's path: `a` in `layers.0.attention.q.lora.a`.
    pub weight: String,
    /// The factor of the weight in the method's equations: `alpha / rank`.
    pub scale: Option<Scalar>,
    /// A `bool` parameter; the tensor exists only where it is true.
    pub condition: Option<String>,
    /// The value at outputs of a fused matrix that no method changes. `None` if there may be no such outputs.
    pub elsewhere: Option<f64>,
}

/// An axis of a tensor in PEFT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// The inputs of the module.
    Inputs,
    /// The outputs of the module.
    Outputs,
    /// An axis whose length is this parameter. Methods on parts of a fused matrix are concatenated along it.
    Param(String),
    /// An axis of length 1, which the weight does not have.
    One,
}

/// A tensor [n, sites · weights · d] of the whole model: the weights `[n, d]` of the first site, then those of the
/// next.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// The name of the tensor.
    pub name: String,
    /// The names of the weights below the method's path.
    pub weights: Vec<String>,
}

/// An arithmetic expression over numeric parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scalar {
    /// A literal.
    Number(f64),
    /// A parameter.
    Name(String),
    /// A square root.
    Sqrt(Box<Scalar>),
    /// A sum, difference, product or quotient.
    Binary(BinaryOp, Box<Scalar>, Box<Scalar>),
}

impl Scalar {
    /// The value of the expression for these values of the names.
    ///
    /// # Errors
    ///
    /// The first name without a value, or the first operator that is not one of `+ - * /`.
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

    /// The names that the expression reads.
    pub fn names(&self) -> Vec<&str> {
        match self {
            Scalar::Number(_) => vec![],
            Scalar::Name(name) => vec![name],
            Scalar::Sqrt(x) => x.names(),
            Scalar::Binary(_, left, right) => [left.names(), right.names()].concat(),
        }
    }
}
