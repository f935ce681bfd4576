//! Lowering to a processor or a GPU: every operation becomes one or more launches of kernels over flat buffers.
//!
//! ```text
//! graph ─► dispatch            which nodes share one launch: prologues, epilogues, row sums, companions
//!            │
//!            ▼                 entry: for each dispatch, in order,
//!          layout, view          where values are stored: buffers, strided views, parts of a concatenation
//!          contraction           the sizes of a matrix product, and which axes are its rows, columns and k
//!          schedule              the kernel and its tile sizes on this machine; equal schedules are one kernel
//!          module                deduplicated kernels, buffers, and launches that prepare frozen weights once
//!            │
//!            ▼
//!          horizontal_fusion   independent launches of one kernel are merged
//! ```
//!
//! The other files lower one kind of operation each and fill in its kernel's arguments by name: `elementwise` (from
//! `groups`), `epilogue`, `gemm_cpu`, `gemm_gpu`, `half_precision`, `fused_attention`, `unfused_attention`,
//! `chunked_logits`, `rowwise` (over `row_layout`), `reduce`, `embedding`, `copy`, `optimizer`. The kernels' code and
//! their costs are in [`crate::kernels`], which does not depend on the lowering.

mod chunked_logits;
mod computed;
mod contraction;
mod copy;
mod dispatch;
mod elementwise;
mod embedding;
mod entry;
mod epilogue;
mod fused_attention;
mod gemm_cpu;
mod gemm_gpu;
mod groups;
mod half_precision;
mod horizontal_fusion;
mod layout;
mod listing;
mod module;
mod optimizer;
mod reduce;
mod row_layout;
mod rowwise;
mod schedule;
mod sizes;
mod unfused_attention;
mod view;

use std::collections::BTreeMap;

use peft_grammar::graph::Graph;
use peft_grammar::model::{Optimizer, Precision};
use peft_runtime::artifact::{Entry, Tensor};

use crate::fuse::Thresholds;
use crate::target::Machine;
use computed::Listing;
use dispatch::{Analysis, dispatch, sink_products};
use entry::Lowering;
use module::Module;
pub use module::{Lowered, link};
pub use sizes::dim_extent;

/// The options of the lowering.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The target machine.
    pub machine: Machine,
    /// The precision of matrix products with frozen weights.
    pub precision: Precision,
    /// The optimizer, whose step is lowered too.
    pub optimizer: Optimizer,
    /// Fuse elementwise groups and row sums into the epilogues of products, normalizations and row sums.
    pub epilogues: bool,
    /// The sizes from which on certain kernels and fusions are used.
    pub thresholds: Thresholds,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            machine: Machine::default(),
            precision: Precision::F32,
            optimizer: Optimizer::default(),
            epilogues: true,
            thresholds: Thresholds::default(),
        }
    }
}

/// Lowers `entries` together, so that they share kernels and prepared weights. If any of the model's `tensors` is
/// trained, it adds entries for the optimizer: the step as `update`, gradient accumulation as `accumulate` and
/// `accumulated`, and the running average of the values as `average`.
///
/// # Errors
///
/// The message names an operation of the graph that has no kernel, or an argument that `tensors` lacks.
pub fn lower(entries: &[(&str, &Graph)], tensors: &[Tensor], options: Options) -> Result<Lowered, String> {
    let mut module = Module::new(tensors, options);
    let (mut lowered, mut listing): (BTreeMap<String, Entry>, Listing) = Default::default();
    for (name, graph) in entries {
        let sunk = options.machine.fusion().sinks_products.then(|| sink_products(graph));
        let analysis = Analysis::of(sunk.as_ref().unwrap_or(graph), tensors, options);
        let mut lowering = Lowering::new(&mut module, &analysis)?;
        for dispatch in dispatch(&analysis) {
            lowering.lower_dispatch(&dispatch)?;
        }
        let (entry, computed) = lowering.finish();
        lowered.insert(name.to_string(), entry);
        listing.insert(name.to_string(), computed);
    }
    if tensors.iter().any(|t| t.trainable.is_some()) {
        let own_rates = tensors.iter().any(|t| t.lr_factor.is_some());
        let entries = optimizer::entries(&mut module, own_rates);
        lowered.extend(entries.map(|(which, entry)| (which.name().to_string(), entry)));
    }
    Ok(module.finish(lowered, listing))
}

#[cfg(test)]
pub(crate) mod tests;
