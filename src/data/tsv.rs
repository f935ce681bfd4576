//! `sentence<TAB>label` lines; a first line that says just that, or uses one of the other usual names, is a header. A
//! label is a class's name or, where no name is a number, its index.

use std::collections::HashSet;
use std::path::Path;

use super::error::did_you_mean;
use super::{DataError, Example, Goal, LeftOut, MARKS, Placed, Tokenizer};

/// Names of the two columns in a header, in any case.
const HEADER: [&[&str]; 2] = [&["sentence", "text", "review"], &["label", "labels", "target"]];

/// The examples, and what the file has besides.
pub fn read(
    text: &str,
    path: &Path,
    labels: &[String],
    tokenizer: &Tokenizer,
) -> Result<(Vec<Placed>, LeftOut), DataError> {
    let mut sentences = Vec::new();
    let mut rows = Vec::new();
    let mut left_out = LeftOut::default();
    let mut first = true;
    for (number, line) in (1..).zip(text.lines()) {
        if line.is_empty() {
            continue;
        }
        let at_top = std::mem::take(&mut first);
        if at_top && is_header(line, labels) {
            left_out.header = true;
            continue;
        }
        let (sentence, class) = parse(line, labels, at_top).map_err(|message| DataError::Line {
            path: path.to_owned(),
            line: number,
            message,
        })?;
        sentences.push(sentence);
        rows.push((number, class));
    }
    if sentences.is_empty() {
        let message = "write one `sentence<TAB>label` a line".into();
        return Err(DataError::Empty { path: path.to_owned(), message });
    }
    let ids = tokenizer.encode(sentences, true)?;
    // What a tokenizer leaves out altogether, such as characters of no width, would train as marks alone.
    if let Some((_, (number, _))) = ids.iter().zip(&rows).find(|(ids, _)| ids.len() <= MARKS) {
        let message = "the tokenizer makes no token of the sentence".into();
        return Err(DataError::Line { path: path.to_owned(), line: *number, message });
    }
    let placed = |(ids, (number, class)): (Vec<i32>, (usize, i32))| {
        (format!("line {number}"), Example { types: vec![0; ids.len()], ids, goal: Goal::Class(class) })
    };
    Ok((ids.into_iter().zip(rows).map(placed).collect(), left_out))
}

/// The names of classes that occur, each once, in the order of the file.
pub fn labels(text: &str, path: &Path) -> Result<Vec<String>, DataError> {
    let mut labels: Vec<String> = vec![];
    let mut seen = HashSet::new();
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.is_empty());
    for (at, (number, line)) in lines.enumerate() {
        if at == 0 && is_header(line, &[]) {
            continue;
        }
        let Some((_, label)) = line.rsplit_once('\t') else {
            let message = "no tab; write `sentence<TAB>label`".into();
            return Err(DataError::Line { path: path.to_owned(), line: number, message });
        };
        if seen.insert(label.trim()) {
            labels.push(label.trim().to_owned());
        }
    }
    Ok(labels)
}

/// Names of the columns. Where a class has the second's name, the line is an example.
fn is_header(line: &str, labels: &[String]) -> bool {
    let columns: Vec<&str> = line.split('\t').map(str::trim).collect();
    let named = |(column, names): (&&str, &[&str])| names.iter().any(|name| name.eq_ignore_ascii_case(column));
    columns.len() == 2
        && columns.iter().zip(HEADER).all(named)
        && !labels.iter().any(|label| label.trim() == columns[1])
}

/// Columns for a message: the first ones, none at full length.
fn shown(columns: &[&str]) -> String {
    let short = |column: &&str| match column.char_indices().nth(20) {
        Some((at, _)) => format!("`{}…`", &column[..at]),
        None => format!("`{column}`"),
    };
    let more = if columns.len() > 4 { ", …" } else { "" };
    columns.iter().take(4).map(short).collect::<Vec<_>>().join(", ") + more
}

/// The sentence as it stands, blanks at its ends included, since they may be tokens; one of nothing else is empty.
fn parse<'a>(line: &'a str, labels: &[String], at_top: bool) -> Result<(&'a str, i32), String> {
    let (sentence, label) = match line.split('\t').collect::<Vec<_>>()[..] {
        [sentence, label] => (sentence, label.trim()),
        [_] => return Err("no tab; write `sentence<TAB>label`".into()),
        ref columns => {
            let (count, columns) = (columns.len(), shown(columns));
            return Err(format!("{count} columns, {columns}; write `sentence<TAB>label` with one tab"));
        }
    };
    if sentence.trim().is_empty() {
        return Err("the sentence is empty".into());
    }
    let class = labels.iter().position(|l| l.trim() == label).or_else(|| index(label, labels));
    match class {
        Some(class) => Ok((sentence, class as i32)),
        None => {
            let hint = did_you_mean(label, labels.iter().map(String::as_str));
            let indices = match labels.iter().any(|l| is_number(l)) {
                true => String::new(),
                false => format!(", or 0 to {}", labels.len().saturating_sub(1)),
            };
            let header = match at_top && hint.is_empty() && label.contains(char::is_alphabetic) {
                true => "; if the line is a header, it is to be `sentence<TAB>label`",
                false => "",
            };
            Err(format!("no label `{label}`{hint}; the task's labels are `{}`{indices}{header}", labels.join("`, `")))
        }
    }
}

/// The class that a label counts. Beside names that are numbers there are no indices: `1` would be two classes.
fn index(label: &str, labels: &[String]) -> Option<usize> {
    let counts = !labels.iter().any(|l| is_number(l));
    counts.then(|| (0..labels.len()).find(|i| i.to_string() == label)).flatten()
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
