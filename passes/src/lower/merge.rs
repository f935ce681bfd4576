//! Launches side by side, on a GPU: what does not wait for each other goes in one launch, if one kernel does it.
//!
//! ```text
//! dA = xᵀ @ dh   dB = hᵀ @ dy   …   Σ dy         products of few tiles each, and sums
//! ─► [dA | dB | …]   [Σ of shares | … | Σ dy]    blocks of all of them: each finds the arguments that are its own
//! ```
//!
//! What ends in a gradient is read by no one before the step's end: it waits for its like, but not for long, since what it
//! reads has a place in memory until then.

use std::collections::{HashMap, HashSet};

use peft_runtime::artifact::{BufferId, Extent, Launch, Output, Storage};

use super::module::Module;

/// Launches that wait, at most: about two layers'.
const WAITING: usize = 36;
/// Bytes of a kernel's arguments on the oldest driver.
const ARGUMENTS: usize = 4096;
/// Launches that end in a gradient and may wait: what a product is of, the product, and the sum of its shares.
const LAST: usize = 3;
/// How far a launch goes ahead.
const AHEAD: usize = 48;

/// What a launch reads and writes.
struct Use {
    all: HashSet<BufferId>,
    written: HashSet<BufferId>,
}

impl Use {
    fn of(module: &Module, launch: &Launch) -> Use {
        let code = &module.codes[module.schedule(launch)];
        let written = launch.buffers.iter().zip(&code.writes).filter(|(_, written)| **written);
        Use { all: launch.buffers.iter().copied().collect(), written: written.map(|(&buffer, _)| buffer).collect() }
    }

    /// One has to come before the other.
    fn waits(&self, other: &Use) -> bool {
        !self.written.is_disjoint(&other.all) || !other.written.is_disjoint(&self.all)
    }
}

pub(super) fn gather(module: &mut Module, launches: Vec<Launch>, outputs: &[Output]) -> Vec<Launch> {
    let launches: Vec<(Use, Launch)> = launches.into_iter().map(|l| (Use::of(module, &l), l)).collect();
    let mut done: Vec<(Use, Vec<Launch>)> = vec![];
    for (used, launch) in late(module, launches, outputs) {
        let arguments = 8 * launch.buffers.len() + 4 * (launch.extents.len() + 1);
        let most = module.limits.beside.min((ARGUMENTS - 4) / arguments);
        let mut found = None;
        for (at, (other, row)) in done.iter().enumerate().rev().take(AHEAD) {
            if used.waits(other) {
                break;
            }
            if row[0].kernel == launch.kernel && row.len() < most {
                found = Some(at);
            }
        }
        match found {
            Some(at) => {
                done[at].0.all.extend(used.all);
                done[at].0.written.extend(used.written);
                done[at].1.push(launch);
            }
            None => done.push((used, vec![launch])),
        }
    }
    done.into_iter().map(|(_, row)| joined(module, row)).collect()
}

/// What a gradient is made of at last, and no other launches are waiting for, as late as it may be.
fn late(module: &Module, launches: Vec<(Use, Launch)>, outputs: &[Output]) -> Vec<(Use, Launch)> {
    // By buffer, how many launches there are yet from one that writes it, or from one that uses it before it is written
    // anew, to the last; what is asked for at once has no end.
    let gradient = |buffer: &BufferId| matches!(module.buffers[*buffer].storage, Storage::Gradient { .. });
    let asked = outputs.iter().map(|o| o.buffer).filter(|buffer| !gradient(buffer));
    let mut written: HashMap<BufferId, usize> = asked.map(|buffer| (buffer, LAST)).collect();
    let mut used: HashMap<BufferId, usize> = HashMap::new();
    let mut left = vec![];
    for (own, _) in launches.iter().rev() {
        let after = own.written.iter().filter_map(|buffer| written.get(buffer));
        let after = after.chain(own.all.iter().filter_map(|buffer| used.get(buffer)));
        let after = after.max().copied().unwrap_or(0);
        let keep = |of: &mut HashMap<BufferId, usize>, buffer: &BufferId| {
            let known = of.entry(*buffer).or_default();
            *known = (*known).max(after + 1);
        };
        own.all.iter().for_each(|buffer| keep(&mut written, buffer));
        own.written.iter().for_each(|buffer| keep(&mut used, buffer));
        left.push(after);
    }
    let (mut ordered, mut waiting) = (vec![], vec![]);
    let release = |waiting: &mut Vec<(usize, (Use, Launch))>, ordered: &mut Vec<(Use, Launch)>| {
        waiting.sort_by_key(|(left, _)| std::cmp::Reverse(*left));
        ordered.extend(waiting.drain(..).map(|(_, launch)| launch));
    };
    for (launch, left) in launches.into_iter().zip(left.into_iter().rev()) {
        if left < LAST {
            waiting.push((left, launch));
            continue;
        }
        // What would be overwritten waits no longer.
        if waiting.len() >= WAITING || waiting.iter().any(|(_, (used, _))| used.waits(&launch.0)) {
            release(&mut waiting, &mut ordered);
        }
        ordered.push(launch);
    }
    release(&mut waiting, &mut ordered);
    ordered
}

/// A row of launches of one kernel as one.
fn joined(module: &mut Module, row: Vec<Launch>) -> Launch {
    if row.len() == 1 {
        return row.into_iter().next().expect("the one");
    }
    let kernel = module.side_by_side(row[0].kernel, row.len());
    let mut op = row[0].op.clone();
    if row.iter().any(|launch| launch.op != op) {
        let mut ops: Vec<&str> = row.iter().map(|launch| &launch.op[..]).collect();
        ops.sort();
        ops.dedup();
        op = ops.join(", ");
    }
    let group = row[0].group;
    let mut all = Launch { kernel, buffers: vec![], extents: vec![], units: Extent::Const(0), group, op };
    for Launch { buffers, extents, units, .. } in row {
        all.buffers.extend(buffers);
        all.extents.extend(extents);
        all.extents.push(units.clone());
        // Blocks are of one launch each.
        all.units = all.units + Extent::CeilDiv(Box::new(units), group.units) * Extent::Const(group.units);
    }
    all
}
