//! Work element by element on the rows of a larger kernel's result, done by that kernel while it has them: in the cache,
//! in a GPU's shared memory, or in registers. Where it has a row whole, its sum is made there as well, and what follows
//! that.

use std::collections::BTreeMap;

use peft_runtime::artifact::Element;

use super::elementwise::{self as map, Expression};
use super::span::Span;
use crate::builder::mma::Half;
use crate::builder::{Buf, Code, F32, Kernel, Val, define};
use crate::target::Machine;

/// What a kernel does with its result. Its buffers and sizes come after the kernel's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Epilogue {
    pub groups: Vec<Group>,
    pub sum: Option<Box<Sum>>,
    /// What a sum's kernel does beside, each with its width in front of its sizes.
    pub companions: Vec<Group>,
    /// The result has an axis of batches, and who works on its rows asks for both indices.
    pub batched: bool,
}

/// An expression on the rows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    pub form: Expression,
    /// Which of the kernel's buffers are the expression's.
    pub buffers: Vec<usize>,
    /// By leaf, which of the groups before makes it; what is in registers itself counts as the first.
    pub made: Vec<Option<usize>>,
    /// It is written; else only what comes after it in the kernel reads it.
    pub stays: bool,
    /// It is written in half precision, for products: to which of the kernel's buffers.
    pub half: Option<(Half, usize)>,
}

/// The sum of a row, and what follows that.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sum {
    /// Of what among the values made, the product being the first.
    pub of: usize,
    pub mean: bool,
    /// Which of the kernel's buffers it goes to, if it is written.
    pub out: Option<usize>,
    pub then: Epilogue,
}

/// A row in registers: where it is among all rows, its columns from where to where, and the way to its lanes.
pub struct HeldRow<'a> {
    pub batch: Val,
    pub row: Val,
    pub columns: (Val, Val),
    pub lanes: map::Given<'a>,
}

impl Epilogue {
    /// Nothing follows.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.companions.is_empty() && self.sum.is_none()
    }

    /// Of the buffers beyond the kernel's own, of which there are `own`.
    fn elements(&self, own: usize) -> Vec<Element> {
        let mut elements = BTreeMap::new();
        self.note_elements(&mut elements);
        elements.range(own..).map(|(_, element)| *element).collect()
    }

    fn note_elements(&self, elements: &mut BTreeMap<usize, Element>) {
        for group in self.groups.iter().chain(&self.companions) {
            elements.extend(group.buffers.iter().copied().zip(group.form.elements()));
            elements.extend(group.half.map(|(_, at)| (at, Element::I32)));
        }
        if let Some(sum) = &self.sum {
            elements.extend(sum.out.map(|at| (at, Element::F32)));
            sum.then.note_elements(elements);
        }
    }

    /// A kernel of such buffers and so many sizes of its own, and those of what follows behind them: `body` gets all
    /// buffers, its own sizes, and those of what follows.
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

    /// How many sizes there are beyond the kernel's own.
    fn sizes(&self) -> usize {
        let groups: usize = self.groups.iter().map(|group| group.form.sizes).sum();
        let companions: usize = self.companions.iter().map(|group| 1 + group.form.sizes).sum();
        groups + companions + self.sum.as_ref().map_or(0, |sum| 1 + sum.then.sizes())
    }

    /// Something that follows drops numbers.
    pub fn draws(&self) -> bool {
        self.groups.iter().any(|group| group.form.draws) || self.sum.as_ref().is_some_and(|sum| sum.then.draws())
    }

    /// For profiles.
    pub fn label(&self, product: &str) -> String {
        let groups = self.groups.iter().chain(&self.companions);
        let groups = groups.fold(product.to_string(), |label, group| format!("{label}+{}", group.form.label()));
        self.sum.iter().fold(groups, |label, sum| sum.then.label(&format!("{label}+reduce")))
    }

    /// The groups whose turn it is, on the part of the result that `part` gives: its first row and how many, and its
    /// columns from where to where; a row is `width` wide. `sizes` are the groups' own.
    pub fn write(
        &self,
        k: &mut Kernel,
        when: When,
        (buffers, sizes): (&[Buf], &[Val]),
        (batch, width): (Val, Val),
        part: impl FnOnce(&mut Kernel) -> Part,
    ) {
        self.rows(k, when, (buffers, sizes), part, |k, stages, row, columns| {
            map::write_row(k, stages, &self.indices(batch, row), width, columns, None, None);
        });
    }

    /// Of a row.
    fn indices(&self, batch: Val, row: Val) -> Vec<Val> {
        if self.batched { vec![batch, row] } else { vec![row] }
    }

    /// All groups on a row in registers.
    pub fn write_row(&self, k: &mut Kernel, (buffers, sizes): (&[Buf], &[Val]), width: Val, row: HeldRow) {
        self.write_rows(k, (buffers, sizes), width, vec![row]);
    }

    /// The same on several, of the same columns.
    pub fn write_rows(&self, k: &mut Kernel, (buffers, sizes): (&[Buf], &[Val]), width: Val, rows: Vec<HeldRow>) {
        let (stages, rest) = self.stages(buffers, sizes);
        let summed = self.sum.as_ref().map(|sum| sum.of);
        let columns = rows[0].columns;
        let places: Vec<(Val, Val)> = rows.iter().map(|row| (row.batch, row.row)).collect();
        let indices: Vec<Vec<Val>> = places.iter().map(|&(batch, row)| self.indices(batch, row)).collect();
        let rows = indices.iter().zip(rows).map(|(indices, row)| (&indices[..], Some(row.lanes)));
        let rows: Vec<(&[Val], Option<map::Given>)> = rows.collect();
        let sums = map::write_rows(k, &stages, &rows, width, columns, summed);
        let Some(Sum { mean, out, then, .. }) = self.sum.as_deref() else { return };
        let share = mean.then(|| {
            let (one, width) = (k.float(1.0, F32), k.to_float(width));
            k.div(one, width)
        });
        for ((batch, row), lanes) in places.into_iter().zip(sums) {
            let place = if self.batched { k.eval(batch * rest[0] + row) } else { row };
            let out = out.map(|at| buffers[at]);
            Follow { epilogue: then, buffers, sizes: &rest[1..], out, batch, row }.sum(k, place, lanes, share);
        }
    }

    /// What a sum's kernel does beside, on a row of which all else is done.
    fn write_companions(&self, k: &mut Kernel, (buffers, sizes): (&[Buf], &[Val]), (batch, row): (Val, Val)) {
        let (_, mut rest) = self.stages(buffers, sizes);
        for group in &self.companions {
            // Other lanes have written what these read.
            k.settle();
            let (width, sizes) = (rest[0], &rest[1..=group.form.sizes]);
            rest = &rest[1 + group.form.sizes..];
            let buffers = group.buffers.iter().map(|&at| buffers[at]).collect();
            let stage = map::Stage { form: &group.form, buffers, sizes, made: &[], stays: true, half: None };
            let zero = k.index(0);
            map::write_row(k, &[stage], &self.indices(batch, row), width, (zero, width), None, None);
        }
    }

    /// With the sizes that are no group's.
    fn stages<'f>(&'f self, buffers: &[Buf], sizes: &'f [Val]) -> (Vec<map::Stage<'f>>, &'f [Val]) {
        let mut rest = sizes;
        let stages = self.groups.iter().map(|group| {
            let (own, others) = rest.split_at(group.form.sizes);
            rest = others;
            let half = group.half.map(|(half, at)| (half, buffers[at]));
            let buffers = group.buffers.iter().map(|&at| buffers[at]).collect();
            map::Stage { form: &group.form, buffers, sizes: own, made: &group.made, stays: group.stays, half }
        });
        (stages.collect(), rest)
    }

    /// Fetches what [`Epilogue::write`] will read and write there.
    pub fn prefetch(
        &self,
        k: &mut Kernel,
        when: When,
        (buffers, sizes): (&[Buf], &[Val]),
        (batch, width): (Val, Val),
        part: impl FnOnce(&mut Kernel) -> Part,
    ) {
        self.rows(k, when, (buffers, sizes), part, |k, stages, row, columns| {
            map::prefetch_row(k, stages, &self.indices(batch, row), width, columns);
        });
    }

    fn rows(
        &self,
        k: &mut Kernel,
        when: When,
        (buffers, sizes): (&[Buf], &[Val]),
        part: impl FnOnce(&mut Kernel) -> Part,
        row: impl FnOnce(&mut Kernel, &[map::Stage], Val, (Val, Val)),
    ) {
        let early = self.groups.iter().take_while(|g| !g.form.draws).count();
        let turn = match when {
            When::Tile { .. } => 0..early,
            When::Unit => early..self.groups.len(),
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
            When::Tile { last } => k.when(last, body),
            When::Unit => body(k),
        }
    }
}

/// Where a kernel's rows go: to memory, if they stay, and to what follows.
pub struct Follow<'a> {
    pub epilogue: &'a Epilogue,
    /// The kernel's, and the epilogue's sizes.
    pub buffers: &'a [Buf],
    pub sizes: &'a [Val],
    pub out: Option<Buf>,
    pub batch: Val,
    pub row: Val,
}

impl<'a> Follow<'a> {
    /// `rows` are those of a batch.
    pub fn of(
        k: &mut Kernel,
        epilogue: &'a Epilogue,
        (buffers, sizes): (&'a [Buf], &'a [Val]),
        out: Option<Buf>,
        (row, rows): (Val, Val),
    ) -> Follow<'a> {
        let (batch, row) = if epilogue.batched { (k.div(row, rows), k.rem(row, rows)) } else { (row, row) };
        Follow { epilogue, buffers, sizes, out, batch, row }
    }

    /// The row at `span` of the result, from its lanes at a place.
    pub fn fill(&self, k: &mut Kernel, span: Span, value: impl Fn(&mut Kernel, Val, Val) -> Val) {
        let lanes = |k: &mut Kernel, at: Val, mask: Val| {
            let place = k.eval(span.base + at);
            value(k, place, mask)
        };
        let columns = (k.index(0), span.length);
        let lanes = map::Given { lanes: &lanes, to: self.out.map(|out| (out, span.base)), columns: None };
        let row = HeldRow { batch: self.batch, row: self.row, columns, lanes };
        self.epilogue.write_row(k, (self.buffers, self.sizes), span.length, row);
    }

    /// The row of one column at `place` of the result: what the lanes have of a sum, or of a mean with so large a
    /// `share` of each.
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

/// Of a product's result: the first row and how many, and columns from where to where.
type Part = ((Val, Val), (Val, Val));

/// A tile that is written is in the nearest cache, and what is stored for it goes to memory while the next one is
/// computed. The generator draws for more columns than a tile has, so groups with dropout wait for the unit's end.
#[derive(Clone, Copy)]
pub enum When {
    /// A tile stands, if the block along k was the last.
    Tile {
        last: Val,
    },
    Unit,
}
