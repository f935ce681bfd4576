//! Parses the template of a generation task: special tokens, literal text, columns of a row, and repetitions over the
//! items of a list. A column or list may be truncated at either end.

use crate::ast::Text;
use crate::diagnostic::Diagnostic;
use crate::model::{Extent, Piece, item_name};
use crate::source::Span;

type Error = Box<Diagnostic>;

/// A checked template.
pub(super) struct Template {
    pub pieces: Vec<Piece>,
    /// The piece after which the loss begins, as [`Piece::literal_source`] returns it.
    pub target: String,
}

/// Parses a template such as `<bos> (<subject> {subject} …)* 'Answer: ' {text} <eos>`.
pub(super) fn parse(template: &Text, special: &[String], target: &Text) -> Result<Template, Error> {
    let pieces = Reader { text: &template.text, span: template.span, special, at: 0 }.pieces(false)?;
    // Literals are compared by content, so that different escapes of the same text are equal.
    let wanted = match target.text.starts_with('\'') {
        true => Reader { text: &target.text, span: target.span, special, at: 0 }.literal()?.literal_source(),
        false => Some(target.text.clone()),
    };
    let Some(at) = pieces.iter().position(|p| p.literal_source().is_some_and(|p| Some(p) == wanted)) else {
        let error = Diagnostic::error(target.span, format!("the target `{}` is not in the template", target.text));
        let known: Vec<String> = pieces.iter().filter_map(Piece::literal_source).collect();
        let error = error.related(template.span, "outside of `( … )*`");
        return Err(Box::new(error.suggest(&target.text, known.iter().map(String::as_str))));
    };
    if !pieces[at..].iter().any(Piece::varies) {
        let title = format!("no `{{field}}` follows the target `{}`: there is nothing to learn", target.text);
        return Err(Box::new(Diagnostic::error(template.span, title)));
    }
    Ok(Template { target: wanted.unwrap_or_default(), pieces })
}

/// The first list of `each` whose items the template does not read.
pub(super) fn unread_list<'n>(pieces: &[Piece], each: &'n [String]) -> Option<&'n String> {
    let is_of = |piece: &Piece, item: &str| match piece {
        Piece::Field(name) => name.strip_prefix(item).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')),
        _ => false,
    };
    let any = |item: &str| {
        pieces.iter().any(|piece| match piece {
            Piece::Cut(_, piece) => is_of(piece, item),
            piece => is_of(piece, item),
        })
    };
    each.iter().find(|name| !any(item_name(name)))
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
                '\'' => pieces.push(self.literal()?),
                '{' => pieces.push(self.field()?),
                '<' => pieces.push(self.special()?),
                '(' if inside => return Err(Box::new(self.error(start, start + 1, "`( … )*` is nested in another"))),
                '(' => {
                    self.at += 1;
                    let extent = self.extent()?;
                    let before = self.at;
                    let column = self.column();
                    if extent.is_some() && column.is_none() {
                        let error =
                            self.error(start, before, "this repetition does not name the list that it truncates");
                        return Err(Box::new(error.hint("such as `(last 2 of turns: {question} {answer})*`")));
                    }
                    let repeated = self.pieces(true)?;
                    if !self.text[self.at..].starts_with(")*") {
                        let error = self.error(start, start + 1, "this `(` has no `)*`");
                        return Err(Box::new(error.hint("`( … )*` repeats for each item of a list")));
                    }
                    self.at += 2;
                    if !repeated.iter().any(Piece::varies) {
                        let error = self.error(start, self.at, "this `( … )*` holds no `{field}` of its items");
                        return Err(Box::new(error.hint("such as `(turns: {question} {answer})*`")));
                    }
                    let piece = match column {
                        Some(column) => Piece::Each(column, repeated),
                        None => Piece::Repeat(repeated),
                    };
                    pieces.push(match extent {
                        Some(extent) => Piece::Cut(extent, Box::new(piece)),
                        None => piece,
                    });
                }
                ')' if inside => return Ok(pieces),
                // A declared token such as `[SEP]`, which has no angle brackets.
                _ if self.declared().is_some() => pieces.push(self.special()?),
                other => {
                    let error =
                        self.error(start, start + other.len_utf8(), format!("`{other}` is not allowed in a template"));
                    return Err(Box::new(error.hint("it holds `<tokens>`, `'text'`, `{fields}` and `( … )*`")));
                }
            }
        }
        Ok(pieces)
    }

    /// The text up to and including `end`, with its range.
    fn until(&mut self, end: char, what: &str) -> Result<(&str, usize, usize), Error> {
        let start = self.at;
        let Some(length) = self.text[start..].find(end) else {
            return Err(Box::new(self.error(start, start + 1, format!("this {what} has no `{end}`"))));
        };
        self.at = start + length + 1;
        Ok((&self.text[start..self.at], start, self.at))
    }

    fn field(&mut self) -> Result<Piece, Error> {
        let (text, from, to) = self.until('}', "field")?;
        let name = text[1..text.len() - 1].trim().to_owned();
        if name.is_empty() || name.contains('{') {
            let error = self.error(from, to, "this field names no column");
            return Err(Box::new(error.hint("such as `{text}`")));
        }
        // A truncated field: `first 400 tokens of story`.
        let mut words = name.splitn(5, ' ');
        let (end, count) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let digits = !count.is_empty() && count.chars().all(|c| c.is_ascii_digit());
        if !matches!(end, "first" | "last") || !digits {
            return Ok(Piece::Field(name));
        }
        let (Some("tokens" | "token"), Some("of"), Some(column)) = (words.next(), words.next(), words.next()) else {
            let error = self.error(from, to, "a field is cut to a number of tokens");
            return Err(Box::new(error.hint(format!("such as `{{{end} {count} tokens of text}}`"))));
        };
        let piece = Piece::Field(column.trim().to_owned());
        Ok(Piece::Cut(self.parse_extent(end, count, from, to)?, Box::new(piece)))
    }

    /// The prefix `last 2 of` in `(last 2 of turns: … )*`.
    fn extent(&mut self) -> Result<Option<Extent>, Error> {
        let rest = self.text[self.at..].trim_start();
        let start = self.text.len() - rest.len();
        let mut words = rest.splitn(4, ' ');
        let (Some(end @ ("first" | "last")), Some(count), Some("of")) = (words.next(), words.next(), words.next())
        else {
            return Ok(None);
        };
        if count.is_empty() || !count.chars().all(|c| c.is_ascii_digit()) {
            return Ok(None);
        }
        self.at = start + end.len() + count.len() + "  of".len();
        self.parse_extent(end, count, start, self.at).map(Some)
    }

    /// Parses the count after `first` or `last`.
    fn parse_extent(&self, end: &str, count: &str, from: usize, to: usize) -> Result<Extent, Error> {
        match count.parse::<u64>() {
            Ok(count) if count > 0 && end == "first" => Ok(Extent::First(count)),
            Ok(count) if count > 0 => Ok(Extent::Last(count)),
            _ => Err(Box::new(self.error(from, to, format!("`{end}` takes at least 1, found {count}")))),
        }
    }

    /// The prefix `turns:` in `(turns: … )*`.
    fn column(&mut self) -> Option<String> {
        let rest = self.text[self.at..].trim_start();
        self.at = self.text.len() - rest.len();
        let length = rest.find(|c: char| !(c.is_alphanumeric() || "_-.".contains(c)))?;
        let (name, after) = rest.split_at(length);
        let after = after.trim_start().strip_prefix(':').filter(|_| !name.is_empty() && self.declared().is_none())?;
        self.at = self.text.len() - after.len();
        Some(name.to_owned())
    }

    /// The longest of the task's special tokens at the current position.
    fn declared(&self) -> Option<&String> {
        let rest = &self.text[self.at..];
        self.special.iter().filter(|t| !t.is_empty() && rest.starts_with(t.as_str())).max_by_key(|t| t.len())
    }

    fn special(&mut self) -> Result<Piece, Error> {
        let (token, from, to) = self.token()?;
        let rest = self.text[self.at..].trim_start();
        let Some(kind) = rest.strip_prefix("as ") else { return Ok(Piece::Special(token)) };
        self.at = self.text.len() - kind.trim_start().len();
        if self.declared().is_none() && !self.text[self.at..].starts_with('<') {
            let error = self.error(from, to, format!("`as` gives `{token}` the type of another special token"));
            let other = self.special.iter().find(|other| **other != token).unwrap_or(&token);
            return Err(Box::new(error.hint(format!("such as `{token} as {other}`"))));
        }
        let (kind, ..) = self.token()?;
        Ok(Piece::As(token, kind))
    }

    /// A special token of the task, with its range.
    fn token(&mut self) -> Result<(String, usize, usize), Error> {
        if let Some(token) = self.declared().cloned() {
            let from = self.at;
            self.at += token.len();
            return Ok((token, from, self.at));
        }
        let special = self.special;
        let (token, from, to) = self.until('>', "token")?;
        let token = token.to_owned();
        let error = self.error(from, to, format!("`{token}` is not among the task's special tokens"));
        let error = error.suggest(&token, special.iter().map(String::as_str));
        Err(Box::new(error.note(format!(
            "list all tokens, new ones and those of the model's tokenizer: `special: [\"{token}\"]`; write text in \
             single quotes"
        ))))
    }

    /// A literal `'text'` with the escapes `\n`, `\t`, `\'` and `\\`.
    fn literal(&mut self) -> Result<Piece, Error> {
        let start = self.at;
        let mut text = String::new();
        let mut chars = self.text[start + 1..].char_indices().map(|(i, c)| (start + 1 + i, c));
        while let Some((at, next)) = chars.next() {
            let written = match next {
                '\'' if text.is_empty() => {
                    let error = self.error(start, at + 1, "this text is empty");
                    return Err(Box::new(error.hint("leave it out")));
                }
                '\'' => {
                    self.at = at + 1;
                    return Ok(Piece::Literal(text));
                }
                '\\' => match chars.next() {
                    Some((_, 'n')) => '\n',
                    Some((_, 't')) => '\t',
                    Some((_, same @ ('\'' | '\\'))) => same,
                    other => {
                        let end = other.map_or(at + 1, |(i, c)| i + c.len_utf8());
                        let error = self.error(at, end, format!("`{}` is not an escape sequence", &self.text[at..end]));
                        return Err(Box::new(error.hint("known here: `\\n`, `\\t`, `\\'`, `\\\\`")));
                    }
                },
                plain => plain,
            };
            text.push(written);
        }
        Err(Box::new(self.error(start, start + 1, "this text has no closing `'`")))
    }
}
