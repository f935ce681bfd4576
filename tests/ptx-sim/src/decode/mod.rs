//! The decoder: syntax tree to program. It lays out variables, resolves names and turns opcodes into actions.

mod control;
mod layout;
mod moves;
mod tensor;

use std::collections::HashMap;

use self::layout::{COMMON, Layout, OF_KERNEL, Signature, Symbol, bytes_aligned};
use crate::approx::Function as Approximate;
use crate::arithmetic::{self, Arithmetic, Map, mask};
use crate::error::{Error, Result};
use crate::flow::{self, Flow};
use crate::opcode::{Decoded, Opcode, Refusal, unknown, wrong};
use crate::parse::{self, Arg, Statement, Variable};
use crate::program::*;
use crate::report::Kind;
use crate::types::{Float, Space, Type};

/// Limits in bytes: local memory of a thread, and parameters of a kernel or function.
const MAX_LOCAL_BYTES: u64 = 512 << 10;
const MAX_PARAM_BYTES: usize = 32764;

impl Module {
    pub fn parse(text: &str) -> Result<Module> {
        let lines: Vec<&str> = text.lines().collect();
        let syntax = parse::module(text, &lines)?;
        let mut layout = Layout::default();
        let mut names = HashMap::new();
        for variable in &syntax.variables {
            let refuse = |message| parse_error(&lines, variable.line, message);
            let symbol = layout.place(variable, COMMON).map_err(refuse)?;
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
        inherit_shared(&mut functions);
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

fn text_of(lines: &[&str], line: usize) -> String {
    lines.get(line - 1).map_or(String::new(), |text| text.trim().to_string())
}

fn parse_error(lines: &[&str], line: usize, message: impl Into<String>) -> Error {
    Error::Parse { line, text: text_of(lines, line), message: message.into() }
}

/// Adds to each function the shared variables that its callees use.
fn inherit_shared(functions: &mut [Function]) {
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

struct Decoder<'a, 'm> {
    lines: &'m [&'m str],
    target: u32,
    module: &'m HashMap<String, Symbol>,
    signatures: &'m HashMap<&'a str, Signature>,
    layout: &'m mut Layout,
    /// The area of its shared variables.
    area: usize,
    /// Innermost scope last.
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
        layout.begin_kernel();
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
        if self.signatures[function.name].bytes > MAX_PARAM_BYTES {
            return Err(self.parse_error(function.line, "more parameters than there may be"));
        }
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
                Statement::Variable(variable) => self.variable(variable)?,
                Statement::Label(..) | Statement::Targets(..) => {}
                Statement::Instruction(instruction) => code.push(self.step(instruction)?),
            }
        }
        // Running off the end of a function returns from it.
        let last = code.last().map_or(function.line as u32, |step: &Instruction| step.line);
        code.push(Instruction { guard: None, line: last, kind: Kind::Branch, action: Action::Return });
        set_reconvergence_points(&mut code);
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
            max_threads: function.max_threads,
            block: function.block,
        })
    }

    fn parse_error(&self, line: usize, message: impl Into<String>) -> Error {
        parse_error(self.lines, line, message)
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

    fn variable(&mut self, variable: &Variable) -> Result<()> {
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
            _ => self.layout.place(variable, self.area).map_err(|message| self.parse_error(variable.line, message))?,
        };
        if self.local_bytes > MAX_LOCAL_BYTES || self.frame_bytes as u64 > MAX_LOCAL_BYTES {
            return Err(self.parse_error(variable.line, "more local memory than a thread has"));
        }
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

    fn step(&mut self, instruction: &parse::Instruction<'a>) -> Result<Instruction> {
        let line = instruction.line;
        let text = text_of(self.lines, line);
        let mut op = Opcode::new(instruction.opcode);
        let decoded = self.guard(instruction.guard).and_then(|guard| {
            let (kind, action) = self.action(&mut op, &instruction.args)?;
            op.done()?;
            Ok(Instruction { guard, line: line as u32, kind, action })
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
            Symbol::Register { bits: width, .. } => {
                wrong(format!("`{name}` has {width} bits where {bits} are expected"))
            }
            _ => wrong(format!("`{name}` is no register")),
        }
    }

    /// A register to write to, or `_`.
    fn result(&mut self, arg: &Arg, bits: u32) -> Decoded<Option<u32>> {
        match arg {
            Arg::Name("_", 0) => Ok(None),
            Arg::Name(name, 0) => self.register(name, bits).map(Some),
            _ => wrong("expected a register"),
        }
    }

    fn needed_result(&mut self, arg: &Arg, bits: u32) -> Decoded<u32> {
        self.result(arg, bits)?.map_or_else(|| wrong("expected a result register, found `_`"), Ok)
    }

    /// A register to write to that may be wider than the type, and its width.
    fn loose_result(&mut self, arg: &Arg, bits: u32) -> Decoded<Option<(u32, u32)>> {
        match arg {
            Arg::Name("_", 0) => Ok(None),
            Arg::Name(name, 0) => match self.find(name)? {
                Symbol::Register { slot, bits: width } if width >= bits => Ok(Some((slot, width))),
                _ => wrong(format!("`{name}` is no register of {bits} bits or more")),
            },
            _ => wrong("expected a register"),
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
                    return wrong("expected a float, found an integer");
                }
                Ok(Operand::Constant(*value as u64 & mask(bits)))
            }
            Arg::Float(value) => match bits {
                32 => Ok(Operand::Constant(Float::F32.encode(*value))),
                64 => Ok(Operand::Constant(value.to_bits())),
                _ => wrong(format!("a float where {bits} bits are expected")),
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
                            wrong(format!("`{name}` has {width} bits where {bits} are expected"))
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
            _ => wrong("expected a register or number"),
        }
    }

    /// An address and the memory that it is in; `space` is the one that the opcode names.
    fn address(&mut self, arg: &Arg, space: Space) -> Decoded<(Address, AddressSpace)> {
        let Arg::Address(base, offset) = arg else { return wrong("expected an address") };
        let Some(name) = base else {
            return Ok((Address { base: Operand::Constant(0), offset: *offset }, AddressSpace::Space(space)));
        };
        let (base, place) = match self.find(name)? {
            Symbol::Register { slot, bits: 32 | 64 } => (Operand::Register(slot), AddressSpace::Space(space)),
            Symbol::Register { .. } => return wrong(format!("`{name}` is too narrow for an address")),
            Symbol::FrameParam(slot) if space == Space::Param => {
                (Operand::Constant(slot.offset as u64), AddressSpace::Frame)
            }
            Symbol::KernelParam(slot) => (Operand::Constant(slot.offset as u64), AddressSpace::Space(space)),
            Symbol::Shared(_, address) | Symbol::Constant(address) => {
                (Operand::Constant(address), AddressSpace::Space(space))
            }
            Symbol::Local(start) => (Operand::Local(start), AddressSpace::Space(space)),
            Symbol::FrameParam(_) => return wrong(format!("`{name}` is in parameter space")),
        };
        Ok((Address { base, offset: *offset }, place))
    }

    fn target(&self, arg: &Arg) -> Decoded<u32> {
        let Arg::Name(name, 0) = arg else { return wrong("expected a label") };
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
                let [target] = args else { return wrong("expected one label") };
                Ok((Kind::Branch, Action::Branch { target: self.target(target)?, reconvergence: flow::END, uniform }))
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
                if args.is_empty() { Ok((Kind::Branch, action)) } else { wrong("expected no operand") }
            }
            "bar" | "barrier" => self.barrier(op, args),
            "shfl" => self.shuffle(op, args),
            "vote" => self.vote(op, args),
            "redux" => self.reduce(op, args),
            "activemask" => {
                op.ty()?;
                let [result] = args else { return wrong("expected one register") };
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
        let [first, rest @ ..] = args else { return wrong("expected operands") };
        if rest.len() != types.len() {
            return wrong(format!("{} operands where {} are expected", rest.len(), types.len()));
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
        let [result, rest @ ..] = args else { return wrong("expected operands") };
        if rest.len() != count {
            return wrong(format!("{} operands where {count} are expected", rest.len()));
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
                // A 32-bit special register is extended to 64 bits; a 64-bit address is truncated to its lower half.
                let operand = match operand {
                    Arg::Name(name, 0) if special(name).is_some_and(|(_, width)| width < bits) => {
                        Operand::Special(special(name).expect("there is one").0)
                    }
                    _ => self.operand(operand, ty)?,
                };
                let map: Map = Box::new(|a, _, _| *a);
                Action::Map { map, result: self.needed_result(result, bits)?, operands: vec![operand] }
            }
            _ => return wrong("expected two operands"),
        };
        Ok((Kind::Move, action))
    }

    fn setp(&mut self, op: &mut Opcode, args: &[Arg]) -> Decoded<(Kind, Action)> {
        let order = arithmetic::take_comparison(op)?;
        let logic = op.one_of(&[("and", Logic::And), ("or", Logic::Or), ("xor", Logic::Xor)]);
        let flush = op.take("ftz");
        let ty = op.ty()?;
        let compare = arithmetic::comparison(op, ty, flush, order)?;
        let [result, a, b, rest @ ..] = args else { return wrong("expected operands") };
        let results = match result {
            Arg::Both(p, q) => [self.result(&Arg::Name(p, 0), 1)?, self.result(&Arg::Name(q, 0), 1)?],
            _ => [self.result(result, 1)?, None],
        };
        let combine = match (logic, rest) {
            (None, []) => None,
            (Some(logic), [c]) => Some((logic, self.operand(c, Type::Pred)?)),
            _ => return wrong("`.and`, `.or` and `.xor` need a predicate to combine with, and other forms take none"),
        };
        let operands = [self.operand(a, ty)?, self.operand(b, ty)?];
        let pair = matches!(ty, Type::Pair(_));
        Ok((Kind::Compare, Action::Compare(Box::new(Comparing { compare, pair, combine, results, operands }))))
    }
}

/// Extends the result to a wider register, as its type demands.
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

/// A special register and its width in bits.
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

fn set_reconvergence_points(code: &mut [Instruction]) {
    let next: Vec<Flow> = code
        .iter()
        .map(|step| {
            let or_fallthrough = step.guard.is_some();
            match &step.action {
                Action::Branch { target, .. } => Flow::Branch { targets: vec![*target], or_fallthrough },
                Action::BranchTable { targets, .. } => Flow::Branch { targets: targets.to_vec(), or_fallthrough },
                Action::Return | Action::Exit | Action::Trap => Flow::Exit { or_fallthrough },
                _ => Flow::Fallthrough,
            }
        })
        .collect();
    for (step, meeting) in code.iter_mut().zip(flow::reconvergence_points(&next)) {
        if let Action::Branch { reconvergence, .. } | Action::BranchTable { reconvergence, .. } = &mut step.action {
            *reconvergence = meeting;
        }
    }
}
