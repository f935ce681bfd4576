//! The lexer: PTX text to tokens.

/// A token and its line number, from 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Token<'a> {
    pub kind: Kind<'a>,
    pub line: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind<'a> {
    /// A name, directive or opcode with its modifiers: `%r1`, `.reg`, `ld.global.v4.b32`.
    Word(&'a str),
    Integer(u64),
    /// An f64; for the syntax `0f…` it is the exact value of that f32.
    Float(f64),
    String(&'a str),
    Symbol(char),
}

/// The tokens of a text, or a line number and a message.
pub fn tokens(text: &str) -> Result<Vec<Token<'_>>, (usize, String)> {
    let bytes = text.as_bytes();
    let (mut at, mut line) = (0, 1);
    let mut out = vec![];
    while at < bytes.len() {
        let rest = &text[at..];
        let c = bytes[at];
        let (kind, length) = match c {
            b'\n' => {
                line += 1;
                at += 1;
                continue;
            }
            _ if c.is_ascii_whitespace() || c == 0 => {
                at += 1;
                continue;
            }
            b'/' if rest.starts_with("//") => {
                at += rest.find('\n').unwrap_or(rest.len());
                continue;
            }
            b'/' if rest.starts_with("/*") => {
                let end = rest.find("*/").ok_or((line, "a comment without an end".to_string()))?;
                line += rest[..end].matches('\n').count();
                at += end + 2;
                continue;
            }
            b'"' => {
                let end = rest[1..].find('"').ok_or((line, "a string without an end".to_string()))?;
                (Kind::String(&rest[1..=end]), end + 2)
            }
            b'0'..=b'9' => {
                let length = number_length(rest);
                (number(&rest[..length]).ok_or((line, format!("`{}` is no number", &rest[..length])))?, length)
            }
            _ if is_word(c) => {
                let length = word_length(rest);
                (Kind::Word(&rest[..length]), length)
            }
            _ if c.is_ascii() => (Kind::Symbol(c as char), 1),
            _ => return Err((line, "a character that PTX does not have".into())),
        };
        out.push(Token { kind, line });
        at += length;
    }
    Ok(out)
}

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

/// `::` belongs to a word if the word continues behind it (`.L2::128B`); a single `:` ends a label.
fn word_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut n = 0;
    while n < bytes.len() {
        if is_word(bytes[n]) {
            n += 1;
        } else if text[n..].starts_with("::") && bytes.get(n + 2).is_some_and(|&c| is_word(c)) {
            n += 2;
        } else {
            break;
        }
    }
    n
}

/// Length of a number: digits, letters, and the sign of a decimal exponent.
fn number_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let decimal = !text.starts_with("0x") && !text.starts_with("0X") && !text.starts_with("0f");
    let mut n = 0;
    while n < bytes.len() {
        let exponent = n > 0 && matches!(bytes[n - 1], b'e' | b'E');
        let sign = decimal && exponent && matches!(bytes[n], b'+' | b'-');
        if !(bytes[n].is_ascii_alphanumeric() || bytes[n] == b'.' || sign) {
            break;
        }
        n += 1;
    }
    n
}

fn number(text: &str) -> Option<Kind<'static>> {
    let lower = text.to_ascii_lowercase();
    if let Some(bits) = lower.strip_prefix("0f").filter(|digits| digits.len() == 8) {
        return Some(Kind::Float(f32::from_bits(u32::from_str_radix(bits, 16).ok()?).into()));
    }
    if let Some(bits) = lower.strip_prefix("0d").filter(|digits| digits.len() == 16) {
        return Some(Kind::Float(f64::from_bits(u64::from_str_radix(bits, 16).ok()?)));
    }
    if let Some(digits) = lower.strip_prefix("0x") {
        return u64::from_str_radix(digits.trim_end_matches('u'), 16).ok().map(Kind::Integer);
    }
    if let Some(digits) = lower.strip_prefix("0b") {
        return u64::from_str_radix(digits.trim_end_matches('u'), 2).ok().map(Kind::Integer);
    }
    if lower.contains(['.', 'e']) {
        return lower.parse().ok().map(Kind::Float);
    }
    let digits = lower.trim_end_matches('u');
    if digits.len() > 1 && digits.starts_with('0') {
        return u64::from_str_radix(digits, 8).ok().map(Kind::Integer);
    }
    digits.parse().ok().map(Kind::Integer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(text: &str) -> Vec<Kind<'_>> {
        tokens(text).unwrap().into_iter().map(|token| token.kind).collect()
    }

    #[test]
    fn words_keep_their_modifiers() {
        use Kind::*;
        assert_eq!(
            kinds("@!%p1 cp.async.cg.shared.global.L2::128B [%rd1+-16], 0x10U; // no\n$L_1: /* \n */ bra.uni\t$L_1;"),
            vec![
                Symbol('@'),
                Symbol('!'),
                Word("%p1"),
                Word("cp.async.cg.shared.global.L2::128B"),
                Symbol('['),
                Word("%rd1"),
                Symbol('+'),
                Symbol('-'),
                Integer(16),
                Symbol(']'),
                Symbol(','),
                Integer(16),
                Symbol(';'),
                Word("$L_1"),
                Symbol(':'),
                Word("bra.uni"),
                Word("$L_1"),
                Symbol(';'),
            ]
        );
    }

    #[test]
    fn numbers() {
        use Kind::*;
        assert_eq!(
            kinds("0f3F800000 0d3FF0000000000000 0x1F 017 12U 1.5e-3 0b101"),
            vec![Float(1.0), Float(1.0), Integer(31), Integer(15), Integer(12), Float(1.5e-3), Integer(5)]
        );
        assert_eq!(tokens("\n\n0xyz").unwrap_err().0, 3);
    }
}
