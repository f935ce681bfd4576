//! Names of tensors in checkpoints, and the role of tensors that the model does not read.

use std::collections::BTreeSet;

use peft_grammar::model::{Buffer, Checkpoint, Gguf, Origin, Param, RowPermutation, TensorKind, TensorRule};
use peft_grammar::pattern;

/// The naming rules of a backbone's `checkpoint` block.
pub(super) struct Names<'a> {
    rules: &'a Checkpoint,
    /// The additional rules for GGUF files, if the checkpoint is GGUF.
    gguf: Option<&'a Gguf>,
    /// First components of the model's names, with and without the prefix: `bert`, `embeddings`, `encoder`.
    roots: BTreeSet<&'a str>,
}

/// The role of a tensor that the model does not read.
pub(super) enum Role<'a> {
    /// A buffer with known values, and the note in the backbone's definition.
    Buffer(&'a Buffer, Option<&'a str>),
    /// A part of another model that shares the file, and the note in the backbone's definition.
    Unread(Option<&'a str>),
    /// A tensor inside the model that no rule explains, so the file computes something else than the model.
    Unexplained,
}

impl<'a> Names<'a> {
    /// The rules for safetensors, or with `gguf` for GGUF files.
    pub fn new(rules: &'a Checkpoint, gguf: Option<&'a Gguf>, params: &'a [Param]) -> Self {
        let own = params.iter().filter(|p| matches!(p.origin, Origin::Backbone | Origin::Head));
        let names = own.flat_map(|p| [Some(p.name.as_str()), bare(&p.name, &rules.prefix)]).flatten();
        // Alternative names of the model's tensors are inside the model too, such as a bias next to `lm_head.weight`.
        let same = rules
            .tensors
            .iter()
            .filter(|rule| matches!(rule.is, TensorKind::Same(_)))
            .map(|rule| rule.pattern.as_str());
        let roots = names.chain(same).map(root).filter(|root| !root.contains('*')).collect();
        Names { rules, gguf, roots }
    }

    /// The names that a canonical name may have in a checkpoint: with or without the prefix, as it is or by an
    /// alternative name.
    pub fn spellings(&self, name: &str) -> Vec<String> {
        let others = self.rules.tensors.iter().filter_map(|rule| match &rule.is {
            TensorKind::Same(canonical) => pattern::renamed(canonical, &rule.pattern, name),
            _ => None,
        });
        let mut all = vec![];
        for name in std::iter::once(name.to_owned()).chain(others) {
            let bare = bare(&name, &self.rules.prefix).map(String::from);
            all.extend(std::iter::once(name).chain(bare));
        }
        match self.gguf {
            Some(gguf) => {
                all.iter().flat_map(|name| gguf.tensors.iter().filter_map(|rule| written(rule, name))).collect()
            }
            None => all,
        }
    }

    /// The order of a tensor's rows in the file, if it differs from the model's.
    pub fn permuted(&self, name: &str) -> Option<&'a RowPermutation> {
        self.gguf?.permuted.iter().find(|permuted| pattern::fits(&permuted.pattern, name))
    }

    /// A canonical name as messages show it, as the files write it.
    pub fn shown(&self, name: &str) -> String {
        let written = self.gguf.and_then(|_| self.spellings(name).into_iter().next());
        written.unwrap_or_else(|| name.to_owned())
    }

    /// The pattern of the optional part that the tensor belongs to.
    pub fn optional(&self, name: &str) -> Option<&'a str> {
        let mut parts = self.rules.tensors.iter().filter(|rule| rule.is == TensorKind::Optional);
        parts.find(|rule| pattern::fits(&rule.pattern, name)).map(|rule| &*rule.pattern)
    }

    /// The note about the tensor in the backbone's definition.
    pub fn note(&self, name: &str) -> Option<&'a str> {
        let full = self.full(name);
        let own = self.gguf.into_iter().flat_map(|gguf| &gguf.tensors);
        let own = own.filter(|rule| rule.note.is_some() && pattern::fits(&rule.pattern, name));
        if let Some(rule) = own.into_iter().next() {
            return rule.note.as_deref();
        }
        let rules = self.rules.tensors.iter().filter(|rule| full.iter().any(|n| pattern::fits(&rule.pattern, n)));
        rules.filter_map(|rule| rule.note.as_deref()).next()
    }

    /// The role of a tensor that no parameter is read from.
    pub fn role(&self, name: &str) -> Role<'a> {
        let mut full = self.full(name);
        let gguf = self.gguf.into_iter().flat_map(|gguf| &gguf.tensors);
        for rule in gguf.filter(|rule| pattern::fits(&rule.pattern, name)) {
            match &rule.is {
                TensorKind::Same(_) => {}
                TensorKind::Buffer(buffer) => return Role::Buffer(buffer, rule.note.as_deref()),
                _ => return Role::Unread(rule.note.as_deref()),
            }
        }
        for rule in &self.rules.tensors {
            if let TensorKind::Same(canonical) = &rule.is {
                full.extend(
                    full.iter().filter_map(|n| pattern::renamed(&rule.pattern, canonical, n)).collect::<Vec<_>>(),
                );
            }
        }
        for rule in self.rules.tensors.iter().filter(|rule| full.iter().any(|n| pattern::fits(&rule.pattern, n))) {
            let note = rule.note.as_deref();
            match &rule.is {
                TensorKind::Buffer(buffer) => return Role::Buffer(buffer, note),
                TensorKind::Optional | TensorKind::Unused => return Role::Unread(note),
                TensorKind::Required | TensorKind::Same(_) => {}
            }
        }
        // A GGUF file holds nothing but one model.
        if self.gguf.is_some() || self.roots.contains(root(name)) { Role::Unexplained } else { Role::Unread(None) }
    }

    /// The canonical names that a name may stand for: the name itself and the name with the prefix; for GGUF also the
    /// names by its rules.
    fn full(&self, name: &str) -> Vec<String> {
        let meant = |rule: &TensorRule| match &rule.is {
            TensorKind::Same(canonical) => pattern::renamed(&rule.pattern, canonical, name),
            _ => None,
        };
        let own = self.gguf.into_iter().flat_map(|gguf| &gguf.tensors).filter_map(meant);
        own.chain([name.to_owned(), format!("{}{name}", self.rules.prefix)]).collect()
    }
}

/// The GGUF name of a canonical name, by one rule.
fn written(rule: &TensorRule, name: &str) -> Option<String> {
    match &rule.is {
        TensorKind::Same(canonical) => pattern::renamed(canonical, &rule.pattern, name),
        _ => None,
    }
}

/// The name without the prefix, if it has one.
fn bare<'n>(name: &'n str, prefix: &str) -> Option<&'n str> {
    name.strip_prefix(prefix).filter(|_| !prefix.is_empty())
}

/// The first component of a name.
fn root(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}
