//! The lowering of elementwise groups: builds the kernel's expression with the views of its leaves, and merges axes
//! that the kernel can treat as one.

use std::ops::Range;

use peft_grammar::graph::{Dim, Op, Value};
use peft_grammar::names::Input;
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::dispatch::Analysis;
use super::entry::DispatchLowering;
use super::groups::is_column_of;
use super::sizes::{dim_extent, dims_product, element, element_count, ragged_elements};
use super::view::{UNIT_STRIDE, View};
use crate::kernels::elementwise::{Expression, Leaf, Step};

/// A group's expression with its arguments.
pub(super) struct LoweredExpression {
    pub expression: Expression,
    /// The values of the leaves that are arrays, in the order of the expression's leaves.
    pub arrays: Vec<Value>,
    pub buffers: Vec<BufferId>,
    pub sizes: Vec<Extent>,
    /// The number of rows, which are the kernel's units unless the expression is flat.
    rows: Extent,
}

impl DispatchLowering<'_, '_, '_, '_> {
    /// Launches the kernel of the group of `root`.
    pub(super) fn elementwise(&mut self, root: usize) -> Result<(), String> {
        let LoweredExpression { expression, buffers, sizes, rows, .. } = self.lower_expression(root, false, None)?;
        let all = element_count(self.ty(self.graph.nodes[root].result()));
        let stretch = self.module.machine.flat_unit_elements();
        let units = if expression.flat() { Extent::CeilDiv(Box::new(all), stretch) } else { rows };
        self.label = expression.label();
        self.launch(expression, buffers, sizes, units);
        Ok(())
    }

    /// Lowers the group of `root`. It allocates the result, unless that is not stored: then the argument is the buffer
    /// `unstored`, which the kernel does not write. With `rows` the last axis is not merged with the ones before it.
    pub(super) fn lower_expression(
        &mut self,
        root: usize,
        rows: bool,
        unstored: Option<BufferId>,
    ) -> Result<LoweredExpression, String> {
        let Analysis { graph, groups, .. } = self.analysis;
        let result = graph.nodes[root].result();
        let shape = &self.ty(result).shape;
        let members = groups.members(root);
        let is_draw = |&at: &usize| matches!(graph.nodes[at].op, Op::Dropout { .. });
        let draws = members.iter().any(is_draw);
        let read = groups.leaves(root);

        // Dropout's second operand is the generator's key, which is not an array leaf. Its third has row numbers, which
        // are read as a column.
        let drawn = |operand: usize| {
            let draws = members.iter().filter(|at| is_draw(at));
            draws.filter_map(|&at| graph.nodes[at].operands.get(operand).copied()).collect::<Vec<Value>>()
        };
        let (keys, numbers) = (drawn(1), drawn(2));
        let arrays: Vec<Value> = read.iter().copied().filter(|v| !keys.contains(v)).collect();
        if keys.windows(2).any(|k| k[0] != k[1]) {
            return Err("one elementwise group draws from two random generators".into());
        }

        let ragged = matches!(shape.last(), Some(Dim::Keys(_)));
        // The kernel reads strided rows if they are contiguous along the last axis, unless they are ragged.
        for &array in &arrays {
            if ragged || !self.view(array).has_contiguous_rows() {
                self.materialize(array);
            }
        }
        let (out, view) = match unstored {
            Some(buffer) => (buffer, View::dense(shape)),
            None if ragged => (self.allocate_result(result), View::dense(shape)),
            None => self.result_destination(result),
        };
        let mut views: Vec<Option<View>> = arrays.iter().map(|&v| self.buffer_view(v).view.clone()).collect();
        views.push(Some(view).filter(|view| !view.is_dense()));
        let leaf_shape = |v: Value| {
            let column = numbers.contains(&v).then_some(Dim::Const(1));
            self.ty(v).shape.iter().copied().chain(column).collect::<Vec<_>>()
        };
        let shapes: Vec<Vec<Dim>> = arrays.iter().map(|&v| leaf_shape(v)).collect();
        let narrow = draws && !rows && shape.len() > 1 && shape.last() == Some(&Dim::Const(1));
        let unmerged = if narrow {
            Unmerged::Rows
        } else if draws || rows || ragged {
            Unmerged::RowsAndColumns
        } else {
            Unmerged::None
        };
        let axes = merged_axes(shape, &shapes, views.iter().flatten(), unmerged);
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
            sizes.extend([Extent::Const(*extra), ragged_elements(*extra)]);
        }
        let mut leaf = |element: Element, runs: Vec<bool>, view: &Option<View>| {
            let at = sizes.len();
            let Some(view) = view else { return Leaf { element, runs, view: None } };
            sizes.push(view.offset.clone());
            for axis in &axes[..axes.len().saturating_sub(1)] {
                sizes.push(view.merged_stride(own_axes(axis, shape.len(), view)).unwrap_or(UNIT_STRIDE).extent());
            }
            Leaf { element, runs, view: Some(at) }
        };
        let leaf_views = arrays.iter().zip(&shapes).zip(&views);
        let leaves = leaf_views.map(|((&v, own), view)| leaf(element(self.ty(v)), runs(own), view)).collect();
        let out_leaf = leaf(Element::F32, vec![true; axes.len()], &views[arrays.len()]);
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
                    sizes.extend([element_count(self.ty(node.result())), element_count(self.ty(node.operands[0]))]);
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
                    let narrow = own != shape && is_column_of(own, shape);
                    let rows = node.operands.get(2).and_then(|rows| arrays.iter().position(|a| a == rows));
                    Step::Dropout {
                        x: operands[0],
                        p: p.into(),
                        column,
                        stream: sizes.len() - 1,
                        single_column: narrow,
                        rows,
                    }
                }
                _ => Step::Op(node.op.clone(), operands),
            });
            step_of.insert(node.result(), steps.len() - 1);
        }
        let last = *step_of.get(&result).expect("the root is the last member of its group");
        if last + 1 != steps.len() {
            steps.push(Step::Op(Op::Scale { by: 1.0 }, vec![last]));
        }

        let expression = Expression {
            leaves,
            out: out_leaf,
            steps,
            ragged,
            axes: axes.len(),
            sizes: sizes.len(),
            draws,
            single_column: narrow,
        };
        let mut buffers: Vec<BufferId> = arrays.iter().map(|&v| self.buffer_view(v).buffer).collect();
        buffers.extend(draws.then(|| self.buffer_view(keys[0]).buffer));
        buffers.extend(ragged.then(|| self.module.derived_input(Input::Pairs)));
        buffers.push(out);

        let rows = dims_product(&shape[..shape.len().min(axes.last().map_or(0, |a| a.start))]);
        Ok(LoweredExpression { expression, arrays, buffers, sizes, rows })
    }
}

/// Which of the last two axes are not merged with the axes before them.
#[derive(Clone, Copy, PartialEq)]
enum Unmerged {
    /// All axes may be merged.
    None,
    /// The axes of rows and of columns stay separate from each other and from the axes before.
    RowsAndColumns,
    /// The axis of rows, which have one column, stays separate from the axes before.
    Rows,
}

/// Merges neighbouring axes that every leaf either indexes both of or is broadcast along both of, if they have a common
/// stride in every view and are not `unmerged`: the random generator counts rows and columns, and a ragged axis is
/// alone.
fn merged_axes<'v>(
    shape: &[Dim],
    leaves: &[Vec<Dim>],
    views: impl Iterator<Item = &'v View> + Clone,
    unmerged: Unmerged,
) -> Vec<Range<usize>> {
    let runs = |leaf: &[Dim], axis: usize| {
        (axis + leaf.len()).checked_sub(shape.len()).is_some_and(|a| leaf[a] == shape[axis])
    };
    let mut axes: Vec<Range<usize>> = vec![];
    for axis in 0..shape.len() {
        let tail = match unmerged {
            Unmerged::None => false,
            Unmerged::RowsAndColumns => axis + 2 >= shape.len(),
            Unmerged::Rows => axis + 2 == shape.len(),
        };
        let joins = axis > 0 && !tail && {
            // An axis of one element counts as both indexed and broadcast.
            let flat = |a: usize| shape[a] == Dim::Const(1);
            let before = axes.last().map_or(0..0, |r| r.clone());
            let both = before.start..axis + 1;
            let follows = |view: &View| view.merged_stride(own_axes(&both, shape.len(), view)).is_some();
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

/// Axes of a shape of `rank` as axes of the view, which may lack leading ones.
fn own_axes(axes: &Range<usize>, rank: usize, view: &View) -> Range<usize> {
    let missing = rank - view.shape.len();
    axes.start.saturating_sub(missing)..axes.end.saturating_sub(missing)
}

fn axis_extent(dims: &[Dim]) -> Extent {
    match dims {
        // The caller replaces the size of a ragged axis.
        [Dim::Keys(_)] => Extent::Const(0),
        dims => dims.iter().fold(Extent::Const(1), |n, &d| n * dim_extent(d)),
    }
}
