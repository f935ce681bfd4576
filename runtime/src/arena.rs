//! Where the temporaries of an entry lie: one block of memory, planned from how long each lives.
//!
//! Greedy by size: the largest first, each at the smallest gap it fits between those that live at the
//! same time. That is within a few percent of the lower bound on training graphs, whose large
//! activations dominate.

use crate::memory::ALIGNMENT;

/// A buffer's need: `elements` of four bytes from launch `first` to launch `last`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    pub first: usize,
    pub last: usize,
    pub elements: usize,
}

impl Lifetime {
    fn overlaps(&self, other: &Lifetime) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Where each buffer begins, in elements; a multiple of [`ALIGNMENT`] bytes.
    pub offsets: Vec<usize>,
    /// Elements in all.
    pub elements: usize,
}

/// Lays the buffers out so that no two that live at the same time overlap.
pub fn plan(lifetimes: &[Lifetime]) -> Plan {
    const LINE: usize = ALIGNMENT / 4;
    let mut order: Vec<usize> = (0..lifetimes.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(lifetimes[i].elements), lifetimes[i].first));
    let mut offsets = vec![0; lifetimes.len()];
    let mut elements = 0;
    // Those that have a place, by offset.
    let mut placed: Vec<usize> = Vec::with_capacity(lifetimes.len());
    for i in order {
        let need = lifetimes[i].elements.div_ceil(LINE) * LINE;
        if need == 0 {
            continue;
        }
        let (mut best, mut end) = (None, 0);
        for &other in placed.iter().filter(|&&o| lifetimes[o].overlaps(&lifetimes[i])) {
            let start = offsets[other];
            if start >= end + need && best.is_none_or(|(gap, _)| start - end < gap) {
                best = Some((start - end, end));
            }
            end = end.max(start + lifetimes[other].elements.div_ceil(LINE) * LINE);
        }
        let offset = best.map_or(end, |(_, offset)| offset);
        offsets[i] = offset;
        elements = elements.max(offset + need);
        let at = placed.partition_point(|&o| offsets[o] <= offset);
        placed.insert(at, i);
    }
    Plan { offsets, elements }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lifetime(first: usize, last: usize, elements: usize) -> Lifetime {
        Lifetime { first, last, elements }
    }

    #[test]
    fn a_chain_takes_two_places() {
        let chain: Vec<Lifetime> = (0..10).map(|i| lifetime(i, i + 1, 160)).collect();
        assert_eq!(plan(&chain).elements, 320);
    }

    #[test]
    fn nothing_takes_nothing() {
        assert_eq!(plan(&[]), Plan::default());
        assert_eq!(plan(&[lifetime(0, 3, 0)]).elements, 0);
    }

    proptest! {
        #[test]
        fn no_two_live_buffers_overlap(raw in prop::collection::vec((0usize..40, 0usize..40, 0usize..300), 0..60)) {
            let lifetimes: Vec<Lifetime> =
                raw.iter().map(|&(a, b, n)| lifetime(a.min(b), a.max(b), n)).collect();
            let plan = plan(&lifetimes);
            for (i, a) in lifetimes.iter().enumerate() {
                prop_assert!((plan.offsets[i] * 4).is_multiple_of(ALIGNMENT));
                prop_assert!(plan.offsets[i] + a.elements <= plan.elements || a.elements == 0);
                for (j, b) in lifetimes.iter().enumerate().skip(i + 1) {
                    let apart = plan.offsets[i] + a.elements <= plan.offsets[j]
                        || plan.offsets[j] + b.elements <= plan.offsets[i];
                    prop_assert!(!a.overlaps(b) || apart || a.elements == 0 || b.elements == 0);
                }
            }
            // Never worse than every buffer in a place of its own.
            let sum: usize = lifetimes.iter().map(|l| l.elements.next_multiple_of(ALIGNMENT / 4)).sum();
            prop_assert!(plan.elements <= sum);
        }
    }
}
