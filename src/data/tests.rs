//! Tests of the readers on small files, valid and invalid; of packing; and of real data sets, if `PEFTC_DATA` names
//! them.

use std::path::{Path, PathBuf};
use std::time::Instant;

use peft_grammar::model::{Columns, Piece, Task, TaskKind};
use tempfile::TempDir;

use super::*;

/// The vocabulary of the tests' word-level tokenizer with `[CLS]` and `[SEP]`, in the order of the ids from 0.
pub(super) const WORDS: [&str; 8] = ["[UNK]", "[CLS]", "[SEP]", "good", "bad", "tea", "Ann", "likes"];

fn tokenizer_json(marks: bool) -> String {
    let vocab: serde_json::Map<_, _> = WORDS.iter().enumerate().map(|(i, w)| (w.to_string(), i.into())).collect();
    let mark = |w: &str, id: u32| serde_json::json!({"id": w, "ids": [id], "tokens": [w]});
    let special = |w: &str| serde_json::json!({"SpecialToken": {"id": w, "type_id": 0}});
    let sequence = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
    let processor = serde_json::json!({
        "type": "TemplateProcessing",
        "single": [special("[CLS]"), sequence, special("[SEP]")], "pair": [sequence],
        "special_tokens": {"[CLS]": mark("[CLS]", 1), "[SEP]": mark("[SEP]", 2)},
    });
    serde_json::json!({
        "version": "1.0",
        "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": if marks { processor } else { serde_json::Value::Null }, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    })
    .to_string()
}

pub(super) fn classification(max_tokens: u64) -> Task {
    let labels = vec!["negative".into(), "positive".into()];
    Task {
        name: "sentiment".into(),
        max_tokens,
        bidirectional: true,
        kind: TaskKind::Classification { labels, columns: Columns::default() },
    }
}

fn pieces(text: &str) -> Vec<Piece> {
    text.split_whitespace()
        .map(|word| match word.strip_prefix('{').and_then(|w| w.strip_suffix('}')) {
            Some(field) => Piece::Field(field.into()),
            None => Piece::Special(word.into()),
        })
        .collect()
}

/// A generation task with the template `head (repeat)* tail` and the special tokens of these tests.
fn generation(head: &str, repeat: &str, tail: &str) -> Task {
    let mut template = pieces(head);
    template.push(Piece::Repeat(pieces(repeat)));
    template.extend(pieces(tail));
    let special = ["<b>", "<e>", "<s>", "<p>", "<o>", "<t>"].map(str::to_owned).to_vec();
    Task {
        name: "t".into(),
        max_tokens: 64,
        bidirectional: false,
        kind: TaskKind::Generation { special, template, target: "<t>".into(), each: vec![], pack: false },
    }
}

fn plain_generation() -> Task {
    generation("<b>", "<s> {subject} <p> {property} <o> {object}", "<t> {text} <e>")
}

/// A folder with a tokenizer and one data file.
pub(super) struct Case {
    pub dir: TempDir,
    pub file: PathBuf,
}

impl Case {
    fn new(content: impl AsRef<[u8]>) -> Self {
        Case::named("data", content)
    }

    /// A case whose data file has this name.
    pub fn named(name: &str, content: impl AsRef<[u8]>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer_json(true)).unwrap();
        let file = dir.path().join(name);
        std::fs::write(&file, content).unwrap();
        Case { dir, file }
    }

    pub fn load(&self, task: &Task) -> Result<Dataset, DataError> {
        let tokenizer = Tokenizer::load(self.dir.path(), task, (WORDS.len() + task.special_tokens().len()) as u64)?;
        Dataset::load(&self.file, task, &tokenizer)
    }

    /// Reads files of the folder, named by paths or patterns.
    pub fn read(&self, named: &[&str], task: &Task, reading: &Reading) -> Result<Dataset, DataError> {
        let tokenizer = Tokenizer::load(self.dir.path(), task, (WORDS.len() + task.special_tokens().len()) as u64)?;
        let named: Vec<PathBuf> = named.iter().map(|name| self.dir.path().join(name)).collect();
        Dataset::read(&named, task, &tokenizer, reading)
    }

    /// Sets the tokenizer's post-processor.
    pub fn set_marks(&self, processor: serde_json::Value) {
        let mut json: serde_json::Value = serde_json::from_str(&tokenizer_json(true)).unwrap();
        json["post_processor"] = processor;
        std::fs::write(self.dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    }

    /// The error's message without the folder, which differs from run to run.
    pub fn plain(&self, error: DataError) -> String {
        error.to_string().replace(&format!("{}/", self.dir.path().display()), "")
    }

    pub fn error(&self, task: &Task) -> String {
        self.plain(self.load(task).unwrap_err())
    }
}

/// A folder with the files of a case of `tests/interop/tokenizers.json`.
pub(super) fn folder_of(case: &str) -> TempDir {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/tokenizers.json");
    let all: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (file, content) in all["cases"][case]["files"].as_object().unwrap() {
        let text = match content.as_str() {
            Some(key) => all["contents"][key].as_str().unwrap().to_owned(),
            None => content.to_string(),
        };
        std::fs::write(folder.path().join(file), text).unwrap();
    }
    folder
}

pub(super) fn class(ids: &[i32], class: i32) -> Example {
    Example { ids: ids.to_vec(), types: vec![0; ids.len()], goal: Goal::Class(class) }
}

#[test]
fn labelled_sentences_are_encoded() {
    let case = Case::new("\u{feff}sentence\tlabel\r\ngood tea \t1\r\nbad\tnegative\n\n");
    let data = case.load(&classification(64)).unwrap();
    assert_eq!(data.examples, [class(&[1, 3, 5, 2], 1), class(&[1, 4, 2], 0)]);
    assert_eq!((data.tokens(), data.longest(), data.cut), (7, 4, 0));
}

#[test]
fn truncation_keeps_the_closing_token() {
    let data = Case::new("good tea good tea\t1\ntea\t1").load(&classification(4)).unwrap();
    assert_eq!(data.examples, [class(&[1, 3, 5, 2], 1), class(&[1, 5, 2], 1)]);
    assert_eq!((data.cut, data.dropped), (1, 0));
}

/// Rows are tokenised in chunks of limited size, and keep their order and their locations.
#[test]
fn long_rows_are_tokenised_in_chunks() {
    let row = |i: usize| format!("{} {}\t{}\n", ["good", "bad", "Ann"][i % 3], "tea ".repeat(MAX_CHUNK.1 / 12), i % 2);
    let data = Case::new((0..8).map(row).collect::<String>()).load(&classification(4)).unwrap();
    let want: Vec<Example> = (0..8).map(|i| class(&[1, [3, 4, 6][i % 3], 5, 2], i as i32 % 2)).collect();
    assert_eq!(data.examples, want);
    assert_eq!((data.place(7), data.cut), (Some("line 8"), 8));
}

/// The tokenizer of a causal model adds no special tokens, so truncation keeps a prefix.
#[test]
fn sentences_without_special_tokens_keep_a_prefix() {
    let case = Case::new("good tea good\t1\ntea\t1\n");
    case.set_marks(serde_json::Value::Null);
    let task = Task { bidirectional: false, ..classification(2) };
    assert_eq!(case.load(&task).unwrap().examples, [class(&[3, 5], 1), class(&[5], 1)]);
    let opening = serde_json::json!({
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]}},
    });
    case.set_marks(opening);
    assert_eq!(case.load(&task).unwrap().examples, [class(&[1, 3], 1), class(&[1, 5], 1)]);
    assert!(case.error(&Task { bidirectional: true, ..task }).contains("no opening and closing mark"));
}

#[test]
fn regression_labels_are_numbers() {
    let columns = Columns { label: Some("score".into()), ..Columns::default() };
    let task = Task { kind: TaskKind::Regression { columns }, ..classification(64) };
    let read = |label: &str| Case::named("a.csv", format!("text,score\ngood,{label}\n")).load(&task);
    for (label, number) in [("2.5", 2.5), ("-1", -1.0), (" 3e-2 ", 0.03), ("0.1", 0.1_f32)] {
        assert_eq!(read(label).unwrap().examples.get(0).goal, Goal::Number(number), "{label}");
    }
    let error = |label: &str| Case::named("a.csv", format!("text,score\ngood,{label}\n")).error(&task);
    insta::assert_snapshot!(error("high"), @"`a.csv`, line 2: the label `high` is not a number, and a regression learns numbers");
    insta::assert_snapshot!(error("1e39"), @"`a.csv`, line 2: the label `1e39` is not a finite number; a regression learns numbers");
    insta::assert_snapshot!(error("nan"), @"`a.csv`, line 2: the label `nan` is not a finite number; a regression learns numbers");
    let batch = Batch::pack(read("2.5").unwrap().examples.iter());
    assert_eq!((batch.labels.len(), batch.numbers, batch.starts, batch.lengths), (0, vec![2.5], vec![0], vec![3]));
}

#[test]
fn sentences_without_tokens_are_refused() {
    let case = Case::new("good\t1\n\u{200b} \u{200b}\t0");
    let nothing = r#""normalizer":{"type":"Replace","pattern":{"String":"\u200b"},"content":""}"#;
    let json = tokenizer_json(true).replace(r#""normalizer":null"#, nothing);
    assert!(json.contains("Replace"));
    std::fs::write(case.dir.path().join("tokenizer.json"), json).unwrap();
    assert_eq!(case.error(&classification(64)), "`data`, line 2: the tokenizer makes no token of the sentence");
}

#[test]
fn invalid_sentence_files_are_refused() {
    let error = |content: &[u8]| Case::new(content).error(&classification(64));
    insta::assert_snapshot!(error(b"good tea\t1\nno tab here\n"), @"`data`, line 2: no tab; write `sentence<TAB>label`");
    insta::assert_snapshot!(error(b"good\ttea\t1"), @"`data`, line 1: 3 columns, `good`, `tea`, `1`; write `sentence<TAB>label` with one tab");
    insta::assert_snapshot!(error(b"sentence\tlabel\n \t1"), @"`data`, line 2: the sentence is empty");
    insta::assert_snapshot!(error(b"good\tpositve"), @"`data`, line 1: no label `positve` (did you mean `positive`?); the task's labels are `negative`, `positive`, or 0 to 1");
    insta::assert_snapshot!(error(b"good\t2"), @"`data`, line 1: no label `2`; the task's labels are `negative`, `positive`, or 0 to 1");
    insta::assert_snapshot!(error(b"bad\t0\ngood\t-1"), @"`data`, line 2: no label `-1`; the task's labels are `negative`, `positive`, or 0 to 1");
    insta::assert_snapshot!(error(b"good\t18446744073709551616"), @"`data`, line 1: no label `18446744073709551616`; the task's labels are `negative`, `positive`, or 0 to 1");
    insta::assert_snapshot!(error(b"good\t1\nb\xffd\t0\n"), @"`data`, line 2: not UTF-8; save the file in that encoding");
    insta::assert_snapshot!(error(b""), @"`data` holds no example: write one `sentence<TAB>label` per line");
    insta::assert_snapshot!(error(b"sentence\tlabel\n"), @"`data` holds no example: write one `sentence<TAB>label` per line");
}

/// Usual column names are found in any case and after blank lines. The summary says that a line was taken for a header.
#[test]
fn headers_are_recognised() {
    let examples = |content: &str| {
        let data = Case::new(content).load(&classification(64)).unwrap();
        (data.len(), data.describe().ends_with(", its first line is a header"))
    };
    for header in
        ["sentence\tlabel", "Sentence\tLabel", "text\tlabel", "\n\nsentence\tlabel", "TEXT\ttarget", "review\tlabels "]
    {
        assert_eq!(examples(&format!("{header}\ngood\t1\nbad\t0\n")), (2, true), "{header:?}");
    }
    assert_eq!(examples("good\t1\n"), (1, false));
    assert_eq!(examples("index\tsentence\tlabel\n0\tgood\t1\n"), (1, true));
    let error = |content: &str| Case::new(content).error(&classification(64));
    insta::assert_snapshot!(error("premise\tclass\ngood\t1\n"), @r#"`data`, line 1: no label `class`; the task's labels are `negative`, `positive`, or 0 to 1; if the line is a header, the task names its columns, `text: "premise"  label: "class"`"#);
    insta::assert_snapshot!(error("index\ttitle\tlabel\n0\tgood\t1\n"), @"`data`, line 1: 3 columns, `index`, `title`, `label`; write `sentence<TAB>label` with one tab");
    insta::assert_snapshot!(error("good\t1\nsentence\tlabel\n"), @"`data`, line 2: no label `label`; the task's labels are `negative`, `positive`, or 0 to 1");
    insta::assert_snapshot!(error(&format!("{}\t1\t2\t3\t4\n", "good ".repeat(9))), @"`data`, line 1: 5 columns, `good good good good …`, `1`, `2`, `3`, …; write `sentence<TAB>label` with one tab");
    // If a class has the name of a label column, the line is an example.
    let labels = ["label", "other"].map(String::from).to_vec();
    let task = Task { kind: TaskKind::Classification { labels, columns: Columns::default() }, ..classification(64) };
    let data = Case::new("sentence\tlabel\ngood\tother\n").load(&task).unwrap();
    assert_eq!((data.len(), data.left_out.header), (2, false));
}

/// Files of unsupported formats are recognised by their first bytes.
#[test]
fn binary_files_are_refused_by_format() {
    let error = |content: &[u8]| Case::new(content).error(&classification(64));
    insta::assert_snapshot!(error(b"\x1f\x8b\x08\x00\x00"), @"`data`, compressed by gzip, cannot be unpacked: it is damaged or cut short (unexpected end of file); fetch or write it again");
    insta::assert_snapshot!(error(b"PK\x03\x04\x14\x00"), @"`data` is a zip archive, or a spreadsheet in one, which is not read here; unpack it, or save it as text with tabs");
    insta::assert_snapshot!(error(b"PAR1\x15\x04\x15"), @"`data`, row 1: the Parquet file is damaged, cut short or of a kind that is not read (EOF: Parquet file too small. Size is 7 but need 8)");
    insta::assert_snapshot!(error(b"\xff\xfef\x00i\x00"), @"`data` is UTF-16, which is not read here; save it as UTF-8");
}

/// Lists in place of objects are refused. Serde alone would accept them for structs.
#[test]
fn lists_in_place_of_objects_are_refused() {
    let task = plain_generation();
    let error = |content: &str| Case::new(content).error(&task).lines().next().unwrap().to_owned();
    let entry = r#"{"lexicalisations":[{"comment":"good","lex":"tea"}],"modifiedtripleset":[{"subject":"a","property":"b","object":"c"}]}"#;
    insta::assert_snapshot!(error(&format!("[{entry}]")), @"`data`, line 1, row 1: `lexicalisations` and `modifiedtripleset` are lists of objects; name the one to go over, `(lexicalisations: … )*`");
    insta::assert_snapshot!(error(&format!(r#"[[{{"1":{entry}}}]]"#)), @"`data`, line 1, row 1: a list where an object of columns is expected");
    insta::assert_snapshot!(error(&format!(r#"{{"entries":[["1",{entry}]]}}"#)), @"`data`, line 1, column 12: a list where an object of an entry by its number is expected");
    insta::assert_snapshot!(error(&format!(r#"{{"entries":{{"1":{entry}}}}}"#)), @"`data`, line 1, column 11: an object where a list is expected");
    insta::assert_snapshot!(error(r#"{"entries":[{"1":["cat",[["good","tea"]],[["a","b","c"]]]}]}"#), @"`data`, line 1, column 17: a list where an object with `lexicalisations` and `modifiedtripleset` is expected");
    insta::assert_snapshot!(error(&format!(r#"{{"entries":[{{"1":{}}}]}}"#, entry.replace(r#"{"comment":"good","lex":"tea"}"#, r#"["good","tea"]"#))), @"`data`, line 1, column 37: a list where an object with `comment` and `lex` is expected");
    insta::assert_snapshot!(error(&format!(r#"{{"entries":[{{"1":{}}}]}}"#, entry.replace(r#"{"subject":"a","property":"b","object":"c"}"#, r#"["a","b","c"]"#))), @"`data`, line 1, column 90: a list where an object with `subject`, `property` and `object` is expected");
}

fn entry(comment: &str, triples: &str, text: &str) -> String {
    format!(
        r#"{{"entries": [{{"1": {{"category": "tea", "shape": "NA",
            "lexicalisations": [{{"comment": "{comment}", "lex": "{text}", "lang": ""}}],
            "modifiedtripleset": [{triples}]}}}}]}}"#
    )
}

const TRIPLE: &str = r#"{"subject": "Ann", "property": "likes", "object": "tea"}"#;

#[test]
fn triples_and_texts_fill_the_template() {
    let case = Case::new(entry("good", &format!("{TRIPLE}, {TRIPLE}"), "good tea"));
    let data = case.load(&plain_generation()).unwrap();
    let (b, e, s, p, o, t) = (8, 9, 10, 11, 12, 13);
    let expected = Example {
        ids: vec![b, s, 6, p, 7, o, 5, s, 6, p, 7, o, 5, t, 3, 5, e],
        types: vec![b, s, s, p, p, o, o, s, s, p, p, o, o, t, t, t, t],
        goal: Goal::after(13, 17),
    };
    assert_eq!(data.examples, [expected]);

    let batch = Batch::pack(data.examples.iter().chain(data.examples.iter()));
    assert_eq!(batch.starts, [0, 17]);
    assert_eq!(batch.lengths, [17, 17]);
    assert_eq!(batch.positions[15..19], [15, 16, 0, 1]);
    assert_eq!(batch.targets, [13, 14, 15, 30, 31, 32]);
    assert_eq!(batch.labels, [3, 5, e, 3, 5, e]);
    assert_eq!((batch.tokens(), batch.sequences(), batch.types.len()), (34, 2, 34));
}

#[test]
fn examples_truncated_before_the_target_are_dropped() {
    let case = Case::new(entry("good", TRIPLE, "good tea"));
    let (mut task, whole) = (plain_generation(), 11);
    for (max_tokens, cut) in [(whole, 0), (9, 1)] {
        task.max_tokens = max_tokens;
        let data = case.load(&task).unwrap();
        assert_eq!((data.len(), data.dropped, data.cut), (1, 0, cut));
    }
    // With at most 8 tokens plus the target token nothing remains to be predicted. The first target is number 9.
    for max_tokens in [8, 2, 1] {
        task.max_tokens = max_tokens;
        let limit = format!("`task.max_tokens` is {max_tokens},");
        let message = case.error(&task);
        assert!(message.contains(&limit), "{message}");
        insta::allow_duplicates! { insta::assert_snapshot!(message.replace(&limit, "LIMIT"), @"`data`: no example is left: LIMIT and the cut to it leaves no target in any of the 1 examples; the first, entry 1, has 11 tokens, its first target is number 9; raise `task.max_tokens` to 11, or leave such examples out"); }
    }
    // If something remains, the summary counts the truncated examples.
    let long = format!("{TRIPLE}, {TRIPLE}");
    let both = entry("good", TRIPLE, "tea").replace("]}}]}", &format!("]}}}}, {}", &entry("good", &long, "tea")[13..]));
    task.max_tokens = 10;
    let data = Case::new(both).load(&task).unwrap();
    assert_eq!((data.len(), data.dropped, data.cut), (1, 1, 1));
    assert!(
        data.describe().ends_with("1 examples, 10 tokens, the longest 10, 1 cut, 1 of them dropped: no target is left")
    );
}

/// Examples that truncation reduces to special tokens are dropped.
#[test]
fn examples_truncated_to_special_tokens_are_dropped() {
    let case = Case::new("good tea good\t1\ntea\t0\n");
    assert_eq!(case.load(&classification(3)).unwrap().examples, [class(&[1, 3, 2], 1), class(&[1, 5, 2], 0)]);
    for max_tokens in [2, 1] {
        let message = case.error(&classification(max_tokens));
        assert!(
            message.contains("no sentence in any of the 2 examples; the first, line 1, has 5 tokens;"),
            "{message}"
        );
    }
}

/// Blanks at both ends of a sentence are kept, and only the line ending is removed. Labels are trimmed.
#[test]
fn sentences_are_not_trimmed() {
    let read = |line: &str| {
        let case = Case::new(line);
        let json = std::fs::read_to_string(case.dir.path().join("tokenizer.json")).unwrap();
        // Every character is a token, blanks included.
        let chars: serde_json::Map<_, _> = ["[UNK]", "[CLS]", "[SEP]", " ", "a", "\u{a0}"]
            .iter()
            .enumerate()
            .map(|(i, w)| (w.to_string(), i.into()))
            .collect();
        let mut json: serde_json::Value = serde_json::from_str(&json).unwrap();
        json["model"]["vocab"] = chars.into();
        json["pre_tokenizer"] = serde_json::json!({
            "type": "Split", "pattern": {"Regex": "(?s)."}, "behavior": "Isolated", "invert": false,
        });
        std::fs::write(case.dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        let tokenizer = Tokenizer::load(case.dir.path(), &classification(64), 6).unwrap();
        let read = Dataset::load(&case.file, &classification(64), &tokenizer).unwrap();
        read.examples.iter().map(|example| example.ids).collect::<Vec<_>>()
    };
    assert_eq!(read(" a \t0\r\na\t 1 \n\u{a0}a\tnegative"), [vec![1, 3, 4, 3, 2], vec![1, 4, 2], vec![1, 5, 4, 2]]);
}

/// If class names are numbers, labels are not read as indices, which would be ambiguous.
#[test]
fn labels_are_names_or_indices() {
    let case = Case::new("");
    let class = |labels: &[&str], label: &str| {
        let labels = labels.iter().map(|l| l.to_string()).collect();
        let task = Task {
            name: "t".into(),
            max_tokens: 8,
            bidirectional: true,
            kind: TaskKind::Classification { labels, columns: Columns::default() },
        };
        std::fs::write(&case.file, format!("tea\t{label}\n")).unwrap();
        case.load(&task).map(|data| data.examples.get(0).goal).map_err(|e| e.to_string())
    };
    let words = ["bad", "fair", "good"];
    assert_eq!(class(&words, "good"), Ok(Goal::Class(2)));
    assert_eq!(class(&words, "1"), Ok(Goal::Class(1)));
    for wrong in ["3", "-1", "+1", "01", "1.0", ""] {
        let message = class(&words, wrong).unwrap_err();
        assert!(message.contains("line 1: no label") && message.contains("or 0 to 2"), "{wrong}: {message}");
    }
    let stars = ["1", "2", "3", "4", "5"];
    assert_eq!(class(&stars, "1"), Ok(Goal::Class(0)));
    assert_eq!(class(&stars, "5"), Ok(Goal::Class(4)));
    for (labels, wrong) in [
        (&stars[..], "0"),
        (&["-1", "1"], "0"),
        (&["0.5", "bad"], "1"),
        (&["none", "2"], "0"),
        (&["\u{661}", "\u{662}"], "0"),
        (&["0x10", "bad"], "1"),
        (&["1/2", "\u{bd}"], "0"),
    ] {
        let message = class(labels, wrong).unwrap_err();
        assert!(message.contains("line 1: no label") && message.contains(&format!("`{}`", labels[0])), "{message}");
        assert!(!message.contains("or 0 to"), "{message}");
    }
    // Digits inside a name do not make it a number.
    assert_eq!(class(&["1 star", "2 stars"], "0"), Ok(Goal::Class(0)));
}

#[test]
fn skipped_texts_are_counted() {
    let text = |comment: &str| format!(r#"{{"comment": "{comment}", "lex": "tea"}}"#);
    let one = |number: u32, texts: &[String]| {
        format!(r#""{number}": {{"lexicalisations": [{}], "modifiedtripleset": [{TRIPLE}]}}"#, texts.join(", "))
    };
    let (good, bad) = (text("good"), text("toFix"));
    // An entry number that recurs is read twice.
    let all = [one(1, &[good.clone(), bad.clone(), bad.clone()]), one(1, &[good]), one(2, &[]), one(3, &[bad])];
    let data = Case::new(format!(r#"{{"entries": [{{{}}}]}}"#, all.join(", "))).load(&plain_generation()).unwrap();
    assert_eq!((data.len(), data.left_out), (2, LeftOut { texts: 3, entries: 1, header: false }));
    let words = ", 3 texts left out: their `comment` is not `good`, 1 entries left out: they have no text";
    assert!(data.describe().ends_with(words), "{}", data.describe());
}

#[test]
fn invalid_triple_files_are_refused() {
    let error = |content: &str| Case::new(content).error(&plain_generation());
    insta::assert_snapshot!(error(r#"{"entries": ["#), @r#"
    `data`, line 1, column 13: EOF while parsing a list
    a WebNLG file is {"entries": [{"1": {"lexicalisations": [{"comment", "lex"}], "modifiedtripleset": [{"subject", "property", "object"}]}}]}
    "#);
    insta::assert_snapshot!(error(&entry("good", r#"{"subject": "Ann", "object": "tea"}"#, "x")), @r#"
    `data`, line 3, column 69: missing field `property`
    a WebNLG file is {"entries": [{"1": {"lexicalisations": [{"comment", "lex"}], "modifiedtripleset": [{"subject", "property", "object"}]}}]}
    "#);
    insta::assert_snapshot!(error(&entry("good", "", "x")), @"`data`, entry 1: its `modifiedtripleset` is empty; it needs a triple");
    insta::assert_snapshot!(error(&entry("good", TRIPLE, " ")), @"`data`, entry 1: a lexicalisation's `lex` is empty; write its text or remove it");
    insta::assert_snapshot!(error(&entry("toFix", TRIPLE, "tea")), @"`data` holds no example: no entry has a lexicalisation whose `comment` is `good`");
    insta::assert_snapshot!(error(r#"{"entries": []}"#), @"`data` holds no example: no entry has a lexicalisation whose `comment` is `good`");
}

#[test]
fn invalid_templates_are_refused() {
    let case = Case::new(entry("good", TRIPLE, "tea"));
    let error = |head, repeat, tail| case.error(&generation(head, repeat, tail));
    insta::assert_snapshot!(error("<b>", "{subjct}", "<t> {text}"), @"the task's template: a triple has no field `subjct` (did you mean `subject`?); it has `subject`, `property`, `object`");
    insta::assert_snapshot!(error("{object}", "{object}", "<t> {text}"), @"the task's template: a record has no field `object`; it has `category`, `text`");
    insta::assert_snapshot!(error("<x>", "{object}", "<t> {text}"), @"the task's template: `<x>` is not among the task's special tokens");
    insta::assert_snapshot!(error("<b>", "<t>", "{text}"), @"the task's template: its target `<t>` does not occur in it outside `( … )*`");
    insta::assert_snapshot!(error("<b> {text}", "{object}", "<t> <e>"), @"the task's template: `{text}` does not follow the target `<t>`");
}

#[test]
fn unsuitable_tokenizers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let error = |task: &Task, vocab| {
        let message = Tokenizer::load(dir.path(), task, vocab).err().unwrap().to_string();
        message.replace(&dir.path().display().to_string(), "DIR")
    };
    let (sentences, triples) = (classification(8), plain_generation());
    insta::assert_snapshot!(error(&sentences, 8), @"no tokenizer in `DIR`: it holds nothing, and a tokenizer is `tokenizer.json`, `vocab.json` with `merges.txt`, or `vocab.txt`; copy the model's own there, or name its folder with `--tokenizer`");
    std::fs::write(&path, "{\"version\"").unwrap();
    insta::assert_snapshot!(error(&sentences, 8), @"`DIR/tokenizer.json` cannot be used as a tokenizer: no JSON (EOF while parsing an object at line 1 column 10); write or fetch it again");
    std::fs::write(&path, tokenizer_json(false)).unwrap();
    insta::assert_snapshot!(error(&sentences, 8), @"`DIR/tokenizer.json` cannot be used as a tokenizer: it puts no opening and closing mark (`[CLS]`, `[SEP]`) around a sentence: its `post_processor` is missing or of another model");
    insta::assert_snapshot!(error(&sentences, 7), @"the tokenizer `DIR/tokenizer.json` does not belong to this model: its vocabulary has 8 tokens, but the spec's `vocab` is 7");
    insta::assert_snapshot!(error(&triples, 8), @"the tokenizer `DIR/tokenizer.json` does not belong to this model: its vocabulary has 8 tokens (14 with the task's 6 special ones), but the spec's `vocab` is 8");
}

/// Special tokens that the tokenizer has keep their ids and add no row. The others follow in the task's order.
#[test]
fn existing_special_tokens_keep_their_ids() {
    let case = Case::new("");
    let mut task = plain_generation();
    let TaskKind::Generation { special, .. } = &mut task.kind else { panic!("it generates") };
    (special[2], special[4]) = ("tea".into(), "[SEP]".into());
    let names = special.clone();
    let tokenizer = Tokenizer::load(case.dir.path(), &task, 12).unwrap();
    assert_eq!(names.iter().map(|t| tokenizer.special(t).unwrap()).collect::<Vec<_>>(), [8, 9, 5, 10, 2, 11]);
    assert_eq!((tokenizer.appended(), tokenizer.vocabulary(), tokenizer.special("<x>")), (4, 12, None));
    let message = Tokenizer::load(case.dir.path(), &task, 11).err().unwrap().to_string();
    assert!(
        message.contains("8 tokens (12 with the task's 4 special ones), but the spec's `vocab` is 11"),
        "{message}"
    );
    // Further rows are padding, and the summary counts them.
    let line = Tokenizer::load(case.dir.path(), &task, 16).unwrap().describe();
    let line = line.replace(&case.dir.path().display().to_string(), "DIR");
    insta::assert_snapshot!(line, @"tokenizer: DIR/tokenizer.json, 8 tokens; the task's 4 new ones have the ids 8 to 11; the model's own in the task: `tea` (5), `[SEP]` (2); 4 rows of the model's 16 are left over");
}

#[test]
fn literal_texts_can_be_targets() {
    let case = Case::new(entry("good", TRIPLE, "good tea"));
    let literal = |text: &str| Piece::Literal(text.into());
    let field = |name: &str| Piece::Field(name.into());
    let template = vec![
        literal("bad"),
        Piece::Repeat(vec![field("subject"), literal("likes "), field("object")]),
        Piece::Special("<t>".into()),
        literal("good bad"),
        field("text"),
    ];
    let task = |target: &str| {
        let (special, target) = (vec!["<t>".into()], target.into());
        let kind = TaskKind::Generation { special, template: template.clone(), target, each: vec![], pack: false };
        Task { name: "t".into(), max_tokens: 64, bidirectional: false, kind }
    };
    // The loss covers the tokens after the target's last one. Literal texts have the type of the tokens before them.
    for (target, from) in [("<t>", 4), ("'good bad'", 6)] {
        let expected = Example {
            ids: vec![4, 6, 7, 5, 8, 3, 4, 3, 5],
            types: vec![0, 0, 0, 0, 8, 8, 8, 8, 8],
            goal: Goal::after(from, 9),
        };
        assert_eq!(case.load(&task(target)).unwrap().examples, [expected], "{target}");
    }
    assert!(case.error(&task("'good'")).contains("its target `'good'` does not occur in it"));
}

#[test]
fn a_missing_file_is_an_error() {
    let case = Case::new("");
    std::fs::remove_file(&case.file).unwrap();
    insta::assert_snapshot!(case.error(&classification(8)), @"cannot read `data`: No such file or directory (os error 2)");
}

#[test]
fn epochs_are_seeded_permutations() {
    let examples: Vec<_> = (0..10).map(|i| class(&[i], i % 2)).collect();
    let data = Dataset { examples: examples.into_iter().collect(), ..Dataset::default() };
    let ids = |order| Batches::new(&data, 4, order).map(|b| b.ids).collect::<Vec<_>>();
    assert_eq!(ids(Order::AsStored), [vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![8, 9]]);

    let shuffled = |seed, epoch| ids(Order::Shuffled { seed, epoch });
    assert_eq!(shuffled(1, 0).concat(), SHUFFLED, "the order of an epoch must never change");
    assert_ne!(shuffled(1, 0), shuffled(1, 1));
    assert_ne!(shuffled(1, 0), shuffled(2, 0));
    let mut all = shuffled(7, 3).concat();
    all.sort_unstable();
    assert_eq!(all, (0..10).collect::<Vec<_>>());

    let mut resumed = Batches::new(&data, 4, Order::Shuffled { seed: 1, epoch: 0 }).skip(2);
    assert_eq!(resumed.len(), 1);
    assert_eq!(resumed.next().unwrap().ids, SHUFFLED[8..]);
}

const SHUFFLED: [i32; 10] = [1, 2, 3, 9, 6, 0, 5, 7, 8, 4];

/// The data sets of this repository, `data/sentiment` and `data/triples`.
#[test]
fn shipped_data_sets_are_read() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    let task = classification(64);
    let words = Case::new("");
    let tokenizer = Tokenizer::load(words.dir.path(), &task, WORDS.len() as u64).unwrap();
    for (file, count) in [("train.tsv", 602), ("dev.tsv", 160)] {
        let data = Dataset::load(&shipped.join("sentiment").join(file), &task, &tokenizer).unwrap();
        let positive = data.examples.iter().filter(|e| e.goal == Goal::Class(1)).count();
        assert_eq!((data.len(), positive, data.cut), (count, count / 2, 0), "{file}");
    }

    let task = plain_generation();
    let tokenizer = Tokenizer::load(&shipped.join("triples"), &task, 1536 + 6).unwrap();
    for (file, count) in [("train.json", 104), ("dev.json", 28)] {
        let data = Dataset::load(&shipped.join("triples").join(file), &task, &tokenizer).unwrap();
        assert_eq!((data.len(), data.dropped), (count, 0), "{file}");
    }
}

/// The real data sets below `PEFTC_DATA`. Prints a line if it is not set.
pub(super) fn real_data() -> Option<PathBuf> {
    let root = std::env::var_os("PEFTC_DATA").filter(|root| !root.is_empty());
    let data = root.map(|root| PathBuf::from(root).join("data"));
    if data.is_none() {
        println!("skipped: PEFTC_DATA is not set");
    }
    data
}

/// The task of WebNLG on GPT-2 in the layout of the inducer-tuning paper.
fn webnlg() -> Task {
    let special = [
        "<pad>",
        "<bos_qa>",
        "<eos_qa>",
        "<question>",
        "<answer>",
        "<document>",
        "<unused0>",
        "<unused1>",
        "<unused2>",
        "<unused3>",
        "<bos>",
        "<eos>",
        "<subject>",
        "<property>",
        "<object>",
        "<target>",
    ];
    let mut template = pieces("<bos>");
    template.push(Piece::Repeat(pieces("<subject> {subject} <property> {property} <object> {object}")));
    template.extend(pieces("<target> {text} <eos>"));
    let special = special.map(str::to_owned).to_vec();
    let kind = TaskKind::Generation { special, template, target: "<target>".into(), each: vec![], pack: false };
    Task { name: "webnlg".into(), max_tokens: 1024, bidirectional: false, kind }
}

#[test]
fn the_whole_webnlg_is_read() {
    let Some(data) = real_data() else { return };
    let task = webnlg();
    let tokenizer = Tokenizer::load(&data.join("tokenizers/gpt2"), &task, 50273).unwrap();
    let begun = Instant::now();
    let train = Dataset::load(&data.join("webnlg/train.json"), &task, &tokenizer).unwrap();
    println!("{} examples, {} tokens in {:.2?}", train.len(), train.tokens(), begun.elapsed());
    assert_eq!((train.len(), train.longest(), train.cut), (18025, 271, 0));
    let dev = Dataset::load(&data.join("webnlg/dev.json"), &task, &tokenizer).unwrap();
    assert_eq!(dev.len(), 2258);

    let first = &dev.examples.get(0);
    assert_eq!((first.ids[0], first.ids[1], *first.ids.last().unwrap()), (50267, 50269, 50268));
    assert_eq!((first.types[0], first.types[2], *first.types.last().unwrap()), (50267, 50269, 50272));

    // The two files of older checkpoints, without `tokenizer.json`.
    let old = tempfile::tempdir().unwrap();
    for name in ["vocab.json", "merges.txt"] {
        std::fs::copy(data.join("tokenizers/gpt2").join(name), old.path().join(name)).unwrap();
    }
    let split = Tokenizer::load(old.path(), &task, 50273).unwrap();
    let same = Dataset::load(&data.join("webnlg/dev.json"), &task, &split).unwrap();
    assert!(same.examples.iter().eq(dev.examples.iter()), "vocab.json and merges.txt say the same as tokenizer.json");
}
