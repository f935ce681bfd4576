//! Parses the body of a method, including its `counterpart` block.

use super::{Builder, Children, Node, Rule};
use crate::ast::*;
use crate::diagnostic::Diagnostic;

impl Builder {
    pub(super) fn method_body(&mut self, pair: Node) -> (Vec<Stmt>, Option<CounterpartDef>) {
        let (mut body, mut counterpart): (Vec<Stmt>, Option<CounterpartDef>) = (vec![], None);
        for part in pair.into_inner() {
            if part.as_rule() != Rule::counterpart {
                body.push(self.statement(part));
                continue;
            }
            let found = self.counterpart(part);
            match &counterpart {
                Some(first) => {
                    let error = Diagnostic::error(found.peft_type.span, "a method has one counterpart in PEFT");
                    self.errors.push(error.related(first.peft_type.span, "the first is here"));
                }
                None => counterpart = Some(found),
            }
        }
        (body, counterpart)
    }

    fn counterpart(&mut self, pair: Node) -> CounterpartDef {
        let span = self.span(&pair);
        let mut c = Children::of(pair);
        let peft_type = self.text(c.next());
        CounterpartDef { peft_type, lines: c.0.map(|p| self.counterpart_line(p)).collect(), span }
    }

    fn counterpart_line(&mut self, pair: Node) -> CounterpartLine {
        let rule = pair.as_rule();
        let mut c = Children::of(pair);
        if rule == Rule::require {
            let (condition, message) = (self.expr(c.next()), self.text(c.next()));
            let hint = c.next_if(Rule::string).map(|p| self.text(p));
            return CounterpartLine::Require { condition, message, hint };
        }
        let key = self.text(c.next());
        match rule {
            Rule::key_is => {
                let values = self.values(c.next());
                let patterns = c.next_if(Rule::overriding).map(|p| self.text(Children::of(p).next()));
                let hint = c.next_if(Rule::note).map(|p| self.text(Children::of(p).next()));
                CounterpartLine::Is { key, values, patterns, hint }
            }
            Rule::key_free => CounterpartLine::Free { key, written: c.next_if(Rule::expr).map(|p| self.expr(p)) },
            Rule::when => {
                let value = self.expr(c.next());
                let mut set = vec![];
                for assign in c.0 {
                    let mut c = Children::of(assign);
                    set.push((self.name(c.next()), self.expr(c.next())));
                }
                CounterpartLine::When { key, value, set }
            }
            Rule::adapter_tensor => {
                let axes = c.next().into_inner().map(|p| self.expr(p)).collect();
                let projection = c.next_if(Rule::of_projection).map(|p| self.name(Children::of(p).next()));
                let value = self.expr(c.next());
                let condition = c.next_if(Rule::only_if).map(|p| self.name(Children::of(p).next()));
                let elsewhere = c.next_if(Rule::elsewhere).map(|p| self.expr(Children::of(p).next()));
                CounterpartLine::Tensor { name: key, axes, projection, value, condition, elsewhere }
            }
            Rule::table => CounterpartLine::Table { name: key, weights: c.0.map(|p| self.name(p)).collect() },
            _ => CounterpartLine::Modules(key),
        }
    }
}
