//! Sentences, or pairs of them, with labels: columns of a table that has a header or is JSON, or lines
//! `sentence<TAB>label`. The label of a classification is a class's name or, where no name is a number, its index; that
//! of a regression is a number.

use peft_grammar::model::Columns;

use super::error::did_you_mean;
use super::rows::{At, Fault, File, Format, Row, Rows, shortened};
use super::{DataError, Example, Goal, Maker, Placed, Tokenizer};

/// Names that the columns have elsewhere, in any case.
pub(super) const TEXT: &[&str] = &["sentence", "text", "review"];
pub(super) const LABEL: &[&str] = &["label", "labels", "target"];
/// The columns of a file without a header.
pub(super) const IMPLIED: &[&str] = &["sentence", "label"];

/// What is asked of each text.
#[derive(Clone, Copy)]
pub enum Asked<'t> {
    /// Which of these classes it is of.
    Class(&'t [String]),
    Number,
}

/// Makes examples of texts with labels.
pub struct Labelled<'t> {
    pub asked: Asked<'t>,
    pub columns: &'t Columns,
    pub max_tokens: usize,
    pub tokenizer: &'t Tokenizer,
}

/// An example's texts and what is asked of them.
pub struct Draft {
    text: String,
    pair: Option<String>,
    goal: Goal,
}

impl Maker for Labelled<'_> {
    type Draft = Draft;

    fn open<'f>(&self, file: &'f File) -> Result<Rows<'f>, DataError> {
        let implied = self.columns.are_usual().then_some(IMPLIED);
        let rows = Rows::of(file, Format::Tsv, implied, |names| is_header(names, self.labels()));
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

    fn draft(&self, row: &Row, at_top: bool) -> Result<Draft, String> {
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
                None => Err(format!("`{name}` is {}; it is to be text or a number", cell.kind())),
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
        let goal = match self.asked {
            Asked::Class(_) => Goal::Class(self.class(label.trim(), at_top.then_some(&text))?),
            Asked::Number => {
                let number = number(label.trim());
                Goal::Number(number.map_err(|error| error + &header(label.trim(), at_top.then_some(&text)))?)
            }
        };
        Ok(Draft { text, pair, goal })
    }

    fn encode(&self, drafts: Vec<(At, Draft)>) -> Result<Vec<Result<Vec<Placed>, Fault>>, DataError> {
        if self.columns.pair.is_some() {
            return self.encode_pairs(drafts);
        }
        let ids = self.tokenizer.encode(drafts.iter().map(|(_, draft)| draft.text.as_str()).collect(), true)?;
        let marks = self.tokenizer.marks().count();
        let one = |(ids, (at, draft)): (Vec<i32>, (At, Draft))| {
            // What a tokenizer leaves out altogether, such as characters of no width, would train as marks alone.
            if ids.len() <= marks {
                return Err(Fault::row(at, "the tokenizer makes no token of the sentence"));
            }
            let example = Example { types: vec![0; ids.len()], ids, goal: draft.goal };
            Ok(vec![Placed { at, length: example.ids.len(), example }])
        };
        Ok(ids.into_iter().zip(drafts).map(one).collect())
    }

    fn empty(&self) -> &'static str {
        match self.columns.are_usual() {
            true => "write one `sentence<TAB>label` a line",
            false => "it has no row",
        }
    }
}

impl Labelled<'_> {
    /// The names of the classes, if there are any.
    fn labels(&self) -> &[String] {
        match self.asked {
            Asked::Class(labels) => labels,
            Asked::Number => &[],
        }
    }

    /// The label's column, the text's and the second text's: the name that the task gives it, usual names, its key.
    fn wanted(&self) -> impl Iterator<Item = (Option<&str>, &'static [&'static str], &'static str)> {
        let Columns { text, pair, label } = self.columns;
        let pair = pair.as_deref().map(|pair| (Some(pair), &[][..], "pair"));
        [(label.as_deref(), LABEL, "label"), (text.as_deref(), TEXT, "text")].into_iter().chain(pair)
    }

    /// The class of a label. `first` is the text beside it where the row might be a header.
    fn class(&self, label: &str, first: Option<&String>) -> Result<i32, String> {
        let labels = self.labels();
        let error = match class(label, labels) {
            Ok(class) => return Ok(class),
            Err(error) => error,
        };
        let near = !did_you_mean(label, labels.iter().map(String::as_str)).is_empty();
        Err(error + &header(label, first.filter(|_| !near)))
    }

    fn encode_pairs(&self, drafts: Vec<(At, Draft)>) -> Result<Vec<Result<Vec<Placed>, Fault>>, DataError> {
        let pairs = drafts.iter().map(|(_, draft)| (draft.text.as_str(), draft.pair.as_deref().unwrap_or_default()));
        let encoded = self.tokenizer.encode_pairs(pairs.collect(), self.max_tokens)?;
        let one = |(pair, (at, draft)): (super::tokenizer::Pair, (At, Draft))| {
            if let Some(key) = pair.nothing {
                return Err(Fault::row(at, format!("the tokenizer makes no token of the `{key}`")));
            }
            let example = Example { ids: pair.ids, types: pair.types, goal: draft.goal };
            Ok(vec![Placed { at, length: pair.whole, example }])
        };
        Ok(encoded.into_iter().zip(drafts).map(one).collect())
    }
}

/// Names of columns. Where a class has the second's name, a line of two is an example.
pub(super) fn is_header(names: &[&str], labels: &[String]) -> bool {
    let usual = |all: &[&str]| names.iter().any(|name| all.iter().any(|usual| usual.eq_ignore_ascii_case(name)));
    let example = names.len() == 2 && labels.iter().any(|label| label.trim() == names[1]);
    usual(TEXT) && usual(LABEL) && !example
}

/// Refuses a column that is not among the names.
pub(super) fn known(wanted: &str, names: &[&str]) -> Result<(), String> {
    if names.contains(&wanted) { Ok(()) } else { Err(no_column(wanted, names)) }
}

/// That a column is not among the names.
pub(super) fn no_column(wanted: &str, names: &[&str]) -> String {
    let hint = did_you_mean(wanted, names.iter().copied());
    match names {
        [] => format!("no column `{wanted}`; there is none"),
        _ => format!("no column `{wanted}`{hint}; there is {}", listed(names)),
    }
}

/// The first names, for a message; of one that no one would call a name the beginning.
pub(super) fn listed(names: &[&str]) -> String {
    const SHOWN: usize = 16;
    let short = |name: &&str| if name.len() > 60 { shortened(name).into_owned() } else { name.to_string() };
    let shown = names.iter().take(SHOWN).map(|name| format!("`{}`", short(name))).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN { shown + ", …" } else { shown }
}

/// The one column that has a usual name.
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

/// What to do if the line is a header; `text` stands beside the label where it might be.
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

/// The class that a label names or counts.
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

/// The class that a label counts. Beside names that are numbers there are no indices: `1` would be two classes.
fn index(label: &str, labels: &[String]) -> Option<usize> {
    let counts = !labels.iter().any(|l| is_number(l));
    counts.then(|| (0..labels.len()).find(|i| i.to_string() == label)).flatten()
}

/// The number that a label is: a finite one, within what f32 holds.
fn number(label: &str) -> Result<f32, String> {
    match label.parse::<f32>() {
        Ok(number) if number.is_finite() => Ok(number),
        Ok(_) => Err(format!("the label `{}` is no finite number; a regression learns numbers", shortened(label))),
        Err(_) => Err(format!("the label `{}` is no number, and a regression learns numbers", shortened(label))),
    }
}

/// A name that a person may read as a number: digits of any script with signs but no letters, an exponent, or
/// hexadecimal digits.
fn is_number(name: &str) -> bool {
    let name = name.trim();
    let digits = name.contains(char::is_numeric);
    let unsigned = name.trim_start_matches(['+', '-']);
    let hexadecimal = ["0x", "0X"].iter().find_map(|prefix| unsigned.strip_prefix(prefix));
    digits && (!name.contains(|c: char| c.is_alphabetic() && !c.is_numeric()) || name.parse::<f64>().is_ok())
        || hexadecimal.is_some_and(|rest| !rest.is_empty() && rest.chars().all(|c| c.is_ascii_hexdigit()))
}
