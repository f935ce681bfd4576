//! Where the epochs of a run end.

use peft_grammar::model::{BatchSize, Recipe};

use crate::data::{Batches, Dataset, Order};

/// The steps at which epochs end. In batches of so many sequences all epochs are equally long. In batches of so many
/// tokens an epoch's length depends on its order, and is counted.
pub(super) struct Epochs<'a> {
    data: &'a Dataset,
    batch: BatchSize,
    accumulate: u64,
    seed: u64,
    /// Where those that were counted end.
    ends: Vec<u64>,
}

impl<'a> Epochs<'a> {
    /// Of a run on `data`, which has an example.
    pub fn of(recipe: &Recipe, data: &'a Dataset) -> Self {
        let Recipe { batch, accumulate, seed, .. } = *recipe;
        Epochs { data, batch, accumulate, seed, ends: vec![] }
    }

    /// The batches of an epoch.
    pub fn batches(&self, epoch: u64) -> Batches<'a> {
        Batches::sized(self.data, self.batch, Order::Shuffled { seed: self.seed, epoch })
    }

    /// Steps of a whole run.
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

    /// The epoch that a step is of, the first step of that, and the one at which it ends.
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

    /// Steps of an epoch, if all have as many.
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

    /// Counts the steps of one more epoch.
    fn count(&mut self) {
        let batches = self.batches(self.ends.len() as u64).len() as u64;
        let begin = self.ends.last().copied().unwrap_or(0);
        self.ends.push(begin + batches.div_ceil(self.accumulate));
    }
}

#[cfg(test)]
mod tests;
