use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use peft_grammar::diagnostic::did_you_mean;
use peft_grammar::model::Model;
use peft_passes::dialect::Dialect;
use peft_passes::pipeline::{self, Entry, Options, Stage};
use peft_passes::target::Machine;
use peft_runtime::store;

use super::model_args::{self, ModelArgs};
use super::overwrite::Overwrite;
use crate::failure::Failure;
use crate::{compiler, spec};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: ModelArgs,
    /// Print a stage instead: ast, model, peft, grad, fused, kernels, loops, llvm or ptx
    #[arg(long, value_name = "STAGE", value_parser = stage)]
    emit: Option<Stage>,
    /// The entry point that `--emit` prints: forward, eval, grad or train
    #[arg(long, default_value = Entry::Train.name(), value_parser = entry)]
    entry: Entry,
    /// Where the artifact (or the stage) goes; `NAME.peftc` here if not given
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// With `--emit peft`, `grad`, `fused` or `kernels`: print the operations of this site alone, such as
    /// `layers.0.attention`
    #[arg(long, value_name = "SITE")]
    site: Option<String>,
    #[command(flatten)]
    overwrite: Overwrite,
    /// Show model and syntax as JSON, which reads back
    #[arg(long)]
    json: bool,
    /// Show the place in the spec behind every operation
    #[arg(long)]
    locations: bool,
}

fn stage(text: &str) -> Result<Stage, String> {
    let known = Stage::ALL.map(|(_, name)| name);
    let found = Stage::ALL.iter().find(|(_, name)| *name == text);
    let refusal = || format!("the stages are {}{}", known.join(", "), did_you_mean(text, &known));
    found.map(|(stage, _)| *stage).ok_or_else(refusal)
}

fn entry(text: &str) -> Result<Entry, String> {
    let known: Vec<&str> = Entry::ALL.iter().map(|entry| entry.name()).collect();
    let refusal = || format!("the entries are {}{}", known.join(", "), did_you_mean(text, &known));
    Entry::from_name(text).ok_or_else(refusal)
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    match arguments.emit {
        Some(stage) => emit(&arguments, stage),
        None if arguments.site.is_some() => Err(Failure::Usage("`--site` goes with `--emit`".into())),
        None => compile(&arguments),
    }
}

/// Refuses a site that no operation of the model belongs to.
fn known_site(model: &Model, site: &str) -> Result<(), Failure> {
    let locations = || model.graph.nodes.iter().map(|node| &node.location);
    if locations().any(|location| location.within(site)) {
        return Ok(());
    }
    let known: BTreeSet<&str> = locations().map(|location| &*location.site).filter(|site| !site.is_empty()).collect();
    let known: Vec<&str> = known.into_iter().collect();
    let near = did_you_mean(site, &known);
    Err(Failure::Usage(format!("the model has no site `{site}`{near}; it has {}", known.join(", "))))
}

fn compile(arguments: &Arguments) -> Result<(), Failure> {
    let source = &arguments.source;
    let begun = Instant::now();
    let model = spec::load(&source.path, &source.set, super::color())?;
    let checked = begun.elapsed();
    let out = arguments.output.clone().unwrap_or_else(|| format!("{}.peftc", model.name).into());
    let artifact = |path: &Path| path.join(store::MANIFEST_FILE).is_file();
    arguments.overwrite.folder(&out, &[&source.path], artifact)?;
    let artifact = compiler::compile(&model, &source.options()?)?;
    store::save(&out, &artifact.manifest, &artifact.library)?;
    if source.timings {
        let timings = [&[("check", checked)], &artifact.timings[..]].concat();
        super::say(&model_args::timings(&timings, artifact.savings));
    }
    let found = if artifact.cached { " (from the cache)" } else { "" };
    let launches = artifact.manifest.entries.get(Entry::Train.name()).map_or(0, |e| e.launches.len());
    super::print(&format!(
        "{}: {} kernels, {launches} launches a training step{found}",
        out.display(),
        artifact.manifest.kernels.len()
    ));
    Ok(())
}

fn emit(arguments: &Arguments, stage: Stage) -> Result<(), Failure> {
    let source = &arguments.source;
    if let Some(path) = &arguments.output {
        arguments.overwrite.file(path, &[&source.path])?;
    }
    let graphs = [Stage::Peft, Stage::Grad, Stage::Fused, Stage::Kernels];
    if arguments.site.is_some() && !graphs.contains(&stage) {
        return Err(Failure::Usage("`--site` goes with `--emit peft`, `grad`, `fused` or `kernels`".into()));
    }
    if stage == Stage::Ptx && matches!(source.machine()?, Machine::Cpu(_)) {
        return Err(Failure::Usage("a processor has no PTX; ask for that of `--target cuda`".into()));
    }
    let text = match stage {
        Stage::Ast => {
            let text = spec::read(&source.path)?;
            let name = source.path.to_string_lossy();
            let ast = peft_grammar::parse(&name, &text).map_err(|d| Failure::Spec(d.render(super::color())))?;
            ast.to_json()
        }
        _ => {
            let model = spec::load(&source.path, &source.set, super::color())?;
            match stage {
                Stage::Model if arguments.json => model.to_json(),
                Stage::Model => model.to_string(),
                _ => {
                    if let Some(site) = &arguments.site {
                        known_site(&model, site)?;
                    }
                    let dialect = Dialect::new()?;
                    let options = Options { until: stage, ..source.options()? };
                    let compiled = pipeline::run(&dialect, &model, &[arguments.entry], &options)?;
                    if source.timings {
                        super::say(&model_args::timings(&compiled.timings, compiled.savings.first().copied()));
                    }
                    let site = arguments.site.as_deref();
                    pipeline::emit(&dialect, &compiled, stage, site, arguments.locations)?
                }
            }
        }
    };
    super::write_or_print(arguments.output.as_deref(), &text)
}
