//! Lowering to a processor or a GPU: every operation becomes a launch of a kernel over flat buffers.
//!
//! ```text
//! graph ─► dispatch   which nodes are one launch: prologues, epilogues, row sums, companions     pure, of graph and options
//!            │
//!            ▼        in the dispatches' order, each in its turn (entry):
//!          layout     where values lie: views, aliases, places among what they are put together with
//!          problem    what is to be computed, by its sizes
//!          schedule   how this machine computes it: equal schedules are one kernel
//!          module     kernels, buffers, what is prepared of frozen weights once and for all
//!            │
//!            ▼
//!          merge      launches of one kernel that do not wait for each other are one
//! ```
//!
//! The rest of the files have the dispatches by kind: what their kernels get, under the arguments' names. The kernels
//! themselves stand in [`crate::kernels`], with what a launch of each costs, and know nothing of all this.

mod attention;
mod copy;
mod dispatch;
mod entry;
mod epilogue;
mod flash;
mod gemm_cpu;
mod gemm_gpu;
mod groups;
mod halves;
mod head;
mod layout;
mod map;
mod merge;
mod module;
mod optimizer;
mod problem;
mod reduce;
mod rows;
mod schedule;
mod sizes;
mod span;
mod tables;
mod view;

use std::collections::BTreeMap;

use peft_grammar::graph::Graph;
use peft_grammar::model::{Optimizer, Precision};
use peft_runtime::artifact::{Entry, Tensor};

use crate::fuse::Limits;
use crate::target::Machine;
use dispatch::{Facts, dispatch, put_off};
use entry::Lowering;
use module::Module;
pub use module::{Lowered, together};
pub use sizes::dim_extent;

/// What kernels are made for, and how.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub machine: Machine,
    /// Of products with frozen weights.
    pub precision: Precision,
    pub optimizer: Optimizer,
    /// Products take along what follows them element by element.
    pub epilogues: bool,
    pub limits: Limits,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            machine: Machine::default(),
            precision: Precision::F32,
            optimizer: Optimizer::default(),
            epilogues: true,
            limits: Limits::default(),
        }
    }
}

/// Lowers `entries` together, so that they share kernels and prepared weights; the optimizer's step
/// joins them as `update` if anything trains, sums of gradients as `accumulate` and `accumulated`, and the average of the
/// values as `average`. `tensors` are the model's, by name.
pub fn lower(entries: &[(&str, &Graph)], tensors: &[Tensor], options: Options) -> Result<Lowered, String> {
    let mut module = Module::new(tensors, options);
    let mut lowered: BTreeMap<String, Entry> = BTreeMap::new();
    for (name, graph) in entries {
        let put_off = options.machine.fusion().puts_off.then(|| put_off(graph));
        let facts = Facts::of(put_off.as_ref().unwrap_or(graph), tensors, options);
        let mut lowering = Lowering::new(&mut module, &facts)?;
        for dispatch in dispatch(&facts) {
            lowering.dispatch(&dispatch)?;
        }
        lowered.insert(name.to_string(), lowering.finish());
    }
    if tensors.iter().any(|t| t.trainable.is_some()) {
        let own_rates = tensors.iter().any(|t| t.lr_factor.is_some());
        let entries = optimizer::entries(&mut module, own_rates);
        lowered.extend(entries.map(|(which, entry)| (which.name().to_string(), entry)));
    }
    Ok(module.finish(lowered))
}

#[cfg(test)]
pub(crate) mod tests;
