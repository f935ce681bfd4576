//! From a checked model to a program, through the cache.

use std::ffi::OsString;
use std::fs;
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
use peft_runtime::trust::{TrustError, What, trusted};
use tempfile::TempDir;

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
    compile_entries(model, &Entry::of_artifact(model), options)
}

/// Compiles some entries of `model`, or finds them in the cache.
pub fn compile_entries(model: &Model, entries: &[Entry], options: &Options) -> Result<Artifact, Failure> {
    let begun = Instant::now();
    let folder = tempfile::tempdir().map_err(Failure::file(std::env::temp_dir()))?;
    let mut compiled = None;
    let mut make = || {
        let (manifest, library, timings, remade) = fresh(model, entries, options, folder.path())?;
        compiled = Some((timings, remade));
        Ok::<_, Failure>((manifest, library))
    };
    let (manifest, library) = match cache()? {
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
    codegen::compile(&lowered.kernels, lowered.machine, &library)?;
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
    let build = std::env::current_exe().and_then(|exe| exe.metadata()).and_then(|m| Ok((m.len(), m.modified()?)));
    let build = build.map(|b| format!("{b:?}")).unwrap_or_default();
    let features = options.machine.features().join(",");
    let (arch, machine) = (options.machine.arch().into(), options.machine.to_string());
    let rest = [compiler(), build, codegen::llvm_version().into(), arch, machine, features];
    let (entries, limits) = (format!("{entries:?}"), format!("{:?}", options.limits));
    for part in rest.iter().chain([&entries, &limits]).chain(&options.without) {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().to_hex()[..32].to_string()
}

/// The cache's folder, made if it is not there, for its owner alone. None when `PEFTC_CACHE` is empty, or nothing can be
/// made there. One that strangers may write to is refused.
fn cache() -> Result<Option<PathBuf>, Failure> {
    let path = place(|name| std::env::var_os(name)).unwrap_or_else(|| {
        tracing::warn!(
            "nothing is cached: neither XDG_CACHE_HOME nor HOME is an absolute path; name a folder in PEFTC_CACHE"
        );
        None
    });
    let Some(path) = path else { return Ok(None) };
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    let made = builder.create(&path).map_err(TrustError::from);
    match made.and_then(|()| trusted(&path, What::Cache)) {
        Ok(path) => Ok(Some(path)),
        Err(TrustError::Stranger(stranger)) => Err(store::StoreError::from(stranger).into()),
        Err(TrustError::Unreadable(error)) => {
            tracing::warn!("the cache takes nothing: {}: {error}", path.display());
            Ok(None)
        }
    }
}

/// Where the environment says that the cache is: `PEFTC_CACHE`, or none if that is empty; else the user's cache
/// directory. By the XDG Base Directory Specification, a variable that holds no absolute path counts as unset. Nothing
/// if all do.
fn place(variable: impl Fn(&str) -> Option<OsString>) -> Option<Option<PathBuf>> {
    if let Some(set) = variable("PEFTC_CACHE") {
        return Some((!set.is_empty()).then(|| set.into()));
    }
    let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
    Some(Some(base.join("peftc")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_folders_hold_no_cache() {
        let found = |set: &[(&str, &str)]| {
            place(|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into()))
        };
        let at = |path: &str| Some(Some(PathBuf::from(path)));
        assert_eq!(found(&[("HOME", "/home/a")]), at("/home/a/.cache/peftc"));
        assert_eq!(found(&[("HOME", "/home/a"), ("XDG_CACHE_HOME", "/c")]), at("/c/peftc"));
        for relative in ["", ".", "cache", "../cache"] {
            assert_eq!(found(&[("HOME", "/home/a"), ("XDG_CACHE_HOME", relative)]), at("/home/a/.cache/peftc"));
            assert_eq!(found(&[("HOME", relative), ("XDG_CACHE_HOME", relative)]), None);
            assert_eq!(found(&[("HOME", relative)]), None);
        }
        assert_eq!(found(&[]), None);
        // This one is named for peftc alone.
        assert_eq!(found(&[("PEFTC_CACHE", "cache"), ("HOME", "/home/a")]), at("cache"));
        assert_eq!(found(&[("PEFTC_CACHE", ""), ("HOME", "/home/a")]), Some(None));
    }
}
