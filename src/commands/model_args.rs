//! The options of commands that read a model: from a spec, which is compiled, or from an artifact.

use std::path::{Path, PathBuf};
#[cfg(feature = "compiler")]
use std::time::{Duration, Instant};

use peft_grammar::model::Model;
use peft_grammar::names::{Entry, OptimizerEntry};
#[cfg(feature = "compiler")]
use peft_passes::{pipeline, remat::RematSavings, target::Machine};
use peft_runtime::artifact::Manifest;
use peft_runtime::{Numbers, Program, RuntimeError, store};

use crate::failure::Failure;
use crate::spec;

/// The options of every command that reads a model.
#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// A `.peft` spec, or an artifact that `peftc compile` wrote
    #[arg(value_name = "SPEC|ARTIFACT")]
    pub path: PathBuf,
    /// Set a value of the spec, such as `train.steps=20`
    #[arg(long, value_name = "KEY=VALUE", value_parser = spec::assignment)]
    pub set: Vec<(String, String)>,
    /// The target to compile for: `cpu` for this processor, a processor level such as `cpu:x86-64-v3`, `cuda` for this
    /// machine's GPU, or a GPU such as `cuda:sm_80`
    #[arg(long, default_value = "cpu")]
    pub target: String,
    /// Disable a fusion rule by name, or all rules without a name
    #[arg(long, value_name = "RULE", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    #[cfg_attr(feature = "compiler", arg(value_parser = rule))]
    pub no_fuse: Vec<String>,
    /// The number of CPU threads to run on [default: the number of cores]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub threads: usize,
    /// Print how long each stage of the compiler took, and what a training step rematerialises instead of storing
    #[arg(long)]
    pub timings: bool,
}

/// Parses the name of a fusion rule.
#[cfg(feature = "compiler")]
fn rule(name: &str) -> Result<String, String> {
    let known = peft_passes::pipeline::rules();
    match name == "all" || known.contains(&name) {
        true => Ok(name.to_string()),
        false => {
            Err(format!("the rules are {}{}", known.join(", "), peft_grammar::diagnostic::did_you_mean(name, &known)))
        }
    }
}

/// A checked model. Its program is compiled later, when the command has read its weights and data, so that errors in
/// these are reported without waiting for the compiler.
pub struct CheckedModel<'a> {
    source: &'a ModelArgs,
    /// The model of the spec or the artifact.
    pub model: Model,
    /// The program of an artifact; `None` for a spec.
    compiled: Option<Program>,
    /// How long reading and checking took.
    #[cfg(feature = "compiler")]
    checked: Duration,
}

impl CheckedModel<'_> {
    /// The program with the given entries: that of the artifact, or compiled from the spec, or found in the cache.
    ///
    /// # Errors
    ///
    /// The compiler refuses the model or fails, the program cannot run on this machine, or the artifact lacks an entry.
    pub fn program(&mut self, entries: &[&str]) -> Result<Program, Failure> {
        let program = match self.compiled.take() {
            Some(program) => program,
            None => self.compile(entries)?,
        };
        let mut program = program.retain_entries(entries);
        // Artifacts of older versions lack these entries, which only some recipes need.
        const LATER_ENTRIES: [OptimizerEntry; 3] =
            [OptimizerEntry::Accumulate, OptimizerEntry::Accumulated, OptimizerEntry::Average];
        let mut later = entries.iter().filter(|entry| LATER_ENTRIES.iter().any(|later| later.name() == **entry));
        if let Some(entry) = later.find(|entry| !program.manifest.entries.contains_key(**entry)) {
            let why = format!("it has no entry `{entry}`, which this recipe needs; compile the spec again");
            return Err(RuntimeError::artifact(&self.source.path, why).into());
        }
        // The program does not depend on `train.lr`, but a parameter's own rate is stored as a factor of it.
        for (tensor, param) in program.manifest.tensors.iter_mut().zip(&self.model.params) {
            tensor.lr_factor = param.lr_factor(&self.model.train);
        }
        Ok(program)
    }

    /// Compiles these entries of the spec, or finds them in the cache.
    #[cfg(feature = "compiler")]
    fn compile(&self, entries: &[&str]) -> Result<Program, Failure> {
        let CheckedModel { source, model, .. } = self;
        let wanted = pipeline::artifact_entries(model).into_iter().filter(|entry| entries.contains(&entry.name()));
        let artifact = crate::compiler::compile_entries(model, &wanted.collect::<Vec<_>>(), &source.options()?)?;
        store::check_machine(&source.path, &artifact.manifest)?;
        if source.timings {
            super::say(&timings(&[&[("check", self.checked)], &artifact.timings[..]].concat(), artifact.savings));
        }
        Ok(Program::new(artifact.manifest, &artifact.library)?)
    }

    #[cfg(not(feature = "compiler"))]
    fn compile(&self, _: &[&str]) -> Result<Program, Failure> {
        Err(self.source.no_compiler())
    }
}

impl ModelArgs {
    /// The options for a command that needs the model alone, and no program.
    pub fn new(path: PathBuf, set: Vec<(String, String)>) -> Self {
        ModelArgs { path, set, target: "cpu".into(), no_fuse: vec![], threads: 0, timings: false }
    }

    /// Whether the path is an artifact, which is a folder.
    pub fn is_artifact(&self) -> bool {
        self.path.is_dir()
    }

    /// The target machine of `--target`.
    ///
    /// # Errors
    ///
    /// There is no such target.
    #[cfg(feature = "compiler")]
    pub fn machine(&self) -> Result<Machine, Failure> {
        self.target.parse().map_err(Failure::Usage)
    }

    /// Checks that `--target` exists and that this machine can run it.
    ///
    /// # Errors
    ///
    /// There is no such target, or it is a GPU and this machine has none that can be used.
    pub fn check_target(&self) -> Result<(), Failure> {
        #[cfg(feature = "compiler")]
        self.machine()?;
        match self.target.split_once(':').map_or(&self.target[..], |(kind, _)| kind) {
            "cpu" => Ok(()),
            "cuda" => {
                let gpus = peft_runtime::device::gpus();
                let mend = "or leave `--target` out to run on the CPU";
                gpus.map(drop)
                    .map_err(|why| Failure::Usage(format!("`{}` cannot run here: {why}; {mend}", self.target)))
            }
            kind => {
                let near = peft_grammar::diagnostic::did_you_mean(kind, &["cpu", "cuda"]);
                Err(Failure::Usage(format!("`{}` is not a target{near}; the targets are cpu and cuda", self.target)))
            }
        }
    }

    /// The error of a build without the compiler that is given a spec.
    fn no_compiler(&self) -> Failure {
        Failure::Usage(format!(
            "{}: this peftc was built without the compiler and runs artifacts only; make one elsewhere with `peftc \
             compile SPEC -o NAME.peftc`",
            self.path.display()
        ))
    }

    /// Reads and checks the model, its target, and that its weights fit into memory.
    ///
    /// # Errors
    ///
    /// The spec or the artifact cannot be used, the target cannot run here, or the weights do not fit.
    pub fn open(&self) -> Result<CheckedModel<'_>, Failure> {
        self.check_target()?;
        #[cfg(feature = "compiler")]
        let begun = Instant::now();
        let (model, compiled) = self.load()?;
        if cfg!(not(feature = "compiler")) && compiled.is_none() {
            return Err(self.no_compiler());
        }
        ModelArgs::check_memory(&model)?;
        Ok(CheckedModel {
            source: self,
            model,
            compiled,
            #[cfg(feature = "compiler")]
            checked: begun.elapsed(),
        })
    }

    /// The model alone, without a program.
    ///
    /// # Errors
    ///
    /// The spec or the artifact cannot be used.
    pub fn model(&self) -> Result<Model, Failure> {
        Ok(self.load()?.0)
    }

    /// A program with the entry `store`, which computes the values that the model stores.
    ///
    /// # Errors
    ///
    /// As [`CheckedModel::program`].
    #[cfg(feature = "compiler")]
    pub fn store(&self, model: &Model) -> Result<Program, Failure> {
        if self.is_artifact() {
            return self.open()?.program(&[Entry::Store.name()]);
        }
        let entries = [Entry::Store];
        let artifact = crate::compiler::compile_entries(model, &entries, &self.options()?)?;
        store::check_machine(&self.path, &artifact.manifest)?;
        Ok(Program::new(artifact.manifest, &artifact.library)?)
    }

    /// A program with the entry `store`, which computes the values that the model stores.
    ///
    /// # Errors
    ///
    /// As [`CheckedModel::program`].
    #[cfg(not(feature = "compiler"))]
    pub fn store(&self, _: &Model) -> Result<Program, Failure> {
        self.open()?.program(&[Entry::Store.name()])
    }

    /// Checks that memory can hold the weights, before they are read.
    fn check_memory(model: &Model) -> Result<(), Failure> {
        let numbers = model.params.iter().map(|p| p.elements()).fold(0, u64::saturating_add);
        Numbers::try_zeros(usize::try_from(numbers).unwrap_or(usize::MAX)).map(drop).map_err(|error| match error {
            RuntimeError::Memory { wanted, free, why, .. } => {
                let remedy = "the model's weights alone take that much: choose a smaller one".into();
                RuntimeError::Memory { wanted, free, why, remedy }.into()
            }
            other => other.into(),
        })
    }

    /// The model, and the program if it is an artifact.
    fn load(&self) -> Result<(Model, Option<Program>), Failure> {
        if !self.is_artifact() {
            return Ok((spec::load(&self.path, &self.set, super::color())?, None));
        }
        let (manifest, library) = store::load(&self.path)?;
        let mut model = model_of_manifest(&self.path, &manifest)?;
        set_recipe_values(&mut model, &self.set)?;
        Ok((model, Some(Program::new(manifest, &library)?)))
    }

    /// The compiler's options for these arguments.
    ///
    /// # Errors
    ///
    /// There is no such target.
    #[cfg(feature = "compiler")]
    pub fn options(&self) -> Result<peft_passes::pipeline::Options, Failure> {
        Ok(peft_passes::pipeline::Options {
            without: self.no_fuse.clone(),
            machine: self.machine()?,
            ..Default::default()
        })
    }
}

/// The model in an artifact's manifest.
fn model_of_manifest(path: &Path, manifest: &Manifest) -> Result<Model, Failure> {
    serde_json::from_value(manifest.model.clone()).map_err(|e| {
        let why = format!("its model cannot be read: {e}");
        store::StoreError::Damaged { path: path.join(store::MANIFEST_FILE), why }.into()
    })
}

/// Applies `--set` to an artifact's model. Only values of the recipe that its kernels do not depend on may change.
fn set_recipe_values(model: &mut Model, changes: &[(String, String)]) -> Result<(), Failure> {
    let fixed = |key: &str| {
        Failure::Usage(format!("`{key}` is compiled into the artifact; compile the spec again to change it"))
    };
    if let Some((key, _)) = changes.iter().find(|(key, _)| !key.starts_with("train.")) {
        return Err(fixed(key));
    }
    let changed = model.train.with(changes).map_err(|diagnostics| Failure::Spec(diagnostics.render(super::color())))?;
    if let Some((_, (key, _))) =
        model.train.kernel_settings().iter().zip(changed.kernel_settings()).find(|(was, is)| **was != *is)
    {
        return Err(fixed(&format!("train.{key}")));
    }
    model.train = changed;
    Ok(())
}

/// The stages' times as a table, with their sum and what the training step rematerialises.
#[cfg(feature = "compiler")]
pub fn timings(all: &[(&str, std::time::Duration)], savings: Option<RematSavings>) -> String {
    let total: std::time::Duration = all.iter().map(|(_, t)| *t).sum();
    let lines = all.iter().map(|(stage, time)| format!("  {stage:<10} {:>8.3} s", time.as_secs_f64()));
    let lines: Vec<String> = lines
        .chain([format!("  {:<10} {:>8.3} s", "in all", total.as_secs_f64())])
        .chain(savings.map(|savings| format!("  {savings}")))
        .collect();
    lines.join("\n")
}
