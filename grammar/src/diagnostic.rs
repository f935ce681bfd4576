//! What is wrong with a spec: one plain [`Diagnostic`] for each place, rendered by ariadne.

use std::fmt;
use std::ops::Range;

use ariadne::{CharSet, Config, IndexType, Label, Report, ReportKind};

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
            let report = diagnostic.report(config);
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
    fn report(&self, config: Config) -> Report<'_, (FileId, Range<usize>)> {
        let range = |span: Span| (span.file, span.start as usize..span.end.max(span.start) as usize);
        // A place without a word beside it is marked by color alone: by nothing, in a log.
        let word = if self.label.is_empty() { "here" } else { &self.label };
        let label = Label::new(range(self.span)).with_color(ariadne::Color::Red).with_message(word);
        let mut report = Report::build(ReportKind::Error, range(self.span))
            .with_config(config)
            .with_message(&self.title)
            .with_label(label);
        for (span, text) in &self.related {
            report = report
                .with_label(Label::new(range(*span)).with_message(text).with_color(ariadne::Color::Blue).with_order(1));
        }
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
    use super::nearest;

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
