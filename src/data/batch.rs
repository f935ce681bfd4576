//! Batches: examples packed back to back on one token axis, without padding.

use std::borrow::Borrow;

use peft_grammar::model::BatchSize;

use super::examples::NO_TAG;
use super::{Dataset, Example, Examples, Goal};

/// The inputs of a compiled graph, each under the graph's name for it. One token axis holds all sequences.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// The token ids of all sequences, concatenated.
    pub ids: Vec<i32>,
    /// The token type of every token.
    pub types: Vec<i32>,
    /// The position of every token within its sequence: 0, 1, 2, ….
    pub positions: Vec<i32>,
    /// The index of each sequence's first token.
    pub starts: Vec<i32>,
    /// The number of tokens of each sequence.
    pub lengths: Vec<i32>,
    /// The indices of the tokens with a prediction target (their next token, or their own class). They are in no
    /// particular order, and an index may occur twice. The list is empty if each sequence has one target.
    pub targets: Vec<i32>,
    /// The token or class that each entry of `targets` predicts, or the class of each sequence.
    pub labels: Vec<i32>,
    /// The number that each sequence's regression predicts.
    pub numbers: Vec<f32>,
}

impl Batch {
    /// Concatenates examples into one batch.
    pub fn pack(examples: impl IntoIterator<Item: Borrow<Example>>) -> Self {
        let mut batch = Batch::default();
        for example in examples {
            let example = example.borrow();
            let (start, length) = (batch.ids.len() as i32, example.ids.len() as i32);
            batch.starts.push(start);
            batch.lengths.push(length);
            batch.positions.extend(0..length);
            batch.ids.extend_from_slice(&example.ids);
            batch.types.extend_from_slice(&example.types);
            match &example.goal {
                Goal::Tokens(ranges) | Goal::Turns(ranges, _) => {
                    for range in ranges {
                        batch.targets.extend(range.clone().map(|at| start + at as i32 - 1));
                        batch.labels.extend_from_slice(&example.ids[range.clone()]);
                    }
                    for extra in example.goal.extra_targets() {
                        batch.targets.push(start + extra.at as i32 - 1);
                        batch.labels.push(extra.label);
                    }
                }
                Goal::Class(class) => batch.labels.push(*class),
                Goal::Number(number) => batch.numbers.push(*number),
                Goal::Tags(tags) => {
                    for (at, tag) in tags.iter().enumerate().filter(|(_, tag)| **tag != NO_TAG) {
                        batch.targets.push(start + at as i32);
                        batch.labels.push(*tag);
                    }
                }
            }
        }
        batch
    }

    /// The number of prediction targets. The loss is the mean over them.
    pub fn target_count(&self) -> usize {
        self.labels.len() + self.numbers.len()
    }

    /// The index of each sequence's last token.
    pub fn ends(&self) -> Vec<i32> {
        self.starts.iter().zip(&self.lengths).map(|(start, length)| start + length - 1).collect()
    }

    /// The number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// The number of sequences.
    pub fn sequences(&self) -> usize {
        self.starts.len()
    }
}

/// The order in which an epoch reads the examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The order of the data set.
    AsStored,
    /// A pseudo-random permutation that is a function of these two numbers only.
    Shuffled { seed: u64, epoch: u64 },
}

impl Order {
    /// The permutation of `0..length`.
    pub fn indices(self, length: usize) -> Vec<usize> {
        let mut indices: Vec<usize> = (0..length).collect();
        if let Order::Shuffled { seed, epoch } = self {
            let key = mix(mix(seed) ^ epoch);
            for i in (1..length).rev() {
                // The high 64 bits of the product map `word` uniformly onto 0..=i.
                let word = mix(key.wrapping_add(i as u64));
                let j = (u128::from(word) * (i as u128 + 1)) >> 64;
                indices.swap(i, j as usize);
            }
        }
        indices
    }
}

/// The output function of SplitMix64 (Steele et al., 2014), applied to a counter.
fn mix(counter: u64) -> u64 {
    let mut z = counter.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Iterates over one epoch's batches. The last batch may be smaller than the others. `nth` and `skip` build no batch,
/// so a resumed run starts at its own batch at no cost.
pub struct Batches<'a> {
    examples: &'a Examples,
    indices: Vec<usize>,
    /// The end of each batch in `indices`.
    ends: Vec<usize>,
    next: usize,
}

impl<'a> Batches<'a> {
    /// Batches of `size` sequences each. `size` must be at least 1.
    pub fn new(dataset: &'a Dataset, size: usize, order: Order) -> Self {
        Batches::sized(dataset, BatchSize::Sequences(size as u64), order)
    }

    /// Batches of `size`, which counts sequences or tokens.
    pub fn sized(dataset: &'a Dataset, size: BatchSize, order: Order) -> Self {
        let (examples, indices) = (&dataset.examples, order.indices(dataset.len()));
        let ends = match size {
            BatchSize::Sequences(size) => {
                assert!(size > 0, "a batch holds a sequence at least");
                let size = usize::try_from(size).unwrap_or(usize::MAX);
                let begins = (0..indices.len()).step_by(size);
                begins.map(|begin| begin.saturating_add(size).min(indices.len())).collect()
            }
            BatchSize::Tokens { tokens } => {
                token_batch_ends(indices.iter().map(|&i| examples.ids(i).len() as u64), tokens)
            }
        };
        Batches { examples, indices, ends, next: 0 }
    }

    /// Skips the batches before number `first`.
    pub fn starting_at(self, first: usize) -> Self {
        Batches { next: first, ..self }
    }
}

/// The end of each batch if a batch takes the next sequences while they have at most `tokens` tokens together. A
/// sequence with more tokens than that is a batch by itself.
fn token_batch_ends(lengths: impl Iterator<Item = u64>, tokens: u64) -> Vec<usize> {
    let (mut ends, mut held, mut count) = (vec![], 0, 0);
    for length in lengths {
        if held > 0 && held + length > tokens {
            ends.push(count);
            held = 0;
        }
        held += length;
        count += 1;
    }
    ends.extend((count > 0).then_some(count));
    ends
}

impl Iterator for Batches<'_> {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        let end = *self.ends.get(self.next)?;
        let start = self.next.checked_sub(1).map_or(0, |before| self.ends[before]);
        self.next += 1;
        Some(Batch::pack(self.indices[start..end].iter().map(|&i| self.examples.get(i))))
    }

    fn nth(&mut self, n: usize) -> Option<Batch> {
        self.next = self.next.saturating_add(n);
        self.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.ends.len().saturating_sub(self.next);
        (left, Some(left))
    }
}

impl ExactSizeIterator for Batches<'_> {}
