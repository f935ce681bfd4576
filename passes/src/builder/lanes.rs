//! What differs between the two forms of a kernel. A processor's thread takes a range of units and works on vectors of
//! [`LANES`] elements. On a GPU a unit is a warp's: of a vector each of its 32 threads holds one element, so that a
//! vector has a scalar's type, and a scalar is a value that all of them hold.
//!
//! Lanes that hand something to each other through memory must [`Kernel::settle`] in between.

use std::fmt::Write;

use super::{Buf, F32, I32, I64, INDEX, Index, Kernel, LANES, Order, Scalar, Ty, Val, list};
use crate::target::Machine;
use crate::target::cuda::{WARP, WARPS};

/// How a kernel works, and what it knows of the thread it runs on.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Form {
    /// Vectors; the units `begin..end`.
    Vectors { begin: Val, end: Val },
    /// Warps, which share `units`: the `thread` of a block, the warp that it is of, and the `lane` in that, as an index
    /// and as a number of 32 bits; whether that is the first. The `block`, of so many; and how many of them a
    /// multiprocessor is to have registers for, at least.
    Warps {
        units: Val,
        thread: Val,
        warp: Val,
        lane: Val,
        number: Val,
        leads: Val,
        block: Val,
        blocks: Val,
        resident: u64,
    },
}

impl Form {
    pub fn vectors(next: u32) -> (Form, u32) {
        let [begin, end] = [0, 1].map(|i| Val { id: next + i, ty: INDEX });
        (Form::Vectors { begin, end }, next + 2)
    }

    pub fn warps(next: u32) -> (Form, u32) {
        let [units, thread, warp, lane, block, blocks] = [0, 1, 2, 3, 6, 7].map(|i| Val { id: next + i, ty: INDEX });
        let number = Val { id: next + 4, ty: I32 };
        let leads = Val { id: next + 5, ty: INDEX.of(Scalar::I1) };
        (Form::Warps { units, thread, warp, lane, number, leads, block, blocks, resident: 1 }, next + 8)
    }

    /// The function, around what has been written of it, for so many launches.
    pub fn function(&self, name: &str, (buffers, sizes): (&[Buf], &[Val]), body: &str, launches: usize) -> String {
        match self {
            Form::Vectors { begin, end } => {
                assert_eq!(launches, 1, "launches go side by side on a GPU alone");
                let buffers = buffers.iter().map(|b| format!("%{}: {b}", b.id));
                let sizes = sizes.iter().chain([begin, end]).map(|v| format!("{v}: index"));
                let signature: Vec<String> = buffers.chain(sizes).collect();
                format!(
                    "  func.func @{name}({}) attributes {{llvm.emit_c_interface, passthrough = #cpu}} {{\n{body}    \
                     return\n  }}\n",
                    signature.join(", ")
                )
            }
            Form::Warps { units, thread, warp, lane, number, leads, block, blocks, resident } => {
                let (pointers, numbers): (Vec<String>, Vec<String>) = (
                    buffers.iter().map(|b| format!("%{}", b.id)).collect(),
                    sizes.iter().chain([units]).map(|v| v.to_string()).collect(),
                );
                let (signature, body) = match launches {
                    1 => {
                        let own = format!("    {block} = gpu.block_id x\n    {blocks} = gpu.grid_dim x\n");
                        (arguments(&pointers, &numbers), own + body)
                    }
                    _ => side_by_side(&pointers, &numbers, [block, blocks], body, launches),
                };
                format!(
                    "  gpu.func @{name}({}) kernel attributes {{nvvm.reqntid = array<i32: {threads}>, nvvm.minctasm = {resident} : i32}} {{
    {thread} = gpu.thread_id x
    %width = arith.constant {WARP} : index
    {warp} = arith.divui {thread}, %width : index
    {lane} = arith.remui {thread}, %width : index
    {number} = arith.index_cast {lane} : index to i32
    %first = arith.constant 0 : index
    {leads} = arith.cmpi eq, {lane}, %first : index
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

/// Arguments of several launches, and of all their units; a block takes those of the launch that it is of, and counts
/// that one's blocks alone. The last of a launch's numbers are its units.
fn side_by_side(
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
    // Of the launches that have begun, the last.
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
    /// Elements of a vector: [`Machine::lanes`].
    pub fn lane_count(&self) -> u64 {
        match self.form {
            Form::Vectors { .. } => LANES,
            Form::Warps { .. } => WARP,
        }
    }

    /// What is read for several things in hand is to be on its way before the first of them is waited for: registers are
    /// many, and nothing else hides how far memory is.
    pub fn reads_ahead(&self) -> bool {
        matches!(self.form, Form::Warps { .. })
    }

    /// Floats of a processor's register.
    pub fn register(&self) -> u64 {
        let Machine::Cpu(cpu) = self.machine else { unreachable!("asked of kernels for processors alone") };
        cpu.registers().floats
    }

    /// The type of a vector of such scalars.
    pub fn vector(&self, scalar: Ty) -> Ty {
        match self.form {
            Form::Vectors { .. } => scalar.times(LANES),
            Form::Warps { .. } => scalar,
        }
    }

    /// 0, 1, 2, … in `i32` lanes.
    pub fn lane_numbers(&mut self) -> Val {
        match self.form {
            Form::Vectors { .. } => {
                let numbers: Vec<String> = (0..LANES).map(|i| i.to_string()).collect();
                let ty = I32.times(LANES);
                self.emit(ty, format_args!("arith.constant dense<[{}]> : {ty}", numbers.join(", ")))
            }
            Form::Warps { number, .. } => number,
        }
    }

    /// The thread's place in its warp.
    pub fn lane_index(&self) -> Val {
        match self.form {
            Form::Vectors { .. } => unreachable!("a processor has no warps"),
            Form::Warps { lane, .. } => lane,
        }
    }

    /// `x` in every lane.
    pub fn splat(&mut self, x: Val) -> Val {
        let ty = self.vector(x.ty);
        match self.form {
            Form::Vectors { .. } => self.emit(ty, format_args!("vector.broadcast {x} : {} to {ty}", x.ty)),
            Form::Warps { .. } => x,
        }
    }

    /// The first `n` lanes.
    pub fn mask(&mut self, n: impl Into<Index>) -> Val {
        let n = self.eval(n);
        match self.form {
            Form::Vectors { .. } => self.mask_of(n, LANES),
            Form::Warps { lane, .. } => self.compare(lane, Order::Lt, n),
        }
    }

    // Across lanes.

    pub fn sum_lanes(&mut self, x: Val) -> Val {
        match self.form {
            Form::Vectors { .. } => {
                // Halves are added to halves: an order of its own, whatever the target would prefer.
                let mut x = x;
                while let Some(lanes) = x.ty.lanes.filter(|&n| n > 1) {
                    let (low, high) = (self.part(x, 0, lanes / 2), self.part(x, lanes / 2, lanes / 2));
                    x = self.add(low, high);
                }
                self.lane(x, 0)
            }
            Form::Warps { .. } => self.join_neighbours(x, WARP, Kernel::add),
        }
    }

    pub fn max_lanes(&mut self, x: Val) -> Val {
        match self.form {
            Form::Vectors { .. } => self.emit(F32, format_args!("vector.reduction <maxnumf>, {x} : {} into f32", x.ty)),
            Form::Warps { .. } => self.join_neighbours(x, WARP, Kernel::greater),
        }
    }

    /// The greater of two floats, of which one may be no number.
    pub fn greater(&mut self, x: Val, y: Val) -> Val {
        self.emit(x.ty, format_args!("llvm.intr.maxnum({x}, {y}) : ({ty}, {ty}) -> {ty}", ty = x.ty))
    }

    /// Of four words in every lane those of all lanes in order, x₀ y₀ z₀ w₀ x₁ …, as four vectors.
    pub fn in_order(&mut self, words: [Val; 4]) -> [Val; 4] {
        match self.form {
            Form::Vectors { .. } => {
                let [x, y, z, w] = words;
                let (even, odd) = (self.interleave(x, z), self.interleave(y, w));
                let words = self.interleave(even, odd);
                [0, 1, 2, 3].map(|part| self.part(words, part * LANES, LANES))
            }
            Form::Warps { number, .. } => {
                let [two, three] = [2, 3].map(|n| self.int(n, I32));
                let (quarter, word) = (self.shift_right(number, two), self.and(number, three));
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

    /// The upper and the lower 32 bits of x · `factor`, of unsigned words.
    pub fn wide_product(&mut self, x: Val, factor: u32) -> (Val, Val) {
        let (ty, factor) = (x.ty, i64::from(factor));
        match self.form {
            // A processor multiplies every second word, to twice its width.
            Form::Vectors { .. } => {
                let wide = I64.times(LANES / 2);
                let both = self.emit(wide, format_args!("vector.bitcast {x} : {ty} to {wide}"));
                let (half, lower, factor) = (self.int(32, wide), self.int(0xFFFF_FFFF, wide), self.int(factor, wide));
                let [even, odd] = [self.and(both, lower), self.shift_right(both, half)].map(|words| {
                    let product = self.mul(words, factor);
                    self.emit(ty, format_args!("vector.bitcast {product} : {wide} to {ty}"))
                });
                let [low, high] =
                    [0, 1].map(|first| self.picked(even, odd, |lane| lane / 2 * 2 + first + lane % 2 * LANES));
                (high, low)
            }
            Form::Warps { .. } => {
                let wide = self.widen(x);
                let (half, factor) = (self.int(32, wide.ty), self.int(factor, wide.ty));
                let wide = self.mul(wide, factor);
                let high = self.shift_right(wide, half);
                (self.narrow(high), self.narrow(wide))
            }
        }
    }

    /// One lane as a scalar.
    pub fn lane(&mut self, x: Val, lane: u64) -> Val {
        match self.form {
            Form::Vectors { .. } => {
                let ty = Ty { lanes: None, ..x.ty };
                self.emit(ty, format_args!("vector.extract {x}[{lane}] : {ty} from {}", x.ty))
            }
            Form::Warps { .. } => {
                let lane = self.int(lane as i64, I32);
                self.shuffle("idx", x, lane)
            }
        }
    }

    /// Of a warp's lanes `count` neighbours as one, in each of them: halves change places, so that each adds alike.
    pub fn join_neighbours(&mut self, x: Val, count: u64, mut join: impl FnMut(&mut Kernel, Val, Val) -> Val) -> Val {
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

    fn shuffle(&mut self, way: &str, x: Val, by: Val) -> Val {
        let (all, last) = (self.int(-1, I32), self.int(WARP as i64 - 1, I32));
        self.emit(x.ty, format_args!("nvvm.shfl.sync {way} {all}, {x}, {by}, {last} : {ty} -> {ty}", ty = x.ty))
    }

    /// What lanes have written, others may read from here on.
    pub fn settle(&mut self) {
        if let Form::Warps { .. } = self.form {
            let all = self.int(-1, I32);
            self.line(format_args!("nvvm.bar.warp.sync {all} : i32"));
        }
    }

    // Memory.

    pub fn load(&mut self, from: Buf, at: impl Into<Index>) -> Val {
        let at = self.eval(at);
        match self.form {
            Form::Vectors { .. } => self.emit(from.scalar(), format_args!("memref.load %{}[{at}] : {from}", from.id)),
            Form::Warps { .. } => self.load_here(from, at),
        }
    }

    /// An element of what no kernel writes: where it is read in a loop, it is read once.
    pub fn load_input(&mut self, from: Buf, at: impl Into<Index>) -> Val {
        let at = self.eval(at);
        match self.form {
            Form::Vectors { .. } => self.load(from, at),
            Form::Warps { .. } => {
                let (place, ty) = (self.place(from, at), from.scalar());
                self.emit(ty, format_args!("llvm.load {place} invariant : {} -> {ty}", from.pointer()))
            }
        }
    }

    /// An element if the condition holds, else `other`.
    pub fn load_or(&mut self, condition: Val, from: Buf, at: impl Into<Index>, other: Val) -> Val {
        let at = self.eval(at);
        match self.form {
            Form::Vectors { .. } => {
                let x = self.load(from, at);
                self.select(condition, x, other)
            }
            Form::Warps { .. } => self.load_if(condition, from, at, other),
        }
    }

    pub fn store(&mut self, x: Val, to: Buf, at: impl Into<Index>) {
        let at = self.eval(at);
        match self.form {
            Form::Vectors { .. } => self.line(format_args!("memref.store {x}, %{}[{at}] : {to}", to.id)),
            Form::Warps { leads, .. } => self.when(leads, |k| k.store_here(x, to, at)),
        }
    }

    /// A vector of elements from `at` on, all of which must exist.
    pub fn load_vector(&mut self, from: Buf, at: impl Into<Index>) -> Val {
        match self.form {
            Form::Vectors { .. } => self.load_some(from, at, LANES),
            Form::Warps { lane, .. } => self.load_here(from, at.into() + lane),
        }
    }

    pub fn store_vector(&mut self, x: Val, to: Buf, at: impl Into<Index>) {
        let at = self.eval(at);
        match self.form {
            Form::Vectors { .. } => self.line(format_args!("vector.store {x}, %{}[{at}] : {to}, {}", to.id, x.ty)),
            Form::Warps { lane, .. } => self.store_here(x, to, at + lane),
        }
    }

    /// The lanes of `mask` from memory, `other` in those it leaves out.
    pub fn load_masked(&mut self, from: Buf, at: impl Into<Index>, mask: Val, other: Val) -> Val {
        let at = self.eval(at);
        let ty = other.ty;
        match self.form {
            Form::Vectors { .. } => self.emit(
                ty,
                format_args!(
                    "vector.maskedload %{}[{at}], {mask}, {other} : {from}, {}, {ty} into {ty}",
                    from.id, mask.ty
                ),
            ),
            Form::Warps { lane, .. } => self.load_if(mask, from, at + lane, other),
        }
    }

    /// The elements at `at + steps`, lane by lane; 0 in those `mask` leaves out.
    pub fn gather_lanes(&mut self, from: Buf, at: impl Into<Index>, steps: Val, mask: Val) -> Val {
        let at = self.eval(at);
        let ty = self.vector(from.scalar());
        let zero = self.float(0.0, ty);
        match self.form {
            Form::Vectors { .. } => self.emit(
                ty,
                format_args!(
                    "vector.gather %{}[{at}][{steps}], {mask}, {zero} : {from}, {}, {}, {ty} into {ty}",
                    from.id, steps.ty, mask.ty
                ),
            ),
            Form::Warps { .. } => {
                let steps = self.to_index(steps);
                self.load_if(mask, from, at + steps, zero)
            }
        }
    }

    pub fn store_lanes(&mut self, x: Val, to: Buf, at: impl Into<Index>, mask: Val) {
        let at = self.eval(at);
        match self.form {
            Form::Vectors { .. } => {
                let some = |k: &mut Kernel| {
                    k.line(format_args!(
                        "vector.maskedstore %{}[{at}], {mask}, {x} : {to}, {}, {}",
                        to.id, mask.ty, x.ty
                    ));
                };
                let Machine::Cpu(cpu) = self.machine else { unreachable!("vectors are a processor's") };
                match self.counts.get(&mask.id).copied() {
                    // A store under a mask is many instructions there, and few vectors are not whole.
                    Some(count) if !cpu.masks() => {
                        let whole = self.compare(count, Order::Gt, x.ty.lanes.unwrap_or(1) - 1);
                        self.branch(whole, |k| k.store_vector(x, to, at), some);
                    }
                    _ => some(self),
                }
            }
            Form::Warps { lane, .. } => self.when(mask, |k| k.store_here(x, to, at + lane)),
        }
    }

    /// One thread's load.
    pub fn load_here(&mut self, from: Buf, at: impl Into<Index>) -> Val {
        let place = self.place(from, at);
        self.emit(from.scalar(), format_args!("llvm.load {place} : {} -> {}", from.pointer(), from.scalar()))
    }

    pub fn store_here(&mut self, x: Val, to: Buf, at: impl Into<Index>) {
        self.written(to);
        let place = self.place(to, at);
        self.line(format_args!("llvm.store {x}, {place} : {}, {}", x.ty, to.pointer()));
    }

    /// Takes down that the kernel writes there, if that is one of its buffers.
    pub(super) fn written(&mut self, to: Buf) {
        if let Some(written) = self.writes.get_mut(to.id as usize) {
            *written = true;
        }
    }

    /// One thread's load if its condition holds, else `other`.
    pub fn load_if(&mut self, condition: Val, from: Buf, at: impl Into<Index>, other: Val) -> Val {
        let at = self.eval(at);
        self.either(condition, other, |k| k.load_here(from, at))
    }

    /// What is computed if the condition holds, else `other`.
    pub(super) fn either(&mut self, condition: Val, other: Val, yes: impl FnOnce(&mut Kernel) -> Val) -> Val {
        self.either_of(condition, &[other], |k| vec![yes(k)])[0]
    }

    /// The same for several.
    pub fn either_of(&mut self, condition: Val, others: &[Val], yes: impl FnOnce(&mut Kernel) -> Vec<Val>) -> Vec<Val> {
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

    /// A thread's pointer to the element at `at`, of the buffer's own type.
    pub(super) fn place(&mut self, of: Buf, at: impl Into<Index>) -> Val {
        self.place_of(of, at, of.scalar())
    }

    /// The same in memory that holds such elements.
    pub(super) fn place_of(&mut self, of: Buf, at: impl Into<Index>, element: Ty) -> Val {
        let at = self.eval(at);
        let at = self.emit(INDEX.of(Scalar::I64), format_args!("arith.index_cast {at} : index to i64"));
        let pointer = of.pointer();
        self.emit(INDEX, format_args!("llvm.getelementptr %{}[{at}] : ({pointer}, i64) -> {pointer}, {element}", of.id))
    }

    // Control.

    /// The first of the units that a processor's thread takes in one go.
    pub fn first_unit(&self) -> Val {
        match self.form {
            Form::Vectors { begin, .. } => begin,
            Form::Warps { .. } => unreachable!("a warp's units are apart"),
        }
    }

    /// Where the elements of a unit begin and end, of `count` that are dealt out in stretches; the last one is shorter.
    pub fn stretch(&mut self, unit: impl Into<Index>, count: impl Into<Index>) -> (Val, Val) {
        let block = self.machine.stretch();
        let start = self.eval(unit.into() * block);
        let end = self.min(start + block, count.into());
        (start, end)
    }

    /// The elements of a unit, a vector at a time: `body` is given the index of its first lane and the mask of those
    /// that have an element.
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

    /// The units asked for.
    pub fn units(&mut self, body: impl FnOnce(&mut Kernel, Val)) {
        match self.form {
            Form::Vectors { begin, end } => self.each(begin, end, 1, body),
            Form::Warps { units, warp, block, blocks, .. } => {
                self.fold_by(block * WARPS + warp, units, blocks * WARPS, &[], |k, unit, _| {
                    body(k, unit);
                    vec![]
                });
            }
        }
    }
}
