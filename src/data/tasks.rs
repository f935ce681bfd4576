//! Tests of the library's tasks, and of similar ones, on files in the layouts in which the data sets are published.

use peft_grammar::model::{Task, TaskKind};
use peft_grammar::{check, no_imports};

use super::tests::{Case, real_data};
use super::*;

/// The task of a spec with this block.
fn task(backbone: &str, block: &str) -> Task {
    let source = format!("model = {backbone}\ntune {{ full() }}\n{block}");
    check("spec.peft", &source, &no_imports).unwrap_or_else(|e| panic!("{e}")).task
}

pub(super) fn generates(block: &str) -> Task {
    task("gpt2(layers: 1, hidden: 8, heads: 1, ffn: 8, vocab: 64, context: 1024)", block)
}

fn classifies(block: &str) -> Task {
    task("roberta(layers: 1, hidden: 8, heads: 1, ffn: 8, vocab: 64, context: 514)", block)
}

fn continuation(ids: &[i32], types: &[i32], from: usize) -> Example {
    Example { ids: ids.to_vec(), types: types.to_vec(), goal: Goal::after(from, ids.len()) }
}

/// Ids of the words in the tests' tokenizer.
pub(super) const GOOD: i32 = 3;
pub(super) const BAD: i32 = 4;
pub(super) const TEA: i32 = 5;
pub(super) const ANN: i32 = 6;
pub(super) const LIKES: i32 = 7;

/// A conversation in CoQA's layout: questions and answers by turn.
fn conversation(story: &str, turns: &[(&str, &str)]) -> String {
    let list = |what: &str, text: fn(&(&str, &str)) -> String| -> String {
        let turns = turns.iter().enumerate();
        let items =
            turns.map(|(i, turn)| format!("{{\"input_text\": \"{}\", \"turn_id\": {}{what}}}", text(turn), i + 1));
        items.collect::<Vec<_>>().join(", ")
    };
    let questions = list("", |(question, _)| question.to_string());
    let spans = ", \"span_start\": 0, \"span_end\": 3, \"span_text\": \"bad\"";
    let answers = list(spans, |(_, answer)| answer.to_string());
    format!(
        "{{\"source\": \"wikipedia\", \"id\": \"3zot\", \"filename\": \"a.txt\", \"story\": \"{story}\",
          \"questions\": [{questions}], \"answers\": [{answers}],
          \"additional_answers\": {{\"0\": [{answers}]}}, \"name\": \"a.txt\"}}"
    )
}

fn coqa(conversations: &[String]) -> String {
    format!("{{\"version\": \"1.0\", \"data\": [{}]}}", conversations.join(", "))
}

#[test]
fn coqa_gives_one_example_per_turn() {
    let turns = [("good tea", "tea"), ("bad", "Ann likes"), ("likes", "good"), ("tea", "bad bad")];
    let file = coqa(&[conversation("Ann likes tea", &turns), conversation(&"tea ".repeat(500), &[("good", "bad")])]);
    let data = Case::named("coqa.json", file).load(&generates("task coqa")).unwrap();
    // The task's special tokens follow the eight tokens of the tokenizer.
    let (bos, eos, q, a, d) = (9, 10, 11, 12, 13);
    let first =
        continuation(&[bos, d, ANN, LIKES, TEA, q, GOOD, TEA, a, TEA, eos], &[d, d, d, d, d, q, q, q, a, a, a], 8);
    let second = continuation(
        &[bos, d, ANN, LIKES, TEA, q, GOOD, TEA, a, TEA, q, BAD, a, ANN, LIKES, eos],
        &[d, d, d, d, d, q, q, q, a, a, q, q, a, a, a, a],
        12,
    );
    let third = continuation(
        &[bos, d, ANN, LIKES, TEA, q, GOOD, TEA, a, TEA, q, BAD, a, ANN, LIKES, q, LIKES, a, GOOD, eos],
        &[d, d, d, d, d, q, q, q, a, a, q, q, a, a, a, q, q, a, a, a],
        17,
    );
    // The task allows two turns before the question.
    let fourth = continuation(
        &[bos, d, ANN, LIKES, TEA, q, BAD, a, ANN, LIKES, q, LIKES, a, GOOD, q, TEA, a, BAD, BAD, eos],
        &[d, d, d, d, d, q, q, a, a, a, q, q, a, a, q, q, a, a, a, a],
        16,
    );
    // The other conversation's story is truncated.
    let ids = [&[bos, d][..], &[TEA; 400], &[q, GOOD, a, BAD, eos]].concat();
    let types = [&[d; 402][..], &[q, q, a, a, a]].concat();
    let cut = continuation(&ids, &types, 404);
    assert_eq!(data.examples, [first, second, third, fourth, cut]);
    assert_eq!(data.place(2), Some("line 1, row 1, item 3"));
}

/// Rows are held out with all their examples, so no story occurs in both parts.
#[test]
fn conversations_are_held_out_as_a_whole() {
    let stories: Vec<String> = (0..20).map(|i| "tea ".repeat(i + 1)).collect();
    let turns = [("good", "tea"), ("bad", "good"), ("tea", "bad")];
    let file =
        coqa(&stories.iter().map(|story| conversation(story, &turns[..1 + story.len() % 3])).collect::<Vec<_>>());
    let case = Case::named("coqa.json", file);
    let load = || case.load(&generates("task coqa")).unwrap();
    let stories = |data: &Dataset| -> Vec<usize> {
        let story = |ids: &[i32]| ids.iter().skip(2).take_while(|&&id| id == TEA).count();
        let mut stories: Vec<usize> = (0..data.len()).map(|index| story(data.examples.ids(index))).collect();
        stories.dedup();
        stories
    };
    let all = load();
    let (train, held) = load().hold_out(5, 1).unwrap();
    assert_eq!((train.len() + held.len(), stories(&train).len(), stories(&held).len()), (all.len(), 15, 5));
    let mut both = [stories(&train), stories(&held)].concat();
    both.sort_unstable();
    assert_eq!(both, (1..=20).collect::<Vec<_>>());
    assert_eq!(
        held.place(0),
        all.place((0..all.len()).find(|&i| all.examples.get(i) == held.examples.get(0)).unwrap())
    );
    // The selection depends on the seed.
    assert_eq!(stories(&load().hold_out(5, 1).unwrap().1), stories(&held));
    assert_ne!(stories(&load().hold_out(5, 2).unwrap().1), stories(&held));
    let message = case.plain(load().hold_out(20, 1).unwrap_err());
    insta::assert_snapshot!(message, @"`coqa.json`: `train.hold_out` takes 20 of its 20 rows, which leaves none to train on; set it to less, or to 0");
}

/// `each` over lists with other names, over a nested list, and with other cuts.
#[test]
fn each_gives_one_example_per_item() {
    let block = |each: &str, template: &str| {
        let special = r#"special: ["<q>", "<a>", "<e>"]"#;
        generates(&format!("task t {{ {special}\n each: {each}\n template: \"{template}\"\n target: \"<a>\" }}"))
    };
    let (q, a, e) = (8, 9, 10);
    // QuAC's layout.
    let quac = r#"{"data": [{"title": "tea", "paragraphs": [{"context": "Ann likes tea", "qas": [
        {"question": "good", "answers": [{"text": "tea"}]}, {"question": "bad", "answers": [{"text": "Ann"}]},
        {"question": "tea", "answers": [{"text": "bad"}]}]}]}]}"#;
    let template = "{last 2 tokens of paragraphs.0.context} (before: <q> {qas.question} {qas.answers.0.text})* \
                    <q> {qas.question} <a> {qas.answers.0.text} <e>";
    let data = Case::named("quac.json", quac).load(&block("\"paragraphs.0.qas\"", template)).unwrap();
    let third = [LIKES, TEA, q, GOOD, TEA, q, BAD, ANN, q, TEA, a, BAD, e];
    assert_eq!((data.len(), data.examples.ids(2)), (3, &third[..]));
    // Turns that are plain texts.
    let lines = "{\"turns\": [\"good\", \"bad\", \"tea\"]}\n{\"turns\": [\"Ann\"]}\n";
    let template = "(first 1 of before: {turns} <q>)* <a> {turns} <e>";
    let data = Case::named("a.jsonl", lines).load(&block("\"turns\"", template)).unwrap();
    let ids: Vec<&[i32]> = (0..data.len()).map(|index| data.examples.ids(index)).collect();
    assert_eq!(ids, [&[a, GOOD, e][..], &[GOOD, q, a, BAD, e], &[GOOD, q, a, TEA, e], &[a, ANN, e]]);
    assert_eq!(data.place(3), Some("line 2, item 1"));

    let two = block(r#"["asked", "said"]"#, "(last 2 of before: {asked.t} {said.t})* {asked.t} <a> {said.t}");
    let error = |name: &str, file: &str| Case::named(name, file).error(&two);
    insta::assert_snapshot!(error("a.jsonl", r#"{"asked": [], "sayd": []}"#), @"`a.jsonl`, line 1: no list `said` (did you mean `sayd`?); the row has `asked`, `sayd`");
    insta::assert_snapshot!(error("a.jsonl", r#"{"asked": [], "said": []}"#), @"`a.jsonl`, line 1: `asked` is empty: there is no item to make an example of");
    insta::assert_snapshot!(error("a.jsonl", r#"{"asked": "good", "said": []}"#), @"`a.jsonl`, line 1: `asked` is text, but `each` needs a list");
    insta::assert_snapshot!(error("a.jsonl", r#"{"asked": [{"t": "good"}], "said": []}"#), @"`a.jsonl`, line 1: `asked` and `said` are iterated together, but have 1 and 0 items");
    insta::assert_snapshot!(error("a.jsonl", r#"{"asked": [{"t": "good"}], "said": [{"tt": "tea"}]}"#), @"`a.jsonl`, line 1, item 1: `said` has no field `t` (did you mean `tt`?); it has `tt`");
    insta::assert_snapshot!(error("a.jsonl", r#"{"asked": [{"t": "good"}], "said": [{"t": ""}]}"#), @"`a.jsonl`, line 1, item 1: `said.t` is empty: there is nothing to learn");
    insta::assert_snapshot!(error("a.jsonl", r#"{"before": 1, "asked": [{"t": "good"}], "said": [{"t": "tea"}]}"#), @"`a.jsonl`, line 1: the column name `before` is reserved for `each`; rename the column");
    insta::assert_snapshot!(error("a.csv", "asked,said\ngood,tea\n"), @"`a.csv`, line 1: a table of texts holds no lists for the task's `each`; write the rows as json");
    // An invalid conversation is skipped as a whole, an invalid turn by itself.
    let lines = "{\"asked\": [{\"t\": \"tea\"}, {\"t\": \"bad\"}], \"said\": [{\"t\": \"\"}, {\"t\": \"good\"}]}\n{\"asked\": []}\n";
    let data =
        Case::named("a.jsonl", lines).read(&["a.jsonl"], &two, &Reading { skip_bad: true, cache: None }).unwrap();
    assert_eq!((data.len(), data.skipped, data.examples.ids(0)), (1, 2, &[TEA, BAD, 9, GOOD][..]));
}

/// GLUE's own files, read by the library's tasks as published and with other column names.
#[test]
fn library_tasks_read_glue() {
    let Some(data) = real_data() else { return };
    let read = |file: &str, task: &Task| {
        let tokenizer = Tokenizer::load(&data.join("tokenizers/roberta"), task, 50265).unwrap();
        Dataset::load(&data.join(file), task, &tokenizer).unwrap()
    };
    let classes = |data: &Dataset, count: i32| -> Vec<usize> {
        (0..count).map(|class| data.examples.iter().filter(|e| e.goal == Goal::Class(class)).count()).collect()
    };
    let sst2 = classifies("task sst2");
    let (dev, train) = (read("sst2/dev.tsv", &sst2), read("sst2/train.tsv", &sst2));
    println!("SST-2: {} and {}, the longest {}", dev.len(), train.len(), train.longest());
    assert_eq!((classes(&dev, 2), classes(&train, 2)), (vec![428, 444], vec![29780, 37569]));
    assert_eq!((dev.cut, train.cut), (0, 0));

    let mnli = classifies("task mnli");
    let TaskKind::Classification { labels, .. } = &mnli.kind else { panic!("it classifies") };
    assert_eq!(labels[..], ["entailment", "neutral", "contradiction"]);
    let dev = read("mnli/dev_matched_48.tsv", &mnli);
    let other = "import tasks.mnli\ntask mnli { text: \"text_a\"  pair: \"text_b\"  label: \"label\" }";
    let train = read("mnli/train.json", &classifies(other));
    println!("MNLI: {:?} and {:?}, the longest {}", classes(&dev, 3), classes(&train, 3), train.longest());
    assert_eq!((dev.len(), train.len(), train.cut), (48, 8999, 0));
    assert_eq!(classes(&dev, 3).iter().sum::<usize>(), 48);
}

/// An entry in the corpus's XML.
fn xml_entry(category: &str, triples: &[[&str; 3]], texts: &[(&str, &str)]) -> String {
    let plain = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let triples = triples.iter().map(|triple| format!("        <mtriple>{}</mtriple>\n", plain(&triple.join(" | "))));
    let texts = texts
        .iter()
        .map(|(comment, text)| format!("      <lex comment=\"{comment}\" lid=\"Id1\">{}</lex>\n", plain(text)));
    format!(
        "    <entry category=\"{category}\" eid=\"Id1\" size=\"1\">
      <originaltripleset>
        <otriple>tea | good | tea</otriple>
      </originaltripleset>
      <modifiedtripleset>\n{}      </modifiedtripleset>\n{}    </entry>\n",
        triples.collect::<String>(),
        texts.collect::<String>()
    )
}

fn benchmark(entries: &str) -> String {
    format!("<?xml version=\"1.0\" ?>\n<benchmark>\n  <entries>\n{entries}  </entries>\n</benchmark>\n")
}

#[test]
fn webnlg_xml_is_read() {
    let task = generates("task webnlg");
    let facts = [["Ann", "likes", "\"tea\" & <b>"], ["tea", "good", "Ann"]];
    let entries = xml_entry("Food", &facts, &[("good", "Ann likes tea"), ("toFix", "bad"), ("good", "tea")])
        + &xml_entry("Food", &facts[..1], &[("good", "good <tea> & tea")]);
    let case = Case::named("train.xml", benchmark(&entries));
    let data = case.load(&task).unwrap();
    let (bos, eos, s, p, o, t) = (18, 19, 20, 21, 22, 23);
    // A word that the tokenizer does not know has the id 0.
    let ids = [
        &[bos, s, ANN, p, LIKES, o][..],
        &[0, TEA, 0, 0, 0, 0, 0],
        &[s, TEA, p, GOOD, o, ANN, t, ANN, LIKES, TEA, eos],
    ]
    .concat();
    let types = [&[bos, s, s, p, p, o][..], &[o; 7], &[s, s, p, p, o, o], &[t; 5]].concat();
    assert_eq!((data.len(), data.left_out.texts), (3, 1));
    assert_eq!(data.examples.get(0), continuation(&ids, &types, 19));
    assert_eq!((data.place(0), data.place(2)), (Some("line 4"), Some("line 16")));
    // A file without an extension, and several files.
    std::fs::write(case.dir.path().join("dev"), benchmark(&entries)).unwrap();
    assert_eq!(case.read(&["*.xml", "dev"], &task, &Reading::default()).unwrap().len(), 6);
}

#[test]
fn invalid_xml_is_refused() {
    let error = |text: &str| Case::named("a.xml", text).error(&generates("task webnlg"));
    let entry = xml_entry("Food", &[["Ann", "likes", "tea"]], &[("good", "tea")]);
    let with = |old: &str, new: &str| error(&benchmark(&entry).replace(old, new));
    insta::assert_snapshot!(with("</lex>", ""), @"`a.xml`, line 12, column 5: `</entry>` stands where `</lex>` is expected; close each element inside the one around it");
    insta::assert_snapshot!(error("<?xml version=\"1.0\"?>\n<benchmark>\n  <entries>\n"), @"`a.xml`, line 3: the file ends inside the document; is it complete?");
    insta::assert_snapshot!(error(""), @"`a.xml`, line 1: the file ends inside the document; is it complete?");
    insta::assert_snapshot!(with("tea</lex>", "R&D</lex>"), @"`a.xml`, line 11, column 38: a `&` must be written `&amp;` in XML");
    insta::assert_snapshot!(with("<benchmark>", "<!DOCTYPE a [<!ENTITY e \"tea\">]><benchmark>"), @"`a.xml`, line 1, column 1: it declares a document type, which may bring in other files; remove the `<!DOCTYPE …>`");
    insta::assert_snapshot!(with("tea</lex>", "&e;</lex>"), @"`a.xml`, line 11, column 37: `&e;` is not declared; write the character itself, or `&amp;` for a `&`");
    insta::assert_snapshot!(error("<html><body>tea</body></html>"), @r#"
    `a.xml`, line 1: its root is `<html>`, and of XML only WebNLG's is read here
    a WebNLG file in XML is <benchmark><entries><entry category="…"><modifiedtripleset><mtriple>subject | property | object</mtriple>…</modifiedtripleset><lex comment="good">text</lex>…</entry>…
    "#);
    insta::assert_snapshot!(with("Ann | likes", "Ann likes"), @r#"
    `a.xml`, line 4: an `<mtriple>` is three texts with `|` between them, found `Ann likes | tea`
    a WebNLG file in XML is <benchmark><entries><entry category="…"><modifiedtripleset><mtriple>subject | property | object</mtriple>…</modifiedtripleset><lex comment="good">text</lex>…</entry>…
    "#);
    insta::assert_snapshot!(with("tea</lex>", "<b>tea</b></lex>"), @r#"
    `a.xml`, line 4: a `<lex>` holds other elements
    a WebNLG file in XML is <benchmark><entries><entry category="…"><modifiedtripleset><mtriple>subject | property | object</mtriple>…</modifiedtripleset><lex comment="good">text</lex>…</entry>…
    "#);
    insta::assert_snapshot!(with(" comment=\"good\"", ""), @r#"
    `a.xml`, line 4: a `<lex>` has no `comment`
    a WebNLG file in XML is <benchmark><entries><entry category="…"><modifiedtripleset><mtriple>subject | property | object</mtriple>…</modifiedtripleset><lex comment="good">text</lex>…</entry>…
    "#);
    insta::assert_snapshot!(with("mtriple>", "triple>"), @r#"
    `a.xml`, line 4: a `<modifiedtripleset>` holds `<mtriple>` alone
    a WebNLG file in XML is <benchmark><entries><entry category="…"><modifiedtripleset><mtriple>subject | property | object</mtriple>…</modifiedtripleset><lex comment="good">text</lex>…</entry>…
    "#);
    insta::assert_snapshot!(with("modifiedtripleset", "tripleset"), @r#"
    `a.xml`, line 4: this entry has 0 of `<modifiedtripleset>`, where one is expected
    a WebNLG file in XML is <benchmark><entries><entry category="…"><modifiedtripleset><mtriple>subject | property | object</mtriple>…</modifiedtripleset><lex comment="good">text</lex>…</entry>…
    "#);
    insta::assert_snapshot!(with("tea</lex>", " </lex>"), @"`a.xml`, line 4: a lexicalisation's `lex` is empty; write its text or remove it");
    insta::assert_snapshot!(with("\"good\"", "\"toFix\""), @"`a.xml` holds no example: no entry has a lexicalisation whose `comment` is `good`");
    let classified = Case::named("a.xml", benchmark(&entry)).error(&classifies("task sst2"));
    insta::assert_snapshot!(classified, @"`a.xml` holds no example: its `entries` are texts to generate, as WebNLG has them, and this task asks for labels");
}

/// The corpus in XML gives the same examples as in JSON.
#[test]
fn webnlg_xml_gives_the_examples_of_json() {
    let Some(data) = real_data() else { return };
    let task = task("gpt2(token_types: true, vocab: 50273)", "task webnlg");
    let tokenizer = Tokenizer::load(&data.join("tokenizers/gpt2"), &task, 50273).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (split, count) in [("train", 18025), ("dev", 2258), ("test", 4928)] {
        let path = data.join("webnlg").join(split).with_extension("json");
        let json = Dataset::load(&path, &task, &tokenizer).unwrap();
        let content: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let text = |value: &serde_json::Value, key: &str| value[key].as_str().unwrap().to_owned();
        let entries =
            content["entries"].as_array().unwrap().iter().flat_map(|entry| entry.as_object().unwrap().values());
        let entries = entries.map(|entry| {
            let triples = entry["modifiedtripleset"].as_array().unwrap().iter();
            let triples: Vec<[String; 3]> =
                triples.map(|triple| ["subject", "property", "object"].map(|key| text(triple, key))).collect();
            let triples: Vec<[&str; 3]> = triples.iter().map(|triple| [0, 1, 2].map(|i| triple[i].as_str())).collect();
            let texts = entry["lexicalisations"].as_array().unwrap().iter();
            let texts: Vec<(String, String)> = texts.map(|t| (text(t, "comment"), text(t, "lex"))).collect();
            let texts: Vec<(&str, &str)> =
                texts.iter().map(|(comment, text)| (comment.as_str(), text.as_str())).collect();
            xml_entry(&text(entry, "category"), &triples, &texts)
        });
        // Each split is divided into two files, because the corpus is published in many.
        let entries: Vec<String> = entries.collect();
        let half = entries.len() / 2;
        for (part, entries) in [("1", &entries[..half]), ("2", &entries[half..])] {
            let path = folder.path().join(format!("{split}{part}.xml"));
            std::fs::write(path, benchmark(&entries.concat())).unwrap();
        }
        let begun = std::time::Instant::now();
        let named = [folder.path().join(format!("{split}*.xml"))];
        let xml = Dataset::read(&named, &task, &tokenizer, &Reading::default()).unwrap();
        println!("{split}: {} examples from XML in {:.2?}", xml.len(), begun.elapsed());
        assert_eq!((json.len(), xml.len(), xml.left_out), (count, count, json.left_out));
        let differs = xml.examples.iter().zip(json.examples.iter()).position(|(xml, json)| xml != json);
        assert_eq!(differs, None, "{split}");
    }
}
