//! Memory planning for temporaries: all of them share one allocation, the arena, and buffers whose live ranges do not
//! overlap may share memory.

use std::collections::BTreeMap;

use crate::artifact::{BufferId, Launch, Manifest, Output, Sizes, Storage};
use crate::memory::CACHE_LINE_FLOATS;

/// The memory plan of a run: where each temporary is in the arena, in 4-byte words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Offset of each temporary in the arena.
    pub offsets: BTreeMap<BufferId, usize>,
    /// Size of the arena.
    pub size: usize,
    /// For each launch the temporaries that it is the first to use; one more element for outputs that no launch uses.
    pub first_used: Vec<Vec<BufferId>>,
}

/// The size of a temporary, and the first and the last launch that uses it.
struct LiveRange {
    buffer: BufferId,
    need: usize,
    first: usize,
    last: usize,
}

/// Plans the arena greedily: the largest buffers first, each in the smallest sufficient gap between the buffers that
/// are live at the same time. Large activations decide the size of the arena, and small buffers fill the gaps.
pub fn plan(manifest: &Manifest, launches: &[Launch], outputs: &[Output], sizes: &Sizes) -> Plan {
    let mut plan = Plan { first_used: vec![vec![]; launches.len() + 1], ..Plan::default() };
    let mut ranges: BTreeMap<BufferId, LiveRange> = BTreeMap::new();
    let named = launches.iter().enumerate().flat_map(|(at, launch)| launch.buffers.iter().map(move |&b| (at, b)));
    for (at, id) in named.chain(outputs.iter().map(|o| (launches.len(), o.buffer))) {
        let buffer = &manifest.buffers[id];
        if buffer.storage == Storage::Temporary {
            let range = ranges.entry(id).or_insert_with(|| {
                plan.first_used[at].push(id);
                // A size that no memory could hold is clamped; the allocation of the arena then fails.
                let need = buffer.elements(sizes).min(u64::MAX >> 24) as usize;
                LiveRange { buffer: id, need: need.next_multiple_of(CACHE_LINE_FLOATS), first: at, last: at }
            });
            range.last = at;
        }
    }
    let mut ranges: Vec<LiveRange> = ranges.into_values().collect();
    ranges.sort_by_key(|range| (std::cmp::Reverse(range.need), range.first));
    // Buffers that have an offset, sorted by it.
    let mut placed: Vec<(usize, &LiveRange)> = Vec::with_capacity(ranges.len());
    for range in &ranges {
        let (mut best, mut end) = (None, 0);
        for (offset, other) in placed.iter().filter(|(_, o)| o.first <= range.last && range.first <= o.last) {
            if *offset >= end + range.need && best.is_none_or(|(gap, _)| offset - end < gap) {
                best = Some((offset - end, end));
            }
            end = end.max(offset + other.need);
        }
        let offset = best.map_or(end, |(_, offset)| offset);
        plan.offsets.insert(range.buffer, offset);
        plan.size = plan.size.max(offset + range.need);
        placed.insert(placed.partition_point(|(o, _)| *o <= offset), (offset, range));
    }
    plan
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::artifact::{Buffer, Element, Entry, Extent, Workgroup};

    proptest! {
        /// No two buffers that are live at the same time overlap.
        #[test]
        fn live_buffers_do_not_overlap(
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
                group: Workgroup::ONE,
                op: String::new(),
            };
            let launches: Vec<Launch> = launches.iter().map(launch).collect();
            let output = launches[output % launches.len()].buffers[0];
            let entry = Entry { launches, outputs: vec![Output { name: "z".into(), buffer: output, shape: vec![] }] };
            let plan = plan(&manifest, &entry.launches, &entry.outputs, &Sizes::default());
            let ranges = |buffer: BufferId| {
                let named = |l: &Launch| l.buffers.contains(&buffer);
                let first = entry.launches.iter().position(named).expect("planned buffers are named");
                let last = entry.launches.iter().rposition(named).expect("planned buffers are named");
                (first, if buffer == output { usize::MAX } else { last })
            };
            let all: Vec<_> = plan.offsets.iter().collect();
            for (i, &(&a, &at_a)) in all.iter().enumerate() {
                prop_assert!(at_a + lengths[a] as usize <= plan.size);
                for &(&b, &at_b) in &all[i + 1..] {
                    let ((from_a, to_a), (from_b, to_b)) = (ranges(a), ranges(b));
                    let together = from_a <= to_b && from_b <= to_a;
                    let (end_a, end_b) = (at_a + lengths[a] as usize, at_b + lengths[b] as usize);
                    let overlap = at_a < end_b && at_b < end_a;
                    prop_assert!(!(together && overlap), "{a} and {b}");
                }
            }
        }
    }
}
