//! Race detection: the last accesses to each byte, and whether they are ordered before the current one.
//!
//! Time is counted in epochs. An epoch begins with each block and at each barrier of a block, and counting continues
//! from launch to launch. Within an epoch each warp counts the points that order its lanes (`bar.warp.sync` and,
//! depending on the options, shuffles). Two accesses to a byte, at least one of them a write, are ordered if
//!
//! - the same thread makes both, or both are atomic;
//! - they belong to different launches, or to different epochs of one block;
//! - they belong to one warp and there is such a point between them.
//!
//! Blocks of one launch are never ordered.

use std::ops::Range;

use crate::error::ConflictingAccess;

/// An access to a byte. All zero stands for none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Access {
    epoch: u32,
    sync: u32,
    accessor: Accessor,
    line: u32,
}

/// The origin of an access: a thread of a block, or something wider.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accessor(u32);

impl Accessor {
    /// Several lanes of a warp; the warp's index is added.
    const LANES: u32 = 1 << 16;
    /// Several warps of a block.
    const WARPS: Accessor = Accessor(1 << 17);
    /// Several blocks.
    const BLOCKS: Accessor = Accessor(1 << 18);
    /// An atomic instruction of any thread.
    pub const ATOMIC: Accessor = Accessor(1 << 19);
    const MATRIX: u32 = 1 << 14;

    pub fn thread(warp: usize, lane: usize) -> Accessor {
        Accessor((warp * 32 + lane) as u32)
    }

    /// A whole warp that accesses a fragment of some kind, where it is unspecified which lane accesses what.
    pub fn matrix(warp: usize, kind: u32) -> Accessor {
        Accessor(Accessor::MATRIX | (warp as u32) << 4 | kind)
    }

    fn warp(self) -> Option<u32> {
        match self.0 {
            n if n < Accessor::MATRIX => Some(n / 32),
            n if n < Accessor::LANES => Some((n & !Accessor::MATRIX) >> 4),
            n if n < Accessor::WARPS.0 => Some(n & !Accessor::LANES),
            _ => None,
        }
    }
}

/// The origin and time of the current access.
#[derive(Clone, Copy, Debug)]
pub struct AccessContext {
    pub epoch: u32,
    pub sync: u32,
    pub accessor: Accessor,
    pub line: u32,
    /// The first epoch of this block, and of the launch.
    pub block: u32,
    pub launch: u32,
}

/// The last read and the last write of a byte.
#[derive(Clone, Copy, Debug, Default)]
struct LastAccesses {
    read: Access,
    write: Access,
}

#[derive(Clone, Copy, PartialEq)]
enum Relation {
    Ordered,
    /// Unordered, with an access of the same block.
    InBlock,
    /// Unordered, with an access of another block.
    InAnotherBlock,
}

impl AccessContext {
    fn access(&self) -> Access {
        Access { epoch: self.epoch, sync: self.sync, accessor: self.accessor, line: self.line }
    }

    fn relation(&self, before: &Access) -> Relation {
        if before.epoch < self.launch || before.accessor == Accessor::ATOMIC && self.accessor == Accessor::ATOMIC {
            return Relation::Ordered;
        }
        if before.epoch < self.block || before.accessor == Accessor::BLOCKS {
            return Relation::InAnotherBlock;
        }
        let in_warp = before.accessor.warp().is_some() && before.accessor.warp() == self.accessor.warp();
        let ordered =
            before.epoch < self.epoch || before.accessor == self.accessor || in_warp && before.sync < self.sync;
        if ordered { Relation::Ordered } else { Relation::InBlock }
    }

    fn ordered(
        &self,
        before: &Access,
        in_block: ConflictingAccess,
        in_another: ConflictingAccess,
    ) -> Result<(), (ConflictingAccess, usize)> {
        match self.relation(before) {
            Relation::Ordered => Ok(()),
            Relation::InBlock => Err((in_block, before.line as usize)),
            Relation::InAnotherBlock => Err((in_another, before.line as usize)),
        }
    }
}

impl LastAccesses {
    /// If the access races with an earlier one, the kind of that access and its line.
    fn read(&mut self, context: &AccessContext) -> Result<(), (ConflictingAccess, usize)> {
        context.ordered(&self.write, ConflictingAccess::WriteInBlock, ConflictingAccess::WriteInAnotherBlock)?;
        let mut access = context.access();
        // Unordered readers are merged into one origin that covers all of them.
        access.accessor = match context.relation(&self.read) {
            Relation::Ordered => context.accessor,
            Relation::InAnotherBlock => Accessor::BLOCKS,
            Relation::InBlock => match (self.read.accessor.warp(), context.accessor.warp()) {
                (Some(a), Some(b)) if a == b => Accessor(Accessor::LANES | a),
                _ => Accessor::WARPS,
            },
        };
        self.read = access;
        Ok(())
    }

    fn write(&mut self, context: &AccessContext) -> Result<(), (ConflictingAccess, usize)> {
        context.ordered(&self.write, ConflictingAccess::WriteInBlock, ConflictingAccess::WriteInAnotherBlock)?;
        context.ordered(&self.read, ConflictingAccess::ReadInBlock, ConflictingAccess::ReadInAnotherBlock)?;
        self.write = context.access();
        Ok(())
    }
}

/// The last accesses to a range of memory, kept per word as long as all bytes of the word are accessed together.
#[derive(Default)]
pub struct AccessLog {
    words: Vec<Word>,
    apart: Vec<[LastAccesses; 4]>,
}

#[derive(Clone, Default)]
struct Word {
    together: LastAccesses,
    /// Index plus one in `apart` of the accesses per byte; 0 if the word is still treated as a whole.
    apart: u32,
}

/// A race: the byte, the earlier access that it races with, and the line of that access.
pub type Race = (usize, ConflictingAccess, usize);

impl AccessLog {
    pub fn new(bytes: usize) -> AccessLog {
        AccessLog { words: vec![Word::default(); bytes.div_ceil(4)], apart: vec![] }
    }

    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    pub fn read(&mut self, range: Range<usize>, context: &AccessContext) -> Result<(), Race> {
        self.each(range, |accesses| accesses.read(context))
    }

    pub fn write(&mut self, range: Range<usize>, context: &AccessContext) -> Result<(), Race> {
        self.each(range, |accesses| accesses.write(context))
    }

    fn each(
        &mut self,
        range: Range<usize>,
        touch: impl Fn(&mut LastAccesses) -> Result<(), (ConflictingAccess, usize)>,
    ) -> Result<(), Race> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / 4 + 1) * 4);
            let word = &mut self.words[at / 4];
            if word.apart == 0 && end - at == 4 {
                touch(&mut word.together).map_err(|(other, line)| (at, other, line))?;
            } else {
                if word.apart == 0 {
                    self.apart.push([word.together; 4]);
                    word.apart = self.apart.len() as u32;
                }
                let bytes = &mut self.apart[word.apart as usize - 1];
                for byte in at..end {
                    touch(&mut bytes[byte % 4]).map_err(|(other, line)| (byte, other, line))?;
                }
            }
            at = end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(epoch: u32, sync: u32, thread: usize) -> AccessContext {
        AccessContext {
            epoch,
            sync,
            accessor: Accessor::thread(thread / 32, thread % 32),
            line: 1,
            block: 5,
            launch: 3,
        }
    }

    #[test]
    fn a_barrier_orders_accesses() {
        let mut byte = LastAccesses::default();
        byte.write(&context(5, 0, 0)).unwrap();
        assert!(byte.read(&context(5, 0, 40)).is_err());
        byte.read(&context(6, 0, 40)).unwrap();
        assert!(byte.write(&context(6, 0, 0)).is_err());
        byte.write(&context(7, 0, 0)).unwrap();
    }

    #[test]
    fn a_sync_point_of_a_warp_orders_only_its_own_lanes() {
        let mut byte = LastAccesses::default();
        byte.write(&context(5, 0, 0)).unwrap();
        assert!(byte.read(&context(5, 0, 1)).is_err());
        assert!(byte.read(&context(5, 1, 32)).is_err());
        byte.read(&context(5, 1, 1)).unwrap();
        byte.read(&context(5, 1, 2)).unwrap();
        assert!(byte.write(&context(5, 1, 1)).is_err(), "lane 2 has read it, too");
        byte.write(&context(5, 2, 1)).unwrap();
    }

    #[test]
    fn own_accesses_and_earlier_launches_are_ordered() {
        let mut byte = LastAccesses::default();
        byte.write(&AccessContext { launch: 1, block: 1, ..context(2, 0, 9) }).unwrap();
        byte.read(&context(5, 0, 1)).unwrap();
        byte.write(&context(5, 0, 1)).unwrap();
        byte.read(&context(5, 0, 1)).unwrap();
    }

    #[test]
    fn blocks_of_one_launch_are_not_ordered() {
        let mut byte = LastAccesses::default();
        byte.read(&AccessContext { block: 3, ..context(4, 0, 0) }).unwrap();
        byte.read(&context(5, 0, 0)).unwrap();
        assert_eq!(byte.write(&context(6, 0, 0)), Err((ConflictingAccess::ReadInAnotherBlock, 1)));
    }

    #[test]
    fn bytes_of_a_word_are_tracked_separately_when_accessed_separately() {
        let mut log = AccessLog::new(10);
        log.write(0..8, &context(5, 0, 0)).unwrap();
        log.write(8..9, &context(5, 0, 1)).unwrap();
        log.write(9..10, &context(5, 0, 2)).unwrap();
        assert_eq!(log.read(6..8, &context(5, 0, 1)), Err((6, ConflictingAccess::WriteInBlock, 1)));
        log.write(6..8, &context(6, 0, 1)).unwrap();
        log.write(4..6, &context(6, 0, 0)).unwrap();
        assert_eq!(log.read(4..8, &context(6, 0, 0)), Err((6, ConflictingAccess::WriteInBlock, 1)));
        assert_eq!(log.read(8..10, &context(5, 0, 2)), Err((8, ConflictingAccess::WriteInBlock, 1)));
        log.read(0..10, &context(7, 0, 2)).unwrap();
    }
}
