//! Examples of one row in as few sequences as leave every loss what it is.
//!
//! The example of a turn repeats what stands before it: the passage, and the turns before. What a causal model says at a
//! token depends on that token and those before it, so examples that begin alike need their beginning once:
//!
//! ```text
//! earlier    P q₁ <a> a₁ <end>              predicts a₁ and <end>
//! next       P q₁ <a> a₁ q₂ <a> a₂ <end>    predicts a₂ and <end>
//! together   P q₁ <a> a₁ q₂ <a> a₂ <end>    predicts a₁, a₂ and <end>, and an <end> where q₂ begins: an aside
//! ```
//!
//! A token is predicted from those before it. An example can share the sequence of the next one if each token that it
//! predicts stands within their common beginning, of ids and types, or right behind it. Otherwise the next one begins a
//! sequence of its own. So losses and gradients are those of the separate examples whatever the template.

use super::{Aside, Example, Goal, Placed};

/// Takes the examples of a file in their order, and gives sequences.
#[derive(Default)]
pub struct Packer {
    /// The sequence that the next example of its row may share.
    open: Option<Placed>,
    /// Examples so far.
    pub turns: usize,
    /// How many of them begin a sequence though they are not the first of their row, by [`Apart`].
    apart: [usize; 3],
}

/// Why two examples do not share a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Apart {
    /// They differ before the answer of the earlier one.
    History,
    /// They have the same tokens, but not the same types.
    Types,
    /// They differ within the answer, or ahead of the last of several tokens that close it.
    Answer,
}

impl Packer {
    /// Takes an example, and gives the sequence before it if that is complete.
    pub fn add(&mut self, next: Placed) -> Option<Placed> {
        self.turns += 1;
        let Some(earlier) = self.open.take() else {
            self.open = Some(next);
            return None;
        };
        let together = (earlier.at.row() == next.at.row()).then(|| together(&earlier.example, &next.example));
        match together {
            Some(Ok(example)) => {
                let length = earlier.length.max(next.length);
                self.open = Some(Placed { at: earlier.at.through(&next.at), example, length });
                return None;
            }
            Some(Err(why)) => self.apart[why as usize] += 1,
            None => {}
        }
        self.open = Some(next);
        Some(earlier)
    }

    /// The last sequence of a file.
    pub fn close(&mut self) -> Option<Placed> {
        self.open.take()
    }

    /// How many turns begin a sequence though another one stands before them, and why.
    pub fn note(&self) -> Option<String> {
        let apart: usize = self.apart.iter().sum();
        let reasons = [
            (Apart::History, "the history is cut, or is left out"),
            (Apart::Types, "the history has other token types than the turn itself"),
            (Apart::Answer, "the history has the answer in another form, or several tokens close the answer"),
        ];
        let reason = |(why, what)| match self.apart[why as usize] {
            0 => None,
            all if all == apart => Some(String::from(what)),
            some => Some(format!("in {some} {what}")),
        };
        let why = reasons.into_iter().filter_map(reason).collect::<Vec<_>>().join("; ");
        let turns = self.turns;
        (apart > 0).then(|| format!("{apart} of {turns} turns share no sequence with the turn before them: {why}"))
    }
}

/// The next example with what the earlier one predicts.
fn together(earlier: &Example, next: &Example) -> Result<Example, Apart> {
    let ids = alike(&earlier.ids, &next.ids);
    let shared = ids.min(alike(&earlier.types, &next.types));
    let (ranges, asides) = (earlier.goal.ranges(), earlier.goal.asides());
    let last = ranges.last().map(|range| range.end - 1).max(asides.last().map(|aside| aside.at as usize));
    let last = last.unwrap_or(0);
    if last > shared {
        let answer = ranges.last().map_or(0, |range| range.start);
        return Err(match () {
            () if last <= ids => Apart::Types,
            () if shared < answer => Apart::History,
            () => Apart::Answer,
        });
    }
    let mut learned = vec![false; next.ids.len()];
    next.goal.ranges().iter().for_each(|range| learned[range.clone()].fill(true));
    let mut asides = [asides, next.goal.asides()].concat();
    for at in ranges.iter().cloned().flatten() {
        let label = earlier.ids[at];
        match learned.get_mut(at) {
            Some(learned) if !*learned && next.ids[at] == label => *learned = true,
            _ => asides.push(Aside { at: at as u32, label }),
        }
    }
    asides.sort_by_key(|aside| aside.at);
    let mut start = 0;
    let runs = learned.chunk_by(|a, b| a == b).map(|run| {
        start += run.len();
        (run[0], start - run.len()..start)
    });
    let ranges = runs.filter(|(learned, _)| *learned).map(|(_, range)| range).collect();
    Ok(Example { ids: next.ids.clone(), types: next.types.clone(), goal: Goal::turns(ranges, asides) })
}

/// How many numbers are the same from the first on.
fn alike(a: &[i32], b: &[i32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests;
