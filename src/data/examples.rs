//! Compact storage of examples: all tokens in one array, with run-length encoded token types. The arrays are owned
//! vectors or parts of a memory-mapped cache entry.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

/// A sequence of tokens and its prediction targets.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// The token ids.
    pub ids: Vec<i32>,
    /// The token type of every token.
    pub types: Vec<i32>,
    /// What the model learns to predict.
    pub goal: Goal,
}

/// The prediction targets of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum Goal {
    /// The tokens in these ranges are predicted, each from the tokens before it. Ranges are in order, and none starts
    /// at 0.
    Tokens(Vec<Range<usize>>),
    /// The token ranges of several examples merged into one sequence, and the extra targets of the merge, by position.
    Turns(Vec<Range<usize>>, Vec<ExtraTarget>),
    /// The class of the sequence.
    Class(i32),
    /// The regression value of the sequence.
    Number(f32),
    /// The class of each token, or [`NO_TAG`] where a token has none.
    Tags(Vec<i32>),
}

/// The class of a token that has no target.
pub const NO_TAG: i32 = -1;

/// A token that is predicted at position `at` in addition to the sequence's own token there: a different token, the
/// token after the last one, or a repeated target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtraTarget {
    pub at: u32,
    pub label: i32,
}

impl Goal {
    /// Targets in these ranges, and extra targets if there are any.
    pub fn turns(ranges: Vec<Range<usize>>, extra_targets: Vec<ExtraTarget>) -> Self {
        if extra_targets.is_empty() { Goal::Tokens(ranges) } else { Goal::Turns(ranges, extra_targets) }
    }

    /// The predicted ranges of the sequence's own tokens.
    pub fn ranges(&self) -> &[Range<usize>] {
        match self {
            Goal::Tokens(ranges) | Goal::Turns(ranges, _) => ranges,
            Goal::Class(_) | Goal::Number(_) | Goal::Tags(_) => &[],
        }
    }

    /// The extra targets of a merged sequence.
    pub fn extra_targets(&self) -> &[ExtraTarget] {
        if let Goal::Turns(_, extra_targets) = self { extra_targets } else { &[] }
    }

    /// All tokens of a sequence of `length` tokens that follow token `from`, counted from 0.
    pub fn after(from: usize, length: usize) -> Self {
        Goal::Tokens(std::iter::once(from + 1..length).filter(|range| !range.is_empty()).collect())
    }

    /// The number of targets.
    pub fn target_count(&self) -> usize {
        match self {
            Goal::Tokens(_) | Goal::Turns(..) => {
                self.ranges().iter().map(Range::len).sum::<usize>() + self.extra_targets().len()
            }
            Goal::Class(_) | Goal::Number(_) => 1,
            Goal::Tags(tags) => tags.iter().filter(|&&tag| tag != NO_TAG).count(),
        }
    }
}

impl Example {
    /// Appends the tokenizer's closing special tokens, which have no target.
    pub fn close(&mut self, marks: &[i32]) {
        self.ids.extend_from_slice(marks);
        self.types.resize(self.ids.len(), self.types.last().copied().unwrap_or(0));
        if let Goal::Tags(tags) = &mut self.goal {
            tags.resize(self.ids.len(), NO_TAG);
        }
    }

    /// Truncates the example to its first `limit` tokens.
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
        if let Goal::Turns(ranges, extra_targets) = &mut self.goal {
            extra_targets.retain(|extra| (extra.at as usize) < limit);
            self.goal = Goal::turns(std::mem::take(ranges), std::mem::take(extra_targets));
        }
    }
}

/// A run of tokens that have one type and are all predicted or all not. It takes 12 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct TokenRun {
    /// The run's first token, counted within the example.
    start: u32,
    kind: i32,
    /// 1 if the run's tokens are predicted, else 0.
    learned: u32,
}

/// An [`ExtraTarget`] together with the number of its example. It takes 12 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct StoredExtraTarget {
    example: u32,
    at: u32,
    label: i32,
}

/// The end of an example in the arrays of tokens and of runs. It takes 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct ExampleEnd {
    tokens: u64,
    runs: u64,
}

/// An owned vector, or a range of bytes in a memory-mapped file.
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
    /// The values in a byte range of a file. Returns `None` if the range is out of bounds or not aligned.
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

/// The kind of target that all examples of a data set have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum GoalKind {
    #[default]
    Tokens,
    Class,
    Number,
    Tags,
}

/// Examples that have one kind of target. Each token takes 4 bytes (8 with a class of its own), each example 16 (20
/// with a class or a number), and each run and each extra target 12.
#[derive(Default)]
pub struct Examples {
    pub(super) goal_kind: GoalKind,
    pub(super) ids: Array<i32>,
    pub(super) runs: Array<TokenRun>,
    pub(super) ends: Array<ExampleEnd>,
    /// One class or one number's bits for each example, or one class for each token, depending on the kind of target.
    pub(super) answers: Array<i32>,
    /// Extra targets in the order of the examples. Most examples have none.
    pub(super) extra_targets: Array<StoredExtraTarget>,
}

impl Examples {
    /// The number of examples.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are no examples.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The number of tokens of all examples.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// The number of bytes of all arrays.
    pub fn bytes(&self) -> usize {
        let all = size_of_val(&*self.ids) + size_of_val(&*self.runs) + size_of_val(&*self.ends);
        all + size_of_val(&*self.answers) + size_of_val(&*self.extra_targets)
    }

    /// Appends an example.
    pub fn push(&mut self, example: &Example) {
        let mut runs: Vec<TokenRun> = vec![];
        let learned = example.goal.ranges();
        self.goal_kind = match &example.goal {
            Goal::Tokens(_) | Goal::Turns(..) => GoalKind::Tokens,
            Goal::Class(class) => {
                self.answers.push(*class);
                GoalKind::Class
            }
            Goal::Number(number) => {
                self.answers.push(number.to_bits().cast_signed());
                GoalKind::Number
            }
            Goal::Tags(tags) => {
                self.answers.push_all(tags);
                GoalKind::Tags
            }
        };
        let mut ranges = learned.iter().peekable();
        for (at, &kind) in example.types.iter().enumerate() {
            while ranges.next_if(|range| range.end <= at).is_some() {}
            let learned = u32::from(ranges.peek().is_some_and(|range| range.contains(&at)));
            if runs.last().is_none_or(|run| (run.kind, run.learned) != (kind, learned)) {
                runs.push(TokenRun { start: at as u32, kind, learned });
            }
        }
        let number = self.len() as u32;
        let stored = |extra: &ExtraTarget| StoredExtraTarget { example: number, at: extra.at, label: extra.label };
        self.extra_targets.push_all(&example.goal.extra_targets().iter().map(stored).collect::<Vec<_>>());
        self.ids.push_all(&example.ids);
        self.runs.push_all(&runs);
        self.ends.push_all(&[ExampleEnd { tokens: self.ids.len() as u64, runs: self.runs.len() as u64 }]);
    }

    /// Frees the unused capacity of the arrays.
    pub(super) fn shrink(&mut self) {
        self.ids.shrink();
        self.runs.shrink();
        self.ends.shrink();
        self.answers.shrink();
        self.extra_targets.shrink();
    }

    /// The ranges of an example's tokens and runs.
    fn span(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let start = match index {
            0 => ExampleEnd { tokens: 0, runs: 0 },
            _ => self.ends[index - 1],
        };
        let end = self.ends[index];
        (start.tokens as usize..end.tokens as usize, start.runs as usize..end.runs as usize)
    }

    /// The tokens of an example.
    pub fn ids(&self, index: usize) -> &[i32] {
        &self.ids[self.span(index).0]
    }

    /// Decodes an example.
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
        let goal = match self.goal_kind {
            GoalKind::Tokens => Goal::turns(learned, self.extra_targets(index)),
            GoalKind::Class => Goal::Class(self.answers[index]),
            GoalKind::Number => Goal::Number(f32::from_bits(self.answers[index].cast_unsigned())),
            GoalKind::Tags => Goal::Tags(self.answers[tokens].to_vec()),
        };
        Example { ids, types, goal }
    }

    fn extra_targets(&self, index: usize) -> Vec<ExtraTarget> {
        let first = self.extra_targets.partition_point(|stored| (stored.example as usize) < index);
        let own = self.extra_targets[first..].iter().take_while(|stored| stored.example as usize == index);
        own.map(|stored| ExtraTarget { at: stored.at, label: stored.label }).collect()
    }

    /// Decodes all examples in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Example> {
        (0..self.len()).map(|index| self.get(index))
    }

    /// Validates arrays that were read from a file: all offsets are in bounds, and all ids and types are below `rows`,
    /// the number of rows of the model's embedding.
    pub(super) fn are_valid(&self, rows: u64) -> bool {
        let mut last = ExampleEnd { tokens: 0, runs: 0 };
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
        let answers = match self.goal_kind {
            GoalKind::Tokens => 0,
            GoalKind::Class | GoalKind::Number => self.ends.len(),
            GoalKind::Tags => self.ids.len(),
        };
        let known = |id: i32| u64::try_from(id).is_ok_and(|id| id < rows);
        let inside = |stored: &StoredExtraTarget| {
            let (example, at) = (stored.example as usize, stored.at as usize);
            known(stored.label) && example < self.len() && (1..=self.span(example).0.len()).contains(&at)
        };
        let in_order = self.extra_targets.is_sorted_by_key(|stored| (stored.example, stored.at));
        let extra_targets = self.extra_targets.is_empty() || (self.goal_kind == GoalKind::Tokens && in_order);
        ends && self.answers.len() == answers
            && extra_targets
            && self.extra_targets.iter().all(inside)
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
    fn examples_round_trip_through_storage() {
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
        assert!(examples.are_valid(10) && !examples.are_valid(9));
        // Token types are checked too, because a type is a row of an embedding.
        assert!(![tokens(&[1], &[-1], &[])].into_iter().collect::<Examples>().are_valid(10));
        // The extra targets of merged examples: at another token's position, repeated, and after the last token.
        let extra = |at, label| ExtraTarget { at, label };
        let goal = Goal::Turns(vec![1..3], vec![extra(2, 7), extra(2, 9), extra(4, 8)]);
        let turns = Example { goal, ..all[3].clone() };
        let both = [all[0].clone(), turns.clone(), all[2].clone(), turns.clone()];
        let examples: Examples = both.iter().cloned().collect();
        assert_eq!(examples, both);
        assert_eq!((turns.goal.target_count(), examples.bytes()), (5, 4 * 14 + 12 * (11 + 6) + 16 * 4));
        assert!(examples.are_valid(10) && !examples.are_valid(9));
        for extra_targets in [vec![extra(0, 7)], vec![extra(5, 7)], vec![extra(1, -1)], vec![extra(2, 7), extra(1, 7)]]
        {
            let wrong = Example { goal: Goal::Turns(vec![1..3], extra_targets.clone()), ..turns.clone() };
            assert!(![wrong].into_iter().collect::<Examples>().are_valid(10), "{extra_targets:?}");
        }
        let class = Example { ids: vec![1, 4, 2], types: vec![0; 3], goal: Goal::Class(3) };
        let examples: Examples = std::iter::once(class.clone()).collect();
        assert_eq!(examples, [class]);
    }

    #[test]
    fn truncation_removes_targets() {
        let mut example = Example { ids: (0..6).collect(), types: vec![0; 6], goal: Goal::Tokens(vec![1..3, 4..6]) };
        example.truncate(5);
        assert_eq!((example.ids.len(), example.types.len(), &example.goal), (5, 5, &Goal::Tokens(vec![1..3, 4..5])));
        example.truncate(1);
        assert_eq!(example.goal.target_count(), 0);
        let extra_targets = [ExtraTarget { at: 2, label: 7 }, ExtraTarget { at: 4, label: 8 }];
        example =
            Example { ids: (0..6).collect(), types: vec![0; 6], goal: Goal::Turns(vec![1..3], extra_targets.to_vec()) };
        example.truncate(4);
        assert_eq!(example.goal, Goal::Turns(vec![1..3], extra_targets[..1].to_vec()));
        example.truncate(2);
        assert_eq!(example.goal, Goal::Tokens(vec![1..2]));
        assert_eq!(Goal::after(2, 3), Goal::Tokens(vec![]));
    }
}
