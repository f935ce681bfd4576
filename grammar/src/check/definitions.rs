//! The definitions that a spec can refer to: its own, imported ones, and the library's, in this order of precedence.

use std::collections::HashMap;

use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::library;
use crate::parser;
use crate::source::{FileId, Sources, Span};

/// A function that returns the text of an imported file, given its path, or the reason why it cannot be read.
pub type Resolver<'a> = dyn Fn(&str) -> Result<String, String> + 'a;

/// The maximum number of files of a spec. It stops imports that generate further imports without end.
const MAX_FILES: usize = 256;

/// The parsed files: the spec first, then the imported files, then the library.
pub(super) struct Files {
    pub asts: Vec<Ast>,
}

impl Files {
    /// Parses the spec's imports and the library.
    pub fn load(main: Ast, sources: &mut Sources, resolver: &Resolver) -> Result<Files, Vec<Diagnostic>> {
        let mut asts = vec![main];
        let mut errors = Vec::new();
        let mut paths = vec![sources.get(FileId(0)).name.clone()];
        let mut at = 0;
        while at < asts.len() {
            for import in imports(&asts[at]) {
                match &import.what {
                    Imported::Module(module) => {
                        let known: Vec<String> =
                            library::MODULES.iter().map(|(p, _)| library::module_name(p)).collect();
                        if !known.contains(module) {
                            let error = Diagnostic::error(import.span, format!("the library has no module `{module}`"));
                            errors.push(error.suggest(module, known.iter().map(String::as_str)));
                        }
                    }
                    Imported::File(relative) => {
                        let path = beside(&paths[at], relative);
                        if paths.contains(&path) {
                            continue;
                        }
                        if paths.len() == MAX_FILES {
                            let title = format!("more than {MAX_FILES} files are imported");
                            errors.push(Diagnostic::error(import.span, title));
                            return Err(errors);
                        }
                        match resolver(&path) {
                            Ok(text) => {
                                let file = sources.add(path.clone(), text.clone());
                                match parser::parse(file, &text) {
                                    Ok(ast) => asts.push(ast),
                                    Err(e) => {
                                        errors.extend(e);
                                        asts.push(Ast { items: vec![] });
                                    }
                                }
                                paths.push(path);
                            }
                            Err(why) => {
                                let error = Diagnostic::error(import.span, format!("`{path}` cannot be read: {why}"));
                                errors.push(error.hint("paths are relative to the file that imports"));
                            }
                        }
                    }
                }
            }
            at += 1;
        }
        for (path, text) in library::MODULES {
            let file = sources.add_library(format!("models/{path}"), *text);
            match parser::parse(file, text) {
                Ok(ast) => asts.push(ast),
                Err(e) => errors.extend(e),
            }
        }
        if errors.is_empty() { Ok(Files { asts }) } else { Err(errors) }
    }
}

fn imports(ast: &Ast) -> Vec<Import> {
    let import = |item: &Item| if let Item::Import(import) = item { Some(import.clone()) } else { None };
    ast.items.iter().filter_map(import).collect()
}

/// The path `relative` resolved against the folder of `file`.
fn beside(file: &str, relative: &str) -> String {
    match file.rfind('/') {
        Some(end) if !relative.starts_with('/') => format!("{}/{}", &file[..end], relative.trim_start_matches("./")),
        _ => relative.to_owned(),
    }
}

#[derive(Default)]
pub(super) struct Definitions<'a> {
    pub backbones: HashMap<&'a str, &'a BackboneDef>,
    pub functions: HashMap<&'a str, &'a FunctionDef>,
    /// The definitions of each method, one for each kind of site.
    pub methods: HashMap<&'a str, Vec<&'a MethodDef>>,
}

impl<'a> Definitions<'a> {
    /// Collects the definitions. A name that the user's own files define twice is an error.
    pub fn collect(files: &'a Files, sources: &Sources, errors: &mut Vec<Diagnostic>) -> Self {
        let mut all = Definitions::default();
        let own = |span: Span| !sources.get(span.file).library;
        let mut twice = |what: &str, name: &Name, first: Span| {
            if own(name.span) {
                let error = Diagnostic::error(name.span, format!("{what} `{}` is defined twice", name.text));
                errors.push(error.related(first, "first here").hint("give one of them another name"));
            }
        };
        for item in files.asts.iter().flat_map(|ast| &ast.items) {
            match item {
                Item::Backbone(def) => match all.backbones.get(&*def.name.text) {
                    Some(first) => twice("backbone", &def.name, first.name.span),
                    None => _ = all.backbones.insert(&def.name.text, def),
                },
                Item::Function(def) => match all.functions.get(&*def.name.text) {
                    Some(first) => twice("function", &def.name, first.name.span),
                    None => _ = all.functions.insert(&def.name.text, def),
                },
                Item::Method(def) => {
                    let same = all.methods.entry(&def.name.text).or_default();
                    match same.iter().find(|m| m.kind.text == def.kind.text) {
                        Some(first) => twice("method", &def.name, first.name.span),
                        None => same.push(def),
                    }
                }
                _ => {}
            }
        }
        all
    }
}
