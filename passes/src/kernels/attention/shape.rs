//! What attention's kernels have in common on either machine: parts, heads, and how their rows lie.

use peft_runtime::artifact::Element;

use crate::abi::arguments;
use crate::builder::{Buf, Index, Kernel, Val};
use crate::kernels::span::bounds;
use crate::kernels::{Number, philox};

pub use crate::target::ROWS;

/// What a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    Forward,
    /// With the log-sum-exp of the scores.
    Both,
    Lse,
    /// The adjoint of operand 0, 1 or 2.
    Adjoint(usize),
    /// Those of keys and values.
    Sides,
    /// And those of queries, on a GPU by blocks of their own.
    All,
}

impl Part {
    pub fn forward(self) -> bool {
        matches!(self, Part::Forward | Part::Both | Part::Lse)
    }

    /// A block of it has keys for its own.
    pub fn keys(self) -> bool {
        matches!(self, Part::Adjoint(1 | 2) | Part::Sides)
    }

    /// It has the adjoint of an operand among its results.
    pub fn gives(self, operand: usize) -> bool {
        match self {
            Part::Forward | Part::Both | Part::Lse => false,
            Part::Adjoint(of) => of == operand,
            Part::Sides => operand > 0,
            Part::All => true,
        }
    }

    /// The scores' adjoint is needed for it.
    pub fn of_scores(self) -> bool {
        self.gives(0) || self.gives(1)
    }

    pub fn results(self) -> usize {
        match self {
            Part::Forward | Part::Lse | Part::Adjoint(_) => 1,
            Part::Both | Part::Sides => 2,
            Part::All => 3,
        }
    }
}

/// What is the same for all of a kernel's units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Form {
    pub causal: bool,
    pub scale: Number,
    /// Of dropout.
    pub p: Number,
    /// Rows are read in fours: they begin at multiples of four, and so do they end.
    pub fours: bool,
}

impl Form {
    /// For names.
    pub fn suffix(self) -> String {
        let causal = if self.causal { "_causal" } else { "" };
        let fours = if self.fours { "_fours" } else { "" };
        format!("{causal}{fours}{}", self.p.or_zero())
    }

    /// Something is dropped.
    pub fn drops(self) -> bool {
        self.p.get() > 0.0
    }
}

impl Part {
    pub fn word(self) -> String {
        match self {
            Part::Forward => "attention".into(),
            Part::Both => "attention_and_lse".into(),
            Part::Lse => "attention_lse".into(),
            Part::Adjoint(of) => format!("attention_vjp{of}"),
            Part::Sides => "attention_vjp12".into(),
            Part::All => "attention_vjp012".into(),
        }
    }

    /// Operands, but for the generator's key.
    pub fn operands(self) -> usize {
        match self {
            Part::Lse => 2,
            Part::Forward | Part::Both => 3,
            Part::Adjoint(_) | Part::Sides | Part::All => 6,
        }
    }

    /// Elements of the operands, of the generator's key if anything is dropped, and of the results.
    pub fn elements(self, form: Form) -> Vec<Element> {
        let key = if form.drops() { 1 } else { 0 };
        [vec![Element::F32; self.operands()], vec![Element::I32; key], vec![Element::F32; self.results()]].concat()
    }

    /// How many sizes there are that say how a head is and where its operands and results lie.
    pub fn sizes(self) -> usize {
        HeadSizes::<Val>::COUNT + (self.operands() + self.results()) * Lie::<Val>::COUNT
    }
}

arguments! {
    HeadSizes {
        /// Of queries and keys, and of values.
        width, wide,
        /// What units are counted by: a processor's heads, a GPU's sequences.
        count,
        /// The generator's stream, and the column that is key 0's.
        stream, column,
    }
}

arguments! {
    /// How the rows of an operand or of a result lie: the first element, from head to head, and from row to row. There is
    /// one after [`HeadSizes`] for each operand but the generator's key, and then one for each result.
    Lie { first, head, line }
}

/// One head of one sequence.
pub struct Segment {
    pub head: Val,
    /// First token of the sequence, and how many it has.
    pub start: Val,
    pub length: Val,
}

impl Segment {
    pub fn of(k: &mut Kernel, (head, sequence): (Val, Val), offsets: Buf) -> Segment {
        let (start, _, length) = bounds(k, offsets, sequence);
        Segment { head, start, length }
    }

    /// `count` rows from `i` on; beyond the last row it is the last one again.
    pub fn rows(&self, k: &mut Kernel, i: Val, count: u64) -> Vec<Val> {
        let last = k.eval(self.length - 1);
        let row = |r| k.min(i + r, last);
        (0..count).map(row).collect()
    }
}

pub fn zeros(k: &mut Kernel) -> Vec<Val> {
    let zero = k.floats(0.0);
    vec![zero; (ROWS * k.machine.vectors_across()) as usize]
}

/// Offsets and masks of the vectors at `j` of a row of `length`.
pub fn vectors(k: &mut Kernel, j: Val, length: Val) -> Vec<(Val, Val)> {
    let across = k.machine.vectors_across();
    let vector = |v: u64| {
        let at = k.eval(j + v * k.lane_count());
        (at, k.mask(length - at))
    };
    (0..across).map(vector).collect()
}

/// A unit's rows of an operand or of the result.
pub struct Rows {
    pub buffer: Buf,
    pub base: Val,
    pub line: Val,
}

impl Rows {
    /// Where row `i` begins.
    pub fn row(&self, i: impl Into<Index>) -> Index {
        self.base + i.into() * self.line
    }
}

/// One head of one sequence, on either machine: what a unit reads and writes of it, and how its places are counted.
pub struct Head {
    pub operands: Vec<Rows>,
    pub results: Vec<Rows>,
    pub rng: Option<Buf>,
    pub segment: Segment,
    /// Of queries and keys, and of values.
    pub width: Val,
    pub wide: Val,
    pub stream: Val,
    /// The generator's column of slot 0.
    pub column: Val,
    /// The slot of key 0.
    pub phase: Val,
    pub form: Form,
}

impl Head {
    /// Of the kernel's buffers the first ones; of its sizes too, three of which say how each of them lies.
    pub fn of(
        k: &mut Kernel,
        segment: Segment,
        (buffers, sizes): (&[Buf], &[Val]),
        (part, form): (Part, Form),
    ) -> Head {
        let (HeadSizes { width, wide, stream, column, .. }, lies) = HeadSizes::split(sizes);
        let count = buffers.len() - part.results();
        let (operands, results) = buffers.split_at(count);
        let (operands, rng) = operands.split_at(count - usize::from(form.drops()));
        let mut all: Vec<Rows> = vec![];
        for (&buffer, lie) in operands.iter().chain(results).zip(lies.chunks_exact(Lie::<Val>::COUNT)) {
            let Lie { first, head, line } = Lie::of(lie);
            let (head, start) = (k.eval(segment.head * head), k.eval(segment.start * line));
            all.push(Rows { buffer, base: k.eval(first + head + start), line });
        }
        let results = all.split_off(operands.len());
        let phase = k.eval(column % philox::EACH);
        let column = k.eval(column - phase);
        let rng = rng.first().copied();
        Head { operands: all, results, rng, segment, width, wide, stream, column, phase, form }
    }
}
