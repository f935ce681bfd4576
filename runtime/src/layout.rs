//! The temporaries of an entry in the arena, for one batch's sizes.

use std::collections::HashMap;

use crate::arena::{self, Lifetime, Plan};
use crate::artifact::{BufferId, Launch, Manifest, Sizes, Storage};

#[derive(Debug)]
pub(crate) struct Layout {
    /// In the order in which launches name them first.
    temporaries: Vec<BufferId>,
    lifetimes: Vec<Lifetime>,
    plan: Plan,
    slots: HashMap<BufferId, usize>,
}

impl Layout {
    /// A temporary lives from the first launch that names it to the last, an output to the end.
    pub fn new<'a>(
        manifest: &Manifest,
        launches: &[Launch],
        outputs: impl Iterator<Item = &'a BufferId>,
        sizes: &Sizes,
    ) -> Self {
        let (mut temporaries, mut lifetimes) = (vec![], Vec::<Lifetime>::new());
        let mut slots: HashMap<BufferId, usize> = HashMap::new();
        let named = launches.iter().enumerate().flat_map(|(at, launch)| launch.buffers.iter().map(move |&b| (at, b)));
        for (at, id) in named.chain(outputs.map(|&b| (launches.len(), b))) {
            let buffer = &manifest.buffers[id];
            if buffer.storage != Storage::Temporary {
                continue;
            }
            let slot = *slots.entry(id).or_insert_with(|| {
                temporaries.push(id);
                // What no memory could hold stays so, and is refused when the arena is allocated.
                let elements = buffer.elements(sizes).min(u64::MAX >> 24) as usize;
                lifetimes.push(Lifetime { first: at, last: at, elements });
                temporaries.len() - 1
            });
            lifetimes[slot].last = at;
        }
        let plan = arena::plan(&lifetimes);
        Layout { temporaries, lifetimes, plan, slots }
    }

    /// Elements of the arena.
    pub fn elements(&self) -> usize {
        self.plan.elements
    }

    /// Where in the arena a temporary begins, in elements.
    pub fn offset(&self, buffer: BufferId) -> Option<usize> {
        self.slots.get(&buffer).map(|&slot| self.plan.offsets[slot])
    }

    /// The temporaries whose life begins with launch `at`.
    pub fn born(&self, at: usize) -> &[BufferId] {
        let start = self.lifetimes.partition_point(|l| l.first < at);
        let end = self.lifetimes.partition_point(|l| l.first <= at);
        &self.temporaries[start..end]
    }
}
