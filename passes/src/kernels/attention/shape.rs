//! What the fused attention kernels of both machines have in common: what they compute, their parameters, and the
//! layout of their operands.

use peft_runtime::artifact::Element;

use crate::abi::arguments;
use crate::builder::{Buf, Index, Kernel, Val};
use crate::kernels::span::bounds;
use crate::kernels::{FloatBits, philox};

pub use crate::target::ACCUMULATOR_ROWS;

/// What a kernel computes, for queries q, keys k, values v, weights w = softmax(scale · q kᵀ) and f = dropout(w) v.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttentionResult {
    /// The values f.
    Forward,
    /// The values f, and the log-sum-exp of each row of scores.
    ForwardAndLse,
    /// The log-sum-exp of each row of scores.
    Lse,
    /// The adjoint of operand 0 (queries), 1 (keys) or 2 (values).
    Adjoint(usize),
    /// The adjoints of keys and values.
    KeyAndValueAdjoints,
    /// The adjoints of queries, keys and values. On a GPU, those of queries are computed by blocks of their own.
    AllAdjoints,
}

impl AttentionResult {
    /// Whether this is a part of the forward pass.
    pub fn forward(self) -> bool {
        matches!(self, AttentionResult::Forward | AttentionResult::ForwardAndLse | AttentionResult::Lse)
    }

    /// Whether a GPU's block owns rows of keys; otherwise it owns rows of queries.
    pub fn blocks_own_keys(self) -> bool {
        matches!(self, AttentionResult::Adjoint(1 | 2) | AttentionResult::KeyAndValueAdjoints)
    }

    /// Whether the adjoint of the operand is among the results.
    pub fn has_adjoint(self, operand: usize) -> bool {
        match self {
            AttentionResult::Forward | AttentionResult::ForwardAndLse | AttentionResult::Lse => false,
            AttentionResult::Adjoint(of) => of == operand,
            AttentionResult::KeyAndValueAdjoints => operand > 0,
            AttentionResult::AllAdjoints => true,
        }
    }

    /// Whether the adjoint of the scores has to be computed.
    pub fn needs_score_adjoint(self) -> bool {
        self.has_adjoint(0) || self.has_adjoint(1)
    }

    /// The number of results.
    pub fn results(self) -> usize {
        match self {
            AttentionResult::Forward | AttentionResult::Lse | AttentionResult::Adjoint(_) => 1,
            AttentionResult::ForwardAndLse | AttentionResult::KeyAndValueAdjoints => 2,
            AttentionResult::AllAdjoints => 3,
        }
    }
}

/// All that the code depends on, except what it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionParams {
    /// Whether query i sees only the keys up to i.
    pub causal: bool,
    /// The factor of the scores.
    pub scale: FloatBits,
    /// The probability of dropout.
    pub p: FloatBits,
    /// Whether a GPU reads rows by 16-byte loads. It requires rows that begin and end at multiples of four floats.
    pub vec4: bool,
}

impl AttentionParams {
    /// The suffix of a kernel's name.
    pub fn suffix(self) -> String {
        let causal = if self.causal { "_causal" } else { "" };
        let vec4 = if self.vec4 { "_vec4" } else { "" };
        format!("{causal}{vec4}{}", self.p.zero_suffix())
    }

    /// Whether there is dropout.
    pub fn has_dropout(self) -> bool {
        self.p.get() > 0.0
    }
}

impl AttentionResult {
    /// The readable part of a kernel's name.
    pub fn name_stem(self) -> String {
        match self {
            AttentionResult::Forward => "attention".into(),
            AttentionResult::ForwardAndLse => "attention_and_lse".into(),
            AttentionResult::Lse => "attention_lse".into(),
            AttentionResult::Adjoint(of) => format!("attention_vjp{of}"),
            AttentionResult::KeyAndValueAdjoints => "attention_vjp12".into(),
            AttentionResult::AllAdjoints => "attention_vjp012".into(),
        }
    }

    /// The number of operands, without the random generator's key: q and k; q, k and v; or, for adjoints, q, k, v, the
    /// log-sum-exp of the scores, df, and the row term r that the adjoint of the scores adds: −Σ df ⊙ f for each query,
    /// plus the adjoint of other uses of the weights (`Op::AttentionVjp`).
    pub fn operands(self) -> usize {
        match self {
            AttentionResult::Lse => 2,
            AttentionResult::Forward | AttentionResult::ForwardAndLse => 3,
            AttentionResult::Adjoint(_) | AttentionResult::KeyAndValueAdjoints | AttentionResult::AllAdjoints => 6,
        }
    }

    /// The elements of the operands, of the random generator's key if there is dropout, and of the results.
    pub fn elements(self, params: AttentionParams) -> Vec<Element> {
        let key = if params.has_dropout() { 1 } else { 0 };
        [vec![Element::F32; self.operands()], vec![Element::I32; key], vec![Element::F32; self.results()]].concat()
    }

    /// The number of sizes: those of a head, and those of each operand's and each result's layout.
    pub fn sizes(self) -> usize {
        HeadSizes::<Val>::COUNT + (self.operands() + self.results()) * HeadLayout::<Val>::COUNT
    }
}

arguments! {
    /// Sizes of the heads.
    HeadSizes {
        /// The width of queries and keys, and that of values.
        width, value_width,
        /// The number by which units are counted: of heads on a CPU, of sequences on a GPU.
        count,
        /// The stream of the random generator, and the column of key 0 in it.
        stream, column,
    }
}

arguments! {
    /// The layout of an operand or of a result: the index of its first element, the stride from head to head, and the
    /// stride from row to row. The layouts of all operands but the random generator's key come after [`HeadSizes`],
    /// then those of the results.
    HeadLayout { offset, head_stride, row_stride }
}

/// One head of one sequence.
pub struct Segment {
    /// The index of the head.
    pub head: Val,
    /// The first token of the sequence.
    pub start: Val,
    /// The number of tokens of the sequence.
    pub length: Val,
}

impl Segment {
    /// Reads the sequence's limits from the offsets of all sequences.
    pub fn of(k: &mut Kernel, (head, sequence): (Val, Val), offsets: Buf) -> Segment {
        let (start, _, length) = bounds(k, offsets, sequence);
        Segment { head, start, length }
    }

    /// `count` rows from `i` on; those beyond the last row repeat it.
    pub fn rows(&self, k: &mut Kernel, i: Val, count: u64) -> Vec<Val> {
        let last = k.eval(self.length - 1);
        let row = |r| k.min(i + r, last);
        (0..count).map(row).collect()
    }
}

/// Zeros for the sums of one tile.
pub fn zeros(k: &mut Kernel) -> Vec<Val> {
    let zero = k.floats(0.0);
    vec![zero; (ACCUMULATOR_ROWS * k.machine.accumulator_vectors()) as usize]
}

/// The columns and the masks of a tile's vectors from column `j` on, in a row of `length` columns.
pub fn vectors(k: &mut Kernel, j: Val, length: Val) -> Vec<(Val, Val)> {
    let across = k.machine.accumulator_vectors();
    let vector = |v: u64| {
        let at = k.eval(j + v * k.lane_count());
        (at, k.mask(length - at))
    };
    (0..across).map(vector).collect()
}

/// The rows of one operand or result that belong to one head of one sequence.
pub struct RowPointer {
    /// The buffer of the operand or result.
    pub buffer: Buf,
    /// The index of row 0.
    pub base: Val,
    /// The stride from row to row.
    pub row_stride: Val,
}

impl RowPointer {
    /// The index of the first element of row `i`.
    pub fn row(&self, i: impl Into<Index>) -> Index {
        self.base + i.into() * self.row_stride
    }
}

/// One head of one sequence with its operands and results.
pub struct Head {
    /// The operands, in the order of [`AttentionResult::operands`].
    pub operands: Vec<RowPointer>,
    /// The results.
    pub results: Vec<RowPointer>,
    /// The random generator's key, if there is dropout.
    pub rng: Option<Buf>,
    /// The head and the sequence.
    pub segment: Segment,
    /// The width of queries and keys.
    pub width: Val,
    /// The width of values.
    pub value_width: Val,
    /// The random generator's stream.
    pub stream: Val,
    /// The random generator's column of slot 0.
    pub column: Val,
    /// The slot of key 0: slot `phase + j` holds key j, so that blocks of four slots are calls of the generator.
    pub phase: Val,
    /// The kernel's parameters.
    pub params: AttentionParams,
}

impl Head {
    /// Takes the kernel's first buffers, and from its sizes the layout of each of them.
    pub fn of(
        k: &mut Kernel,
        segment: Segment,
        (buffers, sizes): (&[Buf], &[Val]),
        (computes, params): (AttentionResult, AttentionParams),
    ) -> Head {
        let (HeadSizes { width, value_width, stream, column, .. }, layouts) = HeadSizes::split(sizes);
        let count = buffers.len() - computes.results();
        let (operands, results) = buffers.split_at(count);
        let (operands, rng) = operands.split_at(count - usize::from(params.has_dropout()));
        let mut all: Vec<RowPointer> = vec![];
        for (&buffer, lie) in operands.iter().chain(results).zip(layouts.chunks_exact(HeadLayout::<Val>::COUNT)) {
            let HeadLayout { offset, head_stride, row_stride } = HeadLayout::of(lie);
            let (head, start) = (k.eval(segment.head * head_stride), k.eval(segment.start * row_stride));
            all.push(RowPointer { buffer, base: k.eval(offset + head + start), row_stride });
        }
        let results = all.split_off(operands.len());
        let phase = k.eval(column % philox::COLUMNS_PER_CALL);
        let column = k.eval(column - phase);
        let rng = rng.first().copied();
        Head { operands: all, results, rng, segment, width, value_width, stream, column, phase, params }
    }
}
