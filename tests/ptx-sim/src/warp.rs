//! Executes a warp: 32 lanes in lockstep, with a stack of the ways they have gone apart.

use std::collections::VecDeque;

use crate::arithmetic::{Lanes, from_mask, mask as width_mask, sign_extend, to_mask};
use crate::error::FaultKind;
use crate::flow::END;
use crate::launch::Machine;
use crate::memory::Private;
use crate::program::*;
use crate::race::{Now, Who};
use crate::report::Kind;
use crate::types::Space;

/// What went wrong, and in which lane.
pub struct Trouble {
    pub lane: usize,
    pub kind: FaultKind,
}

pub type Step<T> = Result<T, Trouble>;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum State {
    Ready,
    AtBarrier(u64),
    Done,
}

pub struct Warp {
    pub index: usize,
    /// Lanes that have not exited.
    pub live: u32,
    pub state: State,
    pub frames: Vec<Frame>,
    /// The line of the instruction at hand.
    pub line: u32,
    /// Points in this epoch that ordered the lanes.
    pub sync: u32,
    /// Thread numbers within the block.
    pub threads: [Lanes; 3],
    pub local: Vec<Private>,
    copies: Vec<Copies>,
}

/// A function being executed by some of the lanes.
pub struct Frame {
    pub function: usize,
    pub registers: Vec<Lanes>,
    stack: Vec<Way>,
    /// Parameters of calls, for each lane.
    params: Vec<Private>,
    local_start: usize,
    /// Lanes that called, and what they get back.
    called: u32,
    results: Vec<Pass>,
}

/// Lanes that go one way, until they meet others.
struct Way {
    next: u32,
    meet: u32,
    lanes: u32,
}

/// The `cp.async` of one thread that it has not waited for.
#[derive(Clone, Default)]
struct Copies {
    groups: VecDeque<Vec<Pending>>,
    open: Vec<Pending>,
}

#[derive(Clone)]
struct Pending {
    address: u64,
    data: [u8; 16],
    bytes: usize,
}

const MOST_CALLS: usize = 64;

/// The lanes of a mask, from the lowest.
pub fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |lane| mask >> lane & 1 == 1)
}

pub fn lowest(mask: u32) -> usize {
    mask.trailing_zeros().min(31) as usize
}

pub fn at<T>(lane: usize, result: Result<T, FaultKind>) -> Step<T> {
    result.map_err(|kind| Trouble { lane, kind })
}

fn fail<T>(lane: usize, kind: FaultKind) -> Step<T> {
    Err(Trouble { lane, kind })
}

impl Warp {
    pub fn new(machine: &Machine, function: usize, index: usize) -> Warp {
        let [x, y, z] = machine.size.map(u64::from);
        let threads = x * y * z;
        let mut warp = Warp {
            index,
            live: 0,
            state: State::Ready,
            frames: vec![],
            line: 0,
            sync: 0,
            threads: [[0; 32]; 3],
            local: vec![Private::default(); 32],
            copies: vec![Copies::default(); 32],
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

    /// Starts a function in these lanes.
    fn enter(&mut self, machine: &Machine, index: usize, lanes: u32, results: Vec<Pass>) {
        let function = &machine.module.functions[index];
        let local_start = self.frames.last().map_or(0, |frame| {
            let used = frame.local_start + machine.module.functions[frame.function].local_bytes;
            used.next_multiple_of(16)
        });
        for private in &mut self.local {
            // What a frame before has left there is gone.
            private.resize(local_start);
            private.resize(local_start + function.local_bytes);
        }
        let mut params = vec![Private::default(); 32];
        params.iter_mut().for_each(|private| private.resize(function.frame_bytes));
        let registers = function.registers.iter().enumerate().map(|(n, &bits)| machine.garbage(n, bits)).collect();
        let stack = vec![Way { next: 0, meet: END, lanes }];
        self.frames.push(Frame { function: index, registers, stack, params, local_start, called: lanes, results });
    }

    /// All lanes have returned.
    fn leave(&mut self) {
        let frame = self.frames.pop().expect("it is being left");
        let Some(caller) = self.frames.last_mut() else {
            self.state = State::Done;
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

    pub fn now(&self, machine: &Machine, who: Who) -> Now {
        Now {
            epoch: machine.epoch,
            sync: self.sync,
            who,
            line: self.line,
            block: machine.block_epoch,
            launch: machine.launch_epoch,
        }
    }

    /// The value of an operand in each lane; in `room`, unless a register holds it.
    fn held<'a>(&'a self, machine: &Machine, operand: Operand, room: &'a mut Lanes) -> &'a Lanes {
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
    pub fn run(&mut self, machine: &mut Machine) -> Step<()> {
        let module = machine.module;
        while self.state == State::Ready {
            let frame = self.frame();
            let Some(way) = frame.stack.last_mut() else {
                self.leave();
                continue;
            };
            if way.lanes == 0 || way.next == way.meet {
                frame.stack.pop();
                continue;
            }
            let here = way.lanes;
            let step = &module.functions[frame.function].code[way.next as usize];
            way.next += 1;
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

    fn execute(&mut self, machine: &mut Machine, action: &Action, here: u32, active: u32) -> Step<()> {
        match action {
            Action::Map { map, result, operands } => {
                let mut room = [[0; 32]; 3];
                let [a, b, c] = &mut room;
                let value = |n: usize, room| match operands.get(n) {
                    Some(&operand) => self.held(machine, operand, room),
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
            Action::Store { place, address, bytes, values } => {
                self.store(machine, *place, *address, *bytes, values, active)?
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
            Action::Branch { target, meet, uniform } => {
                let rest = here & !active;
                let way = self.frame().stack.last_mut().expect("it is executing");
                let on = way.next;
                if rest == 0 {
                    way.next = *target;
                } else if *uniform {
                    return fail(lowest(rest), FaultKind::NotUniform);
                } else {
                    self.part(*meet, &[(on, rest), (*target, active)]);
                }
            }
            Action::BranchTable { targets, index, meet, uniform } => {
                let index = self.value(machine, *index);
                let on = self.frame().stack.last().expect("it is executing").next;
                let mut ways: Vec<(u32, u32)> = vec![(on, here & !active)];
                for lane in lanes(active) {
                    let Some(&target) = targets.get(index[lane] as usize) else {
                        return fail(lane, FaultKind::Unmodelled("an index beyond the table"));
                    };
                    match ways.iter_mut().find(|way| way.0 == target) {
                        Some(way) => way.1 |= 1 << lane,
                        None => ways.push((target, 1 << lane)),
                    }
                }
                ways.retain(|way| way.1 != 0);
                if *uniform && ways.len() > 1 {
                    return fail(lowest(ways[1].1), FaultKind::NotUniform);
                }
                self.part(*meet, &ways);
            }
            Action::Call { function, arguments, results } => {
                if self.frames.len() == MOST_CALLS {
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
                self.frame().stack.iter_mut().for_each(|way| way.lanes &= !active);
            }
            Action::Return | Action::Exit => {
                self.live &= !active;
                self.frames.iter_mut().flat_map(|frame| &mut frame.stack).for_each(|way| way.lanes &= !active);
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
                self.state = State::AtBarrier(id);
            }
            Action::WarpBarrier { members } => {
                self.members(machine, *members, active, true)?;
            }
            Action::Shuffle(shuffle) => self.shuffle(machine, shuffle, active)?,
            Action::Vote { vote, result, operand, members } => {
                self.members(machine, *members, active, machine.options.shuffles_order)?;
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
                self.members(machine, *members, active, machine.options.shuffles_order)?;
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

    /// The way at hand goes on where all meet; before that, each of these, the last first.
    fn part(&mut self, meet: u32, ways: &[(u32, u32)]) {
        let stack = &mut self.frame().stack;
        if let [(next, _)] = ways {
            stack.last_mut().expect("it is executing").next = *next;
            return;
        }
        if meet == END {
            stack.pop();
        } else {
            stack.last_mut().expect("it is executing").next = meet;
        }
        stack.extend(ways.iter().map(|&(next, lanes)| Way { next, meet, lanes }));
    }

    fn compare(&mut self, machine: &Machine, comparing: &Comparing, active: u32) {
        let [a, b] = comparing.operands.map(|operand| self.value(machine, operand));
        let holds = if comparing.pair {
            let half = |x: &Lanes, shift: u32| x.map(|bits| bits >> shift & 0xFFFF);
            [0, 16].map(|shift| (comparing.compare)(&half(&a, shift), &half(&b, shift)))
        } else {
            // The second result is that of the opposite comparison.
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

    fn load(&mut self, machine: &mut Machine, load: &Load, active: u32) -> Step<()> {
        let addresses = self.addresses(machine, load.address);
        let bytes = load.bytes * load.results.len();
        for lane in lanes(active) {
            let mut data = [0; 16];
            let data = &mut data[..bytes];
            let result = match load.place {
                Place::Frame => {
                    let params = &self.frame().params[lane];
                    let read = params.read(Space::Param, addresses[lane], bytes, machine.checks);
                    read.map(|read| data.copy_from_slice(read))
                }
                Place::Space(space) => {
                    let now = self.now(machine, Who::thread(self.index, lane));
                    machine.read(&self.local[lane], space, addresses[lane], load.constant, &now, data)
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
        if let Place::Space(space) = load.place {
            machine.account(space, &addresses, active, bytes, false, self.line);
        }
        Ok(())
    }

    fn store(
        &mut self,
        machine: &mut Machine,
        place: Place,
        address: Address,
        bytes: usize,
        values: &[Operand],
        active: u32,
    ) -> Step<()> {
        let addresses = self.addresses(machine, address);
        let values: Vec<Lanes> = values.iter().map(|&operand| self.value(machine, operand)).collect();
        let size = bytes * values.len();
        for lane in lanes(active) {
            let mut data = [0; 16];
            for (part, value) in data.chunks_mut(bytes).zip(&values) {
                part.copy_from_slice(&value[lane].to_le_bytes()[..bytes]);
            }
            let data = &data[..size];
            let result = match place {
                Place::Frame => self.frame().params[lane].write(Space::Param, addresses[lane], data),
                Place::Space(space) => {
                    let now = self.now(machine, Who::thread(self.index, lane));
                    machine.write(&mut self.local[lane], space, addresses[lane], &now, data)
                }
            };
            at(lane, result)?;
        }
        if let Place::Space(space) = place {
            machine.account(space, &addresses, active, size, true, self.line);
        }
        Ok(())
    }

    fn atomic(&mut self, machine: &mut Machine, atomic: &Atomic, active: u32) -> Step<()> {
        let Place::Space(space) = atomic.place else {
            return fail(lowest(active), FaultKind::Unmodelled("an atomic on a parameter"));
        };
        if atomic.float && !machine.options.float_atomics {
            return fail(lowest(active), FaultKind::FloatAtomic);
        }
        let addresses = self.addresses(machine, atomic.address);
        let [b, c] = atomic.operands.map(|operand| self.value(machine, operand));
        let now = self.now(machine, Who::ATOMIC);
        let mut out = [0; 32];
        for lane in lanes(active) {
            let mut data = [0; 8];
            let local = &mut self.local[lane];
            at(lane, machine.read(local, space, addresses[lane], false, &now, &mut data[..atomic.bytes]))?;
            out[lane] = u64::from_le_bytes(data);
            let new = (atomic.function)(out[lane], b[lane], c[lane]).to_le_bytes();
            at(lane, machine.write(local, space, addresses[lane], &now, &new[..atomic.bytes]))?;
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
    ) -> Step<()> {
        let to = self.addresses(machine, to);
        let from = self.addresses(machine, from);
        let filled = filled.map_or(splat(bytes as u64), |operand| self.value(machine, operand));
        for lane in lanes(active) {
            let now = self.now(machine, Who::thread(self.index, lane));
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
                at(lane, machine.read_global(from[lane], 1, false, &now, &mut data[..filled]))?;
            }
            at(lane, machine.shared.begin_copy(to[lane], bytes, &now, machine.checks))?;
            self.copies[lane].open.push(Pending { address: to[lane], data, bytes });
        }
        for size in 1..=bytes {
            let lanes = lanes(active).filter(|&lane| filled[lane] as usize == size);
            let lanes = lanes.fold(0, |mask, lane| mask | 1 << lane);
            machine.account(Space::Global, &from, lanes, size, false, self.line);
        }
        machine.account(Space::Shared, &to, active, bytes, true, self.line);
        Ok(())
    }

    fn await_copies(&mut self, machine: &mut Machine, groups: Option<usize>, active: u32) -> Step<()> {
        for lane in lanes(active) {
            let now = self.now(machine, Who::thread(self.index, lane));
            let copies = &mut self.copies[lane];
            if groups.is_none() {
                let open = std::mem::take(&mut copies.open);
                copies.groups.push_back(open);
            }
            while copies.groups.len() > groups.unwrap_or(0) {
                for copy in copies.groups.pop_front().into_iter().flatten() {
                    at(lane, machine.shared.end_copy(copy.address, &copy.data[..copy.bytes], &now, machine.checks))?;
                }
            }
        }
        Ok(())
    }

    /// The operand, which must be the same in all these lanes.
    pub fn uniform(&self, machine: &Machine, operand: Operand, active: u32) -> Step<u64> {
        let values = self.value(machine, operand);
        let value = values[lowest(active)];
        match lanes(active).find(|&lane| values[lane] != value) {
            Some(lane) => fail(lane, FaultKind::NotUniform),
            None => Ok(value),
        }
    }

    /// Checks that the lanes a `.sync` instruction names are those that execute it.
    fn members(&mut self, machine: &Machine, members: Operand, active: u32, orders: bool) -> Step<()> {
        let mask = self.uniform(machine, members, active)? as u32;
        // Lanes that have exited, or never were, are not waited for.
        if active & !mask != 0 || mask & self.live & !active != 0 {
            let lane = lowest(if active & !mask != 0 { active & !mask } else { active });
            return fail(lane, FaultKind::Membership { mask, active });
        }
        if orders && active == self.live {
            self.sync += 1;
        }
        Ok(())
    }

    fn shuffle(&mut self, machine: &Machine, shuffle: &Shuffle, active: u32) -> Step<()> {
        self.members(machine, shuffle.members, active, machine.options.shuffles_order)?;
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
    /// An `.aligned` instruction wants all 32 lanes.
    pub fn together(&self, active: u32) -> Step<()> {
        if active == u32::MAX { Ok(()) } else { fail(lowest(active), FaultKind::Divergent { missing: !active }) }
    }
}

/// Kinds whose number is an index, for counting without a map.
pub const KINDS: usize = Kind::Other as usize + 1;
