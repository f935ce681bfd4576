//! Patterns of tensors' names: `*` stands for any part of one.

/// What each `*` stands for, where the name fits. Each takes as little as it can, but for the last.
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

/// The name fits.
pub fn fits(pattern: &str, name: &str) -> bool {
    parts(pattern, name).is_some()
}

/// `to` with what the `*` of `from` stand for in the name: `*.gamma`, `*.weight` and `ln.gamma` give `ln.weight`.
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
    fn patterns_fit_names() {
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
    fn names_are_changed_by_patterns() {
        assert_eq!(renamed("*.gamma", "*.weight", "h.0.ln.gamma").as_deref(), Some("h.0.ln.weight"));
        assert_eq!(renamed("a.*.b.*", "*.c.*", "a.1.b.2").as_deref(), Some("1.c.2"));
        assert_eq!(renamed("head", "table", "head").as_deref(), Some("table"));
        assert_eq!(renamed("*.gamma", "*.weight", "h.0.ln.beta"), None);
    }
}
