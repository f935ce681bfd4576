//! The syntax tree to a program: lays out variables, resolves names, turns opcodes into actions.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::approx::Function as Approximate;
use crate::arithmetic::{self, Arithmetic, Map, mask};
use crate::error::{Error, Result};
use crate::flow::{self, Next};
use crate::matrix::{Fragment, Role, Shape};
use crate::memory::{self, GLOBAL_STRIDE};
use crate::opcode::{Decoded, Opcode, Refusal, unknown, wrong};
use crate::parse::{self, Arg, Statement, Variable};
use crate::program::*;
use crate::report::Kind;
use crate::types::{Float, Space, Type};

/// Buffers of modules are numbered from here; those that tests allocate, below.
static NEXT_GLOBAL: AtomicU64 = AtomicU64::new(1 << 20);

/// Room between shared variables.
const GUARD: u64 = 128;

impl Module {
    pub fn parse(text: &str) -> Result<Module> {
        let lines: Vec<&str> = text.lines().collect();
        let syntax = parse::module(text, &lines)?;
        let mut layout = Layout::default();
        let mut names = HashMap::new();
        for variable in &syntax.variables {
            let symbol = layout.place(variable, COMMON).map_err(|message| Error::Parse {
                line: 0,
                text: variable.name.into(),
                message: message.into(),
            })?;
            names.insert(variable.name.to_string(), symbol);
        }
        let signatures: HashMap<&str, Signature> = syntax
            .functions
            .iter()
            .filter(|function| function.body.is_some())
            .enumerate()
            .map(|(index, function)| (function.name, Signature::new(index, function)))
            .collect();
        let mut functions = vec![];
        for function in syntax.functions.iter().filter(|function| function.body.is_some()) {
            let mut decoder = Decoder::new(&lines, syntax.target, &names, &signatures, &mut layout, function);
            functions.push(decoder.function(function)?);
        }
        spread_shared(&mut functions);
        Ok(Module {
            lines: lines.iter().map(|line| line.trim().to_string()).collect(),
            target: syntax.target,
            functions,
            shared: layout.shared,
            globals: layout.globals,
            constants: layout.constants,
        })
    }
}

/// What a function's callees use, it uses.
fn spread_shared(functions: &mut [Function]) {
    let mut changed = true;
    while std::mem::take(&mut changed) {
        for f in 0..functions.len() {
            let callees = functions[f].callees.clone();
            let more: Vec<usize> = callees.iter().flat_map(|&callee| functions[callee].shared.clone()).collect();
            for variable in more {
                if !functions[f].shared.contains(&variable) {
                    functions[f].shared.push(variable);
                    changed = true;
                }
            }
        }
    }
    functions.iter_mut().for_each(|function| function.shared.sort_unstable());
}

#[derive(Default)]
struct Layout {
    shared: Vec<SharedVariable>,
    /// Where the last variable of either area of shared memory ends.
    ends: [u64; 2],
    globals: Vec<(u64, Vec<u8>)>,
    constants: Vec<u8>,
    /// Of the `.extern` arrays, 0 before the first.
    dynamic_align: u64,
}

/// Shared memory has three areas: for variables of the module and of functions; for those of a kernel, anew for each;
/// for `.extern` arrays, which all begin at the same place. So no overrun meets another variable, and what one kernel
/// reaches lies close together.
const AREAS: [u64; 3] = [0, 1 << 17, 1 << 18];
const COMMON: usize = 0;
const OF_KERNEL: usize = 1;
const DYNAMIC: u64 = AREAS[2];

impl Layout {
    fn place(&mut self, variable: &Variable, area: usize) -> std::result::Result<Symbol, &'static str> {
        let align = variable.align.max(1);
        match (variable.space, variable.bytes) {
            (Space::Shared, Some(bytes)) => {
                let address = badly_aligned(self.ends[area].max(AREAS[area]) + GUARD, align);
                let end = address.saturating_add(bytes as u64);
                if end + GUARD > AREAS[area + 1] {
                    return Err("more shared memory than there is");
                }
                self.ends[area] = end;
                self.shared.push(SharedVariable { address, align, bytes: Some(bytes) });
                Ok(Symbol::Shared(self.shared.len() - 1, address))
            }
            (Space::Shared, None) => {
                if self.dynamic_align != 0 && self.dynamic_align != align {
                    return Err("dynamic shared arrays of different alignments are not modelled");
                }
                self.dynamic_align = align;
                let address = badly_aligned(DYNAMIC, align);
                self.shared.push(SharedVariable { address, align, bytes: None });
                Ok(Symbol::Shared(self.shared.len() - 1, address))
            }
            (Space::Global, Some(bytes)) => {
                let number = NEXT_GLOBAL.fetch_add(1, Ordering::Relaxed);
                let mut content = variable.content.clone().unwrap_or_default();
                content.resize(bytes, 0);
                self.globals.push((number, content));
                Ok(Symbol::Constant(number * GLOBAL_STRIDE))
            }
            (Space::Const, Some(bytes)) => {
                let start = self.constants.len().next_multiple_of(align as usize);
                self.constants.resize(start, 0);
                self.constants.extend(variable.content.clone().unwrap_or_default());
                self.constants.resize(start + bytes, 0);
                Ok(Symbol::Constant(start as u64))
            }
            _ => Err("a variable in a state space that has none here"),
        }
    }
}

/// An address from `at` on with the declared alignment and no more, so that an access that wants more is seen.
fn badly_aligned(at: u64, align: u64) -> u64 {
    at.next_multiple_of(2 * align) + align
}

struct Signature {
    index: usize,
    entry: bool,
    results: Vec<Slot>,
    params: Vec<Slot>,
    /// Of results and parameters, in the frame (or for a kernel, of its parameters).
    bytes: usize,
}

impl Signature {
    fn new(index: usize, function: &parse::Function) -> Signature {
        let mut bytes = 0;
        let mut place = |variable: &Variable| {
            let offset = bytes_aligned(bytes, variable.align);
            let size = variable.bytes.unwrap_or(0);
            bytes = offset + size;
            Slot { offset, bytes: size }
        };
        let results = function.results.iter().map(&mut place).collect();
        let params = function.params.iter().map(&mut place).collect();
        Signature { index, entry: function.entry, results, params, bytes }
    }
}

fn bytes_aligned(bytes: usize, align: u64) -> usize {
    bytes.next_multiple_of(align.max(1) as usize)
}

#[derive(Clone, Copy, Debug)]
enum Symbol {
    Register {
        slot: u32,
        bits: u32,
    },
    /// Variable and address.
    Shared(usize, u64),
    /// An address in the space of the variable.
    Constant(u64),
    Local(u64),
    KernelParam(Slot),
    FrameParam(Slot),
}

struct Decoder<'a, 'm> {
    lines: &'m [&'m str],
    target: u32,
    module: &'m HashMap<String, Symbol>,
    signatures: &'m HashMap<&'a str, Signature>,
    layout: &'m mut Layout,
    /// Where its shared variables go.
    area: usize,
    /// Innermost last.
    scopes: Vec<HashMap<String, Symbol>>,
    labels: HashMap<&'a str, u32>,
    tables: HashMap<&'a str, Vec<&'a str>>,
    registers: Vec<u32>,
    frame_bytes: usize,
    local_bytes: u64,
    shared: Vec<usize>,
    callees: Vec<usize>,
}

impl<'a, 'm> Decoder<'a, 'm> {
    fn new(
        lines: &'m [&'m str],
        target: u32,
        module: &'m HashMap<String, Symbol>,
        signatures: &'m HashMap<&'a str, Signature>,
        layout: &'m mut Layout,
        function: &parse::Function<'a>,
    ) -> Self {
        let signature = &signatures[function.name];
        let mut scope = HashMap::new();
        let slots = signature.results.iter().chain(&signature.params);
        for (variable, &slot) in function.results.iter().chain(&function.params).zip(slots) {
            let symbol = if function.entry { Symbol::KernelParam(slot) } else { Symbol::FrameParam(slot) };
            scope.insert(variable.name.to_string(), symbol);
        }
        layout.ends[OF_KERNEL] = 0;
        Decoder {
            lines,
            target,
            module,
            signatures,
            layout,
            area: if function.entry { OF_KERNEL } else { COMMON },
            scopes: vec![scope],
            labels: HashMap::new(),
            tables: HashMap::new(),
            registers: vec![],
            frame_bytes: if function.entry { 0 } else { signature.bytes },
            local_bytes: 0,
            shared: vec![],
            callees: vec![],
        }
    }

    fn function(&mut self, function: &parse::Function<'a>) -> Result<Function> {
        let body = function.body.as_deref().unwrap_or(&[]);
        let mut at = 0;
        for statement in body {
            match statement {
                Statement::Label(name, line) if self.labels.insert(name, at).is_some() => {
                    return Err(self.parse_error(*line, format!("the label `{name}` twice")));
                }
                Statement::Targets(name, targets) => {
                    self.tables.insert(name, targets.clone());
                }
                Statement::Instruction(_) => at += 1,
                _ => {}
            }
        }
        let mut code = vec![];
        for statement in body {
            match statement {
                Statement::Open => self.scopes.push(HashMap::new()),
                Statement::Close => {
                    self.scopes.pop();
                }
                Statement::Registers { name, count, ty, line } => self.declare(name, *count, *ty, *line)?,
                Statement::Variable(variable, line) => self.variable(variable, *line)?,
                Statement::Label(..) | Statement::Targets(..) => {}
                Statement::Instruction(instruction) => code.push(self.step(instruction)?),
            }
        }
        // Running off the end returns.
        let last = code.last().map_or(function.line as u32, |step: &Step| step.line);
        code.push(Step { guard: None, line: last, kind: Kind::Branch, action: Action::Return });
        set_meeting_points(&mut code);
        let signature = &self.signatures[function.name];
        let params = if function.entry { signature.params.clone() } else { vec![] };
        Ok(Function {
            name: function.name.into(),
            entry: function.entry,
            code,
            registers: std::mem::take(&mut self.registers),
            params,
            param_bytes: if function.entry { signature.bytes } else { 0 },
            frame_bytes: self.frame_bytes,
            local_bytes: self.local_bytes as usize,
            shared: std::mem::take(&mut self.shared),
            callees: std::mem::take(&mut self.callees),
            most_threads: function.most_threads,
            block: function.block,
        })
    }

    fn parse_error(&self, line: usize, message: impl Into<String>) -> Error {
        let text = self.lines.get(line - 1).map_or(String::new(), |text| text.trim().to_string());
        Error::Parse { line, text, message: message.into() }
    }

    fn scope(&mut self) -> &mut HashMap<String, Symbol> {
        self.scopes.last_mut().expect("the function's own scope stays")
    }

    fn declare(&mut self, name: &str, count: Option<u32>, ty: Type, line: usize) -> Result<()> {
        let bits = ty.bits();
        if self.registers.len() + count.unwrap_or(1) as usize > 1 << 20 {
            return Err(self.parse_error(line, "more registers than any kernel has"));
        }
        let names = match count {
            None => vec![name.to_string()],
            Some(count) => (0..count).map(|n| format!("{name}{n}")).collect(),
        };
        for name in names {
            let slot = self.registers.len() as u32;
            self.registers.push(bits);
            self.scope().insert(name, Symbol::Register { slot, bits });
        }
        Ok(())
    }

    fn variable(&mut self, variable: &Variable, line: usize) -> Result<()> {
        let bytes = variable.bytes.unwrap_or(0);
        let symbol = match variable.space {
            Space::Local => {
                let offset = self.local_bytes.next_multiple_of(variable.align.max(1));
                self.local_bytes = offset + bytes as u64;
                Symbol::Local(offset)
            }
            Space::Param => {
                let offset = bytes_aligned(self.frame_bytes, variable.align);
                self.frame_bytes = offset + bytes;
                Symbol::FrameParam(Slot { offset, bytes })
            }
            _ => self.layout.place(variable, self.area).map_err(|message| self.parse_error(line, message))?,
        };
        self.scope().insert(variable.name.into(), symbol);
        Ok(())
    }

    fn find(&mut self, name: &str) -> Decoded<Symbol> {
        let found =
            self.scopes.iter().rev().find_map(|scope| scope.get(name)).or_else(|| self.module.get(name)).copied();
        if let Some(Symbol::Shared(variable, _)) = found
            && !self.shared.contains(&variable)
        {
            self.shared.push(variable);
        }
        found.map_or_else(|| wrong(format!("`{name}` is not declared")), Ok)
    }

    fn step(&mut self, instruction: &parse::Instruction<'a>) -> Result<Step> {
        let text = || self.lines.get(instruction.line - 1).map_or(String::new(), |text| text.trim().to_string());
        let line = instruction.line;
        let text = text();
        let mut op = Opcode::new(instruction.opcode);
        let decoded = self.guard(instruction.guard).and_then(|guard| {
            let (kind, action) = self.action(&mut op, &instruction.args)?;
            op.done()?;
            Ok(Step { guard, line: line as u32, kind, action })
        });
        match decoded {
            Ok(_) if op.needs > self.target => Err(Error::Target { line, text, needs: op.needs }),
            Ok(step) => Ok(step),
            Err(Refusal::Wrong(message)) => Err(Error::Parse { line, text, message }),
            Err(Refusal::Unknown(message)) => Err(Error::Unknown { line, text, message }),
        }
    }

    fn guard(&mut self, guard: Option<(&str, bool)>) -> Decoded<Option<(u32, bool)>> {
        guard.map(|(name, negated)| Ok((self.register(name, 1)?, negated))).transpose()
    }

    fn register(&mut self, name: &str, bits: u32) -> Decoded<u32> {
        match self.find(name)? {
            Symbol::Register { slot, bits: width } if width == bits => Ok(slot),
            Symbol::Register { bits: width, .. } => wrong(format!("`{name}` has {width} bits where {bits} are due")),
            _ => wrong(format!("`{name}` is no register")),
        }
    }

    /// A register that is written, or `_`.
    fn result(&mut self, arg: &Arg, bits: u32) -> Decoded<Option<u32>> {
        match arg {
            Arg::Name("_", 0) => Ok(None),
            Arg::Name(name, 0) => self.register(name, bits).map(Some),
            _ => wrong("a register is due"),
        }
    }

    fn needed_result(&mut self, arg: &Arg, bits: u32) -> Decoded<u32> {
        self.result(arg, bits)?.map_or_else(|| wrong("`_` where a result is due"), Ok)
    }

    /// A register at least as wide, and its width.
    fn loose_result(&mut self, arg: &Arg, bits: u32) -> Decoded<Option<(u32, u32)>> {
        match arg {
            Arg::Name("_", 0) => Ok(None),
            Arg::Name(name, 0) => match self.find(name)? {
                Symbol::Register { slot, bits: width } if width >= bits => Ok(Some((slot, width))),
                _ => wrong(format!("`{name}` is no register of {bits} bits or more")),
            },
            _ => wrong("a register is due"),
        }
    }

    fn operand(&mut self, arg: &Arg, ty: Type) -> Decoded<Operand> {
        self.operand_of(arg, ty, false)
    }

    /// `loose`: a register may be wider than the type.
    fn operand_of(&mut self, arg: &Arg, ty: Type, loose: bool) -> Decoded<Operand> {
        let bits = ty.bits();
        match arg {
            Arg::Integer(value) => {
                if matches!(ty, Type::Float(Float::F32 | Float::F64)) {
                    return wrong("an integer where a float is due");
                }
                Ok(Operand::Constant(*value as u64 & mask(bits)))
            }
            Arg::Float(value) => match bits {
                32 => Ok(Operand::Constant(Float::F32.encode(*value))),
                64 => Ok(Operand::Constant(value.to_bits())),
                _ => wrong(format!("a float where {bits} bits are due")),
            },
            Arg::Not(name) if ty == Type::Pred => Ok(Operand::Not(self.register(name, 1)?)),
            Arg::Name(name, offset) => {
                if let Some((special, width)) = special(name) {
                    return if width == bits {
                        Ok(Operand::Special(special))
                    } else {
                        wrong(format!("`{name}` has {width} bits"))
                    };
                }
                match self.find(name)? {
                    Symbol::Register { slot, bits: width } if *offset == 0 => {
                        if width == bits || loose && width > bits {
                            Ok(Operand::Register(slot))
                        } else {
                            wrong(format!("`{name}` has {width} bits where {bits} are due"))
                        }
                    }
                    Symbol::Register { .. } => wrong("a register with an offset"),
                    Symbol::Shared(_, address) => Ok(Operand::Constant(address.wrapping_add_signed(*offset))),
                    Symbol::Constant(address) => Ok(Operand::Constant(address.wrapping_add_signed(*offset))),
                    Symbol::Local(start) => Ok(Operand::Local(start.wrapping_add_signed(*offset))),
                    Symbol::KernelParam(slot) => {
                        Ok(Operand::Constant((slot.offset as u64).wrapping_add_signed(*offset)))
                    }
                    Symbol::FrameParam(_) => unknown("the address of a call's parameter"),
                }
            }
            _ => wrong("a register or number is due"),
        }
    }

    /// An address and what it reaches; `space` as the opcode names it.
    fn address(&mut self, arg: &Arg, space: Space) -> Decoded<(Address, Place)> {
        let Arg::Address(base, offset) = arg else { return wrong("an address is due") };
        let Some(name) = base else {
            return Ok((Address { base: Operand::Constant(0), offset: *offset }, Place::Space(space)));
        };
        let (base, place) = match self.find(name)? {
            Symbol::Register { slot, bits: 32 | 64 } => (Operand::Register(slot), Place::Space(space)),
            Symbol::Register { .. } => return wrong(format!("`{name}` is too narrow for an address")),
            Symbol::FrameParam(slot) if space == Space::Param => (Operand::Constant(slot.offset as u64), Place::Frame),
            Symbol::KernelParam(slot) => (Operand::Constant(slot.offset as u64), Place::Space(space)),
            Symbol::Shared(_, address) | Symbol::Constant(address) => (Operand::Constant(address), Place::Space(space)),
            Symbol::Local(start) => (Operand::Local(start), Place::Space(space)),
            Symbol::FrameParam(_) => return wrong(format!("`{name}` lies in parameter space")),
        };
        Ok((Address { base, offset: *offset }, place))
    }

    fn target(&self, arg: &Arg) -> Decoded<u32> {
        let Arg::Name(name, 0) = arg else { return wrong("a label is due") };
        self.labels.get(name).copied().map_or_else(|| wrong(format!("no label `{name}`")), Ok)
    }

    fn action(&mut self, op: &mut Opcode, args: &[Arg<'a>]) -> Decoded<(Kind, Action)> {
        if let Some(function) = approximate(op) {
            return self.approximate(op, function, args);
        }
        if matches!(op.name, "bfi" | "lop3")
            && let Some(action) = self.constant_bits(op, args)?
        {
            return Ok((Kind::Integer, action));
        }
        if let Some(arithmetic) = arithmetic::decode(op) {
            return self.arithmetic(arithmetic?, args);
        }
        match op.name {
            "mov" => self.mov(op, args),
            "setp" => self.setp(op, args),
            "cvta" => self.cvta(op, args),
            "isspacep" => self.isspacep(op, args),
            "ld" | "ldu" => self.load(op, args),
            "st" => self.store(op, args),
            "atom" | "red" => self.atomic(op, args),
            "cp" => self.copy_async(op, args),
            "bra" => {
                let uniform = op.take("uni");
                let [target] = args else { return wrong("one label is due") };
                Ok((Kind::Branch, Action::Branch { target: self.target(target)?, meet: flow::END, uniform }))
            }
            "brx" => self.branch_table(op, args),
            "call" => self.call(op, args),
            "ret" | "exit" | "trap" => {
                op.take("uni");
                let action = match op.name {
                    "ret" => Action::Return,
                    "exit" => Action::Exit,
                    _ => Action::Trap,
                };
                if args.is_empty() { Ok((Kind::Branch, action)) } else { wrong("no operand is due") }
            }
            "bar" | "barrier" => self.barrier(op, args),
            "shfl" => self.shuffle(op, args),
            "vote" => self.vote(op, args),
            "redux" => self.reduce(op, args),
            "activemask" => {
                op.ty()?;
                let [result] = args else { return wrong("one register is due") };
                Ok((Kind::Other, Action::ActiveMask { result: self.needed_result(result, 32)? }))
            }
            "wmma" => self.wmma(op, args),
            "mma" => self.mma(op, args),
            "ldmatrix" => self.load_tiles(op, args),
            "membar" | "fence" => {
                op.drop_memory_hints();
                op.take("gl");
                Ok((Kind::Other, Action::Nothing))
            }
            "nanosleep" | "prefetch" | "prefetchu" => {
                op.drop_memory_hints();
                op.one_of(&[("u32", ()), ("global", ()), ("local", ()), ("L1", ()), ("L2", ())]);
                op.one_of(&[("L1", ()), ("L2", ())]);
                Ok((Kind::Other, Action::Nothing))
            }
            _ => unknown(format!("`{}`", op.name)),
        }
    }

    fn arithmetic(&mut self, arithmetic: Arithmetic, args: &[Arg]) -> Decoded<(Kind, Action)> {
        let Arithmetic { kind, map, result, operands: types, loose } = arithmetic;
        let [first, rest @ ..] = args else { return wrong("operands are due") };
        if rest.len() != types.len() {
            return wrong(format!("{} operands where {} are due", rest.len(), types.len()));
        }
        let operands =
            rest.iter().zip(types).map(|(arg, ty)| self.operand_of(arg, ty, loose)).collect::<Decoded<Vec<_>>>()?;
        let (result, map) = if loose {
            let Some((slot, width)) = self.loose_result(first, result.bits())? else { return wrong("`_` as a result") };
            (slot, widen(map, result, width))
        } else {
            (self.needed_result(first, result.bits())?, map)
        };
        Ok((kind, Action::Map { map, result, operands }))
    }

    /// `bfi` and `lop3`, whose last operands are constants.
    fn constant_bits(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<Option<Action>> {
        let ty = op.ty()?;
        let (map, operands) = match (op.name, args) {
            ("bfi", [_, a, b, Arg::Integer(place), Arg::Integer(length)]) => {
                (arithmetic::insert_bits(ty.bits(), *place as u32, *length as u32), vec![a, b])
            }
            ("lop3", [_, a, b, c, Arg::Integer(table)]) if ty == Type::Bits(32) => {
                (arithmetic::lookup_bits(*table as u8), vec![a, b, c])
            }
            _ => return unknown(format!("`{}` in this form", op.name)),
        };
        let operands = operands.into_iter().map(|arg| self.operand(arg, ty)).collect::<Decoded<Vec<_>>>()?;
        Ok(Some(Action::Map { map, result: self.needed_result(&args[0], ty.bits())?, operands }))
    }

    fn approximate(&mut self, op: &mut Opcode, function: Approximate, args: &[Arg]) -> Decoded<(Kind, Action)> {
        let flush = op.take("ftz");
        let ty = op.ty()?;
        let (float, pair) = match ty {
            Type::Float(float) => (float, false),
            Type::Pair(float) => (float, true),
            _ => return wrong(format!("`{}` of integers", op.name)),
        };
        let narrow = matches!(function, Approximate::Ex2 | Approximate::Tanh);
        match float {
            Float::F64 => return unknown("an approximation in f64"),
            Float::F16 | Float::BF16 if !narrow => return unknown(format!("`{}` of this type", op.name)),
            Float::F16 => op.needs(75),
            Float::BF16 => op.needs(90),
            Float::F32 if function == Approximate::Tanh => op.needs(75),
            Float::F32 => {}
        }
        let count = if function == Approximate::Div { 2 } else { 1 };
        let [result, rest @ ..] = args else { return wrong("operands are due") };
        if rest.len() != count {
            return wrong(format!("{} operands where {count} are due", rest.len()));
        }
        let result = self.needed_result(result, ty.bits())?;
        let operands = [self.operand(&rest[0], ty)?, self.operand(&rest[count - 1], ty)?];
        Ok((Kind::Approximate, Action::Approximate { function, float, pair, flush, result, operands }))
    }

    fn mov(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        let ty = op.ty()?;
        let bits = ty.bits();
        let action = match args {
            [Arg::Vector(parts), whole] => {
                let part = part_bits(bits, parts.len())?;
                let results = parts.iter().map(|arg| self.result(arg, part)).collect::<Decoded<Vec<_>>>()?;
                Action::Unpack { results, whole: self.operand(whole, ty)?, bits: part }
            }
            [result, Arg::Vector(parts)] => {
                let part = part_bits(bits, parts.len())?;
                let parts = parts.iter().map(|arg| self.operand(arg, Type::Bits(part))).collect::<Decoded<Vec<_>>>()?;
                Action::Pack { result: self.needed_result(result, bits)?, parts, bits: part }
            }
            [result, operand] => {
                // The wide form of a special register's narrow value, and of a 64-bit address its lower half.
                let operand = match operand {
                    Arg::Name(name, 0) if special(name).is_some_and(|(_, width)| width < bits) => {
                        Operand::Special(special(name).expect("there is one").0)
                    }
                    _ => self.operand(operand, ty)?,
                };
                let map: Map = Box::new(|a, _, _| *a);
                Action::Map { map, result: self.needed_result(result, bits)?, operands: vec![operand] }
            }
            _ => return wrong("two operands are due"),
        };
        Ok((Kind::Move, action))
    }

    fn setp(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        let order = arithmetic::take_comparison(op)?;
        let logic = op.one_of(&[("and", Logic::And), ("or", Logic::Or), ("xor", Logic::Xor)]);
        let flush = op.take("ftz");
        let ty = op.ty()?;
        let compare = arithmetic::comparison(op, ty, flush, order)?;
        let [result, a, b, rest @ ..] = args else { return wrong("operands are due") };
        let results = match result {
            Arg::Both(p, q) => [self.result(&Arg::Name(p, 0), 1)?, self.result(&Arg::Name(q, 0), 1)?],
            _ => [self.result(result, 1)?, None],
        };
        let combine = match (logic, rest) {
            (None, []) => None,
            (Some(logic), [c]) => Some((logic, self.operand(c, Type::Pred)?)),
            _ => return wrong("a predicate to combine with is due with `.and` and the like, and only then"),
        };
        let operands = [self.operand(a, ty)?, self.operand(b, ty)?];
        let pair = matches!(ty, Type::Pair(_));
        Ok((Kind::Compare, Action::Compare(Box::new(Comparing { compare, pair, combine, results, operands }))))
    }

    fn cvta(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        let to = op.take("to");
        let window = op.needed_one_of(&[
            ("global", 0),
            ("shared", memory::SHARED_WINDOW),
            ("local", memory::LOCAL_WINDOW),
            ("const", memory::CONST_WINDOW),
            ("param", memory::PARAM_WINDOW),
        ])?;
        let ty = op.ty()?;
        let [result, operand] = args else { return wrong("two operands are due") };
        if ty.bits() != 64 {
            return unknown("a generic address of 32 bits");
        }
        let map: Map = if to {
            Box::new(move |a, _, _| a.map(|a| a.wrapping_sub(window)))
        } else {
            Box::new(move |a, _, _| a.map(|a| a.wrapping_add(window)))
        };
        let operands = vec![self.operand(operand, ty)?];
        Ok((Kind::Move, Action::Map { map, result: self.needed_result(result, 64)?, operands }))
    }

    fn isspacep(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        let space = op.needed_one_of(&[
            ("global", Space::Global),
            ("shared", Space::Shared),
            ("shared::cta", Space::Shared),
            ("local", Space::Local),
            ("const", Space::Const),
        ])?;
        let [result, operand] = args else { return wrong("two operands are due") };
        let map: Map = Box::new(move |a, _, _| a.map(|a| u64::from(memory::space_of(a).0 == space)));
        let operands = vec![self.operand(operand, Type::Bits(64))?];
        Ok((Kind::Compare, Action::Map { map, result: self.needed_result(result, 1)?, operands }))
    }

    fn take_space(op: &mut Opcode) -> Space {
        const SPACES: [(&str, Space); 8] = [
            ("global", Space::Global),
            ("shared", Space::Shared),
            ("shared::cta", Space::Shared),
            ("local", Space::Local),
            ("const", Space::Const),
            ("param", Space::Param),
            ("param::entry", Space::Param),
            ("param::func", Space::Param),
        ];
        op.one_of(&SPACES).unwrap_or(Space::Generic)
    }

    fn load(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        op.drop_memory_hints();
        let space = Self::take_space(op);
        let constant = op.take("nc") || op.name == "ldu";
        let lanes = op.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]);
        let ty = op.ty()?;
        let [results, address] = args else { return wrong("two operands are due") };
        let results = self.vector(results, lanes)?;
        let results = results.iter().map(|arg| self.loose_result(arg, ty.bits())).collect::<Decoded<Vec<_>>>()?;
        let bytes = ty.bytes();
        if bytes * results.len() > 16 {
            return unknown("a load of more than 16 bytes");
        }
        let (address, place) = self.address(address, space)?;
        Ok((Kind::Load, Action::Load(Load { place, address, bytes, results, signed: ty.signed(), constant })))
    }

    fn store(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        op.drop_memory_hints();
        let space = Self::take_space(op);
        let lanes = op.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]);
        let ty = op.ty()?;
        let [address, values] = args else { return wrong("two operands are due") };
        let values = self.vector(values, lanes)?;
        let values = values.iter().map(|arg| self.operand_of(arg, ty, true)).collect::<Decoded<Vec<_>>>()?;
        let bytes = ty.bytes();
        if bytes * values.len() > 16 {
            return unknown("a store of more than 16 bytes");
        }
        let (address, place) = self.address(address, space)?;
        Ok((Kind::Store, Action::Store { place, address, bytes, values }))
    }

    fn vector<'v>(&self, arg: &'v Arg<'a>, lanes: Option<usize>) -> Decoded<Vec<&'v Arg<'a>>> {
        match (arg, lanes) {
            (Arg::Vector(parts), Some(lanes)) if parts.len() == lanes => Ok(parts.iter().collect()),
            (Arg::Vector(parts), None) if parts.len() == 1 => Ok(parts.iter().collect()),
            (Arg::Vector(_), _) | (_, Some(_)) => wrong("the vector has another length than the opcode says"),
            _ => Ok(vec![arg]),
        }
    }

    fn atomic(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        op.drop_memory_hints();
        let space = Self::take_space(op);
        op.take("noftz");
        let name = op.needed_one_of(&[
            ("add", "add"),
            ("min", "min"),
            ("max", "max"),
            ("and", "and"),
            ("or", "or"),
            ("xor", "xor"),
            ("exch", "exch"),
            ("cas", "cas"),
            ("inc", "inc"),
            ("dec", "dec"),
        ])?;
        let ty = op.ty()?;
        let (result, rest) = match (op.name, args) {
            ("atom", [result, rest @ ..]) => (self.result(result, ty.bits())?, rest),
            ("red", rest) => (None, rest),
            _ => return wrong("operands are due"),
        };
        let count = if name == "cas" { 2 } else { 1 };
        let [address, values @ ..] = rest else { return wrong("an address is due") };
        if values.len() != count {
            return wrong(format!("{} operands where {count} are due", values.len()));
        }
        let operands = [self.operand(&values[0], ty)?, self.operand(&values[count - 1], ty)?];
        let function: Box<dyn Fn(u64, u64, u64) -> u64 + Send + Sync> = match name {
            "exch" => Box::new(|_, b, _| b),
            "cas" => Box::new(|old, b, c| if old == b { c } else { old }),
            "inc" => Box::new(|old, b, _| if old >= b { 0 } else { old + 1 }),
            "dec" => Box::new(|old, b, _| if old == 0 || old > b { b } else { old - 1 }),
            name => {
                // The same arithmetic as outside of atomics.
                let (typed, spelt) = match (name, ty) {
                    ("add" | "min" | "max", Type::Bits(_)) => return wrong("arithmetic on untyped bits"),
                    ("add", Type::Float(_) | Type::Pair(_)) => (ty, format!("{name}.rn.{}", spell(ty))),
                    _ => (ty, format!("{name}.{}", spell(ty))),
                };
                let mut inner = Opcode::new(&spelt);
                let Some(arithmetic) = arithmetic::decode(&mut inner) else { return unknown(format!("`.{name}`")) };
                let map = arithmetic?.map;
                debug_assert_eq!(typed.bits(), ty.bits());
                Box::new(move |old, b, _| map(&splat(old), &splat(b), &splat(0))[0])
            }
        };
        let float = matches!(ty, Type::Float(_) | Type::Pair(_)) && name == "add";
        let (address, place) = self.address(address, space)?;
        let atomic = Atomic { place, address, bytes: ty.bytes(), function, float, result, operands };
        Ok((Kind::Atomic, Action::Atomic(Box::new(atomic))))
    }

    fn copy_async(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        if !op.take("async") {
            return unknown("`cp` other than `cp.async`");
        }
        op.needs(80);
        if op.take("commit_group") {
            return Ok((Kind::CopyAsync, Action::CommitCopies));
        }
        if op.take("wait_all") {
            return Ok((Kind::CopyAsync, Action::AwaitCopies(None)));
        }
        if op.take("wait_group") {
            let [Arg::Integer(groups)] = args else { return wrong("a number is due") };
            return Ok((Kind::CopyAsync, Action::AwaitCopies(Some(*groups as usize))));
        }
        let whole_line = op.take("cg");
        op.drop_memory_hints();
        let to_shared = op.take("shared") || op.take("shared::cta");
        if !to_shared || !op.take("global") {
            return unknown("`cp.async` other than from global to shared memory");
        }
        let (to, from, bytes, filled) = match args {
            [to, from, Arg::Integer(bytes)] => (to, from, *bytes, None),
            [to, from, Arg::Integer(bytes), filled] => {
                (to, from, *bytes, Some(self.operand(filled, Type::Unsigned(32))?))
            }
            _ => return wrong("two addresses and a size are due"),
        };
        if !matches!(bytes, 4 | 8 | 16) || whole_line && bytes != 16 {
            return wrong(format!("a copy of {bytes} bytes"));
        }
        let (to, _) = self.address(to, Space::Shared)?;
        let (from, _) = self.address(from, Space::Global)?;
        Ok((Kind::CopyAsync, Action::CopyAsync { bytes: bytes as usize, to, from, filled }))
    }

    fn branch_table(&mut self, op: &mut Opcode, args: &[Arg<'a>]) -> Decoded<(Kind, Action)> {
        let uniform = op.take("uni");
        op.take("idx");
        let [index, Arg::Name(table, 0)] = args else { return wrong("an index and a list of labels are due") };
        let Some(labels) = self.tables.get(table).cloned() else { return wrong(format!("no list `{table}`")) };
        let targets = labels.iter().map(|label| self.target(&Arg::Name(label, 0))).collect::<Decoded<Vec<_>>>()?;
        let index = self.operand(index, Type::Unsigned(32))?;
        Ok((Kind::Branch, Action::BranchTable { targets: targets.into(), index, meet: flow::END, uniform }))
    }

    fn call(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        op.take("uni");
        let (results, name, arguments) = match args {
            [Arg::List(results), Arg::Name(name, 0), Arg::List(arguments)] => (&results[..], name, &arguments[..]),
            [Arg::Name(name, 0), Arg::List(arguments)] => (&[][..], name, &arguments[..]),
            [Arg::Name(name, 0)] => (&[][..], name, &[][..]),
            _ => return unknown("a call in this form"),
        };
        let Some(signature) = self.signatures.get(name).filter(|signature| !signature.entry) else {
            return unknown(format!("a call of `{name}`, which the module does not define"));
        };
        if results.len() != signature.results.len() || arguments.len() != signature.params.len() {
            return wrong(format!("`{name}` has {} parameters", signature.params.len()));
        }
        let place = |decoder: &mut Self, arg: &Arg| match arg {
            Arg::Name(name, 0) => match decoder.find(name)? {
                Symbol::FrameParam(slot) => Ok(slot),
                _ => unknown("a call with registers as arguments"),
            },
            _ => unknown("a call with numbers as arguments"),
        };
        let mut pass = |args: &[Arg], slots: &[Slot], inwards: bool| {
            args.iter()
                .zip(slots)
                .map(|(arg, slot)| {
                    let own = place(self, arg)?;
                    if own.bytes != slot.bytes {
                        return wrong(format!("an argument of {} bytes where {} are due", own.bytes, slot.bytes));
                    }
                    let (from, to) = if inwards { (own.offset, slot.offset) } else { (slot.offset, own.offset) };
                    Ok(Pass { from, to, bytes: slot.bytes })
                })
                .collect::<Decoded<Vec<_>>>()
        };
        let arguments = pass(arguments, &signature.params, true)?;
        let results = pass(results, &signature.results, false)?;
        self.callees.push(signature.index);
        Ok((Kind::Branch, Action::Call { function: signature.index, arguments, results }))
    }

    fn barrier(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        let ty = Type::Unsigned(32);
        if op.take("warp") {
            op.take("sync");
            let [members] = args else { return wrong("a mask is due") };
            return Ok((Kind::Barrier, Action::WarpBarrier { members: self.operand(members, ty)? }));
        }
        op.take("cta");
        op.take("aligned");
        if !op.take("sync") {
            return unknown("a barrier other than `.sync`");
        }
        let (id, threads) = match args {
            [id] => (self.operand(id, ty)?, None),
            [id, threads] => (self.operand(id, ty)?, Some(self.operand(threads, ty)?)),
            _ => return wrong("a barrier's number is due"),
        };
        Ok((Kind::Barrier, Action::Barrier { id, threads }))
    }

    fn shuffle(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        if !op.take("sync") {
            return unknown("`shfl` without `.sync`");
        }
        let mode = op.needed_one_of(&[
            ("up", ShuffleMode::Up),
            ("down", ShuffleMode::Down),
            ("bfly", ShuffleMode::Butterfly),
            ("idx", ShuffleMode::Index),
        ])?;
        let ty = op.ty()?;
        let [result, operand, lane, clamp, members] = args else { return wrong("five operands are due") };
        let (result, in_range) = match result {
            Arg::Both(d, p) => (self.result(&Arg::Name(d, 0), 32)?, self.result(&Arg::Name(p, 0), 1)?),
            _ => (self.result(result, 32)?, None),
        };
        let shuffle = Shuffle {
            mode,
            result,
            in_range,
            operand: self.operand(operand, ty)?,
            lane: self.operand(lane, Type::Unsigned(32))?,
            clamp: self.operand(clamp, Type::Unsigned(32))?,
            members: self.operand(members, Type::Unsigned(32))?,
        };
        Ok((Kind::Shuffle, Action::Shuffle(Box::new(shuffle))))
    }

    fn vote(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        if !op.take("sync") {
            return unknown("`vote` without `.sync`");
        }
        let vote = op.needed_one_of(&[
            ("all", Vote::All),
            ("any", Vote::Any),
            ("uni", Vote::Uniform),
            ("ballot", Vote::Ballot),
        ])?;
        let ty = op.ty()?;
        let [result, operand, members] = args else { return wrong("three operands are due") };
        let result = self.needed_result(result, ty.bits())?;
        let operand = self.operand(operand, Type::Pred)?;
        let members = self.operand(members, Type::Unsigned(32))?;
        Ok((Kind::Shuffle, Action::Vote { vote, result, operand, members }))
    }

    fn reduce(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        op.needs(80);
        if !op.take("sync") {
            return unknown("`redux` without `.sync`");
        }
        let name = op.needed_one_of(&[
            ("add", "add"),
            ("min", "min"),
            ("max", "max"),
            ("and", "and"),
            ("or", "or"),
            ("xor", "xor"),
        ])?;
        let ty = op.ty()?;
        let spelt = format!("{name}.{}", spell(ty));
        let Some(arithmetic) = arithmetic::decode(&mut Opcode::new(&spelt)) else {
            return unknown(format!("`.{name}`"));
        };
        let map = arithmetic?.map;
        let function: Combine = Box::new(move |a, b| map(&splat(a), &splat(b), &splat(0))[0]);
        let [result, operand, members] = args else { return wrong("three operands are due") };
        let result = self.needed_result(result, 32)?;
        let operand = self.operand(operand, ty)?;
        let members = self.operand(members, Type::Unsigned(32))?;
        Ok((Kind::Shuffle, Action::Reduce { function, result, operand, members }))
    }

    fn registers(&mut self, arg: &Arg, count: usize) -> Decoded<Vec<u32>> {
        let Arg::Vector(parts) = arg else { return wrong("a fragment in braces is due") };
        if parts.len() != count {
            return wrong(format!("a fragment of {} registers where {count} are due", parts.len()));
        }
        parts.iter().map(|part| self.needed_result(part, 32)).collect()
    }

    fn operands(&mut self, arg: &Arg, count: usize) -> Decoded<Vec<Operand>> {
        let Arg::Vector(parts) = arg else { return wrong("a fragment in braces is due") };
        if parts.len() != count {
            return wrong(format!("a fragment of {} registers where {count} are due", parts.len()));
        }
        parts.iter().map(|part| self.operand(part, Type::Bits(32))).collect()
    }

    fn wmma(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        #[derive(Clone, Copy, PartialEq)]
        enum Verb {
            Load,
            Store,
            Multiply,
        }
        let verb = op.needed_one_of(&[("load", Verb::Load), ("store", Verb::Store), ("mma", Verb::Multiply)])?;
        if !op.take("sync") || !op.take("aligned") {
            return wrong("`wmma` is `.sync.aligned`");
        }
        op.needs(70);
        let role = op.one_of(&[("a", Role::A), ("b", Role::B), ("c", Role::Accumulator), ("d", Role::Accumulator)]);
        const LAYOUTS: [(&str, bool); 2] = [("row", false), ("col", true)];
        let column_major = op.needed_one_of(&LAYOUTS)?;
        let other_column_major = if verb == Verb::Multiply { op.needed_one_of(&LAYOUTS)? } else { false };
        let shape = op.needed_one_of(&[
            ("m16n16k16", Shape { m: 16, n: 16, k: 16 }),
            ("m32n8k16", Shape { m: 32, n: 8, k: 16 }),
            ("m8n32k16", Shape { m: 8, n: 32, k: 16 }),
        ])?;
        let space = Self::take_space(op);
        let fragment = |op: &mut Opcode, role: Role, ty: Type, column_major: bool| match (role, ty) {
            (Role::A | Role::B, Type::Float(float @ (Float::F16 | Float::BF16)))
            | (Role::Accumulator, Type::Float(float @ (Float::F16 | Float::F32))) => {
                if float == Float::BF16 {
                    op.needs(80);
                }
                let column_major = column_major && role != Role::Accumulator;
                Ok(Fragment { role, shape, float, column_major, opaque: true })
            }
            _ => unknown("`wmma` of this type"),
        };
        if verb == Verb::Multiply {
            let first = op.ty()?;
            let second = op.ty()?;
            // Of f16 factors only the accumulators are named.
            let (d, ab, c) = match op.ty() {
                Err(_) => (first, Type::Float(Float::F16), second),
                Ok(b) if b == second => (first, b, op.ty()?),
                Ok(_) => return unknown("`wmma` of factors of two types"),
            };
            let d = fragment(op, Role::Accumulator, d, false)?;
            let a = fragment(op, Role::A, ab, column_major)?;
            let b = fragment(op, Role::B, ab, other_column_major)?;
            let c = fragment(op, Role::Accumulator, c, false)?;
            return self.multiply(shape, [d, a, b, c], args);
        }
        let Some(role) = role else { return wrong("which matrix is moved?") };
        let ty = op.ty()?;
        let fragment = fragment(op, role, ty, column_major)?;
        let (place, registers, stride) = match (verb, args) {
            (Verb::Load, [registers, address, stride @ ..]) => (address, registers, stride),
            (_, [address, registers, stride @ ..]) => (address, registers, stride),
            _ => return wrong("a fragment and an address are due"),
        };
        let stride = match stride {
            [] => None,
            [stride] => Some(self.operand(stride, Type::Unsigned(32))?),
            _ => return wrong("too many operands"),
        };
        let (address, _) = self.address(place, space)?;
        let registers = if verb == Verb::Load {
            self.registers(registers, fragment.registers())?.into_iter().map(Operand::Register).collect()
        } else {
            self.operands(registers, fragment.registers())?
        };
        let access = Box::new(MatrixAccess { fragment, column_major, space, address, stride, registers });
        let action = if verb == Verb::Load { Action::LoadMatrix(access) } else { Action::StoreMatrix(access) };
        Ok((Kind::MatrixMove, action))
    }

    fn mma(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        if !op.take("sync") || !op.take("aligned") {
            return wrong("`mma` is `.sync.aligned`");
        }
        let shape =
            op.needed_one_of(&[("m16n8k16", Shape { m: 16, n: 8, k: 16 }), ("m16n8k8", Shape { m: 16, n: 8, k: 8 })])?;
        if !op.take("row") || !op.take("col") {
            return wrong("`mma` takes a by rows and b by columns");
        }
        let types = [op.ty()?, op.ty()?, op.ty()?, op.ty()?];
        let [Type::Float(d), Type::Float(a), Type::Float(b), Type::Float(c)] = types else {
            return unknown("`mma` of integers");
        };
        let factors = a == b && matches!(a, Float::F16 | Float::BF16);
        let sums = [c, d].iter().all(|sum| *sum == Float::F32 || *sum == Float::F16 && a == Float::F16);
        if !factors || !sums {
            return unknown("`mma` of these types");
        }
        op.needs(if shape.k == 8 && a == Float::F16 { 75 } else { 80 });
        let fragment = |role, float| Fragment { role, shape, float, column_major: role == Role::B, opaque: false };
        let fragments = [
            fragment(Role::Accumulator, d),
            fragment(Role::A, a),
            fragment(Role::B, b),
            fragment(Role::Accumulator, c),
        ];
        self.multiply(shape, fragments, args)
    }

    fn multiply(&mut self, shape: Shape, fragments: [Fragment; 4], args: &[Arg]) -> Decoded<(Kind, Action)> {
        let [d, a, b, c] = args else { return wrong("four fragments are due") };
        let [fd, fa, fb, fc] = fragments;
        let multiply = Multiply {
            shape,
            a: (fa, self.operands(a, fa.registers())?),
            b: (fb, self.operands(b, fb.registers())?),
            c: (fc, self.operands(c, fc.registers())?),
            d: (fd, self.registers(d, fd.registers())?),
        };
        Ok((Kind::Matrix, Action::Multiply(Box::new(multiply))))
    }

    fn load_tiles(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        op.needs(75);
        if !op.take("sync") || !op.take("aligned") || !op.take("m8n8") {
            return unknown("`ldmatrix` in this form");
        }
        let count = op.needed_one_of(&[("x1", 1), ("x2", 2), ("x4", 4)])?;
        let transposed = op.take("trans");
        if Self::take_space(op) != Space::Shared || op.ty()? != Type::Bits(16) {
            return unknown("`ldmatrix` other than of 16 bits in shared memory");
        }
        let [results, address] = args else { return wrong("two operands are due") };
        let results = self.registers(results, count)?;
        let (address, _) = self.address(address, Space::Shared)?;
        Ok((Kind::MatrixMove, Action::LoadTiles { results, address, transposed }))
    }
}

/// The result in a register of more bits: extended as its type says.
fn widen(map: Map, ty: Type, width: u32) -> Map {
    let bits = ty.bits();
    if width == bits || !ty.signed() {
        return map;
    }
    Box::new(move |a, b, c| map(a, b, c).map(|x| arithmetic::sign_extend(x, bits, width)))
}

fn part_bits(bits: u32, parts: usize) -> Decoded<u32> {
    match parts {
        2 | 4 if bits / parts as u32 >= 8 => Ok(bits / parts as u32),
        _ => wrong("a vector of this length"),
    }
}

fn spell(ty: Type) -> String {
    match ty {
        Type::Pred => "pred".into(),
        Type::Bits(n) => format!("b{n}"),
        Type::Unsigned(n) => format!("u{n}"),
        Type::Signed(n) => format!("s{n}"),
        Type::Float(Float::F16) => "f16".into(),
        Type::Float(Float::BF16) => "bf16".into(),
        Type::Float(Float::F32) => "f32".into(),
        Type::Float(Float::F64) => "f64".into(),
        Type::Pair(Float::F16) => "f16x2".into(),
        Type::Pair(_) => "bf16x2".into(),
    }
}

fn approximate(op: &mut Opcode) -> Option<Approximate> {
    let function = match op.name {
        "ex2" => Approximate::Ex2,
        "lg2" => Approximate::Lg2,
        "rcp" => Approximate::Rcp,
        "sqrt" => Approximate::Sqrt,
        "rsqrt" => Approximate::Rsqrt,
        "sin" => Approximate::Sin,
        "cos" => Approximate::Cos,
        "tanh" => Approximate::Tanh,
        "div" => Approximate::Div,
        _ => return None,
    };
    let approximate = op.take("approx") || op.name == "div" && op.take("full");
    approximate.then_some(function)
}

/// A special register and its width.
fn special(name: &str) -> Option<(Special, u32)> {
    let axis = |rest: &str| match rest {
        "x" => Some(0),
        "y" => Some(1),
        "z" => Some(2),
        _ => None,
    };
    let special = match name.strip_prefix('%')?.split_once('.') {
        Some(("tid", rest)) => Special::Thread(axis(rest)?),
        Some(("ntid", rest)) => Special::BlockSize(axis(rest)?),
        Some(("ctaid", rest)) => Special::Block(axis(rest)?),
        Some(("nctaid", rest)) => Special::GridSize(axis(rest)?),
        Some(_) => return None,
        None => match &name[1..] {
            "laneid" => Special::Lane,
            "warpid" => Special::Warp,
            "nwarpid" => Special::Warps,
            "lanemask_lt" => Special::LanesBelow,
            "lanemask_le" => Special::LanesUpTo,
            "lanemask_eq" => Special::LaneBit,
            "lanemask_ge" => Special::LanesFrom,
            "lanemask_gt" => Special::LanesAbove,
            "clock" => Special::Clock,
            "dynamic_smem_size" => Special::SharedSize,
            "clock64" | "globaltimer" => return Some((Special::Clock, 64)),
            _ => return None,
        },
    };
    Some((special, 32))
}

fn set_meeting_points(code: &mut [Step]) {
    let next: Vec<Next> = code
        .iter()
        .map(|step| {
            let or_on = step.guard.is_some();
            match &step.action {
                Action::Branch { target, .. } => Next::To { targets: vec![*target], or_on },
                Action::BranchTable { targets, .. } => Next::To { targets: targets.to_vec(), or_on },
                Action::Return | Action::Exit | Action::Trap => Next::Out { or_on },
                _ => Next::On,
            }
        })
        .collect();
    for (step, meeting) in code.iter_mut().zip(flow::meeting_points(&next)) {
        if let Action::Branch { meet, .. } | Action::BranchTable { meet, .. } = &mut step.action {
            *meet = meeting;
        }
    }
}
