//! Tables: tensors that hold a method's weights of all sites as `[n, sites · weights · d]`, in the order of the sites.

use std::collections::BTreeSet;

use peft_grammar::counterpart::{Counterpart, Table};
use peft_grammar::model::{AppliedMethod, Model};
use peft_runtime::adapter::Stored;

use super::Tensors;
use super::export::numbers;
use super::names::UnreadTensors;

/// The names of the weights in a table, in the order of their columns.
fn columns(model: &Model, counterpart: &Counterpart, table: &Table) -> Result<Vec<String>, String> {
    let here = |a: &&AppliedMethod| a.method == counterpart.method && a.kind == counterpart.kind;
    let sites: Vec<&AppliedMethod> = model.applied.iter().filter(here).collect();
    if sites.len() as u64 != counterpart.sites {
        return Err(format!(
            "PEFT's `{}` holds all of the {} layers, and the spec applies `{}` to {} of them",
            table.name,
            counterpart.sites,
            counterpart.method,
            sites.len()
        ));
    }
    let of_site = |a: &&AppliedMethod| table.weights.iter().map(|w| format!("{}.{w}", a.path())).collect::<Vec<_>>();
    Ok(sites.iter().flat_map(of_site).collect())
}

/// Writes the counterpart's tables into `tensors`, and the names of their weights into `written`.
///
/// # Errors
///
/// The method is not applied in all layers, or its weights differ in shape.
pub fn export(
    model: &Model,
    counterpart: &Counterpart,
    values: &Tensors,
    tensors: &mut Tensors,
    written: &mut BTreeSet<String>,
) -> Result<(), String> {
    for table in &counterpart.tables {
        let names = columns(model, counterpart, table)?;
        let parts = names.iter().map(|name| Ok((&*values[name].shape, numbers(values, name)?)));
        let known = |name: &&String| !values.contains_key(*name);
        if let Some(name) = names.iter().find(known) {
            return Err(format!("the trained values lack `{name}`"));
        }
        let parts = parts.collect::<Result<Vec<_>, String>>()?;
        let [rows, width] = parts[0].0[..] else { return Err(format!("`{}` is not a matrix", names[0])) };
        if parts.iter().any(|(shape, _)| **shape != [rows, width]) {
            return Err(format!(
                "PEFT's `{}` has the same length in all layers, and the spec's lengths differ",
                table.name
            ));
        }
        let row = |t: usize| parts.iter().flat_map(move |(_, x)| &x[t * width as usize..][..width as usize]);
        let numbers: Vec<f32> = (0..rows as usize).flat_map(row).copied().collect();
        tensors.insert(table.name.clone(), Stored::f32(vec![rows, width * parts.len() as u64], numbers));
        written.extend(names);
    }
    Ok(())
}

/// Reads the counterpart's tables into `values`.
///
/// # Errors
///
/// A table is missing or has another shape than the spec's weights.
pub fn import(
    model: &Model,
    counterpart: &Counterpart,
    unread: &mut UnreadTensors,
    values: &mut Tensors,
) -> Result<(), String> {
    for table in &counterpart.tables {
        let names = columns(model, counterpart, table)?;
        let found = unread.shape(&table.name)?.to_vec();
        if let Some(name) = names.iter().find(|n| !model.params.iter().any(|p| p.name == **n)) {
            // The spec trains other tensors, from which this weight is computed.
            let instead = model.replaced.first().unwrap_or(name);
            return Err(format!(
                "`{}` holds `{name}` itself, not `{instead}`, from which it is computed; set `{}.direct=true`",
                table.name, counterpart.method
            ));
        }
        let shapes: Vec<&[u64]> =
            names.iter().filter_map(|n| Some(&*model.params.iter().find(|p| p.name == *n)?.shape)).collect();
        let [rows, width] = shapes[0][..] else { return Err(format!("`{}` is no matrix", names[0])) };
        let wanted = [rows, width * names.len() as u64];
        if found != wanted || shapes.iter().any(|s| **s != [rows, width]) {
            return Err(format!("the adapter's `{}` is {found:?}, the spec's {wanted:?}", table.name));
        }
        let numbers = unread.take(&table.name, &found)?;
        for (at, name) in names.iter().enumerate() {
            let first = |t: usize| t * wanted[1] as usize + at * width as usize;
            let own = (0..rows as usize).flat_map(|t| &numbers[first(t)..][..width as usize]).copied().collect();
            values.insert(name.clone(), Stored::f32(vec![rows, width], own));
        }
    }
    Ok(())
}
