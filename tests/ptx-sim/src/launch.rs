//! The simulated GPU: global memory, launches, the blocks of a grid and their barriers.

use std::sync::Arc;

use crate::approx::mix;
use crate::arithmetic::{Lanes, mask};
use crate::error::{Error, Fault, FaultKind, Result};
use crate::matrix::{Fragment, FragmentLayout};
use crate::memory::{Checks, GLOBAL_STRIDE, Global, PrivateMemory, Region, space_of};
use crate::program::{Function, Module};
use crate::race::AccessContext;
use crate::report::{Count, Kind, Report};
use crate::types::Space;
use crate::warp::{KINDS, LaneFault, Warp, WarpState, lanes, lowest};

/// Which checks are made, and the random choices where PTX leaves one open.
#[derive(Clone, Debug)]
pub struct Options {
    /// Seed of all random choices: errors of approximations, layouts of fragments, initial content of registers.
    pub seed: u64,
    /// Perturbs approximate results (`ex2.approx`, tensor-core sums) by up to their documented error.
    pub perturb: bool,
    /// Reports races within a block: unordered accesses of two threads to a byte, at least one a write.
    pub races: bool,
    /// Reports races between blocks of a launch in global memory. Turn it off for kernels that pass data between blocks
    /// with fences and atomics.
    pub races_across_blocks: bool,
    /// Shuffles, votes and `redux` order the memory accesses of the lanes as `bar.warp.sync` does, although the PTX ISA
    /// promises this only of `bar.warp.sync`.
    pub shuffles_order: bool,
    /// Reports reads of memory that nothing has written.
    pub uninitialised: bool,
    /// Allows floating-point atomics. Their order, and so the last bit of a sum, is unspecified.
    pub float_atomics: bool,
    /// The largest number of instructions that the warps of a launch may execute.
    pub steps: u64,
    /// Required alignment in bytes of the rows of a `wmma` matrix, unless the fragment is smaller. CUDA C++ requires 16
    /// bytes of a stride. The PTX ISA requires the alignment of the fragment's size, which is checked here for the
    /// matrix as a whole.
    pub matrix_row_alignment: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            seed: 0,
            perturb: true,
            races: true,
            races_across_blocks: true,
            shuffles_order: true,
            uninitialised: true,
            float_atomics: false,
            steps: 1 << 28,
            matrix_row_alignment: 16,
        }
    }
}

/// An address in global memory, as a kernel receives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ptr(u64);

impl Ptr {
    /// The pointer with an address that [`Ptr::address`] returned.
    pub fn at(address: u64) -> Ptr {
        Ptr(address)
    }

    /// The pointer `bytes` bytes further on.
    pub fn offset(self, bytes: u64) -> Ptr {
        Ptr(self.0.wrapping_add(bytes))
    }

    pub fn address(self) -> u64 {
        self.0
    }
}

/// An argument of a kernel; its size must be that of the parameter.
#[derive(Clone, Debug)]
pub enum Arg {
    Ptr(Ptr),
    U16(u16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    /// A parameter that is an array of bytes.
    Bytes(Vec<u8>),
}

impl Arg {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Arg::Ptr(Ptr(x)) | Arg::U64(x) => x.to_le_bytes().into(),
            Arg::U16(x) => x.to_le_bytes().into(),
            Arg::U32(x) => x.to_le_bytes().into(),
            Arg::I32(x) => x.to_le_bytes().into(),
            Arg::I64(x) => x.to_le_bytes().into(),
            Arg::F32(x) => x.to_le_bytes().into(),
            Arg::F64(x) => x.to_le_bytes().into(),
            Arg::Bytes(bytes) => bytes.clone(),
        }
    }
}

/// Sizes of a grid in blocks, or of a block in threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent(pub [u32; 3]);

impl From<u32> for Extent {
    fn from(x: u32) -> Self {
        Extent([x, 1, 1])
    }
}

impl From<[u32; 2]> for Extent {
    fn from([x, y]: [u32; 2]) -> Self {
        Extent([x, y, 1])
    }
}

impl From<[u32; 3]> for Extent {
    fn from(extent: [u32; 3]) -> Self {
        Extent(extent)
    }
}

/// A device with its global memory.
#[derive(Default)]
pub struct Gpu {
    pub options: Options,
    global: Global,
    /// The number of epochs so far; see `race.rs`.
    epoch: u32,
    layouts: FragmentLayouts,
}

/// Fragment layouts that have been drawn, with their seed.
type FragmentLayouts = Vec<(u64, Fragment, Arc<FragmentLayout>)>;

macro_rules! typed {
    ($($alloc:ident $read:ident $write:ident $type:ty;)*) => {
        $(
            /// Allocates a buffer with this content.
            pub fn $alloc(&mut self, content: &[$type]) -> Ptr {
                self.alloc(content.iter().flat_map(|x| x.to_le_bytes()).collect())
            }

            /// The content of the whole buffer that starts at `ptr`. Panics if nothing has written one of its bytes.
            pub fn $read(&self, ptr: Ptr) -> Vec<$type> {
                const SIZE: usize = size_of::<$type>();
                let bytes = self.whole(ptr);
                bytes.chunks_exact(SIZE).map(|x| <$type>::from_le_bytes(x.try_into().expect("their size"))).collect()
            }

            /// Writes to one buffer, from `ptr` on.
            pub fn $write(&mut self, ptr: Ptr, content: &[$type]) {
                self.write(ptr, &content.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
            }
        )*
    };
}

impl Gpu {
    pub fn new() -> Gpu {
        Gpu::with(Options::default())
    }

    pub fn with(options: Options) -> Gpu {
        Gpu { options, ..Gpu::default() }
    }

    /// Allocates a buffer with this content, at an address that is a multiple of at least 256.
    pub fn alloc(&mut self, content: Vec<u8>) -> Ptr {
        Ptr(self.global.add(content, true))
    }

    /// Allocates a buffer of which reading a byte before writing it is a fault.
    pub fn alloc_unwritten(&mut self, bytes: usize) -> Ptr {
        Ptr(self.global.add(vec![0; bytes], false))
    }

    /// Makes reading these bytes of a buffer a fault until they are written again.
    pub fn erase(&mut self, ptr: Ptr, bytes: usize) {
        let region = self.global.find(ptr.0).unwrap_or_else(|| panic!("{ptr:?} is no buffer"));
        let start = (ptr.0 % GLOBAL_STRIDE) as usize;
        region.erase(start..start + bytes);
    }

    /// Bytes of one buffer, from `ptr` on. Panics if nothing has written one of them.
    pub fn read(&self, ptr: Ptr, bytes: usize) -> &[u8] {
        let region = self.global.get(ptr.0).unwrap_or_else(|| panic!("{ptr:?} is no buffer"));
        let start = (ptr.0 % GLOBAL_STRIDE) as usize;
        if let Some(byte) = region.unwritten(start..start + bytes) {
            panic!("nothing has written byte {byte} of the {} of {ptr:?}", region.content().len());
        }
        &region.content()[start..start + bytes]
    }

    /// Frees a buffer, given any address in it. Accessing it from now on is out of bounds.
    pub fn free(&mut self, ptr: Ptr) {
        assert!(self.global.remove(ptr.0), "{ptr:?} is no buffer");
    }

    typed! {
        alloc_u8 read_u8 write_u8 u8;
        alloc_u16 read_u16 write_u16 u16;
        alloc_u32 read_u32 write_u32 u32;
        alloc_i32 read_i32 write_i32 i32;
        alloc_u64 read_u64 write_u64 u64;
        alloc_i64 read_i64 write_i64 i64;
        alloc_f32 read_f32 write_f32 f32;
        alloc_f64 read_f64 write_f64 f64;
    }

    fn whole(&self, ptr: Ptr) -> &[u8] {
        assert_eq!(ptr.0 % GLOBAL_STRIDE, 0, "{ptr:?} is within a buffer");
        let bytes = self.global.get(ptr.0).map_or(0, |region| region.content().len());
        self.read(ptr, bytes)
    }

    fn write(&mut self, ptr: Ptr, content: &[u8]) {
        let region = self.global.find(ptr.0).unwrap_or_else(|| panic!("{ptr:?} is no buffer"));
        region.fill((ptr.0 % GLOBAL_STRIDE) as usize, content);
    }

    /// Runs a kernel to its end, block after block. `dynamic_shared` is the number of bytes for `.extern .shared`
    /// arrays.
    pub fn launch(
        &mut self,
        module: &Module,
        kernel: &str,
        grid: impl Into<Extent>,
        block: impl Into<Extent>,
        dynamic_shared: usize,
        args: &[Arg],
    ) -> Result<Report> {
        let refuse = |message: String| Err(Error::Launch { kernel: kernel.into(), message });
        let (grid, size) = (grid.into().0, block.into().0);
        let Some(entry) = module.functions.iter().position(|function| function.entry && function.name == kernel) else {
            return refuse(format!("the module has no such kernel, but {:?}", module.kernels().collect::<Vec<_>>()));
        };
        let function = &module.functions[entry];
        let params = match check(module, function, grid, size, dynamic_shared, args) {
            Ok(params) => params,
            Err(message) => return refuse(message),
        };
        for (number, content) in &module.globals {
            self.global.add_variable(*number, content);
        }
        let variables = function.shared.iter().map(|&v| {
            let variable = &module.shared[v];
            variable.address..variable.address + variable.bytes.unwrap_or(dynamic_shared) as u64
        });
        let mut shared = Region::shared(variables);
        let mut machine = Machine {
            module,
            checks: Checks {
                races: self.options.races,
                across_blocks: self.options.races_across_blocks,
                uninitialised: self.options.uninitialised,
            },
            options: &self.options,
            global: &mut self.global,
            shared: &mut shared,
            params: &params,
            grid,
            size,
            block: [0; 3],
            dynamic_shared,
            epoch: self.epoch,
            block_epoch: 0,
            launch_epoch: self.epoch + 1,
            steps: 0,
            counts: [Count::default(); KINDS],
            layouts: &mut self.layouts,
            report: Report::default(),
        };
        let result = machine.grid(entry);
        self.epoch = machine.epoch;
        let mut report = machine.finish();
        report.shared_bytes = (module.declared_shared(function) + dynamic_shared) as u64;
        (report.read.unique, report.written.unique) = self.global.end_launch();
        result.map(|()| report)
    }
}

/// Checks the launch and lays out the kernel's parameters in memory.
fn check(
    module: &Module,
    function: &Function,
    grid: [u32; 3],
    size: [u32; 3],
    dynamic_shared: usize,
    args: &[Arg],
) -> std::result::Result<Vec<u8>, String> {
    if grid.contains(&0) || grid[0] > 0x7FFF_FFFF || grid[1] > 0xFFFF || grid[2] > 0xFFFF {
        return Err(format!("a grid of {grid:?} blocks"));
    }
    let threads = size.iter().map(|&n| u64::from(n)).product::<u64>();
    if threads == 0 || threads > 1024 || size[2] > 64 {
        return Err(format!("a block of {size:?} threads"));
    }
    if let Some(block) = function.block
        && block != size
    {
        return Err(format!("a block of {size:?} threads where the kernel requires {block:?}"));
    }
    if let Some(most) = function.max_threads
        && threads > most.into()
    {
        return Err(format!("{threads} threads in a block where the kernel has room for {most}"));
    }
    let declared = module.declared_shared(function);
    if declared > 48 << 10 {
        return Err(format!("{declared} bytes of declared shared memory where 48 KiB are the most"));
    }
    // The limits per block of V100; T4; A100; consumer Ampere and Ada; H100.
    let most = match module.target {
        ..=72 => 96,
        73..=79 => 64,
        80 | 87 => 163,
        81..=89 => 99,
        _ => 227,
    } << 10;
    if declared + dynamic_shared > most {
        return Err(format!("{} bytes of shared memory where {most} are the most", declared + dynamic_shared));
    }
    if args.len() != function.params.len() {
        return Err(format!("{} arguments where the kernel has {} parameters", args.len(), function.params.len()));
    }
    let mut params = vec![0; function.param_bytes];
    for (n, (arg, slot)) in args.iter().zip(&function.params).enumerate() {
        let bytes = arg.bytes();
        if bytes.len() != slot.bytes {
            return Err(format!("argument {n} has {} bytes, the parameter {}", bytes.len(), slot.bytes));
        }
        params[slot.offset..slot.offset + slot.bytes].copy_from_slice(&bytes);
    }
    Ok(params)
}

/// The result of an access, or what is wrong with it.
type Checked<T> = std::result::Result<T, FaultKind>;

/// A launch in progress, and the block that is being executed.
pub struct Machine<'a> {
    pub module: &'a Module,
    pub options: &'a Options,
    pub checks: Checks,
    pub global: &'a mut Global,
    pub shared: &'a mut Region,
    params: &'a [u8],
    pub grid: [u32; 3],
    /// Threads of a block along each axis.
    pub size: [u32; 3],
    /// Index of the current block along each axis.
    pub block: [u32; 3],
    /// Bytes of the `.extern .shared` arrays.
    pub dynamic_shared: usize,
    /// The current epoch, and the first ones of this block and of this launch; see `race.rs`.
    pub epoch: u32,
    pub block_epoch: u32,
    pub launch_epoch: u32,
    /// Instructions that warps have executed so far.
    pub steps: u64,
    counts: [Count; KINDS],
    layouts: &'a mut FragmentLayouts,
    pub report: Report,
}

impl Machine<'_> {
    pub fn warps(&self) -> usize {
        self.size.iter().product::<u32>().div_ceil(32) as usize
    }

    fn grid(&mut self, entry: usize) -> Result<()> {
        let [x, y, z] = self.grid;
        for index in 0..u64::from(x) * u64::from(y) * u64::from(z) {
            let (x, y) = (u64::from(x), u64::from(y));
            self.block = [index % x, index / x % y, index / (x * y)].map(|n| n as u32);
            self.report.blocks += 1;
            self.run_block(entry)?;
        }
        Ok(())
    }

    fn run_block(&mut self, entry: usize) -> Result<()> {
        self.epoch += 1;
        self.block_epoch = self.epoch;
        self.shared.forget();
        let mut warps: Vec<Warp> = (0..self.warps()).map(|index| Warp::new(self, entry, index)).collect();
        loop {
            for warp in &mut warps {
                warp.run(self).map_err(|fault| self.fault(warp, fault))?;
            }
            let mut waiting = warps.iter().filter(|warp| warp.state != WarpState::Done);
            let Some(first) = waiting.next() else { return Ok(()) };
            if let Some(other) = waiting.find(|warp| warp.state != first.state) {
                let fault = LaneFault { lane: lowest(other.live), kind: FaultKind::Deadlock };
                return Err(self.fault(other, fault));
            }
            self.epoch += 1;
            for warp in warps.iter_mut().filter(|warp| warp.state != WarpState::Done) {
                warp.state = WarpState::Ready;
                warp.sync = 0;
            }
        }
    }

    fn fault(&self, warp: &Warp, fault: LaneFault) -> Error {
        let function = warp.frames.first().map_or(0, |frame| frame.function);
        let line = warp.line as usize;
        Error::Fault(Box::new(Fault {
            kernel: self.module.functions[function].name.clone(),
            block: self.block,
            thread: [0, 1, 2].map(|axis| warp.threads[axis][fault.lane] as u32),
            line,
            text: self.module.text(line),
            kind: fault.kind,
        }))
    }

    fn finish(self) -> Report {
        let mut report = self.report;
        report.instructions = ALL_KINDS.into_iter().zip(self.counts).filter(|(_, count)| count.warps > 0).collect();
        report
    }

    pub fn count(&mut self, kind: Kind, active: u32) -> Checked<()> {
        self.steps += 1;
        let count = &mut self.counts[kind as usize];
        count.warps += 1;
        count.lanes += u64::from(active.count_ones());
        if self.steps > self.options.steps { Err(FaultKind::Steps { limit: self.options.steps }) } else { Ok(()) }
    }

    /// Initial content of a register: not zero, so that no kernel can rely on zero.
    pub fn garbage(&self, register: usize, bits: u32) -> Lanes {
        let value = mix(self.options.seed ^ mix(register as u64));
        std::array::from_fn(|lane| value.rotate_left(lane as u32) & mask(bits))
    }

    pub fn perturbation(&self) -> Option<u64> {
        self.options.perturb.then_some(self.options.seed)
    }

    pub fn layout(&mut self, fragment: &Fragment) -> Arc<FragmentLayout> {
        let seed = self.options.seed;
        let known = self.layouts.iter().find(|(drawn, kind, _)| (*drawn, kind) == (seed, fragment));
        if let Some((_, _, layout)) = known {
            return layout.clone();
        }
        let layout = Arc::new(fragment.layout(seed));
        self.layouts.push((seed, *fragment, layout.clone()));
        layout
    }

    /// A read by one lane, in any address space.
    pub fn read(
        &mut self,
        local: &PrivateMemory,
        space: Space,
        address: u64,
        constant: bool,
        context: &AccessContext,
        out: &mut [u8],
    ) -> Checked<()> {
        let bytes = out.len();
        let (space, address) = if space == Space::Generic { space_of(address) } else { (space, address) };
        match space {
            Space::Global => return self.read_global(address, bytes as u64, constant, context, out),
            Space::Shared => {
                let data = self.shared.read(address, bytes, bytes as u64, constant, context, self.checks)?;
                out.copy_from_slice(data);
            }
            Space::Local => out.copy_from_slice(local.read(space, address, bytes, self.checks)?),
            Space::Const | Space::Param | Space::Generic => {
                let bank = if space == Space::Const { &self.module.constants } else { self.params };
                let start = usize::try_from(address).unwrap_or(usize::MAX);
                let data = bank.get(start..start.saturating_add(bytes));
                out.copy_from_slice(data.ok_or(FaultKind::OutOfBounds { space, address, bytes })?);
                if !address.is_multiple_of(bytes as u64) {
                    return Err(FaultKind::Misaligned { space, address, align: bytes as u64 });
                }
            }
        }
        Ok(())
    }

    pub fn read_global(
        &mut self,
        address: u64,
        align: u64,
        constant: bool,
        context: &AccessContext,
        out: &mut [u8],
    ) -> Checked<()> {
        let bytes = out.len();
        let nowhere = FaultKind::OutOfBounds { space: Space::Global, address, bytes };
        let region = self.global.find(address).ok_or(nowhere)?;
        out.copy_from_slice(region.read(address, bytes, align, constant, context, self.checks)?);
        Ok(())
    }

    /// A read by a whole warp in global or shared memory.
    pub fn read_region(
        &mut self,
        space: Space,
        address: u64,
        align: u64,
        constant: bool,
        context: &AccessContext,
        out: &mut [u8],
    ) -> Checked<()> {
        if space == Space::Global {
            return self.read_global(address, align, constant, context, out);
        }
        out.copy_from_slice(self.shared.read(address, out.len(), align, constant, context, self.checks)?);
        Ok(())
    }

    pub fn write(
        &mut self,
        local: &mut PrivateMemory,
        space: Space,
        address: u64,
        context: &AccessContext,
        data: &[u8],
    ) -> Checked<()> {
        let (space, address) = if space == Space::Generic { space_of(address) } else { (space, address) };
        match space {
            Space::Global | Space::Shared => self.write_region(space, address, data.len() as u64, context, data),
            Space::Local => local.write(space, address, data),
            _ => Err(FaultKind::ReadOnly { space, address }),
        }
    }

    pub fn write_region(
        &mut self,
        space: Space,
        address: u64,
        align: u64,
        context: &AccessContext,
        data: &[u8],
    ) -> Checked<()> {
        if space == Space::Shared {
            return self.shared.write(address, data, align, context, self.checks);
        }
        let nowhere = FaultKind::OutOfBounds { space, address, bytes: data.len() };
        self.global.find(address).ok_or(nowhere)?.write(address, data, align, context, self.checks)
    }

    /// Adds an access of `bytes` bytes in each of these lanes to the report.
    pub fn account(&mut self, space: Space, addresses: &Lanes, active: u32, bytes: usize, write: bool, line: u32) {
        let mut shared = [0; 32];
        let (mut shared_count, mut global) = (0, Sectors::default());
        let mut global_bytes = 0;
        for lane in lanes(active) {
            let address = addresses[lane];
            let (space, address) = if space == Space::Generic { space_of(address) } else { (space, address) };
            match space {
                Space::Global => {
                    global_bytes += bytes as u64;
                    global.add(address, bytes);
                }
                Space::Shared => {
                    shared[shared_count] = address;
                    shared_count += 1;
                }
                _ => {}
            }
        }
        self.add_global(global_bytes, global.count, write);
        self.add_shared(&shared[..shared_count], bytes, write, line);
    }

    /// Adds an access of a whole warp to contiguous pieces. It is unspecified which lane accesses which part of shared
    /// memory, so conflicts are counted as for `ldmatrix`: 16 bytes of eight pieces at once.
    pub fn account_pieces(&mut self, space: Space, starts: &[u64], bytes: usize, write: bool, line: u32) {
        if space == Space::Global {
            let mut sectors = Sectors::default();
            starts.iter().for_each(|&start| sectors.add(start, bytes));
            self.add_global((starts.len() * bytes) as u64, sectors.count, write);
            return;
        }
        for column in (0..bytes).step_by(16) {
            for starts in starts.chunks(8) {
                let addresses: Vec<u64> = starts.iter().map(|start| start + column as u64).collect();
                self.add_shared(&addresses, 16.min(bytes - column), write, line);
            }
        }
    }

    fn add_global(&mut self, bytes: u64, sectors: u64, write: bool) {
        let traffic = if write { &mut self.report.written } else { &mut self.report.read };
        traffic.bytes += bytes;
        traffic.sectors += sectors;
    }

    fn add_shared(&mut self, addresses: &[u64], bytes: usize, write: bool, line: u32) {
        if addresses.is_empty() {
            return;
        }
        let total = (addresses.len() * bytes) as u64;
        *(if write { &mut self.report.shared_written } else { &mut self.report.shared_read }) += total;
        let degree = conflict(addresses, bytes);
        if degree > 1 {
            let worst = self.report.conflicts.entry(line as usize).or_default();
            *worst = degree.max(*worst);
        }
    }
}

/// Counts distinct sectors of 32 bytes.
#[derive(Default)]
struct Sectors {
    seen: Vec<u64>,
    count: u64,
}

impl Sectors {
    fn add(&mut self, address: u64, bytes: usize) {
        for sector in address / 32..=(address + bytes as u64 - 1) / 32 {
            if self.seen.last() != Some(&sector) && !self.seen.contains(&sector) {
                self.seen.push(sector);
                self.count += 1;
            }
        }
    }
}

/// The degree of a bank conflict: the largest number of words of one bank that are accessed at once. There are 32 banks
/// of 4 bytes, and as many lanes are served at once as access 128 bytes together.
fn conflict(addresses: &[u64], bytes: usize) -> u32 {
    let words = bytes.div_ceil(4) as u64;
    let mut worst = 1;
    for together in addresses.chunks(32 / words as usize) {
        let mut first = [u64::MAX; 32];
        let mut more: Vec<u64> = vec![];
        for word in together.iter().flat_map(|address| address / 4..address / 4 + words) {
            let seen = &mut first[word as usize % 32];
            if *seen == u64::MAX {
                *seen = word;
            } else if *seen != word && !more.contains(&word) {
                more.push(word);
            }
        }
        for bank in 0..32 {
            let degree = 1 + more.iter().filter(|&&word| word % 32 == bank).count() as u32;
            worst = degree.max(worst);
        }
    }
    worst
}

const ALL_KINDS: [Kind; KINDS] = [
    Kind::Move,
    Kind::Integer,
    Kind::Float,
    Kind::Fma,
    Kind::Half,
    Kind::HalfFma,
    Kind::Approximate,
    Kind::Convert,
    Kind::Compare,
    Kind::Load,
    Kind::Store,
    Kind::Atomic,
    Kind::CopyAsync,
    Kind::Shuffle,
    Kind::Barrier,
    Kind::Branch,
    Kind::Matrix,
    Kind::MatrixMove,
    Kind::Other,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bank_conflicts_depend_on_the_stride() {
        let strided = |stride: u64| (0..32).map(|lane| 4 * stride * lane).collect::<Vec<u64>>();
        let degrees: Vec<u32> = [0, 1, 2, 3, 8, 32, 33].iter().map(|&s| conflict(&strided(s), 4)).collect();
        assert_eq!(degrees, [1, 1, 2, 1, 8, 32, 1]);
        let wide: Vec<u64> = (0..32).map(|lane| 16 * lane).collect();
        assert_eq!(conflict(&wide, 16), 1);
        // Eight rows of 16 bytes conflict with a stride of 32 bytes, but not with one of 48 bytes.
        let rows = |stride: u64| (0..8).map(|row| stride * row).collect::<Vec<u64>>();
        assert_eq!([32, 48, 64, 128, 144].map(|s| conflict(&rows(s), 16)), [2, 1, 4, 8, 1]);
    }

    #[test]
    fn all_kinds_lists_the_kinds_in_declaration_order() {
        assert!(ALL_KINDS.iter().enumerate().all(|(n, &kind)| kind as usize == n));
    }
}
