//! `sentence<TAB>label` lines; a first line that says just that is a header. A label is a class's name or index.

use std::path::Path;

use super::error::did_you_mean;
use super::{DataError, Example, Goal, Tokenizer};

const HEADER: &str = "sentence\tlabel";

pub fn read(text: &str, path: &Path, labels: &[String], tokenizer: &Tokenizer) -> Result<Vec<Example>, DataError> {
    let mut sentences = Vec::new();
    let mut classes = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.is_empty() || (number == 1 && line == HEADER) {
            continue;
        }
        let (sentence, class) =
            parse(line, labels).map_err(|message| DataError::Line { path: path.to_owned(), line: number, message })?;
        sentences.push(sentence);
        classes.push(class);
    }
    if sentences.is_empty() {
        let message = "write one `sentence<TAB>label` a line".into();
        return Err(DataError::Empty { path: path.to_owned(), message });
    }
    let ids = tokenizer.encode(sentences, true)?;
    let example = |(ids, class): (Vec<i32>, i32)| Example { types: vec![0; ids.len()], ids, goal: Goal::Class(class) };
    Ok(ids.into_iter().zip(classes).map(example).collect())
}

fn parse<'a>(line: &'a str, labels: &[String]) -> Result<(&'a str, i32), String> {
    let (sentence, label) = match line.split('\t').collect::<Vec<_>>()[..] {
        [sentence, label] => (sentence.trim(), label.trim()),
        [_] => return Err("no tab; write `sentence<TAB>label`".into()),
        ref columns => return Err(format!("{} columns; write `sentence<TAB>label` with one tab", columns.len())),
    };
    if sentence.is_empty() {
        return Err("the sentence is empty".into());
    }
    let index = || label.parse().ok().filter(|&i: &usize| i < labels.len());
    let class = labels.iter().position(|l| l == label).or_else(index).ok_or_else(|| {
        let hint = did_you_mean(label, labels.iter().map(String::as_str));
        let last = labels.len().saturating_sub(1);
        format!("no label `{label}`{hint}; the task's labels are `{}`, or 0 to {last}", labels.join("`, `"))
    })?;
    Ok((sentence, class as i32))
}
