//! Where a command's model comes from: a spec, which is compiled, or an artifact, which has been.

use std::path::{Path, PathBuf};
#[cfg(feature = "compiler")]
use std::time::{Duration, Instant};

use peft_grammar::model::Model;
use peft_grammar::names::{Entry, OptimizerEntry};
#[cfg(feature = "compiler")]
use peft_passes::{pipeline, remat::Remade, target::Machine};
use peft_runtime::artifact::Manifest;
use peft_runtime::{Numbers, Program, RuntimeError, store};

use crate::failure::Failure;
use crate::spec;

/// What every command that runs a model takes.
#[derive(Debug, clap::Args)]
pub struct Source {
    /// A `.peft` spec, or an artifact that `peftc compile` wrote
    #[arg(value_name = "SPEC|ARTIFACT")]
    pub path: PathBuf,
    /// Set a value of the spec, such as `train.steps=20`
    #[arg(long, value_name = "KEY=VALUE", value_parser = spec::assignment)]
    pub set: Vec<(String, String)>,
    /// What to compile for: `cpu`, a level of processors such as `cpu:x86-64-v3`, `cuda`, or a GPU
    /// such as `cuda:sm_80`
    #[arg(long, default_value = "cpu")]
    pub target: String,
    /// Leave out fusion rules, by name; all of them without one
    #[arg(long, value_name = "RULE", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    #[cfg_attr(feature = "compiler", arg(value_parser = rule))]
    pub no_fuse: Vec<String>,
    /// Threads to run on; as many as there are cores if not given
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub threads: usize,
    /// Show how long each stage took, and what a training step makes again instead of keeping
    #[arg(long)]
    pub timings: bool,
}

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

/// A checked model. Its program is made when all that the command reads has been found fit: a person whose weights or
/// data are refused does not wait for a compiler.
pub struct Ready<'a> {
    source: &'a Source,
    pub model: Model,
    /// The program of an artifact; a spec has none yet.
    compiled: Option<Program>,
    /// How long the checks took.
    #[cfg(feature = "compiler")]
    checked: Duration,
}

impl Ready<'_> {
    /// The program with these of its entries: that of the artifact, found in the cache, or compiled now.
    pub fn program(&mut self, entries: &[&str]) -> Result<Program, Failure> {
        let program = match self.compiled.take() {
            Some(program) => program,
            None => self.compile(entries)?,
        };
        let mut program = program.only(entries);
        // What artifacts of before have not, and only some recipes want.
        const YOUNG: [OptimizerEntry; 3] =
            [OptimizerEntry::Accumulate, OptimizerEntry::Accumulated, OptimizerEntry::Average];
        let mut young = entries.iter().filter(|entry| YOUNG.iter().any(|young| young.name() == **entry));
        if let Some(entry) = young.find(|entry| !program.manifest.entries.contains_key(**entry)) {
            let why = format!("it has no entry `{entry}`, which this recipe wants; compile the spec again");
            return Err(RuntimeError::artifact(&self.source.path, why).into());
        }
        // A compiled program holds for every `train.lr`, and factors of it change with it.
        for (tensor, param) in program.manifest.tensors.iter_mut().zip(&self.model.params) {
            tensor.lr_factor = param.lr_factor(&self.model.train);
        }
        Ok(program)
    }

    #[cfg(feature = "compiler")]
    fn compile(&self, entries: &[&str]) -> Result<Program, Failure> {
        let Ready { source, model, .. } = self;
        let wanted = pipeline::of_artifact(model).into_iter().filter(|entry| entries.contains(&entry.name()));
        let artifact = crate::compiler::compile_entries(model, &wanted.collect::<Vec<_>>(), &source.options()?)?;
        store::runs_here(&source.path, &artifact.manifest)?;
        if source.timings {
            super::say(&timings(&[&[("check", self.checked)], &artifact.timings[..]].concat(), artifact.remade));
        }
        Ok(Program::new(artifact.manifest, &artifact.library)?)
    }

    #[cfg(not(feature = "compiler"))]
    fn compile(&self, _: &[&str]) -> Result<Program, Failure> {
        Err(self.source.no_compiler())
    }
}

impl Source {
    /// A spec or an artifact whose model alone is wanted.
    pub fn new(path: PathBuf, set: Vec<(String, String)>) -> Self {
        Source { path, set, target: "cpu".into(), no_fuse: vec![], threads: 0, timings: false }
    }

    pub fn is_artifact(&self) -> bool {
        self.path.is_dir()
    }

    #[cfg(feature = "compiler")]
    pub fn machine(&self) -> Result<Machine, Failure> {
        self.target.parse().map_err(Failure::Usage)
    }

    /// Refuses targets that are none, or that nothing here runs.
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
                Err(Failure::Usage(format!("`{}` is no target{near}; there are cpu and cuda", self.target)))
            }
        }
    }

    fn no_compiler(&self) -> Failure {
        Failure::Usage(format!(
            "{}: this peftc runs artifacts and compiles nothing; make one elsewhere with `peftc compile SPEC -o NAME.peftc`",
            self.path.display()
        ))
    }

    /// The model of the spec or of the artifact, for which there is memory and a machine.
    pub fn open(&self) -> Result<Ready<'_>, Failure> {
        self.check_target()?;
        #[cfg(feature = "compiler")]
        let begun = Instant::now();
        let (model, compiled) = self.load()?;
        if cfg!(not(feature = "compiler")) && compiled.is_none() {
            return Err(self.no_compiler());
        }
        Source::fits(&model)?;
        Ok(Ready {
            source: self,
            model,
            compiled,
            #[cfg(feature = "compiler")]
            checked: begun.elapsed(),
        })
    }

    /// The model alone, without a program to run it.
    pub fn model(&self) -> Result<Model, Failure> {
        Ok(self.load()?.0)
    }

    /// A program that computes what the model stores; of a spec, nothing else.
    #[cfg(feature = "compiler")]
    pub fn store(&self, model: &Model) -> Result<Program, Failure> {
        if self.is_artifact() {
            return self.open()?.program(&[Entry::Store.name()]);
        }
        let entries = [Entry::Store];
        let artifact = crate::compiler::compile_entries(model, &entries, &self.options()?)?;
        store::runs_here(&self.path, &artifact.manifest)?;
        Ok(Program::new(artifact.manifest, &artifact.library)?)
    }

    #[cfg(not(feature = "compiler"))]
    pub fn store(&self, _: &Model) -> Result<Program, Failure> {
        self.open()?.program(&[Entry::Store.name()])
    }

    /// Weights that no memory here could hold are refused before anything is done for them.
    fn fits(model: &Model) -> Result<(), Failure> {
        let numbers = model.params.iter().map(|p| p.elements()).fold(0, u64::saturating_add);
        Numbers::try_zeros(usize::try_from(numbers).unwrap_or(usize::MAX)).map(drop).map_err(|error| match error {
            RuntimeError::Memory { wanted, free, why, .. } => {
                let mend = "the model's weights alone take that much: choose a smaller one".into();
                RuntimeError::Memory { wanted, free, why, mend }.into()
            }
            other => other.into(),
        })
    }

    /// The model, and the program where it is an artifact's.
    fn load(&self) -> Result<(Model, Option<Program>), Failure> {
        if !self.is_artifact() {
            return Ok((spec::load(&self.path, &self.set, super::color())?, None));
        }
        let (manifest, library) = store::load(&self.path)?;
        let mut model = described(&self.path, &manifest)?;
        set(&mut model, &self.set)?;
        Ok((model, Some(Program::new(manifest, &library)?)))
    }

    #[cfg(feature = "compiler")]
    pub fn options(&self) -> Result<peft_passes::pipeline::Options, Failure> {
        Ok(peft_passes::pipeline::Options {
            without: self.no_fuse.clone(),
            machine: self.machine()?,
            ..Default::default()
        })
    }
}

/// The model an artifact carries.
fn described(path: &Path, manifest: &Manifest) -> Result<Model, Failure> {
    serde_json::from_value(manifest.model.clone()).map_err(|e| {
        let why = format!("its model cannot be read: {e}");
        store::StoreError::Damaged { path: path.join(store::MANIFEST), why }.into()
    })
}

/// An artifact's recipe may still change, but for what its kernels are made for; its equations may not.
fn set(model: &mut Model, changes: &[(String, String)]) -> Result<(), Failure> {
    let fixed = |key: &str| {
        Failure::Usage(format!("`{key}` is compiled into the artifact; compile the spec again to change it"))
    };
    if let Some((key, _)) = changes.iter().find(|(key, _)| !key.starts_with("train.")) {
        return Err(fixed(key));
    }
    let changed = model.train.with(changes).map_err(|diagnostics| Failure::Spec(diagnostics.render(super::color())))?;
    if let Some((_, (key, _))) = model.train.compiled().iter().zip(changed.compiled()).find(|(was, is)| **was != *is) {
        return Err(fixed(&format!("train.{key}")));
    }
    model.train = changed;
    Ok(())
}

#[cfg(feature = "compiler")]
pub fn timings(all: &[(&str, std::time::Duration)], remade: Option<Remade>) -> String {
    let total: std::time::Duration = all.iter().map(|(_, t)| *t).sum();
    let lines = all.iter().map(|(stage, time)| format!("  {stage:<10} {:>8.3} s", time.as_secs_f64()));
    let lines: Vec<String> = lines
        .chain([format!("  {:<10} {:>8.3} s", "in all", total.as_secs_f64())])
        .chain(remade.map(|remade| format!("  {remade}")))
        .collect();
    lines.join("\n")
}
