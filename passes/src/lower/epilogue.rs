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
use peft_runtime::artifact::{BufferId, Extent};

use super::view::View;
use super::{Lowering, dim_extent, map, usage};
use crate::kernels::epilogue::{Epilogue, Group, Sum};
use crate::target::Machine;

/// Groups of one product, at most.
const MOST: usize = 3;

/// Operations that a group in a sum's kernel may be ahead of its turn: what the backward pass computes anew is not to wait
/// in memory all the way.
const AHEAD: usize = 32;

/// An epilogue on its way, with its arguments.
#[derive(Default)]
pub(super) struct Following {
    pub epilogue: Epilogue,
    /// What its groups make.
    results: Vec<Value>,
    /// Beyond the kernel's own.
    pub buffers: Vec<BufferId>,
    pub sizes: Vec<Extent>,
}

impl Following {
    /// Which of the kernel's buffers it is, the first of which are its `own`.
    fn number(&mut self, own: &[BufferId], buffer: BufferId) -> usize {
        let known = own.iter().chain(&self.buffers).position(|&b| b == buffer);
        known.unwrap_or_else(|| {
            self.buffers.push(buffer);
            own.len() + self.buffers.len() - 1
        })
    }

    fn numbers(&mut self, own: &[BufferId], buffers: &[BufferId]) -> Vec<usize> {
        buffers.iter().map(|&buffer| self.number(own, buffer)).collect()
    }
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
    pub(super) fn epilogue(&mut self, taken: &Taken, own: &[BufferId], registers: bool) -> Result<Following, String> {
        let product = self.graph.nodes[taken.at].result;
        let batched = self.ty(product).rank() == 3 && (registers || !taken.followers.is_empty());
        let mut following = Following { epilogue: Epilogue { batched, ..Epilogue::default() }, ..Following::default() };
        for &root in &taken.followers {
            let result = self.graph.nodes[root].result;
            let rounds = self.rounds(result).filter(|_| registers);
            let stays = self.written(root, taken) && !matches!(rounds, Some((_, true)));
            let nowhere = (!stays).then(|| self.place(product).buffer);
            if let Some(buffer) = nowhere {
                self.show(result, buffer, View::dense(&self.ty(result).shape));
            }
            let map = self.expression(root, true, nowhere)?;
            let groups = &following.epilogue.groups;
            let early = groups.iter().take_while(|g| !g.form.draws).count();
            let turn = match registers {
                false if groups.len() > early || map.expression.draws => early,
                _ => 0,
            };
            let maker = |v: &Value| {
                let results = following.results[turn..].iter().copied();
                registers.then_some(product).into_iter().chain(results).position(|made| made == *v)
            };
            let made = map.arrays.iter().map(maker).collect();
            let buffers = following.numbers(own, &map.buffers);
            let half = rounds.filter(|_| self.place(result).view.is_none() || !stays).map(|(half, _)| {
                let room = self.room_rounded(result);
                (half, following.number(own, room))
            });
            following.epilogue.groups.push(Group { form: map.expression, buffers, made, stays, half });
            following.results.push(result);
            following.sizes.extend(map.sizes);
            self.joined.insert(root);
        }
        if let Some(sum) = &taken.sum {
            let graph = self.graph;
            let Node { op, operands, result, .. } = &graph.nodes[sum.at];
            let made = [product].into_iter().chain(following.results.iter().copied());
            let of = made.into_iter().position(|made| made == operands[0]).expect("what it is of");
            let out = sum.stays.then(|| following.number(own, self.place(*result).buffer));
            let then = self.epilogue(sum, &[own, &following.buffers].concat(), true)?;
            following.buffers.extend(then.buffers);
            let rows = self.ty(*result).shape.iter().rev().nth(1);
            following.sizes.push(dim_extent(*rows.expect("rows of one column")));
            following.sizes.extend(then.sizes);
            let mean = matches!(op, Op::Reduce { mean: true, .. });
            following.epilogue.sum = Some(Box::new(Sum { of, mean, out, then: then.epilogue }));
            self.joined.insert(sum.at);
        }
        for root in self.companions(taken) {
            let result = self.graph.nodes[root].result;
            let map = self.expression(root, true, None)?;
            let buffers = following.numbers(own, &map.buffers);
            let group = Group { form: map.expression, buffers, made: vec![], stays: true, half: None };
            following.epilogue.companions.push(group);
            following.sizes.push(dim_extent(*self.ty(result).shape.last().expect("rows")));
            following.sizes.extend(map.sizes);
            self.joined.insert(root);
        }
        Ok(following)
    }
}
