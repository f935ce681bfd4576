//! Messages for syntax errors, and the recovery after one.

use pest::error::{Error, ErrorVariant, InputLocation};

use super::Rule;
use crate::diagnostic::Diagnostic;
use crate::source::{FileId, Span};

/// The keywords that begin an item.
const ITEMS: &[&str] = &["import", "backbone", "method", "fn", "model", "tune", "task", "train"];

/// The keywords that cannot be names.
const RESERVED: &[&str] = &[
    "weight", "site", "if", "else", "for", "in", "output", "expose", "store", "after", "return", "require", "as", "of",
    "on", "and", "or", "not", "true", "false",
];

/// The diagnostic for a syntax error, and the byte at which it occurred.
pub(super) fn explain(file: FileId, text: &str, error: Error<Rule>) -> (Diagnostic, usize) {
    let at = match error.location {
        InputLocation::Pos(at) | InputLocation::Span((at, _)) => at,
    };
    let found = token(&text[at..]);
    let span = Span::new(file, at, at + found.len());
    if let (true, Some(open)) = (found.is_empty(), open_brackets(text, at).pop()) {
        let title = format!("this `{}` is never closed", &text[open..open + 1]);
        return (Diagnostic::error(Span::new(file, open, open + 1), title).label("opened here"), at);
    }
    let mut expected: Vec<&str> = match &error.variant {
        ErrorVariant::ParsingError { positives, .. } => positives.iter().filter_map(|&rule| describe(rule)).collect(),
        ErrorVariant::CustomError { .. } => vec![],
    };
    if found == "=" {
        expected.retain(|e| *e != "`(`");
    }
    expected.sort_unstable();
    expected.dedup();
    if expected.contains(&"an expression") {
        expected.retain(|e| !["a number", "a string", "`[`"].contains(e));
    }
    let expected = match &expected[..] {
        [] => String::new(),
        [one] => format!(": expected {one}"),
        [most @ .., last] if most.len() < 6 => format!(": expected {} or {last}", most.join(", ")),
        _ => String::new(),
    };
    let title = match found {
        "" => format!("unexpected end of file{expected}"),
        _ => format!("unexpected `{found}`{expected}"),
    };
    let diagnostic = Diagnostic::error(span, title).label(if found.is_empty() { "end of file" } else { "unexpected" });
    let diagnostic = match hint(text, at, found) {
        Some(hint) => diagnostic.hint(hint),
        None => diagnostic,
    };
    (diagnostic, at)
}

/// Advice for frequent mistakes.
fn hint(text: &str, at: usize, found: &str) -> Option<String> {
    let before = text[..at].trim_end();
    let line = before.rsplit('\n').next().unwrap_or("").trim_start();
    if found.starts_with('"') && text[at + 1..].lines().next().is_none_or(|rest| !rest.contains('"')) {
        return Some("the string is not closed on this line: add a `\"`".into());
    }
    if found == "#" {
        return Some("comments begin with `//`".into());
    }
    if found == ";" {
        return Some("statements need no `;`".into());
    }
    let open = open_brackets(text, at).pop();
    let head = open.map_or("", |open| text[..open].rsplit(['{', '}']).next().unwrap_or("").trim());
    let next = text[at + found.len()..].trim_start();
    let in_settings = token(head) == "train" || token(head) == "task";
    if found == "=" && open.is_some_and(|open| text[open..].starts_with('(')) {
        return Some("an argument is written `name: value`".into());
    }
    let word = before.rsplit(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).next().unwrap_or("");
    if found == "=" && RESERVED.contains(&word) {
        return Some(format!("`{word}` is a word of the language: use another name"));
    }
    if in_settings && next.starts_with('=') {
        return Some(format!("a setting is written `{found}: …`"));
    }
    let outermost = open_brackets(text, at).first().map_or("", |&open| text[..open].trim_end());
    if next.starts_with(':') && outermost.rsplit(char::is_whitespace).next() == Some("tune") {
        return Some("a method's block holds learning rates: `lr: …`, or of one weight `lr of B: …`".into());
    }
    if !in_settings && next.starts_with(':') && open.is_some() {
        return Some(format!("a variable is set with `{found} = …`"));
    }
    if found == "on" && line.starts_with("method") && !line.contains('(') {
        return Some(format!("parameters come first, if only `()`: `{line}() on …`"));
    }
    if found == "checkpoint" {
        return Some("a backbone begins with its `checkpoint` block".into());
    }
    if found == "'" {
        return Some("strings are written in double quotes".into());
    }
    if open.is_none() {
        let near = crate::diagnostic::nearest(found, ITEMS.iter().copied());
        return Some(match near {
            Some(near) => format!("did you mean `{near}`?"),
            None => "a file holds `import`, `backbone`, `method`, `fn`, `model`, `tune`, `task` and `train`".into(),
        });
    }
    None
}

/// The word or the single character at the start of `text`.
fn token(text: &str) -> &str {
    let word = text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(text.len());
    let sign = text.chars().next().map_or(0, char::len_utf8);
    &text[..word.max(sign)]
}

/// The name of a rule in an error message; `None` for rules that the message leaves out.
fn describe(rule: Rule) -> Option<&'static str> {
    Some(match rule {
        Rule::name | Rule::definition_name | Rule::arg_name | Rule::word => "a name",
        Rule::expr
        | Rule::conjunction
        | Rule::negation
        | Rule::comparison
        | Rule::sum
        | Rule::product
        | Rule::unary
        | Rule::postfix
        | Rule::group
        | Rule::call => "an expression",
        Rule::number => "a number",
        Rule::string => "a string",
        Rule::list => "`[`",
        Rule::args | Rule::params => "`(`",
        Rule::arg => "an argument",
        Rule::param => "a parameter",
        Rule::block | Rule::body | Rule::entries | Rule::settings => "`{`",
        Rule::setting => "a setting `key: value`",
        Rule::kw_on | Rule::on_kind => "`on KIND`",
        Rule::kw_at => "`at \"path\"`",
        Rule::kw_is => "`is`",
        Rule::free => "`free`",
        Rule::kw_in => "`in`",
        Rule::kw_as => "`as`",
        Rule::kw_of => "`of`",
        Rule::rates => "`{ lr: … }`",
        Rule::rate | Rule::kw_lr => "`lr: …`",
        Rule::kw_every | Rule::every => "`every KIND`",
        Rule::module_path => "a module such as `backbones.gpt2`",
        _ => return None,
    })
}

/// The start of the next item after byte `at`: a line that begins with the keyword of an item.
pub(super) fn next_item(text: &str, at: usize) -> Option<usize> {
    let mut start = at + text[at..].find('\n')? + 1;
    loop {
        let line = &text[start..];
        if ITEMS.iter().any(|word| token(line) == *word) {
            return Some(start);
        }
        start += line.find('\n')? + 1;
    }
}

/// `text` with all bytes before `end` replaced by spaces, so that offsets are unchanged.
pub(super) fn blank(text: &str, end: usize) -> String {
    let spaces = text[..end].bytes().map(|b| if b == b'\n' { '\n' } else { ' ' });
    spaces.collect::<String>() + &text[end..]
}

/// Rejects brackets that are nested too deeply, before the recursive parser sees them.
pub(super) fn check_nesting(file: FileId, text: &str, deepest: usize) -> Option<Diagnostic> {
    let mut depth = 0usize;
    for (at, opens) in brackets(text) {
        depth = if opens { depth + 1 } else { depth.saturating_sub(1) };
        if depth > deepest {
            let error =
                Diagnostic::error(Span::new(file, at, at + 1), format!("brackets are nested more than {deepest} deep"));
            return Some(error.hint("give the inner parts names"));
        }
    }
    None
}

/// The brackets that are open at byte `end`, outermost first.
fn open_brackets(text: &str, end: usize) -> Vec<usize> {
    let mut open = Vec::new();
    for (at, opens) in brackets(&text[..end]) {
        if opens {
            open.push(at);
        } else {
            open.pop();
        }
    }
    open
}

/// All brackets outside of strings and comments, and whether they open.
fn brackets(text: &str) -> impl Iterator<Item = (usize, bool)> {
    let (mut quoted, mut comment) = (false, false);
    text.bytes().enumerate().filter_map(move |(at, byte)| {
        match byte {
            b'\n' => (quoted, comment) = (false, false),
            _ if comment => {}
            b'"' => quoted = !quoted,
            _ if quoted => {}
            b'/' if text.as_bytes().get(at + 1) == Some(&b'/') => comment = true,
            b'(' | b'[' | b'{' => return Some((at, true)),
            b')' | b']' | b'}' => return Some((at, false)),
            _ => {}
        }
        None
    })
}
