//! Work element by element on a product, done by the product's kernel: a unit has its part of the result in the cache
//! when the last block of k is in, and goes over it row by row. On a GPU a warp has rows of its tile in shared memory.
//!
//! ```text
//! u = x @ W + b,  a = gelu(u)          one kernel, which writes u and a; x @ W alone is not written
//! ```
//!
//! A group (see [`super::map`]) joins the last of the products among its leaves. Rows that are normalized or summed up
//! take along what follows them in the same way, in registers on either machine. Where a tile has a product's rows whole,
//! their sums are made there as well, and what follows those:
//!
//! ```text
//! λ = σ(Σ q (q + x @ W) − lse)         one kernel, which writes λ
//! ```

use std::collections::BTreeSet;

use peft_grammar::graph::{Graph, Node, Op, Value};
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::kernel::matrix::Half;
use super::kernel::{Buf, F32, Kernel, Val};
use super::span::Span;
use super::view::View;
use super::{Lowering, dim_extent, map, usage};
use crate::machine::Machine;

/// Groups of one product, at most.
const MOST: usize = 3;

/// Operations that a group in a sum's kernel may be ahead of its turn: what the backward pass computes anew is not to wait
/// in memory all the way.
const AHEAD: usize = 32;

/// What stands before a row's sum in a kernel's name.
pub(super) const ROW: &str = "_row_";

/// What a product's kernel does with its result, and what it gets for that.
#[derive(Default)]
pub(super) struct Epilogue {
    groups: Vec<Group>,
    sum: Option<Box<Sum>>,
    /// What a sum's kernel does beside, each with its width in front of its sizes.
    companions: Vec<Group>,
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
    /// It is written; else only what comes after it in the kernel reads it.
    stays: bool,
    /// It is written in half precision, for products: to which of the kernel's buffers.
    half: Option<(Half, usize)>,
}

/// The sum of a row, and what follows that.
struct Sum {
    /// Of what among the values made, the product being the first.
    of: usize,
    mean: bool,
    /// Which of the kernel's buffers it goes to, if it is written.
    out: Option<usize>,
    then: Epilogue,
}

/// What the kernel of a node takes along.
pub(super) struct Taken {
    at: usize,
    /// That of the node whose kernel it is.
    turn: usize,
    /// Groups, by their roots.
    pub followers: Vec<usize>,
    /// A sum over rows, and what that takes along.
    sum: Option<Box<Taken>>,
    /// The node's own result is written.
    pub stays: bool,
}

impl Taken {
    pub fn groups(at: usize, turn: usize, followers: Vec<usize>) -> Taken {
        Taken { at, turn, followers, sum: None, stays: true }
    }

    pub fn is_empty(&self) -> bool {
        self.all().is_empty()
    }

    /// The groups and the sum, whose turn is then over.
    fn all(&self) -> Vec<usize> {
        self.followers.iter().copied().chain(self.sum.iter().map(|sum| sum.at)).collect()
    }
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
        let groups = self.groups.iter().fold(batched.to_string(), |name, group| {
            let (last, read) = group.buffers.split_last().expect("a result");
            let places = read.iter().enumerate().map(|(i, at)| match group.made.get(i) {
                Some(Some(stage)) => format!("made{stage}"),
                _ => at.to_string(),
            });
            let out = if group.stays { last.to_string() } else { "passed".into() };
            let half = group.half.map(|(half, at)| format!("{}{at}", half.name()));
            let places: Vec<String> = places.chain([out]).chain(half).collect();
            format!("{name}_{}_{}", group.form.name(), places.join("_"))
        });
        let groups = self.companions.iter().fold(groups, |name, group| {
            let places: Vec<String> = group.buffers.iter().map(|at| at.to_string()).collect();
            format!("{name}_beside_{}_{}", group.form.name(), places.join("_"))
        });
        let Some(Sum { of, mean, out, then }) = self.sum.as_deref() else { return groups };
        let kind = if *mean { "mean" } else { "sum" };
        let out = out.map_or("passed".into(), |at| at.to_string());
        format!("{groups}{ROW}{kind}_made{of}_{out}{}", then.suffix())
    }

    /// Something that follows drops numbers.
    pub fn draws(&self) -> bool {
        self.groups.iter().any(|group| group.form.draws()) || self.sum.as_ref().is_some_and(|sum| sum.then.draws())
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
            let place = if self.batched { k.mul(batch, rest[0]) } else { k.index(0) };
            let place = k.add(place, row);
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
            let (width, sizes) = (rest[0], &rest[1..=group.sizes]);
            rest = &rest[1 + group.sizes..];
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
            let (own, others) = rest.split_at(group.sizes);
            rest = others;
            let half = group.half.map(|(half, at)| (half, buffers[at]));
            let buffers = group.buffers.iter().map(|&at| buffers[at]).collect();
            map::Stage { form: &group.form, buffers, sizes: own, made: &group.made, stays: group.stays, half }
        });
        (stages.collect(), rest)
    }

    /// Which of the kernel's buffers it is, the first of which are its `own`.
    fn number(&mut self, own: &[BufferId], buffer: BufferId, element: Element) -> usize {
        let known = own.iter().chain(&self.buffers).position(|&b| b == buffer);
        known.unwrap_or_else(|| {
            self.buffers.push(buffer);
            self.elements.push(element);
            own.len() + self.buffers.len() - 1
        })
    }

    fn numbers(&mut self, own: &[BufferId], buffers: impl Iterator<Item = (BufferId, Element)>) -> Vec<usize> {
        buffers.map(|(buffer, element)| self.number(own, buffer, element)).collect()
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
        let (stages, _) = self.stages(buffers, sizes);
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
    graph.reorder(&order);
    graph
}

impl Lowering<'_, '_, '_> {
    /// The kernel of node `at` may take along what follows.
    fn leads(&self, at: usize) -> bool {
        let Node { op, operands, result, .. } = &self.graph.nodes[at];
        let ty = self.ty(*result);
        // Leading axes are batches, of which an index has one.
        let batches = !matches!(op, Op::Matmul { .. }) || ty.rank() == self.ty(operands[1]).rank();
        let placed = matches!(ty.rank(), 2 | 3) && !ty.ragged() && batches;
        self.target.epilogues && self.frozen.is_none() && !self.wanted.contains_key(result) && placed
    }

    /// It is computed before it is the `turn` of a node.
    fn there(&self, value: Value, turn: usize) -> bool {
        let done = self.groups.maker(value).is_none_or(|n| n < turn || self.joined.contains(&n));
        done && self.places[value.0 as usize].is_some()
    }

    /// Groups that a GPU's kernel of a sum does beside: over the same rows, however wide, if they read some of what goes
    /// into it or comes of it, and nothing that is not there.
    fn companions(&self, Taken { at, turn, followers, .. }: &Taken) -> Vec<usize> {
        let Node { op, operands, result, .. } = &self.graph.nodes[*at];
        if !matches!(op, Op::Reduce { .. }) || !self.leads(*at) || matches!(self.target.machine, Machine::Cpu(_)) {
            return vec![];
        }
        let lead = |v: Value| self.ty(v).shape.split_last().map(|(_, lead)| lead);
        let leaves = |root: usize| self.groups.leaves(self.graph, root);
        let mut known = vec![*result];
        known.extend(followers.iter().map(|&root| self.graph.nodes[root].result));
        match self.groups.maker(operands[0]).filter(|&root| map::maps(&self.graph.nodes[root].op)) {
            Some(root) => known.extend(leaves(root)),
            None => known.push(operands[0]),
        }
        let readers = known.iter().filter(|&&v| lead(v) == lead(*result)).flat_map(|v| &self.readers[v.0 as usize]);
        let maps = readers.filter(|&&reader| map::maps(&self.graph.nodes[reader].op));
        let roots = maps.map(|&reader| self.groups.root(reader));
        let roots: BTreeSet<usize> = roots.filter(|root| (*turn..at + AHEAD).contains(root)).collect();
        let free = roots.into_iter().filter(|&root| {
            let own = self.graph.nodes[root].result;
            let alike = lead(own) == lead(*result) && !self.ty(own).ragged() && !self.summed(root);
            let there = |v| v == *result || self.there(v, *turn);
            alike && !self.joined.contains(&root) && leaves(root).into_iter().all(there)
        });
        free.take(MOST).collect()
    }

    /// The groups that node `at` takes along, in their order, when it is the `turn` of a node. What else they read is
    /// there by then.
    pub(super) fn followers(&self, at: usize, turn: usize) -> Vec<usize> {
        let product = self.graph.nodes[at].result;
        let ty = self.ty(product);
        let mut roots = vec![];
        if !self.leads(at) {
            return roots;
        }
        let mut made = vec![product];
        while roots.len() < MOST {
            let readers = made.iter().flat_map(|v| &self.readers[v.0 as usize]);
            let readers = readers.filter(|&&node| map::maps(&self.graph.nodes[node].op));
            let next = readers.map(|&node| self.groups.root(node)).filter(|root| {
                let alike = self.ty(self.graph.nodes[*root].result) == ty;
                let leaves = self.groups.leaves(self.graph, *root);
                alike
                    && !self.joined.contains(root)
                    && !roots.contains(root)
                    && leaves.iter().all(|v| made.contains(v) || self.there(*v, turn))
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

    /// What node `at` takes along when it is the `turn` of a node, if it is computed in registers, and a place for it;
    /// if those hold `whole` rows, a sum of them as well.
    pub(super) fn taken(&mut self, at: usize, turn: usize, whole: bool) -> Taken {
        let result = self.graph.nodes[at].result;
        let mut taken = Taken::groups(at, turn, self.followers(at, turn));
        if whole && self.leads(at) {
            let made = [result].into_iter().chain(taken.followers.iter().map(|&root| self.graph.nodes[root].result));
            let readers = made.flat_map(|v| &self.readers[v.0 as usize]).copied();
            let sum = readers.filter(|at| self.sums_rows(*at) && !self.joined.contains(at)).min();
            taken.sum = sum.map(|sum| Box::new(self.taken(sum, turn, false)));
        }
        if let Some(sum) = taken.sum.as_ref().filter(|sum| sum.stays) {
            self.result(self.graph.nodes[sum.at].result);
        }
        taken.stays = !self.serves(result, &taken.all());
        if !taken.stays {
            // What is never written has a place all the same: that of what is made of it.
            let written = taken.followers.iter().find(|&&root| self.written(root, &taken));
            let (buffer, view) = match (written, &taken.sum) {
                (Some(&root), _) => self.target(self.graph.nodes[root].result),
                (None, Some(sum)) => {
                    (self.place(self.graph.nodes[sum.at].result).buffer, View::dense(&self.ty(result).shape))
                }
                (None, None) => unreachable!("something reads it"),
            };
            self.show(result, buffer, view);
        }
        taken
    }

    /// Whether the group of `root` is written: what a sum is of may be nobody else's.
    fn written(&self, root: usize, taken: &Taken) -> bool {
        taken.sum.is_none() || !self.serves(self.graph.nodes[root].result, &taken.all())
    }

    /// What a kernel takes along, whose own buffers are `own`; if it has its result in `registers`, the groups do not
    /// read it.
    pub(super) fn epilogue(&mut self, taken: &Taken, own: &[BufferId], registers: bool) -> Result<Epilogue, String> {
        let product = self.graph.nodes[taken.at].result;
        let batched = self.ty(product).rank() == 3 && (registers || !taken.followers.is_empty());
        let mut epilogue = Epilogue { batched, ..Epilogue::default() };
        for &root in &taken.followers {
            let result = self.graph.nodes[root].result;
            let rounds = self.rounds(result).filter(|_| registers);
            let stays = self.written(root, taken) && !matches!(rounds, Some((_, true)));
            let nowhere = (!stays).then(|| self.place(product).buffer);
            if let Some(buffer) = nowhere {
                self.show(result, buffer, View::dense(&self.ty(result).shape));
            }
            let map = self.expression(root, true, nowhere)?;
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
            let buffers = epilogue.numbers(own, map.buffers.into_iter().zip(map.elements));
            let half = rounds.filter(|_| self.place(result).view.is_none() || !stays).map(|(half, _)| {
                let room = self.room_rounded(result);
                (half, epilogue.number(own, room, Element::I32))
            });
            epilogue.groups.push(Group { form: map.form, buffers, sizes: map.sizes.len(), result, made, stays, half });
            epilogue.sizes.extend(map.sizes);
            self.joined.insert(root);
        }
        if let Some(sum) = &taken.sum {
            let graph = self.graph;
            let Node { op, operands, result, .. } = &graph.nodes[sum.at];
            let made = [product].into_iter().chain(epilogue.groups.iter().map(|g| g.result));
            let of = made.into_iter().position(|made| made == operands[0]).expect("what it is of");
            let out = sum.stays.then(|| epilogue.number(own, self.place(*result).buffer, Element::F32));
            let mut then = self.epilogue(sum, &[own, &epilogue.buffers].concat(), true)?;
            epilogue.buffers.append(&mut then.buffers);
            epilogue.elements.append(&mut then.elements);
            let rows = self.ty(*result).shape.iter().rev().nth(1);
            epilogue.sizes.push(dim_extent(*rows.expect("rows of one column")));
            epilogue.sizes.append(&mut then.sizes);
            epilogue.sum = Some(Box::new(Sum { of, mean: matches!(op, Op::Reduce { mean: true, .. }), out, then }));
            self.joined.insert(sum.at);
        }
        for root in self.companions(taken) {
            let result = self.graph.nodes[root].result;
            let map = self.expression(root, true, None)?;
            let buffers = epilogue.numbers(own, map.buffers.into_iter().zip(map.elements));
            let (sizes, made) = (map.sizes.len(), vec![]);
            let group = Group { form: map.form, buffers, sizes, result, made, stays: true, half: None };
            epilogue.companions.push(group);
            epilogue.sizes.push(dim_extent(*self.ty(result).shape.last().expect("rows")));
            epilogue.sizes.extend(map.sizes);
            self.joined.insert(root);
        }
        Ok(epilogue)
    }
}
