//! What a checkpoint's tensors are called, and what those are that the model does not read.

use std::collections::BTreeSet;

use peft_grammar::model::{Buffer, Checkpoint, Gguf, Kind, Origin, Param, Permuted, TensorRule};
use peft_grammar::pattern;

/// Names by the rules of a backbone's `checkpoint` block.
pub(super) struct Names<'a> {
    rules: &'a Checkpoint,
    /// How the files write those names, where they are GGUF.
    gguf: Option<&'a Gguf>,
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
    /// `gguf` says how files in GGUF write the names; without it they are safetensors.
    pub fn new(rules: &'a Checkpoint, gguf: Option<&'a Gguf>, params: &'a [Param]) -> Self {
        let own = params.iter().filter(|p| matches!(p.origin, Origin::Backbone | Origin::Head));
        let names = own.flat_map(|p| [Some(p.name.as_str()), bare(&p.name, &rules.prefix)]).flatten();
        // Other names of its tensors lie inside it, too: a bias beside `lm_head.weight`.
        let same =
            rules.tensors.iter().filter(|rule| matches!(rule.is, Kind::Same(_))).map(|rule| rule.pattern.as_str());
        let roots = names.chain(same).map(root).filter(|root| !root.contains('*')).collect();
        Names { rules, gguf, roots }
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
        match self.gguf {
            Some(gguf) => {
                all.iter().flat_map(|name| gguf.tensors.iter().filter_map(|rule| written(rule, name))).collect()
            }
            None => all,
        }
    }

    /// The order in which the file holds a tensor's rows, where it is another than the model's.
    pub fn permuted(&self, name: &str) -> Option<&'a Permuted> {
        self.gguf?.permuted.iter().find(|permuted| pattern::fits(&permuted.pattern, name))
    }

    /// A canonical name as a message tells it: as the files write it.
    pub fn shown(&self, name: &str) -> String {
        let written = self.gguf.and_then(|_| self.spellings(name).into_iter().next());
        written.unwrap_or_else(|| name.to_owned())
    }

    /// The pattern of the part that files may lack, and in which the tensor lies.
    pub fn optional(&self, name: &str) -> Option<&'a str> {
        let mut parts = self.rules.tensors.iter().filter(|rule| rule.is == Kind::Optional);
        parts.find(|rule| pattern::fits(&rule.pattern, name)).map(|rule| &*rule.pattern)
    }

    /// What the backbone's file says of it.
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

    /// What a tensor of the files is that no parameter is read from.
    pub fn role(&self, name: &str) -> Role<'a> {
        let mut full = self.full(name);
        let gguf = self.gguf.into_iter().flat_map(|gguf| &gguf.tensors);
        for rule in gguf.filter(|rule| pattern::fits(&rule.pattern, name)) {
            match &rule.is {
                Kind::Same(_) => {}
                Kind::Buffer(buffer) => return Role::Buffer(buffer, rule.note.as_deref()),
                _ => return Role::Unread(rule.note.as_deref()),
            }
        }
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
        // A GGUF file holds nothing but the model.
        if self.gguf.is_some() || self.roots.contains(root(name)) { Role::Stranger } else { Role::Unread(None) }
    }

    /// The name as it is, and with the prefix; of a name in GGUF, those that it stands for.
    fn full(&self, name: &str) -> Vec<String> {
        let meant = |rule: &TensorRule| match &rule.is {
            Kind::Same(canonical) => pattern::renamed(&rule.pattern, canonical, name),
            _ => None,
        };
        let own = self.gguf.into_iter().flat_map(|gguf| &gguf.tensors).filter_map(meant);
        own.chain([name.to_owned(), format!("{}{name}", self.rules.prefix)]).collect()
    }
}

/// How a GGUF file writes a name, by one of the rules.
fn written(rule: &TensorRule, name: &str) -> Option<String> {
    match &rule.is {
        Kind::Same(canonical) => pattern::renamed(canonical, &rule.pattern, name),
        _ => None,
    }
}

fn bare<'n>(name: &'n str, prefix: &str) -> Option<&'n str> {
    name.strip_prefix(prefix).filter(|_| !prefix.is_empty())
}

fn root(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}
