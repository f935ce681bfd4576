//! Packing: merges the examples of one row into few sequences without changing any loss.
//!
//! The example of one turn repeats its context, which is the passage and the earlier turns. The output of a causal
//! model at a token depends only on that token and those before it, so two examples with a common prefix need that
//! prefix only once:
//!
//! ```text
//! earlier    P q₁ <a> a₁ <end>              predicts a₁ and <end>
//! next       P q₁ <a> a₁ q₂ <a> a₂ <end>    predicts a₂ and <end>
//! together   P q₁ <a> a₁ q₂ <a> a₂ <end>    predicts a₁, a₂ and <end>, and an extra <end> where q₂ begins
//! ```
//!
//! A token is predicted from the tokens before it. An example can be merged into the next one if each token that it
//! predicts is inside their common prefix of ids and types, or directly after it. Otherwise the next example starts a
//! sequence of its own. Losses and gradients are therefore those of the separate examples, whatever the template is.

use super::{Example, ExtraTarget, Goal, LocatedExample};

/// Takes the examples of a file in order and returns the merged sequences.
#[derive(Default)]
pub struct Packer {
    /// The sequence into which the next example of the same row may be merged.
    open: Option<LocatedExample>,
    /// The number of examples so far.
    pub turns: usize,
    /// The number of examples that start a sequence although they are not the first of their row, by [`NotMerged`].
    not_merged: [usize; 3],
}

/// The reason why two examples are not merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NotMerged {
    /// They differ before the earlier example's answer.
    History,
    /// They have the same tokens but different token types.
    Types,
    /// They differ inside the answer, or before the last of several tokens that close it.
    Answer,
}

impl Packer {
    /// Takes an example. Returns the previous sequence if it is complete.
    pub fn add(&mut self, next: LocatedExample) -> Option<LocatedExample> {
        self.turns += 1;
        let Some(earlier) = self.open.take() else {
            self.open = Some(next);
            return None;
        };
        let merged = (earlier.at.row() == next.at.row()).then(|| merge(&earlier.example, &next.example));
        match merged {
            Some(Ok(example)) => {
                let length = earlier.length.max(next.length);
                self.open = Some(LocatedExample { at: earlier.at.through(&next.at), example, length });
                return None;
            }
            Some(Err(why)) => self.not_merged[why as usize] += 1,
            None => {}
        }
        self.open = Some(next);
        Some(earlier)
    }

    /// Returns the last sequence of a file.
    pub fn close(&mut self) -> Option<LocatedExample> {
        self.open.take()
    }

    /// A note on how many turns start a sequence although a turn precedes them, and why.
    pub fn note(&self) -> Option<String> {
        let not_merged: usize = self.not_merged.iter().sum();
        let reasons = [
            (NotMerged::History, "the history is cut, or is left out"),
            (NotMerged::Types, "the history has other token types than the turn itself"),
            (NotMerged::Answer, "the history has the answer in another form, or several tokens close the answer"),
        ];
        let reason = |(why, what)| match self.not_merged[why as usize] {
            0 => None,
            all if all == not_merged => Some(String::from(what)),
            some => Some(format!("in {some} {what}")),
        };
        let why = reasons.into_iter().filter_map(reason).collect::<Vec<_>>().join("; ");
        let turns = self.turns;
        (not_merged > 0)
            .then(|| format!("{not_merged} of {turns} turns share no sequence with the turn before them: {why}"))
    }
}

/// The next example with the targets of the earlier one added.
fn merge(earlier: &Example, next: &Example) -> Result<Example, NotMerged> {
    let ids = common_prefix(&earlier.ids, &next.ids);
    let shared = ids.min(common_prefix(&earlier.types, &next.types));
    let (ranges, extra_targets) = (earlier.goal.ranges(), earlier.goal.extra_targets());
    let last = ranges.last().map(|range| range.end - 1).max(extra_targets.last().map(|extra| extra.at as usize));
    let last = last.unwrap_or(0);
    if last > shared {
        let answer = ranges.last().map_or(0, |range| range.start);
        return Err(match () {
            () if last <= ids => NotMerged::Types,
            () if shared < answer => NotMerged::History,
            () => NotMerged::Answer,
        });
    }
    let mut learned = vec![false; next.ids.len()];
    next.goal.ranges().iter().for_each(|range| learned[range.clone()].fill(true));
    let mut extra_targets = [extra_targets, next.goal.extra_targets()].concat();
    for at in ranges.iter().cloned().flatten() {
        let label = earlier.ids[at];
        match learned.get_mut(at) {
            Some(learned) if !*learned && next.ids[at] == label => *learned = true,
            _ => extra_targets.push(ExtraTarget { at: at as u32, label }),
        }
    }
    extra_targets.sort_by_key(|extra| extra.at);
    let mut start = 0;
    let runs = learned.chunk_by(|a, b| a == b).map(|run| {
        start += run.len();
        (run[0], start - run.len()..start)
    });
    let ranges = runs.filter(|(learned, _)| *learned).map(|(_, range)| range).collect();
    Ok(Example { ids: next.ids.clone(), types: next.types.clone(), goal: Goal::turns(ranges, extra_targets) })
}

/// The length of the common prefix.
fn common_prefix(a: &[i32], b: &[i32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests;
