//! The parser: tokens to a syntax tree, in which names and opcodes are still text.

use crate::error::{Error, Result};
use crate::lex::{self, Kind, Token};
use crate::types::{Space, Type};

pub struct Module<'a> {
    /// The number in `.target sm_70`.
    pub target: u32,
    pub variables: Vec<Variable<'a>>,
    pub functions: Vec<Function<'a>>,
}

/// A `.shared`, `.local`, `.global`, `.const` or `.param` variable.
#[derive(Clone, Debug)]
pub struct Variable<'a> {
    pub name: &'a str,
    pub line: usize,
    pub space: Space,
    pub align: u64,
    /// `None` for an `.extern .shared` array, whose size the launch determines.
    pub bytes: Option<usize>,
    pub content: Option<Vec<u8>>,
}

pub struct Function<'a> {
    pub name: &'a str,
    pub entry: bool,
    pub line: usize,
    pub results: Vec<Variable<'a>>,
    pub params: Vec<Variable<'a>>,
    /// `.maxntid`: the largest number of threads of a block.
    pub max_threads: Option<u32>,
    /// `.reqntid`: the required size of a block.
    pub block: Option<[u32; 3]>,
    /// `None` for a declaration without a body.
    pub body: Option<Vec<Statement<'a>>>,
}

pub enum Statement<'a> {
    Open,
    Close,
    /// With `count`, `%r<9>` stands for `%r0` to `%r8`.
    Registers {
        name: &'a str,
        count: Option<u32>,
        ty: Type,
        line: usize,
    },
    Variable(Variable<'a>),
    Label(&'a str, usize),
    /// `L: .branchtargets A, B;`
    Targets(&'a str, Vec<&'a str>),
    Instruction(Instruction<'a>),
}

pub struct Instruction<'a> {
    pub line: usize,
    /// `@%p1`, or with `true` `@!%p1`.
    pub guard: Option<(&'a str, bool)>,
    pub opcode: &'a str,
    pub args: Vec<Arg<'a>>,
}

#[derive(Clone, Debug)]
pub enum Arg<'a> {
    /// A register, special register, variable, function or label, with an offset for `symbol+4`.
    Name(&'a str, i64),
    Integer(i128),
    Float(f64),
    /// `[base+offset]`; without a base it is an absolute address.
    Address(Option<&'a str>, i64),
    Vector(Vec<Arg<'a>>),
    /// `!%p1`
    Not(&'a str),
    /// `%p1|%p2`
    Both(&'a str, &'a str),
    /// A list of arguments or results of a call.
    List(Vec<Arg<'a>>),
}

/// Upper limits for the size and the alignment of a variable, in bytes.
const MAX_VARIABLE_BYTES: usize = 1 << 30;
const MAX_ALIGNMENT: u64 = 1 << 12;

/// Linkage directives, which have no effect here.
const LINKAGE: [&str; 4] = [".visible", ".weak", ".common", ".extern"];

pub fn module<'a>(text: &'a str, lines: &[&str]) -> Result<Module<'a>> {
    let at = |line: usize| lines.get(line - 1).map_or(String::new(), |text| text.trim().to_string());
    let tokens =
        lex::tokens(text).map_err(|(line, message)| Error::Parse { line, text: at(line), message: message.clone() })?;
    let mut parser = Parser { tokens, next: 0 };
    parser.module().map_err(|message| {
        let line = parser.line();
        Error::Parse { line, text: at(line), message }
    })
}

struct Parser<'a> {
    tokens: Vec<Token<'a>>,
    next: usize,
}

type Parsed<T> = std::result::Result<T, String>;

impl<'a> Parser<'a> {
    fn module(&mut self) -> Parsed<Module<'a>> {
        let mut module = Module { target: 0, variables: vec![], functions: vec![] };
        while let Some(kind) = self.peek() {
            let Kind::Word(word) = kind else {
                return Err(format!("{} where a directive is expected", describe(kind)));
            };
            match word {
                ".version" => {
                    self.next += 2;
                }
                ".target" => {
                    self.next += 1;
                    let name = self.word("a target")?;
                    let digits = name.strip_prefix("sm_").map(|rest| rest.trim_end_matches(['a', 'f']));
                    module.target = digits
                        .and_then(|d| d.parse().ok())
                        .ok_or(format!("`{name}` is no target of the form sm_70"))?;
                    while self.accept(',') {
                        self.word("a target option")?;
                    }
                }
                ".address_size" => {
                    self.next += 1;
                    if self.integer()? != 64 {
                        return Err("only 64-bit addresses are modelled".into());
                    }
                }
                ".file" | ".loc" => self.skip_line(),
                ".section" => self.skip_section()?,
                _ => self.declaration(&mut module)?,
            }
        }
        if module.target == 0 {
            return Err("a module without `.target`".into());
        }
        Ok(module)
    }

    fn declaration(&mut self, module: &mut Module<'a>) -> Parsed<()> {
        let mut external = false;
        while let Some(Kind::Word(word)) = self.peek() {
            if !LINKAGE.contains(&word) {
                break;
            }
            external |= word == ".extern";
            self.next += 1;
        }
        match self.peek() {
            Some(Kind::Word(".entry")) => module.functions.push(self.function(true)?),
            Some(Kind::Word(".func")) => module.functions.push(self.function(false)?),
            Some(Kind::Word(_)) => {
                let mut variables = self.variables()?;
                if external {
                    for variable in &mut variables {
                        if variable.space != Space::Shared || variable.bytes.is_some_and(|n| n > 0) {
                            return Err(format!(
                                "`{}` is external, but a module is linked with nothing",
                                variable.name
                            ));
                        }
                        variable.bytes = None;
                    }
                }
                module.variables.append(&mut variables);
            }
            _ => return Err("expected a declaration".into()),
        }
        Ok(())
    }

    fn function(&mut self, entry: bool) -> Parsed<Function<'a>> {
        self.next += 1;
        let line = self.line();
        let results = if !entry && self.peek() == Some(Kind::Symbol('(')) { self.parameters()? } else { vec![] };
        let name = self.word("a function's name")?;
        let params = if self.peek() == Some(Kind::Symbol('(')) { self.parameters()? } else { vec![] };
        let mut function = Function { name, entry, line, results, params, max_threads: None, block: None, body: None };
        loop {
            match self.peek() {
                Some(Kind::Word(".maxntid")) => {
                    let [x, y, z] = self.extents()?;
                    function.max_threads = Some(x.saturating_mul(y).saturating_mul(z));
                }
                Some(Kind::Word(".reqntid")) => function.block = Some(self.extents()?),
                Some(Kind::Word(".minnctapersm" | ".maxnreg" | ".maxnctapersm")) => {
                    self.extents()?;
                }
                Some(Kind::Word(".noreturn")) => self.next += 1,
                Some(Kind::Word(".pragma")) => self.skip_statement()?,
                Some(Kind::Symbol(';')) => {
                    self.next += 1;
                    return Ok(function);
                }
                Some(Kind::Symbol('{')) => {
                    self.next += 1;
                    function.body = Some(self.body()?);
                    return Ok(function);
                }
                Some(kind) => return Err(format!("{} before a function's body", describe(kind))),
                None => return Err("the text ends before a function's body".into()),
            }
        }
    }

    fn extents(&mut self) -> Parsed<[u32; 3]> {
        self.next += 1;
        let mut extents = [1; 3];
        for (n, extent) in extents.iter_mut().enumerate() {
            if n > 0 && !self.accept(',') {
                break;
            }
            *extent = u32::try_from(self.integer()?).map_err(|_| "an extent out of range")?;
        }
        Ok(extents)
    }

    fn parameters(&mut self) -> Parsed<Vec<Variable<'a>>> {
        self.expect('(')?;
        let mut params = vec![];
        while !self.accept(')') {
            if !params.is_empty() {
                self.expect(',')?;
            }
            params.append(&mut self.one_variable()?);
        }
        Ok(params)
    }

    fn body(&mut self) -> Parsed<Vec<Statement<'a>>> {
        let mut out = vec![];
        let mut depth = 0;
        loop {
            let line = self.line();
            match self.peek().ok_or("the text ends within a function")? {
                Kind::Symbol('{') => {
                    self.next += 1;
                    depth += 1;
                    out.push(Statement::Open);
                }
                Kind::Symbol('}') => {
                    self.next += 1;
                    if depth == 0 {
                        return Ok(out);
                    }
                    depth -= 1;
                    out.push(Statement::Close);
                }
                Kind::Symbol(';') => self.next += 1,
                Kind::Symbol('@') => {
                    self.next += 1;
                    let negated = self.accept('!');
                    let guard = self.word("a predicate")?;
                    let opcode = self.word("an instruction")?;
                    let args = self.args()?;
                    out.push(Statement::Instruction(Instruction { line, guard: Some((guard, negated)), opcode, args }));
                }
                Kind::Word(".reg") => self.registers(&mut out)?,
                Kind::Word(".loc" | ".file") => self.skip_line(),
                Kind::Word(".pragma") => self.skip_statement()?,
                Kind::Word(word) if word.starts_with('.') => {
                    out.extend(self.variables()?.into_iter().map(Statement::Variable));
                }
                Kind::Word(word) => {
                    self.next += 1;
                    if self.accept(':') {
                        out.push(self.label(word, line)?);
                    } else {
                        let args = self.args()?;
                        out.push(Statement::Instruction(Instruction { line, guard: None, opcode: word, args }));
                    }
                }
                kind => return Err(format!("{} where a statement is expected", describe(kind))),
            }
        }
    }

    fn label(&mut self, name: &'a str, line: usize) -> Parsed<Statement<'a>> {
        if self.peek() != Some(Kind::Word(".branchtargets")) {
            return Ok(Statement::Label(name, line));
        }
        self.next += 1;
        let mut targets = vec![self.word("a label")?];
        while self.accept(',') {
            targets.push(self.word("a label")?);
        }
        self.expect(';')?;
        Ok(Statement::Targets(name, targets))
    }

    fn registers(&mut self, out: &mut Vec<Statement<'a>>) -> Parsed<()> {
        self.next += 1;
        let ty = self.ty()?;
        loop {
            let line = self.line();
            let name = self.word("a register")?;
            let count = if self.accept('<') {
                let count = u32::try_from(self.integer()?).map_err(|_| "a number of registers out of range")?;
                self.expect('>')?;
                Some(count)
            } else {
                None
            };
            out.push(Statement::Registers { name, count, ty, line });
            if self.accept(';') {
                return Ok(());
            }
            self.expect(',')?;
        }
    }

    /// A declaration of one or several variables, up to and including the `;`.
    fn variables(&mut self) -> Parsed<Vec<Variable<'a>>> {
        let variables = self.one_variable()?;
        self.expect(';')?;
        Ok(variables)
    }

    /// `.space .align 4 .b8 name[16] = {…}`. Parameters have the same form, with `.ptr` next to the type.
    fn one_variable(&mut self) -> Parsed<Vec<Variable<'a>>> {
        let word = self.word("a state space")?;
        let space = word.strip_prefix('.').and_then(Space::parse).ok_or(format!("`{word}` is no state space"))?;
        let (mut align, mut vector) = (None, 1);
        let ty = loop {
            let word = self.word("a type")?;
            match word {
                ".align" => align = Some(self.alignment()?),
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                _ => break word.strip_prefix('.').and_then(Type::parse).ok_or(format!("`{word}` is no type"))?,
            }
        };
        if self.peek() == Some(Kind::Word(".ptr")) {
            // The state space and alignment that a pointer's target has do not concern the parameter itself.
            self.next += 1;
            while let Some(Kind::Word(word)) =
                self.peek().filter(|kind| matches!(kind, Kind::Word(w) if w.starts_with('.')))
            {
                self.next += 1;
                if word == ".align" {
                    self.alignment()?;
                }
            }
        }
        let element = ty.bytes() * vector;
        let align = align.unwrap_or(element as u64);
        let mut out = vec![];
        loop {
            let line = self.line();
            let name = self.word("a variable's name")?;
            let mut count = Some(1usize);
            while self.accept('[') {
                if self.accept(']') {
                    count = None;
                } else {
                    let extent = usize::try_from(self.integer()?).map_err(|_| "an extent out of range")?;
                    count = count.and_then(|n| n.checked_mul(extent));
                    self.expect(']')?;
                }
            }
            let mut bytes = count.and_then(|n| n.checked_mul(element));
            let content = if self.accept('=') {
                let content = self.initialiser(ty)?;
                let size = *bytes.get_or_insert(content.len());
                let mut content = content;
                if content.len() > size {
                    return Err(format!("`{name}` is smaller than its content"));
                }
                content.resize(size, 0);
                Some(content)
            } else {
                None
            };
            if bytes.is_some_and(|n| n > MAX_VARIABLE_BYTES) {
                return Err(format!("`{name}` is larger than any memory"));
            }
            out.push(Variable { name, line, space, align, bytes, content });
            // In a parameter list a comma before a directive separates parameters.
            let behind = self.tokens.get(self.next + 1).map(|token| token.kind);
            let more = self.peek() == Some(Kind::Symbol(','))
                && matches!(behind, Some(Kind::Word(word)) if !word.starts_with('.'));
            if !more {
                return Ok(out);
            }
            self.next += 1;
        }
    }

    fn alignment(&mut self) -> Parsed<u64> {
        let align = self.integer()?;
        if align.is_power_of_two() && align <= MAX_ALIGNMENT {
            Ok(align)
        } else {
            Err(format!("an alignment of {align}"))
        }
    }

    fn initialiser(&mut self, ty: Type) -> Parsed<Vec<u8>> {
        if self.accept('{') {
            let mut out = vec![];
            while !self.accept('}') {
                if !out.is_empty() {
                    self.expect(',')?;
                }
                out.append(&mut self.initialiser(ty)?);
            }
            return Ok(out);
        }
        let bits = match self.arg()? {
            Arg::Integer(value) => value as u64,
            Arg::Float(value) if ty.bits() == 32 => u64::from((value as f32).to_bits()),
            Arg::Float(value) if ty.bits() == 64 => value.to_bits(),
            _ => return Err("only numbers are modelled as initial content".into()),
        };
        Ok(bits.to_le_bytes()[..ty.bytes()].to_vec())
    }

    /// The operands of an instruction, up to and including the `;`.
    fn args(&mut self) -> Parsed<Vec<Arg<'a>>> {
        let mut args = vec![];
        while !self.accept(';') {
            if !args.is_empty() && !self.accept(',') {
                // Before the fragment of a matrix store LLVM writes no space, but always a comma.
                return Err("expected `,` or `;`".into());
            }
            args.push(self.arg()?);
        }
        Ok(args)
    }

    fn arg(&mut self) -> Parsed<Arg<'a>> {
        let kind = self.peek().ok_or("the text ends within an instruction")?;
        self.next += 1;
        Ok(match kind {
            Kind::Integer(value) => Arg::Integer(value.into()),
            Kind::Float(value) => Arg::Float(value),
            Kind::Symbol('-') => match self.arg()? {
                Arg::Integer(value) => Arg::Integer(-value),
                Arg::Float(value) => Arg::Float(-value),
                _ => return Err("expected a number after `-`".into()),
            },
            Kind::Symbol('!') => Arg::Not(self.word("a predicate")?),
            Kind::Symbol('{') => Arg::Vector(self.list('}')?),
            Kind::Symbol('(') => Arg::List(self.list(')')?),
            Kind::Symbol('[') => {
                let base = match self.peek() {
                    Some(Kind::Word(word)) => {
                        self.next += 1;
                        Some(word)
                    }
                    _ => None,
                };
                let offset = if base.is_none() { self.signed()? } else { self.offset()? };
                self.expect(']')?;
                Arg::Address(base, offset)
            }
            Kind::Word(word) => {
                if self.accept('|') {
                    Arg::Both(word, self.word("a second register")?)
                } else {
                    Arg::Name(word, self.offset()?)
                }
            }
            kind => return Err(format!("{} where an operand is expected", describe(kind))),
        })
    }

    fn list(&mut self, close: char) -> Parsed<Vec<Arg<'a>>> {
        let mut out = vec![];
        while !self.accept(close) {
            if !out.is_empty() {
                self.expect(',')?;
            }
            out.push(self.arg()?);
        }
        Ok(out)
    }

    /// `+4`, `+-4`, `-4` or nothing.
    fn offset(&mut self) -> Parsed<i64> {
        match self.peek() {
            Some(Kind::Symbol('+')) => {
                self.next += 1;
                self.signed()
            }
            Some(Kind::Symbol('-')) => self.signed(),
            _ => Ok(0),
        }
    }

    fn signed(&mut self) -> Parsed<i64> {
        let negative = self.accept('-');
        let value = self.integer()? as i64;
        Ok(if negative { value.wrapping_neg() } else { value })
    }

    fn peek(&self) -> Option<Kind<'a>> {
        self.tokens.get(self.next).map(|token| token.kind)
    }

    /// The line of the current token, or of the last one.
    fn line(&self) -> usize {
        self.tokens.get(self.next).or(self.tokens.last()).map_or(1, |token| token.line)
    }

    fn accept(&mut self, symbol: char) -> bool {
        let found = self.peek() == Some(Kind::Symbol(symbol));
        self.next += usize::from(found);
        found
    }

    fn expect(&mut self, symbol: char) -> Parsed<()> {
        if self.accept(symbol) { Ok(()) } else { Err(format!("expected `{symbol}`")) }
    }

    fn word(&mut self, what: &str) -> Parsed<&'a str> {
        match self.peek() {
            Some(Kind::Word(word)) => {
                self.next += 1;
                Ok(word)
            }
            _ => Err(format!("expected {what}")),
        }
    }

    fn integer(&mut self) -> Parsed<u64> {
        match self.peek() {
            Some(Kind::Integer(value)) => {
                self.next += 1;
                Ok(value)
            }
            _ => Err("expected an integer".into()),
        }
    }

    fn ty(&mut self) -> Parsed<Type> {
        let word = self.word("a type")?;
        word.strip_prefix('.').and_then(Type::parse).ok_or(format!("`{word}` is no type"))
    }

    fn skip_line(&mut self) {
        let line = self.line();
        while self.tokens.get(self.next).is_some_and(|token| token.line == line) {
            self.next += 1;
        }
    }

    fn skip_statement(&mut self) -> Parsed<()> {
        while !self.accept(';') {
            self.peek().ok_or("expected `;`")?;
            self.next += 1;
        }
        Ok(())
    }

    fn skip_section(&mut self) -> Parsed<()> {
        while !self.accept('}') {
            self.peek().ok_or("expected `}`")?;
            self.next += 1;
        }
        Ok(())
    }
}

fn describe(kind: Kind) -> String {
    match kind {
        Kind::Word(word) => format!("`{word}`"),
        Kind::Integer(value) => format!("`{value}`"),
        Kind::Float(value) => format!("`{value}`"),
        Kind::String(value) => format!("\"{value}\""),
        Kind::Symbol(symbol) => format!("`{symbol}`"),
    }
}
