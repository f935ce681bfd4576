//! Elementwise operations: an expression over leaves, evaluated one vector at a time. It is a kernel of its own, or one
//! stage of an epilogue on the rows of a larger kernel's result.

use peft_grammar::graph::Op;
use peft_runtime::artifact::Element;

use super::span::bounds;
use super::{FloatBits, math, philox};
use crate::builder::mma::Half;
use crate::builder::{Access, Buf, Code, Kernel, Order, Val, define};
use crate::kernels::Scheduled;
use crate::target::Machine;

/// The layout of an operand (a leaf), or of the result, under the expression's shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Leaf {
    /// The type of its elements.
    pub element: Element,
    /// For each axis of the expression, after merging, whether the leaf varies along it; otherwise it is broadcast.
    pub runs: Vec<bool>,
    /// For a leaf that is not a row-major tensor: the index of the size that holds its first element's index; its
    /// strides follow.
    pub view: Option<usize>,
}

/// One step of an expression. Operands are indices of earlier steps.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// The value of a leaf.
    Leaf(usize),
    /// An operation on earlier steps.
    Op(Op, Vec<usize>),
    /// An operand, given by its step, divided by the number of its repetitions, as the adjoint of a mean is. The second
    /// index is that of two sizes: the elements after the broadcast, and those before it.
    Mean(usize, usize),
    /// Dropout.
    Dropout {
        /// The operand.
        x: usize,
        /// The probability that an element is dropped.
        p: FloatBits,
        /// The random generator's column of the row's first element.
        column: u64,
        /// The index of the size that is the generator's stream. It is a size so that layers share the kernel.
        stream: usize,
        /// Whether rows have this column only.
        single_column: bool,
        /// The leaf that numbers the rows, if there is one.
        rows: Option<usize>,
    },
}

/// A fused elementwise expression, whose last step is the result.
///
/// Its buffers are the leaves, the random generator's key if it draws, the offsets of ragged rows if there are any, and
/// the result. Its sizes are those of the merged axes, then those that leaves and steps refer to. If rows are ragged,
/// the last axis has no size of its own; in its place are the number of extra columns and the size of a head's rows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Expression {
    /// The operands.
    pub leaves: Vec<Leaf>,
    /// The layout of the result.
    pub out: Leaf,
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// Whether rows are ragged.
    pub ragged: bool,
    /// The number of axes, after merging.
    pub axes: usize,
    /// The number of sizes.
    pub sizes: usize,
    /// Whether it draws random numbers.
    pub draws: bool,
    /// Whether rows have one column each. Lanes then run along the rows, and so do the random numbers.
    pub single_column: bool,
}

impl Expression {
    /// The elements of the buffers.
    pub fn elements(&self) -> Vec<Element> {
        let leaves = self.leaves.iter().map(|leaf| leaf.element);
        let others = [(self.draws, Element::I32), (self.ragged, Element::I32), (true, self.out.element)];
        leaves.chain(others.into_iter().filter(|(there, _)| *there).map(|(_, element)| element)).collect()
    }

    /// Whether one call of the random generator decides over several columns.
    fn draws_along(&self) -> bool {
        !self.single_column && self.steps.iter().any(|step| matches!(step, Step::Dropout { single_column: false, .. }))
    }

    /// Whether the expression has one axis at most, so that all leaves are contiguous or scalars.
    pub fn flat(&self) -> bool {
        !self.ragged && self.axes <= 1 && !self.draws
    }

    /// The names of the operations in order, for profiles.
    pub fn label(&self) -> String {
        let names = self.steps.iter().filter_map(|step| match step {
            Step::Op(op, _) => Some(op.name()),
            Step::Dropout { .. } => Some("dropout"),
            Step::Leaf(_) | Step::Mean(..) => None,
        });
        let names: Vec<&str> = names.collect();
        // A broadcast alone has no step: the layout of its leaf expresses it.
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
            let stage =
                Stage { expression: self, buffers: buffers.to_vec(), sizes, producers: &[], stored: true, half: None };
            write_row(k, &[stage], &indices, length, (zero, length), None, None);
        });
    }

    /// The expression's inputs on the row at `indices`, which is `length` long.
    fn row<'f>(&'f self, k: &mut Kernel, stage: &Stage<'f>, indices: &[Val], length: Val) -> Row<'f> {
        let Stage { buffers, sizes, producers, .. } = stage;
        let count = self.leaves.len();
        let key = self.draws.then(|| philox::key(k, buffers[count]));
        let pairs = self.ragged.then(|| buffers[count + usize::from(self.draws)]);
        let out = *buffers.last().expect("a result");
        let base = self.base(k, &self.out, indices, sizes, length, pairs);
        let leaves = self.leaves.iter().zip(buffers).enumerate();
        let sources = leaves.map(|(i, (leaf, &array))| {
            if let Some(&Some(stage)) = producers.get(i) {
                return StageInput::EarlierStage(stage);
            }
            let base = self.base(k, leaf, indices, sizes, length, pairs);
            self.source(k, leaf, array, base)
        });
        let sources = sources.collect();
        // The last index counts the rows, unless lanes do; the indices before it are flattened into `lead`.
        let zero = k.index(0);
        let (row, leads) = match indices {
            [leads @ .., row] if !self.single_column => (*row, leads),
            leads => (zero, leads),
        };
        let lead = leads.iter().zip(*sizes).fold(zero, |sum, (&index, &size)| k.eval(sum * size + index));
        Row { expression: self, sizes, sources, out, base, key, row, lead }
    }

    /// Evaluates an expression of one axis, one stretch of elements for each unit.
    fn write_flat(&self, k: &mut Kernel, arrays: &[Buf], out: Buf, sizes: &[Val]) {
        let total = if self.axes == 0 { k.index(1) } else { sizes[0] };
        let base = |k: &mut Kernel, leaf: &Leaf| leaf.view.map_or_else(|| k.index(0), |at| sizes[at]);
        let first = base(k, &self.out);
        let sources = self.leaves.iter().zip(arrays).map(|(leaf, &array)| {
            let base = base(k, leaf);
            self.source(k, leaf, array, base)
        });
        let sources: Vec<StageInput> = sources.collect();
        k.units(|k, unit| {
            k.each_of_stretch(unit, total, |k, at, mask| {
                let loaded = self.load(k, &sources, at, mask);
                let value = self.evaluate(k, (&sources, &loaded, &[]), at, &[], sizes);
                k.store_lanes(value, out, first + at, mask);
            });
        });
    }

    /// The index of the first element of the row at `indices` of a leaf.
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

    fn source(&self, k: &mut Kernel, leaf: &Leaf, array: Buf, base: Val) -> StageInput {
        if *leaf.runs.last().unwrap_or(&false) {
            StageInput::Vector(array, base)
        } else {
            let x = k.load(array, base);
            StageInput::Scalar(k.splat(x))
        }
    }

    /// Loads the leaves' lanes from `at` on, except those that earlier stages produce.
    fn load(&self, k: &mut Kernel, sources: &[StageInput], at: Val, mask: Val) -> Vec<Option<Val>> {
        let load = |source: &StageInput| match *source {
            StageInput::Scalar(x) => Some(x),
            StageInput::EarlierStage(_) => None,
            StageInput::Vector(array, base) => Some(k.load_lanes(array, base + at, mask)),
        };
        sources.iter().map(load).collect()
    }

    /// Evaluates the lanes from `at` on. `loaded` are the leaves' lanes, and `made` the values of earlier stages.
    fn evaluate(
        &self,
        k: &mut Kernel,
        (sources, loaded, made): (&[StageInput], &[Option<Val>], &[Val]),
        at: Val,
        words: &[Val],
        sizes: &[Val],
    ) -> Val {
        let mut values: Vec<Val> = vec![];
        let mut draws = 0;
        for step in &self.steps {
            let value = match step {
                Step::Leaf(leaf) => match sources[*leaf] {
                    StageInput::EarlierStage(stage) => made[stage],
                    _ => loaded[*leaf].expect("it is loaded"),
                },
                Step::Mean(x, size) => {
                    let (after, before) = (k.to_float(sizes[*size]), k.to_float(sizes[*size + 1]));
                    let share = k.div(before, after);
                    let share = k.splat(share);
                    k.mul(values[*x], share)
                }
                // The element of an iota along the row is its index in the row.
                Step::Op(Op::Iota { .. }, _) => {
                    let (first, lanes) = (k.to_i32(at), k.lane_numbers());
                    let first = k.splat(first);
                    let number = k.add(first, lanes);
                    k.to_float(number)
                }
                Step::Dropout { x, p, .. } => {
                    let word = words[draws];
                    draws += 1;
                    philox::dropout(k, values[*x], word, p.get())
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
    /// The first operations, joined.
    fn name_stem(&self) -> String {
        let label = self.label();
        label.split('+').take(4).fold("elementwise".into(), |word, op| format!("{word}_{op}"))
    }

    fn emit(&self, machine: Machine) -> Code {
        define(machine, &self.elements(), self.sizes, |k, buffers, sizes| self.write(k, buffers, sizes))
    }
}

/// An expression with the buffers and sizes of a kernel.
pub struct Stage<'f> {
    /// The expression.
    pub expression: &'f Expression,
    /// Its buffers.
    pub buffers: Vec<Buf>,
    /// Its sizes.
    pub sizes: &'f [Val],
    /// For each leaf, the earlier value that produces it, if one does; a [`RegisterInput`] counts as the first value.
    pub producers: &'f [Option<usize>],
    /// Whether the result is stored.
    pub stored: bool,
    /// The half-precision type in which the result is stored as well, two values in a word, and the buffer.
    pub half: Option<(Half, Buf)>,
}

/// Gives the lanes of a row from a column on, of which a mask says which exist.
pub type Lanes<'a> = dyn Fn(&mut Kernel, Val, Val) -> Val + 'a;

/// A row that stages read from registers.
pub struct RegisterInput<'a> {
    /// The row's values.
    pub lanes: &'a Lanes<'a>,
    /// The buffer that the row is also stored to, and the index of its first element, if it is stored.
    pub to: Option<(Buf, Val)>,
    /// The greatest number of columns, if they are those of a tile.
    pub columns: Option<u64>,
}

/// A stage on one row.
struct Row<'f> {
    expression: &'f Expression,
    sizes: &'f [Val],
    sources: Vec<StageInput>,
    out: Buf,
    base: Val,
    key: Option<[Val; 2]>,
    /// The index of the row, and that of what leads it, as the random generator counts them.
    row: Val,
    lead: Val,
}

/// The lanes of an expression's result on one row, which is not stored.
pub fn row_lanes<'f>(
    k: &mut Kernel,
    stage: &Stage<'f>,
    indices: &[Val],
    length: Val,
) -> impl Fn(&mut Kernel, Val, Val) -> Val + use<'f> {
    let row = stage.expression.row(k, stage, indices, length);
    move |k, at, mask| {
        let loaded = row.expression.load(k, &row.sources, at, mask);
        row.expression.evaluate(k, (&row.sources, &loaded, &[]), at, &[], row.sizes)
    }
}

impl Row<'_> {
    /// Draws the random words of every dropout for the columns of one call of the generator from `j` on, up to `end`;
    /// for rows of one column, those of the rows from `j` on.
    fn draw(&self, k: &mut Kernel, (j, end): (Val, Val)) -> Vec<Vec<Val>> {
        let Some(key) = self.key else { return vec![] };
        let streams = self.expression.steps.iter().filter_map(|s| match s {
            Step::Dropout { column, stream, single_column, rows, .. } => {
                Some((self.sizes[*stream], *column, *single_column, *rows))
            }
            _ => None,
        });
        let (row, lead) = (philox::splat_index(k, self.row), philox::splat_index(k, self.lead));
        let words = streams.map(|(stream, column, single_column, rows)| {
            let stream = philox::splat_index(k, stream);
            let row = match rows.map(|leaf| self.sources[leaf]) {
                Some(StageInput::Scalar(number)) => number,
                Some(StageInput::Vector(numbers, base)) => {
                    let mask = k.mask(end - j);
                    k.load_lanes(numbers, base + j, mask)
                }
                None if self.expression.single_column => {
                    let (first, lanes) = (philox::splat_index(k, j), k.lane_numbers());
                    k.add(first, lanes)
                }
                _ => row,
            };
            if single_column || self.expression.single_column {
                return vec![philox::draw_column(k, key, column, [row, lead, stream])];
            }
            let first = k.eval(column + j);
            let draw = if column % 4 == 0 { philox::draw } else { philox::draw_unaligned };
            draw(k, key, first, [row, lead, stream]).to_vec()
        });
        words.collect()
    }
}

/// Evaluates elements `start` to `end` of the row at `indices`, which is `length` long, one stage after the other;
/// values pass from stage to stage in registers. Returns the lanes of the sum of value number `summed`, where a
/// [`RegisterInput`] is the first value.
pub fn write_row(
    k: &mut Kernel,
    stages: &[Stage],
    indices: &[Val],
    length: Val,
    columns: (Val, Val),
    register_input: Option<RegisterInput>,
    summed: Option<usize>,
) -> Option<Val> {
    write_rows(k, stages, &[(indices, register_input)], length, columns, summed).first().copied()
}

/// Evaluates several rows, whose register inputs have the same columns. On a GPU, the loads of all rows are issued
/// before the first of them is waited for.
pub fn write_rows(
    k: &mut Kernel,
    stages: &[Stage],
    rows: &[(&[Val], Option<RegisterInput>)],
    length: Val,
    (start, end): (Val, Val),
    summed: Option<usize>,
) -> Vec<Val> {
    let of_row = |k: &mut Kernel, indices: &[Val]| -> Vec<Row> {
        stages.iter().map(|stage| stage.expression.row(k, stage, indices, length)).collect()
    };
    let own: Vec<Vec<Row>> = rows.iter().map(|(indices, _)| of_row(k, indices)).collect();
    let lanes = k.lane_count();
    let step = if stages.iter().any(|s| s.expression.draws_along()) { philox::columns_per_call(k) } else { lanes };
    let tile_columns = rows.iter().find_map(|(_, register_input)| register_input.as_ref()?.columns);
    let zero_f32: Vec<Val> = rows.iter().filter(|_| summed.is_some()).map(|_| k.floats(0.0)).collect();
    let pieces: Vec<(usize, u64)> = (0..rows.len())
        .flat_map(|row| (0..tile_columns.unwrap_or(step) / lanes).map(move |part| (row, part)))
        .collect();
    let at_once = if k.loads_ahead() { pieces.len() } else { 1 };
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
                // A row of one column has one random word.
                let word = |words: &Vec<Val>| *words.get(part as usize).unwrap_or(&words[0]);
                let words = words[row].iter().map(|words| words.iter().map(word).collect());
                let made = piece.write(k, stages, &own[row], rows[row].1.as_ref(), words);
                if let Some(of) = summed {
                    // Lanes beyond the row hold undefined values.
                    let x = k.select(piece.mask, made[of], zero_f32[row]);
                    sums[row] = k.add(sums[row], x);
                }
            }
        }
        sums
    };
    match tile_columns {
        Some(tile_columns) => {
            assert!(tile_columns <= philox::columns_per_call(k), "one call of the generator decides over them");
            columns(k, start, &zero_f32)
        }
        None => k.fold(start, end, step, &zero_f32, columns),
    }
}

/// One vector of a row's columns, with the leaves that the stages load for it.
struct Piece {
    at: Val,
    mask: Val,
    register_input: Option<Val>,
    /// By stage and leaf; `None` if an earlier stage produces it.
    leaves: Vec<Vec<Option<Val>>>,
}

impl Piece {
    /// Loads the columns from `at` on, up to `end`.
    fn read(k: &mut Kernel, row: &[Row], register_input: Option<&RegisterInput>, at: Val, end: Val) -> Piece {
        let mask = k.mask(end - at);
        let register_input = register_input.map(|register_input| (register_input.lanes)(k, at, mask));
        let leaves = row.iter().map(|row| row.expression.load(k, &row.sources, at, mask)).collect();
        Piece { at, mask, register_input, leaves }
    }

    /// Evaluates and stores all stages, with the random words of each. Returns the register input and the value of
    /// every stage.
    fn write(
        &self,
        k: &mut Kernel,
        stages: &[Stage],
        row: &[Row],
        register_input: Option<&RegisterInput>,
        words: impl Iterator<Item = Vec<Val>>,
    ) -> Vec<Val> {
        let Piece { at, mask, .. } = *self;
        let mut made: Vec<Val> = self.register_input.into_iter().collect();
        if let (Some(first), Some((to, base))) =
            (self.register_input, register_input.and_then(|register_input| register_input.to))
        {
            k.store_lanes(first, to, base + at, mask);
        }
        for (((row, stage), words), leaves) in row.iter().zip(stages).zip(words).zip(&self.leaves) {
            let value = row.expression.evaluate(k, (&row.sources, leaves, &made), at, &words, row.sizes);
            let place = k.eval(row.base + at);
            if stage.stored {
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

/// Prefetches what [`write_row`] will read and write.
pub fn prefetch_row(k: &mut Kernel, stages: &[Stage], indices: &[Val], length: Val, (start, end): (Val, Val)) {
    let rows: Vec<Row> = stages.iter().map(|stage| stage.expression.row(k, stage, indices, length)).collect();
    k.each(start, end, k.lane_count(), |k, j| {
        for row in &rows {
            let loads = row.sources.iter().filter_map(|source| match source {
                StageInput::Vector(array, base) => Some((*array, *base, Access::Read)),
                _ => None,
            });
            for (array, base, access) in loads.chain([(row.out, row.base, Access::Write)]) {
                k.prefetch(array, base + j, access);
            }
        }
    });
}

#[derive(Clone, Copy)]
enum StageInput {
    /// A buffer that varies along the last axis, and the index of the row's first element.
    Vector(Buf, Val),
    /// A value that is the same for the whole row.
    Scalar(Val),
    /// The value with this number, which an earlier stage produces.
    EarlierStage(usize),
}

/// Evaluates one operation on vectors.
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
        // These are steps of their own.
        Op::Iota { .. } | Op::Broadcast { .. } | Op::Dropout { .. }
        // These are not elementwise.
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
        | Op::CrossEntropyVjp { .. } => unreachable!("an expression has elementwise operations only"),
    }
}
