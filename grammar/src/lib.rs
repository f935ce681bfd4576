//! The front end, from `.peft` text to a checked model. It does no I/O and does not depend on MLIR.
//!
//! [`parse`] returns the syntax tree, [`check()`] and [`compile_with`] return the [`Model`], and [`format()`] returns
//! the canonical text. All errors in a text are collected in a [`Diagnostics`], which renders itself.

#![deny(missing_docs)]

pub mod ast;
pub mod bounds;
mod check;
pub mod counterpart;
pub mod diagnostic;
mod display;
mod format;
pub mod graph;
pub mod library;
pub mod model;
pub mod names;
mod overrides;
mod parser;
pub mod pattern;
pub mod recipe;
pub mod source;

pub use check::Resolver;
pub use diagnostic::{Diagnostic, Diagnostics};
pub use display::group_digits;

use model::Model;
use source::{FileId, Sources};

fn open(name: &str, source: &str) -> Sources {
    let mut sources = Sources::default();
    sources.add(name, source);
    sources
}

/// Parses a text. Diagnostics refer to it as `name`.
///
/// # Errors
///
/// The syntax errors of the text.
pub fn parse(name: &str, source: &str) -> Result<ast::Ast, Diagnostics> {
    parser::parse(FileId(0), source).map_err(|errors| Diagnostics::new(errors, open(name, source)))
}

/// Checks a spec. `resolver` reads the files that it imports.
///
/// # Errors
///
/// All errors in the spec and in the files that it imports.
pub fn check(name: &str, source: &str, resolver: &Resolver) -> Result<Model, Diagnostics> {
    compile_with(name, source, &[], resolver)
}

/// Checks a spec with overrides: `train.steps=20`, `model.layers=2`, `task.max_tokens=64`, or `lora.rank=4`, which
/// changes all applications of `lora`.
///
/// # Errors
///
/// All errors in the overrides, the spec and the files that it imports.
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

/// Formats a text.
///
/// # Errors
///
/// The syntax errors of the text.
pub fn format(name: &str, source: &str) -> Result<String, Diagnostics> {
    parse(name, source)?;
    Ok(format::layout(source))
}

/// A resolver for specs that import only the library.
///
/// # Errors
///
/// Always, since it reads no files.
pub fn no_imports(_path: &str) -> Result<String, String> {
    Err("only the library can be imported here".into())
}
