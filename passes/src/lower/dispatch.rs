//! Which nodes are one launch. A graph's nodes are dealt out to dispatches, each of which is the work of one node's kernel:
//! what is computed on the way to it, what follows its result while the kernel has that, and what else is done on the same
//! rows. All of this is decided here, of the graph and the options; nothing is emitted, and nothing that comes after changes
//! it. What a kernel makes of the same numbers besides is a node of several results before ([`crate::siblings`]).
//!
//! ```text
//! u = x @ W + b,  a = gelu(u)          a product with two groups: u and a are written, x @ W alone is not
//! λ = σ(Σ q (q + x @ W) − lse)         a product of which a tile has rows whole: their sum, and what follows that
//! ```
//!
//! A group ([`super::groups`]) follows the last of the products among its leaves.

use std::collections::{BTreeSet, HashMap, HashSet};

use peft_grammar::graph::{Dim, Graph, Node, Op, Role, Type, Value};
use peft_grammar::names;
use peft_runtime::artifact::{Storage, Tensor};

use super::Options;
use super::groups::{Groups, group, maps};
use super::problem::Contraction;
use super::schedule::split_k;
use crate::builder::mma::Half;
use crate::target::Fusion;

/// Groups of one kernel, at most.
const MOST: usize = 3;

/// Operations that a group in a sum's kernel may be ahead of its turn: what the backward pass computes anew is not to wait
/// in memory all the way.
const AHEAD: usize = 32;

/// The work of one kernel.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// The node whose kernel it is.
    pub root: usize,
    pub work: Work,
}

#[derive(Clone, Debug)]
pub enum Work {
    /// The node's own, whatever that takes.
    Node,
    /// A product, or a normalization, and what follows.
    Led(Taken),
    /// Sums of rows, of what a group computes on the way, if that has such a root, and what follows.
    RowSums { of: Option<usize>, taken: Taken },
}

/// What a node's kernel takes along.
#[derive(Clone, Debug)]
pub struct Taken {
    pub at: usize,
    /// Groups on the rows of its result, by their roots, in their order.
    pub followers: Vec<usize>,
    /// A sum over these rows, and what that takes along.
    pub sum: Option<Box<Taken>>,
    /// Groups that a sum's kernel does beside, on the same rows.
    pub companions: Vec<usize>,
    /// The node's own result is written.
    pub stays: bool,
}

impl Taken {
    /// Nothing follows.
    pub fn is_empty(&self) -> bool {
        self.followers.is_empty() && self.sum.is_none() && self.companions.is_empty()
    }

    /// The groups and the sum.
    fn all(&self) -> Vec<usize> {
        self.followers.iter().copied().chain(self.sum.iter().map(|sum| sum.at)).collect()
    }
}

/// What is known of an entry's graph before any of it is lowered.
pub struct Facts<'g> {
    pub graph: &'g Graph,
    pub options: Options,
    pub fusion: Fusion,
    /// By value, how often it is read, the graph's outputs among the times.
    pub uses: Vec<usize>,
    /// By value, which nodes read it.
    pub readers: Vec<Vec<usize>>,
    pub groups: Groups<'g>,
    /// By value, whether it is made of frozen weights alone, once and for all.
    pub frozen: Vec<bool>,
    /// Values that are to lie where an output has its own place: the gradient of a tensor.
    pub claimed: HashMap<Value, Storage>,
}

/// By value, how often it is read, the graph's outputs among the times, and by which nodes.
fn usage(graph: &Graph) -> (Vec<usize>, Vec<Vec<usize>>) {
    let (mut uses, mut readers) = (vec![0; graph.values()], vec![vec![]; graph.values()]);
    for (at, node) in graph.nodes.iter().enumerate() {
        for operand in &node.operands {
            uses[operand.0 as usize] += 1;
            readers[operand.0 as usize].push(at);
        }
    }
    graph.outputs.iter().for_each(|(_, v)| uses[v.0 as usize] += 1);
    (uses, readers)
}

/// The graph with products put off until what follows them is computed: then more of that joins the last of them.
pub fn put_off(graph: &Graph) -> Graph {
    let (uses, readers) = usage(graph);
    let groups = group(graph, &uses);
    // By node, before which one it stands.
    let place = |at: usize| {
        let node = &graph.nodes[at];
        let Op::Matmul { .. } = node.op else { return at };
        let readers = &readers[node.result().0 as usize];
        let follow = readers.iter().all(|&reader| maps(&graph.nodes[reader].op));
        let first = readers.iter().map(|&reader| groups.root(reader)).min();
        first.filter(|_| follow).unwrap_or(at)
    };
    let mut order: Vec<usize> = (0..graph.nodes.len()).collect();
    order.sort_by_key(|&at| (place(at), at));
    let mut graph = graph.clone();
    graph.reorder(&order);
    graph
}

impl<'g> Facts<'g> {
    pub fn of(graph: &'g Graph, tensors: &[Tensor], options: Options) -> Facts<'g> {
        let (uses, readers) = usage(graph);
        let groups = group(graph, &uses);
        let fusion = options.machine.fusion();
        let (frozen, claimed) = (vec![false; graph.values()], claims(graph, tensors));
        let mut facts = Facts { graph, options, fusion, uses, readers, groups, frozen, claimed };
        for arg in &graph.args {
            facts.frozen[arg.value.0 as usize] = arg.role == Role::Frozen;
        }
        for (at, node) in graph.nodes.iter().enumerate().filter(|(at, _)| !facts.groups.inner(*at)).collect::<Vec<_>>()
        {
            // Several results have no name of their own under which each could be prepared.
            let [result] = node.results[..] else { continue };
            let sized = facts.ty(result).elements().is_some() && !facts.claimed.contains_key(&result);
            let known = facts.leaves(at).iter().all(|v| facts.frozen[v.0 as usize]);
            // Another shape of what is frozen is that.
            let known = known && (sized || matches!(node.op, Op::Reshape { .. }));
            facts.frozen[result.0 as usize] = known;
        }
        facts
    }

    pub fn ty(&self, value: Value) -> &'g Type {
        self.graph.ty(value)
    }

    pub fn readers(&self, value: Value) -> &[usize] {
        &self.readers[value.0 as usize]
    }

    pub fn frozen(&self, value: Value) -> bool {
        self.frozen[value.0 as usize]
    }

    /// What a node's kernel reads, without what it takes along.
    pub fn leaves(&self, at: usize) -> Vec<Value> {
        let node = &self.graph.nodes[at];
        if maps(&node.op) { self.groups.leaves(at) } else { node.operands.clone() }
    }

    /// The kernel of node `at` may take along what follows.
    fn leads(&self, at: usize) -> bool {
        let Node { op, operands, .. } = &self.graph.nodes[at];
        let result = self.made(at);
        let ty = self.ty(result);
        // Leading axes are batches, of which an index has one.
        let batches = !matches!(op, Op::Matmul { .. }) || ty.rank() == self.ty(operands[1]).rank();
        let placed = matches!(ty.rank(), 2 | 3) && !ty.ragged() && batches;
        self.options.epilogues && !self.frozen(result) && !self.claimed.contains_key(&result) && placed
    }

    /// Node `at` sums rows up and nothing else.
    fn sums_rows(&self, at: usize) -> bool {
        let node = &self.graph.nodes[at];
        let Op::Reduce { axes, keep: true, .. } = &node.op else { return false };
        let ty = self.ty(node.operands[0]);
        self.options.epilogues && !ty.ragged() && matches!(ty.rank(), 2 | 3) && axes[..] == [ty.rank() - 1]
    }

    /// The group of `root` goes into nothing but sums over its rows: it is computed on the way to them.
    fn summed(&self, root: usize) -> bool {
        let result = self.made(root);
        let once = self.uses[result.0 as usize] == 1 && !self.frozen(result) && !self.claimed.contains_key(&result);
        let reader = self.readers(result).first();
        once && !self.groups.draws(root) && reader.is_some_and(|&at| self.sums_rows(at))
    }

    /// Nothing but the groups of `roots` reads `product`.
    fn serves(&self, product: Value, roots: &[usize]) -> bool {
        let readers = self.readers(product).iter();
        readers.filter(|&&node| roots.contains(&self.groups.root(node))).count() == self.uses[product.0 as usize]
    }

    /// Whether the group of `root`, which a kernel takes along, is written: what a sum is of may be nobody else's.
    pub fn written(&self, root: usize, taken: &Taken) -> bool {
        taken.sum.is_none() || !self.serves(self.made(root), &taken.all())
    }

    /// Products with frozen weights will read the value's rows rounded, so that what makes it may round it at once; and
    /// whether nothing else reads it.
    pub fn rounds(&self, value: Value) -> Option<(Half, bool)> {
        let half = self.fusion.rounds_ahead?;
        let asked = self.options.precision.narrows() && !self.frozen(value);
        let ty = self.ty(value);
        let whole = ty.rank() == 2 && matches!(ty.shape[1], Dim::Const(n) if n.is_multiple_of(8));
        let multiplies = |&&reader: &&usize| {
            let Node { op, operands, .. } = &self.graph.nodes[reader];
            let product = matches!(op, Op::Matmul { transpose_x: false, .. });
            product && operands[0] == value && self.ty(operands[1]).rank() == 2 && self.frozen(operands[1])
        };
        let products = self.readers(value).iter().filter(multiplies).count();
        (asked && whole && products > 0).then_some((half, products == self.uses[value.0 as usize]))
    }

    /// The node that makes `value`.
    fn maker(&self, value: Value) -> Option<usize> {
        self.graph.def_at(value)
    }

    /// The one result of node `at`.
    fn made(&self, at: usize) -> Value {
        self.graph.nodes[at].result()
    }
}

/// The storage output `name` has if it is the gradient of a tensor.
pub fn gradient_of(graph: &Graph, tensors: &[Tensor], name: &str) -> Option<Storage> {
    let label = names::Output::of(name).gradient()?;
    let arg = graph.args.iter().find(|a| a.role == Role::Trainable && a.label() == label)?;
    let index = tensors.iter().position(|t| t.name == arg.name)?;
    Some(Storage::Gradient { index })
}

/// Lets what computes a gradient write straight into the flat vector.
fn claims(graph: &Graph, tensors: &[Tensor]) -> HashMap<Value, Storage> {
    let mut claimed = HashMap::new();
    for (name, value) in &graph.outputs {
        let Some(storage) = gradient_of(graph, tensors, name) else { continue };
        let mut root = *value;
        while let Some(node) = graph.def(root)
            && let Op::Reshape { .. } = node.op
        {
            root = node.operands[0];
        }
        if graph.def(root).is_some() {
            claimed.entry(root).or_insert(storage);
        }
    }
    claimed
}

/// The dispatches of a graph in their order.
pub fn dispatch(facts: &Facts) -> Vec<Dispatch> {
    let mut dealer = Dealer { facts, done: HashSet::new() };
    let mut dispatches = vec![];
    for (root, node) in facts.graph.nodes.iter().enumerate() {
        // An argument in another shape is there from the start.
        if let Op::Reshape { .. } = node.op
            && facts.maker(node.operands[0]).is_none_or(|at| dealer.done.contains(&at))
        {
            dispatches.push(Dispatch { root, work: Work::Node });
            dealer.done.insert(root);
        }
    }
    for root in 0..facts.graph.nodes.len() {
        if !facts.groups.inner(root) && !dealer.done.contains(&root) {
            dispatches.extend(dealer.work(root).map(|work| Dispatch { root, work }));
        }
    }
    dispatches
}

struct Dealer<'f, 'g> {
    facts: &'f Facts<'g>,
    /// Nodes whose turn has come early: a dispatch before has them.
    done: HashSet<usize>,
}

impl Dealer<'_, '_> {
    /// What the turn of node `at` brings; nothing where another's does.
    fn work(&mut self, at: usize) -> Option<Work> {
        let Facts { graph, fusion, .. } = self.facts;
        let node = &graph.nodes[at];
        Some(match &node.op {
            _ if self.on_the_way(at) => return None,
            Op::Matmul { .. } => Work::Led(match fusion.held_columns {
                // What follows reads the result where the kernel has written it.
                None => Taken { stays: true, ..self.take(at, at, false) },
                // What follows a sum of shares has a launch of its own.
                Some(_) if split_k(&Contraction::of(graph, node)) > 1 => {
                    Taken { at, followers: vec![], sum: None, companions: vec![], stays: true }
                }
                Some(most) => {
                    let whole = Contraction::of(graph, node).columns().is_some_and(|n| n <= most);
                    self.take(at, at, whole)
                }
            }),
            Op::Normalize { .. } | Op::NormalizeVjp { .. } => Work::Led(self.take(at, at, false)),
            Op::Reduce { .. } if self.facts.sums_rows(at) => {
                let of = self.facts.maker(node.operands[0]);
                let of = of.filter(|&root| self.on_the_way(root));
                Work::RowSums { of, taken: self.take(at, at, false) }
            }
            _ => Work::Node,
        })
    }

    /// The group of `at`, which no other kernel has taken along, is computed on the way to a sum, and is nowhere else.
    fn on_the_way(&self, at: usize) -> bool {
        maps(&self.facts.graph.nodes[at].op) && self.facts.summed(at) && !self.done.contains(&at)
    }

    /// It is computed before it is the `turn` of a node.
    fn there(&self, value: Value, turn: usize) -> bool {
        let Some(at) = self.facts.maker(value) else { return true };
        let from = match self.facts.graph.nodes[at] {
            // It comes with the log-sum-exp, but draws nothing that reads it before the place where it is first read.
            Node { op: Op::LinearLseAndMean, ref results, .. } if results[1] == value => {
                self.facts.readers(value).first().copied().unwrap_or(at)
            }
            _ => at,
        };
        self.done.contains(&at) || from < turn && !self.on_the_way(at)
    }

    /// What node `at` takes along when it is the `turn` of a node; if its kernel has `whole` rows, a sum of them as well.
    fn take(&mut self, at: usize, turn: usize, whole: bool) -> Taken {
        let facts = self.facts;
        let result = facts.made(at);
        let mut taken = Taken { at, followers: self.followers(at, turn), sum: None, companions: vec![], stays: true };
        let mut sum = None;
        if whole && facts.leads(at) {
            let made = [result].into_iter().chain(taken.followers.iter().map(|&root| facts.made(root)));
            let readers = made.flat_map(|v| facts.readers(v)).copied();
            sum = readers.filter(|at| facts.sums_rows(*at) && !self.done.contains(at)).min();
        }
        self.done.extend(&taken.followers);
        taken.sum = sum.map(|sum| Box::new(self.take(sum, turn, false)));
        self.done.extend(sum);
        taken.companions = self.companions(&taken, turn);
        self.done.extend(&taken.companions);
        taken.stays = !facts.serves(result, &taken.all());
        taken
    }

    /// The groups that node `at` takes along, in their order, when it is the `turn` of a node. What else they read is
    /// there by then.
    fn followers(&self, at: usize, turn: usize) -> Vec<usize> {
        let facts = self.facts;
        let product = facts.made(at);
        let ty = facts.ty(product);
        let mut roots = vec![];
        if !facts.leads(at) {
            return roots;
        }
        let mut made = vec![product];
        while roots.len() < MOST {
            let readers = made.iter().flat_map(|v| facts.readers(*v));
            let readers = readers.filter(|&&node| maps(&facts.graph.nodes[node].op));
            let next = readers.map(|&node| facts.groups.root(node)).filter(|root| {
                let alike = facts.ty(facts.made(*root)) == ty;
                let leaves = facts.groups.leaves(*root);
                alike
                    && !self.done.contains(root)
                    && !roots.contains(root)
                    && leaves.iter().all(|v| made.contains(v) || self.there(*v, turn))
            });
            let Some(root) = next.min() else { break };
            roots.push(root);
            made.push(facts.made(root));
        }
        roots
    }

    /// Groups that a sum's kernel does beside: over the same rows, however wide, if they read some of what goes into it or
    /// comes of it, and nothing that is not there.
    fn companions(&self, Taken { at, followers, .. }: &Taken, turn: usize) -> Vec<usize> {
        let facts = self.facts;
        let Node { op, operands, .. } = &facts.graph.nodes[*at];
        let result = facts.made(*at);
        if !facts.fusion.companions || !matches!(op, Op::Reduce { .. }) || !facts.leads(*at) {
            return vec![];
        }
        let lead = |v: Value| facts.ty(v).shape.split_last().map(|(_, lead)| lead);
        let leaves = |root: usize| facts.groups.leaves(root);
        let mut known = vec![result];
        known.extend(followers.iter().map(|&root| facts.made(root)));
        match facts.maker(operands[0]).filter(|&root| maps(&facts.graph.nodes[root].op)) {
            Some(root) => known.extend(leaves(root)),
            None => known.push(operands[0]),
        }
        let readers = known.iter().filter(|&&v| lead(v) == lead(result)).flat_map(|v| facts.readers(*v));
        let maps = readers.filter(|&&reader| maps(&facts.graph.nodes[reader].op));
        let roots = maps.map(|&reader| facts.groups.root(reader));
        let roots: BTreeSet<usize> = roots.filter(|root| (turn..at + AHEAD).contains(root)).collect();
        let free = roots.into_iter().filter(|&root| {
            let own = facts.made(root);
            let alike = lead(own) == lead(result) && !facts.ty(own).ragged() && !facts.summed(root);
            let there = |v| v == result || self.there(v, turn);
            alike && !self.done.contains(&root) && leaves(root).into_iter().all(there)
        });
        free.take(MOST).collect()
    }
}
