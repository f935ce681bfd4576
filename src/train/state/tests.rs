#![allow(clippy::single_range_in_vec_init)] // an example may well have one range of targets

use super::*;
use crate::data::{Aside, Example};

/// Everything that an example says is in the hash: tokens, types, what is predicted, and what is predicted beside.
#[test]
fn data_differ_by_all_that_they_say() {
    let content = |goal: Goal| {
        let example = Example { ids: vec![5, 6, 7, 8], types: vec![0; 4], goal };
        let mut data = Dataset::default();
        data.examples.push(&example);
        super::content(&data)
    };
    let aside = |at, label| Aside { at, label };
    let goals = [
        Goal::Tokens(vec![1..2]),
        Goal::Tokens(vec![1..2, 3..4]),
        Goal::Tokens(vec![1..4]),
        Goal::Turns(vec![1..2], vec![aside(2, 3)]),
        Goal::Turns(vec![1..2], vec![aside(2, 4)]),
        Goal::Turns(vec![1..2], vec![aside(3, 4)]),
        Goal::Turns(vec![1..2], vec![aside(2, 4), aside(3, 4)]),
        Goal::Turns(vec![1..4], vec![aside(2, 4)]),
        Goal::Class(0),
    ];
    let hashes: std::collections::BTreeSet<String> = goals.iter().cloned().map(content).collect();
    assert_eq!(hashes.len(), goals.len());
    // States that were saved have this hash of tokens: the length, the ranges' bounds but for the last, ids and types.
    let numbers = [4, 0, 0, 2, 2, 5, 6, 7, 8, 0, 0, 0, 0_i32];
    let hash = blake3::hash(&numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>()).to_hex();
    assert_eq!(content(goals[1].clone()), format!("1 examples, {}", &hash[..16]));
}
