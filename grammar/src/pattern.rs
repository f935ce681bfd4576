//! Patterns of tensor names, in which `*` matches any part of a name.

/// The parts of `name` that the `*` of the pattern match; `None` if the name does not match. Each `*` but the last
/// matches as little as possible.
pub fn parts<'a>(pattern: &str, name: &'a str) -> Option<Vec<&'a str>> {
    let mut literals = pattern.split('*');
    let mut rest = name.strip_prefix(literals.next().unwrap_or(""))?;
    let mut literals: Vec<&str> = literals.collect();
    let Some(last) = literals.pop() else { return rest.is_empty().then(Vec::new) };
    let mut parts = vec![];
    for literal in literals {
        let at = rest.find(literal)?;
        parts.push(&rest[..at]);
        rest = &rest[at + literal.len()..];
    }
    parts.push(rest.strip_suffix(last)?);
    Some(parts)
}

/// Whether the name matches the pattern.
pub fn fits(pattern: &str, name: &str) -> bool {
    parts(pattern, name).is_some()
}

/// Substitutes the parts that the `*` of `from` match in the name into the `*` of `to`: `*.gamma`, `*.weight` and
/// `ln.gamma` give `ln.weight`.
pub fn renamed(from: &str, to: &str, name: &str) -> Option<String> {
    let mut parts = parts(from, name)?.into_iter();
    let mut literals = to.split('*');
    let mut out = literals.next().unwrap_or("").to_owned();
    for literal in literals {
        out += parts.next()?;
        out += literal;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pattern_matching() {
        for (pattern, name, matches) in [
            ("*", "a.b", true),
            ("*.bias", "h.0.ln_1.bias", true),
            ("*.bias", "h.0.ln_1.weight", false),
            ("h.*.ln_*.bias", "h.0.ln_1.bias", true),
            ("h.*.ln_*.bias", "h.0.attn.bias", false),
            ("h.0", "h.0", true),
            ("h.0", "h.01", false),
            ("ab*b", "ab", false),
            ("", "a", false),
        ] {
            assert_eq!(fits(pattern, name), matches, "{pattern} on {name}");
        }
    }

    #[test]
    fn pattern_substitution() {
        assert_eq!(renamed("*.gamma", "*.weight", "h.0.ln.gamma").as_deref(), Some("h.0.ln.weight"));
        assert_eq!(renamed("a.*.b.*", "*.c.*", "a.1.b.2").as_deref(), Some("1.c.2"));
        assert_eq!(renamed("head", "table", "head").as_deref(), Some("table"));
        assert_eq!(renamed("*.gamma", "*.weight", "h.0.ln.beta"), None);
    }
}
