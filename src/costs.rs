//! The cost of a training step: operations, memory of activations, and a roofline for a GPU. All are computed from the
//! graphs and the buffer plan of the compiled program; nothing is run.

use std::collections::{BTreeMap, HashSet};

use peft_grammar::graph::{Dim, Graph, Node, Op, Role, Value};
use peft_grammar::model::{BatchSize, Model, TaskKind};
use peft_grammar::names::OptimizerEntry;
use peft_passes::cost::{LaunchCost, LaunchSizes};
use peft_passes::dialect::Dialect;
use peft_passes::lower::Lowered;
use peft_passes::pipeline::{self, Entry, Options, Stage};
use peft_passes::target::Machine;
use peft_passes::target::cuda::Card;
use peft_runtime::arena;
use peft_runtime::artifact::{Launch, Manifest, Sizes};
use serde::Serialize;

use crate::failure::Failure;

/// Floating-point operations of matrix products, a multiplication and an addition counted as two, by the quantity that
/// their number is proportional to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Flops {
    /// Operations for each token of the batch.
    pub per_token: f64,
    /// Operations for each target, a token that is predicted.
    pub per_target: f64,
    /// Operations for each sequence.
    pub per_sequence: f64,
    /// Operations for each pair of a query and a key that it attends to.
    pub per_pair: f64,
    /// Operations of a step that do not depend on the batch.
    pub fixed: f64,
}

impl Flops {
    fn minus(self, other: Flops) -> Flops {
        Flops {
            per_token: self.per_token - other.per_token,
            per_target: self.per_target - other.per_target,
            per_sequence: self.per_sequence - other.per_sequence,
            per_pair: self.per_pair - other.per_pair,
            fixed: self.fixed - other.fixed,
        }
    }
}

/// The cost of a training step.
#[derive(Clone, Debug, Serialize)]
pub struct Costs {
    /// Operations of the forward pass.
    pub forward_flops: Flops,
    /// Operations of the backward pass, rematerialised products included.
    pub backward_flops: Flops,
    /// Bytes of temporary buffers a token of `batch`: activations that the backward pass reads, and scratch memory.
    pub activation_bytes_per_token: f64,
    /// The batch that memory and time are computed for.
    pub batch: BatchShape,
    /// The lower bound of the time on a GPU; `None` if the target is a CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub roofline: Option<Roofline>,
}

/// The memory traffic and arithmetic of a training step on a GPU, and the time that each takes at the GPU's peak rate
/// (Williams et al. 2009).
#[derive(Clone, Debug, Serialize)]
pub struct Roofline {
    /// The name of the GPU.
    pub card: &'static str,
    /// Kernel launches of a step, those of the optimizer included.
    pub launches: usize,
    /// Bytes of device memory that the launches read and write, each buffer of a launch counted once.
    pub bytes: f64,
    /// Operations of products on half-precision tensor cores.
    pub half_flops: f64,
    /// Operations of products in f32.
    pub flops: f64,
    /// `bytes` at the peak bandwidth, in seconds.
    pub memory_seconds: f64,
    /// The products at the peak arithmetic rates, in seconds.
    pub product_seconds: f64,
    /// The time by the cost model of [`peft_passes::cost`], which knows the kernels' tiles, in seconds.
    pub modelled_seconds: f64,
    /// The launches in groups, the group with the longest modelled time first.
    pub kernels: Vec<LaunchGroup>,
}

/// Launches of a step that run the same operation and have the same bound.
#[derive(Clone, Debug, Serialize)]
pub struct LaunchGroup {
    /// The operation, as the manifest names it.
    pub op: String,
    /// The number of launches.
    pub launches: usize,
    /// Bytes of device memory that they read and write.
    pub bytes: f64,
    /// Operations of their products.
    pub flops: f64,
    /// Their roofline in seconds: for each launch the longer of its memory time and its arithmetic time.
    pub best_seconds: f64,
    /// Their time by the cost model, in seconds.
    pub modelled_seconds: f64,
    /// What bounds them: `memory`, `products`, or `tiles` if the modelled time is over 1.5 times the roofline.
    pub bound: &'static str,
}

impl Roofline {
    /// The lower bound of a step's time in seconds: the longer of memory time and arithmetic time.
    pub fn seconds(&self) -> f64 {
        self.memory_seconds.max(self.product_seconds)
    }
}

/// The batch that memory and time are computed for.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BatchShape {
    /// The number of sequences.
    pub sequences: u64,
    /// Tokens of each sequence.
    pub tokens_each: u64,
    /// Targets of the whole batch, the tokens that are predicted.
    pub targets: u64,
}

impl BatchShape {
    /// The sizes of the batch for a model with `values` trained numbers.
    fn sizes(self, values: u64) -> Sizes {
        let BatchShape { sequences, tokens_each, targets } = self;
        let tokens = sequences * tokens_each;
        Sizes { tokens, sequences, targets, pairs: tokens * tokens_each, values }
    }
}

/// Tokens of a sequence for which costs are computed if the caller does not say.
const DEFAULT_TOKENS_PER_SEQUENCE: u64 = 128;

/// The cost of a training step of `model` for the target of `options`, with sequences of `tokens_each` tokens (128 if
/// `None`, and at most the task's `max_tokens`).
///
/// # Errors
///
/// The compiler refuses the model or fails.
pub fn costs(model: &Model, options: &Options, tokens_each: Option<u64>) -> Result<Costs, Failure> {
    let dialect = Dialect::new()?;
    let lowered = |entries: &[Entry], until| {
        pipeline::run(&dialect, model, entries, &Options { until, ..options.clone() }).map_err(Failure::from)
    };
    // The entry `forward` computes logits alone, which is the forward pass of training without the loss.
    let forward = flops(&lowered(&[Entry::Forward], Stage::Fused)?.graphs[0]);
    let trained = lowered(&[Entry::Train], Stage::Loops)?;
    let graph = &trained.graphs[0];
    let both = flops(graph);
    let tokens_each = tokens_each.unwrap_or(DEFAULT_TOKENS_PER_SEQUENCE).min(model.task.max_tokens);
    let sequences = match model.train.batch {
        BatchSize::Sequences(sequences) => sequences,
        BatchSize::Tokens { tokens } => (tokens / tokens_each.max(1)).max(1),
    };
    let tokens = sequences * tokens_each;
    let targets = match model.task.kind {
        TaskKind::Generation { .. } | TaskKind::Chat => tokens / 2,
        TaskKind::Text { .. } | TaskKind::TokenClassification { .. } => tokens,
        TaskKind::Classification { .. } | TaskKind::Regression { .. } => 0,
    };
    let batch = BatchShape { sequences, tokens_each, targets };
    let values = model.params.iter().filter_map(|p| p.trained_shape()).map(|s| s.iter().product::<u64>()).sum();
    let sizes = batch.sizes(values);
    let lowered = trained.lowered.expect("the pipeline ran to loops");
    let manifest = &lowered.manifest;
    let entry = &manifest.entries[Entry::Train.name()];
    let numbers = arena::plan(manifest, &entry.launches, &entry.outputs, &sizes).size;
    let roofline = match options.machine {
        Machine::Cuda(chip) => Some(roofline(chip.card(), model, graph, &lowered, &sizes)),
        Machine::Cpu(_) => None,
    };
    Ok(Costs {
        forward_flops: forward,
        backward_flops: both.minus(forward),
        activation_bytes_per_token: 4.0 * numbers as f64 / tokens as f64,
        batch,
        roofline,
    })
}

/// The roofline of a training step and the optimizer's update on `card`.
fn roofline(card: Card, model: &Model, graph: &Graph, lowered: &Lowered, sizes: &Sizes) -> Roofline {
    let manifest = &lowered.manifest;
    let launches = [Entry::Train.name(), OptimizerEntry::Update.name()]
        .into_iter()
        .filter_map(|name| manifest.entries.get(name))
        .flat_map(|e| &e.launches);
    let mut kernels: Vec<LaunchGroup> = vec![];
    for launch in launches.clone() {
        let extents: Vec<u64> = launch.extents.iter().map(|e| e.eval(sizes)).collect();
        let (buffers, units) = (launch.buffers.len(), launch.units.eval(sizes));
        let launched = LaunchSizes { buffers, sizes: &extents, units, batch: sizes };
        let work = lowered.functions[launch.kernel].cost(launched, &card);
        let bytes = bytes(launch, &work, manifest, sizes);
        let (memory, products) = (bytes / card.bandwidth, work.arithmetic_seconds(&card));
        let (best, modelled) = (memory.max(products), work.modelled_seconds(&card, bytes));
        let bound = match () {
            () if modelled > 1.5 * best => "tiles",
            () if memory > products => "memory",
            () => "products",
        };
        let alike = |kind: &&mut LaunchGroup| kind.op == launch.op && kind.bound == bound;
        if kernels.iter_mut().find(alike).is_none() {
            let op = launch.op.clone();
            let none = (0.0, 0.0, 0.0, 0.0);
            let (bytes, flops, best_seconds, modelled_seconds) = none;
            kernels.push(LaunchGroup { op, launches: 0, bytes, flops, best_seconds, modelled_seconds, bound });
        }
        let kind = kernels.iter_mut().find(alike).expect("it was pushed above");
        kind.launches += 1;
        kind.bytes += bytes;
        kind.flops += work.flops;
        kind.best_seconds += best;
        kind.modelled_seconds += modelled;
    }
    kernels.sort_by(|x, y| y.modelled_seconds.total_cmp(&x.modelled_seconds));
    let bytes = kernels.iter().map(|kind| kind.bytes).sum::<f64>();
    let all = flops(graph).of(sizes);
    let half_flops = if model.train.precision.is_reduced() { frozen_flops(graph).of(sizes) } else { 0.0 };
    let flops = all - half_flops;
    Roofline {
        card: card.name,
        launches: launches.count(),
        bytes,
        half_flops,
        flops,
        memory_seconds: bytes / card.bandwidth,
        product_seconds: half_flops / card.tensor_core_flops + flops / card.flops,
        modelled_seconds: kernels.iter().map(|kind| kind.modelled_seconds).sum(),
        kernels,
    }
}

/// Bytes of device memory that a launch reads and writes. Each buffer counts once for each pass over it: twice if the
/// kernel reads and writes it. A buffer that is read in part counts only the part, if the kernel says how much.
fn bytes(launch: &Launch, work: &LaunchCost, manifest: &Manifest, sizes: &Sizes) -> f64 {
    let mut buffers: BTreeMap<usize, f64> = BTreeMap::new();
    for (i, &buffer) in launch.buffers.iter().enumerate() {
        let whole = 4.0 * manifest.buffers[buffer].elements(sizes) as f64;
        let some = work.max_read_bytes.get(i).map_or(whole, |&reads| reads.min(whole));
        let [whole, some] = [whole, some].map(|bytes| work.transfers[i] * bytes);
        buffers.entry(buffer).and_modify(|bytes| *bytes = whole.min(*bytes + some)).or_insert(some);
    }
    buffers.values().sum()
}

/// The operations of products whose second operand is computed from frozen weights alone. These run in half precision
/// where the recipe's precision is reduced.
fn frozen_flops(graph: &Graph) -> Flops {
    let mut frozen: HashSet<Value> = graph.args.iter().filter(|a| a.role == Role::Frozen).map(|a| a.value).collect();
    let mut products = Flops::default();
    for node in &graph.nodes {
        if node.operands.iter().all(|v| frozen.contains(v)) {
            frozen.extend(&node.results);
        } else if node.operands.get(1).is_some_and(|v| frozen.contains(v)) {
            products.add(graph, node);
        }
    }
    products
}

/// The operations of all products of a graph.
pub fn flops(graph: &Graph) -> Flops {
    let mut flops = Flops::default();
    graph.nodes.iter().for_each(|node| flops.add(graph, node));
    flops
}

impl Flops {
    /// The number of operations for a batch of these sizes.
    fn of(self, sizes: &Sizes) -> f64 {
        let each = [self.per_token, self.per_target, self.per_sequence, self.per_pair, self.fixed];
        let counts = [sizes.tokens, sizes.targets, sizes.sequences, sizes.pairs, 1];
        each.into_iter().zip(counts).map(|(flops, count)| flops * count as f64).sum()
    }

    /// Adds the operations of a node, which may compute several results.
    fn add(&mut self, graph: &Graph, node: &Node) {
        let parts = node.op.components().into_iter().zip(&node.results);
        parts.for_each(|(part, &result)| self.add_part(graph, &part, &node.operands, result));
    }

    /// Adds the operations of one result of a node.
    fn add_part(&mut self, graph: &Graph, op: &Op, operands: &[Value], result: Value) {
        let shape = |i: usize| &graph.ty(operands[i]).shape;
        let mut axes = graph.ty(result).shape.clone();
        let causal = match *op {
            Op::Matmul { transpose_x, .. } => {
                let x = shape(0);
                axes.push(x[x.len() - if transpose_x { 2 } else { 1 }]);
                false
            }
            // The logits are computed in full, although only a reduction of them is stored.
            Op::LinearLse | Op::LinearMean => {
                axes = [shape(0), &shape(1)[..1]].concat();
                false
            }
            // The product of queries and keys is computed for each pair.
            Op::Scores { causal } => {
                axes.extend(shape(0).last());
                causal
            }
            Op::Attend { causal } | Op::AttendTransposed { causal } => {
                axes.push(Dim::Keys(0));
                causal
            }
            // Fused attention computes two products, of queries and keys and of weights and values. Its vjp computes an
            // adjoint of each operand of both. Scores that the vjp recomputes do not count.
            Op::Attention { causal, .. } | Op::AttentionVjp { of: 0, causal, .. } => {
                let width = |i: usize| shape(i)[2].constant().unwrap_or(0);
                axes = vec![shape(0)[0], Dim::Const(width(0) + width(2)), Dim::Keys(0)];
                causal
            }
            Op::AttentionVjp { causal, .. } => {
                axes.push(Dim::Keys(0));
                causal
            }
            _ => return,
        };
        let constants: f64 = axes.iter().filter_map(|d| d.constant()).map(|n| n as f64).product();
        let work = 2.0 * constants;
        let has = |wanted: fn(&Dim) -> bool| axes.iter().any(wanted);
        match () {
            () if has(|d| matches!(d, Dim::Keys(_))) => self.per_pair += if causal { work / 2.0 } else { work },
            () if has(|d| *d == Dim::Tokens) => self.per_token += work,
            () if has(|d| *d == Dim::Targets) => self.per_target += work,
            () if has(|d| *d == Dim::Sequences) => self.per_sequence += work,
            () => self.fixed += work,
        }
    }
}
