//! Work element by element on a product, done by the product's kernel: a unit has its part of the result in the cache
//! when the last block of k is in, and goes over it row by row. On a GPU a warp has rows of its tile in shared memory.
//!
//! ```text
//! u = x @ W + b,  a = gelu(u)          one kernel, which writes u and a; x @ W alone is not written
//! ```
//!
//! A group (see [`super::map`]) joins the last of the products among its leaves. Rows that are normalized or summed up
//! take along what follows them in the same way, in registers on either machine.

use peft_grammar::graph::{Graph, Node, Op, Value};
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::kernel::{Buf, Kernel, Val};
use super::span::Span;
use super::{Lowering, map, usage};

/// Groups of one product, at most.
const MOST: usize = 3;

/// What a product's kernel does with its result, and what it gets for that.
#[derive(Default)]
pub(super) struct Epilogue {
    groups: Vec<Group>,
    /// The product has an axis of batches, and who works on its rows asks for both indices.
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
    /// By leaf, which of the groups before makes it; what is in registers itself counts as the first.
    made: Vec<Option<usize>>,
}

/// A row in registers: where it is among all rows, its columns from where to where, and the way to its lanes.
pub(super) struct HeldRow<'a> {
    pub batch: Val,
    pub row: Val,
    pub columns: (Val, Val),
    pub lanes: map::Given<'a>,
}

impl Epilogue {
    /// What the kernel's name says of it.
    pub fn suffix(&self) -> String {
        let batched = if self.batched { "_batched" } else { "" };
        self.groups.iter().fold(batched.to_string(), |name, group| {
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

    /// All groups on a row in registers.
    pub fn write_row(&self, k: &mut Kernel, (buffers, sizes): (&[Buf], &[Val]), width: Val, row: HeldRow) {
        let HeldRow { batch, row, columns, lanes } = row;
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

/// Where a kernel's rows go: to memory, if they stay, and to what follows.
pub(super) struct Follow<'a> {
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
            let place = k.add(span.base, at);
            let y = value(k, place, mask);
            if let Some(out) = self.out {
                k.store_lanes(y, out, place, mask);
            }
            y
        };
        let columns = (k.index(0), span.length);
        let lanes = map::Given { lanes: &lanes, columns: None };
        let row = HeldRow { batch: self.batch, row: self.row, columns, lanes };
        self.epilogue.write_row(k, (self.buffers, self.sizes), span.length, row);
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

/// The graph with products put off until what follows them is computed: then more of that joins the last of them.
pub(super) fn put_off(graph: &Graph) -> Graph {
    let (uses, readers) = usage(graph);
    let groups = map::group(graph, &uses);
    // By node, before which one it stands.
    let place = |at: usize| {
        let Node { op, result, .. } = &graph.nodes[at];
        let readers = &readers[result.0 as usize];
        let follow = readers.iter().all(|&reader| map::maps(&graph.nodes[reader].op));
        let first = readers.iter().map(|&reader| groups.root(reader)).min();
        first.filter(|_| matches!(op, Op::Matmul { .. }) && follow).unwrap_or(at)
    };
    let mut order: Vec<usize> = (0..graph.nodes.len()).collect();
    order.sort_by_key(|&at| (place(at), at));
    let mut graph = graph.clone();
    graph.nodes = order.into_iter().map(|at| graph.nodes[at].clone()).collect();
    graph
}

impl Lowering<'_, '_, '_> {
    /// The groups that node `at` takes along, in their order. What else they read is there already.
    pub(super) fn followers(&self, at: usize) -> Vec<usize> {
        let Node { op, operands, result: product, .. } = &self.graph.nodes[at];
        let (product, ty) = (*product, self.ty(*product));
        let mut roots = vec![];
        // Leading axes are batches, of which an index has one.
        let batches = !matches!(op, Op::Matmul { .. }) || ty.rank() == self.ty(operands[1]).rank();
        let placed = matches!(ty.rank(), 2 | 3) && !ty.ragged() && batches;
        if !self.target.epilogues || self.frozen.is_some() || self.wanted.contains_key(&product) || !placed {
            return roots;
        }
        let mut made = vec![product];
        let there = |v: &Value, made: &[Value]| {
            made.contains(v) || self.groups.maker(*v).is_none_or(|n| n < at || self.joined.contains(&n))
        };
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

    /// A place for `result`, which node `at` computes in registers, and the groups that follow; whether it is written.
    pub(super) fn held(&mut self, at: usize) -> (Vec<usize>, bool) {
        let result = self.graph.nodes[at].result;
        let followers = self.followers(at);
        let stays = !self.serves(result, &followers);
        if !stays {
            // What is never written has a place all the same: that of what is made of it.
            let (buffer, view) = self.target(self.graph.nodes[followers[0]].result);
            self.show(result, buffer, view);
        }
        (followers, stays)
    }

    /// The groups of `roots` as the kernel of `product` takes them, whose own buffers are `own`; if it has it in
    /// `registers`, they do not read it.
    pub(super) fn epilogue(
        &mut self,
        product: Value,
        roots: &[usize],
        own: &[BufferId],
        registers: bool,
    ) -> Result<Epilogue, String> {
        let batched = self.ty(product).rank() == 3 && (registers || !roots.is_empty());
        let mut epilogue = Epilogue { batched, ..Epilogue::default() };
        for &root in roots {
            let map = self.expression(root, true, None)?;
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
