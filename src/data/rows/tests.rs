//! Tests of user files through the whole reader: rows in every format, files that are refused, and pairs of texts.

use std::io::Write;

use peft_grammar::model::{Columns, Piece, Task, TaskKind};
use serde_json::Value as Json;

use super::compressed::{Compression, Fault as Packed};
use crate::data::tests::{Case, class, classification, folder_of, real_data};
use crate::data::{DataError, Dataset, Example, Goal, Reading, Tokenizer};

/// A classification task with these column names. An empty name stands for none.
fn columns(text: &str, pair: &str, label: &str) -> Task {
    let name = |name: &str| Some(name.to_owned()).filter(|name| !name.is_empty());
    let columns = Columns { text: name(text), pair: name(pair), label: name(label) };
    let labels = vec!["negative".into(), "positive".into()];
    Task { kind: TaskKind::Classification { labels, columns }, ..classification(64) }
}

/// The template `(turns: {q} <s> {a})* {question} <t> {answer} <e>`, or the same without the name of the list.
fn turns(list: Option<&str>) -> Task {
    let field = |name: &str| Piece::Field(name.into());
    let token = |token: &str| Piece::Special(token.into());
    let items = vec![field("q"), token("<s>"), field("a")];
    let repeat = match list {
        Some(name) => Piece::Each(name.into(), items),
        None => Piece::Repeat(items),
    };
    let template = vec![repeat, field("question"), token("<t>"), field("answer"), token("<e>")];
    let special = ["<s>", "<t>", "<e>"].map(str::to_owned).to_vec();
    Task {
        name: "t".into(),
        max_tokens: 64,
        bidirectional: false,
        kind: TaskKind::Generation { special, template, target: "<t>".into(), each: vec![], pack: false },
    }
}

/// The template `{question} <t> {answer}`.
fn questions() -> Task {
    let field = |name: &str| Piece::Field(name.into());
    let template = vec![field("question"), Piece::Special("<t>".into()), field("answer")];
    let special = vec!["<t>".to_owned()];
    Task {
        name: "t".into(),
        max_tokens: 64,
        bidirectional: false,
        kind: TaskKind::Generation { special, template, target: "<t>".into(), each: vec![], pack: false },
    }
}

/// BERT's post-processor, which supports pairs.
fn bert() -> Json {
    serde_json::json!({"type": "BertProcessing", "cls": ["[CLS]", 1], "sep": ["[SEP]", 2]})
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packer = flate2::write::GzEncoder::new(vec![], flate2::Compression::default());
    packer.write_all(bytes).unwrap();
    packer.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// The same two rows in every format, plain and compressed, with and without an extension.
#[test]
fn every_format_gives_the_same_rows() {
    let rows = [class(&[1, 3, 5, 2], 1), class(&[1, 4, 2], 0)];
    let json = r#"[{"text": "good tea", "label": 1, "id": null}, {"label": "negative", "text": "bad"}]"#;
    let object = format!(r#"{{"version": "1", "data": {json}, "tags": ["a"]}}"#);
    let keyed = r#"{"a": {"text": "good tea", "label": 1}, "b": {"text": "bad", "label": 0}}"#;
    let lines = "{\"text\": \"good tea\", \"label\": 1}\n\n{\"text\": \"bad\", \"label\": 0}\n";
    let csv = "\u{feff}id,text,label\r\n7,\"good\r\ntea\",1\r\n\r\n8,bad,\"negative\"";
    let tsv = "id\ttext\tlabel\n7\tgood tea\t1\n8\tbad\tnegative\n";
    let bare = "good tea\t1\nbad\t0\n";
    for (name, content) in [
        ("a.json", json),
        ("a", json),
        ("a.json", object.as_str()),
        ("a.json", keyed),
        ("a.jsonl", lines),
        ("a.ndjson", lines),
        ("a.json", lines),
        ("a.jsonl", json),
        ("a.csv", csv),
        ("a.CSV", csv),
        ("a.csv", tsv),
        ("a.tsv", tsv),
        ("a.txt", tsv),
        ("a", tsv),
        ("a", bare),
        ("a.csv", bare),
    ] {
        let read = |name: &str, content: &[u8]| {
            let case = Case::named(name, content);
            case.load(&classification(64)).unwrap_or_else(|e| panic!("{name} {content:?}: {e}")).examples
        };
        assert_eq!(read(name, content.as_bytes()), rows, "{name} {content}");
        assert_eq!(read(&format!("{name}.gz"), &gzip(content.as_bytes())), rows, "{name} {content}, gzip");
        assert_eq!(read(&format!("{name}.zst"), &zstd(content.as_bytes())), rows, "{name} {content}, zstd");
    }
    // Concatenated gzip members and zstd frames.
    let parts = bare.split_at(11);
    let two = |pack: fn(&[u8]) -> Vec<u8>| [pack(parts.0.as_bytes()), pack(parts.1.as_bytes())].concat();
    let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9], &two(zstd)[..]].concat();
    for packed in [two(gzip), two(zstd), skipped] {
        assert_eq!(Case::named("a", packed).load(&classification(64)).unwrap().examples, rows);
    }
}

/// The output of the program `zstd` for forty times `good tea\t1\nbad\t0\n`, with a checksum.
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd\x04\x68\xc5\x00\x00\x88\x67\x6f\x6f\x64\x20\x74\x65\x61\x09\x31\x0a\x62\x61\x64\x09\x30\x0a\x01\x00\x29\x51\x35\x97\x91\xcb\xa2\xb9";

#[test]
fn files_compressed_by_other_programs_are_read() {
    let data = Case::named("a.tsv.zst", ZSTD).load(&classification(64)).unwrap();
    assert_eq!((data.len(), data.tokens()), (80, 280));
    let mut damaged = ZSTD.to_vec();
    *damaged.last_mut().unwrap() ^= 1;
    let message = Case::named("a.tsv.zst", damaged).error(&classification(64));
    insta::assert_snapshot!(message, @"`a.tsv.zst`, compressed by zstd, cannot be unpacked: it is damaged or cut short (its checksum does not match its content); fetch or write it again");
}

#[test]
fn decompression_is_limited() {
    let zeros = vec![b'a'; 1 << 20];
    for compression in [Compression::Gzip, Compression::Zstd] {
        let packed = if compression == Compression::Gzip { gzip(&zeros) } else { zstd(&zeros) };
        assert!(packed.len() < 1 << 12, "{}", packed.len());
        assert_eq!(compression.unpack_within(&packed, 1 << 20).unwrap().len(), 1 << 20);
        let fault = compression.unpack_within(&packed, (1 << 20) - 1).unwrap_err();
        assert!(matches!(fault, Packed::Large(limit) if limit == (1 << 20) - 1), "{fault:?}");
    }
    let bomb = gzip(&vec![b'a'; (64 << 20) + 1]);
    let message = Case::named("a.tsv.gz", &bomb).error(&classification(64));
    let message = message.replace(&bomb.len().to_string(), "COUNT");
    insta::assert_snapshot!(message, @"`a.tsv.gz`, compressed by gzip, cannot be unpacked: its COUNT bytes unpack to more than 64 MB, which is implausible for text; unpack it yourself if the size is right");
}

/// Adds a chat template to the case's tokenizer: each message is `Ann` or `tea`, its content, and `likes`.
fn talk(case: &Case) {
    let template = "{% for m in messages %}{{ ' Ann ' if m.role == 'user' else ' tea ' }}{{ m.content }} likes{% endfor %}\
                    {% if add_generation_prompt %}{{ ' tea ' }}{% endif %}";
    let config = serde_json::json!({"chat_template": template});
    std::fs::write(case.dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// Rows that Arrow wrote with each compression equal those of the jsonl file.
#[test]
fn parquet_files_of_arrow_are_read() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/parquet");
    let rows = |name: &str| -> Vec<(Vec<String>, serde_json::Map<String, Json>)> {
        let file = super::File::open(&folder.join(name)).unwrap();
        let rows =
            super::FileRows::of(&file, super::Format::Unknown, None, |_| true).unwrap_or_else(|f| panic!("{f:?}"));
        let row = |row: Result<super::Row, super::Fault>| {
            let row = row.unwrap_or_else(|fault| panic!("{name}: {fault:?}"));
            (row.names().iter().map(|name| name.to_string()).collect(), row.json())
        };
        rows.map(row).collect()
    };
    let expected = rows("rows.jsonl");
    assert_eq!(expected.len(), 40);
    for name in ["none", "snappy", "gzip", "zstd", "lz4"] {
        let found = rows(&format!("{name}.parquet"));
        assert_eq!(found.len(), expected.len(), "{name}");
        for (number, (found, expected)) in (1..).zip(found.iter().zip(&expected)) {
            assert_eq!(found, expected, "{name}, row {number}");
        }
    }
}

/// Damage at any offset of a file gives an error message or other values. It never ends the process.
#[test]
fn damaged_parquet_is_an_error() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/parquet");
    let case = Case::named("a.parquet", "");
    let path = case.dir.path().join("a.parquet");
    let task = columns("text", "", "label");
    for name in ["none", "snappy"] {
        let whole = std::fs::read(folder.join(format!("{name}.parquet"))).unwrap();
        for length in (0..whole.len()).step_by(97) {
            std::fs::write(&path, &whole[..length]).unwrap();
            let message = case.error(&task);
            assert!(length < 4 || message.contains("the Parquet file is damaged, cut short"), "{length}: {message}");
        }
        for at in (0..whole.len()).step_by(41) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x55;
            std::fs::write(&path, damaged).unwrap();
            if let Err(error) = case.load(&task) {
                assert!(error.to_string().contains("a.parquet"), "{error}");
            }
        }
    }
}

#[test]
fn conversations_learn_the_assistant_turns() {
    let rows = r#"{"messages": [{"role": "user", "content": "good"}, {"role": "assistant", "content": "bad bad"}, {"role": "user", "content": "likes"}, {"role": "assistant", "content": "good"}]}
{"instruction": "good", "input": "", "output": "bad"}"#;
    let task = Task { name: "t".into(), max_tokens: 64, bidirectional: false, kind: TaskKind::Chat };
    let case = Case::named("a.jsonl", rows);
    insta::assert_snapshot!(case.error(&task), @"`tokenizer.json`: the tokenizer has no chat template (`chat_template.jinja`, or `chat_template` of `tokenizer_config.json`), so it does not define how a conversation is written: name the folder of a tokenizer that has one, such as the model's own instruction-tuned variant, with `--tokenizer`, or give the spec's task a `template`");
    talk(&case);
    let data = case.load(&task).unwrap();
    let example = |ids: &[i32], ranges: &[std::ops::Range<usize>]| Example {
        ids: ids.to_vec(),
        types: vec![0; ids.len()],
        goal: Goal::Tokens(ranges.to_vec()),
    };
    let ann = 6;
    let first = example(&[ann, 3, 7, 5, 4, 4, 7, ann, 7, 7, 5, 3, 7], &[4..7, 11..13]);
    assert_eq!(data.examples, [first, example(&[ann, 3, 7, 5, 4, 7], &[4..6])]);
    // In a packed batch both turns are targets, each token predicted from those before it.
    let batch = crate::data::Batch::pack(data.examples.iter());
    assert_eq!(batch.targets, [3, 4, 5, 10, 11, 16, 17]);
    assert_eq!(batch.labels, [4, 4, 7, 3, 7, 4, 7]);
    // Truncation removes the last turn, and a conversation without an answer is dropped.
    let data = case.load(&Task { max_tokens: 8, ..task.clone() }).unwrap();
    assert_eq!((data.examples.get(0).goal, data.cut), (Goal::Tokens(vec![4..7]), 1));
    let skip = Reading { skip_bad: true, cache: None };
    let case = Case::named("a.jsonl", format!("{rows}\n{{\"messages\": []}}\n{{\"text\": 1}}"));
    talk(&case);
    assert_eq!(case.read(&["a.jsonl"], &task, &skip).unwrap().skipped, 2);
}

#[test]
fn plain_texts_are_split_with_one_token_overlap() {
    let task = |max_tokens, end: Option<&str>| {
        let kind = TaskKind::Text { text: None, end: end.map(str::to_owned) };
        Task { name: "t".into(), max_tokens, bidirectional: false, kind }
    };
    let texts = |name: &str, content: &str, task: &Task| {
        let data = Case::named(name, content).load(task).unwrap();
        data.examples.iter().map(|e| (e.ids.clone(), e.goal)).collect::<Vec<_>>()
    };
    let all = |ids: &[i32]| (ids.to_vec(), Goal::after(0, ids.len()));
    let five = "good bad\ntea Ann likes";
    // A text file is one text. If it is split, each token but the first is a target exactly once.
    assert_eq!(texts("a.txt", five, &task(64, None)), [all(&[3, 4, 5, 6, 7])]);
    assert_eq!(texts("a.txt", five, &task(3, None)), [all(&[3, 4, 5]), all(&[5, 6, 7])]);
    assert_eq!(texts("a.txt", five, &task(4, Some("[SEP]"))), [all(&[3, 4, 5, 6]), all(&[6, 7, 2])]);
    assert_eq!(texts("a.txt.gz", "tea", &task(4, Some("<end>"))), [all(&[5, 8])]);
    let rows = "{\"text\": \"good tea\"}\n{\"text\": \"Ann\", \"id\": 1}\n";
    assert_eq!(texts("a.jsonl", rows, &task(4, Some("[SEP]"))), [all(&[3, 5, 2]), all(&[6, 2])]);
    let message = Case::named("a.jsonl", rows).error(&task(4, None));
    insta::assert_snapshot!(message, @"`a.jsonl`, line 2: the text has a single token, and there is none to predict");
}

/// Files that are refused, with their messages.
#[test]
fn invalid_files_are_refused() {
    let (usual, named, pairs) =
        (classification(64), columns("premise", "", "gold"), columns("premise", "hypothesis", "gold"));
    let (chat, only, ask) = (turns(Some("turns")), turns(None), questions());
    let cases: &[(&str, &Task, &[u8])] = &[
        // csv and tsv.
        ("a.csv", &usual, b""),
        ("a.csv", &usual, b"text,label\n"),
        ("a.csv", &usual, b"text;label\ngood;1\n"),
        ("a.csv", &usual, b"text,label\ngood, very good,1\n"),
        ("a.csv", &usual, b"text,label\ngood\n"),
        ("a.csv", &usual, b"text,label\n\"good,1\nbad,0\n"),
        ("a.csv", &usual, b"text,label\n\"good\" tea,1\n"),
        ("a.csv", &usual, b"text,label\n\"two\nlines\",1\nb\xffd,0\n"),
        ("a.csv", &usual, b"text,label\n\"two\nlines\",1\ngood,maybe\n"),
        ("a.csv", &usual, b"comment,class\ngood,1\n"),
        ("a.csv", &usual, b"text,review,label\ngood,bad,1\n"),
        ("a.csv", &named, b"premis,gold\ngood,1\n"),
        ("a.csv", &named, b"premise,gold,gold\ngood,1,1\n"),
        ("a.tsv", &named, b"good\t1\nbad\t0\n"),
        ("a.tsv", &usual, b"id\ttext\tlabel\n1\tgood\n"),
        ("a.tsv", &pairs, b"premise\thypothesis\tgold\ngood\t \t1\n"),
        ("a.tsv", &pairs, b"premise\thypothesis\tgold\ngood\tbad\t-\n"),
        ("a.tsv", &ask, b"question\tanwser\ntea\tgood\n"),
        ("a.csv", &chat, b"turns,question,answer\na,tea,good\n"),
        // json.
        ("a.json", &usual, b""),
        ("a.json", &usual, b"[]"),
        ("a.json", &usual, b"text\tlabel\n"),
        ("a.json", &usual, b"[{\"text\": \"good\", \"label\": 1},\n {\"text\": \"bad\""),
        ("a.json", &usual, b"[{\"text\": \"good\", \"label\": 1}\n {\"text\": \"bad\", \"label\": 0}]"),
        ("a.json", &usual, b"[{\"text\": \"good\", \"label\": 1},\n [\"bad\", 0]]"),
        ("a.json", &usual, b"[{\"text\": \"good\", \"text\": \"bad\", \"label\": 1}]"),
        ("a.json", &usual, b"[{\"text\": \"good\", \"label\": 1}]\n[{\"text\": \"bad\", \"label\": 0}]"),
        ("a.json", &usual, b"[] x"),
        ("a.csv", &ask, b"question,answer,answer\ntea,good,bad\n"),
        ("a.csv", &usual, b"t\xe9xt,label\ngood,1\n"),
        ("a.json", &usual, b"{\"train\": [{\"text\": \"good\"}], \"test\": [{\"text\": \"bad\"}]}"),
        ("a.json", &usual, b"{\"text\": \"b\xffd\"}"),
        ("a.json", &usual, b"{\"entries\": []}"),
        ("a.jsonl", &usual, b"{\"text\": \"good\", \"label\": 1}\n\n{'text': 'bad'}\n"),
        ("a.jsonl", &usual, b"{\"text\": \"good\", \"label\": null}\n"),
        ("a.jsonl", &usual, b"{\"text\": [\"good\"], \"label\": 1}\n"),
        ("a.jsonl", &usual, b"{\"text\": \"good\", \"label\": 1.0}\n"),
        ("a.jsonl", &ask, b"{\"question\": \"tea\", \"anwser\": \"good\"}\n"),
        ("a.jsonl", &ask, b"{\"question\": null, \"answer\": \"good\"}\n"),
        ("a.jsonl", &ask, b"{\"question\": \"tea\", \"answer\": {\"text\": \"good\"}}\n"),
        ("a.jsonl", &ask, b"{\"question\": \"tea\", \"answer\": [\"good\"]}\n"),
        ("a.jsonl", &ask, b"{\"question\": \"tea\", \"answer\": \" \"}\n"),
        ("a.jsonl", &chat, b"{\"turn\": [], \"question\": \"tea\", \"answer\": \"good\"}\n"),
        (
            "a.jsonl",
            &chat,
            b"{\"turns\": [{\"q\": \"tea\", \"b\": \"bad\"}], \"question\": \"tea\", \"answer\": \"good\"}\n",
        ),
        ("a.jsonl", &chat, b"{\"turns\": [\"tea\"], \"question\": \"tea\", \"answer\": \"good\"}\n"),
        ("a.jsonl", &chat, b"{\"turns\": \"tea\", \"question\": \"tea\", \"answer\": \"good\"}\n"),
        ("a.jsonl", &only, b"{\"question\": \"tea\", \"answer\": \"good\"}\n"),
        (
            "a.jsonl",
            &only,
            b"{\"x\": [{\"q\": 1}], \"y\": [{\"q\": 2}], \"question\": \"tea\", \"answer\": \"good\"}\n",
        ),
        // Other formats.
        ("a.tsv.gz", &usual, b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x4b"),
        ("a.tsv.zst", &usual, b"\x28\xb5\x2f\xfd\x04"),
        ("a.jsonl.xz", &usual, b"\xfd7zXZ\x00\x00"),
        ("a.parquet", &usual, b"PAR1\x15\x04"),
    ];
    let mut table = String::new();
    for (name, task, content) in cases {
        let case = Case::named(name, content);
        case.set_marks(bert());
        let message = case.error(task);
        table += &format!("{}\n  {message}\n", content.escape_ascii());
    }
    insta::assert_snapshot!(table);
}

/// A row of 10 MB is read like any other, and its error messages are short.
#[test]
fn a_long_row_has_short_messages() {
    let long = "g".repeat(10 << 20);
    let data = Case::named("a.jsonl", format!("{{\"text\": \"{long} tea\", \"label\": 1}}")).load(&classification(64));
    assert_eq!(data.unwrap().examples, [class(&[1, 0, 5, 2], 1)]);
    for (name, content) in [
        ("a.jsonl", format!("{{\"text\": \"tea\", \"label\": \"{long}\"}}")),
        ("a.jsonl", format!("{{\"text\": \"tea\", \"{long}\": 1}}")),
        ("a.jsonl", format!("{{\"text\": \"{long}")),
        ("a.tsv", format!("tea\t{long}\n")),
        ("a.csv", format!("text,{long}\ntea,1\n")),
        ("a.csv", format!("text,label\n{long},{long},1\n")),
        ("a.json", long.clone()),
    ] {
        let message = Case::named(name, &content).error(&classification(64));
        assert!(message.len() < 1000, "{name}, {} bytes: {} …", message.len(), &message[..200]);
    }
}

#[test]
fn template_fields_read_any_column() {
    let words = |ids: &[i32], from, types: &[i32]| Example {
        ids: ids.to_vec(),
        types: types.to_vec(),
        goal: Goal::after(from, ids.len()),
    };
    let (s, t, e) = (8, 9, 10);
    let row = r#"{"id": 3, "turns": [{"q": "tea", "a": "good"}, {"q": "Ann", "a": "bad"}], "question": "tea", "answer": "Ann"}"#;
    let expected = words(&[5, s, 3, 6, s, 4, 5, t, 6, e], 7, &[0, s, s, s, s, s, s, t, t, t]);
    for list in [None, Some("turns")] {
        let data = Case::named("a.jsonl", row).load(&turns(list)).unwrap();
        assert_eq!(data.examples, std::slice::from_ref(&expected));
    }
    // An empty list adds no turn, numbers are read as texts, and a blank cell before the target is an empty text.
    let empty = r#"{"turns": [], "question": "", "answer": true}"#;
    let data = Case::named("a.jsonl", empty).load(&turns(Some("turns"))).unwrap();
    assert_eq!(data.examples, [words(&[t, 0, e], 0, &[t, t, t])]);
    // A dotted path addresses nested objects and lists.
    let mut nested = questions();
    let TaskKind::Generation { template, .. } = &mut nested.kind else { panic!("it generates") };
    (template[0], template[2]) = (Piece::Field("a.b".into()), Piece::Field("answers.text.1".into()));
    let row = r#"{"a.b": "tea", "a": 1, "answers": {"text": ["bad", "good"]}}"#;
    let data = Case::named("a.jsonl", row).load(&nested).unwrap();
    assert_eq!(data.examples, [words(&[5, 8, 3], 1, &[0, 8, 8])]);
    // The same in csv, with quotes.
    let data = Case::named("a.csv", "answer,question\n\"good \"\"tea\"\"\",Ann\n").load(&questions()).unwrap();
    assert_eq!(data.examples.get(0).ids, [6, 8, 3, 0, 5, 0]);
    // In tsv a quote is an ordinary character.
    let data = Case::named("a.tsv", "question\tanswer\n\"good\t\"tea\n").load(&questions()).unwrap();
    assert_eq!(data.examples.get(0).ids, [0, 3, 8, 0, 5]);
}

#[test]
fn bad_rows_are_skipped_on_request() {
    let (task, skip) = (classification(64), &Reading { skip_bad: true, cache: None });
    let case = Case::named("a.tsv", b"good\t1\nno tab\nbad\tmaybe\nb\xffd\t0\ntea\t0\n");
    let data = case.read(&["a.tsv"], &task, skip).unwrap();
    assert_eq!((data.len(), data.skipped), (2, 3));
    let line = data.describe();
    assert!(line.contains(", 3 bad rows left out; the first: `") && line.contains("line 2: no tab"), "{line}");
    assert!(matches!(case.load(&task), Err(DataError::Place { skippable: true, .. })));
    let lines = "{\"text\": \"good\", \"label\": 1}\n{\"text\": \"bad\"\n{\"text\": \"tea\", \"label\": null}\n[]\n";
    let data = Case::named("a.jsonl", lines).read(&["a.jsonl"], &task, skip).unwrap();
    assert_eq!((data.len(), data.skipped), (1, 3));
    // Errors of the whole file remain errors, and so does a file without a valid row.
    for (name, content) in
        [("a.csv", "text,label\n\"good,1\n"), ("a.csv", "comment,class\ngood,1\n"), ("a.json", "[{\"text\"")]
    {
        let error = Case::named(name, content).read(&[name], &task, skip).unwrap_err();
        assert!(matches!(error, DataError::Place { skippable: false, .. }), "{error}");
    }
    let error = Case::named("a.tsv", "good\tx\nbad\ty\n").read(&["a.tsv"], &task, skip).unwrap_err().to_string();
    assert!(error.starts_with("no row is left: all 2 are bad; the first: `"), "{error}");
}

#[test]
fn several_files_and_patterns_are_read_in_order() {
    let case = Case::named("b.tsv", "bad\t0\n");
    let write = |name: &str, content: &str| std::fs::write(case.dir.path().join(name), content).unwrap();
    write("a.jsonl", "{\"text\": \"good\", \"label\": 1}\n{\"text\": \"tea\", \"label\": 1}\n");
    write("c[1].tsv", "tea\t0\n");
    let ids = |named: &[&str]| {
        let data = case.read(named, &classification(64), &Reading::default()).map_err(|e| case.plain(e))?;
        Ok::<_, String>((data.examples.iter().map(|e| e.ids[1]).collect::<Vec<_>>(), data.sources.len()))
    };
    assert_eq!(ids(&["b.tsv", "a.jsonl"]), Ok((vec![4, 3, 5], 2)));
    assert_eq!(ids(&["[ab].*"]), Ok((vec![3, 5, 4], 2)));
    assert_eq!(ids(&["c[1].tsv", "*.tsv"]), Ok((vec![5, 4, 5], 3)));
    insta::assert_snapshot!(ids(&["*.csv"]).unwrap_err(), @"`*.csv`: no file matches this pattern");
    insta::assert_snapshot!(ids(&["a[.csv"]).unwrap_err(), @"`a[.csv`: not a valid pattern of files: invalid range pattern");
    insta::assert_snapshot!(ids(&[""]).unwrap_err(), @"``: a folder; name its files, such as `*.jsonl` in quotes");
    insta::assert_snapshot!(ids(&["b.tsv", "d.tsv"]).unwrap_err(), @"cannot read `d.tsv`: No such file or directory (os error 2)");
    let data = case.read(&["b.tsv", "a.jsonl"], &classification(64), &Reading::default()).unwrap();
    assert!(data.place(1).unwrap().ends_with("a.jsonl, line 1"), "{:?}", data.place(1));
}

/// Ids and types of pairs are those of transformers, with and without truncation.
#[test]
fn pair_ids_and_types_match_transformers() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/pairs.json");
    let fixtures: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let pairs: Vec<(String, String)> = serde_json::from_value(fixtures["pairs"].clone()).unwrap();
    let pairs: Vec<(&str, &str)> = pairs.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let task = columns("premise", "hypothesis", "label");
    for case in fixtures["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let folder = folder_of(name);
        let tokenizer = Tokenizer::load(folder.path(), &task, 10_000).unwrap();
        let limit = case["limit"].as_u64().unwrap() as usize;
        let ids: Vec<Vec<i32>> = serde_json::from_value(case["ids"].clone()).unwrap();
        let types: Vec<Vec<i32>> = serde_json::from_value(case["types"].clone()).unwrap();
        for (i, pair) in tokenizer.encode_pairs(pairs.clone(), limit).unwrap().into_iter().enumerate() {
            assert_eq!((&pair.ids, &pair.types), (&ids[i], &types[i]), "{name}, {limit}: {:?}", pairs[i]);
            assert_eq!(
                pair.untruncated > limit,
                ids[i].len() == limit && pair.untruncated != limit,
                "{name}, {limit}: {:?}",
                pairs[i]
            );
        }
    }
}

#[test]
fn pairs_of_texts_are_encoded_and_truncated() {
    let task = columns("premise", "hypothesis", "");
    let case = Case::named("a.jsonl", r#"{"premise": "good tea good", "hypothesis": "bad", "label": "positive"}"#);
    // If the tokenizer does not support pairs, the second text would be dropped.
    insta::assert_snapshot!(case.error(&task), @"`tokenizer.json` cannot be used as a tokenizer: it puts no marks around and between the texts of a pair (`[CLS] a [SEP] b [SEP]`): its `post_processor` knows no pairs; leave `pair` out, or take the model's own tokenizer");
    // For a causal model this is accepted: the second text follows the first, as in transformers.
    case.set_marks(Json::Null);
    let bare = case.load(&Task { bidirectional: false, ..task.clone() }).unwrap().examples.get(0);
    assert_eq!((bare.ids, bare.types), (vec![3, 5, 3, 4], vec![0, 0, 0, 1]));
    case.set_marks(bert());
    let pair = |ids: &[i32], types: &[i32]| Example { ids: ids.to_vec(), types: types.to_vec(), goal: Goal::Class(1) };
    let whole = pair(&[1, 3, 5, 3, 2, 4, 2], &[0, 0, 0, 0, 0, 1, 1]);
    assert_eq!(case.load(&task).unwrap().examples, [whole]);
    let cut = |max_tokens| case.load(&Task { max_tokens, ..task.clone() });
    let data = cut(5).unwrap();
    assert_eq!(data.examples, [pair(&[1, 3, 2, 4, 2], &[0, 0, 0, 1, 1])]);
    assert_eq!((data.cut, &data.lengths[..]), (1, &[7][..]));
    let message = case.plain(cut(4).unwrap_err());
    insta::assert_snapshot!(message, @"`a.jsonl`: no example is left: `task.max_tokens` is 4, and the cut to it leaves no sentence in any of the 1 examples; the first, line 1, has 7 tokens; raise `task.max_tokens` to 7, or leave such examples out");
}

/// GLUE's files as published.
#[test]
fn published_glue_files_are_read() {
    let Some(data) = real_data() else { return };
    let read = |file: &str, task: &Task| {
        let tokenizer = Tokenizer::load(&data.join("tokenizers/roberta"), task, 50265).unwrap();
        Dataset::load(&data.join(file), task, &tokenizer).unwrap()
    };
    let sst2 = read("sst2/dev.tsv", &classification(512));
    let positive = sst2.examples.iter().filter(|e| e.goal == Goal::Class(1)).count();
    assert_eq!((sst2.len(), positive), (872, 444));
    let labels = ["entailment", "neutral", "contradiction"].map(str::to_owned).to_vec();
    let mnli = |[text, pair, label]: [&str; 3]| {
        let columns = Columns { text: Some(text.into()), pair: Some(pair.into()), label: Some(label.into()) };
        Task { kind: TaskKind::Classification { labels: labels.clone(), columns }, ..classification(512) }
    };
    let dev = read("mnli/dev_matched_48.tsv", &mnli(["sentence1", "sentence2", "gold_label"]));
    let train = read("mnli/train.json", &mnli(["text_a", "text_b", "label"]));
    assert_eq!((dev.len(), train.len()), (48, 8999));
    // The layout is `<s>a</s></s>b</s>`, all of type 0.
    let ids = &train.examples.get(0).ids;
    assert_eq!((ids[0], ids.last()), (0, Some(&2)));
    assert_eq!(ids.windows(2).filter(|pair| *pair == [2, 2]).count(), 1);
    assert!(train.examples.iter().all(|e| e.types.iter().all(|&kind| kind == 0)));
}
