//! A generation task's template: special tokens, fields, and a part for each triple of a record.

use crate::ast::Text;
use crate::diagnostic::Diagnostic;
use crate::model::Piece;
use crate::source::Span;

/// Fields of a record, and of each of its triples.
const RECORD: &[&str] = &["category", "text"];
const TRIPLE: &[&str] = &["subject", "property", "object"];

type Error = Box<Diagnostic>;

/// Reads `<bos> (<subject> {subject} …)* <target> {text} <eos>`.
pub(super) fn parse(template: &Text, special: &[String], target: &Text) -> Result<Vec<Piece>, Error> {
    let mut reader = Reader { text: &template.text, span: template.span, special, at: 0 };
    let pieces = reader.pieces(false)?;
    let is_target = |p: &Piece| matches!(p, Piece::Special(token) if *token == target.text);
    let Some(at) = pieces.iter().position(is_target) else {
        let error =
            Diagnostic::error(target.span, format!("the target `{}` does not stand in the template", target.text));
        let tokens = pieces.iter().filter_map(|p| if let Piece::Special(token) = p { Some(&**token) } else { None });
        return Err(Box::new(error.related(template.span, "outside of `( … )*`").suggest(&target.text, tokens)));
    };
    if !pieces[at..].contains(&Piece::Field("text".into())) {
        let title = format!("no `{{text}}` follows the target `{}`: there is nothing to learn", target.text);
        return Err(Box::new(Diagnostic::error(template.span, title)));
    }
    Ok(pieces)
}

struct Reader<'a> {
    text: &'a str,
    span: Span,
    special: &'a [String],
    at: usize,
}

impl Reader<'_> {
    fn error(&self, from: usize, to: usize, title: impl Into<String>) -> Diagnostic {
        let start = self.span.start as usize + 1;
        Diagnostic::error(Span::new(self.span.file, start + from, start + to), title)
    }

    fn pieces(&mut self, inside: bool) -> Result<Vec<Piece>, Error> {
        let mut pieces = Vec::new();
        while let Some(next) = self.text[self.at..].chars().next() {
            let start = self.at;
            match next {
                ' ' => self.at += 1,
                '{' => pieces.push(self.field(inside)?),
                '<' => pieces.push(self.special()?),
                '(' if inside => return Err(Box::new(self.error(start, start + 1, "`( … )*` stands inside another"))),
                '(' => {
                    self.at += 1;
                    let repeated = self.pieces(true)?;
                    if !self.text[self.at..].starts_with(")*") {
                        let error = self.error(start, start + 1, "this `(` has no `)*`");
                        return Err(Box::new(error.hint("`( … )*` stands once for each triple")));
                    }
                    self.at += 2;
                    pieces.push(Piece::Repeat(repeated));
                }
                ')' if inside => return Ok(pieces),
                other => {
                    let error =
                        self.error(start, start + other.len_utf8(), format!("`{other}` has no place in a template"));
                    return Err(Box::new(error.hint("it holds `<tokens>`, `{fields}` and `( … )*`")));
                }
            }
        }
        Ok(pieces)
    }

    /// What stands up to `end`, which is taken, too.
    fn until(&mut self, end: char, what: &str) -> Result<(&str, usize, usize), Error> {
        let start = self.at;
        let Some(length) = self.text[start..].find(end) else {
            return Err(Box::new(self.error(start, start + 1, format!("this {what} has no `{end}`"))));
        };
        self.at = start + length + 1;
        Ok((&self.text[start..self.at], start, self.at))
    }

    fn field(&mut self, inside: bool) -> Result<Piece, Error> {
        let known = if inside { TRIPLE } else { RECORD };
        let (text, from, to) = self.until('}', "field")?;
        let name = text[1..text.len() - 1].trim().to_owned();
        if !known.contains(&&*name) {
            let whose = if inside { "a triple" } else { "a record" };
            let error = self.error(from, to, format!("{whose} has no field `{name}`"));
            let error = match TRIPLE.contains(&&*name) {
                true => error.hint("fields of triples stand inside `( … )*`"),
                false => error.suggest(&name, known.iter().copied()),
            };
            return Err(Box::new(error));
        }
        Ok(Piece::Field(name))
    }

    fn special(&mut self) -> Result<Piece, Error> {
        let special = self.special;
        let (token, from, to) = self.until('>', "token")?;
        let token = token.to_owned();
        if !special.contains(&token) {
            let error = self.error(from, to, format!("`{token}` is not among the task's special tokens"));
            return Err(Box::new(error.suggest(&token, special.iter().map(String::as_str))));
        }
        Ok(Piece::Special(token))
    }
}
