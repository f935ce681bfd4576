//! Errors in specs: plain [`Diagnostic`] values, which ariadne renders.

use std::fmt;
use std::ops::Range;

use ariadne::{CharSet, Color, Config, IndexType, Label, Report, ReportKind};

use crate::source::{FileId, Sources, Span};

/// An error at a place of a spec.
#[derive(Clone, Debug, PartialEq)]
pub struct Diagnostic {
    /// One sentence that states the error.
    pub title: String,
    /// The place of the error.
    pub span: Span,
    /// The text printed at the place. When it is empty, "here" is printed.
    pub label: String,
    /// Other places that contribute to the error, with their labels.
    pub related: Vec<(Span, String)>,
    /// Additional facts.
    pub notes: Vec<String>,
    /// Advice on how to fix the error.
    pub hint: Option<String>,
}

impl Diagnostic {
    /// An error without label, related places, notes or hint.
    pub fn error(span: Span, title: impl Into<String>) -> Self {
        Diagnostic {
            title: title.into(),
            span,
            label: String::new(),
            related: Vec::new(),
            notes: Vec::new(),
            hint: None,
        }
    }
    /// Sets the label of the place.
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }
    /// Adds a related place.
    pub fn related(mut self, span: Span, label: impl Into<String>) -> Self {
        self.related.push((span, label.into()));
        self
    }
    /// Adds a note.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }
    /// Sets the hint.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
    /// Sets the hint to the known name nearest to `found`, or to a list of the known names if none is near.
    pub fn suggest<'a>(self, found: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        let known: Vec<&str> = known.into_iter().collect();
        match (nearest(found, known.iter().copied()), list(&known)) {
            (Some(near), _) => self.hint(format!("did you mean `{near}`?")),
            (None, Some(all)) => self.hint(format!("known here: {all}")),
            (None, None) => self,
        }
    }
}

/// The known name that `found` is most likely a misspelling of: a prefix relation or a small Damerau–Levenshtein
/// distance.
pub fn nearest<'a>(found: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = found.to_lowercase();
    let distance = |name: &str| strsim::damerau_levenshtein(&lower, &name.to_lowercase());
    let known: Vec<&str> = known.into_iter().collect();
    let (near, distance) = known.iter().map(|name| (*name, distance(name))).min_by_key(|(_, d)| *d)?;
    if distance > 1 || near.len() == 1 {
        // A prefix relation goes before a distance: `integer` for `int`, `qq` for `q`.
        let part = known
            .iter()
            .find(|name| lower.starts_with(&name.to_lowercase()) || name.to_lowercase().starts_with(&lower));
        if let Some(part) = part.filter(|_| !lower.is_empty()) {
            return Some(part);
        }
    }
    let limit = (found.chars().count().max(near.chars().count()) / 3).clamp(1, 4);
    (distance <= limit && near.chars().count() > distance).then_some(near)
}

/// ` (did you mean …?)` if a known name is near, else the empty string.
pub fn did_you_mean(found: &str, known: &[&str]) -> String {
    nearest(found, known.iter().copied()).map_or(String::new(), |near| format!(" (did you mean `{near}`?)"))
}

/// `a`, `b`, `c`. `None` for no names; only the first twelve of many.
pub fn list(names: &[&str]) -> Option<String> {
    let shown: Vec<String> = names.iter().take(12).map(|n| format!("`{n}`")).collect();
    let rest = if names.len() > 12 { ", …" } else { "" };
    (!names.is_empty()).then(|| shown.join(", ") + rest)
}

/// All errors in a spec, with the texts of the files they refer to.
#[derive(Clone, Debug)]
pub struct Diagnostics {
    /// The errors.
    pub list: Vec<Diagnostic>,
    /// The files.
    pub sources: Sources,
}

impl Diagnostics {
    /// Sorts the errors by place and keeps one for each place, so that an error in a method is reported once, not once
    /// for each layer.
    pub fn new(mut list: Vec<Diagnostic>, sources: Sources) -> Self {
        list.sort_by_key(|d| d.span);
        list.dedup_by_key(|d| d.span);
        Diagnostics { list, sources }
    }

    /// The errors as text for a terminal, with ANSI colours if `color`.
    pub fn render(&self, color: bool) -> String {
        let config = Config::new()
            .with_color(color)
            .with_compact(false)
            .with_char_set(CharSet::Unicode)
            .with_index_type(IndexType::Byte);
        let names: Vec<String> = self.sources.iter().map(|s| s.name.clone()).collect();
        let texts: Vec<ariadne::Source<String>> =
            self.sources.iter().map(|s| ariadne::Source::from(s.text.clone())).collect();
        let mut out = Vec::new();
        for diagnostic in &self.list {
            let report = diagnostic.report(&self.sources, config);
            let cache = Cache { names: &names, texts: &texts };
            if let Err(e) = report.write(cache, &mut out) {
                unreachable!("writing to memory: {e}");
            }
        }
        let text = String::from_utf8_lossy(&out);
        text.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Diagnostics {}

impl Diagnostic {
    fn report(&self, sources: &Sources, config: Config) -> Report<'_, (FileId, Range<usize>)> {
        let range = |span: Span| (span.file, span.start as usize..span.end.max(span.start) as usize);
        // Every place gets a label. A place without one would be marked by colour alone, which a log file does not
        // show.
        let word = if self.label.is_empty() { "here" } else { &self.label };
        let related = self.related.iter().map(|(span, text)| (*span, text.as_str(), Color::Blue));
        let mut places: Vec<_> = std::iter::once((self.span, word, Color::Red)).chain(related).collect();
        // Ariadne prints a file once if its places are sorted by line. Within a line, labels from right to left do not
        // cross.
        let files: Vec<FileId> = places.iter().map(|(span, ..)| span.file).collect();
        let line = |span: &Span| sources.get(span.file).position(span.end.saturating_sub(1).max(span.start)).0;
        places.sort_by_key(|(span, ..)| {
            (files.iter().position(|f| *f == span.file), line(span), std::cmp::Reverse(span.start))
        });
        let mut report = Report::build(ReportKind::Error, range(self.span))
            .with_config(config)
            .with_message(&self.title)
            .with_labels(places.iter().zip(0..).map(|((span, text, color), at)| {
                Label::new(range(*span)).with_message(text).with_color(*color).with_order(at)
            }));
        for note in &self.notes {
            report = report.with_note(note);
        }
        if let Some(hint) = &self.hint {
            report = report.with_help(hint);
        }
        report.finish()
    }
}

struct Cache<'a> {
    names: &'a [String],
    texts: &'a [ariadne::Source<String>],
}

impl ariadne::Cache<FileId> for Cache<'_> {
    type Storage = String;
    fn fetch(&mut self, id: &FileId) -> Result<&ariadne::Source<String>, impl fmt::Debug> {
        self.texts.get(id.0 as usize).ok_or("an unknown file")
    }
    fn display<'a>(&self, id: &'a FileId) -> Option<impl fmt::Display + 'a> {
        self.names.get(id.0 as usize).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::{Diagnostic, Diagnostics, nearest};
    use crate::source::{Sources, Span};

    #[test]
    fn labels_of_one_file_share_an_excerpt() {
        let mut sources = Sources::default();
        let file = sources.add("a.peft", "one = 1\ntwo = 2\none = 3 + one\n");
        let place = |start, end| Span::new(file, start, end);
        let error = Diagnostic::error(place(16, 19), "`one` is there already").label("the second is here");
        let error = error.related(place(26, 29), "this reads it").related(place(0, 3), "the first is here");
        insta::assert_snapshot!(Diagnostics::new(vec![error], sources), @r"
        Error: `one` is there already
           ╭─[ a.peft:3:1 ]
           │
         1 │ one = 1
           │ ─┬─
           │  ╰─── the first is here
           │
         3 │ one = 3 + one
           │ ─┬─       ─┬─
           │  │         ╰─── this reads it
           │  │
           │  ╰───────────── the second is here
        ───╯
        ");
    }

    #[test]
    fn nearest_suggests_only_similar_names() {
        let known = ["rank", "alpha", "dropout", "bias", "q", "k", "v"];
        for (found, expected) in [
            ("rnak", Some("rank")),
            ("Alpha", Some("alpha")),
            ("drop", Some("dropout")),
            ("dropuot", Some("dropout")),
            ("qq", Some("q")),
            ("x", None),
            ("temperature", None),
            ("", None),
        ] {
            assert_eq!(nearest(found, known), expected, "{found}");
        }
    }
}
