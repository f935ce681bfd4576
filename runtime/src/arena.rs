//! Where temporaries lie: one block of memory, each buffer in it from the launch that first names it
//! to the one that last does.

use std::collections::BTreeMap;

use crate::artifact::{BufferId, Launch, Manifest, Output, Sizes, Storage};
use crate::memory::LINE;

/// Offsets, in numbers, of the temporaries that some launches name, for one batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub offsets: BTreeMap<BufferId, usize>,
    /// Numbers in all.
    pub size: usize,
    /// The temporaries each launch is the first to name.
    pub born: Vec<Vec<BufferId>>,
}

/// What a temporary needs, and from which launch to which.
struct Life {
    buffer: BufferId,
    need: usize,
    first: usize,
    last: usize,
}

/// The largest first, each in the smallest gap that fits between those that live at the same time: large
/// activations decide how much is needed, and small ones find room between them.
pub fn plan(manifest: &Manifest, launches: &[Launch], outputs: &[Output], sizes: &Sizes) -> Plan {
    let mut plan = Plan { born: vec![vec![]; launches.len() + 1], ..Plan::default() };
    let mut lives: BTreeMap<BufferId, Life> = BTreeMap::new();
    let named = launches.iter().enumerate().flat_map(|(at, launch)| launch.buffers.iter().map(move |&b| (at, b)));
    for (at, id) in named.chain(outputs.iter().map(|o| (launches.len(), o.buffer))) {
        let buffer = &manifest.buffers[id];
        if buffer.storage == Storage::Temporary {
            let life = lives.entry(id).or_insert_with(|| {
                plan.born[at].push(id);
                // What no memory could hold is refused when it is allocated.
                let need = buffer.elements(sizes).min(u64::MAX >> 24) as usize;
                Life { buffer: id, need: need.next_multiple_of(LINE), first: at, last: at }
            });
            life.last = at;
        }
    }
    let mut lives: Vec<Life> = lives.into_values().collect();
    lives.sort_by_key(|life| (std::cmp::Reverse(life.need), life.first));
    // Those that have a place, with it, by offset.
    let mut placed: Vec<(usize, &Life)> = Vec::with_capacity(lives.len());
    for life in &lives {
        let (mut best, mut end) = (None, 0);
        for (offset, other) in placed.iter().filter(|(_, o)| o.first <= life.last && life.first <= o.last) {
            if *offset >= end + life.need && best.is_none_or(|(gap, _)| offset - end < gap) {
                best = Some((offset - end, end));
            }
            end = end.max(offset + other.need);
        }
        let offset = best.map_or(end, |(_, offset)| offset);
        plan.offsets.insert(life.buffer, offset);
        plan.size = plan.size.max(offset + life.need);
        placed.insert(placed.partition_point(|(o, _)| *o <= offset), (offset, life));
    }
    plan
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::artifact::{Buffer, Element, Entry, Extent, Workgroup};

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
                group: Workgroup::ONE,
                op: String::new(),
            };
            let launches: Vec<Launch> = launches.iter().map(launch).collect();
            let output = launches[output % launches.len()].buffers[0];
            let entry = Entry { launches, outputs: vec![Output { name: "z".into(), buffer: output, shape: vec![] }] };
            let plan = plan(&manifest, &entry.launches, &entry.outputs, &Sizes::default());
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
