//! Examples, flat: the tokens of all of them one behind the other, and beside them runs of tokens of one type. They are
//! held here, or lie in a file of the cache.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

/// One sequence as the model sees it, and what it is to predict.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    pub ids: Vec<i32>,
    /// The token type of every id.
    pub types: Vec<i32>,
    pub goal: Goal,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Goal {
    /// The tokens of these ranges are predicted, each by the one before it. They are in order, and none begins at 0.
    Tokens(Vec<Range<usize>>),
    /// The same of several examples in one sequence, and what else they predict, in order of place.
    Turns(Vec<Range<usize>>, Vec<Aside>),
    /// The sequence is of this class.
    Class(i32),
    /// The sequence has this number.
    Number(f32),
    /// The class of each token, [`NO_TAG`] where none is asked.
    Tags(Vec<i32>),
}

/// In place of a token's class where none is asked.
pub const NO_TAG: i32 = -1;

/// A token that is predicted at a place where the sequence has another one, or none, or where it is predicted once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aside {
    pub at: u32,
    pub label: i32,
}

impl Goal {
    /// Tokens of these ranges, and asides if there are some.
    pub fn turns(ranges: Vec<Range<usize>>, asides: Vec<Aside>) -> Self {
        if asides.is_empty() { Goal::Tokens(ranges) } else { Goal::Turns(ranges, asides) }
    }

    /// The ranges of the sequence's own tokens that are predicted.
    pub fn ranges(&self) -> &[Range<usize>] {
        match self {
            Goal::Tokens(ranges) | Goal::Turns(ranges, _) => ranges,
            Goal::Class(_) | Goal::Number(_) | Goal::Tags(_) => &[],
        }
    }

    pub fn asides(&self) -> &[Aside] {
        if let Goal::Turns(_, asides) = self { asides } else { &[] }
    }

    /// Of a sequence of `length` tokens, all behind number `from`, counted from 0.
    pub fn after(from: usize, length: usize) -> Self {
        Goal::Tokens(std::iter::once(from + 1..length).filter(|range| !range.is_empty()).collect())
    }

    /// How many things it asks for.
    pub fn targets(&self) -> usize {
        match self {
            Goal::Tokens(_) | Goal::Turns(..) => {
                self.ranges().iter().map(Range::len).sum::<usize>() + self.asides().len()
            }
            Goal::Class(_) | Goal::Number(_) => 1,
            Goal::Tags(tags) => tags.iter().filter(|&&tag| tag != NO_TAG).count(),
        }
    }
}

impl Example {
    /// Puts marks behind it, of which nothing is asked.
    pub fn close(&mut self, marks: &[i32]) {
        self.ids.extend_from_slice(marks);
        self.types.resize(self.ids.len(), self.types.last().copied().unwrap_or(0));
        if let Goal::Tags(tags) = &mut self.goal {
            tags.resize(self.ids.len(), NO_TAG);
        }
    }

    /// Cuts it to its first `limit` tokens.
    pub fn truncate(&mut self, limit: usize) {
        self.ids.truncate(limit);
        self.types.truncate(limit);
        match &mut self.goal {
            Goal::Tokens(ranges) | Goal::Turns(ranges, _) => ranges.retain_mut(|range| {
                range.end = range.end.min(limit);
                range.start < range.end
            }),
            Goal::Tags(tags) => tags.truncate(limit),
            Goal::Class(_) | Goal::Number(_) => {}
        }
        if let Goal::Turns(ranges, asides) = &mut self.goal {
            asides.retain(|aside| (aside.at as usize) < limit);
            self.goal = Goal::turns(std::mem::take(ranges), std::mem::take(asides));
        }
    }
}

/// Tokens, one behind the other, that have one type and are all predicted or all not: 12 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Run {
    /// Its first token within the example.
    start: u32,
    kind: i32,
    /// 1 if its tokens are predicted.
    learned: u32,
}

/// An [`Aside`] of an example: 12 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Beside {
    example: u32,
    at: u32,
    label: i32,
}

/// Where an example ends, in tokens and in runs of all: 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct End {
    tokens: u64,
    runs: u64,
}

/// Numbers that are held, or that lie in a file.
pub(super) enum Array<T> {
    Held(Vec<T>),
    Mapped(Arc<Mmap>, Range<usize>),
}

impl<T: bytemuck::Pod> Deref for Array<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Array::Held(numbers) => numbers,
            Array::Mapped(map, range) => bytemuck::cast_slice(&map[range.clone()]),
        }
    }
}

impl<T: bytemuck::Pod> Array<T> {
    /// The numbers in a range of a file, if it begins and ends where one does.
    pub fn mapped(map: &Arc<Mmap>, range: Range<usize>) -> Option<Self> {
        bytemuck::try_cast_slice::<u8, T>(map.get(range.clone())?).ok()?;
        Some(Array::Mapped(map.clone(), range))
    }

    pub fn push(&mut self, number: T) {
        self.push_all(&[number]);
    }

    fn push_all(&mut self, numbers: &[T]) {
        match self {
            Array::Held(held) => held.extend_from_slice(numbers),
            Array::Mapped(..) => *self = Array::Held([&**self, numbers].concat()),
        }
    }

    fn shrink(&mut self) {
        if let Array::Held(numbers) = self {
            numbers.shrink_to_fit();
        }
    }
}

impl<T> Default for Array<T> {
    fn default() -> Self {
        Array::Held(vec![])
    }
}

impl<T: bytemuck::Pod + fmt::Debug> fmt::Debug for Array<T> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_list().entries(self.iter().take(8)).finish()
    }
}

/// What all examples of a set ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Asks {
    #[default]
    Tokens,
    Class,
    Number,
    Tags,
}

/// Examples of one kind. A token takes 4 bytes, with a class 8; an example 16, with a class or a number 20; each of its
/// runs and asides 12.
#[derive(Default)]
pub struct Examples {
    pub(super) asks: Asks,
    pub(super) ids: Array<i32>,
    pub(super) runs: Array<Run>,
    pub(super) ends: Array<End>,
    /// A class or the bits of a number for each example, or a class for each token, as they ask.
    pub(super) answers: Array<i32>,
    /// In the order of the examples; few have some.
    pub(super) asides: Array<Beside>,
}

impl Examples {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Tokens of all.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        let all = size_of_val(&*self.ids) + size_of_val(&*self.runs) + size_of_val(&*self.ends);
        all + size_of_val(&*self.answers) + size_of_val(&*self.asides)
    }

    pub fn push(&mut self, example: &Example) {
        let mut runs: Vec<Run> = vec![];
        let learned = example.goal.ranges();
        self.asks = match &example.goal {
            Goal::Tokens(_) | Goal::Turns(..) => Asks::Tokens,
            Goal::Class(class) => {
                self.answers.push(*class);
                Asks::Class
            }
            Goal::Number(number) => {
                self.answers.push(number.to_bits().cast_signed());
                Asks::Number
            }
            Goal::Tags(tags) => {
                self.answers.push_all(tags);
                Asks::Tags
            }
        };
        let mut ranges = learned.iter().peekable();
        for (at, &kind) in example.types.iter().enumerate() {
            while ranges.next_if(|range| range.end <= at).is_some() {}
            let learned = u32::from(ranges.peek().is_some_and(|range| range.contains(&at)));
            if runs.last().is_none_or(|run| (run.kind, run.learned) != (kind, learned)) {
                runs.push(Run { start: at as u32, kind, learned });
            }
        }
        let number = self.len() as u32;
        let beside = |aside: &Aside| Beside { example: number, at: aside.at, label: aside.label };
        self.asides.push_all(&example.goal.asides().iter().map(beside).collect::<Vec<_>>());
        self.ids.push_all(&example.ids);
        self.runs.push_all(&runs);
        self.ends.push_all(&[End { tokens: self.ids.len() as u64, runs: self.runs.len() as u64 }]);
    }

    /// Gives back what was kept for more of them.
    pub(super) fn shrink(&mut self) {
        self.ids.shrink();
        self.runs.shrink();
        self.ends.shrink();
        self.answers.shrink();
        self.asides.shrink();
    }

    fn span(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let start = match index {
            0 => End { tokens: 0, runs: 0 },
            _ => self.ends[index - 1],
        };
        let end = self.ends[index];
        (start.tokens as usize..end.tokens as usize, start.runs as usize..end.runs as usize)
    }

    /// The tokens of an example.
    pub fn ids(&self, index: usize) -> &[i32] {
        &self.ids[self.span(index).0]
    }

    pub fn get(&self, index: usize) -> Example {
        let (tokens, runs) = self.span(index);
        let ids = self.ids[tokens.clone()].to_vec();
        let runs = &self.runs[runs];
        let mut types = Vec::with_capacity(ids.len());
        let mut learned: Vec<Range<usize>> = vec![];
        for (at, run) in runs.iter().enumerate() {
            let (start, end) = (run.start as usize, runs.get(at + 1).map_or(ids.len(), |next| next.start as usize));
            types.resize(end, run.kind);
            match learned.last_mut() {
                _ if run.learned == 0 => {}
                Some(last) if last.end == start => last.end = end,
                _ => learned.push(start..end),
            }
        }
        let goal = match self.asks {
            Asks::Tokens => Goal::turns(learned, self.asides(index)),
            Asks::Class => Goal::Class(self.answers[index]),
            Asks::Number => Goal::Number(f32::from_bits(self.answers[index].cast_unsigned())),
            Asks::Tags => Goal::Tags(self.answers[tokens].to_vec()),
        };
        Example { ids, types, goal }
    }

    fn asides(&self, index: usize) -> Vec<Aside> {
        let first = self.asides.partition_point(|beside| (beside.example as usize) < index);
        let own = self.asides[first..].iter().take_while(|beside| beside.example as usize == index);
        own.map(|beside| Aside { at: beside.at, label: beside.label }).collect()
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = Example> {
        (0..self.len()).map(|index| self.get(index))
    }

    /// That nothing reaches beyond what is there, and the ids are of a model with `rows` rows. For what is read from a
    /// file.
    pub(super) fn are_whole(&self, rows: u64) -> bool {
        let mut last = End { tokens: 0, runs: 0 };
        let ends = self.ends.iter().all(|&end| {
            let grows = end.tokens > last.tokens && end.runs > last.runs && end.tokens - last.tokens <= u32::MAX.into();
            let runs = self.runs.get(last.runs as usize..end.runs as usize).filter(|_| grows);
            let length = end.tokens.saturating_sub(last.tokens);
            last = end;
            runs.is_some_and(|runs| {
                runs[0].start == 0
                    && runs.windows(2).all(|pair| pair[0].start < pair[1].start)
                    && runs.iter().all(|run| u64::from(run.start) < length)
            })
        });
        let answers = match self.asks {
            Asks::Tokens => 0,
            Asks::Class | Asks::Number => self.ends.len(),
            Asks::Tags => self.ids.len(),
        };
        let known = |id: i32| u64::try_from(id).is_ok_and(|id| id < rows);
        let inside = |beside: &Beside| {
            let (example, at) = (beside.example as usize, beside.at as usize);
            known(beside.label) && example < self.len() && (1..=self.span(example).0.len()).contains(&at)
        };
        let in_order = self.asides.is_sorted_by_key(|beside| (beside.example, beside.at));
        let asides = self.asides.is_empty() || (self.asks == Asks::Tokens && in_order);
        ends && self.answers.len() == answers
            && asides
            && self.asides.iter().all(inside)
            && (last.tokens as usize, last.runs as usize) == (self.ids.len(), self.runs.len())
            && self.ids.iter().all(|&id| known(id))
            && self.runs.iter().all(|run| known(run.kind))
    }
}

impl fmt::Debug for Examples {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_list().entries(self.iter().take(8)).finish()
    }
}

impl FromIterator<Example> for Examples {
    fn from_iter<I: IntoIterator<Item = Example>>(examples: I) -> Self {
        let mut all = Examples::default();
        examples.into_iter().for_each(|example| all.push(&example));
        all
    }
}

impl<E: AsRef<[Example]>> PartialEq<E> for Examples {
    fn eq(&self, others: &E) -> bool {
        self.iter().eq(others.as_ref().iter().cloned())
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // an example may well have one range of targets
mod tests {
    use super::*;

    #[test]
    fn what_is_put_in_comes_out() {
        let tokens = |ids: &[i32], types: &[i32], ranges: &[Range<usize>]| Example {
            ids: ids.to_vec(),
            types: types.to_vec(),
            goal: Goal::Tokens(ranges.to_vec()),
        };
        let all = [
            tokens(&[5, 6, 7, 8, 9], &[1, 1, 2, 2, 2], &[1..2, 3..5]),
            tokens(&[3, 4], &[0, 0], &[1..2]),
            tokens(&[3], &[7], &[]),
            tokens(&[1, 2, 3, 4], &[0, 3, 3, 0], &[1..4]),
        ];
        let examples: Examples = all.iter().cloned().collect();
        assert_eq!(examples, all);
        assert_eq!((examples.len(), examples.tokens(), examples.ids(3)), (4, 12, &[1, 2, 3, 4][..]));
        assert!(examples.are_whole(10) && !examples.are_whole(9));
        // Types too: a type is a row of an embedding.
        assert!(![tokens(&[1], &[-1], &[])].into_iter().collect::<Examples>().are_whole(10));
        // What several examples predict in one sequence: at the place of another token, once more, and behind the last.
        let aside = |at, label| Aside { at, label };
        let goal = Goal::Turns(vec![1..3], vec![aside(2, 7), aside(2, 9), aside(4, 8)]);
        let turns = Example { goal, ..all[3].clone() };
        let both = [all[0].clone(), turns.clone(), all[2].clone(), turns.clone()];
        let examples: Examples = both.iter().cloned().collect();
        assert_eq!(examples, both);
        assert_eq!((turns.goal.targets(), examples.bytes()), (5, 4 * 14 + 12 * (11 + 6) + 16 * 4));
        assert!(examples.are_whole(10) && !examples.are_whole(9));
        for asides in [vec![aside(0, 7)], vec![aside(5, 7)], vec![aside(1, -1)], vec![aside(2, 7), aside(1, 7)]] {
            let wrong = Example { goal: Goal::Turns(vec![1..3], asides.clone()), ..turns.clone() };
            assert!(![wrong].into_iter().collect::<Examples>().are_whole(10), "{asides:?}");
        }
        let class = Example { ids: vec![1, 4, 2], types: vec![0; 3], goal: Goal::Class(3) };
        let examples: Examples = std::iter::once(class.clone()).collect();
        assert_eq!(examples, [class]);
    }

    #[test]
    fn a_cut_takes_targets() {
        let mut example = Example { ids: (0..6).collect(), types: vec![0; 6], goal: Goal::Tokens(vec![1..3, 4..6]) };
        example.truncate(5);
        assert_eq!((example.ids.len(), example.types.len(), &example.goal), (5, 5, &Goal::Tokens(vec![1..3, 4..5])));
        example.truncate(1);
        assert_eq!(example.goal.targets(), 0);
        let asides = [Aside { at: 2, label: 7 }, Aside { at: 4, label: 8 }];
        example = Example { ids: (0..6).collect(), types: vec![0; 6], goal: Goal::Turns(vec![1..3], asides.to_vec()) };
        example.truncate(4);
        assert_eq!(example.goal, Goal::Turns(vec![1..3], asides[..1].to_vec()));
        example.truncate(2);
        assert_eq!(example.goal, Goal::Tokens(vec![1..2]));
        assert_eq!(Goal::after(2, 3), Goal::Tokens(vec![]));
    }
}
