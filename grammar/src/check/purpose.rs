//! The purposes of a backbone, which determine `labels` and `logits`:
//!
//! | purpose | `labels` | `logits` |
//! | --- | --- | --- |
//! | generation | `i32[targets]`, the token that follows each target | `f32[targets, vocab]` |
//! | classification | `i32[sequences]`, a class | `f32[sequences, classes]` |
//! | regression | `f32[sequences, 1]`, a number | `f32[sequences, 1]` |
//! | token_classification | `i32[targets]`, the class of each target | `f32[targets, classes]` |

use super::references::nested_purposes;
use super::{Checker, Purpose};
use crate::ast::{BackboneDef, Name};
use crate::diagnostic::Diagnostic;
use crate::graph::{DType, Dim, Type};

impl Purpose {
    const ALL: [Purpose; 4] =
        [Purpose::Generation, Purpose::Classification, Purpose::Regression, Purpose::TokenClassification];

    pub fn keyword(self) -> &'static str {
        match self {
            Purpose::Generation => "generation",
            Purpose::Classification => "classification",
            Purpose::Regression => "regression",
            Purpose::TokenClassification => "token_classification",
        }
    }

    /// The purpose for a kind of task. All kinds that produce text predict the next token.
    pub fn of(kind: &str) -> Self {
        Purpose::ALL.into_iter().find(|purpose| purpose.keyword() == kind).unwrap_or(Purpose::Generation)
    }

    /// The first axis of the logits, and its description.
    pub fn logits_rows(self) -> (Dim, &'static str) {
        match self {
            Purpose::Generation | Purpose::TokenClassification => (Dim::Targets, "each target"),
            Purpose::Classification | Purpose::Regression => (Dim::Sequences, "each sequence"),
        }
    }

    pub fn labels(self) -> Type {
        let rows = self.logits_rows().0;
        match self {
            Purpose::Regression => Type { dtype: DType::F32, shape: vec![rows, Dim::Const(1)] },
            _ => Type::i32([rows]),
        }
    }
}

impl<'a> Checker<'a> {
    /// The purpose of this name.
    pub(super) fn purpose_of(&mut self, name: &Name) -> Option<Purpose> {
        let found = Purpose::ALL.into_iter().find(|purpose| purpose.keyword() == name.text);
        if found.is_none() {
            let error = Diagnostic::error(name.span, format!("a backbone cannot be made for `{}`", name.text));
            self.report(error.suggest(&name.text, Purpose::ALL.map(Purpose::keyword)));
        }
        found
    }

    /// Whether the spec's task is of one of these kinds.
    pub(super) fn task_is_one_of(&mut self, names: &[Name]) -> bool {
        let purposes: Vec<_> = names.iter().filter_map(|name| self.purpose_of(name)).collect();
        purposes.contains(&self.purpose)
    }

    /// All purposes of a backbone. The first applies to a spec that does not state its task's kind.
    pub(super) fn purposes_of(&mut self, backbone: &'a BackboneDef) -> Option<Vec<Purpose>> {
        let mut found = vec![];
        for name in purposes(backbone) {
            let purpose = self.purpose_of(name)?;
            if !found.contains(&purpose) {
                found.push(purpose);
            }
        }
        if found.is_empty() {
            let title = "the backbone does not declare the kinds of tasks it is for";
            let error = Diagnostic::error(backbone.name.span, title);
            let hint = "write `for generation` or `for classification` after its parameters, \
                        or blocks `for generation { … }` in its body";
            self.report(error.hint(hint));
            return None;
        }
        Some(found)
    }
}

/// The purposes that a backbone names, with repetitions: in its header, or in the `for …` blocks of its body.
pub(crate) fn purposes(backbone: &BackboneDef) -> Vec<&Name> {
    backbone.purposes.iter().chain(nested_purposes(&backbone.body)).collect()
}
