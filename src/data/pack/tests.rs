#![allow(clippy::single_range_in_vec_init)] // an example may well have one range of targets

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::tasks::{ANN, BAD, GOOD, LIKES, TEA, generates};
use super::super::tests::{Case, WORDS};
use super::super::{Batch, Dataset, Examples, Reading};
use super::*;

/// Ids of the task's special tokens, which follow those of the words.
const P: i32 = 8;
const Q: i32 = 9;
const A: i32 = 10;
const E: i32 = 11;

/// The data set of a task whose examples are the items of `turns`.
fn read(rows: &str, template: &str, pack: bool, max_tokens: u64) -> Dataset {
    let block = format!(
        "task t {{ special: [\"<p>\", \"<q>\", \"<a>\", \"<e>\"]  each: \"turns\"  pack: {pack}  target: \"<a>\"
          max_tokens: {max_tokens}  template: \"{template}\" }}"
    );
    let case = Case::named("a.jsonl", rows);
    case.load(&generates(&block)).unwrap_or_else(|error| panic!("{}", case.plain(error)))
}

/// A row with a story, and questions with their answers.
fn row(story: &str, turns: &[(&str, &str)]) -> String {
    let turns: Vec<_> = turns.iter().map(|(q, a)| serde_json::json!({"q": q, "a": a})).collect();
    serde_json::json!({"story": story, "turns": turns}).to_string() + "\n"
}

/// The summary of the data set after the file's name.
fn said(data: &Dataset) -> String {
    data.describe().split_once("a.jsonl: ").expect("a name").1.to_owned()
}

const WHOLE: &str = "<p> {story} (before: <q> {turns.q} <a> {turns.a})* <q> {turns.q} <a> {turns.a} <e>";

#[test]
fn a_conversation_packs_into_one_sequence() {
    let turns = [("good tea", "tea"), ("bad", "Ann likes"), ("Ann", "bad")];
    let data = read(&(row("Ann likes", &turns) + &row("tea", &turns[..1])), WHOLE, true, 64);
    // The first answer's closing token is predicted at the position of the second question, and the second answer's at
    // that of the third.
    let first = Example {
        ids: vec![P, ANN, LIKES, Q, GOOD, TEA, A, TEA, Q, BAD, A, ANN, LIKES, Q, ANN, A, BAD, E],
        types: vec![P, P, P, Q, Q, Q, A, A, Q, Q, A, A, A, Q, Q, A, A, A],
        goal: Goal::Turns(
            vec![7..8, 11..13, 16..18],
            vec![ExtraTarget { at: 8, label: E }, ExtraTarget { at: 13, label: E }],
        ),
    };
    let second = Example {
        ids: vec![P, TEA, Q, GOOD, TEA, A, TEA, E],
        types: vec![P, P, Q, Q, Q, A, A, A],
        goal: Goal::Tokens(vec![6..8]),
    };
    assert_eq!(data.examples, [first, second]);
    let batch = Batch::pack(data.examples.iter());
    assert_eq!(batch.targets, [6, 10, 11, 15, 16, 7, 12, 23, 24]);
    assert_eq!(batch.labels, [TEA, ANN, LIKES, BAD, E, E, E, TEA, E]);
    assert_eq!((batch.starts, batch.lengths), (vec![0, 18], vec![18, 8]));
    assert_eq!((data.place(0), data.place(1)), (Some("line 1, items 1 to 3"), Some("line 2, item 1")));
    assert_eq!(data.lengths(), [18, 8]);
    insta::assert_snapshot!(said(&data), @"2 examples of 4 turns, 26 tokens, the longest 18");
}

#[test]
fn a_truncated_history_starts_a_new_sequence() {
    let turns = [("good", "tea"), ("bad", "Ann"), ("likes", "bad")];
    let template = WHOLE.replace("(before:", "(last 1 of before:");
    let data = read(&row("tea", &turns), &template, true, 64);
    let first = Example {
        ids: vec![P, TEA, Q, GOOD, A, TEA, Q, BAD, A, ANN, E],
        types: vec![P, P, Q, Q, A, A, Q, Q, A, A, A],
        goal: Goal::Turns(vec![5..6, 9..11], vec![ExtraTarget { at: 6, label: E }]),
    };
    let second = Example {
        ids: vec![P, TEA, Q, BAD, A, ANN, Q, LIKES, A, BAD, E],
        types: vec![P, P, Q, Q, A, A, Q, Q, A, A, A],
        goal: Goal::Tokens(vec![9..11]),
    };
    assert_eq!(data.examples, [first, second]);
    assert_eq!((data.place(0), data.place(1)), (Some("line 1, items 1 to 2"), Some("line 1, item 3")));
    insta::assert_snapshot!(said(&data), @r"
    2 examples of 3 turns, 22 tokens, the longest 11
    note: 1 of 3 turns share no sequence with the turn before them: the history is cut, or is left out
    ");
}

/// With these templates no two turns can be merged, and the note says why.
#[test]
fn unmergeable_turns_are_explained_in_a_note() {
    let note = |template: &str| {
        let data = read(&row("tea", &[("good", "tea"), ("bad", "Ann"), ("likes", "bad")]), template, true, 64);
        assert_eq!((data.len(), data.turns), (3, 3), "{template}");
        said(&data)
    };
    insta::assert_snapshot!(note("<p> {story} <q> {turns.q} <a> {turns.a} <e>"), @r"
    3 examples of 3 turns, 21 tokens, the longest 7
    note: 2 of 3 turns share no sequence with the turn before them: the history is cut, or is left out
    ");
    insta::assert_snapshot!(note(&WHOLE.replace("<a> {turns.a})*", "<a> as <q> {turns.a})*")), @r"
    3 examples of 3 turns, 33 tokens, the longest 15
    note: 2 of 3 turns share no sequence with the turn before them: the history has other token types than the turn itself
    ");
    insta::assert_snapshot!(note(&WHOLE.replace("<a> {turns.a})*", "<a> 'likes' {turns.a})*")), @r"
    3 examples of 3 turns, 36 tokens, the longest 17
    note: 2 of 3 turns share no sequence with the turn before them: the history has the answer in another form, or several tokens close the answer
    ");
    insta::assert_snapshot!(note(&WHOLE.replace("<e>", "'good' <e>")), @r"
    3 examples of 3 turns, 36 tokens, the longest 16
    note: 2 of 3 turns share no sequence with the turn before them: the history has the answer in another form, or several tokens close the answer
    ");
}

/// Turns are truncated before they are packed.
#[test]
fn turns_are_truncated_before_packing() {
    let turns = [("good", "tea"), ("bad", "Ann likes"), ("likes", "bad")];
    let data = read(&row("tea", &turns), WHOLE, true, 11);
    let ids = vec![P, TEA, Q, GOOD, A, TEA, Q, BAD, A, ANN, LIKES];
    let goal = Goal::Turns(vec![5..6, 9..11], vec![ExtraTarget { at: 6, label: E }]);
    assert_eq!(data.examples, [Example { ids, types: vec![P, P, Q, Q, A, A, Q, Q, A, A, A], goal }]);
    assert_eq!((data.cut, data.dropped, data.lengths()), (2, 1, &[16, 12][..]));
    insta::assert_snapshot!(said(&data), @"1 examples of 2 turns, 11 tokens, the longest 11, 2 cut, 1 of them dropped: no target is left");
}

fn example(ids: &[i32], from: usize) -> Example {
    Example { ids: ids.to_vec(), types: vec![0; ids.len()], goal: Goal::after(from, ids.len()) }
}

/// Two labels at one position both count: that of the sequence's own token, and an extra target.
#[test]
fn two_labels_at_one_position_both_count() {
    let goal = |earlier: &Example, next: &Example| merge(earlier, next).map(|example| example.goal);
    let extra = |at, label| ExtraTarget { at, label };
    let long = example(&[5, 6, 7, 8], 1);
    // The same example twice, an example that the next one extends, and one that extends the next.
    assert_eq!(goal(&long, &long), Ok(Goal::Turns(vec![2..4], vec![extra(2, 7), extra(3, 8)])));
    assert_eq!(goal(&example(&[5, 6, 7], 1), &long), Ok(Goal::Turns(vec![2..4], vec![extra(2, 7)])));
    assert_eq!(goal(&long, &example(&[5, 6, 7], 1)), Ok(Goal::Turns(vec![2..3], vec![extra(2, 7), extra(3, 8)])));
    // Another answer of one token to the same question.
    assert_eq!(goal(&example(&[5, 6, 9], 1), &long), Ok(Goal::Turns(vec![2..4], vec![extra(2, 9)])));
    assert_eq!(goal(&example(&[5, 6, 9, 8], 1), &long), Err(NotMerged::Answer));
    assert_eq!(goal(&example(&[5, 4, 7], 1), &long), Err(NotMerged::History));
    let typed = Example { types: vec![0, 1, 1], ..example(&[5, 6, 7], 1) };
    assert_eq!(goal(&typed, &long), Err(NotMerged::Types));
}

/// How often each label is predicted, by its context and the context's types.
fn predicted(examples: &Examples) -> BTreeMap<(Vec<i32>, Vec<i32>, i32), usize> {
    let mut all = BTreeMap::new();
    for example in examples.iter() {
        let Batch { targets, labels, .. } = Batch::pack([&example]);
        for (target, label) in targets.into_iter().zip(labels) {
            let [ids, types] = [&example.ids, &example.types].map(|all| all[..=target as usize].to_vec());
            *all.entry((ids, types, label)).or_default() += 1;
        }
    }
    all
}

/// Templates with whole, truncated and rearranged histories, and with different closings of answers.
const TEMPLATES: &[&str] = &[
    WHOLE,
    "(before: <q> {turns.q} <a> {turns.a} <e>)* <q> {turns.q} <a> {turns.a} <e>",
    "<p> {story} (before: {turns.q} {turns.a})* {turns.q} <a> {turns.a}",
    "<p> {story} (last 2 of before: <q> {turns.q} <a> {turns.a})* <q> {turns.q} <a> {turns.a} <e>",
    "<p> {story} (first 1 of before: <q> {turns.q} <a> {turns.a})* <q> {turns.q} <a> {turns.a} <e>",
    "<p> {story} (before: <q> {turns.q} <a> {first 1 tokens of turns.a})* <q> {turns.q} <a> {turns.a} <e>",
    "<p> {story} <q> {turns.q} <a> {turns.a} <e>",
    "<p> (before: <q> {turns.q} <a> as <q> {turns.a})* <q> {turns.q} <a> {turns.a} <e>",
    "<p> (before: <q> {turns.q} <a> {turns.a})* <q> {turns.q} <a> {turns.a} 'good' <e>",
];

fn words(count: impl Strategy<Value = usize>) -> impl Strategy<Value = String> {
    let word = proptest::sample::select(&WORDS[3..5]);
    count.prop_flat_map(move |count| proptest::collection::vec(word.clone(), count)).prop_map(|words| words.join(" "))
}

proptest! {
    /// With and without packing, the same labels are predicted from the same contexts. A small vocabulary makes turns
    /// alike.
    #[test]
    fn packing_keeps_every_prediction(
        rows in proptest::collection::vec(
            (words(0usize..3), proptest::collection::vec((words(0usize..3), words(1usize..4)), 1..6)),
            1..4,
        ),
        template in proptest::sample::select(TEMPLATES),
        max_tokens in 8u64..40,
    ) {
        let rows: Vec<String> = rows.iter().map(|(story, turns)| {
            let turns: Vec<_> = turns.iter().map(|(q, a)| (q.as_str(), a.as_str())).collect();
            row(story, &turns)
        }).collect();
        let rows = row("good", &[("", "good")]) + &rows.concat();
        let [separate, packed] = [false, true].map(|pack| read(&rows, template, pack, max_tokens));
        prop_assert_eq!(predicted(&separate.examples), predicted(&packed.examples));
        prop_assert_eq!((separate.len(), separate.cut, separate.dropped), (packed.turns, packed.cut, packed.dropped));
        prop_assert!(packed.len() <= separate.len() && packed.tokens() <= separate.tokens());
        prop_assert!(packed.examples.are_valid(64) && packed.longest() as u64 <= max_tokens);
    }
}

/// A cache entry stores extra targets and depends on the option `pack`. There are so many rows that a chunk boundary
/// divides them.
#[test]
fn packed_data_are_cached_with_extra_targets() {
    let turns = [("good", "tea"), ("bad", "Ann likes"), ("likes", "bad")];
    let case = Case::named("a.jsonl", row("tea", &turns).repeat(6000));
    let cache = case.dir.path().join("cache");
    std::fs::create_dir(&cache).unwrap();
    let reading = Reading { cache: Some(cache), ..Reading::default() };
    let load = |pack: bool| {
        let block = format!(
            "task t {{ special: [\"<p>\", \"<q>\", \"<a>\", \"<e>\"]  each: \"turns\"  pack: {pack}  target: \"<a>\"
              template: \"{WHOLE}\" }}"
        );
        case.read(&["a.jsonl"], &generates(&block), &reading).unwrap()
    };
    let first = load(true);
    assert_eq!((first.len(), first.turns, first.cached), (6000, 18000, false));
    let second = load(true);
    assert!(second.cached && first.examples.iter().eq(second.examples.iter()));
    assert_eq!(second.examples.get(5999).goal.extra_targets().len(), 2);
    assert_eq!(
        (first.describe() + ", from the cache", first.examples.bytes()),
        (second.describe(), second.examples.bytes())
    );
    assert!(!load(false).cached);
    // No turn of a held-out conversation remains in the training data.
    let (train, held) = second.hold_out(1000, 1).unwrap();
    assert_eq!((train.len(), held.len()), (5000, 1000));
    assert_eq!(held.examples.get(999), first.examples.get(0));
}
