//! Sentences, or pairs of sentences, with labels: columns of a JSON file or of a table with a header, or lines
//! `sentence<TAB>label`. The label of a classification task is a class name or, if no class name is a number, a class
//! index. The label of a regression task is a number.

use peft_grammar::model::Columns;

use super::error::did_you_mean;
use super::rows::{Fault, File, FileRows, Format, Location, Row, shortened};
use super::{DataError, Example, ExampleBuilder, Goal, LocatedExample, Tokenizer};

/// Usual names of the text column and of the label column, compared without case.
pub(super) const TEXT: &[&str] = &["sentence", "text", "review"];
pub(super) const LABEL: &[&str] = &["label", "labels", "target"];
/// The column names of a file without a header.
pub(super) const IMPLIED: &[&str] = &["sentence", "label"];

/// The kind of label that a task has.
#[derive(Clone, Copy)]
pub enum LabelKind<'t> {
    /// A class, out of these names.
    Class(&'t [String]),
    Number,
}

/// Builds examples of labelled texts.
pub struct Labelled<'t> {
    pub label_kind: LabelKind<'t>,
    pub columns: &'t Columns,
    pub max_tokens: usize,
    pub tokenizer: &'t Tokenizer,
}

/// The texts and the target of an example, not tokenised yet.
pub struct Draft {
    text: String,
    pair: Option<String>,
    goal: Goal,
}

impl ExampleBuilder for Labelled<'_> {
    type Draft = Draft;

    fn open<'f>(&self, file: &'f File) -> Result<FileRows<'f>, DataError> {
        let implied = self.columns.are_default().then_some(IMPLIED);
        let rows = FileRows::of(file, Format::Tsv, implied, |names| is_header(names, self.labels()));
        let rows = rows.map_err(|fault| DataError::at(&file.path, fault))?;
        let why = "its `entries` are texts to generate, as WebNLG has them, and this task asks for labels";
        rows.without_entries(&file.path, why)
    }

    fn check(&self, names: &[&str]) -> Result<(), String> {
        for (wanted, usual, key) in self.wanted() {
            match wanted {
                Some(wanted) => known(wanted, names)?,
                None => drop(usual_column(names, usual, key)?),
            }
        }
        Ok(())
    }

    fn draft(&self, row: &Row, maybe_header: bool) -> Result<Draft, String> {
        let texts = self.wanted().map(|(wanted, usual, key)| {
            let name = match wanted {
                Some(wanted) => wanted.to_owned(),
                None => usual_column(&row.names(), usual, key)?.to_owned(),
            };
            let Some(cell) = row.get(&name) else {
                let names = row.names();
                return Err(no_column(&name, &names));
            };
            match cell.text() {
                Some(text) => Ok(text.to_owned()),
                None => Err(format!("`{name}` is {}; it must be text or a number", cell.kind())),
            }
        });
        let mut texts = texts.collect::<Result<Vec<String>, _>>()?.into_iter();
        let (label, text) = (texts.next().unwrap_or_default(), texts.next().unwrap_or_default());
        let pair = texts.next();
        for (text, key) in [(Some(&text), "text"), (pair.as_ref(), "pair")] {
            if text.is_some_and(|text| text.trim().is_empty()) {
                return Err(match self.columns.pair {
                    None => "the sentence is empty".into(),
                    Some(_) => format!("the `{key}` is empty"),
                });
            }
        }
        let goal = match self.label_kind {
            LabelKind::Class(_) => Goal::Class(self.class(label.trim(), maybe_header.then_some(&text))?),
            LabelKind::Number => {
                let number = number(label.trim());
                Goal::Number(number.map_err(|error| error + &header(label.trim(), maybe_header.then_some(&text)))?)
            }
        };
        Ok(Draft { text, pair, goal })
    }

    fn encode(&self, drafts: Vec<(Location, Draft)>) -> Result<Vec<Result<Vec<LocatedExample>, Fault>>, DataError> {
        if self.columns.pair.is_some() {
            return self.encode_pairs(drafts);
        }
        let ids = self.tokenizer.encode(drafts.iter().map(|(_, draft)| draft.text.as_str()).collect(), true)?;
        let marks = self.tokenizer.marks().count();
        let one = |(ids, (at, draft)): (Vec<i32>, (Location, Draft))| {
            // If a tokenizer drops the whole text, such as zero-width characters, only special tokens would be left to
            // train on.
            if ids.len() <= marks {
                return Err(Fault::row(at, "the tokenizer makes no token of the sentence"));
            }
            let example = Example { types: vec![0; ids.len()], ids, goal: draft.goal };
            Ok(vec![LocatedExample { at, length: example.ids.len(), example }])
        };
        Ok(ids.into_iter().zip(drafts).map(one).collect())
    }

    fn empty(&self) -> &'static str {
        match self.columns.are_default() {
            true => "write one `sentence<TAB>label` per line",
            false => "it has no row",
        }
    }
}

impl Labelled<'_> {
    /// The class names. They are empty for a regression task.
    fn labels(&self) -> &[String] {
        match self.label_kind {
            LabelKind::Class(labels) => labels,
            LabelKind::Number => &[],
        }
    }

    /// For the label column, the text column and the second text's column: the name given in the task, usual names, and
    /// the key in the task.
    fn wanted(&self) -> impl Iterator<Item = (Option<&str>, &'static [&'static str], &'static str)> {
        let Columns { text, pair, label } = self.columns;
        let pair = pair.as_deref().map(|pair| (Some(pair), &[][..], "pair"));
        [(label.as_deref(), LABEL, "label"), (text.as_deref(), TEXT, "text")].into_iter().chain(pair)
    }

    /// The class index of a label. `first` is the row's text if the row might be a header.
    fn class(&self, label: &str, first: Option<&String>) -> Result<i32, String> {
        let labels = self.labels();
        let error = match class(label, labels) {
            Ok(class) => return Ok(class),
            Err(error) => error,
        };
        let near = !did_you_mean(label, labels.iter().map(String::as_str)).is_empty();
        Err(error + &header(label, first.filter(|_| !near)))
    }

    fn encode_pairs(
        &self,
        drafts: Vec<(Location, Draft)>,
    ) -> Result<Vec<Result<Vec<LocatedExample>, Fault>>, DataError> {
        let pairs = drafts.iter().map(|(_, draft)| (draft.text.as_str(), draft.pair.as_deref().unwrap_or_default()));
        let encoded = self.tokenizer.encode_pairs(pairs.collect(), self.max_tokens)?;
        let one = |(pair, (at, draft)): (super::tokenizer::Pair, (Location, Draft))| {
            if let Some(key) = pair.empty_text {
                return Err(Fault::row(at, format!("the tokenizer makes no token of the `{key}`")));
            }
            let example = Example { ids: pair.ids, types: pair.types, goal: draft.goal };
            Ok(vec![LocatedExample { at, length: pair.untruncated, example }])
        };
        Ok(encoded.into_iter().zip(drafts).map(one).collect())
    }
}

/// Whether a line holds column names. If the second name is a class, a line of two fields is an example.
pub(super) fn is_header(names: &[&str], labels: &[String]) -> bool {
    let usual = |all: &[&str]| names.iter().any(|name| all.iter().any(|usual| usual.eq_ignore_ascii_case(name)));
    let example = names.len() == 2 && labels.iter().any(|label| label.trim() == names[1]);
    usual(TEXT) && usual(LABEL) && !example
}

/// Refuses a column name that is not among `names`.
pub(super) fn known(wanted: &str, names: &[&str]) -> Result<(), String> {
    if names.contains(&wanted) { Ok(()) } else { Err(no_column(wanted, names)) }
}

/// The error for a column name that is not among `names`.
pub(super) fn no_column(wanted: &str, names: &[&str]) -> String {
    let hint = did_you_mean(wanted, names.iter().copied());
    match names {
        [] => format!("no column `{wanted}`; there is none"),
        _ => format!("no column `{wanted}`{hint}; there is {}", listed(names)),
    }
}

/// The first names, for a message. Very long names are shortened.
pub(super) fn listed(names: &[&str]) -> String {
    const SHOWN: usize = 16;
    let short = |name: &&str| if name.len() > 60 { shortened(name).into_owned() } else { name.to_string() };
    let shown = names.iter().take(SHOWN).map(|name| format!("`{}`", short(name))).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN { shown + ", …" } else { shown }
}

/// The only column that has a usual name.
pub(super) fn usual_column<'n>(names: &[&'n str], usual: &[&str], key: &str) -> Result<&'n str, String> {
    let is_usual = |name: &&&str| usual.iter().any(|usual| usual.eq_ignore_ascii_case(name));
    let found: Vec<&&str> = names.iter().filter(is_usual).collect();
    match found[..] {
        [name] => Ok(name),
        [] => Err(format!(
            "no column is called `{}`; say in the task which it is, `{key}: \"…\"`, of {}",
            usual.join("` or `"),
            listed(names)
        )),
        [first, second, ..] => Err(format!(
            "both `{first}` and `{second}` may be the {key}; say in the task which it is, `{key}: \"{first}\"`"
        )),
    }
}

/// A hint for the case that the line is a header. `text` is the row's text if it might be one.
fn header(label: &str, text: Option<&String>) -> String {
    let label = shortened(label);
    match text {
        Some(text) if label.contains(char::is_alphabetic) && text.len() <= 40 => {
            let text = text.trim();
            format!("; if the line is a header, the task names its columns, `text: {text:?}  label: {label:?}`")
        }
        _ => String::new(),
    }
}

/// The class index of a label, which is a class name or an index.
pub(super) fn class(label: &str, labels: &[String]) -> Result<i32, String> {
    let class = labels.iter().position(|l| l.trim() == label).or_else(|| index(label, labels));
    if let Some(class) = class {
        return Ok(class as i32);
    }
    let hint = did_you_mean(label, labels.iter().map(String::as_str));
    let indices = match labels.iter().any(|l| is_number(l)) {
        true => String::new(),
        false => format!(", or 0 to {}", labels.len().saturating_sub(1)),
    };
    let label = shortened(label);
    Err(format!("no label `{label}`{hint}; the task's labels are `{}`{indices}", labels.join("`, `")))
}

/// The class index that a label spells. If a class name is a number there are no indices, because `1` would be
/// ambiguous.
fn index(label: &str, labels: &[String]) -> Option<usize> {
    let counts = !labels.iter().any(|l| is_number(l));
    counts.then(|| (0..labels.len()).find(|i| i.to_string() == label)).flatten()
}

/// Parses a regression label, which has to be a finite f32.
fn number(label: &str) -> Result<f32, String> {
    match label.parse::<f32>() {
        Ok(number) if number.is_finite() => Ok(number),
        Ok(_) => Err(format!("the label `{}` is not a finite number; a regression learns numbers", shortened(label))),
        Err(_) => Err(format!("the label `{}` is not a number, and a regression learns numbers", shortened(label))),
    }
}

/// Whether a class name may be read as a number: digits of any script with signs but without letters, an exponent, or
/// hexadecimal digits.
fn is_number(name: &str) -> bool {
    let name = name.trim();
    let digits = name.contains(char::is_numeric);
    let unsigned = name.trim_start_matches(['+', '-']);
    let hexadecimal = ["0x", "0X"].iter().find_map(|prefix| unsigned.strip_prefix(prefix));
    digits && (!name.contains(|c: char| c.is_alphabetic() && !c.is_numeric()) || name.parse::<f64>().is_ok())
        || hexadecimal.is_some_and(|rest| !rest.is_empty() && rest.chars().all(|c| c.is_ascii_hexdigit()))
}
