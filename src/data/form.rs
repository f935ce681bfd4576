//! What a file of data holds, as far as it can be told without a task.

use std::collections::HashSet;
use std::path::Path;

use peft_grammar::model::Columns;

use super::labelled::{IMPLIED, LABEL, TEXT, listed};
use super::rows::{Cell, Fault, File, Format, Row, Rows, Value, shortened};
use super::{DataError, tags};
use crate::hub::chat::Conversation;

/// A form of data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// Texts, or pairs of them, with the names of their classes: all that occur, in the order of numbers or of the
    /// alphabet. A column of a usual name is not said.
    Labelled { columns: Columns, labels: Vec<String> },
    /// Texts, or pairs of them, with a number each.
    Numbered(Columns),
    /// Lists of words and of their classes, by the names of these columns, with all that occur.
    Tagged { tokens: String, tags: String, labels: Vec<String> },
    /// WebNLG's records.
    Records,
    /// Conversations. Where a row has columns of text in place of a list of messages, those, what the assistant says last.
    Conversations(Vec<String>),
    /// Columns of text; what stands in the last one is to be written.
    Texts(Vec<String>),
    /// Texts as they stand.
    Plain,
}

/// More classes than these are a mistake about which column is what.
const MOST: usize = 200;

/// Columns of pairs, as the common sets call them.
const PAIRS: [[&str; 2]; 7] = [
    ["premise", "hypothesis"],
    ["sentence1", "sentence2"],
    ["text_a", "text_b"],
    ["text1", "text2"],
    ["question1", "question2"],
    ["question", "sentence"],
    ["query", "passage"],
];

/// Other names of a label's column.
const CLASS: [&str; 6] = ["gold_label", "class", "category", "sentiment", "score", "similarity_score"];

/// Columns whose text is to be written, what stands before it in other columns.
const WRITTEN: [&str; 9] =
    ["completion", "response", "output", "answer", "target", "summary", "chosen", "reply", "translation"];

/// Columns that say nothing of a text, and what was chosen against.
const BESIDE: [&str; 8] = ["id", "idx", "index", "guid", "uid", "url", "rejected", "source"];

/// As many rows tell the form.
const SAMPLE: usize = 100;

/// The form of a file, for a model that can write, or one that cannot.
pub fn form(path: &Path, writes: bool) -> Result<Form, DataError> {
    let file = File::open(path)?;
    let at = |fault| DataError::at(path, fault);
    let refuse = |message: String| DataError::Named { path: path.to_owned(), message };
    if writes && file.is_plain_text() {
        return Ok(Form::Plain);
    }
    let mut rows = Rows::of(&file, Format::Tsv, Some(IMPLIED), is_header).map_err(at)?;
    if rows.entries {
        return Ok(Form::Records);
    }
    let sample = rows.by_ref().take(SAMPLE).collect::<Result<Vec<_>, _>>().map_err(at)?;
    if sample.is_empty() {
        return Err(DataError::Empty { path: path.to_owned(), message: "it has no row".into() });
    }
    let names = names(&sample);
    let labelled = columns(&names);
    if let Some([tokens, tags]) = lists(&sample, &names) {
        let (tokens, tags) = (tokens.to_owned(), tags.to_owned());
        let labels = labels(&sample, rows, &tags).map_err(|fault| DataError::at(path, fault))?;
        return match labels {
            Labels::Names(labels) => Ok(Form::Tagged { tokens, tags, labels }),
            Labels::Numbers => {
                Err(refuse(format!("the labels in `{tags}` are numbers with fractions, and a word is of a class")))
            }
            Labels::TooMany => Err(refuse(too_many(&tags))),
        };
    }
    if writes {
        let conversation = sample.iter().all(|row| Conversation::of(&row.json()).is_ok());
        let texts = written(&sample, &names).map_err(refuse)?;
        match texts {
            Some(texts) if conversation => return Ok(Form::Conversations(texts)),
            Some(texts) => return Ok(Form::Texts(texts)),
            None if conversation => return Ok(Form::Conversations(vec![])),
            None => {}
        }
        let plain = super::text::usual(&names).filter(|_| labelled.is_none());
        if plain.is_some() {
            return Ok(Form::Plain);
        }
    }
    let Some((columns, label)) = labelled else {
        return Err(refuse(format!(
            "which of its columns is what cannot be told by their names, {}; write the task yourself: `text` and `label` \
             of a classification, `tokens` and `tags` of a token_classification, or `template` and `target` of a generation",
            listed(&names)
        )));
    };
    let label = label.to_owned();
    match labels(&sample, rows, &label).map_err(at)? {
        Labels::Names(labels) => Ok(Form::Labelled { columns, labels }),
        Labels::Numbers => Ok(Form::Numbered(columns)),
        Labels::TooMany => Err(refuse(too_many(&label))),
    }
}

fn too_many(label: &str) -> String {
    format!("more than {MOST} labels: is the column `{label}` the class?")
}

/// What a column of labels holds.
enum Labels {
    /// All names, in the order of numbers or of the alphabet.
    Names(Vec<String>),
    /// Numbers with fractions, or more whole ones than there are classes.
    Numbers,
    /// More names than there are classes.
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
        // A row without a label is refused where the data are read for training, with words of its own.
        let items: Vec<&str> = match row.get(column) {
            Some(Cell::Value(Value::List(items))) => items.iter().filter_map(Value::text).collect(),
            cell => cell.and_then(Cell::text).into_iter().collect(),
        };
        for name in items.into_iter().map(str::trim) {
            if names.len() <= MOST && seen.insert(name.to_owned()) {
                writable(name, "label").map_err(|message| Fault::fatal(row.at.clone(), message))?;
                names.push(name.to_owned());
            }
            numbers &= number(name).is_some();
            whole &= number(name).is_some_and(|number| number.fract() == 0.0);
        }
        if names.len() > MOST && !numbers {
            return Ok(Labels::TooMany);
        }
    }
    if numbers && (!whole || names.len() > MOST) && !names.is_empty() {
        return Ok(Labels::Numbers);
    }
    match whole {
        true => names.sort_by(|x, y| f64::total_cmp(&number(x).unwrap_or(0.0), &number(y).unwrap_or(0.0))),
        false => names.sort(),
    }
    Ok(Labels::Names(names))
}

/// The columns of words and of their classes, if each row has lists under usual names.
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

/// The first line of a tsv names its columns: there are more than two of them, or both have names that columns have.
fn is_header(names: &[&str]) -> bool {
    let known = |name: &&str| {
        let pairs = PAIRS.iter().flatten();
        let all = TEXT.iter().chain(LABEL).chain(&CLASS).chain(&WRITTEN).chain(pairs).chain(&ASKED);
        all.into_iter().any(|known| known.eq_ignore_ascii_case(name))
    };
    names.len() > 2 || (names.len() == 2 && names.iter().all(known))
}

/// Columns of what an answer is given to.
const ASKED: [&str; 6] = ["prompt", "instruction", "input", "context", "article", "document"];

/// The names of the columns of all rows, in the order in which they are met.
fn names<'r>(rows: &'r [Row]) -> Vec<&'r str> {
    let mut names: Vec<&str> = vec![];
    for name in rows.iter().flat_map(Row::names) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The columns of a classification, and the label's name.
fn columns<'n>(names: &[&'n str]) -> Option<(Columns, &'n str)> {
    let find = |usual: &[&str]| {
        let mut found = names.iter().filter(|name| usual.iter().any(|u| u.eq_ignore_ascii_case(name)));
        found.next().copied().filter(|_| found.next().is_none())
    };
    let usual = find(LABEL);
    let label = usual.or_else(|| find(&CLASS))?;
    let own = usual.is_none().then(|| label.to_owned());
    if let Some([text, pair]) = PAIRS.iter().find_map(|pair| Some([find(&pair[..1])?, find(&pair[1..])?])) {
        return Some((Columns { text: Some(text.into()), pair: Some(pair.into()), label: own }, label));
    }
    find(TEXT).map(|_| (Columns { text: None, pair: None, label: own }, label))
}

/// The columns of text, the one that is to be written last, if one has such a name. Those that say nothing of a text, or
/// hold what is to be written, are left out.
fn written(rows: &[Row], names: &[&str]) -> Result<Option<Vec<String>>, String> {
    let is = |name: &str, known: &[&str]| known.iter().any(|known| known.eq_ignore_ascii_case(name));
    let text = |row: &Row, name: &str| row.get(name).filter(|cell| cell.kind() == "text")?.text().map(str::to_owned);
    let texts: Vec<&str> =
        names.iter().copied().filter(|name| rows.iter().any(|row| text(row, name).is_some())).collect();
    let found: Vec<&str> = texts.iter().copied().filter(|name| is(name, &WRITTEN)).collect();
    let last = match found[..] {
        [] => return Ok(None),
        [last] => last,
        _ => {
            return Err(format!(
                "{} may each be what is to be written; write the task yourself, `template` and `target` of a generation",
                listed(&found)
            ));
        }
    };
    let holds = |row: &Row, name: &str| {
        let (around, inside) = (text(row, name).unwrap_or_default(), text(row, last).unwrap_or_default());
        !inside.trim().is_empty() && around.contains(inside.trim())
    };
    let said = |name: &&str| {
        let number = rows.iter().all(|row| text(row, name).is_some_and(|text| text.trim().parse::<f64>().is_ok()));
        !is(name, &BESIDE) && !number && !rows.iter().all(|row| holds(row, name))
    };
    let mut columns: Vec<String> =
        texts.iter().copied().filter(|name| *name != last).filter(said).map(str::to_owned).collect();
    columns.push(last.to_owned());
    columns.iter().try_for_each(|name| writable(name, "column"))?;
    Ok(Some(columns))
}

/// Refuses what a spec cannot hold between its quotes, or a template between its braces.
fn writable(name: &str, what: &str) -> Result<(), String> {
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

    /// What `peftc new` takes a file for, in a line.
    fn told(name: &str, content: &str, writes: bool) -> String {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        std::fs::write(&path, content).expect("written");
        let columns = |c: &Columns| [&c.text, &c.pair, &c.label].map(|name| name.clone().unwrap_or_default()).join(",");
        match form(&path, writes) {
            Ok(Form::Labelled { columns: found, labels }) => {
                format!("labels {} of {}", labels.join(","), columns(&found))
            }
            Ok(Form::Numbered(found)) => format!("numbers of {}", columns(&found)),
            Ok(Form::Tagged { tokens, tags, labels }) => format!("tags {} of {tokens},{tags}", labels.join(",")),
            Ok(Form::Records) => "records".into(),
            Ok(Form::Conversations(texts)) => format!("conversations {}", texts.join(",")),
            Ok(Form::Texts(texts)) => format!("texts {}", texts.join(",")),
            Ok(Form::Plain) => "plain".into(),
            Err(error) => error.to_string().replace(&format!("{}/", folder.path().display()), ""),
        }
    }

    #[test]
    fn classes() {
        let told = |name: &str, content: &str| told(name, content, false);
        assert_eq!(told("a.tsv", "good\t1\nbad\t0\n"), "labels 0,1 of ,,");
        assert_eq!(told("a.tsv", "review\tsentiment\ngood\tpos\nbad\tneg\n"), "labels neg,pos of ,,sentiment");
        assert_eq!(told("a.tsv", "premise\thypothesis\tlabel\na\tb\tyes\n"), "labels yes of premise,hypothesis,");
        assert_eq!(told("a.txt", "good tea\t1\n"), "labels 1 of ,,");
        assert_eq!(
            told("a.jsonl", "{\"text\": \"a\", \"target\": 1}\n{\"text\": \"b\", \"target\": 0}"),
            "labels 0,1 of ,,"
        );
        assert_eq!(
            told("a.csv", "sentence1,sentence2,score\na,b,2.5\nc,d,4\n"),
            "numbers of sentence1,sentence2,score"
        );
        let many: String = (0..=MOST).map(|i| format!("good\t{i}\n")).collect();
        assert_eq!(told("a.tsv", &many), "numbers of ,,");
        assert_eq!(told("a.tsv", "good\t1\nbad\t-1\nfair\t0.0\n"), "labels -1,0.0,1 of ,,");
        let words = "{\"id\": 1, \"tokens\": [\"Ann\", \"sings\"], \"ner_tags\": [\"B-PER\", \"O\"]}";
        assert_eq!(told("a.jsonl", words), "tags B-PER,O of tokens,ner_tags");
        insta::assert_snapshot!(told("a.tsv", "good\t5\" pipe\n"), @r#"`a.tsv`, line 1: the label "5\" pipe" has a character that a spec cannot hold; rename it"#);
        insta::assert_snapshot!(told("a.csv", "text,label\ngood,\n"), @"`a.csv`, line 2: a label without a name; give it one");
        insta::assert_snapshot!(told("a.csv", "body,verdict\ngood,1\n"), @"`a.csv`: which of its columns is what cannot be told by their names, `body`, `verdict`; write the task yourself: `text` and `label` of a classification, `tokens` and `tags` of a token_classification, or `template` and `target` of a generation");
    }

    #[test]
    fn texts() {
        let told = |name: &str, content: &str| told(name, content, true);
        assert_eq!(told("a.tsv", "question\tanswer\nwhy\tso\n"), "texts question,answer");
        let first = "{\"question\": \"a\", \"context\": null, \"answer\": \"b\"}\n";
        assert_eq!(
            told("a.jsonl", &format!("{first}{}", first.replace("null", "\"c\""))),
            "texts question,context,answer"
        );
        let pair = "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}";
        assert_eq!(told("a.jsonl", pair), "texts prompt,chosen");
        // The whole prompt, answer included, is no part of it; neither are numbers.
        let whole = "{\"id\": 1, \"instruction\": \"a\", \"output\": \"b\", \"text\": \"Say: a\\nb\"}";
        assert_eq!(told("a.jsonl", whole), "conversations instruction,output");
        assert_eq!(told("a.csv", "n,question,answer\n7,why,so\n"), "texts question,answer");
        assert_eq!(told("a.jsonl", "{\"text\": \"long\", \"target\": \"short\"}"), "texts text,target");
        assert_eq!(told("a.jsonl", "{\"content\": \"a\"}"), "plain");
        assert_eq!(told("a.txt", "a\tb\n"), "plain");
        // Where nothing is to be written, a model that could write is asked for the label.
        assert_eq!(told("a.tsv", "good\t1\nbad\t0\n"), "labels 0,1 of ,,");
        let turns =
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}";
        assert_eq!(told("a.jsonl", turns), "conversations ");
        insta::assert_snapshot!(told("a.jsonl", "{\"question\": \"a\", \"answer\": \"b\", \"response\": \"c\"}"), @"`a.jsonl`: `answer`, `response` may each be what is to be written; write the task yourself, `template` and `target` of a generation");
        insta::assert_snapshot!(told("a.jsonl", "{\"q{1}\": \"a\", \"answer\": \"b\"}"), @r#"`a.jsonl`: the column "q{1}" has a character that a spec cannot hold; rename it"#);
    }
}
