//! The `peft` dialect: graphs as MLIR, and back.
//!
//! The dialect is registered with MLIR through IRDL, from the one table of operations, so MLIR itself
//! checks arity, types and attributes and knows where in a `.peft` file an operation stands. Symbolic
//! axes are in a tensor type's encoding: `tensor<12x?x?xf32, "12,tokens,keys+1">`. Shape relations,
//! which IRDL cannot say, are [`Graph::verify`]'s.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::Write;
use std::rc::Rc;

use melior::Context;
use melior::dialect::DialectRegistry;
use melior::ir::attribute::AttributeLike;
use melior::ir::operation::{OperationLike, OperationPrintingFlags, OperationRef};
use melior::ir::{Attribute, BlockLike, Module, RegionLike, Type as MlirType, ValueLike};
use melior::utility::{load_irdl_dialects, register_all_dialects};
use peft_grammar::graph::{Attr, DType, Dim, Graph, Location, MAX_PARTS, OPERATIONS, Op, Operation, Role, Type, Value};

use crate::Error;

/// An MLIR context that knows the dialect, and what MLIR says in it.
pub struct Dialect {
    context: Context,
    messages: Rc<RefCell<Vec<String>>>,
}

impl Dialect {
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

    /// The graphs as one module, verified by MLIR and by [`Graph::verify`].
    pub fn print(&self, graphs: &[&Graph]) -> Result<String, Error> {
        let module = self.module(graphs)?;
        Ok(module.as_operation().to_string())
    }

    /// [`Dialect::print`] with the place in the `.peft` file behind every operation.
    pub fn print_with_locations(&self, graphs: &[&Graph]) -> Result<String, Error> {
        let module = self.module(graphs)?;
        let flags = OperationPrintingFlags::new().enable_debug_info(true, false);
        module.as_operation().to_string_with_flags(flags).map_err(|e| Error::Mlir(e.to_string()))
    }

    /// Checks the graphs as a stage's result; `stage` names the culprit in the message.
    pub fn verify(&self, stage: &str, graphs: &[&Graph]) -> Result<(), Error> {
        let blame = |e: Error| Error::Invalid { stage: stage.into(), message: e.to_string() };
        self.module(graphs).map(|_| ()).map_err(blame)
    }

    fn module(&self, graphs: &[&Graph]) -> Result<Module<'_>, Error> {
        for graph in graphs {
            graph.verify().map_err(Error::Mlir)?;
        }
        self.parse(&text(graphs))
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

    /// Reads a printed module back.
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
            None => (0..MAX_PARTS)
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

fn text(graphs: &[&Graph]) -> String {
    let mut out = String::from("module {\n");
    for graph in graphs {
        write_function(&mut out, graph);
    }
    out.push_str("}\n");
    out
}

/// A value's name; results of one operation share theirs.
fn name(graph: &Graph, value: Value) -> String {
    match graph.def(value).map(|node| &node.results[..]) {
        Some(results @ [first, _, ..]) => {
            let which = results.iter().position(|v| *v == value).expect("its own");
            format!("%{}#{which}", first.0)
        }
        _ => format!("%{}", value.0),
    }
}

fn write_function(out: &mut String, graph: &Graph) {
    let args = graph.args.iter().map(|arg| {
        let rows = arg.rows.map_or(String::new(), |(start, end)| format!(", peft.rows = [{start}, {end}]"));
        let (role, ty) = (role_name(arg.role), type_text(graph.ty(arg.value)));
        format!("%{}: {ty} {{peft.name = {}, peft.role = \"{role}\"{rows}}}", arg.value.0, quoted(&arg.name))
    });
    let args = args.collect::<Vec<_>>().join(",\n    ");
    let results = graph.outputs.iter();
    let results = results.map(|(name, v)| format!("{} {{peft.name = {}}}", type_text(graph.ty(*v)), quoted(name)));
    let results = results.collect::<Vec<_>>().join(", ");
    let _ = writeln!(out, "  func.func @{}({args}) -> ({results}) {{", graph.name);
    for node in &graph.nodes {
        let types = |values: &[Value]| values.iter().map(|&v| type_text(graph.ty(v))).collect::<Vec<_>>().join(", ");
        let operands = node.operands.iter().map(|&v| name(graph, v)).collect::<Vec<_>>().join(", ");
        let attributes = node.op.attributes();
        let attributes = attributes.iter().map(|(key, value)| format!("{key} = {}", attr_text(value)));
        let mut attributes = attributes.collect::<Vec<_>>();
        // What may have any number of operands says how many it has.
        if node.op.operation().operands.count().is_none() {
            let present = (0..MAX_PARTS).map(|i| if i < node.operands.len() { "1" } else { "0" });
            attributes.push(format!("operandSegmentSizes = array<i32: {}>", present.collect::<Vec<_>>().join(", ")));
        }
        let attributes = attributes.join(", ");
        let attributes = if attributes.is_empty() { attributes } else { format!(" {{{attributes}}}") };
        let Location { file, line, column } = &node.location;
        let at = if *line == 0 { "unknown".into() } else { format!("{}:{line}:{column}", quoted(file)) };
        let (op, from, to) = (node.op.name(), types(&node.operands), types(&node.results));
        let (id, to) = match node.results[..] {
            [one] => (format!("%{}", one.0), to),
            _ => (format!("%{}:{}", node.results[0].0, node.results.len()), format!("({to})")),
        };
        let _ = writeln!(out, "    {id} = \"peft.{op}\"({operands}){attributes} : ({from}) -> {to} loc({at})");
    }
    let values = graph.outputs.iter().map(|(_, v)| name(graph, *v)).collect::<Vec<_>>().join(", ");
    let types = graph.outputs.iter().map(|(_, v)| type_text(graph.ty(*v))).collect::<Vec<_>>().join(", ");
    let colon = if types.is_empty() { "" } else { " : " };
    let _ = writeln!(out, "    return {values}{colon}{types}\n  }}");
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
        // By its bits, so that nothing is lost in print.
        Attr::Float(x) => format!("0x{:016X} : f64", x.to_bits()),
        Attr::Bool(b) => b.to_string(),
        Attr::Ints(v) if v.is_empty() => "array<i64>".into(),
        Attr::Ints(v) => format!("array<i64: {}>", v.iter().map(i64::to_string).collect::<Vec<_>>().join(", ")),
        // In brackets: melior cannot read an empty string.
        Attr::Dims(d) => format!("\"[{}]\"", dims_text(d)),
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
        let op =
            Op::from_parts(short, &|key| operation.attribute(key).ok().and_then(read_attr)).map_err(Error::Mlir)?;
        let location = read_location(&operation.location().to_string());
        let made = graph.push_node(op, &operands, &location).map_err(Error::Mlir)?.results.clone();
        for (result, value) in operation.results().zip(made) {
            let written = read_type(result.r#type())?;
            if written != *graph.ty(value) {
                return Err(broken(&format!("`{full}` gives {}, but {written} is written", graph.ty(value))));
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

fn read_location(text: &str) -> Location {
    // `loc("file":12:5)`
    let parse = || {
        let inner = text.strip_prefix("loc(\"")?.strip_suffix(')')?;
        let (file, place) = inner.split_once("\":")?;
        let (line, column) = place.split_once(':')?;
        Some(Location { file: file.into(), line: line.parse().ok()?, column: column.parse().ok()? })
    };
    parse().unwrap_or_default()
}
