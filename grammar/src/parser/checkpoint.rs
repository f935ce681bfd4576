//! Parses the `checkpoint` block of a backbone.

use super::{Builder, Children, Node, Rule};
use crate::ast::*;

impl Builder {
    pub(super) fn checkpoint(&mut self, pair: Node) -> Vec<CheckpointEntry> {
        self.entries(Children::of(pair).next())
    }

    fn entries(&mut self, pair: Node) -> Vec<CheckpointEntry> {
        pair.into_inner().map(|p| self.entry(p)).collect()
    }

    fn entry(&mut self, pair: Node) -> CheckpointEntry {
        let rule = pair.as_rule();
        let mut c = Children::of(pair);
        match rule {
            Rule::model_type => CheckpointEntry::ModelType(self.strings(c.next())),
            Rule::prefix => CheckpointEntry::Prefix(self.text(c.next())),
            Rule::gguf => {
                CheckpointEntry::Gguf { architectures: self.strings(c.next()), entries: self.entries(c.next()) }
            }
            Rule::if_entries => {
                let (condition, then) = (self.expr(c.next()), self.entries(c.next()));
                let otherwise = match c.0.next() {
                    None => vec![],
                    Some(p) if p.as_rule() == Rule::entries => self.entries(p),
                    Some(p) => vec![self.entry(p)],
                };
                CheckpointEntry::If { condition, then, otherwise }
            }
            Rule::for_task_entries => {
                CheckpointEntry::ForTask { purposes: self.purposes(c.next()), entries: self.entries(c.next()) }
            }
            _ => {
                let (names, says) = (self.strings(c.next()), self.entry_rule(c.next()));
                let note = c.next_if(Rule::note).map(|p| self.text(Children::of(p).next()));
                match rule {
                    Rule::key => CheckpointEntry::Key { names, rule: says, note },
                    _ => CheckpointEntry::Tensor { names, rule: says, note },
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

    /// The values of a key, which `or` separates.
    pub(super) fn values(&mut self, pair: Node) -> Vec<Expr> {
        pair.into_inner().filter(|p| p.as_rule() != Rule::or).map(|p| self.expr(p)).collect()
    }
}
