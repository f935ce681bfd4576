//! The tags `{% generation %}` … `{% endgeneration %}`, with which a template marks the assistant's text.
//!
//! minijinja does not know them, so they are rewritten to a `call` block. That is a block with a scope of its own, as
//! the tags are in transformers, and whitespace around its tags is controlled in the same way. The called function
//! writes a marker character before and after the text, and [`strip_markers`] removes both again.

use std::ops::Range;

/// The name of the function that the `call` block calls with the marked text.
pub const FUNCTION: &str = "generation_mark";

/// The template with its generation tags rewritten to `call` blocks, and whether it has any.
pub fn rewrite(source: &str) -> (String, bool) {
    let (mut out, mut rest, mut marked) = (String::with_capacity(source.len() + 64), source, false);
    let mut raw = false;
    while let Some(at) = rest.find('{') {
        let (before, tag) = rest.split_at(at);
        out += before;
        let statement = tag.starts_with("{%");
        let length = match statement || tag.starts_with("{{") && !raw {
            _ if tag.starts_with("{#") && !raw => tag.find("#}").map_or(tag.len(), |end| end + 2),
            true => tag_length(tag, if statement { "%}" } else { "}}" }),
            false => 1,
        };
        let (whole, after) = tag.split_at(length);
        let name = if statement { first_word(whole) } else { 0..0 };
        let call = match &whole[name.clone()] {
            "endraw" => {
                raw = false;
                None
            }
            // Inside a `raw` block, tags are text.
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

/// The length in bytes of a tag up to `end`, ignoring `end` inside quotes.
fn tag_length(tag: &str, end: &str) -> usize {
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

/// The byte range of the first word of a block tag.
fn first_word(tag: &str) -> Range<usize> {
    let inner = tag[2..].trim_start_matches(['-', '+']).trim_start();
    let start = tag.len() - inner.len();
    let end = inner.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inner.len());
    start..start + end
}

/// Removes the marker characters from a text. Returns the text and the byte ranges that were between them. Of nested
/// marks only the outermost counts.
pub fn strip_markers(marked: &str, open: char, close: char) -> (String, Vec<Range<usize>>) {
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
