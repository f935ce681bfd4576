//! Horizontal fusion, on a GPU: independent launches of the same kernel are merged into one launch.
//!
//! ```text
//! dA = xᵀ @ dh   dB = hᵀ @ dy   …   Σ dy                    gemms of few tiles each, and sums
//! ─► [dA | dB | …]   [Σ of split-K partial sums | … | Σ dy]    one grid over the blocks of all of them
//! ```
//!
//! Each block of a merged launch finds the arguments of the launch that it belongs to. Nothing reads a gradient before
//! the end of the step, so the launches that end in a gradient are delayed until several can be merged. The delay is
//! bounded, because the operands of a delayed launch stay allocated.

use std::collections::{HashMap, HashSet};

use peft_runtime::artifact::{BufferId, Extent, Launch, Output, Storage};

use super::computed::Emitted;
use super::module::Module;

/// The most launches that are delayed at once: about those of two layers.
const MAX_DELAYED: usize = 36;
/// The size limit of a kernel's parameters, in bytes: 4 KiB before CUDA 12.1.
const MAX_ARGUMENT_BYTES: usize = 4096;
/// The length of the tail of launches before a gradient that may be delayed: the producer of a gemm's operand, the
/// gemm, and the sum of its split-K partial sums.
const GRADIENT_TAIL: usize = 3;
/// The most launches that a launch may be moved ahead of, to join an earlier one.
const MAX_HOIST: usize = 48;

/// The buffers that a launch, or several merged ones, use.
struct BufferAccess {
    all: HashSet<BufferId>,
    written: HashSet<BufferId>,
}

impl BufferAccess {
    fn of(module: &Module, launch: &Launch) -> BufferAccess {
        let code = &module.codes[module.schedule(launch)];
        let written = launch.buffers.iter().zip(&code.writes).filter(|(_, written)| **written);
        BufferAccess {
            all: launch.buffers.iter().copied().collect(),
            written: written.map(|(&buffer, _)| buffer).collect(),
        }
    }

    /// The two access a common buffer that at least one of them writes, so that their order matters.
    fn conflicts(&self, other: &BufferAccess) -> bool {
        !self.written.is_disjoint(&other.all) || !other.written.is_disjoint(&self.all)
    }
}

/// Merges independent launches of one kernel; the order of launches that conflict is kept.
pub(super) fn merge_launches(module: &mut Module, launches: Vec<Emitted>, outputs: &[Output]) -> Vec<Emitted> {
    let access = |emitted: Emitted| (BufferAccess::of(module, &emitted.launch), emitted);
    let launches: Vec<(BufferAccess, Emitted)> = launches.into_iter().map(access).collect();
    let mut merged_launches: Vec<(BufferAccess, Vec<Emitted>)> = vec![];
    for (access, emitted) in delay_gradients(module, launches, outputs) {
        let launch = &emitted.launch;
        let arguments = 8 * launch.buffers.len() + 4 * (launch.extents.len() + 1);
        let most = module.thresholds.max_merged_launches.min((MAX_ARGUMENT_BYTES - 4) / arguments);
        let mut target = None;
        for (at, (other, run)) in merged_launches.iter().enumerate().rev().take(MAX_HOIST) {
            if access.conflicts(other) {
                break;
            }
            if run[0].launch.kernel == launch.kernel && run.len() < most {
                target = Some(at);
            }
        }
        match target {
            Some(at) => {
                merged_launches[at].0.all.extend(access.all);
                merged_launches[at].0.written.extend(access.written);
                merged_launches[at].1.push(emitted);
            }
            None => merged_launches.push((access, vec![emitted])),
        }
    }
    merged_launches.into_iter().map(|(_, run)| merged(module, run)).collect()
}

/// Moves the launches of each gradient's tail down as far as the bounds above allow, if nothing but the gradient needs
/// them.
fn delay_gradients(
    module: &Module,
    launches: Vec<(BufferAccess, Emitted)>,
    outputs: &[Output],
) -> Vec<(BufferAccess, Emitted)> {
    // For each buffer the number of launches on the longest dependent chain behind the launch at hand: in `after_write`
    // if that launch writes the buffer, in `after_use` if it uses the buffer before a later launch overwrites it.
    // Outputs other than gradients begin with `GRADIENT_TAIL`, so that no launch that they depend on is delayed.
    let gradient = |buffer: &BufferId| matches!(module.buffers[*buffer].storage, Storage::Gradient { .. });
    let requested = outputs.iter().map(|o| o.buffer).filter(|buffer| !gradient(buffer));
    let mut after_write: HashMap<BufferId, usize> = requested.map(|buffer| (buffer, GRADIENT_TAIL)).collect();
    let mut after_use: HashMap<BufferId, usize> = HashMap::new();
    let mut distances = vec![];
    for (own, _) in launches.iter().rev() {
        let after = own.written.iter().filter_map(|buffer| after_write.get(buffer));
        let after = after.chain(own.all.iter().filter_map(|buffer| after_use.get(buffer)));
        let after = after.max().copied().unwrap_or(0);
        let keep = |of: &mut HashMap<BufferId, usize>, buffer: &BufferId| {
            let known = of.entry(*buffer).or_default();
            *known = (*known).max(after + 1);
        };
        own.all.iter().for_each(|buffer| keep(&mut after_write, buffer));
        own.written.iter().for_each(|buffer| keep(&mut after_use, buffer));
        distances.push(after);
    }
    let (mut ordered, mut delayed) = (vec![], vec![]);
    let release = |delayed: &mut Vec<(usize, (BufferAccess, Emitted))>, ordered: &mut Vec<(BufferAccess, Emitted)>| {
        delayed.sort_by_key(|(distance, _)| std::cmp::Reverse(*distance));
        ordered.extend(delayed.drain(..).map(|(_, launch)| launch));
    };
    for (launch, distance) in launches.into_iter().zip(distances.into_iter().rev()) {
        if distance < GRADIENT_TAIL {
            delayed.push((distance, launch));
            continue;
        }
        // A launch that conflicts with a delayed one releases all of them first.
        if delayed.len() >= MAX_DELAYED || delayed.iter().any(|(_, (access, _))| access.conflicts(&launch.0)) {
            release(&mut delayed, &mut ordered);
        }
        ordered.push(launch);
    }
    release(&mut delayed, &mut ordered);
    ordered
}

/// Merges a run of launches of one kernel into one launch.
fn merged(module: &mut Module, run: Vec<Emitted>) -> Emitted {
    if run.len() == 1 {
        return run.into_iter().next().expect("one launch");
    }
    let first = &run[0].launch;
    let kernel = module.merged_kernel(first.kernel, run.len());
    let mut op = first.op.clone();
    if run.iter().any(|emitted| emitted.launch.op != op) {
        let mut ops: Vec<&str> = run.iter().map(|emitted| &emitted.launch.op[..]).collect();
        ops.sort();
        ops.dedup();
        op = ops.join(", ");
    }
    let group = first.group;
    let mut all = Launch { kernel, buffers: vec![], extents: vec![], units: Extent::Const(0), group, op };
    let mut computed = vec![];
    for Emitted { launch: Launch { buffers, extents, units, .. }, computed: own } in run {
        computed.extend(own);
        all.buffers.extend(buffers);
        all.extents.extend(extents);
        all.extents.push(units.clone());
        // A thread block belongs to one launch alone, so each launch's units are rounded up to whole blocks.
        all.units = all.units + Extent::CeilDiv(Box::new(units), group.units) * Extent::Const(group.units);
    }
    Emitted { launch: all, computed }
}
