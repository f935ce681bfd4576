//! What a checkpoint's tensors are called, and what those are that the model does not read.

use std::collections::BTreeSet;

use peft_grammar::model::{Buffer, Checkpoint, Kind, Origin, Param};
use peft_grammar::pattern;

/// Names by the rules of a backbone's `checkpoint` block.
pub(super) struct Names<'a> {
    rules: &'a Checkpoint,
    /// The first parts of the model's names, in full and without the prefix: `bert`, `embeddings`, `encoder`.
    roots: BTreeSet<&'a str>,
}

/// What a tensor is that the model does not read.
pub(super) enum Role<'a> {
    /// Its values are known. With what the backbone's file says of it.
    Buffer(&'a Buffer, Option<&'a str>),
    /// A part of other models, with what it is.
    Unread(Option<&'a str>),
    /// It lies inside the model, and changes what that computes.
    Stranger,
}

impl<'a> Names<'a> {
    pub fn new(rules: &'a Checkpoint, params: &'a [Param]) -> Self {
        let own = params.iter().filter(|p| matches!(p.origin, Origin::Backbone | Origin::Head));
        let names = own.flat_map(|p| [Some(p.name.as_str()), bare(&p.name, &rules.prefix)]).flatten();
        // Other names of its tensors lie inside it, too: a bias beside `lm_head.weight`.
        let same =
            rules.tensors.iter().filter(|rule| matches!(rule.is, Kind::Same(_))).map(|rule| rule.pattern.as_str());
        let roots = names.chain(same).map(root).filter(|root| !root.contains('*')).collect();
        Names { rules, roots }
    }

    /// How checkpoints write a canonical name: in full or without the prefix, as it is or by another name.
    pub fn spellings(&self, name: &str) -> Vec<String> {
        let others = self.rules.tensors.iter().filter_map(|rule| match &rule.is {
            Kind::Same(canonical) => pattern::renamed(canonical, &rule.pattern, name),
            _ => None,
        });
        let mut all = vec![];
        for name in std::iter::once(name.to_owned()).chain(others) {
            let bare = bare(&name, &self.rules.prefix).map(String::from);
            all.extend(std::iter::once(name).chain(bare));
        }
        all
    }

    /// The pattern of the part that files may lack, and in which the tensor lies.
    pub fn optional(&self, name: &str) -> Option<&'a str> {
        let mut parts = self.rules.tensors.iter().filter(|rule| rule.is == Kind::Optional);
        parts.find(|rule| pattern::fits(&rule.pattern, name)).map(|rule| &*rule.pattern)
    }

    /// What the backbone's file says of it.
    pub fn note(&self, name: &str) -> Option<&'a str> {
        let full = self.full(name);
        let rules = self.rules.tensors.iter().filter(|rule| full.iter().any(|n| pattern::fits(&rule.pattern, n)));
        rules.filter_map(|rule| rule.note.as_deref()).next()
    }

    /// What a tensor of the files is that no parameter is read from.
    pub fn role(&self, name: &str) -> Role<'a> {
        let mut full = self.full(name);
        for rule in &self.rules.tensors {
            if let Kind::Same(canonical) = &rule.is {
                full.extend(
                    full.iter().filter_map(|n| pattern::renamed(&rule.pattern, canonical, n)).collect::<Vec<_>>(),
                );
            }
        }
        for rule in self.rules.tensors.iter().filter(|rule| full.iter().any(|n| pattern::fits(&rule.pattern, n))) {
            let note = rule.note.as_deref();
            match &rule.is {
                Kind::Buffer(buffer) => return Role::Buffer(buffer, note),
                Kind::Optional | Kind::Unused => return Role::Unread(note),
                Kind::Required | Kind::Same(_) => {}
            }
        }
        if self.roots.contains(root(name)) { Role::Stranger } else { Role::Unread(None) }
    }

    /// The name as it is, and with the prefix.
    fn full(&self, name: &str) -> Vec<String> {
        vec![name.to_owned(), format!("{}{name}", self.rules.prefix)]
    }
}

fn bare<'n>(name: &'n str, prefix: &str) -> Option<&'n str> {
    name.strip_prefix(prefix).filter(|_| !prefix.is_empty())
}

fn root(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}
