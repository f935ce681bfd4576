//! The variables that are visible to the code being executed, and the owner of the weights that it declares.

use std::collections::HashMap;
use std::ops::Range;

use super::value::Val;
use crate::ast::MethodDef;
use crate::model::Origin;
use crate::source::Span;

/// The environment of a body that is being executed.
#[derive(Clone)]
pub(super) struct Frame<'a> {
    /// The scopes, innermost last. The first holds the parameters.
    pub scopes: Vec<HashMap<String, Val>>,
    pub owner: Owner,
    pub body: Body<'a>,
    pub returned: Option<Val>,
}

/// The kind of definition that the body belongs to.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Body<'a> {
    Backbone,
    Function,
    Method(&'a MethodDef),
}

impl<'a> Frame<'a> {
    /// The frame of a backbone with these parameters.
    pub fn with(scope: HashMap<String, Val>) -> Self {
        Frame { scopes: vec![scope], owner: Owner::default(), body: Body::Backbone, returned: None }
    }
    /// A frame without variables.
    pub fn empty() -> Self {
        Frame::with(HashMap::new())
    }
    pub fn get(&self, name: &str) -> Option<&Val> {
        self.scopes.iter().rev().find_map(|s| s.get(name))
    }
    /// Assigns to the variable in the scope that defines it, or defines it in the innermost scope.
    pub fn set(&mut self, name: &str, value: Val) {
        match self.scopes.iter_mut().rev().find_map(|s| s.get_mut(name)) {
            Some(slot) => *slot = value,
            None => _ = self.scopes.last_mut().map(|s| s.insert(name.to_owned(), value)),
        }
    }
}

/// The owner of declared weights: the prefix of their names, and their origin.
#[derive(Clone, Default)]
pub(super) struct Owner {
    pub path: String,
    pub origin: Option<Origin>,
    /// The place where the spec applies the method.
    pub used: Option<Span>,
    pub rates: Rates,
}

/// The learning rates of one application, as a range of `Checker::own_rates`.
pub(super) type Rates = Range<usize>;
