//! Compiles a checked model to an artifact, or finds the artifact in the cache.

use std::path::{Path, PathBuf};
use std::time::Instant;

use peft_grammar::graph::{Graph, Role, Value};
use peft_grammar::model::Model;
use peft_passes::codegen;
use peft_passes::dialect::Dialect;
use peft_passes::pipeline::{self, Entry, Options, Timings};
use peft_passes::remat::RematSavings;
use peft_runtime::artifact::Manifest;
use peft_runtime::store;
use tempfile::TempDir;

use crate::cache;
use crate::failure::Failure;
use crate::meaning;

/// A compiled model.
pub struct Artifact {
    /// The description of buffers, kernels and entries.
    pub manifest: Manifest,
    /// The path of the library with the kernels.
    pub library: PathBuf,
    /// How long each stage took; the time of the cache alone if nothing was compiled.
    pub timings: Timings,
    /// What the training step rematerialises; `None` if no training step was compiled now.
    pub savings: Option<RematSavings>,
    /// Whether the artifact was found in the cache.
    pub cached: bool,
    /// The temporary folder in which the library was linked. It is deleted with this value; a library that has been
    /// loaded stays usable.
    _folder: TempDir,
}

/// Compiles `model` with every entry that an artifact has, or finds it in the cache.
///
/// # Errors
///
/// As [`compile_entries`].
pub fn compile(model: &Model, options: &Options) -> Result<Artifact, Failure> {
    compile_entries(model, &pipeline::artifact_entries(model), options)
}

/// Compiles the given entries of `model`, or finds them in the cache.
///
/// # Errors
///
/// The compiler refuses the model or fails, or the cache or a temporary folder cannot be used.
pub fn compile_entries(model: &Model, entries: &[Entry], options: &Options) -> Result<Artifact, Failure> {
    let begun = Instant::now();
    let folder = tempfile::tempdir().map_err(Failure::file(std::env::temp_dir()))?;
    let cache = cache::folder()?;
    let mut compiled = None;
    let mut make = || {
        let kept = cache.as_deref().and_then(cache::kernel_folder);
        let (manifest, library, timings, savings) =
            compile_uncached(model, entries, options, kept.as_deref(), folder.path())?;
        compiled = Some((timings, savings));
        Ok::<_, Failure>((manifest, library))
    };
    let (manifest, library) = match &cache {
        Some(cache) => {
            store::open_or_compile(&cache.join(format!("{}.peftc", cache_key(model, entries, options))), make)?
        }
        None => make()?,
    };
    let manifest = Manifest { model: manifest_model(model), ..manifest };
    let cached = compiled.is_none();
    let (timings, savings) = compiled.unwrap_or_else(|| (vec![("cache", begun.elapsed())], None));
    Ok(Artifact { manifest, library, timings, savings, cached, _folder: folder })
}

/// Runs the pass pipeline and then LLVM, and links the library in `folder`. `kept` is the folder of cached machine code
/// of single kernels.
fn compile_uncached(
    model: &Model,
    entries: &[Entry],
    options: &Options,
    kept: Option<&Path>,
    folder: &Path,
) -> Result<(Manifest, PathBuf, Timings, Option<RematSavings>), Failure> {
    let dialect = Dialect::new()?;
    let compiled = pipeline::run(&dialect, model, entries, options)?;
    let lowered = compiled.lowered.expect("the default options run every stage");
    let mut timings = compiled.timings;
    let savings =
        entries.iter().zip(compiled.savings).find(|(entry, _)| **entry == Entry::Train).map(|(_, savings)| savings);
    let begun = Instant::now();
    let library = folder.join(lowered.manifest.library_name());
    codegen::compile(&lowered.kernels(), lowered.machine, kept, &library)?;
    timings.push(("llvm", begun.elapsed()));
    let manifest = Manifest {
        compiler: compiler_version(),
        llvm: codegen::llvm_version().into(),
        model: manifest_model(model),
        ..lowered.manifest
    };
    Ok((manifest, library, timings, savings))
}

/// The model as the manifest carries it: without the nodes of its graph, whose hashes it keeps instead. Its graph
/// declares only the values that the model stores, for their types.
fn manifest_model(model: &Model) -> serde_json::Value {
    let mut graph = Graph::new(model.graph.name.clone());
    let known = |(name, value): &(String, Value)| {
        (name.clone(), graph.arg(name, Role::Trainable, None, model.graph.ty(*value).clone()))
    };
    let stored = model.stored.iter().map(known).collect();
    let (equations_hash, function_hash) = (meaning::equations_hash(model), meaning::function_hash(model));
    let model = Model { graph, stored, equations_hash, function_hash, ..model.clone() };
    serde_json::to_value(model).expect("a model is plain data")
}

/// The name and version that the manifest records as its compiler.
fn compiler_version() -> String {
    format!("peftc {}", env!("CARGO_PKG_VERSION"))
}

/// The cache key of a compiled model: a hash of everything that the result depends on. That is the equations, which
/// values train, the disabled fusion rules and the thresholds, the build of this compiler, the version of LLVM, the
/// target and its features.
fn cache_key(model: &Model, entries: &[Entry], options: &Options) -> String {
    let mut hash = blake3::Hasher::new();
    let graph = serde_json::to_vec(&(
        (&model.graph, &model.params, &model.stored, &model.projections, model.train.kernel_settings()),
        (model.backbone.max_sequence_tokens, model.backbone.position_skip_id),
    ))
    .expect("a model is plain data");
    hash.update(&graph);
    let features = options.machine.features().join(",");
    let (arch, machine) = (options.machine.arch().into(), options.machine.to_string());
    let rest = [cache::build_id(), codegen::llvm_version().into(), arch, machine, features];
    let (entries, thresholds) = (format!("{entries:?}"), format!("{:?}", options.thresholds));
    for part in rest.iter().chain([&entries, &thresholds]).chain(&options.without) {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().to_hex()[..32].to_string()
}
