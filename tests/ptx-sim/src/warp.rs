//! Executes a warp: 32 lanes in lockstep, with a stack of diverged paths.

use std::collections::VecDeque;

use crate::arithmetic::{Lanes, from_mask, mask as width_mask, sign_extend, to_mask};
use crate::error::FaultKind;
use crate::flow::END;
use crate::launch::Machine;
use crate::memory::PrivateMemory;
use crate::program::*;
use crate::race::{AccessContext, Accessor};
use crate::report::Kind;
use crate::types::Space;

/// A fault and the lane that it happened in.
pub struct LaneFault {
    pub lane: usize,
    pub kind: FaultKind,
}

pub type LaneResult<T> = Result<T, LaneFault>;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum WarpState {
    Ready,
    /// The warp waits at the barrier of this number.
    AtBarrier(u64),
    /// All lanes have exited.
    Done,
}

pub struct Warp {
    pub index: usize,
    /// Lanes that have not exited.
    pub live: u32,
    pub state: WarpState,
    pub frames: Vec<Frame>,
    /// Line number of the current instruction.
    pub line: u32,
    /// The number of points in this epoch that ordered the memory accesses of the lanes.
    pub sync: u32,
    /// Thread indices within the block, by axis.
    pub threads: [Lanes; 3],
    pub local: Vec<PrivateMemory>,
    copies: Vec<AsyncCopies>,
}

/// A function call of some of the lanes.
pub struct Frame {
    pub function: usize,
    pub registers: Vec<Lanes>,
    stack: Vec<DivergentPath>,
    /// Call parameters of each lane.
    params: Vec<PrivateMemory>,
    local_start: usize,
    /// The lanes that made the call, and the results that they receive.
    called: u32,
    results: Vec<ParamCopy>,
}

/// Lanes that follow one path until they reconverge with others.
struct DivergentPath {
    /// The next instruction.
    next: u32,
    /// The instruction at which the path ends.
    reconvergence: u32,
    /// Mask of the lanes.
    lanes: u32,
}

/// The `cp.async` copies of one thread that have not been waited for.
#[derive(Clone, Default)]
struct AsyncCopies {
    /// Committed groups, the oldest first.
    groups: VecDeque<Vec<AsyncCopy>>,
    /// Copies that no group contains yet.
    open: Vec<AsyncCopy>,
}

#[derive(Clone)]
struct AsyncCopy {
    address: u64,
    data: [u8; 16],
    bytes: usize,
}

const MAX_CALL_DEPTH: usize = 64;

/// The lanes of a mask, in ascending order.
pub fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |lane| mask >> lane & 1 == 1)
}

pub fn lowest(mask: u32) -> usize {
    mask.trailing_zeros().min(31) as usize
}

pub fn at<T>(lane: usize, result: Result<T, FaultKind>) -> LaneResult<T> {
    result.map_err(|kind| LaneFault { lane, kind })
}

fn fail<T>(lane: usize, kind: FaultKind) -> LaneResult<T> {
    Err(LaneFault { lane, kind })
}

impl Warp {
    pub fn new(machine: &Machine, function: usize, index: usize) -> Warp {
        let [x, y, z] = machine.size.map(u64::from);
        let threads = x * y * z;
        let mut warp = Warp {
            index,
            live: 0,
            state: WarpState::Ready,
            frames: vec![],
            line: 0,
            sync: 0,
            threads: [[0; 32]; 3],
            local: vec![PrivateMemory::default(); 32],
            copies: vec![AsyncCopies::default(); 32],
        };
        for lane in 0..32 {
            let thread = (index * 32 + lane) as u64;
            if thread < threads {
                warp.live |= 1 << lane;
            }
            for (axis, number) in [thread % x, thread / x % y, thread / (x * y)].into_iter().enumerate() {
                warp.threads[axis][lane] = number;
            }
        }
        let live = warp.live;
        warp.enter(machine, function, live, vec![]);
        warp
    }

    /// Calls a function in these lanes.
    fn enter(&mut self, machine: &Machine, index: usize, lanes: u32, results: Vec<ParamCopy>) {
        let function = &machine.module.functions[index];
        let local_start = self.frames.last().map_or(0, |frame| {
            let used = frame.local_start + machine.module.functions[frame.function].local_bytes;
            used.next_multiple_of(16)
        });
        for private in &mut self.local {
            // Data that an earlier call left there is gone.
            private.resize(local_start);
            private.resize(local_start + function.local_bytes);
        }
        let mut params = vec![PrivateMemory::default(); 32];
        params.iter_mut().for_each(|private| private.resize(function.frame_bytes));
        let registers = function.registers.iter().enumerate().map(|(n, &bits)| machine.garbage(n, bits)).collect();
        let stack = vec![DivergentPath { next: 0, reconvergence: END, lanes }];
        self.frames.push(Frame { function: index, registers, stack, params, local_start, called: lanes, results });
    }

    /// Returns from a function, in all its lanes.
    fn leave(&mut self) {
        let frame = self.frames.pop().expect("it is being left");
        let Some(caller) = self.frames.last_mut() else {
            self.state = WarpState::Done;
            return;
        };
        for lane in lanes(frame.called & self.live) {
            for pass in &frame.results {
                caller.params[lane].transfer(pass.to, &frame.params[lane], pass.from..pass.from + pass.bytes);
            }
        }
        self.local.iter_mut().for_each(|private| private.resize(frame.local_start));
    }

    fn frame(&mut self) -> &mut Frame {
        self.frames.last_mut().expect("a warp that runs has a frame")
    }

    pub fn context(&self, machine: &Machine, accessor: Accessor) -> AccessContext {
        AccessContext {
            epoch: machine.epoch,
            sync: self.sync,
            accessor,
            line: self.line,
            block: machine.block_epoch,
            launch: machine.launch_epoch,
        }
    }

    /// The value of an operand in each lane; it is stored in `room`, unless a register holds it.
    fn value_ref<'a>(&'a self, machine: &Machine, operand: Operand, room: &'a mut Lanes) -> &'a Lanes {
        if let Operand::Register(slot) = operand {
            return &self.frames.last().expect("a warp that runs has a frame").registers[slot as usize];
        }
        *room = self.value(machine, operand);
        room
    }

    /// The value of an operand in each lane.
    pub fn value(&self, machine: &Machine, operand: Operand) -> Lanes {
        let frame = self.frames.last().expect("a warp that runs has a frame");
        match operand {
            Operand::Register(slot) => frame.registers[slot as usize],
            Operand::Not(slot) => frame.registers[slot as usize].map(|bit| bit ^ 1),
            Operand::Constant(value) => splat(value),
            Operand::Local(offset) => splat(frame.local_start as u64 + offset),
            Operand::Special(special) => self.special(machine, special),
        }
    }

    fn special(&self, machine: &Machine, special: Special) -> Lanes {
        let by_lane = |f: fn(u64) -> u64| std::array::from_fn(|lane| f(lane as u64) & 0xFFFF_FFFF);
        match special {
            Special::Thread(axis) => self.threads[axis],
            Special::BlockSize(axis) => splat(machine.size[axis].into()),
            Special::Block(axis) => splat(machine.block[axis].into()),
            Special::GridSize(axis) => splat(machine.grid[axis].into()),
            Special::Lane => by_lane(|lane| lane),
            Special::Warp => splat(self.index as u64),
            Special::Warps => splat(machine.warps() as u64),
            Special::LanesBelow => by_lane(|lane| (1 << lane) - 1),
            Special::LanesUpTo => by_lane(|lane| (2 << lane) - 1),
            Special::LaneBit => by_lane(|lane| 1 << lane),
            Special::LanesFrom => by_lane(|lane| !0 << lane),
            Special::LanesAbove => by_lane(|lane| !1 << lane),
            Special::Clock => splat(machine.steps & 0xFFFF_FFFF),
            Special::SharedSize => splat(machine.dynamic_shared as u64),
        }
    }

    pub fn set(&mut self, slot: u32, active: u32, value: &Lanes) {
        let register = &mut self.frame().registers[slot as usize];
        if active == u32::MAX {
            *register = *value;
        } else {
            lanes(active).for_each(|lane| register[lane] = value[lane]);
        }
    }

    pub fn addresses(&self, machine: &Machine, address: Address) -> Lanes {
        self.value(machine, address.base).map(|base| base.wrapping_add_signed(address.offset))
    }

    /// Runs until the warp waits at a barrier or is done.
    pub fn run(&mut self, machine: &mut Machine) -> LaneResult<()> {
        let module = machine.module;
        while self.state == WarpState::Ready {
            let frame = self.frame();
            let Some(path) = frame.stack.last_mut() else {
                self.leave();
                continue;
            };
            if path.lanes == 0 || path.next == path.reconvergence {
                frame.stack.pop();
                continue;
            }
            let here = path.lanes;
            let step = &module.functions[frame.function].code[path.next as usize];
            path.next += 1;
            let active = match step.guard {
                None => here,
                Some((slot, negated)) => {
                    let set = to_mask(&frame.registers[slot as usize]);
                    here & if negated { !set } else { set }
                }
            };
            self.line = step.line;
            machine.count(step.kind, active).or_else(|kind| fail(lowest(here), kind))?;
            if active != 0 {
                self.execute(machine, &step.action, here, active)?;
            }
        }
        Ok(())
    }

    fn execute(&mut self, machine: &mut Machine, action: &Action, here: u32, active: u32) -> LaneResult<()> {
        match action {
            Action::Map { map, result, operands } => {
                let mut room = [[0; 32]; 3];
                let [a, b, c] = &mut room;
                let value = |n: usize, room| match operands.get(n) {
                    Some(&operand) => self.value_ref(machine, operand, room),
                    None => room,
                };
                let out = map(value(0, a), value(1, b), value(2, c));
                self.set(*result, active, &out);
            }
            Action::Approximate { function, float, pair, flush, result, operands } => {
                let [a, b] = operands.map(|operand| self.value(machine, operand));
                let seed = machine.perturbation();
                let apply = |a, b| function.apply(*float, *flush, a, b, seed);
                let mut out = [0; 32];
                for lane in lanes(active) {
                    out[lane] = if *pair {
                        apply(a[lane] & 0xFFFF, b[lane] & 0xFFFF) | apply(a[lane] >> 16, b[lane] >> 16) << 16
                    } else {
                        apply(a[lane], b[lane])
                    };
                }
                self.set(*result, active, &out);
            }
            Action::Pack { result, parts, bits } => {
                let mut out = [0; 32];
                for (n, &part) in parts.iter().enumerate() {
                    let value = self.value(machine, part);
                    out.iter_mut().zip(value).for_each(|(out, value)| *out |= value << (n as u32 * bits));
                }
                self.set(*result, active, &out);
            }
            Action::Unpack { results, whole, bits } => {
                let whole = self.value(machine, *whole);
                for (n, result) in results.iter().enumerate() {
                    if let Some(slot) = *result {
                        self.set(slot, active, &whole.map(|value| value >> (n as u32 * bits) & width_mask(*bits)));
                    }
                }
            }
            Action::Compare(comparing) => self.compare(machine, comparing, active),
            Action::Load(load) => self.load(machine, load, active)?,
            Action::Store { space, address, bytes, values } => {
                self.store(machine, *space, *address, *bytes, values, active)?
            }
            Action::Atomic(atomic) => self.atomic(machine, atomic, active)?,
            Action::CopyAsync { bytes, to, from, filled } => {
                self.copy_async(machine, *bytes, *to, *from, *filled, active)?
            }
            Action::CommitCopies => {
                for lane in lanes(active) {
                    let copies = &mut self.copies[lane];
                    let group = std::mem::take(&mut copies.open);
                    copies.groups.push_back(group);
                }
            }
            Action::AwaitCopies(groups) => self.await_copies(machine, *groups, active)?,
            Action::Branch { target, reconvergence, uniform } => {
                let rest = here & !active;
                let path = self.frame().stack.last_mut().expect("it is executing");
                let on = path.next;
                if rest == 0 {
                    path.next = *target;
                } else if *uniform {
                    return fail(lowest(rest), FaultKind::NotUniform);
                } else {
                    self.diverge(*reconvergence, &[(on, rest), (*target, active)]);
                }
            }
            Action::BranchTable { targets, index, reconvergence, uniform } => {
                let index = self.value(machine, *index);
                let on = self.frame().stack.last().expect("it is executing").next;
                let mut paths: Vec<(u32, u32)> = vec![(on, here & !active)];
                for lane in lanes(active) {
                    let Some(&target) = targets.get(index[lane] as usize) else {
                        return fail(lane, FaultKind::Unmodelled("an index beyond the table"));
                    };
                    match paths.iter_mut().find(|path| path.0 == target) {
                        Some(path) => path.1 |= 1 << lane,
                        None => paths.push((target, 1 << lane)),
                    }
                }
                paths.retain(|path| path.1 != 0);
                if *uniform && paths.len() > 1 {
                    return fail(lowest(paths[1].1), FaultKind::NotUniform);
                }
                self.diverge(*reconvergence, &paths);
            }
            Action::Call { function, arguments, results } => {
                if self.frames.len() == MAX_CALL_DEPTH {
                    return fail(lowest(active), FaultKind::CallDepth);
                }
                self.enter(machine, *function, active, results.clone());
                let [.., caller, frame] = &mut self.frames[..] else { unreachable!("one was entered from another") };
                for lane in lanes(active) {
                    for pass in arguments {
                        frame.params[lane].transfer(pass.to, &caller.params[lane], pass.from..pass.from + pass.bytes);
                    }
                }
            }
            Action::Return if self.frames.len() > 1 => {
                self.frame().stack.iter_mut().for_each(|path| path.lanes &= !active);
            }
            Action::Return | Action::Exit => {
                self.live &= !active;
                self.frames.iter_mut().flat_map(|frame| &mut frame.stack).for_each(|path| path.lanes &= !active);
            }
            Action::Trap => return fail(lowest(active), FaultKind::Trap),
            Action::Barrier { id, threads } => {
                let missing = self.live & !active;
                if missing != 0 {
                    return fail(lowest(active), FaultKind::Divergent { missing });
                }
                if let Some(threads) = threads {
                    let all = machine.size.iter().product::<u32>().next_multiple_of(32).into();
                    if self.value(machine, *threads)[lowest(active)] != all {
                        return fail(lowest(active), FaultKind::Unmodelled("a barrier of some of the warps"));
                    }
                }
                let id = self.uniform(machine, *id, active)?;
                self.state = WarpState::AtBarrier(id);
            }
            Action::WarpBarrier { members } => {
                self.check_members(machine, *members, active, true)?;
            }
            Action::Shuffle(shuffle) => self.shuffle(machine, shuffle, active)?,
            Action::Vote { vote, result, operand, members } => {
                self.check_members(machine, *members, active, machine.options.shuffles_order)?;
                let yes = active & to_mask(&self.value(machine, *operand));
                let value = match vote {
                    Vote::All => u64::from(yes == active),
                    Vote::Any => u64::from(yes != 0),
                    Vote::Uniform => u64::from(yes == 0 || yes == active),
                    Vote::Ballot => u64::from(yes),
                };
                self.set(*result, active, &splat(value));
            }
            Action::Reduce { function, result, operand, members } => {
                self.check_members(machine, *members, active, machine.options.shuffles_order)?;
                let operand = self.value(machine, *operand);
                let value = lanes(active).map(|lane| operand[lane]).reduce(function).unwrap_or(0);
                self.set(*result, active, &splat(value));
            }
            Action::ActiveMask { result } => self.set(*result, active, &splat(active.into())),
            Action::LoadMatrix(access) => self.load_matrix(machine, access, active)?,
            Action::StoreMatrix(access) => self.store_matrix(machine, access, active)?,
            Action::Multiply(multiply) => self.multiply(machine, multiply, active)?,
            Action::LoadTiles { results, address, transposed } => {
                self.load_tiles(machine, results, *address, *transposed, active)?
            }
            Action::Nothing => {}
        }
        Ok(())
    }

    /// Splits the current path into several; they run one after the other, the last of `paths` first, and reconverge at
    /// `reconvergence`.
    fn diverge(&mut self, reconvergence: u32, paths: &[(u32, u32)]) {
        let stack = &mut self.frame().stack;
        if let [(next, _)] = paths {
            stack.last_mut().expect("it is executing").next = *next;
            return;
        }
        if reconvergence == END {
            stack.pop();
        } else {
            stack.last_mut().expect("it is executing").next = reconvergence;
        }
        stack.extend(paths.iter().map(|&(next, lanes)| DivergentPath { next, reconvergence, lanes }));
    }

    fn compare(&mut self, machine: &Machine, comparing: &Comparing, active: u32) {
        let [a, b] = comparing.operands.map(|operand| self.value(machine, operand));
        let holds = if comparing.pair {
            let half = |x: &Lanes, shift: u32| x.map(|bits| bits >> shift & 0xFFFF);
            [0, 16].map(|shift| (comparing.compare)(&half(&a, shift), &half(&b, shift)))
        } else {
            // The second result is that of the negated comparison.
            let holds = (comparing.compare)(&a, &b);
            [holds, !holds]
        };
        let other = comparing.combine.map(|(logic, operand)| (logic, to_mask(&self.value(machine, operand))));
        let combine = |holds: u32| match other {
            None => holds,
            Some((Logic::And, other)) => holds & other,
            Some((Logic::Or, other)) => holds | other,
            Some((Logic::Xor, other)) => holds ^ other,
        };
        for (result, holds) in comparing.results.iter().zip(holds) {
            if let Some(slot) = *result {
                self.set(slot, active, &from_mask(combine(holds)));
            }
        }
    }

    fn load(&mut self, machine: &mut Machine, load: &Load, active: u32) -> LaneResult<()> {
        let addresses = self.addresses(machine, load.address);
        let bytes = load.bytes * load.results.len();
        for lane in lanes(active) {
            let mut data = [0; 16];
            let data = &mut data[..bytes];
            let result = match load.space {
                AddressSpace::Frame => {
                    let params = &self.frame().params[lane];
                    let read = params.read(Space::Param, addresses[lane], bytes, machine.checks);
                    read.map(|read| data.copy_from_slice(read))
                }
                AddressSpace::Space(space) => {
                    let context = self.context(machine, Accessor::thread(self.index, lane));
                    machine.read(&self.local[lane], space, addresses[lane], load.constant, &context, data)
                }
            };
            at(lane, result)?;
            let registers = &mut self.frame().registers;
            for (result, part) in load.results.iter().zip(data.chunks(load.bytes)) {
                if let Some((slot, width)) = *result {
                    let mut value = [0; 8];
                    value[..part.len()].copy_from_slice(part);
                    let value = u64::from_le_bytes(value);
                    let value = if load.signed { sign_extend(value, 8 * load.bytes as u32, width) } else { value };
                    registers[slot as usize][lane] = value;
                }
            }
        }
        if let AddressSpace::Space(space) = load.space {
            machine.account(space, &addresses, active, bytes, false, self.line);
        }
        Ok(())
    }

    fn store(
        &mut self,
        machine: &mut Machine,
        space: AddressSpace,
        address: Address,
        bytes: usize,
        values: &[Operand],
        active: u32,
    ) -> LaneResult<()> {
        let addresses = self.addresses(machine, address);
        let values: Vec<Lanes> = values.iter().map(|&operand| self.value(machine, operand)).collect();
        let size = bytes * values.len();
        for lane in lanes(active) {
            let mut data = [0; 16];
            for (part, value) in data.chunks_mut(bytes).zip(&values) {
                part.copy_from_slice(&value[lane].to_le_bytes()[..bytes]);
            }
            let data = &data[..size];
            let result = match space {
                AddressSpace::Frame => self.frame().params[lane].write(Space::Param, addresses[lane], data),
                AddressSpace::Space(space) => {
                    let context = self.context(machine, Accessor::thread(self.index, lane));
                    machine.write(&mut self.local[lane], space, addresses[lane], &context, data)
                }
            };
            at(lane, result)?;
        }
        if let AddressSpace::Space(space) = space {
            machine.account(space, &addresses, active, size, true, self.line);
        }
        Ok(())
    }

    fn atomic(&mut self, machine: &mut Machine, atomic: &Atomic, active: u32) -> LaneResult<()> {
        let AddressSpace::Space(space) = atomic.space else {
            return fail(lowest(active), FaultKind::Unmodelled("an atomic on a parameter"));
        };
        if atomic.float && !machine.options.float_atomics {
            return fail(lowest(active), FaultKind::FloatAtomic);
        }
        let addresses = self.addresses(machine, atomic.address);
        let [b, c] = atomic.operands.map(|operand| self.value(machine, operand));
        let context = self.context(machine, Accessor::ATOMIC);
        let mut out = [0; 32];
        for lane in lanes(active) {
            let mut data = [0; 8];
            let local = &mut self.local[lane];
            at(lane, machine.read(local, space, addresses[lane], false, &context, &mut data[..atomic.bytes]))?;
            out[lane] = u64::from_le_bytes(data);
            let new = (atomic.function)(out[lane], b[lane], c[lane]).to_le_bytes();
            at(lane, machine.write(local, space, addresses[lane], &context, &new[..atomic.bytes]))?;
        }
        machine.account(space, &addresses, active, atomic.bytes, false, self.line);
        machine.account(space, &addresses, active, atomic.bytes, true, self.line);
        if let Some(slot) = atomic.result {
            self.set(slot, active, &out);
        }
        Ok(())
    }

    fn copy_async(
        &mut self,
        machine: &mut Machine,
        bytes: usize,
        to: Address,
        from: Address,
        filled: Option<Operand>,
        active: u32,
    ) -> LaneResult<()> {
        let to = self.addresses(machine, to);
        let from = self.addresses(machine, from);
        let filled = filled.map_or(splat(bytes as u64), |operand| self.value(machine, operand));
        for lane in lanes(active) {
            let context = self.context(machine, Accessor::thread(self.index, lane));
            let filled = filled[lane] as usize;
            if filled > bytes {
                return fail(lane, FaultKind::Unmodelled("a cp.async that reads more than it writes"));
            }
            let mut data = [0; 16];
            if filled > 0 {
                if !from[lane].is_multiple_of(bytes as u64) {
                    let (space, address) = (Space::Global, from[lane]);
                    return fail(lane, FaultKind::Misaligned { space, address, align: bytes as u64 });
                }
                at(lane, machine.read_global(from[lane], 1, false, &context, &mut data[..filled]))?;
            }
            at(lane, machine.shared.begin_copy(to[lane], bytes, &context, machine.checks))?;
            self.copies[lane].open.push(AsyncCopy { address: to[lane], data, bytes });
        }
        for size in 1..=bytes {
            let lanes = lanes(active).filter(|&lane| filled[lane] as usize == size);
            let lanes = lanes.fold(0, |mask, lane| mask | 1 << lane);
            machine.account(Space::Global, &from, lanes, size, false, self.line);
        }
        machine.account(Space::Shared, &to, active, bytes, true, self.line);
        Ok(())
    }

    fn await_copies(&mut self, machine: &mut Machine, groups: Option<usize>, active: u32) -> LaneResult<()> {
        for lane in lanes(active) {
            let context = self.context(machine, Accessor::thread(self.index, lane));
            let copies = &mut self.copies[lane];
            if groups.is_none() {
                let open = std::mem::take(&mut copies.open);
                copies.groups.push_back(open);
            }
            while copies.groups.len() > groups.unwrap_or(0) {
                for copy in copies.groups.pop_front().into_iter().flatten() {
                    at(
                        lane,
                        machine.shared.end_copy(copy.address, &copy.data[..copy.bytes], &context, machine.checks),
                    )?;
                }
            }
        }
        Ok(())
    }

    /// The value of an operand that must be the same in all these lanes.
    pub fn uniform(&self, machine: &Machine, operand: Operand, active: u32) -> LaneResult<u64> {
        let values = self.value(machine, operand);
        let value = values[lowest(active)];
        match lanes(active).find(|&lane| values[lane] != value) {
            Some(lane) => fail(lane, FaultKind::NotUniform),
            None => Ok(value),
        }
    }

    /// Checks that the lanes that a `.sync` instruction names are those that execute it.
    fn check_members(&mut self, machine: &Machine, members: Operand, active: u32, orders: bool) -> LaneResult<()> {
        let mask = self.uniform(machine, members, active)? as u32;
        // Lanes that have exited, or never existed, are not waited for.
        if active & !mask != 0 || mask & self.live & !active != 0 {
            let lane = lowest(if active & !mask != 0 { active & !mask } else { active });
            return fail(lane, FaultKind::Membership { mask, active });
        }
        if orders && active == self.live {
            self.sync += 1;
        }
        Ok(())
    }

    fn shuffle(&mut self, machine: &Machine, shuffle: &Shuffle, active: u32) -> LaneResult<()> {
        self.check_members(machine, shuffle.members, active, machine.options.shuffles_order)?;
        let value = self.value(machine, shuffle.operand);
        let (b, c) = (self.value(machine, shuffle.lane), self.value(machine, shuffle.clamp));
        let (mut out, mut in_range) = ([0; 32], [0; 32]);
        for lane in lanes(active) {
            let own = lane as i64;
            let (b, clamp, segment) = ((b[lane] & 31) as i64, (c[lane] & 31) as i64, (c[lane] >> 8 & 31) as i64);
            let most = own & segment | clamp & !segment;
            let (source, holds) = match shuffle.mode {
                ShuffleMode::Up => (own - b, own - b >= most),
                ShuffleMode::Down => (own + b, own + b <= most),
                ShuffleMode::Butterfly => (own ^ b, own ^ b <= most),
                ShuffleMode::Index => {
                    let source = own & segment | b & !segment;
                    (source, source <= most)
                }
            };
            let source = if holds { source } else { own };
            if active >> source & 1 == 0 {
                return fail(lane, FaultKind::AbsentLane { lane: source as u32 });
            }
            out[lane] = value[source as usize];
            in_range[lane] = holds.into();
        }
        if let Some(slot) = shuffle.result {
            self.set(slot, active, &out);
        }
        if let Some(slot) = shuffle.in_range {
            self.set(slot, active, &in_range);
        }
        Ok(())
    }
}

impl Warp {
    /// Checks that all 32 lanes execute an `.aligned` instruction.
    pub fn require_all_lanes(&self, active: u32) -> LaneResult<()> {
        if active == u32::MAX { Ok(()) } else { fail(lowest(active), FaultKind::Divergent { missing: !active }) }
    }
}

/// The number of instruction kinds, for counting in an array.
pub const KINDS: usize = Kind::Other as usize + 1;
