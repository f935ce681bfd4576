//! The steps at which the epochs of a run end.

use peft_grammar::model::{BatchSize, Recipe};

use crate::data::{Batches, Dataset, Order};

/// The steps at which epochs end. If a batch is a fixed number of sequences, all epochs have the same number of steps.
/// If a batch is a number of tokens, an epoch's number of steps depends on its order and has to be counted.
pub(super) struct Epochs<'a> {
    data: &'a Dataset,
    batch: BatchSize,
    accumulate: u64,
    seed: u64,
    /// The ends of the epochs counted so far.
    ends: Vec<u64>,
}

impl<'a> Epochs<'a> {
    /// The epochs of a run on `data`, which must not be empty.
    pub fn of(recipe: &Recipe, data: &'a Dataset) -> Self {
        let Recipe { batch, accumulate, seed, .. } = *recipe;
        Epochs { data, batch, accumulate, seed, ends: vec![] }
    }

    /// The batches of an epoch.
    pub fn batches(&self, epoch: u64) -> Batches<'a> {
        Batches::sized(self.data, self.batch, Order::Shuffled { seed: self.seed, epoch })
    }

    /// The number of steps of the whole run.
    pub fn total(&mut self, recipe: &Recipe) -> u64 {
        if let Some(steps) = recipe.steps {
            return steps;
        }
        match self.equal() {
            Some(steps) => (recipe.epochs * steps as f64).ceil() as u64,
            None => {
                let whole = recipe.epochs as u64;
                let (begin, end) = (self.begin(whole), self.end_of(whole));
                begin + ((recipe.epochs - whole as f64) * (end - begin) as f64).ceil() as u64
            }
        }
    }

    /// The epoch of a step, and the range of that epoch's steps.
    pub fn around(&mut self, step: u64) -> (u64, std::ops::Range<u64>) {
        if let Some(steps) = self.equal() {
            let epoch = step / steps;
            return (epoch, epoch * steps..(epoch + 1) * steps);
        }
        while self.ends.last().is_none_or(|&end| end <= step) {
            self.count();
        }
        let epoch = self.ends.partition_point(|&end| end <= step) as u64;
        (epoch, self.begin(epoch)..self.end_of(epoch))
    }

    /// The number of steps of an epoch, if all epochs have the same number.
    fn equal(&self) -> Option<u64> {
        match self.batch {
            BatchSize::Sequences(sequences) => {
                Some((self.data.len() as u64).div_ceil(sequences.saturating_mul(self.accumulate)))
            }
            BatchSize::Tokens { .. } => None,
        }
    }

    fn begin(&mut self, epoch: u64) -> u64 {
        epoch.checked_sub(1).map_or(0, |before| self.end_of(before))
    }

    fn end_of(&mut self, epoch: u64) -> u64 {
        while self.ends.len() as u64 <= epoch {
            self.count();
        }
        self.ends[epoch as usize]
    }

    /// Counts the steps of the next epoch.
    fn count(&mut self) {
        let batches = self.batches(self.ends.len() as u64).len() as u64;
        let begin = self.ends.last().copied().unwrap_or(0);
        self.ends.push(begin + batches.div_ceil(self.accumulate));
    }
}

#[cfg(test)]
mod tests;
