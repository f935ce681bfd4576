//! Who touched a byte last, and whether something orders that before what happens now.
//!
//! Time is counted in epochs: one begins with each block and at each barrier of a block, and the count goes on from
//! launch to launch. Within an epoch a warp counts the points that order its lanes (`bar.warp.sync` and, if the
//! options say so, shuffles). Two accesses to a byte, one of them a write, are ordered if
//!
//! - the same thread makes both, or both are atomic;
//! - they lie in different launches, or in different epochs of one block;
//! - they come from one warp with such a point between.
//!
//! Blocks of one launch are never ordered.

use std::ops::Range;

use crate::error::Other;

/// An access to a byte. Zeroed: none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stamp {
    epoch: u32,
    sync: u32,
    who: Who,
    line: u32,
}

/// A thread of a block, or something wider.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Who(u32);

impl Who {
    /// Several lanes of a warp; the warp is added.
    const LANES: u32 = 1 << 16;
    const WARPS: Who = Who(1 << 17);
    const BLOCKS: Who = Who(1 << 18);
    pub const ATOMIC: Who = Who(1 << 19);
    const MATRIX: u32 = 1 << 14;

    pub fn thread(warp: usize, lane: usize) -> Who {
        Who((warp * 32 + lane) as u32)
    }

    /// A whole warp with one of its kinds of fragment, where it is opaque which lane touches what.
    pub fn matrix(warp: usize, kind: u32) -> Who {
        Who(Who::MATRIX | (warp as u32) << 4 | kind)
    }

    fn warp(self) -> Option<u32> {
        match self.0 {
            n if n < Who::MATRIX => Some(n / 32),
            n if n < Who::LANES => Some((n & !Who::MATRIX) >> 4),
            n if n < Who::WARPS.0 => Some(n & !Who::LANES),
            _ => None,
        }
    }
}

/// The present, as the accesses of one thread see it.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    pub epoch: u32,
    pub sync: u32,
    pub who: Who,
    pub line: u32,
    /// The first epoch of this block, and of the launch.
    pub block: u32,
    pub launch: u32,
}

/// Last read and last write of a byte.
#[derive(Clone, Copy, Debug, Default)]
struct Stamps {
    read: Stamp,
    write: Stamp,
}

#[derive(Clone, Copy, PartialEq)]
enum Relation {
    Ordered,
    InBlock,
    InAnotherBlock,
}

impl Now {
    fn stamp(&self) -> Stamp {
        Stamp { epoch: self.epoch, sync: self.sync, who: self.who, line: self.line }
    }

    fn relation(&self, before: &Stamp) -> Relation {
        if before.epoch < self.launch || before.who == Who::ATOMIC && self.who == Who::ATOMIC {
            return Relation::Ordered;
        }
        if before.epoch < self.block || before.who == Who::BLOCKS {
            return Relation::InAnotherBlock;
        }
        let in_warp = before.who.warp().is_some() && before.who.warp() == self.who.warp();
        let ordered = before.epoch < self.epoch || before.who == self.who || in_warp && before.sync < self.sync;
        if ordered { Relation::Ordered } else { Relation::InBlock }
    }

    fn ordered(&self, before: &Stamp, in_block: Other, in_another: Other) -> Result<(), (Other, usize)> {
        match self.relation(before) {
            Relation::Ordered => Ok(()),
            Relation::InBlock => Err((in_block, before.line as usize)),
            Relation::InAnotherBlock => Err((in_another, before.line as usize)),
        }
    }
}

impl Stamps {
    /// `Err`: the access this one races with, and its line.
    fn read(&mut self, now: &Now) -> Result<(), (Other, usize)> {
        now.ordered(&self.write, Other::WriteInBlock, Other::WriteInAnotherBlock)?;
        let mut stamp = now.stamp();
        // Several readers become one that stands for all of them.
        stamp.who = match now.relation(&self.read) {
            Relation::Ordered => now.who,
            Relation::InAnotherBlock => Who::BLOCKS,
            Relation::InBlock => match (self.read.who.warp(), now.who.warp()) {
                (Some(a), Some(b)) if a == b => Who(Who::LANES | a),
                _ => Who::WARPS,
            },
        };
        self.read = stamp;
        Ok(())
    }

    fn write(&mut self, now: &Now) -> Result<(), (Other, usize)> {
        now.ordered(&self.write, Other::WriteInBlock, Other::WriteInAnotherBlock)?;
        now.ordered(&self.read, Other::ReadInBlock, Other::ReadInAnotherBlock)?;
        self.write = now.stamp();
        Ok(())
    }
}

/// The stamps of a stretch of memory. Bytes of a word that are always touched together share theirs.
#[derive(Default)]
pub struct Ledger {
    words: Vec<Word>,
    apart: Vec<[Stamps; 4]>,
}

#[derive(Clone, Default)]
struct Word {
    together: Stamps,
    /// Where the stamps of the single bytes are in `apart`, plus one; 0: they are together.
    apart: u32,
}

/// A race: the byte, the access it races with and that one's line.
pub type Race = (usize, Other, usize);

impl Ledger {
    pub fn new(bytes: usize) -> Ledger {
        Ledger { words: vec![Word::default(); bytes.div_ceil(4)], apart: vec![] }
    }

    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    pub fn read(&mut self, range: Range<usize>, now: &Now) -> Result<(), Race> {
        self.each(range, |stamps| stamps.read(now))
    }

    pub fn write(&mut self, range: Range<usize>, now: &Now) -> Result<(), Race> {
        self.each(range, |stamps| stamps.write(now))
    }

    fn each(
        &mut self,
        range: Range<usize>,
        touch: impl Fn(&mut Stamps) -> Result<(), (Other, usize)>,
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

    fn now(epoch: u32, sync: u32, thread: usize) -> Now {
        Now { epoch, sync, who: Who::thread(thread / 32, thread % 32), line: 1, block: 5, launch: 3 }
    }

    #[test]
    fn a_barrier_orders() {
        let mut byte = Stamps::default();
        byte.write(&now(5, 0, 0)).unwrap();
        assert!(byte.read(&now(5, 0, 40)).is_err());
        byte.read(&now(6, 0, 40)).unwrap();
        assert!(byte.write(&now(6, 0, 0)).is_err());
        byte.write(&now(7, 0, 0)).unwrap();
    }

    #[test]
    fn a_point_of_the_warp_orders_its_lanes_alone() {
        let mut byte = Stamps::default();
        byte.write(&now(5, 0, 0)).unwrap();
        assert!(byte.read(&now(5, 0, 1)).is_err());
        assert!(byte.read(&now(5, 1, 32)).is_err());
        byte.read(&now(5, 1, 1)).unwrap();
        byte.read(&now(5, 1, 2)).unwrap();
        assert!(byte.write(&now(5, 1, 1)).is_err(), "lane 2 has read it, too");
        byte.write(&now(5, 2, 1)).unwrap();
    }

    #[test]
    fn own_accesses_and_earlier_launches_are_ordered() {
        let mut byte = Stamps::default();
        byte.write(&Now { launch: 1, block: 1, ..now(2, 0, 9) }).unwrap();
        byte.read(&now(5, 0, 1)).unwrap();
        byte.write(&now(5, 0, 1)).unwrap();
        byte.read(&now(5, 0, 1)).unwrap();
    }

    #[test]
    fn blocks_are_not_ordered() {
        let mut byte = Stamps::default();
        byte.read(&Now { block: 3, ..now(4, 0, 0) }).unwrap();
        byte.read(&now(5, 0, 0)).unwrap();
        assert_eq!(byte.write(&now(6, 0, 0)), Err((Other::ReadInAnotherBlock, 1)));
    }

    #[test]
    fn bytes_of_a_word_touched_apart() {
        let mut ledger = Ledger::new(10);
        ledger.write(0..8, &now(5, 0, 0)).unwrap();
        ledger.write(8..9, &now(5, 0, 1)).unwrap();
        ledger.write(9..10, &now(5, 0, 2)).unwrap();
        assert_eq!(ledger.read(6..8, &now(5, 0, 1)), Err((6, Other::WriteInBlock, 1)));
        ledger.write(6..8, &now(6, 0, 1)).unwrap();
        ledger.write(4..6, &now(6, 0, 0)).unwrap();
        assert_eq!(ledger.read(4..8, &now(6, 0, 0)), Err((6, Other::WriteInBlock, 1)));
        assert_eq!(ledger.read(8..10, &now(5, 0, 2)), Err((8, Other::WriteInBlock, 1)));
        ledger.read(0..10, &now(7, 0, 2)).unwrap();
    }
}
