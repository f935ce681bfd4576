//! What a backbone is for. It decides what `labels` and `logits` are:
//!
//! | purpose | `labels` | `logits` |
//! | --- | --- | --- |
//! | generation | `i32[targets]`, the token behind each target | `f32[targets, vocab]` |
//! | classification | `i32[sequences]`, a class | `f32[sequences, classes]` |
//! | regression | `f32[sequences, 1]`, a number | `f32[sequences, 1]` |
//! | token_classification | `i32[targets]`, the class of each target | `f32[targets, classes]` |

use super::mentions::purposes_within;
use super::{Checker, Purpose};
use crate::ast::{BackboneDef, Name};
use crate::diagnostic::Diagnostic;
use crate::graph::{DType, Dim, Type};

impl Purpose {
    const ALL: [Purpose; 4] =
        [Purpose::Generation, Purpose::Classification, Purpose::Regression, Purpose::TokenClassification];

    pub fn word(self) -> &'static str {
        match self {
            Purpose::Generation => "generation",
            Purpose::Classification => "classification",
            Purpose::Regression => "regression",
            Purpose::TokenClassification => "token_classification",
        }
    }

    /// That of a task of this kind: all that write texts ask for the next token.
    pub fn of(kind: &str) -> Self {
        Purpose::ALL.into_iter().find(|purpose| purpose.word() == kind).unwrap_or(Purpose::Generation)
    }

    /// What there is a row of logits for.
    pub fn rows(self) -> (Dim, &'static str) {
        match self {
            Purpose::Generation | Purpose::TokenClassification => (Dim::Targets, "each target"),
            Purpose::Classification | Purpose::Regression => (Dim::Sequences, "each sequence"),
        }
    }

    pub fn labels(self) -> Type {
        let rows = self.rows().0;
        match self {
            Purpose::Regression => Type { dtype: DType::F32, shape: vec![rows, Dim::Const(1)] },
            _ => Type::i32([rows]),
        }
    }
}

impl<'a> Checker<'a> {
    /// The purpose of this word.
    pub(super) fn purpose_of(&mut self, name: &Name) -> Option<Purpose> {
        let found = Purpose::ALL.into_iter().find(|purpose| purpose.word() == name.text);
        if found.is_none() {
            let error = Diagnostic::error(name.span, format!("a backbone cannot be made for `{}`", name.text));
            self.report(error.suggest(&name.text, Purpose::ALL.map(Purpose::word)));
        }
        found
    }

    /// The task is one of these.
    pub(super) fn asked(&mut self, names: &[Name]) -> bool {
        let purposes: Vec<_> = names.iter().filter_map(|name| self.purpose_of(name)).collect();
        purposes.contains(&self.purpose)
    }

    /// All that a backbone is for; the first is that of a spec which does not say its task's kind.
    pub(super) fn purposes_of(&mut self, backbone: &'a BackboneDef) -> Option<Vec<Purpose>> {
        let mut found = vec![];
        for name in purposes(backbone) {
            let purpose = self.purpose_of(name)?;
            if !found.contains(&purpose) {
                found.push(purpose);
            }
        }
        if found.is_empty() {
            let error = Diagnostic::error(backbone.name.span, "the backbone does not say what it is for");
            let hint = "write `for generation` or `for classification` after its parameters, \
                        or blocks `for generation { … }` in its body";
            self.report(error.hint(hint));
            return None;
        }
        Some(found)
    }
}

/// What a backbone is for, each as often as it is said: in its head, or by the `for …` blocks of its body.
pub(crate) fn purposes(backbone: &BackboneDef) -> Vec<&Name> {
    backbone.purposes.iter().chain(purposes_within(&backbone.body)).collect()
}
