//! The language's own library, embedded in the binary: backbones, methods and the functions they share, tasks and recipes.

use serde::Serialize;

use crate::ast::{Arg, Entry, Item, ParamDef, Setting, Settings};
use crate::check::purposes;
use crate::source::{FileId, Span};

/// Modules by path below `models/`, with their texts: every file there is one.
pub const MODULES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// `backbones/gpt2.peft` as an import writes it: `backbones.gpt2`.
pub(crate) fn module_name(path: &str) -> String {
    path.trim_end_matches(".peft").replace('/', ".")
}

/// A definition of the library, as its file describes it.
#[derive(Clone, Debug, Serialize)]
pub struct Described {
    pub name: String,
    /// `lora(rank: int, alpha: float = rank, …) on projection`, `webnlg for generation`
    pub signature: String,
    /// Its doc comment, `///` taken off.
    pub doc: String,
    /// Below `models/`.
    pub file: &'static str,
    pub source: &'static str,
}

/// Every method, by file.
pub fn methods() -> Vec<Described> {
    described("methods/")
}

/// Every backbone, by file.
pub fn backbones() -> Vec<Described> {
    described("backbones/")
}

/// Every task, by file.
pub fn tasks() -> Vec<Described> {
    described("tasks/")
}

/// Every training recipe, by file.
pub fn recipes() -> Vec<Described> {
    described("recipes/")
}

/// The module of the library that defines a task: `tasks.webnlg`.
pub(crate) fn task_module(name: &str) -> Option<String> {
    tasks().into_iter().find(|task| task.name == name).map(|task| module_name(task.file))
}

/// The backbone whose checkpoints have this `model_type` in their `config.json`.
pub fn backbone_of(model_type: &str) -> Option<String> {
    backbone_with(|entry| matches!(entry, Entry::ModelType(all) if all.iter().any(|t| t.text == model_type)))
}

/// The backbone whose GGUF files have this `general.architecture` in their metadata.
pub fn backbone_of_gguf(architecture: &str) -> Option<String> {
    backbone_with(|entry| match entry {
        Entry::Gguf { architectures, .. } => architectures.iter().any(|t| t.text == architecture),
        _ => false,
    })
}

/// The first backbone of the library whose `checkpoint` block has an entry that fits.
fn backbone_with(fits: impl Fn(&Entry) -> bool) -> Option<String> {
    let files = MODULES.iter().filter(|(path, _)| path.starts_with("backbones/"));
    let asts = files.filter_map(|(_, source)| crate::parser::parse(FileId(0), source).ok());
    asts.flat_map(|ast| ast.items).find_map(|item| match item {
        Item::Backbone(def) if def.checkpoint.iter().any(&fits) => Some(def.name.text),
        _ => None,
    })
}

/// Methods that have a counterpart in PEFT, with its `peft_type`, by name.
pub fn counterparts() -> Vec<(String, String)> {
    let mut all = Vec::new();
    for &(_, source) in MODULES.iter().filter(|(path, _)| path.starts_with("methods/")) {
        let Ok(ast) = crate::parser::parse(FileId(0), source) else { continue };
        all.extend(ast.items.into_iter().filter_map(|item| match item {
            Item::Method(def) => Some((def.name.text, def.counterpart?.peft_type.text)),
            _ => None,
        }));
    }
    all.sort();
    all.dedup();
    all
}

/// The method of a `peft_type` whose modules are listed by `key`, with the kind of site that it is written for.
pub fn lister(peft_type: &str, key: &str) -> Option<(String, String)> {
    use crate::ast::CounterpartLine::Modules;
    let asts = MODULES.iter().filter(|(path, _)| path.starts_with("methods/"));
    let asts = asts.filter_map(|(_, source)| crate::parser::parse(FileId(0), source).ok());
    asts.flat_map(|ast| ast.items).find_map(|item| {
        let Item::Method(def) = item else { return None };
        let counterpart = def.counterpart.filter(|c| c.peft_type.text == peft_type)?;
        let lists = |line: &_| matches!(line, Modules(k) if k.text == key);
        counterpart.lines.iter().any(lists).then_some((def.name.text, def.kind.text))
    })
}

/// Methods of a `peft_type` that declare `key` to be `value`, as it is written there.
pub fn methods_where(peft_type: &str, key: &str, value: &str) -> Vec<String> {
    use crate::ast::CounterpartLine::Is;
    let mut all = Vec::new();
    for &(_, source) in MODULES.iter().filter(|(path, _)| path.starts_with("methods/")) {
        let Ok(ast) = crate::parser::parse(FileId(0), source) else { continue };
        for item in ast.items {
            let Item::Method(def) = item else { continue };
            let Some(counterpart) = def.counterpart.filter(|c| c.peft_type.text == peft_type) else { continue };
            let is = |line: &_| {
                matches!(line, Is { key: k, values, .. } if k.text == key
                && values.iter().any(|v| slice(source, v.span) == value))
            };
            if counterpart.lines.iter().any(is) {
                all.push(def.name.text);
            }
        }
    }
    all.sort();
    all.dedup();
    all
}

/// How a method is used where nothing else is known: the blocks that its file ends with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// Arguments of the backbone, as they are written: `first_position: 16`.
    pub model: Vec<String>,
    /// The rules of `tune`, as they are written.
    pub tune: Vec<String>,
    /// Settings of `train`, with their values as they are written.
    pub train: Vec<(String, String)>,
}

/// The usage that the file of a method shows.
pub fn usage(method: &str) -> Option<Usage> {
    let files = MODULES.iter().filter(|(path, _)| path.starts_with("methods/"));
    let parsed = files.filter_map(|&(_, source)| Some((source, crate::parser::parse(FileId(0), source).ok()?)));
    let of = |items: &[Item]| items.iter().any(|item| matches!(item, Item::Method(def) if def.name.text == method));
    let (source, ast) = parsed.into_iter().find(|(_, ast)| of(&ast.items))?;
    let mut usage = Usage::default();
    for item in &ast.items {
        match item {
            Item::Model(def) => usage.model = def.args.iter().map(|a| argument(source, a)).collect(),
            Item::Tune(tune) => {
                let inside = slice(source, tune.span).split_once('{')?.1.rsplit_once('}')?.0;
                usage.tune = inside.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect();
            }
            Item::Train(train) => {
                let setting = |s: &Setting| (s.key.text.clone(), slice(source, s.value.span).to_owned());
                usage.train = train.entries.iter().map(setting).collect();
            }
            _ => {}
        }
    }
    (!usage.tune.is_empty()).then_some(usage)
}

fn argument(source: &str, arg: &Arg) -> String {
    let name = arg.name.as_ref().map(|name| format!("{}: ", name.text)).unwrap_or_default();
    name + slice(source, arg.value.span)
}

fn described(folder: &str) -> Vec<Described> {
    let mut all = Vec::new();
    for &(file, source) in MODULES.iter().filter(|(path, _)| path.starts_with(folder)) {
        // The library's own files parse: the tests see to it.
        let Ok(ast) = crate::parser::parse(FileId(0), source) else { continue };
        for item in ast.items {
            let (name, signature) = match item {
                Item::Method(def) => (def.name, params(source, &def.params) + " on " + &def.kind.text),
                Item::Backbone(def) => {
                    let mut words: Vec<&str> = vec![];
                    for name in purposes(&def) {
                        words.extend(Some(&*name.text).filter(|word| !words.contains(word)));
                    }
                    let signature = params(source, &def.params) + " for " + &words.join(", ");
                    (def.name, signature)
                }
                Item::Task(def) => {
                    let kind = def.entries.iter().find(|entry| entry.key.text == "kind");
                    (def.name, kind.map(|kind| format!(" for {}", slice(source, kind.value.span))).unwrap_or_default())
                }
                Item::Train(Settings { of: Some(name), .. }) => (name, String::new()),
                _ => continue,
            };
            let signature = name.text.clone() + &signature;
            let doc = doc_before(source, name.span.start as usize);
            all.push(Described { name: name.text, signature, doc, file, source });
        }
    }
    all
}

/// `(rank: int, alpha: float = rank)`
fn params(source: &str, params: &[ParamDef]) -> String {
    let param = |p: &ParamDef| {
        let default = p.default.as_ref().map(|e| format!(" = {}", slice(source, e.span))).unwrap_or_default();
        format!("{}: {}{default}", p.name.text, p.ty.text)
    };
    format!("({})", params.iter().map(param).collect::<Vec<_>>().join(", "))
}

fn slice(source: &str, span: Span) -> &str {
    &source[span.start as usize..span.end as usize]
}

/// The `///` lines right above the line that `at` lies in.
fn doc_before(source: &str, at: usize) -> String {
    let above: Vec<&str> = source[..at].lines().collect();
    let above = &above[..above.len().saturating_sub(1)];
    let lines = above.iter().rev().map_while(|line| line.strip_prefix("///"));
    let mut lines: Vec<&str> = lines.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
    lines.reverse();
    lines.join("\n")
}
