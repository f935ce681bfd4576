//! Work element by element on a product, done by the product's kernel: a unit has its part of the result in the cache
//! when the last block of k is in, and goes over it row by row.
//!
//! ```text
//! u = x @ W + b,  a = gelu(u)          one kernel, which writes u and a; x @ W alone is not written
//! ```
//!
//! A group (see [`super::map`]) joins the last of the products among its leaves.

use peft_grammar::graph::Value;
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::kernel::{Buf, Kernel, Val};
use super::{Lowering, map};

/// Groups of one product, at most.
const MOST: usize = 3;

/// What a product's kernel does with its result, and what it gets for that.
#[derive(Default)]
pub(super) struct Epilogue {
    groups: Vec<Group>,
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
    /// By leaf, which of the groups before makes it.
    made: Vec<Option<usize>>,
}

impl Epilogue {
    /// What the kernel's name says of it.
    pub fn suffix(&self) -> String {
        self.groups.iter().fold(String::new(), |name, group| {
            let made = |i: usize| group.made.get(i).is_some_and(|m| m.is_some());
            let places = group.buffers.iter().enumerate();
            let places = places.map(|(i, at)| if made(i) { "made".into() } else { at.to_string() });
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
        width: Val,
        part: impl FnOnce(&mut Kernel) -> Part,
    ) {
        self.rows(k, when, (buffers, sizes), part, |k, stages, row, columns| {
            map::write_row(k, stages, &[row], width, columns);
        });
    }

    /// Fetches what [`Epilogue::write`] will read and write there.
    pub fn prefetch(
        &self,
        k: &mut Kernel,
        when: When,
        (buffers, sizes): (&[Buf], &[Val]),
        width: Val,
        part: impl FnOnce(&mut Kernel) -> Part,
    ) {
        self.rows(k, when, (buffers, sizes), part, |k, stages, row, columns| {
            map::prefetch_row(k, stages, &[row], width, columns);
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
        let mut rest = sizes;
        let stages = self.groups.iter().map(|group| {
            let (own, others) = rest.split_at(group.sizes);
            rest = others;
            let buffers = group.buffers.iter().map(|&at| buffers[at]).collect();
            map::Stage { form: &group.form, buffers, sizes: own, made: &group.made }
        });
        let stages: Vec<map::Stage> = stages.collect();
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
        let product = self.graph.nodes[at].result;
        let ty = self.ty(product);
        let mut roots = vec![];
        if !self.target.epilogues || self.frozen.is_some() || self.wanted.contains_key(&product) || ty.rank() != 2 {
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

    /// The groups of `roots` as a product's kernel takes them, whose own buffers are `own`.
    pub(super) fn epilogue(&mut self, roots: &[usize], own: &[BufferId]) -> Result<Epilogue, String> {
        let mut epilogue = Epilogue::default();
        for &root in roots {
            let map = self.expression(root, true)?;
            let early = epilogue.groups.iter().take_while(|g| !g.form.draws()).count();
            let turn = if epilogue.groups.len() > early || map.form.draws() { early } else { 0 };
            let maker = |v: &Value| epilogue.groups[turn..].iter().position(|g| g.result == *v);
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
