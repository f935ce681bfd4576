//! `{% generation %}` … `{% endgeneration %}`, the marks around what the assistant says.
//!
//! They are rewritten as a `call` block, which is a block as they are, so that whitespace around their tags is treated
//! alike, and which has its own scope as they have in transformers. The called function puts a character before and one
//! behind the text; both are taken out again.

use std::ops::Range;

/// The function that is called with what a mark holds.
pub const FUNCTION: &str = "generation_mark";

/// The template with its marks as calls, and whether it has any.
pub fn rewrite(source: &str) -> (String, bool) {
    let (mut out, mut rest, mut marked) = (String::with_capacity(source.len() + 64), source, false);
    let mut raw = false;
    while let Some(at) = rest.find('{') {
        let (before, tag) = rest.split_at(at);
        out += before;
        let statement = tag.starts_with("{%");
        let length = match statement || tag.starts_with("{{") && !raw {
            _ if tag.starts_with("{#") && !raw => tag.find("#}").map_or(tag.len(), |end| end + 2),
            true => length(tag, if statement { "%}" } else { "}}" }),
            false => 1,
        };
        let (whole, after) = tag.split_at(length);
        let name = if statement { word(whole) } else { 0..0 };
        let call = match &whole[name.clone()] {
            "endraw" => {
                raw = false;
                None
            }
            // Inside of `raw` a tag is text.
            _ if raw => {
                out += "{";
                rest = &tag[1..];
                continue;
            }
            "raw" => {
                raw = true;
                None
            }
            "generation" => Some(format!("call {FUNCTION}()")),
            "endgeneration" => Some("endcall".to_owned()),
            _ => None,
        };
        match call {
            Some(call) => {
                marked = true;
                out += &whole[..name.start];
                out += &call;
                out += &whole[name.end..];
            }
            None => out += whole,
        }
        rest = after;
    }
    (out + rest, marked)
}

/// How long a tag is. What is quoted in it does not end it.
fn length(tag: &str, end: &str) -> usize {
    let (mut quote, mut escaped) = (None, false);
    for (at, c) in tag.char_indices().skip(2) {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if tag[at..].starts_with(end) => return at + end.len(),
            None if c == '\'' || c == '"' => quote = Some(c),
            None => {}
        }
    }
    tag.len()
}

/// Where the first word of a block tag is.
fn word(tag: &str) -> Range<usize> {
    let inner = tag[2..].trim_start_matches(['-', '+']).trim_start();
    let start = tag.len() - inner.len();
    let end = inner.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inner.len());
    start..start + end
}

/// Takes the two characters out of a text, and says what stood between them. Of marks in each other the outer one counts.
pub fn take(marked: &str, open: char, close: char) -> (String, Vec<Range<usize>>) {
    let (mut text, mut ranges, mut depth, mut start) = (String::with_capacity(marked.len()), vec![], 0u32, 0);
    for c in marked.chars() {
        if c == open {
            if depth == 0 {
                start = text.len();
            }
            depth += 1;
        } else if c == close {
            depth = depth.saturating_sub(1);
            if depth == 0 {
                ranges.push(start..text.len());
            }
        } else {
            text.push(c);
        }
    }
    (text, ranges)
}
