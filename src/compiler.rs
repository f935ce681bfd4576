//! From a checked model to a program, through the cache.

use std::path::{Path, PathBuf};
use std::time::Instant;

use peft_grammar::graph::{Graph, Role, Value};
use peft_grammar::model::Model;
use peft_passes::codegen;
use peft_passes::dialect::Dialect;
use peft_passes::pipeline::{self, Entry, Options, Timings};
use peft_passes::remat::Remade;
use peft_runtime::artifact::Manifest;
use peft_runtime::store;
use tempfile::TempDir;

use crate::cache;
use crate::failure::Failure;
use crate::meaning;

/// A compiled model and where its library lies.
pub struct Artifact {
    pub manifest: Manifest,
    pub library: PathBuf,
    pub timings: Timings,
    /// In a training step, if it was compiled now.
    pub remade: Option<Remade>,
    /// It was there already.
    pub cached: bool,
    /// Where the library was linked. It goes with this; a library that has been loaded stays.
    _folder: TempDir,
}

/// Compiles `model` with every entry an artifact has, or finds it in the cache.
pub fn compile(model: &Model, options: &Options) -> Result<Artifact, Failure> {
    compile_entries(model, &pipeline::of_artifact(model), options)
}

/// Compiles some entries of `model`, or finds them in the cache.
pub fn compile_entries(model: &Model, entries: &[Entry], options: &Options) -> Result<Artifact, Failure> {
    let begun = Instant::now();
    let folder = tempfile::tempdir().map_err(Failure::file(std::env::temp_dir()))?;
    let cache = cache::folder()?;
    let mut compiled = None;
    let mut make = || {
        let kept = cache.as_deref().and_then(cache::kernels);
        let (manifest, library, timings, remade) = fresh(model, entries, options, kept.as_deref(), folder.path())?;
        compiled = Some((timings, remade));
        Ok::<_, Failure>((manifest, library))
    };
    let (manifest, library) = match &cache {
        Some(cache) => store::cached(&cache.join(format!("{}.peftc", key(model, entries, options))), make)?,
        None => make()?,
    };
    let manifest = Manifest { model: description(model), ..manifest };
    let cached = compiled.is_none();
    let (timings, remade) = compiled.unwrap_or_else(|| (vec![("cache", begun.elapsed())], None));
    Ok(Artifact { manifest, library, timings, remade, cached, _folder: folder })
}

/// The pipeline, then LLVM.
fn fresh(
    model: &Model,
    entries: &[Entry],
    options: &Options,
    kept: Option<&Path>,
    folder: &Path,
) -> Result<(Manifest, PathBuf, Timings, Option<Remade>), Failure> {
    let dialect = Dialect::new()?;
    let compiled = pipeline::run(&dialect, model, entries, options)?;
    let lowered = compiled.lowered.expect("the whole way");
    let mut timings = compiled.timings;
    let remade =
        entries.iter().zip(compiled.remade).find(|(entry, _)| **entry == Entry::Train).map(|(_, remade)| remade);
    let begun = Instant::now();
    let library = folder.join(lowered.manifest.library_name());
    codegen::compile(&lowered.kernels(), lowered.machine, kept, &library)?;
    timings.push(("llvm", begun.elapsed()));
    let manifest = Manifest {
        compiler: compiler(),
        llvm: codegen::llvm_version().into(),
        model: description(model),
        ..lowered.manifest
    };
    Ok((manifest, library, timings, remade))
}

/// The model as an artifact carries it: without equations. Of its values it knows the types of those it stores.
fn description(model: &Model) -> serde_json::Value {
    let mut graph = Graph::new(model.graph.name.clone());
    let known = |(name, value): &(String, Value)| {
        (name.clone(), graph.arg(name, Role::Trainable, None, model.graph.ty(*value).clone()))
    };
    let stored = model.stored.iter().map(known).collect();
    let (equations, function) = (meaning::equations(model), meaning::function(model));
    serde_json::to_value(Model { graph, stored, equations, function, ..model.clone() }).expect("a model is plain data")
}

fn compiler() -> String {
    format!("peftc {}", env!("CARGO_PKG_VERSION"))
}

/// What a compiled model depends on: the equations, which values train, the rules, the compiler itself,
/// LLVM, the target and its features.
fn key(model: &Model, entries: &[Entry], options: &Options) -> String {
    let mut hash = blake3::Hasher::new();
    let graph = serde_json::to_vec(&(
        (&model.graph, &model.params, &model.stored, &model.projections, model.train.compiled()),
        (model.backbone.longest, model.backbone.skipped),
    ))
    .expect("a model is plain data");
    hash.update(&graph);
    let features = options.machine.features().join(",");
    let (arch, machine) = (options.machine.arch().into(), options.machine.to_string());
    let rest = [cache::build(), codegen::llvm_version().into(), arch, machine, features];
    let (entries, limits) = (format!("{entries:?}"), format!("{:?}", options.limits));
    for part in rest.iter().chain([&entries, &limits]).chain(&options.without) {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().to_hex()[..32].to_string()
}
