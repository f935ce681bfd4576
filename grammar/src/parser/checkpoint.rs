//! The `checkpoint` block of a backbone.

use super::{Builder, Children, Node, Rule};
use crate::ast::*;

impl Builder {
    pub(super) fn checkpoint(&mut self, pair: Node) -> Vec<Entry> {
        self.entries(Children::of(pair).next())
    }

    fn entries(&mut self, pair: Node) -> Vec<Entry> {
        pair.into_inner().map(|p| self.entry(p)).collect()
    }

    fn entry(&mut self, pair: Node) -> Entry {
        let rule = pair.as_rule();
        let mut c = Children::of(pair);
        match rule {
            Rule::model_type => Entry::ModelType(self.strings(c.next())),
            Rule::prefix => Entry::Prefix(self.text(c.next())),
            Rule::gguf => Entry::Gguf { architectures: self.strings(c.next()), entries: self.entries(c.next()) },
            Rule::choice => {
                let (condition, then) = (self.expr(c.next()), self.entries(c.next()));
                let otherwise = match c.0.next() {
                    None => vec![],
                    Some(p) if p.as_rule() == Rule::entries => self.entries(p),
                    Some(p) => vec![self.entry(p)],
                };
                Entry::If { condition, then, otherwise }
            }
            Rule::entries_for => Entry::ForTask { purposes: self.purposes(c.next()), entries: self.entries(c.next()) },
            _ => {
                let (names, says) = (self.strings(c.next()), self.entry_rule(c.next()));
                let note = c.next_if(Rule::note).map(|p| self.text(Children::of(p).next()));
                match rule {
                    Rule::key => Entry::Key { names, rule: says, note },
                    _ => Entry::Tensor { names, rule: says, note },
                }
            }
        }
    }

    fn strings(&mut self, pair: Node) -> Vec<Text> {
        pair.into_inner().map(|p| self.text(p)).collect()
    }

    fn entry_rule(&mut self, pair: Node) -> EntryRule {
        match pair.as_rule() {
            Rule::free => EntryRule::Free,
            Rule::optional => EntryRule::Optional,
            Rule::unused => EntryRule::Unused,
            Rule::required => EntryRule::Required,
            Rule::values => EntryRule::Is(self.values(pair)),
            Rule::permuted => {
                let mut c = Children::of(pair);
                EntryRule::Permuted {
                    tensor: self.text(c.next()),
                    rows: self.expr(c.next()),
                    axes: self.expr(c.next()),
                }
            }
            _ => EntryRule::Same(self.text(Children::of(pair).next())),
        }
    }

    /// The values that a key may have, between them `or`.
    pub(super) fn values(&mut self, pair: Node) -> Vec<Expr> {
        pair.into_inner().filter(|p| p.as_rule() != Rule::or).map(|p| self.expr(p)).collect()
    }
}
