//! Groups as expressions: how their leaves lie, and which of their axes are one.

use std::ops::Range;

use peft_grammar::graph::{Dim, Op, Value};
use peft_grammar::names::Input;
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::dispatch::Facts;
use super::entry::Turn;
use super::groups::one_column;
use super::sizes::{dim_extent, element, extent, lead_size, product};
use super::view::{ONE, View};
use crate::kernels::elementwise::{Expression, Leaf, Step};

/// A group's expression with its arguments.
pub(super) struct Map {
    pub expression: Expression,
    /// What the leaves are.
    pub arrays: Vec<Value>,
    pub buffers: Vec<BufferId>,
    pub sizes: Vec<Extent>,
    rows: Extent,
}

impl Turn<'_, '_, '_, '_> {
    pub(super) fn map(&mut self, root: usize) -> Result<(), String> {
        let Map { expression, buffers, sizes, rows, .. } = self.expression(root, false, None)?;
        let all = extent(self.ty(self.graph.nodes[root].result()));
        let stretch = self.module.machine.stretch();
        let units = if expression.flat() { Extent::CeilDiv(Box::new(all), stretch) } else { rows };
        self.label = expression.label();
        self.launch(expression, buffers, sizes, units);
        Ok(())
    }

    /// The group of `root`, and a place for its result, unless it goes nowhere: then any buffer stands for that. With
    /// `rows` its last axis keeps apart from those before.
    pub(super) fn expression(&mut self, root: usize, rows: bool, nowhere: Option<BufferId>) -> Result<Map, String> {
        let Facts { graph, groups, .. } = self.facts;
        let result = graph.nodes[root].result();
        let shape = &self.ty(result).shape;
        let members = groups.members(root);
        let is_draw = |&at: &usize| matches!(graph.nodes[at].op, Op::Dropout { .. });
        let draws = members.iter().any(is_draw);
        let read = groups.leaves(root);

        // Leaves that are arrays of the shape; the generator's key is not one of them. Numbers of rows are a column.
        let drawn = |operand: usize| {
            let draws = members.iter().filter(|at| is_draw(at));
            draws.filter_map(|&at| graph.nodes[at].operands.get(operand).copied()).collect::<Vec<Value>>()
        };
        let (keys, numbers) = (drawn(1), drawn(2));
        let arrays: Vec<Value> = read.iter().copied().filter(|v| !keys.contains(v)).collect();
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
        let mut lie = |element: Element, runs: Vec<bool>, view: &Option<View>| {
            let at = sizes.len();
            let Some(view) = view else { return Leaf { element, runs, view: None } };
            sizes.push(view.first.clone());
            for axis in &axes[..axes.len().saturating_sub(1)] {
                sizes.push(view.along(own_axes(axis, shape.len(), view)).unwrap_or(ONE).extent());
            }
            Leaf { element, runs, view: Some(at) }
        };
        let lies = arrays.iter().zip(&shapes).zip(&views);
        let leaves = lies.map(|((&v, own), view)| lie(element(self.ty(v)), runs(own), view)).collect();
        let out_lies = lie(Element::F32, vec![true; axes.len()], &views[arrays.len()]);
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
                    sizes.extend([extent(self.ty(node.result())), extent(self.ty(node.operands[0]))]);
                    step_of.insert(node.result(), steps.len() - 1);
                } else {
                    step_of.insert(node.result(), operands[0]);
                }
                continue;
            }
            steps.push(match node.op {
                Op::Dropout { p, stream, column } => {
                    sizes.push(Extent::Const(u64::from(stream)));
                    let own = &self.ty(node.result()).shape;
                    let narrow = own != shape && one_column(own, shape);
                    let rows = node.operands.get(2).and_then(|rows| arrays.iter().position(|a| a == rows));
                    Step::Dropout { x: operands[0], p: p.into(), column, stream: sizes.len() - 1, narrow, rows }
                }
                _ => Step::Op(node.op.clone(), operands),
            });
            step_of.insert(node.result(), steps.len() - 1);
        }
        let last = *step_of.get(&result).expect("the root is the last member");
        if last + 1 != steps.len() {
            steps.push(Step::Op(Op::Scale { by: 1.0 }, vec![last]));
        }

        let expression =
            Expression { leaves, out: out_lies, steps, ragged, axes: axes.len(), sizes: sizes.len(), draws, narrow };
        let mut buffers: Vec<BufferId> = arrays.iter().map(|&v| self.place(v).buffer).collect();
        buffers.extend(draws.then(|| self.place(keys[0]).buffer));
        buffers.extend(ragged.then(|| self.module.derived(Input::Pairs)));
        buffers.push(out);

        let rows = product(&shape[..shape.len().min(axes.last().map_or(0, |a| a.start))]);
        Ok(Map { expression, arrays, buffers, sizes, rows })
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
