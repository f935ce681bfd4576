//! The standard library of the language, embedded in the binary: backbones, methods, shared functions, tasks and
//! recipes.

use serde::Serialize;

use crate::ast::{Arg, CheckpointEntry, Item, ParamDef, Setting, Settings};
use crate::check::purposes;
use crate::source::{FileId, Span};

/// All modules: the path below `models/`, and the text.
pub const MODULES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// The module name of a path: `backbones.gpt2` for `backbones/gpt2.peft`.
pub(crate) fn module_name(path: &str) -> String {
    path.trim_end_matches(".peft").replace('/', ".")
}

/// A definition of the library with its documentation.
#[derive(Clone, Debug, Serialize)]
pub struct LibraryEntry {
    /// The name of the definition.
    pub name: String,
    /// The header: `lora(rank: int, alpha: float = rank, …) on projection`, `webnlg for generation`.
    pub signature: String,
    /// The doc comment without its `///`.
    pub doc: String,
    /// The path of the file below `models/`.
    pub file: &'static str,
    /// The text of the file.
    pub source: &'static str,
}

/// All methods, by file.
pub fn methods() -> Vec<LibraryEntry> {
    entries_in("methods/")
}

/// All backbones, by file.
pub fn backbones() -> Vec<LibraryEntry> {
    entries_in("backbones/")
}

/// All tasks, by file.
pub fn tasks() -> Vec<LibraryEntry> {
    entries_in("tasks/")
}

/// All training recipes, by file.
pub fn recipes() -> Vec<LibraryEntry> {
    entries_in("recipes/")
}

/// The module that defines a task: `tasks.webnlg`.
pub(crate) fn task_module(name: &str) -> Option<String> {
    tasks().into_iter().find(|task| task.name == name).map(|task| module_name(task.file))
}

/// The backbone whose checkpoints have this `model_type` in `config.json`.
pub fn backbone_of(model_type: &str) -> Option<String> {
    backbone_with(|entry| matches!(entry, CheckpointEntry::ModelType(all) if all.iter().any(|t| t.text == model_type)))
}

/// The backbone whose GGUF files have this `general.architecture` in their metadata.
pub fn backbone_of_gguf(architecture: &str) -> Option<String> {
    backbone_with(|entry| match entry {
        CheckpointEntry::Gguf { architectures, .. } => architectures.iter().any(|t| t.text == architecture),
        _ => false,
    })
}

/// The first backbone with a `checkpoint` entry that satisfies `fits`.
fn backbone_with(fits: impl Fn(&CheckpointEntry) -> bool) -> Option<String> {
    let files = MODULES.iter().filter(|(path, _)| path.starts_with("backbones/"));
    let asts = files.filter_map(|(_, source)| crate::parser::parse(FileId(0), source).ok());
    asts.flat_map(|ast| ast.items).find_map(|item| match item {
        Item::Backbone(def) if def.checkpoint.iter().any(&fits) => Some(def.name.text),
        _ => None,
    })
}

/// The methods that have a counterpart in PEFT, with their `peft_type`, sorted by name.
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

/// The method of this `peft_type` whose modules are listed under `key`, with its kind of site.
pub fn method_listing(peft_type: &str, key: &str) -> Option<(String, String)> {
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

/// The methods of this `peft_type` that declare the value of `key` to be `value`, which is compared as source text.
pub fn methods_declaring(peft_type: &str, key: &str, value: &str) -> Vec<String> {
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

/// A default application of a method: the blocks at the end of its file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// Arguments of the backbone, as source text: `first_position: 16`.
    pub model: Vec<String>,
    /// The rules of `tune`, as source text.
    pub tune: Vec<String>,
    /// The settings of `train`, with their values as source text.
    pub train: Vec<(String, String)>,
}

/// The default application in the file of a method.
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

fn entries_in(folder: &str) -> Vec<LibraryEntry> {
    let mut all = Vec::new();
    for &(file, source) in MODULES.iter().filter(|(path, _)| path.starts_with(folder)) {
        // The tests ensure that all files of the library parse.
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
            all.push(LibraryEntry { name: name.text, signature, doc, file, source });
        }
    }
    all
}

/// A parameter list as source text: `(rank: int, alpha: float = rank)`.
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

/// The text of the `///` lines directly above the line that contains byte `at`.
fn doc_before(source: &str, at: usize) -> String {
    let above: Vec<&str> = source[..at].lines().collect();
    let above = &above[..above.len().saturating_sub(1)];
    let lines = above.iter().rev().map_while(|line| line.strip_prefix("///"));
    let mut lines: Vec<&str> = lines.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
    lines.reverse();
    lines.join("\n")
}
