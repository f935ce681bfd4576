//! What a step costs, from the graphs and the buffer plan of the program that would run it.

use std::collections::{BTreeMap, HashSet};

use peft_grammar::graph::{Dim, Graph, Node, Op, Role, Value};
use peft_grammar::model::{BatchSize, Model, TaskKind};
use peft_grammar::names::OptimizerEntry;
use peft_passes::cost::{Launched, Work};
use peft_passes::dialect::Dialect;
use peft_passes::lower::Lowered;
use peft_passes::pipeline::{self, Entry, Options, Stage};
use peft_passes::target::Machine;
use peft_passes::target::cuda::Card;
use peft_runtime::arena;
use peft_runtime::artifact::{Launch, Manifest, Sizes};
use serde::Serialize;

use crate::failure::Failure;

/// Multiplications and additions of products, counted apart, by what they grow with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Flops {
    pub per_token: f64,
    /// For each token that is predicted.
    pub per_target: f64,
    pub per_sequence: f64,
    /// For each pair of a query and a key that it sees.
    pub per_pair: f64,
    /// Whatever the batch.
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

/// Of a training step.
#[derive(Clone, Debug, Serialize)]
pub struct Costs {
    pub forward_flops: Flops,
    pub backward_flops: Flops,
    /// Of the batch below: what lies in memory between forward and backward pass, and scratch.
    pub activation_bytes_per_token: f64,
    pub batch: Shape,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub roofline: Option<Roofline>,
}

/// What a training step of that batch asks of a GPU, and how long its memory and its arithmetic take for that at their
/// best.
#[derive(Clone, Debug, Serialize)]
pub struct Roofline {
    pub card: &'static str,
    pub launches: usize,
    /// Each launch reads and writes its buffers once.
    pub bytes: f64,
    /// Of products, by tensor cores and in f32.
    pub half_flops: f64,
    pub flops: f64,
    pub memory_seconds: f64,
    pub product_seconds: f64,
    /// By a model of the kernels' tiles, see [`peft_passes::cost`].
    pub modelled_seconds: f64,
    /// Launches that compute the same, those that take longest first.
    pub kernels: Vec<Kind>,
}

/// Launches of a step that compute the same.
#[derive(Clone, Debug, Serialize)]
pub struct Kind {
    pub op: String,
    pub launches: usize,
    pub bytes: f64,
    pub flops: f64,
    /// Of its memory and its products, the slower at its best.
    pub best_seconds: f64,
    pub modelled_seconds: f64,
    /// `memory`, `products`, or what is slower than either: `tiles`.
    pub bound: &'static str,
}

impl Roofline {
    /// No step is faster than the slower of the two.
    pub fn seconds(&self) -> f64 {
        self.memory_seconds.max(self.product_seconds)
    }
}

/// The batch that memory is counted for.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Shape {
    pub sequences: u64,
    pub tokens_each: u64,
    pub targets: u64,
}

impl Shape {
    fn sizes(self, values: u64) -> Sizes {
        let Shape { sequences, tokens_each, targets } = self;
        let tokens = sequences * tokens_each;
        Sizes { tokens, sequences, targets, pairs: tokens * tokens_each, values }
    }
}

/// Sequences longer than this are not what a plan is made for.
const TYPICAL: u64 = 128;

/// For sequences of `tokens_each`, or of typical ones.
pub fn costs(model: &Model, options: &Options, tokens_each: Option<u64>) -> Result<Costs, Failure> {
    let dialect = Dialect::new()?;
    let lowered = |entries: &[Entry], until| {
        pipeline::run(&dialect, model, entries, &Options { until, ..options.clone() }).map_err(Failure::from)
    };
    // Logits alone: what the forward pass of training computes.
    let forward = flops(&lowered(&[Entry::Forward], Stage::Fused)?.graphs[0]);
    let trained = lowered(&[Entry::Train], Stage::Loops)?;
    let graph = &trained.graphs[0];
    let both = flops(graph);
    let tokens_each = tokens_each.unwrap_or(TYPICAL).min(model.task.max_tokens);
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
    let batch = Shape { sequences, tokens_each, targets };
    let values = model.params.iter().filter_map(|p| p.trained_shape()).map(|s| s.iter().product::<u64>()).sum();
    let sizes = batch.sizes(values);
    let lowered = trained.lowered.expect("the way led to loops");
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

fn roofline(card: Card, model: &Model, graph: &Graph, lowered: &Lowered, sizes: &Sizes) -> Roofline {
    let manifest = &lowered.manifest;
    let launches = [Entry::Train.name(), OptimizerEntry::Update.name()]
        .into_iter()
        .filter_map(|name| manifest.entries.get(name))
        .flat_map(|e| &e.launches);
    let mut kernels: Vec<Kind> = vec![];
    for launch in launches.clone() {
        let extents: Vec<u64> = launch.extents.iter().map(|e| e.eval(sizes)).collect();
        let (buffers, units) = (launch.buffers.len(), launch.units.eval(sizes));
        let launched = Launched { buffers, sizes: &extents, units, batch: sizes };
        let work = lowered.functions[launch.kernel].work(launched, &card);
        let bytes = bytes(launch, &work, manifest, sizes);
        let (memory, products) = (bytes / card.bandwidth, work.arithmetic(&card));
        let (best, modelled) = (memory.max(products), work.time(&card, bytes));
        let bound = match () {
            () if modelled > 1.5 * best => "tiles",
            () if memory > products => "memory",
            () => "products",
        };
        let alike = |kind: &&mut Kind| kind.op == launch.op && kind.bound == bound;
        if kernels.iter_mut().find(alike).is_none() {
            let op = launch.op.clone();
            let none = (0.0, 0.0, 0.0, 0.0);
            let (bytes, flops, best_seconds, modelled_seconds) = none;
            kernels.push(Kind { op, launches: 0, bytes, flops, best_seconds, modelled_seconds, bound });
        }
        let kind = kernels.iter_mut().find(alike).expect("it is there");
        kind.launches += 1;
        kind.bytes += bytes;
        kind.flops += work.flops;
        kind.best_seconds += best;
        kind.modelled_seconds += modelled;
    }
    kernels.sort_by(|x, y| y.modelled_seconds.total_cmp(&x.modelled_seconds));
    let bytes = kernels.iter().map(|kind| kind.bytes).sum::<f64>();
    let all = flops(graph).of(sizes);
    let half_flops = if model.train.precision.narrows() { frozen_flops(graph).of(sizes) } else { 0.0 };
    let flops = all - half_flops;
    Roofline {
        card: card.name,
        launches: launches.count(),
        bytes,
        half_flops,
        flops,
        memory_seconds: bytes / card.bandwidth,
        product_seconds: half_flops / card.half_flops + flops / card.flops,
        modelled_seconds: kernels.iter().map(|kind| kind.modelled_seconds).sum(),
        kernels,
    }
}

/// Each buffer once, or twice where it is written anew; of operands and results what the launch reads and writes.
fn bytes(launch: &Launch, work: &Work, manifest: &Manifest, sizes: &Sizes) -> f64 {
    let mut buffers: BTreeMap<usize, f64> = BTreeMap::new();
    for (i, &buffer) in launch.buffers.iter().enumerate() {
        let whole = 4.0 * manifest.buffers[buffer].elements(sizes) as f64;
        let some = work.reads.get(i).map_or(whole, |&reads| reads.min(whole));
        let [whole, some] = [whole, some].map(|bytes| work.passes[i] * bytes);
        buffers.entry(buffer).and_modify(|bytes| *bytes = whole.min(*bytes + some)).or_insert(some);
    }
    buffers.values().sum()
}

/// Of the products with frozen weights alone.
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

/// Two for each multiplication of a product.
pub fn flops(graph: &Graph) -> Flops {
    let mut flops = Flops::default();
    graph.nodes.iter().for_each(|node| flops.add(graph, node));
    flops
}

impl Flops {
    /// All of them, for a batch.
    fn of(self, sizes: &Sizes) -> f64 {
        let each = [self.per_token, self.per_target, self.per_sequence, self.per_pair, self.fixed];
        let counts = [sizes.tokens, sizes.targets, sizes.sequences, sizes.pairs, 1];
        each.into_iter().zip(counts).map(|(flops, count)| flops * count as f64).sum()
    }

    fn add(&mut self, graph: &Graph, node: &Node) {
        let parts = node.op.joins().into_iter().zip(&node.results);
        parts.for_each(|(part, &result)| self.add_part(graph, &part, &node.operands, result));
    }

    fn add_part(&mut self, graph: &Graph, op: &Op, operands: &[Value], result: Value) {
        let shape = |i: usize| &graph.ty(operands[i]).shape;
        let mut axes = graph.ty(result).shape.clone();
        let causal = match *op {
            Op::Matmul { transpose_x, .. } => {
                let x = shape(0);
                axes.push(x[x.len() - if transpose_x { 2 } else { 1 }]);
                false
            }
            // A product with the whole weight, whatever is kept of it.
            Op::LinearLse | Op::LinearMean => {
                axes = [shape(0), &shape(1)[..1]].concat();
                false
            }
            // Tokens of one side by keys of the other are pairs.
            Op::Scores { causal } => {
                axes.extend(shape(0).last());
                causal
            }
            Op::Attend { causal } | Op::AttendTransposed { causal } => {
                axes.push(Dim::Keys(0));
                causal
            }
            // Scores and what attends by them; backward, an adjoint of each side of both. What is computed anew
            // does not count.
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
