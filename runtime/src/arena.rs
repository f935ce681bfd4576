//! Where temporaries lie: one block of memory, each buffer in it from the launch that first names it
//! to the one that last does.

use std::collections::BTreeMap;

use crate::artifact::{BufferId, Entry, Manifest, Sizes, Storage};
use crate::memory::LINE;

/// Offsets, in numbers, of an entry's temporaries for one batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub offsets: BTreeMap<BufferId, usize>,
    /// Numbers in all.
    pub size: usize,
}

/// Takes the smallest gap that fits; a freed buffer joins the gaps beside it.
pub fn plan(manifest: &Manifest, entry: &Entry, sizes: &Sizes) -> Plan {
    let temporary = |b: &BufferId| manifest.buffers[*b].storage == Storage::Temporary;
    let mut last: BTreeMap<BufferId, usize> = BTreeMap::new();
    for (at, launch) in entry.launches.iter().enumerate() {
        for &buffer in launch.buffers.iter().filter(|b| temporary(b)) {
            last.insert(buffer, at);
        }
    }
    for output in entry.outputs.iter().filter(|o| temporary(&o.buffer)) {
        last.insert(output.buffer, entry.launches.len());
    }
    let mut ends: Vec<Vec<BufferId>> = vec![vec![]; entry.launches.len() + 1];
    last.iter().for_each(|(&buffer, &at)| ends[at].push(buffer));

    let length = |buffer: BufferId| (manifest.buffers[buffer].elements(sizes) as usize).next_multiple_of(LINE);
    let mut plan = Plan::default();
    // Gaps by offset.
    let mut gaps: BTreeMap<usize, usize> = BTreeMap::new();
    for (at, launch) in entry.launches.iter().enumerate() {
        for &buffer in launch.buffers.iter().filter(|b| temporary(b)) {
            if plan.offsets.contains_key(&buffer) {
                continue;
            }
            let need = length(buffer);
            let fit = gaps.iter().filter(|&(_, &size)| size >= need).min_by_key(|&(_, &size)| size);
            let offset = match fit.map(|(&offset, &size)| (offset, size)) {
                Some((offset, size)) => {
                    gaps.remove(&offset);
                    if size > need {
                        gaps.insert(offset + need, size - need);
                    }
                    offset
                }
                None => {
                    // A gap at the very end grows.
                    let tail = gaps.iter().next_back().map(|(&offset, &size)| (offset, size));
                    let offset = match tail.filter(|&(offset, size)| offset + size == plan.size) {
                        Some((offset, _)) => {
                            gaps.remove(&offset);
                            offset
                        }
                        None => plan.size,
                    };
                    plan.size = offset + need;
                    offset
                }
            };
            plan.offsets.insert(buffer, offset);
        }
        for &buffer in &ends[at] {
            release(&mut gaps, plan.offsets[&buffer], length(buffer));
        }
    }
    plan
}

fn release(gaps: &mut BTreeMap<usize, usize>, mut offset: usize, mut size: usize) {
    if size == 0 {
        return;
    }
    if let Some(next) = gaps.remove(&(offset + size)) {
        size += next;
    }
    let before = gaps.range(..offset).next_back().map(|(&o, &s)| (o, s));
    if let Some((o, s)) = before.filter(|&(o, s)| o + s == offset) {
        gaps.remove(&o);
        offset = o;
        size += s;
    }
    gaps.insert(offset, size);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::artifact::{Buffer, Element, Extent, Launch, Output};

    proptest! {
        /// No two buffers that live at once share a number.
        #[test]
        fn live_buffers_keep_apart(
            lengths in proptest::collection::vec(0u64..200, 1..20),
            launches in proptest::collection::vec(proptest::collection::vec(0usize..20, 1..4), 1..30),
            output in 0usize..20,
        ) {
            let count = lengths.len();
            let buffer = |&n: &u64| Buffer { element: Element::F32, shape: vec![Extent::Const(n)], storage: Storage::Temporary };
            let manifest = Manifest { buffers: lengths.iter().map(buffer).collect(), ..Manifest::default() };
            let launch = |names: &Vec<usize>| Launch {
                kernel: 0,
                buffers: names.iter().map(|n| n % count).collect(),
                extents: vec![],
                units: Extent::Const(1),
                op: String::new(),
            };
            let launches: Vec<Launch> = launches.iter().map(launch).collect();
            let output = launches[output % launches.len()].buffers[0];
            let entry = Entry { launches, outputs: vec![Output { name: "z".into(), buffer: output, shape: vec![] }] };
            let plan = plan(&manifest, &entry, &Sizes::default());
            let lives = |buffer: BufferId| {
                let named = |l: &Launch| l.buffers.contains(&buffer);
                let first = entry.launches.iter().position(named).expect("planned buffers are named");
                let last = entry.launches.iter().rposition(named).expect("planned buffers are named");
                (first, if buffer == output { usize::MAX } else { last })
            };
            let all: Vec<_> = plan.offsets.iter().collect();
            for (i, &(&a, &at_a)) in all.iter().enumerate() {
                prop_assert!(at_a + lengths[a] as usize <= plan.size);
                for &(&b, &at_b) in &all[i + 1..] {
                    let ((from_a, to_a), (from_b, to_b)) = (lives(a), lives(b));
                    let together = from_a <= to_b && from_b <= to_a;
                    let (end_a, end_b) = (at_a + lengths[a] as usize, at_b + lengths[b] as usize);
                    let overlap = at_a < end_b && at_b < end_a;
                    prop_assert!(!(together && overlap), "{a} and {b}");
                }
            }
        }
    }
}
