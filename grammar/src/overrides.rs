//! Overrides of the form `--set key=value`. They change the syntax tree before it is checked, so that the checks of a
//! spec apply to them. For diagnostics, each override is a source file.

use crate::ast::*;
use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::recipe::Recipe;
use crate::source::{FileId, Sources, Span};
use crate::{check, parser};

impl Recipe {
    /// The recipe with some settings changed.
    ///
    /// # Errors
    ///
    /// A setting is unknown or out of range, as in a spec.
    pub fn with(&self, changes: &[(String, String)]) -> Result<Recipe, Diagnostics> {
        let mut sources = Sources::default();
        sources.add("the recipe", self.to_source());
        let ast = parser::parse(FileId(0), &self.to_source());
        let mut ast: Ast = match ast {
            Ok(ast) => ast,
            Err(errors) => return Err(Diagnostics::new(errors, sources)),
        };
        let errors = apply(&mut ast, &mut sources, changes);
        check::recipe(ast, sources, errors)
    }
}

/// Applies the overrides to `ast` and returns the errors of those that cannot be applied.
pub(crate) fn apply(ast: &mut Ast, sources: &mut Sources, overrides: &[(String, String)]) -> Vec<Diagnostic> {
    let mut errors = Vec::new();
    for (key, value) in overrides {
        let text = format!("{key}={value}");
        let file = sources.add("--set", text.clone());
        if let Err(error) = apply_one(ast, file, &text, key) {
            errors.extend(error);
        }
    }
    errors
}

fn apply_one(ast: &mut Ast, file: FileId, text: &str, key: &str) -> Result<(), Vec<Diagnostic>> {
    let whole = Span::new(file, 0, key.len());
    let Some((target, parameter)) = key.split_once('.') else {
        let error = Diagnostic::error(whole, format!("`{key}` is not a key"));
        return Err(vec![error.hint("such as `train.steps`, `model.layers`, `task.max_tokens` or `lora.rank`")]);
    };
    // A duration is a string in a spec. In an override it needs no quotes.
    let bare = &text[key.len() + 1..];
    let value = match crate::recipe::seconds(bare) {
        Some(_) => {
            let span = Span::new(file, key.len() + 1, text.len());
            Expr { kind: ExprKind::String(bare.into()), span }
        }
        None => parser::parse_value(file, text, key.len() + 1)?,
    };
    let start = target.len() + 1;
    let name = Name { text: parameter.to_owned(), span: Span::new(file, start, key.len()) };
    match target {
        "train" | "task" => {
            if target == "train" && !ast.items.iter().any(|i| matches!(i, Item::Train(_))) {
                let name = Name { text: "train".into(), span: whole };
                ast.items.push(Item::Train(Settings { name, entries: vec![], of: None }));
            }
            let block = ast.items.iter_mut().find_map(|item| match item {
                Item::Train(block) if target == "train" => Some(block),
                Item::Task(block) if target == "task" => Some(block),
                _ => None,
            });
            let Some(block) = block else {
                return Err(vec![Diagnostic::error(whole, format!("the spec has no `{target}` block"))]);
            };
            match block.entries.iter_mut().find(|e| e.key.text == parameter) {
                Some(entry) => entry.value = value,
                None => block.entries.push(Setting { key: name, value }),
            }
        }
        "model" => {
            for item in &mut ast.items {
                if let Item::Model(model) = item {
                    set(&mut model.args, &name, &value);
                }
            }
        }
        method => {
            let mut found = false;
            let mut used = vec!["train".to_owned(), "task".to_owned(), "model".to_owned()];
            for apply in uses(ast) {
                used.push(apply.method.text.clone());
                if apply.method.text == method {
                    found = true;
                    match rate(&name) {
                        Some(weight) => set_rate(&mut apply.rates, weight, &name, &value),
                        None => set(&mut apply.args, &name, &value),
                    }
                }
            }
            if !found {
                used.dedup();
                let span = Span::new(file, 0, method.len());
                let error = Diagnostic::error(span, format!("the spec applies no method `{method}`"));
                return Err(vec![error.suggest(method, used.iter().map(String::as_str))]);
            }
        }
    }
    Ok(())
}

/// All applications of methods in the spec.
fn uses(ast: &mut Ast) -> impl Iterator<Item = &mut Apply> {
    let rules =
        ast.items.iter_mut().filter_map(|i| if let Item::Tune(tune) = i { Some(&mut tune.rules) } else { None });
    rules.flatten().flat_map(|rule| match rule {
        TuneRule::Sites { apply, .. } => apply.iter_mut().collect(),
        TuneRule::Model(apply) => vec![apply],
        _ => vec![],
    })
}

/// Parses a key `lr` or `lr of B`. The inner option is the weight.
fn rate(key: &Name) -> Option<Option<&str>> {
    let rest = key.text.strip_prefix("lr")?.trim();
    if rest.is_empty() { Some(None) } else { rest.strip_prefix("of ").map(|weight| Some(weight.trim())) }
}

fn set_rate(rates: &mut Vec<Rate>, weight: Option<&str>, key: &Name, value: &Expr) {
    match rates.iter_mut().find(|r| r.weight.as_ref().map(|w| &*w.text) == weight) {
        Some(rate) => rate.value = value.clone(),
        None => {
            let weight = weight.map(|text| Name { text: text.to_owned(), span: key.span });
            rates.push(Rate { weight, value: value.clone(), span: key.span });
        }
    }
}

fn set(args: &mut Vec<Arg>, name: &Name, value: &Expr) {
    match args.iter_mut().find(|a| a.name.as_ref().is_some_and(|n| n.text == name.text)) {
        Some(arg) => arg.value = value.clone(),
        None => args.push(Arg { name: Some(name.clone()), value: value.clone() }),
    }
}
