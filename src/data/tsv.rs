//! `sentence<TAB>label` lines; a first line that says just that is a header. A label is a class's name or, where no
//! name is a number, its index.

use std::path::Path;

use super::error::did_you_mean;
use super::{DataError, Example, Goal, MARKS, Placed, Tokenizer};

const HEADER: &str = "sentence\tlabel";

pub fn read(text: &str, path: &Path, labels: &[String], tokenizer: &Tokenizer) -> Result<Vec<Placed>, DataError> {
    let mut sentences = Vec::new();
    let mut rows = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.is_empty() || (number == 1 && line == HEADER) {
            continue;
        }
        let (sentence, class) =
            parse(line, labels).map_err(|message| DataError::Line { path: path.to_owned(), line: number, message })?;
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
    Ok(ids.into_iter().zip(rows).map(placed).collect())
}

/// The sentence as it stands, blanks at its ends included, since they may be tokens; one of nothing else is empty.
fn parse<'a>(line: &'a str, labels: &[String]) -> Result<(&'a str, i32), String> {
    let (sentence, label) = match line.split('\t').collect::<Vec<_>>()[..] {
        [sentence, label] => (sentence, label.trim()),
        [_] => return Err("no tab; write `sentence<TAB>label`".into()),
        ref columns => return Err(format!("{} columns; write `sentence<TAB>label` with one tab", columns.len())),
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
            Err(format!("no label `{label}`{hint}; the task's labels are `{}`{indices}", labels.join("`, `")))
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
