//! Work element by element on a product, done by the product's kernel: a unit has its part of the result in the cache
//! when the last block of k is in, and goes over it row by row. On a GPU a warp has rows of its tile in shared memory.
//!
//! ```text
//! u = x @ W + b,  a = gelu(u)          one kernel, which writes u and a; x @ W alone is not written
//! ```
//!
//! A group (see [`super::map`]) joins the last of the products among its leaves.

use peft_grammar::graph::{Node, Value};
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::kernel::{Buf, Kernel, Val};
use super::{Lowering, map};
use crate::machine::Machine;

/// Groups of one product, at most.
const MOST: usize = 3;

/// What a product's kernel does with its result, and what it gets for that.
#[derive(Default)]
pub(super) struct Epilogue {
    groups: Vec<Group>,
    /// The product has an axis of batches.
    batched: bool,
    /// Beyond the product's own.
    pub buffers: Vec<BufferId>,
    pub elements: Vec<Element>,
    pub sizes: Vec<Extent>,
}

struct Group {
    form: map::Form,
    /// Which of the kernel's buffers are the group's, and how many of the sizes.
    buffers: Vec<usize>,
    sizes: usize,
    result: Value,
    /// By leaf, which of the groups before makes it; on a GPU the product counts as the first.
    made: Vec<Option<usize>>,
}

/// A row of a tile that a warp writes: where it is among the product's rows, its columns from where to where and how
/// many at most, and the way to its lanes.
pub(super) struct TileRow<'a> {
    pub batch: Val,
    pub row: Val,
    pub columns: (Val, Val),
    pub lanes: map::Given<'a>,
}

impl Epilogue {
    /// What the kernel's name says of it.
    pub fn suffix(&self) -> String {
        self.groups.iter().fold(String::new(), |name, group| {
            let places = group.buffers.iter().enumerate().map(|(i, at)| match group.made.get(i) {
                Some(Some(stage)) => format!("made{stage}"),
                _ => at.to_string(),
            });
            format!("{name}_{}_{}", group.form.name(), places.collect::<Vec<_>>().join("_"))
        })
    }

    /// For profiles.
    pub fn label(&self, product: &str) -> String {
        self.groups.iter().fold(product.to_string(), |label, group| format!("{label}+{}", group.form.label()))
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
            map::write_row(k, stages, &self.indices(batch, row), width, columns, None);
        });
    }

    /// Of a row.
    fn indices(&self, batch: Val, row: Val) -> Vec<Val> {
        if self.batched { vec![batch, row] } else { vec![row] }
    }

    /// All groups on a row of a GPU's tile.
    pub fn write_tile(&self, k: &mut Kernel, (buffers, sizes): (&[Buf], &[Val]), width: Val, row: TileRow) {
        let TileRow { batch, row, columns, lanes } = row;
        let stages = self.stages(buffers, sizes);
        map::write_row(k, &stages, &self.indices(batch, row), width, columns, Some(lanes));
    }

    fn stages<'f>(&'f self, buffers: &[Buf], sizes: &'f [Val]) -> Vec<map::Stage<'f>> {
        let mut rest = sizes;
        let stages = self.groups.iter().map(|group| {
            let (own, others) = rest.split_at(group.sizes);
            rest = others;
            let buffers = group.buffers.iter().map(|&at| buffers[at]).collect();
            map::Stage { form: &group.form, buffers, sizes: own, made: &group.made }
        });
        stages.collect()
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
        let early = self.groups.iter().take_while(|g| !g.form.draws()).count();
        let turn = match when {
            When::Tile { .. } => 0..early,
            When::Unit => early..self.groups.len(),
        };
        if turn.is_empty() {
            return;
        }
        let stages = self.stages(buffers, sizes);
        let body = |k: &mut Kernel| {
            let ((first, rows), columns) = part(k);
            let zero = k.index(0);
            k.each(zero, rows, 1, |k, at| {
                let at = k.add(first, at);
                row(k, &stages[turn], at, columns);
            });
        };
        match when {
            When::Tile { last } => k.when(last, body),
            When::Unit => body(k),
        }
    }
}

/// Of a product's result: the first row and how many, and columns from where to where.
type Part = ((Val, Val), (Val, Val));

/// A tile that is written is in the nearest cache, and what is stored for it goes to memory while the next one is
/// computed. The generator draws for more columns than a tile has, so groups with dropout wait for the unit's end.
#[derive(Clone, Copy)]
pub(super) enum When {
    /// A tile stands, if the block along k was the last.
    Tile {
        last: Val,
    },
    Unit,
}

impl Lowering<'_, '_, '_> {
    /// The groups that the product of node `at` takes along, in their order. What else they read is there already.
    pub(super) fn followers(&self, at: usize) -> Vec<usize> {
        let Node { operands, result: product, .. } = &self.graph.nodes[at];
        let (product, ty) = (*product, self.ty(*product));
        let mut roots = vec![];
        // Leading axes are batches, of which an index has one.
        let placed = ty.rank() <= 3 && ty.rank() == self.ty(operands[1]).rank();
        if !self.target.epilogues || self.frozen.is_some() || self.wanted.contains_key(&product) || !placed {
            return roots;
        }
        let mut made = vec![product];
        let there = |v: &Value, made: &[Value]| made.contains(v) || self.groups.maker(*v).is_none_or(|n| n < at);
        while roots.len() < MOST {
            let readers = made.iter().flat_map(|v| &self.readers[v.0 as usize]);
            let readers = readers.filter(|&&node| map::maps(&self.graph.nodes[node].op));
            let next = readers.map(|&node| self.groups.root(node)).filter(|root| {
                let alike = self.ty(self.graph.nodes[*root].result) == ty;
                let leaves = self.groups.leaves(self.graph, *root);
                alike && !self.joined.contains(root) && !roots.contains(root) && leaves.iter().all(|v| there(v, &made))
            });
            let Some(root) = next.min() else { break };
            roots.push(root);
            made.push(self.graph.nodes[root].result);
        }
        roots
    }

    /// Nothing but the groups of `roots` reads `product`.
    pub(super) fn serves(&self, product: Value, roots: &[usize]) -> bool {
        let readers = self.readers[product.0 as usize].iter();
        readers.filter(|&&node| roots.contains(&self.groups.root(node))).count() == self.uses[product.0 as usize]
    }

    /// The groups of `roots` as the kernel of `product` takes them, whose own buffers are `own`.
    pub(super) fn epilogue(&mut self, product: Value, roots: &[usize], own: &[BufferId]) -> Result<Epilogue, String> {
        let mut epilogue = Epilogue { batched: self.ty(product).rank() == 3, ..Epilogue::default() };
        let registers = matches!(self.target.machine, Machine::Cuda(_));
        for &root in roots {
            let map = self.expression(root, true)?;
            let early = epilogue.groups.iter().take_while(|g| !g.form.draws()).count();
            let turn = match registers {
                false if epilogue.groups.len() > early || map.form.draws() => early,
                _ => 0,
            };
            let maker = |v: &Value| {
                let results = epilogue.groups[turn..].iter().map(|g| g.result);
                registers.then_some(product).into_iter().chain(results).position(|made| made == *v)
            };
            let made = map.arrays.iter().map(maker).collect();
            let result = self.graph.nodes[root].result;
            let mut buffers = vec![];
            for (buffer, element) in map.buffers.into_iter().zip(map.elements) {
                let known = own.iter().chain(&epilogue.buffers).position(|&b| b == buffer);
                buffers.push(known.unwrap_or(own.len() + epilogue.buffers.len()));
                if known.is_none() {
                    epilogue.buffers.push(buffer);
                    epilogue.elements.push(element);
                }
            }
            epilogue.groups.push(Group { form: map.form, buffers, sizes: map.sizes.len(), result, made });
            epilogue.sizes.extend(map.sizes);
            self.joined.insert(root);
        }
        Ok(epilogue)
    }
}
