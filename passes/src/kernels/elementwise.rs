//! Elements: an expression over leaves, evaluated a vector at a time. It is a kernel of its own, or one stage of several
//! that go over the rows of a larger kernel's result.

use peft_grammar::graph::Op;
use peft_runtime::artifact::Element;

use super::span::bounds;
use super::{Number, math, philox};
use crate::builder::mma::Half;
use crate::builder::{Access, Buf, Code, Kernel, Order, Val, define};
use crate::kernels::Scheduled;
use crate::target::Machine;

/// How a leaf, or the result, lies under the expression's shape: for each merged axis, whether it runs along it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Leaf {
    pub element: Element,
    pub runs: Vec<bool>,
    /// Where it is no row-major tensor: which of the sizes are its first element and its steps.
    pub view: Option<usize>,
}

/// One step of the expression on operands that come before it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    Leaf(usize),
    Op(Op, Vec<usize>),
    /// Divided by how often a value was repeated: two of the sizes, out and in.
    Mean(usize, usize),
    /// Of columns from `column` on, or of rows of that column alone; the stream is one of the sizes, so that
    /// layers share the kernel. A leaf may number the rows.
    Dropout {
        x: usize,
        p: Number,
        column: u64,
        stream: usize,
        narrow: bool,
        rows: Option<usize>,
    },
}

/// Steps on leaves, the last of which is the result. Its buffers are the leaves' arrays, the generator's key if it draws,
/// the rows' places if they are ragged, and the result; its sizes are those of the merged axes, of ragged rows in place of
/// the last one the extra columns and the size of what leads them, and then what the leaves and steps say.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Expression {
    pub leaves: Vec<Leaf>,
    pub out: Leaf,
    pub steps: Vec<Step>,
    pub ragged: bool,
    pub axes: usize,
    /// How many sizes there are.
    pub sizes: usize,
    pub draws: bool,
    /// Rows of one column each, which draw along the rows instead: lanes run along them.
    pub narrow: bool,
}

impl Expression {
    /// Of the buffers.
    pub fn elements(&self) -> Vec<Element> {
        let leaves = self.leaves.iter().map(|leaf| leaf.element);
        let others = [(self.draws, Element::I32), (self.ragged, Element::I32), (true, self.out.element)];
        leaves.chain(others.into_iter().filter(|(there, _)| *there).map(|(_, element)| element)).collect()
    }

    /// A call of the generator decides over several columns.
    fn draws_along(&self) -> bool {
        !self.narrow && self.steps.iter().any(|step| matches!(step, Step::Dropout { narrow: false, .. }))
    }

    /// All leaves lie alike, or are single numbers.
    pub fn flat(&self) -> bool {
        !self.ragged && self.axes <= 1 && !self.draws
    }

    /// The operations in order, for profiles.
    pub fn label(&self) -> String {
        let names = self.steps.iter().filter_map(|step| match step {
            Step::Op(op, _) => Some(op.name()),
            Step::Dropout { .. } => Some("dropout"),
            Step::Leaf(_) | Step::Mean(..) => None,
        });
        let names: Vec<&str> = names.collect();
        // Repeating alone is no step: the leaf lies as it should.
        if names.is_empty() { "broadcast".into() } else { names.join("+") }
    }

    fn write(&self, k: &mut Kernel, buffers: &[Buf], sizes: &[Val]) {
        if self.flat() {
            let (out, arrays) = buffers.split_last().expect("a result");
            return self.write_flat(k, arrays, *out, sizes);
        }
        k.units(|k, row| {
            // The index on every axis but the last.
            let lead_axes = self.axes - 1;
            let mut indices = vec![row; lead_axes];
            let mut rest = row;
            for axis in (1..lead_axes).rev() {
                indices[axis] = k.rem(rest, sizes[axis]);
                rest = k.div(rest, sizes[axis]);
            }
            if lead_axes > 0 {
                indices[0] = rest;
            }
            let length = match self.ragged.then(|| buffers[buffers.len() - 2]) {
                None => sizes[lead_axes],
                Some(pairs) => {
                    let (.., keys) = bounds(k, pairs, indices[lead_axes - 1]);
                    k.eval(keys + sizes[lead_axes])
                }
            };
            let zero = k.index(0);
            let stage = Stage { form: self, buffers: buffers.to_vec(), sizes, made: &[], stays: true, half: None };
            write_row(k, &[stage], &indices, length, (zero, length), None, None);
        });
    }

    /// The form on the row at `indices`, which is `length` long.
    fn row<'f>(&'f self, k: &mut Kernel, stage: &Stage<'f>, indices: &[Val], length: Val) -> Row<'f> {
        let Stage { buffers, sizes, made, .. } = stage;
        let count = self.leaves.len();
        let key = self.draws.then(|| philox::key(k, buffers[count]));
        let pairs = self.ragged.then(|| buffers[count + usize::from(self.draws)]);
        let out = *buffers.last().expect("a result");
        let base = self.base(k, &self.out, indices, sizes, length, pairs);
        let leaves = self.leaves.iter().zip(buffers).enumerate();
        let sources = leaves.map(|(i, (leaf, &array))| {
            if let Some(&Some(stage)) = made.get(i) {
                return Source::Made(stage);
            }
            let base = self.base(k, leaf, indices, sizes, length, pairs);
            self.source(k, leaf, array, base)
        });
        let sources = sources.collect();
        // The last index counts rows, unless lanes do; all before it, flattened, lead them.
        let zero = k.index(0);
        let (row, leads) = match indices {
            [leads @ .., row] if !self.narrow => (*row, leads),
            leads => (zero, leads),
        };
        let lead = leads.iter().zip(*sizes).fold(zero, |sum, (&index, &size)| k.eval(sum * size + index));
        Row { form: self, sizes, sources, out, base, key, row, lead }
    }

    /// Blocks of elements.
    fn write_flat(&self, k: &mut Kernel, arrays: &[Buf], out: Buf, sizes: &[Val]) {
        let total = if self.axes == 0 { k.index(1) } else { sizes[0] };
        let base = |k: &mut Kernel, leaf: &Leaf| leaf.view.map_or_else(|| k.index(0), |at| sizes[at]);
        let first = base(k, &self.out);
        let sources = self.leaves.iter().zip(arrays).map(|(leaf, &array)| {
            let base = base(k, leaf);
            self.source(k, leaf, array, base)
        });
        let sources: Vec<Source> = sources.collect();
        k.units(|k, unit| {
            k.each_of_stretch(unit, total, |k, at, mask| {
                let loaded = self.load(k, &sources, at, mask);
                let value = self.evaluate(k, (&sources, &loaded, &[]), at, &[], sizes);
                k.store_lanes(value, out, first + at, mask);
            });
        });
    }

    /// Where the row at `indices` begins in a leaf.
    fn base(
        &self,
        k: &mut Kernel,
        leaf: &Leaf,
        indices: &[Val],
        sizes: &[Val],
        length: Val,
        pairs: Option<Buf>,
    ) -> Val {
        if let Some(at) = leaf.view {
            return indices
                .iter()
                .enumerate()
                .filter(|(axis, _)| leaf.runs[*axis])
                .fold(sizes[at], |base, (axis, &i)| k.eval(base + i * sizes[at + 1 + axis]));
        }
        let mut rows = k.index(0);
        let along_last = *leaf.runs.last().unwrap_or(&false);
        let token_axis = pairs.is_some().then(|| indices.len() - 1);
        for (axis, &index) in indices.iter().enumerate() {
            if leaf.runs[axis] && !(along_last && Some(axis) == token_axis) {
                rows = k.eval(rows * sizes[axis] + index);
            }
        }
        match (along_last, pairs) {
            (false, _) => rows,
            (true, None) => k.mul(rows, length),
            (true, Some(pairs)) => {
                let i = indices[indices.len() - 1];
                let (extra, lead) = (sizes[indices.len()], sizes[indices.len() + 1]);
                let before = k.load_index(pairs, i);
                k.eval(rows * lead + before + extra * i)
            }
        }
    }

    fn source(&self, k: &mut Kernel, leaf: &Leaf, array: Buf, base: Val) -> Source {
        if *leaf.runs.last().unwrap_or(&false) {
            Source::Along(array, base)
        } else {
            let x = k.load(array, base);
            Source::Repeated(k.splat(x))
        }
    }

    /// The lanes of the leaves from `at` on, but of what earlier stages make.
    fn load(&self, k: &mut Kernel, sources: &[Source], at: Val, mask: Val) -> Vec<Option<Val>> {
        let load = |source: &Source| match *source {
            Source::Repeated(x) => Some(x),
            Source::Made(_) => None,
            Source::Along(array, base) => Some(k.load_lanes(array, base + at, mask)),
        };
        sources.iter().map(load).collect()
    }

    /// The lanes from `at` on, of leaves that have been loaded; `made` are the values of earlier stages there.
    fn evaluate(
        &self,
        k: &mut Kernel,
        (sources, loaded, made): (&[Source], &[Option<Val>], &[Val]),
        at: Val,
        words: &[Val],
        sizes: &[Val],
    ) -> Val {
        let mut values: Vec<Val> = vec![];
        let mut draws = 0;
        for step in &self.steps {
            let value = match step {
                Step::Leaf(leaf) => match sources[*leaf] {
                    Source::Made(stage) => made[stage],
                    _ => loaded[*leaf].expect("it is loaded"),
                },
                Step::Mean(x, size) => {
                    let (wide, narrow) = (k.to_float(sizes[*size]), k.to_float(sizes[*size + 1]));
                    let share = k.div(narrow, wide);
                    let share = k.splat(share);
                    k.mul(values[*x], share)
                }
                // A vector of its own axis alone: the place in the row is the number.
                Step::Op(Op::Iota { .. }, _) => {
                    let (first, lanes) = (k.to_i32(at), k.lane_numbers());
                    let first = k.splat(first);
                    let number = k.add(first, lanes);
                    k.to_float(number)
                }
                Step::Dropout { x, p, .. } => {
                    let word = words[draws];
                    draws += 1;
                    philox::dropped(k, values[*x], word, p.get())
                }
                Step::Op(op, operands) => {
                    let operands: Vec<Val> = operands.iter().map(|&i| values[i]).collect();
                    apply(k, op, &operands)
                }
            };
            values.push(value);
        }
        *values.last().expect("at least one step")
    }
}

impl Scheduled for Expression {
    /// The first operations, for names.
    fn word(&self) -> String {
        let label = self.label();
        label.split('+').take(4).fold("map".into(), |word, op| format!("{word}_{op}"))
    }

    fn emit(&self, machine: Machine) -> Code {
        define(machine, &self.elements(), self.sizes, |k, buffers, sizes| self.write(k, buffers, sizes))
    }
}

/// A form with a kernel's buffers and sizes.
pub struct Stage<'f> {
    pub form: &'f Expression,
    pub buffers: Vec<Buf>,
    pub sizes: &'f [Val],
    /// By leaf, which of the stages before makes it, if one does; [`Given`] counts as the first.
    pub made: &'f [Option<usize>],
    /// What it makes is written.
    pub stays: bool,
    /// And in half precision, two numbers a word.
    pub half: Option<(Half, Buf)>,
}

/// Lanes of a row from a column on, of which a mask says what exists.
pub type Lanes<'a> = dyn Fn(&mut Kernel, Val, Val) -> Val + 'a;

/// What stages find in registers.
pub struct Given<'a> {
    pub lanes: &'a Lanes<'a>,
    /// Where it is written, if it is: the row's first element there.
    pub to: Option<(Buf, Val)>,
    /// How many columns there are at most, where that is a tile's.
    pub columns: Option<u64>,
}

/// A stage on one row.
struct Row<'f> {
    form: &'f Expression,
    sizes: &'f [Val],
    sources: Vec<Source>,
    out: Buf,
    base: Val,
    key: Option<[Val; 2]>,
    /// What the generator counts.
    row: Val,
    lead: Val,
}

/// The lanes of a group that goes nowhere, on a row.
pub fn lanes_of<'f>(
    k: &mut Kernel,
    stage: &Stage<'f>,
    indices: &[Val],
    length: Val,
) -> impl Fn(&mut Kernel, Val, Val) -> Val + use<'f> {
    let row = stage.form.row(k, stage, indices, length);
    move |k, at, mask| {
        let loaded = row.form.load(k, &row.sources, at, mask);
        row.form.evaluate(k, (&row.sources, &loaded, &[]), at, &[], row.sizes)
    }
}

impl Row<'_> {
    /// The generator's words for the columns from j to `end` that one call draws, for every dropout of the form; of rows
    /// of one column for those from j on.
    fn draw(&self, k: &mut Kernel, (j, end): (Val, Val)) -> Vec<Vec<Val>> {
        let Some(key) = self.key else { return vec![] };
        let streams = self.form.steps.iter().filter_map(|s| match s {
            Step::Dropout { column, stream, narrow, rows, .. } => Some((self.sizes[*stream], *column, *narrow, *rows)),
            _ => None,
        });
        let (row, lead) = (philox::lanes_of(k, self.row), philox::lanes_of(k, self.lead));
        let words = streams.map(|(stream, column, narrow, rows)| {
            let stream = philox::lanes_of(k, stream);
            let row = match rows.map(|leaf| self.sources[leaf]) {
                Some(Source::Repeated(number)) => number,
                Some(Source::Along(numbers, base)) => {
                    let mask = k.mask(end - j);
                    k.load_lanes(numbers, base + j, mask)
                }
                None if self.form.narrow => {
                    let (first, lanes) = (philox::lanes_of(k, j), k.lane_numbers());
                    k.add(first, lanes)
                }
                _ => row,
            };
            if narrow || self.form.narrow {
                return vec![philox::draw_column(k, key, column, [row, lead, stream])];
            }
            let first = k.eval(column + j);
            let draw = if column % 4 == 0 { philox::draw } else { philox::draw_anywhere };
            draw(k, key, first, [row, lead, stream]).to_vec()
        });
        words.collect()
    }
}

/// Elements `start` to `end` of the row at `indices`, which is `length` long: one stage after the other, what one hands
/// to the next in registers. Gives what lanes have of the sum of what `summed` numbers, [`Given`] being the first.
pub fn write_row(
    k: &mut Kernel,
    stages: &[Stage],
    indices: &[Val],
    length: Val,
    columns: (Val, Val),
    given: Option<Given>,
    summed: Option<usize>,
) -> Option<Val> {
    write_rows(k, stages, &[(indices, given)], length, columns, summed).first().copied()
}

/// The same for several rows of which stages find as many columns in registers. A GPU has all that it reads for them on
/// its way before it waits for the first.
pub fn write_rows(
    k: &mut Kernel,
    stages: &[Stage],
    rows: &[(&[Val], Option<Given>)],
    length: Val,
    (start, end): (Val, Val),
    summed: Option<usize>,
) -> Vec<Val> {
    let of_row = |k: &mut Kernel, indices: &[Val]| -> Vec<Row> {
        stages.iter().map(|stage| stage.form.row(k, stage, indices, length)).collect()
    };
    let own: Vec<Vec<Row>> = rows.iter().map(|(indices, _)| of_row(k, indices)).collect();
    let lanes = k.lane_count();
    let step = if stages.iter().any(|s| s.form.draws_along()) { philox::drawn(k) } else { lanes };
    let most = rows.iter().find_map(|(_, given)| given.as_ref()?.columns);
    let nothing: Vec<Val> = rows.iter().filter(|_| summed.is_some()).map(|_| k.floats(0.0)).collect();
    let pieces: Vec<(usize, u64)> =
        (0..rows.len()).flat_map(|row| (0..most.unwrap_or(step) / lanes).map(move |part| (row, part))).collect();
    let at_once = if k.reads_ahead() { pieces.len() } else { 1 };
    let columns = |k: &mut Kernel, j: Val, sums: &[Val]| {
        let mut sums = sums.to_vec();
        let draw = |k: &mut Kernel, own: &Vec<Row>| -> Vec<_> { own.iter().map(|row| row.draw(k, (j, end))).collect() };
        let words: Vec<Vec<Vec<Vec<Val>>>> = own.iter().map(|own| draw(k, own)).collect();
        for pieces in pieces.chunks(at_once) {
            let read: Vec<Piece> = pieces
                .iter()
                .map(|&(row, part)| {
                    let at = k.eval(j + part * lanes);
                    Piece::read(k, &own[row], rows[row].1.as_ref(), at, end)
                })
                .collect();
            for (&(row, part), piece) in pieces.iter().zip(&read) {
                // A row of one column has one word.
                let word = |words: &Vec<Val>| *words.get(part as usize).unwrap_or(&words[0]);
                let words = words[row].iter().map(|words| words.iter().map(word).collect());
                let made = piece.write(k, stages, &own[row], rows[row].1.as_ref(), words);
                if let Some(of) = summed {
                    // Beyond the row anything may have been computed.
                    let x = k.select(piece.mask, made[of], nothing[row]);
                    sums[row] = k.add(sums[row], x);
                }
            }
        }
        sums
    };
    match most {
        Some(most) => {
            assert!(most <= philox::drawn(k), "one call of the generator decides over them");
            columns(k, start, &nothing)
        }
        None => k.fold(start, end, step, &nothing, columns),
    }
}

/// A vector of a row's columns, and what stages read for them.
struct Piece {
    at: Val,
    mask: Val,
    given: Option<Val>,
    /// By stage and leaf, but for what earlier stages make.
    leaves: Vec<Vec<Option<Val>>>,
}

impl Piece {
    /// The columns from `at` on, of which the last is before `end`.
    fn read(k: &mut Kernel, row: &[Row], given: Option<&Given>, at: Val, end: Val) -> Piece {
        let mask = k.mask(end - at);
        let given = given.map(|given| (given.lanes)(k, at, mask));
        let leaves = row.iter().map(|row| row.form.load(k, &row.sources, at, mask)).collect();
        Piece { at, mask, given, leaves }
    }

    /// Gives what was given and what the stages make of it; of each there are the generator's words.
    fn write(
        &self,
        k: &mut Kernel,
        stages: &[Stage],
        row: &[Row],
        given: Option<&Given>,
        words: impl Iterator<Item = Vec<Val>>,
    ) -> Vec<Val> {
        let Piece { at, mask, .. } = *self;
        let mut made: Vec<Val> = self.given.into_iter().collect();
        if let (Some(first), Some((to, base))) = (self.given, given.and_then(|given| given.to)) {
            k.store_lanes(first, to, base + at, mask);
        }
        for (((row, stage), words), leaves) in row.iter().zip(stages).zip(words).zip(&self.leaves) {
            let value = row.form.evaluate(k, (&row.sources, leaves, &made), at, &words, row.sizes);
            let place = k.eval(row.base + at);
            if stage.stays {
                k.store_lanes(value, row.out, place, mask);
            }
            if let Some((half, to)) = stage.half {
                k.store_rounded(half, value, to, place, mask);
            }
            made.push(value);
        }
        made
    }
}

/// Fetches what [`write_row`] will read and write.
pub fn prefetch_row(k: &mut Kernel, stages: &[Stage], indices: &[Val], length: Val, (start, end): (Val, Val)) {
    let rows: Vec<Row> = stages.iter().map(|stage| stage.form.row(k, stage, indices, length)).collect();
    k.each(start, end, k.lane_count(), |k, j| {
        for row in &rows {
            let along = row.sources.iter().filter_map(|source| match source {
                Source::Along(array, base) => Some((*array, *base, Access::Read)),
                _ => None,
            });
            for (array, base, access) in along.chain([(row.out, row.base, Access::Write)]) {
                k.prefetch(array, base + j, access);
            }
        }
    });
}

#[derive(Clone, Copy)]
enum Source {
    /// Runs along the last axis from a base.
    Along(Buf, Val),
    /// The same for the whole row.
    Repeated(Val),
    /// What an earlier stage makes.
    Made(usize),
}

/// One operation on vectors.
fn apply(k: &mut Kernel, op: &Op, x: &[Val]) -> Val {
    let number = |k: &mut Kernel, value: f64| k.floats(value);
    match op {
        Op::Constant { value, .. } => number(k, *value),
        Op::Add => k.add(x[0], x[1]),
        Op::Sub => k.sub(x[0], x[1]),
        Op::Mul => k.mul(x[0], x[1]),
        Op::Div => k.div(x[0], x[1]),
        Op::Min => k.min(x[0], x[1]),
        Op::Scale { by } if *by == 1.0 => x[0],
        Op::Scale { by } => {
            let by = number(k, *by);
            k.mul(x[0], by)
        }
        Op::Shift { by } => {
            let by = number(k, *by);
            k.add(x[0], by)
        }
        Op::Float => k.to_float(x[0]),
        Op::Exp => math::exp(k, x[0]),
        Op::Log => math::log(k, x[0]),
        Op::Sqrt => k.sqrt(x[0]),
        Op::Rsqrt => {
            let root = k.sqrt(x[0]);
            let one = number(k, 1.0);
            k.div(one, root)
        }
        Op::Sin => math::sin(k, x[0]),
        Op::Cos => math::cos(k, x[0]),
        Op::Tanh => math::tanh(k, x[0]),
        Op::Sigmoid => math::sigmoid(k, x[0]),
        Op::Relu => {
            let zero = number(k, 0.0);
            k.max(x[0], zero)
        }
        Op::Step => {
            let (zero, one) = (number(k, 0.0), number(k, 1.0));
            let positive = k.compare(x[0], Order::Gt, zero);
            k.select(positive, one, zero)
        }
        Op::Gelu => math::gelu(k, x[0]),
        Op::GeluGrad => math::gelu_grad(k, x[0]),
        Op::GeluTanh => math::gelu_tanh(k, x[0]),
        Op::GeluTanhGrad => math::gelu_tanh_grad(k, x[0]),
        // They are steps of their own.
        Op::Iota { .. } | Op::Broadcast { .. } | Op::Dropout { .. }
        // And these no elements.
        | Op::Detach
        | Op::Reshape { .. }
        | Op::Permute { .. }
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Concat { .. }
        | Op::Reduce { .. }
        | Op::Matmul { .. }
        | Op::Scores { .. }
        | Op::Attend { .. }
        | Op::AttendTransposed { .. }
        | Op::Attention { .. }
        | Op::AttentionLse { .. }
        | Op::AttentionVjp { .. }
        | Op::AttentionAndLse { .. }
        | Op::AttentionVjpSides { .. }
        | Op::AttentionVjpAll { .. }
        | Op::LinearLse
        | Op::LinearMean
        | Op::LinearLseAndMean
        | Op::Softmax
        | Op::LogSumExp
        | Op::SoftmaxVjp
        | Op::Normalize { .. }
        | Op::NormalizeVjp { .. }
        | Op::Gather { .. }
        | Op::Scatter { .. }
        | Op::SegmentMean
        | Op::SegmentMeanVjp
        | Op::CrossEntropy { .. }
        | Op::CrossEntropyVjp { .. } => unreachable!("a group has what works element by element"),
    }
}
