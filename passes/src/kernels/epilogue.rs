//! Epilogues: elementwise operations on the rows of a larger kernel's result, which that kernel executes while the rows
//! are in the cache, in a GPU's shared memory, or in registers. Where a kernel has a whole row, it also computes the
//! row's sum, and the operations that follow the sum.

use std::collections::BTreeMap;

use peft_runtime::artifact::Element;

use super::elementwise::{self, Expression};
use super::span::Span;
use crate::builder::mma::Half;
use crate::builder::{Buf, Code, F32, Kernel, Val, define};
use crate::target::Machine;

/// The operations that a kernel executes on its result. Their buffers and sizes come after the kernel's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Epilogue {
    /// Elementwise operations, in order.
    pub groups: Vec<Group>,
    /// A sum of each row, after the groups.
    pub sum: Option<Box<RowSum>>,
    /// Elementwise operations on rows of other shapes, which the kernel executes after the sum. Each has its width in
    /// front of its sizes.
    pub companions: Vec<Group>,
    /// Whether the result has an axis of batches; rows are then indexed by batch and row.
    pub batched: bool,
}

/// One fused expression on the rows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    /// The expression.
    pub expression: Expression,
    /// The indices, among the kernel's buffers, of the expression's buffers.
    pub buffers: Vec<usize>,
    /// For each leaf, the number of the value that produces it in registers, if one does. The values are the kernel's
    /// result, if it is in registers, and then the results of the groups that run at the same point.
    pub producers: Vec<Option<usize>>,
    /// Whether the value is stored; otherwise only later operations of the kernel read it.
    pub stored: bool,
    /// The half-precision type in which the value is stored as well, for later products, and the index of the buffer
    /// that it is stored to.
    pub half: Option<(Half, usize)>,
}

/// The sum of a row, and the operations that follow it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RowSum {
    /// The number of the value that is summed up: 0 is the kernel's result, `1 + i` that of group i.
    pub input: usize,
    /// Whether the sum is divided by the row's length.
    pub mean: bool,
    /// The index of the buffer that the sum is stored to, if it is stored.
    pub out: Option<usize>,
    /// The operations on the sums.
    pub epilogue: Epilogue,
}

/// A row whose values are in registers.
pub struct RowInRegisters<'a> {
    /// The index of the batch.
    pub batch: Val,
    /// The index of the row in its batch.
    pub row: Val,
    /// The first column, and the end of the columns.
    pub columns: (Val, Val),
    /// The row's values.
    pub lanes: elementwise::RegisterInput<'a>,
}

impl Epilogue {
    /// Whether there are no operations.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.companions.is_empty() && self.sum.is_none()
    }

    /// The elements of the buffers beyond the kernel's `own` ones.
    fn elements(&self, own: usize) -> Vec<Element> {
        let mut elements = BTreeMap::new();
        self.note_elements(&mut elements);
        elements.range(own..).map(|(_, element)| *element).collect()
    }

    fn note_elements(&self, elements: &mut BTreeMap<usize, Element>) {
        for group in self.groups.iter().chain(&self.companions) {
            elements.extend(group.buffers.iter().copied().zip(group.expression.elements()));
            elements.extend(group.half.map(|(_, at)| (at, Element::I32)));
        }
        if let Some(sum) = &self.sum {
            elements.extend(sum.out.map(|at| (at, Element::F32)));
            sum.epilogue.note_elements(elements);
        }
    }

    /// Defines a kernel with buffers `own` and `sizes` sizes, followed by those of the epilogue. `body` gets all
    /// buffers, the kernel's own sizes, and the epilogue's sizes.
    pub fn define(
        &self,
        machine: Machine,
        own: &[Element],
        sizes: usize,
        body: impl FnOnce(&mut Kernel, &[Buf], &[Val], &[Val]),
    ) -> Code {
        let elements = [own, &self.elements(own.len())].concat();
        define(machine, &elements, sizes + self.sizes(), |k, buffers, all| {
            let (own, follows) = all.split_at(sizes);
            body(k, buffers, own, follows);
        })
    }

    /// The number of the epilogue's sizes.
    fn sizes(&self) -> usize {
        let groups: usize = self.groups.iter().map(|group| group.expression.sizes).sum();
        let companions: usize = self.companions.iter().map(|group| 1 + group.expression.sizes).sum();
        groups + companions + self.sum.as_ref().map_or(0, |sum| 1 + sum.epilogue.sizes())
    }

    /// Whether any operation draws random numbers.
    pub fn draws(&self) -> bool {
        self.groups.iter().any(|group| group.expression.draws)
            || self.sum.as_ref().is_some_and(|sum| sum.epilogue.draws())
    }

    /// The operations' names, for profiles.
    pub fn label(&self, product: &str) -> String {
        let groups = self.groups.iter().chain(&self.companions);
        let groups = groups.fold(product.to_string(), |label, group| format!("{label}+{}", group.expression.label()));
        self.sum.iter().fold(groups, |label, sum| sum.epilogue.label(&format!("{label}+reduce")))
    }

    /// Executes the groups that are due at `when` on the region of the result that `part` returns, reading the result
    /// from memory. A row has `width` columns; `sizes` are the epilogue's.
    pub fn write(
        &self,
        k: &mut Kernel,
        when: EpiloguePoint,
        (buffers, sizes): (&[Buf], &[Val]),
        (batch, width): (Val, Val),
        part: impl FnOnce(&mut Kernel) -> Region,
    ) {
        self.rows(k, when, (buffers, sizes), part, |k, stages, row, columns| {
            elementwise::write_row(k, stages, &self.indices(batch, row), width, columns, None, None);
        });
    }

    /// The indices of a row.
    fn indices(&self, batch: Val, row: Val) -> Vec<Val> {
        if self.batched { vec![batch, row] } else { vec![row] }
    }

    /// Executes all operations on a row in registers.
    pub fn write_row(&self, k: &mut Kernel, (buffers, sizes): (&[Buf], &[Val]), width: Val, row: RowInRegisters) {
        self.write_rows(k, (buffers, sizes), width, vec![row]);
    }

    /// Executes all operations on several rows in registers, which have the same columns.
    pub fn write_rows(
        &self,
        k: &mut Kernel,
        (buffers, sizes): (&[Buf], &[Val]),
        width: Val,
        rows: Vec<RowInRegisters>,
    ) {
        let (stages, rest) = self.stages(buffers, sizes);
        let summed = self.sum.as_ref().map(|sum| sum.input);
        let columns = rows[0].columns;
        let places: Vec<(Val, Val)> = rows.iter().map(|row| (row.batch, row.row)).collect();
        let indices: Vec<Vec<Val>> = places.iter().map(|&(batch, row)| self.indices(batch, row)).collect();
        let rows = indices.iter().zip(rows).map(|(indices, row)| (&indices[..], Some(row.lanes)));
        let rows: Vec<(&[Val], Option<elementwise::RegisterInput>)> = rows.collect();
        let sums = elementwise::write_rows(k, &stages, &rows, width, columns, summed);
        let Some(RowSum { mean, out, epilogue, .. }) = self.sum.as_deref() else { return };
        let share = mean.then(|| {
            let (one, width) = (k.float(1.0, F32), k.to_float(width));
            k.div(one, width)
        });
        for ((batch, row), lanes) in places.into_iter().zip(sums) {
            let place = if self.batched { k.eval(batch * rest[0] + row) } else { row };
            let out = out.map(|at| buffers[at]);
            RowSink { epilogue, buffers, sizes: &rest[1..], out, batch, row }.sum(k, place, lanes, share);
        }
    }

    /// Executes the companions of a row, after all other operations on it.
    fn write_companions(&self, k: &mut Kernel, (buffers, sizes): (&[Buf], &[Val]), (batch, row): (Val, Val)) {
        let (_, mut rest) = self.stages(buffers, sizes);
        for group in &self.companions {
            // The companions read what other lanes have stored.
            k.sync_lanes();
            let (width, sizes) = (rest[0], &rest[1..=group.expression.sizes]);
            rest = &rest[1 + group.expression.sizes..];
            let buffers = group.buffers.iter().map(|&at| buffers[at]).collect();
            let stage = elementwise::Stage {
                expression: &group.expression,
                buffers,
                sizes,
                producers: &[],
                stored: true,
                half: None,
            };
            let zero = k.index(0);
            elementwise::write_row(k, &[stage], &self.indices(batch, row), width, (zero, width), None, None);
        }
    }

    /// The groups with their buffers and sizes, and the remaining sizes.
    fn stages<'f>(&'f self, buffers: &[Buf], sizes: &'f [Val]) -> (Vec<elementwise::Stage<'f>>, &'f [Val]) {
        let mut rest = sizes;
        let stages = self.groups.iter().map(|group| {
            let (own, others) = rest.split_at(group.expression.sizes);
            rest = others;
            let half = group.half.map(|(half, at)| (half, buffers[at]));
            let buffers = group.buffers.iter().map(|&at| buffers[at]).collect();
            elementwise::Stage {
                expression: &group.expression,
                buffers,
                sizes: own,
                producers: &group.producers,
                stored: group.stored,
                half,
            }
        });
        (stages.collect(), rest)
    }

    /// Prefetches what [`Epilogue::write`] will read and write in the region.
    pub fn prefetch(
        &self,
        k: &mut Kernel,
        when: EpiloguePoint,
        (buffers, sizes): (&[Buf], &[Val]),
        (batch, width): (Val, Val),
        part: impl FnOnce(&mut Kernel) -> Region,
    ) {
        self.rows(k, when, (buffers, sizes), part, |k, stages, row, columns| {
            elementwise::prefetch_row(k, stages, &self.indices(batch, row), width, columns);
        });
    }

    fn rows(
        &self,
        k: &mut Kernel,
        when: EpiloguePoint,
        (buffers, sizes): (&[Buf], &[Val]),
        part: impl FnOnce(&mut Kernel) -> Region,
        row: impl FnOnce(&mut Kernel, &[elementwise::Stage], Val, (Val, Val)),
    ) {
        let early = self.groups.iter().take_while(|g| !g.expression.draws).count();
        let turn = match when {
            EpiloguePoint::AfterTile { .. } => 0..early,
            EpiloguePoint::AfterUnit => early..self.groups.len(),
        };
        if turn.is_empty() {
            return;
        }
        let (stages, _) = self.stages(buffers, sizes);
        let body = |k: &mut Kernel| {
            let ((first, rows), columns) = part(k);
            k.each(0, rows, 1, |k, at| {
                let at = k.eval(first + at);
                row(k, &stages[turn], at, columns);
            });
        };
        match when {
            EpiloguePoint::AfterTile { last } => k.when(last, body),
            EpiloguePoint::AfterUnit => body(k),
        }
    }
}

/// The destination of a kernel's rows: the result, if it is stored, and the epilogue.
pub struct RowSink<'a> {
    /// The operations on the rows.
    pub epilogue: &'a Epilogue,
    /// All of the kernel's buffers.
    pub buffers: &'a [Buf],
    /// The sizes of the epilogue.
    pub sizes: &'a [Val],
    /// The buffer of the result, if it is stored.
    pub out: Option<Buf>,
    /// The index of the batch.
    pub batch: Val,
    /// The index of the row in its batch.
    pub row: Val,
}

impl<'a> RowSink<'a> {
    /// The destination of row `row` of all batches, of which each has `rows` rows.
    pub fn of(
        k: &mut Kernel,
        epilogue: &'a Epilogue,
        (buffers, sizes): (&'a [Buf], &'a [Val]),
        out: Option<Buf>,
        (row, rows): (Val, Val),
    ) -> RowSink<'a> {
        let (batch, row) = if epilogue.batched { (k.div(row, rows), k.rem(row, rows)) } else { (row, row) };
        RowSink { epilogue, buffers, sizes, out, batch, row }
    }

    /// Computes the row at `span` of the result: `value` gives its lanes by their index in the result.
    pub fn fill(&self, k: &mut Kernel, span: Span, value: impl Fn(&mut Kernel, Val, Val) -> Val) {
        let lanes = |k: &mut Kernel, at: Val, mask: Val| {
            let place = k.eval(span.base + at);
            value(k, place, mask)
        };
        let columns = (k.index(0), span.length);
        let lanes =
            elementwise::RegisterInput { lanes: &lanes, to: self.out.map(|out| (out, span.base)), columns: None };
        let row = RowInRegisters { batch: self.batch, row: self.row, columns, lanes };
        self.epilogue.write_row(k, (self.buffers, self.sizes), span.length, row);
    }

    /// Reduces the lanes of a row's sum, and stores it at `place` of the result, a row of one column. For a mean,
    /// `share` is the factor of the sum.
    pub fn sum(&self, k: &mut Kernel, place: Val, lanes: Val, share: Option<Val>) {
        let mut sum = k.sum_lanes(lanes);
        if let Some(share) = share {
            sum = k.mul(sum, share);
        }
        let sum = k.splat(sum);
        let length = k.index(1);
        self.fill(k, Span { base: place, length }, |_, _, _| sum);
        self.epilogue.write_companions(k, (self.buffers, self.sizes), (self.batch, self.row));
    }
}

/// A region of a product's result: its first row and the number of rows, and its first column and the end of its
/// columns.
type Region = ((Val, Val), (Val, Val));

/// The point of a product's kernel at which its epilogue runs. A finished tile is still in the L1 cache, and its stores
/// overlap with the computation of the next tile. Groups with dropout wait for the end of the unit, because one call of
/// the random generator covers more columns than a tile has.
#[derive(Clone, Copy)]
pub enum EpiloguePoint {
    /// After a tile, if `last` holds: the block of k was the last one.
    AfterTile {
        /// Whether the tile is finished.
        last: Val,
    },
    /// After all tiles of a unit.
    AfterUnit,
}
