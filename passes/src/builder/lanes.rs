//! The two execution models of a kernel. On a CPU, a thread executes a range of units and computes with vectors of
//! [`LANES`] elements. On a GPU, a warp executes a unit: each of its 32 threads holds one element of a vector, so a
//! vector has the type of a scalar, and a scalar is a value that all threads hold.
//!
//! Lanes that exchange values through memory must call [`Kernel::sync_lanes`] between store and load.

use std::fmt::Write;

use super::{Buf, F32, I32, I64, INDEX, Index, Kernel, LANES, Order, Scalar, Ty, Val, list};
use crate::target::Machine;
use crate::target::cuda::{WARP, WARPS};

/// How a kernel executes, and the values that describe its thread.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Execution {
    /// On a CPU: the units `begin..end`.
    Vectors { begin: Val, end: Val },
    /// On a GPU: warps, which divide `units` units. A thread knows its index `thread` in the block, the index of its
    /// `warp`, and its `lane` in the warp, as an index and as `lane_i32`; `is_first_lane` is whether that is 0. The
    /// grid has `blocks` blocks, of which this is `block`. At least `resident_blocks` blocks must fit into a
    /// multiprocessor's registers.
    Warps {
        units: Val,
        thread: Val,
        warp: Val,
        lane: Val,
        lane_i32: Val,
        is_first_lane: Val,
        block: Val,
        blocks: Val,
        resident_blocks: u64,
    },
}

impl Execution {
    /// The execution on a CPU; its values are numbered from `next` on. Also returns the next number.
    pub fn vectors(next: u32) -> (Execution, u32) {
        let [begin, end] = [0, 1].map(|i| Val { id: next + i, ty: INDEX });
        (Execution::Vectors { begin, end }, next + 2)
    }

    /// The execution on a GPU; its values are numbered from `next` on. Also returns the next number.
    pub fn warps(next: u32) -> (Execution, u32) {
        let [units, thread, warp, lane, block, blocks] = [0, 1, 2, 3, 6, 7].map(|i| Val { id: next + i, ty: INDEX });
        let lane_i32 = Val { id: next + 4, ty: I32 };
        let is_first_lane = Val { id: next + 5, ty: INDEX.of(Scalar::I1) };
        (
            Execution::Warps { units, thread, warp, lane, lane_i32, is_first_lane, block, blocks, resident_blocks: 1 },
            next + 8,
        )
    }

    /// The function around a body, for so many merged launches.
    pub fn function(&self, name: &str, (buffers, sizes): (&[Buf], &[Val]), body: &str, launches: usize) -> String {
        match self {
            Execution::Vectors { begin, end } => {
                assert_eq!(launches, 1, "only launches on a GPU are merged");
                let buffers = buffers.iter().map(|b| format!("%{}: {b}", b.id));
                let sizes = sizes.iter().chain([begin, end]).map(|v| format!("{v}: index"));
                let signature: Vec<String> = buffers.chain(sizes).collect();
                format!(
                    "  func.func @{name}({}) attributes {{llvm.emit_c_interface, passthrough = #cpu}} {{\n{body}    \
                     return\n  }}\n",
                    signature.join(", ")
                )
            }
            Execution::Warps { units, thread, warp, lane, lane_i32, is_first_lane, block, blocks, resident_blocks } => {
                let (pointers, numbers): (Vec<String>, Vec<String>) = (
                    buffers.iter().map(|b| format!("%{}", b.id)).collect(),
                    sizes.iter().chain([units]).map(|v| v.to_string()).collect(),
                );
                let (signature, body) = match launches {
                    1 => {
                        let own = format!("    {block} = gpu.block_id x\n    {blocks} = gpu.grid_dim x\n");
                        (arguments(&pointers, &numbers), own + body)
                    }
                    _ => merged_launches(&pointers, &numbers, [block, blocks], body, launches),
                };
                format!(
                    "  gpu.func @{name}({}) kernel attributes {{nvvm.reqntid = array<i32: {threads}>, nvvm.minctasm = {resident_blocks} : i32}} {{
    {thread} = gpu.thread_id x
    %width = arith.constant {WARP} : index
    {warp} = arith.divui {thread}, %width : index
    {lane} = arith.remui {thread}, %width : index
    {lane_i32} = arith.index_cast {lane} : index to i32
    %first = arith.constant 0 : index
    {is_first_lane} = arith.cmpi eq, {lane}, %first : index
{body}    gpu.return\n  }}\n",
                    signature.join(", "),
                    threads = WARP * WARPS,
                )
            }
        }
    }
}

fn arguments(pointers: &[String], numbers: &[String]) -> Vec<String> {
    let pointers = pointers.iter().map(|name| format!("{name}: !llvm.ptr<1>"));
    pointers.chain(numbers.iter().map(|name| format!("{name}: index"))).collect()
}

/// The signature and the body of a function that does the work of several launches (horizontal fusion). Its arguments
/// are those of all launches, then the sum of their units, where the last number of each launch is its units. A block
/// selects the arguments of the launch that it belongs to, and counts only that launch's blocks.
fn merged_launches(
    pointers: &[String],
    numbers: &[String],
    [block, blocks]: [&Val; 2],
    body: &str,
    launches: usize,
) -> (Vec<String>, String) {
    let of = |names: &[String], launch: usize| -> Vec<String> {
        names.iter().map(|name| format!("%of{launch}_{}", name.trim_start_matches('%'))).collect()
    };
    let all = |names: &[String]| (0..launches).flat_map(|launch| of(names, launch)).collect::<Vec<_>>();
    let mut numbers_of_all = all(numbers);
    numbers_of_all.push("%all".into());
    let signature = arguments(&all(pointers), &numbers_of_all);
    let units = numbers.last().expect("a launch has units");
    let mut text = format!(
        "    %warps = arith.constant {WARPS} : index
    %end = arith.divui %all, %warps : index
    %from = gpu.block_id x
    %grid = gpu.grid_dim x
    %begin0 = arith.constant 0 : index
"
    );
    for launch in 0..launches {
        let units = &of(std::slice::from_ref(units), launch)[0];
        let _ = writeln!(text, "    %blocks{launch} = arith.ceildivui {units}, %warps : index");
        let _ = writeln!(text, "    %begin{} = arith.addi %begin{launch}, %blocks{launch} : index", launch + 1);
    }
    let _ = writeln!(text, "    scf.for %at = %from to %end step %grid {{");
    for launch in 1..launches {
        let _ = writeln!(text, "    %is{launch} = arith.cmpi uge, %at, %begin{launch} : index");
    }
    // A block belongs to the last launch that begins at or before it.
    let mut choose = |name: &str, each: Vec<String>, ty: &str| {
        let mut chosen = each[0].clone();
        for (launch, other) in each.iter().enumerate().skip(1) {
            let result = match launch + 1 == launches {
                true => name.into(),
                false => format!("%to{launch}_{}", name.trim_start_matches('%')),
            };
            let _ = writeln!(text, "    {result} = arith.select %is{launch}, {other}, {chosen} : {ty}");
            chosen = result;
        }
    };
    for name in pointers {
        choose(name, (0..launches).flat_map(|launch| of(std::slice::from_ref(name), launch)).collect(), "!llvm.ptr<1>");
    }
    for name in numbers {
        choose(name, (0..launches).flat_map(|launch| of(std::slice::from_ref(name), launch)).collect(), "index");
    }
    choose("%begin", (0..launches).map(|launch| format!("%begin{launch}")).collect(), "index");
    choose(&blocks.to_string(), (0..launches).map(|launch| format!("%blocks{launch}")).collect(), "index");
    let _ = writeln!(text, "    {block} = arith.subi %at, %begin : index");
    (signature, format!("{text}{body}    }}\n"))
}

impl Kernel {
    /// Elements of a vector; see [`Machine::lanes`].
    pub fn lane_count(&self) -> u64 {
        match self.execution {
            Execution::Vectors { .. } => LANES,
            Execution::Warps { .. } => WARP,
        }
    }

    /// Whether loads for several items should be issued before the first is waited for. A GPU has many registers, and
    /// hides the latency of memory only in this way.
    pub fn loads_ahead(&self) -> bool {
        matches!(self.execution, Execution::Warps { .. })
    }

    /// Floats of a CPU's vector register.
    pub fn register_floats(&self) -> u64 {
        let Machine::Cpu(cpu) = self.machine else { unreachable!("only kernels for a CPU ask for this") };
        cpu.registers().floats
    }

    /// The type of a vector of such scalars.
    pub fn vector(&self, scalar: Ty) -> Ty {
        match self.execution {
            Execution::Vectors { .. } => scalar.times(LANES),
            Execution::Warps { .. } => scalar,
        }
    }

    /// The lanes' numbers 0, 1, 2, … as i32.
    pub fn lane_numbers(&mut self) -> Val {
        match self.execution {
            Execution::Vectors { .. } => {
                let numbers: Vec<String> = (0..LANES).map(|i| i.to_string()).collect();
                let ty = I32.times(LANES);
                self.emit(ty, format_args!("arith.constant dense<[{}]> : {ty}", numbers.join(", ")))
            }
            Execution::Warps { lane_i32, .. } => lane_i32,
        }
    }

    /// The index of the thread in its warp.
    pub fn lane_index(&self) -> Val {
        match self.execution {
            Execution::Vectors { .. } => unreachable!("a CPU has no warps"),
            Execution::Warps { lane, .. } => lane,
        }
    }

    /// `x` in every lane.
    pub fn splat(&mut self, x: Val) -> Val {
        let ty = self.vector(x.ty);
        match self.execution {
            Execution::Vectors { .. } => self.emit(ty, format_args!("vector.broadcast {x} : {} to {ty}", x.ty)),
            Execution::Warps { .. } => x,
        }
    }

    /// The mask of the first `n` lanes.
    pub fn mask(&mut self, n: impl Into<Index>) -> Val {
        let n = self.eval(n);
        match self.execution {
            Execution::Vectors { .. } => self.mask_of(n, LANES),
            Execution::Warps { lane, .. } => self.compare(lane, Order::Lt, n),
        }
    }

    // Across lanes.

    /// The sum of all lanes, as a scalar.
    pub fn sum_lanes(&mut self, x: Val) -> Val {
        match self.execution {
            Execution::Vectors { .. } => {
                // Halves are added recursively. The order is explicit, so that it does not depend on the target.
                let mut x = x;
                while let Some(lanes) = x.ty.lanes.filter(|&n| n > 1) {
                    let (low, high) = (self.slice_lanes(x, 0, lanes / 2), self.slice_lanes(x, lanes / 2, lanes / 2));
                    x = self.add(low, high);
                }
                self.lane(x, 0)
            }
            Execution::Warps { .. } => self.reduce_neighbours(x, WARP, Kernel::add),
        }
    }

    /// The greatest of all lanes, as a scalar.
    pub fn max_lanes(&mut self, x: Val) -> Val {
        match self.execution {
            Execution::Vectors { .. } => {
                self.emit(F32, format_args!("vector.reduction <maxnumf>, {x} : {} into f32", x.ty))
            }
            Execution::Warps { .. } => self.reduce_neighbours(x, WARP, Kernel::max_number),
        }
    }

    /// The greater of two floats; if one of them is NaN, the other.
    pub fn max_number(&mut self, x: Val, y: Val) -> Val {
        self.emit(x.ty, format_args!("llvm.intr.maxnum({x}, {y}) : ({ty}, {ty}) -> {ty}", ty = x.ty))
    }

    /// Each lane holds four words. Returns the words of all lanes in order, x₀ y₀ z₀ w₀ x₁ …, as four vectors.
    pub fn interleave_words(&mut self, words: [Val; 4]) -> [Val; 4] {
        match self.execution {
            Execution::Vectors { .. } => {
                let [x, y, z, w] = words;
                let (even, odd) = (self.interleave(x, z), self.interleave(y, w));
                let words = self.interleave(even, odd);
                [0, 1, 2, 3].map(|part| self.slice_lanes(words, part * LANES, LANES))
            }
            Execution::Warps { lane_i32, .. } => {
                let [two, three] = [2, 3].map(|n| self.int(n, I32));
                let (quarter, word) = (self.shift_right(lane_i32, two), self.and(lane_i32, three));
                [0, 1, 2, 3].map(|part| {
                    let first = self.int((part * WARP / 4) as i64, I32);
                    let source = self.add(first, quarter);
                    let [x, rest @ ..] = words.map(|word| self.shuffle("idx", word, source));
                    (1..4).zip(rest).fold(x, |x, (n, other)| {
                        let n = self.int(n, I32);
                        let here = self.compare(word, Order::Eq, n);
                        self.select(here, other, x)
                    })
                })
            }
        }
    }

    /// The upper and the lower 32 bits of x · `factor`, as unsigned words.
    pub fn mul_wide(&mut self, x: Val, factor: u32) -> (Val, Val) {
        let (ty, factor) = (x.ty, i64::from(factor));
        match self.execution {
            // A CPU multiplies every second word to a product of 64 bits.
            Execution::Vectors { .. } => {
                let wide = I64.times(LANES / 2);
                let both = self.emit(wide, format_args!("vector.bitcast {x} : {ty} to {wide}"));
                let (half, lower, factor) = (self.int(32, wide), self.int(0xFFFF_FFFF, wide), self.int(factor, wide));
                let [even, odd] = [self.and(both, lower), self.shift_right(both, half)].map(|words| {
                    let product = self.mul(words, factor);
                    self.emit(ty, format_args!("vector.bitcast {product} : {wide} to {ty}"))
                });
                let [low, high] =
                    [0, 1].map(|first| self.shuffle_lanes(even, odd, |lane| lane / 2 * 2 + first + lane % 2 * LANES));
                (high, low)
            }
            Execution::Warps { .. } => {
                let wide = self.extend_i64(x);
                let (half, factor) = (self.int(32, wide.ty), self.int(factor, wide.ty));
                let wide = self.mul(wide, factor);
                let high = self.shift_right(wide, half);
                (self.truncate_i32(high), self.truncate_i32(wide))
            }
        }
    }

    /// One lane as a scalar.
    pub fn lane(&mut self, x: Val, lane: u64) -> Val {
        match self.execution {
            Execution::Vectors { .. } => {
                let ty = Ty { lanes: None, ..x.ty };
                self.emit(ty, format_args!("vector.extract {x}[{lane}] : {ty} from {}", x.ty))
            }
            Execution::Warps { .. } => {
                let lane = self.int(lane as i64, I32);
                self.shuffle("idx", x, lane)
            }
        }
    }

    /// Reduces groups of `count` neighbouring lanes of a warp by butterfly shuffles, so that every lane gets the same
    /// result.
    pub fn reduce_neighbours(&mut self, x: Val, count: u64, mut join: impl FnMut(&mut Kernel, Val, Val) -> Val) -> Val {
        let mut x = x;
        let mut distance = count / 2;
        while distance > 0 {
            let by = self.int(distance as i64, I32);
            let other = self.shuffle("bfly", x, by);
            x = join(self, x, other);
            distance /= 2;
        }
        x
    }

    fn shuffle(&mut self, mode: &str, x: Val, by: Val) -> Val {
        let (all, last) = (self.int(-1, I32), self.int(WARP as i64 - 1, I32));
        self.emit(x.ty, format_args!("nvvm.shfl.sync {mode} {all}, {x}, {by}, {last} : {ty} -> {ty}", ty = x.ty))
    }

    /// A barrier of the warp: other lanes may then load what lanes have stored. It does nothing on a CPU.
    pub fn sync_lanes(&mut self) {
        if let Execution::Warps { .. } = self.execution {
            let all = self.int(-1, I32);
            self.line(format_args!("nvvm.bar.warp.sync {all} : i32"));
        }
    }

    // Memory.

    /// Loads one element as a scalar.
    pub fn load(&mut self, from: Buf, at: impl Into<Index>) -> Val {
        let at = self.eval(at);
        match self.execution {
            Execution::Vectors { .. } => {
                self.emit(from.scalar(), format_args!("memref.load %{}[{at}] : {from}", from.id))
            }
            Execution::Warps { .. } => self.load_scalar(from, at),
        }
    }

    /// Loads an element that no kernel writes, so that the load can be hoisted out of loops.
    pub fn load_input(&mut self, from: Buf, at: impl Into<Index>) -> Val {
        let at = self.eval(at);
        match self.execution {
            Execution::Vectors { .. } => self.load(from, at),
            Execution::Warps { .. } => {
                let (place, ty) = (self.pointer_to(from, at), from.scalar());
                self.emit(ty, format_args!("llvm.load {place} invariant : {} -> {ty}", from.pointer()))
            }
        }
    }

    /// Loads an element if the condition holds, else gives `other`.
    pub fn load_or(&mut self, condition: Val, from: Buf, at: impl Into<Index>, other: Val) -> Val {
        let at = self.eval(at);
        match self.execution {
            Execution::Vectors { .. } => {
                let x = self.load(from, at);
                self.select(condition, x, other)
            }
            Execution::Warps { .. } => self.load_if(condition, from, at, other),
        }
    }

    /// Stores a scalar.
    pub fn store(&mut self, x: Val, to: Buf, at: impl Into<Index>) {
        let at = self.eval(at);
        match self.execution {
            Execution::Vectors { .. } => self.line(format_args!("memref.store {x}, %{}[{at}] : {to}", to.id)),
            Execution::Warps { is_first_lane, .. } => self.when(is_first_lane, |k| k.store_scalar(x, to, at)),
        }
    }

    /// Loads a vector from `at` on; all of its elements must exist.
    pub fn load_vector(&mut self, from: Buf, at: impl Into<Index>) -> Val {
        match self.execution {
            Execution::Vectors { .. } => self.load_vector_of(from, at, LANES),
            Execution::Warps { lane, .. } => self.load_scalar(from, at.into() + lane),
        }
    }

    /// Stores a vector from `at` on; all of its elements must exist.
    pub fn store_vector(&mut self, x: Val, to: Buf, at: impl Into<Index>) {
        let at = self.eval(at);
        match self.execution {
            Execution::Vectors { .. } => self.line(format_args!("vector.store {x}, %{}[{at}] : {to}, {}", to.id, x.ty)),
            Execution::Warps { lane, .. } => self.store_scalar(x, to, at + lane),
        }
    }

    /// Loads the lanes of `mask`; the others are those of `other`.
    pub fn load_masked(&mut self, from: Buf, at: impl Into<Index>, mask: Val, other: Val) -> Val {
        let at = self.eval(at);
        let ty = other.ty;
        match self.execution {
            Execution::Vectors { .. } => self.emit(
                ty,
                format_args!(
                    "vector.maskedload %{}[{at}], {mask}, {other} : {from}, {}, {ty} into {ty}",
                    from.id, mask.ty
                ),
            ),
            Execution::Warps { lane, .. } => self.load_if(mask, from, at + lane, other),
        }
    }

    /// Loads the elements at `at + steps`, lane by lane; lanes outside of `mask` are 0.
    pub fn gather_lanes(&mut self, from: Buf, at: impl Into<Index>, steps: Val, mask: Val) -> Val {
        let at = self.eval(at);
        let ty = self.vector(from.scalar());
        let zero = self.float(0.0, ty);
        match self.execution {
            Execution::Vectors { .. } => self.emit(
                ty,
                format_args!(
                    "vector.gather %{}[{at}][{steps}], {mask}, {zero} : {from}, {}, {}, {ty} into {ty}",
                    from.id, steps.ty, mask.ty
                ),
            ),
            Execution::Warps { .. } => {
                let steps = self.to_index(steps);
                self.load_if(mask, from, at + steps, zero)
            }
        }
    }

    /// Stores the lanes of `mask` from `at` on.
    pub fn store_lanes(&mut self, x: Val, to: Buf, at: impl Into<Index>, mask: Val) {
        let at = self.eval(at);
        match self.execution {
            Execution::Vectors { .. } => {
                let some = |k: &mut Kernel| {
                    k.line(format_args!(
                        "vector.maskedstore %{}[{at}], {mask}, {x} : {to}, {}, {}",
                        to.id, mask.ty, x.ty
                    ));
                };
                let Machine::Cpu(cpu) = self.machine else { unreachable!("only a CPU has vectors") };
                match self.counts.get(&mask.id).copied() {
                    // These CPUs have no masked stores, which then take many instructions. Most vectors are whole, so
                    // they are tested for that first.
                    Some(count) if !cpu.has_masked_memory() => {
                        let whole = self.compare(count, Order::Gt, x.ty.lanes.unwrap_or(1) - 1);
                        self.branch(whole, |k| k.store_vector(x, to, at), some);
                    }
                    _ => some(self),
                }
            }
            Execution::Warps { lane, .. } => self.when(mask, |k| k.store_scalar(x, to, at + lane)),
        }
    }

    /// Loads one element in each thread of a GPU.
    pub fn load_scalar(&mut self, from: Buf, at: impl Into<Index>) -> Val {
        let place = self.pointer_to(from, at);
        self.emit(from.scalar(), format_args!("llvm.load {place} : {} -> {}", from.pointer(), from.scalar()))
    }

    /// Stores one element from each thread of a GPU.
    pub fn store_scalar(&mut self, x: Val, to: Buf, at: impl Into<Index>) {
        self.mark_written(to);
        let place = self.pointer_to(to, at);
        self.line(format_args!("llvm.store {x}, {place} : {}, {}", x.ty, to.pointer()));
    }

    /// Records that the kernel writes the buffer, if it is one of its arguments.
    pub(super) fn mark_written(&mut self, to: Buf) {
        if let Some(written) = self.writes.get_mut(to.id as usize) {
            *written = true;
        }
    }

    /// Loads one element in each thread whose condition holds; the others take `other`.
    pub fn load_if(&mut self, condition: Val, from: Buf, at: impl Into<Index>, other: Val) -> Val {
        let at = self.eval(at);
        self.if_else_one(condition, other, |k| k.load_scalar(from, at))
    }

    /// Evaluates `yes` if the condition holds, else gives `other`.
    pub(super) fn if_else_one(&mut self, condition: Val, other: Val, yes: impl FnOnce(&mut Kernel) -> Val) -> Val {
        self.if_else(condition, &[other], |k| vec![yes(k)])[0]
    }

    /// Evaluates several values if the condition holds, else gives `others`.
    pub fn if_else(&mut self, condition: Val, others: &[Val], yes: impl FnOnce(&mut Kernel) -> Vec<Val>) -> Vec<Val> {
        let results: Vec<Val> = others.iter().map(|other| self.fresh(other.ty)).collect();
        let types = list(others.iter().map(|other| other.ty));
        self.line(format_args!("{} = scf.if {condition} -> ({types}) {{", list(&results)));
        self.depth += 1;
        let values = yes(self);
        self.line(format_args!("scf.yield {} : {types}", list(&values)));
        self.depth -= 1;
        self.line(format_args!("}} else {{"));
        self.line(format_args!("  scf.yield {} : {types}", list(others)));
        self.line(format_args!("}}"));
        results
    }

    /// The pointer to the element at `at`, for the thread.
    pub(super) fn pointer_to(&mut self, of: Buf, at: impl Into<Index>) -> Val {
        self.pointer_to_type(of, at, of.scalar())
    }

    /// The pointer to element `at` of memory that holds elements of the given type.
    pub(super) fn pointer_to_type(&mut self, of: Buf, at: impl Into<Index>, element: Ty) -> Val {
        let at = self.eval(at);
        let at = self.emit(INDEX.of(Scalar::I64), format_args!("arith.index_cast {at} : index to i64"));
        let pointer = of.pointer();
        self.emit(INDEX, format_args!("llvm.getelementptr %{}[{at}] : ({pointer}, i64) -> {pointer}, {element}", of.id))
    }

    // Control.

    /// The first unit of the range that a CPU's thread executes.
    pub fn first_unit(&self) -> Val {
        match self.execution {
            Execution::Vectors { begin, .. } => begin,
            Execution::Warps { .. } => unreachable!("the units of a warp are not contiguous"),
        }
    }

    /// The start and the end of a unit's elements, if `count` elements are divided into stretches of equal length; the
    /// last one may be shorter.
    pub fn stretch(&mut self, unit: impl Into<Index>, count: impl Into<Index>) -> (Val, Val) {
        let block = self.machine.flat_unit_elements();
        let start = self.eval(unit.into() * block);
        let end = self.min(start + block, count.into());
        (start, end)
    }

    /// A loop over the elements of a unit's stretch, one vector per step. `body` gets the index of the first lane, and
    /// the mask of the elements that exist.
    pub fn each_of_stretch(
        &mut self,
        unit: impl Into<Index>,
        count: impl Into<Index>,
        body: impl FnOnce(&mut Kernel, Val, Val),
    ) {
        let (start, end) = self.stretch(unit, count);
        self.each(start, end, self.lane_count(), |k, at| {
            let mask = k.mask(end - at);
            body(k, at, mask);
        });
    }

    /// A loop over the units that the thread or warp executes.
    pub fn units(&mut self, body: impl FnOnce(&mut Kernel, Val)) {
        match self.execution {
            Execution::Vectors { begin, end } => self.each(begin, end, 1, body),
            Execution::Warps { units, warp, block, blocks, .. } => {
                self.fold_by(block * WARPS + warp, units, blocks * WARPS, &[], |k, unit, _| {
                    body(k, unit);
                    vec![]
                });
            }
        }
    }
}
