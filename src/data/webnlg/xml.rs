//! Reads the corpus's XML: `<benchmark><entries><entry category="…">`, with `<modifiedtripleset>` and `<lex
//! comment="good">`.

use roxmltree::{Document, Error, Node, ParsingOptions};

use super::super::rows::{Fault, Location};
use super::{Entry, Lexicalisation, Object, Triple};

const FORM: &str = "a WebNLG file in XML is <benchmark><entries><entry category=\"…\"><modifiedtripleset><mtriple>subject | \
                    property | object</mtriple>…</modifiedtripleset><lex comment=\"good\">text</lex>…</entry>…";

/// The entries of a document, with the lines on which they begin.
pub fn parse(text: &str) -> Result<Vec<(Location, Entry)>, Fault> {
    let options = ParsingOptions { allow_dtd: false, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options).map_err(|error| {
        let at = match (&error, error.pos()) {
            // The library gives no position for these errors.
            (Error::UnclosedRootNode | Error::NoRootNode, _) => Location::Line(text.lines().count().max(1)),
            (_, pos) => Location::Column { line: pos.row as usize, column: pos.col as usize },
        };
        Fault::fatal(at, describe_error(&error))
    })?;
    let mut lines = Lines { text, line: 1, at: 0 };
    let root = document.root_element();
    let name = root.tag_name().name();
    if name != "benchmark" {
        let message = format!("its root is `<{name}>`, and of XML only WebNLG's is read here\n{FORM}");
        return Err(Fault::fatal(lines.of(&root), message));
    }
    let entries = root.children().filter(|node| node.has_tag_name("entries")).flat_map(|entries| entries.children());
    entries.filter(Node::is_element).map(|node| entry(&node, lines.of(&node))).collect()
}

fn entry(node: &Node, at: Location) -> Result<(Location, Entry), Fault> {
    let fault = |message: String| Err(Fault::fatal(at.clone(), format!("{message}\n{FORM}")));
    if !node.has_tag_name("entry") {
        return fault(format!("`<{}>` stands where an `<entry>` is expected", node.tag_name().name()));
    }
    let category = node.attribute("category").unwrap_or_default().to_owned();
    let (mut lexicalisations, mut modifiedtripleset, mut sets) = (vec![], vec![], 0);
    for child in node.children().filter(Node::is_element) {
        match child.tag_name().name() {
            "lex" => {
                let Some(lex) = text_of(&child) else { return fault("a `<lex>` holds other elements".into()) };
                let Some(comment) = child.attribute("comment") else {
                    return fault("a `<lex>` has no `comment`".into());
                };
                lexicalisations.push(Object(Lexicalisation { comment: comment.into(), lex }));
            }
            "modifiedtripleset" => {
                sets += 1;
                for triple in child.children().filter(Node::is_element) {
                    let text = text_of(&triple).filter(|_| triple.has_tag_name("mtriple"));
                    let Some(text) = text else {
                        return fault("a `<modifiedtripleset>` holds `<mtriple>` alone".into());
                    };
                    let parts: Vec<&str> = text.split('|').map(str::trim).collect();
                    let [subject, property, object] = parts[..] else {
                        let message =
                            format!("an `<mtriple>` is three texts with `|` between them, found `{}`", text.trim());
                        return fault(message);
                    };
                    let [subject, property, object] = [subject, property, object].map(str::to_owned);
                    modifiedtripleset.push(Object(Triple { subject, property, object }));
                }
            }
            // Other elements are ignored: the original DBpedia triples, and links to DBpedia.
            _ => {}
        }
    }
    if sets != 1 {
        return fault(format!("this entry has {sets} of `<modifiedtripleset>`, where one is expected"));
    }
    Ok((at, Entry { category, lexicalisations, modifiedtripleset }))
}

/// The text of an element without child elements.
fn text_of(node: &Node) -> Option<String> {
    let parts = node.children().filter(|child| !child.is_comment());
    parts.map(|child| if child.is_text() { child.text() } else { None }).collect()
}

/// The message for a document that is not well-formed, without the position.
fn describe_error(error: &Error) -> String {
    match error {
        Error::DtdDetected => {
            "it declares a document type, which may bring in other files; remove the `<!DOCTYPE …>`".into()
        }
        Error::MalformedEntityReference(_) => "a `&` must be written `&amp;` in XML".into(),
        Error::UnknownEntityReference(name, _) => {
            format!("`&{name};` is not declared; write the character itself, or `&amp;` for a `&`")
        }
        Error::UnclosedRootNode | Error::NoRootNode => "the file ends inside the document; is it complete?".into(),
        Error::UnexpectedCloseTag(expected, found, _) => {
            format!(
                "`</{found}>` stands where `</{expected}>` is expected; close each element inside the one around it"
            )
        }
        other => {
            let message = other.to_string();
            let message = message.rsplit_once(" at ").map_or(&message[..], |(message, _)| message);
            format!("XML that is not well-formed: {message}; escape `<` as `&lt;` and `&` as `&amp;` in texts")
        }
    }
}

/// Counts the lines of a text incrementally.
struct Lines<'t> {
    text: &'t str,
    line: usize,
    at: usize,
}

impl Lines<'_> {
    /// The line on which a node begins. Nodes have to be passed in document order.
    fn of(&mut self, node: &Node) -> Location {
        let start = node.range().start;
        self.line += self.text.as_bytes()[self.at..start].iter().filter(|&&byte| byte == b'\n').count();
        self.at = start;
        Location::Line(self.line)
    }
}
