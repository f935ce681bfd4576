//! The `peft` dialect: graphs as MLIR, and back.
//!
//! The dialect is registered with MLIR through IRDL, from the one table of operations, so MLIR itself
//! checks arity, types and attributes and knows where in a `.peft` file an operation stands. Symbolic
//! axes are in a tensor type's encoding: `tensor<12x?x?xf32, "12,tokens,keys+1">`. Shape relations,
//! which IRDL cannot say, are [`Graph::verify`]'s.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::rc::Rc;

use melior::Context;
use melior::dialect::DialectRegistry;
use melior::ir::attribute::AttributeLike;
use melior::ir::operation::{OperationLike, OperationRef};
use melior::ir::{Attribute, BlockLike, Module, RegionLike, Type as MlirType, ValueLike};
use melior::utility::{load_irdl_dialects, register_all_dialects};
use peft_grammar::graph::{
    Attr, DType, Dim, Graph, Location, MAX_VARIADIC_OPERANDS, OPERATIONS, Op, Operation, Role, Type, Value,
};

use crate::Error;

/// An MLIR context that knows the dialect, and what MLIR says in it.
pub struct Dialect {
    context: Context,
    messages: Rc<RefCell<Vec<String>>>,
}

impl Dialect {
    /// A new context with the dialect registered in it.
    ///
    /// # Errors
    /// MLIR refuses the dialect's definition, which is a fault of the compiler.
    pub fn new() -> Result<Self, Error> {
        let context = Context::new();
        let registry = DialectRegistry::new();
        register_all_dialects(&registry);
        context.append_dialect_registry(&registry);
        context.load_all_available_dialects();
        let messages = Rc::new(RefCell::new(vec![]));
        let sink = messages.clone();
        context.attach_diagnostic_handler(move |diagnostic| {
            sink.borrow_mut().push(format!("{}: {diagnostic}", diagnostic.location()));
            true
        });
        let dialect = Dialect { context, messages };
        let loaded = load_irdl_dialects(&dialect.parse(&irdl())?);
        if loaded { Ok(dialect) } else { Err(dialect.error("the dialect's definition was refused")) }
    }

    /// The text of one module with the graphs as functions, verified by MLIR and by [`Graph::verify`]. Values bear the
    /// names of the variables and weights of the `.peft` files, with their site where a graph has several. MLIR's own
    /// printer would number them.
    ///
    /// # Errors
    /// A graph that breaks the dialect's rules.
    pub fn print(&self, graphs: &[&Graph]) -> Result<String, Error> {
        self.verified(graphs)?;
        Ok(text(graphs, false))
    }

    /// [`Dialect::print`] with the site and the place in the `.peft` file behind every operation.
    ///
    /// # Errors
    /// As [`Dialect::print`].
    pub fn print_with_locations(&self, graphs: &[&Graph]) -> Result<String, Error> {
        self.verified(graphs)
    }

    /// Checks the graphs as a stage's result; `stage` names the culprit in the message.
    pub fn verify(&self, stage: &str, graphs: &[&Graph]) -> Result<(), Error> {
        let blame = |e: Error| Error::Invalid { stage: stage.into(), message: e.to_string() };
        self.verified(graphs).map(drop).map_err(blame)
    }

    /// The graphs' text with locations, which MLIR has verified.
    fn verified(&self, graphs: &[&Graph]) -> Result<String, Error> {
        for graph in graphs {
            graph.verify().map_err(Error::Mlir)?;
        }
        let text = text(graphs, true);
        self.parse(&text)?;
        Ok(text)
    }

    pub(crate) fn context(&self) -> &Context {
        &self.context
    }

    pub(crate) fn parse(&self, source: &str) -> Result<Module<'_>, Error> {
        self.messages.borrow_mut().clear();
        let module =
            Module::parse(&self.context, source).ok_or_else(|| self.error("this is no module of the dialect"))?;
        if !module.as_operation().verify() {
            return Err(self.error("the module breaks the dialect's rules"));
        }
        Ok(module)
    }

    pub(crate) fn error(&self, what: &str) -> Error {
        let said = self.messages.borrow_mut().drain(..).collect::<Vec<_>>().join("\n");
        Error::Mlir(if said.is_empty() { what.to_string() } else { format!("{what}\n{said}") })
    }

    /// Reads the functions of a module's text, with the names of their values.
    ///
    /// # Errors
    /// Text that MLIR does not parse, and operations that break the dialect's rules, with their place.
    pub fn read(&self, source: &str) -> Result<Vec<Graph>, Error> {
        let module = self.parse(source)?;
        let mut graphs = vec![];
        let mut next = module.body().first_operation();
        while let Some(function) = next {
            if function.name().as_string_ref().as_str() == Ok("func.func") {
                let graph = read_function(function)?;
                graph.verify().map_err(Error::Mlir)?;
                graphs.push(graph);
            }
            next = function.next_in_block();
        }
        name_values(&mut graphs, &defined_names(source));
        Ok(graphs)
    }
}

/// The dialect's definition in IRDL.
pub fn irdl() -> String {
    let mut out = String::from("irdl.dialect @peft {\n");
    for Operation { name, operands, results, attributes, .. } in OPERATIONS {
        let _ = writeln!(out, "  irdl.operation @{name} {{");
        let operands = match operands.count() {
            // One constraint an operand: a shared one would demand equal types.
            Some(n) => (0..n)
                .map(|i| {
                    let _ = writeln!(out, "    %x{i} = irdl.base \"!builtin.tensor\"");
                    format!("x{i}: %x{i}")
                })
                .collect::<Vec<_>>(),
            // A variadic group has one constraint too, so there is an optional operand for each part.
            None => (0..MAX_VARIADIC_OPERANDS)
                .map(|i| {
                    let _ = writeln!(out, "    %x{i} = irdl.base \"!builtin.tensor\"");
                    format!("x{i}: optional %x{i}")
                })
                .collect(),
        };
        let results = results.iter().map(|name| {
            let _ = writeln!(out, "    %{name} = irdl.base \"!builtin.tensor\"");
            format!("{name}: %{name}")
        });
        let results = results.collect::<Vec<_>>().join(", ");
        if !operands.is_empty() {
            let _ = writeln!(out, "    irdl.operands({})", operands.join(", "));
        }
        let _ = writeln!(out, "    irdl.results({results})");
        if !attributes.is_empty() {
            let named = attributes.iter().enumerate().map(|(i, name)| {
                let _ = writeln!(out, "    %a{i} = irdl.any");
                format!("\"{name}\" = %a{i}")
            });
            let named = named.collect::<Vec<_>>().join(", ");
            let _ = writeln!(out, "    irdl.attributes {{ {named} }}");
        }
        out.push_str("  }\n");
    }
    out.push_str("}\n");
    out
}

fn text(graphs: &[&Graph], locations: bool) -> String {
    let mut out = String::from("module {\n");
    for graph in graphs {
        write_function(&mut out, graph, locations);
    }
    out.push_str("}\n");
    out
}

/// MLIR allows the character in a value's name.
fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_.$-".contains(c)
}

/// By value, its name in the text: of an argument its label, of an operation's result the variable, and a number where
/// there is none. Results of one operation share a name.
fn names(graph: &Graph) -> Vec<String> {
    let mut names = vec![String::new(); graph.value_count()];
    let mut taken: HashSet<String> = HashSet::new();
    let mut unique = |name: &str| {
        let mut name: String = name.chars().map(|c| if is_name_char(c) { c } else { '_' }).collect();
        if name.starts_with(|c: char| c.is_ascii_digit()) {
            name.insert(0, '_');
        }
        let first = name.clone();
        let mut copies = 0;
        while !taken.insert(name.clone()) {
            copies += 1;
            name = format!("{first}_{copies}");
        }
        name
    };
    for arg in &graph.args {
        names[arg.value.0 as usize] = format!("%{}", unique(&arg.label()));
    }
    let named = graph.nodes.iter().map(|node| &node.location).filter(|location| !location.name.is_empty());
    let sites: HashSet<&str> = named.map(|location| &*location.site).collect();
    let mut unnamed = 0;
    for node in &graph.nodes {
        let Location { site, name, .. } = &node.location;
        let name = match (&**name, &**site) {
            ("", _) => {
                unnamed += 1;
                (unnamed - 1).to_string()
            }
            (name, "") => unique(name),
            (name, _) if sites.len() < 2 => unique(name),
            (name, site) => unique(&format!("{site}.{name}")),
        };
        for (which, result) in node.results.iter().enumerate() {
            let which = if node.results.len() > 1 { format!("#{which}") } else { String::new() };
            names[result.0 as usize] = format!("%{name}{which}");
        }
    }
    names
}

fn write_function(out: &mut String, graph: &Graph, locations: bool) {
    let names = names(graph);
    let name = |value: &Value| names[value.0 as usize].as_str();
    let list = |values: &[Value]| values.iter().map(name).collect::<Vec<_>>().join(", ");
    let types = |values: &[Value]| values.iter().map(|&v| type_text(graph.ty(v))).collect::<Vec<_>>().join(", ");
    let args = graph.args.iter().map(|arg| {
        let rows = arg.rows.map_or(String::new(), |(start, end)| format!(", peft.rows = [{start}, {end}]"));
        let (role, ty) = (role_name(arg.role), type_text(graph.ty(arg.value)));
        format!("{}: {ty} {{peft.name = {}, peft.role = \"{role}\"{rows}}}", name(&arg.value), quoted(&arg.name))
    });
    let args = args.collect::<Vec<_>>().join(",\n    ");
    let results = graph.outputs.iter();
    let results = results.map(|(name, v)| format!("{} {{peft.name = {}}}", type_text(graph.ty(*v)), quoted(name)));
    let results = results.collect::<Vec<_>>().join(", ");
    let _ = writeln!(out, "  func.func @{}({args}) -> ({results}) {{", graph.name);
    for node in &graph.nodes {
        let attributes = node.op.attributes();
        let attributes = attributes.iter().map(|(key, value)| format!("{key} = {}", attr_text(value)));
        let mut attributes = attributes.collect::<Vec<_>>();
        // An operation with a variable number of operands has to give that number.
        if node.op.operation().operands.count().is_none() {
            let present = (0..MAX_VARIADIC_OPERANDS).map(|i| if i < node.operands.len() { "1" } else { "0" });
            attributes.push(format!("operandSegmentSizes = array<i32: {}>", present.collect::<Vec<_>>().join(", ")));
        }
        if !node.location.rule.is_empty() {
            attributes.push(format!("peft.rule = {}", quoted(&node.location.rule)));
        }
        let attributes = attributes.join(", ");
        let attributes = if attributes.is_empty() { attributes } else { format!(" {{{attributes}}}") };
        let at = if locations { format!(" loc({})", location_text(&node.location)) } else { String::new() };
        let (op, operands, from) = (node.op.name(), list(&node.operands), types(&node.operands));
        let id = name(&node.results[0]).split('#').next().expect("a name");
        let (id, to) = match node.results[..] {
            [one] => (id.to_string(), type_text(graph.ty(one))),
            _ => (format!("{id}:{}", node.results.len()), format!("({})", types(&node.results))),
        };
        let _ = writeln!(out, "    {id} = \"peft.{op}\"({operands}){attributes} : ({from}) -> {to}{at}");
    }
    let outputs: Vec<Value> = graph.outputs.iter().map(|(_, v)| *v).collect();
    let colon = if outputs.is_empty() { "" } else { " : " };
    let _ = writeln!(out, "    return {}{colon}{}\n  }}", list(&outputs), types(&outputs));
}

/// `"layers.0.attention"("gpt2.peft":12:5)`, with what is known of it.
fn location_text(Location { file, line, column, site, .. }: &Location) -> String {
    let place = (*line > 0).then(|| format!("{}:{line}:{column}", quoted(file)));
    match (&**site, place) {
        ("", None) => "unknown".into(),
        ("", Some(place)) => place,
        (site, None) => quoted(site),
        (site, Some(place)) => format!("{}({place})", quoted(site)),
    }
}

/// The names before the equals signs of the dialect's operations, in the order of the text.
fn defined_names(source: &str) -> Vec<&str> {
    let mut found = vec![];
    let mut rest = source;
    while let Some(at) = rest.find(['"', '/', '%']) {
        let (first, tail) = (rest.as_bytes()[at], &rest[at + 1..]);
        match first {
            b'"' => {
                let mut escaped = false;
                let end = tail.bytes().position(|c| {
                    let ends = c == b'"' && !escaped;
                    escaped = c == b'\\' && !escaped;
                    ends
                });
                rest = end.map_or("", |end| &tail[end + 1..]);
            }
            b'/' if tail.starts_with('/') => rest = tail.split_once('\n').map_or("", |(_, rest)| rest),
            b'%' => {
                let (name, after) = tail.split_at(tail.find(|c| !is_name_char(c)).unwrap_or(tail.len()));
                let count =
                    after.strip_prefix(':').map_or(after, |n| n.trim_start_matches(|c: char| c.is_ascii_digit()));
                if count.trim_start().strip_prefix('=').is_some_and(|op| op.trim_start().starts_with("\"peft.")) {
                    found.push(name);
                }
                rest = after;
            }
            _ => rest = tail,
        }
    }
    found
}

/// Names the results of the graphs' operations, of which `defined` has the names in the order of the text: MLIR does not
/// keep names when it parses. A number that [`names`] has appended to tell equal names apart is removed.
fn name_values(graphs: &mut [Graph], defined: &[&str]) {
    let mut defined = defined.iter();
    for graph in graphs {
        let mut seen: HashSet<&str> = HashSet::new();
        for (node, full) in graph.nodes.iter_mut().zip(defined.by_ref()) {
            if full.starts_with(|c: char| c.is_ascii_digit()) {
                continue;
            }
            seen.insert(full);
            let number = |text: &str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
            let copy = full.rsplit_once('_').filter(|(first, copy)| number(copy) && seen.contains(first));
            let name = copy.map_or(*full, |(first, _)| first);
            let (site, name) = name.rsplit_once('.').unwrap_or(("", name));
            if node.location.site.is_empty() {
                node.location.site = site.into();
            }
            node.location.name = name.into();
        }
    }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Input => "input",
        Role::Frozen => "frozen",
        Role::Trainable => "trainable",
    }
}

fn type_text(ty: &Type) -> String {
    let sizes = ty.shape.iter().map(|d| d.constant().map_or("?x".into(), |n| format!("{n}x"))).collect::<String>();
    let symbolic = ty.shape.iter().any(|d| d.constant().is_none());
    let encoding = if symbolic { format!(", \"{}\"", dims_text(&ty.shape)) } else { String::new() };
    let element = match ty.dtype {
        DType::F32 => "f32",
        DType::I32 => "i32",
    };
    format!("tensor<{sizes}{element}{encoding}>")
}

fn dims_text(shape: &[Dim]) -> String {
    shape.iter().map(Dim::to_string).collect::<Vec<_>>().join(",")
}

fn attr_text(attr: &Attr) -> String {
    match attr {
        Attr::Int(i) => i.to_string(),
        Attr::Float(x) => float_text(*x),
        Attr::Bool(b) => b.to_string(),
        Attr::Ints(v) if v.is_empty() => "array<i64>".into(),
        Attr::Ints(v) => format!("array<i64: {}>", v.iter().map(i64::to_string).collect::<Vec<_>>().join(", ")),
        // In brackets: melior cannot read an empty string.
        Attr::Dims(d) => format!("\"[{}]\"", dims_text(d)),
    }
}

/// The shortest decimal that reads back as the same bits, in MLIR's form.
fn float_text(x: f64) -> String {
    if !x.is_finite() {
        return format!("0x{:016X} : f64", x.to_bits());
    }
    let text = format!("{x:?}");
    match text.split_once('e') {
        Some((digits, power)) if !digits.contains('.') => format!("{digits}.0e{power}"),
        _ => text,
    }
}

fn read_function(function: OperationRef<'_, '_>) -> Result<Graph, Error> {
    let broken = |what: &str| Error::Mlir(format!("{}: {what}", function.location()));
    let name =
        function.attribute("sym_name").ok().and_then(string).ok_or_else(|| broken("a function without a name"))?;
    let region = function.region(0).map_err(|_| broken("a function without a body"))?;
    let block = region.first_block().ok_or_else(|| broken("a function without a body"))?;
    let mut graph = Graph::new(name);
    let mut values: HashMap<*const std::ffi::c_void, Value> = HashMap::new();

    let arg_attributes = function.attribute("arg_attrs").ok();
    for i in 0..block.argument_count() {
        let argument = block.argument(i).map_err(|e| Error::Mlir(e.to_string()))?;
        let attribute = |key: &str| element(arg_attributes?, i).and_then(|d| lookup(d, key));
        let name = attribute("peft.name").and_then(string).ok_or_else(|| broken("an argument without `peft.name`"))?;
        let role = match attribute("peft.role").and_then(string).as_deref() {
            Some("input") => Role::Input,
            Some("frozen") => Role::Frozen,
            Some("trainable") => Role::Trainable,
            _ => return Err(broken("an argument without `peft.role`")),
        };
        let rows = attribute("peft.rows").and_then(|a| Some((integer(element(a, 0)?)?, integer(element(a, 1)?)?)));
        let ty = read_type(argument.r#type())?;
        let rows = rows.map(|(start, end)| (start as u64, end as u64));
        values.insert(argument.to_raw().ptr, graph.arg(name, role, rows, ty));
    }

    let mut next = block.first_operation();
    while let Some(operation) = next {
        let operand = |v: melior::ir::Value| {
            let known = values.get(&v.to_raw().ptr).copied();
            known.ok_or_else(|| broken("an operand comes from elsewhere"))
        };
        let operands = operation.operands().map(operand).collect::<Result<Vec<_>, _>>()?;
        let full = operation.name().as_string_ref().as_str().unwrap_or_default().to_string();
        if full == "func.return" {
            let results = function.attribute("res_attrs").ok();
            for (i, value) in operands.into_iter().enumerate() {
                let name = results.and_then(|r| element(r, i)).and_then(|d| lookup(d, "peft.name")).and_then(string);
                graph.outputs.push((name.ok_or_else(|| broken("a result without `peft.name`"))?, value));
            }
            break;
        }
        let short = full.strip_prefix("peft.").ok_or_else(|| broken("only operations of the dialect belong here"))?;
        let faulty = |what: String| Error::Mlir(format!("{}: `{full}`: {what}", operation.location()));
        let op = Op::from_parts(short, &|key| operation.attribute(key).ok().and_then(read_attr)).map_err(faulty)?;
        let mut location = read_location(&operation.location().to_string());
        location.rule = operation.attribute("peft.rule").ok().and_then(string).unwrap_or_default().into();
        let made = graph.push_node(op, &operands, &location).map_err(faulty)?.results.clone();
        for (result, value) in operation.results().zip(made) {
            let written = read_type(result.r#type())?;
            if written != *graph.ty(value) {
                return Err(faulty(format!("its result is {}, but {written} is written", graph.ty(value))));
            }
            values.insert(result.to_raw().ptr, value);
        }
        next = operation.next_in_block();
    }
    Ok(graph)
}

fn read_type(ty: MlirType) -> Result<Type, Error> {
    // `tensor<12x?x?xf32, "12,tokens,keys+1">`
    let text = ty.to_string();
    let bad = || Error::Mlir(format!("`{text}` is no tensor of the dialect"));
    let inner = text.strip_prefix("tensor<").and_then(|t| t.strip_suffix('>')).ok_or_else(bad)?;
    let (plain, encoding) = inner.split_once(", ").map_or((inner, None), |(a, b)| (a, Some(b)));
    let (sizes, element) = plain.rsplit_once('x').map_or(("", plain), |(a, b)| (a, b));
    let dtype = match element {
        "f32" => DType::F32,
        "i32" => DType::I32,
        _ => return Err(bad()),
    };
    let shape = match encoding {
        Some(e) => e.trim_matches('"').split(',').map(str::parse).collect::<Result<Vec<Dim>, _>>(),
        None if sizes.is_empty() => Ok(vec![]),
        None => sizes.split('x').map(str::parse).collect(),
    };
    Ok(Type { dtype, shape: shape.map_err(|_| bad())? })
}

fn read_attr(attribute: Attribute) -> Option<Attr> {
    if attribute.is_string() {
        let text = string(attribute)?;
        let text = text.strip_prefix('[')?.strip_suffix(']')?;
        let dims =
            if text.is_empty() { vec![] } else { text.split(',').map(str::parse).collect::<Result<_, _>>().ok()? };
        return Some(Attr::Dims(dims));
    }
    if attribute.is_bool() {
        return Some(Attr::Bool(attribute.to_string() == "true"));
    }
    if attribute.is_integer() {
        return integer(attribute).map(Attr::Int);
    }
    if attribute.is_float() {
        return melior::ir::attribute::FloatAttribute::try_from(attribute).ok().map(|f| Attr::Float(f.value()));
    }
    if attribute.is_dense_i64_array() {
        let array = melior::ir::attribute::DenseI64ArrayAttribute::try_from(attribute).ok()?;
        return (0..array.len()).map(|i| array.element(i).ok()).collect::<Option<Vec<_>>>().map(Attr::Ints);
    }
    None
}

fn string(attribute: Attribute) -> Option<String> {
    melior::ir::attribute::StringAttribute::try_from(attribute).ok().map(|s| s.value().to_string())
}

fn integer(attribute: Attribute) -> Option<i64> {
    melior::ir::attribute::IntegerAttribute::try_from(attribute).ok().map(|i| i.value())
}

fn element(array: Attribute<'_>, i: usize) -> Option<Attribute<'_>> {
    melior::ir::attribute::ArrayAttribute::try_from(array).ok()?.element(i).ok()
}

fn lookup<'c>(dictionary: Attribute<'c>, key: &str) -> Option<Attribute<'c>> {
    let key = melior::StringRef::new(key);
    // SAFETY: a null attribute is what MLIR gives for an absent key.
    unsafe {
        let raw = mlir_sys::mlirDictionaryAttrGetElementByName(dictionary.to_raw(), key.to_raw());
        Attribute::from_option_raw(raw)
    }
}

/// The way back from [`location_text`] in `loc(…)`.
fn read_location(text: &str) -> Location {
    let place = |text: &str| {
        let (file, place) = text.strip_prefix('"')?.rsplit_once("\":")?;
        let (line, column) = place.split_once(':')?;
        let (line, column) = (line.parse().ok()?, column.parse().ok()?);
        Some(Location { file: file.into(), line, column, ..Location::default() })
    };
    let Some(text) = text.strip_prefix("loc(").and_then(|text| text.strip_suffix(')')) else {
        return Location::default();
    };
    let named = text.strip_prefix('"').and_then(|text| text.strip_suffix(')')).and_then(|text| text.split_once("\"("));
    match named {
        Some((site, inner)) => Location { site: site.into(), ..place(inner).unwrap_or_default() },
        None => place(text).unwrap_or_default(),
    }
}
