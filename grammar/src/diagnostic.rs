//! What is wrong with a spec: one plain [`Diagnostic`] for each place, rendered by ariadne.

use std::fmt;
use std::ops::Range;

use ariadne::{CharSet, Color, Config, IndexType, Label, Report, ReportKind};

use crate::source::{FileId, Sources, Span};

/// An error.
#[derive(Clone, Debug, PartialEq)]
pub struct Diagnostic {
    pub title: String,
    pub span: Span,
    /// What stands beside the marked place; empty = "here", the title says it.
    pub label: String,
    /// Other places that have a part in it.
    pub related: Vec<(Span, String)>,
    pub notes: Vec<String>,
    /// How to mend it.
    pub hint: Option<String>,
}

impl Diagnostic {
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
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }
    pub fn related(mut self, span: Span, label: impl Into<String>) -> Self {
        self.related.push((span, label.into()));
        self
    }
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
    /// Offers the nearest of the known names, or lists them when none is near.
    pub fn suggest<'a>(self, found: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        let known: Vec<&str> = known.into_iter().collect();
        match (nearest(found, known.iter().copied()), list(&known)) {
            (Some(near), _) => self.hint(format!("did you mean `{near}`?")),
            (None, Some(all)) => self.hint(format!("known here: {all}")),
            (None, None) => self,
        }
    }
}

/// The known name that `found` most likely stands for.
pub fn nearest<'a>(found: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = found.to_lowercase();
    let distance = |name: &str| strsim::damerau_levenshtein(&lower, &name.to_lowercase());
    let known: Vec<&str> = known.into_iter().collect();
    let (near, distance) = known.iter().map(|name| (*name, distance(name))).min_by_key(|(_, d)| *d)?;
    if distance > 1 || near.len() == 1 {
        // `integer` for `int`, `qq` for `q`.
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

/// ` (did you mean …?)` where a known name is near, else nothing.
pub fn did_you_mean(found: &str, known: &[&str]) -> String {
    nearest(found, known.iter().copied()).map_or(String::new(), |near| format!(" (did you mean `{near}`?)"))
}

/// `a`, `b`, `c`; nothing when there are none, the first twelve when there are many.
pub fn list(names: &[&str]) -> Option<String> {
    let shown: Vec<String> = names.iter().take(12).map(|n| format!("`{n}`")).collect();
    let rest = if names.len() > 12 { ", …" } else { "" };
    (!names.is_empty()).then(|| shown.join(", ") + rest)
}

/// Everything wrong with a spec, with the texts it was found in.
#[derive(Clone, Debug)]
pub struct Diagnostics {
    pub list: Vec<Diagnostic>,
    pub sources: Sources,
}

impl Diagnostics {
    /// In order of place, one for each place: an error in a method shows once, not once a layer.
    pub fn new(mut list: Vec<Diagnostic>, sources: Sources) -> Self {
        list.sort_by_key(|d| d.span);
        list.dedup_by_key(|d| d.span);
        Diagnostics { list, sources }
    }

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
        // A place without a word beside it is marked by color alone: by nothing, in a log.
        let word = if self.label.is_empty() { "here" } else { &self.label };
        let related = self.related.iter().map(|(span, text)| (*span, text.as_str(), Color::Blue));
        let mut places: Vec<_> = std::iter::once((self.span, word, Color::Red)).chain(related).collect();
        // A file is shown once if its places come line by line; on one line, the last first crosses no other's mark.
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
    fn a_file_is_shown_once() {
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
    fn only_what_is_near_is_offered() {
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
