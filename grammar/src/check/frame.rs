//! What a body that runs has in sight, and whose weights it declares.

use std::collections::HashMap;
use std::ops::Range;

use super::value::Val;
use crate::ast::MethodDef;
use crate::model::Origin;
use crate::source::Span;

/// The variables of a body that runs.
#[derive(Clone)]
pub(super) struct Frame<'a> {
    /// Innermost last; the first holds the parameters.
    pub scopes: Vec<HashMap<String, Val>>,
    pub owner: Owner,
    pub body: Body<'a>,
    pub returned: Option<Val>,
}

/// Whose body it is.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Body<'a> {
    Backbone,
    Function,
    Method(&'a MethodDef),
}

impl<'a> Frame<'a> {
    /// A backbone's frame with these parameters.
    pub fn with(scope: HashMap<String, Val>) -> Self {
        Frame { scopes: vec![scope], owner: Owner::default(), body: Body::Backbone, returned: None }
    }
    /// One in which nothing is known.
    pub fn empty() -> Self {
        Frame::with(HashMap::new())
    }
    pub fn get(&self, name: &str) -> Option<&Val> {
        self.scopes.iter().rev().find_map(|s| s.get(name))
    }
    /// Sets the variable where it lives, or makes it in the innermost scope.
    pub fn set(&mut self, name: &str, value: Val) {
        match self.scopes.iter_mut().rev().find_map(|s| s.get_mut(name)) {
            Some(slot) => *slot = value,
            None => _ = self.scopes.last_mut().map(|s| s.insert(name.to_owned(), value)),
        }
    }
}

/// Who declares weights: what stands before their names, and whose they are.
#[derive(Clone, Default)]
pub(super) struct Owner {
    pub path: String,
    pub origin: Option<Origin>,
    /// Where the spec applies the method, and at which rates it trains.
    pub used: Option<Span>,
    pub rates: Rates,
}

/// The rates of one application, in [`super::Checker::rates`].
pub(super) type Rates = Range<usize>;
