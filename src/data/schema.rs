//! Infers the schema of a data file from its column names and first rows, without a task.

use std::collections::HashSet;
use std::path::Path;

use peft_grammar::model::Columns;

use super::labelled::{IMPLIED, LABEL, TEXT, listed};
use super::rows::{Cell, Fault, File, FileRows, Format, Row, Value, shortened};
use super::{DataError, tags};
use crate::hub::chat::Conversation;

/// The schema of a data file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Schema {
    /// Texts, or pairs of texts, with a class each. `labels` holds every class name that occurs, in numeric order if
    /// all are numbers, else in alphabetic order. A column that has a usual name is not listed in `columns`.
    Labelled { columns: Columns, labels: Vec<String> },
    /// Texts, or pairs of texts, with a number each.
    Numbered(Columns),
    /// Lists of words with a class for each word, the names of the two columns, and every class name that occurs.
    Tagged { tokens: String, tags: String, labels: Vec<String> },
    /// WebNLG entries.
    Records,
    /// Conversations. If a row has text columns instead of a list of messages, these are listed, the assistant's column
    /// last.
    Conversations(Vec<String>),
    /// Text columns. The model generates the last one.
    Texts(Vec<String>),
    /// Plain texts, for language modelling.
    Plain,
}

/// The largest number of classes. A label column with more distinct names is taken for a wrong guess of the column.
const MAX_CLASSES: usize = 200;

/// The usual names of the two text columns of sentence pairs.
const PAIRS: [[&str; 2]; 7] = [
    ["premise", "hypothesis"],
    ["sentence1", "sentence2"],
    ["text_a", "text_b"],
    ["text1", "text2"],
    ["question1", "question2"],
    ["question", "sentence"],
    ["query", "passage"],
];

/// Further usual names of a label column.
const OTHER_LABELS: [&str; 6] = ["gold_label", "class", "category", "sentiment", "score", "similarity_score"];

/// Usual names of the column that the model generates from the others.
const GENERATED: [&str; 9] =
    ["completion", "response", "output", "answer", "target", "summary", "chosen", "reply", "translation"];

/// Usual names of columns that are metadata, and of the rejected answer of a preference pair.
const METADATA: [&str; 8] = ["id", "idx", "index", "guid", "uid", "url", "rejected", "source"];

/// The number of rows from which the schema is inferred.
const SAMPLE_ROWS: usize = 100;

/// Infers the schema of a file. `writes` tells whether the model can generate text.
///
/// # Errors
///
/// The file cannot be read, has no row, or its columns match no schema.
pub fn infer_schema(path: &Path, writes: bool) -> Result<Schema, DataError> {
    let file = File::open(path)?;
    let at = |fault| DataError::at(path, fault);
    let refuse = |message: String| DataError::Named { path: path.to_owned(), message };
    if writes && file.is_plain_text() {
        return Ok(Schema::Plain);
    }
    let mut rows = FileRows::of(&file, Format::Tsv, Some(IMPLIED), is_header).map_err(at)?;
    if rows.entries {
        return Ok(Schema::Records);
    }
    let sample = rows.by_ref().take(SAMPLE_ROWS).collect::<Result<Vec<_>, _>>().map_err(at)?;
    if sample.is_empty() {
        return Err(DataError::Empty { path: path.to_owned(), message: "it has no row".into() });
    }
    let names = names(&sample);
    let labelled = columns(&names);
    if let Some([tokens, tags]) = lists(&sample, &names) {
        let (tokens, tags) = (tokens.to_owned(), tags.to_owned());
        let labels = labels(&sample, rows, &tags).map_err(|fault| DataError::at(path, fault))?;
        return match labels {
            Labels::Names(labels) => Ok(Schema::Tagged { tokens, tags, labels }),
            Labels::Numbers => {
                Err(refuse(format!("the labels in `{tags}` are numbers with fractions, and a word is of a class")))
            }
            Labels::TooMany => Err(refuse(too_many(&tags))),
        };
    }
    if writes {
        let conversation = sample.iter().all(|row| Conversation::of(&row.json()).is_ok());
        let texts = text_columns(&sample, &names).map_err(refuse)?;
        match texts {
            Some(texts) if conversation => return Ok(Schema::Conversations(texts)),
            Some(texts) => return Ok(Schema::Texts(texts)),
            None if conversation => return Ok(Schema::Conversations(vec![])),
            None => {}
        }
        let plain = super::text::usual(&names).filter(|_| labelled.is_none());
        if plain.is_some() {
            return Ok(Schema::Plain);
        }
    }
    let Some((columns, label)) = labelled else {
        return Err(refuse(format!(
            "its columns cannot be recognised by their names, {}; write the task yourself: `text` and `label` \
             of a classification, `tokens` and `tags` of a token_classification, or `template` and `target` of a generation",
            listed(&names)
        )));
    };
    let label = label.to_owned();
    match labels(&sample, rows, &label).map_err(at)? {
        Labels::Names(labels) => Ok(Schema::Labelled { columns, labels }),
        Labels::Numbers => Ok(Schema::Numbered(columns)),
        Labels::TooMany => Err(refuse(too_many(&label))),
    }
}

fn too_many(label: &str) -> String {
    format!("more than {MAX_CLASSES} labels: is the column `{label}` the class?")
}

/// The content of a label column.
enum Labels {
    /// All class names, in numeric order if all are numbers, else in alphabetic order.
    Names(Vec<String>),
    /// Numbers with fractions, or more than [`MAX_CLASSES`] whole numbers.
    Numbers,
    /// More than [`MAX_CLASSES`] names.
    TooMany,
}

fn labels<'f>(
    sample: &[Row<'f>],
    rows: impl Iterator<Item = Result<Row<'f>, Fault>>,
    column: &str,
) -> Result<Labels, Fault> {
    let (mut names, mut seen, mut numbers, mut whole) = (vec![], HashSet::new(), true, true);
    let number = |name: &str| name.parse::<f64>().ok().filter(|number| number.is_finite());
    for row in sample.iter().cloned().map(Ok).chain(rows) {
        let row = row?;
        // A row without a label is refused when the data are read for training, with a more precise message.
        let items: Vec<&str> = match row.get(column) {
            Some(Cell::Value(Value::List(items))) => items.iter().filter_map(Value::text).collect(),
            cell => cell.and_then(Cell::text).into_iter().collect(),
        };
        for name in items.into_iter().map(str::trim) {
            if names.len() <= MAX_CLASSES && seen.insert(name.to_owned()) {
                check_writable(name, "label").map_err(|message| Fault::fatal(row.at.clone(), message))?;
                names.push(name.to_owned());
            }
            numbers &= number(name).is_some();
            whole &= number(name).is_some_and(|number| number.fract() == 0.0);
        }
        if names.len() > MAX_CLASSES && !numbers {
            return Ok(Labels::TooMany);
        }
    }
    if numbers && (!whole || names.len() > MAX_CLASSES) && !names.is_empty() {
        return Ok(Labels::Numbers);
    }
    match whole {
        true => names.sort_by(|x, y| f64::total_cmp(&number(x).unwrap_or(0.0), &number(y).unwrap_or(0.0))),
        false => names.sort(),
    }
    Ok(Labels::Names(names))
}

/// The columns of words and of their classes, if every row has lists under usual names.
fn lists<'n>(rows: &[Row], names: &[&'n str]) -> Option<[&'n str; 2]> {
    let found = [tags::WORDS, tags::TAGS].map(|usual| {
        let is_list = |name: &str| {
            rows.iter().all(|row| match row.get(name) {
                Some(Cell::Value(Value::List(items))) => items.iter().all(|item| item.text().is_some()),
                _ => false,
            })
        };
        let usual = |name: &&&str| usual.iter().any(|usual| usual.eq_ignore_ascii_case(name)) && is_list(name);
        let mut found = names.iter().filter(usual);
        found.next().copied().filter(|_| found.next().is_none())
    });
    let [tokens, tags] = found;
    Some([tokens?, tags?])
}

/// Whether the first line of a tsv file is a header: it has more than two columns, or both are known column names.
fn is_header(names: &[&str]) -> bool {
    let known = |name: &&str| {
        let pairs = PAIRS.iter().flatten();
        let all = TEXT.iter().chain(LABEL).chain(&OTHER_LABELS).chain(&GENERATED).chain(pairs).chain(&PROMPTS);
        all.into_iter().any(|known| known.eq_ignore_ascii_case(name))
    };
    names.len() > 2 || (names.len() == 2 && names.iter().all(known))
}

/// Usual names of the columns from which an answer is generated.
const PROMPTS: [&str; 6] = ["prompt", "instruction", "input", "context", "article", "document"];

/// The names of the columns of all rows, in the order of first occurrence.
fn names<'r>(rows: &'r [Row]) -> Vec<&'r str> {
    let mut names: Vec<&str> = vec![];
    for name in rows.iter().flat_map(Row::names) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The columns of a classification task, and the name of its label column.
fn columns<'n>(names: &[&'n str]) -> Option<(Columns, &'n str)> {
    let find = |usual: &[&str]| {
        let mut found = names.iter().filter(|name| usual.iter().any(|u| u.eq_ignore_ascii_case(name)));
        found.next().copied().filter(|_| found.next().is_none())
    };
    let usual = find(LABEL);
    let label = usual.or_else(|| find(&OTHER_LABELS))?;
    let own = usual.is_none().then(|| label.to_owned());
    if let Some([text, pair]) = PAIRS.iter().find_map(|pair| Some([find(&pair[..1])?, find(&pair[1..])?])) {
        return Some((Columns { text: Some(text.into()), pair: Some(pair.into()), label: own }, label));
    }
    find(TEXT).map(|_| (Columns { text: None, pair: None, label: own }, label))
}

/// The text columns, with the generated column last, if one of the columns has such a name. Metadata columns and
/// columns that contain the generated text are left out.
fn text_columns(rows: &[Row], names: &[&str]) -> Result<Option<Vec<String>>, String> {
    let is = |name: &str, known: &[&str]| known.iter().any(|known| known.eq_ignore_ascii_case(name));
    let text = |row: &Row, name: &str| row.get(name).filter(|cell| cell.kind() == "text")?.text().map(str::to_owned);
    let texts: Vec<&str> =
        names.iter().copied().filter(|name| rows.iter().any(|row| text(row, name).is_some())).collect();
    let found: Vec<&str> = texts.iter().copied().filter(|name| is(name, &GENERATED)).collect();
    let last = match found[..] {
        [] => return Ok(None),
        [last] => last,
        _ => {
            return Err(format!(
                "{} may each be the generated column; write the task yourself, `template` and `target` of a generation",
                listed(&found)
            ));
        }
    };
    let holds = |row: &Row, name: &str| {
        let (around, inside) = (text(row, name).unwrap_or_default(), text(row, last).unwrap_or_default());
        !inside.trim().is_empty() && around.contains(inside.trim())
    };
    let has_content = |name: &&str| {
        let number = rows.iter().all(|row| text(row, name).is_some_and(|text| text.trim().parse::<f64>().is_ok()));
        !is(name, &METADATA) && !number && !rows.iter().all(|row| holds(row, name))
    };
    let mut columns: Vec<String> =
        texts.iter().copied().filter(|name| *name != last).filter(has_content).map(str::to_owned).collect();
    columns.push(last.to_owned());
    columns.iter().try_for_each(|name| check_writable(name, "column"))?;
    Ok(Some(columns))
}

/// Refuses a name that a spec cannot hold inside quotes, or a template inside braces.
fn check_writable(name: &str, what: &str) -> Result<(), String> {
    let odd: &[char] = if what == "label" { &['"', '\n', '\r', '\\'] } else { &['"', '\n', '\r', '\\', '{', '}'] };
    match name {
        "" => Err(format!("a {what} without a name; give it one")),
        name if name.contains(odd) => {
            Err(format!("the {what} {:?} has a character that a spec cannot hold; rename it", shortened(name)))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One line that describes the schema of a file.
    fn describe(name: &str, content: &str, writes: bool) -> String {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        std::fs::write(&path, content).expect("written");
        let columns = |c: &Columns| [&c.text, &c.pair, &c.label].map(|name| name.clone().unwrap_or_default()).join(",");
        match infer_schema(&path, writes) {
            Ok(Schema::Labelled { columns: found, labels }) => {
                format!("labels {} of {}", labels.join(","), columns(&found))
            }
            Ok(Schema::Numbered(found)) => format!("numbers of {}", columns(&found)),
            Ok(Schema::Tagged { tokens, tags, labels }) => format!("tags {} of {tokens},{tags}", labels.join(",")),
            Ok(Schema::Records) => "records".into(),
            Ok(Schema::Conversations(texts)) => format!("conversations {}", texts.join(",")),
            Ok(Schema::Texts(texts)) => format!("texts {}", texts.join(",")),
            Ok(Schema::Plain) => "plain".into(),
            Err(error) => error.to_string().replace(&format!("{}/", folder.path().display()), ""),
        }
    }

    #[test]
    fn classification_schemas_are_inferred() {
        let describe = |name: &str, content: &str| describe(name, content, false);
        assert_eq!(describe("a.tsv", "good\t1\nbad\t0\n"), "labels 0,1 of ,,");
        assert_eq!(describe("a.tsv", "review\tsentiment\ngood\tpos\nbad\tneg\n"), "labels neg,pos of ,,sentiment");
        assert_eq!(describe("a.tsv", "premise\thypothesis\tlabel\na\tb\tyes\n"), "labels yes of premise,hypothesis,");
        assert_eq!(describe("a.txt", "good tea\t1\n"), "labels 1 of ,,");
        assert_eq!(
            describe("a.jsonl", "{\"text\": \"a\", \"target\": 1}\n{\"text\": \"b\", \"target\": 0}"),
            "labels 0,1 of ,,"
        );
        assert_eq!(
            describe("a.csv", "sentence1,sentence2,score\na,b,2.5\nc,d,4\n"),
            "numbers of sentence1,sentence2,score"
        );
        let many: String = (0..=MAX_CLASSES).map(|i| format!("good\t{i}\n")).collect();
        assert_eq!(describe("a.tsv", &many), "numbers of ,,");
        assert_eq!(describe("a.tsv", "good\t1\nbad\t-1\nfair\t0.0\n"), "labels -1,0.0,1 of ,,");
        let words = "{\"id\": 1, \"tokens\": [\"Ann\", \"sings\"], \"ner_tags\": [\"B-PER\", \"O\"]}";
        assert_eq!(describe("a.jsonl", words), "tags B-PER,O of tokens,ner_tags");
        insta::assert_snapshot!(describe("a.tsv", "good\t5\" pipe\n"), @r#"`a.tsv`, line 1: the label "5\" pipe" has a character that a spec cannot hold; rename it"#);
        insta::assert_snapshot!(describe("a.csv", "text,label\ngood,\n"), @"`a.csv`, line 2: a label without a name; give it one");
        insta::assert_snapshot!(describe("a.csv", "body,verdict\ngood,1\n"), @"`a.csv`: its columns cannot be recognised by their names, `body`, `verdict`; write the task yourself: `text` and `label` of a classification, `tokens` and `tags` of a token_classification, or `template` and `target` of a generation");
    }

    #[test]
    fn generation_schemas_are_inferred() {
        let describe = |name: &str, content: &str| describe(name, content, true);
        assert_eq!(describe("a.tsv", "question\tanswer\nwhy\tso\n"), "texts question,answer");
        let first = "{\"question\": \"a\", \"context\": null, \"answer\": \"b\"}\n";
        assert_eq!(
            describe("a.jsonl", &format!("{first}{}", first.replace("null", "\"c\""))),
            "texts question,context,answer"
        );
        let pair = "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}";
        assert_eq!(describe("a.jsonl", pair), "texts prompt,chosen");
        // A column that contains the whole prompt with its answer is left out, and so are numbers.
        let whole = "{\"id\": 1, \"instruction\": \"a\", \"output\": \"b\", \"text\": \"Say: a\\nb\"}";
        assert_eq!(describe("a.jsonl", whole), "conversations instruction,output");
        assert_eq!(describe("a.csv", "n,question,answer\n7,why,so\n"), "texts question,answer");
        assert_eq!(describe("a.jsonl", "{\"text\": \"long\", \"target\": \"short\"}"), "texts text,target");
        assert_eq!(describe("a.jsonl", "{\"content\": \"a\"}"), "plain");
        assert_eq!(describe("a.txt", "a\tb\n"), "plain");
        // If no column is to be generated, a generative model falls back to the label column.
        assert_eq!(describe("a.tsv", "good\t1\nbad\t0\n"), "labels 0,1 of ,,");
        let turns =
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}";
        assert_eq!(describe("a.jsonl", turns), "conversations ");
        insta::assert_snapshot!(describe("a.jsonl", "{\"question\": \"a\", \"answer\": \"b\", \"response\": \"c\"}"), @"`a.jsonl`: `answer`, `response` may each be the generated column; write the task yourself, `template` and `target` of a generation");
        insta::assert_snapshot!(describe("a.jsonl", "{\"q{1}\": \"a\", \"answer\": \"b\"}"), @r#"`a.jsonl`: the column "q{1}" has a character that a spec cannot hold; rename it"#);
    }
}
