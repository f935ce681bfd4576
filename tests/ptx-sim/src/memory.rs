//! Memory with a state for each byte: whether it is mapped, written, or the destination of a pending copy.

use std::collections::HashMap;
use std::ops::Range;

use crate::error::FaultKind;
use crate::race::{AccessContext, AccessLog, Race};
use crate::types::Space;

/// Generic addresses: each state space other than global has a window, and each global buffer a range.
pub const SHARED_WINDOW: u64 = 1 << 28;
pub const LOCAL_WINDOW: u64 = 2 << 28;
pub const CONST_WINDOW: u64 = 3 << 28;
pub const PARAM_WINDOW: u64 = 4 << 28;
pub const GLOBAL_STRIDE: u64 = 1 << 36;

/// The state space of a generic address, and the address in that space.
pub fn space_of(address: u64) -> (Space, u64) {
    match address >> 28 {
        1 => (Space::Shared, address - SHARED_WINDOW),
        2 => (Space::Local, address - LOCAL_WINDOW),
        3 => (Space::Const, address - CONST_WINDOW),
        4 => (Space::Param, address - PARAM_WINDOW),
        _ => (Space::Global, address),
    }
}

/// Which checks are made; see `Options`.
#[derive(Clone, Copy, Debug)]
pub struct Checks {
    pub races: bool,
    pub across_blocks: bool,
    pub uninitialised: bool,
}

/// Flags of each byte.
mod flag {
    /// The byte belongs to a buffer or variable.
    pub const MAPPED: u8 = 1;
    /// The byte has been written, in this launch or before.
    pub const WRITTEN_EVER: u8 = 2;
    /// This and the next flags concern the current launch.
    pub const READ: u8 = 4;
    pub const WRITTEN: u8 = 8;
    pub const READ_AS_CONSTANT: u8 = 16;
    /// The byte is the destination of a pending `cp.async`.
    pub const PENDING: u8 = 32;
}

/// A global buffer, or the shared memory of a block.
pub struct Region {
    space: Space,
    base: u64,
    bytes: Vec<u8>,
    flags: Vec<u8>,
    /// Created by the first access that is checked for races.
    log: AccessLog,
    /// Contains all bytes that this launch has accessed.
    touched: Range<usize>,
    pub unique_read: u64,
    pub unique_written: u64,
}

impl Region {
    pub fn buffer(base: u64, bytes: Vec<u8>, written: bool) -> Region {
        let flags = vec![flag::MAPPED | if written { flag::WRITTEN_EVER } else { 0 }; bytes.len()];
        Region::new(Space::Global, base, bytes, flags)
    }

    /// Shared memory that holds these variables.
    pub fn shared(variables: impl Iterator<Item = Range<u64>> + Clone) -> Region {
        let end = variables.clone().map(|range| range.end).max().unwrap_or(0) as usize;
        let base = variables.clone().map(|range| range.start).min().unwrap_or(0) as usize;
        let mut flags = vec![0; end - base];
        for range in variables {
            flags[range.start as usize - base..range.end as usize - base].fill(flag::MAPPED);
        }
        Region::new(Space::Shared, base as u64, vec![0; end - base], flags)
    }

    fn new(space: Space, base: u64, bytes: Vec<u8>, flags: Vec<u8>) -> Region {
        Region {
            space,
            base,
            bytes,
            flags,
            log: AccessLog::default(),
            touched: 0..0,
            unique_read: 0,
            unique_written: 0,
        }
    }

    /// Resets shared memory for a new block.
    pub fn forget(&mut self) {
        self.flags.iter_mut().for_each(|flags| *flags &= flag::MAPPED);
    }

    /// Ends a launch; returns the numbers of bytes that it has read and written, each counted once.
    pub fn end_launch(&mut self) -> (u64, u64) {
        let touched = std::mem::replace(&mut self.touched, 0..0);
        let keep = flag::MAPPED | flag::WRITTEN_EVER;
        self.flags[touched].iter_mut().for_each(|flags| *flags &= keep);
        (std::mem::take(&mut self.unique_read), std::mem::take(&mut self.unique_written))
    }

    pub fn content(&self) -> &[u8] {
        &self.bytes
    }

    /// Writes from outside of any launch.
    pub fn fill(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        self.flags[offset..offset + bytes.len()].iter_mut().for_each(|flags| *flags |= flag::WRITTEN_EVER);
    }

    /// Marks these bytes as never written.
    pub fn erase(&mut self, range: Range<usize>) {
        self.flags[range].iter_mut().for_each(|flags| *flags &= !flag::WRITTEN_EVER);
    }

    /// The first of these bytes that nothing has written.
    pub fn unwritten(&self, range: Range<usize>) -> Option<usize> {
        let found = self.flags[range.clone()].iter().position(|flags| flags & flag::WRITTEN_EVER == 0);
        found.map(|at| range.start + at)
    }

    fn locate(&self, address: u64, bytes: usize, align: u64) -> Result<Range<usize>, FaultKind> {
        let space = self.space;
        let start = address.wrapping_sub(self.base);
        let range = usize::try_from(start).ok().and_then(|start| Some(start..start.checked_add(bytes)?));
        match range {
            Some(range) if self.flags.get(range.clone()).is_some_and(|f| f.iter().all(|f| f & flag::MAPPED != 0)) => {
                if !address.is_multiple_of(align) {
                    return Err(FaultKind::Misaligned { space, address, align });
                }
                Ok(range)
            }
            _ => Err(FaultKind::OutOfBounds { space, address, bytes }),
        }
    }

    fn touch(&mut self, range: &Range<usize>, checks: Checks) {
        if self.touched.is_empty() {
            self.touched = range.clone();
        } else {
            self.touched = self.touched.start.min(range.start)..self.touched.end.max(range.end);
        }
        if checks.races && self.log.is_empty() {
            self.log = AccessLog::new(self.bytes.len());
        }
    }

    fn race(&self, (at, other, line): Race) -> FaultKind {
        FaultKind::Race { space: self.space, address: self.base + at as u64, line, other }
    }

    /// The access context for this region: in shared memory only accesses of the same block matter.
    fn context(&self, context: &AccessContext, checks: Checks) -> AccessContext {
        let own = self.space == Space::Shared || !checks.across_blocks;
        AccessContext { launch: if own { context.block } else { context.launch }, ..*context }
    }

    /// Sets the flags `is` of these bytes, provided that all have the flags `must` and none has a flag of `must_not`.
    /// Otherwise returns the first byte that violates this.
    fn mark(&mut self, range: &Range<usize>, is: u8, must: u8, must_not: u8) -> Option<usize> {
        let flags = &mut self.flags[range.clone()];
        let (all, any) = flags.iter().fold((!0, 0), |(all, any), &flags| (all & flags, any | flags));
        if all & must != must || any & must_not != 0 {
            let wrong = flags.iter().position(|flags| flags & must != must || flags & must_not != 0);
            return wrong.map(|at| range.start + at);
        }
        if all & is != is {
            let new = |flag| flags.iter().filter(|&flags| flags & is & flag == 0).count() as u64;
            self.unique_read += if is & flag::READ != 0 { new(flag::READ) } else { 0 };
            self.unique_written += if is & flag::WRITTEN != 0 { new(flag::WRITTEN) } else { 0 };
            flags.iter_mut().for_each(|flags| *flags |= is);
        }
        None
    }

    pub fn read(
        &mut self,
        address: u64,
        bytes: usize,
        align: u64,
        constant: bool,
        context: &AccessContext,
        checks: Checks,
    ) -> Result<&[u8], FaultKind> {
        let range = self.locate(address, bytes, align)?;
        self.touch(&range, checks);
        let context = self.context(context, checks);
        let is = flag::READ | if constant { flag::READ_AS_CONSTANT } else { 0 };
        let must = if checks.uninitialised { flag::WRITTEN_EVER } else { 0 };
        let must_not = flag::PENDING | if constant { flag::WRITTEN } else { 0 };
        if let Some(at) = self.mark(&range, is, must, must_not) {
            let (space, flags, address) = (self.space, self.flags[at], self.base + at as u64);
            return Err(match flags {
                _ if flags & flag::PENDING != 0 => FaultKind::PendingCopy { address },
                _ if flags & must != must => FaultKind::Uninitialised { space, address },
                _ => FaultKind::NotConstant { address },
            });
        }
        if checks.races {
            self.log.read(range.clone(), &context).map_err(|race| self.race(race))?;
        }
        Ok(&self.bytes[range])
    }

    pub fn write(
        &mut self,
        address: u64,
        data: &[u8],
        align: u64,
        context: &AccessContext,
        checks: Checks,
    ) -> Result<(), FaultKind> {
        let range = self.locate(address, data.len(), align)?;
        self.mark_written(&range, context, checks)?;
        self.bytes[range].copy_from_slice(data);
        Ok(())
    }

    fn mark_written(&mut self, range: &Range<usize>, context: &AccessContext, checks: Checks) -> Result<(), FaultKind> {
        self.touch(range, checks);
        let context = self.context(context, checks);
        let (is, must_not) = (flag::WRITTEN | flag::WRITTEN_EVER, flag::PENDING | flag::READ_AS_CONSTANT);
        if let Some(at) = self.mark(range, is, 0, must_not) {
            let (pending, address) = (self.flags[at] & flag::PENDING != 0, self.base + at as u64);
            return Err(if pending { FaultKind::PendingCopy { address } } else { FaultKind::NotConstant { address } });
        }
        if checks.races {
            self.log.write(range.clone(), &context).map_err(|race| self.race(race))?;
        }
        Ok(())
    }

    /// Starts a `cp.async`, which may write from now on.
    pub fn begin_copy(
        &mut self,
        address: u64,
        bytes: usize,
        context: &AccessContext,
        checks: Checks,
    ) -> Result<(), FaultKind> {
        let range = self.locate(address, bytes, bytes as u64)?;
        self.mark_written(&range, context, checks)?;
        self.flags[range].iter_mut().for_each(|flags| *flags |= flag::PENDING);
        Ok(())
    }

    /// Completes a `cp.async`; the thread that waited for it sees the data.
    pub fn end_copy(
        &mut self,
        address: u64,
        data: &[u8],
        context: &AccessContext,
        checks: Checks,
    ) -> Result<(), FaultKind> {
        let range = self.locate(address, data.len(), data.len() as u64)?;
        self.flags[range].iter_mut().for_each(|flags| *flags &= !flag::PENDING);
        self.write(address, data, data.len() as u64, context, checks)
    }
}

/// All global buffers.
#[derive(Default)]
pub struct Global {
    /// Buffer `n` starts at `(n + 1) · GLOBAL_STRIDE`.
    buffers: Vec<Option<Region>>,
    /// Variables of modules, by buffer number.
    variables: HashMap<u64, Region>,
}

impl Global {
    pub fn add(&mut self, bytes: Vec<u8>, written: bool) -> u64 {
        let base = (self.buffers.len() as u64 + 1) * GLOBAL_STRIDE;
        self.buffers.push(Some(Region::buffer(base, bytes, written)));
        base
    }

    pub fn add_variable(&mut self, number: u64, content: &[u8]) {
        let make = || Region::buffer(number * GLOBAL_STRIDE, content.to_vec(), true);
        self.variables.entry(number).or_insert_with(make);
    }

    pub fn remove(&mut self, address: u64) -> bool {
        let index = (address / GLOBAL_STRIDE).wrapping_sub(1) as usize;
        self.buffers.get_mut(index).and_then(Option::take).is_some()
    }

    /// The buffer that an address belongs to, if any.
    pub fn find(&mut self, address: u64) -> Option<&mut Region> {
        let number = address / GLOBAL_STRIDE;
        match self.buffers.get_mut((number as usize).wrapping_sub(1)) {
            Some(buffer) => buffer.as_mut(),
            None => self.variables.get_mut(&number),
        }
    }

    pub fn get(&self, address: u64) -> Option<&Region> {
        let number = address / GLOBAL_STRIDE;
        match self.buffers.get((number as usize).wrapping_sub(1)) {
            Some(buffer) => buffer.as_ref(),
            None => self.variables.get(&number),
        }
    }

    pub fn end_launch(&mut self) -> (u64, u64) {
        let regions = self.buffers.iter_mut().flatten().chain(self.variables.values_mut());
        regions.map(Region::end_launch).fold((0, 0), |(r, w), (read, written)| (r + read, w + written))
    }
}

/// Memory that is private to one thread: local variables, or call parameters.
#[derive(Clone, Default)]
pub struct PrivateMemory {
    bytes: Vec<u8>,
    written: Vec<bool>,
}

impl PrivateMemory {
    /// Grows or shrinks; new bytes count as not written.
    pub fn resize(&mut self, bytes: usize) {
        self.bytes.resize(bytes, 0);
        self.written.resize(bytes, false);
    }

    fn locate(&self, space: Space, address: u64, bytes: usize) -> Result<Range<usize>, FaultKind> {
        let range = usize::try_from(address).ok().and_then(|start| Some(start..start.checked_add(bytes)?));
        let range = range.filter(|range| range.end <= self.bytes.len());
        let range = range.ok_or(FaultKind::OutOfBounds { space, address, bytes })?;
        if !address.is_multiple_of(bytes as u64) {
            return Err(FaultKind::Misaligned { space, address, align: bytes as u64 });
        }
        Ok(range)
    }

    pub fn read(&self, space: Space, address: u64, bytes: usize, checks: Checks) -> Result<&[u8], FaultKind> {
        let range = self.locate(space, address, bytes)?;
        if checks.uninitialised
            && let Some(at) = self.written[range.clone()].iter().position(|written| !written)
        {
            return Err(FaultKind::Uninitialised { space, address: address + at as u64 });
        }
        Ok(&self.bytes[range])
    }

    pub fn write(&mut self, space: Space, address: u64, data: &[u8]) -> Result<(), FaultKind> {
        let range = self.locate(space, address, data.len())?;
        self.written[range.clone()].fill(true);
        self.bytes[range].copy_from_slice(data);
        Ok(())
    }

    /// Copies parameters between frames, including which bytes have been written.
    pub fn transfer(&mut self, at: usize, from: &PrivateMemory, range: Range<usize>) {
        let to = at..at + range.len();
        self.bytes[to.clone()].copy_from_slice(&from.bytes[range.clone()]);
        self.written[to].copy_from_slice(&from.written[range]);
    }
}
