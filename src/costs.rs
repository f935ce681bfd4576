//! What a step costs, from the graphs and the buffer plan of the program that would run it.

use peft_grammar::graph::{Dim, Graph, Op};
use peft_grammar::model::{Model, TaskKind};
use peft_passes::dialect::Dialect;
use peft_passes::pipeline::{self, Entry, Options, Stage};
use peft_runtime::arena;
use peft_runtime::artifact::Sizes;
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
}

/// The batch that memory is counted for.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Shape {
    pub sequences: u64,
    pub tokens_each: u64,
    pub targets: u64,
}

/// Sequences longer than this are not what a plan is made for.
const TYPICAL: u64 = 128;

pub fn costs(model: &Model, options: &Options) -> Result<Costs, Failure> {
    let dialect = Dialect::new()?;
    let lowered = |entries: &[Entry], until| {
        pipeline::run(&dialect, model, entries, &Options { until, ..options.clone() }).map_err(Failure::from)
    };
    // Logits alone: what the forward pass of training computes.
    let forward = flops(&lowered(&[Entry::Forward], Stage::Fused)?.graphs[0]);
    let trained = lowered(&[Entry::Train], Stage::Loops)?;
    let both = flops(&trained.graphs[0]);
    let tokens_each = model.task.max_tokens.min(TYPICAL);
    let sequences = model.train.batch;
    let tokens = sequences * tokens_each;
    let targets = match model.task.kind {
        TaskKind::Generation { .. } => tokens / 2,
        TaskKind::Classification { .. } => 0,
    };
    let sizes = Sizes { tokens, sequences, targets, pairs: tokens * tokens_each, values: 0 };
    let manifest = trained.lowered.expect("the way led to loops").manifest;
    let entry = &manifest.entries["train"];
    let numbers = arena::plan(&manifest, &entry.launches, &entry.outputs, &sizes).size;
    Ok(Costs {
        forward_flops: forward,
        backward_flops: both.minus(forward),
        activation_bytes_per_token: 4.0 * numbers as f64 / tokens as f64,
        batch: Shape { sequences, tokens_each, targets },
    })
}

/// Two for each multiplication of a product.
pub fn flops(graph: &Graph) -> Flops {
    let mut flops = Flops::default();
    for node in &graph.nodes {
        let shape = |i: usize| &graph.ty(node.operands[i]).shape;
        let result = &graph.ty(node.result).shape;
        let mut axes = result.clone();
        let causal = match node.op {
            Op::Matmul { transpose_x, .. } => {
                let x = shape(0);
                axes.push(x[x.len() - if transpose_x { 2 } else { 1 }]);
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
            _ => continue,
        };
        let constants: f64 = axes.iter().filter_map(|d| d.constant()).map(|n| n as f64).product();
        let work = 2.0 * constants;
        let has = |wanted: fn(&Dim) -> bool| axes.iter().any(wanted);
        match () {
            () if has(|d| matches!(d, Dim::Keys(_))) => flops.per_pair += if causal { work / 2.0 } else { work },
            () if has(|d| *d == Dim::Tokens) => flops.per_token += work,
            () if has(|d| *d == Dim::Targets) => flops.per_target += work,
            () if has(|d| *d == Dim::Sequences) => flops.per_sequence += work,
            () => flops.fixed += work,
        }
    }
    flops
}
