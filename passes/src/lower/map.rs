//! Operations element by element. A run of them in which each result is read once, over one shape, is
//! a *group*: one kernel that loads the leaves, evaluates the whole expression and stores once.

use std::fmt::Write;
use std::ops::Range;

use peft_grammar::graph::{Dim, Graph, Op, Value};
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::kernel::matrix::Half;
use super::kernel::{Access, Buf, Kernel, Val, define};
use super::random;
use super::view::{ONE, View};
use super::{Lowering, dim_extent, element, extent, lead_size, math, product};
use crate::machine::Machine;

/// Operations of one kernel, at most.
const LARGEST_GROUP: usize = 24;

/// Works element by element.
pub fn maps(op: &Op) -> bool {
    op.elementwise()
}

/// Which nodes are evaluated inside the kernel of a later one.
pub struct Groups {
    /// By node: the reader in whose group it is.
    into: Vec<Option<usize>>,
    /// By value.
    maker: Vec<Option<usize>>,
}

pub fn group(graph: &Graph, uses: &[usize]) -> Groups {
    let mut maker = vec![None; graph.values()];
    for (at, node) in graph.nodes.iter().enumerate() {
        maker[node.result.0 as usize] = Some(at);
    }
    let mut into = vec![None; graph.nodes.len()];
    let mut sizes = vec![1; graph.nodes.len()];
    for (at, node) in graph.nodes.iter().enumerate().filter(|(_, n)| maps(&n.op)) {
        for &operand in &node.operands {
            let Some(source) = maker[operand.0 as usize] else { continue };
            let op = &graph.nodes[source].op;
            let (own, wide) = (&graph.ty(operand).shape, &graph.ty(node.result).shape);
            let alike = own == wide || one_column(own, wide) || matches!(op, Op::Constant { .. });
            let once = uses[operand.0 as usize] == 1;
            if maps(op) && alike && once && sizes[at] + sizes[source] <= LARGEST_GROUP {
                into[source] = Some(at);
                sizes[at] += sizes[source];
            }
        }
    }
    Groups { into, maker }
}

/// The same rows of one column each: what is computed of them is computed for every column, which costs less than to
/// write it down.
fn one_column(own: &[Dim], wide: &[Dim]) -> bool {
    match (own, wide) {
        ([lead @ .., Dim::Const(1)], [rows @ .., Dim::Const(_)]) => lead == rows && !rows.is_empty(),
        _ => false,
    }
}

impl Groups {
    /// It has no kernel of its own.
    pub fn inner(&self, at: usize) -> bool {
        self.into[at].is_some()
    }

    /// The node whose kernel evaluates `at`.
    pub fn root(&self, at: usize) -> usize {
        self.into[at].map_or(at, |reader| self.root(reader))
    }

    /// The node that makes `value`; `None` for an argument.
    pub fn maker(&self, value: Value) -> Option<usize> {
        self.maker[value.0 as usize]
    }

    /// The node inside the group of its reader that makes `value`.
    fn inside(&self, value: Value) -> Option<usize> {
        self.maker(value).filter(|&at| self.inner(at))
    }

    /// What the group of `root` reads from buffers, each once.
    pub fn leaves(&self, graph: &Graph, root: usize) -> Vec<Value> {
        let mut leaves = vec![];
        for &operand in &graph.nodes[root].operands {
            match self.inside(operand) {
                Some(at) => leaves.extend(self.leaves(graph, at)),
                None => leaves.push(operand),
            }
        }
        let mut seen = std::collections::HashSet::new();
        leaves.retain(|v| seen.insert(*v));
        leaves
    }

    /// The group drops something.
    pub fn draws(&self, graph: &Graph, root: usize) -> bool {
        self.members(graph, root).iter().any(|&at| matches!(graph.nodes[at].op, Op::Dropout { .. }))
    }

    /// What the group computes, as text, with its leaves numbered.
    pub fn expression(&self, graph: &Graph, root: usize) -> String {
        let leaves = if maps(&graph.nodes[root].op) { self.leaves(graph, root) } else { vec![] };
        let mut text = format!("{}=", graph.ty(graph.nodes[root].result));
        self.write(graph, root, &leaves, &mut text);
        text
    }

    fn write(&self, graph: &Graph, at: usize, leaves: &[Value], text: &mut String) {
        let node = &graph.nodes[at];
        let _ = write!(text, "{:?}(", node.op);
        for &operand in &node.operands {
            match self.inside(operand) {
                Some(inner) => self.write(graph, inner, leaves, text),
                None => {
                    let _ = write!(text, "{:?}", leaves.iter().position(|&l| l == operand));
                }
            }
            text.push(',');
        }
        text.push(')');
    }

    /// The group's nodes, operands before readers.
    fn members(&self, graph: &Graph, root: usize) -> Vec<usize> {
        let mut members = vec![];
        for &operand in &graph.nodes[root].operands {
            if let Some(at) = self.inside(operand) {
                members.extend(self.members(graph, at));
            }
        }
        members.push(root);
        members
    }
}

/// How a leaf, or the result, lies under the group's shape: for each merged axis, whether it runs along it.
#[derive(Clone, Debug)]
struct Leaf {
    runs: Vec<bool>,
    /// Where it is no row-major tensor: which of the kernel's sizes are its first element and its steps.
    view: Option<usize>,
}

/// One step of the expression on operands that come before it.
#[derive(Clone, Debug)]
enum Step {
    Leaf(usize),
    Op(Op, Vec<usize>),
    /// Divided by how often a value was repeated: two of the kernel's sizes, out and in.
    Mean(usize, usize),
    /// Of columns from `column` on, or of rows of that column alone; the stream is one of the kernel's sizes, so that
    /// layers share the kernel. A leaf may number the rows.
    Dropout {
        x: usize,
        p: f64,
        column: u64,
        stream: usize,
        narrow: bool,
        rows: Option<usize>,
    },
}

/// The kernel's form: what it is named by.
pub(super) struct Form {
    leaves: Vec<Leaf>,
    out: Leaf,
    steps: Vec<Step>,
    ragged: bool,
    axes: usize,
    draws: bool,
    /// Rows of one column each, which draw along the rows instead: lanes run along them.
    narrow: bool,
}

/// A group with what its kernel gets: the leaves' arrays, the generator's key and the ragged rows' places if it wants
/// them, and the result.
pub(super) struct Map {
    pub form: Form,
    pub arrays: Vec<Value>,
    pub buffers: Vec<BufferId>,
    pub elements: Vec<Element>,
    pub sizes: Vec<Extent>,
    rows: Extent,
}

impl Lowering<'_, '_, '_> {
    pub(super) fn map(&mut self, root: usize) -> Result<(), String> {
        let Map { form, buffers, elements, sizes, rows, .. } = self.expression(root, false, None)?;
        let name = form.name();
        let count = sizes.len();
        let kernel = self.target.kernel(&name, |machine| {
            define(machine, &elements, count, |k, buffers, sizes| form.write(k, buffers, sizes))
        });
        let all = extent(self.ty(self.graph.nodes[root].result));
        let stretch = self.target.machine.stretch();
        let units = if form.flat() { Extent::CeilDiv(Box::new(all), stretch) } else { rows };
        self.label = form.label();
        self.launch(kernel, buffers, sizes, units);
        Ok(())
    }

    /// The group of `root`, and a place for its result, unless it goes nowhere: then any buffer stands for that. With
    /// `rows` its last axis keeps apart from those before.
    pub(super) fn expression(&mut self, root: usize, rows: bool, nowhere: Option<BufferId>) -> Result<Map, String> {
        let (graph, groups) = (self.graph, self.groups.clone());
        let result = graph.nodes[root].result;
        let shape = &self.ty(result).shape;
        let members = groups.members(graph, root);
        let is_draw = |&at: &usize| matches!(graph.nodes[at].op, Op::Dropout { .. });
        let draws = members.iter().any(is_draw);
        let leaves = groups.leaves(graph, root);

        // Leaves that are arrays of the shape; the generator's key is not one of them. Numbers of rows are a column.
        let drawn = |operand: usize| {
            let draws = members.iter().filter(|at| is_draw(at));
            draws.filter_map(|&at| graph.nodes[at].operands.get(operand).copied()).collect::<Vec<Value>>()
        };
        let (keys, numbers) = (drawn(1), drawn(2));
        let arrays: Vec<Value> = leaves.iter().copied().filter(|v| !keys.contains(v)).collect();
        if keys.windows(2).any(|k| k[0] != k[1]) {
            return Err("two generators in one group".into());
        }

        let ragged = matches!(shape.last(), Some(Dim::Keys(_)));
        // Rows are read and written where they lie, if their elements stand side by side.
        for &array in &arrays {
            if ragged || !self.view(array).runs() {
                self.dense(array);
            }
        }
        let (out, view) = match nowhere {
            Some(buffer) => (buffer, View::dense(shape)),
            None if ragged => (self.result(result), View::dense(shape)),
            None => self.target(result),
        };
        let mut views: Vec<Option<View>> = arrays.iter().map(|&v| self.place(v).view.clone()).collect();
        views.push(Some(view).filter(|view| !view.is_dense()));
        let lying = |v: Value| {
            let column = numbers.contains(&v).then_some(Dim::Const(1));
            self.ty(v).shape.iter().copied().chain(column).collect::<Vec<_>>()
        };
        let shapes: Vec<Vec<Dim>> = arrays.iter().map(|&v| lying(v)).collect();
        let narrow = draws && !rows && shape.len() > 1 && shape.last() == Some(&Dim::Const(1));
        let apart = if narrow {
            Apart::Lead
        } else if draws || rows || ragged {
            Apart::Rows
        } else {
            Apart::Nothing
        };
        let axes = merged_axes(shape, &shapes, views.iter().flatten(), apart);
        let runs = |own: &[Dim]| {
            let missing = shape.len() - own.len();
            let along = |axis: &Range<usize>| {
                let differs = |a: usize| a >= missing && own[a - missing] == shape[a];
                let trivial = |a: usize| shape[a] == Dim::Const(1);
                axis.clone().any(|a| differs(a) && !trivial(a))
            };
            axes.iter().map(along).collect::<Vec<_>>()
        };
        let mut sizes: Vec<Extent> = axes.iter().map(|axis| axis_extent(&shape[axis.clone()])).collect();
        if ragged {
            let Some(Dim::Keys(extra)) = shape.last() else { unreachable!() };
            sizes.pop();
            sizes.extend([Extent::Const(*extra), lead_size(*extra)]);
        }
        let mut lie = |runs: Vec<bool>, view: &Option<View>| {
            let at = sizes.len();
            let Some(view) = view else { return Leaf { runs, view: None } };
            sizes.push(view.first.clone());
            for axis in &axes[..axes.len().saturating_sub(1)] {
                sizes.push(view.along(own_axes(axis, shape.len(), view)).unwrap_or(ONE).extent());
            }
            Leaf { runs, view: Some(at) }
        };
        let forms: Vec<Leaf> = shapes.iter().zip(&views).map(|(own, view)| lie(runs(own), view)).collect();
        let form_out = lie(vec![true; axes.len()], &views[arrays.len()]);
        let mut steps = vec![];
        let mut step_of = std::collections::HashMap::new();
        for &at in &members {
            let node = &graph.nodes[at];
            let mut operands = vec![];
            let dropped = matches!(node.op, Op::Dropout { .. });
            for &operand in if dropped { &node.operands[..1] } else { &node.operands[..] } {
                let step = *step_of.entry(operand).or_insert_with(|| {
                    steps.push(Step::Leaf(arrays.iter().position(|&a| a == operand).expect("a leaf")));
                    steps.len() - 1
                });
                operands.push(step);
            }
            if let Op::Broadcast { mean, .. } = node.op {
                if mean {
                    steps.push(Step::Mean(operands[0], sizes.len()));
                    sizes.extend([extent(self.ty(node.result)), extent(self.ty(node.operands[0]))]);
                    step_of.insert(node.result, steps.len() - 1);
                } else {
                    step_of.insert(node.result, operands[0]);
                }
                continue;
            }
            steps.push(match node.op {
                Op::Dropout { p, stream, column } => {
                    sizes.push(Extent::Const(u64::from(stream)));
                    let own = &self.ty(node.result).shape;
                    let narrow = own != shape && one_column(own, shape);
                    let rows = node.operands.get(2).and_then(|rows| arrays.iter().position(|a| a == rows));
                    Step::Dropout { x: operands[0], p, column, stream: sizes.len() - 1, narrow, rows }
                }
                _ => Step::Op(node.op.clone(), operands),
            });
            step_of.insert(node.result, steps.len() - 1);
        }
        let last = *step_of.get(&result).expect("the root is the last member");
        if last + 1 != steps.len() {
            steps.push(Step::Op(Op::Scale { by: 1.0 }, vec![last]));
        }

        let form = Form { leaves: forms, out: form_out, steps, ragged, axes: axes.len(), draws, narrow };
        let mut buffers: Vec<BufferId> = arrays.iter().map(|&v| self.place(v).buffer).collect();
        let mut elements: Vec<Element> = arrays.iter().map(|&v| element(self.ty(v))).collect();
        if draws {
            buffers.push(self.place(keys[0]).buffer);
            elements.push(Element::I32);
        }
        if ragged {
            buffers.push(self.target.derived("pairs"));
            elements.push(Element::I32);
        }
        buffers.push(out);
        elements.push(Element::F32);

        let rows = product(&shape[..shape.len().min(axes.last().map_or(0, |a| a.start))]);
        Ok(Map { form, arrays, buffers, elements, sizes, rows })
    }
}

/// Which of the last axes are not merged with others.
#[derive(Clone, Copy, PartialEq)]
enum Apart {
    Nothing,
    /// Rows, and columns.
    Rows,
    /// Rows of one column from what leads them.
    Lead,
}

/// Neighbouring axes that every leaf either runs along or repeats over count as one, if they follow each other in
/// every view and nothing wants them `apart`: the generator counts rows and columns, and a ragged axis is alone.
fn merged_axes<'v>(
    shape: &[Dim],
    leaves: &[Vec<Dim>],
    views: impl Iterator<Item = &'v View> + Clone,
    apart: Apart,
) -> Vec<Range<usize>> {
    let runs = |leaf: &[Dim], axis: usize| {
        (axis + leaf.len()).checked_sub(shape.len()).is_some_and(|a| leaf[a] == shape[axis])
    };
    let mut axes: Vec<Range<usize>> = vec![];
    for axis in 0..shape.len() {
        let tail = match apart {
            Apart::Nothing => false,
            Apart::Rows => axis + 2 >= shape.len(),
            Apart::Lead => axis + 2 == shape.len(),
        };
        let joins = axis > 0 && !tail && {
            // An axis of one element fits either way.
            let flat = |a: usize| shape[a] == Dim::Const(1);
            let before = axes.last().map_or(0..0, |r| r.clone());
            let both = before.start..axis + 1;
            let follows = |view: &View| view.along(own_axes(&both, shape.len(), view)).is_some();
            views.clone().all(follows)
                && leaves
                    .iter()
                    .all(|leaf| before.clone().all(|a| flat(a) || flat(axis) || runs(leaf, a) == runs(leaf, axis)))
        };
        match axes.last_mut() {
            Some(last) if joins => last.end = axis + 1,
            _ => axes.push(axis..axis + 1),
        }
    }
    axes
}

/// Axes of a wider shape of `rank` as the view's own; those it lacks are in front.
fn own_axes(axes: &Range<usize>, rank: usize, view: &View) -> Range<usize> {
    let missing = rank - view.shape.len();
    axes.start.saturating_sub(missing)..axes.end.saturating_sub(missing)
}

fn axis_extent(dims: &[Dim]) -> Extent {
    match dims {
        // The caller replaces it.
        [Dim::Keys(_)] => Extent::Const(0),
        dims => dims.iter().fold(Extent::Const(1), |n, &d| n * dim_extent(d)),
    }
}

impl Form {
    pub(super) fn draws(&self) -> bool {
        self.draws
    }

    /// A call of the generator decides over several columns.
    fn draws_along(&self) -> bool {
        !self.narrow && self.steps.iter().any(|step| matches!(step, Step::Dropout { narrow: false, .. }))
    }

    /// All leaves lie alike, or are single numbers.
    fn flat(&self) -> bool {
        !self.ragged && self.axes <= 1 && !self.draws
    }

    /// The operations in order, for profiles.
    pub(super) fn label(&self) -> String {
        let names = self.steps.iter().filter_map(|step| match step {
            Step::Op(op, _) => Some(op.name()),
            Step::Dropout { .. } => Some("dropout"),
            Step::Leaf(_) | Step::Mean(..) => None,
        });
        let names: Vec<&str> = names.collect();
        // Repeating alone is no step: the leaf lies as it should.
        if names.is_empty() { "broadcast".into() } else { names.join("+") }
    }

    pub(super) fn name(&self) -> String {
        let Form { leaves, out, steps, ragged, axes, narrow, .. } = self;
        let text = format!("{leaves:?} {out:?} {steps:?} {ragged} {axes} {narrow}");
        let hash = blake3::hash(text.as_bytes()).to_hex();
        let mut ops: Vec<String> = self.label().split('+').map(str::to_string).collect();
        ops.truncate(4);
        format!("map_{}_{}", ops.join("_"), &hash[..8])
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
                    let i = indices[lead_axes - 1];
                    let (one, extra) = (k.index(1), sizes[lead_axes]);
                    let next = k.add(i, one);
                    let (from, to) = (k.load_index(pairs, i), k.load_index(pairs, next));
                    let keys = k.sub(to, from);
                    k.add(keys, extra)
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
        let key = self.draws.then(|| random::key(k, buffers[count]));
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
        let lead = leads.iter().zip(*sizes).fold(zero, |sum, (&index, &size)| {
            let sum = k.mul(sum, size);
            k.add(sum, index)
        });
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
                let place = k.add(first, at);
                k.store_lanes(value, out, place, mask);
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
            return indices.iter().enumerate().filter(|(axis, _)| leaf.runs[*axis]).fold(
                sizes[at],
                |base, (axis, &i)| {
                    let offset = k.mul(i, sizes[at + 1 + axis]);
                    k.add(base, offset)
                },
            );
        }
        let mut rows = k.index(0);
        let along_last = *leaf.runs.last().unwrap_or(&false);
        let token_axis = pairs.is_some().then(|| indices.len() - 1);
        for (axis, &index) in indices.iter().enumerate() {
            if leaf.runs[axis] && !(along_last && Some(axis) == token_axis) {
                let scaled = k.mul(rows, sizes[axis]);
                rows = k.add(scaled, index);
            }
        }
        match (along_last, pairs) {
            (false, _) => rows,
            (true, None) => k.mul(rows, length),
            (true, Some(pairs)) => {
                let i = indices[indices.len() - 1];
                let (extra, lead) = (sizes[indices.len()], sizes[indices.len() + 1]);
                let before = k.load_index(pairs, i);
                let extras = k.mul(extra, i);
                let lead = k.mul(rows, lead);
                let base = k.add(lead, before);
                k.add(base, extras)
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
            Source::Along(array, base) => {
                let place = k.add(base, at);
                Some(k.load_lanes(array, place, mask))
            }
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
                    random::dropped(k, values[*x], word, *p)
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

/// A form with a kernel's buffers and sizes.
pub(super) struct Stage<'f> {
    pub form: &'f Form,
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
pub(super) type Lanes<'a> = dyn Fn(&mut Kernel, Val, Val) -> Val + 'a;

/// What stages find in registers.
pub(super) struct Given<'a> {
    pub lanes: &'a Lanes<'a>,
    /// Where it is written, if it is: the row's first element there.
    pub to: Option<(Buf, Val)>,
    /// How many columns there are at most, where that is a tile's.
    pub columns: Option<u64>,
}

/// A stage on one row.
struct Row<'f> {
    form: &'f Form,
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
pub(super) fn lanes_of<'f>(
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
        let (row, lead) = (random::lanes_of(k, self.row), random::lanes_of(k, self.lead));
        let words = streams.map(|(stream, column, narrow, rows)| {
            let stream = random::lanes_of(k, stream);
            let row = match rows.map(|leaf| self.sources[leaf]) {
                Some(Source::Repeated(number)) => number,
                Some(Source::Along(numbers, base)) => {
                    let (place, left) = (k.add(base, j), k.sub(end, j));
                    let mask = k.mask(left);
                    k.load_lanes(numbers, place, mask)
                }
                None if self.form.narrow => {
                    let (first, lanes) = (random::lanes_of(k, j), k.lane_numbers());
                    k.add(first, lanes)
                }
                _ => row,
            };
            if narrow || self.form.narrow {
                return vec![random::draw_column(k, key, column, [row, lead, stream])];
            }
            let first = k.index(column);
            let first = k.add(first, j);
            let draw = if column % 4 == 0 { random::draw } else { random::draw_anywhere };
            draw(k, key, first, [row, lead, stream]).to_vec()
        });
        words.collect()
    }
}

/// Elements `start` to `end` of the row at `indices`, which is `length` long: one stage after the other, what one hands
/// to the next in registers. Gives what lanes have of the sum of what `summed` numbers, [`Given`] being the first.
pub(super) fn write_row(
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
pub(super) fn write_rows(
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
    let step = if stages.iter().any(|s| s.form.draws_along()) { random::drawn(k) } else { lanes };
    let most = rows.iter().find_map(|(_, given)| given.as_ref()?.columns);
    let nothing: Vec<Val> = rows.iter().filter(|_| summed.is_some()).map(|_| k.floats(0.0)).collect();
    let pieces: Vec<(usize, u64)> =
        (0..rows.len()).flat_map(|row| (0..most.unwrap_or(step) / lanes).map(move |part| (row, part))).collect();
    let at_once = if matches!(k.machine, Machine::Cuda(_)) { pieces.len() } else { 1 };
    let columns = |k: &mut Kernel, j: Val, sums: &[Val]| {
        let mut sums = sums.to_vec();
        let draw = |k: &mut Kernel, own: &Vec<Row>| -> Vec<_> { own.iter().map(|row| row.draw(k, (j, end))).collect() };
        let words: Vec<Vec<Vec<Vec<Val>>>> = own.iter().map(|own| draw(k, own)).collect();
        for pieces in pieces.chunks(at_once) {
            let read: Vec<Piece> = pieces
                .iter()
                .map(|&(row, part)| {
                    let offset = k.index(part * lanes);
                    let at = k.add(j, offset);
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
            assert!(most <= random::drawn(k), "one call of the generator decides over them");
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
        let left = k.sub(end, at);
        let mask = k.mask(left);
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
            let place = k.add(base, at);
            k.store_lanes(first, to, place, mask);
        }
        for (((row, stage), words), leaves) in row.iter().zip(stages).zip(words).zip(&self.leaves) {
            let value = row.form.evaluate(k, (&row.sources, leaves, &made), at, &words, row.sizes);
            let place = k.add(row.base, at);
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
pub(super) fn prefetch_row(k: &mut Kernel, stages: &[Stage], indices: &[Val], length: Val, (start, end): (Val, Val)) {
    let rows: Vec<Row> = stages.iter().map(|stage| stage.form.row(k, stage, indices, length)).collect();
    k.each(start, end, k.lane_count(), |k, j| {
        for row in &rows {
            let along = row.sources.iter().filter_map(|source| match source {
                Source::Along(array, base) => Some((*array, *base, Access::Read)),
                _ => None,
            });
            for (array, base, access) in along.chain([(row.out, row.base, Access::Write)]) {
                let at = k.add(base, j);
                k.prefetch(array, at, access);
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
            let positive = k.compare(x[0], super::kernel::Order::Gt, zero);
            k.select(positive, one, zero)
        }
        Op::Gelu => math::gelu(k, x[0]),
        Op::GeluGrad => math::gelu_grad(k, x[0]),
        Op::GeluTanh => math::gelu_tanh(k, x[0]),
        Op::GeluTanhGrad => math::gelu_tanh_grad(k, x[0]),
        _ => unreachable!("only what `maps` names"),
    }
}
