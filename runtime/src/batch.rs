//! What a run is given, and what follows from it.

use std::collections::BTreeMap;

use crate::artifact::Sizes;

/// One batch: sequences back to back, without padding.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Of each sequence; all at least 1.
    pub lengths: Vec<i32>,
    /// By name: `ids`, `types`, `targets`, `labels`. `positions` may be left out: they count from 0 in
    /// each sequence then.
    pub inputs: BTreeMap<String, Vec<i32>>,
    /// By name: `hyper`, the optimizer's numbers.
    pub floats: BTreeMap<String, Vec<f32>>,
    /// Seed and step: the key of every dropout.
    pub rng: [i32; 2],
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    #[error("sequence {sequence} of the batch has length {length}; every sequence needs at least one token")]
    Length { sequence: usize, length: i32 },
    #[error("the batch is too large: its sequences' lengths squared add up to {pairs}, more than 2³¹ − 1")]
    TooLong { pairs: u64 },
    #[error("the batch has no {what}, but `{entry}` computes on them")]
    Nothing { entry: String, what: &'static str },
    #[error("`{entry}` needs the input `{name}`, which the batch lacks")]
    Missing { entry: String, name: String },
    #[error("the input `{name}` has {found} values, but {expected} were expected ({why})")]
    Count { name: String, found: u64, expected: u64, why: String },
    #[error("value {index} of the input `{name}` is {value}; it must lie in 0..{limit}")]
    Range { name: String, index: usize, value: i32, limit: u64 },
}

impl Batch {
    /// The sizes every extent is computed from.
    pub fn sizes(&self, values: u64) -> Result<Sizes, BatchError> {
        if let Some((sequence, &length)) = self.lengths.iter().enumerate().find(|(_, l)| **l < 1) {
            return Err(BatchError::Length { sequence, length });
        }
        let tokens: u64 = self.lengths.iter().map(|&l| l as u64).sum();
        let pairs: u64 = self.lengths.iter().map(|&l| (l as u64).pow(2)).fold(0, u64::saturating_add);
        // Kernels get `pairs` as i32; there are no fewer pairs than tokens.
        if pairs > i32::MAX as u64 {
            return Err(BatchError::TooLong { pairs });
        }
        let targets = self.inputs.get("targets").map_or(0, |t| t.len() as u64);
        Ok(Sizes { tokens, sequences: self.lengths.len() as u64, targets, pairs, values })
    }

    /// The integer inputs by name: those given and those that follow from the lengths.
    pub(crate) fn integers(&self) -> BTreeMap<&str, std::borrow::Cow<'_, [i32]>> {
        let mut all = BTreeMap::new();
        for (name, values) in derived(&self.lengths) {
            all.insert(name, values.into());
        }
        all.insert("rng", self.rng.to_vec().into());
        for (name, values) in &self.inputs {
            all.insert(name.as_str(), values.as_slice().into());
        }
        all
    }

    /// Checks values whose range is known here. Whether an id is in the vocabulary is the tokenizer's matter.
    pub(crate) fn check_values(&self, sizes: &Sizes) -> Result<(), BatchError> {
        for (name, values) in &self.inputs {
            let limit = match name.as_str() {
                "targets" | "starts" => sizes.tokens,
                _ => 1 << 31,
            };
            if let Some((index, &value)) = values.iter().enumerate().find(|(_, v)| **v < 0 || **v as u64 >= limit) {
                return Err(BatchError::Range { name: name.clone(), index, value, limit });
            }
        }
        Ok(())
    }
}

/// What follows from the lengths: see [`crate::artifact::Storage::Input`].
fn derived(lengths: &[i32]) -> [(&'static str, Vec<i32>); 5] {
    let (mut offsets, mut starts) = (vec![0], vec![]);
    let (mut segments, mut positions, mut pairs) = (vec![], vec![], vec![0]);
    let (mut token, mut pair) = (0, 0);
    for (sequence, &length) in lengths.iter().enumerate() {
        starts.push(token);
        for position in 0..length {
            segments.push(sequence as i32);
            positions.push(position);
            pair += length;
            pairs.push(pair);
        }
        token += length;
        offsets.push(token);
    }
    [("offsets", offsets), ("starts", starts), ("segments", segments), ("positions", positions), ("pairs", pairs)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_from_lengths() {
        let batch = Batch { lengths: vec![2, 3], ..Batch::default() };
        assert_eq!(batch.sizes(7).unwrap(), Sizes { tokens: 5, sequences: 2, targets: 0, pairs: 13, values: 7 });
        let all = batch.integers();
        assert_eq!(&*all["offsets"], [0, 2, 5]);
        assert_eq!(&*all["starts"], [0, 2]);
        assert_eq!(&*all["segments"], [0, 0, 1, 1, 1]);
        assert_eq!(&*all["positions"], [0, 1, 0, 1, 2]);
        assert_eq!(&*all["pairs"], [0, 2, 4, 7, 10, 13]);
    }

    #[test]
    fn bad_batches() {
        let batch = |lengths: &[i32]| Batch { lengths: lengths.to_vec(), ..Batch::default() };
        assert_eq!(batch(&[3, 0]).sizes(0), Err(BatchError::Length { sequence: 1, length: 0 }));
        assert_eq!(batch(&[50_000]).sizes(0), Err(BatchError::TooLong { pairs: 2_500_000_000 }));
        let mut bad = batch(&[3]);
        bad.inputs.insert("targets".into(), vec![0, 3]);
        let sizes = bad.sizes(0).unwrap();
        let error = BatchError::Range { name: "targets".into(), index: 1, value: 3, limit: 3 };
        assert_eq!(bad.check_values(&sizes), Err(error));
    }
}
