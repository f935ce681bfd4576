//! Resolves tasks and recipes that a spec refers to by name: settings that a block omits come from the definition.
//!
//! `task webnlg` and `train chen2022_webnlg { batch: 8 }` refer to definitions of the library or of an imported file. A
//! task with braces, `task webnlg { max_tokens: 256 }`, extends a definition that is imported; otherwise it is a
//! definition itself.

use super::definitions::Files;
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::library;
use crate::source::Sources;

/// Adds the settings of the definitions to the spec's blocks. Each setting keeps the span where it is written.
pub(super) fn resolve(files: &mut Files, sources: &Sources, errors: &mut Vec<Diagnostic>) {
    // The library's files come last, in the order of its modules.
    let own = files.asts.len() - library::MODULES.len();
    let (main, others) = files.asts.split_at_mut(1);
    let (own, library) = others.split_at(own - 1);
    let imported = |module: &str| {
        let imports = |item: &Item| matches!(item, Item::Import(i) if i.what == Imported::Module(module.to_owned()));
        main[0].items.iter().chain(own.iter().flat_map(|ast| &ast.items)).any(imports)
    };
    let modules = library::MODULES.iter().zip(library).map(|((path, _), ast)| (library::module_name(path), ast));
    let (near, far): (Vec<_>, Vec<_>) = modules.partition(|(module, _)| imported(module));
    let near: Vec<&Ast> = own.iter().chain(near.into_iter().map(|(_, ast)| ast)).collect();
    let far: Vec<&Ast> = far.into_iter().map(|(_, ast)| ast).collect();

    let mut found = Vec::new();
    for (at, item) in main[0].items.iter().enumerate() {
        let (block, kind, get): (_, _, Get) = match item {
            Item::Task(block) => (block, "task", task),
            Item::Train(block) => (block, "recipe", recipe),
            _ => continue,
        };
        let name = match (&block.of, item) {
            (Some(name), _) => name,
            (None, Item::Task(_)) => &block.name,
            _ => continue,
        };
        let of = |asts: &[&'_ Ast]| -> Vec<Settings> {
            let all = asts.iter().flat_map(|ast| &ast.items).filter_map(get);
            all.filter(|(defined, _)| defined.text == name.text).map(|(_, block)| block.clone()).collect()
        };
        let mut definitions = of(&near);
        if definitions.is_empty() && block.of.is_some() {
            definitions = of(&far);
        }
        if let [first, second, ..] = &definitions[..]
            && !sources.get(second.name.span.file).library
        {
            let title = format!("several files that are imported define a {kind} `{}`", name.text);
            let error = Diagnostic::error(name.span, title).related(first.name.span, "here");
            errors.push(error.related(second.name.span, "and here").hint("give one of them another name"));
        }
        match definitions.into_iter().next() {
            Some(definition) => found.push((at, definition)),
            None if block.of.is_some() => {
                let error = Diagnostic::error(name.span, format!("there is no {kind} `{}`", name.text));
                let known = near.iter().chain(&far).flat_map(|ast| &ast.items).filter_map(get);
                let known: Vec<&str> = known.map(|(name, _)| name.text.as_str()).collect();
                errors.push(error.suggest(&name.text, known));
            }
            None => {}
        }
    }
    for (at, definition) in found {
        let (Item::Task(block) | Item::Train(block)) = &mut main[0].items[at] else { continue };
        let given: Vec<String> = block.entries.iter().map(|entry| entry.key.text.clone()).collect();
        block.entries.extend(definition.entries.into_iter().filter(|entry| !given.contains(&entry.key.text)));
    }
}

type Get = fn(&Item) -> Option<(&Name, &Settings)>;

/// The definition of a task with its name.
fn task(item: &Item) -> Option<(&Name, &Settings)> {
    match item {
        Item::Task(block) if block.of.is_none() => Some((&block.name, block)),
        _ => None,
    }
}

/// The definition of a recipe, a `train` block with a name.
fn recipe(item: &Item) -> Option<(&Name, &Settings)> {
    match item {
        Item::Train(block) => Some((block.of.as_ref()?, block)),
        _ => None,
    }
}
