//! Dispatch formation: decides which nodes of a graph share one launch. Each dispatch is the work of one kernel: a root
//! node, the prologue computed on the way to its operand, and the epilogue computed from its result while the kernel
//! still holds it. The decisions depend on the graph and the options alone. Nothing is emitted here, and no later step
//! revises them. Multi-output fusion, where one node has several results, has happened before
//! ([`crate::multi_output`]).
//!
//! ```text
//! u = x @ W + b,  a = gelu(u)          a gemm with an epilogue of two groups: it stores u and a, and not x @ W
//! λ = σ(Σ q (q + x @ W) − lse)         a gemm whose tile holds whole rows: its epilogue sums them and uses the sums
//! ```
//!
//! An elementwise group ([`super::groups`]) joins the epilogue of the last product among its leaves.

use std::collections::{BTreeSet, HashMap, HashSet};

use peft_grammar::graph::{Dim, Graph, Node, Op, Role, Type, Value};
use peft_grammar::names;
use peft_runtime::artifact::{Storage, Tensor};

use super::Options;
use super::contraction::Contraction;
use super::groups::{Groups, form_groups};
use super::schedule::split_k;
use crate::builder::mma::Half;
use crate::target::FusionSupport;

/// The most elementwise groups in one epilogue, and the most companions.
const MAX_EPILOGUE_GROUPS: usize = 3;

/// The most nodes that a row sum may precede a companion by. A companion that is hoisted further would keep its result
/// in memory for long, such as a recomputed value of the backward pass.
const MAX_COMPANION_HOIST: usize = 32;

/// The work of one kernel.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// The node that gives the kernel its kind.
    pub root: usize,
    pub work: Work,
}

/// What a dispatch computes.
#[derive(Clone, Debug)]
pub enum Work {
    /// The node, or the elementwise group of which it is the root. It may take several launches.
    Node,
    /// A product or a normalization, with its epilogue.
    WithEpilogue(Fused),
    /// Sums of rows, with the root of the group whose rows are summed if the same kernel computes it, and the epilogue.
    RowSums { prologue: Option<usize>, fused: Fused },
}

impl Dispatch {
    /// The nodes that the dispatch computes, in the order of the graph.
    pub fn nodes(&self, groups: &Groups) -> Vec<usize> {
        let mut roots = vec![self.root];
        match &self.work {
            Work::Node => {}
            Work::WithEpilogue(fused) => fused.add_roots(&mut roots),
            Work::RowSums { prologue, fused } => {
                roots.extend(prologue);
                fused.add_roots(&mut roots);
            }
        }
        let mut nodes: Vec<usize> = roots.iter().flat_map(|&root| groups.members(root)).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }
}

/// The nodes that a kernel computes in its epilogue.
#[derive(Clone, Debug)]
pub struct Fused {
    /// The node whose kernel it is.
    pub node: usize,
    /// The roots of the elementwise groups over the rows of the result, in order.
    pub groups: Vec<usize>,
    /// A sum over these rows, with its own epilogue.
    pub row_sum: Option<Box<Fused>>,
    /// The roots of other elementwise groups over the same rows, which the kernel of a row sum also computes.
    pub companions: Vec<usize>,
    /// The node's own result is stored.
    pub stored: bool,
}

impl Fused {
    /// The epilogue is empty.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.row_sum.is_none() && self.companions.is_empty()
    }

    fn add_roots(&self, roots: &mut Vec<usize>) {
        roots.push(self.node);
        roots.extend(self.groups.iter().chain(&self.companions));
        if let Some(sum) = &self.row_sum {
            sum.add_roots(roots);
        }
    }

    /// The roots of the groups, and the row sum.
    fn readers(&self) -> Vec<usize> {
        self.groups.iter().copied().chain(self.row_sum.iter().map(|sum| sum.node)).collect()
    }
}

/// Analyses of an entry's graph, which are complete before any of it is lowered.
pub struct Analysis<'g> {
    /// The graph of the entry.
    pub graph: &'g Graph,
    /// The options of the lowering.
    pub options: Options,
    /// What the machine's kernels can fuse.
    pub fusion: FusionSupport,
    /// By value: the number of its uses, including as a graph output.
    pub use_counts: Vec<usize>,
    /// By value: the nodes that read it.
    pub readers: Vec<Vec<usize>>,
    /// The elementwise groups.
    pub groups: Groups<'g>,
    /// By value: whether it depends on frozen weights alone, so that it is computed once, when the program is loaded.
    pub frozen: Vec<bool>,
    /// Values that are stored directly in an output's own storage: the gradient of a tensor in the flat gradient
    /// vector.
    pub fixed_storage: HashMap<Value, Storage>,
}

/// By value: the number of its uses, including as a graph output, and the nodes that read it.
fn usage(graph: &Graph) -> (Vec<usize>, Vec<Vec<usize>>) {
    let (mut use_counts, mut readers) = (vec![0; graph.value_count()], vec![vec![]; graph.value_count()]);
    for (at, node) in graph.nodes.iter().enumerate() {
        for operand in &node.operands {
            use_counts[operand.0 as usize] += 1;
            readers[operand.0 as usize].push(at);
        }
    }
    graph.outputs.iter().for_each(|(_, v)| use_counts[v.0 as usize] += 1);
    (use_counts, readers)
}

/// Moves each product down to just before the first elementwise group that reads it, if only such groups do. More of
/// what follows several products then joins the epilogue of the last one.
pub fn sink_products(graph: &Graph) -> Graph {
    let (use_counts, readers) = usage(graph);
    let groups = form_groups(graph, &use_counts);
    // The node before which node `at` is moved.
    let position = |at: usize| {
        let node = &graph.nodes[at];
        let Op::Matmul { .. } = node.op else { return at };
        let readers = &readers[node.result().0 as usize];
        let follow = readers.iter().all(|&reader| graph.nodes[reader].op.is_elementwise());
        let first = readers.iter().map(|&reader| groups.root(reader)).min();
        first.filter(|_| follow).unwrap_or(at)
    };
    let mut order: Vec<usize> = (0..graph.nodes.len()).collect();
    order.sort_by_key(|&at| (position(at), at));
    let mut graph = graph.clone();
    graph.reorder(&order);
    graph
}

impl<'g> Analysis<'g> {
    pub fn of(graph: &'g Graph, tensors: &[Tensor], options: Options) -> Analysis<'g> {
        let (use_counts, readers) = usage(graph);
        let groups = form_groups(graph, &use_counts);
        let fusion = options.machine.fusion();
        let (frozen, fixed_storage) = (vec![false; graph.value_count()], gradient_storage(graph, tensors));
        let mut analysis = Analysis { graph, options, fusion, use_counts, readers, groups, frozen, fixed_storage };
        for arg in &graph.args {
            analysis.frozen[arg.value.0 as usize] = arg.role == Role::Frozen;
        }
        for (at, node) in
            graph.nodes.iter().enumerate().filter(|(at, _)| !analysis.groups.is_inlined(*at)).collect::<Vec<_>>()
        {
            // A prepared buffer's key names one result, so a node of several results is not prepared.
            let [result] = node.results[..] else { continue };
            let sized = analysis.ty(result).elements().is_some() && !analysis.fixed_storage.contains_key(&result);
            let known = analysis.leaves(at).iter().all(|v| analysis.frozen[v.0 as usize]);
            // A reshape of a frozen value needs no buffer, so it is frozen even where its storage is fixed.
            let known = known && (sized || matches!(node.op, Op::Reshape { .. }));
            analysis.frozen[result.0 as usize] = known;
        }
        analysis
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

    /// The values that the kernel of node `at` reads, apart from its epilogue's.
    pub fn leaves(&self, at: usize) -> Vec<Value> {
        let node = &self.graph.nodes[at];
        if node.op.is_elementwise() { self.groups.leaves(at) } else { node.operands.clone() }
    }

    /// The kernel of node `at` may have an epilogue.
    fn can_fuse_epilogue(&self, at: usize) -> bool {
        let Node { op, operands, .. } = &self.graph.nodes[at];
        let result = self.result_of(at);
        let ty = self.ty(result);
        // All leading axes are batches here, and the epilogue has one batch index.
        let batches = !matches!(op, Op::Matmul { .. }) || ty.rank() == self.ty(operands[1]).rank();
        let matrix = matches!(ty.rank(), 2 | 3) && !ty.is_ragged() && batches;
        self.options.epilogues && !self.frozen(result) && !self.fixed_storage.contains_key(&result) && matrix
    }

    /// Node `at` is a sum or mean over the last axis of dense rows.
    fn is_row_sum(&self, at: usize) -> bool {
        let node = &self.graph.nodes[at];
        let Op::Reduce { axes, keep: true, .. } = &node.op else { return false };
        let ty = self.ty(node.operands[0]);
        self.options.epilogues && !ty.is_ragged() && matches!(ty.rank(), 2 | 3) && axes[..] == [ty.rank() - 1]
    }

    /// Nothing but a row sum reads the group of `root`, so the group becomes the prologue of that sum's kernel.
    fn fuses_into_row_sum(&self, root: usize) -> bool {
        let result = self.result_of(root);
        let once = self.use_counts[result.0 as usize] == 1
            && !self.frozen(result)
            && !self.fixed_storage.contains_key(&result);
        let reader = self.readers(result).first();
        once && !self.groups.has_dropout(root) && reader.is_some_and(|&at| self.is_row_sum(at))
    }

    /// Only the groups of `roots` read `product`.
    fn read_only_by(&self, product: Value, roots: &[usize]) -> bool {
        let readers = self.readers(product).iter();
        readers.filter(|&&node| roots.contains(&self.groups.root(node))).count() == self.use_counts[product.0 as usize]
    }

    /// Whether the group of `root`, which is part of the epilogue `fused`, is stored. It is not if only the epilogue's
    /// own row sum and groups read it.
    pub fn is_stored(&self, root: usize, fused: &Fused) -> bool {
        fused.row_sum.is_none() || !self.read_only_by(self.result_of(root), &fused.readers())
    }

    /// The type in which gemms with frozen weights read the rows of `value`, if they read it in half precision, and
    /// whether nothing else reads it. The value's producer can then store it rounded.
    pub fn half_precision_copy(&self, value: Value) -> Option<(Half, bool)> {
        let half = self.fusion.half_precision_results?;
        let reduced = self.options.precision.is_reduced() && !self.frozen(value);
        let ty = self.ty(value);
        let whole = ty.rank() == 2 && matches!(ty.shape[1], Dim::Const(n) if n.is_multiple_of(8));
        let multiplies = |&&reader: &&usize| {
            let Node { op, operands, .. } = &self.graph.nodes[reader];
            let product = matches!(op, Op::Matmul { transpose_x: false, .. });
            product && operands[0] == value && self.ty(operands[1]).rank() == 2 && self.frozen(operands[1])
        };
        let products = self.readers(value).iter().filter(multiplies).count();
        (reduced && whole && products > 0).then_some((half, products == self.use_counts[value.0 as usize]))
    }

    /// The node that produces `value`.
    fn producer(&self, value: Value) -> Option<usize> {
        self.graph.def_at(value)
    }

    /// The result of node `at`, which has exactly one.
    fn result_of(&self, at: usize) -> Value {
        self.graph.nodes[at].result()
    }
}

/// The storage of output `name`, if that is the gradient of a tensor.
pub fn gradient_of(graph: &Graph, tensors: &[Tensor], name: &str) -> Option<Storage> {
    let label = names::Output::from_name(name).gradient()?;
    let arg = graph.args.iter().find(|a| a.role == Role::Trainable && a.label() == label)?;
    let index = tensors.iter().position(|t| t.name == arg.name)?;
    Some(Storage::Gradient { index })
}

/// The values that are gradients of tensors, seen through reshapes, so that their kernels write directly into the flat
/// gradient vector.
fn gradient_storage(graph: &Graph, tensors: &[Tensor]) -> HashMap<Value, Storage> {
    let mut fixed_storage = HashMap::new();
    for (name, value) in &graph.outputs {
        let Some(storage) = gradient_of(graph, tensors, name) else { continue };
        let mut root = *value;
        while let Some(node) = graph.def(root)
            && let Op::Reshape { .. } = node.op
        {
            root = node.operands[0];
        }
        if graph.def(root).is_some() {
            fixed_storage.entry(root).or_insert(storage);
        }
    }
    fixed_storage
}

/// The dispatches of a graph, in execution order.
pub fn dispatch(analysis: &Analysis) -> Vec<Dispatch> {
    let mut formation = DispatchFormation { analysis, done: HashSet::new() };
    let mut dispatches = vec![];
    for (root, node) in analysis.graph.nodes.iter().enumerate() {
        // A reshape of an argument is available from the start.
        if let Op::Reshape { .. } = node.op
            && analysis.producer(node.operands[0]).is_none_or(|at| formation.done.contains(&at))
        {
            dispatches.push(Dispatch { root, work: Work::Node });
            formation.done.insert(root);
        }
    }
    for root in 0..analysis.graph.nodes.len() {
        if !analysis.groups.is_inlined(root) && !formation.done.contains(&root) {
            dispatches.extend(formation.form(root).map(|work| Dispatch { root, work }));
        }
    }
    dispatches
}

struct DispatchFormation<'f, 'g> {
    analysis: &'f Analysis<'g>,
    /// Nodes that an earlier dispatch already computes.
    done: HashSet<usize>,
}

impl DispatchFormation<'_, '_> {
    /// What the dispatch at node `at` computes, or `None` if a later kernel computes the node.
    fn form(&mut self, at: usize) -> Option<Work> {
        let Analysis { graph, fusion, .. } = self.analysis;
        let node = &graph.nodes[at];
        Some(match &node.op {
            _ if self.is_prologue(at) => return None,
            Op::Matmul { .. } => Work::WithEpilogue(match fusion.register_epilogue_columns {
                // The epilogue reads the stored result from the cache.
                None => Fused { stored: true, ..self.fuse(at, at, false) },
                // With split-K a separate launch sums the partial results, so there is no epilogue.
                Some(_) if split_k(&Contraction::of(graph, node)) > 1 => {
                    Fused { node: at, groups: vec![], row_sum: None, companions: vec![], stored: true }
                }
                Some(most) => {
                    let whole = Contraction::of(graph, node).columns().is_some_and(|n| n <= most);
                    self.fuse(at, at, whole)
                }
            }),
            Op::Normalize { .. } | Op::NormalizeVjp { .. } => Work::WithEpilogue(self.fuse(at, at, false)),
            Op::Reduce { .. } if self.analysis.is_row_sum(at) => {
                let producer = self.analysis.producer(node.operands[0]);
                let prologue = producer.filter(|&root| self.is_prologue(root));
                Work::RowSums { prologue, fused: self.fuse(at, at, false) }
            }
            _ => Work::Node,
        })
    }

    /// The group of `at` is the prologue of a row sum's kernel, since no earlier epilogue computes it.
    fn is_prologue(&self, at: usize) -> bool {
        self.analysis.graph.nodes[at].op.is_elementwise()
            && self.analysis.fuses_into_row_sum(at)
            && !self.done.contains(&at)
    }

    /// `value` is computed before node `turn`.
    fn is_available(&self, value: Value, turn: usize) -> bool {
        let Some(at) = self.analysis.producer(value) else { return true };
        let from = match self.analysis.graph.nodes[at] {
            // The mean is computed with the log-sum-exp, but counts from its first reader on, so that no group that
            // reads it is hoisted above that.
            Node { op: Op::LinearLseAndMean, ref results, .. } if results[1] == value => {
                self.analysis.readers(value).first().copied().unwrap_or(at)
            }
            _ => at,
        };
        self.done.contains(&at) || from < turn && !self.is_prologue(at)
    }

    /// The epilogue of node `at`, in the dispatch of node `turn`. If its kernel holds `whole` rows, the epilogue may
    /// include a sum over them.
    fn fuse(&mut self, at: usize, turn: usize, whole: bool) -> Fused {
        let analysis = self.analysis;
        let result = analysis.result_of(at);
        let groups = self.epilogue_groups(at, turn);
        let mut fused = Fused { node: at, groups, row_sum: None, companions: vec![], stored: true };
        let mut sum = None;
        if whole && analysis.can_fuse_epilogue(at) {
            let computed = [result].into_iter().chain(fused.groups.iter().map(|&root| analysis.result_of(root)));
            let readers = computed.flat_map(|v| analysis.readers(v)).copied();
            sum = readers.filter(|at| analysis.is_row_sum(*at) && !self.done.contains(at)).min();
        }
        self.done.extend(&fused.groups);
        fused.row_sum = sum.map(|sum| Box::new(self.fuse(sum, turn, false)));
        self.done.extend(sum);
        fused.companions = self.companions(&fused, turn);
        self.done.extend(&fused.companions);
        fused.stored = !analysis.read_only_by(result, &fused.readers());
        fused
    }

    /// The elementwise groups of the epilogue of node `at`, in order. Everything else that they read is available
    /// before node `turn`.
    fn epilogue_groups(&self, at: usize, turn: usize) -> Vec<usize> {
        let analysis = self.analysis;
        let product = analysis.result_of(at);
        let ty = analysis.ty(product);
        let mut roots = vec![];
        if !analysis.can_fuse_epilogue(at) {
            return roots;
        }
        let mut computed = vec![product];
        while roots.len() < MAX_EPILOGUE_GROUPS {
            let readers = computed.iter().flat_map(|v| analysis.readers(*v));
            let readers = readers.filter(|&&node| analysis.graph.nodes[node].op.is_elementwise());
            let next = readers.map(|&node| analysis.groups.root(node)).filter(|root| {
                let same_type = analysis.ty(analysis.result_of(*root)) == ty;
                let leaves = analysis.groups.leaves(*root);
                same_type
                    && !self.done.contains(root)
                    && !roots.contains(root)
                    && leaves.iter().all(|v| computed.contains(v) || self.is_available(*v, turn))
            });
            let Some(root) = next.min() else { break };
            roots.push(root);
            computed.push(analysis.result_of(root));
        }
        roots
    }

    /// The companions of a row sum: groups over the same rows, of any width, that read something that the sum's kernel
    /// reads or computes, and otherwise only values that are available before node `turn`.
    fn companions(&self, Fused { node, groups, .. }: &Fused, turn: usize) -> Vec<usize> {
        let analysis = self.analysis;
        let Node { op, operands, .. } = &analysis.graph.nodes[*node];
        let result = analysis.result_of(*node);
        if !analysis.fusion.companions || !matches!(op, Op::Reduce { .. }) || !analysis.can_fuse_epilogue(*node) {
            return vec![];
        }
        let lead = |v: Value| analysis.ty(v).shape.split_last().map(|(_, lead)| lead);
        let leaves = |root: usize| analysis.groups.leaves(root);
        let mut known = vec![result];
        known.extend(groups.iter().map(|&root| analysis.result_of(root)));
        match analysis.producer(operands[0]).filter(|&root| analysis.graph.nodes[root].op.is_elementwise()) {
            Some(root) => known.extend(leaves(root)),
            None => known.push(operands[0]),
        }
        let readers = known.iter().filter(|&&v| lead(v) == lead(result)).flat_map(|v| analysis.readers(*v));
        let elementwise = readers.filter(|&&reader| analysis.graph.nodes[reader].op.is_elementwise());
        let roots = elementwise.map(|&reader| analysis.groups.root(reader));
        let roots: BTreeSet<usize> = roots.filter(|root| (turn..node + MAX_COMPANION_HOIST).contains(root)).collect();
        let free = roots.into_iter().filter(|&root| {
            let own = analysis.result_of(root);
            let same_rows =
                lead(own) == lead(result) && !analysis.ty(own).is_ragged() && !analysis.fuses_into_row_sum(root);
            let available = |v| v == result || self.is_available(v, turn);
            same_rows && !self.done.contains(&root) && leaves(root).into_iter().all(available)
        });
        free.take(MAX_EPILOGUE_GROUPS).collect()
    }
}
