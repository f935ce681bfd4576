//! Token classification: a row holds a list of words and a list of as many labels, which are class names or indices.
//!
//! Only a word's first token has a class, as is usual (Devlin et al., 2019, section 5.3).

use std::cell::Cell as Counter;

use super::examples::NO_TAG;
use super::labelled::{class, known, usual_column};
use super::rows::{Cell, Fault, File, FileRows, Format, Location, Row, Value};
use super::{DataError, Example, ExampleBuilder, Goal, LocatedExample, Tokenizer};

/// Usual names of the columns of words and of labels, compared without case.
pub(super) const WORDS: &[&str] = &["tokens", "words"];
pub(super) const TAGS: &[&str] = &["tags", "ner_tags", "pos_tags", "labels"];

/// Builds examples of labelled words.
pub struct Tagged<'t> {
    labels: &'t [String],
    /// The columns of words and of labels, if the task names them.
    columns: [Option<&'t str>; 2],
    tokenizer: &'t Tokenizer,
    /// The number of words for which the tokenizer gave no token.
    lost: Counter<usize>,
}

/// The words of an example and their class indices.
pub struct Draft {
    words: Vec<String>,
    classes: Vec<i32>,
}

impl<'t> Tagged<'t> {
    pub fn new(labels: &'t [String], columns: [Option<&'t str>; 2], tokenizer: &'t Tokenizer) -> Self {
        Tagged { labels, columns, tokenizer, lost: Counter::new(0) }
    }

    /// The columns of words and of labels among these names.
    fn named<'n>(&'n self, names: &[&'n str]) -> Result<[&'n str; 2], String> {
        let one = |wanted: Option<&'n str>, usual: &[&str], key: &str| match wanted {
            Some(wanted) => known(wanted, names).map(|()| wanted),
            None => usual_column(names, usual, key),
        };
        Ok([one(self.columns[0], WORDS, "tokens")?, one(self.columns[1], TAGS, "tags")?])
    }
}

/// The items of a list column as texts.
fn list(row: &Row, name: &str) -> Result<Vec<String>, String> {
    let items = match row.get(name) {
        Some(Cell::Value(Value::List(items))) => items,
        cell => {
            let kind = cell.map_or("missing", Cell::kind);
            return Err(format!("`{name}` is {kind}; it must be a list with one item per word"));
        }
    };
    let text = |(at, item): (usize, &Value)| match item.text() {
        Some(text) => Ok(text.to_owned()),
        None => Err(format!("item {at} of `{name}` is {}; it must be text or a number", item.kind())),
    };
    (1..).zip(items).map(text).collect()
}

impl ExampleBuilder for Tagged<'_> {
    type Draft = Draft;

    fn open<'f>(&self, file: &'f File) -> Result<FileRows<'f>, DataError> {
        let rows = FileRows::of(file, Format::Tsv, None, |_| false);
        let rows = rows.map_err(|fault| DataError::at(&file.path, fault))?;
        if let Some((line, _)) = &rows.header {
            let message = "a table of texts holds no lists of words; write the rows as json, such as \
                           {\"tokens\": [\"Ann\", \"sings\"], \"tags\": [\"B-PER\", \"O\"]}";
            return Err(DataError::at(&file.path, Fault::fatal(Location::Line(*line), message)));
        }
        Ok(rows)
    }

    fn check(&self, names: &[&str]) -> Result<(), String> {
        self.named(names).map(drop)
    }

    fn draft(&self, row: &Row, _: bool) -> Result<Draft, String> {
        let names = row.names();
        let [words, tags] = self.named(&names)?;
        let (items, labels) = (list(row, words)?, list(row, tags)?);
        if items.len() != labels.len() {
            let (words_there, tags_there) = (items.len(), labels.len());
            return Err(format!(
                "`{words}` and `{tags}` have {words_there} and {tags_there} items; each word has one label"
            ));
        }
        if items.is_empty() {
            return Err(format!("`{words}` is empty: there is no word"));
        }
        let classes = (1..).zip(&labels).map(|(at, label): (usize, &String)| {
            class(label.trim(), self.labels).map_err(|message| format!("word {at}: {message}"))
        });
        Ok(Draft { classes: classes.collect::<Result<_, _>>()?, words: items })
    }

    fn encode(&self, drafts: Vec<(Location, Draft)>) -> Result<Vec<Result<Vec<LocatedExample>, Fault>>, DataError> {
        let words: Vec<Vec<&str>> =
            drafts.iter().map(|(_, draft)| draft.words.iter().map(String::as_str).collect()).collect();
        let encoded = self.tokenizer.encode_words(&words)?;
        drop(words);
        let one = |(encoded, (at, draft)): (super::tokenizer::EncodedWords, (Location, Draft))| {
            let (mut tags, mut last) = (vec![NO_TAG; encoded.ids.len()], None);
            for (tag, word) in tags.iter_mut().zip(encoded.words) {
                if let Some(word) = word.filter(|_| word != last) {
                    *tag = draft.classes[word];
                }
                last = word.or(last);
            }
            let goal = Goal::Tags(tags);
            match goal.target_count() {
                0 => return Err(Fault::row(at, "the tokenizer makes no token of any word")),
                found => self.lost.update(|lost| lost + draft.words.len() - found),
            }
            let example = Example { types: vec![0; encoded.ids.len()], ids: encoded.ids, goal };
            Ok(vec![LocatedExample { at, length: example.ids.len(), example }])
        };
        Ok(encoded.into_iter().zip(drafts).map(one).collect())
    }

    fn empty(&self) -> &'static str {
        "it has no row"
    }

    fn notes(&self) -> Vec<String> {
        let note =
            |lost| format!("words of which the tokenizer makes no token, and of which nothing is label_kind: {lost}");
        Some(self.lost.get()).filter(|&lost| lost > 0).map(note).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use peft_grammar::model::{Task, TaskKind};
    use serde_json::{Value as Json, json};

    use super::*;
    use crate::data::tests::{Case, folder_of};
    use crate::data::{Dataset, Reading};

    fn task(max_tokens: u64, bidirectional: bool) -> Task {
        let labels = ["O", "B-PER", "I-PER"].map(str::to_owned).to_vec();
        Task {
            name: "t".into(),
            max_tokens,
            bidirectional,
            kind: TaskKind::TokenClassification { labels, tokens: None, tags: None },
        }
    }

    #[test]
    fn words_and_labels_become_token_classes() {
        let rows = "{\"tokens\": [\"Ann\", \"likes\", \"tea\"], \"tags\": [\"B-PER\", \"O\", 0]}\n\
                    {\"tokens\": [\"good tea\", \"Ann\"], \"tags\": [\"I-PER\", \"B-PER\"]}\n";
        let case = Case::named("a.jsonl", rows);
        let example = |ids: &[i32], tags: &[i32]| Example {
            ids: ids.to_vec(),
            types: vec![0; ids.len()],
            goal: Goal::Tags(tags.to_vec()),
        };
        let data = case.load(&task(64, true)).unwrap();
        let all = [example(&[1, 6, 7, 5, 2], &[-1, 1, 0, 0, -1]), example(&[1, 3, 5, 6, 2], &[-1, 2, -1, 1, -1])];
        assert_eq!(data.examples, all);
        // Truncation keeps the closing special token and truncates the labels with the tokens.
        let data = case.load(&task(4, true)).unwrap();
        assert_eq!(data.examples, [example(&[1, 6, 7, 2], &[-1, 1, 0, -1]), example(&[1, 3, 5, 2], &[-1, 2, -1, -1])]);
        assert_eq!((data.cut, data.dropped), (2, 0));
        let batch = crate::data::Batch::pack(data.examples.iter());
        assert_eq!((batch.targets, batch.labels), (vec![1, 2, 5], vec![1, 0, 2]));
        // Without special tokens, truncation keeps a prefix.
        case.set_marks(Json::Null);
        let data = case.load(&task(2, false)).unwrap();
        assert_eq!(data.examples, [example(&[6, 7], &[1, 0]), example(&[3, 5], &[2, -1])]);
    }

    #[test]
    fn invalid_rows_are_refused() {
        let error = |row: Json| Case::named("a.jsonl", row.to_string()).error(&task(64, true));
        insta::assert_snapshot!(error(json!({"tokens": ["Ann", "sings"], "tags": ["B-PER"]})), @"`a.jsonl`, line 1: `tokens` and `tags` have 2 and 1 items; each word has one label");
        insta::assert_snapshot!(error(json!({"tokens": ["Ann"], "tags": ["B-PRE"]})), @"`a.jsonl`, line 1: word 1: no label `B-PRE` (did you mean `B-PER`?); the task's labels are `O`, `B-PER`, `I-PER`, or 0 to 2");
        insta::assert_snapshot!(error(json!({"tokens": "Ann sings", "tags": ["O", "O"]})), @"`a.jsonl`, line 1: `tokens` is text; it must be a list with one item per word");
        insta::assert_snapshot!(error(json!({"tokens": ["Ann", null], "tags": ["O", "O"]})), @"`a.jsonl`, line 1: item 2 of `tokens` is null; it must be text or a number");
        insta::assert_snapshot!(error(json!({"tokens": [], "tags": []})), @"`a.jsonl`, line 1: `tokens` is empty: there is no word");
        insta::assert_snapshot!(error(json!({"text": "Ann", "tags": []})), @"`a.jsonl`, line 1: no column is called `tokens` or `words`; say in the task which it is, `tokens: \"…\"`, of `text`, `tags`");
        let table = Case::named("a.csv", "tokens,tags\nAnn,O\n").error(&task(64, true));
        insta::assert_snapshot!(table, @r#"`a.csv`, line 1: a table of texts holds no lists of words; write the rows as json, such as {"tokens": ["Ann", "sings"], "tags": ["B-PER", "O"]}"#);
        let rows = "{\"tokens\": [\"Ann\"], \"tags\": [\"O\"]}\n{\"tokens\": [], \"tags\": []}\n";
        let reading = Reading { skip_bad: true, cache: None };
        let data = Case::named("a.jsonl", rows).read(&["a.jsonl"], &task(64, true), &reading).unwrap();
        assert_eq!((data.len(), data.skipped), (1, 1));
    }

    /// Ids and labels are those of transformers, with and without truncation.
    #[test]
    fn word_ids_and_labels_match_transformers() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/words.json");
        let fixtures: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let words: Vec<Vec<String>> = serde_json::from_value(fixtures["words"].clone()).unwrap();
        let rows = words.iter().map(|words| {
            let tags: Vec<usize> = (0..words.len()).map(|i| i % 3).collect();
            format!("{}\n", json!({"tokens": words, "tags": tags}))
        });
        let rows: String = rows.collect();
        for case in fixtures["cases"].as_array().unwrap() {
            let (name, limit) = (case["name"].as_str().unwrap(), case["limit"].as_u64().unwrap());
            let folder = folder_of(name);
            let path = folder.path().join("data.jsonl");
            std::fs::write(&path, &rows).unwrap();
            let task = task(limit, !name.starts_with("bytes"));
            let tokenizer = Tokenizer::load(folder.path(), &task, 10_000).unwrap();
            let data = Dataset::load(&path, &task, &tokenizer).unwrap();
            for (i, example) in data.examples.iter().enumerate() {
                let ids: Vec<i32> = serde_json::from_value(case["ids"][i].clone()).unwrap();
                let tags: Vec<i32> = serde_json::from_value(case["tags"][i].clone()).unwrap();
                assert_eq!((example.ids, example.goal), (ids, Goal::Tags(tags)), "{name}, {limit}: {:?}", words[i]);
            }
        }
    }
}
