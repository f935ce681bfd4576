#![allow(clippy::single_range_in_vec_init)] // an example may well have one range of targets

use super::*;
use crate::data::{Example, ExtraTarget};

/// The hash covers everything in an example: tokens, types, targets and extra targets.
#[test]
fn the_data_hash_covers_every_field() {
    let content = |goal: Goal| {
        let example = Example { ids: vec![5, 6, 7, 8], types: vec![0; 4], goal };
        let mut data = Dataset::default();
        data.examples.push(&example);
        super::content(&data)
    };
    let extra = |at, label| ExtraTarget { at, label };
    let goals = [
        Goal::Tokens(vec![1..2]),
        Goal::Tokens(vec![1..2, 3..4]),
        Goal::Tokens(vec![1..4]),
        Goal::Turns(vec![1..2], vec![extra(2, 3)]),
        Goal::Turns(vec![1..2], vec![extra(2, 4)]),
        Goal::Turns(vec![1..2], vec![extra(3, 4)]),
        Goal::Turns(vec![1..2], vec![extra(2, 4), extra(3, 4)]),
        Goal::Turns(vec![1..4], vec![extra(2, 4)]),
        Goal::Class(0),
    ];
    let hashes: std::collections::BTreeSet<String> = goals.iter().cloned().map(content).collect();
    assert_eq!(hashes.len(), goals.len());
    // Saved states contain this hash, of the length, the ranges' bounds without the last, the ids and the types.
    let numbers = [4, 0, 0, 2, 2, 5, 6, 7, 8, 0, 0, 0, 0_i32];
    let hash = blake3::hash(&numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>()).to_hex();
    assert_eq!(content(goals[1].clone()), format!("1 examples, {}", &hash[..16]));
}
