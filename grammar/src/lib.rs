//! The front end: `.peft` text to a checked model. Pure: no I/O, no MLIR.
//!
//! [`parse`] gives the syntax tree, [`check`] and [`compile_with`] the [`Model`](model::Model), [`format`]
//! the canonical text. What is wrong with a text is a [`Diagnostics`], which renders itself.

pub mod ast;
pub mod bounds;
mod check;
pub mod counterpart;
pub mod diagnostic;
mod format;
pub mod graph;
pub mod library;
pub mod model;
pub mod names;
mod overrides;
mod parser;
pub mod pattern;
pub mod recipe;
mod show;
pub mod source;

pub use check::Resolver;
pub use diagnostic::{Diagnostic, Diagnostics};
pub use show::grouped;

use model::Model;
use source::{FileId, Sources};

fn open(name: &str, source: &str) -> Sources {
    let mut sources = Sources::default();
    sources.add(name, source);
    sources
}

/// The syntax tree of a text. `name` stands in diagnostics.
pub fn parse(name: &str, source: &str) -> Result<ast::Ast, Diagnostics> {
    parser::parse(FileId(0), source).map_err(|errors| Diagnostics::new(errors, open(name, source)))
}

/// Checks a spec; `resolver` reads the files it imports.
pub fn check(name: &str, source: &str, resolver: &Resolver) -> Result<Model, Diagnostics> {
    compile_with(name, source, &[], resolver)
}

/// Checks a spec with some of its values set from outside: `train.steps=20`, `model.layers=2`,
/// `task.max_tokens=64`, `lora.rank=4` (wherever the spec applies `lora`).
pub fn compile_with(
    name: &str,
    source: &str,
    overrides: &[(String, String)],
    resolver: &Resolver,
) -> Result<Model, Diagnostics> {
    let mut sources = open(name, source);
    let mut ast = match parser::parse(FileId(0), source) {
        Ok(ast) => ast,
        Err(errors) => return Err(Diagnostics::new(errors, sources)),
    };
    let errors = overrides::apply(&mut ast, &mut sources, overrides);
    check::check(ast, sources, errors, resolver)
}

/// The canonical layout of a text that parses.
pub fn format(name: &str, source: &str) -> Result<String, Diagnostics> {
    parse(name, source)?;
    Ok(format::layout(source))
}

/// For specs that import nothing but the library.
pub fn no_imports(path: &str) -> Result<String, String> {
    Err(format!("`{path}` is out of reach here"))
}
