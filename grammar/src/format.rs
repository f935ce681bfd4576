//! The formatter: two spaces of indentation for each level, normalised spaces between tokens, at most one blank line in
//! a row.
//!
//! It works on tokens. Line breaks stay where the author put them, and comments are tokens, so that nothing is lost.
//! Formatting is idempotent.

/// Formats a text that parses.
pub(crate) fn layout(text: &str) -> String {
    let mut out = String::new();
    let mut stack: Vec<Bracket> = Vec::new();
    let mut blank = false;
    let mut previous: Vec<Token> = Vec::new();
    for (number, tokens) in lines(text).into_iter().enumerate() {
        if tokens.is_empty() {
            blank = true;
            continue;
        }
        let closers = tokens.iter().take_while(|t| t.closes()).count();
        let opens_block = previous.last().is_some_and(|t| t.opens());
        if blank && !out.is_empty() && !opens_block && closers == 0 {
            out.push('\n');
        }
        blank = false;
        stack.truncate(stack.len().saturating_sub(closers));
        let level = levels(&stack) + usize::from(closers == 0 && continues(&previous, &tokens));
        out.push_str(&"  ".repeat(level));
        for (i, token) in tokens.iter().enumerate() {
            if i > 0 && spaced(&tokens[..i], token, &stack) {
                out.push(' ');
            }
            out.push_str(token.text);
            if token.opens() {
                stack.push(Bracket { line: number, square: token.text == "[" });
            } else if token.closes() && i >= closers {
                stack.pop();
            }
        }
        out.push('\n');
        if tokens.iter().any(|t| t.kind != Kind::Comment) {
            previous = tokens.into_iter().filter(|t| t.kind != Kind::Comment).collect();
        }
    }
    out
}

/// The tokens of each line. If a `{` closes on a later line, a line break follows the `{`, and another precedes its
/// `}`.
fn lines(text: &str) -> Vec<Vec<Token<'_>>> {
    let lines: Vec<Vec<Token>> = text.lines().map(tokens).collect();
    let mut open = Vec::new();
    // The tokens that start a new line: (line, token).
    let mut breaks = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        for (i, token) in line.iter().enumerate() {
            if token.is_sign(&["{"]) {
                open.push((number, i));
            } else if token.is_sign(&["}"])
                && let Some((from, at)) = open.pop()
                && from != number
            {
                let comment = lines[from].get(at + 1).is_some_and(|t| t.kind == Kind::Comment);
                breaks.extend([(number, i), (from, at + 1 + usize::from(comment))]);
            }
        }
    }
    breaks.sort_unstable();
    let mut broken = Vec::new();
    for (number, line) in lines.into_iter().enumerate() {
        let mut rest = &line[..];
        let mut taken = 0;
        for (_, at) in breaks.iter().filter(|(n, at)| *n == number && (1..line.len()).contains(at)) {
            let (before, after) = rest.split_at(at - taken);
            if !before.is_empty() {
                broken.push(before.to_vec());
            }
            (rest, taken) = (after, *at);
        }
        broken.push(rest.to_vec());
    }
    broken
}

/// An open bracket and its line.
struct Bracket {
    line: usize,
    square: bool,
}

/// The indentation level. Brackets that open on the same line indent once.
fn levels(stack: &[Bracket]) -> usize {
    let mut lines: Vec<usize> = stack.iter().map(|b| b.line).collect();
    lines.dedup();
    lines.len()
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Word,
    Number,
    String,
    Sign,
    Comment,
}

#[derive(Clone, Copy)]
struct Token<'a> {
    kind: Kind,
    text: &'a str,
}

/// Words that separate operands or precede one.
const OPERATOR_WORDS: &[&str] = &[
    "and", "or", "not", "if", "else", "in", "of", "as", "on", "return", "require", "expose", "store", "rows", "layers",
    "only", "except", "longest", "skip", "is",
];

impl Token<'_> {
    fn opens(&self) -> bool {
        self.kind == Kind::Sign && matches!(self.text, "(" | "[" | "{")
    }
    fn closes(&self) -> bool {
        self.kind == Kind::Sign && matches!(self.text, ")" | "]" | "}")
    }
    fn is_sign(&self, signs: &[&str]) -> bool {
        self.kind == Kind::Sign && signs.contains(&self.text)
    }
    /// Whether an operand ends with this token. A bracket after an operand is a call or an index, and a minus is a
    /// subtraction.
    fn ends_operand(&self) -> bool {
        match self.kind {
            Kind::Word => !OPERATOR_WORDS.contains(&self.text),
            Kind::Sign => matches!(self.text, ")" | "]"),
            _ => true,
        }
    }
    fn is_binary(&self) -> bool {
        let signs = ["+", "-", "*", "/", "%", "@", "==", "!=", "<=", ">=", "<", ">", "=", "~"];
        self.is_sign(&signs) || self.kind == Kind::Word && matches!(self.text, "and" | "or")
    }
}

/// Whether the line continues the statement of the previous line.
fn continues(previous: &[Token], line: &[Token]) -> bool {
    let first = &line[0];
    let goes_on = first.is_binary() || first.kind == Kind::Word && matches!(first.text, "on" | "as" | "of" | "from");
    goes_on && !previous.is_empty() || previous.last().is_some_and(Token::is_binary)
}

/// Whether a space separates `token` from the tokens before it on the line.
fn spaced(before: &[Token], token: &Token, stack: &[Bracket]) -> bool {
    let Some(last) = before.last() else { return false };
    let in_square = stack.last().is_some_and(|b| b.square);
    if token.kind == Kind::Comment {
        return true;
    }
    if last.is_sign(&["{"]) || token.is_sign(&["}"]) {
        return !(last.is_sign(&["{"]) && token.is_sign(&["}"]));
    }
    if last.is_sign(&["(", "[", "..", "."]) || token.is_sign(&[")", "]", ",", "..", "."]) {
        return false;
    }
    if token.is_sign(&[":"]) {
        return last.is_sign(&[","]);
    }
    if last.is_sign(&[":"]) {
        return !in_square;
    }
    if token.is_sign(&["(", "["]) {
        return !last.ends_operand() || last.kind == Kind::String;
    }
    // A minus after anything but an operand is the sign of the next token.
    if last.is_sign(&["-"]) {
        return before.len() >= 2 && before[before.len() - 2].ends_operand();
    }
    true
}

fn tokens(line: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut rest = line.trim();
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let (kind, length) = if rest.starts_with("//") {
            (Kind::Comment, rest.len())
        } else if first == '"' {
            (Kind::String, rest[1..].find('"').map_or(rest.len(), |end| end + 2))
        } else if first.is_ascii_digit() {
            (Kind::Number, number(rest))
        } else if is_word(first) {
            (Kind::Word, rest.find(|c| !is_word(c)).unwrap_or(rest.len()))
        } else {
            let double = ["..", "==", "!=", "<=", ">="].iter().any(|s| rest.starts_with(s));
            (Kind::Sign, if double { 2 } else { first.len_utf8() })
        };
        tokens.push(Token { kind, text: rest[..length].trim_end() });
        rest = rest[length..].trim_start();
    }
    tokens
}

/// The length of the number at the start of `text`. The dots of a range `0..6` are not part of the number.
fn number(text: &str) -> usize {
    let bytes = text.as_bytes();
    let digits = |mut at: usize| {
        while bytes.get(at).is_some_and(|b| b.is_ascii_digit() || *b == b'_') {
            at += 1;
        }
        at
    };
    let mut end = digits(0);
    if bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) {
        end = digits(end + 1);
    }
    if matches!(bytes.get(end), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
        if bytes.get(end + 1 + sign).is_some_and(u8::is_ascii_digit) {
            end = digits(end + 1 + sign);
        }
    }
    end
}
